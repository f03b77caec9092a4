"""Masked diffusion language model (MDLM) in one file: data, model, training, evaluation.

Forward process: every token of x0 is replaced by the mask with probability 1 - alpha_t, t in (0,1].
The network predicts the masked tokens of xt, all at once, and its loss bounds the likelihood,
whatever the schedule alpha if it has no time input (Sahoo et al. 2024, arXiv 2406.07524, eq. 10):

    -log p(x0) <= E_t [ -alpha'_t / (1 - alpha_t)  sum_{i masked} -log p(x0_i | xt) ]

The default estimator, exactly k masks in a row and T+1-k in the next one, draws the same as the
order-agnostic autoregressive bound (Hoogeboom et al. 2021, arXiv 2110.02037, eq. 8):

    -log p(x0) <= E_{k ~ U{1..T}} E_{|S| = k} [ T/k  sum_{i in S} -log p(x0_i | x0 outside S) ]

Evaluation uses this weight T/k. Training weighs all masked tokens alike, because T/k makes the
gradient noisy where few tokens are masked: the bound gets lower that way (README). --loss_weight=
elbo trains on the bound itself.

    python prepare_data.py stdlib && python train_mdlm.py --preset=tiny         # minutes on a CPU
    torchrun --nproc_per_node=8 train_mdlm.py                                   # FineWeb-Edu
    python train_mdlm.py --eval_only=1 --init_from=out/train_mdlm-tiny/ckpt.pt  # bits per byte
    python sample.py                                                            # text

The other scripts differ from this one only here and between the objective marks.
"""

import contextlib
import dataclasses
import datetime
import difflib
import functools
import glob
import inspect
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muon import Muon

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked, everything else works
    fcntl = None

SCRIPT = os.path.splitext(os.path.basename(__file__))[0]


# ----------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Config:
    """Every setting of a run; a flag --name=value overrides the default, --preset=NAME several."""

    # data and run
    data: str = "finewebedu10B"  # folder with shards, or the name of one under data/
    out: str = ""  # run folder; empty: out/<script>-<preset>
    preset: str = ""  # named configuration; flags given beside it win
    seq_len: int = 1024  # context T, tokens
    seed: int = 0  # weights, data order, noise and dropout all derive from it
    shuffle: bool = True  # windows in random order; 0: in file order
    # trunk
    vocab_size: int = 0  # real tokens, without the mask; 0: from the data
    n_layer: int = 12  # layers
    n_head: int = 6  # attention heads
    n_kv_head: int = 0  # key/value heads (grouped-query attention); 0: n_head
    n_embd: int = 768  # width D
    mlp: Literal["relu2", "swiglu"] = "relu2"  # activation
    mlp_ratio: float = 4.0  # hidden width / D; swiglu takes 2/3 of it, so that parameters agree
    cond_dim: int = 0  # width of adaLN-Zero conditioning on the noise level; 0: off
    tied: bool = False  # head shares the embedding
    unet: bool = False  # skips from the first half of the layers to the second
    value_residual: bool = False  # the first layer's values, added to those of every layer
    softcap: float = 0.0  # logits = cap tanh(logits / cap); 0: off
    dropout: float = 0.0  # on the two branches of a layer
    checkpoint_layers: bool = False  # recompute activations in the backward pass, to save memory
    # optimization
    steps: int = 10_000  # optimizer steps
    batch_tokens: int = 131_072  # tokens a step, over all ranks and accumulation
    micro_batch: int = 16  # rows a forward pass and rank
    optimizer: Literal["muon", "adamw"] = "muon"  # of hidden matrices
    lr: float = 0.025  # hidden matrices
    embed_lr: float = 0.3  # embedding; far too much for a tied head: .02 to .05
    head_lr: float = 0.004  # untied head
    scalar_lr: float = 0.015  # residual and skip weights
    cond_lr: float = 0.001  # adaLN and the embedding of the noise level
    weight_decay: float = 0.05  # hidden matrices, decoupled
    adam_weight_decay: float = 0.001  # everything else
    adam_beta1: float = 0.8  # AdamW
    adam_beta2: float = 0.95  # AdamW
    momentum: float = 0.95  # Muon
    momentum_warmup: int = 300  # steps over which Muon's momentum rises from .85; 0: off
    muon_beta2: float = 0.0  # decay of NorMuon's second moment per neuron; 0: plain Muon
    cautious: bool = False  # decay weights only where the update shrinks them too
    warmup: int = 0  # steps of linear learning-rate warmup
    cooldown: float = 0.7  # last fraction of the steps, falling to lr_end (linear)
    lr_schedule: Literal["linear", "cosine"] = "linear"  # constant, then cooldown; or cosine
    lr_end: float = 0.0  # final learning rate / peak
    grad_clip: float = 0.0  # global gradient norm; 0: off
    ema: float = 0.0  # decay of the averaged weights; 0: off
    ema_start: float = 0.0  # fraction of the steps after which the average starts
    # evaluation, checkpoints, log
    eval_every: int = 250  # steps; 0: only at the end
    val_tokens: int = 10_485_760  # at most, in file order
    val_draws: int = 1  # noise draws a window
    split: Literal["val", "test"] = "val"  # what evaluation reads
    eval_only: bool = False  # evaluate --init_from and leave
    ckpt_every: int = 1000  # steps; 0: only at the end
    log_every: int = 10  # steps
    init_from: str = ""  # checkpoint whose weights to start from
    resume: bool = False  # continue the run in --out
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # matrix products
    compile: bool = True  # torch.compile
    # >>> objective
    schedule: Literal["linear", "cosine", "loglinear", "sqrt", "clipped_cosine",
                      "sigmoid"] = "linear"  # masked fraction at t
    estimator: Literal["exact_k", "bernoulli"] = "exact_k"  # antithetic pairs, or coins
    masking: Literal["uniform", "entropy"] = "uniform"  # which tokens; entropy needs token_entropy
    token_entropy: str = ""  # .npy file, one entropy (any unit) for every token id
    loss_weight: Literal["elbo", "uniform", "clipped"] = "uniform"  # training only
    weight_clip: float = 100.0  # largest weight of a masked token under clipped
    # <<< objective


# What must agree between a checkpoint and the model that takes its weights.
SHAPE_FIELDS = (
    "vocab_size n_layer n_head n_kv_head n_embd mlp mlp_ratio cond_dim tied unet value_residual "
    "softcap".split())
POSITIVE = "seq_len n_layer n_head n_embd steps batch_tokens micro_batch log_every".split()


class UserError(ValueError):
    """A user's mistake, in one line that names the flag or file and the remedy."""


def require(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def reading(path):
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except Exception as e:  # a file may hold anything
        raise UserError(f"{path}: cannot be used ({type(e).__name__}: {e})") from None


def parse_flags(argv):
    """['--name=value', ..] -> {name: value}, typed."""
    fields, flags = {f.name: f for f in dataclasses.fields(Config)}, {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(__doc__, inspect.getsource(Config), f"Presets: {', '.join(PRESETS)}", sep="\n")
            raise SystemExit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        near = (difflib.get_close_matches(name, fields, 1) or ["help"])[0]
        is_known = arg.startswith("--") and name in fields
        require(is_known, f"unknown flag {arg}: did you mean --{near}?")
        require(equals, f"--{name} needs a value: --{name}=VALUE")
        kind, choices = type(fields[name].default), get_args(fields[name].type)
        try:
            flags[name] = ("0", "1").index(text) == 1 if kind is bool else kind(text)
        except ValueError:
            expected = "0 or 1" if kind is bool else kind.__name__
            raise UserError(f"{arg}: {expected} expected") from None
        require(not choices or text in choices, f"{arg}: there are {', '.join(choices)}")
    return flags


def make_config(argv):
    """Flags -> (Config, the checkpoint to start from or None).

    A flag wins over the preset, and that over the defaults. --resume=1 goes on with the settings of
    the run in --out, if there is one; --init_from fixes the shape of the model and, unless a flag
    says otherwise, the context."""
    flags = parse_flags(argv)
    preset, source = flags.get("preset", ""), flags.get("init_from", "")
    require(preset in ("", *PRESETS), f"--preset={preset}: there are {', '.join(PRESETS)}")
    base = {"out": os.path.join("out", SCRIPT + (f"-{preset}" if preset else ""))}
    base.update(PRESETS.get(preset, {}))
    path = os.path.join(flags.get("out", base["out"]), "ckpt.pt")
    flags["resume"] = flags.get("resume", False) and os.path.exists(path)
    if flags["resume"]:
        source = flags["init_from"] = path
    is_eval = flags.get("eval_only", False)
    require(source or not is_eval, "--eval_only=1 needs a checkpoint: --init_from=PATH")
    if not source:
        return Config(**(base | flags)), None
    ckpt = load_checkpoint(source)
    fits = ckpt["script"] in ((SCRIPT,) if flags["resume"] else (SCRIPT, *INIT_FROM))
    require(fits, f"{source}: a checkpoint of {ckpt['script']}.py")
    saved = {f.name: ckpt["config"][f.name] for f in dataclasses.fields(Config)
             if f.name in ckpt["config"]}
    for name in flags.keys() & set(SHAPE_FIELDS):
        fits = flags[name] == saved.get(name)
        require(fits, f"--{name}={flags[name]}: {source} has {saved.get(name)}, which stays")
    if not (flags["resume"] or is_eval):
        saved = base | {name: saved[name] for name in (*SHAPE_FIELDS, "seq_len") if name in saved}
    return Config(**(saved | flags)), ckpt


def validate(cfg, world):
    """Refuse what cannot work, before anything is written."""
    for name in POSITIVE:
        require(getattr(cfg, name) > 0, f"--{name}={getattr(cfg, name)}: must be positive")
    is_even = cfg.n_embd % (2 * cfg.n_head) == 0
    require(is_even, f"--n_head={cfg.n_head}: {cfg.n_embd} / n_head is not an even number")
    divides = cfg.n_head % (cfg.n_kv_head or cfg.n_head) == 0
    require(divides, f"--n_kv_head={cfg.n_kv_head}: must divide --n_head={cfg.n_head}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    micro = min(cfg.micro_batch, max(1, n_rows // world))
    unit = cfg.seq_len * world * cfg.micro_batch
    near = max(1, round(cfg.batch_tokens / unit)) * unit
    fits = cfg.batch_tokens % (cfg.seq_len * world * micro) == 0
    require(fits, f"--batch_tokens={cfg.batch_tokens}: does not divide into {world} ranks times "
            f"{micro} rows of {cfg.seq_len} tokens; take {near}")
    check_objective(cfg, n_rows, micro)


# ----------------------------------------------------------------------------- data
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
META = "tokenizer vocab_size bos_id pattern token_bytes byte_length".split()


def open_shard(path, seq_len):
    """The windows of a shard of llm.c's format, (n, seq_len), on disk; its tail is left out."""
    size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_BYTES // 4)
    is_shard = tuple(header[:2]) == (SHARD_MAGIC, SHARD_VERSION)
    require(is_shard, f"{path}: not a token shard; make them with prepare_data.py")
    n_tokens, itemsize = int(header[2]), int(header[3]) or 2
    is_whole = itemsize in (1, 2) and size == HEADER_BYTES + n_tokens * itemsize
    require(is_whole, f"{path}: {size} bytes, but a header for {n_tokens} tokens of {itemsize} "
            "bytes: cut short or damaged; prepare it again")
    tokens = np.memmap(path, np.uint8 if itemsize == 1 else "<u2", "r", HEADER_BYTES, (n_tokens,))
    return tokens[:n_tokens // seq_len * seq_len].reshape(-1, seq_len)


class Windows:
    """All windows of seq_len tokens of one split, shard after shard."""
    def __init__(self, folder, split, seq_len):
        names = (f"*{split}_*.bin", f"*_{split}.bin")
        self.paths = sorted(p for n in names for p in glob.glob(os.path.join(folder, n)))
        require(self.paths, f"--data={folder}: no {names[0]} in it")
        self.shards = [open_shard(p, seq_len) for p in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, indices, vocab_size):
        """Windows -> (len(indices), seq_len) int64."""
        rows = []
        for index in indices:
            shard = int(np.searchsorted(self.starts, index, "right")) - 1
            rows.append(self.shards[shard][index - self.starts[shard]].astype(np.int64))
            largest = rows[-1].max()
            require(largest < vocab_size, f"{self.paths[shard]}: token {largest} of a vocabulary "
                    f"of {vocab_size}")
        return torch.from_numpy(np.stack(rows))


def load_meta(folder):
    """What meta.json says of the tokens. bos_id begins a document and stands for no text."""
    path = os.path.join(folder, "meta.json")
    require(os.path.exists(path), f"--data={folder}: no meta.json: run prepare_data.py again, or, "
            f"if these are published shards: python prepare_data.py meta {folder}")
    with reading(path), open(path, encoding="utf-8") as f:
        meta = json.load(f)
        return {key: meta[key] for key in META}


def open_data(cfg, ckpt):
    """-> (training windows, evaluation windows, meta.json), checked against cfg and checkpoint."""
    folder = cfg.data if os.path.isdir(cfg.data) else os.path.join("data", cfg.data)
    require(os.path.isdir(folder), f"--data={cfg.data}: no such folder, nor {folder}; "
            "prepare_data.py makes it, its --help lists what there is")
    meta, val = load_meta(folder), Windows(folder, cfg.split, cfg.seq_len)
    train = val if cfg.eval_only else Windows(folder, "train", cfg.seq_len)
    n_rows, n_ids = cfg.batch_tokens // cfg.seq_len, meta["vocab_size"]
    fits = not 0 < cfg.vocab_size < n_ids
    require(fits, f"--vocab_size={cfg.vocab_size}: {folder} has {n_ids} tokens")
    require(len(val) > 1, f"--data={cfg.data}: fewer than two windows of --seq_len={cfg.seq_len} "
            f"in {cfg.split}; lower --seq_len")
    require(cfg.eval_only or len(train) >= n_rows, f"--data={cfg.data}: {len(train)} windows of "
            f"--seq_len={cfg.seq_len}, fewer than the {n_rows} of a batch; lower --batch_tokens")
    # Find a bad token here rather than at the first evaluation.
    val.read(range(min(len(val), max(2, cfg.val_tokens // cfg.seq_len))), cfg.vocab_size or n_ids)
    for key in ("token_bytes", "pattern", "bos_id") if ckpt else ():
        require(ckpt["meta"][key] == meta[key], f"--data={cfg.data}: {meta['tokenizer']} tokens "
                f"with another vocabulary than the {ckpt['meta']['tokenizer']} tokens of "
                f"{cfg.init_from}: prepare the text again with --tokenizer={cfg.init_from}")
    return train, val, meta


# ----------------------------------------------------------------------------- layers
EMBED_STD, TIED_STD = 1.0, 0.02  # h0 is normalised: untied, this only sets the relative step size
SIGMA_FEATURES = 256
SIGMA_MIN_FREQ, SIGMA_MAX_FREQ = 1 / 32, 32  # radians per unit of log sigma


class Ctx(NamedTuple):
    """What all layers of one forward pass share."""
    cos: Tensor  # (S, D/H/2)
    sin: Tensor  # (S, D/H/2)
    h0: Tensor  # (B, S, D) embedding, for the skip into every layer
    cond: Tensor | None = None  # (B, cond_dim)
    v0: Tensor | None = None  # (B, S, Hkv d) to add to the values of this layer
    mask: object = None  # what attend makes of it
    attend: object = None  # a sampler's own attention, in place of attend


def norm(x, shift=None, scale=None):
    x = F.rms_norm(x, (x.size(-1),))
    return x if scale is None else x * (1 + scale) + shift


def rotary(x, cos, sin):
    """Rotate pairs (i, i + d/2) of x (B, H, S, d) by the angles of cos, sin (S, d/2)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


def rotary_tables(positions, head_dim):
    """positions (S,) -> cos, sin, each (S, head_dim / 2) float32."""
    freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angle = positions[:, None].float() * freq  # (S, head_dim / 2)
    return angle.cos(), angle.sin()


def matrix(n_in, n_out, zero=False):
    """A linear map, without bias; zero, or uniform with PyTorch's variance 1 / (3 n_in)."""
    linear = nn.Linear(n_in, n_out, bias=False)
    if zero:
        nn.init.zeros_(linear.weight)
    return linear


class Layer(nn.Module):
    """Attention and MLP, pre-norm, each added to the residual stream."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D = cfg, cfg.n_embd
        kv_dim = D // cfg.n_head * (cfg.n_kv_head or cfg.n_head)
        hidden = round(cfg.mlp_ratio * D)
        if cfg.mlp == "swiglu":
            hidden = math.ceil(hidden * 2 / 3 / 64) * 64
        # Every layer starts as the identity: by adaLN's zero gates, or else by zero projections.
        self.mod = matrix(cfg.cond_dim, 6 * D, zero=True) if cfg.cond_dim else None
        self.q = matrix(D, D)
        self.k = matrix(D, kv_dim)
        self.v = matrix(D, kv_dim)
        self.o = matrix(D, D, zero=self.mod is None)
        self.gate = matrix(D, hidden) if cfg.mlp == "swiglu" else None
        self.up = matrix(D, hidden)
        self.down = matrix(hidden, D, zero=self.mod is None)
        self.residual = nn.Parameter(torch.tensor([1.0, 0.0]))  # weights of h and of h0

    def forward(self, h, ctx, n_query=None):
        """h (B, S, D) -> (B, N, D), N = n_query leading positions, or all S."""
        B, S, D = h.shape
        N, d = n_query or S, D // self.cfg.n_head
        h = self.residual[0] * h + self.residual[1] * ctx.h0  # (B, S, D)
        mods = 6 * [None] if self.mod is None else self.mod(ctx.cond)[:, None].chunk(6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mods  # (B, 1, D) each

        x = norm(h, shift_a, scale_a)
        if N == S:  # three matrices, because Muon orthogonalises each, in one product
            w = torch.cat((self.q.weight, self.k.weight, self.v.weight))
            q, k, v = F.linear(x, w).split((D, len(self.k.weight), len(self.v.weight)), -1)
        else:
            q, k, v = self.q(x[:, :N]), self.k(x), self.v(x)
        v = v if ctx.v0 is None else v + ctx.v0
        q = q.view(B, N, -1, d).transpose(1, 2)  # (B, H, N, d)
        k = k.view(B, S, -1, d).transpose(1, 2)  # (B, Hkv, S, d)
        v = v.view(B, S, -1, d).transpose(1, 2)
        q = rotary(norm(q), ctx.cos[:N], ctx.sin[:N])
        k = rotary(norm(k), ctx.cos, ctx.sin)
        y = (ctx.attend or attend)(q, k, v, ctx)  # (B, H, N, d)
        y = self.o(y.transpose(1, 2).reshape(B, N, D))
        y = F.dropout(y, self.cfg.dropout, self.training)
        h = h[:, :N] + (y if gate_a is None else gate_a * y)

        x = norm(h, shift_m, scale_m)
        if self.gate is None:
            x = F.relu(self.up(x)).square()  # (B, N, hidden)
        else:
            x = F.silu(self.gate(x)) * self.up(x)
        y = F.dropout(self.down(x), self.cfg.dropout, self.training)
        return h + (y if gate_m is None else gate_m * y)


class Trunk(nn.Module):
    """Embedding, layers and head; Model below says what goes in and what comes out."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        C, D, V = cfg.cond_dim, cfg.n_embd, cfg.vocab_size
        self.embed = nn.Embedding(V + 1, D)  # the last row: the mask, or the start
        nn.init.normal_(self.embed.weight, std=TIED_STD if cfg.tied else EMBED_STD)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.head = None if cfg.tied else matrix(D, V, zero=True)
        self.skip = nn.Parameter(torch.ones(cfg.n_layer // 2)) if cfg.unet else None
        self.value = nn.Parameter(torch.full((cfg.n_layer,), 0.5)) if cfg.value_residual else None
        self.sigma_mlp = self.final_mod = None
        if C:
            self.sigma_mlp = nn.Sequential(
                matrix(SIGMA_FEATURES, C), nn.SiLU(), matrix(C, C), nn.SiLU())
            self.final_mod = matrix(C, 2 * D, zero=True)

    def embed_tokens(self, tokens):
        """(B, S) int64 -> (B, S, D), in the dtype of the matrix products."""
        h0 = norm(self.embed(tokens))
        if torch.is_autocast_enabled(h0.device.type):
            h0 = h0.to(torch.get_autocast_dtype(h0.device.type))
        return h0

    def embed_sigma(self, sigma):
        """Noise level (B,) -> (B, cond_dim), by sines of its logarithm; None without adaLN."""
        if self.sigma_mlp is None:
            return None
        step = torch.arange(SIGMA_FEATURES // 2, device=sigma.device) / (SIGMA_FEATURES // 2 - 1)
        freq = SIGMA_MIN_FREQ * (SIGMA_MAX_FREQ / SIGMA_MIN_FREQ) ** step
        angle = sigma.log()[:, None] * freq  # (B, SIGMA_FEATURES / 2)
        return self.sigma_mlp(torch.cat((angle.cos(), angle.sin()), -1))

    def run_layers(self, ctx, n_query=None):
        """h0 (B, S, D) -> (B, N, D); only the last layer leaves out queries (n_query)."""
        h, skips, n = ctx.h0, [], len(self.layers)
        v0 = None if self.value is None else self.layers[0].v(ctx.h0)  # (B, S, Hkv d)
        for i, layer in enumerate(self.layers):
            if v0 is not None:
                ctx = ctx._replace(v0=self.value[i] * v0)
            if self.skip is not None and i >= n - n // 2:
                h = h + self.skip[i - (n - n // 2)] * skips.pop()
            last = n_query if i == n - 1 else None
            if self.cfg.checkpoint_layers and self.training:
                h = checkpoint(layer, h, ctx, last, use_reentrant=False)
            else:
                h = layer(h, ctx, last)
            if self.skip is not None and i < n // 2:
                skips.append(h)
        return h

    def logits(self, h, cond=None, rows=None):
        """(B, N, D) -> (B, N, V) float32, or (R, V) at the flat positions rows (R,)."""
        mods = (None, None) if cond is None else self.final_mod(cond)[:, None].chunk(2, -1)
        h = norm(h, *mods)
        if rows is not None:
            h = h.flatten(0, 1).index_select(0, rows)  # (R, D)
        # Only real tokens: what stands for a hidden one is never predicted.
        weight = self.embed.weight[:-1] if self.head is None else self.head.weight
        logits = F.linear(h, weight).float()
        if self.cfg.softcap:
            logits = self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)
        return logits

    def predict(self, tokens, positions, sigma=None, rows=None, n_query=None, mask=None,
                attend=None):
        """tokens (B, S) int64 at positions (S,) -> logits (B, N, V), or (R, V) at the flat
        positions rows (R,) of the N = n_query or S outputs. A sampler that keeps keys and values
        gives an attention of its own: attend(q, k, v, ctx), called layer after layer."""
        cos, sin = rotary_tables(positions, self.cfg.n_embd // self.cfg.n_head)
        cond = None if sigma is None else self.embed_sigma(sigma)
        ctx = Ctx(cos, sin, self.embed_tokens(tokens), cond, mask=mask, attend=attend)
        return self.logits(self.run_layers(ctx, n_query), cond, rows)


# ----------------------------------------------------------------------------- objective
# >>> objective
METRIC = "val_nelbo"  # nats per token: an upper bound on the negative log-likelihood
INIT_FROM = ("train_mdlm",)  # scripts whose checkpoints fit --init_from, besides this one

PRESETS = {
    "tiny": dict(
        data="stdlib", seq_len=256, n_layer=6, n_head=4, n_embd=208, steps=300, batch_tokens=4096,
        micro_batch=16, lr=0.03, eval_every=75, val_tokens=65_536, ckpt_every=150),
    "shakespeare_10m": dict(
        data="shakespeare", seq_len=256, n_layer=6, n_head=6, n_embd=384, steps=1500,
        batch_tokens=16_384, micro_batch=64, dropout=0.1, ema=0.99, val_draws=4),
    "fineweb_124m": dict(
        n_head=12, mlp="swiglu", tied=True, steps=100_000, batch_tokens=32_768, micro_batch=32,
        optimizer="adamw", lr=6e-4, embed_lr=6e-4, scalar_lr=6e-4, warmup=2000,
        lr_schedule="cosine", lr_end=0.1, weight_decay=0.1, adam_beta1=0.9, grad_clip=1.0,
        eval_every=1000),
    "golf_19m": dict(
        vocab_size=1024, n_layer=8, n_head=8, n_kv_head=4, n_embd=576, mlp_ratio=2.0, unet=True,
        softcap=30.0, tied=True, steps=80_000, batch_tokens=524_288, micro_batch=64, lr=0.02,
        embed_lr=0.05, scalar_lr=0.05, adam_beta1=0.9, ema=0.999, ema_start=0.1, eval_every=1000,
        estimator="bernoulli", loss_weight="clipped", weight_clip=100.0),
    "tinystories_142m": dict(
        data="tinystories", vocab_size=8192, seq_len=256, n_head=12, cond_dim=768, steps=20_000,
        batch_tokens=131_072, micro_batch=64, eval_every=1000, schedule="cosine",
        estimator="bernoulli", loss_weight="uniform"),
}

# The masked fraction 1 - alpha_t, of t in (0, 1].
MASKED_FRACTION = {
    "linear": lambda t: t,
    "cosine": lambda t: 2 * torch.sin(math.pi / 4 * t) ** 2,
    "loglinear": lambda t: (1 - 1e-3) * t,
    "sqrt": lambda t: t.sqrt(),
    "clipped_cosine": lambda t: 0.05 + 1.8 * torch.sin(math.pi / 4 * t) ** 2,
    "sigmoid": lambda t: torch.sigmoid(10 * (t - 0.5)),
}
SIGMA_MAX = 20.0  # of the conditioning, where nothing is left unmasked
TILT_MIN, TILT_MAX = 0.5, 1.5  # of entropy masking
CPU_SHORT = 512  # positions
ROW_SIZES = 16  # a variable number of masked rows is padded up to a multiple of B T / 16


def check_objective(cfg, n_rows, micro):
    if cfg.estimator == "exact_k":
        is_plain = (cfg.schedule, cfg.masking) == ("linear", "uniform")
        require(is_plain and cfg.loss_weight != "clipped", "--schedule, --masking=entropy and "
                "--loss_weight=clipped need --estimator=bernoulli")
        require(n_rows % 2 == micro % 2 == 0, f"--micro_batch={micro}: exact_k needs pairs of rows")
    if cfg.masking == "entropy":
        token_tilt(cfg.token_entropy)


def flops_per_token(cfg, model):
    """Training FLOPs per token of x0: 6 per weight used, the head on half of the positions, plus
    12 n_layer D T for attention over all pairs of positions."""
    head = cfg.n_embd * cfg.vocab_size * (cfg.seq_len + 1) / (2 * cfg.seq_len)
    attention = 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len
    return 6 * (sum(layer_sizes(model).values()) + head) + attention


def attend(q, k, v, ctx):
    """Every position sees every position. q (B, H, T, d), k and v (B, Hkv, T, d) -> (B, H, T, d)"""
    if q.device.type == "cpu" and q.size(2) <= CPU_SHORT:
        # Plain products: at this length twice as fast as the CPU kernel behind the call below.
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
        return scores.float().softmax(-1).type_as(v) @ v
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1))


class Model(Trunk):
    """Denoiser: p(x0_i | xt) for every i at once."""
    def forward(self, xt, sigma, rows=None):
        """xt (B, T) int64 with mask_id = vocab_size, sigma (B,) -> logits (B, T, V) or (R, V)."""
        return self.predict(xt, torch.arange(xt.size(1), device=xt.device), sigma, rows)


class Noise(NamedTuple):
    """Randomness of a batch. Position i of a row is masked where score_i < level."""
    level: Tensor  # (R,) float32: k, or the masked fraction
    sigma: Tensor  # (R,) float32: -log alpha_t, for a network with time input
    weight: Tensor  # (R,) float32: of each masked token's cross entropy in the sum
    score: Tensor  # (R, T) float32: a random rank 0..T-1, or uniform in [0,1)


def draw_noise(cfg, n_rows, gen, bound=False):
    """All the randomness of a global batch of n_rows windows -> Noise, on the CPU.

    exact_k, and bound=True whatever training uses: pair j of P takes u in stratum j of (0, 1/2) and
    masks k = 1 + floor(uT) positions in one row, T + 1 - k in the other. Strata are dealt at random
    and a coin orders the pair, so each row alone has k ~ U{1..T} (arXiv 2110.02037, eq. 8)."""
    T = cfg.seq_len
    if bound or cfg.estimator == "exact_k":
        n_pairs = (n_rows + 1) // 2
        u = torch.rand(n_pairs, generator=gen, dtype=torch.float64)
        u = (torch.randperm(n_pairs, generator=gen) + u) / (2 * n_pairs)
        k = 1 + (u * T).long()
        coin = torch.rand(n_pairs, generator=gen) < 0.5
        k = torch.where(coin, k, T + 1 - k)
        k = torch.stack((k, T + 1 - k), 1).flatten()[:n_rows]  # (R,)
        order = torch.rand(n_rows, T, generator=gen).argsort(1)
        score = torch.empty(n_rows, T)
        score.scatter_(1, order, torch.arange(T, dtype=torch.float32).expand(n_rows, T))
        elbo = bound or cfg.loss_weight == "elbo"
        # uniform has no 1/k; the constant gives it the mean of the other, E[k] = (T + 1) / 2.
        weight = T / k if elbo else torch.full((n_rows,), 2 * T / (T + 1))
        return Noise(k.float(), -torch.log1p(-k / (T + 1)), weight.float(), score)
    u = torch.rand(n_rows, generator=gen, dtype=torch.float64)
    t = 1 - (torch.randperm(n_rows, generator=gen) + u) / n_rows  # stratified, in (0, 1]
    with torch.enable_grad():
        fraction = MASKED_FRACTION[cfg.schedule](t.requires_grad_())
        slope, = torch.autograd.grad(fraction.sum(), t)
    t, fraction = t.detach(), fraction.detach()
    score = torch.rand(n_rows, T, generator=gen)
    weight = slope / fraction  # -alpha' / (1 - alpha), arXiv 2406.07524, eq. 10
    if cfg.loss_weight == "clipped":
        weight = weight.clamp(max=cfg.weight_clip)
    elif cfg.loss_weight == "uniform":
        weight = torch.full_like(t, 1 / fraction.mean())
    sigma = -torch.log1p(-fraction).clamp(min=-SIGMA_MAX)
    return Noise(fraction.float(), sigma.float(), weight.float(), score)


@torch.compiler.disable
@functools.lru_cache(maxsize=1)
def token_tilt(path):
    """(V,) clamp(2 - H_token / mean H, .5, 1.5): likelier masks for predictable tokens."""
    require(os.path.isfile(path), f"--token_entropy={path}: no such .npy file")
    entropy = torch.from_numpy(np.load(path)).double()
    return (2 - entropy / entropy.mean()).clamp(TILT_MIN, TILT_MAX).float()


def corrupt(x0, noise, cfg):
    """x0 (B, T) -> xt (B, T): the mask (id vocab_size) where the noise says."""
    level = noise.level[:, None]
    if cfg.masking == "entropy":
        level = level * token_tilt(cfg.token_entropy).to(x0.device)[x0]
    return torch.where(noise.score < level, cfg.vocab_size, x0)


@torch.compiler.disable
def padded_count(is_mask):
    """Number of masked tokens, rounded up to one of ROW_SIZES, so that shapes rarely change."""
    size = math.ceil(is_mask.numel() / ROW_SIZES)
    return min(-(-int(is_mask.sum()) // size) * size, is_mask.numel())


def masked_losses(model, x0, xt, noise, n_masked):
    """Flat positions of the masked tokens, (n_masked,), with unmasked ones at the end as padding,
    and the weighted cross entropy there, 0 at padding."""
    is_mask = (xt != x0).flatten()
    rows = is_mask.to(torch.uint8).argsort(descending=True, stable=True)[:n_masked]
    logits = model(xt, noise.sigma, rows)
    ce = F.cross_entropy(logits, x0.flatten()[rows], reduction="none")
    weight = noise.weight.repeat_interleave(x0.size(1)) * is_mask  # (B T,)
    return rows, ce * weight[rows]


def loss_fn(model, x0, noise, cfg):
    """Training loss, nats per token: weighted sum over masked tokens / (B T)."""
    B, T = x0.shape
    xt = corrupt(x0, noise, cfg)
    paired = cfg.estimator == "exact_k" and B % 2 == 0
    n_masked = B // 2 * (T + 1) if paired else padded_count(xt != x0)
    _, losses = masked_losses(model, x0, xt, noise, n_masked)
    loss = losses.sum() / (B * T)
    # Rows that are not antithetic pairs would lose tokens here, so return NaN.
    return torch.where((xt != x0).sum() == n_masked, loss, torch.nan) if paired else loss


def nelbo_fn(model, x0, noise, cfg):
    """Bound on -log p(x0) in nats per sequence, (B,); noise by draw_noise(bound=True)."""
    B, T = x0.shape
    xt = torch.where(noise.score < noise.level[:, None], cfg.vocab_size, x0)
    rows, losses = masked_losses(model, x0, xt, noise, padded_count(xt != x0))
    return losses.new_zeros(B).index_add(0, rows // T, losses)
# <<< objective


# ----------------------------------------------------------------------------- optimizer
MOMENTUM_START, EMA_WARMUP = 0.85, 10
ALIGN = 64  # elements, so that the gradient of every parameter starts on a cache line
GROUPS = {  # what each group of parameters is called in Model
    "hidden": r"layers\.\d+\.(q|k|v|o|gate|up|down)\.weight",  # by Muon, everything else by AdamW
    "embed": r"embed\.weight",
    "head": r"head\.weight",
    "scalar": r"skip|value|layers\.\d+\.residual",
    "cond": r"(layers\.\d+\.mod|final_mod|sigma_mlp\.\d+)\.weight",
}


def group_of(name):
    """The group that a parameter belongs to."""
    found = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
    require(len(found) == 1, f"parameter {name} is in {len(found)} groups: name it in one of GROUPS"
            " (hidden: matrices inside the layers, scalar: vectors)")
    return found[0]


def layer_sizes(model):
    """{name: weights} of the matrices that every token is multiplied with, by any optimizer."""
    return {name: p.numel() for name, p in model.named_parameters()
            if p.ndim > 1 and group_of(name) not in ("embed", "head", "cond")}


def make_optimizers(model, cfg):
    """[hidden matrices by Muon or AdamW, everything else by AdamW]."""
    rates = dict(hidden=cfg.lr, embed=cfg.embed_lr, head=cfg.head_lr, scalar=cfg.scalar_lr,
                 cond=cfg.cond_lr)
    groups = {name: dict(params=[], lr=lr, peak_lr=lr, weight_decay=cfg.adam_weight_decay)
              for name, lr in rates.items()}
    groups["hidden"]["weight_decay"] = cfg.weight_decay
    for name, p in model.named_parameters():
        groups[group_of(name)]["params"].append(p)
    optimizers = []
    if cfg.optimizer == "muon":
        optimizers.append(Muon([groups.pop("hidden")], momentum=cfg.momentum,
                               cautious=cfg.cautious, beta2=cfg.muon_beta2 or None))
    optimizers.append(torch.optim.AdamW(
        [g for g in groups.values() if g["params"]], betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=1e-10, fused=model.embed.weight.device.type in ("cpu", "cuda")))
    return optimizers


def set_rates(optimizers, step, cfg):
    """Learning rate of every group and Muon's momentum, as they are at a 0-based step."""
    if cfg.lr_schedule == "cosine":
        x = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        x = 0.5 * (1 + math.cos(math.pi * x))
    else:
        x = min(1.0, (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps))
    factor = cfg.lr_end + (1 - cfg.lr_end) * x
    if step < cfg.warmup:
        factor = (step + 1) / cfg.warmup
    cold = max(0.0, 1 - step / cfg.momentum_warmup) if cfg.momentum_warmup else 0.0
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * factor
        if "momentum" in group:
            group["momentum"] = cfg.momentum - cold * max(0.0, cfg.momentum - MOMENTUM_START)


def swap(params, average):
    """Exchange the parameters with their average, if there is one; a second time undoes it."""
    for p, a in zip(params, average, strict=bool(average)):
        p.data, a.data = a.data, p.data


# ----------------------------------------------------------------------------- evaluation
EVAL_SEED = 20240520  # of the noise, the same for every run, so that runs compare in pairs


def derive_seed(*path):
    """A seed for one purpose out of numbers that name it."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


def take_rows(noise, rows, device):
    return type(noise)(*(x[rows].to(device, non_blocking=True) for x in noise))


@torch.no_grad()
def evaluate(nelbo, cfg, windows, token_length, device, rank, world, stop=()):
    """nelbo(x0, noise) -> (B,) nats, over the first val_tokens of a split.

    The same digits on any number of ranks: the noise of all windows is one draw, batches of them
    are dealt to the ranks in turn, sums are in float64. token_length (V,): bytes of every token.
    -> (a line; {METRIC: nats per token, se: standard error over pairs of neighbouring windows,
    whose noise is paired, bpb, ppl, and what they are of: tokens, bytes, draws, seed}; nats (N,)).
    None as soon as any rank has a signal in `stop`."""
    n = min(len(windows), max(2, cfg.val_tokens // cfg.seq_len)) // 2 * 2
    size = cfg.micro_batch + cfg.micro_batch % 2
    nats = torch.zeros(n, dtype=torch.float64)
    for draw in range(cfg.val_draws):
        gen = torch.Generator().manual_seed(derive_seed(EVAL_SEED, draw))
        noise = draw_noise(cfg, n, gen, bound=True)
        sums = torch.zeros(n, 2, dtype=torch.float64)  # nats and bytes of every window
        for first in range(rank * size, n + rank * size, world * size):
            if any_signal(stop, device, world):
                return None
            if first >= n:
                continue
            rows = slice(first, min(first + size, n))
            x0 = windows.read(range(rows.start, rows.stop), cfg.vocab_size)
            sums[rows, 0] = nelbo(x0.to(device), take_rows(noise, rows, device)).cpu().double()
            sums[rows, 1] = token_length[x0].sum(1).double()
        if world > 1:
            sums = sums.to(device)
            dist.all_reduce(sums)
            sums = sums.cpu()
        nats += sums[:, 0] / cfg.val_draws
    n_bytes, mean = int(sums[:, 1].sum()), float(nats.mean()) / cfg.seq_len
    pairs = nats.view(-1, 2).mean(1) / cfg.seq_len
    result = {METRIC: mean, "se": float(pairs.std() / len(pairs) ** 0.5) if n > 2 else None,
              "bpb": float(nats.sum()) / math.log(2) / n_bytes if n_bytes else None,
              "ppl": math.exp(min(mean, 700.0))}
    shown = {k: "n/a" if v is None else f"{v:.4f}" for k, v in result.items()}
    line = f"{METRIC}:{shown[METRIC]}+-{shown['se']} bpb:{shown['bpb']} ppl:{shown['ppl']}"
    result |= dict(tokens=n * cfg.seq_len, bytes=n_bytes, draws=cfg.val_draws, seed=EVAL_SEED)
    return line, result, nats


# ----------------------------------------------------------------------------- checkpoints
CKPT_FORMAT = 3


def load_checkpoint(path):
    """What save_checkpoint has written. Only tensors and plain values are read, never code."""
    require(os.path.isfile(path), f"{path}: no such checkpoint")
    with reading(path), open(path, "rb") as f:
        state = torch.load(f, map_location="cpu", weights_only=True)
        version = state["format"]
    require(version == CKPT_FORMAT, f"{path}: checkpoint of format {version}, this script reads "
            f"{CKPT_FORMAT}: train it again")
    return state


def save_checkpoint(path, state):
    """Write beside and then replace, so that a kill leaves the old file or the new one, whole."""
    with open(f"{path}.partial", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.partial", path)


def build_model(ckpt, weights="ema"):
    """A checkpoint (load_checkpoint) -> (model in eval mode, its Config); weights: ema or raw."""
    cfg = Config(**ckpt["config"])
    model = Model(cfg)
    model.load_state_dict((weights == "ema" and ckpt["ema"]) or ckpt["model"])
    return model.eval(), cfg


# ----------------------------------------------------------------------------- runtime
# Dense bf16 peak by part of the device's name, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 5090": 209e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12}
MAX_BAD_STEPS = 10  # consecutive non-finite steps after which a run stops
RECOMPILE_LIMIT = 32  # shapes: training, evaluation, and batches whose size varies
TIMEOUT = datetime.timedelta(minutes=10)  # after which a rank gives up waiting for another one


def pick_device(name, local_rank):
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in here if here[n]) if name == "auto" else name
    require(here.get(name), f"--device={name}: there is none here; --device=auto takes what is")
    if name != "cuda":
        return torch.device(name)
    n_gpus, n_ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    require(n_ranks <= n_gpus, f"--nproc_per_node={n_ranks}: this machine has {n_gpus} GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank)


def pick_dtype(name, device):
    """dtype of the matrix products: bf16 only where the hardware multiplies it, or on a CPU that is
    told to."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = name == "bf16" or any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast and name != "fp32" else torch.float32


def open_run(cfg, machine):
    """Make the run folder, or go on in it. -> (its lock, to be kept open; a function that writes a
    line to log.txt and the terminal; one that writes a record to log.jsonl)"""
    os.makedirs(cfg.out, exist_ok=True)
    lock = open(os.path.join(cfg.out, "lock"), "w")
    try:
        fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out={cfg.out}: another run is at work there") from None
    except OSError:
        pass  # a file system without locks
    is_free = cfg.resume or not os.path.exists(os.path.join(cfg.out, "ckpt.pt"))
    require(is_free, f"--out={cfg.out} holds a run: --resume=1 continues it, or give another --out")
    logging.raiseExceptions = False  # a full disk, or a closed terminal, does not stop a run
    logs = [logging.Logger(name) for name in ("log.txt", "log.jsonl")]
    for log in logs:
        path = os.path.join(cfg.out, log.name)
        log.addHandler(logging.FileHandler(path, "a" if cfg.resume else "w", encoding="utf-8"))
    if not cfg.resume:  # all that it takes to make the run again
        for source in (__file__, inspect.getfile(Muon)):
            with open(source, encoding="utf-8") as f:
                logs[0].info(f.read() + "=" * 100)
        logs[0].info(f"{machine}\n{json.dumps(dataclasses.asdict(cfg))}")
    logs[0].addHandler(logging.StreamHandler(sys.stdout))

    def record(values):  # JSON has no word for NaN
        logs[1].info(re.sub("NaN|-?Infinity", "null", json.dumps(values)))

    return lock, logs[0].info, record


def compile_losses(model, device):
    """-> loss_fn and nelbo_fn, compiled where there is a compiler, and a line that says so."""
    try:  # a small function first: is there a compiler at all?
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as e:  # whatever a missing or broken tool chain raises
        return loss_fn, nelbo_fn, f"running without torch.compile: {str(e).strip().splitlines()[0]}"
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    line = "compiling: the first steps take longer (--compile=0 does without)"
    if device.type == "cpu":  # one small graph for all layers: seconds, not a minute
        for layer in model.layers:
            layer.compile(dynamic=False)
        return loss_fn, nelbo_fn, line
    return *(torch.compile(f, dynamic=False) for f in (loss_fn, nelbo_fn)), line


def update(optimizers, params, average, at, cfg):
    """An optimizer step, and the average of the weights that follows it."""
    set_rates(optimizers, at.step - 1, cfg)
    for optimizer in optimizers:
        optimizer.step()
    if cfg.ema and at.step - 1 >= cfg.ema_start * cfg.steps:
        if not average:
            average.extend(p.detach().clone() for p in params)
        decay = min(cfg.ema, (1 + at.ema_updates) / (EMA_WARMUP + at.ema_updates))
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - decay)
        at.ema_updates += 1


def any_signal(stop, device, world):
    """Has any rank received a signal?"""
    n_signals = torch.tensor(float(len(stop)), device=device)
    if world > 1:
        dist.all_reduce(n_signals)
    return bool(n_signals)


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)


def read_batch(cfg, train, step, rank, world, device):
    """Micro-batches (x0, noise) of one rank."""
    n, n_rows = len(train), cfg.batch_tokens // cfg.seq_len
    per_rank = n_rows // world
    micro = min(cfg.micro_batch, per_rank)
    noise = draw_noise(cfg, n_rows, torch.Generator().manual_seed(derive_seed(cfg.seed, step)))
    batch = []
    for row in range(rank * per_rank, (rank + 1) * per_rank, micro):
        windows = range(step * n_rows + row, step * n_rows + row + micro)
        if cfg.shuffle:
            windows = [permutation(cfg.seed, i // n, n)[i % n] for i in windows]
        x0 = train.read([i % n for i in windows], cfg.vocab_size).to(device)
        batch.append((x0, take_rows(noise, slice(row, row + micro), device)))
    return batch


@contextlib.contextmanager
def in_one_line(kind):
    """Turn an exception of this kind into one line and exit status 2. All ranks meet the same one
    until they are joined; then each speaks for itself."""
    try:
        yield
    except kind as e:
        name = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"{SCRIPT}.py: {name}{' '.join(str(e).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@in_one_line(UserError)
def main(argv):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = record = bool  # without effect, on all ranks but the first
    with in_one_line(Exception):
        cfg, ckpt = make_config(argv)
        validate(cfg, world)
        train, val, meta = open_data(cfg, ckpt)
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or meta["vocab_size"])
        device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        torch.manual_seed(derive_seed(cfg.seed))
        model = Model(cfg)
        if ckpt:
            with reading(cfg.init_from):
                model.load_state_dict((not cfg.resume and ckpt["ema"]) or ckpt["model"])
        if rank == 0 and not cfg.eval_only:
            versions = f"python {sys.version.split()[0]} torch {torch.__version__}"
            lock, say, record = open_run(cfg, f"{versions} numpy {np.__version__} {machine} ranks "
                                         f"{world}")
    if world > 1:
        # torchrun --max-restarts keeps one store for all attempts, with addresses of dead ranks.
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=TIMEOUT,
                                device_id=device if device.type == "cuda" else None)
    stop = []  # signals received
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), lambda number, frame: stop.append(number))

    model.to(device)
    params, path = list(model.parameters()), os.path.join(cfg.out, "ckpt.pt")
    at = SimpleNamespace(step=0, seconds=0.0, bad=0, skipped=0, evaluated=0, ema_updates=0)
    average = []  # of the weights; empty until ema_start
    dtype, flops = pick_dtype(cfg.dtype, device), flops_per_token(cfg, model)
    peak = next((world * f for part, f in PEAK_FLOPS.items() if part in machine), None)
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per "
        f"token, {world} x {machine} in {str(dtype)[6:]}, {cfg.data}: "
        f"{len(train) * cfg.seq_len:,} tokens")
    train_loss, nelbo = loss_fn, nelbo_fn
    if cfg.compile and device.type != "mps":  # where compiled code may be silently wrong
        train_loss, nelbo, line = compile_losses(model, device)
        say(line)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    token_length = torch.tensor(meta["byte_length"])

    def run_evaluation():
        """The averaged weights, where there are any -> see evaluate."""
        model.eval()
        swap(params, average)
        with amp:
            bound = functools.partial(nelbo, model, cfg=cfg)
            done = evaluate(bound, cfg, val, token_length, device, rank, world, stop)
        swap(params, average)
        model.train()
        return done

    if cfg.eval_only:
        line, result, _ = run_evaluation() or sys.exit(130)
        if rank == 0:
            print(f"split:{cfg.split} {line} tokens:{result['tokens']} bytes:{result['bytes']} "
                  f"draws:{result['draws']} seed:{result['seed']}")
        if world > 1:
            dist.destroy_process_group()
        return
    # Every .grad is a view of one flat buffer: one all-reduce, one norm, one memset a step.
    sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
    flat_grad = torch.zeros(sum(sizes), device=device)
    for p, part in zip(params, flat_grad.split(sizes), strict=True):
        p.grad = part[:p.numel()].view_as(p)
    optimizers = make_optimizers(model, cfg)
    if cfg.resume:
        at = SimpleNamespace(**ckpt["progress"])
        for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
            # Rates and the like come from the flags, as does what this device can fuse.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        if ckpt["ema"]:
            average = [ckpt["ema"][name].to(device) for name, _ in model.named_parameters()]
        say(f"resuming {cfg.out} after step {at.step}")
    elif ckpt:
        say(f"weights, shape and --seq_len={cfg.seq_len} from {cfg.init_from}")
    ckpt = None  # gives its memory back
    saved = (at.step, at.evaluated) if cfg.resume else None  # what the checkpoint holds
    batch = read_batch(cfg, train, at.step, rank, world, device)
    losses, seconds, stopped, status = [], 0.0, False, 0
    model.train()
    while True:
        is_last = at.step >= cfg.steps
        # Once in a while: evaluate.
        is_due = is_last or cfg.eval_every and at.step % cfg.eval_every == 0
        if is_due and at.evaluated < at.step and not stopped:
            done = run_evaluation()
            stopped = done is None
            if done:
                at.evaluated, (line, result, nats) = at.step, done
                ms = 1000 * at.seconds
                say(f"step:{at.step}/{cfg.steps} {line} train_time:{ms:.0f}ms "
                    f"step_avg:{ms / at.step:.2f}ms")
                record({"step": at.step, **result})
                if is_last and rank == 0:
                    np.save(os.path.join(cfg.out, f"{cfg.split}_nats.npy"), nats.numpy())
        # Once in a while, but not among bad steps, and before leaving: save.
        is_nth = cfg.ckpt_every and at.step % cfg.ckpt_every == 0
        is_due = is_last or stopped or is_nth and not at.bad
        if is_due and at.step and saved != (at.step, at.evaluated) and rank == 0:
            weights, names = model.state_dict(), [name for name, _ in model.named_parameters()]
            bad = next((name for name, x in weights.items() if not x.isfinite().all()), "")
            require(not bad, f"{bad} is not finite: stopped at step {at.step}; {cfg.out} keeps its "
                    "last checkpoint; try a lower --lr")
            ema = weights | dict(zip(names, average, strict=True)) if average else None
            try:
                save_checkpoint(path, dict(
                    format=CKPT_FORMAT, script=SCRIPT, config=dataclasses.asdict(cfg), meta=meta,
                    model=weights, ema=ema, optimizers=[o.state_dict() for o in optimizers],
                    step=at.step, progress=vars(at)))
                saved = at.step, at.evaluated
            except (OSError, RuntimeError) as e:  # torch wraps what a full disk says
                say(f"{path}: step {at.step} not written: {e.__context__ or e}")
                status = int(is_last or stopped)
        if is_last or stopped:
            break

        # Make a step.
        start = time.perf_counter()
        flat_grad.zero_()
        total = torch.zeros(2, device=device)  # loss; signals
        for i, (x0, noise) in enumerate(batch):
            if stop:  # this step is dropped on all ranks, and made again after --resume=1
                break
            if cfg.dropout:
                torch.manual_seed(derive_seed(cfg.seed, at.step, rank * len(batch) + i))
            with amp:
                loss = train_loss(model, x0, noise, cfg) / len(batch)
            loss.backward()
            total[0] += loss.detach() / world
        total[1] += len(stop)
        if at.step + 1 < cfg.steps and not stop:
            batch = read_batch(cfg, train, at.step + 1, rank, world, device)  # as the GPU works
        if world > 1:
            dist.all_reduce(flat_grad)
            dist.all_reduce(total)
        flat_grad /= world
        grad_norm = float(flat_grad.norm())
        loss, stopped = total.tolist()
        if stopped:
            continue
        at.step += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if cfg.grad_clip and grad_norm > cfg.grad_clip:
                flat_grad *= cfg.grad_clip / grad_norm
            update(optimizers, params, average, at, cfg)
            at.bad = 0
        else:
            at.bad, at.skipped = at.bad + 1, at.skipped + 1
            say(f"step:{at.step}/{cfg.steps} skipped: loss {loss}, gradient norm {grad_norm}")
            require(at.bad < MAX_BAD_STEPS, f"{at.bad} non-finite steps in a row: stopped; "
                    f"{cfg.out} keeps its last checkpoint; try a lower --lr")
        losses.append(loss)
        seconds += time.perf_counter() - start
        at.seconds += time.perf_counter() - start
        if at.step == cfg.steps or at.step % cfg.log_every == 0:
            mean, rate = sum(losses) / len(losses), len(losses) * cfg.batch_tokens / seconds
            lr = optimizers[0].param_groups[0]["lr"]
            mfu = f"{rate * flops / peak:.3f}" if peak else "n/a"
            left = datetime.timedelta(seconds=(cfg.steps - at.step) * cfg.batch_tokens // rate)
            say(f"step:{at.step}/{cfg.steps} loss:{mean:.4f} lr:{lr:.2e} tok/s:{rate:.0f} mfu:{mfu}"
                f" eta:{left}" + (f" skipped:{at.skipped}" if at.skipped else ""))
            record({"step": at.step, "loss": mean, "grad_norm": grad_norm, "lr": lr})
            losses, seconds = [], 0.0

    if at.evaluated < cfg.steps:
        launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
        say(f"stopped after step {at.step}; continue with: {launcher} {SCRIPT}.py --resume=1 "
            f"--out={shlex.quote(cfg.out)}")
    else:
        say(f"done: {path}; text: python sample.py --ckpt={shlex.quote(path)}")
    if device.type == "cuda":
        say(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    if world > 1:
        dist.destroy_process_group()
    if status or signal.SIGINT in stop:
        raise SystemExit(status or 130)


if __name__ == "__main__":
    main(sys.argv[1:])
