"""The samplers of sample.py against exact oracles and whole passes; and mutants that fail them."""
import contextlib
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from runs import one_thread as one_thread
from toys import Z_LIMIT, Iid, Joint, chi_square_z, correlated, mutant, rates, seeded, with_samplers

import gpt
import sample
import train_block
import train_mdlm
import train_sedd

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
MDLM, BLOCK, SEDD, GPT = map(with_samplers, (train_mdlm, train_block, train_sedd, gpt))
JOINT = Joint(correlated(3, 3))
ONE = Joint([0.6, 0.3, 0.1])  # one token; copies of it are independent
V, T, L = 11, 12, 4  # of a small network
SWITCHES = {
    "plain": {},
    "grouped queries, unet": {"n_kv_head": 2, "unet": True, "n_layer": 3},
    "all": {"mlp": "swiglu", "unet": True, "tied": True, "softcap": 3.0, "n_kv_head": 1,
            "dropout": 0.1, "value_residual": True},
}
GRAPHS, NOISES = ("absorb", "uniform"), ("loglinear", "geometric")

def in_blocks(module, names):
    return ({"block_len": L} if module.SCRIPT == "train_block" else {}) | names

def config(module, n_values, seq_len, **names):
    return module.Config(vocab_size=n_values, seq_len=seq_len, **in_blocks(module, names))

def small_model(module, **names):
    return toys.small_model(module, **in_blocks(module, names))

def tokens(n_rows, seq_len=T, n_values=V):
    return torch.randint(n_values, (n_rows, seq_len), generator=seeded(1))

def write(module, model, cfg, known=None, is_known=None, *, n_rows=None, seed=0, **how):
    if known is None:
        known = torch.zeros(n_rows, cfg.seq_len, dtype=torch.int64)
        is_known = known.bool()
    out = module.generate(model, cfg, known, is_known, gen=seeded(seed), **how)
    assert out.tokens.shape == out.order.shape == known.shape and len(out.length) == len(known)
    assert torch.equal(out.tokens[is_known], known[is_known])
    assert (out.tokens < cfg.vocab_size).all(), "a position is left masked"
    assert (out.order[is_known] == 0).all() and (out.order[~is_known] > 0).all()
    return out

def assert_law(toy, out, law=None, rows=slice(None)):
    assert abs(chi_square_z(toy.counts(out.tokens[rows]), toy.p if law is None else law)) < Z_LIMIT

def exact(module, toy, seq_len, **names):
    """(A denoiser that knows the toy distribution, a config)"""
    cfg = config(module, toy.n_values, seq_len, **names)
    if module.SCRIPT == "train_sedd":
        return (toys.AbsorbScore if cfg.graph == "absorb" else toys.UniformScore)(toy), cfg
    if module.SCRIPT == "train_block":
        return toys.Blocks(toy, seq_len, cfg.block_len), cfg
    return (toy if module.SCRIPT == "train_mdlm" else toys.LeftToRight(toy, seq_len)), cfg

def bare_lm(module, model, cfg):
    """sample.LM of a denoiser, without a checkpoint."""
    lm = object.__new__(sample.LM)
    lm.__dict__.update(
        model=model, net=model, cfg=cfg, script=module, device=torch.device("cpu"),
        kind=module.SCRIPT.removeprefix("train_"), amp=contextlib.nullcontext,
        block_len=getattr(cfg, "block_len", 0), graph=getattr(cfg, "graph", 0),
        tokenizer=SimpleNamespace(bos_id=-1, table=5 * [b""]))
    return lm

def ancestral_law(joint, steps):
    """(V**n,) what ancestral sampling in `steps` even steps of t yields. In step i each masked
    token is committed with probability 1 / (steps - i), all at once."""
    law = torch.zeros(len(joint.contexts), dtype=torch.float64)
    law[joint.code(torch.full((joint.n,), joint.mask_id), joint.n_values + 1)] = 1
    for i in range(steps):
        commit, after = 1 / (steps - i), torch.zeros_like(law)
        for c in law.nonzero().flatten().tolist():
            choices = []  # per position: (value, probability) of what stands there afterwards
            for pos, value in enumerate(joint.contexts[c].tolist()):
                p = (commit * joint.table[c, pos].exp()).tolist()
                is_mask = value == joint.mask_id
                choices.append([(value, 1 - commit), *enumerate(p)] if is_mask else [(value, 1.0)])
            for outcome in itertools.product(*choices):
                code = joint.code(torch.tensor([v for v, _ in outcome]), joint.n_values + 1)
                after[code] += law[c] * math.prod(p for _, p in outcome)
        law = after
    return law[joint.code(joint.states, joint.n_values + 1)]

def check_ancestral_law(mdlm, steps):
    """Few steps give exactly the factorised law of few steps; one step the product of marginals."""
    toy = Joint(correlated(), copies=2500)
    out = write(mdlm, *exact(mdlm, toy, toy.seq_len), n_rows=8, steps=steps)
    assert_law(toy, out, ancestral_law(JOINT, steps))
    assert out.nfe <= steps

def check_first_hitting(mdlm, choose=None):
    """One token a pass, in random order: the joint itself, and every order equally often."""
    out = write(mdlm, *exact(mdlm, JOINT, 3), n_rows=20_000, choose=choose)
    assert_law(JOINT, out)
    assert out.nfe == 3
    assert torch.equal(out.order.sort(-1).values, torch.arange(1, 4).expand(20_000, -1))
    orders = torch.bincount((out.order * torch.tensor([9, 3, 1])).sum(-1))
    assert (orders > 0).sum() == 6
    assert abs(chi_square_z(orders[orders > 0], torch.ones(6))) < Z_LIMIT

def check_infill(mdlm, steps):
    """Known tokens stay; the rest follows the conditional given what is known in its row."""
    copies = 1 if steps is None else 1000
    toy, n_rows = Joint(correlated(), copies), 6000 // copies
    is_known = torch.tensor([False, True, False]).repeat(n_rows, copies)
    is_known[:n_rows // 3] = torch.tensor([True, False, False]).repeat(copies)
    out = write(mdlm, *exact(mdlm, toy, toy.seq_len), torch.where(is_known, 2, 0), is_known,
                steps=steps)
    for rows, pos in ((slice(0, n_rows // 3), 0), (slice(n_rows // 3, n_rows), 1)):
        assert_law(toy, out, JOINT.p * (JOINT.states[:, pos] == 2), rows)

def check_blocks(block):
    """Groups of 3 tokens across blocks of 4: first-hitting and ancestral."""
    toy = Joint(correlated(2, 3).sqrt(), copies=4)
    for steps, n_rows in ((None, 1500), (60, 500)):
        out = write(block, *exact(block, toy, 12), n_rows=n_rows, steps=steps)
        assert_law(toy, out)
        assert (out.length == 12).all() and out.nfe <= (12 if steps is None else 180)
    out = write(block, *exact(block, toy, 12), n_rows=1500)
    order = out.order.view(-1, 3, 4).sort(2)[0].flatten(1)
    assert torch.equal(order, torch.arange(1, 13).expand(1500, -1))
    assert abs(chi_square_z((out.order == 1).sum(0)[:4], torch.ones(4))) < Z_LIMIT

def check_continues(module):
    """After a prompt, of another length in each third of the batch, the conditional given it."""
    toy = Joint(correlated(2, 4).sqrt())
    known, is_known = torch.ones(12_000, 4, dtype=torch.int64), torch.zeros(12_000, 4).bool()
    is_known[:4000, :3] = is_known[4000:8000, :1] = True
    names = {"block_len": 2} if module.SCRIPT == "train_block" else {}
    out = write(module, *exact(module, toy, 4, **names), known, is_known)
    assert out.nfe == 4 or module.SCRIPT == "train_block"
    for rows, n in ((slice(4000), 3), (slice(4000, 8000), 1), (slice(8000, 12_000), 0)):
        assert_law(toy, out, toy.p * (toy.states[:, :n] == 1).all(1), rows)

@pytest.mark.parametrize("module", [MDLM, BLOCK, GPT, SEDD], ids=lambda m: m.SCRIPT)
def test_a_token_whose_beginning_is_known(module):
    """The joint's conditional, given a first token and the set that the next one comes from."""
    toy = Joint(correlated(3, 3))
    names = {"block_len": 3} if module is BLOCK else {}
    model, cfg = exact(module, toy, 3, **names)
    lm = bare_lm(module, model, cfg)
    canvas = sample.Canvas(
        torch.tensor([[2, 0, 0]]), torch.tensor([[True, False, False]]),
        begins=torch.tensor([[0, 1, 0]]), lead=0,
        allowed=torch.tensor([[True, True, True], [True, False, True]]))
    steps = 100 if module is SEDD else 0  # both fall in one step once in a hundred
    opts = sample.Options(n=4000, steps=steps)
    rows = [row for rows, _ in lm.batches(canvas, opts) for row, _ in rows]
    law = toy.p * (toy.states[:, 0] == 2) * (toy.states[:, 1] != 1)
    assert_law(toy, SimpleNamespace(tokens=torch.tensor(rows)), law)

def check_blocks_of_masked(mdlm):
    """Blocks of one token, from left to right: the joint; and what leaves the context is forgotten.
    """
    toy = Joint(correlated(3, 3), copies=4)
    out = write(mdlm, *exact(mdlm, toy, 12), n_rows=3000, block_len=1)
    assert_law(toy, out)
    assert torch.equal(out.order, torch.arange(1, 13).expand(3000, -1))
    model, cfg = small_model(mdlm)
    long, seen = 3 * T, []

    def spy(xt, sigma, rows):
        seen.append((xt.clone(), sigma, rows))
        return model(xt, sigma, rows)

    out = write(mdlm, spy, dataclasses.replace(cfg, seq_len=T), torch.zeros(2, long).long(),
                torch.zeros(2, long).bool(), block_len=L, steps=2)
    assert [xt.size(1) for xt, *_ in seen] == [T] * len(seen) and len(seen) <= 2 * long // L
    for xt, sigma, rows in seen:
        torch.testing.assert_close(sigma, -torch.log1p(-(xt == V).sum(1) / (T + 1)))
        assert (xt.flatten()[rows] == V).all()
    assert seen[-1][0][0, :T - L].tolist() in out.tokens[:, long - T:-L].tolist()

@pytest.mark.parametrize(("refine", "n"), [("0.34", 1), ("0.67", 2), ("0.34:2", 1)])
def test_the_refined_law(refine, n):
    """By enumeration: the n least likely tokens are drawn anew, given what is kept. Two passes
    score them: every second token given the others, and those given these."""
    toy = Joint(correlated(2, 3) ** 0.25)
    lm, states, law = bare_lm(MDLM, *exact(MDLM, toy, 3)), toy.states, toy.p
    score = torch.zeros(len(states), 3, dtype=torch.float64)
    for half in ([0, 2], [1]):
        log_p = toy.log_conditional(states.index_fill(1, torch.tensor(half), 2))
        score[:, half] = log_p.gather(2, states[..., None])[:, half, 0]
    keep = score.argsort(1).argsort(1) >= n
    assert torch.equal(lm.likeliest(states, states < 0, n / 3)[0], keep)
    for _ in range(1 + refine.endswith(":2")):
        same = (states[:, None] == states) | ~keep[:, None]  # (S, S', n)
        weights = same.all(2) * toy.p  # of S', given what is kept of S
        law = law @ (weights / weights.sum(1, keepdim=True))
    canvas = sample.Canvas(torch.zeros(1, 3).long(), torch.zeros(1, 3).bool(),
                           torch.zeros(1, 3).long(), torch.ones(1, 2).bool(), 0)
    opts = sample.Options(n=16_000, refine=refine)  # probabilities wrong by 4% would show
    rows = [row for rows, _ in lm.batches(canvas, opts) for row, _ in rows]
    assert_law(toy, SimpleNamespace(tokens=torch.tensor(rows)), law)

def check_corrector(module):
    """A token at random, drawn anew given the others of its block and what stands before, is a
    Gibbs step: exact conditionals keep the joint. The last one's block takes passes of its own."""
    is_mdlm = module.SCRIPT == "train_mdlm"
    toy = JOINT if is_mdlm else Joint(correlated(2, 3).sqrt(), copies=4)
    model, cfg = exact(module, toy, toy.seq_len)
    for every in (1, 2):
        out = write(module, model, cfg, n_rows=20_000 if is_mdlm else 1500,
                    corrector=(0.3, every, "random"))
        assert_law(toy, out)
        n = 3 if is_mdlm else L
        assert out.nfe == toy.seq_len // n * (n + n // every)

def check_least_likely(mdlm):
    """What is drawn anew is the token that was the least probable one when it was drawn."""
    inputs, frames = [], []

    def spy(xt, sigma, rows):
        inputs.append(xt.clone())
        return JOINT(xt, sigma, rows)

    n = 500
    write(mdlm, spy, config(mdlm, 3, 3), n_rows=n, corrector=(0.3, 1, "least"),
          watch=lambda tokens, nfe: frames.append(tokens))
    frame, psi = torch.full((n, 3), 3), torch.full((n, 3), math.inf, dtype=torch.float64)
    for i, (xt, after) in enumerate(zip(inputs, frames, strict=True)):
        again = (frame != 3) & (xt == 3)
        assert torch.equal(again.sum(1), torch.full((n,), i % 2))
        if i % 2:
            assert torch.equal(psi[again], psi.amin(1))
        is_new = (xt == 3) & (after != 3)
        p = JOINT.log_conditional(xt).exp().gather(2, after.clamp(max=2)[..., None])[..., 0]
        psi, frame = torch.where(is_new, p, psi), after

def check_unmasking_rate(mdlm, steps):
    """The tokens fixed in a pass are Binomial: even over the passes, though P begins at 1 / steps.

    Gumbel noise in fp32 draws such rare events too seldom and leaves nearly all to the last passes.
    """
    toy, seq_len = Iid([0.6, 0.3, 0.1]), 16_384
    out = write(mdlm, toy, config(mdlm, 3, seq_len), n_rows=1, steps=steps)
    fixed = torch.bincount(out.order.flatten())
    fixed = fixed[fixed > 0]  # per pass that fixed any; the others are few, and anywhere
    assert len(fixed) == out.nfe, "a pass that fixes nothing needs no forward"
    empty = (1 - 1 / steps) ** seq_len
    assert abs(out.nfe - steps * (1 - empty)) <= Z_LIMIT * math.sqrt(steps * empty)
    groups = fixed.tensor_split(64)
    counts = torch.stack([g.sum() for g in groups])
    assert abs(chi_square_z(counts, torch.tensor([len(g) for g in groups]))) < Z_LIMIT
    assert abs(chi_square_z(torch.bincount(out.tokens.flatten()), toy.p)) < Z_LIMIT

def check_rare_tokens(mdlm):
    """A token of probability 1e-12 is drawn exactly where the uniform number falls into it; those
    numbers have 53 bits. Gumbel noise in fp32, a CDF in fp32 or 24 bits would never draw it."""
    p = torch.tensor([[0.5, 1e-12, 0.5]]).log()
    for u, token in ((0.5 - 1e-12, 0), (0.5, 1), (0.5 + 1e-12, 2), (1 - 2**-53, 2)):
        assert mdlm.draw_tokens(p, torch.tensor([u], dtype=torch.float64)).item() == token
    bits = (mdlm.uniforms(sample.row_generators(seeded(), 1), 4000)[0] * 2**53).long()
    for shift in (0, 16, 32, 49):
        counts = torch.bincount(bits >> shift & 15, minlength=16)
        assert abs(chi_square_z(counts, torch.ones(16))) < Z_LIMIT

def test_streams_and_rows_differ():
    """Seeds that agree in 32 bits, the streams of a seed, and 300,000 rows."""
    seeds = [0, 2**32, 2**62, 2**62 + 2**32]
    firsts = [sample.uniforms(sample.row_generators(sample.stream(seed, number), 2), 3)
              for seed in seeds for number in range(3)]
    assert len(torch.cat(firsts).unique()) == len(seeds) * 3 * 2 * 3
    words = torch.randint(2**32, (300_000, 4), generator=sample.stream(0, 0))
    assert len(words.unique(dim=0)) == 300_000
    gens = sample.row_generators(sample.stream(0, 0), 9000)
    assert len(sample.uniforms(gens, 1).unique()) == 9000

def check_rows(module):
    """A row alone, or in front of others with other prompts, is the same; rows and seeds differ."""
    model, cfg = small_model(module)
    model, known = model.double(), tokens(6)
    is_known = torch.arange(T) < torch.tensor([9, 9, 0, 4, 5, 6])[:, None]
    for how in ({}, {"steps": 3}) if module.SCRIPT != "gpt" else ({},):
        many = write(module, model, cfg, known, is_known, **how)
        few = write(module, model, cfg, known[:2], is_known[:2], **how)
        assert torch.equal(many.tokens[:2], few.tokens)
        many = write(module, model, cfg, n_rows=6, **how)
        assert len(many.tokens.unique(dim=0)) == 6
        other = write(module, model, cfg, n_rows=6, seed=1, **how)
        assert not torch.equal(other.tokens, many.tokens)

def check_choose(mdlm):
    """`choose` may remask; known positions never are, and the last pass leaves nothing masked. The
    network is told the noise level of the masked count."""
    known = torch.tensor([[2, 0, 0], [0, 0, 1]])
    is_known = torch.tensor([[True, False, False], [False, False, True]])
    seen, frames = [], []

    def choose(log_probs, is_mask, *, step, steps, u, psi):
        assert u.shape == is_mask.shape and u.dtype == torch.float64
        assert log_probs.shape == (is_mask.sum(), 3) and not (is_mask & is_known).any()
        assert torch.isinf(psi[is_mask | is_known]).all() and (psi[~is_mask & ~is_known] <= 1).all()
        seen.append(int(is_mask.sum()))
        return torch.full_like(is_mask, step != 1)  # commits all in the second pass, else remasks

    def only_token_1(log_probs):
        return log_probs.masked_fill(torch.tensor([True, False, True]), -math.inf)

    def spy(xt, sigma, rows):
        n_masked = (xt == 3).sum(-1)
        torch.testing.assert_close(sigma, -(1 - n_masked / 4).log())
        return JOINT(xt, sigma, rows)

    out = write(mdlm, spy, config(mdlm, 3, 3), known, is_known, steps=4, choose=choose,
                warp=only_token_1, watch=lambda tokens, nfe: frames.append((tokens, nfe)))
    # Wherever there are masks, the network sees the same: it is asked once.
    assert seen == [4, 4, 0, 4] and out.nfe == 1 and (out.tokens[~is_known] == 1).all()
    assert [int((f == 3).sum()) for f, _ in frames] == [4, 0, 4, 0]
    assert [n for _, n in frames] == [1, 1, 1, 1]
    assert all(torch.equal(f[is_known], known[is_known]) for f, _ in frames)

def check_stop(module):
    """A row is what it would be without an end, cut before the first stop that is not its first."""
    toy, length = Iid([0.1, 0.5, 0.4]), 18 if module.SCRIPT == "train_block" else 16
    model, cfg = exact(module, toy, 16)
    known = torch.zeros(200, length, dtype=torch.int64)
    is_known = torch.zeros(200, length, dtype=torch.bool)
    is_known[100:, :5] = True  # these begin with five stops of the user's own
    free, seen = write(module, model, cfg, known, is_known), []
    out = write(module, model, cfg, known, is_known, stop=0,
                watch=lambda x, nfe: seen.append((int((x == 3).sum()), nfe)))
    for i in range(200):
        row, begin = free.tokens[i].tolist(), 5 if i >= 100 else 1
        end = row.index(0, begin) if 0 in row[begin:] else length
        assert out.length[i] == end
        assert out.tokens[i].tolist() == row[:end] + [0] * (length - end)
    assert len(set(out.length.tolist())) > 10 and (free.length == length).all()
    assert seen[-1] == (0, out.nfe)
    few = write(module, *exact(module, Iid([0.9, 0.05, 0.05]), 16), n_rows=4, stop=0)
    assert few.nfe <= 4 and few.length.max() < 4  # no pass behind the last end

def remask_some(log_probs, is_mask, *, step, steps, u, psi):
    return torch.where(is_mask, u > 1 / (steps - step), u < 0.2)

def check_cache(module):
    """Tokens are those of whole passes: every prompt, order, switch; a last block cut short."""
    is_block = module.SCRIPT == "train_block"
    documents = [{"doc_mask": True, "bos_id": 3}] if is_block else []
    for names in [*SWITCHES.values(), *documents]:
        model, cfg = small_model(module, **names)
        for length in (T, T - 2):
            known = tokens(6, length, n_values=5)
            is_known = torch.arange(length) < torch.tensor([0, 3, 4, 6, 8, length])[:, None]
            hows = ({}, {"steps": 2}, {"steps": 6, "choose": remask_some})
            for how in hows if is_block and length < T else hows[:1]:
                for given in (is_known & False, is_known, is_known[3:4]):
                    kept, again = (
                        write(module, model, cfg, known[:len(given)], given, cached=cached, **how)
                        for cached in (True, False))
                    assert torch.equal(kept.tokens, again.tokens) and kept.nfe == again.nfe
                    assert torch.equal(kept.order, again.order)

def check_window(block):
    """Beyond seq_len: what a whole pass gives in which every block sees the newest seq_len tokens.
    A long prompt enters the cache in pieces."""
    sees = block.sees

    def banded(q, k, n, block_len):
        return sees(q, k, n, block_len) & (q % n // block_len - k % n // block_len < T // L)

    for names in (*SWITCHES.values(), {"doc_mask": True, "bos_id": 3}):
        model, cfg = small_model(block, **names)
        long, known = 4 * T + 2, tokens(3, 4 * T + 2, n_values=5)
        wide = dataclasses.replace(cfg, seq_len=2 * long)  # every pass reads all of it
        for prompts in ((30, 41, 33), (0, 40, 7)):
            is_known = torch.arange(long) < torch.tensor(prompts)[:, None]
            out = write(block, model, cfg, known, is_known)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_block, "sees", banded)
                again = write(block, model, wide, known, is_known, cached=False)
            assert torch.equal(out.tokens, again.tokens)

def dense_pass(model, x, sigma, is_new=None, first=None):
    """log p (B, S, V) of a pass over all of x, and every layer's keys and values: its own where
    is_new (S,), elsewhere those of the first pass; without one, its own."""
    layers, seen = iter(first or ()), []

    def attend(q, k, v, ctx):
        if first:
            k, v = (torch.where(is_new[:, None], new, old)
                    for new, old in zip((k, v), next(layers), strict=True))
        seen.append((k, v))
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
        return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v

    logits = model.predict(x, torch.arange(x.size(1)), sigma, attend=attend)
    return logits.log_softmax(-1), seen

def check_approximate_cache(mdlm, cache):
    """A block's first pass is one without a cache; the others are whole passes in which what stands
    before the block, or around it, has the keys and values of the first. Prompts of any length,
    rows that finish early, tokens masked again; beyond the context, too."""
    for names in (*SWITCHES.values(), {"cond_dim": 16}):
        model, cfg = small_model(mdlm, **names)
        for length in (T, 2 * T):
            firsts, n_later = {}, 0
            known = tokens(4, length)
            is_known = torch.arange(length) < torch.tensor([0, 3, 5, 9])[:, None]
            frame = torch.where(is_known, known, V)

            def choose(log_probs, is_mask, *, u, model=model, frame=frame, firsts=firsts, **rest):
                nonlocal n_later
                start = (frame == V).any(0).int().argmax().item() // L * L
                n_later += start in firsts
                low = max(0, start + L - T)
                x = frame[:, low:low + T]
                sigma = -torch.log1p(-(x == V).sum(1).clamp(min=1) / (T + 1))
                at = torch.arange(T) + low
                is_new = (at >= start) & ((at < start + L) | (cache == "prefix"))
                log_all, seen = dense_pass(model, x, sigma, is_new, firsts.get(start))
                if start not in firsts:
                    firsts[start] = seen
                    torch.testing.assert_close(log_all, model(x, sigma).log_softmax(-1))
                expected = log_all[:, start - low:start - low + L][is_mask]
                torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)
                return torch.where(is_mask, u > 0.4, u < 0.1)

            write(mdlm, model, cfg, known, is_known, block_len=L, steps=4, choose=choose,
                  cache=cache, watch=lambda tokens, nfe, frame=frame: frame.copy_(tokens))
            assert len(firsts) == length // L and n_later > len(firsts)

@pytest.mark.parametrize(("cache", "sizes"), [("prefix", (12, 8, 4)), ("dual", (4, 4, 4))])
def test_approximate_caches_read_the_block_and_no_more(cache, sizes):
    """And a row alone, or beside others that take other passes, is the same."""
    model, cfg = small_model(MDLM)
    seen, known = [], tokens(6)
    is_known = torch.arange(T) < torch.tensor([0, 0, 9, 4, 5, 6])[:, None]
    model.embed.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    how = {"block_len": L, "cache": cache}
    write(MDLM, model, cfg, n_rows=2, **how)
    assert seen == [(2, n) for size in sizes for n in (T, size, size, size)]
    for passes in ({}, {"steps": 9}, {"steps": 9, "choose": remask_some}):
        many = write(MDLM, model.double(), cfg, known, is_known, **how, **passes)
        few = write(MDLM, model, cfg, known[:2], is_known[:2], **how, **passes)
        assert torch.equal(many.tokens[:2], few.tokens)

@pytest.mark.parametrize("module", [BLOCK, GPT], ids=lambda m: m.SCRIPT)
def test_cached_passes_take_what_is_new(module):
    """What the cache is for: behind the prompt, a pass embeds a block a row, or two; or a token."""
    model, cfg = small_model(module, seq_len=20)
    seen = []
    model.embed.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    write(module, model, cfg, tokens(2, 20), (torch.arange(20) < 10).expand(2, -1))
    blocks = [12, *[4], *2 * [8, *3 * [4]]]
    assert seen == (blocks if module is BLOCK else [11, *9 * [1]])

def score_law(graph, noise, steps, euler):
    """(V**n,) what a sampler with the exact score yields in few steps, by the definitions: every
    position moves on its own, by Tweedie's (exp(-delta Q) s)_y exp(delta Q)(xt, y) (theorem 4.2) or
    by Euler's rates, from t = 1 over even steps; the last one is Tweedie's to sigma = 0."""
    is_absorb, q = graph == "absorb", rates(graph)
    n = 3 + is_absorb
    states = torch.cartesian_prod(*[torch.arange(n)] * 3)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[:] = (states == 3).all(1) if is_absorb else 1 / len(states)
    code = {tuple(s): i for i, s in enumerate(states.tolist())}
    toy = (toys.AbsorbScore if is_absorb else toys.UniformScore)(JOINT, dtype=torch.float64)
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
        score = toy(states, torch.full((len(states),), sigma, dtype=torch.float64)).exp()
        if is_absorb:
            score = torch.cat((score, torch.ones(len(states), 3, 1)), -1)
        after = torch.zeros_like(law)
        for c in (law > 0).nonzero().flatten().tolist():
            choices = []
            for pos, x in enumerate(states[c].tolist()):
                if is_absorb and x < 3:
                    choices.append([(x, 1.0)])
                    continue
                if euler and not last:
                    p = slope / steps * q[:, x] * score[c, pos]
                    p[x] = 0
                    p[x] = max(0.0, 1 - p.sum())
                else:
                    p = (score[c, pos] @ back) * forth[:, x]
                if last and is_absorb:
                    p[3] = 0
                p = p.clamp(min=0) / p.clamp(min=0).sum()
                choices.append(list(enumerate(p.tolist())))
            for outcome in itertools.product(*choices):
                weight = math.prod(p for _, p in outcome)
                after[code[tuple(v for v, _ in outcome)]] += law[c] * weight
        law = after
    return law[(states < 3).all(1)]

def check_few_steps(sedd, graph, noise, euler):
    """Few steps yield exactly the law of the definitions, one step the product of marginals."""
    toy = Joint(correlated(), copies=2000)
    for steps in (1, 3):
        out = write(sedd, *exact(sedd, toy, 6000, graph=graph, noise=noise), n_rows=5, steps=steps,
                    euler=euler)
        assert_law(toy, out, score_law(graph, noise, steps, euler))
        assert out.nfe == steps if graph == "uniform" or noise == "loglinear" else out.nfe <= steps

def check_score_infill(sedd, graph):
    """Known tokens stay; under absorb the rest follows the conditional given what is known."""
    toy, n_rows, seen = Joint(correlated(), copies=1000), 6, []
    is_known = torch.tensor([False, True, False]).repeat(n_rows, toy.copies)
    known = torch.where(is_known, 2, 0)
    model, cfg = exact(sedd, toy, 3000, graph=graph)
    out = write(sedd, model, cfg, known, is_known, steps=300,
                watch=lambda tokens, nfe: seen.append(tokens))
    assert all(torch.equal(tokens[is_known], known[is_known]) for tokens in seen)
    if graph == "absorb":
        assert_law(toy, out, JOINT.p * (JOINT.states[:, 1] == 2))

def check_unnormalised_score(sedd):
    """A score that is not normalised changes when masks fall, not what they become: half of it
    leaves half as many tokens, and the last step takes all that are left."""
    toy, frames = Joint(ONE.p, copies=20_000), []
    cfg = config(sedd, 3, toy.seq_len)
    out = write(sedd, toys.AbsorbScore(toy, shift=math.log(0.5)), cfg, n_rows=1, steps=4,
                watch=lambda tokens, nfe: frames.append(int((tokens == 3).sum())))
    left = toy.seq_len * np.cumprod([7 / 8, 5 / 6, 3 / 4, 0])  # 1 - (1/2) / (passes left)
    assert frames == pytest.approx(left.tolist(), abs=Z_LIMIT * math.sqrt(toy.seq_len) / 2)
    assert_law(toy, out)

def check_score_warp(sedd, graph):
    """The warp changes the law of clean tokens, exactly, at any number of steps."""
    toy = Joint(ONE.p, copies=5000)

    def half(log_probs):
        assert torch.allclose(log_probs.double(), ONE.p.log(), atol=1e-3)
        return (2 * log_probs).log_softmax(-1)

    for noise, steps, euler in (("loglinear", 1, 0), ("loglinear", 7, 0), ("geometric", 400, 1)):
        model, cfg = exact(sedd, toy, 5000, graph=graph, noise=noise, sigma_min=1e-2,
                           sigma_max=12.0)
        out = write(sedd, model, cfg, n_rows=2, steps=steps, euler=bool(euler), warp=half)
        assert_law(toy, out, ONE.p**2)

def check_passes(sedd):
    """Under absorb a pass in which no token fell costs no forward pass, and the network is told
    the noise of the masks that it sees; under uniform it starts from evenly drawn tokens, and is
    told the noise of the time."""
    for graph in GRAPHS:
        model, cfg = exact(sedd, Joint(ONE.p, copies=9000), 9000, graph=graph)
        calls = []

        def spy(xt, sigma, rows, model=model, calls=calls):
            calls.append((xt.clone(), sigma))
            return model(xt, sigma, rows)

        is_known = torch.arange(9000)[None] < 8996
        out = write(sedd, spy, cfg, torch.ones(1, 9000).long(), is_known, steps=50)
        assert out.nfe == len(calls)
        if graph == "absorb":
            assert out.nfe <= 5
            for xt, sigma in calls:
                torch.testing.assert_close(sigma, -torch.log1p(-(xt == 3).sum(1) / 9001))
        else:
            t = 1 - torch.arange(50) / 50
            told = torch.cat([sigma for _, sigma in calls])
            torch.testing.assert_close(told, -torch.log(1 - (1 - 1e-3) * t))
            write(sedd, spy, cfg, n_rows=1, steps=1)
            counts = torch.bincount(calls[-1][0].flatten(), minlength=3)
            assert abs(chi_square_z(counts, torch.ones(3))) < Z_LIMIT

CHECKS = [
    *((check_ancestral_law, MDLM, steps) for steps in (1, 2, 5)), (check_first_hitting, MDLM),
    (check_first_hitting, MDLM, sample.ordered("random")), (check_infill, MDLM, None),
    (check_infill, MDLM, 500), (check_blocks_of_masked, MDLM), (check_blocks, BLOCK),
    (check_corrector, MDLM), (check_corrector, BLOCK), (check_least_likely, MDLM),
    (check_continues, BLOCK), (check_continues, GPT),
    (check_unmasking_rate, MDLM, 1024), (check_rare_tokens, MDLM), (check_choose, MDLM),
    *((check_rows, module) for module in (MDLM, BLOCK, GPT, SEDD)), (check_stop, BLOCK),
    (check_stop, GPT), (check_cache, BLOCK), (check_cache, GPT), (check_window, BLOCK),
    *((check_approximate_cache, MDLM, cache) for cache in ("prefix", "dual")),
    *((check_few_steps, SEDD, *how)
      for how in itertools.product(GRAPHS, NOISES, (False, True))),
    *((check, SEDD, graph) for check in (check_score_infill, check_score_warp) for graph in GRAPHS),
    (check_unnormalised_score, SEDD), (check_passes, SEDD)]

@pytest.mark.parametrize("check", CHECKS, ids=lambda c: "-".join(
    [c[0].__name__, c[1].SCRIPT, *(getattr(x, "__name__", str(x)) for x in c[2:])]))
def test_exactness(check):
    check[0](*check[1:])

UNIFORM = (check_few_steps, SEDD, "uniform", "loglinear", False)
MUTANTS = {  # a changed line makes its oracle fail
    # 50,257 equal tokens and the mask race with fp32 Gumbel noise, as if a categorical were drawn
    # over all of them: the best of the tokens is a uniform number's root on the grid of fp32.
    "the unmasking is a race of fp32 Gumbel noise": (
        "commit = is_mask & (pick * (steps - i) < 1)",
        """grid = 2.0**-24
                best = ((pick ** (1 / 50257)) / grid).floor() * grid
                stay = uniforms(gens, L)
                odds = max(steps - i - 1, 1e-9) * 50257
                commit = is_mask & (-best.log() * odds < -stay.log())""",
        (check_unmasking_rate, MDLM, 1024)),
    "the uniform numbers have 24 bits": (
        "g.random(shape)", "g.random(shape, dtype=np.float32).astype(float)",
        (check_rare_tokens, MDLM)),
    "one number decides both whether and what": (
        "pick, u = uniforms(gens, 2, L).unbind(1)", "pick = u = uniforms(gens, 2, L)[:, 0]",
        (check_ancestral_law, MDLM, 5)),
    "every pass commits at the rate of the first": (
        "commit = is_mask & (pick * (steps - i) < 1)",
        "commit = is_mask & ((pick * steps < 1) | (i == steps - 1))",
        (check_ancestral_law, MDLM, 5)),
    "first-hitting goes from left to right": (
        "(pick == pick.masked_fill(~is_mask, -1).amax(1, True))", "(is_mask.cumsum(1) == 1)",
        (check_first_hitting, MDLM)),
    "rows share their random numbers": (
        "return [np.random.default_rng(row) for row in words]",
        "return len(words) * [np.random.default_rng(words[0])]", (check_rows, GPT)),
    "random numbers hang on the batch": (
        "pick, u = uniforms(gens, 2, L).unbind(1)",
        "pick, u = uniforms(gens, 2, L).unbind(1) if not is_empty else (0, 0)",
        (check_rows, BLOCK)),
    "the cache keeps the noised block": (
        "clean = new[..., :new.size(3) - self.n_noised, :]", "clean = new", (check_cache, BLOCK)),
    "the window has no end": (
        "(j > i - cfg.seq_len // L)", "(j > i - 10**6)", (check_window, BLOCK)),
    "a block goes on with the cache of the one before it": (
        "self.done < start + self.L", "self.kept[0] is None",
        (check_approximate_cache, MDLM, "prefix")),
    "what a pass computes anew is kept, too": (
        'self.n_noised = L if self.cache == "dual" else low + x.size(1) - start',
        "self.n_noised = L", (check_approximate_cache, MDLM, "prefix")),
    "another row's keys and values": (
        "old[:, self.live]", "old[:, :k.size(0)]", (check_approximate_cache, MDLM, "dual")),
    "stops behind the end of a row count": (
        "ends = (block == stop) & ~fixed[:, here]", "ends = block == stop", (check_stop, BLOCK)),
    "the corrector's choice depends on the tokens": (
        'lowest(psi if mode == "least" else pick,', "lowest(psi,", (check_corrector, MDLM)),
    "known tokens are masked again": (
        "is_left &= ~fixed[:, here].cpu() & (i < passes - 1)", "is_left &= i < passes - 1",
        (check_choose, MDLM)),
    "the last step is as the others": (
        "sigmas, rates = [*sigmas.tolist(), 0.0]",
        "sigmas, rates = [*sigmas.tolist(), sigmas[-1] / 2]", UNIFORM),
    "the last step leaves masks": (
        " & (i < passes - 1)\n", "\n", (check_unnormalised_score, SEDD)),
    "euler does not denoise": (
        "if is_euler and i < passes - 1", "if is_euler", (*UNIFORM[:-1], True)),
    "tweedie without the forward kernel": (
        "(F.one_hot(current, N) * math.exp(-delta) - math.expm1(-delta) / N)",
        "F.one_hot(current, N).add(1)", UNIFORM),
    "masks fall at the rate of the step's end": (
        "share / math.expm1(sigmas[step])", "share / math.expm1(sigmas[step + 1] + 0.1)",
        (check_few_steps, SEDD, "absorb", "loglinear", False)),
    "sampling starts from one token": (
        "(uniforms(gens, T) * V).long()", "(uniforms(gens, T) * 0).long()", (check_passes, SEDD)),
    "known tokens are noise, too": (
        "rows = (~is_known).flatten().nonzero()[:, 0]\n    for",
        "rows = torch.arange(is_known.numel())\n    for",
        (check_score_infill, SEDD, "uniform")),
    "the warp acts on noisy tokens": (
        "clean = (1 + growth) * score - growth * score.mean(-1, keepdim=True)", "clean = score",
        (check_score_warp, SEDD, "uniform")),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    snippet, replacement, (check, module, *how) = MUTANTS[name]
    script = {"gpt": gpt, "train_block": train_block, "train_sedd": train_sedd}
    wrong = with_samplers(script.get(module.SCRIPT, train_mdlm),
                          mutant(sample, snippet, replacement))
    with pytest.raises((AssertionError, RuntimeError)):
        check(wrong, *how)
