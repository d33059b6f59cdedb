/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A trace of one event of the kernel, apart from other traces.
 */
#ifndef SELFTEST_KVM_TRACE_H
#define SELFTEST_KVM_TRACE_H

/*
 * Trace @event, for example "kvm/kvm_exit", for the calling thread, instead of the event
 * that was traced before.  Skips the case if there is no tracefs.
 */
void trace_start(const char *event);

/* Stop tracing if it was started.  For atexit() in main(): cases may be killed. */
void trace_end(void);

/* Check that the trace has one event, which prints @expected, and clear it. */
void check_trace(const char *what, const char *expected);

#endif /* SELFTEST_KVM_TRACE_H */
