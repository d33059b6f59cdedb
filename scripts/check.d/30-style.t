#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Every patch is fit to be read: checkpatch, spelling, maintainers.
. "$(dirname "$0")/tap.sh"
# checkpatch needs the modules of Debian's Python, whatever else is installed.
PATH=/usr/bin:$PATH
src=$("$TOP/scripts/src" patched)
cd "$src" || exit
mapfile -t patches < "$PATCHES/series"

# False positives in all patches.  The base is a single commit in this tree, so git does not
# know any upstream commit ID.  MAINTAINERS has patterns for all new files, as
# our_maintainers() checks.
everywhere="UNKNOWN_COMMIT_ID FILE_PATH_CHANGES"
info=$("$TOP/scripts/patch-info")

# run_checkpatch N PATCH...: in one process, as checkpatch takes longer to start than for most
# patches.  With two files or more, it prints the name of each before what it finds there.
run_checkpatch() {
	local found=$work/found.$1
	shift
	scripts/checkpatch.pl --strict --no-summary --show-types --ignore "${everywhere// /,}" \
		"${@/#/$PATCHES/}" /dev/null > "$found" 2>&1 || :
	awk -v from="$PATCHES/" -v to="$work/" 'FILENAME == "-" { patch[from $0] = to $0 ".found"; next }
		$0 in patch { out = patch[$0]; printf "" > out; next }
		out { print > out }' - "$found" < <(printf '%s\n' "$@")
}
# checkpatch PATCH: what it found is what the patch's trailers "Checkpatch: TYPE, REASON" name
checkpatch() {
	cat "$work/$1.found"
	diff --label 'trailers Checkpatch' --label 'found by checkpatch' -u \
		<(awk -F'\t' -v patch="$1" '$1 == patch && $2 == "checkpatch" { print $3 }' <<< "$info" | sort -u) \
		<(sed -nE 's/^(ERROR|WARNING|CHECK):([A-Z0-9_]+):.*/\2/p' "$work/$1.found" | sort -u)
}
# In messages and in added lines.
spelling() {
	local p
	for p in "${patches[@]}"; do
		mkdir -p "$work/words/${p%/*}"
		sed -n '1,/^---$/p; s/^+\([^+]\)/\1/p' "$PATCHES/$p" > "$work/words/$p"
	done
	(cd "$work/words" && codespell .)
}
# not_covered PATTERN OPTION...: prints the files on standard input for which
# get_maintainer.pl does not print PATTERN
not_covered() {
	local pattern=$1
	shift
	# shellcheck disable=SC2016 # sh expands that
	xargs -P "$JOBS" -I FILE sh -c 'file=$1 pattern=$2; shift 2
		scripts/get_maintainer.pl --no-git --no-git-fallback --no-rolestats "$@" "$file" |
			grep -q "$pattern" || echo "$file"' - FILE "$pattern" "$@"
}
# In the kernel's own file.
maintainers() { none < <(git diff --name-only base HEAD | not_covered @); }
# The file must be one that the kernel's own tool understands and finds nothing
# wrong with, and it must cover what the series adds.
our_maintainers() {
	# The self-test takes no other option: give it a tree with our file.
	mkdir -p "$work/tree"
	ln -sf "$src"/* "$src/.git" "$work/tree"
	ln -sf "$TOP/MAINTAINERS" "$work/tree/MAINTAINERS"
	none < <(cd "$work/tree" && scripts/get_maintainer.pl --self-test=sections,patterns 2>&1)
	none < <(git diff --diff-filter=A --name-only base HEAD |
		not_covered "$SERIES_EMAIL" --mpath "$TOP/MAINTAINERS")
}

topics | sed "s|^|$work/|" | xargs mkdir -p
for ((job = 0; job < JOBS; job++)); do
	some=()
	for ((n = job; n < ${#patches[@]}; n += JOBS)); do
		some+=("${patches[n]}")
	done
	((${#some[@]} == 0)) || run_checkpatch "$job" "${some[@]}" &
done
wait
for p in "${patches[@]}"; do
	ok "checkpatch ${p%.patch}" checkpatch "$p"
done
ok "codespell finds nothing in the patches" spelling
ok "every touched file has a maintainer in the kernel" maintainers
ok "MAINTAINERS is valid and covers what the series adds" our_maintainers
done_testing
