#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Base and patched kernels build with -Werror, and so do the folders that the series touches
# at the end of a topic.  The touched files have no new warnings of sparse and W=1.
. "$(dirname "$0")/tap.sh"

# lint ARCH base|patched OBJECT...: the warnings of W=1 and sparse, without line numbers,
# each after the object and a tab.  Objects that this kernel lacks are left out.
lint() {
	local arch=$1 which=$2 src o=o-$1-lint objects=() object
	shift 2
	src=$("$TOP/scripts/src" "$which")
	for object; do
		[[ ! -f $src/o-$arch-plain/$object ]] || objects+=("$object")
	done
	((${#objects[@]})) || return 0
	rm -rf "${src:?}/$o"
	cp -a --reflink=auto "$src/o-$arch-plain" "$src/$o"
	(cd "$src/$o" && rm -f "${objects[@]}")
	make -k -O -j "$JOBS" -C "$src" O="$o" "${kernel_make[@]}" CC="ccache $kernel_cc" KCFLAGS=-Wno-error \
		W=1 C=2 CHECK=sparse "${objects[@]}" > "$work/$arch-$which" 2>&1 || :
	rm -rf "${src:?}/$o"
	printf '%s\n' "${objects[@]}" | awk -v OFS='\t' '
		FILENAME == "-" { missing[$0]; next }
		/^  (CC|CHECK) / { object = $NF; sub(/^\.\.\//, "", object); sub(/\.c$/, ".o", object) }
		/^  CHECK / { delete missing[object] }
		/: (warning|error):/ { gsub(/:[0-9]+(:[0-9]+)?:/, ":"); print object, $0 }
		END { for (object in missing) print object, "sparse did not check it" }
		' - "$work/$arch-$which" | sort
}
# What is new in the C files that the series touches, and not in warnings.tsv?  The base is
# only asked about objects with warnings.
new_warnings() {
	local arch=$1 src objects
	use_arch "$arch"
	src=$("$TOP/scripts/src" patched)
	mapfile -t objects < <(git -C "$src" diff --name-only base HEAD -- \
		'virt/*.c' 'lib/*.c' 'mm/*.c' 'drivers/irqchip/*.c' "$(cut -d/ -f1-2 <<< "$kernel_image")/*.c" |
		sed 's/c$/o/')
	lint "$arch" patched "${objects[@]}" |
		awk -F'\t' 'FILENAME != "-" { known[$1]; next } !($2 in known)' "$PATCHES/warnings.tsv" - > "$work/patched"
	mapfile -t objects < <(cut -f 1 "$work/patched" | uniq)
	lint "$arch" base "${objects[@]}" > "$work/base"
	none < <(comm -13 "$work/base" "$work/patched")
}

for arch in $ARCHES; do
	for which in base patched; do
		ok "kernel $which $arch" "$TOP/scripts/build-kernel" $which "$arch" plain
	done
	ok "selftests $arch" "$TOP/scripts/build-tests" "$arch"
	ok "no new warning of W=1 or sparse on $arch" new_warnings "$arch"
done
ok "the series builds up to the end of a topic" "$TOP/scripts/bisect" --quick
done_testing
