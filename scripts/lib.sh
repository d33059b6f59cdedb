# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # used by those who source it
#
# What the scripts share, to be sourced: paths, steps that show their progress, and
# messages.
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

# table COMMAND ARGUMENT...: scripts/table.py
table() { PATCHES=$PATCHES python3 "$TOP/scripts/table.py" "$@"; }

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

# topic_features: with TOPIC, the choice for scripts/table.py of the tests of this topic and
# of those that it requires
topic_features() {
	[[ ! $TOPIC ]] || { say --features; with_required "$TOPIC" | sed 's/^[0-9]*-//'; }
}

# use_arch ARCH: qemu, qemu_machine, console, append, kernel_make, kernel_cc, kernel_image
use_arch() {
	[[ -f $TOP/scripts/qemu/$1.sh ]] || die "no such architecture: '$1' (want one of: $ARCHES)"
	# shellcheck source=scripts/qemu/x86_64.sh
	. "$TOP/scripts/qemu/$1.sh"
}

# use_machine ARCH NAME: the environment that scripts/boot takes for a machine of
# scripts/machines.tsv
use_machine() {
	local row accel cpus append extra
	row=$(table machine "$1" "$2")
	IFS=$'\t' read -r accel cpus append extra <<< "$row"
	[[ $accel = - ]] || export ACCEL=$accel
	[[ $cpus = - ]] || export CPUS=$cpus
	[[ $append = - ]] || export APPEND="$append ${APPEND:-}"
	if [[ $accel = bochs ]]; then
		[[ $extra = - ]] || export MODEL=$extra
	else
		[[ $extra = - ]] || export EXTRA="$extra ${EXTRA:-}"
	fi
}

# test_files LIST DIR: the programs of DIR that the tests of LIST run, as scripts/boot
# takes them: SOURCE:PATH
test_files() {
	cut -f 3 "$1" | cut -d ' ' -f 1 | sort -u | sed "s|^/\(.*\)|$2/\1:\1|"
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
# that ccache serves all.  Leaves out the check of exported symbols, which would take more
# than a third of the time of a build that ccache serves; check "build" does it for all files
# that the series touches.
kmake() {
	local src=$1 out=$2 cc=$kernel_cc
	shift 2
	command -v ccache > /dev/null && cc="$TOP/scripts/ccache-cc $kernel_cc"
	CCACHE_NOHASHDIR=1 KBUILD_BUILD_TIMESTAMP=2000-01-01 \
	KBUILD_BUILD_USER=kvm-series KBUILD_BUILD_HOST=localhost \
		make -s -C "$src" O="$out" "${kernel_make[@]}" CC="$cc" cmd_check_local_export=: -j"$JOBS" "$@"
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

# need_space DIR GIB: stop unless the disk of DIR has GIB GiB of free space
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
#
# The exit code comes through a pipe: "wait" does not always find a process substitution
# when process IDs have wrapped, and then returns something else.
strictly() {
	local rc=
	read -r rc < <(set +e; exec 4>&1 >&3 3>&-; (exec 4>&-; set -e; "$@"); say "$?" >&4) || :
	return "${rc:-1}"
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
	wait "$clock" || :
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

[[ ! $TOPIC ]] || topic_folder "$TOPIC" > /dev/null
