#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests for debug on the patched kernels with KASAN, lockdep, kmemleak and the
# rest of debug.config.  If time is short, make check runs them on one architecture only,
# selected by a hash of the series.
. "$(dirname "$0")/tap.sh"

tip=$("$TOP/scripts/apply" "$BUILD/tree")
read -ra all <<< "$ARCHES"
ARCHES=
for n in "${!all[@]}"; do
	arch=${all[n]}
	rm -rf "$OUT/patched-$arch-debug-debug-plain"
	((16#${tip::7} % ${#all[@]} == n)) || in_time 20 "debug kernel of $arch" || continue
	ARCHES+=" $arch"
done

for arch in $ARCHES; do
	ok "debug kernel $arch" "$TOP/scripts/build-kernel" patched "$arch" debug
done
machines_of() { table machines "$1" --when debug; }
run_machines debug debug
done_testing
