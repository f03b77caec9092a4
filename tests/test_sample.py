"""Orders, remasking, warps, tokens, checkpoints, the command line and the terminal of sample.py."""
import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import byte_table, write_meta
from toys import Joint, chi_square_z, correlated, take_rows, with_samplers

import gpt
import sample
import train_block
import train_mdlm
import train_sedd

ROOT = Path(__file__).resolve().parent.parent
Z_LIMIT = 5.0
RANKED = ("random", "confidence", "entropy", "margin")
TEXT = "def name(self):\n    return self.names[0]  # café\n\n" * 200
TINY = dict(
    seq_len=32, n_layer=1, n_head=2, n_embd=32, steps=3, batch_tokens=128, micro_batch=4,
    val_tokens=128, eval_every=0, compile=0, device="cpu", dtype="fp32",
)


# ------------------------------------------------------------------------------ toys


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(model, n_rows, choose, steps, *, T, V, **kwargs):
    known = torch.zeros(n_rows, T, dtype=torch.int64)
    is_known = kwargs.pop("is_known", known.bool())
    cfg, gen = SimpleNamespace(vocab_size=V, seq_len=T), seeded()
    return with_samplers(train_mdlm).generate(
        model, cfg, known, is_known, steps=steps, gen=gen, choose=choose, **kwargs
    )


class Noisy:
    """Logits that depend on the position and on how many neighbours are masked; V = 7."""

    V = 7

    def __init__(self, scale=2.0):
        self.table = scale * torch.randn(64, self.V, generator=seeded(3))

    def __call__(self, xt, sigma=None, rows=None):
        B, T = xt.shape
        seen = (xt * (xt != self.V)).cumsum(1)
        logits = self.table[(torch.arange(T) + 5 * seen) % 64]  # (B, T, V)
        return take_rows(logits, rows)


# ------------------------------------------------------------------------------ orders


def test_random_order_one_token_a_pass_reproduces_the_joint():
    joint = Joint(correlated(3, 3), copies=8)
    out = run(joint, 1500, sample.ordered("random"), None, T=joint.seq_len, V=3)
    assert abs(chi_square_z(joint.counts(out.tokens), joint.p)) < Z_LIMIT


@pytest.mark.parametrize("kind", ["cap:0.01", "rescale:0.02", "loop:0.01"])
def test_remasking_with_the_exact_posterior_keeps_the_joint(kind):
    joint = Joint(correlated(2, 3).sqrt(), copies=200)
    remask = sample.Remask(kind)
    again = []

    def choose(log_probs, is_mask, **kwargs):
        after = remask.choose(log_probs, is_mask, **kwargs)
        again.append((after & ~is_mask).sum().item())
        return after

    out = run(joint, 10, choose, 300, T=joint.seq_len, V=2)
    assert sum(again) > joint.seq_len  # of 10 rows: it does remask
    assert abs(chi_square_z(joint.counts(out.tokens), joint.p)) < Z_LIMIT


def shares_fixed(kind, steps, n=20_000):
    """Share of tokens that are fixed after each pass, and of the fixed ones that it remasked."""
    remask, is_mask, shares, again = sample.Remask(kind), torch.ones(1, n, dtype=torch.bool), [], []
    tokens = torch.zeros(1, n, dtype=torch.int64)
    log_probs = torch.full((n, 4), math.log(0.25))
    for i in range(steps):
        u = torch.rand(1, n, generator=seeded(i), dtype=torch.float64)
        after = remask.choose(log_probs[: is_mask.sum()], is_mask, step=i, steps=steps, u=u)
        remask.see(tokens, i)
        again.append((after & ~is_mask).sum().item() / max(1, (~is_mask).sum().item()))
        is_mask = after
        shares.append(1 - is_mask.float().mean().item())
    return shares, again


@pytest.mark.parametrize("kind", ["cap", "cap:1", "rescale:0.5", "rescale:1"])
def test_remasking_follows_the_schedule_and_stays_below_its_bound(kind):
    steps = 40
    shares, again = shares_fixed(kind, steps)
    for i, (share, rate) in enumerate(zip(shares, again, strict=True)):
        alpha_t, alpha_s = i / steps, (i + 1) / steps
        assert share == pytest.approx(alpha_s, abs=0.02)
        bound = min(1, (1 - alpha_s) / alpha_t) if i else 1
        name, _, eta = kind.partition(":")
        sigma = min(float(eta or 0.02), bound) if name == "cap" else float(eta) * bound
        assert rate == pytest.approx(sigma if i else 0, abs=0.06)
    assert shares[-1] == 1


def test_loop_remasks_between_its_two_times_alone():
    steps = 100
    shares, again = shares_fixed("loop:0.1", steps)
    times = [1 - i / steps for i in range(steps)]
    rates = list(zip(times, again, strict=True))
    assert all(rate == 0 for t, rate in rates if t > 0.555 or t < 0.045)
    inside = [rate for t, rate in rates if 0.055 < t < 0.545]
    assert min(inside) > 0.08 and sum(inside) / len(inside) == pytest.approx(0.1, abs=0.005)
    for i in (44, 60, 90):
        assert shares[i] == pytest.approx(0.9, abs=0.01)
    assert shares[-1] == 1


def test_conf_remasks_the_tokens_that_were_drawn_with_low_probability():
    n = 4000
    remask = sample.Remask("conf:1")
    sure = torch.arange(n) % 2 == 0
    p = torch.where(sure, 0.98, 0.02)
    log_probs = torch.stack((p, 1 - p), 1).log()
    tokens = torch.zeros(1, n, dtype=torch.int64)
    masked, none = torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
    remask.choose(log_probs, masked, step=0, steps=2, u=torch.zeros(1, n, dtype=torch.float64))
    remask.see(tokens, 1)
    # At step 49 of 100 sigma_max is 1: the n tokens share one expected remasking.
    counts = torch.zeros(n)
    empty = torch.zeros(0, 2)
    for i in range(4000):
        fresh = sample.Remask("conf:1")
        fresh.psi = remask.psi.clone()
        u = torch.rand(1, n, generator=seeded(i), dtype=torch.float64)
        counts += fresh.choose(empty, none, step=49, steps=100, u=u)[0]
    assert counts.sum() / 4000 == pytest.approx(1, abs=0.1)
    ratio = counts[~sure].sum() / counts[sure].sum()
    assert ratio == pytest.approx(math.exp(0.98 - 0.02), rel=0.15)
    # Where all but one are masked again, that one bears it all, and the masked ones nothing.
    u = torch.zeros(1, n, dtype=torch.float64)
    u[0, 0] = 0.9
    after = remask.choose(empty, none, step=49, steps=100, u=u)
    assert after.sum() == n - 1 and not after[0, 0]
    remask.see(tokens, 2)
    after = remask.choose(log_probs[1:], after, step=49, steps=100, u=torch.full_like(u, 0.9))
    assert after.all()


@pytest.mark.parametrize("order", RANKED)
@pytest.mark.parametrize(("free", "steps"), [((10, 3, 7), 4), ((12, 12, 12), 12), ((5, 1, 0), 8)])
def test_a_number_of_steps_is_spread_evenly_over_each_row(order, free, steps):
    T = 12
    is_known = torch.stack([torch.arange(T) >= n for n in free])
    left = []
    out = run(
        Noisy(), 3, sample.ordered(order), steps, T=T, V=Noisy.V, is_known=is_known,
        watch=lambda tokens, nfe: left.append((tokens == Noisy.V).sum(1).tolist()),
    )
    for row, n in enumerate(free):
        now = [n, *(counts[row] for counts in left)]
        spent = [a - b for a, b in itertools.pairwise(now)]
        assert sum(spent) == n and max(spent) - min(spent) <= 1
        assert sorted(spent, reverse=True) == spent
    assert out.nfe == min(steps, max(free))


@pytest.mark.parametrize("order", RANKED)
def test_thresholds(order):
    T, B = 12, 4
    seen = []

    def watch(tokens, nfe):
        seen.append((tokens == Noisy.V).sum(1).tolist())

    out = run(Noisy(), B, sample.ordered(order, 1.0), None, T=T, V=Noisy.V, watch=watch)
    assert out.nfe == T and seen == [[T - 1 - i] * B for i in range(T)]
    out = run(Noisy(), B, sample.ordered(order, 0.0), None, T=T, V=Noisy.V)
    assert out.nfe == 1
    certain = Joint(torch.eye(2)[0][None] * torch.eye(2)[0][:, None], copies=3)
    out = run(certain, B, sample.ordered(order, 1.0), None, T=6, V=2)
    assert out.nfe == 6  # a probability of 1 does not exceed 1

    choose, model = sample.ordered(order, 0.6), Noisy()

    def checked(log_probs, is_mask, **kwargs):
        after = choose(log_probs, is_mask, **kwargs)
        fixed = is_mask & ~after
        sure = torch.zeros_like(is_mask)
        sure[is_mask] = log_probs.exp().amax(1) > 0.6
        assert (fixed | ~sure).all()
        extra = (fixed & ~sure).sum(1)
        assert (extra <= 1).all() and (fixed.sum(1) >= is_mask.any(1)).all()
        return after

    out = run(model, B, checked, None, T=T, V=Noisy.V)
    assert 1 < out.nfe < T and (out.tokens < Noisy.V).all()


def test_orders_pick_what_they_are_named_after():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.55, 0.44, 0.01], [0.7, 0.15, 0.15]])
    is_mask = torch.tensor([[False, True, True, True, True, False]])
    u = torch.tensor([[1.0, 0.3, 0.8, 0.1, 0.5, 1.0]], dtype=torch.float64)
    # Largest top probability; least entropy (nats: .69 .95 .74 .82); widest margin; largest u.
    for order, first in (("confidence", 4), ("entropy", 1), ("margin", 4), ("random", 2)):
        after = sample.ordered(order)(p.log(), is_mask, step=0, steps=None, u=u)
        assert (is_mask & ~after).nonzero()[:, 1].tolist() == [first], order
    second = sample.ordered("margin")(p.log(), is_mask, step=0, steps=2, u=u)
    assert (is_mask & ~second).nonzero()[:, 1].tolist() == [2, 4]


HOWS = [
    *({"order": order} for order in RANKED),
    {"order": "ancestral", "steps": 9},
    {"order": "first_hitting"},
    {"order": "entropy", "steps": 5, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"threshold": 0.5},
    {"remask": "loop", "steps": 20},
    {"remask": "conf", "steps": 20},
    {"order": "confidence", "refine": 0.4},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_sample_does_not_depend_on_the_others_and_keeps_what_is_given(lm, how, monkeypatch):
    # In fp32 the rounding, which depends on the size of the batch, decides between near equals.
    monkeypatch.setattr(lm, "model", copy.deepcopy(lm.model).double())
    prompt = "def café("
    many = lm.generate(n=5, length=16, prompt=prompt, seed=4, **how)
    assert lm.generate(n=2, length=16, prompt=prompt, seed=4, **how) == many[:2]
    assert len(set(many)) == 5 and all(text.startswith(prompt) for text in many)
    assert lm.generate(n=2, length=16, prompt=prompt, seed=5, **how) != many[:2]
    # Small batches, which is how many samples fit into the memory.
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * 16 * 256)
    assert lm.generate(n=5, length=16, prompt=prompt, seed=4, **how) == many


# ------------------------------------------------------------------------------ warps


def test_warps_by_definition():
    logits = torch.randn(50, 11, generator=seeded(1)) * 2
    p = logits.softmax(-1)

    def probs(**kwargs):
        return sample.make_warp(**kwargs)(logits.log_softmax(-1)).exp()

    assert sample.make_warp() is None
    torch.testing.assert_close(probs(temperature=0.5), p.square() / p.square().sum(-1, True))
    torch.testing.assert_close(probs(temperature=0.0), torch.eye(11)[p.argmax(-1)])
    for low in (1e-30, 1e-320):
        torch.testing.assert_close(probs(temperature=low), torch.eye(11)[p.argmax(-1)])
    torch.testing.assert_close(probs(temperature=1e308), torch.full_like(p, 1 / 11))
    for row, warped in zip(p, probs(top_k=3), strict=True):
        keep = row >= row.sort().values[-3]
        torch.testing.assert_close(warped, row * keep / (row * keep).sum())
    for row, warped in zip(p, probs(top_p=0.6), strict=True):
        keep, mass = [], 0.0
        for token in row.argsort(descending=True).tolist():
            if mass < 0.6:  # the token that crosses stays
                keep.append(token)
            mass += row[token].item()
        assert sorted(warped.nonzero()[:, 0].tolist()) == sorted(keep)
        torch.testing.assert_close(warped[keep], row[keep] / row[keep].sum())
    torch.testing.assert_close(probs(top_k=99), p)
    torch.testing.assert_close(probs(top_p=1.0), p)
    for low in (1e-9, 1e-320):
        assert (probs(top_p=low) > 0).sum(-1).tolist() == [1] * 50
    # Together: temperature, then the k likeliest, then the nucleus of those.
    both = probs(temperature=2.0, top_k=4, top_p=0.7)
    flat = p.sqrt() / p.sqrt().sum(-1, True)
    for row, warped in zip(flat, both, strict=True):
        best = row.argsort(descending=True)[:4]
        share = row[best] / row[best].sum()
        n = int((share.cumsum(0) - share < 0.7).sum())
        expected = torch.zeros(11).index_put((best[:n],), share[:n] / share[:n].sum())
        torch.testing.assert_close(warped, expected)


def test_temperature_leaves_the_ranks_alone():
    ranks = []

    def spy(log_probs, is_mask, *, u, **kwargs):
        ranks.append(log_probs)
        return sample.ordered("confidence")(log_probs, is_mask, u=u, **kwargs)

    for warp in (None, sample.make_warp(temperature=5.0)):
        run(Noisy(), 2, spy, None, T=6, V=Noisy.V, warp=warp)
    torch.testing.assert_close(ranks[0], ranks[6])


# ------------------------------------------------------------------------------ refine


def test_refine_predicts_the_least_likely_tokens_anew(lm):
    """Two passes score; then the fraction F is masked that is least probable given the rest."""
    known, is_known = lm.canvas_for_prompt("def ", 24)
    x, given = known.expand(3, -1), is_known.expand(3, -1)
    tokens = lm.fill(x, given, sample.Sampler(), seeded(), None).tokens
    keep, nfe = lm.likeliest(tokens, given, 0.3)
    assert nfe == 2 and keep[given].all()
    assert (~keep).sum(1).tolist() == [6, 6, 6]  # of 20
    free = (~is_known).nonzero()[:, 0]
    for row in range(3):
        score = {}
        for half in (free[0::2], free[1::2]):
            xt = tokens[row].index_fill(0, half, lm.cfg.vocab_size)
            sigma = -torch.log1p(-torch.tensor([len(half) / 25]))
            log_probs = lm.model(xt[None], sigma)[0].log_softmax(-1)
            score |= {int(i): log_probs[i, tokens[row, i]].item() for i in half}
        worst = sorted(score, key=score.get)[:6]
        assert sorted(worst) == (~keep[row]).nonzero()[:, 0].tolist()
    (batch,) = lm.batches(known, is_known, sample.Sampler(refine=0.3), n=3, seed=0)
    assert batch.nfe == 20 + 2 + 6


# ------------------------------------------------------------------------------ tokens


def saved_tokenizer(name, table, pattern=None, bos_id=0):
    return {
        "tokenizer": name, "vocab_size": len(table), "bos_id": bos_id, "pattern": pattern,
        "token_bytes": [word.decode("latin-1") for word in table],
    }


def byte_tokenizer():
    table = [bytes([i]) for i in range(256)]
    table[0] = b""
    return sample.Tokenizer(saved_tokenizer("byte", table), 256)


def bpe_tokenizer(spare=0):
    """All bytes, four merges and bos at the end."""
    table = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", "é".encode(), b""]
    return sample.Tokenizer(saved_tokenizer("bpe:261", table, sample.PATTERNS[0], 260), 261 + spare)


TEXTS = ["", "plain", "the theory of the café", "日本 🙂\n\ttab", "<|endoftext|> is text here"]


@pytest.mark.parametrize("make", [byte_tokenizer, bpe_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_round_trip(make, text):
    tokenizer = make()
    tokens = tokenizer.encode(text)
    assert tokenizer.bos_id not in tokens and max(tokens, default=0) < tokenizer.mask_id
    assert tokenizer.decode(tokens) == text
    assert tokenizer.n_bytes(tokens) == len(text.encode())


def test_decoding():
    tokenizer = bpe_tokenizer(spare=2)
    assert tokenizer.encode("the cafés")[0] == 257  # merges apply
    e = list("é".encode())
    decode, b = tokenizer.decode, tokenizer.bos_id
    assert decode([*e, b, 97, 261]) == "é" + sample.DOCUMENT_BREAK + "a"  # 261: a spare id
    assert decode([97, e[0], 98]) == "a\ufffdb" and decode([97, e[0]]) == "a\ufffd"
    assert decode([e[0], b, e[1]]) == "\ufffd" + sample.DOCUMENT_BREAK + "\ufffd"
    assert tokenizer.spans([97, 98, 263, 99], ["k", "k", "m", None]) == [
        ("ab", "k"), ("░", "m"), ("c", None),
    ]
    with pytest.raises(ValueError, match="NUL"):
        byte_tokenizer().encode("a\0b")


def test_tokens_without_their_bytes_are_refused():
    with pytest.raises(ValueError, match="prepare_data.py"):
        sample.Tokenizer(saved_tokenizer("gpt2", [b""] * 300, None, 299), 300)


# ------------------------------------------------------------------------------ checkpoints


def train(folder, name, script=train_mdlm, **flags):
    """A few steps of a training script's own main, on text of bytes."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        tokens = np.frombuffer(("\0" + TEXT).encode(), np.uint8)
        for shard in ("train_000001.bin", "val_000000.bin"):
            header = np.zeros(256, "<i4")
            header[:5] = 20240520, 1, len(tokens), 1, 256
            (data / shard).write_bytes(header.tobytes() + tokens.tobytes())
        write_meta(data, byte_table(256), tokenizer="byte")
    out = folder / "out" / name
    flags = {**TINY, "data": data, "out": out, **flags}
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with contextlib.redirect_stdout(io.StringIO()):
        script.main([f"--{key}={value}" for key, value in flags.items()])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out / "ckpt.pt"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on matrices this small, beside other work, mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="session")
def ckpt(folder):
    return train(folder, "tiny", ema=0.5)


@pytest.fixture(scope="session")
def lm(ckpt):
    return sample.load(ckpt, device="cpu")


def test_python_interface(lm, capfd):
    texts = lm.generate(n=2, length=20, prompt="def ", steps=5, order="confidence", threshold=0.9)
    assert [type(text) for text in texts] == [str, str]
    assert all(text.startswith("def ") for text in texts)
    texts = lm.infill("def ___(x):\n  ____\n", blank=[3, 5], n=3)
    assert len(texts) == 3
    assert all(re.fullmatch(r"def .*\(x\):\n  .*\n", text, re.S) for text in texts)
    known, is_known = lm.canvas_for_infill("def ___(x):\n  ____\n", [3, 5], 30)
    assert known[is_known].tolist() == list(b"def (x):\n  \n")
    assert is_known.long().tolist() == [1] * 4 + [0] * 3 + [1] * 7 + [0] * 5 + [1] + [0] * 10
    assert len(lm.canvas_for_prompt("ab")[0]) == lm.cfg.seq_len
    assert isinstance(lm.generate()[0], str)
    with pytest.raises(ValueError, match="--length=33.*32"):
        lm.generate(length=33)
    with pytest.raises(TypeError):
        lm.generate(lenght=3)
    assert capfd.readouterr() == ("", "")


def test_score_is_the_bound(lm):
    text = "def café(self):\n    return self.name\n" + "x" * 10
    tokens = torch.tensor(list(text.encode()))
    windows = [tokens[:32], tokens[32:]]
    score = lm.score(text, draws=60)
    assert (score.n_tokens, score.n_bytes) == (len(tokens), len(tokens))
    total = 0.0
    for window in windows:
        # The definition, over every number of masks and many placements (arXiv 2110.02037, eq. 8).
        T, gen, draws = len(window), seeded(9), 60
        hidden = torch.rand(draws * T, T, generator=gen).argsort(1).argsort(1)
        hidden = hidden < torch.arange(1, T + 1).repeat(draws)[:, None]
        xt = torch.where(hidden, 256, window)
        k = hidden.sum(1)
        with torch.no_grad():
            log_probs = lm.model(xt, -torch.log1p(-k / (T + 1))).log_softmax(-1)
        ce = -log_probs.gather(2, window.expand_as(xt)[..., None])[..., 0]
        total += ((ce * hidden).sum(1) * T / k).mean().item()
    assert abs(score.nats - total) < 5 * score.nats_stderr + 0.1
    assert 0 < score.nats_stderr < 0.05 * score.nats
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / len(tokens))
    # The standard error is that of independent draws.
    other = [lm.score(text, draws=6, seed=s).nats for s in range(1, 11)]
    spread = torch.tensor(other).std().item()
    typical = score.nats_stderr * 10**0.5
    assert 0.4 < spread / typical < 2.2


def test_both_kinds_of_weights(ckpt, lm):
    raw = sample.load(ckpt, weights="raw", device="cpu")
    state = torch.load(ckpt, weights_only=True)
    for name, p in raw.model.named_parameters():
        assert torch.equal(p, state["model"][name])
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, state["ema"][name])
    assert "raw weights" in raw.summary and "ema weights" in lm.summary
    assert sample.load(ckpt, device="cpu", dtype="bf16").dtype == torch.bfloat16
    assert lm.dtype == torch.float32


def test_the_newest_checkpoint(ckpt, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--preset=tiny"):
        sample.load()
    for age, name in enumerate("abc"):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(ckpt, tmp_path / "out" / name / "ckpt.pt")
        os.utime(tmp_path / "out" / name / "ckpt.pt", (10**9 - age, 10**9 - age))
    assert sample.load(device="cpu").summary.startswith(str(Path("out/a/ckpt.pt")))
    assert "out/b" in sample.load("out/b", device="cpu").summary


def test_a_fork_needs_its_script(folder, tmp_path):
    """An edited script writes a checkpoint that the original cannot read; --script can."""
    source = (ROOT / "train_mdlm.py").read_text()
    fork = tmp_path / "fork_mdlm.py"
    changed = source.replace("F.relu(self.up(x)).square()", "F.gelu(self.up(x))")
    field = "    cond_dim: int = 0  #"
    assert changed != source and field in changed
    fork.write_text(changed.replace(field, "    twist: int = 1  # new\n" + field))
    module = sample.load_script(fork)
    path = train(folder, "fork", module)
    with pytest.raises(ValueError, match="'fork_mdlm'.*--script"):
        sample.load(path)
    with pytest.raises(ValueError, match="twist"):
        sample.load(path, script=ROOT / "train_mdlm.py")
    lm = sample.load(path, script=fork, device="cpu")
    assert lm.cfg.twist == 1 and len(lm.generate(n=2, length=8)) == 2
    x = torch.zeros(1, 8, dtype=torch.int64)
    own = torch.load(path, weights_only=True)
    own["config"].pop("twist")
    plain, _ = train_mdlm.build_model(own)
    assert not torch.allclose(plain(x, torch.ones(1)), lm.model(x, torch.ones(1)))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run(ckpt, tmp_path, capsys):
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "extra": Bomb(str(tmp_path / "ran"))}, tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran")), protocol=2))
    for name in ("code.pt", "plain.pt"):
        with pytest.raises(SystemExit) as stop:
            sample.main([f"--ckpt={tmp_path / name}"])
        assert stop.value.code == 2 and not (tmp_path / "ran").exists()
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and name in err


def refused(argv, capsys):
    """The one line with which a mistake ends."""
    with pytest.raises(SystemExit) as stop:
        sample.main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("sample.py: .*\n", err), (out, err)
    return err


def test_broken_and_foreign_files(ckpt, tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:-5000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    state = torch.load(ckpt, weights_only=True)
    torch.save({**state, "meta": {"tokenizer": "byte"}}, tmp_path / "mute.pt")
    torch.save({**state, "script": "os; import this"}, tmp_path / "other.pt")
    state["model"].popitem()
    torch.save({**state, "ema": None}, tmp_path / "shape.pt")
    for path in tmp_path.glob("*.pt"):
        assert path.name in refused([f"--ckpt={path}"], capsys)
    assert "no such" in refused([f"--ckpt={tmp_path}/none.pt"], capsys)
    assert "hf:OWNER/REPO/FILE" in refused(["--ckpt=hf:a/b"], capsys)
    fork = tmp_path / "fork.py"
    assert str(fork) in refused([f"--ckpt={ckpt}", f"--script={fork}"], capsys)
    fork.write_text("1/0")
    assert "ZeroDivisionError" in refused([f"--ckpt={ckpt}", f"--script={fork}"], capsys)
    fork.write_text("")
    assert "not a training script" in refused([f"--ckpt={ckpt}", f"--script={fork}"], capsys)


# ------------------------------------------------------------------------------ command line


BAD_FLAGS = [
    (["--lenght=3"], "did you mean --length?"),
    (["--zzz=3"], "--help"),
    (["prompt"], "--prompt"),
    (["--length", "3"], "--length needs a value"),
    (["--n=2", "--n=3"], "twice"),
    (["--n=two"], "whole number"),
    (["--n=0"], "--n=0"),
    (["--seed=-1"], "--seed=-1"),
    (["--temperature=hot"], "a number"),
    (["--temperature=nan"], "--temperature=nan"),
    (["--temperature=-1"], "--temperature"),
    (["--top_k=0"], "--top_k=0"),
    (["--top_p=1.5"], "--top_p=1.5"),
    (["--threshold=2"], "--threshold"),
    (["--refine=-0.1"], "--refine"),
    (["--watch=maybe"], "--watch=maybe"),
    (["--order=confidense"], "did you mean confidence?"),
    (["--order=first_hitting", "--steps=5"], "--steps=5"),
    (["--order=ancestral", "--threshold=0.5"], "--threshold=0.5"),
    (["--steps=0"], "--steps=0"),
    (["--remask=lop"], "did you mean loop?"),
    (["--remask=cap:x"], "--remask=cap:x"),
    (["--remask=cap:2"], "--remask=cap:2"),
    (["--remask=cap", "--order=margin"], "--remask=cap"),
    (["--weights=best"], "--weights=best"),
    (["--dtype=bf61"], "did you mean bf16?"),
    (["--device=abacus"], "--device=abacus"),
    (["--length=33"], "--length=33"),
    (["--length=0"], "--length=0"),
    (["--prompt=" + "x" * 40], "--prompt"),
    (["--prompt=abcdef", "--length=6"], "--length=6"),
    (["--infill=def x"], "___"),
    (["--infill=a___b", "--prompt=c"], "--prompt and --infill"),
    (["--infill=a___b", "--blank=2,3"], "--blank=2,3"),
    (["--infill=a___b", "--blank=many"], "--blank=many"),
    (["--infill=a___b", "--blank=0"], "--blank=0"),
    (["--infill=a___b", "--blank=60"], "62 tokens"),
    (["--infill=a___b", "--length=9"], "--length=9"),
    (["--blank=3"], "--infill"),
    (["--draws=3"], "--score"),
    (["--score="], "--score"),
    (["--score=text", "--draws=1"], "--draws=1"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS, ids=lambda x: " ".join(x)[:40])
def test_mistakes_end_in_one_line(ckpt, argv, message, capsys):
    assert message in refused([f"--ckpt={ckpt}", *argv], capsys)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for name in sample.Options.__dataclass_fields__:
        assert f"  --{name}" in text


def test_what_is_printed(ckpt, capsys):
    argv = [f"--ckpt={ckpt}", "--device=cpu", "--n=2", "--length=20", "--prompt=def "]
    sample.main([*argv, "--order=entropy", "--seed=3"])
    out, err = capsys.readouterr()
    lm = sample.load(ckpt, device="cpu")
    one, two = lm.generate(n=2, length=20, prompt="def ", order="entropy", seed=3)
    head, rest = out.split("\n", 1)
    assert str(ckpt) in head and "32" in head
    body, last, _ = rest.rsplit("\n", 2)
    assert body == f"--- sample 1 of 2\n{one}\n\n--- sample 2 of 2\n{two}\n"
    how = r"float32 on cpu, entropy \(mode-seeking\)"
    assert re.fullmatch(rf"NFE 16, \d+ tokens/s, {how}, entropy \d\.\d\d bits", last)
    assert err == "" and "\x1b" not in out
    sample.main([f"--ckpt={ckpt}", "--infill=a ___ b", "--blank=4", "--steps=2", "--refine=0.5"])
    text = capsys.readouterr().out.split("\n", 1)[1]
    assert re.match(r"a .* b\n\nNFE \d, .* ancestral, refine 0\.5, entropy", text, re.S)


def test_entropy_of_a_sample():
    assert sample.entropy_bits([1, 1, 1]) == 0
    assert sample.entropy_bits([0, 1, 2, 3] * 4) == pytest.approx(2)


def test_score_on_the_command_line(ckpt, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT[:100])
    lines = []
    for text in (TEXT[:100], tmp_path / "text.txt"):
        sample.main([f"--ckpt={ckpt}", "--device=cpu", f"--score={text}", "--draws=4"])
        lines.append(capsys.readouterr().out.splitlines()[1])
    assert "the text given" in lines[0] and "text.txt" in lines[1]
    assert lines[0].split("(")[0] == lines[1].split("(")[0]
    score = sample.load(ckpt, device="cpu").score(TEXT[:100], draws=4)
    assert f"{score.nats:.2f} +- {score.nats_stderr:.2f} nats" in lines[0]
    assert f"{score.bits_per_byte:.4f} +- {score.bits_stderr:.4f} bits per byte" in lines[0]


def test_watching_a_pipe_prints_lines(ckpt, tmp_path):
    """The script itself, with no checkpoint named: the newest of out/ in the current folder."""
    argv = [sys.executable, str(ROOT / "sample.py"), "--watch", "--length=16", "--order=random"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "out" / "run").mkdir(parents=True)
    shutil.copy(ckpt, tmp_path / "out" / "run")
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    marks = re.findall(r"^\[(\d+)% after (\d+) passes\] ", done.stdout, re.M)
    assert marks == [("25", "4"), ("50", "8"), ("75", "12")]
    assert "░" * 3 in done.stdout and "NFE 16," in done.stdout


def run_in_terminal(argv, interrupt=None, columns=40):
    """Run on a pseudo terminal -> (output, exit status); send an interrupt once a text shows."""
    import pty

    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", COLUMNS=str(columns), LINES="12")
        os.execv(sys.executable, [sys.executable, str(ROOT / "sample.py"), *argv])
    data, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            data += os.read(fd, 65536)
        except OSError:
            break
        if interrupt is not None and interrupt in data:
            os.write(fd, b"\x03")
            interrupt = None
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(fd)
    return data.decode(errors="replace"), status


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminal")
def test_watching_in_a_terminal_draws_in_place(ckpt):
    argv = [f"--ckpt={ckpt}", "--watch", "--n=2", "--prompt=def ", "--seed=2"]
    out, status = run_in_terminal(argv)
    assert status == 0
    final = sample.load(ckpt, device="cpu").generate(n=2, prompt="def ", seed=2)
    pictures = out.split("\x1b[J")
    assert len(pictures) >= 3
    for picture in pictures[1:-1]:
        assert picture.count("\n") <= 11  # never higher than the terminal
        up = re.search(r"\r(?:\x1b\[(\d+)A)?$", picture)  # back to where the picture began
        assert int(up[1] or 0) == picture.count("\n")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", pictures[-1]).replace("\r\n", "\n")
    assert all(sample.printable(text) in shown for text in final)
    assert "\x1b[1mdef \x1b[0m" in pictures[-1]  # what was given stands out


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminal")
def test_an_interrupt_ends_quietly(ckpt):
    argv = [f"--ckpt={ckpt}", "--watch", "--n=4000", "--steps=100000"]
    out, status = run_in_terminal(argv, interrupt=b" passes")
    assert status == 130 and "Traceback" not in out


def test_text_cannot_steer_the_terminal():
    assert sample.printable("a\x1b[2Jb\x07\tc\r\nd") == r"a\x1b[2Jb\x07    c" "\nd"
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in sample.lines_of(
        [("abc", "known"), ("defg\nh", None), ("░" * 7, "mask"), ("日本日", None)], 5
    )]
    assert plain == ["abcde", "fg", "h░░░░", "░░░日", "本日"]


# ------------------------------------------------------------------------------ gpt


@pytest.fixture(scope="session")
def gpt_ckpt(folder):
    return train(folder, "gpt", gpt, steps=12, ema=0.5)


@pytest.fixture(scope="session")
def gpt_lm(gpt_ckpt):
    return sample.load(gpt_ckpt, device="cpu")


class Scripted:
    """A causal model that is sure of what it writes: row i ends after ENDS[i] tokens."""

    ENDS = (6, 30, 9)

    def predict(self, tokens, positions, rows=None, attend=None):
        S = int(positions[-1]) + 1
        sure = torch.tensor([0 if S == end + 1 else 97 for end in self.ENDS[:len(tokens)]])
        return torch.where(torch.arange(256) == sure[:, None], 0.0, -1e4)


def test_gpt_writes(gpt_lm, monkeypatch):
    assert "gpt, " in gpt_lm.summary
    monkeypatch.setattr(gpt_lm, "model", copy.deepcopy(gpt_lm.model).double())
    how = {"length": 16, "prompt": "def café(", "temperature": 0.9, "top_k": 50, "top_p": 0.95}
    many = gpt_lm.generate(n=5, seed=4, **how)
    assert gpt_lm.generate(n=2, seed=4, **how) == many[:2]
    assert len(set(many)) == 5 and all(text.startswith("def café(") for text in many)
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * 16 * 256)
    assert gpt_lm.generate(n=5, seed=4, **how) == many
    greedy = gpt_lm.generate(n=2, temperature=0, prompt="def ")
    assert greedy[0] == greedy[1]


def test_gpt_ends_with_the_document(gpt_lm, gpt_ckpt, monkeypatch, capsys):
    monkeypatch.setattr(gpt_lm, "model", Scripted())
    assert gpt_lm.generate(n=3, length=20) == ["a" * 6, "a" * 20, "a" * 9]
    known, is_known = gpt_lm.canvas_for_prompt("ab", 20)
    (batch,) = gpt_lm.batches(known, is_known, sample.Sampler(), n=3, seed=0)
    assert [len(row) for row in batch.tokens] == [6, 20, 9] and batch.nfe == 18
    monkeypatch.setattr(sample, "load", lambda *args: gpt_lm)
    sample.main(["--prompt=ab", "--n=1", "--length=20", "--watch"])
    out = capsys.readouterr().out
    assert "---" not in out  # what fills the row behind its end is no document
    assert "\nabaaaa\n" in out and "NFE 5," in out and "left to right" in out


def test_gpt_scores_exactly(gpt_lm, gpt_ckpt, capsys):
    text = "def café(self):\n    return self.name\n" + "x" * 10
    tokens = torch.tensor(list(text.encode()))
    total = 0.0
    for window in (tokens[:32], tokens[32:]):
        x = torch.cat((torch.tensor([256]), window[:-1]))
        with torch.no_grad():
            log_probs = gpt_lm.model(x[None])[0].log_softmax(-1)
        total -= log_probs.gather(1, window[:, None]).sum().item()
    score = gpt_lm.score(text)
    assert score.nats == pytest.approx(total, rel=1e-5) and score.nats_stderr == 0
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / len(tokens), rel=1e-5)
    sample.main([f"--ckpt={gpt_ckpt}", "--device=cpu", f"--score={text}"])
    out = capsys.readouterr().out
    assert f"-log p = {score.nats:.2f} nats, {score.bits_per_byte:.4f} bits per byte (" in out
    assert "<=" not in out and "+-" not in out and "exact" in out


@pytest.mark.parametrize("flag", ["--order=confidence", "--order=random", "--steps=8",
                                  "--threshold=0", "--remask=loop", "--refine=0.5",
                                  "--infill=a ___ b"])
def test_gpt_refuses_what_diffusion_can(gpt_ckpt, flag, capsys):
    err = refused([f"--ckpt={gpt_ckpt}", "--length=16", flag], capsys)
    assert flag.partition("=")[0] + ":" in err and "checkpoint of train_mdlm" in err


def test_gpt_refuses_draws_lengths_and_other_scripts(gpt_ckpt, ckpt, capsys):
    for flags, message in ((["--score=ab", "--draws=4"], "--draws=4: "),
                           (["--length=33"], "--length=33: "),
                           ([f"--script={ROOT / 'train_mdlm.py'}"], "written by gpt.py")):
        assert message in refused([f"--ckpt={gpt_ckpt}", *flags], capsys)
    message = refused([f"--ckpt={ckpt}", f"--script={ROOT / 'gpt.py'}"], capsys)
    assert "written by train_mdlm.py" in message


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminal")
def test_gpt_is_watched_in_a_terminal(gpt_ckpt):
    out, status = run_in_terminal([f"--ckpt={gpt_ckpt}", "--watch", "--prompt=def ", "--seed=2"])
    assert status == 0
    (final,) = sample.load(gpt_ckpt, device="cpu").generate(prompt="def ", seed=2)
    assert sample.printable(final) in re.sub(r"\x1b\[[0-9;]*m", "", out).replace("\r\n", "\n")


# ------------------------------------------------------------------------------ block


@pytest.fixture(scope="session")
def block_ckpt(folder):
    return train(folder, "block", train_block, steps=12, ema=0.5, block_len=8)


@pytest.fixture(scope="session")
def block_lm(block_ckpt):
    return sample.load(block_ckpt, device="cpu")


class BlockScripted:
    """A model that is sure of its tokens: row i ends after ENDS[i] of them."""

    ENDS = (6, 99, 41)

    def predict(self, tokens, positions, rows=None, n_query=None, attend=None):
        ends = torch.tensor(self.ENDS)[rows // n_query]
        sure = torch.where(positions[rows % n_query] == ends, 0, 97)[:, None]
        return torch.where(torch.arange(256) == sure, 0.0, -1e4)


@pytest.mark.parametrize("how", [
    {}, {"steps": 3}, {"order": "ancestral"}, {"threshold": 0.1}, {"remask": "conf", "steps": 6},
    {"order": "margin", "steps": 4, "top_k": 50}, {"remask": "loop"}], ids=str)
def test_blocks_in_every_order(block_lm, how, monkeypatch):
    """Any length, prompts that end inside a block, a sample whatever the batch."""
    monkeypatch.setattr(block_lm, "model", copy.deepcopy(block_lm.model).double())
    monkeypatch.setattr(block_lm.tokenizer, "bos_id", -1)  # no end
    how = {"length": 75, "prompt": "def café(", **how}
    many = block_lm.generate(n=3, seed=4, **how)
    assert block_lm.generate(n=1, seed=4, **how) == many[:1] and len(set(many)) == 3
    known, is_known = block_lm.canvas_for_prompt("def café(", 75)
    sampler = sample.Sampler(**{k: v for k, v in how.items() if k not in ("length", "prompt")})
    (batch,) = block_lm.batches(known, is_known, sampler, n=3, seed=4)
    assert [len(row) for row in batch.tokens] == [75] * 3
    assert all(row[:10] == list("def café(".encode()) for row in batch.tokens)
    assert batch.nfe <= 9 * (sampler.steps or 8)
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * 32 * 256)
    assert block_lm.generate(n=3, seed=4, **how) == many


def test_conf_remasking_knows_what_each_block_drew(block_lm, monkeypatch):
    """psi is the probability of the token that stands there, a block after another."""
    monkeypatch.setattr(block_lm.tokenizer, "bos_id", -1)
    see, seen = sample.Remask.see, []

    def look(self, tokens, nfe):
        fixed, was_mask, log_probs = self.drawn
        fixed = fixed.clone()
        see(self, tokens, nfe)
        row, at = fixed.nonzero().unbind(1)
        place = self.block * 8 + at
        inside = place < tokens.shape[1]
        rank = was_mask.flatten().cumsum(0).view(was_mask.shape) - 1
        for r, a, p in zip(row[inside], at[inside], place[inside], strict=True):
            expected = log_probs[rank[r, a], tokens[r, p]].exp().item()
            assert self.psi[r, a].item() == pytest.approx(expected, rel=1e-5)
            seen.append(p.item())

    monkeypatch.setattr(sample.Remask, "see", look)
    block_lm.generate(n=2, length=30, prompt="def def de", remask="conf", steps=5)
    assert set(seen) == set(range(10, 30))


def test_blocks_end_with_the_document(block_lm, monkeypatch, capsys):
    monkeypatch.setattr(block_lm, "model", BlockScripted())
    assert block_lm.generate(n=3, length=60) == ["a" * 6, "a" * 60, "a" * 41]
    known, is_known = block_lm.canvas_for_prompt("ab", 60)
    (batch,) = block_lm.batches(known, is_known, sample.Sampler(), n=3, seed=0)
    assert [len(row) for row in batch.tokens] == [6, 60, 41]
    monkeypatch.setattr(sample, "load", lambda *args: block_lm)
    sample.main(["--prompt=ab", "--n=1", "--length=60", "--watch"])
    out = capsys.readouterr().out
    assert "---" not in out  # what fills the row behind its end is no document
    assert "\nabaaaa\n" in out and "NFE 6," in out and "first_hitting in blocks of 8" in out


def test_blocks_score_any_length(block_lm):
    """A text of 1 token has one term: the model's own log-probability of it in a masked block."""
    with torch.no_grad():
        logits = block_lm.model(torch.full((1, 8), 256), torch.full((1, 8), 256))[0, 0]
    expected = -logits.log_softmax(-1)[ord("d")].item()
    score = block_lm.score("d", draws=2)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.nats_stderr == pytest.approx(0, abs=1e-5)
    text = "def café(self):\n    return self.name\n" + "x" * 6  # 1.4 windows, 5.6 blocks
    score = block_lm.score(text)
    assert 0 < score.nats_stderr < score.nats / 10 and score.n_tokens == len(text.encode())
    assert score.nats == pytest.approx(block_lm.score(text, draws=64).nats, abs=5 * (
        score.nats_stderr))


@pytest.mark.parametrize("flag", ["--infill=a ___ b", "--refine=0.5"])
def test_blocks_refuse_what_needs_the_right_context(block_ckpt, flag, capsys):
    err = refused([f"--ckpt={block_ckpt}", "--length=16", flag], capsys)
    assert flag.partition("=")[0] + ":" in err and "checkpoint of train_mdlm" in err


# ------------------------------------------------------------------------------ sedd


@pytest.fixture(scope="session", params=["absorb", "uniform"])
def sedd_ckpt(folder, request):
    return train(folder, request.param, train_sedd, steps=12, ema=0.5, graph=request.param,
                 cond_dim=8)


@pytest.mark.parametrize("how", [
    {}, {"steps": 5}, {"steps": 9, "order": "euler"}, {"steps": 5, "temperature": 0.5},
    {"top_k": 9, "top_p": 0.9, "steps": 4}], ids=str)
def test_scores_write(sedd_ckpt, how, monkeypatch):
    """A prompt, an infill; a sample whatever the batch; as many passes as were asked for."""
    lm = sample.load(sedd_ckpt, device="cpu")
    many = lm.generate(n=5, length=24, prompt="def café(", seed=4, **how)
    assert all(text.startswith("def café(") for text in many) and len(set(many)) == 5
    assert lm.generate(n=2, length=24, prompt="def café(", seed=4, **how) == many[:2]
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * 24 * 256)
    assert lm.generate(n=5, length=24, prompt="def café(", seed=4, **how) == many
    (filled,) = lm.infill("def ___(x):", blank=6, **how)
    assert filled.startswith("def ") and filled.endswith("(x):")
    (batch,) = lm.batches(*lm.canvas_for_prompt("ab", 20), sample.Sampler(**how), n=2, seed=0)
    assert batch.nfe == how.get("steps", 20) or lm.graph == "absorb"


def test_scores_on_the_command_line(sedd_ckpt, capsys):
    sample.main([f"--ckpt={sedd_ckpt}", "--length=30", "--steps=8", "--watch"])
    out = capsys.readouterr().out
    assert "train_sedd" in out and "tweedie, entropy" in out
    shown = [int(x) for x in re.findall(r"^\[(\d+)% after", out, re.M)]
    assert shown == sorted(shown) and 1 <= len(shown) <= 3 and 25 <= shown[0]
    sample.main([f"--ckpt={sedd_ckpt}", "--length=30", "--steps=8", "--order=euler"])
    assert "euler, entropy" in capsys.readouterr().out


def test_scores_bound_a_text(sedd_ckpt):
    """The bound of a text in two windows, one of them short."""
    lm = sample.load(sedd_ckpt, device="cpu")
    score = lm.score(TEXT[:40], draws=64)
    assert score.n_bytes == 40 and 0 < score.nats_stderr < score.nats / 4
    # Hardly trained: near ln 256 nats a byte, and a letter that it saw often costs less.
    assert 2 < score.nats / 40 < 8


@pytest.mark.parametrize("flag", ["--order=confidence", "--order=first_hitting", "--threshold=0.5",
                                  "--remask=loop", "--refine=0.5"])
def test_scores_refuse_what_masks_can(sedd_ckpt, flag, capsys):
    err = refused([f"--ckpt={sedd_ckpt}", "--length=16", flag], capsys)
    assert f"{flag.partition('=')[0]}" in err and "checkpoint of train_mdlm" in err


def test_orders_of_scores_are_refused_elsewhere(ckpt, capsys):
    err = refused([f"--ckpt={ckpt}", "--order=euler"], capsys)
    assert "--order=euler: train_mdlm" in err and "checkpoint of train_sedd" in err


# ------------------------------------------------------------------------------ race


RACE_TABLE = r"^(\w+) +(\d+) +(\d+\.\d\d) +(\d+)  (\d\.\d\d) bits, (.+)$"


@pytest.fixture
def race(ckpt, gpt_ckpt, block_ckpt):
    return [f"--ckpt={ckpt}", f"--race={gpt_ckpt},{block_ckpt}", "--device=cpu", "--length=30"]


def test_a_race_counts_what_each_model_does_alone(race, lm, gpt_lm, block_lm, capsys, monkeypatch):
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * 30 * 256)  # two samples a batch
    sample.main([*race, "--n=3", "--prompt=def ", "--steps=5", "--seed=4", "--temperature=0.5"])
    out, err = capsys.readouterr()
    assert err == "" and "3 samples (the first is shown) of 30 tokens, float32 on cpu" in out
    rows = re.findall(RACE_TABLE, out, re.M)
    names = ["train_mdlm", "gpt", "train_block"]
    assert [row[0] for row in rows] == names
    how = ["ancestral", "left to right", "ancestral in blocks of 8"]
    assert [row[5] for row in rows] == how
    for racer, row in zip((lm, gpt_lm, block_lm), rows, strict=True):
        monkeypatch.setattr(racer, "stops", False)
        steps = {} if racer.is_ar else {"steps": 5}
        sampler = sample.Sampler(temperature=0.5, **steps)
        alone = list(racer.batches(*racer.canvas_for_prompt("def ", 30), sampler, n=3, seed=4))
        assert int(row[1]) == sum(batch.nfe for batch in alone)
        texts = [tokens for batch in alone for tokens in batch.tokens]
        entropy = sum(sample.entropy_bits(tokens[4:]) for tokens in texts) / 3
        assert float(row[4]) == pytest.approx(entropy, abs=0.006)
        assert f"--- {row[0]}\n{racer.tokenizer.decode(texts[0])}\n" in out
        seconds, rate = float(row[2]), int(row[3])
        assert (seconds - 0.006) * (rate - 0.51) <= 3 * 26 <= (seconds + 0.006) * (rate + 0.51)


class Slow:
    """A model whose passes take a second each, on a clock that nothing else moves but looks at the
    clock of the screen, an hour each."""

    def __init__(self, model, monkeypatch):
        self.model, self.now = model, 0
        monkeypatch.setattr(sample.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(sample.time, "monotonic", self.look)

    def __call__(self, *args, **kwargs):
        self.now += 1
        return self.model(*args, **kwargs)

    def look(self):
        self.now += 3600
        return self.now


def test_the_clock_of_a_race_counts_forward_passes_alone(lm, monkeypatch, capsys):
    """Neither the warm-up nor the pictures; and each picture shows the state of its time."""
    monkeypatch.setattr(lm, "model", Slow(lm.model, monkeypatch))
    monkeypatch.setattr(sample, "is_terminal", lambda stream: True)
    monkeypatch.setattr(lm, "stops", True)
    racer = sample.Racer(lm, sample.Options(prompt="def "), 30)
    racer.run()
    assert "train_mdlm:  50%, 13 passes" in capsys.readouterr().err
    assert sorted({frame.seconds for frame in racer.frames}) == list(range(27))
    for now, n in ((0, 0), (0.9, 0), (5, 5), (5.9, 5), (26, 26), (99, 26)):
        lines = [re.sub(r"\x1b\[\d*m", "", line) for line in racer.column(now, 40)]
        assert lines[:2] == ["train_mdlm", f"{n} passes, {n / 26:.0%}"]
        assert lines[2].startswith(f"{min(now, 26):.1f} s, ")
        text = "\n".join(lines[4:])
        assert text.count("░") == 26 - n and text.startswith("def ")


def test_the_end_of_a_document_stops_no_race(gpt_lm, block_lm, monkeypatch):
    for lm, model in ((gpt_lm, Scripted()), (block_lm, BlockScripted())):
        monkeypatch.setattr(lm, "model", model)
        monkeypatch.setattr(lm, "stops", True)
        racer = sample.Racer(lm, sample.Options(prompt="ab"), 30)
        racer.run()
        assert len(racer.first) == 30 and racer.frames[-1].n_written == 28
        lm.stops = True
        assert lm.generate(prompt="ab", length=30) == ["abaaaa"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminal")
def test_a_race_in_a_terminal_fills_columns(race, lm, gpt_lm, monkeypatch):
    race[1] = race[1].partition(",")[0]
    argv = [*race, "--prompt=def ", "--seed=2"]
    out, status = run_in_terminal(argv, columns=63)
    assert status == 0
    pictures = out[out.index("real time") :].split("\x1b[J")
    for picture in pictures[1:-1]:
        assert picture.count("\n") <= 11  # never higher than the terminal
    plain = re.sub(r"\x1b\[[0-9;]*m", "", pictures[-1]).replace("\r\n", "\n")
    picture, table = re.split(r"\n\n +passes", plain)
    rows = [line.split("\x1b[31G │ ") for line in picture.split("\n")]
    for side, racer in enumerate((lm, gpt_lm)):
        name, passes, rate, _, *text = (row[side] for row in rows)
        assert (name, passes) == (racer.name, "26 passes, 100%")
        assert re.fullmatch(r"\d+\.\d s, \d+ tokens/s", rate)
        monkeypatch.setattr(racer, "stops", False)
        final = racer.generate(prompt="def ", length=30, seed=2)[0]
        expected = sample.lines_of([(final, None)], 30)
        assert text == expected + [""] * (len(text) - len(expected))
    assert [row[0] for row in re.findall(RACE_TABLE, table, re.M)] == ["train_mdlm", "gpt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminal")
def test_a_race_in_a_narrow_terminal_and_its_interrupt(race):
    race[1] = race[1].partition(",")[0]
    out, status = run_in_terminal(race, columns=50)  # 23 cells each
    assert status == 0 and "│" not in out and "--- gpt" in out
    out, status = run_in_terminal([*race, "--n=50"], interrupt="│".encode(), columns=51)
    assert status == 130 and "Traceback" not in out and "entropy" not in out
    assert "\x1b[?25l" not in out  # the cursor stays visible


def test_a_race_with_a_score(sedd_ckpt, gpt_ckpt, capsys):
    sample.main([f"--ckpt={sedd_ckpt}", f"--race={gpt_ckpt}", "--device=cpu", "--length=30",
                 "--steps=6"])
    rows = re.findall(RACE_TABLE, capsys.readouterr().out, re.M)
    assert [(row[0], row[5]) for row in rows] == [("train_sedd", "tweedie"),
                                                  ("gpt", "left to right")]
    assert int(rows[0][1]) <= 6


def test_mistakes_in_a_race(ckpt, gpt_ckpt, block_ckpt, tmp_path, capsys):
    state = torch.load(gpt_ckpt, weights_only=True)
    table = [bytes([i]) for i in range(256)]
    table[1] = b""
    other = saved_tokenizer("byte", table, bos_id=1)
    torch.save({**state, "meta": other}, tmp_path / "other.pt")
    torch.save(state, tmp_path / "gpt.pt")
    for first, others, flags, message in (
        (ckpt, "", [], "--race=: "),
        (ckpt, f"{gpt_ckpt},", [], "commas"),
        (ckpt, tmp_path / "none.pt", [], "none.pt: no such"),
        (ckpt, ckpt.parent, [], "twice"),
        (ckpt, f"{gpt_ckpt},{gpt_ckpt}", [], "twice"),
        (ckpt, tmp_path / "other.pt", [], "other.pt are not those of"),
        (ckpt, gpt_ckpt, ["--infill=a ___ b"], "--infill and --race"),
        (ckpt, gpt_ckpt, ["--score=ab"], "--score and --race"),
        (ckpt, gpt_ckpt, ["--length=33"], "--length=33: train_mdlm"),
        (block_ckpt, gpt_ckpt, ["--length=33"], "--length=33: gpt"),
        (ckpt, block_ckpt, ["--refine=0.5"], "--refine: train_block"),
        (gpt_ckpt, tmp_path / "gpt.pt", ["--steps=4"], "--steps: gpt"),
    ):
        argv = [f"--ckpt={first}", f"--race={others}", "--device=cpu", *flags]
        assert message in refused(argv, capsys)


def test_import_does_nothing():
    code = "import sys, sample, json; print(json.dumps([m for m in sys.modules if 'mdlm' in m]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (json.loads(done.stdout), done.stderr) == ([], "")
