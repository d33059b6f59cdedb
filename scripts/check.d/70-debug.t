#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests of group "debug" on the patched kernels with KASAN, lockdep,
# kmemleak and the rest of debug.config.
. "$(dirname "$0")/tap.sh"

for arch in $ARCHES; do
	ok "debug kernel $arch" "$TOP/scripts/build-kernel" patched "$arch" debug
done
pids=()
for arch in $ARCHES; do
	"$TOP/scripts/run-tests" patched "$arch" debug debug > "$work/$arch" 2>&1 < /dev/null &
	pids+=($!)
done
wait "${pids[@]}" || :
for arch in $ARCHES; do
	out=$(tail -n 1 "$work/$arch")
	[[ -f $out/results.tsv ]] || {
		say "not ok $((++points)) - $arch: no results"
		sed 's/^/# /' "$work/$arch"
		continue
	}
	while IFS=$'\t' read -r test result _ why; do
		case $result in
		ok) say "ok $((++points)) - debug $arch $test" ;;
		skip) say "ok $((++points)) - debug $arch $test # SKIP $why" ;;
		*)
			say "not ok $((++points)) - debug $arch $test: $why"
			f=$out/${test//\//.}.log
			[[ -f $f ]] || f=$out/kmsg
			tail -n 40 "$f" | sed 's/^/# /'
			;;
		esac
	done < "$out/results.tsv"
done
done_testing
