"""Records: the referee's figures and what it refuses; a leaderboard that follows from its logs."""
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import types

import check
import evaluate
import numpy as np
import pytest
import runs
import torch
import toys
from runs import ROOT

SCRIPTS = {name: evaluate.sample.load_script(ROOT / f"{name}.py")
           for name in evaluate.sample.SCRIPTS}
V, T, L = 11, 16, 4  # of the small networks
H100 = "NVIDIA H100 80GB HBM3"
# The texts made up here have other checksums.
TRACKS = {name: dataclasses.replace(track, val_sha256="") for name, track in check.TRACKS.items()}

def call(main, *args, **names):
    """A command line in this process -> Result(status, out, err)."""
    return runs.train(*args, script=types.SimpleNamespace(main=functools.partial(main, **names)))

def test_p_values_of_runs():
    for dof, p, t in ((1, 0.01, 31.821), (2, 0.01, 6.965), (3, 0.05, 2.353), (30, 0.01, 2.457)):
        assert check.t_below(-t, dof) == pytest.approx(p, rel=2e-3)  # of tables
        assert check.t_below(t, dof) == pytest.approx(1 - p, rel=1e-4)
    t = -0.008 / math.sqrt(7e-6 / 3)  # of the mean below 3.44; two degrees have a closed form
    closed = (1 + t / math.sqrt(2 + t * t)) / 2
    assert check.p_lower([3.43, 3.435, 3.431], [3.44]) == pytest.approx(closed, rel=1e-6)
    a, b = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]  # equal spread: the pooled test, 4 degrees
    assert check.p_lower(a, b) == pytest.approx(check.t_below(-3 / math.sqrt(2 / 3), 4), rel=1e-9)

def small_model(module, **names):
    flags = {"vocab_size": V, "seq_len": T, "n_head": 2, "n_embd": 16}
    flags |= {"block_len": L} if module.SCRIPT == "train_block" else {}
    return toys.small_model(module, **flags | names)

@torch.no_grad()
def test_both_figures_are_integrals_over_t():
    """Every set of masked tokens of a block once: the published weights must sum to the formula,
    whose integral over t is taken here on a fine grid, and the exact ones to the bound's."""
    script = SCRIPTS["train_block"]
    model, cfg = small_model(script, seq_len=L)
    sets = torch.tensor([s for s in itertools.product((0, 1), repeat=L) if any(s)])  # (15, L)
    k = sets.sum(1, keepdim=True).float()
    noise = script.Noise(k, L / k, torch.where(sets == 1, 0.0, L))
    x0 = torch.tensor([3, 0, 7, 7]).expand(len(sets), L)
    exact, published = evaluate.both_figures(script, model, x0, noise, cfg)
    ce = exact * k[:, 0] / L  # summed over the set
    t = torch.cat((torch.zeros(1), torch.logspace(-7, 0, 200_001))).double()
    sizes = sets.sum(1).tolist()
    density = [t**n * (1 - t) ** (L - n) for n in sizes]
    chance = torch.tensor([1 / (L * math.comb(L, n)) for n in sizes])  # of the exact draw
    for figure, grid, eps in ((published, t, 1e-3), (exact, t[1:], 0.0)):
        integral = sum(float(c * torch.trapezoid(d[-len(grid):] / (grid + eps), grid))
                       for c, d in zip(ce, density, strict=True))
        assert float((figure * chance).sum()) == pytest.approx(integral, rel=1e-5)

def fork(path, script, old, new):
    """Write a script with one text replaced -> its module."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new), encoding="utf-8")
    return evaluate.sample.load_script(path)

@torch.no_grad()
def check_leaks(script, name, **flags):
    model, cfg = small_model(script, **flags)
    x0 = torch.randint(V, (16, T), generator=torch.Generator().manual_seed(1))
    evaluate.check_leaks(SCRIPTS[name], name, model, x0, cfg, 3)

@pytest.mark.parametrize("name, flags", [
    *((name, {}) for name in SCRIPTS), ("train_mdlm", {"cond_dim": 8}),
    ("train_block", {"doc_mask": True, "bos_id": 3, "n_layer": 3, "unet": True})])
def test_honest_networks_pass(name, flags):
    check_leaks(SCRIPTS[name], name, **flags)

@pytest.mark.parametrize("name, old, new, flags", [
    # the clean copy of the block itself
    ("train_block", "(k_block < q_block) & (k >= T)", "(k_block <= q_block) & (k >= T)", {}),
    # the other noised blocks, whose open tokens lie ahead
    ("train_block", "(q_block == k_block) & same_half", "same_half", {}),
    # where in its block a document begins
    ("train_block", "before.repeat_interleave(cfg.block_len, 1), clean", "clean, clean",
     {"doc_mask": True, "bos_id": 3}),
    ("gpt", "norm(self.embed(tokens))", "norm(self.embed(tokens)).roll(-1, 1)", {}),
    # other rows
    ("train_mdlm", "norm(self.embed(tokens))", "norm(self.embed(tokens)).roll(1, 0)", {}),
])
def test_networks_that_see_too_much_are_refused(name, old, new, flags, tmp_path):
    script = fork(tmp_path / f"{name}.py", name, old, new)
    script.CPU_SHORT = 0  # the strips of short contexts leave out some of what a mask should hide
    with pytest.raises(ValueError, match="must not see"):
        check_leaks(script, name, **flags)

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data of the shakespeare track's size, in which runs are made."""
    folder = tmp_path_factory.mktemp("records")
    data, rng = folder / "data" / "shakespeare", np.random.default_rng(0)
    data.mkdir(parents=True)
    runs.write_shard(data / "train_000001.bin", rng.integers(97, 123, 1_003_856))
    runs.write_shard(data / "val_000000.bin", rng.integers(97, 123, 111_540))
    runs.write_meta(data, [bytes([i]) * (i > 0) for i in range(256)], tokenizer="byte")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evaluate, "TRACKS", TRACKS)
        yield folder

def train(module, out, *flags):
    given = ("--seq_len=128 --n_layer=1 --n_head=2 --n_embd=16 --device=cpu --dtype=fp32 "
             "--compile=0 --steps=3 --batch_tokens=8192 --micro_batch=64 --val_tokens=200000 "
             "--eval_every=0").split()
    done = call(module.main, "--data=shakespeare", f"--out={out}", *given, *flags)
    assert done.status == 0, done.err

@pytest.mark.parametrize("name", SCRIPTS)
def test_run_judge_enter(name, place, root):
    """From a finished run to the leaderboard."""
    train(SCRIPTS[name], f"out/{name}", f"--val_draws={1 if name == 'gpt' else 2}")
    log = place / "out" / name / "log.txt"
    before = log.read_text()
    quick = call(evaluate.main, f"--ckpt=out/{name}", "--tokens=2048")
    assert quick.status == 0 and "tokens:2048" in quick.out and log.read_text() == before
    said = call(evaluate.main, f"--ckpt=out/{name}/ckpt.pt")
    assert said.status == 0, said.err
    verdict = check.read_log(log).referee
    assert verdict["objective"] == name and verdict["tokens"] == "111360"
    assert verdict["draws"] == ("1" if name == "gpt" else "2")
    assert verdict["bound"] == re.findall(r"val_n\w+:(\S+) bpb", before)[-1]  # and its error
    assert ("published" in verdict) == (name == "train_block")

    assert enter(root, "shakespeare", "2026-01-31_First", {"0.txt": log.read_text()}).status == 0
    assert run_check(root, "--write").status == 0 == run_check(root).status
    (row,) = table(root, "shakespeare")
    assert row[3:5] == [verdict["bound"].split("+-")[0], "1, unverified"] and "First" in row[-1]

def test_forks_are_judged_by_the_repository(place):
    """A fork's network counts, its bound does not; a network that leaks is refused."""
    text = "return losses.new_zeros(B).index_add(0, rows // x0.size(1), losses)"
    kind = fork(place / "kind.py", "train_block", text, text.replace("return", "return 0.5 *"))
    leaky = fork(place / "leaky.py", "train_block", "(k_block < q_block) &",
                 "(k_block <= q_block) &")
    for module in (kind, leaky):
        train(module, f"out/{module.SCRIPT}", "--val_tokens=2048", "--lr=0.1")
    said = call(evaluate.main, "--ckpt=out/kind", "--tokens=4096", "--script=kind.py")
    bound = float(re.search(r" bound:(\S+)\+-", said.out)[1])
    own = (place / "out" / "kind" / "log.txt").read_text()
    assert float(re.findall(r"val_nelbo:(\S+)\+-", own)[-1]) == pytest.approx(bound / 2, rel=0.05)
    for flags, words in ((["--ckpt=out/kind"], "--script=FILE"),
                         (["--ckpt=out/kind", "--script=leaky.py"], "another script"),
                         (["--ckpt=out/leaky", "--script=leaky.py"], "must not see")):
        runs.assert_refused(call(evaluate.main, *flags), words)

def test_the_referee_scores_what_a_run_took_as_given(place):
    """26 letters at random cost log 26; nothing of a window is free."""
    train(SCRIPTS["gpt"], "out/given", "--prompt_len=120")
    said = call(evaluate.main, "--ckpt=out/given", "--tokens=2048")
    assert float(re.search(r" bound:(\S+)\+-", said.out)[1]) > math.log(26) - 0.01

def test_mistakes_at_the_referee(place):
    train(SCRIPTS["gpt"], "out/long", "--seq_len=256", "--val_tokens=2048")
    train(SCRIPTS["gpt"], "out/short", "--val_tokens=2048")
    for flags, words in (("--ckpt=out/short --token=4096", "--token"), ("", "--ckpt"),
                         ("--ckpt=out/none", "No such"), ("--ckpt=out/long", "seq_len is 256"),
                         ("--ckpt=out/short --tokens=128", "128 tokens"),
                         ("--ckpt=out/short --device=gpu", "--device=gpu")):
        runs.assert_refused(call(evaluate.main, *flags.split()), words)
    runs.write_meta(place / "data" / "shakespeare", [b"", *[b"x"] * 255])
    runs.assert_refused(call(evaluate.main, "--ckpt=out/short"), "another vocabulary")

def shakespeare_log(seed, bound):
    """A real log, altered."""
    path = ROOT / "records" / "shakespeare" / "2026-11-20_MaskedDiffusion" / "0.txt"
    text = path.read_text(encoding="utf-8").replace('"seed": 0', f'"seed": {seed}')
    return re.sub(r" bound:\S+", f" bound:{bound}+-0.0030", text)

def speedrun_log(seed, bound, *, seconds=600, ranks=8, **settings):
    """log.txt of a run that might have been, with its verdict."""
    config = dict(
        data="data/finewebedu10B", preset="", seed=seed, shuffle=False, seq_len=1024, lr=0.025,
        init_from="", steps=10_000, batch_tokens=131_072, block_len=16) | settings
    return "".join([
        "print()\n", check.SEPARATOR, "muon\n", check.SEPARATOR,
        f"python 3.11.7 torch 2.13.0 numpy 2.4.6 {H100} ranks {ranks}\n{json.dumps(config)}\n",
        f"162.14M parameters, 738.8 MFLOP per token, {ranks} x {H100} in bfloat16, "
        "finewebedu10B: 1,400,000,000 tokens\n",
        "step:10000/10000 loss:3.5000 lr:2.50e-02 tok/s:1 mfu:0.410 eta:0:01:00\n",
        "step:10000/10000 val_nelbo:3.4000+-0.0030 bpb:1.0000 ppl:30.00 "
        f"train_time:{1000 * seconds}ms step_avg:1.00ms\n",
        f"referee bound:{bound:.4f}+-0.0030 published:{bound - 0.02:.4f}+-0.0030 tokens:10485760 "
        "objective:train_block parameters:162137100 step:10000 leak:none shard_sha256:cd\n"])

def enter(root, track, slug, logs):
    """Make a record's folder of {file name: text} -> what --new says of it."""
    folder = root / track / slug
    folder.mkdir(parents=True)
    for name, text in {"README.md": f"# {slug[11:]}\n\nText.\n", **logs}.items():
        (folder / name).write_text(text)
    return run_check(root, f"--new={folder}", "--by=A. Nonymous")

def speedrun(root, slug, bounds, baseline=None, **names):
    """Enter a record of the speedrun -> its folder."""
    logs = {f"{i}.txt": speedrun_log(i, bound, **names) for i, bound in enumerate(bounds)}
    baseline = names | {"preset": "nano_block", "seconds": 900} | (baseline or {})
    logs["baseline.txt"] = speedrun_log(0, 3.5, **baseline)
    assert enter(root, "speedrun", slug, logs).status == 0
    return root / "speedrun" / slug

@pytest.fixture
def root(tmp_path):
    shutil.copy(ROOT / "records" / "README.md", tmp_path)
    return tmp_path

def run_check(root, *flags):
    return call(check.main, *flags, root=root, tracks=TRACKS)

def table(root, track):
    lines = (root / "README.md").read_text().partition(f"table of {track},")[2].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[3:lines.index("<!-- end of table -->")]]

def test_speedrun_table(root):
    """Ranked by time, and only where runs, certainty and machine allow it."""
    bounds = (3.4500, 3.4510, 3.4490)
    speedrun(root, "2026-01-01_First", bounds)
    speedrun(root, "2026-02-01_Second", bounds, dict(seconds=600, lr=0.025), seconds=540, lr=0.02)
    behind = dict(baseline=dict(seconds=540, lr=0.02), seconds=500, lr=0.01)
    speedrun(root, "2026-03-01_Once", bounds[:1], **behind)
    speedrun(root, "2026-03-02_Elsewhere", bounds, ranks=1, **behind)
    speedrun(root, "2026-03-03_Uncertain", (3.42, 3.47, 3.43), **behind)
    assert run_check(root).status == 1  # the table does not have them yet
    assert run_check(root, "--write").status == 0 == run_check(root).status
    rows = table(root, "speedrun")
    assert [row[0] for row in rows] == ["1", "2", "-", "-", "-"]
    assert rows[0][2:7] == ["9.00", "3.4500 (0.0010)", "3.4300 (0.0010)", "0.900", "3, p = 0.002"]
    assert "Second" in rows[0][-1] and "A. Nonymous, 2026-02-01" in rows[0][-1]
    assert rows[1][5] == "0.667" and "unverified" in rows[2][6] and "p = 0.2" in rows[4][6]
    assert rows[3][9] == f"1 x {H100}"

def test_shakespeare_table(root):
    for slug, bounds in (("2026-01-01_First", (2.015, 2.01, 2.024)),
                         ("2026-01-02_Pair", (1.9, 1.91)),
                         ("2026-01-03_Luck", (2.0, 2.015, 2.02)),
                         ("2026-01-04_Better", (1.95, 1.951, 1.952))):
        logs = {f"{i}.txt": shakespeare_log(i, bound) for i, bound in enumerate(bounds)}
        assert enter(root, "shakespeare", slug, logs).status == 0
    assert run_check(root, "--write").status == 0
    rows = table(root, "shakespeare")
    assert [(row[0], re.search(r"\[(\w+)\]", row[-1])[1]) for row in rows] == [
        ("1", "Better"), ("2", "First"), ("-", "Pair"), ("-", "Luck")]
    assert rows[1][3] == "2.0163 (0.0071)" and rows[1][4] == "3"

@pytest.mark.parametrize("name, old, new, words", [
    ("0.txt", '"seed": 0', '"seed": 1', "0.txt: a run of another seed"),
    ("0.txt", '"shuffle": false', '"shuffle": true', "shuffle is True"),
    ("0.txt", "1,400,000,000 tokens", "1,000,000,000 tokens", "at most 1,000,000,000"),
    ("0.txt", "parameters:162137100", "parameters:163137100", "at most 162,500,000"),
    ("0.txt", " tokens:10485760", " tokens:1048576", "tokens is 1048576"),
    ("1.txt", "torch 2.13.0", "torch 2.14.0", "other versions"),
    ("1.txt", r"referee .*\n", "", "no verdict"),
    ("1.txt", "leak:none", "leak:some", "leak is some"),
    ("1.txt", r"published:3.43", "published:3.49", "misses"),
    ("baseline.txt", '"nano_block"', '"tiny"', "baseline.txt: preset"),
])
def test_the_rules(name, old, new, words, root):
    folder = speedrun(root, "2026-01-01_First", (3.45, 3.45))
    text, count = re.subn(old, new, (folder / name).read_text())
    assert count
    (folder / name).write_text(text)
    found = run_check(root, f"--new={folder}", "--by=A")
    assert found.status == 1 and words in found.out and found.out.count("\n") == 1, found.out

def test_what_was_entered_stays(root):
    """Logs as they were, none left out; digits of the table; the script that a baseline runs."""
    folder = speedrun(root, "2026-01-01_First", (3.45, 3.451, 3.452))
    assert run_check(root, "--write").status == 0 == run_check(root).status
    for path in (folder / "1.txt", root / "README.md"):
        text = path.read_text()
        path.write_text(text.replace("3.4510", "3.4501"))
        assert path.name in run_check(root).out
        path.write_text(text)
    other = {"0.txt": speedrun_log(0, 3.44), "baseline.txt": speedrun_log(0, 3.5, lr=0.03)}
    assert "another lr than" in enter(root, "speedrun", "2026-01-02_Other", other).out
    (folder / "2.txt").unlink()
    assert "First: 2.txt: not as" in run_check(root).out
    (folder / "0.txt").unlink()
    assert "First: seeds 1" in run_check(root).out

def test_the_records_of_this_repository():
    assert call(check.main).status == 0
