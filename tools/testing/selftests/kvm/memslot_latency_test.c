// SPDX-License-Identifier: GPL-2.0-only
/*
 * Change memslots while a vCPU waits for a page.
 *
 *  - wait: userfaultfd keeps a vCPU waiting for a page.  Slots that have
 *    nothing to do with it are created, deleted, split and merged meanwhile,
 *    with success before the page arrives.  Latencies are printed.
 *  - gone: the slot of the page that the vCPU waits for is deleted; the guest
 *    then finds no memory there, whatever becomes of the page.
 *  - unlucky: each time that the page has arrived, it is taken away before the
 *    guest can access it.  KVM brings it in outside of kvm->srcu so many times,
 *    then it holds on to it.  Faults on other pages of the guest, which are
 *    there, make no difference.
 *  - race: the page is taken away as soon as it has arrived, again and again,
 *    until it may stay; sometimes the guest is faster.
 *  - error: there is no page to be had; KVM_RUN fails with EFAULT.
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
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/sizes.h>
#include <linux/userfaultfd.h>

#include <test_util.h>
#include <kvm_util.h>
#include <processor.h>

/* Arbitrarily chosen, above what the library uses for itself. */
#define DATA_GPA		SZ_1G
#define OTHER_GPA		(SZ_1G + SZ_1M)
#define DATA_SLOT		100
#define OTHER_SLOT		101
#define OTHER_UPPER_SLOT	102
#define NR_OTHER_PAGES		4

/* KVM_PAGE_IN_ROUNDS */
#define NR_PAGE_INS_IN_VAIN	3

/* Goes up by so much, or more, when a fault on another page precedes the awaited one. */
#ifdef __x86_64__
#define FAULT_STAT		"pf_fixed"
#define MIN_FAULTS		1
#else
#define FAULT_STAT		"exits"
#define MIN_FAULTS		2
#endif

#define DATA_VALUE		0x600dull
#define NO_SLOT			0xdeadull

/*
 * Much longer than a change takes even on a slow machine; a change that is not
 * complete by then waits for the vCPU.
 */
#define TIMEOUT_SECONDS		20

/* What a page from afar may take, for the figures. */
#define PAGE_IN_MS		700
#define PERF_ROUNDS		3
#define NR_PAGE_INS		20

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpu;
static pthread_t vcpu_thread;
static size_t page_size;
static void *data, *other;
static int uffd;

/* What the vCPU's run came to. */
static uint64_t guest_value;
static int run_errno;
static bool mmio_exit;

static void guest_code(void)
{
	for (;;)
		GUEST_SYNC(READ_ONCE(*(uint64_t *)DATA_GPA));
}

/* One access of the guest. */
static void *vcpu_worker(void *unused)
{
	struct ucall uc;

	run_errno = 0;
	mmio_exit = false;
	for (;;) {
		/* The exit reason says nothing when there is no exit. */
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
	TEST_ASSERT(mmio_exit == (value == NO_SLOT), "%s: expected %sMMIO, got %s", what,
		    value == NO_SLOT ? "" : "no ", mmio_exit ? "it" : "none");
}

/* Wait until the vCPU waits for its page. */
static void wait_for_fault(void)
{
	struct pollfd p = { .fd = uffd, .events = POLLIN };
	struct uffd_msg msg;
	ssize_t n;

	do {
		poll(&p, 1, -1);
		n = read(uffd, &msg, sizeof(msg));
	} while (n < 0 && errno == EAGAIN);
	TEST_ASSERT(n == sizeof(msg), "read(uffd): expected %zu, got %zd, errno %d",
		    sizeof(msg), n, errno);
	TEST_ASSERT(msg.event == UFFD_EVENT_PAGEFAULT, "expected event %d, got %d",
		    UFFD_EVENT_PAGEFAULT, msg.event);
	TEST_ASSERT(msg.arg.pagefault.address == (uintptr_t)data,
		    "expected a fault at %p, got %#llx", data, msg.arg.pagefault.address);
}

static void provide_page(void)
{
	uint64_t *page = aligned_alloc(page_size, page_size);
	struct uffdio_copy copy = {
		.dst = (uintptr_t)data,
		.src = (uintptr_t)page,
		.len = page_size,
	};

	TEST_ASSERT(page, "aligned_alloc() failed");
	memset(page, 0, page_size);
	*page = DATA_VALUE;
	TEST_ASSERT(!ioctl(uffd, UFFDIO_COPY, &copy), "UFFDIO_COPY: errno %d", errno);
	free(page);
}

static void drop_page(void)
{
	TEST_ASSERT(!madvise(data, page_size, MADV_DONTNEED), "madvise(): errno %d", errno);
}

static void open_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { .start = (uintptr_t)data, .len = page_size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	/* poll() does not work on one that blocks. */
	uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	__TEST_REQUIRE(uffd >= 0, "no userfaultfd");
	TEST_ASSERT(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API: errno %d", errno);
	TEST_ASSERT(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER: errno %d", errno);
}

/*
 * Changes are made by a thread of their own, for the test to fail, not to hang,
 * if they have to wait for the vCPU.
 */
struct change {
	const char *name;
	void (*make)(void);
	uint64_t *ns;
};

static sem_t change_wanted, change_made;
static struct change *change;

static void *change_worker(void *unused)
{
	uint64_t start;

	for (;;) {
		while (sem_wait(&change_wanted))
			;
		if (!change)
			return NULL;
		start = now_ns();
		change->make();
		*change->ns = now_ns() - start;
		sem_post(&change_made);
	}
}

static void start_change(struct change *c)
{
	change = c;
	sem_post(&change_wanted);
}

/* Returns false if the change is still under way after so many milliseconds. */
static bool change_is_made(unsigned int ms)
{
	struct timespec t;
	int ret;

	clock_gettime(CLOCK_REALTIME, &t);
	t = timespec_add_ns(t, ms * 1000000ll);
	do {
		ret = sem_timedwait(&change_made, &t);
	} while (ret && errno == EINTR);
	return !ret;
}

static void make_change(struct change *c)
{
	start_change(c);
	TEST_ASSERT(change_is_made(TIMEOUT_SECONDS * 1000),
		    "%s: expected to be done while a vCPU waits for a page, is not after %d s",
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
	struct {
		struct kvm_userspace_memory_regions header;
		struct kvm_userspace_memory_region entries[2];
	} r = { .header.nent = 2, .entries = { a, b } };

	vm_ioctl(vm, KVM_SET_USER_MEMORY_REGIONS, &r.header);
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

static void test_wait(int nr_changes)
{
	struct change changes[] = {
		{ "create", create_other },
		{ "split", split_other },
		{ "merge", merge_other },
		{ "delete", delete_other },
	};
	bool has_transactions = kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS);
	uint64_t *ns[ARRAY_SIZE(changes)];
	int i, j;

	for (j = 0; j < ARRAY_SIZE(changes); j++) {
		ns[j] = calloc(nr_changes, sizeof(*ns[j]));
		TEST_ASSERT(ns[j], "calloc() failed");
	}

	drop_page();
	start_access();
	wait_for_fault();

	for (i = 0; i < nr_changes; i++) {
		for (j = 0; j < ARRAY_SIZE(changes); j++) {
			if (!has_transactions &&
			    (changes[j].make == split_other || changes[j].make == merge_other))
				continue;
			changes[j].ns = &ns[j][i];
			make_change(&changes[j]);
		}
	}

	provide_page();
	finish_access("wait", DATA_VALUE);

	for (j = 0; j < ARRAY_SIZE(changes); j++) {
		qsort(ns[j], nr_changes, sizeof(*ns[j]), compare);
		pr_info("%s: %lu us, median %lu us, at most %lu us\n", changes[j].name,
			ns[j][0] / 1000, ns[j][nr_changes / 2] / 1000,
			ns[j][nr_changes - 1] / 1000);
		free(ns[j]);
	}
}

static void test_gone(void)
{
	uint64_t ns;
	struct change c = { "delete the slot of the page", delete_data, &ns };

	drop_page();
	start_access();
	wait_for_fault();
	make_change(&c);
	provide_page();
	finish_access("gone", NO_SLOT);
	set_data_region(page_size);
}

/* An access that has to wait for the page, and gets it. */
static void make_access(const char *what)
{
	drop_page();
	start_access();
	wait_for_fault();
	provide_page();
	finish_access(what, DATA_VALUE);
}

static void do_nothing(int signal)
{
}

/*
 * Let KVM have the page, but not the guest: KVM_RUN ends, because of the signal,
 * before the guest is entered again.  The signal itself does not end the wait for
 * the page.
 */
static void make_access_in_vain(const char *what)
{
	TEST_ASSERT(!pthread_kill(vcpu_thread, SIGUSR1), "pthread_kill() failed");
	provide_page();
	join_thread(vcpu_thread, what);
	TEST_ASSERT(run_errno == EINTR, "%s: expected KVM_RUN to fail with errno %d, got %d",
		    what, EINTR, run_errno);
	drop_page();
}

/* Drop KVM's mappings of code, stack and page tables; the pages stay. */
static void unmap_guest(void)
{
	struct userspace_mem_region *region = memslot2region(vm, 0);
	size_t size = region->region.memory_size;

	TEST_ASSERT(!mprotect(region->host_mem, size, PROT_READ) &&
		    !mprotect(region->host_mem, size, PROT_READ | PROT_WRITE),
		    "mprotect(): errno %d", errno);
}

/*
 * With @unmap, the guest faults on its code, and KVM maps that, before it faults
 * on the page.
 */
static void test_unlucky(const char *what, int nr_rounds, bool unmap)
{
	uint64_t nr_faults, nr_page_ins;
	int i, expected;

	/* Opens the statistics, which has to be done outside of KVM_RUN. */
	vcpu_get_stat(vcpu, "page_in");

	/* What was in vain until now does not count. */
	make_access(what);
	drop_page();

	for (i = 0; i < nr_rounds; i++) {
		nr_faults = vcpu_get_stat(vcpu, FAULT_STAT);
		if (unmap)
			unmap_guest();
		start_access();
		wait_for_fault();
		nr_faults = vcpu_get_stat(vcpu, FAULT_STAT) - nr_faults;
		TEST_ASSERT(!unmap || nr_faults >= MIN_FAULTS,
			    "%s: round %d: expected %s to increase by %d, it did by %lu",
			    what, i, FAULT_STAT, MIN_FAULTS, nr_faults);

		nr_page_ins = vcpu_get_stat(vcpu, "page_in");
		make_access_in_vain(what);
		nr_page_ins = vcpu_get_stat(vcpu, "page_in") - nr_page_ins;

		/* So often outside of kvm->srcu, then once inside. */
		expected = i % (NR_PAGE_INS_IN_VAIN + 1) < NR_PAGE_INS_IN_VAIN;
		TEST_ASSERT(nr_page_ins == expected,
			    "%s: round %d: expected %d page-ins outside of kvm->srcu, got %lu",
			    what, i, expected, nr_page_ins);
	}

	make_access(what);
}

/* The guest made its access in spite of all; let it try again. */
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

static void test_race(int nr_rounds)
{
	struct pollfd p = { .fd = uffd, .events = POLLIN };
	uint64_t before, after, nr_page_ins = 0;
	int i, restarted, nr_restarts = 0;

	/* Opens the statistics, which has to be done outside of KVM_RUN. */
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
		 * Take the page away when it has been brought in, and hope that
		 * the guest has not got it yet.
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

	pr_info("%d pages provided, %lu outside of kvm->srcu, %d accesses too fast\n",
		nr_rounds, nr_page_ins, nr_restarts);
}

static void test_error(void)
{
	struct uffdio_range range = { .start = (uintptr_t)data, .len = page_size };

	drop_page();
	start_access();
	wait_for_fault();
	/* Let go of the fault; there is nothing any more that it may access. */
	TEST_ASSERT(!mprotect(data, page_size, PROT_NONE), "mprotect(): errno %d", errno);
	TEST_ASSERT(!ioctl(uffd, UFFDIO_UNREGISTER, &range), "UFFDIO_UNREGISTER: errno %d", errno);
	join_thread(vcpu_thread, "error");
	TEST_ASSERT(run_errno == EFAULT, "error: expected errno %d, got %d", EFAULT, run_errno);
}

/* How long a slot takes to be created; the page comes after 700 ms, or after that. */
static void measure_creates(uint64_t ns[NR_PAGE_INS])
{
	struct change c = { "create", create_other };
	bool made;
	int i;

	for (i = 0; i < NR_PAGE_INS; i++) {
		c.ns = &ns[i];
		drop_page();
		start_access();
		wait_for_fault();
		start_change(&c);
		made = change_is_made(PAGE_IN_MS);
		provide_page();
		TEST_ASSERT(made || change_is_made(TIMEOUT_SECONDS * 1000),
			    "expected the slot to be created once the page came, was not after %d s",
			    TIMEOUT_SECONDS);
		finish_access("measure", DATA_VALUE);
		delete_other();
	}
	qsort(ns, NR_PAGE_INS, sizeof(*ns), compare);
}

/* Best of some rounds: what KVM waits for is in each, what the host does is not. */
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
	printf("usage: %s [-h] [-i changes] [-p] [-r rounds]\n", name);
	printf(" -i: how many changes of each kind while the vCPU waits, default 10\n");
	printf(" -p: measure, do not test\n");
	printf(" -r: how often to provide a page and take it away, default 20\n");
	exit(0);
}

int main(int argc, char *argv[])
{
	int nr_changes = 10, nr_rounds = 20, opt, i;
	pthread_t change_thread;
	bool perf = false;

	setbuf(stdout, NULL);
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
	TEST_ASSERT(nr_changes > 0 && nr_rounds > 0, "expected numbers above 0");

	TEST_ASSERT(signal(SIGUSR1, do_nothing) != SIG_ERR, "signal(): errno %d", errno);
	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	ucall_init(vm, NULL);
	page_size = getpagesize();
	data = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	other = mmap(NULL, NR_OTHER_PAGES * page_size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(data != MAP_FAILED && other != MAP_FAILED, "mmap() failed: %d", errno);
	set_data_region(page_size);
	virt_map(vm, DATA_GPA, DATA_GPA, page_size / vm->page_size);
	open_uffd();

	TEST_ASSERT(!sem_init(&change_wanted, 0, 0) && !sem_init(&change_made, 0, 0),
		    "sem_init() failed");
	change_thread = start_thread(change_worker, NULL);

	if (perf) {
		measure();
	} else {
		/* More often than KVM brings in a page in vain. */
		for (i = 0; i < 5; i++)
			test_wait(nr_changes);
		test_gone();
		test_unlucky("unlucky", nr_rounds, false);
		test_unlucky("unlucky, code unmapped", nr_rounds, true);
		test_race(nr_rounds);
		test_error();
	}

	change = NULL;
	sem_post(&change_wanted);
	join_thread(change_thread, "changes");
	kvm_vm_free(vm);
	return 0;
}
