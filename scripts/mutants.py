#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""usage: scripts/mutants.py SOURCE SEED NUMBER COMMIT... < FILES

Prints NUMBER small mutants of the lines that the COMMITs, full hashes, wrote in the C
files FILES, one on each line, of the git work tree SOURCE.  One line of code changes in
each mutant.  They are spread over all functions, at random but the same for the same
SEED.  Fields, separated by tabs: file, number of the line, function, kind, the new line.

Kinds:
  drop      a call or an assignment is left out
  never     a condition is always false
  always    a condition is always true
  bound     < becomes <=, > becomes >=, and the other way round
  logic     && becomes ||, and the other way round
  off       + 1 or - 1 is left out
  success   an error becomes 0
  bool      true becomes false, and the other way round

Locks are not changed, because hardly any test would survive without them.  Assertions,
messages and tracepoints are not changed either, because no test has to notice them.
"""
import random
import re
import subprocess
import sys

IGNORED = re.compile(r"\b(\w*lock\w*|rcu_read_\w+|\w*srcu_read_\w+|guard|WARN\w*|BUG\w*|KVM_BUG\w*|lockdep\w*"
		     r"|\w*assert\w*|pr_\w+|kvm_debug|kvm_err|trace_\w+|BUILD_BUG\w*|might_\w+)\(")
FUNCTION = re.compile(r"^(?:[a-z_][\w ]*[ *])?([a-z_]\w*)\([^;]*$")
CALL = re.compile(r"^\t+[a-z_][\w.>()\[\]-]*\(.*\);$")
ASSIGNMENT = re.compile(r"^\t+[\w.>()\[\]*&-]+ (?:=|[|&+-]=) .*;$")
CONDITION = re.compile(r"^(\t+(?:\} else )?if )\((.*)\)( \{)?$")
SWAPS = {
	"bound": {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > "},
	"logic": {" && ": " || ", " || ": " && "},
	"off": {" + 1": "", " - 1": ""},
	"bool": {"true": "false", "false": "true"},
}


def mutants(line):
	"""All mutants of a line of code: kind, new line."""
	if IGNORED.search(line) or '"' in line or line.lstrip().startswith(("*", "/", "#")):
		return
	code = line.split("/*")[0].rstrip()
	if CALL.match(code) or ASSIGNMENT.match(code):
		yield "drop", re.match(r"\t+", code)[0] + ";"
	found = CONDITION.match(code)
	if found and found[2].count("(") == found[2].count(")"):
		yield "never", f"{found[1]}(0 && ({found[2]})){found[3] or ''}"
		yield "always", f"{found[1]}(1 || ({found[2]})){found[3] or ''}"
	if re.match(r"^\t+(return|\w+ =) -E[A-Z]+;$", code):
		yield "success", re.sub(r"-E[A-Z]+", "0", code)
	for kind, swaps in SWAPS.items():
		for old, new in swaps.items():
			pattern = r"\b%s\b" % old if kind == "bool" else re.escape(old) + (r"\b" if kind == "off" else "")
			for at in re.finditer(pattern, code):
				yield kind, code[:at.start()] + new + code[at.end():]


def blamed(source, path, commits):
	"""The lines of a file: number, text, function, whether the commits wrote it."""
	out = subprocess.run(["git", "-C", source, "blame", "-s", "-l", "--root", "HEAD", "--", path],
			     check=True, capture_output=True, text=True).stdout
	function = "-"
	for line in out.splitlines():
		found = re.match(r"^\^?([0-9a-f]+) (?:\S+ )? *(\d+)\) ?(.*)$", line)
		commit, number, text = found[1], int(found[2]), found[3]
		name = FUNCTION.match(text)
		if name:
			function = name[1]
		elif text.startswith("}"):
			yield number, text, function, False
			function = "-"
			continue
		yield number, text, function, function != "-" and commit in commits


def main():
	if len(sys.argv) < 5:
		sys.exit(__doc__.split("\n", maxsplit=1)[0])
	source, seed, number, commits = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
	found = {}
	for path in sys.stdin.read().split():
		for at, text, function, ours in blamed(source, path, commits):
			if ours:
				found.setdefault((path, function), []).extend(
					(path, at, function, kind, new) for kind, new in mutants(text))
	chance = random.Random(seed)
	functions = sorted(key for key in found if found[key])
	chance.shuffle(functions)
	while functions and number:
		for key in list(functions):
			if not number:
				break
			mutant = found[key].pop(chance.randrange(len(found[key])))
			# Not another one of the same line.
			found[key] = [m for m in found[key] if m[1] != mutant[1]]
			if not found[key]:
				functions.remove(key)
			print(*mutant, sep="\t")
			number -= 1


if __name__ == "__main__":
	main()
