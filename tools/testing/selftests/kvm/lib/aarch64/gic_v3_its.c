// SPDX-License-Identifier: GPL-2.0
/*
 * GICv3 Interrupt Translation Service (ITS) and LPIs
 */

#include <string.h>

#include "kvm_util.h"
#include "processor.h"
#include "gic_v3.h"
#include "gic_v3_its.h"

#define ITS_CMD_SIZE		32

#define ITS_CMD_MOVI		0x01
#define ITS_CMD_INT		0x03
#define ITS_CMD_CLEAR		0x04
#define ITS_CMD_SYNC		0x05
#define ITS_CMD_MAPD		0x08
#define ITS_CMD_MAPC		0x09
#define ITS_CMD_MAPTI		0x0a
#define ITS_CMD_INV		0x0c
#define ITS_CMD_INVALL		0x0d
#define ITS_CMD_MOVALL		0x0e
#define ITS_CMD_DISCARD		0x0f

#define ITS_CMD_VALID		BIT_ULL(63)

/*
 * KVM's ITSes have GITS_TYPER.PTA == 0: the RDbase of a command is the number
 * of a redistributor, which is the ID of its vCPU.  The field starts at bit 16.
 */
#define ITS_CMD_RDBASE(vcpu_id)	((uint64_t)(vcpu_id) << 16)

#define ITS_TABLES_SIZE		(ITS_DEVICE_TABLE_SIZE + \
				 ITS_COLLECTION_TABLE_SIZE + ITS_CMDQ_SIZE)

/* Arbitrarily chosen; the rest of the library does not use this slot. */
#define ITS_MEMSLOT		10

/*
 * Create @nr_its ITSes at consecutive addresses, starting at @base_gpa.  Starting
 * at @tables_gpa, allocate the tables of the ITSes and of @nr_vcpus
 * redistributors, and @itt_size bytes for interrupt translation tables.  Enable
 * all LPIs in the configuration table.
 */
void vgic_its_setup(struct kvm_vm *vm, struct its *its, unsigned int nr_its,
		    uint64_t base_gpa, struct lpi_tables *tables,
		    unsigned int nr_vcpus, uint64_t itt_size,
		    uint64_t tables_gpa)
{
	uint64_t gpa = tables_gpa;
	unsigned int i, nr_pages;

	for (i = 0; i < nr_its; i++) {
		its[i].base = base_gpa + i * ITS_FRAME_SIZE;
		its[i].device_table = gpa;
		its[i].collection_table = its[i].device_table + ITS_DEVICE_TABLE_SIZE;
		its[i].cmdq = its[i].collection_table + ITS_COLLECTION_TABLE_SIZE;
		its[i].cwriter = 0;
		gpa += ITS_TABLES_SIZE;

		its[i].fd = kvm_create_device(vm, KVM_DEV_TYPE_ARM_VGIC_ITS);
		kvm_device_attr_set(its[i].fd, KVM_DEV_ARM_VGIC_GRP_ADDR,
				    KVM_VGIC_ITS_ADDR_TYPE, &its[i].base);
		kvm_device_attr_set(its[i].fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
				    KVM_DEV_ARM_VGIC_CTRL_INIT, NULL);
	}
	virt_map(vm, base_gpa, base_gpa,
		 vm_calc_num_guest_pages(vm->mode, nr_its * ITS_FRAME_SIZE));

	tables->config = gpa;
	tables->pending = tables->config + SZ_64K;
	tables->itt = tables->pending + nr_vcpus * SZ_64K;
	gpa = tables->itt + itt_size;

	nr_pages = vm_calc_num_guest_pages(vm->mode, gpa - tables_gpa);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, tables_gpa,
				    ITS_MEMSLOT, nr_pages, 0);
	virt_map(vm, tables_gpa, tables_gpa, nr_pages);

	memset(addr_gpa2hva(vm, tables->config), LPI_PROP_PRIO | LPI_PROP_ENABLED,
	       SZ_64K - LPI_BASE);
}

/* Returns the result of KVM_SIGNAL_MSI, or -errno. */
int __kvm_signal_msi(struct kvm_vm *vm, uint64_t doorbell, uint32_t flags,
		     uint32_t device_id, uint32_t event_id)
{
	struct kvm_msi msi = {
		.address_lo	= doorbell,
		.address_hi	= doorbell >> 32,
		.data		= event_id,
		.flags		= flags,
		.devid		= device_id,
	};
	int ret = __vm_ioctl(vm, KVM_SIGNAL_MSI, &msi);

	return ret < 0 ? -errno : ret;
}

/* Adds a route from @gsi to an MSI to @routing. */
void kvm_gsi_routing_msi_add(struct kvm_irq_routing *routing, uint32_t gsi,
			     uint64_t doorbell, uint32_t device_id,
			     uint32_t event_id)
{
	struct kvm_irq_routing_entry *e = &routing->entries[routing->nr];

	assert(routing->nr < KVM_MAX_IRQ_ROUTES);

	e->gsi = gsi;
	e->type = KVM_IRQ_ROUTING_MSI;
	e->flags = KVM_MSI_VALID_DEVID;
	e->u.msi.address_lo = doorbell;
	e->u.msi.address_hi = doorbell >> 32;
	e->u.msi.data = event_id;
	e->u.msi.devid = device_id;
	routing->nr++;
}

static void its_writel(struct its *its, uint64_t reg, uint32_t val)
{
	writel(val, (void *)(its->base + reg));
}

static void its_writeq(struct its *its, uint64_t reg, uint64_t val)
{
	writeq(val, (void *)(its->base + reg));
}

static uint64_t its_readq(struct its *its, uint64_t reg)
{
	return readq((void *)(its->base + reg));
}

void its_enable(struct its *its)
{
	its_writel(its, GITS_CTLR, GITS_CTLR_ENABLE);
}

void its_disable(struct its *its)
{
	its_writel(its, GITS_CTLR, 0);
}

/* The size field is the number of pages minus one; KVM's page size is 64K. */
void its_write_baser(struct its *its, uint64_t reg, bool valid)
{
	bool device = reg == GITS_BASER_DEVICE;
	uint64_t table = device ? its->device_table : its->collection_table;
	uint64_t size = device ? ITS_DEVICE_TABLE_SIZE : ITS_COLLECTION_TABLE_SIZE;

	its_writeq(its, reg, (valid ? GITS_BASER_VALID : 0) | table |
			     (size / SZ_64K - 1));
}

void its_init(struct its *its)
{
	its_write_baser(its, GITS_BASER_DEVICE, true);
	its_write_baser(its, GITS_BASER_COLLECTION, true);

	/* The size field is the number of 4K pages minus one. */
	its_writeq(its, GITS_CBASER, GITS_CBASER_VALID | its->cmdq |
				     (ITS_CMDQ_SIZE / SZ_4K - 1));
	its->cwriter = 0;

	its_enable(its);
}

static void its_send(struct its *its, uint64_t w0, uint64_t w1, uint64_t w2,
		     uint64_t w3)
{
	uint64_t *cmd = (uint64_t *)(its->cmdq + its->cwriter);

	WRITE_ONCE(cmd[0], cpu_to_le64(w0));
	WRITE_ONCE(cmd[1], cpu_to_le64(w1));
	WRITE_ONCE(cmd[2], cpu_to_le64(w2));
	WRITE_ONCE(cmd[3], cpu_to_le64(w3));
	dsb(ishst);

	its->cwriter = (its->cwriter + ITS_CMD_SIZE) % ITS_CMDQ_SIZE;
	its_writeq(its, GITS_CWRITER, its->cwriter);

	/* KVM executes the command before the guest continues. */
	GUEST_ASSERT_EQ(its_readq(its, GITS_CREADR), its->cwriter);
}

static uint64_t its_cmd(unsigned int cmd, uint32_t device_id)
{
	return cmd | (uint64_t)device_id << 32;
}

void its_send_mapd(struct its *its, uint32_t device_id, uint64_t itt,
		   unsigned int event_bits, bool valid)
{
	its_send(its, its_cmd(ITS_CMD_MAPD, device_id), event_bits - 1,
		 (valid ? ITS_CMD_VALID : 0) | itt, 0);
}

void its_send_mapc(struct its *its, uint16_t icid, uint32_t vcpu_id, bool valid)
{
	its_send(its, ITS_CMD_MAPC, 0,
		 (valid ? ITS_CMD_VALID : 0) | ITS_CMD_RDBASE(vcpu_id) | icid, 0);
}

void its_send_mapti(struct its *its, uint32_t device_id, uint32_t event_id,
		    uint16_t icid, uint32_t intid)
{
	its_send(its, its_cmd(ITS_CMD_MAPTI, device_id),
		 event_id | (uint64_t)intid << 32, icid, 0);
}

void its_send_movi(struct its *its, uint32_t device_id, uint32_t event_id,
		   uint16_t icid)
{
	its_send(its, its_cmd(ITS_CMD_MOVI, device_id), event_id, icid, 0);
}

void its_send_movall(struct its *its, uint32_t from, uint32_t to)
{
	its_send(its, ITS_CMD_MOVALL, 0, ITS_CMD_RDBASE(from), ITS_CMD_RDBASE(to));
}

void its_send_discard(struct its *its, uint32_t device_id, uint32_t event_id)
{
	its_send(its, its_cmd(ITS_CMD_DISCARD, device_id), event_id, 0, 0);
}

void its_send_inv(struct its *its, uint32_t device_id, uint32_t event_id)
{
	its_send(its, its_cmd(ITS_CMD_INV, device_id), event_id, 0, 0);
}

void its_send_invall(struct its *its, uint16_t icid)
{
	its_send(its, ITS_CMD_INVALL, 0, icid, 0);
}

void its_send_clear(struct its *its, uint32_t device_id, uint32_t event_id)
{
	its_send(its, its_cmd(ITS_CMD_CLEAR, device_id), event_id, 0, 0);
}

void its_send_int(struct its *its, uint32_t device_id, uint32_t event_id)
{
	its_send(its, its_cmd(ITS_CMD_INT, device_id), event_id, 0, 0);
}

void its_send_sync(struct its *its, uint32_t vcpu_id)
{
	its_send(its, ITS_CMD_SYNC, 0, ITS_CMD_RDBASE(vcpu_id), 0);
}

static void *gicr_frame(uint64_t gicr_base, uint32_t vcpu_id)
{
	return (void *)(gicr_base + vcpu_id * SZ_128K);
}

void gicr_set_lpis_enabled(uint64_t gicr_base, uint32_t vcpu_id, bool enable)
{
	writel(enable ? GICR_CTLR_ENABLE_LPIS : 0,
	       gicr_frame(gicr_base, vcpu_id) + GICR_CTLR);
}

/*
 * Set the tables of a redistributor, and enable LPIs.  GICR_PENDBASER.PTZ says
 * that no LPI is pending.
 */
void gicr_enable_lpis(uint64_t gicr_base, uint32_t vcpu_id,
		      const struct lpi_tables *tables)
{
	void *frame = gicr_frame(gicr_base, vcpu_id);

	writeq(tables->config | (LPI_ID_BITS - 1), frame + GICR_PROPBASER);
	writeq((tables->pending + vcpu_id * SZ_64K) | GICR_PENDBASER_PTZ,
	       frame + GICR_PENDBASER);
	gicr_set_lpis_enabled(gicr_base, vcpu_id, true);
}
