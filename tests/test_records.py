"""Records: the referee's figures and what it refuses; a leaderboard that follows from its logs.

Folders of records are made up here, with the referee's lines in them; one run of each objective is
trained, judged and entered for real. Nothing is read but the repository's own records/.
"""
import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpt
import train_block
import train_mdlm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))

import check  # noqa: E402
import evaluate  # noqa: E402

SCRIPTS = {"gpt": gpt, "train_block": train_block, "train_mdlm": train_mdlm}
V, T, L = 11, 16, 4  # of the small networks
Z_LIMIT = 5.0


class Result(NamedTuple):
    status: int
    out: str
    err: str


def call(main, *args, **names):
    """A command line in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(map(str, args)), **names)
        except SystemExit as e:
            status = e.code
    return Result(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dof, p, t", [
    (1, 0.01, 31.821), (2, 0.01, 6.965), (3, 0.05, 2.353), (4, 0.001, 7.173), (10, 0.05, 1.812),
    (30, 0.01, 2.457)])
def test_student_against_tables(dof, p, t):
    assert check.t_below(-t, dof) == pytest.approx(p, rel=2e-3)
    assert check.t_below(t, dof) == pytest.approx(1 - p, rel=1e-4)
    assert check.t_below(0, dof + 0.5) == pytest.approx(0.5, abs=1e-6)


def test_student_against_closed_forms():
    for t in (-40.0, -1.3, 0.7):
        assert check.t_below(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, rel=1e-8)
        assert check.t_below(t, 2) == pytest.approx((1 + t / math.sqrt(2 + t * t)) / 2, rel=1e-8)


def test_p_values_of_runs():
    runs = [3.43, 3.435, 3.431]  # mean 3.432, std .002646, t = -.008 / (.002646 / sqrt 3)
    t = -0.008 / (math.sqrt(7e-6) / math.sqrt(3))
    assert check.p_below(runs, 3.44) == pytest.approx((1 + t / math.sqrt(2 + t * t)) / 2, rel=1e-6)
    a, b = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]  # alike in spread: the pooled test, 4 degrees
    assert check.p_lower(a, b) == pytest.approx(check.t_below(-3 / math.sqrt(2 / 3), 4), rel=1e-9)
    assert check.p_lower(b, a) == pytest.approx(1 - check.p_lower(a, b))


# ----------------------------------------------------------------------------- figures


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(module, seed=0, **names):
    """A network that uses every parameter: its zero-initialised matrices are moved."""
    cfg = module.Config(**{"vocab_size": V, "seq_len": T, "n_layer": 2, "n_head": 2, "n_embd": 16,
                           **({"block_len": L} if hasattr(module, "sees") else {}), **names})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = module.Model(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model.eval(), cfg


def tokens(n_rows, seq_len=T, seed=1):
    return torch.randint(V, (n_rows, seq_len), generator=seeded(seed))


@torch.no_grad()
def test_published_column_is_the_integral_over_t():
    """Every set of masked tokens of a block once: the published weights must sum to the formula,
    whose integral over t is taken here on a fine grid, and the exact ones to the bound's."""
    model, cfg = small_model(train_block, seq_len=L)
    sets = torch.tensor([s for s in itertools.product((0, 1), repeat=L) if any(s)])  # (15, L)
    k = sets.sum(1, keepdim=True).float()
    score = torch.where(sets == 1, 0.0, L)
    noise = train_block.Noise(k, L / k, score)
    x0, passes = tokens(1, L).expand(len(sets), L), []

    def counted(*inputs):
        passes.append(1)
        return model(*inputs)

    exact, published = evaluate.both_figures(train_block, counted, x0, noise, cfg)
    assert len(passes) == 1
    ce = exact * k[:, 0] / L  # summed over the set
    t = torch.cat((torch.zeros(1), torch.logspace(-7, 0, 200_001))).double()
    size = sets.sum(1)
    density = [t**n * (1 - t) ** (L - n) for n in size.tolist()]
    formula = sum(c * torch.trapezoid(d / (t + 1e-3), t) for c, d in zip(ce, density, strict=True))
    chance = torch.tensor([1 / (L * math.comb(L, n)) for n in size.tolist()])  # of the exact draw
    assert float((published * chance).sum()) == pytest.approx(float(formula), rel=1e-5)
    bound = sum(c * torch.trapezoid(d[1:] / t[1:], t[1:]) for c, d in zip(ce, density, strict=True))
    assert float((exact * chance).sum()) == pytest.approx(float(bound), rel=1e-5)
    assert formula < bound


def test_published_weights_sum_as_the_maths_says():
    """sum_k k w_k = L int t / (t + eps) dt, and w_k -> 1 / k from below."""
    for size in (1, 4, 16):
        w, k = evaluate.published_weights(size), torch.arange(size + 1)
        expected = size * (1 - 1e-3 * math.log(1001))
        assert float((k * w).sum()) == pytest.approx(expected, rel=1e-9)
        assert (k * w < 1).all() and w[0] == 0


def test_published_column_against_the_formula_itself():
    """Monte Carlo of t ~ U(0,1) per block, Bernoulli masks, 1 / (t + 1e-3), for a denoiser that
    does better the more it sees."""
    size, n = 16, 6000
    cfg = train_block.Config(vocab_size=V, seq_len=size, block_len=size)

    def toy(xt, x0, rows=None):
        seen = (xt != V).sum(1, keepdim=True)  # the truth gains logit with every token seen
        logits = F.one_hot(x0, V) * (1 + 0.3 * seen[..., None])
        return logits.reshape(-1, V)[rows] if rows is not None else logits

    x0 = tokens(n, size)
    noise = train_block.draw_noise(cfg, n, seeded(2), bound=True)
    exact, published = evaluate.both_figures(train_block, toy, x0, noise, cfg)
    gen = seeded(3)
    t = torch.rand(4 * n, 1, generator=gen)
    xt = torch.where(torch.rand(4 * n, size, generator=gen) < t, V, x0.repeat(4, 1))
    logits = toy(xt, x0.repeat(4, 1)).float()
    ce = F.cross_entropy(logits.flatten(0, 1), x0.repeat(4, 1).flatten(), reduction="none")
    direct = (ce.view(xt.shape) * (xt == V)).sum(1) / (t[:, 0] + 1e-3)
    error = math.hypot(published.std() / n**0.5, direct.std() / (4 * n) ** 0.5)
    assert abs(published.mean() - direct.mean()) < Z_LIMIT * error
    gap = (exact - published) / exact
    assert 0 < gap.mean() < 0.06


# ----------------------------------------------------------------------------- leaks


def mutant(module, old, new):
    """The module with one text replaced."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    changed = types.ModuleType(module.__name__)
    changed.__dict__["__file__"] = module.__file__
    sys.modules[changed.__name__ + "_mutant"] = changed
    exec(compile(source.replace(old, new), module.__file__, "exec"), changed.__dict__)
    return changed


def leak(name, model, cfg, seed=4, bos_id=3):
    with torch.no_grad():
        return evaluate.find_leak(SCRIPTS[name], name, model, tokens(16, seed=seed), cfg, bos_id)


@pytest.mark.parametrize("name, flags", [
    ("gpt", {}), ("train_mdlm", {}), ("train_mdlm", {"cond_dim": 8}), ("train_block", {}),
    ("train_block", {"doc_mask": True, "bos_id": 3, "n_layer": 3, "unet": True})])
def test_honest_networks_pass(name, flags):
    assert leak(name, *small_model(SCRIPTS[name], **flags)) == ""


@pytest.mark.parametrize("name, old, new, flags", [
    # the clean copy of the block itself
    ("train_block", "(k_block < q_block) & (k >= T)", "(k_block <= q_block) & (k >= T)", {}),
    # the other noised blocks, whose open tokens lie ahead
    ("train_block", "(q_block == k_block) & same_half", "same_half", {}),
    # where in its block a document begins
    ("train_block", "before.repeat_interleave(cfg.block_len, 1), clean", "clean, clean",
     {"doc_mask": True, "bos_id": 3}),
    ("train_block", "self.embed_tokens(x)", "self.embed_tokens(x).roll(1, 0)", {}),
    ("gpt", "self.embed_tokens(x[:, done:])", "self.embed_tokens(x[:, done:].roll(-1, 1))", {}),
    ("train_mdlm", "self.embed_tokens(xt)",
     "self.embed_tokens(xt) + self.embed_tokens(xt).mean(0)", {}),
])
def test_networks_that_see_too_much_are_found(name, old, new, flags):
    module = mutant(SCRIPTS[name], old, new)
    found = leak(name, *small_model(module, **flags))
    assert "must not see" in found


# ----------------------------------------------------------------------------- runs for real

NETWORK = ("--seq_len=128", "--n_layer=1", "--n_head=2", "--n_embd=16", "--device=cpu",
           "--dtype=fp32", "--compile=0")
RUN = (*NETWORK, "--steps=5", "--batch_tokens=8192", "--micro_batch=64", "--val_tokens=200000",
       "--eval_every=0", "--log_every=2")
# The made-up text has another checksum.
TRACKS = {name: dataclasses.replace(track, val_sha256="") for name, track in check.TRACKS.items()}


def write_shard(path, values):
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, len(values), 1
    path.write_bytes(header.tobytes() + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data of the shakespeare track's size, in which runs are made."""
    folder = tmp_path_factory.mktemp("records")
    data, rng = folder / "data" / "shakespeare", np.random.default_rng(0)
    data.mkdir(parents=True)
    write_shard(data / "train_000001.bin", rng.integers(97, 123, 1_003_856))
    write_shard(data / "val_000000.bin", rng.integers(97, 123, 111_540))
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evaluate, "TRACKS", TRACKS)
        yield folder
    assert Path.cwd() == before


def train(module, out, *flags):
    given = {flag.partition("=")[0]: flag for flag in (*RUN, *flags)}
    done = call(module.main, "--data=shakespeare", f"--out={out}", *given.values())
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def judged(place):
    """A run of each objective with its verdict: {script: (folder, what the referee said)}."""
    runs = {}
    for name, module in SCRIPTS.items():
        train(module, f"out/{name}", f"--val_draws={1 if name == 'gpt' else 2}")
        runs[name] = place / "out" / name, call(evaluate.main, f"--ckpt=out/{name}")
    return runs


@pytest.mark.parametrize("name", SCRIPTS)
def test_run_judge_enter(name, judged, tmp_path):
    """From a finished run to the leaderboard."""
    out, said = judged[name]
    assert said.status == 0, said.err
    log = check.read_log(out / "log.txt")
    assert log.source == Path(SCRIPTS[name].__file__).read_text(encoding="utf-8")
    verdict = log.referee
    assert verdict["objective"] == name and verdict["tokens"] == "111360"
    last = re.findall(r"val_n\w+:(\S+) bpb:(\S+)", (out / "log.txt").read_text())[-1]
    assert (verdict["bound"], verdict["bpb"]) == last  # error and all
    assert ("published" in verdict) == (name == "train_block")
    if name == "train_block":
        bound, published = (float(verdict[x].split("+-")[0]) for x in ("bound", "published"))
        assert 0.94 * bound < published < bound

    root = tmp_path / "records"
    folder = root / "shakespeare" / "2026-01-31_First"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "records" / "README.md", root)
    shutil.copy(out / "log.txt", folder / "0.txt")
    (folder / "README.md").write_text("# Five steps\n")
    new = call(check.main, f"--new={folder}", "--by=A. Nonymous", root=root, tracks=TRACKS)
    assert new.status == 0, new.out + new.err
    assert call(check.main, "--write", root=root, tracks=TRACKS).status == 0
    done = call(check.main, root=root, tracks=TRACKS)
    assert done.status == 0 and "1, unverified" in done.out and "Five steps" in done.out
    assert f"{float(verdict['bound'].split('+-')[0]):.4f}" in (root / "README.md").read_text()


def test_the_log_takes_one_verdict_on_all_tokens(judged):
    before = (judged["gpt"][0] / "log.txt").read_bytes()
    again = call(evaluate.main, "--ckpt=out/gpt")
    assert again.status == 2 and "judged before" in again.err
    quick = call(evaluate.main, "--ckpt=out/gpt", "--tokens=2048")
    assert quick.status == 0 and "no verdict" in quick.out and "tokens:2048" in quick.out
    assert call(evaluate.main, "--ckpt=out/gpt/ckpt.pt", "--tokens=2048", "--append=0").status == 0
    assert (judged["gpt"][0] / "log.txt").read_bytes() == before


def fork(place, name, old, new):
    """A copy of train_block.py with one text replaced, trained."""
    source = (ROOT / "train_block.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    path = place / f"{name}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    module = evaluate.sample.load_script(path)
    train(module, f"out/{name}", "--steps=3", "--val_tokens=2048", "--lr=0.1")
    return path


def test_forks_are_judged_by_the_repository(place, judged):
    """A fork with a network and a bound of its own: the network counts, its bound does not."""
    path = fork(place, "kind", "return losses.new_zeros(B).index_add(0, rows // T, losses)",
                "return 0.5 * losses.new_zeros(B).index_add(0, rows // T, losses)")
    flags = ("--ckpt=out/kind", "--tokens=4096")
    nameless = call(evaluate.main, *flags)
    assert nameless.status == 2 and "--script" in nameless.err
    unsure = call(evaluate.main, *flags, f"--script={path}")
    assert unsure.status == 2 and "--objective" in unsure.err
    said = call(evaluate.main, *flags, f"--script={path}", "--objective=train_block")
    assert said.status == 0, said.err
    bound = float(re.search(r" bound:(\S+)\+-", said.out)[1])
    own = (place / "out" / "kind" / "log.txt").read_text()
    assert float(re.findall(r"val_nelbo:(\S+)\+-", own)[-1]) == pytest.approx(bound / 2, rel=0.05)


@pytest.mark.parametrize("name, old, new, words", [
    ("leaky", "(k_block < q_block) & (k >= T)", "(k_block <= q_block) & (k >= T)", "must not see"),
    # changes while it is evaluated, as one would that learns from what it scores
    ("learner", "        h = self.run_layers(ctx, n_query)  # (B, n_query, D)\n",
     "        h = self.run_layers(ctx, n_query)\n"
     "        self.looks = getattr(self, 'looks', 0) + 1\n"
     "        h = h.roll(self.looks // 66, -1)\n", "evaluated again"),
])
def test_forks_that_cheat_are_refused(name, old, new, words, place):
    path = fork(place, name, old, new)
    said = call(evaluate.main, f"--ckpt=out/{name}", f"--script={path}", "--tokens=32768",
                "--objective=train_block")
    assert said.status == 2 and words in said.err and "referee" not in said.out
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("flags, words", [
    (("--ckpt=out/gpt", "--token=4096"), "--tokens"), (("--tokens=4096",), "--ckpt=PATH"),
    (("--ckpt=out/gpt", "--tokens=many"), "number"), (("--ckpt=out/none",), "no such checkpoint"),
    (("--ckpt=out/gpt", "--data=elsewhere"), "--data=elsewhere"),
    (("--ckpt=out/gpt", "--tokens=128"), "--tokens=128"),
    (("--ckpt=out/gpt", "--objective=train_sedan"), "--objective=train_sedan"),
    (("--ckpt=out/gpt", "--objective=train_block"), "was written by gpt.py: drop"),
    (("--ckpt=out/gpt", f"--script={ROOT / 'train_block.py'}"), "was written by gpt.py"),
])
def test_mistakes_at_the_referee(flags, words, judged):
    said = call(evaluate.main, *flags)
    assert said.status == 2 and words in said.err
    assert len(said.err.splitlines()) == 1


def test_runs_outside_the_rules_are_refused(place, judged):
    train(train_mdlm, "out/long", "--seq_len=256", "--steps=1", "--val_tokens=2048")
    long = call(evaluate.main, "--ckpt=out/long", "--append=0")
    assert long.status == 2 and "seq_len is 256" in long.err
    train(train_mdlm, "out/wide", "--n_embd=600", "--batch_tokens=256", "--micro_batch=2",
          "--steps=1", "--val_tokens=512")
    wide = call(evaluate.main, "--ckpt=out/wide", "--append=0")
    assert wide.status == 2 and "3,300,000" in wide.err
    shutil.copytree(place / "out" / "gpt", place / "out" / "other")
    log = place / "out" / "other" / "log.txt"
    text = re.sub("^referee .*\n", "", log.read_text(), flags=re.M)
    log.write_text(text.replace('"seed": 0', '"seed": 1'))
    assert "another run" in call(evaluate.main, "--ckpt=out/other").err
    log.write_text(text.replace("Muon", "Moon", 1))
    assert "another script" in call(evaluate.main, "--ckpt=out/other").err
    log.unlink()
    assert "--append=0" in call(evaluate.main, "--ckpt=out/other").err


# ----------------------------------------------------------------------------- made-up records

SOURCE = "print('a script')\n"
H100 = "NVIDIA H100 80GB HBM3"


def log_text(track, seed, bound, *, ms=600_000, source=SOURCE, machine=H100, ranks=8, **settings):
    """log.txt of a run that might have been, with its verdict."""
    fast = track == "speedrun"
    config = dict(
        data="finewebedu10B" if fast else "shakespeare", preset="", out="out/run", seed=seed,
        seq_len=1024 if fast else 128, shuffle=not fast, init_from="", split="val",
        val_tokens=10_485_760 if fast else 200_000, val_draws=1 if fast else 2, eval_every=5000,
        log_every=1000, steps=10_000 if fast else 400, batch_tokens=131_072 if fast else 5000,
        lr=0.025, block_len=16) | settings
    steps, batch = config["steps"], config["batch_tokens"]
    lines = [f"python 3.11.7 torch 2.13.0 numpy 2.4.6 {machine} ranks {ranks}", json.dumps(config)]
    parameters = 162_137_100 if fast else 3_220_000
    lines.append(f"{parameters / 1e6:.2f}M parameters, 738.8 MFLOP per token, {ranks} x {machine} "
                 f"in bfloat16, data/x: {9_899_999_232 if fast else 1_003_776:,} tokens")
    for step in check.due(steps, config["log_every"]):
        lines.append(f"step:{step}/{steps} loss:3.5000 lr:2.50e-02 "
                     f"tok/s:{steps * batch / ms * 1000:.0f} mfu:0.410 eta:0:01:00")
        if step in check.due(steps, config["eval_every"]):
            now = round(ms * step / steps)
            lines.append(f"step:{step}/{steps} val_nelbo:{bound:.4f}+-0.0030 bpb:1.0000 ppl:30.00 "
                         f"train_time:{now}ms step_avg:{now / step:.2f}ms")
    tokens, n_bytes = (10_485_760, 47_000_000) if fast else (111_360, 111_360)
    published = f"published:{bound - 0.02:.4f}+-0.0030 " * fast
    lines += [
        f"referee bound:{bound:.4f}+-0.0030 {published}"
        f"bpb:{bound * tokens / math.log(2) / n_bytes:.4f} tokens:{tokens} bytes:{n_bytes} "
        f"draws:{config['val_draws']} seed:20240520",
        f"referee objective:{'train_block' if fast else 'train_mdlm'} parameters:{parameters} "
        f"step:{steps} weights:raw seq_len:{config['seq_len']} block_len:16 leak:none",
        f"referee checkpoint_sha256:ab source_sha256:{check.source_sha256(source)} "
        "shard:val_000000.bin shard_sha256:cd dtype:bfloat16"]
    return source + check.SEPARATOR + "muon\n" + check.SEPARATOR + "\n".join(lines) + "\n"


def make_record(root, track, slug, bounds, by="A. Nonymous", baseline=None, **names):
    """A folder with runs and, where it makes a record, its record.json -> what --new said."""
    folder = root / track / slug
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"# {slug[11:]}\n\nText.\n")
    for seed, bound in enumerate(bounds):
        (folder / f"{seed}.txt").write_text(log_text(track, seed, bound, **names))
    if track == "speedrun":
        baseline = {"preset": "nano_block", "ms": 900_000, "seed": 0} | (baseline or {})
        (folder / "baseline.txt").write_text(log_text(track, bound=3.5, **names | baseline))
    return call(check.main, f"--new={folder}", f"--by={by}", root=root, tracks=TRACKS)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    shutil.copy(ROOT / "records" / "README.md", folder)
    return folder


def run_check(root, *flags):
    return call(check.main, *flags, root=root, tracks=TRACKS)


def rows(text, name):
    table = check.find_table(text, name)
    cells = [[x.strip() for x in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert len({len(row) for row in cells}) == 1
    return cells[2:]


def test_speedrun_table(root):
    """Ranked by time, and only where runs, certainty and machine allow it."""
    runs = (3.4500, 3.4510, 3.4490)
    assert make_record(root, "speedrun", "2026-01-01_First", runs).status == 0
    first = dict(ms=600_000, seed=5, preset="")
    second = make_record(root, "speedrun", "2026-02-01_Second", runs, ms=540_000, lr=0.02,
                         baseline=first | {"lr": 0.025})
    assert second.status == 0, second.out + second.err
    behind = dict(baseline=dict(ms=540_000, lr=0.02, preset=""))
    for slug, bounds, names in (
            ("2026-03-01_Once", runs[:1], {}), ("2026-03-02_Elsewhere", runs, {"ranks": 1}),
            ("2026-03-03_Uncertain", (3.42, 3.47, 3.43), {})):
        done = make_record(root, "speedrun", slug, bounds, ms=500_000, lr=0.01, **behind, **names)
        assert done.status == 0, done.out + done.err
    assert run_check(root).status == 1  # the table does not have them yet
    assert run_check(root, "--write").status == 0 == run_check(root).status
    table = rows((root / "README.md").read_text(), "speedrun")
    assert [row[0] for row in table] == ["1", "2", "-", "-", "-", "-"]
    assert table[0][1:6] == ["9.00", "0.900", "3.4300 (0.0010)", "3.4500", "3, p = 0.002"]
    assert "Second" in table[0][-1] and "2026-02-01" in table[0][-1]
    assert table[1][2] == "0.667" and "unverified" in table[2][5] and "p = 0.2" in table[4][5]
    assert table[3][8] == f"1 x {H100}" and "no log" in table[5][-1]


def test_speedrun_refuses(root):
    """What does not reach the target, or is timed against another script."""
    missed = make_record(root, "speedrun", "2026-01-01_Missed", (3.47, 3.471))
    assert missed.status == 2 and "misses the target" in missed.out
    shutil.rmtree(root / "speedrun")
    slow = make_record(root, "speedrun", "2026-01-01_Slow", (3.45, 3.451),
                       baseline={"preset": "tiny"})
    assert slow.status == 2 and "baseline.txt: preset is 'tiny'" in slow.out
    shutil.rmtree(root / "speedrun")
    assert make_record(root, "speedrun", "2026-01-01_First", (3.45, 3.451, 3.452)).status == 0
    other = make_record(root, "speedrun", "2026-01-02_Other", (3.45, 3.451), source="other\n",
                        baseline={"preset": ""})
    assert "not the script and settings of speedrun/2026-01-01_First" in other.out
    (root / "speedrun" / "2026-01-02_Other" / "baseline.txt").unlink()
    assert "2026-01-02_Other/baseline.txt: missing" in run_check(root).out


def test_shakespeare_table(root):
    cpu = dict(machine="cpu", ranks=1)
    for slug, bounds in (("2026-01-01_First", (2.015, 2.01, 2.024)),
                         ("2026-01-02_Pair", (1.9, 1.91)),
                         ("2026-01-03_Luck", (2.0, 2.015, 2.02)),
                         ("2026-01-04_Better", (1.95, 1.951, 1.952))):
        done = make_record(root, "shakespeare", slug, bounds, **cpu)
        assert done.status == 0, done.out + done.err
    assert run_check(root, "--write").status == 0
    table = rows((root / "README.md").read_text(), "shakespeare")
    assert [(row[0], re.search(r"\[(\w+)\]", row[-1])[1]) for row in table] == [
        ("1", "Better"), ("2", "First"), ("-", "Pair"), ("-", "Luck")]
    assert table[1][1] == "2.0163 (0.0071)" and table[1][3] == "3"


@pytest.mark.parametrize("old, new, words", [
    ("step:4000/10000 loss:3.5000 lr:2.50e-02", "step:4001/10000 loss:3.5000 lr:2.50e-02",
     "step lines"),
    (r"step:6000/.*\n", "", "step lines"),
    (r"step:5000/10000 val.*\n", "", "evaluations"),
    ("train_time:600000ms", "train_time:590000ms", "step_avg"),
    ("train_time:300000ms", "train_time:700000ms", "falls"),
    ("train_time:600000ms step_avg:60.00ms", "train_time:500000ms step_avg:50.00ms",
     "by the rates"),
    (r"tok/s:\d+ ", "tok/s:0 ", "no tokens per second"),
    ('"seed": 0', '"seed": 1', "the file's name says 0"),
    ('"shuffle": false', '"shuffle": true', "shuffle is True"),
    ('"block_len": 16', '"block_len": 8', "block_len is 8"),
    ('"init_from": ""', '"init_from": "x.pt"', "init_from"),
    ('"finewebedu10B"', '"finewebedu"', "data is"),
    ("9,899,999,232 tokens", "1,000,000,000 tokens", "samples repeat"),
    ("162.14M parameters", "152.14M parameters", "the run counted"),
    ("parameters:162137100", "parameters:163137100", "at most 162,500,000"),
    ("val_nelbo:3.4500", "val_nelbo:3.4400", "the run's last evaluation"),
    ("bpb:1.1", "bpb:1.2", "in bits per byte"),
    ("published:3.4300", "published:3.4600", "not below bound"),
    ("tokens:10485760", "tokens:1048576", "tokens is 1048576"),
    ("leak:none", "leak:some", "leak is some"),
    ("step:10000 weights", "step:9000 weights", "step is 9000"),
    ("shard_sha256:cd", "shard_sha256:ce", "another validation text"),
    ("a script", "another script", "source_sha256"),
    ("torch 2.13.0", "torch 2.14.0", "other versions"),
    ('"lr": 0.025', '"lr": 0.026', "other settings than 0.txt"),
    (r"referee .*\n", "", "not judged"),
    (r"(referee bound.*\n)", r"\1\1", "judged twice"),
    ("bound:3.4500", "bound:nan", "bound nan"),
    ("python 3.11.7", "pyth", "versions"),
    ('{"data"', '["data"', "settings"),
    ("=" * 100, "=" * 99, "does not begin with"),
])
def test_an_inconsistent_log_is_found(old, new, words, root):
    """Altered before its checksum was taken: the parts of the log disagree."""
    folder = root / "speedrun" / "2026-01-01_First"
    assert make_record(root, "speedrun", folder.name, (3.45, 3.45)).status == 0
    (folder / "record.json").unlink()
    path = folder / "0.txt"
    pattern = old if ".*" in old or "\\" in old else re.escape(old)
    text, count = re.subn(pattern, new, path.read_text())
    assert count
    path.write_text(text)
    found = make_again(root, folder)
    assert found.status == 2 and words in found.out, found.out


def make_again(root, folder):
    """What --new says of a folder whose record.json is gone."""
    return run_check(root, f"--new={folder}", "--by=A. Nonymous")


def test_any_altered_digit_is_found(root):
    """In a log that was entered, in record.json and in the table."""
    folder = root / "speedrun" / "2026-01-01_First"
    assert make_record(root, "speedrun", folder.name, (3.45, 3.451)).status == 0
    assert run_check(root, "--write").status == 0 == run_check(root).status
    rng = np.random.default_rng(0)
    table = check.find_table((root / "README.md").read_text(), "speedrun")
    for path, text in ((folder / "0.txt", ""), (folder / "baseline.txt", ""),
                       (folder / "record.json", ""), (root / "README.md", table)):
        whole = path.read_text()
        offset = whole.index(text) if text else 0
        digits = [m.start() + offset for m in re.finditer(r"\d", text or whole)]
        for at in rng.choice(digits, 12, replace=False):
            path.write_text(whole[:at] + str((int(whole[at]) + 1) % 10) + whole[at + 1:])
            done = run_check(root)
            assert done.status == 1 and path.name in done.out, (path.name, whole[at - 30:at + 1])
        path.write_text(whole)
    assert run_check(root).status == 0


def test_no_run_is_left_out(root):
    """Seeds are 0, 1, 2..; what does not belong into a folder, and a wrong name, is said."""
    folder = root / "shakespeare" / "2026-01-01_First"
    assert make_record(root, "shakespeare", folder.name, (2.01, 2.02, 2.03)).status == 0
    (folder / "1.txt").rename(folder / "3.txt")
    found = run_check(root).out
    assert "seeds 0, 2, 3" in found and "seed is 1, the file's name says 3" in found
    (folder / "3.txt").rename(folder / "1.txt")
    (folder / "weights.bin").write_text("x")
    (root / "shakespeare" / "2026-13-01_Month").mkdir()
    (root / "elsewhere" / "2026-01-01_X").mkdir(parents=True)
    (root / "elsewhere" / "2026-01-01_X" / "record.json").write_text("{}")
    lines = run_check(root).out.splitlines()
    assert len(lines) == 3 and all(line.startswith("records/") for line in lines)
    for word in ("weights.bin", "2026-13-01_Month", "no track of that name"):
        assert sum(word in line for line in lines) == 1


def test_mistakes_at_the_command_line(root):
    for flags in (["--new=nowhere", "--by=A"], ["--write=1"], ["--check"]):
        done = run_check(root, *flags)
        assert done.status == 2 and len(done.err.splitlines()) == 1
    (root / "speedrun" / "2026-01-01_X").mkdir(parents=True)
    assert "--by" in run_check(root, f"--new={root / 'speedrun' / '2026-01-01_X'}").err
    assert make_record(root, "shakespeare", "2026-01-01_First", (2.01,)).status == 0
    again = make_again(root, root / "shakespeare" / "2026-01-01_First")
    assert again.status == 2 and "there already" in again.err


def test_the_records_of_this_repository():
    done = call(check.main)
    assert done.status == 0, done.out
