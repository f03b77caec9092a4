"""Block diffusion language model (BD3-LM) in one file: data, model, training, evaluation, sampling.

Autoregressive over blocks of block_len = L tokens, masked diffusion inside each (Arriola et al.
2025, arXiv 2503.09573, eq. 3 and 8). Evaluation masks exactly k tokens of a block and L + 1 - k of
its neighbour, which draws the same bound (Hoogeboom et al. 2021, arXiv 2110.02037, eq. 8):

    -log p(x0) <= sum_b E_{k ~ U{1..L}} E_{|S| = k}
                  [ L/k  sum_{i in S} -log p(x0_i | block b of x0 outside S, the blocks before b) ]

Training draws k, or the fraction t = k/L, from the clipped range t_min .. t_max alone. One pass
gives the terms of all blocks: the network reads [xt; x0], both at positions 0..T-1. A noised block
sees itself and the clean blocks before it, a clean one sees clean blocks up to itself. So
block_len=1 is an autoregressive likelihood, and block_len=seq_len the bound of train_mdlm.

    python prepare_data.py stdlib && python train_block.py --preset=tiny       # minutes on a CPU
    torchrun --nproc_per_node=8 train_block.py                                 # FineWeb-Edu
    python train_block.py --preset=tiny --init_from=out/train_mdlm-tiny/ckpt.pt --out=out/block
    python sample.py --ckpt=out/block --prompt="def " --length=2000            # text, any length

The other scripts differ from this one only here and between the objective marks.
"""

import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import glob
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import zipfile
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
    max_bad_steps: int = 10  # consecutive non-finite steps after which the run stops
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
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # process group
    # >>> objective
    block_len: int = 16  # tokens of a diffusion block; divides seq_len
    estimator: Literal["exact_k", "bernoulli"] = "exact_k"  # antithetic pairs of blocks, or coins
    t_min: float = 0.3  # least masked fraction of a block in training; evaluation takes all
    t_max: float = 0.8  # largest one
    loss_weight: Literal["elbo", "uniform"] = "uniform"  # of masked tokens; training only
    doc_mask: bool = False  # no attention from a document to those before it in the window
    bos_id: int = 50256  # token that begins a document; read by doc_mask alone
    micro_batch: int = 8  # rows a forward pass and rank; each is twice as long inside
    shuffle: bool = False  # windows in random order; 0: in file order, as in the speedrun
    value_residual: bool = True  # the first layer's values, added to those of every layer
    muon_beta2: float = 0.95  # decay of NorMuon's second moment per neuron; 0: plain Muon
    # <<< objective


DEFAULTS = {f.name: f.default for f in dataclasses.fields(Config)}
# What must agree between a checkpoint and the model that takes its weights.
SHAPE_FIELDS = (
    "vocab_size n_layer n_head n_kv_head n_embd mlp mlp_ratio cond_dim tied unet value_residual "
    "softcap".split())
# What may change when a run goes on; everything else would make it another run.
RESUME_FIELDS = (
    "data out preset resume steps eval_every val_tokens val_draws split ckpt_every log_every "
    "micro_batch checkpoint_layers max_bad_steps device dtype compile backend".split())
POSITIVE = ("seq_len n_layer n_head n_embd mlp_ratio steps batch_tokens micro_batch val_tokens "
            "val_draws max_bad_steps log_every").split()
BELOW_ONE = "dropout ema momentum muon_beta2 adam_beta1 adam_beta2".split()
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun
MAX_FLAG, MAX_INT, MAX_FLOAT = 1000, 2**53, 1e100  # characters; beyond any use
LAYER_BYTES = 100_000  # of a layer without its weights, generously


def fail(message):
    """A user's mistake: one line, exit status 2. Before ranks part, only the first one speaks."""
    if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
        # A stranger's file gets no line and no colour of its own on the terminal.
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        print(f"{SCRIPT}.py: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def require(condition, message):
    if not condition:
        fail(message)


def show_help():
    """The docstring, then every flag with the comment beside it in Config."""
    comments = dict(re.findall(r"^    (\w+): [^#]+# (.+)$", inspect.getsource(Config), re.M))
    print(__doc__)
    for f in dataclasses.fields(Config):
        default = int(f.default) if isinstance(f.default, bool) else f.default
        print(f"  --{f.name}={default}  {comments[f.name]} {', '.join(get_args(f.type))}")
    print(f"Presets: {', '.join(PRESETS)}")


def parse_flags(argv):
    """['--name=value', ..] -> {name: value}, typed; anything else is refused."""
    flags = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            show_help()
            raise SystemExit(0)
        odd = f"{arg[:40]!a}: longer than {MAX_FLAG}, or of characters that cannot be shown"
        require(arg.isprintable() and len(arg) <= MAX_FLAG, odd)
        name, equals, text = arg.removeprefix("--").partition("=")
        require(name != "block_size", "--block_size has several meanings; --seq_len is the context")
        near = (difflib.get_close_matches(name, DEFAULTS, 1) or ["help"])[0]
        known = arg.startswith("--") and name in DEFAULTS
        require(known, f"unknown flag {arg}: did you mean --{near}?")
        require(equals, f"--{name} needs a value: --{name}=VALUE")
        require(name not in flags, f"--{name} is given twice")
        kind = type(DEFAULTS[name])
        try:
            flags[name] = ("0", "1").index(text) == 1 if kind is bool else kind(text)
        except ValueError:
            fail(f"{arg}: {kind.__name__} expected" + " (0 or 1)" * (kind is bool))
    return flags


def parse_args(argv):
    """Flags -> Config. A preset stands below the flags. A run that is resumed keeps its settings;
    a checkpoint that is started from fixes the shape of the model."""
    flags = parse_flags(argv)
    preset, source = flags.get("preset", ""), flags.get("init_from", "")
    resume, eval_only = flags.get("resume", False), flags.get("eval_only", False)
    require(preset in ("", *PRESETS), f"--preset={preset}: there are {', '.join(PRESETS)}")
    require(not (resume and source), "--resume=1 and --init_from exclude each other")
    require(source or not eval_only, "--eval_only=1 needs a checkpoint: --init_from=PATH")
    base = {"out": os.path.join("out", SCRIPT + (f"-{preset}" if preset else ""))}
    base.update(PRESETS.get(preset, {}))
    path = os.path.join(flags.get("out", base["out"]), "ckpt.pt")
    # What torchrun --max-restarts=N starts again goes on from where it was.
    restarted = os.environ.get(RESTARTS, "0") != "0" and not eval_only
    if restarted and os.path.exists(path):
        resume = flags["resume"] = True
        flags.pop("init_from", None)
    if resume:
        source = path
        require(os.path.exists(source), f"--resume=1: no {source}: name the run's folder by --out")
    if source:
        config = load_checkpoint(source)["config"]
        saved = {f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config}
        for name in set(saved) - set(RESUME_FIELDS) if resume else SHAPE_FIELDS:
            if name in flags and flags[name] != saved.get(name):
                fail(f"--{name}={flags[name]}: {source} has {saved.get(name)}, which stays")
        if not (resume or eval_only):
            saved = base | {name: saved[name] for name in SHAPE_FIELDS if name in saved}
        base = saved | {"split": "val", "resume": False, "out": base["out"]}
    return Config(**(base | flags))


def validate(cfg, world):
    """Refuse what cannot work, before anything is opened or written."""
    for f in dataclasses.fields(Config):
        value, choices = getattr(cfg, f.name), get_args(f.type)
        flag = f"--{f.name}={value}:"
        require(type(value) is type(f.default), f"{flag} {type(f.default).__name__} expected")
        require(not choices or value in choices, f"{flag} there are {', '.join(choices)}")
        if not isinstance(value, str):
            limit = MAX_FLOAT if isinstance(value, float) else MAX_INT
            require(0 <= value < limit, f"{flag} must be 0 or more, below {limit:.2g}")
            require(value > 0 or f.name not in POSITIVE, f"{flag} must be positive")
            require(value < 1 or f.name not in BELOW_ONE, f"{flag} must be below 1")
    n_head, n_rows = cfg.n_head, cfg.batch_tokens // cfg.seq_len
    require(cfg.n_embd % (2 * n_head) == 0, f"--n_head={n_head}: {cfg.n_embd} / n_head is not even")
    width = round(cfg.mlp_ratio * cfg.n_embd)
    require(width > 0, f"--mlp_ratio={cfg.mlp_ratio}: no hidden unit at --n_embd={cfg.n_embd}")
    divides = n_head % (cfg.n_kv_head or n_head) == 0
    require(divides, f"--n_kv_head={cfg.n_kv_head}: must divide --n_head={n_head}")
    layer = LAYER_BYTES + 4 * cfg.n_embd * (2 * cfg.n_embd + 2 * width + 6 * cfg.cond_dim)
    size = cfg.n_layer * layer + 8 * cfg.vocab_size * cfg.n_embd  # bytes, at least
    room = math.inf
    if hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(size < room, f"--n_layer={cfg.n_layer} --n_embd={cfg.n_embd} --mlp_ratio="
            f"{cfg.mlp_ratio} --vocab_size={cfg.vocab_size}: weights of {size / 1e9:.0f} GB, more "
            f"than the {room / 1e9:.0f} GB of this machine's memory")
    fits = cfg.batch_tokens % (cfg.seq_len * world) == 0
    require(fits, f"--batch_tokens={cfg.batch_tokens}: no multiple of --seq_len={cfg.seq_len}, or "
            f"its rows do not divide by {world} ranks")
    per_rank = n_rows // world
    micro = min(cfg.micro_batch, per_rank)
    require(per_rank % micro == 0, f"--micro_batch={micro}: must divide a rank's {per_rank} rows")
    check_objective(cfg, n_rows, micro)


# ----------------------------------------------------------------------------- data
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_VOCAB = 50257
MAX_META, MAX_VOCAB = 2**26, 2**16  # bytes of meta.json; tokens are uint16


def open_shard(path, seq_len):
    """The windows of a shard of llm.c's format, (n, seq_len), on disk; its tail is left out."""
    require(os.path.isfile(path), f"{path}: no such file")  # a pipe would be waited for
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except OSError as e:
        fail(f"{path}: {e.strerror}")
    shard = len(header) == HEADER_BYTES // 4 and tuple(header[:2]) == (SHARD_MAGIC, SHARD_VERSION)
    require(shard, f"{path}: not a token shard; make them with prepare_data.py")
    n_tokens, itemsize = int(header[2]), int(header[3]) or 2
    whole = itemsize in (1, 2) and n_tokens > 0 and size == HEADER_BYTES + n_tokens * itemsize
    require(whole, f"{path}: {size} bytes, but a header for {n_tokens} tokens of {itemsize}: cut "
            "short or damaged; prepare it again")
    tokens = np.memmap(path, np.uint8 if itemsize == 1 else "<u2", "r", HEADER_BYTES, (n_tokens,))
    return tokens[:n_tokens // seq_len * seq_len].reshape(-1, seq_len)


class Windows:
    """All windows of seq_len tokens of one split, shard after shard."""
    def __init__(self, folder, split, seq_len):
        self.paths = sorted(glob.glob(f"{glob.escape(folder)}/*{split}_*.bin"))
        require(self.paths, f"--data={folder}: no *{split}_*.bin in it")
        self.shards = [open_shard(p, seq_len) for p in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self.dtype = self.shards[0].dtype
        for shard, path in zip(self.shards, self.paths, strict=True):
            require(shard.dtype == self.dtype, f"{path}: {shard.dtype} tokens beside {self.dtype}")

    def __len__(self):
        return int(self.starts[-1])

    def read(self, indices, vocab_size):
        """Windows -> (len(indices), seq_len) int64."""
        rows = []
        for index in indices:
            shard = int(np.searchsorted(self.starts, index, "right")) - 1
            rows.append(self.shards[shard][index - self.starts[shard]].astype(np.int64))
            if rows[-1].max() >= vocab_size:
                fail(f"{self.paths[shard]}: token {rows[-1].max()} of a vocabulary of {vocab_size}")
        return torch.from_numpy(np.stack(rows))


def load_tokenizer(folder, dtype):
    """What turns ids into text, from meta.json; without it uint16 is GPT-2's and uint8 is bytes.

    -> {name, vocab_size, bos_id, pattern, token_bytes: uint8 (all bytes, id after id),
    token_length: int64 (V,), bytes of every id}. BOS stands for no text, so its length is 0."""
    path = os.path.join(folder, "meta.json")
    unfinished = os.path.exists(os.path.join(folder, "state.json")) and not os.path.lexists(path)
    require(not unfinished, f"--data={folder}: not finished; run prepare_data.py there once more")
    meta = dict(tokenizer="byte", vocab_size=256, bos_id=0, pattern=None, token_bytes=None)
    try:
        if os.path.lexists(path):
            if not os.path.isfile(path) or os.path.getsize(path) > MAX_META:
                raise ValueError(f"no file, or larger than {MAX_META} bytes")
            with open(path, encoding="utf-8") as f:
                meta = json.load(f)
        elif dtype != np.uint8:
            meta = gpt2_meta()
        name, pattern, bos_id = meta["tokenizer"], meta["pattern"], meta["bos_id"]
        table = [text.encode("latin-1") for text in meta["token_bytes"] or map(chr, range(256))]
        if type(name) is not str or type(pattern) not in (str, type(None)):
            raise TypeError("tokenizer or pattern is no text")
        if type(bos_id) is not int or not 0 <= bos_id < len(table):
            raise ValueError(f"bos_id {bos_id!s:.40} of {len(table)} tokens")
        if len(table) != meta["vocab_size"] or len(table) > MAX_VOCAB:
            raise ValueError(f"{len(table)} tokens, vocab_size {meta['vocab_size']!s:.40}")
        table[bos_id] = b""
        return dict(name=name, vocab_size=len(table), bos_id=bos_id, pattern=pattern,
                    token_length=torch.tensor([len(b) for b in table]),
                    token_bytes=torch.tensor(list(b"".join(table)), dtype=torch.uint8))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        fail(f"{path}: not a description of this data ({type(e).__name__}: {e!s:.200}); prepare "
             "it again")


def gpt2_meta():
    """GPT-2's entries of meta.json; tokens without bytes where its vocabulary cannot be had."""
    table, pattern = [""] * GPT2_VOCAB, None
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
        table = [gpt2.decode_single_token_bytes(i).decode("latin-1") for i in range(GPT2_VOCAB)]
        pattern = gpt2._pat_str
    except Exception as e:  # not installed, no network, a proxy, a full disk
        print(f"{SCRIPT}.py: no GPT-2 vocabulary ({type(e).__name__}), so no bits per byte: it "
              "comes over the network, or from the folder in TIKTOKEN_CACHE_DIR", file=sys.stderr)
    return dict(tokenizer="gpt2", vocab_size=GPT2_VOCAB, bos_id=GPT2_VOCAB - 1, pattern=pattern,
                token_bytes=table)


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
INIT_FROM = ("train_block", "train_mdlm", "gpt")  # scripts whose checkpoints fit --init_from

PRESETS = {
    "tiny": dict(
        data="stdlib", seq_len=256, n_layer=6, n_head=4, n_embd=208, steps=300, batch_tokens=4096,
        micro_batch=16, lr=0.03, eval_every=75, val_tokens=65_536, ckpt_every=150, shuffle=True,
        value_residual=False, muon_beta2=0.0),
    "nano_block": dict(
        n_head=6, unet=True, estimator="bernoulli", loss_weight="elbo", doc_mask=True,
        embed_lr=0.06, head_lr=0.0011, scalar_lr=0.04, adam_weight_decay=0.0, weight_decay=0.0,
        cooldown=0.8, lr_end=0.1, muon_beta2=0.0),
}
ROW_SIZES = 16  # a variable number of masked rows is padded up to a multiple of B T / 16
ROUNDING = 1e-9  # of t_min L and t_max L, which may be meant to be whole


def count_range(cfg):
    """The least and the largest number of masked tokens of a block in training, under exact_k."""
    low = max(1, math.ceil(cfg.t_min * cfg.block_len - ROUNDING))
    return low, max(low, math.floor(cfg.t_max * cfg.block_len + ROUNDING))


def check_objective(cfg, n_rows, micro_rows):
    """Refuse combinations that this objective does not have."""
    L, T = cfg.block_len, cfg.seq_len
    require(L > 0 and T % L == 0, f"--block_len={L}: must divide --seq_len={T}")
    require(cfg.t_min < cfg.t_max <= 1, f"--t_max={cfg.t_max}: must be above --t_min={cfg.t_min}, "
            "and 1 at the most")
    if cfg.estimator == "exact_k":
        for name, n in ("batch_tokens", n_rows), ("micro_batch", micro_rows):
            require(n * (T // L) % 2 == 0, f"--{name}={getattr(cfg, name)}: {n * (T // L)} blocks, "
                    "exact_k needs pairs")
    require(cfg.cond_dim == 0, f"--cond_dim={cfg.cond_dim}: every block has a noise level of its "
            "own, and this network takes none: drop it")
    check_bos(cfg)


def check_bos(cfg):
    known = not (cfg.doc_mask and cfg.vocab_size) or cfg.bos_id < cfg.vocab_size
    require(known, f"--bos_id={cfg.bos_id}: no token of a vocabulary of {cfg.vocab_size}; "
            "--doc_mask=1 needs the one that begins a document")


def flops_per_token(cfg, model):
    """Training FLOPs per token of x0: 6 per weight used, by both copies but for the last layer's
    clean one, which needs only keys and values; the head on masked tokens; plus 12 n_layer D T for
    attention over the pairs of positions that see each other."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if is_hidden(n)}
    unused = sum(size for name, size in sizes.items()
                 if re.match(rf"layers\.{cfg.n_layer - 1}\.(?![kv]\.)", name))
    low, high = count_range(cfg)
    masked = (low + high) / (2 * cfg.block_len)
    if cfg.estimator == "bernoulli":
        masked = (cfg.t_min + cfg.t_max) / 2
    head = cfg.n_embd * cfg.vocab_size * masked
    pairs = (cfg.n_layer - 0.5) * (cfg.seq_len + cfg.block_len)
    return 6 * (2 * sum(sizes.values()) - unused + head) + 12 * cfg.n_embd * pairs


def sees(q, k, T, block_len):
    """Does query q attend to key k? 0..T-1 is the noised copy, T..2T-1 the clean one. These are
    M_BD, M_OBC and M_BC of arXiv 2503.09573, section 3.1 and its appendix on masks."""
    q_block, k_block = q % T // block_len, k % T // block_len
    same_half = (q < T) == (k < T)
    return (q_block == k_block) & same_half | (k_block < q_block) & (k >= T)


def use_flex(device):
    """FlexAttention skips what no query sees, but only a compiled one saves memory, too."""
    return device.type == "cuda" and torch.compiler.is_compiling()


def two_copy_masks(T, block_len, device, flex):
    """{number of leading queries: their mask over 2T keys}, for all of them and for the noised
    half: BlockMask of FlexAttention, or dense bool."""
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b, h, q, k):
            return sees(q, k, T, block_len)

        return {n: create_block_mask(rule, None, None, n, 2 * T, device) for n in (T, 2 * T)}
    with torch.inference_mode(False):  # what is kept may be trained with later
        at = torch.arange(2 * T, device=device)
        mask = sees(at[:, None], at, T, block_len)
        return {T: mask[:T], 2 * T: mask}


@torch.compiler.assume_constant_result  # runs while torch.compile traces, never in a step
def prepare_masks(model, key):
    """Build what model.masks lacks: a mask for every (T, device, flex) that occurs."""
    T, device, flex = key
    if key not in model.masks:
        model.masks[key] = two_copy_masks(T, model.cfg.block_len, device, flex)


def documents(x0, cfg):
    """x0 (B, T) -> (B, 2T), the document of every position of both copies, counted by bos_id. A
    noised block goes on with the document before it: a boundary inside would give bos_id away."""
    clean = (x0 == cfg.bos_id).cumsum(1)  # (B, T)
    before = F.pad(clean[:, cfg.block_len - 1:-1:cfg.block_len], (1, 0))  # (B, T / block_len)
    return torch.cat((before.repeat_interleave(cfg.block_len, 1), clean), 1)


def attend(q, k, v, ctx):
    """Every position sees what the mask says, under doc_mask of its own document alone.
    q (B, H, N, d), k and v (B, Hkv, 2T, d) -> (B, H, N, d), N is 2T or, in the last layer, T"""
    masks, docs = ctx.mask
    mask, is_grouped = masks[q.size(2)], q.size(1) != k.size(1)
    if isinstance(mask, Tensor):
        dense = functools.partial(F.scaled_dot_product_attention, enable_gqa=is_grouped)
        T = k.size(2) // 2
        noised = dense(q[:, :, :T], k, v, mask[..., :T, :])
        if q.size(2) == T:
            return noised
        # Clean queries see no noised key: a quarter of the products less.
        clean = dense(*(x[:, :, T:] for x in (q, k, v)), mask[..., T:, T:])
        return torch.cat((noised, clean), 2)
    from torch.nn.attention.flex_attention import flex_attention

    def same_document(score, b, h, q_at, k_at):
        return torch.where(docs[b, q_at] == docs[b, k_at], score, -math.inf)

    # The blocks' mask fits all rows; documents differ by row, and are compared inside the kernel.
    score_mod = None if docs is None else same_document
    return flex_attention(q, k, v, score_mod, mask, enable_gqa=is_grouped)


class Model(Trunk):
    """Denoiser: p(x0_i | its block of xt, the blocks of x0 before it) for every i at once."""
    def __init__(self, cfg):
        check_bos(cfg)  # again: the vocabulary may come from the data
        super().__init__(cfg)
        self.masks = {}  # by shape, see prepare_masks

    def forward(self, xt, x0, rows=None):
        """xt (B, T) int64 with mask_id = vocab_size, x0 (B, T) -> logits (B, T, V), or (R, V) at
        the flat positions rows (R,). block_len divides T."""
        T, device = xt.size(1), xt.device
        flex = use_flex(device)
        prepare_masks(self, (T, device, flex))
        masks = self.masks[T, device, flex]
        docs = documents(x0, self.cfg) if self.cfg.doc_mask else None  # (B, 2T)
        if docs is not None and not flex:
            same = docs[:, None, :, None] == docs[:, None, None, :]  # (B, 1, 2T, 2T)
            masks = {n: mask & same[:, :, :n] for n, mask in masks.items()}
        positions = torch.arange(T, device=device).repeat(2)
        tokens = torch.cat((xt, x0), 1)  # (B, 2T)
        return self.predict(tokens, positions, rows=rows, n_query=T, mask=(masks, docs))


class Noise(NamedTuple):
    """Randomness of a batch of n blocks a row. Position i of block b is masked where
    score_i < level_b."""
    level: Tensor  # (R, n) float32: k, or the masked fraction t
    weight: Tensor  # (R, n) float32: of each masked token's cross entropy in the sum
    score: Tensor  # (R, T) float32: a random rank in the block, or uniform in [0,1)


def draw_noise(cfg, n_rows, gen, bound=False):
    """All the randomness of a global batch of n_rows windows -> Noise, on the CPU.

    exact_k, and bound=True whatever training uses: pair j of P neighbouring blocks takes u in
    stratum j of (0, 1/2) and masks k = k_min + floor(u (k_max - k_min + 1)) tokens in one block,
    k_min + k_max - k in the other. Strata are dealt at random and a coin orders the pair, so each
    block alone has k ~ U{k_min..k_max}; {1..block_len} for the bound. A last block that seq_len
    cuts short counts its own tokens."""
    T, L = cfg.seq_len, cfg.block_len
    n = -(-T // L)
    size = torch.full((n,), L)
    size[-1] = T - (n - 1) * L
    elbo, total = bound or cfg.loss_weight == "elbo", n_rows * n
    if bound or cfg.estimator == "exact_k":
        low, high = (1, size) if bound else count_range(cfg)
        n_pairs = (total + 1) // 2
        u = torch.rand(n_pairs, generator=gen, dtype=torch.float64)
        u = (torch.randperm(n_pairs, generator=gen) + u) / (2 * n_pairs)
        coin = torch.rand(n_pairs, generator=gen) < 0.5
        u = torch.stack((u, u), 1).flatten()[:total].view(n_rows, n)
        coin = torch.stack((coin, ~coin), 1).flatten()[:total].view(n_rows, n)
        k = low + (u * (high - low + 1)).long()
        k = torch.where(coin, k, low + high - k)  # (R, n)
        order = torch.rand(n_rows, n * L, generator=gen)
        order[:, T:] = 2.0  # behind all that is there
        order = order.view(n_rows, n, L).argsort(2)
        score = torch.empty(n_rows, n, L)
        score.scatter_(2, order, torch.arange(L, dtype=torch.float32).expand_as(score))
        # uniform has no 1/k; the constant gives it the mean of the other, size / E[k].
        weight = size / k if elbo else (2 * size / (low + high)).expand(n_rows, n)
        return Noise(k.float(), weight.float(), score.flatten(1)[:, :T].contiguous())
    u = torch.rand(total, generator=gen, dtype=torch.float64)
    u = (torch.randperm(total, generator=gen) + u) / total  # stratified, in [0, 1)
    t = (cfg.t_max - (cfg.t_max - cfg.t_min) * u).view(n_rows, n)  # above t_min
    score = torch.rand(n_rows, T, generator=gen)
    weight = 1 / t if elbo else torch.full_like(t, 2 / (cfg.t_min + cfg.t_max))
    return Noise(t.float(), weight.float(), score)


def per_token(values, block_len, T):
    """(B, n), one a block -> (B, T)."""
    return values.repeat_interleave(block_len, 1)[:, :T]


def corrupt(x0, noise, cfg):
    """x0 (B, T) -> xt (B, T): the mask (id vocab_size) where the noise says."""
    level = per_token(noise.level, cfg.block_len, x0.size(1))
    return torch.where(noise.score < level, cfg.vocab_size, x0)


@torch.compiler.disable
def padded_count(is_mask):
    """Number of masked tokens, rounded up to one of ROW_SIZES, so that shapes rarely change."""
    size = math.ceil(is_mask.numel() / ROW_SIZES)
    return min(-(-int(is_mask.sum()) // size) * size, is_mask.numel())


def masked_losses(model, x0, xt, noise, cfg, n_masked):
    """Flat positions of the masked tokens, (n_masked,), with unmasked ones at the end as padding,
    and the weighted cross entropy there, 0 at padding."""
    T = x0.size(1)
    is_mask = (xt != x0).flatten()
    rows = is_mask.to(torch.uint8).argsort(descending=True, stable=True)[:n_masked]
    missing = -T % cfg.block_len  # of the last block: masked, and no part of the sum
    xt, clean = (F.pad(x, (0, missing), value=cfg.vocab_size) for x in (xt, x0))
    logits = model(xt, clean, rows + rows // T * missing)
    ce = F.cross_entropy(logits, x0.flatten()[rows], reduction="none")
    weight = per_token(noise.weight, cfg.block_len, T).flatten() * is_mask  # (B T,)
    return rows, ce * weight[rows]


def loss_fn(model, x0, noise, cfg):
    """Training loss, nats per token: weighted sum over masked tokens / (B T)."""
    B, T = x0.shape
    xt = corrupt(x0, noise, cfg)
    n_blocks = B * (T // cfg.block_len)
    paired = cfg.estimator == "exact_k" and n_blocks % 2 == 0
    n_masked = n_blocks // 2 * sum(count_range(cfg)) if paired else padded_count(xt != x0)
    _, losses = masked_losses(model, x0, xt, noise, cfg, n_masked)
    loss = losses.sum() / (B * T)
    # Blocks that are no antithetic pairs would lose tokens here; better no number than that.
    return torch.where((xt != x0).sum() == n_masked, loss, torch.nan) if paired else loss


def nelbo_fn(model, x0, noise, cfg):
    """Bound on -log p(x0) in nats per sequence, (B,); noise by draw_noise(bound=True)."""
    B, T = x0.shape
    xt = corrupt(x0, noise, cfg)
    rows, losses = masked_losses(model, x0, xt, noise, cfg, padded_count(xt != x0))
    return losses.new_zeros(B).index_add(0, rows // T, losses)


def other_figures(nats, noise):
    """Beside the bound there are none."""
    return {}
# <<< objective


# ----------------------------------------------------------------------------- optimizer
MOMENTUM_START, EMA_WARMUP = 0.85, 10
ALIGN = 64  # elements, so that the gradient of every parameter starts on a cache line


def is_hidden(name):
    """Does Muon take this parameter? The matrices of the layers, conditioning apart."""
    return re.match(r"layers\.\d+\.(q|k|v|o|gate|up|down)\.", name) is not None


def make_optimizers(model, cfg):
    """[hidden matrices by Muon or AdamW, everything else by AdamW]."""
    rates = dict(hidden=cfg.lr, embed=cfg.embed_lr, head=cfg.head_lr, scalar=cfg.scalar_lr,
                 cond=cfg.cond_lr)
    groups = {kind: dict(params=[], lr=lr, peak_lr=lr, weight_decay=cfg.adam_weight_decay)
              for kind, lr in rates.items()}
    groups["hidden"]["weight_decay"] = cfg.weight_decay
    for name, p in model.named_parameters():
        part = "hidden" if is_hidden(name) else name.split(".")[0]
        kind = part if part in groups else "scalar" if p.ndim < 2 else "cond"
        groups[kind]["params"].append(p)
    optimizers = []
    if cfg.optimizer == "muon":
        optimizers.append(Muon([groups.pop("hidden")], momentum=cfg.momentum,
                               cautious=cfg.cautious, beta2=cfg.muon_beta2 or None))
    optimizers.append(torch.optim.AdamW(
        [g for g in groups.values() if g["params"]], betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=1e-10, fused=model.embed.weight.device.type in ("cpu", "cuda")))
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(set(owned)) == len(owned) == len(list(model.parameters()))
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


def swap(params, shadow):
    """Exchange the parameters with their average, if there is one; a second time undoes it."""
    for p, average in zip(params, shadow, strict=bool(shadow)):
        p.data, average.data = average.data, p.data


# ----------------------------------------------------------------------------- evaluation
EVAL_SEED = 20240520  # of the noise, the same for every run, so that runs compare in pairs


def derive_seed(*path):
    """A seed for one purpose out of numbers that name it."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


def take_rows(noise, rows, device):
    return type(noise)(*(x[rows].to(device, non_blocking=True) for x in noise))


@torch.no_grad()
def evaluate(nelbo, cfg, windows, tokenizer, device, rank, world, stopping=bool):
    """nelbo(x0, noise) -> (B,) nats, over the first val_tokens of a split.

    The same digits on any number of ranks: the noise of all windows is one draw, batches of them
    are dealt to the ranks in turn, sums are in float64. -> ({METRIC: nats per token, se: standard
    error over pairs of neighbouring windows, whose noise is paired, bpb, ppl, ..}, what they are
    of {tokens, bytes, draws, seed}, nats (N,)). None as soon as stopping(), the same on all ranks,
    says so."""
    n = min(len(windows), max(2, cfg.val_tokens // cfg.seq_len)) // 2 * 2
    size = cfg.micro_batch + cfg.micro_batch % 2
    nats, others = torch.zeros(n, dtype=torch.float64), {}
    for draw in range(cfg.val_draws):
        gen = torch.Generator().manual_seed(derive_seed(EVAL_SEED, draw))
        noise = draw_noise(cfg, n, gen, bound=True)
        sums = torch.zeros(n, 2, dtype=torch.float64)  # nats and bytes of every window
        for first in range(rank * size, n + rank * size, world * size):
            if stopping():
                return None
            if first >= n:
                continue
            rows = slice(first, min(first + size, n))
            x0 = windows.read(range(rows.start, rows.stop), cfg.vocab_size)
            sums[rows, 0] = nelbo(x0.to(device), take_rows(noise, rows, device)).cpu().double()
            sums[rows, 1] = tokenizer["token_length"][x0].sum(1).double()
        if world > 1:
            sums = sums.to(device)
            dist.all_reduce(sums)
            sums = sums.cpu()
        nats += sums[:, 0] / cfg.val_draws
        for name, value in other_figures(sums[:, 0], noise).items():
            others[name] = others.get(name, 0.0) + value / cfg.val_draws
    n_bytes, mean = int(sums[:, 1].sum()), float(nats.mean()) / cfg.seq_len
    pairs = nats.view(-1, 2).mean(1) / cfg.seq_len
    return {METRIC: mean, "se": float(pairs.std() / len(pairs) ** 0.5) if n > 2 else None,
            "bpb": float(nats.sum()) / math.log(2) / n_bytes if n_bytes else None,
            "ppl": math.exp(min(mean, 700.0)), **others}, dict(
                tokens=n * cfg.seq_len, bytes=n_bytes, draws=cfg.val_draws, seed=EVAL_SEED), nats


# ----------------------------------------------------------------------------- checkpoints
CKPT_FORMAT = 2
CKPT_TYPES = {"format": int, "script": str, "config": dict, "model": dict, "optimizers": list,
              "tokenizer": dict, "step": int, "tokens_seen": int, "progress": dict}
MAX_DEPTH, MAX_READS = 8, 100  # of a checkpoint's dicts and lists; of one that keeps changing
# What a run knows beside its weights; its place in the data is step times the rows of a batch.
PROGRESS = dict(step=0, seconds=0.0, bad=0, skipped=0, evaluated=True, ema_updates=0,
                shown_step=0, shown_seconds=0.0, loss=0.0)  # last line, losses since then


def save_checkpoint(path, state):
    """Write beside, then swap in, keeping the one before: some checkpoint always loads.
    -> what went wrong, or ''."""
    partial, previous = f"{path}.partial", path.removesuffix(".pt") + "_prev.pt"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # somebody may have removed it
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):  # which stays until it is replaced
            with contextlib.suppress(FileNotFoundError):
                os.remove(previous)
            try:
                os.link(path, previous)
            except OSError:  # no hard links here
                shutil.copyfile(path, previous)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch.save wraps what the disk says
        with contextlib.suppress(OSError):
            os.remove(partial)
        return str(e if isinstance(e, OSError) else e.__context__ or e).splitlines()[0]
    return ""


def leaves(tree, path="", depth=0):
    """(path, value) of all that nested dicts and lists hold; refuses what a run never writes."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{path:.80}: nested too deeply")
    if not isinstance(tree, dict | list | tuple) or not tree:
        yield path, None if isinstance(tree, dict | list | tuple) else tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if type(key) not in (str, int):
            raise TypeError(f"{path:.80}: a key of type {type(key).__name__}")
        yield from leaves(value, f"{path}.{key}" if path else str(key), depth + 1)


def first_not_finite(tree):
    """Path of the first tensor with a NaN or an infinity, or ''."""
    return next((path for path, x in leaves(tree) if isinstance(x, Tensor)
                 and x.is_floating_point() and not x.isfinite().all()), "")


def check_checkpoint(state, size):
    """Raise unless this is what a run writes, in every type, and no more than a file of so many
    bytes can hold: tensors may claim to be huge, lists may hold each other."""
    if not isinstance(state, dict):
        raise TypeError(f"a {type(state).__name__}")
    for name, kind in CKPT_TYPES.items():
        if type(state.get(name)) is not kind:
            raise TypeError(f"{name} is {type(state.get(name)).__name__}, not {kind.__name__}")
    if state["format"] != CKPT_FORMAT:
        raise ValueError(f"format {state['format']!s:.40} is not known here")
    n_bytes, n_values = 0, 0
    for path, x in leaves(state):
        part, _, name = path.partition(".")
        tensor = type(x) is Tensor and x.layout == torch.strided and not x.is_meta
        plain = type(x) in (str, float, bool, type(None)) or type(x) is int and abs(x) < 2**63
        if part in ("model", "ema") and name:
            good = tensor and x.is_floating_point()
        else:
            good = plain or tensor and part in ("tokenizer", "optimizers")
        if part == "optimizers" and tensor:
            good = x.dtype == torch.float32
        if part == "config":
            good = plain and "." not in name and type(x) is type(DEFAULTS.get(name, x))
        if not good:
            raise TypeError(f"{path:.80}: a {type(x).__name__} is not expected there")
        n_bytes, n_values = n_bytes + (x.nbytes if tensor else 0), n_values + 1
        if max(n_bytes, n_values) > size:
            raise ValueError(f"{path:.80}: more than the file can hold")
    kinds = [{k: type(x) for k, x in d.items()} for d in (state["progress"], PROGRESS)]
    if kinds[0] != kinds[1] or min((state["progress"] | {"loss": 0.0}).values()) < 0:
        raise ValueError("progress is not that of a run")
    if type(state["tokenizer"].get("vocab_size")) is not int:
        raise TypeError("tokenizer is not that of a run")


def stamp(path):
    """Changes with the file behind a path; None: there is none."""
    with contextlib.suppress(OSError):
        about = os.stat(path)
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def load_checkpoint(path):
    """Read and check a checkpoint; tensors and plain values only, never code. Again, if a run has
    put the next one in its place meanwhile: torch opens a file twice."""
    require(os.path.exists(path), f"{path}: no such checkpoint")
    require(os.path.isfile(path), f"{path}: not a file")  # a pipe would be waited for
    for _ in range(MAX_READS):
        before, state, problem = stamp(path), None, ""
        try:
            with zipfile.ZipFile(path) as f:
                if any(item.compress_type != zipfile.ZIP_STORED for item in f.infolist()):
                    raise ValueError("compressed")
            with warnings.catch_warnings(action="ignore"):  # torch's, about files of others
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            check_checkpoint(state, os.path.getsize(path))
        except Exception as e:  # the unpickler meets arbitrary bytes, the check any values
            problem = f"{e!s:.200}"
            if state is None:
                code = "weights_only" in str(e) or "Unsupported" in str(e)
                problem = "holds more than plain values" if code else "cut short or damaged"
                problem += f" ({type(e).__name__})"
        if stamp(path) == before:
            break
    previous = os.fspath(path).removesuffix(".pt") + "_prev.pt"
    if os.path.isfile(previous) and zipfile.is_zipfile(previous):
        problem += f"; {previous} is the one before it: rename it to go back" * bool(problem)
    require(not problem, f"{path}: no checkpoint of ours: {problem}")
    return state


def load_model(cfg, weights, path):
    """The model of cfg with a checkpoint's weights: all of them, in their shapes and finite. They
    are compared before any memory is taken."""
    try:
        n_layer = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
        if cfg.n_layer != n_layer:
            raise ValueError(f"{n_layer} layers, but --n_layer={cfg.n_layer}.")
        with torch.device("meta"):
            model = Model(cfg)
        copies = {name: x.float().contiguous().clone() for name, x in weights.items()}
        model.load_state_dict(copies, assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as e:
        what = (str(e).splitlines() or [""])[-1].strip()
        fail(f"{path}: {what:.300} Another shape: give the flags it was trained with")
    name = first_not_finite(weights)
    require(not name, f"{path}: {name} has numbers that are not finite; take an earlier one")
    return model


def load_optimizers(optimizers, states):
    """Continue with states of a checkpoint, or raise: of these settings, in these shapes."""
    varying = ("lr", "momentum")  # set_rates
    for optimizer, state in zip(optimizers, copy.deepcopy(states), strict=True):
        groups = [[{k: v for k, v in g.items() if k not in varying} for g in s["param_groups"]]
                  for s in (optimizer.state_dict(), state)]
        if groups[0] != groups[1]:
            raise ValueError("its groups of parameters are others")
        optimizer.load_state_dict(state)
        for p, values in optimizer.state.items():
            wanted = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if isinstance(optimizer, Muon):
                wanted = {"momentum": p.shape, "second_moment": (*p.shape[:-1], 1)}
                if groups[0][0]["beta2"] is None:
                    del wanted["second_moment"]
            if {name: x.shape for name, x in values.items()} != wanted:
                raise ValueError("its states are others")
        name = first_not_finite(state)
        if name:
            raise ValueError(f"{name} is not finite")


def build_model(ckpt, weights="ema", device="cpu", path="checkpoint"):
    """A checkpoint (load_checkpoint) -> (model in eval mode, its Config); weights: ema or raw."""
    unknown = ckpt["config"].keys() - DEFAULTS.keys()
    require(not unknown, f"{path}: its settings {unknown or ''!s:.200} are not this script's")
    cfg = Config(**ckpt["config"])
    validate(cfg, 1)
    model = load_model(cfg, (weights == "ema" and ckpt.get("ema")) or ckpt["model"], path)
    return model.to(device).eval(), cfg


# ----------------------------------------------------------------------------- runtime
# Dense bf16 peak by part of the device's name, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
RECOMPILE_LIMIT = 32  # shapes: training, evaluation, and batches whose size varies
# Seconds after which a rank that waits for another one gives up: while that one may compile or
# write a checkpoint, and in between.
START_TIMEOUT, COLLECTIVE_TIMEOUT = 900, 100
LOST = re.compile("gloo|nccl|socket|connection|pair closure|timed? ?out", re.I)
END_RETRY, STOP_RETRY, RETRY_EVERY = 600, 15, 1  # seconds to try again to write what would be lost


def pick_device(cfg, local_rank):
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in here if here[n]) if cfg.device == "auto" else cfg.device
    require(here.get(name), f"--device={name}: there is none here; --device=auto takes what is")
    if name != "cuda":
        return torch.device(name)
    n_gpus = torch.cuda.device_count()
    require(local_rank < n_gpus, f"--nproc_per_node: at most {n_gpus}, the GPUs of this machine")
    torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank)


def pick_dtype(cfg, device):
    """(dtype of the matrix products, notice): bf16 only where the hardware multiplies it."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    if cfg.dtype == "bf16" and not fast and device.type != "cpu":
        return torch.float32, f"--dtype=bf16: not in the hardware of this {device.type}, using fp32"
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and fast)
    return torch.bfloat16 if bf16 else torch.float32, ""


def lock_folder(folder):
    """Make a run folder and hold it, since two runs would mix. -> what lets it go"""
    os.makedirs(folder, exist_ok=True)
    if not fcntl:
        return bool
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        fail(f"--out={folder}: another run is at work there; wait for it, or give another --out")
    except OSError:
        pass  # a file system without locks
    return functools.partial(os.close, handle)


def begin_logs(cfg, machine, at):
    """log.txt and log.jsonl, with all that running it again takes; of a run that goes on, cut back
    to where it is. Torn lines go, too."""
    for name, pattern in (("log.txt", r"step:(\d+)"), ("log.jsonl", r'\{"step": (\d+)')):
        path, lines = os.path.join(cfg.out, name), []
        if cfg.resume and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace", newline="") as f:
                for x in f:
                    step = int((re.match(pattern, x) or [0, 0])[1])
                    again = step == at.step and METRIC in x and not at.evaluated
                    if x.endswith("\n") and step <= at.step and not again:
                        lines.append(x)
        elif name == "log.txt":
            if os.path.exists(path):  # of a run that was lost before its first checkpoint, or not
                with open(path, "rb") as f:
                    require(f.read(3) in (b"", b'"' * 3), f"{path}: no run's; give another --out")
            for source in (__file__, inspect.getfile(Muon)):
                with open(source, encoding="utf-8") as f:
                    lines += [*f, "=" * 100 + "\n"]
            lines += [machine + "\n", json.dumps(dataclasses.asdict(cfg)) + "\n"]
        with open(f"{path}.partial", "w", encoding="utf-8", newline="") as f:
            f.writelines(lines)
        os.replace(f"{path}.partial", path)


def append(path, line):
    """Add a whole line, or none."""
    rest = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as f:  # a buffer would write what is left when closed
        size = f.tell()
        try:
            while rest:
                rest = rest[f.write(rest):]
        except OSError:
            os.truncate(path, size)
            raise


def run(argv, ending):
    """A run or an evaluation, by flags; ending: what is to be called at any end of it."""
    cfg = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(cfg, world)
    folder = cfg.data if os.path.isdir(cfg.data) else os.path.join("data", cfg.data)
    require(os.path.isdir(folder), f"--data={cfg.data}: no such folder, nor {folder}; "
            "prepare_data.py makes it, its --help lists what there is")
    val = Windows(folder, cfg.split, cfg.seq_len)
    train = val if cfg.eval_only else Windows(folder, "train", cfg.seq_len)
    dtypes = f"{train.dtype} in train, {val.dtype} in {cfg.split} shards"
    require(train.dtype == val.dtype, f"{folder}: {dtypes}; prepare it again")
    tokenizer = load_tokenizer(folder, val.dtype)
    n_ids, n_rows, n = tokenizer["vocab_size"], cfg.batch_tokens // cfg.seq_len, len(train)
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or n_ids)
    require(cfg.vocab_size >= n_ids, f"--vocab_size={cfg.vocab_size}: {folder} has {n_ids}")
    require(len(val) > 1, f"--data={cfg.data}: less than two windows of --seq_len in {cfg.split}")
    require(cfg.eval_only or n >= n_rows, f"--data={cfg.data}: {n} windows of --seq_len, fewer "
            f"than the {n_rows} of a batch; lower --batch_tokens")
    # Better a bad token here than at the first evaluation.
    val.read(range(min(len(val), max(2, cfg.val_tokens // cfg.seq_len))), cfg.vocab_size)
    path = os.path.join(cfg.out, "ckpt.pt")
    taken = f"--out={cfg.out} holds a run: --resume=1 continues it, or give another --out"
    require(cfg.resume or cfg.eval_only or not os.path.exists(path), taken)
    device = pick_device(cfg, int(os.environ.get("LOCAL_RANK", 0)))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype, notice = pick_dtype(cfg, device)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    torch.manual_seed(derive_seed(cfg.seed))
    source = path if cfg.resume else cfg.init_from
    if not source:
        model = Model(cfg)
    else:
        ckpt = load_checkpoint(source)
        fits = ckpt["script"] in ((SCRIPT,) if cfg.resume else INIT_FROM)
        require(fits, f"{source}: a checkpoint of {ckpt['script']:.80}.py")
        n_saved = ckpt["tokenizer"].get("vocab_size")
        require(n_saved == n_ids, f"{source}: of {n_saved} tokens; {folder} has {n_ids}")
        weights = (not cfg.resume and ckpt.get("ema")) or ckpt["model"]
        model = load_model(cfg, weights, source)
    model.to(device)
    params = list(model.parameters())
    at = SimpleNamespace(**(ckpt["progress"] if cfg.resume else PROGRESS))
    shadow = []  # the averaged weights
    if not cfg.eval_only:
        # Every .grad is a view of one flat buffer: one all-reduce, one norm, one memset a step.
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
        flat_grad = torch.zeros(sum(sizes), device=device)
        for p, part in zip(params, flat_grad.split(sizes), strict=True):
            p.grad = part[:p.numel()].view_as(p)
        optimizers = make_optimizers(model, cfg)
        if cfg.resume:
            try:
                load_optimizers(optimizers, ckpt["optimizers"])
                for name, p in model.named_parameters() if ckpt["ema"] else ():
                    shadow.append(ckpt["ema"][name].to(device).contiguous().clone())
                    if shadow[-1].shape != p.shape or not shadow[-1].isfinite().all():
                        raise ValueError(f"ema.{name} has another shape, or is not finite")
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
                fail(f"{path}: cannot be continued ({type(e).__name__}: {e!s:.200})")
    ckpt = None  # gives its memory back
    versions = (f"python {sys.version.split()[0]} torch {torch.__version__} numpy "
                f"{np.__version__} {machine} ranks {world}")
    logs = ("log.txt", "log.jsonl") if rank == 0 and not cfg.eval_only else ()
    if logs:
        try:
            ending.callback(lock_folder(cfg.out))
            require(cfg.resume or not os.path.exists(path), taken)  # by a run that has just ended
            begin_logs(cfg, versions, at)
        except OSError as e:
            fail(f"--out={cfg.out}: {e.strerror}")
    if world > 1:
        auto = "nccl" if device.type == "cuda" else "gloo"
        backend = auto if cfg.backend == "auto" else cfg.backend
        # torchrun --max-restarts keeps one store for all attempts, with addresses of the dead.
        limit = datetime.timedelta(seconds=START_TIMEOUT)
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore("attempt" + os.environ.get(RESTARTS, "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)

    complaint = ""

    def say(line, *records):
        """Print on the first rank and keep in the logs of a training run, as far as they can be
        written: a run is worth more than its words."""
        nonlocal complaint
        if rank > 0:
            return
        try:
            print(line, flush=True)
        except OSError:  # who read this has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        try:
            if logs and not os.path.exists(cfg.out):  # somebody removed it
                os.makedirs(cfg.out)
                begin_logs(cfg, versions, at)
            for name, text in zip(logs, (line, *map(json.dumps, records)), strict=False):
                # JSON has no word for NaN.
                append(os.path.join(cfg.out, name), re.sub(r": -?(NaN|Infinity)", ": null", text))
            complaint = ""
        except OSError as e:
            if complaint != e.strerror:
                complaint = e.strerror
                print(f"{SCRIPT}.py: {cfg.out}: {complaint}: lines are missing in its logs, the "
                      "run goes on", file=sys.stderr, flush=True)

    def wait_at_most(seconds):
        """For the other ranks, from the next exchange on."""
        if world > 1:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))

    stop = []  # signals received
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has two of them
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # nohup
            before = signal.signal(number, lambda number, frame: stop.append(number))
            ending.callback(signal.signal, number, before)

    def stopping():
        """Has any rank received a signal?"""
        n_signals = torch.tensor(float(len(stop)), device=device)
        if world > 1:
            dist.all_reduce(n_signals)
        return bool(n_signals)

    flops = flops_per_token(cfg, model)
    peak = next((world * f for part, f in PEAK_FLOPS.items() if part in machine), None)
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per "
        f"token, {world} x {machine} in {str(dtype)[6:]}, {folder}: "
        f"{n * cfg.seq_len:,} tokens")
    if notice:
        say(notice)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    train_loss, nelbo = loss_fn, nelbo_fn
    if cfg.compile:
        try:  # a small function first: is there a compiler at all?
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
            if device.type == "cpu":  # one small graph for all layers: seconds, not a minute
                for layer in model.layers:
                    layer.compile(dynamic=False)
            else:
                train_loss, nelbo = (torch.compile(f, dynamic=False) for f in (loss_fn, nelbo_fn))
            say("compiling: the first steps take longer (--compile=0 does without)")
        except Exception as e:  # whatever a missing or broken tool chain raises
            say(f"running without torch.compile: {str(e).strip().splitlines()[0]}")

    fresh = True  # before the first evaluation, which may compile

    def run_evaluation():
        """Evaluate the averaged weights, where there are any. -> whether a signal ended it."""
        nonlocal fresh
        wait_at_most(START_TIMEOUT if fresh else COLLECTIVE_TIMEOUT)
        fresh = False
        model.eval()
        swap(params, shadow)
        with amp:
            bound = functools.partial(nelbo, model, cfg=cfg)
            done = evaluate(bound, cfg, val, tokenizer, device, rank, world, stopping)
        swap(params, shadow)
        model.train()
        at.evaluated = done is not None
        if not done:
            return True
        result, counts, nats = done
        shown = {k: "n/a" if v is None else f"{v:.4f}" for k, v in result.items()}
        shown[METRIC] += f"+-{shown.pop('se')}"
        line = " ".join(f"{k}:{v}" for k, v in shown.items())
        if cfg.eval_only:
            say(f"split:{cfg.split} {line} " + " ".join(f"{k}:{v}" for k, v in counts.items()))
            return False
        ms = 1000 * at.seconds
        say(f"step:{at.step}/{cfg.steps} {line} train_time:{ms:.0f}ms "
            f"step_avg:{ms / at.step:.2f}ms", {"step": at.step, **result, **counts})
        if at.step == cfg.steps and rank == 0:
            try:
                np.save(os.path.join(cfg.out, f"{cfg.split}_nats.npy"), nats.numpy())
            except OSError as e:
                say(f"{cfg.out}: {cfg.split}_nats.npy not written ({e.strerror})")
        return False

    if cfg.eval_only:
        stopped = run_evaluation()
        if world > 1:
            dist.destroy_process_group()
        if stopped:
            raise SystemExit(128 + stop[0] if stop else 1)
        return
    if cfg.resume:
        say(f"resuming {cfg.out} after step {at.step}")
    saved = (at.step, at.evaluated) if cfg.resume else None  # what the checkpoint holds
    per_rank = n_rows // world
    micro = min(cfg.micro_batch, per_rank)

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return np.random.default_rng((cfg.seed, epoch)).permutation(n)

    def next_batch(step):
        """Micro-batches (x0, noise) of this rank."""
        noise = draw_noise(cfg, n_rows, torch.Generator().manual_seed(derive_seed(cfg.seed, step)))
        batch = []
        for row in range(rank * per_rank, (rank + 1) * per_rank, micro):
            rows = range(step * n_rows + row, step * n_rows + row + micro)
            if cfg.shuffle:
                rows = [permutation(i // n)[i % n] for i in rows]
            x0 = train.read([i % n for i in rows], cfg.vocab_size).to(device)
            batch.append((x0, take_rows(noise, slice(row, row + micro), device)))
        return batch

    def save(seconds):
        """Write a checkpoint, on the first rank; at the end, try again for so many seconds."""
        nonlocal saved
        saved = at.step, at.evaluated
        if rank > 0:
            return
        named = {name: p.detach() for name, p in model.named_parameters()}
        state = {
            "format": CKPT_FORMAT, "script": SCRIPT, "config": dataclasses.asdict(cfg),
            "tokenizer": tokenizer, "model": named, "step": at.step, "progress": vars(at),
            "ema": dict(zip(named, shadow, strict=True)) if shadow else None,
            "optimizers": [o.state_dict() for o in optimizers],
            "tokens_seen": at.step * cfg.batch_tokens}
        name = first_not_finite(state)
        require(not name, f"{name} is not finite: stopped at step {at.step}; {cfg.out} keeps its "
                "last checkpoint; try a lower --lr")
        until, signals, said = time.monotonic() + seconds, len(stop), ""
        while problem := save_checkpoint(path, state):
            message = f"{path}: step {at.step} not written ({problem}); the one before it stays"
            if not seconds:
                return say(message)
            late = time.monotonic() > until or len(stop) > signals
            require(not late, f"{message}; make room, then --resume=1")
            if message != said:
                say(f"{message}; make room: trying again for {seconds} s")
            said = message
            time.sleep(RETRY_EVERY)

    model.train()
    wait_at_most(START_TIMEOUT)
    first = at.step
    stopped = not at.evaluated and run_evaluation()
    batch = next_batch(at.step) if at.step < cfg.steps and not stopped else []
    start = time.perf_counter()
    while at.step < cfg.steps and not stopped:
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
        total[1] = len(stop)
        if at.step + 1 < cfg.steps and not stop:
            batch = next_batch(at.step + 1)  # while the GPU works
        slow = at.step < first + 3 or saved == (at.step, True)
        wait_at_most(START_TIMEOUT if slow else COLLECTIVE_TIMEOUT)
        if world > 1:
            dist.all_reduce(flat_grad)
            dist.all_reduce(total)
        flat_grad /= world
        grad_norm = float(flat_grad.norm())
        loss, stopped = total.tolist()
        if stopped:
            break
        at.step += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if cfg.grad_clip and grad_norm > cfg.grad_clip:
                flat_grad *= cfg.grad_clip / grad_norm
            set_rates(optimizers, at.step - 1, cfg)
            for optimizer in optimizers:
                optimizer.step()
            if cfg.ema and at.step - 1 >= cfg.ema_start * cfg.steps:
                shadow = shadow or [p.detach().clone() for p in params]
                decay = min(cfg.ema, (1 + at.ema_updates) / (EMA_WARMUP + at.ema_updates))
                with torch.no_grad():
                    torch._foreach_lerp_(shadow, params, 1 - decay)
                at.ema_updates += 1
            at.bad = 0
        else:
            at.bad, at.skipped = at.bad + 1, at.skipped + 1
            named = dict(model.named_parameters())
            name = first_not_finite({"weight": named, "gradient": {
                name: p.grad for name, p in named.items()}})
            say(f"step:{at.step}/{cfg.steps} skipped: loss {loss}, gradient norm {grad_norm}, "
                f"first tensor that is not finite: {name or 'none'}")
            require(at.bad < cfg.max_bad_steps, f"{at.bad} non-finite steps in a row: stopped at "
                    f"step {at.step}; {cfg.out} keeps its last checkpoint; try a lower --lr, look "
                    "at the data")
        at.loss += loss
        at.seconds += time.perf_counter() - start
        last = at.step == cfg.steps
        if last or at.step % cfg.log_every == 0:
            n_steps = at.step - at.shown_step
            mean, seconds = at.loss / n_steps, (at.seconds - at.shown_seconds) / n_steps
            rate, lr = cfg.batch_tokens / seconds, optimizers[0].param_groups[0]["lr"]
            left = datetime.timedelta(seconds=int(min(1e9, (cfg.steps - at.step) * seconds)))
            at.loss, at.shown_step, at.shown_seconds = 0.0, at.step, at.seconds
            say(f"step:{at.step}/{cfg.steps} loss:{mean:.4f} lr:{lr:.2e} tok/s:{rate:.0f} mfu:"
                + (f"{rate * flops / peak:.3f}" if peak else "n/a")
                + f" eta:{left}" + (f" skipped:{at.skipped}" if at.skipped else ""),
                {"step": at.step, "loss": mean, "grad_norm": grad_norm, "lr": lr})
        if last or cfg.eval_every and at.step % cfg.eval_every == 0:
            stopped = run_evaluation()
        if cfg.ckpt_every and at.step % cfg.ckpt_every == 0 and not (last or stopped):
            save(0)
        start = time.perf_counter()

    if saved != (at.step, at.evaluated):
        save(STOP_RETRY if stopped else END_RETRY)
    if at.step < cfg.steps or not at.evaluated:
        launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
        say(f"stopped after step {at.step}; continue with: {launcher} {SCRIPT}.py --resume=1 "
            f"--out={shlex.quote(cfg.out)}")
    else:
        say(f"done: {path}; text: python sample.py --ckpt={shlex.quote(path)}")
    if device.type == "cuda":
        say(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    if world > 1:
        dist.destroy_process_group()
    if signal.SIGINT in stop:
        raise SystemExit(130)


def main(argv):
    """run(argv), with a line for what may befall any run."""
    with contextlib.ExitStack() as ending:
        try:
            run(argv, ending)
        except KeyboardInterrupt:  # before a run looks for signals
            raise SystemExit(130) from None
        except RuntimeError as e:
            if not dist.is_initialized() or not LOST.search(str(e)):
                raise
            print(f"{SCRIPT}.py: rank {os.environ['RANK']} lost contact with another rank: stopped;"
                  " --resume=1 continues from the last checkpoint "
                  f"({str(e).splitlines()[0]:.200})", file=sys.stderr, flush=True)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
