// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the ring of coalesced MMIO.
 *
 * The guest writes to a coalesced zone.  Wherever the ring begins, all of its entries but
 * one can be used before a write exits.
 */
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"

/* Arbitrarily chosen, not in a memslot. */
#define MMIO_GPA	SZ_1G

static void guest_code(void)
{
	uint64_t i;

	for (i = 0; ; i++)
		WRITE_ONCE(*(uint64_t *)MMIO_GPA, i);
}

static struct kvm_vm *create_vm(struct kvm_vcpu **vcpu,
				struct kvm_coalesced_mmio_ring **ring)
{
	struct kvm_coalesced_mmio_zone zone = { .addr = MMIO_GPA, .size = 8 };
	int page = kvm_check_cap(KVM_CAP_COALESCED_MMIO);
	struct kvm_vm *vm;

	TEST_REQUIRE(page > 0);
	vm = vm_create_with_one_vcpu(vcpu, guest_code);
	virt_map(vm, MMIO_GPA, MMIO_GPA, 1);
	vm_ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone);
	*ring = (void *)(*vcpu)->run + page * getpagesize();
	return vm;
}

static uint32_t nr_entries(void)
{
	return (getpagesize() - sizeof(struct kvm_coalesced_mmio_ring)) /
	       sizeof(struct kvm_coalesced_mmio);
}

TEST(full)
{
	struct kvm_coalesced_mmio_ring *ring;
	uint32_t max = nr_entries(), first, i;
	struct kvm_coalesced_mmio *entry;
	uint64_t written = 0, value;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;

	vm = create_vm(&vcpu, &ring);

	for (first = 0; first < max; first += 13) {
		ring->first = first;
		ring->last = first;
		vcpu_run(vcpu);

		/* The exit is caused by the first write that did not fit. */
		ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_MMIO);
		i = (READ_ONCE(ring->last) + max - first) % max;
		TEST_ASSERT(i == max - 1,
			    "ring from entry %u: expected %u writes before an exit, got %u",
			    first, max - 1, i);
		for (i = 0; i < max - 1; i++) {
			entry = &ring->coalesced_mmio[(first + i) % max];
			memcpy(&value, entry->data, sizeof(value));
			TEST_ASSERT(entry->phys_addr == MMIO_GPA && entry->len == 8 &&
				    value == written,
				    "expected write %lu, got %lu, %u bytes at %#llx",
				    written, value, entry->len, entry->phys_addr);
			written++;
		}
		memcpy(&value, vcpu->run->mmio.data, sizeof(value));
		ASSERT_EQ(value, written);
		written++;
	}
	kvm_vm_free(vm);
}

/* If last is the index of no existing entry, the write exits and stores nothing. */
TEST(bad_last)
{
	const uint32_t lasts[] = { nr_entries(), 1u << 31, ~0u };
	struct kvm_coalesced_mmio_ring *ring;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	int i;

	vm = create_vm(&vcpu, &ring);
	for (i = 0; i < ARRAY_SIZE(lasts); i++) {
		ring->last = lasts[i];
		vcpu_run(vcpu);
		ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_MMIO);
		ASSERT_EQ(READ_ONCE(ring->last), lasts[i]);
	}
	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	return run_cases(argv + 1);
}
