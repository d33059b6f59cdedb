/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Swap and a file system, on RAM disks.
 */
#ifndef SELFTEST_KVM_DISK_H
#define SELFTEST_KVM_DISK_H

#include <stdbool.h>
#include <stddef.h>

/*
 * Swap to a RAM disk, and stop swapping.  swap_on() skips the case if the kernel cannot
 * do that.  If the process ends, for whatever reason, swapping stops as well.  Call it
 * before a thread may hold mmap_lock: it forks.
 */
void swap_on(void);
void swap_off(void);

/* Suspend and resume the I/O of the swap device. */
void hold_swap(void);
void release_swap(void);

/*
 * Mount a new file system in a mount namespace of the calling thread, and return a new
 * file of @size bytes, which is allocated and written.  Skips the case if the kernel
 * cannot do that.  If the process ends, the file system is thawed.
 */
int create_disk_file(size_t size);

/* Read from the disk, not from the page cache.  @buf must be aligned to a page. */
void read_disk_file(int fd, void *buf, size_t size);

/* Freeze and thaw the file system of @fd; writers wait while it is frozen. */
void freeze_disk(int fd);
void thaw_disk(int fd);

/* Reclaim @mem until none of its pages is resident.  Pages of files must be clean. */
void page_out(void *mem, size_t size);

/* Return whether any page of @mem is in memory. */
bool is_any_resident(void *mem, size_t size);

#endif /* SELFTEST_KVM_DISK_H */
