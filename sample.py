"""Sample from a checkpoint: generate, infill, watch, score; race one against another.

    python sample.py                                         newest checkpoint in out/
    python sample.py --prompt="def " --n=4 --length=256
    python sample.py --infill="def ___(self):" --blank=8     ___ is a blank of 8 tokens
    python sample.py --order=confidence --threshold=0.9 --watch
    python sample.py --steps=128 --remask=loop
    python sample.py --score=FILE                            bound on -log p of a text
    python sample.py --ckpt=out/demo/ckpt.pt --race=out/gpt/ckpt.pt --steps=64

gpt.py writes from left to right, one token a pass, and scores exactly; it takes no --infill and no
flag about passes and their order. train_block.py writes block after block, any length; the flags
about passes act inside each block, and it takes no --infill and no --refine. Both stop at the end
of a document. train_sedd.py draws all tokens anew in each of --steps passes, by --order=tweedie or
euler; it takes no --threshold, --remask or --refine.

Which model
  --ckpt=PATH          checkpoint, its run folder, or hf:OWNER/REPO/FILE; default: the newest
                       out/*/ckpt.pt
  --script=FORK.py     training script that wrote it, when that is an edited one
  --weights=ema|raw    averaged weights, where there are some (default), or those of the last step
  --device=NAME        auto (default), cpu, cuda or mps
  --dtype=NAME         auto (default: as trained on cuda, else fp32), fp32 or bf16
What to write
  --prompt=TEXT        text to continue
  --prompt_file=FILE   the same from a file
  --infill=TEXT        text with blanks: each run of three or more underscores is one. A space before
                       a blank, or at the end of a prompt, becomes the beginning of what is written,
                       as GPT-2's words begin with their space: its first token is drawn before the
                       others, from those that begin so
  --blank=N[,N...]     tokens in a blank, for all of them or one by one (default 16)
  --n=N                samples (default 1)
  --length=N           tokens in a sample, prompt included (default: 256 new ones), up to the
                       context, with train_block any number; an infill goes on after its end up to
                       that length (default: it does not)
  --seed=N             the same seed gives the same samples, however many --n asks for (default 0)
How
  --order=NAME         exact: first_hitting (default; one random token a pass), ancestral (default
                       with --steps; a grid of times, exact for many steps), random (exact at one
                       token a pass). Mode-seeking, so not samples of the model's distribution:
                       confidence (default with --threshold), entropy, margin. train_sedd, exact for
                       many steps: tweedie (its default) and euler
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
  --race=PATH[,PATH..] checkpoints that write the same prompt and number of tokens as --ckpt does,
                       one after the other, after a warm-up; a terminal then shows the runs side by
                       side in real time, and a table their passes, seconds and tokens per second.
                       gpt ignores the flags about passes; the end of a document stops none
Scoring
  --score=TEXT|FILE    no sampling: the bound in nats and bits per byte, with its standard error;
                       gpt: the exact value. Up to 16 MiB
  --score_file=FILE    the same, always a file
  --draws=N            independent noise draws (default 8)
  --encoding=NAME      of the file to read (default utf-8)

Samples, scores and tables go to stdout, everything else to stderr. A terminal is shown control
characters as escapes (\\x1b). Nothing in a checkpoint is run.

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

if __name__ == "__main__":  # Ctrl-C ends the program without a traceback, while torch loads too
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SCRIPTS = ("train_mdlm", "train_block", "train_sedd", "gpt")
NEEDED = ("METRIC", "load_checkpoint", "build_model", "pick_device", "pick_dtype", "nelbo_fn")
DTYPES = ("auto", "fp32", "bf16")
DEFAULT_BLANK = 16  # tokens
DEFAULT_DRAWS = 8  # of noise, for a score
DEFAULT_LENGTH = 256  # new tokens
TEXT_BYTES = 2**24  # of a file; scoring takes about a hundred times that of memory
MAX_REPLACED = 0.01  # share of a file's characters that may be invalid
BATCH_NUMBERS = 2**27  # logits, or attention scores of a layer, in one forward pass
MAX_ROWS = 512  # samples at once, so that the first of many are soon there
DOCUMENT_BREAK = "\n\n---\n\n"  # how the beginning of a document is shown
BLANK = re.compile("_{3,}")
FILE_NAME = re.compile(r"\S*[/\\]\S*|.*\.(txt|text|md|rst|tex|log|jsonl?|csv|tsv|xml|html?|py|gz|"
                       r"zst|pdf|docx?|epub|parquet)", re.I)
# How GPT-2 cuts text into words, in the spellings of prepare_data.py and of tiktoken's releases.
# tiktoken panics on some others.
PATTERNS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


class SampleError(ValueError):
    """A user's mistake, in one line that names the flag or file and the remedy."""


def check(condition, flag, value, remedy):
    if not condition:  # NaN fails every comparison and lands here
        raise SampleError(f"--{flag}={value}: {remedy}")


def near_miss(word, words):
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]}?" if close else "one of " + ", ".join(words)


# ----------------------------------------------------------------------------- tokens
class Tokenizer:
    """Text <-> tokens, by the bytes of every token that the checkpoint carries."""
    def __init__(self, meta, mask_id):
        self.name, self.bos_id, self.mask_id = meta["tokenizer"], meta["bos_id"], mask_id
        words = map(chr, range(256)) if self.name == "byte" else meta["token_bytes"] or ()
        self.table = [word.encode("latin-1") for word in words]
        if not any(self.table):
            raise SampleError("trained without the bytes of its tokens, so its samples cannot be "
                              "read: prepare the data with prepare_data.py and train again")
        self.table += [b""] * (mask_id - len(self.table))  # ids that stand for no text
        self.table[self.bos_id] = b""
        self.encoding = None
        if self.name == "byte":
            return
        if meta["pattern"] not in PATTERNS:
            raise SampleError(f"the pattern of its {self.name} tokenizer is not GPT-2's")
        try:
            import tiktoken
        except ImportError:
            need = f"the {self.name} tokenizer needs tiktoken: pip install tiktoken"
            raise SampleError(need) from None
        self.encoding = tiktoken.Encoding(
            self.name, pat_str=meta["pattern"], special_tokens={"<|endoftext|>": self.bos_id},
            mergeable_ranks={word: i for i, word in enumerate(self.table) if word})

    def encode(self, text):
        """Tokens of a text; never bos_id."""
        # What argv makes of bytes that are not UTF-8 becomes U+FFFD.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.encoding is not None:
            return self.encoding.encode_ordinary(text)
        tokens = list(text.encode())
        if self.bos_id in tokens:
            raise SampleError("the text holds a NUL byte, which begins a document here: remove it")
        return tokens

    def split_space(self, text):
        """A text that goes on -> (what is known, what the next token begins with): its last space,
        or the last of several white-space characters, as GPT-2 cuts them."""
        found = re.search(r" \Z|(?<=\s)\s\Z", text, re.A)
        if found and self.beginning_with(found[0]).sum() > 1:
            return text[:-1], found[0]
        return text, ""

    def beginning_with(self, text):
        """(V,) bool, the tokens that begin with an ASCII text."""
        return torch.tensor([word.startswith(text.encode()) for word in self.table])

    def spans(self, tokens, kinds):
        """[(text, kind)] of a row: characters take the kind of the token that completes them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces, kind = [], None
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


# ----------------------------------------------------------------------------- networks
class Cache:
    """Attention that keeps keys and values, for Trunk.predict. The first n_noised positions of a
    pass are a noised block, which the next pass writes over; the others stay, and the newest
    `window` of them are seen."""
    def __init__(self, model, cfg, window, capacity, n_noised=0):
        self.model, self.cfg = model, cfg
        self.is_cached = hasattr(model, "predict")  # else earlier tokens are computed anew
        self.n_noised, self.window, self.capacity = n_noised, window, capacity
        self.buffers = [None] * cfg.n_layer  # keys and values, (2, B, Hkv, capacity, d)
        self.layer = 0  # whose turn it is
        self.length = self.done = 0  # positions in the buffers; and ever
        self.mask = None  # (.., N, S) of this pass; None: everything is seen

    def __call__(self, q, k, v, ctx):
        """One layer of a pass: q (B, H, N', d), k and v (B, Hkv, N, d) -> (B, H, N', d)"""
        L, N, n_seen = self.n_noised, k.size(2), min(self.length, self.window)
        buffer, length = self.buffers[self.layer], self.length
        if buffer is None or length + N > buffer.size(3):
            size = max(self.capacity, n_seen + N)
            new = k.new_empty(2, *k.shape[:2], size, k.size(3))
            if n_seen:
                new[..., :n_seen, :] = buffer[..., length - n_seen:length, :]
            buffer = self.buffers[self.layer] = new
            length = n_seen
        buffer[..., length:length + N, :] = torch.stack((k, v)).roll(-L, 3)
        self.layer += 1
        if self.layer == len(self.buffers):
            self.layer, self.length, self.done = 0, length + N - L, self.done + N - L
        k, v = buffer[..., length - n_seen:length + N, :]
        mask = None if self.mask is None else self.mask[..., :q.size(2), :]
        is_grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)


class NextToken(Cache):
    """gpt: log p of the next token."""
    def __init__(self, model, cfg, T):
        super().__init__(model, cfg, T, T)

    def read(self, x):
        """x (B, S), the start and then tokens, longer than at the call before -> (B, V)"""
        (B, S), done, device = x.shape, self.done, x.device
        last = torch.arange(1, B + 1, device=device) * (S - done) - 1
        if not self.is_cached:
            return self.model(x, last).log_softmax(-1)
        new = torch.arange(done, S, device=device)
        self.mask = new[:, None] >= torch.arange(S, device=device) if len(new) > 1 else None
        return self.model.predict(x[:, done:], new, rows=last, attend=self).log_softmax(-1)


class NextBlock(Cache):
    """Block diffusion: log p of tokens of a block, given the newest seq_len tokens up to its end.
    The first pass of a block computes keys and values of the finished one before it."""
    def __init__(self, model, cfg, T):
        L = cfg.block_len
        super().__init__(model, cfg, cfg.seq_len - L, min(T, 2 * cfg.seq_len), L)

    def read(self, tokens, is_mask, rows):
        """tokens (B, T) up to the end of the block; rows (R,), flat positions of (B, L) -> (R, V)
        """
        cfg, T, L, device = self.cfg, tokens.size(1), self.cfg.block_len, tokens.device
        if not self.is_cached:
            x = tokens[:, -cfg.seq_len:]
            rows = rows + (rows // L + 1) * (x.size(1) - L)
            return self.model(x, x, rows).log_softmax(-1)
        noised, clean = torch.arange(T - L, T, device=device), torch.arange(T - L, device=device)
        first_seen = self.done - min(self.length, self.window)
        at = torch.cat((noised, clean[self.done:]))  # (N,)
        seen = torch.cat((clean[first_seen:], noised))  # (S,)
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

    def read_prompt(self, tokens, n_known):
        """Take a prompt that is longer than the context in, piece by piece -> forward passes"""
        L, T = self.cfg.block_len, self.cfg.seq_len
        ends = range(T, n_known // L * L, max(L, T - L)) if self.is_cached else ()
        for end in ends:
            self.read(tokens[:, :end], None, tokens.new_zeros(0))
        return len(ends)


def read_row(model, tokens, is_mask, rows):
    """Masked diffusion: log p (R, V) of tokens at flat positions rows (R,) of tokens (B, T)."""
    sigma = -torch.log1p(-is_mask.sum(1).clamp(min=1) / (tokens.size(1) + 1))
    return model(tokens, sigma, rows).log_softmax(-1)


# ----------------------------------------------------------------------------- samplers
# All take known (B, T) int64 and is_known (B, T) bool. gen (CPU) seeds a generator for every row, so
# that a row does not depend on its batch. warp changes the log-probabilities that tokens are drawn
# from; watch(tokens (B, T), nfe) sees every pass. begins {position: (V,) bool}: the tokens that may
# stand there; they are drawn first, so that the rest is conditioned on them.
class Filled(NamedTuple):
    tokens: torch.Tensor  # (B, T) int64
    length: torch.Tensor  # (B,) int64, tokens of each row
    nfe: int  # forward passes


def row_generators(gen, n_rows):
    seeds = [int(torch.randint(2**62, (), generator=gen)) for _ in range(n_rows)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniforms(gens, *shape):
    """(B, *shape) float64 on the CPU"""
    return torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in gens])


def draw_tokens(log_probs, u):
    """Inverse CDF in float64: log_probs (R, V), u (R,) uniform -> tokens (R,). Gumbel noise in fp32
    draws rare tokens too seldom (arXiv 2409.02908, section 4)."""
    device = log_probs.device
    if device.type == "mps":  # has no float64
        log_probs = log_probs.cpu()
    cdf = log_probs.double().softmax(-1).cumsum(-1)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u.to(cdf.device)[:, None] * total, right=True)[:, 0]
    # u < 1 may still round up to the total: the last token that has any probability.
    last = (cdf < total).sum(-1)
    return torch.minimum(token, last).to(device)


def draw_among(log_probs, allowed, u, warp):
    """Of log_probs (R, V), those allowed (V,) -> tokens (R,)"""
    log_probs = log_probs.masked_fill(~allowed, -math.inf).log_softmax(-1)
    return draw_tokens(log_probs if warp is None else warp(log_probs), u)


@torch.no_grad()
def fill_blocks(model, cfg, known, is_known, *, steps, gen, choose=None, warp=None, watch=None,
                stop=None, begins=None):
    """Fill in the unknown positions, block after block. Masked diffusion is a block as long as the
    row, with known tokens anywhere.

    steps=N: ancestral sampling on N equal steps of t (arXiv 2406.07524, eq. 6 with SUBS), each
    masked token drawn with probability (t - s) / t. steps=None: first-hitting (arXiv 2409.02908),
    one uniformly random token a row and pass: as ancestral for N -> inf. Without a token to draw
    there is no forward pass. choose (see Orders) replaces both. stop=ID: a row ends where that token
    stands in a finished block, unless it is the first of the row or known; it is not counted in the
    length, and the row is filled up with it."""
    (B, T), mask_id, device = known.shape, cfg.vocab_size, known.device
    has_blocks = hasattr(cfg, "block_len")
    L = cfg.block_len if has_blocks else T
    gens, passes, nfe = row_generators(gen, B), L if steps is None else steps, 0
    whole = -(-T // L) * L  # the last block is written to its end, and cut
    fixed = F.pad(is_known, (0, whole - T))  # (B, whole)
    tokens = F.pad(torch.where(is_known, known, mask_id), (0, whole - T), value=mask_id)
    length = torch.full((B,), T, device=device)
    read = functools.partial(read_row, model)
    if has_blocks:
        cache = NextBlock(model, cfg, whole)
        read, nfe = cache.read, cache.read_prompt(tokens, int(is_known.sum(1).min()))
    for start in range(0, whole, L):
        here = slice(start, start + L)
        if not (tokens[:, here] == mask_id).any():
            uniforms(gens, passes, 2, L)  # the numbers of later blocks do not depend on this one
            continue
        for at in (at for at in begins or () if start <= at < start + L):
            rows = torch.arange(B, device=device) * L + at - start
            log_probs = read(tokens[:, :start + L], tokens[:, here] == mask_id, rows)
            nfe += 1
            tokens[:, at] = draw_among(log_probs, begins[at], uniforms(gens), warp)
            fixed[:, at] = True
        psi = torch.full((B, L), math.inf, dtype=torch.float64)
        for i in range(passes):
            pick, u = uniforms(gens, 2, L).unbind(1)  # (B, L) each
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
                new_mask = choose(log_probs, is_mask, step=i, steps=steps, u=pick, psi=psi)
                new_mask &= ~fixed[:, here] & (i < passes - 1)
                block = torch.where(new_mask, mask_id, block)
                psi[new_mask.cpu()] = math.inf
                is_drawn = ~new_mask.flatten()[rows]
                rows, log_probs = rows[is_drawn], log_probs[is_drawn]
            if len(rows):
                warped = log_probs if warp is None else warp(log_probs)
                drawn = draw_tokens(warped, u.flatten()[rows.cpu()])
                block = block.flatten().index_put((rows,), drawn).view(B, L)
                p = log_probs.gather(1, drawn[:, None])[:, 0].cpu().double().exp()
                psi.view(-1)[rows.cpu()] = p
            tokens[:, here] = block
            if watch is not None and i < passes - 1:
                watch(tokens[:, :T], nfe)
        if stop is not None:
            ends = (block == stop) & ~fixed[:, here]
            ends[:, 0] &= start > 0
            at = start + ends.int().argmax(1)
            behind = torch.arange(whole, device=device) >= at[:, None]  # (B, whole)
            behind &= ends.any(1, keepdim=True)
            tokens, fixed = torch.where(behind, stop, tokens), fixed | behind
            length = torch.where(ends.any(1), at.clamp(max=T), length)
        if watch is not None:
            watch(tokens[:, :T], nfe)
    return Filled(tokens[:, :T], length, nfe)


@torch.no_grad()
def continue_rows(model, cfg, known, is_known, *, gen, warp=None, watch=None, stop=None,
                  begins=None):
    """gpt: one token a row and pass, from left to right; known tokens are first in their row.
    stop=ID: a row ends where that token is drawn, unless it is the first of the row; it is not
    counted in the length, and the row is filled up with it."""
    (B, T), start, device = known.shape, cfg.vocab_size, known.device
    u = uniforms(row_generators(gen, B), T)
    tokens, cache, nfe = torch.where(is_known, known, start), NextToken(model, cfg, T), 0
    length = torch.full((B,), T, device=device)
    for i in range(T):
        is_free = ~is_known[:, i] & (length == T)  # (B,)
        if not is_free.any():
            continue
        log_probs = cache.read(F.pad(tokens[:, :i], (1, 0), value=start))  # (B, V)
        nfe += 1
        if begins and i in begins:
            drawn = draw_among(log_probs, begins[i], u[:, i], warp)
        else:
            drawn = draw_tokens(log_probs if warp is None else warp(log_probs), u[:, i])
        tokens[:, i] = torch.where(is_free, drawn, tokens[:, i])
        if stop is not None and i > 0:
            ends = is_free & (drawn == stop)
            length = torch.where(ends, i, length)
            tokens[:, i:] = torch.where(ends[:, None], stop, tokens[:, i:])
        if watch is not None:
            watch(tokens, nfe)
    return Filled(tokens, length, nfe)


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
def redraw_rows(model, cfg, known, is_known, *, total_noise, steps, gen, is_euler=False, warp=None,
                watch=None, begins=None):
    """train_sedd: N = steps passes (None: T), on N equal steps of t. Each draws every position anew
    by Tweedie's law, the exact one of a position if it moved alone (arXiv 2310.16834, theorem 4.2);
    is_euler: by the rates at the step's start. The last pass denoises: all of the noise that is left
    goes in one step of Tweedie's. Under absorb a pass without a change needs no new forward pass.
    warp acts under absorb on what a mask becomes, not when; under uniform on the clean token that
    the score implies, before the noise of that time. total_noise(t, cfg) -> sigma, dsigma/dt"""
    (B, T), V, device = known.shape, cfg.vocab_size, known.device
    where = "cpu" if device.type == "mps" else device  # MPS has no float64
    gens, passes = row_generators(gen, B), T if steps is None else steps
    is_absorb = cfg.graph == "absorb"
    times = torch.arange(passes, 0, -1, dtype=torch.float64) / passes
    sigmas, slopes = total_noise(times, cfg)
    sigmas = [*sigmas.tolist(), 0.0]
    start = uniforms(gens, T)
    start = V if is_absorb else (start * V).long().to(device)
    tokens = torch.where(is_known, known, start)
    nfe, is_changed = 0, True
    for at, allowed in (begins or {}).items():
        rows = torch.arange(B, device=device) * T + at
        if is_absorb:
            log_law = read_row(model, tokens, tokens == V, rows)
        else:
            log_score = model(tokens, torch.full((B,), sigmas[0], device=device), rows).to(where)
            current = tokens[:, at].to(where)
            log_law = uniform_law(log_score, current, sigmas[0], 0.0, None, None).to(device)
        nfe += 1
        tokens[:, at] = draw_among(log_law, allowed, uniforms(gens), warp)
        is_known = is_known | (torch.arange(T, device=device) == at)
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
            rows, log_law = rows[leave], log_clean[leave].log_softmax(-1)
            log_law = log_law if warp is None else warp(log_law)
        else:
            log_score = model(tokens, torch.full((B,), sigma, device=device), rows).to(where)
            nfe += 1
            current = tokens.flatten()[rows].to(where)
            log_law = uniform_law(log_score, current, sigma, sigmas[i + 1], rate, warp)
        drawn = draw_tokens(log_law, u.flatten()[rows.cpu()]).to(device)
        new = tokens.flatten().index_put((rows,), drawn).view(B, T)
        tokens, is_changed = new, not torch.equal(new, tokens)
        if watch is not None:
            watch(tokens, nfe)
    return Filled(tokens, torch.full((B,), T, device=device), nfe)


# ----------------------------------------------------------------------------- orders
# choose(log_probs (R, V), is_mask (B, L), step, steps, u (B, L), psi (B, L)) -> what is masked after
# the pass, (B, L) bool. R = is_mask.sum(); log_probs are untempered, so temperature never moves a
# rank. psi: the probability that a token had when it was drawn, infinite where none was.
RANKS = {
    "random": lambda log_probs, u: u,
    "confidence": lambda log_probs, u: log_probs.amax(-1),
    "entropy": lambda log_probs, u: -torch.special.entr(log_probs.exp()).sum(-1),
    "margin": lambda log_probs, u: log_probs.exp().topk(2).values.diff().neg().squeeze(-1),
}
SCORE_ORDERS = ("tweedie", "euler")  # of train_sedd
ORDERS = ("first_hitting", "ancestral", *RANKS, *SCORE_ORDERS)
# ReMDM's loop: up to alpha = LOOP_ALPHA by t = LOOP_ON, there until LOOP_OFF, then on to the end.
LOOP_ON, LOOP_OFF, LOOP_ALPHA = 0.55, 0.05, 0.9
REMASK_ETA = {"loop": 0.02, "cap": 0.02, "rescale": 0.02, "conf": 1.0}


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


def loop_alpha(t):
    if t > LOOP_ON:
        return LOOP_ALPHA * (1 - t) / (1 - LOOP_ON)
    return LOOP_ALPHA if t > LOOP_OFF else 1 - (1 - LOOP_ALPHA) * t / LOOP_OFF


def remasking(text):
    """Remasking diffusion (ReMDM, 2503.00307). A fixed token is masked again with probability sigma
    <= sigma_max = min(1, (1-alpha_s)/alpha_t), a masked one is fixed with probability
    (alpha_s - (1-sigma) alpha_t) / (1-alpha_t): the share of fixed tokens follows alpha as without
    remasking. sigma is min(eta, sigma_max) for cap and loop, eta sigma_max for rescale; conf deals
    eta sigma_max out over the fixed tokens by softmax(-psi)."""
    kind, _, eta = text.partition(":")
    eta = float(eta) if eta else REMASK_ETA[kind]
    alpha = loop_alpha if kind == "loop" else lambda t: 1 - t

    def choose(log_probs, is_mask, *, step, steps, u, psi):
        device, is_mask = is_mask.device, is_mask.cpu()
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        alpha_t, alpha_s = alpha(t), alpha(s)
        sigma_max = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        if kind == "conf":  # a row with nothing to mask again has an empty softmax
            sigma = eta * sigma_max * (-psi).softmax(1).nan_to_num(0.0)
        elif kind == "rescale":
            sigma = eta * sigma_max
        else:
            is_looping = kind == "cap" or LOOP_OFF < t <= LOOP_ON
            sigma = min(eta, sigma_max) if is_looping else 0.0
        fix = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) if alpha_t < 1 else 1.0
        return torch.where(is_mask, u >= fix, u < sigma).to(device)

    return choose


def make_warp(temperature=1.0, top_k=None, top_p=None):
    """log_probs (R, V) -> log_probs (R, V): temperature, then top-k, then nucleus; None when all are
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
        check(threshold is None or 0 <= threshold <= 1, "threshold", threshold, "from 0 to 1")
        check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        check(0 <= self.refine <= 1, "refine", self.refine, "from 0 to 1")
        one_a_pass = order == "first_hitting" and steps is not None
        check(not one_a_pass, "steps", steps, "first_hitting fixes one token a pass: drop --steps")
        is_ranked = threshold is None or order is None or order in RANKS
        check(is_ranked, "threshold", threshold, "goes with --order=" + "|".join(RANKS))
        if remask is not None:
            kind, _, eta = remask.partition(":")
            check(kind in REMASK_ETA, "remask", remask, near_miss(kind, list(REMASK_ETA)))
            is_share = re.fullmatch(r"(0?\.\d+|1(\.0*)?|)", eta) and (not eta or float(eta) > 0)
            check(is_share, "remask", remask, f"ETA is above 0, up to 1, as in {kind}:0.02")
            is_alone = threshold is None and order in (None, "ancestral")
            check(is_alone, "remask", remask, "has its own order: drop --order and --threshold")

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
        words = f"remask {self.remask}" if self.remask else self.name
        if self.threshold is not None:
            words += f" threshold {self.threshold:g}"
        if self.name in RANKS and (self.name != "random" or self.threshold is not None):
            words += " (mode-seeking)"
        return words + (f", refine {self.refine:g}" if self.refine else "")


# ----------------------------------------------------------------------------- model
PASSES = ("order", "steps", "threshold", "remask", "refine")  # flags of diffusion alone
WAYS = {  # how a kind of model writes, and the flags that it cannot take
    "mdlm": ("tokens in any order", ()),
    "gpt": ("from left to right, one token a pass", (*PASSES, "infill")),
    "block": ("one block after another", ("refine", "infill")),
    "sedd": ("all tokens in every pass, by its score", ("threshold", "remask", "refine")),
}


class Canvas(NamedTuple):
    known: torch.Tensor  # (T,) int64
    is_known: torch.Tensor  # (T,) bool
    begins: dict  # {position: (V,) bool, the tokens that may stand there}


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
        self.script, self.name = script, ckpt["script"]
        with naming(path):
            self.model, self.cfg = script.build_model(ckpt, weights)
            self.tokenizer = Tokenizer(ckpt["meta"], self.cfg.vocab_size)
        self.block_len = getattr(self.cfg, "block_len", None)
        diffusion = "block" if self.block_len else "sedd" if hasattr(self.cfg, "graph") else "mdlm"
        self.kind = "gpt" if script.METRIC == "val_nll" else diffusion
        self.is_cached = self.name in SCRIPTS or self.predict_agrees()
        with naming(f"--device={device}"):
            self.device = script.pick_device(device, 0)
        if dtype == "auto":
            dtype = self.cfg.dtype if self.device.type == "cuda" else "fp32"
        self.dtype = script.pick_dtype(dtype, self.device)
        self.model.to(self.device)
        self.where = f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"
        averaged = "ema" if weights == "ema" and ckpt["ema"] else "raw"
        n = sum(p.numel() for p in self.model.parameters())
        self.summary = one_line(
            f"{path}: {self.name}, {n / 1e6:.2f}M parameters, {averaged} weights of step "
            f"{ckpt['step']}, {self.tokenizer.name} tokens, context {self.cfg.seq_len}"
            + ("" if self.is_cached else ", no cache: its forward is not the trunk's predict"))

    @torch.no_grad()
    def predict_agrees(self):
        """Does a fork's predict, with a cache, give what its forward gives? Where not, earlier
        tokens are computed anew in every pass."""
        if self.kind in ("mdlm", "sedd") or not hasattr(self.model, "predict"):
            return self.kind in ("mdlm", "sedd")  # which have no cache
        reader, unit = NextToken, 1
        if self.kind == "block":
            reader, unit = NextBlock, self.block_len
        T = min(self.cfg.seq_len, 3 * unit)
        x = torch.randint(self.cfg.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
        rows = (None, torch.arange(unit)) if self.kind == "block" else ()
        laws = []
        for model in (self.model, self.model.__call__):
            cache = reader(model, self.cfg, T)
            for end in range(unit, T + 1, unit):
                law = cache.read(x[:, :end], *rows)
            laws.append(law)
        return torch.allclose(*laws, atol=1e-3)

    def amp(self):
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def batch_rows(self, length):
        """How many rows of that many tokens to run at once."""
        numbers = length * max(self.cfg.vocab_size, self.cfg.n_head * length)
        return max(1, BATCH_NUMBERS // numbers)

    def unable(self, flag):
        return SampleError(f"--{flag}: {self.name} writes {WAYS[self.kind][0]}: drop the flag or "
                           "take a checkpoint of train_mdlm")

    def check_able(self, sampler):
        """Refuse what this kind of model cannot do."""
        for name in WAYS[self.kind][1]:
            if getattr(sampler, name, None) != getattr(Sampler, name, None):
                raise self.unable(name)
        if self.kind != "sedd":
            remedy = f"{self.name} has no score: that is for a checkpoint of train_sedd"
            check(sampler.order not in SCORE_ORDERS, "order", sampler.order, remedy)
        elif sampler.order not in (None, *SCORE_ORDERS):
            raise self.unable(f"order={sampler.order}")

    def describe(self, sampler):
        """How it writes, in words."""
        if self.kind == "gpt":
            return "left to right"
        if self.kind == "sedd":
            return sampler.order or SCORE_ORDERS[0]
        return sampler.describe() + (f" in blocks of {self.block_len}" if self.block_len else "")

    def canvas_for_prompt(self, prompt, length=None):
        """A prompt and what is to follow it."""
        return self.canvas("prompt", [prompt], [], length)

    def canvas_for_infill(self, text, blank=DEFAULT_BLANK, length=None):
        """A text with blanks (___) of `blank` tokens, an int or a list."""
        if "infill" in WAYS[self.kind][1]:
            raise self.unable("infill")
        texts = BLANK.split(text)
        n_blanks = len(texts) - 1
        blanks = [blank] * n_blanks if isinstance(blank, int) else list(blank)
        shown = ",".join(map(str, blanks))
        check(n_blanks, "infill", text, "no blank in the text: write ___ where one should be")
        check(min(blanks) >= 1, "blank", shown, "at least 1 token each")
        check(len(blanks) == n_blanks, "blank", shown, f"the text has {n_blanks} blanks")
        return self.canvas("infill", texts, blanks, length)

    def canvas(self, flag, texts, blanks, length):
        """Texts with blanks between them, going on after the last text up to length."""
        known, is_known, begins = [], [], {}
        is_prompt = flag == "prompt"
        for text, n_new in itertools.zip_longest(texts, blanks, fillvalue=0):
            space = ""
            if n_new or is_prompt or length is not None:
                text, space = self.tokenizer.split_space(text)
            tokens = self.tokenizer.encode(text)
            known += tokens + [0] * n_new
            is_known += [True] * len(tokens) + [False] * n_new
            if space:
                begins[len(known) - n_new] = self.tokenizer.beginning_with(space)
        n = len(known) + (is_prompt or max(begins, default=-1) == len(known))
        limit = math.inf if self.block_len else self.cfg.seq_len
        if n > limit:
            raise SampleError(f"--{flag}: {len(known)} tokens, blanks included, do not fit into the "
                              f"context of {limit}: shorten the text or lower --blank")
        if length is None:
            length = min(limit, len(known) + DEFAULT_LENGTH) if is_prompt else n
        check(length <= limit, "length", length, f"{self.name} goes up to {limit} (its seq_len)")
        check(length >= n, "length", length, f"the {flag} alone needs {n} tokens")
        n_more = length - len(known)
        return Canvas(torch.tensor(known + [0] * n_more),
                      torch.tensor(is_known + [False] * n_more), begins)

    @torch.inference_mode()
    def batches(self, canvas, sampler, *, n, seed, watch=None, stops=True):
        """Fill the canvas n times; yield Samples of as many rows as fit in a batch.

        Sample i depends on (seed, i) alone. watch(tokens (B, T), nfe) sees every pass. stops: at the
        end of a document, where the model writes in order."""
        check(n >= 1, "n", n, "at least 1")
        check(0 <= seed < 2**62, "seed", seed, "from 0 to 2**62 - 1")
        known, is_known = canvas.known.to(self.device), canvas.is_known.to(self.device)
        begins = {at: allowed.to(self.device) for at, allowed in canvas.begins.items()}
        stop = self.tokenizer.bos_id if stops and self.kind in ("gpt", "block") else None
        rows = min(MAX_ROWS, self.batch_rows(min(len(known), self.cfg.seq_len)))
        # The refining pass has a stream of its own: both hand out one seed a row.
        gens = [torch.Generator().manual_seed(s) for s in (seed, seed ^ 2**62)]
        for first in range(0, n, rows):
            start = time.perf_counter()
            size = (min(rows, n - first), len(known))
            x, given = known.expand(size), is_known.expand(size)
            with self.amp():
                out = self.fill(x, given, sampler, gens[0], watch, stop, begins)
                nfe = out.nfe
                if sampler.refine > 0:
                    for at in begins:
                        given = given | (torch.arange(len(known), device=self.device) == at)
                    keep, n_passes = self.likeliest(out.tokens, given, sampler.refine)
                    seen = nfe = nfe + n_passes
                    more = watch and (lambda tokens, n, seen=seen: watch(tokens, seen + n))
                    out = self.fill(out.tokens, keep, sampler, gens[1], more, stop, {})
                    nfe += out.nfe
            rows_of = zip(out.tokens.tolist(), out.length.tolist(), strict=True)
            yield Samples([row[:end] for row, end in rows_of], nfe, time.perf_counter() - start)

    def fill(self, known, is_known, sampler, gen, watch, stop, begins):
        """One run of a sampler over (B, T) -> Filled."""
        model = self.model if self.is_cached else self.model.__call__
        how = dict(gen=gen, watch=watch, begins=begins,
                   warp=make_warp(sampler.temperature, sampler.top_k, sampler.top_p))
        if self.kind == "gpt":
            return continue_rows(model, self.cfg, known, is_known, stop=stop, **how)
        steps, choose = sampler.steps, None
        if self.kind == "sedd":
            return redraw_rows(model, self.cfg, known, is_known, steps=steps,
                               total_noise=self.script.total_noise,
                               is_euler=sampler.order == "euler", **how)
        if sampler.name == "ancestral" and steps is None:
            steps = max(1, min(self.block_len or known.size(1), int((~is_known).sum(1).max())))
        if sampler.name in RANKS:
            choose = ordered(sampler.name, sampler.threshold)
        elif sampler.remask:
            choose = remasking(sampler.remask)
        return fill_blocks(model, self.cfg, known, is_known, steps=steps, choose=choose, stop=stop,
                           **how)

    def likeliest(self, tokens, is_known, refine):
        """What to keep (B, T) when the fraction `refine` is predicted anew, and the passes spent.

        Two passes score every token: every second one is masked, then the others, so that each is
        judged with its neighbours in sight."""
        is_free = ~is_known
        is_odd = is_free.cumsum(1) % 2 == 1
        score = torch.full(tokens.shape, math.inf, dtype=torch.float32, device=tokens.device)
        halves = [half for half in (is_free & is_odd, is_free & ~is_odd) if half.any()]
        for half in halves:
            masked = torch.where(half, self.cfg.vocab_size, tokens)
            log_probs = read_row(self.model, masked, half, half.flatten().nonzero()[:, 0])
            score[half] = log_probs.gather(1, tokens[half][:, None]).squeeze(1)
        n_again = (is_free.sum(1, keepdim=True) * refine).round().clamp(min=1)  # (B, 1)
        place = score.argsort(dim=1, stable=True).argsort(1)
        return is_known | (place >= n_again), len(halves)

    def generate(self, n=1, length=None, prompt="", seed=0, **how):
        """n texts of `length` tokens that begin with the prompt; `how`: the fields of Sampler."""
        return self.texts(self.canvas_for_prompt(prompt, length), n, seed, how)

    def infill(self, text, blank=DEFAULT_BLANK, n=1, length=None, seed=0, **how):
        """n versions of a text whose blanks (___) are filled with `blank` tokens each."""
        return self.texts(self.canvas_for_infill(text, blank, length), n, seed, how)

    def texts(self, canvas, n, seed, how):
        sampler = Sampler(**how)
        self.check_able(sampler)
        batches = self.batches(canvas, sampler, n=n, seed=seed)
        return [self.tokenizer.decode(row) for batch in batches for row in batch.tokens]

    @torch.inference_mode()
    def score(self, text, draws=None, seed=0, watch=None):
        """Score of a text, cut into windows of seq_len tokens (the last may be shorter).

        A draw masks every window twice, as an antithetic pair; the draws (default DEFAULT_DRAWS)
        are independent. gpt takes one pass without noise, which is exact. watch(share) sees how much
        is done."""
        is_exact = self.kind == "gpt"
        check(draws is None or not is_exact, "draws", draws, f"{self.name} needs no noise: drop it")
        n_draws, n_copies = (1, 1) if is_exact else (draws or DEFAULT_DRAWS, 2)
        check(is_exact or n_draws >= 2, "draws", draws, "at least 2, for a standard error")
        check(0 <= seed < 2**62, "seed", seed, "from 0 to 2**62 - 1")
        tokens = self.tokenizer.encode(text)
        check(tokens, "score", text, "the text is empty")
        gen = torch.Generator().manual_seed(seed)
        whole = len(tokens) // self.cfg.seq_len * self.cfg.seq_len
        totals = torch.zeros(n_draws, dtype=torch.float64)
        n_done = 0  # tokens times passes
        for part in filter(None, (tokens[:whole], tokens[whole:])):
            cfg = dataclasses.replace(self.cfg, seq_len=min(len(part), self.cfg.seq_len))
            x0 = torch.tensor(part).view(-1, cfg.seq_len).repeat_interleave(n_copies, 0)
            size = self.batch_rows(cfg.seq_len)
            for draw in range(n_draws):
                noise = self.script.draw_noise(cfg, len(x0), gen, bound=True)
                for a in range(0, len(x0), size):
                    piece = type(noise)(*(v[a:a + size].to(self.device) for v in noise))
                    batch = x0[a:a + size].to(self.device)
                    with self.amp():
                        nats = self.script.nelbo_fn(self.model, batch, piece, cfg)
                    totals[draw] += nats.double().sum().cpu() / n_copies
                    n_done += batch.numel()
                    if watch is not None:
                        watch(n_done / (n_copies * n_draws * len(tokens)))
        nats = totals.mean().item()
        stderr = totals.std().item() / math.sqrt(n_draws) if n_draws > 1 else 0.0
        n_bytes = sum(len(self.tokenizer.table[i]) for i in tokens)
        bits = 1 / (math.log(2) * n_bytes)
        return Score(nats, stderr, nats * bits, stderr * bits, len(tokens), n_bytes)


# ----------------------------------------------------------------------------- loading
@contextlib.contextmanager
def naming(name):
    """Name the file or flag in whatever goes wrong inside: a checkpoint may hold anything."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        line = str(error)
        if not isinstance(error, ValueError):
            line = f"cannot be used ({type(error).__name__}: {error})"
        raise SampleError(line if line.startswith(str(name)) else f"{name}: {line}") from None


def newest_checkpoint():
    paths = Path("out").glob("*/ckpt.pt")
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise SampleError("out/*/ckpt.pt: no checkpoint here: pass --ckpt=PATH, or train one: "
                          "python train_mdlm.py --preset=tiny")
    return newest


def find_checkpoint(name):
    """The file behind PATH, a run folder, or hf:OWNER/REPO/FILE, which is downloaded once."""
    name = str(name)
    if not name.startswith("hf:"):
        return Path(name, "ckpt.pt") if os.path.isdir(name) else Path(name)
    owner, _, rest = name[3:].partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise SampleError(f"{name}: write hf:OWNER/REPO/FILE")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise SampleError(f"{name} needs: pip install huggingface_hub") from None
    try:
        return Path(hub.hf_hub_download(f"{owner}/{repo}", file))
    except Exception as error:  # its errors share no base class across versions
        reason = str(error).strip().partition("\n")[0]
        raise SampleError(f"{name}: could not be downloaded: {reason}") from None


def load_script(path):
    """Import a training script from its file."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"sampled_{path.stem}", path)
    check(spec and path.is_file(), "script", path, "no such Python file")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    sys.path[:0] = [str(path.resolve().parent), str(HERE)]  # it imports muon
    try:
        spec.loader.exec_module(script)
    except (Exception, SystemExit) as error:
        raise SampleError(f"--script={path}: {type(error).__name__}: {error}") from error
    finally:
        del sys.path[:2]
    missing = [name for name in NEEDED if not hasattr(script, name)]
    check(not missing, "script", path, f"not a training script: it has no {', '.join(missing)}")
    return script


own_script = functools.cache(lambda name: load_script(HERE / f"{name}.py"))


def load(path=None, script=None, weights="ema", device="auto", dtype="auto"):
    """LM from a checkpoint: PATH, its folder or hf:OWNER/REPO/FILE; None: the newest in out/.

    script: file of the training script, when it is not one beside this file. The others: as the
    flags of these names."""
    check(weights in ("ema", "raw"), "weights", weights, "ema or raw")
    check(dtype in DTYPES, "dtype", dtype, near_miss(str(dtype), DTYPES))
    path = newest_checkpoint() if path is None else find_checkpoint(path)
    module = own_script(SCRIPTS[0]) if script is None else load_script(script)
    with naming(path):
        ckpt = module.load_checkpoint(path)  # the same text in every script
        name = ckpt["script"]
        is_right = name in SCRIPTS if script is None else name == Path(script).stem
    if not is_right:
        raise SampleError(f"{path}: written by {name}.py: pass that file as --script=PATH")
    return LM(own_script(name) if script is None else module, ckpt, path, weights, device, dtype)


# ----------------------------------------------------------------------------- terminal
FRAME = 0.04  # seconds between two pictures
MILESTONES = (0.25, 0.5, 0.75)
STYLES = {"known": "\x1b[1m", "new": "\x1b[32m", "mask": "\x1b[2m", "note": "\x1b[2m"}


def is_terminal(stream):
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def styled(text, kind):
    return f"{STYLES[kind]}{text}\x1b[0m" if kind in STYLES else text


def printable(text):
    """Text that cannot steer a terminal: a model of bytes writes escape codes, too."""
    def is_control(char):
        return unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"

    text = text.replace("\t", "    ").replace("\r\n", "\n")
    return "".join(c.encode("unicode_escape").decode() if c != "\n" and is_control(c) else c
                   for c in text)


def one_line(text):
    """For a message, which may quote anything."""
    return printable(text).replace("\n", "\\n")[:500]


def note(text):
    """What is not text of the model goes to stderr."""
    print(styled(text, "note") if is_terminal(sys.stderr) else text, file=sys.stderr, flush=True)


def show(spans):
    """[(text, kind)] on stdout."""
    if sys.stdout.isatty():
        spans = [(printable(text), kind) for text, kind in spans]
    if is_terminal(sys.stdout):
        spans = [(styled(text, kind), kind) for text, kind in spans]
    print("".join(text for text, _ in spans), flush=True)


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
    """Looks on while a batch is filled, on stderr. A terminal gets a line of progress, and below it
    the text if --watch asks for it; a file gets the first sample at a few milestones."""
    def __init__(self, lm, canvas, sampler, has_text, title=""):
        self.tokenizer, self.is_known = lm.tokenizer, canvas.is_known.tolist()
        self.n_free = self.is_known.count(False)
        self.has_text, self.title = has_text, title
        # Where no mask shows how far it is, the number of passes does.
        is_uniform = getattr(lm.cfg, "graph", None) == "uniform"
        self.passes = (sampler.steps or len(self.is_known)) if is_uniform else None
        self.is_live = is_terminal(sys.stderr)
        self.height = 0  # lines of the picture that is on the terminal
        self.drawn = -math.inf
        self.begin()

    def begin(self):
        """A new batch."""
        sys.stderr.write(wipe(self.height))
        self.height, self.last, self.due = 0, None, list(MILESTONES)

    def share_done(self, tokens, nfe):
        if self.passes:
            return min(1.0, nfe / self.passes)
        n_left = int((tokens == self.tokenizer.mask_id).sum())
        return 1 - n_left / (len(tokens) * self.n_free)

    def __call__(self, tokens, nfe):
        done = self.share_done(tokens, nfe)
        if self.is_live and (time.monotonic() - self.drawn >= FRAME or done == 1 and self.has_text):
            self.draw(tokens.tolist(), nfe, done)
        elif not self.is_live and self.has_text and self.due and self.due[0] <= done < 1:
            self.due = [share for share in self.due if share > done]
            text = self.tokenizer.decode(self.shown(tokens[0].tolist()))
            note(f"[{done:.0%} after {nfe} passes] {text}")

    def draw(self, tokens, nfe, done):
        size = shutil.get_terminal_size()
        lines = [styled(f"{self.title}{done:4.0%}, {nfe} passes", "note")]
        if self.has_text:
            for i, (row, before) in enumerate(zip(tokens, self.last or tokens, strict=True)):
                lines += [styled("---", "note")] if i else []
                row = self.shown(row)
                spans = self.tokenizer.spans(row, self.kinds(row, before))
                lines += lines_of(spans, size.columns)
        del lines[max(1, size.lines - 1):]  # what has scrolled away cannot be drawn over
        sys.stderr.write(wipe(self.height) + "\n".join(lines))
        sys.stderr.flush()
        self.height, self.last, self.drawn = len(lines), tokens, time.monotonic()

    def shown(self, row):
        """A row without what fills it behind its end."""
        n = len(row)
        while n and row[n - 1] == self.tokenizer.bos_id:
            n -= 1
        return row[:n]

    def kinds(self, row, before):
        return ["mask" if token == self.tokenizer.mask_id else "known" if is_known
                else "new" if token != old else None
                for token, old, is_known in zip(row, before, self.is_known, strict=False)]


# ----------------------------------------------------------------------------- race
WARM_UP = 8  # tokens that a model writes before its clock starts
MIN_COLUMN = 24  # cells, of a text beside another
BAR = " │ "  # between the two


class Frame(NamedTuple):
    seconds: float  # on the model's own clock
    nfe: int
    share: float  # done, of all samples
    row: list  # tokens of the first sample


class Racer(Watch):
    """One model of a race. It keeps pictures of its run; its clock stands still while it does."""
    def __init__(self, lm, opts, length):
        ignored = {name: getattr(Sampler, name) for name in PASSES if lm.kind == "gpt"}
        self.lm, self.n, self.sampler = lm, opts.n, dataclasses.replace(opts, **ignored)
        lm.check_able(self.sampler)
        self.canvas = lm.canvas_for_prompt(opts.prompt or "", length)
        super().__init__(lm, self.canvas, self.sampler, False, f"{lm.name}: ")
        self.n_rows = self.nfe = 0  # samples and passes of the batches before
        self.seconds, self.bits, self.first = 0.0, 0.0, None
        row = torch.where(self.canvas.is_known, self.canvas.known, lm.tokenizer.mask_id)
        self.frames = [Frame(0.0, 0, 0.0, row.tolist())]

    def run(self):
        how = dict(sampler=self.sampler, n=self.n, seed=self.sampler.seed, stops=False)
        T = len(self.is_known)
        warm = self.canvas.is_known | (torch.arange(T) < T - WARM_UP)
        for _ in self.lm.batches(Canvas(self.canvas.known, warm, {}), **how):
            pass
        self.since = time.perf_counter()
        for batch in self.lm.batches(self.canvas, **how, watch=self):
            self.first = self.first or batch.tokens[0]
            self.bits += sum(entropy_bits(row[-self.n_free:]) for row in batch.tokens)
            self.n_rows += len(batch.tokens)
            self.nfe += batch.nfe
            self.begin()
            self.since = time.perf_counter()

    def __call__(self, tokens, nfe):
        done = self.share_done(tokens, nfe)  # waits for the device
        self.seconds += time.perf_counter() - self.since
        row = self.frames[-1].row if self.n_rows else tokens[0].tolist()
        share = (self.n_rows + done * len(tokens)) / self.n
        if len(self.frames) > 1 and self.seconds - self.frames[-2].seconds < FRAME:
            del self.frames[-1]  # too soon behind the one before it to be seen
        self.frames.append(Frame(self.seconds, self.nfe + nfe, share, row))
        super().__call__(tokens, nfe)
        self.since = time.perf_counter()

    def column(self, now, width):
        """Lines that show how far it was at a time: counters, and the first sample."""
        i = bisect.bisect(self.frames, now, key=lambda frame: frame.seconds) - 1
        frame, before, last = self.frames[i], self.frames[max(0, i - 1)], self.frames[-1]
        seconds = min(now, last.seconds)
        rate = frame.share * self.n * self.n_free / max(seconds, FRAME)
        counters = f"{frame.nfe} passes, {frame.share:.0%}\n{seconds:.1f} s, {rate:.0f} tokens/s"
        kinds = self.kinds(frame.row, (frame if frame is last else before).row)
        spans = [(f"{self.lm.name}\n", "known"), (f"{counters}\n\n", "note")]
        return lines_of(spans + self.tokenizer.spans(frame.row, kinds), width)


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
        lines = ["".join(map("".join, zip(bars, cells, strict=True)))
                 for cells in itertools.zip_longest(*columns, fillvalue="")]
        if now < end:
            del lines[max(1, size.lines - 1):]  # what has scrolled away cannot be drawn over
        print(wipe(height) + "\n".join(lines), end="", flush=True)
        height = len(lines)
        time.sleep(FRAME)
    print("\n")


def load_racers(opts):
    """The models of --ckpt and --race; what would make a race of unlike things is refused."""
    paths = [newest_checkpoint() if opts.ckpt is None else opts.ckpt, *opts.race.split(",")]
    files = {os.path.realpath(find_checkpoint(path)) for path in paths}
    check(len(files) == len(paths), "race", opts.race, "the same checkpoint twice: name another")
    scripts, how = [opts.script, *[None] * len(paths)], (opts.weights, opts.device, opts.dtype)
    lms = [load(path, script, *how) for path, script in zip(paths, scripts, strict=False)]
    first = lms[0]
    for path, lm in zip(paths, lms, strict=True):
        words = itertools.zip_longest(first.tokenizer.table, lm.tokenizer.table, fillvalue=b"")
        is_same = first.tokenizer.bos_id == lm.tokenizer.bos_id and all(a == b for a, b in words)
        check(is_same, "race", opts.race, f"the tokens of {path} are not those of {paths[0]}")
        unlike = f"{path} runs in {lm.where}, {paths[0]} in {first.where}: give fp32 or bf16"
        check(lm.where == first.where, "dtype", opts.dtype, unlike)
    if all(lm.kind == "gpt" for lm in lms):
        first.check_able(opts)
    return lms


def print_race(lms, opts):
    length = min(len(lm.canvas_for_prompt(opts.prompt or "", opts.length).known) for lm in lms)
    racers = [Racer(lm, opts, length) for lm in lms]
    room = (shutil.get_terminal_size().columns + len(BAR)) // len(lms) - len(BAR)
    is_live = is_terminal(sys.stdout) and room >= MIN_COLUMN
    for lm in lms:
        note(lm.summary)
    samples = f"{opts.n} samples (the first is shown) of " if opts.n > 1 else ""
    shown = ", shown side by side in real time" if is_live else ""
    note(f"{samples}{length} tokens, {lms[0].where}, one model after another{shown}\n")
    for racer in racers:
        racer.run()
    if is_live:
        replay(racers)
    else:
        for racer in racers:
            show([(f"--- {racer.lm.name}\n{racer.tokenizer.decode(racer.first)}\n", None)])
    width = max(len(lm.name) for lm in lms)
    print(f"{'':{width}}  passes  seconds  tokens/s  entropy")
    for racer in racers:
        nfe, seconds, lm = racer.frames[-1].nfe, racer.seconds, racer.lm
        rate, entropy = opts.n * racer.n_free / seconds, racer.bits / opts.n
        print(f"{lm.name:{width}}  {nfe:6}  {seconds:7.2f}  {rate:8.0f}  {entropy:.2f} bits, "
              f"{lm.describe(racer.sampler)}")


# ----------------------------------------------------------------------------- command line
@dataclasses.dataclass(frozen=True)
class Options(Sampler):
    """The flags; see the text at the top."""
    ckpt: str | None = None  # path, run folder or hf:OWNER/REPO/FILE; None: the newest
    script: str | None = None  # an edited training script
    weights: str = "ema"  # ema or raw
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of DTYPES
    prompt: str | None = None  # text to continue
    prompt_file: str | None = None  # the same in a file
    infill: str | None = None  # text with blanks
    blank: str | None = None  # tokens a blank, comma separated
    n: int = 1  # samples
    length: int | None = None  # tokens a sample
    seed: int = 0  # of the samples, or of the noise of a score
    watch: bool = False  # show the text appearing
    race: str | None = None  # checkpoints to race against, comma separated
    score: str | None = None  # text or file to score
    score_file: str | None = None  # a file
    draws: int | None = None  # noise draws of a score
    encoding: str = "utf-8"  # of the file


KINDS = {int: "a whole number", float: "a number"}


def parse_args(argv):
    """Flags --name=value -> Options."""
    hints, given = typing.get_type_hints(Options), {}
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
        kind = (typing.get_args(hints[key]) or (hints[key],))[0]
        if kind is bool:
            check(text in ("", "0", "1"), key, text, "0 or 1")
            given[key] = text != "0"
            continue
        check(equals, key, "VALUE", "needs a value")
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


def read_text(flag, path, encoding):
    try:
        with open(path, "rb") as file:
            data = file.read(TEXT_BYTES + 1)
        text = data.decode(encoding, "replace")
    except (OSError, LookupError) as error:
        raise SampleError(f"--{flag}={path}: {error}") from None
    check(len(data) <= TEXT_BYTES, flag, path, f"over {TEXT_BYTES} bytes: split it")
    is_text = text.count("\ufffd") <= MAX_REPLACED * len(text)
    check(is_text, flag, path, f"not {encoding}; if it is GBK: --encoding=gbk")
    return text


def text_of(opts, flag):
    """(The text of --FLAG or --FLAG_file, what it is); None without either."""
    text, path = getattr(opts, flag), getattr(opts, f"{flag}_file")
    if flag == "score" and text and os.path.isfile(text):
        path = text
    if path is not None:
        return read_text(flag, path, opts.encoding), f"file {path}"
    is_file = text is not None and FILE_NAME.fullmatch(text)
    check(not is_file, flag, text, f"no such file; a text that looks like one goes into a file: "
          f"--{flag}_file=PATH")
    return text, "the text given"


def print_score(lm, opts, text, what):
    is_live = is_terminal(sys.stderr)

    def watch(share):
        print(f"\r{share:4.0%}", end="", file=sys.stderr, flush=True)

    note(lm.summary)
    score = lm.score(text, opts.draws, opts.seed, watch if is_live else None)
    if is_live:
        sys.stderr.write(wipe(1))
    what = f"{what}: {score.n_tokens} tokens, {score.n_bytes} bytes; "
    if lm.kind == "gpt":
        value = f"-log p = {score.nats:.2f} nats, {score.bits_per_byte:.4f} bits per byte"
        what += "exact"
    else:
        value = (f"-log p <= {score.nats:.2f} +- {score.nats_stderr:.2f} nats, "
                 f"{score.bits_per_byte:.4f} +- {score.bits_stderr:.4f} bits per byte")
        what += f"{opts.draws or DEFAULT_DRAWS} noise draws, seed {opts.seed}"
    print(f"{value} ({one_line(what)}, {lm.where})")


def print_samples(lm, opts):
    if opts.infill is None:
        canvas = lm.canvas_for_prompt(opts.prompt or "", opts.length)
    else:
        blank = DEFAULT_BLANK if opts.blank is None else blank_lengths(opts.blank)
        canvas = lm.canvas_for_infill(opts.infill, blank, opts.length)
    lm.check_able(opts)
    note(lm.summary)
    watch, given = Watch(lm, canvas, opts, opts.watch), canvas.is_known.tolist()
    kinds = ["known" if is_known else None for is_known in given]
    nfe, seconds, bits, n_done, n_new = 0, 0.0, 0.0, 0, 0
    for batch in lm.batches(canvas, opts, n=opts.n, seed=opts.seed, watch=watch):
        watch.begin()
        nfe += batch.nfe
        seconds += batch.seconds
        for row in batch.tokens:
            new = [token for token, is_known in zip(row, given, strict=False) if not is_known]
            bits += entropy_bits(new)
            n_done += 1
            n_new += len(new)
            if opts.n > 1:
                note(f"--- sample {n_done} of {opts.n}")
            end = "\n" if opts.n > 1 else ""
            show([*lm.tokenizer.spans(row, kinds[:len(row)]), (end, None)])
    note(f"NFE {nfe}, {n_new / seconds:.0f} tokens/s, {lm.where}, {lm.describe(opts)}, "
         f"entropy {bits / n_done:.2f} bits")


def run(opts):
    prompt, _ = text_of(opts, "prompt")
    text, what = text_of(opts, "score")
    opts = dataclasses.replace(opts, prompt=prompt, score=text)
    modes = [name for name in ("prompt", "infill", "score") if getattr(opts, name) is not None]
    if opts.race is not None and modes != ["prompt"]:
        modes.append("race")
    if len(modes) > 1:
        raise SampleError(f"--{modes[0]} and --{modes[1]} exclude each other: drop one")
    for name, needed in (("blank", "infill"), ("draws", "score")):
        is_used = getattr(opts, name) is None or needed in modes
        check(is_used, name, getattr(opts, name), f"goes with --{needed}: add it or drop --{name}")
    if opts.race is not None:
        print_race(load_racers(opts), opts)
        return
    lm = load(opts.ckpt, opts.script, opts.weights, opts.device, opts.dtype)
    if text is None:
        print_samples(lm, opts)
    else:
        print_score(lm, opts, text, what)


def main(argv):
    try:
        run(parse_args(argv))
        sys.stdout.flush()
    except (SampleError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        is_pipe = isinstance(error, BrokenPipeError)  # as in "sample.py | head"
        if not is_pipe:
            print(f"sample.py: {one_line(str(error)) or 'out of memory'}", file=sys.stderr)
        if isinstance(error, OSError):  # do not try again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141 if is_pipe else 2) from None


if __name__ == "__main__":
    # A file gets UTF-8; a terminal, what it lacks as escapes.
    encoding = None if sys.stdout.isatty() else "utf-8"
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    main(sys.argv[1:])
