"""Sample from a checkpoint: generate, infill, watch, score; race one against another.

    python sample.py                                         newest checkpoint in out/
    python sample.py --prompt="def " --n=4 --length=256
    python sample.py --infill="def ___(self):" --blank=8     ___ is a blank of 8 tokens
    python sample.py --order=confidence --threshold=0.9 --watch
    python sample.py --steps=128 --remask=loop
    python sample.py --score=TEXT|FILE                       bound on -log p of a text
    python sample.py --ckpt=out/demo/ckpt.pt --race=out/gpt/ckpt.pt --steps=64

A checkpoint of gpt.py writes from left to right, one token a pass, up to the end of a document. It
takes no flag about passes and their order, no --infill, and scores exactly. One of train_block.py
writes block after block, any length, up to the end of a document; the flags about passes hold
inside each block, and it takes no --infill and no --refine. One of train_sedd.py draws all tokens
anew in each of --steps passes, by --order=tweedie or euler; no --threshold, --remask or --refine.

Which model
  --ckpt=PATH          checkpoint, its run folder, or hf:OWNER/REPO/FILE; default: the newest
                       out/*/ckpt.pt
  --script=FORK.py     training script that wrote it, when that is an edited one
  --weights=ema|raw    averaged weights, where there are some (default), or those of the last step
  --device=NAME        auto (default), cpu, cuda or mps
  --dtype=NAME         auto (default: as trained on cuda, else fp32), fp32 or bf16
What to write
  --prompt=TEXT        text to continue
  --infill=TEXT        text with blanks: each run of three or more underscores is one
  --blank=N[,N...]     tokens in a blank, for all of them or one by one (default 16)
  --n=N                samples (default 1)
  --length=N           tokens in a sample, prompt included (default: 256 new ones), up to the
                       context, with train_block any number; an infill goes on after its end up to
                       that length (default: it does not)
  --seed=N             the same seed gives the same samples, however many --n asks for (default 0)
How
  --order=NAME         exact samplers: first_hitting (default; one random token a pass), ancestral
                       (default with --steps; a grid of times, exact for many steps) and random
                       (exact at one token a pass). Mode-seeking, so no samples of the model's
                       distribution: confidence (default with --threshold), entropy, margin.
                       train_sedd, exact for many steps: tweedie (its default) and euler
  --steps=N            passes (default: one a token); the tokens of a row are spread over them; with
                       train_block, passes a block
  --threshold=P        fix every token whose top probability exceeds P, and at least one a pass
  --temperature=X      below 1 sharper, 0 takes the likeliest token (default 1)
  --top_k=N            draw from the N likeliest tokens
  --top_p=P            draw from the likeliest tokens that together reach probability P
  --remask=NAME[:ETA]  ReMDM: mask some tokens again, so that errors can be mended: loop, cap,
                       rescale (ETA .02) or conf (ETA 1)
  --refine=F           at the end, mask the least likely fraction F again and predict it anew
  --watch              show the text appearing
Racing
  --race=PATH[,PATH..] checkpoints that write the same prompt and number of tokens as --ckpt does:
                       passes, seconds and tokens per second of each. They run one after the other,
                       so that none slows another, and after a warm-up; a terminal then shows the
                       runs side by side in real time. The flags about passes hold for those that
                       take them, and the end of a document stops none
Scoring
  --score=TEXT|FILE    no sampling: the bound in nats and bits per byte, with its standard error;
                       gpt: the exact value. Up to 16 MiB
  --draws=N            independent noise draws (default 8)

A terminal is shown control characters as escapes (\\x1b); a pipe or file gets the text as it is.
Checkpoints may come from strangers: nothing in them is run.

From Python:
    lm = sample.load("out/demo/ckpt.pt")
    lm.generate(n=4, length=256, prompt="def ", steps=64, order="confidence", threshold=0.9)
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
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # an interrupt of the import below is no reason for a traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SCRIPTS = ("train_mdlm", "train_block", "train_sedd", "gpt")  # beside this file, with checkpoints
NEEDED = ("METRIC", "load_checkpoint", "build_model", "pick_device", "pick_dtype", "nelbo_fn")
DEFAULT_BLANK = 16  # tokens
DEFAULT_DRAWS = 8  # of noise, for a score
DEFAULT_LENGTH = 256  # new tokens
MAX_LENGTH = 2**20  # tokens of a sample or a context; more would only fill the memory
MAX_STEPS = 10**6  # passes, and noise draws
SCORE_BYTES = 2**24  # of a text to score, which takes about a hundred times that of memory
TABLE_BYTES = 2**26  # of all tokens of a checkpoint
SPACE_RUN = 500_000  # white-space characters in a row; tiktoken's regex gives up at twice that
LINE = 500  # characters of a message: it may quote a flag or a stranger's checkpoint
BATCH_NUMBERS = 2**27  # logits, or attention scores of a layer, in one forward pass
MAX_ROWS = 512  # samples at once, so that the first of many are soon there
DOCUMENT_BREAK = "\n\n---\n\n"  # how a document's beginning is shown
BLANK = re.compile("_{3,}")
DTYPES = ("auto", "fp32", "bf16")
# How GPT-2 cuts text into words, as prepare_data.py and tiktoken's releases write it. Another
# pattern may be anything: one that takes for ever, or that tiktoken panics on.
PATTERNS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
SURROGATES = re.compile("[\ud800-\udfff]")  # what argv makes of bytes that are not UTF-8


class SampleError(ValueError):
    """A mistake of the user's, in one line that names the flag or file and the remedy."""


def near_miss(word, words):
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]}?" if close else "one of " + ", ".join(words)


# Tokens


class Tokenizer:
    """Text <-> tokens from the table that a checkpoint carries; nothing is looked up elsewhere."""

    def __init__(self, saved, mask_id):
        self.mask_id = mask_id
        self.name, self.bos_id, self.table = self.read(saved)
        self.table += [b""] * (mask_id - len(self.table))  # a model may have spare ids
        self.encoding = None
        if self.name != "byte":
            try:
                import tiktoken
            except ImportError:
                need = f"the {self.name} tokenizer needs tiktoken: pip install tiktoken"
                raise SampleError(need) from None
            ranks = {word: i for i, word in enumerate(self.table) if word}
            self.encoding = tiktoken.Encoding(
                self.name,
                pat_str=saved["pattern"],
                mergeable_ranks=ranks,
                special_tokens={"<|endoftext|>": self.bos_id},
            )

    def read(self, meta):
        """(name, bos_id, bytes of every token) of a checkpoint's meta.json."""
        name, bos_id, words = meta["tokenizer"], meta["bos_id"], meta["token_bytes"]
        if name == "byte":
            table = [bytes([i]) for i in range(256)]
        else:
            table = [word.encode("latin-1") for word in words]
        table[bos_id] = b""
        if not any(table):
            raise SampleError(
                "the checkpoint was trained without the bytes of its tokens, so its samples"
                " cannot be read: prepare the data with prepare_data.py and train again"
            )
        if name != "byte" and meta["pattern"] not in PATTERNS:
            raise SampleError("the checkpoint's tokenizer has another pattern than GPT-2's")
        return name, bos_id, table

    def encode(self, text):
        """Tokens of a text; never bos_id, which no user's text may forge."""
        text = SURROGATES.sub("\ufffd", text)
        if self.encoding is not None:
            runs = re.finditer(r"\s+", text) if len(text) > SPACE_RUN else ()
            if any(len(run[0]) > SPACE_RUN for run in runs):
                raise SampleError(f"the text has over {SPACE_RUN} spaces in a row: remove some")
            return self.encoding.encode_ordinary(text)
        tokens = list(text.encode())
        if self.bos_id in tokens:
            raise SampleError("the text holds a NUL byte, which begins a document here: remove it")
        return tokens

    def n_bytes(self, tokens):
        return sum(len(self.table[i]) for i in tokens)

    def spans(self, tokens, kinds):
        """[(text, kind)] of a row: characters take the kind of the token that completes them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = []
        kind = None
        for token, kind in zip(tokens, kinds, strict=True):
            if token in (self.bos_id, self.mask_id):
                pieces.append((decoder.decode(b"", final=True), kind))
                pieces.append((DOCUMENT_BREAK if token == self.bos_id else "░", kind))
            else:
                pieces.append((decoder.decode(self.table[token]), kind))
        pieces.append((decoder.decode(b"", final=True), kind))
        runs = itertools.groupby((p for p in pieces if p[0]), key=lambda piece: piece[1])
        return [("".join(text for text, _ in run), kind) for kind, run in runs]

    def decode(self, tokens):
        return "".join(text for text, _ in self.spans(tokens, [None] * len(tokens)))


# Samplers. Every row has a generator of its own, so a row does not depend on its batch; tokens are
# drawn by inverse CDF in float64. warp changes the log-probabilities that tokens are drawn from;
# watch(tokens, nfe) sees every pass.


class Filled(NamedTuple):
    tokens: torch.Tensor  # (B, T) int64
    length: torch.Tensor  # (B,) int64, tokens of each row
    nfe: int  # forward passes
    order: torch.Tensor  # (B, T) int64, the pass that fixed a token; 0: it was known


def draw_tokens(log_probs, u):
    """log_probs (R, V), u (R,) uniform -> tokens (R,). Gumbel noise in fp32 would draw rare tokens
    too seldom (arXiv 2409.02908, section 4)."""
    device = log_probs.device
    if device.type == "mps":  # has no float64
        log_probs = log_probs.cpu()
    cdf = log_probs.double().softmax(-1).cumsum(-1)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u.to(cdf.device)[:, None] * total, right=True)[:, 0]
    # u < 1 may still round up to the total: the last token that has any probability.
    last = (cdf < total).sum(-1)
    return torch.minimum(token, last).to(device)


def row_generators(gen, n_rows):
    seeds = [int(torch.randint(2**62, (), generator=gen)) for _ in range(n_rows)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Cache:
    """Attention over the keys and values of earlier passes, for Trunk.predict. The n_noised first
    positions of a pass are a noised block, which the next pass writes over; the others are kept. Of
    these the newest `window` are seen."""

    def __init__(self, n_layer, n_noised, window, capacity):
        self.n_noised, self.window, self.capacity = n_noised, window, capacity
        self.buffers = [None] * n_layer  # of keys and values, each (B, Hkv, capacity, d)
        self.layer = self.length = self.done = 0  # positions in the buffers; and ever
        self.mask = None  # (.., N, S) of the pass at hand; None: all is seen

    @property
    def first(self):
        """The oldest position that is seen."""
        return self.done - min(self.length, self.window)

    def __call__(self, q, k, v, ctx):
        """q (B, H, N, d), k and v (B, Hkv, N, d) of one layer of this pass -> (B, H, N, d)"""
        L, N, n_seen = self.n_noised, k.size(2), min(self.length, self.window)
        buffers, length = self.buffers[self.layer], self.length
        if buffers is None or length + N > buffers[0].size(2):
            size = max(self.capacity, n_seen + N)
            new = [x.new_empty(*x.shape[:2], size, x.size(3)) for x in (k, v)]
            for x, old in zip(new, buffers or (), strict=False):
                x[:, :, :n_seen] = old[:, :, length - n_seen : length]
            self.buffers[self.layer], buffers, length = new, new, n_seen
        start, end = length - n_seen, length + N
        for x, new in zip(buffers, (k, v), strict=True):
            x[:, :, length : end - L] = new[:, :, L:]
            x[:, :, end - L : end] = new[:, :, :L]
        self.layer += 1
        if self.layer == len(self.buffers):
            self.layer, self.length, self.done = 0, end - L, self.done + N - L
        k, v = (x[:, :, start:end] for x in buffers)
        mask = None if self.mask is None else self.mask[..., : q.size(2), :]
        grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)


class BlockReader:
    """log p of the noised block at the end of tokens, with the blocks before it in a cache."""

    def __init__(self, lm, T):
        self.lm, self.cfg = lm, lm.cfg
        L = self.cfg.block_len
        window = self.cfg.seq_len - L
        self.cache = Cache(self.cfg.n_layer, L, window, min(T, 2 * self.cfg.seq_len))

    def __call__(self, tokens, is_mask, rows):
        """tokens (B, T) up to the end of the block, flat positions rows (R,) in the block (B, L) ->
        (R, V)"""
        cfg, cache, T, L = self.cfg, self.cache, tokens.size(1), self.cfg.block_len
        if not self.lm.is_cached:
            n_before = max(0, T - cfg.seq_len)
            x, W = tokens[:, n_before:], T - n_before
            return self.lm.net(x, x, rows // L * W + W - L + rows % L).log_softmax(-1)
        device, done = tokens.device, cache.done
        noised = torch.arange(T - L, T, device=device)
        at = torch.cat((noised, torch.arange(done, T - L, device=device)))  # (N,)
        keys = torch.cat((torch.arange(cache.first, T - L, device=device), noised))  # (S,)
        cache.mask = None  # a noised block alone sees all there is
        if len(at) > L or cfg.doc_mask:
            # Clean queries see clean blocks up to their own, the noised one the blocks before it.
            i, j = at[:, None] // L, keys // L
            cache.mask = (j <= i) & (j > i - cfg.seq_len // L)
        if cfg.doc_mask:
            clean = (tokens == cfg.bos_id).cumsum(1)  # (B, T), documents of clean positions
            before = clean[:, [T - L - 1]] if T > L else torch.zeros_like(clean[:, :1])
            docs = torch.cat((clean[:, : T - L], before.expand(-1, L)), 1)
            same = docs[:, None, at, None] == docs[:, None, None, keys]  # (B, 1, N, S)
            cache.mask = cache.mask & same
        logits = self.lm.predict(tokens[:, at], at, rows=rows, n_query=L, attend=cache)
        return logits.log_softmax(-1)

    def read_prompt(self, tokens, n_known):
        """Take a prompt that is longer than the context into the cache, piece by piece -> passes"""
        L, T = self.cfg.block_len, self.cfg.seq_len
        ends = range(T, n_known // L * L, max(L, T - L)) if self.lm.is_cached else ()
        for end in ends:
            self(tokens[:, :end], None, torch.zeros(0, dtype=torch.int64, device=tokens.device))
        return len(ends)


class RowReader:
    """log p of masked tokens of the whole row, for masked diffusion."""

    def __init__(self, lm, T):
        self.lm = lm

    def __call__(self, tokens, is_mask, rows):
        sigma = -torch.log1p(-is_mask.sum(1).clamp(min=1) / (tokens.size(1) + 1))
        return self.lm.net(tokens, sigma, rows).log_softmax(-1)

    def read_prompt(self, tokens, n_known):
        return 0


@torch.no_grad()
def fill_blocks(lm, known, is_known, *, steps, gen, choose=None, warp=None, watch=None, stop=None):
    """Fill in the unknown positions, block after block. known (B, T) int64, is_known (B, T) bool.
    Masked diffusion is a block as long as the row.

    steps=N: ancestral sampling on N equal steps of t (arXiv 2406.07524, eq. 6 with SUBS), each
    masked token drawn with probability (t - s) / t. steps=None: first-hitting (arXiv 2409.02908),
    one uniformly random token a row and pass: as ancestral for N -> inf. Without a token to draw
    there is no forward pass. choose(log_probs (R, V) where masked, is_mask (B, L), step=, steps=,
    u=(B, L) uniform) -> is_mask after the pass replaces both; it may mask tokens again. stop=ID: a
    row ends where that token stands in a finished block, unless it is the first of the row or
    known; it is not counted in the length, and the row is filled up with it."""
    (B, T), mask_id, device = known.shape, lm.cfg.vocab_size, known.device
    L = lm.block_len or T
    gens = row_generators(gen, B)
    whole = -(-T // L) * L  # the last block is written to its end, and cut
    fixed = F.pad(is_known, (0, whole - T))  # (B, whole)
    tokens = F.pad(torch.where(is_known, known, mask_id), (0, whole - T), value=mask_id)
    order = torch.zeros_like(tokens)
    length = torch.full((B,), T, device=device)
    reader = (BlockReader if lm.block_len else RowReader)(lm, whole)
    nfe = reader.read_prompt(tokens, int(is_known.sum(1).min()))
    passes = L if steps is None else steps
    for start in range(0, whole, L):
        here = slice(start, start + L)
        if not (tokens[:, here] == mask_id).any():
            for g in gens:  # the later blocks' numbers do not depend on this one
                torch.rand(passes, 2, L, generator=g, dtype=torch.float64)
            continue
        for i in range(passes):
            u = [torch.rand(2, L, generator=g, dtype=torch.float64) for g in gens]
            pick, u = torch.stack(u).unbind(1)  # (B, L) each, CPU float64
            block = tokens[:, here]
            is_mask = block == mask_id
            if choose is not None:
                commit = torch.ones(B, L, dtype=torch.bool)  # chosen from below
            elif steps is None:
                first = pick.masked_fill(~is_mask.cpu(), -1).argmax(1, keepdim=True)
                commit = torch.zeros(B, L, dtype=torch.bool).scatter_(1, first, True)
            else:
                commit = pick * (steps - i) < 1
            commit = commit.to(device) & is_mask
            rows = commit.flatten().nonzero()[:, 0]
            log_probs = torch.zeros(0, mask_id, device=device)
            if len(rows):
                log_probs = reader(tokens[:, : start + L], is_mask, rows)  # (R, V)
                nfe += 1
            if choose is not None:
                new_mask = choose(log_probs, is_mask, step=i, steps=steps, u=pick)
                new_mask &= ~fixed[:, here] & (i < passes - 1)
                block = torch.where(new_mask, mask_id, block)
                commit = is_mask & ~new_mask
                at = commit.flatten()[rows]
                rows, log_probs = rows[at], log_probs[at]
            if len(rows):
                log_probs = log_probs if warp is None else warp(log_probs)
                drawn = draw_tokens(log_probs, u.flatten()[rows.cpu()])
                block = block.flatten().index_put((rows,), drawn).view(B, L)
                order[:, here] = torch.where(commit, nfe, order[:, here])
            tokens[:, here] = block
            if watch is not None and i < passes - 1:
                watch(tokens[:, :T].clone(), nfe)
        if stop is not None and lm.block_len:
            ends = (block == stop) & ~fixed[:, here]
            ends[:, 0] &= start > 0
            at = start + ends.int().argmax(1)
            behind = torch.arange(whole, device=device) >= at[:, None]  # (B, whole)
            behind &= ends.any(1, keepdim=True)
            tokens, fixed = torch.where(behind, stop, tokens), fixed | behind
            order = torch.where(behind & (order == 0), nfe, order)
            length = torch.where(ends.any(1), at.clamp(max=T), length)
        if watch is not None:
            watch(tokens[:, :T].clone(), nfe)
    return Filled(tokens[:, :T], length, nfe, order[:, :T])


@torch.no_grad()
def continue_rows(lm, known, is_known, *, gen, warp=None, watch=None, stop=None):
    """gpt: one token a row and pass, from left to right, keys and values cached. known (B, T),
    is_known (B, T) bool, first in its row. stop=ID: a row ends where that token is drawn, unless it
    is the first of the row; it is not counted in the length, and the row is filled up with it."""
    (B, T), start, device = known.shape, lm.cfg.vocab_size, known.device
    u = torch.stack([torch.rand(T, generator=g, dtype=torch.float64)
                     for g in row_generators(gen, B)])
    tokens = torch.where(is_known, known, start)
    order = torch.zeros_like(known)
    length = torch.full((B,), T, device=device)
    cache = Cache(lm.cfg.n_layer, 0, T, T)
    nfe = 0
    for i in range(T):
        free = ~is_known[:, i] & (length == T)  # (B,)
        if not free.any():
            continue
        x = F.pad(tokens[:, :i], (1, 0), value=start)  # (B, i + 1)
        n = i + 1 - cache.done  # positions that are new
        last = torch.arange(1, B + 1, device=device) * n - 1
        if lm.is_cached:
            positions = torch.arange(cache.done, i + 1, device=device)
            is_past = positions[:, None] >= torch.arange(i + 1, device=device)  # (N, S)
            cache.mask = is_past if n > 1 else None
            logits = lm.predict(x[:, cache.done :], positions, rows=last, attend=cache)
        else:
            logits = lm.net(x, last)
        log_probs = logits.log_softmax(-1)  # (B, V)
        nfe += 1
        log_probs = log_probs if warp is None else warp(log_probs)
        drawn = draw_tokens(log_probs, u[:, i])
        fixed = free[:, None] & (torch.arange(T, device=device) == i)  # (B, T)
        if stop is not None and i > 0:
            ends = free & (drawn == stop)
            length = torch.where(ends, i, length)
            fixed |= ends[:, None] & (torch.arange(T, device=device) > i)
        tokens = torch.where(fixed, drawn[:, None], tokens)
        order = torch.where(fixed, nfe, order)
        if watch is not None:
            watch(tokens, nfe)
    return Filled(tokens, length, nfe, order)


def uniform_law(log_score, current, sigma, sigma_next, rate, warp):
    """log_score (R, N) at tokens current (R,) and noise sigma -> log of what a pass draws from,
    (R, N) float64, up to a constant: Tweedie's step to sigma_next, or Euler's of the given rate."""
    score = log_score.double().exp()
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
def redraw_rows(lm, known, is_known, *, steps, gen, euler=False, warp=None, watch=None):
    """train_sedd: fill in the unknown positions. known (B, T) int64, is_known (B, T) bool.

    steps=N passes (None: T), on N equal steps of t. Each draws every position anew by Tweedie's
    law, the exact one of a position if it moved alone (arXiv 2310.16834, theorem 4.2); euler=True:
    by the rates at the step's start. The last pass denoises: all of the noise that is left goes in
    one step of Tweedie's. Under absorb a pass without a change needs no new forward pass.
    warp changes the log-probabilities (R, V) of tokens: under absorb of what a mask becomes, not
    when; under uniform of the clean token that the score implies, before the noise of that time."""
    cfg, model = lm.cfg, lm.net
    (B, T), V, device = known.shape, cfg.vocab_size, known.device
    where = "cpu" if device.type == "mps" else device  # MPS has no float64
    gens = row_generators(gen, B)
    passes, absorb = T if steps is None else steps, cfg.graph == "absorb"
    times = torch.arange(passes, 0, -1, dtype=torch.float64) / passes
    sigmas, slopes = lm.script.total_noise(times, cfg)
    sigmas = [*sigmas.tolist(), 0.0]
    start = torch.stack([torch.rand(T, generator=g, dtype=torch.float64) for g in gens])
    start = V if absorb else (start * V).long().to(device)
    tokens = torch.where(is_known, known, start)
    order = torch.zeros_like(known)
    nfe, changed = 0, True
    for i in range(passes):
        sigma, last = sigmas[i], i == passes - 1
        rate = slopes[i].item() / passes if euler and not last else None
        u = [torch.rand(2, T, generator=g, dtype=torch.float64) for g in gens]
        pick, u = torch.stack(u).unbind(1)  # (B, T) each, CPU float64
        free = tokens == V if absorb else ~is_known
        rows = free.flatten().nonzero()[:, 0]
        if not len(rows):
            break
        if absorb:
            if changed:
                at = -torch.log1p(-free.sum(1).clamp(min=1) / (T + 1))  # sigma of that many masks
                log_clean = model(tokens, at, rows)  # (R, V)
                log_clean = log_clean + torch.expm1(at).log()[rows // T, None]
                nfe += 1
            # Tweedie: expm1(sigma - sigma_next) s_y is the probability of token y.
            share = math.expm1(sigma - sigmas[i + 1]) if rate is None else rate
            leave = log_clean.logsumexp(-1).cpu().double().exp() * share / math.expm1(sigma)
            leave = (pick.flatten()[rows.cpu()] < leave) | last
            leave = leave.to(device)
            rows, log_law = rows[leave], log_clean[leave].log_softmax(-1)
            log_law = (log_law if warp is None else warp(log_law)).to(where)
        else:
            log_score = model(tokens, torch.full((B,), sigma, device=device), rows).to(where)
            nfe += 1
            current = tokens.flatten()[rows].to(where)
            log_law = uniform_law(log_score, current, sigma, sigmas[i + 1], rate, warp)
        drawn = draw_tokens(log_law, u.flatten()[rows.cpu()]).to(device)
        new = tokens.flatten().index_put((rows,), drawn).view(B, T)
        moved = (new != tokens) | (order == 0) & free & (not absorb)
        tokens, changed = new, bool(moved.any())
        order = torch.where(moved, nfe, order)
        if watch is not None:
            watch(tokens, nfe)
    return Filled(tokens, torch.full((B,), T, device=device), nfe, order)


# Orders: choose(log_probs (R,V), is_mask (B,T), step, steps, u (B,T)) -> what is masked after the
# pass, (B,T) bool. R = is_mask.sum(); log_probs are untempered, so temperature never moves a rank.

RANKS = {
    "random": lambda log_probs, u: u,
    "confidence": lambda log_probs, u: log_probs.amax(-1),
    "entropy": lambda log_probs, u: -torch.special.entr(log_probs.exp()).sum(-1),
    "margin": lambda log_probs, u: log_probs.exp().topk(2).values.diff().neg().squeeze(-1),
}
SCORE_ORDERS = ("tweedie", "euler")  # of train_sedd, the first one by default
ORDERS = ("first_hitting", "ancestral", *RANKS, *SCORE_ORDERS)


def ordered(name, threshold=None):
    """Fix the best-ranked tokens of each row, as many a pass as spreads the row over the passes
    that are left (one, when steps is None), and every token whose top probability is above
    threshold."""

    def choose(log_probs, is_mask, *, step, steps, u):
        device, is_mask = is_mask.device, is_mask.cpu()  # where float64 and small sorts are at home
        left = is_mask.sum(1, keepdim=True)  # (B, 1)
        quota = 1 if steps is None else -(-left // (steps - step))
        rank = torch.full(is_mask.shape, -math.inf, dtype=torch.float64)
        rank[is_mask] = RANKS[name](log_probs, u[is_mask]).cpu().double()
        place = rank.argsort(dim=1, descending=True, stable=True).argsort(1)
        commit = place < quota  # (B, T)
        if threshold is not None:
            commit[is_mask] |= (log_probs.amax(-1).exp() > threshold).cpu()
        return (is_mask & ~commit).to(device)

    return choose


# ReMDM's loop: up to alpha = LOOP_ALPHA by t = LOOP_ON, there until LOOP_OFF, then on to the end.
LOOP_ON, LOOP_OFF, LOOP_ALPHA = 0.55, 0.05, 0.9
REMASK_ETA = {"loop": 0.02, "cap": 0.02, "rescale": 0.02, "conf": 1.0}


class Remask:
    """Remasking diffusion (ReMDM, 2503.00307) as an order of its own.

    A fixed token is masked again with probability sigma <= sigma_max = min(1, (1-alpha_s)/alpha_t),
    a masked one is fixed with probability (alpha_s - (1-sigma) alpha_t) / (1-alpha_t): the share of
    fixed tokens follows alpha as without remasking. sigma is min(eta, sigma_max) for cap and loop,
    eta sigma_max for rescale; conf deals eta sigma_max out over the fixed tokens by
    softmax(-psi), psi the probability that a token had when it was drawn. All this once for a row,
    or for every block of it, from n_before blocks on.
    """

    def __init__(self, text, watch=None, n_before=0):
        self.kind, _, eta = text.partition(":")
        self.eta = float(eta) if eta else REMASK_ETA[self.kind]
        self.watch = watch
        self.block = n_before - 1
        self.psi = None  # (B, T) of a block, infinite where a token is masked or given
        self.drawn = None  # what the last pass fixed, and the distributions it was drawn from

    def alpha(self, t):
        if self.kind != "loop":
            return 1 - t
        if t > LOOP_ON:
            return LOOP_ALPHA * (1 - t) / (1 - LOOP_ON)
        return LOOP_ALPHA if t > LOOP_OFF else 1 - (1 - LOOP_ALPHA) * t / LOOP_OFF

    def choose(self, log_probs, is_mask, *, step, steps, u):
        device, is_mask = is_mask.device, is_mask.cpu()
        if step == 0:
            self.block, self.psi = self.block + 1, None
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        sigma_max = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        if self.kind == "conf":
            if self.psi is None:
                self.psi = torch.full(u.shape, math.inf, dtype=u.dtype)
            # A row with nothing to mask again has an empty softmax.
            sigma = self.eta * sigma_max * (-self.psi).softmax(1).nan_to_num(0.0)
        elif self.kind == "rescale":
            sigma = self.eta * sigma_max
        else:
            looping = self.kind == "cap" or LOOP_OFF < t <= LOOP_ON
            sigma = min(self.eta, sigma_max) if looping else 0.0
        fix = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) if alpha_t < 1 else 1.0
        after = torch.where(is_mask, u >= fix, u < sigma)
        if self.kind == "conf":
            self.drawn = is_mask & ~after, is_mask, log_probs
            self.psi[after] = math.inf
        return after.to(device)

    def see(self, tokens, nfe):
        """Note the probabilities of the tokens that the last pass drew; pass them on to watch."""
        if self.drawn is not None:
            fixed, was_mask, log_probs = self.drawn
            width = fixed.shape[1]
            here = tokens.cpu()[:, self.block * width :][:, :width]
            fixed[:, here.shape[1] :] = False  # what is cut from the last block
            here = F.pad(here, (0, width - here.shape[1]))
            picked = log_probs.cpu()[fixed[was_mask]].gather(1, here[fixed][:, None])
            self.psi[fixed] = picked.squeeze(1).double().exp()
        if self.watch is not None:
            self.watch(tokens, nfe)


def make_warp(temperature=1.0, top_k=None, top_p=None):
    """log_probs (R,V) -> log_probs (R,V): temperature, then top-k, then nucleus; None when all are
    off. The nucleus keeps the token that crosses top_p."""
    if temperature == 1 and top_k is None and top_p is None:
        return None

    def warp(log_probs):
        if temperature == 0:
            likeliest = log_probs.argmax(-1, keepdim=True)
            return torch.full_like(log_probs, -math.inf).scatter(-1, likeliest, 0.0)
        # From the largest one, which then stays finite however low the temperature is.
        heat = min(max(temperature, 1e-30), 1e30)  # float32 knows no 1e-320
        log_probs = ((log_probs - log_probs.amax(-1, True)) / heat).log_softmax(-1)
        if top_k is None and top_p is None:
            return log_probs
        ranked, index = log_probs.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[..., top_k:] = -math.inf
            ranked = ranked.log_softmax(-1)
        if top_p is not None:
            cut = ranked.exp().cumsum(-1) - ranked.exp() >= top_p
            cut[..., 0] = False  # nor 1e-320
            ranked = ranked.masked_fill(cut, -math.inf)
        return torch.empty_like(log_probs).scatter(-1, index, ranked).log_softmax(-1)

    return warp


def check(ok, name, value, remedy):
    if not ok:  # NaN fails every comparison and lands here
        raise SampleError(f"--{name}={value}: {remedy}")


def check_counts(n, seed):
    check(n >= 1, "n", n, "at least 1")
    check(0 <= seed < 2**62, "seed", seed, "from 0 to 2**62 - 1")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How tokens are fixed; the flags of the same names."""

    order: str | None = None  # one of ORDERS; None chooses by the other fields
    steps: int | None = None  # passes; None: one a token
    threshold: float | None = None  # also fix what is more probable than this
    temperature: float = 1.0  # of the token distribution; 0 takes the likeliest
    top_k: int | None = None  # tokens to draw from
    top_p: float | None = None  # probability mass to draw from
    remask: str | None = None  # NAME or NAME:ETA, a name of REMASK_ETA
    refine: float = 0.0  # fraction of the tokens predicted anew at the end

    def __post_init__(self):
        order, steps, threshold, remask = self.order, self.steps, self.threshold, self.remask
        check(order is None or order in ORDERS, "order", order, near_miss(str(order), ORDERS))
        check(steps is None or steps >= 1, "steps", steps, "at least 1")
        check(steps is None or steps <= MAX_STEPS, "steps", steps, f"at most {MAX_STEPS}")
        check(threshold is None or 0 <= threshold <= 1, "threshold", threshold, "from 0 to 1")
        check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        check(0 <= self.refine <= 1, "refine", self.refine, "from 0 to 1")
        one_a_pass = order == "first_hitting" and steps is not None
        check(not one_a_pass, "steps", steps, "first_hitting fixes one token a pass: drop --steps")
        ranked = threshold is None or order is None or order in RANKS
        check(ranked, "threshold", threshold, "goes with --order=" + "|".join(RANKS))
        if remask is not None:
            kind, _, eta = remask.partition(":")
            check(kind in REMASK_ETA, "remask", remask, near_miss(kind, list(REMASK_ETA)))
            try:
                good = not eta or 0 < float(eta) <= 1
            except ValueError:
                good = False
            check(good, "remask", remask, f"ETA is above 0, up to 1, as in {kind}:0.02")
            alone = threshold is None and order in (None, "ancestral")
            check(alone, "remask", remask, "has its own order: drop --order and --threshold")

    @property
    def name(self):
        """The order in use."""
        if self.order is not None:
            return self.order
        if self.threshold is not None:
            return "confidence"
        return "ancestral" if self.remask or self.steps else "first_hitting"

    def describe(self):
        """The order in words, with what its samples are not."""
        words = self.name
        if self.remask:
            words = f"remask {self.remask}"
        if self.threshold is not None:
            words += f" threshold {self.threshold:g}"
        if self.name in RANKS and (self.name != "random" or self.threshold is not None):
            words += " (mode-seeking)"
        return words + (f", refine {self.refine:g}" if self.refine else "")


PASSES = ("order", "steps", "threshold", "remask", "refine")  # fields of diffusion alone


# The model


class Samples(NamedTuple):
    tokens: list  # of n lists of ints, each as long as its sample
    nfe: int  # forward passes of the network
    seconds: float


class Score(NamedTuple):
    """A bound on -log p of a text, with the standard error over independent noise draws; or the
    exact value, whose error is 0."""

    nats: float
    nats_stderr: float
    bits_per_byte: float
    bits_stderr: float
    n_tokens: int
    n_bytes: int


class LM:
    """A trained model with its tokenizer. Made by load()."""

    def __init__(self, script, ckpt, path, weights, device, dtype):
        self.script = script
        # Only what writes from left to right knows the likelihood itself.
        self.is_ar = script.METRIC == "val_nll"
        self.name, self.step = ckpt["script"], ckpt["step"]
        with strangers(path):
            self.model, self.cfg = script.build_model(ckpt, weights)
            if self.cfg.seq_len > MAX_LENGTH:
                raise SampleError(f"its seq_len {self.cfg.seq_len} is above {MAX_LENGTH}")
            self.tokenizer = Tokenizer(ckpt["meta"], self.cfg.vocab_size)
        self.block_len = getattr(self.cfg, "block_len", None)  # of what writes block after block
        self.graph = getattr(self.cfg, "graph", None)  # of what draws by its score
        self.stops = True  # at the end of a document, where the script can
        with strangers(f"--device={device}"):
            self.device = script.pick_device(device, 0)
        wanted = self.cfg.dtype if dtype == "auto" and self.device.type == "cuda" else dtype
        self.dtype = script.pick_dtype("fp32" if wanted == "auto" else wanted, self.device)
        self.model.to(self.device)
        # A fork with a network of its own computes earlier tokens anew.
        self.is_cached = hasattr(self.model, "predict")
        self.where = f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"
        averaged = weights == "ema" and ckpt.get("ema")
        n = sum(p.numel() for p in self.model.parameters())
        self.summary = one_line(
            f"{path}: {self.name}, {n / 1e6:.2f}M parameters,"
            f" {'ema' if averaged else 'raw'} weights of step {self.step},"
            f" {self.tokenizer.name} tokens, context {self.cfg.seq_len}"
        )

    def net(self, *args, **kwargs):
        lower = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=lower):
            return self.model(*args, **kwargs)

    def predict(self, *args, **kwargs):
        lower = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=lower):
            return self.model.predict(*args, **kwargs)

    def batch_rows(self, length):
        """How many rows of that many tokens to run at once."""
        numbers = length * max(self.cfg.vocab_size, self.cfg.n_head * length)
        return max(1, BATCH_NUMBERS // numbers)

    def unable(self, flag):
        how = "from left to right, one token a pass" if self.is_ar else "one block after another"
        how = "all tokens in every pass, by its score" if self.graph else how
        return SampleError(
            f"--{flag}: {self.name} writes {how}: drop the flag or take a checkpoint of train_mdlm"
        )

    def check_able(self, sampler):
        """Refuse what a model that writes from left to right, by blocks or by its score cannot do.
        -> the sampler, of a score with its order."""
        refused = PASSES if self.is_ar else ("refine",) if self.block_len else ()
        refused = ("threshold", "remask", "refine") if self.graph else refused
        for name in refused:
            if getattr(sampler, name) != getattr(Sampler, name):
                raise self.unable(name)
        if not self.graph:
            other = f"{self.name} has no score: that is for a checkpoint of train_sedd"
            check(sampler.order not in SCORE_ORDERS, "order", sampler.order, other)
            return sampler
        if sampler.order not in (None, *SCORE_ORDERS):
            raise self.unable(f"order={sampler.order}")
        return dataclasses.replace(sampler, order=sampler.order or SCORE_ORDERS[0])

    def passes(self, sampler, length):
        """How many a batch will take, where no mask shows how far it is; else None."""
        return (sampler.steps or length) if self.graph == "uniform" else None

    def describe(self, sampler):
        """How it writes, in words."""
        blocks = f" in blocks of {self.block_len}" if self.block_len else ""
        return "left to right" if self.is_ar else sampler.describe() + blocks

    def canvas_for_prompt(self, prompt, length=None):
        """(known (T,), is_known (T,)) of a prompt and what is to follow it."""
        tokens = self.tokenizer.encode(prompt)
        limit = MAX_LENGTH if self.block_len else self.cfg.seq_len
        if len(tokens) >= limit:
            raise SampleError(
                f"--prompt: {len(tokens)} tokens fill the model's context of {limit}: shorten it"
            )
        if length is None:
            length = min(limit, len(tokens) + DEFAULT_LENGTH)
        check(length >= 1, "length", length, "at least 1")
        context = "" if self.block_len else " (its seq_len)"
        check(length <= limit, "length", length, f"{self.name} goes up to {limit}{context}")
        room = f"the prompt alone has {len(tokens)} tokens: raise it or shorten the prompt"
        check(length > len(tokens), "length", length, room)
        return self.canvas([tokens, length - len(tokens)])

    def canvas_for_infill(self, text, blank=DEFAULT_BLANK, length=None):
        """(known (T,), is_known (T,)) of a text with blanks of `blank` tokens, an int or a list."""
        if self.is_ar or self.block_len:
            raise self.unable("infill")
        parts = [self.tokenizer.encode(part) for part in BLANK.split(text)]
        n_blanks = len(parts) - 1
        if n_blanks == 0:
            raise SampleError("--infill: no blank in the text: write ___ where one should be")
        blanks = [blank] * n_blanks if isinstance(blank, int) else list(blank)
        shown = ",".join(str(n) for n in blanks)
        check(all(n >= 1 for n in blanks), "blank", shown, "at least 1 token each")
        check(len(blanks) == n_blanks, "blank", shown, f"the text has {n_blanks} blanks")
        total = sum(map(len, parts)) + sum(blanks)
        limit = self.cfg.seq_len
        if total > limit:
            raise SampleError(
                f"--infill: {total} tokens with its blanks, the model's context is {limit}:"
                " shorten the text or lower --blank"
            )
        length = total if length is None else length
        check(length >= total, "length", length, f"the infill alone has {total} tokens")
        check(length <= limit, "length", length, f"this model goes up to {limit} (its seq_len)")
        filled = itertools.chain.from_iterable(zip(parts, blanks, strict=False))
        return self.canvas([*filled, parts[-1], length - total])

    def canvas(self, pieces):
        """Lists of tokens stand as they are, an int is that many tokens to predict."""
        known, is_known = [], []
        for piece in pieces:
            tokens = [0] * piece if isinstance(piece, int) else piece
            known += tokens
            is_known += [tokens is piece] * len(tokens)
        return torch.tensor(known), torch.tensor(is_known)

    @torch.inference_mode()
    def batches(self, known, is_known, sampler, *, n, seed, watch=None):
        """Fill the canvas n times; yield Samples of as many rows as fit in a batch.

        Sample i depends on (seed, i) alone. watch(tokens (B,T), nfe) sees every pass.
        """
        rows = min(MAX_ROWS, self.batch_rows(min(len(known), self.cfg.seq_len)))
        if self.block_len:  # which draws the noise of all passes of a block at once
            numbers = 2 * (sampler.steps or self.block_len) * self.block_len
            many = f"at most {BATCH_NUMBERS // (2 * self.block_len)} in a block of {self.block_len}"
            check(not sampler.steps or numbers <= BATCH_NUMBERS, "steps", sampler.steps, many)
            rows = max(1, min(rows, BATCH_NUMBERS // numbers))
        # The refining pass has a stream of its own: both hand out one seed a row.
        gens = [torch.Generator().manual_seed(s) for s in (seed, seed ^ 2**62)]
        for first in range(0, n, rows):
            start = time.perf_counter()
            size = (min(rows, n - first), len(known))
            x = known.to(self.device).expand(size)
            given = is_known.to(self.device).expand(size)
            out = self.fill(x, given, sampler, gens[0], watch)
            nfe = out.nfe
            if sampler.refine > 0:
                keep, scoring = self.likeliest(out.tokens, given, sampler.refine)
                nfe += scoring
                seen = nfe

                def watch_on(tokens, more, seen=seen):
                    watch(tokens, seen + more)

                out = self.fill(out.tokens, keep, sampler, gens[1], watch and watch_on)
                nfe += out.nfe
            tokens = [
                row[:stop]
                for row, stop in zip(out.tokens.tolist(), out.length.tolist(), strict=True)
            ]
            yield Samples(tokens, nfe, time.perf_counter() - start)

    def fill(self, known, is_known, sampler, gen, watch):
        """One run of the script's generate over (B, T)."""
        steps = sampler.steps
        warp = make_warp(sampler.temperature, sampler.top_k, sampler.top_p)
        stop = self.tokenizer.bos_id if self.stops else None
        if self.is_ar:
            return continue_rows(
                self, known, is_known, gen=gen, warp=warp, watch=watch, stop=stop
            )
        if self.graph:
            euler = sampler.order == "euler"
            return redraw_rows(
                self, known, is_known, steps=steps, gen=gen, euler=euler, warp=warp, watch=watch
            )
        choose, n_before = None, 0
        most = len(known[0])  # tokens to fix from step 0 on
        if self.block_len:
            most = self.block_len
            n_before = int(is_known.sum(1).min()) // self.block_len
        if sampler.name == "ancestral" and steps is None:
            steps = max(1, min(most, int((~is_known).sum(1).max())))
        if sampler.name in RANKS:
            choose = ordered(sampler.name, sampler.threshold)
        elif sampler.remask:
            remask = Remask(sampler.remask, watch, n_before)
            choose, watch = remask.choose, remask.see
        return fill_blocks(
            self, known, is_known,
            steps=steps, gen=gen, choose=choose, warp=warp, watch=watch, stop=stop,
        )

    def likeliest(self, tokens, is_known, refine):
        """What to keep (B, T) when the fraction `refine` is predicted anew, and the passes spent.

        Two passes score every token: every second one is masked, then the others, so that each is
        judged with its neighbours in sight.
        """
        free = ~is_known
        odd = free.cumsum(1) % 2 == 1
        score = torch.full(tokens.shape, math.inf, dtype=torch.float32, device=tokens.device)
        nfe = 0
        for half in (free & odd, free & ~odd):
            seen = []

            def note(log_probs, is_mask, seen=seen, **_):
                seen.append(log_probs)
                return torch.zeros_like(is_mask)

            gen = torch.Generator().manual_seed(0)  # its draws are thrown away
            nfe += fill_blocks(self, tokens, ~half, steps=1, gen=gen, choose=note).nfe
            score[half] = seen[0].gather(1, tokens[half][:, None]).squeeze(1)
        n_again = (free.sum(1, keepdim=True) * refine).round().clamp(min=1)  # (B, 1)
        place = score.argsort(dim=1, stable=True).argsort(1)
        return is_known | (place >= n_again), nfe

    def generate(self, n=1, length=None, prompt="", seed=0, **how):
        """n texts of `length` tokens that begin with the prompt; `how`: the fields of Sampler."""
        return self.texts(*self.canvas_for_prompt(prompt, length), n, seed, how)

    def infill(self, text, blank=DEFAULT_BLANK, n=1, length=None, seed=0, **how):
        """n versions of a text whose blanks (___) are filled with `blank` tokens each."""
        return self.texts(*self.canvas_for_infill(text, blank, length), n, seed, how)

    def texts(self, known, is_known, n, seed, how):
        check_counts(n, seed)
        sampler = self.check_able(Sampler(**how))
        batches = self.batches(known, is_known, sampler, n=n, seed=seed)
        return [self.tokenizer.decode(row) for batch in batches for row in batch.tokens]

    @torch.inference_mode()
    def score(self, text, draws=None, seed=0, watch=None):
        """Score of a text, cut into windows of seq_len tokens (the last may be shorter).

        A draw masks every window twice, as an antithetic pair; the draws (default DEFAULT_DRAWS)
        are independent. Where nothing is masked, one pass is exact. watch(share) sees how much is
        done.
        """
        if self.is_ar:
            check(draws is None, "draws", draws, f"{self.name} scores without noise: drop it")
            draws, twice = 1, 1
        else:
            draws, twice = DEFAULT_DRAWS if draws is None else draws, 2
            check(draws >= 2, "draws", draws, "at least 2, for a standard error")
            check(draws <= MAX_STEPS, "draws", draws, f"at most {MAX_STEPS}")
        check_counts(1, seed)
        if len(text) > SCORE_BYTES:
            raise SampleError(f"--score: a text of over {SCORE_BYTES} bytes: score it in parts")
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise SampleError("--score: the text is empty")
        gen = torch.Generator().manual_seed(seed)
        whole = len(tokens) // self.cfg.seq_len * self.cfg.seq_len
        totals = torch.zeros(draws, dtype=torch.float64)
        done = 0  # tokens times passes
        for part in (tokens[:whole], tokens[whole:]):
            if not part:
                continue
            cfg = dataclasses.replace(self.cfg, seq_len=min(len(part), self.cfg.seq_len))
            x0 = torch.tensor(part).view(-1, cfg.seq_len).repeat_interleave(twice, 0)
            rows = self.batch_rows(cfg.seq_len)
            for draw in range(draws):
                noise = self.script.draw_noise(cfg, len(x0), gen, bound=True)
                for a in range(0, len(x0), rows):
                    piece = type(noise)(*(v[a : a + rows].to(self.device) for v in noise))
                    batch = x0[a : a + rows].to(self.device)
                    nats = self.script.nelbo_fn(self.net, batch, piece, cfg)
                    totals[draw] += nats.double().sum().cpu() / twice
                    done += batch.numel()
                    if watch is not None:
                        watch(done / (twice * draws * len(tokens)))
        nats = totals.mean().item()
        stderr = totals.std().item() / math.sqrt(draws) if draws > 1 else 0.0
        n_bytes = self.tokenizer.n_bytes(tokens)
        bits = 1 / (math.log(2) * n_bytes)
        return Score(nats, stderr, nats * bits, stderr * bits, len(tokens), n_bytes)


# Loading


@contextlib.contextmanager
def strangers(path):
    """Whatever goes wrong inside is the fault of a checkpoint: it may hold anything."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except SampleError as error:
        named = str(error).startswith(f"{path}:")
        raise SampleError(error if named else f"{path}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SampleError(f"{path}: cannot be used ({reason})") from None


def newest_checkpoint():
    times = {}
    for path in Path("out").glob("*/ckpt.pt"):
        with contextlib.suppress(OSError):  # a run folder may go at any time
            times[path] = path.stat().st_mtime
    if not times:
        raise SampleError(
            "out/*/ckpt.pt: no checkpoint here: pass --ckpt=PATH, or train one:"
            " python train_mdlm.py --preset=tiny"
        )
    return max(times, key=times.get)


def find_checkpoint(name):
    """The file behind PATH, a run folder, or hf:OWNER/REPO/FILE, which is downloaded once."""
    name = str(name)
    if "\0" in name:
        raise SampleError(f"{name}: no path has a NUL byte")
    if not name.startswith("hf:"):
        return Path(name, "ckpt.pt") if os.path.isdir(name) else Path(name)
    parts = name[3:].split("/")
    plain = all(re.fullmatch(r"\w[\w.-]*", part, re.A) and ".." not in part for part in parts)
    if len(parts) < 3 or not plain:
        raise SampleError(f"{name}: write hf:OWNER/REPO/FILE")
    try:
        import huggingface_hub as hub
        import huggingface_hub.utils  # not loaded with the rest
    except ImportError:
        raise SampleError(f"{name} needs: pip install huggingface_hub") from None
    hub.utils.logging.set_verbosity_error()  # it would report every retry
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file))  # once: a download tries many times
        return Path(hub.hf_hub_download(repo, file))
    except Exception as error:  # its errors share no base class across versions
        cached = hub.try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
        reason = str(error).strip().partition("\n")[0]
        raise SampleError(f"{name}: could not be downloaded: {reason}") from None


def load_script(path):
    """Import a training script from its file."""
    if not os.path.isfile(path):
        raise SampleError(f"--script={path}: no such file")
    spec = importlib.util.spec_from_file_location(f"sampled_{path.stem}", path)
    if spec is None:
        raise SampleError(f"--script={path}: not a Python file")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    sys.path[:0] = [str(path.resolve().parent), str(HERE)]  # it imports muon
    try:
        spec.loader.exec_module(script)
    except (Exception, SystemExit) as error:
        raise SampleError(f"--script={path}: {type(error).__name__}: {error}") from error
    finally:
        del sys.path[:2]
    for name in NEEDED:
        if not hasattr(script, name):
            raise SampleError(f"--script={path}: not a training script: it has no {name}")
    return script


@functools.cache
def own_script(name):
    return load_script(HERE / f"{name}.py")


def load(path=None, script=None, weights="ema", device="auto", dtype="auto"):
    """LM from a checkpoint: PATH, its folder or hf:OWNER/REPO/FILE; None: the newest in out/.

    script: file of the training script, when it is not one beside this file. The others: as the
    flags of these names.
    """
    check(weights in ("ema", "raw"), "weights", weights, "ema or raw")
    check(dtype in DTYPES, "dtype", dtype, near_miss(str(dtype), DTYPES))
    path = newest_checkpoint() if path is None else find_checkpoint(path)
    module = own_script(SCRIPTS[0]) if script is None else load_script(Path(script))
    with strangers(path):
        ckpt = module.load_checkpoint(path)  # the same text in every script
    name = ckpt["script"]
    if script is None and name not in SCRIPTS:
        raise SampleError(f"{path}: written by {name!r}: pass that file as --script=PATH")
    if name in SCRIPTS and Path(script or name).stem in {*SCRIPTS} - {name}:
        raise SampleError(f"--script={script}: {path} was written by {name}.py: drop --script")
    if script is None and name != SCRIPTS[0]:
        module = own_script(name)
    return LM(module, ckpt, path, weights, device, dtype)


# The terminal

FRAME = 0.04  # seconds between two pictures
MILESTONES = (0.25, 0.5, 0.75)
STYLES = {"known": "\x1b[1m", "new": "\x1b[32m", "mask": "\x1b[2m", "note": "\x1b[2m"}


def is_terminal(stream):
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def styled(text, kind):
    return f"{STYLES[kind]}{text}\x1b[0m" if kind in STYLES else text


def printable(text):
    """Text that cannot steer a terminal: a model of bytes writes escape codes, too."""
    text = text.replace("\t", "    ").replace("\r\n", "\n")
    return "".join(c if c == "\n" or not is_control(c) else escape(c) for c in text)


def is_control(char):
    return unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"


def escape(char):
    return char.encode("unicode_escape").decode()


def one_line(text):
    """For a message: a flag, a path or a checkpoint may hold anything."""
    text = printable(text).replace("\n", "\\n")
    return text if len(text) <= LINE else f"{text[:LINE]} .."


def for_stdout(text):
    """Text as stdout gets it."""
    return printable(text) if sys.stdout.isatty() else text


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


def wipe(height):
    """Codes that wipe a picture of so many lines and leave the cursor where it began."""
    up = f"\x1b[{height - 1}A" if height > 1 else ""
    return f"\r{up}\x1b[J" if height else ""


class Watch:
    """Looks on while a batch is filled: redraws it in place on a terminal, or else prints its first
    sample at a few milestones. Without `text`, only a line of progress on stderr."""

    def __init__(self, tokenizer, is_known, text):
        self.tokenizer = tokenizer
        self.is_known = is_known.tolist()
        self.text = text
        self.passes = None  # of a batch, where no mask shows how far it is
        self.live = is_terminal(sys.stdout if text else sys.stderr)
        self.title = ""
        self.height = 0  # lines of the picture that is on the terminal
        self.drawn = -math.inf
        self.begin()

    def begin(self):
        """A new batch."""
        self.last = None
        self.due = list(MILESTONES)

    def __call__(self, tokens, nfe):
        n_free = len(tokens) * self.is_known.count(False)
        done = 1 - self.n_left(tokens, nfe) / max(1, n_free)
        if self.live and (time.monotonic() - self.drawn >= FRAME or (done == 1 and self.text)):
            self.draw(tokens.tolist(), nfe, done)
        elif not self.live and self.text and self.due and self.due[0] <= done < 1:
            self.due = [share for share in self.due if share > done]
            row = tokens[0].tolist()
            row = row[: self.shown(row)]
            text = for_stdout(self.tokenizer.decode(row))
            print(f"[{done:.0%} after {nfe} passes] {text}", flush=True)

    def n_left(self, tokens, nfe):
        """How many tokens of a batch are still to come."""
        if self.passes:
            return round(len(tokens) * self.is_known.count(False) * (1 - nfe / self.passes))
        return int((tokens == self.tokenizer.mask_id).sum())

    def draw(self, tokens, nfe, done):
        size = shutil.get_terminal_size()
        lines = [styled(f"{self.title}{done:4.0%}, {nfe} passes", "note")]
        if self.text:
            for i, (row, before) in enumerate(zip(tokens, self.last or tokens, strict=True)):
                lines += [styled("---", "note")] if i else []
                n, kinds = self.shown(row), list(self.kinds(row, before))
                lines += lines_of(self.tokenizer.spans(row[:n], kinds[:n]), size.columns)
        del lines[max(1, size.lines - 1) :]  # what has scrolled away cannot be drawn over
        stream = sys.stdout if self.text else sys.stderr
        stream.write(wipe(self.height) + "\n".join(lines))
        stream.flush()
        self.height = len(lines)
        self.last = tokens
        self.drawn = time.monotonic()

    def shown(self, row):
        """How much of a row to show: what has come to its end is filled with bos_id."""
        n = len(row)
        while n and row[n - 1] == self.tokenizer.bos_id:
            n -= 1
        return n

    def kinds(self, row, before):
        for token, old, known in zip(row, before, self.is_known, strict=True):
            if token == self.tokenizer.mask_id:
                yield "mask"
            else:
                yield "known" if known else "new" if token != old else None

    def erase(self):
        stream = sys.stdout if self.text else sys.stderr
        stream.write(wipe(self.height))
        stream.flush()
        self.height = 0


# A race

WARM_UP = 8  # tokens that a model writes before its clock starts
MIN_COLUMN = 24  # cells, of a text beside another
BAR = " │ "  # between the two


class Frame(NamedTuple):
    seconds: float  # on the model's own clock
    nfe: int
    n_written: int  # tokens, of all samples
    row: torch.Tensor  # (T,) int32, the first sample


class Racer(Watch):
    """One model of a race. It keeps pictures of its run; its clock stands still while it does."""

    def __init__(self, lm, opts, length):
        self.known, self.given = lm.canvas_for_prompt(opts.prompt or "", length)
        super().__init__(lm.tokenizer, self.given, text=False)
        self.lm, self.title, lm.stops = lm, f"{lm.name}: ", False
        self.how = dataclasses.replace(opts, **{k: getattr(Sampler, k) for k in PASSES if lm.is_ar})
        self.how = lm.check_able(self.how)
        self.passes = lm.passes(self.how, length)
        self.n_new = self.is_known.count(False)  # tokens a sample
        self.n_rows = self.nfe = 0  # samples and passes of the batches before
        self.first, self.bits = None, 0.0  # tokens of the first sample, entropy of all
        row = torch.where(self.given, self.known, lm.tokenizer.mask_id)
        self.frames = [Frame(0.0, 0, 0, row.int())]

    def run(self):
        how = {"sampler": self.how, "n": self.how.n, "seed": self.how.seed}
        T = len(self.known)
        warm = self.given | (torch.arange(T) < T - WARM_UP)
        for _ in self.lm.batches(self.known, warm, **how):
            pass
        self.seconds, self.since = 0.0, time.perf_counter()
        for batch in self.lm.batches(self.known, self.given, **how, watch=self):
            self.first = self.first or batch.tokens[0]
            self.bits += sum(entropy_bits(row[-self.n_new :]) for row in batch.tokens)
            self.n_rows += len(batch.tokens)
            self.nfe += batch.nfe
            self.since = time.perf_counter()
        self.erase()

    def __call__(self, tokens, nfe):
        n_left = self.n_left(tokens, nfe)  # waits for the device
        self.seconds += time.perf_counter() - self.since
        row = self.frames[-1].row if self.n_rows else tokens[0].int().cpu()
        n_written = (self.n_rows + len(tokens)) * self.n_new - n_left
        if len(self.frames) > 1 and self.seconds - self.frames[-2].seconds < FRAME:
            del self.frames[-1]  # too soon behind the one before it to be seen
        self.frames.append(Frame(self.seconds, self.nfe + nfe, n_written, row))
        super().__call__(tokens, nfe)
        self.since = time.perf_counter()

    def column(self, now, width):
        """Lines that show how far it was at a time: counters, and the first sample."""
        i = bisect.bisect(self.frames, now, key=lambda frame: frame.seconds) - 1
        frame, before, last = self.frames[i], self.frames[max(0, i - 1)], self.frames[-1]
        seconds = min(now, last.seconds)
        rate = frame.n_written / max(seconds, FRAME)
        share = frame.n_written / last.n_written
        counters = f"{frame.nfe} passes, {share:.0%}\n{seconds:.1f} s, {rate:.0f} tokens/s\n\n"
        row = frame.row.tolist()
        kinds = list(self.kinds(row, row if frame is last else before.row.tolist()))
        spans = [(f"{self.lm.name}\n", "known"), (counters, "note")]
        return lines_of(spans + self.tokenizer.spans(row, kinds), width)


def replay(racers):
    """Draw the runs side by side in real time; the last picture stays, and is whole."""
    start, now, height = time.monotonic(), 0.0, 0
    end = max(racer.frames[-1].seconds for racer in racers)
    while now < end:
        now = min(end, time.monotonic() - start)
        size = shutil.get_terminal_size()
        step = (size.columns + len(BAR)) // len(racers)
        columns = [racer.column(now, step - len(BAR)) for racer in racers]
        bars = ["", *(f"\x1b[{i * step - len(BAR) + 1}G{BAR}" for i in range(1, len(racers)))]
        lines = [
            "".join(map("".join, zip(bars, cells, strict=True)))
            for cells in itertools.zip_longest(*columns, fillvalue="")
        ]
        if now < end:
            del lines[max(1, size.lines - 1) :]  # what has scrolled away cannot be drawn over
        print(wipe(height) + "\n".join(lines), end="", flush=True)
        height = len(lines)
        time.sleep(FRAME)
    print("\n")


def load_racers(opts):
    """The models of --ckpt and --race; what would make a race of unlike things is refused."""
    paths = [newest_checkpoint() if opts.ckpt is None else opts.ckpt, *opts.race.split(",")]
    check(all(paths), "race", opts.race, "a checkpoint, or several with commas between")
    files = [os.path.realpath(find_checkpoint(path)) for path in paths]
    twice = "the same checkpoint twice, as --ckpt is the newest unless it is given: name another"
    check(len({*files}) == len(files), "race", opts.race, twice)
    scripts = [opts.script, *[None] * (len(paths) - 1)]
    how = opts.weights, opts.device, opts.dtype
    lms = [load(path, script, *how) for path, script in zip(paths, scripts, strict=True)]
    first = lms[0]
    for path, lm in zip(paths, lms, strict=True):
        a, b = first.tokenizer, lm.tokenizer
        words = itertools.zip_longest(a.table, b.table, fillvalue=b"")
        same = a.bos_id == b.bos_id and all(x == y for x, y in words)
        check(same, "race", opts.race, f"the tokens of {path} are not those of {paths[0]}")
        unlike = f"{path} runs in {lm.where}, {paths[0]} in {first.where}: give fp32 or bf16"
        check(lm.where == first.where, "dtype", opts.dtype, unlike)
    if all(lm.is_ar for lm in lms):
        first.check_able(opts)
    return lms


def print_race(lms, opts):
    length = min(len(lm.canvas_for_prompt(opts.prompt or "", opts.length)[0]) for lm in lms)
    racers = [Racer(lm, opts, length) for lm in lms]
    room = (shutil.get_terminal_size().columns + len(BAR)) // len(lms) - len(BAR)
    live = is_terminal(sys.stdout) and room >= MIN_COLUMN
    for lm in lms:
        print(lm.summary)
    samples = f"{opts.n} samples (the first is shown) of " if opts.n > 1 else ""
    shown = ", shown side by side in real time" if live else ""
    print(f"{samples}{length} tokens, {lms[0].where}, one model after another{shown}\n", flush=True)
    for racer in racers:
        racer.run()
    if live:
        replay(racers)
    else:
        for racer in racers:
            text = for_stdout(racer.tokenizer.decode(racer.first))
            print(f"--- {racer.lm.name}\n{text}\n")
    width = max(len(lm.name) for lm in lms)
    print(f"{'':{width}}  passes  seconds  tokens/s  entropy")
    for racer in racers:
        (seconds, nfe, n, _), lm = racer.frames[-1], racer.lm
        entropy = racer.bits / opts.n
        print(
            f"{lm.name:{width}}  {nfe:6}  {seconds:7.2f}  {n / seconds:8.0f}"
            f"  {entropy:.2f} bits, {lm.describe(racer.how)}"
        )


# Command line


@dataclasses.dataclass(frozen=True)
class Options(Sampler):
    """The flags; see the text at the top."""

    ckpt: str | None = None  # path, run folder or hf:OWNER/REPO/FILE; None: the newest
    script: str | None = None  # an edited training script
    weights: str = "ema"  # ema or raw
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of DTYPES
    prompt: str | None = None  # text to continue
    infill: str | None = None  # text with blanks
    blank: str | None = None  # tokens a blank, comma separated
    n: int = 1  # samples
    length: int | None = None  # tokens a sample
    seed: int = 0  # of the samples, or of the noise of a score
    watch: bool = False  # show the text appearing
    race: str | None = None  # checkpoints to race against, comma separated
    score: str | None = None  # text or file to score
    draws: int | None = None  # noise draws of a score

    def __post_init__(self):
        super().__post_init__()
        check_counts(self.n, self.seed)


KINDS = {int: "a whole number", float: "a number"}


def parse_args(argv):
    """Flags --name=value -> Options."""
    hints = typing.get_type_hints(Options)
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(__doc__.strip())
            raise SystemExit(0)
        name, equals, text = arg.partition("=")
        key = name.removeprefix("--")
        if not arg.startswith("--") or key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean --{close[0]}?" if close else "--help lists the flags"
            raise SampleError(f"unknown flag {name}: {hint}")
        if key in given:
            raise SampleError(f"--{key} is given twice")
        kind = (typing.get_args(hints[key]) or (hints[key],))[0]
        if not equals and kind is not bool:
            raise SampleError(f"--{key} needs a value: --{key}=...")
        if kind is bool:
            check(text in ("", "0", "1"), key, text, "0 or 1")
            given[key] = text != "0"
        else:
            try:
                given[key] = kind(text)
            except ValueError:
                raise SampleError(f"--{key}={text}: {KINDS[kind]} expected") from None
    return Options(**given)


def entropy_bits(tokens):
    """Entropy in bits of a sample's own token frequencies: low when it repeats itself."""
    counts = torch.tensor(tokens).unique(return_counts=True)[1]
    return torch.special.entr(counts / counts.sum()).sum().item() / math.log(2)


def blank_lengths(text):
    """--blank as an int or, with commas, a list."""
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise SampleError(f"--blank={text}: a whole number, or several as in 8,16") from None
    return lengths if len(lengths) > 1 else lengths[0]


def read_text(path):
    """(text of a file, what it is)"""
    check(os.path.isfile(path), "score", path, "neither a text nor a regular file")
    try:
        with open(path, "rb") as file:
            data = file.read(SCORE_BYTES + 1)
    except OSError as error:
        raise SampleError(f"--score={path}: {error.strerror}") from None
    check(len(data) <= SCORE_BYTES, "score", path, f"over {SCORE_BYTES} bytes: score it in parts")
    text = data.decode("utf-8", "replace")
    changed = "" if text.encode() == data else ", what is no UTF-8 in it replaced"
    return text, f"file {path}{changed}"


def print_score(lm, opts):
    text, what = opts.score, "the text given"
    if os.path.exists(text):
        text, what = read_text(text)
    live = is_terminal(sys.stderr)

    def watch(share):
        print(f"\r{share:4.0%}", end="", file=sys.stderr, flush=True)

    score = lm.score(text, opts.draws, opts.seed, watch if live else None)
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    what = f"{what}: {score.n_tokens} tokens, {score.n_bytes} bytes;"
    if lm.is_ar:
        value = f"-log p = {score.nats:.2f} nats, {score.bits_per_byte:.4f} bits per byte"
        what += " exact"
    else:
        value = (
            f"-log p <= {score.nats:.2f} +- {score.nats_stderr:.2f} nats,"
            f" {score.bits_per_byte:.4f} +- {score.bits_stderr:.4f} bits per byte"
        )
        what += f" {opts.draws or DEFAULT_DRAWS} noise draws, seed {opts.seed}"
    print(f"{lm.summary}\n{value} ({one_line(what)}, {lm.where})")


def print_samples(lm, opts):
    if opts.infill is None:
        known, is_known = lm.canvas_for_prompt(opts.prompt or "", opts.length)
    else:
        blank = DEFAULT_BLANK if opts.blank is None else blank_lengths(opts.blank)
        known, is_known = lm.canvas_for_infill(opts.infill, blank, opts.length)
    opts = lm.check_able(opts)
    fancy = is_terminal(sys.stdout)

    def note(text):
        print(styled(text, "note") if fancy else text, flush=True)

    note(lm.summary)
    watch = Watch(lm.tokenizer, is_known, opts.watch)
    watch.passes = lm.passes(opts, len(known))
    given = is_known.tolist()
    nfe, seconds, bits, n_done, n_new = 0, 0.0, 0.0, 0, 0
    for batch in lm.batches(known, is_known, opts, n=opts.n, seed=opts.seed, watch=watch):
        watch.erase()
        watch.begin()
        nfe += batch.nfe
        seconds += batch.seconds
        for row in batch.tokens:
            new = [token for token, old in zip(row, given, strict=False) if not old]
            bits += entropy_bits(new)
            n_done += 1
            n_new += len(new)
            if opts.n > 1:
                note(f"--- sample {n_done} of {opts.n}")
            if fancy:
                kinds = ["known" if old else None for old in given[: len(row)]]
                for text, kind in lm.tokenizer.spans(row, kinds):
                    print(styled(printable(text), kind), end="")
                print("\n")
            else:
                print(for_stdout(lm.tokenizer.decode(row)) + "\n", flush=True)
    note(
        f"NFE {nfe}, {n_new / seconds:.0f} tokens/s, {lm.where}, {lm.describe(opts)},"
        f" entropy {bits / n_done:.2f} bits"
    )


def run(opts):
    modes = [name for name in ("prompt", "infill", "score") if getattr(opts, name) is not None]
    if opts.race is not None and modes != ["prompt"]:
        modes.append("race")
    if len(modes) > 1:
        raise SampleError(f"--{modes[0]} and --{modes[1]} exclude each other: drop one")
    for name, needed in (("blank", "infill"), ("draws", "score")):
        if getattr(opts, name) is not None and needed not in modes:
            raise SampleError(f"--{name} goes with --{needed}: add it or drop --{name}")
    if opts.race is not None:
        print_race(load_racers(opts), opts)
        return
    lm = load(opts.ckpt, opts.script, opts.weights, opts.device, opts.dtype)
    if opts.score is None:
        print_samples(lm, opts)
    else:
        print_score(lm, opts)


def main(argv):
    message = ""
    try:
        run(parse_args(argv))
        sys.stdout.flush()
        return
    except SampleError as error:
        message, status = one_line(str(error)), 2
    except BrokenPipeError:  # as in "sample.py | head"
        status = 141
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        message, status = one_line(str(error)) or "out of memory", 2
    with contextlib.suppress(OSError):  # stderr may be full or gone, too
        if message:
            print(f"sample.py: {message}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written is not tried again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(status)


def leave(number, frame):
    """Of a signal: at once, wherever the program is; a terminal gets no colour left on."""
    signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[0m\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, leave)
    main(sys.argv[1:])
