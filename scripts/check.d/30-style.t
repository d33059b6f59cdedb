#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Every patch is fit to be read: checkpatch, spelling, maintainers.
. "$(dirname "$0")/tap.sh"
# checkpatch needs the modules of Debian's Python, whatever else is installed.
PATH=/usr/bin:$PATH
src=$("$TOP/scripts/src" patched)
cd "$src" || exit
mapfile -t patches < "$PATCHES/series"
dictionary=$(dpkg -L codespell | grep '/dictionary\.txt$')

# Findings that are right as they are, in all patches: the tree has one commit for the
# base, so no hash of upstream is known in it; and MAINTAINERS has patterns for new files,
# as the check of it proves.
everywhere="UNKNOWN_COMMIT_ID FILE_PATH_CHANGES"
info=$("$TOP/scripts/patch-info")

# What checkpatch finds except for the patch's trailers "Checkpatch: TYPE, REASON", each
# of which must be needed.
checkpatch() {
	local type types
	types=$(awk -F'\t' -v patch="${1#"$PATCHES/"}" '$1 == patch && $2 == "checkpatch" { print $3 }' <<< "$info")
	run_checkpatch "$1" $everywhere $types || return
	for type in $types; do
		# shellcheck disable=SC2046 # a list
		if run_checkpatch "$1" $everywhere $(grep -vxF "$type" <<< "$types"); then
			say "the trailer Checkpatch: $type is not needed"
			return 1
		fi
	done
}
# run_checkpatch PATCH TYPE-TO-IGNORE...
run_checkpatch() {
	local types
	types=$(IFS=,; echo "${*:2}")
	scripts/checkpatch.pl --strict --quiet --no-summary --show-types --codespell \
		--codespellfile "$dictionary" ${types:+--ignore "$types"} "$1"
}
maintainers() {
	local f rc=0
	for f in $(git diff --name-only base HEAD); do
		scripts/get_maintainer.pl --no-git --no-git-fallback --no-rolestats "$f" | grep -q '@' ||
			{ say "nobody maintains $f"; rc=1; }
	done
	return $rc
}
# The file must be one that the kernel's own tool understands and finds nothing
# wrong with, and it must cover what the series adds.
our_maintainers() {
	local f rc=0
	# The self-test takes no other option: give it a tree with our file.
	mkdir -p "$work/tree"
	ln -sf "$src"/* "$src/.git" "$work/tree"
	ln -sf "$TOP/MAINTAINERS" "$work/tree/MAINTAINERS"
	none < <(cd "$work/tree" && scripts/get_maintainer.pl --self-test=sections,patterns 2>&1)
	for f in $(git diff --diff-filter=A --name-only base HEAD); do
		scripts/get_maintainer.pl --mpath "$TOP/MAINTAINERS" --no-git --no-git-fallback --no-rolestats "$f" |
			grep -q "$SERIES_EMAIL" || { say "MAINTAINERS does not cover $f"; rc=1; }
	done
	return $rc
}

topics | sed "s|^|$work/|" | xargs mkdir -p
# As many patches at a time as there are jobs, shown in their order.
for p in "${patches[@]}"; do
	while (($(jobs -rp | wc -l) >= JOBS)); do
		wait -n
	done
	(
		rc=0
		checkpatch "$PATCHES/$p" > "$work/$p.log" 2>&1 || rc=$?
		say "$rc" > "$work/$p.rc"
	) &
done
wait
found() {
	cat "$work/$1.log"
	return "$(cat "$work/$1.rc")"
}
for p in "${patches[@]}"; do
	ok "checkpatch ${p%.patch}" found "$p"
done
ok "every touched file has a maintainer in the kernel" maintainers
ok "MAINTAINERS is valid and covers what the series adds" our_maintainers
done_testing
