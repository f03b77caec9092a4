"""The sampler of block diffusion against exact oracles and whole passes; and mutants."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from toys import Iid, Joint, chi_square_z, correlated, mutant_of_sample, with_samplers

import train_block

SCRIPT, train_block = train_block, with_samplers(train_block)

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

    def __call__(self, xt, x0, rows=None):
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


def write(module, model, cfg, known=None, is_known=None, *, n_rows=None, seed=0, steps=None,
          length=None, **how):
    if known is None:
        known = torch.zeros(n_rows, length or cfg.seq_len, dtype=torch.int64)
        is_known = known.bool()
    out = module.generate(model, cfg, known, is_known, steps=steps, gen=seeded(seed), **how)
    assert out.tokens.shape == out.order.shape == known.shape
    assert torch.equal(out.tokens[is_known], known[is_known])
    assert (out.tokens < cfg.vocab_size).all()
    assert (out.order[is_known] == 0).all() and (out.order[~is_known] > 0).all()
    return out


# ----------------------------------------------------------------------------- mask


def moved(model, xt, x0, name, at, value=None):
    """(T,) which outputs another token of one copy changes."""
    changed = {"xt": xt.clone(), "x0": x0.clone()}
    changed[name][0, at] = (changed[name][0, at] + 1) % V if value is None else value
    with torch.no_grad():
        difference = model(**changed) - model(xt, x0)
    assert (difference[1] == 0).all()  # the other row
    return difference[0].abs().amax(-1) > 1e-6


# ----------------------------------------------------------------------------- noise


# ----------------------------------------------------------------------------- bound


# ----------------------------------------------------------------------------- sampler


def check_sampler_of_joint(module):
    """Groups of 3 tokens across blocks of 4: first-hitting and ancestral."""
    toy = Joint(correlated(2, 3).sqrt(), copies=4)
    cfg = module.Config(vocab_size=2, seq_len=12, block_len=4, n_layer=1)
    for steps, n_rows in ((None, 1500), (60, 500)):
        out = write(module, Blocks(toy, 12, 4), cfg, n_rows=n_rows, steps=steps)
        assert abs(chi_square_z(toy.counts(out.tokens), toy.p)) < Z_LIMIT
        assert (out.length == 12).all() and out.nfe <= (12 if steps is None else 180)
        if steps is None:
            order = out.order.view(-1, 3, 4).sort(2)[0].flatten(1)
            assert torch.equal(order, torch.arange(1, 13).expand(n_rows, -1))
            first = (out.order == 1).sum(0)[:4]
            assert abs(chi_square_z(first, torch.ones(4))) < Z_LIMIT


def check_sampler_continues(module):
    """After a prompt, of another length in each half of the batch, the conditional given it."""
    toy = Joint(correlated(2, 4).sqrt())
    known, is_known = torch.ones(8000, 4, dtype=torch.int64), torch.zeros(8000, 4).bool()
    is_known[:4000, :3] = is_known[4000:, :1] = True
    cfg = module.Config(vocab_size=2, seq_len=4, block_len=2, n_layer=1)
    out = write(module, Blocks(toy, 4, 2), cfg, known, is_known)
    for rows, n in ((slice(4000), 3), (slice(4000, 8000), 1)):
        law = toy.p * (toy.states[:, :n] == 1).all(1)
        assert abs(chi_square_z(toy.counts(out.tokens[rows]), law)) < Z_LIMIT


def check_stop(module):
    """A row is what it would be without an end, cut before the first stop that is not its first."""
    toy = Iid([0.1, 0.5, 0.4])
    cfg = module.Config(vocab_size=3, seq_len=16, block_len=4, n_layer=1)
    model, length = Blocks(toy, 16, 4), 18
    known = torch.zeros(200, length, dtype=torch.int64)
    is_known = torch.zeros(200, length, dtype=torch.bool)
    is_known[100:, :5] = True  # these begin with five stops of the user's own
    free = write(module, model, cfg, known, is_known)
    seen = []
    out = write(module, model, cfg, known, is_known, stop=0,
                watch=lambda x, nfe: seen.append(((x == 3).sum(), nfe)))
    for i in range(200):
        row, begin = free.tokens[i].tolist(), 5 if i >= 100 else 1
        end = row.index(0, begin) if 0 in row[begin:] else length
        assert out.length[i] == end
        assert out.tokens[i].tolist() == row[:end] + [0] * (length - end)
    assert len(set(out.length.tolist())) > 10 and (free.length == length).all()
    assert seen[-1] == (0, out.nfe) and (out.order <= out.nfe).all()
    few = write(module, Blocks(Iid([0.9, 0.05, 0.05]), 16, 4), cfg, n_rows=4, stop=0)
    assert few.nfe == 4 and few.length.max() < 4  # no pass behind the last end


def check_rows_are_independent(module):
    """A row alone, or in front of others with other prompts, is the same; rows and seeds differ."""
    model, cfg = small_model(module)
    model, known = model.double(), tokens(6)
    is_known = torch.arange(T) < torch.tensor([9, 9, 0, 4, 5, 6])[:, None]
    for steps in (None, 3):
        many = write(module, model, cfg, known, is_known, steps=steps)
        few = write(module, model, cfg, known[:2], is_known[:2], steps=steps)
        assert torch.equal(many.tokens[:2], few.tokens)
        many = write(module, model, cfg, n_rows=6, steps=steps)
        assert len(many.tokens.unique(dim=0)) == 6
        other = write(module, model, cfg, n_rows=6, seed=1, steps=steps)
        assert not torch.equal(other.tokens, many.tokens)


def uncached(model):
    return lambda xt, x0, rows: model(xt, x0, rows)


def remasking(log_probs, is_mask, *, step, steps, u, **_):
    assert log_probs.shape == (is_mask.sum(), V) and u.shape == is_mask.shape
    return torch.where(is_mask, u > 1 / (steps - step), u < 0.2)


def check_cache(module):
    """Tokens are those of whole passes: every prompt, order, switch; a last block cut short."""
    for names in SWITCHES.values():
        model, cfg = small_model(module, **names)
        for length in (T, T - 2):
            known = tokens(6, length, n_values=5)
            prompts = torch.tensor([0, 3, 4, 6, 8, length])[:, None]
            is_known = torch.arange(length) < prompts
            for how in ({}, {"steps": 2}, {"steps": 9, "choose": remasking}):
                for given in (is_known & False, is_known, is_known[3:4]):
                    kept, again = (write(module, m, cfg, known[:len(given)], given, **how)
                                   for m in (model, uncached(model)))
                    assert all(torch.equal(a, torch.as_tensor(b))
                               for a, b in zip(map(torch.as_tensor, vars(kept).values()), vars(again).values(), strict=True))
                    assert "choose" in how or kept.nfe <= 3 * how.get("steps", L)


def check_window(module):
    """Beyond seq_len: what a whole pass gives in which every block sees the newest seq_len tokens;
    the cache keeps no more than it needs, and a long prompt enters it in pieces."""
    def banded(n, block_len, device, flex):
        at = torch.arange(2 * n)
        q, k = at[:, None] % n // block_len, at % n // block_len
        mask = module.sees(at[:, None], at, n, block_len) & (q - k < T // L)
        return {n: mask[:n], 2 * n: mask}

    whole_mask = SCRIPT.two_copy_masks
    for names in SWITCHES.values():
        model, cfg = small_model(module, **names)
        long = 5 * T + 2
        known = tokens(3, long, n_values=5)
        for prompts in ((0, 0, 0), (30, 41, 33), (1, 40, 7)):
            is_known = torch.arange(long) < torch.tensor(prompts)[:, None]
            out = write(module, model, cfg, known, is_known)
            try:
                model.masks.clear()
                SCRIPT.two_copy_masks = banded
                wide = dataclasses.replace(cfg, seq_len=2 * long)  # every pass reads all of it
                again = write(module, uncached(model), wide, known, is_known)
            finally:
                SCRIPT.two_copy_masks = whole_mask
                model.masks.clear()
            assert torch.equal(out.tokens, again.tokens)


CHECKS = [check_sampler_of_joint, check_sampler_continues, check_stop, check_rows_are_independent,
          check_cache, check_window]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(train_block)


def test_watch_sees_every_pass():
    cfg, seen = config(vocab_size=3, seq_len=4, block_len=2, n_layer=1), []
    known, is_known = torch.ones(1, 3, dtype=torch.int64), torch.tensor([[True, False, False]])

    def likeliest(log_probs):
        return torch.full_like(log_probs, -math.inf).scatter(1, log_probs.argmax(1, True), 0.0)

    def left_to_right(log_probs, is_mask, *, step, steps, u, **_):
        return is_mask & (torch.arange(2) > step)

    write(train_block, Blocks(Iid([0.5, 0.3, 0.2]), 4, 2), cfg, known, is_known, warp=likeliest,
          choose=left_to_right, watch=lambda x, nfe: seen.append((x[0].tolist(), nfe)))
    assert seen == [([1, 3, 3], 1), ([1, 0, 3], 2), ([1, 0, 0], 3), ([1, 0, 0], 4)]


# ----------------------------------------------------------------------------- mutants

MUTANTS = {
    "the cache keeps the noised block": (
        "self.length, self.done = 0, length + N - L, self.done + N - L",
        "self.length, self.done = 0, length + N, self.done + N", (check_cache,)),
    "the window is a block short": (
        "self.window, self.capacity = cfg.seq_len - self.n_noised,", "self.window, self.capacity = cfg.seq_len // 3,",
        (check_window, check_cache)),
    "the window has no end": (
        "(j > i - cfg.seq_len // L)", "(j > i - 10**6)", (check_window,)),
    "stops behind the end of a row count": (
        "ends = (block == stop) & ~fixed[:, here]", "ends = block == stop", (check_stop,)),
    "a stop may not come first": ("ends[:, 0] &= start > 0", "pass", (check_stop,)),
    "known tokens are masked again": (
        "new_mask &= ~fixed[:, here] & (i < passes - 1)", "new_mask &= i < passes - 1",
        (check_cache,)),
    "random numbers hang on the batch": (
        "uniforms(gens, passes, n_numbers, L)", "pass",
        (check_rows_are_independent,)),
    "a pick decides the token, too": (
        "pick, u = numbers[:, 0], numbers[:, -1]", "pick = u = numbers[:, 0]",
        (check_sampler_of_joint,)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, checks = MUTANTS[name]
    module = with_samplers(train_block, mutant_of_sample(snippet, replacement))
    for check in checks:
        with pytest.raises((AssertionError, RuntimeError)):
            check(module)
