# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# A TAP producer for the checks, to be sourced: every check is a bash script
# NN-name.t that prints one point for each thing it proves.

. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

check=$(basename "$0" .t)
log=$BUILD/log/check-$check.log
work=$BUILD/check/$check
rm -rf "$work"
mkdir -p "$work" "$BUILD/log"
points=0 failed=0

# ok DESCRIPTION COMMAND...: a point that passes with exit code 0.  The command runs
# strictly: in a subshell, where the first command that fails ends it.  Shows the time
# that a long command takes.
ok() {
	local what=$1 start=$SECONDS rc=0
	shift
	strictly "$@" > "$log" 2>&1 < /dev/null || rc=$?
	((SECONDS - start < 10)) || what+=" ($(elapsed $((SECONDS - start))))"
	if ((rc == 0)); then
		say "ok $((++points)) - $what"
	else
		say "not ok $((++points)) - $what"
		failed=$((failed + 1))
		tail -n 40 "$log" | sed 's/^/# /'
	fi
}

# skip DESCRIPTION REASON
skip() { say "ok $((++points)) - $1 # SKIP $2"; }

# in_time MINUTES WHAT: may WHAT begin, which takes that long on a slow machine?  What only a
# hash selects is left out if make check would not end within 60 minutes otherwise.
in_time() {
	local minutes=$(((EPOCHSECONDS - ${CHECK_BEGAN:-EPOCHSECONDS}) / 60))
	((minutes + $1 <= 60)) && return
	skip "$2" "make check has run for $minutes minutes: scripts/check ${check#*-} does it"
	return 1
}

# last_words OUT TEST: the end of the test's log in OUT of scripts/boot, or of the kernel
# log if the test has no log, or of the console if TEST is "verdict"
last_words() {
	local f=$1/${2//\//.}.log
	[[ -f $f ]] || f=$1/kmsg
	[[ $2 != verdict ]] || f=$1/console
	tail -n 60 "$f" | sed 's/^/# /'
}

# results WHAT OUT SAID: a point for each test that ran in OUT of scripts/run-tests; SAID is
# the file with what it said
results() {
	local test result why
	[[ -f $2/results.tsv ]] || {
		say "not ok $((++points)) - $1: no results"
		sed 's/^/# /' "$3"
		return
	}
	while IFS=$'\t' read -r test result _ why; do
		case $result in
		ok) say "ok $((++points)) - $1 $test" ;;
		skip) say "ok $((++points)) - $1 $test # SKIP $why" ;;
		*)
			say "not ok $((++points)) - $1 $test: $why"
			last_words "$2" "$test"
			;;
		esac
	done < "$2/results.tsv"
}

# run_machines FLAVOUR WHEN: the tests for WHEN on the patched kernel, on the machines that
# machines_of ARCH prints, both architectures at the same time; a point for each test
run_machines() {
	local arch machine machines said run
	for arch in $ARCHES; do
		if ! machines=$(machines_of "$arch") || [[ ! $machines ]]; then
			say "not ok $((++points)) - machines of $arch for $2"
			continue
		fi
		for machine in $machines; do
			"$TOP/scripts/run-tests" patched "$arch" "$1" "$2" "$machine" \
				> "$work/$arch-$1-$2-$machine" 2>&1 || :
		done < /dev/null &
	done
	wait
	for said in "$work/"*"-$1-$2-"*; do
		run=${said##*/}
		results "$1 ${run##*-} ${run%%-*}" "$OUT/patched-$run" "$said"
	done
}

# touched_files PATCH...: the files that the patches touch, a line each
touched_files() { git apply --numstat -z "$@" | tr '\0' '\n' | cut -f 3 | sort -u; }
# unpack_base DIR FILE...: those of the files that the base has
unpack_base() {
	local dir=$1
	shift
	git -C "$BUILD/tree" ls-tree -z --name-only base "$@" |
		xargs -0 git -C "$BUILD/tree" archive base -- | tar -x -C "$dir"
}

# plain_am DIR PATCH...: a repository DIR with those files of the base that the patches
# touch, and with the patches, applied by what a user types, with a user's identity.  With
# all files of the base, git would take most of its time to read and write the index.
plain_am() {
	local dir=$1 files
	shift
	mapfile -t files < <(touched_files "$@")
	rm -rf "$dir"
	git init -q "$dir"
	unpack_base "$dir" "${files[@]}"
	git -C "$dir" add -f .
	as_series git -C "$dir" commit -q -m base
	(cd "$dir" && env -u GIT_CONFIG_GLOBAL -u GIT_CONFIG_NOSYSTEM HOME="$work" \
		git -c user.name=User -c user.email=user@example.com am "$@")
}
# same_tree DIR COMMIT: what is committed in DIR of plain_am is what COMMIT of the tree has
# there, and COMMIT changes no other file of the base
same_tree() {
	local files
	mapfile -t files < <(git -C "$1" ls-tree -r --name-only HEAD)
	diff <(git -C "$1" ls-tree -r HEAD) <(git -C "$BUILD/tree" ls-tree -r "$2" -- "${files[@]}") ||
		return
	none < <(git -C "$BUILD/tree" diff --name-only --diff-filter=d base "$2" |
		grep -vxFf <(printf '%s\n' "${files[@]}"))
}

# fails_with PATTERN COMMAND...: the command fails, and says why
fails_with() {
	local pattern=$1 said
	shift
	said=$(mktemp "$work/said.XXXXXX")
	if strictly "$@" > "$said" 2>&1; then
		cat "$said"
		say "expected a failure, but it succeeded"
		return 1
	fi
	cat "$said"
	grep -qE "$pattern" "$said" || { say "expected a message like: $pattern"; return 1; }
}

# not COMMAND...: it fails
not() { ! "$@"; }

# none: standard input is empty; what it is otherwise is shown
none() { not grep ''; }

done_testing() { say "1..$points"; }
