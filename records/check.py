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
QUADRATURE_STEPS = 10_000
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

    t = sqrt(dof) tan(a) makes the density cos(a)^(dof - 1): smooth, so the midpoint rule will do."""
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
    require(head and shape, "not the log of a training script, or cut short")
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


def trained_tokens(log):
    return log.config["steps"] * log.config["batch_tokens"]


# ----------------------------------------------------------------------------- rules
def require(condition, message):
    if not condition:
        raise ValueError(message)


def check_run(log, track):
    """Rules of the track for every run, the baseline too."""
    config = log.config
    require(log.step == config["steps"] and log.train_ms is not None,
            f"not finished: the log ends at step {log.step} of {config['steps']}")
    found = config | {"data": Path(config["data"]).name}
    for name, value in (track.settings | {"data": track.data}).items():
        require(found.get(name) == value, f"{name} is {found.get(name)!r}, in the track {value!r}")
    limit = track.max_tokens or log.corpus
    require(trained_tokens(log) <= limit, f"{trained_tokens(log):,} training tokens, not {limit:,}")


def check_verdict(log, track):
    """What evaluate.py said of a run."""
    said = log.referee
    require(said, "no verdict: records/evaluate.py adds it to the run's log.txt")
    require(said["objective"] in track.objectives, f"the track has no {said['objective']}")
    n = int(said["parameters"])
    require(n <= track.max_parameters, f"{n:,} parameters, at most {track.max_parameters:,}")
    expected = dict(tokens=track.val_tokens, step=log.config["steps"], leak="none",
                    shard_sha256=track.val_sha256 or said["shard_sha256"])
    for name, value in expected.items():
        require(said[name] == str(value), f"verdict: {name} is {said[name]}, not {value}")


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
    require(seeds and logs.keys() == {*seeds}, f"has seeds {', '.join(logs) or 'none'}: a record "
            "has all from 0 to n - 1")
    require(baseline or not track.baseline, "baseline.txt: missing")
    return [logs[seed] for seed in seeds], baseline


def check_record(runs, baseline, track, leader):
    """Do the runs belong together, and is the baseline the right one? leader: Record or None."""
    first, rival = runs[0], leader.runs[0] if leader else runs[0]
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
    for name, value in {} if leader else track.baseline.items():
        require(baseline.config[name] == value, f"baseline.txt: {name} is not {value!r}")


# ----------------------------------------------------------------------------- records
@dataclass
class Record:
    """What follows from a record's logs."""
    folder: Path
    title: str
    by: str
    runs: list  # Log
    baseline: Log | None
    objective: str
    values: list  # of each run, nats per token: by the published formula if the track has a target
    p_value: float | None  # of a mean below the target, or below the leader's at that date
    seconds: float  # of training, mean over the runs
    score: float  # what is ranked, lower is better
    is_ranked: bool  # enough runs, certain enough, and timed on the track's machine


def figures(runs, name):
    """One of the referee's figures, for every run."""
    return [float(log.referee[name].split("+-")[0]) for log in runs]


def read_record(folder, track, leaders, by):
    """Record of a folder that keeps to the rules. leaders: {objective: best ranked Record}. by: a
    name, for a folder that has no record.json yet: writes it."""
    require(re.fullmatch(r"\d{4}-\d\d-\d\d_\w+", folder.name), "not named YYYY-MM-DD_Slug")
    title = (folder / "README.md").read_text(encoding="utf-8").partition("\n")[0].strip("# ")
    runs, baseline = read_runs(folder, track)
    log, objective = runs[0], runs[0].referee["objective"]
    leader = leaders.get(objective)
    check_record(runs, baseline, track, leader)
    values = figures(runs, "published" if track.target else "bound")
    mean = statistics.fmean(values)
    require(not track.target or mean < track.target, f"mean {mean:.4f} misses {track.target}")

    others = [track.target] if track.target else leader.values if leader else []
    p_value = p_lower(values, others) if others and len(values) > 1 else None
    seconds = statistics.fmean(log.train_ms for log in runs) / 1000
    is_certain = len(runs) >= track.min_runs and (p_value is None or p_value < P_VALUE)
    is_timed = not track.target or (track.machine in log.machine and log.ranks == track.ranks)

    path = folder / "record.json"
    checksums = {x.path.name: x.sha256 for x in (*runs, baseline) if x}
    if by:
        path.write_text(json.dumps({"by": by, "logs": checksums}, indent=2) + "\n")
    said = json.loads(path.read_text(encoding="utf-8"))
    for name, sha256 in checksums.items():
        require(said["logs"].get(name) == sha256, f"{name}: not the log that record.json names")
    return Record(folder, title, said["by"], runs, baseline, objective, values, p_value, seconds,
                  seconds if track.target else mean, is_certain and is_timed)


def examine(root, tracks, new=None, by=""):
    """-> (problems, {track: table}): the first problem of each folder; tables of those that have
    none. by: author of the folder `new`."""
    problems, tables = [], {}
    for name, track in tracks.items():
        records, leaders = [], {}
        for folder in sorted(x for x in (root / name).glob("*") if x.is_dir()):
            try:
                record = read_record(folder, track, leaders, by if folder == new else "")
            except (ValueError, OSError) as e:
                problems.append(f"{root.name}/{name}/{folder.name}: {e}")
                continue
            records.append(record)
            leader = leaders.get(record.objective)
            if record.is_ranked and not (leader and leader.score <= record.score):
                leaders[record.objective] = record
        tables[name] = make_table(track, records)
    return problems, tables


# ----------------------------------------------------------------------------- tables
def make_table(track, records):
    """Leaderboard of a track in Markdown: ranked records by score, then the others."""
    if not records:
        return "No record yet.\n"
    figure_names = {"exact bound": "bound"}
    if track.target:
        figure_names["published formula"] = "published"
    columns = ["#", "objective", "minutes", "/ baseline", *figure_names, "runs", "parameters",
               "tokens", "machine", "record"]
    lines, places = [columns, ["---"] * len(columns)], defaultdict(int)
    for r in sorted(records, key=lambda r: (not r.is_ranked, r.score)):
        log, n = r.runs[0], len(r.runs)
        places[r.objective] += 1
        line = [str(places[r.objective]) if r.is_ranked else "-", f"`{r.objective}`",
                f"{r.seconds / 60:.2f}",
                f"{1000 * r.seconds / r.baseline.train_ms:.3f}" if r.baseline else ""]
        for values in (figures(r.runs, name) for name in figure_names.values()):
            spread = f" ({statistics.stdev(values):.4f})" if n > 1 else ""
            line.append(f"{statistics.fmean(values):.4f}{spread}")
        certainty = f", p = {r.p_value:.1g}" if r.p_value is not None else ""
        line += [f"{n}{certainty if n >= track.min_runs else ', unverified'}",
                 f"{int(log.referee['parameters']) / 1e6:.2f}M",
                 f"{trained_tokens(log) / 1e6:,.1f}M", f"{log.ranks} x {log.machine}",
                 f"[{r.title}]({'/'.join(r.folder.parts[-2:])}), {r.by}, {r.folder.name[:10]}"]
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ----------------------------------------------------------------------------- command line
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
