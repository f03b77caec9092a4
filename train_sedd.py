"""Score entropy discrete diffusion (SEDD) in one file: data, model, training, evaluation.

Noise replaces every token of x0 by the mask (absorb) or by a random one of the N tokens (uniform),
with probability 1 - exp(-sigma). The network answers with the log score, an estimate of
log p_t(xt with y at i) - log p_t(xt), and its score entropy bounds the likelihood (Lou, Meng &
Ermon 2024, arXiv 2310.16834, theorem 3.6), K(a) = a (log a - 1), Q the rate y -> xt_i:

    -log p(x0) <= int dsigma E_xt sum_i sum_{y != xt_i} Q [ s_y - r_y log s_y + K(r_y) ]
                  + KL(p_1(. | x0) || prior),    r_y = p_t(y | x0_i) / p_t(xt_i | x0_i)

absorb: time is a factor, s = exp(u) / (exp(sigma) - 1), with which the integral is masked
diffusion's, sum_y exp(u_y) - 1 - u_x0 in place of -log p(x0_i | xt): as in train_mdlm, rows of
exactly k and T+1-k masks give the same bound. uniform: s_y is the ratio of exp(u - sigma) + 1 -
exp(-sigma) at y and at xt_i. exp(u) need not sum to 1. Time input (--cond_dim) is a choice in both.

    python prepare_data.py stdlib && python train_sedd.py --preset=tiny         # minutes on a CPU
    python train_sedd.py --preset=tiny --graph=uniform --out=out/uniform        # the other graph
    torchrun --nproc_per_node=4 train_sedd.py --preset=pg19_355m                # 8,192 bytes
    python train_sedd.py --eval_only=1 --init_from=out/train_sedd-tiny/ckpt.pt  # bits per byte
    python sample.py --ckpt=out/train_sedd-tiny --steps=128                     # text
"""

import contextlib
import dataclasses
import datetime
import difflib
import functools
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muon import Muon

FILE = Path(__file__).absolute()
SCRIPT = FILE.stem

# ----------------------------------------------------------------------------- configuration
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run: --name=value overrides one, --preset=NAME (see presets/) several."""
    data: str = "finewebedu10B"  # folder with shards, or the name of one under data/
    out: str = ""  # run folder; empty: out/<script>-<preset>
    preset: str = ""  # named settings; flags given beside it win
    seq_len: int = 1024  # context T, tokens
    prompt_len: int = 0  # first tokens of a window that are given: never masked and not scored
    seed: int = 0  # weights, data order, noise and dropout all derive from it
    shuffle: bool = True  # windows in random order; 0: in file order
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
    eval_every: int = 250  # steps; 0: only at the end
    val_tokens: int = 10_485_760  # at most, in file order
    val_draws: int = 1  # noise draws a window
    split: Literal["val", "test"] = "val"  # what evaluation reads
    eval_only: bool = False  # evaluate --init_from and leave
    ckpt_every: int = 1000  # steps; 0: only at the end
    log_every: int = 10  # steps
    init_from: str = ""  # checkpoint whose weights to start from
    resume: bool = False  # continue the run in --out
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # matrix products
    compile: bool = True  # torch.compile
    # >>> objective
    graph: Literal["absorb", "uniform"] = "absorb"  # noise puts the mask, or a random token
    noise: Literal["loglinear", "geometric"] = "loglinear"  # how sigma grows with t
    sigma_min: float = 1e-4  # total noise at t = 0, geometric
    sigma_max: float = 25.0  # and at t = 1
    normalized: bool = False  # exp(u) by softmax; absorb is then train_mdlm with its weight elbo
    # <<< objective

SHAPE_FIELDS = (  # what a checkpoint and the model that takes its weights have in common
    "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "mlp", "mlp_ratio", "cond_dim",
    "tied", "unet", "value_residual", "softcap")

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
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path}: {type(e).__name__}: {e}") from None

def parse_flags(argv):
    """['--name=value', ..] -> {name: value}, typed."""
    fields, flags = {f.name: f for f in dataclasses.fields(Config)}, {}
    for arg in argv:
        name, _, text = arg.removeprefix("--").partition("=")
        near = (difflib.get_close_matches(name, fields, 1) or ["help"])[0]
        require(arg.startswith(f"--{name}=") and name in fields,
                f"unknown flag {arg}: did you mean --{near}=VALUE?")
        kind = type(fields[name].default)
        choices = ("0", "1") if kind is bool else get_args(fields[name].type)
        require(not choices or text in choices, f"{arg}: there are {', '.join(choices)}")
        with reading(arg):
            flags[name] = text == "1" if kind is bool else kind(text)
    return flags

def read_preset(name):
    """presets/<objective>/<name>.txt, a flag a line, -> {name: value}."""
    files = {f.stem: f for f in sorted((FILE.parent / "presets" / OBJECTIVE).iterdir())}
    require(name in files, f"--preset={name}: there are {', '.join(files)}")
    return parse_flags(re.sub("#.*", "", files[name].read_text("utf-8")).split())

def make_config(argv):
    """Flags -> (Config, the checkpoint to start from or None). They win over the preset, and over
    what a checkpoint says: all settings with --resume=1, shape and context with --init_from."""
    if {"--help", "-h"} & set(argv):
        print(__doc__, inspect.getsource(Config), sep="\n")
        raise SystemExit(0)
    flags = parse_flags(argv)
    base = {"out": f"out/{SCRIPT}-{flags.get('preset', '')}".rstrip("-")}
    base |= read_preset(flags["preset"]) if "preset" in flags else {}
    cfg = Config(**(base | flags))
    path = f"{cfg.out}/ckpt.pt"
    flags["resume"] = cfg.resume and os.path.exists(path)
    source = flags["init_from"] = path if flags["resume"] else cfg.init_from
    goes_on = flags["resume"] or cfg.eval_only
    if not source:
        require(not goes_on, "--eval_only=1 needs a checkpoint: --init_from=PATH")
        return Config(**(base | flags)), None
    ckpt = load_checkpoint(source)
    require(ckpt["script"] == SCRIPT or ckpt["script"] in INIT_FROM and not goes_on,
            f"{source}: a checkpoint of {ckpt['script']}.py")
    names = ckpt["config"] if goes_on else (*SHAPE_FIELDS, "seq_len")
    saved = {name: ckpt["config"][name] for name in names}
    for name in flags.keys() & SHAPE_FIELDS:
        require(flags[name] == saved[name], f"--{name}={flags[name]}: {source} has {saved[name]}")
    return Config(**(base | saved | flags)), ckpt

def validate(cfg, world):
    """Refuse what cannot work, before anything is written."""
    for name in "seq_len n_layer n_head steps batch_tokens micro_batch log_every".split():
        require(getattr(cfg, name) > 0, f"--{name}={getattr(cfg, name)}: must be positive")
    require(0 <= cfg.prompt_len < cfg.seq_len, f"--prompt_len={cfg.prompt_len}: below --seq_len")
    require(cfg.n_embd % (2 * cfg.n_head) == cfg.n_head % (cfg.n_kv_head or 1) == 0,
            f"--n_head={cfg.n_head}: must divide half of --n_embd; --n_kv_head must divide it")
    n_rows = cfg.batch_tokens // cfg.seq_len
    micro = min(cfg.micro_batch, max(1, n_rows // world))
    require(cfg.batch_tokens % (world * micro * cfg.seq_len) == 0,
            f"--batch_tokens={cfg.batch_tokens}: take {world * cfg.micro_batch * cfg.seq_len} = "
            f"{world} ranks x --micro_batch={cfg.micro_batch} x --seq_len={cfg.seq_len}")
    check_objective(cfg, n_rows, micro)

# ----------------------------------------------------------------------------- data
class Windows:
    """All windows of seq_len tokens of one split: shards of llm.c's format, one after another."""
    def __init__(self, folder, split, seq_len):
        self.paths = sorted(Path(folder).glob(f"*{split}*.bin"))
        require(self.paths, f"--data={folder}: no {split}_*.bin in it")
        self.shards = []  # (n, seq_len) each, on disk; a shard's last tokens are left out
        for path in self.paths:
            header = np.fromfile(path, "<i4", 256)
            require(len(header) == 256 and header[0] == 20240520,
                    f"{path}: not a token shard; make them with prepare_data.py")
            n, kind = int(header[2]), np.uint8 if header[3] == 1 else "<u2"
            require(os.path.getsize(path) == 1024 + n * np.dtype(kind).itemsize,
                    f"{path}: cut short or damaged: prepare it again")
            tokens = np.memmap(path, kind, "r", 1024, n)
            self.shards.append(tokens[:n // seq_len * seq_len].reshape(-1, seq_len))
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])

    def __len__(self):
        return int(self.starts[-1])

    def read(self, indices, vocab_size):
        """Windows -> (len(indices), seq_len) int64."""
        places = np.searchsorted(self.starts, indices, "right") - 1  # the shard of each
        rows = [self.shards[i][n - self.starts[i]] for i, n in zip(places, indices, strict=True)]
        rows = np.stack(rows).astype(np.int64)
        require(rows.max() < vocab_size,
                f"{self.paths[0]}..: token {rows.max()} of a vocabulary of {vocab_size}")
        return torch.from_numpy(rows)

def open_data(cfg, ckpt=None):
    """-> (training windows, evaluation windows, meta.json, which describes the tokens)"""
    folder = cfg.data if os.path.isdir(cfg.data) else f"data/{cfg.data}"
    require(os.path.isdir(folder), f"--data={cfg.data}: no such folder, nor {folder}: make it with "
            "prepare_data.py")
    path, n_rows = f"{folder}/meta.json", cfg.batch_tokens // cfg.seq_len
    require(os.path.exists(path), f"--data={folder}: no meta.json: run prepare_data.py again, or, "
            f"if these are published shards: python prepare_data.py meta {folder}")
    with reading(path):
        meta = json.loads(Path(path).read_text("utf-8"))
        _ = meta["vocab_size"], meta["byte_length"]  # needed below
    for name in ("token_bytes", "pattern", "bos_id") if ckpt else ():
        require(ckpt["meta"][name] == meta[name], f"--data={cfg.data}: another vocabulary than that"
                f" of {cfg.init_from}: prepare the text again with --tokenizer={cfg.init_from}")
    val = Windows(folder, cfg.split, cfg.seq_len)
    train = val if cfg.eval_only else Windows(folder, "train", cfg.seq_len)
    require(len(val) > 1 and (cfg.eval_only or len(train) >= n_rows),
            f"--data={cfg.data}: {len(train)} windows of --seq_len={cfg.seq_len} for batches of "
            f"{n_rows} rows, {len(val)} for {cfg.split}: lower --batch_tokens or --seq_len")
    return train, val, meta

# ----------------------------------------------------------------------------- layers
class Ctx(NamedTuple):
    """What all layers of one forward pass share."""
    cos: Tensor  # (S, D/H/2)
    sin: Tensor  # (S, D/H/2)
    h0: Tensor  # (B, S, D) embedding, for the skip into every layer
    cond: Tensor | None = None  # (B, cond_dim)
    v0: Tensor | None = None  # (B, S, Hkv d) to add to the values of this layer
    mask: object = None  # what attend makes of it
    attend: object = None  # a sampler's own attention, in place of attend

def norm(x):
    return F.rms_norm(x, (x.size(-1),))

def rotary(x, cos, sin):
    """Rotate pairs (i, i + d/2) of x (B, H, S, d) by the angles of cos, sin (S, d/2)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)

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
        # Every layer starts as the identity: by adaLN's zero gains, or else by zero projections.
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
        mods = (0, 0, 1, 0, 0, 1) if self.mod is None else self.mod(ctx.cond)[:, None].chunk(6, -1)
        shift_a, scale_a, gain_a, shift_m, scale_m, gain_m = mods  # (B, 1, D) each

        x = norm(h) * (1 + scale_a) + shift_a
        v = self.v(x) if ctx.v0 is None else self.v(x) + ctx.v0
        q = self.q(x[:, :N]).view(B, N, -1, d).transpose(1, 2)  # (B, H, N, d)
        k = self.k(x).view(B, S, -1, d).transpose(1, 2)  # (B, Hkv, S, d)
        v = v.view(B, S, -1, d).transpose(1, 2)
        q = rotary(norm(q), ctx.cos[:N], ctx.sin[:N])
        k = rotary(norm(k), ctx.cos, ctx.sin)
        y = (ctx.attend or attend)(q, k, v, ctx)  # (B, H, N, d)
        y = self.o(y.transpose(1, 2).reshape(B, N, D))
        h = h[:, :N] + gain_a * F.dropout(y, self.cfg.dropout, self.training)

        x = norm(h) * (1 + scale_m) + shift_m
        x = F.relu(self.up(x)).square() if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return h + gain_m * F.dropout(self.down(x), self.cfg.dropout, self.training)

class Trunk(nn.Module):
    """Embedding, layers and head; Model below says what goes in and what comes out."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        C, D, V, n = cfg.cond_dim, cfg.n_embd, cfg.vocab_size, cfg.n_layer
        self.embed = nn.Embedding(V + 1, D)  # the last row: the mask, or the start
        nn.init.normal_(self.embed.weight, std=0.02 if cfg.tied else 1.0)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(n))
        self.head = None if cfg.tied else matrix(D, V, zero=True)
        self.skip = nn.Parameter(torch.ones(n // 2)) if cfg.unet else None
        self.value = nn.Parameter(torch.full((n,), 0.5)) if cfg.value_residual else None
        self.sigma_mlp = self.final_mod = None
        if C:
            self.sigma_mlp = nn.Sequential(matrix(256, C), nn.SiLU(), matrix(C, C), nn.SiLU())
            self.final_mod = matrix(C, 2 * D, zero=True)

    def predict(self, tokens, positions, sigma=None, rows=None, n_query=None, mask=None,
                attend=None):
        """tokens (B, S) int64 at positions (S,), noise levels sigma (B,) -> logits (B, N, V)
        float32, or (R, V) at the flat positions rows (R,) of the N = n_query or S outputs. A
        sampler that keeps keys and values gives an attention of its own."""
        cfg, device, n = self.cfg, tokens.device, len(self.layers)
        head_dim = cfg.n_embd // cfg.n_head
        freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        angle = positions[:, None].float() * freq  # (S, D/H/2)
        h = norm(self.embed(tokens))  # (B, S, D)
        if torch.is_autocast_enabled(device.type):
            h = h.to(torch.get_autocast_dtype(device.type))
        cond, shift, scale = None, 0, 0
        if self.sigma_mlp is not None:  # sines of log sigma, of 1/32 to 32 radians per unit
            wave = sigma.log()[:, None] * 2 ** torch.linspace(-5, 5, 128, device=device)
            cond = self.sigma_mlp(torch.cat((wave.cos(), wave.sin()), -1))  # (B, cond_dim)
            shift, scale = self.final_mod(cond)[:, None].chunk(2, -1)
        ctx = Ctx(angle.cos(), angle.sin(), h, cond, mask=mask, attend=attend)

        v0 = None if self.value is None else self.layers[0].v(h)  # (B, S, Hkv d)
        skips = []
        for i, layer in enumerate(self.layers):
            if v0 is not None:
                ctx = ctx._replace(v0=self.value[i] * v0)
            if self.skip is not None and i >= n - n // 2:
                h = h + self.skip[i - (n - n // 2)] * skips.pop()
            last = n_query if i == n - 1 else None  # only the last layer leaves out queries
            if cfg.checkpoint_layers and self.training:
                h = checkpoint(layer, h, ctx, last, use_reentrant=False)
            else:
                h = layer(h, ctx, last)
            if self.skip is not None and i < n // 2:
                skips.append(h)

        h = norm(h) * (1 + scale) + shift  # (B, N, D)
        if rows is not None:
            h = h.flatten(0, 1).index_select(0, rows)  # (R, D)
        # Only real tokens: what stands for a hidden one is never predicted.
        logits = F.linear(h, self.embed.weight[:-1] if cfg.tied else self.head.weight).float()
        return cfg.softcap * torch.tanh(logits / cfg.softcap) if cfg.softcap else logits

# ----------------------------------------------------------------------------- objective
# >>> objective
OBJECTIVE = "sedd"  # presets/sedd has its presets
METRIC = "val_nelbo"  # nats per token: an upper bound on the negative log-likelihood
FLEX = ""  # no FlexAttention
INIT_FROM = ("train_sedd", "train_mdlm")  # --init_from takes checkpoints of these, too

LOGLINEAR_END = 1e-3  # P(still clean) at t = 1

def check_objective(cfg, n_rows, micro):
    is_paired = cfg.graph == "absorb" and cfg.noise == "loglinear"
    fits = not is_paired or n_rows % 2 == micro % 2 == 0
    require(fits, f"--micro_batch={micro}: --graph=absorb needs pairs of rows")
    rises = 0 < cfg.sigma_min < cfg.sigma_max
    require(rises, f"--sigma_min={cfg.sigma_min}: must be above 0 and below --sigma_max")

def total_noise(t, cfg):
    """t (R,) in (0, 1] -> sigma and its derivative dsigma/dt, (R,) each."""
    if cfg.noise == "loglinear":
        sigma = -torch.log1p(-(1 - LOGLINEAR_END) * t)
        return sigma, (1 - LOGLINEAR_END) * sigma.exp()
    growth = math.log(cfg.sigma_max / cfg.sigma_min)
    sigma = cfg.sigma_min * torch.exp(growth * t)
    return sigma, growth * sigma

def last_sigma(cfg):
    """Total noise at t = 1, where sampling starts."""
    return cfg.sigma_max if cfg.noise == "geometric" else -math.log(LOGLINEAR_END)

def flops_per_token(cfg, n_weights):
    """Training FLOPs per token of x0: 6 per weight used, the head on masked positions alone, plus
    12 n_layer D T for attention over all pairs of positions."""
    scored = 1.0
    if cfg.graph == "absorb":
        sigma, _ = total_noise((torch.arange(1000) + 0.5) / 1000, cfg)
        scored = -float(torch.expm1(-sigma).mean())
    head = cfg.n_embd * cfg.vocab_size * scored
    return 6 * (n_weights + head) + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len

def attend(q, k, v, ctx):
    """Every position sees every position. q (B, H, T, d), k and v (B, Hkv, T, d) -> (B, H, T, d)"""
    if q.device.type == "cpu" and q.size(2) <= 512:
        # Plain products: at this length twice as fast as the CPU kernel behind the call below.
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
        return scores.float().softmax(-1).type_as(v) @ v
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1))

class Model(Trunk):
    """Log score: log p_t(xt with y at i) - log p_t(xt) for every i and y at once."""
    def forward(self, xt, sigma, rows=None):
        """xt (B, T) int64, under absorb with mask_id = vocab_size; sigma (B,) -> log score
        (B, T, V) or (R, V), of masked positions (absorb), or 0 at the current token (uniform)."""
        T = xt.size(1)
        # (B, T, V) or (R, V); all 0 is the uniform distribution
        u = self.predict(xt, torch.arange(T, device=xt.device), sigma, rows)
        if self.cfg.normalized:
            u = u.log_softmax(-1) + math.log(u.size(-1))
        sigma = sigma[:, None] if rows is None else sigma[rows // T]
        xt = xt if rows is None else xt.flatten()[rows]
        if self.cfg.graph == "absorb":
            return u - (math.log(u.size(-1)) + torch.expm1(sigma).log())[..., None]
        # p_t is the law of a clean token given the others, V alpha exp(u) of it, and of noise: what
        # a score can be at that sigma, near 0 and near infinity in fp32, too.
        log_p = torch.logaddexp(u - sigma[..., None], (-torch.expm1(-sigma)).log()[..., None])
        return log_p - log_p.gather(-1, xt[..., None])

class Noise(NamedTuple):
    """Randomness of a batch. Position i of a row is replaced by token_i where score_i < level."""
    level: Tensor  # (R,) float32: k, or the probability 1 - exp(-sigma)
    sigma: Tensor  # (R,) float32: total noise
    weight: Tensor  # (R,) float32: of each token's score entropy in the sum
    score: Tensor  # (R, T) float32: a random rank 0..T-1, or uniform in [0,1)
    token: Tensor  # (R, T) int64: the mask, or uniform tokens

def draw_noise(cfg, n_rows, gen, bound=False):
    """All the randomness of a global batch of n_rows windows -> Noise, on the CPU.

    Pair j of P takes u in stratum j of (0, 1/2), one row has t = u and the other t = 1 - u. Strata
    are dealt at random and a coin orders the pair, so each row alone has t ~ U(0, 1). absorb with
    loglinear noise, and its bound whatever training uses: exactly k = 1 + floor(tT) masks (arXiv
    2110.02037, eq. 8). The bound of uniform: from no noise at all, which leaves no term for the
    last step of sampling, to sigma(1), with 1 - alpha = t^2, near to where the entropy lies."""
    T, V, shape = cfg.seq_len - cfg.prompt_len, cfg.vocab_size, (n_rows, cfg.seq_len)
    n_pairs = (n_rows + 1) // 2
    u = 1 - torch.rand(n_pairs, generator=gen, dtype=torch.float64)  # above 0
    u = (torch.randperm(n_pairs, generator=gen) + u) / (2 * n_pairs)
    coin = torch.rand(n_pairs, generator=gen) < 0.5
    token = torch.full((), V).expand(shape)
    if cfg.graph == "absorb" and (bound or cfg.noise == "loglinear"):
        k = 1 + (u * T).long()
        k = torch.where(coin, k, T + 1 - k)
        level = torch.stack((k, T + 1 - k), 1).flatten()[:n_rows]  # (R,)
        sigma, weight = -torch.log1p(-level / (cfg.seq_len + 1)), T / level
        order = torch.rand(n_rows, T, generator=gen).argsort(1)
        score = torch.empty(n_rows, T)
        score.scatter_(1, order, torch.arange(T, dtype=torch.float32).expand(n_rows, T))
    else:
        t = torch.where(coin, u, 1 - u)
        t = torch.stack((t, 1 - t), 1).flatten()[:n_rows]  # (R,), in (0, 1)
        sigma, weight = total_noise(t, cfg)  # weight: dsigma/dt
        if bound:
            end = -math.expm1(-last_sigma(cfg))
            sigma, weight = -torch.log1p(-end * t**2), 2 * end * t / (1 - end * t**2)
        score = torch.rand(n_rows, T, generator=gen)
        if cfg.graph == "uniform":
            token = torch.randint(V, shape, generator=gen)
        else:
            weight = weight / torch.expm1(sigma)
        level = -torch.expm1(-sigma)
    score = F.pad(score, (cfg.prompt_len, 0), value=math.inf)  # no level reaches the prompt
    return Noise(level.float(), sigma.float(), weight.float(), score, token)

def corrupt(x0, noise, cfg):
    """x0 (B, T) -> xt (B, T): the mask (id vocab_size) or a random token where the noise says."""
    return torch.where(noise.score < noise.level[:, None], noise.token, x0)

def absorb_losses(model, x0, xt, noise, n):
    """-> flat positions (n,), the masked ones first, and the weighted score entropy there, (n,),
    0 at the others. n is fixed so that nothing has to wait for a count; NaN where it is too small.

    Of a masked token, with r = 1 / expm1(sigma), it is sum_y e^s_y - r s_x0 + r (log r - 1), and
    s = u + log r: r (sum_y e^u_y - 1 - u_x0). r is in the weight."""
    T, is_mask = x0.size(1), (xt != x0).flatten()
    rows = is_mask.to(torch.uint8).argsort(descending=True, stable=True)[:n]
    u = model(xt, noise.sigma, rows)  # (n, V) log score
    u = u + torch.expm1(noise.sigma.to(u.dtype)).log()[rows // T, None]
    u = torch.where(is_mask[rows, None], u, 0.0)  # nothing keeps exp(u) of the others finite
    entropy = u.exp().sum(-1) - 1 - u.gather(-1, x0.flatten()[rows, None])[:, 0]
    weight = noise.weight.repeat_interleave(T) * is_mask  # (B T,)
    return rows, torch.where(is_mask.sum() <= n, entropy * weight[rows], torch.nan)

def uniform_losses(model, x0, xt, noise):
    """Weighted score entropy of every token, (B, T).

    sum_{y != xt_i} (s_y - r_y log s_y + K(r_y)) / N as the sum of r_y (exp(d) - 1 - d) / N, d = log
    s_y - log r_y, none of which is negative: large terms that cancel would cost fp32 its digits."""
    log_score = model(xt, noise.sigma)  # (B, T, N)
    N, sigma = log_score.size(-1), noise.sigma.to(log_score.dtype)[:, None]
    # p_t(y | x0) is alpha + (1 - alpha) / N at x0 and (1 - alpha) / N elsewhere.
    peak = torch.log1p(N / torch.expm1(sigma))[..., None]  # (B, 1, 1) log of the ratio of the two
    is_x0 = torch.arange(N, device=x0.device) == x0[..., None]  # (B, T, N)
    log_r = torch.where(is_x0, peak, 0.0) - torch.where((xt == x0)[..., None], peak, 0.0)
    d = log_score - log_r  # 0 at y = xt_i
    return (log_r.exp() * (torch.expm1(d) - d)).mean(-1) * noise.weight[:, None]

def loss_fn(model, x0, noise, cfg):
    """Training loss, nats per scored token: weighted sum over tokens / (B T)."""
    B, T = x0.size(0), x0.size(1) - cfg.prompt_len
    xt = corrupt(x0, noise, cfg)
    if cfg.graph == "uniform":
        return uniform_losses(model, x0, xt, noise)[:, cfg.prompt_len:].sum() / (B * T)
    n = B // 2 * (T + 1) if cfg.noise == "loglinear" else B * T  # exact in antithetic pairs
    return absorb_losses(model, x0, xt, noise, n)[1].sum() / (B * T)

def prior_nats(cfg):
    """KL(p_1(. | x0) || uniform) of a token; under absorb k = T is in the integral: no rest."""
    alpha, N = math.exp(-last_sigma(cfg)), cfg.vocab_size
    clean, other = alpha + (1 - alpha) / N, (1 - alpha) / N
    return clean * math.log1p((N - 1) * alpha) + (N - 1) * other * math.log1p(-alpha)

def nelbo_fn(model, x0, noise, cfg):
    """Bound on -log p(x0) in nats per sequence, (B,); noise by draw_noise(bound=True)."""
    B, T = x0.size(0), x0.size(1) - cfg.prompt_len
    xt = corrupt(x0, noise, cfg)
    if cfg.graph == "uniform":
        losses = uniform_losses(model, x0, xt, noise)[:, cfg.prompt_len:]
        return losses.sum(1) + T * prior_nats(cfg)
    rows, losses = absorb_losses(model, x0, xt, noise, B * T if B % 2 else B // 2 * (T + 1))
    return losses.new_zeros(B).index_add(0, rows // x0.size(1), losses)
# <<< objective

# ----------------------------------------------------------------------------- optimizer
GROUPS = {  # what each group of parameters is called in Model
    "hidden": r"layers\.\d+\.(q|k|v|o|gate|up|down)\.weight",  # by Muon, everything else by AdamW
    "embed": r"embed\.weight",
    "head": r"head\.weight",
    "scalar": r"skip|value|layers\.\d+\.residual",
    "cond": r"(layers\.\d+\.mod|final_mod|sigma_mlp\.\d+)\.weight"}

def make_optimizers(model, cfg):
    """[hidden matrices by Muon or AdamW, everything else by AdamW]."""
    rates = (cfg.lr, cfg.embed_lr, cfg.head_lr, cfg.scalar_lr, cfg.cond_lr)
    groups = {name: dict(params=[], lr=lr, peak_lr=lr, weight_decay=cfg.adam_weight_decay)
              for name, lr in zip(GROUPS, rates, strict=True)}
    groups["hidden"]["weight_decay"] = cfg.weight_decay
    for name, p in model.named_parameters():
        found = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
        require(len(found) == 1, f"parameter {name} is in {len(found)} groups: name it in one of "
                "GROUPS (hidden: matrices inside the layers, scalar: vectors)")
        groups[found[0]]["params"].append(p)
    muon = [Muon([groups.pop("hidden")], momentum=cfg.momentum, cautious=cfg.cautious,
                 beta2=cfg.muon_beta2 or None)] if cfg.optimizer == "muon" else []
    adam = torch.optim.AdamW([group for group in groups.values() if group["params"]],
                             betas=(cfg.adam_beta1, cfg.adam_beta2), eps=1e-10,
                             fused=model.embed.weight.device.type in ("cpu", "cuda"))
    return [*muon, adam]

def set_rates(optimizers, step, cfg):
    """Learning rate of every group and Muon's momentum, as they are at a 0-based step."""
    factor = min(1.0, (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps))
    if cfg.lr_schedule == "cosine":
        x = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        factor = 0.5 * (1 + math.cos(math.pi * x))
    factor = cfg.lr_end + (1 - cfg.lr_end) * factor
    if step < cfg.warmup:
        factor = (step + 1) / cfg.warmup
    cold = max(0.0, 1 - step / cfg.momentum_warmup) if cfg.momentum_warmup else 0.0
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * factor
        if "momentum" in group:  # rises from .85
            group["momentum"] = cfg.momentum - cold * (cfg.momentum - 0.85)

# ----------------------------------------------------------------------------- evaluation
def derive_seed(*path):
    """A seed for one purpose out of numbers that name it."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)

def send(x, device):
    """A copy on the device, for which the host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

def take_rows(noise, rows, device):
    return noise._make(send(x[rows], device) for x in noise)

@functools.lru_cache(maxsize=4)
def evaluation_noise(cfg, n_rows, draw):
    gen = torch.Generator().manual_seed(derive_seed(20240520, draw))  # the same for every run
    return draw_noise(cfg, n_rows, gen, bound=True)

@torch.no_grad()
def evaluate(nelbo, cfg, windows, token_length, device, rank, world, stop=()):
    """nelbo(x0, noise) -> (B,) nats, over the first val_tokens of a split, with token_length (V,)
    bytes a token -> (a line of figures, nats (N,)), or None if a rank has a signal in `stop`.

    The same digits on any number of ranks, since noise is drawn for all windows at once. The
    standard error is over pairs of windows, as their noise is."""
    n = min(len(windows), max(2, cfg.val_tokens // cfg.seq_len)) // 2 * 2
    size, n_scored = cfg.micro_batch + cfg.micro_batch % 2, cfg.seq_len - cfg.prompt_len
    sums = torch.zeros(n, 3, dtype=torch.float64)  # nats and bytes of every window, signals
    batches = torch.arange(n).split(size)[rank::world]
    for draw, rows in itertools.product(range(cfg.val_draws), batches):
        if stop:
            break
        x0 = windows.read(rows.tolist(), cfg.vocab_size)
        noise = take_rows(evaluation_noise(cfg, n, draw), rows, device)
        n_bytes = token_length[x0[:, cfg.prompt_len:]].sum(1)
        sums[rows, :2] += torch.stack((nelbo(x0.to(device), noise).cpu(), n_bytes), 1)
    sums[:, 2] = len(stop)
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    nats, n_bytes, signals = sums.cpu().unbind(1)
    if signals.any():
        return None
    nats, n_bytes = nats / cfg.val_draws, round(float(n_bytes.sum()) / cfg.val_draws)
    mean, pairs = float(nats.mean()) / n_scored, nats.view(-1, 2).mean(1) / n_scored
    se = float(pairs.std()) / len(pairs) ** 0.5 if n > 2 else math.nan
    bpb = n * n_scored * mean / math.log(2) / (n_bytes or math.nan)
    return (f"{METRIC}:{mean:.4f}+-{se:.4f} bpb:{bpb:.4f} ppl:{math.exp(min(mean, 700)):.4f} "
            f"tokens:{n * n_scored} bytes:{n_bytes}"), nats

# ----------------------------------------------------------------------------- checkpoints
def load_checkpoint(path):
    """What save_checkpoint has written, or a run folder. Tensors and plain values, never code."""
    path = f"{path}/ckpt.pt" if os.path.isdir(path) else path
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(state["format"] == 3, f"{path}: of another version: train it again")
    return state

def save_checkpoint(path, state):
    """Write beside and then replace, so that a kill leaves the old file or the new one, whole."""
    with open(f"{path}.partial", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.partial", path)

# ----------------------------------------------------------------------------- runtime
PEAK_FLOPS = {  # dense bf16, by part of the device's name, from the vendors' data sheets
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 5090": 209e12, "RTX 4090": 165e12}

def pick_device(name, dtype, local_rank):
    """-> (device, dtype of matrix products: bf16 where the hardware has it, or a CPU is told to)"""
    here = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    require(name in ("auto", "cpu", here.type), f"--device={name}: there is only {here.type} here")
    device = here if name == "auto" else torch.device(name)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    if device.type == "cuda":
        n_gpus, n_ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        require(n_ranks <= n_gpus, f"--nproc_per_node={n_ranks}: this machine has {n_gpus} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        fast = dtype == "bf16" or torch.cpu._is_avx512_bf16_supported()
    return device, torch.bfloat16 if fast and dtype != "fp32" else torch.float32

def open_run(cfg, header):
    """-> (lock of the run folder, to be kept open; log(line), to log.txt and the terminal)"""
    os.makedirs(cfg.out, exist_ok=True)
    lock = open(f"{cfg.out}/lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out={cfg.out}: another run is at work there") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    require(cfg.resume or not os.path.exists(f"{cfg.out}/ckpt.pt"),
            f"--out={cfg.out} holds a run: --resume=1 continues it, or give another --out")
    file = open(f"{cfg.out}/log.txt", "a" if cfg.resume else "w", 1, "utf-8")
    if not cfg.resume:  # all that it takes to make the run again
        for path in (FILE, Path(inspect.getfile(Muon))):
            print(path.read_text("utf-8") + "=" * 100, file=file)
        print(header, json.dumps(dataclasses.asdict(cfg)), sep="\n", file=file)
    def log(line):
        with contextlib.suppress(OSError):  # a full disk, a closed terminal
            print(line, file=file)
            print(line, flush=True)
    return lock, log

@contextlib.contextmanager
def averaged(model, average):
    """Inside, the model has its averaged weights, if there are any, and does not train."""
    for is_training in (False, True):
        for p, a in zip(model.parameters(), average, strict=False):
            p.data, a.data = a.data, p.data
        model.train(is_training)
        if not is_training:
            yield

@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)

def read_batch(cfg, train, step, rank, world, device):
    """Micro-batches (x0, noise) of one rank."""
    n, n_rows = len(train), cfg.batch_tokens // cfg.seq_len
    gen = torch.Generator().manual_seed(derive_seed(cfg.seed, step))
    noise, batch = draw_noise(cfg, n_rows, gen), []
    for rows in torch.arange(n_rows).chunk(world)[rank].split(cfg.micro_batch):
        places = [divmod(step * n_rows + row, n) for row in rows.tolist()]  # (epoch, i-th window)
        windows = [permutation(cfg.seed, e, n)[i] if cfg.shuffle else i for e, i in places]
        x0 = send(train.read(windows, cfg.vocab_size), device)
        batch.append((x0, take_rows(noise, rows, device)))
    return batch

def main(argv):
    """Train, or evaluate -> exit status."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    log = bool  # without effect, on all ranks but the first
    with reading("the settings"):
        cfg, ckpt = make_config(argv)
        validate(cfg, world)
        train, val, meta = open_data(cfg, ckpt)
        token_length = torch.tensor(meta["byte_length"])
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or meta["vocab_size"])
        device, dtype = pick_device(cfg.device, cfg.dtype, int(os.environ.get("LOCAL_RANK", 0)))
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        torch.manual_seed(derive_seed(cfg.seed))
        model = Model(cfg)
        if ckpt:
            with reading(cfg.init_from):
                model.load_state_dict(not cfg.resume and ckpt["ema"] or ckpt["model"])
        if rank == 0 and not cfg.eval_only:
            lock, log = open_run(cfg, f"python {sys.version.split()[0]} torch {torch.__version__} "
                                 f"numpy {np.__version__} {machine} ranks {world}")
    if world > 1:
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        # torchrun --max-restarts keeps one store for all attempts, with addresses of dead ranks.
        store, *_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=own,
                                timeout=datetime.timedelta(minutes=10))
    stop = []  # signals received
    for name in {"SIGTERM", "SIGINT", "SIGUSR1"} & set(dir(signal)):  # Windows has no SIGUSR1
        signal.signal(getattr(signal, name), lambda number, frame: stop.append(number))
    model.to(device)
    names, params = zip(*model.named_parameters(), strict=True)
    step, seconds, average = 0, 0.0, []  # of the weights; empty until ema_start
    n_weights = sum(p.numel() for name, p in model.layers.named_parameters()
                    if p.ndim > 1 and not name.endswith("mod.weight"))
    flops = flops_per_token(cfg, n_weights)
    peak = next((world * f for part, f in PEAK_FLOPS.items() if part in machine), None)
    log(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per "
        f"token, {world} x {machine} in {str(dtype)[6:]}, {cfg.data}: "
        f"{len(train) * cfg.seq_len:,} tokens"
        f"{', weights, shape and --seq_len from ' * bool(cfg.init_from)}{cfg.init_from}")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    train_loss, nelbo = loss_fn, functools.partial(nelbo_fn, model, cfg=cfg)
    if cfg.eval_only:
        with averaged(model, average), amp:
            done = evaluate(nelbo, cfg, val, token_length, device, rank, world, stop)
        if rank == 0:
            print(f"split:{cfg.split} {done[0]}" if done else "stopped")
        return 0 if done else 130
    # Every .grad is a view of one flat buffer, on a cache line: one all-reduce, one norm a step.
    sizes = [-(-p.numel() // 64) * 64 for p in params]
    flat_grad = torch.zeros(sum(sizes), device=device)
    for p, part in zip(params, flat_grad.split(sizes), strict=True):
        p.grad = part[:p.numel()].view_as(p)
    optimizers = make_optimizers(model, cfg)
    if cfg.resume:
        step, seconds = ckpt["step"], ckpt["seconds"]
        for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
            # Rates and the like come from the flags, as does what this device can fuse.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        if ckpt["ema"]:
            average = [ckpt["ema"][name].to(device) for name in names]
        log(f"resuming {cfg.out} after step {step}")
    ckpt = None  # gives its memory back
    batch = read_batch(cfg, train, step, rank, world, device)
    if cfg.compile and device.type != "mps":  # where compiled code may be silently wrong
        log(f"compiling{', with FlexAttention' * (device.type == FLEX)} (--compile=0 does without)")
        torch._dynamo.config.recompile_limit = 32  # the layers' shapes in training and evaluation
        if device.type == "cpu":  # one small graph for all layers: seconds, not a minute
            for layer in model.layers:
                layer.compile(dynamic=False)
        else:
            train_loss = torch.compile(loss_fn, dynamic=False)
            nelbo = functools.partial(torch.compile(nelbo_fn, dynamic=False), model, cfg=cfg)
        try:
            with amp:
                train_loss(model, *batch[0], cfg).backward()
        except Exception as e:  # whatever a missing or broken tool chain raises
            torch.compiler.set_stance("force_eager")
            log(f"running without torch.compile, attention dense: {str(e).strip().splitlines()[0]}")
    path, begun = f"{cfg.out}/ckpt.pt", step
    losses, logged, n_bad, stopped = [], seconds, 0, False
    while True:
        is_last = step >= cfg.steps
        # Once in a while: evaluate.
        is_due = is_last or cfg.eval_every and step % cfg.eval_every == 0
        if is_due and step and not stopped:
            with averaged(model, average), amp:
                done = evaluate(nelbo, cfg, val, token_length, device, rank, world, stop)
            stopped = done is None
            if done:
                log(f"step:{step}/{cfg.steps} {done[0]} train_time:{1000 * seconds:.0f}ms "
                    f"step_avg:{1000 * seconds / step:.2f}ms")
        # Once in a while, but not among bad steps, and before leaving: save.
        is_nth = cfg.ckpt_every and step % cfg.ckpt_every == 0 and not n_bad
        if (is_last or stopped or is_nth) and step > begun and rank == 0:
            weights = model.state_dict()
            try:
                save_checkpoint(path, dict(
                    format=3, script=SCRIPT, config=dataclasses.asdict(cfg), meta=meta, step=step,
                    model=weights, optimizers=[o.state_dict() for o in optimizers], seconds=seconds,
                    ema=weights | dict(zip(names, average, strict=True)) if average else None))
            except (OSError, RuntimeError) as e:  # torch wraps what a full disk says
                log(f"{path}: step {step} not written: {e.__context__ or e}")
                require(not (is_last or stopped), f"{path}: step {step} not written")
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
                torch.manual_seed(derive_seed(cfg.seed, step, rank * len(batch) + i))
            with amp:
                loss = train_loss(model, x0, noise, cfg) / (len(batch) * world)
            loss.backward()
            total[0] += loss.detach()
        total[1] += len(stop)
        if not stop:
            batch = read_batch(cfg, train, step + 1, rank, world, device)  # as the GPU works
        if world > 1:
            dist.all_reduce(flat_grad)
            dist.all_reduce(total)
        # The only time in a step that the host waits for the GPU.
        loss, stopped, grad_norm = torch.cat((total, flat_grad.norm()[None])).tolist()
        if stopped:
            continue
        set_rates(optimizers, step, cfg)
        step += 1
        if math.isfinite(loss + grad_norm):
            if cfg.grad_clip and grad_norm > cfg.grad_clip:
                flat_grad *= cfg.grad_clip / grad_norm
            for optimizer in optimizers:
                optimizer.step()
            n = step - int(cfg.ema_start * cfg.steps)
            if cfg.ema and n > 0:
                average = average or [p.detach().clone() for p in params]
                decay = min(cfg.ema, n / (n + 9))
                torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
            n_bad = 0
        else:
            n_bad += 1
            log(f"step:{step}/{cfg.steps} skipped: loss {loss}, gradient norm {grad_norm}")
            require(n_bad < 10, f"{n_bad} non-finite steps in a row: try a lower --lr")
        losses.append(loss)
        seconds += time.perf_counter() - start
        if step == cfg.steps or step % cfg.log_every == 0:
            rate = len(losses) * cfg.batch_tokens / (seconds - logged)
            left = datetime.timedelta(seconds=(cfg.steps - step) * cfg.batch_tokens // rate)
            mfu = f" mfu:{rate * flops / peak:.3f}" if peak else ""
            log(f"step:{step}/{cfg.steps} loss:{sum(losses) / len(losses):.4f} "
                f"grad_norm:{grad_norm:.4g} lr:{optimizers[0].param_groups[0]['lr']:.2e} "
                f"tok/s:{rate:.0f}{mfu} eta:{left}")
            losses, logged = [], seconds
    if rank == 0 and not stopped:
        np.save(f"{cfg.out}/{cfg.split}_nats.npy", done[1].numpy())
    log(f"stopped after step {step}; --resume=1 --out={cfg.out} continues" if stopped else
        f"done: {path}; text: python sample.py --ckpt={path}")
    if device.type == "cuda":
        log(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    return 130 if signal.SIGINT in stop else 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # what a code page lacks
    try:
        status = main(sys.argv[1:])
        if dist.is_initialized():
            dist.barrier()  # gloo aborts a rank that leaves while another one still sends
            dist.destroy_process_group()
        sys.exit(status)
    except UserError as e:  # all ranks meet the same one until they are joined
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"{FILE.name}: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
