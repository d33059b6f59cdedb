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

#include "apic.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
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

/* Returns true if the port is pending, so that EVTCHNOP_unmask is needed. */
static bool clear_masked(uint32_t *word)
{
	uint32_t old = READ_ONCE(*word);

	do {
		old &= ~BUSY;
	} while (!__atomic_compare_exchange_n(word, &old, old & ~MASKED, false,
					      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
	return old & PENDING;
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

/*
 * Interrupts are off, except during HLT.  An upcall only has to end the HLT.  An
 * emulated CPU that exits between STI and HLT may lose the interrupt shadow and take
 * the upcall before the HLT.  The handler then skips the HLT, because no other
 * upcall would end it.
 */
void guest_wait(void);
void guest_hlt(void);

asm("guest_wait:	sti\n"
	"guest_hlt:	hlt\n"
	"		cli\n"
	"		ret\n");

static void guest_upcall(struct ex_regs *regs)
{
	regs->rflags &= ~RFLAGS_IF;
	if (regs->rip == (uint64_t)guest_hlt)
		regs->rip++;
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

static int set_states(struct fifo_vm *f, uint32_t port, uint32_t nr,
		      struct kvm_xen_fifo_port_state *states)
{
	return set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_FIFO_STATE,
		.u.fifo_state = {
			.port = port, .nr = nr, .states = (uint64_t)states,
		},
	});
}

static int get_states(struct fifo_vm *f, uint32_t port, uint32_t nr,
		      struct kvm_xen_fifo_port_state *states)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_STATE,
		.u.fifo_state = {
			.port = port, .nr = nr, .states = (uint64_t)states,
		},
	};

	return get_vm_attr(f, &attr);
}

static int set_control(struct fifo_vm *f, int i, uint64_t gpa)
{
	return set_vcpu_attr(f, i, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_CONTROL,
		.u.gpa = gpa,
	});
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

/* Tell the guest to stop, and wake up each vCPU by an event of the last port. */
static void stop_guest(struct fifo_vm *f, pthread_t *threads, int nr)
{
	int i;

	WRITE_ONCE(*handled(f, 0), 1);
	for (i = 0; i < nr; i++) {
		wait_for(!(READ_ONCE(*word(f, NR_PORTS - 1)) & (PENDING | LINKED)));
		ASSERT_EQ(send_event(f, NR_PORTS - 1, f->vcpus[i]->id, 0), 0);
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
	/* An event is also slow if the host has moved a page that KVM needs for it. */
	pr_info("ports: %lu events queued at the first attempt, %lu by an attempt that can sleep\n",
		vcpu_get_stat(f->vcpus[0], "xen_fifo_fast"),
		vcpu_get_stat(f->vcpus[0], "xen_fifo_slow"));
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
	ASSERT_EQ(send_event(f, 1, id, 9), 0);
	ASSERT_EQ(send_event(f, 2, id, 9), 0);
	ASSERT_EQ(send_event(f, 3, id, 9), 0);
	assert_next(&c, 1);
	ASSERT_EQ(send_event(f, 4, id, 3), 0);
	assert_next(&c, 4);
	assert_next(&c, 2);
	assert_next(&c, 3);
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
		ASSERT_EQ(send_event(f, port, f->vcpus[1]->id, round % 3), 0);
		break;
	case BY_MOVING:
		ASSERT_EQ(send_event(f, port, f->vcpus[round % NR_CONSUMERS]->id,
				     (round / 2 + i) % NR_PRIORITIES), 0);
		break;
	case BY_IRQFD:
		eventfd_write(p->fds[i], 1);
		break;
	}
}

/* Fail because of a port that makes no progress, and print its state. */
static void report_stall(struct fifo_vm *f, uint32_t port, uint64_t round)
{
	struct kvm_xen_fifo_port_state s;
	int i, j;

	ASSERT_EQ(get_states(f, port, 1, &s), 0);
	for (i = 0; i < NR_CONSUMERS; i++) {
		pr_info("vCPU %d: upcall %u, ready %#x, heads", i,
			vcpu_info(f, i)->evtchn_upcall_pending,
			READ_ONCE(control(f, i)->ready));
		for (j = 0; j < NR_PRIORITIES; j++)
			pr_info(" %u", READ_ONCE(control(f, i)->head[j]));
		pr_info("\n");
	}
	pr_info("word %#x, vCPU %u, priority %u, last vCPU %u, priority %u\n",
		READ_ONCE(*word(f, port)), s.vcpu, s.priority, s.last_vcpu,
		s.last_priority);
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

static void vcpu_set_code(struct fifo_vm *f, int i, void *code)
{
	struct kvm_regs regs;

	vcpu_regs_get(f->vcpus[i], &regs);
	regs.rip = (uint64_t)code;
	vcpu_regs_set(f->vcpus[i], &regs);
}

TEST(soak)
{
	static const int methods[] = {
		BY_IOCTL, BY_PRIORITY, BY_MOVING, BY_IRQFD, BY_HYPERCALL,
	};
	struct fifo_vm *f = fifo_vm_create(guest_main, SETUP_ALL);
	pthread_t consumers[NR_CONSUMERS];
	int i;

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
	uint32_t id0 = f->vcpus[0]->id, id1 = f->vcpus[1]->id;

	/* Move the consumed tail of one queue to another queue; both queues still work. */
	ASSERT_EQ(send_event(f, 1, id0, 7), 0);
	ASSERT_EQ(send_event(f, 2, id0, 7), 0);
	assert_next(&c0, 1);
	assert_next(&c0, 2);
	ASSERT_EQ(send_event(f, 2, id1, 7), 0);
	ASSERT_EQ(send_event(f, 3, id0, 7), 0);
	ASSERT_EQ(send_event(f, 4, id1, 7), 0);
	assert_next(&c0, 3);
	assert_next(&c0, 0);
	assert_next(&c1, 2);
	assert_next(&c1, 4);
	assert_next(&c1, 0);

	/* A port that is already queued stays in its queue. */
	ASSERT_EQ(send_event(f, 5, id0, 7), 0);
	ASSERT_EQ(send_event(f, 5, id1, 3), 0);
	assert_next(&c1, 0);
	assert_next(&c0, 5);
	assert_next(&c0, 0);

	/* Move ports to another priority, before and after their old queue is empty. */
	ASSERT_EQ(send_event(f, 6, id0, 1), 0);
	ASSERT_EQ(send_event(f, 7, id0, 1), 0);
	assert_next(&c0, 6);
	ASSERT_EQ(send_event(f, 6, id0, 2), 0);
	assert_next(&c0, 7);
	ASSERT_EQ(send_event(f, 7, id0, 2), 0);
	ASSERT_EQ(send_event(f, 8, id0, 1), 0);
	assert_next(&c0, 8);
	assert_next(&c0, 6);
	assert_next(&c0, 7);
	assert_next(&c0, 0);
	fifo_vm_free(f);
}

TEST(absent)
{
	static const int pages[] = {
		ARRAY_PAGE + 5, ARRAY_PAGE + 2, CONTROL_PAGE, VCPU_INFO_PAGE,
	};
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
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
				sent++;
			}

			make_absent(f, pages[i / 2]);
			if (irqfd)
				eventfd_write(fd, 1);
			else
				ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
			sent++;
			wait_for(nr_queued(f, 0) >= sent);

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
			    "%lu events were queued by an attempt that can sleep, expected %lu to %lu",
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
 * An event is deferred until its vCPU runs after the array page was set.  An event for
 * a vCPU without control block is dropped.
 */
TEST(deferred)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_MODE);
	uint32_t port0 = 17, port1 = PORTS_PER_PAGE + 17, port2 = port1 + PORTS_PER_PAGE;
	struct kvm_xen_fifo_port_state state = {
		.vcpu = KVM_XEN_FIFO_NO_VCPU,
		.priority = 3,
		.last_vcpu = KVM_XEN_FIFO_NO_VCPU,
	};
	struct consumer c = host_consumer(f, 0);
	uint32_t id = f->vcpus[0]->id;

	ASSERT_EQ(send_event(f, port0, id, 7), 0);
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

	/* While a VM is restored, an event can be sent before its port's state is set. */
	ASSERT_EQ(send_event(f, port2, id, PRIO_2LEVEL), 0);
	ASSERT_EQ(set_states(f, port2, 1, &state), 0);
	ASSERT_EQ(get_states(f, port2, 1, &state), 0);
	ASSERT_EQ(state.vcpu, id);
	ASSERT_EQ(state.priority, 3);
	ASSERT_EQ(state.flags, KVM_XEN_FIFO_PORT_PENDING);
	ASSERT_EQ(set_array_page(f, 2), 0);
	run_immediate(f->vcpus[0]);
	assert_word(f, port2, PENDING | LINKED);
	ASSERT_EQ(READ_ONCE(c.control->ready), BIT(3));
	assert_next(&c, port2);
	assert_next(&c, 0);
	ASSERT_EQ(vcpu_get_stat(f->vcpus[0], "xen_fifo_dropped"), 1);
	/* One event of each port was queued; two of these events had been deferred. */
	ASSERT_EQ(nr_queued(f, 0), 3);
	fifo_vm_free(f);
}

static void copy_state(struct fifo_vm *from, struct fifo_vm *to)
{
	struct kvm_xen_fifo_port_state states[KVM_XEN_FIFO_STATE_MAX];
	struct kvm_xen_vcpu_attr attr;
	struct kvm_xen_hvm_attr page;
	uint32_t port, nr;
	int i;

	/* Reading the tails may write to guest memory, so copy the memory after that. */
	ASSERT_EQ(set_mode(to, KVM_XEN_EVTCHN_MODE_FIFO), 0);
	for (i = 0; i < NR_CONSUMERS; i++) {
		attr = (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_CONTROL,
		};
		ASSERT_EQ(get_vcpu_attr(from, i, &attr), 0);
		ASSERT_EQ(attr.u.gpa, control_gpa(i));
		ASSERT_EQ(set_vcpu_attr(to, i, attr), 0);

		attr = (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
		};
		ASSERT_EQ(get_vcpu_attr(from, i, &attr), 0);
		ASSERT_EQ(set_vcpu_attr(to, i, attr), 0);
	}
	for (port = 1; port < NR_PORTS; port += nr) {
		nr = min_t(uint32_t, NR_PORTS - port, KVM_XEN_FIFO_STATE_MAX);
		ASSERT_EQ(get_states(from, port, nr, states), 0);
		ASSERT_EQ(set_states(to, port, nr, states), 0);
	}
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

	copy_state(from, to);
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

	copy_state(from, to);
	fifo_vm_free(from);
	c = host_consumer(to, 0);

	/* Without last_vcpu, KVM would link port 2 to port 1, which is in another queue. */
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
	copy_state(from, to);
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
	RESTORE_STATE,
	RESTORE_ARRAY,
	NR_RESTORE_STEPS,
};

static const char *const restore_steps[] = {
	"memory", "SHARED_INFO", "VCPU_INFO", "UPCALL_VECTOR", "LAPIC", "TIMER",
	"EVTCHN_MODE", "FIFO_CONTROL", "FIFO_TAILS", "FIFO_STATE", "FIFO_ARRAY",
};

/*
 * In the saved VM, one event is in a queue, one is deferred, and the timer may expire.
 * The last port gets an event after the restore.
 */
#define QUEUED_PORT		10
#define DEFERRED_PORT		20
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

static void set_vector(struct fifo_vm *f, bool of_vm, uint8_t vector)
{
	if (of_vm)
		ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
			.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, .u.vector = vector,
		}), 0);
	else
		ASSERT_EQ(set_vcpu_attr(f, 0, (struct kvm_xen_vcpu_attr) {
			.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, .u.vector = vector,
		}), 0);
}

static void set_shared_info(struct fifo_vm *f, uint64_t gfn)
{
	ASSERT_EQ(set_vm_attr(f, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO, .u.shared_info.gfn = gfn,
	}), 0);
}

static void restore_step(struct fifo_vm *f, struct saved_vm *saved, int step)
{
	struct kvm_xen_vcpu_attr tails = { .type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS };
	struct kvm_xen_fifo_port_state states[2] = {
		{
			.vcpu = f->vcpus[0]->id, .priority = DEFAULT_PRIORITY,
			.last_vcpu = f->vcpus[0]->id, .last_priority = DEFAULT_PRIORITY,
		}, {
			.vcpu = f->vcpus[0]->id, .priority = DEFAULT_PRIORITY,
			.last_vcpu = KVM_XEN_FIFO_NO_VCPU,
			.flags = KVM_XEN_FIFO_PORT_PENDING,
		},
	};

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
		set_vector(f, saved->vm_vector, UPCALL_VECTOR);
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
	case RESTORE_STATE:
		ASSERT_EQ(set_states(f, QUEUED_PORT, 1, &states[0]), 0);
		ASSERT_EQ(set_states(f, DEFERRED_PORT, 1, &states[1]), 0);
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

	set_vector(f, false, 0);
	set_vector(f, true, 0);
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
	uint32_t queued, deferred, timer, later;
	char text[200] = "";
	int i;

	undo_restore(f);
	for (i = 0; i < NR_RESTORE_STEPS; i++)
		restore_step(f, saved, order[i]);

	vcpu_run_to_sync(f->vcpus[0]);
	queued = *handled(f, QUEUED_PORT);
	deferred = *handled(f, DEFERRED_PORT);
	timer = *handled(f, RESTORED_TIMER_PORT);

	ASSERT_EQ(send_event(f, LATER_PORT, f->vcpus[0]->id, DEFAULT_PRIORITY), 0);
	vcpu_run_to_sync(f->vcpus[0]);
	later = *handled(f, LATER_PORT);
	if (queued == 1 && deferred == 1 && timer == saved->timer && later == 1)
		return true;

	for (i = 0; i < NR_RESTORE_STEPS; i++) {
		strcat(text, " ");
		strcat(text, restore_steps[order[i]]);
	}
	pr_info("vector of the %s, upcall %s, order%s: handled: queued event %u, deferred %u, timer %u, later event %u; expected 1, 1, %d, 1\n",
		saved->vm_vector ? "VM" : "vCPU", saved->raised ? "raised" : "not raised",
		text, queued, deferred, timer, later, saved->timer);
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

TEST(poll)
{
	struct fifo_vm *f = fifo_vm_create(guest_poll, SETUP_ALL);
	uint32_t port = 70000;
	pthread_t thread;

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

/*
 * Returns true if the timer's interrupt has queued the event.  If the host moves a
 * page at that moment, the interrupt leaves the event to the vCPU.  The vCPU does not
 * run in this case of the test, so set the timer again.
 */
static bool timer_has_queued(struct fifo_vm *f, struct kvm_xen_vcpu_attr *timer)
{
	uint64_t now = xen_guest_clock(f->vm);

	if (READ_ONCE(*word(f, TIMER_PORT)) == (PENDING | LINKED))
		return true;
	if (now > timer->u.timer.expires_ns + NSEC_PER_SEC)
		set_timer(f, timer, now + 1000000);
	return false;
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
	wait_for(timer_has_queued(f, &timer));
	set_timer(f, &timer, 0);
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

TEST(dirty_log)
{
	struct fifo_vm *f = fifo_vm_create(guest_nothing, SETUP_ALL);
	uint64_t dirty[DIV_ROUND_UP(NR_SHARED_PAGES, 64)];
	uint32_t port = 30 * PORTS_PER_PAGE;
	int i;

	vm_mem_region_set_flags(f->vm, SHARED_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	kvm_vm_get_dirty_log(f->vm, SHARED_SLOT, dirty);
	ASSERT_EQ(send_event(f, port, f->vcpus[0]->id, 7), 0);
	kvm_vm_get_dirty_log(f->vm, SHARED_SLOT, dirty);

	for (i = ARRAY_PAGE - NR_CONSUMERS; i < HANDLED_PAGE; i++) {
		bool expected = i == ARRAY_PAGE + 30 || i == CONTROL_PAGE;

		TEST_ASSERT(!!(dirty[i / 64] & BIT_ULL(i % 64)) == expected,
			    "page %d is%s dirty", i, expected ? " not" : "");
	}

	/* The new port is linked to a tail whose event word is in another page. */
	ASSERT_EQ(send_event(f, 1, f->vcpus[0]->id, 7), 0);
	kvm_vm_get_dirty_log(f->vm, SHARED_SLOT, dirty);
	for (i = ARRAY_PAGE; i < HANDLED_PAGE; i++) {
		bool expected = i == ARRAY_PAGE || i == ARRAY_PAGE + 30;

		TEST_ASSERT(!!(dirty[i / 64] & BIT_ULL(i % 64)) == expected,
			    "page %d is%s dirty", i, expected ? " not" : "");
	}
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
	struct kvm_xen_fifo_port_state state = {
		.vcpu = f->vcpus[0]->id, .last_vcpu = KVM_XEN_FIFO_NO_VCPU,
		.priority = 7,
	}, bad, got;
	struct kvm_xen_hvm_attr mode = {
		.type = KVM_XEN_ATTR_TYPE_EVTCHN_MODE,
		.u.evtchn_mode.mode = KVM_XEN_EVTCHN_MODE_FIFO,
	}, attr;
	struct kvm_xen_vcpu_attr tails = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS,
	}, control = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_CONTROL,
		.u.gpa = control_gpa(0),
	}, timer = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = { .port = 1, .priority = 16 },
	};
	uint32_t id = f->vcpus[0]->id;

	/* The flag requires another flag, and all attributes require the flag. */
	ASSERT_EQ(set_config(f, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
				KVM_XEN_HVM_CONFIG_EVTCHN_FIFO), EINVAL);
	ASSERT_EQ(set_config(f, CONFIG_FLAGS), 0);
	ASSERT_EQ(set_vm_attr(f, mode), ENOENT);
	ASSERT_EQ(get_vm_attr(f, &mode), ENOENT);
	ASSERT_EQ(set_array_page(f, 0), ENOENT);
	ASSERT_EQ(set_port(f, 1, id, 7), ENOENT);
	ASSERT_EQ(set_states(f, 1, 1, &state), ENOENT);
	ASSERT_EQ(set_vcpu_attr(f, 0, control), ENOENT);
	ASSERT_EQ(get_vcpu_attr(f, 0, &tails), ENOENT);
	ASSERT_EQ(send_event(f, 1, id, 7), EINVAL);
	ASSERT_EQ(set_loopback(f, 1, 0, 7, 0), EINVAL);
	timer.u.timer.priority = 7;
	ASSERT_EQ(set_vcpu_attr(f, 0, timer), EINVAL);
	ASSERT_EQ(set_config(f, CONFIG_FLAGS | KVM_XEN_HVM_CONFIG_EVTCHN_FIFO), 0);

	/* All other attributes require FIFO mode. */
	ASSERT_EQ(set_array_page(f, 0), ENXIO);
	ASSERT_EQ(set_port(f, 1, id, 7), ENXIO);
	ASSERT_EQ(set_states(f, 1, 1, &state), ENXIO);
	ASSERT_EQ(get_states(f, 1, 1, &state), ENXIO);
	ASSERT_EQ(set_vcpu_attr(f, 0, control), ENXIO);
	ASSERT_EQ(get_vcpu_attr(f, 0, &control), ENXIO);
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
	ASSERT_EQ(get_vcpu_attr(f, 0, &control), 0);
	ASSERT_EQ(control.u.gpa, GPA_INVALID);
	ASSERT_EQ(set_control(f, 0, control_gpa(0)), 0);
	ASSERT_EQ(set_control(f, 0, control_gpa(1)), EEXIST);
	ASSERT_EQ(get_vcpu_attr(f, 0, &control), 0);
	ASSERT_EQ(control.u.gpa, control_gpa(0));
	control.pad[0] = 1;
	ASSERT_EQ(set_vcpu_attr(f, 0, control), EINVAL);
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

	ASSERT_EQ(get_states(f, 1, 1, &got), 0);
	ASSERT_EQ(got.vcpu, KVM_XEN_FIFO_NO_VCPU);
	ASSERT_EQ(got.priority, DEFAULT_PRIORITY);
	ASSERT_EQ(set_states(f, 0, 1, &state), EINVAL);
	ASSERT_EQ(set_states(f, 1, 0, &state), EINVAL);
	ASSERT_EQ(set_states(f, 1, KVM_XEN_FIFO_STATE_MAX + 1, &state), EINVAL);
	ASSERT_EQ(set_states(f, NR_PORTS - 1, 2, &state), EINVAL);
	ASSERT_EQ(set_states(f, 1, 1, (void *)1), EFAULT);
	ASSERT_EQ(get_states(f, 1, 1, (void *)1), EFAULT);
#define BAD_STATE(field, value)							\
do {										\
	bad = state;								\
	bad.field = value;							\
	ASSERT_EQ(set_states(f, 1, 1, &bad), EINVAL);				\
} while (0)
	BAD_STATE(vcpu, 12345);
	BAD_STATE(last_vcpu, 12345);
	BAD_STATE(priority, 16);
	BAD_STATE(last_priority, 16);
	BAD_STATE(flags, 2);
	BAD_STATE(pad[4], 1);
	bad = state;
	bad.flags = KVM_XEN_FIFO_PORT_PENDING;
	bad.vcpu = KVM_XEN_FIFO_NO_VCPU;
	ASSERT_EQ(set_states(f, 1, 1, &bad), EINVAL);
	ASSERT_EQ(get_states(f, 1, 1, &got), 0);
	ASSERT_EQ(got.vcpu, KVM_XEN_FIFO_NO_VCPU);

	ASSERT_EQ(send_event(f, 0, id, 7), EINVAL);
	ASSERT_EQ(send_event(f, NR_PORTS, id, 7), EINVAL);
	ASSERT_EQ(send_event(f, 1, id, 16), EINVAL);
	ASSERT_EQ(send_event(f, 1, 12345, 7), EINVAL);
	ASSERT_EQ(set_loopback(f, NR_PORTS, 0, 7, 0), EINVAL);
	ASSERT_EQ(set_loopback(f, 1, 0, 16, 0), EINVAL);
	timer.u.timer.priority = 16;
	ASSERT_EQ(set_vcpu_attr(f, 0, timer), EINVAL);

	/* Remove the page of the event word from guest memory. */
	vm_mem_region_delete(f->vm, SHARED_SLOT);
	ASSERT_EQ(send_event(f, 1, id, 7), EFAULT);
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

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_XEN_EVTCHN_FIFO));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_FIFO);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	if (perf_only) {
		measure_all();
		return 0;
	}

	pr_info("seed %#lx\n", seed);
	return run_cases(argv + optind);
}
