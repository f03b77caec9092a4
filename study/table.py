"""Tables of a study: run folders -> JSON and markdown; or what any program here wrote, again.

    python study/table.py out/study/schedules-tiny --out=study/results/schedules.json
    python study/table.py out/study/objectives-tiny --judge=judge.json --zeroshot=zeroshot.json
    python study/table.py study/results/*.json            # the tables of these files, once more

A folder is one that study/run.py has filled, ROW_SEED for every run. The first row of its matrix,
or --first=ROW, is what the others are compared with, window by window (records/compare.py).

    nats per token  <= a bound; mean +- standard error over pairs of windows; sd over seeds
    minus ROW       mean difference +- its error over pairs of windows / over seeds
    **bold**        the lowest, if it is below every other row by more than 2 errors, of windows and
                    of seeds; a bound competes with bounds only
    gen ppl..       of the rows of --judge and --zeroshot that are named ROW or ROW_SEED, their mean

Runs that are not done are left out and named below. What is not known is -.
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

import check  # noqa: E402
import compare  # noqa: E402

from study import judge, likelihood, zeroshot  # noqa: E402
from study.golf import require, run_cli  # noqa: E402
from study.run import MATRICES, state  # noqa: E402

EXTRA = {  # key in the JSON of judge.py or zeroshot.py -> head of its column
    "gen_ppl": "gen ppl", "entropy": "entropy", "bits_per_byte": "judge's bits per byte",
    "mauve": "mauve", "ppl": "zero-shot ppl", "ppl_word": "ppl_word"}


def difference(runs, first):
    """-> [mean, error over windows, and error over seeds if there are any]"""
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+|nan", compare.difference(runs, first))]


def is_best(runs, others):
    """Below each of the others by more than two errors?"""
    pairs = [difference(runs, other) for other in others]
    return bool(pairs) and all(-mean > 2 * max(errors) for mean, *errors in pairs)


def read_folder(folder):
    """-> {row: its finished runs}, in the order of the matrix; [what is left out]"""
    found, left_out = defaultdict(list), []
    names = list(MATRICES.get(folder.name.rpartition("-")[0], ()))
    paths = [path for path in folder.iterdir() if re.fullmatch(r".+_\d+", path.name)]
    for path in sorted(paths, key=lambda path: int(path.name.rpartition("_")[2])):
        how_far, detail = state(path)
        if how_far == "done":
            found[path.name.rpartition("_")[0]].append(compare.read_run(path))
        else:
            left_out.append(f"{path.name} ({how_far} {detail}".rstrip() + ")")
    names += sorted(found.keys() - set(names))
    for runs in found.values():
        for run in runs[1:]:
            check.check_same_recipe(run.log, runs[0].log)
    return {name: found[name] for name in names}, left_out


def read_extra(path):
    """Name -> the columns of that row of a JSON of judge.py or zeroshot.py"""
    rows = json.loads(Path(path).read_text())["rows"] if path else []
    return {row.get("name", row.get("text")): {
        key: row[key][0] if isinstance(row[key], list) else row[key] for key in EXTRA if key in row
    } for row in rows}


def make_row(name, runs, rows, first):
    if not runs:
        return dict(name=name, seeds=[])
    log, pairs, by_seed = runs[0].log, compare.over_windows(runs), compare.over_seeds(runs)
    rivals = [other for key, other in rows.items()
              if key != name and other and other[0].is_exact == runs[0].is_exact]
    return dict(
        name=name, script=check.objective_of(log.config), seeds=[run.seed for run in runs],
        nats=[pairs.mean(), compare.standard_error(pairs)], by_seed=by_seed.tolist(),
        is_bound=not runs[0].is_exact, is_best=is_best(runs, rivals),
        bpb=float(np.mean([run.bpb for run in runs])),
        difference=difference(runs, first) if first and runs is not first else None,
        tokens=log.trained, parameters=float(log.parameters), mflop=log.mflop,
        minutes=float(np.mean([run.log.seconds for run in runs])) / 60)


def study(folder, flags):
    """A folder of runs -> the JSON of its table"""
    rows, left_out = read_folder(folder)
    name = flags.first or next((key for key, runs in rows.items() if runs), "")
    require(rows.get(name), f"{folder}: no finished run for --first={name}")
    on = rows[name][0].evaluated_on
    for run in (run for runs in rows.values() for run in runs):
        require(run.evaluated_on == on, f"{run.log.name}: evaluated on {run.evaluated_on}, "
                f"{name} on {on}")
    table = [make_row(key, runs, rows, rows[name]) for key, runs in rows.items()]
    extras = read_extra(flags.judge) | read_extra(flags.zeroshot)
    for row in table:
        names = [row["name"], *(f"{row['name']}_{seed}" for seed in row["seeds"])]
        given = [extras[key] for key in names if key in extras]
        for key in EXTRA:
            values = [extra[key] for extra in given if key in extra]
            row |= {key: float(np.mean(values))} if values else {}
    about = dict(program="table", folder=folder.name, first=name, left_out=left_out, **on)
    return dict(about=about, rows=table)


def cells(row, extra):
    if not row["seeds"]:
        return [row["name"], *["-"] * (8 + len(extra))]
    nats, star = "{:.4f} ± {:.4f}".format(*row["nats"]), "**" * row["is_best"]
    spread = f", sd {np.std(row['by_seed'], ddof=1):.4f}" if len(row["seeds"]) > 1 else ""
    difference = "-"
    if row["difference"]:
        mean, *errors = row["difference"]
        difference = f"{mean:+.4f} ± " + " / ".join(f"{x:.4f}" for x in errors)
    return [row["name"], row["script"], f"{star}{'≤ ' * row['is_bound']}{nats}{star}",
            f"{len(row['seeds'])}{spread}", f"{row['bpb']:.4f}", difference,
            f"{row['tokens']:,}", f"{row['parameters']:.2f}M", f"{row['minutes']:.1f}",
            *(f"{row[key]:.3f}" if key in row else "-" for key in extra)]


def print_study(done):
    about, rows = done["about"], done["rows"]
    extra = [key for key in EXTRA if any(key in row for row in rows)]
    likelihood.print_table(
        [cells(row, extra) for row in rows],
        ["run", "script", "nats per token", "seeds", "bits per byte", f"minus {about['first']}",
         "training tokens", "parameters", "minutes", *(EXTRA[key] for key in extra)])
    print(f"\n{about['data']}, {about['split']}: {about['tokens']:,} tokens, {about['bytes']:,} "
          f"bytes, windows of {about['seq_len']}.")
    if about["left_out"]:
        print(f"Left out: {', '.join(about['left_out'])}.")


def run(flags):
    require(flags.files, "name a folder of runs, or the JSON files of tables")
    for path in map(Path, flags.files):
        is_table = path.suffix == ".json"
        done = json.loads(path.read_text()) if is_table else study(path, flags)
        if flags.out and not is_table:
            Path(flags.out).write_text(json.dumps(done, indent=1) + "\n")
        program = done["about"].get("program")
        require(program in PRINT, f"{path}: not written by a program of study/")
        print(f"### {path.stem}\n")
        PRINT[program](done)
        print()


PRINT = {"table": print_study, "judge": lambda done: judge.print_rows(done["rows"]),
         "likelihood": likelihood.print_rows, "zeroshot": lambda done: zeroshot.print_rows(
             done["rows"])}


def main(argv):
    run_cli("table.py", run, argv, __doc__, first="", judge="", zeroshot="", out="")


if __name__ == "__main__":
    main(sys.argv[1:])
