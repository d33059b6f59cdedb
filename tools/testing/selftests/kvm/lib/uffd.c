// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory whose missing pages the test itself provides, via userfaultfd
 */
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "test_util.h"
#include "uffd.h"

int uffd_register(void *start, size_t size, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register reg = {
		.range = { .start = (uintptr_t)start, .len = size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	__TEST_REQUIRE(uffd >= 0, "userfaultfd(): %s", strerror(errno));
	TEST_ASSERT(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API: %s", strerror(errno));
	TEST_ASSERT(!ioctl(uffd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER: %s",
		    strerror(errno));
	return uffd;
}

struct uffd_msg uffd_wait_for_fault(int uffd)
{
	struct pollfd p = { .fd = uffd, .events = POLLIN };
	struct uffd_msg msg;
	ssize_t n;

	do {
		TEST_ASSERT(poll(&p, 1, WAIT_LIMIT_SECS * 1000) == 1,
			    "No access waits for a page after %d s", WAIT_LIMIT_SECS);
		n = read(uffd, &msg, sizeof(msg));
	} while (n < 0 && errno == EAGAIN);
	TEST_ASSERT(n == sizeof(msg), "read(uffd): expected %zu, got %zd, %s",
		    sizeof(msg), n, strerror(errno));
	TEST_ASSERT(msg.event == UFFD_EVENT_PAGEFAULT, "expected event %d, got %d",
		    UFFD_EVENT_PAGEFAULT, msg.event);
	return msg;
}

void uffd_provide(int uffd, void *start, const void *data, size_t size)
{
	struct uffdio_copy copy = {
		.dst = (uintptr_t)start, .src = (uintptr_t)data, .len = size,
	};
	struct uffdio_zeropage zero = {
		.range = { .start = (uintptr_t)start, .len = size },
	};
	int ret = data ? ioctl(uffd, UFFDIO_COPY, &copy) :
			 ioctl(uffd, UFFDIO_ZEROPAGE, &zero);

	TEST_ASSERT(!ret, "%s: %s", data ? "UFFDIO_COPY" : "UFFDIO_ZEROPAGE",
		    strerror(errno));
}
