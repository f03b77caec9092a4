"""Sample from a checkpoint: generate, infill, watch, score; race one against another.

    python sample.py                                         newest checkpoint in out/
    python sample.py --prompt="def " --n=4 --length=256      tokens of a sample, prompt included
    python sample.py --infill="def ___(self):" --blank=8     ___ is a blank of 8 tokens
    python sample.py --order=confidence --threshold=0.9 --watch
    python sample.py --steps=128 --remask=loop
    python sample.py --score=FILE --given=FILE               bound on -log p of a text
    python sample.py --ckpt=out/demo --race=out/gpt --steps=64

Without a checkpoint in out/, the models that come with the repository write. gpt.py writes from
left to right, train_block.py block after block, at any length; both stop at the end of a document.
train_sedd.py draws all tokens anew in each pass. A space before a blank or at the end of a prompt
becomes the beginning of what is written, as GPT-2's words begin with theirs. Samples, scores and
tables go to stdout, all else to stderr. Nothing in a checkpoint is run. From Python:

    lm = sample.load("out/demo/ckpt.pt")
    texts = lm.generate(["def ", "class "], n=4, stop=["return"])  # texts.tokens, .ended, .nfe
    lm.infill("def ___(x):", blank=8)
    lm.score("some text", given="what comes before it").bits_per_byte
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
    for number in (signal.SIGINT, getattr(signal, "SIGPIPE", signal.SIGINT)):
        signal.signal(number, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SCRIPTS = ("train_mdlm", "train_block", "train_sedd", "gpt")
SHIPPED = HERE / "models/mdlm.golf", HERE / "models/block.golf"
DEFAULT_LENGTH = 256
BATCH_NUMBERS = 2**27  # logits, or attention scores of a layer, in one forward pass
MAX_ROWS = 512  # samples at once, so that the first of many are soon there
END = b"<|endoftext|>"  # how the end of a document is shown
BLANK = re.compile(r"(?<!\\)_{3,}")  # \_ is an underscore
FILE_NAME = re.compile(r"\S*/\S*|\S+\.(txt|md|py|html?|jsonl?|[ct]sv|log|gz|xz|zst|bz2|zip)")


# ----------------------------------------------------------------------------- flags
@dataclasses.dataclass(frozen=True)
class Options:
    """Every flag, --name=value."""
    ckpt: str = ""  # checkpoint, its folder, artifact, or hf:OWNER/NAME[/FILE]; empty: the newest
    script: str = ""  # training script that wrote it, when that is an edited one
    weights: Literal["ema", "raw"] = "ema"  # averaged, where there are some, or those of the end
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: as trained, where the machine is fast
    prompt: str = ""  # text to continue
    prompts: str = ""  # file of it; .jsonl: of several, a text or {"prompt": text} a line
    start: Literal["document", "anywhere"] = "document"  # where a text without a prompt begins
    infill: str = ""  # text with blanks: each run of three or more underscores; \_ is none
    blank: str = "16"  # tokens in a blank, for all of them or one by one: N[,N..]
    n: int = 1  # samples, of every prompt
    length: int = 0  # tokens in a sample; 0: 256 new ones, up to the context, or those of --infill
    stop: str = ""  # a sample ends before this text; from Python also a list of texts
    seed: int = 0  # the same seed gives the same samples, however many there are
    # Exact: first_hitting (default: a random token a pass) and, for many steps, ancestral (default
    # with --steps), random. Mode-seeking, not samples of the model's law: confidence (default with
    # --threshold), confidence_weighted (draws positions), entropy, margin. SEDD: tweedie, euler
    order: str = ""
    steps: int = 0  # passes, or passes in each block; 0: one a token
    pace: Literal["even", "cosine", "cosine2"] = "even"  # of the orders that rank, over the passes
    # train_mdlm in blocks from left to right, as LLaDA, and of any length. No exact sampler.
    block_length: int = 0
    # Approximate, and faster (arXiv 2505.22618): within a block of block_length, all passes use the
    # first one's keys and values of what stands before it (prefix), or around it (dual).
    cache: Literal["", "prefix", "dual"] = ""
    threshold: float = 0.0  # fix every token whose top probability exceeds this, too; 0: off
    temperature: float = 1.0  # below 1 sharper; 0 takes the likeliest token
    top_k: int = 0  # draw from that many likeliest tokens
    top_p: float = 1.0  # draw from the likeliest tokens that together reach this
    # Whether the token that crosses top_p counts; in the programs of ReMDM and BD3-LM it does not.
    nucleus: Literal["inclusive", "exclusive"] = "inclusive"
    # ReMDM, masks some tokens again: loop (ETA .02), cap (.008), rescale (.015) or conf (1).
    remask: str = ""  # NAME or NAME:ETA
    refine: str = ""  # F or F:N: at the end, predict a fraction F, the least likely, anew; N times
    # F[:EVERY[:random|least]]: after every EVERY-th pass, predict a fraction F of what is written,
    # random (default) or the least likely, anew in a pass of its own. No exact sampler, since a
    # network's conditionals do not belong to one distribution.
    corrector: str = ""
    watch: bool = False  # show the text appearing, in a terminal
    # FILE.json: every pass, for study/page.py; FILE.svg: an animation of the first sample; another
    # FILE: samples, JSON lines.
    save: str = ""
    # Checkpoints, with commas, that write as much as --ckpt; a terminal then shows all side by side
    # in real time. gpt ignores flags about passes. --race alone: the models of the repository.
    race: str = ""
    score: str = ""  # text or file: its bound in nats and bits per byte; gpt: exact
    given: str = ""  # text or file that comes before the one scored
    draws: int = 8  # independent noise draws of a score
    encoding: str = ""  # of files; empty: UTF-8, or UTF-16 after its mark

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, choices = field.name, getattr(self, field.name), get_args(field.type)
            high = 1 if name in ("threshold", "top_p") else math.inf
            low = int(name in ("n", "draws"))
            fits = not isinstance(value, int | float) or low <= value <= high
            check(fits, name, value, f"must be from {low} to {high}")  # NaN is not
            fits = not choices or value in choices
            check(fits, name, value, f"there are {', '.join(filter(None, choices))}")
        for flag, parse in dict(blank=numbers, refine=refinement, corrector=correction,
                                remask=remasking).items():
            text = getattr(self, flag)
            with naming(f"--{flag}={text}"):
                parse(text)
        check(self.order != "first_hitting" or not self.steps, "steps", self.steps,
              "first_hitting fixes one token a pass: drop it")
        check(not self.threshold or self.order in ("", *RANKS), "threshold", self.threshold,
              f"goes with --order={'|'.join(RANKS)}")
        check(self.block_length or not self.cache, "cache", self.cache, "goes with --block_length")
        is_plain = self.order in ("", "ancestral") and not self.threshold
        check(is_plain or not self.remask, "remask", self.remask, "has an order of its own")

    @property
    def order_name(self):
        """The order in use, without train_sedd's."""
        by_steps = "ancestral" if self.remask or self.steps else "first_hitting"
        return self.order or ("confidence" if self.threshold else by_steps)

class SampleError(ValueError):
    """A user's mistake, in one line that names the flag or file and the remedy."""

def check(condition, flag, value, remedy):
    if not condition:
        raise SampleError(f"--{flag}={value}: {remedy}")

@contextlib.contextmanager
def naming(name):
    """Name the file or flag in whatever goes wrong inside: a checkpoint may hold anything."""
    try:
        yield
    except Exception as e:
        line = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise SampleError(line if line.startswith(str(name)) else f"{name}: {line}") from None

def numbers(text):
    """N[,N..] -> [N, ..], of tokens in a blank"""
    return [int(n) for n in text.split(",")]

def fraction_of(text, *defaults):
    """F[:A[:B]] -> F, A, B, or the defaults of what is missing behind F"""
    fraction, *given = str(text or 0).split(":")
    if not 0 <= float(fraction) <= 1:
        raise ValueError("a fraction is from 0 to 1")
    given = [type(default)(x) for x, default in zip(given, defaults, strict=False)]
    return float(fraction), *given, *defaults[len(given):]

def refinement(text):
    """F[:N] -> F, N"""
    return fraction_of(text, 1)

def correction(text):
    """F[:EVERY[:random|least]] -> F, EVERY, MODE"""
    fraction, every, mode = fraction_of(text, 1, "random")
    if every < 1 or mode not in ("random", "least"):
        raise ValueError("write F:EVERY:random or F:EVERY:least")
    return fraction, every, mode

ALIASES = dict(  # of published packages
    seq_len="length", confidence_threshold="threshold", corrector_frac="corrector",
    prompt_file="prompts", score_file="score")

def make_options(**how):
    """Options by the flags' names or, from Python, those of published packages."""
    how = {ALIASES.get(name, name): value for name, value in how.items()}
    for name in how.keys() - Options.__dataclass_fields__.keys():
        near = *difflib.get_close_matches(name, Options.__dataclass_fields__, 1), "help"
        raise SampleError(f"unknown flag --{name}: did you mean --{near[0]}?")
    return Options(**how)

def parse_args(argv):
    """Flags --name=value -> Options."""
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(__doc__, inspect.getsource(Options).partition("\n    def ")[0], sep="\n")
            raise SystemExit(0)
        name, _, text = arg.removeprefix("--").partition("=")
        kind = type(getattr(Options, name, ""))
        text = text or "shipped" * (name == "race")
        check(text or kind is bool, name, text, "needs a value")
        with naming(arg):
            given[name] = text != "0" if kind is bool else kind(text)
    return make_options(**given)


# ----------------------------------------------------------------------------- tokens
class Tokenizer:
    """Text <-> tokens, by the bytes of every token that the checkpoint carries."""
    def __init__(self, meta, mask_id):
        self.name, self.bos_id = meta["tokenizer"], meta["bos_id"]
        words = map(chr, range(256)) if self.name == "byte" else meta["token_bytes"]
        self.table = [word.encode("latin-1") for word in words]
        self.table += [b""] * (mask_id - len(self.table))  # ids that stand for no text
        self.table[self.bos_id] = b""
        self.shown = [*self.table, "░".encode()]
        self.shown[self.bos_id] = END
        # Text -> tokens. Where they are bytes, NUL begins a document.
        self.encode = lambda text: list(text.encode(errors="replace"))
        if self.name != "byte":
            import tiktoken

            encoding = tiktoken.Encoding(
                self.name, pat_str=meta["pattern"], special_tokens={},
                mergeable_ranks={word: i for i, word in enumerate(self.table) if word})
            self.encode = encoding.encode_ordinary

    def split_space(self, text, is_single):
        """A text with more to follow -> (what is known, which tokens (V,) may be next, or None): a
        last space, or the last of several white-space characters, begins a token as GPT-2 cuts
        them. A single token is more than that space."""
        found = re.search(r" \Z|(?<=\s)\s\Z", text, re.A)
        space, least = found[0].encode() if found else b"", 2 if is_single else 1
        allowed = [word.startswith(space) and len(word) >= least for word in self.table]
        return (text[:-1], torch.tensor(allowed)) if found and sum(allowed) > 1 else (text, None)

    def spans(self, tokens, kinds):
        """[(text, kind)] of a row: characters take the kind of the token that completes them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        words = [*(self.shown[token] for token in tokens), b""]
        return [(decoder.decode(word, final=not word), kind)
                for word, kind in zip(words, [*kinds, False], strict=True)]

    def decode(self, tokens):
        return b"".join(self.shown[token] for token in tokens).decode(errors="replace")


# ----------------------------------------------------------------------------- networks
class Reader:
    """The network of one run of fill_blocks: log p of masked tokens. read(tokens (B, S), start,
    rows): at flat positions rows (R,) of the block (B, L) at start -> (R, V).

    It is the attention of Trunk.predict, which keeps keys and values, but of what comes first in a
    pass and is computed anew in each, as train_block's noised block. As many are seen as fit into
    the context. A model without predict computes all anew."""
    def __init__(self, model, cfg, kind, block_len, cache=""):
        self.model, self.cfg, self.L, self.cache = model, cfg, block_len, cache
        self.kind, self.is_cached = kind, hasattr(model, "predict")
        self.read = getattr(self, f"read_{kind}", self.read_row)
        self.n_noised = block_len * (kind == "block")  # positions of a pass that are not kept
        self.window = cfg.seq_len - self.n_noised
        self.kept = [None] * cfg.n_layer  # (2, B, Hkv, S, d) each; the layer whose turn it is first
        self.done = 0  # positions that went in
        self.live = slice(None)  # rows of the batch that are in this pass
        self.mask = None  # (.., N, S) of this pass; None: everything is seen

    def __call__(self, q, k, v, ctx):
        """One layer of a pass: q (B, H, N', d), k and v (B, Hkv, N, d) -> (B, H, N', d)"""
        old, new = self.kept.pop(0), torch.stack((k, v)).roll(-self.n_noised, 3)
        new = new if old is None else torch.cat((old[:, self.live], new), 3)
        clean = new[..., :new.size(3) - self.n_noised, :]
        is_kept = self.cache and old is not None  # until the next block
        self.kept.append(old if is_kept else clean[..., max(0, clean.size(3) - self.window):, :])
        mask = None if self.mask is None else self.mask[..., :q.size(2), :]
        return F.scaled_dot_product_attention(q, *new, mask, enable_gqa=q.size(1) != k.size(1))

    def read_row(self, tokens, start, rows):
        """Of train_mdlm and train_sedd: reads what is within seq_len of the beginning or, behind
        that, of the block's end, in the rows that are asked for. Under absorb: the log score, times
        expm1 of the noise that leaves so many masks. With a cache, a block's first pass reads and
        keeps all rows, and those after it the block, or all from there on."""
        L, size, is_first = self.L, max(self.L, self.cfg.seq_len), self.done < start + self.L
        low = max(0, start + L - size)
        live, row = (rows // L).unique(return_inverse=True)
        if self.cache and is_first:
            live, row = torch.arange(len(tokens), device=tokens.device), rows // L
        x = tokens[live, low:low + size]
        n_masked = (x == self.cfg.vocab_size).sum(1).clamp(min=1)
        sigma = -torch.log1p(-n_masked / (x.size(1) + 1))  # at which so many are masked
        if self.cache:
            at = torch.arange(x.size(1), device=x.device).roll(low - start)  # the block comes first
            self.n_noised = L if self.cache == "dual" else low + x.size(1) - start
            if is_first:
                self.kept = [None] * self.cfg.n_layer
            else:
                at = at[:self.n_noised]
            self.done, self.live = start + L, live
            logits = self.model.predict(x[:, at], at, sigma, row * L + rows % L, L, attend=self)
        else:
            logits = self.model(x, sigma, row * x.size(1) + start - low + rows % L)
        if self.kind == "sedd":
            return logits + sigma.expm1().log()[row, None]
        return logits.log_softmax(-1)

    def read_gpt(self, tokens, start, rows):
        S, done, device = start + 1, self.done, tokens.device
        x = F.pad(tokens[:, :start], (1, 0), value=self.cfg.vocab_size)  # (B, S), the start first
        if not self.is_cached:
            return self.model(x, (rows + 1) * S - 1).log_softmax(-1)
        if S > done:  # else it is asked for other rows of the same pass
            new = torch.arange(done, S, device=device)
            self.mask = new[:, None] >= torch.arange(S, device=device) if len(new) > 1 else None
            self.done, last = S, torch.arange(1, len(x) + 1, device=device) * (S - done) - 1
            self.logits = self.model.predict(x[:, done:], new, rows=last, attend=self)
        return self.logits[rows].log_softmax(-1)

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
            docs = F.pad((tokens[:, :start] == cfg.bos_id).cumsum(1), (1, 0))
            docs = torch.cat((docs[:, 1:], docs[:, -1:].expand(-1, L)), 1)  # (B, T)
            self.mask = self.mask & (docs[:, None, at, None] == docs[:, None, None, seen])
        logits = self.model.predict(tokens[:, at], at, rows=rows, n_query=L, attend=self)
        return logits.log_softmax(-1)


# ----------------------------------------------------------------------------- samplers
# They take known (B, T) int64 and is_known (B, T) bool -> tokens (B, T), length (B,) of each row,
# number of forward passes. gen (CPU) seeds a generator a row, so that rows do not depend on their
# batch. warp changes the log-probabilities drawn from; watch(tokens (B, T), nfe) sees every pass.
def stream(seed, number):
    """One of several generators of a seed. torch keeps 32 bits of what seeds its own."""
    seed, = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1).tolist()
    return torch.Generator().manual_seed(seed)

def row_generators(gen, n_rows):
    """Generators of 128 bits each, so that no two rows agree."""
    words = torch.randint(2**32, (n_rows, 4), generator=gen).tolist()
    return [np.random.default_rng(row) for row in words]

def uniforms(gens, *shape):
    """(B, *shape) float64 on the CPU"""
    return torch.from_numpy(np.stack([g.random(shape) for g in gens]))

def lowest(score, is_free, fraction):
    """(B, T) bool: a fraction of the free positions, at least one, with the lowest scores."""
    n = (is_free.sum(1, keepdim=True) * fraction).round().clamp(min=1)  # (B, 1)
    place = score.masked_fill(~is_free, math.inf).argsort(dim=1, stable=True).argsort(1)
    return is_free & (place < n)

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
                corrector=(0, 1, ""), watch=None, stop=None, find_end=None, block_len=None,
                cache="", begins=None, allowed=None):
    """Fill in the unknown positions, block after block: those of train_block, or (kind mdlm) the
    whole row or block_len tokens, or (gpt) one token. steps=N: ancestral sampling on N equal steps
    of t (arXiv 2406.07524, eq. 6 with SUBS), each masked token drawn with probability (t - s) / t.
    steps=None: first-hitting (arXiv 2409.02908), one uniformly random token a row and pass: as
    ancestral for N -> inf. choose (see orders, below) replaces both. corrector=(F, EVERY, MODE):
    see Options; of one token, with exact conditionals, it is a Gibbs step.

    stop=ID: a row ends where that token stands in a finished block, unless it is its first or
    known; it is not counted in the length, and the row is filled up with it. It also ends at
    find_end(tokens (B, S)) -> (B,), if that is below S. Where begins (B, T) is not 0, one of
    allowed[begins] (.., V) is drawn before the rest, which follow given it."""
    (B, T), mask_id, device = known.shape, cfg.vocab_size, known.device
    L = cfg.block_len if kind == "block" else 1 if kind == "gpt" else block_len or T
    gens, passes, nfe = row_generators(gen, B), steps or L, 0
    warp = warp or torch.nn.Identity()
    whole = -(-T // L) * L  # the last block is written to its end, and cut
    fixed = F.pad(is_known, (0, whole - T))  # (B, whole)
    tokens = F.pad(torch.where(is_known, known, mask_id), (0, whole - T), value=mask_id)
    length = torch.full((B,), T, device=device)
    reader = Reader(model, cfg, kind, L, cache)
    fraction, every, mode = corrector
    schedule = []  # pass of each block, and whether it is the corrector's
    for i in range(-(allowed is not None), passes):
        is_due = fraction and i >= 0 and (i + 1) % every == 0
        schedule += [(i, False), (i, True)] if is_due else [(i, False)]
    for start in range(0, whole, L):
        here = slice(start, start + L)
        is_empty = not (tokens[:, here] == mask_id).any()
        psi, read_at = torch.full((B, L), math.inf, dtype=torch.float64), None
        for i, is_again in schedule:
            pick, u = uniforms(gens, 2, L).unbind(1)  # which are drawn, and as what: (B, L) each
            if is_empty:  # the numbers of later blocks do not depend on it
                continue
            block = tokens[:, here].clone()
            is_mask = (block == mask_id).cpu()
            rule = None if i < 0 or is_again else choose
            if is_again:
                is_free = ~is_mask & ~fixed[:, here].cpu()
                commit = lowest(psi if mode == "least" else pick, is_free, fraction)
                block = block.masked_fill(commit.to(device), mask_id)
                tokens[:, here], read_at = block, None
            elif i < 0:  # what is known in part
                kinds = F.pad(begins, (0, whole - T))[:, here]
                commit = is_mask & (kinds > 0).cpu()
                fixed[:, here] |= kinds > 0
            elif rule is not None:
                commit = is_mask  # chosen from below
            elif not steps:
                commit = is_mask & (pick == pick.masked_fill(~is_mask, -1).amax(1, True))
            else:
                commit = is_mask & (pick * (steps - i) < 1)
            rows = commit.flatten().nonzero()[:, 0].to(device)
            if len(rows) and (read_at is None or not torch.equal(block, read_at)):
                log_all = reader.read(tokens, start, rows)  # (R, V)
                nfe, read_at = nfe + 1, block if rule else None
            log_probs = log_all if len(rows) else torch.zeros(0, mask_id, device=device)
            if i < 0:
                log_probs = log_probs.masked_fill(~allowed[kinds.flatten()[rows]], -math.inf)
                log_probs = log_probs.log_softmax(-1)
            elif rule is not None:
                is_left = rule(log_probs, is_mask, step=i, steps=steps, u=pick, psi=psi)
                is_left &= ~fixed[:, here].cpu() & (i < passes - 1)
                block = torch.where(is_left.to(device), mask_id, block)
                psi[is_left] = math.inf
                is_drawn = ~is_left.flatten().to(device)[rows]
                rows, log_probs = rows[is_drawn], log_probs[is_drawn].log_softmax(-1)
            drawn = draw_tokens(warp(log_probs), u.flatten()[rows.cpu()])
            block = block.flatten().index_put((rows,), drawn).view(B, L)
            if i >= 0:
                p = log_probs.gather(1, drawn[:, None])[:, 0].cpu().double().exp()
                psi.view(-1)[rows.cpu()] = p
                psi[:, T - start:] = math.inf  # what is cut is not masked again
            tokens[:, here] = block
            if stop is not None and (i, is_again) == schedule[-1]:
                ends = (block == stop) & ~fixed[:, here]
                ends[:, 0] &= start > 0
                at = torch.where(ends.any(1), start + ends.int().argmax(1), whole)
                if find_end is not None:
                    end = find_end(tokens[:, :start + L])
                    at = torch.where(end < start + L, torch.minimum(at, end), at)
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

@torch.no_grad()
def redraw_rows(model, cfg, known, is_known, *, total_noise, gen, steps=None, is_euler=False,
                warp=None, watch=None, **begins):
    """train_sedd: steps=N passes (None: T) on N equal steps of t. Each draws every position anew by
    Tweedie's law, the exact one of a position if it moved alone (arXiv 2310.16834, theorem 4.2);
    is_euler: by the rates at the step's start. The last pass denoises: all noise that is left goes
    in one step of Tweedie's. warp acts under absorb on what a mask becomes, not when; under uniform
    on the clean token that the score implies, before the noise of that time.
    total_noise(t, cfg) -> sigma, dsigma/dt"""
    (B, T), V, device = known.shape, cfg.vocab_size, known.device
    passes = steps or T
    sigmas, slopes = total_noise(torch.arange(passes, 0, -1, dtype=torch.float64) / passes, cfg)
    sigmas, rates = [*sigmas.tolist(), 0.0], (slopes / passes).tolist()
    if cfg.graph == "absorb":
        def leave(log_clean, is_mask, *, step, u, **_):
            # Tweedie: expm1(sigma - sigma_next) s_y is the probability of token y.
            share = rates[step] if is_euler else math.expm1(sigmas[step] - sigmas[step + 1])
            p = torch.zeros(is_mask.shape, dtype=torch.float64)
            p[is_mask] = log_clean.logsumexp(-1).cpu().double().exp()
            return is_mask & (u >= p * share / math.expm1(sigmas[step]))

        return fill_blocks(model, cfg, known, is_known, kind="sedd", gen=gen, steps=passes,
                           choose=leave, warp=warp, watch=watch, **begins)
    gens = row_generators(gen, B)
    tokens = torch.where(is_known, known, (uniforms(gens, T) * V).long().to(device))
    rows = (~is_known).flatten().nonzero()[:, 0]
    for i in range(passes):
        u = uniforms(gens, T).flatten()[rows.cpu()]
        log_score = float64(model(tokens, torch.full((B,), sigmas[i], device=device), rows))
        current = tokens.flatten()[rows].to(log_score.device)
        rate = rates[i] if is_euler and i < passes - 1 else None
        log_law = uniform_law(log_score, current, sigmas[i], sigmas[i + 1], rate, warp)
        drawn = draw_tokens(log_law, u).to(device)
        tokens = tokens.flatten().index_put((rows,), drawn).view(B, T)
        if watch is not None:
            watch(tokens, i + 1)
    return tokens, torch.full((B,), T, device=device), passes


# ----------------------------------------------------------------------------- orders
# choose(log_probs (R, V), is_mask (B, L), step, steps, u (B, L), psi (B, L)) -> is_mask after the
# pass, all (B, L) on the CPU. R = is_mask.sum(); log_probs are untempered, so temperature never
# moves a rank. psi: the probability that a token had when it was drawn, infinite where none was.
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
    "even": lambda x: x, "cosine": lambda x: 1 - math.cos(math.pi / 2 * x),
    "cosine2": lambda x: math.sin(math.pi / 2 * x) ** 2}
# ReMDM's loop: t, and alpha there; it masks again while alpha stays.
LOOP = (0, 0.05, 0.55, 1), (1, 0.9, 0.9, 0)
REMASK_ETA = {"loop": 0.02, "cap": 0.008, "rescale": 0.015, "conf": 1.0}  # as published

def ordered(name, threshold=None, pace="even"):
    """Fix the best-ranked tokens of each row, as many a pass as the pace says (one, when steps is
    None), and every token whose top probability is above threshold."""
    def choose(log_probs, is_mask, *, step, steps, u, psi=None):
        device, is_mask = is_mask.device, is_mask.cpu()
        begin, end = (PACES[pace]((step + i) / (steps or math.inf)) for i in (0, 1))
        share = (end - begin) / (1 - begin)  # of what is left
        quota = (is_mask.sum(1, keepdim=True).double() * share - 1e-9).ceil().clamp(min=1)
        rank = torch.full(is_mask.shape, -math.inf, dtype=torch.float64)
        rank[is_mask] = RANKS[name](log_probs, u[is_mask]).cpu().double() + TIE * u[is_mask]
        commit = rank.argsort(dim=1, descending=True, stable=True).argsort(1) < quota
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
    kind, _, eta = (text or "cap").partition(":")
    if kind not in REMASK_ETA:
        raise ValueError(f"there are {', '.join(REMASK_ETA)}, as in cap:0.02")
    eta, = fraction_of(eta or REMASK_ETA[kind])
    points = LOOP if kind == "loop" else ((0, 1), (1, 0))

    def choose(log_probs, is_mask, *, step, steps, u, psi):
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
        return torch.where(is_mask, u >= fix, u < sigma)

    return choose

def make_warp(temperature=1.0, top_k=0, top_p=1.0, nucleus="inclusive"):
    """A function of log_probs (R, V): temperature, then top-k, then the nucleus, with or without
    (exclusive) the token that crosses top_p. None when all are off."""
    if (temperature, top_k, top_p) == (1, 0, 1):
        return None

    def warp(log_probs):
        # From the largest one, which then stays finite however low the temperature is.
        heat = max(temperature, 1e-30)
        log_probs = ((log_probs - log_probs.amax(-1, True)) / heat).log_softmax(-1)
        if top_k or top_p < 1:
            ranked, index = log_probs.sort(dim=-1, descending=True, stable=True)
            if top_k:
                ranked[..., top_k:] = -math.inf
            ranked = ranked.log_softmax(-1)
            above = ranked.exp().cumsum(-1)
            cut = above > top_p if nucleus == "exclusive" else above - ranked.exp() >= top_p
            cut[..., 0] = False
            ranked = ranked.masked_fill(cut & (top_p < 1), -math.inf)
            log_probs = log_probs.scatter(-1, index, ranked)
        return log_probs.log_softmax(-1)

    return warp


# ----------------------------------------------------------------------------- model
PASSES = ("order", "steps", "threshold", "pace", "remask", "refine", "block_length", "cache",
          "corrector")
MASK_ORDERS, SCORE_ORDERS = ("first_hitting", "ancestral", *RANKS), ("tweedie", "euler")
WAYS = {  # the flags that a kind of model cannot take, and its orders
    "mdlm": ((), MASK_ORDERS),
    "gpt": ((*PASSES, "infill"), ()),
    "block": (("refine", "block_length", "cache", "infill"), MASK_ORDERS),
    "sedd": (PASSES[2:], SCORE_ORDERS)}

class Canvas(NamedTuple):
    known: torch.Tensor  # (P, T) int64, the tokens of every prompt
    is_known: torch.Tensor  # (P, T) bool
    begins: torch.Tensor  # (P, T) int64, where a token is known in part: its row of allowed, or 0
    allowed: torch.Tensor  # (.., V) bool
    lead: int  # tokens at the beginning that are not shown: what begins a document

class Samples(list):
    """Texts; with tokens, lists of ids; ended, whether before their length; nfe, forward passes."""

def build_model(script, ckpt, weights="ema"):
    """A checkpoint of a script -> (model in eval mode, its Config); weights: ema or raw."""
    cfg = script.Config(**ckpt["config"])
    model = script.Model(cfg)
    model.load_state_dict((weights == "ema" and ckpt["ema"]) or ckpt["model"])
    return model.eval(), cfg

class LM:
    """A trained model with its tokenizer. Made by load()."""
    def __init__(self, script, ckpt, path, opts):
        self.script, self.name, self.path = script, ckpt["script"], path
        self.model, self.cfg = build_model(script, ckpt, opts.weights)
        self.tokenizer = Tokenizer(ckpt["meta"], self.cfg.vocab_size)
        self.block_len, self.graph = (getattr(self.cfg, x, 0) for x in ("block_len", "graph"))
        self.kind = script.OBJECTIVE  # mdlm, block, sedd or gpt
        # A fork may have changed forward and not predict, so it computes all anew.
        is_fork = self.name not in SCRIPTS
        self.net = self.model.__call__ if is_fork else self.model
        dtype = self.cfg.dtype if opts.dtype == "auto" else opts.dtype
        self.device, self.dtype = script.pick_device(opts.device, dtype, 0)
        self.amp = functools.partial(torch.autocast, self.device.type, self.dtype,
                                     self.dtype != torch.float32)
        self.model.to(self.device)
        for part in self.model.modules():
            if isinstance(part, torch.nn.Linear):  # as autocast does in every pass
                part.to(self.dtype)
        self.where = f"{str(self.dtype)[6:]} on {self.device.type}"
        self.n_parameters = sum(p.numel() for p in self.model.parameters())
        self.summary = (
            f"{path}: {self.name}, {self.n_parameters / 1e6:.2f}M parameters, "
            f"step {ckpt['step']}, {self.tokenizer.name} tokens, context {self.cfg.seq_len}"
            + ", no cache" * is_fork)

    def batch_rows(self, length):
        """How many rows of that many tokens to run at once."""
        a_token = max(self.cfg.vocab_size, self.cfg.n_head * length)
        return max(1, BATCH_NUMBERS // (length * a_token))

    def describe(self, opts):
        """How it writes, in words, with what its samples are not."""
        words = f"remask {opts.remask}" if opts.remask else opts.order_name
        is_ranked = opts.order_name in RANKS and (opts.order, opts.threshold) != ("random", 0)
        words += " (mode-seeking)" * is_ranked
        length = self.block_len or opts.block_length
        words += f" in blocks of {length}" if length else ""
        words += f", {opts.cache} cache (approximate)" if opts.cache else ""
        words += f", corrector {opts.corrector}" if opts.corrector else ""
        return {"gpt": "left to right", "sedd": opts.order or SCORE_ORDERS[0]}.get(self.kind, words)

    def canvas(self, opts):
        """The prompts, or a text with blanks, and the room behind."""
        refused, orders = WAYS[self.kind]
        for name in refused:
            value = getattr(opts, name)
            check(value == getattr(Options, name), name, value,
                  f"{self.name} cannot do that: take a checkpoint of train_mdlm")
        check(opts.order in ("", *orders), "order", opts.order,
              f"{self.name} has {', '.join(orders)}")
        check(hasattr(self.net, "predict") or not opts.cache, "cache", opts.cache,
              f"{self.name} may compute otherwise: drop it")
        lead, allowed = [], [torch.ones(self.cfg.vocab_size, dtype=torch.bool)]
        limit = math.inf if self.block_len or opts.block_length else self.cfg.seq_len
        if opts.infill:
            texts = [text.replace(r"\_", "_") for text in BLANK.split(opts.infill)]
            n_blanks, blanks = len(texts) - 1, numbers(opts.blank)
            blanks = blanks if len(blanks) > 1 else blanks * n_blanks
            check(len(blanks) == n_blanks > 0 < min(blanks), "blank", opts.blank,
                  f"the text has {n_blanks} blanks, written as ___")
            parts = [[*zip(texts, [*blanks, 0], strict=True)]]
        else:
            parts = [[(text, 1)] for text in opts.prompts or [opts.prompt]]
            has_room = opts.length < limit  # for the start of the document
            if parts == [[("", 1)]] and opts.start == "document" and has_room:
                lead = [self.tokenizer.bos_id]
        rows = [[*lead] for _ in parts]  # -1: unknown; -1 - i: one of allowed[i]
        for row, pieces in zip(rows, parts, strict=True):
            for text, n_new in pieces:
                new = [-1] * n_new
                if (n_new or opts.length) and self.graph != "uniform":
                    text, space = self.tokenizer.split_space(text, opts.infill and n_new == 1)
                    if space is not None:
                        new[:1] = [-1 - len(allowed)]
                        allowed.append(space)
                row += self.tokenizer.encode(text) + new
        n = max(map(len, rows))
        T = n if opts.infill else max(n, min(limit, n - 1 + DEFAULT_LENGTH))
        T = opts.length + len(lead) if opts.length else T
        check(n <= T <= limit, "length", T - len(lead),
              f"the text takes {n} tokens, the context {limit}")
        rows = torch.tensor([row + [-1] * (T - len(row)) for row in rows])
        return Canvas(rows.clamp(min=0), rows >= 0, (-1 - rows).clamp(min=0),
                      torch.stack(allowed), len(lead))

    @torch.inference_mode()
    def batches(self, canvas, opts, watch=None, stops=True):
        """Fill each row of the canvas n times; yield ([(tokens, whether it ended)], number of
        forward passes) of as many as fit in a batch. watch(tokens (B, T), nfe) sees every pass.
        stops: at the end of a document, where the model writes in order, and at --stop. Sample i
        depends on (seed, i) alone."""
        (P, T), (fraction, n_refine) = canvas.known.shape, refinement(opts.refine)
        fill = self.sampler(opts, T, stops)
        gens = [stream(opts.seed, i) for i in range(1 + n_refine)]
        size = min(MAX_ROWS, self.batch_rows(min(T, self.cfg.seq_len)))
        allowed = canvas.allowed.to(self.device) if canvas.begins.any() else None
        for ids in (torch.arange(P * opts.n) // opts.n).split(size):
            known, given, begins = (x[ids].to(self.device) for x in canvas[:3])
            old = given | (begins > 0)
            find_end = functools.partial(self.find_end, known=old, stop=opts.stop if stops else "")
            with self.amp():
                tokens, length, nfe = fill(known, given, gen=gens[0], watch=watch, begins=begins,
                                           allowed=allowed, find_end=find_end)
                for gen in gens[1:] if fraction else ():
                    keep, n = self.likeliest(tokens, old, fraction)
                    nfe += n
                    look = watch and (lambda tokens, n, nfe=nfe: watch(tokens, nfe + n))
                    tokens, _, n = fill(tokens, keep, gen=gen, watch=look)
                    nfe += n
            ends = torch.minimum(length, find_end(tokens)).tolist()
            rows = zip(tokens.tolist(), ends, strict=True)
            yield [(row[canvas.lead:end], end < T) for row, end in rows], nfe

    def sampler(self, opts, length, stops):
        """The one that the flags ask for."""
        how = dict(steps=opts.steps, warp=make_warp(opts.temperature, opts.top_k, opts.top_p,
                                                    opts.nucleus))
        if self.kind == "sedd":
            return functools.partial(redraw_rows, self.net, self.cfg, **how,
                                     total_noise=self.script.total_noise,
                                     is_euler=opts.order == "euler")
        if opts.order_name == "ancestral":
            how["steps"] = opts.steps or self.block_len or opts.block_length or length
        if opts.order_name in RANKS:
            how["choose"] = ordered(opts.order_name, opts.threshold or None, opts.pace)
        elif opts.remask:
            how["choose"] = remasking(opts.remask)
        if stops and self.kind != "mdlm":
            how["stop"] = self.tokenizer.bos_id
        return functools.partial(fill_blocks, self.net, self.cfg, kind=self.kind, **how,
                                 block_len=opts.block_length, cache=opts.cache,
                                 corrector=correction(opts.corrector))

    def find_end(self, tokens, known, stop):
        """(B,) how many tokens of a row come before what stops it, in what is new."""
        stops = [x.encode() for x in ([stop] if isinstance(stop, str) else stop) if x]
        ends = [tokens.size(1)] * len(tokens)
        for i, row in enumerate(tokens.tolist() if stops else ()):
            begin = [*known[i].tolist(), False].index(False)
            words = [self.tokenizer.table[token] for token in row[begin:]]
            text = b"".join(words)
            cut = min((text.index(x) for x in stops if x in text), default=len(text))
            ends[i] = begin + bisect.bisect([*itertools.accumulate(map(len, words))], cut)
        return torch.tensor(ends, device=tokens.device)

    def likeliest(self, tokens, is_known, fraction):
        """What to keep (B, T) when a fraction is predicted anew, and the passes spent: one in which
        every second token is masked and scored, one for the others, their neighbours in sight."""
        is_free = ~is_known
        score = torch.zeros(tokens.shape, device=tokens.device)
        parity = is_free.cumsum(1) % 2
        halves = [half for odd in (1, 0) if (half := is_free & (parity == odd)).any()]
        for half in halves:
            masked = torch.where(half, self.cfg.vocab_size, tokens)
            reader = Reader(self.net, self.cfg, "mdlm", tokens.size(1))
            log_probs = reader.read(masked, 0, half.flatten().nonzero()[:, 0])
            score[half] = log_probs.gather(1, tokens[half][:, None])[:, 0]
        return ~lowest(score, is_free, fraction), len(halves)

    def generate(self, prompt="", **how):
        """n texts of `length` tokens that begin with the prompt, or with each of a list of prompts;
        `how`: the flags' names -> Samples"""
        how["prompts"] = [prompt] if isinstance(prompt, str) else prompt
        return self.samples(make_options(**how))

    def infill(self, text, blank=16, **how):
        """n versions of a text, its blanks (___) filled with `blank` tokens, an int or a list."""
        return self.samples(make_options(infill=text, blank=str(blank).strip("[]"), **how))

    def samples(self, opts):
        batches = [*self.batches(self.canvas(opts), opts)]
        tokens, ended = zip(*(row for rows, _ in batches for row in rows), strict=True)
        out = Samples(map(self.tokenizer.decode, tokens))
        out.tokens, out.ended = list(tokens), list(ended)
        out.nfe = sum(nfe for _, nfe in batches)
        return out

    @torch.inference_mode()
    def score(self, text, given="", draws=8, seed=0):
        """-log p of a text, given another one before it, both cut into windows of seq_len tokens
        (the last may be shorter): nats, nats_stderr, bits_per_byte, bits_stderr, n_tokens, n_bytes.

        A bound, with its error over draws of noise, which mask each window twice, as an antithetic
        pair. gpt: exact."""
        T = self.cfg.seq_len
        n_draws, n_copies = (1, 1) if self.kind == "gpt" else (draws, 2)
        new, known = self.tokenizer.encode(text), self.tokenizer.encode(given)
        check(new, "score", text, "the text is empty")
        tokens, gen = known + new, stream(seed, 0)
        totals = torch.zeros(n_draws, dtype=torch.float64)
        starts = range(len(known) // T * T, len(tokens), T)
        for (size, n_given), group in itertools.groupby(
                starts, lambda at: (min(T, len(tokens) - at), max(0, len(known) - at))):
            cfg = dataclasses.replace(self.cfg, seq_len=size, prompt_len=n_given)
            x0 = torch.tensor([tokens[at:at + size] for at in group], device=self.device)
            x0 = x0.repeat_interleave(n_copies, 0)
            for draw in range(n_draws):
                noise = self.script.draw_noise(cfg, len(x0), gen, bound=True)
                for rows in torch.arange(len(x0)).split(2 * -(-self.batch_rows(size) // 2)):
                    piece = self.script.take_rows(noise, rows, self.device)
                    with self.amp():
                        nats = self.script.nelbo_fn(self.model, x0[rows], piece, cfg)
                    totals[draw] += nats.cpu().double().sum() / n_copies
        nats, n_bytes = totals.mean().item(), sum(len(self.tokenizer.table[i]) for i in new)
        stderr = totals.std(correction=n_draws > 1).item() / math.sqrt(n_draws)
        bits = 1 / (math.log(2) * n_bytes)
        return SimpleNamespace(nats=nats, nats_stderr=stderr, bits_per_byte=nats * bits,
                               bits_stderr=stderr * bits, n_tokens=len(new), n_bytes=n_bytes)

# ----------------------------------------------------------------------------- loading
def find_checkpoint(name=None):
    """The file behind what --ckpt says; without it the newest in out/, or else a shipped model."""
    if not name:
        name = max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=SHIPPED[0])
    if not str(name).startswith("hf:"):
        return Path(name, "ckpt.pt") if os.path.isdir(name) else Path(name)
    hub_name = re.fullmatch(r"hf:([^/]+/[^/]+)(?:/(.+))?", name)
    check(hub_name, "ckpt", name, "write hf:OWNER/NAME or hf:OWNER/NAME/FILE")
    with naming(f"{name}: could not be downloaded"):
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(hub_name[1], hub_name[2] or "ckpt.pt"))

def load_script(path):
    """Import a training script, or another program, from its file."""
    with naming(f"--script={path}"):
        spec = importlib.util.spec_from_file_location(f"sampled_{Path(path).stem}", path)
        script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
    return script

def load(path=None, script=None, opts=None, **how):
    """LM from what --ckpt takes. script: the file that wrote it, when it is not one of ours. how:
    weights, device, dtype."""
    opts, path = opts or make_options(**how), find_checkpoint(path)
    module = load_script(script or HERE / f"{SCRIPTS[0]}.py")
    with naming(path):
        read = module.load_checkpoint  # the same text in every script
        if path.suffix == ".golf":
            read = load_script(HERE / "study/golf.py").read
        ckpt = read(path)
        name = ckpt["script"]
        check(name in ((Path(script).stem,) if script else SCRIPTS), "ckpt", path,
              f"written by {name}.py: pass that file as --script=PATH")
        return LM(module if script else load_script(HERE / f"{name}.py"), ckpt, path, opts)

load_model, sample = load, LM.generate  # as published packages name them


# ----------------------------------------------------------------------------- terminal
FRAME = 0.04  # seconds between two pictures
STYLES = {"known": "\x1b[1m", "new": "\x1b[32m", "mask": "\x1b[2m", "note": "\x1b[2m"}

def styled(text, kind):
    return f"{STYLES[kind]}{text}\x1b[0m" if kind in STYLES else text

def printable(text):
    """Text that cannot steer a terminal: a model of bytes writes escape codes, too."""
    text = text.replace("\t", "    ").replace("\r\n", "\n")
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode()
                   for c in text)

def show(spans, stream):
    """Print [(text, kind)]; a terminal gets styles and no control codes."""
    for text, kind in [*spans, ("\n", None)]:
        stream.write(styled(printable(text), kind) if stream.isatty() else text)
    stream.flush()

def note(text):
    """What is no text of the model goes to stderr."""
    show([(text, "note")], sys.stderr)

def lines_of(spans, width):
    """Styled lines of at most `width` cells."""
    lines, cells = [""], 0
    for text, kind in spans:
        for char in printable(text):
            size = 1 + (unicodedata.east_asian_width(char) in "WF")
            if char == "\n" or cells + size > width:
                lines.append("")
                cells = 0
            if char != "\n":
                lines[-1] += styled(char, kind)
                cells += size
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
    """A model at work on a canvas. It counts, with --watch it shows the text as it appears, for a
    race or a recording it keeps every pass."""
    def __init__(self, lm, opts, is_race=False):
        self.lm, self.opts, self.is_race, self.canvas = lm, opts, is_race, lm.canvas(opts)
        known, is_known, *_, self.lead = self.canvas
        self.is_live = opts.watch and not is_race and sys.stderr.isatty()
        self.is_kept = is_race or opts.save.endswith((".json", ".svg"))
        self.mask_id = lm.cfg.vocab_size
        rows = torch.where(is_known, known, self.mask_id)[:, self.lead:].tolist()
        self.starts = [row for row in rows for _ in range(opts.n)]
        self.done, self.nfe, self.seconds, self.entropy, self.n_new = [], 0, 0.0, 0.0, 0

    def samples(self):
        """Write; yield the tokens of every sample. The end of a document stops no race."""
        self.start_batch()
        for rows, nfe in self.lm.batches(self.canvas, self.opts, self, not self.is_race):
            seconds = time.perf_counter() - self.since
            self.seconds += seconds
            self.nfe += nfe
            redraw([], self.height, sys.stderr)
            for i, (row, ended) in enumerate(rows):
                start = self.passes[0][2][i]
                new = [token for token, old in zip(row, start, strict=False) if old == self.mask_id]
                # Entropy of the tokens' frequencies, low when a sample repeats itself.
                shares = torch.tensor(new).bincount() / max(1, len(new))
                self.entropy += torch.special.entr(shares).sum().item()
                self.n_new += len(new)
                self.done.append(SimpleNamespace(tokens=row, ended=ended, nfe=nfe, seconds=seconds,
                                                 row=i, passes=self.passes))
                yield row
            self.start_batch()

    def start_batch(self):
        self.height, self.drawn, self.last = 0, -math.inf, None  # nothing is drawn yet
        # Of every pass: forward passes so far, seconds, tokens of all rows.
        self.passes = [(0, 0.0, self.starts[len(self.done):])]
        self.since = time.perf_counter()

    def __call__(self, tokens, nfe):
        rows = tokens[:, self.lead:].tolist()  # waits for the device
        if self.is_kept:  # else they would fill the memory
            self.passes.append((nfe, time.perf_counter() - self.since, rows))
        if self.is_live and time.monotonic() - self.drawn >= FRAME:
            lines, width = [styled(f"{nfe} passes", "note")], shutil.get_terminal_size().columns
            for row, *more in zip(rows, self.last or rows, self.passes[0][2], strict=False):
                ends = [i + 1 for i, token in enumerate(row) if token != self.lm.tokenizer.bos_id]
                spans = self.spans(row[:max(ends, default=0)], *more)  # without what fills it up
                lines += ["", *lines_of(spans, width)]
            self.height, self.last = redraw(lines, self.height, sys.stderr), rows
            self.drawn = time.monotonic()

    def spans(self, row, before, start):
        """[(text, kind)] of a row"""
        kinds = ["mask" if token == self.mask_id else "known" if given != self.mask_id
                 else "new" if token != old else None
                 for token, old, given in zip(row, before, start, strict=False)]
        return self.lm.tokenizer.spans(row, kinds)

def save(path, runs):
    if path:
        load_script(HERE / "study/page.py").save(path, runs)


# ----------------------------------------------------------------------------- race
WARM_UP = 8  # tokens that a model writes before its clock starts
BAR = " │ "  # between the two

def replay(runs):
    """Draw the runs side by side in real time; the last picture stays, and is whole."""
    start, now, height = time.monotonic(), 0.0, 0
    shown = [run.done[0].passes for run in runs]
    end = max(passes[-1][1] for passes in shown)
    while now < end:
        now = min(end, time.monotonic() - start)
        step = (shutil.get_terminal_size().columns + len(BAR)) // len(runs)
        texts = []
        for run, passes in zip(runs, shown, strict=True):
            at = bisect.bisect([seconds for _, seconds, _ in passes], now)
            nfe, _, (row, *_) = passes[at - 1]
            counters = f"{nfe} passes, {min(now, passes[-1][1]):.1f} s\n\n"
            head = [(f"{run.lm.name}\n", "known"), (counters, "note")]
            texts.append(lines_of(head + run.spans(row, row, run.starts[0]), step - len(BAR)))
        bars = ["", *(f"\x1b[{i * step - len(BAR) + 1}G{BAR}" for i in range(1, len(runs)))]
        lines = ["".join(map("".join, zip(bars, cells, strict=True)))
                 for cells in itertools.zip_longest(*texts, fillvalue="")]
        height = redraw(lines, height, sys.stdout, is_last=now == end)
        time.sleep(FRAME)
    print("\n")

def print_race(opts):
    paths = [opts.ckpt, *opts.race.split(",")] if opts.race != "shipped" else SHIPPED
    lms = [load(path, opts.script * (not i), opts) for i, path in enumerate(paths)]
    for lm in lms:
        check(lm.tokenizer.table == lms[0].tokenizer.table, "race", lm.path, "it has other tokens")
    plain = dataclasses.replace(opts, **{name: getattr(Options, name) for name in PASSES})
    length = min(x.known.size(1) - x.lead for x in (lm.canvas(plain) for lm in lms))
    runs = [Run(lm, dataclasses.replace(plain if lm.kind == "gpt" else opts, length=length), True)
            for lm in lms]
    note("\n".join(lm.summary for lm in lms))
    note(f"{opts.n} x {length} tokens, {lms[0].where}, one model after another\n")
    for run in runs:
        run.lm.generate(length=WARM_UP)
        list(run.samples())
    if sys.stdout.isatty():
        replay(runs)
    else:
        for run in runs:
            text = run.lm.tokenizer.decode(run.done[0].tokens)
            print(f"--- {run.lm.name}\n{text}\n")
    print(f"{'':12}  passes  seconds  tokens/s  entropy")
    for run in runs:
        print(f"{run.lm.name:12}  {run.nfe:6}  {run.seconds:7.2f}  {run.n_new / run.seconds:8.0f}  "
              f"{run.entropy / len(run.done):.2f} nats, {run.lm.describe(run.opts)}")
    save(opts.save, runs)


# ----------------------------------------------------------------------------- command line
def read(path, opts):
    """A file, plain or packed, as prepare_data.py reads it."""
    import prepare_data as data

    part, = data.local_parts([path])
    return "".join(text for _, text in data.read(data.Config(encoding=opts.encoding), part,
                                                 data.Counter()))

def text_of(opts, flag):
    """The text of a flag, or of the file that it names."""
    text = getattr(opts, flag)
    if os.path.isfile(text):
        return read(text, opts)
    check(not FILE_NAME.fullmatch(text), flag, text, "no such file")
    return text

def print_score(lm, opts):
    score = lm.score(text_of(opts, "score"), text_of(opts, "given"), opts.draws, opts.seed)
    note(lm.summary)
    sign, noise = "<=", f"{opts.draws} noise draws, seed {opts.seed}"
    if lm.kind == "gpt":
        sign, noise = "=", "exact"
    print(f"-log p {sign} {score.nats:.2f} +- {score.nats_stderr:.2f} nats, "
          f"{score.bits_per_byte:.4f} +- {score.bits_stderr:.4f} bits per byte "
          f"({score.n_tokens} tokens, {score.n_bytes} bytes; {noise}, {lm.where})")

def print_samples(lm, opts):
    run = Run(lm, opts)
    note(lm.summary)
    n = len(run.starts)
    for row, start in zip(run.samples(), run.starts, strict=True):
        if n > 1:
            note(f"--- sample {len(run.done)} of {n}")
        show(run.spans(row, row, start) + [("\n", None)] * (n > 1), sys.stdout)
    save(opts.save, [run])
    note(f"NFE {run.nfe}, {run.n_new / run.seconds:.0f} tokens/s, {lm.where}, "
         f"{lm.describe(opts)}, entropy {run.entropy / n:.2f} nats")

def read_prompts(opts):
    if not opts.prompts.endswith(".jsonl"):
        return [read(opts.prompts, opts)]
    with naming(f"--prompts={opts.prompts}"):
        lines = Path(opts.prompts).read_text(opts.encoding or "utf-8-sig").splitlines()
        return [row["prompt"] if isinstance(row, dict) else row
                for row in map(json.loads, lines)]

def main(argv):
    try:
        opts = parse_args(argv)
        modes = [flag for flag in ("infill", "score", "prompts", "race") if getattr(opts, flag)]
        modes += ["prompt"] * bool(opts.prompt and not opts.race)
        check(len(modes) < 2, " and --".join(modes), "..", "exclude each other: drop one")
        check(not FILE_NAME.fullmatch(opts.prompt), "prompt", opts.prompt,
              "a file? --prompt_file=FILE")
        check(opts.score or not opts.given, "given", opts.given, "goes with --score")
        check(opts.race != "shipped" or not opts.ckpt, "race", "", "name what races against --ckpt")
        check(Path(opts.save).parent.is_dir(), "save", opts.save, "no such folder")
        if opts.prompts:
            opts = dataclasses.replace(opts, prompts=read_prompts(opts))
        if opts.race:
            print_race(opts)
        else:
            work = print_score if opts.score else print_samples
            work(load(opts.ckpt, opts.script, opts), opts)
        sys.stdout.flush()
    except (SampleError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        line = printable(str(e)).replace("\n", " ")
        print(f"sample.py: {line[:500] or 'out of memory'}", file=sys.stderr)
        sys.stdout = None  # a full disk: do not try again at the exit
        raise SystemExit(2) from None

if __name__ == "__main__":
    # A file gets UTF-8; a terminal, what it lacks as escapes.
    encoding = None if sys.stdout.isatty() else "utf-8"
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    main(sys.argv[1:])
