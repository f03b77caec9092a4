"""Recompute the tables of README.md beside this file, which has the rules, from the raw logs.

    python records/check.py             print the tables, or the problems (exit status 1)
    python records/check.py --write     the same, and put the tables into records/README.md
    python records/check.py --new=records/TRACK/YYYY-MM-DD_Slug --by=NAME
                                        write record.json of a folder that has its logs and README

A record is a folder records/TRACK/YYYY-MM-DD_Slug with README.md (its first line is the title),
record.json and the logs of its runs, <seed>.txt: log.txt of each run folder, with the lines that
evaluate.py adds to it. record.json holds the author's name (by) and the sha256 of each log.
"""

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent
SEPARATOR = "=" * 100 + "\n"  # in a log, after each source file
P_VALUE = 0.01
QUADRATURE_STEPS = 10_000
# Config fields that only one script has; gpt.py has none of them.
TELLING = {"graph": "train_sedd", "block_len": "train_block", "schedule": "train_mdlm"}
# Settings that may differ between runs of one recipe: which run it is, and how a machine runs it.
NO_RECIPE = set("data out seed preset resume micro_batch checkpoint_layers device compile "
                "log_every ckpt_every eval_every val_tokens val_draws".split())

@dataclass(frozen=True)
class Track:
    """What all runs of a track have in common."""
    data: str  # name of the data folder
    settings: dict  # of every run's configuration
    max_parameters: int
    val_tokens: int
    val_draws: int  # of noise; gpt, which has none, has 1
    min_runs: int  # fewer are listed without a rank
    max_tokens: int = 0  # of training; 0: those of the data, each used once
    val_sha256: str = ""  # of the first validation shard; empty until the first record fixes it
    objectives: tuple = ("gpt", "train_block", "train_mdlm", "train_sedd")
    target: float = 0.0  # nats per token by the published formula; 0: the lowest bound wins
    machine: str = ""  # what ranked times are measured on
    ranks: int = 0  # how many of them
    baseline: dict = field(default_factory=dict)  # settings that the first record is timed against

TRACKS = {
    "speedrun": Track(
        data="finewebedu10B", max_parameters=162_500_000, val_tokens=10_485_760, val_draws=1,
        settings=dict(seq_len=1024, block_len=16, shuffle=False, init_from=""),
        min_runs=2, objectives=("train_block",), target=3.44, machine="H100", ranks=8,
        baseline=dict(preset="nano_block", steps=10_000, batch_tokens=131_072)),
    "shakespeare": Track(
        data="shakespeare", max_parameters=3_300_000, val_tokens=111_360, val_draws=2,
        settings=dict(seq_len=128, init_from=""),
        min_runs=3, max_tokens=2_000_000,
        val_sha256="d899e5ac46d5a7d027810bb4b9407f5c8697e0080d43a1fc235c2983ac20ab1e"),
}

def t_below(t, dof):
    """P(T <= t) of Student's distribution; dof >= 1 need not be whole.

    t = sqrt(dof) tan(a) makes the density cos(a)^(dof - 1): smooth, so the midpoint rule does."""
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    start = math.atan(abs(t) / math.sqrt(dof))
    step = (math.pi / 2 - start) / QUADRATURE_STEPS
    heights = (math.cos(start + (i + 0.5) * step) ** (dof - 1) for i in range(QUADRATURE_STEPS))
    tail = scale * step * sum(heights)
    return tail if t < 0 else 1 - tail

def p_lower(values, others):
    """P-value of values having the lower mean: one-sided Welch test. With a single other value,
    which counts as exact, it is the t-test of one sample."""
    gap = statistics.fmean(values) - statistics.fmean(others)
    errors = [(statistics.variance(x) / len(x), len(x) - 1) for x in (values, others) if len(x) > 1]
    total = sum(error for error, _ in errors)
    if total == 0:
        return float(gap >= 0)
    dof = total**2 / sum(error**2 / n for error, n in errors)
    return t_below(gap / math.sqrt(total), dof)

def require(condition, message):
    if not condition:
        raise ValueError(message)

def read_log(path):
    """What log.txt of a run says. A resumed run may repeat steps: the last line of each counts."""
    data, name = path.read_bytes(), path if path.name == "log.txt" else path.name
    source, muon, rest = (data.decode("utf-8").split(SEPARATOR, 2) + ["", ""])[:3]
    head = re.match(r"(python .+ numpy \S+ (.+) ranks (\d+))\n({.+})\n", rest)
    shape = re.search(r"^([\d.]+)M parameters, (\S+) MFLOP per token, .+: ([\d,]+) tokens(?:,|$)",
                      rest, re.M)
    require(head and shape, f"{name}: not the log of a training script, or cut short")
    config = json.loads(head[4])
    steps = re.findall(r"^step:(\d+)/(\d+) ", rest, re.M)
    # A run may be resumed with more steps than it was started for.
    step, config["steps"] = map(int, steps[-1]) if steps else (0, config["steps"])
    times = dict(re.findall(r"^step:(\d+)/\d+ val_.* train_time:(\d+)ms ", rest, re.M))
    referee = dict(pair for line in re.findall(r"^referee (.*)$", rest, re.M)
                   for pair in re.findall(r"(\w+):(\S+)", line))
    return SimpleNamespace(
        path=path, name=name,  # in messages
        sha256=hashlib.sha256(data).hexdigest(), source=source, muon=muon,
        versions=head[1], machine=head[2], ranks=int(head[3]), config=config,
        parameters=shape[1],  # in millions, as the run counted them
        mflop=shape[2],  # of training, per token
        corpus=int(shape[3].replace(",", "")),  # tokens of training data
        step=step, seconds=int(times.get(str(step), 0)) / 1000,  # of training; 0: not evaluated
        trained=config["steps"] * config["batch_tokens"],  # tokens
        referee=referee)  # what evaluate.py added, name -> text

def objective_of(config):
    """The script that a fork with these settings was made from."""
    return next((name for key, name in TELLING.items() if key in config), "gpt")

def check_finished(log):
    steps = log.config["steps"]
    require(log.step == steps and log.seconds,
            f"{log.name}: ends at step {log.step} of {steps}, finish it with --resume=1")

def check_same_recipe(log, other):
    # Each seed may start from a checkpoint of its own, but all from one or none.
    a, b = ({"source": x.source, "muon.py": x.muon, **x.config,
             "init_from": bool(x.config["init_from"])} for x in (log, other))
    names = [k for k in {**a, **b} if k not in NO_RECIPE and a.get(k) != b.get(k)]
    require(not names, f"{log.name}: another {', '.join(names)} than {other.path}")

def check_run(log, track):
    """Rules of the track for every run, the baseline too."""
    check_finished(log)
    found = log.config | {"data": Path(log.config["data"]).name}
    for key, value in (track.settings | {"data": track.data}).items():
        require(found.get(key) == value, f"{log.name}: {key} is {found.get(key)!r}, the track has "
                f"{value!r}")
    limit = track.max_tokens or log.corpus
    require(log.trained <= limit, f"{log.name}: {log.trained:,} training tokens, at most {limit:,}")

def check_verdict(log, track):
    """What evaluate.py said of a run."""
    said = log.referee
    require(said, f"{log.name}: no verdict: records/evaluate.py adds it to the run's log.txt")
    is_known = said["objective"] in track.objectives
    require(is_known, f"{log.name}: the track has no objective {said['objective']}")
    n = int(said["parameters"])
    fits = n <= track.max_parameters
    require(fits, f"{log.name}: {n:,} parameters, at most {track.max_parameters:,}")
    expected = dict(tokens=track.val_tokens, step=log.config["steps"], leak="none",
                    shard_sha256=track.val_sha256 or said["shard_sha256"])
    for key, value in expected.items():
        require(said[key] == str(value), f"{log.name}: verdict: {key} is {said[key]}, not {value}")

def read_runs(folder, track):
    """A record's folder -> (logs of seeds 0..n-1, log of the baseline or None)."""
    logs = {}
    for path in sorted(folder.glob("*.txt")):
        logs[path.stem] = log = read_log(path)
        check_run(log, track)
        if path.stem != "baseline":
            check_verdict(log, track)
            require(path.stem == str(log.config["seed"]), f"{log.name}: a run of another seed")
    baseline = logs.pop("baseline", None)
    seeds = [str(seed) for seed in range(len(logs))]
    require(seeds and logs.keys() == {*seeds}, f"seeds {', '.join(logs) or 'none'}: a record "
            "has all from 0 to n - 1")
    require(baseline or not track.baseline, "baseline.txt: missing")
    return [logs[seed] for seed in seeds], baseline

def check_record(runs, baseline, track, leader):
    """Do the runs belong together, and is the baseline the right one? leader: record to beat."""
    first = runs[0]
    for log in runs:
        check_same_recipe(log, first)
    for log in (*runs, baseline or first):
        require(log.versions == first.versions,
                f"{log.name}: another machine or other versions than {first.name}")
    if baseline and leader:
        check_same_recipe(baseline, leader.runs[0])
    elif baseline:
        for name, value in track.baseline.items():
            require(baseline.config[name] == value, f"baseline.txt: {name} is not {value!r}")

def figure(runs, name):
    """One of the referee's figures -> (values of the runs, their mean and deviation as text)."""
    values = [float(log.referee[name].split("+-")[0]) for log in runs]
    spread = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return values, f"{statistics.fmean(values):.4f}{spread}"

def read_record(folder, track, leaders, by=""):
    """A folder that keeps to the rules. leaders: {objective: best ranked record before this one}.
    by: the author of a new one, whose record.json is written."""
    require(re.fullmatch(r"\d{4}-\d\d-\d\d_\w+", folder.name), "not named YYYY-MM-DD_Slug")
    title = (folder / "README.md").read_text(encoding="utf-8").partition("\n")[0].strip("# ")
    runs, baseline = read_runs(folder, track)
    log, n, objective = runs[0], len(runs), runs[0].referee["objective"]
    leader = leaders.get(objective)
    check_record(runs, baseline, track, leader)

    seconds = statistics.fmean(log.seconds for log in runs)
    values, text = figure(runs, "bound")
    score, texts, others = statistics.fmean(values), [text], leader.values if leader else []
    is_timed = True
    if track.target:
        values, text = figure(runs, "published")
        require(statistics.fmean(values) < track.target, f"mean {text} misses {track.target}")
        score, others = seconds, [track.target]
        texts += [text, f"{seconds / baseline.seconds:.3f}"]
        is_timed = track.machine in log.machine and log.ranks == track.ranks
    p_value = p_lower(values, others) if others and n > 1 else None
    certainty = f", p = {p_value:.1g}" if others and n > 1 else ""

    path = folder / "record.json"
    checksums = {x.path.name: x.sha256 for x in (*runs, baseline) if x}
    if by:
        path.write_text(json.dumps({"by": by, "logs": checksums}, indent=2) + "\n")
    said = json.loads(path.read_text(encoding="utf-8"))
    before = said["logs"]
    changed = [x for x in {**before, **checksums} if before.get(x) != checksums.get(x)]
    require(not changed, f"{', '.join(changed)}: not as when record.json was written")
    cells = [f"`{objective}`", f"{seconds / 60:.2f}", *texts,
             f"{n}{certainty if n >= track.min_runs else ', unverified'}",
             f"{int(log.referee['parameters']) / 1e6:.2f}M", f"{log.trained / 1e6:,.1f}M",
             f"{log.ranks} x {log.machine}",
             f"[{title}]({folder.parent.name}/{folder.name}), {said['by']}, {folder.name[:10]}"]
    return SimpleNamespace(
        objective=objective, runs=runs, values=values, score=score, cells=cells,
        is_ranked=n >= track.min_runs and is_timed and (not others or p_value < P_VALUE))

def examine(root, tracks, new=None, by=""):
    """-> (problems, {track: table}): the first problem of each folder; tables of those that have
    none. by: the author of the folder `new`."""
    problems, tables = [], {}
    for name, track in tracks.items():
        records, leaders = [], {}
        for folder in sorted(x for x in (root / name).glob("*") if x.is_dir()):
            try:
                record = read_record(folder, track, leaders, by if folder == new else "")
            except (ValueError, OSError, KeyError) as e:
                problems.append(f"{root.name}/{name}/{folder.name}: {e}")
                continue
            records.append(record)
            leader = leaders.get(record.objective)
            if record.is_ranked and not (leader and leader.score <= record.score):
                leaders[record.objective] = record
        tables[name] = make_table(track, records)
    return problems, tables

def make_table(track, records):
    """Leaderboard of a track in Markdown: ranked records by score, then the others."""
    target_columns = ["published formula", "/ baseline"] if track.target else []
    columns = ["#", "objective", "minutes", "exact bound", *target_columns, "runs", "parameters",
               "tokens", "machine", "record"]
    lines, places = [columns, ["---"] * len(columns)], defaultdict(int)
    for record in sorted(records, key=lambda x: (not x.is_ranked, x.score)):
        places[record.objective] += 1
        lines.append([str(places[record.objective]) if record.is_ranked else "-", *record.cells])
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text if records else "No record yet.\n"

class Parser(argparse.ArgumentParser):
    """Flags of a script: a mistake is one line, help is the docstring."""
    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self):
        return self.description

def main(argv, root=ROOT, tracks=TRACKS):
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--new", type=Path)
    parser.add_argument("--by", default="")
    args = parser.parse_args(argv)
    new = args.new and args.new.resolve()
    if new and not (args.by and new.is_dir() and new.parent in [root / name for name in tracks]):
        parser.error("write --new=records/TRACK/YYYY-MM-DD_Slug --by=NAME, a folder and its author")
    problems, tables = examine(root, tracks, new, args.by)
    if new:
        problems = [line for line in problems if f"/{new.parent.name}/{new.name}: " in line]
    readme = root / "README.md"
    old = text = readme.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- table of {name}, written by check.py -->\n", "<!-- end of table -->\n"
        before, _, rest = text.partition(start)
        text = before + start + table + end + rest.partition(end)[2]
    if args.write and not problems:
        readme.write_text(text, encoding="utf-8")
    elif not new and not problems and text != old:
        problems = [f"{root.name}/README.md: its tables are not what the logs give; --write"]
    if problems:
        print("\n".join(problems))
        raise SystemExit(1)
    print("\n".join(f"{name}\n{table}" for name, table in tables.items()), end="")

if __name__ == "__main__":
    main(sys.argv[1:])
