// SPDX-License-Identifier: GPL-2.0-only
/*
 * A trace of one event of the kernel, apart from other traces.
 */
#define _GNU_SOURCE /* for program_invocation_short_name */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "test_util.h"
#include "trace.h"

#define TRACE_DIR	"/sys/kernel/tracing/instances"

static char trace_event[64];

static const char *trace_path(const char *file)
{
	static char path[512];

	snprintf(path, sizeof(path), TRACE_DIR "/%s%s", program_invocation_short_name, file);
	return path;
}

void trace_end(void)
{
	if (rmdir(trace_path("")) && errno != ENOENT && errno != EACCES)
		fprintf(stderr, "Failed to remove the trace, errno: %d\n", errno);
}

void trace_start(const char *event)
{
	char enable[128], tid[16];
	int ret;

	rmdir(trace_path(""));
	ret = mkdir(trace_path(""), 0700);
	__TEST_REQUIRE(!ret || (errno != ENOENT && errno != EACCES), "needs tracefs, and root");
	TEST_ASSERT(!ret, "Failed to make %s, errno: %d", trace_path(""), errno);

	snprintf(tid, sizeof(tid), "%ld", syscall(SYS_gettid));
	TEST_ASSERT(write_text(trace_path("/set_event_pid"), tid),
		    "Failed to write set_event_pid, errno: %d", errno);
	snprintf(enable, sizeof(enable), "/events/%s/enable", event);
	TEST_ASSERT(write_text(trace_path(enable), "1"), "Failed to enable %s, errno: %d",
		    event, errno);
	snprintf(trace_event, sizeof(trace_event), "%s: ", strchr(event, '/') + 1);
}

void check_trace(const char *what, const char *expected)
{
	char line[512], last[512] = "";
	int nr = 0;
	char *event;
	FILE *f;

	f = fopen(trace_path("/trace"), "r");
	TEST_ASSERT(f, "Failed to open the trace, errno: %d", errno);
	while (fgets(line, sizeof(line), f)) {
		if (*line == '#')
			continue;
		line[strcspn(line, "\n")] = 0;
		strcpy(last, line);
		nr++;
	}
	fclose(f);

	event = strstr(last, trace_event);
	event = event ? event + strlen(trace_event) : last;
	TEST_ASSERT(nr == 1 && !strcmp(event, expected),
		    "%s: expected one event \"%s\", got %d, the last one is \"%s\"", what,
		    expected, nr, event);

	f = fopen(trace_path("/trace"), "w");
	TEST_ASSERT(f, "Failed to clear the trace, errno: %d", errno);
	fclose(f);
}
