# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # used by those who source it
#
# Common ground of the scripts, to be sourced: where things are, how steps are
# shown, and how an error is said.
#
# Environment (all optional):
#   BASE            folder under patches/ to work on (default: the oldest)
#   JOBS            parallel jobs, 1 or more (default: number of CPUs)
#   TOPIC           a topic's name: the patched kernel has this topic and those that
#                   it requires, and no other (default: all topics)
#   XDG_CACHE_HOME  where downloads and the unpacked base are kept

set -euo pipefail
shopt -s inherit_errexit nullglob
export LC_ALL=C

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DEFAULT_BASE=$(cd "$TOP/patches" && printf '%s\n' */ | sort -V | head -n 1)
DEFAULT_BASE=${DEFAULT_BASE%/}
BASE=${BASE:-$DEFAULT_BASE}
JOBS=${JOBS:-$(nproc)}
TOPIC=${TOPIC:-}
PATCHES=$TOP/patches/$BASE
BUILD=$TOP/build/$BASE
TESTS=$BUILD/tests${TOPIC:+/$TOPIC}	# the selftests that were built
OUT=$BUILD/out${TOPIC:+/$TOPIC}	# what the machines leave
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/kvm-series
ARCHES="x86_64 arm64"
# The groups of tests.tsv that make check runs on plain and on debug kernels.
PLAIN_GROUPS="fast clock single shadow turns"
DEBUG_GROUPS="debug single shadow turns"

say() { printf '%s\n' "$*"; }
die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# usage: the comment at the top of the script, and exit code 2
usage() {
	awk 'NR < 3 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0" >&2
	exit 2
}

[[ -d $PATCHES ]] || die "no base '$BASE': BASE must be one of: $(cd "$TOP/patches" && echo */)"
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || die "JOBS must be a number from 1, not '$JOBS'"

# What the scripts do with git does not depend on anybody's configuration.
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
export GIT_CONFIG_COUNT=2 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
export GIT_CONFIG_KEY_1=gc.auto GIT_CONFIG_VALUE_1=0	# not while something is measured
export GIT_TERMINAL_PROMPT=0
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_EDITOR
SERIES_NAME="KVM Series Developers"
SERIES_EMAIL=kvm-series@example.org
EPOCH=2000-01-01T00:00:00Z	# date of the commits that are not a patch

# as_series git ...: commit under the fixed identity
as_series() {
	GIT_AUTHOR_NAME=$SERIES_NAME GIT_AUTHOR_EMAIL=$SERIES_EMAIL \
	GIT_COMMITTER_NAME=$SERIES_NAME GIT_COMMITTER_EMAIL=$SERIES_EMAIL "$@"
}

# base_info KEY: a value of patches/<base>/BASE
base_info() {
	local v
	v=$(sed -n "s/^$1=//p" "$PATCHES/BASE")
	[[ -n $v ]] || die "$PATCHES/BASE has no line $1=..."
	say "$v"
}

# A topic is a folder NN-NAME with its patches and the files TOPIC_FILES, which are
# written by hand.  The topic's name is NAME.
TOPIC_FILES="cover-letter.txt mainline.rst requires"
#
# topics: the folders of the topics, in the order of the series file
topics() { cut -d / -f 1 "$PATCHES/series" | uniq; }

# patch_files [TOPIC-FOLDER]: the patches of the series, or of one topic, in order
patch_files() { sed -n "s|^${1:+$1/}|$PATCHES/&|p" "$PATCHES/series"; }

# topic_folder NAME: the folder of the topic with this name
topic_folder() {
	topics | awk -v name="$1" '{ t = $0; sub(/^[0-9]+-/, "", t) } t == name { print; found = 1 } END { exit !found }' ||
		die "no topic '$1' in patches/$BASE; the topics are: $(topics | sed 's/^[0-9]*-//' | xargs)"
}

# with_required NAME: the folders of the topic and of all topics that it requires,
# directly or through others, in the order of the series
with_required() {
	local t name list
	local -A wanted=([$1]=yes)
	list=$(topic_folder "$1")
	# A topic requires only topics before it, so one pass from the end finds them all.
	list=
	while read -r t; do
		[[ ${wanted[${t#*-}]:-} ]] || continue
		unset "wanted[${t#*-}]"
		list=$t$'\n'$list
		[[ -f $PATCHES/$t/requires ]] || die "patches/$BASE/$t/requires is missing"
		while read -r name; do
			wanted[$name]=$t
		done < "$PATCHES/$t/requires"
	done <<< "$(topics | tac)"
	for name in "${!wanted[@]}"; do
		die "patches/$BASE/${wanted[$name]}/requires names '$name', which is no topic before it"
	done
	printf '%s' "$list"
}

# tests_of ARCH GROUP [FEATURE...]: the tests of a group in tests.tsv, all or those of
# the named features
tests_of() {
	awk -F'\t' -v arch="$1" -v group="$2" -v features=" ${*:3} " '
		($3 == arch || $3 == "all") && index("," $4 ",", "," group ",") &&
		(features == "  " || index(features, " " $1 " ")) { print $2 }' "$PATCHES/tests.tsv"
}
group_has_tests() { [[ $(tests_of "$@") ]]; }

# run_has_tests ARCH [FEATURE...]: does make run have any, of the named features?
run_has_tests() {
	local group
	for group in $PLAIN_GROUPS; do
		! group_has_tests "$1" "$group" "${@:2}" || return 0
	done
	return 1
}

# use_arch ARCH: qemu, machine, console, append, kernel_make, kernel_cc, kernel_image
use_arch() {
	[[ -f $TOP/scripts/qemu/$1.sh ]] || die "no such architecture: '$1' (want one of: $ARCHES)"
	# shellcheck source=scripts/qemu/x86_64.sh
	. "$TOP/scripts/qemu/$1.sh"
}

# kernel_sources REPO COMMIT ARCH: a hash of everything that a plain kernel is built
# from.  Documents, selftests and other architectures are not in it.
kernel_sources() (
	use_arch "$3"
	{
		git -C "$1" ls-tree "$2" | grep -vE $'\t(Documentation|MAINTAINERS|LICENSES|CREDITS|arch|tools)$'
		git -C "$1" ls-tree "$2" "$(cut -d / -f 1-2 <<< "$kernel_image")" arch/Kconfig
		git -C "$1" ls-tree "$2" tools/ | grep -v $'\ttools/testing$'
		cat "$TOP/scripts/kconfig/"{common,"$3"}.config "$PATCHES/kconfig/$3"*.config
		$kernel_cc --version
	} | sha256sum | cut -d ' ' -f 1
)

# kmake SRC OUT ARG...: make in the kernel source SRC for the architecture of
# use_arch, into the folder OUT of it.  The compiler's work is the same wherever the
# source lies and whoever builds: paths are relative, time and names are fixed, so
# that ccache serves all.
kmake() {
	local src=$1 out=$2 cc=$kernel_cc
	shift 2
	command -v ccache > /dev/null && cc="ccache $kernel_cc"
	CCACHE_NOHASHDIR=1 KBUILD_BUILD_TIMESTAMP=2000-01-01 \
	KBUILD_BUILD_USER=kvm-series KBUILD_BUILD_HOST=localhost \
		make -s -C "$src" O="$out" "${kernel_make[@]}" CC="$cc" -j"$JOBS" "$@"
}

elapsed() { printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); }

# need_tool TOOL...: say what is missing and how to get it
need_tool() {
	local t
	for t; do
		command -v "$t" > /dev/null ||
			die "$t is not installed: run 'make deps' (installs Debian packages)"
	done
}

# need_space DIR GIB: stop before a disk is full rather than after
need_space() {
	local free
	mkdir -p "$1" || die "cannot create $1"
	free=$(df --output=avail -k "$1" | tail -n 1)
	((free >= $2 * 1024 * 1024)) ||
		die "$1 has $((free / 1024)) MiB free, $2 GiB are needed: free some space" \
		    "(or, for the cache, point XDG_CACHE_HOME elsewhere)"
}

# step LOG TITLE COMMAND...: run a long command with its output in LOG; show
# the time it takes; on failure show the end of the log.  Returns the
# command's exit code.  If the command is a function, errexit is off in it.
step() {
	local log=$1 title=$2 start=$SECONDS rc=0 ticker
	shift 2
	mkdir -p "$(dirname "$log")"
	# One line a minute, so that neither a person nor CI takes it for hung.
	(
		trap 'kill "$!" 2> /dev/null; exit' TERM
		while :; do
			sleep 60 &
			wait "$!"
			say "  ... $title, $(elapsed $((SECONDS - start)))"
		done
	) &
	ticker=$!
	"$@" > "$log" 2>&1 < /dev/null || rc=$?
	kill "$ticker" 2> /dev/null || :
	wait "$ticker" 2> /dev/null || :
	if ((rc)); then
		say "  FAILED $title after $(elapsed $((SECONDS - start))), exit code $rc"
		say "  the end of ${log#"$TOP"/}:"
		tail -n 25 "$log" | sed 's/^/    /'
		grep -q 'No space left on device' "$log" && say "  the disk is full: free some space"
	else
		say "  $title: $(elapsed $((SECONDS - start)))"
	fi
	return "$rc"
}

# locked FILE COMMAND...: one at a time
locked() {
	local lock=$1
	shift
	mkdir -p "$(dirname "$lock")"
	(
		flock 9
		"$@" 9>&-
	) 9> "$lock"
}

[[ ! $TOPIC ]] || topic_folder "$TOPIC" > /dev/null
