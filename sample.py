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
import hashlib
import importlib.util
import inspect
import itertools
import json
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
from typing import Literal, NamedTuple, get_args

if __name__ == "__main__":  # Ctrl-C and "| head" end it without a traceback, while torch loads too
    for name in {"SIGINT", "SIGPIPE"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "models/mdlm.golf", HERE / "models/block.golf"
SCRIPTS = ("train_mdlm", "train_block", "train_sedd", "gpt")
DEFAULT_LENGTH, DEFAULT_DRAWS = 256, 8
BATCH_NUMBERS = 2**27  # logits, or attention scores of a layer, in one forward pass
MAX_ROWS = 512  # samples at once, so that the first of many are soon there
FIRST_STREAM = 0x5EED  # of random numbers
END = b"<|endoftext|>"  # how the beginning of the next document is shown
BLANK = re.compile(r"(?<!\\)_{3,}")  # \_ is an underscore


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
    prompts: str | None = None  # a .jsonl file of several: a text, or {"prompt": text}, a line
    # Without a prompt, a sample is the beginning of a document, or of any window of the corpus.
    start: Literal["document", "anywhere"] = "document"
    infill: str | None = None  # text with blanks: three or more underscores; \\_ is no blank
    blank: str = "16"  # tokens in a blank, for all of them or one by one: N[,N..]
    n: int = 1  # samples, of every prompt
    stop: str | None = None  # text before which a sample ends; from Python also a list of texts
    # Tokens in a sample, prompt included. None: 256 new ones, up to the context; an infill ends
    # with its text, and goes on up to a given length.
    length: int | None = None
    seed: int = 0  # the same seed gives the same samples, however many there are
    # How. Exact: first_hitting (the default: a random token a pass) and, for many steps, ancestral
    # (the default with --steps) and random. Mode-seeking, so not samples of the model's law:
    # confidence (the default with --threshold), confidence_weighted (positions drawn with those
    # weights), entropy, margin. train_sedd has tweedie and euler.
    order: Literal[None, "first_hitting", "ancestral", "random", "confidence",
                   "confidence_weighted", "entropy", "margin", "tweedie", "euler"] = None
    steps: int | None = None  # passes, or passes in each block; None: one a token
    pace: Literal["even", "cosine", "cosine2"] = "even"  # of the orders that rank, over the passes
    # train_mdlm in blocks of so many tokens, from left to right, as LLaDA writes; then the length
    # has no limit, and what is out of the context is forgotten. Both are no exact samplers.
    block_length: int | None = None
    cache: Literal[None, "prefix", "dual"] = None  # of keys and values, approximate, as Fast-dLLM
    threshold: float | None = None  # fix every token whose top probability exceeds this, too
    temperature: float = 1.0  # below 1 sharper; 0 takes the likeliest token
    top_k: int | None = None  # draw from that many likeliest tokens
    top_p: float | None = None  # draw from the likeliest tokens that together reach this
    nucleus: Literal["inclusive", "exclusive"] = "inclusive"  # as exclusive, ReMDM, BD3-LM: below it
    # ReMDM, masking some tokens again to mend errors: loop (ETA .02), cap (.008), rescale (.015), conf (1).
    remask: str | None = None  # NAME or NAME:ETA
    # Draw a fraction of what is fixed anew: of random tokens in a pass more behind every N passes;
    # or N times at the end, of those that are least likely.
    corrector: str | None = None  # F or F:N, no exact sampler
    refine: str | None = None  # F or F:N
    watch: bool = False  # show the text appearing
    save: str | None = None  # FILE.json: every pass, for study/page.py; FILE.jsonl: the samples
    # Checkpoints, with commas, that write as much as --ckpt, one after the other; a terminal then
    # shows all side by side in real time. gpt ignores flags about passes, all the end of documents.
    race: str | None = None
    score: str | None = None  # text, or a file of UTF-8: its bound in nats; gpt: exact
    given: str | None = None  # text, or a file, that comes before the one scored and is not scored
    draws: int | None = None  # independent noise draws of a score; None: 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, choices = field.name, getattr(self, field.name), get_args(field.type)
            low, high = RANGES.get(name, (0, math.inf))
            fits = name not in RANGES or value is None or low <= value <= high  # NaN does not
            check(fits, name, value, f"must be from {low} to {high}")
            fits = field.type is not Literal[choices] or value in choices
            check(fits, name, value, "there are " + ", ".join(str(c) for c in choices if c))
        for flag, (pattern, example) in PATTERNS.items():
            value = getattr(self, flag)
            check(value is None or re.fullmatch(pattern, value), flag, value, f"write {example}")
        is_ranked, is_plain = self.order in (None, *RANKS), self.order in (None, "ancestral")
        for flag, fits, remedy in (
                ("steps", self.order != "first_hitting", "first_hitting fixes one token a pass"),
                ("threshold", is_ranked, "goes with --order=" + "|".join(RANKS)),
                ("remask", is_plain and self.threshold is None, "has an order of its own")):
            value = getattr(self, flag)
            check(fits or value is None, flag, value, remedy)

    @property
    def order_name(self):
        """The order in use, without train_sedd's."""
        by_steps = "ancestral" if self.remask or self.steps else "first_hitting"
        return self.order or (by_steps if self.threshold is None else "confidence")


RANGES = dict(n=(1, math.inf), length=(1, math.inf), seed=(0, 2**62), steps=(1, math.inf),
              threshold=(0, 1), temperature=(0, math.inf), top_k=(1, math.inf), top_p=(0, 1),
              block_length=(1, math.inf), draws=(2, math.inf))
PATTERNS = dict(
    blank=(r"[1-9]\d*(,[1-9]\d*)*", "a number of tokens, or one for each blank: 8,16"),
    remask=(r"(loop|cap|rescale|conf)(:(0?\.\d+|1))?", "loop, cap, rescale or conf, or cap:0.02"),
    corrector=(r"(0?\.\d+|1)(:[1-9]\d*)?", "a fraction, or 0.2:4 for one in every 4 passes"),
    refine=(r"(0?\.\d+|1)(:[1-9]\d*)?", "a fraction, or 0.2:4 for 4 times"))


class SampleError(ValueError):
    """A user's mistake, in one line that names the flag or file and the remedy."""


def check(condition, flag, value, remedy):
    if not condition:
        raise SampleError(f"--{flag}={value}: {remedy}")


def near(name):
    """The flag that a wrong name was perhaps meant to be."""
    return (difflib.get_close_matches(name, Options.__dataclass_fields__, 1) or ["help"])[0]


def parse_args(argv):
    """Flags --name=value -> Options."""
    fields, given = Options.__dataclass_fields__, {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(__doc__, inspect.getsource(Options).partition("\n    def ")[0], sep="\n")
            raise SystemExit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in fields:
            raise SampleError(f"unknown flag {arg}: did you mean --{near(name)}?")
        kind = (get_args(fields[name].type) or (fields[name].type,))[0]
        check(equals or kind is bool or name == "race", name, "VALUE", "needs a value")
        try:
            value = ("0", "1", "").index(text) > 0 if kind is bool else text
            given[name] = kind(value) if kind in (int, float) else value
        except ValueError:
            kinds = {int: "a whole number", float: "a number", bool: "0 or 1"}
            raise SampleError(f"{arg}: {kinds[kind]} expected") from None
    return make_options(**given)


# Names of published packages.
ALIASES = dict(seq_len="length", confidence_threshold="threshold", corrector_frac="corrector")


def make_options(**how):
    """Options by the flags' names or, from Python, those of published packages."""
    how = {ALIASES.get(name, name): value for name, value in how.items()}
    for name in how.keys() - Options.__dataclass_fields__.keys():
        raise SampleError(f"no {name}: did you mean {near(name)}?")
    for name in {"corrector", "refine", "remask"} & how.keys():
        how[name] = how[name] and str(how[name])
    return Options(**how)


# ----------------------------------------------------------------------------- tokens
class Tokenizer:
    """Text <-> tokens, by the bytes of every token that the checkpoint carries."""
    def __init__(self, meta, mask_id):
        self.name, self.bos_id, self.mask_id = meta["tokenizer"], meta["bos_id"], mask_id
        words = map(chr, range(256)) if self.name == "byte" else meta["token_bytes"]
        self.table = [word.encode("latin-1") for word in words]
        self.table += [b""] * (mask_id - len(self.table))  # ids that stand for no text
        self.table[self.bos_id] = b""
        self.shown = [*self.table, "░".encode()]
        self.shown[self.bos_id] = END
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
        pieces, kind = [], None
        for token, kind in zip(tokens, kinds, strict=True):
            pieces.append((decoder.decode(self.shown[token]), kind))
        pieces.append((decoder.decode(b"", final=True), kind))
        runs = itertools.groupby((p for p in pieces if p[0]), key=lambda piece: piece[1])
        return [("".join(text for text, _ in run), kind) for kind, run in runs]

    def decode(self, tokens):
        return "".join(text for text, _ in self.spans(tokens, [None] * len(tokens)))


# ----------------------------------------------------------------------------- networks
class Reader:
    """The network of one run of fill_blocks: log p of masked tokens. read(tokens (B, S), start,
    rows): at flat positions rows (R,) of the block (B, L) at start -> (R, V).

    It is the attention of Trunk.predict, which keeps keys and values. With train_block the first L
    positions of a pass are the noised block, which is not kept; of the others, as many as fit into
    the context are seen. A model without predict computes all anew every time."""
    def __init__(self, model, cfg, kind, block_len, cache=None):
        self.model, self.cfg, self.L, self.cache = model, cfg, block_len, cache
        self.read, self.is_cached = getattr(self, f"read_{kind}"), hasattr(model, "predict")
        self.n_noised = block_len if kind == "block" else 0
        self.window = cfg.seq_len - self.n_noised
        self.kept = [None] * cfg.n_layer  # (2, B, Hkv, S, d) each; the layer whose turn it is first
        self.done = 0  # positions that went in; of a masked model, where its block began
        self.mask = None  # (.., N, S) of this pass; None: everything is seen
        self.part = 2 * [2**60]  # of what is kept, the positions that this pass replaces

    def __call__(self, q, k, v, ctx):
        """One layer of a pass: q (B, H, N', d), k and v (B, Hkv, N, d) -> (B, H, N', d)"""
        old, new = self.kept.pop(0), torch.stack((k, v)).roll(-self.n_noised, 3)
        if old is not None:
            new = torch.cat((old[..., :self.part[0], :], new, old[..., self.part[1]:, :]), 3)
        clean = new[..., :new.size(3) - self.n_noised, :]
        self.kept.append(clean[..., max(0, clean.size(3) - self.window):, :])
        mask = None if self.mask is None else self.mask[..., :q.size(2), :]
        is_grouped = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, *new, mask, enable_gqa=is_grouped)

    def read_mdlm(self, tokens, start, rows):
        """Reads what is within seq_len of the beginning or, behind that, of the block's end, in the
        rows that are asked for. cache: Fast-dLLM's approximation (2505.22618): after the first pass
        of a block the keys and values before it (prefix) or around it (dual) stay."""
        L, size = self.L, max(self.L, self.cfg.seq_len)
        low = max(0, start + L - size)
        x, at, row = tokens[:, low:low + size], start - low, rows // L
        if self.cache is None:
            live, row = row.unique(return_inverse=True)
            x = x[live]
        S = x.size(1)
        is_again = self.cache and self.done == start + 1
        self.done = start + 1
        self.part = (at, at + L if self.cache == "dual" else S) if is_again else (0, S)
        sigma = -torch.log1p(-(x == self.cfg.vocab_size).sum(1).clamp(min=1) / (S + 1))
        first, last = self.part
        rows = row * (last - first) + at - first + rows % L
        if self.cache is None:
            return self.model(x, sigma, rows).log_softmax(-1)
        positions = torch.arange(first, last, device=x.device)
        logits = self.model.predict(x[:, first:last], positions, sigma, rows, attend=self)
        return logits.log_softmax(-1)

    def read_sedd(self, tokens, start, rows):
        """Under absorb: the log score, times expm1 of the noise that leaves so many masks."""
        T = tokens.size(1)
        sigma = -torch.log1p(-(tokens == self.cfg.vocab_size).sum(1).clamp(min=1) / (T + 1))
        return self.model(tokens, sigma, rows) + torch.expm1(sigma).log()[rows // T, None]

    def read_gpt(self, tokens, start, rows):
        S, done, device = start + 1, self.done, tokens.device
        # (B, S), the start first
        x = F.pad(tokens[:, :start], (1, 0), value=self.cfg.vocab_size)
        if not self.is_cached:
            return self.model(x, (rows + 1) * S - 1).log_softmax(-1)
        new = torch.arange(done, S, device=device)
        self.mask = new[:, None] >= torch.arange(S, device=device) if len(new) > 1 else None
        self.done, last = S, (rows + 1) * (S - done) - 1
        return self.model.predict(x[:, done:], new, rows=last, attend=self).log_softmax(-1)

    def read_block(self, tokens, start, rows):
        """The first pass of a block takes in the finished one before it."""
        cfg, L, T, device = self.cfg, self.L, start + self.L, tokens.device
        tokens = tokens[:, :T]
        if not self.is_cached:
            x = tokens[:, -cfg.seq_len:]
            return self.model(x, x, rows + (rows // L + 1) * (x.size(1) - L)).log_softmax(-1)
        noised, clean = torch.arange(start, T, device=device), torch.arange(start, device=device)
        at = torch.cat((noised, clean[self.done:]))  # (N,)
        seen = torch.cat((clean[max(0, self.done - self.window):], noised))  # (S,)
        self.done = start
        self.mask = None  # a noised block alone sees everything
        if len(at) > L or cfg.doc_mask:
            i, j = at[:, None] // L, seen // L
            self.mask = (j <= i) & (j > i - cfg.seq_len // L)  # (N, S)
        if cfg.doc_mask:  # a noised block goes on with the document before it
            docs = (tokens[:, :start] == cfg.bos_id).cumsum(1)
            before = docs[:, -1:] if start else docs.new_zeros(len(docs), 1)
            docs = torch.cat((docs, before.expand(-1, L)), 1)  # (B, T)
            self.mask = self.mask & (docs[:, None, at, None] == docs[:, None, None, seen])
        logits = self.model.predict(tokens[:, at], at, rows=rows, n_query=L, attend=self)
        return logits.log_softmax(-1)


# ----------------------------------------------------------------------------- samplers
# All take known (B, T) int64 and is_known (B, T) bool -> tokens (B, T), length (B,) of every row,
# number of forward passes. gen (CPU) seeds a generator for each row, so that rows do not depend on
# their batch. warp changes the log-probabilities that tokens are drawn from; watch(tokens (B, T),
# nfe) sees every pass.
def stream(seed, number):
    """One of several generators of a seed. torch keeps 32 bits of what seeds its own."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))


def row_generators(gen, n_rows):
    """Generators of 128 bits each, so that no two rows agree."""
    words = torch.randint(2**32, (n_rows, 4), generator=gen).tolist()
    return [np.random.default_rng(row) for row in words]


def uniforms(gens, *shape):
    """(B, *shape) float64 on the CPU"""
    return torch.from_numpy(np.stack([g.random(shape) for g in gens]))


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
                watch=None, stop=None, until=None, block_len=None, cache=None):
    """Fill in the unknown positions, block after block: those of train_block, or (kind mdlm) the
    whole row or block_len tokens, or (gpt) one token.

    steps=N: ancestral sampling on N equal steps of t (arXiv 2406.07524, eq. 6 with SUBS), each
    masked token drawn with probability (t - s) / t. steps=None: first-hitting (arXiv 2409.02908),
    one uniformly random token a row and pass: as ancestral for N -> inf. choose (see orders, below)
    replaces both. stop=ID: a row ends where that token stands in a finished block, unless it is its
    first or known; it is not counted in the length, and the row is filled up with it. A row ends
    behind a block, too, if until(its tokens up to there)."""
    (B, T), mask_id, device = known.shape, cfg.vocab_size, known.device
    L = cfg.block_len if kind == "block" else 1 if kind == "gpt" else block_len or T
    gens, passes, nfe = row_generators(gen, B), L if steps is None else steps, 0
    warp = warp or same
    whole = -(-T // L) * L  # the last block is written to its end, and cut
    fixed = F.pad(is_known, (0, whole - T))  # (B, whole)
    tokens = F.pad(torch.where(is_known, known, mask_id), (0, whole - T), value=mask_id)
    length = torch.full((B,), T, device=device)
    reader = Reader(model, cfg, kind, L, cache)
    # A prompt that is longer than the context enters the cache of train_block piece by piece.
    known_len = int(is_known.sum(1).min()) // L * L * (kind == "block" and reader.is_cached)
    for end in range(cfg.seq_len, known_len, max(L, cfg.seq_len - L)):
        reader.read(tokens, end - L, tokens.new_zeros(0))
        nfe += 1
    for start in range(0, whole, L):
        here = slice(start, start + L)
        is_empty = not (tokens[:, here] == mask_id).any()
        psi, seen = torch.full((B, L), math.inf, dtype=torch.float64), None
        for i in range(passes):
            pick, u = uniforms(gens, 2, L).unbind(1)  # which are drawn, and as what: (B, L) each
            if is_empty:  # the numbers of later blocks do not depend on it
                continue
            block = tokens[:, here].clone()
            is_mask = block == mask_id
            if choose is not None:
                commit = torch.ones(B, L, dtype=torch.bool)  # chosen from below
            elif steps is None:
                first = pick.masked_fill(~is_mask.cpu(), -1).argmax(1, keepdim=True)
                commit = torch.zeros(B, L, dtype=torch.bool).scatter_(1, first, True)
            else:
                commit = pick * (steps - i) < 1
            rows = (commit.to(device) & is_mask).flatten().nonzero()[:, 0]
            if not len(rows):
                log_probs = torch.zeros(0, mask_id, device=device)
            elif choose is None or seen is None or not torch.equal(block, seen):
                log_all = log_probs = reader.read(tokens, start, rows)  # (R, V)
                nfe, seen = nfe + 1, block
            else:  # a pass without a change
                log_probs = log_all
            if choose is not None:
                is_left = choose(log_probs, is_mask, step=i, steps=steps, u=pick, psi=psi)
                is_left &= ~fixed[:, here] & (i < passes - 1)
                block = torch.where(is_left, mask_id, block)
                psi[is_left.cpu()] = math.inf
                is_drawn = ~is_left.flatten()[rows]
                rows, log_probs = rows[is_drawn], log_probs[is_drawn]
            log_probs = log_probs.log_softmax(-1)
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
                at = torch.where(ends.any(1), start + ends.int().argmax(1), whole)
                if until is not None:
                    hits = [until(row) for row in tokens[:, :start + L].tolist()]
                    at[torch.tensor(hits)] = start + L
                behind = torch.arange(whole, device=device) >= at[:, None]  # (B, whole)
                tokens, fixed = torch.where(behind, stop, tokens), fixed | behind
                length = torch.minimum(length, at)
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


def schedule(total_noise, cfg, passes):
    """sigma at the start of every pass and at the end, and its rate of change (t falls) in each."""
    t = torch.arange(passes, 0, -1, dtype=torch.float64) / passes
    sigmas, slopes = total_noise(t, cfg)
    return [*sigmas.tolist(), 0.0], (slopes / passes).tolist()


@torch.no_grad()
def redraw_rows(model, cfg, known, is_known, *, total_noise, gen, steps=None, is_euler=False,
                warp=None, watch=None, begins=()):
    """train_sedd: steps=N passes (None: T) on N equal steps of t. Each draws every position anew by
    Tweedie's law, the exact one of a position if it moved alone (arXiv 2310.16834, theorem 4.2);
    is_euler: by the rates at the step's start. The last pass denoises: all noise that is left goes
    in one step of Tweedie's. warp acts under absorb on what a mask becomes, not when; under uniform
    on the clean token that the score implies, before the noise of that time; begins [(flat
    positions, warp)] has others for some. total_noise(t, cfg) -> sigma, dsigma/dt"""
    (B, T), V, device = known.shape, cfg.vocab_size, known.device
    passes = T if steps is None else steps
    sigmas, rates = schedule(total_noise, cfg, passes)
    if cfg.graph == "absorb":
        def leave(log_clean, is_mask, *, step, u, **_):
            # Tweedie: expm1(sigma - sigma_next) s_y is the probability of token y.
            share = rates[step] if is_euler else math.expm1(sigmas[step] - sigmas[step + 1])
            p = torch.ones(is_mask.shape, dtype=torch.float64)
            p[is_mask.cpu()] = log_clean.logsumexp(-1).cpu().double().exp()
            return is_mask & (u >= p * share / math.expm1(sigmas[step])).to(device)

        return fill_blocks(model, cfg, known, is_known, kind="sedd", gen=gen, steps=passes,
                           choose=leave, warp=warp, watch=watch)
    gens = row_generators(gen, B)
    start = (uniforms(gens, T) * V).long().to(device)
    tokens = torch.where(is_known, known, start)
    rows = (~is_known).flatten().nonzero()[:, 0]
    for i in range(passes if len(rows) else 0):
        step = sigmas[i], sigmas[i + 1], rates[i] if is_euler and i < passes - 1 else None
        u = uniforms(gens, T)
        log_score = float64(model(tokens, torch.full((B,), sigmas[i], device=device), rows))
        current = tokens.flatten()[rows].to(log_score.device)
        log_law = uniform_law(log_score, current, *step, warp)
        for places, own_warp in begins:
            hit = torch.isin(rows, places)
            log_law[hit] = uniform_law(log_score[hit], current[hit], *step, own_warp)
        drawn = draw_tokens(log_law, u.flatten()[rows.cpu()]).to(device)
        tokens = tokens.flatten().index_put((rows,), drawn).view(B, T)
        if watch is not None:
            watch(tokens, i + 1)
    return tokens, torch.full((B,), T, device=device), passes * bool(len(rows))


# ----------------------------------------------------------------------------- orders
# choose(log_probs (R, V), is_mask (B, L), step, steps, u (B, L), psi (B, L)) -> is_mask after the
# pass. R = is_mask.sum(); log_probs are untempered, so temperature never moves a rank. psi: the
# probability that a token had when it was drawn, infinite where none was.
RANKS = {
    "random": lambda log_probs, u: u,
    "confidence": lambda log_probs, u: log_probs.amax(-1),
    # Drawn with the top probabilities as weights: Gumbel noise on their logarithms.
    "confidence_weighted": lambda log_probs, u: log_probs.amax(-1).cpu() - (-u.log()).log(),
    "entropy": lambda log_probs, u: -torch.special.entr(log_probs.exp()).sum(-1),
    "margin": lambda log_probs, u: log_probs.exp().topk(2).values.diff().neg().squeeze(-1),
}
TIE = 1e-3  # of a rank: smaller differences are rounding, as among the masks of an empty canvas
PACES = {  # share of the tokens that is fixed after a share x of the passes
    "even": lambda x: x,
    "cosine": lambda x: 1 - math.cos(math.pi / 2 * x),
    "cosine2": lambda x: math.sin(math.pi / 2 * x) ** 2,
}
# ReMDM's loop: t, and alpha there; it masks again while alpha stays.
LOOP = (0, 0.05, 0.55, 1), (1, 0.9, 0.9, 0)
REMASK_ETA = {"loop": 0.02, "cap": 0.008, "rescale": 0.015, "conf": 1.0}  # as published


def ordered(name, threshold=None, pace="even"):
    """Fix the best-ranked tokens of each row, as many a pass as the pace says (one, when steps is
    None), and every token whose top probability is above threshold."""
    def choose(log_probs, is_mask, *, step, steps, u, psi=None):
        device, is_mask = is_mask.device, is_mask.cpu()  # where float64 and small sorts are at home
        left = is_mask.sum(1, keepdim=True)  # (B, 1)
        done = [PACES[pace]((step + i) / (steps or math.inf)) for i in range(2)]
        share = (done[1] - done[0]) / (1 - done[0])  # of what is left
        quota = (left.double() * share - 1e-9).ceil().clamp(min=1)
        rank = torch.full(is_mask.shape, -math.inf, dtype=torch.float64)
        rank[is_mask] = RANKS[name](log_probs, u[is_mask]).cpu().double() + TIE * u[is_mask]
        place = rank.argsort(dim=1, descending=True, stable=True).argsort(1)
        commit = place < quota  # (B, L)
        if threshold is not None:
            commit[is_mask] |= (log_probs.amax(-1).exp() > threshold).cpu()
        return (is_mask & ~commit).to(device)

    return choose


def fraction_of(text):
    """F or F:N -> F, N (1)"""
    fraction, _, count = (text or "0").partition(":")
    return float(fraction), int(count or 1)


class Correcting:
    """A choose that lets a pass follow every N of another, in which the fraction F of the tokens
    that were fixed before, random ones, is drawn anew. No exact sampler; it would be a step of
    Gibbs if the network's laws belonged to one joint."""
    def __init__(self, choose, steps, text):
        self.choose, self.steps, (self.fraction, self.every) = choose, steps, fraction_of(text)

    def __call__(self, log_probs, is_mask, *, step, steps, u, psi):
        cycle, place = divmod(step, self.every + 1)
        if place == self.every:
            return is_mask & ~self.again
        step = cycle * self.every + place
        after = self.choose(log_probs, is_mask, step=step, steps=self.steps, u=u, psi=psi)
        if place == self.every - 1:
            n_again = (psi.isfinite().sum(1, keepdim=True) * self.fraction).round()
            place = u.masked_fill(psi.isinf(), 2).argsort(1).argsort(1)
            self.again = (place < n_again).to(after.device)
            after = after | self.again
        return after


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


def make_warp(temperature=1.0, top_k=None, top_p=None, nucleus="inclusive"):
    """A function of log_probs (R, V): temperature, then top-k, then the nucleus, with or without
    (exclusive) the token that crosses top_p. None when all are off."""
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
            above = ranked.exp().cumsum(-1)
            cut = above > top_p if nucleus == "exclusive" else above - ranked.exp() >= top_p
            cut[..., 0] = False
            ranked = ranked.masked_fill(cut, -math.inf)
        return torch.empty_like(log_probs).scatter(-1, index, ranked).log_softmax(-1)

    return warp


def warp_among(log_probs, allowed, warp):
    """Only tokens that are allowed (V,) keep a probability, and then warp."""
    return (warp or same)(log_probs.masked_fill(~allowed, -math.inf).log_softmax(-1))


# ----------------------------------------------------------------------------- model
MASKED = ("block_length", "cache", "refine")  # flags of train_mdlm alone
PASSES = ("order", "steps", "threshold", "pace", "remask", "corrector", *MASKED)  # of diffusion
MASK_ORDERS, SCORE_ORDERS = ("first_hitting", "ancestral", *RANKS), ("tweedie", "euler")
WAYS = {  # how a kind of model writes, the flags that it cannot take, and its orders
    "mdlm": ("tokens in any order", (), MASK_ORDERS),
    "gpt": ("from left to right, one token a pass", (*PASSES, "infill"), ()),
    "block": ("one block after another", ("infill", *MASKED), MASK_ORDERS),
    "sedd": ("all tokens in every pass, by its score",
             ("threshold", "pace", "remask", "corrector", *MASKED), SCORE_ORDERS)}


class Canvas(NamedTuple):
    known: torch.Tensor  # (P, T) int64, the tokens of every prompt
    is_known: torch.Tensor  # (P, T) bool
    begins: dict  # {(prompt, position): the tokens that may stand there (V,) bool}
    lead: int  # tokens at the beginning that are not shown: what begins a document


class Samples(list):
    """Texts; tokens: their lists of ids; ended: did each end before its length; nfe: forward passes
    in all."""


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
        self.n_parameters = sum(p.numel() for p in self.model.parameters())
        self.path = path
        self.summary = (
            f"{path}: {self.name}, {self.n_parameters / 1e6:.2f}M parameters, {averaged} weights of step "
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
        """The prompts, or a text with blanks, and the room behind."""
        self.check_able(opts)
        is_infill, lead = opts.infill is not None, []
        if is_infill:
            texts = [text.replace(r"\_", "_") for text in BLANK.split(opts.infill)]
            blanks = [int(n) for n in opts.blank.split(",")]
            blanks = blanks if len(blanks) > 1 else blanks * (len(texts) - 1)
            check(blanks, "infill", opts.infill, "no blank: write ___ for one")
            fits = len(blanks) == len(texts) - 1
            check(fits, "blank", opts.blank, f"the text has {len(texts) - 1} blanks")
            parts = [[*zip(texts, [*blanks, 0], strict=True)]]
        else:
            parts = [[(text, 0)] for text in opts.prompts or [opts.prompt or ""]]
            if parts == [[("", 0)]] and opts.start == "document":
                lead = [self.tokenizer.bos_id]
        rows, begins = [[*lead] for _ in parts], {}
        for i, (row, pieces) in enumerate(zip(rows, parts, strict=True)):
            for text, n_new in pieces:
                allowed = None
                if n_new or not is_infill or opts.length:
                    text, allowed = self.tokenizer.split_space(text, n_new)
                row += self.tokenizer.encode(text)
                if allowed is not None:
                    begins[i, len(row)] = allowed
                row += [-1] * n_new
        n, limit = max(map(len, rows)), self.cfg.seq_len
        if self.block_len or opts.block_length:
            limit = math.inf
        least = n + (not is_infill or (0, n) in begins)
        default = least if is_infill else min(limit, n + DEFAULT_LENGTH)
        T = opts.length + len(lead) if opts.length else default
        fits = least <= T <= limit
        check(fits, "length", opts.length or T, f"the text takes {n} tokens, the context {limit}")
        rows = torch.tensor([row + [-1] * (T - len(row)) for row in rows])
        return Canvas(rows.clamp(min=0), rows >= 0, begins, len(lead))

    @torch.inference_mode()
    def batches(self, canvas, opts, watch=None, stops=True):
        """Fill each row of the canvas n times; yield ([(tokens, whether it ended)], number of
        forward passes) of as many as fit in a batch. watch(tokens (B, T), nfe) sees every pass.
        stops: at the end of a document, where the model writes in order, and at --stop.

        Sample i depends on (seed, i) alone. A token whose beginning is known is drawn first, so
        that the others follow the conditional given it; a uniform score keeps to it throughout."""
        warp = make_warp(opts.temperature, opts.top_k, opts.top_p, opts.nucleus)
        (P, T), gens = canvas.known.shape, [stream(opts.seed, i) for i in range(2)]
        begins = [(at, functools.partial(warp_among, allowed=allowed.to(self.device), warp=warp),
                   stream(opts.seed, 2 + i))
                  for i, (at, allowed) in enumerate(canvas.begins.items())]
        how = dict(stop=self.tokenizer.bos_id) if stops else {}
        if stops and opts.stop:
            how["until"] = functools.partial(self.find_stop, stop=opts.stop)
        size = min(MAX_ROWS, self.batch_rows(min(T, self.cfg.seq_len)))
        for ids in (torch.arange(P * opts.n) // opts.n).split(size):
            x, given = (t[ids].to(self.device) for t in canvas[:2])
            nfe, how["begins"] = 0, []
            with self.amp():
                for (prompt, at), own_warp, gen in begins:
                    hit = (ids == prompt).nonzero()[:, 0].to(self.device)
                    how["begins"].append((hit * T + at, own_warp))
                    if self.graph == "uniform" or not len(hit):
                        continue
                    end = at + 1 if self.kind in ("gpt", "block") else T  # of what the token sees
                    there = x[hit, :end], given[hit, :end]
                    drawn, _, n = self.fill(*there, Options(steps=1), gen, own_warp)
                    x[hit, at], given[hit, at], nfe = drawn[:, at], True, nfe + n
                tokens, keep = x, given
                fraction, n_refine = fraction_of(opts.refine)
                for i in range(1 + n_refine * (fraction > 0)):
                    if i:
                        keep, n = self.likeliest(tokens, given, fraction)
                        nfe += n
                    look = watch and (lambda tokens, n, nfe=nfe: watch(tokens, nfe + n))
                    tokens, length, n = self.fill(
                        tokens, keep, opts, gens[i > 0], warp, look, **how)
                    nfe += n
            rows = []
            for row, n, known in zip(tokens.tolist(), length.tolist(), given.tolist(), strict=True):
                n = min(n, self.find_stop(row[:n], known, opts.stop) or n)
                rows.append((row[canvas.lead:n], n < T))
            yield rows, nfe

    def fill(self, known, is_known, opts, gen, warp, watch=None, begins=(), **ends):
        """One run of a sampler."""
        how, steps, choose = dict(gen=gen, warp=warp, watch=watch), opts.steps, None
        if self.kind == "sedd":
            return redraw_rows(self.net, self.cfg, known, is_known, **how, steps=steps,
                               total_noise=self.script.total_noise, is_euler=opts.order == "euler",
                               begins=begins)
        if self.kind == "mdlm":
            ends = dict(block_len=opts.block_length, cache=opts.cache)
        most = max(1, int((~is_known).sum(1).max()))
        most = min(most, self.block_len or opts.block_length or most)
        if opts.order_name == "ancestral":
            steps = steps or most
        if opts.order_name in RANKS:
            choose = ordered(opts.order_name, opts.threshold, opts.pace)
        elif opts.remask:
            choose = remasking(opts.remask)
        if opts.corrector:
            choose = Correcting(choose or (remasking("cap:0") if steps else ordered("random")),
                                steps, opts.corrector)
            steps = (steps or most) // choose.every + (steps or most)
        return fill_blocks(self.net, self.cfg, known, is_known, kind=self.kind, steps=steps,
                           choose=choose, **how, **ends)

    def find_stop(self, row, known, stop):
        """How many tokens of a row come before what stops it in what is new, or None."""
        begin = known.index(False) if False in known else len(known)
        words = [self.tokenizer.table[token] for token in row[begin:]]
        text, ends = b"".join(words), [*itertools.accumulate(map(len, words))]
        stop = [stop] if isinstance(stop, str) else stop or ()
        found = [at for x in stop if (at := text.find(x.encode())) >= 0]
        return begin + bisect.bisect(ends, min(found)) if found else None

    def likeliest(self, tokens, is_known, fraction):
        """What to keep (B, T) when a fraction is predicted anew, and the passes spent.

        Two passes score every token: every second one is masked, then the others, so that each is
        judged with its neighbours in sight."""
        is_free = ~is_known
        score = torch.full(tokens.shape, math.inf, device=tokens.device)
        parity = is_free.cumsum(1) % 2
        halves = [half for odd in (1, 0) if (half := is_free & (parity == odd)).any()]
        for half in halves:
            masked = torch.where(half, self.cfg.vocab_size, tokens)
            reader = Reader(self.net, self.cfg, "mdlm", tokens.size(1))
            log_probs = reader.read(masked, 0, half.flatten().nonzero()[:, 0])
            score[half] = log_probs.gather(1, tokens[half][:, None])[:, 0]
        n_again = (is_free.sum(1, keepdim=True) * fraction).round().clamp(min=1)  # (B, 1)
        place = score.argsort(dim=1, stable=True).argsort(1)
        return is_known | (place >= n_again), len(halves)

    def generate(self, prompt="", **how):
        """n texts of `length` tokens that begin with the prompt, or with each of a list of prompts;
        `how`: the flags' names -> Samples"""
        name = "prompt" if isinstance(prompt, str) else "prompts"
        return self.samples(make_options(**{name: prompt}, **how))

    def infill(self, text, blank=16, **how):
        """n versions of a text, its blanks (___) filled with `blank` tokens, an int or a list."""
        blank = ",".join(map(str, [blank] if isinstance(blank, int) else blank))
        return self.samples(make_options(infill=text, blank=blank, **how))

    def samples(self, opts):
        batches = [*self.batches(self.canvas(opts), opts)]
        rows = [row for rows, _ in batches for row in rows]
        out = Samples(self.tokenizer.decode(tokens) for tokens, _ in rows)
        out.tokens, out.ended = map(list, zip(*rows, strict=True))
        out.texts, out.nfe = list(out), sum(nfe for _, nfe in batches)
        return out

    def draw_noise(self, cfg, n_rows, n_given, gen):
        """Noise of the bound, which leaves the first n_given tokens of every row as they are."""
        def draw(n):
            return self.script.draw_noise(dataclasses.replace(cfg, seq_len=n), n_rows, gen, True)

        T, L = cfg.seq_len, self.block_len or 1
        if self.kind == "gpt" or not n_given:
            return draw(T)
        if self.kind == "mdlm":
            noise = draw(T - n_given)
            score = F.pad(noise.score, (n_given, 0), value=math.inf)
            return noise._replace(score=score, sigma=-torch.log1p(-noise.level / (T + 1)))
        n_own = min(-n_given % L, T - n_given)  # in the block where the given ones end
        noises = [draw(n) for n in (n_own, T - n_given - n_own) if n]
        level, weight, score = (torch.cat(x, 1) for x in zip(*noises, strict=True))
        level, weight = (F.pad(x, (n_given // L, 0)) for x in (level, weight))
        return type(noises[0])(level, weight, F.pad(score, (n_given, 0), value=math.inf))

    @torch.inference_mode()
    def score(self, text, given="", draws=None, seed=0):
        """-log p of a text, given another one before it, both cut into windows of seq_len tokens
        (the last may be shorter): nats, nats_stderr, bits_per_byte, bits_stderr, n_tokens, n_bytes.

        A bound, with its standard error over independent draws of noise, each of which masks every
        window twice, as an antithetic pair. gpt: one pass without noise, exact."""
        is_exact, T = self.kind == "gpt", self.cfg.seq_len
        check(draws is None or not is_exact, "draws", draws, f"{self.name} needs no noise: drop it")
        check(not given or self.kind != "sedd", "given", given, f"{self.name} has no such bound")
        n_draws, n_copies = (1, 1) if is_exact else (draws or DEFAULT_DRAWS, 2)
        new, known = self.tokenizer.encode(text), self.tokenizer.encode(given)
        check(new, "score", text, "the text is empty")
        tokens, gen = known + new, stream(seed, 0)
        totals = torch.zeros(n_draws, dtype=torch.float64)
        # The window in which the given text ends, whole ones, and what is left.
        first = len(known) // T * T
        second = min(first + T, len(tokens)) if first < len(known) else first
        third = max(second, len(tokens) // T * T)
        for begin, end in ((first, second), (second, third), (third, len(tokens))):
            if begin == end:
                continue
            n_given = max(0, len(known) - begin)
            cfg = dataclasses.replace(self.cfg, seq_len=min(end - begin, T))
            x0 = torch.tensor(tokens[begin:end]).view(-1, cfg.seq_len)
            x0 = x0.repeat_interleave(n_copies, 0).to(self.device)
            for draw in range(n_draws):
                noise = self.draw_noise(cfg, len(x0), n_given, gen)
                for rows in torch.arange(len(x0)).split(self.batch_rows(cfg.seq_len)):
                    piece = self.script.take_rows(noise, rows, self.device)
                    with self.amp():
                        nats = self.script.nelbo_fn(self.model, x0[rows], piece, cfg)
                        if is_exact and n_given:
                            nats -= self.script.nelbo_fn(self.model, x0[:, :n_given], piece, cfg)
                    totals[draw] += nats.cpu().double().sum() / n_copies
        nats, n_bytes = totals.mean().item(), sum(len(self.tokenizer.table[i]) for i in new)
        stderr = totals.std().item() / math.sqrt(n_draws) if n_draws > 1 else 0.0
        bits = 1 / (math.log(2) * n_bytes)
        return SimpleNamespace(nats=nats, nats_stderr=stderr, bits_per_byte=nats * bits,
                               bits_stderr=stderr * bits, n_tokens=len(new), n_bytes=n_bytes)


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
            note(f"no checkpoint in out/: {SHIPPED[0]}")
            return SHIPPED[0]
    if not str(name).startswith("hf:"):
        return Path(name, "ckpt.pt") if os.path.isdir(name) else Path(name)
    hub_name = re.fullmatch(r"hf:([^/]+/[^/]+)/(.+)", name)
    check(hub_name, "ckpt", name, "write hf:OWNER/REPO/FILE")
    with naming(f"{name}: could not be downloaded"):
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(*hub_name.groups()))


def load_module(path):
    spec = importlib.util.spec_from_file_location(f"sampled_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path += {str(Path(path).resolve().parent), str(HERE)}.difference(sys.path)  # for muon
    spec.loader.exec_module(module)
    return module


def load_script(path):
    """Import a training script from its file."""
    with naming(f"--script={path}"):
        script = load_module(path)
    check(hasattr(script, "nelbo_fn"), "script", path, "not a training script")
    return script


def read_checkpoint(path, module):
    """By any training script, whose text is the same; or an artifact of study/golf.py."""
    with open(path, "rb") as f:
        is_artifact = f.read(2) != b"PK"
    if is_artifact:
        golf = load_module(HERE / "study/golf.py")
        if golf.is_artifact(path):
            return golf.read(path)
    return module.load_checkpoint(path)


def load(path=None, script=None, opts=None, **how):
    """LM from a checkpoint: PATH, its folder or hf:OWNER/REPO/FILE; None: the newest in out/.
    script: the file that wrote it, when it is not one of ours. how: weights, device, dtype."""
    opts, path = opts or make_options(**how), find_checkpoint(path)
    module = load_script(script or HERE / f"{SCRIPTS[0]}.py")
    with naming(path):
        ckpt = read_checkpoint(path, module)
        name = ckpt["script"]
        is_right = name == Path(script).stem if script else name in SCRIPTS
        check(is_right, "ckpt", path, f"written by {name}.py: pass that file as --script=PATH")
        return LM(module if script else load_script(HERE / f"{name}.py"), ckpt, path, opts)


load_model = load  # as published packages name it


def sample(model, prompt="", **how):
    """Texts from a model of load()."""
    return model.generate(prompt, **how)


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
    line, with --watch the text below it. For a race or a file it keeps every pass. Its clock stands
    still while it does that."""
    def __init__(self, lm, opts, is_race=False):
        self.lm, self.opts, self.is_race, self.canvas = lm, opts, is_race, lm.canvas(opts)
        self.mask_id, self.lead = lm.cfg.vocab_size, self.canvas.lead
        rows = torch.where(self.canvas.is_known, self.canvas.known, self.mask_id)[:, self.lead:]
        self.starts = [row for row in rows.tolist() for _ in range(opts.n)]
        self.about = dict(name=lm.path.absolute().parent.name, script=lm.name, parameters=lm.n_parameters,
                          sampler=lm.describe(opts), seed=opts.seed, device=lm.where)
        self.nfe, self.seconds, self.entropy, self.n_new, self.n_done = 0, 0.0, 0.0, 0, 0

    def samples(self):
        """Write; yield of every sample what files say of it."""
        known, is_known = self.canvas[:2]
        if self.is_race:  # the end of a document stops none; and some tokens to warm up
            is_known = is_known | (torch.arange(known.size(1)) < known.size(1) - WARM_UP)
            warm = self.canvas._replace(is_known=is_known, begins={})
            list(self.lm.batches(warm, self.opts, stops=False))
        self.rest()
        for rows, nfe in self.lm.batches(self.canvas, self.opts, self, not self.is_race):
            self.seconds += time.perf_counter() - self.since
            self.nfe += nfe
            redraw([], self.height, sys.stderr)
            for i, (row, ended) in enumerate(rows):
                start = self.starts[self.n_done][:len(row)]
                known = [[at, token] for at, token in enumerate(start) if token != self.mask_id]
                new = [token for token, old in zip(row, start, strict=True) if old == self.mask_id]
                # Entropy of the tokens' frequencies, low when a sample repeats itself.
                shares = torch.tensor(new).bincount() / max(1, len(new))
                self.entropy += torch.special.entr(shares).sum().item()
                self.n_done, self.n_new = self.n_done + 1, self.n_new + len(new)
                yield dict(sample=self.n_done - 1, length=len(row), known=known, nfe=nfe,
                           seconds=round(self.seconds - self.begun, 6),
                           frames=self.frames(i, start), tokens=row, ended=ended)
            self.rest()

    def rest(self):
        """Before a batch nothing is drawn."""
        self.height, self.drawn, self.last, self.passes = 0, -math.inf, None, []
        self.first, self.begun, self.since = self.n_done, self.seconds, time.perf_counter()

    def frames(self, i, before):
        """[[pass, milliseconds, [[position, token, or -1: masked again]..]]..] of row i."""
        frames = []
        for nfe, seconds, rows in self.passes:
            pairs = enumerate(zip(rows[i], before, strict=False))
            changes = [[at, -1 if new == self.mask_id else new] for at, (new, old) in pairs
                       if new != old]
            if changes:
                frames.append([nfe, round(1000 * seconds, 3), changes])
            before = rows[i][:len(before)]
        return frames

    def __call__(self, tokens, nfe):
        rows = tokens[:, self.lead:].tolist()  # waits for the device
        self.seconds += time.perf_counter() - self.since
        if self.is_race or self.opts.save:
            self.passes.append((nfe, self.seconds - self.begun, rows))
        if is_terminal(sys.stderr) and time.monotonic() - self.drawn >= FRAME:
            width = shutil.get_terminal_size().columns
            lines = [styled(f"{self.lm.name}: {nfe} passes", "note")]
            is_shown = self.opts.watch and not self.is_race
            for texts in zip(rows, self.last or rows, self.starts[self.first:], strict=False):
                lines += ["", *lines_of(self.spans(*texts), width)] if is_shown else []
            self.height, self.last = redraw(lines, self.height, sys.stderr), rows
            self.drawn = time.monotonic()
        self.since = time.perf_counter()

    def spans(self, row, before, start):
        """[(text, kind)] of a row, without what fills it behind its end."""
        bos_id = self.lm.tokenizer.bos_id
        n = max((i + 1 for i, token in enumerate(row) if token != bos_id), default=0)
        kinds = ["mask" if token == self.mask_id else "known" if given != self.mask_id
                 else "new" if token != old else None
                 for token, old, given in zip(row, before, start, strict=False)]
        return self.lm.tokenizer.spans(row[:n], kinds[:n])

    def column(self, sample, now, width):
        """Lines that show how far a sample was at a time: counters, and text."""
        start = self.starts[sample["sample"]]
        nfe, row, before = 0, start, start
        for frame in sample["frames"]:
            if frame[1] <= 1000 * now:
                nfe, before, row = frame[0], row, [*row]
                for at, token in frame[2]:
                    row[at] = self.mask_id if token < 0 else token
        before = row if now >= sample["seconds"] else before
        counters = f"{nfe} passes, {min(now, sample['seconds']):.1f} s\n\n"
        spans = [(f"{self.lm.name}\n", "known"), (counters, "note"),
                 *self.spans(row, before, start)]
        return lines_of(spans, width)


def save(path, runs):
    """Write [(Run, its samples)] to a file.

    FILE.jsonl: a line about a run: name, script, parameters, sampler, seed, device, checkpoint
    (sha256), tokenizer; and one for each of its samples: sample, length, known, nfe, seconds,
    tokens, ended, text. FILE.json: every pass, which study/page.py shows:

    {"format": 1, "mask": -1, "tokens": {"id": "its bytes as Latin-1"}, "runs": [{"name", "script",
    "parameters", "sampler", "seed", "device", "sample", "length", "known": [[position, id]..],
    "nfe", "seconds", "frames": [[pass, milliseconds, [[position, id]..]]..]}..]}

    A sample begins with its known tokens, all else is masked; every frame says what changed, id -1
    for what was masked again. Behind the last frame it is the sample."""
    entries, lines, used = [], [], set()
    tokenizer = runs[0][0].lm.tokenizer
    for run, samples in runs:
        sha = hashlib.sha256(run.lm.path.read_bytes()).hexdigest()
        lines.append({**run.about, "checkpoint": sha, "tokenizer": tokenizer.name})
        for sample in samples:
            entry = dict(sample)
            tokens, frames, ended = (entry.pop(x) for x in ("tokens", "frames", "ended"))
            lines.append({**entry, "tokens": tokens, "ended": ended, "text": tokenizer.decode(tokens)})
            entries.append({**run.about, **entry, "frames": frames})
            used.update(tokens, *([token for _, token in frame[2]] for frame in frames))
    table = {str(i): tokenizer.shown[i].decode("latin-1") for i in sorted(used - {-1})}
    whole = dict(format=1, mask=-1, tokens=table, runs=entries)
    lines = lines if str(path).endswith(".jsonl") else [whole]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# ----------------------------------------------------------------------------- race
WARM_UP = 8  # tokens that a model writes before its clock starts
MIN_COLUMN = 24  # cells, of a text beside another
BAR = " │ "  # between the two


def replay(firsts):
    """Draw [(Run, its first sample)] side by side in real time; the last picture stays, whole."""
    start, now, height = time.monotonic(), 0.0, 0
    end = max(sample["seconds"] for _, sample in firsts)
    while now < end:
        now = min(end, time.monotonic() - start)
        step = (shutil.get_terminal_size().columns + len(BAR)) // len(firsts)
        columns = [run.column(sample, now, step - len(BAR)) for run, sample in firsts]
        bars = ["", *(f"\x1b[{i * step - len(BAR) + 1}G{BAR}" for i in range(1, len(firsts)))]
        lines = ["".join(map("".join, zip(bars, cells, strict=True)))
                 for cells in itertools.zip_longest(*columns, fillvalue="")]
        height = redraw(lines, height, sys.stdout, is_last=now == end)
        time.sleep(FRAME)
    print("\n")


def print_race(opts):
    paths = opts.race.split(",") if opts.race else SHIPPED[1:]
    others = [load(path, None, opts) for path in paths]
    lms = [load(opts.ckpt or (None if opts.race else SHIPPED[0]), opts.script, opts), *others]
    for lm in others:
        fits = lm.tokenizer.table == lms[0].tokenizer.table
        check(fits, "race", opts.race, f"the tokens of {lm.name} are not those of {lms[0].name}")
    plain = dataclasses.replace(opts, **{name: getattr(Options, name) for name in PASSES})
    canvases = [lm.canvas(plain) for lm in lms]
    length = min(canvas.known.size(1) - canvas.lead for canvas in canvases)
    runs = [Run(lm, dataclasses.replace(plain if lm.kind == "gpt" else opts, length=length), True)
            for lm in lms]
    note("\n".join(lm.summary for lm in lms))
    note(f"{opts.n} x {length} tokens, {lms[0].where}, one model after another\n")
    done = [(run, [*run.samples()]) for run in runs]
    firsts = [(run, samples[0]) for run, samples in done]
    if is_terminal(sys.stdout) and shutil.get_terminal_size().columns >= MIN_COLUMN * len(lms):
        replay(firsts)
    else:
        for run, sample in firsts:
            text = run.lm.tokenizer.decode(sample["tokens"])
            show([(f"--- {run.lm.name}\n{text}\n", None)], sys.stdout)
    print(f"{'':12}  passes  seconds  tokens/s  entropy")
    for run in runs:
        print(f"{run.lm.name:12}  {run.nfe:6}  {run.seconds:7.2f}  {run.n_new / run.seconds:8.0f}  "
              f"{run.entropy / run.n_done:.2f} nats, {run.about['sampler']}")
    if opts.save:
        save(opts.save, done)


# ----------------------------------------------------------------------------- command line
def read_text(path):
    with naming(path):
        return Path(path).read_text(encoding="utf-8")


def text_of(text):
    return read_text(text) if os.path.isfile(text) else text


def print_score(lm, opts):
    is_file = os.path.isfile(opts.score)
    score = lm.score(text_of(opts.score), text_of(opts.given or ""), opts.draws, opts.seed)
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
    run, kept = Run(lm, opts), []
    note(lm.summary)
    n = len(run.starts)
    for sample in run.samples():
        if n > 1:
            note(f"--- sample {run.n_done} of {n}")
        tokens, given = sample["tokens"], {at for at, _ in sample["known"]}
        kinds = ["known" if at in given else None for at in range(len(tokens))]
        show(lm.tokenizer.spans(tokens, kinds) + [("\n", None)] * (n > 1), sys.stdout)
        kept += [sample] if opts.save else []
    if opts.save:
        save(opts.save, [(run, kept)])
    note(f"NFE {run.nfe}, {run.n_new / run.seconds:.0f} tokens/s, {lm.where}, "
         f"{lm.describe(opts)}, entropy {run.entropy / run.n_done:.2f} nats")


def main(argv):
    try:
        opts = parse_args(argv)
        modes = [flag for flag in ("infill", "score", "prompt", "prompts", "race")
                 if getattr(opts, flag) is not None]
        if len(modes) > 1 and modes != ["prompt", "race"]:
            raise SampleError(f"--{' and --'.join(modes)} exclude each other: drop one")
        for flag in ("draws", "given"):
            value = getattr(opts, flag)
            check(value is None or "score" in modes, flag, value, "goes with --score")
        fits = opts.save is None or re.search(r"\.jsonl?$", opts.save)
        check(fits, "save", opts.save, "a FILE.json or a FILE.jsonl")
        if opts.prompts is not None:
            lines = [json.loads(line) for line in read_text(opts.prompts).splitlines()]
            prompts = [line if isinstance(line, str) else line["prompt"] for line in lines]
            opts = dataclasses.replace(opts, prompts=prompts)
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
