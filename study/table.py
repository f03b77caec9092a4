"""Tables of a study: run folders -> JSON and markdown; or what any program here wrote, again.

    python study/table.py out/study/schedules-tiny --out=study/results/schedules.json
    python study/table.py out/study/objectives-tiny --judge=judge.json --zeroshot=zeroshot.json
    python study/table.py study/results/*.json            # the tables of these files, once more

A folder is one that study/run.py has filled. The columns are those of records/compare.py; what the
others are compared with is the first row of the matrix, or --first=ROW. Further columns are the
means of the rows of --judge and --zeroshot that are named ROW or ROW_SEED. **Bold** is below every
other row by more than 2 errors, of windows and of seeds (several); a bound competes with bounds.
Runs that are not done are left out, and named below. What is not known is -.
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

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
    found = [difference(runs, other) for other in others]
    return bool(found) and all(errors[1:] and -mean > 2 * max(errors) for mean, *errors in found)

def read_folder(folder):
    """-> {row: its finished runs}, in the order of the matrix; [what is left out]"""
    found, left_out = defaultdict(list), []
    for path in sorted(folder.glob("*_*")):
        how_far, detail = state(path)
        if how_far == "done":
            found[path.name.rpartition("_")[0]].append(str(path))
        else:
            left_out.append(f"{path.name} ({how_far} {detail}".rstrip() + ")")
    names = {**MATRICES.get(folder.name.rpartition("-")[0], {}), **found}
    return {name: compare.read_row(f"{name}={','.join(found[name])}")[1] if name in found else []
            for name in names}, left_out

def read_extra(path):  # -> {name of a row: its columns}
    rows = json.loads(Path(path).read_text())["rows"] if path else []
    return {row.get("name", row.get("text")): {
        key: row[key][0] if isinstance(row[key], list) else row[key] for key in EXTRA if key in row
    } for row in rows}

def study(folder, flags):
    """A folder of runs -> the JSON of its table"""
    found, left_out = read_folder(folder)
    first = flags.first or next((name for name, runs in found.items() if runs), "")
    what = f" for --first={first}" * bool(first)
    require(found.get(first), f"{folder}: no finished run there{what}")
    on, extras = found[first][0].evaluated_on, read_extra(flags.judge) | read_extra(flags.zeroshot)
    rows = []
    for name, runs in found.items():
        for run in runs:
            require(run.evaluated_on == on, f"{run.log.name}: evaluated on {run.evaluated_on}, "
                    f"{first} on {on}")
        rows.append(dict(name=name, seeds=[run.seed for run in runs]))
        if not runs:
            continue
        rivals = [others for key, others in found.items()
                  if key != name and others and others[0].is_exact == runs[0].is_exact]
        pairs, names = compare.over_windows(runs), [name, *(f"{name}_{run.seed}" for run in runs)]
        given = [extras[x] for x in names if x in extras]
        columns = {key: [x[key] for x in given if key in x] for key in EXTRA}
        rows[-1] |= dict(
            cells=compare.cells(name, runs, found[first]), is_best=is_best(runs, rivals),
            nats=[pairs.mean(), compare.standard_error(pairs)], is_bound=not runs[0].is_exact,
            by_seed=compare.over_seeds(runs).tolist(),
            difference=difference(runs, found[first]) if name != first else None,
            minutes=float(np.mean([run.log.seconds for run in runs])) / 60,
            **{key: float(np.mean(values)) for key, values in columns.items() if values})
    return dict(about=dict(program="table", folder=folder.name, first=first, left_out=left_out,
                           **on), rows=rows)

def print_rows(done):
    about, table = done["about"], []
    extra = [key for key in EXTRA if any(key in row for row in done["rows"])]
    for row in done["rows"]:
        cells = [*row.get("cells", [row["name"], *[""] * 8])]
        if row.get("is_best"):
            cells[6] = f"**{cells[6]}**"
        cells += [f"{row[key]:.3f}" if key in row else "" for key in ("minutes", *extra)]
        table.append([cell or "-" for cell in cells])
    likelihood.print_table(table, [
        "run", "script", "parameters", "training tokens", "MFLOP per token", "seeds",
        "nats per token", "bits per byte", f"minus {about['first']}", "minutes",
        *(EXTRA[key] for key in extra)])
    print("\n{data}, {split}: {tokens:,} tokens, {bytes:,} bytes, windows of {seq_len}.".format(
        **about))
    if about["left_out"]:
        print(f"Left out: {', '.join(about['left_out'])}.")

PRINT = {"table": print_rows, "judge": judge.print_rows, "zeroshot": zeroshot.print_rows,
         "likelihood": likelihood.print_rows}

def run(flags):
    require(flags.files, "name a folder of runs, or the JSON files of tables")
    for path in map(Path, flags.files):
        is_old = path.suffix == ".json"
        done = json.loads(path.read_text()) if is_old else study(path, flags)
        program = done.get("about", {}).get("program")
        require(program in PRINT, f"{path}: not written by a program of study/")
        print(f"### {path.stem}\n")
        likelihood.finish(done, PRINT[program], not is_old and flags.out)
        print()

def main(argv):
    run_cli("table.py", run, argv, __doc__, first="", judge="", zeroshot="", out="")

if __name__ == "__main__":
    main(sys.argv[1:])
