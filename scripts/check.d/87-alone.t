#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Each topic works alone: with the topics that it requires, and no other, it applies to
# the base, builds, and passes its selftests.
#
# All topics are applied.  Building and testing all of them takes more time than make check
# has, so it does this with only one, selected by a hash of the series.  What passed
# is remembered in build/$BASE/alone, by a hash of everything that it depends on.
#
# Environment: ALONE is "all", or the names of the topics to build and test.
. "$(dirname "$0")/tap.sh"

"$TOP/scripts/tree" >&2
tree=$BUILD/tree
passed=$BUILD/alone/passed
mkdir -p "$passed"

# chosen TOPIC N: is the Nth topic built and tested?
chosen() {
	case ${ALONE:-} in
	'') ((($2 + 16#${series::7}) % $(topics | wc -l) == 0)) ;;
	all) ;;
	*) [[ " $ALONE " = *" $1 "* ]] ;;
	esac
}
applies() {
	local t patches=()
	for t in $required; do
		mapfile -t -O ${#patches[@]} patches < <(patch_files "$t")
	done
	plain_am "$work/am" "${patches[@]}" || return
	# What is built is what a user gets.
	[[ ! $tip ]] || same_tree "$work/am" "$tip"
}
# builds ARCH: the kernel, and the selftests, which do not build without topic selftests
builds() {
	"$TOP/scripts/build-kernel" patched "$1" plain || return
	[[ ! $required = *-selftests* ]] || "$TOP/scripts/build-tests" "$1"
}
# own_tests ARCH: the names of the topic's own tests
own_tests() {
	local machine
	for machine in $(table machines "$1" --when run --features "$TOPIC"); do
		table select "$1" "$machine" --when run --features "$TOPIC" | cut -f 2
	done
}
own_tests_pass() {
	local arch=$1 names out test result rc=0
	mapfile -t names < <(own_tests "$arch")
	"$TOP/scripts/run-tests" patched "$arch" plain "${names[@]}" > "$work/out" 2> "$work/said" || rc=1
	cat "$work/said"
	while read -r out; do
		[[ -s $out/results.tsv ]] || { say "no results in $out"; rc=1; continue; }
		while IFS=$'\t' read -r test result _; do
			[[ $result = ok ]] && continue
			rc=1
			say "$test: $result"
			last_words "$out" "$test"
		done < "$out/results.tsv"
	done < "$work/out"
	return $rc
}
# all_that_counts ARCH: what a pass depends on
all_that_counts() {
	say "$TOPIC $1 $(git -C "$tree" rev-parse "$tip^{tree}")"
	awk -F'\t' -v topic="$TOPIC" 'index("," $1 ",", "," topic ",")' "$PATCHES/tests.tsv"
	cat "$TOP/scripts/"{lib.sh,build-kernel,build-tests,run-tests,boot,init.c,machines.tsv,table.py} \
		"$TOP/scripts/"{qemu,kconfig}/* "$PATCHES/kconfig/"* "$0"
	use_arch "$1"
	$kernel_cc --version
}

series=$("$TOP/scripts/apply" "$tree")
for name in ${ALONE:-}; do
	[[ $name = all ]] || topic_folder "$name" > /dev/null
done
n=0
for folder in $(topics); do
	export TOPIC=${folder#*-}
	required=$(with_required "$TOPIC")
	n=$((n + 1))
	tip=
	! chosen "$TOPIC" $n || tip=$("$TOP/scripts/apply" "$tree" "$TOPIC" 2> /dev/null) || tip=unknown
	ok "$TOPIC applies to the base after what it requires" applies
	rm -rf "$work/am"
	[[ $tip && $tip != unknown ]] || continue
	[[ ${ALONE:-} ]] || in_time 15 "$TOPIC builds and passes" || continue
	for arch in $ARCHES; do
		id=$(all_that_counts "$arch" | sha256sum | cut -d ' ' -f 1)
		if [[ -e $passed/$id ]]; then
			say "ok $((++points)) - $TOPIC, $arch: passed before, nothing has changed"
			continue
		fi
		before=$failed
		ok "$TOPIC, $arch: kernel and selftests build" builds "$arch"
		((failed == before)) || continue
		if [[ $(own_tests "$arch") ]]; then
			ok "$TOPIC, $arch: its selftests pass" own_tests_pass "$arch"
		fi
		((failed > before)) || touch "$passed/$id"
	done
done
done_testing
