// SPDX-License-Identifier: GPL-2.0
/*
 * vgic_v4_test - direct injection of vLPIs (GICv4)
 *
 * The test assigns a PCI device to a VM and forwards the MSI of the device to the
 * VM as a vLPI.  The device is QEMU's "edu", which raises its MSI when the test
 * writes to one of its registers.
 *
 * The proof of direct injection is the count of the MSI in /proc/interrupts: if
 * the host takes the MSI, the count rises, and VFIO signals the eventfd of the
 * irqfd, which makes KVM inject the LPI in software.  A vLPI that the GIC delivers
 * does not change the count.
 *
 * At the end of each case, all interrupts that the host has allocated for the VM
 * and for the device must have been freed.
 */

#define _GNU_SOURCE

#include <dirent.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/pci_regs.h>
#include <linux/sizes.h>
#include <linux/vfio.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "gic.h"
#include "gic_v3_its.h"
#include "vgic.h"

#define NR_VCPUS	2

#define GICD_BASE_GPA	0x8000000ULL
#define GICR_BASE_GPA	0x80a0000ULL
#define ITS_BASE_GPA	0x8200000ULL
#define TABLES_GPA	SZ_4G

/*
 * The guest's IDs of the device.  Event 0 is that of the MSI, unless a case changes
 * the route.  Collection n targets vCPU n.
 */
#define DEV		1
#define EVENT_BITS	5
#define EVENT		0
#define EVENT_OTHER	1
#define LPI		(LPI_BASE + 0)
#define LPI_OTHER	(LPI_BASE + 1)
#define LPI_NEW		(LPI_BASE + 8)
#define GSI		0

/* The edu device, see docs/specs/edu of QEMU */
#define EDU_IDS		"0x1234 0x11e8"
#define EDU_RAISE	0x60
#define EDU_ACKNOWLEDGE	0x64

#define PCI_DEVICES	"/sys/bus/pci/devices"

/* Shared with the guest */
static struct its its;
static struct lpi_tables tables;
static void (*guest_command)(void);
static struct {
	uint32_t nr;
	uint32_t intid;
} delivered[NR_VCPUS];
/* The guest waits for this number of LPIs, see guest_wait(). */
static uint32_t nr_wanted;

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[NR_VCPUS];
static int gic_fd, kvm_vfio_fd, msi_fd;

/* The device: its PCI address, its VFIO file descriptors, and its BAR */
static char edu[32];
static int container_fd, group_fd, device_fd;
static uint32_t *bar;
static size_t bar_size;

/* The guest */

static void guest_map(void)
{
	uint32_t i;

	its_init(&its);
	for (i = 0; i < NR_VCPUS; i++)
		its_send_mapc(&its, i, i, true);
	its_send_mapd(&its, DEV, tables.itt, EVENT_BITS, true);
	its_send_mapti(&its, DEV, EVENT, 0, LPI);
	its_send_mapti(&its, DEV, EVENT_OTHER, 1, LPI_OTHER);
	its_send_sync(&its, 0);
}

static void guest_irq_handler(struct ex_regs *regs)
{
	uint32_t cpu = guest_get_vcpuid();
	uint32_t intid = gic_get_and_ack_irq();

	if (intid == IAR_SPURIOUS)
		return;

	GUEST_ASSERT_1(intid >= LPI_BASE, intid);
	delivered[cpu].intid = intid;
	WRITE_ONCE(delivered[cpu].nr, delivered[cpu].nr + 1);
	gic_set_eoi(intid);
}

static void guest_code(void)
{
	uint32_t cpu = guest_get_vcpuid();

	gic_init(GIC_V3, NR_VCPUS, (void *)GICD_BASE_GPA, (void *)GICR_BASE_GPA);
	gicr_enable_lpis(GICR_BASE_GPA, cpu, &tables);
	local_irq_enable();

	/* The vCPU takes interrupts when it is entered for the next command. */
	for (;;) {
		GUEST_SYNC(0);
		if (guest_command)
			guest_command();
	}
}

/* Take LPIs without leaving the guest. */
static void guest_spin(void)
{
	uint32_t cpu = guest_get_vcpuid();

	while (READ_ONCE(delivered[cpu].nr) < READ_ONCE(nr_wanted))
		cpu_relax();
}

static void guest_wait(void)
{
	uint32_t cpu = guest_get_vcpuid();

	while (READ_ONCE(delivered[cpu].nr) < READ_ONCE(nr_wanted)) {
		/* With IRQs masked, an LPI cannot be taken before the wfi. */
		local_irq_disable();
		if (READ_ONCE(delivered[cpu].nr) < READ_ONCE(nr_wanted))
			asm volatile("wfi" : : : "memory");
		local_irq_enable();
		isb();
	}
}

/* Set the byte of an LPI in the configuration table. */
static void guest_config_lpi(uint8_t prop)
{
	WRITE_ONCE(*(uint8_t *)(tables.config + LPI - LPI_BASE), prop);
	dsb(ishst);
}

static void guest_discard(void)
{
	its_send_discard(&its, DEV, EVENT);
}

static void guest_mapti(void)
{
	its_send_mapti(&its, DEV, EVENT, 0, LPI);
}

static void guest_mapti_new(void)
{
	its_send_mapti(&its, DEV, EVENT, 1, LPI_NEW);
}

static void guest_discard_mapti(void)
{
	guest_discard();
	guest_mapti();
}

static void guest_movi(void)
{
	its_send_movi(&its, DEV, EVENT, 1);
}

static void guest_movall(void)
{
	its_send_movall(&its, 0, 1);
}

static void guest_mapd(void)
{
	its_send_mapd(&its, DEV, tables.itt, EVENT_BITS, true);
}

static void guest_mapd_unmap(void)
{
	its_send_mapd(&its, DEV, tables.itt, EVENT_BITS, false);
}

static void guest_mapd_mapti(void)
{
	guest_mapd();
	guest_mapti();
}

static void guest_mapc_retarget(void)
{
	its_send_mapc(&its, 0, 1, true);
}

static void guest_mapc_unmap(void)
{
	its_send_mapc(&its, 0, 0, false);
}

static void guest_mapc_remap(void)
{
	its_send_mapc(&its, 0, 0, true);
	its_send_discard(&its, DEV, EVENT);
	its_send_mapd(&its, DEV, tables.itt, EVENT_BITS, true);
	guest_mapti();
}

static void guest_disable_inv(void)
{
	guest_config_lpi(LPI_PROP_PRIO);
	its_send_inv(&its, DEV, EVENT);
}

static void guest_enable_inv(void)
{
	guest_config_lpi(LPI_PROP_PRIO | LPI_PROP_ENABLED);
	its_send_inv(&its, DEV, EVENT);
}

static void guest_disable_invall(void)
{
	guest_config_lpi(LPI_PROP_PRIO);
	its_send_invall(&its, 0);
}

static void guest_enable_invall(void)
{
	guest_config_lpi(LPI_PROP_PRIO | LPI_PROP_ENABLED);
	its_send_invall(&its, 0);
}

static void guest_lpis_disable(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, false);
}

static void guest_lpis_enable(void)
{
	gicr_set_lpis_enabled(GICR_BASE_GPA, 0, true);
}

/* Without GICR_PENDBASER.PTZ */
static void guest_lpis_enable_table(void)
{
	writeq(tables.pending, (void *)(GICR_BASE_GPA + GICR_PENDBASER));
	guest_lpis_enable();
}

static void guest_int(void)
{
	its_send_int(&its, DEV, EVENT);
}

static void guest_clear(void)
{
	its_send_clear(&its, DEV, EVENT);
}

/* Two events with the same LPI, and the MSI is that of the first one. */
static void guest_share_lpi(void)
{
	its_send_discard(&its, DEV, EVENT_OTHER);
	its_send_mapti(&its, DEV, EVENT_OTHER, 0, LPI);
}

static void guest_discard_other(void)
{
	its_send_discard(&its, DEV, EVENT_OTHER);
}

/* The host: its interrupts */

/* Returns the sum of the counts of the interrupts with @what in their line. */
static uint64_t host_irqs(const char *what, int *nr_lines)
{
	FILE *f = fopen("/proc/interrupts", "r");
	char line[1024], *p, *end;
	uint64_t sum = 0, n;

	TEST_ASSERT(f, "Failed to open /proc/interrupts, errno: %d", errno);
	while (fgets(line, sizeof(line), f)) {
		if (!strstr(line, what))
			continue;
		if (nr_lines)
			(*nr_lines)++;
		/* After the number of the interrupt, there is a count for each CPU. */
		p = strchr(line, ':') + 1;
		while (n = strtoul(p, &end, 10), end != p && *end == ' ') {
			sum += n;
			p = end;
		}
	}
	fclose(f);
	return sum;
}

/* How often the host has taken the MSI of the device */
static uint64_t nr_msis(void)
{
	return host_irqs("vfio-msi", NULL);
}

/* How many doorbells the host has taken for vCPUs that were not running */
static uint64_t nr_doorbells(void)
{
	return host_irqs("GICv4-vpe", NULL);
}

/* Returns how many interrupts the host has allocated, in use or not. */
static int nr_irq_descs(void)
{
	DIR *dir = opendir("/sys/kernel/irq");
	int n = 0;

	TEST_ASSERT(dir, "Failed to open /sys/kernel/irq, errno: %d", errno);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* The host: the device */

static void write_sysfs(const char *path, const char *text)
{
	TEST_ASSERT(write_text(path, text), "Failed to write %s to %s, errno: %d", text, path,
		    errno);
}

static bool read_file(char *text, size_t size, const char *device, const char *name)
{
	char path[256];
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/%s", device, name);
	fd = open(path, O_RDONLY);
	if (fd >= 0) {
		n = read(fd, text, size - 1);
		close(fd);
	}
	text[n > 0 ? n : 0] = '\0';
	text[strcspn(text, "\n")] = '\0';
	return n > 0;
}

/* Find the device, and store its address in @edu. */
static bool find_edu(void)
{
	DIR *dir = opendir(PCI_DEVICES);
	struct dirent *entry;

	while (!*edu && dir && (entry = readdir(dir))) {
		char vendor[16], device[16], ids[40];

		if (!read_file(vendor, sizeof(vendor), entry->d_name, "vendor") ||
		    !read_file(device, sizeof(device), entry->d_name, "device"))
			continue;
		snprintf(ids, sizeof(ids), "%s %s", vendor, device);
		if (!strcmp(ids, EDU_IDS))
			snprintf(edu, sizeof(edu), "%.31s", entry->d_name);
	}
	if (dir)
		closedir(dir);
	return *edu;
}

/* With the driver named in driver_override, no other driver takes the device. */
static void override_driver(const char *driver)
{
	char path[256];

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/driver_override", edu);
	write_sysfs(path, driver);
}

static void bind_edu(void)
{
	override_driver("vfio-pci");
	write_sysfs("/sys/bus/pci/drivers_probe", edu);
}

static void unbind_edu(void)
{
	write_sysfs("/sys/bus/pci/drivers/vfio-pci/unbind", edu);
	override_driver("\n");
}

static int vfio_ioctl(int fd, unsigned long cmd, const char *name, void *arg)
{
	int ret = ioctl(fd, cmd, arg);

	TEST_ASSERT(ret >= 0, __KVM_IOCTL_ERROR(name, ret));
	return ret;
}

#define vfio_ioctl(fd, cmd, arg) vfio_ioctl(fd, cmd, #cmd, (void *)(arg))

/* Nothing of the VM's memory is mapped in the IOMMU: the device only sends MSIs. */
static void open_group(void)
{
	char path[256], link[256];
	ssize_t n;

	snprintf(path, sizeof(path), PCI_DEVICES "/%s/iommu_group", edu);
	n = readlink(path, link, sizeof(link) - 1);
	__TEST_REQUIRE(n > 0, "no IOMMU for the edu device");
	link[n] = '\0';

	container_fd = open_path_or_exit("/dev/vfio/vfio", O_RDWR);
	snprintf(path, sizeof(path), "/dev/vfio/%s", strrchr(link, '/') + 1);
	group_fd = open_path_or_exit(path, O_RDWR);
	vfio_ioctl(group_fd, VFIO_GROUP_SET_CONTAINER, &container_fd);
	vfio_ioctl(container_fd, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU);
}

static void close_group(void)
{
	close(group_fd);
	close(container_fd);
}

static void open_device(void)
{
	struct vfio_region_info region = { .argsz = sizeof(region) };
	uint16_t command;
	ssize_t n;

	device_fd = vfio_ioctl(group_fd, VFIO_GROUP_GET_DEVICE_FD, edu);

	region.index = VFIO_PCI_BAR0_REGION_INDEX;
	vfio_ioctl(device_fd, VFIO_DEVICE_GET_REGION_INFO, &region);
	bar_size = region.size;
	bar = mmap(NULL, bar_size, PROT_READ | PROT_WRITE, MAP_SHARED, device_fd,
		   region.offset);
	TEST_ASSERT(bar != MAP_FAILED, __KVM_SYSCALL_ERROR("mmap()", -1));

	/* The device has to be a bus master, because an MSI is a write to memory. */
	region.index = VFIO_PCI_CONFIG_REGION_INDEX;
	vfio_ioctl(device_fd, VFIO_DEVICE_GET_REGION_INFO, &region);
	command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
	n = pwrite(device_fd, &command, sizeof(command), region.offset + PCI_COMMAND);
	TEST_ASSERT(n == sizeof(command), __KVM_SYSCALL_ERROR("pwrite()", (int)n));
}

static void close_device(void)
{
	munmap(bar, bar_size);
	close(device_fd);
}

static void set_irqs(uint32_t flags, uint32_t count, int fd)
{
	struct {
		struct vfio_irq_set set;
		int fd;
	} irqs = {
		.set.argsz = sizeof(irqs),
		.set.flags = flags | VFIO_IRQ_SET_ACTION_TRIGGER,
		.set.index = VFIO_PCI_MSI_IRQ_INDEX,
		.set.count = count,
		.fd = fd,
	};

	vfio_ioctl(device_fd, VFIO_DEVICE_SET_IRQS, &irqs);
}

static void enable_msi(void)
{
	set_irqs(VFIO_IRQ_SET_DATA_EVENTFD, 1, msi_fd);
}

static void disable_msi(void)
{
	set_irqs(VFIO_IRQ_SET_DATA_NONE, 0, -1);
}

static void raise_msi(void)
{
	WRITE_ONCE(bar[EDU_RAISE / sizeof(*bar)], 1);
	WRITE_ONCE(bar[EDU_ACKNOWLEDGE / sizeof(*bar)], 1);
}

/* The host: the VM */

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

static void create_vm(void)
{
	int nr_vpes = 0, i;

	vm = vm_create_with_vcpus(NR_VCPUS, guest_code, vcpus);
	ucall_init(vm, NULL);
	vm_init_descriptor_tables(vm);
	for (i = 0; i < NR_VCPUS; i++)
		vcpu_init_descriptor_tables(vcpus[i]);
	vm_install_exception_handler(vm, VECTOR_IRQ_CURRENT, guest_irq_handler);

	gic_fd = vgic_v3_setup(vm, NR_VCPUS, 64, GICD_BASE_GPA, GICR_BASE_GPA);
	__TEST_REQUIRE(gic_fd >= 0, "GICv3 is not available");
	vgic_its_setup(vm, &its, 1, ITS_BASE_GPA, &tables, NR_VCPUS, SZ_4K,
		       TABLES_GPA);
	sync_global_to_guest(vm, its);
	sync_global_to_guest(vm, tables);

	host_irqs("GICv4-vpe", &nr_vpes);
	__TEST_REQUIRE(nr_vpes, "KVM does not use GICv4");
	TEST_ASSERT(nr_vpes == NR_VCPUS, "Expected doorbells of %d vCPUs, got %d",
		    NR_VCPUS, nr_vpes);

	for (i = 0; i < NR_VCPUS; i++)
		run_vcpu(vcpus[i], NULL);
	run_vcpu(vcpus[0], guest_map);
}

static void destroy_vm(void)
{
	close(kvm_vfio_fd);
	close(its.fd);
	close(gic_fd);
	ucall_uninit(vm);
	kvm_vm_free(vm);
}

static void set_route(uint32_t event_id)
{
	struct kvm_irq_routing *routing = kvm_gsi_routing_create();

	kvm_gsi_routing_msi_add(routing, GSI, its.base + GITS_TRANSLATER, DEV,
				event_id);
	kvm_gsi_routing_write(vm, routing);
}

static void assign_irqfd(void)
{
	kvm_irqfd(vm, GSI, msi_fd, 0);
}

static void deassign_irqfd(void)
{
	kvm_irqfd(vm, GSI, msi_fd, KVM_IRQFD_FLAG_DEASSIGN);
}

/* Assign the device to the VM, and forward its MSI. */
static void assign_device(void)
{
	kvm_vfio_fd = kvm_create_device(vm, KVM_DEV_TYPE_VFIO);
	kvm_device_attr_set(kvm_vfio_fd, KVM_DEV_VFIO_GROUP,
			    KVM_DEV_VFIO_GROUP_ADD, &group_fd);

	set_route(EVENT);
	msi_fd = eventfd(0, EFD_NONBLOCK);
	TEST_ASSERT(msi_fd >= 0, __KVM_SYSCALL_ERROR("eventfd()", msi_fd));
	assign_irqfd();
	enable_msi();
}

static void run_vcpus(void)
{
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		run_vcpu(vcpus[i], NULL);
	sync_global_from_guest(vm, delivered);
}

static uint32_t nr_delivered(void)
{
	uint32_t nr = 0;
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		nr += delivered[i].nr;
	return nr;
}

static void clear_delivered(void)
{
	memset(delivered, 0, sizeof(delivered));
	sync_global_to_guest(vm, delivered);
}

/*
 * Run all vCPUs until one takes an LPI.  Check that @vcpu_id takes @intid, once, and
 * no other LPI is delivered.
 */
static void check_delivered(const char *what, uint32_t intid, int vcpu_id)
{
	__wait_for((run_vcpus(), nr_delivered()), "%s: expected LPI %u, got none",
		   what, intid);
	/* There must not be a second one. */
	run_vcpus();
	TEST_ASSERT(nr_delivered() == 1 && delivered[vcpu_id].nr == 1 &&
		    delivered[vcpu_id].intid == intid,
		    "%s: expected LPI %u on vCPU %d, got %u LPIs (%u) on vCPU 0, %u (%u) on vCPU 1",
		    what, intid, vcpu_id, delivered[0].nr, delivered[0].intid,
		    delivered[1].nr, delivered[1].intid);
	clear_delivered();
}

static void check_not_delivered(const char *what)
{
	run_vcpus();
	run_vcpus();
	TEST_ASSERT(!nr_delivered(), "%s: expected no LPI, got %u (%u, %u)", what,
		    nr_delivered(), delivered[0].intid, delivered[1].intid);
}

/* Raise the MSI.  The host must not take it, whether the guest does now or later. */
static void raise_vlpi(const char *what)
{
	uint64_t before = nr_msis(), after;

	raise_msi();
	run_vcpus();
	after = nr_msis();
	TEST_ASSERT(after == before,
		    "%s: expected a vLPI, but the host took %lu MSIs", what,
		    after - before);
}

static void check_vlpi(const char *what, uint32_t intid, int vcpu_id)
{
	raise_vlpi(what);
	check_delivered(what, intid, vcpu_id);
}

/* Raise the MSI, and wait until the host has taken it. */
static void raise_on_host(const char *what)
{
	uint64_t before = nr_msis();

	raise_msi();
	__wait_for(nr_msis() == before + 1,
		   "%s: expected the host to take one MSI, it took %lu", what,
		   nr_msis() - before);
}

static void check_software(const char *what, uint32_t intid, int vcpu_id)
{
	raise_on_host(what);
	check_delivered(what, intid, vcpu_id);
}

/* The host takes the MSI, but KVM has no LPI for it. */
static void check_refused(const char *what)
{
	raise_on_host(what);
	check_not_delivered(what);
}

static void check_stat(const char *what, const char *name, uint64_t expected)
{
	uint64_t stat = vm_get_stat(vm, name);

	TEST_ASSERT(stat == expected, "%s: expected %s to be %lu, got %lu", what, name,
		    expected, stat);
}

/*
 * Raise the MSI in software, by KVM_SIGNAL_MSI, and then via the irqfd, which triggers the
 * vLPI.  If @accepted, each makes the hardware deliver it.  Otherwise, each is a miss.
 * KVM_SIGNAL_MSI needs no worker.  The irqfd hands the MSI to one at once, because the
 * lock that says whether it is refused is held during commands to the ITS of the host.
 */
static void check_signal(const char *what, bool accepted)
{
	uint64_t misses = vm_get_stat(vm, "lpi_translation_misses");
	uint64_t fallbacks = vm_get_stat(vm, "lpi_inatomic_fallbacks"), one = 1;
	int ret, expected = accepted ? 1 : -EBUSY;

	ret = __kvm_signal_msi(vm, its.base + GITS_TRANSLATER, KVM_MSI_VALID_DEVID, DEV,
			       EVENT);
	TEST_ASSERT(ret == expected, "%s: expected KVM_SIGNAL_MSI to return %d, got %d",
		    what, expected, ret);
	misses += !accepted;
	check_stat(what, "lpi_inatomic_fallbacks", fallbacks);
	check_stat(what, "lpi_translation_misses", misses);
	if (accepted)
		check_delivered("vLPI raised by KVM_SIGNAL_MSI", LPI, 0);

	TEST_ASSERT(write(msi_fd, &one, sizeof(one)) == sizeof(one),
		    "write() failed, errno: %d", errno);
	check_stat(what, "lpi_inatomic_fallbacks", fallbacks + 1);
	misses += !accepted;
	__wait_for(vm_get_stat(vm, "lpi_translation_misses") == misses,
		   "%s: expected lpi_translation_misses to be %lu, got %lu", what, misses,
		   vm_get_stat(vm, "lpi_translation_misses"));
	if (accepted)
		check_delivered("vLPI raised via the irqfd", LPI, 0);
	check_stat(what, "lpi_translation_misses", misses);
}

/* KVM forwards an MSI only when the irqfd is assigned or the MSI is enabled. */
static void forward_again(void)
{
	deassign_irqfd();
	assign_irqfd();
}

static void run_on_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	TEST_ASSERT(!sched_setaffinity(0, sizeof(set), &set),
		    "sched_setaffinity() to CPU %d failed, errno: %d", cpu, errno);
}

/* Threads */

static bool stop_threads;
static pthread_t raiser;
static uint64_t nr_raised;

static void *raise_thread(void *arg)
{
	run_on_cpu(1);
	while (!READ_ONCE(stop_threads)) {
		raise_msi();
		WRITE_ONCE(nr_raised, nr_raised + 1);
	}
	return NULL;
}

static void start_raising(void)
{
	stop_threads = false;
	raiser = start_thread(raise_thread, NULL);
}

static void stop_raising(void)
{
	WRITE_ONCE(stop_threads, true);
	join_thread(raiser, "MSIs");
}

static void wait_for_raised(uint64_t nr)
{
	uint64_t seen = READ_ONCE(nr_raised);

	wait_for(READ_ONCE(nr_raised) > seen + nr);
}

static void *vcpu_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;

	run_on_cpu(1);
	vcpu_run_to_sync(vcpu);
	return NULL;
}

/* Keeps CPU 1 busy, so that KVM traps the WFI of a vCPU there. */
static void *busy_thread(void *arg)
{
	run_on_cpu(1);
	while (!READ_ONCE(stop_threads))
		;
	return NULL;
}

/* The cases */

FIXTURE(vgic_v4) {
	int nr_irq_descs;
};

FIXTURE_SETUP(vgic_v4)
{
	self->nr_irq_descs = nr_irq_descs();
	run_on_cpu(0);
	open_group();
	open_device();
	create_vm();
	assign_device();
	check_vlpi("after setup", LPI, 0);
}

FIXTURE_TEARDOWN(vgic_v4)
{
	int nr;

	if (vm)
		destroy_vm();
	close_device();
	close_group();
	close(msi_fd);
	__wait_for((nr = nr_irq_descs()) == self->nr_irq_descs,
		   "Expected %d interrupts on the host, as before, got %d",
		   self->nr_irq_descs, nr);
}

TEST_F(vgic_v4, delivery)
{
	uint64_t doorbells = nr_doorbells();
	int i;

	for (i = 0; i < 20; i++)
		check_vlpi("delivery", LPI, 0);

	/* An MSI that is raised again before the guest takes it is one LPI. */
	raise_msi();
	check_vlpi("raised twice", LPI, 0);

	/* Nothing wakes up a vCPU that does not wait. */
	TEST_ASSERT(nr_doorbells() == doorbells, "Expected no doorbell, got %lu",
		    nr_doorbells() - doorbells);
}

/* The vCPU takes vLPIs without an exit, while it runs. */
TEST_F(vgic_v4, running)
{
	uint64_t before = nr_msis(), exits;
	pthread_t thread;
	uint32_t i;

	nr_wanted = 20;
	sync_global_to_guest(vm, nr_wanted);
	vcpu_get_stat(vcpus[0], "exits");
	set_command(guest_spin);
	thread = start_thread(vcpu_thread, vcpus[0]);

	for (i = 1; i <= nr_wanted; i++) {
		raise_msi();
		__wait_for((sync_global_from_guest(vm, delivered), delivered[0].nr == i),
			   "Expected %u vLPIs, got %u", i, delivered[0].nr);
	}
	join_thread(thread, "vCPU 0");
	exits = vcpu_get_stat(vcpus[0], "exits");
	pr_info("%u vLPIs while the vCPU runs, %lu exits in all\n", nr_wanted, exits);
	TEST_ASSERT(nr_msis() == before, "Expected vLPIs, but the host took %lu MSIs",
		    nr_msis() - before);
	clear_delivered();
}

/* A vLPI wakes up a vCPU that KVM has blocked: the host takes the doorbell. */
TEST_F(vgic_v4, doorbell)
{
	uint64_t before = nr_msis(), doorbells = nr_doorbells();
	pthread_t thread, busy;
	uint32_t i;

	stop_threads = false;
	busy = start_thread(busy_thread, NULL);
	nr_wanted = 5;
	sync_global_to_guest(vm, nr_wanted);
	vcpu_get_stat(vcpus[0], "blocking");
	set_command(guest_wait);
	thread = start_thread(vcpu_thread, vcpus[0]);

	for (i = 1; i <= nr_wanted; i++) {
		vcpu_wait_stat(vcpus[0], "blocking", 1);
		raise_msi();
		__wait_for((sync_global_from_guest(vm, delivered), delivered[0].nr == i),
			   "Expected %u vLPIs, got %u", i, delivered[0].nr);
	}
	join_thread(thread, "vCPU 0");
	WRITE_ONCE(stop_threads, true);
	join_thread(busy, "busy thread");
	TEST_ASSERT(nr_msis() == before, "Expected vLPIs, but the host took %lu MSIs",
		    nr_msis() - before);
	TEST_ASSERT(nr_doorbells() > doorbells, "Expected doorbells, got none");
	clear_delivered();
}

/* The vPE follows the vCPU to another CPU (VMOVP), also with a vLPI pending. */
TEST_F(vgic_v4, vmovp)
{
	int i;

	for (i = 0; i < 10; i++) {
		run_on_cpu(1);
		check_vlpi("on CPU 1", LPI, 0);
		raise_msi();
		run_on_cpu(0);
		check_delivered("raised on CPU 1, taken on CPU 0", LPI, 0);
		check_vlpi("on CPU 0", LPI, 0);
	}
}

TEST_F(vgic_v4, discard)
{
	run_vcpu(vcpus[1], guest_discard);
	check_refused("DISCARD");
	forward_again();
	check_refused("DISCARD, irqfd assigned again");

	/* Nobody tells KVM that there is an LPI for the MSI again. */
	run_vcpu(vcpus[1], guest_mapti_new);
	check_software("MAPTI", LPI_NEW, 1);
	disable_msi();
	enable_msi();
	check_vlpi("MAPTI, MSI enabled again", LPI_NEW, 1);
}

/* The irqfd is removed after DISCARD and MAPTI of its event. */
TEST_F(vgic_v4, mapti)
{
	run_vcpu(vcpus[1], guest_discard_mapti);
	check_software("DISCARD, MAPTI", LPI, 0);
	forward_again();
	check_vlpi("DISCARD, MAPTI, irqfd assigned again", LPI, 0);
}

/* DISCARD of a vLPI removes its pending state, too. */
TEST_F(vgic_v4, discard_pending)
{
	raise_msi();
	run_vcpu(vcpus[1], guest_discard);
	check_not_delivered("DISCARD of a pending vLPI");
	run_vcpu(vcpus[1], guest_mapti);
	check_not_delivered("DISCARD of a pending vLPI, MAPTI");
	check_software("DISCARD of a pending vLPI, MAPTI", LPI, 0);
}

TEST_F(vgic_v4, movi)
{
	run_vcpu(vcpus[1], guest_movi);
	check_vlpi("MOVI", LPI, 1);
	forward_again();
	check_vlpi("MOVI, irqfd assigned again", LPI, 1);
}

TEST_F(vgic_v4, movi_pending)
{
	raise_msi();
	run_vcpu(vcpus[1], guest_movi);
	check_delivered("MOVI of a pending vLPI", LPI, 1);
	check_vlpi("MOVI of a pending vLPI", LPI, 1);
}

TEST_F(vgic_v4, movall)
{
	run_vcpu(vcpus[1], guest_movall);
	check_vlpi("MOVALL", LPI, 1);
	forward_again();
	check_vlpi("MOVALL, irqfd assigned again", LPI, 1);
}

TEST_F(vgic_v4, mapd)
{
	run_vcpu(vcpus[1], guest_mapd_unmap);
	check_refused("MAPD V=0");
	run_vcpu(vcpus[1], guest_mapd_mapti);
	check_software("MAPD V=0, MAPD V=1, MAPTI", LPI, 0);
	forward_again();
	check_vlpi("MAPD V=0, MAPD V=1, MAPTI, irqfd assigned again", LPI, 0);

	run_vcpu(vcpus[1], guest_mapd_mapti);
	check_software("MAPD V=1, MAPTI", LPI, 0);
}

TEST_F(vgic_v4, mapc)
{
	run_vcpu(vcpus[1], guest_mapc_retarget);
	check_vlpi("MAPC to vCPU 1", LPI, 1);
	forward_again();
	check_vlpi("MAPC to vCPU 1, irqfd assigned again", LPI, 1);
}

/* The irqfd is removed while its LPI has no collection. */
TEST_F(vgic_v4, mapc_unmap)
{
	run_vcpu(vcpus[1], guest_mapc_unmap);
	deassign_irqfd();
	disable_msi();
	run_vcpu(vcpus[1], guest_mapc_remap);
	assign_irqfd();
	enable_msi();
	check_vlpi("MAPC V=0, irqfd removed, MAPC V=1", LPI, 0);
}

TEST_F(vgic_v4, inv)
{
	run_vcpu(vcpus[1], guest_disable_inv);
	raise_vlpi("disabled by INV");
	check_not_delivered("disabled by INV");
	run_vcpu(vcpus[1], guest_enable_inv);
	check_delivered("enabled by INV, pending", LPI, 0);
	check_vlpi("enabled by INV", LPI, 0);
}

TEST_F(vgic_v4, invall)
{
	run_vcpu(vcpus[1], guest_disable_invall);
	raise_vlpi("disabled by INVALL");
	check_not_delivered("disabled by INVALL");
	run_vcpu(vcpus[1], guest_enable_invall);
	check_delivered("enabled by INVALL, pending", LPI, 0);
	check_vlpi("enabled by INVALL", LPI, 0);
}

/* INT makes the vLPI pending, and CLEAR clears its pending state. */
TEST_F(vgic_v4, int_clear)
{
	uint64_t before = nr_msis();

	run_vcpu(vcpus[1], guest_int);
	check_delivered("INT", LPI, 0);
	raise_msi();
	run_vcpu(vcpus[1], guest_clear);
	check_not_delivered("CLEAR");
	check_vlpi("after CLEAR", LPI, 0);
	TEST_ASSERT(nr_msis() == before, "Expected vLPIs, but the host took %lu MSIs",
		    nr_msis() - before);
}

/*
 * KVM does not tell the GIC that a redistributor disables LPIs.  Do not check
 * whether a vLPI that is raised meanwhile is delivered.
 */
TEST_F(vgic_v4, lpis_disable)
{
	run_vcpu(vcpus[1], guest_lpis_disable);
	check_signal("EnableLPIs cleared", false);
	raise_vlpi("EnableLPIs cleared");
	run_vcpu(vcpus[1], guest_lpis_enable);
	run_vcpus();
	clear_delivered();
	check_vlpi("EnableLPIs set again", LPI, 0);
}

/*
 * The vLPI is disabled in the configuration table and pending in the pending table when
 * LPIs are enabled.  It becomes pending in software, and is delivered when it is enabled.
 */
TEST_F(vgic_v4, pending_in_table)
{
	uint8_t *byte = addr_gpa2hva(vm, tables.pending + LPI / 8);

	run_vcpu(vcpus[1], guest_disable_inv);
	run_vcpu(vcpus[1], guest_lpis_disable);
	*byte = BIT(LPI % 8);
	run_vcpu(vcpus[1], guest_lpis_enable_table);
	check_not_delivered("vLPI disabled, pending in the table");
	run_vcpu(vcpus[1], guest_enable_inv);
	check_delivered("vLPI enabled, pending in the table", LPI, 0);
	check_vlpi("after the vLPI was pending in the table", LPI, 0);
}

/* Software asks the hardware to make the vLPI pending. */
TEST_F(vgic_v4, signal)
{
	check_signal("vLPI raised in software", true);
}

/* The irqfd is removed while the redistributor has LPIs disabled. */
TEST_F(vgic_v4, lpis_disable_deassign)
{
	run_vcpu(vcpus[1], guest_lpis_disable);
	deassign_irqfd();
	disable_msi();
	run_vcpu(vcpus[1], guest_lpis_enable);
	run_vcpu(vcpus[1], guest_discard_mapti);
	assign_irqfd();
	enable_msi();
	check_vlpi("irqfd removed with EnableLPIs cleared", LPI, 0);
}

/* DISCARD of one of two events with the same LPI must not end in a storm of MSIs. */
TEST_F(vgic_v4, shared_lpi)
{
	deassign_irqfd();
	run_vcpu(vcpus[1], guest_share_lpi);
	assign_irqfd();
	check_vlpi("shared LPI", LPI, 0);
	run_vcpu(vcpus[1], guest_discard_other);
	check_software("shared LPI, DISCARD of the other event", LPI, 0);
	run_vcpu(vcpus[1], guest_discard);
	check_refused("shared LPI, DISCARD of both events");
}

/* A new route is in effect at once, and the irqfd can be removed after that. */
TEST_F(vgic_v4, route)
{
	set_route(EVENT_OTHER);
	check_software("other route", LPI_OTHER, 1);
	forward_again();
	check_vlpi("other route, irqfd assigned again", LPI_OTHER, 1);
	set_route(EVENT);
	check_software("first route again", LPI, 0);
	set_route(EVENT_OTHER);
	deassign_irqfd();
	run_vcpu(vcpus[1], guest_discard_mapti);
	set_route(EVENT);
	assign_irqfd();
	check_vlpi("first route, irqfd assigned again", LPI, 0);
}

/* An irqfd without a route is not forwarded to the LPI of its previous route. */
TEST_F(vgic_v4, route_removed)
{
	kvm_gsi_routing_write(vm, kvm_gsi_routing_create());
	check_refused("no route");
	disable_msi();
	enable_msi();
	check_refused("no route, MSI enabled again");
	set_route(EVENT);
	check_software("route again", LPI, 0);
	forward_again();
	check_vlpi("route again, irqfd assigned again", LPI, 0);
}

/*
 * The irqfd and its route change, and the MSI is enabled, while the device raises
 * the MSI.
 *
 * The device does not raise the MSI while VFIO disables it: the host clears the
 * message when it frees the interrupt, and disables the MSI in the device after
 * that.  Each MSI in between causes a fault of the SMMU, and the host would be busy
 * reporting an endless stream of faults from then on.
 */
TEST_F(vgic_v4, firing)
{
	int i;

	for (i = 0; i < 20; i++) {
		start_raising();
		deassign_irqfd();
		run_vcpu(vcpus[1], guest_discard_mapti);
		assign_irqfd();
		run_vcpus();
		set_route(i % 2 ? EVENT : EVENT_OTHER);
		run_vcpus();
		wait_for_raised(0);
		stop_raising();

		disable_msi();
		start_raising();
		run_vcpu(vcpus[1], guest_movi);
		enable_msi();
		run_vcpus();
		wait_for_raised(0);
		stop_raising();
	}

	set_route(EVENT);
	run_vcpu(vcpus[1], guest_discard_mapti);
	forward_again();
	run_vcpus();
	run_vcpus();
	clear_delivered();
	check_vlpi("after all changes", LPI, 0);
}

static int save_tables(void)
{
	int ret = __kvm_device_attr_set(its.fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
					KVM_DEV_ARM_ITS_SAVE_TABLES, NULL);

	return ret < 0 ? -errno : ret;
}

/*
 * With GICv4.0, KVM does not know whether a vLPI is pending, and refuses to save the
 * tables.  The vLPI stays pending.  Without the irqfd, there is no vLPI.
 */
TEST_F(vgic_v4, save)
{
	int ret;

	raise_msi();
	ret = save_tables();
	TEST_ASSERT(ret == -EACCES, "vLPI: expected the save to return %d, got %d",
		    -EACCES, ret);
	check_delivered("tables not saved", LPI, 0);

	deassign_irqfd();
	ret = save_tables();
	TEST_ASSERT(!ret, "no vLPI: expected the save to return 0, got %d", ret);
	assign_irqfd();
	check_vlpi("tables saved", LPI, 0);
}

TEST_F(vgic_v4, reset)
{
	kvm_device_attr_set(its.fd, KVM_DEV_ARM_VGIC_GRP_CTRL,
			    KVM_DEV_ARM_ITS_CTRL_RESET, NULL);
	check_refused("reset");
	run_vcpu(vcpus[0], guest_map);
	check_software("mapped after reset", LPI, 0);
	forward_again();
	check_vlpi("mapped after reset, irqfd assigned again", LPI, 0);
}

/* An LPI that KVM has made pending is delivered after it has become a vLPI. */
TEST_F(vgic_v4, forward_pending)
{
	deassign_irqfd();
	run_vcpu(vcpus[1], guest_int);
	assign_irqfd();
	check_delivered("pending when forwarded", LPI, 0);
	check_vlpi("pending when forwarded", LPI, 0);
}

/* The VM is destroyed with a vLPI that is mapped and pending, and with its irqfd. */
TEST_F(vgic_v4, destroy)
{
	raise_msi();
	destroy_vm();
	vm = NULL;
	raise_on_host("VM destroyed");
}

/* The same while the device raises the MSI */
TEST_F(vgic_v4, destroy_firing)
{
	start_raising();
	wait_for_raised(10);
	destroy_vm();
	vm = NULL;
	wait_for_raised(10);
	stop_raising();
	disable_msi();
}

/* The device is closed before the VM is destroyed. */
TEST_F(vgic_v4, device_closed)
{
	raise_msi();
	close_device();
	open_device();
	run_vcpus();
	clear_delivered();
	run_vcpu(vcpus[1], guest_discard_mapti);
	enable_msi();
	check_vlpi("opened again", LPI, 0);
}

int main(int argc, char *argv[])
{
	int ret;

	__TEST_REQUIRE(find_edu(), "needs the edu device of QEMU (1234:11e8)");
	__TEST_REQUIRE(!access("/sys/bus/pci/drivers/vfio-pci", F_OK),
		       "needs vfio-pci");

	bind_edu();
	ret = run_cases(argv + 1);
	unbind_edu();
	return ret;
}
