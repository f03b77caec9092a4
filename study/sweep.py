"""Search for flags: --runs points of a space, spread evenly at random, and the three best of them.

    python study/sweep.py --script=train_mdlm.py --flags="--preset=tiny --data=books --steps=750" \\
        --space=lr:log:.01:.06,muon_beta2:linear:.9:.99,batch_tokens:2048:4096 --jobs=local:2

A part of the space is a flag with two ends, log or linear, or with its choices. Points come from a
Sobol sequence by --seed: ten runs are too few for a model of the surface. Runs lie in OUT/NUMBER
(out/sweep); the same command again goes on. The second half of the validation windows chooses; the
figure to quote is that of the first half, which had no part in it.
"""
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

import compare  # noqa: E402

from study.golf import require, run_cli  # noqa: E402
from study.likelihood import mean_and_error, print_table, shown  # noqa: E402
from study.run import run_here, state  # noqa: E402

RANGE = re.compile(r"\w+:(log|linear):([\d.e-]+):([\d.e-]+)")

def value(part, u):
    """NAME:log|linear:LOW:HIGH or NAME:CHOICE[:CHOICE..], u in [0, 1) -> --NAME=VALUE"""
    name, *choices = part.split(":")
    require(choices, f"--space={part}: write NAME:log:LOW:HIGH or NAME:CHOICE:CHOICE")
    if not (found := RANGE.fullmatch(part)):
        return f"--{name}={choices[int(u * len(choices))]}"
    low, high = map(float, found.groups()[1:])
    x = low * (high / low) ** u if found[1] == "log" else low + (high - low) * u
    return f"--{name}={x:.4g}"

def run(flags):
    space, out = flags.space.split(","), Path(flags.out)
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=flags.seed)
    points = points.draw(flags.runs).tolist()
    chosen = [[value(part, u) for part, u in zip(space, row, strict=True)] for row in points]
    runs = [(out / str(i), [str(ROOT / flags.script), *flags.flags.split(), *row,
                            f"--out={out / str(i)}"]) for i, row in enumerate(chosen)]
    run_here(runs, int(flags.jobs.removeprefix("local:")))
    done = [i for i, (folder, _) in enumerate(runs) if state(folder)[0] == "done"]
    require(done, f"{out}: no run is done; {out}/0/output.txt says why")
    found = []
    for i in done:
        nats = torch.from_numpy(compare.read_run(out / str(i)).nats)
        half = len(nats) // 4 * 2  # in pairs of windows
        found.append((mean_and_error(nats[half:]), mean_and_error(nats[:half]), i))
    found.sort()
    print_table([[str(i), " ".join(chosen[i]), shown(second)] for second, _, i in found[:3]],
                ["run", "flags", "nats per token, second half"])
    _, first, best = found[0]
    print(f"\nRun {best} on the first half: {shown(first)}. {len(done)} of {flags.runs} runs done.")
    for at, part in enumerate(space):
        column = [points[i][at] for i in done]
        if points[best][at] in (min(column), max(column)) and RANGE.fullmatch(part):
            print(f"{chosen[best][at]} is at the edge of what was tried: widen {part}")

def main(argv):
    run_cli("sweep.py", run, argv, __doc__, script="train_mdlm.py", flags="", space="", runs=10,
            seed=0, jobs="local:1", out="out/sweep")

if __name__ == "__main__":
    main(sys.argv[1:])
