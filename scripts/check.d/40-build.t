#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Base and patched kernels build with -Werror, and so does the series up to the end of a
# topic.  The touched files have no new warnings of sparse and W=1.
. "$(dirname "$0")/tap.sh"

# Warnings of W=1 and sparse in the C files that the series touches: base and
# patched, without line numbers.  What is new, and not in warnings.tsv?
new_warnings() {
	local arch=$1 which src f o=o-$1-lint files objects
	use_arch "$arch"
	src=$("$TOP/scripts/src" patched)
	mapfile -t files < <(git -C "$src" diff --name-only base HEAD -- \
		'virt/*.c' 'lib/*.c' 'mm/*.c' 'drivers/irqchip/*.c' "$(cut -d/ -f1-2 <<< "$kernel_image")/*.c")
	((${#files[@]})) || { say "no C file is touched"; return 0; }
	for which in base patched; do
		src=$("$TOP/scripts/src" $which)
		mkdir -p "$src/$o"
		cp "$src/o-$arch-plain/.config" "$src/$o/.config"
		kmake "$src" "$o" olddefconfig prepare
		objects=()
		for f in "${files[@]}"; do
			# Not those that this kernel lacks, or that another file includes.
			[[ ! -f $src/o-$arch-plain/${f%.c}.o ]] || objects+=("${f%.c}.o")
		done
		(cd "$src/$o" && rm -f "${objects[@]}")
		make -s -k -O -j "$JOBS" -C "$src" O="$o" "${kernel_make[@]}" CC="$kernel_cc" KCFLAGS=-Wno-error \
			W=1 C=2 CHECK=sparse "${objects[@]}" > "$work/$which" 2>&1 || :
		sed -nE '/: (warning|error):/s/:[0-9]+(:[0-9]+)?:/:/p' "$work/$which" | sort > "$work/$which.sorted"
	done
	none < <(comm -13 "$work/base.sorted" "$work/patched.sorted" |
		grep -vxF -f <(grep -v '^#' "$PATCHES/warnings.tsv" | cut -f 1))
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
