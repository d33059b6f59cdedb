# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # used by those who source it
#
# What the scripts share, to be sourced: paths, steps that show their progress, and
# messages.
#
# Environment (all optional):
#   BASE            folder under patches/ to work on (default: the oldest)
#   JOBS            parallel jobs, 1 or more (default: number of CPUs)
#   XDG_CACHE_HOME  where downloads and the unpacked base are kept

set -euo pipefail
shopt -s inherit_errexit nullglob
export LC_ALL=C

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DEFAULT_BASE=$(cd "$TOP/patches" && printf '%s\n' */ | sort -V | head -n 1)
DEFAULT_BASE=${DEFAULT_BASE%/}
BASE=${BASE:-$DEFAULT_BASE}
JOBS=${JOBS:-$(nproc)}
PATCHES=$TOP/patches/$BASE
BUILD=$TOP/build/$BASE
OUT=$BUILD/out	# what the machines leave
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/kvm-series
ARCHES="x86_64 arm64"

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

# patch_files: the patches in the order of the series file
patch_files() {
	sed "s|^|$PATCHES/|" "$PATCHES/series"
}

# table COMMAND ARGUMENT...: scripts/table.py
table() { PATCHES=$PATCHES python3 "$TOP/scripts/table.py" "$@"; }

# use_arch ARCH: qemu, qemu_machine, console, append, kernel_make, kernel_cc, kernel_image
use_arch() {
	[[ -f $TOP/scripts/qemu/$1.sh ]] || die "no such architecture: '$1' (want one of: $ARCHES)"
	# shellcheck source=scripts/qemu/x86_64.sh
	. "$TOP/scripts/qemu/$1.sh"
}

# use_machine ARCH NAME: the environment that scripts/boot takes for a machine of
# scripts/machines.tsv
use_machine() {
	local row accel cpus append
	row=$(table machine "$1" "$2")
	IFS=$'\t' read -r accel cpus append <<< "$row"
	[[ $accel = - ]] || export ACCEL=$accel
	[[ $cpus = - ]] || export CPUS=$cpus
	[[ $append = - ]] || export APPEND="$append ${APPEND:-}"
}

# test_files LIST DIR: the programs of DIR that the tests of LIST run, as scripts/boot
# takes them: SOURCE:PATH
test_files() {
	cut -f 3 "$1" | cut -d ' ' -f 1 | sort -u | sed "s|^/\(.*\)|$2/\1:\1|"
}

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

# need_space DIR GIB: stop unless the disk has so much space
need_space() {
	local free
	mkdir -p "$1" || die "cannot create $1"
	free=$(df --output=avail -k "$1" | tail -n 1)
	((free >= $2 * 1024 * 1024)) ||
		die "$1 has $((free / 1024)) MiB free, $2 GiB are needed: free some space" \
		    "(or, for the cache, point XDG_CACHE_HOME elsewhere)"
}

# strictly COMMAND...: run a command or function in a subshell with errexit on, and
# return its exit code.  In a condition (if, ||, &&) bash turns errexit off, also in the
# functions and subshells that are called there.  It does not do so in a process
# substitution, which is why this uses one.  Not to be used in the $(...) of a condition,
# where errexit stays off.
strictly() {
	: < <(exec >&3 3>&-; set -e; "$@")
	wait "$!"
} 3>&1

# if_changed OUTPUT COMMAND...: run the command, which makes OUTPUT from what is on
# standard input, unless it has done so before from the same.  Standard input is
# everything that OUTPUT depends on: the content of files, versions, settings.
if_changed() {
	local output=$1 stamp=$1.made-from id
	shift
	id=$(sha256sum)
	[[ ! -e $output || $(cat "$stamp" 2> /dev/null) != "$id" ]] || return 0
	rm -f "$stamp"
	strictly "$@" || return
	say "$id" > "$stamp"
}

# step LOG TITLE COMMAND...: run a long command strictly, with its output in LOG; show
# the time that it takes; if it fails, show the end of the log.  Returns the exit code
# of the command.
step() {
	local log=$1 title=$2 start=$SECONDS rc=0 clock
	shift 2
	mkdir -p "$(dirname "$log")"
	# One line a minute, to show that it does not hang, until descriptor 8 is closed.
	exec 8> >(while read -r -t 60 _ || (($? > 128)); do
		say "  ... $title, $(elapsed $((SECONDS - start)))"
	done)
	clock=$!
	strictly "$@" > "$log" 2>&1 < /dev/null 8>&- || rc=$?
	exec 8>&-
	wait "$clock"
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

# locked FILE COMMAND...: run the command while nobody else holds the lock FILE
locked() {
	local lock=$1
	shift
	mkdir -p "$(dirname "$lock")"
	(
		flock 9
		"$@" 9>&-
	) 9> "$lock"
}
