// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stress test of gfn_to_pfn_caches: vCPUs, irqfds, timers and ioctls write to Xen's
 * shared_info and to vcpu_info, the times and the runstate of each vCPU, while
 * "chaos" threads drop, protect, remap, merge, compact and fork the pages, and
 * delete and create the memslot.
 *
 * The test fails if
 *
 * - KVM writes to a page that has been freed: a thread allocates pages all the
 *   time and checks that they stay zero;
 * - KVM writes to a page of a child of fork(): each child checks its copy;
 * - a chaos thread makes no progress, or any thread makes none at the end, when the
 *   chaos threads only drop pages and set shared_info to its old address;
 * - an event does not arrive after everything has stopped.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <asm/kvm_para.h>

#include "test_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "xen.h"

/* Arbitrarily chosen. */
#define SLOT		10
#define BASE_GPA	0xc0000000ull

#define PAGES_PER_VCPU	4
#define MAX_VCPUS	64
#define TIMER_PORT	100

static unsigned int nr_vcpus = 4;
static unsigned int nr_chaos = 2;
static unsigned int nr_ops = 300;
static unsigned int nr_secs;
static uint64_t end_ns;
static bool do_runstate;
static unsigned int seed;

static size_t page_size;
static size_t nr_pages;
static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[MAX_VCPUS];
static int irqfds[MAX_VCPUS];
static char *mem;
static bool stop;

static struct worker {
	const char *name;
	unsigned int nr;
	unsigned long rounds;
	sem_t calm;		/* posted by a chaos thread when its operations are done */
	pthread_t thread;
} *workers;
static unsigned int nr_workers;

/* Only one chaos thread at a time changes the mappings. */
static pthread_mutex_t map_lock = PTHREAD_MUTEX_INITIALIZER;
/* The chaos threads and main() meet here; after that, pages are only dropped. */
static pthread_barrier_t calm_barrier;

static bool stopped(void)
{
	return __atomic_load_n(&stop, __ATOMIC_RELAXED);
}

static void count(struct worker *w)
{
	__atomic_fetch_add(&w->rounds, 1, __ATOMIC_RELAXED);
}

static unsigned long rounds_of(struct worker *w)
{
	return __atomic_load_n(&w->rounds, __ATOMIC_RELAXED);
}

static void guest_code(void)
{
	for (;;) {
		/* The deadline is in the past, so the event is due at once. */
		xen_hypercall(__HYPERVISOR_set_timer_op, 1, 0);
		GUEST_SYNC(0);
	}
}

static uint64_t page_gpa(unsigned int nr)
{
	return BASE_GPA + nr * page_size;
}

static unsigned int vcpu_page(unsigned int vcpu)
{
	return 1 + vcpu * PAGES_PER_VCPU;
}

static void set_vcpu_attr(unsigned int i, uint16_t type, uint64_t gpa)
{
	struct kvm_xen_vcpu_attr attr = { .type = type, .u.gpa = gpa };

	/* May fail with EFAULT while the page is not mapped. */
	__vcpu_ioctl(vcpus[i], KVM_XEN_VCPU_SET_ATTR, &attr);
}

static void set_shinfo(uint64_t gfn)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = gfn,
	};

	__vm_ioctl(vm, KVM_XEN_HVM_SET_ATTR, &attr);
}

static void set_caches(unsigned int i)
{
	unsigned int nr = vcpu_page(i);

	set_vcpu_attr(i, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, page_gpa(nr));
	set_vcpu_attr(i, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, page_gpa(nr + 1));
	if (do_runstate)
		set_vcpu_attr(i, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, page_gpa(nr + 2));
}

static int send_event(unsigned int i, unsigned int port)
{
	return -xen_send_event(vm, port, i, KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL);
}

static void map_slot(size_t size)
{
	vm_set_user_memory_region(vm, SLOT, 0, BASE_GPA, size, mem);
}

static void create_vm(void)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND,
		.msr = XEN_HYPERCALL_MSR,
	};
	struct kvm_xen_hvm_attr lm = {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE,
		.u.long_mode = 1,
	};
	struct kvm_xen_vcpu_attr timer = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
	};
	struct kvm_irq_routing *routing;
	unsigned int i;

	vm = vm_create_with_vcpus(nr_vcpus, guest_code, vcpus);

	nr_pages = vcpu_page(nr_vcpus);
	mem = mmap(NULL, nr_pages * page_size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap(): %s", strerror(errno));
	map_slot(nr_pages * page_size);

	vm_ioctl(vm, KVM_XEN_HVM_CONFIG, &config);
	vm_ioctl(vm, KVM_XEN_HVM_SET_ATTR, &lm);
	set_shinfo(BASE_GPA / page_size);

	routing = calloc(1, sizeof(*routing) + nr_vcpus * sizeof(routing->entries[0]));
	TEST_ASSERT(routing, "calloc()");
	routing->nr = nr_vcpus;
	for (i = 0; i < nr_vcpus; i++) {
		routing->entries[i].gsi = 32 + i;
		routing->entries[i].type = KVM_IRQ_ROUTING_XEN_EVTCHN;
		routing->entries[i].u.xen_evtchn.port = 1 + i;
		routing->entries[i].u.xen_evtchn.vcpu = i;
		routing->entries[i].u.xen_evtchn.priority =
			KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
	}
	vm_ioctl(vm, KVM_SET_GSI_ROUTING, routing);
	free(routing);

	for (i = 0; i < nr_vcpus; i++) {
		set_caches(i);
		vcpu_set_msr(vcpus[i], MSR_KVM_SYSTEM_TIME_NEW,
			     page_gpa(vcpu_page(i) + 3) | KVM_MSR_ENABLED);

		timer.u.timer.port = TIMER_PORT + i;
		vcpu_ioctl(vcpus[i], KVM_XEN_VCPU_SET_ATTR, &timer);

		irqfds[i] = eventfd(0, EFD_NONBLOCK);
		TEST_ASSERT(irqfds[i] >= 0, "eventfd(): %s", strerror(errno));
		kvm_irqfd(vm, 32 + i, irqfds[i], 0);
	}
}

static void *vcpu_fn(void *arg)
{
	struct worker *w = arg;
	struct kvm_vcpu *vcpu = vcpus[w->nr];

	while (!stopped()) {
		vcpu_run(vcpu);
		TEST_ASSERT(vcpu->run->exit_reason == KVM_EXIT_IO,
			    "vCPU %u: expected exit reason %s, got %s", vcpu->id,
			    exit_reason_str(KVM_EXIT_IO),
			    exit_reason_str(vcpu->run->exit_reason));
		count(w);
	}
	return NULL;
}

static void *signal_fn(void *arg)
{
	struct worker *w = arg;
	uint64_t one = 1;
	unsigned int i;

	while (!stopped()) {
		for (i = 0; i < nr_vcpus; i++)
			TEST_ASSERT(write(irqfds[i], &one, sizeof(one)) == sizeof(one) ||
				    errno == EAGAIN, "write(eventfd): %s", strerror(errno));
		count(w);
		sched_yield();
	}
	return NULL;
}

static void *send_fn(void *arg)
{
	struct worker *w = arg;
	unsigned int i = 0;
	int ret;

	while (!stopped()) {
		ret = send_event(i % nr_vcpus, 200 + i % 64);
		TEST_ASSERT(!ret || ret == -EFAULT || ret == -EINVAL,
			    "KVM_XEN_HVM_EVTCHN_SEND: expected success, EFAULT or EINVAL, got %d",
			    ret);
		if (!ret)
			count(w);
		i++;
	}
	return NULL;
}

/* Fresh memory is zero, unless KVM writes to a page that it must not use any more. */
static void *fresh_fn(void *arg)
{
	struct worker *w = arg;
	size_t size = 64 * page_size;
	unsigned long *p;
	size_t i;

	while (!stopped()) {
		p = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		TEST_ASSERT(p != MAP_FAILED, "mmap(): %s", strerror(errno));
		sched_yield();
		for (i = 0; i < size / sizeof(*p); i++)
			TEST_ASSERT(!p[i],
				    "KVM wrote %#lx, at offset %#lx, to a page that had been freed",
				    p[i], i * sizeof(*p) % page_size);
		munmap(p, size);
		count(w);
	}
	return NULL;
}

static unsigned long checksum(void)
{
	unsigned long *p = (void *)mem, sum = 0;
	size_t i;

	for (i = 0; i < nr_pages * page_size / sizeof(*p); i++)
		sum = sum * 31 + p[i];
	return sum;
}

static void fork_and_check(void)
{
	unsigned long sum;
	int status, i;
	pid_t pid;

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork(): %s", strerror(errno));
	if (!pid) {
		sum = checksum();
		for (i = 0; i < 5; i++) {
			sched_yield();
			if (checksum() != sum)
				_exit(1);
		}
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid, "waitpid(): %s", strerror(errno));
	TEST_ASSERT(!status, "child of fork() expected an unchanged copy, ended with status %#x",
		    status);
}

static void write_file(const char *path, const char *text)
{
	TEST_ASSERT(write_text(path, text), "write \"%s\" to %s: %s", text, path,
		    strerror(errno));
}

static void check(int ret, const char *what)
{
	TEST_ASSERT(!ret, "%s: %s", what, strerror(errno));
}

static bool chaos_ends(unsigned int op)
{
	return nr_secs ? now_ns() >= end_ns : op == nr_ops;
}

static void *chaos_fn(void *arg)
{
	struct worker *w = arg;
	unsigned int state = seed + w->nr;
	unsigned int op, nr, n, i;
	size_t size;
	char *p;

	for (op = 0; !chaos_ends(op); op++, count(w)) {
		nr = rand_r(&state) % nr_pages;
		n = 1 + rand_r(&state) % (nr_pages - nr);
		p = mem + nr * page_size;
		size = n * page_size;
		i = rand_r(&state) % nr_vcpus;

		switch (rand_r(&state) % 16) {
		case 0 ... 5:
			check(madvise(p, size, MADV_DONTNEED), "MADV_DONTNEED");
			break;
		case 6 ... 7:
			pthread_mutex_lock(&map_lock);
			check(mprotect(p, size, rand_r(&state) % 2 ? PROT_READ : PROT_NONE),
			      "mprotect()");
			sched_yield();
			check(mprotect(mem, nr_pages * page_size, PROT_READ | PROT_WRITE),
			      "mprotect()");
			pthread_mutex_unlock(&map_lock);
			break;
		case 8:
			pthread_mutex_lock(&map_lock);
			TEST_ASSERT(mmap(p, size, PROT_READ | PROT_WRITE,
					 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p,
				    "mmap(): %s", strerror(errno));
			pthread_mutex_unlock(&map_lock);
			break;
		case 9 ... 10:
			pthread_mutex_lock(&map_lock);
			fork_and_check();
			pthread_mutex_unlock(&map_lock);
			break;
		case 11:
			check(madvise(p, size, MADV_MERGEABLE), "MADV_MERGEABLE");
			break;
		case 12:
			write_file("/proc/sys/vm/compact_memory", "1");
			break;
		case 13:
			pthread_mutex_lock(&map_lock);
			map_slot(0);
			sched_yield();
			map_slot(nr_pages * page_size);
			pthread_mutex_unlock(&map_lock);
			break;
		case 14:
			set_shinfo(GPA_INVALID);
			sched_yield();
			set_shinfo(BASE_GPA / page_size);
			break;
		case 15:
			set_vcpu_attr(i, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, GPA_INVALID);
			set_caches(i);
			break;
		}
	}

	/* From now on, keep the memslot and the caches, and only drop the pages. */
	sem_post(&w->calm);
	pthread_barrier_wait(&calm_barrier);
	for (; !stopped(); count(w)) {
		check(madvise(mem, nr_pages * page_size, MADV_DONTNEED), "MADV_DONTNEED");
		set_shinfo(BASE_GPA / page_size);
		sched_yield();
	}
	return NULL;
}

static unsigned long pending(unsigned int port)
{
	unsigned long *bits = (void *)(mem + XEN_SHINFO_PENDING);

	return __atomic_load_n(&bits[port / 64], __ATOMIC_SEQ_CST) >> port % 64 & 1;
}

static void create(const char *name, unsigned int nr, void *(*fn)(void *))
{
	struct worker *w = &workers[nr_workers++];

	w->name = name;
	w->nr = nr;
	sem_init(&w->calm, 0, 0);
	w->thread = start_thread(fn, w);
}

/* Wait until @w has done its operations, however long it takes to do all of them. */
static void wait_for_calm(struct worker *w)
{
	struct timespec limit;
	unsigned long before;

	do {
		before = rounds_of(w);
		clock_gettime(CLOCK_REALTIME, &limit);
		limit.tv_sec += WAIT_LIMIT_SECS;
		if (!sem_timedwait(&w->calm, &limit))
			return;
	} while (errno == EINTR || rounds_of(w) != before);

	TEST_FAIL("%s %u: expected more than %lu operations after another %d s, got no more",
		  w->name, w->nr, before, WAIT_LIMIT_SECS);
}

/* Wait for two rounds: the first one may have begun before now, the second not. */
static void expect_progress(struct worker *w)
{
	unsigned long before = rounds_of(w);

	__wait_for(rounds_of(w) >= before + 2,
		   "%s %u: expected %lu rounds within %d s, got %lu, with %lu before",
		   w->name, w->nr, before + 2, WAIT_LIMIT_SECS, rounds_of(w), before);
}

static unsigned long sum_rounds(unsigned int first, unsigned int n)
{
	unsigned long sum = 0;

	while (n--)
		sum += workers[first + n].rounds;
	return sum;
}

static void usage(const char *name)
{
	printf("Usage: %s [-h] [-r] [-c threads] [-n operations] [-s seed] [-t seconds]\n"
	       "       [-v vcpus]\n"
	       " -c: chaos threads, which change the memory (default: %u)\n"
	       " -n: operations of each chaos thread (default: %u)\n"
	       " -r: write runstates too\n"
	       " -s: seed (default: random)\n"
	       " -t: run for so many seconds, instead of -n\n"
	       " -v: vCPUs, up to %u (default: %u)\n",
	       name, nr_chaos, nr_ops, MAX_VCPUS, nr_vcpus);
	exit(KSFT_FAIL);
}

int main(int argc, char *argv[])
{
	unsigned int i, first_chaos;
	unsigned long nr_done;
	uint64_t one = 1;
	int opt, ret;

	TEST_ASSERT(getrandom(&seed, sizeof(seed), 0) == sizeof(seed), "getrandom()");

	while ((opt = getopt(argc, argv, "c:hn:rs:t:v:")) != -1) {
		switch (opt) {
		case 'c':
			nr_chaos = atoi(optarg);
			break;
		case 'n':
			nr_ops = atoi(optarg);
			break;
		case 'r':
			do_runstate = true;
			break;
		case 's':
			seed = strtoul(optarg, NULL, 0);
			break;
		case 't':
			nr_secs = atoi(optarg);
			break;
		case 'v':
			nr_vcpus = atoi(optarg);
			TEST_ASSERT(nr_vcpus >= 1 && nr_vcpus <= MAX_VCPUS,
				    "expected 1 to %d vCPUs, got %s", MAX_VCPUS, optarg);
			break;
		default:
			usage(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND);

	page_size = getpagesize();
	printf("seed %#x, %u vCPUs, %u threads of %u %s\n", seed, nr_vcpus, nr_chaos,
	       nr_secs ?: nr_ops, nr_secs ? "seconds" : "operations");

	create_vm();
	write_file("/sys/kernel/mm/ksm/run", "1");

	workers = calloc(nr_vcpus + 3 + nr_chaos, sizeof(*workers));
	TEST_ASSERT(workers, "calloc()");
	pthread_barrier_init(&calm_barrier, NULL, nr_chaos + 1);

	for (i = 0; i < nr_vcpus; i++)
		create("vCPU", i, vcpu_fn);
	create("signaller", 0, signal_fn);
	create("sender", 0, send_fn);
	create("watcher of fresh pages", 0, fresh_fn);

	end_ns = now_ns() + nr_secs * 1000000000ull;
	first_chaos = nr_workers;
	for (i = 0; i < nr_chaos; i++)
		create("chaos thread", i, chaos_fn);
	for (i = 0; i < nr_chaos; i++)
		wait_for_calm(&workers[first_chaos + i]);
	nr_done = sum_rounds(first_chaos, nr_chaos);

	/* From now on pages are only dropped: each thread must make progress. */
	set_shinfo(BASE_GPA / page_size);
	for (i = 0; i < nr_vcpus; i++)
		set_caches(i);
	pthread_barrier_wait(&calm_barrier);
	for (i = 0; i < nr_workers; i++)
		expect_progress(&workers[i]);

	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (i = 0; i < nr_workers; i++)
		join_thread(workers[i].thread, workers[i].name);
	write_file("/sys/kernel/mm/ksm/run", "2");

	/* Everything has stopped: each event must arrive. */
	set_shinfo(BASE_GPA / page_size);
	memset(mem, 0, nr_pages * page_size);
	for (i = 0; i < nr_vcpus; i++) {
		set_caches(i);
		ret = send_event(i, 300 + i);
		TEST_ASSERT(!ret, "KVM_XEN_HVM_EVTCHN_SEND: expected 0, got %d", ret);
		TEST_ASSERT(pending(300 + i), "expected port %u pending, it is not", 300 + i);

		TEST_ASSERT(write(irqfds[i], &one, sizeof(one)) == sizeof(one),
			    "write(eventfd): %s", strerror(errno));
		wait_for(pending(1 + i));
	}

	printf("%lu operations, %lu signals, %lu sends, %lu runs\n", nr_done,
	       sum_rounds(nr_vcpus, 1), sum_rounds(nr_vcpus + 1, 1), sum_rounds(0, nr_vcpus));
	kvm_vm_free(vm);
	return 0;
}
