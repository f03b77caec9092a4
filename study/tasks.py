"""What diffusion is for: exact answers to small problems, by every script on one trunk.

    python study/tasks.py run --tasks=sudoku4,reversal --out=out/tasks     # goes on where it was
    python study/tasks.py table --out=out/tasks                            # of what is done
    python study/tasks.py make --task=sudoku4 --out=data/sudoku4
    python study/tasks.py score --task=sudoku4 --data=data/sudoku4 --ckpt=out/train_mdlm \\
        --orders=random,confidence --steps=0,4

Every window is one problem: a question of prompt_len bytes, the rest is its answer. An answer
counts if it is right, not if it is the one in the file. Whether a problem is held out depends on a
hash of its key alone, so training has seen no key of the test:

    sudoku4    a 4x4 grid with 4 to 12 blanks; key: the solution
    sudoku6    a 6x6 grid with 9 to 27 blanks; key: the solution
    sudoku9    a 9x9 grid with 4 to 20 blanks; key: the solution; only if --tasks names it
    countdown  a target from four digits, each at most once; key: the digits
    addition   of two numbers of five digits, the sum from its first digit on; key: the pair
    reversal   A=B of all facts, B=A of those not held out; asked B= of those held out and, to know
               what was learned, A=; train_mdlm and train_sedd also ___=B; key: the fact
    brackets   eight in the middle of twenty, of two kinds; key: the question
    sort       twelve letters into the alphabet's order; key: the letters

Every token is the likeliest one (temperature 0); orders differ in where it stands. Flags of run:
--tasks, --scripts, --seeds (3), --tokens of a training, --orders, --steps (passes an answer; 0: one
a token), --data (folder of the data sets), --out.
"""
import hashlib
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import sample  # noqa: E402
from study.golf import require, run_cli  # noqa: E402
from study.likelihood import print_table  # noqa: E402
from study.puzzles import PAD, TASKS, draw_fact  # noqa: E402

HOLE = "_"  # a byte that is asked for
HELD_OUT = 5  # one key in so many
STEP_TOKENS = 4096  # in a training step, or a little less
TRUNK = ("--n_layer=4", "--n_head=4", "--n_embd=64", "--lr=0.03", "--shuffle=1", "--eval_every=0",
         "--ckpt_every=0", "--log_every=100")
COMPILED_STEPS = 300  # compiling pays for itself in a training of so many
OWN = {"train_block": ("--value_residual=0", "--muon_beta2=0")}  # so that all have one trunk
BRIEF = (("gpt", "left to right"), ("train_mdlm", "random"), ("train_mdlm", "confidence"),
         ("train_block", "confidence"), ("train_sedd", "tweedie"))  # columns of the short table
ORDERS = {"gpt": ("",), "sedd": ("tweedie",)}  # of the kinds that have no choice

# ----------------------------------------------------------------------------- data sets
def draw_problems(task, rng):
    """-> {question: answer} to train on and to test on, of keys that do not meet."""
    train, test, answers = {}, {}, set()
    while len(train) < task.n_train or len(test) < task.n_test:
        key, question, answer = task.draw(rng)
        if task.draw is draw_fact and answer in answers:  # asked backward, it has one name
            continue
        answers.add(answer)
        is_held_out = hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0
        part, size = (test, task.n_test) if is_held_out else (train, task.n_train)
        if len(part) < size:
            part[question] = answer
    return train, test

def fact(left, right):
    return f"{left}={right}".rjust(12, PAD)

def make(name, folder, seed=0):
    """Write the shards of train and val (the test, answered) and test.jsonl, if not there yet."""
    task, path, rng = TASKS[name], Path(folder, "meta.json"), np.random.default_rng(seed)
    settings = dict(task=name, seed=seed, n_train=task.n_train, n_test=task.n_test)
    if path.exists():
        found = json.loads(path.read_bytes())["settings"]
        require(found == settings, f"{folder}: holds {found}; delete it or name another folder")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    hole, (train, test) = HOLE * task.answer_len, draw_problems(task, rng)
    windows = {"train": [q + a for q, a in train.items()], "val": [q + a for q, a in test.items()]}
    items = [dict(asked="", row=q + hole, question=q, answer=a) for q, a in test.items()]
    if name == "reversal":
        windows["train"] = [fact(*pair) for pair in (train | test).items()]
        windows["train"] += [fact(what, who) for who, what in train.items()]
        windows["val"] = [fact(what, who) for who, what in test.items()]
        ways = {"B=__": lambda who, what: (fact(what, hole), who),
                "A=__, as trained": lambda who, what: (fact(who, hole), what),
                "__=B": lambda who, what: (fact(hole, what), who)}
        items = [dict(zip(("asked", "row", "answer"), (asked, *way(*pair)), strict=True))
                 for asked, way in ways.items() for pair in test.items()]
    rng.shuffle(windows["train"])
    meta = prepare_data.tokenizer_meta("byte")
    for split, rows in windows.items():
        tokens, header = "".join(rows).encode(), np.zeros(256, "<i4")
        header[:5] = prepare_data.MAGIC, prepare_data.VERSION, len(tokens), 1, 256
        prepare_data.write_atomically(path.parent / f"{split}_000000.bin", header.data, tokens)
    path.with_name("test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    meta = {"name": name, **meta, **prepare_data.describe(path.parent, meta), "settings": settings}
    prepare_data.write_atomically(path, json.dumps(meta).encode())
    print(f"{folder}: {len(windows['train']):,} windows of {task.seq_len} bytes to train on, "
          f"{len(items):,} questions of other keys", file=sys.stderr)

# ----------------------------------------------------------------------------- scores
def wilson(n_right, n, z=1.96):
    """95% interval of a share."""
    p, spread = n_right / n, z * z / n
    half = math.sqrt(p * (1 - p) * spread + spread * spread / 4)
    return [(p + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1)]

def count_right(task, items, answers):
    return sum(given == item["answer"] if task.is_right is None else
               bool(task.is_right(item["question"], given))
               for item, given in zip(items, answers, strict=True))

def answer_all(lm, task, items, order, passes):
    """-> the answers, passes and CPU seconds for one of them, in batches"""
    rows = torch.tensor([[*item["row"].encode()] for item in items])
    canvas = sample.Canvas(rows, rows != ord(HOLE), torch.zeros_like(rows),
                           torch.ones(1, lm.cfg.vocab_size, dtype=torch.bool), 0)
    steps = {"block": -(-passes * lm.block_len // task.answer_len), "gpt": 0,
             "sedd": passes or task.answer_len}.get(lm.kind, passes)
    opts = sample.make_options(order=order, steps=steps, temperature=0.0)
    start = time.process_time()  # of all threads; other work does not disturb it
    batches = [*lm.batches(canvas, opts, stops=False)]
    seconds = time.process_time() - start
    tokens = torch.tensor([row for rows, _ in batches for row, _ in rows])
    holes = tokens[~canvas.is_known].view(len(items), -1).tolist()
    n_passes = sum(nfe * len(rows) for rows, nfe in batches) / len(items)
    return [lm.tokenizer.decode(hole) for hole in holes], n_passes, seconds / len(items)

def score(lm, name, folder, orders, passes):
    """Every question in every order -> [{asked, order, steps, right, n, passes, seconds}]"""
    task, results = TASKS[name], []
    fits = lm.tokenizer.name == "byte" and lm.cfg.seq_len == task.seq_len
    require(fits, f"{lm.path}: not trained on --task={name}")
    path = Path(folder, "test.jsonl")
    require(path.exists(), f"--data={folder}: no test.jsonl in it; make the data first")
    items = [json.loads(line) for line in path.read_text().splitlines()]
    passes = passes[:1] if lm.kind == "gpt" else [n for n in passes if n < task.answer_len]
    for asked, group in itertools.groupby(items, lambda item: item["asked"]):
        group = list(group)
        if lm.kind in ("gpt", "block") and not group[0]["row"].endswith(HOLE):
            continue
        for order in ORDERS.get(lm.kind, orders):
            for n in passes:
                answers, n_passes, seconds = answer_all(lm, task, group, order, n)
                results.append(dict(asked=asked, order=order or "left to right", steps=n,
                                    right=count_right(task, group, answers), n=len(group),
                                    passes=n_passes, seconds=seconds))
    return results

def share(rows, digits=1):
    """The share of right answers and its interval, seeds together."""
    n_right, n = (sum(row[key] for row in rows) for key in ("right", "n"))
    low, high = wilson(n_right, n)
    return f"{n_right / n:.{digits}%} ({low:.{digits}%} to {high:.{digits}%})"

def show(found):
    """{(asked, script, order, steps): [a score for every seed]} -> a table, seeds together"""
    table = []
    for (asked, script, order, _), rows in found.items():
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        table.append([asked, script, order, f"{rows[0]['passes']:.0f}", share(rows),
                      " ".join(f"{row['right'] / row['n']:.1%}" for row in rows),
                      f"{1e3 * seconds:.2f}"])
    head = ["asked", "script", "order", "passes", "right (95% interval)", "by seed",
            "CPU ms an answer"]
    first = 0 if any(row[0] for row in table) else 1  # most tasks ask in one way
    print_table([row[first:] for row in table], head[first:])

# ----------------------------------------------------------------------------- runs
def run_cell(flags, name, seed, script, orders, passes):
    """Train and score, unless that is done."""
    task, data = TASKS[name], Path(flags.data, name)
    folder = Path(flags.out, name, f"{script}_{seed}")
    if (folder / "score.json").exists():
        return
    make(name, data)
    # A fact has to be learned from both ends.
    given = () if name == "reversal" else (f"--prompt_len={task.prompt_len}",)
    own = OWN.get(script, ()) + (f"--block_len={task.block_len}",) * (script == "train_block")
    n_rows = STEP_TOKENS // task.seq_len // 2 * 2  # pairs, for train_mdlm
    n_tokens = n_rows * task.seq_len
    steps = flags.tokens // n_tokens
    print(f"{name}: {script}, seed {seed}", file=sys.stderr)
    done = subprocess.run([
        sys.executable, ROOT / f"{script}.py", *TRUNK, *own, *given, f"--data={data}",
        f"--seq_len={task.seq_len}", f"--batch_tokens={n_tokens}", f"--micro_batch={n_rows}",
        f"--steps={steps}", f"--compile={int(steps >= COMPILED_STEPS)}", f"--seed={seed}",
        f"--out={folder}", "--resume=1"],
        stdout=subprocess.DEVNULL)
    is_done = done.returncode == 0 and (folder / "val_nats.npy").exists()
    require(is_done, f"{script}.py has not finished: the same command goes on from here")
    lm = sample.load(folder, device="cpu", dtype="fp32")
    about = dict(task=name, script=script, seed=seed, parameters=lm.n_parameters,
                 tokens=lm.cfg.steps * n_tokens, seq_len=task.seq_len)
    rows = [about | row for row in score(lm, name, data, orders, passes)]
    (folder / "score.json").write_text(json.dumps(rows, indent=1) + "\n")

def write_tables(out, names):
    """One table of all tasks, one token a pass, and one for each, of the scores that are there."""
    tables, brief = {}, []
    for path in sorted(Path(out).glob("*/*/score.json")):
        for row in json.loads(path.read_text()):
            key = tuple(row[k] for k in ("asked", "script", "order", "steps"))
            tables.setdefault(row["task"], {}).setdefault(key, []).append(row)
    require(tables, f"--out={out}: no scores in it")
    tables = {name: tables[name] for name in names if name in tables}
    for name, found in tables.items():
        for asked in sorted({key[0] for key in found}):
            rows = [found.get((asked, *column, 0)) for column in BRIEF]
            brief.append([f"{name} {asked}".rstrip(), *(share(x, 0) if x else "" for x in rows)])
    print_table(brief, ["task", *(f"{script}, {order}" for script, order in BRIEF)])
    for name, found in tables.items():
        row = next(iter(found.values()))[0]
        print(f"\n### {name}\n\n{row['parameters'] / 1e6:.2f}M parameters, "
              f"{row['tokens']:,} training tokens, {row['seq_len']} a problem.\n")
        show(dict(sorted(found.items(), key=lambda item: item[0][0])))

def names_of(flag, text, known):
    found = text.split(",")
    for name in found:
        require(name in known, f"--{flag}={name}: there are {', '.join(known)}")
    return found

def run(flags):
    way = " ".join(flags.files)
    require(way in ("make", "score", "run", "table"),
            f"{way or 'no word'}: give one of make, score, run, table")
    orders = names_of("orders", flags.orders, sample.RANKS)
    passes = [int(n) for n in flags.steps.split(",")]
    if way in ("make", "score"):
        names_of("task", flags.task, TASKS)
    if way == "make":
        make(flags.task, flags.out, flags.seed)
    elif way == "score":
        lm = sample.load(flags.ckpt, flags.script or None, device="cpu", dtype="fp32")
        rows = score(lm, flags.task, flags.data, orders, passes)
        show({(row["asked"], lm.name, row["order"], row["steps"]): [row] for row in rows})
    else:
        names = names_of("tasks", flags.tasks, TASKS)
        scripts = names_of("scripts", flags.scripts, sample.SCRIPTS)
        if way == "run":
            for seed, name, script in itertools.product(range(flags.seeds), names, scripts):
                run_cell(flags, name, seed, script, orders, passes)
        write_tables(flags.out, names)

def main(argv):
    tasks = ",".join(name for name in TASKS if name != "sudoku9")  # too slow for a default
    run_cli("tasks.py", run, argv, __doc__, task="", tasks=tasks, ckpt="", script="",
            scripts=",".join(sample.SCRIPTS), seeds=3, seed=0, tokens=2_500_000, data="data",
            out="out/tasks", orders="random,confidence,entropy,margin", steps="0,4")

if __name__ == "__main__":
    main(sys.argv[1:])
