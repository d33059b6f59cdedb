// SPDX-License-Identifier: GPL-2.0-only
/*
 * Run vCPUs in memslots that are split and merged continuously.
 *
 * KVM_SET_USER_MEMORY_REGIONS splits two memslots at random pages and merges them
 * again: one with the guest's code, stacks and page tables, and one with data and
 * more code.  vCPUs increment a counter in each page of the latter, and call a
 * function in each page.  On x86, if KVM is configured to emulate instructions that
 * have its prefix, the test also runs with counters that are incremented by emulated
 * instructions.  The memory is never absent, therefore:
 *
 *  - no vCPU exits to userspace or gets an exception,
 *  - each counter has the value that the guest reports.
 *
 * Meanwhile, a thread drops the mappings of the pages, which keep their contents, so
 * that KVM's MMU notifiers run concurrently with the changes.
 *
 * With -o, KVM_SET_USER_MEMORY_REGION splits and merges the data slot step by step,
 * for comparison.  vCPUs then do exit, and the test prints the number of exits.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include <linux/sizes.h>

#include <test_util.h>
#include <kvm_util.h>
#include <processor.h>

/* Arbitrarily chosen, above the addresses that the library uses. */
#define DATA_GPA		SZ_1G
#define DATA_SLOT		100
/* Slots for the upper parts after a split. */
#define UPPER_CODE_SLOT		101
#define UPPER_DATA_SLOT		102

#define NR_DATA_PAGES		16
#define GUEST_PAGE_SIZE		4096
#define MAX_VCPUS		8

/* Each data page contains a counter for each vCPU, and code. */
#define CODE_OFFSET		1024
#define EMULATED_CODE_OFFSET	2048

/* Shared with the guest. */
static bool emulate;
static bool execute;
static bool stop;
static uint64_t loops[MAX_VCPUS];

struct worker {
	pthread_t thread;
	struct kvm_vcpu *vcpu;
	uint64_t exits;
};

static struct kvm_vm *vm;
static struct worker workers[MAX_VCPUS];
static int nr_vcpus = 2;
static void *data;
static bool old_ioctl;
static bool stop_storm;

static void guest_code(int id)
{
	uint64_t gva, *counter;
	int i;

	while (!READ_ONCE(stop)) {
		for (i = 0; i < NR_DATA_PAGES; i++) {
			gva = DATA_GPA + i * GUEST_PAGE_SIZE;
			counter = (uint64_t *)gva + id;

			if (execute) {
				int (*page_number)(void) = (void *)gva + CODE_OFFSET;

				GUEST_ASSERT_2(page_number() == i, id, i);
			}
			if (emulate) {
				void (*increment)(uint64_t *) = (void *)gva + EMULATED_CODE_OFFSET;

				increment(counter);
			} else {
				WRITE_ONCE(*counter, READ_ONCE(*counter) + 1);
			}
		}
		WRITE_ONCE(loops[id], loops[id] + 1);
#ifdef __x86_64__
		let_host_interrupt();
#endif
	}
	GUEST_DONE();
}

/*
 * Write the code of two functions: int page_number(void), and on x86
 * void increment(uint64_t *), which increments with an emulated instruction.
 */
static void write_code(void *page, int number)
{
#ifdef __x86_64__
	/* Use a lock prefix in odd pages, and a prefix without effect in even pages. */
	const uint8_t increment[] = {
		0x0f, 0x0b, 'k', 'v', 'm',	/* emulate the next instruction */
		number & 1 ? 0xf0 : 0x3e,	/* lock or ds */
		0x48, 0xff, 0x07,		/* incq (%rdi) */
		0xc3,				/* ret */
	};
	uint8_t page_number[] = {
		0xb8, number, 0, 0, 0,		/* mov $number, %eax */
		0xc3,				/* ret */
	};

	memcpy(page + EMULATED_CODE_OFFSET, increment, sizeof(increment));
#else
	uint32_t page_number[] = {
		0x52800000 | number << 5,	/* mov w0, #number */
		0xd65f03c0,			/* ret */
	};
#endif
	memcpy(page + CODE_OFFSET, page_number, sizeof(page_number));
}

static void *vcpu_worker(void *arg)
{
	struct worker *w = arg;
	struct kvm_run *run = w->vcpu->run;
	struct ucall uc;

	for (;;) {
		vcpu_run(w->vcpu);
		switch (get_ucall(w->vcpu, &uc)) {
		case UCALL_DONE:
			return NULL;
		case UCALL_ABORT:
			REPORT_GUEST_ASSERT_2(uc, "vCPU %lu, page %lu");
			break;
		default:
			break;
		}

		w->exits++;
		TEST_ASSERT(old_ioctl, "vCPU %u: expected no exit, got %s (%s %#llx)",
			    w->vcpu->id, exit_reason_str(run->exit_reason),
			    run->exit_reason == KVM_EXIT_MMIO ? "MMIO at" : "reason code",
			    run->exit_reason == KVM_EXIT_MMIO ? run->mmio.phys_addr :
								run->exit_reason);
		TEST_ASSERT(run->exit_reason == KVM_EXIT_MMIO, "expected %s, got %s",
			    exit_reason_str(KVM_EXIT_MMIO), exit_reason_str(run->exit_reason));
		memset(run->mmio.data, 0, sizeof(run->mmio.data));
	}
}

static void *storm_worker(void *arg)
{
	uint64_t *nr_rounds = arg;

	while (!READ_ONCE(stop_storm)) {
		TEST_ASSERT(!madvise(data, NR_DATA_PAGES * GUEST_PAGE_SIZE, MADV_DONTNEED),
			    "madvise() failed: %d", errno);
		++*nr_rounds;
		sched_yield();
	}
	return NULL;
}

static void set_region(uint32_t slot, uint64_t gpa, uint64_t npages, void *hva)
{
	struct kvm_userspace_memory_region r = {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = npages * GUEST_PAGE_SIZE,
		.userspace_addr = (uintptr_t)hva,
	};

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

/* Split and merge slot by slot: the gfns have no memory in between. */
static void split_and_merge_old(int at)
{
	void *upper = data + at * GUEST_PAGE_SIZE;
	uint64_t gpa = DATA_GPA + at * GUEST_PAGE_SIZE;

	set_region(DATA_SLOT, 0, 0, NULL);
	set_region(DATA_SLOT, DATA_GPA, at, data);
	set_region(UPPER_DATA_SLOT, gpa, NR_DATA_PAGES - at, upper);

	set_region(UPPER_DATA_SLOT, 0, 0, NULL);
	set_region(DATA_SLOT, 0, 0, NULL);
	set_region(DATA_SLOT, DATA_GPA, NR_DATA_PAGES, data);
}

static void split(struct kvm_userspace_memory_region *lower,
		  struct kvm_userspace_memory_region *upper, int at, uint32_t slot)
{
	uint64_t size = at * GUEST_PAGE_SIZE;

	*upper = *lower;
	upper->slot = slot;
	upper->guest_phys_addr += size;
	upper->userspace_addr += size;
	upper->memory_size -= size;
	lower->memory_size = size;
}

static void split_and_merge(struct kvm_userspace_memory_region *code,
			    struct kvm_userspace_memory_region *data)
{
	struct kvm_userspace_memory_region e[4];

	e[0] = *code;
	e[2] = *data;
	split(&e[0], &e[1], 1 + random() % (code->memory_size / GUEST_PAGE_SIZE - 1),
	      UPPER_CODE_SLOT);
	split(&e[2], &e[3], 1 + random() % (NR_DATA_PAGES - 1), UPPER_DATA_SLOT);
	vm_set_user_memory_regions(vm, 4, e);

	e[0] = *code;
	e[1].memory_size = 0;
	e[2] = *data;
	e[3].memory_size = 0;
	vm_set_user_memory_regions(vm, 4, e);
}

/*
 * Wait until each vCPU has accessed all pages at least once more.  A vCPU counts a
 * loop at its end, so the first increment may belong to a loop that has started
 * before this call.
 */
static void wait_for_vcpus(void)
{
	uint64_t *guest_loops = addr_gva2hva(vm, (vm_vaddr_t)loops);
	uint64_t before[MAX_VCPUS];
	int i;

	for (i = 0; i < nr_vcpus; i++)
		before[i] = READ_ONCE(guest_loops[i]);
	for (i = 0; i < nr_vcpus; i++)
		wait_for(READ_ONCE(guest_loops[i]) >= before[i] + 2);
}

static uint64_t run(int nr_cycles, bool storm)
{
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	struct userspace_mem_region *code_region;
	struct kvm_userspace_memory_region code, data_region;
	uint64_t nr_exits = 0, nr_rounds = 0, nr_loops = 0, count;
	pthread_t storm_thread;
	int i, j, fd;

	vm = vm_create_with_vcpus(nr_vcpus, guest_code, vcpus);
	ucall_init(vm, NULL);
	code_region = memslot2region(vm, 0);
	code = code_region->region;

	/* Shared memory keeps its contents when its mappings are dropped. */
	fd = kvm_memfd_alloc(NR_DATA_PAGES * GUEST_PAGE_SIZE, false);
	data = mmap(NULL, NR_DATA_PAGES * GUEST_PAGE_SIZE, PROT_READ | PROT_WRITE,
		    MAP_SHARED, fd, 0);
	TEST_ASSERT(data != MAP_FAILED, "mmap() failed: %d", errno);
	for (i = 0; i < NR_DATA_PAGES; i++)
		write_code(data + i * GUEST_PAGE_SIZE, i);
	set_region(DATA_SLOT, DATA_GPA, NR_DATA_PAGES, data);
	virt_map(vm, DATA_GPA, DATA_GPA, NR_DATA_PAGES * GUEST_PAGE_SIZE / vm->page_size);
	data_region = (struct kvm_userspace_memory_region) {
		.slot = DATA_SLOT,
		.guest_phys_addr = DATA_GPA,
		.memory_size = NR_DATA_PAGES * GUEST_PAGE_SIZE,
		.userspace_addr = (uintptr_t)data,
	};

	sync_global_to_guest(vm, emulate);
	execute = !old_ioctl;
	sync_global_to_guest(vm, execute);

	for (i = 0; i < nr_vcpus; i++) {
		workers[i].vcpu = vcpus[i];
		workers[i].exits = 0;
		vcpu_args_set(vcpus[i], 1, i);
		workers[i].thread = start_thread(vcpu_worker, &workers[i]);
	}
	stop_storm = false;
	if (storm)
		storm_thread = start_thread(storm_worker, &nr_rounds);

	for (i = 0; i < nr_cycles; i++) {
		wait_for_vcpus();
		if (old_ioctl)
			split_and_merge_old(1 + random() % (NR_DATA_PAGES - 1));
		else
			split_and_merge(&code, &data_region);
	}

	WRITE_ONCE(stop_storm, true);
	if (storm)
		join_thread(storm_thread, "storm");
	WRITE_ONCE(*(bool *)addr_gva2hva(vm, (vm_vaddr_t)&stop), true);
	for (i = 0; i < nr_vcpus; i++) {
		join_thread(workers[i].thread, "vCPU");
		nr_exits += workers[i].exits;
	}

	sync_global_from_guest(vm, loops);
	for (i = 0; i < nr_vcpus; i++) {
		nr_loops += loops[i];
		for (j = 0; j < NR_DATA_PAGES && !old_ioctl; j++) {
			count = ((uint64_t *)(data + j * GUEST_PAGE_SIZE))[i];
			TEST_ASSERT(count == loops[i],
				    "vCPU %d, page %d: expected count %lu, got %lu",
				    i, j, loops[i], count);
		}
	}

	pr_info("%d cycles%s%s%s: %lu guest loops, mappings dropped %lu times, %lu exits\n",
		nr_cycles, old_ioctl ? ", slot by slot" : "",
		emulate ? ", emulated" : "", storm ? ", storm" : "",
		nr_loops, nr_rounds, nr_exits);

	kvm_vm_free(vm);
	munmap(data, NR_DATA_PAGES * GUEST_PAGE_SIZE);
	close(fd);
	return nr_exits;
}

/* Whether the guest can force the emulation of instructions. */
static bool can_force_emulation(void)
{
	int fd = open("/sys/module/kvm/parameters/force_emulation_prefix", O_RDONLY);
	char c = '0';

	if (fd < 0)
		return false;
	if (read(fd, &c, 1) != 1)
		c = '0';
	close(fd);
	return c == 'Y' || (c >= '1' && c <= '9');
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-i cycles] [-v vcpus] [-s seed] [-o]\n", name);
	printf(" -i: number of splits and merges, default 100\n");
	printf(" -v: number of vCPUs, default 2, at most %d\n", MAX_VCPUS);
	printf(" -s: seed for the pages to split at, default: the current time\n");
	printf(" -o: use KVM_SET_USER_MEMORY_REGION and count exits\n");
	exit(0);
}

int main(int argc, char *argv[])
{
	unsigned int seed = time(NULL);
	int nr_cycles = 100, opt;
	uint64_t nr_exits;

	setbuf(stdout, NULL);
	while ((opt = getopt(argc, argv, "hi:v:s:o")) != -1) {
		switch (opt) {
		case 'i':
			nr_cycles = atoi(optarg);
			break;
		case 'v':
			nr_vcpus = atoi(optarg);
			TEST_ASSERT(nr_vcpus >= 1 && nr_vcpus <= MAX_VCPUS,
				    "expected 1 to %d vCPUs, got %d", MAX_VCPUS, nr_vcpus);
			break;
		case 's':
			seed = strtoul(optarg, NULL, 0);
			break;
		case 'o':
			old_ioctl = true;
			break;
		default:
			help(argv[0]);
		}
	}

	TEST_REQUIRE(getpagesize() == GUEST_PAGE_SIZE);
	pr_info("seed %u\n", seed);
	srandom(seed);

	if (old_ioctl) {
		printf("perf: exits_slot_by_slot exits %lu\n", run(nr_cycles, false));
		return 0;
	}

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));
	nr_exits = run(nr_cycles, false);
	nr_exits += run(nr_cycles, true);
	emulate = can_force_emulation();
	if (emulate) {
		nr_exits += run(nr_cycles, false);
		nr_exits += run(nr_cycles, true);
	} else {
		pr_info("forced emulation is disabled, the emulator is not tested\n");
	}
	printf("perf: exits_transaction exits %lu\n", nr_exits);
	return 0;
}
