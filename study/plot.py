"""Plots of a study, as SVG; needs matplotlib (pip install matplotlib).

    python study/plot.py loss out/a out/b --x=tokens --out=loss.svg     # or --x=seconds
    python study/plot.py bound out/a_0 out/a_1 out/b_0 --out=bound.svg  # NAME_SEED: seeds together
    python study/plot.py nfe orders.json .. --out=nfe.svg       # nats per token against passes
    python study/plot.py gap orders.json .. --out=gap.svg       # to AR, by position in the window
    python study/plot.py frontier judge.json --out=frontier.svg # perplexity against entropy
    python study/plot.py density --out=density.svg              # what the schedules train on

out/a is a run folder, orders.json of study/likelihood.py (gap: with --against; nfe: files of one
checkpoint share lines), judge.json of study/judge.py, where rows named NAME_x make one line.
density: of the training loss, under --loss_weight=uniform. Bars are standard errors; of bound, the
lowest and the highest seed.
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

import check  # noqa: E402

import train_mdlm  # noqa: E402
from study.golf import require, run_cli  # noqa: E402

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "nanodlm", "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "lines.markersize": 4, "lines.linewidth": 1.4, "errorbar.capsize": 2, "xtick.labelsize": 8}

# Each kind of plot: paths -> curves, as matplotlib's errorbar takes them, and what the axes say.
def loss(paths, flags):
    require(flags.x in ("tokens", "seconds"), f"--x={flags.x}: tokens or seconds")
    curves = []
    for path in map(Path, paths):
        log, text = check.read_log(path / "log.txt"), (path / "log.txt").read_text()
        size, found = log.config["batch_tokens"], {}  # of repeated steps the last counts
        for step, nats, rate in re.findall(r"^step:(\d+)/\d+ loss:(\S+) .*tok/s:(\d+)", text, re.M):
            found[int(step)] = float(nats), int(rate)
        steps = np.array([0, *sorted(found)])
        nats, rates = np.array([found[step] for step in steps[1:]]).T
        seconds = (np.diff(steps) * size / rates).cumsum()
        x = seconds if flags.x == "seconds" else steps[1:] * size
        curves.append(dict(label=path.name, x=x, y=nats))
    return curves, dict(xlabel=flags.x, ylabel="training loss, nats per token")

def bound(paths, flags):
    runs, curves = defaultdict(list), []
    for path in map(Path, paths):
        log, text = check.read_log(path / "log.txt"), (path / "log.txt").read_text()
        found = re.findall(r"^step:(\d+)/\d+ val_\w+:([\d.]+)", text, re.M)
        require(found, f"{path}: not evaluated yet")
        runs[path.name.rpartition("_")[0] or path.name].append(
            {int(step) * log.config["batch_tokens"]: float(nats) for step, nats in found})
    for name, group in runs.items():
        x = sorted(set.intersection(*map(set, group)))
        y = np.array([[run[tokens] for tokens in x] for run in group])  # (seeds, points)
        mean = y.mean(0)
        curves.append(dict(label=f"{name}, mean of {len(group)}", x=x, y=mean, fmt="o-",
                           yerr=(mean - y.min(0), y.max(0) - mean)))
    return curves, dict(xlabel="training tokens", ylabel="evaluation, nats per token")

def read(path, key):
    done = json.loads(Path(path).read_text())
    require(done.get(key), f"{path}: no {key} in it")
    return done[key]

def nfe(paths, flags):
    curves, lines = [], defaultdict(list)
    for path in paths:
        about = read(path, "about")
        for row in read(path, "rows"):
            row["nfe"] = row["nfe"] or about["seq_len"]  # what the NELBO is the mean of
            key = Path(about["ckpt"]).name, row["order"], row["threshold"] is not None
            lines[key].append(row)
    names, orders = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    for (name, order, by_threshold), rows in lines.items():
        rows.sort(key=lambda row: row["nfe"])
        nats, errors = zip(*(row["nats"] for row in rows), strict=True)
        style = "x:" if by_threshold else ("o-", "s--", "^-.")[names.index(name) % 3]
        curves.append(dict(label=f"{name}: {order}" + ", by threshold" * by_threshold, fmt=style,
                           x=[row["nfe"] for row in rows], y=nats, yerr=errors,
                           color=f"C{orders.index(order)}"))
    return curves, dict(xlabel="passes of the network a window (NFE)", ylabel="nats per token",
                        xscale="log")

def gap(paths, flags):
    curves, ticks = [], []
    for path in paths:
        rows, name = read(path, "gap"), Path(path).stem
        ticks = [f"{row['first']}–{row['last']}" for row in rows]
        x, local = range(len(rows)), [row["gap"] for row in rows]
        curves.append(dict(label=f"{name}: here", x=x, y=local, yerr=[row["se"] for row in rows],
                           fmt="o-"))
        curves.append(dict(label=f"{name}: mean up to here", x=x, fmt="--",
                           y=[row["cumulative"] for row in rows]))
    return curves, dict(xlabel="position in the window", xticks=range(len(ticks)),
                        xticklabels=ticks, ylabel="left to right minus AR, nats per token")

def frontier(paths, flags):
    lines = defaultdict(list)
    for path in paths:
        real, *rows = read(path, "rows")
        for row in rows:
            lines[row["text"].rpartition("_")[0] or row["text"]].append(row)
    curves = []
    for name, rows in {**lines, real["text"]: [real]}.items():
        x = [row["entropy"][0] for row in rows]
        y, errors = zip(*(row["gen_ppl"] for row in rows), strict=True)
        curves.append(dict(label=name, x=x, y=y, yerr=errors, fmt="k*" if real in rows else "o-",
                           names=[row["text"][len(name) + 1:] for row in rows]))
    return curves, dict(xlabel="entropy of a sample, nats", ylabel="generative perplexity")

def density(paths, flags):
    curves = []
    for name, fraction in train_mdlm.MASKED_FRACTION.items():
        t = torch.linspace(0, 1, 402)[1:-1].requires_grad_()
        masked = fraction(t)
        slope, = torch.autograd.grad(masked.sum(), t)
        y = masked / slope / masked.mean()  # masked tokens drawn at a fraction, of all
        curves.append(dict(label=name, x=masked.detach().numpy(), y=y.detach().numpy()))
    curves.append(dict(label="the bound", x=[0, 1], y=[1, 1], fmt="k:"))
    return curves, dict(xlabel="masked fraction of a window", ylim=(0, 4),
                        ylabel="density of the training loss")

KINDS = {f.__name__: f for f in (loss, bound, nfe, gap, frontier, density)}

def draw(curves, settings, path):
    """Write the plot -> its figure"""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("needs matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure((7.5, 4), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            names = curve.pop("names", ())
            axes.errorbar(**curve)
            for x, y, name in zip(curve["x"], curve["y"], names, strict=False):
                axes.annotate(str(name), (x, y), (4, 4), textcoords="offset points", fontsize=7)
        axes.set(**settings)
        if "xscale" in settings:
            ticks = sorted({2 ** round(np.log2(x)) for curve in curves for x in curve["x"]})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
        figure.legend(fontsize=8, loc="outside right upper")
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    return figure

def run(flags):
    kind, *paths = flags.files or [""]
    require(kind in KINDS, f"{kind}: the first word is one of {', '.join(KINDS)}")
    require(bool(paths) != (kind == "density"), f"{kind}: name the files to plot; density has none")
    require(flags.out, "--out=FILE.svg: what to write")
    draw(*KINDS[kind](paths, flags), flags.out)

def main(argv):
    run_cli("plot.py", run, argv, __doc__, x="tokens", out="")

if __name__ == "__main__":
    main(sys.argv[1:])
