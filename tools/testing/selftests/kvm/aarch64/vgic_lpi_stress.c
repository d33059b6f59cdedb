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
 * With -t, no events are raised.  The time that commands take is reported instead.
 *
 * With -c, one more vCPU maps, moves and unmaps events of its own device during
 * the test, with DISCARD, MAPTI, MOVI, MAPD, INVALL and other commands.  A thread
 * raises these events, and another one reads the state of the vgic in debugfs.
 * The test does not check where these LPIs arrive, but they must not affect the
 * LPIs that are counted.
 */

#define _GNU_SOURCE

#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/sizes.h>
#include <pthread.h>
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

enum stage {
	STAGE_INIT,
	STAGE_MAP,
	STAGE_STOP,
};

/* Shared with the guest */
static struct its its;
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

static uint32_t nr_iterations = 1000;
static bool use_irqfd, churn, only_inject, use_threads, time_commands;

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[MAX_VCPUS];
static int *eventfds;
static pthread_barrier_t barrier;
static uint32_t *host_lpi_count;
static uint64_t nr_state_reads;

static uint32_t lpi_index(uint32_t device, uint32_t event)
{
	return device * nr_events + event;
}

/* The guest */

static uint64_t itt(uint32_t device)
{
	return tables.itt + (device << event_bits) * 8;
}

static void guest_irq_handler(struct ex_regs *regs)
{
	uint32_t cpu = guest_get_vcpuid();
	uint32_t intid = gic_get_and_ack_irq();
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

	its_init(&its);
	for (cpu = 0; cpu < nr_guest_vcpus; cpu++)
		its_send_mapc(&its, cpu, cpu, true);

	for (device = 0; device < nr_devices; device++) {
		its_send_mapd(&its, device, itt(device), event_bits, true);
		for (event = 0; event < nr_events; event++) {
			index = lpi_index(device, event);
			its_send_mapti(&its, device, event, index % nr_vcpus,
				       LPI_BASE + index);
		}
	}
}

static void guest_churn(void)
{
	uint32_t event, last = nr_guest_vcpus - 1, round = nr_churn_rounds;

	its_send_mapd(&its, CHURN_DEVICE, itt(nr_devices), event_bits, true);
	for (event = 0; event < CHURN_EVENTS; event++)
		its_send_mapti(&its, CHURN_DEVICE, event, event % nr_vcpus,
			       CHURN_LPI + event);
	for (event = 0; event < CHURN_EVENTS; event++)
		its_send_movi(&its, CHURN_DEVICE, event,
			      (event + round) % nr_guest_vcpus);
	its_send_inv(&its, CHURN_DEVICE, round % CHURN_EVENTS);
	its_send_invall(&its, round % nr_vcpus);
	its_send_clear(&its, CHURN_DEVICE, round % CHURN_EVENTS);
	its_send_int(&its, CHURN_DEVICE, round % CHURN_EVENTS);
	/* The last vCPU is not the target of any LPI that is counted. */
	its_send_mapc(&its, last, last, false);
	its_send_mapc(&its, last, last, true);
	its_send_movall(&its, last, 0);
	gicr_set_lpis_enabled(GICR_BASE_GPA, last, false);
	gicr_set_lpis_enabled(GICR_BASE_GPA, last, true);
	for (event = 0; event < CHURN_EVENTS; event += 2)
		its_send_discard(&its, CHURN_DEVICE, event);
	if (round % 2)
		its_send_mapd(&its, CHURN_DEVICE, itt(nr_devices), event_bits,
			      false);
	nr_churn_rounds++;
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
		GUEST_SYNC(STAGE_MAP);
	}

	while (READ_ONCE(stage) != STAGE_STOP) {
		if (cpu == nr_vcpus)
			guest_churn();
		else
			/* With IRQs masked, an LPI cannot be taken before the wfi. */
			asm volatile("wfi" : : : "memory");
		local_irq_enable();
		isb();
		local_irq_disable();
	}
	GUEST_DONE();
}

/* One command for each event, timed by the host */
static void guest_movi_all(void)
{
	uint32_t device, event;

	for (device = 0; device < nr_devices; device++)
		for (event = 0; event < nr_events; event++)
			its_send_movi(&its, device, event, 0);
	GUEST_SYNC(0);
}

static void guest_sync_all(void)
{
	uint32_t i;

	for (i = 0; i < nr_devices * nr_events; i++)
		its_send_sync(&its, 0);
	GUEST_SYNC(0);
}

static void guest_discard_all(void)
{
	uint32_t device, event;

	for (device = 0; device < nr_devices; device++)
		for (event = 0; event < nr_events; event++)
			its_send_discard(&its, device, event);
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

static uint64_t run_vcpu(struct kvm_vcpu *vcpu)
{
	struct ucall uc;
	uint64_t cmd;

	vcpu_run(vcpu);
	cmd = get_ucall(vcpu, &uc);
	if (cmd == UCALL_ABORT)
		REPORT_GUEST_ASSERT_2(uc, "values: %#lx, %#lx");
	TEST_ASSERT(cmd == UCALL_SYNC || cmd == UCALL_DONE,
		    "Unexpected exit of vCPU %u: %s", vcpu->id,
		    exit_reason_str(vcpu->run->exit_reason));
	return cmd;
}

static void *vcpu_thread(void *arg)
{
	uint64_t cmd = run_vcpu(arg);

	TEST_ASSERT(cmd == UCALL_DONE, "Expected ucall %u, got %lu", UCALL_DONE,
		    cmd);
	return NULL;
}

static void signal_msi(uint32_t device, uint32_t event)
{
	int ret = __kvm_signal_msi(vm, its.base + GITS_TRANSLATER,
				   KVM_MSI_VALID_DEVID, device, event);

	TEST_ASSERT(ret == 1,
		    "MSI (%#x, %#x): expected KVM_SIGNAL_MSI to return 1, got %d",
		    device, event, ret);
}

static void raise_event(uint32_t device, uint32_t event)
{
	uint64_t one = 1;
	ssize_t ret;

	if (!use_irqfd) {
		signal_msi(device, event);
		return;
	}

	ret = write(eventfds[lpi_index(device, event)], &one, sizeof(one));
	TEST_ASSERT(ret == sizeof(one), __KVM_SYSCALL_ERROR("write()", (int)ret));
}

/* Raise all events of a device.  If the guest runs, wait until it has taken them. */
static void raise_device(uint32_t device, uint32_t iteration)
{
	uint32_t event;

	for (event = 0; event < nr_events; event++)
		raise_event(device, event);

	if (only_inject)
		return;
	for (event = 0; event < nr_events; event++)
		wait_for(__atomic_load_n(&host_lpi_count[lpi_index(device, event)],
					 __ATOMIC_ACQUIRE) > iteration);
}

static void *device_thread(void *arg)
{
	uint32_t i;

	pthread_barrier_wait(&barrier);
	/* Iteration 0 is the first injection, in run(). */
	for (i = 1; i <= nr_iterations; i++)
		raise_device((uintptr_t)arg, i);
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
		ret = __kvm_signal_msi(vm, its.base + GITS_TRANSLATER,
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
	uint64_t itt_size;
	uint32_t i, device, event;
	int gic_fd;

	nr_guest_vcpus = nr_vcpus + churn;
	for (event_bits = 5; 1U << event_bits < nr_events; event_bits++)
		;
	itt_size = ((nr_devices + 1ULL) << event_bits) * 8;
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
	vgic_its_setup(vm, &its, 1, ITS_BASE_GPA, &tables, nr_guest_vcpus,
		       itt_size, TABLES_GPA);

	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);
	sync_global_to_guest(vm, nr_vcpus);
	sync_global_to_guest(vm, nr_devices);
	sync_global_to_guest(vm, nr_events);
	sync_global_to_guest(vm, nr_guest_vcpus);
	sync_global_to_guest(vm, event_bits);
	host_lpi_count = addr_gva2hva(vm, (vm_vaddr_t)lpi_count);

	if (use_irqfd) {
		struct kvm_irq_routing *routing = kvm_gsi_routing_create();
		/* 256 for files other than the eventfds */
		rlim_t nr_fds = nr_devices * nr_events + 256;
		struct rlimit rlimit = { nr_fds, nr_fds };

		TEST_ASSERT(!setrlimit(RLIMIT_NOFILE, &rlimit),
			    "Failed to allow %lu open files, errno: %d", nr_fds,
			    errno);
		eventfds = calloc(nr_devices * nr_events, sizeof(*eventfds));
		for (device = 0; device < nr_devices; device++)
			for (event = 0; event < nr_events; event++)
				kvm_gsi_routing_msi_add(routing,
							lpi_index(device, event),
							its.base + GITS_TRANSLATER,
							device, event);
		kvm_gsi_routing_write(vm, routing);
		for (i = 0; i < nr_devices * nr_events; i++)
			eventfds[i] = kvm_irqfd_create(vm, i);
	}

	for (i = 0; i < nr_guest_vcpus; i++)
		run_vcpu(vcpus[i]);
	run_vcpu(vcpus[0]);
}

static uint64_t time_guest(void (*command)(void))
{
	uint64_t start;

	vcpu_set_reg(vcpus[0], ARM64_CORE_REG(regs.pc), (uint64_t)command);
	start = now_ns();
	run_vcpu(vcpus[0]);
	return now_ns() - start;
}

/* Report the time of MOVI and DISCARD minus that of SYNC, which KVM ignores. */
static void report_commands(void)
{
	uint32_t nr = nr_devices * nr_events;
	uint64_t sync, movi, discard;

	/* The first round is not timed: its faults map the queue at stage 2. */
	time_guest(guest_sync_all);
	sync = time_guest(guest_sync_all);
	movi = time_guest(guest_movi_all);
	discard = time_guest(guest_discard_all);

	pr_info("%u events mapped, %lu ns of SYNC subtracted:\n", nr, sync / nr);
	pr_info("perf: movi ns %ld\n", ((long)movi - (long)sync) / nr);
	pr_info("perf: discard ns %ld\n", ((long)discard - (long)sync) / nr);
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

static void help(const char *name)
{
	pr_info("Usage: %s [-h] [-v vcpus] [-d devices] [-e events] [-i iterations] [-f] [-p [-m]] [-c] [-t]\n",
		name);
	pr_info("\t-v: vCPUs that take LPIs (default: 1)\n");
	pr_info("\t-d: devices, with a thread each (default: 1)\n");
	pr_info("\t-e: events of each device (default: 16)\n");
	pr_info("\t-i: times that each event is raised (default: 1000)\n");
	pr_info("\t-f: raise events via irqfd instead of KVM_SIGNAL_MSI\n");
	pr_info("\t-p: measure injection alone, vCPUs do not run\n");
	pr_info("\t-m: with -p, use one thread for each device\n");
	pr_info("\t-c: churn: send ITS commands during the test, from one more vCPU\n");
	pr_info("\t-t: only report the time of MOVI and DISCARD with all events mapped\n");
}

int main(int argc, char *argv[])
{
	int opt;

	/* Show each line at once, even if the test hangs or crashes later. */
	setbuf(stdout, NULL);

	while ((opt = getopt(argc, argv, "hv:d:e:i:fpmct")) != -1) {
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

	create_vm();
	if (time_commands)
		report_commands();
	else if (only_inject)
		run_only_inject();
	else
		run();
	ucall_uninit(vm);
	kvm_vm_free(vm);

	return 0;
}
