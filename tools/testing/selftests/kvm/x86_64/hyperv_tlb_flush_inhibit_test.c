// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hyper-V TlbFlushInhibit
 *
 * A flush hypercall that targets an inhibited VP blocks its caller, without any
 * effect, until the VP has no owner.  The test covers
 *
 * - the ioctls and each of their errors;
 * - each form of the hypercall, also with VP indices that differ from the vCPU
 *   indices, and the hypercalls that do not block: those with other targets,
 *   those that only flush the caller, and malformed ones;
 * - several owners, several inhibited VPs, several flushers, two inhibited VPs
 *   that flush each other, owners that are added after a flush began, and
 *   owners that several threads change;
 * - each way out of the blocked state: release, signal, interrupts of the local APIC and
 *   of the PIC, NMI, SMI, INIT, changed registers, a full dirty ring, save and restore,
 *   the end of the process;
 * - events that do not unblock the vCPU: a masked interrupt, a kick, which only
 *   ends HLT, timers, events that KVM_GUESTDBG_BLOCKIRQ holds back, a page that is
 *   ready while another notification is pending, and a Xen event that cannot be
 *   raised;
 * - that the guest's steal time does not report vCPUs as preempted;
 * - flush hypercalls of L2, which cause exits to L1;
 * - a migrated VM whose memory arrives late;
 * - that a blocked vCPU uses no CPU time, and that a release does not wait for
 *   the page-in of another vCPU;
 * - races of releases with flushes, and of page table walks with flushes.
 *
 * The test does not sleep.  It waits until statistics change: a vCPU is blocked
 * when its statistic hv_tlb_flush_blocks has increased.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <asm/kvm_para.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "uffd.h"
#include "apic.h"
#include "hyperv.h"
#include "svm_util.h"
#include "vmx.h"
#include "xen.h"

#define NR_VCPUS	4
#define NR_FLUSHERS	2

/* vCPUs 0 and 1 make the flush hypercalls, these two are their targets. */
#define TARGET		2
#define OTHER		3

/* Values below are arbitrarily chosen. */
#define OWNER		BIT(0)
#define OWNER2		BIT(31)
#define IRQ_VECTOR	0xa5
#define PIC_VECTOR	0xa8	/* a multiple of 8 */
#define ELSEWHERE	0x600d
#define STUB_PORT	0xe
#define SIPI_VECTOR	0x10
#define FAULT_GPA	0x40000000
#define FAULT_SLOT	1
#define XEN_PORT	70
#define XEN_VECTOR	0xb1
#define NR_PAGES	1024

#define SIPI_GPA	(SIPI_VECTOR << 12)
#define RESET_GPA	0xfffffff0

/* The master PIC */
#define PIC_CMD		0x20
#define PIC_DATA	0x21

/* Bits of HV_X64_MSR_STIMER0_CONFIG; bits 11:4 are the vector. */
#define STIMER_ENABLE	BIT(0)
#define STIMER_PERIODIC	BIT(1)
#define STIMER_DIRECT	BIT(12)
#define STIMER_SINT(n)	((n) << 16)

/* The bit of HV_X64_MSR_SCONTROL and HV_X64_MSR_SIMP */
#define SYNIC_ENABLE	BIT(0)

/* The smallest dirty ring, with entries of 16 bytes */
#define RING_ENTRIES	256

/* SMRAM has its own address space. */
#define SMRAM_GPA	0x1000000
#define SMRAM_PAGES	16
#define SMRAM_SLOT	(BIT(16) | 2)

static uint64_t toggles = 2000;
static uint64_t walks = 200;
static uint64_t latency_rounds = 20;

/* VP indices of the vCPUs: equal to the vCPU indices, and different ones */
static const uint32_t vp_maps[][NR_VCPUS] = {
	{ 0, 1, 2, 3 },
	{ 3, 0, 1, 2 },
	{ 700, 0, 65, 2 },
};

/* What a flusher shares with the host */
struct guest_ctx {
	struct hyperv_hcall_pages *pages;
	struct hyperv_tlb_flush flush;
	uint64_t irqs;
	uint64_t nmis;
	uint64_t count;
	bool stop;
	/* Asynchronous page faults */
	uint64_t apf_gpa;
	struct kvm_vcpu_pv_apf_data apf __aligned(64);
};

/* For handlers and L2, which have no argument; used by one vCPU of a test */
static struct guest_ctx *event_ctx;

static void guest_irq_handler(struct ex_regs *regs)
{
	WRITE_ONCE(event_ctx->irqs, event_ctx->irqs + 1);
	x2apic_write_reg(APIC_EOI, 0);
}

static void guest_pic_handler(struct ex_regs *regs)
{
	WRITE_ONCE(event_ctx->irqs, event_ctx->irqs + 1);
}

/* The upcall stays pending until the guest clears it. */
static void guest_xen_handler(struct ex_regs *regs)
{
	struct xen_vcpu_info *info = (void *)FAULT_GPA;

	WRITE_ONCE(event_ctx->irqs, event_ctx->irqs + 1);
	WRITE_ONCE(info->evtchn_upcall_pending, 0);
}

static void guest_nmi_handler(struct ex_regs *regs)
{
	WRITE_ONCE(event_ctx->nmis, event_ctx->nmis + 1);
}

/* Flush once each time that the vCPU is run. */
static void guest_flusher(struct guest_ctx *ctx)
{
	hyperv_enable_hypercalls(ctx->pages);
	GUEST_SYNC(0);

	for (;;)
		GUEST_SYNC(hyperv_flush_tlb(ctx->pages, &ctx->flush));
}

/* The same, with a local APIC that is enabled. */
static void guest_apic_flusher(struct guest_ctx *ctx)
{
	x2apic_enable();
	guest_flusher(ctx);
}

static void write_port(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a" (value), "d" (port));
}

/* Interrupts of the PIC have the vectors from IRQ_VECTOR on. */
static void guest_pic_flusher(struct guest_ctx *ctx)
{
	x2apic_enable();
	write_port(PIC_CMD, 0x11);		/* ICW1: edge-triggered, cascade, ICW4 follows */
	write_port(PIC_DATA, PIC_VECTOR);	/* ICW2 */
	write_port(PIC_DATA, 0x04);		/* ICW3: the slave is at pin 2 */
	write_port(PIC_DATA, 0x03);		/* ICW4: 8086 mode, automatic EOI */
	write_port(PIC_DATA, 0xfe);		/* mask all pins but 0 */
	asm volatile("sti");
	guest_flusher(ctx);
}

/* The same, with interrupts enabled. */
static void guest_irq_flusher(struct guest_ctx *ctx)
{
	x2apic_enable();
	asm volatile("sti");
	guest_flusher(ctx);
}

/* Flush once with interrupts disabled, then enable them. */
static void guest_masked_irq_flusher(struct guest_ctx *ctx)
{
	uint64_t status, irqs;

	x2apic_enable();
	hyperv_enable_hypercalls(ctx->pages);
	GUEST_SYNC(0);

	status = hyperv_flush_tlb(ctx->pages, &ctx->flush);
	irqs = READ_ONCE(ctx->irqs);
	GUEST_ASSERT_1(!irqs, irqs);
	asm volatile("sti; nop");
	irqs = READ_ONCE(ctx->irqs);
	GUEST_ASSERT_1(irqs == 1, irqs);
	GUEST_SYNC(status);
}

/* Flush with the hypercall directly after STI. */
static void guest_sti_flusher(struct guest_ctx *ctx)
{
	struct hyperv_hcall_pages stub = *ctx->pages;
	uint8_t *insn;

	x2apic_enable();
	hyperv_enable_hypercalls(ctx->pages);

	/*
	 * Write STI and a copy of KVM's code, which is the hypercall
	 * instruction and RET, to an unused part of the hypercall page.
	 */
	insn = (uint8_t *)stub.hcall + 64;
	insn[0] = 0xfb;
	memcpy(insn + 1, (void *)stub.hcall, 4);
	stub.hcall += 64;
	GUEST_SYNC(0);

	GUEST_SYNC(hyperv_flush_tlb(&stub, &ctx->flush));
}

static void guest_elsewhere(void)
{
	GUEST_SYNC(ELSEWHERE);
}

static void guest_target(void)
{
	for (;;)
		GUEST_SYNC(0);
}

/* Flush until told to stop. */
static void guest_racer(struct guest_ctx *ctx)
{
	uint64_t status;

	hyperv_enable_hypercalls(ctx->pages);
	GUEST_SYNC(0);

	while (!READ_ONCE(ctx->stop)) {
		status = hyperv_flush_tlb(ctx->pages, &ctx->flush);
		GUEST_ASSERT_1(status == HV_STATUS_SUCCESS, status);
		WRITE_ONCE(ctx->count, ctx->count + 1);
	}
	GUEST_SYNC(0);
}

/* Skip the access to a page that is not present. */
static void guest_apf_handler(struct ex_regs *regs)
{
	GUEST_ASSERT_1(event_ctx->apf.flags == KVM_PV_REASON_PAGE_NOT_PRESENT,
		       event_ctx->apf.flags);
	event_ctx->apf.flags = 0;
	regs->rip += 2;
}

/* Start two asynchronous page faults, and flush with interrupts disabled. */
static void guest_apf_flusher(struct guest_ctx *ctx)
{
	int i;

	x2apic_enable();
	wrmsr(MSR_KVM_ASYNC_PF_INT, IRQ_VECTOR);
	wrmsr(MSR_KVM_ASYNC_PF_EN, ctx->apf_gpa | KVM_ASYNC_PF_ENABLED |
	      KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT);
	asm volatile("sti; nop");
	for (i = 0; i < 2; i++)
		/* Two bytes long, see guest_apf_handler() */
		asm volatile("movb (%%rax), %%al"
			     :: "a" (FAULT_GPA + i * PAGE_SIZE) : "memory");
	asm volatile("cli");
	guest_flusher(ctx);
}

static void guest_toucher(uint64_t *page)
{
	GUEST_SYNC(READ_ONCE(*page));
}

/* A thread that runs a vCPU until the vCPU exits to userspace */
struct runner {
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	uint64_t blocks;	/* hv_tlb_flush_blocks at start */
	pid_t tid;
	bool done;
	int ret;
	int err;
	uint64_t sync;
};

struct test_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_VCPUS];
	struct guest_ctx *ctx[NR_FLUSHERS];
	struct runner runners[NR_FLUSHERS];
	const uint32_t *vp_index;
};

static void *runner_thread(void *arg)
{
	struct runner *r = arg;
	struct kvm_run *run = r->vcpu->run;

	__atomic_store_n(&r->tid, syscall(__NR_gettid), __ATOMIC_RELEASE);

	r->ret = __vcpu_run(r->vcpu);
	r->err = errno;
	TEST_ASSERT(r->ret ? r->err == EINTR :
		    run->exit_reason == KVM_EXIT_IO || run->exit_reason == KVM_EXIT_DEBUG ||
		    run->exit_reason == KVM_EXIT_DIRTY_RING_FULL,
		    "vCPU %u: ret %d errno %d exit reason %s, expected I/O, debug, dirty ring or a signal",
		    r->vcpu->id, r->ret, r->err, exit_reason_str(run->exit_reason));

	if (!r->ret && run->exit_reason == KVM_EXIT_IO && run->io.port != STUB_PORT)
		r->sync = vcpu_get_sync(r->vcpu);

	__atomic_store_n(&r->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void runner_start(struct runner *r, struct kvm_vcpu *vcpu)
{
	memset(r, 0, sizeof(*r));
	r->vcpu = vcpu;
	r->blocks = vcpu_get_stat(vcpu, "hv_tlb_flush_blocks");
	r->thread = start_thread(runner_thread, r);
}

static void runner_join(struct runner *r)
{
	struct timespec limit;
	int err;

	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += WAIT_LIMIT_SECS;
	err = pthread_timedjoin_np(r->thread, NULL, &limit);
	TEST_ASSERT(!err,
		    "vCPU %u is still in KVM_RUN after %d s (error %d), blocked %lu times",
		    r->vcpu->id, WAIT_LIMIT_SECS, err,
		    vcpu_get_stat(r->vcpu, "hv_tlb_flush_blocks") - r->blocks);
}

/* Wait until the vCPU is blocked for the @n-th time since runner_start(). */
static void runner_wait_blocked(struct runner *r, uint64_t n)
{
	vcpu_wait_stat(r->vcpu, "hv_tlb_flush_blocks", r->blocks + n);
	TEST_ASSERT(!__atomic_load_n(&r->done, __ATOMIC_ACQUIRE),
		    "vCPU %u left KVM_RUN, ret %d errno %d, expected it to be blocked",
		    r->vcpu->id, r->ret, r->err);
}

static void runner_check_blocks(struct runner *r, uint64_t expected)
{
	uint64_t blocks = vcpu_get_stat(r->vcpu, "hv_tlb_flush_blocks") - r->blocks;

	TEST_ASSERT(blocks == expected,
		    "vCPU %u was blocked %lu times, expected %lu",
		    r->vcpu->id, blocks, expected);
}

static void runner_join_sync(struct runner *r, uint64_t sync)
{
	runner_join(r);
	TEST_ASSERT(!r->ret && r->sync == sync,
		    "vCPU %u: ret %d errno %d value %#lx, expected ret 0 value %#lx",
		    r->vcpu->id, r->ret, r->err, r->sync, sync);
}

/* Reads a file of /proc that describes the vCPU's thread. */
static void runner_read_proc(struct runner *r, const char *name, char *buf, size_t size)
{
	char path[64];
	ssize_t len;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%d/%s", r->tid, name);
	fd = open_path_or_exit(path, O_RDONLY);
	len = read(fd, buf, size - 1);
	TEST_ASSERT(len > 0, "Reading %s failed, errno %d", path, errno);
	buf[len] = 0;
	close(fd);
}

static char runner_state(struct runner *r)
{
	char buf[256], *p;

	runner_read_proc(r, "stat", buf, sizeof(buf));
	p = strrchr(buf, ')');
	TEST_ASSERT(p, "stat is malformed: %s", buf);
	return p[2];
}

static void runner_wait_asleep(struct runner *r)
{
	char state;

	__wait_for((state = runner_state(r)) == 'S',
		   "vCPU %u's thread is in state %c after %d s, expected S",
		   r->vcpu->id, state, WAIT_LIMIT_SECS);
}

/* How many times the vCPU's thread has gone to sleep */
static uint64_t runner_sleeps(struct runner *r)
{
	static const char key[] = "\nvoluntary_ctxt_switches:";
	char buf[4096], *p;

	runner_read_proc(r, "status", buf, sizeof(buf));
	p = strstr(buf, key);
	TEST_ASSERT(p, "status has no voluntary_ctxt_switches: %s", buf);
	return strtoull(p + strlen(key), NULL, 10);
}

static uint64_t runner_cpu_ns(struct runner *r)
{
	struct timespec ts;
	clockid_t clock;

	TEST_ASSERT(!pthread_getcpuclockid(r->thread, &clock) &&
		    !clock_gettime(clock, &ts), "Reading the CPU time of a thread failed");
	return timespec_to_ns(ts);
}

static void test_vm_add_vcpu(struct test_vm *t, int i, void *guest_code)
{
	t->vcpus[i] = vm_vcpu_add(t->vm, i, guest_code);
	vcpu_set_hv_cpuid(t->vcpus[i]);
	vcpu_set_msr(t->vcpus[i], HV_X64_MSR_VP_INDEX, t->vp_index[i]);
}

static void test_vm_init(struct test_vm *t, void *guest_code)
{
	vm_vaddr_t gva;
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		test_vm_add_vcpu(t, i, i < NR_FLUSHERS ? guest_code :
						(void *)guest_target);

	vm_init_descriptor_tables(t->vm);
	vm_install_exception_handler(t->vm, IRQ_VECTOR, guest_irq_handler);
	vm_install_exception_handler(t->vm, PIC_VECTOR, guest_pic_handler);
	vm_install_exception_handler(t->vm, NMI_VECTOR, guest_nmi_handler);

	for (i = 0; i < NR_FLUSHERS; i++) {
		vcpu_init_descriptor_tables(t->vcpus[i]);

		gva = vm_vaddr_alloc_page(t->vm);
		t->ctx[i] = addr_gva2hva(t->vm, gva);
		t->ctx[i]->pages = (void *)vcpu_alloc_hyperv_hcall_pages(t->vm);
		vcpu_args_set(t->vcpus[i], 1, gva);

		event_ctx = (void *)gva;
	}
	/* The context of the last flusher, to which tests send events */
	sync_global_to_guest(t->vm, event_ctx);

	for (i = 0; i < NR_VCPUS; i++)
		vcpu_run_to_sync(t->vcpus[i]);
}

static void test_vm_create(struct test_vm *t, const uint32_t *vp_index,
			   void *guest_code)
{
	memset(t, 0, sizeof(*t));
	t->vp_index = vp_index;
	t->vm = vm_create(NR_VCPUS);
	test_vm_init(t, guest_code);
}

static int __set_inhibit(struct test_vm *t, uint32_t vp_index, uint32_t owners,
			 uint32_t mask)
{
	struct kvm_hyperv_tlb_flush_inhibit inhibit = {
		.vp_index = vp_index,
		.owners = owners,
		.mask = mask,
	};

	return __vm_ioctl(t->vm, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &inhibit);
}

static void set_inhibit(struct test_vm *t, int vcpu, uint32_t owners, uint32_t mask)
{
	int r = __set_inhibit(t, t->vp_index[vcpu], owners, mask);

	TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, r));
}

static void hold(struct test_vm *t, int vcpu, uint32_t owner)
{
	set_inhibit(t, vcpu, owner, owner);
}

static void release(struct test_vm *t, int vcpu, uint32_t owner)
{
	set_inhibit(t, vcpu, 0, owner);
}

static void check_owners(struct test_vm *t, int vcpu, uint32_t expected)
{
	struct kvm_hyperv_tlb_flush_inhibit inhibit = {
		.vp_index = t->vp_index[vcpu],
	};

	vm_ioctl(t->vm, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &inhibit);
	TEST_ASSERT(inhibit.owners == expected && inhibit.mask == -1u,
		    "vCPU %d: owners %#x mask %#x, expected %#x and %#x", vcpu,
		    inhibit.owners, inhibit.mask, expected, -1u);
}

static void set_flush(struct test_vm *t, int flusher, uint16_t code, bool fast,
		      uint32_t targets)
{
	hyperv_set_flush(&t->ctx[flusher]->flush, code, fast, t->vp_index, targets);
}

static void set_plain_flush(struct test_vm *t, int flusher, uint32_t targets)
{
	set_flush(t, flusher, HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, true,
		  targets);
}

static uint64_t success(struct test_vm *t, int flusher)
{
	return hyperv_flush_success(&t->ctx[flusher]->flush);
}

static void start(struct test_vm *t, int flusher)
{
	runner_start(&t->runners[flusher], t->vcpus[flusher]);
}

/* Start a flush, which must block. */
static void start_blocked(struct test_vm *t, int flusher)
{
	start(t, flusher);
	runner_wait_blocked(&t->runners[flusher], 1);
}

/* Wait for the end of a flush, which must have been blocked @blocks times. */
static void finish(struct test_vm *t, int flusher, uint64_t blocks)
{
	runner_join_sync(&t->runners[flusher], success(t, flusher));
	runner_check_blocks(&t->runners[flusher], blocks);
}

/* Make a flush hypercall, which must not block and must return @status. */
static void flush_at_once(struct test_vm *t, int flusher, uint64_t status)
{
	start(t, flusher);
	runner_join_sync(&t->runners[flusher], status);
	runner_check_blocks(&t->runners[flusher], 0);
}

/* Make a vCPU call @function instead of what it was about to execute. */
static void set_call(struct kvm_vcpu *vcpu, void *function, uint64_t arg)
{
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	regs.rip = (uint64_t)function;
	regs.rdi = arg;
	/* As CALL leaves it: a return address on a 16-byte aligned stack. */
	regs.rsp = (regs.rsp & ~0xfULL) - 8;
	vcpu_regs_set(vcpu, &regs);
}

static void stop_by_signal(struct runner *r)
{
	pthread_kill(r->thread, SIGUSR1);
	runner_join(r);
	TEST_ASSERT(r->ret == -1 && r->err == EINTR,
		    "vCPU %u: KVM_RUN returned %d errno %d, expected -1 errno %d",
		    r->vcpu->id, r->ret, r->err, EINTR);
}

static void send_event(struct test_vm *t, int vcpu, uint32_t mode_and_vector)
{
	struct kvm_msi msi = {
		.address_lo = 0xfee00000 | vcpu << 12,
		.data = mode_and_vector,
	};
	int r = __vm_ioctl(t->vm, KVM_SIGNAL_MSI, &msi);

	TEST_ASSERT(r > 0, KVM_IOCTL_ERROR(KVM_SIGNAL_MSI, r));
}

static void check_error(struct test_vm *t, int set,
			struct kvm_hyperv_tlb_flush_inhibit inhibit, int err,
			const char *what)
{
	int r;

	if (set)
		r = __vm_ioctl(t->vm, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &inhibit);
	else
		r = __vm_ioctl(t->vm, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &inhibit);

	TEST_ASSERT(r == -1 && errno == err,
		    "%s with %s: returned %d errno %d, expected -1 errno %d",
		    set ? "SET" : "GET", what, r, errno, err);
	check_owners(t, TARGET, OWNER2);
	check_owners(t, OTHER, 0);
}

TEST(abi)
{
	struct kvm_hyperv_tlb_flush_inhibit ok, bad;
	struct kvm_vcpu *no_hyperv;
	struct test_vm t;
	int set, r;

	test_vm_create(&t, vp_maps[2], guest_flusher);

	r = vm_check_cap(t.vm, KVM_CAP_HYPERV_TLB_FLUSH_INHIBIT);
	TEST_ASSERT(r == 1, "KVM_CHECK_EXTENSION returned %d, expected 1", r);

	check_owners(&t, TARGET, 0);
	hold(&t, TARGET, OWNER2);
	check_owners(&t, TARGET, OWNER2);

	/* It has no Hyper-V context, so its VP index is its vCPU index, 4. */
	no_hyperv = vm_vcpu_add(t.vm, NR_VCPUS, guest_target);

	ok = (struct kvm_hyperv_tlb_flush_inhibit) {
		.vp_index = t.vp_index[OTHER],
		.owners = OWNER,
		.mask = OWNER,
	};

	for (set = 0; set < 2; set++) {
		bad = ok;
		bad.vp_index = 1;
		check_error(&t, set, bad, ENOENT, "an unused VP index");
		bad.vp_index = -1u;
		check_error(&t, set, bad, ENOENT, "an impossible VP index");

		bad = ok;
		bad.vp_index = no_hyperv->id;
		check_error(&t, set, bad, EINVAL, "a vCPU without Hyper-V");

		bad = ok;
		bad.flags = 1;
		check_error(&t, set, bad, EINVAL, "flags");
		bad.flags = BIT(31);
		check_error(&t, set, bad, EINVAL, "flags");

		bad = ok;
		bad.padding[0] = 1;
		check_error(&t, set, bad, EINVAL, "padding");
		bad.padding[0] = 0;
		bad.padding[1] = BIT_ULL(63);
		check_error(&t, set, bad, EINVAL, "padding");
	}

	bad = ok;
	bad.mask = 0;
	check_error(&t, true, bad, EINVAL, "owners but no mask");
	bad.owners = 0;
	check_error(&t, true, bad, EINVAL, "neither owners nor mask");
	bad.owners = OWNER | OWNER2;
	bad.mask = OWNER;
	check_error(&t, true, bad, EINVAL, "owners outside of mask");

	r = ioctl(t.vm->fd, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, NULL);
	TEST_ASSERT(r == -1 && errno == EFAULT,
		    "SET of NULL: returned %d errno %d, expected -1 errno %d",
		    r, errno, EFAULT);
	r = ioctl(t.vm->fd, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, NULL);
	TEST_ASSERT(r == -1 && errno == EFAULT,
		    "GET of NULL: returned %d errno %d, expected -1 errno %d",
		    r, errno, EFAULT);

	/* SET accepts what GET has returned, and owners are independent. */
	hold(&t, TARGET, OWNER);
	check_owners(&t, TARGET, OWNER | OWNER2);
	ok.vp_index = t.vp_index[TARGET];
	vm_ioctl(t.vm, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &ok);
	release(&t, TARGET, -1u);
	check_owners(&t, TARGET, 0);
	vm_ioctl(t.vm, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &ok);
	check_owners(&t, TARGET, OWNER | OWNER2);
	release(&t, TARGET, OWNER2);
	check_owners(&t, TARGET, OWNER);

	/* Removing an owner that is not set is not an error. */
	release(&t, TARGET, OWNER2);
	release(&t, OTHER, OWNER);
	check_owners(&t, TARGET, OWNER);
	check_owners(&t, OTHER, 0);

	kvm_vm_free(t.vm);
}

/*
 * Check that vCPU 0's flush hypercall blocks while vCPU @inhibited is
 * inhibited, and flushes no vCPU meanwhile.  After the release, it must flush
 * exactly those of TARGET and OTHER that are in @flushed.
 */
static void check_blocks(struct test_vm *t, int inhibited, uint32_t flushed)
{
	uint64_t before[NR_VCPUS], after;
	int i;

	/* KVM may flush when it maps memory, so let it map all of it first. */
	flush_at_once(t, 0, success(t, 0));
	for (i = NR_FLUSHERS; i < NR_VCPUS; i++) {
		vcpu_run_to_sync(t->vcpus[i]);
		before[i] = vcpu_get_stat(t->vcpus[i], "tlb_flush");
	}

	hold(t, inhibited, OWNER);
	start_blocked(t, 0);

	for (i = NR_FLUSHERS; i < NR_VCPUS; i++) {
		vcpu_run_to_sync(t->vcpus[i]);
		after = vcpu_get_stat(t->vcpus[i], "tlb_flush");
		TEST_ASSERT(after == before[i],
			    "vCPU %d was flushed %lu times by a blocked hypercall, expected 0",
			    i, after - before[i]);
	}

	release(t, inhibited, OWNER);
	finish(t, 0, 1);

	for (i = NR_FLUSHERS; i < NR_VCPUS; i++) {
		vcpu_run_to_sync(t->vcpus[i]);
		after = vcpu_get_stat(t->vcpus[i], "tlb_flush");
		TEST_ASSERT((after != before[i]) == !!(flushed & BIT(i)),
			    "vCPU %d was flushed %lu times, expected %s",
			    i, after - before[i],
			    flushed & BIT(i) ? "at least 1" : "0");
	}
}

static void test_forms(const uint32_t *vp_index)
{
	const uint32_t all = GENMASK(NR_VCPUS - 1, 0);
	struct hyperv_tlb_flush *flush;
	struct test_vm t;
	int i, fast;

	pin_to_cpu();
	test_vm_create(&t, vp_index, guest_flusher);
	flush = &t.ctx[0]->flush;

	for (i = 0; i < ARRAY_SIZE(hyperv_flush_codes); i++) {
		for (fast = 0; fast < 2; fast++) {
			uint16_t code = hyperv_flush_codes[i];

			/* One target; two targets; a target and the caller. */
			if (hyperv_flush_is_ex(code) || vp_index[TARGET] < 64) {
				set_flush(&t, 0, code, fast, BIT(TARGET));
				check_blocks(&t, TARGET, BIT(TARGET));
				set_flush(&t, 0, code, fast, BIT(TARGET) | BIT(OTHER));
				check_blocks(&t, TARGET, BIT(TARGET) | BIT(OTHER));
				check_blocks(&t, OTHER, BIT(TARGET) | BIT(OTHER));
			}

			if (hyperv_flush_is_ex(code) || vp_index[0] < 64) {
				set_flush(&t, 0, code, fast, BIT(0) | BIT(OTHER));
				check_blocks(&t, OTHER, BIT(OTHER));
			}

			/* All VPs; the caller's own owners are ignored. */
			set_flush(&t, 0, code, fast, hyperv_flush_is_ex(code) ? 0 : BIT(OTHER));
			flush->flags = HV_FLUSH_ALL_PROCESSORS;
			flush->format = HV_GENERIC_SET_ALL;
			check_blocks(&t, TARGET, all);
			hold(&t, 0, OWNER);
			check_blocks(&t, TARGET, all);
			flush_at_once(&t, 0, success(&t, 0));

			/* Only the caller. */
			if (hyperv_flush_is_ex(code) || vp_index[0] < 64) {
				set_flush(&t, 0, code, fast, BIT(0));
				flush_at_once(&t, 0, success(&t, 0));
			}
			release(&t, 0, OWNER);

			/* A target that is not inhibited. */
			hold(&t, TARGET, OWNER);
			set_flush(&t, 0, code, fast, BIT(OTHER));
			flush_at_once(&t, 0, success(&t, 0));

			/*
			 * TARGET is not inhibited, but its vCPU index is the
			 * VP index of OTHER, which is.
			 */
			if (vp_index[OTHER] == TARGET &&
			    (hyperv_flush_is_ex(code) || vp_index[TARGET] < 64)) {
				hold(&t, OTHER, OWNER);
				release(&t, TARGET, OWNER);
				set_flush(&t, 0, code, fast, BIT(TARGET));
				flush_at_once(&t, 0, success(&t, 0));
				release(&t, OTHER, OWNER);
				hold(&t, TARGET, OWNER);
			}

			/* No target: no bank, or a bank without VPs. */
			if (hyperv_flush_is_ex(code)) {
				set_flush(&t, 0, code, fast, 0);
				flush_at_once(&t, 0, success(&t, 0));
				flush->var_cnt = 1;
				flush->valid_bank_mask = BIT_ULL(63);
				flush->banks[0] = ~0ull;
				flush_at_once(&t, 0, success(&t, 0));
			} else {
				/* An empty mask means all VPs. */
				release(&t, TARGET, OWNER);
				set_flush(&t, 0, code, fast, 0);
				check_blocks(&t, TARGET, all);
			}
			release(&t, TARGET, OWNER);
		}
	}

	kvm_vm_free(t.vm);
	unpin_from_cpu();
}

TEST(forms)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(vp_maps); i++)
		test_forms(vp_maps[i]);
}

/* Malformed hypercalls return an error, and do not block. */
TEST(malformed)
{
	struct hyperv_hcall_pages *pages, saved;
	struct hyperv_tlb_flush *flush;
	struct test_vm t;
	int i, fast;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	flush = &t.ctx[0]->flush;
	hold(&t, TARGET, OWNER);

	for (i = 0; i < ARRAY_SIZE(hyperv_flush_codes); i++) {
		uint16_t code = hyperv_flush_codes[i];

		for (fast = 0; fast < 2; fast++) {
			set_flush(&t, 0, code, fast, BIT(TARGET));
			flush->reserved = BIT_ULL(27);
			flush_at_once(&t, 0, HV_STATUS_INVALID_HYPERCALL_INPUT);

			set_flush(&t, 0, code, fast, BIT(TARGET));
			flush->rep_cnt = !flush->rep_cnt;
			flush_at_once(&t, 0, HV_STATUS_INVALID_HYPERCALL_INPUT);

			set_flush(&t, 0, code, fast, BIT(TARGET));
			flush->rep_start = 1;
			flush_at_once(&t, 0, HV_STATUS_INVALID_HYPERCALL_INPUT);

			set_flush(&t, 0, code, fast, BIT(TARGET));
			flush->var_cnt++;
			flush_at_once(&t, 0, HV_STATUS_INVALID_HYPERCALL_INPUT);
		}

		/* Input that cannot be read. */
		pages = addr_gva2hva(t.vm, (vm_vaddr_t)t.ctx[0]->pages);
		saved = *pages;
		set_flush(&t, 0, code, false, BIT(TARGET));
		pages->input_gpa = FAULT_GPA;
		flush_at_once(&t, 0, HV_STATUS_INVALID_HYPERCALL_INPUT);
		*pages = saved;
	}

	kvm_vm_free(t.vm);
}

/*
 * Check that a blocked vCPU uses no CPU time while another vCPU exits 20 times.
 * In rare cases, KVM wakes a blocked vCPU for another reason, mostly to update
 * the guest's clock some time after another vCPU has moved to another CPU.
 * Such a wake-up causes no exit.  Therefore repeat the measurement until the
 * blocked vCPU has used no CPU time in a round.
 */
static void check_no_cpu_time(struct test_vm *t, int flusher)
{
	struct runner *r = &t->runners[flusher];
	uint64_t blocks, exits, ns, start;
	int i;

	pin_to_cpu();
	/* Until the vCPU sleeps, it may still be busy with an event. */
	runner_wait_asleep(r);
	blocks = vcpu_get_stat(r->vcpu, "hv_tlb_flush_blocks");
	exits = vcpu_get_stat(r->vcpu, "exits");

	start = now_ns();
	do {
		ns = runner_cpu_ns(r);
		for (i = 0; i < 20; i++)
			vcpu_run_to_sync(t->vcpus[OTHER]);
		ns = runner_cpu_ns(r) - ns;

		TEST_ASSERT((now_ns() - start) / NSEC_PER_SEC < WAIT_LIMIT_SECS,
			    "Blocked vCPU %u still uses CPU time after %d s, %lu ns in the last round",
			    r->vcpu->id, WAIT_LIMIT_SECS, ns);
	} while (ns);

	unpin_from_cpu();
	exits = vcpu_get_stat(r->vcpu, "exits") - exits;
	blocks = vcpu_get_stat(r->vcpu, "hv_tlb_flush_blocks") - blocks;
	TEST_ASSERT(!exits && !blocks,
		    "Blocked vCPU %u had %lu exits and %lu more blocks, expected 0 and 0",
		    r->vcpu->id, exits, blocks);
}

static void wait_progress(uint64_t *count, uint64_t from,
			  const char *what)
{
	__wait_for(READ_ONCE(*count) != from, "%s is stuck at %lu for %d s", what, from,
		   WAIT_LIMIT_SECS);
}

/*
 * Two inhibited VPs: vCPU 0 waits for one, and vCPU 1 for both.  Returns whether vCPU 1
 * stayed asleep when the first VP was released.
 */
static bool sleeps_until_last_release(struct test_vm *t)
{
	uint64_t sleeps;
	bool slept_on;

	hold(t, TARGET, OWNER);
	hold(t, OTHER, OWNER);
	start_blocked(t, 0);
	start_blocked(t, 1);
	runner_wait_asleep(&t->runners[1]);
	sleeps = runner_sleeps(&t->runners[1]);
	release(t, TARGET, OWNER);
	finish(t, 0, 1);
	runner_wait_asleep(&t->runners[1]);
	slept_on = runner_sleeps(&t->runners[1]) == sleeps;
	release(t, OTHER, OWNER);
	finish(t, 1, 1);
	return slept_on;
}

/*
 * Returns whether vCPU 0 stayed asleep during calls that leave it blocked, because TARGET
 * keeps OWNER2.
 */
static bool sleeps_through_changes(struct test_vm *t)
{
	uint64_t sleeps;

	runner_wait_asleep(&t->runners[0]);
	sleeps = runner_sleeps(&t->runners[0]);
	hold(t, OTHER, OWNER);
	hold(t, TARGET, OWNER);
	hold(t, TARGET, OWNER2);
	release(t, TARGET, OWNER);
	release(t, OTHER, OWNER);
	runner_wait_asleep(&t->runners[0]);
	return runner_sleeps(&t->runners[0]) == sleeps;
}

/* Something else may wake a vCPU, see check_no_cpu_time(), but not each time. */
static void check_sleeps_on(struct test_vm *t, bool (*sleeps_on)(struct test_vm *t),
			    const char *what)
{
	int i;

	for (i = 0; i < 20; i++) {
		if (sleeps_on(t))
			return;
	}
	TEST_FAIL("%s woke a flusher that has to wait in all of %d attempts, expected one without",
		  what, i);
}

TEST(several)
{
	struct test_vm t;

	test_vm_create(&t, vp_maps[0], guest_flusher);

	/* Two flushers, one inhibited VP. */
	set_plain_flush(&t, 0, BIT(TARGET));
	set_plain_flush(&t, 1, BIT(TARGET) | BIT(OTHER));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	start_blocked(&t, 1);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	finish(&t, 1, 1);

	check_sleeps_on(&t, sleeps_until_last_release, "The release of one of two VPs");

	/* Two owners of one VP. */
	hold(&t, TARGET, OWNER);
	hold(&t, TARGET, OWNER2);
	start_blocked(&t, 0);
	release(&t, TARGET, OWNER);
	check_no_cpu_time(&t, 0);
	check_owners(&t, TARGET, OWNER2);

	check_sleeps_on(&t, sleeps_through_changes, "A change of other owners");
	release(&t, TARGET, OWNER2);
	finish(&t, 0, 1);

	/* Two inhibited VPs flush each other. */
	set_plain_flush(&t, 0, BIT(1));
	set_plain_flush(&t, 1, BIT(0));
	hold(&t, 0, OWNER);
	hold(&t, 1, OWNER);
	start_blocked(&t, 0);
	start_blocked(&t, 1);
	release(&t, 0, OWNER);
	finish(&t, 1, 1);
	release(&t, 1, OWNER);
	finish(&t, 0, 1);

	kvm_vm_free(t.vm);
}

/*
 * A flush waits only for owners that were added before it began.  It completes
 * although its targets are inhibited at any time.
 */
TEST(rotation)
{
	static const int targets[] = { 1, TARGET, OTHER };
	struct test_vm t;
	int i;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	set_plain_flush(&t, 0, BIT(1) | BIT(TARGET) | BIT(OTHER));

	for (i = 0; i < ARRAY_SIZE(targets); i++)
		hold(&t, targets[i], OWNER);
	start_blocked(&t, 0);

	/* At each time, at least two are inhibited. */
	for (i = 0; i < ARRAY_SIZE(targets); i++) {
		runner_wait_blocked(&t.runners[0], 1);
		release(&t, targets[i], OWNER);
		hold(&t, targets[i], OWNER);
	}
	finish(&t, 0, 1);

	/* The next flush waits for those. */
	start_blocked(&t, 0);
	for (i = 0; i < ARRAY_SIZE(targets); i++) {
		runner_wait_blocked(&t.runners[0], 1);
		check_owners(&t, targets[i], OWNER);
		release(&t, targets[i], OWNER);
	}
	finish(&t, 0, 1);

	/* The same with owners of one VP, also in one step. */
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	hold(&t, TARGET, OWNER2);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	start_blocked(&t, 0);
	set_inhibit(&t, TARGET, OWNER, -1u);
	finish(&t, 0, 1);

	/* An owner that is added again is not a new one. */
	start_blocked(&t, 0);
	hold(&t, TARGET, OWNER);
	set_inhibit(&t, TARGET, OWNER | OWNER2, -1u);
	release(&t, TARGET, OWNER2);
	runner_wait_asleep(&t.runners[0]);
	runner_check_blocks(&t.runners[0], 1);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);

	/*
	 * The handler of an NMI may change page tables, so the hypercall that it
	 * returns to waits for newer owners, too.
	 */
	set_plain_flush(&t, 1, BIT(TARGET) | BIT(OTHER));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);
	hold(&t, OTHER, OWNER);
	send_event(&t, 1, APIC_DM_NMI);
	runner_wait_blocked(&t.runners[1], 2);
	release(&t, TARGET, OWNER);
	check_no_cpu_time(&t, 1);
	release(&t, OTHER, OWNER);
	finish(&t, 1, 2);

	kvm_vm_free(t.vm);
}

struct toggler {
	struct test_vm *t;
	pthread_t thread;
	uint32_t owner;
	bool stop;
};

static void *toggler_thread(void *arg)
{
	struct toggler *toggler = arg;
	struct kvm_hyperv_tlb_flush_inhibit get;
	uint32_t owner = toggler->owner;
	struct test_vm *t = toggler->t;
	int i, vcpu, on;

	/* Each owner that is added is removed. */
	for (i = 0; i & 1 || i < 4000 || !READ_ONCE(toggler->stop); i++) {
		vcpu = i & 2 ? TARGET : OTHER;
		on = i & 1;
		set_inhibit(t, vcpu, on ? 0 : owner, owner);

		get = (struct kvm_hyperv_tlb_flush_inhibit) { .vp_index = t->vp_index[vcpu] };
		vm_ioctl(t->vm, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &get);
		TEST_ASSERT(!!(get.owners & owner) == !on,
			    "Owners of vCPU %d are %#x, expected %#x to be %s",
			    vcpu, get.owners, owner, on ? "clear" : "set");
	}
	return NULL;
}

/* Threads that change different owners of the same VPs, while two vCPUs flush these. */
TEST(concurrent)
{
	struct toggler togglers[4];
	struct test_vm t;
	uint64_t blocks;
	int i;

	test_vm_create(&t, vp_maps[0], guest_racer);
	for (i = 0; i < NR_FLUSHERS; i++) {
		set_plain_flush(&t, i, BIT(TARGET) | BIT(OTHER));
		start(&t, i);
		wait_progress(&t.ctx[i]->count, 0, "A flusher");
	}

	for (i = 0; i < ARRAY_SIZE(togglers); i++) {
		togglers[i].t = &t;
		togglers[i].owner = BIT(i * 10);
		togglers[i].stop = false;
		togglers[i].thread = start_thread(toggler_thread, &togglers[i]);
	}
	/* Not only the changes, but also flushes that they block have to meet. */
	for (i = 0; i < NR_FLUSHERS; i++)
		vcpu_wait_stat(t.vcpus[i], "hv_tlb_flush_blocks",
			       t.runners[i].blocks + 20);
	for (i = 0; i < ARRAY_SIZE(togglers); i++)
		WRITE_ONCE(togglers[i].stop, true);
	for (i = 0; i < ARRAY_SIZE(togglers); i++)
		pthread_join(togglers[i].thread, NULL);

	check_owners(&t, TARGET, 0);
	check_owners(&t, OTHER, 0);
	for (i = 0; i < NR_FLUSHERS; i++) {
		wait_progress(&t.ctx[i]->count, READ_ONCE(t.ctx[i]->count), "A flusher");
		blocks = vcpu_get_stat(t.vcpus[i], "hv_tlb_flush_blocks") -
			 t.runners[i].blocks;
		pr_info("flusher %d: %lu flushes, blocked %lu times\n", i,
			READ_ONCE(t.ctx[i]->count), blocks);
		WRITE_ONCE(t.ctx[i]->stop, true);
		runner_join_sync(&t.runners[i], 0);
	}
	kvm_vm_free(t.vm);
}

static void check_hypercall_regs(struct test_vm *t, int flusher,
				 struct kvm_regs *regs)
{
	struct hyperv_hcall_pages *pages;

	pages = addr_gva2hva(t->vm, (vm_vaddr_t)t->ctx[flusher]->pages);
	TEST_ASSERT(regs->rip == pages->hcall && regs->rax == pages->hcall,
		    "RIP %#llx RAX %#llx, expected both to be the address of the hypercall, %#lx",
		    regs->rip, regs->rax, pages->hcall);
}

TEST(signals)
{
	struct kvm_mp_state mp_state;
	struct kvm_regs regs, again;
	uint64_t hypercalls, ns;
	struct test_vm t;
	int r;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);

	ns = vcpu_get_stat(t.vcpus[0], "hv_tlb_flush_blocked_ns");
	hypercalls = vcpu_get_stat(t.vcpus[0], "hypercalls");
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);

	TEST_ASSERT(vcpu_get_stat(t.vcpus[0], "hv_tlb_flush_blocked_ns") > ns,
		    "hv_tlb_flush_blocked_ns is still %lu", ns);
	vcpu_regs_get(t.vcpus[0], &regs);
	check_hypercall_regs(&t, 0, &regs);
	vcpu_mp_state_get(t.vcpus[0], &mp_state);
	TEST_ASSERT(mp_state.mp_state == KVM_MP_STATE_RUNNABLE,
		    "MP state %u, expected %u", mp_state.mp_state,
		    KVM_MP_STATE_RUNNABLE);

	/* With immediate_exit, KVM_RUN returns before the hypercall. */
	t.vcpus[0]->run->immediate_exit = 1;
	r = __vcpu_run(t.vcpus[0]);
	TEST_ASSERT(r == -1 && errno == EINTR,
		    "KVM_RUN returned %d errno %d, expected -1 errno %d",
		    r, errno, EINTR);
	t.vcpus[0]->run->immediate_exit = 0;
	runner_check_blocks(&t.runners[0], 1);

	/* The hypercall is executed again, and blocks again. */
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);
	vcpu_regs_get(t.vcpus[0], &again);
	TEST_ASSERT(!memcmp(&regs, &again, sizeof(regs)),
		    "Registers changed, RIP %#llx -> %#llx RAX %#llx -> %#llx",
		    regs.rip, again.rip, regs.rax, again.rax);

	start_blocked(&t, 0);
	ns = vcpu_get_stat(t.vcpus[0], "hypercalls");
	TEST_ASSERT(ns == hypercalls, "hypercalls is %lu, expected %lu",
		    ns, hypercalls);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	ns = vcpu_get_stat(t.vcpus[0], "hypercalls");
	TEST_ASSERT(ns == hypercalls + 1, "hypercalls is %lu, expected %lu",
		    ns, hypercalls + 1);

	/* Release the VP while the flusher is not in KVM_RUN. */
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);
	release(&t, TARGET, OWNER);
	start(&t, 0);
	finish(&t, 0, 0);

	/* Userspace changes RIP, so the hypercall is not executed again. */
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);
	set_call(t.vcpus[0], guest_elsewhere, 0);
	start(&t, 0);
	runner_join_sync(&t.runners[0], ELSEWHERE);
	runner_check_blocks(&t.runners[0], 0);

	kvm_vm_free(t.vm);
}

static void wait_count(uint64_t *count, uint64_t expected,
		       const char *what)
{
	__wait_for(READ_ONCE(*count) >= expected, "%lu %s after %d s, expected %lu",
		   *count, what, WAIT_LIMIT_SECS, expected);
	TEST_ASSERT(READ_ONCE(*count) == expected, "%lu %s, expected %lu", *count, what,
		    expected);
}

/* Check that vCPU 1 handles its NMI and is blocked again, until the release. */
static void end_after_nmi(struct test_vm *t)
{
	wait_count(&t->ctx[1]->nmis, 1, "NMIs");
	runner_wait_blocked(&t->runners[1], 2);
	check_no_cpu_time(t, 1);
	release(t, TARGET, OWNER);
	finish(t, 1, 2);
	kvm_vm_free(t->vm);
}

TEST(events)
{
	struct kvm_vcpu_events events;
	struct test_vm t;
	uint64_t i;

	test_vm_create(&t, vp_maps[0], guest_irq_flusher);
	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);
	check_no_cpu_time(&t, 1);

	/* Each event is handled, then the hypercall blocks again. */
	for (i = 1; i <= 10; i++) {
		send_event(&t, 1, APIC_DM_FIXED | IRQ_VECTOR);
		wait_count(&t.ctx[1]->irqs, i, "interrupts");
		runner_wait_blocked(&t.runners[1], 1 + i);
	}
	for (i = 1; i <= 10; i++) {
		send_event(&t, 1, APIC_DM_NMI);
		wait_count(&t.ctx[1]->nmis, i, "NMIs");
		runner_wait_blocked(&t.runners[1], 11 + i);
	}
	check_no_cpu_time(&t, 1);

	/* The event that KVM_HC_KICK_CPU sends.  It only ends HLT. */
	send_event(&t, 1, APIC_DM_REMRD);
	check_no_cpu_time(&t, 1);

	/* A stray SIPI.  The vCPU executes the hypercall once more. */
	send_event(&t, 1, APIC_DM_STARTUP | SIPI_VECTOR);
	runner_wait_blocked(&t.runners[1], 22);
	check_no_cpu_time(&t, 1);

	release(&t, TARGET, OWNER);
	finish(&t, 1, 22);
	kvm_vm_free(t.vm);

	/* A masked interrupt does not unblock the vCPU, an NMI does. */
	test_vm_create(&t, vp_maps[0], guest_masked_irq_flusher);
	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);
	send_event(&t, 1, APIC_DM_FIXED | IRQ_VECTOR);
	check_no_cpu_time(&t, 1);
	send_event(&t, 1, APIC_DM_NMI);
	end_after_nmi(&t);

	/* The interrupt shadow of STI ends when the vCPU blocks. */
	test_vm_create(&t, vp_maps[0], guest_sti_flusher);
	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);
	stop_by_signal(&t.runners[1]);
	vcpu_events_get(t.vcpus[1], &events);
	TEST_ASSERT(!events.interrupt.shadow, "interrupt shadow %#x after a signal, expected 0",
		    events.interrupt.shadow);
	start_blocked(&t, 1);
	send_event(&t, 1, APIC_DM_FIXED | IRQ_VECTOR);
	wait_count(&t.ctx[1]->irqs, 1, "interrupts");
	runner_wait_blocked(&t.runners[1], 2);
	release(&t, TARGET, OWNER);
	finish(&t, 1, 2);
	kvm_vm_free(t.vm);

	/* So does the interrupt shadow of MOV SS, which also delays an NMI. */
	test_vm_create(&t, vp_maps[0], guest_flusher);
	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);
	stop_by_signal(&t.runners[1]);
	vcpu_events_get(t.vcpus[1], &events);
	events.flags = KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING;
	events.interrupt.shadow = KVM_X86_SHADOW_INT_MOV_SS;
	events.nmi.pending = 1;
	vcpu_events_set(t.vcpus[1], &events);
	start(&t, 1);
	end_after_nmi(&t);
}

/* An interrupt of the PIC, which reaches the boot CPU only */
TEST(pic)
{
	struct test_vm t;
	uint64_t i;

	test_vm_create(&t, vp_maps[0], guest_pic_flusher);
	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);

	for (i = 1; i <= 10; i++) {
		kvm_irq_line(t.vm, 0, 1);
		kvm_irq_line(t.vm, 0, 0);
		wait_count(&t.ctx[1]->irqs, i, "interrupts");
		runner_wait_blocked(&t.runners[0], 1 + i);
	}
	check_no_cpu_time(&t, 0);

	release(&t, TARGET, OWNER);
	finish(&t, 0, 11);
	kvm_vm_free(t.vm);
}

/* With the PIC in userspace, and the local APIC in the kernel */
TEST(split_irqchip)
{
	struct kvm_interrupt interrupt = { .irq = IRQ_VECTOR };
	struct test_vm t = { .vp_index = vp_maps[0] };

	t.vm = ____vm_create(VM_MODE_DEFAULT, NR_PAGES);
	kvm_vm_elf_load(t.vm, program_invocation_name);
	vm_enable_cap(t.vm, KVM_CAP_SPLIT_IRQCHIP, 24);
	test_vm_init(&t, guest_irq_flusher);

	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	send_event(&t, 0, APIC_DM_FIXED | IRQ_VECTOR);
	wait_count(&t.ctx[1]->irqs, 1, "interrupts");
	runner_wait_blocked(&t.runners[0], 2);

	/* Userspace cannot inject an interrupt while KVM_RUN is in progress. */
	stop_by_signal(&t.runners[0]);
	vcpu_ioctl(t.vcpus[0], KVM_INTERRUPT, &interrupt);
	start_blocked(&t, 0);
	wait_count(&t.ctx[1]->irqs, 2, "interrupts");
	check_no_cpu_time(&t, 0);

	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

/* If the VP index of a vCPU changes, its owners stay, and so do those who wait for it. */
TEST(vp_index)
{
	const uint32_t *old_index = vp_maps[0];
	uint32_t new_index[NR_VCPUS];
	struct test_vm t;
	int r;

	memcpy(new_index, old_index, sizeof(new_index));
	new_index[TARGET] = 700;

	test_vm_create(&t, old_index, guest_flusher);
	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);

	vcpu_set_msr(t.vcpus[TARGET], HV_X64_MSR_VP_INDEX, new_index[TARGET]);
	r = __set_inhibit(&t, old_index[TARGET], 0, OWNER);
	TEST_ASSERT(r == -1 && errno == ENOENT, "old VP index: ret %d errno %d, expected -1 %d",
		    r, errno, ENOENT);
	t.vp_index = new_index;
	check_owners(&t, TARGET, OWNER);
	check_no_cpu_time(&t, 0);

	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);

	/* The new index names the same target. */
	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

static void check_event_counts(struct test_vm *t, uint64_t expected)
{
	TEST_ASSERT(t->ctx[1]->irqs == expected && t->ctx[1]->nmis == expected,
		    "%lu interrupts and %lu NMIs, expected %lu of each",
		    t->ctx[1]->irqs, t->ctx[1]->nmis, expected);
}

/* With KVM_GUESTDBG_BLOCKIRQ, events stay pending, and the vCPU blocked. */
TEST(blockirq)
{
	struct kvm_guest_debug debug = {
		.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_BLOCKIRQ,
	};
	struct test_vm t;

	test_vm_create(&t, vp_maps[0], guest_irq_flusher);
	vcpu_guest_debug_set(t.vcpus[1], &debug);
	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);

	send_event(&t, 1, APIC_DM_FIXED | IRQ_VECTOR);
	check_no_cpu_time(&t, 1);

	/* An NMI makes the vCPU execute the hypercall once more. */
	send_event(&t, 1, APIC_DM_NMI);
	runner_wait_blocked(&t.runners[1], 2);
	check_no_cpu_time(&t, 1);

	release(&t, TARGET, OWNER);
	finish(&t, 1, 2);
	check_event_counts(&t, 0);

	debug.control = 0;
	vcpu_guest_debug_set(t.vcpus[1], &debug);
	start(&t, 1);
	finish(&t, 1, 0);
	check_event_counts(&t, 1);
	kvm_vm_free(t.vm);
}

/* A flush that completes is one step of the guest. */
TEST(single_step)
{
	struct kvm_guest_debug debug = {
		.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
	};
	struct hyperv_hcall_pages *pages;
	struct kvm_regs regs;
	struct test_vm t;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	pages = addr_gva2hva(t.vm, (vm_vaddr_t)t.ctx[0]->pages);
	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);

	vcpu_guest_debug_set(t.vcpus[0], &debug);
	start_blocked(&t, 0);
	release(&t, TARGET, OWNER);
	runner_join(&t.runners[0]);
	TEST_ASSERT(!t.runners[0].ret && t.vcpus[0]->run->exit_reason == KVM_EXIT_DEBUG,
		    "KVM_RUN returned %d, exit reason %s, expected 0 and DEBUG",
		    t.runners[0].ret, exit_reason_str(t.vcpus[0]->run->exit_reason));

	vcpu_regs_get(t.vcpus[0], &regs);
	TEST_ASSERT(regs.rip == pages->hcall + 3 && regs.rax == success(&t, 0),
		    "RIP %#llx RAX %#llx, expected %#lx after the hypercall and %#lx",
		    regs.rip, regs.rax, pages->hcall + 3, success(&t, 0));

	debug.control = 0;
	vcpu_guest_debug_set(t.vcpus[0], &debug);
	start(&t, 0);
	finish(&t, 0, 0);
	kvm_vm_free(t.vm);
}

/*
 * Timers of SynIC whose interrupt is masked do not end the blocked state, even if one
 * expires while KVM delivers the interrupt of another.  The flush must not begin again,
 * because it would then also wait for an owner that was added meanwhile.
 */
TEST(timer)
{
	struct test_vm t;
	uint64_t wakeups;
	int i;

	test_vm_create(&t, vp_maps[0], guest_apic_flusher);
	set_plain_flush(&t, 0, BIT(OTHER) | BIT(TARGET));
	hold(&t, TARGET, OWNER);

	/* Four interrupts every ms: 10000 units of 100 ns */
	vcpu_enable_cap(t.vcpus[0], KVM_CAP_HYPERV_SYNIC2, 0);
	for (i = 0; i < 4; i++) {
		vcpu_set_msr(t.vcpus[0], HV_X64_MSR_STIMER0_COUNT + 2 * i, 10000);
		vcpu_set_msr(t.vcpus[0], HV_X64_MSR_STIMER0_CONFIG + 2 * i,
			     STIMER_DIRECT | IRQ_VECTOR << 4 | STIMER_PERIODIC | STIMER_ENABLE);
	}
	wakeups = vcpu_get_stat(t.vcpus[0], "halt_wakeup");
	start_blocked(&t, 0);
	hold(&t, OTHER, OWNER);

	vcpu_wait_stat(t.vcpus[0], "halt_wakeup", wakeups + 20);
	runner_check_blocks(&t.runners[0], 1);

	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	release(&t, OTHER, OWNER);
	kvm_vm_free(t.vm);
}

static void vcpu_start_message_timers(struct kvm_vcpu *vcpu, uint64_t simp_gpa)
{
	int i;

	vcpu_enable_cap(vcpu, KVM_CAP_HYPERV_SYNIC2, 0);
	vcpu_set_msr(vcpu, HV_X64_MSR_SCONTROL, SYNIC_ENABLE);
	vcpu_set_msr(vcpu, HV_X64_MSR_SIMP, simp_gpa | SYNIC_ENABLE);
	for (i = 0; i < 4; i++) {
		vcpu_set_msr(vcpu, HV_X64_MSR_SINT1 + i, IRQ_VECTOR);
		/* Expire every 100 ns to 400 ns. */
		vcpu_set_msr(vcpu, HV_X64_MSR_STIMER0_COUNT + 2 * i, 1 + i);
		vcpu_set_msr(vcpu, HV_X64_MSR_STIMER0_CONFIG + 2 * i,
			     STIMER_SINT(1 + i) | STIMER_PERIODIC | STIMER_ENABLE);
	}
}

/* The type of the message of one of these timers: the first word of its 256 bytes */
static uint32_t *message_type(uint8_t *simp, int timer)
{
	return (uint32_t *)(simp + 256 * (1 + timer));
}

/* Consume a message as the guest would, but without an EOM. */
static void take_message(uint8_t *simp, int timer)
{
	uint32_t *type = message_type(simp, timer);

	__wait_for(READ_ONCE(*type), "No message of timer %d in %d s", timer,
		   WAIT_LIMIT_SECS);
	WRITE_ONCE(*type, 0);
}

static bool take_messages_until_done(struct runner *r, uint8_t *simp)
{
	int i;

	for (i = 0; i < 4; i++)
		WRITE_ONCE(*message_type(simp, i), 0);
	return __atomic_load_n(&r->done, __ATOMIC_ACQUIRE);
}

/*
 * Timers that send messages, and expire faster than KVM delivers these: a blocked vCPU
 * always has one to deliver.  This neither ends the blocked state, nor keeps a release or
 * a signal from ending it.
 */
TEST(fast_timers)
{
	struct test_vm t;
	uint64_t gpa;
	uint8_t *simp;
	int i;

	test_vm_create(&t, vp_maps[0], guest_apic_flusher);
	gpa = addr_gva2gpa(t.vm, vm_vaddr_alloc_page(t.vm));
	simp = addr_gpa2hva(t.vm, gpa);
	set_plain_flush(&t, 0, BIT(OTHER) | BIT(TARGET));
	hold(&t, TARGET, OWNER);
	vcpu_start_message_timers(t.vcpus[0], gpa);

	start_blocked(&t, 0);
	for (i = 0; i < 40; i++)
		take_message(simp, i % 4);
	runner_check_blocks(&t.runners[0], 1);
	stop_by_signal(&t.runners[0]);

	start_blocked(&t, 0);
	hold(&t, OTHER, OWNER);
	for (i = 0; i < 40; i++)
		take_message(simp, i % 4);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

/*
 * The messages fill the dirty ring of a blocked vCPU.  KVM_RUN returns, and the next one
 * executes the hypercall again.
 */
TEST(dirty_ring)
{
	struct test_vm t = { .vp_index = vp_maps[0] };
	struct kvm_dirty_gfn *ring;
	struct kvm_run *run;
	uint8_t *simp;
	int i, n = 0;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_LOG_RING));
	t.vm = ____vm_create(VM_MODE_DEFAULT, NR_PAGES);
	vm_enable_dirty_ring(t.vm, RING_ENTRIES * sizeof(*ring));
	kvm_vm_elf_load(t.vm, program_invocation_name);
	vm_create_irqchip(t.vm);
	test_vm_init(&t, guest_apic_flusher);
	vm_userspace_mem_region_add(t.vm, VM_MEM_SRC_ANONYMOUS, FAULT_GPA, FAULT_SLOT, 1,
				    KVM_MEM_LOG_DIRTY_PAGES);
	simp = addr_gpa2hva(t.vm, FAULT_GPA);
	run = t.vcpus[0]->run;

	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	vcpu_start_message_timers(t.vcpus[0], FAULT_GPA);
	start_blocked(&t, 0);
	__wait_for(take_messages_until_done(&t.runners[0], simp),
		   "The dirty ring is not full after %d s", WAIT_LIMIT_SECS);
	runner_join(&t.runners[0]);
	TEST_ASSERT(!t.runners[0].ret && run->exit_reason == KVM_EXIT_DIRTY_RING_FULL,
		    "ret %d exit reason %s, expected 0 and DIRTY_RING_FULL",
		    t.runners[0].ret, exit_reason_str(run->exit_reason));
	runner_check_blocks(&t.runners[0], 1);

	ring = vcpu_map_dirty_ring(t.vcpus[0]);
	for (i = 0; i < RING_ENTRIES; i++) {
		if (ring[i].flags != KVM_DIRTY_GFN_F_DIRTY)
			continue;
		ring[i].flags = KVM_DIRTY_GFN_F_RESET;
		n++;
	}
	TEST_ASSERT(kvm_vm_reset_dirty_ring(t.vm) == n, "KVM_RESET_DIRTY_RINGS failed");
	for (i = 0; i < 4; i++)
		vcpu_set_msr(t.vcpus[0], HV_X64_MSR_STIMER0_CONFIG + 2 * i, 0);

	start_blocked(&t, 0);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

/*
 * The notification that a page is ready stays pending, because interrupts are
 * disabled.  Therefore KVM cannot send that of the second page.  Neither notification
 * ends the blocked state.
 */
TEST(async_pf)
{
	struct userspace_mem_region *region;
	struct test_vm t;
	int uffd, i;
	void *page;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	vm_userspace_mem_region_add(t.vm, VM_MEM_SRC_ANONYMOUS, FAULT_GPA,
				    FAULT_SLOT, 2, 0);
	region = memslot2region(t.vm, FAULT_SLOT);
	virt_map(t.vm, FAULT_GPA, FAULT_GPA, 2);
	uffd = uffd_register(region->host_mem, 2 * PAGE_SIZE, 0);

	vm_install_exception_handler(t.vm, PF_VECTOR, guest_apf_handler);
	t.ctx[1]->apf_gpa = addr_gva2gpa(t.vm, (vm_vaddr_t)event_ctx) +
			    offsetof(struct guest_ctx, apf);
	set_call(t.vcpus[1], guest_apf_flusher, (uint64_t)event_ctx);
	vcpu_run_to_sync(t.vcpus[1]);

	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);

	for (i = 0; i < 2; i++) {
		page = (void *)(uffd_wait_for_fault(uffd).arg.pagefault.address &
				~(PAGE_SIZE - 1ull));
		uffd_provide(uffd, page, NULL, PAGE_SIZE);
	}
	__wait_for(READ_ONCE(t.ctx[1]->apf.token), "No page is ready after %d s",
		   WAIT_LIMIT_SECS);
	for (i = 0; i < 10; i++)
		check_no_cpu_time(&t, 1);
	runner_check_blocks(&t.runners[1], 1);

	release(&t, TARGET, OWNER);
	runner_join_sync(&t.runners[1], success(&t, 1));
	close(uffd);
	kvm_vm_free(t.vm);
}

static void guest_spinner(void)
{
	/* Bochs delivers no interrupts of the host while a guest has them disabled. */
	asm volatile("sti");
	for (;;)
		cpu_relax();
}

/*
 * Run a vCPU on the CPU of this thread until it has been preempted, and return
 * whether it was reported to the guest as preempted.
 */
static bool is_reported_preempted(struct test_vm *t, int vcpu,
				  struct kvm_steal_time *st)
{
	struct runner r;
	uint64_t before;
	bool reported;

	before = vcpu_get_stat(t->vcpus[vcpu], "preemption_reported");
	set_call(t->vcpus[vcpu], guest_spinner, 0);
	pin_to_cpu();
	runner_start(&r, t->vcpus[vcpu]);
	__wait_for((reported = READ_ONCE(st->preempted)) ||
		   vcpu_get_stat(t->vcpus[vcpu], "preemption_reported") > before + 5,
		   "The vCPU was not preempted in %d s", WAIT_LIMIT_SECS);
	stop_by_signal(&r);
	unpin_from_cpu();
	return reported;
}

/* An address outside of memory is refused, and the MSR keeps its value. */
static void check_steal_time_outside(struct test_vm *t, uint64_t old)
{
	int r = _vcpu_set_msr(t->vcpus[OTHER], MSR_KVM_STEAL_TIME, FAULT_GPA | KVM_MSR_ENABLED);
	uint64_t now = vcpu_get_msr(t->vcpus[OTHER], MSR_KVM_STEAL_TIME);

	TEST_ASSERT(!r && now == old,
		    "Steal time outside of memory: KVM_SET_MSRS returned %d, expected 0; MSR %#lx, expected %#lx",
		    r, now, old);
}

/*
 * With KVM_FEATURE_PV_TLB_FLUSH, the guest leaves flushes of vCPUs that are
 * reported as preempted to KVM.
 */
TEST(steal_time)
{
	struct kvm_steal_time *st;
	uint64_t gpa, flushes;
	struct test_vm t;
	int r;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	gpa = addr_gva2gpa(t.vm, vm_vaddr_alloc_page(t.vm));
	st = addr_gpa2hva(t.vm, gpa);

	vcpu_set_msr(t.vcpus[OTHER], MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
	TEST_ASSERT(is_reported_preempted(&t, OTHER, st),
		    "Without TlbFlushInhibit, the vCPU was not reported as preempted");

	r = __set_inhibit(&t, t.vp_index[TARGET], OWNER, OWNER);
	TEST_ASSERT(r == -1 && errno == EBUSY,
		    "SET with steal time enabled: returned %d errno %d, expected -1 errno %d",
		    r, errno, EBUSY);
	check_owners(&t, TARGET, 0);

	vcpu_set_msr(t.vcpus[OTHER], MSR_KVM_STEAL_TIME, 0);
	release(&t, TARGET, OWNER);

	/* KVM cannot clear what is not there. */
	check_steal_time_outside(&t, 0);

	/* Now the guest may enable it again.  Its memory says what it said before. */
	st->preempted = KVM_VCPU_PREEMPTED;
	vcpu_set_msr(t.vcpus[OTHER], MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
	TEST_ASSERT(!st->preempted,
		    "After steal time was enabled, the vCPU is reported as preempted");
	TEST_ASSERT(!is_reported_preempted(&t, OTHER, st),
		    "With TlbFlushInhibit, the vCPU was reported as preempted");
	TEST_ASSERT(st->version, "KVM does not update the steal time");
	check_steal_time_outside(&t, gpa | KVM_MSR_ENABLED);
	hold(&t, TARGET, OWNER);
	release(&t, TARGET, OWNER);

	/* A flush that the memory asks for is not lost when KVM clears it. */
	set_call(t.vcpus[OTHER], guest_target, 0);
	pin_to_cpu();
	vcpu_run_to_sync(t.vcpus[OTHER]);
	flushes = vcpu_get_stat(t.vcpus[OTHER], "tlb_flush");
	vcpu_run_to_sync(t.vcpus[OTHER]);
	ASSERT_EQ(vcpu_get_stat(t.vcpus[OTHER], "tlb_flush"), flushes);
	st->preempted = KVM_VCPU_PREEMPTED | KVM_VCPU_FLUSH_TLB;
	vcpu_set_msr(t.vcpus[OTHER], MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
	vcpu_run_to_sync(t.vcpus[OTHER]);
	TEST_ASSERT(vcpu_get_stat(t.vcpus[OTHER], "tlb_flush") > flushes,
		    "no flush, although KVM_VCPU_FLUSH_TLB was set");

	/* Nor is one that the guest asks for later. */
	flushes = vcpu_get_stat(t.vcpus[OTHER], "tlb_flush");
	st->preempted = KVM_VCPU_FLUSH_TLB;
	vcpu_run_to_sync(t.vcpus[OTHER]);
	TEST_ASSERT(vcpu_get_stat(t.vcpus[OTHER], "tlb_flush") > flushes && !st->preempted,
		    "no flush, although the guest has set KVM_VCPU_FLUSH_TLB");
	unpin_from_cpu();
	kvm_vm_free(t.vm);
}

static struct kvm_vcpu *steal_time_vcpu;
static uint64_t steal_time_gpa;

static void *set_steal_time(void *unused)
{
	vcpu_set_msr(steal_time_vcpu, MSR_KVM_STEAL_TIME, steal_time_gpa | KVM_MSR_ENABLED);
	return NULL;
}

/* Drop a page, which userspace then has to provide, and return its contents. */
static void *drop_page(void *page)
{
	void *contents = malloc(PAGE_SIZE);

	memcpy(contents, page, PAGE_SIZE);
	TEST_ASSERT(!madvise(page, PAGE_SIZE, MADV_DONTNEED),
		    "madvise() failed, errno %d", errno);
	return contents;
}

/* Wait for the page fault at @page. */
static void wait_for_fault(int uffd, void *page)
{
	uint64_t address = uffd_wait_for_fault(uffd).arg.pagefault.address;

	TEST_ASSERT((address & ~(PAGE_SIZE - 1ull)) == (uint64_t)page,
		    "Page fault at %#lx, expected it at %p", address, page);
}

/* A migrated VM whose memory arrives after its vCPUs run */
TEST(postcopy)
{
	void *contents, *input;
	struct kvm_steal_time *st;
	pthread_t thread;
	struct test_vm t;
	int uffd;

	test_vm_create(&t, vp_maps[0], guest_flusher);
	set_flush(&t, 0, HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, false, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);
	release(&t, TARGET, OWNER);

	input = addr_gva2hva(t.vm, (vm_vaddr_t)((struct hyperv_hcall_pages *)
			addr_gva2hva(t.vm, (vm_vaddr_t)t.ctx[0]->pages))->input);
	uffd = uffd_register(input, PAGE_SIZE, 0);
	contents = drop_page(input);

	/* The flush begins when its input is there, so it waits for this owner. */
	start(&t, 0);
	wait_for_fault(uffd, input);
	hold(&t, TARGET, OWNER);
	runner_check_blocks(&t.runners[0], 0);
	uffd_provide(uffd, input, contents, PAGE_SIZE);
	runner_wait_blocked(&t.runners[0], 1);

	/* The end of the flush does not need the input. */
	free(contents);
	free(drop_page(input));
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	close(uffd);

	/* KVM clears kvm_steal_time.preempted when its page is there. */
	steal_time_vcpu = t.vcpus[OTHER];
	steal_time_gpa = addr_gva2gpa(t.vm, vm_vaddr_alloc_page(t.vm));
	st = addr_gpa2hva(t.vm, steal_time_gpa);
	st->preempted = KVM_VCPU_PREEMPTED;
	uffd = uffd_register(st, PAGE_SIZE, 0);
	contents = drop_page(st);
	thread = start_thread(set_steal_time, NULL);
	wait_for_fault(uffd, st);
	uffd_provide(uffd, st, contents, PAGE_SIZE);
	pthread_join(thread, NULL);
	TEST_ASSERT(!st->preempted, "The vCPU is reported as preempted");

	free(contents);
	close(uffd);
	kvm_vm_free(t.vm);
}

struct xen_guest {
	struct test_vm t;
	struct kvm_userspace_memory_region present, absent;
};

/* vCPU 1 has a vcpu_info in a memslot of its own, which the guest can access. */
static void xen_guest_create(struct xen_guest *x)
{
	/* Hyper-V uses the MSRs that xen.h and Xen without Hyper-V use. */
	struct kvm_xen_hvm_config config = { .msr = 0x40000200 };
	uint64_t shinfo;

	test_vm_create(&x->t, vp_maps[0], guest_irq_flusher);
	vm_install_exception_handler(x->t.vm, XEN_VECTOR, guest_xen_handler);
	vm_userspace_mem_region_add(x->t.vm, VM_MEM_SRC_ANONYMOUS, FAULT_GPA,
				    FAULT_SLOT, 1, 0);
	virt_map(x->t.vm, FAULT_GPA, FAULT_GPA, 1);
	x->present = memslot2region(x->t.vm, FAULT_SLOT)->region;
	x->absent = x->present;
	x->absent.memory_size = 0;

	vm_ioctl(x->t.vm, KVM_XEN_HVM_CONFIG, &config);
	shinfo = addr_gva2gpa(x->t.vm, vm_vaddr_alloc_page(x->t.vm));
	ASSERT_EQ(xen_set_vm_attr(x->t.vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = 1,
	}), 0);
	ASSERT_EQ(xen_set_vm_attr(x->t.vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
		.u.shared_info.gfn = shinfo >> PAGE_SHIFT,
	}), 0);
	ASSERT_EQ(xen_set_vcpu_attr(x->t.vcpus[1], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, .u.gpa = FAULT_GPA,
	}), 0);
	set_plain_flush(&x->t, 1, BIT(TARGET));
	hold(&x->t, TARGET, OWNER);
}

/* Send an event to vCPU 1, which is blocked for the @blocks-th time and must sleep on. */
static void send_to_absent(struct xen_guest *x, uint32_t port, uint64_t blocks)
{
	ASSERT_EQ(xen_send_event(x->t.vm, port, 1,
				 KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL), 0);
	check_no_cpu_time(&x->t, 1);
	runner_check_blocks(&x->t.runners[1], blocks);
}

/* The event is delivered when the memslot is back, and the flush blocks again. */
static void expect_upcall(struct xen_guest *x, uint64_t irqs, uint64_t blocks)
{
	vm_ioctl(x->t.vm, KVM_SET_USER_MEMORY_REGION, &x->present);
	wait_count(&x->t.ctx[1]->irqs, irqs, "interrupts");
	runner_wait_blocked(&x->t.runners[1], blocks);
	check_no_cpu_time(&x->t, 1);
	runner_check_blocks(&x->t.runners[1], blocks);
}

/*
 * If the vcpu_info cannot be mapped, a Xen event stays pending, and the vCPU blocked.
 * KVM tries again when memslots change.
 */
TEST(xen)
{
	struct xen_vcpu_info *info;
	struct xen_guest x;

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_XEN_HVM) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND);

	/* A vector of the local APIC */
	xen_guest_create(&x);
	ASSERT_EQ(xen_set_vcpu_attr(x.t.vcpus[1], (struct kvm_xen_vcpu_attr) {
		.type = KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, .u.vector = IRQ_VECTOR,
	}), 0);
	start_blocked(&x.t, 1);
	vm_ioctl(x.t.vm, KVM_SET_USER_MEMORY_REGION, &x.absent);
	send_to_absent(&x, XEN_PORT, 1);
	expect_upcall(&x, 1, 2);

	/* The event is pending before the vCPU is blocked. */
	stop_by_signal(&x.t.runners[1]);
	vm_ioctl(x.t.vm, KVM_SET_USER_MEMORY_REGION, &x.absent);
	ASSERT_EQ(xen_send_event(x.t.vm, XEN_PORT + 64, 1,
				 KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL), 0);
	start_blocked(&x.t, 1);
	check_no_cpu_time(&x.t, 1);
	runner_check_blocks(&x.t.runners[1], 1);
	expect_upcall(&x, 2, 2);
	release(&x.t, TARGET, OWNER);
	finish(&x.t, 1, 2);
	kvm_vm_free(x.t.vm);

	/* The vector of all vCPUs: KVM reads from the vcpu_info whether it is pending. */
	xen_guest_create(&x);
	info = addr_gpa2hva(x.t.vm, FAULT_GPA);
	ASSERT_EQ(xen_set_vm_attr(x.t.vm, (struct kvm_xen_hvm_attr) {
		.type = KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, .u.vector = XEN_VECTOR,
	}), 0);
	start_blocked(&x.t, 1);
	vm_ioctl(x.t.vm, KVM_SET_USER_MEMORY_REGION, &x.absent);
	check_no_cpu_time(&x.t, 1);
	send_to_absent(&x, XEN_PORT, 1);
	expect_upcall(&x, 1, 2);

	/* It has become pending without KVM. */
	vm_ioctl(x.t.vm, KVM_SET_USER_MEMORY_REGION, &x.absent);
	check_no_cpu_time(&x.t, 1);
	WRITE_ONCE(info->evtchn_upcall_pending, 1);
	expect_upcall(&x, 2, 3);
	release(&x.t, TARGET, OWNER);
	finish(&x.t, 1, 3);
	kvm_vm_free(x.t.vm);
}

/* Wait until the vCPU exits at the OUT of the code that SIPI or SMI starts. */
static void join_stub(struct runner *r)
{
	struct kvm_run *run = r->vcpu->run;

	runner_join(r);
	TEST_ASSERT(!r->ret && run->io.port == STUB_PORT,
		    "vCPU %u: ret %d port %#x, expected port %#x",
		    r->vcpu->id, r->ret, run->io.port, STUB_PORT);
}

TEST(init_sipi)
{
	static const uint8_t code[] = {
		0xe6, STUB_PORT,	/* out %al, $STUB_PORT */
		0xf4,			/* hlt */
	};
	struct kvm_mp_state mp_state;
	struct kvm_sregs sregs;
	vm_paddr_t page;
	struct test_vm t;
	uint64_t ns;

	memset(&t, 0, sizeof(t));
	t.vp_index = vp_maps[0];
	t.vm = ____vm_create(VM_MODE_DEFAULT, NR_PAGES);

	/* SIPI starts in low memory; allocate it before loading the program. */
	page = vm_phy_page_alloc(t.vm, SIPI_GPA, 0);
	TEST_ASSERT(page == SIPI_GPA, "Allocated page %#lx, expected %#x", page,
		    SIPI_GPA);
	memcpy(addr_gpa2hva(t.vm, page), code, sizeof(code));

	kvm_vm_elf_load(t.vm, program_invocation_name);
	vm_create_irqchip(t.vm);
	test_vm_init(&t, guest_irq_flusher);

	set_plain_flush(&t, 0, BIT(TARGET));
	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	ns = vcpu_get_stat(t.vcpus[1], "hv_tlb_flush_blocked_ns");
	start_blocked(&t, 1);

	/* INIT ends the blocked state.  vCPU 1 is not the BSP, so it waits for SIPI. */
	send_event(&t, 1, APIC_DM_INIT);
	__wait_for(vcpu_get_stat(t.vcpus[1], "hv_tlb_flush_blocked_ns") != ns,
		   "vCPU 1 is still blocked %d s after INIT", WAIT_LIMIT_SECS);
	stop_by_signal(&t.runners[1]);
	vcpu_mp_state_get(t.vcpus[1], &mp_state);
	TEST_ASSERT(mp_state.mp_state == KVM_MP_STATE_INIT_RECEIVED,
		    "MP state %u after INIT, expected %u", mp_state.mp_state,
		    KVM_MP_STATE_INIT_RECEIVED);
	start(&t, 1);
	send_event(&t, 1, APIC_DM_STARTUP | SIPI_VECTOR);
	join_stub(&t.runners[1]);
	runner_check_blocks(&t.runners[1], 0);

	vcpu_sregs_get(t.vcpus[1], &sregs);
	TEST_ASSERT(sregs.cs.base == SIPI_GPA,
		    "CS base %#llx, expected %#x", sregs.cs.base, SIPI_GPA);

	/* The BSP starts at once, at the reset vector. */
	vm_userspace_mem_region_add(t.vm, VM_MEM_SRC_ANONYMOUS, RESET_GPA & ~(PAGE_SIZE - 1ull),
				    FAULT_SLOT, 1, 0);
	memcpy(addr_gpa2hva(t.vm, RESET_GPA), code, sizeof(code));
	start_blocked(&t, 0);
	send_event(&t, 0, APIC_DM_INIT);
	join_stub(&t.runners[0]);
	runner_check_blocks(&t.runners[0], 1);
	check_owners(&t, TARGET, OWNER);
	kvm_vm_free(t.vm);
}

TEST(smi)
{
	static const uint8_t code[] = {
		0xe6, STUB_PORT,	/* out %al, $STUB_PORT */
		0x0f, 0xaa,		/* rsm */
	};
	struct test_vm t;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_X86_SMM));

	test_vm_create(&t, vp_maps[0], guest_flusher);
	vm_userspace_mem_region_add(t.vm, VM_MEM_SRC_ANONYMOUS, SMRAM_GPA,
				    SMRAM_SLOT, SMRAM_PAGES, 0);
	TEST_ASSERT(vm_phy_pages_alloc(t.vm, SMRAM_PAGES, SMRAM_GPA, SMRAM_SLOT) ==
		    SMRAM_GPA, "SMRAM is not at %#x", SMRAM_GPA);
	memcpy(addr_gpa2hva(t.vm, SMRAM_GPA) + 0x8000, code, sizeof(code));
	vcpu_set_msr(t.vcpus[1], MSR_IA32_SMBASE, SMRAM_GPA);

	set_plain_flush(&t, 1, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 1);
	send_event(&t, 1, APIC_DM_SMI);
	join_stub(&t.runners[1]);
	runner_check_blocks(&t.runners[1], 1);

	/* RSM returns to the hypercall. */
	start_blocked(&t, 1);
	release(&t, TARGET, OWNER);
	finish(&t, 1, 1);
	kvm_vm_free(t.vm);
}

TEST(save_restore)
{
	struct kvm_hyperv_tlb_flush_inhibit inhibit;
	struct kvm_x86_state *states[NR_VCPUS];
	struct test_vm t;
	int i, r;

	test_vm_create(&t, vp_maps[2], guest_flusher);
	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER | OWNER2);
	vcpu_set_msr(t.vcpus[OTHER], MSR_KVM_STEAL_TIME,
		     addr_gva2gpa(t.vm, vm_vaddr_alloc_page(t.vm)) | KVM_MSR_ENABLED);
	start_blocked(&t, 0);
	stop_by_signal(&t.runners[0]);

	inhibit = (struct kvm_hyperv_tlb_flush_inhibit) {
		.vp_index = t.vp_index[TARGET],
	};
	vm_ioctl(t.vm, KVM_HYPERV_GET_TLB_FLUSH_INHIBIT, &inhibit);
	for (i = 0; i < NR_VCPUS; i++)
		states[i] = vcpu_save_state(t.vcpus[i]);

	kvm_vm_release(t.vm);
	kvm_vm_restart(t.vm);

	for (i = 0; i < NR_VCPUS; i++) {
		t.vcpus[i] = vm_vcpu_recreate(t.vm, i);
		vcpu_set_hv_cpuid(t.vcpus[i]);
		/* Before the MSRs, i.e. with the VP index that a vCPU has at first */
		if (!i) {
			r = __set_inhibit(&t, 0, 0, -1u);
			TEST_ASSERT(!r, KVM_IOCTL_ERROR(KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, r));
		}
		vcpu_load_state(t.vcpus[i], states[i]);
		kvm_x86_state_cleanup(states[i]);
	}

	check_owners(&t, TARGET, 0);
	vm_ioctl(t.vm, KVM_HYPERV_SET_TLB_FLUSH_INHIBIT, &inhibit);
	check_owners(&t, TARGET, OWNER | OWNER2);

	start_blocked(&t, 0);
	release(&t, TARGET, -1u);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

/* Without an in-kernel local APIC, HLT exits to userspace, but flushes block. */
TEST(userspace_apic)
{
	struct test_vm t = { .vp_index = vp_maps[0] };

	t.vm = ____vm_create(VM_MODE_DEFAULT, NR_PAGES);
	kvm_vm_elf_load(t.vm, program_invocation_name);
	test_vm_init(&t, guest_flusher);

	set_plain_flush(&t, 0, BIT(TARGET));
	hold(&t, TARGET, OWNER);
	start_blocked(&t, 0);
	check_no_cpu_time(&t, 0);
	stop_by_signal(&t.runners[0]);
	start_blocked(&t, 0);
	release(&t, TARGET, OWNER);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

/* A process can be killed while one of its vCPUs is blocked. */
TEST(killed_process)
{
	struct test_vm t;
	int fds[2], status;
	pid_t pid;
	char c = 0;

	TEST_ASSERT(!pipe(fds), "pipe() failed, errno %d", errno);

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed, errno %d", errno);
	if (!pid) {
		test_vm_create(&t, vp_maps[0], guest_flusher);
		set_plain_flush(&t, 0, BIT(TARGET));
		hold(&t, TARGET, OWNER);
		start_blocked(&t, 0);
		runner_wait_asleep(&t.runners[0]);
		/* vCPU fds keep the VM alive, but nobody can release the VP. */
		close(t.vm->fd);
		test_write(fds[1], &c, 1);
		for (;;)
			pause();
	}

	/* If the child dies before it writes, test_read() fails. */
	close(fds[1]);
	test_read(fds[0], &c, 1);
	kill(pid, SIGKILL);
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status),
		    "status %#x, expected a child that was killed by a signal", status);
	close(fds[0]);
}

#define L2_STACK_SIZE	256

static void l2_guest_flusher(void)
{
	hyperv_flush_tlb(event_ctx->pages, &event_ctx->flush);
}

static void run_l2_svm(struct svm_test_data *svm, void *stack)
{
	generic_svm_setup(svm, l2_guest_flusher, stack);
	run_guest(svm->vmcb, svm->vmcb_gpa);

	GUEST_ASSERT_1(svm->vmcb->control.exit_code == SVM_EXIT_VMMCALL,
		       svm->vmcb->control.exit_code);
}

static void run_l2_vmx(struct vmx_pages *vmx, void *stack)
{
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_guest_flusher, stack);
	GUEST_ASSERT(!vmlaunch());
	GUEST_ASSERT_1(vmreadz(VM_EXIT_REASON) == EXIT_REASON_VMCALL,
		       vmreadz(VM_EXIT_REASON));
}

static void guest_l1(struct svm_test_data *svm, struct vmx_pages *vmx, struct guest_ctx *ctx)
{
	unsigned long l2_stack[L2_STACK_SIZE] __aligned(16);

	hyperv_enable_hypercalls(ctx->pages);
	if (svm)
		run_l2_svm(svm, &l2_stack[L2_STACK_SIZE - 1]);
	else
		run_l2_vmx(vmx, &l2_stack[L2_STACK_SIZE - 1]);
	GUEST_SYNC(0);

	/* L1 makes the same hypercall itself. */
	GUEST_SYNC(hyperv_flush_tlb(ctx->pages, &ctx->flush));
}

TEST(nested)
{
	vm_vaddr_t svm_gva = 0, vmx_gva = 0, ctx_gva;
	struct test_vm t;

	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_SVM) || kvm_cpu_has(X86_FEATURE_VMX));

	memset(&t, 0, sizeof(t));
	t.vp_index = vp_maps[0];
	t.vm = vm_create(2);
	test_vm_add_vcpu(&t, 0, guest_l1);
	test_vm_add_vcpu(&t, 1, guest_target);

	ctx_gva = vm_vaddr_alloc_page(t.vm);
	t.ctx[0] = addr_gva2hva(t.vm, ctx_gva);
	t.ctx[0]->pages = (void *)vcpu_alloc_hyperv_hcall_pages(t.vm);
	if (kvm_cpu_has(X86_FEATURE_SVM))
		vcpu_alloc_svm(t.vm, &svm_gva);
	else
		vcpu_alloc_vmx(t.vm, &vmx_gva);
	vcpu_args_set(t.vcpus[0], 3, svm_gva, vmx_gva, ctx_gva);
	event_ctx = (void *)ctx_gva;
	sync_global_to_guest(t.vm, event_ctx);

	set_plain_flush(&t, 0, BIT(1));
	hold(&t, 1, OWNER);
	start(&t, 0);
	runner_join_sync(&t.runners[0], 0);
	runner_check_blocks(&t.runners[0], 0);

	start_blocked(&t, 0);
	release(&t, 1, OWNER);
	finish(&t, 0, 1);
	kvm_vm_free(t.vm);
}

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(uint64_t *)a, y = *(uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Median of the time from a release to the completion of the hypercall. */
static uint64_t release_latency(struct test_vm *t)
{
	uint64_t ns[latency_rounds], hypercalls, begin;
	int i;

	for (i = 0; i < latency_rounds; i++) {
		hold(t, TARGET, OWNER);
		start_blocked(t, 0);
		runner_wait_asleep(&t->runners[0]);
		hypercalls = vcpu_get_stat(t->vcpus[0], "hypercalls");

		begin = now_ns();
		release(t, TARGET, OWNER);
		vcpu_wait_stat(t->vcpus[0], "hypercalls", hypercalls + 1);
		ns[i] = now_ns() - begin;
		finish(t, 0, 1);
	}

	qsort(ns, latency_rounds, sizeof(ns[0]), compare_u64);
	return ns[latency_rounds / 2];
}

/*
 * The test ends the page-in after the flusher has returned from KVM_RUN.  If the
 * release waited for the page-in, the test would not get that far.
 */
TEST(page_in)
{
	struct userspace_mem_region *region;
	uint64_t without, during;
	struct runner toucher;
	struct test_vm t;
	vm_vaddr_t gva;
	int uffd;

	memset(&t, 0, sizeof(t));
	t.vp_index = vp_maps[0];
	t.vm = vm_create(NR_VCPUS);
	test_vm_init(&t, guest_flusher);

	vm_userspace_mem_region_add(t.vm, VM_MEM_SRC_ANONYMOUS, FAULT_GPA,
				    FAULT_SLOT, 1, 0);
	region = memslot2region(t.vm, FAULT_SLOT);
	gva = FAULT_GPA;
	virt_pg_map(t.vm, gva, FAULT_GPA);
	uffd = uffd_register(region->host_mem, PAGE_SIZE, 0);

	set_plain_flush(&t, 0, BIT(TARGET));
	without = release_latency(&t);

	/* OTHER neither flushes nor is flushed.  It waits for a page. */
	set_call(t.vcpus[OTHER], guest_toucher, gva);
	runner_start(&toucher, t.vcpus[OTHER]);
	uffd_wait_for_fault(uffd);

	during = release_latency(&t);

	TEST_ASSERT(!__atomic_load_n(&toucher.done, __ATOMIC_ACQUIRE),
		    "The page-in ended before the test provided the page");
	uffd_provide(uffd, region->host_mem, NULL, PAGE_SIZE);
	runner_join_sync(&toucher, 0);

	pr_info("From the release to the completion of the flush, median of %lu:\n",
		latency_rounds);
	pr_info("perf: release ns %lu\n", without);
	pr_info("perf: release-during-page-in ns %lu\n", during);

	close(uffd);
	kvm_vm_free(t.vm);
}

static uint64_t flusher_blocked(struct test_vm *t, int f)
{
	return vcpu_get_stat(t->vcpus[f], "hv_tlb_flush_blocks");
}

static uint64_t flushers_blocked(struct test_vm *t)
{
	uint64_t blocks = 0;
	int f;

	for (f = 0; f < NR_FLUSHERS; f++)
		blocks += flusher_blocked(t, f);
	return blocks;
}

static void wait_random(uint64_t max_ns)
{
	uint64_t begin = now_ns(), ns = random() % max_ns;

	while (now_ns() - begin < ns)
		cpu_relax();
}

/* Add random owners of one or both targets, and remove them in the same order. */
static void toggle(struct test_vm *t, uint64_t span)
{
	static const int vcpus[] = { TARGET, OTHER };
	int nr = 1 + random() % 2, first = random() % 2, i;
	uint32_t owners[2];

	for (i = 0; i < nr; i++) {
		owners[i] = BIT(random() % 32);
		hold(t, vcpus[first ^ i], owners[i]);
	}
	for (i = 0; i < nr; i++) {
		wait_random(span);
		release(t, vcpus[first ^ i], owners[i]);
	}
}

/*
 * Add and remove owners of two VPs while two vCPUs flush these all the time.
 * Hold them for random times, up to the time of a few flushes, so that releases
 * come at any point of a flush.  A vCPU that misses a wake-up stays blocked
 * although no VP is inhibited.
 *
 * If the flushers get little CPU time, all flushes may complete between the holds.
 * Continue until at least one flush has been blocked.
 */
TEST(race)
{
	uint64_t blocks[NR_FLUSHERS] = {}, blocked, start_ns, span, begin, i;
	struct test_vm t;
	int f;

	test_vm_create(&t, vp_maps[0], guest_racer);

	/* Open the statistics, which is not possible during KVM_RUN. */
	flushers_blocked(&t);

	for (f = 0; f < NR_FLUSHERS; f++) {
		set_plain_flush(&t, f, BIT(TARGET) | BIT(OTHER));
		start(&t, f);
		wait_progress(&t.ctx[f]->count, 0, "A flusher");
	}

	/* Use the shortest of 100 times; the others may include preemption. */
	span = NSEC_PER_SEC;
	for (i = 0; i < 100; i++) {
		begin = now_ns();
		wait_progress(&t.ctx[0]->count, READ_ONCE(t.ctx[0]->count),
			      "A flusher");
		span = min(span, now_ns() - begin);
	}
	span = 4 * max(span, 1000ul);

	start_ns = now_ns();
	for (i = 0; i < toggles || !flushers_blocked(&t); i++) {
		TEST_ASSERT(i < toggles ||
			    now_ns() - start_ns < WAIT_LIMIT_SECS * NSEC_PER_SEC,
			    "No flush was blocked in %lu toggles", i);
		toggle(&t, span);

		/* The next release would hide a missed wake-up, but let it come early, too. */
		if (random() % 2)
			continue;
		/* Only a flusher that has been blocked since the last wait can miss one. */
		for (f = 0; f < NR_FLUSHERS; f++) {
			blocked = flusher_blocked(&t, f);
			if (blocked == blocks[f])
				continue;
			blocks[f] = blocked;
			wait_progress(&t.ctx[f]->count,
				      READ_ONCE(t.ctx[f]->count), "A flusher");
		}
	}

	for (f = 0; f < NR_FLUSHERS; f++)
		WRITE_ONCE(t.ctx[f]->stop, true);
	for (f = 0; f < NR_FLUSHERS; f++)
		runner_join_sync(&t.runners[f], 0);

	pr_info("%lu toggles, %lu flushes, %lu times blocked\n", i,
		t.ctx[0]->count + t.ctx[1]->count, flushers_blocked(&t));
	kvm_vm_free(t.vm);
}

/*
 * The guest changes a page table entry again and again, to point to one page
 * after the other.  It flushes the TLB after each change, with all forms of the
 * hypercall in turn.  When the flush has completed, it poisons the page that the entry
 * pointed to before.  A walk with TlbFlushInhibit must not find a poisoned page.  After the
 * flush, the caller or, in walk_reader, another running target must not read the poisoned
 * page through its TLB.
 */
#define VALID		0x600d
#define POISON		0xdead
#define NR_SWITCHED	4
#define NR_FORMS	(2 * ARRAY_SIZE(hyperv_flush_codes))

struct switcher {
	struct hyperv_tlb_flush flushes[NR_FORMS];
	bool other_writer;	/* Another vCPU changes the entry. */
	bool other_reader;	/* Another vCPU uses the entry. */
	uint64_t *page;		/* The page that the entry maps */
	uint64_t *pte;
	uint64_t ptes[NR_SWITCHED];
	uint64_t *pages[NR_SWITCHED];
	uint64_t switches;
	bool stop;
};

static void switch_page(struct switcher *s, uint64_t i)
{
	WRITE_ONCE(*s->pages[i % NR_SWITCHED], VALID);
	WRITE_ONCE(*s->pte, s->ptes[i % NR_SWITCHED]);
}

static void guest_switcher(struct guest_ctx *ctx, struct switcher *s)
{
	struct hyperv_tlb_flush *flush;
	uint64_t status, i;

	hyperv_enable_hypercalls(ctx->pages);
	/* Bochs delivers no interrupts of the host while a guest has them disabled. */
	asm volatile("sti");

	for (i = 1; !READ_ONCE(s->stop); i++) {
		if (!s->other_writer)
			switch_page(s, i);
		while (READ_ONCE(*s->pte) != s->ptes[i % NR_SWITCHED]) {
			if (READ_ONCE(s->stop))
				GUEST_SYNC(0);
			cpu_relax();
		}
		flush = &s->flushes[i % NR_FORMS];
		status = hyperv_flush_tlb(ctx->pages, flush);
		GUEST_ASSERT_1(status == hyperv_flush_success(flush), status);
		WRITE_ONCE(*s->pages[(i - 1) % NR_SWITCHED], POISON);
		if (!s->other_reader)
			GUEST_ASSERT_1(READ_ONCE(*s->page) == VALID, i);
		WRITE_ONCE(s->switches, i);
	}
	GUEST_SYNC(0);
}

/* Change the entry for guest_switcher(), which flushes when it has seen the change. */
static void guest_writer(struct switcher *s)
{
	uint64_t i;

	asm volatile("sti");
	for (i = 1; !READ_ONCE(s->stop); i++) {
		switch_page(s, i);
		while (READ_ONCE(s->switches) != i && !READ_ONCE(s->stop))
			cpu_relax();
	}
	GUEST_SYNC(0);
}

static void guest_reader(struct switcher *s)
{
	asm volatile("sti");
	while (!READ_ONCE(s->stop))
		GUEST_ASSERT_1(READ_ONCE(*s->page) == VALID, READ_ONCE(s->switches));
	GUEST_SYNC(0);
}

/*
 * Read the page table entry, and use the translation until @count() reaches
 * @until.  Returns true if the page was poisoned meanwhile.
 */
static bool walk_is_poisoned(struct test_vm *t, uint64_t *pte,
			     uint64_t (*count)(struct test_vm *t), uint64_t until)
{
	uint64_t *page = addr_gpa2hva(t->vm, READ_ONCE(*pte) & PHYSICAL_PAGE_MASK);
	uint64_t begin = now_ns();
	bool poisoned = false;

	do {
		poisoned |= READ_ONCE(*page) != VALID;
		TEST_ASSERT((now_ns() - begin) / NSEC_PER_SEC < WAIT_LIMIT_SECS,
			    "The guest is stuck, at %lu, expected %lu",
			    count(t), until);
		/* The flusher may need this CPU. */
		sched_yield();
	} while (count(t) < until);

	return poisoned || READ_ONCE(*page) != VALID;
}

static struct switcher *switcher;

static uint64_t nr_switches(struct test_vm *t)
{
	return READ_ONCE(switcher->switches);
}

static uint64_t nr_blocks(struct test_vm *t)
{
	return vcpu_get_stat(t->vcpus[0], "hv_tlb_flush_blocks");
}

/* Run @guest_other on another vCPU at the same time, unless that is NULL. */
static void test_walk(void (*guest_other)(struct switcher *s))
{
	uint64_t i, blocks, poisoned = 0, unprotected = 0;
	vm_vaddr_t ctx_gva, s_gva, page, other;
	uint64_t *pte;
	struct switcher *s;
	struct test_vm t;

	memset(&t, 0, sizeof(t));
	t.vp_index = vp_maps[0];
	t.vm = vm_create(3);
	test_vm_add_vcpu(&t, 0, guest_switcher);
	test_vm_add_vcpu(&t, 1, guest_target);
	if (guest_other)
		test_vm_add_vcpu(&t, 2, guest_other);

	ctx_gva = vm_vaddr_alloc_page(t.vm);
	t.ctx[0] = addr_gva2hva(t.vm, ctx_gva);
	t.ctx[0]->pages = (void *)vcpu_alloc_hyperv_hcall_pages(t.vm);

	/* The page whose translation changes, and the pages it changes to */
	page = vm_vaddr_alloc_page(t.vm);
	s_gva = vm_vaddr_alloc(t.vm, sizeof(*s), KVM_UTIL_MIN_VADDR);
	s = addr_gva2hva(t.vm, s_gva);
	switcher = s;
	s->other_writer = guest_other == guest_writer;
	s->other_reader = guest_other == guest_reader;
	s->page = (void *)page;
	for (i = 0; i < NR_FORMS; i++)
		hyperv_set_flush(&s->flushes[i], hyperv_flush_codes[i / 2], i % 2, t.vp_index,
				 BIT(1) | (s->other_reader ? BIT(2) : BIT(0)));
	s->pte = (void *)vm_map_page_table_entry(t.vm, t.vcpus[0], page);
	for (i = 0; i < NR_SWITCHED; i++) {
		other = vm_vaddr_alloc_page(t.vm);
		s->pages[i] = (void *)other;
		/* The walks of the CPUs should not change the entry. */
		s->ptes[i] = vm_get_page_table_entry(t.vm, t.vcpus[0], other) |
			     PTE_ACCESSED_MASK;
		*(uint64_t *)addr_gva2hva(t.vm, other) = VALID;
	}
	vm_set_page_table_entry(t.vm, t.vcpus[0], page, s->ptes[0]);
	pte = addr_gpa2hva(t.vm, addr_gva2gpa(t.vm, (vm_vaddr_t)s->pte));
	vcpu_args_set(t.vcpus[0], 2, ctx_gva, s_gva);

	if (guest_other) {
		vcpu_args_set(t.vcpus[2], 1, s_gva);
		runner_start(&t.runners[1], t.vcpus[2]);
	}
	/* Leave another CPU to the reader, which should not exit when the flusher wakes up. */
	if (s->other_reader)
		pin_to_cpu();
	start(&t, 0);

	for (i = 0; i < walks; i++) {
		/* As a control, without TlbFlushInhibit. */
		unprotected += walk_is_poisoned(&t, pte, nr_switches,
						nr_switches(&t) + 2);

		/* Use the result until the guest's next flush is blocked. */
		blocks = nr_blocks(&t);
		hold(&t, 1, OWNER);
		poisoned += walk_is_poisoned(&t, pte, nr_blocks, blocks + 1);
		release(&t, 1, OWNER);
	}

	WRITE_ONCE(s->stop, true);
	runner_join_sync(&t.runners[0], 0);
	if (guest_other)
		runner_join_sync(&t.runners[1], 0);

	pr_info("%lu walks, %lu switches, %lu times blocked, %lu walks without TlbFlushInhibit found a poisoned page\n",
		walks, s->switches, nr_blocks(&t), unprotected);
	TEST_ASSERT(!poisoned,
		    "%lu of %lu walks with TlbFlushInhibit found a poisoned page, expected none",
		    poisoned, walks);
	TEST_ASSERT(unprotected || !walks,
		    "None of %lu walks without TlbFlushInhibit found a poisoned page, expected at least one",
		    walks);
	kvm_vm_free(t.vm);
}

TEST(walk)
{
	test_walk(NULL);
}

/* Another vCPU uses the entry all the time. */
TEST(walk_reader)
{
	test_walk(guest_reader);
}

/* Another vCPU changes the entry, and the vCPU that flushes only reads it. */
TEST(walk_other_writer)
{
	test_walk(guest_writer);
}

static void no_op(int sig)
{
}

int main(int argc, char *argv[])
{
	struct sigaction action = { .sa_handler = no_op };
	int opt;

	while ((opt = getopt(argc, argv, "l:t:w:")) != -1) {
		switch (opt) {
		case 'l':
			latency_rounds = parse_size(optarg);
			break;
		case 't':
			toggles = parse_size(optarg);
			break;
		case 'w':
			walks = parse_size(optarg);
			break;
		default:
			TEST_FAIL("usage: %s [-l latency rounds] [-t toggles] [-w walks] [case...]",
				  argv[0]);
		}
	}

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_HYPERV_TLB_FLUSH_INHIBIT));
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_BINARY_STATS_FD));

	sigaction(SIGUSR1, &action, NULL);

	return run_cases(argv + optind);
}
