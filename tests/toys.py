"""Toy distributions whose conditionals are known exactly, and denoisers made of them.

Shared by the tests of every objective. A context is a (B, T) tensor of tokens in which the value V,
the mask, means "not known"; masked diffusion calls the toy with `xt`. An objective with another
signature builds its own context (an autoregressive one masks what lies ahead, a block one takes
earlier blocks from x0) and asks `log_conditional` for it.
"""
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

Z_LIMIT = 5.0  # a correct program fails one z-test in about 10**6; the seeds are fixed besides

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def small_model(script, seed=0, **names):
    """(network, its Config) in evaluation mode, with every parameter in use: the matrices that
    begin as zero are moved."""
    cfg = script.Config(**{"vocab_size": 11, "seq_len": 12, "n_layer": 2, "n_head": 4, "n_embd": 32,
                           **names})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = script.Model(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model.eval(), cfg

def mutant(script, snippet, replacement):
    """A script with one snippet of its text replaced."""
    source = Path(script.__file__).read_text(encoding="utf-8")
    assert source.count(snippet) == 1, f"to be found once in {script.__file__}: {snippet}"
    module = types.ModuleType("mutant")
    module.__file__ = script.__file__
    sys.modules[module.__name__] = module  # its dataclasses look there
    exec(compile(source.replace(snippet, replacement), "mutant", "exec"), module.__dict__)
    return module

def assert_found_wrong(script, snippet, replacement, *checks, errors=AssertionError):
    """Every check fails on that mutant."""
    module = mutant(script, snippet, replacement)
    for check in checks:
        with pytest.raises(errors):
            check(module)

class Joint:
    """A joint distribution of n tokens over V values, repeated side by side in `copies` groups.

    p: (V,) * n non-negative weights. T = n * copies. Groups are independent, so one wide
    row holds many samples of the joint, which costs a sampler far less than as many rows.
    """
    def __init__(self, p, copies=1):
        p = torch.as_tensor(p, dtype=torch.float64)
        self.n, self.n_values, self.copies = p.dim(), p.shape[0], copies
        self.seq_len = self.n * copies
        self.mask_id = self.n_values
        self.p = (p / p.sum()).flatten()  # (V**n,), last token fastest
        self.states = _grid(self.n_values, self.n)  # (V**n, n) every sequence, in the order of p
        self.contexts = _grid(self.n_values + 1, self.n)  # (C, n) every context
        self.table = self._tabulate()  # (C, n, V)

    def _tabulate(self):
        eye = torch.nn.functional.one_hot(self.states, self.n_values).double()  # (S, n, V)
        agree = self.contexts[:, None] == self.states  # (C, S, n)
        agree |= self.contexts[:, None] == self.mask_id
        table = torch.empty(len(self.contexts), self.n, self.n_values, dtype=torch.float64)
        for i in range(self.n):
            others = [j for j in range(self.n) if j != i]
            fits = agree[:, :, others].all(-1).double() * self.p  # (C, S)
            table[:, i] = fits @ eye[:, i]
        return (table / table.sum(-1, keepdim=True)).log()

    @property
    def entropy(self):
        """Nats per group of n tokens."""
        return -torch.xlogy(self.p, self.p).sum().item()

    def code(self, x, base):
        """(..., n) digits -> (...) index."""
        power = base ** torch.arange(self.n - 1, -1, -1, device=x.device)
        return (x * power).sum(-1)

    def nll(self, x0):
        """(B, T) -> (B,) exact negative log-likelihood in nats, float64."""
        groups = x0.view(len(x0), self.copies, self.n)
        return -self.p[self.code(groups, self.n_values)].log().sum(-1)

    def draw(self, n_rows, gen):
        """(n_rows, T) samples."""
        picks = torch.multinomial(self.p, n_rows * self.copies, replacement=True, generator=gen)
        return self.states[picks].view(n_rows, self.seq_len)

    def counts(self, tokens):
        """(B, T) -> (V**n,) how often each state occurs over all rows and groups."""
        groups = tokens.reshape(-1, self.n)
        return torch.bincount(self.code(groups, self.n_values), minlength=len(self.p))

    def log_conditional(self, context):
        """(B, T) -> (B, T, V) log p(token | the known others of its group)."""
        b, t = context.shape
        groups = context.reshape(b, t // self.n, self.n)
        return self.table[self.code(groups, self.n_values + 1)].view(b, t, self.n_values)

    def __call__(self, xt, sigma=None, rows=None):
        return take_rows(self.log_conditional(xt).float(), rows)

class Iid:
    """Tokens drawn independently from p (V,): the exact denoiser answers log p, for any T."""
    def __init__(self, p):
        p = torch.as_tensor(p, dtype=torch.float64)
        self.p = p / p.sum()
        self.n_values = self.mask_id = len(p)

    @property
    def entropy(self):
        """Nats per token."""
        return -torch.xlogy(self.p, self.p).sum().item()

    def nll(self, x0):
        return -self.p.log()[x0].sum(-1)

    def draw(self, n_rows, seq_len, gen):
        picks = torch.multinomial(self.p, n_rows * seq_len, replacement=True, generator=gen)
        return picks.view(n_rows, seq_len)

    def __call__(self, xt, sigma=None, rows=None):
        shape = xt.shape if rows is None else rows.shape
        return self.p.log().float().expand(*shape, -1)

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

class AbsorbScore:
    """Exact log score of a toy under masking: log p(token | context) - log(exp(sigma) - 1), at the
    masked positions. shift is added, which denormalises it."""
    def __init__(self, toy, shift=0.0, dtype=torch.float32):
        self.toy, self.shift, self.dtype = toy, shift, dtype

    def __call__(self, xt, sigma, rows=None):
        level = torch.expm1(sigma.double()).log()[:, None, None]
        context = torch.where(xt < self.toy.n_values, xt, self.toy.mask_id)
        log_p = self.toy.log_conditional(context) + self.shift
        return take_rows((log_p - level).to(self.dtype), rows)

class UniformScore:
    """Exact log score of a joint whose tokens are replaced by uniform ones with probability
    1 - exp(-sigma): the noised joint, every token of it exchanged for every other."""
    def __init__(self, toy, dtype=torch.float32):
        self.toy, self.dtype = toy, dtype

    def noised(self, sigma):
        """(B,) -> (B, V**n) float64, the law of a noised group."""
        v, n = self.toy.n_values, self.toy.n
        alpha = torch.exp(-sigma.double())[:, None, None]
        kernel = alpha * torch.eye(v) + (1 - alpha) / v  # (B, V, V), symmetric
        p = self.toy.p.expand(len(sigma), -1)
        for _ in range(n):  # the last axis is noised and moved to the front, n times
            p = (p.view(len(sigma), -1, v) @ kernel).transpose(1, 2).flatten(1)
        return p

    def __call__(self, xt, sigma, rows=None):
        (b, t), v, n = xt.shape, self.toy.n_values, self.toy.n
        groups = xt.view(b, t // n, 1, 1, n).expand(-1, -1, n, v, -1)
        place = torch.eye(n, dtype=torch.bool)[:, None]  # (n, 1, n)
        changed = torch.where(place, torch.arange(v)[:, None], groups)  # (B, G, n, V, n)
        code = self.toy.code(changed, v).view(b, -1)
        log_p = self.noised(sigma).log().gather(1, code).view(b, t, v)
        return take_rows((log_p - log_p.gather(-1, xt[..., None])).to(self.dtype), rows)

def rates(graph, n_values=3):
    """Q[a, b], the rate at which a becomes b: the mask is the last state (2310.16834, section 3.4;
    the uniform one for a total rate of (N - 1) / N, so that exp(-sigma) is left alone)."""
    n = n_values + (graph == "absorb")
    q = torch.zeros(n, n, dtype=torch.float64)
    if graph == "absorb":
        q[:-1, -1] = 1
    else:
        q += 1 / n
    return q - torch.diag(q.sum(1))

def correlated(n_values=3, n=3, seed=0):
    """Weights of a joint whose tokens depend on each other strongly, every state possible."""
    gen = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn((n_values,) * n, generator=gen, dtype=torch.float64)).exp()

def take_rows(logits, rows):
    """(B, T, V) -> (R, V) at flat positions; None keeps all."""
    return logits if rows is None else logits.reshape(-1, logits.shape[-1])[rows]

def chi_square_z(counts, p):
    """Standard score of Pearson's statistic of counts against probabilities p (any scale).

    States of p = 0 must not occur at all. The cube-root (Wilson-Hilferty) form is close to normal
    even for few degrees of freedom, so |z| < 5 fails about once in a million runs.
    """
    counts, p = torch.as_tensor(counts).double(), torch.as_tensor(p).double()
    assert counts[p == 0].sum() == 0, "a state of probability zero was drawn"
    counts, p = counts[p > 0], p[p > 0]
    expected = counts.sum() * p / p.sum()
    assert expected.min() > 5, "too few samples for a chi-square test"
    dof = len(p) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * dof)
    return ((statistic / dof) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)

def _grid(base, n):
    return torch.cartesian_prod(*[torch.arange(base)] * n).view(-1, n)

def with_samplers(script, sampler=None):
    """A training script with the sampler of sample.py, or of a mutant of it, that belongs to it:
    generate(model, cfg, known, is_known, *, gen, ..) for a network or an exact denoiser. Of what it
    returns, order (B, T) says which pass gave a token its value; 0: it was known."""
    import sample

    sampler = sampler or sample
    script = types.SimpleNamespace(**vars(script))
    kind = {"train_mdlm": "mdlm", "train_block": "block", "gpt": "gpt"}.get(script.SCRIPT)

    def generate(model, cfg, known, is_known, *, cached=True, euler=False, watch=None, **how):
        order, before = torch.zeros_like(known), torch.where(is_known, known, cfg.vocab_size)

        def look(tokens, nfe):
            nonlocal before
            order[tokens != before] = nfe
            before = tokens.clone()
            if watch is not None:
                watch(before, nfe)

        model = model if cached else model.__call__
        if kind is None:
            how.update(total_noise=script.total_noise, is_euler=euler)
            out = sampler.redraw_rows(model, cfg, known, is_known, watch=look, **how)
        else:
            out = sampler.fill_blocks(model, cfg, known, is_known, kind=kind, watch=look, **how)
        tokens, length, nfe = out
        return types.SimpleNamespace(tokens=tokens, length=length, nfe=nfe, order=order)

    script.generate, script.uniforms = generate, sampler.uniforms
    script.draw_tokens = sampler.draw_tokens
    return script
