#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The scripts, and what is written by hand, are in order.
. "$(dirname "$0")/tap.sh"
cd "$TOP" || exit

mapfile -t programs < <(grep -lE '^#!/bin/bash' -r scripts .ci)
mapfile -t python < <(grep -lE '^#!.*python3' -r scripts)
mapfile -t sourced < <(find scripts -name '*.sh')
mapfile -t ours < <(git ls-files -co --exclude-standard -- . ':!patches/*/*.patch' ':!tools' \
	':!Documentation/virt' ':!COPYING')

usage_line() {
	local f rc=0
	for f in "${programs[@]}" "${python[@]}"; do
		[[ $f == *.t || $f == .ci/* ]] && continue
		grep -qE '^(# |""")usage: ' "$f" || { say "$f has no usage line"; rc=1; }
	done
	return $rc
}
# "inout" is a word of the language of syzkaller.
spelling() { codespell -L inout "${ours[@]}"; }
clean_text() {
	not grep -nE '[[:space:]]+$' "${ours[@]}"
}
# No path and no host name of the machine on which this was written.
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
# Every selftest is run, or there is a reason.
table_complete() {
	local arch tests
	for arch in $ARCHES; do
		tests=$("$TOP/scripts/build-tests" "$arch")/kvm
		[[ -x $tests/set_memory_region_test ]] || { say "no selftests in $tests"; return 1; }
		find "$tests" -type f -perm -100 ! -name '*.so*' -printf '%P\n' |
			table unlisted "$arch" | sed "s/\$/ is not listed for $arch/"
	done | none
}
init_warnings() {
	gcc -O2 -Wall -Wextra -Werror -fsyntax-only scripts/init.c scripts/victim.c
}

ok "shellcheck" shellcheck -x -P SCRIPTDIR:. "${programs[@]}" "${sourced[@]}"
ok "every script has a usage line" usage_line
ok "PID 1 and the victim compile without warnings" init_warnings
ok "spelling" spelling
ok "no trailing white space" clean_text
ok "no path or host name of one machine" no_machine
ok "every make target is documented" targets_documented
ok "the tables of tests, figures and machines are well formed" table check
ok "tests.tsv lists every selftest" table_complete
done_testing
