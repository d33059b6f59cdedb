// SPDX-License-Identifier: GPL-2.0-only
/*
 * Swap and a file system, on RAM disks.
 */
#define _GNU_SOURCE /* for unshare() and O_DIRECT */
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/compiler.h>
#include <linux/dm-ioctl.h>
#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/mount.h>

#include "test_util.h"
#include "disk.h"

#define SWAP_DISK	"/dev/ram0"
#define FILE_DISK	"/dev/ram1"
#define MOUNT_POINT	"/tmp/kvm_selftest_disk"

/* The C library may not have it yet. */
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT	21
#endif

/* Run @fn when the calling thread ends or is killed. */
static pid_t run_at_death(void (*fn)(void))
{
	pid_t parent = getpid(), pid;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	fflush(stdout);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork(): %s", strerror(errno));
	if (pid)
		return pid;

	sigprocmask(SIG_BLOCK, &set, NULL);
	/* A case that takes too long is killed with its process group. */
	setsid();
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	if (getppid() == parent)
		sigwaitinfo(&set, NULL);
	fn();
	_exit(0);
}

static void read_text(const char *path, char *value, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t ret = read(fd, value, size - 1);

	value[ret > 0 ? ret : 0] = 0;
	close(fd);
}

/*
 * Swap-in reads a cluster of pages, and pages that are not mapped stay in the swap cache:
 * page_out() would not find them.
 */
#define PAGE_CLUSTER	"/proc/sys/vm/page-cluster"

static char page_cluster[16];

/* A device of the device mapper can be suspended. */
static char swap_device[32];
static pid_t swap_guard;

struct dm_request {
	struct dm_ioctl io;
	struct dm_target_spec spec;
	char params[32];
};

static int dm_call(struct dm_request *request, unsigned long nr, uint32_t flags)
{
	int fd = open("/dev/" DM_DIR "/" DM_CONTROL_NODE, O_RDWR | O_CLOEXEC), ret;

	if (fd < 0)
		return -1;
	request->io = (struct dm_ioctl) {
		.version = { DM_VERSION_MAJOR },
		.data_size = sizeof(*request),
		.data_start = offsetof(struct dm_request, spec),
		.target_count = nr == DM_TABLE_LOAD,
		.flags = flags,
		.name = "kvm_selftest_swap",
	};
	ret = ioctl(fd, nr, request);
	/* One device at a time: the number of the device is in the low byte. */
	snprintf(swap_device, sizeof(swap_device), "/dev/dm-%u", (uint8_t)request->io.dev);
	close(fd);
	return ret;
}

static int suspend_swap(bool suspend)
{
	struct dm_request request = {};

	return dm_call(&request, DM_DEV_SUSPEND, suspend ? DM_SUSPEND_FLAG : 0);
}

static void end_swap(void)
{
	struct dm_request request = {};

	if (*page_cluster && !write_text(PAGE_CLUSTER, page_cluster))
		perror(PAGE_CLUSTER);
	if (suspend_swap(false))
		return;
	swapoff(swap_device);
	dm_call(&request, DM_DEV_REMOVE, 0);
}

static bool create_swap_device(void)
{
	struct dm_request request = {};
	uint64_t size;
	int fd, ret;

	fd = open(SWAP_DISK, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		return false;
	close(fd);

	/* Wait for the guard of a case that was killed. */
	wait_for(!(ret = dm_call(&request, DM_DEV_CREATE, 0)) || errno != EBUSY);
	if (ret)
		return false;

	request.spec = (struct dm_target_spec) {
		.length = size >> 9,
		.target_type = "linear",
	};
	strcpy(request.params, SWAP_DISK " 0");
	return !dm_call(&request, DM_TABLE_LOAD, 0) && !suspend_swap(false);
}

static bool write_swap_header(void)
{
	size_t page_size = getpagesize();
	char *page = calloc(1, page_size);
	uint32_t *info = (uint32_t *)(page + 1024);
	int fd = open(swap_device, O_RDWR | O_CLOEXEC);
	uint64_t size;
	bool ok;

	TEST_ASSERT(page, "calloc()");
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		return false;
	info[0] = 1;				/* version */
	info[1] = size / page_size - 1;		/* the last page */
	memcpy(page + page_size - 10, "SWAPSPACE2", 10);
	ok = pwrite(fd, page, page_size, 0) == page_size && !fsync(fd);
	close(fd);
	free(page);
	return ok;
}

void swap_on(void)
{
	bool ok;

	read_text(PAGE_CLUSTER, page_cluster, sizeof(page_cluster));
	swap_guard = run_at_death(end_swap);
	TEST_ASSERT(!*page_cluster || write_text(PAGE_CLUSTER, "0"), "%s: %s", PAGE_CLUSTER,
		    strerror(errno));
	ok = create_swap_device() && write_swap_header() && !swapon(swap_device, 0);
	__TEST_REQUIRE(ok, "needs " SWAP_DISK ", device mapper and swap: %s", strerror(errno));
}

void swap_off(void)
{
	kill(swap_guard, SIGKILL);
	waitpid(swap_guard, NULL, 0);
	end_swap();
}

void hold_swap(void)
{
	TEST_ASSERT(!suspend_swap(true), "DM_DEV_SUSPEND: %s", strerror(errno));
}

void release_swap(void)
{
	TEST_ASSERT(!suspend_swap(false), "DM_DEV_SUSPEND: %s", strerror(errno));
}

/*
 * ext2, revision 0, with one group: super block, group descriptors, block bitmap, inode
 * bitmap, inode table, and the root directory, each in a block of its own.
 */
enum { SUPER, GROUPS, BLOCK_BITMAP, INODE_BITMAP, INODES, ROOT, FIRST_FREE };

#define BLOCK_SIZE_LOG	2	/* times 1024 */
#define FS_BLOCK	(1024 << BLOCK_SIZE_LOG)
#define INODE_WORDS	(128 / 4)
#define NR_INODES	(FS_BLOCK / 128)
#define ROOT_INODE	2
#define FIRST_INODE	11

static void set_bits(uint8_t *bitmap, unsigned int from, unsigned int to)
{
	for (; from < to; from++)
		bitmap[from / 8] |= 1 << from % 8;
}

static void format(uint8_t *disk, uint32_t nr_blocks)
{
	uint32_t *super = (uint32_t *)(disk + 1024);
	uint32_t *group = (uint32_t *)(disk + GROUPS * FS_BLOCK);
	uint32_t *inode = (uint32_t *)(disk + INODES * FS_BLOCK) + (ROOT_INODE - 1) * INODE_WORDS;
	uint32_t *dir = (uint32_t *)(disk + ROOT * FS_BLOCK);

	super[0] = NR_INODES;
	super[1] = nr_blocks;
	super[3] = nr_blocks - FIRST_FREE;		/* free blocks */
	super[4] = NR_INODES - (FIRST_INODE - 1);	/* free inodes */
	super[6] = BLOCK_SIZE_LOG;
	super[7] = BLOCK_SIZE_LOG;			/* of fragments */
	super[8] = FS_BLOCK * 8;			/* blocks per group */
	super[9] = FS_BLOCK * 8;			/* fragments per group */
	super[10] = NR_INODES;				/* inodes per group */
	super[13] = 0xffff << 16;			/* no limit of mounts */
	super[14] = 1 << 16 | 0xef53;			/* clean, magic number */

	group[0] = BLOCK_BITMAP;
	group[1] = INODE_BITMAP;
	group[2] = INODES;
	group[3] = super[4] << 16 | super[3];
	group[4] = 1;					/* directories */

	set_bits(disk + BLOCK_BITMAP * FS_BLOCK, 0, FIRST_FREE);
	set_bits(disk + BLOCK_BITMAP * FS_BLOCK, nr_blocks, FS_BLOCK * 8);
	set_bits(disk + INODE_BITMAP * FS_BLOCK, 0, FIRST_INODE - 1);
	set_bits(disk + INODE_BITMAP * FS_BLOCK, NR_INODES, FS_BLOCK * 8);

	inode[0] = S_IFDIR | 0755;
	inode[1] = FS_BLOCK;				/* size */
	inode[6] = 2 << 16;				/* links */
	inode[7] = FS_BLOCK / 512;
	inode[10] = ROOT;

	/* Inode, length of the entry, length of the name, name */
	dir[0] = ROOT_INODE;
	dir[1] = 1 << 16 | 12;
	dir[2] = '.';
	dir[3] = ROOT_INODE;
	dir[4] = 2 << 16 | (FS_BLOCK - 12);
	dir[5] = '.' << 8 | '.';
}

static bool format_disk(void)
{
	uint8_t *disk = calloc(FIRST_FREE, FS_BLOCK);
	uint64_t size;
	bool ok;
	int fd;

	TEST_ASSERT(disk, "calloc()");
	/* Unmounting may end some time after the process that mounted the file system. */
	wait_for((fd = open(FILE_DISK, O_RDWR | O_EXCL | O_CLOEXEC)) >= 0 || errno != EBUSY);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		return false;
	format(disk, min(size / FS_BLOCK, (uint64_t)FS_BLOCK * 8));
	ok = pwrite(fd, disk, FIRST_FREE * FS_BLOCK, 0) == FIRST_FREE * FS_BLOCK && !fsync(fd);
	close(fd);
	free(disk);
	return ok;
}

/* <sys/mount.h> and <linux/fs.h> cannot be included together. */
static bool do_mount(const char *source, const char *dir, const char *type, unsigned long flags)
{
	return !syscall(SYS_mount, source, dir, type, flags, NULL);
}

static int disk_file;

static void thaw_at_death(void)
{
	ioctl(disk_file, FITHAW, 0);
}

int create_disk_file(size_t size)
{
	char *zero = calloc(1, size);
	bool ok;

	TEST_ASSERT(zero, "calloc()");
	/* The file system disappears with the process. */
	ok = !unshare(CLONE_NEWNS) && do_mount(NULL, "/", NULL, MS_REC | MS_PRIVATE) &&
	     (!mkdir(MOUNT_POINT, 0700) || errno == EEXIST) && format_disk() &&
	     do_mount(FILE_DISK, MOUNT_POINT, "ext2", 0);
	__TEST_REQUIRE(ok, "needs a mount namespace, " FILE_DISK " and ext2: %s", strerror(errno));

	disk_file = open(MOUNT_POINT "/file", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	TEST_ASSERT(disk_file >= 0 && pwrite(disk_file, zero, size, 0) == size &&
		    !fsync(disk_file), "file of %lu bytes: %s", size, strerror(errno));
	free(zero);
	run_at_death(thaw_at_death);
	return disk_file;
}

void read_disk_file(int fd, void *buf, size_t size)
{
	char path[32];
	ssize_t ret;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	ret = read(fd, buf, size);
	TEST_ASSERT(ret == size, "read() with O_DIRECT: expected %lu, got %ld, %s", size, ret,
		    strerror(errno));
	close(fd);
}

void freeze_disk(int fd)
{
	TEST_ASSERT(!ioctl(fd, FIFREEZE, 0), "FIFREEZE: %s", strerror(errno));
}

void thaw_disk(int fd)
{
	TEST_ASSERT(!ioctl(fd, FITHAW, 0), "FITHAW: %s", strerror(errno));
}

bool is_any_resident(void *mem, size_t size)
{
	size_t page_size = getpagesize(), i;
	unsigned char resident[size / page_size];

	TEST_ASSERT(!mincore(mem, size, resident), "mincore(): %s", strerror(errno));
	for (i = 0; i < size / page_size; i++) {
		if (resident[i] & 1)
			return true;
	}
	return false;
}

/*
 * A page may stay in memory although it is not mapped any more, e.g. while it is written to
 * swap.  MADV_PAGEOUT looks only at mapped pages: map those pages again.
 */
static void map_unmapped(void *mem, size_t size)
{
	size_t page_size = getpagesize(), i, n = size / page_size;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	unsigned char resident[n];
	uint64_t entries[n];

	TEST_ASSERT(!mincore(mem, size, resident), "mincore(): %s", strerror(errno));
	TEST_ASSERT(pread(fd, entries, sizeof(entries), (uintptr_t)mem / page_size * 8) ==
		    sizeof(entries), "/proc/self/pagemap: %s", strerror(errno));
	close(fd);
	for (i = 0; i < n; i++) {
		if (resident[i] & 1 && !(entries[i] >> 63))
			READ_ONCE(*(char *)(mem + i * page_size));
	}
}

/* Reclaim finds pages only on the LRU lists, to which each CPU adds new pages in batches. */
void page_out(void *mem, size_t size)
{
	cpu_set_t all, one;
	int cpu = 0;

	TEST_ASSERT(!sched_getaffinity(0, sizeof(all), &all), "sched_getaffinity(): %s",
		    strerror(errno));
	wait_for(({
		CPU_ZERO(&one);
		do {
			cpu = (cpu + 1) % CPU_SETSIZE;
		} while (!CPU_ISSET(cpu, &all));
		CPU_SET(cpu, &one);
		sched_setaffinity(0, sizeof(one), &one);
		map_unmapped(mem, size);
		TEST_ASSERT(!madvise(mem, size, MADV_PAGEOUT), "madvise(MADV_PAGEOUT): %s",
			    strerror(errno));
		!is_any_resident(mem, size);
	}));
	sched_setaffinity(0, sizeof(all), &all);
}
