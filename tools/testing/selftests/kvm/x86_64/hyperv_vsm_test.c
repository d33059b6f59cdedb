// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hypercalls of Hyper-V's Virtual Secure Mode (VSM)
 *
 * With KVM_CAP_HYPERV_VSM_HYPERCALLS, userspace handles the hypercalls of VSM.  The
 * first cases test these exits with a vCPU whose registers the host sets:
 *
 * - the exit and its completion, in 64-bit and in compatibility mode, with XMM
 *   registers, and at CPL 3;
 * - a flush that blocks in compatibility mode;
 * - the privilege that each hypercall needs.
 *
 * The other cases emulate VSM, with one VM per virtual trust level (VTL).  Virtual
 * processor (VP) 0 has both levels, VP 1 has VTL0 only.  VTL1 translates addresses of
 * VTL0 and accesses the result, while VP 1 changes the page tables.  These cases test
 *
 * - the results of the translation;
 * - that a flush waits for the end of the use of a translation, or for TlbLocked;
 * - that VTL1 never accesses a page that VTL0 has unmapped and flushed.
 *
 * The test does not sleep.  It waits until statistics and counters change.
 */
#define _GNU_SOURCE /* for program_invocation_name */
#include <pthread.h>
#include <signal.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "hyperv.h"

/* Values below are arbitrarily chosen. */
#define STUB_PORT	0xe
#define STUB_SIZE	2	/* of the instruction OUT */
#define HCALL_SIZE	3	/* of VMCALL and VMMCALL */
#define PARAM0		0x1122334455667788
#define PARAM1		0x99aabbccddeeff00ul
#define RESULT		0xfedcba9876543210	/* of which 0x654 reps are complete */

static const struct {
	uint16_t code;
	uint32_t privilege;
} hcalls[] = {
	{ HVCALL_MODIFY_VTL_PROTECTION_MASK, HV_ACCESS_VSM },
	{ HVCALL_ENABLE_PARTITION_VTL, HV_ACCESS_VSM },
	{ HVCALL_ENABLE_VP_VTL, HV_ACCESS_VSM },
	{ HVCALL_VTL_CALL, HV_ACCESS_VSM },
	{ HVCALL_VTL_RETURN, HV_ACCESS_VSM },
	{ HVCALL_GET_VP_REGISTERS, HV_ACCESS_VP_REGISTERS },
	{ HVCALL_SET_VP_REGISTERS, HV_ACCESS_VP_REGISTERS },
	{ HVCALL_TRANSLATE_VIRTUAL_ADDRESS, 0 },
	{ HVCALL_START_VP, HV_START_VIRTUAL_PROCESSOR },
	{ HVCALL_GET_VP_ID_FROM_APIC_ID, HV_START_VIRTUAL_PROCESSOR },
	{ HVCALL_TRANSLATE_VIRTUAL_ADDRESS_EX, 0 },
};

/* The neighbours of these codes that KVM does not know */
static const uint16_t other_codes[] = {
	0x000e, 0x0010, 0x004f, 0x0053, 0x0098, 0x009b, 0x00ab, 0x00ad,
};

/*
 * A vCPU that calls the hypercall page, which returns to a stub.  The stub exits to
 * userspace.  Both pages, and the stack, are below 4 GiB, for compatibility mode.
 */
struct caller {
	struct kvm_vcpu *vcpu;
	vm_vaddr_t hcall;
	vm_vaddr_t stub;
	struct kvm_regs regs;	/* at the hypercall */
	bool compat;
};

static struct kvm_vm *caller_create(struct caller *c, int nr)
{
	static const uint8_t code[] = { 0xe6, STUB_PORT };	/* out %al, $STUB_PORT */
	struct kvm_vm *vm = vm_create(nr);
	vm_vaddr_t hcall = vm_vaddr_alloc_page(vm), stub = vm_vaddr_alloc_page(vm);
	int i;

	memcpy(addr_gva2hva(vm, stub), code, sizeof(code));
	for (i = 0; i < nr; i++) {
		c[i] = (struct caller) {
			.vcpu = vm_vcpu_add(vm, i, NULL),
			.hcall = hcall,
			.stub = stub,
		};
		vcpu_set_hv_cpuid(c[i].vcpu);
	}
	vcpu_set_msr(c->vcpu, HV_X64_MSR_GUEST_OS_ID, HV_GUEST_OS_ID);
	vcpu_set_msr(c->vcpu, HV_X64_MSR_HYPERCALL, addr_gva2gpa(vm, hcall) | 1);
	return vm;
}

/* Run the vCPU with the arguments of a hypercall, until it exits. */
static void call(struct caller *c, uint64_t input, uint64_t param0, uint64_t param1)
{
	uint64_t *reg, *stack = addr_gva2hva(c->vcpu->vm, c->stub) + PAGE_SIZE / 2;

	stack[0] = c->stub;
	for (reg = (uint64_t *)&c->regs; reg <= (uint64_t *)&c->regs.r15; reg++)
		*reg = 0x10000 + (reg - (uint64_t *)&c->regs);
	if (c->compat) {
		c->regs.rdx = input >> 32;
		c->regs.rax = (uint32_t)input;
		c->regs.rbx = param0 >> 32;
		c->regs.rcx = (uint32_t)param0;
		c->regs.rdi = param1 >> 32;
		c->regs.rsi = (uint32_t)param1;
	} else {
		c->regs.rcx = input;
		c->regs.rdx = param0;
		c->regs.r8 = param1;
	}
	c->regs.rsp = c->stub + PAGE_SIZE / 2;
	c->regs.rip = c->hcall;
	c->regs.rflags = X86_EFLAGS_FIXED;
	vcpu_regs_set(c->vcpu, &c->regs);
	vcpu_run(c->vcpu);
}

static void check_regs(struct caller *c, const char *when)
{
	uint64_t *expected = (uint64_t *)&c->regs;
	struct kvm_regs regs;
	int i;

	vcpu_regs_get(c->vcpu, &regs);
	for (i = 0; i < sizeof(regs) / sizeof(*expected); i++)
		TEST_ASSERT(((uint64_t *)&regs)[i] == expected[i],
			    "%s: word %d of struct kvm_regs is %#lx, expected %#lx",
			    when, i, ((uint64_t *)&regs)[i], expected[i]);
}

static void expect_result(struct caller *c, uint64_t result)
{
	c->regs.rip += HCALL_SIZE;
	c->regs.rax = result;
	if (c->compat) {
		c->regs.rdx = result >> 32;
		c->regs.rax = (uint32_t)result;
	}
}

/* The hypercall returns, and the stub exits. */
static void check_return(struct caller *c)
{
	struct kvm_run *run = c->vcpu->run;

	TEST_ASSERT(run->exit_reason == KVM_EXIT_IO && run->io.port == STUB_PORT,
		    "exit reason %u, expected %u: I/O of the stub", run->exit_reason,
		    KVM_EXIT_IO);
	vcpu_run_complete_io(c->vcpu);
	c->regs.rip = c->stub + STUB_SIZE;
	c->regs.rsp += c->compat ? 4 : 8;
	check_regs(c, "After the return");
}

/* KVM handles the hypercall, whose result is @result. */
static void check_no_exit(struct caller *c, uint64_t input, uint64_t result)
{
	call(c, input, PARAM0, PARAM1);
	expect_result(c, result);
	check_return(c);
}

static void call_exits(struct caller *c, uint64_t input, uint64_t param0, uint64_t param1)
{
	struct kvm_hyperv_exit *hv = &c->vcpu->run->hyperv;

	memset(hv, 0, sizeof(*hv));
	call(c, input, param0, param1);
	TEST_ASSERT(c->vcpu->run->exit_reason == KVM_EXIT_HYPERV &&
		    hv->type == KVM_EXIT_HYPERV_HCALL,
		    "input %#lx: exit reason %u type %u, expected %u and %u", input,
		    c->vcpu->run->exit_reason, hv->type, KVM_EXIT_HYPERV,
		    KVM_EXIT_HYPERV_HCALL);
	TEST_ASSERT(hv->u.hcall.input == input && hv->u.hcall.params[0] == param0 &&
		    hv->u.hcall.params[1] == param1,
		    "input %#llx params %#llx and %#llx, expected %#lx, %#lx and %#lx",
		    hv->u.hcall.input, hv->u.hcall.params[0], hv->u.hcall.params[1],
		    input, param0, param1);
	check_regs(c, "At the exit");
	hv->u.hcall.result = RESULT;
}

static void check_exit(struct caller *c, uint64_t input)
{
	call_exits(c, input, PARAM0, PARAM1);
	vcpu_run(c->vcpu);
	expect_result(c, RESULT);
	check_return(c);

	/* The same if KVM_RUN only completes the hypercall. */
	call_exits(c, input, 0, 0xfff);
	vcpu_run_complete_io(c->vcpu);
	expect_result(c, RESULT);
	check_regs(c, "After the completion");
	vcpu_run(c->vcpu);
	check_return(c);
}

static void check_einval(struct kvm_vm *vm, uint32_t flags, uint64_t arg)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_HYPERV_VSM_HYPERCALLS,
		.flags = flags,
		.args = { arg },
	};
	int r = __vm_ioctl(vm, KVM_ENABLE_CAP, &cap);

	TEST_ASSERT(r == -1 && errno == EINVAL,
		    "flags %#x args[0] %#lx: returned %d errno %d, expected -1 errno %d",
		    flags, arg, r, errno, EINVAL);
}

TEST(exits)
{
	struct caller c;
	struct kvm_vm *vm = caller_create(&c, 1);
	int i, bit, r;

	r = vm_check_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS);
	TEST_ASSERT(r == 1, "KVM_CHECK_EXTENSION returned %d, expected 1", r);
	TEST_ASSERT(!strcmp(exit_reason_str(KVM_EXIT_HYPERV), "HYPERV"),
		    "The name of the exit is %s, expected HYPERV",
		    exit_reason_str(KVM_EXIT_HYPERV));

	for (i = 0; i < ARRAY_SIZE(hcalls); i++)
		check_no_exit(&c, hcalls[i].code, HV_STATUS_INVALID_HYPERCALL_CODE);
	check_einval(vm, 1, 1);
	check_einval(vm, 0, 2);
	check_einval(vm, 0, BIT_ULL(32) | 1);
	check_no_exit(&c, HVCALL_VTL_CALL, HV_STATUS_INVALID_HYPERCALL_CODE);

	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
	for (i = 0; i < ARRAY_SIZE(hcalls); i++) {
		check_exit(&c, hcalls[i].code);
		check_exit(&c, hcalls[i].code | HV_HYPERCALL_FAST_BIT);
		check_exit(&c, hcalls[i].code | 0xabcULL << HV_HYPERCALL_REP_COMP_OFFSET |
			   0x123ULL << HV_HYPERCALL_REP_START_OFFSET |
			   0x3ffULL << HV_HYPERCALL_VARHEAD_OFFSET);
	}
	for (bit = 0; bit < 64; bit++) {
		if (HV_HYPERCALL_RSVD_MASK & BIT_ULL(bit))
			check_no_exit(&c, HVCALL_VTL_CALL | BIT_ULL(bit),
				      HV_STATUS_INVALID_HYPERCALL_INPUT);
	}
	for (i = 0; i < ARRAY_SIZE(other_codes); i++)
		check_no_exit(&c, other_codes[i], HV_STATUS_INVALID_HYPERCALL_CODE);

	check_einval(vm, 1, 0);
	check_einval(vm, 0, 2);
	check_exit(&c, HVCALL_VTL_CALL);

	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 0);
	for (i = 0; i < ARRAY_SIZE(hcalls); i++)
		check_no_exit(&c, hcalls[i].code, HV_STATUS_INVALID_HYPERCALL_CODE);
	kvm_vm_free(vm);
}

static void enter_compat_mode(struct caller *c)
{
	struct kvm_sregs sregs;

	vcpu_sregs_get(c->vcpu, &sregs);
	sregs.cs.l = 0;
	sregs.cs.db = 1;
	sregs.ss = sregs.ds;
	sregs.ss.db = 1;
	vcpu_sregs_set(c->vcpu, &sregs);
	c->compat = true;
}

TEST(compat_mode)
{
	struct caller c;
	struct kvm_vm *vm = caller_create(&c, 1);
	int i;

	enter_compat_mode(&c);
	check_no_exit(&c, HVCALL_VTL_CALL, HV_STATUS_INVALID_HYPERCALL_CODE);
	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
	for (i = 0; i < ARRAY_SIZE(hcalls); i++)
		check_exit(&c, hcalls[i].code | 0xabcULL << HV_HYPERCALL_REP_COMP_OFFSET);
	check_no_exit(&c, HVCALL_VTL_CALL | BIT_ULL(63), HV_STATUS_INVALID_HYPERCALL_INPUT);
	kvm_vm_free(vm);
}

#define NR_FLUSHED	0x123ull

static void *thread_flush_list(void *c)
{
	call(c, HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST | HV_HYPERCALL_FAST_BIT |
		NR_FLUSHED << HV_HYPERCALL_REP_COMP_OFFSET, 0, HV_FLUSH_ALL_PROCESSORS);
	return NULL;
}

/* A flush that blocks in compatibility mode returns its result in EDX and EAX. */
TEST(compat_flush)
{
	struct kvm_hyperv_tlb_flush_inhibit inhibit = { .vp_index = 1, .owners = 1, .mask = 1 };
	struct caller c[2];
	struct kvm_vm *vm = caller_create(c, ARRAY_SIZE(c));
	pthread_t thread;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_TLB_FLUSH_INHIBIT));
	enter_compat_mode(&c[0]);
	vm_ioctl(vm, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &inhibit);
	ASSERT_EQ(vcpu_get_stat(c[0].vcpu, "hv_tlb_flush_blocks"), 0);
	thread = start_thread(thread_flush_list, &c[0]);
	vcpu_wait_stat(c[0].vcpu, "hv_tlb_flush_blocks", 1);
	inhibit.owners = 0;
	vm_ioctl(vm, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &inhibit);
	join_thread(thread, "KVM_RUN of a flush in compatibility mode");
	expect_result(&c[0], NR_FLUSHED << 32);
	check_return(&c[0]);
	kvm_vm_free(vm);
}

/* The entry for @gva at @level: 1 is that of a 4 KiB page, 4 that of the root. */
static uint64_t *pte_hva(struct kvm_vm *vm, uint64_t table, uint64_t gva, int level)
{
	uint64_t *entries = addr_gpa2hva(vm, table & PHYSICAL_PAGE_MASK);

	return &entries[gva >> (PAGE_SHIFT + 9 * (level - 1)) & 0x1ff];
}

/* Let user mode access @gva, too.  Returns its page table entry. */
static uint64_t *allow_user(struct kvm_vm *vm, uint64_t gva)
{
	uint64_t *pte, table = vm->pgd;
	int level;

	for (level = 4; level; level--) {
		pte = pte_hva(vm, table, gva, level);
		*pte |= PTE_USER_MASK;
		table = *pte;
	}
	return pte;
}

static void guest_ud_handler(struct ex_regs *regs)
{
	GUEST_SYNC(regs->rip);
}

TEST(user_mode)
{
	struct caller c;
	struct kvm_vm *vm = caller_create(&c, 1);
	vm_vaddr_t stack = vm_vaddr_alloc_page(vm);
	struct kvm_sregs sregs;
	struct ucall uc;

	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(c.vcpu);
	vm_install_exception_handler(vm, UD_VECTOR, guest_ud_handler);
	/* RSP0 in the TSS */
	*(uint64_t *)(addr_gva2hva(vm, vm->tss) + 4) = stack + PAGE_SIZE;

	allow_user(vm, c.hcall);
	vcpu_sregs_get(c.vcpu, &sregs);
	sregs.cs.selector |= 3;
	sregs.cs.dpl = 3;
	sregs.ss = sregs.ds;
	sregs.ss.selector |= 3;
	sregs.ss.dpl = 3;
	vcpu_sregs_set(c.vcpu, &sregs);

	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
	call(&c, HVCALL_VTL_CALL, PARAM0, PARAM1);
	TEST_ASSERT(get_ucall(c.vcpu, &uc) == UCALL_SYNC && uc.args[1] == c.hcall,
		    "exit reason %u ucall %lu RIP %#lx, expected #UD at %#lx",
		    c.vcpu->run->exit_reason, uc.cmd, uc.args[1], c.hcall);
	kvm_vm_free(vm);
}

#define NR_XMM_WORDS	(2 * HV_HYPERCALL_MAX_XMM_REGISTERS)

static void guest_xmm(vm_vaddr_t hcall, uint64_t input, uint64_t *xmm)
{
	asm volatile(".irp i, 0, 1, 2, 3, 4, 5\n\t"
		     "movdqu 16 * \\i(%[xmm]), %%xmm\\i\n\t"
		     ".endr\n\t"
		     "call *%[hcall]\n\t"
		     ".irp i, 0, 1, 2, 3, 4, 5\n\t"
		     "movdqu %%xmm\\i, 16 * \\i(%[xmm])\n\t"
		     ".endr\n\t"
		     : [hcall] "+a" (hcall), "+c" (input)
		     : [xmm] "r" (xmm)
		     : "cc", "memory", "rdx", "r8", "r9", "r10", "r11",
		       "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5");
	GUEST_SYNC(0);
}

TEST(xmm)
{
	struct caller c;
	struct kvm_vm *vm = caller_create(&c, 1);
	vm_vaddr_t gva = vm_vaddr_alloc_page(vm);
	uint64_t *in_guest = addr_gva2hva(vm, gva), *reg;
	struct kvm_regs regs;
	struct kvm_fpu fpu;
	int i;

	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
	for (i = 0; i < NR_XMM_WORDS; i++)
		in_guest[i] = PARAM0 + i;
	vcpu_args_set(c.vcpu, 3, c.hcall,
		      HVCALL_TRANSLATE_VIRTUAL_ADDRESS_EX | HV_HYPERCALL_FAST_BIT, gva);
	vcpu_regs_get(c.vcpu, &regs);
	regs.rip = (uint64_t)guest_xmm;
	vcpu_regs_set(c.vcpu, &regs);
	vcpu_run(c.vcpu);
	TEST_ASSERT(c.vcpu->run->exit_reason == KVM_EXIT_HYPERV, "exit reason %u, expected %u",
		    c.vcpu->run->exit_reason, KVM_EXIT_HYPERV);

	vcpu_fpu_get(c.vcpu, &fpu);
	for (i = 0; i < NR_XMM_WORDS; i++) {
		reg = (uint64_t *)fpu.xmm[i / 2] + i % 2;
		TEST_ASSERT(*reg == PARAM0 + i, "XMM%d, word %d: %#lx, expected %#lx",
			    i / 2, i % 2, *reg, PARAM0 + i);
		*reg = PARAM1 - i;
	}
	vcpu_fpu_set(c.vcpu, &fpu);

	vcpu_run_to_sync(c.vcpu);
	for (i = 0; i < NR_XMM_WORDS; i++)
		TEST_ASSERT(in_guest[i] == PARAM1 - i,
			    "XMM%d, word %d in the guest: %#lx, expected %#lx",
			    i / 2, i % 2, in_guest[i], PARAM1 - i);
	kvm_vm_free(vm);
}

TEST(privileges)
{
	static const uint32_t granted[] = {
		0, HV_ACCESS_VSM, HV_ACCESS_VP_REGISTERS, HV_START_VIRTUAL_PROCESSOR,
		(uint32_t)~(HV_ACCESS_VSM | HV_ACCESS_VP_REGISTERS | HV_START_VIRTUAL_PROCESSOR),
		-1u,
	};
	struct caller c[ARRAY_SIZE(granted)];
	struct kvm_vm *vm = caller_create(c, ARRAY_SIZE(granted));
	struct kvm_cpuid_entry2 *entry;
	int i, v, enabled;
	uint32_t needed;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_ENFORCE_CPUID));

	for (v = 0; v < ARRAY_SIZE(granted); v++) {
		entry = vcpu_get_cpuid_entry(c[v].vcpu, HYPERV_CPUID_FEATURES);
		entry->ebx = granted[v];
		vcpu_set_cpuid(c[v].vcpu);
		vcpu_enable_cap(c[v].vcpu, KVM_CAP_HYPERV_ENFORCE_CPUID, 1);
	}

	for (enabled = 0; enabled < 2; enabled++) {
		vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, enabled);
		for (v = 0; v < ARRAY_SIZE(granted); v++) {
			for (i = 0; i < ARRAY_SIZE(hcalls); i++) {
				needed = hcalls[i].privilege;
				if (!enabled)
					check_no_exit(&c[v], hcalls[i].code,
						      HV_STATUS_INVALID_HYPERCALL_CODE);
				else if ((granted[v] & needed) == needed)
					check_exit(&c[v], hcalls[i].code);
				else
					check_no_exit(&c[v], hcalls[i].code,
						      HV_STATUS_ACCESS_DENIED);
			}
		}
	}
	kvm_vm_free(vm);
}

/*
 * The emulation of VSM.  VTLs do not share registers here, because the guest does not
 * need it.
 */
#define HV_PARTITION_ID_SELF			(-1ULL)
#define HV_REGISTER_VSM_VP_SECURE_CONFIG_VTL0	0x000d0010
#define HV_VSM_TLB_LOCKED			BIT_ULL(1)

/* Control flags of HvCallTranslateVirtualAddress */
#define READ			BIT_ULL(0)
#define WRITE			BIT_ULL(1)
#define EXECUTE			BIT_ULL(2)
#define EXEMPT			BIT_ULL(3)	/* from user and supervisor mode */
#define SET_BITS		BIT_ULL(4)
#define INHIBIT			BIT_ULL(5)
#define INPUT_VTL0		(0x10ULL << 56)

/* Its result codes */
#define SUCCESS			0
#define NOT_PRESENT		1
#define VIOLATION		2
#define UNMAPPED		4

#define CACHE_WRITE_BACK	6

/* One rep in the input, and one rep completed in the result of a hypercall */
#define ONE_REP			BIT_ULL(HV_HYPERCALL_REP_COMP_OFFSET)

struct hv_translate_input {
	uint64_t partition_id;
	uint32_t vp_index;
	uint32_t padding;
	uint64_t flags;
	uint64_t gva_page;
};

struct hv_translate_output {
	uint32_t result;
	uint8_t cache_type;
	uint8_t reserved[3];
	uint64_t gpa_page;
};

struct hv_set_vp_register_input {
	uint64_t partition_id;
	uint32_t vp_index;
	uint8_t target_vtl;
	uint8_t padding[3];
	uint32_t name;
	uint32_t reserved[3];
	uint64_t value[2];
};

/* Owners of the TlbFlushInhibit of VP 0 */
#define OWNER_TRANSLATION	BIT(0)
#define OWNER_TLB_LOCKED	BIT(1)

/* Values below are arbitrarily chosen. */
#define VTL1_GPA		0x40000000
#define VTL1_NR_PAGES		1024
#define VTL0_SLOT		1	/* of VTL0's memory in the VM of VTL1 */
#define VTL0_MAP		0x1000000000	/* its address in VTL1 */
#define VTL_RESULT		0x7e57
#define VALID			0x600d
#define POISON			0xdead
#define WRITTEN			0x1111
#define NR_PAGES		4
#define MIN_ROUNDS		50
#define MAX_ROUNDS		1000
#define ROUNDS_NS		(10 * NSEC_PER_SEC)	/* start no more rounds after this time */
#define MAX_DELAY_NS		500000

/* The start of a page that VTL1 accesses */
struct page {
	uint64_t tag;
	uint64_t value;
};

/* Memory of VTL0 */
struct vtl0 {
	struct hyperv_hcall_pages *pages;
	struct hyperv_tlb_flush flush;
	struct page *target;	/* VTL1 translates this address. */
	uint64_t *pte;		/* Its page table entry takes these values in turn. */
	uint64_t ptes[NR_PAGES];
	struct page *aliases[NR_PAGES];	/* Other addresses of the same pages */
	uint64_t switches;
	uint64_t overwritten;
	bool loop;
};

enum vtl1_command {
	VTL1_TRANSLATE,
	VTL1_ACCESS,
	VTL1_LOCK,
	VTL1_UNLOCK,
	VTL1_RETURN,
};

/* Memory of VTL1 */
struct vtl1 {
	struct hyperv_hcall_pages *pages;
	enum vtl1_command command;
	uint64_t gva;
	uint64_t flags;
	struct hv_translate_output translation;
	uint64_t tag;
};

static uint64_t guest_hypercall(const struct hyperv_hcall_pages *pages, uint64_t control,
				uint64_t input, uint64_t output)
{
	uint64_t xmm[2 * HV_HYPERCALL_MAX_XMM_REGISTERS] = {};

	return hyperv_hypercall(pages, control, input, output, xmm);
}

static void guest_vp0_vtl0(struct vtl0 *s)
{
	uint64_t rax, tag;

	hyperv_enable_hypercalls(s->pages);

	for (;;) {
		GUEST_SYNC(0);
		rax = guest_hypercall(s->pages, HVCALL_VTL_CALL, 0, 0);
		GUEST_ASSERT_1(rax == VTL_RESULT, rax);
		tag = READ_ONCE(s->target->tag);
		GUEST_ASSERT_1(tag == VALID, tag);
	}
}

/*
 * Map the next page at the target, flush, and poison the page that was mapped before.  It
 * stays poisoned until all other pages have been mapped.
 */
static void guest_vp1(struct vtl0 *s)
{
	struct page *new, *old;
	uint64_t i, status, pte;

	for (i = 1; ; i++) {
		if (!READ_ONCE(s->loop))
			GUEST_SYNC(i);

		new = s->aliases[i % NR_PAGES];
		old = s->aliases[(i - 1) % NR_PAGES];
		if (READ_ONCE(new->value) != POISON)
			WRITE_ONCE(s->overwritten, s->overwritten + 1);
		WRITE_ONCE(new->value, 0);
		WRITE_ONCE(new->tag, VALID);
		WRITE_ONCE(*s->pte, s->ptes[i % NR_PAGES]);

		status = hyperv_flush_tlb(s->pages, &s->flush);
		GUEST_ASSERT_1(status == HV_STATUS_SUCCESS, status);
		pte = READ_ONCE(*s->pte);
		GUEST_ASSERT_2(PTE_GET_PFN(pte) == PTE_GET_PFN(s->ptes[i % NR_PAGES]),
			       pte, s->ptes[i % NR_PAGES]);

		WRITE_ONCE(old->tag, POISON);
		WRITE_ONCE(old->value, POISON);
		WRITE_ONCE(s->switches, i);
	}
}

static void guest_translate(struct vtl1 *s)
{
	struct hv_translate_input *input = (void *)s->pages->input;
	struct hv_translate_output *output = (void *)input + PAGE_SIZE / 2;
	uint64_t status;

	*input = (struct hv_translate_input) {
		.partition_id = HV_PARTITION_ID_SELF,
		.flags = s->flags | INPUT_VTL0,
		.gva_page = s->gva >> PAGE_SHIFT,
	};
	status = guest_hypercall(s->pages, HVCALL_TRANSLATE_VIRTUAL_ADDRESS,
				 s->pages->input_gpa, s->pages->input_gpa + PAGE_SIZE / 2);
	GUEST_ASSERT_1(status == HV_STATUS_SUCCESS, status);
	s->translation = *output;
}

static void guest_access(struct vtl1 *s)
{
	struct page *page = (void *)VTL0_MAP + (s->translation.gpa_page << PAGE_SHIFT);

	s->tag = READ_ONCE(page->tag);
	WRITE_ONCE(page->value, WRITTEN);
}

static void guest_set_tlb_locked(struct vtl1 *s, bool locked)
{
	struct hv_set_vp_register_input *input = (void *)s->pages->input;
	uint64_t status;

	*input = (struct hv_set_vp_register_input) {
		.partition_id = HV_PARTITION_ID_SELF,
		.name = HV_REGISTER_VSM_VP_SECURE_CONFIG_VTL0,
		.value[0] = locked ? HV_VSM_TLB_LOCKED : 0,
	};
	status = guest_hypercall(s->pages, HVCALL_SET_VP_REGISTERS | ONE_REP,
				 s->pages->input_gpa, 0);
	GUEST_ASSERT_1(status == ONE_REP, status);
}

static void guest_vp0_vtl1(struct vtl1 *s)
{
	uint64_t rax;

	hyperv_enable_hypercalls(s->pages);

	for (;;) {
		GUEST_SYNC(0);
		switch (READ_ONCE(s->command)) {
		case VTL1_TRANSLATE:
			guest_translate(s);
			break;
		case VTL1_ACCESS:
			guest_access(s);
			break;
		case VTL1_LOCK:
			guest_set_tlb_locked(s, true);
			break;
		case VTL1_UNLOCK:
			guest_set_tlb_locked(s, false);
			break;
		case VTL1_RETURN:
			rax = guest_hypercall(s->pages, HVCALL_VTL_RETURN, 0, 0);
			GUEST_ASSERT_1(rax == VTL_RESULT, rax);
			break;
		}
	}
}

struct vsm {
	struct kvm_vm *vm[2];		/* by VTL */
	struct kvm_vcpu *vp0[2];
	struct kvm_vcpu *vp1;
	int vtl;			/* of VP 0 */
	struct kvm_sregs sregs;		/* of VP 0 in VTL0, when it has left VTL0 */
	uint32_t owners;		/* of VP 0 */
	bool unprotected;		/* Translate without TlbFlushInhibit, as a control. */
	struct vtl0 *vtl0;
	struct vtl1 *vtl1;

	/* The thread that runs VP 1, and statistics at its start */
	pthread_t thread;
	uint64_t blocks;
	uint64_t hypercalls;
	int ret;
	int err;
};

static void set_owner(struct vsm *v, uint32_t owner, bool add)
{
	struct kvm_hyperv_tlb_flush_inhibit inhibit = {
		.vp_index = 0,
		.owners = add ? owner : 0,
		.mask = owner,
	};

	vm_ioctl(v->vm[0], KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &inhibit);
	v->owners = add ? v->owners | owner : v->owners & ~owner;
}

static void check_owners(struct vsm *v, uint32_t expected)
{
	struct kvm_hyperv_tlb_flush_inhibit inhibit = { .vp_index = 0 };

	vm_ioctl(v->vm[0], KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &inhibit);
	TEST_ASSERT(inhibit.owners == expected, "VP 0 has the owners %#x, expected %#x",
		    inhibit.owners, expected);
}

/*
 * Walk the page tables of VP 0 in VTL0.  Walk again if VTL0 changes an entry that was read
 * before its bits are set.  CR0.WP is set, CR4.SMEP and CR4.SMAP are not.
 */
static uint32_t walk(struct vsm *v, uint64_t gva, uint64_t flags, uint64_t *gpa_page)
{
	struct kvm_userspace_memory_region *memory = &memslot2region(v->vm[0], 0)->region;
	bool write = flags & WRITE;
	uint64_t table, bits, *ptes[5], values[5];
	uint64_t all, any;
	int level;

again:
	all = -1ull;
	any = 0;
	table = v->sregs.cr3;
	for (level = 4; level; level--) {
		ptes[level] = pte_hva(v->vm[0], table, gva, level);
		values[level] = READ_ONCE(*ptes[level]);
		if (!(values[level] & PTE_PRESENT_MASK))
			return NOT_PRESENT;
		all &= values[level];
		any |= values[level];
		table = values[level] & PHYSICAL_PAGE_MASK;
		if (table >= memory->memory_size)
			return UNMAPPED;
	}

	if ((write && !(all & PTE_WRITABLE_MASK)) ||
	    (flags & EXECUTE && any & PTE_NX_MASK) ||
	    (!(flags & EXEMPT) && v->sregs.ss.dpl == 3 && !(all & PTE_USER_MASK)))
		return VIOLATION;

	for (level = 4; level && flags & SET_BITS; level--) {
		bits = PTE_ACCESSED_MASK;
		if (level == 1 && write)
			bits |= PTE_DIRTY_MASK;
		if (!__sync_bool_compare_and_swap(ptes[level], values[level],
						  values[level] | bits))
			goto again;
	}

	*gpa_page = table >> PAGE_SHIFT;
	return SUCCESS;
}

static void vmm_translate(struct vsm *v, const struct hv_translate_input *input,
			  struct hv_translate_output *output)
{
	bool add = input->flags & INHIBIT && !(v->owners & OWNER_TRANSLATION) &&
		   !v->unprotected;

	TEST_ASSERT(!input->vp_index && input->flags >> 56 == INPUT_VTL0 >> 56,
		    "VP %u flags %#lx, expected VP 0 and VTL0", input->vp_index, input->flags);

	/* Before the walk, so that a flush of what it reads waits. */
	if (add)
		set_owner(v, OWNER_TRANSLATION, true);

	memset(output, 0, sizeof(*output));
	output->cache_type = CACHE_WRITE_BACK;
	output->result = walk(v, input->gva_page << PAGE_SHIFT, input->flags, &output->gpa_page);
	if (add && output->result)
		set_owner(v, OWNER_TRANSLATION, false);
}

static void vmm_set_vp_register(struct vsm *v, const struct hv_set_vp_register_input *input)
{
	TEST_ASSERT(!input->vp_index && input->name == HV_REGISTER_VSM_VP_SECURE_CONFIG_VTL0,
		    "VP %u register %#x, expected VP 0 register %#x", input->vp_index,
		    input->name, HV_REGISTER_VSM_VP_SECURE_CONFIG_VTL0);
	set_owner(v, OWNER_TLB_LOCKED, input->value[0] & HV_VSM_TLB_LOCKED);
}

/*
 * Complete the hypercall with which VP 0 leaves its VTL.  RAX is that of the return to this
 * VTL.
 */
static void vmm_leave_vtl(struct vsm *v)
{
	struct kvm_vcpu *vcpu = v->vp0[v->vtl];
	struct kvm_regs regs;

	vcpu_run_complete_io(vcpu);
	vcpu_regs_get(vcpu, &regs);
	regs.rax = VTL_RESULT;
	vcpu_regs_set(vcpu, &regs);
	v->vtl = !v->vtl;
}

static void vmm_hypercall(struct vsm *v, struct kvm_hyperv_exit *hv)
{
	struct kvm_vm *vm = v->vm[v->vtl];
	uint16_t code = hv->u.hcall.input;
	void *input, *output;

	TEST_ASSERT((code == HVCALL_VTL_CALL) == !v->vtl,
		    "Unexpected hypercall %#x from VTL%d", code, v->vtl);
	switch (code) {
	case HVCALL_VTL_CALL:
		vcpu_sregs_get(v->vp0[0], &v->sregs);
		vmm_leave_vtl(v);
		break;
	case HVCALL_VTL_RETURN:
		set_owner(v, OWNER_TRANSLATION, false);
		vmm_leave_vtl(v);
		break;
	case HVCALL_TRANSLATE_VIRTUAL_ADDRESS:
		input = addr_gpa2hva(vm, hv->u.hcall.params[0]);
		output = addr_gpa2hva(vm, hv->u.hcall.params[1]);
		vmm_translate(v, input, output);
		hv->u.hcall.result = HV_STATUS_SUCCESS;
		break;
	case HVCALL_SET_VP_REGISTERS:
		vmm_set_vp_register(v, addr_gpa2hva(vm, hv->u.hcall.params[0]));
		hv->u.hcall.result = ONE_REP;
		break;
	default:
		TEST_FAIL("Unexpected hypercall %#x", code);
	}
}

/* Run VP 0 until its next GUEST_SYNC(), which must be in @vtl. */
static void run_vp0(struct vsm *v, int vtl)
{
	struct kvm_vcpu *vcpu;

	for (;;) {
		vcpu = v->vp0[v->vtl];
		vcpu_run(vcpu);
		if (vcpu->run->exit_reason != KVM_EXIT_HYPERV)
			break;
		vmm_hypercall(v, &vcpu->run->hyperv);
	}
	vcpu_get_sync(vcpu);
	TEST_ASSERT(v->vtl == vtl, "VP 0 is in VTL%d, expected VTL%d", v->vtl, vtl);
}

static void enter_vtl1(struct vsm *v)
{
	run_vp0(v, 1);
}

static void do_in_vtl1(struct vsm *v, enum vtl1_command command)
{
	v->vtl1->command = command;
	run_vp0(v, command != VTL1_RETURN);
}

static void *vp1_thread(void *arg)
{
	struct vsm *v = arg;

	v->ret = __vcpu_run(v->vp1);
	v->err = errno;
	if (!v->ret)
		vcpu_get_sync(v->vp1);
	return NULL;
}

static void start_vp1(struct vsm *v)
{
	v->blocks = vcpu_get_stat(v->vp1, "hv_tlb_flush_blocks");
	v->hypercalls = vcpu_get_stat(v->vp1, "hypercalls");
	v->thread = start_thread(vp1_thread, v);
}

static void start_blocked_vp1(struct vsm *v)
{
	start_vp1(v);
	vcpu_wait_stat(v->vp1, "hv_tlb_flush_blocks", v->blocks + 1);
}

/* The flush hypercall of VP 1 has not completed. */
static void check_vp1_blocked(struct vsm *v)
{
	uint64_t hypercalls = vcpu_get_stat(v->vp1, "hypercalls");

	TEST_ASSERT(hypercalls == v->hypercalls, "VP 1 has completed %lu hypercalls, expected %lu",
		    hypercalls, v->hypercalls);
}

/*
 * If the flush did not have to wait any more, it would complete in spite of the signal.
 * VP 1 makes it again when it runs next.
 */
static void stop_blocked_vp1(struct vsm *v)
{
	pthread_kill(v->thread, SIGUSR1);
	join_thread(v->thread, "VP 1");
	TEST_ASSERT(v->ret == -1 && v->err == EINTR,
		    "VP 1: KVM_RUN returned %d errno %d, expected -1 errno %d", v->ret, v->err,
		    EINTR);
	check_vp1_blocked(v);
}

static void finish_vp1(struct vsm *v)
{
	join_thread(v->thread, "VP 1");
	TEST_ASSERT(!v->ret, "VP 1: KVM_RUN returned %d errno %d, expected 0", v->ret, v->err);
}

static struct kvm_vcpu *add_vcpu(struct kvm_vm *vm, int i, void *guest_code, vm_vaddr_t arg)
{
	struct kvm_vcpu *vcpu = vm_vcpu_add(vm, i, guest_code);

	vcpu_set_hv_cpuid(vcpu);
	vcpu_args_set(vcpu, 1, arg);
	return vcpu;
}

static void vtl0_create(struct vsm *v)
{
	struct kvm_vm *vm = vm_create(2);
	vm_vaddr_t gva = vm_vaddr_alloc_page(vm);
	struct vtl0 *s = addr_gva2hva(vm, gva);
	struct kvm_sregs sregs;
	struct page *page;
	int i;

	v->vm[0] = vm;
	v->vtl0 = s;
	v->vp0[0] = add_vcpu(vm, 0, guest_vp0_vtl0, gva);
	v->vp1 = add_vcpu(vm, 1, guest_vp1, gva);
	vcpu_sregs_get(v->vp0[0], &sregs);
	sregs.cr0 |= BIT(16);	/* WP */
	vcpu_sregs_set(v->vp0[0], &sregs);

	s->pages = (void *)vcpu_alloc_hyperv_hcall_pages(vm);
	hyperv_set_flush(&s->flush, HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, true, NULL, 0);
	s->flush.flags = HV_FLUSH_ALL_PROCESSORS | HV_FLUSH_ALL_VIRTUAL_ADDRESS_SPACES;

	s->target = (void *)vm_vaddr_alloc_page(vm);
	s->pte = (void *)vm_map_page_table_entry(vm, v->vp1, (vm_vaddr_t)s->target);
	for (i = 0; i < NR_PAGES; i++) {
		s->aliases[i] = (void *)vm_vaddr_alloc_page(vm);
		s->ptes[i] = vm_get_page_table_entry(vm, v->vp1, (vm_vaddr_t)s->aliases[i]);
		page = addr_gva2hva(vm, (vm_vaddr_t)s->aliases[i]);
		page->tag = i ? POISON : VALID;
		page->value = i ? POISON : 0;
	}
	vm_set_page_table_entry(vm, v->vp1, (vm_vaddr_t)s->target, s->ptes[0]);
	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
}

static void vtl1_create(struct vsm *v)
{
	struct kvm_userspace_memory_region *memory = &memslot2region(v->vm[0], 0)->region;
	struct kvm_vm *vm = ____vm_create(VM_MODE_DEFAULT, 0);
	vm_vaddr_t gva;

	/* Memory that VTL0 does not have, and that of VTL0 */
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, VTL1_GPA, 0, VTL1_NR_PAGES, 0);
	vm_set_user_memory_region(vm, VTL0_SLOT, 0, 0, memory->memory_size,
				  (void *)memory->userspace_addr);
	kvm_vm_elf_load(vm, program_invocation_name);
	virt_map(vm, VTL0_MAP, 0, memory->memory_size >> PAGE_SHIFT);

	gva = vm_vaddr_alloc_page(vm);
	v->vm[1] = vm;
	v->vtl1 = addr_gva2hva(vm, gva);
	v->vtl1->pages = (void *)vcpu_alloc_hyperv_hcall_pages(vm);
	v->vp0[1] = add_vcpu(vm, 0, guest_vp0_vtl1, gva);
	vm_enable_cap(vm, KVM_CAP_HYPERV_VSM_HYPERCALLS, 1);
}

static void vsm_create(struct vsm *v)
{
	memset(v, 0, sizeof(*v));
	vtl0_create(v);
	vtl1_create(v);

	/* By a call that adds no owner, before the guest runs */
	set_owner(v, -1u, false);

	v->vtl1->gva = (vm_vaddr_t)v->vtl0->target;
	v->vtl1->flags = WRITE | SET_BITS | INHIBIT;
	vcpu_run_to_sync(v->vp0[0]);
	vcpu_run_to_sync(v->vp0[1]);
	vcpu_run_to_sync(v->vp1);
}

static void vsm_free(struct vsm *v)
{
	kvm_vm_free(v->vm[1]);
	kvm_vm_free(v->vm[0]);
}

/* Page 0 is mapped at first.  VP 1 maps page 1 next. */
static void check_page(struct vsm *v, int i, uint64_t tag, uint64_t value)
{
	struct page *page = addr_gva2hva(v->vm[0], (vm_vaddr_t)v->vtl0->aliases[i]);

	TEST_ASSERT(page->tag == tag && page->value == value,
		    "page %d: tag %#lx value %#lx, expected %#lx and %#lx", i, page->tag,
		    page->value, tag, value);
}

static void check_translation(struct vsm *v, const char *what, uint32_t result, uint64_t gpa)
{
	struct hv_translate_output *t = &v->vtl1->translation;

	TEST_ASSERT(t->result == result && t->gpa_page == gpa >> PAGE_SHIFT,
		    "%s: result %u page %#lx, expected %u and %#lx", what, t->result,
		    t->gpa_page, result, gpa >> PAGE_SHIFT);
}

TEST(translate)
{
	static const struct {
		const char *what;
		uint64_t changes;	/* of the page table entry */
		uint64_t flags;
		int cpl;		/* of VTL0 */
		uint32_t result;
		uint64_t bits;		/* that the translation sets in the entry */
	} cases[] = {
		{ "read", 0, READ | SET_BITS, 0, SUCCESS, PTE_ACCESSED_MASK },
		{ "write", 0, WRITE | SET_BITS, 0, SUCCESS, PTE_ACCESSED_MASK | PTE_DIRTY_MASK },
		{ "write, no bits", 0, WRITE, 0, SUCCESS, 0 },
		{ "execute", 0, EXECUTE | SET_BITS, 0, SUCCESS, PTE_ACCESSED_MASK },
		{ "not present", PTE_PRESENT_MASK, READ | SET_BITS, 0, NOT_PRESENT, 0 },
		{ "read-only, read", PTE_WRITABLE_MASK, READ, 0, SUCCESS, 0 },
		{ "read-only, write", PTE_WRITABLE_MASK, WRITE | SET_BITS, 0, VIOLATION, 0 },
		{ "NX, read", PTE_NX_MASK, READ, 0, SUCCESS, 0 },
		{ "NX, execute", PTE_NX_MASK, EXECUTE | SET_BITS, 0, VIOLATION, 0 },
		{ "supervisor page at CPL 3", 0, READ | SET_BITS, 3, VIOLATION, 0 },
		{ "supervisor page at CPL 3, exempt", 0, READ | EXEMPT, 3, SUCCESS, 0 },
		{ "user page at CPL 3", PTE_USER_MASK, READ, 3, SUCCESS, 0 },
		{ "user page at CPL 0", PTE_USER_MASK, READ, 0, SUCCESS, 0 },
		{ "page outside of memory", BIT_ULL(35), READ | SET_BITS, 0, UNMAPPED, 0 },
	};
	uint64_t *pte, expected, gpa;
	uint32_t result;
	struct vsm v;
	int i;

	vsm_create(&v);
	/* For the levels above the page table entry, which the cases change */
	pte = allow_user(v.vm[0], v.vtl1->gva);

	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		result = cases[i].result;
		enter_vtl1(&v);
		/* As if VTL0 had been intercepted */
		v.sregs.ss.dpl = cases[i].cpl;
		*pte = v.vtl0->ptes[0] ^ cases[i].changes;
		expected = *pte | cases[i].bits;

		v.vtl1->flags = cases[i].flags | INHIBIT;
		do_in_vtl1(&v, VTL1_TRANSLATE);
		gpa = result == SUCCESS ? expected & PHYSICAL_PAGE_MASK : 0;
		check_translation(&v, cases[i].what, result, gpa);
		TEST_ASSERT(*pte == expected, "%s: page table entry %#lx, expected %#lx",
			    cases[i].what, *pte, expected);
		check_owners(&v, result ? 0 : OWNER_TRANSLATION);

		*pte = v.vtl0->ptes[0];
		do_in_vtl1(&v, VTL1_RETURN);
		check_owners(&v, 0);
	}

	/* A translation without the flag adds no owner. */
	enter_vtl1(&v);
	v.vtl1->flags = READ;
	do_in_vtl1(&v, VTL1_TRANSLATE);
	check_translation(&v, "no flag", SUCCESS, *pte & PHYSICAL_PAGE_MASK);
	check_owners(&v, 0);
	vsm_free(&v);
}

/* A flush waits while VTL1 uses a translation, until VTL1 returns. */
TEST(tlb_flush_inhibit)
{
	struct vsm v;

	vsm_create(&v);
	enter_vtl1(&v);
	do_in_vtl1(&v, VTL1_TRANSLATE);
	check_translation(&v, "page 0", SUCCESS, v.vtl0->ptes[0] & PHYSICAL_PAGE_MASK);
	check_owners(&v, OWNER_TRANSLATION);

	start_blocked_vp1(&v);
	do_in_vtl1(&v, VTL1_ACCESS);
	TEST_ASSERT(v.vtl1->tag == VALID, "tag %#lx, expected %#x", v.vtl1->tag, VALID);
	check_page(&v, 0, VALID, WRITTEN);

	/* The entry has changed already, so this is the other page. */
	do_in_vtl1(&v, VTL1_TRANSLATE);
	check_translation(&v, "page 1", SUCCESS, v.vtl0->ptes[1] & PHYSICAL_PAGE_MASK);
	check_vp1_blocked(&v);

	do_in_vtl1(&v, VTL1_RETURN);
	finish_vp1(&v);
	check_owners(&v, 0);
	check_page(&v, 0, POISON, POISON);
	vsm_free(&v);
}

/* TlbLocked stays set in VTL0, until VTL1 clears it. */
TEST(tlb_locked)
{
	struct vsm v;

	vsm_create(&v);
	enter_vtl1(&v);
	do_in_vtl1(&v, VTL1_LOCK);
	do_in_vtl1(&v, VTL1_TRANSLATE);
	check_owners(&v, OWNER_TRANSLATION | OWNER_TLB_LOCKED);
	start_blocked_vp1(&v);

	do_in_vtl1(&v, VTL1_RETURN);
	check_owners(&v, OWNER_TLB_LOCKED);
	check_vp1_blocked(&v);
	stop_blocked_vp1(&v);
	start_blocked_vp1(&v);
	check_page(&v, 0, VALID, 0);

	enter_vtl1(&v);
	check_vp1_blocked(&v);
	do_in_vtl1(&v, VTL1_UNLOCK);
	finish_vp1(&v);
	check_owners(&v, 0);
	check_page(&v, 0, POISON, POISON);
	do_in_vtl1(&v, VTL1_RETURN);
	vsm_free(&v);
}

/*
 * Let VTL1 translate the target at any point of a switch, and access the result.
 * Before the access, wait until VP 1 is blocked, or for two switches if it does not block:
 * the first one may have been in progress.  Returns true if the page was poisoned.
 */
static bool access_is_poisoned(struct vsm *v)
{
	uint64_t blocks, switches, begin = now_ns(), delay = random() % MAX_DELAY_NS;

	while (now_ns() - begin < delay)
		cpu_relax();

	enter_vtl1(v);
	blocks = vcpu_get_stat(v->vp1, "hv_tlb_flush_blocks");
	do_in_vtl1(v, VTL1_TRANSLATE);
	switches = READ_ONCE(v->vtl0->switches);
	if (v->unprotected)
		wait_for(READ_ONCE(v->vtl0->switches) >= switches + 2);
	else
		vcpu_wait_stat(v->vp1, "hv_tlb_flush_blocks", blocks + 1);
	do_in_vtl1(v, VTL1_ACCESS);
	do_in_vtl1(v, VTL1_RETURN);
	return v->vtl1->tag != VALID;
}

static uint64_t stop_switches(struct vsm *v)
{
	WRITE_ONCE(v->vtl0->loop, false);
	finish_vp1(v);
	return READ_ONCE(v->vtl0->overwritten);
}

TEST(race)
{
	uint64_t poisoned = 0, overwritten, switches, begin = now_ns();
	struct vsm v;
	int i;

	vsm_create(&v);
	v.vtl0->loop = true;
	start_vp1(&v);
	for (i = 0; i < MIN_ROUNDS || (i < MAX_ROUNDS && now_ns() - begin < ROUNDS_NS); i++)
		poisoned += access_is_poisoned(&v);
	overwritten = stop_switches(&v);
	pr_info("%d translations, %lu switches of the page, %lu times blocked\n", i,
		v.vtl0->switches, vcpu_get_stat(v.vp1, "hv_tlb_flush_blocks") - v.blocks);
	TEST_ASSERT(!poisoned && !overwritten,
		    "%lu poisoned pages read, %lu overwritten, expected none",
		    poisoned, overwritten);

	/* As a control, without TlbFlushInhibit */
	v.unprotected = true;
	v.vtl0->loop = true;
	start_vp1(&v);
	for (i = 0; i < MAX_ROUNDS && !poisoned; i++)
		poisoned += access_is_poisoned(&v);
	/* VP 1 looks at the page when it maps it next. */
	switches = READ_ONCE(v.vtl0->switches);
	wait_for(READ_ONCE(v.vtl0->switches) >= switches + NR_PAGES + 1);
	overwritten = stop_switches(&v);
	TEST_ASSERT(poisoned && overwritten,
		    "%lu poisoned pages read, %lu overwritten in %d rounds without TlbFlushInhibit, expected some",
		    poisoned, overwritten, i);
	pr_info("Without TlbFlushInhibit, translation %d found a poisoned page\n", i);
	vsm_free(&v);
}

static void no_op(int sig)
{
}

int main(int argc, char *argv[])
{
	struct sigaction action = { .sa_handler = no_op };

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_VSM_HYPERCALLS));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_TLB_FLUSH_INHIBIT));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	sigaction(SIGUSR1, &action, NULL);

	return run_cases(argv + 1);
}
