#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The selftests pass on the patched kernel also on machines that are like others in
# machines.tsv: other modes of KVM, and GICv4.
#
# One machine of each architecture, another one when the series changes; all with
# MODES=all.
. "$(dirname "$0")/tap.sh"

tip=$("$TOP/scripts/apply" "$BUILD/tree")
for arch in $ARCHES; do
	mapfile -t machines < <(table machines "$arch" --when modes)
	((${#machines[@]})) || continue
	[[ ${MODES:-} = all ]] || machines=("${machines[16#${tip::7} % ${#machines[@]}]}")
	for machine in "${machines[@]}"; do
		"$TOP/scripts/run-tests" patched "$arch" plain modes "$machine" > "$work/said" 2>&1 || :
		results "$machine $arch" "$OUT/patched-$arch-plain-modes-$machine" "$work/said"
	done
done
done_testing
