"""Compare finished runs: a markdown table of their validation figures, and differences in pairs.

    python records/compare.py out/gpt out/train_block out/train_mdlm
    python records/compare.py gpt=out/gpt_0,out/gpt_1,out/gpt_2 'mdlm=out/mdlm_*'

An argument is a run folder, or several that are seeds of one setting: with commas between, or a
quoted pattern; NAME= in front names the row. All runs must have been evaluated on the same windows
with the same noise. Then they differ far less from each other in a window than windows differ, so
the difference to the first row is taken window by window:

    nats per token   mean over windows and seeds, <= where it is a bound, +- its standard error over
                     windows; its standard deviation over seeds stands beside their number
    minus NAME       mean difference +- its standard error over windows / over seeds: of
                     differences of equal seeds where both rows have the same ones, otherwise of two
                     independent means

Standard errors over windows take pairs of neighbouring ones, whose noise is antithetic: the two are
not independent; pairs are. Parameters and FLOPs (training, per token) are as the runs print them.
"""

import glob
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from check import read_log

# Fields of Config by which a script is told from the others; gpt.py has none.
TELLING = {"graph": "train_sedd", "block_len": "train_block", "schedule": "train_mdlm"}
# Settings in which seeds of one setting may differ: which run it is, and how a machine runs it. The
# number of steps is taken from the step lines, since a run may go on further than it was begun for.
NO_SETTING = set("data out preset seed steps resume micro_batch checkpoint_layers eval_every "
                 "ckpt_every log_every max_bad_steps device compile backend".split())
METRICS = {"val_nll", "val_nelbo"}  # in log.jsonl: exact, or a bound
ROUNDING = 1e-6  # nats


def fail(message):
    print(f"compare.py: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass(frozen=True)
class Run:
    """What a run folder says."""
    folder: Path
    script: str
    seed: int
    setting: dict  # config without NO_SETTING, and what it was run with
    parameters: str
    mflop: str  # per token
    tokens: int  # of training
    start: str  # checkpoint that it began with, or empty
    exact: bool  # a likelihood, no bound on it
    bpb: float | None
    nats: np.ndarray  # (N,) per token, of each validation window
    judged_on: dict  # what must agree for a comparison


def read_run(folder):
    """Run of a folder; one that is missing, unfinished or damaged is refused."""
    try:
        log = read_log(folder / "log.txt")
        records = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as e:
        fail(f"{folder}: no folder of a run: {Path(e.filename).name}: {e.strerror}")
    except ValueError as e:
        fail(f"{folder}: damaged, or not the logs of a training script: {e}")
    try:
        config, (step, steps) = log.config, log.progress
        found = [r for r in map(json.loads, records) if METRICS & r.keys()][-1:]
        path = folder / f"{config['split']}_nats.npy"
        if step < steps or not path.exists() or not found or found[0]["step"] < steps:
            fail(f"{folder}: not finished, at step {step} of {steps}: --resume=1 continues it")
        (found,), seq_len = found, config["seq_len"]
        metric = (METRICS & found.keys()).pop()
        nats = np.load(path) / seq_len
        agrees = nats.size * seq_len == found["tokens"] and found[metric] is not None
        if not (agrees and abs(nats.mean() - found[metric]) < ROUNDING):
            fail(f"{path}: not what log.jsonl says of step {step}: from another run, or damaged")
        judged_on = {k: found[k] for k in ("tokens", "bytes", "seed")}
        judged_on |= {"data": Path(log.data).name, "split": config["split"], "seq_len": seq_len}
        setting = {k: v for k, v in config.items() if k not in NO_SETTING}
        script = next((TELLING[k] for k in TELLING if k in config), "gpt")
        setting |= {"script": script, "data": judged_on["data"], "steps": steps,
                    "source": (log.source, log.muon)}
        return Run(folder, script, config["seed"], setting, f"{log.millions:.2f}M", log.mflop,
                   steps * config["batch_tokens"], config["init_from"], metric == "val_nll",
                   found["bpb"], nats, judged_on)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        fail(f"{folder}: not the logs of a training script ({type(e).__name__}: {e})")


def read_row(arg):
    """[NAME=]FOLDER[,FOLDER..] -> (name, runs of one setting in the order of their seeds)."""
    name, equals, rest = arg.partition("=")
    if not equals or "/" in name or Path(arg).is_dir():
        name, rest = "", arg
    folders = []
    for part in rest.split(","):
        found = [part] if part and Path(part).is_dir() else sorted(glob.glob(part))
        if not found:
            fail(f"{part or arg}: no such run folder")
        folders += map(Path, found)
    runs = sorted(map(read_run, folders), key=lambda run: run.seed)
    for run in runs[1:]:
        for key in ["script", *sorted(runs[0].setting.keys() | run.setting.keys())]:
            if run.setting.get(key) != runs[0].setting.get(key):
                fail(f"{run.folder}: another {key} than {runs[0].folder}: seeds of one setting "
                     "alone share a row")
    if len({run.seed for run in runs}) < len(runs):
        fail(f"{arg}: the same seed twice: a row takes runs of different seeds")
    return name or rest.rstrip("/").rpartition("/")[2], runs


# ----------------------------------------------------------------------------- statistics
def standard_error(values):
    """Of the mean of independent values; NaN for a single one."""
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan


def over_windows(runs):
    """Nats per token of each pair of neighbouring windows, (N/2,), the mean over seeds."""
    return np.mean([run.nats for run in runs], 0).reshape(-1, 2).mean(1)


def seed_means(runs):
    return np.array([run.nats.mean() for run in runs])


def seed_error(runs, others):
    """Standard error over seeds of the mean difference of two rows; NaN for a single run."""
    a, b = seed_means(runs), seed_means(others)
    if [run.seed for run in runs] == [run.seed for run in others]:
        return standard_error(a - b)
    return math.hypot(standard_error(a), standard_error(b))


# ----------------------------------------------------------------------------- the table
def number(value, form=".4f"):
    return "n/a" if value is None or math.isnan(value) else format(value, form)


def cells(name, runs, first):
    """A row of the table; first: the runs of the first row, or None there."""
    run, pairs = runs[0], over_windows(runs)
    seeds = "1" if len(runs) == 1 else f"{len(runs)}, sd {number(seed_means(runs).std(ddof=1))}"
    bits = None if run.bpb is None else np.mean([r.bpb for r in runs])
    difference = ""
    if first:
        d = pairs - over_windows(first)
        difference = f"{d.mean():+.4f} ± {number(standard_error(d))}"
        if len(runs) > 1 and len(first) > 1:
            difference += f" / {number(seed_error(runs, first))}"
    return [name, run.script, run.parameters, f"{run.tokens:,}" + f" after {run.start}" * bool(
                run.start), run.mflop, seeds,
            f"{'' if run.exact else '≤ '}{pairs.mean():.4f} ± {number(standard_error(pairs))}",
            number(bits), difference]


def table(rows):
    """[(name, runs)] -> markdown."""
    first_name, first = rows[0]
    heads = ["run", "script", "parameters", "training tokens", "MFLOP per token", "seeds",
             "nats per token", "bits per byte", f"minus {first_name}"]
    lines = [heads, ["---"] * len(heads)]
    lines += [cells(name, runs, None if runs is first else first) for name, runs in rows]
    on = first[0].judged_on
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\n{on['data']}, {on['split']}: {on['tokens']:,} tokens, {on['bytes']:,} bytes, windows "
        f"of {on['seq_len']}, noise of seed {on['seed']}. ± standard error over "
        f"{on['tokens'] // on['seq_len'] // 2:,} pairs of windows"
        + (", / over seeds" if any(len(runs) > 1 for _, runs in rows) else "") + ".")


def main(argv):
    if {"--help", "-h"} & {*argv}:
        print(__doc__.strip())
        return
    if not argv:
        fail("give run folders, as in: python records/compare.py out/a out/b")
    flags = [arg for arg in argv if arg.startswith("-")]
    if flags:
        fail(f"{flags[0]}: there are no flags but --help: give run folders")
    rows = [read_row(arg) for arg in argv]
    first = rows[0][1][0]
    for run in (run for _, runs in rows for run in runs):
        for key, value in first.judged_on.items():
            if run.judged_on[key] != value:
                fail(f"{run.folder}: evaluated on {key} {run.judged_on[key]}, {first.folder} on "
                     f"{value}: only the same windows and noise compare")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
