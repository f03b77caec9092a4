"""records/compare.py on real runs of the training scripts, against plain NumPy."""
import contextlib
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt
import train_block
import train_mdlm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))

import compare  # noqa: E402

TEXT = "def name(self):\n    return self.names[0]  # text\n\n" * 200
TINY = dict(
    seq_len=32, n_layer=1, n_head=2, n_embd=32, steps=2, batch_tokens=128, micro_batch=4,
    val_tokens=512, eval_every=0, compile=0, device="cpu", dtype="fp32",
)


def train(root, name, script, **flags):
    """A run folder root/out/name, written by a training script's own main."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    flags = {**TINY, "data": root / "data", "out": root / "out" / name, **flags}
    with contextlib.redirect_stdout(io.StringIO()):
        script.main([f"--{key}={value}" for key, value in flags.items()])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return root / "out" / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs gpt_0..2, mdlm_0..2 and block_3."""
    root = tmp_path_factory.mktemp("compare")
    tokens = np.frombuffer(("\0" + TEXT).encode(), np.uint8)
    header = np.zeros(256, "<i4")
    header[:5] = 20240520, 1, len(tokens), 1, 256
    (root / "data").mkdir()
    for shard in ("train_000001.bin", "val_000000.bin"):
        (root / "data" / shard).write_bytes(header.tobytes() + tokens.tobytes())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in range(3):
        train(root, f"gpt_{seed}", gpt, seed=seed)
        train(root, f"mdlm_{seed}", train_mdlm, seed=seed, log_every=seed + 1)
    train(root, "block_3", train_block, seed=3, block_len=8)
    torch.set_num_threads(threads)
    return root


def nats(root, *names):
    """(runs, windows) nats per token."""
    return np.stack([np.load(root / "out" / name / "val_nats.npy") for name in names]) / 32


def error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))


def rows(capsys, *argv):
    """The cells of the table that is printed, row by row, the head among them."""
    compare.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[1] == "|" + " --- |" * 9
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[:1] + table[2:]], lines[-1]


def change_last(folder, **values):
    """Rewrite the last evaluation in log.jsonl."""
    *before, last = (folder / "log.jsonl").read_text().splitlines()
    last = json.dumps({**json.loads(last), **values})
    (folder / "log.jsonl").write_text("\n".join([*before, last, ""]))


def test_single_runs(root, capsys):
    (head, a, b, c), note = rows(
        capsys, root / "out/gpt_0", f"blocks={root}/out/block_3", f"{root}/out/mdlm_0/")
    assert head[0] == "run" and head[-1] == "minus gpt_0"
    assert [row[:2] for row in (a, b, c)] == [
        ["gpt_0", "gpt"], ["blocks", "train_block"], ["mdlm_0", "train_mdlm"]]
    x, y, z = nats(root, "gpt_0", "block_3", "mdlm_0").reshape(3, -1, 2).mean(2)
    for row, pairs, bound in ((a, x, ""), (b, y, "≤ "), (c, z, "≤ ")):
        assert row[3] == "256" and row[5] == "1"
        assert row[6] == f"{bound}{pairs.mean():.4f} ± {error(pairs):.4f}"
        if row is not a:
            assert row[8] == f"{(pairs - x).mean():+.4f} ± {error(pairs - x):.4f}"
    assert a[8] == ""
    for row, name in ((a, "gpt_0"), (b, "block_3"), (c, "mdlm_0")):
        log = (root / "out" / name / "log.txt").read_text()
        assert f"{row[2]} parameters, {row[4]} MFLOP per token" in log
        assert f" bpb:{row[7]} " in log
    assert note.startswith("data, val: 512 tokens, 511 bytes, windows of 32, noise of seed 2024")
    assert "8 pairs" in note and "over seeds" not in note


def test_seeds_are_paired_where_they_are_the_same(root, capsys):
    out = root / "out"
    mdlm = f"mdlm={out}/mdlm_2,{out}/mdlm_0,{out}/mdlm_1"
    (head, a, b, c), note = rows(capsys, f"gpt={out}/gpt_*", mdlm, f"{out}/mdlm_[01]")
    assert head[-1] == "minus gpt" and "/ over seeds" in note
    x = nats(root, "gpt_0", "gpt_1", "gpt_2")
    y = nats(root, "mdlm_0", "mdlm_1", "mdlm_2")
    by_seed = (y - x).mean(1)
    pairs = (y - x).mean(0).reshape(-1, 2).mean(1)
    assert a[5] == f"3, sd {x.mean(1).std(ddof=1):.4f}"
    assert b[8] == f"{by_seed.mean():+.4f} ± {error(pairs):.4f} / {error(by_seed):.4f}"
    apart = math.hypot(error(x.mean(1)), error(y[:2].mean(1)))
    pairs = (y[:2].mean(0) - x.mean(0)).reshape(-1, 2).mean(1)
    assert c[0] == "mdlm_[01]" and c[5].startswith("2, ")
    assert c[8] == f"{pairs.mean():+.4f} ± {error(pairs):.4f} / {apart:.4f}"


def test_what_windows_have_in_common_leaves_the_difference(root, tmp_path, capsys):
    """Windows far apart, and pairs whose noise cancels: the difference is known exactly."""
    shift = np.tile([0.3, -0.1], 8) * 32
    for name, values in (("a", np.arange(16.0) ** 2), ("b", np.arange(16.0) ** 2 + shift)):
        shutil.copytree(root / "out/mdlm_0", tmp_path / name)
        np.save(tmp_path / name / "val_nats.npy", values)
        change_last(tmp_path / name, val_nelbo=values.mean() / 32)
    (_, a, b), _ = rows(capsys, tmp_path / "a", tmp_path / "b")
    assert b[8] == "+0.1000 ± 0.0000" and float(a[6].split()[-1]) > 0.5


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        compare.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("compare.py: "), err
    return err


@pytest.mark.parametrize(("key", "value", "shown"), [
    ("tokens", 480, "tokens 480"), ("seed", 1, "seed 1"), ("bytes", 500, "bytes 500")])
def test_other_evaluations_are_refused(root, tmp_path, capsys, key, value, shown):
    other = shutil.copytree(root / "out/mdlm_0", tmp_path / "other")
    values = np.load(other / "val_nats.npy")[: (value if key == "tokens" else 512) // 32]
    np.save(other / "val_nats.npy", values)
    change_last(other, **{key: value, "val_nelbo": values.mean() / 32})
    message = refused(capsys, root / "out/gpt_0", other)
    assert f"{other}: evaluated on {shown}, " in message


def test_other_data_are_refused(root, tmp_path, capsys):
    other = shutil.copytree(root / "out/mdlm_0", tmp_path / "other")
    log = (other / "log.txt").read_text()
    (other / "log.txt").write_text(log.replace(f"{root}/data: ", "/elsewhere/news: "))
    assert "data news" in refused(capsys, root / "out/gpt_0", other)
    (other / "log.txt").write_text(log.replace(f"{root}/data: ", "/elsewhere/data: "))
    assert len(rows(capsys, root / "out/gpt_0", other)[0]) == 3  # the same in another place


def test_unfinished_and_damaged_runs_are_refused(root, tmp_path, capsys):
    whole = root / "out/mdlm_0"
    log = (whole / "log.txt").read_text()
    steps = [m.start() for m in re.finditer(r"^step:", log, re.M)]
    for i, (name, text, message) in enumerate((
        ("log.txt", log[: steps[1]], "step 1 of 2"),
        ("log.txt", log[: steps[0]], "step 0 of 2"),
        ("log.txt", log + "step:2/4 loss:3.0 lr:1 tok/s:1 mfu:n/a eta:0:00:00\n", "step 2 of 4"),
        ("log.txt", log[:-200][:2000], "not the logs"),
        ("log.txt", "", "not the logs"),
        ("log.jsonl", "", "not finished"),
        ("log.jsonl", '{"step": 2, "val', "not the logs"),
        ("val_nats.npy", "text", "not the logs"),
    )):
        folder = shutil.copytree(whole, tmp_path / str(i))
        (folder / name).write_text(text)
        line = refused(capsys, root / "out/gpt_0", folder)
        assert str(folder) in line and message in line
    folder = shutil.copytree(whole, tmp_path / "stale")
    shutil.copy(root / "out/mdlm_1/val_nats.npy", folder)
    assert "val_nats.npy: not what log.jsonl says" in refused(capsys, folder)
    (folder / "val_nats.npy").unlink()
    assert "not finished" in refused(capsys, folder)
    change_last(folder, val_nelbo=None)  # a figure that is no number
    shutil.copy(whole / "val_nats.npy", folder)
    assert "not what log.jsonl says" in refused(capsys, folder)
    shutil.copytree(whole, tmp_path / "half").joinpath("log.jsonl").unlink()
    assert "log.jsonl" in refused(capsys, tmp_path / "half")


def test_rows_that_are_no_seeds_of_one_setting_are_refused(root, tmp_path, capsys):
    out = root / "out"
    assert "another script" in refused(capsys, f"{out}/gpt_0,{out}/mdlm_1")
    assert "same seed twice" in refused(capsys, f"x={out}/gpt_0,{out}/gpt_0")
    other = shutil.copytree(out / "gpt_1", tmp_path / "other")
    log = (other / "log.txt").read_text()
    (other / "log.txt").write_text(log.replace('"lr": 0.025', '"lr": 0.03'))
    assert "another lr" in refused(capsys, f"{out}/gpt_0,{other}")
    (other / "log.txt").write_text(log.replace("import math", "import  math"))
    assert "another source" in refused(capsys, f"{out}/gpt_0,{other}")
    for argv, message in (([out / "none"], "none"), ([f"a={out}/none_*"], "none_*"),
                          ([out], "log.txt"), (["--last", out], "--last"),
                          ([f"{out}/gpt_0,"], "gpt_0,: no"), ([], "give run folders")):
        assert message in refused(capsys, *argv)


def test_the_command(root):
    """From any folder, names with = in the path, and without PyTorch."""
    shutil.copytree(root / "out/gpt_0", root / "out/lr=1")
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'records')!r}); import compare;"
            "compare.main(['out/lr=1', 'x=out/mdlm_0']); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "False"
    assert "| lr=1 |" in done.stdout and "minus lr=1" in done.stdout
    script = [sys.executable, str(ROOT / "records" / "compare.py"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0 and "compare.py out/gpt" in done.stdout
