// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hyper-V hypercalls
 */
#define _GNU_SOURCE /* for CPU_SET() */
#include <sched.h>
#include <stdint.h>

#include "kvm_util.h"
#include "processor.h"
#include "hyperv.h"

const uint16_t hyperv_flush_codes[] = {
	HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE,
	HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST,
	HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
	HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX,
};

static cpu_set_t unpinned_cpus;

vm_vaddr_t vcpu_alloc_hyperv_hcall_pages(struct kvm_vm *vm)
{
	vm_vaddr_t gva = vm_vaddr_alloc_page(vm);
	struct hyperv_hcall_pages *pages = addr_gva2hva(vm, gva);

	pages->hcall = vm_vaddr_alloc_page(vm);
	pages->hcall_gpa = addr_gva2gpa(vm, pages->hcall);
	pages->input = (void *)vm_vaddr_alloc_page(vm);
	pages->input_gpa = addr_gva2gpa(vm, (vm_vaddr_t)pages->input);
	return gva;
}

/*
 * Set the arguments of a flush of the vCPUs in @targets.  vCPU i has the VP
 * index @vp_index[i].  Only _EX hypercalls can target VP indices above 63.
 */
void hyperv_set_flush(struct hyperv_tlb_flush *flush, uint16_t code, bool fast,
		      const uint32_t *vp_index, uint32_t targets)
{
	uint64_t banks[HV_MAX_SPARSE_BANKS] = {};
	int i;

	memset(flush, 0, sizeof(*flush));
	flush->code = code;
	flush->fast = fast;
	flush->rep_cnt = hyperv_flush_is_list(code);

	for (i = 0; i < 32; i++) {
		if (targets & BIT(i))
			banks[vp_index[i] / 64] |= BIT_ULL(vp_index[i] % 64);
	}

	if (!hyperv_flush_is_ex(code)) {
		flush->processor_mask = banks[0];
		return;
	}

	for (i = 0; i < HV_MAX_SPARSE_BANKS; i++) {
		if (!banks[i])
			continue;
		flush->valid_bank_mask |= BIT_ULL(i);
		flush->banks[flush->var_cnt++] = banks[i];
	}
}

void pin_to_cpu(void)
{
	int cpu = sched_getcpu();
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	TEST_ASSERT(!sched_getaffinity(0, sizeof(unpinned_cpus), &unpinned_cpus) &&
		    !sched_setaffinity(0, sizeof(cpus), &cpus),
		    "Cannot stay on CPU %d, errno %d", cpu, errno);
}

void unpin_from_cpu(void)
{
	sched_setaffinity(0, sizeof(unpinned_cpus), &unpinned_cpus);
}

void hyperv_enable_hypercalls(const struct hyperv_hcall_pages *pages)
{
	wrmsr(HV_X64_MSR_GUEST_OS_ID, HV_GUEST_OS_ID);
	wrmsr(HV_X64_MSR_HYPERCALL, pages->hcall_gpa | 1);
}

uint64_t hyperv_hypercall(const struct hyperv_hcall_pages *pages,
			  uint64_t control, uint64_t input, uint64_t output,
			  const uint64_t xmm[2 * HV_HYPERCALL_MAX_XMM_REGISTERS])
{
	register uint64_t r8 asm("r8") = output;
	uint64_t ret;

	/*
	 * The compiler does not know that the asm pushes a return address, so
	 * skip the red zone, which it may use.  RAX is not an input of
	 * hypercalls, so it can hold the address of the hypercall page.
	 */
	asm volatile("movdqu 0x00(%[xmm]), %%xmm0\n\t"
		     "movdqu 0x10(%[xmm]), %%xmm1\n\t"
		     "movdqu 0x20(%[xmm]), %%xmm2\n\t"
		     "movdqu 0x30(%[xmm]), %%xmm3\n\t"
		     "movdqu 0x40(%[xmm]), %%xmm4\n\t"
		     "movdqu 0x50(%[xmm]), %%xmm5\n\t"
		     "lea -128(%%rsp), %%rsp\n\t"
		     "call *%[hcall]\n\t"
		     "lea 128(%%rsp), %%rsp\n\t"
		     : "=a" (ret), "+c" (control), "+d" (input), "+r" (r8)
		     : [hcall] "a" (pages->hcall), [xmm] "r" (xmm)
		     : "cc", "memory", "r9", "r10", "r11",
		       "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5");
	return ret;
}

uint64_t hyperv_flush_tlb(const struct hyperv_hcall_pages *pages,
			  const struct hyperv_tlb_flush *flush)
{
	const uint64_t address_space = 0;
	uint64_t xmm[2 * HV_HYPERCALL_MAX_XMM_REGISTERS] = {};
	uint64_t control;
	uint64_t *out;
	int i, max;

	control = flush->code | flush->reserved |
		  (uint64_t)flush->var_cnt << HV_HYPERCALL_VARHEAD_OFFSET |
		  (uint64_t)flush->rep_cnt << HV_HYPERCALL_REP_COMP_OFFSET |
		  (uint64_t)flush->rep_start << HV_HYPERCALL_REP_START_OFFSET;

	/*
	 * Fast input is in registers: the first two words are in RDX and R8,
	 * the others in XMM registers.  For the LIST hypercalls, the list of
	 * addresses is left out, because KVM flushes all addresses.
	 */
	if (flush->fast) {
		control |= HV_HYPERCALL_FAST_BIT;
		out = xmm;
		max = ARRAY_SIZE(xmm);
	} else {
		pages->input[0] = address_space;
		pages->input[1] = flush->flags;
		out = &pages->input[2];
		max = 2 + HV_MAX_SPARSE_BANKS;
	}

	if (hyperv_flush_is_ex(flush->code)) {
		out[0] = flush->format;
		out[1] = flush->valid_bank_mask;
		for (i = 0; i < flush->var_cnt && i + 2 < max; i++)
			out[i + 2] = flush->banks[i];
	} else {
		out[0] = flush->processor_mask;
	}

	return hyperv_hypercall(pages, control,
				flush->fast ? address_space : pages->input_gpa,
				flush->fast ? flush->flags : 0, xmm);
}
