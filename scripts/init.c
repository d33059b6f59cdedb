// SPDX-License-Identifier: GPL-2.0
/*
 * PID 1 of the test machine.
 *
 * Runs the tests listed in /tests one after another and writes TAP to the
 * virtio-serial port named "tap", or to ttyS1 if there is none.  The plan
 * ("1..N") is the verdict: it is written last, after the leak scan and the end
 * of the kernel log.  A machine that panics, hangs or is stopped never writes a
 * plan, so TAP without a plan is a failure.  The kernel log goes to the port
 * named "kmsg", or to ttyS2.
 *
 * A line of /tests has three fields, separated by tabs: timeout in seconds (1 to
 * 86400), name, command with arguments.
 *
 * A test passes with exit code 0 and a clean kernel log, is skipped with exit
 * code 4 (KSFT_SKIP), and fails otherwise.  When its time is over, the test and
 * all its children are killed; the TAP shows where its threads stood.
 *
 * A test that uses kselftest_harness.h has cases, and prints TAP itself.  PID 1 turns
 * each of its points into a point NAME@CASE, and checks its plan.  The timeout is that
 * of each case.  When it is over, the TAP shows the threads.  The test has to end the case
 * GRACE seconds later (TEST_TIMEOUT in its environment), or PID 1 ends the test.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <regex.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define KSFT_SKIP	4
#define GRACE		5	/* seconds that a test has to end a case */
#define SPLAT_LINES	40	/* of the kernel log from the first splat on, as diagnostics */
#define PREEMPT_MODEL	"/sys/kernel/debug/sched/preempt"

/* Lines of the kernel log that no healthy run prints. */
static const char splat_pattern[] =
	"WARNING:|BUG:|BUG at|Oops|Kernel panic|Call [Tt]race:|KASAN:|UBSAN:|"
	"ODEBUG:|refcount_t:|general protection fault|Unable to handle kernel|"
	"possible .*(deadlock|locking dependency|recursive locking)|"
	"suspicious RCU usage|rcu: INFO: .*stall|detected stall|"
	"INFO: task .* blocked for more|soft lockup|hard LOCKUP|"
	"kmemleak: [0-9]+ new suspected|unreferenced object|"
	"Workqueue lockup|sleeping function called|Bad page state|page allocation failure";

static int tap_fd = STDOUT_FILENO;
static int kmsg_fd = -1;
static FILE *log_file;
static int points;
static regex_t splat_re;

static void tap(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static void tap(const char *fmt, ...)
{
	char line[4096];
	const char *p = line;
	va_list ap;
	int len;

	va_start(ap, fmt);
	len = vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (len >= (int)sizeof(line))
		len = sizeof(line) - 1;

	while (len > 0) {
		ssize_t n = write(tap_fd, p, len);

		if (n < 0 && errno != EINTR && errno != EAGAIN)
			return;
		if (n > 0) {
			p += n;
			len -= n;
		}
	}
}

static void point(bool ok, const char *name, const char *directive)
{
	tap("%sok %d - %s%s%s\n", ok ? "" : "not ", ++points, name,
	    *directive ? " # " : "", directive);
}

/* The host sees a TAP without a plan, and the reason. */
static void give_up(const char *what)
{
	tap("Bail out! init: %s: %s\n", what, strerror(errno));
	fprintf(stderr, "init: %s: %s\n", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	_exit(1);
}

static void mount_at(const char *type, const char *dir, bool required)
{
	mkdir(dir, 0755);
	if (mount(type, dir, type, 0, NULL) && errno != EBUSY && required)
		give_up(dir);
}

static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return ok;
}

static bool read_line(const char *path, char *buf, size_t size)
{
	FILE *f = fopen(path, "re");
	bool ok = f && fgets(buf, size, f);

	if (f)
		fclose(f);
	if (ok)
		buf[strcspn(buf, "\n")] = '\0';
	return ok;
}

static int open_serial(const char *path)
{
	int fd = open(path, O_WRONLY | O_NOCTTY | O_CLOEXEC);
	struct termios tio;

	if (fd >= 0 && !tcgetattr(fd, &tio)) {
		cfmakeraw(&tio);
		tio.c_cflag |= CLOCAL;
		cfsetspeed(&tio, B115200);
		tcsetattr(fd, TCSANOW, &tio);
		return fd;
	}
	return -1;
}

/*
 * Without udev, the port's name is only in sysfs.  A machine without virtio has a
 * serial port in its place.
 */
static int open_port(const char *wanted, const char *serial)
{
	DIR *dir = opendir("/sys/class/virtio-ports");
	struct dirent *de;
	int fd = -1;

	while (dir && fd < 0 && (de = readdir(dir))) {
		char path[512], name[64];

		snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", de->d_name);
		if (!read_line(path, name, sizeof(name)) || strcmp(name, wanted))
			continue;
		snprintf(path, sizeof(path), "/dev/%s", de->d_name);
		fd = open(path, O_WRONLY | O_CLOEXEC);
	}
	if (dir)
		closedir(dir);
	return fd < 0 ? open_serial(serial) : fd;
}

static bool is_splat(const char *line)
{
	return !regexec(&splat_re, line, 0, NULL, 0);
}

/* Pass a record on to the host, in the form of the console. */
static void log_record(const char *rec, const char *text)
{
	unsigned long long usec = 0;

	sscanf(rec, "%*u,%*u,%llu", &usec);
	fprintf(log_file, "[%5llu.%06llu] %s\n", usec / 1000000, usec % 1000000, text);
}

/*
 * Read what the kernel logged since the last call.  Returns the number of
 * splat lines and copies the first one; it, the record before it, which often says
 * what a "Call Trace:" is of, and those after it are among the diagnostics.  Lost
 * records (-EPIPE) count as one: what could not be read cannot be called clean.
 */
static int scan_kmsg(char *first, size_t size)
{
	static char before[1024];
	char rec[8192];
	int splats = 0, more = 0;

	for (;;) {
		ssize_t n = read(kmsg_fd, rec, sizeof(rec) - 1);
		char *text;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EPIPE) {
			if (!splats++)
				snprintf(first, size, "kernel log overrun");
			continue;
		}
		if (n <= 0) {
			fflush(log_file);
			return splats;
		}

		rec[n] = '\0';
		text = strchr(rec, ';');
		text = text ? text + 1 : rec;
		text[strcspn(text, "\n")] = '\0';
		log_record(rec, text);
		if (is_splat(text) && !splats++) {
			snprintf(first, size, "%.*s", (int)size - 1, text);
			tap("# log: %s\n", before);
			more = SPLAT_LINES;
		}
		if (more && more--)
			tap("# log: %s\n", text);
		snprintf(before, sizeof(before), "%.*s", (int)sizeof(before) - 1, text);
	}
}

/*
 * Marks the place in the kernel log.  A record that does not end with a newline cannot
 * be read before the next record begins, so this also makes the last message of a test
 * readable.
 */
static void mark_log(const char *what, const char *name)
{
	char line[512];

	snprintf(line, sizeof(line), "init: %s %s\n", what, name);
	write_file("/dev/kmsg", line);
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

/* Pass the lines of a file on, indented.  Returns how many, or -1 without file. */
static int show_file(const char *path, const char *indent)
{
	FILE *f = fopen(path, "re");
	char line[1024];
	int lines = 0;

	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		lines++;
		line[strcspn(line, "\n")] = '\0';
		tap("# %s%s\n", indent, line);
	}
	fclose(f);
	return lines;
}

static void show_thread(const char *process, const char *thread)
{
	char path[600], text[512];

	snprintf(path, sizeof(path), "/proc/%s/task/%s/stat", process, thread);
	if (read_line(path, text, sizeof(text)))
		tap("# thread %s\n", text);
	snprintf(path, sizeof(path), "/proc/%s/task/%s/syscall", process, thread);
	show_file(path, "  ");
	snprintf(path, sizeof(path), "/proc/%s/task/%s/stack", process, thread);
	show_file(path, "  ");
}

/*
 * Show where each thread of the test stands: its state, system call and kernel
 * stack.  Kernel threads are left out; they have no command line.
 */
static void show_threads(void)
{
	struct dirent *process, *thread;
	char path[512], text[512];
	DIR *processes, *threads;

	processes = opendir("/proc");
	while (processes && (process = readdir(processes))) {
		if (!isdigit(process->d_name[0]) || !strcmp(process->d_name, "1"))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/cmdline", process->d_name);
		if (!read_line(path, text, sizeof(text)))
			continue;

		snprintf(path, sizeof(path), "/proc/%s/task", process->d_name);
		threads = opendir(path);
		while (threads && (thread = readdir(threads))) {
			if (isdigit(thread->d_name[0]))
				show_thread(process->d_name, thread->d_name);
		}
		if (threads)
			closedir(threads);
	}
	if (processes)
		closedir(processes);
}

/* Kill the processes that a test left behind, and wait until only PID 1 is left. */
static void kill_leftovers(void)
{
	kill(-1, SIGKILL);
	while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
		;
}

static void exec_test(char *command, int out)
{
	char *argv[64];
	int argc = 0;
	char *arg;

	setsid();
	dup2(out, STDOUT_FILENO);
	dup2(out, STDERR_FILENO);
	for (arg = strtok(command, " "); arg && argc < 63; arg = strtok(NULL, " "))
		argv[argc++] = arg;
	argv[argc] = NULL;
	execv(argv[0], argv);
	fprintf(stderr, "init: cannot run %s: %s\n", argv[0], strerror(errno));
	_exit(127);
}

/* The test that runs */
static struct {
	const char *name;
	long timeout;
	double deadline;
	char reason[512];	/* the last line that gives a reason to skip */
	unsigned int planned, cases;
	char running[256];	/* the case as the test names it, or empty */
	char point[448];	/* and as its point is named */
	double start;		/* of the case */
} test;

static double begin(const char *name)
{
	tap("# begin %s\n", name);
	mark_log("begin", name);
	return now();
}

/* A splat since begin() is a failure. */
static void end(bool ok, const char *name, double start, const char *skipped)
{
	char splat[1024] = "", directive[1200] = "";

	mark_log("end", name);
	if (skipped)
		snprintf(directive, sizeof(directive), "SKIP %s", skipped);
	if (scan_kmsg(splat, sizeof(splat))) {
		tap("# splat: %s\n", splat);
		directive[0] = '\0';
		ok = false;
	}
	tap("# time %.2f\n", now() - start);
	point(ok, name, directive);
}

static void begin_case(const char *name)
{
	const char *dot = strrchr(name, '.');

	snprintf(test.running, sizeof(test.running), "%s", name);
	snprintf(test.point, sizeof(test.point), "%s@%s", test.name, dot ? dot + 1 : name);
	test.cases++;
	test.start = begin(test.point);
	test.deadline = test.start + test.timeout;
}

static void end_case(bool ok, const char *skipped)
{
	end(ok, test.point, test.start, skipped);
	test.running[0] = '\0';
	test.deadline = now() + test.timeout;
	/* What follows is in the log of the test. */
	tap("# begin %s\n", test.name);
}

/* The end of a case: "ok N NAME", "not ok N NAME", or "ok N # SKIP REASON" */
static void find_result(const char *line)
{
	bool ok = strncmp(line, "not ", 4);
	int len = 0;

	line += ok ? 0 : 4;
	sscanf(line, "ok %*u %n", &len);
	if (len && ok && !strncmp(line + len, "# SKIP ", 7))
		end_case(true, line + len + 7);
	else if (len && !strcmp(line + len, test.running))
		end_case(ok, NULL);
}

static void end_line(char *line, size_t *len)
{
	char name[256];

	line[*len] = '\0';
	*len = 0;
	if (sscanf(line, "# RUN %255s ...", name) == 1) {
		/* There was no result, which is a failure. */
		if (*test.running)
			end_case(false, NULL);
		begin_case(name);
	}
	tap("# %s\n", line);
	if (strcasestr(line, "skip") || strcasestr(line, "requirement"))
		snprintf(test.reason, sizeof(test.reason), "%.511s", line);
	if (*test.running)
		find_result(line);
	else
		sscanf(line, "1..%u", &test.planned);
}

/*
 * Copy the output of a test as TAP comments until it closes its end of the
 * pipe.  Returns false when the time is over first.
 */
static bool copy_output(int fd)
{
	char buf[4096], line[1024];
	double extended = 0;
	size_t len = 0;
	ssize_t i, n;

	for (;;) {
		struct pollfd pfd = { .fd = fd, .events = POLLIN };
		double left = test.deadline - now();

		if (left <= 0) {
			if (!*test.running || test.deadline == extended)
				return false;
			show_threads();
			test.deadline += 2 * GRACE;
			extended = test.deadline;
			continue;
		}
		if (poll(&pfd, 1, (int)(left * 1000) + 1) <= 0)
			continue;
		n = read(fd, buf, sizeof(buf));
		if (n <= 0)
			break;
		for (i = 0; i < n; i++) {
			if (buf[i] != '\n') {
				if (len < sizeof(line) - 1)
					line[len++] = buf[i];
				continue;
			}
			end_line(line, &len);
		}
	}
	if (len)
		end_line(line, &len);
	return true;
}

static void run_test(long timeout, const char *name, char *command)
{
	const char *skipped = NULL;
	bool ok = false, in_time;
	int fds[2], status;
	char text[32];
	double start;
	pid_t pid;

	memset(&test, 0, sizeof(test));
	test.name = name;
	test.timeout = timeout;
	strcpy(test.reason, "no reason given");
	snprintf(text, sizeof(text), "%ld", timeout + GRACE);
	setenv("TEST_TIMEOUT", text, 1);

	start = begin(name);
	test.deadline = start + timeout;
	if (pipe2(fds, O_CLOEXEC))
		give_up("pipe2");
	pid = fork();
	if (pid < 0)
		give_up("fork");
	if (!pid)
		exec_test(command, fds[1]);

	close(fds[1]);
	in_time = copy_output(fds[0]);
	if (!in_time) {
		show_threads();
		kill(pid, SIGKILL);
	}
	waitpid(pid, &status, 0);
	close(fds[0]);
	kill_leftovers();
	if (*test.running)
		end_case(false, NULL);

	if (!in_time) {
		tap("# killed: not done after %ld s\n", timeout);
	} else if (WIFSIGNALED(status)) {
		tap("# killed by signal %d (%s)\n", WTERMSIG(status),
		    strsignal(WTERMSIG(status)));
	} else if (WEXITSTATUS(status) == KSFT_SKIP && !test.cases) {
		ok = true;
		skipped = test.reason;
	} else if (WEXITSTATUS(status)) {
		tap("# exit code %d\n", WEXITSTATUS(status));
	} else if (test.cases && test.cases != test.planned) {
		tap("# cases: %u, planned: %u\n", test.cases, test.planned);
	} else {
		ok = true;
	}
	end(ok, name, start, skipped);
}

static void run_tests(void)
{
	FILE *f = fopen("/tests", "re");
	char line[4096];

	if (!f)
		give_up("/tests");
	while (fgets(line, sizeof(line), f)) {
		char *save, *timeout, *name, *command;

		line[strcspn(line, "\n")] = '\0';
		timeout = strtok_r(line, "\t", &save);
		name = strtok_r(NULL, "\t", &save);
		command = strtok_r(NULL, "\t", &save);
		errno = EINVAL;
		if (!command || atol(timeout) < 1 || atol(timeout) > 86400)
			give_up("/tests: want timeout, name, command");
		run_test(atol(timeout), name, command);
	}
	fclose(f);
}

/*
 * Each CPU keeps two stacks of ended tasks for new tasks, and kmemleak treats what is
 * on them as references.  One stale pointer to a tree whose nodes point to each other
 * hides the leak of the whole tree.  Linux clears a stack when a task gets it, so start
 * more than two tasks on each CPU at the same time.
 */
static void clear_cached_stacks(void)
{
	pid_t pids[4];
	cpu_set_t set;
	size_t i, cpu;
	int fds[2];
	char c;

	for (cpu = 0; cpu < (size_t)sysconf(_SC_NPROCESSORS_ONLN); cpu++) {
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
		if (sched_setaffinity(0, sizeof(set), &set) || pipe2(fds, O_CLOEXEC))
			give_up("clear_cached_stacks");
		for (i = 0; i < sizeof(pids) / sizeof(*pids); i++) {
			pids[i] = fork();
			if (pids[i] < 0)
				give_up("fork");
			if (!pids[i]) {
				close(fds[1]);
				_exit(read(fds[0], &c, 1));
			}
		}
		close(fds[1]);
		close(fds[0]);
		for (i = 0; i < sizeof(pids) / sizeof(*pids); i++)
			waitpid(pids[i], NULL, 0);
	}
}

/*
 * kmemleak reports only objects that are older than five seconds and that two scans in
 * a row found unreferenced.  The age is the reason to sleep.
 */
static void check_leaks(void)
{
	static const char path[] = "/sys/kernel/debug/kmemleak";
	int i;

	if (access(path, F_OK))
		return;

	tap("# begin no leak\n");
	clear_cached_stacks();
	sleep(6);
	for (i = 0; i < 2; i++) {
		/* A scan takes long; say that the machine is alive. */
		tap("# scan\n");
		if (!write_file(path, "scan"))
			give_up(path);
	}
	point(!show_file(path, ""), "no leak", "");
}

/*
 * x86 boots with clock source tsc-early and changes to tsc when the TSC is calibrated,
 * after about two seconds.  KVM's clocks depend on the clock source, and tests check it.
 */
static void wait_for_clock(void)
{
	const struct timespec ms20 = { .tv_nsec = 20 * 1000 * 1000 };
	double deadline = now() + 20;
	char clock[64];

	while (read_line("/sys/devices/system/clocksource/clocksource0/current_clocksource",
			 clock, sizeof(clock)) &&
	       !strcmp(clock, "tsc-early") && now() < deadline)
		nanosleep(&ms20, NULL);
}

int main(void)
{
	struct rlimit lim = { 65536, 65536 };
	char splat[1024] = "";
	struct utsname uts;
	int fd;

	mount_at("devtmpfs", "/dev", true);
	mount_at("proc", "/proc", true);
	mount_at("sysfs", "/sys", true);
	mount_at("tmpfs", "/tmp", true);
	mkdir("/dev/shm", 0777);
	mount_at("tmpfs", "/dev/shm", true);
	mount_at("debugfs", "/sys/kernel/debug", false);
	mount_at("tracefs", "/sys/kernel/tracing", false);
	mount_at("cgroup2", "/sys/fs/cgroup", false);

	fd = open("/dev/console", O_RDWR);
	if (fd >= 0) {
		dup2(fd, 0);
		dup2(fd, 1);
		dup2(fd, 2);
	}
	setenv("PATH", "/", 0);
	setenv("HOME", "/", 0);
	setrlimit(RLIMIT_NOFILE, &lim);
	chdir("/tmp");

	fd = open_port("tap", "/dev/ttyS1");
	if (fd < 0)
		give_up("no port for TAP");
	tap_fd = fd;
	tap("TAP version 13\n");

	fd = open_port("kmsg", "/dev/ttyS2");
	log_file = fd < 0 ? NULL : fdopen(fd, "w");
	if (!log_file)
		give_up("no port for the kernel log");

	if (regcomp(&splat_re, splat_pattern, REG_EXTENDED | REG_NOSUB))
		give_up("splat pattern");
	kmsg_fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (kmsg_fd < 0)
		give_up("/dev/kmsg");

	/* See CONFIG_PREEMPT_NONE in scripts/kconfig/debug.config. */
	if (!uname(&uts) && strstr(uts.version, "PREEMPT_DYNAMIC") &&
	    !write_file(PREEMPT_MODEL, "full"))
		give_up(PREEMPT_MODEL);

	wait_for_clock();

	/* Do not scan while tests run; check_leaks() scans after them. */
	write_file("/sys/kernel/debug/kmemleak", "scan=off");

	if (scan_kmsg(splat, sizeof(splat)))
		tap("# splat: %s\n", splat);
	point(!*splat, "boot", "");
	point(!access("/dev/kvm", R_OK | W_OK), "/dev/kvm", "");

	run_tests();
	check_leaks();

	mark_log("end", "of all tests");
	if (scan_kmsg(splat, sizeof(splat)))
		tap("# splat: %s\n", splat);
	point(!*splat, "kernel log", "");

	tap("1..%d\n", points);
	if (fsync(tap_fd)) {
		tcdrain(tap_fd);
		tcdrain(fileno(log_file));
	}
	sync();
	reboot(RB_POWER_OFF);
	return 1;
}
