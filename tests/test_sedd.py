"""Score entropy diffusion against exact oracles: entropy, bound, samplers; and mutants that fail.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import byte_table, log, presets, write_meta
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import AbsorbScore, Joint, UniformScore, chi_square_z, correlated, take_rows

import train_mdlm
import train_sedd

V, T = 3, 3
JOINT = Joint(correlated(V, T))
IID = Joint([0.6, 0.3, 0.1])  # one token; copies of it are independent
GRAPHS, NOISES = ("absorb", "uniform"), ("loglinear", "geometric")
BOTH = list(itertools.product(GRAPHS, NOISES))
SIGMAS = torch.logspace(-4, math.log10(25), 30, dtype=torch.float64)
Z_LIMIT = 5.0  # a correct program fails one z-test in about 10**6; the seeds are fixed besides


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(sedd, graph, noise="loglinear", seq_len=T, vocab_size=V, **names):
    return sedd.Config(vocab_size=vocab_size, seq_len=seq_len, graph=graph, noise=noise, **names)


def exact(graph, toy, **how):
    return (AbsorbScore if graph == "absorb" else UniformScore)(toy, **how)


def sigma_one(cfg):
    """Total noise at t = 1, by its definition."""
    return cfg.sigma_max if cfg.noise == "geometric" else -math.log(1e-3)


def rates(graph, n_values=V):
    """Q[a, b], the rate at which a becomes b: the mask is the last state (2310.16834, section 3.4;
    the uniform one for a total rate of (N - 1) / N, so that exp(-sigma) is left alone)."""
    n = n_values + (graph == "absorb")
    q = torch.zeros(n, n, dtype=torch.float64)
    if graph == "absorb":
        q[:-1, -1] = 1
    else:
        q += 1 / n
    return q - torch.diag(q.sum(1))


def outcomes(graph, x0):
    """(O, T) everything that x0 (T,) can become."""
    if graph == "absorb":
        choices = [(int(x), V) for x in x0]
    else:
        choices = [range(V)] * len(x0)
    return torch.tensor(list(itertools.product(*choices)))


def probability(noise, graph, x0, xt):
    """(R, O) of every outcome in every row of a noise, by the definition of the draw."""
    if graph == "absorb":  # exactly `level` masks, every set of them alike
        k = (xt == V).sum(-1).double()
        ways = torch.tensor([math.comb(len(x0), int(i)) for i in k], dtype=torch.float64)
        return (k == noise.level.double()[:, None]).double() / ways
    kernel = torch.linalg.matrix_exp(noise.sigma.double()[:, None, None] * rates(graph))  # (R,V,V)
    return kernel[:, x0, xt].prod(-1)


def exact_nelbo(sedd, model, x0, cfg, n_rows, seed=0):
    """Expectation of nelbo_fn for one x0 (T,), over all outcomes; only sigma is drawn."""
    noise = sedd.draw_noise(cfg, n_rows, seeded(seed), bound=True)
    xt = outcomes(cfg.graph, x0)
    prob, n = probability(noise, cfg.graph, x0, xt), len(xt)
    assert torch.allclose(prob.sum(-1), torch.ones(n_rows).double())

    def repeat(x):
        return x.repeat_interleave(n, 0)

    every = type(noise)(level=repeat(noise.level), sigma=repeat(noise.sigma),
                        weight=repeat(noise.weight), score=torch.full((n_rows * n, len(x0)), -1.0),
                        token=xt.repeat(n_rows, 1))
    values = sedd.nelbo_fn(model, x0.expand(n_rows * n, -1), every, cfg)
    return (prob * values.double().view(n_rows, n)).sum(1).mean().item()


def likelihood(graph, toy, x0, cfg):
    """What the bound of the exact score is: -log p(x0), and what the prior loses by not being the
    noised data, E log p_1(x_1) / prior(x_1)."""
    nats = toy.nll(x0[None]).item()
    if graph == "uniform":
        xt, sigma = outcomes(graph, x0), torch.tensor([sigma_one(cfg)], dtype=torch.float64)
        kernel = torch.linalg.matrix_exp(sigma * rates(graph))
        p_1 = UniformScore(toy).noised(sigma)[0, toy.code(xt, V)]
        nats += (kernel[x0, xt].prod(-1) * (p_1 * V ** len(x0)).log()).sum().item()
    return nats


# The bound.

BOUNDS = {"absorb": [{}], "uniform": [{}, {"sigma_max": 0.5, "sigma_min": 0.1}]}


def check_bound(sedd, graph, noise):
    """The exact score's bound on every x0 is its negative log-likelihood, from no noise to sigma(1)
    and with the prior's term, also where these are large."""
    for toy, states in ((JOINT, [0, 5, 13, 26]), (IID, range(V))):
        for names in BOUNDS[graph]:
            cfg = config(sedd, graph, noise, seq_len=toy.n, **names)
            n_rows = 2 * toy.n if graph == "absorb" else 600
            for x0 in toy.states[list(states)]:
                nelbo = exact_nelbo(sedd, exact(graph, toy), x0, cfg, n_rows)
                nats = likelihood(graph, toy, x0, cfg)
                assert math.isclose(nelbo, nats, rel_tol=1e-5 if graph == "absorb" else 1e-3)


def check_bound_of_draws(sedd, graph, noise):
    """T H(p), and a joint's entropy, from real draws of x0, levels and noise; for odd batches."""
    for toy, n_rows in ((Joint(IID.p, copies=32), 1001), (JOINT, 30_001)):
        cfg, gen = config(sedd, graph, noise, seq_len=toy.seq_len), seeded(3)
        x0, noise_of = toy.draw(n_rows, gen), sedd.draw_noise(cfg, n_rows, gen, bound=True)
        nelbo = sedd.nelbo_fn(exact(graph, toy), x0, noise_of, cfg).double()
        error = (nelbo - toy.nll(x0)).std() / math.sqrt(n_rows)
        assert abs((nelbo - toy.nll(x0)).mean()) < Z_LIMIT * error
        assert error < 0.03 * toy.entropy * toy.copies


def check_prior(sedd, noise):
    """With no weight on the path, what is left of the bound is KL(p_1(. | x0) || uniform)."""
    for names in ({}, {"sigma_max": 0.3}):
        cfg = config(sedd, "uniform", noise, **names)
        drawn = sedd.draw_noise(cfg, 4, seeded(), bound=True)
        x0 = JOINT.draw(4, seeded(1))
        drawn = drawn._replace(weight=torch.zeros(4))
        nats = sedd.nelbo_fn(exact("uniform", JOINT), x0, drawn, cfg)
        row = torch.linalg.matrix_exp(sigma_one(cfg) * rates("uniform"))[0]
        kl = T * (row * (row * V).log()).sum().item()
        assert nats.tolist() == pytest.approx([kl] * 4, rel=1e-5, abs=1e-12)


def check_whole_range(sedd, graph, noise):
    """The bound's draws reach from no noise to sigma(1), evenly over the batch, weighted by the
    width of what each stands for."""
    cfg, n_rows = config(sedd, graph, noise), 4096
    drawn = sedd.draw_noise(cfg, n_rows, seeded(5), bound=True)
    if graph == "absorb":
        counts = torch.bincount(drawn.level.long())
        assert counts.tolist()[:1] == [0] and (counts[1:] - n_rows / T).abs().max() <= 2
        return
    sigma, place = drawn.sigma.double().sort()
    width = drawn.weight.double()[place] / n_rows
    end = sigma_one(cfg)
    inner = sigma < 3  # above, few draws stand for much
    assert sigma[0] < 1e-6 and sigma[-1] <= end * (1 + 1e-6)
    assert math.isclose(width[inner].sum(), 3, rel_tol=2e-2)
    torch.testing.assert_close(drawn.level.double(), 1 - (-drawn.sigma.double()).exp(),
                               rtol=1e-5, atol=0)


def check_training_noise(sedd, graph, noise):
    """sigma(t) as defined, t stratified over all rows in antithetic neighbours, the weight its
    derivative, under absorb divided by exp(sigma) - 1."""
    cfg, n_rows = config(sedd, graph, noise, seq_len=1024), 256
    drawn = sedd.draw_noise(cfg, n_rows, seeded(6))
    if graph == "absorb" and noise == "loglinear":
        pair = drawn.level.view(-1, 2)
        assert (pair.sum(1) == 1025).all()
        assert (torch.bincount((drawn.level.long() - 1) * n_rows // 1024) == 1).all()
        torch.testing.assert_close(drawn.weight, 1024 / drawn.level)
        alpha = 1 - drawn.level.double() / 1025
        torch.testing.assert_close(drawn.sigma.double(), -alpha.log(), rtol=1e-5, atol=0)
        return
    sigma = drawn.sigma.double()
    if noise == "geometric":
        t = (sigma / 1e-4).log() / math.log(25e4)
    else:
        t = (1 - (-sigma).exp()) / (1 - 1e-3)
    strata = torch.bincount((t * n_rows / 2).long().clamp(max=n_rows // 2 - 1))
    assert (strata == 2).all()
    torch.testing.assert_close(t.view(-1, 2).sum(1), torch.ones(n_rows // 2).double(), rtol=1e-3,
                               atol=0)
    t.requires_grad_()
    curve = 1e-4 * 25e4**t if noise == "geometric" else -torch.log(1 - (1 - 1e-3) * t)
    (weight,) = torch.autograd.grad(curve.sum(), t)
    if graph == "absorb":
        weight = weight / sigma.expm1()
    torch.testing.assert_close(drawn.weight.double(), weight, rtol=5e-3, atol=0)
    torch.testing.assert_close(drawn.level.double(), -(-sigma).expm1(), rtol=1e-5, atol=0)


def check_loss_is_the_bound(sedd, graph, noise):
    """Large draws from draw_noise to loss_fn: their mean is the joint's entropy a token, but for
    what lies below sigma(0) and above sigma(1)."""
    n_rows, n_parts = 40_000, 20
    cfg, gen = config(sedd, graph, noise), seeded(8)
    x0, drawn = JOINT.draw(n_rows, gen), sedd.draw_noise(cfg, n_rows, gen)
    losses = torch.stack([sedd.loss_fn(exact(graph, JOINT), x, type(drawn)(*n), cfg) for x, *n in
                          zip(*[f.chunk(n_parts) for f in (x0, *drawn)], strict=True)])
    losses = losses.double() * T
    error = losses.std() / math.sqrt(n_parts)
    assert abs(losses.mean() - JOINT.entropy) < Z_LIMIT * error + 5e-3
    assert error < 0.03 * JOINT.entropy


def check_ranks_see_slices(sedd, graph, noise):
    """The same generator gives the same noise; a batch's loss is the mean over its slices."""
    cfg, n_rows = config(sedd, graph, noise), 24
    drawn, again = (sedd.draw_noise(cfg, n_rows, seeded(9)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert all(len(field) == n_rows for field in drawn)
    x0, model = JOINT.draw(n_rows, seeded(11)), exact(graph, JOINT)
    whole = sedd.loss_fn(model, x0, drawn, cfg)
    for n_ranks in (2, 3, 12):
        parts = [sedd.loss_fn(model, x, type(drawn)(*n), cfg) for x, *n in zip(
            *[field.chunk(n_ranks) for field in (x0, *drawn)], strict=True)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def check_corruption(sedd, graph, noise):
    """Every outcome of x0 occurs as often as the rates say, at every bound's and training draw."""
    n_rows = 40_000
    cfg, x0 = config(sedd, graph, noise), torch.tensor([2, 0, 2])
    xt_of = outcomes(graph, x0)
    for bound in (True, False):
        drawn = sedd.draw_noise(cfg, n_rows, seeded(12), bound=bound)
        xt = sedd.corrupt(x0.expand(n_rows, -1), drawn, cfg)
        base = torch.tensor([16, 4, 1])
        found = ((xt * base).sum(-1)[:, None] == (xt_of * base).sum(-1)).sum(0)
        assert found.sum() == n_rows
        if graph == "absorb" and not bound and noise == "geometric":
            level = drawn.level.double()[:, None]
            k = (xt_of == V).sum(-1)
            law = level**k * (1 - level) ** (T - k)
        else:
            law = probability(drawn, graph, x0, xt_of)
        assert abs(chi_square_z(found, law.sum(0))) < Z_LIMIT


def check_hidden_tokens(sedd):
    """The network's input does not change with the tokens that noise has replaced."""
    for graph, noise in BOTH:
        cfg = config(sedd, graph, noise, seq_len=8)
        drawn, inputs = sedd.draw_noise(cfg, 16, seeded(21)), []
        a = torch.randint(V, (16, 8), generator=seeded(22))
        replaced = drawn.score < drawn.level[:, None]
        model = exact(graph, Joint(IID.p, copies=8))

        def spy(xt, sigma, rows=None, model=model, inputs=inputs):
            inputs.append(xt)
            return model(xt, sigma, rows)

        for x0 in (a, torch.where(replaced, (a + 1) % V, a)):
            sedd.loss_fn(spy, x0, drawn, cfg)
            sedd.nelbo_fn(spy, x0, drawn, cfg)
        assert len(inputs) == 4 and all(torch.equal(xt, inputs[0]) for xt in inputs)


# The score entropy.

def definition(graph, score, x0, xt, sigma):
    """sum_{y != xt} Q(xt, y) (s_y - r_y log s_y + K(r_y)), r_y = p(y | x0) / p(xt | x0), of one
    token: 2310.16834, definition 3.1 with the weights of theorem 3.6, Q(xt, y) the rate y -> xt."""
    q = rates(graph, len(score))
    p = torch.linalg.matrix_exp(sigma * q)[x0]
    y = torch.arange(len(score)) != xt
    r, s = (p / p[xt])[:len(score)], score
    terms = s.exp() - r * s + torch.xlogy(r, r) - r
    return (q[:len(score), xt] * terms)[y].sum().item()


def score_entropy(sedd, graph, score, x0, xt, sigma):
    """What the module makes of one token a row: score (B, n) at xt (B,), sigma a number."""
    n_rows, n = score.shape
    cfg = config(sedd, graph, "geometric", seq_len=1, vocab_size=n)
    size = torch.ones(n_rows)
    # A masked token's weight holds the factor of its score.
    weight = size / math.expm1(sigma) if graph == "absorb" else size
    drawn = sedd.draw_noise(cfg, n_rows, seeded())._replace(
        level=size, sigma=size * sigma, weight=weight, score=0 * size[:, None], token=xt[:, None])
    nats = sedd.nelbo_fn(lambda xt, sigma, rows=None: take_rows(score[:, None], rows), x0[:, None],
                         drawn, cfg)
    return nats.double() - (sedd.prior_nats(cfg) if graph == "uniform" else 0)


def check_definition(sedd, graph):
    """The score entropy is the definition's sum over states, for any score, at every noise."""
    n = 5
    xts = [n] if graph == "absorb" else range(n)
    x0, xt = torch.tensor(list(itertools.product(range(n), xts))).unbind(1)
    for i, sigma in enumerate(SIGMAS.float().tolist()):
        score = 2 * torch.randn(len(x0), n, generator=seeded(i), dtype=torch.float64)
        if graph == "uniform":
            score = score - score.gather(1, xt[:, None])
        expected = [definition(graph, *how, sigma) for how in zip(score, x0, xt, strict=True)]
        found = score_entropy(sedd, graph, score, x0, xt, sigma)
        # The weight of a masked token is fp32, as are all weights.
        rel = 2e-7 if graph == "absorb" else 1e-9
        assert found.tolist() == pytest.approx(expected, rel=rel)


def check_precision(sedd):
    """In fp32 a score near the truth costs what it costs in fp64, whatever sigma: the terms cancel
    to 1e-20 of the largest, and are weighted by up to sigma."""
    n = 256
    x0, xt = torch.tensor([3, 3]), torch.tensor([3, 7])
    for sigma in SIGMAS.float().tolist():
        alpha = math.exp(-sigma)
        q = torch.randn(2, n, generator=seeded(1), dtype=torch.float64).softmax(-1)
        law = torch.log(alpha * n * q - math.expm1(-sigma))
        score = law - law.gather(1, xt[:, None])
        exact_value = score_entropy(sedd, "uniform", score, x0, xt, sigma)
        found = score_entropy(sedd, "uniform", score.float(), x0, xt, sigma)
        torch.testing.assert_close(found, exact_value, rtol=1e-4, atol=2e-7 / sigma)


def check_absorb_is_mdlm(sedd):
    """With u = log p the score entropy is train_mdlm's cross entropy, for any denoiser, batch and
    weight; with one that is not normalised it is more."""
    n, seq_len, n_rows = 7, 16, 32
    logits = torch.randn(n_rows, seq_len, n, generator=seeded(1), dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    x0 = torch.randint(n, (n_rows, seq_len), generator=seeded(2))
    for estimator, noise in (("exact_k", "loglinear"), ("bernoulli", "geometric")):
        theirs = train_mdlm.Config(vocab_size=n, seq_len=seq_len, estimator=estimator,
                                   loss_weight="elbo")
        ours = config(sedd, "absorb", noise, seq_len, n)
        drawn = train_mdlm.draw_noise(theirs, n_rows, seeded(3))
        same = sedd.Noise(*drawn, torch.full((n_rows, seq_len), n))
        for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            def denoiser(xt, sigma, rows=None, dtype=dtype):
                return take_rows(log_p.to(dtype), rows)

            def score(xt, sigma, rows=None, shift=0.0, dtype=dtype):
                level = torch.expm1(sigma.double()).log()[:, None, None]
                return take_rows((log_p + shift - level).to(dtype), rows)

            for name in ("loss_fn", "nelbo_fn")[:1 + (estimator == "exact_k")]:
                a = getattr(train_mdlm, name)(denoiser, x0, drawn, theirs)
                b = getattr(sedd, name)(score, x0, same, ours)
                torch.testing.assert_close(b, a, rtol=rel, atol=0)
        for shift in (0.1, -0.1):
            more = sedd.loss_fn(lambda *a, shift=shift: score(*a, shift=shift), x0, same, ours)
            assert more > train_mdlm.loss_fn(denoiser, x0, drawn, theirs) + 1e-3


def check_padding(sedd):
    """Rows are padded with positions that no loss trains, whose exponential may overflow."""
    cfg = config(sedd, "absorb", "geometric", seq_len=32)
    noise = sedd.draw_noise(cfg, 3, seeded(1))
    x0 = torch.zeros(3, 32, dtype=torch.int64)
    u = torch.full((3, 32, V), -math.log(V), requires_grad=True)

    def model(xt, sigma, rows):
        level = sigma.expm1().log()[:, None, None]
        return take_rows(torch.where(xt[..., None] == V, u, u + 200) - level, rows)

    loss = sedd.loss_fn(model, x0, noise, cfg)
    loss.backward()
    assert loss.isfinite() and u.grad.isfinite().all()
    assert sedd.nelbo_fn(model, x0, noise, cfg).isfinite().all()


# Samplers.


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: threads that wait for each other on a busy machine only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("graph", "noise"), BOTH)
def test_bound_equals_the_likelihood_of_an_exact_score(graph, noise):
    check_bound(train_sedd, graph, noise)
    check_bound_of_draws(train_sedd, graph, noise)
    check_whole_range(train_sedd, graph, noise)


@pytest.mark.parametrize("noise", NOISES)
def test_prior_term(noise):
    check_prior(train_sedd, noise)


@pytest.mark.parametrize(("graph", "noise"), BOTH)
def test_noise_and_training_loss(graph, noise):
    check_training_noise(train_sedd, graph, noise)
    check_loss_is_the_bound(train_sedd, graph, noise)
    check_ranks_see_slices(train_sedd, graph, noise)
    check_corruption(train_sedd, graph, noise)


def test_hidden_tokens_do_not_reach_the_network():
    check_hidden_tokens(train_sedd)
    check_padding(train_sedd)


@pytest.mark.parametrize("graph", GRAPHS)
def test_score_entropy_is_the_sum_over_states(graph):
    check_definition(train_sedd, graph)


def test_score_entropy_in_fp32():
    check_precision(train_sedd)


def test_absorbing_score_entropy_of_a_denoiser_is_its_cross_entropy():
    check_absorb_is_mdlm(train_sedd)


# Mutants: a changed line makes its oracle fail.

UNIFORM = ("uniform", "geometric")
MUTANTS = {
    "no prior term": (" + T * prior_nats(cfg)", "", lambda m: check_bound(m, *UNIFORM)),
    "no prior term, seen alone": (
        " + T * prior_nats(cfg)", "", lambda m: check_prior(m, "loglinear")),
    "a prior of another sigma": (
        "alpha, N = math.exp(-last_sigma(cfg))", "alpha, N = math.exp(-cfg.sigma_max)",
        lambda m: check_prior(m, "loglinear")),
    "the bound begins at sigma_min": (
        "    if bound:\n", "    if bound and cfg.noise == 'loglinear':\n",
        lambda m: check_bound(m, *UNIFORM)),
    "the bound lacks half of dsigma": (
        "2 * end * t / alpha", "end * t / alpha", lambda m: check_bound(m, "uniform", "loglinear")),
    "an eps in the weight of the bound": (
        "(T / k).float()", "(T / (k + 1e-3)).float()",
        lambda m: check_bound(m, "absorb", NOISES[0])),
    "an eps in the weight of training": (
        "weight = weight / torch.expm1(sigma)", "weight = weight / (torch.expm1(sigma) + 1e-3)",
        lambda m: check_training_noise(m, "absorb", "geometric")),
    "the noise does not grow as stated": (
        "return sigma, growth * sigma", "return sigma, growth * sigma / (1 + sigma)",
        lambda m: check_training_noise(m, *UNIFORM)),
    "t is not stratified": (
        "u = (torch.randperm(n_pairs, generator=gen) + u) / (2 * n_pairs)", "u = u / 2",
        lambda m: check_training_noise(m, *UNIFORM)),
    "the partner masks T - k": (
        "torch.stack((k, T + 1 - k), 1)", "torch.stack((k, T - k), 1)",
        lambda m: check_whole_range(m, "absorb", NOISES[0])),
    "x0 leaks through masks": (
        "u = model(xt, noise.sigma, rows)",
        "u = model(torch.where(x0 == 1, x0, xt), noise.sigma, rows)",
        lambda m: check_bound(m, "absorb", NOISES[0])),
    "x0 leaks through noise": (
        "log_score = model(xt, noise.sigma)", "log_score = model(x0, noise.sigma)",
        lambda m: check_bound(m, *UNIFORM)),
    "x0 leaks into the input": (
        "log_score = model(xt, noise.sigma)",
        "log_score = model(torch.where(x0 == 1, x0, xt), noise.sigma)", check_hidden_tokens),
    "absorb divides by the masked count": (
        "noise, n)[1].sum() / (B * T)", "noise, n)[1].sum() / n",
        lambda m: check_loss_is_the_bound(m, "absorb", "loglinear")),
    "uniform divides by the replaced count": (
        "noise).sum() / (B * T)", "noise).sum() / (xt != x0).sum()",
        lambda m: check_loss_is_the_bound(m, *UNIFORM)),
    "padding overflows": (
        "u = torch.where(is_mask[rows, None], u, 0.0)", "u = u + 0", check_padding),
    "another ratio where nothing was replaced": (
        "- torch.where((xt == x0)[..., None], peak, 0.0)", "- peak",
        lambda m: check_definition(m, "uniform")),
    "the ratio of N - 1 states": (
        "torch.log1p(N / torch.expm1(sigma))", "torch.log1p((N - 1) / torch.expm1(sigma))",
        lambda m: check_definition(m, "uniform")),
    "no K(r)": (
        "(torch.expm1(d) - d)", "(torch.exp(d) - d)", lambda m: check_definition(m, "uniform")),
    "large terms that cancel": (
        "(log_r.exp() * (torch.expm1(d) - d))",
        "(log_score.exp() - log_r.exp() * (log_score - log_r + 1))", check_precision),
    "no -1": (
        "u.exp().sum(-1) - 1 -", "u.exp().sum(-1) -", lambda m: check_definition(m, "absorb")),
    "a score that is normalised": (
        "u = u + torch.expm1(noise.sigma.to(u.dtype)).log()[rows // T, None]",
        "u = u.log_softmax(-1)", check_absorb_is_mdlm),
    "noise that is no random token": (
        "torch.randint(V, (n_rows, T), generator=gen)", "torch.zeros(n_rows, T).long()",
        lambda m: check_corruption(m, *UNIFORM)),
    "more noise than stated": (
        "level = -torch.expm1(-sigma)", "level = -torch.expm1(-sigma * V / (V - 1))",
        lambda m: check_corruption(m, *UNIFORM)),
}


def mutant(snippet, replacement):
    """train_sedd with one snippet of its text replaced."""
    source = Path(train_sedd.__file__).read_text(encoding="utf-8")
    assert source.count(snippet) == 1, f"to be found once in train_sedd.py: {snippet}"
    module = types.ModuleType("mutant_of_train_sedd")
    module.__file__ = train_sedd.__file__
    exec(compile(source.replace(snippet, replacement), "mutant", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, check = MUTANTS[name]
    module = mutant(snippet, replacement)
    with pytest.raises(AssertionError):
        check(module)


# The network.

V_NET, T_NET = 11, 12
SWITCHES = {
    "absorb": {},
    "absorb with time": {"cond_dim": 16},
    "uniform": {"graph": "uniform", "cond_dim": 16},
    "uniform without time": {"graph": "uniform", "normalized": True},
    "geometric": {"graph": "uniform", "noise": "geometric", "cond_dim": 16, "mlp": "swiglu"},
    "absorb, geometric": {"noise": "geometric", "checkpoint_layers": True, "dropout": 0.2},
    "all": {"graph": "uniform", "mlp": "swiglu", "unet": True, "softcap": 3.0,
            "n_kv_head": 2, "cond_dim": 16, "dropout": 0.1},
}


def small_model(seed=0, **names):
    """A network that uses every parameter: its zero-initialised matrices are moved."""
    cfg = train_sedd.Config(**{"vocab_size": V_NET, "seq_len": T_NET, "n_layer": 2, "n_head": 4,
                               "n_embd": 32, **names})
    train_sedd.check_objective(cfg, 6, 6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = train_sedd.Model(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model, cfg


def small_batch(cfg, n_rows=6):
    x0 = torch.randint(V_NET, (n_rows, T_NET), generator=seeded(3))
    noise = train_sedd.draw_noise(cfg, n_rows, seeded(4))
    return x0, noise, train_sedd.corrupt(x0, noise, cfg)


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_gets_a_finite_gradient(switch):
    model, cfg = small_model(**SWITCHES[switch])
    x0, noise, _ = small_batch(cfg)
    train_sedd.loss_fn(model.train(), x0, noise, cfg).backward()
    for name, p in model.named_parameters():
        if name == "embed.weight" and cfg.graph == "uniform":
            assert (p.grad[V_NET] == 0).all()  # no token is ever masked
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, f"{name} has no effect"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graph", GRAPHS)
def test_gradients_are_finite_at_every_noise_level(graph, dtype):
    """One row for every sigma of 1e-4..25, half of its tokens replaced whatever the odds, and
    logits up to 30 apart."""
    model, cfg = small_model(graph=graph, noise="geometric", cond_dim=16)
    with torch.no_grad():
        model.head.weight.mul_(8)
    n = len(SIGMAS)
    x0 = torch.randint(V_NET, (n, T_NET), generator=seeded(3))
    sigma = SIGMAS.float()
    slope = math.log(25e4) * sigma
    noise = train_sedd.draw_noise(cfg, n, seeded(4))._replace(
        level=torch.full((n,), 0.5), sigma=sigma,
        weight=slope / sigma.expm1() if graph == "absorb" else slope)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        score = model(train_sedd.corrupt(x0, noise, cfg), sigma)
        loss = train_sedd.loss_fn(model, x0, noise, cfg)
        nats = train_sedd.nelbo_fn(model, x0, noise, cfg)
    assert score.dtype == loss.dtype == nats.dtype == torch.float32
    assert score.isfinite().all() and loss.isfinite() and nats.isfinite().all()
    assert (score.amax(-1) - score.amin(-1)).max() > 10
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("switch", SWITCHES)
def test_gathered_rows_equal_full_scores(switch):
    model, cfg = small_model(**SWITCHES[switch])
    _, noise, xt = small_batch(cfg)
    rows = torch.tensor([0, 5, 12, 13, 30, 71, 5])
    with torch.no_grad():
        full = model.eval()(xt, noise.sigma)
        assert full.shape == (6, T_NET, V_NET) and full.dtype == torch.float32
        torch.testing.assert_close(model(xt, noise.sigma, rows), take_rows(full, rows))
        if cfg.graph == "uniform":
            assert (full.gather(-1, xt[..., None]) == 0).all()


def test_time_is_an_analytic_factor_of_the_absorbing_score():
    """Without time input the score is that of any other sigma but for 1 / (exp(sigma) - 1); it
    begins as the uniform distribution."""
    model, cfg = small_model()
    _, noise, xt = small_batch(cfg)
    with torch.no_grad():
        a, b = (model(xt, torch.full((6,), sigma)) for sigma in (1e-4, 7.0))
        factor = math.log(math.expm1(7.0) / math.expm1(1e-4))
        torch.testing.assert_close(a - b, torch.full_like(a, factor), rtol=1e-5, atol=1e-5)
        new = train_sedd.Model(cfg)(xt, torch.full((6,), math.log(2)))
        torch.testing.assert_close(new, torch.full_like(new, -math.log(V_NET)))


def test_normalised_absorbing_score_is_a_masked_diffusion_model():
    """The same weights give train_mdlm's loss and bound; not normalised they give another."""
    model, cfg = small_model(normalized=True)
    shape = {k: getattr(cfg, k) for k in train_sedd.SHAPE_FIELDS}
    theirs = train_mdlm.Config(seq_len=T_NET, loss_weight="elbo", **shape)
    twin = train_mdlm.Model(theirs)
    twin.load_state_dict(model.state_dict())
    free = train_sedd.Model(dataclasses.replace(cfg, normalized=False))
    free.load_state_dict(model.state_dict())
    x0, noise, _ = small_batch(cfg)
    for name in ("loss_fn", "nelbo_fn"):
        expected = getattr(train_mdlm, name)(twin, x0, noise, theirs)
        torch.testing.assert_close(getattr(train_sedd, name)(model, x0, noise, cfg), expected)
        assert (getattr(train_sedd, name)(free, x0, noise, cfg) > expected + 1e-3).all()


def test_uniform_score_stays_within_what_noise_allows():
    """Whatever the network says, a ratio is at most that of a certain token to a noisy one, and 1
    where all is noise."""
    model, cfg = small_model(**SWITCHES["uniform"])
    xt = torch.randint(V_NET, (2, T_NET), generator=seeded(1))
    with torch.no_grad():
        late = model(xt, torch.tensor([20.0, 25.0]))
        assert late.abs().max() < 1e-6
        assert model(xt, torch.tensor([0.5, 0.5])).abs().max() > 0.1
        assert train_sedd.Model(cfg)(xt, torch.tensor([1e-4, 1.0])).abs().max() == 0


# Parameters of each preset: (vocabulary, lowest, highest).
PRESET_SIZES = {
    "": (50257, 150e6, 162.5e6),
    "tiny": (256, 1e6, 3.5e6),
    "pg19_355m": (256, 355e6 * 0.99, 355e6 * 1.01),
}


@pytest.mark.parametrize("preset", PRESET_SIZES)
def test_preset_fits_its_description(preset):
    """Parameter count, and a step at the full shape, traced without data."""
    assert PRESET_SIZES.keys() == {"", *presets(train_sedd)}
    vocab_size, low, high = PRESET_SIZES[preset]
    cfg = train_sedd.make_config([f"--preset={preset}"] if preset else [])[0]
    cfg = dataclasses.replace(cfg, vocab_size=vocab_size)
    train_sedd.validate(cfg, 1)
    n_rows = min(cfg.micro_batch, cfg.batch_tokens // cfg.seq_len)
    with FakeTensorMode():
        model = train_sedd.Model(cfg)
        x0 = torch.zeros(n_rows, cfg.seq_len, dtype=torch.int64)
        if cfg.graph == "uniform":
            noise = train_sedd.Noise(*torch.ones(3, n_rows), x0.float(), x0)
            train_sedd.loss_fn(model, x0, noise, cfg).backward()
        else:
            rows = torch.zeros(n_rows * (cfg.seq_len + 1) // 2, dtype=torch.int64)
            model(x0, torch.ones(n_rows), rows).sum().backward()
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    assert all(p.grad is not None for p in model.parameters())


def test_tiny_is_as_large_as_the_others():
    """Equal tokens and parameters: what the comparison of the objectives rests on."""
    a, b = (script.read_preset("tiny") for script in (train_sedd, train_mdlm))
    shape = "data seq_len n_layer n_head n_embd steps batch_tokens micro_batch val_tokens".split()
    assert [a[k] for k in shape] == [b[k] for k in shape]


# The command line.

TINY = ("--seq_len=32", "--batch_tokens=1024", "--micro_batch=32", "--n_layer=1", "--n_head=2",
        "--n_embd=32", "--val_tokens=3200", "--device=cpu", "--compile=0", "--log_every=30")
UNIFORM_FLAGS = ("--graph=uniform", "--noise=geometric", "--cond_dim=16")


def train(*flags):
    """-> (status, output, errors); of equal flags the last."""
    named = {x.partition("=")[0]: x for x in (*TINY, *map(str, flags))}
    return runs.train(*named.values(), script=train_sedd)


def bounds(text):
    return [float(x) for x in re.findall(r"val_nelbo:([\d.]+)\+-", text)]


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Tokens that count upwards modulo 16 from a random start: ln 16 nats a token by frequency, a
    small part of that to who looks at the neighbours."""
    folder = tmp_path_factory.mktemp("counting")
    text = (np.arange(32) + np.random.default_rng(0).integers(0, 16, (700, 1))) % 16
    for name, rows in (("train_000001", text[:500]), ("val_000000", text[500:600]),
                       ("test_000000", text[600:])):
        header = np.zeros(256, "<i4")
        header[:5] = 20240520, 1, rows.size, 1, 16
        (folder / f"{name}.bin").write_bytes(header.tobytes() + rows.astype(np.uint8).tobytes())
    table = [chr(97 + i) for i in range(16)]
    write_meta(folder, [word.encode("latin-1") for word in table])
    return folder


@pytest.mark.parametrize("flags", [
    (), ("--noise=geometric", "--cond_dim=16"), UNIFORM_FLAGS,
    ("--graph=uniform", "--checkpoint_layers=1", "--micro_batch=8")], ids=str)
def test_learns_a_rule(flags, counting, tmp_path):
    """In bf16, far below what frequencies give, and no bound below the entropy; then the test
    split from the checkpoint."""
    out = tmp_path / "run"
    status, text, err = train("--dtype=bf16", "--steps=120", "--eval_every=60", "--lr=0.02",
                              "--ema=0.9", f"--data={counting}", f"--out={out}", *flags)
    assert status == 0, err
    first, last = bounds(text)
    assert math.log(16) / 32 < last < first and last < 0.75 * math.log(16)
    assert "skipped" not in text
    status, again, err = train("--eval_only=1", f"--init_from={out / 'ckpt.pt'}", "--split=test",
                               f"--data={counting}", "--dtype=fp32", *flags)
    assert status == 0, err
    assert "split:test" in again and bounds(again)[0] == pytest.approx(last, rel=0.15)


def test_accumulation_and_recomputation_give_the_same_run(counting, tmp_path):
    losses = []
    for i, flags in enumerate([(), ("--micro_batch=8",), ("--checkpoint_layers=1",)]):
        out = tmp_path / str(i)
        status, _, err = train("--dtype=fp32", "--steps=4", "--log_every=1", f"--data={counting}",
                               f"--out={out}", *UNIFORM_FLAGS, *flags)
        assert status == 0, err
        losses.append([r["loss"] for r in log(out) if "loss" in r])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_context_of_8192_bytes(tmp_path):
    tokens = np.frombuffer(Path(train_sedd.__file__).read_bytes(), np.uint8)[:16384]
    for name in ("train_000001", "val_000000"):
        header = np.zeros(256, "<i4")
        header[:5] = 20240520, 1, len(tokens), 1, 256
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    write_meta(tmp_path, byte_table(256), tokenizer="byte")
    status, text, err = train("--preset=pg19_355m", f"--data={tmp_path}", "--seq_len=8192",
                              "--n_layer=1", "--n_head=1", "--n_embd=16", "--cond_dim=8",
                              "--batch_tokens=16384", "--micro_batch=1", "--steps=2",
                              "--checkpoint_layers=1", "--val_tokens=16384",
                              f"--out={tmp_path / 'run'}")
    assert status == 0, err
    # Two windows, and a network that has hardly begun: about ln 256.
    assert bounds(text)[-1] == pytest.approx(math.log(256), rel=0.3)


@pytest.mark.parametrize(("flags", "words"), [
    (("--graph=masked",), "--graph=masked: there are absorb, uniform"),
    (("--noise=linear",), "--noise=linear: there are loglinear, geometric"),
    (("--sigma_min=0", *UNIFORM_FLAGS[1:]), "--sigma_min=0.0: must be above 0"),
    (("--sigma_max=0.00001",), "--sigma_max"),
    (("--batch_tokens=96", "--micro_batch=3"), "needs pairs of rows"),
    (("--batch_tokens=192", "--micro_batch=1"), "needs pairs of rows"),
])
def test_flag_is_refused(flags, words, counting, tmp_path):
    status, out, err = train(f"--data={counting}", f"--out={tmp_path / 'run'}", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err
    assert not (tmp_path / "run").exists()


def test_import_does_nothing():
    code = "import sys, train_sedd; print(sorted({'sample', 'train_mdlm', 'gpt'} & {*sys.modules}))"
    root = Path(train_sedd.__file__).resolve().parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.stdout, done.stderr) == ("[]\n", "")
