// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which mappings outlive a change of memslots?
 *
 * A vCPU increments a counter in each page of a memslot all the time, while
 * KVM_SET_USER_MEMORY_REGIONS changes it.
 *
 *  - kept: the slot is split, merged and given other ids.  Each gfn keeps its hva and
 *    flags, therefore the vCPU must not fault.
 *  - kept_beside: only pages that the vCPU does not use are removed and added again, and
 *    get other memory.  The vCPU must not fault, either.
 *  - changed: the upper half of the slot gets other memory, then none, then its original
 *    memory again.  The vCPU must not use memory that the slots do not have any more.
 *  - huge: a slot that KVM maps with huge pages is split, and its lower part logs dirty
 *    pages afterwards.  The vCPU writes to the upper part, then also to the lower part.
 *    Each write to the latter must be logged.
 *  - invalid: the slot gets other memory.  A vCPU that finds the slot INVALID must sleep
 *    until the change is complete, and not fault again and again.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <linux/sizes.h>

#include <test_util.h>
#include <kvm_test_harness.h>
#include <kvm_util.h>
#include <processor.h>

/* Arbitrarily chosen, above the addresses that the library uses. */
#define DATA_GPA		SZ_1G
#define DATA_SLOT		100
#define UPPER_SLOT		101
#define MIDDLE_SLOT		102

#define GUEST_PAGE_SIZE		4096
#define NR_PAGES		64
#define NR_UNUSED_PAGES		8
#define NR_CYCLES		50

/* The half of them that is changed fills page tables, which KVM removes. */
#define NR_CHANGED_PAGES	2048

/*
 * In the case invalid, a change takes long because KVM allocates metadata for slots of
 * this size: a dirty bitmap, and with shadow paging much larger rmaps.
 */
#define LARGE_SIZE		(is_shadow_paging() ? 16ull << 30 : 128ull << 30)
#define NR_CHANGES		20
/* A vCPU faults once for each page that it needs, and once in an INVALID slot. */
#define MAX_FAULTS		30

/*
 * pf_taken counts the faults of the vCPU.  arm64 has no such statistic: all exits are
 * counted, including those for interrupts of the host.
 */
#ifdef __x86_64__
#define FAULT_STAT		"pf_taken"
/* The host can unmap some pages in order to move or merge them. */
#define MAX_KEPT_FAULTS		NR_CYCLES
#else
#define FAULT_STAT		"exits"
/* If one change in each cycle dropped all mappings, there would be twice as many. */
#define MAX_KEPT_FAULTS		(NR_CYCLES * NR_PAGES / 2)
#endif

/* Shared with the guest. */
static int first_page, nr_pages;
static uint64_t loops;
static bool stop;

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpu;
static pthread_t thread;
static uint64_t *host_loops;
static int *host_first_page;
static uint64_t nr_mmio_exits;
static void *data;

static void guest_code(void)
{
	uint64_t *counter, gva;
	int i;

	while (!READ_ONCE(stop)) {
		for (i = READ_ONCE(first_page); i < nr_pages; i++) {
			gva = DATA_GPA + i * GUEST_PAGE_SIZE;
			counter = (uint64_t *)gva;
			WRITE_ONCE(*counter, READ_ONCE(*counter) + 1);
		}
		WRITE_ONCE(loops, loops + 1);
#ifdef __x86_64__
		let_host_interrupt();
#endif
	}
	GUEST_DONE();
}

static void *vcpu_worker(void *unused)
{
	struct ucall uc;

	for (;;) {
		vcpu_run(vcpu);
		if (get_ucall(vcpu, &uc) == UCALL_DONE)
			return NULL;
		TEST_ASSERT(vcpu->run->exit_reason == KVM_EXIT_MMIO, "expected %s, got %s",
			    exit_reason_str(KVM_EXIT_MMIO),
			    exit_reason_str(vcpu->run->exit_reason));
		memset(vcpu->run->mmio.data, 0, sizeof(vcpu->run->mmio.data));
		WRITE_ONCE(nr_mmio_exits, nr_mmio_exits + 1);
	}
}

/*
 * Wait until the vCPU has accessed all pages at least once more.  It may be in the
 * middle of a loop now.
 */
static void wait_for_vcpu(void)
{
	uint64_t before = READ_ONCE(*host_loops);

	wait_for(READ_ONCE(*host_loops) >= before + 2);
}

static struct kvm_userspace_memory_region region(uint32_t slot, int first, int n, void *mem)
{
	return (struct kvm_userspace_memory_region) {
		.slot = slot,
		.guest_phys_addr = DATA_GPA + first * GUEST_PAGE_SIZE,
		.memory_size = n * GUEST_PAGE_SIZE,
		.userspace_addr = (uintptr_t)mem + first * GUEST_PAGE_SIZE,
	};
}

static struct kvm_userspace_memory_region no_region(uint32_t slot)
{
	return (struct kvm_userspace_memory_region) { .slot = slot };
}

#define set_regions(...)							\
do {										\
	struct kvm_userspace_memory_region e[] = { __VA_ARGS__ };		\
										\
	vm_set_user_memory_regions(vm, ARRAY_SIZE(e), e);			\
} while (0)

static void *map_memory(size_t size, int flags)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);

	TEST_ASSERT(mem != MAP_FAILED, "mmap(): errno %d", errno);
	/* Huge pages would be a matter of luck. */
	if (!(flags & MAP_HUGETLB))
		madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

static void start_vcpu(int n)
{
	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	ucall_init(vm, NULL);
	virt_map(vm, DATA_GPA, DATA_GPA, n * GUEST_PAGE_SIZE / vm->page_size);
	nr_pages = n;
	sync_global_to_guest(vm, nr_pages);
	host_loops = addr_gva2hva(vm, (vm_vaddr_t)&loops);
	host_first_page = addr_gva2hva(vm, (vm_vaddr_t)&first_page);
	/* The first read of a stat of a vCPU would wait for the end of KVM_RUN. */
	vcpu_get_stat(vcpu, FAULT_STAT);
}

static void run_vcpu(void)
{
	thread = start_thread(vcpu_worker, NULL);
	wait_for_vcpu();
}

static void stop_vcpu(void)
{
	WRITE_ONCE(*(bool *)addr_gva2hva(vm, (vm_vaddr_t)&stop), true);
	join_thread(thread, "vCPU");
	kvm_vm_free(vm);
}

static uint64_t counter(void *mem, int page)
{
	return READ_ONCE(*(uint64_t *)(mem + page * GUEST_PAGE_SIZE));
}

/* Check that the vCPU uses, or if !@used does not use, pages @first to @end - 1. */
static void check_use(const char *what, void *mem, int first, int end, bool used)
{
	uint64_t before[NR_CHANGED_PAGES];
	int i;

	for (i = first; i < end; i++)
		before[i] = counter(mem, i);
	wait_for_vcpu();
	for (i = first; i < end; i++)
		TEST_ASSERT((counter(mem, i) != before[i]) == used,
			    "%s, page %d: expected %s, got %s", what, i,
			    used ? "used" : "not used", used ? "not used" : "used");
}

/* Whether KVM uses shadow paging, for which it keeps no mappings */
static bool is_shadow_paging(void)
{
#ifdef __x86_64__
	return !(is_intel_cpu() ? get_kvm_intel_param_bool("ept") :
				  get_kvm_amd_param_bool("npt"));
#else
	return false;
#endif
}

static void check_faults(uint64_t before)
{
	uint64_t nr_faults = vcpu_get_stat(vcpu, FAULT_STAT) - before;

	TEST_ASSERT(nr_faults <= MAX_KEPT_FAULTS,
		    "%d cycles: expected " FAULT_STAT " to increase by at most %d, got %lu",
		    NR_CYCLES, MAX_KEPT_FAULTS, nr_faults);
	TEST_ASSERT(!nr_mmio_exits, "expected no MMIO exit, got %lu", nr_mmio_exits);
}

TEST(kept)
{
	uint64_t nr_faults;
	int i, at, upper;

	TEST_REQUIRE(!is_shadow_paging());

	start_vcpu(NR_PAGES);
	data = map_memory(NR_PAGES * GUEST_PAGE_SIZE, 0);
	set_regions(region(DATA_SLOT, 0, NR_PAGES, data));
	run_vcpu();

	nr_faults = vcpu_get_stat(vcpu, FAULT_STAT);
	for (i = 0; i < NR_CYCLES; i++) {
		at = 1 + random() % (NR_PAGES - 2);
		upper = at + 1 + random() % (NR_PAGES - at - 1);

		set_regions(region(DATA_SLOT, 0, at, data),
			    region(MIDDLE_SLOT, at, upper - at, data),
			    region(UPPER_SLOT, upper, NR_PAGES - upper, data));
		wait_for_vcpu();
		/* The slots swap their ids. */
		set_regions(region(UPPER_SLOT, 0, at, data),
			    region(DATA_SLOT, at, upper - at, data),
			    region(MIDDLE_SLOT, upper, NR_PAGES - upper, data));
		wait_for_vcpu();
		set_regions(region(DATA_SLOT, 0, NR_PAGES, data), no_region(MIDDLE_SLOT),
			    no_region(UPPER_SLOT));
		wait_for_vcpu();
	}
	check_faults(nr_faults);
	stop_vcpu();
}

/* The unused pages share page tables with the used ones. */
TEST(kept_beside)
{
	uint64_t nr_faults;
	void *other;
	int i;

	TEST_REQUIRE(!is_shadow_paging());

	start_vcpu(NR_PAGES);
	data = map_memory((NR_PAGES + NR_UNUSED_PAGES) * GUEST_PAGE_SIZE, 0);
	other = map_memory((NR_PAGES + NR_UNUSED_PAGES) * GUEST_PAGE_SIZE, 0);
	set_regions(region(DATA_SLOT, 0, NR_PAGES + NR_UNUSED_PAGES, data));
	run_vcpu();

	nr_faults = vcpu_get_stat(vcpu, FAULT_STAT);
	for (i = 0; i < NR_CYCLES; i++) {
		set_regions(region(DATA_SLOT, 0, NR_PAGES, data));
		wait_for_vcpu();
		set_regions(region(DATA_SLOT, 0, NR_PAGES, data),
			    region(UPPER_SLOT, NR_PAGES, NR_UNUSED_PAGES, other));
		wait_for_vcpu();
		set_regions(region(DATA_SLOT, 0, NR_PAGES + NR_UNUSED_PAGES, data),
			    no_region(UPPER_SLOT));
		wait_for_vcpu();
	}
	check_faults(nr_faults);
	stop_vcpu();
}

TEST(changed)
{
	void *other = map_memory(NR_CHANGED_PAGES * GUEST_PAGE_SIZE, 0);
	const int half = NR_CHANGED_PAGES / 2;

	start_vcpu(NR_CHANGED_PAGES);
	data = map_memory(NR_CHANGED_PAGES * GUEST_PAGE_SIZE, 0);
	set_regions(region(DATA_SLOT, 0, NR_CHANGED_PAGES, data));
	run_vcpu();

	set_regions(region(DATA_SLOT, 0, half, data),
		    region(UPPER_SLOT, half, NR_CHANGED_PAGES - half, other));
	check_use("other memory: old", data, half, NR_CHANGED_PAGES, false);
	check_use("other memory: new", other, half, NR_CHANGED_PAGES, true);
	check_use("other memory: lower half", data, 0, half, true);
	TEST_ASSERT(!nr_mmio_exits, "expected no MMIO exit, got %lu", nr_mmio_exits);

	/* Also remove one page of the lower half. */
	set_regions(region(DATA_SLOT, 0, half - 1, data), no_region(UPPER_SLOT));
	check_use("no memory", other, half, NR_CHANGED_PAGES, false);
	check_use("no memory", data, half - 1, NR_CHANGED_PAGES, false);
	check_use("no memory: lower half", data, 0, half - 1, true);
	TEST_ASSERT(READ_ONCE(nr_mmio_exits), "expected MMIO exits, got none");

	set_regions(region(DATA_SLOT, 0, NR_CHANGED_PAGES, data));
	check_use("first memory", data, 0, NR_CHANGED_PAGES, true);
	stop_vcpu();
}

#define EAGER_PAGE_SPLIT	"/sys/module/kvm/parameters/eager_page_split"

TEST(huge)
{
	struct kvm_userspace_memory_region lower;
	unsigned long *bitmap;
	size_t size;
	int at, i;

	add_huge_pages(1);
	size = get_def_hugetlb_pagesz();
	start_vcpu(size / GUEST_PAGE_SIZE);
	data = map_memory(size, MAP_HUGETLB);
	bitmap = calloc(1, size / GUEST_PAGE_SIZE / 8);
	TEST_ASSERT(bitmap, "calloc() failed");
	set_regions(region(DATA_SLOT, 0, nr_pages, data));
	run_vcpu();

	at = 1 + random() % (nr_pages - 1);
	lower = region(DATA_SLOT, 0, at, data);
	set_regions(lower, region(UPPER_SLOT, at, nr_pages - at, data));
	WRITE_ONCE(*host_first_page, at);
	wait_for_vcpu();

	/*
	 * x86 would split huge pages as soon as their slot logs dirty pages, also one that
	 * extends beyond the end of the slot, so that the test could not detect it.
	 */
	TEST_ASSERT(access(EAGER_PAGE_SPLIT, F_OK) || write_setting(EAGER_PAGE_SPLIT, "N"),
		    "eager_page_split cannot be written");
	lower.flags = KVM_MEM_LOG_DIRTY_PAGES;
	set_regions(lower);
	wait_for_vcpu();
	WRITE_ONCE(*host_first_page, 0);

	for (i = 0; i < 3; i++) {
		int page;

		wait_for_vcpu();
		kvm_vm_get_dirty_log(vm, DATA_SLOT, bitmap);
		for (page = 0; page < at; page++)
			TEST_ASSERT(test_bit(page, bitmap),
				    "split at %d, log %d: expected page %d dirty, got clean",
				    at, i, page);
	}

	stop_vcpu();
	free(bitmap);
	munmap(data, size);
	add_huge_pages(-1);
}

TEST(invalid)
{
	struct kvm_userspace_memory_region r[2];
	uint64_t nr_faults;
	int i;

	start_vcpu(1);
	for (i = 0; i < 2; i++) {
		r[i] = region(DATA_SLOT, 0, 1, map_memory(LARGE_SIZE, 0));
		r[i].memory_size = LARGE_SIZE;
		r[i].flags = KVM_MEM_LOG_DIRTY_PAGES;
	}
	set_regions(r[0]);
	run_vcpu();

	nr_faults = vcpu_get_stat(vcpu, FAULT_STAT);
	for (i = 0; i < NR_CHANGES; i++) {
		set_regions(r[!(i % 2)]);
		wait_for_vcpu();
	}
	nr_faults = vcpu_get_stat(vcpu, FAULT_STAT) - nr_faults;
	pr_info("%lu faults\n", nr_faults);
	TEST_ASSERT(nr_faults <= NR_CHANGES * MAX_FAULTS,
		    "%d changes: expected " FAULT_STAT " to increase by at most %d, got %lu",
		    NR_CHANGES, NR_CHANGES * MAX_FAULTS, nr_faults);
	stop_vcpu();
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));
	TEST_REQUIRE(getpagesize() == GUEST_PAGE_SIZE);

	return run_cases(argv + 1);
}
