"""Score entropy diffusion against exact oracles: entropy, bound, noise; and mutants that fail.

Every `check_*` takes the module under test, so that a mutant of it can be put in its place.
"""
import dataclasses
import itertools
import math

import pytest
import torch
import toys
from toys import AbsorbScore, Joint, UniformScore, chi_square_z, correlated, seeded, take_rows

import train_mdlm
import train_sedd

V, T = 3, 3
JOINT = Joint(correlated(V, T))
IID = Joint([0.6, 0.3, 0.1])  # one token; copies of it are independent
GRAPHS, NOISES = ("absorb", "uniform"), ("loglinear", "geometric")
BOTH = list(itertools.product(GRAPHS, NOISES))
SIGMAS = torch.logspace(-4, math.log10(25), 30, dtype=torch.float64)

def config(sedd, graph, noise="loglinear", seq_len=T, vocab_size=V, **names):
    return sedd.Config(vocab_size=vocab_size, seq_len=seq_len, graph=graph, noise=noise, **names)

def exact(graph, toy, **how):
    return (AbsorbScore if graph == "absorb" else UniformScore)(toy, **how)

def sigma_one(cfg):
    """Total noise at t = 1, by its definition."""
    return cfg.sigma_max if cfg.noise == "geometric" else -math.log(1e-3)

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
    kernel = torch.linalg.matrix_exp(noise.sigma.double()[:, None, None] * toys.rates(graph))
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
        kernel = torch.linalg.matrix_exp(sigma * toys.rates(graph))
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
        assert abs((nelbo - toy.nll(x0)).mean()) < toys.Z_LIMIT * error
        assert error < 0.03 * toy.entropy * toy.copies

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
    assert abs(losses.mean() - JOINT.entropy) < toys.Z_LIMIT * error + 5e-3
    assert error < 0.03 * JOINT.entropy

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
        assert abs(chi_square_z(found, law.sum(0))) < toys.Z_LIMIT

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
    q = toys.rates(graph, len(score))
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

@pytest.mark.parametrize(("graph", "noise"), BOTH)
def test_bound_equals_the_likelihood_of_an_exact_score(graph, noise):
    check_bound(train_sedd, graph, noise)
    check_bound_of_draws(train_sedd, graph, noise)

@pytest.mark.parametrize(("graph", "noise"), BOTH)
def test_noise_and_training_loss(graph, noise):
    check_training_noise(train_sedd, graph, noise)
    check_loss_is_the_bound(train_sedd, graph, noise)
    check_corruption(train_sedd, graph, noise)

def test_hidden_tokens_do_not_reach_the_network():
    check_hidden_tokens(train_sedd)
    check_padding(train_sedd)

def test_score_entropy():
    for graph in GRAPHS:
        check_definition(train_sedd, graph)
    check_precision(train_sedd)
    check_absorb_is_mdlm(train_sedd)

# Mutants: a changed line makes its oracle fail.

UNIFORM = ("uniform", "geometric")
MUTANTS = {
    "no prior term": (" + T * prior_nats(cfg)", "", lambda m: check_bound(m, *UNIFORM)),
    "a prior of another sigma": (
        "alpha, N = math.exp(-last_sigma(cfg))", "alpha, N = math.exp(-cfg.sigma_max)",
        lambda m: check_bound(m, "uniform", "loglinear")),
    "the bound begins at sigma_min": (
        "    if bound:\n", "    if bound and cfg.noise == 'loglinear':\n",
        lambda m: check_bound(m, *UNIFORM)),
    "the bound lacks half of dsigma": (
        "2 * end * t / (1", "end * t / (1", lambda m: check_bound(m, "uniform", "loglinear")),
    "an eps in the weight of the bound": (
        "T / level\n", "T / (level + 1e-3)\n",
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
        lambda m: check_bound(m, "absorb", NOISES[0])),
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
        ":].sum() / (B * T)", ":].sum() / (xt != x0).sum()",
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
        "torch.randint(V, shape, generator=gen)", "torch.zeros(n_rows, T).long()",
        lambda m: check_corruption(m, *UNIFORM)),
    "more noise than stated": (
        "level = -torch.expm1(-sigma)", "level = -torch.expm1(-sigma * V / (V - 1))",
        lambda m: check_corruption(m, *UNIFORM)),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    toys.assert_found_wrong(train_sedd, *MUTANTS[name])

# The network.

V_NET, T_NET = 11, 12
SWITCHES = {
    "absorb": {"cond_dim": 16},
    "uniform": {"graph": "uniform", "cond_dim": 16},
    "normalized": {"graph": "uniform", "normalized": True, "softcap": 3.0, "n_kv_head": 2},
}

def small_model(**names):
    return toys.small_model(train_sedd, **names)

def small_batch(cfg, n_rows=6):
    x0 = torch.randint(V_NET, (n_rows, T_NET), generator=seeded(3))
    noise = train_sedd.draw_noise(cfg, n_rows, seeded(4))
    return x0, noise, train_sedd.corrupt(x0, noise, cfg)

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
