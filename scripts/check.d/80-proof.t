#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The tests that the trailers "Selftest:" of the patches name fail on the base, or are
# skipped there because the capability is absent, and pass on the patched kernel.
. "$(dirname "$0")/tap.sh"

builds() {
	local src=$1 arch=$2 test=$3
	use_arch "$arch"
	rm -rf "${work:?}/$arch"
	mkdir -p "$work/$arch/kvm"
	make -s -C "$src/tools/testing/selftests/kvm" "${kernel_make[@]}" CC="$kernel_cc" \
		OUTPUT="$work/$arch/kvm" USERCFLAGS=-Werror USERLDFLAGS=-static \
		KHDR_INCLUDES="-isystem $BUILD/tests/$arch/headers-$4/usr/include" "$work/$arch/kvm/$test"
}
bites() {
	local base patched
	read -r base patched < <(awk -F'\t' -v a="$1" -v t="$2" '$2 == a && $3 == t { print $4, $5 }' \
		"$TOP/build/results.tsv") || { say "no result: run scripts/check selftests first"; return 1; }
	say "base $base, patched $patched; expected fail or skip, and ok"
	[[ $base = fail || $base = skip ]] && [[ $patched = ok ]]
}

# Each test and architecture once, however many patches it proves.
info=$("$TOP/scripts/patch-info")
while IFS=$'\t' read -r how test arch; do
	case $how in
	run) ok "$arch $test fails without, passes with" bites "$arch" "$test" ;;
	build)
		use_arch "$arch"
		for which in base patched; do
			src=$("$TOP/scripts/src" $which)
			make -s -C "$src" O="$BUILD/tests/$arch/headers-$which" "${kernel_make[@]}" headers > /dev/null
			if [[ $which = base ]]; then
				ok "$arch $test does not build without" not builds "$src" "$arch" "$test" $which
			else
				ok "$arch $test builds with" builds "$src" "$arch" "$test" $which
			fi
		done
		;;
	esac
done < <(awk -F'\t' -v OFS='\t' -v arches="$ARCHES" '
	FILENAME ~ /tests\.tsv$/ {
		n = split($3 == "all" ? arches : $3, a, " ")
		for (i = 1; i <= n; i++)
			if (!seen[$2, a[i]]++)
				on[$2] = on[$2] " " a[i]
		next
	}
	$2 == "run" || $2 == "build" {
		whole = $3
		sub(/@[^@]*$/, "", whole)
		n = split($3 in on ? on[$3] : on[whole], a, " ")
		for (i = 1; i <= n; i++)
			if (($4 == "-" || $4 == a[i]) && !said[$2, $3, a[i]]++)
				print $2, $3, a[i]
	}' "$PATCHES/tests.tsv" - <<< "$info")
done_testing
