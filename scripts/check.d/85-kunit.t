#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# KUnit ran in the kernels that were booted for the selftests, and the kernel's
# own kunit.py finds nothing wrong in their logs.
. "$(dirname "$0")/tap.sh"

kunit() {
	local kmsg=$OUT/$1/kmsg
	[[ -s $kmsg ]] || { say "no log: run scripts/check selftests debug first"; return 1; }
	"$src/tools/testing/kunit/kunit.py" parse "$kmsg"
	# kunit.py accepts a log without any test.
	grep -q 'Totals: pass:[1-9]' "$kmsg"
}

src=$("$TOP/scripts/src" patched)
for arch in $ARCHES; do
	for out in "base-$arch-plain-run-plain" "patched-$arch-plain-run-plain" \
		"patched-$arch-debug-debug-plain"; do
		# Check debug leaves out an architecture if there is no time for it.
		[[ $out != *-debug-* || -d $OUT/$out ]] || in_time 20 "KUnit in $out" || continue
		ok "KUnit in $out" kunit "$out"
	done
done
done_testing
