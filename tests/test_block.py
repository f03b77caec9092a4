"""Block diffusion against exact oracles: mask, noise, bound, samplers, cache; and mutants.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import contextlib
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
from runs import byte_table, keep_checkpoints, n_weights, write_meta
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import Iid, Joint, chi_square_z, correlated

import gpt
import train_block
import train_mdlm

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
V, T, L = 11, 12, 4  # of the small network
Z_LIMIT = 5.0  # a correct program fails one z-test in about 10**6; the seeds are fixed besides
SWITCHES = {
    "plain": {},
    "grouped queries, unet": {"n_kv_head": 2, "unet": True, "n_layer": 3},
    "all, documents": {"mlp": "swiglu", "unet": True, "tied": True, "softcap": 3.0, "n_kv_head": 1,
                       "dropout": 0.1, "doc_mask": True, "bos_id": 3, "value_residual": True},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Blocks:
    """The exact conditionals of a toy distribution: a block's given what is known of it in xt, and
    x0 before it."""

    def __init__(self, toy, seq_len, block_len):
        self.toy, self.seq_len, self.block_len = toy, seq_len, block_len

    def __call__(self, xt, x0, rows=None, cache=None):
        (B, S), size, mask_id = xt.shape, self.block_len, self.toy.mask_id
        assert S % size == 0
        rows = torch.arange(B * S) if rows is None else rows
        row, at = rows // S, (rows % S)[:, None]
        groups = getattr(self.toy, "n", 1)
        place = torch.arange(-(-max(S, self.seq_len) // groups) * groups)
        xt, x0 = (F.pad(x, (0, len(place) - S), value=mask_id)[row] for x in (xt, x0))
        own, earlier = (f(place // size, at // size) for f in (torch.eq, torch.lt))
        context = torch.where(own, xt, torch.where(earlier, x0, mask_id))  # (R, S)
        assert not (context[earlier] == mask_id).any()
        logits = self.toy.log_conditional(context) if isinstance(self.toy, Joint) else (
            self.toy(context))
        return logits[torch.arange(len(rows)), at[:, 0]].float()


def config(module=train_block, **names):
    return module.Config(**{"vocab_size": V, "seq_len": T, "block_len": L, "n_layer": 2,
                            "n_head": 4, "n_embd": 32, **names})


def small_model(module=train_block, seed=0, **names):
    """A network that uses every parameter: its zero-initialised matrices are moved."""
    cfg = config(module, **names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = module.Model(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model.eval(), cfg


def tokens(n_rows, seq_len=T, seed=1, n_values=V):
    return torch.randint(n_values, (n_rows, seq_len), generator=seeded(seed))


def bound(module, model, x0, cfg, seed=0):
    noise = module.draw_noise(cfg, len(x0), seeded(seed), bound=True)
    with torch.no_grad():
        return module.nelbo_fn(model, x0, noise, cfg)


# ----------------------------------------------------------------------------- mask


def moved(model, xt, x0, name, at, value=None):
    """(T,) which outputs another token of one copy changes."""
    changed = {"xt": xt.clone(), "x0": x0.clone()}
    changed[name][0, at] = (changed[name][0, at] + 1) % V if value is None else value
    with torch.no_grad():
        difference = model(**changed) - model(xt, x0)
    assert (difference[1] == 0).all()  # the other row
    return difference[0].abs().amax(-1) > 1e-6


def check_mask(module):
    """A noised token moves its own block, a clean one later blocks, and neither any other."""
    for names in SWITCHES.values():
        model, _ = small_model(module, **names)
        x0 = tokens(2, n_values=3)  # without bos_id
        xt = torch.where(torch.rand(2, T, generator=seeded()) < 0.5, V, x0)
        block = torch.arange(T) // L
        for at in range(T):
            assert torch.equal(moved(model, xt, x0, "xt", at), block == at // L)
            assert torch.equal(moved(model, xt, x0, "x0", at), block > at // L)


def check_clean_half(module):
    """A clean token changes later blocks also by way of clean ones; never by way of earlier ones:
    the outputs of a block are those of a window that ends with it."""
    for names in SWITCHES.values():
        model, _ = small_model(module, **names)
        x0 = tokens(3, n_values=5)
        xt = torch.where(torch.rand(3, T, generator=seeded()) < 0.5, V, x0)
        with torch.no_grad():
            whole = model(xt, x0)
            for end in (L, 2 * L):
                part = model(xt[:, :end], x0[:, :end])
                assert (part - whole[:, :end]).abs().max() < 1e-5


def check_documents(module):
    """A document does not see those before it, and where it begins is no secret given away."""
    model, _ = small_model(module, doc_mask=True, bos_id=3)
    x0 = tokens(2, n_values=3)
    xt = torch.full_like(x0, V)
    block = torch.arange(T) // L
    assert torch.equal(moved(model, xt, x0, "x0", 5, 3), block > 1)  # its beginning moves
    x0[:, 5] = 3  # in the second block
    assert not moved(model, xt, x0, "x0", 5, 4)[:8].any()
    for at in range(8):  # the second block sees the first; the third what follows the beginning
        expected = (block == 1) & (at < L) | (block == 2) & (at >= 5)
        assert torch.equal(moved(model, xt, x0, "x0", at), expected)
        assert torch.equal(moved(model, xt, x0, "xt", at), block == at // L)


def check_likelihood_sums_to_one(module):
    """block_len=1: over all sequences, the probabilities of a network sum to one."""
    for names in ({}, {"doc_mask": True, "bos_id": 1}):
        model, cfg = small_model(module, vocab_size=3, seq_len=4, block_len=1, **names)
        x0 = torch.tensor(list(itertools.product(range(3), repeat=4)))
        p = (-bound(module, model, x0, cfg).double()).exp()
        assert p.max() > 2 / 81  # it is no uniform distribution
        assert math.isclose(p.sum(), 1, abs_tol=1e-5)


def check_likelihood_token_by_token(module):
    """block_len=1: the chain rule, each token from a pass over a window that ends with it."""
    model, cfg = small_model(module, block_len=1)
    x0, by_token = tokens(3), torch.zeros(3)
    with torch.no_grad():
        for i in range(T):
            logits = model(torch.full((3, i + 1), V), x0[:, :i + 1])[:, -1]
            by_token += F.cross_entropy(logits, x0[:, i], reduction="none")
    torch.testing.assert_close(bound(module, model, x0, cfg), by_token, rtol=1e-5, atol=1e-5)


def check_one_block_is_mdlm(module):
    """block_len=seq_len: logits, bound and loss of train_mdlm, same weights and noise."""
    for names in ({}, {"n_kv_head": 2, "unet": True, "tied": True, "value_residual": True}):
        model, cfg = small_model(module, block_len=T, t_min=0.0, t_max=1.0, **names)
        other = train_mdlm.Model(train_mdlm.Config(**{
            "vocab_size": V, "seq_len": T, "n_layer": 2, "n_head": 4, "n_embd": 32,
            "value_residual": cfg.value_residual, **names}))
        other.load_state_dict(model.state_dict())
        x0 = tokens(4)
        for how in ({"bound": True}, {}):
            noise = module.draw_noise(cfg, 4, seeded(), **how)
            same = train_mdlm.Noise(noise.level[:, 0], None, noise.weight[:, 0], noise.score)
            xt = module.corrupt(x0, noise, cfg)
            assert torch.equal(xt, train_mdlm.corrupt(x0, same, other.cfg))
            with torch.no_grad():
                assert (model(xt, x0) - other(xt, None)).abs().max() < 1e-5
                for name in ("nelbo_fn", "loss_fn"):
                    a = getattr(module, name)(model, x0, noise, cfg)
                    b = getattr(train_mdlm, name)(other, x0, same, other.cfg)
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def flex_on_cpu(module):
    """Its backward pass works on CPUs, too, where it is not compiled; a guard says otherwise."""
    import torch.nn.attention.flex_attention as flex

    guard, chosen = getattr(flex, "_validate_device", None), module.use_flex
    if guard is None:
        pytest.skip("this torch guards FlexAttention's backward pass on CPUs in another way")
    try:
        flex._validate_device = lambda *args: None
        module.use_flex = lambda device: True
        yield
    finally:
        flex._validate_device, module.use_flex = guard, chosen


def gradients(model, loss, x0, noise, cfg):
    model.zero_grad()
    value = loss(model, x0, noise, cfg)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


def check_flex_attention(module):
    """FlexAttention, the dense mask and the CPU's strips: the same outputs and gradients."""
    for names in SWITCHES.values():
        model, cfg = small_model(module, **{**names, "dropout": 0.0})
        x0, results = tokens(4, n_values=5), []
        noise = module.draw_noise(cfg, 4, seeded())
        xt = module.corrupt(x0, noise, cfg)
        for how in (contextlib.nullcontext(), mock.patch.object(module, "CPU_SHORT", 0),
                    flex_on_cpu(module)):
            with how:
                results.append([model(xt, x0), *gradients(model, module.loss_fn, x0, noise, cfg)])
        for ours, *others in zip(*results, strict=True):
            for other in others:
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- noise


def check_counts(module):
    """k of every block is uniform over its range, and neighbours add up; whatever the number of
    rows, and the positions are any k."""
    for block_len, names, low, high in ((4, {"bound": True}, 1, 4), (16, {}, 5, 12),
                                        (3, {"bound": True}, 1, 3), (1, {}, 1, 1), (5, {}, 2, 4)):
        cfg = config(module, seq_len=3 * block_len, block_len=block_len)
        for n_rows in (1, 2, 5):
            counts = torch.zeros(n_rows, 3, high + 1)
            n_draws = 4000 if n_rows == 1 else 600
            places = torch.zeros(block_len)
            for seed in range(n_draws):
                noise = module.draw_noise(cfg, n_rows, seeded(seed), **names)
                counts += F.one_hot(noise.level.long(), high + 1)
                masked = (noise.score.view(n_rows, 3, -1) < noise.level[:, :, None])
                assert torch.equal(masked.sum(2), noise.level.long())
                places += masked.sum((0, 1))
                pairs = noise.level.flatten()[:n_rows * 3 // 2 * 2].view(-1, 2).sum(1)
                assert (pairs == low + high).all()
                if names:
                    assert torch.equal(noise.weight, block_len / noise.level)
            assert counts[:, :, :low].sum() == 0
            for one in counts[:, :, low:].flatten(0, 1):  # each block alone
                if len(one) > 1:
                    assert abs(chi_square_z(one, torch.ones(len(one)))) < Z_LIMIT
            share = (low + high) / 2 / block_len
            assert (places / (n_rows * 3 * n_draws) - share).abs().max() < 0.05
        strata = module.draw_noise(cfg, 64, seeded(), **names).level.flatten()
        per_value = torch.bincount(strata.long(), minlength=high + 1)[low:]
        assert (per_value - 192 / len(per_value)).abs().max() <= 2  # stratified over all rows


def check_coins(module):
    """bernoulli: t stratified over the clipped range, weights 1/t or all alike."""
    for weight in ("elbo", "uniform"):
        cfg = config(module, estimator="bernoulli", loss_weight=weight)
        noise = module.draw_noise(cfg, 400, seeded())
        t = noise.level.flatten().double()
        assert torch.equal(((t - 0.3) / 0.5 * 1200 - 1e-4).floor().sort()[0],
                           torch.arange(1200).double())
        masked = module.corrupt(tokens(400), noise, cfg) == V
        masked = masked.view(400, 3, L).double().mean(2)
        assert (masked.flatten() - t).mean().abs() < 5 * 0.5 / (1200 * L) ** 0.5
        expected = 1 / noise.level if weight == "elbo" else torch.full((400, 3), 1 / 0.55)
        torch.testing.assert_close(noise.weight, expected)
        assert abs(noise.level[:, 0].mean() - 0.55) < 5 * 0.5 / 12**0.5 / 20


def check_weights(module):
    """Training on the whole range with weights elbo is the bound; uniform, a mean of as many."""
    cfg = config(module, t_min=0.0, t_max=1.0, loss_weight="elbo")
    a, b = (module.draw_noise(cfg, 8, seeded(), bound=flag) for flag in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    toy = Iid([0.5, 0.3, 0.2])
    cfg = module.Config(vocab_size=3, seq_len=32, block_len=16)
    x0 = toy.draw(64, 32, seeded())
    noise = module.draw_noise(cfg, 64, seeded(1))
    loss = module.loss_fn(Blocks(toy, 32, 16), x0, noise, cfg)
    is_mask = module.corrupt(x0, noise, cfg) == 3
    masked_mean = -toy.p.log()[x0][is_mask].mean()
    assert math.isclose(loss, masked_mean, rel_tol=1e-5)


# ----------------------------------------------------------------------------- bound


def check_bound_of_toys(module):
    """With exact conditionals the mean over all masks is the likelihood, of every sequence."""
    for toy, seq_len in ((Joint(correlated(2, 3), copies=2), 6), (Iid([0.7, 0.2, 0.1]), 6)):
        x0 = toy.draw(3, seeded(2)) if isinstance(toy, Joint) else toy.draw(3, 6, seeded(2))
        for block_len in (1, 2, 3, 4, 6):
            cfg = module.Config(vocab_size=toy.n_values, seq_len=seq_len, block_len=block_len)
            model, n_rows = Blocks(toy, seq_len, block_len), 3000
            noise = module.draw_noise(cfg, 3 * n_rows, seeded(), bound=True)
            nats = module.nelbo_fn(model, x0.repeat_interleave(n_rows, 0), noise, cfg)
            nats = nats.view(3, n_rows).double()
            error = 5 * nats.std(1) / n_rows**0.5 + 1e-5
            assert ((nats.mean(1) - toy.nll(x0)).abs() < error).all()
            alone = module.draw_noise(cfg, 1, seeded(), bound=True)
            assert module.nelbo_fn(model, x0[:1], alone, cfg).shape == (1,)


def check_block_cut_short(module):
    """A window that ends inside a block: the rest of that block stays masked, and counts for
    nothing."""
    model, cfg = small_model(module, seq_len=6)
    x0 = tokens(5, 6)
    noise = module.draw_noise(cfg, 5, seeded(), bound=True)
    assert noise.level.shape == (5, 2) and noise.level[:, 1].max() == 2
    assert torch.equal(noise.weight * noise.level, torch.tensor([[4.0, 2.0]]).expand(5, 2))
    xt = module.corrupt(x0, noise, cfg)
    assert torch.equal((xt[:, 4:] == V).sum(1), noise.level[:, 1].long())
    logits = model(F.pad(xt, (0, 2), value=V), F.pad(x0, (0, 2), value=5))[:, :6]
    ce = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view(5, 6)
    weight = noise.weight.repeat_interleave(4, 1)[:, :6]
    by_hand = (ce * weight * (xt == V)).sum(1)
    torch.testing.assert_close(bound(module, model, x0, cfg), by_hand.detach())


# ----------------------------------------------------------------------------- sampler


CHECKS = [check_mask, check_clean_half, check_documents, check_likelihood_sums_to_one,
          check_likelihood_token_by_token, check_one_block_is_mdlm, check_flex_attention,
          check_counts, check_coins, check_weights, check_bound_of_toys, check_block_cut_short]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(train_block)


def test_flex_attention_is_traced_in_one_piece():
    """torch.compile meets no graph break in a training step, and builds the mask in its graph."""
    model, cfg = small_model(doc_mask=True, bos_id=3, n_kv_head=2)
    torch._dynamo.reset()
    with flex_on_cpu(train_block):
        step = torch.compile(train_block.loss_fn, backend="aot_eager", fullgraph=True)
        for seed in range(2):
            x0, noise = tokens(4, seed=seed), train_block.draw_noise(cfg, 4, seeded(seed))
            compiled = gradients(model, step, x0, noise, cfg)
            expected = gradients(model, train_block.loss_fn, x0, noise, cfg)
            for a, b in zip(compiled, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_flex_attention_stays_off_cpus():
    """Compiled for a CPU it is wrong where v is a slice of a wider tensor of the graph. When this
    fails, that has been mended, and use_flex may let it in."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(qkv):
        q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        return flex_attention(q.contiguous(), k.contiguous(), v)

    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert not train_block.use_flex(torch.device("cpu"))
    torch._dynamo.reset()
    qkv = torch.randn(2, 64, 96, generator=seeded())
    with torch.no_grad():
        error = torch.compile(attend, dynamic=False)(qkv) - attend(qkv)
    assert error.abs().max() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_flex_attention_on_a_gpu():
    """Compiled to a kernel, it equals the dense mask: outputs and gradients."""
    for names in ({}, {"doc_mask": True, "bos_id": 3}):
        model, cfg = small_model(n_embd=64, n_head=2, seq_len=256, block_len=16, **names)
        model, x0 = model.cuda(), tokens(4, 256).cuda()
        noise = train_block.take_rows(train_block.draw_noise(cfg, 4, seeded()), slice(4), "cuda")
        step = torch.compile(train_block.loss_fn, dynamic=False)
        for a, b in zip(gradients(model, step, x0, noise, cfg),
                        gradients(model, train_block.loss_fn, x0, noise, cfg), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- mutants

MUTANTS = {
    "xt sees its own clean block": (
        "(k_block < q_block) & (k >= T)", "(k_block <= q_block) & (k >= T)",
        (check_mask, check_likelihood_sums_to_one, check_one_block_is_mdlm)),
    "xt sees later clean blocks": (
        "(k_block < q_block) & (k >= T)", "((k_block < q_block) | (q < T)) & (k >= T)",
        (check_mask, check_likelihood_token_by_token)),
    "xt sees earlier noised blocks": (
        "(k_block < q_block) & (k >= T)", "(k_block < q_block)", (check_flex_attention,)),
    "the clean half sees xt": (
        "(q_block == k_block) & same_half |", "(q_block == k_block) & (same_half | (q >= T)) |",
        (check_mask,)),
    "the clean half sees what is later": (
        "(k_block < q_block) & (k >= T)", "((k_block < q_block) | (q >= T)) & (k >= T)",
        (check_flex_attention,)),
    "a document's beginning is given away": (
        "before.repeat_interleave(cfg.block_len, 1), clean", "clean, clean", (check_documents,)),
    "documents see each other": (
        "seen & (docs[b, q] == docs[b, k])", "seen", (check_documents,)),
    "strips cut blocks": (
        "math.ceil(T / block_len / N_STRIPS) * block_len", "math.ceil(T / N_STRIPS)",
        (check_flex_attention, check_one_block_is_mdlm)),
    "a strip sees too little": (
        "*x[1][:i + 1]), 2)", "*x[1][:max(i, 1)]), 2)", (check_flex_attention,)),
    "a weight of 1/k with an eps": (
        "weight = size / k if", "weight = size / (k + 0.3) if",
        (check_bound_of_toys, check_counts)),
    "the bound is a masked mean": (
        "weight = size / k if", "weight = (2 * size / (size + 1)).expand_as(k) if",
        (check_bound_of_toys,)),
    "the bound has the clipped range": (
        "low, high = (1, size) if bound else", "low, high = (1, size) if not bound else",
        (check_counts, check_bound_of_toys)),
    "partners mask alike": (
        "coin = torch.stack((coin, ~coin), 1)", "coin = torch.stack((coin, coin), 1)",
        (check_counts,)),
    "no coin": ("k = torch.where(coin, k, low + high - k)",
                "k = torch.where(torch.arange(n) % 2 == 0, k, low + high - k)", (check_counts,)),
    "padding is masked from the other end": (
        "order[:, T:] = 2.0", "order[:, T:] = -1.0", (check_block_cut_short,)),
    "the loss counts blocks": (
        "[1].sum() / (B * T)", "[1].sum() / (xt != x0).sum()",
        (check_one_block_is_mdlm,)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, checks = MUTANTS[name]
    source = Path(train_block.__file__).read_text(encoding="utf-8")
    assert source.count(snippet) == 1, f"to be found once in train_block.py: {snippet}"
    module = types.ModuleType("mutant_of_train_block")
    module.__file__ = train_block.__file__
    exec(compile(source.replace(snippet, replacement), "mutant", "exec"), module.__dict__)
    for check in checks:
        with pytest.raises((AssertionError, RuntimeError)):
            check(module)


# ----------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", ["", "tiny"])
def test_a_preset_has_the_size_of_its_twin(preset):
    """Parameters as in train_mdlm, the same shape and tokens; a pass traced without data."""
    argv = [f"--preset={preset}"] if preset else []
    sizes, shapes = [], []
    for module in (train_block, train_mdlm):
        cfg = module.make_config(argv)[0]
        cfg = dataclasses.replace(cfg, vocab_size=256 if preset else 50257)
        module.validate(cfg, 1)
        with FakeTensorMode():
            model = module.Model(cfg)
            sizes.append(sum(p.numel() for p in model.parameters()))
            if module is train_block:
                x0 = torch.zeros(cfg.micro_batch, cfg.seq_len, dtype=torch.int64)
                noise = module.draw_noise(cfg, len(x0), seeded())
                module.loss_fn(model, x0, noise, cfg).backward()
                assert all(p.grad is not None for p in model.parameters())
        names = {*module.SHAPE_FIELDS, "seq_len", "steps", "batch_tokens", "data", "optimizer",
                 "lr", "muon_beta2"}
        if not preset:  # the record recipe has its own
            names -= {"value_residual", "muon_beta2"}
        shapes.append([getattr(cfg, name) for name in sorted(names)])
    assert shapes[0] == shapes[1]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01 and sizes[0] <= 162_500_000


def test_presets():
    cfg = train_block.make_config([])[0]
    assert (cfg.data, cfg.block_len, cfg.shuffle) == ("finewebedu10B", 16, False)
    cfg = train_block.make_config(["--preset=nano_block"])[0]
    train_block.validate(dataclasses.replace(cfg, vocab_size=50257), 8)
    assert (cfg.block_len, cfg.t_min, cfg.t_max, cfg.batch_tokens) == (16, 0.3, 0.8, 131_072)
    assert cfg.unet and cfg.doc_mask and (cfg.n_layer, cfg.n_head, cfg.n_embd) == (12, 6, 768)


def test_flops():
    """Counted by hand: two copies of 12 D^2 weights a layer, the last one half, head on 17/32."""
    cfg = dataclasses.replace(train_block.make_config([])[0], vocab_size=50257)
    with FakeTensorMode():
        flops = train_block.flops_per_token(cfg, n_weights(train_block.Model(cfg)))
    by_hand = 6 * (2 * 12 * 12 * 768**2 - 10 * 768**2 + 50257 * 768 * 17 / 32)
    assert flops == by_hand + 12 * 11.5 * 768 * 1040


# ----------------------------------------------------------------------------- runs

TINY = ("--seq_len=32", "--block_len=8", "--batch_tokens=256", "--micro_batch=8", "--n_layer=1",
        "--n_head=2", "--n_embd=32", "--val_tokens=512", "--device=cpu", "--dtype=fp32",
        "--compile=0", "--steps=30", "--eval_every=10", "--ckpt_every=10", "--log_every=10",
        "--dropout=0.1", "--ema=0.9")


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
    with keep_checkpoints(train_block, out.with_name("half.pt")):
        return out, *run(train_block, *TINY, f"--data={data}", f"--out={out}")


def evaluations(text):
    return re.findall(r"val_nelbo:(\S+) bpb:(\S+) ppl:(\S+)", text)


def test_a_run_learns(data, whole_run):
    out, status, text = whole_run
    assert status == 0, text
    values = [float(v.split("+-")[0]) for v, _, _ in evaluations(text)]
    assert len(values) == 3 and values[-1] < values[0] < 5.6 and values[-1] < 3.4
    status, again = run(train_block, "--eval_only=1", f"--init_from={out}/ckpt.pt")
    assert status == 0 and evaluations(again) == evaluations(text)[-1:]


def test_a_run_goes_on_bit_for_bit(data, whole_run, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(whole_run[0].with_name("half.pt").read_bytes())
    status, text = run(train_block, "--resume=1", f"--out={tmp_path}")
    assert status == 0 and evaluations(text)[-1] == evaluations(whole_run[2])[-1]
    a, b = (train_block.load_checkpoint(str(p / "ckpt.pt")) for p in (tmp_path, whole_run[0]))
    assert a["step"] == b["step"] == 30 and a["script"] == "train_block"
    for kind in ("model", "ema"):
        assert all(torch.equal(x, b[kind][name]) for name, x in a[kind].items())


@pytest.mark.parametrize("script", [train_mdlm, gpt], ids=lambda s: s.SCRIPT)
def test_a_run_begins_with_the_weights_of_another_script(script, data, tmp_path):
    """One step more, at a rate of nothing: the weights are those of the checkpoint."""
    shape = [flag for flag in TINY if "block_len" not in flag and "ema" not in flag]
    source = tmp_path / "source"
    shape = [flag for flag in shape if "--steps" not in flag]
    status, text = run(script, *shape, "--steps=2", f"--data={data}", f"--out={source}")
    assert status == 0, text
    rates = [f"--{name}=0" for name in ("lr", "embed_lr", "head_lr", "scalar_lr")]
    out = tmp_path / "out"
    status, text = run(train_block, *TINY[:4], *TINY[7:11], "--steps=1", "--log_every=1", *rates,
                       f"--init_from={source}/ckpt.pt", f"--data={data}", f"--out={out}")
    assert status == 0, text
    a, b = (train_block.load_checkpoint(str(p / "ckpt.pt"))["model"] for p in (source, out))
    assert all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize(("flags", "message"), [
    (("--block_len=5",), "--block_len=5: must divide --seq_len=32"),
    (("--block_len=0",), "--block_len=0: must divide"),
    (("--t_min=0.9",), "--t_min=0.9: from 0 to --t_max=0.8"),
    (("--t_max=1.5",), "--t_max=1.5"),
    (("--cond_dim=16",), "--cond_dim=16: "),
    (("--doc_mask=1", "--vocab_size=256"), "--bos_id=50256: "),
    (("--block_len=32", "--batch_tokens=96", "--micro_batch=3"), "exact_k needs pairs of blocks"),
    (("--block_len=32", "--micro_batch=1"), "exact_k needs pairs of blocks"),
    (("--loss_weight=clipped",), "--loss_weight=clipped: there are elbo, uniform")])
def test_settings_that_cannot_work_are_refused(data, tmp_path, flags, message):
    names = [flag.partition("=")[0] for flag in flags]
    rest = [flag for flag in TINY if flag.partition("=")[0] not in names]
    status, text = run(train_block, *rest, *flags, f"--data={data}", f"--out={tmp_path / 'run'}")
    assert status == 2 and text.count("\n") == 1 and message in text
    assert not (tmp_path / "run").exists()


def test_documents_need_their_first_token(data, tmp_path):
    """--bos_id is checked against the data, too, where no --vocab_size says more."""
    flags = (*TINY, "--doc_mask=1", f"--data={data}", f"--out={tmp_path / 'run'}")
    status, text = run(train_block, *flags)
    assert status == 2 and text.count("\n") == 1 and "--bos_id=50256: " in text
    status, text = run(train_block, *flags, "--bos_id=32")
    assert status == 0, text
