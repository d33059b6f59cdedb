// SPDX-License-Identifier: GPL-2.0
/*
 * vgic_its_translation_test - what becomes of an MSI after ITS commands,
 * register writes and ITS ioctls
 *
 * The table has one row for each of them.  A row starts from the same mappings
 * on a fresh VM, executes one command and sends three MSIs, the first of which
 * the command is about.  For each of them the row knows what KVM_SIGNAL_MSI
 * returns, and which INTID, if any, arrives at which vCPU.  All rows are tested
 * twice, with translations that have been used before and with new ones: the
 * result must not depend on that.
 *
 * The cases that are no rows:
 *  - MSIs that name no valid doorbell, DeviceID or EventID
 *  - a VM without an ITS
 */

#define _GNU_SOURCE

#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_util.h"
#include "processor.h"
#include "gic.h"
#include "gic_v3_its.h"
#include "vgic.h"

#define NR_VCPUS	2
#define NR_ITS		2

#define GICD_BASE_GPA	0x8000000ULL
#define GICR_BASE_GPA	0x80a0000ULL
#define ITS_BASE_GPA	0x8200000ULL
#define TABLES_GPA	SZ_4G

#define EVENT_BITS	5
#define ITT_SIZE	SZ_4K
#define NR_ITTS		16

/* What the mappings of every VM consist of, see guest_map() */
#define DEV_A		1
#define DEV_B		2
#define LPI_A0		(LPI_BASE + 0)
#define LPI_A1		(LPI_BASE + 1)
#define LPI_B0		(LPI_BASE + 2)
#define LPI_NEW		(LPI_BASE + 8)
#define LPI_OTHER_ITS	(LPI_BASE + 9)
/* A collection for each vCPU, with the vCPU's number, and an unused one */
#define ICID_UNUSED	7

/* Shared with the guest */
static struct its its[NR_ITS];
static struct lpi_tables tables;
static void (*guest_command)(void);
static struct {
	uint32_t nr;
	uint32_t intid;
} delivered[NR_VCPUS];

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[NR_VCPUS];
static int gic_fd;

/* The guest */

static uint64_t itt(uint32_t index)
{
	return tables.itt + index * ITT_SIZE;
}

static void guest_map(void)
{
	uint32_t i;

	its_init(&its[0]);
	for (i = 0; i < NR_VCPUS; i++)
		its_send_mapc(&its[0], i, i, true);

	its_send_mapd(&its[0], DEV_A, itt(0), EVENT_BITS, true);
	its_send_mapti(&its[0], DEV_A, 0, 0, LPI_A0);
	its_send_mapti(&its[0], DEV_A, 1, 1, LPI_A1);
	its_send_mapd(&its[0], DEV_B, itt(1), EVENT_BITS, true);
	its_send_mapti(&its[0], DEV_B, 0, 0, LPI_B0);
	its_send_sync(&its[0], 0);

	its_init(&its[1]);
}

static void guest_irq_handler(struct ex_regs *regs)
{
	uint32_t cpu = guest_get_vcpuid();
	uint32_t intid = gic_get_and_ack_irq();

	if (intid == IAR_SPURIOUS)
		return;

	GUEST_ASSERT_1(intid >= LPI_BASE, intid);
	delivered[cpu].nr++;
	delivered[cpu].intid = intid;
	gic_set_eoi(intid);
}

static void guest_code(void)
{
	uint32_t cpu = guest_get_vcpuid();

	gic_init(GIC_V3, NR_VCPUS, (void *)GICD_BASE_GPA, (void *)GICR_BASE_GPA);
	gicr_enable_lpis(GICR_BASE_GPA, cpu, &tables);
	local_irq_enable();

	/* Interrupts are taken when the vCPU is entered for the next command. */
	for (;;) {
		GUEST_SYNC(0);
		if (guest_command)
			guest_command();
	}
}

/* Set the byte of an LPI in the configuration table. */
static void guest_config_lpi(uint32_t intid, uint8_t prop)
{
	WRITE_ONCE(*(uint8_t *)(tables.config + intid - LPI_BASE), prop);
	dsb(ishst);
}

static void guest_discard(void)
{
	its_send_discard(&its[0], DEV_A, 0);
}

static void guest_discard_mapti(void)
{
	its_send_discard(&its[0], DEV_A, 0);
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_NEW);
}

static void guest_discard_mapti_same(void)
{
	its_send_discard(&its[0], DEV_A, 0);
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_A0);
}

static void guest_discard_unmapped(void)
{
	its_send_discard(&its[0], DEV_A, 5);
	its_send_discard(&its[0], 5, 0);
}

/* UNPREDICTABLE; KVM leaves the existing mapping alone. */
static void guest_mapti_existing(void)
{
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_NEW);
}

static void guest_mapti_invalid(void)
{
	its_send_discard(&its[0], DEV_A, 0);
	/* No such device, no such event, no LPI, an LPI beyond PROPBASER's */
	its_send_mapti(&its[0], 5, 0, 0, LPI_NEW);
	its_send_mapti(&its[0], DEV_A, 1 << EVENT_BITS, 0, LPI_NEW);
	its_send_mapti(&its[0], DEV_A, 0, 0, LPI_BASE - 1);
	its_send_mapti(&its[0], DEV_A, 0, 0, 1 << LPI_ID_BITS);
}

/* The mapping exists, but there is nowhere to deliver to. */
static void guest_mapti_unmapped_collection(void)
{
	its_send_discard(&its[0], DEV_A, 0);
	its_send_mapti(&its[0], DEV_A, 0, ICID_UNUSED, LPI_NEW);
}

static void guest_mapti_then_mapc(void)
{
	guest_mapti_unmapped_collection();
	its_send_mapc(&its[0], ICID_UNUSED, 1, true);
}

static void guest_movi(void)
{
	its_send_movi(&its[0], DEV_A, 0, 1);
}

static void guest_movi_unmapped_collection(void)
{
	its_send_movi(&its[0], DEV_A, 0, ICID_UNUSED);
}

static void guest_movall(void)
{
	its_send_movall(&its[0], 0, 1);
}

static void guest_movall_invalid(void)
{
	its_send_movall(&its[0], 0, NR_VCPUS);
}

static void guest_mapd_unmap(void)
{
	its_send_mapd(&its[0], DEV_A, itt(0), EVENT_BITS, false);
}

static void guest_mapd_again(void)
{
	its_send_mapd(&its[0], DEV_A, itt(0), EVENT_BITS, true);
}

static void guest_mapd_mapti(void)
{
	guest_mapd_again();
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_NEW);
}

static void guest_mapd_invalid(void)
{
	/* Beyond the DeviceIDs, and with more EventID bits than there are */
	its_send_mapd(&its[0], 1 << 16 | DEV_A, itt(0), EVENT_BITS, false);
	its_send_mapd(&its[0], DEV_A, itt(0), 17, true);
}

static void guest_mapc_unmap(void)
{
	its_send_mapc(&its[0], 0, 0, false);
}

/* Unmapping a collection is for good, as far as existing ITEs go. */
static void guest_mapc_unmap_map(void)
{
	its_send_mapc(&its[0], 0, 0, false);
	its_send_mapc(&its[0], 0, 0, true);
}

static void guest_mapc_retarget(void)
{
	its_send_mapc(&its[0], 0, 1, true);
}

static void guest_mapc_invalid(void)
{
	its_send_mapc(&its[0], 0, NR_VCPUS, true);
}

static void guest_its_disable(void)
{
	its_disable(&its[0]);
}

static void guest_its_disable_enable(void)
{
	its_disable(&its[0]);
	its_enable(&its[0]);
}

static void guest_clear_baser(uint64_t baser)
{
	its_disable(&its[0]);
	its_write_baser(&its[0], baser, false);
	its_write_baser(&its[0], baser, true);
	its_enable(&its[0]);
}

static void guest_clear_device_baser(void)
{
	guest_clear_baser(GITS_BASER_DEVICE);
}

static void guest_clear_collection_baser(void)
{
	guest_clear_baser(GITS_BASER_COLLECTION);
}

static void guest_lpis_disable(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, false);
}

static void guest_lpis_disable_enable(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, false);
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, true);
}

static void guest_config_inv(void)
{
	guest_config_lpi(LPI_A0, LPI_PROP_PRIO);
	its_send_inv(&its[0], DEV_A, 0);
}

static void guest_config_invall(void)
{
	guest_config_lpi(LPI_A0, LPI_PROP_PRIO);
	its_send_invall(&its[0], 0);
}

static void guest_config_inv_twice(void)
{
	guest_config_inv();
	guest_config_lpi(LPI_A0, LPI_PROP_PRIO | LPI_PROP_ENABLED);
	its_send_inv(&its[0], DEV_A, 0);
}

/* What happens on one ITS is no business of the other one. */
static void guest_other_its(void)
{
	its_send_mapc(&its[1], 0, 1, true);
	its_send_mapd(&its[1], DEV_A, itt(2), EVENT_BITS, true);
	its_send_mapti(&its[1], DEV_A, 0, 0, LPI_OTHER_ITS);
	its_send_discard(&its[1], DEV_A, 0);
	its_send_mapc(&its[1], 0, 1, false);
	its_send_mapd(&its[1], DEV_A, itt(2), EVENT_BITS, false);
	its_disable(&its[1]);
}

static void guest_map_other_its(void)
{
	its_send_mapc(&its[1], 0, 1, true);
	its_send_mapd(&its[1], DEV_A, itt(2), EVENT_BITS, true);
	its_send_mapti(&its[1], DEV_A, 0, 0, LPI_OTHER_ITS);
}

static void guest_int(void)
{
	its_send_int(&its[0], DEV_A, 0);
}

static void guest_clear(void)
{
	its_send_clear(&its[0], DEV_A, 0);
}

/* The host */

static void run_vcpu(struct kvm_vcpu *vcpu, void (*command)(void))
{
	struct ucall uc;

	guest_command = command;
	sync_global_to_guest(vm, guest_command);
	vcpu_run(vcpu);

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		break;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT_2(uc, "values: %#lx, %#lx");
		break;
	default:
		TEST_FAIL("Unexpected exit of vCPU %u: %s", vcpu->id,
			  exit_reason_str(vcpu->run->exit_reason));
	}
}

static void create_vm(void)
{
	int i;

	vm = vm_create_with_vcpus(NR_VCPUS, guest_code, vcpus);
	ucall_init(vm, NULL);
	vm_init_descriptor_tables(vm);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_init_descriptor_tables(vcpus[i]);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_irq_handler);

	gic_fd = vgic_v3_setup(vm, NR_VCPUS, 64, GICD_BASE_GPA, GICR_BASE_GPA);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
	vgic_its_setup(vm, its, NR_ITS, ITS_BASE_GPA, &tables, NR_VCPUS,
		       NR_ITTS * ITT_SIZE, TABLES_GPA);
	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);

	for (i = 0; i < NR_VCPUS; i++)
		run_vcpu(vcpus[i], NULL);
	run_vcpu(vcpus[0], guest_map);
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

static int signal_msi(uint64_t doorbell, uint32_t device_id, uint32_t event_id)
{
	return __kvm_signal_msi(vm, doorbell, KVM_MSI_VALID_DEVID, device_id,
				event_id);
}

/*
 * Enter all vCPUs, and check that the only LPI that has arrived since the last
 * call is @intid, once, on @vcpu_id; or none if @intid is 0.
 */
static void check_delivered(const char *what, uint32_t intid, uint32_t vcpu_id)
{
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		run_vcpu(vcpus[i], NULL);

	sync_global_from_guest(vm, delivered);
	for (i = 0; i < NR_VCPUS; i++) {
		uint32_t nr = intid && i == vcpu_id;

		TEST_ASSERT(delivered[i].nr == nr &&
			    (!nr || delivered[i].intid == intid),
			    "%s: vCPU %d: expected %u LPIs (INTID %u), got %u (last INTID %u)",
			    what, i, nr, nr ? intid : 0, delivered[i].nr,
			    delivered[i].nr ? delivered[i].intid : 0);
	}
	memset(delivered, 0, sizeof(delivered));
	sync_global_to_guest(vm, delivered);
}

struct result {
	int ret;
	uint32_t intid;
	uint32_t vcpu_id;
};

static void check_msi(const char *what, uint64_t doorbell, uint32_t device_id,
		      uint32_t event_id, const struct result *result)
{
	int ret = signal_msi(doorbell, device_id, event_id);

	TEST_ASSERT(ret == result->ret,
		    "%s: MSI (%#x, %#x): expected KVM_SIGNAL_MSI to return %d, got %d",
		    what, device_id, event_id, result->ret, ret);
	check_delivered(what, result->intid, result->vcpu_id);
}

#define doorbell(its)		((its)->base + GITS_TRANSLATER)

#define DELIVERED(intid, vcpu)	{ 1, intid, vcpu }
/* Accepted, and pending, but not to be seen */
#define PENDING			{ 1 }
#define UNMAPPED		{ 0 }
#define DISABLED		{ -EBUSY }

#define A0			DELIVERED(LPI_A0, 0)
#define A1			DELIVERED(LPI_A1, 1)
#define B0			DELIVERED(LPI_B0, 0)

static const struct {
	uint32_t device_id;
	uint32_t event_id;
	struct result result;
} msis[] = {
	{ DEV_A, 0, A0 },
	{ DEV_A, 1, A1 },
	{ DEV_B, 0, B0 },
};

/* Send the MSIs of all mappings, which are as guest_map() has made them. */
static void check_mappings(const char *what)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(msis); i++)
		check_msi(what, doorbell(&its[0]), msis[i].device_id,
			  msis[i].event_id, &msis[i].result);
}

static void host_reset(void)
{
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_CTRL_RESET, NULL);
}

static const uint64_t saved_regs[] = {
	/* In the order of arm-vgic-its.rst, but for GITS_CTLR */
	GITS_CBASER, GITS_CREADR, GITS_CWRITER,
	GITS_BASER_DEVICE, GITS_BASER_COLLECTION,
};

static void host_save_restore(void)
{
	uint64_t regs[ARRAY_SIZE(saved_regs)], ctlr;
	int i;

	for (i = 0; i < ARRAY_SIZE(saved_regs); i++)
		kvm_device_attr_get(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
				    saved_regs[i], &regs[i]);
	kvm_device_attr_get(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CTLR,
			    &ctlr);
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);

	host_reset();

	for (i = 0; i < ARRAY_SIZE(saved_regs); i++)
		kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
				    saved_regs[i], &regs[i]);
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_RESTORE_TABLES, NULL);
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CTLR,
			    &ctlr);
}

static const struct row {
	const char *name;
	/* What the guest does, on vCPU 1, or the host */
	void (*guest)(void);
	void (*host)(void);
	struct result results[ARRAY_SIZE(msis)];
} rows[] = {
	{ "nothing", NULL, NULL, { A0, A1, B0 } },
	{ "DISCARD", guest_discard, NULL, { UNMAPPED, A1, B0 } },
	{ "DISCARD of what is not mapped", guest_discard_unmapped, NULL,
	  { A0, A1, B0 } },
	{ "DISCARD, MAPTI", guest_discard_mapti, NULL,
	  { DELIVERED(LPI_NEW, 1), A1, B0 } },
	{ "DISCARD, MAPTI of the same LPI", guest_discard_mapti_same, NULL,
	  { DELIVERED(LPI_A0, 1), A1, B0 } },
	{ "MAPTI of an existing event", guest_mapti_existing, NULL,
	  { A0, A1, B0 } },
	{ "DISCARD, invalid MAPTI", guest_mapti_invalid, NULL,
	  { UNMAPPED, A1, B0 } },
	{ "MAPTI, unmapped collection", guest_mapti_unmapped_collection, NULL,
	  { UNMAPPED, A1, B0 } },
	{ "MAPTI, then MAPC", guest_mapti_then_mapc, NULL,
	  { DELIVERED(LPI_NEW, 1), A1, B0 } },
	{ "MOVI", guest_movi, NULL, { DELIVERED(LPI_A0, 1), A1, B0 } },
	{ "MOVI, unmapped collection", guest_movi_unmapped_collection, NULL,
	  { A0, A1, B0 } },
	{ "MOVALL", guest_movall, NULL,
	  { DELIVERED(LPI_A0, 1), A1, DELIVERED(LPI_B0, 1) } },
	{ "MOVALL, no such vCPU", guest_movall_invalid, NULL, { A0, A1, B0 } },
	{ "MAPD V=0", guest_mapd_unmap, NULL, { UNMAPPED, UNMAPPED, B0 } },
	{ "MAPD V=1 once more", guest_mapd_again, NULL,
	  { UNMAPPED, UNMAPPED, B0 } },
	{ "MAPD V=1, MAPTI", guest_mapd_mapti, NULL,
	  { DELIVERED(LPI_NEW, 1), UNMAPPED, B0 } },
	{ "invalid MAPD", guest_mapd_invalid, NULL, { A0, A1, B0 } },
	{ "MAPC V=0", guest_mapc_unmap, NULL, { UNMAPPED, A1, UNMAPPED } },
	{ "MAPC V=0, MAPC V=1", guest_mapc_unmap_map, NULL,
	  { UNMAPPED, A1, UNMAPPED } },
	{ "MAPC, other target", guest_mapc_retarget, NULL,
	  { DELIVERED(LPI_A0, 1), A1, DELIVERED(LPI_B0, 1) } },
	{ "MAPC, no such vCPU", guest_mapc_invalid, NULL, { A0, A1, B0 } },
	{ "GITS_CTLR disabled", guest_its_disable, NULL,
	  { DISABLED, DISABLED, DISABLED } },
	{ "GITS_CTLR disabled, enabled", guest_its_disable_enable, NULL,
	  { A0, A1, B0 } },
	{ "device GITS_BASER cleared", guest_clear_device_baser, NULL,
	  { UNMAPPED, UNMAPPED, UNMAPPED } },
	{ "collection GITS_BASER cleared", guest_clear_collection_baser, NULL,
	  { UNMAPPED, UNMAPPED, UNMAPPED } },
	{ "EnableLPIs cleared", guest_lpis_disable, NULL,
	  { DISABLED, A1, DISABLED } },
	{ "EnableLPIs cleared, set", guest_lpis_disable_enable, NULL,
	  { A0, A1, B0 } },
	{ "LPI disabled, INV", guest_config_inv, NULL, { PENDING, A1, B0 } },
	{ "LPI disabled, INVALL", guest_config_invall, NULL,
	  { PENDING, A1, B0 } },
	{ "LPI disabled, INV, enabled, INV", guest_config_inv_twice, NULL,
	  { A0, A1, B0 } },
	{ "commands to the other ITS", guest_other_its, NULL, { A0, A1, B0 } },
	{ "reset", NULL, host_reset, { DISABLED, DISABLED, DISABLED } },
	{ "save, reset, restore", NULL, host_save_restore, { A0, A1, B0 } },
};

static void test_row(const struct row *row, bool warm)
{
	char what[128];
	int i;

	pr_debug("%s (%s)\n", row->name, warm ? "warm" : "cold");
	create_vm();

	if (warm)
		check_mappings("before any command");

	if (row->guest)
		run_vcpu(vcpus[1], row->guest);
	if (row->host)
		row->host();

	snprintf(what, sizeof(what), "%s (%s)", row->name, warm ? "warm" : "cold");
	for (i = 0; i < ARRAY_SIZE(msis); i++)
		check_msi(what, doorbell(&its[0]), msis[i].device_id,
			  msis[i].event_id, &row->results[i]);

	destroy_vm();
}

/* INT makes an LPI pending, CLEAR makes it not pending. */
static void test_int_clear(void)
{
	int ret;

	create_vm();

	run_vcpu(vcpus[1], guest_int);
	check_delivered("INT", LPI_A0, 0);

	ret = signal_msi(doorbell(&its[0]), DEV_A, 0);
	TEST_ASSERT(ret == 1, "Expected KVM_SIGNAL_MSI to return 1, got %d", ret);
	run_vcpu(vcpus[1], guest_clear);
	check_delivered("CLEAR", 0, 0);

	destroy_vm();
}

/* The same IDs on two ITSes are different events. */
static void test_two_its(void)
{
	const struct result other = DELIVERED(LPI_OTHER_ITS, 1);
	const struct result unmapped = UNMAPPED;
	int i;

	create_vm();

	check_msi("unmapped on the second ITS", doorbell(&its[1]), DEV_A, 0,
		  &unmapped);
	run_vcpu(vcpus[1], guest_map_other_its);
	for (i = 0; i < 2; i++) {
		check_msi("second ITS", doorbell(&its[1]), DEV_A, 0, &other);
		check_msi("first ITS", doorbell(&its[0]), DEV_A, 0,
			  &msis[0].result);
	}
	run_vcpu(vcpus[1], guest_discard);
	check_msi("second ITS, DISCARD on the first one", doorbell(&its[1]),
		  DEV_A, 0, &other);
	check_msi("first ITS, DISCARD", doorbell(&its[0]), DEV_A, 0, &unmapped);

	destroy_vm();
}

/* MSIs that name something that is not there. */
static void test_invalid_msi(bool warm)
{
	static const struct {
		const char *name;
		uint64_t doorbell;
		uint32_t flags;
		uint32_t device_id;
		uint32_t event_id;
		int ret;
	} invalid[] = {
#define ITS0		ITS_BASE_GPA
#define DB0		(ITS0 + GITS_TRANSLATER)
#define DEVID		KVM_MSI_VALID_DEVID
		{ "unmapped event", DB0, DEVID, DEV_A, 5, 0 },
		{ "unmapped device", DB0, DEVID, 5, 0, 0 },
		{ "event of the other device", DB0, DEVID, DEV_B, 1, 0 },
		{ "EventID that does not fit the device", DB0, DEVID, DEV_A,
		  1 << EVENT_BITS, 0 },
		/* As indexes, these would be the events 0 of devices 1 and 2. */
		{ "EventID beyond 16 bits", DB0, DEVID, 0, DEV_A << 16, 0 },
		{ "EventID beyond 16 bits, next device", DB0, DEVID, DEV_A,
		  1 << 16, 0 },
		{ "DeviceID beyond 16 bits", DB0, DEVID, 1 << 16 | DEV_A, 0, 0 },
		{ "largest IDs", DB0, DEVID, UINT32_MAX, UINT32_MAX, 0 },
		{ "unknown flag", DB0, DEVID | 1U << 31, DEV_A, 0, -EINVAL },
		{ "no doorbell", DB0 + NR_ITS * ITS_FRAME_SIZE, DEVID, DEV_A, 0,
		  -EINVAL },
		{ "the distributor", GICD_BASE_GPA + 0x40, DEVID, DEV_A, 0,
		  -EINVAL },
		{ "the second ITS", DB0 + ITS_FRAME_SIZE, DEVID, DEV_A, 0, 0 },
	};
	int i, ret;

	create_vm();

	if (warm)
		check_mappings("before invalid MSIs");

	for (i = 0; i < ARRAY_SIZE(invalid); i++) {
		ret = __kvm_signal_msi(vm, invalid[i].doorbell, invalid[i].flags,
				       invalid[i].device_id, invalid[i].event_id);
		TEST_ASSERT(ret == invalid[i].ret,
			    "%s (%s): expected KVM_SIGNAL_MSI to return %d, got %d",
			    invalid[i].name, warm ? "warm" : "cold",
			    invalid[i].ret, ret);
		check_delivered(invalid[i].name, 0, 0);
	}

	check_mappings("after invalid MSIs");

	destroy_vm();
}

static void test_no_its(void)
{
	int ret;

	vm = vm_create_with_vcpus(NR_VCPUS, guest_code, vcpus);
	gic_fd = vgic_v3_setup(vm, NR_VCPUS, 64, GICD_BASE_GPA, GICR_BASE_GPA);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");

	ret = signal_msi(ITS_BASE_GPA + GITS_TRANSLATER, DEV_A, 0);
	TEST_ASSERT(ret == -ENODEV,
		    "No ITS: expected KVM_SIGNAL_MSI to return %d, got %d",
		    -ENODEV, ret);

	close(gic_fd);
	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	int i;

	/* Tell stdout not to buffer its content */
	setbuf(stdout, NULL);

	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		test_row(&rows[i], false);
		test_row(&rows[i], true);
	}
	pr_info("%d rows, cold and warm\n", i);

	test_int_clear();
	test_two_its();
	test_invalid_msi(false);
	test_invalid_msi(true);
	test_no_its();

	return 0;
}
