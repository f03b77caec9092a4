"""The sampler of score entropy against exact oracles; and mutants."""
import itertools
import math

import numpy as np
import pytest
import torch
from toys import (
    AbsorbScore,
    Joint,
    UniformScore,
    chi_square_z,
    correlated,
    mutant_of_sample,
    with_samplers,
)

import train_sedd

train_sedd = with_samplers(train_sedd)

V, T = 3, 3
JOINT = Joint(correlated(V, T))
IID = Joint([0.6, 0.3, 0.1])  # one token; copies of it are independent
GRAPHS, NOISES = ("absorb", "uniform"), ("loglinear", "geometric")
BOTH = list(itertools.product(GRAPHS, NOISES))
Z_LIMIT = 5.0  # a correct program fails one z-test in about 10**6; the seeds are fixed besides


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(sedd, graph, noise="loglinear", seq_len=T, vocab_size=V, **names):
    return sedd.Config(vocab_size=vocab_size, seq_len=seq_len, graph=graph, noise=noise, **names)


def exact(graph, toy, **how):
    return (AbsorbScore if graph == "absorb" else UniformScore)(toy, **how)


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


# The bound.


# The score entropy.


# Samplers.

def sample_from(sedd, graph, noise, toy, known=None, is_known=None, *, n_rows=None, seed=0,
                names=None, **how):
    cfg = config(sedd, graph, noise, toy.seq_len, toy.n_values, **(names or {}))
    if known is None:
        known = torch.zeros(n_rows, cfg.seq_len, dtype=torch.int64)
        is_known = torch.zeros_like(known, dtype=torch.bool)
    out = sedd.generate(exact(graph, toy), cfg, known, is_known, gen=seeded(seed), **how)
    assert out.tokens.shape == out.order.shape == known.shape
    assert (out.length == cfg.seq_len).all() and len(out.length) == len(known)
    assert (out.tokens < toy.n_values).all(), "a position is left masked"
    assert torch.equal(out.tokens[is_known], known[is_known])
    assert (out.order[is_known] == 0).all() and (out.order[~is_known] > 0).all()
    return out


def sampler_law(graph, noise, steps, euler):
    """(V**n,) what a sampler with the exact score yields in few steps, by the definitions: every
    position moves on its own, by Tweedie's (exp(-delta Q) s)_y exp(delta Q)(xt, y) (theorem 4.2) or
    by Euler's rates, from t = 1 over even steps; the last one is Tweedie's to sigma = 0."""
    n = V + (graph == "absorb")
    q = rates(graph)
    states = torch.cartesian_prod(*[torch.arange(n)] * T)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[:] = (states == V).all(1) if graph == "absorb" else 1 / len(states)
    code = {tuple(s): i for i, s in enumerate(states.tolist())}
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        if noise == "geometric":
            sigma, sigma_next = (1e-4 * 25e4**x for x in (t, s))
            slope = math.log(25e4) * sigma
        else:
            sigma, sigma_next = (-math.log(1 - (1 - 1e-3) * x) for x in (t, s))
            slope = (1 - 1e-3) * math.exp(sigma)
        last = i == steps - 1
        delta = sigma if last else sigma - sigma_next
        back, forth = (torch.linalg.matrix_exp(x * q) for x in (-delta, delta))
        level = torch.full((len(states),), sigma, dtype=torch.float64)
        score = exact(graph, JOINT, dtype=torch.float64)(states, level).exp()  # (S, T, V)
        if graph == "absorb":
            score = torch.cat((score, torch.ones(len(states), T, 1)), -1)
        after = torch.zeros_like(law)
        for c in (law > 0).nonzero().flatten().tolist():
            choices = []
            for pos, x in enumerate(states[c].tolist()):
                if graph == "absorb" and x < V:
                    choices.append([(x, 1.0)])
                    continue
                if euler and not last:
                    p = slope / steps * q[:, x] * score[c, pos]
                    p[x] = 0
                    p[x] = max(0.0, 1 - p.sum())
                else:
                    p = (score[c, pos] @ back) * forth[:, x]
                if last and graph == "absorb":
                    p[V] = 0
                p = p.clamp(min=0) / p.clamp(min=0).sum()
                choices.append(list(enumerate(p.tolist())))
            for outcome in itertools.product(*choices):
                weight = math.prod(p for _, p in outcome)
                if weight:
                    after[code[tuple(v for v, _ in outcome)]] += law[c] * weight
        law = after
    clean = (states < V).all(1)
    assert math.isclose(law[clean].sum(), 1)
    return law[clean]


def check_few_steps(sedd, graph, noise, euler):
    """Few steps yield exactly the law of the definitions, one step the product of marginals."""
    toy = Joint(correlated(), copies=2000)
    for steps in (1, 3):
        out = sample_from(sedd, graph, noise, toy, n_rows=5, steps=steps, euler=euler)
        assert abs(chi_square_z(toy.counts(out.tokens), sampler_law(graph, noise, steps, euler))
                   ) < Z_LIMIT
        assert out.nfe == steps if graph == "uniform" or noise == "loglinear" else out.nfe <= steps


def check_many_steps(sedd, graph, noise, euler):
    """Many steps reproduce the joint."""
    toy = Joint(correlated(), copies=2000)
    out = sample_from(sedd, graph, noise, toy, n_rows=5, steps=500, euler=euler,
                      names={"sigma_min": 1e-2, "sigma_max": 12.0})
    counts = toy.counts(out.tokens)
    assert abs(chi_square_z(counts, JOINT.p)) < Z_LIMIT
    assert (counts / counts.sum() - JOINT.p).abs().sum() / 2 < 0.03  # total variation


def check_infill(sedd, graph):
    """Known tokens stay; under absorb the rest follows the conditional given what is known."""
    toy, n_rows = Joint(correlated(), copies=1000), 6
    is_known = torch.tensor([False, True, False]).repeat(n_rows, toy.copies)
    is_known[:2] = torch.tensor([True, False, False]).repeat(toy.copies)
    known, seen = torch.where(is_known, 2, 0), []
    out = sample_from(sedd, graph, "loglinear", toy, known, is_known, steps=300,
                      watch=lambda tokens, nfe: seen.append(tokens))
    assert all(torch.equal(tokens[is_known], known[is_known]) for tokens in seen)
    if graph == "absorb":
        for rows, pos in ((slice(0, 2), 0), (slice(2, n_rows), 1)):
            law = JOINT.p * (JOINT.states[:, pos] == 2)
            assert abs(chi_square_z(toy.counts(out.tokens[rows]), law)) < Z_LIMIT
    full = sample_from(sedd, graph, "loglinear", toy, known, torch.ones_like(is_known), steps=3)
    assert full.nfe == 0


def check_unnormalised_sampling(sedd):
    """A score that is not normalised changes when masks fall, not what they become: half of it
    leaves half as many tokens, and the last step takes all that are left."""
    toy = Joint(IID.p, copies=20_000)
    cfg = config(sedd, "absorb", "loglinear", toy.seq_len)
    model = AbsorbScore(toy, shift=math.log(0.5))
    known, frames = torch.zeros(1, toy.seq_len, dtype=torch.int64), []
    out = sedd.generate(model, cfg, known, known.bool(), steps=4, gen=seeded(),
                        watch=lambda tokens, nfe: frames.append(int((tokens == V).sum())))
    left = toy.seq_len * np.cumprod([7 / 8, 5 / 6, 3 / 4, 0])  # 1 - (1/2) / (passes left)
    assert frames == pytest.approx(left.tolist(), abs=Z_LIMIT * math.sqrt(toy.seq_len) / 2)
    assert abs(chi_square_z(toy.counts(out.tokens), IID.p)) < Z_LIMIT


def check_warp(sedd, graph):
    """The warp changes the law of clean tokens, exactly, at any number of steps."""
    toy = Joint(IID.p, copies=5000)

    def half(log_probs):
        assert torch.allclose(log_probs.double(), IID.p.log(), atol=1e-3)
        return (2 * log_probs).log_softmax(-1)

    for noise, steps, euler in (("loglinear", 1, 0), ("loglinear", 7, 0), ("geometric", 400, 1)):
        out = sample_from(sedd, graph, noise, toy, n_rows=2, steps=steps, euler=bool(euler),
                          warp=half, names={"sigma_min": 1e-2, "sigma_max": 12.0})
        assert abs(chi_square_z(toy.counts(out.tokens), IID.p**2)) < Z_LIMIT
    likeliest = torch.tensor([0.0, -math.inf, -math.inf])
    out = sample_from(sedd, graph, "loglinear", toy, n_rows=1, steps=5,
                      warp=lambda log_probs: likeliest.expand_as(log_probs))
    assert (out.tokens == 0).all()


def check_rows_are_independent(sedd, graph):
    """A row's tokens do not depend on the batch it is in."""
    def tokens(n_rows, seed):
        return sample_from(sedd, graph, "loglinear", JOINT, n_rows=n_rows, steps=6,
                           seed=seed).tokens

    whole = tokens(7, 5)
    assert torch.equal(whole[:3], tokens(3, 5)) and not torch.equal(whole, tokens(7, 6))


def check_start(sedd):
    """uniform starts from the prior of its bound, evenly drawn tokens, known ones apart."""
    toy, seen = Joint(IID.p, copies=9000), []
    model = exact("uniform", toy)

    def spy(xt, sigma, rows=None):
        seen.append(xt)
        return model(xt, sigma, rows)

    is_known = torch.arange(9000)[None] < 3000
    known = torch.ones_like(is_known).long()
    sedd.generate(spy, config(sedd, "uniform", seq_len=9000), known, is_known, steps=1,
                  gen=seeded())
    assert (seen[0][is_known] == 1).all()
    counts = torch.bincount(seen[0][~is_known], minlength=V)
    assert abs(chi_square_z(counts, torch.ones(V))) < Z_LIMIT


def check_passes(sedd):
    """Under absorb a pass in which no token fell costs no forward pass, and the network is told
    the noise of the masks that it sees; under uniform it is told that of the time."""
    for graph in GRAPHS:
        cfg, model, calls = config(sedd, graph), exact(graph, JOINT), []

        def spy(xt, sigma, rows=None, model=model, calls=calls):
            calls.append((xt, sigma))
            return model(xt, sigma, rows)

        known = torch.zeros(2, T, dtype=torch.int64)
        out = sedd.generate(spy, cfg, known, known.bool(), steps=50, gen=seeded(1))
        assert out.nfe == len(calls) and int(out.order.max()) <= out.nfe
        if graph == "absorb":
            assert out.nfe <= 2 * T + 1
            for xt, sigma in calls:
                left = (xt == V).sum(1)
                told = -torch.log1p(-left / (T + 1))
                torch.testing.assert_close(sigma[left > 0], told[left > 0])
        else:
            t = 1 - torch.arange(50) / 50
            told = torch.stack([sigma for _, sigma in calls])
            torch.testing.assert_close(told, -torch.log(1 - (1 - 1e-3) * t)[:, None].expand(-1, 2))
        default = sedd.generate(model, cfg, known, known.bool(), steps=None, gen=seeded(1))
        assert default.nfe <= T


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: threads that wait for each other on a busy machine only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("euler", [False, True])
@pytest.mark.parametrize(("graph", "noise"), BOTH)
def test_samplers(graph, noise, euler):
    check_few_steps(train_sedd, graph, noise, euler)
    check_many_steps(train_sedd, graph, noise, euler)


@pytest.mark.parametrize("graph", GRAPHS)
def test_known_tokens_warps_and_rows(graph):
    check_infill(train_sedd, graph)
    check_warp(train_sedd, graph)
    check_rows_are_independent(train_sedd, graph)


def test_passes_of_the_sampler():
    check_unnormalised_sampling(train_sedd)
    check_start(train_sedd)
    check_passes(train_sedd)


# Mutants: a changed line makes its oracle fail.

UNIFORM = ("uniform", "geometric")
MUTANTS = {
    "the last step is as the others": (
        "sigmas = [*sigmas.tolist(), 0.0]", "sigmas = [*sigmas.tolist(), sigmas[-1].item() / 2]",
        lambda m: check_few_steps(m, "uniform", "loglinear", False)),
    "the last step leaves masks": (" | is_last)", ")", check_unnormalised_sampling),
    "euler does not denoise": (
        "if is_euler and not is_last", "if is_euler",
        lambda m: check_few_steps(m, "uniform", "loglinear", True)),
    "tweedie without the forward kernel": (
        "(F.one_hot(current, N) * math.exp(-delta) - math.expm1(-delta) / N)",
        "F.one_hot(current, N).add(1)",
        lambda m: check_few_steps(m, "uniform", "loglinear", False)),
    "tweedie without the backward one": (
        "before = math.exp(delta) * score - math.expm1(delta) * score.mean(-1, keepdim=True)",
        "before = score", lambda m: check_few_steps(m, "uniform", "loglinear", False)),
    "euler stays too seldom": (
        "stay = 1 + law.gather(-1, current[:, None]) - law", "stay = 1 - law",
        lambda m: check_few_steps(m, *UNIFORM, True)),
    "masks fall at the rate of the step's end": (
        "share / math.expm1(sigma)", "share / math.expm1(sigmas[i + 1] + 0.1)",
        lambda m: check_few_steps(m, "absorb", "loglinear", False)),
    "sampling starts from one token": (
        "(uniforms(gens, T) * V).long()", "(uniforms(gens, T) * 0).long()", check_start),
    "one number decides both when and what": (
        "pick, u = uniforms(gens, 2, T).unbind(1)", "pick, u = 2 * [uniforms(gens, T)]",
        lambda m: check_few_steps(m, "absorb", "loglinear", False)),
    "known tokens are noise, too": (
        "if is_absorb else ~is_known", "if is_absorb else torch.ones_like(is_known)",
        lambda m: check_infill(m, "uniform")),
    "the warp acts on noisy tokens": (
        "clean = (1 + growth) * score - growth * score.mean(-1, keepdim=True)", "clean = score",
        lambda m: check_warp(m, "uniform")),
    "rows share their random numbers": (
        "return [torch.Generator().manual_seed(seed) for seed in seeds]",
        "return [gen for _ in seeds]",
        lambda m: check_rows_are_independent(m, "uniform")),
}


def mutant(snippet, replacement):
    """The script with a sampler of which one snippet is replaced."""
    return with_samplers(train_sedd, mutant_of_sample(snippet, replacement))


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


@pytest.mark.parametrize("switch", SWITCHES)
def test_network_fills_in_any_length(switch):
    """Rows known in part or in full beside an empty one; shorter and longer than trained."""
    model, cfg = small_model(**SWITCHES[switch])
    for seq_len in (5, 20):
        known = torch.randint(V_NET, (3, seq_len), generator=seeded(8))
        is_known = torch.zeros(3, seq_len, dtype=torch.bool)
        is_known[1, ::2] = is_known[2] = True
        for euler in (False, True):
            out = train_sedd.generate(model.eval(), cfg, known, is_known, steps=4, gen=seeded(9),
                                      euler=euler)
            assert torch.equal(out.tokens[is_known], known[is_known])
            assert (out.tokens < V_NET).all() and (out.length == seq_len).all()


# Parameters of each preset: (vocabulary, lowest, highest).


# The command line.


