"""Orders, remasking, warps, tokens, checkpoints, the command line and the terminal of sample.py."""
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F
from runs import (
    ROOT,
    Result,
    Touch,
    assert_refused,
    finish,
    launch,
    make_data,
    train_tiny,
    write_meta,
    write_shard,
)
from runs import one_thread as one_thread
from toys import Z_LIMIT, Joint, chi_square_z, correlated, seeded, with_samplers

import gpt
import sample
import train_block
import train_mdlm
import train_sedd

RANKED = ("random", "confidence", "entropy", "margin")
MERGES = [b"th", b"the", b" the", "é".encode(), b"  ", b"\n\n"]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TABLE = [bytes([i]) for i in range(256)] + MERGES + [b""]
MODELS = {  # kind: script, data, flags
    "mdlm": (train_mdlm, "byte", ["--ema=0.5"]),
    "words": (train_mdlm, "bpe", []),
    "block": (train_block, "byte", ["--block_len=8"]),
    "absorb": (train_sedd, "bpe", ["--graph=absorb"]),
    "uniform": (train_sedd, "bpe", ["--graph=uniform"]),
    "gpt": (gpt, "byte", []),
    "gpt_words": (gpt, "bpe", []),
}

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data of bytes and of words."""
    home = tmp_path_factory.mktemp("sample")
    (home / "byte").mkdir()
    (home / "bpe").mkdir()
    make_data(home / "byte")
    numbers = torch.randint(97, 262, (5000,), generator=seeded()).tolist()
    write_shard(home / "bpe" / "train_000001.bin", numbers, 2)
    write_shard(home / "bpe" / "val_000000.bin", numbers, 2)
    write_meta(home / "bpe", TABLE, bos_id=262, pattern=PATTERN)
    return home

@pytest.fixture(scope="module")
def ckpts(home):
    """{name: checkpoint} of MODELS, hardly trained."""
    for name, (script, data, flags) in MODELS.items():
        result = train_tiny(*flags, "--steps=12", f"--data={home / data}",
                            f"--out={home / 'out' / name}", script=script)
        assert result.status == 0, result
    return {name: home / "out" / name / "ckpt.pt" for name in MODELS}

@pytest.fixture(scope="module")
def lms(ckpts):
    return {name: sample.load(path, device="cpu") for name, path in ckpts.items()}

def run(*argv):
    """The command line in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sample.main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code or 0
    return Result(status, out.getvalue(), err.getvalue())

class Noisy:
    """Logits that depend on the position and on what stands before it."""
    def __init__(self, n_values=7):
        self.n_values = n_values
        self.table = 2 * torch.randn(64, n_values, generator=seeded(3))

    def __call__(self, xt, sigma, rows):
        seen = (xt * (xt != self.n_values)).cumsum(1)
        return self.table[(torch.arange(xt.size(1)) + 5 * seen) % 64].flatten(0, 1)[rows]

def fill(model, n_rows, choose, steps, *, T, V, is_known=None, **how):
    known, cfg = torch.zeros(n_rows, T, dtype=torch.int64), train_mdlm.Config(vocab_size=V)
    is_known = known.bool() if is_known is None else is_known
    generate = with_samplers(train_mdlm).generate
    return generate(model, cfg, known, is_known, steps=steps, gen=seeded(), choose=choose, **how)

@pytest.mark.parametrize("kind", ["cap:0.01", "rescale:0.02", "loop:0.01"])
def test_remasking_with_the_exact_posterior_keeps_the_joint(kind):
    joint, again = Joint(correlated(2, 3).sqrt(), copies=200), []

    def choose(log_probs, is_mask, **how):
        after = sample.remasking(kind)(log_probs, is_mask, **how)
        again.append((after & ~is_mask).sum().item())
        return after

    out = fill(joint, 10, choose, 300, T=joint.seq_len, V=2)
    assert sum(again) > joint.seq_len  # of 10 rows: it does remask
    assert abs(chi_square_z(joint.counts(out.tokens), joint.p)) < Z_LIMIT

@pytest.mark.parametrize(("kind", "steps"), [
    ("cap", 40), ("cap:1", 40), ("rescale:0.5", 40), ("rescale:1", 40), ("loop:0.1", 100)])
def test_remasking_follows_the_schedule_and_stays_below_its_bound(kind, steps, n=20_000):
    choose, is_mask = sample.remasking(kind), torch.ones(1, n, dtype=torch.bool)
    name, _, eta = kind.partition(":")
    for i in range(steps):
        u = torch.rand(1, n, generator=seeded(i), dtype=torch.float64)
        after, is_fixed = choose(None, is_mask, step=i, steps=steps, u=u, psi=None), ~is_mask
        rate = (after & is_fixed).sum() / is_fixed.sum().clamp(min=1)
        is_mask, t = after, 1 - i / steps
        if name == "loop":  # from .55 down to .05 it remasks, and .9 of the tokens are fixed
            expected = 0.1 * (0.055 < t < 0.545)
            assert 0.045 < t < 0.055 or 0.545 < t < 0.555 or abs(rate - expected) < 0.02
            assert i != 60 or abs((~is_mask).float().mean() - 0.9) < 0.01
            continue
        assert abs((~is_mask).float().mean() - (i + 1) / steps) < 0.02
        bound = min(1, (1 - (i + 1) / steps) / (i / steps)) if i else 1
        sigma = min(float(eta or 0.008), bound) if name == "cap" else float(eta) * bound
        assert abs(rate - (sigma if i else 0)) < 0.06
    assert not is_mask.any()

def test_conf_remasks_by_the_probability_that_a_token_was_drawn_with():
    n, p = 4000, torch.tensor([0.98, 0.02])
    psi, none = p.double().repeat(n // 2)[None], torch.zeros(1, n, dtype=torch.bool)
    counts = torch.zeros(n)
    for i in range(4000):  # at step 49 of 100 sigma_max is 1: n tokens share one remasking
        u = torch.rand(1, n, generator=seeded(i), dtype=torch.float64)
        counts += sample.remasking("conf:1")(None, none, step=49, steps=100, u=u, psi=psi)[0]
    assert counts.sum() / 4000 == pytest.approx(1, abs=0.1)
    ratio = counts[1::2].sum() / counts[::2].sum()
    assert ratio == pytest.approx(math.exp(0.98 - 0.02), rel=0.15)

@pytest.mark.parametrize("order", RANKED)
@pytest.mark.parametrize(("pace", "share"), [
    ("even", lambda x: x), ("cosine", lambda x: 1 - math.cos(math.pi * x / 2)),
    ("cosine2", lambda x: math.sin(math.pi * x / 2) ** 2)])
def test_paces(order, pace, share):
    """After pass i of 8 at least that share of every row is fixed, and hardly more."""
    free = torch.tensor([48, 13, 7])
    seen = [free]
    fill(Noisy(), 3, sample.ordered(order, pace=pace), 8, T=48, V=7,
         is_known=torch.arange(48) >= free[:, None],
         watch=lambda tokens, nfe: seen.append((tokens == 7).sum(1)))
    for i, left in enumerate(seen):
        more = free - left - free * share(i / 8)
        assert (more > -1e-6).all() and (more < (2 if pace == "even" else 3)).all()
    assert not left.any()

@pytest.mark.parametrize("order", RANKED)
def test_thresholds(order):
    choose = sample.ordered(order, 0.6)

    def checked(log_probs, is_mask, **how):
        fixed = is_mask & ~choose(log_probs, is_mask, **how)
        sure = torch.zeros_like(is_mask)
        sure[is_mask] = log_probs.exp().amax(1) > 0.6
        assert (fixed | ~sure).all() and ((fixed & ~sure).sum(1) <= 1).all()
        assert (fixed.sum(1) >= is_mask.any(1)).all()
        return is_mask & ~fixed

    assert 1 < fill(Noisy(), 4, checked, None, T=12, V=7).nfe < 12

def test_orders_pick_what_they_are_named_after():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.55, 0.44, 0.01], [0.7, 0.15, 0.15]])
    is_mask = torch.tensor([[False, True, True, True, True, False]])
    u = torch.tensor([[1.0, 0.3, 0.8, 0.1, 0.5, 1.0]], dtype=torch.float64)
    # Largest top probability; least entropy (nats: .69 .95 .74 .82); widest margin; largest u.
    for order, first in (("confidence", 4), ("entropy", 1), ("margin", 4), ("random", 2)):
        after = sample.ordered(order)(p.log(), is_mask, step=0, steps=None, u=u)
        assert (is_mask & ~after).nonzero()[:, 1].tolist() == [first], order

@pytest.mark.parametrize("nucleus", ["inclusive", "exclusive"])
def test_warps_by_definition(nucleus):
    """Temperature, then the k likeliest, then the nucleus, with the token that crosses it or not.
    """
    logits = torch.randn(50, 11, generator=seeded(1)) * 2

    def probs(**how):
        return sample.make_warp(nucleus=nucleus, **how)(logits.log_softmax(-1)).exp()

    for how in (dict(temperature=2.0, top_k=4, top_p=0.7), dict(temperature=0.5), dict(top_k=99),
                dict(top_k=3), dict(top_p=0.7), dict(top_p=0.0)):
        p = (logits / how.get("temperature", 1)).softmax(-1)
        for row, warped in zip(p, probs(**how), strict=True):
            best = row.argsort(descending=True)[:how.get("top_k", 11)]
            share = row[best] / row[best].sum()
            ends = share.cumsum(0) - (share if nucleus == "inclusive" else 0)
            top_p = how.get("top_p", 2)
            is_in = ends < top_p if nucleus == "inclusive" else ends <= top_p
            n = max(1, int(is_in.sum()))
            expected = torch.zeros(11).index_put((best[:n],), share[:n] / share[:n].sum())
            torch.testing.assert_close(warped, expected)
    for low in (0.0, 1e-30, 1e-320):
        torch.testing.assert_close(probs(temperature=low), torch.eye(11)[logits.argmax(-1)])

HOWS = {
    "mdlm": [*({"order": order, "steps": 5} for order in RANKED), {"order": "first_hitting"},
             {"temperature": 0.7, "top_k": 50, "top_p": 0.9}, {"threshold": 0.1},
             {"remask": "conf:0.5", "steps": 20}, {"refine": "0.4:2"},
             {"corrector": "0.3:2"}, {"corrector": "0.3:1:least", "order": "entropy", "steps": 4},
             {"block_length": 8, "length": 60, "order": "confidence_weighted", "steps": 3},
             {"block_length": 8, "length": 60, "threshold": 0.1, "cache": "prefix"},
             {"block_length": 7, "corrector": "0.3:2", "steps": 4, "cache": "dual"}],
    "block": [{}, {"steps": 3}, {"order": "ancestral"}, {"corrector": 0.2},
              {"remask": "conf", "steps": 6}, {"order": "margin", "steps": 4, "length": 75}],
    "absorb": [{}, {"steps": 5}, {"steps": 9, "order": "euler"}],
    "uniform": [{}, {"steps": 5, "temperature": 0.5}, {"steps": 9, "order": "euler"}],
    "gpt": [{}, {"temperature": 0.9, "top_k": 50}],
}

@pytest.mark.parametrize("kind", HOWS)
def test_a_sample_does_not_depend_on_the_others_and_keeps_what_is_given(kind, lms, monkeypatch):
    lm, prompt = lms[kind], "def café("
    # In fp32 the rounding, which depends on the size of the batch, decides between near equals.
    for name in ("model", "net"):
        monkeypatch.setattr(lm, name, copy.deepcopy(lm.model).double())
    for how in HOWS[kind]:
        how = {"length": 24, "prompt": prompt, "seed": 4, **how}
        many = lm.generate(n=5, **how)
        assert lm.generate(n=2, **how) == many[:2] and len(set(many)) == 5
        assert all(text.startswith(prompt) for text in many)
        assert lm.generate(n=2, **{**how, "seed": 5}) != many[:2]
        with monkeypatch.context() as patch:  # small batches: what fits into the memory
            patch.setattr(sample, "BATCH_NUMBERS", 2 * 24 * 262)
            assert lm.generate(n=5, **how) == many

def test_infill(lms):
    for name in ("mdlm", "words", "absorb", "uniform"):
        for text in lms[name].infill("def ___(x):\n__ ____\n", blank=[3, 5], n=3, steps=4):
            assert re.fullmatch(r"def .*\(x\):\n__ .*\n", text, re.S)
    canvas = lms["mdlm"].canvas(
        sample.Options(infill="def ___(x):\n____\n", blank="3,5", length=30))
    assert canvas.known[canvas.is_known].tolist() == list(b"def (x):\n\n") and canvas.lead == 0
    free = [[0] * 4, [1] * 3, [0] * 5, [1] * 5, [0], [1] * 12]
    assert (~canvas.is_known).long().tolist() == [sum(free, [])]
    text, = lms["mdlm"].infill(r"a\_b\_\_\_c\____", blank=2)  # \_ is an underscore and no blank
    assert text.startswith("a_b___c_") and len(lms["mdlm"].tokenizer.encode(text)) >= 10

def test_a_score_of_several_windows(lms):
    """The sum over windows; its error is that of other seeds."""
    text = "def caf(self):\n    return self.name\n" + "x" * 10
    score = lms["mdlm"].score(text, draws=60)
    parts = [lms["mdlm"].score(part, draws=60, seed=1) for part in (text[:32], text[32:])]
    error = math.hypot(*(x.nats_stderr for x in (score, *parts)))
    assert abs(score.nats - sum(part.nats for part in parts)) < 5 * error
    assert 0 < score.nats_stderr < 0.05 * score.nats and score.n_tokens == score.n_bytes == 46
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / 46)
    other = [lms["mdlm"].score(text, draws=6, seed=s).nats for s in range(1, 11)]
    assert 0.4 < torch.tensor(other).std().item() / (score.nats_stderr * 10**0.5) < 2.2
    exact, total = lms["gpt"].score(text), 0.0
    for window in torch.tensor(list(text.encode())).split(32):
        x = torch.cat((torch.tensor([256]), window[:-1]))
        with torch.no_grad():
            law = lms["gpt"].model(x[None])[0].log_softmax(-1)
        total -= law.gather(1, window[:, None]).sum().item()
    assert exact.nats == pytest.approx(total, rel=1e-5) and exact.nats_stderr == 0
    score = lms["uniform"].score(text, draws=16)
    assert 0 < score.nats_stderr < score.nats / 4 and 2 < score.nats / 46 < 9

def test_both_kinds_of_weights(ckpts, lms):
    state = torch.load(ckpts["mdlm"], weights_only=True)
    for lm, part in ((sample.load(ckpts["mdlm"], weights="raw", device="cpu"), "model"),
                     (lms["mdlm"], "ema")):
        for name, p in lm.model.named_parameters():
            assert torch.equal(p, state[part][name])
    half = sample.load(ckpts["gpt"], device="cpu", dtype="bf16")
    assert half.dtype == torch.bfloat16 and half.generate(length=9) and half.score("abc").nats

class Sure:
    """A model that writes 'a', and the end of a document as token ENDS[row] of a row."""
    ENDS = (6, 99, 9)

    def __call__(self, x, *rest):
        rows = rest[-1]
        at = rows % x.shape[1]
        sure = torch.where(at == torch.tensor(self.ENDS)[rows // x.shape[1]], 0, 97)
        return torch.where(torch.arange(256) == sure[:, None], 0.0, -1e4)

@pytest.mark.parametrize("kind", ["gpt", "block"])
def test_a_document_ends(kind, lms, monkeypatch):
    monkeypatch.setattr(lms[kind], "net", Sure())
    texts = lms[kind].generate(n=3, length=20)  # position 0 begins the document
    assert texts == ["a" * 5, "a" * 20, "a" * 8] and texts.ended == [True, False, True]
    assert lms[kind].generate(n=3, length=20, start="anywhere") == ["a" * 6, "a" * 20, "a" * 9]
    assert lms[kind].generate(n=2, length=20, prompt="ab") == ["abaaaa", "ab" + 18 * "a"]

@pytest.mark.parametrize("kind", ["mdlm", "absorb", "uniform", "gpt", "block"])
def test_a_document_begins(kind, lms):
    """Where there is no prompt, position 0 holds the token that begins one; it is not shown. A
    text as long as the context has no room for it."""
    lm = lms[kind]
    canvas = lm.canvas(sample.Options(length=9))
    assert canvas.known[:, 0].tolist() == [lm.tokenizer.bos_id] and canvas.lead == 1
    assert canvas.is_known.sum() == 1 and canvas.known.size(1) == 10
    (((row, _),), _), = lm.batches(canvas, sample.Options(length=9), stops=False)
    assert len(row) == 9 and lm.canvas(sample.Options(length=9, start="anywhere")).lead == 0
    if kind != "block":
        assert len(lm.generate(length=lm.cfg.seq_len, seed=1).tokens[0]) <= lm.cfg.seq_len
        with pytest.raises(ValueError, match="--length=33"):
            lm.generate(length=33)

def test_several_prompts_and_stops(lms, ckpts, tmp_path):
    lm, prompts = lms["gpt"], ["def ", "a longer prompt", "x"]
    texts = lm.generate(prompts, n=2, length=30, seed=3)
    assert [text[:len(p)] for text, p in zip(texts[::2], prompts, strict=True)] == prompts
    assert len(texts.tokens) == 6 and texts.nfe > 0
    assert [lm.tokenizer.decode(tokens) for tokens in texts.tokens] == texts
    assert lm.generate("def ", n=2, length=30, seed=3) == texts[:2]
    (tmp_path / "p.jsonl").write_text('"def "\n{"prompt": "a longer prompt"}\n"x"\n')
    out = run(f"--ckpt={ckpts['gpt']}", f"--prompts={tmp_path / 'p.jsonl'}", "--n=2",
              "--length=30", "--seed=3", "--device=cpu").out
    assert out == "".join(f"{text}\n\n" for text in texts)
    for name in ("words", "absorb", "uniform", "block", "gpt_words"):
        texts = lms[name].generate(prompts, length=30, steps=3 * (name != "gpt_words"))
        assert [text[:len(p)] for text, p in zip(texts, prompts, strict=True)] == prompts

@pytest.mark.parametrize(("kind", "length"), [("words", 30), ("gpt", 30), ("block", 60)])
def test_a_sample_ends_before_a_text(kind, length, lms):
    how = dict(length=length, n=4, seed=1)
    free = lms[kind].generate("def ", **how)
    stop = [next(c for c in text[8:] if " " < c < "~") for text in free]
    cut = lms[kind].generate("def ", **how, stop=stop)
    for text, whole in zip(cut, free, strict=True):
        assert text == whole[:min(at for x in stop if (at := whole.find(x, 4)) >= 0)]
    assert all(cut.ended) and (cut.nfe < free.nfe) == (kind != "words")  # no pass behind the last

def test_names_of_published_packages(lms, ckpts):
    lm = sample.load_model(ckpts["mdlm"], device="cpu")
    texts = sample.sample(lm, "def ", seq_len=20, confidence_threshold=0.1)
    assert texts == lm.generate("def ", length=20, threshold=0.1)
    assert lm.generate(corrector_frac=0.2) == lm.generate(corrector="0.2:1:random")
    with pytest.raises(ValueError, match="did you mean --temperature"):
        lm.generate(temperatur=1)

def test_ties_are_broken_by_the_row(lms):
    """On an empty canvas all masks look alike, up to rounding."""
    for order in ("confidence", "entropy", "margin"):
        firsts = set()
        for seed in range(8):
            seen = []
            canvas = lms["mdlm"].canvas(sample.Options(length=24, start="anywhere"))
            list(lms["mdlm"].batches(canvas, sample.Options(seed=seed, order=order),
                                     lambda tokens, nfe, seen=seen: seen.append(tokens.clone())))
            firsts.add((seen[0] != 256).nonzero()[0, 1].item())
        assert len(firsts) > 4, order

def exact_nats(losses, tokens, regions):
    """-log p of the positions in regions under the order-agnostic bound, over all masks of each
    (2110.02037, eq. 8); losses(xt, x0) -> (T,) nats of every position."""
    total, x0 = 0.0, torch.tensor([tokens])
    for region in regions:
        for k in range(1, len(region) + 1):
            sets = list(itertools.combinations(region, k))
            for hidden in map(list, sets):
                xt = x0.index_fill(1, torch.tensor(hidden), 256)
                total += losses(xt, x0)[hidden].sum().item() / len(sets) / k
    return total

@pytest.mark.parametrize("given", ["", "def ca"])
@pytest.mark.parametrize("kind", ["mdlm", "block", "absorb"])
def test_a_score_is_the_bound(kind, given, lms):
    lm, text = lms[kind], "def cafe:"[len(given):]
    regions = [range(len(given), 8), [8]]  # blocks of 8
    regions = regions if kind == "block" else [range(len(given), 9)]

    def losses(xt, x0):
        sigma = -torch.log1p(-(xt == 256).sum(1) / 10)
        with torch.no_grad():
            if kind == "block":
                logits = lm.model(*(F.pad(x, (0, 7), value=256) for x in (xt, x0)))[0, :9]
            elif kind == "mdlm":
                logits = lm.model(xt, sigma)[0]
            else:  # score entropy: for a score that is no law, more than -log p
                logits = lm.model(xt.where(xt != 256, 263), sigma)[0] + sigma.expm1().log()
                return logits.exp().sum(1) - 1 - logits.gather(1, x0.T)[:, 0]
        return -logits.log_softmax(-1).gather(1, x0.T)[:, 0]

    exact = exact_nats(losses, list((given + text).encode()), regions)
    score = lm.score(text, given=given, draws=200)
    assert abs(score.nats - exact) < 5 * score.nats_stderr and score.nats_stderr < exact / 20
    long = lm.score("xyz" * 20, given=given * 9)  # over several windows
    assert long.n_tokens == 60 and 2 < long.nats / 60 < 9

def test_an_exact_conditional_score(lms):
    a, b = "the quick brown f", "ox jumps over the lazy dog and away"
    rest = lms["gpt"].score(b, given=a)
    whole, first = lms["gpt"].score(a + b), lms["gpt"].score(a)
    assert rest.nats == pytest.approx(whole.nats - first.nats, rel=1e-5)
    assert rest.n_bytes == len(b) and rest.nats_stderr == 0
    assert 0 < lms["uniform"].score(b, given=a).nats < 1.2 * lms["uniform"].score(a + b).nats

def tokenizer(name="bpe:262", spare=0, **meta):
    words = [word.decode("latin-1") for word in TABLE]
    meta = {"tokenizer": name, "bos_id": 0 if name == "byte" else 262, "token_bytes": words,
            "pattern": PATTERN, **meta}
    return sample.Tokenizer(meta, 256 if name == "byte" else 263 + spare)

@pytest.mark.parametrize("name", ["byte", "bpe:262"])
@pytest.mark.parametrize("text", ["", "the theory of the café", "日本 🙂\n\ttab", "<|endoftext|>"])
def test_tokens_round_trip(name, text):
    tokens = tokenizer(name).encode(text)
    assert tokenizer(name).bos_id not in tokens
    assert tokenizer(name).decode(tokens) == text

def test_decoding():
    t, e = tokenizer(spare=2), list("é".encode())
    assert t.encode("the cafés")[0] == 257  # merges apply
    assert t.decode([*e, 262, 97, 263]) == "é<|endoftext|>a"  # 263: a spare id
    assert t.decode([97, e[0], 98]) == "a\ufffdb" and t.decode([97, e[0]]) == "a\ufffd"
    spans = t.spans([97, e[0], e[1], 265, 99], "kknmn")
    assert [x for x in spans if x[0]] == [("a", "k"), ("é", "n"), ("░", "m"), ("c", "n")]
    assert t.encode("a\udcffb") == t.encode("a\ufffdb")

@pytest.mark.parametrize("name", ["words", "absorb", "gpt_words"])
def test_a_space_begins_what_is_written(name, lms):
    """The first token after the text is one that begins with its last space."""
    lm = lms[name]
    for prompt, known in (("the ", "the"), ("a  ", "a "), ("a\n\n", "a\n")):
        canvas = lm.canvas(sample.Options(prompt=prompt, length=9))
        assert canvas.known[canvas.is_known].tolist() == lm.tokenizer.encode(known), prompt
        (_, at), = canvas.begins.nonzero().tolist()
        allowed = canvas.allowed[1]
        assert at == canvas.is_known.sum() and 1 < allowed.sum() < len(allowed)
        for how in ({}, {"temperature": 0.5, "steps": 3}, {"top_k": 3}):
            how = {} if lm.kind == "gpt" and "steps" in how else how
            for rows, _ in lm.batches(canvas, sample.Options(n=20, **how)):
                assert all(allowed[row[at]] for row, _ in rows)
    if lm.kind != "gpt":
        canvas = lm.canvas(sample.Options(infill="a ___ b ___ ", blank="1,2", length=9))
        assert canvas.begins.nonzero()[:, 1].tolist() == [1, 4, 6]
        text, = lm.infill("a ___ b", blank=1, refine="0.9" if name == "words" else "")
        assert text.startswith("a ") and text.endswith(" b")
    for prompt in ("the", "a\n", "", "x\u3000"):
        assert not lm.canvas(sample.Options(prompt=prompt, length=9)).begins.any()
    assert not lms["mdlm"].canvas(sample.Options(prompt="a ")).begins.any()  # nothing longer

def test_the_newest_checkpoint_or_the_shipped_one(ckpts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--length=9", "--steps=3", "--device=cpu")
    assert result.status == 0 and "models/mdlm.golf: train_mdlm" in result.err
    lm = sample.load(sample.SHIPPED[0], device="cpu")
    assert lm.generate(length=9, steps=3) == [result.out[:-1]]
    for age, name in enumerate("abc"):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(ckpts["gpt"], tmp_path / "out" / name / "ckpt.pt")
        os.utime(tmp_path / "out" / name / "ckpt.pt", (10**9 - age, 10**9 - age))
    assert sample.load(device="cpu").summary.startswith("out/a/ckpt.pt")
    assert "out/b" in sample.load("out/b", device="cpu").summary

FORKS = {  # script, edit
    "other layers": (train_mdlm, "F.relu(self.up(x)).square()", "F.gelu(self.up(x))"),
    "no predict": (gpt, "predict(", "forecast("),
    "no predict in blocks": (train_block, "predict(", "forecast("),
    "another forward": (gpt, "return self.predict(x, ", "return 2 * self.predict(x, "),
}

@pytest.mark.parametrize("what", FORKS)
def test_a_fork_is_sampled_by_its_script(what, home, tmp_path):
    script, old, new = FORKS[what]
    text = (ROOT / f"{script.SCRIPT}.py").read_text()
    assert old in text
    fork = tmp_path / "my_fork.py"
    fork.write_text(text.replace(old, new))
    data, flags = home / "byte", ["--block_len=8"] if script is train_block else []
    module = sample.load_script(fork)
    assert train_tiny(f"--data={data}", f"--out={tmp_path / 'run'}", "--steps=3", *flags,
                      script=module).status == 0
    path = tmp_path / "run" / "ckpt.pt"
    assert_refused(run(f"--ckpt={path}"), "my_fork.py", "--script=PATH")
    lm = sample.load(path, script=fork, device="cpu")
    assert "no cache" in lm.summary  # its forward decides
    assert len(lm.generate(n=2, length=16)) == 2
    if script is train_mdlm:
        assert_refused(run(f"--ckpt={path}", f"--script={fork}", "--block_length=8",
                           "--cache=dual"), "--cache=dual", "my_fork")

def test_broken_and_foreign_files(ckpts, tmp_path):
    good = ckpts["mdlm"]
    state = torch.load(good, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-5000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({**state, "extra": Touch(tmp_path / "ran")}, tmp_path / "code.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save({**state, "meta": {"tokenizer": "byte"}}, tmp_path / "mute.pt")
    torch.save({**state, "script": "other"}, tmp_path / "other.pt")
    state["model"].popitem()
    torch.save({**state, "ema": None}, tmp_path / "shape.pt")
    for path in [*tmp_path.glob("*.pt"), tmp_path / "none.pt"]:
        assert_refused(run(f"--ckpt={path}"), path.name)
    assert not (tmp_path / "ran").exists()
    fork = tmp_path / "fork.py"
    assert_refused(run(f"--ckpt={good}", f"--script={fork}"), str(fork))
    for text, words in (("1/0", "ZeroDivisionError"), ("", "load_checkpoint")):
        fork.write_text(text)
        assert_refused(run(f"--ckpt={good}", f"--script={fork}"), words)

def test_hub_names(tmp_path):
    for name in ("hf:", "hf:a", "hf:a//c"):
        assert_refused(run(f"--ckpt={name}"), "hf:OWNER/NAME")
    process = launch(ROOT / "sample.py", "--ckpt=hf:nobody/nothing", HF_HUB_OFFLINE="1",
                     HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(tmp_path))
    assert_refused(finish(process), "hf:nobody/nothing: could not be downloaded")

BAD_FLAGS = {  # flags, and what stands in the line
    "mdlm": """--lenght=3 --length?; prompt --prompt; --length value; --n=two --n=two; --n=0 --n=0
        --refine=2 --refine; --corrector=.1:0 EVERY; --corrector=.1:2:lest least
        --order=confidense confidence; --order=first_hitting --steps=5 --steps=5
        --remask=lop loop; --temperature=nan --temperature=nan; --top_p=1.5 --top_p=1.5
        --cache=dual --block_length; --cache=double prefix,
        --remask=cap:2 --remask=cap:2; --remask=cap --order=margin --remask=cap
        --device=abacus --device=abacus; --order=euler train_mdlm; --weights=best --weights=best
        --prompt=abcdef --length=6 --length=6; --infill=defx ___; --save=no/where.json folder
        --infill=a___b --prompt=c --prompt; --infill=a___b --blank=2,3 --blank=2,3
        --infill=a___b --blank=0 --blank=0; --infill=a___b --blank=60 62; --score= --score
        --given=a --score; --race --ckpt; --score=none.txt file; --score=a --given=b.txt b.txt
        --prompts=none none; --score_file=a/none file; --prompt=none.md file; --prompt=a/b file""",
    "gpt": """--order=random --order; --steps=8 --steps; --corrector=0.5 --corrector
        --block_length=8 --cache=dual train_mdlm
        --infill=a___b --infill""",
    "block": """--infill=a___b --infill; --refine=0.5 train_mdlm
        --block_length=8 --cache=prefix train_mdlm""",
    "absorb": "--order=margin --order=margin; --threshold=0.5 train_mdlm; --remask=loop --remask",
}

@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_mistakes_end_in_one_line(kind, ckpts):
    for case in BAD_FLAGS[kind].replace("\n", ";").split(";"):
        *flags, word = case.split()
        assert_refused(run(f"--ckpt={ckpts[kind]}", *flags), word)

def test_stdout_is_the_text(ckpts, lms):
    text = run("--help").out
    assert all(f"    {name}: " in text for name in sample.Options.__dataclass_fields__)
    argv = [f"--ckpt={ckpts['mdlm']}", "--device=cpu", "--prompt=de ", "--seed=3", "--length=20"]
    status, out, err = run(*argv, "--order=entropy")
    (text,) = lms["mdlm"].generate("de ", length=20, seed=3, order="entropy")
    assert (status, out) == (0, text + "\n") and "\x1b" not in err
    assert "NFE 17, " in err and "entropy (mode-seeking)" in err
    _, out, err = run(*argv, "--n=2", "--steps=17")
    both = lms["mdlm"].generate("de ", length=20, seed=3, n=2, steps=17)
    assert out == "".join(f"{text}\n\n" for text in both) and "--- sample 2 of 2" in err

SAVED = {  # name: the model and its flags
    "prompt": ("mdlm", "--prompt=de --n=3"), "steps": ("mdlm", "--steps=5"),
    "remask": ("mdlm", "--remask=cap:0.4 --steps=20"), "refine": ("mdlm", "--refine=0.5:2"),
    "corrector": ("mdlm", "--corrector=0.3"),
    "infill": ("words", "--infill=de___f___ --blank=3,4"), "space": ("words", "--prompt=th "),
    "uniform": ("uniform", "--steps=6"), "absorb": ("absorb", "--n=2"), "gpt": ("gpt", "--n=2"),
    "block": ("block", "--steps=3 --n=2"), "blocks": ("mdlm", "--block_length=5 --n=2"),
    "cache": ("mdlm", "--block_length=5 --cache=dual --infill=de___f___ --blank=3,4"),
    "stop": ("gpt_words", "--stop=h --n=9")}

def replayed(record, tokens):
    """(the tokens of a sample after its last frame, its text)"""
    row = dict(record["known"])
    for number, milliseconds, changes in record["frames"]:
        assert 0 < number <= record["nfe"] and 0 < milliseconds <= 1000.1 * record["seconds"]
        assert changes and all(0 <= at < record["length"] for at, _ in changes)
        row |= dict(changes)
    row = [row[at] for at in range(record["length"])]
    return row, b"".join(tokens[str(i)].encode("latin-1") for i in row).decode(errors="replace")

@pytest.mark.parametrize("what", SAVED)
def test_a_trajectory_ends_in_its_sample(what, ckpts, tmp_path):
    name, flags = SAVED[what]
    argv = [f"--ckpt={ckpts[name]}", *flags.split(), "--length=20", "--seed=2", "--device=cpu"]
    out = run(*argv, f"--save={tmp_path / 'a.json'}").out
    assert run(*argv, f"--save={tmp_path / 'a.jsonl'}").out == out
    (whole,), lines = ([json.loads(x) for x in (tmp_path / f"a.{end}").read_text().splitlines()]
                       for end in ("json", "jsonl"))
    assert (whole["format"], whole["mask"]) == (1, -1)
    about, *samples = lines
    assert about["checkpoint"] == hashlib.sha256(ckpts[name].read_bytes()).hexdigest()
    assert about["tokenizer"] in ("byte", "bpe:test") and about["seed"] == 2
    for i, (record, line) in enumerate(zip(whole["runs"], samples, strict=True)):
        row, text = replayed(record, whole["tokens"])
        assert row == line["tokens"] and text == line["text"] and text in out
        assert record["sample"] == line["i"] == i and record["parameters"] > 1000
        assert record["script"] == about["script"] and record["sampler"] == about["sampler"]
        assert record["name"] == name and record["nfe"] == line["nfe"]
    used = {str(i) for line in samples for i in line["tokens"]}
    again = {str(c[1]) for r in whole["runs"] for frame in r["frames"] for c in frame[2]}
    assert whole["tokens"].keys() == (used | again) - {"-1"}
    assert ("-1" in again) == (what == "remask" or "-1" in again and what == "refine")
    assert any(line["ended"] for line in samples) == (what == "stop")

def test_a_race_is_saved(ckpts, tmp_path):
    race = (f"--ckpt={ckpts['mdlm']}", f"--race={ckpts['gpt']}", "--length=20", "--n=2")
    out = run(*race, f"--save={tmp_path / 'a.json'}").out
    whole = json.loads((tmp_path / "a.json").read_text())
    assert [r["name"] for r in whole["runs"]] == ["mdlm", "mdlm", "gpt", "gpt"]
    assert all(replayed(r, whole["tokens"])[1] in out for r in whole["runs"][::2])
    run(*race, f"--save={tmp_path / 'a.svg'}")
    heads = [e.text for e in ElementTree.parse(tmp_path / "a.svg").iter() if e.get("class") == "h"]
    assert heads == ["masked diffusion, first-hitting", "autoregressive, left to right"]

def test_files_and_what_looks_like_them(ckpts, lms, tmp_path):
    text = "the café\n" * 4
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "gbk.txt").write_bytes("中文字符".encode("gbk") * 9)
    ckpt = f"--ckpt={ckpts['gpt']}"
    nats = f"= {lms['gpt'].score(text).nats:.2f} +- 0.00 nats"
    result = run(ckpt, f"--score={tmp_path / 'a.txt'}")
    assert nats in result.out and "(40 tokens, 40 bytes; exact" in result.out
    result = run(ckpt, "--score=a few words", f"--given={tmp_path / 'a.txt'}")
    nats = lms["gpt"].score("a few words", given=text).nats
    assert f"= {nats:.2f} +- 0.00 nats" in result.out and "(11 tokens" in result.out
    gbk = f"--score={tmp_path / 'gbk.txt'}"
    assert_refused(run(ckpt, gbk), "gbk.txt", "--encoding")
    nats = f"= {lms['gpt'].score('中文字符' * 9).nats:.2f} "
    assert nats in run(ckpt, gbk, "--encoding=gbk").out
    (tmp_path / "b.txt").write_text("the café")
    result = run(ckpt, f"--prompt_file={tmp_path / 'b.txt'}", "--length=20")
    assert result.out.startswith("the café")
    (tmp_path / "p.jsonl").write_text('"a"\n{"text": 3}\n')
    assert_refused(run(ckpt, f"--prompts={tmp_path / 'p.jsonl'}"), "--prompts=")

def test_outputs(ckpts, tmp_path):
    """UTF-8 in a pipe whatever the locale; a reader that leaves; a full disk."""
    command = f"{sys.executable} {ROOT / 'sample.py'} --ckpt={ckpts['words']} --prompt=é{{}}"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}

    def shell(text):
        return subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True,
                              timeout=60)

    done = shell(command.format(" --length=4 >/dev/full"))
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    done = shell(command.format(" --length=9 --n=20000 2>err | head -1; echo ${PIPESTATUS[0]}"))
    assert done.stdout.startswith("é".encode()) and done.stdout.endswith(b"\n141\n")
    assert "Traceback" not in (tmp_path / "err").read_text()

def in_terminal(argv, interrupt=None, columns=40):
    """Run on a pseudo terminal -> (output, exit status); send an interrupt once a text shows."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", COLUMNS=str(columns), LINES="12")
        os.execv(sys.executable, [sys.executable, str(ROOT / "sample.py"), *map(str, argv)])
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

def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n")

def test_watching_in_a_terminal_draws_in_place(ckpts, lms):
    argv = [f"--ckpt={ckpts['mdlm']}", "--watch", "--n=2", "--prompt=def ", "--seed=2",
            "--remask=loop", "--steps=400"]
    out, status = in_terminal(argv)
    final = lms["mdlm"].generate(n=2, prompt="def ", seed=2, remask="loop", steps=400)
    pictures = out.split("\x1b[J")
    assert status == 0 and len(pictures) >= 3
    for picture in pictures[1:-1]:
        assert picture.count("\n") <= 11  # never higher than the terminal
        up = re.search(r"\r(?:\x1b\[(\d+)A)?$", picture)  # back to where the picture began
        assert int(up[1] or 0) == picture.count("\n")
    assert all(sample.printable(text) in plain(pictures[-1]) for text in final)
    assert pictures[-1].count("\x1b[1m") == 8  # what was given stands out, of both

def test_an_interrupt_ends_quietly(ckpts):
    argv = [f"--ckpt={ckpts['mdlm']}", "--watch", "--n=4000", "--steps=100000"]
    out, status = in_terminal(argv, interrupt=b" passes")
    assert status in (-2, 130) and "Traceback" not in out and "\x1b[?25l" not in out

def test_text_cannot_steer_the_terminal(ckpts, tmp_path):
    assert sample.printable("a\x1b[2Jb\x07\tc\r\nd") == r"a\x1b[2Jb\x07    c" "\nd"
    lines = sample.lines_of(
        [("abc", "known"), ("defg\nh", None), ("░" * 7, "mask"), ("日本日", None)], 5)
    assert [plain(line) for line in lines] == ["abcde", "fg", "h░░░░", "░░░日", "本日"]
    state = torch.load(ckpts["gpt"], weights_only=True)
    state["model"]["head.weight"].zero_()
    state["model"]["head.weight"][27] = 1  # ESC, or anything
    torch.save({**state, "ema": None}, tmp_path / "ckpt.pt")
    out, status = in_terminal([f"--ckpt={tmp_path}", "--n=9", "--length=9"])
    assert status == 0 and r"\x1b" in out and not re.search(r"\x1b(?!\[\d*[mJAG])", out)

RACE_TABLE = r"^(\w+) +(\d+) +(\d+\.\d\d) +(\d+)  (\d\.\d\d) nats, (.+)$"

def test_a_race_counts_what_each_model_does_alone(ckpts, lms, monkeypatch):
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2 * 30 * 256)  # two samples a batch
    names = ["mdlm", "gpt", "block"]
    result = run(f"--ckpt={ckpts['mdlm']}", f"--race={ckpts['gpt']},{ckpts['block']}", "--n=3",
                 "--length=30", "--prompt=def ", "--steps=5", "--seed=4", "--temperature=0.5")
    rows = re.findall(RACE_TABLE, result.out, re.M)
    assert [row[0] for row in rows] == ["train_mdlm", "gpt", "train_block"]
    assert [row[5] for row in rows] == ["ancestral", "left to right", "ancestral in blocks of 8"]
    for name, row in zip(names, rows, strict=True):
        lm = lms[name]
        steps = {} if name == "gpt" else {"steps": 5}
        opts = sample.Options(prompt="def ", length=30, n=3, seed=4, temperature=0.5, **steps)
        alone = list(lm.batches(lm.canvas(opts), opts, stops=False))
        assert int(row[1]) == sum(nfe for _, nfe in alone)
        assert f"--- {row[0]}\n{lm.tokenizer.decode(alone[0][0][0][0])}\n" in result.out
        assert all(len(tokens) == 30 for rows, _ in alone for tokens, _ in rows)
