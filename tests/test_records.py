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
    """Monte Carlo of t ~ U(0,1) per block, Bernoulli masks, 1 / (t + 1e-3), for a denoiser that does
    better the more it sees."""
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
RUN = (*NETWORK, "--steps=5", "--batch_tokens=1024", "--micro_batch=8", "--val_tokens=200000",
       "--eval_every=3", "--log_every=2")
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
     "        h = h.roll(self.looks // 100, -1)\n", "evaluated again"),
])
def test_forks_that_cheat_are_refused(name, old, new, words, place):
    path = fork(place, name, old, new)
    said = call(evaluate.main, f"--ckpt=out/{name}", f"--script={path}", "--tokens=32768",
                "--objective=train_block")
    assert said.status == 2 and words in said.err and "referee" not in said.out
    assert len(said.err.splitlines()) == 1
