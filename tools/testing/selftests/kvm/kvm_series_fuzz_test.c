// SPDX-License-Identifier: GPL-2.0-only
/*
 * A fuzzer of KVM's ioctls, guest interfaces and memory, all at the same time.
 *
 * Other tests check what their author thought of.  This one does not know what a call
 * should do.  It makes calls in any order, from several threads, with valid, boundary
 * and wild arguments, and checks what has to be true after any of them:
 *
 * - each call returns, and in particular each change of the memslots;
 * - no thread stays in uninterruptible sleep;
 * - each VM can be destroyed, also by SIGKILL while all of its threads are busy;
 * - the kernel uses no more memory than before once the VMs are gone.  The test measures
 *   the whole machine, so nothing else should run on it.
 *
 * The kernel's own checks (KASAN, lockdep, warnings) find the rest.
 *
 * The case random_calls consists of rounds.  Each round runs in a child process:
 *
 * - vCPU threads run a guest that accesses memory, makes hypercalls and sends events
 *   (x86-64), or sends ITS commands (arm64), with random arguments, and they make vCPU
 *   ioctls; one vCPU may never run;
 * - fuzz threads make VM, vCPU and device ioctls;
 * - a chaos thread drops, protects and replaces guest memory, and forks;
 * - a userfaultfd thread provides missing pages, but late: after other threads have
 *   made some more calls;
 * - the main thread sends signals to all threads that make ioctls.
 *
 * The parent watches the calls of the child in shared memory and reports the one that
 * does not return, with its arguments and the kernel stacks of all threads.
 *
 * The seed determines the random numbers of each thread and of each vCPU of the guest.
 * The calls also depend on how the threads interleave, and on the order in which the
 * compiler evaluates random choices.  The seed of a round is that of the test plus
 * the number of the round: "-s SEED+n -r 1" repeats round n with the same numbers.
 *
 * A run that does nothing finds nothing.  So the test fails if the guests made no
 * progress, if no page was provided, or if a call that was made often never succeeded.
 *
 * The other cases are short sequences that trigger known bugs of the kind that the fuzzer
 * looks for.  apf_ack_memslot and lpi_unmap_memory show that its checks detect such bugs.
 * apf_refused and xen_vcpu_info_vector check the result themselves.  random_calls found
 * the bug that apf_refused triggers.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <dirent.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "uffd.h"

#ifdef __x86_64__
#include <asm/kvm_para.h>
#include "apic.h"
#include "hyperv.h"
#include "xen.h"
#else
#include "gic.h"
#include "gic_v3.h"
#include "gic_v3_its.h"
#include "vgic.h"
#endif

#ifndef MADV_COLD
#define MADV_COLD		20
#define MADV_PAGEOUT		21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ	22
#define MADV_POPULATE_WRITE	23
#endif

#define NR_VCPUS	3
#define NR_FUZZERS	3
#define NR_IRQFDS	8

/*
 * The guest physical window in which memslots come and go, identity mapped.  Half of
 * the accesses go to its first pages, which Xen, Hyper-V and clocks use as well.
 */
#define WINDOW_GPA	0xc0000000ul
#define WINDOW_PAGES	256
#define HOT_PAGES	16
#define PAGE_BYTES	4096ul
#define WINDOW_SIZE	(WINDOW_PAGES * PAGE_BYTES)

/* The page of the asynchronous page faults' reason and token, set by the guest. */
#define APF_GPA		(WINDOW_GPA + 3 * PAGE_BYTES)

/* Slots of the window; the library uses those below. */
#define FIRST_SLOT	20
#define NR_SLOTS	8

/* The pages of each kind of memory for which userfaultfd is used, some of them hot */
#define FIRST_UFFD_PAGE	12
#define UFFD_PAGES	36

static uint64_t seed;
static unsigned int budget_secs = 5;
static unsigned int max_rounds;
static unsigned int bound_secs = 20;
static bool verbose;

/*
 * Shared by the case's process, which watches, and by its child.
 */

enum thread_kind {
	VCPU_THREAD,
	FUZZ_THREAD,
	CHAOS_THREAD,
	UFFD_THREAD,
	MAIN_THREAD,
};

#define NR_THREADS	(NR_VCPUS + NR_FUZZERS + 3)
#define NR_ARGS		4
#define MAX_OPS		96
#define NR_EXIT_REASONS	64

struct thread {
	enum thread_kind kind;
	unsigned int nr;
	uint64_t random;
	pthread_t pthread;
	pid_t tid;
	bool ended;

	/* The call in progress, if start_ns is not 0, or the last one */
	unsigned int op;
	const char *call;
	uint64_t args[NR_ARGS];
	uint64_t start_ns;
	uint64_t calls;
};

/* One of the random calls */
struct op {
	void (*fn)(struct thread *t);
	const char *name;
	unsigned int weight;
};

struct op_count {
	uint64_t calls;
	uint64_t successes;
	uint64_t ns;
};

static struct shared {
	struct thread threads[NR_THREADS];
	struct op_count counts[MAX_OPS];
	uint64_t exits[NR_EXIT_REASONS];
	uint64_t guest_ops;
	uint64_t pages_provided;
	uint64_t round_seed;
	uint64_t rounds;
	bool kills_itself;
} *shared;

/* State of the child, not shared */
static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[NR_VCPUS];
static bool stop;
static int memfd;
static char *anon_mem, *shmem;
static int uffd = -1;
static bool uffd_stop;
static int irqfds[NR_IRQFDS];

/*
 * Random choices
 */

static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Neighbouring seeds have to give unrelated sequences. */
static uint64_t random_init(uint64_t value, uint64_t stream)
{
	uint64_t x = (value + 1) * 0x9e3779b97f4a7c15ull + stream * 0xbf58476d1ce4e5b9ull;

	x = (x ^ (x >> 31)) * 0x94d049bb133111ebull;
	return (x ^ (x >> 29)) | 1;
}

static uint64_t rnd(struct thread *t, uint64_t nr)
{
	return (random_next(&t->random) >> 8) % nr;
}

static bool one_in(struct thread *t, uint64_t nr)
{
	return !rnd(t, nr);
}

#define pick(t, array)	((array)[rnd(t, ARRAY_SIZE(array))])

static uint64_t wild(struct thread *t)
{
	static const uint64_t values[] = {
		0, 1, 2, 7, 8, 63, 64, 255, 256, 1023, 1024, 4095, 4096, 4097, 65535,
		0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, 1ull << 52,
		1ull << 63, ~0ull - 4095, ~0ull - 7, ~0ull - 1, ~0ull,
	};

	return one_in(t, 2) ? pick(t, values) : random_next(&t->random) >> rnd(t, 64);
}

/* A number below @nr most of the time */
static uint64_t near(struct thread *t, uint64_t nr)
{
	return one_in(t, 16) ? wild(t) : rnd(t, nr);
}

static uint64_t window_gpa(struct thread *t)
{
	uint64_t page = rnd(t, one_in(t, 2) ? HOT_PAGES : WINDOW_PAGES);
	uint64_t offset = 0;

	switch (rnd(t, 4)) {
	case 0:
		offset = rnd(t, PAGE_BYTES / 64) * 64;
		break;
	case 1:
		offset = rnd(t, PAGE_BYTES);
		break;
	case 2:
		offset = PAGE_BYTES - rnd(t, 80);
		break;
	}
	return WINDOW_GPA + page * PAGE_BYTES + offset;
}

static uint64_t gpa(struct thread *t)
{
	return one_in(t, 16) ? wild(t) : window_gpa(t);
}

static char *mem_page(struct thread *t)
{
	return (one_in(t, 2) ? anon_mem : shmem) + rnd(t, WINDOW_PAGES) * PAGE_BYTES;
}

/* An address in the memory that the guest may overwrite, or one that is never mapped */
static uint64_t hva(struct thread *t)
{
	static const uint64_t invalid[] = {
		0, 0xffff800000000000ull, 0xffffffff81000000ull, ~0ull, ~0ull - 4095,
		1ull << 47, 1ull << 63,
	};

	if (one_in(t, 16))
		return pick(t, invalid);
	return (uint64_t)mem_page(t) + (one_in(t, 8) ? rnd(t, PAGE_BYTES) : 0);
}

/*
 * Calls
 */

static void count(uint64_t *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

static bool stopped(void)
{
	return __atomic_load_n(&stop, __ATOMIC_RELAXED);
}

static void begin_call(struct thread *t, const char *call, const uint64_t *args)
{
	t->call = call;
	memcpy(t->args, args, sizeof(t->args));
	__atomic_store_n(&t->start_ns, now_ns(), __ATOMIC_RELEASE);
}

static void end_call(struct thread *t, bool success)
{
	struct op_count *c = &shared->counts[t->op];

	count(&t->calls);
	count(&c->calls);
	if (success)
		count(&c->successes);
	__atomic_fetch_add(&c->ns, now_ns() - t->start_ns, __ATOMIC_RELAXED);
	__atomic_store_n(&t->start_ns, 0, __ATOMIC_RELEASE);
}

static int do_call(struct thread *t, int fd, unsigned long cmd, const char *name,
		   void *arg, const uint64_t *args)
{
	int ret, err;

	begin_call(t, name, args);
	ret = ioctl(fd, cmd, arg);
	err = errno;
	end_call(t, ret >= 0);
	errno = err;
	return ret;
}

#define ARGS(...)	((uint64_t[NR_ARGS]) { __VA_ARGS__ })

/* Make an ioctl.  Up to NR_ARGS numbers describe it in reports. */
#define CALL(t, fd, cmd, arg, ...)						\
	do_call(t, fd, cmd, #cmd, (void *)(uintptr_t)(arg), ARGS(__VA_ARGS__))

static uint64_t all_calls(void)
{
	uint64_t calls = 0;
	int i;

	for (i = 0; i < NR_THREADS; i++)
		calls += __atomic_load_n(&shared->threads[i].calls, __ATOMIC_RELAXED);
	return calls;
}

/* A vCPU; a vCPU thread prefers its own. */
static struct kvm_vcpu *any_vcpu(struct thread *t)
{
	if (t->kind == VCPU_THREAD && !one_in(t, 8))
		return vcpus[t->nr];
	return vcpus[rnd(t, NR_VCPUS)];
}

/*
 * Memslots
 */

/*
 * A slot with many pages needs much memory for its metadata: sizes are small, or larger
 * than KVM accepts.
 */
static uint64_t slot_size(struct thread *t)
{
	switch (rnd(t, 8)) {
	case 0:
	case 1:
		return 0;
	case 2:
		return one_in(t, 2) ? rnd(t, 8 * PAGE_BYTES) : wild(t) | BIT_ULL(44);
	default:
		return (1 + rnd(t, one_in(t, 4) ? WINDOW_PAGES : 8)) * PAGE_BYTES;
	}
}

static uint32_t slot_id(struct thread *t)
{
	uint32_t slot;

	if (!one_in(t, 16))
		return FIRST_SLOT + rnd(t, NR_SLOTS);
	do {
		slot = one_in(t, 2) ? rnd(t, 4) << 16 | rnd(t, 64) : wild(t);
	} while ((uint16_t)slot < FIRST_SLOT);
	return slot;
}

static struct kvm_userspace_memory_region random_region(struct thread *t)
{
	struct kvm_userspace_memory_region r = {
		.slot = slot_id(t),
		.guest_phys_addr = WINDOW_GPA + rnd(t, WINDOW_PAGES) * PAGE_BYTES,
		.memory_size = slot_size(t),
		.userspace_addr = hva(t),
	};

	if (one_in(t, 4))
		r.flags = one_in(t, 8) ? wild(t) : rnd(t, 4);
	if (one_in(t, 16))
		r.guest_phys_addr = one_in(t, 2) ? wild(t) : wild(t) & ~(PAGE_BYTES - 1);
	return r;
}

static void set_region(struct thread *t, struct kvm_userspace_memory_region *r)
{
	CALL(t, vm->fd, KVM_SET_USER_MEMORY_REGION, r, r->slot | (uint64_t)r->flags << 32,
	     r->guest_phys_addr, r->memory_size, r->userspace_addr);
}

static void op_set_region(struct thread *t)
{
	struct kvm_userspace_memory_region r = random_region(t);

	set_region(t, &r);
}

struct regions {
	struct kvm_userspace_memory_regions head;
	struct kvm_userspace_memory_region entries[130];
};

static void set_regions(struct thread *t, struct regions *r)
{
	CALL(t, vm->fd, KVM_SET_USER_MEMORY_REGIONS, r, r->head.nent,
	     r->entries[0].slot | (uint64_t)r->entries[0].flags << 32,
	     r->entries[0].guest_phys_addr, r->entries[0].memory_size);
}

static void change_region(struct thread *t, struct kvm_userspace_memory_region *r)
{
	switch (rnd(t, 6)) {
	case 0:
	case 1:
		r->memory_size = 0;
		break;
	case 2:
		r->guest_phys_addr += WINDOW_SIZE;
		break;
	case 3:
		r->userspace_addr = hva(t);
		break;
	case 4:
		r->memory_size = slot_size(t);
		break;
	case 5:
		r->flags = near(t, 4);
		break;
	}
}

/*
 * Divide the window, or a part of it, among the slots.  A gpa has the same offset in the
 * memory in every such layout.
 */
static void op_set_layout(struct thread *t)
{
	uint64_t page = 0, end = one_in(t, 2) ? WINDOW_PAGES : 1 + rnd(t, WINDOW_PAGES);
	struct regions r = { .head.nent = NR_SLOTS, .head.entry_size = sizeof(r.entries[0]) };
	char *mem = one_in(t, 2) ? anon_mem : shmem;
	uint32_t flags = one_in(t, 2) ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	uint32_t first = rnd(t, NR_SLOTS);
	int i;

	end = max_t(uint64_t, end, NR_SLOTS);
	for (i = 0; i < NR_SLOTS; i++) {
		uint64_t left = end - page - (NR_SLOTS - 1 - i);
		uint64_t nr = i == NR_SLOTS - 1 ? left : 1 + rnd(t, left);

		r.entries[i] = (struct kvm_userspace_memory_region) {
			.slot = FIRST_SLOT + (first + i) % NR_SLOTS,
			.flags = one_in(t, 8) ? KVM_MEM_READONLY : flags,
			.guest_phys_addr = WINDOW_GPA + page * PAGE_BYTES,
			.memory_size = nr * PAGE_BYTES,
			.userspace_addr = (uint64_t)mem + page * PAGE_BYTES,
		};
		page += nr;
	}
	if (one_in(t, 3))
		change_region(t, &r.entries[rnd(t, NR_SLOTS)]);
	set_regions(t, &r);
}

static void create_window(struct thread *t)
{
	virt_map(vm, WINDOW_GPA, WINDOW_GPA, WINDOW_SIZE / vm->page_size);
	op_set_layout(t);
}

static void op_set_regions(struct thread *t)
{
	struct regions r = {};
	int i;

	if (one_in(t, 32))
		r.head.nent = wild(t);
	else
		r.head.nent = one_in(t, 16) ? 120 + rnd(t, 11) : rnd(t, 6);
	/*
	 * KVM must not read beyond the structure.  Make a larger number so large that
	 * KVM refuses it.
	 */
	if (r.head.nent > ARRAY_SIZE(r.entries))
		r.head.nent |= BIT(20);
	/* An entry that is not set would delete slot 0, which has the guest's code. */
	for (i = 0; i < ARRAY_SIZE(r.entries) && i < r.head.nent; i++)
		r.entries[i] = random_region(t);
	r.head.as_id = one_in(t, 32) ? wild(t) : 0;
	r.head.flags = one_in(t, 32) ? wild(t) : 0;
	r.head.entry_size = one_in(t, 32) ? rnd(t, sizeof(r.entries[0])) : sizeof(r.entries[0]);
	r.head.pad = one_in(t, 32) ? wild(t) : 0;
	set_regions(t, &r);
}

static void op_delete_regions(struct thread *t)
{
	struct kvm_userspace_memory_region r = { .slot = FIRST_SLOT + rnd(t, NR_SLOTS) };

	set_region(t, &r);
}

static void op_dirty_log(struct thread *t)
{
	/* Room for a bit per page of the largest slot, and for a word more */
	uint64_t bitmap[WINDOW_PAGES / 64 + 1];
	struct kvm_dirty_log get = { .slot = slot_id(t), .dirty_bitmap = bitmap };
	struct kvm_clear_dirty_log clear = {
		.slot = slot_id(t), .dirty_bitmap = bitmap,
		.first_page = near(t, WINDOW_PAGES) & ~63ull,
		.num_pages = rnd(t, WINDOW_PAGES),
	};

	memset(bitmap, 0xff, sizeof(bitmap));
	if (one_in(t, 2))
		CALL(t, vm->fd, KVM_GET_DIRTY_LOG, &get, get.slot);
	else
		CALL(t, vm->fd, KVM_CLEAR_DIRTY_LOG, &clear, clear.slot,
		     clear.first_page, clear.num_pages);
}

/*
 * Interrupts and events
 */

static void op_irqfd(struct thread *t)
{
	struct kvm_irqfd irqfd = {
		.fd = pick(t, irqfds),
		.gsi = near(t, 64),
		.flags = one_in(t, 2) ? KVM_IRQFD_FLAG_DEASSIGN : 0,
	};

	if (one_in(t, 8)) {
		irqfd.flags |= KVM_IRQFD_FLAG_RESAMPLE;
		irqfd.resamplefd = pick(t, irqfds);
	}
	if (one_in(t, 32))
		irqfd.flags = wild(t);
	CALL(t, vm->fd, KVM_IRQFD, &irqfd, irqfd.fd, irqfd.gsi, irqfd.flags);
}

static void op_signal_irqfd(struct thread *t)
{
	uint64_t one = 1;
	int fd = pick(t, irqfds);

	begin_call(t, "write(irqfd)", ARGS(fd));
	end_call(t, write(fd, &one, sizeof(one)) == sizeof(one));
}

static void op_ioeventfd(struct thread *t)
{
	static const uint32_t sizes[] = { 0, 1, 2, 4, 8, 3 };
	struct kvm_ioeventfd io = {
		.datamatch = wild(t), .addr = gpa(t), .len = pick(t, sizes),
		.fd = pick(t, irqfds), .flags = rnd(t, 16),
	};

	if (io.flags & KVM_IOEVENTFD_FLAG_PIO)
		io.addr = rnd(t, 0x2000);
	CALL(t, vm->fd, KVM_IOEVENTFD, &io, io.addr, io.len, io.flags);
}

static void op_irq_line(struct thread *t)
{
	struct kvm_irq_level level = { .level = rnd(t, 2) };

#ifdef __aarch64__
	level.irq = rnd(t, 4) << KVM_ARM_IRQ_TYPE_SHIFT |
		    rnd(t, NR_VCPUS + 1) << KVM_ARM_IRQ_VCPU_SHIFT | near(t, 128);
#else
	level.irq = near(t, 64);
#endif
	CALL(t, vm->fd, KVM_IRQ_LINE, &level, level.irq, level.level);
}

static struct kvm_irq_routing_entry random_route(struct thread *t);

#define MAX_ROUTES	64

static void op_gsi_routing(struct thread *t)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry entries[MAX_ROUTES];
	} r = { .head.nr = rnd(t, one_in(t, 8) ? MAX_ROUTES : 8) };
	int i;

	for (i = 0; i < r.head.nr; i++) {
		r.entries[i] = random_route(t);
		/* Mostly one route for each GSI, as KVM requires for all but irqchips */
		r.entries[i].gsi = one_in(t, 32) ? near(t, 64) : i;
	}
	if (one_in(t, 32))
		r.head.flags = wild(t);
	CALL(t, vm->fd, KVM_SET_GSI_ROUTING, &r, r.head.nr, r.entries[0].type,
	     r.entries[0].gsi);
}

static void op_signal_msi(struct thread *t)
{
	struct kvm_irq_routing_entry e = random_route(t);
	struct kvm_msi msi = {
		.address_lo = e.u.msi.address_lo, .address_hi = e.u.msi.address_hi,
		.data = e.u.msi.data, .devid = e.u.msi.devid,
		.flags = one_in(t, 8) ? wild(t) : KVM_MSI_VALID_DEVID,
	};

#ifndef __aarch64__
	if (!one_in(t, 8))
		msi.flags = 0;
#endif
	CALL(t, vm->fd, KVM_SIGNAL_MSI, &msi, msi.address_lo, msi.data, msi.devid,
	     msi.flags);
}

/*
 * Other ioctls of both architectures
 */

static void op_stats(struct thread *t)
{
	char buf[1024];
	int fd;

	fd = CALL(t, one_in(t, 2) ? vm->fd : any_vcpu(t)->fd, KVM_GET_STATS_FD, NULL);
	if (fd < 0)
		return;
	begin_call(t, "pread(stats)", ARGS(fd));
	end_call(t, pread(fd, buf, 1 + rnd(t, sizeof(buf)), near(t, 8192) & INT64_MAX) >= 0);
	close(fd);
}

static void run_vcpu(struct thread *t, struct kvm_vcpu *vcpu)
{
	uint32_t reason;

	vcpu->run->immediate_exit = one_in(t, 16);
	if (CALL(t, vcpu->fd, KVM_RUN, NULL, vcpu->id, vcpu->run->immediate_exit))
		return;
	reason = vcpu->run->exit_reason;
	if (reason < NR_EXIT_REASONS)
		count(&shared->exits[reason]);
}

static void op_run(struct thread *t)
{
	run_vcpu(t, any_vcpu(t));
}

static void op_mp_state(struct thread *t)
{
	struct kvm_mp_state state = { .mp_state = one_in(t, 4) ? near(t, 11) : 0 };
	struct kvm_vcpu *vcpu = any_vcpu(t);

	if (one_in(t, 4))
		CALL(t, vcpu->fd, KVM_GET_MP_STATE, &state, vcpu->id);
	else
		CALL(t, vcpu->fd, KVM_SET_MP_STATE, &state, vcpu->id, state.mp_state);
}

static void op_guest_debug(struct thread *t)
{
	struct kvm_guest_debug debug = {
		.control = one_in(t, 4) ? wild(t) : rnd(t, 4) | rnd(t, 4) << 16,
	};
	struct kvm_vcpu *vcpu = any_vcpu(t);

	CALL(t, vcpu->fd, KVM_SET_GUEST_DEBUG, &debug, vcpu->id, debug.control);
}

static void op_create_vcpu(struct thread *t)
{
	/* The vCPU stays, so create few of them. */
	uint32_t id = one_in(t, 8) ? NR_VCPUS + rnd(t, 3) : wild(t) | 4096;
	int fd;

	fd = CALL(t, vm->fd, KVM_CREATE_VCPU, id, id);
	if (fd >= 0)
		close(fd);
}

static void op_check_extension(struct thread *t)
{
	uint64_t cap = one_in(t, 4) ? KVM_CAP_HYPERV_TLB_FLUSH_INHIBIT + rnd(t, 4) :
				      rnd(t, 230);

	CALL(t, vm->fd, KVM_CHECK_EXTENSION, cap, cap);
}

static void device_attr(struct thread *t, int fd, uint32_t group, uint64_t attr)
{
	uint64_t value[4] = { one_in(t, 2) ? gpa(t) : wild(t) };
	struct kvm_device_attr a = {
		.group = group, .attr = attr, .addr = (uintptr_t)value,
		.flags = one_in(t, 64) ? wild(t) : 0,
	};

	switch (rnd(t, 4)) {
	case 0:
		CALL(t, fd, KVM_HAS_DEVICE_ATTR, &a, group, attr);
		break;
	case 1:
		CALL(t, fd, KVM_GET_DEVICE_ATTR, &a, group, attr);
		break;
	default:
		CALL(t, fd, KVM_SET_DEVICE_ATTR, &a, group, attr, value[0]);
	}
}

static void op_device_attr(struct thread *t)
{
	device_attr(t, one_in(t, 2) ? vm->fd : any_vcpu(t)->fd, near(t, 4), near(t, 4));
}

/*
 * Guest
 */

static uint64_t guest_gpa(uint64_t r)
{
	uint64_t page = r & 1 ? (r >> 1) % HOT_PAGES : (r >> 1) % WINDOW_PAGES;

	return WINDOW_GPA + page * PAGE_BYTES + ((r >> 16) & (PAGE_BYTES - 8) & ~7ull);
}

static void guest_op(uint64_t r, uint64_t *state);

/* The progress of each vCPU, counted by the guest */
static uint64_t guest_ops[NR_VCPUS];

static void __noreturn guest_fuzz(uint64_t state, uint64_t nr)
{
	for (;;) {
		uint64_t r = random_next(&state) >> 8;
		uint64_t *p = (void *)guest_gpa(random_next(&state));

		switch (r & 15) {
		case 0 ... 1:
			WRITE_ONCE(*p, random_next(&state));
			break;
		case 2:
			READ_ONCE(*p);
			break;
		case 3:
			if (!(r & 0x30))
				GUEST_SYNC(1);
			break;
		default:
			guest_op(r >> 4, &state);
		}
		WRITE_ONCE(guest_ops[nr], guest_ops[nr] + 1);
	}
}

#ifdef __x86_64__

/*
 * x86-64: Xen, Hyper-V and KVM's own paravirtual interfaces
 */

/* Arbitrarily chosen */
#define UPCALL_VECTOR		0x31
#define APF_VECTOR		0x40
#define XEN_MSR			0x40000200
#define NR_PORTS		131072
#define RFLAGS_IF		BIT(9)

static struct kvm_regs first_regs[NR_VCPUS];
static struct kvm_sregs first_sregs[NR_VCPUS];
static struct kvm_lapic_state first_lapic[NR_VCPUS];

/* A port: mostly one of the few that events are sent to, or a limit */
static uint32_t port(struct thread *t)
{
	static const uint32_t limits[] = {
		0, 1, 31, 32, 63, 64, 1023, 1024, 4095, 4096, NR_PORTS - 1, NR_PORTS,
	};

	switch (rnd(t, 8)) {
	case 0:
		return pick(t, limits);
	case 1:
		return wild(t);
	case 2:
		return rnd(t, NR_PORTS);
	default:
		return 1 + rnd(t, 200);
	}
}

static uint32_t priority(struct thread *t)
{
	return one_in(t, 2) ? KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL : near(t, 16);
}

static struct kvm_irq_routing_xen_evtchn xen_event(struct thread *t)
{
	return (struct kvm_irq_routing_xen_evtchn) {
		.port = port(t), .vcpu = near(t, NR_VCPUS), .priority = priority(t),
	};
}

static struct kvm_irq_routing_entry random_route(struct thread *t)
{
	struct kvm_irq_routing_entry e = {};

	switch (rnd(t, 8)) {
	case 0:
		e.type = KVM_IRQ_ROUTING_IRQCHIP;
		e.u.irqchip.irqchip = near(t, 3);
		e.u.irqchip.pin = near(t, 24);
		break;
	case 1:
	case 2:
		e.type = KVM_IRQ_ROUTING_MSI;
		e.u.msi.address_lo = 0xfee00000 | rnd(t, NR_VCPUS + 1) << 12 | rnd(t, 16);
		e.u.msi.data = near(t, 256) | rnd(t, 8) << 8;
		break;
	case 3:
		e.type = KVM_IRQ_ROUTING_HV_SINT;
		e.u.hv_sint.vcpu = near(t, NR_VCPUS);
		e.u.hv_sint.sint = near(t, 16);
		break;
	default:
		e.type = KVM_IRQ_ROUTING_XEN_EVTCHN;
		e.u.xen_evtchn = xen_event(t);
	}
	if (one_in(t, 64))
		e.type = wild(t);
	return e;
}

static void op_xen_config(struct thread *t)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
			 KVM_XEN_HVM_CONFIG_EVTCHN_SEND |
			 (one_in(t, 2) ? KVM_XEN_HVM_CONFIG_EVTCHN_FIFO : 0) |
			 (one_in(t, 2) ? KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE : 0),
		.msr = XEN_MSR,
	};

	if (one_in(t, 8))
		config.flags = wild(t);
	if (one_in(t, 8))
		config.msr = near(t, 16) | 0x40000000;
	CALL(t, vm->fd, KVM_XEN_HVM_CONFIG, &config, config.flags, config.msr);
}

static void op_xen_vm_attr(struct thread *t)
{
	static const uint16_t types[] = {
		KVM_XEN_ATTR_TYPE_LONG_MODE, KVM_XEN_ATTR_TYPE_SHARED_INFO,
		KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR,
		KVM_XEN_ATTR_TYPE_EVTCHN, KVM_XEN_ATTR_TYPE_EVTCHN,
		KVM_XEN_ATTR_TYPE_XEN_VERSION, KVM_XEN_ATTR_TYPE_EVTCHN_MODE,
		KVM_XEN_ATTR_TYPE_FIFO_ARRAY, KVM_XEN_ATTR_TYPE_FIFO_ARRAY,
		KVM_XEN_ATTR_TYPE_FIFO_PORT, KVM_XEN_ATTR_TYPE_FIFO_CONTROL,
		KVM_XEN_ATTR_TYPE_FIFO_WAITING, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG,
	};
	static __thread struct kvm_xen_fifo_waiting waiting;
	struct kvm_xen_hvm_attr a = { .type = one_in(t, 64) ? wild(t) : pick(t, types) };
	int i;

	switch (a.type) {
	case KVM_XEN_ATTR_TYPE_LONG_MODE:
		a.u.long_mode = one_in(t, 16) ? wild(t) : !one_in(t, 4);
		break;
	case KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG:
		a.u.runstate_update_flag = one_in(t, 2);
		break;
	case KVM_XEN_ATTR_TYPE_SHARED_INFO:
		a.u.shared_info.gfn = one_in(t, 8) ? KVM_XEN_INVALID_GFN : gpa(t) / PAGE_BYTES;
		break;
	case KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA:
		a.u.shared_info.hva = one_in(t, 4) ? hva(t) : hva(t) & ~(PAGE_BYTES - 1);
		break;
	case KVM_XEN_ATTR_TYPE_UPCALL_VECTOR:
		a.u.vector = near(t, 256);
		break;
	case KVM_XEN_ATTR_TYPE_EVTCHN:
		a.u.evtchn.send_port = port(t);
		a.u.evtchn.type = rnd(t, 4);
		a.u.evtchn.flags = one_in(t, 32) ? wild(t) : rnd(t, 5);
		a.u.evtchn.deliver.port.port = port(t);
		a.u.evtchn.deliver.port.vcpu = near(t, NR_VCPUS);
		a.u.evtchn.deliver.port.priority = priority(t);
		if (one_in(t, 8)) {
			a.u.evtchn.deliver.eventfd.port = 0;
			a.u.evtchn.deliver.eventfd.fd = pick(t, irqfds);
		}
		break;
	case KVM_XEN_ATTR_TYPE_EVTCHN_MODE:
		a.u.evtchn_mode.mode = near(t, 2);
		break;
	case KVM_XEN_ATTR_TYPE_FIFO_ARRAY:
		a.u.fifo_array.page = near(t, one_in(t, 2) ? 2 : 128);
		a.u.fifo_array.gfn = gpa(t) / PAGE_BYTES;
		break;
	case KVM_XEN_ATTR_TYPE_FIFO_PORT:
		a.u.fifo_port.port = port(t);
		a.u.fifo_port.vcpu = one_in(t, 4) ? KVM_XEN_FIFO_NO_VCPU : near(t, NR_VCPUS);
		a.u.fifo_port.priority = near(t, 16);
		break;
	case KVM_XEN_ATTR_TYPE_FIFO_CONTROL:
		a.u.fifo_control.vcpu = near(t, NR_VCPUS);
		a.u.fifo_control.gpa = gpa(t) & ~7ull;
		break;
	case KVM_XEN_ATTR_TYPE_FIFO_WAITING:
		a.u.fifo_waiting = one_in(t, 16) ? hva(t) : (uintptr_t)&waiting;
		memset(&waiting, 0, sizeof(waiting));
		for (i = 0; i < 64; i++) {
			waiting.unsent[port(t) % NR_PORTS / 64] |= 1ull << rnd(t, 64);
			waiting.unqueued[port(t) % NR_PORTS / 64] |= 1ull << rnd(t, 64);
		}
		if (!one_in(t, 16)) {
			waiting.unsent[0] &= ~1ull;
			waiting.unqueued[0] &= ~1ull;
		}
		break;
	}

	if (one_in(t, 4))
		CALL(t, vm->fd, KVM_XEN_HVM_GET_ATTR, &a, a.type);
	else
		CALL(t, vm->fd, KVM_XEN_HVM_SET_ATTR, &a, a.type, a.u.pad[0], a.u.pad[1],
		     a.u.pad[2]);
}

static void op_xen_vcpu_attr(struct thread *t)
{
	static const uint16_t types[] = {
		KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
		KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
		KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST,
		KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
	};
	struct kvm_xen_vcpu_attr a = { .type = one_in(t, 64) ? wild(t) : pick(t, types) };
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_clock_data clock = {};
	int i;

	switch (a.type) {
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO:
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO:
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR:
		a.u.gpa = one_in(t, 8) ? KVM_XEN_INVALID_GPA : gpa(t);
		/* A runstate may cross the end of its page. */
		if (a.type == KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR && one_in(t, 2))
			a.u.gpa = (a.u.gpa | (PAGE_BYTES - 1)) - rnd(t, 56);
		break;
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA:
		a.u.hva = hva(t);
		break;
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT:
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA:
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST:
		a.u.runstate.state = near(t, 4);
		a.u.runstate.state_entry_time = wild(t);
		a.u.runstate.time_running = wild(t);
		a.u.runstate.time_offline = wild(t);
		break;
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID:
		a.u.vcpu_id = near(t, NR_VCPUS);
		break;
	case KVM_XEN_VCPU_ATTR_TYPE_TIMER:
		ioctl(vm->fd, KVM_GET_CLOCK, &clock);
		a.u.timer.port = port(t);
		a.u.timer.priority = priority(t);
		a.u.timer.expires_ns = one_in(t, 4) ? wild(t) : clock.clock + rnd(t, 1000000);
		break;
	case KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR:
		a.u.vector = one_in(t, 2) ? UPCALL_VECTOR : near(t, 256);
		break;
	case KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS:
		for (i = 0; i < ARRAY_SIZE(a.u.fifo_tails); i++)
			a.u.fifo_tails[i] = port(t) % NR_PORTS;
		break;
	}

	if (one_in(t, 4))
		CALL(t, vcpu->fd, KVM_XEN_VCPU_GET_ATTR, &a, vcpu->id, a.type);
	else
		CALL(t, vcpu->fd, KVM_XEN_VCPU_SET_ATTR, &a, vcpu->id, a.type, a.u.pad[0],
		     a.u.pad[1]);
}

static void op_xen_send(struct thread *t)
{
	struct kvm_irq_routing_xen_evtchn e = xen_event(t);

	CALL(t, vm->fd, KVM_XEN_HVM_EVTCHN_SEND, &e, e.port, e.vcpu, e.priority);
}

static void op_flush_inhibit(struct thread *t)
{
	struct kvm_hyperv_tlb_flush_inhibit i = {
		.vp_index = near(t, NR_VCPUS), .mask = one_in(t, 4) ? wild(t) : ~0u,
	};

	/* Mostly remove owners, so that flushes are not blocked all the time. */
	i.owners = one_in(t, 3) ? wild(t) & i.mask : 0;
	if (one_in(t, 64))
		i.padding[rnd(t, 2)] = wild(t);
	if (one_in(t, 64))
		i.flags = wild(t);
	if (one_in(t, 4))
		CALL(t, vm->fd, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &i, i.vp_index);
	else
		CALL(t, vm->fd, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &i, i.vp_index, i.owners,
		     i.mask);
}

static void op_vsm_hypercalls(struct thread *t)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_HYPERV_VSM_HYPERCALLS,
		.flags = one_in(t, 32) ? wild(t) : 0,
		.args = { near(t, 2) },
	};

	CALL(t, vm->fd, KVM_ENABLE_CAP, &cap, cap.flags, cap.args[0]);
}

static void op_hyperv_eventfd(struct thread *t)
{
	struct kvm_hyperv_eventfd e = {
		.conn_id = near(t, 4), .fd = pick(t, irqfds), .flags = one_in(t, 2),
	};

	CALL(t, vm->fd, KVM_HYPERV_EVENTFD, &e, e.conn_id, e.flags);
}

static const uint32_t fuzz_msrs[] = {
	MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK_NEW,
	MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_EN,
	MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_ACK, MSR_KVM_ASYNC_PF_ACK,
	MSR_KVM_STEAL_TIME, MSR_KVM_PV_EOI_EN, MSR_KVM_POLL_CONTROL,
	HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_HYPERCALL, HV_X64_MSR_VP_INDEX,
	HV_X64_MSR_REFERENCE_TSC, HV_X64_MSR_VP_ASSIST_PAGE, HV_X64_MSR_SCONTROL,
	HV_X64_MSR_SIEFP, HV_X64_MSR_SIMP, HV_X64_MSR_SINT0, HV_X64_MSR_SINT2,
	HV_X64_MSR_EOM, HV_X64_MSR_STIMER0_CONFIG, HV_X64_MSR_STIMER0_COUNT,
	HV_X64_MSR_STIMER1_CONFIG, HV_X64_MSR_STIMER1_COUNT,
	HV_X64_MSR_REENLIGHTENMENT_CONTROL, HV_X64_MSR_TSC_EMULATION_CONTROL,
	HV_X64_MSR_EOI, HV_X64_MSR_ICR, HV_X64_MSR_TPR, HV_X64_MSR_CRASH_CTL,
	XEN_MSR, MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_IA32_APICBASE,
	MSR_IA32_TSC_DEADLINE, MSR_IA32_CR_PAT, MSR_IA32_MISC_ENABLE, MSR_EFER,
};

static uint64_t msr_value(struct thread *t, uint32_t msr)
{
	if (msr == MSR_KVM_ASYNC_PF_EN && !one_in(t, 8))
		return APF_GPA | KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT |
		       (one_in(t, 2) ? KVM_ASYNC_PF_SEND_ALWAYS : 0);
	if (msr == MSR_KVM_ASYNC_PF_INT || msr == HV_X64_MSR_SINT0 || msr == HV_X64_MSR_SINT2)
		return one_in(t, 8) ? wild(t) : 0x20 + rnd(t, 0xe0);
	switch (rnd(t, 4)) {
	case 0:
		return wild(t);
	case 1:
		return rnd(t, 16);
	default:
		return (gpa(t) & ~(one_in(t, 2) ? PAGE_BYTES - 1 : 63)) | rnd(t, 4);
	}
}

static void op_msrs(struct thread *t)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[4];
	} m = { .head.nmsrs = 1 + rnd(t, 4) };
	struct kvm_vcpu *vcpu = any_vcpu(t);
	int i;

	/* Complete asynchronous page faults more often than the guest does. */
	if (one_in(t, 4)) {
		m.head.nmsrs = 1;
		m.entries[0].index = MSR_KVM_ASYNC_PF_ACK;
		m.entries[0].data = 1;
		CALL(t, vcpu->fd, KVM_SET_MSRS, &m, vcpu->id, m.entries[0].index);
		return;
	}
	for (i = 0; i < m.head.nmsrs; i++) {
		m.entries[i].index = pick(t, fuzz_msrs);
		m.entries[i].data = msr_value(t, m.entries[i].index);
	}
	if (one_in(t, 4))
		CALL(t, vcpu->fd, KVM_GET_MSRS, &m, vcpu->id, m.entries[0].index);
	else
		CALL(t, vcpu->fd, KVM_SET_MSRS, &m, vcpu->id, m.entries[0].index,
		     m.entries[0].data, m.head.nmsrs);
}

static void op_lapic(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_lapic_state lapic;
	uint32_t *reg;
	int i;

	if (CALL(t, vcpu->fd, KVM_GET_LAPIC, &lapic, vcpu->id))
		return;
	for (i = rnd(t, 4); i; i--) {
		reg = (void *)&lapic.regs[rnd(t, 0x40) * 16];
		*reg = one_in(t, 2) ? wild(t) : *reg ^ BIT(rnd(t, 32));
	}
	if (one_in(t, 2))
		*(uint32_t *)&lapic.regs[APIC_SPIV] ^= APIC_SPIV_APIC_ENABLED;
	CALL(t, vcpu->fd, KVM_SET_LAPIC, &lapic, vcpu->id);
}

static void op_regs(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_regs regs;

	if (CALL(t, vcpu->fd, KVM_GET_REGS, &regs, vcpu->id))
		return;
	switch (rnd(t, 4)) {
	case 0:
		regs.rflags ^= BIT(rnd(t, 22));
		break;
	case 1:
		regs.rax = wild(t);
		regs.rdi = gpa(t);
		break;
	case 2:
		regs.rip = one_in(t, 2) ? regs.rip + rnd(t, 16) : wild(t);
		break;
	}
	CALL(t, vcpu->fd, KVM_SET_REGS, &regs, vcpu->id, regs.rip, regs.rflags);
}

static void op_sregs(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_sregs sregs;

	if (CALL(t, vcpu->fd, KVM_GET_SREGS, &sregs, vcpu->id))
		return;
	switch (rnd(t, 8)) {
	case 0:
		sregs.cr0 ^= BIT_ULL(rnd(t, 32));
		break;
	case 1:
		sregs.cr4 ^= BIT_ULL(rnd(t, 32));
		break;
	case 2:
		sregs.cr3 = gpa(t);
		break;
	case 3:
		sregs.efer ^= BIT_ULL(rnd(t, 16));
		break;
	case 4:
		sregs.apic_base ^= one_in(t, 2) ? BIT_ULL(10) : wild(t);
		break;
	case 5:
		sregs.interrupt_bitmap[rnd(t, 4)] |= BIT_ULL(rnd(t, 64));
		break;
	}
	CALL(t, vcpu->fd, KVM_SET_SREGS, &sregs, vcpu->id, sregs.cr0, sregs.cr3, sregs.cr4);
}

static void op_vcpu_events(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_vcpu_events events;

	if (CALL(t, vcpu->fd, KVM_GET_VCPU_EVENTS, &events, vcpu->id))
		return;
	switch (rnd(t, 5)) {
	case 0:
		events.exception.injected = one_in(t, 2);
		events.exception.nr = near(t, 32);
		events.exception.has_error_code = one_in(t, 2);
		break;
	case 1:
		events.interrupt.injected = one_in(t, 2);
		events.interrupt.nr = near(t, 256);
		events.interrupt.shadow = rnd(t, 4);
		break;
	case 2:
		events.nmi.injected = one_in(t, 2);
		events.nmi.pending = rnd(t, 3);
		events.nmi.masked = one_in(t, 2);
		events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
		break;
	case 3:
		events.sipi_vector = near(t, 256);
		events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
		break;
	case 4:
		events.smi.pending = one_in(t, 2);
		events.smi.smm = one_in(t, 4);
		events.smi.latched_init = one_in(t, 4);
		events.flags |= KVM_VCPUEVENT_VALID_SMM;
		break;
	}
	if (one_in(t, 32))
		events.flags = wild(t);
	CALL(t, vcpu->fd, KVM_SET_VCPU_EVENTS, &events, vcpu->id, events.flags);
}

static void op_nmi_smi(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);

	if (one_in(t, 4))
		CALL(t, vcpu->fd, KVM_SMI, NULL, vcpu->id);
	else
		CALL(t, vcpu->fd, KVM_NMI, NULL, vcpu->id);
}

static void op_clock(struct thread *t)
{
	struct kvm_clock_data clock = {};

	CALL(t, vm->fd, KVM_GET_CLOCK, &clock);
	if (one_in(t, 2))
		clock.clock = one_in(t, 4) ? wild(t) : clock.clock + wild(t) % NSEC_PER_SEC;
	clock.flags = one_in(t, 8) ? wild(t) : clock.flags & KVM_CLOCK_REALTIME;
	CALL(t, vm->fd, KVM_SET_CLOCK, &clock, clock.clock, clock.flags);
}

static void op_x86_vcpu(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_translation tr = { .linear_address = gpa(t) };
	struct kvm_enable_cap cap = {
		.cap = one_in(t, 2) ? KVM_CAP_HYPERV_SYNIC : KVM_CAP_HYPERV_SYNIC2,
	};
	struct kvm_debugregs dregs = {};

	switch (rnd(t, 6)) {
	case 0:
		CALL(t, vcpu->fd, KVM_TRANSLATE, &tr, vcpu->id, tr.linear_address);
		break;
	case 1:
		CALL(t, vcpu->fd, KVM_KVMCLOCK_CTRL, NULL, vcpu->id);
		break;
	case 2:
		CALL(t, vcpu->fd, KVM_SET_TSC_KHZ, near(t, 4000000), vcpu->id);
		break;
	case 3:
		CALL(t, vcpu->fd, KVM_ENABLE_CAP, &cap, vcpu->id, cap.cap);
		break;
	case 4:
		dregs.db[rnd(t, 4)] = gpa(t);
		dregs.dr7 = wild(t) & 0xffffffff;
		CALL(t, vcpu->fd, KVM_SET_DEBUGREGS, &dregs, vcpu->id, dregs.dr7);
		break;
	case 5:
		vcpu->run->kvm_valid_regs = near(t, 8);
		vcpu->run->kvm_dirty_regs = one_in(t, 8) ? near(t, 8) : 0;
		run_vcpu(t, vcpu);
		break;
	}
}

static void op_x86_vm(struct thread *t)
{
	struct kvm_irqchip chip = { .chip_id = near(t, 3) };
	uint32_t *words = (void *)&chip.chip;

	switch (rnd(t, 4)) {
	case 0:
		if (CALL(t, vm->fd, KVM_GET_IRQCHIP, &chip, chip.chip_id))
			break;
		if (one_in(t, 2))
			words[rnd(t, sizeof(chip.chip) / 4)] ^= BIT(rnd(t, 32));
		CALL(t, vm->fd, KVM_SET_IRQCHIP, &chip, chip.chip_id);
		break;
	case 1:
		CALL(t, vm->fd, KVM_SET_NR_MMU_PAGES, 64 + rnd(t, 1000));
		break;
	case 2:
		CALL(t, vm->fd, KVM_SET_BOOT_CPU_ID, near(t, 4));
		break;
	case 3:
		CALL(t, vm->fd, KVM_RESET_DIRTY_RINGS, NULL);
		break;
	}
}

static const struct op arch_ops[] = {
	{ op_xen_config, "KVM_XEN_HVM_CONFIG", 1 },
	{ op_xen_vm_attr, "KVM_XEN_HVM_*_ATTR", 8 },
	{ op_xen_vcpu_attr, "KVM_XEN_VCPU_*_ATTR", 8 },
	{ op_xen_send, "KVM_XEN_HVM_EVTCHN_SEND", 6 },
	{ op_flush_inhibit, "KVM_HYPERV_*_TLB_FLUSH_INHIBIT", 4 },
	{ op_vsm_hypercalls, "KVM_CAP_HYPERV_VSM_HYPERCALLS", 1 },
	{ op_hyperv_eventfd, "KVM_HYPERV_EVENTFD", 1 },
	{ op_msrs, "KVM_*_MSRS", 8 },
	{ op_lapic, "KVM_*_LAPIC", 3 },
	{ op_regs, "KVM_*_REGS", 2 },
	{ op_sregs, "KVM_*_SREGS", 2 },
	{ op_vcpu_events, "KVM_*_VCPU_EVENTS", 2 },
	{ op_nmi_smi, "KVM_NMI, KVM_SMI", 1 },
	{ op_clock, "KVM_*_CLOCK", 1 },
	{ op_x86_vcpu, "other vCPU ioctls", 2 },
	{ op_x86_vm, "other VM ioctls", 2 },
};

/* Guest: the hypercall input of Hyper-V, and the pages of each vCPU */
static vm_vaddr_t hcall_pages[NR_VCPUS];

static const uint16_t vsm_codes[] = {
	HVCALL_MODIFY_VTL_PROTECTION_MASK, HVCALL_ENABLE_PARTITION_VTL, HVCALL_ENABLE_VP_VTL,
	HVCALL_VTL_CALL, HVCALL_VTL_RETURN, HVCALL_GET_VP_REGISTERS, HVCALL_SET_VP_REGISTERS,
	HVCALL_TRANSLATE_VIRTUAL_ADDRESS, HVCALL_START_VP, HVCALL_GET_VP_ID_FROM_APIC_ID,
	HVCALL_TRANSLATE_VIRTUAL_ADDRESS_EX,
};

/* A hypercall of VSM, which exits to userspace if the capability is enabled */
static void guest_vsm_hypercall(uint64_t r, uint64_t *mem)
{
	struct hyperv_hcall_pages *pages = (void *)hcall_pages[r & 1];
	uint64_t xmm[2 * HV_HYPERCALL_MAX_XMM_REGISTERS] = { r };
	uint64_t control = vsm_codes[(r >> 1 & 0xff) % ARRAY_SIZE(vsm_codes)];

	if (r & BIT(9))
		control |= HV_HYPERCALL_FAST_BIT;
	control |= (r >> 10 & 3) << HV_HYPERCALL_VARHEAD_OFFSET;
	control |= (r >> 12 & 7) << HV_HYPERCALL_REP_COMP_OFFSET;
	control |= (r >> 15 & 3) << HV_HYPERCALL_REP_START_OFFSET;
	if (!(r >> 17 & 15))
		control |= HV_HYPERCALL_RSVD_MASK & r;
	hyperv_hypercall(pages, control, r & BIT(21) ? pages->input_gpa : (uint64_t)mem,
			 (uint64_t)mem, xmm);
}

static void guest_op(uint64_t r, uint64_t *state)
{
	struct { uint64_t ports; uint32_t nr; uint32_t pad; uint64_t timeout; } poll;
	uint64_t *mem = (void *)guest_gpa(random_next(state));
	uint32_t ports[2] = { r >> 20 & 0xff, r >> 32 };
	struct hyperv_hcall_pages *pages;
	struct hyperv_tlb_flush flush;

	switch (r & 15) {
	case 0 ... 3:
		xen_hypercall(__HYPERVISOR_event_channel_op,
			      r & 0x10 ? EVTCHNOP_send : EVTCHNOP_unmask,
			      r & 0x60 ? (uint64_t)&ports[r >> 7 & 1] : (uint64_t)mem);
		break;
	case 4:
		poll.ports = r & 0x30 ? (uint64_t)ports : (uint64_t)mem;
		poll.nr = r >> 6 & 3;
		poll.timeout = r >> 40;
		xen_hypercall(__HYPERVISOR_sched_op, SCHEDOP_poll,
			      r & 0x700 ? (uint64_t)&poll : (uint64_t)mem);
		break;
	case 5:
		xen_hypercall(__HYPERVISOR_set_timer_op, r & 0x10 ? r >> 5 : 1, 0);
		break;
	case 6:
		xen_hypercall(r >> 4 & 63, r >> 10, (uint64_t)mem);
		break;
	case 7 ... 8:
		pages = (void *)hcall_pages[r >> 60 ? 0 : r >> 4 & 1];
		memset(&flush, 0, sizeof(flush));
		flush.code = hyperv_flush_codes[r >> 5 & 3];
		flush.fast = r & 0x80;
		flush.flags = r >> 8 & 7;
		flush.processor_mask = r >> 12 & 0xf;
		flush.rep_cnt = r >> 16 & 3;
		flush.valid_bank_mask = 1;
		flush.var_cnt = r >> 18 & 1;
		flush.banks[0] = r >> 12 & 0xf;
		flush.format = r >> 20 & 1;
		hyperv_flush_tlb(pages, &flush);
		break;
	case 9:
		guest_vsm_hypercall(r >> 4, mem);
		break;
	case 10 ... 12:
		wrmsr_safe(fuzz_msrs[(r >> 4) % (ARRAY_SIZE(fuzz_msrs) - 2)],
			   r & 0x10000 ? (uint64_t)mem | (r >> 17 & 3) : r >> 20);
		break;
	case 13:
		wrmsr_safe(APIC_BASE_MSR + (APIC_ICR >> 4),
			   (r >> 4 & 1 ? 0xfd : UPCALL_VECTOR) | (uint64_t)(r >> 5 & 3) << 32);
		break;
	case 14:
		if (r & 0x10)
			asm volatile("sti");
		else
			asm volatile("cli");
		break;
	case 15:
		if (!(r & 0xf0))
			asm volatile("sti; hlt");
		break;
	}
}

static void guest_irq(struct ex_regs *regs)
{
	wrmsr_safe(APIC_BASE_MSR + (APIC_EOI >> 4), 0);
	wrmsr_safe(MSR_KVM_ASYNC_PF_ACK, 1);
}

/* "Page not present": the guest accesses the page again. */
static void guest_page_fault(struct ex_regs *regs)
{
	WRITE_ONCE(*(uint32_t *)APF_GPA, 0);
}

static void guest_init(uint64_t nr)
{
	struct hyperv_hcall_pages *pages = (void *)hcall_pages[nr];

	x2apic_enable();
	/* #GP for vCPUs without Hyper-V's CPUID leaves */
	wrmsr_safe(HV_X64_MSR_GUEST_OS_ID, HV_GUEST_OS_ID);
	wrmsr_safe(HV_X64_MSR_HYPERCALL, pages->hcall_gpa | 1);
	GUEST_SYNC(0);
}

/* Give the vCPU a state from which the guest goes on. */
static void heal(struct thread *t, struct kvm_vcpu *vcpu)
{
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	struct kvm_regs regs = first_regs[vcpu->id];
	struct kvm_vcpu_events events = { .flags = KVM_VCPUEVENT_VALID_SMM };
	struct kvm_guest_debug debug = {};
	struct kvm_debugregs dregs = { .dr6 = 0xffff0ff0, .dr7 = 0x400 };

	regs.rip = (uint64_t)guest_fuzz;
	regs.rdi = random_next(&t->random);
	regs.rsi = vcpu->id;
	/* Asynchronous page faults need interrupts to be enabled. */
	if (!one_in(t, 4))
		regs.rflags |= RFLAGS_IF;
	CALL(t, vcpu->fd, KVM_SET_GUEST_DEBUG, &debug, vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_DEBUGREGS, &dregs, vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_VCPU_EVENTS, &events, vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_SREGS, &first_sregs[vcpu->id], vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_REGS, &regs, vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_LAPIC, &first_lapic[vcpu->id], vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_MP_STATE, &runnable, vcpu->id);
}

static void complete_exit(struct thread *t, struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_XEN:
		run->xen.u.hcall.result = 0;
		break;
	case KVM_EXIT_HYPERV:
		/* Without an answer, the result is what struct kvm_run contains. */
		if (!one_in(t, 4))
			run->hyperv.u.hcall.result = one_in(t, 2) ? 0 : wild(t);
		break;
	}
}

static bool xen_has_fifo(void)
{
	return kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_FIFO;
}

/* Event channels that work, until the fuzzers change that */
static void create_xen(struct thread *t)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND,
		.msr = XEN_MSR,
	};
	bool fifo = one_in(t, 2) && xen_has_fifo();
	int i;

	if (fifo)
		config.flags |= KVM_XEN_HVM_CONFIG_EVTCHN_FIFO;
	vm_ioctl(vm, KVM_XEN_HVM_CONFIG, &config);
	if (one_in(t, 8))
		return;

	xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = !one_in(t, 4),
	});
	xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO, .u.shared_info.gfn = WINDOW_GPA / PAGE_BYTES,
	});
	if (fifo) {
		xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
			.type = KVM_XEN_ATTR_TYPE_EVTCHN_MODE,
			.u.evtchn_mode.mode = KVM_XEN_EVTCHN_MODE_FIFO,
		});
		xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
			.type = KVM_XEN_ATTR_TYPE_FIFO_ARRAY,
			.u.fifo_array.gfn = WINDOW_GPA / PAGE_BYTES + 1,
		});
	}
	for (i = 0; i < NR_VCPUS; i++) {
		xen_set_vcpu_attr(vcpus[i], (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
			.u.gpa = WINDOW_GPA + (4 + i) * PAGE_BYTES,
		});
		xen_set_vcpu_attr(vcpus[i], (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, .u.vector = UPCALL_VECTOR,
		});
		xen_set_vcpu_attr(vcpus[i], (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
			.u.gpa = WINDOW_GPA + (7 + i) * PAGE_BYTES + 4096 - 24,
		});
		if (fifo)
			xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
				.type = KVM_XEN_ATTR_TYPE_FIFO_CONTROL,
				.u.fifo_control = {
					.vcpu = vcpus[i]->id,
					.gpa = WINDOW_GPA + (4 + i) * PAGE_BYTES + 128,
				},
			});
	}
}

static void create_vm(struct thread *t)
{
	struct hyperv_hcall_pages *pages;
	bool ring = one_in(t, 4);
	int i;

	vm = __vm_create(VM_MODE_DEFAULT, NR_VCPUS, 64);
	if (ring && kvm_check_cap(KVM_CAP_DIRTY_LOG_RING))
		vm_enable_dirty_ring(vm, 4096 * sizeof(struct kvm_dirty_gfn));
	else if (one_in(t, 2))
		vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      rnd(t, 2) ? KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE : 3);

	for (i = 0; i < NR_VCPUS; i++) {
		vcpus[i] = vm_vcpu_add(vm, i, guest_init);
		if (!one_in(t, 4))
			vcpu_set_hv_cpuid(vcpus[i]);
		hcall_pages[i] = vcpu_alloc_hyperv_hcall_pages(vm);
		pages = addr_gva2hva(vm, hcall_pages[i]);
		/* RET, where KVM does not put a hypercall instruction */
		memset(addr_gva2hva(vm, pages->hcall), 0xc3, PAGE_BYTES);
		vcpu_args_set(vcpus[i], 1, (uint64_t)i);
	}
	sync_global_to_guest(vm, hcall_pages);

	vm_init_descriptor_tables(vm);
	for (i = 32; i < 256; i++)
		vm_install_exception_handler(vm, i, guest_irq);
	vm_install_exception_handler(vm, PF_VECTOR, guest_page_fault);

	if (one_in(t, 2))
		vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
	create_window(t);
	/* One round of eight begins without Xen. */
	if (!one_in(t, 8))
		create_xen(t);
	for (i = 0; i < NR_VCPUS; i++) {
		vcpu_init_descriptor_tables(vcpus[i]);
		vcpu_run_to_sync(vcpus[i]);
		vcpu_regs_get(vcpus[i], &first_regs[i]);
		vcpu_sregs_get(vcpus[i], &first_sregs[i]);
		vcpu_ioctl(vcpus[i], KVM_GET_LAPIC, &first_lapic[i]);
		/* Fails if the first layout of the window does not contain the page. */
		_vcpu_set_msr(vcpus[i], MSR_KVM_ASYNC_PF_INT, APF_VECTOR);
		_vcpu_set_msr(vcpus[i], MSR_KVM_ASYNC_PF_EN, APF_GPA | KVM_ASYNC_PF_ENABLED |
			      KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT);
	}
}

static void destroy_vm(void)
{
	kvm_vm_free(vm);
}

#endif /* __x86_64__ */

#ifdef __aarch64__

/*
 * arm64: GICv3, ITSes and LPIs
 */

#define NR_ITS		2
#define GICD_BASE_GPA	0x8000000ULL
#define GICR_BASE_GPA	0x80a0000ULL
#define ITS_BASE_GPA	0x8200000ULL
#define TABLES_GPA	SZ_4G
#define NR_DEVICES	4
#define EVENT_BITS	5
#define NR_LPIS		64
#define ITT_SIZE	SZ_4K

/* Shared with the guest */
static struct its its[NR_ITS];
static struct lpi_tables tables;

static uint64_t first_sp[NR_VCPUS];
static int gic_fd;

static struct kvm_irq_routing_entry random_route(struct thread *t)
{
	uint64_t doorbell = its[rnd(t, NR_ITS)].base + GITS_TRANSLATER;
	struct kvm_irq_routing_entry e = {};

	if (one_in(t, 32))
		doorbell = gpa(t);
	if (one_in(t, 4)) {
		e.type = KVM_IRQ_ROUTING_IRQCHIP;
		e.u.irqchip.pin = near(t, 64);
		e.u.irqchip.irqchip = one_in(t, 32);
	} else {
		e.type = KVM_IRQ_ROUTING_MSI;
		e.flags = one_in(t, 16) ? 0 : KVM_MSI_VALID_DEVID;
		e.u.msi.address_lo = doorbell;
		e.u.msi.address_hi = doorbell >> 32;
		e.u.msi.data = near(t, 1 << EVENT_BITS);
		e.u.msi.devid = near(t, NR_DEVICES);
	}
	if (one_in(t, 64))
		e.type = wild(t);
	return e;
}

static void op_its_attr(struct thread *t)
{
	static const uint64_t regs[] = {
		GITS_CTLR, 4, 8, GITS_CBASER, GITS_CWRITER, GITS_CREADR, GITS_BASER_DEVICE,
		GITS_BASER_COLLECTION, 0x110, 0xffe8,
	};
	struct its *i = &its[rnd(t, NR_ITS)];
	uint64_t values[] = {
		GITS_CTLR_ENABLE, wild(t), rnd(t, ITS_CMDQ_SIZE / 32) * 32,
		GITS_CBASER_VALID | i->cmdq | (ITS_CMDQ_SIZE / SZ_4K - 1),
		GITS_BASER_VALID | i->device_table | (ITS_DEVICE_TABLE_SIZE / SZ_64K - 1),
		GITS_BASER_VALID | (window_gpa(t) & ~(SZ_64K - 1)),
	};
	uint64_t reg = one_in(t, 16) ? wild(t) : pick(t, regs), value = pick(t, values);
	struct kvm_device_attr a = {
		.group = KVM_DEV_ARM_VGIC_GRP_ITS_REGS, .attr = reg, .addr = (uintptr_t)&value,
	};

	switch (rnd(t, 8)) {
	case 0:
		device_attr(t, i->fd, near(t, 9), near(t, 8));
		return;
	case 1 ... 3:
		/* INIT, save and restore of the tables, reset */
		a.group = KVM_DEV_ARM_VGIC_GRP_CTRL;
		a.attr = near(t, 5);
		break;
	case 4:
		CALL(t, i->fd, KVM_GET_DEVICE_ATTR, &a, a.group, a.attr);
		return;
	}
	CALL(t, i->fd, KVM_SET_DEVICE_ATTR, &a, a.group, a.attr, value);
}

static void op_gic_attr(struct thread *t)
{
	uint64_t group = near(t, 9), attr = near(t, 0x120);
	uint64_t vcpu = near(t, NR_VCPUS) << 32;

	switch (group) {
	case KVM_DEV_ARM_VGIC_GRP_DIST_REGS:
		attr = (near(t, 0x1000) & ~3ull) | vcpu;
		break;
	case KVM_DEV_ARM_VGIC_GRP_REDIST_REGS:
		attr = (one_in(t, 2) ? pick(t, ((uint64_t[]){ 0, 0x70, 0x74, 0x78, 0x7c })) :
				       near(t, 0x11000) & ~3ull) | vcpu;
		break;
	case KVM_DEV_ARM_VGIC_GRP_CTRL:
		attr = near(t, 5);
		break;
	case KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO:
		attr = (near(t, 4) << 10) | near(t, 128);
		break;
	}
	device_attr(t, gic_fd, group, attr);
}

static void op_create_its(struct thread *t)
{
	struct kvm_create_device d = { .type = KVM_DEV_TYPE_ARM_VGIC_ITS };

	/* The ITS stays, so create few of them. */
	if (!one_in(t, 16))
		d.flags = KVM_CREATE_DEVICE_TEST;
	if (one_in(t, 4))
		d.type = near(t, 12);
	if (!CALL(t, vm->fd, KVM_CREATE_DEVICE, &d, d.type, d.flags) && !d.flags) {
		device_attr(t, d.fd, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE);
		device_attr(t, d.fd, KVM_DEV_ARM_VGIC_GRP_CTRL, near(t, 5));
		close(d.fd);
	}
}

static void op_one_reg(struct thread *t)
{
	static const uint64_t ids[] = {
		KVM_REG_ARM_TIMER_CTL, KVM_REG_ARM_TIMER_CNT, KVM_REG_ARM_TIMER_CVAL,
		KVM_REG_ARM_PTIMER_CTL, KVM_REG_ARM_PTIMER_CVAL,
		KVM_REG_ARM_FW_REG(0), KVM_REG_ARM_FW_REG(1), KVM_REG_ARM_FW_REG(2),
		ARM64_CORE_REG(regs.regs[0]), ARM64_CORE_REG(regs.regs[1]),
		ARM64_CORE_REG(regs.pstate),
	};
	struct kvm_vcpu *vcpu = any_vcpu(t);
	uint64_t value = wild(t);
	struct kvm_one_reg reg = { .id = pick(t, ids), .addr = (uintptr_t)&value };

	if (one_in(t, 16))
		reg.id ^= wild(t) & 0xffff;
	/* QEMU hangs if the deadline of a timer wraps. */
	if ((reg.id & KVM_REG_ARM64_SYSREG_CRN_MASK) >> KVM_REG_ARM64_SYSREG_CRN_SHIFT == 14)
		value >>= 24;
	if (one_in(t, 2))
		CALL(t, vcpu->fd, KVM_GET_ONE_REG, &reg, vcpu->id, reg.id);
	else
		CALL(t, vcpu->fd, KVM_SET_ONE_REG, &reg, vcpu->id, reg.id, value);
}

static void op_vcpu_events(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_vcpu_events events = {
		.exception.serror_pending = one_in(t, 16),
		.exception.serror_has_esr = one_in(t, 16),
		.exception.ext_dabt_pending = one_in(t, 16),
	};

	if (one_in(t, 2))
		CALL(t, vcpu->fd, KVM_GET_VCPU_EVENTS, &events, vcpu->id);
	else
		CALL(t, vcpu->fd, KVM_SET_VCPU_EVENTS, &events, vcpu->id);
}

static void op_vcpu_init(struct thread *t)
{
	struct kvm_vcpu *vcpu = any_vcpu(t);
	struct kvm_vcpu_init init;

	/* A vCPU that has been reset does nothing for a while, so reset it seldom. */
	if (!one_in(t, 8))
		return;
	if (CALL(t, vm->fd, KVM_ARM_PREFERRED_TARGET, &init))
		return;
	if (one_in(t, 4))
		init.features[0] = near(t, 16);
	CALL(t, vcpu->fd, KVM_ARM_VCPU_INIT, &init, vcpu->id, init.features[0]);
}

static const struct op arch_ops[] = {
	{ op_its_attr, "ITS attributes", 6 },
	{ op_gic_attr, "GIC attributes", 4 },
	{ op_create_its, "KVM_CREATE_DEVICE", 1 },
	{ op_one_reg, "KVM_*_ONE_REG", 3 },
	{ op_vcpu_events, "KVM_*_VCPU_EVENTS", 2 },
	{ op_vcpu_init, "KVM_ARM_VCPU_INIT", 1 },
};

static void guest_op(uint64_t r, uint64_t *state)
{
	struct its *i = &its[r >> 4 & 1];
	uint32_t device = r & 0x1f00 ? r >> 13 & 3 : r >> 13;
	uint32_t event = r & 0x1f0000 ? r >> 21 & 31 : r >> 21;
	uint32_t intid = LPI_BASE + (r >> 30) % NR_LPIS;
	uint16_t icid = r >> 40 & 7;
	uint64_t target = r >> 44 & 3;
	uint64_t itt = r & 0x20 ? tables.itt + device % NR_DEVICES * ITT_SIZE :
				  guest_gpa(random_next(state)) & ~0xffull;

	switch (r & 15) {
	case 0:
		its_send_mapd(i, device, itt, 1 + (r >> 50 & 15), r >> 55 & 7);
		break;
	case 1:
		its_send_mapc(i, icid, target, r >> 55 & 7);
		break;
	case 2 ... 4:
		its_send_mapti(i, device, event, icid, intid);
		break;
	case 5:
		its_send_movi(i, device, event, icid);
		break;
	case 6:
		its_send_discard(i, device, event);
		break;
	case 7 ... 8:
		its_send_int(i, device, event);
		break;
	case 9:
		its_send_clear(i, device, event);
		break;
	case 10:
		WRITE_ONCE(*(uint8_t *)(tables.config + intid - LPI_BASE),
			   LPI_PROP_PRIO | (r >> 55 & 1));
		dsb(ishst);
		if (r >> 56 & 1)
			its_send_inv(i, device, event);
		else
			its_send_invall(i, icid);
		break;
	case 11:
		its_send_movall(i, target, r >> 46 & 3);
		break;
	case 12:
		gicr_set_lpis_enabled(GICR_BASE_GPA, target % NR_VCPUS, r >> 55 & 3);
		break;
	case 13:
		if (!(r >> 55 & 7))
			its_disable(i);
		its_enable(i);
		break;
	case 14:
		if (!(r >> 55 & 15))
			its_write_baser(i, r >> 59 & 1 ? GITS_BASER_DEVICE :
							GITS_BASER_COLLECTION, r >> 60 & 1);
		break;
	case 15:
		if (!(r >> 55 & 15))
			asm volatile("wfi");
		else
			writel(event, (void *)(i->base + GITS_TRANSLATER));
		break;
	}
}

static void guest_irq(struct ex_regs *regs)
{
	uint32_t intid = gic_get_and_ack_irq();

	if (intid != IAR_SPURIOUS)
		gic_set_eoi(intid);
}

static void guest_init(uint64_t nr)
{
	int i;

	gic_init(GIC_V3, NR_VCPUS, (void *)GICD_BASE_GPA, (void *)GICR_BASE_GPA);
	gicr_enable_lpis(GICR_BASE_GPA, nr, &tables);
	for (i = 0; !nr && i < NR_ITS; i++)
		its_init(&its[i]);
	GUEST_SYNC(0);
}

/* Give the vCPU a state from which the guest goes on. */
static void heal(struct thread *t, struct kvm_vcpu *vcpu)
{
	struct kvm_guest_debug debug = {};

	aarch64_vcpu_setup(vcpu, NULL);
	vcpu_init_descriptor_tables(vcpu);
	vcpu_set_reg(vcpu, ARM64_CORE_REG(sp_el1), first_sp[vcpu->id]);
	vcpu_set_reg(vcpu, ARM64_CORE_REG(regs.pc), (uint64_t)guest_fuzz);
	/* EL1h, with or without interrupts masked */
	vcpu_set_reg(vcpu, ARM64_CORE_REG(regs.pstate), one_in(t, 4) ? 0x3c5 : 0x345);
	vcpu_args_set(vcpu, 2, random_next(&t->random), (uint64_t)vcpu->id);
	CALL(t, vcpu->fd, KVM_SET_GUEST_DEBUG, &debug, vcpu->id);
}

static void complete_exit(struct thread *t, struct kvm_run *run)
{
}

static void create_vm(struct thread *t)
{
	int i;

	vm = __vm_create(VM_MODE_DEFAULT, NR_VCPUS, 64);
	ucall_init(vm, NULL);
	if (one_in(t, 2))
		vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      rnd(t, 2) ? KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE : 3);
	for (i = 0; i < NR_VCPUS; i++) {
		vcpus[i] = vm_vcpu_add(vm, i, guest_init);
		vcpu_args_set(vcpus[i], 1, (uint64_t)i);
		vcpu_get_reg(vcpus[i], ARM64_CORE_REG(sp_el1), &first_sp[i]);
	}

	vm_init_descriptor_tables(vm);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_irq);
	gic_fd = vgic_v3_setup(vm, NR_VCPUS, 64, GICD_BASE_GPA, GICR_BASE_GPA);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
	vgic_its_setup(vm, its, NR_ITS, ITS_BASE_GPA, &tables, NR_VCPUS,
		       NR_DEVICES * ITT_SIZE, TABLES_GPA);
	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);
	create_window(t);

	for (i = 0; i < NR_VCPUS; i++) {
		vcpu_init_descriptor_tables(vcpus[i]);
		vcpu_run_to_sync(vcpus[i]);
	}
}

static void destroy_vm(void)
{
	int i;

	for (i = 0; i < NR_ITS; i++)
		close(its[i].fd);
	close(gic_fd);
	ucall_uninit(vm);
	kvm_vm_free(vm);
}

#endif /* __aarch64__ */

/*
 * Threads
 */

static const struct op common_ops[] = {
	{ op_run, "KVM_RUN", 3 },
	{ op_set_region, "KVM_SET_USER_MEMORY_REGION", 5 },
	{ op_set_layout, "KVM_SET_USER_MEMORY_REGIONS, whole window", 3 },
	{ op_set_regions, "KVM_SET_USER_MEMORY_REGIONS", 4 },
	{ op_delete_regions, "KVM_SET_USER_MEMORY_REGION, delete", 1 },
	{ op_dirty_log, "KVM_{GET,CLEAR}_DIRTY_LOG", 4 },
	{ op_irqfd, "KVM_IRQFD", 4 },
	{ op_signal_irqfd, "write to an irqfd", 8 },
	{ op_ioeventfd, "KVM_IOEVENTFD", 2 },
	{ op_irq_line, "KVM_IRQ_LINE", 2 },
	{ op_gsi_routing, "KVM_SET_GSI_ROUTING", 3 },
	{ op_signal_msi, "KVM_SIGNAL_MSI", 5 },
	{ op_stats, "KVM_GET_STATS_FD", 1 },
	{ op_mp_state, "KVM_*_MP_STATE", 1 },
	{ op_guest_debug, "KVM_SET_GUEST_DEBUG", 1 },
	{ op_create_vcpu, "KVM_CREATE_VCPU", 1 },
	{ op_check_extension, "KVM_CHECK_EXTENSION", 1 },
	{ op_device_attr, "KVM_*_DEVICE_ATTR of VM and vCPU", 1 },
};

#define NR_RANDOM_OPS	(ARRAY_SIZE(common_ops) + ARRAY_SIZE(arch_ops))

/* Counters of what threads call outside of these tables */
enum {
	OP_OTHER = NR_RANDOM_OPS,
	OP_CHAOS,
	NR_OPS,
};

static const struct op *get_op(unsigned int i)
{
	return i < ARRAY_SIZE(common_ops) ? &common_ops[i] :
					    &arch_ops[i - ARRAY_SIZE(common_ops)];
}

static void random_op(struct thread *t)
{
	unsigned int total = 0, i, n;

	for (i = 0; i < NR_RANDOM_OPS; i++)
		total += get_op(i)->weight;
	n = rnd(t, total);
	for (i = 0; n >= get_op(i)->weight; i++)
		n -= get_op(i)->weight;
	t->op = i;
	get_op(i)->fn(t);
}

static struct thread *begin_thread(void *arg)
{
	struct thread *t = arg;

	t->tid = gettid();
	return t;
}

static void *end_thread(struct thread *t)
{
	__atomic_store_n(&t->ended, true, __ATOMIC_RELEASE);
	return NULL;
}

static void *fuzz_fn(void *arg)
{
	struct thread *t = begin_thread(arg);

	while (!stopped())
		random_op(t);
	return end_thread(t);
}

/* Reset the vCPU if the guest has made no progress in this many calls of KVM_RUN. */
#define MAX_IDLE_RUNS	4

static void *vcpu_fn(void *arg)
{
	struct thread *t = begin_thread(arg);
	struct kvm_vcpu *vcpu = vcpus[t->nr];
	uint64_t *ops, now, last = 0;
	unsigned int idle = MAX_IDLE_RUNS;

	ops = addr_gva2hva(vm, (vm_vaddr_t)&guest_ops[t->nr]);
	t->op = OP_OTHER;
	while (!stopped()) {
		if (one_in(t, 3))
			random_op(t);
		t->op = OP_OTHER;
		if (idle == MAX_IDLE_RUNS) {
			heal(t, vcpu);
			idle = 0;
		}
		run_vcpu(t, vcpu);
		complete_exit(t, vcpu->run);
		now = READ_ONCE(*ops);
		idle = now == last ? idle + 1 : 0;
		__atomic_fetch_add(&shared->guest_ops, now - last, __ATOMIC_RELAXED);
		last = now;
	}
	return end_thread(t);
}

static const int madvice[] = {
	MADV_DONTNEED, MADV_DONTNEED, MADV_DONTNEED, MADV_REMOVE, MADV_FREE, MADV_COLD,
	MADV_PAGEOUT, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE,
	MADV_UNMERGEABLE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_DONTFORK,
	MADV_DOFORK,
};

static void fork_and_exit(struct thread *t)
{
	uint64_t i, loops = rnd(t, 200);
	pid_t pid = fork();

	if (!pid) {
		for (i = 0; i < loops; i++)
			sched_yield();
		_exit(0);
	}
	if (pid > 0)
		waitpid(pid, NULL, 0);
}

static void chaos(struct thread *t)
{
	static const int prots[] = {
		PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE,
	};
	size_t size = (1 + rnd(t, one_in(t, 4) ? WINDOW_PAGES : 4)) * PAGE_BYTES;
	char *start = one_in(t, 2) ? anon_mem : shmem;
	uint64_t offset = rnd(t, WINDOW_PAGES) * PAGE_BYTES;
	uint64_t args[NR_ARGS] = { 0, (uintptr_t)start + offset, size };
	int ret = 0, advice = pick(t, madvice), prot = pick(t, prots);
	uint64_t data[8];

	size = min_t(size_t, size, WINDOW_SIZE - offset);
	switch (rnd(t, 12)) {
	case 0 ... 6:
		args[0] = advice;
		begin_call(t, "madvise", args);
		ret = madvise(start + offset, size, advice);
		break;
	case 7:
	case 8:
		args[0] = prot;
		begin_call(t, "mprotect", args);
		ret = mprotect(start + offset, size, prot);
		/* Most of the time, make the whole mapping accessible again. */
		if (!one_in(t, 4))
			mprotect(start, WINDOW_SIZE, PROT_READ | PROT_WRITE);
		break;
	case 9:
		/* Avoid the pages of userfaultfd: mmap() would end their registration. */
		offset = max_t(uint64_t, offset,
			       (FIRST_UFFD_PAGE + UFFD_PAGES) * PAGE_BYTES);
		size = min_t(size_t, size, WINDOW_SIZE - offset);
		begin_call(t, "mmap", args);
		if (start == anon_mem)
			ret = mmap(start + offset, size, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED;
		else
			ret = mmap(start + offset, size, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_FIXED, memfd, offset) == MAP_FAILED;
		break;
	case 10:
		/* Write to the guest's pages through memfd, not through the mapping. */
		memset(data, wild(t), sizeof(data));
		begin_call(t, "pwrite", args);
		ret = pwrite(memfd, data, sizeof(data), offset + rnd(t, PAGE_BYTES - 64)) < 0;
		break;
	case 11:
		begin_call(t, "fork", args);
		if (one_in(t, 4))
			fork_and_exit(t);
		break;
	}
	end_call(t, !ret);
}

static void *chaos_fn(void *arg)
{
	const struct timespec pace = { .tv_nsec = 1000000 };
	struct thread *t = begin_thread(arg);

	t->op = OP_CHAOS;
	while (!stopped()) {
		chaos(t);
		/* Leave CPU time to the others. */
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pace, NULL);
	}
	return end_thread(t);
}

/*
 * A page that an access waits for.  It is provided when all threads together have made
 * @calls calls, or after @polls polls.
 */
struct missing {
	uint64_t address;
	uint64_t calls;
	unsigned int polls;
};

/* Returns false if it has to be tried again. */
static bool provide_page(struct thread *t, uint64_t address)
{
	static char page[PAGE_BYTES] __aligned(PAGE_BYTES);
	struct uffdio_copy copy = {
		.dst = address, .src = (uintptr_t)page, .len = PAGE_BYTES,
	};
	struct uffdio_zeropage zero = { .range = { address, PAGE_BYTES } };
	struct uffdio_range range = { address, PAGE_BYTES };
	int ret;

	if (one_in(t, 2))
		ret = CALL(t, uffd, UFFDIO_COPY, &copy, address);
	else
		ret = CALL(t, uffd, UFFDIO_ZEROPAGE, &zero, address);
	if (ret && errno == EAGAIN)
		return false;
	if (!ret)
		count(&shared->pages_provided);
	/* The page is present or no longer mapped: let the access try again. */
	if (ret)
		CALL(t, uffd, UFFDIO_WAKE, &range, address);
	/* Sometimes drop the page again at once. */
	if (one_in(t, 4))
		madvise((void *)address, PAGE_BYTES, MADV_DONTNEED);
	return true;
}

/*
 * Provides each missing page after a random number of calls by the other threads, so that
 * these calls run while an access waits for the page.  If all threads wait for pages, no
 * calls are made.  Therefore a random number of polls ends the wait as well.
 */
static void *uffd_fn(void *arg)
{
	struct thread *t = begin_thread(arg);
	struct pollfd p = { .fd = uffd, .events = POLLIN };
	struct missing missing[64];
	struct uffd_msg msg;
	int nr = 0, i;

	t->op = OP_OTHER;
	while (!__atomic_load_n(&uffd_stop, __ATOMIC_ACQUIRE)) {
		poll(&p, 1, 2);
		while (nr < ARRAY_SIZE(missing) &&
		       read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
			if (msg.event != UFFD_EVENT_PAGEFAULT)
				continue;
			missing[nr].address = msg.arg.pagefault.address & ~(PAGE_BYTES - 1);
			missing[nr].calls = all_calls() + rnd(t, one_in(t, 4) ? 2000 : 50);
			missing[nr].polls = rnd(t, 10);
			nr++;
		}
		for (i = nr - 1; i >= 0; i--) {
			if (!stopped() && missing[i].polls && all_calls() < missing[i].calls) {
				missing[i].polls--;
				continue;
			}
			if (provide_page(t, missing[i].address))
				missing[i] = missing[--nr];
		}
	}
	/* Wakes up whoever still waits. */
	close(uffd);
	return end_thread(t);
}

/*
 * A round
 */

/* PROT_NONE memory behind each mapping catches accesses beyond its end. */
static void create_memory(void)
{
	char *guard = mmap(NULL, 4 * WINDOW_SIZE, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(guard != MAP_FAILED, "mmap(): %s", strerror(errno));
	memfd = kvm_memfd_alloc(WINDOW_SIZE, false);
	anon_mem = mmap(guard, WINDOW_SIZE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	shmem = mmap(guard + 2 * WINDOW_SIZE, WINDOW_SIZE, PROT_READ | PROT_WRITE,
		     MAP_SHARED | MAP_FIXED, memfd, 0);
	TEST_ASSERT(anon_mem != MAP_FAILED && shmem != MAP_FAILED, "mmap(): %s",
		    strerror(errno));
}

static void create_uffd(void)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)shmem + FIRST_UFFD_PAGE * PAGE_BYTES,
			   UFFD_PAGES * PAGE_BYTES },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	uffd = uffd_register(anon_mem + FIRST_UFFD_PAGE * PAGE_BYTES,
			     UFFD_PAGES * PAGE_BYTES, 0);
	/* Not all kernels can do that for shmem. */
	ioctl(uffd, UFFDIO_REGISTER, &reg);
}

static void ignore_signal(int sig)
{
}

/*
 * Signals the vCPU and fuzz threads among @threads.  Threads that have ended are joined
 * only at the end of the round, so that their handles stay valid.
 */
static void kick(struct thread *threads, int nr)
{
	int i;

	for (i = 0; i < nr; i++) {
		if (threads[i].kind == VCPU_THREAD || threads[i].kind == FUZZ_THREAD)
			pthread_kill(threads[i].pthread, SIGUSR1);
	}
}

static bool all_ended(struct thread *threads, int nr)
{
	int i;

	for (i = 0; i < nr; i++) {
		if (!__atomic_load_n(&threads[i].ended, __ATOMIC_ACQUIRE))
			return false;
	}
	return true;
}

static void run_round(uint64_t round_seed, uint64_t ns)
{
	static void *(* const fns[])(void *) = {
		[VCPU_THREAD] = vcpu_fn, [FUZZ_THREAD] = fuzz_fn, [CHAOS_THREAD] = chaos_fn,
		[UFFD_THREAD] = uffd_fn,
	};
	const struct timespec pace = { .tv_nsec = 4000000 };
	struct sigaction sa = { .sa_handler = ignore_signal };
	struct thread *threads = shared->threads, *self = &threads[NR_THREADS - 1];
	int nr = 0, nr_running, i;
	bool killed;
	uint64_t start_ns = now_ns(), end_ns;

	self->kind = MAIN_THREAD;
	self->random = random_init(round_seed, 0);
	self->tid = gettid();
	self->op = OP_OTHER;

	sigaction(SIGUSR1, &sa, NULL);
	create_memory();
	create_uffd();
	for (i = 0; i < NR_IRQFDS; i++)
		irqfds[i] = eventfd(0, EFD_NONBLOCK);
	create_vm(self);

	/* The last vCPU runs in half of the rounds. */
	nr_running = NR_VCPUS - one_in(self, 2);
	killed = one_in(self, 3);
	for (i = 0; i < nr_running; i++, nr++)
		threads[nr] = (struct thread){ .kind = VCPU_THREAD, .nr = i };
	for (i = 0; i < NR_FUZZERS; i++, nr++)
		threads[nr] = (struct thread){ .kind = FUZZ_THREAD, .nr = i };
	threads[nr++] = (struct thread){ .kind = CHAOS_THREAD };
	threads[nr++] = (struct thread){ .kind = UFFD_THREAD };
	for (i = 0; i < nr; i++) {
		threads[i].random = random_init(round_seed, i + 1);
		threads[i].pthread = start_thread(fns[threads[i].kind], &threads[i]);
	}

	/* Make calls for at least twice the time that it took to create the VM. */
	end_ns = now_ns() + max_t(uint64_t, ns, 2 * (now_ns() - start_ns));
	while (now_ns() < end_ns) {
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pace, NULL);
		/* One at a time, so that each has some time between signals. */
		i = rnd(self, nr);
		kick(&threads[i], 1);
	}

	if (killed) {
		shared->kills_itself = true;
		kill(getpid(), SIGKILL);
	}

	__atomic_store_n(&stop, true, __ATOMIC_RELEASE);
	/* An ioctl may wait for a vCPU that is in KVM_RUN, so kick until all have ended. */
	while (!all_ended(threads, nr - 1)) {
		kick(threads, nr - 1);
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pace, NULL);
	}
	__atomic_store_n(&uffd_stop, true, __ATOMIC_RELEASE);
	for (i = 0; i < nr; i++)
		pthread_join(threads[i].pthread, NULL);

	begin_call(self, "destroy VM", ARGS());
	for (i = 0; i < NR_IRQFDS; i++)
		close(irqfds[i]);
	destroy_vm();
	end_call(self, true);
}

/*
 * The watching process
 */

static void print_file(const char *path)
{
	char buf[4096];
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	if (n > 0) {
		buf[n] = '\0';
		printf("%s", buf);
	}
}

typedef bool (*task_fn)(pid_t pid, pid_t tid);

/* Calls @fn for each thread of the process, until it returns true. */
static bool walk_tasks(pid_t pid, task_fn fn)
{
	struct dirent *entry;
	bool found = false;
	char path[64];
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && !found && (entry = readdir(dir))) {
		if (atoi(entry->d_name))
			found = fn(pid, atoi(entry->d_name));
	}
	if (dir)
		closedir(dir);
	return found;
}

static char task_state(pid_t pid, pid_t tid, unsigned long *switches)
{
	unsigned long n;
	char path[64], line[256], state = '?';
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/status", pid, tid);
	f = fopen(path, "re");
	*switches = 0;
	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "State: %c", &state) == 1)
			continue;
		if (sscanf(line, "voluntary_ctxt_switches: %lu", &n) == 1 ||
		    sscanf(line, "nonvoluntary_ctxt_switches: %lu", &n) == 1)
			*switches += n;
	}
	if (f)
		fclose(f);
	return state;
}

static bool print_task(pid_t pid, pid_t tid)
{
	unsigned long switches;
	char path[64];
	int i;

	printf("# thread %d, state %c", tid, task_state(pid, tid, &switches));
	for (i = 0; i < NR_THREADS; i++) {
		struct thread *t = &shared->threads[i];

		if (t->tid == tid && t->call)
			printf(", %s %s(%#lx, %#lx, %#lx, %#lx)",
			       t->start_ns ? "in" : "last call", t->call, t->args[0],
			       t->args[1], t->args[2], t->args[3]);
	}
	printf("\n");
	snprintf(path, sizeof(path), "/proc/%d/task/%d/stack", pid, tid);
	print_file(path);
	return false;
}

/* A thread in uninterruptible sleep, and since when it sleeps without having run */
struct sleeper {
	pid_t tid;
	unsigned long switches;
	uint64_t since_ns;
};

static struct sleeper sleepers[64];

static bool sleeps_too_long(pid_t pid, pid_t tid)
{
	struct sleeper *s = NULL;
	unsigned long switches;
	bool sleeps = task_state(pid, tid, &switches) == 'D';
	int i;

	for (i = 0; i < ARRAY_SIZE(sleepers); i++) {
		if (sleepers[i].tid == tid) {
			s = &sleepers[i];
			break;
		}
		if (!s && !sleepers[i].tid)
			s = &sleepers[i];
	}
	/* There are fewer threads than entries. */
	if (!s)
		return false;
	if (!sleeps)
		*s = (struct sleeper){};
	else if (s->tid != tid || s->switches != switches)
		*s = (struct sleeper){ tid, switches, now_ns() };
	return sleeps && now_ns() - s->since_ns > bound_secs * NSEC_PER_SEC;
}

static void __printf(2, 3) report(pid_t child, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	printf("# round %lu (-s %lu -r 1): %s\n", shared->rounds, shared->round_seed, text);
	walk_tasks(child, print_task);
	kill(child, SIGKILL);
	TEST_FAIL("round %lu (-s %lu -r 1): %s", shared->rounds, shared->round_seed, text);
}

static void check_calls(pid_t child)
{
	int i;

	for (i = 0; i < NR_THREADS; i++) {
		struct thread *t = &shared->threads[i];
		uint64_t start = __atomic_load_n(&t->start_ns, __ATOMIC_ACQUIRE);

		if (start && now_ns() > start + bound_secs * NSEC_PER_SEC &&
		    start == __atomic_load_n(&t->start_ns, __ATOMIC_ACQUIRE))
			report(child, "%s(%#lx, %#lx, %#lx, %#lx) of thread %d has hung for %u s",
			       t->call, t->args[0], t->args[1], t->args[2], t->args[3],
			       t->tid, bound_secs);
	}
}

/* Waits until the child ends, which it should do by itself soon after @end_ns. */
static void watch(pid_t child, uint64_t end_ns)
{
	int pidfd = syscall(__NR_pidfd_open, child, 0);
	struct pollfd p = { .fd = pidfd, .events = POLLIN };
	int status;

	TEST_ASSERT(pidfd >= 0, "pidfd_open(): %s", strerror(errno));
	memset(sleepers, 0, sizeof(sleepers));
	while (poll(&p, 1, 500) <= 0) {
		check_calls(child);
		if (walk_tasks(child, sleeps_too_long))
			report(child, "a thread has been in uninterruptible sleep for %u s",
			       bound_secs);
		if (now_ns() > end_ns + 2 * bound_secs * NSEC_PER_SEC)
			report(child, "expected the round to end within %u s after its time",
			       2 * bound_secs);
	}
	close(pidfd);
	TEST_ASSERT(waitpid(child, &status, 0) == child, "waitpid(): %s", strerror(errno));
	if (shared->kills_itself && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
		return;
	if (WIFEXITED(status) && WEXITSTATUS(status) == CASE_SKIPPED)
		_exit(CASE_SKIPPED);
	TEST_ASSERT(WIFEXITED(status) && !WEXITSTATUS(status),
		    "round %lu (-s %lu -r 1): ended with status %#x, expected 0",
		    shared->rounds, shared->round_seed, status);
}

/* Runs @fn in a child process, for @ns nanoseconds and the time it needs to end. */
static void run_child(void (*fn)(uint64_t round_seed, uint64_t ns), uint64_t round_seed,
		      uint64_t ns)
{
	pid_t child;

	memset(shared->threads, 0, sizeof(shared->threads));
	shared->round_seed = round_seed;
	shared->kills_itself = false;
	child = fork();
	TEST_ASSERT(child >= 0, "fork(): %s", strerror(errno));
	if (!child) {
		/* Do not outlive the process that watches. */
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		fn(round_seed, ns);
		_exit(0);
	}
	watch(child, now_ns() + ns);
}

/*
 * The kernel's memory
 */

static const char * const meminfo_fields[] = { "SUnreclaim", "VmallocUsed", "Percpu" };

static void read_meminfo(long *kib)
{
	FILE *f = fopen("/proc/meminfo", "re");
	char line[128], name[64];
	long value;
	int i;

	TEST_ASSERT(f, "cannot open /proc/meminfo: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63[^:]: %ld kB", name, &value) != 2)
			continue;
		for (i = 0; i < ARRAY_SIZE(meminfo_fields); i++) {
			if (!strcmp(name, meminfo_fields[i]))
				kib[i] = value;
		}
	}
	fclose(f);
}

/* KASAN and kmemleak keep much memory for a while; kmemleak itself finds leaks. */
static bool is_memory_measurable(void)
{
	return access("/sys/kernel/debug/kmemleak", F_OK);
}

/* The first rounds fill caches.  After them, memory may grow by MEMORY_BOUND KiB. */
#define WARM_UP_ROUNDS	4
#define MEMORY_BOUND	8192

/* Waits for memory that is freed after grace periods or by workers. */
static void check_memory(const char *what, const long *before, long bound_kib)
{
	long after[ARRAY_SIZE(meminfo_fields)] = {};
	uint64_t start = now_ns();
	int i;

	for (i = 0; i < ARRAY_SIZE(meminfo_fields); i++) {
		do {
			read_meminfo(after);
			sched_yield();
		} while (after[i] > before[i] + bound_kib &&
			 now_ns() - start < 10 * NSEC_PER_SEC);
		TEST_ASSERT(after[i] <= before[i] + bound_kib,
			    "%s: %s grew from %ld to %ld KiB, expected less than %ld KiB more",
			    what, meminfo_fields[i], before[i], after[i], bound_kib);
	}
}

static void share(void)
{
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(shared != MAP_FAILED, "mmap(): %s", strerror(errno));
}

static void print_counts(void)
{
	int i;

	for (i = 0; i < NR_OPS; i++) {
		struct op_count *c = &shared->counts[i];

		pr_info("# %8lu calls, %8lu successful, %8lu us on average: %s\n", c->calls,
			c->successes, c->ns / max(c->calls, 1ul) / 1000,
			i < NR_RANDOM_OPS ? get_op(i)->name :
			i == OP_CHAOS ? "changes of the memory" : "guest and userfaultfd");
	}
	for (i = 0; i < NR_EXIT_REASONS; i++) {
		if (shared->exits[i])
			pr_info("# %8lu exits %s\n", shared->exits[i], exit_reason_str(i));
	}
}

/*
 * A function called this many times must have succeeded at least once.  Of all functions,
 * the one that succeeds least often does so once in a hundred calls.
 */
#define CALLED_OFTEN	2000

/* On arm64, no vCPU can be created, because the vgic is initialized. */
#ifdef __x86_64__
#define NEVER_SUCCEEDS	NULL
#else
#define NEVER_SUCCEEDS	op_create_vcpu
#endif

static void check_progress(void)
{
	int i;

	TEST_ASSERT(shared->rounds, "expected at least one round in %u s", budget_secs);
	TEST_ASSERT(shared->guest_ops, "expected the guests to make progress, in %lu rounds",
		    shared->rounds);
	TEST_ASSERT(shared->pages_provided, "expected pages to be provided, in %lu rounds",
		    shared->rounds);
	for (i = 0; i < NR_RANDOM_OPS; i++)
		TEST_ASSERT(shared->counts[i].successes ||
			    shared->counts[i].calls < CALLED_OFTEN ||
			    get_op(i)->fn == NEVER_SUCCEEDS,
			    "%s: expected success in some of %lu calls, got none",
			    get_op(i)->name, shared->counts[i].calls);
}

TEST(random_calls)
{
	uint64_t start = now_ns(), end = start + budget_secs * NSEC_PER_SEC, calls = 0;
	long before[ARRAY_SIZE(meminfo_fields)] = {};
	int i;

	static_assert(NR_OPS <= MAX_OPS, "");
	share();
	for (;;) {
		if (max_rounds ? shared->rounds == max_rounds : now_ns() >= end)
			break;
		if (shared->rounds == WARM_UP_ROUNDS)
			read_meminfo(before);
		/* A quarter of the rounds is longer. */
		run_child(run_round, seed + shared->rounds,
			  ((seed + shared->rounds) % 4 ? 500 : 1500) * 1000000ull);
		shared->rounds++;
	}
	if (shared->rounds > WARM_UP_ROUNDS && is_memory_measurable())
		check_memory("after all rounds", before, MEMORY_BOUND);
	for (i = 0; i < NR_OPS; i++)
		calls += shared->counts[i].calls;
	pr_info("# seed %lu: %lu rounds, %lu calls, %lu guest operations, %lu pages provided\n",
		seed, shared->rounds, calls, shared->guest_ops, shared->pages_provided);
	if (verbose)
		print_counts();
	check_progress();
}

/*
 * Short sequences that trigger known bugs
 */

static struct thread *begin_directed(void)
{
	struct thread *t = &shared->threads[0];

	t->kind = MAIN_THREAD;
	t->random = random_init(seed, 0);
	t->op = OP_OTHER;
	return begin_thread(t);
}

#ifdef __x86_64__

#define OTHER_SLOT		(FIRST_SLOT + 1)
#define APF_DATA_GPA		(WINDOW_GPA + FIRST_UFFD_PAGE * PAGE_BYTES)

/* Used only by the guest, except that the host reads apf.token. */
static struct kvm_vcpu_pv_apf_data apf __aligned(64);
static bool apf_activated;

static void guest_apf_page_fault(struct ex_regs *regs)
{
	apf.flags = 0;
	GUEST_SYNC(1);
}

static void guest_apf_ready(struct ex_regs *regs)
{
	WRITE_ONCE(apf_activated, true);
	WRITE_ONCE(apf.token, 0);
	x2apic_write_reg(APIC_EOI, 0);
	wrmsr(MSR_KVM_ASYNC_PF_ACK, 1);
}

static void guest_apf(uint64_t apf_gpa)
{
	x2apic_enable();
	wrmsr(MSR_KVM_ASYNC_PF_INT, APF_VECTOR);
	wrmsr(MSR_KVM_ASYNC_PF_EN, apf_gpa | KVM_ASYNC_PF_ENABLED |
	      KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT);
	while (!READ_ONCE(apf_activated))
		asm volatile("sti; nop; cli" ::: "memory");
	asm volatile("sti");
	for (;;)
		(void)READ_ONCE(*(uint64_t *)APF_DATA_GPA);
}

static void set_slot(struct thread *t, uint32_t slot, uint64_t gpa, uint64_t size)
{
	struct kvm_userspace_memory_region r = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)anon_mem + gpa - WINDOW_GPA,
	};

	set_region(t, &r);
}

/* Does somebody wait for the page? */
static bool is_page_missing(void)
{
	struct uffd_msg msg;

	return read(uffd, &msg, sizeof(msg)) == sizeof(msg);
}

static void apf_ack_round(uint64_t round_seed, uint64_t ns)
{
	const uint64_t other_gpa = WINDOW_GPA + WINDOW_SIZE / 2;
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} ack = { .head.nmsrs = 1, .entry = { MSR_KVM_ASYNC_PF_ACK, .data = 1 } };
	struct uffdio_zeropage zero = { .range.len = PAGE_BYTES };
	struct thread *t = begin_directed(), *provider = t + 1;
	struct kvm_vcpu_pv_apf_data *host_apf;
	unsigned int yields, i;

	create_memory();
	create_uffd();
	zero.range.start = (uintptr_t)anon_mem + FIRST_UFFD_PAGE * PAGE_BYTES;
	vm = vm_create_with_one_vcpu(&vcpus[0], guest_apf);
	set_slot(t, FIRST_SLOT, APF_DATA_GPA, PAGE_BYTES);
	virt_map(vm, APF_DATA_GPA, APF_DATA_GPA, 1);
	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(vcpus[0]);
	vm_install_exception_handler(vm, PF_VECTOR, guest_apf_page_fault);
	vm_install_exception_handler(vm, APF_VECTOR, guest_apf_ready);
	vcpu_args_set(vcpus[0], 1, addr_gva2gpa(vm, (vm_vaddr_t)&apf));
	host_apf = addr_gva2hva(vm, (vm_vaddr_t)&apf);

	/* The #PF is delivered, and KVM's worker waits for the page. */
	begin_call(t, "KVM_RUN until #PF", ARGS());
	vcpu_run_to_sync(vcpus[0]);
	wait_for(is_page_missing());
	end_call(t, true);

	/* Readers of the memslots use the other index of kvm->srcu from now on. */
	set_slot(t, OTHER_SLOT, other_gpa, PAGE_BYTES);

	/* From now on, whoever waits for the page gets it. */
	provider->kind = UFFD_THREAD;
	provider->random = random_init(round_seed, 1);
	provider->pthread = start_thread(uffd_fn, provider);

	/*
	 * Nothing shows when the worker gets the page.  If the page is dropped before
	 * that, the worker waits for it again, and the next attempt allows more time.
	 */
	for (yields = 100; !READ_ONCE(host_apf->token) && yields < 1000000; yields *= 2) {
		CALL(t, uffd, UFFDIO_ZEROPAGE, &zero, zero.range.start);
		for (i = 0; i < yields; i++)
			sched_yield();
		madvise((void *)zero.range.start, PAGE_BYTES, MADV_DONTNEED);
		CALL(t, vcpus[0]->fd, KVM_SET_MSRS, &ack, ack.entry.index);
	}
	TEST_ASSERT(host_apf->token, "expected the page to become ready");

	for (i = 0; i < 4; i++) {
		set_slot(t, OTHER_SLOT, other_gpa, 0);
		set_slot(t, OTHER_SLOT, other_gpa, PAGE_BYTES);
	}
	__atomic_store_n(&uffd_stop, true, __ATOMIC_RELEASE);
	pthread_join(provider->pthread, NULL);
	kvm_vm_free(vm);
}

/*
 * KVM_SET_MSRS acknowledges an asynchronous page fault that is complete, but whose page
 * is gone again.  The changes of the memslots after it have to return.
 */
TEST(apf_ack_memslot)
{
	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_KVM_ASYNC_PF_INT));
	share();
	run_child(apf_ack_round, seed, 0);
}

/* Beyond the memslots */
#define APF_INVALID_GPA		(WINDOW_GPA + WINDOW_SIZE)

static void guest_apf_refused(uint64_t apf_gpa)
{
	uint8_t vector;

	x2apic_enable();
	wrmsr(MSR_KVM_ASYNC_PF_INT, APF_VECTOR);
	vector = wrmsr_safe(MSR_KVM_ASYNC_PF_EN, APF_INVALID_GPA | KVM_ASYNC_PF_ENABLED |
			    KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT);
	GUEST_ASSERT_1(!rdmsr(MSR_KVM_ASYNC_PF_EN), rdmsr(MSR_KVM_ASYNC_PF_EN));
	asm volatile("sti");
	READ_ONCE(*(uint64_t *)APF_DATA_GPA);
	GUEST_SYNC(vector);
}

static void apf_refused_round(uint64_t round_seed, uint64_t ns)
{
	struct thread *t = begin_directed(), *provider = t + 1;
	uint64_t vector;

	create_memory();
	create_uffd();
	vm = vm_create_with_one_vcpu(&vcpus[0], guest_apf_refused);
	set_slot(t, FIRST_SLOT, APF_DATA_GPA, PAGE_BYTES);
	virt_map(vm, APF_DATA_GPA, APF_DATA_GPA, 1);
	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(vcpus[0]);

	provider->kind = UFFD_THREAD;
	provider->random = random_init(round_seed, 1);
	provider->pthread = start_thread(uffd_fn, provider);
	begin_call(t, "KVM_RUN", ARGS());
	vector = vcpu_run_to_sync(vcpus[0]);
	end_call(t, true);
	TEST_ASSERT(vector == GP_VECTOR, "expected vector %#x, got %#lx", GP_VECTOR, vector);

	__atomic_store_n(&uffd_stop, true, __ATOMIC_RELEASE);
	pthread_join(provider->pthread, NULL);
	kvm_vm_free(vm);
}

/*
 * The guest's attempt to enable asynchronous page faults is refused.  KVM must not send
 * any, and must not warn.
 */
TEST(apf_refused)
{
	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_KVM_ASYNC_PF_INT));
	share();
	run_child(apf_refused_round, seed, 0);
}

static bool is_vector_requested(struct kvm_vcpu *vcpu)
{
	struct kvm_lapic_state lapic;

	/* KVM_RUN checks for upcalls, but does not enter the guest. */
	vcpu->run->immediate_exit = true;
	TEST_ASSERT(__vcpu_run(vcpu) == -1 && errno == EINTR,
		    "KVM_RUN with immediate_exit: errno %d, expected EINTR", errno);
	vcpu->run->immediate_exit = false;
	vcpu_ioctl(vcpu, KVM_GET_LAPIC, &lapic);
	return lapic.regs[APIC_IRR + UPCALL_VECTOR / 32 * 0x10 + UPCALL_VECTOR % 32 / 8] &
	       BIT(UPCALL_VECTOR % 8);
}

static void guest_nothing(void)
{
	GUEST_DONE();
}

/* Two ports of the same word of evtchn_pending, one for each vCPU */
#define PORT_OF_VCPU0		200
#define PORT_OF_VCPU1		201

/*
 * vcpu_info is set before the upcall vector, while an event of vCPU 0 is pending in
 * memory.  Only the guest knows that it is for vCPU 0.  A later event of vCPU 1 in the
 * same word has to raise an interrupt, and so has that of vCPU 0.
 */
TEST(xen_vcpu_info_vector)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND,
		.msr = XEN_MSR,
	};
	struct kvm_lapic_state lapic;
	uint8_t *mem;
	int i;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	vm = vm_create_with_vcpus(2, guest_nothing, vcpus);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, WINDOW_GPA, FIRST_SLOT, 3, 0);
	mem = addr_gpa2hva(vm, WINDOW_GPA);
	mem[XEN_SHINFO_PENDING + PORT_OF_VCPU0 / 8] = BIT(PORT_OF_VCPU0 % 8);
	for (i = 0; i < 2; i++) {
		vcpu_ioctl(vcpus[i], KVM_GET_LAPIC, &lapic);
		*(uint32_t *)&lapic.regs[APIC_SPIV] |= APIC_SPIV_APIC_ENABLED;
		vcpu_ioctl(vcpus[i], KVM_SET_LAPIC, &lapic);
	}

	vm_ioctl(vm, KVM_XEN_HVM_CONFIG, &config);
	ASSERT_EQ(xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = 1,
	}), 0);
	ASSERT_EQ(xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = WINDOW_GPA / PAGE_BYTES,
	}), 0);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(xen_set_vcpu_attr(vcpus[i], (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
			.u.gpa = WINDOW_GPA + (1 + i) * PAGE_BYTES,
		}), 0);
	}
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(xen_set_vcpu_attr(vcpus[i], (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR,
			.u.vector = UPCALL_VECTOR,
		}), 0);
	}

	ASSERT_EQ(xen_send_event(vm, PORT_OF_VCPU1, 1, KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL), 0);
	for (i = 1; i >= 0; i--)
		TEST_ASSERT(is_vector_requested(vcpus[i]),
			    "event of vCPU %d: no interrupt, expected one", i);
	kvm_vm_free(vm);
}

#else

#define CMDQ_NR_COMMANDS	(ITS_CMDQ_SIZE / 32)
#define CMDQ_NR_ROUNDS		(CMDQ_NR_COMMANDS / 3)

/*
 * 128 bytes for each LPI would be five times the bound.  A debug kernel, where the memory
 * is not measured, is too slow for so many.
 */
#define UNMAPPED_LPIS		40000
#define UNMAPPED_LPIS_DEBUG	1000
#define UNMAPPED_BOUND		1024

static void guest_fill_cmdq(void)
{
	int i;

	for (i = 0; i < CMDQ_NR_ROUNDS; i++) {
		its_send_mapti(&its[0], 0, 0, 0, LPI_BASE);
		its_send_int(&its[0], 0, 0);
		its_send_discard(&its[0], 0, 0);
	}
	for (i = CMDQ_NR_ROUNDS * 3; i < CMDQ_NR_COMMANDS; i++)
		its_send_sync(&its[0], 0);
}

/* vCPU 0 only enables LPIs; vCPU 1 maps, makes pending and unmaps an LPI of vCPU 0. */
static void guest_unmap_pending(uint64_t nr)
{
	guest_init(nr);
	its_send_mapc(&its[0], 0, 0, true);
	its_send_mapd(&its[0], 0, tables.itt, EVENT_BITS, true);
	guest_fill_cmdq();
	for (;;) {
		GUEST_SYNC(0);
		/*
		 * Make the ITS execute all commands again, except the last one.  The next
		 * pass starts with that one.
		 */
		its[0].cwriter = (its[0].cwriter + ITS_CMDQ_SIZE - 32) % ITS_CMDQ_SIZE;
		writeq(its[0].cwriter, (void *)(its[0].base + GITS_CWRITER));
	}
}

static void lpi_unmap_round(uint64_t round_seed, uint64_t ns)
{
	long before[ARRAY_SIZE(meminfo_fields)] = {};
	int i, nr = is_memory_measurable() ? UNMAPPED_LPIS : UNMAPPED_LPIS_DEBUG;
	struct thread *t = begin_directed();
	uint64_t lpis;

	create_memory();
	create_vm(t);
	vcpu_set_reg(vcpus[1], ARM64_CORE_REG(regs.pc), (uint64_t)guest_unmap_pending);
	vcpu_args_set(vcpus[1], 1, 1ul);
	vcpu_run_to_sync(vcpus[1]);
	vcpu_run_to_sync(vcpus[1]);

	read_meminfo(before);
	for (i = 0; i < nr; i += CMDQ_NR_ROUNDS) {
		begin_call(t, "MAPTI, INT, DISCARD", ARGS(i));
		vcpu_run_to_sync(vcpus[1]);
		end_call(t, true);
	}
	if (is_memory_measurable())
		check_memory("LPIs unmapped while pending", before, UNMAPPED_BOUND);
	lpis = vm_get_stat(vm, "lpis_allocated");
	TEST_ASSERT(lpis <= 1, "expected at most 1 LPI to be allocated, got %lu", lpis);
	destroy_vm();
}

/*
 * LPIs are unmapped while they are pending for a vCPU that does not run.  KVM must free
 * them without waiting for the vCPU to run.
 */
TEST(lpi_unmap_memory)
{
	share();
	run_child(lpi_unmap_round, seed, 0);
}

#endif

static void help(void)
{
	printf("usage: %s [-h] [-s seed] [-t seconds] [-r rounds] [-b seconds] [-v] [case...]\n",
	       program_invocation_short_name);
	printf(" -s: seed of the first round (default: the time); the next one has seed + 1\n");
	printf(" -t: for how many seconds to run rounds (default: %u)\n", budget_secs);
	printf(" -r: how many rounds to run, instead of -t\n");
	printf(" -b: how long a call may take (default: %u)\n", bound_secs);
	printf(" -v: print how many times each call was made and how many times it succeeded\n");
	printf(" case: run only this one; !case: run all but this one\n");
}

int main(int argc, char *argv[])
{
	char timeout[16];
	int opt;

	seed = time(NULL);
	while ((opt = getopt(argc, argv, "hs:t:r:b:v")) != -1) {
		switch (opt) {
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 't':
			budget_secs = atoi(optarg);
			break;
		case 'r':
			max_rounds = atoi(optarg);
			break;
		case 'b':
			bound_secs = atoi(optarg);
			break;
		case 'v':
			verbose = true;
			break;
		case 'h':
		default:
			help();
			exit(opt == 'h' ? 0 : 1);
		}
	}

	/* Cases may take their time, and the watching process has to outlive them. */
	snprintf(timeout, sizeof(timeout), "%u", budget_secs + 3 * bound_secs + 30);
	setenv("TEST_TIMEOUT", timeout, 0);

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));
	pr_info("# seed %lu\n", seed);
	return run_cases(argv + optind);
}
