// SPDX-License-Identifier: GPL-2.0-only
/*
 * Races between the users of gfn_to_pfn_caches and MMU notifiers.
 *
 * The cache under test is that of Xen's shared_info page.  KVM writes to the page
 * when an event channel is raised: by an irqfd, in atomic context if the cache is
 * valid and otherwise in a worker that refreshes the cache; or by
 * KVM_XEN_HVM_EVTCHN_SEND, which refreshes the cache in the calling thread.
 *
 * Most cases hold an invalidation in an MMU notifier hook, with
 * /dev/test_mmu_gate (CONFIG_TEST_MMU_GATE), and check what KVM does in the
 * meantime.  They are skipped if the device does not exist.
 *
 * Each case runs in a process of its own.  The process creates its threads
 * before it closes the gate, because a thread that is stopped at the gate may hold
 * mmap_lock.
 */
#define _GNU_SOURCE /* for clone() */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asm/kvm_para.h>
#include <linux/sizes.h>

#include "disk.h"
#include "test_util.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "xen.h"

#include "../../../../../lib/test_mmu_gate_uapi.h"

/* Arbitrarily chosen. */
#define SLOT		10
#define BASE_GPA	0xc0000000ull
#define GSI		32
#define NR_IRQFDS	2

/* Pages of the slot. */
#define NR_PAGES	64
#define VCPU_INFO_PAGE	4
#define RUNSTATE_PAGE	8
#define CLOCK_PAGE	16
#define SHINFO_PAGE	32

/* More pages on each side of the page than KVM records ranges of at first. */
#define NR_SIDE		20
#define NR_THREADS	(2 * NR_SIDE + 1)

#define KVM_MIN_GPC_RECORDS	16
#define NR_OVERFLOW		4
#define NR_SENDERS		4
#define NR_SLEEPERS		8
#define NR_GATES		16

/* Arbitrarily chosen, in entries. */
#define DIRTY_RING_SIZE		1024

#define MPOL_MF_MOVE	2

/* The C library may not have it yet. */
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

#define FAILSLAB	"/sys/kernel/debug/failslab/"

static size_t page_size;
static size_t big_mib = 48;		/* a zap of more than 40 MiB frees in batches */
static unsigned int nr_rounds = 20;

/* State of the process that runs a case. */
static struct kvm_vm *vm;
static struct kvm_vcpu *vcpu;
static char *mem;
static int irqfds[NR_IRQFDS];
static bool has_gate;
static int gates[NR_GATES], nr_gates;

static struct thread {
	sem_t go;
	sem_t done;
	void (*fn)(struct thread *t);
	pid_t tid;
	unsigned int nr;
	unsigned int nr_pages;
} threads[NR_THREADS];

static struct kvm_vcpu *vcpu_by_id[NR_SLEEPERS];

/* Shared by all processes of a case. */
static struct shared {
	unsigned long begun;
	unsigned long done;
	bool stop;
} *sh;

/*
 * For use while a thread is stopped at a gate: TEST_ASSERT() forks to print a stack
 * trace, and fork() would wait for the mmap_lock that the thread may hold.
 */
#define WINDOW_ASSERT(cond, fmt...)	\
do {					\
	bool __ok = (cond);		\
					\
	if (!__ok)			\
		open_gates();		\
	TEST_ASSERT(__ok, fmt);		\
} while (0)

static void set(unsigned long *p, unsigned long val)
{
	__atomic_store_n(p, val, __ATOMIC_SEQ_CST);
}

static unsigned long get(unsigned long *p)
{
	return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

static void *page(unsigned int nr)
{
	return mem + nr * page_size;
}

static uint64_t page_gpa(unsigned int nr)
{
	return BASE_GPA + nr * page_size;
}

static unsigned long *pending(unsigned int nr)
{
	return page(nr) + XEN_SHINFO_PENDING;
}

static unsigned long shinfo_pending(void)
{
	return get(pending(SHINFO_PAGE));
}

static void open_gates(void)
{
	int i;

	for (i = 0; i < nr_gates; i++)
		ioctl(gates[i], MMU_GATE_OPEN);
}

static void drop(unsigned int nr, size_t size)
{
	int ret = madvise(page(nr), size, MADV_DONTNEED);

	TEST_ASSERT(!ret, "madvise(MADV_DONTNEED): %s", strerror(errno));
}

static int __set_shinfo(uint64_t gfn)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = gfn,
	};

	return xen_set_vm_attr(vm, attr);
}

static void set_shinfo(unsigned int nr)
{
	int ret = __set_shinfo(page_gpa(nr) / page_size);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_XEN_HVM_SET_ATTR, ret));
}

static int send_event(unsigned int port)
{
	return -xen_send_event(vm, port, 0, KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL);
}

static void expect_send(unsigned int port, int expected)
{
	int ret = send_event(port);

	WINDOW_ASSERT(ret == expected, "KVM_XEN_HVM_EVTCHN_SEND: expected %d, got %d",
		      expected, ret);
}

/* Raise port @i + 1. */
static void signal_irqfd(unsigned int i)
{
	uint64_t one = 1;

	TEST_ASSERT(write(irqfds[i], &one, sizeof(one)) == sizeof(one),
		    "write(eventfd): %s", strerror(errno));
}

static void *thread_fn(void *arg)
{
	struct thread *t = arg;

	t->tid = syscall(SYS_gettid);
	for (;;) {
		sem_wait(&t->go);
		t->fn(t);
		sem_post(&t->done);
	}
	return NULL;
}

static void create_threads(void)
{
	unsigned int i;

	for (i = 0; i < NR_THREADS; i++) {
		sem_init(&threads[i].go, 0, 0);
		sem_init(&threads[i].done, 0, 0);
		start_thread(thread_fn, &threads[i]);
	}
}

static void start(struct thread *t, void (*fn)(struct thread *t))
{
	t->fn = fn;
	sem_post(&t->go);
}

static void join(struct thread *t)
{
	while (sem_wait(&t->done))
		;
}

static void guest_code(void)
{
	for (;;)
		GUEST_SYNC(0);
}

static void set_vcpu_attr(uint16_t type, uint64_t gpa)
{
	struct kvm_xen_vcpu_attr attr = { .type = type, .u.gpa = gpa };

	vcpu_ioctl(vcpu, KVM_XEN_VCPU_SET_ATTR, &attr);
}

/* Let KVM write a new time to all clocks when the vCPU runs next. */
static void set_clock(void)
{
	struct kvm_clock_data clock = {};

	vm_ioctl(vm, KVM_SET_CLOCK, &clock);
}

static void map_slot(size_t size)
{
	vm_set_user_memory_region(vm, SLOT, 0, BASE_GPA, size, mem);
}

/* A VM with a slot of @nr_pages, vcpu_info and NR_IRQFDS event channels. */
static void __create_vm(size_t nr_pages, bool dirty_ring)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
		.msr = XEN_HYPERCALL_MSR,
	};
	struct kvm_xen_hvm_attr lm = {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE,
		.u.long_mode = 1,
	};
	struct {
		struct kvm_irq_routing info;
		struct kvm_irq_routing_entry entries[NR_IRQFDS];
	} routes = { .info.nr = NR_IRQFDS };
	unsigned int i;

	create_threads();
	vm = vm_create(1);
	if (dirty_ring)
		vm_enable_dirty_ring(vm, DIRTY_RING_SIZE * sizeof(struct kvm_dirty_gfn));
	vcpu = vm_vcpu_add(vm, 0, guest_code);
	/* The first read of a statistic allocates memory; do that now. */
	if (has_gate)
		vm_get_stat(vm, "pfncache_wait");

	mem = mmap(NULL, nr_pages * page_size + SZ_2M, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap(): %s", strerror(errno));
	mem = (void *)(((uintptr_t)mem + SZ_2M - 1) & -(uintptr_t)SZ_2M);
	memset(mem, 0, nr_pages * page_size);
	map_slot(nr_pages * page_size);

	vm_ioctl(vm, KVM_XEN_HVM_CONFIG, &config);
	vm_ioctl(vm, KVM_XEN_HVM_SET_ATTR, &lm);
	set_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, page_gpa(VCPU_INFO_PAGE));

	for (i = 0; i < NR_IRQFDS; i++) {
		routes.entries[i].gsi = GSI + i;
		routes.entries[i].type = KVM_IRQ_ROUTING_XEN_EVTCHN;
		routes.entries[i].u.xen_evtchn.port = i + 1;
		routes.entries[i].u.xen_evtchn.vcpu = vcpu->id;
		routes.entries[i].u.xen_evtchn.priority =
			KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
	}
	vm_ioctl(vm, KVM_SET_GSI_ROUTING, &routes.info);

	for (i = 0; i < NR_IRQFDS; i++)
		kvm_irqfd(vm, GSI + i, irqfds[i], 0);
}

static void create_vm(size_t nr_pages)
{
	__create_vm(nr_pages, false);
}

static int open_gate(void)
{
	int fd = open_path_or_exit("/dev/test_mmu_gate", O_RDWR | O_CLOEXEC);

	TEST_ASSERT(nr_gates < NR_GATES, "more than %d gates", NR_GATES);
	gates[nr_gates++] = fd;
	return fd;
}

static void attach_gate(int gate)
{
	TEST_ASSERT(!ioctl(gate, MMU_GATE_ATTACH), "MMU_GATE_ATTACH: %s", strerror(errno));
}

static int open_attached_gate(void)
{
	int gate = open_gate();

	attach_gate(gate);
	return gate;
}

static void close_gate(int gate, unsigned int nr, unsigned int nr_pages, uint32_t flags)
{
	struct mmu_gate_close close = {
		.start = (unsigned long)page(nr),
		.end = (unsigned long)page(nr + nr_pages),
		.flags = flags,
	};

	TEST_ASSERT(!ioctl(gate, MMU_GATE_CLOSE, &close), "MMU_GATE_CLOSE: %s",
		    strerror(errno));
}

/* Wait until at least @count threads are stopped at the gate. */
static void wait_gate(int gate, unsigned int count)
{
	struct mmu_gate_wait wait = { .count = count, .timeout_ms = 1000 * 1000 };

	TEST_ASSERT(!ioctl(gate, MMU_GATE_WAIT, &wait),
		    "MMU_GATE_WAIT for %u threads: %s", count, strerror(errno));
}

static void open_for_all(int gate)
{
	TEST_ASSERT(!ioctl(gate, MMU_GATE_OPEN), "MMU_GATE_OPEN: %s", strerror(errno));
}

static void dropper_fn(struct thread *t)
{
	drop(t->nr, t->nr_pages * page_size);
}

static void start_dropper(struct thread *t, unsigned int nr, unsigned int nr_pages)
{
	t->nr = nr;
	t->nr_pages = nr_pages;
	start(t, dropper_fn);
}

/* Raise port 3.  Set sh->begun before the ioctl, and sh->done after it. */
static void sender_fn(struct thread *t)
{
	int ret;

	set(&sh->begun, 1);
	ret = send_event(3);
	set(&sh->done, 1);
	TEST_ASSERT(!ret, "KVM_XEN_HVM_EVTCHN_SEND: expected 0, got %d", ret);
}

static void activator_fn(struct thread *t)
{
	set(&sh->begun, 1);
	set_shinfo(SHINFO_PAGE);
	set(&sh->done, 1);
}

/* Return when the thread is waiting for an invalidation. */
static void start_waiter(struct thread *t, void (*fn)(struct thread *t))
{
	uint64_t waits = vm_get_stat(vm, "pfncache_wait");

	set(&sh->begun, 0);
	set(&sh->done, 0);
	start(t, fn);
	wait_for(get(&sh->begun) &&
		 (vm_get_stat(vm, "pfncache_wait") > waits || get(&sh->done)));
	WINDOW_ASSERT(!get(&sh->done),
		      "refresh expected to wait for the invalidation of its page, it did not");
}

static pid_t start_process(void)
{
	pid_t pid;

	fflush(stdout);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork(): %s", strerror(errno));
	/* Do not outlive a case that fails. */
	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static void end_process(pid_t pid)
{
	int status;

	TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid(): %s", strerror(errno));
	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
		    "process ended with status %#x, expected 0", status);
}

static void pin_task(pid_t tid, int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	TEST_ASSERT(!sched_setaffinity(tid, sizeof(cpus), &cpus), "sched_setaffinity(): %s",
		    strerror(errno));
}

static void pin(int cpu)
{
	pin_task(0, cpu);
}

/* Fresh memory is zero, unless KVM writes to a page that it must not use any more. */
static void *alloc_fresh(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	TEST_ASSERT(p != MAP_FAILED, "mmap(): %s", strerror(errno));
	return p;
}

static void check_fresh(unsigned long *p, size_t size)
{
	size_t i;

	for (i = 0; i < size / sizeof(*p); i++)
		TEST_ASSERT(!get(&p[i]),
			    "KVM wrote %#lx, at offset %#lx, to a page that had been freed",
			    p[i], i * sizeof(*p) % page_size);
}

static void write_file(const char *path, const char *text)
{
	TEST_ASSERT(write_text(path, text), "write \"%s\" to %s: %s", text, path,
		    strerror(errno));
}

static void read_text(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY);
	ssize_t ret = read(fd, buf, size - 1);

	TEST_ASSERT(ret > 0, "read %s: %s", path, strerror(errno));
	buf[ret] = 0;
	close(fd);
}

/* Each case and each measurement begins with this, in a process of its own. */
static void set_up(void)
{
	int i;

	prctl(PR_SET_CHILD_SUBREAPER, 1);
	sh = mmap(NULL, sizeof(*sh), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		  -1, 0);
	TEST_ASSERT(sh != MAP_FAILED, "mmap(): %s", strerror(errno));
	for (i = 0; i < NR_IRQFDS; i++) {
		irqfds[i] = eventfd(0, EFD_NONBLOCK);
		TEST_ASSERT(irqfds[i] >= 0, "eventfd(): %s", strerror(errno));
	}
}

static void tear_down(void)
{
	if (vm)
		kvm_vm_free(vm);
}

FIXTURE(pfncache) {
};

FIXTURE_SETUP(pfncache)
{
	set_up();
}

FIXTURE_TEARDOWN(pfncache)
{
	tear_down();
}

/* For cases that stop invalidations at a gate */
FIXTURE(gate) {
};

FIXTURE_SETUP(gate)
{
	__TEST_REQUIRE(has_gate, "needs CONFIG_TEST_MMU_GATE");
	set_up();
}

FIXTURE_TEARDOWN(gate)
{
	tear_down();
}

/*
 * The page is the first one of a range that is so large that its pages are freed
 * before the invalidation ends.  Another process allocates them.
 */
TEST_F(gate, large_range)
{
	size_t nr_pages = SHINFO_PAGE + (big_mib << 20) / page_size;
	size_t size = (big_mib << 20) * 5 / 4;
	int gate = open_gate();
	unsigned long *fresh;
	pid_t other;

	create_vm(nr_pages);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	other = start_process();
	if (!other) {
		wait_gate(gate, 1);
		/* The page is free: a write is detected by KASAN. */
		signal_irqfd(0);
		fresh = alloc_fresh(size);
		/* The page may be allocated: a write is detected by check_fresh(). */
		signal_irqfd(1);
		open_for_all(gate);
		check_fresh(fresh, size);
		exit(0);
	}

	/* Undo the sharing of the page by fork(): the write copies it. */
	*pending(SHINFO_PAGE) = 0;
	expect_send(4, 0);

	close_gate(gate, SHINFO_PAGE, nr_pages - SHINFO_PAGE, MMU_GATE_END);
	drop(SHINFO_PAGE, (nr_pages - SHINFO_PAGE) * page_size);
	end_process(other);

	/* The events are delivered to the new page. */
	wait_for(shinfo_pending() == 0x6);
}

/* The child does not see what KVM writes while fork() copies the page tables. */
TEST_F(gate, fork)
{
	int gate = open_gate();
	pid_t child, other;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	other = start_process();
	if (!other) {
		wait_gate(gate, 1);
		signal_irqfd(0);
		open_for_all(gate);
		exit(0);
	}
	*pending(SHINFO_PAGE) = 0;
	expect_send(4, 0);
	close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);

	child = start_process();
	if (!child) {
		TEST_ASSERT(shinfo_pending() == 0x10,
			    "child of fork() expected 0x10 pending, got %#lx",
			    shinfo_pending());
		exit(0);
	}
	end_process(child);
	end_process(other);
	wait_for(shinfo_pending() == 0x12);
}

/* A cache that is being activated cannot become valid during an invalidation. */
TEST_F(gate, activate)
{
	int gate = open_gate();

	create_vm(NR_PAGES);
	attach_gate(gate);

	close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[1], SHINFO_PAGE, 1);
	wait_gate(gate, 1);

	start_waiter(&threads[0], activator_fn);
	open_for_all(gate);
	join(&threads[0]);
	join(&threads[1]);

	expect_send(5, 0);
	TEST_ASSERT(shinfo_pending() == 0x20, "expected 0x20 pending, got %#lx",
		    shinfo_pending());
}

/*
 * KVM's start hook has run, and the page tables have not changed yet.  A refresh
 * that did not wait would map the old page.
 */
TEST_F(gate, before_zap)
{
	int gate = open_attached_gate();	/* registered before KVM's notifier */

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	expect_send(4, 0);

	close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_START);
	start_dropper(&threads[1], SHINFO_PAGE, 1);
	wait_gate(gate, 1);

	start_waiter(&threads[0], sender_fn);
	WINDOW_ASSERT(shinfo_pending() == 0x10, "expected 0x10 pending, got %#lx",
		      shinfo_pending());
	open_for_all(gate);
	join(&threads[0]);
	join(&threads[1]);

	WINDOW_ASSERT(shinfo_pending() == 0x8, "expected 0x8 pending, got %#lx",
		      shinfo_pending());
}

/*
 * The same with a page outside of all memslots, directly after the slot, stopped in the
 * start hook and in the end hook
 */
TEST_F(gate, hva)
{
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA };
	int gate[2] = { open_attached_gate(), open_gate() };
	unsigned long *word;
	unsigned int i;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA);
	create_vm(NR_PAGES);
	attach_gate(gate[1]);
	word = pending(NR_PAGES);
	attr.u.shared_info.hva = (unsigned long)page(NR_PAGES);
	vm_ioctl(vm, KVM_XEN_HVM_SET_ATTR, &attr);

	for (i = 0; i < 2; i++) {
		set(word, 0);
		expect_send(4, 0);
		close_gate(gate[i], NR_PAGES, 1, i ? MMU_GATE_END : MMU_GATE_START);
		start_dropper(&threads[1], NR_PAGES, 1);
		wait_gate(gate[i], 1);

		start_waiter(&threads[0], sender_fn);
		/* In the start hook, the page is still mapped, so this read does not fault. */
		WINDOW_ASSERT(i || get(word) == 0x10, "expected 0x10 pending, got %#lx", get(word));
		open_for_all(gate[i]);
		join(&threads[0]);
		join(&threads[1]);
		TEST_ASSERT(get(word) == 0x8, "expected 0x8 pending, got %#lx", get(word));
	}
}

/* A refresh does not wait for invalidations on both sides of its page. */
TEST_F(gate, neighbours)
{
	int gate = open_gate();
	uint64_t retries, waits;
	unsigned int i;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	close_gate(gate, SHINFO_PAGE - 1, 1, MMU_GATE_END);
	start_dropper(&threads[1], SHINFO_PAGE - 1, 1);
	wait_gate(gate, 1);
	close_gate(gate, SHINFO_PAGE + 1, 1, MMU_GATE_END);
	start_dropper(&threads[2], SHINFO_PAGE + 1, 1);
	wait_gate(gate, 2);

	retries = vm_get_stat(vm, "pfncache_retry");
	waits = vm_get_stat(vm, "pfncache_wait");
	for (i = 0; i < nr_rounds; i++) {
		drop(SHINFO_PAGE, page_size);
		expect_send(5, 0);
		WINDOW_ASSERT(shinfo_pending() == 0x20, "expected 0x20 pending, got %#lx",
			      shinfo_pending());
	}
	retries = vm_get_stat(vm, "pfncache_retry") - retries;
	waits = vm_get_stat(vm, "pfncache_wait") - waits;
	WINDOW_ASSERT(!retries && !waits, "expected no retry and no wait, got %lu and %lu",
		      retries, waits);

	open_for_all(gate);
	join(&threads[1]);
	join(&threads[2]);
}

/* Whether the task is in an ioctl and off the CPU, that is, really asleep. */
static bool is_asleep(struct thread *t)
{
	return task_sleeps_in_ioctl(t->tid);
}

/*
 * One invalidation of the page has ended and another one has not.  Each end wakes all
 * refreshes of pages in its range, so one that is asleep now has checked again since
 * the end.  The time of a wait is counted when the wait is over: it must not be
 * counted yet.
 */
static void expect_waits_on(struct thread *t, uint64_t waited_ns)
{
	unsigned long done;
	uint64_t ns;

	wait_for(get(&sh->done) || is_asleep(t));
	done = get(&sh->done);
	ns = vm_get_stat(vm, "pfncache_wait_ns") - waited_ns;
	WINDOW_ASSERT(!done && !ns,
		      "refresh expected to wait for the other invalidation, waited %lu ns only",
		      ns);
}

/*
 * The ranges of two invalidations overlap at the page, and either of them ends
 * first.  Then two invalidations have the same range.
 */
static void expect_overlap(int gate[2])
{
	uint64_t waited_ns;
	unsigned int i;

	for (i = 0; i < 2; i++) {
		close_gate(gate[0], SHINFO_PAGE - 1, 1, MMU_GATE_END);
		close_gate(gate[1], SHINFO_PAGE + 1, 1, MMU_GATE_END);
		start_dropper(&threads[1], SHINFO_PAGE - 1, 2);
		start_dropper(&threads[2], SHINFO_PAGE, 2);
		wait_gate(gate[0], 1);
		wait_gate(gate[1], 1);

		waited_ns = vm_get_stat(vm, "pfncache_wait_ns");
		start_waiter(&threads[0], sender_fn);
		open_for_all(gate[i]);
		join(&threads[1 + i]);
		expect_waits_on(&threads[0], waited_ns);
		open_for_all(gate[!i]);
		join(&threads[1 + !i]);
		join(&threads[0]);
	}

	/* The first one is stopped at both gates, one after the other. */
	close_gate(gate[1], SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[1], SHINFO_PAGE, 1);
	wait_gate(gate[1], 1);
	close_gate(gate[0], SHINFO_PAGE, 1, MMU_GATE_END);
	open_for_all(gate[1]);
	wait_gate(gate[0], 1);
	close_gate(gate[1], SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[2], SHINFO_PAGE, 1);
	wait_gate(gate[1], 1);

	waited_ns = vm_get_stat(vm, "pfncache_wait_ns");
	start_waiter(&threads[0], sender_fn);
	open_for_all(gate[0]);
	join(&threads[1]);
	expect_waits_on(&threads[0], waited_ns);
	open_for_all(gate[1]);
	join(&threads[2]);
	join(&threads[0]);
	TEST_ASSERT(vm_get_stat(vm, "pfncache_wait_ns") > waited_ns,
		    "expected pfncache_wait_ns to grow, still %lu", waited_ns);
}

TEST_F(gate, overlap)
{
	int gate[2] = { open_gate(), open_gate() };

	create_vm(NR_PAGES);
	attach_gate(gate[0]);
	attach_gate(gate[1]);
	set_shinfo(SHINFO_PAGE);

	expect_overlap(gate);
}

/* Fail if a send that needs a refresh waits for an invalidation. */
static void expect_no_wait(void)
{
	uint64_t waits = vm_get_stat(vm, "pfncache_wait");

	drop(SHINFO_PAGE, page_size);
	set(&sh->done, 0);
	start(&threads[0], sender_fn);
	wait_for(get(&sh->done) || vm_get_stat(vm, "pfncache_wait") > waits);
	waits = vm_get_stat(vm, "pfncache_wait") - waits;
	WINDOW_ASSERT(!waits, "refresh expected not to wait for other pages, it did");
	join(&threads[0]);
	WINDOW_ASSERT(shinfo_pending() == 0x8, "expected 0x8 pending, got %#lx",
		      shinfo_pending());
}

static unsigned int first_page(bool above)
{
	return above ? SHINFO_PAGE + 1 : SHINFO_PAGE - NR_SIDE;
}

/* Stop NR_SIDE invalidations on one side of the page. */
static void stop_side(int gate, bool above)
{
	unsigned int i;

	close_gate(gate, first_page(above), NR_SIDE, MMU_GATE_END);
	for (i = 0; i < NR_SIDE; i++)
		start_dropper(&threads[1 + above * NR_SIDE + i], first_page(above) + i, 1);
	wait_gate(gate, NR_SIDE);
}

static void end_side(int gate, bool above)
{
	unsigned int i;

	open_for_all(gate);
	for (i = 0; i < NR_SIDE; i++)
		join(&threads[1 + above * NR_SIDE + i]);
}

/*
 * There are always invalidations in flight on at least one side of the page, more than
 * there is room for at first.
 */
TEST_F(gate, many)
{
	int gate[2] = { open_gate(), open_gate() };
	uint64_t overflows;
	unsigned int i;

	create_vm(NR_PAGES);
	attach_gate(gate[0]);
	attach_gate(gate[1]);
	set_shinfo(SHINFO_PAGE);
	overflows = vm_get_stat(vm, "pfncache_overflow");

	stop_side(gate[0], false);
	stop_side(gate[1], true);
	for (i = 0; i < nr_rounds; i++) {
		expect_no_wait();
		end_side(gate[i % 2], i % 2);
		stop_side(gate[i % 2], i % 2);
	}
	end_side(gate[0], false);
	end_side(gate[1], true);

	overflows = vm_get_stat(vm, "pfncache_overflow") - overflows;
	TEST_ASSERT(!overflows, "expected no overflow, got %lu", overflows);
}

/* Allocations that must not sleep fail. */
static void failing_dropper_fn(struct thread *t)
{
	write_file("/proc/thread-self/make-it-fail", "1");
	dropper_fn(t);
	write_file("/proc/thread-self/make-it-fail", "0");
}

static void start_failing_dropper(struct thread *t, unsigned int nr)
{
	t->nr = nr;
	t->nr_pages = 1;
	start(t, failing_dropper_fn);
}

/*
 * Two ranges on both sides of the page are merged.  An invalidation of the same range as
 * one of them, which has a record of its own, does not keep the merged range alive.
 */
static void expect_own_records(void)
{
	int fill = open_attached_gate(), spare = open_attached_gate();
	int merged = open_attached_gate(), again = open_attached_gate();
	uint64_t overflows = vm_get_stat(vm, "pfncache_overflow");
	unsigned int i, n = 0;

	/* Use all records, such that two of them can be released separately. */
	close_gate(fill, first_page(false) + 2, KVM_MIN_GPC_RECORDS - 2, MMU_GATE_END);
	close_gate(spare, first_page(false), 2, MMU_GATE_END);
	for (i = 0; i < KVM_MIN_GPC_RECORDS; i++)
		start_dropper(&threads[1 + n++], first_page(false) + i, 1);
	wait_gate(fill, KVM_MIN_GPC_RECORDS - 2);
	wait_gate(spare, 2);

	close_gate(merged, SHINFO_PAGE - 1, 3, MMU_GATE_END);
	start_failing_dropper(&threads[1 + n++], SHINFO_PAGE - 1);
	start_failing_dropper(&threads[1 + n++], SHINFO_PAGE + 1);
	wait_gate(merged, 2);
	overflows = vm_get_stat(vm, "pfncache_overflow") - overflows;
	WINDOW_ASSERT(overflows == 2, "expected 2 overflows, got %lu", overflows);

	open_for_all(spare);
	join(&threads[1]);
	join(&threads[2]);
	close_gate(again, SHINFO_PAGE - 1, 1, MMU_GATE_END);
	start_dropper(&threads[1 + n++], SHINFO_PAGE - 1, 1);
	wait_gate(again, 1);

	open_for_all(merged);
	join(&threads[1 + KVM_MIN_GPC_RECORDS]);
	join(&threads[2 + KVM_MIN_GPC_RECORDS]);
	expect_no_wait();

	open_for_all(fill);
	open_for_all(again);
	for (i = 2; i < KVM_MIN_GPC_RECORDS; i++)
		join(&threads[1 + i]);
	join(&threads[n]);
}

/*
 * The page is in the first of two ranges that are merged.  A refresh waits until the last one
 * has ended.
 */
static void expect_merged(bool above)
{
	int fill = open_attached_gate(), first = open_attached_gate();
	int last = open_attached_gate();
	uint64_t overflows, waited_ns;
	unsigned int i, n = 0;

	close_gate(fill, first_page(false), KVM_MIN_GPC_RECORDS, MMU_GATE_END);
	for (i = 0; i < KVM_MIN_GPC_RECORDS; i++)
		start_dropper(&threads[1 + n++], first_page(false) + i, 1);
	wait_gate(fill, n);

	overflows = vm_get_stat(vm, "pfncache_overflow");
	close_gate(first, SHINFO_PAGE, 1, MMU_GATE_END);
	start_failing_dropper(&threads[1 + n++], SHINFO_PAGE);
	wait_gate(first, 1);
	close_gate(last, first_page(above) + KVM_MIN_GPC_RECORDS, 1, MMU_GATE_END);
	start_failing_dropper(&threads[1 + n++], first_page(above) + KVM_MIN_GPC_RECORDS);
	wait_gate(last, 1);
	overflows = vm_get_stat(vm, "pfncache_overflow") - overflows;
	WINDOW_ASSERT(overflows == 2, "expected 2 overflows, got %lu", overflows);

	/* Otherwise, another invalidation of this process would enlarge the array of records. */
	open_for_all(fill);
	for (i = 0; i < KVM_MIN_GPC_RECORDS; i++)
		join(&threads[1 + i]);

	waited_ns = vm_get_stat(vm, "pfncache_wait_ns");
	start_waiter(&threads[0], sender_fn);
	open_for_all(first);
	join(&threads[n - 1]);
	expect_waits_on(&threads[0], waited_ns);
	open_for_all(last);
	join(&threads[n]);
	join(&threads[0]);
}

/* Ranges for which KVM cannot allocate memory are merged. */
TEST_F(gate, overflow)
{
	uint64_t overflows, waits;
	unsigned int i, n = 0;
	int gate;

	__TEST_REQUIRE(!access("/proc/thread-self/make-it-fail", W_OK) &&
		       write_setting(FAILSLAB "task-filter", "Y") &&
		       write_setting(FAILSLAB "verbose", "0") &&
		       write_setting(FAILSLAB "times", "-1") &&
		       write_setting(FAILSLAB "probability", "100"),
		       "needs a kernel with FAILSLAB");

	gate = open_gate();
	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	expect_own_records();
	expect_merged(false);
	expect_merged(true);

	overflows = vm_get_stat(vm, "pfncache_overflow");
	close_gate(gate, first_page(false), NR_SIDE + 1, MMU_GATE_END);
	for (i = 0; i < KVM_MIN_GPC_RECORDS + NR_OVERFLOW; i++) {
		start_failing_dropper(&threads[1 + n], first_page(false) + i);
		wait_gate(gate, ++n);
	}
	overflows = vm_get_stat(vm, "pfncache_overflow") - overflows;
	WINDOW_ASSERT(overflows == NR_OVERFLOW, "expected %d overflows, got %lu",
		      NR_OVERFLOW, overflows);

	/* None of them contains the page. */
	waits = vm_get_stat(vm, "pfncache_wait");
	set_shinfo(SHINFO_PAGE + 1);
	set_shinfo(SHINFO_PAGE);
	waits = vm_get_stat(vm, "pfncache_wait") - waits;
	WINDOW_ASSERT(!waits, "expected no wait, got %lu", waits);

	/* This one does, and cannot be recorded either. */
	start_failing_dropper(&threads[1 + n], SHINFO_PAGE);
	wait_gate(gate, ++n);
	start_waiter(&threads[0], sender_fn);

	/* From now on, there is memory. */
	overflows = vm_get_stat(vm, "pfncache_overflow");
	start_dropper(&threads[1 + n], first_page(false), 1);
	wait_gate(gate, ++n);
	overflows = vm_get_stat(vm, "pfncache_overflow") - overflows;
	WINDOW_ASSERT(!overflows, "expected no more overflow, got %lu", overflows);

	open_for_all(gate);
	join(&threads[0]);
	while (n)
		join(&threads[n--]);

	/* No record is left. */
	drop(0, NR_PAGES * page_size);
	expect_no_wait();
}

/*
 * A refresh that waits for long sleeps, and is woken.  In the second round, it has a
 * real-time policy, and shares its CPU with the thread that it waits for.
 */
TEST_F(gate, sleep)
{
	struct sched_param param = { .sched_priority = 1 };
	int gate = open_gate();
	uint64_t sleeps;
	int i;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	for (i = 0; i < 2; i++) {
		if (i) {
			pin_task(threads[0].tid, 0);
			pin_task(threads[1].tid, 0);
			TEST_ASSERT(!sched_setscheduler(threads[0].tid, SCHED_FIFO, &param),
				    "sched_setscheduler(): %s", strerror(errno));
		}
		sleeps = vm_get_stat(vm, "pfncache_sleep");
		close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
		start_dropper(&threads[1], SHINFO_PAGE, 1);
		wait_gate(gate, 1);
		start_waiter(&threads[0], sender_fn);
		wait_for(is_asleep(&threads[0]));
		open_for_all(gate);
		join(&threads[0]);
		join(&threads[1]);
		sleeps = vm_get_stat(vm, "pfncache_sleep") - sleeps;
		TEST_ASSERT(sleeps == 1, "round %d: expected 1 sleep, got %lu", i, sleeps);
	}
}

/*
 * Several refreshes of a cache wait for the same invalidation: one maps the page.
 * The senders must not share a lock that they take before the refresh.
 */
TEST_F(gate, contended)
{
	static const char * const names[] = { "pfncache_refresh", "pfncache_refresh_valid" };
	static const uint64_t expected[] = { 1, NR_SENDERS - 1 };
	uint64_t count[ARRAY_SIZE(names)];
	int gate = open_gate();
	unsigned int i;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[0], SHINFO_PAGE, 1);
	wait_gate(gate, 1);

	for (i = 0; i < ARRAY_SIZE(names); i++)
		count[i] = vm_get_stat(vm, names[i]);
	for (i = 0; i < NR_SENDERS; i++) {
		start(&threads[1 + i], sender_fn);
		wait_for(is_asleep(&threads[1 + i]));
	}
	open_for_all(gate);
	for (i = 0; i <= NR_SENDERS; i++)
		join(&threads[i]);

	for (i = 0; i < ARRAY_SIZE(names); i++) {
		count[i] = vm_get_stat(vm, names[i]) - count[i];
		TEST_ASSERT(count[i] == expected[i], "%s: expected %lu more, got %lu", names[i],
			    expected[i], count[i]);
	}
	TEST_ASSERT(shinfo_pending() == 0x8, "expected 0x8 pending, got %#lx",
		    shinfo_pending());
}

static int clone_fn(void *arg)
{
	madvise(page(SHINFO_PAGE), page_size, MADV_DONTNEED);
	return 0;
}

/* A thread that waits for an invalidation can be killed. */
TEST_F(gate, kill)
{
	int gate = open_gate();
	char *stack = alloc_fresh(16 * page_size);
	siginfo_t info;
	pid_t victim;
	int status;

	victim = start_process();
	if (!victim) {
		create_vm(NR_PAGES);
		attach_gate(gate);
		set_shinfo(SHINFO_PAGE);

		/* Another process, which survives the SIGKILL, shares the mm. */
		close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
		TEST_ASSERT(clone(clone_fn, stack + 16 * page_size,
				  CLONE_VM | CLONE_PARENT | SIGCHLD, NULL) > 0,
			    "clone(): %s", strerror(errno));
		wait_gate(gate, 1);
		start_waiter(&threads[0], sender_fn);
		raise(SIGKILL);
	}

	/* The victim ends while the invalidation is still held. */
	TEST_ASSERT(!waitid(P_PID, victim, &info, WEXITED), "waitid(): %s",
		    strerror(errno));
	TEST_ASSERT(info.si_code == CLD_KILLED && info.si_status == SIGKILL,
		    "victim expected to be killed, si_code %d status %d",
		    info.si_code, info.si_status);
	wait_gate(gate, 1);
	open_for_all(gate);
	TEST_ASSERT(wait(&status) > 0, "wait(): %s", strerror(errno));
}

static int remove_fn(void *arg)
{
	__set_shinfo(KVM_XEN_INVALID_GFN);
	return 0;
}

/*
 * A task that removes the page waits for a refresh, which waits for an invalidation.
 * The task can be killed, and then the page is still set.
 */
TEST_F(gate, kill_remove)
{
	char *stack = alloc_fresh(16 * page_size);
	int gate = open_gate(), status = 0;
	pid_t victim;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[1], SHINFO_PAGE, 1);
	wait_gate(gate, 1);
	start_waiter(&threads[0], sender_fn);

	victim = clone(remove_fn, stack + 16 * page_size, CLONE_VM | CLONE_FILES | SIGCHLD,
		       NULL);
	WINDOW_ASSERT(victim > 0, "clone(): %s", strerror(errno));
	wait_for(task_sleeps_in_ioctl(victim));
	WINDOW_ASSERT(!kill(victim, SIGKILL), "kill(): %s", strerror(errno));
	wait_for(waitpid(victim, &status, WNOHANG) == victim);
	WINDOW_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
		      "victim expected to be killed, got status %#x", status);
	WINDOW_ASSERT(!get(&sh->done), "refresh expected to wait, it did not");

	open_for_all(gate);
	join(&threads[0]);
	join(&threads[1]);
	expect_send(5, 0);
	TEST_ASSERT(shinfo_pending() == 0x28, "expected 0x28 pending, got %#lx",
		    shinfo_pending());
}

/*
 * The OOM reaper calls the hooks in a context in which they may not block, and so
 * does process_mrelease(), which reaps on demand.  Hold a thread of the process at
 * the gate despite its fatal signal; otherwise the process would end before it is
 * reaped.
 */
TEST_F(gate, oom)
{
	int gate = open_gate(), pidfd, ret, status;
	pid_t victim, other;

	victim = start_process();
	if (!victim) {
		create_vm(NR_PAGES);
		attach_gate(gate);
		set_shinfo(SHINFO_PAGE);

		close_gate(gate, SHINFO_PAGE + 1, 1, MMU_GATE_END | MMU_GATE_UNKILLABLE);
		start_dropper(&threads[0], SHINFO_PAGE + 1, 1);
		wait_gate(gate, 1);
		expect_send(3, 0);
		set(&sh->begun, 1);
		for (;;)
			pause();
	}

	wait_for(get(&sh->begun));
	other = start_process();
	if (!other) {
		while (!get(&sh->done)) {
			signal_irqfd(0);
			set(&sh->begun, get(&sh->begun) + 1);
			sched_yield();
		}
		exit(0);
	}
	wait_for(get(&sh->begun) > 1);

	pidfd = syscall(SYS_pidfd_open, victim, 0);
	TEST_ASSERT(pidfd >= 0, "pidfd_open(): %s", strerror(errno));
	TEST_ASSERT(!kill(victim, SIGKILL), "kill(): %s", strerror(errno));
	do {
		ret = syscall(SYS_process_mrelease, pidfd, 0);
	} while (ret && errno == EAGAIN);
	TEST_ASSERT(!ret, "process_mrelease(): %s", strerror(errno));
	set(&sh->done, 1);
	end_process(other);

	open_for_all(gate);
	TEST_ASSERT(waitpid(victim, &status, 0) == victim, "waitpid(): %s", strerror(errno));
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
		    "victim expected to be killed, got status %#x", status);
}

/* Write through the cache while the main thread changes what is mapped. */
static void remap_fn(struct thread *t)
{
	while (!__atomic_load_n(&sh->stop, __ATOMIC_SEQ_CST)) {
		signal_irqfd(0);
		send_event(6);
	}
}

TEST_F(gate, remap)
{
	int gate = open_gate();
	unsigned int i;
	void *p;

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	sh->stop = false;
	start(&threads[0], remap_fn);

	for (i = 0; i < nr_rounds; i++) {
		set_shinfo(SHINFO_PAGE + i % 3);
		p = page(SHINFO_PAGE + i % 2);
		TEST_ASSERT(mmap(p, page_size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p,
			    "mmap(): %s", strerror(errno));
		__set_shinfo(GPA_INVALID);
	}
	__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
	join(&threads[0]);

	/* A page that is mapped by its pfn, like the memory of a device. */
	p = page(SHINFO_PAGE);
	TEST_ASSERT(mmap(p, page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			 gate, 0) == p, "mmap(gate): %s", strerror(errno));
	set_shinfo(SHINFO_PAGE);
	expect_send(7, 0);
	TEST_ASSERT(shinfo_pending() == 0x80, "expected 0x80 pending, got %#lx",
		    shinfo_pending());
	TEST_ASSERT(mmap(p, page_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p,
		    "mmap(): %s", strerror(errno));
	expect_send(8, 0);
	TEST_ASSERT(shinfo_pending() == 0x100, "expected 0x100 pending, got %#lx",
		    shinfo_pending());
}

/* The pages that KVM writes to whenever the vCPU runs after set_clock(), as a bitmap */
#define VCPU_PAGES	(BIT_ULL(VCPU_INFO_PAGE) | BIT_ULL(CLOCK_PAGE) | BIT_ULL(RUNSTATE_PAGE))

/* The vCPU also has kvmclock and a runstate. */
static void set_vcpu_pages(void)
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(CLOCK_PAGE) | KVM_MSR_ENABLED);
	set_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, page_gpa(RUNSTATE_PAGE));
	vcpu_run(vcpu);
}

static void run_fn(struct thread *t)
{
	set(&sh->begun, 1);
	vcpu_run(vcpu);
	set(&sh->done, 1);
}

/* The vCPU needs a page that is being invalidated, and waits in KVM_RUN. */
TEST_F(gate, vcpu)
{
	static const unsigned int pages[] = { CLOCK_PAGE, VCPU_INFO_PAGE, RUNSTATE_PAGE };
	int gate = open_gate();
	unsigned int i, j;
	uint32_t *p;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_vcpu_pages();

	for (i = 0; i < ARRAY_SIZE(pages); i++) {
		close_gate(gate, pages[i], 1, MMU_GATE_END);
		start_dropper(&threads[1], pages[i], 1);
		wait_gate(gate, 1);

		set_clock();
		start_waiter(&threads[0], run_fn);
		p = page(pages[i]);
		for (j = 0; j < page_size / sizeof(*p); j++)
			WINDOW_ASSERT(!p[j], "page %u: expected 0 at %#lx, got %#x", pages[i],
				      j * sizeof(*p), p[j]);
		open_for_all(gate);
		join(&threads[0]);
		join(&threads[1]);

		for (j = 0; j < page_size / sizeof(*p) && !p[j]; j++)
			;
		TEST_ASSERT(j < page_size / sizeof(*p), "page %u: KVM has not written to it",
			    pages[i]);
	}
}

static void enable_clock_fn(struct thread *t)
{
	set(&sh->begun, 1);
	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(t->nr) | KVM_MSR_ENABLED);
	set(&sh->done, 1);
}

static void disable_clock_fn(struct thread *t)
{
	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, 0);
}

/* Raise port 3, unless the page is removed first: then the send fails. */
static void try_send_fn(struct thread *t)
{
	int ret;

	set(&sh->begun, 1);
	ret = send_event(3);
	TEST_ASSERT(!ret || ret == -EINVAL, "KVM_XEN_HVM_EVTCHN_SEND: expected 0 or %d, got %d",
		    -EINVAL, ret);
	set(&sh->done, ret ? 2 : 1);
}

static void remove_shinfo_fn(struct thread *t)
{
	__set_shinfo(GPA_INVALID);
}

/* The cache is moved to a page, or deactivated, while its page is being invalidated. */
TEST_F(gate, deactivate)
{
	int gate = open_gate();
	unsigned long expected;
	uint32_t *time;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	close_gate(gate, CLOCK_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[1], CLOCK_PAGE, 1);
	wait_gate(gate, 1);
	threads[0].nr = CLOCK_PAGE;
	start_waiter(&threads[0], enable_clock_fn);
	start(&threads[2], disable_clock_fn);
	wait_for(is_asleep(&threads[2]));
	open_for_all(gate);
	join(&threads[0]);
	join(&threads[1]);
	join(&threads[2]);

	/* The clock is disabled, and can be enabled again. */
	time = page(CLOCK_PAGE);
	vcpu_run(vcpu);
	TEST_ASSERT(!*time, "expected no time, got version %u", *time);
	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(CLOCK_PAGE) | KVM_MSR_ENABLED);
	vcpu_run(vcpu);
	TEST_ASSERT(*time, "expected a time, got version 0");

	close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[1], SHINFO_PAGE, 1);
	wait_gate(gate, 1);
	start_waiter(&threads[0], try_send_fn);
	start(&threads[2], remove_shinfo_fn);
	wait_for(is_asleep(&threads[2]));
	open_for_all(gate);
	join(&threads[0]);
	join(&threads[1]);
	join(&threads[2]);
	expected = get(&sh->done) == 1 ? 0x8 : 0;
	TEST_ASSERT(shinfo_pending() == expected, "expected %#lx pending, got %#lx", expected,
		    shinfo_pending());
	expect_send(4, -EINVAL);
}

static void sleeper_fn(struct thread *t)
{
	struct kvm_vcpu *v = vcpu_by_id[t - threads];

	vcpu_set_msr(v, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(t->nr) | KVM_MSR_ENABLED);
}

/*
 * Many refreshes sleep: each waits for its own page, and the invalidations end one after
 * the other; then all wait for the same page.
 */
TEST_F(gate, sleepers)
{
	uint64_t waits, sleeps;
	int gate[NR_SLEEPERS];
	unsigned int i, j;

	for (i = 0; i < NR_SLEEPERS; i++)
		gate[i] = open_gate();
	create_vm(NR_PAGES);
	for (i = 0; i < NR_SLEEPERS; i++) {
		attach_gate(gate[i]);
		vcpu_by_id[i] = i ? vm_vcpu_add(vm, i, guest_code) : vcpu;
	}

	waits = vm_get_stat(vm, "pfncache_wait");
	sleeps = vm_get_stat(vm, "pfncache_sleep");
	for (i = 0; i < NR_SLEEPERS; i++) {
		close_gate(gate[i], CLOCK_PAGE + i, 1, MMU_GATE_END);
		start_dropper(&threads[NR_SLEEPERS + i], CLOCK_PAGE + i, 1);
		wait_gate(gate[i], 1);
		threads[i].nr = CLOCK_PAGE + i;
		start(&threads[i], sleeper_fn);
	}
	wait_for(vm_get_stat(vm, "pfncache_wait") == waits + NR_SLEEPERS);
	for (i = 0; i < NR_SLEEPERS; i++)
		wait_for(is_asleep(&threads[i]));
	for (i = 0; i < NR_SLEEPERS; i++) {
		open_for_all(gate[i]);
		join(&threads[i]);
		join(&threads[NR_SLEEPERS + i]);
		for (j = i + 1; j < NR_SLEEPERS; j++)
			WINDOW_ASSERT(sem_trywait(&threads[j].done),
				      "refresh %u ended with invalidation %u", j, i);
	}

	close_gate(gate[0], SHINFO_PAGE, 1, MMU_GATE_END);
	start_dropper(&threads[NR_SLEEPERS], SHINFO_PAGE, 1);
	wait_gate(gate[0], 1);
	for (i = 0; i < NR_SLEEPERS; i++) {
		threads[i].nr = SHINFO_PAGE;
		start(&threads[i], sleeper_fn);
	}
	wait_for(vm_get_stat(vm, "pfncache_wait") == waits + 2 * NR_SLEEPERS);
	for (i = 0; i < NR_SLEEPERS; i++)
		wait_for(is_asleep(&threads[i]));
	open_for_all(gate[0]);
	for (i = 0; i <= NR_SLEEPERS; i++)
		join(&threads[i]);

	sleeps = vm_get_stat(vm, "pfncache_sleep") - sleeps;
	TEST_ASSERT(sleeps == 2 * NR_SLEEPERS, "expected %d sleeps, got %lu", 2 * NR_SLEEPERS,
		    sleeps);
}

static void move_shinfo_fn(struct thread *t)
{
	while (!__atomic_load_n(&sh->stop, __ATOMIC_SEQ_CST))
		set_shinfo(SHINFO_PAGE);
}

/*
 * No event is lost if the delivery finds the lock of the cache taken.  The worker then
 * finds a valid cache.
 */
TEST_F(gate, trylock)
{
	uint64_t valid;

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	valid = vm_get_stat(vm, "pfncache_refresh_valid");
	sh->stop = false;
	start(&threads[0], move_shinfo_fn);
	wait_for(({
		set(pending(SHINFO_PAGE), 0);
		signal_irqfd(0);
		wait_for(shinfo_pending() == 0x2);
		vm_get_stat(vm, "pfncache_refresh_valid") > valid;
	}));
	__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
	join(&threads[0]);
}

static unsigned long read_number(const char *path)
{
	char buf[32];

	read_text(path, buf, sizeof(buf));
	return atol(buf);
}

/* KSM merges the page with another one, and compaction moves it. */
TEST_F(pfncache, ksm)
{
	unsigned long scans;
	unsigned int i;

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	memset(mem, 0x5a, NR_PAGES * page_size);
	TEST_ASSERT(!madvise(mem, NR_PAGES * page_size, MADV_MERGEABLE),
		    "madvise(MADV_MERGEABLE): %s", strerror(errno));
	write_file("/sys/kernel/mm/ksm/sleep_millisecs", "0");
	write_file("/sys/kernel/mm/ksm/run", "1");

	for (i = 0; i < 3; i++) {
		memset(mem, 0x5a, NR_PAGES * page_size);
		*pending(SHINFO_PAGE) = 0;
		memcpy(page(0), page(SHINFO_PAGE), page_size);
		expect_send(1, 0);
		TEST_ASSERT(shinfo_pending() == 0x2, "expected 0x2 pending, got %#lx",
			    shinfo_pending());
		*pending(SHINFO_PAGE) = 0;

		scans = read_number("/sys/kernel/mm/ksm/full_scans");
		wait_for(read_number("/sys/kernel/mm/ksm/full_scans") > scans + 3);
		TEST_ASSERT(read_number("/sys/kernel/mm/ksm/pages_sharing"),
			    "expected merged pages, got none");
		write_file("/proc/sys/vm/compact_memory", "1");

		signal_irqfd(0);
		wait_for(shinfo_pending() == 0x2);
		TEST_ASSERT(!get(pending(0)), "expected 0 pending in the other page, got %#lx",
			    get(pending(0)));
	}
	write_file("/sys/kernel/mm/ksm/run", "2");
}

/*
 * Reclaim drops pages that userspace has freed lazily, and keeps what KVM has written
 * to such a page.  The page after shared_info shows that reclaim has done its work.
 */
TEST_F(pfncache, lazy_free)
{
	unsigned long *control;

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	control = pending(SHINFO_PAGE + 1);

	memset(page(SHINFO_PAGE), 0, page_size);
	*control = 0x5a;
	TEST_ASSERT(!madvise(page(SHINFO_PAGE), 2 * page_size, MADV_FREE),
		    "madvise(MADV_FREE): %s", strerror(errno));
	expect_send(1, 0);

	wait_for(({
		madvise(page(SHINFO_PAGE), 2 * page_size, MADV_PAGEOUT);
		!get(control);
	}));
	TEST_ASSERT(shinfo_pending() == 0x2, "expected 0x2 pending, got %#lx",
		    shinfo_pending());
}

/* The same for pages of shared memory that were only read. */
TEST_F(pfncache, read_only_shmem)
{
	void *p, *control;
	int fd;

	create_vm(NR_PAGES);
	p = page(SHINFO_PAGE);
	control = page(SHINFO_PAGE + 1);

	fd = memfd_create("shinfo", 0);
	TEST_ASSERT(fd >= 0 && !ftruncate(fd, 2 * page_size), "memfd: %s", strerror(errno));
	TEST_ASSERT(mmap(p, 2 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			 fd, 0) == p, "mmap(): %s", strerror(errno));
	set_shinfo(SHINFO_PAGE);

	/* With new pages, which are mapped for reading first */
	TEST_ASSERT(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
			       2 * page_size), "fallocate(): %s", strerror(errno));
	TEST_ASSERT(!get(p) && !get(control), "expected new pages to be zero");
	expect_send(1, 0);

	wait_for(({
		madvise(p, 2 * page_size, MADV_PAGEOUT);
		!is_any_resident(control, page_size);
	}));
	TEST_ASSERT(shinfo_pending() == 0x2, "expected 0x2 pending, got %#lx",
		    shinfo_pending());
	close(fd);
}

/* The pages that KVM writes to */
static const unsigned int kvm_pages[] = {
	VCPU_INFO_PAGE, RUNSTATE_PAGE, CLOCK_PAGE, SHINFO_PAGE,
};

/* What was in these pages, and room for what is on the disk */
static char *saved, *on_disk;

static void create_vm_with_kvm_pages(void)
{
	size_t size = NR_PAGES * page_size;

	create_vm(NR_PAGES);
	saved = alloc_fresh(size);
	on_disk = alloc_fresh(size);
	set_vcpu_pages();
	set_shinfo(SHINFO_PAGE);
}

/* Userspace only reads the pages, because its writes would make them dirty. */
static void let_kvm_write(void)
{
	static struct kvm_clock_data clock;
	static unsigned int port = 3;
	unsigned int i;

	/* Set the clock forward: otherwise the runstate may stay the same. */
	clock.clock += 1000000000;
	vm_ioctl(vm, KVM_SET_CLOCK, &clock);
	vcpu_run(vcpu);
	expect_send(port++, 0);
	for (i = 0; i < ARRAY_SIZE(kvm_pages); i++) {
		TEST_ASSERT(memcmp(saved + kvm_pages[i] * page_size, page(kvm_pages[i]), page_size),
			    "page %u: expected KVM to write to it", kvm_pages[i]);
		memcpy(saved + kvm_pages[i] * page_size, page(kvm_pages[i]), page_size);
	}
}

static void expect_saved(const char *found, unsigned int round, const char *when)
{
	unsigned long *a, *b;
	unsigned int i, j;

	for (i = 0; i < ARRAY_SIZE(kvm_pages); i++) {
		a = (void *)saved + kvm_pages[i] * page_size;
		b = (void *)found + kvm_pages[i] * page_size;
		for (j = 0; j < page_size / sizeof(*a); j++)
			TEST_ASSERT(a[j] == b[j],
				    "round %u, %s: page %u at %#lx: expected %#lx, got %#lx", round,
				    when, kvm_pages[i], j * sizeof(*a), a[j], b[j]);
	}
}

static void page_out_kvm_pages(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(kvm_pages); i++)
		page_out(page(kvm_pages[i]), page_size);
}

/* Writes of KVM are not lost if the pages are swapped out.  In each second round, clean them. */
TEST_F(pfncache, swap)
{
	size_t size = NR_PAGES * page_size;
	unsigned int i, j;

	swap_on();
	create_vm_with_kvm_pages();
	for (i = 0; i < 4; i++) {
		if (i % 2) {
			/* Make the PTEs writable first. */
			for (j = 0; j < ARRAY_SIZE(kvm_pages); j++)
				set(page(kvm_pages[j]), get(page(kvm_pages[j])));
			TEST_ASSERT(!madvise(mem, size, MADV_FREE), "madvise(MADV_FREE): %s",
				    strerror(errno));
		}
		let_kvm_write();
		page_out_kvm_pages();
		expect_saved(mem, i, "swapped out");
	}
	swap_off();
}

/* The same with shared memory, which is new in each second round and was only read. */
TEST_F(pfncache, swap_shmem)
{
	size_t size = NR_PAGES * page_size;
	int fd = memfd_create("pages", 0);
	unsigned int i, j;

	swap_on();
	create_vm_with_kvm_pages();
	TEST_ASSERT(fd >= 0 && !ftruncate(fd, size), "memfd: %s", strerror(errno));
	TEST_ASSERT(mmap(mem, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == mem,
		    "mmap(): %s", strerror(errno));
	for (i = 0; i < 4; i++) {
		if (i % 2) {
			TEST_ASSERT(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
					       size), "fallocate(): %s", strerror(errno));
			for (j = 0; j < ARRAY_SIZE(kvm_pages); j++)
				TEST_ASSERT(!get(page(kvm_pages[j])),
					    "expected new pages to be zero");
		}
		let_kvm_write();
		page_out_kvm_pages();
		expect_saved(mem, i, "swapped out");
	}
	swap_off();
	close(fd);
}

/* The memory of the slot is a file on a disk, and is up to date there. */
static int map_disk_file(void)
{
	size_t size = NR_PAGES * page_size;
	int fd = create_disk_file(size);

	create_vm_with_kvm_pages();
	TEST_ASSERT(mmap(mem, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == mem,
		    "mmap(): %s", strerror(errno));
	return fd;
}

/* Writes of KVM to a file are written back, whoever cleans the pages in between. */
TEST_F(pfncache, writeback)
{
	size_t size = NR_PAGES * page_size;
	int fd = map_disk_file(), ret;
	unsigned int i;

	for (i = 0; i < 6; i++) {
		let_kvm_write();
		ret = i % 2 ? msync(mem, size, MS_SYNC) : fsync(fd);
		TEST_ASSERT(!ret, "%s: %s", i % 2 ? "msync()" : "fsync()", strerror(errno));
		read_disk_file(fd, on_disk, size);
		expect_saved(on_disk, i, "on disk");
		page_out_kvm_pages();
		expect_saved(mem, i, "read from the disk");
	}
}

static int disk_fd;

static void sync_fn(struct thread *t)
{
	struct timespec delay = {};
	unsigned int i = 0;

	while (!__atomic_load_n(&sh->stop, __ATOMIC_SEQ_CST)) {
		fsync(disk_fd);
		/* Preempt the refreshing thread, at any place. */
		delay.tv_nsec = 20000 + 100 * (i++ % 1000);
		nanosleep(&delay, NULL);
	}
}

/*
 * Writeback cleans the page between its lookup by a refresh and the moment when the cache
 * becomes valid.  A page that is marked dirty after that would never be written back again.
 */
TEST_F(gate, writeback_race)
{
	struct sched_param param = { .sched_priority = 1 };
	size_t size = NR_PAGES * page_size;
	unsigned int i;
	uint64_t retries;

	disk_fd = map_disk_file();
	pin(0);
	pin_task(threads[0].tid, 0);
	TEST_ASSERT(!sched_setscheduler(threads[0].tid, SCHED_FIFO, &param),
		    "sched_setscheduler(): %s", strerror(errno));
	sh->stop = false;
	start(&threads[0], sync_fn);

	for (i = 0; i < nr_rounds; i++) {
		wait_for(({
			set_shinfo(SHINFO_PAGE + 1);
			retries = vm_get_stat(vm, "pfncache_retry");
			set_shinfo(SHINFO_PAGE);
			vm_get_stat(vm, "pfncache_retry") > retries;
		}));
		let_kvm_write();
		TEST_ASSERT(!fsync(disk_fd), "fsync(): %s", strerror(errno));
		read_disk_file(disk_fd, on_disk, size);
		expect_saved(on_disk, i, "on disk");
	}

	__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
	join(&threads[0]);
}

/* Send an event by the irqfd, which raises port 1, and by ioctl. */
static void expect_events(unsigned long *word, const char *when)
{
	set(word, 0);
	signal_irqfd(0);
	expect_send(2, 0);
	wait_for(get(word) & 0x2);
	TEST_ASSERT(get(word) == 0x6, "%s: expected 0x6 pending, got %#lx", when, get(word));
}

/* Drop the memory at @p, which has the shared_info, and send events to what replaces it. */
static void expect_new_page(unsigned long *word, void *p, size_t size)
{
	TEST_ASSERT(!madvise(p, size, MADV_DONTNEED), "madvise(MADV_DONTNEED): %s",
		    strerror(errno));
	TEST_ASSERT(!get(word), "expected a new page to be zero, got %#lx", get(word));
	expect_events(word, "dropped");
}

/* A second slot for @p, whose page @nr is the shared_info. */
static unsigned long *set_shinfo_in_slot(void *p, size_t size, unsigned int nr)
{
	int ret;

	vm_set_user_memory_region(vm, SLOT + 1, 0, BASE_GPA + SZ_1G, size, p);
	ret = __set_shinfo((BASE_GPA + SZ_1G) / page_size + nr);
	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_XEN_HVM_SET_ATTR, ret));
	return p + nr * page_size + XEN_SHINFO_PENDING;
}

/* A page that something else uses for a moment cannot be collapsed at that time. */
static bool collapse(void *huge)
{
	int i;

	memset(huge, 0, SZ_2M);
	for (i = 0; i < 100; i++) {
		if (!madvise(huge, SZ_2M, MADV_COLLAPSE))
			return true;
		if (errno != EAGAIN && errno != EBUSY)
			return false;
		sched_yield();
	}
	return false;
}

/* The page is part of a huge page, which is split and collapsed again. */
TEST_F(pfncache, thp)
{
	unsigned long *word;
	unsigned int i;
	void *huge;

	create_vm(NR_PAGES);
	huge = (void *)(((uintptr_t)alloc_fresh(2 * SZ_2M) + SZ_2M - 1) & -(uintptr_t)SZ_2M);
	__TEST_REQUIRE(collapse(huge), "MADV_COLLAPSE: %s", strerror(errno));
	word = set_shinfo_in_slot(huge, SZ_2M, 1);

	for (i = 0; i < 5; i++) {
		expect_events(word, "huge");
		TEST_ASSERT(!madvise(huge + SZ_1M, page_size, MADV_DONTNEED),
			    "madvise(MADV_DONTNEED): %s", strerror(errno));
		TEST_ASSERT(get(word) == 0x6, "split: expected 0x6 pending, got %#lx", get(word));
		expect_events(word, "split");
		/* Copies the small pages to a huge page, and frees them. */
		TEST_ASSERT(collapse(huge), "MADV_COLLAPSE: %s", strerror(errno));
	}
	expect_events(word, "collapsed");
}

TEST_F(pfncache, hugetlb)
{
	unsigned long *word;
	void *huge;

	__TEST_REQUIRE(write_setting("/proc/sys/vm/nr_hugepages", "2"), "needs hugetlbfs");
	huge = mmap(NULL, SZ_2M, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	__TEST_REQUIRE(huge != MAP_FAILED, "needs a huge page: %s", strerror(errno));
	create_vm(NR_PAGES);
	word = set_shinfo_in_slot(huge, SZ_2M, 1);
	expect_events(word, "new");

	expect_new_page(word, huge, SZ_2M);

	TEST_ASSERT(!mprotect(huge, SZ_2M, PROT_READ), "mprotect(): %s", strerror(errno));
	expect_send(3, -EFAULT);
	TEST_ASSERT(!mprotect(huge, SZ_2M, PROT_READ | PROT_WRITE), "mprotect(): %s",
		    strerror(errno));
	expect_events(word, "writable again");

	TEST_ASSERT(!munmap(huge, SZ_2M), "munmap(): %s", strerror(errno));
	expect_send(3, -EFAULT);
}

static bool has_two_nodes(void)
{
	return !access("/sys/devices/system/node/node1", F_OK);
}

/* Returns whether the page is on NUMA node @node now. */
static bool move_page(void *p, int node)
{
	int status = -1;
	long ret = syscall(SYS_move_pages, 0, 1ul, &p, &node, &status, MPOL_MF_MOVE);

	TEST_ASSERT(ret >= 0, "move_pages(): %s", strerror(errno));
	return status == node;
}

/* The page moves between NUMA nodes while KVM writes to it. */
TEST_F(pfncache, migrate)
{
	unsigned int moved = 0;

	__TEST_REQUIRE(has_two_nodes(), "needs two NUMA nodes (numa=fake=2)");
	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	sh->stop = false;
	start(&threads[0], remap_fn);
	wait_for(({
		set(pending(SHINFO_PAGE), 0);
		moved += move_page(page(SHINFO_PAGE), moved % 2);
		wait_for(shinfo_pending() == 0x42);
		moved >= nr_rounds;
	}));
	__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
	join(&threads[0]);
	expect_events(pending(SHINFO_PAGE), "moved");
}

/* User address 0 is an address like any other. */
TEST_F(pfncache, address_zero)
{
	unsigned long *word;
	void *p = mmap(NULL, page_size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	__TEST_REQUIRE(!p, "mmap() at address 0: %s", strerror(errno));
	create_vm(NR_PAGES);
	word = set_shinfo_in_slot(p, page_size, 0);
	expect_events(word, "new");
	expect_new_page(word, p, page_size);
}

/* The page moves to another address, and another page moves to its address. */
TEST_F(pfncache, mremap)
{
	unsigned long *away;
	void *p;

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	expect_send(1, 0);

	p = mremap(page(SHINFO_PAGE), page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED,
		   page(NR_PAGES - 1));
	TEST_ASSERT(p == page(NR_PAGES - 1), "mremap(): %s", strerror(errno));
	away = pending(NR_PAGES - 1);
	expect_send(2, -EFAULT);
	TEST_ASSERT(get(away) == 0x2, "expected 0x2 pending in the moved page, got %#lx",
		    get(away));

	p = mremap(page(SHINFO_PAGE + 1), page_size, page_size, MREMAP_MAYMOVE | MREMAP_FIXED,
		   page(SHINFO_PAGE));
	TEST_ASSERT(p == page(SHINFO_PAGE), "mremap(): %s", strerror(errno));
	expect_send(3, 0);
	TEST_ASSERT(shinfo_pending() == 0x8 && get(away) == 0x2,
		    "expected 0x8 and 0x2 pending, got %#lx and %#lx", shinfo_pending(), get(away));
}

/* No page or no writable page: an error, and success when there is one again. */
TEST_F(pfncache, bad_address)
{
	void *p;

	create_vm(NR_PAGES);
	p = page(SHINFO_PAGE);

	/* Never activated. */
	expect_send(1, -EINVAL);
	__set_shinfo(GPA_INVALID);
	expect_send(1, -EINVAL);

	set_shinfo(SHINFO_PAGE);
	expect_send(1, 0);

	vm_set_user_memory_region(vm, SLOT, 0, BASE_GPA, 0, mem);
	expect_send(2, -EFAULT);
	map_slot(NR_PAGES * page_size);
	expect_send(2, 0);

	TEST_ASSERT(!mprotect(p, page_size, PROT_NONE), "mprotect()");
	expect_send(3, -EFAULT);
	TEST_ASSERT(!mprotect(p, page_size, PROT_READ), "mprotect()");
	expect_send(3, -EFAULT);
	TEST_ASSERT(!mprotect(p, page_size, PROT_READ | PROT_WRITE), "mprotect()");
	expect_send(3, 0);

	TEST_ASSERT(!munmap(p, page_size), "munmap()");
	expect_send(4, -EFAULT);
	TEST_ASSERT(mmap(p, page_size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p, "mmap()");
	expect_send(4, 0);
	TEST_ASSERT(shinfo_pending() == 0x10, "expected 0x10 pending, got %#lx",
		    shinfo_pending());

	/* An address without a memslot fails; after that, the cache can be set again. */
	TEST_ASSERT(__set_shinfo(0xd0000) == EFAULT, "expected EFAULT, got %d", errno);
	expect_send(5, -EFAULT);
	set_shinfo(SHINFO_PAGE);
	expect_send(5, 0);
}

/* Call @get_dirty before and after KVM writes, with and without a refresh. */
static void expect_dirty(uint64_t (*get_dirty)(void))
{
	uint32_t version;
	uint64_t dirty;
	int i;

	for (i = 0; i < 3; i++) {
		if (i == 2) {
			drop(CLOCK_PAGE, page_size);
			drop(RUNSTATE_PAGE, page_size);
		}
		get_dirty();
		version = *(uint32_t *)page(CLOCK_PAGE);

		set_clock();
		vcpu_run(vcpu);
		TEST_ASSERT(*(uint32_t *)page(CLOCK_PAGE) != version,
			    "%d: expected a new time, got version %u", i, version);
		dirty = get_dirty();
		TEST_ASSERT(dirty == VCPU_PAGES, "%d: expected dirty pages %#llx, got %#lx", i,
			    VCPU_PAGES, dirty);
	}
}

static void log_dirty_pages(void)
{
	vm_set_user_memory_region(vm, SLOT, KVM_MEM_LOG_DIRTY_PAGES, BASE_GPA,
				  NR_PAGES * page_size, mem);
}

static uint64_t get_dirty_log(void)
{
	uint64_t dirty;

	kvm_vm_get_dirty_log(vm, SLOT, &dirty);
	return dirty;
}

/* Whenever KVM writes to pages of the vCPU, they are dirty. */
TEST_F(pfncache, dirty_log)
{
	create_vm(NR_PAGES);
	set_vcpu_pages();
	log_dirty_pages();
	expect_dirty(get_dirty_log);
}

static uint64_t get_dirty_ring(void)
{
	static unsigned int next;
	struct kvm_dirty_gfn *ring = vcpu_map_dirty_ring(vcpu), *entry;
	unsigned int nr, reset;
	uint64_t dirty = 0;

	for (nr = 0; ; nr++) {
		entry = &ring[next % DIRTY_RING_SIZE];
		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		if (entry->slot == SLOT)
			dirty |= BIT_ULL(entry->offset);
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		next++;
	}
	reset = kvm_vm_reset_dirty_ring(vm);
	TEST_ASSERT(reset == nr, "KVM_RESET_DIRTY_RINGS: expected %u, got %u", nr, reset);
	return dirty;
}

TEST_F(pfncache, dirty_ring)
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_LOG_RING));

	__create_vm(NR_PAGES, true);
	set_vcpu_pages();
	log_dirty_pages();
	expect_dirty(get_dirty_ring);
}

/* KVM does not write to a slot that is read-only for the guest. */
TEST_F(pfncache, read_only_slot)
{
	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);
	expect_send(1, 0);

	vm_set_user_memory_region(vm, SLOT, 0, BASE_GPA, 0, mem);
	vm_set_user_memory_region(vm, SLOT, KVM_MEM_READONLY, BASE_GPA, NR_PAGES * page_size,
				  mem);
	expect_send(2, -EFAULT);
	TEST_ASSERT(__set_shinfo(page_gpa(SHINFO_PAGE) / page_size) == EFAULT,
		    "expected EFAULT, got %d", errno);
	TEST_ASSERT(shinfo_pending() == 0x2, "expected 0x2 pending, got %#lx",
		    shinfo_pending());

	vm_set_user_memory_region(vm, SLOT, 0, BASE_GPA, 0, mem);
	map_slot(NR_PAGES * page_size);
	expect_send(2, 0);
	TEST_ASSERT(shinfo_pending() == 0x6, "expected 0x6 pending, got %#lx",
		    shinfo_pending());
}

/*
 * After a change of another memslot, KVM looks up the address of the page again, but
 * does not map the page again, unless the host moves the page at this moment.
 */
TEST_F(gate, other_slot)
{
	uint64_t refreshes;
	unsigned int i;

	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);

	for (i = 0; i < 10; i++) {
		expect_send(1, 0);
		refreshes = vm_get_stat(vm, "pfncache_refresh");
		vm_set_user_memory_region(vm, SLOT + 1, 0, BASE_GPA + SZ_1G,
					  i % 2 ? 0 : page_size, page(SHINFO_PAGE + 1));
		expect_send(2, 0);
		refreshes = vm_get_stat(vm, "pfncache_refresh") - refreshes;
		if (!refreshes)
			break;
	}
	TEST_ASSERT(!refreshes, "pfncache_refresh: expected 0 more in one of %u rounds, got %lu",
		    i, refreshes);
	TEST_ASSERT(shinfo_pending() == 0x6, "expected 0x6 pending, got %#lx",
		    shinfo_pending());
}

static void recreate_slot_fn(struct thread *t)
{
	vm_set_user_memory_region(vm, SLOT, 0, BASE_GPA, 0, mem);
	map_slot(NR_PAGES * page_size);
}

/*
 * The slot is deleted and created again, with the same memory, while a refresh waits for an
 * invalidation.  The refresh finds the slot before or during the deletion.
 */
TEST_F(gate, recreated_slot)
{
	int gate = open_gate();
	unsigned int i;

	create_vm(NR_PAGES);
	attach_gate(gate);
	set_shinfo(SHINFO_PAGE);

	for (i = 0; i < nr_rounds; i++) {
		close_gate(gate, SHINFO_PAGE, 1, MMU_GATE_END);
		start_dropper(&threads[1], SHINFO_PAGE, 1);
		wait_gate(gate, 1);
		start_waiter(&threads[0], sender_fn);
		start(&threads[2], recreate_slot_fn);
		wait_for(is_asleep(&threads[2]));

		open_for_all(gate);
		join(&threads[0]);
		join(&threads[1]);
		join(&threads[2]);
		expect_send(4, 0);
		TEST_ASSERT(shinfo_pending() == 0x18,
			    "round %u: expected 0x18 pending, got %#lx", i, shinfo_pending());
	}
}

/* A structure that would cross a page boundary is refused and not written. */
TEST_F(pfncache, page_crossing)
{
	struct kvm_xen_vcpu_attr attr = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		.u.gpa = page_gpa(VCPU_INFO_PAGE + 1) - 8,
	};
	unsigned long *zero;
	size_t i;
	int ret;

	create_vm(NR_PAGES);

	ret = __vcpu_ioctl(vcpu, KVM_XEN_VCPU_SET_ATTR, &attr);
	TEST_ASSERT(ret == -1 && errno == EINVAL, "expected EINVAL, got %d, errno %d",
		    ret, errno);

	zero = addr_gpa2hva(vm, 0);
	memset(zero, 0, page_size);
	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, (page_gpa(9) - 16) | KVM_MSR_ENABLED);
	vcpu_run(vcpu);
	for (i = 0; i < page_size / sizeof(*zero); i++)
		TEST_ASSERT(!zero[i], "KVM wrote %#lx at guest physical address %#lx",
			    zero[i], i * sizeof(*zero));

	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, page_gpa(9) | KVM_MSR_ENABLED);
	vcpu_run(vcpu);
	TEST_ASSERT(*(uint32_t *)page(9), "expected a time at %p, got version 0", page(9));

	memset(page(9), 0, page_size);
	vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, (page_gpa(8) - 16) | KVM_MSR_ENABLED);
	vcpu_run(vcpu);
	TEST_ASSERT(!*(uint32_t *)page(9), "expected no time at the old address, got version %u",
		    *(uint32_t *)page(9));
}

/*
 * The process that owns the VM exits.  Another process, which has inherited the
 * file descriptors, signals an irqfd when the pages are free or allocated again.
 */
TEST_F(pfncache, released_mm)
{
	size_t size = (big_mib << 20) * 2;
	unsigned long *fresh;
	pid_t owner, heir;
	int status;

	/* Stay on one CPU, so that pages from its free lists are allocated again. */
	pin(0);

	owner = start_process();
	if (!owner) {
		create_vm(NR_PAGES);
		set_shinfo(SHINFO_PAGE);

		heir = start_process();
		if (!heir) {
			prctl(PR_SET_PDEATHSIG, 0);
			munmap(mem, NR_PAGES * page_size);
			set(&sh->begun, 1);
			wait_for(get(&sh->done));
			/* The page is free: a write is detected by KASAN. */
			signal_irqfd(0);
			fresh = alloc_fresh(size);
			signal_irqfd(1);
			check_fresh(fresh, size);
			set(&sh->begun, 2);
			exit(0);
		}
		wait_for(get(&sh->begun));
		/* Undo the sharing of the page by fork(): the write copies it. */
		*pending(SHINFO_PAGE) = 0;
		expect_send(5, 0);
		/* Not exit(), which could clean up the VM. */
		_exit(0);
	}
	end_process(owner);
	set(&sh->done, 1);

	/* The heir is a child of this process now, due to PR_SET_CHILD_SUBREAPER. */
	TEST_ASSERT(wait(&status) > 0, "wait(): %s", strerror(errno));
	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status) && get(&sh->begun) == 2,
		    "heir ended with status %#x, expected 0", status);
}

/*
 * Activate @nr caches, four per vCPU; the vCPUs never run.  Store their file
 * descriptors in @fds, which the caller must close to destroy the VM.  Return how
 * many there are.
 */
static unsigned int create_caches(unsigned int nr, int *fds)
{
	static const uint16_t types[] = {
		KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
		KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
	};
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entry;
	} msrs = {
		.header.nmsrs = 1,
		.entry.index = MSR_KVM_SYSTEM_TIME_NEW,
	};
	struct kvm_xen_vcpu_attr attr = {};
	unsigned int i, id = 0;
	int fd = -1;

	for (i = 0; i < nr; i++) {
		if (i % 4 == 0) {
			fd = __vm_ioctl(vm, KVM_CREATE_VCPU, (void *)(unsigned long)id);
			TEST_ASSERT(fd >= 0, KVM_IOCTL_ERROR(KVM_CREATE_VCPU, fd));
			fds[id++] = fd;
		}
		if (i % 4 < ARRAY_SIZE(types)) {
			attr.type = types[i % 4];
			attr.u.gpa = page_gpa(i);
			TEST_ASSERT(!ioctl(fd, KVM_XEN_VCPU_SET_ATTR, &attr),
				    "KVM_XEN_VCPU_SET_ATTR: %s", strerror(errno));
		} else {
			msrs.entry.data = page_gpa(i) | KVM_MSR_ENABLED;
			TEST_ASSERT(ioctl(fd, KVM_SET_MSRS, &msrs) == 1,
				    "KVM_SET_MSRS: %s", strerror(errno));
		}
	}

	return id;
}

/*
 * The instructions of an invalidation, start and end, that concerns no cache.
 * Under QEMU's icount, with one nanosecond per instruction, the clock counts
 * instructions.  The system call is included; it is the same on all kernels.
 */
static void perf_hooks(void)
{
	static const unsigned int nr_caches[] = { 0, 1, 16, 256, 4096 };
	const unsigned int rounds = 1000;
	struct kvm_xen_hvm_config config = { .msr = XEN_HYPERCALL_MSR };
	unsigned int i, j, nr_fds;
	uint64_t begin;
	int fds[1024];
	char *p = mmap(NULL, page_size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(p != MAP_FAILED, "mmap(): %s", strerror(errno));

	for (i = 0; i < ARRAY_SIZE(nr_caches); i++) {
		vm = vm_create_barebones();
		mem = alloc_fresh(4096 * page_size);
		map_slot(4096 * page_size);
		vm_create_irqchip(vm);
		vm_ioctl(vm, KVM_XEN_HVM_CONFIG, &config);
		nr_fds = create_caches(nr_caches[i], fds);

		begin = now_ns();
		for (j = 0; j < rounds; j++)
			madvise(p, page_size, MADV_DONTNEED);
		printf("perf: hooks_%u_caches instructions %lu\n", nr_caches[i],
		       (now_ns() - begin) / rounds);

		while (nr_fds--)
			close(fds[nr_fds]);
		kvm_vm_free(vm);
		munmap(mem, 4096 * page_size);
	}
	vm = NULL;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(uint64_t *)a, y = *(uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void drop_neighbours(void)
{
	pin(1);
	while (!__atomic_load_n(&sh->stop, __ATOMIC_SEQ_CST)) {
		drop(SHINFO_PAGE - 1, page_size);
		drop(SHINFO_PAGE + 1, page_size);
	}
}

static void neighbour_fn(struct thread *t)
{
	drop_neighbours();
}

struct latency {
	uint64_t median, p99;
};

/* Keep the least value of all calls: other load of the host only adds to it. */
static void measure_refresh(struct latency *least)
{
	const unsigned int samples = 5000;
	uint64_t *ns = calloc(samples, sizeof(*ns)), begin;
	unsigned int i;

	TEST_ASSERT(ns, "calloc()");
	for (i = 0; i < samples; i++) {
		begin = now_ns();
		set_shinfo(SHINFO_PAGE + i % 2 * 2);
		ns[i] = now_ns() - begin;
	}
	qsort(ns, samples, sizeof(*ns), compare);
	least->median = min(least->median, ns[samples / 2]);
	least->p99 = min(least->p99, ns[samples * 99 / 100]);
	free(ns);
}

/* A kernel without /dev/test_mmu_gate may not have the statistic either. */
static uint64_t nr_retries(void)
{
	return has_gate ? vm_get_stat(vm, "pfncache_retry") : 0;
}

static void report_refresh(const char *what, const struct latency *least)
{
	printf("perf: refresh_%s_median ns %lu\n", what, least->median);
	printf("perf: refresh_%s_p99 ns %lu\n", what, least->p99);
}

/*
 * The time of a refresh, with alternating pages that are both present, so that no
 * page fault and no TLB flush is measured:
 *
 * - idle: while nothing else happens;
 * - busy: while another process, which has nothing to do with the VM, invalidates
 *   its own pages on both sides of its copy of the page;
 * - storm: while a thread of the VM's process invalidates these pages.
 *
 * Only ratios have a meaning: busy to idle is what a busy machine costs, storm to
 * busy is what the invalidations cost.  The three are measured in turn, ten times,
 * without the fork() that starts the other process.  With one CPU only idle is
 * measured.
 */
static void perf_refresh(void)
{
	struct latency idle = { -1, -1 }, busy = idle, storm = idle;
	uint64_t retries = 0;
	unsigned int i;
	pid_t other;

	pin(0);
	create_vm(NR_PAGES);
	set_shinfo(SHINFO_PAGE);

	if (sysconf(_SC_NPROCESSORS_ONLN) < 2) {
		measure_refresh(&idle);
		report_refresh("idle", &idle);
		return;
	}

	for (i = 0; i < 10; i++) {
		measure_refresh(&idle);

		sh->stop = false;
		other = start_process();
		if (!other) {
			drop_neighbours();
			exit(0);
		}
		measure_refresh(&busy);
		__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
		end_process(other);

		sh->stop = false;
		start(&threads[0], neighbour_fn);
		retries -= nr_retries();
		measure_refresh(&storm);
		retries += nr_retries();
		__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
		join(&threads[0]);
	}

	report_refresh("idle", &idle);
	report_refresh("busy", &busy);
	report_refresh("storm", &storm);
	if (has_gate)
		printf("perf: refresh_storm_retries count %lu\n", retries);
}

/* Ways to invalidate the page, each with what has to be done before, which is not measured */
static void invalidate_by_dontneed(void)
{
	drop(SHINFO_PAGE, page_size);
}

static void invalidate_by_mprotect(void)
{
	mprotect(page(SHINFO_PAGE), page_size, PROT_READ);
}

static void make_writable(void)
{
	mprotect(page(SHINFO_PAGE), page_size, PROT_READ | PROT_WRITE);
}

/* The pages of the slot from 2 MiB to 4 MiB are a huge page. */
static unsigned int huge_page(void)
{
	return SZ_2M / page_size;
}

static void prepare_split(void)
{
	TEST_ASSERT(collapse(page(huge_page())), "MADV_COLLAPSE: %s", strerror(errno));
}

static void invalidate_by_split(void)
{
	drop(huge_page() + 1, page_size);
}

static void invalidate_by_collapse(void)
{
	madvise(page(huge_page()), SZ_2M, MADV_COLLAPSE);
}

static void prepare_munmap(void)
{
	TEST_ASSERT(mmap(mem, big_mib << 20, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_POPULATE, -1, 0) == mem,
		    "mmap(): %s", strerror(errno));
}

static void invalidate_by_munmap(void)
{
	munmap(mem, big_mib << 20);
}

static pid_t forked;

static void invalidate_by_fork(void)
{
	forked = start_process();
	if (!forked)
		_exit(0);
}

static void end_fork(void)
{
	if (forked)
		end_process(forked);
	forked = 0;
}

static void prepare_ksm(void)
{
	memset(mem, 0x5a, NR_PAGES * page_size);
	madvise(mem, NR_PAGES * page_size, MADV_MERGEABLE);
	write_file("/sys/kernel/mm/ksm/sleep_millisecs", "0");
	write_file("/sys/kernel/mm/ksm/run", "1");
}

static void invalidate_by_ksm(void)
{
	unsigned long scans = read_number("/sys/kernel/mm/ksm/full_scans");

	wait_for(read_number("/sys/kernel/mm/ksm/full_scans") > scans + 2);
}

static void invalidate_by_compaction(void)
{
	write_file("/proc/sys/vm/compact_memory", "1");
}

/* From one NUMA node to the other */
static void invalidate_by_migration(void)
{
	static int node;

	node = !node;
	move_page(page(SHINFO_PAGE), node);
}

/* How long a refresh spins, see KVM_GPC_SPIN_NS in virt/kvm/pfncache.c */
#define SPIN_NS			10000

/* Not an array: the VM has no room for a larger program. */
#define NR_SAMPLES		50000
static uint64_t *samples;
static unsigned int nr_samples;

/*
 * Setting the shared_info page refreshes its cache without waiting for mmap_lock before.
 * But that changes the page, so KSM would not merge it.  An event that is pending already
 * does not change the page.
 */
static bool refresh_by_event;

static void refresh_fn(struct thread *t)
{
	uint64_t ns = vm_get_stat(vm, "pfncache_wait_ns"), last;
	bool measured;

	while (!__atomic_load_n(&sh->stop, __ATOMIC_SEQ_CST)) {
		last = ns;
		measured = get(&sh->begun);
		/* Either of them fails while no writable page is mapped. */
		if (refresh_by_event)
			send_event(3);
		else
			__set_shinfo(page_gpa(t->nr) / page_size);
		ns = vm_get_stat(vm, "pfncache_wait_ns");
		if (measured && ns != last && nr_samples < NR_SAMPLES)
			samples[nr_samples++] = ns - last;
	}
}

/* A wait that is longer than SPIN_NS sleeps. */
static void report_times(const char *op, const char *what, uint64_t *ns, unsigned int n)
{
	unsigned int i;

	qsort(ns, n, sizeof(*ns), compare);
	for (i = 0; i < n && ns[i] <= SPIN_NS; i++)
		;
	printf("perf: %s_%s count %u\n", what, op, n);
	printf("perf: %s_%s_long count %u\n", what, op, n - i);
	if (!n)
		return;
	printf("perf: %s_%s_median ns %lu\n", what, op, ns[n / 2]);
	printf("perf: %s_%s_p90 ns %lu\n", what, op, ns[n * 90 / 100]);
	printf("perf: %s_%s_p99 ns %lu\n", what, op, ns[n * 99 / 100]);
	printf("perf: %s_%s_max ns %lu\n", what, op, ns[n - 1]);
}

/*
 * How long system calls take that invalidate the page, and how long refreshes of another
 * thread wait meanwhile.
 */
static void perf_waits(void)
{
	static const struct {
		const char *name;
		void (*prepare)(void);
		void (*fn)(void);
		unsigned int rounds;
		bool huge;
		bool async;		/* does not end with the invalidation */
	} ops[] = {
		{ "dontneed", NULL, invalidate_by_dontneed, NR_SAMPLES },
		{ "mprotect", make_writable, invalidate_by_mprotect, 500 },
		{ "split", prepare_split, invalidate_by_split, 50, true },
		{ "collapse", invalidate_by_split, invalidate_by_collapse, 50, true },
		{ "fork", end_fork, invalidate_by_fork, 50 },
		{ "munmap", prepare_munmap, invalidate_by_munmap, 5 },
		{ "migration", NULL, invalidate_by_migration, 500 },
		{ "ksm", prepare_ksm, invalidate_by_ksm, 5, false, true },
		{ "compaction", NULL, invalidate_by_compaction, 20, false, true },
	};
	uint64_t *ns = calloc(NR_SAMPLES, sizeof(*ns)), begin;
	unsigned int i, round;

	samples = calloc(NR_SAMPLES, sizeof(*samples));
	TEST_ASSERT(ns && samples, "calloc()");
	__TEST_REQUIRE(has_gate, "needs statistics");
	__TEST_REQUIRE(has_two_nodes(), "needs two NUMA nodes (numa=fake=2)");
	setbuf(stdout, NULL);
	create_vm((big_mib << 20) / page_size);

	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		prepare_munmap();
		if (ops[i].huge)
			prepare_split();
		threads[0].nr = ops[i].huge ? huge_page() : SHINFO_PAGE;
		set_shinfo(threads[0].nr);
		refresh_by_event = ops[i].async;
		nr_samples = 0;
		sh->stop = false;
		set(&sh->begun, 0);
		start(&threads[0], refresh_fn);
		for (round = 0; round < ops[i].rounds; round++) {
			if (ops[i].prepare)
				ops[i].prepare();
			set(&sh->begun, 1);
			begin = now_ns();
			ops[i].fn();
			ns[round] = now_ns() - begin;
			set(&sh->begun, 0);
		}
		__atomic_store_n(&sh->stop, true, __ATOMIC_SEQ_CST);
		join(&threads[0]);
		end_fork();
		if (!ops[i].async)
			report_times(ops[i].name, "call", ns, ops[i].rounds);
		report_times(ops[i].name, "wait", samples, nr_samples);
	}
	write_file("/sys/kernel/mm/ksm/run", "2");
}

static void measure(const char *what)
{
	set_up();
	if (!strcmp(what, "hooks"))
		perf_hooks();
	else if (!strcmp(what, "refresh"))
		perf_refresh();
	else if (!strcmp(what, "waits"))
		perf_waits();
	else
		TEST_FAIL("no such measurement: %s", what);
	tear_down();
}

static void usage(const char *name)
{
	printf("Usage: %s [-h] [-m MiB] [-n rounds] [case...]\n"
	       "       %s -p measurement\n"
	       " -m: size of the range of case large_range and of munmap() (default: %lu)\n"
	       " -p: measure: hooks (under icount, with one CPU), refresh or waits (with two CPUs)\n"
	       " -n: rounds of the cases neighbours and remap (default: %u)\n",
	       name, name, big_mib, nr_rounds);
	exit(KSFT_FAIL);
}

int main(int argc, char *argv[])
{
	const char *measurement = NULL;
	int opt;

	while ((opt = getopt(argc, argv, "hm:n:p:")) != -1) {
		switch (opt) {
		case 'm':
			big_mib = atoi(optarg);
			break;
		case 'n':
			nr_rounds = atoi(optarg);
			break;
		case 'p':
			measurement = optarg;
			break;
		default:
			usage(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND);

	page_size = getpagesize();
	has_gate = !access("/dev/test_mmu_gate", R_OK | W_OK);

	if (measurement) {
		restore_settings_at_exit();
		measure(measurement);
		return 0;
	}

	return run_cases(argv + optind);
}
