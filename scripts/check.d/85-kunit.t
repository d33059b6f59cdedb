#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# KUnit ran in the kernels that were booted for the selftests, and the kernel's
# own kunit.py finds nothing wrong in their logs.
. "$(dirname "$0")/tap.sh"

kunit() {
	local kmsg=$BUILD/out/$1/kmsg
	[[ -s $kmsg ]] || { say "no log: run scripts/check selftests debug first"; return 1; }
	"$src/tools/testing/kunit/kunit.py" parse "$kmsg" || return
	# kunit.py is content with a log without any test.
	grep -q 'Totals: pass:[1-9]' "$kmsg"
}

src=$("$TOP/scripts/src" patched)
for arch in $ARCHES; do
	for out in "base-$arch-plain-fast" "patched-$arch-plain-fast" "patched-$arch-debug-debug"; do
		ok "KUnit in $out" kunit "$out"
	done
done
done_testing
