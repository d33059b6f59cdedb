// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test KVM_SET_USER_MEMORY_REGIONS, which changes several memslots at once.
 *
 *  - errors: each documented errno with its fail_index.  A transaction that is
 *    refused must not change anything.
 *  - operations: create, split, merge, move, swap, replace, toggle READONLY and
 *    delete.  Checks the layout that a vCPU sees, and the number of grace periods.
 *  - order: the order of the entries does not matter; with 128 entries.
 *  - dirty: a page whose mapping and logging do not change keeps its dirty bit;
 *    with slots of any size and alignment.
 *  - smm: the second address space of x86.
 *  - faults: each allocation fails in turn, on kernels with
 *    FAILSLAB.  vmalloc() reports its failed allocations with a call trace.
 *
 * With -p, the test only measures: page faults, the replacement of 128 slots, one
 * by one and in one transaction, and the split of a slot whose pages are all dirty.
 *
 * What a vCPU sees is probed page by page: the value that the host wrote to the
 * page, or that there is no slot, and whether the page is writable.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include <linux/sizes.h>

#include <test_util.h>
#include <kvm_test_harness.h>
#include <kvm_util.h>
#include <processor.h>

/* Arbitrarily chosen, above the addresses that the library uses. */
#define TEST_GPA		SZ_1G
#define TEST_SLOT		100
#define NR_PAGES		16
#define MAX_REGIONS		128

/* Pages for the tests of dirty bits; only the first ones are ever accessed. */
#define NR_DIRTY_PAGES		3000

/* Make at least MIN_FAULTS allocations fail, in at most MAX_FAULT_ROUNDS rounds. */
#define MIN_FAULTS		10
#define MAX_FAULT_ROUNDS	10

/* Parameters of the measurements with -p. */
#define PERF_GPA		(TEST_GPA + SZ_16M)
#define PERF_PAGE_SIZE		4096
#define NR_PERF_PAGES		4096
#define PERF_ROUNDS		200

/* The value that a probe reads if there is no slot. */
#define NO_SLOT			0xdeadull

#define GRACE_PERIODS		"memslot_grace_periods"

struct page_state {
	uint64_t value;
	bool writable;
};

#define ENTRY_SIZE		sizeof(struct kvm_userspace_memory_region)

struct regions {
	struct kvm_userspace_memory_regions header;
	struct kvm_userspace_memory_region entries[MAX_REGIONS + 1];
};

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpu;
static size_t page_size;
/*
 * NR_DIRTY_PAGES pages.  The first 2 * NR_PAGES pages have values, twice as many as
 * the guest sees, so that slots can change their backing.
 */
static void *mem;
static int rounds = 5;

/* Written by the host, read by the guest. */
static uint64_t probe_gpa;
static uint64_t nr_touch_pages;

static void guest_code(void)
{
	uint64_t *p, value, i;

	for (;;) {
		p = (uint64_t *)READ_ONCE(probe_gpa);
		for (i = 0; i < READ_ONCE(nr_touch_pages); i++)
			WRITE_ONCE(p[i * PERF_PAGE_SIZE / sizeof(*p)], i);
		value = READ_ONCE(*p);
		WRITE_ONCE(*p, value);
		GUEST_SYNC(value);
	}
}

static struct page_state probe(uint64_t gpa)
{
	struct page_state state = { .writable = true };
	struct kvm_run *run = vcpu->run;
	struct ucall uc;

	probe_gpa = gpa;
	sync_global_to_guest(vm, probe_gpa);

	for (;;) {
		vcpu_run(vcpu);
		switch (get_ucall(vcpu, &uc)) {
		case UCALL_SYNC:
			state.value = uc.args[1];
			return state;
		case UCALL_NONE:
			break;
		default:
			TEST_FAIL("unexpected ucall %lu", uc.cmd);
		}

		TEST_ASSERT(run->exit_reason == KVM_EXIT_MMIO,
			    "expected exit reason %s, got %s",
			    exit_reason_str(KVM_EXIT_MMIO),
			    exit_reason_str(run->exit_reason));
		TEST_ASSERT(run->mmio.phys_addr == gpa,
			    "expected MMIO at %#lx, got %#llx", gpa, run->mmio.phys_addr);
		if (run->mmio.is_write)
			state.writable = false;
		else
			*(uint64_t *)run->mmio.data = NO_SLOT;
	}
}

static void probe_all(struct page_state *state)
{
	int i;

	for (i = 0; i < NR_PAGES; i++)
		state[i] = probe(TEST_GPA + i * page_size);
}

static void *hva(int page)
{
	return mem + page * page_size;
}

/* The value of a page of @mem, which is never NO_SLOT. */
static uint64_t value_of(int page)
{
	return 0x1000 + page;
}

/* Expect that @n guest pages from @first are backed by @mem from @page. */
static void expect(struct page_state *state, int first, int n, int page, bool writable)
{
	int i;

	for (i = 0; i < n; i++)
		state[first + i] = (struct page_state){ value_of(page + i), writable };
}

static void expect_hole(struct page_state *state, int first, int n)
{
	int i;

	for (i = 0; i < n; i++)
		state[first + i] = (struct page_state){ NO_SLOT, false };
}

static void assert_layout(const char *what, struct page_state *expected)
{
	struct page_state state[NR_PAGES];
	int i;

	probe_all(state);
	for (i = 0; i < NR_PAGES; i++) {
		TEST_ASSERT(state[i].value == expected[i].value,
			    "%s: page %d: expected value %#lx, got %#lx",
			    what, i, expected[i].value, state[i].value);
		TEST_ASSERT(state[i].writable == expected[i].writable,
			    "%s: page %d: expected %swritable, got %swritable", what, i,
			    expected[i].writable ? "" : "not ",
			    state[i].writable ? "" : "not ");
	}
}

/* Slot TEST_SLOT + @slot: @n guest pages from @first, backed by @mem from @page. */
static struct kvm_userspace_memory_region region(int slot, int first, int n, int page,
						 uint32_t flags)
{
	return (struct kvm_userspace_memory_region) {
		.slot = TEST_SLOT + slot,
		.flags = flags,
		.guest_phys_addr = TEST_GPA + first * page_size,
		.memory_size = n * page_size,
		.userspace_addr = (uintptr_t)hva(page),
	};
}

static struct kvm_userspace_memory_region no_region(int slot)
{
	return (struct kvm_userspace_memory_region) { .slot = TEST_SLOT + slot };
}

static struct regions *new_regions(int n, const struct kvm_userspace_memory_region *entries)
{
	struct regions *r = calloc(1, sizeof(*r));

	TEST_ASSERT(r, "calloc() failed");
	r->header.nent = n;
	r->header.entry_size = sizeof(*entries);
	memcpy(r->entries, entries, n * sizeof(*entries));
	return r;
}

#define regions(...) ({								\
	struct kvm_userspace_memory_region e[] = { __VA_ARGS__ };		\
										\
	new_regions(ARRAY_SIZE(e), e);						\
})

static int __set_regions(struct regions *r)
{
	return __vm_ioctl(vm, KVM_SET_USER_MEMORY_REGIONS, &r->header);
}

static void __set_regions_ok(const char *what, struct regions *r, uint64_t grace_periods)
{
	uint64_t before = vm_get_stat(vm, GRACE_PERIODS), n;
	int ret = __set_regions(r);

	TEST_ASSERT(!ret, "%s: expected success, got errno %d (%s), fail_index %u",
		    what, errno, strerror(errno), r->header.fail_index);

	n = vm_get_stat(vm, GRACE_PERIODS) - before;
	TEST_ASSERT(n == grace_periods, "%s: expected %lu grace periods, got %lu",
		    what, grace_periods, n);
	pr_debug("%s: %lu grace periods\n", what, n);
}

/* Set and free the regions.  Expects success after @grace_periods grace periods. */
static void set_regions(const char *what, struct regions *r, uint64_t grace_periods)
{
	__set_regions_ok(what, r, grace_periods);
	free(r);
}

static void set_region(struct kvm_userspace_memory_region r, uint64_t grace_periods)
{
	uint64_t before = vm_get_stat(vm, GRACE_PERIODS), n;

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
	n = vm_get_stat(vm, GRACE_PERIODS) - before;
	TEST_ASSERT(n == grace_periods, "single slot %u: expected %lu grace periods, got %lu",
		    r.slot, grace_periods, n);
}

/* Delete the slots that a test may have left. */
static void clean(int first, int n)
{
	int i;

	for (i = first; i < first + n; i++) {
		struct kvm_userspace_memory_region r = no_region(i);

		__vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
	}
}

/*
 * errors
 */

struct error_case {
	const char *what;
	int error;
	int fail_index;
	struct regions *regions;
};

static void check_error(struct error_case c, struct page_state *layout)
{
	uint64_t before = vm_get_stat(vm, GRACE_PERIODS), n;
	int ret;

	c.regions->header.fail_index = 0xffff;
	ret = __set_regions(c.regions);
	TEST_ASSERT(ret == -1 && errno == c.error, "%s: expected errno %d (%s), got %d (%s)",
		    c.what, c.error, strerror(c.error), ret ? errno : 0,
		    ret ? strerror(errno) : "success");
	TEST_ASSERT(c.regions->header.fail_index == c.fail_index,
		    "%s: expected fail_index %d, got %u",
		    c.what, c.fail_index, c.regions->header.fail_index);

	n = vm_get_stat(vm, GRACE_PERIODS) - before;
	TEST_ASSERT(!n, "%s: expected no grace period, got %lu", c.what, n);

	if (layout)
		assert_layout(c.what, layout);
	free(c.regions);
}

static struct regions *with(struct regions *r, int i, uint32_t flags, uint64_t gpa,
			    uint64_t size, uint64_t addr)
{
	r->entries[i].flags |= flags;
	r->entries[i].guest_phys_addr += gpa;
	r->entries[i].memory_size += size;
	r->entries[i].userspace_addr += addr;
	return r;
}

static struct regions *with_pad(struct regions *r, uint32_t pad)
{
	r->header.pad = pad;
	return r;
}

static struct regions *with_entry_size(struct regions *r, uint32_t size)
{
	r->header.entry_size = size;
	return r;
}

/*
 * Double the size of the two entries of @r.  The additional bytes are zero, except for
 * the last one of entry @i, which is @value.
 */
static struct regions *with_large_entries(struct regions *r, int i, uint8_t value)
{
	struct kvm_userspace_memory_region *entries = r->entries;

	entries[2] = entries[1];
	memset(&entries[1], 0, ENTRY_SIZE);
	memset(&entries[3], 0, ENTRY_SIZE);
	*((uint8_t *)&entries[2 * i + 2] - 1) = value;
	return with_entry_size(r, 2 * ENTRY_SIZE);
}

static struct regions *with_header(struct regions *r, uint32_t flags, uint32_t as_id,
				   uint32_t nent)
{
	r->header.flags = flags;
	r->header.as_id = as_id;
	r->header.nent = nent;
	return r;
}

static struct regions *with_slot(struct regions *r, int i, uint32_t slot)
{
	r->entries[i].slot = slot;
	return r;
}

static void set_up(void)
{
	int i;

	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	ucall_init(vm, NULL);
	page_size = getpagesize();
	mem = mmap(NULL, NR_DIRTY_PAGES * page_size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap() failed: %d", errno);
	madvise(mem, NR_DIRTY_PAGES * page_size, MADV_NOHUGEPAGE);
	for (i = 0; i < 2 * NR_PAGES; i++)
		*(uint64_t *)hva(i) = value_of(i);
	virt_map(vm, TEST_GPA, TEST_GPA, NR_PAGES * page_size / vm->page_size);
}

FIXTURE(transaction) {
};

FIXTURE_SETUP(transaction)
{
	set_up();
}

FIXTURE_TEARDOWN(transaction)
{
	kvm_vm_free(vm);
}

TEST_F(transaction, errors)
{
	/* Valid entries; KVM must not apply them if another entry is invalid. */
	struct kvm_userspace_memory_region shrink_0 = region(0, 0, 2, 0, 0);
	struct kvm_userspace_memory_region move_1 = region(1, 12, 4, 4, 0);
	struct kvm_userspace_memory_region create_2 = region(2, 10, 2, 10, 0);
	struct kvm_userspace_memory_region delete_0 = no_region(0);
	struct page_state layout[NR_PAGES];
	struct regions *r;
	uint32_t nr_slots;
	void *last_page;
	int ret;

	nr_slots = kvm_check_cap(KVM_CAP_NR_MEMSLOTS);

	/* The adjacent slots 0 and 1, then a hole. */
	set_regions("errors", regions(region(0, 0, 4, 0, 0), region(1, 4, 4, 4, 0)), 1);
	expect(layout, 0, 8, 0, true);
	expect_hole(layout, 8, NR_PAGES - 8);
	assert_layout("errors", layout);

	struct error_case cases[] = {
		{ "unknown flag", EINVAL, 2,
		  with_header(regions(shrink_0, move_1), 1, 0, 2) },
		{ "nonexistent address space", EINVAL, 2,
		  with_header(regions(shrink_0, move_1), 0, 2, 2) },
		{ "no entries", EINVAL, 0,
		  with_header(regions(shrink_0), 0, 0, 0) },
		{ "too many entries", E2BIG, MAX_REGIONS + 1,
		  with_header(regions(shrink_0), 0, 0, MAX_REGIONS + 1) },
		{ "padding", EINVAL, 2,
		  with_pad(regions(shrink_0, move_1), 1) },
		{ "no entry size", EINVAL, 2,
		  with_entry_size(regions(shrink_0, move_1), 0) },
		{ "entry size too small", EINVAL, 2,
		  with_entry_size(regions(shrink_0, move_1), ENTRY_SIZE - 1) },
		{ "entry size too large", E2BIG, 2,
		  with_entry_size(regions(shrink_0, move_1), page_size + 1) },
		{ "entry with unknown fields", E2BIG, 1,
		  with_large_entries(regions(shrink_0, move_1), 1, 1) },
		{ "unknown flag of an entry", EINVAL, 1,
		  with(regions(shrink_0, move_1), 1, 1u << 15, 0, 0, 0) },
		{ "internal slot", EINVAL, 1,
		  with_slot(regions(shrink_0, create_2), 1, nr_slots) },
		{ "slot with address space", EINVAL, 1,
		  with_slot(regions(shrink_0, create_2), 1, 1u << 16 | TEST_SLOT) },
		{ "slot twice", EINVAL, 2,
		  regions(shrink_0, move_1, shrink_0) },
		{ "slot twice, deleted and created", EINVAL, 1,
		  regions(delete_0, shrink_0) },
		{ "unaligned size", EINVAL, 1,
		  with(regions(shrink_0, create_2), 1, 0, 0, 8, 0) },
		{ "unaligned gpa", EINVAL, 1,
		  with(regions(shrink_0, create_2), 1, 0, 8, 0, 0) },
		{ "unaligned hva", EINVAL, 1,
		  with(regions(shrink_0, create_2), 1, 0, 0, 0, 8) },
		{ "hva outside of user space", EINVAL, 1,
		  with(regions(shrink_0, create_2), 1, 0, 0, 0, 1ull << 63) },
		{ "gpa range that wraps", EINVAL, 0,
		  with(regions(create_2, shrink_0), 0, 0, -TEST_GPA - 11 * page_size, 0, 0) },
		{ "too many pages", EINVAL, 1,
		  with(regions(shrink_0, create_2), 1, 0, 0, (1ull << 31) * page_size,
		       SZ_1G - (uintptr_t)hva(10)) },
		{ "gpa beyond the physical address space", EINVAL, 1,
		  with(regions(shrink_0, create_2), 1, 0, 1ull << 52, 0, 0) },
		{ "overlap with a slot that remains", EEXIST, 1,
		  regions(create_2, region(0, 0, 5, 0, 0)) },
		{ "overlap with a slot whose entry changes nothing", EEXIST, 0,
		  regions(region(0, 0, 5, 0, 0), region(1, 4, 4, 4, 0)) },
		{ "overlap with a slot whose flags change", EEXIST, 0,
		  regions(region(0, 0, 5, 0, 0), region(1, 4, 4, 4, KVM_MEM_LOG_DIRTY_PAGES)) },
		{ "overlap with a slot that is replaced", EEXIST, 1,
		  regions(region(1, 4, 4, 8, 0), region(2, 7, 1, 7, 0)) },
		{ "overlap with a slot that is replaced by a later entry", EEXIST, 0,
		  regions(region(2, 7, 1, 7, 0), region(1, 4, 4, 8, 0)) },
		{ "overlap of two new slots", EEXIST, 2,
		  regions(shrink_0, create_2, region(3, 11, 1, 0, 0)) },
		{ "overlap with the new location of a slot", EEXIST, 1,
		  regions(move_1, region(2, 15, 1, 0, 0)) },
		{ "overlap of slots with the same start", EEXIST, 1,
		  regions(region(2, 8, 1, 8, 0), region(3, 8, 2, 8, 0)) },
	};

	for (int i = 0; i < ARRAY_SIZE(cases); i++)
		check_error(cases[i], layout);

	/* The header is not readable, then the entries are not. */
	ret = __vm_ioctl(vm, KVM_SET_USER_MEMORY_REGIONS,
			 (struct kvm_userspace_memory_regions *)0);
	TEST_ASSERT(ret == -1 && errno == EFAULT, "no header: expected errno %d, got %d",
		    EFAULT, ret ? errno : 0);

	last_page = mmap(NULL, 2 * page_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(last_page != MAP_FAILED, "mmap() failed: %d", errno);
	munmap(last_page + page_size, page_size);
	r = last_page + page_size - sizeof(r->header);
	r->header = (struct kvm_userspace_memory_regions) {
		.nent = 1,
		.entry_size = sizeof(r->entries[0]),
		.fail_index = 7,
	};
	ret = __set_regions(r);
	TEST_ASSERT(ret == -1 && errno == EFAULT, "no entries: expected errno %d, got %d",
		    EFAULT, ret ? errno : 0);
	TEST_ASSERT(!r->header.fail_index, "no entries: expected fail_index 0, got %u",
		    r->header.fail_index);
	munmap(last_page, page_size);
	assert_layout("inaccessible arguments", layout);

	set_regions("large entries", with_large_entries(regions(shrink_0, move_1), 0, 0), 2);
	expect_hole(layout, 0, NR_PAGES);
	expect(layout, 0, 2, 0, true);
	expect(layout, 12, 4, 4, true);
	assert_layout("large entries", layout);

	clean(0, 4);
}

/*
 * operations
 */

TEST_F(transaction, operations)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES, ro = KVM_MEM_READONLY;
	struct page_state layout[NR_PAGES];

	expect_hole(layout, 0, NR_PAGES);

	set_regions("create", regions(region(0, 0, 8, 0, 0)), 1);
	expect(layout, 0, 8, 0, true);
	assert_layout("create", layout);

	set_regions("nothing to change", regions(region(0, 0, 8, 0, 0), no_region(1)), 0);
	assert_layout("nothing to change", layout);

	set_regions("split", regions(region(0, 0, 3, 0, 0), region(1, 3, 5, 3, 0)), 2);
	assert_layout("split", layout);

	set_regions("flags", regions(region(0, 0, 3, 0, log), region(1, 3, 5, 3, log)), 1);
	assert_layout("flags", layout);

	set_regions("merge", regions(no_region(1), region(0, 0, 8, 0, 0)), 2);
	assert_layout("merge", layout);

	set_regions("grow", regions(region(0, 0, 10, 0, 0)), 2);
	expect(layout, 0, 10, 0, true);
	assert_layout("grow", layout);

	set_regions("different backing", regions(region(0, 0, 10, NR_PAGES, 0)), 2);
	expect(layout, 0, 10, NR_PAGES, true);
	assert_layout("different backing", layout);

	set_regions("punch a hole", regions(region(0, 0, 4, 0, 0), region(1, 6, 4, 6, 0)), 2);
	expect(layout, 0, 4, 0, true);
	expect_hole(layout, 4, 2);
	expect(layout, 6, 4, 6, true);
	assert_layout("punch a hole", layout);

	set_regions("swap", regions(region(0, 6, 4, 0, 0), region(1, 0, 4, 6, 0)), 2);
	expect(layout, 6, 4, 0, true);
	expect(layout, 0, 4, 6, true);
	assert_layout("swap", layout);

	set_regions("move onto each other",
		    regions(region(0, 4, 4, 0, 0), region(1, 8, 4, 6, 0)), 2);
	expect_hole(layout, 0, 4);
	expect(layout, 4, 4, 0, true);
	expect(layout, 8, 4, 6, true);
	assert_layout("move onto each other", layout);

	set_regions("all types of changes",
		    regions(no_region(0), region(2, 0, 2, 2, log), region(1, 4, 4, 6, log),
			    region(3, 8, 4, 8, 0)), 2);
	expect(layout, 0, 2, 2, true);
	expect_hole(layout, 2, 2);
	expect(layout, 4, 4, 6, true);
	expect(layout, 8, 4, 8, true);
	assert_layout("all types of changes", layout);

	if (kvm_has_cap(KVM_CAP_READONLY_MEM)) {
		set_regions("readonly", regions(region(2, 0, 2, 2, ro), region(3, 8, 4, 8, ro)), 2);
		expect(layout, 0, 2, 2, false);
		expect(layout, 8, 4, 8, false);
		assert_layout("readonly", layout);

		set_regions("writable", regions(region(2, 0, 2, 2, 0), region(3, 8, 4, 8, 0)), 2);
		expect(layout, 0, 2, 2, true);
		expect(layout, 8, 4, 8, true);
		assert_layout("writable", layout);
	}

	set_regions("delete", regions(no_region(1), no_region(2), no_region(3)), 2);
	expect_hole(layout, 0, NR_PAGES);
	assert_layout("delete", layout);

	/* Single slots, with the old ioctl. */
	set_region(region(0, 0, 4, 0, 0), 1);
	set_region(region(0, 0, 4, 0, log), 1);
	set_region(region(0, 4, 4, 0, log), 2);
	expect(layout, 4, 4, 0, true);
	assert_layout("single slot", layout);
	set_region(no_region(0), 2);
	expect_hole(layout, 0, NR_PAGES);
	assert_layout("single slot, deleted", layout);
}

/*
 * order
 */

static void shuffle(struct kvm_userspace_memory_region *entries, int n)
{
	int i, j;

	for (i = n - 1; i > 0; i--) {
		struct kvm_userspace_memory_region e = entries[i];

		j = random() % (i + 1);
		entries[i] = entries[j];
		entries[j] = e;
	}
}

/* Slots of one page each: slot i is at guest page @order[i]. */
static void set_single_pages(const char *what, int *order, int nr_moved)
{
	struct kvm_userspace_memory_region entries[MAX_REGIONS];
	int i;

	for (i = 0; i < MAX_REGIONS; i++)
		entries[i] = region(i, order[i], 1, i % (2 * NR_PAGES), 0);
	shuffle(entries, MAX_REGIONS);
	set_regions(what, new_regions(MAX_REGIONS, entries), nr_moved ? 2 : 1);
}

static void assert_single_pages(const char *what, int *order)
{
	struct page_state layout[NR_PAGES];
	int i;

	expect_hole(layout, 0, NR_PAGES);
	for (i = 0; i < MAX_REGIONS; i++) {
		if (order[i] < NR_PAGES)
			expect(layout, order[i], 1, i % (2 * NR_PAGES), true);
	}
	assert_layout(what, layout);
}

TEST_F(transaction, order)
{
	struct kvm_userspace_memory_region entries[MAX_REGIONS];
	int order[MAX_REGIONS], i, j, tmp, nr_moved, round;

	for (i = 0; i < MAX_REGIONS; i++)
		order[i] = i;
	set_single_pages("128 slots", order, 0);
	assert_single_pages("128 slots", order);

	for (round = 0; round < rounds; round++) {
		nr_moved = 0;
		for (i = MAX_REGIONS - 1; i > 0; i--) {
			j = random() % (i + 1);
			nr_moved += i != j;
			tmp = order[i];
			order[i] = order[j];
			order[j] = tmp;
		}
		set_single_pages("128 slots, permuted", order, nr_moved);
		assert_single_pages("128 slots, permuted", order);
	}

	for (i = 0; i < MAX_REGIONS; i++)
		entries[i] = no_region(i);
	shuffle(entries, MAX_REGIONS);
	set_regions("128 slots deleted", new_regions(MAX_REGIONS, entries), 2);
}

/*
 * dirty
 */

static unsigned long dirty_log(int slot)
{
	unsigned long bitmap[2] = {};

	kvm_vm_get_dirty_log(vm, TEST_SLOT + slot, bitmap);
	return bitmap[0];
}

static void assert_dirty(const char *what, int slot, unsigned long expected)
{
	unsigned long bitmap = dirty_log(slot);

	TEST_ASSERT(bitmap == expected, "%s: slot %d: expected dirty pages %#lx, got %#lx",
		    what, slot, expected, bitmap);
}

/* Write to the guest pages that are set in @mask; a probe writes to its page. */
static void dirty_pages(unsigned long mask)
{
	int i;

	for (i = 0; i < NR_PAGES; i++) {
		if (mask & (1ul << i))
			probe(TEST_GPA + i * page_size);
	}
}

TEST_F(transaction, dirty)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES;

	set_regions("dirty", regions(region(0, 0, 8, 0, log)), 1);
	dirty_pages(0xa5);
	set_regions("split", regions(region(0, 0, 3, 0, log), region(1, 3, 5, 3, log)), 2);
	assert_dirty("split", 0, 0x5);
	assert_dirty("split", 1, 0xa5 >> 3);
	assert_dirty("split, read again", 0, 0);
	assert_dirty("split, read again", 1, 0);

	/* Logging continues. */
	dirty_pages(0x88);
	assert_dirty("write after the split", 0, 0);
	assert_dirty("write after the split", 1, 0x88 >> 3);

	dirty_pages(0x42);
	set_regions("merge", regions(no_region(1), region(0, 0, 8, 0, log)), 2);
	assert_dirty("merge", 0, 0x42);

	/* Pages with a different backing or without logging lose dirty bits. */
	dirty_pages(0xff);
	set_regions("different backing",
		    regions(region(0, 0, 4, 0, log), region(1, 4, 4, NR_PAGES + 4, log)), 2);
	assert_dirty("different backing", 0, 0xf);
	assert_dirty("different backing", 1, 0);

	dirty_pages(0xff);
	set_regions("logging stopped and started", regions(region(1, 4, 4, NR_PAGES + 4, 0)), 1);
	set_regions("logging stopped and started", regions(region(1, 4, 4, NR_PAGES + 4, log)), 1);
	assert_dirty("logging stopped and started", 0, 0xf);
	assert_dirty("logging stopped and started", 1, 0);

	/* A slot that moves keeps its dirty bits. */
	dirty_pages(0x30);
	set_regions("move", regions(region(1, 8, 4, NR_PAGES + 4, log)), 2);
	assert_dirty("move", 1, 0x3);

	/* The slot id does not matter, only gfn and hva do. */
	dirty_pages(0x6);
	set_regions("new ids", regions(no_region(0), no_region(1), region(2, 0, 4, 0, log)), 2);
	assert_dirty("new ids", 2, 0x6);

	/* A slot moves to the gfns of a deleted slot that had the same backing. */
	set_regions("aliases", regions(region(0, 4, 4, 4, log), region(1, 12, 4, 4, log)), 1);
	dirty_pages(0x60);
	set_regions("move to an alias", regions(no_region(0), region(1, 4, 4, 4, log)), 2);
	assert_dirty("move to an alias", 1, 0x6);

	clean(0, 3);
}

/* The same with bitmaps whose bits are all set initially. */
TEST_F(transaction, dirty_initially_set)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES;
	unsigned long all = 0xff, low = 0x3;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));

	vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);

	set_regions("initially set", regions(region(0, 0, 8, 0, log)), 1);
	assert_dirty("initially set", 0, 0xff);
	kvm_vm_clear_dirty_log(vm, TEST_SLOT, &all, 0, 8);
	assert_dirty("cleared", 0, 0);

	dirty_pages(0x81);
	set_regions("split", regions(region(0, 0, 4, 0, log), region(1, 4, 6, 4, log)), 2);
	assert_dirty("split", 0, 0x1);
	/* The last two pages are new. */
	assert_dirty("split", 1, 0x38);

	/*
	 * A slot moves to the gfns of a deleted slot that had the same backing.  Its pages
	 * stay dirty, although those of the deleted slot were clean.
	 */
	clean(0, 2);
	set_regions("aliases", regions(region(0, 4, 4, 4, log), region(1, 12, 4, 4, log)), 1);
	kvm_vm_clear_dirty_log(vm, TEST_SLOT, &all, 0, 4);
	kvm_vm_clear_dirty_log(vm, TEST_SLOT + 1, &low, 0, 4);
	set_regions("move to an alias", regions(no_region(0), region(1, 4, 4, 4, log)), 2);
	assert_dirty("move to an alias", 1, 0xc);

	clean(0, 2);
	vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0);
}

/* A layout of slots: slot i contains @n pages from page @first. */
struct layout {
	int nr;
	struct {
		int first;
		int n;
	} slots[MAX_REGIONS];
};

static void add_slot(struct layout *l, int first, int n)
{
	l->slots[l->nr].first = first;
	l->slots[l->nr].n = n;
	l->nr++;
}

/*
 * Slots of @n pages with gaps of @gap pages, from page @first up to page @end.  If
 * there are too many, the last slot contains all remaining pages.
 */
static struct layout even_layout(int first, int n, int gap, int end)
{
	struct layout l = {};

	for (; first < end && l.nr < MAX_REGIONS - 1; first += n + gap)
		add_slot(&l, first, min(n, end - first));
	if (first < end)
		add_slot(&l, first, end - first);
	return l;
}

static struct layout random_layout(void)
{
	static const int limits[] = { 1, 8, 20, 200 };
	struct layout l = {};
	int page = random() % 10, n;

	while (page < NR_DIRTY_PAGES && l.nr < MAX_REGIONS) {
		n = 1 + random() % limits[random() % ARRAY_SIZE(limits)];
		n = min(n, NR_DIRTY_PAGES - page);
		add_slot(&l, page, n);
		page += n;
		if (random() % 4 == 0)
			page += random() % 10;
	}
	return l;
}

/* Change the layout from @from to @to in one transaction. */
static void change_layout(const char *what, const struct layout *from, const struct layout *to)
{
	struct kvm_userspace_memory_region entries[MAX_REGIONS];
	int i, n = max(from->nr, to->nr);
	struct regions *r;

	for (i = 0; i < n; i++) {
		if (i < to->nr)
			entries[i] = region(i, to->slots[i].first, to->slots[i].n,
					    to->slots[i].first, KVM_MEM_LOG_DIRTY_PAGES);
		else
			entries[i] = no_region(i);
	}
	shuffle(entries, n);
	r = new_regions(n, entries);
	TEST_ASSERT(!__set_regions(r), "%s: expected success, got errno %d (%s), fail_index %u",
		    what, errno, strerror(errno), r->header.fail_index);
	free(r);
}

/* All dirty bits of the slots are set; clear those of pages that are not @dirty. */
static void clear_bits(const struct layout *l, const bool *dirty)
{
	uint64_t bitmap[DIV_ROUND_UP(NR_DIRTY_PAGES, 64)];
	int i, j;

	for (i = 0; i < l->nr; i++) {
		memset(bitmap, 0, sizeof(bitmap));
		for (j = 0; j < l->slots[i].n; j++)
			bitmap[j / 64] |= (uint64_t)!dirty[l->slots[i].first + j] << j % 64;
		kvm_vm_clear_dirty_log(vm, TEST_SLOT + i, bitmap, 0, l->slots[i].n);
	}
}

/* Check the dirty bits of all slots, and that no bit beyond their pages is set. */
static void assert_bits(const char *what, const struct layout *l, const bool *dirty)
{
	uint64_t bitmap[DIV_ROUND_UP(NR_DIRTY_PAGES, 64)];
	int i, j, first, n;
	bool bit, expected;

	for (i = 0; i < l->nr; i++) {
		first = l->slots[i].first;
		n = l->slots[i].n;
		memset(bitmap, 0, sizeof(bitmap));
		kvm_vm_get_dirty_log(vm, TEST_SLOT + i, bitmap);

		for (j = 0; j < DIV_ROUND_UP(n, 64) * 64; j++) {
			expected = j < n && dirty[first + j];
			bit = bitmap[j / 64] >> j % 64 & 1;
			TEST_ASSERT(bit == expected,
				    "%s: slot %d of %d pages from page %d: bit %d: expected %d, got %d",
				    what, i, n, first, j, expected, bit);
		}
	}
}

/*
 * Change the layout and check the dirty bits.  The bits of pages that were in no
 * slot have the initial value @fresh; all other pages keep their bits.
 */
static void change_and_check(const char *what, const struct layout *from,
			     const struct layout *to, bool *dirty, bool fresh)
{
	bool covered[NR_DIRTY_PAGES] = {};
	int i;

	for (i = 0; i < from->nr; i++)
		memset(covered + from->slots[i].first, true, from->slots[i].n);
	for (i = 0; i < NR_DIRTY_PAGES; i++) {
		if (!covered[i])
			dirty[i] = fresh;
	}

	change_layout(what, from, to);
	assert_bits(what, to, dirty);
}

/*
 * Change the layout from @a to @b and back, once with new bitmaps whose bits are
 * clear and once with new bitmaps whose bits are set.
 */
static void test_dirty_layouts(const char *name, const struct layout *a, const struct layout *b)
{
	const uint64_t manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
	const struct layout none = {};
	bool dirty[NR_DIRTY_PAGES];
	char what[64];
	int fresh, i;

	for (fresh = 0; fresh < 2; fresh++) {
		snprintf(what, sizeof(what), "%s, initial bits %d", name, fresh);

		/*
		 * Start with all bits set and clear some of them, so that the
		 * guest does not have to run.
		 */
		vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      manual | KVM_DIRTY_LOG_INITIALLY_SET);
		change_layout(what, &none, a);
		for (i = 0; i < NR_DIRTY_PAGES; i++)
			dirty[i] = random() & 1;
		clear_bits(a, dirty);
		assert_bits(what, a, dirty);

		vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      manual | (fresh ? KVM_DIRTY_LOG_INITIALLY_SET : 0));
		change_and_check(what, a, b, dirty, fresh);
		change_and_check(what, b, a, dirty, fresh);
		change_layout(what, a, &none);
	}
	vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0);
}

/* Split and merge slots at pages that are not multiples of 8 or 64. */
TEST_F(transaction, dirty_any_page)
{
	const int end = NR_DIRTY_PAGES;
	const struct layout layouts[] = {
		even_layout(0, end, 0, end),		/* one slot */
		even_layout(0, 7, 0, end),
		even_layout(3, 9, 0, end - 5),
		even_layout(0, 1, 0, end),		/* single pages, and a large slot */
		even_layout(1, end - 2, 0, end - 1),	/* one slot */
		even_layout(5, 13, 2, end),
		even_layout(1, 64, 0, end - 1),
		even_layout(0, 63, 1, end),
		even_layout(9, 1, 3, end),
		even_layout(4, 1001, 0, end),
	};
	struct layout a, b;
	char what[32];
	int i;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));

	for (i = 1; i < ARRAY_SIZE(layouts); i++) {
		snprintf(what, sizeof(what), "layouts %d and %d", i - 1, i);
		test_dirty_layouts(what, &layouts[i - 1], &layouts[i]);
	}
	for (i = 0; i < rounds; i++) {
		snprintf(what, sizeof(what), "random layouts %d", i);
		a = random_layout();
		b = random_layout();
		test_dirty_layouts(what, &a, &b);
	}
}

#ifdef __x86_64__
static void assert_logging(const char *what, int as_id, int slot, int error)
{
	struct kvm_dirty_log log = { .slot = as_id << 16 | (TEST_SLOT + slot) };
	unsigned long bitmap[2] = {};
	int ret;

	log.dirty_bitmap = bitmap;
	ret = __vm_ioctl(vm, KVM_GET_DIRTY_LOG, &log);
	TEST_ASSERT((ret ? errno : 0) == error,
		    "%s: slot %d of address space %d: expected errno %d, got %d",
		    what, slot, as_id, error, ret ? errno : 0);
}

TEST_F(transaction, smm)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES;
	struct page_state layout[NR_PAGES];
	struct error_case overlap = { "overlap in SMM", EEXIST, 0 };

	if (kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE) < 2) {
		print_skip("no second address space");
		return;
	}

	set_regions("smm", regions(region(0, 0, 4, 0, 0)), 1);
	expect(layout, 0, 4, 0, true);
	expect_hole(layout, 4, NR_PAGES - 4);

	/* The same ids and gfns in the other address space. */
	set_regions("create in SMM",
		    with_header(regions(region(0, 0, 4, 4, log), region(1, 4, 4, 8, log)), 0, 1, 2),
		    1);
	assert_logging("create in SMM", 0, 0, ENOENT);
	assert_logging("create in SMM", 1, 0, 0);
	assert_logging("create in SMM", 1, 1, 0);
	assert_layout("create in SMM", layout);

	overlap.regions = with_header(regions(region(0, 0, 5, 4, log)), 0, 1, 1);
	check_error(overlap, layout);

	set_regions("merge in SMM",
		    with_header(regions(region(0, 0, 8, 4, log), no_region(1)), 0, 1, 2), 2);
	assert_logging("merge in SMM", 1, 0, 0);
	assert_logging("merge in SMM", 1, 1, ENOENT);
	assert_layout("merge in SMM", layout);

	set_regions("delete in SMM", with_header(regions(no_region(0)), 0, 1, 1), 2);
	assert_logging("delete in SMM", 1, 0, ENOENT);
	assert_layout("delete in SMM", layout);

	clean(0, 1);
}

TEST_F(transaction, dirty_ring)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES;
	struct error_case cases[] = {
		{ "dirty ring, delete", EOPNOTSUPP, 0, regions(no_region(0)) },
		{ "dirty ring, move", EOPNOTSUPP, 0, regions(region(0, 8, 4, 0, log)) },
		{ "dirty ring, replace", EOPNOTSUPP, 1,
		  regions(region(1, 4, 3, 4, 0), region(0, 0, 3, 0, 0)) },
	};
	struct kvm_vm *other_vm = vm;
	int i;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_LOG_RING));

	vm = vm_create_barebones();
	vm_enable_cap(vm, KVM_CAP_DIRTY_LOG_RING, 65536);
	set_regions("dirty ring, create",
		    regions(region(0, 0, 4, 0, log), region(1, 4, 4, 4, 0)), 1);

	/* This VM has no vCPU, so the layout cannot be probed. */
	for (i = 0; i < ARRAY_SIZE(cases); i++)
		check_error(cases[i], NULL);

	set_regions("dirty ring, slots without logging",
		    regions(region(1, 4, 2, 4, log), region(2, 6, 2, 6, log)), 2);
	set_regions("dirty ring, stop logging", regions(region(0, 0, 4, 0, 0)), 1);
	set_regions("dirty ring, shrink", regions(region(0, 0, 3, 0, log)), 2);

	kvm_vm_free(vm);
	vm = other_vm;
}
#endif

/*
 * faults
 */

/* Make the nth allocation of this thread fail.  Returns whether there was an nth. */
static bool fail_nth(int n, struct regions *r, int *error)
{
	int fd = open("/proc/thread-self/fail-nth", O_RDWR), ret;
	char buf[16] = {};

	TEST_ASSERT(fd >= 0, "fail-nth: %d", errno);
	snprintf(buf, sizeof(buf), "%d", n);
	TEST_ASSERT(write(fd, buf, strlen(buf)) > 0, "fail-nth: %d", errno);
	ret = __set_regions(r);
	*error = ret ? errno : 0;
	TEST_ASSERT(pread(fd, buf, sizeof(buf) - 1, 0) > 0, "fail-nth: %d", errno);
	/* The file contains the remaining count, which is 0 after the failure. */
	ret = atoi(buf);
	TEST_ASSERT(write(fd, "0", 1) == 1, "fail-nth: %d", errno);
	close(fd);
	return !ret;
}

/*
 * Make each allocation of a transaction fail in turn.  Returns how many of these
 * failures made the transaction fail.
 *
 * Other code, such as kmemleak and memcg, allocates memory on behalf of KVM, and not
 * the same number of times in each round.  The nth allocation may belong to such
 * code; then its failure does no harm.  Or it may be an allocation of KVM that has
 * already failed in an earlier round.
 */
static int try_faults(struct regions *r)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES;
	struct page_state layout[NR_PAGES];
	int n, error, nr_failed = 0;
	bool failed;

	expect(layout, 0, 10, 0, true);
	expect_hole(layout, 10, NR_PAGES - 10);
	expect(layout, 10, 1, 10, true);

	for (n = 1, failed = true; failed; n++) {
		clean(0, 5);
		set_regions("faults", regions(region(0, 0, 4, 0, log), region(1, 4, 4, 4, log),
					      region(2, 8, 2, 8, log), region(3, 10, 1, 10, 0)), 1);
		dirty_pages(0x81);

		failed = fail_nth(n, r, &error);
		if (!error)
			continue;

		nr_failed++;
		TEST_ASSERT(failed && error == ENOMEM,
			    "allocation %d: expected errno %d, got %d", n, ENOMEM, error);
		TEST_ASSERT(r->header.fail_index <= r->header.nent,
			    "allocation %d: fail_index %u of %u",
			    n, r->header.fail_index, r->header.nent);
		assert_dirty("faults", 0, 0x1);
		assert_dirty("faults", 1, 0x8);
		assert_layout("faults", layout);
	}
	return nr_failed;
}

TEST_F(transaction, faults)
{
	const uint32_t log = KVM_MEM_LOG_DIRTY_PAGES;
	struct page_state layout[NR_PAGES];
	int round, nr_failed = 0;
	struct regions *r;

	__TEST_REQUIRE(!access("/proc/thread-self/fail-nth", R_OK | W_OK) &&
		       write_setting("/sys/kernel/debug/failslab/ignore-gfp-wait", "N"),
		       "needs a kernel with FAILSLAB");
	write_setting("/sys/kernel/debug/failslab/verbose", "0");

	/* Replace, delete, move, change flags, create. */
	r = regions(region(0, 0, 6, 0, log), no_region(1), region(2, 14, 2, 8, 0),
		    region(3, 10, 1, 10, log), region(4, 6, 4, 12, 0));
	for (round = 0; round < MAX_FAULT_ROUNDS && nr_failed < MIN_FAULTS; round++)
		nr_failed += try_faults(r);

	pr_info("%d allocations failed\n", nr_failed);
	TEST_ASSERT(nr_failed >= MIN_FAULTS,
		    "expected at least %d failed allocations in %d rounds, got %d",
		    MIN_FAULTS, round, nr_failed);

	assert_dirty("no faults", 0, 0x1);
	expect(layout, 0, 6, 0, true);
	expect(layout, 6, 4, 12, true);
	expect(layout, 10, 1, 10, true);
	expect_hole(layout, 11, 3);
	expect(layout, 14, 2, 8, true);
	assert_layout("no faults", layout);

	free(r);
	clean(0, 5);
}

/*
 * measurements
 */

/* Measure faults on resident pages whose mappings have been dropped. */
static void measure_page_faults(void)
{
	const size_t size = NR_PERF_PAGES * PERF_PAGE_SIZE;
	uint64_t best = UINT64_MAX, start;
	struct ucall uc;
	void *pages;
	int i;

	pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(pages != MAP_FAILED, "mmap() failed: %d", errno);
	madvise(pages, size, MADV_NOHUGEPAGE);
	memset(pages, 1, size);
	virt_map(vm, PERF_GPA, PERF_GPA, size / vm->page_size);

	probe_gpa = PERF_GPA;
	sync_global_to_guest(vm, probe_gpa);
	nr_touch_pages = NR_PERF_PAGES;
	sync_global_to_guest(vm, nr_touch_pages);

	for (i = 0; i < 3; i++) {
		vm_set_user_memory_region(vm, TEST_SLOT, 0, PERF_GPA, size, pages);
		start = now_ns();
		vcpu_run(vcpu);
		best = min(best, now_ns() - start);
		TEST_ASSERT(get_ucall(vcpu, &uc) == UCALL_SYNC, "expected ucall %d, got %lu",
			    UCALL_SYNC, uc.cmd);
		vm_set_user_memory_region(vm, TEST_SLOT, 0, PERF_GPA, 0, NULL);
	}

	nr_touch_pages = 0;
	sync_global_to_guest(vm, nr_touch_pages);
	munmap(pages, size);
	printf("perf: page_fault ns %lu\n", best / NR_PERF_PAGES);
}

/* Change the backing of 128 slots, one slot after the other. */
static uint64_t replace_one_by_one(const struct kvm_userspace_memory_region *entries)
{
	struct kvm_userspace_memory_region r;
	uint64_t start = now_ns();
	int i;

	for (i = 0; i < MAX_REGIONS; i++) {
		r = no_region(i);
		vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
		r = entries[i];
		vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
	}
	return now_ns() - start;
}

static uint64_t replace_together(const struct kvm_userspace_memory_region *entries)
{
	struct regions *regions = new_regions(MAX_REGIONS, entries);
	uint64_t start = now_ns();

	TEST_ASSERT(!__set_regions(regions), "replace: errno %d", errno);
	start = now_ns() - start;
	free(regions);
	return start;
}

/* Print the best of PERF_ROUNDS rounds, with transactions if KVM supports them. */
static void measure_transactions(void)
{
	struct kvm_userspace_memory_region entries[2][MAX_REGIONS];
	uint64_t single = UINT64_MAX, best = UINT64_MAX;
	int i;

	for (i = 0; i < MAX_REGIONS; i++) {
		entries[0][i] = region(i, i, 1, 0, 0);
		entries[1][i] = region(i, i, 1, 1, 0);
		vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &entries[1][i]);
	}

	for (i = 0; i < PERF_ROUNDS; i++)
		single = min(single, replace_one_by_one(entries[i % 2]));

	best = single;
	if (kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS)) {
		for (i = 0; i < PERF_ROUNDS; i++)
			best = min(best, replace_together(entries[i % 2]));
	}
	printf("perf: replace_128_slots_one_by_one ns %lu\n", single);
	printf("perf: replace_128_slots ns %lu\n", best);
	clean(0, MAX_REGIONS);
}

/* Split a slot of which all pages are dirty. */
static void measure_dirty_slot(void)
{
	const size_t size = 256ull << 30;
	uint64_t start;
	struct kvm_userspace_memory_region slot = {
		.slot = TEST_SLOT,
		.flags = KVM_MEM_LOG_DIRTY_PAGES,
		.guest_phys_addr = size,
		.memory_size = size,
	}, halves[] = { slot, slot };
	struct kvm_vm *dirty_vm, *old_vm = vm;
	struct regions *r;
	void *pages;

	if (!kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS))
		return;

	pages = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	TEST_ASSERT(pages != MAP_FAILED, "mmap() failed: %d", errno);
	dirty_vm = vm_create_barebones();
	vm_enable_cap(dirty_vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);

	slot.userspace_addr = (uintptr_t)pages;
	vm_ioctl(dirty_vm, KVM_SET_USER_MEMORY_REGION, &slot);

	halves[0].userspace_addr = slot.userspace_addr;
	halves[0].memory_size = size / 2;
	halves[1].slot++;
	halves[1].guest_phys_addr += size / 2;
	halves[1].userspace_addr = slot.userspace_addr + size / 2;
	halves[1].memory_size = size / 2;

	r = new_regions(ARRAY_SIZE(halves), halves);
	vm = dirty_vm;
	start = now_ns();
	TEST_ASSERT(!__set_regions(r), "split: errno %d", errno);
	printf("perf: split_dirty_slot ns %lu\n", now_ns() - start);
	vm = old_vm;

	free(r);
	kvm_vm_free(dirty_vm);
	munmap(pages, size);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-p] [-r rounds] [-s seed] [case...]\n", name);
	printf(" -p: measure instead of testing\n");
	printf(" -r: number of random permutations and random layouts, default 5\n");
	printf(" -s: seed for the order of entries and for sizes, default: the current time\n");
	exit(0);
}

int main(int argc, char *argv[])
{
	unsigned int seed = time(NULL);
	bool perf = false;
	int opt;

	while ((opt = getopt(argc, argv, "hpr:s:")) != -1) {
		switch (opt) {
		case 'p':
			perf = true;
			break;
		case 'r':
			rounds = atoi(optarg);
			break;
		case 's':
			seed = strtoul(optarg, NULL, 0);
			break;
		default:
			help(argv[0]);
		}
	}

	if (!perf) {
		TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));
		TEST_ASSERT(kvm_check_cap(KVM_CAP_USER_MEMORY_REGIONS) == MAX_REGIONS,
			    "expected a maximum of %d regions, got %u",
			    MAX_REGIONS, kvm_check_cap(KVM_CAP_USER_MEMORY_REGIONS));
		pr_info("seed %u\n", seed);
	}
	srandom(seed);

	if (perf) {
		set_up();
		measure_page_faults();
		measure_transactions();
		measure_dirty_slot();
		kvm_vm_free(vm);
		return 0;
	}

	return run_cases(argv + optind);
}
