#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The main job: selftests on base and patched kernels.  Each test is a point, which
# passes if the test passes on the patched kernel.
. "$(dirname "$0")/tap.sh"

run_log=$BUILD/log/run.log
"$TOP/scripts/run" > "$run_log" 2>&1 < /dev/null || :
sed 's/^/# /' "$run_log"
untested=()
while IFS=$'\t' read -r feature arch test base patched; do
	[[ $feature = feature ]] && continue
	case $base-$patched in
	*-ok) say "ok $((++points)) - $arch $test" ;;
	skip-skip)
		say "ok $((++points)) - $arch $test # SKIP on base and patched"
		untested+=("$arch $test")
		;;
	*)
		say "not ok $((++points)) - $arch $test: base $base, patched $patched"
		for out in "$OUT/patched-$arch-plain-run-"*/; do
			! grep -qP "^\Q$test\E\t(?!ok\t)" "$out/results.tsv" 2> /dev/null ||
				last_words "$out" "$test"
		done
		;;
	esac
done < <(cat "$TOP/build/results.tsv")
main_job() { [[ -s $TOP/build/results.tsv ]] || { tail -n 30 "$run_log"; return 1; }; }
ok "the main job comes to its end" main_job
# Skipped everywhere means untested: tests.tsv must say so, with a reason.
all_tested() {
	[[ -s $TOP/build/results.tsv ]]
	printf '%s\n' "${untested[@]}"
	((${#untested[@]} == 0))
}
ok "no test is skipped on every kernel" all_tested
done_testing
