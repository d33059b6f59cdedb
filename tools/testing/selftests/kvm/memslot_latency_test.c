// SPDX-License-Identifier: GPL-2.0-only
/*
 * Change memslots while a vCPU waits for a page.
 *
 *  - wait: userfaultfd keeps a vCPU waiting for a page.  Meanwhile, unrelated slots
 *    are created, deleted, split and merged.  All changes must complete before the
 *    page arrives.  The test prints their latencies.
 *  - kept: the slot whose page the vCPU waits for gets another id, moves, and moves
 *    back.  All changes must complete before the page arrives.
 *  - gone: the slot whose page the vCPU waits for is deleted.  That must not complete
 *    before the page arrives, but other changes must.  Afterwards, the vCPU must not
 *    populate the memory, and the guest must find none.
 *  - gone_async: the same if KVM's worker for asynchronous page faults waits for the
 *    page (x86).
 *  - gone_two: two slots are deleted, each with a page that a vCPU waits for.  One of
 *    the deletions must complete when its page has arrived, whatever the other needs.
 *  - interrupts: the deletion of a slot cannot complete, because a vCPU holds kvm->srcu.
 *    Another vCPU, which accesses the slot, must take interrupts meanwhile (x86).
 *  - shmem, hugetlb: like wait, with other memory than anonymous memory.
 *  - swap: like wait, without userfaultfd: the page is shared memory that has been swapped
 *    out, and the swap device is suspended.
 *  - frozen: the same with a page of a file, on a file system that is frozen.
 *  - ioeventfd: the vCPU holds kvm->srcu while it waits, because KVM updates the steal
 *    time in the page.  Adding ioeventfds must complete before the page arrives.
 *  - once: if no memslot changes meanwhile, the guest faults once, and not again when
 *    the page has arrived.
 *  - race: the page is repeatedly taken away as soon as it has arrived, and stays in
 *    the end.  Sometimes the guest accesses it in time.
 *  - error: the page cannot be faulted in.  KVM_RUN must fail with EFAULT.
 *  - signal, hugetlb_signal: a signal must end the wait.  KVM_RUN must fail with EINTR, and
 *    the next KVM_RUN must succeed once the page has arrived.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/sizes.h>

#ifdef __x86_64__
#include <asm/kvm_para.h>
#endif

#include <disk.h>
#include <test_util.h>
#include <kvm_test_harness.h>
#include <kvm_util.h>
#include <processor.h>
#include <uffd.h>
#ifdef __x86_64__
#include <apic.h>
#endif

/* Arbitrarily chosen, above the addresses that the library uses. */
#define DATA_GPA		SZ_1G
#define OTHER_GPA		SZ_2G
#define DATA_SLOT		100
#define OTHER_SLOT		101
#define OTHER_UPPER_SLOT	102
#define DATA_SLOT_2		103
#define NR_OTHER_PAGES		4

#define DATA_VALUE		0x600dull
#define NO_SLOT			0xdeadull

#define STEAL_TIME_OFFSET	64
#define NR_IOEVENTFDS		5

/*
 * Much longer than a change takes even on a slow machine.  A change that is not
 * complete by then must be waiting for the vCPU.
 */
#define TIMEOUT_SECONDS		10

/* A change that does not wait for a page takes less time than this. */
#define NO_WAIT_MS		500

/* For the measurements: the time that a page may take to arrive over a network. */
#define PAGE_IN_MS		700
#define PERF_ROUNDS		3
#define NR_PAGE_INS		20

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpu;
static pthread_t vcpu_thread;
static pid_t vcpu_tid;
static size_t page_size, data_size;
static void *data, *other;
static int uffd;
static int nr_changes = 10, nr_rounds = 20;

/* Results of vcpu_worker(). */
static uint64_t guest_value;
static int run_errno;
static bool mmio_exit;

static void guest_code(void)
{
	for (;;)
		GUEST_SYNC(READ_ONCE(*(uint64_t *)DATA_GPA));
}

/* To write to a file, the host needs more than the page. */
static void guest_write(void)
{
	for (;;) {
		WRITE_ONCE(*(uint64_t *)DATA_GPA, DATA_VALUE);
		GUEST_SYNC(DATA_VALUE);
	}
}

/* Run the vCPU for one access of the guest. */
static void *vcpu_worker(void *unused)
{
	struct ucall uc;

	run_errno = 0;
	mmio_exit = false;
	__atomic_store_n(&vcpu_tid, syscall(SYS_gettid), __ATOMIC_SEQ_CST);
	for (;;) {
		/* The exit reason is meaningless if KVM_RUN fails. */
		if (__vcpu_run(vcpu)) {
			run_errno = errno;
			return NULL;
		}
		if (get_ucall(vcpu, &uc) == UCALL_SYNC) {
			guest_value = uc.args[1];
			return NULL;
		}
		TEST_ASSERT(vcpu->run->exit_reason == KVM_EXIT_MMIO, "expected %s, got %s",
			    exit_reason_str(KVM_EXIT_MMIO),
			    exit_reason_str(vcpu->run->exit_reason));
		mmio_exit = true;
		*(uint64_t *)vcpu->run->mmio.data = NO_SLOT;
	}
}

static void start_access(void)
{
	vcpu_thread = start_thread(vcpu_worker, NULL);
}

static void finish_access(const char *what, uint64_t value)
{
	join_thread(vcpu_thread, what);
	TEST_ASSERT(!run_errno, "%s: expected KVM_RUN to succeed, got errno %d", what, run_errno);
	TEST_ASSERT(guest_value == value, "%s: expected value %#lx, got %#lx",
		    what, value, guest_value);
	TEST_ASSERT(mmio_exit == (value == NO_SLOT), "%s: expected %s, got %s", what,
		    value == NO_SLOT ? "an MMIO exit" : "no MMIO exit",
		    mmio_exit ? "one" : "none");
}

/* Wait until the vCPU is waiting for its page. */
static void wait_for_fault(void)
{
	struct uffd_msg msg = uffd_wait_for_fault(uffd);

	TEST_ASSERT(msg.arg.pagefault.address == (uintptr_t)data,
		    "expected a fault at %p, got %#llx", data, msg.arg.pagefault.address);
}

static void provide_page(void)
{
	uint64_t *page = aligned_alloc(page_size, data_size);

	TEST_ASSERT(page, "aligned_alloc() failed");
	memset(page, 0, data_size);
	*page = DATA_VALUE;
	uffd_provide(uffd, data, page, data_size);
	free(page);
}

static void drop_page(void)
{
	TEST_ASSERT(!madvise(data, data_size, MADV_DONTNEED), "madvise(): errno %d", errno);
}

/*
 * A separate thread makes the changes, so that the test fails instead of hanging if
 * a change waits for the vCPU.
 */
struct change {
	const char *name;
	void (*make)(void);
	uint64_t *ns;
};

static sem_t change_requested, change_done;
static struct change *change;
static pthread_t change_thread;

static void *change_worker(void *unused)
{
	uint64_t start;

	for (;;) {
		while (sem_wait(&change_requested))
			;
		if (!change)
			return NULL;
		start = now_ns();
		change->make();
		*change->ns = now_ns() - start;
		sem_post(&change_done);
	}
}

static void start_change(struct change *c)
{
	change = c;
	sem_post(&change_requested);
}

/* Returns false if the change is not complete after @ms milliseconds. */
static bool wait_for_change(unsigned int ms)
{
	struct timespec t;
	int ret;

	clock_gettime(CLOCK_REALTIME, &t);
	t = timespec_add_ns(t, ms * 1000000ll);
	do {
		ret = sem_timedwait(&change_done, &t);
	} while (ret && errno == EINTR);
	return !ret;
}

/* Ends the wait of the vCPU, if that is necessary to fail: TEST_ASSERT() needs mmap_lock. */
static void (*end_wait)(void);

static void make_change(struct change *c)
{
	bool done;

	start_change(c);
	done = wait_for_change(TIMEOUT_SECONDS * 1000);
	if (!done && end_wait)
		end_wait();
	TEST_ASSERT(done,
		    "%s: not complete after %d s, expected no wait for the vCPU's page",
		    c->name, TIMEOUT_SECONDS);
}

static struct kvm_userspace_memory_region other_region(uint32_t slot, int first, int n)
{
	return (struct kvm_userspace_memory_region) {
		.slot = slot,
		.guest_phys_addr = OTHER_GPA + first * page_size,
		.memory_size = n * page_size,
		.userspace_addr = (uintptr_t)other + first * page_size,
	};
}

static void create_other(void)
{
	struct kvm_userspace_memory_region r = other_region(OTHER_SLOT, 0, NR_OTHER_PAGES);

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static void delete_other(void)
{
	struct kvm_userspace_memory_region r = other_region(OTHER_SLOT, 0, 0);

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static void set_two_regions(struct kvm_userspace_memory_region a,
			    struct kvm_userspace_memory_region b)
{
	struct kvm_userspace_memory_region entries[] = { a, b };

	vm_set_user_memory_regions(vm, ARRAY_SIZE(entries), entries);
}

static void split_other(void)
{
	set_two_regions(other_region(OTHER_SLOT, 0, 1),
			other_region(OTHER_UPPER_SLOT, 1, NR_OTHER_PAGES - 1));
}

static void merge_other(void)
{
	set_two_regions(other_region(OTHER_SLOT, 0, NR_OTHER_PAGES),
			other_region(OTHER_UPPER_SLOT, 0, 0));
}

static void set_data_region(size_t size)
{
	vm_set_user_memory_region(vm, DATA_SLOT, 0, DATA_GPA, size, data);
}

static void delete_data(void)
{
	set_data_region(0);
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(uint64_t *)a, y = *(uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Let the guest access @size bytes at @mem, which userfaultfd provides. */
static void use_data(void *mem, size_t size)
{
	TEST_ASSERT(mem != MAP_FAILED, "mmap(): errno %d", errno);
	data = mem;
	data_size = size;
	set_data_region(size);
	uffd = uffd_register(data, data_size, 0);
}

static void set_up(void)
{
	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	ucall_init(vm, NULL);
	page_size = getpagesize();
	other = mmap(NULL, NR_OTHER_PAGES * page_size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(other != MAP_FAILED, "mmap(): errno %d", errno);
	virt_map(vm, DATA_GPA, DATA_GPA, page_size / vm->page_size);

	TEST_ASSERT(!sem_init(&change_requested, 0, 0) && !sem_init(&change_done, 0, 0),
		    "sem_init() failed");
	change_thread = start_thread(change_worker, NULL);
}

static void use_anonymous_data(void)
{
	void *mem = mmap(NULL, page_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	use_data(mem, page_size);
}

static void tear_down(void)
{
	change = NULL;
	sem_post(&change_requested);
	join_thread(change_thread, "changes");
	kvm_vm_free(vm);
}

/* Anonymous memory */
FIXTURE(latency) {
};

FIXTURE_SETUP(latency)
{
	set_up();
	use_anonymous_data();
}

FIXTURE_TEARDOWN(latency)
{
	tear_down();
}

/* Memory that the case chooses */
FIXTURE(backing) {
};

FIXTURE_SETUP(backing)
{
	set_up();
}

FIXTURE_TEARDOWN(backing)
{
	tear_down();
}

static struct change changes[] = {
	{ "create", create_other },
	{ "split", split_other },
	{ "merge", merge_other },
	{ "delete", delete_other },
};

static bool is_possible(struct change *c)
{
	return kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS) ||
	       (c->make != split_other && c->make != merge_other);
}

/* How a page is taken away and provided, and how the test knows that the vCPU waits */
struct page_source {
	void (*take)(void);
	void (*wait)(void);
	void (*provide)(void);
};

static const struct page_source uffd_source = { drop_page, wait_for_fault, provide_page };

static void make_all_changes(uint64_t *ns[], int i)
{
	int j;

	for (j = 0; j < ARRAY_SIZE(changes); j++) {
		changes[j].ns = &ns[j][i];
		if (is_possible(&changes[j]))
			make_change(&changes[j]);
	}
}

static void test_wait_for(const struct page_source *source)
{
	uint64_t *ns[ARRAY_SIZE(changes)];
	int i, j;

	for (j = 0; j < ARRAY_SIZE(changes); j++) {
		ns[j] = calloc(nr_changes, sizeof(*ns[j]));
		TEST_ASSERT(ns[j], "calloc() failed");
	}

	/*
	 * The first round lets the thread allocate what it needs: later on, the vCPU may
	 * hold mmap_lock.
	 */
	make_all_changes(ns, 0);

	source->take();
	end_wait = source->provide;
	start_access();
	source->wait();

	for (i = 0; i < nr_changes; i++)
		make_all_changes(ns, i);

	end_wait = NULL;
	source->provide();
	finish_access("wait", DATA_VALUE);

	for (j = 0; j < ARRAY_SIZE(changes); j++) {
		qsort(ns[j], nr_changes, sizeof(*ns[j]), compare);
		pr_info("%s: %lu us, median %lu us, at most %lu us\n", changes[j].name,
			ns[j][0] / 1000, ns[j][nr_changes / 2] / 1000,
			ns[j][nr_changes - 1] / 1000);
		free(ns[j]);
	}
}

static void test_wait(void)
{
	test_wait_for(&uffd_source);
}

TEST_F(latency, wait)
{
	test_wait();
}

TEST_F(backing, shmem)
{
	int fd = kvm_memfd_alloc(page_size, false);
	void *mem = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	use_data(mem, page_size);
	test_wait();
}

static void test_hugetlb(void (*test)(void))
{
	size_t size;
	void *mem;

	add_huge_pages(1);
	size = get_def_hugetlb_pagesz();
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	use_data(mem, size);
	test();
	delete_data();
	munmap(mem, size);
	add_huge_pages(-1);
}

TEST_F(backing, hugetlb)
{
	test_hugetlb(test_wait);
}

/*
 * Whether the vCPU waits in a way that signals cannot end.  It may hold mmap_lock: do not
 * allocate memory.
 */
static bool vcpu_is_in_state_d(void)
{
	char path[64], text[64] = {}, *state;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat",
		 __atomic_load_n(&vcpu_tid, __ATOMIC_SEQ_CST));
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return false;
	if (read(fd, text, sizeof(text) - 1) < 0)
		*text = 0;
	close(fd);
	state = strrchr(text, ')');
	return state && !strncmp(state, ") D", 3);
}

static void wait_for_state_d(void)
{
	wait_for(vcpu_is_in_state_d());
}

static void take_to_swap(void)
{
	page_out(data, page_size);
	hold_swap();
}

TEST_F(backing, swap)
{
	static const struct page_source source = {
		take_to_swap, wait_for_state_d, release_swap,
	};
	int fd;

	swap_on();
	fd = kvm_memfd_alloc(page_size, false);
	data = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	TEST_ASSERT(data != MAP_FAILED, "mmap(): errno %d", errno);
	*(uint64_t *)data = DATA_VALUE;
	set_data_region(page_size);
	test_wait_for(&source);
	swap_off();
}

static int disk_fd;

static void freeze(void)
{
	freeze_disk(disk_fd);
}

static void thaw(void)
{
	thaw_disk(disk_fd);
}

TEST_F(backing, frozen)
{
	static const struct page_source source = { freeze, wait_for_state_d, thaw };
	struct kvm_vcpu *reader = vcpu;

	disk_fd = create_disk_file(page_size);
	data = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, disk_fd, 0);
	TEST_ASSERT(data != MAP_FAILED, "mmap(): errno %d", errno);
	set_data_region(page_size);
	vcpu = vm_vcpu_add(vm, 1, guest_write);
	test_wait_for(&source);
	TEST_ASSERT(*(uint64_t *)data == DATA_VALUE, "expected %#llx in the file, got %#lx",
		    DATA_VALUE, *(uint64_t *)data);
	vcpu = reader;
}

static struct kvm_userspace_memory_region data_region(uint32_t slot, uint64_t gpa,
						      size_t size)
{
	return (struct kvm_userspace_memory_region) {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)data,
	};
}

static void rename_data(void)
{
	set_two_regions(data_region(DATA_SLOT, 0, 0),
			data_region(DATA_SLOT_2, DATA_GPA, page_size));
}

static void rename_data_back(void)
{
	set_two_regions(data_region(DATA_SLOT_2, 0, 0),
			data_region(DATA_SLOT, DATA_GPA, page_size));
}

static void move_data(void)
{
	struct kvm_userspace_memory_region r = data_region(DATA_SLOT, OTHER_GPA, page_size);

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static void move_data_back(void)
{
	struct kvm_userspace_memory_region r = data_region(DATA_SLOT, DATA_GPA, page_size);

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

TEST_F(latency, kept)
{
	uint64_t ns;
	struct change changes[] = {
		{ "rename the slot of the page", rename_data, &ns },
		{ "rename it back", rename_data_back, &ns },
		{ "move the slot of the page", move_data, &ns },
		{ "move it back", move_data_back, &ns },
	};
	int i;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));

	drop_page();
	start_access();
	wait_for_fault();
	for (i = 0; i < ARRAY_SIZE(changes); i++)
		make_change(&changes[i]);
	provide_page();
	finish_access("kept", DATA_VALUE);
}

static bool is_page_resident(void)
{
	unsigned char resident;

	TEST_ASSERT(!mincore(data, page_size, &resident), "mincore(): errno %d", errno);
	return resident & 1;
}

static void *other_worker(void *unused)
{
	create_other();
	delete_other();
	return NULL;
}

static void test_gone(bool async)
{
	uint64_t ns;
	struct change c = { "delete the slot of the page", delete_data, &ns };

	drop_page();
	start_access();
	wait_for_fault();
	if (async)
		vcpu_wait_stat(vcpu, "blocking", 1);
	start_change(&c);
	TEST_ASSERT(!wait_for_change(NO_WAIT_MS),
		    "%s: complete, expected a wait for the vCPU's page", c.name);
	join_thread(start_thread(other_worker, NULL), "changes of another slot");
	provide_page();
	TEST_ASSERT(wait_for_change(TIMEOUT_SECONDS * 1000),
		    "%s: not complete within %d s after the page arrived",
		    c.name, TIMEOUT_SECONDS);
	drop_page();
	finish_access("gone", NO_SLOT);
	TEST_ASSERT(!is_page_resident(), "gone: expected no page, got one");
	set_data_region(page_size);
}

TEST_F(latency, gone)
{
	test_gone(false);
}

#ifdef __x86_64__
/* KVM halts a vCPU that can take interrupts, and a worker waits for the page. */
TEST_F(latency, gone_async)
{
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	regs.rflags |= BIT(9); /* IF */
	vcpu_regs_set(vcpu, &regs);
	/* The first read of a stat would wait for the end of KVM_RUN. */
	vcpu_get_stat(vcpu, "blocking");
	test_gone(true);
}
#endif

static void *other_data;

static void guest_read_other(void)
{
	GUEST_SYNC(READ_ONCE(*(uint64_t *)OTHER_GPA));
}

static void set_other_data(size_t size)
{
	vm_set_user_memory_region(vm, DATA_SLOT_2, 0, OTHER_GPA, size, other_data);
}

static void *run_worker(void *vcpu)
{
	vcpu_run(vcpu);
	return NULL;
}

static void *delete_other_data_worker(void *unused)
{
	set_other_data(0);
	return NULL;
}

TEST_F(latency, gone_two)
{
	uint64_t ns;
	struct change c = { "delete the first slot", delete_data, &ns };
	struct kvm_vcpu *reader = vm_vcpu_add(vm, 1, guest_read_other);
	pthread_t reader_thread, delete_thread;
	uint64_t grace_periods;
	int other_uffd;

	other_data = mmap(NULL, page_size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(other_data != MAP_FAILED, "mmap(): errno %d", errno);
	virt_map(vm, OTHER_GPA, OTHER_GPA, page_size / vm->page_size);
	set_other_data(page_size);
	other_uffd = uffd_register(other_data, page_size, 0);

	drop_page();
	start_access();
	wait_for_fault();
	start_change(&c);
	TEST_ASSERT(!wait_for_change(NO_WAIT_MS),
		    "%s: complete, expected a wait for the vCPU's page", c.name);

	reader_thread = start_thread(run_worker, reader);
	uffd_wait_for_fault(other_uffd);
	grace_periods = vm_get_stat(vm, "memslot_grace_periods");
	delete_thread = start_thread(delete_other_data_worker, NULL);
	/* The slot is gone, and slots_lock is free: the deletion waits for the page. */
	wait_for(vm_get_stat(vm, "memslot_grace_periods") == grace_periods + 2);
	create_other();
	delete_other();
	TEST_ASSERT(pthread_tryjoin_np(delete_thread, NULL) == EBUSY,
		    "expected the second deletion to wait for its page");
	uffd_provide(other_uffd, other_data, NULL, page_size);
	join_thread(delete_thread, "the second deletion, whose page has arrived");
	join_thread(reader_thread, "the reader of the second slot");

	TEST_ASSERT(!wait_for_change(0), "%s: complete, expected a wait for the vCPU's page",
		    c.name);
	provide_page();
	TEST_ASSERT(wait_for_change(TIMEOUT_SECONDS * 1000), "%s: not complete", c.name);
	finish_access("gone_two", NO_SLOT);
}

/* An access that waits for the page, which then arrives. */
static void make_access(const char *what)
{
	drop_page();
	start_access();
	wait_for_fault();
	provide_page();
	finish_access(what, DATA_VALUE);
}

/* Let KVM store the steal time of the vCPU at @gpa.  Returns false if it cannot. */
static bool set_steal_time(uint64_t gpa)
{
#ifdef __x86_64__
	if (!kvm_cpu_has(X86_FEATURE_KVM_STEAL_TIME))
		return false;
	vcpu_set_msr(vcpu, MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
#else
	struct kvm_device_attr attr = {
		.group = KVM_ARM_VCPU_PVTIME_CTRL,
		.attr = KVM_ARM_VCPU_PVTIME_IPA,
		.addr = (uint64_t)&gpa,
	};

	if (__vcpu_ioctl(vcpu, KVM_HAS_DEVICE_ATTR, &attr))
		return false;
	vcpu_ioctl(vcpu, KVM_SET_DEVICE_ATTR, &attr);
#endif
	return true;
}

#ifdef __x86_64__
#define TOUCHED_GPA		(OTHER_GPA + SZ_256M)
#define NR_TOUCHED_PAGES	4096
#define TOUCHED_SIZE		(NR_TOUCHED_PAGES * 4096ul)
#define NR_INTERRUPTS		10
/* Faults at one page, so that its slot must be INVALID */
#define NR_STUCK_FAULTS		5
#define VECTOR			0x40

/* Shared with the guest. */
static uint64_t nr_interrupts, nr_touched;

static void handle_interrupt(struct ex_regs *regs)
{
	WRITE_ONCE(nr_interrupts, nr_interrupts + 1);
	x2apic_write_reg(APIC_EOI, 0);
}

/* Touch a new page for each interrupt. */
static void guest_touch(void)
{
	uint64_t seen;
	int i;

	x2apic_enable();
	asm volatile("sti");
	for (i = 0; i < NR_TOUCHED_PAGES; i++) {
		seen = READ_ONCE(nr_interrupts);
		READ_ONCE(*(uint64_t *)(TOUCHED_GPA + i * 4096ul));
		WRITE_ONCE(nr_touched, i + 1);
		while (READ_ONCE(nr_interrupts) == seen)
			cpu_relax();
	}
	GUEST_DONE();
}

static void *touched;

static void set_touched(size_t size)
{
	vm_set_user_memory_region(vm, OTHER_SLOT, 0, TOUCHED_GPA, size, touched);
}

static void delete_touched(void)
{
	set_touched(0);
}

static void send_interrupt(struct kvm_msi *msi, uint64_t *nr_taken)
{
	uint64_t before = READ_ONCE(*nr_taken);
	int ret = __vm_ioctl(vm, KVM_SIGNAL_MSI, msi);

	TEST_ASSERT(ret == 1, "KVM_SIGNAL_MSI: expected 1, got %d, errno %d", ret, errno);
	wait_for(READ_ONCE(*nr_taken) > before);
}

TEST_F(latency, interrupts)
{
	uint64_t ns, *interrupts, *pages, before, faults;
	struct change c = { "delete the touched slot", delete_touched, &ns };
	struct kvm_vcpu *toucher = vm_vcpu_add(vm, 1, guest_touch);
	struct kvm_msi msi = {
		.address_lo = APIC_DEFAULT_GPA | toucher->id << 12,
		.data = VECTOR,
	};
	pthread_t thread;
	int i;

	TEST_REQUIRE(set_steal_time(DATA_GPA + STEAL_TIME_OFFSET));

	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(toucher);
	vm_install_exception_handler(vm, VECTOR, handle_interrupt);
	touched = mmap(NULL, TOUCHED_SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(touched != MAP_FAILED, "mmap(): errno %d", errno);
	madvise(touched, TOUCHED_SIZE, MADV_NOHUGEPAGE);
	set_touched(TOUCHED_SIZE);
	virt_map(vm, TOUCHED_GPA, TOUCHED_GPA, NR_TOUCHED_PAGES);
	interrupts = addr_gva2hva(vm, (vm_vaddr_t)&nr_interrupts);
	pages = addr_gva2hva(vm, (vm_vaddr_t)&nr_touched);
	/* The first read of a stat would wait for the end of KVM_RUN. */
	vcpu_get_stat(toucher, "pf_taken");

	thread = start_thread(run_worker, toucher);
	wait_for(READ_ONCE(*pages));

	drop_page();
	start_access();
	wait_for_fault();
	start_change(&c);

	/* Let the guest touch pages until it faults at one again and again. */
	do {
		before = READ_ONCE(*pages);
		TEST_ASSERT(before < NR_TOUCHED_PAGES, "expected a stuck guest, it is done");
		faults = vcpu_get_stat(toucher, "pf_taken");
		send_interrupt(&msi, interrupts);
		wait_for(READ_ONCE(*pages) != before ||
			 vcpu_get_stat(toucher, "pf_taken") >= faults + NR_STUCK_FAULTS);
	} while (READ_ONCE(*pages) != before);

	for (i = 0; i < NR_INTERRUPTS; i++)
		send_interrupt(&msi, interrupts);
	TEST_ASSERT(READ_ONCE(*pages) == before, "expected a stuck guest, it touched a page");
	TEST_ASSERT(!wait_for_change(0), "%s: complete, expected a wait for kvm->srcu", c.name);

	provide_page();
	TEST_ASSERT(wait_for_change(TIMEOUT_SECONDS * 1000), "%s: not complete", c.name);
	finish_access("interrupts", DATA_VALUE);
	join_thread(thread, "the vCPU that touches pages");
}
#endif

static void set_ioeventfds(int fd, uint32_t flags)
{
	struct kvm_ioeventfd args = { .len = 4, .fd = fd, .flags = flags };
	int i;

	for (i = 0; i < NR_IOEVENTFDS; i++) {
		args.addr = OTHER_GPA + i * args.len;
		vm_ioctl(vm, KVM_IOEVENTFD, &args);
	}
}

static int ioeventfd;

static void add_ioeventfds(void)
{
	set_ioeventfds(ioeventfd, 0);
}

TEST_F(latency, ioeventfd)
{
	uint64_t ns;
	struct change c = { "ioeventfd", add_ioeventfds, &ns };
	struct change create = { "create", create_other, &ns };

	TEST_REQUIRE(set_steal_time(DATA_GPA + STEAL_TIME_OFFSET));
	ioeventfd = eventfd(0, 0);
	TEST_ASSERT(ioeventfd >= 0, "eventfd(): errno %d", errno);

	drop_page();
	start_access();
	wait_for_fault();
	make_change(&c);
	/* The vCPU still holds kvm->srcu. */
	start_change(&create);
	TEST_ASSERT(!wait_for_change(NO_WAIT_MS), "create: complete, expected a wait");
	provide_page();
	TEST_ASSERT(wait_for_change(TIMEOUT_SECONDS * 1000), "create: not complete");
	finish_access("ioeventfd", DATA_VALUE);

	set_ioeventfds(ioeventfd, KVM_IOEVENTFD_FLAG_DEASSIGN);
	close(ioeventfd);
}

/*
 * On x86, pf_taken counts the faults.  On arm64, the guest exits for the fault and for
 * the ucall, and interrupts of the host add exits by chance: a few accesses are made,
 * and the one with the fewest exits counts.
 */
#ifdef __x86_64__
#define FAULT_STAT	"pf_taken"
#define NR_FAULTS	1
#else
#define FAULT_STAT	"exits"
#define NR_FAULTS	2
#endif
#define NR_ACCESSES	5

TEST_F(latency, once)
{
	uint64_t nr_faults, nr_page_ins, min_faults = UINT64_MAX;
	int i;

	/* Map what else the guest accesses. */
	make_access("first access");

	for (i = 0; i < NR_ACCESSES; i++) {
		nr_page_ins = vcpu_get_stat(vcpu, "page_in");
		nr_faults = vcpu_get_stat(vcpu, FAULT_STAT);
		make_access("once");
		nr_page_ins = vcpu_get_stat(vcpu, "page_in") - nr_page_ins;
		nr_faults = vcpu_get_stat(vcpu, FAULT_STAT) - nr_faults;
		TEST_ASSERT(nr_page_ins == 1, "expected page_in to increase by 1, got %lu",
			    nr_page_ins);
		if (nr_faults < min_faults)
			min_faults = nr_faults;
	}
	TEST_ASSERT(min_faults == NR_FAULTS,
		    "expected %s to increase by %d at least once in %d accesses, got %lu or more",
		    FAULT_STAT, NR_FAULTS, NR_ACCESSES, min_faults);
}

/* If the guest has accessed the page, take it away and start a new access. */
static bool restart_access(void)
{
	if (pthread_tryjoin_np(vcpu_thread, NULL))
		return false;

	TEST_ASSERT(guest_value == DATA_VALUE, "race: expected value %#llx, got %#lx",
		    DATA_VALUE, guest_value);
	drop_page();
	start_access();
	return true;
}

TEST_F(latency, race)
{
	struct pollfd p = { .fd = uffd, .events = POLLIN };
	uint64_t before, after, nr_page_ins = 0;
	int i, restarted, nr_restarts = 0;

	/* Open the statistics, which is not possible during KVM_RUN. */
	vcpu_get_stat(vcpu, "page_in");

	drop_page();
	start_access();
	for (i = 0; i < nr_rounds; i++) {
		while (poll(&p, 1, 1) == 0)
			nr_restarts += restart_access();
		wait_for_fault();
		before = vcpu_get_stat(vcpu, "page_in");
		provide_page();

		if (i == nr_rounds - 1)
			break;

		/*
		 * Take the page away as soon as it was faulted in, possibly before
		 * the guest accesses it.
		 */
		do {
			restarted = restart_access();
			after = vcpu_get_stat(vcpu, "page_in");
		} while (!restarted && after == before && poll(&p, 1, 0) == 0);
		nr_restarts += restarted;
		nr_page_ins += after - before;
		drop_page();
	}
	finish_access("race", DATA_VALUE);

	pr_info("%d pages provided, %lu page-ins without kvm->srcu, %d accesses in time\n",
		nr_rounds, nr_page_ins, nr_restarts);
}

TEST_F(latency, error)
{
	struct uffdio_range range = { .start = (uintptr_t)data, .len = page_size };

	drop_page();
	start_access();
	wait_for_fault();
	/* End the wait for the page, after access to it was revoked. */
	TEST_ASSERT(!mprotect(data, page_size, PROT_NONE), "mprotect(): errno %d", errno);
	TEST_ASSERT(!ioctl(uffd, UFFDIO_UNREGISTER, &range), "UFFDIO_UNREGISTER: errno %d", errno);
	join_thread(vcpu_thread, "error");
	TEST_ASSERT(run_errno == EFAULT, "error: expected errno %d, got %d", EFAULT, run_errno);
}

static void no_op(int sig)
{
}

static void test_signal(void)
{
	struct sigaction action = { .sa_handler = no_op };
	int i;

	sigaction(SIGUSR1, &action, NULL);
	drop_page();
	for (i = 0; i < nr_rounds; i++) {
		start_access();
		wait_for_fault();
		pthread_kill(vcpu_thread, SIGUSR1);
		join_thread(vcpu_thread, "KVM_RUN, after a signal");
		TEST_ASSERT(run_errno == EINTR, "round %d: expected errno %d, got %d", i, EINTR,
			    run_errno);
	}

	start_access();
	wait_for_fault();
	provide_page();
	finish_access("signal", DATA_VALUE);
}

TEST_F(latency, signal)
{
	test_signal();
}

TEST_F(backing, hugetlb_signal)
{
	test_hugetlb(test_signal);
}

/*
 * Measure how long it takes to create a slot.  The page arrives after PAGE_IN_MS
 * milliseconds, or earlier if the slot has been created by then.
 */
static void measure_creates(uint64_t ns[NR_PAGE_INS])
{
	struct change c = { "create", create_other };
	bool done;
	int i;

	for (i = 0; i < NR_PAGE_INS; i++) {
		c.ns = &ns[i];
		drop_page();
		start_access();
		wait_for_fault();
		start_change(&c);
		done = wait_for_change(PAGE_IN_MS);
		provide_page();
		TEST_ASSERT(done || wait_for_change(TIMEOUT_SECONDS * 1000),
			    "the slot was not created within %d s after the page arrived",
			    TIMEOUT_SECONDS);
		finish_access("measure", DATA_VALUE);
		delete_other();
	}
	qsort(ns, NR_PAGE_INS, sizeof(*ns), compare);
}

/*
 * Print the best of PERF_ROUNDS rounds: a wait in KVM occurs in each round, but
 * a delay caused by other load on the host does not.
 */
static void measure(void)
{
	uint64_t ns[NR_PAGE_INS], median = UINT64_MAX, longest = UINT64_MAX;
	int i;

	for (i = 0; i < PERF_ROUNDS; i++) {
		measure_creates(ns);
		median = min(median, ns[NR_PAGE_INS / 2]);
		longest = min(longest, ns[NR_PAGE_INS - 1]);
	}
	printf("perf: create_median ns %lu\n", median);
	printf("perf: create_max ns %lu\n", longest);
}

static void help(const char *name)
{
	printf("usage: %s [-h] [-i changes] [-p] [-r rounds] [case...]\n", name);
	printf(" -i: number of changes of each type while the vCPU waits, default 10\n");
	printf(" -p: measure instead of testing\n");
	printf(" -r: how often to provide a page and take it away, default 20\n");
	exit(0);
}

int main(int argc, char *argv[])
{
	bool perf = false;
	int opt;

	while ((opt = getopt(argc, argv, "hi:pr:")) != -1) {
		switch (opt) {
		case 'i':
			nr_changes = atoi(optarg);
			break;
		case 'p':
			perf = true;
			break;
		case 'r':
			nr_rounds = atoi(optarg);
			break;
		default:
			help(argv[0]);
		}
	}
	TEST_ASSERT(nr_changes > 0 && nr_rounds > 0, "-i and -r must be greater than 0");

	if (perf) {
		set_up();
		use_anonymous_data();
		measure();
		tear_down();
		return 0;
	}

	return run_cases(argv + optind);
}
