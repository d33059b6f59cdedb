#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests for debug on the patched kernels with KASAN, lockdep, kmemleak and the
# rest of debug.config.
. "$(dirname "$0")/tap.sh"

for arch in $ARCHES; do
	ok "debug kernel $arch" "$TOP/scripts/build-kernel" patched "$arch" debug
done
for arch in $ARCHES; do
	for machine in $(table machines "$arch" --when debug); do
		"$TOP/scripts/run-tests" patched "$arch" debug debug "$machine" \
			> "$work/$arch-debug-debug-$machine" 2>&1 || :
	done < /dev/null &
done
wait
for said in "$work/"*; do
	run=${said##*/}
	results "debug ${run%%-*}" "$OUT/patched-$run" "$said"
done
done_testing
