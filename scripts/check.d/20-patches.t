#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The patches are a series that anybody can apply, and exactly what the tree
# exports.
. "$(dirname "$0")/tap.sh"
"$TOP/scripts/tree" >&2
tree=$BUILD/tree
tip=$("$TOP/scripts/apply" "$tree")
mapfile -t patches < <(patch_files)

# A git configuration that would change every patch if it were looked at.
cat > "$work/hostile" <<-'EOF'
	[user]
		name = Somebody Else
		email = somebody@example.com
	[diff]
		noprefix = true
		mnemonicPrefix = true
		algorithm = patience
		renames = copies
		context = 7
		suppressBlankEmpty = true
		orderFile = /dev/null
	[format]
		signOff = true
		attach = true
		numbered = true
		coverLetter = true
		thread = deep
		subjectPrefix = RFC
		suffix = .txt
		signature = hostile
		useAutoBase = true
		filenameMaxLength = 20
		headers = "X-Hostile: yes\n"
		to = everybody@example.com
		from = true
	[core]
		autocrlf = true
		abbrev = 5
		whitespace = -trailing-space
	[apply]
		whitespace = fix
	[am]
		threeWay = false
		keepcr = true
	[commit]
		gpgSign = true
EOF
round_trip() { "$TOP/scripts/export" --check; }
round_trip_hostile() {
	GIT_CONFIG_GLOBAL=$work/hostile GIT_CONFIG_SYSTEM=$work/hostile HOME=$work \
	XDG_CACHE_HOME=$(dirname "$CACHE") LC_ALL=de_DE.UTF-8 TZ=Asia/Tokyo GIT_AUTHOR_NAME=X \
	GIT_COMMITTER_DATE=2001-01-01T00:00:00Z "$TOP/scripts/export" --check
}
tip_repeats() {
	local ref again
	ref=$(git -C "$tree" for-each-ref --points-at "$tip" --format='%(refname)' refs/applied)
	git -C "$tree" update-ref -d "$ref"
	again=$(GIT_COMMITTER_NAME=Other TZ=Asia/Tokyo "$TOP/scripts/apply" "$tree")
	say "expected $tip, actual $again"
	[[ $again = "$tip" ]]
}
git_am() { plain_am "$work/am" "$PATCHES"/*/*.patch && same_tree "$work/am" "$tip"; }
quilt_push() {
	local files f
	mapfile -t files < <(touched_files "${patches[@]}")
	mkdir -p "$work/quilt"
	unpack_base "$work/quilt" "${files[@]}"
	(cd "$work/quilt" && QUILT_PATCHES=$PATCHES quilt --quiltrc /dev/null push -a)
	for f in "${files[@]}"; do
		cmp <(git -C "$tree" cat-file blob "$tip:$f") "$work/quilt/$f"
	done
}
experiments() {
	local p
	for p in "$TOP"/Documentation/series/experiments/*.patch; do
		git -C "$work/am" apply --check "$p"
	done
}
signed_off() {
	none < <(grep -L "^Signed-off-by: $SERIES_NAME <$SERIES_EMAIL>\$" "${patches[@]}")
}
one_author() {
	none < <(grep '^From: ' "${patches[@]}" | grep -v "From: $SERIES_NAME <$SERIES_EMAIL>\$")
}
subjects() {
	local p rc=0
	for p in "${patches[@]}"; do
		grep -m1 '^Subject: ' "$p" | grep -qE '^Subject: \[PATCH\] (KVM|lib|mm|irqchip\/[a-z0-9-]+): ([A-Za-z0-9/_-]+: )*[A-Z]' ||
			{ say "$p: subject must be 'KVM: <area>: <Imperative>', without area in virt/kvm, or the like for lib, mm and irqchip"; rc=1; }
	done
	return $rc
}
# Every patch file in the folders is in the series file, in the order of the shell.
series_order() { diff <(cd "$PATCHES" && printf '%s\n' *.patch */*.patch) "$PATCHES/series"; }
topic_files() {
	local t f rc=0
	for t in $(topics); do
		for f in $TOPIC_FILES; do
			[[ -f $PATCHES/$t/$f ]] || { say "patches/$BASE/$t/$f is missing"; rc=1; }
		done
		with_required "${t#*-}" || rc=1
	done
	return $rc
}
cover_letters() {
	local t n first rc=0
	for t in $(topics); do
		n=$(patch_files "$t" | wc -l)
		first=$(head -n 1 "$PATCHES/$t/cover-letter.txt")
		[[ $first =~ ^Subject:\ \[PATCH\ 0+/$n\]\ [^\ ] ]] ||
			{ say "patches/$BASE/$t/cover-letter.txt begins with '$first', expected 'Subject: [PATCH 0/$n] ...'"; rc=1; }
	done
	return $rc
}
base_file() {
	local k
	for k in upstream package version sha256; do base_info $k; done
}
trailers() {
	"$TOP/scripts/patch-info" > "$work/info"
	none < <(awk -F'\t' '
		FILENAME ~ /tests\.tsv$/ { known[$2] = 1; next }
		{ whole = $3; sub(/@[^@]*$/, "", whole) }
		($2 == "run" || $2 == "build") && !($3 in known || whole in known) { print $1 ": no such test in tests.tsv: " $3 }
		' "$PATCHES/tests.tsv" "$work/info")
}

ok "BASE is complete" base_file
ok "tree and export give the same patches and mirror" round_trip
ok "the round trip holds under a hostile git configuration" round_trip_hostile
ok "the tip hash repeats" tip_repeats
ok "plain git am applies the series" git_am
ok "quilt push -a applies the series" quilt_push
ok "the patches of experiments apply to it" experiments
ok "every patch is signed off" signed_off
ok "every patch has the series' author" one_author
ok "subjects have the form KVM: area: Imperative" subjects
ok "the series file lists the patches in the shell's order" series_order
ok "every topic has its files and requires topics before it" topic_files
ok "every cover letter says how many patches follow" cover_letters
ok "every patch says in a trailer what proves it" trailers
rm -rf "$work/am"
done_testing
