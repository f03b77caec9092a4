"""The sampler of gpt.py against exact oracles and whole passes; and mutants."""
import math

import pytest
import torch
import torch.nn.functional as F
from toys import Iid, Joint, chi_square_z, correlated, mutant_of_sample, with_samplers

import gpt

gpt = with_samplers(gpt)

V, T = 11, 12  # of the small network
Z_LIMIT = 5.0  # a correct program fails one z-test in about 10**6; the seeds are fixed besides
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

    def __call__(self, x, rows=None):
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


def write(module, model, cfg, known=None, is_known=None, *, n_rows=None, seed=0, **how):
    if known is None:
        known = torch.zeros(n_rows, cfg.seq_len, dtype=torch.int64)
        is_known = known.bool()
    out = module.generate(model, cfg, known, is_known, gen=seeded(seed), **how)
    assert out.tokens.shape == out.order.shape == known.shape
    assert torch.equal(out.tokens[is_known], known[is_known])
    assert (out.tokens < cfg.vocab_size).all()
    assert (out.order[is_known] == 0).all() and (out.order[~is_known] > 0).all()
    return out


# ----------------------------------------------------------------------------- likelihood


# ----------------------------------------------------------------------------- sampler


def check_sampler_of_joint(module):
    toy = Joint(correlated(3, 3), copies=8)
    out = write(module, LeftToRight(toy, 24), module.Config(vocab_size=3, seq_len=24), n_rows=2000)
    assert abs(chi_square_z(toy.counts(out.tokens), toy.p)) < Z_LIMIT
    assert (out.length == 24).all() and out.nfe == 24
    assert torch.equal(out.order, torch.arange(1, 25).expand(2000, -1))


def check_sampler_continues(module):
    """After a prompt, of another length in each half of the batch, the conditional given it."""
    toy = Joint(correlated(3, 3))
    known, is_known = torch.full((12_000, 3), 2), torch.zeros(12_000, 3, dtype=torch.bool)
    is_known[:6000, :2] = is_known[6000:, :1] = True
    out = write(module, LeftToRight(toy, 3), module.Config(vocab_size=3, seq_len=3), known,
                is_known)
    for rows, n in ((slice(6000), 2), (slice(6000, 12_000), 1)):
        law = toy.p * (toy.states[:, :n] == 2).all(1)
        assert abs(chi_square_z(toy.counts(out.tokens[rows]), law)) < Z_LIMIT


def check_rare_tokens(module):
    """A token of probability 1e-12 is drawn where the CDF in float64 says."""
    p = torch.tensor([[0.5, 1e-12, 0.5]]).log()
    for u, token in ((0.5 - 1e-12, 0), (0.5, 1), (0.5 + 1e-12, 2), (1 - 2**-53, 2)):
        assert module.draw_tokens(p, torch.tensor([u], dtype=torch.float64)).item() == token


def check_stop(module):
    """A row is what it would be without an end, cut before the first stop that is not its first."""
    toy, cfg = Iid([0.2, 0.5, 0.3]), module.Config(vocab_size=3, seq_len=16)
    known = torch.zeros(200, 16, dtype=torch.int64)
    is_known = torch.zeros(200, 16, dtype=torch.bool)
    is_known[100:, :5] = True  # these begin with five stops of the user's own
    model = LeftToRight(toy, 16)
    free = write(module, model, cfg, known, is_known)
    seen = []
    out = write(module, model, cfg, known, is_known, stop=0,
                watch=lambda x, nfe: seen.append((x == 3).sum(1)))
    for i in range(200):
        row, begin = free.tokens[i].tolist(), 5 if i >= 100 else 1
        end = row.index(0, begin) if 0 in row[begin:] else 16
        assert out.length[i] == end
        assert out.tokens[i].tolist() == row[:end] + [0] * (16 - end)
        spent = torch.arange(1, 17).clamp(max=end + 1) * ~is_known[i]
        assert out.order[i].tolist() == spent.tolist()
    assert len(set(out.length.tolist())) > 10 and (free.length == 16).all()
    assert len(seen) == out.nfe and (seen[-1] == 0).all()
    # The passes go on no longer than the longest row.
    few = write(module, LeftToRight(Iid([0.9, 0.05, 0.05]), 16), cfg, n_rows=4, stop=0)
    assert few.nfe == few.length.max() + 1 < 16


def check_rows_are_independent(module):
    """A row alone, or in front of others, is the same; rows and seeds differ."""
    model, cfg = small_model(module)
    many = write(module, model.double(), cfg, n_rows=6)
    few = write(module, model, cfg, n_rows=2)
    assert torch.equal(many.tokens[:2], few.tokens)
    assert len(many.tokens.unique(dim=0)) == 6
    assert not torch.equal(write(module, model, cfg, n_rows=2, seed=1).tokens, few.tokens)


def check_cache(module):
    """Tokens are those of whole passes, after prompts of any length."""
    for names in SWITCHES.values():
        model, cfg = small_model(module, **names)
        known, is_known = tokens(5), torch.arange(T) < torch.tensor([0, 3, 4, 8, T])[:, None]
        for given in (is_known & False, is_known, is_known[2:3], is_known[4:]):
            kept = write(module, model, cfg, known[:len(given)], given)
            again = write(module, lambda x, rows, m=model: m(x, rows), cfg,
                          known[:len(given)], given)
            assert torch.equal(kept.tokens, again.tokens)
            assert kept.nfe == T - given.sum(1).min()


CHECKS = [check_sampler_of_joint, check_sampler_continues, check_rare_tokens, check_stop,
          check_rows_are_independent, check_cache]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_exactness(check):
    check(gpt)


def test_warp_and_watch():
    cfg, seen = gpt.Config(vocab_size=3, seq_len=5), []

    def likeliest(log_probs):
        return torch.full_like(log_probs, -math.inf).scatter(1, log_probs.argmax(1, True), 0.0)

    known, is_known = torch.ones(2, 5, dtype=torch.int64), (torch.arange(5) < 2).expand(2, -1)
    write(gpt, LeftToRight(Iid([0.5, 0.3, 0.2]), 5), cfg, known, is_known, warp=likeliest,
          watch=lambda x, nfe: seen.append((x.tolist(), nfe)))
    assert seen == [([row, row], i + 1) for i, row in enumerate(
        ([1, 1, 0, 3, 3], [1, 1, 0, 0, 3], [1, 1, 0, 0, 0]))]


# ----------------------------------------------------------------------------- mutants

MUTANTS = {
    "the cache forgets its values": (
        "buffer[..., length:length + N, :] = torch", "buffer[..., :N, :] = torch", (check_cache,)),
    "a stop may not come first": (
        "ends[:, 0] &= start > 0", "pass", (check_stop,)),
    "rows share their random numbers": (
        "return [torch.Generator().manual_seed(seed) for seed in seeds]",
        "return [gen for _ in seeds]",
        (check_rows_are_independent,)),
    "every position has the same random number": (
        "numbers = uniforms(gens, n_numbers, L)", "numbers = uniforms([torch.Generator().manual_seed(0) for _ in gens], n_numbers, L)",
        (check_sampler_of_joint,)),
    "the CDF is in fp32": (
        "cdf = log_probs.double().softmax(-1)", "cdf = log_probs.float().softmax(-1)",
        (check_rare_tokens,)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, checks = MUTANTS[name]
    module = with_samplers(gpt, mutant_of_sample(snippet, replacement))
    for check in checks:
        with pytest.raises(AssertionError):
            check(module)
