#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Every patch is fit to be read: checkpatch, spelling, maintainers.
. "$(dirname "$0")/tap.sh"
# checkpatch needs the modules of Debian's Python, whatever else is installed.
PATH=/usr/bin:$PATH
src=$("$TOP/scripts/src" patched)
cd "$src" || exit
mapfile -t patches < <(patch_files)
dictionary=$(dpkg -L codespell | grep '/dictionary\.txt$')

# exceptions NUMBER [all]: the types that are excepted for this patch [or for all]
exceptions() {
	awk -F'\t' -v n="$1" -v all="${2:-}" '!/^#/ && ($1 == n || $1 == all) { print $2 }' "$PATCHES/checkpatch.tsv"
}
# What checkpatch finds but for the exceptions, of which there must be none that
# is not needed.
checkpatch() {
	local number type types
	number=$(basename "$1")
	number=${number%%-*}
	mapfile -t types < <(exceptions "$number" all)
	run_checkpatch "$1" "${types[@]}" || return
	for type in $(exceptions "$number"); do
		mapfile -t types < <(exceptions "$number" all | grep -vxF "$type")
		if run_checkpatch "$1" "${types[@]}"; then
			say "checkpatch.tsv excepts $type of $number for nothing"
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
	none < <(cd "$work/tree" && scripts/get_maintainer.pl --self-test=sections,patterns 2>&1) || return
	for f in $(git diff --diff-filter=A --name-only base HEAD); do
		scripts/get_maintainer.pl --mpath "$TOP/MAINTAINERS" --no-git --no-git-fallback --no-rolestats "$f" |
			grep -q "$SERIES_EMAIL" || { say "MAINTAINERS does not cover $f"; rc=1; }
	done
	return $rc
}

# As many patches at a time as there are jobs, shown in their order.
for p in "${patches[@]}"; do
	while (($(jobs -rp | wc -l) >= JOBS)); do
		wait -n
	done
	(
		rc=0
		checkpatch "$p" > "$work/${p##*/}.log" 2>&1 || rc=$?
		say "$rc" > "$work/${p##*/}.rc"
	) &
done
wait
found() {
	cat "$work/$1.log"
	return "$(cat "$work/$1.rc")"
}
for p in "${patches[@]}"; do
	ok "checkpatch $(basename "$p" .patch)" found "${p##*/}"
done
ok "every touched file has a maintainer in the kernel" maintainers
ok "MAINTAINERS is valid and covers what the series adds" our_maintainers
done_testing
