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
git_am() {
	mkdir -p "$work/am"
	git -C "$tree" worktree prune
	git -C "$tree" worktree add -q --no-checkout --detach "$work/am/src" base
	git apply --numstat -z "${patches[@]}" | tr '\0' '\n' | cut -f 3 | sed 's|^|/|' | sort -u |
		git -C "$work/am/src" sparse-checkout set --no-cone --stdin
	git -C "$work/am/src" checkout -q
	# What a user types, with a user's identity.
	(cd "$work/am/src" && env -u GIT_CONFIG_GLOBAL -u GIT_CONFIG_NOSYSTEM HOME="$work" \
		git -c user.name=User -c user.email=user@example.com am "$PATCHES"/*.patch) || return
	git -C "$work/am/src" diff --quiet HEAD "$tip"
}
quilt_push() {
	mkdir -p "$work/quilt"
	git apply --numstat -z "${patches[@]}" | tr '\0' '\n' | cut -f 3 | sort -u > "$work/files"
	mapfile -t files < "$work/files"
	git -C "$tree" ls-tree -z --name-only base "${files[@]}" |
		xargs -0 git -C "$tree" archive base -- | tar -x -C "$work/quilt"
	(cd "$work/quilt" && QUILT_PATCHES=$PATCHES quilt --quiltrc /dev/null push -a) || return
	while read -r f; do
		cmp <(git -C "$tree" cat-file blob "$tip:$f") "$work/quilt/$f" || return
	done < "$work/files"
}
experiments() {
	local p
	for p in "$TOP"/Documentation/series/experiments/*.patch; do
		git -C "$work/am/src" apply --check "$p" || return
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
		grep -m1 '^Subject: ' "$p" | grep -qE '^Subject: \[PATCH\] (KVM|lib): ([A-Za-z0-9/_-]+: )*[A-Z]' ||
			{ say "$p: subject must be 'KVM: <area>: <Imperative>', without area in virt/kvm, or 'lib: ...'"; rc=1; }
	done
	return $rc
}
cover_letter() { [[ -s $PATCHES/cover-letter.txt ]] && not compgen -G "$PATCHES/0000-*"; }
base_file() {
	local k
	for k in upstream package version sha256; do base_info $k; done
}
map_known() {
	awk -F'\t' -v table="$PATCHES/tests.tsv" '
		BEGIN { while ((getline line < table) > 0) { split(line, f, "\t"); known[f[2]] = 1 } }
		/^#/ { next }
		NF != 5 || $1 !~ /^[0-9][0-9][0-9][0-9](-[0-9][0-9][0-9][0-9])?$/ || $4 !~ /^(build|run|none)$/ || ($4 != "none" && !($5 in known)) {
			print FILENAME ":" FNR ": " $0; bad = 1 }
		END { exit bad }' "$PATCHES/tests.map"
}

ok "BASE is complete" base_file
ok "tree and export give the same patches and mirror" round_trip
ok "they do under a hostile git configuration" round_trip_hostile
ok "the tip hash repeats" tip_repeats
ok "plain git am applies the series" git_am
ok "quilt push -a applies the series" quilt_push
ok "the patches of experiments apply to it" experiments
ok "every patch is signed off" signed_off
ok "every patch has the series' author" one_author
ok "subjects have the form KVM: area: Imperative" subjects
ok "there is a cover letter outside of the glob" cover_letter
ok "tests.map is well formed" map_known
git -C "$tree" worktree remove -f "$work/am/src" 2> /dev/null
done_testing
