/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Memory whose missing pages the test itself provides, via userfaultfd
 */
#ifndef SELFTEST_KVM_UFFD_H
#define SELFTEST_KVM_UFFD_H

#include <stddef.h>
#include <stdint.h>

#include <linux/userfaultfd.h>

/*
 * Let accesses to missing pages of a range wait for uffd_provide(), or for UFFDIO_WAKE.
 * @features: UFFD_FEATURE_*.  Returns a file descriptor, in non-blocking mode so that
 * poll() works.  Skips the test if the kernel has no userfaultfd.
 */
int uffd_register(void *start, size_t size, uint64_t features);

/* Returns the message about the next access that waits, see userfaultfd(2). */
struct uffd_msg uffd_wait_for_fault(int uffd);

/* Provide missing pages, with @data as their content, or zeroed if it is NULL. */
void uffd_provide(int uffd, void *start, const void *data, size_t size);

#endif /* SELFTEST_KVM_UFFD_H */
