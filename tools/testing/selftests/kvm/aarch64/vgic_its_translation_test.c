// SPDX-License-Identifier: GPL-2.0
/*
 * vgic_its_translation_test - delivery of MSIs after ITS commands, register
 * writes and ITS ioctls
 *
 * Each row of the table is one test.  It creates a VM with three mapped events,
 * executes a command, a register write or an ioctl that affects the first event,
 * and sends one MSI for each event.  The row lists, for each event, the expected
 * return value of KVM_SIGNAL_MSI, and the INTID and the vCPU if the LPI is
 * delivered.  Each row runs twice: "cold", where KVM has never translated an MSI
 * of these events, and "warm", where it has translated each event once.  The
 * results must be the same.
 *
 * The cases outside of the table say what they test where they are defined.
 */

#define _GNU_SOURCE

#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/sizes.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "gic.h"
#include "gic_v3_its.h"
#include "trace.h"
#include "uffd.h"
#include "vgic.h"

#define NR_VCPUS	2
#define NR_ITS		2

/* Upper bounds for a VM with other vCPUs, see create_vm_with_ids() */
#define MAX_VCPUS	3
#define MAX_VCPU_IDS	4

#define GICD_BASE_GPA	0x8000000ULL
#define GICR_BASE_GPA	0x80a0000ULL
#define ITS_BASE_GPA	0x8200000ULL
#define TABLES_GPA	SZ_4G

#define EVENT_BITS	5
#define ITT_SIZE	SZ_4K
#define NR_ITTS		16

/* The mappings of every VM, see guest_map() */
#define DEV_A		1
#define DEV_B		2
#define LPI_A0		(LPI_BASE + 0)
#define LPI_A1		(LPI_BASE + 1)
#define LPI_B0		(LPI_BASE + 2)
#define LPI_NEW		(LPI_BASE + 8)
#define LPI_OTHER_ITS	(LPI_BASE + 9)
/* Collection n targets vCPU n.  Collection ICID_UNUSED is not mapped. */
#define ICID_UNUSED	7

/* Shared with the guest */
static struct its its[NR_ITS];
static struct lpi_tables tables;
static void (*guest_command)(void);
static void (*before_eoi)(void);
static struct {
	uint32_t nr;
	uint32_t intid;
} delivered[MAX_VCPU_IDS];

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[MAX_VCPUS];
static unsigned int nr_vcpus;
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
	if (before_eoi)
		before_eoi();
	gic_set_eoi(intid);
}

/* Stages of a vCPU that has an LPI in a list register, see guest_hold_lpi() */
enum hold_stage {
	HOLD_NONE,
	HOLD_READY,
	HOLD_HELD,
	HOLD_COMMAND_DONE,
};

/* Shared with the guest */
static enum hold_stage hold_stage;
static uint32_t hppir;
static void (*held_command)(void);

/* For before_eoi: leave the LPI active until the host runs the vCPU again. */
static void guest_stop(void)
{
	GUEST_SYNC(0);
}

static void guest_code(void)
{
	uint32_t cpu = guest_get_vcpuid();

	gic_init(GIC_V3, MAX_VCPU_IDS, (void *)GICD_BASE_GPA, (void *)GICR_BASE_GPA);
	gicr_enable_lpis(GICR_BASE_GPA, cpu, &tables);
	local_irq_enable();

	/* The vCPU takes interrupts when it is entered for the next command. */
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

/* UNPREDICTABLE.  KVM keeps the existing mapping. */
static void guest_mapti_existing(void)
{
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_NEW);
}

static void guest_mapti_invalid(void)
{
	its_send_discard(&its[0], DEV_A, 0);
	/* Unmapped device, EventID too large, INTID too small, INTID too large */
	its_send_mapti(&its[0], 5, 0, 0, LPI_NEW);
	its_send_mapti(&its[0], DEV_A, 1 << EVENT_BITS, 0, LPI_NEW);
	its_send_mapti(&its[0], DEV_A, 0, 0, LPI_BASE - 1);
	its_send_mapti(&its[0], DEV_A, 0, 0, 1 << LPI_ID_BITS);
}

/* The event is mapped, but its collection is not. */
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
	/* DeviceID too large, too many EventID bits */
	its_send_mapd(&its[0], 1 << 16 | DEV_A, itt(0), EVENT_BITS, false);
	its_send_mapd(&its[0], DEV_A, itt(0), 17, true);
}

static void guest_mapc_unmap(void)
{
	its_send_mapc(&its[0], 0, 0, false);
}

/* MAPC V=0 detaches the collection's ITEs.  MAPC V=1 does not attach them again. */
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

/* Commands to one ITS must not affect the other one. */
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

static void guest_disable_other_its(void)
{
	its_disable(&its[1]);
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

static void set_command(void (*command)(void))
{
	guest_command = command;
	sync_global_to_guest(vm, guest_command);
}

static void run_vcpu(struct kvm_vcpu *vcpu, void (*command)(void))
{
	set_command(command);
	vcpu_run_to_sync(vcpu);
}

/* Set the function that the guest calls while it handles an LPI, or NULL. */
static void set_before_eoi(void (*command)(void))
{
	before_eoi = command;
	sync_global_to_guest(vm, before_eoi);
}

/*
 * Create a GIC.  A redistributor region of its own for each vCPU places the
 * redistributor of the vCPU with ID n at GICR_BASE_GPA + n * 128K, in whatever
 * order the vCPUs were created.
 */
static int setup_gic(const uint32_t *vcpu_ids)
{
	uint64_t gicd_base = GICD_BASE_GPA, region;
	uint32_t nr_irqs = 64;
	int fd, i;

	fd = __kvm_create_device(vm, KVM_DEV_TYPE_ARM_VGIC_V3);
	if (fd < 0)
		return fd;

	kvm_device_attr_set(fd, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &nr_irqs);
	kvm_device_attr_set(fd, KVM_DEV_ARM_VGIC_GRP_ADDR,
			    KVM_VGIC_V3_ADDR_TYPE_DIST, &gicd_base);
	for (i = 0; i < nr_vcpus; i++) {
		region = REDIST_REGION_ATTR_ADDR(1, GICR_BASE_GPA +
						 vcpu_ids[i] * SZ_128K, 0, i);
		kvm_device_attr_set(fd, KVM_DEV_ARM_VGIC_GRP_ADDR,
				    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, &region);
	}
	kvm_device_attr_set(fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_CTRL_INIT, NULL);

	virt_map(vm, GICD_BASE_GPA, GICD_BASE_GPA,
		 vm_calc_num_guest_pages(vm->mode, KVM_VGIC_V3_DIST_SIZE));
	virt_map(vm, GICR_BASE_GPA, GICR_BASE_GPA,
		 vm_calc_num_guest_pages(vm->mode, MAX_VCPU_IDS * SZ_128K));
	return fd;
}

/* Create the vCPUs with these IDs, in this order, but do not run them. */
static void create_vm_with_ids(const uint32_t *vcpu_ids, unsigned int nr)
{
	int i;

	nr_vcpus = nr;
	vm = vm_create(nr_vcpus);
	for (i = 0; i < nr_vcpus; i++)
		vcpus[i] = vm_vcpu_add(vm, vcpu_ids[i], guest_code);
	ucall_init(vm, NULL);
	vm_init_descriptor_tables(vm);
	for (i = 0; i < nr_vcpus; i++)
		vcpu_init_descriptor_tables(vcpus[i]);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_irq_handler);

	gic_fd = setup_gic(vcpu_ids);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
	vgic_its_setup(vm, its, NR_ITS, ITS_BASE_GPA, &tables, MAX_VCPU_IDS,
		       NR_ITTS * ITT_SIZE, TABLES_GPA);
	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);
}

static void run_vcpus(void)
{
	int i;

	for (i = 0; i < nr_vcpus; i++)
		run_vcpu(vcpus[i], NULL);
}

static void create_vm(void)
{
	static const uint32_t vcpu_ids[NR_VCPUS] = { 0, 1 };

	create_vm_with_ids(vcpu_ids, NR_VCPUS);
	run_vcpus();
	run_vcpu(vcpus[0], guest_map);
}

/* Each vCPU ID is the index of the other vCPU.  vcpus[i] has ID i, as in other VMs. */
static void create_vm_swapped_ids(void)
{
	static const uint32_t vcpu_ids[NR_VCPUS] = { 1, 0 };
	struct kvm_vcpu *first;

	create_vm_with_ids(vcpu_ids, NR_VCPUS);
	first = vcpus[0];
	vcpus[0] = vcpus[1];
	vcpus[1] = first;
	run_vcpus();
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
 * Check that, since the last call, the vCPUs have taken @intid once, on @vcpu_id, and
 * no other LPI; or no LPI at all if @intid is 0.
 */
static void check_taken(const char *what, uint32_t intid, uint32_t vcpu_id)
{
	int i;

	sync_global_from_guest(vm, delivered);
	for (i = 0; i < MAX_VCPU_IDS; i++) {
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

/* The same, after all vCPUs have run once */
static void check_delivered(const char *what, uint32_t intid, uint32_t vcpu_id)
{
	run_vcpus();
	check_taken(what, intid, vcpu_id);
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
/* Accepted and made pending, but not delivered */
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

/* Send an MSI for each event, with the mappings that guest_map() created. */
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
	/* In the order of arm-vgic-its.rst, without GITS_CTLR, which comes last */
	GITS_CBASER, GITS_CREADR, GITS_CWRITER,
	GITS_BASER_DEVICE, GITS_BASER_COLLECTION,
};

/* Reset the ITS, and restore its registers and tables.  Returns 0 or -errno. */
static int host_restore(void)
{
	uint64_t regs[ARRAY_SIZE(saved_regs)], ctlr;
	int i, ret;

	for (i = 0; i < ARRAY_SIZE(saved_regs); i++)
		kvm_device_attr_get(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
				    saved_regs[i], &regs[i]);
	kvm_device_attr_get(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CTLR,
			    &ctlr);

	host_reset();

	for (i = 0; i < ARRAY_SIZE(saved_regs); i++)
		kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
				    saved_regs[i], &regs[i]);
	ret = __kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
				    KVM_DEV_ARM_ITS_RESTORE_TABLES, NULL);
	if (ret)
		ret = -errno;
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CTLR,
			    &ctlr);
	return ret;
}

static void host_save_restore(void)
{
	int ret;

	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);
	ret = host_restore();
	TEST_ASSERT(!ret, "Restore: expected 0, got %d", ret);
}

static void check_restore_fails(void)
{
	int ret = __kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
					KVM_DEV_ARM_ITS_RESTORE_TABLES, NULL);

	TEST_ASSERT(ret == -1 && errno == EEXIST,
		    "Restore on top of mappings: expected -1 with EEXIST (%d), got %d with %d",
		    EEXIST, ret, errno);
}

/* The first collection is mapped already.  KVM unmaps all collections. */
static void host_restore_again(void)
{
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);
	check_restore_fails();
}

/*
 * The first restore has unmapped all collections, but no device.  The second one
 * fails on the first device.
 */
static void host_restore_twice(void)
{
	host_restore_again();
	check_restore_fails();
}

/* An event that is saved once, and then unmapped without DISCARD */
#define STALE_EVENT	2

static void guest_map_stale(void)
{
	its_send_mapti(&its[0], DEV_A, STALE_EVENT, 1, LPI_NEW + 1);
}

/* The collection of event 1 is not mapped.  Event 0 is the last valid entry. */
static void guest_map_again_unmap_collection(void)
{
	its_send_mapd(&its[0], DEV_A, itt(0), EVENT_BITS, true);
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_NEW);
	its_send_mapti(&its[0], DEV_A, 1, 0, LPI_A1);
	its_send_mapc(&its[0], 0, 0, false);
}

static void host_restore_stale(void)
{
	uint64_t doorbell = its[0].base + GITS_TRANSLATER;
	int ret;

	run_vcpu(vcpus[1], guest_map_stale);
	host_save_restore();
	run_vcpu(vcpus[1], guest_map_again_unmap_collection);
	host_save_restore();

	ret = signal_msi(doorbell, DEV_A, STALE_EVENT);
	TEST_ASSERT(ret == 0,
		    "Event unmapped before the save: expected KVM_SIGNAL_MSI to return 0, got %d",
		    ret);
}

static const struct row {
	const char *name;
	/* Called by the guest on vCPU 1, or by the host */
	void (*guest)(void);
	void (*host)(void);
	struct result results[ARRAY_SIZE(msis)];
} rows[] = {
	{ "nothing", NULL, NULL, { A0, A1, B0 } },
	{ "DISCARD", guest_discard, NULL, { UNMAPPED, A1, B0 } },
	{ "DISCARD of unmapped events", guest_discard_unmapped, NULL,
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
	{ "MAPD V=1 again", guest_mapd_again, NULL,
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
	{ "MAPC V=0, save, reset, restore", NULL, host_restore_stale,
	  { DELIVERED(LPI_NEW, 1), UNMAPPED, UNMAPPED } },
	{ "restore on top of mappings", NULL, host_restore_again,
	  { UNMAPPED, UNMAPPED, UNMAPPED } },
	{ "restore on top of devices", NULL, host_restore_twice,
	  { UNMAPPED, UNMAPPED, UNMAPPED } },
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

TEST(rows_cold)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(rows); i++)
		test_row(&rows[i], false);
}

TEST(rows_warm)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(rows); i++)
		test_row(&rows[i], true);
}

/* INT makes an LPI pending, CLEAR removes the pending state. */
TEST(int_clear)
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
TEST(two_its)
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

struct refused {
	const char *name;
	uint64_t doorbell;
	uint32_t flags;
	uint32_t device_id;
	uint32_t event_id;
	int ret;
	/* In the trace */
	const char *reason;
};

/* MSIs with an invalid doorbell, flag or ID */
static void test_invalid_msi(bool warm)
{
	static const struct refused invalid[] = {
#define ITS0		ITS_BASE_GPA
#define DB0		(ITS0 + GITS_TRANSLATER)
#define DEVID		KVM_MSI_VALID_DEVID
		{ "unmapped event", DB0, DEVID, DEV_A, 5, 0 },
		{ "unmapped device", DB0, DEVID, 5, 0, 0 },
		{ "event of the other device", DB0, DEVID, DEV_B, 1, 0 },
		{ "EventID that does not fit the device", DB0, DEVID, DEV_A,
		  1 << EVENT_BITS, 0 },
		/*
		 * If both IDs were combined into one index, these could have the
		 * index of event 0 of device 1 or 2.
		 */
		{ "EventID beyond 16 bits", DB0, DEVID, 0, DEV_A << 16, 0 },
		{ "EventID beyond 16 bits, next device", DB0, DEVID, DEV_A,
		  1 << 16, 0 },
		{ "DeviceID beyond 16 bits", DB0, DEVID, 1 << 16 | DEV_A, 0, 0 },
		{ "largest IDs", DB0, DEVID, UINT32_MAX, UINT32_MAX, 0 },
		{ "unknown flag", DB0, DEVID | 1U << 31, DEV_A, 0, -EINVAL },
		{ "no KVM_MSI_VALID_DEVID", DB0, 0, DEV_A, 0, -EINVAL },
		{ "no doorbell", DB0 + NR_ITS * ITS_FRAME_SIZE, DEVID, DEV_A, 0,
		  -EINVAL },
		{ "the distributor", GICD_BASE_GPA + 0x40, DEVID, DEV_A, 0,
		  -EINVAL },
		{ "the ITS's first frame", ITS0, DEVID, DEV_A, 0, -EINVAL },
		{ "the ITS's second frame", ITS0 + SZ_64K, DEVID, DEV_A, 0,
		  -EINVAL },
		{ "next to GITS_TRANSLATER", DB0 + 4, DEVID, DEV_A, 0, -EINVAL },
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

TEST(invalid_msi_cold)
{
	test_invalid_msi(false);
}

TEST(invalid_msi_warm)
{
	test_invalid_msi(true);
}

/* One more than the number of entries, of 8 bytes each, in a table of one page */
#define NR_COLLECTIONS	(ITS_COLLECTION_TABLE_SIZE / 8 + 1)

static void guest_set_collection_table_pages(unsigned int nr_pages)
{
	its_disable(&its[0]);
	writeq(GITS_BASER_VALID | its[0].collection_table | (nr_pages - 1),
	       (void *)(its[0].base + GITS_BASER_COLLECTION));
	its_enable(&its[0]);
}

static void guest_map_collections(void)
{
	int i;

	guest_set_collection_table_pages(2);
	for (i = 0; i < NR_COLLECTIONS; i++)
		its_send_mapc(&its[0], i, 0, true);
	guest_set_collection_table_pages(1);
}

/* The collection table is too small for the collections that are mapped. */
TEST(save_collections)
{
	uint64_t before[8], *behind;
	int ret, err;

	create_vm();

	run_vcpu(vcpus[1], guest_map_collections);
	behind = addr_gpa2hva(vm, its[0].collection_table + ITS_COLLECTION_TABLE_SIZE);
	memcpy(before, behind, sizeof(before));
	ret = __kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
				    KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);
	err = errno;
	TEST_ASSERT(!memcmp(before, behind, sizeof(before)),
		    "Save of %d collections: expected %#lx behind the table, got %#lx",
		    NR_COLLECTIONS, before[0], behind[0]);
	TEST_ASSERT(ret == -1 && err == EINVAL,
		    "Save of %d collections: expected -1 with EINVAL (%d), got %d with %d",
		    NR_COLLECTIONS, EINVAL, ret, err);

	destroy_vm();
}

/* Setting an attribute that KVM_HAS_DEVICE_ATTR denies must not succeed. */
TEST(unknown_attr)
{
	const uint64_t attr = 1000;
	int ret;

	create_vm();

	ret = __kvm_has_device_attr(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL, attr);
	TEST_ASSERT(ret == -1 && errno == ENXIO,
		    "KVM_HAS_DEVICE_ATTR: expected -1 with ENXIO (%d), got %d with %d",
		    ENXIO, ret, errno);
	ret = __kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL, attr, NULL);
	TEST_ASSERT(ret == -1 && errno == ENXIO,
		    "KVM_SET_DEVICE_ATTR: expected -1 with ENXIO (%d), got %d with %d",
		    ENXIO, ret, errno);
	check_mappings("after an unknown attribute");

	destroy_vm();
}

/* A vgic can be initialized before there is a vCPU.  Without the fix, 6.1 crashes. */
TEST(debugfs_no_vcpu)
{
	uint32_t nr_irqs = 64;
	char path[128], buf[4096];
	ssize_t n, total = 0;
	int fd;

	vm = vm_create_barebones();
	gic_fd = __kvm_create_device(vm, KVM_DEV_TYPE_ARM_VGIC_V3);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &nr_irqs);
	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_CTRL_INIT, NULL);

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/vgic-state",
		 getpid(), vm->fd);
	fd = open(path, O_RDONLY);
	__TEST_REQUIRE(fd >= 0, "needs debugfs");
	while ((n = read(fd, buf, sizeof(buf))) > 0)
		total += n;
	TEST_ASSERT(!n && total, "Expected to read the state of the vgic, got %zd, errno %d",
		    n, errno);

	close(fd);
	close(gic_fd);
	kvm_vm_free(vm);
}

static void create_vm_no_its(void)
{
	vm = vm_create_with_vcpus(NR_VCPUS, guest_code, vcpus);
	gic_fd = vgic_v3_setup(vm, NR_VCPUS, 64, GICD_BASE_GPA, GICR_BASE_GPA);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
}

TEST(no_its)
{
	int ret;

	create_vm_no_its();

	ret = signal_msi(ITS_BASE_GPA + GITS_TRANSLATER, DEV_A, 0);
	TEST_ASSERT(ret == -ENODEV,
		    "No ITS: expected KVM_SIGNAL_MSI to return %d, got %d",
		    -ENODEV, ret);

	close(gic_fd);
	kvm_vm_free(vm);
}

/*
 * The IDs of the vCPUs, in the order of their creation.  There is no vCPU 2.  No ID is
 * the index of its vCPU, so a target that KVM treats as an index is either another vCPU
 * or none.
 */
static const uint32_t other_ids[] = { 3, 0, 1 };

#define ID_HOLE			2
#define LPI_OF_VCPU(id)		(LPI_BASE + (id))

/* Event n of DEV_A is in collection n, which targets vCPU n. */
static void guest_map_other_ids(void)
{
	int i;

	its_init(&its[0]);
	its_send_mapd(&its[0], DEV_A, itt(0), EVENT_BITS, true);
	for (i = 0; i < ARRAY_SIZE(other_ids); i++) {
		uint32_t id = other_ids[i];

		its_send_mapc(&its[0], id, id, true);
		its_send_mapti(&its[0], DEV_A, id, id, LPI_OF_VCPU(id));
	}
}

static void guest_init_its(void)
{
	its_init(&its[0]);
}

static void guest_mapc_hole(void)
{
	its_send_mapc(&its[0], ID_HOLE, ID_HOLE, true);
	its_send_mapti(&its[0], DEV_A, ID_HOLE, ID_HOLE, LPI_OF_VCPU(ID_HOLE));
}

static void guest_movi_ids(void)
{
	its_send_movi(&its[0], DEV_A, 0, 3);
}

/* The second command has no effect: there is no vCPU 2. */
static void guest_movall_ids(void)
{
	its_send_movall(&its[0], 3, 1);
	its_send_movall(&its[0], 1, ID_HOLE);
}

/* The target of an unmapped collection is ignored. */
static void guest_mapc_unmap_hole(void)
{
	its_send_mapc(&its[0], 1, ID_HOLE, false);
}

static void check_event(const char *what, uint32_t event_id, uint32_t vcpu_id)
{
	const struct result result = DELIVERED(LPI_OF_VCPU(event_id), vcpu_id);

	check_msi(what, doorbell(&its[0]), DEV_A, event_id, &result);
}

static void check_events(const char *what)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(other_ids); i++)
		check_event(what, other_ids[i], other_ids[i]);
}

#define GICR_TYPER		0x0008
#define GICR_ISPENDR0		0x10200

/* Arbitrarily chosen.  No vCPU enables it. */
#define OTHER_SGI		5
#define OTHER_PPI		20

/* An attribute of the redistributor of a vCPU, whose affinity is its ID */
static uint32_t get_redist_attr(uint32_t group, uint32_t vcpu_id, uint64_t attr)
{
	uint32_t val;

	attr |= (uint64_t)vcpu_id << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT;
	kvm_device_attr_get(gic_fd, group, attr, &val);
	return val;
}

/* GICR_TYPER.Processor_Number is the ID. */
static void check_processor_numbers(void)
{
	uint32_t nr;
	int i;

	for (i = 0; i < nr_vcpus; i++) {
		nr = get_redist_attr(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
				     vcpus[i]->id, GICR_TYPER) >> 8 & 0xffff;
		TEST_ASSERT(nr == vcpus[i]->id,
			    "GICR_TYPER.Processor_Number: expected %u, got %u",
			    vcpus[i]->id, nr);
	}
}

/* KVM_IRQ_LINE names a vCPU by its ID. */
static void check_ppis(void)
{
	uint64_t attr = (uint64_t)VGIC_LEVEL_INFO_LINE_LEVEL <<
			KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT;
	struct kvm_irq_level irq = { .level = 1 };
	uint32_t level;
	int i, j, ret;

	for (i = 0; i < nr_vcpus; i++) {
		irq.irq = KVM_ARM_IRQ_TYPE_PPI << KVM_ARM_IRQ_TYPE_SHIFT |
			  vcpus[i]->id << KVM_ARM_IRQ_VCPU_SHIFT | OTHER_PPI;
		ret = __vm_ioctl(vm, KVM_IRQ_LINE, &irq);
		TEST_ASSERT(!ret,
			    "PPI of vCPU %u: expected KVM_IRQ_LINE to return 0, got %d, errno %d",
			    vcpus[i]->id, ret, errno);
		for (j = 0; j < nr_vcpus; j++) {
			level = get_redist_attr(KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
						vcpus[j]->id, attr) >> OTHER_PPI & 1;
			TEST_ASSERT(level == (j <= i),
				    "PPIs up to that of vCPU %u: expected line level of vCPU %u to be %u, got %u",
				    vcpus[i]->id, vcpus[j]->id, j <= i, level);
		}
	}
}

/* ICC_SGI1R_EL1.IRM sends an SGI to all vCPUs except the sender. */
static void guest_broadcast_sgi(void)
{
	write_sysreg_s((uint64_t)OTHER_SGI << 24 | BIT_ULL(40), SYS_ICC_SGI1R_EL1);
	isb();
}

static void check_sgi_broadcast(void)
{
	uint32_t pending;
	int i;

	run_vcpu(vcpus[0], guest_broadcast_sgi);
	for (i = 0; i < nr_vcpus; i++) {
		pending = get_redist_attr(KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
					  vcpus[i]->id, GICR_ISPENDR0) >> OTHER_SGI & 1;
		TEST_ASSERT(pending == !!i,
			    "SGI to all vCPUs except %u: expected pending state of vCPU %u to be %u, got %u",
			    vcpus[0]->id, vcpus[i]->id, !!i, pending);
	}
}

/* Change the target of the collection that is saved first. */
static void set_saved_target(uint32_t vcpu_id)
{
	uint64_t *cte = addr_gpa2hva(vm, its[0].collection_table);

	*cte = (*cte & ~GENMASK_ULL(47, 16)) | (uint64_t)vcpu_id << 16;
}

/* A collection targets the vCPU whose GICR_TYPER has the number in the command. */
TEST(vcpu_ids)
{
	const struct result unmapped = UNMAPPED;
	int ret;

	create_vm_with_ids(other_ids, ARRAY_SIZE(other_ids));
	check_processor_numbers();
	/* Before any vCPU runs: 6.1 warns if there is no vCPU for a timer's PPI. */
	check_ppis();
	run_vcpus();
	check_sgi_broadcast();

	run_vcpu(vcpus[0], guest_map_other_ids);
	check_events("MAPC");

	run_vcpu(vcpus[0], guest_mapc_hole);
	check_msi("MAPC, no such vCPU", doorbell(&its[0]), DEV_A, ID_HOLE,
		  &unmapped);

	host_save_restore();
	check_events("save, reset, restore");

	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);
	host_reset();
	run_vcpu(vcpus[0], guest_init_its);
	set_saved_target(ID_HOLE);
	ret = __kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
				    KVM_DEV_ARM_ITS_RESTORE_TABLES, NULL);
	TEST_ASSERT(ret == -1 && errno == EINVAL,
		    "Restore of a collection without a vCPU: expected -1 with EINVAL (%d), got %d with %d",
		    EINVAL, ret, errno);
	run_vcpu(vcpus[0], guest_map_other_ids);

	run_vcpu(vcpus[0], guest_movi_ids);
	check_event("MOVI", 0, 3);
	run_vcpu(vcpus[0], guest_movall_ids);
	check_event("MOVALL", 0, 1);
	check_event("MOVALL", 3, 1);
	run_vcpu(vcpus[0], guest_mapc_unmap_hole);
	check_msi("MAPC V=0", doorbell(&its[0]), DEV_A, 1, &unmapped);

	destroy_vm();
}

static void guest_mapti_a0(void)
{
	its_send_mapti(&its[0], DEV_A, 0, 0, LPI_A0);
}

/* Map an event of the second ITS to LPI_A0 as well. */
static void guest_map_shared(void)
{
	its_send_mapc(&its[1], 0, 1, true);
	its_send_mapd(&its[1], DEV_A, itt(2), EVENT_BITS, true);
	its_send_mapti(&its[1], DEV_A, 0, 0, LPI_A0);
}

static void guest_discard_shared(void)
{
	its_send_discard(&its[1], DEV_A, 0);
}

static void check_vm_stat(const char *what, const char *name, uint64_t expected)
{
	uint64_t stat = vm_get_stat(vm, name);

	TEST_ASSERT(stat == expected, "%s: expected %s to be %lu, got %lu", what,
		    name, expected, stat);
}

static void make_pending(uint64_t doorbell, uint32_t device_id)
{
	int ret = signal_msi(doorbell, device_id, 0);

	TEST_ASSERT(ret == 1, "Expected KVM_SIGNAL_MSI to return 1, got %d", ret);
}

/* Every LPI that is allocated is mapped by an ITE. */
static void check_no_unmapped_lpi(const char *what)
{
	check_vm_stat(what, "lpis_allocated", vm_get_stat(vm, "lpis"));
}

/*
 * LPI_A0 is pending when its event is unmapped.  It must not be delivered, and
 * must not wait for vCPU 0 to run in order to be freed.
 */
static void test_unmap_pending(const char *what, void (*unmap)(void))
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], unmap);
	check_no_unmapped_lpi(what);
	check_delivered(what, 0, 0);

	destroy_vm();
}

TEST(reset_pending)
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	host_reset();
	check_vm_stat("reset with an LPI pending", "lpis_allocated", 0);
	check_delivered("reset with an LPI pending", 0, 0);

	destroy_vm();
}

/* vCPU 1 becomes the target.  It must not take the LPI before the second command. */
static void guest_movi_discard(void)
{
	local_irq_disable();
	its_send_movi(&its[0], DEV_A, 0, 1);
	its_send_discard(&its[0], DEV_A, 0);
	local_irq_enable();
}

static void guest_movall_discard(void)
{
	local_irq_disable();
	its_send_movall(&its[0], 0, 1);
	its_send_discard(&its[0], DEV_A, 0);
	local_irq_enable();
}

/* DISCARD has no effect on an event whose collection is not mapped. */
static void guest_mapc_mapd_unmap(void)
{
	its_send_mapc(&its[0], 0, 0, false);
	guest_mapd_unmap();
}

static void guest_lpis_disable_discard(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, false);
	its_send_discard(&its[0], DEV_A, 0);
}

#define CMDQ_NR_COMMANDS	(ITS_CMDQ_SIZE / 32)
/* Two entries are left, and contain SYNC. */
#define CMDQ_NR_ROUNDS		(CMDQ_NR_COMMANDS / 3)

/* An event of a device that guest_map() has mapped */
#define MANY_EVENT		9

static void guest_fill_cmdq(void)
{
	int i;

	for (i = 0; i < CMDQ_NR_ROUNDS; i++) {
		its_send_mapti(&its[0], DEV_A, MANY_EVENT, 0, LPI_NEW);
		its_send_int(&its[0], DEV_A, MANY_EVENT);
		its_send_discard(&its[0], DEV_A, MANY_EVENT);
	}
	for (i = CMDQ_NR_ROUNDS * 3; i < CMDQ_NR_COMMANDS; i++)
		its_send_sync(&its[0], 0);
}

/*
 * Execute all commands in the queue again, except the last one: the queue is empty
 * if GITS_CWRITER equals GITS_CREADR.  The next call starts with that command.
 */
static void guest_rerun_cmdq(void)
{
	its[0].cwriter = (its[0].cwriter + ITS_CMDQ_SIZE - 32) % ITS_CMDQ_SIZE;
	writeq(its[0].cwriter, (void *)(its[0].base + GITS_CWRITER));
	GUEST_ASSERT_EQ(readq((void *)(its[0].base + GITS_CREADR)), its[0].cwriter);
}

/*
 * The guest repeats MAPTI, INT and DISCARD.  The target vCPU does not run, so it
 * does not take the LPIs off its ap_list.  The number of LPIs must not grow.
 */
static uint64_t nr_rounds = 10 * CMDQ_NR_ROUNDS;

TEST(unmap_pending_many)
{
	uint64_t round;

	create_vm();

	run_vcpu(vcpus[1], guest_fill_cmdq);
	check_no_unmapped_lpi("MAPTI, INT, DISCARD");
	for (round = CMDQ_NR_ROUNDS; round < nr_rounds; round += CMDQ_NR_ROUNDS) {
		run_vcpu(vcpus[1], guest_rerun_cmdq);
		check_no_unmapped_lpi("MAPTI, INT, DISCARD, again");
	}
	pr_info("%lu LPIs unmapped while pending\n", round);

	destroy_vm();
}

static uint32_t read_hppir(void)
{
	return read_sysreg_s(SYS_ICC_HPPIR1_EL1);
}

/*
 * vCPU 0 waits, with IRQs masked, until LPI_A0 is in a list register, and then
 * until vCPU 1 has executed held_command.
 */
static void guest_hold_lpi(void)
{
	local_irq_disable();
	WRITE_ONCE(hold_stage, HOLD_READY);
	while (read_hppir() != LPI_A0)
		;
	WRITE_ONCE(hold_stage, HOLD_HELD);
	while (READ_ONCE(hold_stage) != HOLD_COMMAND_DONE)
		;
	isb();
	WRITE_ONCE(hppir, read_hppir());
	local_irq_enable();
}

static void guest_held_command(void)
{
	held_command();
	dsb(ish);
	WRITE_ONCE(hold_stage, HOLD_COMMAND_DONE);
}

static void *hold_thread(void *arg)
{
	vcpu_run_to_sync(vcpus[0]);
	return NULL;
}

/* Run guest_hold_lpi() on vCPU 0 until the vCPU has LPI_A0 in a list register. */
static pthread_t start_holding(enum hold_stage *stage)
{
	pthread_t thread;

	WRITE_ONCE(*stage, HOLD_NONE);
	set_command(guest_hold_lpi);
	thread = start_thread(hold_thread, NULL);
	wait_for(READ_ONCE(*stage) == HOLD_READY);
	make_pending(doorbell(&its[0]), DEV_A);
	wait_for(READ_ONCE(*stage) == HOLD_HELD);
	return thread;
}

/*
 * LPI_A0 is in a list register of vCPU 0, which runs, when vCPU 1 executes a command
 * after which vCPU 0 must not take the LPI any more.  vCPU 1 takes it if @moved.  A tick
 * can make vCPU 0 leave the guest at the right time by chance, so try it several times.
 */
static void test_in_list_register_of(void (*create)(void), const char *what,
				     void (*command)(void), void (*undo)(void),
				     bool moved)
{
	enum hold_stage *stage;
	pthread_t thread;
	int i;

	create();
	held_command = command;
	sync_global_to_guest(vm, held_command);
	stage = addr_gva2hva(vm, (vm_vaddr_t)&hold_stage);

	for (i = 0; i < 20; i++) {
		thread = start_holding(stage);
		run_vcpu(vcpus[1], guest_held_command);
		join_thread(thread, "vCPU 0");

		sync_global_from_guest(vm, hppir);
		TEST_ASSERT(hppir == IAR_SPURIOUS,
			    "%s, LPI in a list register: expected INTID %u to be pending, got %u",
			    what, IAR_SPURIOUS, hppir);
		check_delivered(what, moved ? LPI_A0 : 0, 1);

		run_vcpu(vcpus[1], undo);
		check_msi(what, doorbell(&its[0]), DEV_A, 0, &msis[0].result);
	}

	destroy_vm();
}

static void test_in_list_register(const char *what, void (*command)(void),
				  void (*undo)(void), bool moved)
{
	test_in_list_register_of(create_vm, what, command, undo, moved);
	test_in_list_register_of(create_vm_swapped_ids, what, command, undo, moved);
}

static void guest_lpis_enable(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, true);
}

/*
 * The INTID of a pending LPI is mapped again before vCPU 0 runs.  The new LPI must
 * not inherit any state of the old one.
 */
TEST(remap_pending)
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_discard);
	run_vcpu(vcpus[1], guest_mapti_a0);
	check_delivered("DISCARD of a pending LPI, MAPTI", 0, 0);
	check_msi("after DISCARD of a pending LPI, MAPTI", doorbell(&its[0]),
		  DEV_A, 0, &msis[0].result);

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_discard);
	run_vcpu(vcpus[1], guest_mapti_a0);
	make_pending(doorbell(&its[0]), DEV_A);
	check_delivered("both LPIs of an INTID pending", LPI_A0, 0);

	destroy_vm();
}

/*
 * LPIs are unmapped while the guest handles them.  They must not keep their list
 * registers.  A GIC has at most 16, so the 17th LPI would not be delivered.
 */
TEST(unmap_active)
{
	int i;

	create_vm();

	for (i = 0; i < 17; i++) {
		set_before_eoi(guest_stop);
		make_pending(doorbell(&its[0]), DEV_A);
		run_vcpu(vcpus[0], NULL);

		run_vcpu(vcpus[1], guest_discard);
		run_vcpu(vcpus[1], guest_mapti_a0);

		set_before_eoi(NULL);
		check_delivered("DISCARD of an active LPI, MAPTI", LPI_A0, 0);
	}
	check_msi("after DISCARD of active LPIs", doorbell(&its[0]), DEV_A, 0,
		  &msis[0].result);

	destroy_vm();
}

/*
 * LPIs are disabled and enabled again while the guest handles one.  The LPI must
 * not stay active, or it would never be delivered again.
 */
TEST(disable_active)
{
	create_vm();

	/* Disabled by the other vCPU */
	set_before_eoi(guest_stop);
	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[0], NULL);
	run_vcpu(vcpus[1], guest_lpis_disable_enable);
	set_before_eoi(NULL);
	check_delivered("EnableLPIs cleared, set with an LPI active", LPI_A0, 0);
	check_msi("after EnableLPIs was cleared, set with an LPI active",
		  doorbell(&its[0]), DEV_A, 0, &msis[0].result);

	/* Disabled by the vCPU that handles the LPI */
	set_before_eoi(guest_lpis_disable_enable);
	make_pending(doorbell(&its[0]), DEV_A);
	check_delivered("EnableLPIs cleared, set by the handler", LPI_A0, 0);
	set_before_eoi(NULL);
	check_msi("after EnableLPIs was cleared, set by the handler",
		  doorbell(&its[0]), DEV_A, 0, &msis[0].result);

	destroy_vm();
}

static void guest_config_enable(void)
{
	guest_config_lpi(LPI_A0, LPI_PROP_PRIO | LPI_PROP_ENABLED);
	its_send_inv(&its[0], DEV_A, 0);
}

/*
 * An LPI that is disabled in the configuration table is pending when its
 * redistributor disables LPIs.
 */
TEST(disable_pending)
{
	create_vm();

	run_vcpu(vcpus[1], guest_config_inv);
	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_lpis_disable_enable);
	run_vcpu(vcpus[1], guest_config_enable);
	check_delivered("EnableLPIs cleared, set with a disabled LPI pending", 0, 0);
	check_msi("after EnableLPIs was cleared, set with a disabled LPI pending",
		  doorbell(&its[0]), DEV_A, 0, &msis[0].result);

	destroy_vm();
}

/* An LPI is mapped until its last ITE is removed, on either ITS. */
TEST(shared_lpi)
{
	const struct result shared = A0, unmapped = UNMAPPED;

	create_vm();

	run_vcpu(vcpus[1], guest_map_shared);
	check_vm_stat("shared LPI", "lpis", ARRAY_SIZE(msis));
	check_msi("shared LPI, second ITS", doorbell(&its[1]), DEV_A, 0, &shared);

	make_pending(doorbell(&its[1]), DEV_A);
	run_vcpu(vcpus[1], guest_discard);
	check_delivered("shared LPI, pending, DISCARD on the first ITS", LPI_A0, 0);
	check_msi("shared LPI, first ITS", doorbell(&its[0]), DEV_A, 0, &unmapped);
	check_msi("shared LPI, second ITS, after DISCARD on the first one",
		  doorbell(&its[1]), DEV_A, 0, &shared);

	make_pending(doorbell(&its[1]), DEV_A);
	run_vcpu(vcpus[1], guest_discard_shared);
	check_delivered("shared LPI, pending, DISCARD on both ITSes", 0, 0);
	check_vm_stat("shared LPI, DISCARD on both ITSes", "lpis",
		      ARRAY_SIZE(msis) - 1);
	check_no_unmapped_lpi("shared LPI, DISCARD on both ITSes");

	destroy_vm();
}

TEST(restore_pending)
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, NULL);
	host_save_restore();
	check_vm_stat("restored", "lpis", ARRAY_SIZE(msis));
	check_delivered("restored pending", LPI_A0, 0);

	host_reset();
	check_vm_stat("reset", "lpis", 0);

	destroy_vm();
}

static void write_eventfd(int fd)
{
	uint64_t one = 1;
	ssize_t ret = write(fd, &one, sizeof(one));

	TEST_ASSERT(ret == sizeof(one), __KVM_SYSCALL_ERROR("write()", (int)ret));
}

static void check_injected(const char *what, uint64_t hits, uint64_t misses,
			   uint64_t fallbacks)
{
	uint64_t stat;

	stat = vcpu_get_stat(vcpus[0], "lpi_translation_hits");
	TEST_ASSERT(stat == hits,
		    "%s: expected lpi_translation_hits to be %lu, got %lu", what,
		    hits, stat);
	check_vm_stat(what, "lpi_translation_misses", misses);
	check_vm_stat(what, "lpi_inatomic_fallbacks", fallbacks);
}

/* fds[0] raises a mapped event, fds[1] an unmapped one. */
static void create_irqfds(int fds[2])
{
	struct kvm_irq_routing *routing = kvm_gsi_routing_create();
	int i;

	kvm_gsi_routing_msi_add(routing, 0, doorbell(&its[0]), DEV_A, 0);
	kvm_gsi_routing_msi_add(routing, 1, doorbell(&its[0]), DEV_A, 5);
	kvm_gsi_routing_write(vm, routing);
	for (i = 0; i < 2; i++)
		fds[i] = kvm_irqfd_create(vm, i);
}

/*
 * An MSI via irqfd is injected or refused in atomic context, before write() returns,
 * also if it is the first one of its event.  There is no fallback to the workqueue.
 */
TEST(irqfd)
{
	int fds[2];

	create_vm();
	create_irqfds(fds);

	check_injected("before any MSI", 0, 0, 0);
	write_eventfd(fds[0]);
	check_injected("first MSI via irqfd", 1, 0, 0);
	check_delivered("first MSI via irqfd", LPI_A0, 0);

	write_eventfd(fds[1]);
	check_injected("unmapped event via irqfd", 1, 1, 0);
	check_delivered("unmapped event via irqfd", 0, 0);

	run_vcpu(vcpus[1], guest_discard);
	run_vcpu(vcpus[1], guest_mapti_a0);
	write_eventfd(fds[0]);
	check_injected("first MSI via irqfd after DISCARD, MAPTI", 2, 1, 0);
	check_delivered("first MSI via irqfd after DISCARD, MAPTI", LPI_A0, 0);

	host_save_restore();
	write_eventfd(fds[0]);
	check_injected("first MSI via irqfd after a restore", 3, 1, 0);
	check_delivered("first MSI via irqfd after a restore", LPI_A0, 0);

	run_vcpu(vcpus[1], guest_its_disable);
	write_eventfd(fds[0]);
	check_injected("ITS disabled", 3, 2, 0);
	check_delivered("ITS disabled", 0, 0);

	close(fds[0]);
	close(fds[1]);
	destroy_vm();
}

/* Number of rounds of MSIs that the threads below have raised */
static uint64_t nr_raised;
static bool stop_raising;

static void *signal_thread(void *arg)
{
	struct kvm_msi msi = {
		.address_lo	= doorbell(&its[0]),
		.flags		= KVM_MSI_VALID_DEVID,
		.devid		= DEV_A,
	};
	int fd = *(int *)arg, ret;

	do {
		ret = ioctl(fd, KVM_SIGNAL_MSI, &msi);
		TEST_ASSERT(ret == 1, "Expected KVM_SIGNAL_MSI to return 1, got %d",
			    ret);
		WRITE_ONCE(nr_raised, nr_raised + 1);
	} while (!READ_ONCE(stop_raising));
	return NULL;
}

static void *irqfd_thread(void *arg)
{
	int *fds = arg;

	do {
		write_eventfd(fds[0]);
		write_eventfd(fds[1]);
		WRITE_ONCE(nr_raised, nr_raised + 1);
	} while (!READ_ONCE(stop_raising));
	return NULL;
}

/* The thread raises MSIs until destroy_vm() has returned. */
static void destroy_while_raising(void *(*thread_fn)(void *), int *fds)
{
	pthread_t thread;

	nr_raised = 0;
	stop_raising = false;
	thread = start_thread(thread_fn, fds);
	wait_for(READ_ONCE(nr_raised));

	destroy_vm();

	WRITE_ONCE(stop_raising, true);
	join_thread(thread, "MSIs");
}

/* Destroy VMs with LPIs pending, and while MSIs are raised. */
TEST(destroy)
{
	int fds[2], i;

	create_vm();
	for (i = 0; i < ARRAY_SIZE(msis); i++)
		signal_msi(doorbell(&its[0]), msis[i].device_id, msis[i].event_id);
	run_vcpu(vcpus[1], guest_discard);
	destroy_vm();

	/* Everything except the VM itself, which the duplicate keeps alive */
	create_vm();
	fds[0] = dup(vm->fd);
	TEST_ASSERT(fds[0] >= 0, __KVM_SYSCALL_ERROR("dup()", fds[0]));
	destroy_while_raising(signal_thread, fds);
	close(fds[0]);

	/* The VM as well: eventfds hold no reference to it. */
	create_vm();
	create_irqfds(fds);
	destroy_while_raising(irqfd_thread, fds);
	for (i = 0; i < ARRAY_SIZE(fds); i++) {
		write_eventfd(fds[i]);
		close(fds[i]);
	}
}

/*
 * Devices and LPIs with IDs that are far apart, so that each of them needs new
 * nodes in the xarrays.  A node has up to 64 slots.
 */
#define FAR_DEVICE(i)	(0x4000 + 64 * (i))
#define FAR_LPI(i)	(LPI_BASE + 0x4000 + 64 * (i))
#define NR_FAR		256

/* Shared with the guest: index of the device and of the LPI to map */
static uint32_t far;

static void guest_mapd_far(void)
{
	its_send_mapd(&its[0], FAR_DEVICE(far), itt(3), EVENT_BITS, true);
}

static void guest_mapti_far(void)
{
	its_send_mapti(&its[0], FAR_DEVICE(far), 0, 0, FAR_LPI(far));
}

static void guest_map_far(void)
{
	guest_mapd_far();
	guest_mapti_far();
}

static void guest_discard_far(void)
{
	its_send_discard(&its[0], FAR_DEVICE(far), 0);
}

static void set_far(uint32_t i)
{
	far = i;
	sync_global_to_guest(vm, far);
}

static void guest_touch_cmdq(void)
{
	int i;

	/* Map the whole queue at stage 2, so that no command needs memory for that. */
	for (i = 0; i < ITS_CMDQ_SIZE / 32; i++)
		its_send_sync(&its[0], 0);
}

#define FAILSLAB	"/sys/kernel/debug/failslab/"

/*
 * Fail each memory allocation of a MAPTI in turn.  Afterwards the event is either
 * mapped, or nothing is left of it.
 */
TEST(mapti_nomem)
{
	const struct result mapped = DELIVERED(FAR_LPI(0), 0), unmapped = UNMAPPED;
	int fd = open("/proc/thread-self/fail-nth", O_RDWR);
	int nth, attempt, last_failed = 0, nr_failed = 0;
	char buf[16];

	__TEST_REQUIRE(fd >= 0 &&
		       write_text(FAILSLAB "ignore-gfp-wait", "N") &&
		       write_text(FAILSLAB "verbose", "0"),
		       "needs a kernel with FAILSLAB");

	create_vm();
	set_far(0);
	run_vcpu(vcpus[1], guest_map_far);
	check_msi("with memory", doorbell(&its[0]), FAR_DEVICE(0), 0, &mapped);
	run_vcpu(vcpus[1], guest_discard_far);

	/* Three attempts each: now and then, KVM_RUN makes another allocation before. */
	for (attempt = 0; ; attempt++) {
		nth = 1 + attempt / 3;
		set_command(guest_mapti_far);

		snprintf(buf, sizeof(buf), "%d", nth);
		TEST_ASSERT(pwrite(fd, buf, strlen(buf), 0) == strlen(buf),
			    "Failed to write fail-nth, errno: %d", errno);
		while (_vcpu_run(vcpus[1]))
			TEST_ASSERT(errno == ENOMEM,
				    "Expected KVM_RUN to fail with %d, got %d",
				    ENOMEM, errno);
		TEST_ASSERT(pread(fd, buf, sizeof(buf), 0) > 0,
			    "Failed to read fail-nth, errno: %d", errno);
		TEST_ASSERT(pwrite(fd, "0", 1, 0) == 1,
			    "Failed to reset fail-nth, errno: %d", errno);
		TEST_ASSERT(get_ucall(vcpus[1], NULL) == UCALL_SYNC,
			    "Expected the guest to go on");

		if (vm_get_stat(vm, "lpis") == ARRAY_SIZE(msis)) {
			nr_failed += nth != last_failed;
			last_failed = nth;
			check_msi("MAPTI without memory", doorbell(&its[0]),
				  FAR_DEVICE(0), 0, &unmapped);
		} else {
			check_vm_stat("MAPTI", "lpis", ARRAY_SIZE(msis) + 1);
			check_msi("MAPTI with memory", doorbell(&its[0]),
				  FAR_DEVICE(0), 0, &mapped);
			run_vcpu(vcpus[1], guest_discard_far);
			check_vm_stat("DISCARD", "lpis", ARRAY_SIZE(msis));
		}

		/* fail-nth is not 0 if MAPTI made fewer than nth allocations. */
		if (atoi(buf))
			break;
	}

	/*
	 * MAPTI fails if the ITE and its LPI cannot be allocated.  xarrays retry the
	 * allocation of a node.
	 */
	TEST_ASSERT(nr_failed, "Expected at least one MAPTI to fail, got none");
	pr_info("MAPTI without memory: failed in %d of %d ways\n", nr_failed,
		nth - 1);
	destroy_vm();

	write_text(FAILSLAB "ignore-gfp-wait", "Y");
	write_text(FAILSLAB "verbose", "2");
	close(fd);
}

/*
 * Fail all memory allocations of a MAPD and a MAPTI after the first n bytes, and
 * increase n until both succeed.  This cannot show leaks: without memory for its
 * own records, kmemleak uses a static pool and treats what it writes there as
 * references.
 */
TEST(map_out_of_memory)
{
	const struct result unmapped = UNMAPPED;
	int fd = open("/proc/thread-self/make-it-fail", O_RDWR);
	struct result mapped = DELIVERED(0, 0);
	uint64_t lpis;
	char buf[16];
	int i, ret;

	__TEST_REQUIRE(fd >= 0 &&
		       write_text(FAILSLAB "task-filter", "Y") &&
		       write_text(FAILSLAB "ignore-gfp-wait", "N") &&
		       write_text(FAILSLAB "verbose", "0") &&
		       write_text(FAILSLAB "times", "1000000") &&
		       write_text(FAILSLAB "probability", "100"),
		       "needs a kernel with FAILSLAB");

	create_vm();
	run_vcpu(vcpus[1], guest_touch_cmdq);
	/* Avoid page faults, which need memory. */
	TEST_ASSERT(!mlockall(MCL_CURRENT | MCL_FUTURE),
		    "mlockall() failed, errno: %d", errno);

	for (i = 0; i < NR_FAR; i++) {
		set_far(i);
		set_command(guest_map_far);

		snprintf(buf, sizeof(buf), "%d", i * 64);
		TEST_ASSERT(write_text(FAILSLAB "space", buf),
			    "Failed to write space, errno: %d", errno);
		TEST_ASSERT(pwrite(fd, "1", 1, 0) == 1,
			    "Failed to set make-it-fail, errno: %d", errno);
		ret = _vcpu_run(vcpus[1]);
		TEST_ASSERT(pwrite(fd, "0", 1, 0) == 1,
			    "Failed to reset make-it-fail, errno: %d", errno);
		TEST_ASSERT(!ret && get_ucall(vcpus[1], NULL) == UCALL_SYNC,
			    "Expected KVM_RUN to return 0 and the guest to go on, got %d, errno %d",
			    ret, errno);

		lpis = vm_get_stat(vm, "lpis");
		if (lpis != ARRAY_SIZE(msis))
			break;
		check_msi("out of memory", doorbell(&its[0]), FAR_DEVICE(i), 0,
			  &unmapped);
	}

	TEST_ASSERT(i > 0 && i < NR_FAR,
		    "Expected an event to be mapped with 64 to %d bytes, got %d",
		    (NR_FAR - 1) * 64, i * 64);
	check_vm_stat("enough memory", "lpis", ARRAY_SIZE(msis) + 1);
	mapped.intid = FAR_LPI(i);
	check_msi("enough memory", doorbell(&its[0]), FAR_DEVICE(i), 0, &mapped);
	pr_info("Out of memory: MAPD and MAPTI take %d bytes at most\n", i * 64);

	/* An event that could not be mapped can be mapped when there is memory. */
	set_far(0);
	run_vcpu(vcpus[1], guest_map_far);
	mapped.intid = FAR_LPI(0);
	check_msi("memory again", doorbell(&its[0]), FAR_DEVICE(0), 0, &mapped);

	munlockall();
	destroy_vm();

	write_text(FAILSLAB "probability", "0");
	write_text(FAILSLAB "times", "1");
	write_text(FAILSLAB "verbose", "2");
	write_text(FAILSLAB "ignore-gfp-wait", "Y");
	write_text(FAILSLAB "task-filter", "N");
	close(fd);
}

/* More events than fit into the highest limit, and the limits in bytes */
#define NR_MANY		112
#define LIMIT_FIRST	(64 * 1024)
#define LIMIT_LAST	(120 * 1024)
#define LIMIT_STEP	(8 * 1024)

static void guest_map_many(void)
{
	int i;

	for (i = 0; i < NR_MANY; i++) {
		its_send_mapd(&its[0], 0x1000 + i, itt(3), EVENT_BITS, true);
		its_send_mapti(&its[0], 0x1000 + i, 0, 0, LPI_BASE + 0x1000 + i);
	}
}

#define CGROUP_DIR	"/tmp/vgic_its_translation_test.XXXXXX"

static void mount_memcg(char *dir)
{
	mkdir("/tmp", 01777);
	TEST_ASSERT(mkdtemp(dir), "Failed to make %s, errno: %d", dir, errno);
	if (mount("cgroup", dir, "cgroup", 0, "memory")) {
		rmdir(dir);
		skip("needs cgroup v1 for memory");
	}
}

static void unmount_memcg(const char *dir)
{
	umount(dir);
	rmdir(dir);
}

/*
 * Map events in a cgroup until its memory limit is reached.  @dir is the root of
 * the cgroup's hierarchy.
 */
static void test_memcg_limit(const char *dir, int limit)
{
	char group[64], path[128], text[16];
	int ret, limit_fd;
	uint64_t lpis;

	snprintf(group, sizeof(group), "%s/vm", dir);
	TEST_ASSERT(!mkdir(group, 0755), "Failed to make %s, errno: %d", group,
		    errno);

	create_vm();
	run_vcpu(vcpus[1], guest_touch_cmdq);

	/* A page fault of this process would wait for memory forever. */
	TEST_ASSERT(!mlockall(MCL_CURRENT | MCL_FUTURE),
		    "mlockall() failed, errno: %d", errno);
	snprintf(path, sizeof(path), "%s/memory.oom_control", group);
	TEST_ASSERT(write_text(path, "1"), "Failed to write %s", path);
	snprintf(path, sizeof(path), "%s/memory.limit_in_bytes", group);
	snprintf(text, sizeof(text), "%d", limit);
	TEST_ASSERT(write_text(path, text), "Failed to write %s", path);
	/* Open it in advance: at the limit, there is no memory to open files. */
	limit_fd = open(path, O_WRONLY);
	snprintf(path, sizeof(path), "%s/tasks", group);
	snprintf(text, sizeof(text), "%d", getpid());
	TEST_ASSERT(write_text(path, text), "Failed to write %s", path);

	set_command(guest_map_many);
	ret = _vcpu_run(vcpus[1]);

	TEST_ASSERT(write(limit_fd, "-1", 2) == 2,
		    "Failed to lift the memory limit, errno: %d", errno);
	close(limit_fd);
	snprintf(path, sizeof(path), "%s/tasks", dir);
	TEST_ASSERT(write_text(path, text), "Failed to write %s", path);
	munlockall();

	TEST_ASSERT(!ret && get_ucall(vcpus[1], NULL) == UCALL_SYNC,
		    "Expected KVM_RUN to return 0 and the guest to go on, got %d, errno %d",
		    ret, errno);

	lpis = vm_get_stat(vm, "lpis");
	TEST_ASSERT(lpis > ARRAY_SIZE(msis) && lpis < ARRAY_SIZE(msis) + NR_MANY,
		    "Expected some but not all of %d events to be mapped, got %lu",
		    NR_MANY, lpis - ARRAY_SIZE(msis));
	pr_info("Memory limit of %d KiB: mapped %lu of %d events\n", limit / 1024,
		lpis - ARRAY_SIZE(msis), NR_MANY);

	/* Mapped events work, the others do not, and all can be unmapped. */
	check_msi("beyond the memory limit", doorbell(&its[0]), DEV_A, 0,
		  &msis[0].result);
	ret = signal_msi(doorbell(&its[0]), 0x1000, 0);
	TEST_ASSERT(ret == 1, "Mapped: expected KVM_SIGNAL_MSI to return 1, got %d",
		    ret);
	ret = signal_msi(doorbell(&its[0]), 0x1000 + NR_MANY - 1, 0);
	TEST_ASSERT(ret == 0,
		    "Not mapped: expected KVM_SIGNAL_MSI to return 0, got %d", ret);
	host_reset();
	check_vm_stat("reset", "lpis", 0);
	run_vcpu(vcpus[0], guest_map);
	check_vm_stat("mapped again", "lpis", ARRAY_SIZE(msis));
	destroy_vm();

	TEST_ASSERT(!rmdir(group), "Failed to remove %s, errno: %d", group, errno);
}

/*
 * The memory for devices, events and LPIs is charged to the cgroup of the task
 * that runs the vCPU.  Use cgroup v1, where a charge beyond the limit can be made
 * to fail instead of killing the task.  The limit decides which allocation of the
 * last event fails, so try several limits.
 */
TEST(memcg)
{
	char dir[] = CGROUP_DIR;
	int limit;

	mount_memcg(dir);
	for (limit = LIMIT_FIRST; limit <= LIMIT_LAST; limit += LIMIT_STEP)
		test_memcg_limit(dir, limit);
	unmount_memcg(dir);
}

TEST(unmap_pending_discard)
{
	test_unmap_pending("DISCARD of a pending LPI", guest_discard);
}

TEST(unmap_pending_mapd_unmap)
{
	test_unmap_pending("MAPD V=0 with an LPI pending", guest_mapd_unmap);
}

TEST(unmap_pending_lpis_disable_enable)
{
	test_unmap_pending("EnableLPIs cleared, set with an LPI pending",
			   guest_lpis_disable_enable);
}

TEST(unmap_pending_lpis_disable_discard)
{
	test_unmap_pending("EnableLPIs cleared with an LPI pending, DISCARD",
			   guest_lpis_disable_discard);
}

TEST(unmap_pending_discard_mapti_same)
{
	test_unmap_pending("DISCARD of a pending LPI, MAPTI of the same LPI",
			   guest_discard_mapti_same);
}

TEST(unmap_pending_mapd_again)
{
	test_unmap_pending("MAPD V=1 again with an LPI pending", guest_mapd_again);
}

TEST(unmap_pending_movi_discard)
{
	test_unmap_pending("MOVI of a pending LPI, DISCARD", guest_movi_discard);
}

TEST(unmap_pending_movall_discard)
{
	test_unmap_pending("MOVALL of a pending LPI, DISCARD", guest_movall_discard);
}

TEST(unmap_pending_mapc_mapd_unmap)
{
	test_unmap_pending("MAPC V=0, MAPD V=0 with an LPI pending",
			   guest_mapc_mapd_unmap);
}

TEST(unmap_pending_clear_device_baser)
{
	test_unmap_pending("device GITS_BASER cleared with an LPI pending",
			   guest_clear_device_baser);
}

TEST(in_list_register_discard)
{
	test_in_list_register("DISCARD", guest_discard, guest_mapti_a0, false);
}

TEST(in_list_register_clear)
{
	test_in_list_register("CLEAR", guest_clear, NULL, false);
}

static void guest_config_enable_inv(void)
{
	guest_config_lpi(LPI_A0, LPI_PROP_PRIO | LPI_PROP_ENABLED);
	its_send_inv(&its[0], DEV_A, 0);
}

/* The LPI stays pending, and is delivered when it is enabled again. */
TEST(in_list_register_inv)
{
	test_in_list_register("INV of a disabled LPI", guest_config_inv,
			      guest_config_enable_inv, false);
}

TEST(in_list_register_invall)
{
	test_in_list_register("INVALL with a disabled LPI", guest_config_invall,
			      guest_config_enable_inv, false);
}

TEST(in_list_register_lpis_disable)
{
	test_in_list_register("EnableLPIs cleared", guest_lpis_disable,
			      guest_lpis_enable, false);
}

/* Not from gic_v3.h, which counts redistributor offsets differently */
#define GICD_CTLR		0x0000
#define GICD_CTLR_ARE_NS	BIT(4)
#define GICD_CTLR_ENABLE_G1A	BIT(1)

static void guest_gicd_disable(void)
{
	writel(GICD_CTLR_ARE_NS, (void *)(GICD_BASE_GPA + GICD_CTLR));
}

static void guest_gicd_enable(void)
{
	writel(GICD_CTLR_ARE_NS | GICD_CTLR_ENABLE_G1A, (void *)(GICD_BASE_GPA + GICD_CTLR));
}

/*
 * An LPI that is pending when the guest or userspace enables the distributor is
 * delivered.
 */
TEST(distributor_enabled)
{
	uint64_t ctlr = GICD_CTLR_ARE_NS | GICD_CTLR_ENABLE_G1A;

	create_vm();

	run_vcpu(vcpus[1], guest_gicd_disable);
	make_pending(doorbell(&its[0]), DEV_A);
	check_delivered("distributor disabled", 0, 0);
	run_vcpu(vcpus[1], guest_gicd_enable);
	check_delivered("distributor enabled", LPI_A0, 0);

	run_vcpu(vcpus[1], guest_gicd_disable);
	make_pending(doorbell(&its[0]), DEV_A);
	check_delivered("distributor disabled again", 0, 0);
	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, GICD_CTLR, &ctlr);
	check_delivered("distributor enabled by userspace", LPI_A0, 0);

	/* vCPU 1 takes an LPI that it has moved meanwhile, although vCPU 0 does not run. */
	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_gicd_disable);
	run_vcpu(vcpus[1], guest_movi);
	run_vcpu(vcpus[1], guest_gicd_enable);
	run_vcpu(vcpus[1], NULL);
	check_taken("moved while the distributor was disabled", LPI_A0, 1);

	destroy_vm();
}

/* More LPIs than there are list registers, with EventIDs of their own */
#define FIRST_RUNNING		16
#define NR_RUNNING		200
#define RUNNING_EVENT_BITS	8
#define NR_RUNNING_ROUNDS	20
/*
 * The function calls on the CPU of vCPU 0 that are allowed for a command: far less than
 * NR_RUNNING, and more than the kick and other work of the host cause.  The longer the command
 * takes, the more other calls there are.
 */
#define MAX_CALLS		4
#define MS_PER_CALL		20

static void guest_map_running(void)
{
	uint32_t i;

	its_send_mapd(&its[0], DEV_A, itt(3), RUNNING_EVENT_BITS, true);
	its_send_mapti(&its[0], DEV_A, 0, 0, LPI_A0);
	for (i = FIRST_RUNNING; i < FIRST_RUNNING + NR_RUNNING; i++)
		its_send_mapti(&its[0], DEV_A, i, 0, LPI_BASE + i);
}

static void guest_int_running(void)
{
	uint32_t i;

	for (i = FIRST_RUNNING; i < FIRST_RUNNING + NR_RUNNING; i++)
		its_send_int(&its[0], DEV_A, i);
}

/*
 * The number of function calls that other CPUs have sent to the first CPU.  KVM sends one to
 * kick a vCPU and to wait for it.
 */
static uint64_t get_nr_calls(void)
{
	FILE *f = fopen("/proc/interrupts", "r");
	uint64_t nr_calls;
	char *line = NULL;
	size_t size = 0;

	TEST_ASSERT(f, "Open /proc/interrupts: %s", strerror(errno));
	do {
		TEST_ASSERT(getline(&line, &size, f) > 0,
			    "/proc/interrupts has no line \"Function call interrupts\"");
	} while (!strstr(line, "Function call interrupts"));

	TEST_ASSERT(sscanf(line, "%*[^:]: %lu", &nr_calls) == 1, "Unexpected line: %s", line);
	free(line);
	fclose(f);
	return nr_calls;
}

/*
 * The vCPU on which the LPIs of a device are pending is not kicked for each of them when the
 * device is unmapped.  This shows only while both vCPUs run, so try it several times.
 */
TEST(unmap_running)
{
	uint64_t calls, max_calls, nr_calls = 0, elapsed_ns = 0;
	enum hold_stage *stage;
	struct timespec start;
	pthread_t thread;
	cpu_set_t cpus;
	int i;

	CPU_ZERO(&cpus);
	CPU_SET(0, &cpus);
	create_vm();
	held_command = guest_mapd_unmap;
	sync_global_to_guest(vm, held_command);
	stage = addr_gva2hva(vm, (vm_vaddr_t)&hold_stage);

	for (i = 0; i < NR_RUNNING_ROUNDS; i++) {
		run_vcpu(vcpus[1], guest_map_running);
		thread = start_holding(stage);
		TEST_ASSERT(!pthread_setaffinity_np(thread, sizeof(cpus), &cpus),
			    "Moving vCPU 0 to CPU 0 failed");
		run_vcpu(vcpus[1], guest_int_running);

		clock_gettime(CLOCK_MONOTONIC, &start);
		calls = get_nr_calls();
		run_vcpu(vcpus[1], guest_held_command);
		nr_calls += get_nr_calls() - calls;
		elapsed_ns += timespec_to_ns(timespec_elapsed(start));

		join_thread(thread, "vCPU 0");
		check_delivered("MAPD, many LPIs pending", 0, 0);
	}
	max_calls = NR_RUNNING_ROUNDS * MAX_CALLS + elapsed_ns / 1000000 / MS_PER_CALL;
	TEST_ASSERT(nr_calls <= max_calls,
		    "%u times MAPD, %u LPIs pending: expected at most %lu calls on CPU 0, got %lu",
		    NR_RUNNING_ROUNDS, NR_RUNNING, max_calls, nr_calls);

	destroy_vm();
}

static void guest_movi_back(void)
{
	its_send_movi(&its[0], DEV_A, 0, 0);
}

static void guest_movall_back(void)
{
	its_send_movall(&its[0], 1, 0);
}

static void guest_mapc_back(void)
{
	its_send_mapc(&its[0], 0, 0, true);
}

TEST(in_list_register_movi)
{
	test_in_list_register("MOVI", guest_movi, guest_movi_back, true);
}

TEST(in_list_register_movall)
{
	test_in_list_register("MOVALL", guest_movall, guest_movall_back, true);
}

TEST(in_list_register_mapc)
{
	test_in_list_register("MAPC, other target", guest_mapc_retarget,
			      guest_mapc_back, true);
}

static void guest_lpis_disable_own(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 1, false);
}

static void guest_lpis_enable_own(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 1, true);
}

/* vCPU 1 does not take the LPI when it enables LPIs, either. */
static void guest_lpis_disable_own_movi(void)
{
	guest_lpis_disable_own();
	guest_movi();
}

static void guest_lpis_enable_own_movi_back(void)
{
	guest_lpis_enable_own();
	guest_movi_back();
}

TEST(in_list_register_movi_disabled)
{
	test_in_list_register("EnableLPIs of the target cleared, MOVI",
			      guest_lpis_disable_own_movi,
			      guest_lpis_enable_own_movi_back, false);
}

/*
 * LPI_A0 is pending on vCPU 0, which does not run, when vCPU 1 moves it to itself.
 * vCPU 1 must take it without waiting for vCPU 0.
 */
static void test_move_pending(const char *what, void (*move)(void))
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], move);
	run_vcpu(vcpus[1], NULL);
	check_taken(what, LPI_A0, 1);
	check_delivered(what, 0, 0);

	destroy_vm();
}

TEST(move_pending_movi)
{
	test_move_pending("MOVI of a pending LPI", guest_movi);
}

TEST(move_pending_movall)
{
	test_move_pending("MOVALL of a pending LPI", guest_movall);
}

TEST(move_pending_mapc)
{
	test_move_pending("MAPC, other target, with an LPI pending",
			  guest_mapc_retarget);
}

/* vCPU 0 disables LPIs after the LPI has left. */
static void guest_movi_lpis_disable(void)
{
	guest_movi();
	guest_lpis_disable();
}

TEST(move_pending_movi_lpis_disable)
{
	test_move_pending("MOVI of a pending LPI, EnableLPIs of the source cleared",
			  guest_movi_lpis_disable);
}

static void guest_clear_movi(void)
{
	guest_clear();
	guest_movi();
}

/*
 * CLEAR and MOVI leave the LPI on the ap_list of vCPU 0, which does not run.  The next
 * MSI must reach vCPU 1 nevertheless.
 */
TEST(move_cleared)
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_clear_movi);
	check_taken("CLEAR of a pending LPI, MOVI", 0, 0);
	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], NULL);
	check_taken("MSI after CLEAR, MOVI", LPI_A0, 1);
	check_delivered("MSI after CLEAR, MOVI", 0, 0);

	destroy_vm();
}

/*
 * A redistributor with LPIs disabled ignores commands, so a pending LPI that is moved
 * to it is not pending any more.
 */
static void test_move_disabled(const char *what, void (*move)(void))
{
	const struct result moved = DELIVERED(LPI_A0, 1);

	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_lpis_disable_own);
	run_vcpu(vcpus[1], move);
	check_delivered(what, 0, 0);
	run_vcpu(vcpus[1], guest_lpis_enable_own);
	check_delivered(what, 0, 0);
	check_msi(what, doorbell(&its[0]), DEV_A, 0, &moved);

	destroy_vm();
}

TEST(move_disabled_movi)
{
	test_move_disabled("EnableLPIs of the target cleared, MOVI", guest_movi);
}

TEST(move_disabled_movall)
{
	test_move_disabled("EnableLPIs of the target cleared, MOVALL", guest_movall);
}

TEST(move_disabled_mapc)
{
	test_move_disabled("EnableLPIs of the target cleared, MAPC",
			   guest_mapc_retarget);
}

/* The LPI must not be pending when it comes back, either. */
static void guest_movi_forth_and_back(void)
{
	guest_movi();
	guest_movi_back();
}

TEST(move_disabled_movi_back)
{
	create_vm();

	make_pending(doorbell(&its[0]), DEV_A);
	run_vcpu(vcpus[1], guest_lpis_disable_own);
	run_vcpu(vcpus[1], guest_movi_forth_and_back);
	check_delivered("EnableLPIs of the target cleared, MOVI, MOVI back", 0, 0);
	check_msi("EnableLPIs of the target cleared, MOVI, MOVI back",
		  doorbell(&its[0]), DEV_A, 0, &msis[0].result);

	destroy_vm();
}

/* The byte that contains the bit of LPI_A0, in pending table @table */
static uint8_t *pending_byte(uint32_t table)
{
	return addr_gpa2hva(vm, tables.pending + table * SZ_64K + LPI_A0 / 8);
}

#define PENDING_A0	((uint8_t)BIT(LPI_A0 % 8))

static void check_pending_byte(const char *what, uint32_t table)
{
	uint8_t byte = READ_ONCE(*pending_byte(table));

	TEST_ASSERT(byte == PENDING_A0,
		    "%s: expected byte of pending table %u to be %#x, got %#x", what,
		    table, PENDING_A0, byte);
}

/* The pending table that vCPU 1 uses when it enables LPIs; shared with the guest */
static uint32_t pending_table;

/* A pending table that is outside of the memslots */
#define NO_MEMORY	BIT(15)

static void guest_lpis_enable_own_table(void)
{
	writeq(tables.pending + pending_table * SZ_64K,
	       (void *)(GICR_BASE_GPA + SZ_128K + GICR_PENDBASER));
	guest_lpis_enable_own();
}

static void guest_mapti_a0_own(void)
{
	its_send_mapti(&its[0], DEV_A, 0, 1, LPI_A0);
}

/*
 * LPI_A0 is mapped while its target has LPIs disabled, and is pending in the pending
 * table of the target.  KVM must neither use nor change this table, which may be any
 * memory, until the guest enables LPIs with it, or with another one.
 */
static void test_mapti_disabled(const char *what, uint32_t table)
{
	const struct result moved = DELIVERED(LPI_A0, 1);

	create_vm();
	pending_table = table;
	sync_global_to_guest(vm, pending_table);

	run_vcpu(vcpus[1], guest_lpis_disable_own);
	run_vcpu(vcpus[1], guest_discard);
	*pending_byte(1) = PENDING_A0;

	run_vcpu(vcpus[1], guest_mapti_a0_own);
	check_pending_byte(what, 1);
	check_delivered(what, 0, 0);

	run_vcpu(vcpus[1], guest_lpis_enable_own_table);
	check_delivered(what, table == 1 ? LPI_A0 : 0, 1);
	check_msi(what, doorbell(&its[0]), DEV_A, 0, &moved);

	destroy_vm();
}

TEST(mapti_disabled)
{
	test_mapti_disabled("EnableLPIs cleared, MAPTI, EnableLPIs set", 1);
}

TEST(mapti_disabled_other_table)
{
	test_mapti_disabled("EnableLPIs cleared, MAPTI, GICR_PENDBASER, EnableLPIs set",
			    2);
}

static void guest_mapti_a0_no_target(void)
{
	its_send_mapti(&its[0], DEV_A, 0, ICID_UNUSED, LPI_A0);
}

/* Map another event to LPI_A0. */
static void guest_mapti_a0_alias(void)
{
	its_send_mapti(&its[0], DEV_A, 2, 0, LPI_A0);
}

/*
 * The first event of LPI_A0 is mapped to a collection that is not.  The second event
 * brings the target, and with it the pending table.  The tables are restored in the order
 * of the events.
 */
TEST(pending_alias)
{
	create_vm();

	run_vcpu(vcpus[1], guest_discard);
	*pending_byte(0) = PENDING_A0;
	run_vcpu(vcpus[1], guest_mapti_a0_no_target);
	check_delivered("MAPTI to an unmapped collection", 0, 0);
	run_vcpu(vcpus[1], guest_mapti_a0_alias);
	check_delivered("MAPTI of another event", LPI_A0, 0);

	TEST_ASSERT(signal_msi(doorbell(&its[0]), DEV_A, 2) == 1, "MSI refused");
	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, NULL);
	host_save_restore();
	check_delivered("restored pending", LPI_A0, 0);

	destroy_vm();
}

static void guest_mapti_a0_alias_own(void)
{
	its_send_mapti(&its[0], DEV_A, 2, 1, LPI_A0);
}

/*
 * The second event brings a target, but is not mapped, because the target's pending table
 * is not memory.  The third one brings another target.
 */
TEST(failed_alias)
{
	const struct result delivered = DELIVERED(LPI_A0, 0), unmapped = UNMAPPED;

	create_vm();
	pending_table = NO_MEMORY;
	sync_global_to_guest(vm, pending_table);

	run_vcpu(vcpus[1], guest_discard);
	run_vcpu(vcpus[1], guest_mapti_a0_no_target);
	run_vcpu(vcpus[1], guest_lpis_disable_own);
	run_vcpu(vcpus[1], guest_lpis_enable_own_table);
	run_vcpu(vcpus[1], guest_mapti_a0_alias_own);
	check_msi("MAPTI, pending table is not memory", doorbell(&its[0]), DEV_A, 2,
		  &unmapped);
	run_vcpu(vcpus[1], guest_mapti_a0_alias);
	check_msi("MAPTI with another target", doorbell(&its[0]), DEV_A, 2, &delivered);

	destroy_vm();
}

/* The guest has set a bit of the pending table, but not enabled LPIs yet. */
TEST(save_pending_disabled)
{
	create_vm();

	run_vcpu(vcpus[1], guest_lpis_disable);
	*pending_byte(0) = PENDING_A0;
	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, NULL);
	check_pending_byte("EnableLPIs cleared, save", 0);

	destroy_vm();
}

/* KVM_IRQ_LINE is for SPIs.  LPI_A0 is mapped, but its number is not that of an SPI. */
TEST(irq_line_lpi)
{
	struct kvm_irq_level irq = {
		.irq	= KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | LPI_A0,
		.level	= 1,
	};
	int ret;

	create_vm();

	ret = __vm_ioctl(vm, KVM_IRQ_LINE, &irq);
	TEST_ASSERT(ret == -1 && errno == EINVAL,
		    "KVM_IRQ_LINE with the INTID of an LPI: expected -1 with EINVAL (%d), got %d with %d",
		    EINVAL, ret, errno);
	check_delivered("KVM_IRQ_LINE with the INTID of an LPI", 0, 0);

	destroy_vm();
}

/* Raise an MSI by KVM_SIGNAL_MSI, and then via an irqfd. */
static void check_refused(const struct refused *msi)
{
	uint64_t misses = vm_get_stat(vm, "lpi_translation_misses");
	struct kvm_irq_routing *routing = kvm_gsi_routing_create();
	char expected[256];
	int ret, fd;

	snprintf(expected, sizeof(expected),
		 "userspace_pid: %d, doorbell: %#lx, DeviceID: %u, EventID: %u, reason: %s",
		 getpid(), msi->doorbell, msi->device_id, msi->event_id, msi->reason);

	ret = __kvm_signal_msi(vm, msi->doorbell, msi->flags, msi->device_id,
			       msi->event_id);
	TEST_ASSERT(ret == msi->ret, "%s: expected KVM_SIGNAL_MSI to return %d, got %d",
		    msi->name, msi->ret, ret);
	check_trace(msi->name, expected);
	check_vm_stat(msi->name, "lpi_translation_misses", misses + 1);

	kvm_gsi_routing_msi_add(routing, 0, msi->doorbell, msi->device_id,
				msi->event_id);
	routing->entries[0].flags = msi->flags;
	kvm_gsi_routing_write(vm, routing);
	fd = kvm_irqfd_create(vm, 0);
	write_eventfd(fd);
	/* The statistics and the trace show it at once: no worker is involved. */
	check_vm_stat(msi->name, "lpi_inatomic_fallbacks", 0);
	check_vm_stat(msi->name, "lpi_translation_misses", misses + 2);
	check_trace(msi->name, expected);
	close(fd);
}

/* MSIs are refused with the right error, counted and traced, also via irqfd. */
TEST(refused)
{
	static const struct refused msis[] = {
		{ "unmapped device", DB0, DEVID, 5, 0, 0, "unmapped event" },
		{ "unmapped event", DB0, DEVID, DEV_A, 5, 0, "unmapped event" },
		{ "largest IDs", DB0, DEVID, UINT32_MAX, UINT32_MAX, 0, "unmapped event" },
		{ "no KVM_MSI_VALID_DEVID", DB0, 0, DEV_A, 0, -EINVAL, "no DeviceID" },
		{ "next to GITS_TRANSLATER", DB0 + 4, DEVID, DEV_A, 0, -EINVAL,
		  "no doorbell" },
		{ "disabled ITS", DB0 + ITS_FRAME_SIZE, DEVID, DEV_A, 0, -EBUSY,
		  "ITS disabled" },
	};
	static const struct refused collection = {
		"unmapped collection", DB0, DEVID, DEV_A, 0, 0, "unmapped collection",
	}, disabled = {
		"EnableLPIs cleared", DB0, DEVID, DEV_B, 0, -EBUSY, "LPIs disabled",
	};
	char expected[256];
	uint64_t misses;
	int i;

	create_vm();
	trace_start("kvm/vgic_its_refuse_msi");
	run_vcpu(vcpus[1], guest_disable_other_its);
	for (i = 0; i < ARRAY_SIZE(msis); i++)
		check_refused(&msis[i]);

	run_vcpu(vcpus[1], guest_mapti_unmapped_collection);
	check_refused(&collection);
	run_vcpu(vcpus[1], guest_lpis_disable);
	check_refused(&disabled);
	check_delivered("refused MSIs", 0, 0);

	/* An INT command is counted like an MSI. */
	misses = vm_get_stat(vm, "lpi_translation_misses");
	run_vcpu(vcpus[1], guest_int);
	snprintf(expected, sizeof(expected),
		 "userspace_pid: %d, doorbell: %#llx, DeviceID: %u, EventID: %u, reason: %s",
		 getpid(), DB0, DEV_A, 0, "unmapped collection");
	check_trace("INT", expected);
	check_vm_stat("INT", "lpi_translation_misses", misses + 1);

	destroy_vm();
}

TEST(refused_no_its)
{
	static const struct refused msi = {
		"no ITS", DB0, DEVID, DEV_A, 0, -ENODEV, "no ITS",
	};

	create_vm_no_its();

	trace_start("kvm/vgic_its_refuse_msi");
	check_refused(&msi);

	close(gic_fd);
	kvm_vm_free(vm);
}

static void *run_vcpu_thread(void *vcpu)
{
	vcpu_run_to_sync(vcpu);
	return NULL;
}

/* An LPI whose configuration is in a page of its own */
#define LPI_PAGE	(LPI_BASE + 0x4000)

static void guest_mapti_page(void)
{
	its_send_mapti(&its[0], DEV_A, MANY_EVENT, 0, LPI_PAGE);
}

static struct {
	int mapped, unmapped, mapti;
	bool done;
} its_lock_msis;

static void *its_lock_msis_fn(void *unused)
{
	its_lock_msis.mapped = signal_msi(doorbell(&its[0]), DEV_A, 0);
	its_lock_msis.unmapped = signal_msi(doorbell(&its[0]), DEV_A, 5);
	its_lock_msis.mapti = signal_msi(doorbell(&its[0]), DEV_A, MANY_EVENT);
	WRITE_ONCE(its_lock_msis.done, true);
	return NULL;
}

/* Much longer than three MSIs take, and too short for Linux to find a hung task */
#define MSI_LIMIT_NS	10000000000ull

/*
 * MAPTI reads the configuration of the LPI, and holds the its_lock meanwhile.  MSIs are
 * delivered and refused while MAPTI waits for the page.  That of the event of MAPTI makes
 * its LPI pending, and is delivered when MAPTI knows the configuration.
 */
TEST(its_lock_held)
{
	const struct result page = DELIVERED(LPI_PAGE, 0);
	size_t size = getpagesize();
	pthread_t thread, msis;
	void *hva, *config;
	int fds[2], uffd;
	uint64_t start;
	bool done;

	__TEST_REQUIRE(size <= LPI_PAGE - LPI_BASE, "needs pages of 16K or less");

	create_vm();
	create_irqfds(fds);

	hva = addr_gpa2hva(vm, tables.config + LPI_PAGE - LPI_BASE);
	config = malloc(size);
	TEST_ASSERT(config, "malloc() failed");
	memcpy(config, hva, size);
	TEST_ASSERT(!madvise(hva, size, MADV_DONTNEED), "madvise() failed, errno: %d",
		    errno);
	uffd = uffd_register(hva, size, 0);

	set_command(guest_mapti_page);
	thread = start_thread(run_vcpu_thread, vcpus[1]);
	uffd_wait_for_fault(uffd);

	msis = start_thread(its_lock_msis_fn, NULL);
	start = now_ns();
	do {
		done = READ_ONCE(its_lock_msis.done);
	} while (!done && now_ns() - start < MSI_LIMIT_NS);
	if (!done)
		uffd_provide(uffd, hva, config, size);
	join_thread(msis, "MSIs");
	TEST_ASSERT(done, "Expected MSIs not to wait for MAPTI, they did for %llu s",
		    MSI_LIMIT_NS / 1000000000);
	TEST_ASSERT(its_lock_msis.mapped == 1 && !its_lock_msis.unmapped &&
		    its_lock_msis.mapti == 1,
		    "Mapped event, unmapped one, that of MAPTI: expected KVM_SIGNAL_MSI to return 1, 0, 1, got %d, %d, %d",
		    its_lock_msis.mapped, its_lock_msis.unmapped, its_lock_msis.mapti);
	write_eventfd(fds[0]);
	check_injected("mapped event via irqfd", 3, 1, 0);
	write_eventfd(fds[1]);
	check_injected("unmapped event via irqfd", 3, 2, 0);
	run_vcpu(vcpus[0], NULL);
	check_taken("its_lock held", LPI_A0, 0);

	uffd_provide(uffd, hva, config, size);
	join_thread(thread, "MAPTI");
	check_delivered("MSI during MAPTI", LPI_PAGE, 0);
	check_msi("after MAPTI", doorbell(&its[0]), DEV_A, MANY_EVENT, &page);

	close(uffd);
	close(fds[0]);
	close(fds[1]);
	destroy_vm();
	free(config);
}

/* Entries of the tables in guest memory, see arm-vgic-its.rst */
#define TABLE_VALID		BIT_ULL(63)
#define DTE(next, itt, bits)	(TABLE_VALID | (uint64_t)(next) << 49 |		\
				 (itt) >> 8 << 5 | ((bits) - 1))
#define ITE(next, intid, icid)	((uint64_t)(next) << 48 | (uint64_t)(intid) << 16 | (icid))
#define CTE(target, icid)	(TABLE_VALID | (uint64_t)(target) << 16 | (icid))

#define MAX_EVENTS		65536
#define SHARED_BITS		12
#define SHARED_EVENTS		4096
#define MAX_COLLECTIONS		(ITS_COLLECTION_TABLE_SIZE / 8)

/*
 * Restore devices that share an interrupt translation table.  All their events map LPI_A0
 * with collection 0.  All collections target vCPU 0.
 */
static int restore_shared(uint32_t nr_devices, uint32_t event_bits, uint32_t nr_events,
			  uint32_t nr_collections)
{
	uint64_t *dte = addr_gpa2hva(vm, its[0].device_table);
	uint64_t *ite = addr_gpa2hva(vm, itt(0));
	uint64_t *cte = addr_gpa2hva(vm, its[0].collection_table);
	uint32_t i;

	for (i = 0; i < nr_devices; i++)
		dte[i] = DTE(i + 1 < nr_devices, itt(0), event_bits);
	for (i = 0; i < nr_events; i++)
		ite[i] = ITE(i + 1 < nr_events, LPI_A0, 0);
	for (i = 0; i < nr_collections; i++)
		cte[i] = CTE(0, i);
	if (nr_collections < MAX_COLLECTIONS)
		cte[nr_collections] = 0;
	return host_restore();
}

static void check_restore_shared(uint32_t nr_devices, uint32_t event_bits,
				 uint32_t nr_events, uint32_t nr_collections, int expected)
{
	int ret = restore_shared(nr_devices, event_bits, nr_events, nr_collections);

	TEST_ASSERT(ret == expected, "Restore of %u events: expected %d, got %d",
		    nr_devices * nr_events, expected, ret);
}

static int open_its_state(void)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/vgic-its-state@%llx",
		 getpid(), vm->fd, ITS0);
	return open(path, O_RDONLY);
}

/* Check that the file has @nr lines that start with @start, and end with @end. */
static void check_its_state(const char *what, const char *start, const char *end, int nr)
{
	int fd = open_its_state(), found = 0;
	char line[256];
	size_t len;
	FILE *f;

	__TEST_REQUIRE(!access("/sys/kernel/debug/kvm", F_OK), "needs debugfs");
	TEST_ASSERT(fd >= 0, "%s: expected to open vgic-its-state, got errno %d", what, errno);
	f = fdopen(fd, "r");
	while (fgets(line, sizeof(line), f)) {
		len = strcspn(line, "\n");
		line[len] = 0;
		found += !strncmp(line, start, strlen(start)) && len >= strlen(end) &&
			 !strcmp(line + len - strlen(end), end);
	}
	fclose(f);
	TEST_ASSERT(found == nr, "%s: expected %d lines \"%s ... %s\", got %d", what, nr,
		    start, end, found);
}

/* KVM restores no INTID with more bits than GICD_TYPER announces. */
TEST(restore_intid)
{
	static const struct {
		uint32_t intid;
		int ret;
	} rows[] = {
		{ 1U << LPI_ID_BITS, -EINVAL },
		{ 1U << LPI_ID_BITS | LPI_BASE, -EINVAL },
		{ UINT32_MAX, -EINVAL },
		{ LPI_BASE - 1, -EINVAL },
		{ (1U << LPI_ID_BITS) - 1, 0 },
	};
	const struct result unmapped = UNMAPPED;
	uint64_t *dte, *ite, *cte;
	int i, ret;

	create_vm();
	dte = addr_gpa2hva(vm, its[0].device_table);
	ite = addr_gpa2hva(vm, itt(0));
	cte = addr_gpa2hva(vm, its[0].collection_table);

	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		struct result last = DELIVERED(rows[i].intid, 0);

		/* The first event is valid in any case. */
		dte[0] = DTE(0, itt(0), EVENT_BITS);
		ite[0] = ITE(1, LPI_A0, 0);
		ite[1] = ITE(0, rows[i].intid, 0);
		cte[0] = CTE(0, 0);
		cte[1] = 0;
		ret = host_restore();
		TEST_ASSERT(ret == rows[i].ret, "Restore of INTID %#x: expected %d, got %d",
			    rows[i].intid, rows[i].ret, ret);
		check_vm_stat("restore of an INTID", "lpis", ret ? 0 : 2);
		check_its_state("restore of an INTID", ret ? "enabled 1 events 0" :
				"enabled 1 events 2", "", 1);
		check_msi("restore of an INTID", doorbell(&its[0]), 0, 1,
			  ret ? &unmapped : &last);
	}

	destroy_vm();
}

/* An LPI is pending in the pending table.  A restore that fails leaves it pending. */
TEST(restore_retry)
{
	uint64_t *dte, *ite, *cte;
	int ret;

	create_vm();
	dte = addr_gpa2hva(vm, its[0].device_table);
	ite = addr_gpa2hva(vm, itt(0));
	cte = addr_gpa2hva(vm, its[0].collection_table);
	run_vcpu(vcpus[1], guest_discard);
	*pending_byte(0) = PENDING_A0;

	/* The second event is invalid. */
	dte[0] = DTE(0, itt(0), EVENT_BITS);
	ite[0] = ITE(1, LPI_A0, 0);
	ite[1] = ITE(0, LPI_BASE - 1, 0);
	cte[0] = CTE(0, 0);
	cte[1] = 0;
	ret = host_restore();
	TEST_ASSERT(ret == -EINVAL, "Restore of an invalid event: expected %d, got %d",
		    -EINVAL, ret);
	check_pending_byte("restore of an invalid event", 0);

	ite[1] = ITE(0, LPI_A1, 0);
	ret = host_restore();
	TEST_ASSERT(!ret, "Restore after the error: expected 0, got %d", ret);
	check_delivered("restore after an error", LPI_A0, 0);

	destroy_vm();
}

/* More pages of 64K than a flat device table needs, and a two-level one for its first level */
#define DEVICE_TABLE_PAGES	(ITS_DEVICE_TABLE_SIZE / SZ_64K + 1)
#define GITS_BASER_INDIRECT	BIT_ULL(62)
#define NR_DEVICES		(ITS_DEVICE_TABLE_SIZE / 8)
/* Entries of a second-level table, which has 64K */
#define NR_LEVEL2		(SZ_64K / 8)

static void guest_set_device_table(uint64_t flags)
{
	its_disable(&its[0]);
	writeq(GITS_BASER_VALID | flags | its[0].device_table,
	       (void *)(its[0].base + GITS_BASER_DEVICE));
	its_enable(&its[0]);
}

static void guest_flat_device_table(void)
{
	guest_set_device_table(DEVICE_TABLE_PAGES - 1);
}

static void guest_indirect_device_table(void)
{
	guest_set_device_table(GITS_BASER_INDIRECT);
}

/*
 * The last DeviceID is valid.  Behind it, the table has an entry that has no effect,
 * because GITS_TYPER does not announce its DeviceID.  In the flat table, this is the first
 * entry of the collection table.
 */
static void test_restore_device_id(const char *what, bool flat)
{
	const uint32_t last = NR_DEVICES - 1;
	const struct result a0 = A0;
	uint64_t *dte, *ite, *cte;
	int ret;

	create_vm();
	run_vcpu(vcpus[1], flat ? guest_flat_device_table : guest_indirect_device_table);
	dte = addr_gpa2hva(vm, its[0].device_table);
	ite = addr_gpa2hva(vm, itt(0));
	cte = addr_gpa2hva(vm, its[0].collection_table);

	memset(dte, 0, ITS_DEVICE_TABLE_SIZE);
	memset(ite, 0, NR_ITTS * ITT_SIZE);
	ite[0] = ITE(0, LPI_A0, 0);
	cte[0] = CTE(0, 0);
	cte[1] = 0;
	if (flat) {
		dte[last] = DTE(1, itt(0), EVENT_BITS);
	} else {
		/* The entry of the first level that follows the last one is valid, too. */
		uint64_t *level2 = addr_gpa2hva(vm, its[1].device_table);

		dte[last / NR_LEVEL2] = TABLE_VALID | its[1].device_table;
		dte[last / NR_LEVEL2 + 1] = TABLE_VALID | its[1].device_table;
		level2[last % NR_LEVEL2] = DTE(1, itt(0), EVENT_BITS);
	}
	ret = host_restore();
	TEST_ASSERT(!ret, "%s: expected restore to return 0, got %d", what, ret);
	check_its_state(what, "enabled 1 events 1", "", 1);
	check_msi(what, doorbell(&its[0]), last, 0, &a0);

	destroy_vm();
}

TEST(restore_device_id_flat)
{
	test_restore_device_id("flat device table", true);
}

TEST(restore_device_id_indirect)
{
	test_restore_device_id("two-level device table", false);
}

/* The number of MMIO zones and devices of a VM is limited, see NR_IOBUS_DEVS. */
#define MAX_ZONES	2000

static struct kvm_coalesced_mmio_zone mmio_zone(int i)
{
	return (struct kvm_coalesced_mmio_zone) {
		.addr = 0x10000000 + i * 8,
		.size = 4,
	};
}

static uint64_t get_its_address(int fd)
{
	uint64_t addr;

	kvm_device_attr_get(fd, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE, &addr);
	return addr;
}

/* The address of an ITS stays unset if there is no room for the ITS on the MMIO bus. */
TEST(its_address)
{
	uint64_t base = ITS_BASE_GPA, addr;
	struct kvm_coalesced_mmio_zone zone;
	int fd, ret, i;

	create_vm_no_its();
	fd = kvm_create_device(vm, KVM_DEV_TYPE_ARM_VGIC_ITS);
	addr = get_its_address(fd);
	TEST_ASSERT(addr == UINT64_MAX, "Expected no address (%#lx), got %#lx", UINT64_MAX,
		    addr);

	for (i = 0; i < MAX_ZONES; i++) {
		zone = mmio_zone(i);
		if (__vm_ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone))
			break;
	}
	TEST_ASSERT(i < MAX_ZONES && errno == ENOSPC,
		    "Expected fewer than %d zones, and ENOSPC (%d), got %d zones, errno %d",
		    MAX_ZONES, ENOSPC, i, errno);

	ret = __kvm_device_attr_set(fd, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE,
				    &base);
	TEST_ASSERT(ret == -1 && errno == ENOSPC,
		    "Address with %d zones: expected -1 with ENOSPC (%d), got %d with %d", i,
		    ENOSPC, ret, errno);
	addr = get_its_address(fd);
	TEST_ASSERT(addr == UINT64_MAX, "Expected no address (%#lx), got %#lx", UINT64_MAX,
		    addr);
	ret = signal_msi(base + GITS_TRANSLATER, DEV_A, 0);
	TEST_ASSERT(ret == -EINVAL, "No address: expected KVM_SIGNAL_MSI to return %d, got %d",
		    -EINVAL, ret);

	zone = mmio_zone(0);
	vm_ioctl(vm, KVM_UNREGISTER_COALESCED_MMIO, &zone);
	kvm_device_attr_set(fd, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE, &base);
	addr = get_its_address(fd);
	TEST_ASSERT(addr == base, "Expected the address %#lx, got %#lx", base, addr);
	ret = signal_msi(base + GITS_TRANSLATER, DEV_A, 0);
	TEST_ASSERT(ret == -EBUSY, "ITS disabled: expected KVM_SIGNAL_MSI to return %d, got %d",
		    -EBUSY, ret);

	close(fd);
	close(gic_fd);
	kvm_vm_free(vm);
}

#define NEW_DEVICE		0x8000

static void guest_mapti_beyond(void)
{
	its_send_mapd(&its[0], NEW_DEVICE, itt(8), EVENT_BITS, true);
	its_send_mapti(&its[0], NEW_DEVICE, 0, ICID_UNUSED, LPI_NEW);
	its_send_mapti(&its[0], NEW_DEVICE, 0, 0, LPI_NEW);
}

static void guest_discard_mapti_beyond(void)
{
	its_send_discard(&its[0], 0, 0);
	its_send_mapti(&its[0], NEW_DEVICE, 0, 0, LPI_NEW);
	its_send_mapti(&its[0], NEW_DEVICE, 1, 0, LPI_NEW + 2);
}

/* An ITS maps MAX_EVENTS events, and not one more. */
TEST(event_bound)
{
	const struct result a0 = A0, unmapped = UNMAPPED, new = DELIVERED(LPI_NEW, 0);
	const struct result other = DELIVERED(LPI_OTHER_ITS, 1);
	const uint32_t nr_devices = MAX_EVENTS / SHARED_EVENTS;

	create_vm();

	check_restore_shared(nr_devices + 1, SHARED_BITS, SHARED_EVENTS, 1, -ENOSPC);
	check_vm_stat("too many events", "lpis", 0);
	check_msi("too many events", doorbell(&its[0]), 0, 0, &unmapped);
	check_its_state("too many events", "enabled 1 events 0", "", 1);
	check_its_state("too many events", "         0 ", "", 0);

	check_restore_shared(nr_devices, SHARED_BITS, SHARED_EVENTS, 1, 0);
	check_vm_stat("as many events as possible", "lpis", 1);
	check_msi("as many events as possible", doorbell(&its[0]), nr_devices - 1,
		  SHARED_EVENTS - 1, &a0);

	run_vcpu(vcpus[1], guest_mapti_beyond);
	check_msi("one more event", doorbell(&its[0]), NEW_DEVICE, 0, &unmapped);
	check_its_state("one more event", "enabled 1 events 65536", "", 1);
	check_its_state("one more event, collection", "         7 ", "     -", 0);
	run_vcpu(vcpus[1], guest_map_other_its);
	check_msi("an event of the other ITS", doorbell(&its[1]), DEV_A, 0, &other);

	run_vcpu(vcpus[1], guest_discard_mapti_beyond);
	check_msi("DISCARD", doorbell(&its[0]), 0, 0, &unmapped);
	check_msi("one more event after DISCARD", doorbell(&its[0]), NEW_DEVICE, 0, &new);
	check_msi("two more events after DISCARD", doorbell(&its[0]), NEW_DEVICE, 1,
		  &unmapped);

	destroy_vm();
}

static void guest_mapc_again(void)
{
	its_send_mapc(&its[0], 1, 0, true);
}

/* Less than a device and an ITE take, and far more than an event takes */
#define MIN_EVENT_SIZE	128
#define MAX_EVENT_SIZE	4096

static long kernel_memory_kib(const char *group)
{
	char path[128];
	long bytes;
	FILE *f;

	snprintf(path, sizeof(path), "%s/memory.kmem.usage_in_bytes", group);
	f = fopen(path, "r");
	TEST_ASSERT(f && fscanf(f, "%ld", &bytes) == 1, "Failed to read %s, errno: %d", path,
		    errno);
	fclose(f);
	return bytes / 1024;
}

/*
 * The kernel memory of as many events as possible, which is charged to the cgroup of this
 * task.  Each event is the only one of its device, so it needs nodes of its own in the
 * xarray of ITEs.  The events map one LPI: LPIs of their own would only need nodes for
 * their INTIDs.
 */
TEST(event_memory)
{
	char dir[] = CGROUP_DIR, group[64], path[128], pid[16];
	const struct result a0 = A0;
	long before, kib;

	mount_memcg(dir);
	snprintf(group, sizeof(group), "%s/vm", dir);
	TEST_ASSERT(!mkdir(group, 0755), "Failed to make %s, errno: %d", group, errno);
	snprintf(pid, sizeof(pid), "%d", getpid());
	snprintf(path, sizeof(path), "%s/tasks", group);
	TEST_ASSERT(write_text(path, pid), "Failed to write %s, errno: %d", path, errno);

	create_vm();
	before = kernel_memory_kib(group);
	check_restore_shared(MAX_EVENTS, 1, 1, 1, 0);
	kib = kernel_memory_kib(group) - before;
	check_msi("last device", doorbell(&its[0]), MAX_EVENTS - 1, 0, &a0);
	TEST_ASSERT(kib > MAX_EVENTS / 1024 * MIN_EVENT_SIZE &&
		    kib < MAX_EVENTS / 1024 * MAX_EVENT_SIZE,
		    "%u events: expected between %u and %u KiB of kernel memory, got %ld",
		    MAX_EVENTS, MAX_EVENTS / 1024 * MIN_EVENT_SIZE,
		    MAX_EVENTS / 1024 * MAX_EVENT_SIZE, kib);
	pr_info("%u devices with one event each take %ld KiB\n", MAX_EVENTS, kib);
	destroy_vm();

	snprintf(path, sizeof(path), "%s/tasks", dir);
	TEST_ASSERT(write_text(path, pid), "Failed to write %s, errno: %d", path, errno);
	rmdir(group);
	unmount_memcg(dir);
}

/* The time of a command that walks all events, of which there are MAX_EVENTS */
static uint64_t walk_ns(void)
{
	uint64_t start, min = UINT64_MAX;
	int i;

	for (i = 0; i < 5; i++) {
		start = now_ns();
		run_vcpu(vcpus[1], guest_mapc_again);
		min = min(min, now_ns() - start);
	}
	return min;
}

/* Unmapping all collections takes one walk of the events, not one for each of them. */
TEST(no_collections)
{
	uint64_t walk, start, ns;

	create_vm();
	check_restore_shared(MAX_EVENTS / SHARED_EVENTS, SHARED_BITS, SHARED_EVENTS,
			     MAX_COLLECTIONS, 0);
	walk = walk_ns();

	start = now_ns();
	run_vcpu(vcpus[1], guest_clear_collection_baser);
	ns = now_ns() - start;
	TEST_ASSERT(ns < 100 * walk,
		    "Unmapping %u collections of %u events: expected less than %lu us, got %lu us",
		    MAX_COLLECTIONS, MAX_EVENTS, 100 * walk / 1000, ns / 1000);
	check_msi("no collections", doorbell(&its[0]), 0, 0, &(struct result)UNMAPPED);

	destroy_vm();
}

/* Shared with the guest: GITS_CREADR before the first command of a full queue */
static uint64_t first_creadr;

/* vCPU 1 executes a full queue of commands.  vCPU 0 waits until one is complete. */
static void guest_full_cmdq(void)
{
	if (guest_get_vcpuid() == 1) {
		guest_rerun_cmdq();
		return;
	}
	while (readq((void *)(its[0].base + GITS_CREADR)) == first_creadr)
		cpu_relax();
}

/* What a VMM that is to be killed tells this test */
struct vmm_state {
	/* Of the statistics of the VM */
	int stats_fd;
	/* The time of one command */
	uint64_t walk_ns;
};

static void vmm_ready(int fd, uint64_t walk_ns)
{
	struct vmm_state state = {
		.stats_fd = vm_get_stats_fd(vm),
		.walk_ns = walk_ns,
	};

	TEST_ASSERT(write(fd, &state, sizeof(state)) == sizeof(state),
		    "write() failed, errno: %d", errno);
	pause();
}

/* This ends the queue.  It counts as an MSI that is refused. */
static void guest_int_unmapped_device(void)
{
	its_send_int(&its[0], NEW_DEVICE, 0);
}

/* The commands that the guest executes when it reruns the queue */
#define CMDQ_NR_RERUN		(CMDQ_NR_COMMANDS - 1)

/*
 * Map the events of @nr_devices, and prepare a full queue of commands.  The first ones
 * walk all events, and the others, at least the last one, are those of
 * guest_int_unmapped_device().
 * Return the time of one walk.
 */
static uint64_t fill_cmdq(int nr_devices, int nr_walks)
{
	uint64_t *cmd, walk[4], last[4], ns;
	int i, first;

	create_vm();
	check_restore_shared(nr_devices, SHARED_BITS, SHARED_EVENTS, 2, 0);
	ns = walk_ns();

	/* walk_ns() has put this command into the queue. */
	cmd = addr_gpa2hva(vm, its[0].cmdq);
	sync_global_from_guest(vm, its);
	i = (its[0].cwriter / 32 + CMDQ_NR_COMMANDS - 1) % CMDQ_NR_COMMANDS;
	memcpy(walk, cmd + 4 * i, sizeof(walk));

	run_vcpu(vcpus[1], guest_int_unmapped_device);
	sync_global_from_guest(vm, its);
	first_creadr = its[0].cwriter;
	sync_global_to_guest(vm, first_creadr);
	first = first_creadr / 32;
	memcpy(last, cmd + 4 * ((first + CMDQ_NR_COMMANDS - 1) % CMDQ_NR_COMMANDS), sizeof(last));
	for (i = 0; i < CMDQ_NR_RERUN; i++)
		memcpy(cmd + 4 * ((first + i) % CMDQ_NR_COMMANDS), i < nr_walks ? walk : last,
		       sizeof(last));

	set_command(guest_full_cmdq);
	return ns;
}

/* Let a vCPU execute a full queue of commands.  Go on when the first one is complete. */
static void run_commands(int fd)
{
	uint64_t ns = fill_cmdq(MAX_EVENTS / SHARED_EVENTS, CMDQ_NR_RERUN - 1);

	start_thread(run_vcpu_thread, vcpus[1]);
	vcpu_run_to_sync(vcpus[0]);
	vmm_ready(fd, ns);
}

static void *restore_thread(void *unused)
{
	host_restore();
	return NULL;
}

/*
 * Restore devices that share a table of 2^16 invalid entries, so that there are almost 2^32
 * of them.  A page of the device table is missing, so the restore cannot complete.  Go on
 * when some entries have been read.
 */
static void run_restore(int fd)
{
	size_t size = getpagesize();
	void *dte_hva, *ite_hva, *zero;
	uint64_t *dte;
	int i, uffd;

	create_vm();
	dte_hva = addr_gpa2hva(vm, its[0].device_table);
	ite_hva = addr_gpa2hva(vm, its[1].device_table);
	zero = calloc(1, size);
	TEST_ASSERT(zero, "calloc() failed");

	dte = dte_hva;
	for (i = 0; i < MAX_EVENTS; i++)
		dte[i] = DTE(1, its[1].device_table, 16);
	*(uint64_t *)addr_gpa2hva(vm, its[0].collection_table) = 0;

	dte_hva += ITS_DEVICE_TABLE_SIZE - size;
	ite_hva += size;
	TEST_ASSERT(!madvise(dte_hva, size, MADV_DONTNEED) &&
		    !madvise(ite_hva, size, MADV_DONTNEED), "madvise() failed, errno: %d",
		    errno);
	uffd_register(dte_hva, size, 0);
	uffd = uffd_register(ite_hva, size, 0);

	start_thread(restore_thread, NULL);
	uffd_wait_for_fault(uffd);
	uffd_provide(uffd, ite_hva, zero, size);
	vmm_ready(fd, 0);
}

/* A stat of a VM whose process may have ended */
static uint64_t read_stat(int stats_fd, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *descs, *desc;
	uint64_t data = 0;
	bool found = false;
	int i;

	read_stats_header(stats_fd, &header);
	descs = read_stats_descriptors(stats_fd, &header);
	for (i = 0; i < header.num_desc && !found; i++) {
		desc = get_stats_descriptor(descs, i, &header);
		found = !strcmp(desc->name, name);
		if (found)
			read_stat_data(stats_fd, &header, desc, &data, 1);
	}
	TEST_ASSERT(found, "No stat %s", name);
	free(descs);
	return data;
}

/*
 * Let @run prepare a VM and start what takes long, and kill it then.  Return the time until
 * its process has ended.  state->stats_fd can be read after the end.
 */
static uint64_t kill_vmm(void (*run)(int fd), struct vmm_state *state)
{
	int fds[2], status, fd;
	uint64_t start;
	pid_t pid;

	TEST_ASSERT(!pipe(fds), "pipe() failed, errno: %d", errno);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed, errno: %d", errno);
	if (!pid) {
		run(fds[1]);
		_exit(1);
	}
	close(fds[1]);
	TEST_ASSERT(read(fds[0], state, sizeof(*state)) == sizeof(*state),
		    "The VMM has ended before it was killed");
	close(fds[0]);

	fd = syscall(__NR_pidfd_open, pid, 0);
	TEST_ASSERT(fd >= 0, "pidfd_open() failed, errno: %d", errno);
	state->stats_fd = syscall(__NR_pidfd_getfd, fd, state->stats_fd, 0);
	TEST_ASSERT(state->stats_fd >= 0, "pidfd_getfd() failed, errno: %d", errno);
	close(fd);

	start = now_ns();
	kill(pid, SIGKILL);
	__wait_for(waitpid(pid, &status, WNOHANG) == pid,
		   "Killed: expected the VMM to end after %d s, it is still there",
		   WAIT_LIMIT_SECS);
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
		    "Expected a process killed by %d, got status %#x", SIGKILL, status);
	return now_ns() - start;
}

static void nothing(int sig)
{
}

static void *run_until_signal(void *vcpu)
{
	return (void *)(long)(__vcpu_run(vcpu) ? errno : 0);
}

static uint64_t get_its_reg(int offset)
{
	uint64_t val;

	kvm_device_attr_get(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, &val);
	return val;
}

#define GITS_CTLR_QUIESCENT	BIT(31)

static void set_its_reg(int offset, uint64_t val)
{
	kvm_device_attr_set(its[0].fd, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, &val);
}

/* A signal ends KVM_RUN between two commands.  The next KVM_RUN executes the others. */
TEST(full_queue)
{
	const int nr_walks = 400;
	struct sigaction sa = { .sa_handler = nothing };
	uint64_t left, done, misses;
	pthread_t thread;
	long err;

	fill_cmdq(1, nr_walks);
	TEST_ASSERT(!sigaction(SIGUSR1, &sa, NULL), "sigaction() failed, errno: %d", errno);
	thread = start_thread(run_until_signal, vcpus[1]);
	vcpu_run_to_sync(vcpus[0]);
	pthread_kill(thread, SIGUSR1);
	err = join_thread(thread, "KVM_RUN after a signal");
	TEST_ASSERT(err == EINTR, "KVM_RUN: expected errno %d, got %ld", EINTR, err);

	left = (get_its_reg(GITS_CWRITER) - get_its_reg(GITS_CREADR)) % ITS_CMDQ_SIZE / 32;
	done = CMDQ_NR_RERUN - left;
	TEST_ASSERT(done && done < nr_walks,
		    "After a signal: expected 1 to %d commands to be complete, got %lu",
		    nr_walks - 1, done);

	/* No command is executed when userspace restores registers. */
	misses = vm_get_stat(vm, "lpi_translation_misses");
	set_its_reg(GITS_CTLR, 0);
	TEST_ASSERT(get_its_reg(GITS_CTLR) & GITS_CTLR_QUIESCENT,
		    "GITS_CTLR.Quiescent: expected 1 while the ITS is disabled, got 0");
	set_its_reg(GITS_CTLR, GITS_CTLR_ENABLE);
	check_vm_stat("GITS_CTLR written by userspace", "lpi_translation_misses", misses);

	vcpu_run_to_sync(vcpus[1]);
	check_vm_stat("the rest of the queue", "lpi_translation_misses",
		      misses + CMDQ_NR_RERUN - nr_walks);

	destroy_vm();
}

/* A VMM that is killed does not process the rest of the queue. */
TEST(killed)
{
	struct vmm_state state;
	uint64_t misses, ns;

	ns = kill_vmm(run_commands, &state);
	misses = read_stat(state.stats_fd, "lpi_translation_misses");
	TEST_ASSERT(misses == 1,
		    "Killed with the INT that ends the queue still in it: expected lpi_translation_misses to be 1, got %lu",
		    misses);
	TEST_ASSERT(ns < state.walk_ns * CMDQ_NR_COMMANDS / 2,
		    "Killed with %u commands of %lu us in the queue: expected less than %lu us, got %lu us",
		    CMDQ_NR_COMMANDS, state.walk_ns / 1000,
		    state.walk_ns * CMDQ_NR_COMMANDS / 2000, ns / 1000);
	close(state.stats_fd);
}

/* A VMM that is killed does not complete a restore.  If it did, this would take minutes. */
TEST(killed_restore)
{
	struct vmm_state state;

	kill_vmm(run_restore, &state);
	close(state.stats_fd);
}

static void check_state_event(const char *what, uint32_t device_id, uint32_t event_id,
			      uint32_t intid, const char *end, int nr)
{
	char start[64];

	snprintf(start, sizeof(start), "%10u %10u %7u", device_id, event_id, intid);
	check_its_state(what, start, end, nr);
}

/* The tables of an ITS in debugfs */
TEST(debugfs_its)
{
	char buf[64];
	int fd, ret;

	create_vm();

	check_its_state("mapped", "enabled 1 events 3", "", 1);
	check_its_state("mapped", "         0      0", "", 1);
	check_its_state("mapped", "         1      1", "", 1);
	check_state_event("mapped", DEV_A, 0, LPI_A0, "          0      0 0 1 0", 1);
	check_state_event("mapped", DEV_A, 1, LPI_A1, "          1      1 0 1 0", 1);
	check_state_event("mapped", DEV_B, 0, LPI_B0, "          0      0 0 1 0", 1);

	make_pending(doorbell(&its[0]), DEV_A);
	check_state_event("pending", DEV_A, 0, LPI_A0, "          0      0 1 1 0", 1);
	run_vcpu(vcpus[1], guest_discard_mapti_same);
	run_vcpu(vcpus[1], guest_config_inv);
	check_state_event("not enabled", DEV_A, 0, LPI_A0, "          1      1 0 0 0", 1);
	run_vcpu(vcpus[1], guest_mapti_unmapped_collection);
	check_state_event("no target", DEV_A, 0, LPI_NEW, "          7      - 0 1 0", 1);
	check_its_state("no target", "         7      -", "", 1);
	run_vcpu(vcpus[1], guest_mapc_unmap);
	check_state_event("MAPC V=0", DEV_B, 0, LPI_B0, "          -      0 0 1 0", 1);
	run_vcpu(vcpus[1], guest_mapd_unmap);
	check_its_state("MAPD V=0", "enabled 1 events 1", "", 1);

	/* Larger than a page */
	run_vcpu(vcpus[1], guest_config_inv_twice);
	check_restore_shared(1, SHARED_BITS, SHARED_EVENTS, 1, 0);
	check_its_state("many events", "         0 ", "          0      0 0 1 0",
			SHARED_EVENTS);

	/* The file goes with the VM, also if it is open. */
	fd = open_its_state();
	TEST_ASSERT(fd >= 0, "Expected to open vgic-its-state, got errno %d", errno);
	destroy_vm();
	ret = read(fd, buf, sizeof(buf));
	TEST_ASSERT(ret == -1 && errno == EIO,
		    "Read after the VM is destroyed: expected -1 with EIO (%d), got %d with %d",
		    EIO, ret, errno);
	close(fd);
}

int main(int argc, char *argv[])
{
	int opt;

	while ((opt = getopt(argc, argv, "hr:")) != -1) {
		switch (opt) {
		case 'r':
			nr_rounds = atol(optarg);
			break;
		case 'h':
		default:
			pr_info("Usage: %s [-h] [-r rounds] [case...]\n", argv[0]);
			pr_info("\t-r: rounds of MAPTI, INT, DISCARD in unmap_pending_many\n");
			pr_info("\tcase: run only this one; !case: run all but this one\n");
			exit(opt == 'h' ? 0 : KSFT_SKIP);
		}
	}

	atexit(trace_end);
	return run_cases(argv + optind);
}
