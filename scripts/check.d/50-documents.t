#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The documents of the patched tree build without new warnings.
. "$(dirname "$0")/tap.sh"

warnings() {
	local src
	src=$("$TOP/scripts/src" "$1")
	rm -rf "${work:?}/$1"
	make -s -C "$src" O="$work/$1" SPHINXDIRS=virt htmldocs > "$work/$1.log" 2>&1 || {
		tail -n 20 "$work/$1.log"
		return 1
	}
	sed -E "s|$src/||; s/:[0-9]+:/:/" "$work/$1.log" | grep -E 'WARNING|ERROR' | sort > "$work/$1.s" || :
}
new_warnings() { none < <(comm -13 "$work/base.s" "$work/patched.s"); }
ours() {
	mkdir -p "$work/ours"
	sphinx-build -q -W -b html -C -D master_doc=index -D project=series \
		"$TOP/Documentation/series" "$work/ours"
}

ok "htmldocs of the base build" warnings base
ok "htmldocs of the patched tree build" warnings patched
ok "no new warning" new_warnings
ok "Documentation/series builds without a warning" ours
done_testing
