"""Compare finished runs: a markdown table of their validation figures, and differences in pairs.

    python records/compare.py out/gpt out/train_block out/train_mdlm
    python records/compare.py gpt=out/gpt_0,out/gpt_1,out/gpt_2 'mdlm=out/mdlm_*'

An argument is a run folder, or several that are seeds of one setting: with commas between, or a
quoted pattern; NAME= in front names the row. All runs must have been evaluated on the same windows
with the same noise: then the difference to the first row is taken window by window.

    nats per token   mean over windows and seeds, <= where it is a bound, +- its standard error over
                     windows; its standard deviation over seeds stands beside their number
    minus NAME       mean difference +- its standard error over windows / over seeds: of
                     differences of equal seeds if both rows have the same ones, otherwise of two
                     independent means

Standard errors over windows are those of pairs of neighbours, whose noise is antithetic.
"""

import glob
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import check
import numpy as np

EVALUATION = re.compile(
    r"^step:\d+/\d+ (val_\w+):\S+ bpb:(\S+) .*tokens:(\d+) bytes:(\d+) ", re.M)

def read_run(folder):
    log = check.read_log(folder / "log.txt")
    check.check_finished(log)
    config = log.config
    text = (folder / "log.txt").read_text(encoding="utf-8")
    metric, bpb, n_tokens, n_bytes = EVALUATION.findall(text)[-1]
    evaluated_on = {
        "data": Path(config["data"]).name, "tokens": int(n_tokens), "bytes": int(n_bytes),
        "split": config["split"], "seq_len": config["seq_len"],
        "prompt_len": config.get("prompt_len", 0)}
    nats = np.load(folder / f"{config['split']}_nats.npy")  # (N,) of windows
    return SimpleNamespace(
        log=log, seed=config["seed"], bpb=float(bpb), is_exact=metric == "val_nll",
        nats=nats * len(nats) / int(n_tokens),  # (N,) per scored token
        evaluated_on=evaluated_on)  # what must agree for a comparison

def read_row(arg):
    """[NAME=]FOLDER[,FOLDER..] -> (name, runs of one setting in the order of their seeds)."""
    name, equals, rest = arg.partition("=")
    if not equals or "/" in name or Path(arg).is_dir():
        name, rest = "", arg
    folders = []
    for part in rest.split(","):
        found = [part] if Path(part).is_dir() else sorted(glob.glob(part))
        check.require(part and found, f"{part or arg}: no such run folder")
        folders += map(Path, found)
    runs = sorted(map(read_run, folders), key=lambda run: run.seed)
    for run in runs[1:]:
        check.check_same_recipe(run.log, runs[0].log)
    return name or rest.rstrip("/").rpartition("/")[2], runs

def standard_error(values):
    """Of the mean of independent values."""
    return values.std(ddof=1) / len(values) ** 0.5

def over_windows(runs):
    """Nats per token of each pair of neighbouring windows, (N/2,), the mean over seeds."""
    return np.mean([run.nats for run in runs], 0).reshape(-1, 2).mean(1)

def over_seeds(runs):
    """Nats per token of each run, the mean over windows."""
    return np.array([run.nats.mean() for run in runs])

def difference(runs, first):
    """Mean of runs - first with its standard errors."""
    pairs = over_windows(runs) - over_windows(first)
    text = f"{pairs.mean():+.4f} ± {standard_error(pairs):.4f}"
    if len(runs) < 2 or len(first) < 2:
        return text
    a, b = over_seeds(runs), over_seeds(first)
    error = math.hypot(standard_error(a), standard_error(b))
    if [run.seed for run in runs] == [run.seed for run in first]:
        error = standard_error(a - b)
    return f"{text} / {error:.4f}"

def cells(name, runs, first):
    """A row of the table; first: the runs of the first row."""
    log, pairs = runs[0].log, over_windows(runs)
    start, nats = log.config["init_from"], f"{pairs.mean():.4f} ± {standard_error(pairs):.4f}"
    spread = f", sd {over_seeds(runs).std(ddof=1):.4f}" if len(runs) > 1 else ""
    return [name, check.objective_of(log.config), f"{log.parameters}M",
            f"{log.trained:,}{' after ' if start else ''}{start}", log.mflop,
            f"{len(runs)}{spread}", nats if runs[0].is_exact else f"≤ {nats}",
            f"{np.mean([run.bpb for run in runs]):.4f}",
            "" if runs is first else difference(runs, first)]

def table(rows):
    """[(name, runs)] -> markdown."""
    first_name, first = rows[0]
    heads = ["run", "script", "parameters", "training tokens", "MFLOP per token", "seeds",
             "nats per token", "bits per byte", f"minus {first_name}"]
    lines = [heads, ["---"] * len(heads)]
    lines += [cells(name, runs, first) for name, runs in rows]
    on = first[0].evaluated_on
    note = (f"{on['data']}, {on['split']}: {on['tokens']:,} tokens, {on['bytes']:,} bytes, windows "
            f"of {on['seq_len']}. ± standard error over "
            f"{len(first[0].nats) // 2:,} pairs of windows")
    if any(len(runs) > 1 for _, runs in rows):
        note += ", / over seeds"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}."

def main(argv):
    parser = check.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    try:
        rows = [read_row(arg) for arg in parser.parse_args(argv).runs]
        first = rows[0][1][0]
        for run in (run for _, runs in rows for run in runs):
            for key, value in first.evaluated_on.items():
                check.require(run.evaluated_on[key] == value, f"{run.log.name}: evaluated on {key} "
                        f"{run.evaluated_on[key]}, {first.log.name} on {value}")
    except (OSError, ValueError) as error:
        parser.error(error)
    print(table(rows))

if __name__ == "__main__":
    main(sys.argv[1:])
