#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The harness itself: every failure that is planted here turns the result red, with its
# reason.  Errors of the user or of the machine have a clear message and leave nothing
# behind.
. "$(dirname "$0")/tap.sh"

# machine ARCH FLAVOUR TESTLINE...: boot with victim as the test
machine() {
	local arch=$1 flavour=$2 tests files
	shift 2
	tests=$("$TOP/scripts/build-tests" "$arch")
	printf '%s\n' "$@" > "$work/tests"
	files=("$tests/victim:victim")
	[[ $flavour = plain ]] ||
		files+=("$BUILD/src/patched/o-$arch-$flavour/samples/kmemleak/kmemleak-test.ko:kmemleak-test.ko")
	LIMIT=${LIMIT:-} "$TOP/scripts/boot" "$arch" "$("$TOP/scripts/build-kernel" patched "$arch" "$flavour")" \
		"$work/out" "$work/tests" "${files[@]}"
}
# red NAME REASON: the test or point NAME failed, for a reason that matches
red() {
	cat "$work/out/results.tsv"
	grep -P "^\Q$1\E\tfail\t" "$work/out/results.tsv" | grep -E "$2"
}
turns_red() {
	local name=$1 reason=$2
	shift 2
	if machine "$@"; then
		say "the result is green"
		return 1
	fi
	red "$name" "$reason"
}
stays_green() { machine "$@"; }
skips() {
	machine x86_64 plain $'10\tv\t/victim skip' && grep -P '^v\tskip\t.*planted' "$work/out/results.tsv"
}
# LIMIT stops the machine before its test has ended.
no_verdict() {
	LIMIT=25 turns_red verdict 'no verdict' x86_64 plain $'9999\tv\t/victim hang' && red qemu 'not done after'
}
# QEMU's -S stops the CPUs before the first instruction.
no_boot() {
	EXTRA=-S BOOT_LIMIT=1 turns_red verdict 'no verdict' x86_64 plain $'10\tv\t/victim pass' && red qemu 'did not boot within 1 s'
}
stands_still() {
	QUIET_LIMIT=5 turns_red verdict 'no verdict' x86_64 plain $'9999\tv\t/victim hang' &&
		red qemu 'said nothing for 5 s'
}
hangs() {
	turns_red v 'not done after 3 s' x86_64 plain $'3\tv\t/victim hang' &&
		grep -A 2 '^thread .*(victim) S ' "$work/out/v.log" && grep 'do_syscall_64' "$work/out/v.log"
}
# What kselftest_harness.h prints; "_" stands for a space.
run() { say "#__RUN___________global.$1_..."; }
# cases REASON LINES: a test that prints these lines and fails is red, and so is its case
# b, for this reason; a and c are green
cases() {
	local which
	turns_red v@b "$1" x86_64 plain $'3\tv\t/victim say '"$2 then fail"
	red v 'exit code 1'
	for which in a c; do
		grep -P "^v@$which\tok\t" "$work/out/results.tsv"
	done
	grep -qx "text of b" "$work/out/v@b.log"
	not grep -q "text of b" "$work/out/v.log" "$work/out/v@"[ac].log
}
plan=1..3 a="$(run a) ok_1_global.a" b="$(run b) text_of_b" c="$(run c) ok_3_global.c"
skipped_case() {
	stays_green x86_64 plain $'3\tv\t/victim say '"$plan $a $b ok_2_#_SKIP_planted $c then pass" &&
		grep -P '^v@b\tskip\t[^\t]*\tplanted$' "$work/out/results.tsv" &&
		grep -P '^v\tok\t' "$work/out/results.tsv"
}
# The test does not end its case, so PID 1 ends the test.
hanging_case() {
	turns_red v 'not done after 1 s' x86_64 plain $'1\tv\t/victim say '"$plan $a $b then hang" && red v@b '' &&
		grep '^thread .*(victim) S ' "$work/out/v@b.log"
}
splat_in_case() {
	turns_red v@a 'splat: WARNING:planted' x86_64 plain \
		$'3\tv\t/victim say '"$plan $(run a) then log WARNING:planted" &&
		red v 'cases: 1, planned: 3' && grep 'log: WARNING:planted' "$work/out/v@a.log"
}
two_points() {
	turns_red v@a 'two points' x86_64 plain $'3\tv\t/victim say '"1..2 $a $(run a) ok_2_global.a then pass"
}
without_plan() {
	turns_red v 'cases: 1, planned: 0' x86_64 plain $'3\tv\t/victim say '"$a then pass" &&
		grep -P '^v@a\tok\t' "$work/out/results.tsv"
}
leaks() {
	turns_red 'no leak' . x86_64 debug $'60\tv\t/victim leak /kmemleak-test.ko' &&
		grep 'unreferenced object' "$work/out/no leak.log"
}

ok "a passing test is green" stays_green x86_64 plain $'10\tv\t/victim pass'
ok "a skipping test is a skip, with its reason" skips
ok "a failing test is red" turns_red v 'exit code 1' x86_64 plain $'10\tv\t/victim fail'
ok "a missing program is red" turns_red v 'exit code 127' x86_64 plain $'10\tv\t/nothing'
ok "a crashing test is red" turns_red v 'signal 6' x86_64 plain $'10\tv\t/victim crash'
ok "a machine that stands still is stopped, and red" stands_still
ok "a hanging test is red, and where it stands is shown" hangs
ok "a splat in the log is red" turns_red v 'splat: WARNING:planted' \
	x86_64 plain $'10\tv\t/victim log WARNING:planted'
ok "a kernel warning is red" turns_red v 'the machine died' x86_64 plain $'10\tv\t/victim splat'
ok "a kernel panic is red" turns_red verdict 'no verdict' x86_64 plain $'10\tv\t/victim panic'
ok "a kernel panic is red on arm64" turns_red verdict 'no verdict' arm64 plain $'10\tv\t/victim panic'
ok "a machine without a verdict is red" no_verdict
ok "a machine that does not boot is red" no_boot
ok "a failing case is red, the others are not" cases 'Test failed at step #254' \
	"$plan $a $b #_b:_Test_failed_at_step_#254 not_ok_2_global.b $c"
ok "a case that a signal ends is red" cases 'by signal 11' \
	"$plan $a $b #_b:_Test_terminated_unexpectedly_by_signal_11 not_ok_2_global.b $c"
ok "a case that the test ends after its time limit is red" cases 'by timeout' \
	"$plan $a $b #_b:_Test_terminated_by_timeout not_ok_2_global.b $c"
ok "a case without a result is red" cases '' "$plan $a $b $c"
ok "a skipped case is a skip, with its reason" skipped_case
ok "a hanging case is red, and where it stands is shown" hanging_case
ok "a splat is that of its case" splat_in_case
ok "two points of one name are red" two_points
ok "cases without a plan are red" without_plan
ok "a leak is red, with its report" leaks
ok "no leak is green" stays_green x86_64 debug $'60\tv\t/victim pass'

# As piggy.S does, an assembler source includes a file whose length alone is in the source.
includes_the_file() {
	local n
	printf '.incbin "%s/payload"\n' "$work" > "$work/p.S"
	for n in 1 2; do
		printf %s "payload$n" > "$work/payload"
		CCACHE_DIR=$work/ccache CCACHE_DEPEND=1 \
			"$TOP/scripts/ccache-cc" gcc -MMD -MF "$work/p.d" -c -o "$work/p.o" "$work/p.S" || return 1
		grep -q "payload$n" "$work/p.o" || return 1
	done
}
ok "no object with another file comes from ccache" includes_the_file

# Shell code: nothing goes on after a command that failed.
breaks_off() {
	say begins
	false
	say "went on"
}
breaks_off_in_substitution() {
	local x
	x=$(breaks_off)
	say "went on with $x"
}
breaks_off_in_subshell() {
	(
		false
		say "went on"
	)
	say "went on"
}
step_breaks_off() {
	local f
	for f in breaks_off breaks_off_in_{substitution,subshell}; do
		fails_with FAILED step "$work/step.log" planted "$f"
		not grep 'went on' "$work/step.log"
	done
}
point_breaks_off() {
	ok planted breaks_off > "$work/point"
	cat "$work/point"
	grep '^not ok .* planted$' "$work/point"
	not grep 'went on' "$work/point"
}
# The clock of a step ends with it, and ends nothing else.
quick_steps() {
	local pid i
	for i in 1 2 3 4 5 6 7 8 9 10; do
		sleep 60 &
		pid=$!
		step "$work/step.log" "planted, $i" true
		kill "$pid"
	done
}
# if_changed: what ran is in $work/ran
ran() {
	say x >> "$work/ran"
	say made > "$work/made"
	"$@"
}
made_from() {
	say "$1" | if_changed "$work/made" ran "${@:2}"
}
runs_if_changed() {
	rm -f "$work/made"* "$work/ran"
	made_from 1 true
	made_from 1 true
	[[ $(wc -l < "$work/ran") = 1 ]]
	made_from 2 true
	rm "$work/made"
	made_from 2 true
	[[ $(wc -l < "$work/ran") = 3 ]]
}
runs_again_if_failed() {
	rm -f "$work/made"* "$work/ran"
	not made_from 1 false
	not made_from 1 false
	made_from 1 true
	[[ $(wc -l < "$work/ran") = 3 ]]
}
ok "a step whose function fails in the middle is red" step_breaks_off
ok "a point whose function fails in the middle is red" point_breaks_off
ok "a quick step ends no process of others" quick_steps
ok "what did not change is not made again" runs_if_changed
ok "what failed is made again" runs_again_if_failed

# Tables.
# bad_row TABLE PATTERN FIELD...: a row that is wrong, and the message
bad_row() {
	local IFS=$'\t'
	cp "$PATCHES/"*.tsv "$work"
	say "${*:3}" >> "$work/$1"
	fails_with "$1:[0-9]+: $2" env PATCHES="$work" "$TOP/scripts/table.py" check
}
wrong_tests() {
	bad_row tests.tsv '7 fields, expected 8' base x all run plain 30 -
	bad_row tests.tsv 'no such architecture: sparc' base x sparc run plain 30 - -
	bad_row tests.tsv 'when must be none or some of .*, not fast' base x all fast plain 30 - -
	bad_row tests.tsv 'when must be none or some of .*, not run,none' base x all run,none plain 30 - -
	bad_row tests.tsv "no machine 'warp' for arm64" base x arm64 run warp 30 - -
	bad_row tests.tsv "no machine 'shadow' for arm64" base x all run shadow 30 - -
	bad_row tests.tsv 'seconds must be' base x all run plain 0 - -
	bad_row tests.tsv '.* needs a reason' base x all none - 30 - -
	bad_row tests.tsv 'set_memory_region_test twice for x86_64' \
		base set_memory_region_test x86_64 run single 30 - -
}
wrong_figures() {
	bad_row bench.tsv "no machine 'smp' for arm64" base x arm64 smp ns x - x -
	bad_row bench.tsv 'no such form of a goal: <=fast' base x arm64 plain ns x - x '<=fast'
	bad_row bench.tsv "no such form of a goal: 1.0x" base x arm64 plain ns x - x 1.0x
	bad_row bench.tsv '.* twice in ' "$(tail -n 1 "$PATCHES/bench.tsv")"
	fails_with "no figure 'y' in base" bad_row bench.tsv 'never' base x arm64 plain ns x - x '<=1.1*y'
}
# figure VERDICT BASE PATCHED GOAL: a figure, beside another one whose value is 100
figure() {
	{
		printf 'feature\tfigure\tunit\tbase\tpatched\tgoal\nf\tother\tns\t-\t100\t-\n'
		printf 'f\tthis\tns\t%s\t%s\t%s\n' "${@:2}"
	} > "$work/bench.tsv"
	case $1 in
	met) table goals "$work/bench.tsv" | grep ': met$' ;;
	*) fails_with ": $1\$" table goals "$work/bench.tsv" ;;
	esac
}
missed_goals() {
	figure met 100 101 '<=1.01x'
	figure MISSED 100 102 '<=1.01x'
	figure 'nothing to compare with' - 100 '<=1.01x'
	figure met - 110 '<=1.10*other'
	figure MISSED - 111 '<=1.10*other'
	figure met 5 0 '<=0'
	figure MISSED 0 1 '<=0'
	figure 'no value' 100 - '<=1.01x'
	figure 'no value' 100 - -
}
# result BASE PATCHED: the last line of a run with a test that had these results
result() {
	printf 'feature\tarch\ttest\tbase\tpatched\nbase\tarm64\tx\t%s\t%s\n' "$@" > "$work/results.tsv"
	table summary "$work/results.tsv"
}
bad_results() {
	result fail ok
	result skip skip
	fails_with '1 failed' result ok fail
	fails_with '1 failed' result ok skip
	fails_with '1 failed' result ok -
}
unknown_machine() {
	fails_with "no machine 'warp' for arm64; there are: plain " "$TOP/scripts/run-tests" patched arm64 plain run warp
}
unknown_test() {
	fails_with "tests.tsv has no test 'no_such_test' for arm64" "$TOP/scripts/run-tests" patched arm64 plain no_such_test
}
ok "a wrong row of tests.tsv is an error" wrong_tests
ok "a wrong row of bench.tsv is an error" wrong_figures
ok "a missed goal is red" missed_goals
ok "a test that fails, or is skipped only on the patched kernel, is red" bad_results
ok "an unknown machine is an error" unknown_machine
ok "an unknown test is an error" unknown_test

# Mutants.
# mutates LINE: the kinds of mutants of this line of code
mutates() {
	local repo=$work/mutants
	rm -rf "$repo"
	git init -q "$repo"
	printf 'static int f(int a)\n{\n\t%s\n}\n' "$1" > "$repo/f.c"
	git -C "$repo" add f.c
	as_series git -C "$repo" commit -qm f
	say f.c | "$TOP/scripts/mutants.py" "$repo" 1 1 "$(git -C "$repo" rev-parse HEAD)" | cut -f 1-4 | xargs
}
mutants_of_lines() {
	[[ $(mutates 'kick(a);') = "f.c 3 f drop" ]]
	[[ $(mutates 'a = g(a) + 1;') = "f.c 3 f "@(drop|off) ]]
	[[ $(mutates 'if (ready)') = "f.c 3 f "@(never|always) ]]
	[[ $(mutates 'return a < b;') = "f.c 3 f bound" ]]
	[[ $(mutates 'return a && b;') = "f.c 3 f logic" ]]
	[[ $(mutates 'return -EINVAL;') = "f.c 3 f success" ]]
	[[ $(mutates 'return true;') = "f.c 3 f bool" ]]
	[[ ! $(mutates 'spin_lock(&a->lock);') ]]
	[[ ! $(mutates 'return 0;') ]]
}
unknown_mutants() { fails_with "no topic 'nothing'" "$TOP/scripts/mutants" nothing; }
ok "each kind of line has its mutants" mutants_of_lines
ok "mutants of an unknown topic are an error" unknown_mutants

# A project of its own, so that nothing here can harm the real one.
copy=$work/project
project() {
	rm -rf "$copy"
	mkdir -p "$copy/build/$BASE"
	cp -r "$TOP"/{patches,scripts,Makefile} "$copy"
	for d in tools Documentation; do
		[[ ! -d $TOP/$d ]] || cp -r "$TOP/$d" "$copy"
	done
	[[ ${1:-} != tree ]] || {
		git clone -q --shared --no-checkout "$BUILD/tree" "$copy/build/$BASE/tree"
		git -C "$copy/build/$BASE/tree" fetch -q origin '+refs/applied/*:refs/applied/*'
		git -C "$copy/build/$BASE/tree" symbolic-ref HEAD refs/heads/series
		git -C "$copy/build/$BASE/tree" update-ref refs/heads/series "$tip"
		git -C "$copy/build/$BASE/tree" update-ref refs/exported "$tip"
		git -C "$copy/build/$BASE/tree" sparse-checkout set --no-cone /virt/kvm/ /COPYING /.gitattributes
		git -C "$copy/build/$BASE/tree" reset -q --hard
	}
}
tip=$("$TOP/scripts/apply" "$BUILD/tree")
ctree=$copy/build/$BASE/tree
last=$(topics | tail -n 1)
first_patch=$(head -n 1 "$PATCHES/series")

export_difference() {
	project tree
	sed -i 's/^Subject: \[PATCH\] KVM:/Subject: [PATCH]  KVM:/' "$copy/patches/$BASE/$first_patch"
	fails_with "is not what 'make export' writes" "$copy/scripts/export" --check
}
mirror_difference() {
	project tree
	mkdir -p "$copy/tools/testing/selftests/kvm"
	echo edited > "$copy/tools/testing/selftests/kvm/by_hand.c"
	fails_with by_hand.c "$copy/scripts/export" --check
}
unlisted_patch() {
	project tree
	cp "$copy/patches/$BASE/$first_patch" "$copy/patches/$BASE/$last/0099-extra.patch"
	fails_with "$last/0099-extra.patch" "$copy/scripts/tree"
}
does_not_apply() {
	project tree
	sed -i 's/^-\t/-\tnot what is there /' "$copy/patches/$BASE/$first_patch"
	fails_with "a patch of ${first_patch%%/*} does not apply" "$copy/scripts/tree" &&
		[[ $(git -C "$ctree" rev-parse series) = "$tip" ]] && not compgen -G "$copy/build/$BASE/apply.*/"
}
dirty_tree() {
	project tree
	echo edited >> "$ctree/COPYING"
	fails_with 'not committed' "$copy/scripts/export"
}
fixup_left() {
	project tree
	echo edited >> "$ctree/COPYING"
	as_series git -C "$ctree" commit -qasm 'fixup! KVM: something'
	fails_with 'fold these first' "$copy/scripts/export"
}
not_signed() {
	project tree
	echo edited >> "$ctree/COPYING"
	as_series git -C "$ctree" commit -qam 'KVM: something'
	fails_with 'lack a Signed-off-by' "$copy/scripts/export" && diff -r "$TOP/patches" "$copy/patches"
}
unexported_work() {
	project tree
	echo edited >> "$ctree/COPYING"
	as_series git -C "$ctree" commit -qasm 'KVM: something'
	rm "$copy/patches/$BASE/$(tail -n 1 "$copy/patches/$BASE/series")"
	sed -i '$d' "$copy/patches/$BASE/series"
	fails_with 'not exported' "$copy/scripts/tree" && grep -q edited "$ctree/COPYING"
}
export_adds() {
	project tree
	echo edited >> "$ctree/COPYING"
	as_series git -C "$ctree" commit -qasm 'KVM: something'
	"$copy/scripts/export" && compgen -G "$copy/patches/$BASE/$last/*-KVM-something.patch" &&
		"$copy/scripts/export" --check && "$copy/scripts/tree" && "$copy/scripts/export" --check
}
# commit_topic FOLDER: begin a topic at the end of the series
commit_topic() { as_series git -C "$ctree" commit -q --allow-empty -m "topic: $1"; }
add_patch() {
	echo edited >> "$ctree/COPYING"
	as_series git -C "$ctree" commit -qasm 'KVM: something'
}
# refuses_topic MESSAGE FOLDER: export does not begin this topic, and writes nothing
refuses_topic() {
	project tree
	commit_topic "$2"
	add_patch
	fails_with "$1" "$copy/scripts/export" && diff -r "$TOP/patches" "$copy/patches"
}
topic_not_empty() {
	project tree
	echo edited >> "$ctree/COPYING"
	as_series git -C "$ctree" commit -qam 'topic: 99-new'
	add_patch
	fails_with "'topic: 99-new' must be empty" "$copy/scripts/export"
}
topic_without_patch() {
	project tree
	commit_topic 99-new
	fails_with 'topic 99-new has no patch' "$copy/scripts/export"
}
patch_before_topics() {
	project tree
	git -C "$ctree" reset -q --soft base
	as_series git -C "$ctree" commit -qsm 'KVM: something'
	fails_with 'the first commit must be an empty one' "$copy/scripts/export"
}
# The next three work in one project.  The new topic's patch changes a file that another
# topic added.
new_topic() {
	local file
	project tree
	file=$(git -C "$ctree" log --diff-filter=A --format= --name-only base..series | sed -n 1p)
	git -C "$ctree" sparse-checkout add "/$file"
	commit_topic 99-new
	echo >> "$ctree/$file"
	as_series git -C "$ctree" commit -qasm 'KVM: something'
	mkdir "$copy/patches/$BASE/99-new"
	touch "$copy/patches/$BASE/99-new/"{requires,cover-letter.txt,mainline.rst}
	"$copy/scripts/export" && compgen -G "$copy/patches/$BASE/99-new/0001-KVM-something.patch" &&
		"$copy/scripts/export" --check
}
not_alone() {
	fails_with 'a patch of 99-new does not apply' "$copy/scripts/apply" "$ctree" new
	topics | sed 's/^[0-9]*-//' > "$copy/patches/$BASE/99-new/requires"
	"$copy/scripts/apply" "$ctree" new
}
topic_gone() {
	git -C "$ctree" reset -q --hard "$tip"
	echo mine > "$copy/patches/$BASE/99-new/notes"
	fails_with 'topic 99-new is gone, but .* has other files: notes' "$copy/scripts/export"
	rm "$copy/patches/$BASE/99-new/notes"
	"$copy/scripts/export" && diff -r "$TOP/patches" "$copy/patches"
}
unknown_topic() { fails_with "no topic .nothing. .* the topics are: ${first_topic#*-}" env TOPIC=nothing "$TOP/scripts/run"; }
first_topic=${first_patch%%/*}
requires_unknown() {
	project tree
	echo nothing >> "$copy/patches/$BASE/$last/requires"
	fails_with "$last/requires names 'nothing', which is no topic before it" \
		"$copy/scripts/apply" "$ctree" "${last#*-}"
}
# bad_trailer SED-COMMAND MESSAGE
bad_trailer() {
	project
	sed -i "$1" "$copy/patches/$BASE/$first_patch"
	fails_with "$2" "$copy/scripts/patch-info"
}
unknown_base() { fails_with "no base '9.9'" env BASE=9.9 "$TOP/scripts/tree"; }
bad_jobs() { fails_with 'JOBS must be a number' env JOBS=many "$TOP/scripts/tree"; }
bad_config() {
	project
	cp -r --reflink=auto "$copy/scripts" "$work/scripts"
	echo CONFIG_NO_SUCH_THING=y >> "$copy/scripts/kconfig/common.config"
	ln -s "$BUILD/tree" "$copy/build/$BASE/tree"
	ln -s "$BUILD/src" "$copy/build/$BASE/src"
	sed -i 's/o-\$arch-\$flavour/o-\$arch-\$flavour-bad/g' "$copy/scripts/build-kernel"
	fails_with 'did not take effect: CONFIG_NO_SUCH_THING=y' "$copy/scripts/build-kernel" patched x86_64 plain
	rm -rf "$BUILD/src/patched/o-x86_64-plain-bad"
}

# An apt of our own says what the real one would.
fake_apt() {
	mkdir -p "$work/bin"
	printf '#!/bin/sh\n%s\n' "$1" > "$work/bin/apt-cache"
	printf '#!/bin/sh\n%s\n' "$2" > "$work/bin/apt-get"
	chmod +x "$work/bin/"*
}
fetch_with() { PATH=$work/bin:$PATH XDG_CACHE_HOME=$work/cache "$copy/scripts/fetch"; }
package=$(base_info package)
version=$(base_info version)
offers() { say "echo ' $package | $1 | somewhere'"; }
# A package with a tiny tree in it.
make_deb() {
	mkdir -p "$work/deb/DEBIAN" "$work/deb/usr/src" "$work/linux-x"
	echo > "$work/linux-x/Kbuild"
	tar -C "$work" -cJf "$work/deb/usr/src/$package.tar.xz" linux-x
	printf 'Package: %s\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n' \
		"$package" > "$work/deb/DEBIAN/control"
	dpkg-deb -b "$work/deb" "$work/tiny.deb" > /dev/null
}
nothing_left() { not compgen -G "$work/cache/kvm-series/*[!k]"; }
not_offered() {
	project
	fake_apt : :
	fails_with "apt does not offer $package: run 'apt-get update'" fetch_with && nothing_left
}
broken_download() {
	project
	fake_apt "$(offers "$version")" "echo 'E: Failed to fetch' >&2; exit 100"
	fails_with "downloading $package $version failed" fetch_with && nothing_left
}
wrong_checksum() {
	project
	make_deb
	fake_apt "$(offers "$version")" "cp $work/tiny.deb ."
	fails_with 'checksum .* differs: expected' fetch_with && nothing_left
}
newer_offered() {
	project
	make_deb
	fake_apt "$(offers 99.1-1)" "cp $work/tiny.deb ."
	fetch_with > "$work/fetched" 2> "$work/said" || { cat "$work/said"; return 1; }
	cat "$work/said"
	grep -q "$version is no longer offered; using 99.1-1" "$work/said"
	[[ $(git --git-dir="$(cat "$work/fetched")" show base:Kbuild) = "" ]]
	rm -rf "$work/cache"
}
disk_full() {
	project
	fake_apt "$(offers "$version")" :
	fails_with 'GiB are needed: free some space' \
		env PATH="$work/bin:$PATH" XDG_CACHE_HOME="$work/small" "$copy/scripts/fetch"
}
missing_tool() {
	project tree
	mkdir -p "$work/nothing"
	for t in bash dirname cat sort head nproc sed ls xargs; do ln -sf "$(command -v $t)" "$work/nothing/"; done
	fails_with "git is not installed: run 'make deps'" env PATH="$work/nothing" "$copy/scripts/export"
}

ok "an edited patch is red" export_difference
ok "an edited mirror is red" mirror_difference
ok "a patch outside the series file is an error" unlisted_patch
ok "a patch that does not apply is named, nothing changes" does_not_apply
ok "export refuses a dirty tree" dirty_tree
ok "export refuses fixups" fixup_left
ok "export refuses a commit without sign-off" not_signed
ok "tree does not throw away work that was not exported" unexported_work
ok "export writes a new patch, and the round trip holds" export_adds
ok "export refuses a patch before the first topic" patch_before_topics
ok "export refuses a topic that begins with changes" topic_not_empty
ok "export refuses a topic without a patch" topic_without_patch
ok "export refuses a topic that comes twice" refuses_topic "comes twice" "99-${first_topic#*-}"
ok "export refuses a topic out of order" refuses_topic 'must not come after' 00-new
ok "export refuses a topic without a number" refuses_topic "not a topic's name" new
ok "export refuses a new topic without its files" refuses_topic 'topic 99-new is new: write cover-letter.txt' 99-new
ok "export writes a new topic" new_topic
ok "a topic that needs what it does not require is an error" not_alone
ok "export removes a topic that is gone, but nobody's other file" topic_gone
ok "an unknown TOPIC is an error" unknown_topic
ok "a topic that requires an unknown one is an error" requires_unknown
ok "a patch without Selftest is an error" bad_trailer /^Selftest:/d "$first_patch: no trailer Selftest"
ok "a trailer of another form is an error" bad_trailer 's/^Selftest: .*/Selftest: none/' 'not a form of Selftest: none'
ok "an unknown BASE is an error" unknown_base
ok "a bad JOBS is an error" bad_jobs
ok "a config line without effect is an error" bad_config
ok "a package that apt does not offer is an error" not_offered
ok "a download that breaks off is an error" broken_download
ok "a wrong checksum is an error" wrong_checksum
ok "a newer version is taken, with a message" newer_offered
mkdir -p "$work/small"
if mount -t tmpfs -o size=8m none "$work/small" 2> /dev/null; then
	ok "a full disk is an error beforehand" disk_full
	umount "$work/small"
else
	skip "a full disk is an error beforehand" "a small disk can only be mounted as root"
fi
ok "a missing tool is named" missing_tool
done_testing
