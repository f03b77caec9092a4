"""The autoregressive baseline against exact oracles: likelihood and causality; and mutants.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from toys import Iid, Joint, LeftToRight, assert_found_wrong, correlated, seeded, small_model

import gpt

V, T = 11, 12  # of the small network
SWITCHES = {
    "plain": {},
    "unet": {"unet": True, "n_layer": 3},
    "all": {"mlp": "swiglu", "unet": True, "tied": True, "softcap": 3.0, "n_kv_head": 1,
            "dropout": 0.1, "value_residual": True},
}

def tokens(n_rows):
    return torch.randint(V, (n_rows, T), generator=seeded(1))

def nll(module, model, x0, cfg):
    noise = module.draw_noise(cfg, len(x0), seeded(), bound=True)
    assert len(noise[0]) == len(x0)
    return module.nelbo_fn(model, x0, noise, cfg)

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

CHECKS = [check_likelihood_sums_to_one, check_likelihood_token_by_token, check_likelihood_of_toys,
          check_causality, check_attention]

@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(gpt)

MUTANTS = {
    "attention sees what lies ahead": (
        "triu(1 + i * q[0].size(2))", "triu(T)",
        (check_attention, check_causality, check_likelihood_token_by_token)),
    "the input is not shifted": (
        "return F.pad(x0[:, :-1], (1, 0), value=cfg.vocab_size)", "return x0",
        (check_likelihood_sums_to_one, check_likelihood_token_by_token, check_likelihood_of_toys)),
    "the first token is not scored": (
        "ce.view(x0.shape)[:, cfg.prompt_len:]", "ce.view(x0.shape)[:, 1:]",
        (check_likelihood_sums_to_one, check_likelihood_of_toys)),
    "the loss is a sum": (
        "return nelbo_fn(model, x0, noise, cfg).mean() / (x0.size(1) - cfg.prompt_len)",
        "return nelbo_fn(model, x0, noise, cfg).mean()",
        (check_likelihood_token_by_token,)),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, checks = MUTANTS[name]
    assert_found_wrong(gpt, snippet, replacement, *checks)
