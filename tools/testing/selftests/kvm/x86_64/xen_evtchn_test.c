// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the delivery of Xen event channels.
 *
 * Each case creates its own VM.  In most cases, the guest does not run: the host
 * sends events and checks the bits in the shared pages.  Each shared structure has a
 * page of its own, so that each can be made absent.  -n sets the number of attempts
 * of the cases that provoke a race.
 */
#define _GNU_SOURCE /* for program_invocation_short_name and clone() */
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <asm/kvm_para.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <linux/sizes.h>

#include "apic.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "trace.h"
#include "uffd.h"
#include "vmx.h"
#include "xen.h"

/* Arbitrarily chosen, mapped one to one, outside of memslot 0. */
#define SHARED_GPA		0xc0000000
#define SHARED_SLOT		10

enum {
	SHINFO_PAGE,
	VCPU_INFO_PAGE,		/* one page for each of two vCPUs */
	TIME_INFO_PAGE = VCPU_INFO_PAGE + 2,
	NR_SHARED_PAGES,
	ARGS_PAGES = NR_SHARED_PAGES,	/* three pages, the middle one is unused */
	NR_PAGES = ARGS_PAGES + 3,
};

#define PAGE_GPA(page)		(SHARED_GPA + (page) * PAGE_SIZE)

/* Arbitrarily chosen, in the middle of its page. */
#define VCPU_INFO_OFFSET	0x40

/* The eight bytes before vcpu_info are the rest of an entry of a VM-exit MSR-store area. */
#define NESTED_INFO_OFFSET	0x48

#define GSI			32

#define LONG_MODE_PORTS		4096
#define COMPAT_PORTS		1024

static int nr_races = 100;

struct xen_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[2];
	uint8_t *shared;
	bool long_mode;
};

static int set_vm_attr(struct xen_vm *x, struct kvm_xen_hvm_attr attr)
{
	return xen_set_vm_attr(x->vm, attr);
}

static struct kvm_xen_hvm_attr get_vm_attr(struct xen_vm *x, uint16_t type)
{
	struct kvm_xen_hvm_attr attr = { .type = type };

	vm_ioctl(x->vm, KVM_XEN_HVM_GET_ATTR, &attr);
	return attr;
}

static int set_vcpu_attr(struct kvm_vcpu *vcpu, struct kvm_xen_vcpu_attr attr)
{
	return xen_set_vcpu_attr(vcpu, attr);
}

static void set_long_mode(struct xen_vm *x, bool long_mode)
{
	x->long_mode = long_mode;
	ASSERT_EQ(set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = long_mode,
	}), 0);
}

static void set_shared_info(struct xen_vm *x)
{
	ASSERT_EQ(set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = PAGE_GPA(SHINFO_PAGE) / PAGE_SIZE,
	}), 0);
}

static void set_vcpu_info(struct xen_vm *x, int i)
{
	ASSERT_EQ(set_vcpu_attr(x->vcpus[i], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		.u.gpa = PAGE_GPA(VCPU_INFO_PAGE + i) + VCPU_INFO_OFFSET,
	}), 0);
}

/* Creates a VM with a shared_info page and without vcpu_info. */
static struct xen_vm *xen_vm_create(void *guest_code, uint32_t flags)
{
	struct kvm_xen_hvm_config config = {
		.flags = flags,
		.msr = XEN_HYPERCALL_MSR,
	};
	struct xen_vm *x = calloc(1, sizeof(*x));

	TEST_ASSERT(x, "calloc() failed: %s", strerror(errno));
	x->vm = vm_create_with_vcpus(2, guest_code, x->vcpus);
	vm_userspace_mem_region_add(x->vm, VM_MEM_SRC_ANONYMOUS, SHARED_GPA,
				    SHARED_SLOT, NR_PAGES, 0);
	virt_map(x->vm, SHARED_GPA, SHARED_GPA, NR_SHARED_PAGES);
	x->shared = addr_gpa2hva(x->vm, SHARED_GPA);

	vm_ioctl(x->vm, KVM_XEN_HVM_CONFIG, &config);
	set_long_mode(x, true);
	set_shared_info(x);
	return x;
}

static struct xen_vm *xen_vm_create_with_vcpu_info(void *guest_code)
{
	struct xen_vm *x;

	x = xen_vm_create(guest_code, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
				      KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	set_vcpu_info(x, 0);
	set_vcpu_info(x, 1);
	return x;
}

static void xen_vm_free(struct xen_vm *x)
{
	kvm_vm_free(x->vm);
	free(x);
}

static uint8_t *shared_page(struct xen_vm *x, int page)
{
	return x->shared + page * PAGE_SIZE;
}

static struct xen_vcpu_info *vcpu_info(struct xen_vm *x, int i)
{
	return (void *)shared_page(x, VCPU_INFO_PAGE + i) + VCPU_INFO_OFFSET;
}

static uint64_t pending_sel(struct xen_vm *x, int i)
{
	struct xen_vcpu_info *vi = vcpu_info(x, i);

	return x->long_mode ? READ_ONCE(vi->evtchn_pending_sel) :
			      READ_ONCE(vi->compat_pending_sel);
}

static uint64_t sel_bit(struct xen_vm *x, uint32_t port)
{
	return 1ull << (port / (x->long_mode ? 64 : 32));
}

static bool port_pending(struct xen_vm *x, uint32_t port)
{
	uint8_t *bits = shared_page(x, SHINFO_PAGE) + XEN_SHINFO_PENDING;

	return READ_ONCE(bits[port / 8]) & BIT(port % 8);
}

static void set_pending(struct xen_vm *x, uint32_t port)
{
	shared_page(x, SHINFO_PAGE)[XEN_SHINFO_PENDING + port / 8] |= BIT(port % 8);
}

static uint8_t *port_masks(struct xen_vm *x)
{
	return shared_page(x, SHINFO_PAGE) +
	       (x->long_mode ? XEN_SHINFO_MASK : XEN_SHINFO_COMPAT_MASK);
}

static void mask_port(struct xen_vm *x, uint32_t port)
{
	port_masks(x)[port / 8] |= BIT(port % 8);
}

static void unmask_port(struct xen_vm *x, uint32_t port)
{
	port_masks(x)[port / 8] &= ~BIT(port % 8);
}

static void clear_pages(struct xen_vm *x)
{
	memset(x->shared, 0, NR_SHARED_PAGES * PAGE_SIZE);
}

/* Unmaps the page in userspace; the next access maps a page of zeroes. */
static void make_absent(struct xen_vm *x, int page)
{
	TEST_ASSERT(!madvise(shared_page(x, page), PAGE_SIZE, MADV_DONTNEED),
		    "madvise() failed: %s", strerror(errno));
}

static void protect_page(struct xen_vm *x, int page, int prot)
{
	TEST_ASSERT(!mprotect(shared_page(x, page), PAGE_SIZE, prot),
		    "mprotect() failed: %s", strerror(errno));
}

static int send_by_ioctl(struct xen_vm *x, uint32_t port, int vcpu)
{
	return xen_send_event(x->vm, port, x->vcpus[vcpu]->id,
			      KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL);
}

/* Returns an eventfd that sends to the port. */
static int irqfd_create(struct xen_vm *x, uint32_t port, int vcpu)
{
	struct {
		struct kvm_irq_routing info;
		struct kvm_irq_routing_entry entry;
	} routing = {
		.info.nr = 1,
		.entry = {
			.gsi = GSI,
			.type = KVM_IRQ_ROUTING_XEN_EVTCHN,
			.u.xen_evtchn = {
				.port = port,
				.vcpu = x->vcpus[vcpu]->id,
				.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
			},
		},
	};

	vm_ioctl(x->vm, KVM_SET_GSI_ROUTING, &routing.info);
	return kvm_irqfd_create(x->vm, GSI);
}

static void irqfd_destroy(struct xen_vm *x, int fd)
{
	kvm_irqfd_destroy(x->vm, GSI, fd);
}

/* The event is delivered before this returns, unless the vcpu_info is absent. */
static void send_by_irqfd(struct xen_vm *x, uint32_t port, int vcpu)
{
	int fd = irqfd_create(x, port, vcpu);

	eventfd_write(fd, 1);
	irqfd_destroy(x, fd);
}

static void assert_untouched(struct xen_vm *x, uint32_t port, const char *how)
{
	int i;

	for (i = 0; i < NR_SHARED_PAGES * PAGE_SIZE; i++) {
		if (x->shared[i])
			TEST_FAIL("port %#x by %s, long mode %d: byte %#x is %#x, expected 0",
				  port, how, x->long_mode, i, x->shared[i]);
	}
}

/* Clears the clocks, which KVM writes independently of events. */
static void clear_times(struct xen_vm *x)
{
	uint8_t *shinfo = shared_page(x, SHINFO_PAGE);
	int i;

	if (x->long_mode) {
		memset(shinfo + XEN_SHINFO_WALL_CLOCK, 0, 16);
	} else {
		memset(shinfo + XEN_SHINFO_COMPAT_WALL_CLOCK, 0, 12);
		memset(shinfo + XEN_SHINFO_COMPAT_SEC_HI, 0, 4);
	}
	for (i = 0; i < ARRAY_SIZE(x->vcpus); i++)
		memset(vcpu_info(x, i)->time, 0, sizeof(vcpu_info(x, i)->time));
}

/* Only the bits of the port and of its vCPU may be set in the shared pages. */
static void assert_nothing_else(struct xen_vm *x, uint32_t port, int vcpu,
				const char *how)
{
	static uint8_t pages[NR_SHARED_PAGES * PAGE_SIZE] __aligned(8);
	struct xen_vm rest = *x;
	struct xen_vcpu_info *vi;

	memcpy(pages, x->shared, sizeof(pages));
	rest.shared = pages;
	clear_times(&rest);
	shared_page(&rest, SHINFO_PAGE)[XEN_SHINFO_PENDING + port / 8] &= ~BIT(port % 8);
	vi = vcpu_info(&rest, vcpu);
	vi->evtchn_upcall_pending = 0;
	if (x->long_mode)
		vi->evtchn_pending_sel &= ~sel_bit(x, port);
	else
		vi->compat_pending_sel &= ~sel_bit(x, port);
	assert_untouched(&rest, port, how);
}

static void assert_delivered(struct xen_vm *x, uint32_t port, int vcpu,
			     const char *how)
{
	TEST_ASSERT(port_pending(x, port),
		    "port %u not pending after %s, long mode %d", port, how,
		    x->long_mode);
	TEST_ASSERT(pending_sel(x, vcpu) == sel_bit(x, port),
		    "port %u by %s, long mode %d: evtchn_pending_sel %#lx, expected %#lx",
		    port, how, x->long_mode, pending_sel(x, vcpu),
		    sel_bit(x, port));
	TEST_ASSERT(vcpu_info(x, vcpu)->evtchn_upcall_pending == 1,
		    "port %u by %s, long mode %d: evtchn_upcall_pending %u, expected 1",
		    port, how, x->long_mode,
		    vcpu_info(x, vcpu)->evtchn_upcall_pending);
	assert_nothing_else(x, port, vcpu, how);
}

static void guest_nothing(void)
{
	GUEST_DONE();
}

/* Makes EVTCHNOP_send to send_port deliver an event to port. */
static int set_send_port(struct xen_vm *x, uint32_t send_port, uint32_t flags,
			 uint32_t port, int vcpu)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_EVTCHN,
		.u.evtchn = {
			.send_port = send_port,
			.type = EVTCHNSTAT_interdomain,
			.flags = flags,
			.deliver.port = {
				.port = port,
				.vcpu = x->vcpus[vcpu]->id,
				.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
			},
		},
	});
}

/* The port that the guest sends to, set by the host. */
static uint32_t guest_send_port;

static void guest_send(void)
{
	for (;;)
		GUEST_SYNC(xen_hypercall(__HYPERVISOR_event_channel_op,
					 EVTCHNOP_send, (uint64_t)&guest_send_port));
}

static void test_port(struct xen_vm *x, uint32_t port)
{
	uint32_t limit = x->long_mode ? LONG_MODE_PORTS : COMPAT_PORTS;
	bool valid = port < limit;
	int vcpu;

	for (vcpu = 0; vcpu < 2; vcpu++) {
		/* The ioctl refuses port 0, a route does not. */
		clear_pages(x);
		ASSERT_EQ(send_by_ioctl(x, port, vcpu), valid && port ? 0 : EINVAL);
		if (valid && port)
			assert_delivered(x, port, vcpu, "ioctl");
		else
			assert_untouched(x, port, "ioctl");

		clear_pages(x);
		send_by_irqfd(x, port, vcpu);
		if (valid)
			assert_delivered(x, port, vcpu, "irqfd");
		else
			assert_untouched(x, port, "irqfd");
	}
	if (!valid || !port)
		return;

	/* A port that is pending already, and a masked port, raise no upcall. */
	vcpu_info(x, 1)->evtchn_upcall_pending = 0;
	ASSERT_EQ(send_by_ioctl(x, port, 1), 0);
	ASSERT_EQ(vcpu_info(x, 1)->evtchn_upcall_pending, 0);

	clear_pages(x);
	mask_port(x, port);
	ASSERT_EQ(send_by_ioctl(x, port, 0), 0);
	TEST_ASSERT(port_pending(x, port), "masked port %u not pending", port);
	ASSERT_EQ(pending_sel(x, 0), 0);
	ASSERT_EQ(vcpu_info(x, 0)->evtchn_upcall_pending, 0);
	unmask_port(x, port);
	assert_nothing_else(x, port, 0, "ioctl, masked");
}

/* Tests the first and last ports and the numbers around them in both modes. */
TEST(delivery)
{
	static const uint32_t ports[] = {
		0, 1, 31, 32, 63, 64, 1022, 1023, 1024, 1025, 4094, 4095, 4096,
		4097, 131071, 131072, 0x7fffffff, 0x80000000, 0xffffffff,
	};
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_send);
	int mode, i;

	for (mode = 0; mode < 2; mode++) {
		set_long_mode(x, mode);
		for (i = 0; i < ARRAY_SIZE(ports); i++)
			test_port(x, ports[i]);

		clear_pages(x);
		ASSERT_EQ(set_send_port(x, 7, 0, 1023, 1), 0);
		guest_send_port = 7;
		sync_global_to_guest(x->vm, guest_send_port);
		ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), 0);
		assert_delivered(x, 1023, 1, "hypercall");
		ASSERT_EQ(set_send_port(x, 7, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), 0);
	}

	xen_vm_free(x);
}

/*
 * The ports of 64-bit mode can be set up in 32-bit mode, for example by userspace that
 * restores the mode later.  Events are sent to them only in 64-bit mode.
 */
TEST(ports_of_any_mode)
{
	static const uint32_t ports[] = { COMPAT_PORTS - 1, COMPAT_PORTS, LONG_MODE_PORTS - 1 };
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_send);
	struct kvm_run *run = x->vcpus[0]->run;
	int mode, i, err;

	set_long_mode(x, false);
	for (i = 0; i < ARRAY_SIZE(ports); i++) {
		err = set_send_port(x, ports[i], 0, ports[i], 1);
		TEST_ASSERT(!err, "port %u: errno %d, expected none", ports[i], err);
		err = set_send_port(x, ports[i], KVM_XEN_EVTCHN_UPDATE, ports[i], 1);
		TEST_ASSERT(!err, "update of port %u: errno %d, expected none", ports[i], err);
	}
	ASSERT_EQ(set_send_port(x, LONG_MODE_PORTS, 0, 8, 1), EINVAL);
	ASSERT_EQ(set_send_port(x, 8, 0, LONG_MODE_PORTS, 1), EINVAL);

	for (mode = 0; mode < 2; mode++) {
		set_long_mode(x, mode);
		for (i = 0; i < ARRAY_SIZE(ports); i++) {
			clear_pages(x);
			guest_send_port = ports[i];
			sync_global_to_guest(x->vm, guest_send_port);
			if (mode || ports[i] < COMPAT_PORTS) {
				ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), 0);
				assert_delivered(x, ports[i], 1, "hypercall");
				continue;
			}
			/* KVM leaves the hypercall to userspace. */
			vcpu_run(x->vcpus[0]);
			ASSERT_EQ(run->exit_reason, KVM_EXIT_XEN);
			assert_untouched(x, ports[i], "hypercall");
			run->xen.u.hcall.result = EINVAL;
			ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), EINVAL);
		}
	}
	xen_vm_free(x);
}

/* An absent shared_info page is faulted in by the irqfd worker or the sender. */
TEST(absent_pages)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_nothing);
	int fd = irqfd_create(x, 5, 0);

	make_absent(x, SHINFO_PAGE);
	eventfd_write(fd, 1);
	wait_for(port_pending(x, 5));
	wait_for(vcpu_info(x, 0)->evtchn_upcall_pending);
	assert_delivered(x, 5, 0, "irqfd");
	irqfd_destroy(x, fd);

	clear_pages(x);
	make_absent(x, SHINFO_PAGE);
	ASSERT_EQ(send_by_ioctl(x, 5, 0), 0);
	assert_delivered(x, 5, 0, "ioctl");

	/* An absent vcpu_info is written when the vCPU runs. */
	clear_pages(x);
	make_absent(x, VCPU_INFO_PAGE);
	ASSERT_EQ(send_by_ioctl(x, 5, 0), 0);
	vcpu_run(x->vcpus[0]);
	assert_delivered(x, 5, 0, "ioctl");

	xen_vm_free(x);
}

static void *thread_run_to_sync(void *vcpu)
{
	return (void *)vcpu_run_to_sync(vcpu);
}

/* Takes kvm->lock, and has no other effect if there are vCPUs. */
static void *thread_set_boot_cpu_id(void *vm)
{
	return (void *)(long)(__vm_ioctl((struct kvm_vm *)vm, KVM_SET_BOOT_CPU_ID, NULL) ?
			      errno : 0);
}

static void *thread_get_version(void *vm)
{
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_XEN_VERSION };

	return (void *)(long)(__vm_ioctl((struct kvm_vm *)vm, KVM_XEN_HVM_GET_ATTR, &attr) ?
			      errno : 0);
}

/*
 * While a vCPU that sends an event waits for the shared_info page, it must hold neither
 * kvm->lock nor xen_lock, because userspace may need an ioctl that takes one of them in
 * order to provide the page.
 */
TEST(kvm_lock)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_send);
	uint8_t *shinfo = shared_page(x, SHINFO_PAGE);
	pthread_t vcpu;
	uint64_t ret;
	int uffd;

	ASSERT_EQ(set_send_port(x, 7, 0, 8, 1), 0);
	guest_send_port = 7;
	sync_global_to_guest(x->vm, guest_send_port);

	make_absent(x, SHINFO_PAGE);
	uffd = uffd_register(shinfo, PAGE_SIZE, 0);
	vcpu = start_thread(thread_run_to_sync, x->vcpus[0]);
	uffd_wait_for_fault(uffd);

	ret = join_thread(start_thread(thread_set_boot_cpu_id, x->vm),
			  "KVM_SET_BOOT_CPU_ID");
	ASSERT_EQ(ret, EBUSY);
	ret = join_thread(start_thread(thread_get_version, x->vm),
			  "KVM_XEN_HVM_GET_ATTR");
	ASSERT_EQ(ret, 0);

	uffd_provide(uffd, shinfo, NULL, PAGE_SIZE);
	close(uffd);
	ASSERT_EQ(join_thread(vcpu, "EVTCHNOP_send"), 0);
	assert_delivered(x, 8, 1, "hypercall");

	xen_vm_free(x);
}

/* Set by the host to end guest_send_all_the_time(). */
static bool guest_stop;

static void guest_send_all_the_time(void)
{
	while (!READ_ONCE(guest_stop))
		xen_hypercall(__HYPERVISOR_event_channel_op, EVTCHNOP_send,
			      (uint64_t)&guest_send_port);
	GUEST_SYNC(0);
}

static void stop_guest(struct xen_vm *x)
{
	*(bool *)addr_gva2hva(x->vm, (vm_vaddr_t)&guest_stop) = true;
}

/* Runs the vCPU and ignores hypercalls that KVM does not handle. */
static void *thread_run_with_hypercalls(void *arg)
{
	struct kvm_vcpu *vcpu = arg;

	for (;;) {
		vcpu_run(vcpu);
		if (vcpu->run->exit_reason != KVM_EXIT_XEN)
			break;
		vcpu->run->xen.u.hcall.result = 0;
	}
	ASSERT_EQ(get_ucall(vcpu, NULL), UCALL_SYNC);
	return NULL;
}

/* Arbitrarily chosen, large enough that the idr has a separate node for it. */
#define RACE_SEND_PORT	700

static bool race_stop;

static void *thread_update_port(void *arg)
{
	struct xen_vm *x = arg;
	int i, err;

	for (i = 0; !READ_ONCE(race_stop); i++) {
		err = set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_UPDATE, 8, i & 1);
		TEST_ASSERT(!err || err == ENOENT,
			    "update of a port: errno %d, expected none or ENOENT", err);
	}
	return NULL;
}

/* Takes xen_lock all the time, so that updates and deassignments wait for it. */
static void *thread_get_attr(void *arg)
{
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_LONG_MODE };
	struct xen_vm *x = arg;

	while (!READ_ONCE(race_stop))
		vm_ioctl(x->vm, KVM_XEN_HVM_GET_ATTR, &attr);
	return NULL;
}

/*
 * A port is assigned and deassigned while other threads update it and a vCPU
 * sends to it.  KASAN reports if KVM uses the port after it was freed.
 */
TEST(port_table)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_send_all_the_time);
	pthread_t updaters[4], holder, vcpu;
	int i;

	/* The errors, without a race */
	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_UPDATE, 8, 0), ENOENT);
	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), ENOENT);
	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, 0, 8, 0), 0);
	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, 0, 8, 0), EEXIST);
	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_UPDATE, 9, 0), EINVAL);
	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), 0);

	guest_send_port = RACE_SEND_PORT;
	sync_global_to_guest(x->vm, guest_send_port);
	WRITE_ONCE(race_stop, false);
	vcpu = start_thread(thread_run_with_hypercalls, x->vcpus[0]);
	holder = start_thread(thread_get_attr, x);
	for (i = 0; i < ARRAY_SIZE(updaters); i++)
		updaters[i] = start_thread(thread_update_port, x);

	for (i = 0; i < nr_races; i++) {
		ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, 0, 8, 0), 0);
		ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), 0);
	}

	WRITE_ONCE(race_stop, true);
	stop_guest(x);
	for (i = 0; i < ARRAY_SIZE(updaters); i++)
		join_thread(updaters[i], "updater");
	join_thread(holder, "KVM_XEN_HVM_GET_ATTR");
	join_thread(vcpu, "sender");
	xen_vm_free(x);
}

static void *thread_change_mode(void *arg)
{
	struct xen_vm *x = arg;
	int i;

	for (i = 0; !READ_ONCE(race_stop); i++)
		set_long_mode(x, i & 1);
	return NULL;
}

static struct kvm_xen_vcpu_attr get_vcpu_attr(struct kvm_vcpu *vcpu, uint16_t type)
{
	struct kvm_xen_vcpu_attr attr = { .type = type };

	vcpu_ioctl(vcpu, KVM_XEN_VCPU_GET_ATTR, &attr);
	return attr;
}

/*
 * The mode changes while the host sends to ports that only long mode has.  The
 * vcpu_info is absent, so KVM records the word of each port as a bit in a field
 * of 64 bits.  If KVM computes the index of the word with 32 ports per word, it
 * sets a bit beyond that field, which changes the vCPU's Xen ID, or KVM warns.
 */
TEST(mode_race)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_nothing);
	int i, err, nr_sent = 0, nr_refused = 0;
	uint32_t vcpu_id;
	pthread_t thread;

	make_absent(x, VCPU_INFO_PAGE);
	race_stop = false;
	thread = start_thread(thread_change_mode, x);

	for (i = 0; i < nr_races * 5000 || !nr_sent || !nr_refused; i++) {
		uint32_t port = COMPAT_PORTS * 2 + i * 32 % COMPAT_PORTS;

		shared_page(x, SHINFO_PAGE)[XEN_SHINFO_PENDING + port / 8] = 0;
		err = send_by_ioctl(x, port, 0);
		TEST_ASSERT(!err || err == EINVAL,
			    "port %u: errno %d, expected none or EINVAL", port, err);
		nr_sent += !err;
		nr_refused += !!err;
	}
	WRITE_ONCE(race_stop, true);
	join_thread(thread, "KVM_XEN_ATTR_TYPE_LONG_MODE");

	vcpu_id = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).u.vcpu_id;
	TEST_ASSERT(!vcpu_id, "events changed the Xen ID to %#x, expected 0", vcpu_id);
	xen_vm_free(x);
}

static long unreclaimable_kib(void)
{
	FILE *f = fopen("/proc/meminfo", "r");
	char line[128];
	long kib = -1;

	TEST_ASSERT(f, "cannot open /proc/meminfo: %s", strerror(errno));
	while (kib < 0 && fgets(line, sizeof(line), f))
		sscanf(line, "SUnreclaim: %ld kB", &kib);
	fclose(f);
	TEST_ASSERT(kib >= 0, "no SUnreclaim in /proc/meminfo");
	return kib;
}

static void guest_write_hypercall_pages(uint64_t nr_writes)
{
	while (nr_writes--)
		wrmsr(XEN_HYPERCALL_MSR, PAGE_GPA(TIME_INFO_PAGE));
	GUEST_SYNC(0);
}

static void write_hypercall_pages(struct xen_vm *x, uint64_t nr_writes)
{
	vcpu_args_set(x->vcpus[0], 1, nr_writes);
	vcpu_run(x->vcpus[0]);
	ASSERT_EQ(get_ucall(x->vcpus[0], NULL), UCALL_SYNC);
}

/* Writing a hypercall page that userspace provides must not leak memory. */
TEST(hypercall_page)
{
	const long nr_writes = 8192, written = nr_writes * (long)PAGE_SIZE / 1024;
	struct xen_vm *x = xen_vm_create(guest_write_hypercall_pages, 0);
	uint8_t *page = shared_page(x, TIME_INFO_PAGE);
	struct kvm_xen_hvm_config config = {
		.msr = XEN_HYPERCALL_MSR,
		.blob_size_64 = 1,
	};
	long before, leaked;
	uint8_t *blob;

	blob = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(blob != MAP_FAILED, "mmap() failed: %s", strerror(errno));
	memset(blob, 0x5a, PAGE_SIZE);
	config.blob_addr_64 = (uintptr_t)blob;
	vm_ioctl(x->vm, KVM_XEN_HVM_CONFIG, &config);

	before = unreclaimable_kib();
	write_hypercall_pages(x, nr_writes);
	leaked = unreclaimable_kib() - before;

	TEST_ASSERT(!memcmp(page, blob, PAGE_SIZE), "hypercall page not written");
	/*
	 * A debug kernel keeps freed memory for a while to detect accesses to
	 * it, so the amount does not show a leak there.  kmemleak does.
	 */
	TEST_ASSERT(leaked < written / 2 || !access("/sys/kernel/debug/kmemleak", F_OK),
		    "%ld KiB of kernel memory gone after %ld KiB were written",
		    leaked, written);

	munmap(blob, PAGE_SIZE);
	xen_vm_free(x);
}

/* Only the guest's write of the hypercall MSR writes the page and changes the mode. */
TEST(hypercall_page_by_host)
{
	struct xen_vm *x = xen_vm_create(guest_write_hypercall_pages,
					 KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	static const uint8_t unchanged[PAGE_SIZE];
	uint8_t *page = shared_page(x, TIME_INFO_PAGE);

	set_long_mode(x, false);
	/* Hyper-V may have an MSR of this number. */
	_vcpu_set_msr(x->vcpus[0], XEN_HYPERCALL_MSR, PAGE_GPA(TIME_INFO_PAGE));
	TEST_ASSERT(!memcmp(page, unchanged, PAGE_SIZE), "page written by KVM_SET_MSRS");
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_LONG_MODE).u.long_mode, false);

	write_hypercall_pages(x, 1);
	/* mov $0, %eax */
	ASSERT_EQ(page[0], 0xb8);
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_LONG_MODE).u.long_mode, true);

	xen_vm_free(x);
}

/* Let a vCPU run unpaged 32-bit code at @cpl: a hypercall at the start of a page. */
static void run_hypercall_at(struct kvm_vcpu *vcpu, int cpl, uint64_t rip)
{
	struct kvm_segment code = {
		.limit = ~0u, .selector = 0x8 | cpl, .type = 0xb, .s = 1, .dpl = cpl,
		.present = 1, .db = 1, .g = 1,
	}, data = code;
	struct kvm_regs regs = {
		.rax = 0x77, .rbx = 1, .rcx = 2, .rdx = 3, .rsi = 4, .rdi = 5, .rbp = 6,
		.rip = rip, .rflags = X86_EFLAGS_FIXED,
	};
	struct kvm_sregs sregs;

	vcpu_sregs_get(vcpu, &sregs);
	data.selector += 0x8;
	data.type = 0x3;
	sregs.cs = code;
	sregs.ds = data;
	sregs.es = data;
	sregs.ss = data;
	sregs.cr0 = X86_CR0_PE;
	sregs.cr4 = 0;
	sregs.efer = 0;
	vcpu_sregs_set(vcpu, &sregs);
	vcpu_regs_set(vcpu, &regs);
	vcpu_run(vcpu);
}

/* Userspace handles this hypercall for either privilege level, and the trace shows it. */
TEST(hypercall_trace)
{
	struct xen_vm *x = xen_vm_create(guest_nothing, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	const uint8_t vmcall[] = { 0x0f, 0x01, 0xc1 }, vmmcall[] = { 0x0f, 0x01, 0xd9 };
	struct kvm_run *run;
	char expected[128];
	int i;

	memcpy(shared_page(x, TIME_INFO_PAGE), is_intel_cpu() ? vmcall : vmmcall,
	       sizeof(vmcall));
	trace_start("kvm/kvm_xen_hypercall");
	for (i = 0; i < 2; i++) {
		run_hypercall_at(x->vcpus[i], i * 3, PAGE_GPA(TIME_INFO_PAGE));
		run = x->vcpus[i]->run;
		ASSERT_EQ(run->exit_reason, KVM_EXIT_XEN);
		ASSERT_EQ(run->xen.u.hcall.cpl, i * 3);
		snprintf(expected, sizeof(expected),
			 "cpl %d nr 0x77 a0 0x1 a1 0x2 a2 0x3 a3 0x4 a4 0x5 a5 6", i * 3);
		check_trace("hypercall", expected);
	}
	xen_vm_free(x);
}

struct sched_poll {
	uint64_t ports;
	uint32_t nr_ports, pad;
	uint64_t timeout;
};

static struct sched_poll guest_poll;

static uint32_t guest_poll_port;

static void guest_poll_one(void)
{
	guest_poll.ports = (uint64_t)&guest_poll_port;
	guest_poll.nr_ports = 1;
	GUEST_SYNC(xen_hypercall(__HYPERVISOR_sched_op, SCHEDOP_poll,
				 (uint64_t)&guest_poll));
}

static void *thread_add_memslot(void *vm)
{
	/* Arbitrarily chosen, after the shared pages. */
	vm_userspace_mem_region_add((struct kvm_vm *)vm, VM_MEM_SRC_ANONYMOUS,
				    PAGE_GPA(NR_PAGES), SHARED_SLOT + 1, 1, 0);
	return NULL;
}

/* Memslots can be changed while a vCPU polls for an event that never comes. */
TEST(poll_memslot)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_poll_one);
	pthread_t vcpu;

	guest_poll_port = 8;
	sync_global_to_guest(x->vm, guest_poll_port);
	mask_port(x, 8);
	ASSERT_EQ(vcpu_get_stat(x->vcpus[0], "blocking"), 0);
	vcpu = start_thread(thread_run_to_sync, x->vcpus[0]);
	vcpu_wait_stat(x->vcpus[0], "blocking", 1);

	join_thread(start_thread(thread_add_memslot, x->vm),
		    "KVM_SET_USER_MEMORY_REGION");

	ASSERT_EQ(send_by_ioctl(x, 8, 0), 0);
	ASSERT_EQ(join_thread(vcpu, "SCHEDOP_poll"), 0);
	xen_vm_free(x);
}

static void clear_event(struct xen_vm *x, uint32_t port)
{
	WRITE_ONCE(vcpu_info(x, 0)->evtchn_pending_sel, 0);
	WRITE_ONCE(vcpu_info(x, 1)->evtchn_pending_sel, 0);
	WRITE_ONCE(*(uint64_t *)(shared_page(x, SHINFO_PAGE) + XEN_SHINFO_PENDING +
				 port / 64 * 8), 0);
}

static void wait_for_event(struct xen_vm *x)
{
	wait_for(pending_sel(x, 0) || pending_sel(x, 1));
}

/*
 * The target changes while a vCPU keeps sending.  Events that are sent after the
 * change must go to the new target.
 */
TEST(retarget)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_send_all_the_time);
	pthread_t vcpu;
	int i, target;

	ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, 0, 8, 0), 0);
	guest_send_port = RACE_SEND_PORT;
	sync_global_to_guest(x->vm, guest_send_port);
	vcpu = start_thread(thread_run_with_hypercalls, x->vcpus[0]);

	for (i = 0; i < nr_races; i++) {
		target = i & 1;
		clear_event(x, 8);
		ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_UPDATE, 8, !target), 0);
		ASSERT_EQ(set_send_port(x, RACE_SEND_PORT, KVM_XEN_EVTCHN_UPDATE, 8, target), 0);

		/* The first event may have been sent before the update. */
		wait_for_event(x);
		clear_event(x, 8);
		wait_for_event(x);
		clear_event(x, 8);
		wait_for_event(x);
		TEST_ASSERT(!pending_sel(x, !target),
			    "update %d: event for vCPU %d, expected vCPU %d",
			    i, !target, target);
	}

	stop_guest(x);
	join_thread(vcpu, "sender");
	xen_vm_free(x);
}

/* Two pages that are adjacent in virtual, but not in physical memory. */
#define ARGS_GVA		0xd0000000

struct guest_hypercall {
	uint64_t nr, arg1, arg2, arg3;
	uint64_t ret;
	bool compat;
};

static struct guest_hypercall guest_hypercall;

static void guest_make_hypercalls(void)
{
	struct guest_hypercall *h = &guest_hypercall;

	GUEST_SYNC(0);

	for (;;) {
		if (h->compat)
			h->ret = (int32_t)xen_hypercall32(h->nr, h->arg1, h->arg2, h->arg3);
		else
			asm volatile("vmcall" : "=a"(h->ret)
				     : "a"(h->nr), "D"(h->arg1), "S"(h->arg2), "d"(h->arg3)
				     : "memory");
		GUEST_SYNC(h->ret);
	}
}

static void set_guest_hypercall(struct xen_vm *x, bool compat, uint64_t nr,
				uint64_t arg1, uint64_t arg2, uint64_t arg3)
{
	struct guest_hypercall *h = addr_gva2hva(x->vm, (vm_vaddr_t)&guest_hypercall);

	*h = (struct guest_hypercall) {
		.nr = nr, .arg1 = arg1, .arg2 = arg2, .arg3 = arg3, .compat = compat,
	};
}

/* Makes the guest do a hypercall that KVM handles itself. */
static int64_t make_hypercall(struct xen_vm *x, bool compat, uint64_t nr,
			      uint64_t arg1, uint64_t arg2, uint64_t arg3)
{
	set_guest_hypercall(x, compat, nr, arg1, arg2, arg3);
	return vcpu_run_to_sync(x->vcpus[0]);
}

static void write_arg(struct xen_vm *x, vm_vaddr_t gva, const void *data, int len)
{
	int i;

	for (i = 0; i < len; i++)
		*(uint8_t *)addr_gva2hva(x->vm, gva + i) = ((const uint8_t *)data)[i];
}

struct compat_sched_poll {
	uint32_t ports;
	uint32_t nr_ports;
	uint64_t timeout;
};

static void test_arguments_of(struct xen_vm *x, bool compat)
{
	const uint64_t end = ARGS_GVA + PAGE_SIZE;
	struct sched_poll poll = { .nr_ports = 3 };
	struct compat_sched_poll compat_poll = { .nr_ports = 3 };
	uint32_t ports[] = { 9, 8, 10 };
	uint32_t bad_port = COMPAT_PORTS * 4;
	void *arg = compat ? (void *)&compat_poll : &poll;
	int len = compat ? sizeof(compat_poll) : sizeof(poll);
	uint32_t send_port = 7;
	uint64_t gva;

	/* Port 8 is pending, which ends the poll at once. */
	clear_pages(x);
	mask_port(x, 8);
	ASSERT_EQ(send_by_ioctl(x, 8, 0), 0);

	for (gva = end - 3 * PAGE_SIZE / 4; gva < end; gva += gva < end - 32 ? 64 : 1) {
		/* First ports[] crosses the page boundary, then the structure. */
		poll.ports = gva;
		compat_poll.ports = gva;
		write_arg(x, gva, ports, sizeof(ports));
		write_arg(x, ARGS_GVA, arg, len);
		ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_sched_op, SCHEDOP_poll,
					 ARGS_GVA, 0), 0);

		poll.ports = ARGS_GVA;
		compat_poll.ports = ARGS_GVA;
		write_arg(x, ARGS_GVA, ports, sizeof(ports));
		write_arg(x, gva, arg, len);
		ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_sched_op, SCHEDOP_poll,
					 gva, 0), 0);

		write_arg(x, ARGS_GVA, &bad_port, sizeof(bad_port));
		ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_sched_op, SCHEDOP_poll,
					 gva, 0), -EINVAL);
	}

	ASSERT_EQ(set_send_port(x, send_port, 0, 8, 1), 0);
	for (gva = end - 4; gva <= end; gva++) {
		clear_pages(x);
		write_arg(x, gva, &send_port, sizeof(send_port));
		ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_event_channel_op,
					 EVTCHNOP_send, gva, 0), 0);
		assert_delivered(x, 8, 1, "hypercall");
	}
	ASSERT_EQ(set_send_port(x, send_port, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), 0);

	/* The argument extends into an unmapped page. */
	gva = end + PAGE_SIZE - 2;
	ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_event_channel_op,
				 EVTCHNOP_send, gva, 0), -EFAULT);
	ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_sched_op, SCHEDOP_poll,
				 gva, 0), -EFAULT);
	poll.ports = gva;
	compat_poll.ports = gva;
	write_arg(x, ARGS_GVA, arg, len);
	ASSERT_EQ(make_hypercall(x, compat, __HYPERVISOR_sched_op, SCHEDOP_poll,
				 ARGS_GVA, 0), -EFAULT);
}

static void set_clock(struct kvm_vm *vm, uint64_t ns)
{
	struct kvm_clock_data clock = { .clock = ns };

	vm_ioctl(vm, KVM_SET_CLOCK, &clock);
}

static uint64_t vm_clock_ns(struct xen_vm *x)
{
	struct kvm_clock_data clock;

	vm_ioctl(x->vm, KVM_GET_CLOCK, &clock);
	return clock.clock;
}

/* Poll port 9, which stays clear, until the guest's clock shows @deadline. */
static void poll_until(struct xen_vm *x, bool compat, uint64_t deadline)
{
	struct sched_poll poll = { .ports = ARGS_GVA + 64, .nr_ports = 1, .timeout = deadline };
	struct compat_sched_poll compat_poll = {
		.ports = ARGS_GVA + 64, .nr_ports = 1, .timeout = deadline,
	};
	uint32_t port = 9;

	write_arg(x, ARGS_GVA, compat ? (void *)&compat_poll : &poll,
		  compat ? sizeof(compat_poll) : sizeof(poll));
	write_arg(x, ARGS_GVA + 64, &port, sizeof(port));
	set_guest_hypercall(x, compat, __HYPERVISOR_sched_op, SCHEDOP_poll, ARGS_GVA, 0);
	ASSERT_EQ(join_thread(start_thread(thread_run_to_sync, x->vcpus[0]),
			      "SCHEDOP_poll with a timeout"), 0);
}

/* The timeout of a poll is a time of the guest's clock. */
TEST(poll_timeout)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_make_hypercalls);
	uint64_t deadline, wakeups;
	int compat;

	virt_map(x->vm, ARGS_GVA, PAGE_GPA(ARGS_PAGES), 1);
	vcpu_run_to_sync(x->vcpus[0]);
	xen_add_code32_segment(x->vm, x->vcpus[0]);
	set_clock(x->vm, 1000 * NSEC_PER_SEC);

	for (compat = 0; compat < 2; compat++) {
		wakeups = vcpu_get_stat(x->vcpus[0], "halt_wakeup");
		poll_until(x, compat, NSEC_PER_SEC);
		TEST_ASSERT(vcpu_get_stat(x->vcpus[0], "halt_wakeup") == wakeups,
			    "%d-bit poll with a timeout that has passed waited",
			    compat ? 32 : 64);

		deadline = vm_clock_ns(x) + NSEC_PER_SEC / 20;
		poll_until(x, compat, deadline);
		/* KVM's timer counts in jiffies, which can lag behind the clock. */
		TEST_ASSERT(vm_clock_ns(x) >= deadline - NSEC_PER_SEC / 40,
			    "%d-bit poll ended before its timeout", compat ? 32 : 64);
	}
	xen_vm_free(x);
}

#define TIMER_PORT		8

static void set_timer(struct xen_vm *x, uint64_t expires_ns)
{
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = {
			.port = TIMER_PORT,
			.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL,
			.expires_ns = expires_ns,
		},
	}), 0);
}

static void assert_deadline(struct xen_vm *x, bool compat, uint64_t expected)
{
	uint64_t expires = get_vcpu_attr(x->vcpus[0],
					 KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns;

	TEST_ASSERT(expires == expected, "%d-bit hypercall: deadline %#lx, expected %#lx",
		    compat ? 32 : 64, expires, expected);
}

static int64_t set_singleshot_timer(struct xen_vm *x, bool compat, uint64_t gva)
{
	const uint64_t vcpu_id = 0;

	return make_hypercall(x, compat, __HYPERVISOR_vcpu_op,
			      VCPUOP_set_singleshot_timer, vcpu_id, gva);
}

/* The padding at the end of a 64-bit argument must be mapped as well. */
static void test_timer_arguments_of(struct xen_vm *x, bool compat)
{
	const uint64_t end = ARGS_GVA + PAGE_SIZE;
	const int len = compat ? 12 : 16;
	struct {
		uint64_t timeout;
		uint32_t flags, pad;
	} late = {
		/* In 39 years, and all bytes differ */
		.timeout = 0x1122334455667788, .flags = ~VCPU_SSHOTTMR_future,
	}, past = {
		.timeout = 1, .flags = ~VCPU_SSHOTTMR_future,
	}, past_future = {
		.timeout = 1, .flags = VCPU_SSHOTTMR_future,
	};
	uint64_t gva;

	set_timer(x, 0);

	for (gva = end - 3 * PAGE_SIZE / 4; gva <= end; gva += gva < end - 32 ? 64 : 1) {
		write_arg(x, gva, &late, len);
		ASSERT_EQ(set_singleshot_timer(x, compat, gva), 0);
		assert_deadline(x, compat, late.timeout);

		/* A timer whose deadline has passed expires at once, even with the flag. */
		clear_pages(x);
		write_arg(x, gva, &past_future, len);
		ASSERT_EQ(set_singleshot_timer(x, compat, gva), 0);
		assert_delivered(x, TIMER_PORT, 0, "VCPU_SSHOTTMR_future");
		assert_deadline(x, compat, 0);

		clear_pages(x);
		write_arg(x, gva, &past, len);
		ASSERT_EQ(set_singleshot_timer(x, compat, gva), 0);
		assert_delivered(x, TIMER_PORT, 0, "VCPUOP_set_singleshot_timer");
		assert_deadline(x, compat, 0);
	}

	/* The argument, or only its padding, extends into an unmapped page. */
	gva = end + PAGE_SIZE - 12;
	write_arg(x, gva, &late, 12);
	ASSERT_EQ(set_singleshot_timer(x, compat, gva), compat ? 0 : -EFAULT);
	assert_deadline(x, compat, compat ? late.timeout : 0);
	ASSERT_EQ(set_singleshot_timer(x, compat, gva + 1), -EFAULT);
	assert_deadline(x, compat, compat ? late.timeout : 0);
}

/* Places arguments of 64-bit and 32-bit hypercalls around a page boundary. */
TEST(arguments)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_make_hypercalls);
	int mode;

	virt_map(x->vm, ARGS_GVA, PAGE_GPA(ARGS_PAGES), 1);
	virt_map(x->vm, ARGS_GVA + PAGE_SIZE, PAGE_GPA(ARGS_PAGES + 2), 1);
	vcpu_run_to_sync(x->vcpus[0]);
	xen_add_code32_segment(x->vm, x->vcpus[0]);

	for (mode = 0; mode < 2; mode++) {
		set_long_mode(x, mode);
		test_arguments_of(x, false);
		test_arguments_of(x, true);
		test_timer_arguments_of(x, false);
		test_timer_arguments_of(x, true);
	}
	xen_vm_free(x);
}

/* Arbitrarily chosen */
#define UPCALL_VECTOR		0x31
#define IPI_VECTOR		0x41

static int set_upcall_vector(struct kvm_vcpu *vcpu, uint8_t vector)
{
	return set_vcpu_attr(vcpu, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, .u.vector = vector,
	});
}

static int set_vm_upcall_vector(struct xen_vm *x, uint8_t vector)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, .u.vector = vector,
	});
}

/* Sets the local APIC to its present state, but enabled or disabled by software. */
static void set_lapic(struct kvm_vcpu *vcpu, bool enabled)
{
	struct kvm_lapic_state apic;
	uint32_t *spiv = (void *)&apic.regs[APIC_SPIV];

	vcpu_ioctl(vcpu, KVM_GET_LAPIC, &apic);
	*spiv &= ~APIC_SPIV_APIC_ENABLED;
	if (enabled)
		*spiv |= APIC_SPIV_APIC_ENABLED;
	vcpu_ioctl(vcpu, KVM_SET_LAPIC, &apic);
}

/* Sets the vector of the VM, or of the vCPU. */
static void set_vector(struct xen_vm *x, bool of_vm, uint8_t vector)
{
	ASSERT_EQ(of_vm ? set_vm_upcall_vector(x, vector) :
			  set_upcall_vector(x->vcpus[0], vector), 0);
}

/* Does the vCPU's local APIC request the upcall vector? */
static bool vector_requested(struct kvm_vcpu *vcpu)
{
	struct kvm_lapic_state apic;

	vcpu_ioctl(vcpu, KVM_GET_LAPIC, &apic);
	return apic.regs[APIC_IRR + UPCALL_VECTOR / 32 * 0x10 + UPCALL_VECTOR % 32 / 8] &
	       BIT(UPCALL_VECTOR % 8);
}

/* Calls KVM_RUN, but does not enter the guest. */
static void run_immediate(struct kvm_vcpu *vcpu)
{
	vcpu->run->immediate_exit = true;
	TEST_ASSERT(__vcpu_run(vcpu) == -1 && errno == EINTR,
		    "KVM_RUN with immediate_exit: errno %d, expected EINTR", errno);
	vcpu->run->immediate_exit = false;
}

static uint64_t guest_upcalls;

static void guest_upcall_handler(struct ex_regs *regs)
{
	struct xen_vcpu_info *vi = (void *)PAGE_GPA(VCPU_INFO_PAGE) + VCPU_INFO_OFFSET;

	vi->evtchn_upcall_pending = 0;
	WRITE_ONCE(guest_upcalls, guest_upcalls + 1);
	guest_skip_hlt(regs);
}

static void guest_halt_for_upcall(void)
{
	while (!READ_ONCE(guest_upcalls))
		guest_wait();
	GUEST_SYNC(0);
}

/*
 * The vCPU has run since userspace set anything else, so the vector alone has to make it
 * check for a pending upcall.
 */
TEST(vector_after_run)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_nothing);
	struct kvm_vcpu *vcpu = x->vcpus[0];

	clear_pages(x);
	vcpu_info(x, 0)->evtchn_upcall_pending = 1;
	set_lapic(vcpu, true);
	run_immediate(vcpu);
	TEST_ASSERT(!vector_requested(vcpu), "injected without vector");

	ASSERT_EQ(set_upcall_vector(vcpu, UPCALL_VECTOR), 0);
	run_immediate(vcpu);
	TEST_ASSERT(vector_requested(vcpu), "not injected after the vector was set");
	xen_vm_free(x);
}

/* Like vector_after_run, but with the vcpu_info alone. */
TEST(vcpu_info_after_run)
{
	struct xen_vm *x = xen_vm_create(guest_nothing, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
							KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	struct kvm_vcpu *vcpu = x->vcpus[0];

	clear_pages(x);
	vcpu_info(x, 0)->evtchn_upcall_pending = 1;
	set_lapic(vcpu, true);
	ASSERT_EQ(set_upcall_vector(vcpu, UPCALL_VECTOR), 0);
	run_immediate(vcpu);
	TEST_ASSERT(!vector_requested(vcpu), "injected without vcpu_info");

	set_vcpu_info(x, 0);
	run_immediate(vcpu);
	TEST_ASSERT(vector_requested(vcpu), "not injected after the vcpu_info was set");
	xen_vm_free(x);
}

/*
 * An upcall that is pending when userspace sets the vector or the local APIC, as it
 * does when it restores a VM, is injected.
 */
TEST(pending_upcall)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_halt_for_upcall);
	struct kvm_vcpu *vcpu = x->vcpus[0];
	pthread_t thread;

	clear_pages(x);
	vcpu_info(x, 0)->evtchn_upcall_pending = 1;

	set_lapic(vcpu, false);
	ASSERT_EQ(set_upcall_vector(vcpu, UPCALL_VECTOR), 0);
	run_immediate(vcpu);
	TEST_ASSERT(!vector_requested(vcpu), "injected into an APIC that is disabled");
	/* On a debug kernel, this also finds a use of memslots outside of kvm->srcu. */
	set_lapic(vcpu, true);
	run_immediate(vcpu);
	TEST_ASSERT(vector_requested(vcpu), "APIC set last: not injected, expected it to be");

	/* Use a new vCPU, whose IRR is empty. */
	vcpu = vm_vcpu_add(x->vm, 2, guest_halt_for_upcall);
	x->vcpus[0] = vcpu;
	set_vcpu_info(x, 0);
	set_lapic(vcpu, true);
	ASSERT_EQ(set_upcall_vector(vcpu, UPCALL_VECTOR), 0);
	run_immediate(vcpu);
	TEST_ASSERT(vector_requested(vcpu), "vector set last: not injected, expected it to be");

	/* The vcpu_info cannot be read when the vCPU runs. */
	vcpu = vm_vcpu_add(x->vm, 4, guest_halt_for_upcall);
	x->vcpus[0] = vcpu;
	set_vcpu_info(x, 0);
	set_lapic(vcpu, true);
	ASSERT_EQ(set_upcall_vector(vcpu, UPCALL_VECTOR), 0);
	protect_page(x, VCPU_INFO_PAGE, PROT_NONE);
	run_immediate(vcpu);
	TEST_ASSERT(!vector_requested(vcpu), "injected without vcpu_info");
	protect_page(x, VCPU_INFO_PAGE, PROT_READ | PROT_WRITE);
	run_immediate(vcpu);
	TEST_ASSERT(vector_requested(vcpu),
		    "vcpu_info readable again: not injected, expected it to be");

	/* Setting the vector of the VM wakes up a vCPU that is halted. */
	vcpu = vm_vcpu_add(x->vm, 3, guest_halt_for_upcall);
	x->vcpus[0] = vcpu;
	set_vcpu_info(x, 0);
	vm_init_descriptor_tables(x->vm);
	vcpu_init_descriptor_tables(vcpu);
	vm_install_exception_handler(x->vm, UPCALL_VECTOR, guest_upcall_handler);
	ASSERT_EQ(vcpu_get_stat(vcpu, "blocking"), 0);
	thread = start_thread(thread_run_to_sync, vcpu);
	vcpu_wait_stat(vcpu, "blocking", 1);
	ASSERT_EQ(set_vm_upcall_vector(x, UPCALL_VECTOR), 0);
	join_thread(thread, "KVM_RUN of a halted vCPU");
	xen_vm_free(x);
}

static uint64_t guest_strays;

static void guest_count_upcall(struct ex_regs *regs)
{
	WRITE_ONCE(guest_upcalls, guest_upcalls + 1);
}

static void guest_count_stray(struct ex_regs *regs)
{
	WRITE_ONCE(guest_strays, guest_strays + 1);
}

static void guest_exit_all_the_time(void)
{
	uint32_t eax, ebx, ecx, edx;

	asm volatile("sti");
	while (!READ_ONCE(guest_stop))
		cpuid(0, &eax, &ebx, &ecx, &edx);
	GUEST_SYNC(0);
}

/*
 * An upcall that is withdrawn, by memory or by attribute, while KVM injects it is
 * injected or not.  It is not another interrupt: neither vector 0, nor 7, the
 * spurious one of a PIC that was not set up, nor 255.
 */
TEST(withdrawn_upcall)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_exit_all_the_time);
	uint64_t *upcalls = addr_gva2hva(x->vm, (vm_vaddr_t)&guest_upcalls);
	uint64_t *strays = addr_gva2hva(x->vm, (vm_vaddr_t)&guest_strays);
	static const uint8_t stray_vectors[] = { 0, 7, 255 };
	struct kvm_vcpu *vcpu = x->vcpus[0];
	pthread_t thread;
	uint64_t enough;
	unsigned int i;

	vm_init_descriptor_tables(x->vm);
	vcpu_init_descriptor_tables(vcpu);
	vm_install_exception_handler(x->vm, UPCALL_VECTOR, guest_count_upcall);
	for (i = 0; i < ARRAY_SIZE(stray_vectors); i++)
		vm_install_exception_handler(x->vm, stray_vectors[i], guest_count_stray);

	ASSERT_EQ(set_vm_upcall_vector(x, UPCALL_VECTOR), 0);
	thread = start_thread(thread_run_to_sync, vcpu);
	for (enough = nr_races * 100; READ_ONCE(*upcalls) < enough;)
		WRITE_ONCE(vcpu_info(x, 0)->evtchn_upcall_pending, ++i & 1);

	WRITE_ONCE(vcpu_info(x, 0)->evtchn_upcall_pending, 1);
	for (enough += nr_races * 10; READ_ONCE(*upcalls) < enough;)
		ASSERT_EQ(set_vm_upcall_vector(x, ++i & 1 ? UPCALL_VECTOR : 0), 0);

	WRITE_ONCE(vcpu_info(x, 0)->evtchn_upcall_pending, 0);
	stop_guest(x);
	join_thread(thread, "KVM_RUN of a vCPU that stops");
	TEST_ASSERT(!READ_ONCE(*strays), "%lu strays beside %lu upcalls, expected none",
		    *strays, *upcalls);
	xen_vm_free(x);
}

#define APIC_ISR		0x100
#define INTR_INFO_VALID_MASK	0x80000000u

static uint64_t guest_vmcalls;

static void l2_guest_vmcall(void)
{
	asm volatile("sti");	/* Bochs ignores interrupts of the host otherwise. */
	for (;;)
		asm volatile("vmcall" : : : "rax", "rbx", "rcx", "rdx");
}

static bool guest_apic_bit(unsigned int reg, uint8_t vector)
{
	return x2apic_read_reg(reg + vector / 32 * 0x10) & BIT(vector % 32);
}

static void guest_acks_on_vmexit(struct vmx_pages *vmx)
{
	struct xen_vcpu_info *info = (void *)PAGE_GPA(VCPU_INFO_PAGE) + NESTED_INFO_OFFSET;
	struct vmx_msr_entry *msr = (void *)info - offsetof(struct vmx_msr_entry, value);
	uint64_t stack[64], controls;

	x2apic_enable();
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_guest_vmcall, &stack[ARRAY_SIZE(stack)]);
	vmwrite(PIN_BASED_VM_EXEC_CONTROL,
		vmreadz(PIN_BASED_VM_EXEC_CONTROL) | PIN_BASED_EXT_INTR_MASK);
	controls = vmreadz(VM_EXIT_CONTROLS);

	/* The vector of an upcall that the VM-exit itself withdraws. */
	msr->index = MSR_IA32_SYSENTER_CS;	/* 0 */
	vmwrite(VM_EXIT_MSR_STORE_ADDR, (unsigned long)msr);
	vmwrite(VM_EXIT_MSR_STORE_COUNT, 1);
	vmwrite(VM_EXIT_CONTROLS, controls | VM_EXIT_ACK_INTR_ON_EXIT);
	info->evtchn_upcall_pending = 1;
	GUEST_ASSERT(!vmlaunch());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_EXTERNAL_INTERRUPT);
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_INTR_INFO), INTR_INFO_VALID_MASK | UPCALL_VECTOR);
	GUEST_ASSERT(!info->evtchn_upcall_pending);
	vmwrite(VM_EXIT_MSR_STORE_COUNT, 0);

	/* The vector of the local APIC, which is in service then. */
	x2apic_write_reg(APIC_ICR, APIC_DEST_SELF | APIC_INT_ASSERT | IPI_VECTOR);
	GUEST_ASSERT(!vmresume());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_EXTERNAL_INTERRUPT);
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_INTR_INFO), INTR_INFO_VALID_MASK | IPI_VECTOR);
	GUEST_ASSERT(!guest_apic_bit(APIC_IRR, IPI_VECTOR));
	GUEST_ASSERT(guest_apic_bit(APIC_ISR, IPI_VECTOR));
	x2apic_write_reg(APIC_EOI, 0);

	/* No vector if L1 does not want it: the local APIC keeps the interrupt. */
	vmwrite(VM_EXIT_CONTROLS, controls);
	x2apic_write_reg(APIC_ICR, APIC_DEST_SELF | APIC_INT_ASSERT | IPI_VECTOR);
	GUEST_ASSERT(!vmresume());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_EXTERNAL_INTERRUPT);
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_INTR_INFO), 0);
	GUEST_ASSERT(guest_apic_bit(APIC_IRR, IPI_VECTOR));
	GUEST_ASSERT(!guest_apic_bit(APIC_ISR, IPI_VECTOR));

	vmwrite(VM_EXIT_CONTROLS, controls | VM_EXIT_ACK_INTR_ON_EXIT);
	GUEST_ASSERT(!vmresume());
	GUEST_ASSERT_EQ(vmreadz(VM_EXIT_INTR_INFO), INTR_INFO_VALID_MASK | IPI_VECTOR);
	x2apic_write_reg(APIC_EOI, 0);
	GUEST_SYNC(0);

	/* Upcalls that the host withdraws at any moment, between other VM-exits. */
	while (!READ_ONCE(guest_stop)) {
		GUEST_ASSERT(!vmresume());
		if (vmreadz(VM_EXIT_REASON) == EXIT_REASON_VMCALL) {
			vmwrite(GUEST_RIP, vmreadz(GUEST_RIP) + 3);
			WRITE_ONCE(guest_vmcalls, guest_vmcalls + 1);
			continue;
		}
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_EXTERNAL_INTERRUPT);
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_INTR_INFO),
				INTR_INFO_VALID_MASK | UPCALL_VECTOR);
		WRITE_ONCE(guest_upcalls, guest_upcalls + 1);
	}
	GUEST_SYNC(0);
}

/* An interrupt makes L2 exit to L1, which lets the VM-exit acknowledge it, or not. */
TEST(nested_ack)
{
	struct xen_vcpu_info *info;
	uint64_t *upcalls, *vmcalls;
	unsigned int i = 0, j;
	pthread_t thread;
	struct xen_vm *x;
	vm_vaddr_t vmx;

	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_VMX));
	x = xen_vm_create(guest_acks_on_vmexit, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
						KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	ASSERT_EQ(set_vm_upcall_vector(x, UPCALL_VECTOR), 0);
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
		.u.gpa = PAGE_GPA(VCPU_INFO_PAGE) + NESTED_INFO_OFFSET,
	}), 0);
	vcpu_alloc_vmx(x->vm, &vmx);
	vcpu_args_set(x->vcpus[0], 1, vmx);
	ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), 0);

	info = (void *)shared_page(x, VCPU_INFO_PAGE) + NESTED_INFO_OFFSET;
	upcalls = addr_gva2hva(x->vm, (vm_vaddr_t)&guest_upcalls);
	vmcalls = addr_gva2hva(x->vm, (vm_vaddr_t)&guest_vmcalls);
	thread = start_thread(thread_run_to_sync, x->vcpus[0]);
	while (READ_ONCE(*upcalls) < nr_races * 100 || READ_ONCE(*vmcalls) < nr_races * 100) {
		WRITE_ONCE(info->evtchn_upcall_pending, ++i & 1);
		/* In an emulator, equal intervals can be in step with KVM. */
		for (j = i % 997; j; j--)
			cpu_relax();
	}
	stop_guest(x);
	ASSERT_EQ(join_thread(thread, "KVM_RUN of a vCPU that stops"), 0);
	xen_vm_free(x);
}

/*
 * When EFER.SVME is cleared, KVM checks for interrupts, and reads vcpu_info.  The
 * page of vcpu_info is absent, so KVM has to look up the memslot.  On a debug
 * kernel, this finds a use of memslots outside of kvm->srcu.
 */
TEST(set_sregs_svme)
{
	struct xen_vm *x;
	struct kvm_sregs sregs;

	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_SVM));
	x = xen_vm_create_with_vcpu_info(guest_nothing);
	ASSERT_EQ(set_vm_upcall_vector(x, UPCALL_VECTOR), 0);

	vcpu_sregs_get(x->vcpus[0], &sregs);
	sregs.efer |= EFER_SVME;
	vcpu_sregs_set(x->vcpus[0], &sregs);
	make_absent(x, VCPU_INFO_PAGE);
	sregs.efer &= ~EFER_SVME;
	vcpu_sregs_set(x->vcpus[0], &sregs);
	xen_vm_free(x);
}

static void guest_halt(void)
{
	for (;;)
		asm volatile("hlt");
}

static void nothing(int sig) { }

static void *thread_run_until_signal(void *vcpu)
{
	return (void *)(long)(__vcpu_run(vcpu) ? errno : 0);
}

/* Starts a vCPU that halts until a signal arrives. */
static pthread_t start_halted(struct kvm_vcpu *vcpu)
{
	struct sigaction sa = { .sa_handler = nothing };
	pthread_t thread;

	sigaction(SIGUSR1, &sa, NULL);
	/* Open the statistics, which is not possible during KVM_RUN. */
	ASSERT_EQ(vcpu_get_stat(vcpu, "blocking"), 0);
	thread = start_thread(thread_run_until_signal, vcpu);
	vcpu_wait_stat(vcpu, "blocking", 1);
	return thread;
}

static void stop_halted(pthread_t thread)
{
	pthread_kill(thread, SIGUSR1);
	ASSERT_EQ(join_thread(thread, "KVM_RUN"), EINTR);
}

static void unset_vcpu_info(struct xen_vm *x, int i)
{
	ASSERT_EQ(set_vcpu_attr(x->vcpus[i], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, .u.gpa = KVM_XEN_INVALID_GPA,
	}), 0);
}

/*
 * An upcall that was recorded for a vCPU without vcpu_info is forgotten when the guest
 * is reset, but not if its event is still pending.
 */
TEST(leftovers)
{
	struct xen_vm *x = xen_vm_create(guest_halt, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
						     KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	int i;

	for (i = 0; i < 4; i++) {
		clear_pages(x);
		ASSERT_EQ(send_by_ioctl(x, 100, 0), 0);
		/* The new kernel of the guest has cleared all ports. */
		if (i < 2)
			clear_pages(x);
		if (i % 2)
			unset_vcpu_info(x, 0);
		else
			ASSERT_EQ(set_send_port(x, 7, KVM_XEN_EVTCHN_RESET, 8, 0), 0);

		set_vcpu_info(x, 0);
		run_immediate(x->vcpus[0]);
		if (i < 2)
			ASSERT_EQ(pending_sel(x, 0), 0);
		else
			assert_delivered(x, 100, 0, "ioctl");
		unset_vcpu_info(x, 0);
	}
	xen_vm_free(x);
}

/* The Xen ID of a vCPU is its index unless userspace sets it. */
TEST(vcpu_id)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_halt);
	int i;

	for (i = 0; i < 2; i++)
		ASSERT_EQ(get_vcpu_attr(x->vcpus[i],
					KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).u.vcpu_id, i);
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, .u.vcpu_id = 5,
	}), 0);
	ASSERT_EQ(get_vcpu_attr(x->vcpus[0],
				KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).u.vcpu_id, 5);
	xen_vm_free(x);
}

/* Events for a vCPU without vcpu_info are raised when it runs with a vcpu_info. */
TEST(no_vcpu_info)
{
	struct xen_vm *x = xen_vm_create(guest_halt, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
						     KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	int mode;

	for (mode = 0; mode < 2; mode++) {
		set_long_mode(x, mode);
		clear_pages(x);
		ASSERT_EQ(send_by_ioctl(x, 100, 0), 0);
		TEST_ASSERT(port_pending(x, 100), "port 100 not pending");
		ASSERT_EQ(pending_sel(x, 0), 0);

		set_vcpu_info(x, 0);
		ASSERT_EQ(pending_sel(x, 0), 0);
		run_immediate(x->vcpus[0]);
		assert_delivered(x, 100, 0, "ioctl");

		/* Reading the address raises events if the vcpu_info is absent. */
		clear_pages(x);
		make_absent(x, VCPU_INFO_PAGE);
		ASSERT_EQ(send_by_ioctl(x, 200, 0), 0);
		ASSERT_EQ(get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO).u.gpa,
			  PAGE_GPA(VCPU_INFO_PAGE) + VCPU_INFO_OFFSET);
		assert_delivered(x, 200, 0, "ioctl");

		unset_vcpu_info(x, 0);
	}

	/* An event that cannot be raised does not keep the vCPU awake. */
	clear_pages(x);
	ASSERT_EQ(send_by_ioctl(x, 100, 0), 0);
	stop_halted(start_halted(x->vcpus[0]));

	xen_vm_free(x);
}

/* An event of a word that only long mode has is recorded.  The guest then changes its mode. */
TEST(halt_after_mode_change)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_halt);

	make_absent(x, VCPU_INFO_PAGE);
	ASSERT_EQ(send_by_ioctl(x, 2048, 0), 0);
	set_long_mode(x, false);

	stop_halted(start_halted(x->vcpus[0]));
	xen_vm_free(x);
}

static void assert_raised(struct xen_vm *x, int vcpu, uint64_t sel)
{
	TEST_ASSERT(pending_sel(x, vcpu) == sel,
		    "vCPU %d, long mode %d: evtchn_pending_sel is %#lx, expected %#lx",
		    vcpu, x->long_mode, pending_sel(x, vcpu), sel);
	TEST_ASSERT(vcpu_info(x, vcpu)->evtchn_upcall_pending == !!sel,
		    "vCPU %d, long mode %d: evtchn_upcall_pending is %u, expected %d",
		    vcpu, x->long_mode, vcpu_info(x, vcpu)->evtchn_upcall_pending, !!sel);
}

static void test_migration_to_mode(bool long_mode)
{
	const uint32_t nr_ports = long_mode ? LONG_MODE_PORTS : COMPAT_PORTS;
	const uint32_t per_word = long_mode ? 64 : 32;
	const uint32_t flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
			       KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
	struct xen_vm *from, *to;
	uint64_t sel;
	int i;

	from = xen_vm_create(guest_nothing, flags);
	set_long_mode(from, long_mode);
	clear_pages(from);
	ASSERT_EQ(send_by_ioctl(from, 100, 0), 0);

	to = xen_vm_create(guest_nothing, flags);
	set_long_mode(to, long_mode);
	memcpy(to->shared, from->shared, NR_SHARED_PAGES * PAGE_SIZE);
	xen_vm_free(from);
	set_vcpu_info(to, 0);
	run_immediate(to->vcpus[0]);
	assert_delivered(to, 100, 0, "migration");
	unset_vcpu_info(to, 0);

	/*
	 * Word 0 has a pending port, word 3 a masked one, word 4 one that is both,
	 * word 5 one that is both and a pending one, and the last word a pending one.
	 */
	clear_pages(to);
	set_pending(to, 1);
	mask_port(to, 3 * per_word);
	set_pending(to, 4 * per_word);
	mask_port(to, 4 * per_word);
	set_pending(to, 5 * per_word);
	mask_port(to, 5 * per_word);
	set_pending(to, 6 * per_word - 1);
	set_pending(to, nr_ports - 1);
	sel = sel_bit(to, 1) | sel_bit(to, 5 * per_word) | sel_bit(to, nr_ports - 1);
	for (i = 0; i < 2; i++) {
		assert_raised(to, i, 0);
		set_vcpu_info(to, i);
		run_immediate(to->vcpus[i]);
		assert_raised(to, i, sel);
	}

	/* A masked port raises nothing. */
	unset_vcpu_info(to, 0);
	memset(vcpu_info(to, 0), 0, sizeof(struct xen_vcpu_info));
	memset(port_masks(to), 0xff, nr_ports / 8);
	set_vcpu_info(to, 0);
	run_immediate(to->vcpus[0]);
	assert_raised(to, 0, 0);

	xen_vm_free(to);
}

/*
 * A VM is migrated while a vCPU with an event has no vcpu_info.  The pending bit in
 * guest memory is all that the destination receives of the event.
 */
TEST(migration_no_vcpu_info)
{
	test_migration_to_mode(true);
	test_migration_to_mode(false);
}

static long remove_shared_info(struct xen_vm *x)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = KVM_XEN_INVALID_GFN,
	});
}

/*
 * A vCPU that has raised the upcall of a pending port does not raise it again when the
 * shared_info page is set again.  It does when its vcpu_info is set again.
 */
TEST(shared_info_again)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_halt);
	int i;

	run_immediate(x->vcpus[0]);
	ASSERT_EQ(send_by_ioctl(x, 100, 0), 0);
	assert_delivered(x, 100, 0, "ioctl");

	for (i = 0; i < 2; i++) {
		/* The guest begins to handle the upcall. */
		memset(vcpu_info(x, 0), 0, sizeof(struct xen_vcpu_info));
		if (i) {
			ASSERT_EQ(remove_shared_info(x), 0);
			run_immediate(x->vcpus[0]);
		}
		set_shared_info(x);
		run_immediate(x->vcpus[0]);
		ASSERT_EQ(vcpu_info(x, 0)->evtchn_upcall_pending, 0);
		ASSERT_EQ(pending_sel(x, 0), 0);
	}

	set_vcpu_info(x, 0);
	run_immediate(x->vcpus[0]);
	assert_delivered(x, 100, 0, "vcpu_info set again");
	xen_vm_free(x);
}

/* An event ends the poll even if another port has raised the upcall before. */
TEST(poll_unmasked)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_poll_one);
	pthread_t vcpu;

	guest_poll_port = 8;
	sync_global_to_guest(x->vm, guest_poll_port);
	ASSERT_EQ(send_by_ioctl(x, 9, 0), 0);
	ASSERT_EQ(vcpu_get_stat(x->vcpus[0], "blocking"), 0);
	vcpu = start_thread(thread_run_to_sync, x->vcpus[0]);
	vcpu_wait_stat(x->vcpus[0], "blocking", 1);

	ASSERT_EQ(send_by_ioctl(x, 8, 0), 0);
	ASSERT_EQ(join_thread(vcpu, "SCHEDOP_poll"), 0);
	xen_vm_free(x);
}

static uint64_t guest_clock(struct xen_vm *x)
{
	return xen_guest_clock(x->vm);
}

/* Makes the guest set the deadline of its timer. */
static void set_timer_by_guest(struct xen_vm *x, uint64_t expires_ns)
{
	ASSERT_EQ(make_hypercall(x, false, __HYPERVISOR_set_timer_op, expires_ns, 0, 0), 0);
}

static void run_guest(struct xen_vm *x)
{
	ASSERT_EQ(make_hypercall(x, false, __HYPERVISOR_sched_op, SCHEDOP_yield, 0, 0), 0);
}

/* When this returns, all timer events up to time_ns have been delivered. */
static void run_guest_after(struct xen_vm *x, uint64_t time_ns)
{
	wait_for(guest_clock(x) > time_ns);
	run_guest(x);
	run_guest(x);
}

/* A new deadline replaces the old one, even if the new one is in the past. */
TEST(timer_rearm)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_make_hypercalls);
	uint64_t old;

	vcpu_run_to_sync(x->vcpus[0]);
	set_timer(x, 0);

	old = guest_clock(x) + 300000000;
	set_timer_by_guest(x, old);
	set_timer_by_guest(x, 1);
	run_guest(x);
	assert_delivered(x, TIMER_PORT, 0, "timer in the past");

	clear_pages(x);
	run_guest_after(x, old + 50000000);
	TEST_ASSERT(!port_pending(x, TIMER_PORT), "event of a deadline that was replaced");

	/* Stopped */
	old = guest_clock(x) + 300000000;
	set_timer_by_guest(x, old);
	set_timer_by_guest(x, 0);
	clear_pages(x);
	run_guest_after(x, old + 50000000);
	TEST_ASSERT(!port_pending(x, TIMER_PORT), "event of a timer that was stopped");

	xen_vm_free(x);
}

static void stop_timer(struct xen_vm *x)
{
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
	}), 0);
}

/* KVM_RUN starts a timer that userspace has set. */
static void start_timer(struct xen_vm *x, uint64_t expires_ns)
{
	set_timer(x, expires_ns);
	run_immediate(x->vcpus[0]);
}

/* The event of the timer is delivered although the vCPU does not run. */
TEST(timer_delivery)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_make_hypercalls);
	struct kvm_xen_vcpu_attr attr;
	uint64_t expires;
	int i;

	vcpu_run_to_sync(x->vcpus[0]);

	/* A deadline that has passed while userspace restores a VM */
	clear_pages(x);
	set_timer(x, 1);
	assert_untouched(x, TIMER_PORT, "timer before KVM_RUN");
	ASSERT_EQ(get_vcpu_attr(x->vcpus[0],
				KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, 1);
	run_immediate(x->vcpus[0]);
	assert_delivered(x, TIMER_PORT, 0, "timer in the past");

	clear_pages(x);
	start_timer(x, guest_clock(x) + 1000000);
	wait_for(vcpu_info(x, 0)->evtchn_upcall_pending);
	assert_delivered(x, TIMER_PORT, 0, "timer");

	/*
	 * The deadline is reported until its event is delivered.  KVM_RUN starts the
	 * timer again.
	 */
	for (i = 0; i < nr_races; i++) {
		clear_pages(x);
		expires = guest_clock(x) + i * 1000;
		set_timer(x, expires);
		do {
			run_immediate(x->vcpus[0]);
			attr = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_TIMER);
			TEST_ASSERT(attr.u.timer.expires_ns == expires ||
				    (!attr.u.timer.expires_ns && port_pending(x, TIMER_PORT)),
				    "deadline %lu reported as %lu, event pending: %d",
				    expires, (uint64_t)attr.u.timer.expires_ns,
				    port_pending(x, TIMER_PORT));
		} while (attr.u.timer.expires_ns);
	}

	/* A timer that was read does not change what userspace saves afterwards. */
	do {
		expires = guest_clock(x) + 1000000;
		start_timer(x, expires);
		attr = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_TIMER);
	} while (!attr.u.timer.expires_ns);
	clear_pages(x);
	wait_for(guest_clock(x) > expires + 1000000);
	assert_untouched(x, TIMER_PORT, "timer that was read");
	run_immediate(x->vcpus[0]);
	assert_delivered(x, TIMER_PORT, 0, "timer that was read");

	/* If the page is absent, the event is delivered when the vCPU runs. */
	clear_pages(x);
	make_absent(x, SHINFO_PAGE);
	expires = guest_clock(x) + 1000000;
	set_timer(x, expires);
	run_guest_after(x, expires + 50000000);
	assert_delivered(x, TIMER_PORT, 0, "timer");

	xen_vm_free(x);
}

static void test_send_memslot(bool timer)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_make_hypercalls);
	uint8_t *shinfo = shared_page(x, SHINFO_PAGE);
	pthread_t vcpu;
	int uffd;

	vcpu_run_to_sync(x->vcpus[0]);
	ASSERT_EQ(set_send_port(x, 7, 0, TIMER_PORT, 0), 0);
	guest_send_port = 7;
	sync_global_to_guest(x->vm, guest_send_port);
	if (timer) {
		set_timer(x, 1);
		set_guest_hypercall(x, false, __HYPERVISOR_sched_op, SCHEDOP_yield, 0, 0);
	} else {
		set_guest_hypercall(x, false, __HYPERVISOR_event_channel_op, EVTCHNOP_send,
				    (uint64_t)&guest_send_port, 0);
	}

	make_absent(x, SHINFO_PAGE);
	uffd = uffd_register(shinfo, PAGE_SIZE, 0);
	vcpu = start_thread(thread_run_to_sync, x->vcpus[0]);
	uffd_wait_for_fault(uffd);
	join_thread(start_thread(thread_add_memslot, x->vm),
		    "KVM_SET_USER_MEMORY_REGION");

	uffd_provide(uffd, shinfo, NULL, PAGE_SIZE);
	close(uffd);
	ASSERT_EQ(join_thread(vcpu, "KVM_RUN"), 0);
	assert_delivered(x, TIMER_PORT, 0, timer ? "timer" : "hypercall");
	xen_vm_free(x);
}

/*
 * Memslots can be changed while a vCPU that sends an event, by hypercall or because its
 * timer has expired, waits for the shared_info page.
 */
TEST(send_memslot)
{
	test_send_memslot(false);
	test_send_memslot(true);
}

struct pvclock {
	uint32_t version, pad;
	uint64_t tsc_timestamp;
	uint64_t system_time;
	uint32_t tsc_to_system_mul;
	int8_t tsc_shift;
	uint8_t flags;
};

static uint64_t pvclock_read(volatile struct pvclock *clock)
{
	uint32_t version;
	uint64_t delta, ns;

	do {
		version = clock->version;
		asm volatile("" ::: "memory");
		delta = rdtsc() - clock->tsc_timestamp;
		delta = clock->tsc_shift < 0 ? delta >> -clock->tsc_shift :
					       delta << clock->tsc_shift;
		ns = clock->system_time +
		     (uint64_t)(((unsigned __int128)delta * clock->tsc_to_system_mul) >> 32);
		asm volatile("" ::: "memory");
	} while ((version & 1) || version != clock->version);

	return ns;
}

/* Reports by how many ns of the guest's clock the earliest timer was too early. */
static void guest_time_timer(void)
{
	struct xen_vcpu_info *vi = (void *)PAGE_GPA(VCPU_INFO_PAGE) + VCPU_INFO_OFFSET;
	uint64_t *pending = (void *)PAGE_GPA(SHINFO_PAGE) + XEN_SHINFO_PENDING;
	struct pvclock *clock = (void *)vi->time;
	uint64_t deadline, now, early = 0;
	int i;

	for (i = 0; i < 100; i++) {
		deadline = pvclock_read(clock) + 100000;
		xen_hypercall(__HYPERVISOR_set_timer_op, deadline, 0);
		while (!READ_ONCE(*pending))
			let_host_interrupt();
		now = pvclock_read(clock);
		if (now < deadline && deadline - now > early)
			early = deadline - now;
		WRITE_ONCE(*pending, 0);
		vi->evtchn_pending_sel = 0;
	}
	GUEST_SYNC(early);
}

TEST(timer_pvclock)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_time_timer);
	uint64_t early;

	set_timer(x, 0);
	early = vcpu_run_to_sync(x->vcpus[0]);
	TEST_ASSERT(!early, "timer %lu ns early by the guest's clock", early);
	xen_vm_free(x);
}

struct wall_clock {
	uint32_t version, sec, nsec;
};

static void assert_wall_clock(struct xen_vm *x, const char *how)
{
	struct wall_clock *wc = (void *)shared_page(x, SHINFO_PAGE) +
		(x->long_mode ? XEN_SHINFO_WALL_CLOCK : XEN_SHINFO_COMPAT_WALL_CLOCK);
	int64_t boot_time = time(NULL) - guest_clock(x) / 1000000000;

	TEST_ASSERT(wc->version && !(wc->version & 1),
		    "%s, long mode %d: version %u, expected even and not 0",
		    how, x->long_mode, wc->version);
	TEST_ASSERT(llabs(boot_time - wc->sec) <= 10,
		    "%s, long mode %d: wall clock %u s, expected %ld s",
		    how, x->long_mode, wc->sec, boot_time);
}

/* The wall clock is at the position for the current mode. */
TEST(wall_clock)
{
	struct xen_vm *x = xen_vm_create(guest_write_hypercall_pages,
					 KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);

	assert_wall_clock(x, "shared_info set");

	clear_pages(x);
	set_long_mode(x, false);
	assert_wall_clock(x, "mode changed");

	/* The vCPU is in long mode. */
	clear_pages(x);
	write_hypercall_pages(x, 1);
	x->long_mode = true;
	assert_wall_clock(x, "hypercall page written");

	/* The page is absent and can be faulted in. */
	make_absent(x, SHINFO_PAGE);
	set_long_mode(x, false);
	assert_wall_clock(x, "mode changed");

	/* The page cannot be faulted in. */
	vm_mem_region_delete(x->vm, SHARED_SLOT);
	ASSERT_EQ(set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = true,
	}), EFAULT);
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_LONG_MODE).u.long_mode, false);

	xen_vm_free(x);
}

/*
 * start_preempting() creates two threads that preempt its caller once per round,
 * at a random time: a thread on another CPU wakes up a thread of higher priority
 * on the caller's CPU, which keeps the CPU busy for preempt_ns.
 */
static uint64_t preempt_ns;
static int preempt_round, nr_preemptions;

static struct {
	pthread_t preempt, wake_up;
	cpu_set_t cpus, others;
	int fd;
} preempting;

static void set_affinity(cpu_set_t *cpus)
{
	TEST_ASSERT(!sched_setaffinity(0, sizeof(*cpus), cpus),
		    "sched_setaffinity(): %s", strerror(errno));
}

static void *thread_preempt(void *unused)
{
	const struct sched_param param = { .sched_priority = 1 };
	eventfd_t value;
	uint64_t start;

	__TEST_REQUIRE(!sched_setscheduler(0, SCHED_FIFO, &param),
		       "sched_setscheduler(): %s", strerror(errno));

	while (!READ_ONCE(race_stop)) {
		eventfd_read(preempting.fd, &value);
		for (start = now_ns(); now_ns() - start < preempt_ns; )
			;
		WRITE_ONCE(nr_preemptions, nr_preemptions + 1);
	}
	return NULL;
}

static void *thread_wake_up(void *unused)
{
	uint64_t start = now_ns(), length, delay;
	int round = 0;

	set_affinity(&preempting.others);

	while (!READ_ONCE(race_stop)) {
		if (READ_ONCE(preempt_round) == round)
			continue;
		round = READ_ONCE(preempt_round);
		length = now_ns() - start;
		start = now_ns();
		for (delay = rand() % (length + 1); now_ns() - start < delay; )
			;
		eventfd_write(preempting.fd, 1);
	}
	return NULL;
}

static void start_preempting(uint64_t ns)
{
	int this_cpu = sched_getcpu();
	cpu_set_t cpu;

	TEST_ASSERT(!sched_getaffinity(0, sizeof(preempting.cpus), &preempting.cpus),
		    "sched_getaffinity(): %s", strerror(errno));
	__TEST_REQUIRE(CPU_COUNT(&preempting.cpus) > 1, "one CPU, two are needed");
	CPU_ZERO(&cpu);
	CPU_SET(this_cpu, &cpu);
	preempting.others = preempting.cpus;
	CPU_CLR(this_cpu, &preempting.others);

	preempting.fd = eventfd(0, 0);
	TEST_ASSERT(preempting.fd >= 0, "eventfd(): %s", strerror(errno));
	preempt_ns = ns;
	preempt_round = 0;
	nr_preemptions = 0;
	race_stop = false;

	/* thread_preempt() inherits the affinity. */
	set_affinity(&cpu);
	preempting.preempt = start_thread(thread_preempt, NULL);
	preempting.wake_up = start_thread(thread_wake_up, NULL);
}

/* Starts a round.  Returns false if there were enough preemptions. */
static bool preempt_again(int enough)
{
	WRITE_ONCE(preempt_round, preempt_round + 1);
	return READ_ONCE(nr_preemptions) < enough;
}

static void stop_preempting(void)
{
	WRITE_ONCE(race_stop, true);
	join_thread(preempting.wake_up, "thread that wakes up");
	eventfd_write(preempting.fd, 1);
	join_thread(preempting.preempt, "thread that preempts");
	set_affinity(&preempting.cpus);
	close(preempting.fd);
}

static void guest_sync_forever(void)
{
	for (;;)
		GUEST_SYNC(0);
}

#define XEN_RUNSTATE_RUNNING	0

/* In the layout that a 64-bit guest sees */
struct xen_runstate {
	int32_t state;
	uint64_t entry_time;
	uint64_t time[4];
};

/* In the layout that a 32-bit guest sees */
struct xen_compat_runstate {
	int32_t state;
	uint64_t entry_time;
	uint64_t time[4];
} __packed;

#define XEN_RUNSTATE_UPDATE	BIT_ULL(63)

static void assert_times_add_up(const char *where, int round, uint64_t entry_time,
				uint64_t running, uint64_t runnable,
				uint64_t blocked, uint64_t offline)
{
	uint64_t sum = running + runnable + blocked + offline;

	TEST_ASSERT(entry_time == sum,
		    "%s, round %d: runstate entered at %lu, times add up to %lu: %lu + %lu + %lu + %lu",
		    where, round, entry_time, sum, running, runnable, blocked, offline);
}

static void set_runstate_running(struct kvm_vcpu *vcpu)
{
	struct kvm_xen_vcpu_attr attr = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
		.u.runstate.state = XEN_RUNSTATE_RUNNING,
	};

	ASSERT_EQ(set_vcpu_attr(vcpu, attr), 0);
}

/*
 * The runstate is consistent although the vCPU is preempted while it updates,
 * saves or restores its runstate.
 */
TEST(runstate_preempted)
{
	struct kvm_xen_vcpu_attr attr = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
		.u.gpa = PAGE_GPA(TIME_INFO_PAGE),
	};
	uint64_t runnable = 0;
	struct xen_runstate *rs;
	struct xen_vm *x;
	int i;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	rs = (void *)shared_page(x, TIME_INFO_PAGE);
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], attr), 0);
	start_preempting(0);

	for (i = 0; preempt_again(nr_races * 30); i++) {
		set_runstate_running(x->vcpus[0]);
		attr = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA);
		assert_times_add_up("saved", i, attr.u.runstate.state_entry_time,
				    attr.u.runstate.time_running,
				    attr.u.runstate.time_runnable,
				    attr.u.runstate.time_blocked,
				    attr.u.runstate.time_offline);
		TEST_ASSERT(attr.u.runstate.time_runnable >= runnable,
			    "round %d: runnable for %lu ns, was %lu",
			    i, (uint64_t)attr.u.runstate.time_runnable, runnable);
		runnable = attr.u.runstate.time_runnable;
		ASSERT_EQ(set_vcpu_attr(x->vcpus[0], attr), 0);

		/* Running the vCPU takes much longer: do it in every 16th round. */
		if (i % 16)
			continue;
		vcpu_run_to_sync(x->vcpus[0]);
		assert_times_add_up("page", i, rs->entry_time, rs->time[0], rs->time[1],
				    rs->time[2], rs->time[3]);
	}

	stop_preempting();
	xen_vm_free(x);
}

#define XEN_RUNSTATE_OFFLINE	3

/* An ioctl that is preempted does not change the runstate of a vCPU that does not run. */
TEST(runstate_ioctl_preempted)
{
	struct kvm_xen_vcpu_attr attr = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
		.u.runstate.state = XEN_RUNSTATE_OFFLINE,
	};
	struct kvm_xen_vcpu_attr now;
	struct xen_vm *x;
	int i;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	start_preempting(0);

	for (i = 0; preempt_again(nr_races * 30); i++) {
		ASSERT_EQ(set_vcpu_attr(x->vcpus[0], attr), 0);
		now = get_vcpu_attr(x->vcpus[0], attr.type);
		TEST_ASSERT(now.u.runstate.state == XEN_RUNSTATE_OFFLINE,
			    "round %d: state %lu, expected %d", i,
			    (uint64_t)now.u.runstate.state, XEN_RUNSTATE_OFFLINE);
	}

	stop_preempting();
	xen_vm_free(x);
}

/* Each time has grown since @old by at most the time that has passed. */
static void assert_runstate_since(struct kvm_xen_vcpu_attr *old, struct kvm_vcpu *vcpu,
				  const char *when)
{
	struct kvm_xen_vcpu_attr new;
	int64_t passed, running, runnable;

	new = get_vcpu_attr(vcpu, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA);
	assert_times_add_up(when, 0, new.u.runstate.state_entry_time,
			    new.u.runstate.time_running, new.u.runstate.time_runnable,
			    new.u.runstate.time_blocked, new.u.runstate.time_offline);

	passed = new.u.runstate.state_entry_time - old->u.runstate.state_entry_time;
	running = new.u.runstate.time_running - old->u.runstate.time_running;
	runnable = new.u.runstate.time_runnable - old->u.runstate.time_runnable;
	TEST_ASSERT(running >= 0 && runnable >= 0 && running + runnable <= passed,
		    "%s: after %ld ns, running for %ld ns more, runnable for %ld ns more",
		    when, passed, running, runnable);
	*old = new;
}

/* Userspace sets the clock back. */
TEST(runstate_clock_back)
{
	const uint64_t second = 1000000000;
	struct kvm_xen_vcpu_attr data;
	struct xen_vm *x;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	set_clock(x->vm, 1000 * second);
	set_runstate_running(x->vcpus[0]);
	data = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA);

	set_clock(x->vm, second);
	set_runstate_running(x->vcpus[0]);
	assert_runstate_since(&data, x->vcpus[0], "clock set back");
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], data), 0);
	assert_runstate_since(&data, x->vcpus[0], "saved and restored");

	/* The time goes on where it has stopped. */
	set_clock(x->vm, 2000 * second);
	set_runstate_running(x->vcpus[0]);
	TEST_ASSERT(data.u.runstate.state_entry_time < 2000 * second,
		    "time expected to stand still, runstate entered at %lu",
		    (uint64_t)data.u.runstate.state_entry_time);
	assert_runstate_since(&data, x->vcpus[0], "clock set forward");
	TEST_ASSERT(data.u.runstate.state_entry_time >= 2000 * second,
		    "runstate entered at %lu, expected at least %lu",
		    (uint64_t)data.u.runstate.state_entry_time, 2000 * second);
	xen_vm_free(x);
}

static void *thread_spin(void *unused)
{
	while (!READ_ONCE(race_stop))
		;
	return NULL;
}

static void *thread_set_running(void *vcpu)
{
	set_runstate_running(vcpu);
	return NULL;
}

/* Threads that have waited for a CPU for different times take over the vCPU. */
TEST(runstate_other_thread)
{
	struct kvm_xen_vcpu_attr data;
	cpu_set_t cpus, cpu;
	pthread_t spinner;
	struct xen_vm *x;
	int i;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);

	TEST_ASSERT(!sched_getaffinity(0, sizeof(cpus), &cpus), "sched_getaffinity(): %s",
		    strerror(errno));
	CPU_ZERO(&cpu);
	CPU_SET(sched_getcpu(), &cpu);
	set_affinity(&cpu);
	race_stop = false;
	spinner = start_thread(thread_spin, NULL);
	wait_for(get_run_delay() > 100 * 1000000);
	WRITE_ONCE(race_stop, true);
	join_thread(spinner, "thread that spins");
	set_affinity(&cpus);

	set_runstate_running(x->vcpus[0]);
	data = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA);
	for (i = 0; i < 3; i++) {
		join_thread(start_thread(thread_set_running, x->vcpus[0]),
			    "thread that has not waited");
		assert_runstate_since(&data, x->vcpus[0], "thread that has not waited");
		set_runstate_running(x->vcpus[0]);
		assert_runstate_since(&data, x->vcpus[0], "thread that has waited");
	}
	xen_vm_free(x);
}

static int set_runstate_addr(struct xen_vm *x, uint64_t gpa)
{
	return set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, .u.gpa = gpa,
	});
}

/* The memory at @p contains the runstate of the vCPU, and nothing else was written. */
static void assert_runstate_at(struct xen_vm *x, uint8_t *p, const char *when)
{
	size_t len = x->long_mode ? sizeof(struct xen_runstate) :
				    sizeof(struct xen_compat_runstate);
	unsigned int offset = (uintptr_t)p % PAGE_SIZE;
	struct kvm_xen_vcpu_attr data;
	struct xen_runstate rs = {};

	data = get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA);
	if (x->long_mode) {
		memcpy(&rs, p, sizeof(rs));
	} else {
		struct xen_compat_runstate compat;

		memcpy(&compat, p, sizeof(compat));
		rs.state = compat.state;
		rs.entry_time = compat.entry_time;
		memcpy(rs.time, compat.time, sizeof(rs.time));
	}
	TEST_ASSERT(rs.state == data.u.runstate.state &&
		    rs.entry_time == data.u.runstate.state_entry_time &&
		    rs.time[0] == data.u.runstate.time_running &&
		    rs.time[1] == data.u.runstate.time_runnable &&
		    rs.time[2] == data.u.runstate.time_blocked &&
		    rs.time[3] == data.u.runstate.time_offline,
		    "%s, offset %#x, long mode %d: state %d since %#lx, expected %lu since %#lx",
		    when, offset, x->long_mode, rs.state, rs.entry_time,
		    (uint64_t)data.u.runstate.state,
		    (uint64_t)data.u.runstate.state_entry_time);
	TEST_ASSERT(p[-1] == 0xaa && p[len] == 0xaa,
		    "%s, offset %#x, long mode %d: %#x before and %#x behind, expected 0xaa",
		    when, offset, x->long_mode, p[-1], p[len]);
}

/* A runstate at each offset at which it crosses the end of a page */
TEST(runstate_two_pages)
{
	const int page = VCPU_INFO_PAGE;	/* the next one is unused, too */
	const uint64_t last = PAGE_GPA(NR_PAGES) - sizeof(struct xen_compat_runstate);
	unsigned long dirty;
	struct xen_vm *x;
	unsigned int i;
	uint8_t *p;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	vm_mem_region_set_flags(x->vm, SHARED_SLOT, KVM_MEM_LOG_DIRTY_PAGES);

	for (i = 0; i < 2 * 56; i++) {
		/* Change the mode before or after the address. */
		set_long_mode(x, i % 4 < 2);
		memset(shared_page(x, page), 0xaa, 2 * PAGE_SIZE);
		p = shared_page(x, page + 1) - 52 + i / 2;
		ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(page + 1) - 52 + i / 2), 0);
		assert_runstate_at(x, p, "address set");

		memset(shared_page(x, page), 0xaa, 2 * PAGE_SIZE);
		set_long_mode(x, i % 2);
		kvm_vm_get_dirty_log(x->vm, SHARED_SLOT, &dirty);
		vcpu_run_to_sync(x->vcpus[0]);
		assert_runstate_at(x, p, "vCPU run");

		kvm_vm_get_dirty_log(x->vm, SHARED_SLOT, &dirty);
		TEST_ASSERT(dirty & BIT((p - x->shared) / PAGE_SIZE) &&
			    dirty & BIT((p + 43 - x->shared) / PAGE_SIZE),
			    "offset %#x, long mode %d: page is not dirty",
			    (unsigned int)((uintptr_t)p % PAGE_SIZE), x->long_mode);
	}

	/* The second page does not exist. */
	set_long_mode(x, true);
	ASSERT_EQ(set_runstate_addr(x, last), EFAULT);
	set_long_mode(x, false);
	ASSERT_EQ(set_runstate_addr(x, last + 1), EFAULT);
	ASSERT_EQ(set_runstate_addr(x, last), 0);
	vcpu_run_to_sync(x->vcpus[0]);

	/* The end is beyond the last address. */
	ASSERT_EQ(set_runstate_addr(x, -40ull), EINVAL);

	xen_vm_free(x);
}

/* The runstate is in memory although the vCPU does not run. */
TEST(runstate_written)
{
	struct kvm_xen_vcpu_attr attr;
	struct xen_vm *x;
	uint8_t *p;
	int i;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	set_clock(x->vm, 1000);
	set_runstate_running(x->vcpus[0]);

	memset(shared_page(x, TIME_INFO_PAGE), 0xaa, PAGE_SIZE);
	ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(TIME_INFO_PAGE) + 8), 0);
	p = shared_page(x, TIME_INFO_PAGE) + 8;
	assert_runstate_at(x, p, "address set");

	/* A change of any memslot makes KVM look up the page again. */
	thread_add_memslot(x->vm);
	set_runstate_running(x->vcpus[0]);
	assert_runstate_at(x, p, "state set");

	attr = (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST,
		.u.runstate.state = -1,
		.u.runstate.time_blocked = 100,
		.u.runstate.time_running = -100,
	};
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], attr), 0);
	assert_runstate_at(x, p, "times adjusted");

	attr = (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA,
		.u.runstate.state_entry_time = 30,
		.u.runstate.time_blocked = 10,
		.u.runstate.time_running = 20,
	};
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], attr), 0);
	assert_runstate_at(x, p, "times set");

	/* The vCPU is not about to enter the guest, but KVM_RUN is called. */
	for (i = 0; i < 2; i++) {
		memset(shared_page(x, TIME_INFO_PAGE), 0xaa, PAGE_SIZE);
		set_long_mode(x, i);
		run_immediate(x->vcpus[0]);
		assert_runstate_at(x, p, "mode changed");
	}
	xen_vm_free(x);
}

static void *thread_set_offline(void *vcpu)
{
	return (void *)(long)set_vcpu_attr(vcpu, (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
		.u.runstate.state = XEN_RUNSTATE_OFFLINE,
	});
}

/*
 * While the ioctl waits for the page of the runstate, memslots can be changed.  It does
 * not wait for a page into which only the runstate of a 64-bit guest would extend.
 */
TEST(runstate_absent)
{
	uint8_t data[PAGE_SIZE], *page;
	pthread_t setter;
	struct xen_vm *x;
	int uffd;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_nothing, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(TIME_INFO_PAGE) + 8), 0);
	make_absent(x, TIME_INFO_PAGE);
	page = shared_page(x, TIME_INFO_PAGE);
	uffd = uffd_register(page, PAGE_SIZE, 0);

	setter = start_thread(thread_set_offline, x->vcpus[0]);
	uffd_wait_for_fault(uffd);
	join_thread(start_thread(thread_add_memslot, x->vm), "KVM_SET_USER_MEMORY_REGION");

	memset(data, 0xaa, sizeof(data));
	uffd_provide(uffd, page, data, sizeof(data));
	close(uffd);
	ASSERT_EQ(join_thread(setter, "RUNSTATE_CURRENT"), 0);
	assert_runstate_at(x, page + 8, "state set");

	set_long_mode(x, false);
	ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(TIME_INFO_PAGE) -
				       sizeof(struct xen_compat_runstate)), 0);
	make_absent(x, TIME_INFO_PAGE);
	/* A change of any memslot makes KVM look up the pages again. */
	vm_mem_region_delete(x->vm, SHARED_SLOT + 1);
	uffd = uffd_register(page, PAGE_SIZE, 0);
	join_thread(start_thread(thread_set_offline, x->vcpus[0]), "RUNSTATE_CURRENT");
	close(uffd);
	xen_vm_free(x);
}

static void *thread_set_long_mode(void *vm)
{
	return (void *)(long)xen_set_vm_attr(vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = true,
	});
}

/*
 * A mode that is refused, because the page of the wall clock is absent and then not
 * mapped, is never in effect: in 64-bit mode, KVM would write a longer runstate.
 */
TEST(mode_refused)
{
	pthread_t setter;
	struct xen_vm *x;
	uint8_t *p;
	int uffd;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	set_long_mode(x, false);
	memset(shared_page(x, TIME_INFO_PAGE), 0xaa, PAGE_SIZE);
	p = shared_page(x, TIME_INFO_PAGE) + 8;
	ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(TIME_INFO_PAGE) + 8), 0);
	make_absent(x, SHINFO_PAGE);
	uffd = uffd_register(shared_page(x, SHINFO_PAGE), PAGE_SIZE, 0);

	setter = start_thread(thread_set_long_mode, x->vm);
	uffd_wait_for_fault(uffd);
	ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), 0);
	TEST_ASSERT(p[sizeof(struct xen_compat_runstate)] == 0xaa,
		    "%#x behind the runstate, expected 0xaa",
		    p[sizeof(struct xen_compat_runstate)]);

	TEST_ASSERT(!munmap(shared_page(x, SHINFO_PAGE), PAGE_SIZE),
		    "munmap(): %s", strerror(errno));
	close(uffd);
	ASSERT_EQ(join_thread(setter, "LONG_MODE"), EFAULT);
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_LONG_MODE).u.long_mode, false);
	ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), 0);
	assert_runstate_at(x, p, "mode refused");
	xen_vm_free(x);
}

static long move_shared_info(struct xen_vm *x)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = PAGE_GPA(TIME_INFO_PAGE) / PAGE_SIZE,
	});
}

static long add_memslot(struct xen_vm *x)
{
	thread_add_memslot(x->vm);
	return 0;
}

static long deassign_port(struct xen_vm *x)
{
	return set_send_port(x, 7, KVM_XEN_EVTCHN_DEASSIGN, 8, 0);
}

static long reset_ports(struct xen_vm *x)
{
	return set_send_port(x, 7, KVM_XEN_EVTCHN_RESET, 8, 0);
}

/* What KVM_RUN does before it enters the guest, with a page that is absent */
enum {
	RUN_PORTS,	/* look for pending ports */
	RUN_EVENT,	/* raise the upcall of an event */
	RUN_VECTOR,	/* see whether an upcall is pending, for a new vector */
	RUN_RUNSTATE,	/* write the runstate in another layout */
	NR_RUN_ABSENT,
};

static void *thread_run_immediate(void *vcpu)
{
	run_immediate(vcpu);
	return NULL;
}

static void test_run_absent(int work, bool immediate)
{
	static const int pages[] = { SHINFO_PAGE, VCPU_INFO_PAGE, VCPU_INFO_PAGE, TIME_INFO_PAGE };
	static const char *const names[] = { "ports", "event", "vector", "runstate" };
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_halt);
	struct sigaction sa = { .sa_handler = nothing };
	pthread_t vcpu;
	int uffd;

	/* What a new VM has to do */
	run_immediate(x->vcpus[0]);
	if (work == RUN_RUNSTATE)
		ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(TIME_INFO_PAGE) + 8), 0);

	make_absent(x, pages[work]);
	switch (work) {
	case RUN_PORTS:
		set_vcpu_info(x, 0);
		break;
	case RUN_EVENT:
		ASSERT_EQ(send_by_ioctl(x, 5, 0), 0);
		break;
	case RUN_VECTOR:
		set_lapic(x->vcpus[0], true);
		ASSERT_EQ(set_upcall_vector(x->vcpus[0], UPCALL_VECTOR), 0);
		break;
	case RUN_RUNSTATE:
		set_long_mode(x, false);
		break;
	}

	uffd = uffd_register(shared_page(x, pages[work]), PAGE_SIZE, 0);
	if (immediate) {
		join_thread(start_thread(thread_run_immediate, x->vcpus[0]), names[work]);
	} else {
		sigaction(SIGUSR1, &sa, NULL);
		vcpu = start_thread(thread_run_until_signal, x->vcpus[0]);
		uffd_wait_for_fault(uffd);
		pthread_kill(vcpu, SIGUSR1);
		ASSERT_EQ(join_thread(vcpu, names[work]), EINTR);
	}
	close(uffd);

	/* Nothing is forgotten. */
	memset(shared_page(x, pages[work]), work == RUN_RUNSTATE ? 0xaa : 0, PAGE_SIZE);
	if (work == RUN_PORTS)
		set_pending(x, 5);
	if (work == RUN_VECTOR)
		vcpu_info(x, 0)->evtchn_upcall_pending = 1;
	run_immediate(x->vcpus[0]);
	if (work == RUN_PORTS || work == RUN_EVENT)
		assert_delivered(x, 5, 0, names[work]);
	else if (work == RUN_VECTOR)
		TEST_ASSERT(vector_requested(x->vcpus[0]), "%s: expected the vector in the IRR",
			    names[work]);
	else
		assert_runstate_at(x, shared_page(x, TIME_INFO_PAGE) + 8, names[work]);
	xen_vm_free(x);
}

/* KVM_RUN with immediate_exit does not wait for a page. */
TEST(run_absent)
{
	int work;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);

	for (work = 0; work < NR_RUN_ABSENT; work++)
		test_run_absent(work, true);
}

/* A signal ends the wait of KVM_RUN for a page. */
TEST(run_absent_signal)
{
	int work;

	/* Without this capability, only a fatal signal does so. */
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));

	for (work = 0; work < RUN_RUNSTATE; work++)
		test_run_absent(work, false);
}

static struct {
	struct xen_vm *x;
	long (*fn)(struct xen_vm *x);
	pid_t tid;
	bool done;
} caller;

static void *thread_call(void *unused)
{
	WRITE_ONCE(caller.tid, syscall(SYS_gettid));
	caller.fn(caller.x);
	WRITE_ONCE(caller.done, true);
	return NULL;
}

/* Does not return: the process is killed when its thread has waited or is done. */
static void call_behind_worker(long (*fn)(struct xen_vm *x))
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_nothing);
	int fd = irqfd_create(x, 5, 0);
	int uffd;

	make_absent(x, SHINFO_PAGE);
	/* Closed before the VM when the process ends. */
	uffd = uffd_register(shared_page(x, SHINFO_PAGE), PAGE_SIZE, 0);
	eventfd_write(fd, 1);
	uffd_wait_for_fault(uffd);

	caller.x = x;
	caller.fn = fn;
	start_thread(thread_call, NULL);
	wait_for(READ_ONCE(caller.done) ||
		 (READ_ONCE(caller.tid) && task_sleeps_in_ioctl(caller.tid)));
	raise(SIGKILL);
}

/*
 * A worker of an irqfd waits for a page that nobody provides.  An ioctl that waits for
 * the worker does not keep the process from being killed; the end of the process ends
 * the wait of the worker, too, because it releases the userfaultfd before the VM.
 */
TEST(stuck_worker)
{
	static long (* const fns[])(struct xen_vm *x) = {
		remove_shared_info, move_shared_info, add_memslot, deassign_port, reset_ports,
	};
	static uint8_t page[PAGE_SIZE] __aligned(PAGE_SIZE);
	int i, status;
	pid_t pid;

	/* A kernel without this may leave a process behind that cannot be killed. */
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA);
	/* Skips the case if there is no userfaultfd. */
	close(uffd_register(page, PAGE_SIZE, 0));

	for (i = 0; i < ARRAY_SIZE(fns); i++) {
		pid = fork();
		TEST_ASSERT(pid >= 0, "fork(): %s", strerror(errno));
		if (!pid)
			call_behind_worker(fns[i]);

		__wait_for(waitpid(pid, &status, WNOHANG) == pid,
			   "ioctl %d: the process is not dead after %d s", i, WAIT_LIMIT_SECS);
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
			    "ioctl %d: expected a process killed by %d, got status %#x", i,
			    SIGKILL, status);
	}
}

/*
 * Without shared_info, a vCPU has no events to look for, and sleeps.  It looks for them
 * when shared_info is set.
 */
TEST(no_shared_info)
{
	struct xen_vm *x = xen_vm_create(guest_halt, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
						     KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	uint64_t wakeups, retries;
	pthread_t vcpu, retrier;
	int i;

	ASSERT_EQ(remove_shared_info(x), 0);
	clear_pages(x);

	/* The other vCPU wakes up at intervals, to try again to read its vcpu_info. */
	ASSERT_EQ(set_upcall_vector(x->vcpus[1], UPCALL_VECTOR), 0);
	set_vcpu_info(x, 1);
	protect_page(x, VCPU_INFO_PAGE + 1, PROT_NONE);
	retrier = start_halted(x->vcpus[1]);

	for (i = 0; i < 3; i++) {
		set_vcpu_info(x, 0);
		if (i < 2)
			unset_vcpu_info(x, 0);
		if (i == 1)
			ASSERT_EQ(reset_ports(x), 0);

		vcpu = start_halted(x->vcpus[0]);
		wakeups = vcpu_get_stat(x->vcpus[0], "halt_wakeup");
		retries = vcpu_get_stat(x->vcpus[1], "halt_wakeup");
		vcpu_wait_stat(x->vcpus[1], "halt_wakeup", retries + 8);
		wakeups = vcpu_get_stat(x->vcpus[0], "halt_wakeup") - wakeups;
		/* It may wake up once or twice for another reason. */
		TEST_ASSERT(wakeups < 4, "%lu wake-ups during 8 of the other vCPU, expected < 4",
			    wakeups);
		if (i < 2)
			stop_halted(vcpu);
	}

	stop_halted(retrier);
	protect_page(x, VCPU_INFO_PAGE + 1, PROT_READ | PROT_WRITE);
	set_pending(x, 100);
	set_shared_info(x);
	wait_for(vcpu_info(x, 0)->evtchn_upcall_pending);
	assert_delivered(x, 100, 0, "shared_info");
	stop_halted(vcpu);
	xen_vm_free(x);
}

static void guest_exit_often(uint64_t nr)
{
	uint32_t eax, ebx, ecx, edx;

	while (nr--)
		cpuid(0, &eax, &ebx, &ecx, &edx);
	GUEST_SYNC(0);
}

/* A vCPU that cannot map shared_info does not retry after every exit. */
TEST(unmappable_shared_info)
{
	const uint64_t nr_exits = 20000, max_refreshes = nr_exits / 10;
	struct xen_vm *x = xen_vm_create(guest_exit_often, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
							   KVM_XEN_HVM_CONFIG_EVTCHN_SEND);
	uint64_t refreshes;

	clear_pages(x);
	set_pending(x, 100);
	protect_page(x, SHINFO_PAGE, PROT_READ);
	set_vcpu_info(x, 0);
	refreshes = vm_get_stat(x->vm, "pfncache_refresh");
	vcpu_args_set(x->vcpus[0], 1, nr_exits);
	ASSERT_EQ(vcpu_run_to_sync(x->vcpus[0]), 0);
	refreshes = vm_get_stat(x->vm, "pfncache_refresh") - refreshes;
	TEST_ASSERT(refreshes && refreshes < max_refreshes,
		    "%lu refreshes during %lu exits, expected 1 to %lu", refreshes, nr_exits,
		    max_refreshes - 1);
	ASSERT_EQ(pending_sel(x, 0), 0);

	/* The next KVM_RUN tries again. */
	protect_page(x, SHINFO_PAGE, PROT_READ | PROT_WRITE);
	run_immediate(x->vcpus[0]);
	assert_delivered(x, 100, 0, "page accessible again");
	xen_vm_free(x);
}

static void *thread_set_vcpu_info(void *x)
{
	set_vcpu_info(x, 0);
	return NULL;
}

static long move_memslot(struct xen_vm *x)
{
	vm_mem_region_move(x->vm, SHARED_SLOT, SHARED_GPA - SZ_1G);
	return 0;
}

/*
 * The worker of an irqfd waits for a page of a memslot that is being moved.  The move
 * must not wait for the worker.
 */
TEST(invalid_slot)
{
	struct xen_vm *x;
	pthread_t reader, mover;
	int fd, reader_uffd, worker_uffd;

	/* Without this capability, the worker cannot use an INVALID memslot. */
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));

	x = xen_vm_create_with_vcpu_info(guest_nothing);
	fd = irqfd_create(x, 5, 0);
	make_absent(x, SHINFO_PAGE);
	make_absent(x, VCPU_INFO_PAGE);
	worker_uffd = uffd_register(shared_page(x, SHINFO_PAGE), PAGE_SIZE, 0);
	reader_uffd = uffd_register(shared_page(x, VCPU_INFO_PAGE), PAGE_SIZE, 0);

	/* The memslot is INVALID as long as a reader of kvm->srcu waits. */
	reader = start_thread(thread_set_vcpu_info, x);
	uffd_wait_for_fault(reader_uffd);
	caller.x = x;
	caller.fn = move_memslot;
	mover = start_thread(thread_call, NULL);
	wait_for(READ_ONCE(caller.tid) && task_sleeps_in_ioctl(caller.tid));

	eventfd_write(fd, 1);
	uffd_wait_for_fault(worker_uffd);
	uffd_provide(reader_uffd, shared_page(x, VCPU_INFO_PAGE), NULL, PAGE_SIZE);
	join_thread(reader, "KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO");
	join_thread(mover, "KVM_SET_USER_MEMORY_REGION");
	uffd_provide(worker_uffd, shared_page(x, SHINFO_PAGE), NULL, PAGE_SIZE);

	close(worker_uffd);
	close(reader_uffd);
	close(fd);
	xen_vm_free(x);
}

static long delete_memslot(struct xen_vm *x)
{
	vm_mem_region_delete(x->vm, SHARED_SLOT);
	return 0;
}

/*
 * The worker of an irqfd waits for a page of a memslot that is deleted.  The deletion waits
 * for the worker: after the ioctl, KVM must not fault in the memory any more.
 */
TEST(deleted_slot)
{
	uint64_t grace_periods;
	pthread_t deleter;
	struct xen_vm *x;
	int fd, uffd;

	/* Without this capability, a deletion does not wait. */
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_USER_MEMORY_REGIONS));

	x = xen_vm_create_with_vcpu_info(guest_nothing);
	fd = irqfd_create(x, 5, 0);
	make_absent(x, SHINFO_PAGE);
	uffd = uffd_register(shared_page(x, SHINFO_PAGE), PAGE_SIZE, 0);
	eventfd_write(fd, 1);
	uffd_wait_for_fault(uffd);

	grace_periods = vm_get_stat(x->vm, "memslot_grace_periods");
	caller.x = x;
	caller.fn = delete_memslot;
	deleter = start_thread(thread_call, NULL);
	wait_for(vm_get_stat(x->vm, "memslot_grace_periods") == grace_periods + 2);
	wait_for(READ_ONCE(caller.done) || task_sleeps_in_ioctl(caller.tid));
	TEST_ASSERT(!READ_ONCE(caller.done),
		    "expected the deletion to wait for the page of the worker, but it has ended");

	uffd_provide(uffd, shared_page(x, SHINFO_PAGE), NULL, PAGE_SIZE);
	join_thread(deleter, "KVM_SET_USER_MEMORY_REGION");

	close(uffd);
	close(fd);
	xen_vm_free(x);
}

/* Attributes that another task waits for while thread_set_shared_info() holds xen_lock */
static long get_version(struct xen_vm *x)
{
	return (long)thread_get_version(x->vm);
}

static long set_mode(struct xen_vm *x)
{
	return (long)thread_set_long_mode(x->vm);
}

static long set_vm_vector(struct xen_vm *x)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, .u.vector = 0x20,
	});
}

static long set_version(struct xen_vm *x)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_XEN_VERSION, .u.xen_version = 0x40011,
	});
}

static long remove_shared_info_hva(struct xen_vm *x)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA,
	});
}

static long assign_port(struct xen_vm *x)
{
	return set_send_port(x, 9, 0, 9, 0);
}

static long update_port(struct xen_vm *x)
{
	return set_send_port(x, 7, KVM_XEN_EVTCHN_UPDATE, 8, 0);
}

static long get_vcpu_id(struct xen_vm *x)
{
	struct kvm_xen_vcpu_attr attr = { .type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID };

	return __vcpu_ioctl(x->vcpus[0], KVM_XEN_VCPU_GET_ATTR, &attr) ? errno : 0;
}

static long set_vcpu_id(struct xen_vm *x)
{
	return set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, .u.vcpu_id = 5,
	});
}

static long set_config(struct xen_vm *x)
{
	struct kvm_xen_hvm_config config = { .msr = XEN_HYPERCALL_MSR };

	return __vm_ioctl(x->vm, KVM_XEN_HVM_CONFIG, &config) ? errno : 0;
}

static long set_hypercall_page(struct xen_vm *x)
{
	return __vcpu_run(x->vcpus[0]) ? errno : 0;
}

static void *thread_set_shared_info(void *x)
{
	set_shared_info(x);
	return NULL;
}

static int process_call(void *unused)
{
	caller.fn(caller.x);
	return 0;
}

/*
 * A process that shares memory with the VM's process can be killed while it waits for
 * xen_lock.  The ioctl that it was killed in has not changed anything.
 */
TEST(kill_waiter)
{
	static long (* const fns[])(struct xen_vm *x) = {
		get_version, set_mode, set_vm_vector, set_version, remove_shared_info,
		remove_shared_info_hva, assign_port, update_port, deassign_port, reset_ports,
		get_vcpu_id, set_vcpu_id, set_config, set_hypercall_page,
	};
	static uint8_t stack[SZ_64K] __aligned(16);
	struct xen_vm *x;
	int i, uffd, status;
	pthread_t holder;
	pid_t pid;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA);

	x = xen_vm_create_with_vcpu_info(guest_write_hypercall_pages);
	vcpu_args_set(x->vcpus[0], 1, 1);
	ASSERT_EQ(set_send_port(x, 7, 0, 8, 1), 0);
	make_absent(x, SHINFO_PAGE);
	uffd = uffd_register(shared_page(x, SHINFO_PAGE), PAGE_SIZE, 0);
	holder = start_thread(thread_set_shared_info, x);
	uffd_wait_for_fault(uffd);

	caller.x = x;
	for (i = 0; i < ARRAY_SIZE(fns); i++) {
		caller.fn = fns[i];
		pid = clone(process_call, stack + sizeof(stack), CLONE_VM | CLONE_FILES | SIGCHLD,
			    NULL);
		TEST_ASSERT(pid > 0, "clone(): %s", strerror(errno));
		wait_for(task_sleeps_in_ioctl(pid));
		TEST_ASSERT(!kill(pid, SIGKILL), "kill(): %s", strerror(errno));
		__wait_for(waitpid(pid, &status, WNOHANG) == pid,
			   "ioctl %d: the process is not dead after %d s", i, WAIT_LIMIT_SECS);
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
			    "ioctl %d: expected a process killed by %d, got status %#x", i,
			    SIGKILL, status);
	}

	uffd_provide(uffd, shared_page(x, SHINFO_PAGE), NULL, PAGE_SIZE);
	join_thread(holder, "SHARED_INFO");
	close(uffd);

	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_XEN_VERSION).u.xen_version, 0);
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR).u.vector, 0);
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_SHARED_INFO).u.shared_info.gfn,
		  PAGE_GPA(SHINFO_PAGE) / PAGE_SIZE);
	/* Port 7 exists, and port 9 does not. */
	ASSERT_EQ(set_send_port(x, 7, 0, 8, 1), EEXIST);
	ASSERT_EQ(set_send_port(x, 9, KVM_XEN_EVTCHN_DEASSIGN, 9, 0), ENOENT);
	xen_vm_free(x);
}

static uint64_t *watched_time;
static unsigned long watch_rounds;
static bool watch_stop, update_seen;

static void *thread_watch_update(void *unused)
{
	while (!READ_ONCE(watch_stop)) {
		if (READ_ONCE(*watched_time) & XEN_RUNSTATE_UPDATE)
			WRITE_ONCE(update_seen, true);
		WRITE_ONCE(watch_rounds, watch_rounds + 1);
	}
	return NULL;
}

/* The flag is set during updates if, and only if, userspace has enabled it. */
TEST(runstate_update_flag)
{
	struct kvm_xen_hvm_attr attr = { .type = KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG };
	unsigned long watched;
	pthread_t watcher;
	struct xen_vm *x;
	int i, rounds;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE);
	TEST_ASSERT(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG,
		    "KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG is not supported");

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	ASSERT_EQ(set_runstate_addr(x, PAGE_GPA(TIME_INFO_PAGE)), 0);
	watched_time = &((struct xen_runstate *)shared_page(x, TIME_INFO_PAGE))->entry_time;
	ASSERT_EQ(get_vm_attr(x, attr.type).u.runstate_update_flag, 0);

	watch_stop = false;
	watcher = start_thread(thread_watch_update, NULL);

	attr.u.runstate_update_flag = 1;
	ASSERT_EQ(set_vm_attr(x, attr), 0);
	ASSERT_EQ(get_vm_attr(x, attr.type).u.runstate_update_flag, 1);
	for (rounds = 0; !READ_ONCE(update_seen); rounds++)
		set_runstate_running(x->vcpus[0]);

	attr.u.runstate_update_flag = 0;
	ASSERT_EQ(set_vm_attr(x, attr), 0);
	ASSERT_EQ(get_vm_attr(x, attr.type).u.runstate_update_flag, 0);
	/* The watcher may still be about to report what it has read before. */
	watched = READ_ONCE(watch_rounds);
	wait_for(READ_ONCE(watch_rounds) > watched);
	WRITE_ONCE(update_seen, false);
	for (i = 0; i < rounds + nr_races * 10; i++) {
		set_runstate_running(x->vcpus[0]);
		TEST_ASSERT(!READ_ONCE(update_seen),
			    "XEN_RUNSTATE_UPDATE seen in round %d, expected never", i);
	}

	WRITE_ONCE(watch_stop, true);
	join_thread(watcher, "thread that watches the flag");
	xen_vm_free(x);
}

/* The wall clock time, in ns, at which the guest's clock was 0 */
static int64_t get_epoch(struct xen_vm *x, int round)
{
	struct kvm_clock_data clock;

	vm_ioctl(x->vm, KVM_GET_CLOCK, &clock);
	TEST_ASSERT(clock.flags & KVM_CLOCK_REALTIME,
		    "round %d: the host's clock is not the TSC any more", round);
	return clock.realtime - clock.clock;
}

/*
 * @epoch: read before and after KVM writes @wc.  It drifts, because KVM's frequency of
 * the TSC is less precise than the timekeeper's.
 */
static void assert_epoch(struct wall_clock *wc, const char *whose, int round,
			 int64_t epoch[2], int64_t limit)
{
	int64_t since = wc->sec * 1000000000ll + wc->nsec - epoch[0];
	int64_t moved = epoch[1] - epoch[0];

	TEST_ASSERT(since > (moved < 0 ? moved : 0) - limit &&
		    since < (moved > 0 ? moved : 0) + limit,
		    "round %d: %s wall clock off by %ld ns, expected 0 to %ld, give or take %ld",
		    round, whose, since, moved, limit);
}

/*
 * The wall clock is the time at which the guest's clock was 0, even if the thread
 * that writes it is preempted between the readings of the two clocks.
 */
TEST(wall_clock_preempted)
{
	const int64_t limit = 100000;
	struct wall_clock *xen, *kvm;
	struct kvm_clock_data clock;
	int64_t epoch[2];
	struct xen_vm *x;
	int i;

	x = xen_vm_create(guest_sync_forever, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL);
	xen = (void *)shared_page(x, SHINFO_PAGE) + XEN_SHINFO_WALL_CLOCK;
	kvm = (void *)shared_page(x, TIME_INFO_PAGE);

	/* The master clock is set up when the vCPU runs for the first time. */
	vcpu_run_to_sync(x->vcpus[0]);
	vm_ioctl(x->vm, KVM_GET_CLOCK, &clock);
	__TEST_REQUIRE(clock.flags & KVM_CLOCK_REALTIME, "the master clock is not in use");

	start_preempting(limit * 2);

	for (i = 0; preempt_again(nr_races * 30); i++) {
		epoch[0] = get_epoch(x, i);
		set_shared_info(x);
		epoch[1] = get_epoch(x, i);
		assert_epoch(xen, "Xen's", i, epoch, limit);

		epoch[0] = epoch[1];
		vcpu_set_msr(x->vcpus[0], MSR_KVM_WALL_CLOCK_NEW, PAGE_GPA(TIME_INFO_PAGE));
		epoch[1] = get_epoch(x, i);
		assert_epoch(kvm, "KVM's", i, epoch, limit);
	}

	stop_preempting();
	xen_vm_free(x);
}

#define PVCLOCK_TSC_STABLE	BIT(0)
#define PVCLOCK_GUEST_STOPPED	BIT(1)

#define NR_XEN_CLOCKS	2
#define KVMCLOCK_GPA	(PAGE_GPA(TIME_INFO_PAGE) + 64)

/* Gives the first vCPU, which has a vcpu_info, all clocks.  Returns kvmclock. */
static struct pvclock *set_clocks(struct xen_vm *x, struct pvclock *xen[NR_XEN_CLOCKS])
{
	ASSERT_EQ(set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
		.u.gpa = PAGE_GPA(TIME_INFO_PAGE),
	}), 0);
	vcpu_set_msr(x->vcpus[0], MSR_KVM_SYSTEM_TIME_NEW, KVMCLOCK_GPA | KVM_MSR_ENABLED);
	xen[0] = (void *)shared_page(x, TIME_INFO_PAGE);
	xen[1] = (void *)vcpu_info(x, 0)->time;
	return (void *)shared_page(x, TIME_INFO_PAGE) + 64;
}

/* Xen's clocks have PVCLOCK_TSC_STABLE_BIT unless userspace has taken it away. */
TEST(tsc_unstable)
{
	struct kvm_xen_hvm_config config = {
		.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
		.msr = XEN_HYPERCALL_MSR,
	};
	struct pvclock *kvmclock, *clocks[NR_XEN_CLOCKS];
	struct kvm_clock_data clock;
	struct xen_vm *x;
	int i, round;

	x = xen_vm_create_with_vcpu_info(guest_sync_forever);
	vcpu_run_to_sync(x->vcpus[0]);
	vm_ioctl(x->vm, KVM_GET_CLOCK, &clock);
	__TEST_REQUIRE(clock.flags & KVM_CLOCK_REALTIME, "the master clock is not in use");

	kvmclock = set_clocks(x, clocks);

	for (round = 0; round < 3; round++) {
		config.flags ^= round ? KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE : 0;
		vm_ioctl(x->vm, KVM_XEN_HVM_CONFIG, &config);
		vcpu_run_to_sync(x->vcpus[0]);

		TEST_ASSERT(kvmclock->flags & PVCLOCK_TSC_STABLE,
			    "round %d: flags of kvmclock %#x, expected TSC_STABLE", round,
			    kvmclock->flags);
		for (i = 0; i < ARRAY_SIZE(clocks); i++)
			TEST_ASSERT(!(clocks[i]->flags & PVCLOCK_TSC_STABLE) == (round == 1),
				    "round %d: flags of Xen's clock %d %#x, expected TSC_STABLE %d",
				    round, i, clocks[i]->flags, round != 1);
	}
	xen_vm_free(x);
}

/* KVM_KVMCLOCK_CTRL tells the guest in kvmclock, and only there, that it was stopped. */
TEST(guest_stopped)
{
	struct pvclock *kvmclock, *clocks[NR_XEN_CLOCKS];
	struct kvm_vcpu *vcpu;
	struct xen_vm *x;
	int i, round;

	x = xen_vm_create_with_vcpu_info(guest_sync_forever);
	vcpu = x->vcpus[0];
	kvmclock = set_clocks(x, clocks);

	for (round = 0; round < 3; round++) {
		/* This requests an update of all clocks. */
		vcpu_set_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, KVMCLOCK_GPA | KVM_MSR_ENABLED);
		if (round == 1)
			TEST_ASSERT(!__vcpu_ioctl(vcpu, KVM_KVMCLOCK_CTRL, NULL),
				    "KVM_KVMCLOCK_CTRL: errno %d", errno);
		vcpu_run_to_sync(vcpu);

		/* KVM never clears the flag in kvmclock, the guest does. */
		TEST_ASSERT(!(kvmclock->flags & PVCLOCK_GUEST_STOPPED) == !round,
			    "round %d: flags of kvmclock %#x, expected GUEST_STOPPED %d",
			    round, kvmclock->flags, !!round);
		for (i = 0; i < ARRAY_SIZE(clocks); i++)
			TEST_ASSERT(clocks[i]->version &&
				    !(clocks[i]->flags & PVCLOCK_GUEST_STOPPED),
				    "round %d: version %u, flags %#x of Xen's clock %d, expected no GUEST_STOPPED",
				    round, clocks[i]->version, clocks[i]->flags, i);
	}
	xen_vm_free(x);
}

/* Setting the shared_info page does not move the reference point of the clocks. */
TEST(shared_info_clock)
{
	struct pvclock *clock, before;
	struct kvm_clock_data data;
	struct xen_vm *x;

	x = xen_vm_create_with_vcpu_info(guest_sync_forever);
	vcpu_run_to_sync(x->vcpus[0]);
	vm_ioctl(x->vm, KVM_GET_CLOCK, &data);
	__TEST_REQUIRE(data.flags & KVM_CLOCK_REALTIME, "the master clock is not in use");

	clock = (void *)vcpu_info(x, 0)->time;
	before = *clock;
	set_shared_info(x);
	/* Write the clock, even if nothing else asks for it. */
	set_vcpu_info(x, 0);
	vcpu_run_to_sync(x->vcpus[0]);

	TEST_ASSERT(clock->version != before.version, "the clock was not written again");
	TEST_ASSERT(clock->tsc_timestamp == before.tsc_timestamp &&
		    clock->system_time == before.system_time,
		    "reference point at TSC %#lx is %lu ns, expected TSC %#lx and %lu ns",
		    clock->tsc_timestamp, clock->system_time, before.tsc_timestamp,
		    before.system_time);
	xen_vm_free(x);
}

static int set_vcpu_info_at(struct xen_vm *x, uint64_t gpa)
{
	return set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, .u.gpa = gpa,
	});
}

/* A vcpu_info can be at any multiple of 4 in its page. */
TEST(alignment)
{
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_nothing);
	const uint64_t page = PAGE_GPA(TIME_INFO_PAGE);
	const int last = PAGE_SIZE - sizeof(struct xen_vcpu_info);
	int mode, offset;
	uint8_t *vi;

	for (mode = 0; mode < 2; mode++) {
		set_long_mode(x, mode);
		for (offset = 0; offset <= last; offset += offset < last - 80 ? 64 : 1) {
			int err = set_vcpu_info_at(x, page + offset);

			ASSERT_EQ(err, offset % 4 ? ENXIO : 0);
			if (err)
				continue;

			clear_pages(x);
			ASSERT_EQ(send_by_ioctl(x, 1023, 0), 0);
			vi = shared_page(x, TIME_INFO_PAGE) + offset;
			TEST_ASSERT(vi[0] == 1,
				    "offset %d: evtchn_upcall_pending %u, expected 1",
				    offset, vi[0]);
			/* Port 1023 is in word 31, or in word 15 in long mode. */
			TEST_ASSERT(mode ? vi[8 + 1] == 0x80 : vi[4 + 3] == 0x80,
				    "offset %d, long mode %d: wrong evtchn_pending_sel",
				    offset, mode);
		}
		ASSERT_EQ(set_vcpu_info_at(x, page + last + 4), EINVAL);
		ASSERT_EQ(get_vcpu_attr(x->vcpus[0], KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO).u.gpa,
			  page + last);
	}
	xen_vm_free(x);
}

/* The hypercall MSR must be in the range that is reserved for hypervisors. */
TEST(msr)
{
	static const struct {
		uint32_t msr;
		int err;
	} msrs[] = {
		{ MSR_IA32_TSC, EINVAL },
		{ MSR_EFER, EINVAL },
		{ 0x3fffffff, EINVAL },
		{ 0x40000000, 0 },
		{ 0x40000200, 0 },
		{ 0x4fffffff, 0 },
		{ 0x50000000, EINVAL },
		{ 0xffffffff, EINVAL },
		{ 0, 0 },
	};
	struct xen_vm *x = xen_vm_create(guest_nothing, 0);
	struct kvm_xen_hvm_config config = {};
	int i, err;

	for (i = 0; i < ARRAY_SIZE(msrs); i++) {
		config.msr = msrs[i].msr;
		err = __vm_ioctl(x->vm, KVM_XEN_HVM_CONFIG, &config) ? errno : 0;
		TEST_ASSERT(err == msrs[i].err, "MSR %#x: errno %d, expected %d",
			    config.msr, err, msrs[i].err);
	}
	xen_vm_free(x);
}

/* The per-vCPU vector arrives in the vCPU's own APIC, whatever the APIC ID is. */
TEST(upcall_vector)
{
	/* 255 is the broadcast ID of an xAPIC. */
	static const uint32_t ids[] = { 2, 255 };
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_nothing);
	struct kvm_lapic_state apic;
	struct kvm_vcpu *vcpu;
	uint32_t *reg;
	int i;

	for (i = 0; i < ARRAY_SIZE(ids); i++) {
		vcpu = vm_vcpu_add(x->vm, ids[i], guest_nothing);
		set_lapic(vcpu, true);
		ASSERT_EQ(set_upcall_vector(vcpu, UPCALL_VECTOR), 0);
		x->vcpus[0] = vcpu;
		/* Clear the event that was sent to the previous vCPU. */
		clear_pages(x);
		set_vcpu_info(x, 0);

		ASSERT_EQ(send_by_ioctl(x, 8, 0), 0);
		assert_delivered(x, 8, 0, "ioctl");
		vcpu_ioctl(vcpu, KVM_GET_LAPIC, &apic);
		reg = (void *)&apic.regs[APIC_IRR + UPCALL_VECTOR / 32 * 0x10];
		TEST_ASSERT(*reg == BIT(UPCALL_VECTOR % 32),
			    "vCPU %u: IRR %#x, expected %#lx", ids[i], *reg,
			    BIT(UPCALL_VECTOR % 32));
	}
	xen_vm_free(x);
}

static int set_shared_info_hva(struct xen_vm *x, uint64_t hva)
{
	return set_vm_attr(x, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, .u.shared_info.hva = hva,
	});
}

static int set_vcpu_info_hva(struct xen_vm *x, uint64_t hva)
{
	return set_vcpu_attr(x->vcpus[0], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, .u.hva = hva,
	});
}

static void assert_addresses(struct xen_vm *x, uint64_t gfn, uint64_t shinfo_hva,
			     uint64_t gpa, uint64_t vi_hva)
{
	struct kvm_vcpu *vcpu = x->vcpus[0];

	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_SHARED_INFO).u.shared_info.gfn, gfn);
	ASSERT_EQ(get_vm_attr(x, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA).u.shared_info.hva,
		  shinfo_hva);
	ASSERT_EQ(get_vcpu_attr(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO).u.gpa, gpa);
	ASSERT_EQ(get_vcpu_attr(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA).u.hva, vi_hva);
}

/* Set shared_info and vcpu_info by user address, with memory that is in no memslot. */
TEST(hva)
{
	const uint64_t kernel = 0xffff888000000000;
	struct xen_vm *x;
	uint64_t shinfo, vi, gfn, gpa;

	__TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA,
		       "no KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA");
	x = xen_vm_create_with_vcpu_info(guest_nothing);
	gfn = PAGE_GPA(SHINFO_PAGE) / PAGE_SIZE;
	gpa = PAGE_GPA(VCPU_INFO_PAGE) + VCPU_INFO_OFFSET;
	assert_addresses(x, gfn, 0, gpa, 0);

	/* From here on, the pages are anonymous memory outside of all memslots. */
	x->shared = mmap(NULL, NR_SHARED_PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(x->shared != MAP_FAILED, "mmap() failed: %s", strerror(errno));
	shinfo = (uintptr_t)shared_page(x, SHINFO_PAGE);
	vi = (uintptr_t)vcpu_info(x, 0);

	/* An invalid address leaves the pages where they were. */
	ASSERT_EQ(set_shared_info_hva(x, shinfo + 8), EINVAL);
	ASSERT_EQ(set_shared_info_hva(x, kernel), EINVAL);
	ASSERT_EQ(set_vcpu_info_hva(x, vi + 2), ENXIO);
	ASSERT_EQ(set_vcpu_info_hva(x, (vi | (PAGE_SIZE - 1)) - 59), EINVAL);
	ASSERT_EQ(set_vcpu_info_hva(x, kernel), EINVAL);
	assert_addresses(x, gfn, 0, gpa, 0);

	ASSERT_EQ(set_shared_info_hva(x, shinfo), 0);
	assert_wall_clock(x, "shared_info set by address");
	set_pending(x, 100);
	ASSERT_EQ(set_vcpu_info_hva(x, vi), 0);
	run_immediate(x->vcpus[0]);
	assert_addresses(x, KVM_XEN_INVALID_GFN, shinfo, KVM_XEN_INVALID_GPA, vi);
	assert_delivered(x, 100, 0, "vcpu_info set by address");

	clear_pages(x);
	vm_mem_region_delete(x->vm, SHARED_SLOT);
	ASSERT_EQ(send_by_ioctl(x, 8, 0), 0);
	assert_delivered(x, 8, 0, "ioctl");

	clear_pages(x);
	make_absent(x, SHINFO_PAGE);
	make_absent(x, VCPU_INFO_PAGE);
	ASSERT_EQ(send_by_ioctl(x, 8, 0), 0);
	assert_addresses(x, KVM_XEN_INVALID_GFN, shinfo, KVM_XEN_INVALID_GPA, vi);
	assert_delivered(x, 8, 0, "ioctl");

	/* Sends fail while the page is read-only. */
	mprotect(x->shared, PAGE_SIZE, PROT_READ);
	ASSERT_EQ(send_by_ioctl(x, 9, 0), EFAULT);
	ASSERT_EQ(set_shared_info_hva(x, shinfo), EFAULT);
	mprotect(x->shared, PAGE_SIZE, PROT_READ | PROT_WRITE);
	ASSERT_EQ(send_by_ioctl(x, 9, 0), 0);
	TEST_ASSERT(port_pending(x, 9), "port 9 not pending");

	ASSERT_EQ(set_shared_info_hva(x, 0), 0);
	ASSERT_EQ(set_vcpu_info_hva(x, 0), 0);
	assert_addresses(x, KVM_XEN_INVALID_GFN, 0, KVM_XEN_INVALID_GPA, 0);
	ASSERT_EQ(send_by_ioctl(x, 10, 0), EINVAL);

	munmap(x->shared, NR_SHARED_PAGES * PAGE_SIZE);
	xen_vm_free(x);
}

/* The ports that the guest has handled, one bit each. */
static uint64_t guest_handled[LONG_MODE_PORTS / 64];

static void guest_handle_events(struct ex_regs *regs)
{
	struct xen_vcpu_info *vi = (void *)PAGE_GPA(VCPU_INFO_PAGE) + VCPU_INFO_OFFSET;
	uint64_t *pending = (void *)PAGE_GPA(SHINFO_PAGE) + XEN_SHINFO_PENDING;
	uint64_t sel;
	int i;

	WRITE_ONCE(vi->evtchn_upcall_pending, 0);
	sel = __atomic_exchange_n(&vi->evtchn_pending_sel, 0, __ATOMIC_SEQ_CST);
	for (i = 0; i < 64; i++) {
		if (sel & BIT(i))
			guest_handled[i] |= __atomic_exchange_n(&pending[i], 0,
								__ATOMIC_SEQ_CST);
	}
	x2apic_write_reg(APIC_EOI, 0);
}

/* Takes an upcall that is pending when KVM_RUN is called. */
static void guest_take_upcall(void)
{
	x2apic_enable();
	for (;;) {
		GUEST_SYNC(0);
		asm volatile("sti\n\t"
			     "nop\n\t"
			     "cli");
	}
}

enum {
	RESTORE_MEMORY,
	RESTORE_SHARED_INFO,
	RESTORE_VCPU_INFO,
	RESTORE_VECTOR,
	RESTORE_LAPIC,
	RESTORE_TIMER,
	NR_RESTORE_STEPS,
};

static const char *const restore_steps[] = {
	"memory", "SHARED_INFO", "VCPU_INFO", "UPCALL_VECTOR", "LAPIC", "TIMER",
};

/* What is restored. */
struct saved_vm {
	bool vm_vector;		/* the vector of the VM, not that of the vCPU */
	bool raised;		/* the upcall of the event was raised before the save */
	bool timer;		/* the timer expires while the VM is restored */
	struct kvm_lapic_state lapic;
	uint8_t memory[NR_SHARED_PAGES * PAGE_SIZE];
};

static void restore_step(struct xen_vm *x, struct saved_vm *saved, int step, bool by_hva)
{
	switch (step) {
	case RESTORE_MEMORY:
		memcpy(x->shared, saved->memory, sizeof(saved->memory));
		break;
	case RESTORE_SHARED_INFO:
		if (by_hva)
			ASSERT_EQ(set_shared_info_hva(x, (uintptr_t)shared_page(x, SHINFO_PAGE)),
				  0);
		else
			set_shared_info(x);
		break;
	case RESTORE_VCPU_INFO:
		if (by_hva)
			ASSERT_EQ(set_vcpu_info_hva(x, (uintptr_t)vcpu_info(x, 0)), 0);
		else
			set_vcpu_info(x, 0);
		break;
	case RESTORE_VECTOR:
		set_vector(x, saved->vm_vector, UPCALL_VECTOR);
		break;
	case RESTORE_LAPIC:
		vcpu_ioctl(x->vcpus[0], KVM_SET_LAPIC, &saved->lapic);
		break;
	case RESTORE_TIMER:
		set_timer(x, saved->timer ? 1 : 0);
		break;
	}
}

/* Put everything that restore_step() sets into the state of a new VM. */
static void undo_restore(struct xen_vm *x)
{
	set_vector(x, false, 0);
	set_vector(x, true, 0);
	set_lapic(x->vcpus[0], false);
	stop_timer(x);
	unset_vcpu_info(x, 0);
	ASSERT_EQ(remove_shared_info(x), 0);
	clear_pages(x);
	memset(addr_gva2hva(x->vm, (vm_vaddr_t)guest_handled), 0, sizeof(guest_handled));
}

static bool handled(struct xen_vm *x, uint32_t port)
{
	uint64_t *bits = addr_gva2hva(x->vm, (vm_vaddr_t)guest_handled);

	return bits[port / 64] & BIT(port % 64);
}

/* An event before the save, and one of the same word after the restore. */
#define SAVED_PORT		200
#define LATER_PORT		201

/* Returns true if no event is lost. */
static bool restore(struct xen_vm *x, struct saved_vm *saved, const int *order,
		    bool by_hva)
{
	bool before, timer, after;
	char text[200] = "";
	int i;

	undo_restore(x);
	for (i = 0; i < NR_RESTORE_STEPS; i++)
		restore_step(x, saved, order[i], by_hva);

	vcpu_run_to_sync(x->vcpus[0]);
	before = handled(x, SAVED_PORT);
	timer = handled(x, TIMER_PORT);

	ASSERT_EQ(send_by_ioctl(x, LATER_PORT, 0), 0);
	vcpu_run_to_sync(x->vcpus[0]);
	after = handled(x, LATER_PORT);
	if (before && timer == saved->timer && after)
		return true;

	for (i = 0; i < NR_RESTORE_STEPS; i++) {
		strcat(text, " ");
		strcat(text, restore_steps[order[i]]);
	}
	pr_info("vector of the %s, saved event %s, %s, order%s: handled: saved event %d, timer %d, later event %d; expected 1, %d, 1\n",
		saved->vm_vector ? "VM" : "vCPU", saved->raised ? "raised" : "recorded",
		by_hva ? "hva" : "gpa", text, before, timer, after, saved->timer);
	return false;
}

/*
 * Restore a VM in many orders: the event that was sent before the VM was saved, the
 * event of the timer and a later one are handled.  -n 720 tries all orders.
 */
TEST(restore_order)
{
	const int nr_orders = xen_nr_orders(NR_RESTORE_STEPS);
	bool hva = kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA;
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_take_upcall);
	int i, variant, lost = 0, tries = min(nr_orders, nr_races);
	struct saved_vm *saved = calloc(1, sizeof(*saved));
	int order[NR_RESTORE_STEPS];
	struct xen_vcpu_info *vi;

	TEST_ASSERT(saved, "calloc() failed: %s", strerror(errno));
	vm_init_descriptor_tables(x->vm);
	vcpu_init_descriptor_tables(x->vcpus[0]);
	vm_install_exception_handler(x->vm, UPCALL_VECTOR, guest_handle_events);
	vcpu_run_to_sync(x->vcpus[0]);
	vcpu_ioctl(x->vcpus[0], KVM_GET_LAPIC, &saved->lapic);

	for (variant = 0; variant < 8; variant++) {
		saved->vm_vector = variant & 1;
		saved->raised = variant & 2;
		/* The timer's upcall makes the guest handle other events, too. */
		saved->timer = variant & 4;
		memset(saved->memory, 0, sizeof(saved->memory));
		saved->memory[SHINFO_PAGE * PAGE_SIZE + XEN_SHINFO_PENDING + SAVED_PORT / 8] =
			BIT(SAVED_PORT % 8);
		if (saved->raised) {
			vi = (void *)saved->memory + VCPU_INFO_PAGE * PAGE_SIZE + VCPU_INFO_OFFSET;
			vi->evtchn_upcall_pending = 1;
			vi->evtchn_pending_sel = BIT(SAVED_PORT / 64);
		}
		/* The step has no common divisor with the number of orders. */
		for (i = 0; i < tries; i++) {
			xen_get_order(i * 163 % nr_orders, order, NR_RESTORE_STEPS);
			if (!restore(x, saved, order, hva && i % 2))
				lost++;
		}
	}
	TEST_ASSERT(!lost, "%d of %d restores lost an event, expected 0", lost,
		    8 * tries);

	free(saved);
	xen_vm_free(x);
}

#define NR_PERF_EVENTS		2000
#define PERF_PORT		8

/* Let the next event of the port raise its word again, as the guest's handler does. */
static void take_event(struct xen_vcpu_info *vi, uint64_t *pending)
{
	WRITE_ONCE(vi->evtchn_pending_sel, 0);
	WRITE_ONCE(*pending, 0);
}

static void guest_perf(void)
{
	struct xen_vcpu_info *vi = (void *)PAGE_GPA(VCPU_INFO_PAGE) + VCPU_INFO_OFFSET;
	uint64_t *pending = (void *)PAGE_GPA(SHINFO_PAGE) + XEN_SHINFO_PENDING;
	int i;

	for (;;) {
		for (i = 0; i < NR_PERF_EVENTS; i++) {
			take_event(vi, pending);
			xen_hypercall(__HYPERVISOR_event_channel_op, EVTCHNOP_send,
				      (uint64_t)&guest_send_port);
		}
		GUEST_SYNC(0);
	}
}

static void perf_ioctl(struct xen_vm *x, uint64_t *pending, int fd)
{
	int i;

	for (i = 0; i < NR_PERF_EVENTS; i++) {
		take_event(vcpu_info(x, 0), pending);
		send_by_ioctl(x, PERF_PORT, 0);
	}
}

static void perf_irqfd(struct xen_vm *x, uint64_t *pending, int fd)
{
	int i;

	for (i = 0; i < NR_PERF_EVENTS; i++) {
		take_event(vcpu_info(x, 0), pending);
		eventfd_write(fd, 1);
	}
}

static void perf_hypercall(struct xen_vm *x, uint64_t *pending, int fd)
{
	vcpu_run_to_sync(x->vcpus[0]);
}

/* Print the cost of an event for the sender, for each way to send it. */
static void measure(void)
{
	static const struct {
		const char *key;
		void (*run)(struct xen_vm *x, uint64_t *pending, int fd);
	} ways[] = {
		{ "ioctl", perf_ioctl },
		{ "irqfd", perf_irqfd },
		{ "hypercall", perf_hypercall },
	};
	struct xen_vm *x = xen_vm_create_with_vcpu_info(guest_perf);
	uint64_t *pending = (void *)shared_page(x, SHINFO_PAGE) + XEN_SHINFO_PENDING;
	int fd = irqfd_create(x, PERF_PORT, 0);
	uint64_t start, elapsed;
	int i;

	ASSERT_EQ(set_send_port(x, 7, 0, PERF_PORT, 0), 0);
	guest_send_port = 7;
	sync_global_to_guest(x->vm, guest_send_port);

	for (i = 0; i < ARRAY_SIZE(ways); i++) {
		/* The first run warms up caches and is not measured. */
		ways[i].run(x, pending, fd);
		start = now_ns();
		ways[i].run(x, pending, fd);
		elapsed = now_ns() - start;
		assert_delivered(x, PERF_PORT, 0, ways[i].key);
		pr_info("perf: %s ns %lu\n", ways[i].key, elapsed / NR_PERF_EVENTS);
	}

	irqfd_destroy(x, fd);
	xen_vm_free(x);
}

static void help(void)
{
	printf("usage: %s [-h] [-n races] [-p] [case...]\n", program_invocation_short_name);
	printf(" -n: how many times to try a race (default: %d)\n", nr_races);
	printf(" -p: measure the cost of an event instead of running cases\n");
	printf(" case: run only this one; !case: run all but this one\n");
}

int main(int argc, char *argv[])
{
	const uint32_t caps = KVM_XEN_HVM_CONFIG_SHARED_INFO |
			      KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL |
			      KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
	bool perf = false;
	int opt;

	while ((opt = getopt(argc, argv, "hn:p")) != -1) {
		switch (opt) {
		case 'n':
			nr_races = atoi(optarg);
			break;
		case 'p':
			perf = true;
			break;
		case 'h':
		default:
			help();
			exit(opt == 'h' ? 0 : 1);
		}
	}

	TEST_REQUIRE((kvm_check_cap(KVM_CAP_XEN_HVM) & caps) == caps);

	if (perf) {
		measure();
		return 0;
	}

	atexit(trace_end);
	return run_cases(argv + optind);
}
