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

ROOT = Path(__file__).resolve().parent
SEPARATOR = "=" * 100 + "\n"  # in a log, after each source file
P_VALUE = 0.01
SIMPSON_STEPS = 2000
# Config fields that only one script has; gpt.py has none of them.
TELLING = {"graph": "train_sedd", "block_len": "train_block", "schedule": "train_mdlm"}
# Settings that may differ between runs of one recipe: which run it is, and how a machine runs it.
NO_RECIPE = set("data out seed preset resume micro_batch checkpoint_layers device compile backend "
                "log_every ckpt_every eval_every max_bad_steps".split())


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
    val_sha256: str = ""  # of the first validation shard; empty: as in the track's first record
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


# ----------------------------------------------------------------------------- statistics
def t_below(t, dof):
    """P(T <= t) of Student's distribution; dof >= 1 need not be whole.

    t = sqrt(dof) tan(a) makes the density cos(a)^(dof - 1): smooth, so that Simpson's rule over
    the tail is exact to six digits or more."""
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    start = math.atan(abs(t) / math.sqrt(dof))
    step = (math.pi / 2 - start) / SIMPSON_STEPS
    weights = [1, *(4, 2) * (SIMPSON_STEPS // 2 - 1), 4, 1]
    total = sum(w * math.cos(start + i * step) ** (dof - 1) for i, w in enumerate(weights))
    tail = scale * total * step / 3
    return tail if t < 0 else 1 - tail


def p_lower(values, others):
    """P-value of values having the lower mean, by a one-sided Welch test. A single other value is
    taken as exact, which makes it the one-sample t-test."""
    gap = statistics.fmean(values) - statistics.fmean(others)
    errors = [(statistics.variance(x) / len(x), len(x) - 1) for x in (values, others) if len(x) > 1]
    total = sum(error for error, _ in errors)
    if total == 0:
        return float(gap >= 0)
    dof = total**2 / sum(error**2 / n for error, n in errors)
    return t_below(gap / math.sqrt(total), dof)


# ----------------------------------------------------------------------------- logs
@dataclass
class Log:
    """What log.txt of a run says."""
    path: Path
    sha256: str
    source: str  # the training script
    muon: str
    versions: str  # python, torch, numpy, machine, ranks
    machine: str
    ranks: int
    config: dict
    parameters: str  # in millions, as the run counted them
    mflop: str  # of training, per token
    corpus: int  # tokens of training data
    step: int  # the last one in the log; config["steps"] is where the run ends
    train_ms: int | None  # training time at that step, if it was evaluated
    referee: dict  # what evaluate.py added, name -> text


def read_log(path):
    """log.txt -> Log. A resumed run may repeat steps: the last line of each counts."""
    data = path.read_bytes()
    source, muon, rest = (data.decode("utf-8").split(SEPARATOR, 2) + ["", ""])[:3]
    head = re.match(r"(python .+ numpy \S+ (.+) ranks (\d+))\n({.+})\n", rest)
    shape = re.search(r"^([\d.]+)M parameters, (\S+) MFLOP per token, .+: ([\d,]+) tokens$", rest,
                      re.M)
    if not head or not shape:
        raise ValueError("not the log of a training script, or cut short")
    config = json.loads(head[4])
    steps = re.findall(r"^step:(\d+)/(\d+) ", rest, re.M)
    # A run may be resumed with more steps than it was started for.
    step, config["steps"] = map(int, steps[-1]) if steps else (0, config["steps"])
    times = re.findall(r"^step:(\d+)/\d+ val_.* train_time:(\d+)ms ", rest, re.M)
    train_ms = {int(at): int(ms) for at, ms in times}.get(step)
    referee = dict(pair for line in re.findall(r"^referee (.*)$", rest, re.M)
                   for pair in re.findall(r"(\w+):(\S+)", line))
    return Log(path, hashlib.sha256(data).hexdigest(), source, muon, head[1], head[2],
               int(head[3]), config, shape[1], shape[2], int(shape[3].replace(",", "")), step,
               train_ms, referee)


def objective_of(config):
    """The script that a fork with these settings was made from."""
    return next((name for key, name in TELLING.items() if key in config), "gpt")


def recipe(log):
    """What makes two runs the same experiment, name -> value."""
    settings = {k: v for k, v in log.config.items() if k not in NO_RECIPE}
    return settings | {"source": log.source, "muon.py": log.muon}


def draws_of(track, objective):
    """Noise draws per window in the referee's evaluation."""
    return 1 if objective == "gpt" else track.val_draws


# ----------------------------------------------------------------------------- rules
def require(condition, message):
    if not condition:
        raise ValueError(message)


def check_run(log, track):
    """Rules of the track for every run, the baseline too."""
    config = log.config
    require(log.step == config["steps"] and log.train_ms is not None,
            f"not finished: ends at step {log.step} of {config['steps']}")
    for name, value in (track.settings | {"data": track.data}).items():
        found = config.get(name)
        found = Path(found).name if name == "data" else found
        require(found == value, f"{name} is {found!r}, the track has {value!r}")
    trained, limit = config["steps"] * config["batch_tokens"], track.max_tokens or log.corpus
    require(trained <= limit, f"{trained:,} training tokens, at most {limit:,}")


def check_verdict(log, track):
    """What evaluate.py said of a run."""
    said = log.referee
    require({"bound", "objective", "parameters", "shard_sha256"} <= said.keys(),
            "no verdict: records/evaluate.py adds it to the run's log.txt")
    require(said["objective"] in track.objectives, f"the track has no {said['objective']}")
    expected = dict(tokens=track.val_tokens, draws=draws_of(track, said["objective"]),
                    step=log.config["steps"], leak="none",
                    shard_sha256=track.val_sha256 or said["shard_sha256"])
    for name, value in expected.items():
        require(said.get(name) == str(value), f"verdict: {name} is {said.get(name)}, not {value}")
    require(int(said["parameters"]) <= track.max_parameters,
            f"verdict: {said['parameters']} parameters, at most {track.max_parameters}")


def read_runs(folder, track):
    """A record's folder -> (logs of seeds 0..n-1, log of the baseline or None)."""
    logs = {}
    for path in sorted(folder.glob("*.txt")):
        try:
            logs[path.stem] = log = read_log(path)
            check_run(log, track)
            if path.stem != "baseline":
                check_verdict(log, track)
                require(path.stem == str(log.config["seed"]), f"seed is {log.config['seed']}")
        except ValueError as e:
            raise ValueError(f"{path.name}: {e}") from None
    baseline = logs.pop("baseline", None)
    seeds = [str(seed) for seed in range(len(logs))]
    require(logs and logs.keys() == {*seeds}, f"logs of seeds {', '.join(logs) or 'none'}: a record"
            " has all from 0 to n - 1")
    return [logs[seed] for seed in seeds], baseline


def check_record(runs, baseline, track, leader):
    """Do the runs belong together, and is the baseline the right one? leader: Record or None."""
    first, rival = runs[0], leader.runs[0] if leader else runs[0]
    require(baseline or not track.baseline, "baseline.txt: missing")
    for log in runs:
        require(recipe(log) == recipe(first),
                f"{log.path.name}: another script or other settings than {first.path.name}")
        require(log.referee["shard_sha256"] == rival.referee["shard_sha256"],
                f"{log.path.name}: another validation text than {rival.path}")
    for log in (*runs, baseline or first):
        require(log.versions == first.versions,
                f"{log.path.name}: another machine or other versions than {first.path.name}")
    if baseline and leader:
        require(recipe(baseline) == recipe(rival),
                f"baseline.txt: not the script and settings of {leader.folder.name}")
    elif baseline:
        for name, value in track.baseline.items():
            require(baseline.config[name] == value, f"baseline.txt: {name} is not {value!r}")


# ----------------------------------------------------------------------------- records
@dataclass
class Record:
    """What follows from a record's logs."""
    folder: Path
    title: str
    runs: list  # Log
    baseline: Log | None
    values: list  # of each run, nats per token: the published formula's on a track with a target
    p_value: float | None  # that their mean is below the target, or the leader's at that date
    seconds: float  # of training, mean over the runs
    by: str = ""

    @property
    def objective(self):
        return self.runs[0].referee["objective"]

    @property
    def checksums(self):
        return {x.path.name: x.sha256 for x in (*self.runs, self.baseline) if x}

    def score(self, track):
        return self.seconds if track.target else statistics.fmean(self.values)

    def is_ranked(self, track):
        """Are there enough runs, are they certain enough, and is their time one of the track's?"""
        log = self.runs[0]
        is_certain = self.p_value is None or self.p_value < P_VALUE
        is_timed = not track.target or (track.machine in log.machine and log.ranks == track.ranks)
        return len(self.runs) >= track.min_runs and is_certain and is_timed


def figures(runs, name):
    """One of the referee's figures, for every run."""
    return [float(log.referee[name].split("+-")[0]) for log in runs]


def read_record(folder, track, leaders):
    """Record of a folder that keeps to the rules. leaders: {objective: best ranked Record}."""
    require(re.fullmatch(r"\d{4}-\d\d-\d\d_\w+", folder.name), "not named YYYY-MM-DD_Slug")
    title = (folder / "README.md").read_text(encoding="utf-8").partition("\n")[0]
    runs, baseline = read_runs(folder, track)
    leader = leaders.get(runs[0].referee["objective"])
    check_record(runs, baseline, track, leader)
    values, p_value = figures(runs, "published" if track.target else "bound"), None
    mean = statistics.fmean(values)
    require(not track.target or mean < track.target, f"mean {mean:.4f} misses {track.target}")
    others = [track.target] if track.target else leader.values if leader else []
    if others and len(values) > 1:
        p_value = p_lower(values, others)
    seconds = statistics.fmean(log.train_ms for log in runs) / 1000
    return Record(folder, title.strip("# "), runs, baseline, values, p_value, seconds)


def read_author(record):
    """The name in record.json, if the logs are those that it was written for."""
    path = record.folder / "record.json"
    require(path.exists(), "record.json: missing; --new writes it")
    said = json.loads(path.read_text(encoding="utf-8"))
    for name, sha256 in record.checksums.items():
        require(said["logs"].get(name) == sha256, f"{name}: not the log that record.json names")
    return said["by"]


def examine(root, tracks):
    """-> (problems, {track: table}, {folder: Record}): the first problem of each folder; tables of
    those that have none."""
    problems, tables, found = [], {}, {}
    for name, track in tracks.items():
        records, leaders = [], {}
        for folder in sorted(x for x in (root / name).glob("*") if x.is_dir()):
            try:
                found[folder] = record = read_record(folder, track, leaders)
                record.by = read_author(record)
            except (ValueError, OSError) as e:
                problems.append(f"{root.name}/{name}/{folder.name}: {e}")
                continue
            records.append(record)
            leader = leaders.get(record.objective)
            is_best = not leader or record.score(track) < leader.score(track)
            if is_best and record.is_ranked(track):
                leaders[record.objective] = record
        tables[name] = make_table(track, records)
    return problems, tables, found


# ----------------------------------------------------------------------------- tables
def table_marks(name):
    return f"<!-- table of {name}, written by check.py -->\n", "<!-- end of table -->\n"


def find_table(text, name):
    """The table of a track in README.md."""
    start, end = table_marks(name)
    return text.partition(start)[2].partition(end)[0]


def make_table(track, records):
    """Leaderboard of a track in Markdown: ranked records by score, then the others."""
    if not records:
        return "No record yet.\n"
    records = sorted(records, key=lambda r: (not r.is_ranked(track), r.score(track)))
    objectives = sorted({r.objective for r in records})
    heads = (["minutes", "/ baseline", "published formula", "exact bound"] if track.target
             else [f"`{x}`" for x in objectives] + ["minutes"])
    heads = ["#", *heads, "runs", "parameters", "tokens", "machine", "record"]
    lines, places = [heads, ["---"] * len(heads)], defaultdict(int)
    for r in records:
        log, n = r.runs[0], len(r.runs)
        places[r.objective] += 1
        minutes = f"{r.seconds / 60:.2f}"
        mean = f"{statistics.fmean(r.values):.4f}"
        mean += f" ({statistics.stdev(r.values):.4f})" if n > 1 else ""
        line = [str(places[r.objective]) if r.is_ranked(track) else "-"]
        if track.target:
            ratio = f"{1000 * r.seconds / r.baseline.train_ms:.3f}"
            line += [minutes, ratio, mean, f"{statistics.fmean(figures(r.runs, 'bound')):.4f}"]
        else:
            line += [mean if x == r.objective else "" for x in objectives] + [minutes]
        certainty = "" if r.p_value is None else f", p = {r.p_value:.1g}"
        certainty = certainty if n >= track.min_runs else ", unverified"
        trained = log.config["steps"] * log.config["batch_tokens"]
        line += [f"{n}{certainty}", f"{int(log.referee['parameters']) / 1e6:.2f}M",
                 f"{trained / 1e6:,.1f}M", f"{log.ranks} x {log.machine}",
                 f"[{r.title}]({r.folder.parent.name}/{r.folder.name}), {r.by}, {r.folder.name[:10]}"]
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ----------------------------------------------------------------------------- command line
def fail(message):
    print(f"check.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def new_record(folder, by, root, tracks):
    """Write record.json of a folder whose logs and README.md are there."""
    path = folder.resolve()
    if not by:
        fail("--new goes with --by=NAME: whose record is it?")
    if not path.is_dir() or path.parent not in [root / name for name in tracks]:
        fail(f"--new={folder}: not a folder records/TRACK/YYYY-MM-DD_Slug of a track")
    problems, _, records = examine(root, tracks)
    if path not in records:
        fail(next(line for line in problems if f"/{path.name}: " in line))
    text = json.dumps({"by": by, "logs": records[path].checksums}, indent=2) + "\n"
    (path / "record.json").write_text(text, encoding="utf-8")
    print(text, end="")


def main(argv, root=ROOT, tracks=TRACKS):
    parser = argparse.ArgumentParser(prog="check.py", allow_abbrev=False)
    parser.error, parser.format_help = fail, lambda: __doc__
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--new", type=Path)
    parser.add_argument("--by", default="")
    args = parser.parse_args(argv)
    if args.new:
        new_record(args.new, args.by.strip(), root, tracks)
        return
    problems, tables, _ = examine(root, tracks)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if args.write and not problems:
        for name, table in tables.items():
            start, end = table_marks(name)
            text = text.replace(start + find_table(text, name) + end, start + table + end)
        readme.write_text(text, encoding="utf-8")
    if not problems:  # a record that is refused is in no table
        problems = [f"{root.name}/README.md: its table of {name} is not what the logs give; "
                    "--write" for name, table in tables.items() if find_table(text, name) != table]
    if problems:
        print("\n".join(problems))
        raise SystemExit(1)
    print("\n".join(f"{name}\n{table}" for name, table in tables.items()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
