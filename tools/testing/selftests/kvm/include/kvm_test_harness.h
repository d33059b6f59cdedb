/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kselftest_harness.h for KVM selftests.
 *
 * Each TEST() and TEST_F() is a case, and prints one TAP test point.  A case runs
 * in a process of its own: if it fails, crashes or hangs, the other cases still run.
 * TEST_REQUIRE() skips the case; in main(), before run_cases(), it skips the test.
 *
 * TEST_TIMEOUT in the environment sets the time limit of each case, in seconds.
 *
 * Cases may change the settings of the system that changed_settings lists.
 */
#ifndef SELFTEST_KVM_TEST_HARNESS_H
#define SELFTEST_KVM_TEST_HARNESS_H

#include "test_util.h"

/* KVM selftests use the ASSERT_EQ() of test_util.h. */
#pragma push_macro("ASSERT_EQ")
#undef ASSERT_EQ
#include "kselftest_harness.h"
#pragma pop_macro("ASSERT_EQ")

/* The exit code with which a case tells kselftest_harness.h that it is skipped */
#define CASE_SKIPPED	255

/* Returns the case that this process runs, or NULL if it runs none. */
static struct __test_metadata *running_case(void)
{
	struct __fixture_metadata *f;
	struct __test_metadata *t;

	for (f = __fixture_list; f; f = f->next) {
		for (t = f->tests; t; t = t->next) {
			if (t->results)
				return t;
		}
	}
	return NULL;
}

static void __attribute__((format(printf, 1, 2))) skip(const char *fmt, ...)
{
	struct __test_metadata *_metadata = running_case();
	char reason[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(reason, sizeof(reason), fmt, ap);
	va_end(ap);
	if (!_metadata)
		ksft_exit_skip("- %s\n", reason);
	SKIP(_exit(CASE_SKIPPED), "%s", reason);
}

#undef __TEST_REQUIRE
#define __TEST_REQUIRE(f, fmt, ...)					\
do {									\
	if (!(f))							\
		skip(fmt, ##__VA_ARGS__);				\
} while (0)

/* The library's TEST_REQUIRE() exits with KSFT_SKIP. */
static void skip_case_at_exit(int status, void *unused)
{
	if (status == KSFT_SKIP)
		_exit(CASE_SKIPPED);
}

/*
 * An argument NAME selects the case NAME, and !NAME excludes it.  If no case is
 * selected, all cases run that are not excluded.
 */
static bool is_chosen(const char *name, char **args)
{
	bool chosen = true;
	int i;

	for (i = 0; args[i]; i++) {
		if (*args[i] != '!')
			chosen = false;
	}
	for (i = 0; args[i]; i++) {
		if (!strcmp(args[i] + (*args[i] == '!'), name))
			chosen = *args[i] != '!';
	}
	return chosen;
}

static bool is_case(const char *name)
{
	struct __fixture_metadata *f;
	struct __test_metadata *t;

	for (f = __fixture_list; f; f = f->next) {
		for (t = f->tests; t; t = t->next) {
			if (!strcmp(t->name, name))
				return true;
		}
	}
	return false;
}

static struct {
	const char *path;
	char value[16];
} changed_settings[] = {
	{ "/proc/sys/vm/nr_hugepages" },
	{ "/sys/kernel/mm/ksm/sleep_millisecs" },
	{ "/sys/kernel/mm/ksm/run" },
	{ "/sys/module/kvm/parameters/eager_page_split" },
	{ "/sys/kernel/debug/failslab/ignore-gfp-wait" },
	{ "/sys/kernel/debug/failslab/verbose" },
	{ "/sys/kernel/debug/failslab/task-filter" },
	{ "/sys/kernel/debug/failslab/times" },
	{ "/sys/kernel/debug/failslab/probability" },
};

static void read_setting(const char *path, char *value, size_t size)
{
	FILE *f = fopen(path, "r");

	*value = 0;
	if (f && !fgets(value, size, f))
		*value = 0;
	if (f)
		fclose(f);
}

static bool write_setting(const char *path, const char *value)
{
	FILE *f = fopen(path, "w");

	return f && fputs(value, f) != EOF && !fclose(f);
}

/* Cases end by _exit(), or are killed: only the process that started them does this. */
static void restore_settings(void)
{
	char value[16];
	int i;

	for (i = 0; i < ARRAY_SIZE(changed_settings); i++) {
		read_setting(changed_settings[i].path, value, sizeof(value));
		if (!strcmp(value, changed_settings[i].value))
			continue;
		if (!write_setting(changed_settings[i].path, changed_settings[i].value))
			fprintf(stderr, "%s: expected to restore %s", changed_settings[i].path,
				changed_settings[i].value);
	}
}

/* Also for tests that change settings without calling run_cases() */
static void restore_settings_at_exit(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(changed_settings); i++)
		read_setting(changed_settings[i].path, changed_settings[i].value,
			     sizeof(changed_settings[i].value));
	atexit(restore_settings);
}

/* Longer than wait_for() takes until it fails */
#define DEFAULT_TIMEOUT		(WAIT_LIMIT_SECS + 30)

/* Runs the cases that @args selects.  The last element of @args is NULL. */
static int run_cases(char **args)
{
	const char *timeout = getenv("TEST_TIMEOUT");
	struct __test_metadata *t, **link;
	struct __fixture_metadata *f;
	int i;

	restore_settings_at_exit();

	for (i = 0; args[i]; i++)
		TEST_ASSERT(is_case(args[i] + (*args[i] == '!')), "no such case: %s", args[i]);

	for (f = __fixture_list; f; f = f->next) {
		for (link = &f->tests; (t = *link); ) {
			t->timeout = timeout ? atoi(timeout) : DEFAULT_TIMEOUT;
			if (is_chosen(t->name, args))
				link = &t->next;
			else
				*link = t->next;
		}
	}

	setbuf(stdout, NULL);
	on_exit(skip_case_at_exit, NULL);
	return test_harness_run(0, NULL);
}

#endif /* SELFTEST_KVM_TEST_HARNESS_H */
