#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests pass on the patched kernel also with VMX, in other modes of KVM, and with
# GICv4: those that tests.tsv lists for modes, and those of machines that others in
# machines.tsv are like.
#
# One machine of each architecture, both at once, another one when the series changes;
# all with MODES=all.
. "$(dirname "$0")/tap.sh"

tip=$("$TOP/scripts/apply" "$BUILD/tree")
for arch in $ARCHES; do
	mapfile -t machines < <(table machines "$arch" --when modes)
	((${#machines[@]})) || continue
	[[ ${MODES:-} = all ]] || machines=("${machines[16#${tip::7} % ${#machines[@]}]}")
	for machine in "${machines[@]}"; do
		"$TOP/scripts/run-tests" patched "$arch" plain modes "$machine" \
			> "$work/$arch-plain-modes-$machine" 2>&1 || :
	done < /dev/null &
done
wait
for said in "$work/"*; do
	run=${said##*/}
	results "${run##*-} ${run%%-*}" "$OUT/patched-$run" "$said"
done
done_testing
