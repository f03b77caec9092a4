"""Recompute the leaderboard from the raw logs; README.md beside this file has the rules.

    python records/check.py             the tables; or every problem on a line, and exit status 1
    python records/check.py --write     the same, and puts the tables into records/README.md
    python records/check.py --new=records/TRACK/YYYY-MM-DD_Slug --by=NAME
                                        writes record.json of a folder that has its logs and README

A record is a folder records/TRACK/YYYY-MM-DD_Slug with README.md (its first line is the title),
record.json and the logs of its runs, <seed>.txt: log.txt of each run folder, with the lines that
evaluate.py adds to it. record.json holds a name (by) and what follows from the logs.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SEPARATOR = "=" * 100 + "\n"  # in a log, behind each source file
EVAL_SEED = 20240520  # of the noise in all evaluations
SAME_BOUND = 0.003  # nats by which a run's last evaluation and the referee's may differ: rounding
SAME_CLOCK = 0.02  # share by which the step lines' rates may miss the training time
P_VALUE = 0.01
SIMPSON_STEPS = 2000
# Settings that tell how a machine runs a recipe, or which run of it this is, and no more.
NO_RECIPE = ("data out seed preset micro_batch checkpoint_layers device backend log_every "
             "ckpt_every eval_every").split()


@dataclass(frozen=True)
class Track:
    """What all runs of a track have in common."""
    data: str  # name of the data folder
    settings: dict  # of every run's configuration
    max_parameters: int
    val_tokens: int
    val_draws: int  # of noise; gpt, which has none, has 1
    min_runs: int  # fewer are listed without a rank
    max_tokens: int = 0  # of training; 0: as many as there are
    corpus_tokens: int = 0  # of training data in whole windows; 0: what a run has is never repeated
    val_sha256: str = ""  # of the first validation shard; empty: as in the track's first record
    objectives: tuple = ("gpt", "train_block", "train_mdlm", "train_sedd")
    target: float = 0.0  # nats per token by the published formula; 0: lowest bound wins
    machine: str = ""  # what the ranked times were measured on
    ranks: int = 0  # how many of that
    baseline: dict = dataclasses.field(default_factory=dict)  # what the first one is timed against
    published: tuple = ()  # rows without a log: (figure by the published formula, what)


TRACKS = {
    "speedrun": Track(
        data="finewebedu10B", max_parameters=162_500_000, val_tokens=10_485_760, val_draws=1,
        settings=dict(seq_len=1024, block_len=16, shuffle=False, init_from="",
                      split="val", val_tokens=10_485_760),
        min_runs=2, objectives=("train_block",), target=3.44, machine="H100", ranks=8,
        baseline=dict(preset="nano_block", steps=10_000, batch_tokens=131_072), published=(
            (3.44, "[nano-block-diffusion](https://github.com/lapp0/nano-block-diffusion), as "
             "published: **no log**"),)),
    "shakespeare": Track(
        data="shakespeare", max_parameters=3_300_000, val_tokens=111_360, val_draws=2,
        settings=dict(seq_len=128, init_from="", split="val"),
        min_runs=3, max_tokens=2_000_000, corpus_tokens=1_003_776,
        val_sha256="d899e5ac46d5a7d027810bb4b9407f5c8697e0080d43a1fc235c2983ac20ab1e"),
}


# ----------------------------------------------------------------------------- statistics
def t_below(t, dof):
    """P(T <= t) of Student's distribution, dof >= 1 and not always whole.

    t = sqrt(dof) tan(a) makes the density cos(a)^(dof - 1): smooth, so that Simpson's rule over
    the tail is exact to six digits or more."""
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    start = math.atan(abs(t) / math.sqrt(dof))
    step = (math.pi / 2 - start) / SIMPSON_STEPS
    weights = [1, *(4, 2) * (SIMPSON_STEPS // 2 - 1), 4, 1]
    total = sum(w * math.cos(start + i * step) ** (dof - 1) for i, w in enumerate(weights))
    tail = scale * total * step / 3
    return tail if t < 0 else 1 - tail


def p_below(values, target):
    """One-sided t-test: how often a mean of runs as low as this one, were the truth target?"""
    gap, std = statistics.fmean(values) - target, statistics.stdev(values)
    if std == 0:
        return float(gap >= 0)
    return t_below(gap / (std / math.sqrt(len(values))), len(values) - 1)


def p_lower(values, others):
    """The same for the means of two sets of runs of unequal spread (Welch's test)."""
    gap = statistics.fmean(values) - statistics.fmean(others)
    a, b = (statistics.variance(x) / len(x) for x in (values, others))
    if a + b == 0:
        return float(gap >= 0)
    dof = (a + b) ** 2 / (a * a / (len(values) - 1) + b * b / (len(others) - 1))
    return t_below(gap / math.sqrt(a + b), dof)


# ----------------------------------------------------------------------------- logs
@dataclass
class Log:
    """What log.txt of a run says."""
    path: Path
    sha256: str
    source: str  # the training script
    muon: str
    versions: str  # python, torch, numpy, device, ranks
    machine: str
    ranks: int
    config: dict
    millions: float  # parameters, as the run counted them
    mflop: str  # of training, per token
    data: str  # folder
    corpus: int  # tokens of training data
    progress: tuple  # (step, steps) of the last line that has them
    rates: list  # (step, tokens per second since the line before)
    evals: list  # (step, nats per token, milliseconds of training, milliseconds a step)
    referee: dict  # what evaluate.py added, name -> text


def source_sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def read_log(path):
    """log.txt -> Log; ValueError says what is missing in it."""
    data = path.read_bytes()
    parts = data.decode("utf-8").split(SEPARATOR)
    if len(parts) != 3:
        raise ValueError("does not begin with the script and muon.py, each before a line of =")
    source, muon, rest = parts
    lines = rest.splitlines()
    versions = re.fullmatch(r"python \S+ torch \S+ numpy \S+ (.+) ranks (\d+)", (lines or [""])[0])
    if not versions:
        raise ValueError("no line of versions behind the sources")
    try:
        config = json.loads(lines[1])
        sizes = [config[k] for k in ("steps", "batch_tokens", "log_every")]
        valid = all(type(x) is int and x > 0 for x in sizes) and type(config["eval_every"]) is int
    except (IndexError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError("no line of settings behind the versions")
    shape = re.search(r"^([\d.]+)M parameters, (\S+) MFLOP per token, .+ in \w+, (.+): ([\d,]+) "
                      r"tokens$", rest, re.M)
    if not shape:
        raise ValueError("no line with the number of parameters and tokens")
    counts = re.findall(r"^step:(\d+)/(\d+) ", rest, re.M)
    progress = tuple(map(int, counts[-1])) if counts else (0, config["steps"])
    rates = re.findall(r"^step:(\d+)/\d+ loss:\S+ lr:\S+ tok/s:(\d+) ", rest, re.M)
    evals = re.findall(r"^step:(\d+)/\d+ val_(?:nelbo|nll):(\d+\.\d+)\+-.* "
                       r"train_time:(\d+)ms step_avg:(\d+\.\d+)ms$", rest, re.M)
    referee = {}
    for line in lines:
        if line.startswith("referee "):
            for key, value in re.findall(r"(\w+):(\S+)", line):
                if key in referee:
                    raise ValueError("judged twice: leave one set of the referee's lines")
                referee[key] = value
    return Log(path, hashlib.sha256(data).hexdigest(), source, muon, lines[0], versions[1],
               int(versions[2]), config, float(shape[1]), shape[2], shape[3],
               int(shape[4].replace(",", "")), progress,
               [(int(a), int(b)) for a, b in rates],
               [(int(a), float(b), int(c), float(d)) for a, b, c, d in evals], referee)


def due(steps, every):
    """Steps after which something is logged: each every-th, and the last."""
    return sorted({*range(every, steps, every), steps} if every else {steps})


def clock_problems(log):
    """Does the log hold every step and evaluation, and do its times agree with each other?"""
    steps, batch, every = (log.config[k] for k in ("steps", "batch_tokens", "log_every"))
    if [step for step, _ in log.rates] != due(steps, every):
        return [f"step lines: not one for each {every} of {steps} steps, in order"]
    if [e[0] for e in log.evals] != due(steps, log.config["eval_every"]):
        return ["evaluations: not one each eval_every steps and after the last, in order"]
    problems, seconds, before, elapsed = [], {}, 0, 0.0
    for step, rate in log.rates:
        if rate <= 0:
            return [f"step {step}: no tokens per second"]
        elapsed += (step - before) * batch / rate
        before = seconds[step] = step
        seconds[step] = elapsed
    last = 0
    for step, _, ms, average in log.evals:
        if ms < last:
            problems.append(f"step {step}: train_time falls from {last} to {ms} ms")
        if abs(average * step - ms) > 1 + 0.005 * step:
            problems.append(f"step {step}: step_avg {average} is not train_time {ms} / steps")
        by_rates = 1000 * seconds.get(step, ms / 1000)
        if abs(by_rates - ms) > SAME_CLOCK * ms + 2:
            problems.append(f"step {step}: train_time {ms} ms, by the rates {by_rates:.0f} ms")
        last = ms
    return problems


def run_problems(log, track):
    """Everything in one run's log that is against the rules of its track, or itself."""
    problems, config = clock_problems(log), log.config
    for name, value in track.settings.items():
        if config.get(name) != value:
            problems.append(f"{name} is {config.get(name)!r}, the track has {value!r}")
    if Path(str(config.get("data"))).name != track.data:
        problems.append(f"data is {config.get('data')!r}, the track has {track.data!r}")
    trained = config["steps"] * config["batch_tokens"]
    if track.max_tokens and trained > track.max_tokens:
        problems.append(f"{trained:,} training tokens, the track has {track.max_tokens:,}")
    if track.corpus_tokens and log.corpus != track.corpus_tokens:
        problems.append(f"{log.corpus:,} tokens of data, the track has {track.corpus_tokens:,}")
    if not track.corpus_tokens and trained > log.corpus:
        problems.append(f"{trained:,} training tokens out of {log.corpus:,}: samples repeat")
    return problems


def draws_of(track, objective):
    """Noise draws a window of the referee."""
    return 1 if objective == "gpt" else track.val_draws


def verdict_problems(log, track):
    """The same for what the referee found."""
    said = log.referee
    if not said:
        return ["not judged: evaluate.py adds its verdict to a run's log.txt"]
    try:
        bound, bpb = float(said["bound"].split("+-")[0]), float(said["bpb"])
        tokens, n_bytes = int(said["tokens"]), int(said["bytes"])
        parameters, bits = int(said["parameters"]), bound * tokens / math.log(2) / n_bytes
        draws = draws_of(track, said["objective"])
        expected = {"draws": draws, "seed": EVAL_SEED, "tokens": track.val_tokens,
                    "step": log.config["steps"], "seq_len": log.config["seq_len"], "leak": "none",
                    "source_sha256": source_sha256(log.source)}
        if track.target:
            published = float(said["published"].split("+-")[0])
            expected["block_len"] = log.config["block_len"]
    except (KeyError, ValueError, ZeroDivisionError) as e:
        return [f"no whole verdict of evaluate.py ({type(e).__name__}: {e})"]
    problems = [f"referee: {name} is {said.get(name)}, expected {value}"
                for name, value in expected.items() if said.get(name) != str(value)]
    if said.get("objective") not in track.objectives:
        problems.append(f"referee: objective {said.get('objective')} is not in this track")
    if log.config.get("val_draws") != draws:
        problems.append(f"val_draws is {log.config.get('val_draws')}, the referee's are {draws}")
    if track.val_sha256 and said.get("shard_sha256") != track.val_sha256:
        problems.append("referee: shard_sha256 is not that of the track's validation text")
    if parameters > track.max_parameters:
        problems.append(f"referee: {parameters:,} parameters, at most {track.max_parameters:,}")
    if abs(parameters / 1e6 - log.millions) > 0.0051:
        problems.append(f"referee: {parameters:,} parameters, the run counted {log.millions}M")
    if log.evals and not abs(log.evals[-1][1] - bound) <= SAME_BOUND:
        problems.append(f"referee: bound {bound}, the run's last evaluation {log.evals[-1][1]}")
    if not abs(bpb - bits) <= 1e-4 * (1 + tokens / n_bytes):  # both are rounded to four digits
        problems.append(f"referee: bpb {bpb} is not bound {bound} in bits per byte")
    if track.target and not published < bound:
        problems.append(f"referee: published {published} is not below bound {bound}")
    return problems


# ----------------------------------------------------------------------------- records
def recipe(log):
    """What makes two runs the same experiment."""
    settings = {k: v for k, v in log.config.items() if k not in NO_RECIPE}
    return log.source, log.muon, settings


def read_runs(folder, track):
    """-> (logs by seed, baseline's log or None, problems) of a record's folder."""
    logs, baseline, problems = {}, None, []
    for path in sorted(folder.iterdir()):
        seed = re.fullmatch(r"(\d+)\.txt", path.name)
        timed = path.name == "baseline.txt" and track.baseline
        if not (seed or timed):
            if path.name not in ("README.md", "record.json"):
                problems.append(f"{path.name}: does not belong into a record")
            continue
        try:
            log = read_log(path)
        except (OSError, ValueError) as e:
            problems.append(f"{path.name}: {e}")
            continue
        found = run_problems(log, track)
        if timed:
            baseline = log
        else:
            logs[int(seed[1])] = log
            found += verdict_problems(log, track)
            if str(log.config.get("seed")) != seed[1]:
                found.append(f"seed is {log.config.get('seed')}, the file's name says {seed[1]}")
        problems += [f"{path.name}: {text}" for text in found]
    if sorted(logs) != list(range(len(logs))) or not logs:
        problems.append(f"seeds {', '.join(map(str, sorted(logs))) or 'none'}: all of 0, 1, 2.. "
                        "up to the number of runs belong here, good or bad")
    first = logs.get(0)
    for seed, log in logs.items():
        if first and recipe(log) != recipe(first):
            problems.append(f"{seed}.txt: another script or other settings than 0.txt")
    if track.baseline and not baseline:
        problems.append("baseline.txt: missing")
    for log in [*logs.values(), *([baseline] if baseline else [])]:
        if first and log.versions != first.versions:
            problems.append(f"{log.path.name}: another machine or other versions than 0.txt")
    return logs, baseline, problems


def baseline_problems(baseline, track, best):
    """Is baseline.txt a run of what the record is to be timed against?"""
    if best:
        same = recipe(baseline) == recipe(best["log"])
        return [] if same else [f"baseline.txt: not the script and settings of {best['slug']}"]
    return [f"baseline.txt: {name} is {baseline.config.get(name)!r}, not {value!r}"
            for name, value in track.baseline.items() if baseline.config.get(name) != value]


def summarise(folder, track, logs, baseline, best):
    """What follows from a record's logs -> record.json without the name."""
    runs = list(logs.values())
    log = runs[0]
    figures = {name: [float(run.referee[name].split("+-")[0]) for run in runs]
               for name in (("published", "bound") if track.target else ("bound",))}
    values, p_value = next(iter(figures.values())), None
    if len(values) > 1 and track.target:
        p_value = p_below(values, track.target)
    elif len(values) > 1 and best and len(best["values"]) > 1:
        p_value = p_lower(values, best["values"])
    record = dict(
        title=(folder / "README.md").read_text(encoding="utf-8").splitlines()[0][2:].strip(),
        date=folder.name[:10], objective=log.referee["objective"], n=len(values),
        mean=round(statistics.fmean(values), 5),
        std=round(statistics.stdev(values), 5) if len(values) > 1 else None,
        p_value=None if p_value is None else float(f"{p_value:.2e}"))
    if track.target:
        record["bound"] = round(statistics.fmean(figures["bound"]), 5)
    record["seconds"] = round(statistics.fmean(run.evals[-1][2] for run in runs) / 1000, 1)
    if baseline:
        record["baseline_seconds"] = round(baseline.evals[-1][2] / 1000, 1)
    record |= dict(
        parameters=int(log.referee["parameters"]),
        tokens=log.config["steps"] * log.config["batch_tokens"], machine=log.machine,
        ranks=log.ranks, logs={x.path.name: x.sha256 for x in (*runs, baseline) if x})
    return record, values


def is_ranked(record, track):
    """Are there enough runs, are they certain enough, and is their time one of the track's?"""
    if record["n"] < track.min_runs:
        return False
    if not track.target:
        return record["p_value"] is None or record["p_value"] < P_VALUE
    here = track.machine in record["machine"] and record["ranks"] == track.ranks
    return here and record["p_value"] < P_VALUE


def compare_record(path, computed):
    """record.json against what the logs say."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["record.json: missing; --new writes it"], ""
    except (OSError, ValueError) as e:
        return [f"record.json: not JSON ({e})"], ""
    if not isinstance(record, dict) or not isinstance(record.get("by"), str):
        return ["record.json: no name under by"], ""
    by = record.pop("by")
    problems = []
    for name in {**computed, **record}:
        said, found = record.get(name), computed.get(name)
        if name == "logs" and isinstance(said, dict) and said.keys() == found.keys():
            problems += [f"{x}: altered: sha256 is not that of record.json"
                         for x in found if said[x] != found[x]]
        elif name not in record or name not in computed or said != found:
            problems.append(f"record.json: {name} is {said!r}, the logs give {found!r}")
    return problems, by


def examine(root=ROOT, tracks=TRACKS, read_tables=True):
    """-> (problems, {track: table}, {folder: what record.json should say}). read_tables: are the
    tables in README.md looked at, too?"""
    problems, tables, computed = [], {}, {}
    shown = f"{root.name}/"
    try:
        readme = (root / "README.md").read_text(encoding="utf-8")
    except OSError as e:
        readme = ""
        problems.append(f"{shown}README.md: {e.strerror}")
    for path in sorted(root.glob("*/*/record.json")):
        if path.parts[-3] not in tracks:
            problems.append(f"{shown}{path.relative_to(root)}: no track of that name")
    for name, track in tracks.items():
        entries, best, found = [], {}, []  # best: the leader of each objective so far
        val_sha256 = track.val_sha256
        for folder in sorted(x for x in (root / name).glob("*") if x.is_dir()):
            try:
                if not re.fullmatch(r"\d{4}-\d\d-\d\d_\w+", folder.name):
                    raise ValueError
                datetime.date.fromisoformat(folder.name[:10])
            except ValueError:
                found.append(f"{name}/{folder.name}: not named YYYY-MM-DD_Slug")
                continue
            logs, baseline, bad = read_runs(folder, track)
            readme_md = folder / "README.md"
            text = readme_md.read_text(encoding="utf-8") if readme_md.exists() else ""
            if not text.startswith("# "):
                bad.append("README.md: missing, or no title in its first line")
            if not bad:
                objectives = {log.referee["objective"] for log in logs.values()}
                shards = {log.referee.get("shard_sha256") for log in logs.values()}
                val_sha256 = val_sha256 or logs[0].referee.get("shard_sha256")
                if shards != {val_sha256}:
                    bad.append("another validation text than the records before")
                if len(objectives) > 1:
                    bad.append(f"objectives differ: {', '.join(sorted(objectives))}")
            if not bad:
                rival = best.get(logs[0].referee["objective"])
                if baseline:
                    bad += baseline_problems(baseline, track, rival)
                record, values = summarise(folder, track, logs, baseline, rival)
                if track.target and record["mean"] >= track.target:
                    bad.append(f"mean {record['mean']} misses the target of {track.target}")
            if not bad:
                computed[folder] = record
                bad, by = compare_record(folder / "record.json", record)
            if not bad:
                entry = dict(slug=f"{name}/{folder.name}", by=by, record=record, values=values,
                             log=logs[0], score=record["seconds" if track.target else "mean"])
                entries.append(entry)
                if is_ranked(record, track) and not (rival and rival["score"] <= entry["score"]):
                    best[record["objective"]] = entry
            found += [f"{name}/{folder.name}/{text}" for text in bad]
        tables[name] = make_table(track, entries)
        right = tables[name] == find_table(readme, name)
        if read_tables and readme and not (found or right):
            found.append(f"README.md: its table of {name} is not what the logs give; --write")
        problems += [shown + text for text in found]
    return problems, tables, computed


# ----------------------------------------------------------------------------- tables
def table_marks(name):
    return f"<!-- table of {name}, written by check.py -->\n", "<!-- end of table -->\n"


def find_table(text, name):
    """The table of a track in README.md, or None."""
    start, end = table_marks(name)
    _, found, rest = text.partition(start)
    return rest.partition(end)[0] if found and end in rest else None


def make_table(track, entries):
    """Leaderboard of a track in Markdown: ranked entries, the others, published figures."""
    ranked = [e for e in entries if is_ranked(e["record"], track)]
    ranked.sort(key=lambda e: e["score"])
    others = [e for e in entries if not is_ranked(e["record"], track)]
    objectives = sorted({e["record"]["objective"] for e in entries})
    heads = ["#"]
    heads += (["minutes", "/ baseline", "published formula", "exact bound"] if track.target
              else [f"`{x}`" for x in objectives] + ["minutes"])
    heads += ["runs", "parameters", "tokens", "machine", "record"]
    rows, places = [], defaultdict(int)
    for e in ranked + others:
        r = e["record"]
        places[r["objective"]] += 1
        minutes = f"{r['seconds'] / 60:.2f}"
        mean = f"{r['mean']:.4f}" + (f" ({r['std']:.4f})" if r["std"] is not None else "")
        row = [str(places[r["objective"]]) if e in ranked else "-"]
        if track.target:
            ratio = f"{r['seconds'] / r['baseline_seconds']:.3f}"
            row += [minutes, ratio, mean, f"{r['bound']:.4f}"]
        else:
            row += [mean if x == r["objective"] else "" for x in objectives] + [minutes]
        few = r["n"] < track.min_runs
        certain = "" if r["p_value"] is None else f", p = {r['p_value']:.1g}"
        row += [f"{r['n']}{', unverified' if few else certain}", f"{r['parameters'] / 1e6:.2f}M",
                f"{r['tokens'] / 1e6:,.1f}M", f"{r['ranks']} x {r['machine']}",
                f"[{r['title']}]({e['slug']}), {e['by']}, {r['date']}"]
        rows.append(row)
    for figure, what in track.published:
        rows.append(["-", "", "", str(figure), "", "", "", "", "", what])
    lines = [heads, ["---"] * len(heads), *rows]
    if not rows:
        return "No record yet.\n"
    clean = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in clean)


# ----------------------------------------------------------------------------- command line
def fail(message):
    print(f"check.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def write_tables(root, tables):
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        old = find_table(text, name)
        start, end = table_marks(name)
        if old is None:
            fail(f"{path}: no place for the table of {name}: put the lines {start.strip()} and "
                 f"{end.strip()} where it belongs")
        text = text.replace(start + old + end, start + table + end)
    path.write_text(text, encoding="utf-8")


def new_record(folder, by, root, tracks):
    """Write record.json of a folder whose logs and README.md are there."""
    path = folder / "record.json"
    if folder.resolve().parent.parent != root.resolve() or not folder.is_dir():
        fail(f"--new={folder}: not a folder records/TRACK/YYYY-MM-DD_Slug")
    if not by.strip():
        fail("--new goes with --by=NAME: whose record is it?")
    if path.exists():
        fail(f"{path}: there already; delete it to make it anew")
    problems, _, computed = examine(root, tracks)
    record = {x.resolve(): value for x, value in computed.items()}.get(folder.resolve())
    if record is None:
        name = "/".join(folder.resolve().parts[-2:]) + "/"
        for line in problems:
            if name in line:
                print(line)
        fail(f"--new={folder}: its logs do not make a record")
    path.write_text(json.dumps({"by": by.strip(), **record}, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"), end="")


def main(argv, root=ROOT, tracks=TRACKS):
    flags = {}
    for arg in argv:
        name, equals, value = arg.partition("=")
        if arg in ("--help", "-h"):
            print(__doc__)
            return
        if name not in ("--write", "--new", "--by") or (name == "--write") == bool(equals):
            fail(f"unknown flag {arg}: there are --write, --new=FOLDER and --by=NAME")
        flags[name] = value
    if "--new" in flags:
        new_record(Path(flags["--new"]), flags.get("--by", ""), root, tracks)
        return
    problems, tables, _ = examine(root, tracks, read_tables="--write" not in flags)
    if "--write" in flags and not problems:
        write_tables(root, tables)
    for line in problems:
        print(line)
    if problems:
        raise SystemExit(1)
    print("\n".join(f"{name}\n{table}" for name, table in tables.items()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
