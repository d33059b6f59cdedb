// SPDX-License-Identifier: GPL-2.0-only
/*
 * Change memslots with KVM_SET_USER_MEMORY_REGIONS while vCPUs run in them.
 *
 * Each vCPU increments a counter of its own in each page of a range all the time.
 * The host divides the range into slots at random pages and with changing ids.
 *
 *  - dirty_log*: a copy of the pages reported dirty equals the memory.
 *  - removed_range: the range becomes a read-only slot, its dirty log is read, and the
 *    slot is deleted.  No write is lost.
 *  - hva: once the range has other memory, no vCPU reads or writes the old memory.
 *  - readonly: only writes to read-only memory exit, and they do not change it.
 *  - discard*: no page is allocated after a slot was deleted and its memory discarded.
 *  - all_slots, backing*: the maximum number of slots; memory of different types.
 *  - rollback: a transaction without enough memory changes nothing.
 *  - smm, nested, steal_time, xen: with a vCPU in SMM, a nested guest, memory to which
 *    KVM writes the steal time, events in shared_info and vcpu_info (x86).
 *  - its_tables: the ITS's tables are in slots that change (arm64).
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <sys/stat.h>
#include <time.h>

#include <linux/sizes.h>

#include <test_util.h>
#include <kvm_test_harness.h>
#include <kvm_util.h>
#include <processor.h>

#ifdef __x86_64__
#include <asm/kvm_para.h>

#include <apic.h>
#include <svm_util.h>
#include <xen.h>
#else
#include <gic.h>
#include <gic_v3_its.h>
#include <vgic.h>
#endif

/* Arbitrarily chosen, above the addresses that the library uses. */
#define DATA_GPA		SZ_1G
#define DATA_SLOT		100
#define NR_IDS			8
#define GUEST_PAGE_SIZE		4096ull
#define NR_PAGES		128
#define MAX_PAGES		4096
#define MAX_SLOTS		128
#define MAX_VCPUS		2

/* Words of a data page: a tag, and a counter for each vCPU. */
#define TAG			0
#define COUNTER(id)		(1 + (id))
/* A counter starts with a value that tells its page and tag. */
#define FIRST_COUNT(page, tag)	(((page) + 1) << 48 | (tag) << 32)

/* Shared with the guest, which accesses each page whose number is a multiple of stride. */
static struct shared {
	uint64_t nr_pages;
	uint64_t stride;
	uint64_t min_tag;
	bool pause;
	bool stop;
	uint64_t accesses[MAX_VCPUS];
	uint64_t paused[MAX_VCPUS];
	uint64_t events[2];
	void (*after_loop)(void);
} shared = { .nr_pages = NR_PAGES, .stride = 1 };

/* A range of guest memory and its slots, some of which may be absent */
struct range {
	uint32_t first_id;
	uint32_t nr_ids;	/* a multiple of 8 */
	uint32_t rotation;	/* of the ids */
	uint32_t flags;
	uint64_t gpa;
	uint64_t nr_pages;
	void *mem;
	struct kvm_userspace_memory_regions header;
	struct kvm_userspace_memory_region slots[MAX_SLOTS];
};

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[MAX_VCPUS];
static pthread_t threads[MAX_VCPUS];
static int nr_vcpus, nr_rounds = 10;
static struct shared *host_shared;
static struct range data;
static enum { NO_MMIO, MMIO_WRITES, ALL_MMIO } allowed_mmio;
static uint64_t nr_reads, nr_writes;	/* that exited for MMIO */
static uint64_t nr_concurrent;		/* changes during which a vCPU accessed pages */

/* Go on until a slot was changed while a vCPU accessed pages. */
static bool is_round(int i, int nr)
{
	return i < nr || !nr_concurrent;
}

static void guest_add(uint64_t *count)
{
	__atomic_store_n(count, *count + 1, __ATOMIC_RELEASE);
}

static void guest_access(int id, uint64_t page)
{
	uint64_t *p = (uint64_t *)(DATA_GPA + page * GUEST_PAGE_SIZE), min_tag, tag;

	/* The host changes min_tag after the slots. */
	min_tag = __atomic_load_n(&shared.min_tag, __ATOMIC_ACQUIRE);
	tag = READ_ONCE(p[TAG]);
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	GUEST_ASSERT_3(tag >= min_tag && tag <= READ_ONCE(shared.min_tag) + 1, page, min_tag, tag);

	WRITE_ONCE(p[COUNTER(id)], READ_ONCE(p[COUNTER(id)]) + 1);
	guest_add(&shared.accesses[id]);
}

static void guest_loop(int id)
{
	uint64_t page;

	for (page = 0; page < shared.nr_pages; page += shared.stride)
		guest_access(id, page);
	do {
		__atomic_store_n(&shared.paused[id], READ_ONCE(shared.pause), __ATOMIC_RELEASE);
#ifdef __x86_64__
		let_host_interrupt();
#endif
		cpu_relax();
	} while (shared.paused[id]);
}

static void guest_code(int id)
{
	while (!READ_ONCE(shared.stop)) {
		guest_loop(id);
		if (shared.after_loop)
			shared.after_loop();
	}
	GUEST_DONE();
}

static uint64_t guest_value(uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static uint64_t *word(void *mem, uint64_t page, int nr)
{
	return (uint64_t *)(mem + page * GUEST_PAGE_SIZE) + nr;
}

static void init_pages(void *mem, uint64_t tag)
{
	uint64_t page;
	int i;

	for (page = 0; page < shared.nr_pages; page += shared.stride) {
		*word(mem, page, TAG) = tag;
		for (i = 0; i < MAX_VCPUS; i++)
			*word(mem, page, COUNTER(i)) = FIRST_COUNT(page, tag);
	}
}

static void *map_memory(uint64_t nr_pages, int flags, int fd)
{
	void *mem = mmap(NULL, nr_pages * GUEST_PAGE_SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);

	TEST_ASSERT(mem != MAP_FAILED, "mmap() of %lu pages: errno %d", nr_pages, errno);
	return mem;
}

static void *new_memory(void)
{
	void *mem = map_memory(shared.nr_pages, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	/* Huge pages would be a matter of luck. */
	madvise(mem, shared.nr_pages * GUEST_PAGE_SIZE, MADV_NOHUGEPAGE);
	init_pages(mem, 0);
	return mem;
}

static void *copy_of(void *mem)
{
	void *copy = malloc(shared.nr_pages * GUEST_PAGE_SIZE);

	TEST_ASSERT(copy, "malloc() failed");
	return memcpy(copy, mem, shared.nr_pages * GUEST_PAGE_SIZE);
}

/*
 * Compare the pages @first to @end - 1 of @mem with @other.  They must be the same, or
 * with !@same, the counters of all vCPUs must differ.
 */
static void check_pages(const char *what, void *mem, void *other, uint64_t first, uint64_t end,
			bool same)
{
	int i, end_word = same ? GUEST_PAGE_SIZE / sizeof(uint64_t) : COUNTER(nr_vcpus);
	uint64_t page, *p, *q;

	for (page = first; page < end; page++) {
		p = word(mem, page, 0);
		q = word(other, page, 0);
		for (i = COUNTER(0) * !same; i < end_word; i++)
			TEST_ASSERT((p[i] == q[i]) == same,
				    "%s: page %lu, word %d: expected %s%#lx, got %#lx", what,
				    page, i, same ? "" : "anything but ", q[i], p[i]);
	}
}

/* Check that counter @id has been incremented @n times in each page from @first on. */
static void check_counters(const char *what, void *mem, int id, uint64_t first, uint64_t n)
{
	uint64_t page;

	for (page = first; page < shared.nr_pages; page += shared.stride)
		TEST_ASSERT(*word(mem, page, COUNTER(id)) == FIRST_COUNT(page, 0ull) + n,
			    "%s: vCPU %d, page %lu: expected count %#llx, got %#lx", what, id, page,
			    FIRST_COUNT(page, 0ull) + n, *word(mem, page, COUNTER(id)));
}

static void remove_slots(struct range *r)
{
	int i;

	memset(r->slots, 0, sizeof(r->slots));
	for (i = 0; i < r->nr_ids; i++)
		r->slots[i].slot = r->first_id + i;
	r->header.nent = r->nr_ids;
	r->header.entry_size = sizeof(r->slots[0]);
}

static void place_slot(struct range *r, int nr, uint64_t start, uint64_t end)
{
	r->slots[nr].flags = r->flags;
	r->slots[nr].guest_phys_addr = r->gpa + start * GUEST_PAGE_SIZE;
	r->slots[nr].memory_size = (end - start) * GUEST_PAGE_SIZE;
	r->slots[nr].userspace_addr = (uintptr_t)word(r->mem, start, 0);
}

/* Divide the range at random pages into @n slots.  Rotate the ids, so that all slots change. */
static void divide(struct range *r, int n)
{
	bool begins[MAX_PAGES + 1] = { true };
	uint64_t page, start = 0;
	int i;

	TEST_ASSERT(r->nr_pages <= MAX_PAGES, "expected fewer pages, got %lu", r->nr_pages);
	for (i = 1; i < n; begins[page] = true) {
		page = random() % r->nr_pages;
		i += !begins[page];
	}
	begins[r->nr_pages] = true;

	remove_slots(r);
	i = r->rotation += r->nr_ids * 3 / 8 + random() % (r->nr_ids / 4 + 1);
	for (page = 1; page <= r->nr_pages; page++) {
		if (begins[page]) {
			place_slot(r, i++ % r->nr_ids, start, page);
			start = page;
		}
	}
}

static int __set_slots(struct range *r)
{
	uint64_t before = guest_value(&host_shared->accesses[0]);
	int error = __vm_ioctl(vm, KVM_SET_USER_MEMORY_REGIONS, &r->header) ? errno : 0;

	nr_concurrent += guest_value(&host_shared->accesses[0]) != before;
	return error;
}

static void set_slots(struct range *r)
{
	int error = __set_slots(r);

	TEST_ASSERT(!error, "%u entries: expected success, got errno %d, fail_index %u",
		    r->header.nent, error, r->header.fail_index);
}

static void set_random_slots(struct range *r)
{
	divide(r, 1 + random() % r->nr_ids);
	set_slots(r);
}

/*
 * Let the range and *@spare swap their memory, which gets the next tag.  With @nth, let
 * allocation number *@nth fail, and set *@nth to 0 if there is one.  Returns an errno.
 */
static int change_memory(void **spare, int *nth)
{
	int fd = nth ? open("/proc/thread-self/fail-nth", O_RDWR) : -1;
	struct range before = data;
	char left[16] = {};
	int error;

	init_pages(*spare, host_shared->min_tag + 1);
	data.mem = *spare;
	divide(&data, 1 + random() % data.nr_ids);
	if (nth)
		dprintf(fd, "%d", *nth);
	error = __set_slots(&data);
	if (nth) {
		TEST_ASSERT(pread(fd, left, sizeof(left) - 1, 0) > 0, "fail-nth: errno %d", errno);
		*nth = atoi(left);
		dprintf(fd, "0");
		close(fd);
	}
	if (error) {
		data = before;
		return error;
	}
	__atomic_store_n(&host_shared->min_tag, host_shared->min_tag + 1, __ATOMIC_RELEASE);
	*spare = before.mem;
	return 0;
}

/* Copy the pages that are reported dirty, and mark them clean.  Returns their number. */
static int copy_dirty_pages(void *copy, bool clear)
{
	struct kvm_userspace_memory_region *slot;
	unsigned long bitmap[MAX_PAGES / 64];
	uint64_t first, page, n;
	int i, nr_dirty = 0;

	for (i = 0; i < data.nr_ids; i++) {
		slot = &data.slots[i];
		n = slot->memory_size / GUEST_PAGE_SIZE;
		if (!n)
			continue;

		kvm_vm_get_dirty_log(vm, slot->slot, bitmap);
		if (clear)
			kvm_vm_clear_dirty_log(vm, slot->slot, bitmap, 0, n);
		first = (slot->guest_phys_addr - data.gpa) / GUEST_PAGE_SIZE;
		for (page = 0; page < n; page++) {
			if (!test_bit(page, bitmap))
				continue;
			memcpy(word(copy, first + page, 0), word(data.mem, first + page, 0),
			       GUEST_PAGE_SIZE);
			nr_dirty++;
		}
	}
	return nr_dirty;
}

static void handle_mmio(int id)
{
	struct kvm_run *run = vcpus[id]->run;
	uint64_t offset = run->mmio.phys_addr - DATA_GPA, value = 0;
	bool write = run->mmio.is_write;

	TEST_ASSERT(run->exit_reason == KVM_EXIT_MMIO &&
		    READ_ONCE(allowed_mmio) >= (write ? MMIO_WRITES : ALL_MMIO) &&
		    offset < shared.nr_pages * GUEST_PAGE_SIZE && run->mmio.len == sizeof(value),
		    "vCPU %d: expected no such exit, got %s, MMIO %s, %#llx, %u bytes", id,
		    exit_reason_str(run->exit_reason), write ? "write" : "read",
		    run->mmio.phys_addr, run->mmio.len);

	/* The slot of the memory is absent or read-only. */
	if (data.mem)
		value = READ_ONCE(*(uint64_t *)(data.mem + offset));
	if (!write)
		memcpy(run->mmio.data, &value, sizeof(value));
	else if (data.mem)
		TEST_ASSERT(offset % GUEST_PAGE_SIZE == COUNTER(id) * sizeof(value) &&
			    *(uint64_t *)run->mmio.data == value + 1,
			    "vCPU %d: expected a write of %#lx to counter %d, got %#lx at %#llx",
			    id, value + 1, id, *(uint64_t *)run->mmio.data, run->mmio.phys_addr);
	__atomic_add_fetch(write ? &nr_writes : &nr_reads, 1, __ATOMIC_RELAXED);
}

static void *vcpu_worker(void *arg)
{
	int id = (uintptr_t)arg;
	struct ucall uc;

	do {
		vcpu_run(vcpus[id]);
		get_ucall(vcpus[id], &uc);
		if (uc.cmd == UCALL_ABORT)
			REPORT_GUEST_ASSERT_3(uc, "page %lu: expected at least %lu, got %lu");
		if (uc.cmd == UCALL_NONE)
			handle_mmio(id);
	} while (uc.cmd != UCALL_DONE);
	return NULL;
}

/* @mem: the memory of the range, or NULL if no slot is to be created */
static void create_vm(void *guest_code, int n, void *mem)
{
	uint64_t page;
	int i;

	vm = vm_create_with_vcpus(n, guest_code, vcpus);
	ucall_init(vm, NULL);
	sync_global_to_guest(vm, shared);
	host_shared = addr_gva2hva(vm, (vm_vaddr_t)&shared);
	nr_vcpus = n;
	for (i = 0; i < n; i++)
		vcpu_args_set(vcpus[i], 1, i);
	for (page = 0; page < shared.nr_pages; page += shared.stride)
		virt_map(vm, DATA_GPA + page * GUEST_PAGE_SIZE,
			 DATA_GPA + page * GUEST_PAGE_SIZE, 1);
	data = (struct range) {
		.first_id = DATA_SLOT, .nr_ids = NR_IDS,
		.gpa = DATA_GPA, .nr_pages = shared.nr_pages, .mem = mem,
	};
	nr_concurrent = 0;
}

/* Wait until each vCPU has completed @n more accesses. */
static void wait_for_accesses(uint64_t n)
{
	uint64_t before[MAX_VCPUS];
	int i;

	for (i = 0; i < nr_vcpus; i++)
		before[i] = guest_value(&host_shared->accesses[i]);
	for (i = 0; i < nr_vcpus; i++)
		wait_for(guest_value(&host_shared->accesses[i]) >= before[i] + n);
}

static void wait_for_some_accesses(void)
{
	wait_for_accesses(1 + random() % (shared.nr_pages / shared.stride));
}

/* Wait until each vCPU has accessed all pages.  It may be in the middle of an access now. */
static void wait_for_loop(void)
{
	wait_for_accesses(shared.nr_pages / shared.stride + 1);
}

static void set_pause(bool pause)
{
	int i;

	WRITE_ONCE(host_shared->pause, pause);
	for (i = 0; i < nr_vcpus; i++)
		wait_for(guest_value(&host_shared->paused[i]) == pause);
}

static void start_vcpus(void)
{
	int i;

	if (data.mem)
		set_random_slots(&data);
	for (i = 0; i < nr_vcpus; i++)
		threads[i] = start_thread(vcpu_worker, (void *)(uintptr_t)i);
	wait_for_loop();
}

/* @mem: memory in which the vCPUs have made all their accesses, or NULL */
static void stop_vcpus(const char *what, void *mem)
{
	int i;

	WRITE_ONCE(host_shared->stop, true);
	for (i = 0; i < nr_vcpus; i++) {
		join_thread(threads[i], "vCPU");
		if (mem)
			check_counters(what, mem, i, 0, host_shared->accesses[i] * shared.stride /
							shared.nr_pages);
	}
	pr_info("%s: %lu changes while a vCPU accessed pages\n", what, nr_concurrent);
	TEST_ASSERT(nr_concurrent, "%s: expected accesses during changes, got none", what);
}

static void test_dirty_log(const char *what, uint64_t protect)
{
	int i, j, nr_dirty;
	void *copy;

	create_vm(guest_code, 2, new_memory());
	if (protect)
		vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, protect);
	data.flags = KVM_MEM_LOG_DIRTY_PAGES;
	copy = copy_of(data.mem);
	start_vcpus();

	for (i = 0; is_round(i, nr_rounds); i++) {
		for (j = 0; j < 3; j++) {
			set_random_slots(&data);
			wait_for_some_accesses();
			if (random() % 2)
				copy_dirty_pages(copy, protect);
		}
		/* Change the slots while the vCPUs write to each page for the last time. */
		WRITE_ONCE(host_shared->pause, true);
		set_random_slots(&data);
		set_pause(true);
		set_random_slots(&data);
		copy_dirty_pages(copy, protect);
		check_pages(what, copy, data.mem, 0, NR_PAGES, true);

		set_random_slots(&data);
		nr_dirty = copy_dirty_pages(copy, protect);
		TEST_ASSERT(!nr_dirty, "%s: expected 0 dirty pages, got %d", what, nr_dirty);
		set_pause(false);
	}
	stop_vcpus(what, data.mem);
	kvm_vm_free(vm);
}

TEST(dirty_log)
{
	test_dirty_log("log", 0);
}

TEST(dirty_log_protect)
{
	test_dirty_log("protect", KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	test_dirty_log("initially set", KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
					KVM_DIRTY_LOG_INITIALLY_SET);
}

/* Check that the vCPUs access all pages, and exit for at least @n accesses to each. */
static void check_exits(const char *what, uint64_t *exits, uint64_t n)
{
	uint64_t before = READ_ONCE(*exits), expected = n * nr_vcpus, nr;

	wait_for_loop();
	nr = READ_ONCE(*exits) - before;
	TEST_ASSERT(nr >= expected, "%s: expected %lu exits or more, got %lu", what, expected, nr);
}

TEST(removed_range)
{
	uint64_t start, end;
	void *copy;
	int i;

	create_vm(guest_code, 2, new_memory());
	data.flags = KVM_MEM_LOG_DIRTY_PAGES;
	copy = copy_of(data.mem);
	start_vcpus();
	allowed_mmio = ALL_MMIO;

	for (i = 0; is_round(i, nr_rounds); i++) {
		start = 1 + random() % (NR_PAGES - 2);
		end = start + 1 + random() % (NR_PAGES - start - 1);

		/* Make the range read-only, which keeps the dirty state of its pages. */
		remove_slots(&data);
		place_slot(&data, 0, 0, start);
		place_slot(&data, 1, start, end);
		place_slot(&data, 2, end, NR_PAGES);
		data.slots[1].flags |= KVM_MEM_READONLY;
		set_slots(&data);

		/* From now on, its log is complete. */
		copy_dirty_pages(copy, false);
		check_pages("read-only range", copy, data.mem, start, end, true);
		check_exits("writes to the read-only range", &nr_writes, end - start);
		check_pages("read-only range", data.mem, copy, start, end, true);

		data.slots[1].memory_size = 0;
		set_slots(&data);
		check_exits("reads of the removed range", &nr_reads, 2 * (end - start));
		check_pages("removed range", data.mem, copy, start, end, true);

		set_random_slots(&data);
		wait_for_some_accesses();
	}
	stop_vcpus("removed ranges", NULL);
}

/* Check that each vCPU writes to all pages.  @copy: their previous content */
static void check_writes(const char *what, void *copy)
{
	wait_for_loop();
	check_pages(what, data.mem, copy, 0, NR_PAGES, false);
}

static void change_memory_and_check(void **spare)
{
	int error = change_memory(spare, NULL);
	void *old_copy = copy_of(*spare), *new_copy = copy_of(data.mem);

	TEST_ASSERT(!error, "other memory: expected success, got errno %d", error);
	check_writes("new memory", new_copy);
	check_pages("old memory", *spare, old_copy, 0, NR_PAGES, true);
	free(old_copy);
	free(new_copy);
}

TEST(hva)
{
	void *spare = new_memory();
	int i;

	create_vm(guest_code, 2, new_memory());
	start_vcpus();
	for (i = 0; is_round(i, nr_rounds); i++)
		change_memory_and_check(&spare);
	stop_vcpus("other memory", NULL);
}

TEST(readonly)
{
	void *copy;
	int i;

	create_vm(guest_code, 2, new_memory());
	start_vcpus();
	for (i = 0; is_round(i, nr_rounds); i++) {
		allowed_mmio = MMIO_WRITES;
		data.flags = KVM_MEM_READONLY;
		set_random_slots(&data);
		copy = copy_of(data.mem);
		check_exits("writes to read-only memory", &nr_writes, NR_PAGES);
		check_pages("read-only", data.mem, copy, 0, NR_PAGES, true);

		data.flags = 0;
		set_random_slots(&data);
		check_writes("writable", copy);
		/* A vCPU that had exited before has also returned. */
		allowed_mmio = NO_MMIO;
		wait_for_loop();
		free(copy);
	}
	stop_vcpus("read-only", NULL);
}

static uint64_t nr_blocks(int fd)
{
	struct stat st;

	TEST_ASSERT(!fstat(fd, &st), "fstat(): errno %d", errno);
	return st.st_blocks;
}

static void test_discard(const char *what, bool huge, uint64_t nr_pages)
{
	size_t size = nr_pages * GUEST_PAGE_SIZE;
	int fd = kvm_memfd_alloc(size, huge), i, j;
	void *mem = map_memory(nr_pages, MAP_SHARED, fd);

	madvise(mem, size, MADV_NOHUGEPAGE);
	shared.nr_pages = nr_pages;
	/* More threads than CPUs: a vCPU may be preempted in a page fault. */
	create_vm(guest_code, 2, NULL);
	allowed_mmio = ALL_MMIO;
	start_vcpus();

	for (i = 0; is_round(i, 3 * nr_rounds); i++) {
		/* Delete the slot while the vCPU populates the memory. */
		vm_set_user_memory_region(vm, DATA_SLOT, 0, DATA_GPA, size, mem);
		wait_for(nr_blocks(fd));
		nr_concurrent += nr_blocks(fd) < size / 512;
		vm_set_user_memory_region(vm, DATA_SLOT, 0, DATA_GPA, 0, NULL);
		TEST_ASSERT(!madvise(mem, size, MADV_REMOVE), "madvise(): errno %d", errno);
		for (j = 0; j < 2; j++) {
			TEST_ASSERT(!nr_blocks(fd), "%s, check %d: expected 0 blocks, got %lu",
				    what, j, nr_blocks(fd));
			/* No vCPU is in the same page fault any more. */
			wait_for_accesses(2);
		}
	}
	stop_vcpus(what, NULL);
}

TEST(discard)
{
	test_discard("shmem", false, 4 * NR_PAGES);
}

TEST(discard_hugetlb)
{
	add_huge_pages(8);
	shared.stride = get_def_hugetlb_pagesz() / GUEST_PAGE_SIZE;
	test_discard("hugetlb", true, 8 * shared.stride);
}

/* Divide all pages into @n slots and into @n2 slots in turn. */
static void test_layouts(const char *what, void *mem, uint32_t flags, int n, int n2)
{
	void *copy;
	int i;

	init_pages(mem, 0);
	copy = copy_of(mem);
	create_vm(guest_code, 2, mem);
	data.nr_ids = max(n, NR_IDS);
	data.flags = flags;
	start_vcpus();
	for (i = 0; is_round(i, 2 * nr_rounds); i++) {
		divide(&data, i % 2 ? n2 : n);
		set_slots(&data);
		wait_for_some_accesses();
		/* This also looks up all slots by their ids. */
		if (flags)
			copy_dirty_pages(copy, false);
	}
	stop_vcpus(what, mem);
	kvm_vm_free(vm);
	free(copy);
}

TEST(all_slots)
{
	shared.nr_pages = 4 * MAX_SLOTS;
	test_layouts("all", new_memory(), KVM_MEM_LOG_DIRTY_PAGES, MAX_SLOTS, MAX_SLOTS);
}

TEST(backings)
{
	int fd = kvm_memfd_alloc(NR_PAGES * GUEST_PAGE_SIZE, false);
	size_t size;
	void *mem;

	test_layouts("anonymous", new_memory(), 0, NR_IDS, 1);
	test_layouts("shmem", map_memory(NR_PAGES, MAP_SHARED, fd), 0, NR_IDS, 1);
	test_layouts("private file", map_memory(NR_PAGES, MAP_PRIVATE, fd), 0, NR_IDS, 1);
	if (thp_configured()) {
		size = get_trans_hugepagesz();
		shared.nr_pages = 2 * size / GUEST_PAGE_SIZE;
		shared.stride = 8;
		mem = aligned_alloc(size, 2 * size);
		TEST_ASSERT(mem && !madvise(mem, 2 * size, MADV_HUGEPAGE), "THP: errno %d", errno);
		test_layouts("THP", mem, 0, NR_IDS, 1);
	}
}

TEST(backing_hugetlb)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;

	add_huge_pages(2);
	shared.nr_pages = 2 * get_def_hugetlb_pagesz() / GUEST_PAGE_SIZE;
	shared.stride = 8;
	test_layouts("hugetlb", map_memory(shared.nr_pages, flags, -1), 0, NR_IDS, 1);
}

TEST(backing_pfn)
{
	const int flags = MAP_SHARED | MAP_FIXED;
	void *mem;
	int i, fd;

	TEST_REQUIRE(!access("/dev/test_mmu_gate", R_OK | W_OK));

	/* Each device has one page. */
	shared.nr_pages = 16;
	mem = map_memory(shared.nr_pages, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (i = 0; i < shared.nr_pages; i++) {
		fd = open("/dev/test_mmu_gate", O_RDWR);
		TEST_ASSERT(mmap(word(mem, i, 0), GUEST_PAGE_SIZE, PROT_READ | PROT_WRITE, flags,
				 fd, 0) != MAP_FAILED, "mmap() of a device: errno %d", errno);
	}
	test_layouts("PFN", mem, 0, NR_IDS, 1);
}

#define FAILSLAB	"/sys/kernel/debug/failslab/"

TEST(rollback)
{
	void *spare = new_memory(), *copy;
	int n, left = 0, error, nr_failed = 0;

	__TEST_REQUIRE(!access("/proc/thread-self/fail-nth", W_OK) &&
		       write_setting(FAILSLAB "ignore-gfp-wait", "N") &&
		       write_setting(FAILSLAB "verbose", "0"), "needs a kernel with FAILSLAB");
	create_vm(guest_code, 2, new_memory());
	data.flags = KVM_MEM_LOG_DIRTY_PAGES;
	start_vcpus();

	/* @left stays above 0 if the transaction makes fewer than @n allocations. */
	for (n = 1; !left; n++) {
		left = n;
		copy = copy_of(data.mem);
		error = change_memory(&spare, &left);
		TEST_ASSERT(!error || (error == ENOMEM && !left),
			    "allocation %d: expected errno %d, got %d", n, ENOMEM, error);
		if (!error)
			memcpy(copy, data.mem, NR_PAGES * GUEST_PAGE_SIZE);
		check_writes(error ? "unchanged memory" : "other memory", copy);
		if (error) {
			nr_failed++;
			set_pause(true);
			copy_dirty_pages(copy, false);
			check_pages("copy", copy, data.mem, 0, NR_PAGES, true);
			set_pause(false);
		}
		free(copy);
	}
	TEST_ASSERT(nr_failed, "expected transactions to fail, got none");
	stop_vcpus("rollback", NULL);
}

#define NR_EVENTS		(10 * nr_rounds)
static void *event_worker(void *arg)
{
	void (*send_event)(uint64_t nr) = arg;
	uint64_t nr;

	for (nr = 0; nr < NR_EVENTS; nr++) {
		send_event(nr);
		wait_for(guest_value(&host_shared->events[0]) > nr);
	}
	return NULL;
}

/*
 * Change the slots of both ranges while the guest counts NR_EVENTS events or more, which
 * a thread sends with @send, or else the guest causes.
 */
static void change_during_events(struct range *other, void (*send)(uint64_t nr))
{
	pthread_t thread;
	int i;

	start_vcpus();
	thread = send ? start_thread(event_worker, send) : 0;
	for (i = 0; is_round(i, 2 * nr_rounds) ||
	     guest_value(&host_shared->events[0]) < NR_EVENTS; i++) {
		set_random_slots(&data);
		if (other)
			set_random_slots(other);
		wait_for_some_accesses();
	}
	if (send)
		join_thread(thread, "events");
	stop_vcpus("events", data.mem);
}

/* The range of a slot that the library has created */
static struct range *library_range(uint64_t gpa)
{
	struct kvm_userspace_memory_region *r = kvm_userspace_memory_region_find(vm, gpa, gpa);
	static struct range range;

	TEST_ASSERT(r, "expected a slot at %#lx, got none", gpa);
	range = (struct range) {
		.first_id = r->slot, .nr_ids = NR_IDS, .flags = r->flags,
		.gpa = r->guest_phys_addr, .nr_pages = r->memory_size / GUEST_PAGE_SIZE,
		.mem = (void *)r->userspace_addr,
	};
	return &range;
}

#ifdef __x86_64__
/* The first page that SMM does not use for other purposes */
#define SMM_PAGE		16

/* Code for real mode, which increments counter 0 in each page from SMM_PAGE on */
static const uint8_t smi_handler[] = {
	0x66, 0xbb, 0, 0, 0x01, 0x40,		/* mov $DATA_GPA + 16 * 4096, %ebx */
	0x67, 0x66, 0xff, 0x43, 8,		/* 1: incl 8(%ebx) */
	0x66, 0x81, 0xc3, 0, 0x10, 0, 0,	/* add $4096, %ebx */
	0x66, 0x81, 0xfb, 0, 0, 0x08, 0x40,	/* cmp $DATA_GPA + 128 * 4096, %ebx */
	0x75, 0xeb,				/* jne 1b */
	0x0f, 0xaa,				/* rsm */
};

static void guest_send_smi(void)
{
	x2apic_enable();
	x2apic_write_reg(APIC_ICR, APIC_DEST_SELF | APIC_INT_ASSERT | APIC_DM_SMI);
	guest_add(&shared.events[0]);
}

TEST(smm)
{
	struct range smm;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE) >= 2);
	shared.after_loop = guest_send_smi;
	create_vm(guest_code, 1, new_memory());
	smm = data;
	smm.header.as_id = 1;
	smm.mem = new_memory();
	memcpy(smm.mem + 0x8000, smi_handler, sizeof(smi_handler));
	set_random_slots(&smm);
	vcpu_set_msr(vcpus[0], MSR_IA32_SMBASE, DATA_GPA);
	change_during_events(&smm, NULL);
	check_counters("SMM", smm.mem, 0, SMM_PAGE, guest_value(&host_shared->events[0]));
}

static void guest_l2(void)
{
	for (;;) {
		guest_loop(0);
		vmmcall();
	}
}

static void guest_l1(int id, struct svm_test_data *svm)
{
	static uint8_t stack[4096] __aligned(16);

	generic_svm_setup(svm, guest_l2, stack + sizeof(stack));
	while (!READ_ONCE(shared.stop)) {
		run_guest(svm->vmcb, svm->vmcb_gpa);
		GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
		svm->vmcb->save.rip += 3;
		guest_add(&shared.events[0]);
	}
	GUEST_DONE();
}

TEST(nested)
{
	vm_vaddr_t svm;

	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_SVM));
	create_vm(guest_l1, 1, new_memory());
	vcpu_alloc_svm(vm, &svm);
	vcpu_args_set(vcpus[0], 2, 0, svm);
	/* Also change the slot of the VMCB, page tables and code. */
	change_during_events(library_range(addr_gva2gpa(vm, svm)), NULL);
}

/* In the first page, behind the words that the guest uses */
#define STEAL_TIME_OFFSET	0x800

/* KVM updates the steal time in KVM_RUN. */
static void guest_exit(void)
{
	GUEST_SYNC(0);
}

TEST(steal_time)
{
	void *spare = new_memory();
	struct kvm_steal_time *st;
	uint32_t version;
	int i;

	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME));
	shared.after_loop = guest_exit;
	create_vm(guest_code, 1, new_memory());
	vcpu_set_msr(vcpus[0], MSR_KVM_STEAL_TIME,
		     (DATA_GPA + STEAL_TIME_OFFSET) | KVM_MSR_ENABLED);
	start_vcpus();
	for (i = 0; is_round(i, nr_rounds); i++) {
		/* KVM must not write to the old memory, either. */
		change_memory_and_check(&spare);
		st = data.mem + STEAL_TIME_OFFSET;
		version = READ_ONCE(st->version);
		wait_for(READ_ONCE(st->version) > version + 2);
	}
	stop_vcpus("steal time", NULL);
}

/* The first page is shared_info, and the second one contains vcpu_info. */
#define VCPU_INFO_GPA		(DATA_GPA + GUEST_PAGE_SIZE + 0x100)

static void guest_take_events(void)
{
	uint64_t *pending = (uint64_t *)(DATA_GPA + XEN_SHINFO_PENDING);
	struct xen_vcpu_info *vi = (void *)VCPU_INFO_GPA;

	if (!__atomic_exchange_n(&vi->evtchn_upcall_pending, 0, __ATOMIC_SEQ_CST))
		return;
	__atomic_exchange_n(&vi->evtchn_pending_sel, 0, __ATOMIC_SEQ_CST);
	if (__atomic_exchange_n(pending, 0, __ATOMIC_SEQ_CST))
		guest_add(&shared.events[0]);
}

static void send_xen_event(uint64_t nr)
{
	int error = xen_send_event(vm, 1 + nr % 63, vcpus[0]->id,
				   KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL);

	TEST_ASSERT(!error, "event %lu: expected success, got errno %d", nr, error);
}

TEST(xen)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_EVTCHN_SEND, .msr = XEN_HYPERCALL_MSR,
	};
	struct kvm_xen_hvm_attr long_mode = {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = true,
	}, shared_info = {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = DATA_GPA / GUEST_PAGE_SIZE,
	};
	struct kvm_xen_vcpu_attr vcpu_info = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, .u.gpa = VCPU_INFO_GPA,
	};

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	shared.after_loop = guest_take_events;
	create_vm(guest_code, 1, new_memory());
	set_random_slots(&data);
	vm_ioctl(vm, KVM_XEN_HVM_CONFIG, &config);
	ASSERT_EQ(xen_set_vm_attr(vm, long_mode), 0);
	ASSERT_EQ(xen_set_vm_attr(vm, shared_info), 0);
	ASSERT_EQ(xen_set_vcpu_attr(vcpus[0], vcpu_info), 0);
	change_during_events(NULL, send_xen_event);
}
#else
#define GICD_BASE_GPA		0x8000000ull
#define GICR_BASE_GPA		0x80a0000ull
#define ITS_BASE_GPA		0xa000000ull
#define TABLES_GPA		SZ_2G

/* The host sends MSIs of one device, and the guest maps and unmaps another one. */
#define MSI_DEVICE		0
#define GUEST_DEVICE		1

static struct its its;
static struct lpi_tables tables;

/* Counts the LPIs of each device. */
static void guest_irq_handler(struct ex_regs *regs)
{
	uint32_t intid = gic_get_and_ack_irq();

	GUEST_ASSERT_1(intid - LPI_BASE < ARRAY_SIZE(shared.events), intid);
	guest_add(&shared.events[intid - LPI_BASE]);
	gic_set_eoi(intid);
}

/* Each device has a collection of its own. */
static void guest_map_device(uint32_t device, bool valid)
{
	its_send_mapc(&its, device, 0, valid);
	its_send_mapd(&its, device, tables.itt + device * SZ_4K, 5, valid);
	if (valid)
		its_send_mapti(&its, device, 0, device, LPI_BASE + device);
}

static void guest_init_its(int id)
{
	gic_init(GIC_V3, 1, (void *)GICD_BASE_GPA, (void *)GICR_BASE_GPA);
	gicr_enable_lpis(GICR_BASE_GPA, 0, &tables);
	its_init(&its);
	guest_map_device(MSI_DEVICE, true);
	local_irq_enable();
	guest_code(id);
}

static void guest_send_commands(void)
{
	uint64_t nr_lpis = READ_ONCE(shared.events[GUEST_DEVICE]);

	guest_map_device(GUEST_DEVICE, true);
	its_send_inv(&its, GUEST_DEVICE, 0);
	its_send_int(&its, GUEST_DEVICE, 0);
	isb();
	/* Interrupts are enabled, so the LPI has been taken by now. */
	GUEST_ASSERT_EQ(READ_ONCE(shared.events[GUEST_DEVICE]), nr_lpis + 1);
	its_send_invall(&its, GUEST_DEVICE);
	its_send_discard(&its, GUEST_DEVICE, 0);
	guest_map_device(GUEST_DEVICE, false);
}

static void send_msi(uint64_t nr)
{
	int ret = __kvm_signal_msi(vm, its.base + GITS_TRANSLATER, KVM_MSI_VALID_DEVID,
				   MSI_DEVICE, 0);

	TEST_ASSERT(ret == 1, "MSI %lu: expected KVM_SIGNAL_MSI to return 1, got %d", nr, ret);
}

TEST(its_tables)
{
	shared.after_loop = guest_send_commands;
	create_vm(guest_init_its, 1, new_memory());
	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(vcpus[0]);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_irq_handler);
	__TEST_REQUIRE(vgic_v3_setup(vm, 1, 64, GICD_BASE_GPA, GICR_BASE_GPA) >= 0,
		       "needs a GICv3");
	vgic_its_setup(vm, &its, 1, ITS_BASE_GPA, &tables, 1, SZ_64K, TABLES_GPA);
	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);
	change_during_events(library_range(TABLES_GPA), send_msi);
}
#endif

int main(int argc, char *argv[])
{
	unsigned int seed = time(NULL);
	int opt;

	while ((opt = getopt(argc, argv, "hn:s:")) != -1) {
		if (opt == 'n') {
			nr_rounds = atoi(optarg);
		} else if (opt == 's') {
			seed = strtoul(optarg, NULL, 0);
		} else {
			printf("usage: %s [-h] [-n rounds] [-s seed] [case...]\n"
			       " -n: number of rounds of each case, default 10\n"
			       " -s: seed for the slots, default: the current time\n", argv[0]);
			return 0;
		}
	}
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));
	TEST_REQUIRE(getpagesize() == GUEST_PAGE_SIZE);
	pr_info("seed %u\n", seed);
	srandom(seed);

	return run_cases(argv + optind);
}
