#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Selftests pass on the patched kernel with VMX in several forms, with nVHE and protected
# mode, and with GICv4.  Each machine runs the tests that tests.tsv lists for it with
# "modes", and the "run" and "modes" tests of the machine that its field "like" in
# machines.tsv names.
#
# Use one machine of each architecture, selected by a hash of the series, or all machines
# with MODES=all.  They run at the same time.
. "$(dirname "$0")/tap.sh"

tip=$("$TOP/scripts/apply" "$BUILD/tree")
machines_of() {
	local machines
	mapfile -t machines < <(table machines "$1" --when modes)
	[[ ${MODES:-} = all ]] || machines=("${machines[16#${tip::7} % ${#machines[@]}]}")
	printf '%s\n' "${machines[@]}"
}
! in_time 15 "tests on the machines of modes" || run_machines plain modes
done_testing
