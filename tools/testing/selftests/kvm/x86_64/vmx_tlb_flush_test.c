// SPDX-License-Identifier: GPL-2.0-only
/*
 * A vCPU of L1 flushes the TLB of another one, on which L2 runs.  If L2 has a VPID of
 * its own, L1's entries survive while it runs, so KVM has to flush them before L1 runs
 * again.  The test counts flushes, because not every emulator has a TLB with VPIDs.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <asm/kvm_para.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "hyperv.h"
#include "vmx.h"

#define HVCALL_FAST	BIT(16)

/* What guests and host share */
static struct shared {
	uint64_t l2_rounds;	/* L2 increments it while it runs */
	bool leave_l2;
	struct kvm_steal_time steal_time __aligned(64);
} *sh, guest_sh;

static struct kvm_vcpu *vcpus[2];
static struct kvm_vm *vm;
static pthread_t thread;
static bool stopped;

static void guest_l2(void)
{
	/* Bochs does not deliver interrupts to KVM while L2 has disabled them. */
	asm volatile("sti");
	while (!READ_ONCE(guest_sh.leave_l2)) {
		WRITE_ONCE(guest_sh.l2_rounds, guest_sh.l2_rounds + 1);
		cpu_relax();
	}
	vmcall();
}

static void guest_l1(struct vmx_pages *vmx, uint64_t steal_time_gpa)
{
	static uint64_t stack[64];

	if (steal_time_gpa)
		wrmsr(MSR_KVM_STEAL_TIME, steal_time_gpa | KVM_MSR_ENABLED);
	else
		wrmsr(HV_X64_MSR_GUEST_OS_ID, 1);

	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, guest_l2, &stack[ARRAY_SIZE(stack)]);
	vmwrite(SECONDARY_VM_EXEC_CONTROL,
		vmreadz(SECONDARY_VM_EXEC_CONTROL) | SECONDARY_EXEC_ENABLE_VPID);
	vmwrite(CPU_BASED_VM_EXEC_CONTROL,
		vmreadz(CPU_BASED_VM_EXEC_CONTROL) | CPU_BASED_ACTIVATE_SECONDARY_CONTROLS);
	vmwrite(VIRTUAL_PROCESSOR_ID, 1);

	GUEST_ASSERT(!vmlaunch());
	for (;;) {
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
		GUEST_SYNC(0);
		vmwrite(GUEST_RIP, (uint64_t)guest_l2);
		GUEST_ASSERT(!vmresume());
	}
}

/* Flush all of L1's vCPUs. */
static void guest_flusher(void)
{
	uint64_t status;

	wrmsr(HV_X64_MSR_GUEST_OS_ID, 1);
	for (;;) {
		asm volatile("mov %[flags], %%r8\n\t"
			     "vmcall"
			     : "=a" (status)
			     : "c" (HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE | HVCALL_FAST), "d" (0),
			       [flags] "i" (HV_FLUSH_ALL_PROCESSORS |
					    HV_FLUSH_ALL_VIRTUAL_ADDRESS_SPACES)
			     : "r8", "memory");
		GUEST_ASSERT_EQ(status, HV_STATUS_SUCCESS);
		GUEST_SYNC(0);
	}
}

static void on_signal(int sig)
{
}

/* Run L2 until it leaves, or until a signal. */
static void *run_l2(void *arg)
{
	int ret;

	ret = __vcpu_run(vcpus[0]);
	WRITE_ONCE(stopped, ret == -1 && errno == EINTR);
	if (!stopped) {
		TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_RUN, ret));
		vcpu_get_sync(vcpus[0]);
	}
	return NULL;
}

static void wait_l2_runs(void)
{
	uint64_t begin = READ_ONCE(sh->l2_rounds);

	/* The second round began after this. */
	while (READ_ONCE(sh->l2_rounds) < begin + 2)
		sched_yield();
}

static void start_l2(void)
{
	WRITE_ONCE(sh->leave_l2, false);
	pthread_create(&thread, NULL, run_l2, NULL);
	wait_l2_runs();
}

static void stop_l2(void)
{
	pthread_kill(thread, SIGUSR1);
	pthread_join(thread, NULL);
	TEST_ASSERT(stopped, "expected EINTR from KVM_RUN");
}

static void leave_l2(void)
{
	WRITE_ONCE(sh->leave_l2, true);
	pthread_join(thread, NULL);
	TEST_ASSERT(!stopped, "expected a VM-exit of L2, got a signal");
}

static uint64_t nr_flushes(void)
{
	return vcpu_get_stat(vcpus[0], "tlb_flush");
}

static void check_flushes(uint64_t begin, uint64_t expected, const char *where)
{
	uint64_t got = nr_flushes() - begin;

	TEST_ASSERT(got == expected, "%s: expected %lu TLB flushes, got %lu", where, expected,
		    got);
}

static void create_vm(bool hyperv)
{
	vm_vaddr_t vmx;
	uint64_t steal_time_gpa;

	vm = vm_create(2);
	vcpus[0] = vm_vcpu_add(vm, 0, guest_l1);
	vcpus[1] = vm_vcpu_add(vm, 1, guest_flusher);
	if (hyperv) {
		vcpu_set_hv_cpuid(vcpus[0]);
		vcpu_set_hv_cpuid(vcpus[1]);
	}

	vcpu_alloc_vmx(vm, &vmx);
	sync_global_to_guest(vm, guest_sh);
	sh = addr_gva2hva(vm, (vm_vaddr_t)&guest_sh);
	steal_time_gpa = addr_gva2gpa(vm, (vm_vaddr_t)&guest_sh.steal_time);
	vcpu_args_set(vcpus[0], 2, vmx, hyperv ? 0 : steal_time_gpa);
}

/* As a control: neither VM-entry nor VM-exit of L2 flushes the TLB. */
static void check_no_flush(void)
{
	uint64_t begin = nr_flushes();

	start_l2();
	leave_l2();
	check_flushes(begin, 0, "VM-entry and VM-exit");
}

/* The flush that was requested since @begin takes effect when L2 leaves. */
static void check_flush_at_exit(uint64_t begin)
{
	wait_l2_runs();
	check_flushes(begin, 0, "L2 runs");
	leave_l2();
	check_flushes(begin, 1, "VM-exit");
}

TEST(hypercall)
{
	uint64_t begin;

	create_vm(true);
	/* The first VM-entry with a VPID flushes. */
	start_l2();
	leave_l2();
	check_no_flush();

	start_l2();
	begin = nr_flushes();
	vcpu_run_to_sync(vcpus[1]);
	check_flush_at_exit(begin);

	kvm_vm_free(vm);
}

/* The host preempts the vCPU, and another one asks KVM to flush when it runs again. */
TEST(steal_time)
{
	uint64_t begin;

	create_vm(false);

	start_l2();
	leave_l2();
	check_no_flush();

	start_l2();
	stop_l2();
	/* KVM reports the vCPU as preempted only if an interrupt has caused the exit. */
	sh->steal_time.preempted = KVM_VCPU_PREEMPTED | KVM_VCPU_FLUSH_TLB;
	begin = nr_flushes();
	start_l2();
	check_flush_at_exit(begin);

	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	struct sigaction sa = { .sa_handler = on_signal };
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(sched_getcpu(), &cpus);

	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_VMX));
	TEST_REQUIRE(kvm_get_feature_msr(MSR_IA32_VMX_PROCBASED_CTLS2) >> 32 &
		     SECONDARY_EXEC_ENABLE_VPID);

	sigaction(SIGUSR1, &sa, NULL);
	/* KVM also flushes when a vCPU moves to another CPU. */
	TEST_ASSERT(!sched_setaffinity(0, sizeof(cpus), &cpus), "sched_setaffinity(): errno %d",
		    errno);

	return run_cases(argv + 1);
}
