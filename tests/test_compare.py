"""records/compare.py on real runs of the training scripts, against plain NumPy."""
import math
import shutil

import compare
import numpy as np
import pytest
import runs

import gpt
import train_block
import train_mdlm


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Runs gpt_0..2, mdlm_0..2, which begin with the weights of those, and block_0..2."""
    folder = tmp_path_factory.mktemp("compare")
    data = folder / "data"
    data.mkdir()
    runs.make_data(data)
    runs.write_meta(data, [bytes([i]) * (i > 0) for i in range(256)], tokenizer="byte")
    for name, script in (("gpt", gpt), ("mdlm", train_mdlm), ("block", train_block)):
        for seed in range(3):
            start = [f"--init_from={folder}/gpt_{seed}/ckpt.pt"] * (name == "mdlm")
            runs.train_tiny(f"--data={data}", f"--out={folder}/{name}_{seed}", "--steps=2",
                            f"--seed={seed}", "--eval_every=0", *start, script=script)
    return folder

def nats(out, *names):
    """(runs, windows) nats per token."""
    return np.stack([np.load(out / name / "val_nats.npy") for name in names]) / runs.SEQ_LEN

def error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))

def table(*argv):
    """The cells of the table that is printed, row by row, the head among them; and the note."""
    done = runs.train(*argv, script=compare)
    lines = done.out.splitlines()
    assert done.err == "" and lines[1] == "|" + " --- |" * 9
    rows = [line[1:-1].split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]], lines[-1]

def test_single_runs(out):
    (head, a, b, c), note = table(
        out / "gpt_0", f"blocks={out}/block_0", shutil.copytree(out / "mdlm_0", out / "lr=1"))
    assert head[0] == "run" and head[-1] == "minus gpt_0"
    assert [row[:2] for row in (a, b, c)] == [
        ["gpt_0", "gpt"], ["blocks", "train_block"], ["lr=1", "train_mdlm"]]
    x, y, z = nats(out, "gpt_0", "block_0", "mdlm_0").reshape(3, -1, 2).mean(2)
    for row, name, pairs in ((a, "gpt_0", x), (b, "block_0", y), (c, "mdlm_0", z)):
        assert row[3] == "512" + f" after {out}/gpt_0/ckpt.pt" * (row is c) and row[5] == "1"
        assert row[6] == f"{'≤ ' * (row is not a)}{pairs.mean():.4f} ± {error(pairs):.4f}"
        difference = f"{(pairs - x).mean():+.4f} ± {error(pairs - x):.4f}"
        assert row[8] == ("" if row is a else difference)
        log = (out / name / "log.txt").read_text()
        assert f"{row[2]} parameters, {row[4]} MFLOP per token" in log
        assert f" bpb:{row[7]} " in log
    assert note.startswith("data, val: 512 tokens, 512 bytes, windows of 32. ± standard error")
    assert "8 pairs" in note and "over seeds" not in note

def test_seeds_are_paired_where_they_are_the_same(out):
    mdlm = f"mdlm={out}/mdlm_2,{out}/mdlm_0,{out}/mdlm_1"
    (head, a, b, c), note = table(f"gpt={out}/gpt_*", mdlm, f"{out}/mdlm_[01]")
    assert head[-1] == "minus gpt" and "/ over seeds" in note
    x = nats(out, "gpt_0", "gpt_1", "gpt_2")
    y = nats(out, "mdlm_0", "mdlm_1", "mdlm_2")
    by_seed = (y - x).mean(1)
    pairs = (y - x).mean(0).reshape(-1, 2).mean(1)
    assert a[5] == f"3, sd {x.mean(1).std(ddof=1):.4f}"
    assert b[8] == f"{by_seed.mean():+.4f} ± {error(pairs):.4f} / {error(by_seed):.4f}"
    apart = math.hypot(error(x.mean(1)), error(y[:2].mean(1)))
    pairs = (y[:2].mean(0) - x.mean(0)).reshape(-1, 2).mean(1)
    assert c[0] == "mdlm_[01]" and c[5].startswith("2, ")
    assert c[8] == f"{pairs.mean():+.4f} ± {error(pairs):.4f} / {apart:.4f}"

def test_figures_are_per_scored_token(out):
    """With half of each window given, by both sums: the log's and the table's."""
    runs.train_tiny(f"--data={out}/data", f"--out={out}/half", "--steps=2", "--prompt_len=16",
                    "--eval_every=0", script=gpt)
    (_, row), note = table(out / "half")
    assert f":{row[6].replace(' ± ', '+-')} bpb:{row[7]} " in (out / "half/log.txt").read_text()
    assert "256 tokens" in note and "8 pairs" in note

def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

def assert_refused(argv, *words):
    runs.assert_refused(runs.train(*argv, script=compare), *words)

@pytest.mark.parametrize(("name", "old", "new", "words"), [
    ("log.txt", " tokens:512 ", " tokens:480 ", "evaluated on tokens 480, "),
    ("log.txt", "step:2/2 val", "step:1/2 val", "ends at step"),
    ("log.txt", "step:2/2 ", "step:2/4 ", "ends at step 2 of 4"),
    ("log.txt", "parameters, ", "", "not the log"),
])
def test_what_does_not_compare_is_refused(out, tmp_path, name, old, new, words):
    other = shutil.copytree(out / "mdlm_0", tmp_path / "other")
    change(other / name, old, new)
    assert_refused([out / "gpt_0", other], words, str(other))

def test_rows_that_are_no_seeds_of_one_setting_are_refused(out, tmp_path):
    other = shutil.copytree(out / "gpt_1", tmp_path / "other")
    change(other / "log.txt", '"lr": 0.025', '"lr": 0.03')
    change(other / "log.txt", '"init_from": ""', '"init_from": "a"')
    for argv, words in (
            ([f"{out}/gpt_0,{out}/mdlm_1"], "another source"), ([out / "none"], "none"),
            ([f"{out}/gpt_0,{other}"], "another lr, init_from"), ([], "runs"), ([out], "log.txt")):
        assert_refused(argv, words)
