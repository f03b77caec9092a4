"""Plots of a study, as SVG; needs matplotlib (pip install matplotlib).

    python study/plot.py loss out/a out/b --x=tokens --out=loss.svg     # or --x=seconds
    python study/plot.py nfe orders.json .. --out=nfe.svg       # nats per token against passes
    python study/plot.py gap orders.json .. --out=gap.svg       # to AR, by position in the window
    python study/plot.py frontier judge.json --out=frontier.svg # perplexity against entropy
    python study/plot.py density --out=density.svg              # what the schedules train on

orders.json is of study/likelihood.py (gap: with --against), judge.json of study/judge.py, out/a a
run folder. In frontier, rows named NAME_x make one line, NAME. density: how much of the training
loss lies at each masked fraction, under --loss_weight=uniform; the bound weighs all alike.
Bars are standard errors. --title, --size=6x4 (inches).
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

import check  # noqa: E402

import train_mdlm  # noqa: E402
from study.golf import require, run_cli  # noqa: E402

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "nanodlm", "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


class Curve(NamedTuple):
    label: str
    x: list
    y: list
    error: list | None = None  # of y
    style: str = "-"  # matplotlib's: a line, points..
    names: list | None = None  # of the points


def read(path, key):
    done = json.loads(Path(path).read_text())
    require(done.get(key), f"{path}: no {key} in it")
    return done


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
        curves.append(Curve(path.name, x.tolist(), nats.tolist()))
    return curves, flags.x, "training loss, nats per token", {}


def nfe(paths, flags):
    curves = []
    for path in paths:
        done, lines = read(path, "rows"), defaultdict(list)
        for row in done["rows"]:
            if row["nfe"]:
                lines[row["order"], row["threshold"] is not None].append(row)
        for (order, by_threshold), rows in lines.items():
            rows = sorted(rows, key=lambda row: row["nfe"])
            nats, errors = zip(*(row["nats"] for row in rows), strict=True)
            label = f"{Path(path).stem}: " * (len(paths) > 1) + order
            style, label = ("o--", f"{label}, by threshold") if by_threshold else ("o-", label)
            x = [row["nfe"] for row in rows]
            curves.append(Curve(label, x, list(nats), list(errors), style))
    return curves, "passes of the network a window (NFE)", "nats per token", {"xscale": "log"}


def gap(paths, flags):
    curves, ticks = [], []
    for path in paths:
        rows = read(path, "gap")["gap"]
        ticks = [f"{row['first']}" if row["first"] == row["last"] else
                 f"{row['first']}–{row['last']}" for row in rows]
        x = list(range(len(rows)))
        curves.append(Curve(f"{Path(path).stem}: here", x, [row["gap"] for row in rows],
                            [row["se"] for row in rows], "o-"))
        curves.append(Curve(f"{Path(path).stem}: mean up to here", x,
                            [row["cumulative"] for row in rows], None, "--"))
    return curves, "position in the window", "left to right minus AR, nats per token", {
        "xticks": range(len(ticks)), "xticklabels": ticks}


def frontier(paths, flags):
    lines = defaultdict(list)
    for path in paths:
        real, *rows = read(path, "rows")["rows"]
        for row in rows:
            lines[row["text"].rpartition("_")[0] or row["text"]].append(row)
    curves = []
    for name, rows in {**lines, real["text"]: [real]}.items():
        (x, _), (y, error) = (zip(*(row[key] for row in rows), strict=True)
                              for key in ("entropy", "gen_ppl"))
        at = [row["about"].get("temperature", "") for row in rows]
        curves.append(Curve(name, list(x), list(y), list(error), "k*" if rows == [real] else "o-",
                            at))
    return curves, "entropy of a sample, nats", "generative perplexity", {}


def density(paths, flags):
    curves = []
    for name, fraction in train_mdlm.MASKED_FRACTION.items():
        t = torch.linspace(0, 1, 402)[1:-1].requires_grad_()
        masked = fraction(t)
        slope, = torch.autograd.grad(masked.sum(), t)
        y = masked / slope / masked.mean()  # masked tokens drawn at a fraction, of all
        curves.append(Curve(name, masked.tolist(), y.tolist()))
    curves.append(Curve("the bound", [0, 1], [1, 1], None, "k:"))
    return curves, "masked fraction of a window", "share of the training loss", {"ylim": (0, 4)}


KINDS = {f.__name__: f for f in (loss, nfe, gap, frontier, density)}


def draw(curves, xlabel, ylabel, settings, title="", size=(6, 4)):
    """-> a figure with one line for every curve, in their order"""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot.py: needs matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            axes.errorbar(curve.x, curve.y, curve.error, fmt=curve.style, label=curve.label,
                          markersize=4, linewidth=1.4, capsize=2)
            for x, y, name in zip(curve.x, curve.y, curve.names or (), strict=False):
                axes.annotate(str(name), (x, y), xytext=(4, 4), textcoords="offset points",
                              fontsize=7)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title, **settings)
        if settings.get("xscale") == "log":
            ticks = sorted({2 ** round(np.log2(x)) for curve in curves for x in curve.x})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
        axes.legend(fontsize=8)
    return figure


def run(flags):
    kind, *paths = flags.files or [""]
    require(kind in KINDS, f"{kind}: the first word is one of {', '.join(KINDS)}")
    require(bool(paths) != (kind == "density"), f"{kind}: name the files to plot; density has none")
    require(flags.out, "--out=FILE.svg: what to write")
    size = [float(x) for x in flags.size.split("x")]
    figure = draw(*KINDS[kind](paths, flags), flags.title, size)
    import matplotlib
    with matplotlib.rc_context(STYLE):
        is_svg = flags.out.endswith(".svg")
        figure.savefig(flags.out, dpi=120, metadata={"Date": None} if is_svg else None)


def main(argv):
    run_cli("plot.py", run, argv, __doc__, x="tokens", title="", size="6x4", out="")


if __name__ == "__main__":
    main(sys.argv[1:])
