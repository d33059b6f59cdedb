/* SPDX-License-Identifier: GPL-2.0 */
/*
 * GICv3 Interrupt Translation Service (ITS) and LPIs
 *
 * The host creates the ITSes and the memory for their tables.  The guest
 * programs the ITSes and redistributors, and sends ITS commands.  Tables and
 * registers are identity-mapped, so their addresses below are GPAs and GVAs.
 */
#ifndef SELFTEST_KVM_GIC_V3_ITS_H
#define SELFTEST_KVM_GIC_V3_ITS_H

#include <linux/bits.h>
#include <linux/sizes.h>

#include "kvm_util.h"

#define LPI_BASE			8192
#define LPI_ID_BITS			16

#define ITS_FRAME_SIZE			SZ_128K

/* ITS registers */
#define GITS_CTLR			0x0000
#define GITS_CBASER			0x0080
#define GITS_CWRITER			0x0088
#define GITS_CREADR			0x0090
#define GITS_BASER_DEVICE		0x0100
#define GITS_BASER_COLLECTION		0x0108
#define GITS_TRANSLATER			0x10040

#define GITS_CTLR_ENABLE		BIT(0)
#define GITS_BASER_VALID		BIT_ULL(63)
#define GITS_CBASER_VALID		BIT_ULL(63)

/* Redistributor registers for LPIs */
#define GICR_PROPBASER			0x0070
#define GICR_PENDBASER			0x0078

#define GICR_CTLR_ENABLE_LPIS		BIT(0)
#define GICR_PENDBASER_PTZ		BIT_ULL(62)

/* Fields of the LPI configuration table, which has a byte for each LPI */
#define LPI_PROP_PRIO			0xa0
#define LPI_PROP_ENABLED		BIT(0)

/* Tables of an ITS, each aligned to 64K */
#define ITS_DEVICE_TABLE_SIZE		SZ_512K
#define ITS_COLLECTION_TABLE_SIZE	SZ_64K
#define ITS_CMDQ_SIZE			SZ_64K

struct its {
	uint64_t base;
	uint64_t device_table;
	uint64_t collection_table;
	uint64_t cmdq;
	/* Offset of the next command in the queue, used by the guest */
	uint64_t cwriter;
	/* File descriptor of the KVM device, used by the host */
	int fd;
};

/*
 * Tables for LPIs: a configuration table that all redistributors share, and a
 * pending table of 64K for each redistributor.
 */
struct lpi_tables {
	uint64_t config;
	uint64_t pending;
	/* Memory for the interrupt translation tables of devices */
	uint64_t itt;
};

/* For use by the host */
void vgic_its_setup(struct kvm_vm *vm, struct its *its, unsigned int nr_its,
		    uint64_t base_gpa, struct lpi_tables *tables,
		    unsigned int nr_vcpus, uint64_t itt_size,
		    uint64_t tables_gpa);
int __kvm_signal_msi(struct kvm_vm *vm, uint64_t doorbell, uint32_t flags,
		     uint32_t device_id, uint32_t event_id);
void kvm_gsi_routing_msi_add(struct kvm_irq_routing *routing, uint32_t gsi,
			     uint64_t doorbell, uint32_t device_id,
			     uint32_t event_id);

/* For use by guest code */
void its_enable(struct its *its);
void its_disable(struct its *its);
void its_write_baser(struct its *its, uint64_t reg, bool valid);
void its_init(struct its *its);

void its_send_mapd(struct its *its, uint32_t device_id, uint64_t itt,
		   unsigned int event_bits, bool valid);
void its_send_mapc(struct its *its, uint16_t icid, uint32_t vcpu_id, bool valid);
void its_send_mapti(struct its *its, uint32_t device_id, uint32_t event_id,
		    uint16_t icid, uint32_t intid);
void its_send_movi(struct its *its, uint32_t device_id, uint32_t event_id,
		   uint16_t icid);
void its_send_movall(struct its *its, uint32_t from, uint32_t to);
void its_send_discard(struct its *its, uint32_t device_id, uint32_t event_id);
void its_send_inv(struct its *its, uint32_t device_id, uint32_t event_id);
void its_send_invall(struct its *its, uint16_t icid);
void its_send_clear(struct its *its, uint32_t device_id, uint32_t event_id);
void its_send_int(struct its *its, uint32_t device_id, uint32_t event_id);
void its_send_sync(struct its *its, uint32_t vcpu_id);

void gicr_enable_lpis(uint64_t gicr_base, uint32_t vcpu_id,
		      const struct lpi_tables *tables);
void gicr_set_lpis_enabled(uint64_t gicr_base, uint32_t vcpu_id, bool enable);

#endif /* SELFTEST_KVM_GIC_V3_ITS_H */
