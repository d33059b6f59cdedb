#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The scripts, and what is written by hand, are in order.
. "$(dirname "$0")/tap.sh"
cd "$TOP" || exit

mapfile -t programs < <(grep -lE '^#!/bin/bash' -r scripts .ci)
mapfile -t sourced < <(find scripts -name '*.sh')
mapfile -t ours < <(git ls-files -co --exclude-standard -- . ':!patches/*/*.patch' ':!tools' \
	':!Documentation/virt' ':!COPYING')

usage_line() {
	local f rc=0
	for f in "${programs[@]}"; do
		[[ $f == *.t || $f == .ci/* ]] && continue
		grep -qE '^# usage: ' "$f" || { say "$f has no usage line"; rc=1; }
	done
	return $rc
}
# "inout" is a word of the language of syzkaller.
spelling() { codespell -L inout "${ours[@]}"; }
clean_text() {
	not grep -nE '[[:space:]]+$' "${ours[@]}"
}
# What is published speaks of the project alone.
no_machine() {
	not grep -nIE '/(work|home|root)/[a-z]|deb[.]debian' "${ours[@]}" "$PATCHES"/*/*.patch
}
targets_documented() {
	local t rc=0
	while read -r t; do
		grep -q "make $t\b" README.md Documentation/series/*.rst || { say "make $t is not documented"; rc=1; }
	done < <(sed -n 's/^\([a-z]*\):.*## .*/\1/p' Makefile)
	return $rc
}
table_form() {
	local groups="$PLAIN_GROUPS $DEBUG_GROUPS slow npt0 soak"
	awk -F'\t' -v group="(${groups// /|})" '/^#/ { next }
		NF != 7 || $3 !~ /^(x86_64|arm64|all)$/ || $4 !~ "^(" group "(," group ")*|none)$" ||
		$5 !~ /^[1-9][0-9]*$/ || ($4 == "none") != ($7 != "-") { print FILENAME ":" NR ": " $0; bad = 1 }
		seen[$2, $3, $4]++ { print "twice: " $0; bad = 1 }
		END { exit bad }' "$PATCHES/tests.tsv"
}
# Every selftest is run, or there is a reason.
table_complete() {
	local arch f n tests rc=0
	for arch in $ARCHES; do
		tests=$("$TOP/scripts/build-tests" "$arch") || return
		tests=$tests/kvm
		[[ -x $tests/set_memory_region_test ]] || { say "no selftests in $tests"; return 1; }
		while read -r f; do
			n=${f#"$tests/"}
			awk -F'\t' -v n="$n" -v a="$arch" '{ t = $2; sub(/@.*/, "", t) }
				t == n && ($3 == a || $3 == "all") { found = 1 } END { exit !found }' \
				"$PATCHES/tests.tsv" || { say "tests.tsv does not list $n for $arch"; rc=1; }
		done < <(find "$tests" -type f -perm -100 ! -name '*.so*')
	done
	return $rc
}
init_warnings() {
	gcc -O2 -Wall -Wextra -Werror -fsyntax-only scripts/init.c scripts/victim.c
}

ok "shellcheck" shellcheck -x -P SCRIPTDIR:. "${programs[@]}" "${sourced[@]}"
ok "every script has a usage line" usage_line
ok "PID 1 and the victim compile without warnings" init_warnings
ok "spelling" spelling
ok "no trailing white space" clean_text
ok "no word of one machine" no_machine
ok "every make target is documented" targets_documented
ok "tests.tsv is well formed" table_form
ok "tests.tsv lists every selftest" table_complete
done_testing
