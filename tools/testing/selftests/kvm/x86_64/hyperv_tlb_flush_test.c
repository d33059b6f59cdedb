// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hyper-V TLB flush hypercalls
 *
 * - Each of the four hypercalls flushes exactly the vCPUs that it targets, as
 *   the tlb_flush statistics show.  This is checked with slow and fast (XMM)
 *   input, for all sets of vCPUs, with VP indices that equal the vCPU indices
 *   and with VP indices in several sparse banks, and for all ways to target all
 *   VPs or none.
 * - Malformed hypercalls return an error and flush no vCPU.
 * - A running vCPU does not use a stale translation after the hypercall.
 *
 * With -b, the test only prints the time that each hypercall takes.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <getopt.h>
#include <pthread.h>

#include "kvm_util.h"
#include "processor.h"
#include "hyperv.h"

#define NR_VCPUS	4
#define ALL_VCPUS	GENMASK(NR_VCPUS - 1, 0)

/* Arbitrarily chosen, outside of memslot 0. */
#define EDGE_GPA	0x40000000
#define EDGE_SLOT	1

/* VP indices of the vCPUs: equal to the vCPU indices, and in several banks */
static const uint32_t vp_maps[][NR_VCPUS] = {
	{ 0, 1, 2, 3 },
	{ 2, 65, 1023, 0 },
};

static void guest_flusher(struct hyperv_hcall_pages *pages,
			  struct hyperv_tlb_flush *flush)
{
	hyperv_enable_hypercalls(pages);
	GUEST_SYNC(0);

	for (;;)
		GUEST_SYNC(hyperv_flush_tlb(pages, flush));
}

static void guest_target(void)
{
	for (;;)
		GUEST_SYNC(0);
}

/* vCPU 0 makes the hypercalls.  A target is flushed when KVM next runs it. */
struct flush_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct hyperv_hcall_pages *pages;
	struct hyperv_tlb_flush *flush;
	const uint32_t *vp_index;
};

static void flush_vm_create(struct flush_vm *f, const uint32_t *vp_index)
{
	vm_vaddr_t pages_gva, flush_gva;
	int i;

	f->vm = vm_create(NR_VCPUS);
	f->vp_index = vp_index;

	for (i = 0; i < NR_VCPUS; i++) {
		f->vcpus[i] = vm_vcpu_add(f->vm, i, i ? (void *)guest_target :
						     (void *)guest_flusher);
		vcpu_set_hv_cpuid(f->vcpus[i]);
		vcpu_set_msr(f->vcpus[i], HV_X64_MSR_VP_INDEX, vp_index[i]);
	}

	pages_gva = vcpu_alloc_hyperv_hcall_pages(f->vm);
	f->pages = addr_gva2hva(f->vm, pages_gva);
	flush_gva = vm_vaddr_alloc_page(f->vm);
	f->flush = addr_gva2hva(f->vm, flush_gva);
	vcpu_args_set(f->vcpus[0], 2, pages_gva, flush_gva);

	for (i = 0; i < NR_VCPUS; i++)
		vcpu_run_to_sync(f->vcpus[i]);
}

static void set_flush(struct flush_vm *f, uint16_t code, bool fast, uint32_t targets)
{
	hyperv_set_flush(f->flush, code, fast, f->vp_index, targets);
}

static void check_flush(struct flush_vm *f, uint64_t status, uint32_t flushed)
{
	uint64_t before[NR_VCPUS], after, result;
	uint32_t got = 0;
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		before[i] = vcpu_get_stat(f->vcpus[i], "tlb_flush");

	result = vcpu_run_to_sync(f->vcpus[0]);
	TEST_ASSERT(result == status,
		    "Hypercall %#x, fast %d: result %#lx, expected %#lx",
		    f->flush->code, f->flush->fast, result, status);

	for (i = 0; i < NR_VCPUS; i++) {
		if (i)
			vcpu_run_to_sync(f->vcpus[i]);

		after = vcpu_get_stat(f->vcpus[i], "tlb_flush");
		if (after != before[i])
			got |= BIT(i);
	}

	TEST_ASSERT(got == flushed,
		    "Hypercall %#x, fast %d: vCPUs %#x were flushed, expected %#x",
		    f->flush->code, f->flush->fast, got, flushed);
}

static void check_success(struct flush_vm *f, uint32_t flushed)
{
	check_flush(f, hyperv_flush_success(f->flush), flushed);
}

static void test_targets(struct flush_vm *f, uint16_t code, bool fast)
{
	uint32_t targets;
	int i;

	for (targets = 1; targets <= ALL_VCPUS; targets++) {
		for (i = 0; i < NR_VCPUS; i++) {
			if ((targets & BIT(i)) && f->vp_index[i] >= 64)
				break;
		}
		/* Only the Ex hypercalls can target VP indices above 63. */
		if (i < NR_VCPUS && !hyperv_flush_is_ex(code))
			continue;

		set_flush(f, code, fast, targets);
		check_success(f, targets);
	}
}

static void test_all_and_none(struct flush_vm *f, uint16_t code, bool fast)
{
	struct hyperv_tlb_flush *flush = f->flush;

	if (!hyperv_flush_is_ex(code)) {
		set_flush(f, code, fast, BIT(0));
		flush->flags = HV_FLUSH_ALL_PROCESSORS;
		check_success(f, ALL_VCPUS);

		/* KVM treats an empty mask as all VPs, as WS2012 expects. */
		set_flush(f, code, fast, 0);
		check_success(f, ALL_VCPUS);

		/* No vCPU has this VP index. */
		flush->processor_mask = BIT_ULL(63);
		check_success(f, 0);
		return;
	}

	/* All VPs: without and with banks. */
	set_flush(f, code, fast, 0);
	flush->format = HV_GENERIC_SET_ALL;
	check_success(f, ALL_VCPUS);

	set_flush(f, code, fast, BIT(0));
	flush->format = HV_GENERIC_SET_ALL;
	check_success(f, ALL_VCPUS);

	/* None: no bank, an empty bank, a bank without vCPUs, the last bank. */
	set_flush(f, code, fast, 0);
	check_success(f, 0);

	flush->var_cnt = 1;
	flush->valid_bank_mask = BIT_ULL(0);
	check_success(f, 0);

	flush->valid_bank_mask = BIT_ULL(7);
	flush->banks[0] = ~0ull;
	check_success(f, 0);

	flush->valid_bank_mask = BIT_ULL(63);
	check_success(f, 0);
}

static void test_reps(struct flush_vm *f, uint16_t code, bool fast)
{
	if (!hyperv_flush_is_list(code))
		return;

	/* The largest rep count; KVM completes all reps with one flush. */
	set_flush(f, code, fast, BIT(0));
	f->flush->rep_cnt = 0xfff;
	check_success(f, BIT(0));
}

static void test_malformed(struct flush_vm *f, uint16_t code, bool fast)
{
	struct hyperv_tlb_flush *flush = f->flush;
	static const int reserved[] = { 27, 31, 44, 47, 60, 63 };
	int i;

	for (i = 0; i < ARRAY_SIZE(reserved); i++) {
		set_flush(f, code, fast, BIT(0));
		flush->reserved = BIT_ULL(reserved[i]);
		check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);
	}

	/* An unexpected or missing rep count; a rep start that is not 0. */
	set_flush(f, code, fast, BIT(0));
	flush->rep_cnt = !hyperv_flush_is_list(code);
	check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);

	set_flush(f, code, fast, BIT(0));
	flush->rep_start = 1;
	check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);

	/* A variable header that does not match the banks or is unexpected. */
	set_flush(f, code, fast, BIT(0));
	flush->var_cnt++;
	check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);

	if (hyperv_flush_is_ex(code)) {
		flush->var_cnt = 0;
		check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);

		flush->format = HV_GENERIC_SET_ALL;
		check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);
	}

	if (hyperv_flush_is_ex(code) && fast) {
		/* Six XMM registers hold the header and ten banks. */
		set_flush(f, code, fast, BIT(0));
		flush->valid_bank_mask = GENMASK_ULL(9, 0);
		flush->var_cnt = 10;
		check_success(f, BIT(0));

		flush->valid_bank_mask = GENMASK_ULL(10, 0);
		flush->var_cnt = 11;
		check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);
	}
}

static void test_unreadable(struct flush_vm *f, uint16_t code)
{
	struct hyperv_hcall_pages saved = *f->pages;
	vm_vaddr_t edge, beyond;

	/* Input outside of guest memory. */
	set_flush(f, code, false, BIT(0));
	f->pages->input_gpa = EDGE_GPA + PAGE_SIZE;
	check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);
	*f->pages = saved;

	/* The header ends at the end of guest memory, so KVM cannot read banks. */
	edge = vm_vaddr_alloc(f->vm, 2 * PAGE_SIZE, KVM_UTIL_MIN_VADDR);
	beyond = edge + PAGE_SIZE;
	vm_set_page_table_entry(f->vm, f->vcpus[0], edge,
				(vm_get_page_table_entry(f->vm, f->vcpus[0], beyond) &
				 ~PHYSICAL_PAGE_MASK) | EDGE_GPA);

	f->pages->input = (void *)(beyond - (hyperv_flush_is_ex(code) ? 32 : 24));
	f->pages->input_gpa = EDGE_GPA + PAGE_SIZE - (hyperv_flush_is_ex(code) ? 32 : 24);
	if (hyperv_flush_is_ex(code)) {
		check_flush(f, HV_STATUS_INVALID_HYPERCALL_INPUT, 0);
		set_flush(f, code, false, 0);
		check_success(f, 0);
	} else {
		check_success(f, BIT(0));
	}

	*f->pages = saved;
}

/* A running vCPU reads a page whose translation another vCPU changes. */
struct remote {
	uint64_t *page;
	uint64_t *pte;
	uint64_t ptes[2];
	uint64_t rounds;
	bool flush;

	/* Set by the reader: its last value, and the number of its reads */
	uint64_t value;
	uint64_t reads;

	/* Set by the flusher: the number of values from the old page */
	uint64_t stale;
	bool stop;
};

static void guest_reader(struct remote *remote)
{
	/* Bochs does not deliver interrupts to KVM while a guest has disabled them. */
	asm volatile("sti");
	while (!READ_ONCE(remote->stop)) {
		WRITE_ONCE(remote->value, READ_ONCE(*remote->page));
		WRITE_ONCE(remote->reads, remote->reads + 1);
	}
	GUEST_DONE();
}

/* Wait until the reader has completed a read that started after this call. */
static void guest_wait_for_read(struct remote *remote)
{
	uint64_t reads = READ_ONCE(remote->reads);

	while (READ_ONCE(remote->reads) - reads < 2)
		cpu_relax();
}

static void guest_remote_flusher(struct hyperv_hcall_pages *pages,
				 struct hyperv_tlb_flush *flush,
				 struct remote *remote)
{
	uint64_t status, i;

	hyperv_enable_hypercalls(pages);
	asm volatile("sti");

	for (i = 1; i <= remote->rounds; i++) {
		/* Let the reader use the old translation. */
		guest_wait_for_read(remote);

		WRITE_ONCE(*remote->pte, remote->ptes[i % 2]);
		if (remote->flush) {
			status = hyperv_flush_tlb(pages, flush);
			GUEST_ASSERT_1(status == HV_STATUS_SUCCESS, status);
		}

		guest_wait_for_read(remote);
		if (READ_ONCE(remote->value) != i % 2)
			remote->stale++;
	}

	WRITE_ONCE(remote->stop, true);
	GUEST_DONE();
}

static void *vcpu_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct ucall uc;

	vcpu_run(vcpu);

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_DONE:
		break;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT_1(uc, "status %#lx");
		break;
	default:
		TEST_FAIL("vCPU %u: unexpected exit reason %s, ucall %lu",
			  vcpu->id, exit_reason_str(vcpu->run->exit_reason),
			  uc.cmd);
	}
	return NULL;
}

static void test_remote(uint64_t rounds, bool with_flush)
{
	vm_vaddr_t pages_gva, flush_gva, remote_gva, page, other;
	struct hyperv_tlb_flush *flush;
	struct kvm_vcpu *vcpus[2];
	struct remote *remote;
	pthread_t threads[2];
	struct kvm_vm *vm;
	uint64_t pte;
	int i;

	vm = vm_create(2);
	vcpus[0] = vm_vcpu_add(vm, 0, guest_remote_flusher);
	vcpus[1] = vm_vcpu_add(vm, 1, guest_reader);

	pages_gva = vcpu_alloc_hyperv_hcall_pages(vm);
	flush_gva = vm_vaddr_alloc_page(vm);
	remote_gva = vm_vaddr_alloc_page(vm);
	page = vm_vaddr_alloc_page(vm);
	other = vm_vaddr_alloc_page(vm);

	flush = addr_gva2hva(vm, flush_gva);
	hyperv_set_flush(flush, HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, false,
			 vp_maps[0], BIT(1));

	*(uint64_t *)addr_gva2hva(vm, page) = 0;
	*(uint64_t *)addr_gva2hva(vm, other) = 1;

	remote = addr_gva2hva(vm, remote_gva);
	pte = vm_get_page_table_entry(vm, vcpus[0], page);
	remote->ptes[0] = pte;
	remote->ptes[1] = (pte & ~PHYSICAL_PAGE_MASK) | addr_gva2gpa(vm, other);
	remote->page = (void *)page;
	remote->pte = (void *)vm_map_page_table_entry(vm, vcpus[0], page);
	remote->rounds = rounds;
	remote->flush = with_flush;

	vcpu_args_set(vcpus[0], 3, pages_gva, flush_gva, remote_gva);
	vcpu_args_set(vcpus[1], 1, remote_gva);

	for (i = 0; i < 2; i++) {
		vcpu_set_hv_cpuid(vcpus[i]);
		threads[i] = start_thread(vcpu_thread, vcpus[i]);
	}
	for (i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);

	pr_info("%lu of %lu reads %s flush used the old translation\n",
		remote->stale, rounds, with_flush ? "after the" : "without");
	if (with_flush)
		TEST_ASSERT(!remote->stale,
			    "%lu of %lu reads after the flush used the old translation, expected none",
			    remote->stale, rounds);
	else if (!remote->stale)
		pr_info("Inconclusive: without flush, no old translation was used either\n");

	kvm_vm_free(vm);
}

static void guest_bench(struct hyperv_hcall_pages *pages,
			struct hyperv_tlb_flush *flush, uint64_t count)
{
	hyperv_enable_hypercalls(pages);
	hyperv_flush_tlb(pages, flush);
	GUEST_SYNC(0);

	while (count--)
		hyperv_flush_tlb(pages, flush);
	GUEST_SYNC(0);
}

/* Print the time of each hypercall.  It targets a vCPU that is not running. */
static void bench(uint64_t count)
{
	vm_vaddr_t pages_gva, flush_gva;
	struct kvm_vcpu *vcpus[2];
	struct hyperv_tlb_flush *flush;
	struct kvm_vm *vm;
	uint64_t begin;
	int i, fast;

	for (i = 0; i < ARRAY_SIZE(hyperv_flush_codes); i++) {
		for (fast = 0; fast < 2; fast++) {
			vm = vm_create(2);
			vcpus[0] = vm_vcpu_add(vm, 0, guest_bench);
			vcpus[1] = vm_vcpu_add(vm, 1, guest_target);
			vcpu_set_hv_cpuid(vcpus[0]);
			vcpu_set_hv_cpuid(vcpus[1]);

			pages_gva = vcpu_alloc_hyperv_hcall_pages(vm);
			flush_gva = vm_vaddr_alloc_page(vm);
			flush = addr_gva2hva(vm, flush_gva);
			hyperv_set_flush(flush, hyperv_flush_codes[i], fast,
					 vp_maps[0], BIT(1));
			vcpu_args_set(vcpus[0], 3, pages_gva, flush_gva, count);

			vcpu_run_to_sync(vcpus[0]);
			begin = now_ns();
			vcpu_run_to_sync(vcpus[0]);
			pr_info("perf: hypercall-%#x-%s ns %ld\n",
				flush->code, fast ? "fast" : "slow",
				(now_ns() - begin) / count);

			kvm_vm_free(vm);
		}
	}
}

int main(int argc, char *argv[])
{
	uint64_t rounds = 500, bench_count = 0;
	struct flush_vm f;
	int opt, map, i, fast;

	while ((opt = getopt(argc, argv, "b:n:")) != -1) {
		switch (opt) {
		case 'b':
			bench_count = parse_size(optarg);
			break;
		case 'n':
			rounds = parse_size(optarg);
			break;
		default:
			TEST_FAIL("usage: %s [-n remote reads] [-b flushes to time]",
				  argv[0]);
		}
	}

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_TLBFLUSH));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_VP_INDEX));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	if (bench_count) {
		bench(bench_count);
		return 0;
	}

	test_remote(rounds, false);
	test_remote(rounds, true);

	pin_to_cpu();

	for (map = 0; map < ARRAY_SIZE(vp_maps); map++) {
		flush_vm_create(&f, vp_maps[map]);
		vm_userspace_mem_region_add(f.vm, VM_MEM_SRC_ANONYMOUS,
					    EDGE_GPA, EDGE_SLOT, 1, 0);

		for (i = 0; i < ARRAY_SIZE(hyperv_flush_codes); i++) {
			for (fast = 0; fast < 2; fast++) {
				test_targets(&f, hyperv_flush_codes[i], fast);
				test_all_and_none(&f, hyperv_flush_codes[i], fast);
				test_reps(&f, hyperv_flush_codes[i], fast);
				test_malformed(&f, hyperv_flush_codes[i], fast);
			}
			test_unreadable(&f, hyperv_flush_codes[i]);
		}

		kvm_vm_free(f.vm);
	}

	return 0;
}
