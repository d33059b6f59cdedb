#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""usage: scripts/table.py COMMAND ARGUMENT...

Reads the tables that are written by hand (tests.tsv and bench.tsv in the folder
$PATCHES, machines.tsv beside this program), and reads and writes the tables of
results.

  check                      check all tables; other commands check those that they read
  unlisted ARCH              print the selftests on standard input that tests.tsv lacks
  machine ARCH NAME          print accel, CPUs, kernel parameters and field qemu of a
                             machine
  machines ARCH CHOICE       print the machines that the chosen tests run on
  select ARCH MACHINE CHOICE print the chosen tests of a machine, for scripts/boot; the
                             word SEED among their arguments becomes $SEED (default 1)
                   --factor N  multiplies the time that they may take
  tap OUT [REASON...]        read OUT/tap, write OUT/results.tsv and the log of each
                             test; a REASON is something that QEMU did wrong
  join OUT RUN...            print results.tsv from OUT/{base,patched}-RUN/results.tsv; the
                             output of scripts/patch-info is on standard input
  report RESULTS OUT RUN...  print the table of results, and what failed or was skipped
  summary RESULTS            print one line
  plan WORK [FEATURE...]     write to WORK the lists of tests, for scripts/boot, that
                             give the figures of all or of the named features
  values WORK OUT            print bench.tsv from the logs in OUT
  ratios BENCH               print patched/base, number and name of each figure
  goals BENCH                print the table of figures with their verdicts

CHOICE is any of --when WORD, --names TEST..., --features FEATURE...; TEST is a test
of tests.tsv, or TEST@CASE; the WORD modes also stands for the tests of run and modes,
on the machines that are like theirs.  RUN is ARCH-FLAVOUR-WHEN-MACHINE.

Exit code: 0, or 1 for a table that is wrong, for something unknown, for a test that
failed (tap, summary), and for a goal that was missed (goals).
"""
import argparse
import glob
import os
import re
import sys
from collections import namedtuple

ARCHES = ("x86_64", "arm64")
WHEN = ("run", "debug", "modes", "slow", "soak")
HERE = os.path.dirname(os.path.abspath(__file__))
BENCH_SECONDS = 1800	# the longest that a test may take to measure

Machine = namedtuple("Machine", "machine arch accel cpus append qemu like")
Test = namedtuple("Test", "feature test arch when machine seconds args reason")
Figure = namedtuple("Figure", "feature figure arch machine unit test args key goal")
Result = namedtuple("Result", "test result seconds why")
Row = namedtuple("Row", "feature arch test base patched")
Value = namedtuple("Value", "feature figure unit base patched goal")


def die(*lines):
	sys.exit("\n".join(f"error: {line}" for line in lines))


def arches(row):
	return ARCHES if row.arch == "all" else (row.arch,)


def number(text, least, most):
	return re.fullmatch("[0-9]+", text) and least <= int(text) <= most


# --- The tables that are written by hand ---

class Tables:
	"""Every row is checked when its table is read; a wrong one ends the program."""

	def __init__(self):
		self.wrong = []
		self.machines = {}
		for row in self.read(os.path.join(HERE, "machines.tsv"), Machine):
			self.check_machine(row)
		self.die_if_wrong()

	def read(self, path, kind):
		with open(path, encoding="utf-8") as f:
			for n, line in enumerate(f, 1):
				line = line.rstrip("\n")
				if not line or line.startswith("#"):
					continue
				fields = line.split("\t")
				self.where = f"{path}:{n}"
				if len(fields) == len(kind._fields):
					yield kind(*fields)
				else:
					self.expect(False, f"{len(fields)} fields, expected {len(kind._fields)}")

	def expect(self, condition, problem):
		if not condition:
			self.wrong.append(f"{self.where}: {problem}")

	def die_if_wrong(self):
		if self.wrong:
			die(*self.wrong)

	def check_arch(self, row):
		self.expect(row.arch in ARCHES + ("all",), f"no such architecture: {row.arch}")

	def check_uses(self, row):
		for arch in arches(row):
			self.expect((arch, row.machine) in self.machines, f"no machine '{row.machine}' for {arch}")

	def check_machine(self, row):
		self.check_arch(row)
		self.expect(row.accel in ("-", "tcg", "turns", "icount", "kvm", "bochs"), f"no such accel: {row.accel}")
		self.expect(row.accel != "bochs" or re.fullmatch("-|[a-z0-9_]+", row.qemu),
			    f"with bochs, qemu must be - or one model of CPU, not {row.qemu}")
		self.expect(row.cpus == "-" or number(row.cpus, 1, 64), f"cpus must be 1 to 64, not {row.cpus}")
		for arch in arches(row):
			self.expect((arch, row.machine) not in self.machines, f"{row.machine} twice for {arch}")
			self.expect(row.like == "-" or (arch, row.like) in self.machines,
				    f"no machine '{row.like}' for {arch} before this one")
			self.machines[arch, row.machine] = row

	def machine(self, arch, name):
		if (arch, name) not in self.machines:
			known = " ".join(m for a, m in self.machines if a == arch)
			die(f"no machine '{name}' for {arch}; there are: {known}")
		return self.machines[arch, name]

	def tests(self):
		path = os.path.join(os.environ["PATCHES"], "tests.tsv")
		tests = []
		seen = set()
		for row in self.read(path, Test):
			self.check_arch(row)
			when = row.when.split(",")
			self.expect(when == ["none"] or set(when) <= set(WHEN) and len(when) == len(set(when)),
				    f"when must be none or some of {','.join(WHEN)}, not {row.when}")
			self.expect((row.when == "none") == (row.reason != "-"), "when 'none' needs a reason, and only 'none' may have one")
			self.expect(number(row.seconds, 1, 86400), f"seconds must be 1 to 86400, not {row.seconds}")
			if row.when == "none":
				self.expect(row.machine == "-", "when 'none' needs machine '-'")
				# Only if somebody names it.
				row = row._replace(machine="plain")
			else:
				self.check_uses(row)
			for arch in arches(row):
				self.expect((row.test, arch) not in seen, f"{row.test} twice for {arch}")
				seen.add((row.test, arch))
			tests.append(row)
		self.die_if_wrong()
		return tests

	def figures(self):
		path = os.path.join(os.environ["PATCHES"], "bench.tsv")
		figures = []
		for row in self.read(path, Figure):
			self.check_arch(row)
			self.check_uses(row)
			self.expect(parse_goal(row.goal), f"no such form of a goal: {row.goal}")
			self.expect((row.feature, row.figure) not in [(f.feature, f.figure) for f in figures],
				    f"{row.figure} twice in {row.feature}")
			figures.append(row)
		for row in figures:
			_, other = parse_goal(row.goal) or (None, None)
			if other and other != "x" and (row.feature, other) not in [(f.feature, f.figure) for f in figures]:
				self.wrong.append(f"{path}: no figure '{other}' in {row.feature}")
		self.die_if_wrong()
		return figures


def whole(test):
	"""The test that a case TEST@CASE belongs to."""
	return test.rpartition("@")[0]


def named(tests, args):
	"""The tests with these names, with the cases of them that are named as arguments."""
	tests = {t.test: t for t in tests}
	cases = {}
	for name in args.names:
		if name in tests:
			cases.setdefault(name, [])
		elif whole(name) in tests:
			cases.setdefault(whole(name), []).append(name.rpartition("@")[2])
		else:
			die(f"tests.tsv has no test '{name}' for {args.arch}")
	return [tests[name]._replace(args=" ".join([tests[name].args, *cases[name]]).removeprefix("- "))
		for name in tests if name in cases]


def chosen(tables, args):
	tests = [t for t in tables.tests() if args.arch in arches(t)]
	if args.names:
		tests = named(tests, args)
	if args.features:
		tests = [t for t in tests if set(t.feature.split(",")) & set(args.features)]
	result = [t for t in tests if not args.when or args.when in t.when.split(",")]
	if args.when == "modes":
		# And the tests of a machine, on each machine that is like it.
		result += [t._replace(machine=m.machine) for (arch, _), m in tables.machines.items()
			   for t in tests
			   if arch == args.arch and t.machine == m.like and {"run", "modes"} & set(t.when.split(","))]
	return result


def check(_):
	tables = Tables()
	tables.tests()
	tables.figures()


def unlisted(args):
	known = {t.test.split("@")[0] for t in Tables().tests() if args.arch in arches(t)}
	for line in sys.stdin:
		if line.strip() not in known:
			print(line.strip())


def machine(args):
	print(*Tables().machine(args.arch, args.name)[2:6], sep="\t")


def machines(args):
	tables = Tables()
	used = {t.machine for t in chosen(tables, args)}
	for arch, name in tables.machines:
		if arch == args.arch and name in used:
			print(name)


def command(test, arguments):
	path = "/kvm/" + test.split("@")[0]
	return path if arguments == "-" else f"{path} {arguments}"


def select(args):
	tables = Tables()
	tables.machine(args.arch, args.machine)
	tests = [t for t in chosen(tables, args) if t.machine == args.machine]
	if not tests:
		die(f"no such test for {args.arch} on machine {args.machine}")
	for t in tests:
		arguments = t.args.replace("SEED", os.environ.get("SEED", "1"))
		print(int(t.seconds) * args.factor, t.test, command(t.test, arguments), sep="\t")


# --- Results of tests ---

def log_name(test):
	return test.replace("/", ".") + ".log"


def open_text(path, mode="r"):
	# Tests may print anything.
	return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="\n")


def read_tap(lines):
	"""Returns the results and, by the name of the test, the lines of its log."""
	results, logs = [], {}
	name, seconds, why, plan, bail = None, "-", "", False, ""
	for line in lines:
		line = line.rstrip("\n")
		point = re.match(r"(not )?ok \d+ - (.*)", line)
		if point:
			test, _, skip = point[2].partition(" # SKIP ")
			# The reason may be TAP of the test itself.
			skip = skip.rpartition(" # SKIP ")[2]
			result = "fail" if point[1] else "skip" if skip else "ok"
			if test in (r.test for r in results):
				result, skip, why = "fail", "", "two points of this name"
			results.append(Result(test, result, seconds, skip or why))
			name, seconds, why = None, "-", ""
		elif line.startswith("# begin "):
			name, seconds, why = line[8:], "-", ""
		elif line.startswith("# time "):
			seconds = line[7:]
		elif line.startswith("# "):
			if re.match(r"splat:|killed|exit code|cases:|# \w+: Test ", line[2:]):
				why = line[2:]
			if name:
				logs.setdefault(name, []).append(line[2:] + "\n")
		elif line.startswith("Bail out!"):
			bail = line
		elif re.fullmatch(r"1\.\.[1-9]\d*", line):
			plan = True
	if name:
		results.append(Result(name, "fail", "-", "the machine died during this test"))
	if plan:
		results.append(Result("verdict", "ok", "-", ""))
	else:
		results.append(Result("verdict", "fail", "-", bail or "no verdict: panic, hang or cut off"))
	return results, logs


def tap(args):
	with open_text(os.path.join(args.out, "tap")) as f:
		results, logs = read_tap(f)
	results += [Result("qemu", "fail", "-", reason) for reason in args.reasons]
	for name, lines in logs.items():
		with open_text(os.path.join(args.out, log_name(name)), "w") as f:
			f.writelines(lines)
	with open_text(os.path.join(args.out, "results.tsv"), "w") as f:
		for r in results:
			f.write("\t".join(field.replace("\t", " ") for field in r) + "\n")
	return any(r.result == "fail" for r in results)


def read_results(path, kind, titles=False):
	with open_text(path) as f:
		rows = [kind(*line.rstrip("\n").split("\t")) for line in f]
	return rows[1:] if titles else rows


def run_results(args):
	"""Yields run, kernel, folder and results of each machine."""
	for run in args.runs:
		for which in ("base", "patched"):
			folder = os.path.join(args.out, f"{which}-{run}")
			yield run.split("-")[0], which, folder, read_results(os.path.join(folder, "results.tsv"), Result)


def join(args):
	features = {(t.test, arch): t.feature.split(",")[0] for t in Tables().tests() for arch in arches(t)}
	# A case may be of another topic than its test: the first one with a patch that it proves.
	topics = {}
	for line in sys.stdin:
		patch, kind, what, _ = line.split("\t")
		if kind == "run":
			topics.setdefault(what, patch.split("/")[0].split("-", 1)[1])
	table = {}
	for arch, which, _, results in run_results(args):
		for r in results:
			row = table.setdefault((arch, r.test), {"base": "-", "patched": "-"})
			# The boot and the verdict are those of several machines: the worst counts.
			if row[which] != "fail":
				row[which] = r.result
	print(*Row._fields, sep="\t")
	for (arch, test), row in table.items():
		feature = features.get((test, arch), "machine")
		if (whole(test), arch) in features and (test, arch) not in features:
			feature = topics.get(test, features[whole(test), arch])
			for which, result in table.get((arch, whole(test)), {}).items():
				if (row[which], result) == ("-", "skip"):
					row[which] = "skip"
		print(feature, arch, test, row["base"], row["patched"], sep="\t")


def report(args):
	rows = [Row(*Row._fields)] + read_results(args.results, Row, titles=True)
	wide = max(10, *(len(r.feature) for r in rows))
	for r in rows:
		print(f"{r.feature:{wide}} {r.arch:7} {r.test:42} {r.base:7} {r.patched}")
	for arch, which, folder, results in run_results(args):
		shown = os.path.relpath(folder)
		for r in results:
			if r.result == "skip":
				print(f"skipped on {which} {arch}: {r.test}: {r.why}")
			if r.result == "fail":
				print(f"failed on {which} {arch}: {r.test}: {r.why} ({shown}/{log_name(r.test)}, {shown}/kmsg)")
	# With one topic alone, nothing is said about tests of others.
	ran = {r.feature for r in rows}
	reasons = [t.reason for t in Tables().tests() if t.when == "none" and t.feature in ran]
	for reason in sorted(set(reasons)):
		print(f"not run here ({reasons.count(reason)}): {reason}")


def summary(args):
	rows = read_results(args.results, Row, titles=True)
	ok, skipped = (sum(r.patched == result for r in rows) for result in ("ok", "skip"))
	# What passes on the base must not be skipped on the patched kernel.
	failed = sum(r.patched not in ("ok", "skip") or (r.base, r.patched) == ("ok", "skip") for r in rows)
	print(f"{ok} of {len(rows)} ok on the patched kernels, {failed} failed, {skipped} skipped")
	return failed or not rows


# --- Figures ---

def parse_goal(goal):
	"""Returns the factor and what it multiplies: None, "x" (the base) or a figure."""
	if goal == "-":
		return None, None
	match = re.fullmatch(r"<=([0-9]+(?:\.[0-9]+)?)(?:(x)|\*(.+))?", goal)
	return match and (float(match[1]), match[2] or match[3])


def plan(args):
	figures = Tables().figures()
	for feature in args.features:
		known = sorted({f.feature for f in figures})
		if feature not in known:
			die(f"no feature '{feature}' in bench.tsv; there are: {' '.join(known)}")
	# Several figures of one command share one run of it.
	lists, wanted = {}, []
	for f in figures:
		if args.features and f.feature not in args.features:
			continue
		where = f"{f.arch}-{f.machine}"
		commands = lists.setdefault(where, [])
		line = command(f.test, f.args)
		if line not in commands:
			commands.append(line)
		wanted.append((f.feature, f.figure, f.unit, where, f"bench{commands.index(line) + 1}", f.key, f.goal))
	for where, commands in lists.items():
		with open(os.path.join(args.work, where), "w", encoding="utf-8") as out:
			for n, line in enumerate(commands, 1):
				print(BENCH_SECONDS, f"bench{n}", line, sep="\t", file=out)
	with open(os.path.join(args.work, "figures"), "w", encoding="utf-8") as out:
		for fields in wanted:
			print(*fields, sep="\t", file=out)


def value(out, which, where, test, key, unit):
	"""The value of the last line "perf: KEY ..." of the test's log.  Of several rounds, the
	least value counts if it is a time, because other work on the host only adds to it,
	and the greatest value otherwise."""
	found = []
	logs = os.path.join(out, f"bench-{which}-{where}-*", test)
	for path in glob.glob(logs + ".log") + glob.glob(logs + "@*.log"):
		with open_text(path) as f:
			words = [w for w in map(str.split, f) if w[:2] == ["perf:", key] and len(w) == 4]
		if words:
			found.append(words[-1][3])
	if not found:
		return "-"
	return (min if unit == "ns" else max)(found, key=float)


def values(args):
	print(*Value._fields, sep="\t")
	with open(os.path.join(args.work, "figures"), encoding="utf-8") as f:
		for line in f:
			feature, figure, unit, where, test, key, goal = line.rstrip("\n").split("\t")
			both = [value(args.out, which, where, test, key, unit) for which in ("base", "patched")]
			print(feature, figure, unit, *both, goal, sep="\t")


def ratios(args):
	n = 0
	for v in read_results(args.bench, Value, titles=True):
		if "-" not in (v.base, v.patched) and float(v.base) > 0 and float(v.patched) > 0:
			print(f"{float(v.patched) / float(v.base):.6g}\t{n}\t{v.feature}: {v.figure}")
			n += 1


def verdict(v, patched):
	factor, of = parse_goal(v.goal)
	if v.patched == "-":
		return "no value"
	if factor is None:
		return ""
	what = v.base if of == "x" else patched.get((v.feature, of), "-") if of else "1"
	if what == "-":
		return "nothing to compare with"
	return "met" if float(v.patched) <= factor * float(what) else "MISSED"


def goals(args):
	rows = read_results(args.bench, Value, titles=True)
	patched = {(v.feature, v.figure): v.patched for v in rows}
	wide = max(8, *(len(v.feature) for v in rows)) if rows else 8
	met = bad = 0
	for v in [Value(*Value._fields)] + rows:
		said = verdict(v, patched) if v in rows else ""
		met += said == "met"
		bad += said not in ("met", "")
		print(f"{v.feature:{wide}} {v.figure:52} {v.unit:13} {v.base:>10} {v.patched:>10}  {v.goal}"
		      + (said and f": {said}"))
	print(f"{met} goals met, {bad} missed or without value; build/bench.tsv, build/bench.svg")
	return bad or not rows


def main():
	parser = argparse.ArgumentParser(usage=__doc__.replace("usage: ", "", 1), add_help=False)
	commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="scripts/table.py")

	def add(function, *names, choice=False, **kinds):
		p = commands.add_parser(function.__name__, add_help=False)
		p.set_defaults(function=function)
		for name in names:
			p.add_argument(name, **kinds.get(name, {}))
		if choice:
			p.add_argument("--when", choices=WHEN)
			p.add_argument("--names", nargs="+")
			p.add_argument("--features", nargs="+")
		return p

	any_number = {"nargs": "*"}
	add(check)
	add(unlisted, "arch")
	add(machine, "arch", "name")
	add(machines, "arch", choice=True)
	add(select, "arch", "machine", choice=True).add_argument("--factor", type=int, default=1)
	add(tap, "out", "reasons", reasons=any_number)
	add(join, "out", "runs", runs=any_number)
	add(report, "results", "out", "runs", runs=any_number)
	add(summary, "results")
	add(plan, "work", "features", features=any_number)
	add(values, "work", "out")
	add(ratios, "bench")
	add(goals, "bench")
	args = parser.parse_args()
	sys.exit(bool(args.function(args)))


main()
