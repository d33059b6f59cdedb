// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test asynchronous page faults, with a page that userfaultfd provides.
 *
 *  - deliver: the guest gets a #PF with a token for the missing page, and an interrupt
 *    with the same token when the page is present.
 *  - set_msrs: the page is taken away again before KVM handles the completion, and
 *    KVM_SET_MSRS makes KVM handle it.  KVM then tries to map the page on behalf of an
 *    ioctl other than KVM_RUN.  It must not wait for the page, and changes of memslots
 *    must complete afterwards.
 *  - read_only: the process may only read the pages, but KVM's worker first asks for pages
 *    that can be written to.  The guest must get them nevertheless, also if it goes on
 *    with another page after each interrupt.
 *  - disable: the guest or userspace disables the feature while KVM's worker waits for
 *    the page.  Neither KVM_RUN nor KVM_SET_MSRS must wait for the worker.  When the
 *    feature is enabled again, the guest must be told that all pages are present.
 *  - halted: the guest cannot be told about the missing page, so KVM halts the vCPU.  When
 *    userspace then disables the feature, as for a reset, the vCPU must run again.
 *    A halt that has not begun yet, because KVM_RUN ended before it, is not tested.
 *  - enable: when the feature is enabled, the guest must be told that all pages are
 *    present, also if KVM has another page to report.
 *  - limit: with 64 workers that wait for pages which the guest does not need any more,
 *    the vCPU must wait for the next page itself, until they have ended.
 *  - destroy: as halted, but then the VM is destroyed, before or after the page is
 *    provided.
 *  - killed (with -k, nothing else): the process is killed after the feature is disabled,
 *    or while KVM_SET_MSRS waits.  It must exit, and KVM begin to destroy the VM.
 *
 * The tests run in a child process.  If an ioctl of the child never returns, not even
 * to a fatal signal, the parent reports that.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asm/kvm_para.h>
#include <linux/kvm_para.h>
#include <linux/sizes.h>

#include <test_util.h>
#include <kvm_util.h>
#include <processor.h>
#include <uffd.h>
#include <apic.h>

/* Arbitrarily chosen, above the addresses that the library uses. */
#define DATA_GPA		SZ_1G
#define OTHER_GPA		(SZ_1G + SZ_1M)
#define DATA_SLOT		100
#define OTHER_SLOT		101

#define READY_VECTOR		0x40
#define DATA_VALUE		0x600dull

/* How many workers of a vCPU may wait, see ASYNC_PF_PER_VCPU in kvm_host.h */
#define MAX_WORKERS		64
#define NR_DATA_PAGES		(MAX_WORKERS + 1)

/* The token of the interrupt that follows the activation of the feature. */
#define TOKEN_ALL		0xffffffffu

/*
 * Much longer than any step of the tests takes on a slow machine with a debug kernel.
 * A step that is not complete by then waits for something that does not happen.
 */
#define TIMEOUT_SECONDS		60

/* Stages of the guest. */
enum {
	PAGE_MISSING,	/* with the token */
	PAGE_READ,	/* with the value */
	DISABLED,
};

/* Written by KVM, and by the guest to acknowledge. */
static struct kvm_vcpu_pv_apf_data apf __aligned(64);

/* Used only by the guest. */
static uint32_t ready_token;
static bool activated;

/* Written by the host: go on with the other page after each interrupt. */
static bool alternate;

/* Written by the host: disable the feature when the next page is missing. */
static bool disable_in_guest;

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpu;
static struct kvm_vcpu_pv_apf_data *host_apf;
static size_t page_size, data_size;
static void *data, *other;
static int uffd;

/* Where the child tells the parent what it is about to do. */
static int steps;

static void guest_pf_handler(struct ex_regs *regs)
{
	uint64_t token;

	asm volatile("mov %%cr2, %0" : "=r"(token));
	GUEST_ASSERT_1(apf.flags == KVM_PV_REASON_PAGE_NOT_PRESENT, apf.flags);
	apf.flags = 0;

	GUEST_SYNC_ARGS(PAGE_MISSING, token, 0, 0, 0);

	if (READ_ONCE(disable_in_guest)) {
		wrmsr(MSR_KVM_ASYNC_PF_EN, 0);
		GUEST_SYNC(DISABLED);
	}

	while (READ_ONCE(ready_token) != token)
		guest_wait();

	/* The address that guest_code() reads. */
	if (READ_ONCE(alternate))
		regs->rdi ^= PAGE_SIZE;
}

static void guest_ready_handler(struct ex_regs *regs)
{
	uint32_t token = READ_ONCE(apf.token);

	if (token == TOKEN_ALL)
		WRITE_ONCE(activated, true);
	else
		WRITE_ONCE(ready_token, token);

	WRITE_ONCE(apf.token, 0);
	x2apic_write_reg(APIC_EOI, 0);
	wrmsr(MSR_KVM_ASYNC_PF_ACK, 1);

	guest_skip_hlt(regs);
}

static void guest_code(uint64_t apf_gpa)
{
	uint64_t gva, value;

	x2apic_enable();
	wrmsr(MSR_KVM_ASYNC_PF_INT, READY_VECTOR);
	wrmsr(MSR_KVM_ASYNC_PF_EN, apf_gpa | KVM_ASYNC_PF_ENABLED |
	      KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT);
	while (!READ_ONCE(activated))
		guest_wait();

	/* KVM uses asynchronous page faults only if interrupts are enabled. */
	asm volatile("sti");
	for (;;) {
		gva = DATA_GPA;
		asm volatile("mov (%1), %0" : "=a"(value), "+D"(gva) :: "memory");
		GUEST_SYNC_ARGS(PAGE_READ, value, 0, 0, 0);
	}
}

static void begin(const char *step)
{
	pr_debug("%s\n", step);
	/* The parent has the same strings at the same addresses. */
	TEST_ASSERT(write(steps, &step, sizeof(step)) == sizeof(step), "write(): errno %d", errno);
}

/* Run the guest until it reports @stage.  Returns what it reports. */
static uint64_t run_until(int stage)
{
	struct ucall uc;

	vcpu_run(vcpu);
	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		TEST_ASSERT(uc.args[1] == stage, "expected stage %d of the guest, got %lu",
			    stage, uc.args[1]);
		return uc.args[2];
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT_1(uc, "flags %#lx");
	default:
		TEST_FAIL("expected a ucall, got exit reason %s",
			  exit_reason_str(vcpu->run->exit_reason));
	}
}

static void set_slot(uint32_t slot, uint64_t gpa, size_t size, void *hva)
{
	vm_set_user_memory_region(vm, slot, 0, gpa, size, hva);
}

static void create_other(void)
{
	set_slot(OTHER_SLOT, OTHER_GPA, page_size, other);
}

static void delete_other(void)
{
	set_slot(OTHER_SLOT, OTHER_GPA, 0, other);
}

static bool is_fault_pending(void)
{
	struct pollfd p = { .fd = uffd, .events = POLLIN };

	return poll(&p, 1, 0) > 0;
}

/* Wait until a thread waits for the page.  Returns the thread's id. */
static pid_t wait_for_fault(void)
{
	return uffd_wait_for_fault(uffd).arg.pagefault.feat.ptid;
}

/* The thread that is in KVM_RUN, if it is not the first one */
static pid_t runner;

/* Wait until KVM's worker, which is not a thread of this process, waits for the page. */
static void wait_for_worker(void)
{
	pid_t tid = wait_for_fault();

	TEST_ASSERT(tid != gettid() && tid != READ_ONCE(runner),
		    "expected an asynchronous page fault");
}

static void provide_page_at(void *hva)
{
	uint64_t *page = aligned_alloc(page_size, page_size);

	TEST_ASSERT(page, "aligned_alloc() failed");
	memset(page, 0, page_size);
	*page = DATA_VALUE;
	uffd_provide(uffd, hva, page, page_size);
	free(page);
}

static void provide_page(void)
{
	provide_page_at(data);
}

static void drop_page(void)
{
	TEST_ASSERT(!madvise(data, data_size, MADV_DONTNEED), "madvise(): errno %d", errno);
}

/* Let the guest read the page after the interrupt with @token. */
static void finish_access(uint64_t token)
{
	uint64_t value = run_until(PAGE_READ);

	sync_global_from_guest(vm, ready_token);
	TEST_ASSERT(ready_token == token, "expected an interrupt with token %#lx, got %#x",
		    token, ready_token);
	TEST_ASSERT(value == DATA_VALUE, "expected value %#llx, got %#lx", DATA_VALUE, value);
}

static void test_deliver(void)
{
	uint64_t token;

	begin("deliver: wait for #PF");
	drop_page();
	token = run_until(PAGE_MISSING);

	begin("deliver: wait for KVM's worker");
	wait_for_worker();
	provide_page();

	begin("deliver: wait for the interrupt");
	finish_access(token);
}

struct ack {
	pid_t tid;
	bool done;
};

/* Let KVM_SET_MSRS handle the completed asynchronous page fault. */
static void *ack_worker(void *arg)
{
	struct ack *ack = arg;

	WRITE_ONCE(ack->tid, gettid());
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_ACK, 1);
	WRITE_ONCE(ack->done, true);
	return NULL;
}

/*
 * Returns true if KVM_SET_MSRS waited for the page, which is provided then.  Sets
 * @worker_waits if KVM's worker waits for the page.
 */
static bool ack(bool *worker_waits)
{
	struct ack ack = {};
	pthread_t thread;
	bool waited = false;

	thread = start_thread(ack_worker, &ack);
	while (!READ_ONCE(ack.done)) {
		if (!is_fault_pending()) {
			sched_yield();
			continue;
		}
		if (wait_for_fault() == ack.tid) {
			waited = true;
			provide_page();
		} else {
			*worker_waits = true;
		}
	}
	join_thread(thread, "KVM_SET_MSRS");
	return waited;
}

static void test_set_msrs(void)
{
	bool waited = false, worker_waits;
	useconds_t us = 1000;
	uint64_t token;

	begin("set_msrs: wait for #PF");
	drop_page();
	token = run_until(PAGE_MISSING);

	/* Readers of the memslots use the other index of kvm->srcu from now on. */
	begin("set_msrs: create a memslot before KVM_SET_MSRS");
	create_other();

	begin("set_msrs: wait for KVM's worker");
	wait_for_worker();
	do {
		/*
		 * The test cannot see when the worker has found the page.  If the page
		 * is dropped before that, the worker waits again; then give it more
		 * time.
		 */
		provide_page();
		usleep(us);
		us *= 2;
		drop_page();

		begin("set_msrs: KVM_SET_MSRS");
		worker_waits = false;
		while (!host_apf->token && !worker_waits)
			waited |= ack(&worker_waits);
	} while (!host_apf->token);
	TEST_ASSERT(host_apf->token == token, "expected token %#lx, got %#x",
		    token, host_apf->token);

	begin("set_msrs: change memslots after KVM_SET_MSRS");
	delete_other();
	create_other();
	delete_other();
	TEST_ASSERT(!waited, "expected KVM_SET_MSRS not to wait for the page");

	/* The page is missing again. */
	begin("set_msrs: wait for #PF again");
	token = run_until(PAGE_MISSING);
	wait_for_worker();
	provide_page();
	begin("set_msrs: wait for the interrupt");
	finish_access(token);
}

/* The guest is about to read a page: let it read page @nr. */
static void access_page(int nr)
{
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	regs.rdi = DATA_GPA + nr * page_size;
	vcpu_regs_set(vcpu, &regs);
}

/* Let the guest read the page. */
static void *read_worker(void *arg)
{
	uint64_t *value = arg;
	struct ucall uc;

	WRITE_ONCE(runner, gettid());
	do {
		vcpu_run(vcpu);
		TEST_ASSERT(get_ucall(vcpu, &uc) == UCALL_SYNC,
			    "expected a ucall, got exit reason %s",
			    exit_reason_str(vcpu->run->exit_reason));
	} while (uc.args[1] == PAGE_MISSING);
	*value = uc.args[2];
	return NULL;
}

static void test_read_only(bool alternating)
{
	pthread_t thread;
	uint64_t value;
	int i;

	alternate = alternating;
	sync_global_to_guest(vm, alternate);
	drop_page();
	TEST_ASSERT(!mprotect(data, data_size, PROT_READ), "mprotect(): errno %d", errno);
	thread = start_thread(read_worker, &value);
	for (i = 0; i < (alternating ? 2 : 1); i++) {
		begin("read_only: wait until a thread asks for the page");
		provide_page_at((void *)uffd_wait_for_fault(uffd).arg.pagefault.address);
	}

	begin("read_only: wait for the guest");
	join_thread(thread, "KVM_RUN");
	TEST_ASSERT(value == DATA_VALUE, "expected value %#llx, got %#lx", DATA_VALUE, value);

	TEST_ASSERT(!mprotect(data, data_size, PROT_READ | PROT_WRITE), "mprotect(): errno %d",
		    errno);
	alternate = false;
	sync_global_to_guest(vm, alternate);
}

static void *disable_worker(void *unused)
{
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, 0);
	return NULL;
}

/*
 * Give KVM's worker, or a thread, time to get to a point that the test cannot see.  If it
 * needs longer, the test proves less.
 */
static void give_time(void)
{
	usleep(100000);
}

/* Disable the feature.  Returns false if that has not ended after some time. */
static bool disable(pthread_t *thread)
{
	struct timespec limit;

	*thread = start_thread(disable_worker, NULL);
	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += TIMEOUT_SECONDS / 4;
	return !pthread_timedjoin_np(*thread, NULL, &limit);
}

/* The guest must be told that all pages are present, before it has read the page three times. */
static void expect_token_all(void)
{
	uint64_t value;
	int i;

	activated = false;
	sync_global_to_guest(vm, activated);
	for (i = 0; i < 3; i++) {
		value = run_until(PAGE_READ);
		TEST_ASSERT(value == DATA_VALUE, "expected value %#llx, got %#lx", DATA_VALUE,
			    value);
	}
	sync_global_from_guest(vm, activated);
	TEST_ASSERT(activated, "expected an interrupt with token %#x", TOKEN_ALL);
}

static void test_disable(bool by_guest)
{
	uint64_t token, enabled = vcpu_get_msr(vcpu, MSR_KVM_ASYNC_PF_EN);
	pthread_t thread;
	bool disabled;

	begin("disable: wait for #PF");
	drop_page();
	token = run_until(PAGE_MISSING);
	wait_for_worker();

	if (by_guest) {
		begin("disable: WRMSR of the guest, without the page");
		disable_in_guest = true;
		sync_global_to_guest(vm, disable_in_guest);
		run_until(DISABLED);
		disable_in_guest = false;
		sync_global_to_guest(vm, disable_in_guest);
		provide_page();
	} else {
		begin("disable: KVM_SET_MSRS");
		disabled = disable(&thread);
		provide_page();
		if (!disabled)
			join_thread(thread, "KVM_SET_MSRS");
		TEST_ASSERT(disabled, "expected KVM_SET_MSRS not to wait for the page");
	}

	give_time();
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, enabled);

	/* There is no interrupt for the page, which would end the guest's wait. */
	begin("disable: wait for the guest");
	ready_token = token;
	sync_global_to_guest(vm, ready_token);
	expect_token_all();
}

static void ignore_signal(int sig)
{
}

static void *halted_worker(void *unused)
{
	int ret;

	WRITE_ONCE(runner, gettid());
	ret = __vcpu_run(vcpu);
	TEST_ASSERT(ret == -1 && errno == EINTR, "expected EINTR, got %d, errno %d", ret, errno);
	return NULL;
}

static pthread_t start_halted(void)
{
	struct sigaction sa = { .sa_handler = ignore_signal };

	sigaction(SIGUSR1, &sa, NULL);
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, 0);
	drop_page();
	return start_thread(halted_worker, NULL);
}

/* Let KVM_RUN end with EINTR. */
static void stop_halted(pthread_t thread)
{
	vcpu->run->immediate_exit = 1;
	pthread_kill(thread, SIGUSR1);
	join_thread(thread, "KVM_RUN");
	vcpu->run->immediate_exit = 0;
}

/* With the feature disabled, let KVM halt the vCPU, and leave KVM_RUN. */
static void let_kvm_halt_vcpu(void)
{
	pthread_t thread = start_halted();

	wait_for_worker();
	give_time();
	stop_halted(thread);
}

static void test_halted(void)
{
	uint64_t value;

	begin("halted: wait for KVM's worker");
	let_kvm_halt_vcpu();
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, 0);
	provide_page();

	begin("halted: wait for the guest");
	value = run_until(PAGE_READ);
	TEST_ASSERT(value == DATA_VALUE, "expected value %#llx, got %#lx", DATA_VALUE, value);
}

static void test_enable(void)
{
	uint64_t enabled = addr_gva2gpa(vm, (vm_vaddr_t)&apf) | KVM_ASYNC_PF_ENABLED |
			   KVM_ASYNC_PF_SEND_ALWAYS | KVM_ASYNC_PF_DELIVERY_AS_INT;

	/* The guest is not told about this page. */
	begin("enable: wait for KVM's worker");
	let_kvm_halt_vcpu();
	provide_page();
	give_time();
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, enabled);

	begin("enable: wait for the guest");
	expect_token_all();

	/* Another token is in the way, until the feature is enabled again. */
	host_apf->token = 1;
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, enabled);
	run_until(PAGE_READ);
	host_apf->token = 0;
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, enabled);
	begin("enable: wait for the guest again");
	expect_token_all();
}

static void test_limit(void)
{
	pthread_t thread;
	uint64_t value;
	int i;

	for (i = 0; i < MAX_WORKERS; i++) {
		begin("limit: wait for KVM's worker");
		thread = start_halted();
		wait_for_worker();
		stop_halted(thread);
		access_page(i + 1);
	}

	/* The vCPU would leave KVM_RUN with EINTR after a signal. */
	begin("limit: wait for the vCPU");
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, 0);
	thread = start_thread(read_worker, &value);
	TEST_ASSERT(wait_for_fault() == READ_ONCE(runner),
		    "expected the vCPU to wait for the page");
	for (i = 0; i <= MAX_WORKERS; i++)
		provide_page_at(data + i * page_size);
	join_thread(thread, "KVM_RUN");
	TEST_ASSERT(value == DATA_VALUE, "expected value %#llx, got %#lx", DATA_VALUE, value);

	give_time();
	begin("limit: wait for KVM's worker again");
	let_kvm_halt_vcpu();
	provide_page();
	value = run_until(PAGE_READ);
	TEST_ASSERT(value == DATA_VALUE, "expected value %#llx, got %#lx", DATA_VALUE, value);
}

/* The process has a VM, according to debugfs. */
static bool has_vm(pid_t pid)
{
	char pattern[64];
	glob_t found;
	int ret;

	snprintf(pattern, sizeof(pattern), "/sys/kernel/debug/kvm/%d-*", pid);
	ret = glob(pattern, 0, NULL, &found);
	globfree(&found);
	return !ret;
}

static void *destroy_worker(void *unused)
{
	kvm_vm_free(vm);
	return NULL;
}

static void test_destroy(void)
{
	bool debugfs = has_vm(getpid());
	pthread_t thread;

	begin("destroy: wait for KVM's worker");
	let_kvm_halt_vcpu();
	vcpu_set_msr(vcpu, MSR_KVM_ASYNC_PF_EN, 0);

	begin("destroy: wait for the end of the VM");
	thread = start_thread(destroy_worker, NULL);
	if (debugfs)
		wait_for(!has_vm(getpid()));
	give_time();
	TEST_ASSERT(pthread_tryjoin_np(thread, NULL) == EBUSY,
		    "expected the destruction to wait for KVM's worker");
	provide_page();
	join_thread(thread, "destruction of the VM");
}

static void create_vm(void)
{
	vm = vm_create_with_one_vcpu(&vcpu, guest_code);
	ucall_init(vm, NULL);
	page_size = getpagesize();
	data_size = NR_DATA_PAGES * page_size;
	data = mmap(NULL, data_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	other = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(data != MAP_FAILED && other != MAP_FAILED, "mmap() failed: %d", errno);
	set_slot(DATA_SLOT, DATA_GPA, data_size, data);
	virt_map(vm, DATA_GPA, DATA_GPA, data_size / vm->page_size);
	uffd = uffd_register(data, data_size, UFFD_FEATURE_THREAD_ID);

	vm_init_descriptor_tables(vm);
	vcpu_init_descriptor_tables(vcpu);
	vm_install_exception_handler(vm, PF_VECTOR, guest_pf_handler);
	vm_install_exception_handler(vm, READY_VECTOR, guest_ready_handler);
	vcpu_args_set(vcpu, 1, addr_gva2gpa(vm, (vm_vaddr_t)&apf));
	host_apf = addr_gva2hva(vm, (vm_vaddr_t)&apf);
}

static void run_killed(void)
{
	pthread_t thread;

	create_vm();
	__TEST_REQUIRE(has_vm(getpid()), "needs debugfs");
	run_until(PAGE_MISSING);
	wait_for_worker();
	disable(&thread);
	kill(getpid(), SIGKILL);
}

static int test_killed(void)
{
	struct pollfd p = { .events = POLLIN };
	pid_t child = fork();
	int status;

	TEST_ASSERT(child >= 0, "fork(): errno %d", errno);
	if (!child)
		run_killed();

	p.fd = syscall(SYS_pidfd_open, child, 0);
	TEST_ASSERT(p.fd >= 0, "pidfd_open(): errno %d", errno);
	TEST_ASSERT(poll(&p, 1, TIMEOUT_SECONDS * 1000) == 1,
		    "the process has not exited after %d s", TIMEOUT_SECONDS);
	TEST_ASSERT(waitpid(child, &status, 0) == child, "waitpid(): errno %d", errno);
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	TEST_ASSERT(WTERMSIG(status) == SIGKILL, "killed by signal %d", WTERMSIG(status));
	wait_for(!has_vm(child));
	return 0;
}

static void run_tests(void)
{
	create_vm();
	test_read_only(true);
	test_read_only(false);
	/* Page faults on the same page must be asynchronous again. */
	test_deliver();
	test_set_msrs();
	test_disable(false);
	test_disable(true);
	test_halted();
	test_enable();
	test_limit();
	test_destroy();
}

int main(int argc, char *argv[])
{
	const char *step = "start";
	int status, fds[2], ret;
	struct pollfd p;
	pid_t child;
	int opt;

	setbuf(stdout, NULL);
	TEST_REQUIRE(kvm_cpu_has(X86_FEATURE_KVM_ASYNC_PF_INT));

	opt = getopt(argc, argv, "hk");
	if (opt == 'k')
		return test_killed();
	if (opt != -1) {
		printf("usage: %s [-h] [-k]\n", program_invocation_short_name);
		printf(" -k: only kill a process whose worker waits for a page\n");
		return opt == 'h' ? 0 : 1;
	}

	TEST_ASSERT(!pipe(fds), "pipe(): errno %d", errno);

	child = fork();
	TEST_ASSERT(child >= 0, "fork(): errno %d", errno);
	if (!child) {
		close(fds[0]);
		steps = fds[1];
		run_tests();
		exit(0);
	}

	close(fds[1]);
	p = (struct pollfd){ .fd = fds[0], .events = POLLIN };
	do {
		ret = poll(&p, 1, TIMEOUT_SECONDS * 1000);
		if (ret <= 0)
			kill(child, SIGKILL);
		TEST_ASSERT(ret > 0, "%s: not complete after %d s", step, TIMEOUT_SECONDS);
	} while (read(fds[0], &step, sizeof(step)) == sizeof(step));

	TEST_ASSERT(waitpid(child, &status, 0) == child, "waitpid(): errno %d", errno);
	TEST_ASSERT(WIFEXITED(status), "%s: the child was killed, status %#x", step, status);
	return WEXITSTATUS(status);
}
