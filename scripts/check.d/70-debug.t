#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests for debug on the patched kernels with KASAN, lockdep, kmemleak and the
# rest of debug.config.
. "$(dirname "$0")/tap.sh"

for arch in $ARCHES; do
	ok "debug kernel $arch" "$TOP/scripts/build-kernel" patched "$arch" debug
done
machines_of() { table machines "$1" --when debug; }
run_machines debug debug
done_testing
