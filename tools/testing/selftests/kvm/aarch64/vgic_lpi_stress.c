// SPDX-License-Identifier: GPL-2.0
/*
 * vgic_lpi_stress - inject LPIs via KVM_SIGNAL_MSI or irqfd, and count them
 *
 * Each device has a number of events.  Each event has its own LPI, and the LPIs
 * are distributed over the vCPUs in turn.  One thread for each device raises all
 * events of the device repeatedly.  After each round, it waits until all of the
 * device's LPIs have been delivered.  The guest counts LPIs by INTID and by vCPU.
 * At the end, no LPI may be lost, and each must have arrived at its own vCPU.
 *
 * With -p, the vCPUs do not run while events are raised.  This measures the cost
 * of injection alone, and leaves LPIs pending when the VM is destroyed.  A single
 * thread raises the events of all devices, or, with -m, one thread for each device.
 *
 * With -t, no events are raised.  The time that commands take is reported instead, for
 * MOVI and DISCARD with all events mapped, for MAPD and MAPTI from none to all.
 *
 * With -c, one more vCPU maps, moves and unmaps events of its own device during
 * the test, with DISCARD, MAPTI, MOVI, MAPD, INVALL and other commands.  A thread
 * raises these events, and another one reads the state of the vgic in debugfs.
 * The test does not check where these LPIs arrive, but they must not affect the
 * LPIs that are counted.
 *
 * With -s, two ITSes map each LPI that is counted, and MSIs come through both.  One
 * more vCPU moves these LPIs between all vCPUs, by commands to both ITSes: MOVI,
 * MOVALL and MAPC.  It also discards and maps again the event of the ITS that the
 * current MSI does not come through, so that each LPI is mapped all the time, and it
 * disables and enables its own LPIs while no LPI targets it.  Meanwhile, the other
 * vCPUs leave KVM_RUN in turn, and stay in userspace until LPIs have been moved or,
 * if the LPIs are moved to other vCPUs, until these have taken LPIs.  Each MSI has
 * to be handled exactly once, and not by a vCPU that the LPI has been moved away
 * from.  There are more iterations than -i says if the test has not met all of that.
 */

#define _GNU_SOURCE

#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/sizes.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kvm_util.h"
#include "processor.h"
#include "gic.h"
#include "gic_v3_its.h"
#include "vgic.h"

#define GICD_BASE_GPA	0x8000000ULL
#define GICR_BASE_GPA	0x80a0000ULL
/* Above the redistributors of all vCPUs */
#define ITS_BASE_GPA	0xa000000ULL
#define TABLES_GPA	SZ_4G

#define MAX_VCPUS	64
/* INTIDs have 16 bits here, and the LPIs of -c need some of them. */
#define MAX_LPIS	32768
#define CHURN_LPI	(LPI_BASE + MAX_LPIS)
#define CHURN_EVENTS	16
#define CHURN_DEVICE	0xffff

/* For -t, arbitrarily chosen */
#define TIMED_ROUNDS	8

/* For -s */
#define MAX_ITSES		2
#define MAX_SHARED_LPIS		2048
#define NO_VCPU			UINT32_MAX
/* Fields of shared_lpi::target */
#define TARGET_VCPU		GENMASK_ULL(7, 0)
#define TARGET_MOVES		BIT_ULL(8)
#define TARGET_GENERATION	BIT_ULL(9)
/* Bits of shared_lpi::busy */
#define BUSY_MSI(i)		BIT(i)
#define BUSY_REMAP(i)		BIT(MAX_ITSES + (i))
/* Arbitrarily chosen: commands during which an LPI may stay in a list register */
#define HELD_COMMANDS		32

enum stage {
	STAGE_INIT,
	STAGE_MAP,
	STAGE_STOP,
};

/* Shared with the guest */
static struct its its[MAX_ITSES];
static struct lpi_tables tables;
static uint32_t nr_vcpus = 1;
static uint32_t nr_devices = 1;
static uint32_t nr_events = 16;
static uint32_t nr_guest_vcpus;
static uint32_t event_bits;
static enum stage stage;
static uint32_t lpi_count[MAX_LPIS];
static uint64_t vcpu_count[MAX_VCPUS];
static uint64_t nr_stray, nr_churned, nr_churn_rounds;

/* Shared with the guest, for -s */
static bool shared;
static struct shared_lpi {
	/*
	 * The vCPU that the commands have made the target, a bit that is set while a
	 * command changes the target, and the number of changes
	 */
	uint64_t target;
	/* ITSes that an MSI comes through, and the ITS whose event is mapped again */
	uint32_t busy;
	/* The collection of the event of each ITS */
	uint16_t icid[MAX_ITSES];
} shared_lpis[MAX_SHARED_LPIS];
/* The vCPU of each collection of each ITS */
static uint32_t collections[MAX_ITSES][MAX_VCPUS];
/* No LPI may target this vCPU, set by the host; and the one that none targets */
static uint32_t avoid_vcpu = NO_VCPU, avoided_vcpu = NO_VCPU;
static uint64_t nr_commands, nr_remaps, nr_toggles, nr_checked, nr_held_moved;
/* The INTID of an LPI that a vCPU leaves in a list register, or 0 */
static uint32_t held_intid[MAX_VCPUS];
/* LPIs that a vCPU took after they had been moved to another one, and the last one */
static uint64_t nr_late;
static uint32_t late_intid, late_vcpu, late_target;

static uint32_t nr_iterations = 1000;
static bool use_irqfd, churn, only_inject, use_threads, time_commands;

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[MAX_VCPUS];
static int *eventfds;
static pthread_barrier_t barrier;
static uint32_t *host_lpi_count;
static uint64_t nr_state_reads;

/* For -s */
static int gic_fd;
static struct stoppable_vcpu {
	pthread_t thread;
	sem_t stopped, resume;
	uint64_t nr_stops;
	/* For the signal handler */
	struct kvm_run *run;
} stoppable[MAX_VCPUS];
static __thread struct stoppable_vcpu *this_vcpu;
static bool stops_done;
/* Iterations that each device has completed, and whether it starts no other one */
static uint32_t *nr_completed;
static bool *device_done;
static uint64_t nr_msis[MAX_ITSES];
/* Stops of a vCPU during which LPIs were moved, and during which others took LPIs */
static uint64_t nr_stops, nr_stops_taken;

static uint32_t lpi_index(uint32_t device, uint32_t event)
{
	return device * nr_events + event;
}

/* The guest */

static uint64_t itt(uint32_t device)
{
	return tables.itt + (device << event_bits) * 8;
}

/* The ITT of a device of the second ITS.  Device nr_devices of the first is that of -c. */
static uint64_t shared_itt(uint32_t device)
{
	return itt(nr_devices + 1 + device);
}

/* The shared LPI that this vCPU would acknowledge now, or NULL */
static struct shared_lpi *pending_shared_lpi(uint32_t *intid)
{
	*intid = read_sysreg_s(SYS_ICC_HPPIR1_EL1);
	if (*intid < LPI_BASE || *intid >= CHURN_LPI)
		return NULL;
	return &shared_lpis[*intid - LPI_BASE];
}

static uint64_t lpi_target(struct shared_lpi *lpi)
{
	return __atomic_load_n(&lpi->target, __ATOMIC_ACQUIRE);
}

/*
 * Three times of four, leave a shared LPI in its list register, with IRQs masked, until
 * a command has moved it.  There are no commands while LPIs avoid a vCPU.
 */
static void hold_shared_lpi(uint32_t cpu)
{
	static uint32_t nr_held[MAX_VCPUS];
	uint64_t start = READ_ONCE(nr_commands), target;
	struct shared_lpi *lpi;
	uint32_t intid;

	lpi = pending_shared_lpi(&intid);
	if (!lpi || nr_held[cpu]++ % 4 == 3)
		return;

	WRITE_ONCE(held_intid[cpu], intid);
	do {
		target = lpi_target(lpi);
		if (!(target & TARGET_MOVES) && (target & TARGET_VCPU) != cpu) {
			__atomic_add_fetch(&nr_held_moved, 1, __ATOMIC_RELAXED);
			break;
		}
	} while (READ_ONCE(nr_commands) - start < HELD_COMMANDS &&
		 READ_ONCE(avoided_vcpu) == NO_VCPU && READ_ONCE(stage) != STAGE_STOP);
	WRITE_ONCE(held_intid[cpu], 0);
}

/*
 * Acknowledge an interrupt.  If it is a shared LPI, check that it has not been moved to
 * another vCPU before.  It can be moved after HPPIR was read, and the commands that
 * move it can complete before it is acknowledged, so the target counts only if it
 * was the same before and after.
 */
static uint32_t ack_shared(uint32_t cpu)
{
	struct shared_lpi *lpi;
	uint32_t first, intid;
	uint64_t target;

	/* The last vCPU sends the commands. */
	if (cpu < nr_vcpus)
		hold_shared_lpi(cpu);

	lpi = pending_shared_lpi(&first);
	target = lpi ? lpi_target(lpi) : TARGET_MOVES;
	isb();
	intid = gic_get_and_ack_irq();
	if (intid != first || target & TARGET_MOVES || lpi_target(lpi) != target)
		return intid;

	__atomic_add_fetch(&nr_checked, 1, __ATOMIC_RELAXED);
	if ((target & TARGET_VCPU) != cpu) {
		late_intid = intid;
		late_vcpu = cpu;
		late_target = target & TARGET_VCPU;
		__atomic_add_fetch(&nr_late, 1, __ATOMIC_RELEASE);
	}
	return intid;
}

static void guest_irq_handler(struct ex_regs *regs)
{
	uint32_t cpu = guest_get_vcpuid();
	uint32_t intid = shared ? ack_shared(cpu) : gic_get_and_ack_irq();
	uint32_t index = intid - LPI_BASE;

	if (intid == IAR_SPURIOUS)
		return;

	GUEST_ASSERT_1(intid >= LPI_BASE, intid);
	if (intid >= CHURN_LPI) {
		__atomic_add_fetch(&nr_churned, 1, __ATOMIC_RELAXED);
	} else {
		if (index % nr_vcpus != cpu)
			__atomic_add_fetch(&nr_stray, 1, __ATOMIC_RELAXED);
		vcpu_count[cpu]++;
		__atomic_add_fetch(&lpi_count[index], 1, __ATOMIC_RELEASE);
	}
	gic_set_eoi(intid);
}

static void guest_map(void)
{
	uint32_t cpu, device, event, index;

	its_init(its);
	for (cpu = 0; cpu < nr_guest_vcpus; cpu++)
		its_send_mapc(its, cpu, cpu, true);

	for (device = 0; device < nr_devices; device++) {
		its_send_mapd(its, device, itt(device), event_bits, true);
		for (event = 0; event < nr_events; event++) {
			index = lpi_index(device, event);
			its_send_mapti(its, device, event, index % nr_vcpus,
				       LPI_BASE + index);
		}
	}
}

/* Let the second ITS map each LPI to the same vCPU as the first one. */
static void guest_map_shared(void)
{
	uint32_t i, cpu, device, event;

	its_init(&its[1]);
	for (cpu = 0; cpu < nr_guest_vcpus; cpu++) {
		its_send_mapc(&its[1], cpu, cpu, true);
		for (i = 0; i < MAX_ITSES; i++)
			collections[i][cpu] = cpu;
	}

	for (device = 0; device < nr_devices; device++) {
		its_send_mapd(&its[1], device, shared_itt(device), event_bits, true);
		for (event = 0; event < nr_events; event++) {
			uint32_t index = lpi_index(device, event);
			struct shared_lpi *lpi = &shared_lpis[index];

			cpu = index % nr_vcpus;
			its_send_mapti(&its[1], device, event, cpu, LPI_BASE + index);
			lpi->target = cpu;
			for (i = 0; i < MAX_ITSES; i++)
				lpi->icid[i] = cpu;
		}
	}
}

static void guest_churn(void)
{
	uint32_t event, last = nr_guest_vcpus - 1, round = nr_churn_rounds;

	its_send_mapd(its, CHURN_DEVICE, itt(nr_devices), event_bits, true);
	for (event = 0; event < CHURN_EVENTS; event++)
		its_send_mapti(its, CHURN_DEVICE, event, event % nr_vcpus,
			       CHURN_LPI + event);
	for (event = 0; event < CHURN_EVENTS; event++)
		its_send_movi(its, CHURN_DEVICE, event,
			      (event + round) % nr_guest_vcpus);
	its_send_inv(its, CHURN_DEVICE, round % CHURN_EVENTS);
	its_send_invall(its, round % nr_vcpus);
	its_send_clear(its, CHURN_DEVICE, round % CHURN_EVENTS);
	its_send_int(its, CHURN_DEVICE, round % CHURN_EVENTS);
	/* The last vCPU is not the target of any LPI that is counted. */
	its_send_mapc(its, last, last, false);
	its_send_mapc(its, last, last, true);
	its_send_movall(its, last, 0);
	gicr_set_lpis_enabled(GICR_BASE_GPA, last, false);
	gicr_set_lpis_enabled(GICR_BASE_GPA, last, true);
	for (event = 0; event < CHURN_EVENTS; event += 2)
		its_send_discard(its, CHURN_DEVICE, event);
	if (round % 2)
		its_send_mapd(its, CHURN_DEVICE, itt(nr_devices), event_bits,
			      false);
	nr_churn_rounds++;
}

static uint32_t churn_random(uint32_t n)
{
	static uint32_t seed = 1;

	seed = seed * 1664525 + 1013904223;
	return (seed >> 16) % n;
}

static void lpi_moves(struct shared_lpi *lpi)
{
	WRITE_ONCE(lpi->target, lpi->target | TARGET_MOVES);
}

/* The command has completed.  All LPIs that it has moved are at @cpu now. */
static void lpis_moved(uint32_t cpu)
{
	uint32_t i;

	for (i = 0; i < nr_devices * nr_events; i++) {
		uint64_t target = shared_lpis[i].target;

		if (target & TARGET_MOVES) {
			target &= ~(TARGET_MOVES | TARGET_VCPU);
			__atomic_store_n(&shared_lpis[i].target,
					 (target + TARGET_GENERATION) | cpu,
					 __ATOMIC_RELEASE);
		}
	}
	WRITE_ONCE(nr_commands, nr_commands + 1);
}

static void shared_movi(uint32_t i, uint32_t index, uint32_t icid)
{
	struct shared_lpi *lpi = &shared_lpis[index];

	lpi_moves(lpi);
	its_send_movi(&its[i], index / nr_events, index % nr_events, icid);
	lpi->icid[i] = icid;
	lpis_moved(collections[i][icid]);
}

static void shared_mapc(uint32_t i, uint32_t icid, uint32_t cpu)
{
	uint32_t index;

	for (index = 0; index < nr_devices * nr_events; index++)
		if (shared_lpis[index].icid[i] == icid)
			lpi_moves(&shared_lpis[index]);
	its_send_mapc(&its[i], icid, cpu, true);
	collections[i][icid] = cpu;
	lpis_moved(cpu);
}

static void shared_movall(uint32_t i, uint32_t from, uint32_t to)
{
	uint32_t index;

	for (index = 0; index < nr_devices * nr_events; index++)
		if ((shared_lpis[index].target & TARGET_VCPU) == from)
			lpi_moves(&shared_lpis[index]);
	its_send_movall(&its[i], from, to);
	lpis_moved(to);
}

/*
 * Discard the event of an ITS, and map it to the same LPI again.  The other ITS maps
 * the LPI all the time, so neither the target nor the pending state changes.
 */
static void shared_remap(uint32_t i, uint32_t index)
{
	struct shared_lpi *lpi = &shared_lpis[index];
	uint32_t device = index / nr_events, event = index % nr_events;
	uint32_t busy = READ_ONCE(lpi->busy);

	do {
		if (busy & BUSY_MSI(i))
			return;
	} while (!__atomic_compare_exchange_n(&lpi->busy, &busy,
					      busy | BUSY_REMAP(i), false,
					      __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));

	its_send_discard(&its[i], device, event);
	lpi->icid[i] = churn_random(nr_guest_vcpus);
	its_send_mapti(&its[i], device, event, lpi->icid[i], LPI_BASE + index);
	__atomic_and_fetch(&lpi->busy, ~BUSY_REMAP(i), __ATOMIC_RELEASE);
	nr_remaps++;
}

/* Move all LPIs from vCPU @from to @to, and let no collection name @from any more. */
static void evacuate(uint32_t from, uint32_t to)
{
	bool movall_first = churn_random(2);
	uint32_t i, icid;

	if (movall_first)
		shared_movall(churn_random(MAX_ITSES), from, to);
	for (i = 0; i < MAX_ITSES; i++)
		for (icid = 0; icid < nr_guest_vcpus; icid++)
			if (collections[i][icid] == from)
				shared_mapc(i, icid, to);
	if (!movall_first)
		shared_movall(churn_random(MAX_ITSES), from, to);
}

/* Move the LPIs that vCPUs leave in list registers until they are moved. */
static void move_held(void)
{
	uint32_t cpu, intid;

	for (cpu = 0; cpu < nr_vcpus; cpu++) {
		intid = READ_ONCE(held_intid[cpu]);
		if (intid)
			shared_movi(churn_random(MAX_ITSES), intid - LPI_BASE,
				    churn_random(nr_vcpus));
	}
}

static void guest_churn_shared(void)
{
	uint32_t avoid = READ_ONCE(avoid_vcpu), last = nr_guest_vcpus - 1;
	uint32_t i, index, round = nr_churn_rounds;

	/* Other commands could move LPIs that these commands have left behind. */
	if (avoid != NO_VCPU) {
		if (avoid != avoided_vcpu)
			evacuate(avoid, (avoid + 1 + churn_random(nr_vcpus)) % nr_guest_vcpus);
		WRITE_ONCE(avoided_vcpu, avoid);
		return;
	}
	WRITE_ONCE(avoided_vcpu, NO_VCPU);

	/* A quarter of the LPIs in each round, so that rounds are short */
	for (index = round % 4; index < nr_devices * nr_events; index += 4) {
		i = churn_random(MAX_ITSES);
		shared_movi(i, index, churn_random(nr_guest_vcpus));
		its_send_inv(&its[i], index / nr_events, index % nr_events);
		shared_remap(churn_random(MAX_ITSES), index);
		move_held();
	}

	i = churn_random(MAX_ITSES);
	its_send_invall(&its[i], churn_random(nr_guest_vcpus));
	shared_mapc(i, churn_random(nr_guest_vcpus), churn_random(nr_guest_vcpus));
	shared_movall(churn_random(MAX_ITSES), churn_random(nr_guest_vcpus),
		      churn_random(nr_guest_vcpus));

	/* Disable LPIs of this vCPU while none targets it. */
	if (round % 4 == 3) {
		evacuate(last, churn_random(nr_vcpus));
		gicr_set_lpis_enabled(GICR_BASE_GPA, last, false);
		gicr_set_lpis_enabled(GICR_BASE_GPA, last, true);
		nr_toggles++;
		for (i = 0; i < MAX_ITSES; i++)
			shared_mapc(i, last, last);
	}
	WRITE_ONCE(nr_churn_rounds, nr_churn_rounds + 1);
}

/* Wake up each of the other vCPUs, by an LPI that is not counted. */
static void guest_wake_vcpus(void)
{
	uint32_t cpu;

	its_send_mapd(its, CHURN_DEVICE, itt(nr_devices), event_bits, true);
	for (cpu = 0; cpu < nr_vcpus; cpu++) {
		shared_mapc(0, cpu, cpu);
		its_send_mapti(its, CHURN_DEVICE, cpu, cpu, CHURN_LPI + cpu);
		its_send_int(its, CHURN_DEVICE, cpu);
	}
}

static void guest_discard_shared(void)
{
	uint32_t i, index;

	its_send_mapd(its, CHURN_DEVICE, itt(nr_devices), event_bits, false);
	for (index = 0; index < nr_devices * nr_events; index++)
		for (i = 0; i < MAX_ITSES; i++)
			its_send_discard(&its[i], index / nr_events,
					 index % nr_events);
	GUEST_SYNC(0);
}

static void guest_code(void)
{
	uint32_t cpu = guest_get_vcpuid();

	gic_init(GIC_V3, nr_guest_vcpus, (void *)GICD_BASE_GPA,
		 (void *)GICR_BASE_GPA);
	gicr_enable_lpis(GICR_BASE_GPA, cpu, &tables);
	GUEST_SYNC(STAGE_INIT);

	if (!cpu) {
		guest_map();
		if (shared)
			guest_map_shared();
		GUEST_SYNC(STAGE_MAP);
	}

	while (READ_ONCE(stage) != STAGE_STOP) {
		if (cpu == nr_vcpus && shared)
			guest_churn_shared();
		else if (cpu == nr_vcpus)
			guest_churn();
		else
			/* With IRQs masked, an LPI cannot be taken before the wfi. */
			asm volatile("wfi" : : : "memory");
		local_irq_enable();
		isb();
		local_irq_disable();
	}
	if (shared && cpu == nr_vcpus)
		guest_wake_vcpus();
	GUEST_DONE();
}

/* One command for each event, timed by the host */
static void guest_movi_all(void)
{
	uint32_t device, event;

	for (device = 0; device < nr_devices; device++)
		for (event = 0; event < nr_events; event++)
			its_send_movi(its, device, event, 0);
	GUEST_SYNC(0);
}

static void guest_sync_all(void)
{
	uint32_t i;

	for (i = 0; i < nr_devices * nr_events; i++)
		its_send_sync(its, 0);
	GUEST_SYNC(0);
}

static void guest_sync_devices(void)
{
	uint32_t i;

	for (i = 0; i < nr_devices; i++)
		its_send_sync(its, 0);
	GUEST_SYNC(0);
}

static void guest_discard_all(void)
{
	uint32_t device, event;

	for (device = 0; device < nr_devices; device++)
		for (event = 0; event < nr_events; event++)
			its_send_discard(its, device, event);
	GUEST_SYNC(0);
}

static void guest_mapti_all(void)
{
	uint32_t device, event;

	for (device = 0; device < nr_devices; device++)
		for (event = 0; event < nr_events; event++)
			its_send_mapti(its, device, event, 0,
				       LPI_BASE + lpi_index(device, event));
	GUEST_SYNC(0);
}

/* One command for each device */
static void guest_mapd_all(void)
{
	uint32_t device;

	for (device = 0; device < nr_devices; device++)
		its_send_mapd(its, device, itt(device), event_bits, true);
	GUEST_SYNC(0);
}

static void guest_mapd_unmap_all(void)
{
	uint32_t device;

	for (device = 0; device < nr_devices; device++)
		its_send_mapd(its, device, itt(device), event_bits, false);
	GUEST_SYNC(0);
}

/* The host */

static enum stage host_stage(void)
{
	return READ_ONCE(*(enum stage *)addr_gva2hva(vm, (vm_vaddr_t)&stage));
}

static void set_stage(enum stage s)
{
	WRITE_ONCE(*(enum stage *)addr_gva2hva(vm, (vm_vaddr_t)&stage), s);
}

/* Returns the ucall for which a vCPU has left KVM_RUN. */
static uint64_t expect_ucall(struct kvm_vcpu *vcpu)
{
	struct ucall uc;
	uint64_t cmd = get_ucall(vcpu, &uc);

	if (cmd == UCALL_ABORT)
		REPORT_GUEST_ASSERT_2(uc, "values: %#lx, %#lx");
	TEST_ASSERT(cmd == UCALL_SYNC || cmd == UCALL_DONE,
		    "Unexpected exit of vCPU %u: %s", vcpu->id,
		    exit_reason_str(vcpu->run->exit_reason));
	return cmd;
}

static uint64_t run_vcpu(struct kvm_vcpu *vcpu)
{
	vcpu_run(vcpu);
	return expect_ucall(vcpu);
}

static void expect_done(uint64_t cmd)
{
	TEST_ASSERT(cmd == UCALL_DONE, "Expected ucall %u, got %lu", UCALL_DONE,
		    cmd);
}

static void *vcpu_thread(void *arg)
{
	expect_done(run_vcpu(arg));
	return NULL;
}

static void signal_msi_its(uint32_t i, uint32_t device, uint32_t event)
{
	int ret = __kvm_signal_msi(vm, its[i].base + GITS_TRANSLATER,
				   KVM_MSI_VALID_DEVID, device, event);

	TEST_ASSERT(ret == 1,
		    "MSI (%#x, %#x), ITS %u: expected KVM_SIGNAL_MSI to return 1, got %d",
		    device, event, i, ret);
}

static void signal_msi(uint32_t device, uint32_t event)
{
	signal_msi_its(0, device, event);
}

/* The number of an event among those of all ITSes, for irqfds */
static uint32_t event_gsi(uint32_t i, uint32_t device, uint32_t event)
{
	return i * nr_devices * nr_events + lpi_index(device, event);
}

static void raise_event_its(uint32_t i, uint32_t device, uint32_t event)
{
	uint64_t one = 1;
	ssize_t ret;

	if (!use_irqfd) {
		signal_msi_its(i, device, event);
		return;
	}

	ret = write(eventfds[event_gsi(i, device, event)], &one, sizeof(one));
	TEST_ASSERT(ret == sizeof(one), __KVM_SYSCALL_ERROR("write()", (int)ret));
}

static void raise_event(uint32_t device, uint32_t event)
{
	raise_event_its(0, device, event);
}

static void check_handled(const char *when, uint32_t index, uint32_t expected)
{
	uint32_t count = __atomic_load_n(&host_lpi_count[index], __ATOMIC_ACQUIRE);

	TEST_ASSERT(count == expected,
		    "LPI %u, %s: expected %u MSIs to be handled %u times, got %u",
		    LPI_BASE + index, when, expected, expected, count);
}

static struct shared_lpi *host_shared_lpi(uint32_t index)
{
	return (struct shared_lpi *)addr_gva2hva(vm, (vm_vaddr_t)shared_lpis) + index;
}

/*
 * Choose the ITS for the next MSI of an LPI, in turn, but not one whose event is being
 * mapped again.  The guest leaves the event of this ITS alone until msi_end().
 */
static uint32_t msi_begin(uint32_t index, uint32_t iteration)
{
	uint32_t *busy_ptr = &host_shared_lpi(index)->busy;
	uint32_t i, busy = READ_ONCE(*busy_ptr);

	do {
		i = (index + iteration) % MAX_ITSES;
		if (busy & BUSY_REMAP(i))
			i = !i;
	} while (!__atomic_compare_exchange_n(busy_ptr, &busy, busy | BUSY_MSI(i), false,
					      __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));

	__atomic_add_fetch(&nr_msis[i], 1, __ATOMIC_RELAXED);
	return i;
}

static void msi_end(uint32_t index)
{
	__atomic_and_fetch(&host_shared_lpi(index)->busy,
			   ~(BUSY_MSI(0) | BUSY_MSI(1)), __ATOMIC_RELEASE);
}

/* Raise all events of a device, each through one of its ITSes. */
static void raise_shared_device(uint32_t device, uint32_t iteration)
{
	uint32_t event, index;

	for (event = 0; event < nr_events; event++) {
		index = lpi_index(device, event);
		check_handled("before the next MSI", index, iteration);
		raise_event_its(msi_begin(index, iteration), device, event);
	}

	for (event = 0; event < nr_events; event++) {
		index = lpi_index(device, event);
		__wait_for(__atomic_load_n(&host_lpi_count[index],
					   __ATOMIC_ACQUIRE) > iteration,
			   "LPI %u: expected %u MSIs to be handled after %d s, got %u",
			   LPI_BASE + index, iteration + 1, WAIT_LIMIT_SECS,
			   READ_ONCE(host_lpi_count[index]));
		check_handled("after an MSI", index, iteration + 1);
		msi_end(index);
	}
	WRITE_ONCE(nr_completed[device], iteration + 1);
}

/* Raise all events of a device.  If the guest runs, wait until it has taken them. */
static void raise_device(uint32_t device, uint32_t iteration)
{
	uint32_t event;

	if (shared) {
		raise_shared_device(device, iteration);
		return;
	}

	for (event = 0; event < nr_events; event++)
		raise_event(device, event);

	if (only_inject)
		return;
	for (event = 0; event < nr_events; event++)
		wait_for(__atomic_load_n(&host_lpi_count[lpi_index(device, event)],
					 __ATOMIC_ACQUIRE) > iteration);
}

static uint64_t guest_counter(uint64_t *counter)
{
	return READ_ONCE(*(uint64_t *)addr_gva2hva(vm, (vm_vaddr_t)counter));
}

/* Whether -s has met everything that it checks.  If not, @missing is what it has not. */
static bool shared_complete(const char **missing)
{
	const struct {
		const char *name;
		uint64_t nr;
	} counters[] = {
		{ "MSIs through ITS 0", READ_ONCE(nr_msis[0]) },
		{ "MSIs through ITS 1", READ_ONCE(nr_msis[1]) },
		{ "LPIs handled by other vCPUs than at first", guest_counter(&nr_stray) },
		{ "LPIs with known target", guest_counter(&nr_checked) },
		{ "LPIs moved while held in a list register", guest_counter(&nr_held_moved) },
		{ "events mapped again", guest_counter(&nr_remaps) },
		{ "times that LPIs were disabled", guest_counter(&nr_toggles) },
		{ "stops of a vCPU whose LPIs others took", READ_ONCE(nr_stops_taken) },
	};
	uint32_t i;

	for (i = 0; i < ARRAY_SIZE(counters); i++) {
		*missing = counters[i].name;
		if (!counters[i].nr)
			return false;
	}
	return true;
}

static void *device_thread(void *arg)
{
	uint32_t i, device = (uintptr_t)arg;
	const char *missing;
	uint64_t start;

	pthread_barrier_wait(&barrier);
	/* Iteration 0 is the first injection, in run(). */
	for (i = 1; i <= nr_iterations; i++)
		raise_device(device, i);
	if (!shared)
		return NULL;

	for (start = now_ns(); !shared_complete(&missing); i++) {
		TEST_ASSERT((now_ns() - start) / 1000000000 < WAIT_LIMIT_SECS,
			    "Expected the number of %s to be above 0 after %u iterations and %d s, got 0",
			    missing, nr_iterations, WAIT_LIMIT_SECS);
		raise_device(device, i);
	}
	WRITE_ONCE(device_done[device], true);
	return NULL;
}

/* Start all threads at once, and return the nanoseconds until all are done. */
static uint64_t time_device_threads(void)
{
	pthread_t *threads = calloc(nr_devices, sizeof(*threads));
	uint64_t start, elapsed;
	uint32_t i;

	TEST_ASSERT(threads, "Failed to allocate %u threads", nr_devices);
	pthread_barrier_init(&barrier, NULL, nr_devices + 1);
	for (i = 0; i < nr_devices; i++)
		threads[i] = start_thread(device_thread, (void *)(uintptr_t)i);
	pthread_barrier_wait(&barrier);
	start = now_ns();
	/* No time limit here: each wait in the threads has its own. */
	for (i = 0; i < nr_devices; i++)
		pthread_join(threads[i], NULL);
	elapsed = now_ns() - start;
	pthread_barrier_destroy(&barrier);
	free(threads);
	return elapsed;
}

static void report(uint64_t elapsed, uint64_t first)
{
	uint32_t nr = nr_devices * nr_events;
	uint64_t total = (uint64_t)nr * nr_iterations;

	pr_info("%u vCPUs, %u devices, %u events, %s%s: %lu LPIs, %.0f LPIs/s, %lu ns each, %lu ns at first\n",
		nr_vcpus, nr_devices, nr_events,
		use_irqfd ? "irqfd" : "KVM_SIGNAL_MSI",
		only_inject ? ", injection only" : "", total,
		total * 1e9 / elapsed, elapsed / total, first / nr);
	pr_info("perf: lpi ns %lu\n", elapsed / total);
	pr_info("perf: first-lpi ns %lu\n", first / nr);
}

/* KVM accepts or refuses these MSIs, depending on what the guest has mapped. */
static void *churn_msi_thread(void *arg)
{
	uint32_t i;
	int ret;

	for (i = 0; host_stage() != STAGE_STOP; i++) {
		ret = __kvm_signal_msi(vm, its->base + GITS_TRANSLATER,
				       KVM_MSI_VALID_DEVID, CHURN_DEVICE,
				       i % CHURN_EVENTS);
		TEST_ASSERT(ret == 0 || ret == 1 || ret == -EBUSY,
			    "Churned MSI: expected KVM_SIGNAL_MSI to return 0, 1 or %d, got %d",
			    -EBUSY, ret);
		sched_yield();
	}
	return NULL;
}

/* Read the vgic's state repeatedly, at least once if debugfs is mounted. */
static void *debugfs_thread(void *arg)
{
	char path[128], buf[4096];
	ssize_t ret;
	int fd;

	if (access("/sys/kernel/debug/kvm", F_OK))
		return NULL;

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/vgic-state",
		 getpid(), vm->fd);
	do {
		fd = open(path, O_RDONLY);
		TEST_ASSERT(fd >= 0, "Failed to open %s, errno: %d", path, errno);
		do {
			ret = read(fd, buf, sizeof(buf));
		} while (ret > 0);
		TEST_ASSERT(!ret, "Failed to read %s, errno: %d", path, errno);
		nr_state_reads++;
		close(fd);
		sched_yield();
	} while (host_stage() != STAGE_STOP);
	return NULL;
}

static void create_vm(void)
{
	uint32_t nr_itses = shared ? MAX_ITSES : 1, nr_gsis = nr_itses * nr_devices * nr_events;
	uint32_t i, device, event;
	uint64_t itt_size;

	nr_guest_vcpus = nr_vcpus + (churn || shared);
	/* The device of -c has up to MAX_VCPUS events with -s. */
	for (event_bits = shared ? 6 : 5; 1U << event_bits < nr_events; event_bits++)
		;
	itt_size = (nr_itses * (nr_devices + 1ULL) << event_bits) * 8;
	itt_size = (itt_size + SZ_64K - 1) & ~(SZ_64K - 1ULL);

	vm = vm_create_with_vcpus(nr_guest_vcpus, guest_code, vcpus);
	ucall_init(vm, NULL);
	vm_init_descriptor_tables(vm);
	for (i = 0; i < nr_guest_vcpus; i++)
		vcpu_init_descriptor_tables(vcpus[i]);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_irq_handler);

	gic_fd = vgic_v3_setup(vm, nr_guest_vcpus, 64, GICD_BASE_GPA,
			       GICR_BASE_GPA);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
	vgic_its_setup(vm, its, nr_itses, ITS_BASE_GPA, &tables, nr_guest_vcpus,
		       itt_size, TABLES_GPA);

	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);
	sync_global_to_guest(vm, nr_vcpus);
	sync_global_to_guest(vm, nr_devices);
	sync_global_to_guest(vm, nr_events);
	sync_global_to_guest(vm, nr_guest_vcpus);
	sync_global_to_guest(vm, event_bits);
	sync_global_to_guest(vm, shared);
	host_lpi_count = addr_gva2hva(vm, (vm_vaddr_t)lpi_count);

	if (use_irqfd) {
		struct kvm_irq_routing *routing = kvm_gsi_routing_create();
		/* 256 for files other than the eventfds */
		rlim_t nr_fds = nr_gsis + 256;
		struct rlimit rlimit = { nr_fds, nr_fds };

		TEST_ASSERT(!setrlimit(RLIMIT_NOFILE, &rlimit),
			    "Failed to allow %lu open files, errno: %d", nr_fds,
			    errno);
		eventfds = calloc(nr_gsis, sizeof(*eventfds));
		for (i = 0; i < nr_itses; i++)
			for (device = 0; device < nr_devices; device++)
				for (event = 0; event < nr_events; event++)
					kvm_gsi_routing_msi_add(routing,
								event_gsi(i, device, event),
								its[i].base + GITS_TRANSLATER,
								device, event);
		kvm_gsi_routing_write(vm, routing);
		for (i = 0; i < nr_gsis; i++)
			eventfds[i] = kvm_irqfd_create(vm, i);
	}

	for (i = 0; i < nr_guest_vcpus; i++)
		run_vcpu(vcpus[i]);
	run_vcpu(vcpus[0]);
}

/* The command does not return: start each one with the same stack. */
static uint64_t time_guest(void (*command)(void))
{
	static uint64_t sp;
	uint64_t start;

	if (!sp)
		vcpu_get_reg(vcpus[0], ARM64_CORE_REG(sp_el1), &sp);
	vcpu_set_reg(vcpus[0], ARM64_CORE_REG(sp_el1), sp);
	vcpu_set_reg(vcpus[0], ARM64_CORE_REG(regs.pc), (uint64_t)command);
	start = now_ns();
	run_vcpu(vcpus[0]);
	return now_ns() - start;
}

static void report_command(const char *name, uint64_t elapsed, uint64_t sync, uint32_t nr)
{
	pr_info("perf: %s ns %ld\n", name, ((long)elapsed - (long)sync) / nr);
}

/*
 * Send each command to all events or devices, in several rounds, and report the time that
 * it takes in the fastest round minus that of SYNC, which KVM ignores.  MAPD maps devices
 * that have been unmapped, and MAPTI maps events that have been discarded.
 */
static void report_commands(void)
{
	void (*commands[])(void) = {
		guest_sync_all, guest_movi_all, guest_discard_all, guest_mapd_unmap_all,
		guest_sync_devices, guest_mapd_all, guest_mapti_all,
	};
	uint64_t elapsed, times[ARRAY_SIZE(commands)];
	uint32_t nr = nr_devices * nr_events, i, round;

	memset(times, 0xff, sizeof(times));
	for (round = 0; round < TIMED_ROUNDS; round++) {
		for (i = 0; i < ARRAY_SIZE(commands); i++) {
			elapsed = time_guest(commands[i]);
			if (elapsed < times[i])
				times[i] = elapsed;
		}
	}

	pr_info("%u events mapped, time of SYNC subtracted:\n", nr);
	report_command("movi", times[1], times[0], nr);
	report_command("discard", times[2], times[0], nr);
	report_command("mapd", times[5], times[4], nr_devices);
	report_command("mapti", times[6], times[0], nr);
}

static uint64_t raise_all(void)
{
	uint64_t start = now_ns();
	uint32_t i;

	for (i = 0; i < nr_devices * nr_events; i++)
		raise_event(i / nr_events, i % nr_events);

	return now_ns() - start;
}

static void run_only_inject(void)
{
	uint64_t first, elapsed = 0;
	uint32_t i;

	first = raise_all();
	/*
	 * An irqfd hands an MSI that it cannot inject to a worker, which may not
	 * run while this thread is busy.  Inject each LPI once via KVM_SIGNAL_MSI,
	 * so that a kernel that caches translations on first use has cached them.
	 */
	for (i = 0; i < nr_devices * nr_events; i++)
		signal_msi(i / nr_events, i % nr_events);
	if (use_threads)
		elapsed = time_device_threads();
	else
		for (i = 0; i < nr_iterations; i++)
			elapsed += raise_all();
	report(elapsed, first);
}

static void run(void)
{
	uint64_t start, first, elapsed;
	pthread_t vcpu_threads[MAX_VCPUS], msi_thread = 0, state_thread = 0;
	uint32_t i, nr = nr_devices * nr_events;

	for (i = 0; i < nr_guest_vcpus; i++)
		vcpu_threads[i] = start_thread(vcpu_thread, vcpus[i]);
	if (churn) {
		msi_thread = start_thread(churn_msi_thread, NULL);
		state_thread = start_thread(debugfs_thread, NULL);
	}

	start = now_ns();
	for (i = 0; i < nr_devices; i++)
		raise_device(i, 0);
	first = now_ns() - start;

	elapsed = time_device_threads();

	/* The vCPU of -c polls the stage.  The others wait for an LPI, see below. */
	set_stage(STAGE_STOP);
	if (churn) {
		join_thread(vcpu_threads[nr_vcpus], "churning vCPU");
		join_thread(msi_thread, "churned MSIs");
		join_thread(state_thread, "debugfs");
	}
	for (i = 0; i < nr_vcpus; i++)
		signal_msi(i / nr_events, i % nr_events);
	for (i = 0; i < nr_vcpus; i++)
		join_thread(vcpu_threads[i], "vCPU");

	sync_global_from_guest(vm, vcpu_count);
	sync_global_from_guest(vm, nr_stray);
	sync_global_from_guest(vm, nr_churned);
	sync_global_from_guest(vm, nr_churn_rounds);

	TEST_ASSERT(!nr_stray, "%lu LPIs arrived at a vCPU that is not their target",
		    nr_stray);
	for (i = 0; i < nr_vcpus; i++) {
		uint64_t lpis = (nr - i + nr_vcpus - 1) / nr_vcpus;
		uint64_t expected = lpis * (nr_iterations + 1ULL);

		/* The LPI that ends the test may or may not be delivered. */
		TEST_ASSERT(vcpu_count[i] == expected ||
			    vcpu_count[i] == expected + 1,
			    "vCPU %u: expected %lu LPIs, got %lu", i, expected,
			    vcpu_count[i]);
		pr_info("vCPU %u: %lu LPIs\n", i, vcpu_count[i]);
	}

	report(elapsed, first);
	if (churn) {
		pr_info("%lu rounds of commands, %lu LPIs of churned events\n",
			nr_churn_rounds, nr_churned);
		if (nr_state_reads)
			pr_info("vgic state read %lu times in debugfs\n", nr_state_reads);
		else
			pr_info("debugfs not read: not mounted?\n");
	}
}

static void stop_signal(int sig)
{
	this_vcpu->run->immediate_exit = 1;
}

/* Run a vCPU.  On a signal, stay in userspace until the vCPU may go on. */
static void *stoppable_vcpu_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;

	this_vcpu = &stoppable[vcpu->id];
	this_vcpu->run = vcpu->run;
	/* The signal handler can be used from now on. */
	sem_post(&this_vcpu->stopped);
	while (__vcpu_run(vcpu)) {
		TEST_ASSERT(errno == EINTR, KVM_IOCTL_ERROR(KVM_RUN, -1));
		vcpu->run->immediate_exit = 0;
		sem_post(&this_vcpu->stopped);
		while (sem_wait(&this_vcpu->resume))
			TEST_ASSERT(errno == EINTR, __KVM_SYSCALL_ERROR("sem_wait()", -1));
	}
	expect_done(expect_ucall(vcpu));
	return NULL;
}

static uint64_t host_churn_rounds(void)
{
	return guest_counter(&nr_churn_rounds);
}

static uint32_t host_avoided_vcpu(void)
{
	return READ_ONCE(*(uint32_t *)addr_gva2hva(vm, (vm_vaddr_t)&avoided_vcpu));
}

static void set_avoid_vcpu(uint32_t cpu)
{
	WRITE_ONCE(*(uint32_t *)addr_gva2hva(vm, (vm_vaddr_t)&avoid_vcpu), cpu);
}

/*
 * With a vCPU stopped, and all LPIs moved to others, each device has to complete the
 * iteration that it is in: the LPIs that were pending on this vCPU are taken, too.
 */
static void wait_for_devices(uint32_t cpu)
{
	uint32_t device, seen, nr_waits = 0;

	for (device = 0; device < nr_devices; device++) {
		seen = READ_ONCE(nr_completed[device]);
		if (READ_ONCE(device_done[device]))
			continue;
		__wait_for(READ_ONCE(nr_completed[device]) > seen ||
			   READ_ONCE(device_done[device]),
			   "vCPU %u stopped: expected device %u to complete iteration %u after %d s, got %u",
			   cpu, device, seen + 1, WAIT_LIMIT_SECS,
			   READ_ONCE(nr_completed[device]));
		nr_waits++;
	}
	nr_stops_taken += nr_waits == nr_devices;
}

/*
 * Stop one vCPU after the other.  Each second time around, no LPI may target the vCPU
 * that is stopped.
 */
static void *stop_thread(void *arg)
{
	struct stoppable_vcpu *vcpu;
	uint32_t i, cpu;
	uint64_t rounds;

	for (i = 0; !READ_ONCE(stops_done); i++) {
		cpu = i % nr_vcpus;
		vcpu = &stoppable[cpu];

		/* Let all vCPUs run for some rounds. */
		rounds = host_churn_rounds();
		__wait_for(host_churn_rounds() >= rounds + 4,
			   "No vCPU stopped: expected %lu rounds of commands after %d s, got %lu",
			   rounds + 4, WAIT_LIMIT_SECS, host_churn_rounds());

		pthread_kill(vcpu->thread, SIGUSR1);
		__wait_for(!sem_trywait(&vcpu->stopped),
			   "vCPU %u: expected it to leave KVM_RUN after a signal, still there after %d s",
			   cpu, WAIT_LIMIT_SECS);

		/* One round may be under way. */
		rounds = host_churn_rounds();
		__wait_for(host_churn_rounds() >= rounds + 2,
			   "vCPU %u stopped: expected %lu rounds of commands after %d s, got %lu",
			   cpu, rounds + 2, WAIT_LIMIT_SECS, host_churn_rounds());
		nr_stops++;

		if (i / nr_vcpus % 2) {
			set_avoid_vcpu(cpu);
			__wait_for(host_avoided_vcpu() == cpu,
				   "vCPU %u stopped: expected commands to move all LPIs, not done after %d s",
				   cpu, WAIT_LIMIT_SECS);
			wait_for_devices(cpu);
			set_avoid_vcpu(NO_VCPU);
		}

		vcpu->nr_stops++;
		sem_post(&vcpu->resume);
	}
	return NULL;
}

static bool vm_has_stat(const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *desc;
	bool found = false;
	uint32_t i;
	int fd = vm_get_stats_fd(vm);

	read_stats_header(fd, &header);
	desc = read_stats_descriptors(fd, &header);
	for (i = 0; i < header.num_desc && !found; i++)
		found = !strcmp(get_stats_descriptor(desc, i, &header)->name, name);
	free(desc);
	close(fd);
	return found;
}

static void check_vm_stat(const char *when, const char *name, uint64_t expected)
{
	uint64_t stat;

	if (!vm_has_stat(name)) {
		pr_info("%s not checked: this kernel does not have it\n", name);
		return;
	}
	stat = vm_get_stat(vm, name);
	TEST_ASSERT(stat == expected, "%s: expected %s to be %lu, got %lu", when, name,
		    expected, stat);
}

/* All vCPUs have left the guest.  The pending tables show an LPI that was raised again. */
static void check_nothing_pending(void)
{
	uint32_t cpu, i;

	kvm_device_attr_set(gic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, NULL);
	for (cpu = 0; cpu < nr_guest_vcpus; cpu++) {
		uint8_t *table = addr_gpa2hva(vm, tables.pending + cpu * SZ_64K);

		for (i = LPI_BASE; i < LPI_BASE + nr_devices * nr_events; i++)
			TEST_ASSERT(!(table[i / 8] & 1 << i % 8),
				    "LPI %u: expected no more than %u MSIs, but it is pending on vCPU %u",
				    i, nr_completed[(i - LPI_BASE) / nr_events], cpu);
	}
}

static void check_shared_lpis(const char *when)
{
	uint32_t i;

	for (i = 0; i < nr_devices * nr_events; i++)
		check_handled(when, i, nr_completed[i / nr_events]);
}

static void run_shared(void)
{
	struct sigaction sigact = { .sa_handler = stop_signal };
	uint32_t i, nr = nr_devices * nr_events;
	pthread_t churn_vcpu, stopper;
	uint64_t total = 0, expected = 0;

	nr_completed = calloc(nr_devices, sizeof(*nr_completed));
	device_done = calloc(nr_devices, sizeof(*device_done));
	TEST_ASSERT(nr_completed && device_done, "Failed to allocate %u counters", nr_devices);
	TEST_ASSERT(!sigaction(SIGUSR1, &sigact, NULL),
		    __KVM_SYSCALL_ERROR("sigaction()", -1));

	for (i = 0; i < nr_vcpus; i++) {
		sem_init(&stoppable[i].stopped, 0, 0);
		sem_init(&stoppable[i].resume, 0, 0);
		stoppable[i].thread = start_thread(stoppable_vcpu_thread, vcpus[i]);
		wait_for(!sem_trywait(&stoppable[i].stopped));
	}
	churn_vcpu = start_thread(vcpu_thread, vcpus[nr_vcpus]);
	stopper = start_thread(stop_thread, NULL);

	for (i = 0; i < nr_devices; i++)
		raise_device(i, 0);
	time_device_threads();

	/* No vCPU is stopped after this. */
	__wait_for(READ_ONCE(nr_stops) >= nr_vcpus,
		   "Expected each of %u vCPUs to be stopped after %d s, got %lu stops",
		   nr_vcpus, WAIT_LIMIT_SECS, READ_ONCE(nr_stops));
	WRITE_ONCE(stops_done, true);
	join_thread(stopper, "stops of vCPUs");
	check_shared_lpis("at the end");

	/* The last vCPU wakes up the others.  None of the LPIs that are counted does. */
	set_stage(STAGE_STOP);
	join_thread(churn_vcpu, "churning vCPU");
	for (i = 0; i < nr_vcpus; i++)
		join_thread(stoppable[i].thread, "vCPU");
	check_shared_lpis("after the last vCPU has stopped");
	check_nothing_pending();

	sync_global_from_guest(vm, vcpu_count);
	sync_global_from_guest(vm, nr_stray);
	sync_global_from_guest(vm, nr_churn_rounds);
	sync_global_from_guest(vm, nr_remaps);
	sync_global_from_guest(vm, nr_toggles);
	sync_global_from_guest(vm, nr_checked);
	sync_global_from_guest(vm, nr_held_moved);
	sync_global_from_guest(vm, nr_late);
	sync_global_from_guest(vm, late_intid);
	sync_global_from_guest(vm, late_vcpu);
	sync_global_from_guest(vm, late_target);

	for (i = 0; i < nr_guest_vcpus; i++) {
		pr_info("vCPU %u: %lu LPIs, stopped %lu times\n", i, vcpu_count[i],
			stoppable[i].nr_stops);
		total += vcpu_count[i];
	}
	pr_info("%lu MSIs through ITS 0, %lu through ITS 1, by %s\n", nr_msis[0],
		nr_msis[1], use_irqfd ? "irqfd" : "KVM_SIGNAL_MSI");
	pr_info("%lu LPIs handled by another vCPU than their first target, %lu with known target\n",
		nr_stray, nr_checked);
	pr_info("%lu LPIs moved while a vCPU held them in a list register\n", nr_held_moved);
	pr_info("%lu rounds of commands, %lu events mapped again, LPIs disabled %lu times\n",
		nr_churn_rounds, nr_remaps, nr_toggles);
	pr_info("%lu stops of vCPUs, LPIs of all devices taken by others in %lu\n", nr_stops,
		nr_stops_taken);

	TEST_ASSERT(!nr_late,
		    "LPI %u: moved to vCPU %u, expected no other to take it, taken by vCPU %u (%lu such LPIs)",
		    late_intid, late_target, late_vcpu, nr_late);
	for (i = 0; i < nr_devices; i++)
		expected += nr_events * (uint64_t)nr_completed[i];
	TEST_ASSERT(total == expected, "Expected the vCPUs to take %lu LPIs, got %lu", expected,
		    total);

	if (use_irqfd)
		check_vm_stat("irqfd", "lpi_inatomic_fallbacks", 0);
	check_vm_stat("mapped by two ITSes", "lpis", nr + nr_vcpus);
	check_vm_stat("mapped by two ITSes", "lpis_allocated", nr + nr_vcpus);
	time_guest(guest_discard_shared);
	check_vm_stat("discarded by both ITSes", "lpis", 0);
	check_vm_stat("discarded by both ITSes", "lpis_allocated", 0);
}

static void help(const char *name)
{
	pr_info("Usage: %s [-h] [-v vcpus] [-d devices] [-e events] [-i iterations] [-f] [-p [-m]] [-c] [-s] [-t]\n",
		name);
	pr_info("\t-v: vCPUs that take LPIs (default: 1)\n");
	pr_info("\t-d: devices, with a thread each (default: 1)\n");
	pr_info("\t-e: events of each device (default: 16)\n");
	pr_info("\t-i: times that each event is raised (default: 1000)\n");
	pr_info("\t-f: raise events via irqfd instead of KVM_SIGNAL_MSI\n");
	pr_info("\t-p: measure injection alone, vCPUs do not run\n");
	pr_info("\t-m: with -p, use one thread for each device\n");
	pr_info("\t-c: churn: send ITS commands during the test, from one more vCPU\n");
	pr_info("\t-s: two ITSes share each LPI, and one more vCPU moves the LPIs\n");
	pr_info("\t-t: only report the time of MOVI, DISCARD, MAPD and MAPTI\n");
}

int main(int argc, char *argv[])
{
	int opt;

	/* Show each line at once, even if the test hangs or crashes later. */
	setbuf(stdout, NULL);

	while ((opt = getopt(argc, argv, "hv:d:e:i:fpmcst")) != -1) {
		switch (opt) {
		case 'v':
			nr_vcpus = atoi(optarg);
			break;
		case 'd':
			nr_devices = atoi(optarg);
			break;
		case 'e':
			nr_events = atoi(optarg);
			break;
		case 'i':
			nr_iterations = atoi(optarg);
			break;
		case 'f':
			use_irqfd = true;
			break;
		case 'p':
			only_inject = true;
			break;
		case 'm':
			use_threads = true;
			break;
		case 'c':
			churn = true;
			break;
		case 's':
			shared = true;
			break;
		case 't':
			time_commands = true;
			break;
		case 'h':
		default:
			help(argv[0]);
			exit(opt == 'h' ? 0 : KSFT_SKIP);
		}
	}

	TEST_ASSERT(nr_vcpus && nr_vcpus < MAX_VCPUS, "Between 1 and %d vCPUs",
		    MAX_VCPUS - 1);
	TEST_ASSERT(nr_iterations, "At least 1 iteration");
	TEST_ASSERT(!use_threads || only_inject, "-m only with -p");
	TEST_ASSERT((uint64_t)nr_devices * nr_events <= MAX_LPIS &&
		    nr_devices * nr_events >= nr_vcpus,
		    "Between %u (one for each vCPU) and %d LPIs", nr_vcpus, MAX_LPIS);
	TEST_ASSERT(!use_irqfd || nr_devices * nr_events <= KVM_MAX_IRQ_ROUTES,
		    "At most %d LPIs via irqfd", KVM_MAX_IRQ_ROUTES);
	TEST_ASSERT(!shared || nr_vcpus >= 2, "At least 2 vCPUs with -s, got %u", nr_vcpus);
	TEST_ASSERT(!shared || nr_devices * nr_events <= MAX_SHARED_LPIS,
		    "At most %d LPIs with -s", MAX_SHARED_LPIS);
	TEST_ASSERT(!shared || !(churn || only_inject || time_commands),
		    "-s only without -c, -p and -t");

	create_vm();
	if (time_commands)
		report_commands();
	else if (only_inject)
		run_only_inject();
	else if (shared)
		run_shared();
	else
		run();
	ucall_uninit(vm);
	kvm_vm_free(vm);

	return 0;
}
