// SPDX-License-Identifier: GPL-2.0-only
/*
 * Boot Linux as a Xen HVM guest
 *
 * The other tests of Xen event channels have guests that were written for KVM's
 * interface.  This one is a small VMM for a guest that was not: Linux, whose timers, IPIs
 * and console are event channels, FIFO if the hypervisor has them.
 *
 * The guest's initramfs contains this program as /init.  It works in rounds: threads on
 * both CPUs pass a checksum back and forth and sleep, the console's interrupt moves from
 * one CPU to the other, and CPU 1 goes offline and comes back.  In some cases the VM is
 * saved and restored into another VM while the guest works.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <asm/bootparam.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "xen.h"

/*
 * What Linux uses of Xen's ABI and xen.h does not have
 */

#define __HYPERVISOR_memory_op		12
#define XENMEM_add_to_physmap		7
#define XENMAPSPACE_shared_info		0

#define __HYPERVISOR_xen_version	17
#define XENVER_get_features		6
#define XENFEAT_hvm_callback_vector	8
#define XENFEAT_hvm_safe_pvclock	9

#define VCPUOP_register_runstate	5
#define VCPUOP_stop_periodic_timer	7
#define VCPUOP_stop_singleshot_timer	9
#define VCPUOP_register_vcpu_info	10
#define VCPUOP_register_time_info	13

#define __HYPERVISOR_hvm_op		34
#define HVMOP_set_param			0
#define HVMOP_get_param			1
#define HVMOP_set_upcall_vector		23
#define HVM_PARAM_CALLBACK_IRQ		0
#define HVM_PARAM_CONSOLE_PFN		17
#define HVM_PARAM_CONSOLE_EVTCHN	18
#define CALLBACK_TYPE_VECTOR		2

#define EVTCHNOP_bind_virq		1
#define EVTCHNOP_close			3
#define EVTCHNOP_bind_ipi		7
#define EVTCHNOP_bind_vcpu		8
#define EVTCHNOP_init_control		11
#define EVTCHNOP_expand_array		12
#define EVTCHNOP_set_priority		13
#define EVTCHNSTAT_closed		0
#define EVTCHNSTAT_virq			4
#define EVTCHNSTAT_ipi			5
#define VIRQ_TIMER			0

#define PRIO_2LEVEL			KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
#define FIFO_DEFAULT_PRIORITY		7
#define FIFO_PENDING			BIT(31)
#define FIFO_MASKED			BIT(30)
#define FIFO_LINKED			BIT(29)
#define PORTS_PER_PAGE			1024

struct console_ring {
	char in[1024];
	char out[2048];
	uint32_t in_cons, in_prod;
	uint32_t out_cons, out_prod;
};

/*
 * The VM
 */

#define NR_VCPUS		2
#define NR_PORTS		4096	/* what 2-level has; FIFO has more */
#define CONSOLE_PORT		1
#define CONSOLE_GSI		24	/* the first one that is no pin of the IO-APIC */
#define MEM_SIZE		(256ul << 20)
#define PAGE_TABLES		0x9000
#define BOOT_GDT		0x6000
#define ZERO_PAGE		0x7000
#define COMMAND_LINE		0x20000
#define ACPI_TABLES		0xf0000
#define KERNEL			0x1000000
#define CONSOLE_RING		(MEM_SIZE - PAGE_SIZE)
#define XEN_CPUID_BASE		0x40000000
#define XEN_VERSION		(4 << 16 | 17)

struct port {
	int type;		/* EVTCHNSTAT_* */
	uint32_t virq;
	uint32_t vcpu;
	uint32_t priority;	/* for FIFO only */
};

struct cpu {
	struct vmm *vmm;
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	bool running;		/* in KVM_RUN */
	bool handling;		/* an exit */
	uint64_t vcpu_info;
	uint64_t control;
	uint64_t queued;	/* FIFO events in VMs that do not exist any more */
	uint64_t dropped;
};

struct vmm {
	struct kvm_vm *vm;
	struct cpu cpus[NR_VCPUS];
	uint8_t *mem;

	/* Protects everything below, and the flags of cpus; @cond tells of any change. */
	pthread_mutex_t lock;
	pthread_cond_t cond;
	int pauses;		/* vCPUs must not run */
	bool stop;
	struct port ports[NR_PORTS];
	uint64_t array[NR_PORTS / PORTS_PER_PAGE];	/* gfns of FIFO's event array */
	uint32_t nr_pages;
	bool fifo;
	bool percpu_upcall;
	uint64_t shared_info;
	int console_out, console_in;			/* eventfds, from and to the guest */
	pthread_t console_thread;
	char log[1 << 20];
	size_t log_len;
	size_t log_heard;
};

static struct vmm vmm = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER,
};

static const char *kernel = "/guest/kernel";
static int nr_rounds = 6;

static void print_log_tail(void)
{
	const char *p = vmm.log + vmm.log_len;
	int lines = 25;

	while (p > vmm.log && (p[-1] != '\n' || lines--))
		p--;
	printf("the guest's last lines:\n%s\n", p);
}

/* Add to the log of the guest's console. */
static void log_add(struct vmm *v, const char *data, size_t len)
{
	len = min_t(size_t, len, (sizeof(v->log) - 1 - v->log_len));
	memcpy(v->log + v->log_len, data, len);
	v->log_len += len;
	pthread_cond_broadcast(&v->cond);
}

/*
 * Attributes
 */

static void set_vm_attr(struct vmm *v, struct kvm_xen_hvm_attr attr)
{
	int err = xen_set_vm_attr(v->vm, attr);

	TEST_ASSERT(!err, "KVM_XEN_HVM_SET_ATTR %#x: errno %d, expected 0", attr.type, err);
}

static void set_cpu_attr(struct cpu *c, struct kvm_xen_vcpu_attr attr)
{
	int err = xen_set_vcpu_attr(c->vcpu, attr);

	TEST_ASSERT(!err, "KVM_XEN_VCPU_SET_ATTR %#x: errno %d, expected 0", attr.type, err);
}

static void set_cpu_gpa(struct cpu *c, int type, uint64_t gpa)
{
	set_cpu_attr(c, (struct kvm_xen_vcpu_attr){ .type = type, .u.gpa = gpa });
}

static void set_timer_port(struct cpu *c, uint32_t port)
{
	set_cpu_attr(c, (struct kvm_xen_vcpu_attr){
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = { .port = port, .priority = PRIO_2LEVEL },
	});
}

/* The events that the guest sends, by an IPI port to a vCPU, or by the console's port. */
static void set_send_port(struct vmm *v, uint32_t port, uint32_t flags)
{
	struct kvm_xen_hvm_attr attr = {
		.type = KVM_XEN_ATTR_TYPE_EVTCHN,
		.u.evtchn = {
			.send_port = port,
			.type = v->ports[port].type,
			.flags = flags,
		},
	};

	if (port == CONSOLE_PORT) {
		attr.u.evtchn.deliver.eventfd.fd = v->console_out;
	} else {
		attr.u.evtchn.deliver.port.port = port;
		attr.u.evtchn.deliver.port.vcpu = v->ports[port].vcpu;
		attr.u.evtchn.deliver.port.priority = PRIO_2LEVEL;
	}
	set_vm_attr(v, attr);
}

/* All uses of the attributes of FIFO event channels */

static void fifo_enable(struct vmm *v)
{
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_EVTCHN_MODE,
		.u.evtchn_mode.mode = KVM_XEN_EVTCHN_MODE_FIFO,
	});
	v->fifo = true;
}

static void fifo_set_control(struct cpu *c, uint64_t gpa)
{
	c->control = gpa;
	set_vm_attr(c->vmm, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_FIFO_CONTROL,
		.u.fifo_control = { .vcpu = c->vcpu->id, .gpa = gpa },
	});
}

static void fifo_set_page(struct vmm *v, uint32_t page, uint64_t gfn)
{
	v->array[page] = gfn;
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_FIFO_ARRAY,
		.u.fifo_array = { .page = page, .gfn = gfn },
	});
}

static void fifo_set_port(struct vmm *v, uint32_t port)
{
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_FIFO_PORT,
		.u.fifo_port = {
			.port = port,
			.vcpu = v->ports[port].vcpu,
			.priority = v->ports[port].priority,
		},
	});
}

struct fifo_state {
	struct kvm_xen_vcpu_attr tails[NR_VCPUS];
	struct kvm_xen_fifo_waiting waiting;
};

static void fifo_save(struct vmm *v, struct fifo_state *s)
{
	struct kvm_xen_hvm_attr waiting = {
		.type = KVM_XEN_ATTR_TYPE_FIFO_WAITING,
		.u.fifo_waiting = (uintptr_t)&s->waiting,
	};
	int i;

	for (i = 0; i < NR_VCPUS; i++) {
		if (!v->cpus[i].control)
			continue;
		s->tails[i].type = KVM_XEN_VCPU_ATTR_TYPE_FIFO_TAILS;
		vcpu_ioctl(v->cpus[i].vcpu, KVM_XEN_VCPU_GET_ATTR, &s->tails[i]);
	}
	vm_ioctl(v->vm, KVM_XEN_HVM_GET_ATTR, &waiting);
}

/* The rest of the state is the VMM's own. */
static void fifo_restore(struct vmm *v, struct fifo_state *s)
{
	uint32_t i;

	fifo_enable(v);
	for (i = 1; i < NR_PORTS; i++) {
		if (v->ports[i].type != EVTCHNSTAT_closed)
			fifo_set_port(v, i);
	}
	for (i = 0; i < NR_VCPUS; i++) {
		if (!v->cpus[i].control)
			continue;
		fifo_set_control(&v->cpus[i], v->cpus[i].control);
		set_cpu_attr(&v->cpus[i], s->tails[i]);
	}
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_FIFO_WAITING,
		.u.fifo_waiting = (uintptr_t)&s->waiting,
	});
	for (i = 0; i < v->nr_pages; i++)
		fifo_set_page(v, i, v->array[i]);
}

static uint32_t *fifo_word(struct vmm *v, uint32_t port)
{
	return (uint32_t *)(v->mem + v->array[port / PORTS_PER_PAGE] * PAGE_SIZE) +
	       port % PORTS_PER_PAGE;
}

/*
 * Pauses
 *
 * KVM_RUN holds a mutex of the vCPU, and a vCPU that is halted or not started stays in
 * KVM_RUN.  So the others have to leave it before an attribute of theirs can be set.
 */

static void pause_cpus(struct vmm *v)
{
	struct cpu *c;

	v->pauses++;
	for (c = v->cpus; c < v->cpus + NR_VCPUS; c++) {
		while (c->running) {
			c->vcpu->run->immediate_exit = true;
			pthread_kill(c->thread, SIGUSR1);
			pthread_cond_wait(&v->cond, &v->lock);
		}
	}
}

static void resume_cpus(struct vmm *v)
{
	v->pauses--;
	pthread_cond_broadcast(&v->cond);
}

/*
 * Hypercalls
 */

static uint64_t guest_gpa(struct cpu *c, uint64_t gva)
{
	struct kvm_translation tr = { .linear_address = gva };

	vcpu_ioctl(c->vcpu, KVM_TRANSLATE, &tr);
	TEST_ASSERT(tr.valid && tr.physical_address < MEM_SIZE,
		    "gva %#lx of an argument has gpa %#llx, expected memory", gva,
		    tr.physical_address);
	return tr.physical_address;
}

static void guest_copy(struct cpu *c, uint64_t gva, void *data, size_t len, bool write)
{
	size_t n;
	void *p;

	for (; len; gva += n, data += n, len -= n) {
		n = min_t(size_t, len, (PAGE_SIZE - gva % PAGE_SIZE));
		p = c->vmm->mem + guest_gpa(c, gva);
		memcpy(write ? p : data, write ? data : p, n);
	}
}

#define guest_read(c, gva, arg)		guest_copy(c, gva, &(arg), sizeof(arg), false)
#define guest_write(c, gva, arg)	guest_copy(c, gva, &(arg), sizeof(arg), true)

static bool port_free(struct vmm *v, uint32_t port)
{
	/* A port that is in a queue must leave it before it is used again. */
	return v->ports[port].type == EVTCHNSTAT_closed &&
	       !(v->fifo && port < v->nr_pages * PORTS_PER_PAGE &&
		 (READ_ONCE(*fifo_word(v, port)) & FIFO_LINKED));
}

static uint32_t bind_port(struct vmm *v, int type, uint32_t virq, uint32_t vcpu)
{
	uint32_t port = 1;

	while (port < NR_PORTS && !port_free(v, port))
		port++;
	TEST_ASSERT(port < NR_PORTS, "no free port, expected at most %d in use", NR_PORTS);

	v->ports[port] = (struct port){
		.type = type, .virq = virq, .vcpu = vcpu, .priority = FIFO_DEFAULT_PRIORITY,
	};
	if (v->fifo)
		fifo_set_port(v, port);
	if (type == EVTCHNSTAT_ipi)
		set_send_port(v, port, 0);
	else if (type == EVTCHNSTAT_virq && virq == VIRQ_TIMER)
		set_timer_port(&v->cpus[vcpu], port);
	return port;
}

static void clear_pending(struct vmm *v, uint32_t port)
{
	uint64_t *pending = (uint64_t *)(v->mem + v->shared_info + XEN_SHINFO_PENDING);

	if (v->fifo)
		__atomic_fetch_and(fifo_word(v, port), ~FIFO_PENDING, __ATOMIC_SEQ_CST);
	else
		__atomic_fetch_and(&pending[port / 64], ~BIT(port % 64), __ATOMIC_SEQ_CST);
}

static void close_port(struct vmm *v, uint32_t port)
{
	struct port *p = &v->ports[port];

	if (p->type == EVTCHNSTAT_virq && p->virq == VIRQ_TIMER)
		set_timer_port(&v->cpus[p->vcpu], 0);
	else if (p->type != EVTCHNSTAT_virq)
		set_send_port(v, port, KVM_XEN_EVTCHN_DEASSIGN);
	p->vcpu = KVM_XEN_FIFO_NO_VCPU;
	if (v->fifo)
		fifo_set_port(v, port);
	clear_pending(v, port);
	p->type = EVTCHNSTAT_closed;
}

/* Events to the console's port come from an irqfd. */
static void route_console(struct vmm *v)
{
	struct {
		struct kvm_irq_routing table;
		struct kvm_irq_routing_entry entries[8 + 8 + CONSOLE_GSI + 1];
	} r = { };
	struct kvm_irq_routing_entry *e = r.table.entries;
	uint32_t i;

	for (i = 0; i < 16 + CONSOLE_GSI; i++, e++) {
		e->type = KVM_IRQ_ROUTING_IRQCHIP;
		e->gsi = i < 16 ? i : i - 16;
		e->u.irqchip.irqchip = i < 8 ? KVM_IRQCHIP_PIC_MASTER :
				       i < 16 ? KVM_IRQCHIP_PIC_SLAVE : KVM_IRQCHIP_IOAPIC;
		e->u.irqchip.pin = i < 16 ? i % 8 : e->gsi;
	}
	e->type = KVM_IRQ_ROUTING_XEN_EVTCHN;
	e->gsi = CONSOLE_GSI;
	e->u.xen_evtchn.port = CONSOLE_PORT;
	e->u.xen_evtchn.vcpu = v->ports[CONSOLE_PORT].vcpu;
	e->u.xen_evtchn.priority = PRIO_2LEVEL;
	r.table.nr = e + 1 - r.table.entries;
	vm_ioctl(v->vm, KVM_SET_GSI_ROUTING, &r.table);
}

/* KVM handles it for FIFO ports, unless a signal ends the wait for the port's page. */
static int64_t unmask_port(struct vmm *v, uint32_t port)
{
	uint64_t *mask = (uint64_t *)(v->mem + v->shared_info + XEN_SHINFO_MASK);
	uint64_t *pending = (uint64_t *)(v->mem + v->shared_info + XEN_SHINFO_PENDING);

	if (v->fifo) {
		if (__atomic_fetch_and(fifo_word(v, port), ~FIFO_MASKED,
				       __ATOMIC_SEQ_CST) & FIFO_PENDING)
			return -xen_send_event(v->vm, port, v->ports[port].vcpu, PRIO_2LEVEL);
		return 0;
	}

	__atomic_fetch_and(&mask[port / 64], ~BIT(port % 64), __ATOMIC_SEQ_CST);
	if (READ_ONCE(pending[port / 64]) & BIT(port % 64)) {
		clear_pending(v, port);
		return -xen_send_event(v->vm, port, v->ports[port].vcpu, PRIO_2LEVEL);
	}
	return 0;
}

static int64_t event_channel_op(struct cpu *c, uint64_t cmd, uint64_t gva)
{
	/* The largest argument, that of init_control; port and vCPU of the others */
	struct { uint64_t gfn; uint32_t offset, vcpu; uint8_t link_bits, pad[7]; } control;
	struct { uint32_t a, b, c; } arg = { };
	struct vmm *v = c->vmm;
	uint32_t i, size;

	switch (cmd) {
	case EVTCHNOP_init_control:
		guest_read(c, gva, control);
		if (control.vcpu >= NR_VCPUS)
			return -ENOENT;
		if (!v->fifo) {
			fifo_enable(v);
			fifo_set_port(v, CONSOLE_PORT);
		}
		fifo_set_control(&v->cpus[control.vcpu],
				 control.gfn * PAGE_SIZE + control.offset);
		control.link_bits = 17;
		guest_write(c, gva, control);
		return 0;
	case EVTCHNOP_expand_array:
		guest_read(c, gva, control.gfn);
		if (v->nr_pages == ARRAY_SIZE(v->array))
			return -ENOSPC;
		fifo_set_page(v, v->nr_pages++, control.gfn);
		return 0;
	case EVTCHNOP_bind_virq:
		guest_read(c, gva, arg);	/* virq, vcpu, port */
		if (arg.b >= NR_VCPUS)
			return -ENOENT;
		for (i = 1; i < NR_PORTS; i++) {
			if (v->ports[i].type == EVTCHNSTAT_virq &&
			    v->ports[i].virq == arg.a && v->ports[i].vcpu == arg.b)
				return -EEXIST;
		}
		arg.c = bind_port(v, EVTCHNSTAT_virq, arg.a, arg.b);
		guest_write(c, gva, arg);
		return 0;
	case EVTCHNOP_bind_ipi:
		guest_copy(c, gva, &arg, 8, false);	/* vcpu, port */
		if (arg.a >= NR_VCPUS)
			return -ENOENT;
		arg.b = bind_port(v, EVTCHNSTAT_ipi, 0, arg.a);
		guest_copy(c, gva, &arg, 8, true);
		return 0;
	}

	/* The others have a port, and some have a second word. */
	size = cmd == EVTCHNOP_set_priority || cmd == EVTCHNOP_bind_vcpu ? 8 : 4;
	guest_copy(c, gva, &arg, size, false);
	if (arg.a >= NR_PORTS || v->ports[arg.a].type == EVTCHNSTAT_closed)
		return -EINVAL;
	switch (cmd) {
	case EVTCHNOP_close:
		close_port(v, arg.a);
		return 0;
	case EVTCHNOP_set_priority:
		if (!v->fifo)
			return -ENOSYS;
		v->ports[arg.a].priority = arg.b;
		fifo_set_port(v, arg.a);
		return 0;
	case EVTCHNOP_bind_vcpu:
		if (arg.a != CONSOLE_PORT)
			return -EINVAL;
		v->ports[arg.a].vcpu = arg.b;
		route_console(v);
		if (v->fifo)
			fifo_set_port(v, arg.a);
		return 0;
	case EVTCHNOP_unmask:
		return unmask_port(v, arg.a);
	}
	return -ENOSYS;
}

static int64_t memory_op(struct cpu *c, uint64_t cmd, uint64_t gva)
{
	struct { uint16_t domid, size; uint32_t space; uint64_t idx, gpfn; } arg;
	struct vmm *v = c->vmm;
	int i;

	if (cmd != XENMEM_add_to_physmap)
		return -ENOSYS;
	guest_read(c, gva, arg);
	if (arg.space != XENMAPSPACE_shared_info)
		return -EINVAL;

	/* KVM learns that from a write to the hypercall MSR, which newer kernels do not use. */
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = true,
	});
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO, .u.shared_info.gfn = arg.gpfn,
	});
	v->shared_info = arg.gpfn * PAGE_SIZE;
	for (i = 0; i < NR_VCPUS; i++)
		set_cpu_gpa(&v->cpus[i], KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
			    v->shared_info + i * sizeof(struct xen_vcpu_info));
	return 0;
}

static int64_t vcpu_op(struct cpu *c, uint64_t cmd, uint64_t vcpu, uint64_t gva)
{
	struct { uint64_t mfn; uint32_t offset, pad; } info;
	struct kvm_xen_vcpu_attr old = { .type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO };
	struct vmm *v = c->vmm;
	uint64_t area;

	if (vcpu >= NR_VCPUS)
		return -ENOENT;

	switch (cmd) {
	case VCPUOP_register_vcpu_info:
		guest_read(c, gva, info);
		vcpu_ioctl(v->cpus[vcpu].vcpu, KVM_XEN_VCPU_GET_ATTR, &old);
		area = info.mfn * PAGE_SIZE + info.offset;
		memcpy(v->mem + area, v->mem + old.u.gpa, sizeof(struct xen_vcpu_info));
		set_cpu_gpa(&v->cpus[vcpu], KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, area);
		v->cpus[vcpu].vcpu_info = area;
		return 0;
	case VCPUOP_register_runstate:
	case VCPUOP_register_time_info:
		guest_read(c, gva, area);
		set_cpu_gpa(&v->cpus[vcpu], cmd == VCPUOP_register_runstate ?
			    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR :
			    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
			    area ? guest_gpa(c, area) : KVM_XEN_INVALID_GPA);
		return 0;
	case VCPUOP_stop_periodic_timer:
	case VCPUOP_stop_singleshot_timer:	/* without a port for the timer */
		return 0;
	}
	return -ENOSYS;
}

static int64_t hvm_op(struct cpu *c, uint64_t cmd, uint64_t gva)
{
	struct { uint16_t domid; uint32_t index; uint64_t value; } param;
	struct { uint32_t vcpu; uint8_t vector; } upcall;
	struct vmm *v = c->vmm;

	switch (cmd) {
	case HVMOP_set_param:
		guest_read(c, gva, param);
		if (param.index != HVM_PARAM_CALLBACK_IRQ)
			return -EINVAL;
		if (param.value >> 56 == CALLBACK_TYPE_VECTOR)
			set_vm_attr(v, (struct kvm_xen_hvm_attr){
				.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR,
				.u.vector = param.value,
			});
		return 0;
	case HVMOP_get_param:
		guest_read(c, gva, param);
		param.value = param.index == HVM_PARAM_CONSOLE_PFN ? CONSOLE_RING / PAGE_SIZE :
			      param.index == HVM_PARAM_CONSOLE_EVTCHN ? CONSOLE_PORT : 0;
		guest_write(c, gva, param);
		return 0;
	case HVMOP_set_upcall_vector:
		guest_read(c, gva, upcall);
		if (!v->percpu_upcall || upcall.vcpu >= NR_VCPUS)
			return -ENOENT;
		set_cpu_attr(&v->cpus[upcall.vcpu], (struct kvm_xen_vcpu_attr){
			.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, .u.vector = upcall.vector,
		});
		return 0;
	}
	return -ENOSYS;
}

static int64_t hypercall(struct cpu *c, uint64_t nr, const __u64 *args)
{
	struct { uint32_t index, submap; } features;
	int64_t ret = -ENOSYS;

	/* Many of them set attributes of another vCPU. */
	pause_cpus(c->vmm);
	switch (nr) {
	case __HYPERVISOR_memory_op:
		ret = memory_op(c, args[0], args[1]);
		break;
	case __HYPERVISOR_xen_version:
		if (args[0] != XENVER_get_features)
			break;
		guest_read(c, args[1], features);
		features.submap = features.index ? 0 : BIT(XENFEAT_hvm_callback_vector) |
						       BIT(XENFEAT_hvm_safe_pvclock);
		guest_write(c, args[1], features);
		ret = 0;
		break;
	case __HYPERVISOR_vcpu_op:
		ret = vcpu_op(c, args[0], args[1], args[2]);
		break;
	case __HYPERVISOR_event_channel_op:
		ret = event_channel_op(c, args[0], args[1]);
		break;
	case __HYPERVISOR_hvm_op:
		ret = hvm_op(c, args[0], args[1]);
		break;
	}
	resume_cpus(c->vmm);
	return ret;
}

/*
 * vCPUs and console
 */

static void handle_exit(struct cpu *c)
{
	struct kvm_run *run = c->vcpu->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;

	switch (run->exit_reason) {
	case KVM_EXIT_XEN:
		run->xen.u.hcall.result = hypercall(c, run->xen.u.hcall.input,
						    run->xen.u.hcall.params);
		break;
	case KVM_EXIT_IO:
		/* Port 0xe9 is the console of earlyprintk; nothing else is there. */
		if (run->io.direction == KVM_EXIT_IO_IN)
			memset(data, 0xff, run->io.size * run->io.count);
		else if (run->io.port == 0xe9)
			log_add(c->vmm, (char *)data, run->io.size * run->io.count);
		else
			TEST_ASSERT(run->io.port != 0x64 || *data != 0xfe,
				    "the guest resets the machine, expected it to run");
		break;
	case KVM_EXIT_MMIO:
		if (!run->mmio.is_write)
			memset(run->mmio.data, 0xff, run->mmio.len);
		break;
	default:
		TEST_FAIL("vCPU %u: unexpected exit reason %s", c->vcpu->id,
			  exit_reason_str(run->exit_reason));
	}
}

static void *cpu_thread(void *arg)
{
	struct cpu *c = arg;
	struct vmm *v = c->vmm;
	int ret, err;

	pthread_mutex_lock(&v->lock);
	while (!v->stop) {
		if (v->pauses) {
			pthread_cond_wait(&v->cond, &v->lock);
			continue;
		}
		c->running = true;
		c->vcpu->run->immediate_exit = false;
		pthread_mutex_unlock(&v->lock);
		ret = __vcpu_run(c->vcpu);
		err = errno;
		pthread_mutex_lock(&v->lock);
		c->running = false;
		pthread_cond_broadcast(&v->cond);
		TEST_ASSERT(!ret || err == EINTR || err == EAGAIN,
			    "KVM_RUN: errno %d, expected EINTR or EAGAIN", err);
		if (!ret) {
			c->handling = true;
			handle_exit(c);
			c->handling = false;
			pthread_cond_broadcast(&v->cond);
		}
	}
	pthread_mutex_unlock(&v->lock);
	return NULL;
}

/* The backend of the console */
static void *console_thread(void *arg)
{
	struct vmm *v = arg;
	struct console_ring *ring = (void *)(v->mem + CONSOLE_RING);
	eventfd_t count;

	while (!eventfd_read(v->console_out, &count) && !v->stop) {
		pthread_mutex_lock(&v->lock);
		while (ring->out_cons != READ_ONCE(ring->out_prod)) {
			log_add(v, &ring->out[ring->out_cons % sizeof(ring->out)], 1);
			__atomic_store_n(&ring->out_cons, ring->out_cons + 1, __ATOMIC_SEQ_CST);
		}
		pthread_mutex_unlock(&v->lock);
		/* There is room in the ring. */
		eventfd_write(v->console_in, 1);
	}
	return NULL;
}

static void drop_page(struct vmm *v, uint64_t gpa)
{
	void *page = v->mem + align_down(gpa, PAGE_SIZE);

	TEST_ASSERT(!madvise(page, PAGE_SIZE, MADV_DONTNEED), "madvise: errno %d", errno);
}

/* Make the pages absent that KVM needs for events.  They are in a memfd, which keeps them. */
static void *drop_thread(void *arg)
{
	struct vmm *v = arg;
	struct cpu *c = v->cpus;
	uint64_t n;

	while (!READ_ONCE(v->stop)) {
		n = vcpu_get_stat(c->vcpu, "exits");
		drop_page(v, v->shared_info);
		drop_page(v, v->array[0] * PAGE_SIZE);
		for (c = v->cpus; c < v->cpus + NR_VCPUS; c++) {
			drop_page(v, c->vcpu_info);
			drop_page(v, c->control);
		}
		c = v->cpus;
		wait_for(vcpu_get_stat(c->vcpu, "exits") > n + 10 || READ_ONCE(v->stop));
	}
	return NULL;
}

/* How long the guest may be quiet, on a debug kernel on a slow host whose clock is too fast */
#define QUIET_LIMIT_SECS	(4 * WAIT_LIMIT_SECS)

/* Wait until the guest prints @text, after what was heard before.  Returns what follows. */
static const char *hear(struct vmm *v, const char *text)
{
	struct timespec ts;
	size_t len = SIZE_MAX;
	uint64_t end = 0;
	char *p, *q;

	for (;;) {
		TEST_ASSERT(!strstr(v->log + v->log_heard, "guest: failed"),
			    "the guest fails, expected '%s'", text);
		p = strstr(v->log + v->log_heard, text);
		q = p ? strchr(p, '\n') : NULL;
		if (q) {
			v->log_heard = q - v->log;
			return p + strlen(text);
		}
		if (len != v->log_len) {
			len = v->log_len;
			end = now_ns() + QUIET_LIMIT_SECS * 1000000000ull;
		}
		TEST_ASSERT(now_ns() < end, "the guest said nothing for %d s, expected '%s'",
			    QUIET_LIMIT_SECS, text);
		clock_gettime(CLOCK_REALTIME, &ts);
		ts.tv_sec++;
		pthread_cond_timedwait(&v->cond, &v->lock, &ts);
	}
}

/*
 * Create, save and restore the VM
 */

static void set_cpuid(struct cpu *c)
{
	const struct kvm_cpuid2 *supported = kvm_get_supported_cpuid();
	uint32_t leaf[5][4] = {
		{ XEN_CPUID_BASE + 4, 0x566e6558, 0x65584d4d, 0x4d4d566e },	/* XenVMMXenVMM */
		{ XEN_VERSION },
		{ 1, XEN_HYPERCALL_MSR },
		{ },
		/* the vCPU's ID is there; an upcall vector for each vCPU */
		{ BIT(3) | (c->vmm->percpu_upcall ? BIT(6) : 0), c->vcpu->id },
	};
	struct kvm_cpuid2 *cpuid = allocate_kvm_cpuid2(supported->nent + ARRAY_SIZE(leaf));
	struct kvm_cpuid_entry2 *e;
	int i;

	cpuid->nent = 0;
	for (i = 0; i < supported->nent; i++) {
		e = &cpuid->entries[cpuid->nent];
		*e = supported->entries[i];
		if (e->function >> 8 == XEN_CPUID_BASE >> 8)
			continue;
		cpuid->nent++;
		if (e->function == 1) {
			e->ebx = (e->ebx & 0xff00ffff) | NR_VCPUS << 16;
			e->ebx = (e->ebx & 0x00ffffff) | c->vcpu->id << 24;
			e->ecx |= BIT(31);		/* a hypervisor */
			/* x2APIC; XSAVE, because an emulated SVM may not intercept XSETBV */
			e->ecx &= ~(BIT(21) | BIT(26) | BIT(27) | BIT(28));
		} else if (e->function == 0xb || e->function == 0x1f) {
			e->edx = c->vcpu->id;
		} else if (e->function == 0xd) {
			e->eax = 0;
			e->ebx = 0;
			e->ecx = 0;
			e->edx = 0;
		} else if (e->function == 0x80000001) {
			e->ecx &= ~BIT(2);		/* SVM */
		}
	}
	for (i = 0; i < ARRAY_SIZE(leaf); i++)
		cpuid->entries[cpuid->nent++] = (struct kvm_cpuid_entry2){
			.function = XEN_CPUID_BASE + i, .eax = leaf[i][0],
			.ebx = leaf[i][1], .ecx = leaf[i][2], .edx = leaf[i][3],
		};
	vcpu_init_cpuid(c->vcpu, cpuid);
	free(cpuid);
}

static void create_vm(struct vmm *v)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND |
			 KVM_XEN_HVM_CONFIG_EVTCHN_FIFO,
		.msr = XEN_HYPERCALL_MSR,
	};
	int i;

	v->vm = ____vm_create(VM_MODE_DEFAULT, 0);
	vm_create_irqchip(v->vm);
	vm_set_user_memory_region(v->vm, 0, 0, 0, MEM_SIZE, v->mem);
	vm_ioctl(v->vm, KVM_XEN_HVM_CONFIG, &config);
	for (i = 0; i < NR_VCPUS; i++) {
		v->cpus[i].vmm = v;
		v->cpus[i].vcpu = __vm_vcpu_add(v->vm, i);
		set_cpuid(&v->cpus[i]);
		set_cpu_attr(&v->cpus[i], (struct kvm_xen_vcpu_attr){
			.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, .u.vcpu_id = i,
		});
		/* Open the statistics before KVM_RUN holds the vCPU's mutex. */
		vcpu_get_stat(v->cpus[i].vcpu, "exits");
	}
	set_vm_attr(v, (struct kvm_xen_hvm_attr){
		.type = KVM_XEN_ATTR_TYPE_XEN_VERSION, .u.xen_version = XEN_VERSION,
	});
	set_send_port(v, CONSOLE_PORT, 0);
	route_console(v);
	kvm_irqfd(v->vm, CONSOLE_GSI, v->console_in, 0);
}

static uint64_t nr_queued(struct cpu *c)
{
	return c->queued + vcpu_get_stat(c->vcpu, "xen_fifo_fast") +
	       vcpu_get_stat(c->vcpu, "xen_fifo_slow");
}

static uint64_t nr_dropped(struct cpu *c)
{
	return c->dropped + vcpu_get_stat(c->vcpu, "xen_fifo_dropped");
}

static const uint16_t vm_attrs[] = {
	KVM_XEN_ATTR_TYPE_LONG_MODE,
	KVM_XEN_ATTR_TYPE_SHARED_INFO,
	KVM_XEN_ATTR_TYPE_UPCALL_VECTOR,
	KVM_XEN_ATTR_TYPE_XEN_VERSION,
};

static const uint16_t cpu_attrs[] = {
	KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID,
	KVM_XEN_VCPU_ATTR_TYPE_TIMER,
	KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR,
	KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
	KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
	KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA,
	KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
};

/*
 * Send to every second port, although nothing has happened.  Linux handles such timer
 * interrupts and IPIs like any other.
 */
static void send_to_ports(struct vmm *v, int parity)
{
	int port;

	for (port = parity; port < NR_PORTS; port += 2) {
		if (v->ports[port].type != EVTCHNSTAT_closed &&
		    (v->ports[port].type != EVTCHNSTAT_virq || v->ports[port].virq == VIRQ_TIMER))
			ASSERT_EQ(xen_send_event(v->vm, port, v->ports[port].vcpu, PRIO_2LEVEL), 0);
	}
}

/* Save the VM, destroy it, and restore its state into another one, with the same memory. */
static void save_and_restore(struct vmm *v)
{
	struct kvm_xen_vcpu_attr cpu_attr[NR_VCPUS][ARRAY_SIZE(cpu_attrs)] = { };
	struct kvm_xen_hvm_attr vm_attr[ARRAY_SIZE(vm_attrs)] = { };
	struct kvm_lapic_state lapic[NR_VCPUS];
	struct kvm_x86_state *x86[NR_VCPUS];
	struct kvm_irqchip irqchip[3] = { };
	static struct fifo_state fifo;
	struct kvm_clock_data clock;
	struct cpu *c;
	int i, j;

	pause_cpus(v);
	/* A hypercall may be waiting for the other vCPU. */
	for (c = v->cpus; c < v->cpus + NR_VCPUS; c++) {
		while (c->handling)
			pthread_cond_wait(&v->cond, &v->lock);
	}

	/* Half of the ports are in the queues when the VM is saved. */
	send_to_ports(v, 1);

	for (i = 0; i < NR_VCPUS; i++) {
		/* This also completes an exit that the VMM has handled, and starts the timer. */
		x86[i] = vcpu_save_state(v->cpus[i].vcpu);
		vcpu_ioctl(v->cpus[i].vcpu, KVM_GET_LAPIC, &lapic[i]);
	}
	/* Reading the timer stops it, so that no event comes later. */
	for (i = 0; i < NR_VCPUS; i++) {
		for (j = 0; j < ARRAY_SIZE(cpu_attrs); j++) {
			cpu_attr[i][j].type = cpu_attrs[j];
			vcpu_ioctl(v->cpus[i].vcpu, KVM_XEN_VCPU_GET_ATTR, &cpu_attr[i][j]);
		}
	}
	for (j = 0; j < ARRAY_SIZE(vm_attrs); j++) {
		vm_attr[j].type = vm_attrs[j];
		vm_ioctl(v->vm, KVM_XEN_HVM_GET_ATTR, &vm_attr[j]);
	}
	if (v->fifo)
		fifo_save(v, &fifo);
	for (j = 0; j < ARRAY_SIZE(irqchip); j++) {
		irqchip[j].chip_id = j;
		vm_ioctl(v->vm, KVM_GET_IRQCHIP, &irqchip[j]);
	}
	vm_ioctl(v->vm, KVM_GET_CLOCK, &clock);
	for (c = v->cpus; c < v->cpus + NR_VCPUS; c++) {
		c->queued = nr_queued(c);
		c->dropped = nr_dropped(c);
	}
	kvm_vm_free(v->vm);

	create_vm(v);
	clock.flags = 0;
	vm_ioctl(v->vm, KVM_SET_CLOCK, &clock);
	for (j = 0; j < ARRAY_SIZE(irqchip); j++)
		vm_ioctl(v->vm, KVM_SET_IRQCHIP, &irqchip[j]);
	for (j = 0; j < ARRAY_SIZE(vm_attrs); j++)
		set_vm_attr(v, vm_attr[j]);
	if (v->fifo)
		fifo_restore(v, &fifo);
	for (i = 0; i < NR_VCPUS; i++) {
		c = &v->cpus[i];
		vcpu_load_state(c->vcpu, x86[i]);
		kvm_x86_state_cleanup(x86[i]);
		vcpu_ioctl(c->vcpu, KVM_SET_LAPIC, &lapic[i]);
		for (j = 0; j < ARRAY_SIZE(cpu_attrs); j++)
			set_cpu_attr(c, cpu_attr[i][j]);
	}
	for (i = 1; i < NR_PORTS; i++) {
		if (v->ports[i].type == EVTCHNSTAT_ipi)
			set_send_port(v, i, 0);
	}

	/* KVM appends the other half to what was in the queues. */
	send_to_ports(v, 0);
	resume_cpus(v);
}

/*
 * Boot
 */

static uint8_t checksum(const void *data, size_t len)
{
	const uint8_t *p = data;
	uint8_t sum = 0;

	while (len--)
		sum -= *p++;
	return sum;
}

struct acpi_header {
	char signature[4];
	uint32_t length;
	uint8_t revision, checksum;
	char oem[14];
	uint32_t oem_revision;
	char creator[4];
	uint32_t creator_revision;
};

static void acpi_header(void *table, const char *signature, uint8_t revision, uint32_t len)
{
	struct acpi_header *h = table;

	memcpy(h->signature, signature, sizeof(h->signature));
	h->length = len;
	h->revision = revision;
	h->checksum = checksum(table, len);
}

/* ACPI tables for a machine without ACPI hardware: they list the APICs. */
static void write_acpi_tables(struct vmm *v)
{
	struct {
		char signature[8];
		uint8_t checksum;
		char oem[6];
		uint8_t revision;
		uint32_t rsdt, length;
		uint64_t xsdt;
		uint8_t checksum2, reserved[3];
	} *rsdp = (void *)(v->mem + ACPI_TABLES);
	uint64_t *xsdt = (void *)rsdp + 0x100 + sizeof(struct acpi_header);
	uint8_t *fadt = (void *)rsdp + 0x200, *dsdt = fadt + 0x200, *madt = fadt + 0x300, *p;
	const uint64_t tables[] = { ACPI_TABLES + 0x200, ACPI_TABLES + 0x500 };
	int i;

	memcpy(rsdp->signature, "RSD PTR ", 8);
	rsdp->revision = 2;
	rsdp->length = 36;
	rsdp->xsdt = ACPI_TABLES + 0x100;
	rsdp->checksum = checksum(rsdp, 20);
	rsdp->checksum2 = checksum(rsdp, 36);

	memcpy(xsdt, tables, sizeof(tables));
	acpi_header((void *)rsdp + 0x100, "XSDT", 1, sizeof(struct acpi_header) + sizeof(tables));

	fadt[109] = BIT(5);			/* no CMOS RTC */
	*(uint32_t *)(fadt + 112) = BIT(20);	/* hardware-reduced ACPI */
	*(uint64_t *)(fadt + 140) = ACPI_TABLES + 0x400;
	acpi_header(fadt, "FACP", 5, 268);
	acpi_header(dsdt, "DSDT", 2, sizeof(struct acpi_header));

	p = madt + sizeof(struct acpi_header);
	*(uint32_t *)p = 0xfee00000;
	p += 8;
	for (i = 0; i < NR_VCPUS; i++, p += 8)
		memcpy(p, (uint8_t []){ 0, 8, i, i, 1 }, 5);
	memcpy(p, (uint8_t []){ 1, 12, NR_VCPUS, 0, 0, 0, 0xc0, 0xfe }, 8);
	acpi_header(madt, "APIC", 4, p + 12 - madt);
}

/* Append a file to an initramfs in cpio's "newc" format. */
static uint8_t *cpio_add(uint8_t *p, const char *name, uint32_t mode, uint32_t size)
{
	/* inode, mode, user, group, links, time; size; four devices; length of name; checksum */
	p += sprintf((char *)p, "070701%08X%08X%08X%08X%08X%08X%08X%032X%08X%08X%s", 0, mode, 0, 0,
		     1, 0, size, 0, (int)strlen(name) + 1, 0, name);
	return p + 1;
}

/* This program is /init.  Returns the size of the initramfs. */
static uint32_t write_initramfs(uint8_t *base)
{
	int fd = open_path_or_exit("/proc/self/exe", O_RDONLY);
	uint8_t *p = base;
	struct stat st;

	TEST_ASSERT(!fstat(fd, &st), "cannot read my size, errno %d", errno);
	memset(base, 0, st.st_size + 4096);
	p = align_ptr_up(cpio_add(p, "dev", S_IFDIR | 0755, 0), 4);
	p = align_ptr_up(cpio_add(p, "proc", S_IFDIR | 0755, 0), 4);
	p = align_ptr_up(cpio_add(p, "sys", S_IFDIR | 0755, 0), 4);
	p = align_ptr_up(cpio_add(p, "init", S_IFREG | 0755, st.st_size), 4);
	TEST_ASSERT(read(fd, p, st.st_size) == st.st_size, "cannot read myself");
	p = align_ptr_up(p + st.st_size, 4);
	p = cpio_add(p, "TRAILER!!!", 0, 0);
	close(fd);
	return p - base;
}

/* Load Linux by its 64-bit boot protocol, Documentation/x86/boot.rst. */
static void load_linux(struct vmm *v, const char *options)
{
	struct boot_params *bp = (void *)(v->mem + ZERO_PAGE);
	int fd = open_path_or_exit(kernel, O_RDONLY);
	uint64_t *gdt = (uint64_t *)(v->mem + BOOT_GDT);
	uint64_t *pt = (uint64_t *)(v->mem + PAGE_TABLES);
	uint64_t initrd = MEM_SIZE - (32 << 20);
	struct kvm_segment code = { .selector = 0x10, .limit = ~0, .type = 0xb, .present = 1,
				    .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .selector = 0x18, .limit = ~0, .type = 0x3, .present = 1,
				    .s = 1, .db = 1, .g = 1 };
	struct kvm_regs regs = { .rip = KERNEL + 0x200, .rsi = ZERO_PAGE, .rflags = 2 };
	struct kvm_vcpu *vcpu = v->cpus[0].vcpu;
	struct kvm_sregs sregs;
	size_t setup_size;
	ssize_t size;
	int i;

	/* The setup header, then the kernel */
	TEST_ASSERT(pread(fd, &bp->hdr, sizeof(bp->hdr), 0x1f1) == sizeof(bp->hdr) &&
		    bp->hdr.header == 0x53726448 && (bp->hdr.xloadflags & XLF_KERNEL_64),
		    "%s: expected a 64-bit bzImage", kernel);
	setup_size = ((bp->hdr.setup_sects ?: 4) + 1) * 512;
	size = pread(fd, v->mem + KERNEL, initrd - KERNEL, setup_size);
	TEST_ASSERT(size > 0, "%s: errno %d", kernel, errno);
	close(fd);

	snprintf((char *)v->mem + COMMAND_LINE, 1024,
		 "console=hvc0 earlyprintk=xen pci=off panic=-1 panic_on_warn=1 kunit.enable=0 GUEST_ROUNDS=%d %s",
		 nr_rounds, options);
	bp->hdr.type_of_loader = 0xff;
	bp->hdr.cmd_line_ptr = COMMAND_LINE;
	bp->hdr.ramdisk_image = initrd;
	bp->hdr.ramdisk_size = write_initramfs(v->mem + initrd);
	bp->e820_entries = 2;
	bp->e820_table[0] = (struct boot_e820_entry){ 0, 0x9f000, 1 };
	bp->e820_table[1] = (struct boot_e820_entry){ 1 << 20, CONSOLE_RING - (1 << 20), 1 };
	write_acpi_tables(v);
	bp->acpi_rsdp_addr = ACPI_TABLES;

	/* The first GiB is mapped to itself, by pages of 2 MiB. */
	pt[0] = PAGE_TABLES + PAGE_SIZE + 3;
	pt[512] = PAGE_TABLES + 2 * PAGE_SIZE + 3;
	for (i = 0; i < 512; i++)
		pt[1024 + i] = ((uint64_t)i << 21) + 0x83;
	gdt[2] = 0x00af9b000000ffff;
	gdt[3] = 0x00cf93000000ffff;

	vcpu_sregs_get(vcpu, &sregs);
	sregs.cs = code;
	sregs.ds = data;
	sregs.es = data;
	sregs.ss = data;
	sregs.gdt.base = BOOT_GDT;
	sregs.gdt.limit = 4 * 8 - 1;
	sregs.cr0 = X86_CR0_PE | X86_CR0_NE | X86_CR0_PG;
	sregs.cr3 = PAGE_TABLES;
	sregs.cr4 = X86_CR4_PAE;
	sregs.efer = EFER_LME | EFER_LMA;
	vcpu_sregs_set(vcpu, &sregs);
	vcpu_regs_set(vcpu, &regs);
}

static void ignore_signal(int sig) { }

/*
 * The guest's work
 */

static uint64_t mix(uint64_t sum)
{
	return (sum ^ sum >> 29) * 0x9e3779b97f4a7c15 + 1;
}

#define CONSOLE_IRQ	"hvc_console"
#define ALL_CPUS	-1
#define NR_PASSES	100	/* of the checksum to CPU 1 and back */

static uint64_t expected_sum(int rounds)
{
	uint64_t sum = 0;
	int i;

	for (i = 0; i < rounds * NR_PASSES * 2; i++)
		sum = mix(sum);
	return sum;
}

#define guest_check(cond)								\
do {											\
	if (!(cond)) {									\
		printf("guest: failed: line %d: expected %s, errno %d\n", __LINE__,	\
		       #cond, errno);							\
		for (;;)								\
			pause();							\
	}										\
} while (0)

/* The number of interrupts, on @cpu or on all, in lines of /proc/interrupts with @a and @b */
static uint64_t guest_irqs(const char *a, const char *b, int cpu)
{
	FILE *f = fopen("/proc/interrupts", "r");
	char line[512], *p, *end;
	uint64_t n = 0, nr;
	int i;

	guest_check(f);
	while (fgets(line, sizeof(line), f)) {
		if (!strstr(line, a) || !strstr(line, b))
			continue;
		p = strchr(line, ':') + 1;
		for (i = 0; nr = strtoull(p, &end, 10), end != p; p = end, i++)
			n += cpu == ALL_CPUS || cpu == i ? nr : 0;
	}
	fclose(f);
	return n;
}

/* Move the console's interrupt to @cpu.  The next one, for this line, has to arrive there. */
static void move_console(int cpu)
{
	char line[512], path[64];
	uint64_t n = guest_irqs("", CONSOLE_IRQ, cpu);
	struct timespec delay = { .tv_nsec = 1000000 };
	FILE *f = fopen("/proc/interrupts", "r");
	int i, irq = 0;

	while (fgets(line, sizeof(line), f)) {
		if (strstr(line, CONSOLE_IRQ))
			irq = atoi(line);
	}
	fclose(f);
	snprintf(path, sizeof(path), "/proc/irq/%d/smp_affinity", irq);
	f = fopen(path, "w");
	guest_check(f && fprintf(f, "%x", 1 << cpu) > 0 && !fclose(f));

	printf("guest: console on CPU %d\n", cpu);
	for (i = 0; i < 20000 && guest_irqs("", CONSOLE_IRQ, cpu) == n; i++)
		nanosleep(&delay, NULL);
	guest_check(guest_irqs("", CONSOLE_IRQ, cpu) > n);
}

static uint64_t guest_sum;
static int pipes[2][2];

static void *guest_thread(void *arg)
{
	int id = (uintptr_t)arg, i;
	uint64_t sum = guest_sum;
	struct timespec delay = { .tv_nsec = 1000000 };
	cpu_set_t set;
	uint64_t t;

	CPU_ZERO(&set);
	CPU_SET(id, &set);
	guest_check(!sched_setaffinity(0, sizeof(set), &set));

	for (i = 0; i < NR_PASSES; i++) {
		if (id)
			guest_check(read(pipes[0][0], &sum, sizeof(sum)) == sizeof(sum));
		sum = mix(sum);
		guest_check(write(pipes[id][1], &sum, sizeof(sum)) == sizeof(sum));
		if (!id)
			guest_check(read(pipes[1][0], &sum, sizeof(sum)) == sizeof(sum));
		if (i % 10)
			continue;
		t = now_ns();
		guest_check(!nanosleep(&delay, NULL));
		t = now_ns() - t;
		guest_check(t >= delay.tv_nsec && t < 60 * 1000000000ull);
	}
	if (!id)
		guest_sum = sum;
	return NULL;
}

static void set_online(const char *value)
{
	int fd = open("/sys/devices/system/cpu/cpu1/online", O_RDWR);
	char c = 0;

	guest_check(fd >= 0 && write(fd, value, 1) == 1);
	guest_check(pread(fd, &c, 1, 0) == 1 && c == *value);
	close(fd);
}

/* PID 1 of the guest; does not return. */
static void guest_main(int rounds)
{
	uint64_t timers, ipis;
	pthread_t threads[2];
	int i, round, fd;

	mount("dev", "/dev", "devtmpfs", 0, NULL);
	fd = open("/dev/console", O_RDWR);
	for (i = 0; i < 3; i++)
		dup2(fd, i);
	setbuf(stdout, NULL);
	guest_check(!mount("proc", "/proc", "proc", 0, NULL));
	guest_check(!mount("sys", "/sys", "sysfs", 0, NULL));
	guest_check(!pipe(pipes[0]) && !pipe(pipes[1]));
	printf("guest: started\n");

	for (round = 1; round <= rounds; round++) {
		move_console(1);
		timers = guest_irqs("-virq", "timer", ALL_CPUS);
		ipis = guest_irqs("-ipi", "", ALL_CPUS);
		for (i = 0; i < 2; i++)
			guest_check(!pthread_create(&threads[i], NULL, guest_thread,
						    (void *)(uintptr_t)i));
		for (i = 0; i < 2; i++)
			pthread_join(threads[i], NULL);
		timers = guest_irqs("-virq", "timer", ALL_CPUS) - timers;
		ipis = guest_irqs("-ipi", "", ALL_CPUS) - ipis;
		guest_check(timers && ipis);
		/* The ports of CPU 1 are closed, and the console's port moves to CPU 0. */
		set_online("0");
		set_online("1");
		move_console(0);
		printf("guest: round %d: timers +%lu, IPIs +%lu, console %lu, sum %lx\n", round,
		       timers, ipis, guest_irqs("", CONSOLE_IRQ, ALL_CPUS), guest_sum);
	}
	printf("guest: done, sum %lx\n", guest_sum);
	for (;;)
		pause();
}

/*
 * Cases
 */

#define FIFO		BIT(0)
#define VM_VECTOR	BIT(1)	/* one vector for the upcalls of all vCPUs */
#define MIGRATE		BIT(2)
#define DROP_PAGES	BIT(3)

static void run_linux(int flags)
{
	bool fifo = flags & FIFO;
	uint64_t queued[NR_VCPUS] = { }, slow = 0, nr, sum;
	struct vmm *v = &vmm;
	pthread_t dropper = 0;
	const char *said;
	char text[64];
	bool used_fifo;
	int i, round;

	atexit(print_log_tail);
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = ignore_signal }, NULL);
	v->percpu_upcall = !(flags & VM_VECTOR);
	v->mem = mmap(NULL, MEM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
		      kvm_memfd_alloc(MEM_SIZE, false), 0);
	TEST_ASSERT(v->mem != MAP_FAILED, "mmap: errno %d", errno);
	v->console_out = eventfd(0, 0);
	v->console_in = eventfd(0, 0);
	v->ports[CONSOLE_PORT].type = EVTCHNSTAT_interdomain;
	v->ports[CONSOLE_PORT].priority = FIFO_DEFAULT_PRIORITY;
	create_vm(v);
	load_linux(v, fifo ? "xen.fifo_events=1" : "xen.fifo_events=0");

	v->console_thread = start_thread(console_thread, v);
	pthread_mutex_lock(&v->lock);
	for (i = 0; i < NR_VCPUS; i++)
		v->cpus[i].thread = start_thread(cpu_thread, &v->cpus[i]);

	hear(v, "guest: started");
	pr_info("booted with %s event channels\n", fifo ? "FIFO" : "2-level");
	if (flags & DROP_PAGES)
		dropper = start_thread(drop_thread, v);
	for (round = 1; round <= nr_rounds; round++) {
		/* The guest is at work in this round. */
		for (i = 0; (flags & MIGRATE) && i < 3; i++) {
			save_and_restore(v);
			pthread_mutex_unlock(&v->lock);
			wait_for(vcpu_get_stat(v->cpus[1].vcpu, "exits") > 200);
			pthread_mutex_lock(&v->lock);
		}
		snprintf(text, sizeof(text), "guest: round %d: ", round);
		said = hear(v, text);
		pr_info("round %d: %.*s\n", round, (int)strcspn(said, "\r\n"), said);
		for (i = 0; fifo && i < NR_VCPUS; i++) {
			nr = nr_queued(&v->cpus[i]);
			TEST_ASSERT(nr > queued[i],
				    "vCPU %d: %lu FIFO events, expected more than %lu", i, nr,
				    queued[i]);
			queued[i] = nr;
		}
	}
	sum = strtoull(hear(v, "guest: done, sum "), NULL, 16);
	ASSERT_EQ(sum, expected_sum(nr_rounds));

	used_fifo = strstr(v->log, "Using FIFO-based ABI");
	ASSERT_EQ(used_fifo, fifo);
	ASSERT_EQ(v->fifo, fifo);
	pr_info("figures: %d rounds, FIFO events: vCPU 0 %lu, vCPU 1 %lu\n", nr_rounds,
		nr_queued(&v->cpus[0]), nr_queued(&v->cpus[1]));
	for (i = 0; i < NR_VCPUS; i++) {
		ASSERT_EQ(!nr_queued(&v->cpus[i]), !fifo);
		ASSERT_EQ(nr_dropped(&v->cpus[i]), 0);
		if (flags & DROP_PAGES)
			slow += vcpu_get_stat(v->cpus[i].vcpu, "xen_fifo_slow");
	}

	if (flags & DROP_PAGES) {
		pr_info("%lu of the events needed a page that was absent\n", slow);
		TEST_ASSERT(slow, "xen_fifo_slow is 0, expected more");
	}

	pause_cpus(v);
	v->stop = true;
	resume_cpus(v);
	pthread_mutex_unlock(&v->lock);
	for (i = 0; i < NR_VCPUS; i++)
		join_thread(v->cpus[i].thread, "vCPU");
	eventfd_write(v->console_out, 1);
	join_thread(v->console_thread, "console");
	if (dropper)
		join_thread(dropper, "madvise");
	kvm_vm_free(v->vm);
}

TEST(fifo)
{
	run_linux(FIFO);
}

TEST(fifo_vm_vector)
{
	run_linux(FIFO | VM_VECTOR);
}

TEST(fifo_migration)
{
	run_linux(FIFO | MIGRATE);
}

TEST(fifo_migration_vm_vector)
{
	run_linux(FIFO | MIGRATE | VM_VECTOR);
}

/* KVM's caches of the event array, control blocks and so on become invalid all the time. */
TEST(fifo_absent)
{
	run_linux(FIFO | DROP_PAGES);
}

TEST(two_level)
{
	run_linux(0);
}

TEST(two_level_migration)
{
	run_linux(MIGRATE);
}

static void print_usage(const char *name)
{
	printf("usage: %s [-k KERNEL] [-n ROUNDS] [CASE...]\n"
	       "  -k  bzImage of the guest, with CONFIG_XEN_PVHVM and CONFIG_HVC_XEN\n"
	       "      (default: %s)\n"
	       "  -n  rounds of the guest's work\n"
	       "  CASE: run only this one; !CASE: run all but this one\n", name, kernel);
}

int main(int argc, char *argv[])
{
	const char *rounds = getenv("GUEST_ROUNDS");
	int opt;

	if (getpid() == 1 && rounds)
		guest_main(atoi(rounds));

	while ((opt = getopt(argc, argv, "k:n:")) != -1) {
		switch (opt) {
		case 'k':
			kernel = optarg;
			break;
		case 'n':
			nr_rounds = atoi(optarg);
			break;
		default:
			print_usage(argv[0]);
			exit(KSFT_FAIL);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_FIFO);
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));
	__TEST_REQUIRE(!access(kernel, R_OK), "no kernel for the guest: %s", kernel);
	__TEST_REQUIRE(!getauxval(AT_BASE), "this program is not linked statically");

	/* The time limit of each case: longer than any wait. */
	setenv("TEST_TIMEOUT", "600", 0);
	return run_cases(argv + optind);
}
