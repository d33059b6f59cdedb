#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests of groups "debug", "shadow" and "turns" on the patched kernels with
# KASAN, lockdep, kmemleak and the rest of debug.config.
. "$(dirname "$0")/tap.sh"

for arch in $ARCHES; do
	ok "debug kernel $arch" "$TOP/scripts/build-kernel" patched "$arch" debug
done
machines=()
for arch in $ARCHES; do
	for group in debug shadow turns; do
		! group_has_tests "$arch" "$group" || machines+=("$arch $group")
	done
done
pids=()
for arch in $ARCHES; do
	for m in "${machines[@]}"; do
		read -r a group <<< "$m"
		[[ $a != "$arch" ]] ||
			"$TOP/scripts/run-tests" patched "$arch" debug "$group" > "$work/$m" 2>&1 || :
	done < /dev/null &
	pids+=($!)
done
wait "${pids[@]}" || :
for m in "${machines[@]}"; do
	read -r arch group <<< "$m"
	out=$(tail -n 1 "$work/$m")
	[[ -f $out/results.tsv ]] || {
		say "not ok $((++points)) - $arch, $group: no results"
		sed 's/^/# /' "$work/$m"
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
