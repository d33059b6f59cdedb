/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The parts of the Xen ABI that the tests use, and helpers for KVM's Xen
 * ioctls.  Structures have the layout of 64-bit guests.
 */
#ifndef SELFTEST_KVM_XEN_H
#define SELFTEST_KVM_XEN_H

#include "kvm_util.h"
#include "processor.h"

/* Set as the address or gfn in an attribute, this value removes the page. */
#define GPA_INVALID				(~0ul)

/* Arbitrarily chosen from the MSRs that are reserved for hypervisors. */
#define XEN_HYPERCALL_MSR			0x40000000

#define __HYPERVISOR_set_timer_op		15

#define __HYPERVISOR_vcpu_op			24
#define VCPUOP_set_singleshot_timer		8
#define VCPU_SSHOTTMR_future			1

#define __HYPERVISOR_sched_op			29
#define SCHEDOP_yield				0
#define SCHEDOP_poll				3

#define __HYPERVISOR_event_channel_op		32
#define EVTCHNOP_send				4
#define EVTCHNOP_unmask				9

#define EVTCHNSTAT_interdomain			2

/*
 * Offsets in struct shared_info.  COMPAT is for 32-bit guests.  The offset of
 * evtchn_pending[] is the same for 32-bit and 64-bit guests.
 */
#define XEN_SHINFO_PENDING			0x800
#define XEN_SHINFO_MASK				0xa00
#define XEN_SHINFO_COMPAT_MASK			0x880

/*
 * Offsets of the wall clock.  The upper half of the seconds follows the rest of
 * the wall clock in the layout of 64-bit guests, but not in that of 32-bit
 * guests.
 */
#define XEN_SHINFO_WALL_CLOCK			0xc00
#define XEN_SHINFO_COMPAT_WALL_CLOCK		0x900
#define XEN_SHINFO_COMPAT_SEC_HI		0x924

struct xen_vcpu_info {
	uint8_t evtchn_upcall_pending;
	uint8_t evtchn_upcall_mask;
	uint32_t compat_pending_sel;	/* evtchn_pending_sel of a 32-bit guest */
	uint64_t evtchn_pending_sel;
	uint8_t arch[16];
	uint8_t time[32];
};

/* These return 0 or an errno. */
static inline int xen_set_vm_attr(struct kvm_vm *vm, struct kvm_xen_hvm_attr attr)
{
	return __vm_ioctl(vm, KVM_XEN_HVM_SET_ATTR, &attr) ? errno : 0;
}

static inline int xen_set_vcpu_attr(struct kvm_vcpu *vcpu, struct kvm_xen_vcpu_attr attr)
{
	return __vcpu_ioctl(vcpu, KVM_XEN_VCPU_SET_ATTR, &attr) ? errno : 0;
}

static inline int xen_send_event(struct kvm_vm *vm, uint32_t port, uint32_t vcpu_id,
				 uint32_t priority)
{
	struct kvm_irq_routing_xen_evtchn evtchn = {
		.port = port, .vcpu = vcpu_id, .priority = priority,
	};

	return __vm_ioctl(vm, KVM_XEN_HVM_EVTCHN_SEND, &evtchn) ? errno : 0;
}

/* Returns kvmclock, to which the deadlines of the guest's timers refer. */
static inline uint64_t xen_guest_clock(struct kvm_vm *vm)
{
	struct kvm_clock_data data;

	vm_ioctl(vm, KVM_GET_CLOCK, &data);
	return data.clock;
}

/* In how many orders can @nr steps be done? */
static inline uint64_t xen_nr_orders(int nr)
{
	return nr ? nr * xen_nr_orders(nr - 1) : 1;
}

/* Stores order number @n of @nr steps in @order. */
static inline void xen_get_order(uint64_t n, int *order, int nr)
{
	uint64_t nr_orders = xen_nr_orders(nr);
	int i, j, step;

	for (i = 0; i < nr; i++)
		order[i] = i;
	for (i = 0; i < nr; i++) {
		nr_orders /= nr - i;
		step = order[i + n / nr_orders];
		for (j = i + n / nr_orders; j > i; j--)
			order[j] = order[j - 1];
		order[i] = step;
		n %= nr_orders;
	}
}

/* For use by guest code, in 64-bit mode. */
static inline uint64_t xen_hypercall(uint64_t nr, uint64_t arg1, uint64_t arg2)
{
	uint64_t ret;

	asm volatile("vmcall" : "=a"(ret) : "a"(nr), "D"(arg1), "S"(arg2)
		     : "memory");
	return ret;
}

/*
 * Selectors of code segments: the 64-bit segment that the library sets up, and
 * a 32-bit segment in an entry of the GDT that the library does not use.
 */
#define XEN_CODE64_SELECTOR			0x8
#define XEN_CODE32_SELECTOR			0x30

static inline void xen_add_code32_segment(struct kvm_vm *vm, struct kvm_vcpu *vcpu)
{
	struct kvm_sregs sregs;
	uint64_t *gdt;

	vcpu_sregs_get(vcpu, &sregs);
	gdt = addr_gva2hva(vm, sregs.gdt.base);
	/* Base 0, limit 4 GiB, present, code, readable, 32 bits */
	gdt[XEN_CODE32_SELECTOR / 8] = 0x00cf9b000000ffff;
}

/*
 * Make a hypercall as a 32-bit guest does: from a 32-bit code segment, with the
 * arguments in EBX, ECX and EDX.  For use by guest code in 64-bit mode.  The
 * host must have called xen_add_code32_segment() for the vCPU.
 */
static inline uint32_t xen_hypercall32(uint32_t nr, uint32_t arg1, uint32_t arg2,
				       uint32_t arg3)
{
	uint32_t ret;

	/* Skip the red zone, which the compiler may use. */
	asm volatile("add $-128, %%rsp\n\t"
		     "pushq %[cs32]\n\t"
		     "pushq $1f\n\t"
		     "lretq\n\t"
		     ".code32\n"
		     "1:\n\t"
		     "vmcall\n\t"
		     "ljmp %[cs64], $2f\n\t"
		     ".code64\n"
		     "2:\n\t"
		     "sub $-128, %%rsp\n\t"
		     : "=a"(ret)
		     : "a"(nr), "b"(arg1), "c"(arg2), "d"(arg3),
		       [cs32]"i"(XEN_CODE32_SELECTOR), [cs64]"i"(XEN_CODE64_SELECTOR)
		     : "memory", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15");
	return ret;
}

#endif /* SELFTEST_KVM_XEN_H */
