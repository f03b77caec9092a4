"""The autoregressive baseline against exact oracles: likelihood, sampler, cache; and mutants.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import dataclasses
import itertools
import math
import re
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from runs import byte_table, keep_checkpoints, n_weights, presets, write_meta
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import Iid, Joint, correlated

import gpt
import train_mdlm

V, T = 11, 12  # of the small network
SWITCHES = {
    "plain": {},
    "unet": {"unet": True, "n_layer": 3},
    "grouped queries": {"n_kv_head": 2},
    "all": {"mlp": "swiglu", "unet": True, "tied": True, "softcap": 3.0, "n_kv_head": 1,
            "dropout": 0.1, "value_residual": True},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class LeftToRight:
    """The exact conditionals of a toy distribution, each given what stands before it alone."""

    def __init__(self, toy, seq_len):
        self.toy, self.seq_len = toy, seq_len

    def __call__(self, x, rows=None, cache=None):
        B, S = x.shape
        mask_id = self.toy.mask_id
        assert (x[:, 0] == mask_id).all() and (x[:, 1:] < mask_id).all()
        flat = torch.arange(B * S) if rows is None else rows
        at = flat % S  # position that each asked output predicts
        seen = F.pad(x[:, 1:], (0, self.seq_len - S + 1), value=mask_id)[flat // S]  # (R, T)
        context = torch.where(torch.arange(self.seq_len) < at[:, None], seen, mask_id)
        if isinstance(self.toy, Joint):
            logits = self.toy.log_conditional(context)[torch.arange(len(at)), at].float()
        else:
            logits = self.toy(context)[:, 0]
        return logits.view(B, S, -1) if rows is None else logits


def small_model(module=gpt, seed=0, **names):
    """A network that uses every parameter: its zero-initialised matrices are moved."""
    cfg = module.Config(**{"vocab_size": V, "seq_len": T, "n_layer": 2, "n_head": 4, "n_embd": 32,
                           **names})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = module.Model(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model.eval(), cfg


def tokens(n_rows, seq_len=T, seed=1, n_values=V):
    return torch.randint(n_values, (n_rows, seq_len), generator=seeded(seed))


def nll(module, model, x0, cfg):
    noise = module.draw_noise(cfg, len(x0), seeded(), bound=True)
    assert len(noise[0]) == len(x0)
    return module.nelbo_fn(model, x0, noise, cfg)


# ----------------------------------------------------------------------------- likelihood


def check_likelihood_sums_to_one(module):
    """Over all sequences, the probabilities of a network sum to one: nothing leaks, T are scored.
    """
    model, cfg = small_model(module, vocab_size=3, seq_len=4)
    x0 = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.no_grad():
        p = (-nll(module, model, x0, cfg).double()).exp()
    assert p.max() > 2 / 81  # it is no uniform distribution
    assert math.isclose(p.sum(), 1, abs_tol=1e-5)


def check_likelihood_token_by_token(module):
    """The chain rule, each token from a pass over what stands before it."""
    model, cfg = small_model(module)
    x0 = tokens(3)
    by_token = torch.zeros(3)
    with torch.no_grad():
        for i in range(T):
            x = torch.cat((torch.full((3, 1), V), x0[:, :i]), 1)
            log_probs = model(x)[:, -1].log_softmax(-1)
            by_token -= log_probs[torch.arange(3), x0[:, i]]
        torch.testing.assert_close(nll(module, model, x0, cfg), by_token, rtol=1e-5, atol=1e-5)
        loss = module.loss_fn(model, x0, module.draw_noise(cfg, 3, seeded()), cfg)
        assert math.isclose(loss, by_token.sum() / (3 * T), rel_tol=1e-5)


def check_likelihood_of_toys(module):
    """With exact conditionals it is the likelihood of the joint, or of independent tokens."""
    joint, iid = Joint(correlated(3, 3), copies=2), Iid([0.7, 0.2, 0.1])
    for toy, x0 in ((joint, joint.draw(50, seeded(2))), (iid, iid.draw(50, 6, seeded(3)))):
        cfg = module.Config(vocab_size=3, seq_len=6)
        model = LeftToRight(toy, 6)
        assert (nll(module, model, x0, cfg) - toy.nll(x0)).abs().max() < 1e-5
        assert torch.equal(nll(module, model, x0[:1], cfg), nll(module, model, x0, cfg)[:1])


def check_causality(module):
    """Another token changes the outputs from the next position on, and none before."""
    for names in SWITCHES.values():
        model, _ = small_model(module, **names)
        x = F.pad(tokens(3)[:, :-1], (1, 0), value=V)
        changed = x.clone()
        changed[1, 7] = (x[1, 7] + 1) % V
        with torch.no_grad():
            moved = (model(changed) - model(x)).abs().amax(-1) > 1e-6  # (3, T)
        assert not moved[[0, 2]].any() and not moved[1, :7].any() and moved[1, 7:].all()


def check_attention(module):
    """The CPU's strips and the call that long contexts and GPUs take: the same outputs."""
    for n_kv_head in (2, 4):
        q, k, v = (torch.randn(2, n, T, 8, generator=seeded()) for n in (4, n_kv_head, n_kv_head))
        ours = module.attend(q, k, v, None)
        with mock.patch.object(module, "CPU_SHORT", 0):
            torch.testing.assert_close(ours, module.attend(q, k, v, None))


# ----------------------------------------------------------------------------- sampler


CHECKS = [check_likelihood_sums_to_one, check_likelihood_token_by_token, check_likelihood_of_toys,
          check_causality, check_attention]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(gpt)


# ----------------------------------------------------------------------------- mutants

MUTANTS = {
    "attention sees what lies ahead": (
        "triu(1 + i * q[0].size(2))", "triu(T)",
        (check_attention, check_causality, check_likelihood_token_by_token)),
    "the input is not shifted": (
        "return F.pad(x0[:, :-1], (1, 0), value=cfg.vocab_size)", "return x0",
        (check_likelihood_sums_to_one, check_likelihood_token_by_token, check_likelihood_of_toys)),
    "the first token is not scored": (
        "return ce.view(x0.shape).sum(1)", "return ce.view(x0.shape)[:, 1:].sum(1)",
        (check_likelihood_sums_to_one, check_likelihood_of_toys)),
    "the loss is a sum": (
        "return nelbo_fn(model, x0, noise, cfg).mean() / x0.size(1)",
        "return nelbo_fn(model, x0, noise, cfg).mean()",
        (check_likelihood_token_by_token,)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, checks = MUTANTS[name]
    source = Path(gpt.__file__).read_text(encoding="utf-8")
    assert source.count(snippet) == 1, f"to be found once in gpt.py: {snippet}"
    module = types.ModuleType("mutant_of_gpt")
    module.__file__ = gpt.__file__
    exec(compile(source.replace(snippet, replacement), "mutant", "exec"), module.__dict__)
    for check in checks:
        with pytest.raises(AssertionError):
            check(module)


# ----------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", ["", *presets(gpt)])
def test_a_preset_has_the_size_of_its_twin(preset):
    """Parameters as in train_mdlm, the same shape and tokens; a pass traced without data."""
    argv = [f"--preset={preset}"] if preset else []
    sizes, shapes = [], []
    for module in (gpt, train_mdlm):
        cfg = module.make_config(argv)[0]
        n_values = 50257 if preset in ("", "fineweb_124m") else 65
        cfg = dataclasses.replace(cfg, vocab_size=n_values)
        module.validate(cfg, 1)
        with FakeTensorMode():
            model = module.Model(cfg)
            sizes.append(sum(p.numel() for p in model.parameters()))
            if module is gpt:
                x0 = torch.zeros(cfg.micro_batch, cfg.seq_len, dtype=torch.int64)
                module.loss_fn(model, x0, None, cfg).backward()
                assert all(p.grad is not None for p in model.parameters())
        shapes.append([getattr(cfg, name) for name in (
            *module.SHAPE_FIELDS, "seq_len", "steps", "batch_tokens", "data", "optimizer", "lr")])
    assert shapes[0] == shapes[1]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


def test_flops_of_gpt2_small():
    """Counted by hand: 12 layers of 12 D^2 weights but for SwiGLU's rounding, head, causal half."""
    cfg = dataclasses.replace(gpt.make_config(["--preset=fineweb_124m"])[0], vocab_size=50257)
    with FakeTensorMode():
        flops = gpt.flops_per_token(cfg, n_weights(gpt.Model(cfg)))
    by_hand = 6 * (12 * 12 * 768**2 + 50257 * 768) + 6 * 12 * 768 * 1024
    assert abs(flops / by_hand - 1) < 0.01


# ----------------------------------------------------------------------------- runs

TINY = ("--seq_len=32", "--batch_tokens=256", "--micro_batch=8", "--n_layer=1", "--n_head=2",
        "--n_embd=32", "--val_tokens=512", "--device=cpu", "--dtype=fp32", "--compile=0",
        "--steps=30", "--eval_every=10", "--ckpt_every=10", "--log_every=10", "--dropout=0.1",
        "--ema=0.9")


def run(script, *flags):
    """-> (status, what it printed)."""
    status, out, err = runs.train(*flags, script=script)
    return status, out + err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes of random words."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = [rng.integers(97, 123, rng.integers(2, 7)) for _ in range(20)]
    text = np.concatenate([np.append(words[i], 32) for i in rng.integers(0, 20, 3000)])
    header = np.zeros(256, "<i4")
    for name, part in (("train_000001", text[:9000]), ("val_000000", text[9000:10_000])):
        header[:4] = 20240520, 1, len(part), 1
        (folder / f"{name}.bin").write_bytes(header.tobytes() + part.astype(np.uint8).tobytes())
    write_meta(folder, byte_table(256), tokenizer="byte")
    return folder


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with keep_checkpoints(gpt, out.with_name("half.pt")):
        return out, *run(gpt, *TINY, f"--data={data}", f"--out={out}")


def evaluations(text):
    return re.findall(r"val_nll:(\S+) bpb:(\S+) ppl:(\S+)", text)


def test_a_run_learns(data, whole_run):
    out, status, text = whole_run
    assert status == 0, text
    values = [float(v.split("+-")[0]) for v, _, _ in evaluations(text)]
    assert len(values) == 3 and values[-1] < values[0] < 5.55 and values[-1] < 3.2
    assert "masked_mean" not in text
    status, again = run(gpt, "--eval_only=1", f"--init_from={out}/ckpt.pt")
    assert status == 0 and evaluations(again) == evaluations(text)[-1:]


def test_a_run_goes_on_bit_for_bit(data, whole_run, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(whole_run[0].with_name("half.pt").read_bytes())
    status, text = run(gpt, "--resume=1", f"--out={tmp_path}")
    assert status == 0 and evaluations(text)[-1] == evaluations(whole_run[2])[-1]
    a, b = (gpt.load_checkpoint(str(p / "ckpt.pt")) for p in (tmp_path, whole_run[0]))
    assert a["step"] == b["step"] == 30 and a["script"] == "gpt"
    for kind in ("model", "ema"):
        assert all(torch.equal(x, b[kind][name]) for name, x in a[kind].items())


@pytest.mark.parametrize(("flag", "message"), [
    ("--cond_dim=16", "--cond_dim=16: "), ("--val_draws=4", "--val_draws=4: "),
    ("--estimator=bernoulli", "unknown flag --estimator")])
def test_flags_of_diffusion_are_refused(data, tmp_path, flag, message):
    status, text = run(gpt, *TINY, flag, f"--data={data}", f"--out={tmp_path / 'run'}")
    assert status == 2 and text.count("\n") == 1 and message in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("here, there", [(gpt, train_mdlm), (train_mdlm, gpt)])
def test_the_other_scripts_checkpoint_is_refused(data, whole_run, tmp_path, here, there):
    path = whole_run[0] / "ckpt.pt"
    if there is train_mdlm:
        state = torch.load(path, weights_only=True)
        path = tmp_path / "ckpt.pt"
        torch.save({**state, "script": "train_mdlm"}, path)
    flags = (f"--init_from={path}", f"--data={data}", "--seq_len=32", "--batch_tokens=256",
             "--micro_batch=8", "--device=cpu", f"--out={tmp_path / 'run'}")
    status, text = run(here, *flags)
    assert status == 2 and text.count("\n") == 1
    assert f"a checkpoint of {there.SCRIPT}.py" in text
