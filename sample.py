"""Sample from a checkpoint: generate, infill, watch, score; race one against another.

    python sample.py                                         newest checkpoint in out/
    python sample.py --prompt="def " --n=4 --length=256
    python sample.py --infill="def ___(self):" --blank=8     ___ is a blank of 8 tokens
    python sample.py --order=confidence --threshold=0.9 --watch=1
    python sample.py --steps=128 --remask=loop
    python sample.py --score=FILE                            bound on -log p of a text
    python sample.py --ckpt=out/demo --race=out/gpt --steps=64

gpt.py writes from left to right, one token a pass, and scores exactly; it takes no --infill and no
flag about passes. train_block.py writes block after block, any length; the flags about passes act
inside each block, and it takes no --infill and no --refine. Both stop at the end of a document.
train_sedd.py draws all tokens anew in each pass; it takes no --threshold, --remask or --refine.

A space before a blank or at the end of a prompt becomes the beginning of what is written, as
GPT-2's words begin with theirs. Samples, scores and tables go to stdout, all else to stderr.
Nothing in a checkpoint is run. From Python:

    lm = sample.load("out/demo/ckpt.pt")
    lm.generate("def ", n=4, length=256, steps=64, order="confidence", threshold=0.9)
    lm.infill("def ___(x):", blank=8)
    lm.score("some text").bits_per_byte
"""

import bisect
import codecs
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

if __name__ == "__main__":  # Ctrl-C and "| head" end it without a traceback, while torch loads too
    for name in {"SIGINT", "SIGPIPE"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SCRIPTS = ("train_mdlm", "train_block", "train_sedd", "gpt")
DEFAULT_LENGTH, DEFAULT_DRAWS = 256, 8
BATCH_NUMBERS = 2**27  # logits, or attention scores of a layer, in one forward pass
MAX_ROWS = 512  # samples at once, so that the first of many are soon there
FIRST_STREAM = 0x5EED  # of random numbers
BREAK = "\n\n---\n\n"  # how the beginning of a document is shown
BLANK = re.compile("_{3,}")


# ----------------------------------------------------------------------------- flags
@dataclasses.dataclass(frozen=True)
class Options:
    """Every flag, --name=value."""
    # which model
    ckpt: str | None = None  # checkpoint, its run folder, or hf:OWNER/REPO/FILE; None: the newest
    script: str | None = None  # training script that wrote it, when that is an edited one
    weights: Literal["ema", "raw"] = "ema"  # averaged, where there are some, or those of the end
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: as trained, where it is fast
    # what to write
    prompt: str | None = None  # text to continue
    prompt_file: str | None = None  # the same from a file
    infill: str | None = None  # text with blanks: each run of three or more underscores is one
    blank: str = "16"  # tokens in a blank, for all of them or one by one: N[,N..]
    n: int = 1  # samples
    # Tokens in a sample, prompt included. None: 256 new ones, up to the context; an infill ends
    # with its text, and goes on up to a given length.
    length: int | None = None
    seed: int = 0  # the same seed gives the same samples, however many there are
    # How. Exact: first_hitting (the default: a random token a pass) and, for many steps, ancestral
    # (the default with --steps) and random. Mode-seeking, so not samples of the model's law:
    # confidence (the default with --threshold), entropy, margin. train_sedd has tweedie and euler.
    order: Literal[None, "first_hitting", "ancestral", "random", "confidence", "entropy", "margin",
                   "tweedie", "euler"] = None
    steps: int | None = None  # passes, with train_block in each block; None: one a token
    threshold: float | None = None  # fix every token whose top probability exceeds this, too
    temperature: float = 1.0  # below 1 sharper; 0 takes the likeliest token
    top_k: int | None = None  # draw from that many likeliest tokens
    top_p: float | None = None  # draw from the likeliest tokens that together reach this
    # ReMDM, masking some tokens again to mend errors: loop, cap, rescale (ETA .02) or conf (ETA 1).
    remask: str | None = None  # NAME or NAME:ETA
    refine: float = 0.0  # at the end, mask this fraction, the least likely, and predict it anew
    watch: bool = False  # show the text appearing
    # Checkpoints, with commas, that write as much as --ckpt, one after the other; a terminal then
    # shows all side by side in real time. gpt ignores flags about passes, all the end of documents.
    race: str | None = None
    score: str | None = None  # text, or a file of UTF-8: its bound in nats; gpt: exact
    draws: int | None = None  # independent noise draws of a score; None: 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, choices = field.name, getattr(self, field.name), get_args(field.type)
            low, high = RANGES.get(name, (0, math.inf))
            fits = name not in RANGES or value is None or low <= value <= high  # NaN does not
            check(fits, name, value, f"must be from {low} to {high}")
            fits = field.type is not Literal[choices] or value in choices
            check(fits, name, value, "there are " + ", ".join(str(c) for c in choices if c))
        is_ranked = self.order in (None, *RANKS)
        is_free = self.threshold is None and self.order in (None, "ancestral")
        for flag, fits, remedy in (
                ("blank", re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.blank), "numbers as in 8,16"),
                ("steps", self.order != "first_hitting" or self.steps is None,
                 "first_hitting fixes one token a pass: drop it"),
                ("threshold", self.threshold is None or is_ranked,
                 "goes with --order=" + "|".join(RANKS)),
                ("remask", re.fullmatch(REMASK, self.remask or "cap"),
                 f"{', '.join(REMASK_ETA)}, with ETA as in cap:0.02"),
                ("remask", not self.remask or is_free,
                 "has its own order: drop --order and --threshold")):
            check(fits, flag, getattr(self, flag), remedy)

    @property
    def order_name(self):
        """The order in use, without train_sedd's."""
        by_steps = "ancestral" if self.remask or self.steps else "first_hitting"
        return self.order or (by_steps if self.threshold is None else "confidence")


RANGES = dict(n=(1, math.inf), length=(1, math.inf), seed=(0, 2**62), steps=(1, math.inf),
              threshold=(0, 1), temperature=(0, math.inf), top_k=(1, math.inf), top_p=(0, 1),
              refine=(0, 1), draws=(2, math.inf))


class SampleError(ValueError):
    """A user's mistake, in one line that names the flag or file and the remedy."""


def check(condition, flag, value, remedy):
    if not condition:
        raise SampleError(f"--{flag}={value}: {remedy}")


def parse_args(argv):
    """Flags --name=value -> Options."""
    fields, given = {f.name: f for f in dataclasses.fields(Options)}, {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(__doc__, inspect.getsource(Options).partition("\n    def ")[0], sep="\n")
            raise SystemExit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        near = (difflib.get_close_matches(name, fields, 1) or ["help"])[0]
        if not arg.startswith("--") or name not in fields:
            raise SampleError(f"unknown flag {arg}: did you mean --{near}?")
        kind = (get_args(fields[name].type) or (fields[name].type,))[0]
        check(equals or kind is bool, name, "VALUE", "needs a value")
        try:
            value = ("0", "1", "").index(text) > 0 if kind is bool else text
            given[name] = kind(value) if kind in (int, float) else value
        except ValueError:
            kinds = {int: "a whole number", float: "a number", bool: "0 or 1"}
            raise SampleError(f"{arg}: {kinds[kind]} expected") from None
    return Options(**given)


# ----------------------------------------------------------------------------- tokens
class Tokenizer:
    """Text <-> tokens, by the bytes of every token that the checkpoint carries."""
    def __init__(self, meta, mask_id):
        self.name, self.bos_id, self.mask_id = meta["tokenizer"], meta["bos_id"], mask_id
        words = map(chr, range(256)) if self.name == "byte" else meta["token_bytes"]
        self.table = [word.encode("latin-1") for word in words]
        self.table += [b""] * (mask_id - len(self.table))  # ids that stand for no text
        self.table[self.bos_id] = b""
        self.encoding = None
        if self.name != "byte":
            import tiktoken

            self.encoding = tiktoken.Encoding(
                self.name, pat_str=meta["pattern"], special_tokens={"<|endoftext|>": self.bos_id},
                mergeable_ranks={word: i for i, word in enumerate(self.table) if word})

    def encode(self, text):
        """Tokens of a text; never bos_id."""
        if self.encoding is not None:
            return self.encoding.encode_ordinary(text)
        tokens = list(text.encode(errors="replace"))
        if self.bos_id in tokens:
            raise SampleError("the text holds a NUL byte, which begins a document here: remove it")
        return tokens

    def split_space(self, text, n_new):
        """A text and n_new tokens to follow -> (what is known, which tokens (V,) may be next, or
        None): its last space, or the last of several white-space characters, begins a token as
        GPT-2 cuts them. A single token then is more than that space."""
        found = re.search(r" \Z|(?<=\s)\s\Z", text, re.A)
        space, least = found[0].encode() if found else b"", 1 + (n_new == 1)
        allowed = [word.startswith(space) and len(word) >= least for word in self.table]
        return (text[:-1], torch.tensor(allowed)) if found and sum(allowed) > 1 else (text, None)

    def spans(self, tokens, kinds):
        """[(text, kind)] of a row: characters take the kind of the token that completes them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        signs, pieces, kind = {self.bos_id: BREAK, self.mask_id: "░"}, [], None
        for token, kind in zip(tokens, kinds, strict=True):
            sign = signs.get(token, "")
            word = b"" if sign else self.table[token]
            pieces.append((decoder.decode(word, final=bool(sign)) + sign, kind))
        pieces.append((decoder.decode(b"", final=True), kind))
        runs = itertools.groupby((p for p in pieces if p[0]), key=lambda piece: piece[1])
        return [("".join(text for text, _ in run), kind) for kind, run in runs]

    def decode(self, tokens):
        return "".join(text for text, _ in self.spans(tokens, [None] * len(tokens)))


# ----------------------------------------------------------------------------- networks
class Cache:
    """Attention that keeps keys and values, for Trunk.predict of gpt and train_block, whose first
    block_len positions are the noised block, which is not kept. Of the others, as many as fit into
    the context are seen. A model without predict computes all anew every time."""
    def __init__(self, model, cfg):
        self.model, self.cfg, self.is_cached = model, cfg, hasattr(model, "predict")
        self.n_noised = getattr(cfg, "block_len", 0)
        self.window = cfg.seq_len - self.n_noised
        self.kept = [None] * cfg.n_layer  # (2, B, Hkv, S, d) each; the layer whose turn it is first
        self.done = 0  # positions that went in
        self.mask = None  # (.., N, S) of this pass; None: everything is seen

    def __call__(self, q, k, v, ctx):
        """One layer of a pass: q (B, H, N', d), k and v (B, Hkv, N, d) -> (B, H, N', d)"""
        old, new = self.kept.pop(0), torch.stack((k, v)).roll(-self.n_noised, 3)
        k, v = new = new if old is None else torch.cat((old, new), 3)
        clean = new[..., :k.size(2) - self.n_noised, :]
        self.kept.append(clean[..., max(0, clean.size(3) - self.window):, :])
        mask = None if self.mask is None else self.mask[..., :q.size(2), :]
        is_grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)

    def read_mdlm(self, tokens, is_mask, rows):
        """train_mdlm: log p (R, V) at flat positions rows (R,) of tokens (B, T)"""
        sigma = -torch.log1p(-is_mask.sum(1).clamp(min=1) / (tokens.size(1) + 1))
        return self.model(tokens, sigma, rows).log_softmax(-1)

    def read_gpt(self, tokens, is_mask, rows):
        """gpt: tokens (B, S) -> log p of the last one (R, V) in rows (R,)"""
        S, done, device = tokens.size(1), self.done, tokens.device
        x = F.pad(tokens[:, :-1], (1, 0), value=self.cfg.vocab_size)  # (B, S), the start first
        if not self.is_cached:
            return self.model(x, (rows + 1) * S - 1).log_softmax(-1)
        new = torch.arange(done, S, device=device)
        self.mask = new[:, None] >= torch.arange(S, device=device) if len(new) > 1 else None
        self.done, last = S, (rows + 1) * (S - done) - 1
        return self.model.predict(x[:, done:], new, rows=last, attend=self).log_softmax(-1)

    def read_block(self, tokens, is_mask, rows):
        """train_block: tokens (B, T) up to the end of a noised block -> log p (R, V) at flat
        positions rows (R,) of that block (B, L). The first pass of a block takes in the finished
        one before it."""
        cfg, T, L, device = self.cfg, tokens.size(1), self.n_noised, tokens.device
        if not self.is_cached:
            x = tokens[:, -cfg.seq_len:]
            return self.model(x, x, rows + (rows // L + 1) * (x.size(1) - L)).log_softmax(-1)
        noised, clean = torch.arange(T - L, T, device=device), torch.arange(T - L, device=device)
        at = torch.cat((noised, clean[self.done:]))  # (N,)
        seen = torch.cat((clean[max(0, self.done - self.window):], noised))  # (S,)
        self.done = T - L
        self.mask = None  # a noised block alone sees everything
        if len(at) > L or cfg.doc_mask:
            i, j = at[:, None] // L, seen // L
            self.mask = (j <= i) & (j > i - cfg.seq_len // L)  # (N, S)
        if cfg.doc_mask:  # a noised block goes on with the document before it
            docs = (tokens[:, :T - L] == cfg.bos_id).cumsum(1)
            before = docs[:, -1:] if T > L else docs.new_zeros(len(docs), 1)
            docs = torch.cat((docs, before.expand(-1, L)), 1)  # (B, T)
            self.mask = self.mask & (docs[:, None, at, None] == docs[:, None, None, seen])
        logits = self.model.predict(tokens[:, at], at, rows=rows, n_query=L, attend=self)
        return logits.log_softmax(-1)


# ----------------------------------------------------------------------------- samplers
# All take known (B, T) int64 and is_known (B, T) bool -> tokens (B, T), length (B,) of every row,
# number of forward passes. gen (CPU) seeds a generator for each row, so that rows do not depend on
# their batch. warp changes the log-probabilities that tokens are drawn from; watch(tokens (B, T),
# nfe) sees every pass.
def row_generators(gen, n_rows):
    seeds = [int(torch.randint(2**62, (), generator=gen)) for _ in range(n_rows)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniforms(gens, *shape):
    """(B, *shape) float64 on the CPU"""
    return torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in gens])


def float64(x):
    """On the CPU where the device (MPS) has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def draw_tokens(log_probs, u):
    """Inverse CDF in float64: log_probs (R, V), u (R,) uniform -> tokens (R,). Gumbel noise in fp32
    draws rare tokens too seldom (arXiv 2409.02908, section 4)."""
    cdf = float64(log_probs).softmax(-1).cumsum(-1)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u.to(cdf.device)[:, None] * total, right=True)[:, 0]
    # u < 1 may still round up to the total: the last token that has any probability.
    last = (cdf < total).sum(-1)
    return torch.minimum(token, last).to(log_probs.device)


@torch.no_grad()
def fill_blocks(model, cfg, known, is_known, *, kind, gen, steps=None, choose=None, warp=None,
                watch=None, stop=None):
    """Fill in the unknown positions, block after block: those of train_block, or (kind mdlm) the
    whole row, or (gpt) one token.

    steps=N: ancestral sampling on N equal steps of t (arXiv 2406.07524, eq. 6 with SUBS), each
    masked token drawn with probability (t - s) / t. steps=None: first-hitting (arXiv 2409.02908),
    one uniformly random token a row and pass: as ancestral for N -> inf. choose (see orders, below)
    replaces both. stop=ID: a row ends where that token stands in a finished block, unless it is its
    first or known; it is not counted in the length, and the row is filled up with it."""
    (B, T), mask_id, device = known.shape, cfg.vocab_size, known.device
    L = cfg.block_len if kind == "block" else 1 if kind == "gpt" else T
    gens, passes, nfe = row_generators(gen, B), L if steps is None else steps, 0
    warp = warp or same
    n_numbers = 1 if kind == "gpt" else 2  # which token of a block is drawn; and what it becomes
    whole = -(-T // L) * L  # the last block is written to its end, and cut
    fixed = F.pad(is_known, (0, whole - T))  # (B, whole)
    tokens = F.pad(torch.where(is_known, known, mask_id), (0, whole - T), value=mask_id)
    length = torch.full((B,), T, device=device)
    cache = Cache(model, cfg)
    read, known_len = getattr(cache, f"read_{kind}"), int(is_known.sum(1).min()) // L * L
    # A prompt that is longer than the context enters the cache of train_block piece by piece.
    is_long = kind == "block" and cache.is_cached
    for end in range(cfg.seq_len, is_long * known_len, max(L, cfg.seq_len - L)):
        read(tokens[:, :end], None, tokens.new_zeros(0))
        nfe += 1
    for start in range(0, whole, L):
        here = slice(start, start + L)
        is_empty = not (tokens[:, here] == mask_id).any()
        psi = torch.full((B, L), math.inf, dtype=torch.float64)
        for i in range(passes):
            numbers = uniforms(gens, n_numbers, L)
            if is_empty:  # the numbers of later blocks do not depend on it
                continue
            pick, u = numbers[:, 0], numbers[:, -1]  # (B, L) each
            block = tokens[:, here]
            is_mask = block == mask_id
            if choose is not None:
                commit = torch.ones(B, L, dtype=torch.bool)  # chosen from below
            elif steps is None:
                first = pick.masked_fill(~is_mask.cpu(), -1).argmax(1, keepdim=True)
                commit = torch.zeros(B, L, dtype=torch.bool).scatter_(1, first, True)
            else:
                commit = pick * (steps - i) < 1
            rows = (commit.to(device) & is_mask).flatten().nonzero()[:, 0]
            log_probs = torch.zeros(0, mask_id, device=device)
            if len(rows):
                log_probs = read(tokens[:, :start + L], is_mask, rows)  # (R, V)
                nfe += 1
            if choose is not None:
                is_left = choose(log_probs, is_mask, step=i, steps=steps, u=pick, psi=psi)
                is_left &= ~fixed[:, here] & (i < passes - 1)
                block = torch.where(is_left, mask_id, block)
                psi[is_left.cpu()] = math.inf
                is_drawn = ~is_left.flatten()[rows]
                rows, log_probs = rows[is_drawn], log_probs[is_drawn]
            drawn = draw_tokens(warp(log_probs), u.flatten()[rows.cpu()])
            block = block.flatten().index_put((rows,), drawn).view(B, L)
            if choose is not None:
                p = log_probs.gather(1, drawn[:, None])[:, 0].cpu().double().exp()
                psi.view(-1)[rows.cpu()] = p
                psi[:, T - start:] = math.inf  # what is cut is not masked again
            tokens[:, here] = block
            if stop is not None and i == passes - 1:
                ends = (block == stop) & ~fixed[:, here]
                ends[:, 0] &= start > 0
                at = start + ends.int().argmax(1)
                behind = torch.arange(whole, device=device) >= at[:, None]  # (B, whole)
                behind &= ends.any(1, keepdim=True)
                tokens, fixed = torch.where(behind, stop, tokens), fixed | behind
                length = torch.where(ends.any(1), at.clamp(max=T), length)
            if watch is not None:
                watch(tokens[:, :T], nfe)
    return tokens[:, :T], length, nfe


def uniform_law(log_score, current, sigma, sigma_next, rate, warp):
    """log_score (R, N) at tokens current (R,) and noise sigma -> log of what a pass draws from,
    both float64, up to a constant: Tweedie's step to sigma_next, or Euler's of the given rate."""
    score = log_score.exp()
    N, growth = score.size(-1), math.expm1(sigma)
    if warp is not None:  # exp(-sigma Q) s, a clean token's law given the other positions
        clean = (1 + growth) * score - growth * score.mean(-1, keepdim=True)
        clean = warp(clean.clamp(min=0).log().log_softmax(-1)).exp()
        score = N * clean + growth  # and the noise on it again
        score = score / score.gather(-1, current[:, None])
    if rate is not None:
        law = rate / N * score
        stay = 1 + law.gather(-1, current[:, None]) - law.sum(-1, keepdim=True)
        law = law.scatter(-1, current[:, None], stay)
    else:  # exp(-delta Q) s, times exp(delta Q) from y to the current token
        delta = sigma - sigma_next
        before = math.exp(delta) * score - math.expm1(delta) * score.mean(-1, keepdim=True)
        law = before * (F.one_hot(current, N) * math.exp(-delta) - math.expm1(-delta) / N)
    return law.clamp(min=0).log()  # an inexact score, or too long a step, may go below 0


@torch.no_grad()
def redraw_rows(model, cfg, known, is_known, *, total_noise, gen, steps=None, is_euler=False,
                warp=None, watch=None, begins=None):
    """train_sedd: steps=N passes (None: T) on N equal steps of t. Each draws every position anew by
    Tweedie's law, the exact one of a position if it moved alone (arXiv 2310.16834, theorem 4.2);
    is_euler: by the rates at the step's start. The last pass denoises: all noise that is left goes
    in one step of Tweedie's. Under absorb a pass without a change needs no new forward pass. warp
    acts under absorb on what a mask becomes, not when; under uniform on the clean token that the
    score implies, before the noise of that time; begins {position: warp} has others for some
    positions. total_noise(t, cfg) -> sigma, dsigma/dt"""
    (B, T), V, device = known.shape, cfg.vocab_size, known.device
    gens, passes = row_generators(gen, B), T if steps is None else steps
    is_absorb = cfg.graph == "absorb"
    sigmas, slopes = total_noise(torch.arange(passes, 0, -1, dtype=torch.float64) / passes, cfg)
    sigmas = [*sigmas.tolist(), 0.0]
    start = (uniforms(gens, T) * V).long().to(device)
    tokens = torch.where(is_known, known, V if is_absorb else start)
    nfe, is_changed = 0, True
    for i in range(passes):
        sigma, is_last = sigmas[i], i == passes - 1
        rate = slopes[i].item() / passes if is_euler and not is_last else None
        pick, u = uniforms(gens, 2, T).unbind(1)  # (B, T) each
        is_free = tokens == V if is_absorb else ~is_known
        rows = is_free.flatten().nonzero()[:, 0]
        if not len(rows):
            break
        if is_absorb:
            if is_changed:
                at = -torch.log1p(-is_free.sum(1).clamp(min=1) / (T + 1))  # sigma of those masks
                log_clean = model(tokens, at, rows)  # (R, V)
                log_clean = log_clean + torch.expm1(at).log()[rows // T, None]
                nfe += 1
            # Tweedie: expm1(sigma - sigma_next) s_y is the probability of token y.
            share = math.expm1(sigma - sigmas[i + 1]) if rate is None else rate
            leave = log_clean.logsumexp(-1).cpu().double().exp() * share / math.expm1(sigma)
            leave = ((pick.flatten()[rows.cpu()] < leave) | is_last).to(device)
            rows, log_law = rows[leave], (warp or same)(log_clean[leave].log_softmax(-1))
        else:
            log_score = float64(model(tokens, torch.full((B,), sigma, device=device), rows))
            nfe += 1
            current = tokens.flatten()[rows].to(log_score.device)
            step = sigma, sigmas[i + 1], rate
            log_law = uniform_law(log_score, current, *step, warp)
            for at, own_warp in (begins or {}).items():
                hit = rows % T == at
                log_law[hit] = uniform_law(log_score[hit], current[hit], *step, own_warp)
        drawn = draw_tokens(log_law, u.flatten()[rows.cpu()]).to(device)
        before, tokens = tokens, tokens.flatten().index_put((rows,), drawn).view(B, T)
        is_changed = not torch.equal(before, tokens)
        if watch is not None:
            watch(tokens, nfe)
    return tokens, torch.full((B,), T, device=device), nfe


# ----------------------------------------------------------------------------- orders
# choose(log_probs (R, V), is_mask (B, L), step, steps, u (B, L), psi (B, L)) -> is_mask after the
# pass. R = is_mask.sum(); log_probs are untempered, so temperature never moves a rank. psi: the
# probability that a token had when it was drawn, infinite where none was.
RANKS = {
    "random": lambda log_probs, u: u,
    "confidence": lambda log_probs, u: log_probs.amax(-1),
    "entropy": lambda log_probs, u: -torch.special.entr(log_probs.exp()).sum(-1),
    "margin": lambda log_probs, u: log_probs.exp().topk(2).values.diff().neg().squeeze(-1),
}
# ReMDM's loop: t, and alpha there; it masks again while alpha stays.
LOOP = (0, 0.05, 0.55, 1), (1, 0.9, 0.9, 0)
REMASK_ETA = {"loop": 0.02, "cap": 0.02, "rescale": 0.02, "conf": 1.0}
REMASK = r"(loop|cap|rescale|conf)(:(0?\.\d+|1))?"


def ordered(name, threshold=None):
    """Fix the best-ranked tokens of each row, as many a pass as spreads the row over the passes
    that are left (one, when steps is None), and every token whose top probability is above
    threshold."""
    def choose(log_probs, is_mask, *, step, steps, u, psi=None):
        device, is_mask = is_mask.device, is_mask.cpu()  # where float64 and small sorts are at home
        left = is_mask.sum(1, keepdim=True)  # (B, 1)
        quota = 1 if steps is None else -(-left // (steps - step))
        rank = torch.full(is_mask.shape, -math.inf, dtype=torch.float64)
        rank[is_mask] = RANKS[name](log_probs, u[is_mask]).cpu().double()
        place = rank.argsort(dim=1, descending=True, stable=True).argsort(1)
        commit = place < quota  # (B, L)
        if threshold is not None:
            commit[is_mask] |= (log_probs.amax(-1).exp() > threshold).cpu()
        return (is_mask & ~commit).to(device)

    return choose


def remasking(text):
    """Remasking diffusion (ReMDM, 2503.00307). A fixed token is masked again with probability sigma
    <= sigma_max = min(1, (1-alpha_s)/alpha_t), a masked one is fixed with probability
    (alpha_s - (1-sigma) alpha_t) / (1-alpha_t): the share of fixed tokens follows alpha as without
    remasking. sigma is min(eta, sigma_max) for cap and loop, eta sigma_max for rescale; conf deals
    eta sigma_max out over the fixed tokens by softmax(-psi)."""
    kind, _, eta = text.partition(":")
    eta = float(eta) if eta else REMASK_ETA[kind]

    points = LOOP if kind == "loop" else ((0, 1), (1, 0))

    def choose(log_probs, is_mask, *, step, steps, u, psi):
        device, is_mask = is_mask.device, is_mask.cpu()
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        alpha_t, alpha_s = np.interp((t, s), *points).tolist()
        sigma_max = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        if kind == "conf":  # a row with nothing to mask again has an empty softmax
            sigma = eta * sigma_max * (-psi).softmax(1).nan_to_num(0.0)
        elif kind == "rescale":
            sigma = eta * sigma_max
        else:
            is_on = kind == "cap" or LOOP[0][1] < t <= LOOP[0][2]
            sigma = min(eta, sigma_max) if is_on else 0.0
        fix = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) if alpha_t < 1 else 1.0
        return torch.where(is_mask, u >= fix, u < sigma).to(device)

    return choose


def same(log_probs):
    return log_probs


def make_warp(temperature=1.0, top_k=None, top_p=None):
    """A function of log_probs (R, V): temperature, then top-k, then the nucleus, which keeps the
    token that crosses top_p. None when all are off."""
    if temperature == 1 and top_k is None and top_p is None:
        return None

    def warp(log_probs):
        if temperature < 1e-30:
            likeliest = log_probs.argmax(-1, keepdim=True)
            return torch.full_like(log_probs, -math.inf).scatter(-1, likeliest, 0.0)
        # From the largest one, which then stays finite however low the temperature is.
        log_probs = ((log_probs - log_probs.amax(-1, True)) / temperature).log_softmax(-1)
        if top_k is None and top_p is None:
            return log_probs
        ranked, index = log_probs.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[..., top_k:] = -math.inf
            ranked = ranked.log_softmax(-1)
        if top_p is not None:
            cut = ranked.exp().cumsum(-1) - ranked.exp() >= top_p
            cut[..., 0] = False
            ranked = ranked.masked_fill(cut, -math.inf)
        return torch.empty_like(log_probs).scatter(-1, index, ranked).log_softmax(-1)

    return warp


def warp_among(log_probs, allowed, warp):
    """Only tokens that are allowed (V,) keep a probability, and then warp."""
    return (warp or same)(log_probs.masked_fill(~allowed, -math.inf).log_softmax(-1))


# ----------------------------------------------------------------------------- model
PASSES = ("order", "steps", "threshold", "remask", "refine")  # flags of diffusion alone
MASK_ORDERS, SCORE_ORDERS = ("first_hitting", "ancestral", *RANKS), ("tweedie", "euler")
WAYS = {  # how a kind of model writes, the flags that it cannot take, and its orders
    "mdlm": ("tokens in any order", (), MASK_ORDERS),
    "gpt": ("from left to right, one token a pass", (*PASSES, "infill"), ()),
    "block": ("one block after another", ("refine", "infill"), MASK_ORDERS),
    "sedd": ("all tokens in every pass, by its score", ("threshold", "remask", "refine"),
             SCORE_ORDERS)}


def build_model(script, ckpt, weights="ema"):
    """A checkpoint of a script -> (model in eval mode, its Config); weights: ema or raw."""
    cfg = script.Config(**ckpt["config"])
    model = script.Model(cfg)
    model.load_state_dict((weights == "ema" and ckpt["ema"]) or ckpt["model"])
    return model.eval(), cfg


class LM:
    """A trained model with its tokenizer. Made by load()."""
    def __init__(self, script, ckpt, path, opts):
        self.script, self.name = script, ckpt["script"]
        self.model, self.cfg = script.build_model(ckpt, opts.weights)
        self.tokenizer = Tokenizer(ckpt["meta"], self.cfg.vocab_size)
        self.block_len, self.graph = (getattr(self.cfg, x, None) for x in ("block_len", "graph"))
        diffusion = "block" if self.block_len else "sedd" if self.graph else "mdlm"
        self.kind = "gpt" if script.METRIC == "val_nll" else diffusion
        # A fork may have changed forward and not predict, so it computes all anew.
        is_fork = self.name not in SCRIPTS
        self.net = self.model.__call__ if is_fork else self.model
        self.device = script.pick_device(opts.device, 0)
        self.dtype = script.pick_dtype(
            self.cfg.dtype if opts.dtype == "auto" else opts.dtype, self.device)
        self.amp = functools.partial(torch.autocast, self.device.type, self.dtype,
                                     self.dtype != torch.float32)
        self.model.to(self.device)
        self.where = f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"
        averaged = "ema" if opts.weights == "ema" and ckpt["ema"] else "raw"
        n = sum(p.numel() for p in self.model.parameters())
        self.summary = (
            f"{path}: {self.name}, {n / 1e6:.2f}M parameters, {averaged} weights of step "
            f"{ckpt['step']}, {self.tokenizer.name} tokens, context {self.cfg.seq_len}"
            + ", no cache" * is_fork)

    def batch_rows(self, length):
        """How many rows of that many tokens to run at once."""
        numbers = length * max(self.cfg.vocab_size, self.cfg.n_head * length)
        return max(1, BATCH_NUMBERS // numbers)

    def check_able(self, opts):
        """Refuse what this kind of model cannot do."""
        how, refused, orders = WAYS[self.kind]
        for name in refused:
            value = getattr(opts, name)
            check(value == getattr(Options, name), name, value,
                  f"{self.name} writes {how}: drop the flag or take a checkpoint of train_mdlm")
        fits = opts.order in (None, *orders)
        check(fits, "order", opts.order, f"{self.name} has {', '.join(orders)}")

    def describe(self, opts):
        """How it writes, in words, with what its samples are not."""
        words = f"remask {opts.remask}" if opts.remask else opts.order_name
        is_exact = opts.order_name not in RANKS or (opts.order, opts.threshold) == ("random", None)
        words = words if is_exact else f"{words} (mode-seeking)"
        words += f" in blocks of {self.block_len}" if self.block_len else ""
        return {"gpt": "left to right", "sedd": opts.order or SCORE_ORDERS[0]}.get(self.kind, words)

    def canvas(self, opts):
        """A prompt, or a text with blanks, and the room behind it -> (known (T,) int64, is_known
        (T,) bool, {position: (V,) bool, the tokens that may stand there})"""
        self.check_able(opts)
        is_infill = opts.infill is not None
        texts = BLANK.split(opts.infill) if is_infill else [opts.prompt or ""]
        blanks = [int(n) for n in opts.blank.split(",")]
        blanks = blanks if len(blanks) > 1 else blanks * (len(texts) - 1)
        check(blanks or not is_infill, "infill", opts.infill, "no blank: write ___ for one")
        fits = not is_infill or len(blanks) == len(texts) - 1
        check(fits, "blank", opts.blank, f"the text has {len(texts) - 1} blanks")
        tokens, begins = [], {}
        for text, n_new in zip(texts, [*blanks, 0] if is_infill else [0], strict=True):
            allowed = None
            if n_new or not is_infill or opts.length:
                text, allowed = self.tokenizer.split_space(text, n_new)
            tokens += self.tokenizer.encode(text)
            if allowed is not None:
                begins[len(tokens)] = allowed
            tokens += [None] * n_new
        n, limit = len(tokens), math.inf if self.block_len else self.cfg.seq_len
        least = n + (not is_infill or n in begins)
        length = opts.length or (least if is_infill else min(limit, n + DEFAULT_LENGTH))
        fits = least <= length <= limit
        check(fits, "length", length, f"the text takes {n} tokens, {self.name} goes up to {limit}")
        tokens += [None] * (length - n)
        known = torch.tensor([token or 0 for token in tokens])
        return known, torch.tensor([token is not None for token in tokens]), begins

    @torch.inference_mode()
    def batches(self, canvas, opts, watch=None, stops=True):
        """Fill the canvas n times; yield (lists of tokens, number of forward passes) of as many
        rows as fit in a batch. watch(tokens (B, T), nfe) sees every pass. stops: at the end of a
        document, where the model writes in order.

        Sample i depends on (seed, i) alone. A token whose beginning is known is drawn first, so
        that the others follow the conditional given it; a uniform score keeps to it throughout."""
        known, is_known = (x.to(self.device) for x in canvas[:2])
        warp = make_warp(opts.temperature, opts.top_k, opts.top_p)
        begins = {at: functools.partial(warp_among, allowed=allowed.to(self.device), warp=warp)
                  for at, allowed in canvas[2].items()}
        how = dict(begins=begins, stop=self.tokenizer.bos_id if stops else None)
        T, size = len(known), min(MAX_ROWS, self.batch_rows(min(len(known), self.cfg.seq_len)))
        # Streams of their own for refining and for those first tokens: all hand out a seed a row.
        streams = opts.seed, opts.seed ^ 2**62, opts.seed ^ FIRST_STREAM
        gens = [torch.Generator().manual_seed(seed) for seed in streams]
        for first in range(0, opts.n, size):
            x, given = (t.repeat(min(size, opts.n - first), 1) for t in (known, is_known))
            spent = 0
            with self.amp():
                for at, own_warp in begins.items() if self.graph != "uniform" else ():
                    end = at + 1 if self.kind in ("gpt", "block") else T  # of what the token sees
                    there = x[:, :end], given[:, :end]
                    drawn, _, nfe = self.fill(*there, Options(steps=1), gens[2], own_warp)
                    x[:, at], given[:, at], spent = drawn[:, at], True, spent + nfe
                tokens, length, nfe = self.fill(x, given, opts, gens[0], warp, watch, **how)
                spent += nfe
                if opts.refine > 0:
                    keep, nfe = self.likeliest(tokens, given, opts.refine)
                    seen = spent = spent + nfe
                    more = watch and (lambda tokens, nfe, seen=seen: watch(tokens, seen + nfe))
                    tokens, _, nfe = self.fill(tokens, keep, opts, gens[1], warp, more, **how)
                    spent += nfe
            rows = zip(tokens.tolist(), length.tolist(), strict=True)
            yield [row[:n] for row, n in rows], spent

    def fill(self, known, is_known, opts, gen, warp, watch=None, stop=None, begins=None):
        """One run of a sampler."""
        how = dict(steps=opts.steps, gen=gen, warp=warp, watch=watch)
        if self.kind == "sedd":
            return redraw_rows(self.net, self.cfg, known, is_known, **how, begins=begins,
                               total_noise=self.script.total_noise, is_euler=opts.order == "euler")
        if opts.order_name == "ancestral" and opts.steps is None:
            most = int((~is_known).sum(1).max())
            how["steps"] = max(1, min(self.block_len or most, most))
        if opts.order_name in RANKS:
            how["choose"] = ordered(opts.order_name, opts.threshold)
        elif opts.remask:
            how["choose"] = remasking(opts.remask)
        stop = None if self.kind == "mdlm" else stop
        return fill_blocks(self.net, self.cfg, known, is_known, kind=self.kind, stop=stop, **how)

    def likeliest(self, tokens, is_known, refine):
        """What to keep (B, T) when the fraction `refine` is predicted anew, and the passes spent.

        Two passes score every token: every second one is masked, then the others, so that each is
        judged with its neighbours in sight."""
        is_free = ~is_known
        score = torch.full(tokens.shape, math.inf, device=tokens.device)
        parity = is_free.cumsum(1) % 2
        halves = [half for odd in (1, 0) if (half := is_free & (parity == odd)).any()]
        for half in halves:
            masked = torch.where(half, self.cfg.vocab_size, tokens)
            rows = half.flatten().nonzero()[:, 0]
            log_probs = Cache(self.net, self.cfg).read_mdlm(masked, half, rows)
            score[half] = log_probs.gather(1, tokens[half][:, None])[:, 0]
        n_again = (is_free.sum(1, keepdim=True) * refine).round().clamp(min=1)  # (B, 1)
        place = score.argsort(dim=1, stable=True).argsort(1)
        return is_known | (place >= n_again), len(halves)

    def generate(self, prompt="", **how):
        """n texts of `length` tokens that begin with the prompt; `how`: the flags' names."""
        return self.texts(Options(prompt=prompt, **how))

    def infill(self, text, blank=16, **how):
        """n versions of a text, its blanks (___) filled with `blank` tokens, an int or a list."""
        blank = ",".join(map(str, [blank] if isinstance(blank, int) else blank))
        return self.texts(Options(infill=text, blank=blank, **how))

    def texts(self, opts):
        batches = self.batches(self.canvas(opts), opts)
        return [self.tokenizer.decode(row) for rows, _ in batches for row in rows]

    @torch.inference_mode()
    def score(self, text, draws=None, seed=0):
        """-log p of a text, cut into windows of seq_len tokens (the last may be shorter): nats,
        nats_stderr, bits_per_byte, bits_stderr, n_tokens, n_bytes.

        A bound, with its standard error over independent draws of noise, each of which masks every
        window twice, as an antithetic pair. gpt: one pass without noise, exact."""
        is_exact = self.kind == "gpt"
        check(draws is None or not is_exact, "draws", draws, f"{self.name} needs no noise: drop it")
        n_draws, n_copies = (1, 1) if is_exact else (draws or DEFAULT_DRAWS, 2)
        tokens = self.tokenizer.encode(text)
        check(tokens, "score", text, "the text is empty")
        gen = torch.Generator().manual_seed(seed)
        totals = torch.zeros(n_draws, dtype=torch.float64)
        whole = len(tokens) // self.cfg.seq_len * self.cfg.seq_len
        for part in filter(None, (tokens[:whole], tokens[whole:])):
            cfg = dataclasses.replace(self.cfg, seq_len=min(len(part), self.cfg.seq_len))
            x0 = torch.tensor(part).view(-1, cfg.seq_len).repeat_interleave(n_copies, 0)
            for draw in range(n_draws):
                noise = self.script.draw_noise(cfg, len(x0), gen, bound=True)
                for rows in torch.arange(len(x0)).split(self.batch_rows(cfg.seq_len)):
                    piece = self.script.take_rows(noise, rows, self.device)
                    with self.amp():
                        nats = self.script.nelbo_fn(
                            self.model, x0[rows].to(self.device), piece, cfg)
                    totals[draw] += nats.cpu().double().sum() / n_copies
        nats, n_bytes = totals.mean().item(), sum(len(self.tokenizer.table[i]) for i in tokens)
        stderr = totals.std().item() / math.sqrt(n_draws) if n_draws > 1 else 0.0
        bits = 1 / (math.log(2) * n_bytes)
        return SimpleNamespace(nats=nats, nats_stderr=stderr, bits_per_byte=nats * bits,
                               bits_stderr=stderr * bits, n_tokens=len(tokens), n_bytes=n_bytes)


# ----------------------------------------------------------------------------- loading
@contextlib.contextmanager
def naming(name):
    """Name the file or flag in whatever goes wrong inside: a checkpoint may hold anything."""
    try:
        yield
    except Exception as e:
        line = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise SampleError(line if line.startswith(str(name)) else f"{name}: {line}") from None


def find_checkpoint(name=None):
    """The file behind PATH, a run folder, or hf:OWNER/REPO/FILE, which is downloaded once; without
    a name, the newest in out/."""
    if not name:
        name = max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=None)
        if not name:
            raise SampleError("out/*/ckpt.pt: no checkpoint here: pass --ckpt=PATH, or train one: "
                              "python train_mdlm.py --preset=tiny")
    if not str(name).startswith("hf:"):
        return Path(name, "ckpt.pt") if os.path.isdir(name) else Path(name)
    hub_name = re.fullmatch(r"hf:([^/]+/[^/]+)/(.+)", name)
    check(hub_name, "ckpt", name, "write hf:OWNER/REPO/FILE")
    with naming(f"{name}: could not be downloaded"):
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(*hub_name.groups()))


def load_script(path):
    """Import a training script from its file."""
    with naming(f"--script={path}"):
        spec = importlib.util.spec_from_file_location(f"sampled_{Path(path).stem}", path)
        script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        sys.path += {str(Path(path).resolve().parent), str(HERE)}.difference(sys.path)  # for muon
        spec.loader.exec_module(script)
    check(hasattr(script, "nelbo_fn"), "script", path, "not a training script")
    return script


def load(path=None, script=None, opts=None, **how):
    """LM from a checkpoint: PATH, its folder or hf:OWNER/REPO/FILE; None: the newest in out/.
    script: the file that wrote it, when it is not one of ours. how: weights, device, dtype."""
    opts, path = opts or Options(**how), find_checkpoint(path)
    module = load_script(script or HERE / f"{SCRIPTS[0]}.py")
    with naming(path):
        ckpt = module.load_checkpoint(path)  # the same text in every script
        name = ckpt["script"]
        is_right = name == Path(script).stem if script else name in SCRIPTS
        check(is_right, "ckpt", path, f"written by {name}.py: pass that file as --script=PATH")
        return LM(module if script else load_script(HERE / f"{name}.py"), ckpt, path, opts)


# ----------------------------------------------------------------------------- terminal
FRAME = 0.04  # seconds between two pictures
STYLES = {"known": "\x1b[1m", "new": "\x1b[32m", "mask": "\x1b[2m", "note": "\x1b[2m"}


def is_terminal(stream):
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def styled(text, kind):
    return f"{STYLES[kind]}{text}\x1b[0m" if kind in STYLES else text


def printable(text):
    """Text that cannot steer a terminal: a model of bytes writes escape codes, too."""
    text = text.replace("\t", "    ").replace("\r\n", "\n")
    return "".join(c if c in "\n" or c.isprintable() or unicodedata.category(c) == "Zs"
                   else c.encode("unicode_escape").decode() for c in text)


def show(spans, stream):
    """Print [(text, kind)]; a terminal gets styles, unless it is dumb, and no control codes."""
    for text, kind in [*spans, ("\n", None)]:
        text = printable(text) if stream.isatty() else text
        stream.write(styled(text, kind) if is_terminal(stream) else text)
    stream.flush()


def note(text):
    """What is no text of the model goes to stderr."""
    show([(text, "note")], sys.stderr)


def lines_of(spans, width):
    """Styled lines of at most `width` cells."""
    lines, cells = [""], 0
    for text, kind in spans:
        run = ""
        for char in printable(text):
            size = 0 if unicodedata.combining(char) else 1
            size += unicodedata.east_asian_width(char) in "WF"
            if char == "\n" or cells + size > width:
                lines[-1] += styled(run, kind)
                lines.append("")
                run, cells = "", 0
            if char != "\n":
                run += char
                cells += size
        lines[-1] += styled(run, kind)
    return lines


def redraw(lines, height, stream, is_last=False):
    """Draw over a picture of so many lines -> the height of the new one."""
    if not is_last:  # what has scrolled away cannot be drawn over
        del lines[max(1, shutil.get_terminal_size().lines - 1):]
    up = f"\x1b[{height - 1}A" if height > 1 else ""
    stream.write((f"\r{up}\x1b[J" if height else "") + "\n".join(lines))
    stream.flush()
    return len(lines)


class Run:
    """A model at work on a canvas. It counts, and shows on stderr how far it is: on a terminal a
    line, with --watch the text below it; in a file, with --watch, the first sample after each
    quarter. For a race it keeps pictures. Its clock stands still while it does all that."""
    def __init__(self, lm, opts, is_race=False):
        self.lm, self.opts, self.is_race, self.canvas = lm, opts, is_race, lm.canvas(opts)
        known, is_known, _ = self.canvas
        self.is_known = is_known.tolist()
        self.frames = [(0.0, 0, torch.where(is_known, known, lm.cfg.vocab_size).tolist())]
        self.nfe, self.seconds, self.bits, self.n_new, self.n_done = 0, 0.0, 0.0, 0, 0

    def rows(self):
        """Write; yield the tokens of every sample."""
        known, is_known, _ = self.canvas
        if self.is_race:  # the end of a document stops none; and some tokens to warm up
            warm = known, is_known | (torch.arange(len(known)) < len(known) - WARM_UP), {}
            list(self.lm.batches(warm, self.opts, stops=False))
        self.rest()
        for rows, nfe in self.lm.batches(self.canvas, self.opts, self, not self.is_race):
            self.seconds += time.perf_counter() - self.since
            self.nfe += nfe
            redraw([], self.height, sys.stderr)
            for row in rows:
                new = [token for token, old in zip(row, self.is_known, strict=False) if not old]
                # Entropy of the tokens' frequencies, low when a sample repeats itself.
                shares = torch.tensor(new).bincount() / len(new)
                self.bits += torch.special.entr(shares).sum().item() / math.log(2)
                self.n_new, self.n_done = self.n_new + len(new), self.n_done + 1
                yield row
            self.rest()

    def rest(self):
        """Before a batch nothing is drawn."""
        self.height, self.drawn, self.last, self.due = 0, -math.inf, None, 0.25
        self.since = time.perf_counter()

    def __call__(self, tokens, nfe):
        rows = tokens.tolist()  # waits for the device
        self.seconds += time.perf_counter() - self.since
        n_left = (tokens == self.lm.cfg.vocab_size).sum().item()
        done = 1 - n_left / (len(rows) * self.is_known.count(False))
        if self.lm.graph == "uniform":  # it has no masks
            done = nfe / (self.opts.steps or len(self.is_known))
        has_text, is_live = self.opts.watch and not self.is_race, is_terminal(sys.stderr)
        if self.is_race:
            self.frames.append((self.seconds, self.nfe + nfe, rows[0]))
        if is_live and (time.monotonic() - self.drawn >= FRAME or done == 1):
            width = shutil.get_terminal_size().columns
            lines = [styled(f"{self.lm.name}: {done:4.0%}, {nfe} passes", "note")]
            for row, before in zip(rows, self.last or rows, strict=True):
                lines += ["", *lines_of(self.spans(row, before), width)] if has_text else []
            self.height, self.last = redraw(lines, self.height, sys.stderr), rows
            self.drawn = time.monotonic()
        elif not is_live and has_text and self.due <= done < 1:
            self.due = (math.floor(done * 4) + 1) / 4
            spans = self.spans(rows[0], rows[0])
            show([(f"[{done:.0%} after {nfe} passes] ", None), *spans], sys.stderr)
        self.since = time.perf_counter()

    def spans(self, row, before):
        """[(text, kind)] of a row, without what fills it behind its end."""
        bos_id = self.lm.tokenizer.bos_id
        n = max((i + 1 for i, token in enumerate(row) if token != bos_id), default=0)
        kinds = ["mask" if token == self.lm.cfg.vocab_size else "known" if is_known
                 else "new" if token != old else None
                 for token, old, is_known in zip(row, before, self.is_known, strict=True)]
        return self.lm.tokenizer.spans(row[:n], kinds[:n])

    def column(self, now, width):
        """Lines that show how far it was at a time: counters, and a sample."""
        i = bisect.bisect(self.frames, now, key=lambda frame: frame[0]) - 1
        _, nfe, row = self.frames[i]
        before = row if i + 1 == len(self.frames) else self.frames[max(0, i - 1)][2]
        counters = f"{nfe} passes, {min(now, self.seconds):.1f} s\n\n"
        spans = [(f"{self.lm.name}\n", "known"), (counters, "note"), *self.spans(row, before)]
        return lines_of(spans, width)


# ----------------------------------------------------------------------------- race
WARM_UP = 8  # tokens that a model writes before its clock starts
MIN_COLUMN = 24  # cells, of a text beside another
BAR = " │ "  # between the two


def replay(runs):
    """Draw the runs side by side in real time; the last picture stays, and is whole."""
    start, now, height = time.monotonic(), 0.0, 0
    end = max(run.seconds for run in runs)
    while now < end:
        now = min(end, time.monotonic() - start)
        step = (shutil.get_terminal_size().columns + len(BAR)) // len(runs)
        columns = [run.column(now, step - len(BAR)) for run in runs]
        bars = ["", *(f"\x1b[{i * step - len(BAR) + 1}G{BAR}" for i in range(1, len(runs)))]
        lines = ["".join(map("".join, zip(bars, cells, strict=True)))
                 for cells in itertools.zip_longest(*columns, fillvalue="")]
        height = redraw(lines, height, sys.stdout, is_last=now == end)
        time.sleep(FRAME)
    print("\n")


def print_race(opts):
    others = [load(path, None, opts) for path in opts.race.split(",")]
    lms = [load(opts.ckpt, opts.script, opts), *others]
    for lm in others:
        fits = lm.tokenizer.table == lms[0].tokenizer.table
        check(fits, "race", opts.race, f"the tokens of {lm.name} are not those of {lms[0].name}")
    plain = dataclasses.replace(opts, **{name: getattr(Options, name) for name in PASSES})
    length = min(len(lm.canvas(plain)[0]) for lm in lms)
    runs = [Run(lm, dataclasses.replace(plain if lm.kind == "gpt" else opts, length=length), True)
            for lm in lms]
    note("\n".join(lm.summary for lm in lms))
    note(f"{opts.n} x {length} tokens, {lms[0].where}, one model after another\n")
    firsts = [[*run.rows()][0] for run in runs]
    if is_terminal(sys.stdout) and shutil.get_terminal_size().columns >= MIN_COLUMN * len(lms):
        replay(runs)
    else:
        for lm, row in zip(lms, firsts, strict=True):
            show([(f"--- {lm.name}\n{lm.tokenizer.decode(row)}\n", None)], sys.stdout)
    print(f"{'':12}  passes  seconds  tokens/s  entropy")
    for run in runs:
        rate, entropy = run.n_new / run.seconds, run.bits / opts.n
        print(f"{run.lm.name:12}  {run.nfe:6}  {run.seconds:7.2f}  {rate:8.0f}  "
              f"{entropy:.2f} bits, {run.lm.describe(run.opts)}")


# ----------------------------------------------------------------------------- command line
def read_text(path):
    with naming(path):
        return Path(path).read_text(encoding="utf-8")


def print_score(lm, opts):
    is_file = os.path.isfile(opts.score)
    text = read_text(opts.score) if is_file else opts.score
    score = lm.score(text, opts.draws, opts.seed)
    note(lm.summary)
    nats, bits = f"= {score.nats:.2f}", f"{score.bits_per_byte:.4f}"
    noise = "exact"
    if lm.kind != "gpt":
        nats, bits = f"<{nats} +- {score.nats_stderr:.2f}", f"{bits} +- {score.bits_stderr:.4f}"
        noise = f"{opts.draws or DEFAULT_DRAWS} noise draws, seed {opts.seed}"
    what = f"file {opts.score}" if is_file else "the text given"
    print(f"-log p {nats} nats, {bits} bits per byte ({what}: {score.n_tokens} tokens, "
          f"{score.n_bytes} bytes; {noise}, {lm.where})")


def print_samples(lm, opts):
    run = Run(lm, opts)
    note(lm.summary)
    for row in run.rows():
        if opts.n > 1:
            note(f"--- sample {run.n_done} of {opts.n}")
        kinds = ["known" if is_known else None for is_known in run.is_known[:len(row)]]
        show(lm.tokenizer.spans(row, kinds) + [("\n", None)] * (opts.n > 1), sys.stdout)
    note(f"NFE {run.nfe}, {run.n_new / run.seconds:.0f} tokens/s, {lm.where}, "
         f"{lm.describe(opts)}, entropy {run.bits / opts.n:.2f} bits")


def main(argv):
    try:
        opts = parse_args(argv)
        modes = [flag for flag in ("infill", "score", "prompt", "prompt_file", "race")
                 if getattr(opts, flag) is not None]
        pairs = ["prompt", "race"], ["prompt_file", "race"]
        if len(modes) > 1 and modes not in pairs:
            raise SampleError(f"--{' and --'.join(modes)} exclude each other: drop one")
        check(opts.draws is None or "score" in modes, "draws", opts.draws, "goes with --score")
        if opts.prompt_file is not None:
            opts = dataclasses.replace(opts, prompt=read_text(opts.prompt_file))
        if opts.race is not None:
            print_race(opts)
        else:
            lm = load(opts.ckpt, opts.script, opts)
            print_samples(lm, opts) if opts.score is None else print_score(lm, opts)
        sys.stdout.flush()
    except (SampleError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        line = printable(str(e)).replace("\n", " ")
        print(f"sample.py: {line[:500] or 'out of memory'}", file=sys.stderr)
        if isinstance(e, OSError):  # do not try again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(2) from None


if __name__ == "__main__":
    # A file gets UTF-8; a terminal, what it lacks as escapes.
    encoding = None if sys.stdout.isatty() else "utf-8"
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    main(sys.argv[1:])
