"""Masked diffusion against exact oracles: bound, schedules, masks; and mutants that fail.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import contextlib
import itertools
import math
import tempfile

import numpy as np
import pytest
import torch
import toys
from toys import Z_LIMIT, Iid, Joint, chi_square_z, correlated, seeded, take_rows

import train_mdlm

N_VALUES, N_TOKENS = 3, 3
JOINT = Joint(correlated(N_VALUES, N_TOKENS))
# alpha(t) = P(still clean) of the six schedules; the masked fractions that t in (0, 1] reaches.
ALPHA = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: torch.cos(math.pi * t / 2),
    "loglinear": lambda t: 1 - (1 - 1e-3) * t,
    "sqrt": lambda t: 1 - t.sqrt(),
    "clipped_cosine": lambda t: 0.05 + 0.9 * torch.cos(math.pi * t / 2),
    "sigmoid": lambda t: 1 / (1 + torch.exp(10 * (t - 0.5))),
}
MASKED_RANGE = {
    "linear": (0, 1),
    "cosine": (0, 1),
    "loglinear": (0, 1 - 1e-3),
    "sqrt": (0, 1),
    "clipped_cosine": (0.05, 0.95),
    "sigmoid": (1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))),
}

@contextlib.contextmanager
def entropy_file(values):
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, np.array(values))
        file.flush()
        yield file.name

def toy_config(mdlm, seq_len=N_TOKENS, vocab_size=N_VALUES, **names):
    return mdlm.Config(vocab_size=vocab_size, seq_len=seq_len, **names)

def all_masks(seq_len):
    """(2**T, T) bool, every set of masked positions."""
    return torch.tensor(list(itertools.product([False, True], repeat=seq_len)))

def mask_probability(noise, masks, estimator):
    """(R, M): how likely each set is in each row, by the definition of the estimator."""
    seq_len, size = masks.shape[1], masks.sum(-1).double()
    level = noise.level.double()[:, None]
    if estimator == "bernoulli":
        return level**size * (1 - level) ** (seq_len - size)
    ways = torch.tensor([math.comb(seq_len, int(k)) for k in size], dtype=torch.float64)
    return (size == level).double() / ways

def spread_masks(noise, masks, n_repeat):
    """Rows of `noise` with every mask in turn in place of the random ranks, n_repeat times each.

    The ranks are those that yield the mask: lowest where masked.
    """
    def repeat(x):
        return x.repeat_interleave(len(masks) * n_repeat)
    rank = (~masks).float().argsort(dim=-1, stable=True).argsort(dim=-1).float()
    rank = rank.repeat_interleave(n_repeat, 0).repeat(len(noise.level), 1)
    return noise._replace(level=repeat(noise.level), sigma=repeat(noise.sigma),
                          weight=repeat(noise.weight), score=rank)

def exact_nelbo(mdlm, model, x0, cfg, seed=0):
    """(S,) expectation of nelbo_fn for each x0 (S, T), over levels and masks: no sampling error.

    2T rows are T strata of pairs, which hit every k equally often.
    """
    seq_len, masks = x0.shape[1], all_masks(x0.shape[1])
    noise = mdlm.draw_noise(cfg, 2 * seq_len, seeded(seed), bound=True)
    prob = mask_probability(noise, masks, "exact_k")
    assert torch.allclose(prob.sum(-1), torch.ones(2 * seq_len).double()), "k lies outside 1..T"
    spread = spread_masks(noise, masks, len(x0))
    values = mdlm.nelbo_fn(model, x0.repeat(2 * seq_len * len(masks), 1), spread, cfg)
    values = values.double().view(2 * seq_len, len(masks), len(x0))
    return (prob[:, :, None] * values).sum(1).mean(0)

def masked_entropy(joint, masks):
    """(M,) E_x0 sum_{i in S} -log p(x0_i | x0 outside S), from the joint alone."""
    out = []
    for mask in masks:
        log_p = joint.log_conditional(torch.where(mask, joint.mask_id, joint.states))
        ce = -log_p.gather(-1, joint.states[..., None]).squeeze(-1)
        out.append((joint.p * (ce * mask).sum(-1)).sum())
    return torch.stack(out)

def loss_at_fraction(joint, fraction):
    """(R,) f(m): expected sum of masked cross entropies, each token masked with probability m."""
    masks = all_masks(joint.n)
    size = masks.sum(-1)
    m = fraction.double()[:, None]
    return (m**size * (1 - m) ** (joint.n - size) * masked_entropy(joint, masks)).sum(-1)

def elbo_over_range(joint, low, high):
    """The integral of f(m) / m dm over masked fractions: over (0, 1), the entropy of the joint."""
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact: f(m) / m is a polynomial
    m = torch.from_numpy((high - low) / 2 * nodes + (high + low) / 2)
    return ((loss_at_fraction(joint, m) / m) @ torch.from_numpy(weights)).item() * (high - low) / 2

def time_of(schedule, level):
    """(R,) masked fraction -> t, by bisection of alpha(t) = 1 - level."""
    low, high = torch.zeros_like(level), torch.ones_like(level)
    for _ in range(60):
        mid = (low + high) / 2
        clean = ALPHA[schedule](mid) > 1 - level
        low, high = torch.where(clean, mid, low), torch.where(clean, high, mid)
    return (low + high) / 2

def elbo_weight(schedule, t):
    """-alpha'(t) / (1 - alpha(t)) by autograd."""
    t = t.clone().requires_grad_()
    alpha = ALPHA[schedule](t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    return (-slope / (1 - alpha)).detach()

# The bound.

def check_bound_of_joint(mdlm):
    """With exact conditionals the NELBO of every sequence is its exact negative log-likelihood."""
    nelbo = exact_nelbo(mdlm, JOINT, JOINT.states, toy_config(mdlm))
    assert (nelbo - JOINT.nll(JOINT.states)).abs().max() < 1e-5
    assert abs((JOINT.p @ nelbo).item() - JOINT.entropy) < 1e-6 * JOINT.entropy + 1e-6

def check_bound_of_iid(mdlm):
    """For independent tokens it is T H(p) on average, -log p(x0) for each x0."""
    toy = Iid([0.7, 0.2, 0.1])
    x0 = toy.draw(16, 6, seeded(1))
    nelbo = exact_nelbo(mdlm, toy, x0, toy_config(mdlm, seq_len=6))
    assert (nelbo - toy.nll(x0)).abs().max() < 1e-5

def check_bound_with_few_rows(mdlm, n_rows):
    """nelbo_fn is unbiased for any batch: one row, or an odd number, whose last has no partner."""
    cfg, gen, n_draws = toy_config(mdlm), seeded(n_rows), 1200
    x0 = JOINT.draw(n_rows, seeded(10))
    draws = (mdlm.draw_noise(cfg, n_rows, gen, bound=True) for _ in range(n_draws))
    nelbo = torch.stack([mdlm.nelbo_fn(JOINT, x0, noise, cfg) for noise in draws]).double()
    z = (nelbo.mean(0) - JOINT.nll(x0)) / (nelbo.std(0) / math.sqrt(n_draws))
    assert z.abs().max() < Z_LIMIT

def check_every_row_sees_every_count(mdlm, n_rows, bound):
    """The number of masked tokens of every single row is uniform over 1..T."""
    seq_len, n_draws = 5, 1500
    cfg, gen = toy_config(mdlm, seq_len=seq_len), seeded(20 + n_rows)
    k = torch.stack([mdlm.draw_noise(cfg, n_rows, gen, bound=bound).level for _ in range(n_draws)])
    for row in range(n_rows):
        counts = torch.bincount(k[:, row].long(), minlength=seq_len + 1)
        assert counts.numel() == seq_len + 1 and counts[0] == 0, "k lies outside 1..T"
        assert abs(chi_square_z(counts[1:], torch.ones(seq_len))) < Z_LIMIT

def check_pairs(mdlm, bound):
    """Adjacent rows mask k and T + 1 - k; a batch of 2P rows has one k in each 2P-th of 1..T."""
    n_pairs, seq_len = 16, 1024
    cfg, gen = toy_config(mdlm, seq_len=seq_len, loss_weight="elbo"), seeded(3)
    for _ in range(10):
        noise = mdlm.draw_noise(cfg, 2 * n_pairs, gen, bound=bound)
        pair = noise.level.view(n_pairs, 2)
        assert (pair.sum(1) == seq_len + 1).all()
        stratum = (noise.level.long() - 1) * 2 * n_pairs // seq_len
        assert (torch.bincount(stratum, minlength=2 * n_pairs) == 1).all()
        assert torch.equal(noise.weight, (seq_len / noise.level.double()).float())
        alpha = 1 - noise.level.double() / (seq_len + 1)
        assert torch.allclose(noise.sigma.double(), -alpha.log(), rtol=1e-5)

def check_bound_ignores_training_options(mdlm):
    options = [{}, {"loss_weight": "uniform"}]
    for schedule in ALPHA:
        options.append({"schedule": schedule, "estimator": "bernoulli"})
    options.append({"estimator": "bernoulli", "token_entropy": "nowhere.npy"})
    draws = [mdlm.draw_noise(toy_config(mdlm, **o), 6, seeded(4), bound=True) for o in options]
    for draw in draws[1:]:
        assert all(torch.equal(a, b) for a, b in zip(draws[0], draw, strict=True))

def check_bound_ignores_training_masks(mdlm):
    """Entropy masking tilts which tokens training masks; the bound is computed as without it."""
    with entropy_file([0.1, 1.0, 2.0]) as path:
        cfg = toy_config(mdlm, estimator="bernoulli", token_entropy=path)
        nelbo = exact_nelbo(mdlm, JOINT, JOINT.states, cfg)
    assert (nelbo - JOINT.nll(JOINT.states)).abs().max() < 1e-5

# Training losses.

def check_loss_is_the_bound(mdlm):
    """With its weights the loss is the bound of the same noise, which is exact, for every batch."""
    for estimator, n_rows in (("exact_k", 6), ("bernoulli", 7)):
        cfg = toy_config(mdlm, estimator=estimator, loss_weight="elbo")
        x0, noise = JOINT.draw(n_rows, seeded(5)), mdlm.draw_noise(cfg, n_rows, seeded(6))
        nelbo = mdlm.nelbo_fn(JOINT, x0, noise, cfg).mean() / N_TOKENS
        assert math.isclose(mdlm.loss_fn(JOINT, x0, noise, cfg), nelbo, rel_tol=1e-5)

def check_head_rows(mdlm, schedule):
    """The rows for the head are enough for the masks of independent coins, but hardly more."""
    cfg = mdlm.Config(vocab_size=2, seq_len=64, schedule=schedule, estimator="bernoulli")
    noise = mdlm.draw_noise(cfg, 16_000, seeded(7))
    counts = (noise.score < noise.level[:, None]).view(-1, 16 * 64).sum(1)
    n = mdlm.head_rows(schedule, 16, 64)
    assert counts.max() <= n and n < counts.double().mean() + 8 * counts.double().std()
    x0, every = torch.zeros(2, 64, dtype=torch.int64), noise._replace(
        level=torch.ones(2), sigma=torch.ones(2), weight=torch.ones(2), score=torch.zeros(2, 64))
    assert mdlm.masked_losses(Iid(torch.ones(2)), x0, x0 + 2, every, 127)[1].isnan().all()

def check_elbo_of_schedule(mdlm, schedule):
    """The levels and weights of a schedule integrate f(m) / m over the masked fractions it reaches.

    That is the entropy of the joint for a full range. The square root's weight 1 / (2t) makes its
    integrand grow like t**-.5 at 0, which costs accuracy of the quadrature, not bias.
    """
    cfg = toy_config(mdlm, schedule=schedule, estimator="bernoulli", loss_weight="elbo")
    noise = mdlm.draw_noise(cfg, 2**16, seeded(6))
    mean = (noise.weight.double() * loss_at_fraction(JOINT, noise.level)).mean().item()
    low, high = MASKED_RANGE[schedule]
    expected = elbo_over_range(JOINT, low, high)
    assert abs(mean - expected) < (2e-2 if schedule == "sqrt" else 5e-4) * expected
    if (low, high) == (0, 1):
        assert math.isclose(expected, JOINT.entropy, rel_tol=1e-9)
    else:
        assert expected < JOINT.entropy

def check_schedule(mdlm, schedule):
    """t stratified over all rows, level = 1 - alpha_t, sigma = -log alpha_t, weight by autograd."""
    n_rows = 256
    cfg = toy_config(mdlm, schedule=schedule, estimator="bernoulli", loss_weight="elbo")
    noise = mdlm.draw_noise(cfg, n_rows, seeded(7))
    level = noise.level.double()
    low, high = MASKED_RANGE[schedule]
    assert level.min() >= low - 1e-6 and level.max() <= high + 1e-6
    t = time_of(schedule, level)
    strata = torch.bincount((t * n_rows / 2).long().clamp(max=n_rows // 2 - 1))
    assert (strata == 2).all()
    safe = (t > 1e-2) & (t < 1 - 1e-3)  # where fp32 levels determine t well
    torch.testing.assert_close(noise.weight.double()[safe], elbo_weight(schedule, t[safe]),
                               rtol=2e-3, atol=0)
    torch.testing.assert_close(noise.sigma.double()[safe], -ALPHA[schedule](t[safe]).log(),
                               rtol=2e-3, atol=1e-6)

def check_training_loss_of_draws(mdlm, estimator):
    """A large draw, from draw_noise to loss_fn: its mean is the joint's entropy per token."""
    n_rows, n_parts = 40_000, 40
    cfg, gen = toy_config(mdlm, estimator=estimator, loss_weight="elbo"), seeded(8)
    x0, noise = JOINT.draw(n_rows, gen), mdlm.draw_noise(cfg, n_rows, gen)
    losses = torch.stack([mdlm.loss_fn(JOINT, a, type(noise)(*n), cfg) for a, *n in zip(
        *[field.chunk(n_parts) for field in (x0, *noise)], strict=True)]).double() * N_TOKENS
    error = losses.std() / math.sqrt(n_parts)
    assert abs(losses.mean() - JOINT.entropy) < Z_LIMIT * error
    assert error < 0.02 * JOINT.entropy

def check_training_weights(mdlm):
    """What the other loss weights do to the weight of the bound."""
    seq_len, n_rows = 8, 64
    def draw(estimator, **options):
        cfg = toy_config(mdlm, seq_len=seq_len, estimator=estimator, **options)
        return cfg, mdlm.draw_noise(cfg, n_rows, seeded(16))
    elbo = draw("bernoulli", loss_weight="elbo")[1].weight
    clipped = draw("bernoulli", loss_weight="clipped")[1].weight
    assert torch.equal(clipped, elbo.clamp(max=100)) and (elbo > 100).any() and (elbo < 3).any()
    for estimator in ("exact_k", "bernoulli"):
        flat = draw(estimator, loss_weight="uniform")[1].weight
        assert (flat == flat[0]).all() and flat[0] > 0

# Masks.

def check_masks(mdlm, estimator):
    """Masked positions hold the mask id, others x0; every set of positions at its probability."""
    cfg = toy_config(mdlm, estimator=estimator)
    n_rows = 30_000
    noise = mdlm.draw_noise(cfg, n_rows, seeded(12))
    x0 = JOINT.draw(n_rows, seeded(13))
    xt = mdlm.corrupt(x0, noise, cfg)
    is_mask = xt == N_VALUES
    assert torch.equal(xt[~is_mask], x0[~is_mask])
    if estimator == "exact_k":
        assert torch.equal(is_mask.sum(-1), noise.level.long())
    masks = all_masks(N_TOKENS)
    counts = torch.bincount((is_mask * torch.tensor([4, 2, 1])).sum(-1), minlength=8)
    assert abs(chi_square_z(counts, mask_probability(noise, masks, estimator).sum(0))) < Z_LIMIT

def check_entropy_masking(mdlm):
    """P(masked) = 1 - alpha_t ** clamp(2 - H_token, .5, 1.5), over evenly spaced scores."""
    n_grid, fraction = 20_000, 0.4
    entropy = np.array([0.0, 0.5, 1.0, 1.5, 4.0]) / 1.4  # both ends are clamped
    x0 = torch.arange(5)[:, None].expand(-1, n_grid)
    score = ((torch.arange(n_grid) + 0.5) / n_grid).expand(5, -1)
    with entropy_file(entropy) as path:
        cfg = toy_config(mdlm, seq_len=n_grid, vocab_size=5, estimator="bernoulli",
                         token_entropy=path)
        noise = mdlm.draw_noise(cfg, 5, seeded(15))
        noise = noise._replace(level=torch.full((5,), fraction), score=score)
        masked = (mdlm.corrupt(x0, noise, cfg) == 5).double().mean(-1)
    power = torch.tensor([1.5, 1.5, 2 - 1 / 1.4, 2 - 1.5 / 1.4, 0.5]).double()
    expected = 1 - (1 - fraction) ** power
    assert (masked - expected).abs().max() < 2 / n_grid

def check_masked_tokens_stay_hidden(mdlm):
    """The network's input does not change with the tokens under the mask."""
    for estimator in ("exact_k", "bernoulli"):
        cfg = toy_config(mdlm, seq_len=8, estimator=estimator)
        noise = mdlm.draw_noise(cfg, 16, seeded(21))
        a = torch.randint(N_VALUES, (16, 8), generator=seeded(22))
        is_mask = mdlm.corrupt(a, noise, cfg) == N_VALUES
        b = torch.where(is_mask, (a + 1) % N_VALUES, a)
        inputs, toy = [], Iid([0.5, 0.3, 0.2])

        def spy(xt, sigma, rows=None, inputs=inputs, toy=toy):
            inputs.append(xt)
            return toy(xt, sigma, rows)

        for x0 in (a, b):
            mdlm.loss_fn(spy, x0, noise, cfg)
            mdlm.nelbo_fn(spy, x0, noise, cfg)
        assert all(torch.equal(torch.where(is_mask, N_VALUES, a), xt) for xt in inputs)

CHECKS = [check_bound_of_joint, check_bound_of_iid, check_bound_ignores_training_options,
          check_bound_ignores_training_masks, check_loss_is_the_bound, check_training_weights,
          check_masked_tokens_stay_hidden, check_entropy_masking]

@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(train_mdlm)

@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_bound_is_unbiased_for_any_batch(n_rows):
    check_bound_with_few_rows(train_mdlm, n_rows)
    check_every_row_sees_every_count(train_mdlm, n_rows, bound=True)

@pytest.mark.parametrize("bound", [True, False])
def test_pairs_are_antithetic_and_stratified(bound):
    check_pairs(train_mdlm, bound)
    check_every_row_sees_every_count(train_mdlm, 4, bound)

@pytest.mark.parametrize("schedule", ALPHA)
def test_schedule(schedule):
    check_schedule(train_mdlm, schedule)
    check_elbo_of_schedule(train_mdlm, schedule)
    check_head_rows(train_mdlm, schedule)

@pytest.mark.parametrize("estimator", ["exact_k", "bernoulli"])
def test_training_loss_is_the_bound_in_expectation(estimator):
    check_training_loss_of_draws(train_mdlm, estimator)
    check_masks(train_mdlm, estimator)

# Mutants: a changed line makes its oracle fail.

MUTANTS = {
    "the bound divides by more than k": (
        "weight = T / level if elbo", "weight = T / (level + 1e-3) if elbo", check_bound_of_joint),
    "the bound lacks the factor T": (
        "weight = T / level if elbo", "weight = 1 / level if elbo", check_bound_of_iid),
    "an eps in the weight of training": (
        "weight = slope / level ", "weight = slope / (level + 1e-3) ",
        lambda m: check_elbo_of_schedule(m, "linear"), lambda m: check_schedule(m, "cosine")),
    "t is not stratified": (
        "t = 1 - (torch.randperm(n_rows, generator=gen) + u) / n_rows", "t = 1 - u",
        lambda m: check_schedule(m, "linear")),
    "the partner masks T - k": (
        "torch.stack((k, T + 1 - k), 1)", "torch.stack((k, T - k), 1)",
        lambda m: check_pairs(m, bound=True), check_bound_of_joint),
    "k from 0 to T - 1": (
        "k = 1 + (u * T).long()", "k = (u * T).long()",
        lambda m: check_every_row_sees_every_count(m, 3, bound=True)),
    "no coin in the pair": (
        "k = torch.where(torch.rand(n_pairs, generator=gen) < 0.5, k, T + 1 - k)", "k = k + 0",
        lambda m: check_every_row_sees_every_count(m, 1, bound=True)),
    "x0 leaks through some masks": (
        "F.cross_entropy(model(xt, noise.sigma, rows),",
        "F.cross_entropy(model(torch.where(x0 == 1, x0, xt), noise.sigma, rows),",
        check_bound_of_joint, lambda m: check_training_loss_of_draws(m, "bernoulli"),
        check_masked_tokens_stay_hidden),
    "exact_k divides by the masked count": (
        "noise, n)[1].sum() / (B * T)", "noise, n)[1].sum() / n", check_loss_is_the_bound,
        lambda m: check_training_loss_of_draws(m, "exact_k")),
    "bernoulli divides by the masked count": (
        "n)[1].sum() / (B * T)",
        "n)[1].sum() / (corrupt(x0, noise, cfg) != x0).sum()",
        check_loss_is_the_bound),
    "the bound divides by the masked count": (
        "rows // x0.size(1), losses)",
        "rows // x0.size(1), losses) * T / (xt != x0).sum(1).clamp(min=1)",
        check_bound_of_iid),
    "masked tokens beyond a static size are dropped": (
        "float(fraction.mean() + 6 * spread.sqrt())", "float(fraction.mean())",
        lambda m: check_head_rows(m, "cosine")),
    "a dropped token costs nothing": (
        "torch.where(is_mask.sum() <= n, ce * weight[rows], torch.nan)", "ce * weight[rows]",
        lambda m: check_head_rows(m, "cosine")),
    "masks prefer the left": (
        "order = torch.rand(n_rows, T, generator=gen).argsort(1)",
        "order = torch.arange(T).expand(n_rows, T)", lambda m: check_masks(m, "exact_k")),
    "pairs are stratified over the whole range": (
        "+ u) / (2 * n_pairs)", "+ u) / n_pairs", lambda m: check_pairs(m, bound=False)),
    "training masks spill into the bound": (
        "xt = torch.where(noise.score < noise.level[:, None], cfg.vocab_size, x0)\n    rows",
        "xt = corrupt(x0, noise, cfg)\n    rows", check_bound_ignores_training_masks),
    "the entropies' tilt is not clamped": (
        ".clamp(0.5, 1.5)", ".clamp(0, 1.5)", check_entropy_masking),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    toys.assert_found_wrong(train_mdlm, *MUTANTS[name])

# The network.

SWITCHES = {
    "plain": {},
    "swiglu": {"mlp": "swiglu"},
    "unet of an odd number of layers": {"unet": True, "n_layer": 3},
    "tied": {"tied": True},
    "value residual": {"value_residual": True, "n_kv_head": 2},
    "time input": {"cond_dim": 16},
    "recomputed": {"checkpoint_layers": True, "dropout": 0.2},
    "all": {"mlp": "swiglu", "unet": True, "tied": True, "softcap": 3.0, "n_kv_head": 1,
            "cond_dim": 16, "dropout": 0.1, "value_residual": True},
}
V = 11  # real tokens of the small network; also the mask's id

def small_model(**names):
    return toys.small_model(train_mdlm, **names)

def half_masked(n_rows=4, seq_len=12, seed=1):
    """(xt, sigma): random tokens, about half of them masked."""
    xt = torch.randint(V, (n_rows, seq_len), generator=seeded(seed))
    is_mask = torch.rand(n_rows, seq_len, generator=seeded(seed + 1)) < 0.5
    return torch.where(is_mask, V, xt), torch.linspace(0.3, 1.5, n_rows)

@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_gets_a_finite_gradient(switch):
    model, cfg = small_model(**SWITCHES[switch])
    model.train()
    x0 = torch.randint(V, (6, cfg.seq_len), generator=seeded(3))
    loss = train_mdlm.loss_fn(model, x0, train_mdlm.draw_noise(cfg, 6, seeded(4)), cfg)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, f"{name} has no effect"

@pytest.mark.parametrize("switch", SWITCHES)
def test_gathered_rows_equal_full_logits(switch):
    model, _ = small_model(**SWITCHES[switch])
    xt, sigma = half_masked()
    rows = torch.tensor([0, 5, 12, 13, 30, 47, 5])
    results = []
    for gathered in (True, False):
        model.zero_grad()
        logits = model(xt, sigma, rows) if gathered else model(xt, sigma)
        if not gathered:
            assert logits.shape == (4, 12, V)  # the mask has no logit: it is never predicted
            logits = take_rows(logits, rows)
        assert logits.shape == (len(rows), V) and logits.dtype == torch.float32
        logits.logsumexp(-1).square().sum().backward()
        results.append([logits.detach(), *[p.grad.clone() for p in model.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("switch", ["plain", "time input", "all"])
def test_what_an_output_depends_on(switch):
    model, _ = small_model(**SWITCHES[switch])
    with torch.no_grad():
        xt, sigma = half_masked()
        base = model(xt, sigma)
        # Another token anywhere in a row is seen to its left and right, and in no other row.
        changed = xt.clone()
        changed[1, 6] = (xt[1, 6] + 1) % (V + 1)
        moved = (model(changed, sigma) - base).abs().amax(-1) > 1e-6
        assert moved[1].all() and not moved[[0, 2, 3]].any()
        # A row alone is computed as in the batch.
        torch.testing.assert_close(model(xt[2:3], sigma[2:3]), base[2:3], rtol=1e-4, atol=1e-5)
        # The order of tokens matters, though nothing is causal.
        assert not torch.allclose(model(xt.flip(1), sigma).flip(1), base, atol=1e-3)
        told = sigma.clone()
        told[0] += 1
        moved = (model(xt, told) - base).abs().amax((1, 2)) > 1e-6
        assert moved.tolist() == [SWITCHES[switch].get("cond_dim", 0) > 0, False, False, False]

def test_dropout_acts_in_training_only():
    model, _ = small_model(dropout=0.2)
    xt, sigma = half_masked()
    with torch.no_grad():
        model.train()
        assert not torch.allclose(model(xt, sigma), model(xt, sigma))
        model.eval()
        assert torch.equal(model(xt, sigma), model(xt, sigma))

def test_no_masked_token_is_no_loss():
    """A Bernoulli draw may mask nothing at all: the loss is 0, its gradient too."""
    model, cfg = small_model(estimator="bernoulli")
    noise = train_mdlm.draw_noise(cfg, 2, seeded(7))
    noise = noise._replace(level=torch.zeros(2))
    loss = train_mdlm.loss_fn(model, torch.zeros(2, 12, dtype=torch.int64), noise, cfg)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())

def test_tied_head_leaves_out_the_mask():
    tied, cfg = small_model(tied=True)
    free, _ = small_model(tied=False)
    n_tied, n_free = (sum(p.numel() for p in m.parameters()) for m in (tied, free))
    assert n_free - n_tied == V * cfg.n_embd
    xt, sigma = half_masked()
    tied(xt % V, sigma).square().sum().backward()
    (embedding,) = [p for p in tied.parameters() if p.shape == (V + 1, cfg.n_embd)]
    assert (embedding.grad[V] == 0).all() and (embedding.grad[:V].abs().sum(-1) > 0).all()

def test_softcap_bounds_the_logits():
    model, _ = small_model(softcap=3.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        logits = model(*half_masked())
    assert 2 < logits.abs().max() <= 3
