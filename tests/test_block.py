"""Block diffusion against exact oracles: mask, noise, bound; and mutants that fail.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import contextlib
import functools
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import toys
from test_cuda_path import as_on_cuda
from toys import Z_LIMIT, Blocks, Iid, Joint, chi_square_z, correlated, seeded

import train_block
import train_mdlm

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
V, T, L = 11, 12, 4  # of the small network
small_model = functools.partial(toys.small_model, block_len=L)
SWITCHES = {
    "plain": {},
    "grouped queries, unet": {"n_kv_head": 2, "unet": True, "n_layer": 3},
    "all, documents": {"mlp": "swiglu", "unet": True, "tied": True, "softcap": 3.0, "n_kv_head": 1,
                       "dropout": 0.1, "doc_mask": True, "bos_id": 3, "value_residual": True},
}

def config(module, **names):
    return module.Config(**{"vocab_size": V, "seq_len": T, "block_len": L, **names})

def tokens(n_rows, seq_len=T, seed=1, n_values=V):
    return torch.randint(n_values, (n_rows, seq_len), generator=seeded(seed))

def bound(module, model, x0, cfg, seed=0):
    noise = module.draw_noise(cfg, len(x0), seeded(seed), bound=True)
    with torch.no_grad():
        return module.nelbo_fn(model, x0, noise, cfg)

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
    with as_on_cuda(module), mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        yield

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

def check_counts(module):
    """k of every block is uniform over its range, and neighbours add up; whatever the number of
    rows, and the positions are any k."""
    for block_len, names, low, high in ((4, {"bound": True}, 1, 4), (16, {}, 5, 12),
                                        (3, {"bound": True}, 1, 3), (1, {}, 1, 1), (5, {}, 2, 4)):
        cfg = config(module, seq_len=3 * block_len, block_len=block_len)
        for n_rows in (1, 2, 5):
            counts = torch.zeros(n_rows, 3, high + 1)
            n_draws = 600 if n_rows == 1 else 200
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

CHECKS = [check_mask, check_documents, check_likelihood_sums_to_one,
          check_likelihood_token_by_token, check_one_block_is_mdlm, check_flex_attention,
          check_counts, check_coins, check_weights, check_bound_of_toys, check_block_cut_short]

@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(train_block)

def test_flex_attention_stays_off_cpus():
    """Compiled for a CPU by torch 2.13 it is wrong where v is a slice of a wider tensor."""
    assert train_block.FLEX == "cuda"

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_flex_attention_on_a_gpu():
    """Compiled to a kernel, it equals the dense mask: outputs and gradients."""
    for names in ({}, {"doc_mask": True, "bos_id": 3}):
        model, cfg = small_model(train_block, n_embd=64, n_head=2, seq_len=256, block_len=16,
                                 **names)
        model, x0 = model.cuda(), tokens(4, 256).cuda()
        noise = train_block.take_rows(train_block.draw_noise(cfg, 4, seeded()), slice(4), "cuda")
        step = torch.compile(train_block.loss_fn, dynamic=False)
        for a, b in zip(gradients(model, step, x0, noise, cfg),
                        gradients(model, train_block.loss_fn, x0, noise, cfg), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

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
        "math.ceil(T / block_len / 4) * block_len", "math.ceil(T / 4)",
        (check_flex_attention, check_one_block_is_mdlm)),
    "a strip sees too little": (
        "T + start + len(place)", "T + max(start, len(place))", (check_flex_attention,)),
    "a weight of 1/k with an eps": (
        "weight = size / level if", "weight = size / (level + 0.3) if",
        (check_bound_of_toys, check_counts)),
    "the bound is a masked mean": (
        "weight = size / level if", "weight = (2 * size / (size + 1)).expand_as(level) if",
        (check_bound_of_toys,)),
    "the bound has the clipped range": (
        "low, high = (1, size) if bound else", "low, high = (1, size) if not bound else",
        (check_counts, check_bound_of_toys)),
    "partners mask alike": (
        "coin = torch.stack((coin, ~coin), 1)", "coin = torch.stack((coin, coin), 1)",
        (check_counts,)),
    "no coin": ("level = torch.where(coin, k, low + high - k)",
                "level = torch.where(torch.arange(n) % 2 == 0, k, low + high - k)",
                (check_counts,)),
    "padding is masked from the other end": (
        "masked_fill(~is_scored, 2.0)", "masked_fill(~is_scored, -1.0)", (check_block_cut_short,)),
    "the loss counts blocks": (
        "[1].sum() / (B * T)", "[1].sum() / (corrupt(x0, noise, cfg) != x0).sum()",
        (check_one_block_is_mdlm,)),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, checks = MUTANTS[name]
    toys.assert_found_wrong(train_block, snippet, replacement, *checks,
                            errors=(AssertionError, RuntimeError))
