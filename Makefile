# SPDX-License-Identifier: GPL-2.0
# The front door.  Every target except export works from a fresh clone.  BASE= chooses
# the kernel (a folder under patches/), TOPIC= one topic in place of all, JOBS= the
# number of parallel jobs, ACCEL= how QEMU runs (see scripts/boot).

MAKEFLAGS += --no-print-directory
export BASE TOPIC JOBS ACCEL

help:	## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

run:	## the main job: fetch, apply, build, boot base and patched, one table; TOPIC=name for one topic
	@scripts/run

check:	## every check; ends with "N passed, N failed, N skipped"
	@scripts/check

tree:	## git tree with the base and the series, to work in
	@scripts/tree

export:	## write the tree back to patches/ and the mirror
	@scripts/export

debug:	## the selftests on kernels with KASAN, lockdep, kmemleak and more
	@scripts/check debug

bench:	## measure base and patched kernels, compare with the goals
	@scripts/bench

slow:	## the selftests that take minutes to hours under TCG
	@scripts/slow

guest:	## Linux guests under QEMU's KVM inside the patched kernel: x86-64, Xen, arm64
	@scripts/guest

soak:	## stress tests on debug kernels with random seeds, for MINUTES=n
	@scripts/soak $(MINUTES)

kcsan:	## data races that KCSAN finds in KVM, on base and patched kernels
	@scripts/kcsan x86_64 && scripts/kcsan arm64

mutants:	## how many small mutants of a topic's code its tests notice: TOPIC=name
	@env -u TOPIC scripts/mutants $(TOPIC) $(NUMBER)

bisect:	## build the kernels of both architectures after every patch
	@scripts/bisect

alone:	## apply, build and test every topic with only what it requires
	@ALONE=all scripts/check alone

deps:	## install the Debian packages that are missing
	@scripts/deps

clean:	## remove build/ (the cache of downloads stays)
	rm -rf build

.PHONY: help run check tree export debug bench slow guest soak kcsan mutants bisect alone deps clean
