// SPDX-License-Identifier: GPL-2.0
/*
 * The test that goes wrong on purpose.
 *
 * usage: victim [say LINE... then] pass|skip|fail|crash|hang|log TEXT|splat|panic|
 *               leak MODULE
 *
 * Each way except pass and skip must turn the result of the harness red;
 * scripts/check.d/90-harness.t runs them all.  The lines, in which "_" stands for a
 * space, are those of a test with cases.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) < 0) {
		perror(path);
		return 2;
	}
	close(fd);
	return 0;
}

int main(int argc, char **argv)
{
	const char *way, *arg;
	char *c;
	int fd;

	if (argc > 1 && !strcmp(argv[1], "say")) {
		for (argv++, argc--; argc > 1 && strcmp(argv[1], "then"); argv++, argc--) {
			for (c = argv[1]; *c; c++)
				putchar(*c == '_' ? ' ' : *c);
			putchar('\n');
		}
		argv++;
		argc--;
	}
	way = argc > 1 ? argv[1] : "";
	arg = argc > 2 ? argv[2] : "";
	printf("victim: %s %s\n", way, arg);
	fflush(stdout);

	if (!strcmp(way, "pass"))
		return 0;
	if (!strcmp(way, "skip")) {
		printf("1..0 # SKIP Requirement not met: planted\n");
		return 4;
	}
	if (!strcmp(way, "fail"))
		return 1;
	if (!strcmp(way, "crash"))
		abort();
	if (!strcmp(way, "hang")) {
		for (;;)
			pause();
	}
	/* A line of the log that looks like a report of lockdep or the like. */
	if (!strcmp(way, "log"))
		return write_to("/dev/kmsg", arg);
	/* LKDTM is the kernel's own module for crashing it. */
	if (!strcmp(way, "splat"))
		return write_to("/sys/kernel/debug/provoke-crash/DIRECT", "WARNING");
	if (!strcmp(way, "panic"))
		return write_to("/sys/kernel/debug/provoke-crash/DIRECT", "PANIC");
	/* kmemleak-test.ko loses memory when it is loaded. */
	if (!strcmp(way, "leak")) {
		fd = open(arg, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0)) {
			perror(arg);
			return 2;
		}
		return 0;
	}
	fprintf(stderr, "usage: victim [say LINE... then] pass|skip|fail|crash|hang|log TEXT|splat|panic|leak MODULE\n");
	return 2;
}
