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
	run=${said##*/} arch=${run%%-*} out=$OUT/patched-${said##*/}
	[[ -f $out/results.tsv ]] || {
		say "not ok $((++points)) - $run: no results"
		sed 's/^/# /' "$said"
		continue
	}
	while IFS=$'\t' read -r test result _ why; do
		case $result in
		ok) say "ok $((++points)) - debug $arch $test" ;;
		skip) say "ok $((++points)) - debug $arch $test # SKIP $why" ;;
		*)
			say "not ok $((++points)) - debug $arch $test: $why"
			last_words "$out" "$test"
			;;
		esac
	done < "$out/results.tsv"
done
done_testing
