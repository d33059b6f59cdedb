// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test Xen FIFO event channels
 *
 * Each case creates its own VMs.  In cases in which upcalls have to wake up the guest,
 * the guest consumes the queues.  In cases that check the order of ports or stop while
 * ports are in a queue, the host consumes them, with the same code.
 *
 * With -p, the test only measures the cost of delivering an event.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <linux/sizes.h>

#include "apic.h"
#include "disk.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "uffd.h"
#include "xen.h"

#define UPCALL_VECTOR		0x30 /* arbitrarily chosen */
#define RFLAGS_IF		BIT(9)
#define PRIO_2LEVEL		KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL

#define NR_PORTS		131072
#define NR_PRIORITIES		16
#define DEFAULT_PRIORITY	7
#define PORTS_PER_PAGE		1024
#define NR_ARRAY_PAGES		(NR_PORTS / PORTS_PER_PAGE)

#define PENDING			BIT(31)
#define MASKED			BIT(30)
#define LINKED			BIT(29)
#define BUSY			BIT(28)
#define LINK_MASK		(BIT(17) - 1)

struct control_block {
	uint32_t ready;
	uint32_t reserved;
	uint32_t head[NR_PRIORITIES];
};

/* Two vCPUs consume events, the third one only sends them. */
#define NR_CONSUMERS		2
#define NR_VCPUS		3

/* Arbitrarily chosen, identity mapped, outside of memslot 0. */
#define SHARED_GPA		0xc0000000
#define SHARED_SLOT		10

enum {
	SHINFO_PAGE,
	VCPU_INFO_PAGE,
	CONTROL_PAGE = VCPU_INFO_PAGE + NR_CONSUMERS,
	ARRAY_PAGE = CONTROL_PAGE + NR_CONSUMERS,
	/* How often the guest handled each port; 1 for port 0 tells it to stop. */
	HANDLED_PAGE = ARRAY_PAGE + NR_ARRAY_PAGES,
	NR_SHARED_PAGES = HANDLED_PAGE + NR_ARRAY_PAGES,
};

#define PAGE_GPA(page)		(SHARED_GPA + (page) * PAGE_SIZE)

/* Arbitrarily chosen, inside the page. */
#define CONTROL_OFFSET		0x128

/* What fifo_vm_create() sets up. */
#define SETUP_MODE		BIT(0)
#define SETUP_CONTROL		BIT(1)
#define SETUP_ARRAY		BIT(2)
#define SETUP_ALL		(SETUP_MODE | SETUP_CONTROL | SETUP_ARRAY)

#define FIRST_GSI		32

struct fifo_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	uint8_t *shared;
	uint32_t sent[64];	/* by sender_thread() */
};

static uint64_t nr_events = 300;
static uint64_t seed;

static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/*
 * Consumer, in guest and host
 */

struct consumer {
	struct control_block *control;
	uint32_t *words;
	uint32_t ready;
	uint32_t head[NR_PRIORITIES];
};

static uint32_t clear_linked(uint32_t *word)
{
	uint32_t old = READ_ONCE(*word);

	while (!__atomic_compare_exchange_n(word, &old, old & ~(LINKED | LINK_MASK),
					    false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
		;
	return old;
}

/*
 * Like Linux: a port that is pending stays masked.  Returns true then, because
 * EVTCHNOP_unmask is needed.
 */
static bool clear_masked(uint32_t *word)
{
	uint32_t old = READ_ONCE(*word);

	do {
		if (old & PENDING)
			return true;
		old &= ~BUSY;
	} while (!__atomic_compare_exchange_n(word, &old, old & ~MASKED, false,
					      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
	return false;
}

/* Returns the port of the next event in order of priority, or 0 if there is none. */
static uint32_t consume(struct consumer *c)
{
	uint32_t port, word;
	int priority;

	for (;;) {
		c->ready |= __atomic_exchange_n(&c->control->ready, 0,
						__ATOMIC_SEQ_CST);
		if (!c->ready)
			return 0;

		priority = __builtin_ctz(c->ready);
		port = c->head[priority];
		if (!port)
			port = READ_ONCE(c->control->head[priority]);

		word = clear_linked(&c->words[port]);
		c->head[priority] = word & LINK_MASK;
		if (!c->head[priority])
			c->ready &= ~BIT(priority);

		if ((word & PENDING) && !(word & MASKED)) {
			__atomic_fetch_and(&c->words[port], ~PENDING,
					   __ATOMIC_SEQ_CST);
			return port;
		}
	}
}

/*
 * Guest side
 */

static uint32_t *const guest_words = (void *)PAGE_GPA(ARRAY_PAGE);
static uint32_t *const guest_handled = (void *)PAGE_GPA(HANDLED_PAGE);

static uint64_t event_channel_op(uint64_t op, uint32_t port)
{
	return xen_hypercall(__HYPERVISOR_event_channel_op, op, (uint64_t)&port);
}

/* Interrupts are off, except during HLT.  An upcall only has to end the HLT. */
static void guest_upcall(struct ex_regs *regs)
{
	regs->rflags &= ~RFLAGS_IF;
	guest_skip_hlt(regs);
}

static void guest_consume(struct consumer *c, uint64_t i)
{
	struct xen_vcpu_info *vi = (void *)PAGE_GPA(VCPU_INFO_PAGE + i);
	uint32_t port;

	while (__atomic_exchange_n(&vi->evtchn_upcall_pending, 0, __ATOMIC_SEQ_CST)) {
		while ((port = consume(c)))
			__atomic_fetch_add(&guest_handled[port], 1, __ATOMIC_SEQ_CST);
	}
}

static struct consumer guest_consumer(uint64_t i)
{
	return (struct consumer) {
		.control = (void *)PAGE_GPA(CONTROL_PAGE + i) + CONTROL_OFFSET,
		.words = guest_words,
	};
}

static void guest_main(uint64_t i)
{
	struct consumer c = guest_consumer(i);

	for (;;) {
		guest_consume(&c, i);
		if (READ_ONCE(guest_handled[0]))
			break;
		guest_wait();
	}
	GUEST_DONE();
}

static void guest_lapic_upcall(struct ex_regs *regs)
{
	guest_upcall(regs);
	x2apic_write_reg(APIC_EOI, 0);
}

static void guest_lapic_main(uint64_t i)
{
	x2apic_enable();
	guest_main(i);
}

/* For each port in turn: mask, consume, unmask, and consume again. */
static void guest_masker(uint64_t i, uint64_t first, uint64_t nr)
{
	struct consumer c = guest_consumer(i);
	uint32_t port;

	while (!READ_ONCE(guest_handled[0])) {
		for (port = first; port < first + nr; port++) {
			__atomic_fetch_or(&guest_words[port], MASKED, __ATOMIC_SEQ_CST);
			guest_consume(&c, i);
			if (clear_masked(&guest_words[port]))
				GUEST_ASSERT(!event_channel_op(EVTCHNOP_unmask, port));
			guest_consume(&c, i);
			let_host_interrupt();
		}
	}
	GUEST_DONE();
}

/* Send to each port in turn, but only after the port's previous event was handled. */
static void guest_sender(uint64_t first, uint64_t nr, uint64_t events)
{
	uint64_t n;

	for (n = 0; n < events; n++) {
		uint32_t port = first + n % nr;

		while (READ_ONCE(guest_handled[port]) < n / nr)
			let_host_interrupt();
		GUEST_ASSERT(!event_channel_op(EVTCHNOP_send, port));
	}
	GUEST_DONE();
}

static void guest_ops(void)
{
	uint32_t *args = (void *)PAGE_GPA(SHINFO_PAGE);

	for (;;)
		GUEST_SYNC(event_channel_op(args[0], args[1]));
}

/* Like guest_ops(), but in 32-bit mode, and also for SCHEDOP_poll. */
static void guest_ops32(void)
{
	uint32_t *args = (void *)PAGE_GPA(SHINFO_PAGE);
	uint32_t port;
	struct {
		uint32_t ports;
		uint32_t nr_ports;
		uint64_t timeout;
	} poll = { .ports = (uint64_t)&port, .nr_ports = 1 };

	for (;;) {
		port = args[1];
		if (args[0] == SCHEDOP_poll)
			GUEST_SYNC(xen_hypercall32(__HYPERVISOR_sched_op, args[0],
						   (uint64_t)&poll, 0));
		else
			GUEST_SYNC(xen_hypercall32(__HYPERVISOR_event_channel_op,
						   args[0], (uint64_t)&port, 0));
	}
}

static void guest_poll(uint64_t port)
{
	uint32_t p = port;
	struct {
		uint32_t *ports;
		unsigned int nr_ports;
		uint64_t timeout;
	} poll = { .ports = &p, .nr_ports = 1 };

	for (;;)
		GUEST_SYNC(xen_hypercall(__HYPERVISOR_sched_op, SCHEDOP_poll,
					 (uint64_t)&poll));
}

static void guest_nothing(void)
{
	GUEST_DONE();
}

static void guest_sync_forever(void)
{
	for (;;)
		GUEST_SYNC(0);
}

/* Write values to the shared pages that a well-behaved guest never writes. */
static void guest_hostile(uint64_t state, uint64_t i)
{
	struct control_block *control = (void *)PAGE_GPA(CONTROL_PAGE + i) + CONTROL_OFFSET;
	struct xen_vcpu_info *vi = (void *)PAGE_GPA(VCPU_INFO_PAGE + i);
	uint32_t port;
	uint64_t r;

	while (!READ_ONCE(guest_handled[0])) {
		r = random_next(&state);
		/* Half of the time, use the few ports that events are sent to. */
		port = (r >> 8) & (r & 0x80 ? NR_PORTS - 1 : 0x7f);

		switch (r & 7) {
		case 0:
			WRITE_ONCE(guest_words[port], r >> 32);
			break;
		case 1:	/* The port is linked to itself. */
			WRITE_ONCE(guest_words[port], PENDING | LINKED | port);
			break;
		case 2:
			__atomic_fetch_xor(&guest_words[port], LINKED, __ATOMIC_SEQ_CST);
			break;
		case 3:
			__atomic_fetch_xor(&guest_words[port], r >> 32, __ATOMIC_SEQ_CST);
			break;
		case 4:
			WRITE_ONCE(control->ready, r >> 32);
			break;
		case 5:
			WRITE_ONCE(control->head[port % NR_PRIORITIES], r >> 32);
			break;
		case 6:
			WRITE_ONCE(vi->evtchn_upcall_pending, 0);
			WRITE_ONCE(guest_words[port], 0);
			break;
		case 7:
			event_channel_op(r & 0x1000000 ? EVTCHNOP_unmask :
							 EVTCHNOP_send,
					 r & 0x2000000 ? port : r >> 32);
			break;
		}
	}
	GUEST_DONE();
}

/*
 * Host side
 */

static int set_vm_attr(struct fifo_vm *f, struct kvm_xen_hvm_attr attr)
{
	return xen_set_vm_attr(f->vm, attr);
}

static int get_vm_attr(struct fifo_vm *f, struct kvm_xen_hvm_attr *attr)
{
	return __vm_ioctl(f->vm, KVM_XEN_HVM_GET_ATTR, attr) ? errno : 0;
}

static int set_vcpu_attr(struct fifo_vm *f, int i, struct kvm_xen_vcpu_attr attr)
{
	return xen_set_vcpu_attr(f->vcpus[i], attr);
}

static int get_vcpu_attr(struct fifo_vm *f, int i, struct kvm_xen_vcpu_attr *attr)
{
	return __vcpu_ioctl(f->vcpus[i], KVM_XEN_VCPU_GET_ATTR, attr) ? errno : 0;
}

static int set_config(struct fifo_vm *f, uint32_t flags)
{
	struct kvm_xen_hvm_config config = {
		.flags = flags,
		.msr = XEN_HYPERCALL_MSR,
	};

	return __vm_ioctl(f->vm, KVM_XEN_HVM_CONFIG, &config) ? errno : 0;
}

static int set_mode(struct fifo_vm *f, uint32_t mode)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_EVTCHN_MODE,
		.u.evtchn_mode.mode = mode,
	});
}

static int set_array(struct fifo_vm *f, uint32_t page, uint64_t gfn)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_ARRAY,
		.u.fifo_array = { .page = page, .gfn = gfn },
	});
}

static int set_array_page(struct fifo_vm *f, uint32_t page)
{
	return set_array(f, page, PAGE_GPA(ARRAY_PAGE + page) / PAGE_SIZE);
}

static int set_port(struct fifo_vm *f, uint32_t port, uint32_t vcpu_id,
		    uint32_t priority)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_PORT,
		.u.fifo_port = {
			.port = port, .vcpu = vcpu_id, .priority = priority,
		},
	});
}

static int set_waiting(struct fifo_vm *f, struct kvm_xen_fifo_waiting *waiting)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_WAITING,
		.u.fifo_waiting = (uint64_t)waiting,
	});
}

static int get_waiting(struct fifo_vm *f, struct kvm_xen_fifo_waiting *waiting)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_WAITING,
		.u.fifo_waiting = (uint64_t)waiting,
	};

	return get_vm_attr(f, &attr);
}

static void add_waiting(__u64 *bitmap, uint32_t port)
{
	bitmap[port / 64] |= BIT_ULL(port % 64);
}

static bool is_waiting(const __u64 *bitmap, uint32_t port)
{
	return bitmap[port / 64] & BIT_ULL(port % 64);
}

static uint32_t nr_waiting(const __u64 *bitmap)
{
	uint32_t port, nr = 0;

	for (port = 0; port < NR_PORTS; port++)
		nr += is_waiting(bitmap, port);
	return nr;
}

static int set_control(struct fifo_vm *f, int i, uint64_t gpa)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_CONTROL,
		.u.fifo_control = { .vcpu = f->vcpus[i]->id, .gpa = gpa },
	});
}

static int get_control(struct fifo_vm *f, int i, uint64_t *gpa)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_CONTROL,
		.u.fifo_control.vcpu = f->vcpus[i]->id,
	};
	int r = get_vm_attr(f, &attr);

	*gpa = attr.u.fifo_control.gpa;
	return r;
}

static uint64_t control_gpa(int i)
{
	return PAGE_GPA(CONTROL_PAGE + i) + CONTROL_OFFSET;
}

static void set_vcpu_info(struct fifo_vm *f, int i, uint64_t gpa)
{
	ASSERT_EQ(set_vcpu_attr(f, i, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		.u.gpa = gpa,
	}), 0);
}

#define CONFIG_FLAGS	(KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |	\
			 KVM_XEN_HVM_CONFIG_EVTCHN_SEND)

static void set_long_mode(struct fifo_vm *f, bool long_mode)
{
	ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = long_mode,
	}), 0);
}

static struct fifo_vm *fifo_vm_create(void *guest_code, uint32_t setup)
{
	struct fifo_vm *f = calloc(1, sizeof(*f));
	int i;

	TEST_ASSERT(f, "calloc() failed: %s", strerror(errno));
	f->vm = vm_create_with_vcpus(NR_VCPUS, guest_code, f->vcpus);
	/* Shared memory keeps its contents when a page is made absent. */
	vm_userspace_mem_region_add(f->vm, VM_MEM_SRC_SHMEM, SHARED_GPA,
				    SHARED_SLOT, NR_SHARED_PAGES, 0);
	virt_map(f->vm, SHARED_GPA, SHARED_GPA, NR_SHARED_PAGES);
	f->shared = addr_gpa2hva(f->vm, SHARED_GPA);

	ASSERT_EQ(set_config(f, CONFIG_FLAGS | KVM_XEN_HVM_CONFIG_EVTCHN_FIFO), 0);
	set_long_mode(f, true);
	ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = PAGE_GPA(SHINFO_PAGE) / PAGE_SIZE,
	}), 0);
	ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, .u.vector = UPCALL_VECTOR,
	}), 0);

	vm_init_descriptor_tables(f->vm);
	vm_install_exception_handler(f->vm, UPCALL_VECTOR, guest_upcall);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_init_descriptor_tables(f->vcpus[i]);
	for (i = 0; i < NR_CONSUMERS; i++)
		set_vcpu_info(f, i, PAGE_GPA(VCPU_INFO_PAGE + i));
	/* Clear what KVM has written to the shared pages so far. */
	memset(f->shared, 0, NR_SHARED_PAGES * PAGE_SIZE);

	if (setup & SETUP_MODE)
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_FIFO), 0);
	for (i = 0; setup & SETUP_CONTROL && i < NR_CONSUMERS; i++)
		ASSERT_EQ(set_control(f, i, control_gpa(i)), 0);
	for (i = 0; setup & SETUP_ARRAY && i < NR_ARRAY_PAGES; i++)
		ASSERT_EQ(set_array_page(f, i), 0);

	return f;
}

static void fifo_vm_free(struct fifo_vm *f)
{
	kvm_vm_free(f->vm);
	free(f);
}

static void *shared_page(struct fifo_vm *f, int page)
{
	return f->shared + page * PAGE_SIZE;
}

static uint32_t *word(struct fifo_vm *f, uint32_t port)
{
	return (uint32_t *)shared_page(f, ARRAY_PAGE) + port;
}

static uint32_t *handled(struct fifo_vm *f, uint32_t port)
{
	return (uint32_t *)shared_page(f, HANDLED_PAGE) + port;
}

static struct control_block *control(struct fifo_vm *f, int i)
{
	return shared_page(f, CONTROL_PAGE + i) + CONTROL_OFFSET;
}

static struct xen_vcpu_info *vcpu_info(struct fifo_vm *f, int i)
{
	return shared_page(f, VCPU_INFO_PAGE + i);
}

static struct consumer host_consumer(struct fifo_vm *f, int i)
{
	return (struct consumer) {
		.control = control(f, i),
		.words = word(f, 0),
	};
}

static void make_absent(struct fifo_vm *f, int page)
{
	TEST_ASSERT(!madvise(shared_page(f, page), PAGE_SIZE, MADV_DONTNEED),
		    "madvise() failed: %s", strerror(errno));
}

static int send_event(struct fifo_vm *f, uint32_t port, uint32_t vcpu_id,
		      uint32_t priority)
{
	return xen_send_event(f->vm, port, vcpu_id, priority);
}

/* Create one irqfd per port and store the eventfds in fds. */
static void irqfds_create(struct fifo_vm *f, const uint32_t *ports, int nr,
			  int vcpu, uint32_t priority, int *fds)
{
	struct kvm_irq_routing *routing;
	int i;

	routing = calloc(1, sizeof(*routing) + nr * sizeof(routing->entries[0]));
	TEST_ASSERT(routing, "calloc() failed: %s", strerror(errno));
	routing->nr = nr;
	for (i = 0; i < nr; i++) {
		routing->entries[i].gsi = FIRST_GSI + i;
		routing->entries[i].type = KVM_IRQ_ROUTING_XEN_EVTCHN;
		routing->entries[i].u.xen_evtchn.port = ports[i];
		routing->entries[i].u.xen_evtchn.vcpu = f->vcpus[vcpu]->id;
		routing->entries[i].u.xen_evtchn.priority = priority;
	}
	vm_ioctl(f->vm, KVM_SET_GSI_ROUTING, routing);
	free(routing);

	for (i = 0; i < nr; i++)
		fds[i] = kvm_irqfd_create(f->vm, FIRST_GSI + i);
}

static void irqfds_destroy(struct fifo_vm *f, int nr, int *fds)
{
	int i;

	for (i = 0; i < nr; i++)
		kvm_irqfd_destroy(f->vm, FIRST_GSI + i, fds[i]);
}

/* Let EVTCHNOP_send to the port deliver an event to the same port of the guest. */
static int set_loopback(struct fifo_vm *f, uint32_t port, int vcpu,
			uint32_t priority, uint32_t flags)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_EVTCHN,
		.u.evtchn = {
			.send_port = port,
			.type = EVTCHNSTAT_interdomain,
			.flags = flags,
			.deliver.port = {
				.port = port,
				.vcpu = f->vcpus[vcpu]->id,
				.priority = priority,
			},
		},
	});
}

/* Run until a ucall.  Fail hypercalls that go to userspace with -EINVAL. */
static uint64_t run_vcpu(struct kvm_vcpu *vcpu, struct ucall *uc)
{
	for (;;) {
		vcpu_run(vcpu);

		if (vcpu->run->exit_reason == KVM_EXIT_XEN) {
			vcpu->run->xen.u.hcall.result = -EINVAL;
			continue;
		}

		switch (get_ucall(vcpu, uc)) {
		case UCALL_ABORT:
			REPORT_GUEST_ASSERT(*uc);
			break;
		case UCALL_SYNC:
		case UCALL_DONE:
			return uc->cmd;
		default:
			TEST_FAIL("vCPU %u: unexpected exit reason %s, ucall %lu",
				  vcpu->id, exit_reason_str(vcpu->run->exit_reason),
				  uc->cmd);
		}
	}
}

/* Calls KVM_RUN, but does not enter the guest. */
static void run_immediate(struct kvm_vcpu *vcpu)
{
	vcpu->run->immediate_exit = true;
	TEST_ASSERT(__vcpu_run(vcpu) == -1 && errno == EINTR,
		    "KVM_RUN with immediate_exit: errno %d, expected EINTR", errno);
	vcpu->run->immediate_exit = false;
}

static void *vcpu_thread(void *vcpu)
{
	struct ucall uc;

	ASSERT_EQ(run_vcpu(vcpu, &uc), UCALL_DONE);
	return NULL;
}

static void *sync_thread(void *vcpu)
{
	ASSERT_EQ(vcpu_run_to_sync(vcpu), 0);
	return NULL;
}

/* Bind the port to a queue and send an event. */
static void send_to(struct fifo_vm *f, uint32_t port, int i, uint32_t priority)
{
	ASSERT_EQ(set_port(f, port, f->vcpus[i]->id, priority), 0);
	ASSERT_EQ(send_event(f, port, f->vcpus[i]->id, PRIO_2LEVEL), 0);
}

/* Tell the guest to stop, and wake up each vCPU by an event of the last port. */
static void stop_guest(struct fifo_vm *f, pthread_t *threads, int nr)
{
	int i;

	WRITE_ONCE(*handled(f, 0), 1);
	for (i = 0; i < nr; i++) {
		wait_for(!(READ_ONCE(*word(f, NR_PORTS - 1)) & (PENDING | LINKED)));
		send_to(f, NR_PORTS - 1, i, 0);
		join_thread(threads[i], "consumer");
	}
}

/* The number of events that were appended to the vCPU's queues */
static uint64_t nr_queued(struct fifo_vm *f, int i)
{
	return vcpu_get_stat(f->vcpus[i], "xen_fifo_fast") +
	       vcpu_get_stat(f->vcpus[i], "xen_fifo_slow");
}

static void assert_word(struct fifo_vm *f, uint32_t port, uint32_t expected)
{
	TEST_ASSERT(READ_ONCE(*word(f, port)) == expected,
		    "event word of port %u is %#x, expected %#x", port,
		    READ_ONCE(*word(f, port)), expected);
}

static void assert_next(struct consumer *c, uint32_t expected)
{
	uint32_t port = consume(c);

	TEST_ASSERT(port == expected, "next port in the queues is %u, expected %u",
		    port, expected);
}

/*
 * Test cases
 */

static void test_ports_of(bool long_mode)
{
	struct fifo_vm *f = fifo_vm_create(guest_main, SETUP_ALL);
	struct consumer c = host_consumer(f, 0);
	uint32_t port;

	set_long_mode(f, long_mode);
	for (port = 1; port < NR_PORTS; port++) {
		ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, PRIO_2LEVEL), 0);
		/* The vCPU completes the event if the host has moved a page. */
		if (nr_queued(f, 0) != port)
			run_immediate(f->vcpus[0]);
		/* A second event of a pending port must not change anything. */
		if (port % 1000 == 0)
			ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, PRIO_2LEVEL), 0);
	}
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 1);
	ASSERT_EQ(vcpu_info(f, 1)->evtchn_upcall_pending, 0);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(DEFAULT_PRIORITY));

	for (port = 1; port < NR_PORTS; port++)
		assert_next(&c, port);
	assert_next(&c, 0);

	for (port = 0; port < NR_PORTS; port++)
		assert_word(f, port, 0);
	ASSERT_EQ(nr_queued(f, 0), NR_PORTS - 1);
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "xen_fifo_dropped"), 0);
	fifo_vm_free(f);
}

/* The number of ports and the layout are the same in 64-bit and 32-bit mode. */
TEST(ports)
{
	test_ports_of(true);
	test_ports_of(false);
}

/* A 32-bit guest has the same event words, but passes hypercall arguments differently. */
TEST(mode_32bit)
{
	struct fifo_vm *f = fifo_vm_create(guest_ops32, SETUP_ALL);
	struct consumer c = host_consumer(f, 0);
	uint32_t *args = shared_page(f, SHINFO_PAGE);
	uint32_t port = NR_PORTS - 1;

	set_long_mode(f, false);
	xen_add_code32_segment(f->vm, f->vcpus[2]);
	ASSERT_EQ(set_loopback(f, port, 0, 3, 0), 0);

	args[0] = EVTCHNOP_send;
	args[1] = port;
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 1);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(3));
	assert_next(&c, port);
	assert_next(&c, 0);

	*word(f, port) = MASKED;
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	assert_word(f, port, MASKED | PENDING);
	assert_next(&c, 0);

	/* The poll ends at once, although the port is masked. */
	args[0] = SCHEDOP_poll;
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	args[1] = NR_PORTS;
	ASSERT_EQ((int32_t)vcpu_run_to_sync(f->vcpus[2]), -EINVAL);

	args[0] = EVTCHNOP_unmask;
	args[1] = port;
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	assert_word(f, port, PENDING | LINKED);
	assert_next(&c, port);
	fifo_vm_free(f);
}

TEST(priorities)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	struct consumer c = host_consumer(f, 1);
	uint32_t sent[NR_PRIORITIES][64];
	uint32_t id = f->vcpus[1]->id;
	uint64_t state = seed;
	int nr[NR_PRIORITIES] = { };
	int i, priority;

	for (i = 0; i < 512; i++) {
		uint32_t port = 1 + i * 255;

		priority = random_next(&state) % NR_PRIORITIES;
		if (nr[priority] == ARRAY_SIZE(sent[0]))
			continue;
		sent[priority][nr[priority]++] = port;

		/* Either the event names the priority, or the port has it. */
		if (i % 2) {
			ASSERT_EQ(send_event(f, port, id, priority), 0);
		} else {
			ASSERT_EQ(set_port(f, port, KVM_XEN_FIFO_NO_VCPU, priority), 0);
			ASSERT_EQ(send_event(f, port, id, PRIO_2LEVEL), 0);
		}
	}

	for (priority = 0; priority < NR_PRIORITIES; priority++) {
		for (i = 0; i < nr[priority]; i++)
			assert_next(&c, sent[priority][i]);
	}
	assert_next(&c, 0);

	/* An event of higher priority overtakes a queue of lower priority. */
	ASSERT_EQ(send_event(f, 2, id, 9), 0);
	ASSERT_EQ(send_event(f, 3, id, 9), 0);
	ASSERT_EQ(send_event(f, 4, id, 9), 0);
	assert_next(&c, 2);
	ASSERT_EQ(send_event(f, 5, id, 3), 0);
	assert_next(&c, 5);
	assert_next(&c, 3);
	assert_next(&c, 4);
	assert_next(&c, 0);
	fifo_vm_free(f);
}

/*
 * Each producer sends to its own ports.  It sends to a port again only after the
 * guest has handled the port's previous event.  A lost event therefore stops the
 * producer, and a duplicate event makes the port's count too large.
 */
#define PORTS_PER_PRODUCER	8

enum { BY_IOCTL, BY_PRIORITY, BY_MOVING, BY_IRQFD, BY_HYPERCALL, NR_METHODS };

struct producer {
	struct fifo_vm *f;
	int method;
	uint32_t first;
	int fds[PORTS_PER_PRODUCER];
};

static void producer_send(struct producer *p, int i, uint64_t round)
{
	struct fifo_vm *f = p->f;
	uint32_t port = p->first + i;

	switch (p->method) {
	case BY_IOCTL:
		ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, PRIO_2LEVEL), 0);
		break;
	case BY_PRIORITY:
		ASSERT_EQ(set_port(f, port, f->vcpus[1]->id, round % 3), 0);
		ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, PRIO_2LEVEL), 0);
		break;
	case BY_MOVING:
		ASSERT_EQ(set_port(f, port, f->vcpus[round % NR_CONSUMERS]->id,
				   (round / 2 + i) % NR_PRIORITIES), 0);
		ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
		break;
	case BY_IRQFD:
		eventfd_write(p->fds[i], 1);
		break;
	}
}

/* Fail because of a port that makes no progress, and print its state. */
static void report_stall(struct fifo_vm *f, uint32_t port, uint64_t round)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_PORT,
		.u.fifo_port.port = port,
	};
	static struct kvm_xen_fifo_waiting waiting;
	int i, j;

	ASSERT_EQ(get_vm_attr(f, &attr), 0);
	ASSERT_EQ(get_waiting(f, &waiting), 0);
	for (i = 0; i < NR_CONSUMERS; i++) {
		pr_info("vCPU %d: upcall %u, ready %#x, heads", i,
			vcpu_info(f, i)->evtchn_upcall_pending,
			READ_ONCE(control(f, i)->ready));
		for (j = 0; j < NR_PRIORITIES; j++)
			pr_info(" %u", READ_ONCE(control(f, i)->head[j]));
		pr_info("\n");
	}
	pr_info("word %#x, vCPU %u, priority %u, unsent %d, unqueued %d\n",
		READ_ONCE(*word(f, port)), attr.u.fifo_port.vcpu,
		attr.u.fifo_port.priority, is_waiting(waiting.unsent, port),
		is_waiting(waiting.unqueued, port));
	TEST_FAIL("port %u was handled %u times, expected %lu", port,
		  READ_ONCE(*handled(f, port)), round);
}

static void wait_for_handled(struct fifo_vm *f, uint32_t port, uint64_t round)
{
	uint64_t start = now_ns();

	while (READ_ONCE(*handled(f, port)) < round) {
		if ((now_ns() - start) / 1000000000 >= WAIT_LIMIT_SECS)
			report_stall(f, port, round);
		sched_yield();
	}
}

/*
 * Wait until *count is end, for as long as *count keeps increasing.  Returns false
 * if *count does not increase for WAIT_LIMIT_SECS.
 */
static bool wait_for_count(const uint32_t *count, uint64_t end)
{
	uint64_t start = now_ns();
	uint32_t n, old = 0;

	while ((n = READ_ONCE(*count)) < end) {
		if (n != old)
			start = now_ns();
		else if ((now_ns() - start) / NSEC_PER_SEC >= WAIT_LIMIT_SECS)
			return false;
		old = n;
		usleep(1000);
	}
	return true;
}

static void *producer_thread(void *data)
{
	struct producer *p = data;
	uint64_t n;

	for (n = 0; n < nr_events; n++) {
		int i = n % PORTS_PER_PRODUCER;
		uint64_t round = n / PORTS_PER_PRODUCER;

		wait_for_handled(p->f, p->first + i, round);
		producer_send(p, i, round);
	}
	return NULL;
}

static void producers_run(struct fifo_vm *f, const int *methods, int nr)
{
	struct producer producers[NR_METHODS];
	uint32_t ports[PORTS_PER_PRODUCER];
	pthread_t threads[NR_METHODS];
	int i, j;

	for (i = 0; i < nr; i++) {
		struct producer *p = &producers[i];

		p->f = f;
		p->method = methods[i];
		/* The ports are adjacent and cross the end of a page. */
		p->first = (i + 1) * PORTS_PER_PAGE - PORTS_PER_PRODUCER / 2;
		if (p->method == BY_IRQFD) {
			for (j = 0; j < PORTS_PER_PRODUCER; j++)
				ports[j] = p->first + j;
			irqfds_create(f, ports, PORTS_PER_PRODUCER, 0, 5, p->fds);
		}
		if (p->method == BY_HYPERCALL) {
			for (j = 0; j < PORTS_PER_PRODUCER; j++)
				ASSERT_EQ(set_loopback(f, p->first + j, j % NR_CONSUMERS,
						       j % 2 ? PRIO_2LEVEL : j, 0), 0);
			vcpu_args_set(f->vcpus[2], 3, p->first, PORTS_PER_PRODUCER,
				      nr_events);
			threads[i] = start_thread(vcpu_thread, f->vcpus[2]);
		} else {
			threads[i] = start_thread(producer_thread, p);
		}
	}

	for (i = 0; i < nr; i++) {
		struct producer *p = &producers[i];

		for (j = 0; j < PORTS_PER_PRODUCER; j++) {
			uint64_t expected = nr_events / PORTS_PER_PRODUCER +
					    (j < nr_events % PORTS_PER_PRODUCER);

			if (!wait_for_count(handled(f, p->first + j), expected))
				report_stall(f, p->first + j, expected);
		}
		join_thread(threads[i], "producer");
		if (p->method == BY_IRQFD)
			irqfds_destroy(f, PORTS_PER_PRODUCER, p->fds);
	}
}

static void assert_counts(struct fifo_vm *f, int nr)
{
	int i, j;

	for (i = 0; i < nr; i++) {
		for (j = 0; j < PORTS_PER_PRODUCER; j++) {
			uint32_t port = (i + 1) * PORTS_PER_PAGE -
					PORTS_PER_PRODUCER / 2 + j;
			uint64_t expected = nr_events / PORTS_PER_PRODUCER +
					    (j < nr_events % PORTS_PER_PRODUCER);

			TEST_ASSERT(*handled(f, port) == expected,
				    "port %u was handled %u times, expected %lu",
				    port, *handled(f, port), expected);
		}
	}
}

static void set_vector(struct fifo_vm *f, int i, bool of_vm, uint8_t vector)
{
	if (of_vm)
		ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
			.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, .u.vector = vector,
		}), 0);
	else
		ASSERT_EQ(set_vcpu_attr(f, i, (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, .u.vector = vector,
		}), 0);
}

static void vcpu_set_code(struct fifo_vm *f, int i, void *code)
{
	struct kvm_regs regs;

	vcpu_regs_get(f->vcpus[i], &regs);
	regs.rip = (uint64_t)code;
	vcpu_regs_set(f->vcpus[i], &regs);
}

static void test_soak(void *consumer, bool lapic_vector)
{
	static const int methods[] = {
		BY_IOCTL, BY_PRIORITY, BY_MOVING, BY_IRQFD, BY_HYPERCALL,
	};
	struct fifo_vm *f = fifo_vm_create(consumer, SETUP_ALL);
	pthread_t consumers[NR_CONSUMERS];
	int i;

	if (lapic_vector) {
		set_vector(f, 0, true, 0);
		for (i = 0; i < NR_CONSUMERS; i++)
			set_vector(f, i, false, UPCALL_VECTOR);
		vm_install_exception_handler(f->vm, UPCALL_VECTOR, guest_lapic_upcall);
	}
	vcpu_set_code(f, 2, guest_sender);
	for (i = 0; i < NR_CONSUMERS; i++) {
		vcpu_args_set(f->vcpus[i], 1, (uint64_t)i);
		consumers[i] = start_thread(vcpu_thread, f->vcpus[i]);
	}

	producers_run(f, methods, ARRAY_SIZE(methods));
	stop_guest(f, consumers, NR_CONSUMERS);
	assert_counts(f, ARRAY_SIZE(methods));
	pr_info("soak: %lu events, none lost, none duplicated\n",
		nr_events * ARRAY_SIZE(methods));
	fifo_vm_free(f);
}

TEST(soak)
{
	test_soak(guest_main, false);
}

/* The upcall is a vector of each vCPU's local APIC. */
TEST(soak_lapic)
{
	test_soak(guest_lapic_main, true);
}

TEST(mask)
{
	static const int methods[] = { BY_IOCTL, BY_IRQFD };
	struct fifo_vm *f = fifo_vm_create(guest_masker, SETUP_ALL);
	pthread_t consumer;

	vcpu_args_set(f->vcpus[0], 3, 0ul,
		      (uint64_t)PORTS_PER_PAGE - PORTS_PER_PRODUCER / 2,
		      (uint64_t)PORTS_PER_PRODUCER);
	/* The guest masks and unmasks the ports of the first producer. */
	consumer = start_thread(vcpu_thread, f->vcpus[0]);
	producers_run(f, methods, ARRAY_SIZE(methods));
	WRITE_ONCE(*handled(f, 0), 1);
	join_thread(consumer, "consumer");
	assert_counts(f, ARRAY_SIZE(methods));
	fifo_vm_free(f);
}

TEST(unmask)
{
	struct fifo_vm *f = fifo_vm_create(guest_ops, SETUP_ALL);
	struct consumer c = host_consumer(f, 0);
	uint32_t *args = shared_page(f, SHINFO_PAGE);
	struct ucall uc;

	/* The port has had no event and has no vCPU, so userspace has to unmask it. */
	args[0] = EVTCHNOP_unmask;
	args[1] = 77;
	vcpu_run(f->vcpus[2]);
	ASSERT_EQ(f->vcpus[2]->run->exit_reason, KVM_EXIT_XEN);
	ASSERT_EQ(f->vcpus[2]->run->xen.u.hcall.params[0], EVTCHNOP_unmask);
	f->vcpus[2]->run->xen.u.hcall.result = 0;
	ASSERT_EQ(run_vcpu(f->vcpus[2], &uc), UCALL_SYNC);

	*word(f, 77) = MASKED;
	ASSERT_EQ(send_event(f, 77, f->vcpus[0]->id, 4), 0);
	assert_word(f, 77, MASKED | PENDING);
	assert_next(&c, 0);

	ASSERT_EQ(nr_queued(f, 0), 0);
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	assert_word(f, 77, PENDING | LINKED);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(4));
	assert_next(&c, 77);
	ASSERT_EQ(nr_queued(f, 0), 1);

	/* A port that is not pending is only unmasked. */
	*word(f, 77) = MASKED;
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	assert_word(f, 77, 0);
	assert_next(&c, 0);

	/* Bind a masked port to another vCPU; the new vCPU gets the event. */
	*word(f, 77) = MASKED;
	ASSERT_EQ(send_event(f, 77, f->vcpus[0]->id, PRIO_2LEVEL), 0);
	ASSERT_EQ(set_port(f, 77, f->vcpus[1]->id, 2), 0);
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	assert_next(&c, 0);
	c = host_consumer(f, 1);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(2));
	assert_next(&c, 77);

	/* The page of the event word is absent. */
	*word(f, 77) = MASKED | PENDING;
	make_absent(f, ARRAY_PAGE);
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	assert_next(&c, 77);
	ASSERT_EQ(nr_queued(f, 0), 1);
	ASSERT_EQ(nr_queued(f, 1), 2);
	fifo_vm_free(f);
}

TEST(moves)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	struct consumer c0 = host_consumer(f, 0), c1 = host_consumer(f, 1);

	/* Move the consumed tail of one queue to another queue; both queues still work. */
	send_to(f, 1, 0, 7);
	send_to(f, 2, 0, 7);
	assert_next(&c0, 1);
	assert_next(&c0, 2);
	send_to(f, 2, 1, 7);
	send_to(f, 3, 0, 7);
	send_to(f, 4, 1, 7);
	assert_next(&c0, 3);
	assert_next(&c0, 0);
	assert_next(&c1, 2);
	assert_next(&c1, 4);
	assert_next(&c1, 0);

	/* A port that is already queued stays in its queue. */
	send_to(f, 5, 0, 7);
	send_to(f, 5, 1, 3);
	assert_next(&c1, 0);
	assert_next(&c0, 5);
	assert_next(&c0, 0);

	/* Move ports to another priority, before and after their old queue is empty. */
	send_to(f, 6, 0, 1);
	send_to(f, 7, 0, 1);
	assert_next(&c0, 6);
	send_to(f, 6, 0, 2);
	assert_next(&c0, 7);
	send_to(f, 7, 0, 2);
	send_to(f, 8, 0, 1);
	assert_next(&c0, 8);
	assert_next(&c0, 6);
	assert_next(&c0, 7);
	assert_next(&c0, 0);
	fifo_vm_free(f);
}

static void *thread_run_immediate(void *vcpu)
{
	run_immediate(vcpu);
	return NULL;
}

/* KVM_RUN with immediate_exit does not wait for the page of a waiting event. */
TEST(run_absent)
{
	static const int pages[] = { ARRAY_PAGE, CONTROL_PAGE };
	struct fifo_vm *f;
	int i, uffd;

	for (i = 0; i < ARRAY_SIZE(pages); i++) {
		f = fifo_vm_create(guest_sync_forever, SETUP_ALL);
		run_immediate(f->vcpus[0]);
		make_absent(f, pages[i]);
		ASSERT_EQ(send_event(f, 3, f->vcpus[0]->id, 7), 0);

		uffd = uffd_register(shared_page(f, pages[i]), PAGE_SIZE, 0);
		join_thread(start_thread(thread_run_immediate, f->vcpus[0]),
			    i ? "control block" : "event array");
		close(uffd);
		ASSERT_EQ(nr_queued(f, 0), 0);

		ASSERT_EQ(vcpu_run_to_sync(f->vcpus[0]), 0);
		ASSERT_EQ(nr_queued(f, 0), 1);
		fifo_vm_free(f);
	}
}

TEST(absent)
{
	static const int pages[] = {
		ARRAY_PAGE + 5, ARRAY_PAGE + 2, CONTROL_PAGE, VCPU_INFO_PAGE,
	};
	struct fifo_vm *f = fifo_vm_create(guest_sync_forever, SETUP_ALL);
	uint32_t tail = 2 * PORTS_PER_PAGE, port = 5 * PORTS_PER_PAGE + 3;
	struct consumer c = host_consumer(f, 0);
	uint64_t sent = 0, min_slow = 0, slow;
	int i, linked, irqfd, fd;

	for (irqfd = 0; irqfd < 2; irqfd++) {
		if (irqfd)
			irqfds_create(f, &port, 1, 0, 7, &fd);

		/* Make each page absent, with an empty queue and after an event of port tail. */
		for (i = 0; i < ARRAY_SIZE(pages) * 2; i++) {
			/* Without an event of port tail, KVM does not access its page. */
			linked = i % 2;
			if (linked) {
				min_slow += pages[i / 2] == ARRAY_PAGE + 2;
				ASSERT_EQ(send_event(f, tail, f->vcpus[0]->id, 7), 0);
				vcpu_run_to_sync(f->vcpus[0]);
				sent++;
			}

			make_absent(f, pages[i / 2]);
			if (irqfd)
				eventfd_write(fd, 1);
			else
				ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
			sent++;
			vcpu_run_to_sync(f->vcpus[0]);
			ASSERT_EQ(nr_queued(f, 0), sent);

			if (linked)
				assert_next(&c, tail);
			assert_next(&c, port);
			assert_next(&c, 0);
			assert_word(f, tail, 0);
			assert_word(f, port, 0);
		}

		if (irqfd)
			irqfds_destroy(f, 1, &fd);

		/*
		 * These events were slow: two for the page of the port's word, two
		 * for the control block, one for the page of the tail's word, and
		 * the event of port tail that was counted above.  An absent vcpu_info
		 * makes no event slow.  More events are slow if the host moves pages.
		 */
		min_slow += 5;
		slow = vcpu_get_stat(f->vcpus[0], "xen_fifo_slow");
		TEST_ASSERT(slow >= min_slow && slow <= sent,
			    "%lu events were queued by the vCPU, expected %lu to %lu",
			    slow, min_slow, sent);
		ASSERT_EQ(nr_queued(f, 0), sent);
	}
	fifo_vm_free(f);
}

/* KVM_RUN raises an upcall that was recorded while the vcpu_info was not set. */
TEST(upcall)
{
	struct fifo_vm *f = fifo_vm_create(guest_main, SETUP_ALL);
	struct kvm_xen_vcpu_attr tails = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
	};
	struct ucall uc;

	vcpu_args_set(f->vcpus[0], 1, 0ul);
	set_vcpu_info(f, 0, GPA_INVALID);
	ASSERT_EQ(send_event(f, 55, f->vcpus[0]->id, 7), 0);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 0);

	set_vcpu_info(f, 0, PAGE_GPA(VCPU_INFO_PAGE));
	*handled(f, 0) = 1;
	ASSERT_EQ(run_vcpu(f->vcpus[0], &uc), UCALL_DONE);
	ASSERT_EQ(*handled(f, 55), 1);

	/* Reading the tails also raises an upcall that was recorded. */
	make_absent(f, VCPU_INFO_PAGE);
	ASSERT_EQ(send_event(f, 55, f->vcpus[0]->id, 7), 0);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 0);
	ASSERT_EQ(get_vcpu_attr(f, 0, &tails), 0);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 1);
	ASSERT_EQ(tails.u.fifo_tails[7], 55);
	fifo_vm_free(f);
}

/*
 * An event waits until its vCPU runs after the array page was set.  An event for a
 * vCPU without control block is dropped.
 */
TEST(waiting)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_MODE);
	uint32_t port0 = 17, port1 = PORTS_PER_PAGE + 17, port2 = port1 + PORTS_PER_PAGE;
	static struct kvm_xen_fifo_waiting waiting;
	struct consumer c = host_consumer(f, 0);
	uint32_t id = f->vcpus[0]->id;

	ASSERT_EQ(send_event(f, port0, id, 7), 0);
	assert_word(f, port0, 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, port0, 0);
	ASSERT_EQ(set_array_page(f, 0), 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, port0, PENDING);
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "xen_fifo_dropped"), 1);

	ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
	ASSERT_EQ(send_event(f, port0, id, 7), 0);
	ASSERT_EQ(send_event(f, port1, id, 7), 0);
	ASSERT_EQ(send_event(f, port1, id, 7), 0);
	assert_next(&c, port0);
	assert_next(&c, 0);

	ASSERT_EQ(set_array_page(f, 1), 0);
	assert_word(f, port1, 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, port1, PENDING | LINKED);
	assert_next(&c, port1);
	assert_next(&c, 0);

	/* An event that waits is discarded if its port is bound to no vCPU. */
	ASSERT_EQ(send_event(f, port2, id, PRIO_2LEVEL), 0);
	ASSERT_EQ(set_port(f, port2, KVM_XEN_FIFO_NO_VCPU, 2), 0);
	ASSERT_EQ(get_waiting(f, &waiting), 0);
	ASSERT_EQ(nr_waiting(waiting.unsent), 0);

	/* The port is bound to another queue while its event waits. */
	ASSERT_EQ(send_event(f, port2, f->vcpus[1]->id, PRIO_2LEVEL), 0);
	ASSERT_EQ(get_waiting(f, &waiting), 0);
	ASSERT_EQ(nr_waiting(waiting.unsent), 1);
	ASSERT_EQ(nr_waiting(waiting.unqueued), 0);
	ASSERT_EQ(is_waiting(waiting.unsent, port2), 1);
	ASSERT_EQ(set_array_page(f, 2), 0);
	ASSERT_EQ(set_port(f, port2, id, 3), 0);
	run_immediate(f->vcpus[1]);
	assert_word(f, port2, 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, port2, PENDING | LINKED);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(3));
	assert_next(&c, port2);
	assert_next(&c, 0);
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "xen_fifo_dropped"), 1);
	/* One event of each port was queued; two of these events had been waiting. */
	ASSERT_EQ(nr_queued(f, 0), 3);
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "xen_fifo_slow"), 2);
	fifo_vm_free(f);
}

/*
 * An event that could not be queued, because the control block was absent, is not sent
 * again after the guest has found and handled it.
 */
TEST(once)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	static struct kvm_xen_fifo_waiting waiting;
	struct consumer c = host_consumer(f, 0);
	uint32_t port = 30, id = f->vcpus[0]->id;
	int by, fd;

	irqfds_create(f, &port, 1, 0, 7, &fd);
	for (by = 0; by < 2; by++) {
		make_absent(f, CONTROL_PAGE);
		if (by)
			eventfd_write(fd, 1);
		else
			ASSERT_EQ(send_event(f, port, id, 7), 0);
		assert_word(f, port, PENDING);
		ASSERT_EQ(get_waiting(f, &waiting), 0);
		ASSERT_EQ(nr_waiting(waiting.unsent), 0);
		ASSERT_EQ(nr_waiting(waiting.unqueued), 1);
		ASSERT_EQ(is_waiting(waiting.unqueued, port), 1);

		/* The guest finds PENDING, as if it had polled the port. */
		__atomic_fetch_and(word(f, port), ~PENDING, __ATOMIC_SEQ_CST);
		run_immediate(f->vcpus[0]);
		assert_word(f, port, 0);
		assert_next(&c, 0);
		ASSERT_EQ(get_waiting(f, &waiting), 0);
		ASSERT_EQ(nr_waiting(waiting.unqueued), 0);
		ASSERT_EQ(nr_queued(f, 0), 0);
	}
	irqfds_destroy(f, 1, &fd);
	fifo_vm_free(f);
}

/* The attribute decides where the events of a port go, not the event. */
TEST(target)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	struct consumer c0 = host_consumer(f, 0), c1 = host_consumer(f, 1);
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_PORT,
		.u.fifo_port.port = 50,
	};
	uint32_t port = 50;
	int fd;

	/* The irqfd has the route of the port's old vCPU. */
	irqfds_create(f, &port, 1, 0, 4, &fd);
	eventfd_write(fd, 1);
	ASSERT_EQ(get_vm_attr(f, &attr), 0);
	ASSERT_EQ(attr.u.fifo_port.vcpu, f->vcpus[0]->id);
	ASSERT_EQ(attr.u.fifo_port.priority, 4);
	ASSERT_EQ(READ_ONCE(c0.control->ready), BIT(4));
	assert_next(&c0, port);

	ASSERT_EQ(set_port(f, port, f->vcpus[1]->id, 2), 0);
	eventfd_write(fd, 1);
	assert_next(&c0, 0);
	ASSERT_EQ(READ_ONCE(c1.control->ready), BIT(2));
	assert_next(&c1, port);
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 4), 0);
	assert_next(&c0, 0);
	ASSERT_EQ(READ_ONCE(c1.control->ready), BIT(2));
	assert_next(&c1, port);
	ASSERT_EQ(get_vm_attr(f, &attr), 0);
	ASSERT_EQ(attr.u.fifo_port.vcpu, f->vcpus[1]->id);
	ASSERT_EQ(attr.u.fifo_port.priority, 2);

	/* A port without vCPU: the next event decides. */
	ASSERT_EQ(set_port(f, port, KVM_XEN_FIFO_NO_VCPU, 9), 0);
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, PRIO_2LEVEL), 0);
	ASSERT_EQ(READ_ONCE(c0.control->ready), BIT(9));
	assert_next(&c0, port);
	irqfds_destroy(f, 1, &fd);
	fifo_vm_free(f);
}

static void copy_port(struct fifo_vm *from, struct fifo_vm *to, uint32_t port)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_PORT,
		.u.fifo_port.port = port,
	};

	ASSERT_EQ(get_vm_attr(from, &attr), 0);
	ASSERT_EQ(set_vm_attr(to, attr), 0);
}

static void copy_state(struct fifo_vm *from, struct fifo_vm *to, const uint32_t *ports,
		       int nr_ports)
{
	static struct kvm_xen_fifo_waiting waiting;
	struct kvm_xen_vcpu_attr tails;
	struct kvm_xen_hvm_attr page;
	uint64_t gpa;
	int i;

	/* Reading the tails may write to guest memory, so copy the memory after that. */
	ASSERT_EQ(set_mode(to, KVM_XEN_EVTCHN_MODE_FIFO), 0);
	for (i = 0; i < NR_CONSUMERS; i++) {
		ASSERT_EQ(get_control(from, i, &gpa), 0);
		ASSERT_EQ(gpa, control_gpa(i));
		ASSERT_EQ(set_control(to, i, gpa), 0);

		tails = (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
		};
		ASSERT_EQ(get_vcpu_attr(from, i, &tails), 0);
		ASSERT_EQ(set_vcpu_attr(to, i, tails), 0);
	}
	ASSERT_EQ(get_waiting(from, &waiting), 0);
	ASSERT_EQ(set_waiting(to, &waiting), 0);
	for (i = 0; i < nr_ports; i++)
		copy_port(from, to, ports[i]);
	memcpy(to->shared, from->shared, NR_SHARED_PAGES * PAGE_SIZE);
	for (i = 0; i < NR_ARRAY_PAGES; i++) {
		page = (struct kvm_xen_hvm_attr) {
			.type = KVM_XEN_ATTR_TYPE_FIFO_ARRAY,
			.u.fifo_array.page = i,
		};
		ASSERT_EQ(get_vm_attr(from, &page), 0);
		if (page.u.fifo_array.gfn != GPA_INVALID)
			ASSERT_EQ(set_vm_attr(to, page), 0);
	}
}

TEST(migration)
{
	struct fifo_vm *from = fifo_vm_create(guest_nothing, SETUP_MODE | SETUP_CONTROL);
	struct fifo_vm *to = fifo_vm_create(guest_nothing, 0);
	uint32_t ports[] = { 10, 2000, 3000, 4000, 5000, 6000 };
	uint32_t last = 100 * PORTS_PER_PAGE, id = from->vcpus[0]->id;
	struct consumer c = host_consumer(from, 0), moved;
	int i;

	for (i = 0; i < 50; i++)
		ASSERT_EQ(set_array_page(from, i), 0);

	for (i = 0; i < 4; i++)
		ASSERT_EQ(send_event(from, ports[i], id, PRIO_2LEVEL), 0);
	assert_next(&c, ports[0]);
	assert_next(&c, ports[1]);
	/* One port is masked, one has no array page, one is in another vCPU's queue. */
	*word(from, 77) = MASKED;
	ASSERT_EQ(send_event(from, 77, id, 3), 0);
	ASSERT_EQ(send_event(from, last, id, 9), 0);
	ASSERT_EQ(send_event(from, 88, from->vcpus[1]->id, 0), 0);

	copy_state(from, to, &last, 1);
	fifo_vm_free(from);
	moved = host_consumer(to, 0);
	moved.ready = c.ready;
	memcpy(moved.head, c.head, sizeof(c.head));

	ASSERT_EQ(send_event(to, ports[4], id, PRIO_2LEVEL), 0);
	ASSERT_EQ(send_event(to, ports[1], id, PRIO_2LEVEL), 0);
	ASSERT_EQ(send_event(to, ports[5], id, PRIO_2LEVEL), 0);
	ASSERT_EQ(set_array_page(to, 100), 0);
	run_immediate(to->vcpus[0]);

	assert_next(&moved, ports[2]);
	assert_next(&moved, ports[3]);
	assert_next(&moved, ports[4]);
	assert_next(&moved, ports[1]);
	assert_next(&moved, ports[5]);
	assert_next(&moved, last);
	assert_next(&moved, 0);
	assert_word(to, 77, MASKED | PENDING);
	moved = host_consumer(to, 1);
	assert_next(&moved, 88);
	assert_next(&moved, 0);
	fifo_vm_free(to);
}

/* A port is still the tail of its queue after it was consumed, also after migration. */
TEST(migration_of_consumed_tail)
{
	struct fifo_vm *from = fifo_vm_create(guest_nothing, SETUP_ALL);
	struct fifo_vm *to = fifo_vm_create(guest_nothing, 0);
	struct consumer c = host_consumer(from, 0);
	uint32_t id = from->vcpus[0]->id;

	ASSERT_EQ(send_event(from, 1, id, 7), 0);
	assert_next(&c, 1);
	assert_next(&c, 0);

	copy_state(from, to, NULL, 0);
	fifo_vm_free(from);
	c = host_consumer(to, 0);

	/* If KVM did not know that port 1 is a tail, it would link port 2 to port 1. */
	ASSERT_EQ(send_event(to, 1, to->vcpus[1]->id, 7), 0);
	ASSERT_EQ(send_event(to, 2, id, 7), 0);
	assert_next(&c, 2);
	assert_next(&c, 0);
	fifo_vm_free(to);
}

/*
 * If the VM is migrated while a vCPU has no vcpu_info, guest memory contains the
 * ready bit of the vCPU's queue, but not the upcall.  KVM has to raise the upcall on
 * the destination.
 */
TEST(migration_no_vcpu_info)
{
	struct fifo_vm *from = fifo_vm_create(guest_nothing, SETUP_ALL);
	struct fifo_vm *to = fifo_vm_create(guest_main, 0);
	struct ucall uc;
	int i;

	set_vcpu_info(from, 0, GPA_INVALID);
	ASSERT_EQ(send_event(from, 55, from->vcpus[0]->id, 7), 0);
	for (i = 0; i < NR_CONSUMERS; i++)
		set_vcpu_info(to, i, GPA_INVALID);
	copy_state(from, to, NULL, 0);
	fifo_vm_free(from);

	ASSERT_EQ(vcpu_info(to, 0)->evtchn_upcall_pending, 0);
	for (i = 0; i < NR_CONSUMERS; i++) {
		set_vcpu_info(to, i, PAGE_GPA(VCPU_INFO_PAGE + i));
		ASSERT_EQ(vcpu_info(to, i)->evtchn_upcall_pending, 0);
		run_immediate(to->vcpus[i]);
	}
	ASSERT_EQ(vcpu_info(to, 0)->evtchn_upcall_pending, 1);
	ASSERT_EQ(vcpu_info(to, 1)->evtchn_upcall_pending, 0);

	vcpu_args_set(to->vcpus[0], 1, 0ul);
	*handled(to, 0) = 1;
	ASSERT_EQ(run_vcpu(to->vcpus[0], &uc), UCALL_DONE);
	ASSERT_EQ(*handled(to, 55), 1);
	fifo_vm_free(to);

	/* The control block can also be set after the vcpu_info. */
	to = fifo_vm_create(guest_nothing, SETUP_MODE);
	control(to, 0)->head[7] = 55;
	control(to, 0)->ready = BIT(7);
	for (i = 0; i < NR_CONSUMERS; i++) {
		ASSERT_EQ(set_control(to, i, control_gpa(i)), 0);
		run_immediate(to->vcpus[i]);
	}
	ASSERT_EQ(vcpu_info(to, 0)->evtchn_upcall_pending, 1);
	ASSERT_EQ(vcpu_info(to, 1)->evtchn_upcall_pending, 0);
	fifo_vm_free(to);
}

/*
 * The vCPU has run since userspace set anything else, so the control block alone has to
 * make it look for a ready queue.
 */
TEST(control_after_run)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_MODE | SETUP_ARRAY);

	control(f, 0)->head[7] = 55;
	control(f, 0)->ready = BIT(7);
	run_immediate(f->vcpus[0]);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 0);

	ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
	run_immediate(f->vcpus[0]);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 1);
	fifo_vm_free(f);
}

/* Like control_after_run, but with the waiting ports alone. */
TEST(waiting_after_run)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	static struct kvm_xen_fifo_waiting waiting;
	uint32_t port = 55;

	ASSERT_EQ(set_port(f, port, f->vcpus[0]->id, 7), 0);
	run_immediate(f->vcpus[0]);

	add_waiting(waiting.unsent, port);
	ASSERT_EQ(set_waiting(f, &waiting), 0);
	assert_word(f, port, 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, port, PENDING | LINKED);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 1);
	fifo_vm_free(f);
}

/* Set by the interrupt handler when an upcall has arrived. */
static bool guest_upcall_arrived;

static void guest_note_upcall(struct ex_regs *regs)
{
	/* The vector of the VM is raised until evtchn_upcall_pending is cleared. */
	regs->rflags &= ~RFLAGS_IF;
	WRITE_ONCE(guest_upcall_arrived, true);
	x2apic_write_reg(APIC_EOI, 0);
}

/* Consumes the queues if an upcall is pending when KVM_RUN is called. */
static void guest_take_upcall(void)
{
	struct consumer c;

	x2apic_enable();
	for (;;) {
		GUEST_SYNC(0);
		WRITE_ONCE(guest_upcall_arrived, false);
		asm volatile("sti\n\t"
			     "nop\n\t"
			     "cli");
		if (READ_ONCE(guest_upcall_arrived)) {
			c = guest_consumer(0);
			guest_consume(&c, 0);
		}
	}
}

enum {
	RESTORE_MEMORY,
	RESTORE_SHARED_INFO,
	RESTORE_VCPU_INFO,
	RESTORE_VECTOR,
	RESTORE_LAPIC,
	RESTORE_TIMER,
	RESTORE_MODE,
	RESTORE_CONTROL,
	RESTORE_TAILS,
	RESTORE_PORT,
	RESTORE_WAITING,
	RESTORE_ARRAY,
	NR_RESTORE_STEPS,
};

static const char *const restore_steps[] = {
	"memory", "SHARED_INFO", "VCPU_INFO", "UPCALL_VECTOR", "LAPIC", "TIMER",
	"EVTCHN_MODE", "FIFO_CONTROL", "FIFO_TAILS", "FIFO_PORT", "FIFO_WAITING",
	"FIFO_ARRAY",
};

/*
 * In the saved VM, one event is in a queue, one is waiting, and the timer may expire.
 * The last port gets an event after the restore.
 */
#define QUEUED_PORT		10
#define WAITING_PORT		20
#define LATER_PORT		30
#define NR_SAVED_PAGES		(ARRAY_PAGE + 1) /* one page of the event array */
#define RESTORED_TIMER_PORT	40

struct saved_vm {
	bool vm_vector;		/* the vector of the VM, not that of the vCPU */
	bool raised;		/* the upcall was raised before the save */
	bool timer;		/* the timer expires while the VM is restored */
	struct kvm_lapic_state lapic;
	uint8_t memory[NR_SAVED_PAGES * PAGE_SIZE];
};

static void set_shared_info(struct fifo_vm *f, uint64_t gfn)
{
	ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO, .u.shared_info.gfn = gfn,
	}), 0);
}

static void restore_step(struct fifo_vm *f, struct saved_vm *saved, int step)
{
	struct kvm_xen_vcpu_attr tails = { .type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS };
	static struct kvm_xen_fifo_waiting waiting;

	switch (step) {
	case RESTORE_MEMORY:
		memcpy(f->shared, saved->memory, sizeof(saved->memory));
		break;
	case RESTORE_SHARED_INFO:
		set_shared_info(f, PAGE_GPA(SHINFO_PAGE) / PAGE_SIZE);
		break;
	case RESTORE_VCPU_INFO:
		set_vcpu_info(f, 0, PAGE_GPA(VCPU_INFO_PAGE));
		break;
	case RESTORE_VECTOR:
		set_vector(f, 0, saved->vm_vector, UPCALL_VECTOR);
		break;
	case RESTORE_LAPIC:
		vcpu_ioctl(f->vcpus[0], KVM_SET_LAPIC, &saved->lapic);
		break;
	case RESTORE_TIMER:
		ASSERT_EQ(set_vcpu_attr(f, 0, (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
			.u.timer = {
				.port = RESTORED_TIMER_PORT,
				.priority = DEFAULT_PRIORITY,
				.expires_ns = saved->timer ? 1 : 0,
			},
		}), 0);
		break;
	case RESTORE_MODE:
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_FIFO), 0);
		break;
	case RESTORE_CONTROL:
		ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
		break;
	case RESTORE_TAILS:
		tails.u.fifo_tails[DEFAULT_PRIORITY] = QUEUED_PORT;
		ASSERT_EQ(set_vcpu_attr(f, 0, tails), 0);
		break;
	case RESTORE_PORT:
		ASSERT_EQ(set_port(f, WAITING_PORT, f->vcpus[0]->id,
				   DEFAULT_PRIORITY), 0);
		break;
	case RESTORE_WAITING:
		add_waiting(waiting.unsent, WAITING_PORT);
		ASSERT_EQ(set_waiting(f, &waiting), 0);
		break;
	case RESTORE_ARRAY:
		ASSERT_EQ(set_array_page(f, 0), 0);
		break;
	}
}

/* Put everything that restore_step() sets into the state of a new VM. */
static void undo_restore(struct fifo_vm *f)
{
	struct kvm_lapic_state lapic;
	uint32_t *spiv = (void *)&lapic.regs[APIC_SPIV];

	set_vector(f, 0, false, 0);
	set_vector(f, 0, true, 0);
	vcpu_ioctl(f->vcpus[0], KVM_GET_LAPIC, &lapic);
	*spiv &= ~APIC_SPIV_APIC_ENABLED;
	vcpu_ioctl(f->vcpus[0], KVM_SET_LAPIC, &lapic);
	ASSERT_EQ(set_vcpu_attr(f, 0, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
	}), 0);
	set_vcpu_info(f, 0, GPA_INVALID);
	set_shared_info(f, GPA_INVALID);
	ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL), 0);
	memset(f->shared, 0, NR_SAVED_PAGES * PAGE_SIZE);
	memset(handled(f, 0), 0, PAGE_SIZE);
}

static void swap_steps(int *order, int i, int j)
{
	int step = order[i];

	order[i] = order[j];
	order[j] = step;
}

/*
 * Chooses an order.  The other FIFO attributes fail with ENXIO before the mode is set,
 * and so do the tails before the control block is set.
 */
static void random_order(uint64_t *state, int *order)
{
	int i, mode = -1, first = -1, control = -1, tails = -1;

	xen_get_order(random_next(state) % xen_nr_orders(NR_RESTORE_STEPS), order,
		      NR_RESTORE_STEPS);
	for (i = 0; i < NR_RESTORE_STEPS; i++) {
		if (order[i] == RESTORE_MODE)
			mode = i;
		if (first < 0 && order[i] >= RESTORE_MODE)
			first = i;
	}
	swap_steps(order, mode, first);
	for (i = 0; i < NR_RESTORE_STEPS; i++) {
		if (order[i] == RESTORE_CONTROL)
			control = i;
		if (order[i] == RESTORE_TAILS)
			tails = i;
	}
	if (tails < control)
		swap_steps(order, tails, control);
}

/* Returns true if no event is lost. */
static bool restore(struct fifo_vm *f, struct saved_vm *saved, const int *order)
{
	uint32_t queued, waiting, timer, later;
	char text[200] = "";
	int i;

	undo_restore(f);
	for (i = 0; i < NR_RESTORE_STEPS; i++)
		restore_step(f, saved, order[i]);

	vcpu_run_to_sync(f->vcpus[0]);
	queued = *handled(f, QUEUED_PORT);
	waiting = *handled(f, WAITING_PORT);
	timer = *handled(f, RESTORED_TIMER_PORT);

	ASSERT_EQ(send_event(f, LATER_PORT, f->vcpus[0]->id, DEFAULT_PRIORITY), 0);
	vcpu_run_to_sync(f->vcpus[0]);
	later = *handled(f, LATER_PORT);
	if (queued == 1 && waiting == 1 && timer == saved->timer && later == 1)
		return true;

	for (i = 0; i < NR_RESTORE_STEPS; i++) {
		strcat(text, " ");
		strcat(text, restore_steps[order[i]]);
	}
	pr_info("vector of the %s, upcall %s, order%s: handled: queued event %u, waiting %u, timer %u, later event %u; expected 1, 1, %d, 1\n",
		saved->vm_vector ? "VM" : "vCPU", saved->raised ? "raised" : "not raised",
		text, queued, waiting, timer, later, saved->timer);
	return false;
}

/*
 * Restore a VM in random orders: the events that were pending in the saved VM, the event
 * of the timer and a later event are handled once.
 */
TEST(restore_order)
{
	struct fifo_vm *f = fifo_vm_create(guest_take_upcall, 0);
	struct saved_vm *saved = calloc(1, sizeof(*saved));
	int i, variant, lost = 0, tries = nr_events / 30 + 1;
	struct control_block *c;
	int order[NR_RESTORE_STEPS];
	uint64_t state = seed;
	uint32_t *w;

	TEST_ASSERT(saved, "calloc() failed: %s", strerror(errno));
	vm_install_exception_handler(f->vm, UPCALL_VECTOR, guest_note_upcall);
	vcpu_run_to_sync(f->vcpus[0]);
	vcpu_ioctl(f->vcpus[0], KVM_GET_LAPIC, &saved->lapic);

	c = (void *)saved->memory + CONTROL_PAGE * PAGE_SIZE + CONTROL_OFFSET;
	c->ready = BIT(DEFAULT_PRIORITY);
	c->head[DEFAULT_PRIORITY] = QUEUED_PORT;
	w = (void *)saved->memory + ARRAY_PAGE * PAGE_SIZE;
	w[QUEUED_PORT] = PENDING | LINKED;

	for (variant = 0; variant < 8; variant++) {
		saved->vm_vector = variant & 1;
		saved->raised = variant & 2;
		/* The timer's upcall makes the guest handle other events, too. */
		saved->timer = variant & 4;
		saved->memory[VCPU_INFO_PAGE * PAGE_SIZE] = saved->raised;
		for (i = 0; i < tries; i++) {
			random_order(&state, order);
			if (!restore(f, saved, order))
				lost++;
		}
	}
	TEST_ASSERT(!lost, "seed %#lx: %d of %d restores lost or repeated an event, expected 0",
		    seed, lost, 8 * tries);

	free(saved);
	fifo_vm_free(f);
}

TEST(reset)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_EVTCHN_MODE };
	uint32_t id = f->vcpus[0]->id;
	struct consumer c;
	int i;

	for (i = 0; i < 3; i++) {
		ASSERT_EQ(send_event(f, 5000, id, 7), 0);
		ASSERT_EQ(send_event(f, 5001, id, 7), 0);
		c = host_consumer(f, 0);
		assert_next(&c, 5000);

		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL), 0);
		ASSERT_EQ(get_vm_attr(f, &attr), 0);
		ASSERT_EQ(attr.u.evtchn_mode.mode, KVM_XEN_EVTCHN_MODE_2LEVEL);
		ASSERT_EQ(send_event(f, 5, id, PRIO_2LEVEL), 0);
		ASSERT_EQ(send_event(f, 5000, id, PRIO_2LEVEL), EINVAL);
		memset(f->shared, 0, NR_SHARED_PAGES * PAGE_SIZE);

		/* The new mode must not keep any of the old state. */
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_FIFO), 0);
		ASSERT_EQ(get_vm_attr(f, &attr), 0);
		ASSERT_EQ(attr.u.evtchn_mode.mode, KVM_XEN_EVTCHN_MODE_FIFO);
		ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
		ASSERT_EQ(set_array_page(f, 4), 0);
	}
	fifo_vm_free(f);
}

static void *sender_thread(void *data)
{
	struct fifo_vm *f = data;
	uint32_t port = 1;

	/* A port that is pending in the bitmap or in its word has been handled by nobody. */
	for (; !READ_ONCE(*handled(f, 0)); port = port % 63 + 1) {
		ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, PRIO_2LEVEL), 0);
		__atomic_fetch_add(&f->sent[port], 1, __ATOMIC_SEQ_CST);
	}
	return NULL;
}

/*
 * Change the mode while events are sent.  When the ioctl returns, the bitmap of the old
 * mode contains every event that is not in the new mode: no event is lost if userspace
 * transfers them.
 */
TEST(mode_switch)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, 0);
	uint64_t *pending = shared_page(f, SHINFO_PAGE) + XEN_SHINFO_PENDING;
	struct consumer c;
	uint64_t i, bits;
	pthread_t thread;
	uint32_t port;

	for (i = 0; i < nr_events / 10 + 1; i++) {
		memset(f->shared, 0, NR_SHARED_PAGES * PAGE_SIZE);
		memset(f->sent, 0, sizeof(f->sent));
		thread = start_thread(sender_thread, f);
		wait_for(READ_ONCE(f->sent[i % 63 + 1]));
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_FIFO), 0);

		bits = __atomic_exchange_n(pending, 0, __ATOMIC_SEQ_CST);
		ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
		ASSERT_EQ(set_array_page(f, 0), 0);
		for (port = 1; port < 64; port++) {
			if (bits & BIT_ULL(port))
				ASSERT_EQ(send_event(f, port, f->vcpus[0]->id,
						     PRIO_2LEVEL), 0);
		}
		WRITE_ONCE(*handled(f, 0), 1);
		join_thread(thread, "sender");
		ASSERT_EQ(READ_ONCE(*pending), 0);

		run_immediate(f->vcpus[0]);
		c = host_consumer(f, 0);
		while ((port = consume(&c)))
			f->sent[port] = 0;
		for (port = 1; port < 64; port++)
			TEST_ASSERT(!f->sent[port],
				    "round %lu: port %u was sent %u times, but is not pending",
				    i, port, f->sent[port]);
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL), 0);
	}
	fifo_vm_free(f);
}

static void *reset_thread(void *data)
{
	struct fifo_vm *f = data;

	while (!READ_ONCE(*handled(f, 0))) {
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL), 0);
		ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_FIFO), 0);
		ASSERT_EQ(set_array_page(f, 0), 0);
		ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
		make_absent(f, ARRAY_PAGE);
	}
	return NULL;
}

/* Send events while the mode changes.  They may be lost. */
TEST(reset_race)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	uint64_t i, state = seed;
	pthread_t thread;

	thread = start_thread(reset_thread, f);
	for (i = 0; i < nr_events; i++)
		send_event(f, random_next(&state) % 3000, f->vcpus[0]->id, PRIO_2LEVEL);
	WRITE_ONCE(*handled(f, 0), 1);
	join_thread(thread, "KVM_XEN_ATTR_TYPE_EVTCHN_MODE");
	fifo_vm_free(f);
}

static int register_new_page(struct fifo_vm *f, int page)
{
	TEST_ASSERT(!madvise(shared_page(f, page), PAGE_SIZE, MADV_REMOVE),
		    "madvise(MADV_REMOVE): %s", strerror(errno));
	return uffd_register(shared_page(f, page), PAGE_SIZE, 0);
}

/* Arbitrarily chosen, behind the shared pages. */
#define NEW_SLOT		11
#define NEW_GPA			(SHARED_GPA + NR_SHARED_PAGES * PAGE_SIZE)

static void *add_slot_thread(void *vm)
{
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, NEW_GPA, NEW_SLOT, 1, 0);
	return NULL;
}

TEST(poll)
{
	struct fifo_vm *f = fifo_vm_create(guest_poll, SETUP_ALL);
	uint32_t port = 70000, page = ARRAY_PAGE + port / PORTS_PER_PAGE, *data;
	pthread_t thread, adder;
	int uffd;

	/*
	 * A port that is pending ends the poll at once.  Then an event of the masked
	 * port ends a poll that blocks.
	 */
	vcpu_args_set(f->vcpus[0], 1, (uint64_t)port);
	*word(f, port) = PENDING | MASKED;
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[0]), 0);

	*word(f, port) = MASKED;
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "blocking"), 0);
	thread = start_thread(sync_thread, f->vcpus[0]);
	wait_for(vcpu_get_stat(f->vcpus[0], "blocking") == 1);
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
	join_thread(thread, "SCHEDOP_poll");
	assert_word(f, port, PENDING | MASKED);

	/* A memslot can be added while a poll waits for the page of the event word. */
	data = calloc(1, PAGE_SIZE);
	TEST_ASSERT(data, "calloc()");
	data[port % PORTS_PER_PAGE] = PENDING | MASKED;
	uffd = register_new_page(f, page);
	thread = start_thread(sync_thread, f->vcpus[0]);
	uffd_wait_for_fault(uffd);
	adder = start_thread(add_slot_thread, f->vm);
	join_thread(adder, "KVM_SET_USER_MEMORY_REGION");
	uffd_provide(uffd, shared_page(f, page), data, PAGE_SIZE);
	join_thread(thread, "SCHEDOP_poll");
	close(uffd);
	free(data);

	/* A change of the mode ends a poll, too. */
	*word(f, port) = 0;
	thread = start_thread(sync_thread, f->vcpus[0]);
	wait_for(vcpu_get_stat(f->vcpus[0], "blocking") == 1);
	ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL), 0);
	join_thread(thread, "SCHEDOP_poll");
	fifo_vm_free(f);
}

#define TIMER_PORT		100000

static void set_timer(struct fifo_vm *f, struct kvm_xen_vcpu_attr *timer,
		      uint64_t expires_ns)
{
	timer->u.timer.expires_ns = expires_ns;
	ASSERT_EQ(set_vcpu_attr(f, 0, *timer), 0);
	/* KVM_RUN starts it. */
	run_immediate(f->vcpus[0]);
}

/* The vCPU completes the event if the host has moved a page. */
static bool timer_is_waiting(struct fifo_vm *f)
{
	static struct kvm_xen_fifo_waiting waiting;

	ASSERT_EQ(get_waiting(f, &waiting), 0);
	return is_waiting(waiting.unsent, TIMER_PORT) ||
	       is_waiting(waiting.unqueued, TIMER_PORT);
}

TEST(timer)
{
	struct fifo_vm *f = fifo_vm_create(guest_main, SETUP_ALL);
	struct consumer c = host_consumer(f, 0);
	struct kvm_xen_vcpu_attr timer = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = { .port = TIMER_PORT, .priority = 2 },
	};
	struct kvm_xen_vcpu_attr info = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
	};
	struct kvm_xen_hvm_attr port = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_PORT,
		.u.fifo_port.port = TIMER_PORT,
	};
	pthread_t thread;

	/* The interrupt delivers the event.  Stopping the timer waits for the interrupt. */
	set_timer(f, &timer, xen_guest_clock(f->vm) + 1000000);
	wait_for(READ_ONCE(*word(f, TIMER_PORT)) == (PENDING | LINKED) ||
		 timer_is_waiting(f));
	set_timer(f, &timer, 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, TIMER_PORT, PENDING | LINKED);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(2));
	/* If the host moved the vcpu_info, KVM recorded the upcall; this writes it. */
	ASSERT_EQ(get_vcpu_attr(f, 0, &info), 0);
	ASSERT_EQ(vcpu_info(f, 0)->evtchn_upcall_pending, 1);
	assert_next(&c, TIMER_PORT);
	assert_next(&c, 0);
	vcpu_info(f, 0)->evtchn_upcall_pending = 0;

	/* KVM_RUN delivers the event, because the deadline has passed. */
	vcpu_args_set(f->vcpus[0], 1, 0ul);
	set_timer(f, &timer, 1);
	thread = start_thread(vcpu_thread, f->vcpus[0]);
	wait_for(READ_ONCE(*handled(f, TIMER_PORT)));
	stop_guest(f, &thread, 1);
	ASSERT_EQ(*handled(f, TIMER_PORT), 1);

	ASSERT_EQ(get_vcpu_attr(f, 0, &timer), 0);
	ASSERT_EQ(timer.u.timer.port, TIMER_PORT);
	ASSERT_EQ(timer.u.timer.priority, 2);
	ASSERT_EQ(get_vm_attr(f, &port), 0);
	ASSERT_EQ(port.u.fifo_port.priority, 2);
	ASSERT_EQ(port.u.fifo_port.vcpu, f->vcpus[0]->id);
	fifo_vm_free(f);
}

/* Timers whose events are for another vCPU expire while the VM is destroyed. */
TEST(timer_destroy)
{
	struct kvm_xen_vcpu_attr timer = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = { .port = TIMER_PORT, .priority = 2 },
	};
	struct fifo_vm *f;
	int i;

	for (i = 0; i < 10; i++) {
		f = fifo_vm_create(guest_nothing, SETUP_MODE | SETUP_CONTROL);
		ASSERT_EQ(set_array_page(f, TIMER_PORT / PORTS_PER_PAGE), 0);
		/* The vCPU with the lower index is freed first. */
		ASSERT_EQ(set_port(f, TIMER_PORT, f->vcpus[0]->id, 2), 0);
		timer.u.timer.expires_ns = xen_guest_clock(f->vm) + 2000000 * (i + 1);
		ASSERT_EQ(set_vcpu_attr(f, 1, timer), 0);
		/* KVM_RUN starts the timer. */
		run_immediate(f->vcpus[1]);
		fifo_vm_free(f);
	}
}

/* A halted vCPU completes an event when the memslot of its control block is added again. */
TEST(memslots)
{
	struct fifo_vm *f = fifo_vm_create(guest_main, SETUP_ALL);
	static struct kvm_xen_fifo_waiting waiting;
	uint32_t port = 60;
	uint64_t wakeups;
	pthread_t thread;

	/* The vcpu_info has a user address, so that the vCPU does not need the memslot. */
	ASSERT_EQ(set_vcpu_attr(f, 0, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA,
		.u.hva = (uint64_t)vcpu_info(f, 0),
	}), 0);
	vcpu_args_set(f->vcpus[0], 1, 0ul);
	/* Open the statistics, which is not possible during KVM_RUN. */
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "blocking"), 0);
	thread = start_thread(vcpu_thread, f->vcpus[0]);
	wait_for(vcpu_get_stat(f->vcpus[0], "blocking") == 1);

	vm_mem_region_move(f->vm, SHARED_SLOT, SHARED_GPA + NR_SHARED_PAGES * PAGE_SIZE);
	wakeups = vcpu_get_stat(f->vcpus[0], "halt_wakeup");
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
	/* The first wake-up is that of the sender.  The vCPU has tried in vain then. */
	vcpu_wait_stat(f->vcpus[0], "halt_wakeup", wakeups + 2);
	wait_for(!get_waiting(f, &waiting) && is_waiting(waiting.unsent, port));
	vm_mem_region_move(f->vm, SHARED_SLOT, SHARED_GPA);
	wait_for(READ_ONCE(*handled(f, port)) == 1);

	stop_guest(f, &thread, 1);
	fifo_vm_free(f);
}

/*
 * A halted vCPU also completes an event when userspace makes a page accessible again
 * without changing a memslot.
 */
TEST(unmappable)
{
	static const int pages[] = { ARRAY_PAGE, CONTROL_PAGE };
	struct fifo_vm *f = fifo_vm_create(guest_main, SETUP_ALL);
	uint32_t port = 60;
	uint64_t wakeups;
	pthread_t thread;
	int i;

	vcpu_args_set(f->vcpus[0], 1, 0ul);
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "blocking"), 0);
	thread = start_thread(vcpu_thread, f->vcpus[0]);
	for (i = 0; i < ARRAY_SIZE(pages); i++) {
		wait_for(vcpu_get_stat(f->vcpus[0], "blocking") == 1);
		wakeups = vcpu_get_stat(f->vcpus[0], "halt_wakeup");
		TEST_ASSERT(!mprotect(shared_page(f, pages[i]), PAGE_SIZE, PROT_READ),
			    "mprotect(): %s", strerror(errno));
		ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
		/* The first wake-up is that of the sender.  The vCPU has tried in vain then. */
		vcpu_wait_stat(f->vcpus[0], "halt_wakeup", wakeups + 2);
		ASSERT_EQ(READ_ONCE(*handled(f, port)), i);
		TEST_ASSERT(!mprotect(shared_page(f, pages[i]), PAGE_SIZE, PROT_READ | PROT_WRITE),
			    "mprotect(): %s", strerror(errno));
		wait_for(READ_ONCE(*handled(f, port)) == i + 1);
	}

	stop_guest(f, &thread, 1);
	fifo_vm_free(f);
}

TEST(dirty_log)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	uint64_t dirty[DIV_ROUND_UP(NR_SHARED_PAGES, 64)];
	uint32_t port = 30 * PORTS_PER_PAGE;
	int i;

	vm_mem_region_set_flags(f->vm, SHARED_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	/* The memslots have changed: the vCPU completes these events. */
	kvm_vm_get_dirty_log(f->vm, SHARED_SLOT, dirty);
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
	run_immediate(f->vcpus[0]);
	kvm_vm_get_dirty_log(f->vm, SHARED_SLOT, dirty);

	for (i = ARRAY_PAGE - NR_CONSUMERS; i < HANDLED_PAGE; i++) {
		bool expected = i == ARRAY_PAGE + 30 || i == CONTROL_PAGE;

		TEST_ASSERT(!!(dirty[i / 64] & BIT_ULL(i % 64)) == expected,
			    "page %d is%s dirty", i, expected ? " not" : "");
	}

	/* The new port is linked to a tail whose event word is in another page. */
	ASSERT_EQ(send_event(f, 1, f->vcpus[0]->id, 7), 0);
	run_immediate(f->vcpus[0]);
	kvm_vm_get_dirty_log(f->vm, SHARED_SLOT, dirty);
	for (i = ARRAY_PAGE; i < HANDLED_PAGE; i++) {
		bool expected = i == ARRAY_PAGE || i == ARRAY_PAGE + 30;

		TEST_ASSERT(!!(dirty[i / 64] & BIT_ULL(i % 64)) == expected,
			    "page %d is%s dirty", i, expected ? " not" : "");
	}
	fifo_vm_free(f);
}

/*
 * Let KVM write to the control block and to a page of the array.  Userspace only reads
 * the pages, because its writes would make them dirty.
 */
static void let_kvm_write(struct fifo_vm *f, uint32_t port, uint8_t *saved)
{
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
	/* If a page is absent, the vCPU completes the event. */
	vcpu_run_to_sync(f->vcpus[0]);
	TEST_ASSERT(*word(f, port) & PENDING, "port %u: expected it to be pending, got word %#x",
		    port, *word(f, port));
	memcpy(saved, f->shared, NR_SHARED_PAGES * PAGE_SIZE);
}

static void expect_saved(const uint8_t *saved, const uint8_t *found, uint32_t port)
{
	int i;

	for (i = CONTROL_PAGE; i < HANDLED_PAGE; i++)
		TEST_ASSERT(!memcmp(saved + i * PAGE_SIZE, found + i * PAGE_SIZE, PAGE_SIZE),
			    "port %u: expected page %d as KVM has written it", port, i);
}

/*
 * Writes of KVM are not lost if the pages are swapped out.  In each second round, the
 * pages are new and were only read.
 */
TEST(swap)
{
	size_t size = NR_SHARED_PAGES * PAGE_SIZE;
	uint8_t *saved = malloc(size);
	struct fifo_vm *f;
	uint32_t i, port;

	TEST_ASSERT(saved, "malloc()");
	swap_on();
	f = fifo_vm_create(guest_sync_forever, SETUP_ALL);
	for (i = 0; i < 4; i++) {
		if (i % 2) {
			TEST_ASSERT(!madvise(f->shared, size, MADV_REMOVE),
				    "madvise(MADV_REMOVE): %s", strerror(errno));
			memcpy(saved, f->shared, size);
		}
		port = (i + 1) * PORTS_PER_PAGE;
		let_kvm_write(f, port, saved);
		page_out(f->shared, size);
		expect_saved(saved, f->shared, port);
	}
	fifo_vm_free(f);
	swap_off();
	free(saved);
}

/* Writes of KVM to a file are written back. */
TEST(writeback)
{
	size_t size = NR_SHARED_PAGES * PAGE_SIZE;
	uint8_t *saved = malloc(size), *on_disk = aligned_alloc(PAGE_SIZE, size);
	struct fifo_vm *f;
	uint32_t i, port;
	int fd;

	TEST_ASSERT(saved && on_disk, "malloc()");
	fd = create_disk_file(size);
	f = fifo_vm_create(guest_sync_forever, SETUP_ALL);
	TEST_ASSERT(mmap(f->shared, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
		    f->shared, "mmap(): %s", strerror(errno));
	for (i = 0; i < 4; i++) {
		port = (i + 1) * PORTS_PER_PAGE;
		let_kvm_write(f, port, saved);
		TEST_ASSERT(!fsync(fd), "fsync(): %s", strerror(errno));
		read_disk_file(fd, on_disk, size);
		expect_saved(saved, on_disk, port);
		page_out(f->shared, size);
		expect_saved(saved, f->shared, port);
	}
	fifo_vm_free(f);
	free(saved);
	free(on_disk);
}

/* Attributes that a process sets or reads until it is killed */
static long kill_set_array(struct fifo_vm *f)
{
	return set_array_page(f, 0);
}

static long kill_set_control(struct fifo_vm *f)
{
	return set_control(f, 0, control_gpa(0));
}

static long kill_set_mode(struct fifo_vm *f)
{
	return set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL);
}

static long kill_set_port(struct fifo_vm *f)
{
	return set_port(f, 1, f->vcpus[0]->id, 3);
}

static long kill_set_waiting(struct fifo_vm *f)
{
	static struct kvm_xen_fifo_waiting waiting;

	return set_waiting(f, &waiting);
}

static long kill_get_waiting(struct fifo_vm *f)
{
	static struct kvm_xen_fifo_waiting waiting;

	return get_waiting(f, &waiting);
}

static long kill_get_array(struct fifo_vm *f)
{
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_FIFO_ARRAY };

	return get_vm_attr(f, &attr);
}

static long kill_set_tails(struct fifo_vm *f)
{
	return set_vcpu_attr(f, 1, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
	});
}

static long kill_get_tails(struct fifo_vm *f)
{
	struct kvm_xen_vcpu_attr attr = { .type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS };

	return get_vcpu_attr(f, 1, &attr);
}

typedef long (*attr_fn)(struct fifo_vm *f);

static struct {
	struct fifo_vm *f;
	attr_fn fn;
} victim;

static int victim_main(void *unused)
{
	victim.fn(victim.f);
	return 0;
}

/* Start a process that shares memory with this one and calls @fn. */
static pid_t start_victim(struct fifo_vm *f, attr_fn fn)
{
	static uint8_t stack[SZ_64K] __aligned(16);
	pid_t pid;

	victim.f = f;
	victim.fn = fn;
	pid = clone(victim_main, stack + sizeof(stack), CLONE_VM | CLONE_FILES | SIGCHLD, NULL);
	TEST_ASSERT(pid > 0, "clone(): %s", strerror(errno));
	return pid;
}

static void kill_victim(pid_t pid, const char *what, int nr)
{
	int status;

	wait_for(task_sleeps_in_ioctl(pid));
	TEST_ASSERT(!kill(pid, SIGKILL), "kill(): %s", strerror(errno));
	__wait_for(waitpid(pid, &status, WNOHANG) == pid,
		   "%s %d: the process is not dead after %d s", what, nr, WAIT_LIMIT_SECS);
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
		    "%s %d: expected a process killed by %d, got status %#x", what, nr, SIGKILL,
		    status);
}

static void *thread_attr(void *fn)
{
	return (void *)((attr_fn)fn)(victim.f);
}

/*
 * A process can be killed while it waits in an attribute for a page that nobody
 * provides, or for xen_lock, which another task holds while it waits for a page.  The
 * attribute has not changed then.
 */
TEST(kill_waiter)
{
	static const struct {
		attr_fn fn;
		int page;
	} page_waiters[] = {
		{ kill_set_array, ARRAY_PAGE },
		{ kill_set_control, CONTROL_PAGE },
	};
	static const attr_fn lock_waiters[] = {
		kill_set_array, kill_set_control, kill_set_mode, kill_set_port, kill_set_waiting,
		kill_get_waiting, kill_get_array, kill_set_tails, kill_get_tails,
	};
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_MODE);
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_FIFO_PORT };
	pthread_t holder;
	int i, j, uffd;
	pid_t pid;

	attr.u.fifo_port.port = 1;
	for (i = 0; i < ARRAY_SIZE(page_waiters); i++) {
		uffd = register_new_page(f, page_waiters[i].page);
		pid = start_victim(f, page_waiters[i].fn);
		uffd_wait_for_fault(uffd);
		kill_victim(pid, "wait for a page", i);

		holder = start_thread(thread_attr, page_waiters[i].fn);
		uffd_wait_for_fault(uffd);
		for (j = 0; j < ARRAY_SIZE(lock_waiters); j++) {
			pid = start_victim(f, lock_waiters[j]);
			kill_victim(pid, "wait for xen_lock", j);
		}
		uffd_provide(uffd, shared_page(f, page_waiters[i].page), NULL, PAGE_SIZE);
		/* The process that was killed has not set the attribute. */
		ASSERT_EQ(join_thread(holder, "attribute"), 0);
		ASSERT_EQ(page_waiters[i].fn(f), EEXIST);
		close(uffd);
	}

	ASSERT_EQ(get_vm_attr(f, &attr), 0);
	ASSERT_EQ(attr.u.fifo_port.vcpu, KVM_XEN_FIFO_NO_VCPU);
	fifo_vm_free(f);
}

struct hostile {
	struct fifo_vm *f;
	uint64_t state;
	uint32_t sent;
};

static void *hostile_sender(void *data)
{
	struct hostile *h = data;
	struct fifo_vm *f = h->f;
	uint64_t i, r;

	for (i = 0; i < nr_events * 10; i++) {
		r = random_next(&h->state);
		ASSERT_EQ(send_event(f, 1 + ((r >> 8) & 0x7f),
				     f->vcpus[r % NR_CONSUMERS]->id,
				     r & 2 ? PRIO_2LEVEL : (r >> 4) & 15), 0);
		if (!(r & 0xff00))
			make_absent(f, ARRAY_PAGE + (r >> 20) % 2);
		WRITE_ONCE(h->sent, i + 1);
	}
	return NULL;
}

TEST(hostile)
{
	struct fifo_vm *f = fifo_vm_create(guest_hostile, SETUP_MODE);
	struct hostile senders[2];
	pthread_t threads[2], vcpus[NR_CONSUMERS];
	int i;

	/* Control blocks overlap array pages, and one page is in the array twice. */
	ASSERT_EQ(set_control(f, 0, PAGE_GPA(ARRAY_PAGE) + 64), 0);
	ASSERT_EQ(set_control(f, 1, control_gpa(1)), 0);
	ASSERT_EQ(set_array_page(f, 0), 0);
	ASSERT_EQ(set_array(f, 1, PAGE_GPA(CONTROL_PAGE + 1) / PAGE_SIZE), 0);
	ASSERT_EQ(set_array(f, 2, PAGE_GPA(ARRAY_PAGE) / PAGE_SIZE), 0);
	for (i = 1; i < 128; i++)
		ASSERT_EQ(set_loopback(f, i, i % 2, PRIO_2LEVEL, 0), 0);

	for (i = 0; i < NR_CONSUMERS; i++) {
		vcpu_args_set(f->vcpus[i], 2, seed + i + 1, (uint64_t)i);
		vcpus[i] = start_thread(vcpu_thread, f->vcpus[i]);
	}
	for (i = 0; i < 2; i++) {
		senders[i] = (struct hostile) { .f = f, .state = seed + i + 10 };
		threads[i] = start_thread(hostile_sender, &senders[i]);
	}
	for (i = 0; i < 2; i++) {
		TEST_ASSERT(wait_for_count(&senders[i].sent, nr_events * 10),
			    "sender %d makes no progress after %u events, expected %lu",
			    i, senders[i].sent, nr_events * 10);
		join_thread(threads[i], "sender");
	}
	WRITE_ONCE(*handled(f, 0), 1);
	for (i = 0; i < NR_CONSUMERS; i++)
		join_thread(vcpus[i], "hostile vCPU");
	fifo_vm_free(f);
}

/* KVM checks port and priority against the mode when an event is sent. */
TEST(wrong_mode)
{
	struct fifo_vm *f = fifo_vm_create(guest_ops, 0);
	uint32_t id = f->vcpus[0]->id, port = 5000, *args;
	struct consumer c = host_consumer(f, 0);
	struct ucall uc;
	int fd;

	/* Set up irqfd and port in 2-level mode, in which their events fail. */
	irqfds_create(f, &port, 1, 0, 3, &fd);
	ASSERT_EQ(set_loopback(f, port, 0, 4, 0), 0);
	ASSERT_EQ(set_loopback(f, port, 0, 5, KVM_XEN_EVTCHN_UPDATE), 0);
	eventfd_write(fd, 1);
	args = shared_page(f, SHINFO_PAGE);
	ASSERT_EQ(send_event(f, 5, id, 3), EOPNOTSUPP);
	ASSERT_EQ(send_event(f, port, id, PRIO_2LEVEL), EINVAL);
	assert_word(f, port, 0);
	assert_word(f, 5, 0);

	args[0] = EVTCHNOP_send;
	args[1] = port;
	vcpu_run(f->vcpus[2]);
	ASSERT_EQ(f->vcpus[2]->run->exit_reason, KVM_EXIT_XEN);
	f->vcpus[2]->run->xen.u.hcall.result = 0;
	ASSERT_EQ(run_vcpu(f->vcpus[2], &uc), UCALL_SYNC);

	ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_FIFO), 0);
	ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
	ASSERT_EQ(set_array_page(f, port / PORTS_PER_PAGE), 0);
	assert_next(&c, 0);
	eventfd_write(fd, 1);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(3));
	assert_next(&c, port);
	ASSERT_EQ(set_port(f, port, KVM_XEN_FIFO_NO_VCPU, 7), 0);
	ASSERT_EQ(vcpu_run_to_sync(f->vcpus[2]), 0);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(5));
	assert_next(&c, port);
	irqfds_destroy(f, 1, &fd);
	fifo_vm_free(f);
}

/* Each misuse fails and changes nothing. */
TEST(errors)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, 0);
	const uint64_t nowhere = 0x100000000000 / PAGE_SIZE;
	static struct kvm_xen_fifo_waiting waiting;
	struct kvm_xen_hvm_attr mode = {
		.type = KVM_XEN_ATTR_TYPE_EVTCHN_MODE,
		.u.evtchn_mode.mode = KVM_XEN_EVTCHN_MODE_FIFO,
	}, attr;
	struct kvm_xen_vcpu_attr tails = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
	}, timer = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = { .port = 1, .priority = 16 },
	};
	struct kvm_xen_hvm_config no_msr = {
		.flags = CONFIG_FLAGS | KVM_XEN_HVM_CONFIG_EVTCHN_FIFO,
	};
	uint32_t id = f->vcpus[0]->id;
	uint64_t gpa;

	/* The flag requires another flag and the MSR, and all attributes require the flag. */
	ASSERT_EQ(set_config(f, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
				KVM_XEN_HVM_CONFIG_EVTCHN_FIFO), EINVAL);
	ASSERT_EQ(__vm_ioctl(f->vm, KVM_XEN_HVM_CONFIG, &no_msr) ? errno : 0, EINVAL);
	ASSERT_EQ(set_config(f, CONFIG_FLAGS), 0);
	ASSERT_EQ(set_vm_attr(f, mode), ENOENT);
	ASSERT_EQ(get_vm_attr(f, &mode), ENOENT);
	ASSERT_EQ(set_array_page(f, 0), ENOENT);
	ASSERT_EQ(set_port(f, 1, id, 7), ENOENT);
	ASSERT_EQ(set_waiting(f, &waiting), ENOENT);
	ASSERT_EQ(set_control(f, 0, control_gpa(0)), ENOENT);
	ASSERT_EQ(get_vcpu_attr(f, 0, &tails), ENOENT);
	ASSERT_EQ(send_event(f, 1, id, 7), EINVAL);
	ASSERT_EQ(set_loopback(f, 1, 0, 7, 0), EINVAL);
	timer.u.timer.priority = 7;
	ASSERT_EQ(set_vcpu_attr(f, 0, timer), EINVAL);
	ASSERT_EQ(set_config(f, CONFIG_FLAGS | KVM_XEN_HVM_CONFIG_EVTCHN_FIFO), 0);

	/* All other attributes require FIFO mode. */
	ASSERT_EQ(set_array_page(f, 0), ENXIO);
	ASSERT_EQ(set_port(f, 1, id, 7), ENXIO);
	ASSERT_EQ(set_waiting(f, &waiting), ENXIO);
	ASSERT_EQ(get_waiting(f, &waiting), ENXIO);
	ASSERT_EQ(set_control(f, 0, control_gpa(0)), ENXIO);
	ASSERT_EQ(get_control(f, 0, &gpa), ENXIO);
	ASSERT_EQ(set_vcpu_attr(f, 0, tails), ENXIO);

	ASSERT_EQ(set_mode(f, 2), EINVAL);
	attr = mode;
	attr.u.evtchn_mode.pad = 1;
	ASSERT_EQ(set_vm_attr(f, attr), EINVAL);
	attr = mode;
	attr.pad[1] = 1;
	ASSERT_EQ(set_vm_attr(f, attr), EINVAL);
	attr = mode;
	attr.u.pad[7] = 1;
	ASSERT_EQ(set_vm_attr(f, attr), EINVAL);
	ASSERT_EQ(set_mode(f, KVM_XEN_EVTCHN_MODE_2LEVEL), 0);
	ASSERT_EQ(set_vm_attr(f, mode), 0);
	ASSERT_EQ(set_vm_attr(f, mode), EEXIST);
	ASSERT_EQ(set_config(f, CONFIG_FLAGS), EBUSY);

	/* The tails require the control block. */
	ASSERT_EQ(set_vcpu_attr(f, 0, tails), ENXIO);
	ASSERT_EQ(get_vcpu_attr(f, 0, &tails), ENXIO);
	ASSERT_EQ(set_control(f, 0, control_gpa(0) + 4), EINVAL);
	ASSERT_EQ(set_control(f, 0, PAGE_GPA(CONTROL_PAGE) + PAGE_SIZE - 64), EINVAL);
	ASSERT_EQ(set_control(f, 0, nowhere * PAGE_SIZE), EFAULT);
	ASSERT_EQ(get_control(f, 0, &gpa), 0);
	ASSERT_EQ(gpa, GPA_INVALID);
	ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
	ASSERT_EQ(set_control(f, 0, control_gpa(1)), EEXIST);
	ASSERT_EQ(get_control(f, 0, &gpa), 0);
	ASSERT_EQ(gpa, control_gpa(0));
	attr = (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_CONTROL,
		.u.fifo_control = { .vcpu = 12345, .gpa = control_gpa(1) },
	};
	ASSERT_EQ(set_vm_attr(f, attr), EINVAL);
	ASSERT_EQ(get_vm_attr(f, &attr), EINVAL);
	attr.u.fifo_control.vcpu = f->vcpus[1]->id;
	attr.u.fifo_control.pad = 1;
	ASSERT_EQ(set_vm_attr(f, attr), EINVAL);
	tails.u.fifo_tails[0] = 1;
	tails.u.fifo_tails[15] = NR_PORTS;
	ASSERT_EQ(set_vcpu_attr(f, 0, tails), EINVAL);
	ASSERT_EQ(get_vcpu_attr(f, 0, &tails), 0);
	ASSERT_EQ(tails.u.fifo_tails[0], 0);

	ASSERT_EQ(set_array(f, NR_ARRAY_PAGES, PAGE_GPA(ARRAY_PAGE) / PAGE_SIZE), EINVAL);
	ASSERT_EQ(set_array(f, 0, -1ull), EINVAL);
	ASSERT_EQ(set_array(f, 0, nowhere), EFAULT);
	ASSERT_EQ(set_array_page(f, 0), 0);
	ASSERT_EQ(set_array_page(f, 0), EEXIST);
	attr = (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_ARRAY,
		.u.fifo_array.page = NR_ARRAY_PAGES,
	};
	ASSERT_EQ(get_vm_attr(f, &attr), EINVAL);

	ASSERT_EQ(set_port(f, 0, id, 7), EINVAL);
	ASSERT_EQ(set_port(f, NR_PORTS, id, 7), EINVAL);
	ASSERT_EQ(set_port(f, 1, id, 16), EINVAL);
	ASSERT_EQ(set_port(f, 1, 12345, 7), EINVAL);

	ASSERT_EQ(set_waiting(f, (void *)1), EFAULT);
	ASSERT_EQ(get_waiting(f, (void *)1), EFAULT);
	add_waiting(waiting.unsent, 5);
	add_waiting(waiting.unqueued, 0);
	ASSERT_EQ(set_waiting(f, &waiting), EINVAL);
	ASSERT_EQ(get_waiting(f, &waiting), 0);
	ASSERT_EQ(nr_waiting(waiting.unsent), 0);

	ASSERT_EQ(send_event(f, 0, id, 7), EINVAL);
	ASSERT_EQ(send_event(f, NR_PORTS, id, 7), EINVAL);
	ASSERT_EQ(send_event(f, 1, id, 16), EINVAL);
	ASSERT_EQ(send_event(f, 1, 12345, 7), EINVAL);
	ASSERT_EQ(set_loopback(f, NR_PORTS, 0, 7, 0), EINVAL);
	ASSERT_EQ(set_loopback(f, 1, 0, 16, 0), EINVAL);
	timer.u.timer.priority = 16;
	ASSERT_EQ(set_vcpu_attr(f, 0, timer), EINVAL);

	/* The page of the event word is not in guest memory: the event waits. */
	vm_mem_region_delete(f->vm, SHARED_SLOT);
	ASSERT_EQ(send_event(f, 1, id, 7), 0);
	run_immediate(f->vcpus[0]);
	ASSERT_EQ(get_waiting(f, &waiting), 0);
	ASSERT_EQ(is_waiting(waiting.unsent, 1), 1);
	fifo_vm_free(f);
}

/*
 * Performance
 */

/* Send to nr ports, whose numbers are step apart, without waiting. */
static void guest_burst(uint64_t nr, uint64_t step)
{
	uint64_t i;

	for (;;) {
		for (i = 0; i < nr; i++)
			event_channel_op(EVTCHNOP_send, 1 + i * step);
		GUEST_SYNC(0);
	}
}

static void perf_clear(struct fifo_vm *f, struct consumer *c, bool fifo)
{
	if (fifo) {
		while (consume(c))
			;
	} else {
		memset(shared_page(f, SHINFO_PAGE), 0, PAGE_SIZE);
	}
	memset(vcpu_info(f, 0), 0, 32);
}

static void measure(bool fifo, int method, uint64_t nr, uint64_t step)
{
	static const char * const names[NR_METHODS] = {
		[BY_IOCTL] = "ioctl", [BY_IRQFD] = "irqfd", [BY_HYPERCALL] = "hypercall",
	};
	struct fifo_vm *f = fifo_vm_create(guest_burst, fifo ? SETUP_ALL : 0);
	uint64_t rounds = max(2000 / nr, 2ul), round, i, start, spent = 0;
	struct consumer c = host_consumer(f, 0);
	uint32_t id = f->vcpus[0]->id;
	uint32_t *ports = calloc(nr, sizeof(*ports));
	int *fds = calloc(nr, sizeof(*fds));

	TEST_ASSERT(ports && fds, "calloc() failed: %s", strerror(errno));
	for (i = 0; i < nr; i++) {
		ports[i] = 1 + i * step;
		if (method == BY_HYPERCALL)
			ASSERT_EQ(set_loopback(f, ports[i], 0, PRIO_2LEVEL, 0), 0);
	}
	if (method == BY_IRQFD)
		irqfds_create(f, ports, nr, 0, PRIO_2LEVEL, fds);
	vcpu_args_set(f->vcpus[2], 2, nr, step);

	/* Do not measure the first round, in which KVM maps the pages. */
	for (round = 0; round <= rounds; round++) {
		start = now_ns();
		switch (method) {
		case BY_IOCTL:
			for (i = 0; i < nr; i++)
				send_event(f, ports[i], id, PRIO_2LEVEL);
			break;
		case BY_IRQFD:
			for (i = 0; i < nr; i++)
				eventfd_write(fds[i], 1);
			break;
		case BY_HYPERCALL:
			vcpu_run_to_sync(f->vcpus[2]);
			break;
		}
		if (round)
			spent += now_ns() - start;
		perf_clear(f, &c, fifo);
	}

	printf("perf: xen-%s-%s-%lu-ports ns %lu\n",
	       fifo ? "fifo" : "2level", names[method], nr, spent / (rounds * nr));
	if (method == BY_IRQFD)
		irqfds_destroy(f, nr, fds);
	free(ports);
	free(fds);
	fifo_vm_free(f);
}

static void measure_all(void)
{
	static const int methods[] = { BY_IOCTL, BY_IRQFD, BY_HYPERCALL };
	int i;

	for (i = 0; i < ARRAY_SIZE(methods); i++) {
		measure(false, methods[i], 1, 1);
		measure(false, methods[i], 63, 64);
		measure(true, methods[i], 1, 1);
		measure(true, methods[i], 63, 64);
		measure(true, methods[i], 63, 2080);
		measure(true, methods[i], 1000, 131);
	}
	measure(false, BY_IOCTL, 4095, 1);
	measure(true, BY_IOCTL, 4095, 1);
	measure(true, BY_IOCTL, NR_PORTS - 1, 1);
	measure(true, BY_HYPERCALL, NR_PORTS - 1, 1);
}

static void print_usage(const char *name)
{
	printf("usage: %s [-n EVENTS] [-s SEED] [-p] [CASE...]\n"
	       "  -n  number of events of each producer in mask and soak; hostile sends\n"
	       "      ten times as many; restore_order tries a thirtieth as many orders\n"
	       "  -p  only measure the cost of deliveries\n"
	       "  -s  seed for random choices\n"
	       "  CASE: run only this one; !CASE: run all but this one\n", name);
}

int main(int argc, char *argv[])
{
	bool perf_only = false;
	int opt;

	seed = now_ns() | 1;
	while ((opt = getopt(argc, argv, "n:ps:")) != -1) {
		switch (opt) {
		case 'n':
			nr_events = strtoull(optarg, NULL, 0);
			break;
		case 'p':
			perf_only = true;
			break;
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		default:
			print_usage(argv[0]);
			exit(KSFT_FAIL);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_FIFO);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	if (perf_only) {
		measure_all();
		return 0;
	}

	pr_info("seed %#lx\n", seed);
	return run_cases(argv + optind);
}
