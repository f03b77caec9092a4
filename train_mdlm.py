"""Masked diffusion language model (MDLM) in one file: data, model, training, evaluation, sampling.

Forward process: every token of x0 is replaced by the mask with probability 1 - alpha_t, t in (0,1].
The network sees the half-masked xt and predicts the masked tokens, all at once. Its training loss
is a bound on the likelihood (Sahoo et al. 2024, arXiv 2406.07524, eq. 10):

    -log p(x0) <= E_t [ -alpha'_t / (1 - alpha_t)  sum_{i masked} -log p(x0_i | xt) ]

For a denoiser without time input this does not depend on the schedule alpha, and equals the
order-agnostic autoregressive bound (Hoogeboom et al. 2021, arXiv 2110.02037, eq. 8),

    -log p(x0) <= E_{k ~ U{1..T}} E_{|S| = k} [ T/k  sum_{i in S} -log p(x0_i | x0 outside S) ],

which is what the default estimator draws: exactly k masks in a row, T+1-k in the next one.

    python prepare_data.py stdlib && python train_mdlm.py --preset=tiny         # minutes on a CPU
    torchrun --nproc_per_node=8 train_mdlm.py                                   # FineWeb-Edu
    python train_mdlm.py --eval_only=1 --init_from=out/train_mdlm-tiny/ckpt.pt  # bits per byte
    python sample.py                                                            # text

The other scripts differ from this one only here and between the objective marks.
"""

import dataclasses
import datetime
import difflib
import functools
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
    softcap: float = 0.0  # logits = cap tanh(logits / cap); 0: off
    dropout: float = 0.0  # on the two branches of a layer
    checkpoint_layers: bool = False  # recompute activations in the backward pass, to save memory
    # optimization
    steps: int = 10_000  # optimizer steps
    batch_tokens: int = 131_072  # tokens a step, over all ranks and accumulation
    micro_batch: int = 16  # rows a forward pass and rank
    optimizer: Literal["muon", "adamw"] = "muon"  # of hidden matrices
    lr: float = 0.025  # hidden matrices
    embed_lr: float = 0.3  # embedding (and tied head)
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
    schedule: Literal["linear", "cosine", "loglinear", "sqrt", "clipped_cosine",
                      "sigmoid"] = "linear"  # masked fraction at t
    estimator: Literal["exact_k", "bernoulli"] = "exact_k"  # antithetic pairs, or coins
    masking: Literal["uniform", "entropy"] = "uniform"  # which tokens; entropy needs token_entropy
    token_entropy: str = ""  # .npy file, one entropy (any unit) for every token id
    loss_weight: Literal["elbo", "uniform", "masked_mean", "clipped"] = "uniform"  # training only
    weight_clip: float = 100.0  # largest weight of a masked token under clipped
    # <<< objective


# What must agree between a checkpoint and the model that takes its weights.
SHAPE_FIELDS = (
    "vocab_size n_layer n_head n_kv_head n_embd mlp mlp_ratio cond_dim tied unet softcap".split())
# What may change when a run goes on; everything else would make it another run.
RESUME_FIELDS = (
    "data out preset resume steps eval_every val_tokens val_draws split ckpt_every log_every "
    "micro_batch checkpoint_layers max_bad_steps device dtype compile backend".split())
POSITIVE = ("seq_len n_layer n_head n_embd mlp_ratio steps batch_tokens micro_batch val_tokens "
            "val_draws max_bad_steps log_every").split()
BELOW_ONE = "dropout ema momentum muon_beta2 adam_beta1 adam_beta2".split()
UP_TO_ONE = "ema_start cooldown lr_end".split()


def fail(message):
    """A user's mistake: one line, exit status 2. Before ranks part, only the first one speaks."""
    if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
        print(f"{SCRIPT}.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def show_help():
    """The docstring, then every flag with the comment beside it in Config."""
    comments = dict(re.findall(r"^    (\w+): [^#]+# (.+)$", inspect.getsource(Config), re.M))
    print(__doc__, "Flags:", sep="\n")
    for f in dataclasses.fields(Config):
        default = int(f.default) if isinstance(f.default, bool) else f.default
        choices = f" ({', '.join(get_args(f.type))})" if get_args(f.type) else ""
        print(f"  --{f.name}={default}  {comments[f.name]}{choices}")
    print(f"Presets: {', '.join(PRESETS)}")


def parse_flags(argv):
    """['--name=value', ..] -> {name: value}, typed; anything else is refused."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}
    flags = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            show_help()
            raise SystemExit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        if name == "block_size":
            fail("--block_size means three things elsewhere: --seq_len is the context in tokens")
        if not arg.startswith("--") or name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            fail(f"unknown flag {arg}: "
                 + (f"did you mean --{near[0]}=?" if near else "--help lists the flags"))
        if not equals or name in flags:
            fail(f"--{name} " + ("is given twice" if equals else f"needs a value: --{name}=VALUE"))
        kind = type(defaults[name])
        try:
            flags[name] = ("0", "1").index(text) == 1 if kind is bool else kind(text)
        except ValueError:
            fail(f"{arg}: {wanted[kind]} expected")
    return flags


def parse_args(argv):
    """Flags -> Config. A preset stands below the flags. A run that is resumed keeps its settings;
    a checkpoint that is started from fixes the shape of the model."""
    flags = parse_flags(argv)
    preset, source = flags.get("preset", ""), flags.get("init_from", "")
    resume, eval_only = flags.get("resume", False), flags.get("eval_only", False)
    if preset and preset not in PRESETS:
        fail(f"--preset={preset}: there are {', '.join(PRESETS)}")
    base = {"out": os.path.join("out", SCRIPT + (f"-{preset}" if preset else "")),
            **PRESETS.get(preset, {})}
    if resume and source:
        fail("--resume=1 and --init_from exclude each other")
    if resume:
        source = os.path.join(flags.get("out", base["out"]), "ckpt.pt")
        if not os.path.exists(source):
            fail(f"--resume=1: there is no {source}: name the run's folder with --out")
    elif eval_only and not source:
        fail("--eval_only=1 needs a checkpoint: --init_from=PATH")
    if source:
        config = load_checkpoint(source)["config"]
        saved = {f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config}
        for name in set(saved) - set(RESUME_FIELDS) if resume else SHAPE_FIELDS:
            if flags.get(name, saved.get(name)) != saved.get(name):
                fail(f"--{name}={flags[name]}: {source} has {saved.get(name)}, which stays")
        if resume or eval_only:
            base = dict(saved, split="val", out=base["out"])
        else:
            base.update((name, saved[name]) for name in SHAPE_FIELDS if name in saved)
    return Config(**(base | flags))


def validate(cfg, world):
    """Refuse what cannot work, before anything is opened or written."""
    def refuse(name, why):
        fail(f"--{name}={getattr(cfg, name)}: {why}")

    for f in dataclasses.fields(Config):
        name, value, choices = f.name, getattr(cfg, f.name), get_args(f.type)
        if type(value) is not type(f.default):
            refuse(name, f"{type(f.default).__name__} expected")
        if choices and value not in choices:
            refuse(name, f"there are {', '.join(choices)}")
        if isinstance(value, str):
            continue
        if not 0 <= value < math.inf or (name in POSITIVE and value == 0):
            refuse(name, "must be positive" if name in POSITIVE else "must be 0 or more")
        if (name in BELOW_ONE and value >= 1) or (name in UP_TO_ONE and value > 1):
            refuse(name, "must be below 1" if name in BELOW_ONE else "must be at most 1")
    if cfg.n_embd % (2 * cfg.n_head):
        refuse("n_head", f"{cfg.n_embd} wide does not divide into heads of even width")
    if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
        refuse("n_kv_head", f"must divide --n_head={cfg.n_head}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    if cfg.batch_tokens % cfg.seq_len or n_rows % world:
        refuse("batch_tokens", f"no multiple of --seq_len={cfg.seq_len} on each of {world} ranks")
    micro = min(cfg.micro_batch, n_rows // world)
    if n_rows // world % micro:
        refuse("micro_batch", f"the {n_rows // world} rows of a rank are no multiple of it")
    check_objective(cfg, n_rows, micro)


# ----------------------------------------------------------------------------- data
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_VOCAB = 50257


def open_shard(path, seq_len):
    """The windows of a shard of llm.c's format, (n, seq_len), on disk; its tail is left out."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except OSError as e:
        fail(f"{path}: {e.strerror}")
    if size < HEADER_BYTES or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        fail(f"{path}: not a token shard; make them with prepare_data.py")
    n_tokens, itemsize = int(header[2]), int(header[3]) or 2
    if itemsize not in (1, 2) or n_tokens <= 0 or size != HEADER_BYTES + n_tokens * itemsize:
        fail(f"{path}: {size} bytes, but a header for {n_tokens} tokens of {itemsize}: "
             "cut short or damaged; prepare it again")
    tokens = np.memmap(path, np.uint8 if itemsize == 1 else "<u2", "r", HEADER_BYTES, (n_tokens,))
    return tokens[:n_tokens // seq_len * seq_len].reshape(-1, seq_len)


class Windows:
    """All windows of seq_len tokens of one split, shard after shard."""

    def __init__(self, folder, split, seq_len):
        names = sorted(n for n in os.listdir(folder) if re.search(rf"{split}_\w*\.bin$", n))
        if not names:
            fail(f"--data={folder}: no *{split}_*.bin in it")
        self.paths = [os.path.join(folder, n) for n in names]
        self.shards = [open_shard(p, seq_len) for p in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self.dtype = self.shards[0].dtype
        for shard, path in zip(self.shards, self.paths, strict=True):
            if shard.dtype != self.dtype:
                fail(f"{path}: {shard.dtype} tokens beside {self.dtype}: prepare anew")

    def __len__(self):
        return int(self.starts[-1])

    def read(self, indices, vocab_size):
        """Windows -> (len(indices), seq_len) int64."""
        rows = []
        for index in indices:
            shard = int(np.searchsorted(self.starts, index, "right")) - 1
            rows.append(self.shards[shard][index - self.starts[shard]].astype(np.int64))
            if rows[-1].max() >= vocab_size:
                fail(f"{self.paths[shard]}: token id {rows[-1].max()} with a vocabulary of "
                     f"{vocab_size}")
        return torch.from_numpy(np.stack(rows))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)


def load_tokenizer(folder, dtype):
    """What turns ids into text, from meta.json; without it uint16 is GPT-2's and uint8 is bytes.

    -> {name, vocab_size, bos_id, pattern, token_bytes: uint8 (all bytes, id after id),
    token_length: int64 (V,), bytes of every id}. BOS stands for no text, so its length is 0.
    """
    path = os.path.join(folder, "meta.json")
    meta = dict(tokenizer="byte", vocab_size=256, bos_id=0, pattern=None, token_bytes=None)
    try:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                meta = json.load(f)
        elif dtype != np.uint8:
            meta = gpt2_meta()
        table = [text.encode("latin-1") for text in meta["token_bytes"] or map(chr, range(256))]
        table[meta["bos_id"]] = b""
        if len(table) != meta["vocab_size"]:
            raise ValueError(f"{len(table)} tokens, vocab_size {meta['vocab_size']}")
        return {"name": str(meta["tokenizer"]), "vocab_size": len(table),
                "bos_id": int(meta["bos_id"]), "pattern": meta["pattern"],
                "token_bytes": torch.tensor(list(b"".join(table)), dtype=torch.uint8),
                "token_length": torch.tensor([len(b) for b in table])}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        fail(f"{path}: not a description of this data ({type(e).__name__}: {e}); prepare it again")


def gpt2_meta():
    """GPT-2's entries of meta.json; tokens without bytes where its vocabulary cannot be had."""
    meta = dict(tokenizer="gpt2", vocab_size=GPT2_VOCAB, bos_id=GPT2_VOCAB - 1, pattern=None)
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
        table = [gpt2.decode_single_token_bytes(i).decode("latin-1") for i in range(GPT2_VOCAB)]
        return dict(meta, pattern=gpt2._pat_str, token_bytes=table)
    except Exception as e:  # not installed, no network, a proxy, a full disk
        print(f"{SCRIPT}.py: no GPT-2 vocabulary ({type(e).__name__}), so no bits per byte: it "
              "comes over the network, or from the folder in TIKTOKEN_CACHE_DIR", file=sys.stderr)
        return dict(meta, token_bytes=[""] * GPT2_VOCAB)


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
    mask: object = None  # what attend makes of it
    cache: object = None  # keys and values of earlier passes; attend reads and extends it


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
        q = self.q(x[:, :N]).view(B, N, -1, d).transpose(1, 2)  # (B, H, N, d)
        k = self.k(x).view(B, S, -1, d).transpose(1, 2)  # (B, Hkv, S, d)
        v = self.v(x).view(B, S, -1, d).transpose(1, 2)
        q = rotary(norm(q), ctx.cos[:N], ctx.sin[:N])
        k = rotary(norm(k), ctx.cos, ctx.sin)
        y = attend(q, k, v, ctx)  # (B, H, N, d)
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
        self.embed = nn.Embedding(V + 1, D)  # the last row is the mask
        nn.init.normal_(self.embed.weight, std=TIED_STD if cfg.tied else EMBED_STD)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.head = None if cfg.tied else matrix(D, V, zero=True)
        self.skip = nn.Parameter(torch.ones(cfg.n_layer // 2)) if cfg.unet else None
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
        for i, layer in enumerate(self.layers):
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
        # Only real tokens: the mask is never predicted (SUBS, arXiv 2406.07524, section 3.2.3).
        weight = self.embed.weight[:-1] if self.head is None else self.head.weight
        logits = F.linear(h, weight).float()
        if self.cfg.softcap:
            logits = self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)
        return logits


# ----------------------------------------------------------------------------- objective
# >>> objective
METRIC = "val_nelbo"  # nats per token: an upper bound on the negative log-likelihood
INIT_FROM = ("train_mdlm",)  # scripts whose checkpoints fit --init_from

PRESETS = {
    "tiny": dict(
        data="stdlib", seq_len=256, n_layer=4, n_head=4, n_embd=256, steps=400, batch_tokens=8192,
        micro_batch=32, lr=0.03, eval_every=100, val_tokens=65_536, ckpt_every=200),
    "shakespeare_10m": dict(
        data="shakespeare", seq_len=256, n_layer=6, n_embd=384, steps=1500, batch_tokens=16_384,
        micro_batch=64, dropout=0.1, ema=0.99, val_draws=4),
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
        micro_batch=64, eval_every=1000, schedule="cosine", estimator="bernoulli",
        loss_weight="uniform"),
}

# The masked fraction 1 - alpha_t and its derivative -alpha'_t, of t in (0,1].
MASKED_FRACTION = {
    "linear": (lambda t: t, lambda t: torch.ones_like(t)),
    "cosine": (lambda t: 2 * torch.sin(math.pi / 4 * t) ** 2,
               lambda t: math.pi / 2 * torch.sin(math.pi / 2 * t)),
    "loglinear": (lambda t: (1 - 1e-3) * t, lambda t: torch.full_like(t, 1 - 1e-3)),
    "sqrt": (lambda t: t.sqrt(), lambda t: 0.5 / t.sqrt()),
    "clipped_cosine": (lambda t: 0.05 + 1.8 * torch.sin(math.pi / 4 * t) ** 2,
                       lambda t: 0.45 * math.pi * torch.sin(math.pi / 2 * t)),
    "sigmoid": (lambda t: torch.sigmoid(10 * (t - 0.5)),
                lambda t: 10 * torch.sigmoid(10 * (t - 0.5)) * torch.sigmoid(10 * (0.5 - t))),
}
SIGMA_MAX = 20.0  # of the conditioning, where nothing is left unmasked
TILT_MIN, TILT_MAX = 0.5, 1.5  # of entropy masking
CPU_SHORT = 512  # positions
ROW_SIZES = 16  # a variable number of masked rows is padded up to a multiple of B T / 16


def check_objective(cfg, n_rows, micro_rows):
    """Refuse combinations that this objective does not have."""
    if cfg.estimator == "exact_k":
        for name, fits in (("schedule", ("linear",)), ("masking", ("uniform",)),
                           ("loss_weight", ("elbo", "uniform"))):
            if getattr(cfg, name) not in fits:
                fail(f"--{name}={getattr(cfg, name)} needs --estimator=bernoulli")
        if n_rows % 2:
            fail(f"--batch_tokens={cfg.batch_tokens}: {n_rows} rows, exact_k needs an even number")
        if micro_rows % 2:
            fail(f"--micro_batch={cfg.micro_batch}: {micro_rows} rows a pass, exact_k needs pairs")
    if cfg.masking == "entropy":
        token_tilt(cfg.token_entropy, cfg.vocab_size)
    elif cfg.token_entropy:
        fail("--token_entropy is read by --masking=entropy only")
    if cfg.weight_clip <= 0:
        fail(f"--weight_clip={cfg.weight_clip}: must be positive")


def flops_per_token(cfg, model):
    """Training FLOPs per token of x0: 6 per weight used, the head on half of the positions, plus
    12 n_layer D T for attention over all pairs of positions."""
    hidden = sum(p.numel() for n, p in model.named_parameters() if is_hidden(n))
    head = cfg.n_embd * cfg.vocab_size * (cfg.seq_len + 1) / (2 * cfg.seq_len)
    return 6 * (hidden + head) + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


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
        B, T = xt.shape
        positions = torch.arange(T, device=xt.device)
        cos, sin = rotary_tables(positions, self.cfg.n_embd // self.cfg.n_head)
        cond = self.embed_sigma(sigma)
        h = self.run_layers(Ctx(cos, sin, self.embed_tokens(xt), cond))
        return self.logits(h, cond, rows)


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
    and a coin orders the pair, so each row alone has k ~ U{1..T} (arXiv 2110.02037, eq. 8).
    """
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
    fraction, slope = (f(t) for f in MASKED_FRACTION[cfg.schedule])
    score = torch.rand(n_rows, T, generator=gen)
    weight = slope / fraction  # -alpha' / (1 - alpha), arXiv 2406.07524, eq. 10
    if cfg.loss_weight == "clipped":
        weight = weight.clamp(max=cfg.weight_clip)
    elif cfg.loss_weight == "uniform":
        weight = torch.full_like(t, 1 / fraction.mean())
    elif cfg.loss_weight == "masked_mean":
        # The mean over the masked tokens of the global batch, however that is cut.
        n_masked = (score < fraction[:, None]).sum().clamp(min=1)
        weight = torch.full_like(t, n_rows * T / n_masked)
    sigma = -torch.log1p(-fraction).clamp(min=-SIGMA_MAX)
    return Noise(fraction.float(), sigma.float(), weight.float(), score)


@torch.compiler.disable
@functools.lru_cache(maxsize=1)
def token_tilt(path, vocab_size):
    """(V,) clamp(2 - H_token / mean H, .5, 1.5): likelier masks for predictable tokens."""
    try:
        entropy = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        fail(f"--token_entropy={path}: not a .npy file of one entropy per token ({e})")
    if entropy.ndim != 1 or not np.isfinite(entropy).all() or entropy.mean() <= 0:
        fail(f"--token_entropy={path}: one finite entropy per token expected")
    if vocab_size and len(entropy) != vocab_size:
        fail(f"--token_entropy={path}: {len(entropy)} values, the vocabulary has {vocab_size}")
    tilt = np.clip(2 - entropy / entropy.mean(), TILT_MIN, TILT_MAX)
    return torch.from_numpy(tilt.astype(np.float32))


def corrupt(x0, noise, cfg):
    """x0 (B, T) -> xt (B, T): the mask (id vocab_size) where the noise says."""
    level = noise.level[:, None]
    if cfg.masking == "entropy":
        level = level * token_tilt(cfg.token_entropy, cfg.vocab_size).to(x0.device)[x0]
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
    # Rows that are no antithetic pairs would lose tokens here; better no number than that.
    return torch.where((xt != x0).sum() == n_masked, loss, torch.nan) if paired else loss


def nelbo_fn(model, x0, noise, cfg):
    """Bound on -log p(x0) in nats per sequence, (B,); noise by draw_noise(bound=True)."""
    B, T = x0.shape
    xt = torch.where(noise.score < noise.level[:, None], cfg.vocab_size, x0)
    rows, losses = masked_losses(model, x0, xt, noise, padded_count(xt != x0))
    return losses.new_zeros(B).index_add(0, rows // T, losses)


def other_figures(nats, noise):
    """Figures of the literature that are no bounds: nats (N,) of nelbo_fn with its noise -> dict.
    The mean over all masked tokens of a batch gives heavily masked rows more weight."""
    k = noise.level.double()
    return {"masked_mean(no_bound)": float((nats / noise.weight.double()).sum() / k.sum())}


class Sample(NamedTuple):
    tokens: Tensor  # (B, T) int64
    length: Tensor  # (B,) int64, tokens of each row
    nfe: int  # forward passes
    order: Tensor  # (B, T) int64, the pass that fixed a token; 0: it was known


def draw_tokens(log_probs, u):
    """Inverse CDF in float64: log_probs (R, V), u (R,) uniform -> tokens (R,). Gumbel noise in fp32
    draws rare tokens too seldom (arXiv 2409.02908, section 4)."""
    cdf = log_probs.double().softmax(-1).cumsum(-1)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u[:, None] * total, right=True)[:, 0]
    # u < 1 may still round up to the total: the last token that has any probability.
    last = (cdf < total).sum(-1)
    return torch.minimum(token, last)


@torch.no_grad()
def generate(model, cfg, known, is_known, *, steps, gen, choose=None, warp=None, watch=None):
    """Fill in the unknown positions. known (B, T) int64, is_known (B, T) bool -> Sample.

    steps=N: ancestral sampling on N equal steps of t (arXiv 2406.07524, eq. 6 with SUBS), each
    masked token drawn with probability (t - s) / t. steps=None: first-hitting (arXiv 2409.02908),
    one uniformly random token a row and pass, exact in distribution as ancestral is for N -> inf.
    A pass that would change nothing is not run. choose(log_probs (R, V), is_mask (B, T), step=,
    steps=, u=(B, T) uniform) -> is_mask after the pass replaces both: newly unmasked tokens are
    drawn, newly masked ones forgotten. R: the masked positions in order. warp changes the
    log-probabilities (R, V) that tokens are drawn from; watch(tokens, nfe) looks on.
    gen (CPU) seeds a generator for every row: a row does not depend on its batch.
    """
    B, T = known.shape
    mask_id, device = cfg.vocab_size, known.device
    seeds = [int(torch.randint(2**62, (), generator=gen)) for _ in range(B)]
    gens = [torch.Generator().manual_seed(s) for s in seeds]
    tokens = torch.where(is_known, known, mask_id)
    order = torch.zeros_like(known)
    nfe, passes = 0, T if steps is None else steps
    for i in range(passes):
        is_mask = tokens == mask_id
        u = [torch.rand(2, T, generator=g, dtype=torch.float64) for g in gens]
        pick, u = torch.stack(u).unbind(1)  # (B, T) each, CPU float64
        if choose is not None:
            commit = torch.ones(B, T, dtype=torch.bool)  # chosen from below
        elif steps is None:
            first = pick.masked_fill(~is_mask.cpu(), -1).argmax(1, keepdim=True)
            commit = torch.zeros(B, T, dtype=torch.bool).scatter_(1, first, True)
        else:
            commit = pick * (steps - i) < 1
        commit = commit.to(device) & is_mask
        rows = commit.flatten().nonzero()[:, 0]
        log_probs = torch.zeros(0, mask_id, device=device)
        if len(rows):
            sigma = -torch.log1p(-is_mask.sum(1).clamp(min=1) / (T + 1))
            log_probs = model(tokens, sigma, rows).log_softmax(-1)  # (R, V)
            nfe += 1
        if choose is not None:
            new_mask = choose(log_probs, is_mask, step=i, steps=steps, u=pick) & ~is_known
            new_mask &= i < passes - 1
            tokens = torch.where(new_mask, mask_id, tokens)
            commit = is_mask & ~new_mask
            at = commit.flatten()[rows]
            rows, log_probs = rows[at], log_probs[at]
        if len(rows):
            log_probs = log_probs if warp is None else warp(log_probs)
            where = "cpu" if device.type == "mps" else device  # MPS has no float64
            drawn = draw_tokens(log_probs.to(where), u.flatten()[rows.cpu()].to(where)).to(device)
            tokens = tokens.flatten().index_put((rows,), drawn).view(B, T)
            order = torch.where(commit, nfe, order)
        if watch is not None:
            watch(tokens, nfe)
    return Sample(tokens, torch.full((B,), T, device=device), nfe, order)
# <<< objective


# ----------------------------------------------------------------------------- optimizer
MOMENTUM_START = 0.85
EMA_WARMUP = 10
ALIGN = 64  # elements, so that the gradient of every parameter starts on a cache line


def is_hidden(name):
    """Does Muon take this parameter? The matrices of the layers, conditioning apart."""
    return re.match(r"layers\.\d+\.(q|k|v|o|gate|up|down)\.", name) is not None


def make_optimizers(model, cfg):
    """[hidden matrices by Muon or AdamW, everything else by AdamW]."""
    rates = {"hidden": cfg.lr, "embed": cfg.embed_lr, "head": cfg.head_lr,
             "scalar": cfg.scalar_lr, "cond": cfg.cond_lr}
    groups = {kind: dict(params=[], lr=lr, peak_lr=lr, weight_decay=cfg.adam_weight_decay)
              for kind, lr in rates.items()}
    for name, p in model.named_parameters():
        part = "hidden" if is_hidden(name) else name.split(".")[0]
        kind = part if part in groups else "scalar" if p.ndim < 2 else "cond"
        groups[kind]["params"].append(p)
    hidden = groups.pop("hidden") | dict(weight_decay=cfg.weight_decay)
    rest = [g for g in groups.values() if g["params"]]
    adam = dict(betas=(cfg.adam_beta1, cfg.adam_beta2), eps=1e-10,
                fused=model.embed.weight.device.type in ("cpu", "cuda"))
    if cfg.optimizer == "muon":
        optimizers = [Muon([hidden], momentum=cfg.momentum, cautious=cfg.cautious,
                           beta2=cfg.muon_beta2 or None), torch.optim.AdamW(rest, **adam)]
    else:
        optimizers = [torch.optim.AdamW([hidden, *rest], **adam)]
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(set(owned)) == len(owned) == len(list(model.parameters()))
    return optimizers


def set_rates(optimizers, step, cfg):
    """Learning rate of every group and Muon's momentum, as they are at a 0-based step."""
    if step < cfg.warmup:
        factor = (step + 1) / cfg.warmup
    elif cfg.lr_schedule == "cosine":
        x = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        factor = cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * x))
    else:
        x = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
        factor = cfg.lr_end + (1 - cfg.lr_end) * min(1.0, x)
    cold = max(0.0, 1 - step / cfg.momentum_warmup) if cfg.momentum_warmup else 0.0
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * factor
        if "momentum" in group:
            group["momentum"] = cfg.momentum - cold * max(0.0, cfg.momentum - MOMENTUM_START)


def flatten_grads(params):
    """Make every .grad a view of one flat buffer: one all-reduce, one norm, one memset a step."""
    sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
    flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, part in zip(params, flat.split(sizes), strict=True):
        p.grad = part[:p.numel()].view_as(p)
    return flat


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
    """The rows of a batch's noise on a device."""
    return type(noise)(*(x[rows].to(device, non_blocking=True) for x in noise))


@torch.no_grad()
def evaluate(nelbo, cfg, windows, tokenizer, device, rank, world):
    """nelbo(x0, noise) -> (B,) nats, over the first val_tokens of a split.

    The same digits on any number of ranks: the noise of all windows is one draw, batches of them
    are dealt to the ranks in turn, sums are in float64. -> ({METRIC: nats per token, se: standard
    error over pairs of neighbouring windows, whose noise is paired, bpb, ppl, ..}, nats (N,))."""
    n = min(len(windows), max(2, cfg.val_tokens // cfg.seq_len)) // 2 * 2
    size = cfg.micro_batch + cfg.micro_batch % 2
    nats, others = torch.zeros(n, dtype=torch.float64), {}
    for draw in range(cfg.val_draws):
        gen = torch.Generator().manual_seed(derive_seed(EVAL_SEED, draw))
        noise = draw_noise(cfg, n, gen, bound=True)
        sums = torch.zeros(n, 2, dtype=torch.float64)  # nats and bytes of every window
        for first in range(rank * size, n, world * size):
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
    n_bytes = int(sums[:, 1].sum())
    mean = float(nats.mean()) / cfg.seq_len
    pairs = nats.view(-1, 2).mean(1) / cfg.seq_len
    return {METRIC: mean, "se": float(pairs.std() / len(pairs) ** 0.5) if n > 2 else None,
            "bpb": float(nats.sum()) / math.log(2) / n_bytes if n_bytes else None,
            "ppl": math.exp(min(mean, 700.0)), **others, "tokens": n * cfg.seq_len,
            "bytes": n_bytes, "draws": cfg.val_draws, "seed": EVAL_SEED}, nats


def describe(result):
    """The figures of an evaluation as they are printed."""
    shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in result.items()}
    shown = {k: "n/a" if v is None else v for k, v in shown.items()}
    shown[METRIC] += f"+-{shown.pop('se')}"
    return " ".join(f"{k}:{v}" for k, v in shown.items())


# ----------------------------------------------------------------------------- checkpoints
CKPT_FORMAT = 1
CKPT_TYPES = {"format": int, "script": str, "config": dict, "model": dict, "optimizers": list,
              "tokenizer": dict, "step": int, "tokens_seen": int, "progress": dict}


def save_checkpoint(path, state):
    """Write beside, then swap in, keeping the one before: some checkpoint always loads.
    -> what went wrong, or ''."""
    partial, previous = f"{path}.partial", path.removesuffix(".pt") + "_prev.pt"
    try:
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            shutil.copyfile(path, f"{previous}.partial")  # path itself stays until it is replaced
            os.replace(f"{previous}.partial", previous)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch.save wraps what the disk says
        for name in (partial, f"{previous}.partial"):
            if os.path.exists(name):
                os.remove(name)
        return str(e).splitlines()[0]
    return ""


def load_checkpoint(path):
    """Read and check a checkpoint; tensors and plain values only, never code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about files of others
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as e:  # the unpickler meets arbitrary bytes
        code = "weights_only" in str(e) or "Unsupported" in str(e)
        what = "holds more than tensors and plain values" if code else "cut short or damaged"
        fail(f"{path}: no checkpoint of ours: {what} ({type(e).__name__})")
    if not isinstance(state, dict) or any(
            not isinstance(state.get(k), t) for k, t in CKPT_TYPES.items()):
        fail(f"{path}: no checkpoint of ours: entries are missing or of other types")
    if state["format"] != CKPT_FORMAT:
        fail(f"{path}: format {state['format']}, this script reads {CKPT_FORMAT}")
    return state


def load_weights(model, weights, path):
    """Copy a checkpoint's weights, all of them and in their shapes, or refuse."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as e:
        what = str(e).splitlines()[-1].strip()
        fail(f"{path}: {what} Another shape: give the flags it was trained with")


def build_model(ckpt, weights="ema", device="cpu", path="checkpoint"):
    """A checkpoint (load_checkpoint) -> (model in eval mode, its Config); weights: ema or raw."""
    unknown = ckpt["config"].keys() - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        fail(f"{path}: its config has {min(unknown)}, which this script does not know")
    cfg = Config(**ckpt["config"])
    validate(cfg, 1)
    model = Model(cfg)
    load_weights(model, (weights == "ema" and ckpt.get("ema")) or ckpt["model"], path)
    return model.to(device).eval(), cfg


# ----------------------------------------------------------------------------- runtime
# Dense bf16 peak by part of the device's name, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
RECOMPILE_LIMIT = 32  # shapes: training, evaluation, and batches whose size varies
COLLECTIVE_TIMEOUT = 100  # seconds after which a rank that waits for a lost one gives up


def pick_device(cfg, local_rank):
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    name = next(n for n in here if here[n]) if cfg.device == "auto" else cfg.device
    if not here[name]:
        fail(f"--device={name}: PyTorch sees none here; --device=auto takes what there is")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            fail(f"--nproc_per_node: at most {torch.cuda.device_count()}, the GPUs of this machine")
        torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank if name == "cuda" else None)


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


def start_logs(cfg, device, world, step):
    """Start the logs with all that is needed to run it again; or drop what they have after the
    step that a run resumes from."""
    os.makedirs(cfg.out, exist_ok=True)
    for name, pattern in (("log.txt", r"step:(\d+)"), ("log.jsonl", r'\{"step": (\d+)')):
        path, lines = os.path.join(cfg.out, name), []
        if cfg.resume and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                lines = [x for x in f if int((re.match(pattern, x) or [0, 0])[1]) <= step]
        elif name == "log.txt":
            for source in (__file__, inspect.getfile(Muon)):
                with open(source, encoding="utf-8") as f:
                    lines += [*f, "=" * 100 + "\n"]
            gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            lines.append(f"python {sys.version.split()[0]} torch {torch.__version__} numpy "
                         f"{np.__version__} device {gpu} ranks {world} threads "
                         f"{torch.get_num_threads()}\n{json.dumps(dataclasses.asdict(cfg))}\n")
        with open(f"{path}.partial", "w", encoding="utf-8") as f:
            f.writelines(lines)
        os.replace(f"{path}.partial", path)


def main(argv):
    cfg = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(cfg, world)
    folder = cfg.data if os.path.isdir(cfg.data) else os.path.join("data", cfg.data)
    if not os.path.isdir(folder):
        fail(f"--data={cfg.data}: no such folder, nor {folder}; make it with prepare_data.py, "
             "whose --help lists what there is")
    val = Windows(folder, cfg.split, cfg.seq_len)
    train = val if cfg.eval_only else Windows(folder, "train", cfg.seq_len)
    if train.dtype != val.dtype:
        fail(f"{folder}: train shards hold {train.dtype}, {cfg.split} shards {val.dtype}")
    tokenizer = load_tokenizer(folder, val.dtype)
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer["vocab_size"])
    if cfg.vocab_size < tokenizer["vocab_size"]:
        fail(f"--vocab_size={cfg.vocab_size}: the data in {folder} has {tokenizer['vocab_size']}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    per_rank = n_rows // world
    micro = min(cfg.micro_batch, per_rank)
    if len(val) < 2:
        fail(f"--data={cfg.data}: the {cfg.split} split is shorter than two windows of "
             f"{cfg.seq_len} tokens")
    if len(train) < n_rows and not cfg.eval_only:
        fail(f"--data={cfg.data}: {len(train)} windows of {cfg.seq_len} tokens are fewer than the "
             f"{n_rows} of a batch; lower --batch_tokens")
    val.read(range(min(len(val), cfg.val_tokens // cfg.seq_len)), cfg.vocab_size)  # all ids known?
    path = os.path.join(cfg.out, "ckpt.pt")
    if os.path.exists(path) and not cfg.resume and not cfg.eval_only:
        fail(f"--out={cfg.out} holds a run: --resume=1 continues it, another --out starts afresh")
    device = pick_device(cfg, int(os.environ.get("LOCAL_RANK", 0)))
    dtype, notice = pick_dtype(cfg, device)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    torch.manual_seed(derive_seed(cfg.seed))
    model, source = Model(cfg), path if cfg.resume else cfg.init_from
    if source:
        ckpt = load_checkpoint(source)
        if ckpt["script"] not in ((SCRIPT,) if cfg.resume else INIT_FROM):
            fail(f"{source}: a checkpoint of {ckpt['script']}.py")
        load_weights(model, (cfg.init_from and ckpt.get("ema")) or ckpt["model"], source)
    model.to(device)
    params = list(model.parameters())
    if world > 1:
        auto = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(auto if cfg.backend == "auto" else cfg.backend,
                                timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT))

    def say(line, record=None):
        """Print on the first rank and keep in the logs of a training run."""
        if rank == 0:
            print(line, flush=True)
        if rank == 0 and not cfg.eval_only:
            for name, text in (("log.txt", line), ("log.jsonl", record and json.dumps(record))):
                if text:
                    with open(os.path.join(cfg.out, name), "a", encoding="utf-8") as f:
                        f.write(text + "\n")

    if rank == 0 and not cfg.eval_only:
        try:
            start_logs(cfg, device, world, ckpt["step"] if cfg.resume else 0)
        except OSError as e:
            fail(f"--out={cfg.out}: {e.strerror}")
    flops, peak = flops_per_token(cfg, model), None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name(device)
        peak = next((world * f for part, f in PEAK_FLOPS.items() if part in name), None)
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per "
        f"token, {world} x {device.type} in {str(dtype)[6:]}, {folder}: "
        f"{len(train) * cfg.seq_len:,} tokens")
    if notice:
        say(notice)

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

    def run_evaluation():
        """The figures of the averaged weights, where there are any, and nats per window."""
        model.eval()
        swap(params, shadow)
        with amp:
            result, nats = evaluate(functools.partial(nelbo, model, cfg=cfg), cfg, val, tokenizer,
                                    device, rank, world)
        swap(params, shadow)
        model.train()
        return result, nats

    shadow = []  # the averaged weights
    if cfg.eval_only:
        say(f"split:{cfg.split} {describe(run_evaluation()[0])}")
        if world > 1:
            dist.destroy_process_group()
        return

    flat_grad = flatten_grads(params)
    optimizers = make_optimizers(model, cfg)
    # What else a resumed run needs; its place in the data is step * n_rows.
    at = SimpleNamespace(step=0, seconds=0.0, bad=0, skipped=0, evaluated=True, ema_updates=0)
    if cfg.resume:
        try:
            for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            at = SimpleNamespace(**{k: type(v)(ckpt["progress"][k]) for k, v in vars(at).items()})
            if ckpt["ema"]:
                shadow = [ckpt["ema"][name].to(device) for name, _ in model.named_parameters()]
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            fail(f"{path}: cannot be continued ({type(e).__name__}: {e})")
        say(f"resuming {cfg.out} after step {at.step}")
    ckpt = None  # gives its memory back

    def next_batch(step):
        """Micro-batches (x0, noise) of this rank."""
        noise = draw_noise(cfg, n_rows, torch.Generator().manual_seed(derive_seed(cfg.seed, step)))
        n, batch = len(train), []
        for row in range(rank * per_rank, (rank + 1) * per_rank, micro):
            places = range(step * n_rows + row, step * n_rows + row + micro)
            if cfg.shuffle:
                indices = [permutation(cfg.seed, i // n, n)[i % n] for i in places]
            else:
                indices = [i % n for i in places]
            x0 = train.read(indices, cfg.vocab_size).to(device)
            batch.append((x0, take_rows(noise, slice(row, row + micro), device)))
        return batch

    def log_evaluation():
        result, nats = run_evaluation()
        step, ms = at.step, 1000 * at.seconds
        short = {k: v for k, v in result.items() if not isinstance(v, int)}
        say(f"step:{step}/{cfg.steps} {describe(short)} train_time:{ms:.0f}ms "
            f"step_avg:{ms / step:.2f}ms", {"step": step, **result})
        if step == cfg.steps and rank == 0:
            np.save(os.path.join(cfg.out, f"{cfg.split}_nats.npy"), nats.numpy())

    def save(last):
        named = {name: p.detach() for name, p in model.named_parameters()}
        problem = save_checkpoint(path, {
            "format": CKPT_FORMAT, "script": SCRIPT, "config": dataclasses.asdict(cfg),
            "tokenizer": tokenizer, "model": named, "step": at.step, "progress": vars(at),
            "ema": dict(zip(named, shadow, strict=True)) if shadow else None,
            "optimizers": [o.state_dict() for o in optimizers],
            "tokens_seen": at.step * cfg.batch_tokens})
        if problem and last:
            fail(f"{path} not written ({problem}); make room and go on with --resume=1")
        if problem:
            say(f"checkpoint of step {at.step} not written ({problem}); the one before it stays")

    stop = []  # signals received
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number))
                for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    model.train()
    if not at.evaluated:
        log_evaluation()
    batch = next_batch(at.step)
    recent = []  # (loss, seconds) of the steps since the last line
    start = time.perf_counter()
    while at.step < cfg.steps:
        flat_grad.zero_()
        total = torch.zeros(2, device=device)  # loss; signals
        for i, (x0, noise) in enumerate(batch):
            if cfg.dropout:
                torch.manual_seed(derive_seed(cfg.seed, at.step, rank * len(batch) + i))
            with amp:
                loss = train_loss(model, x0, noise, cfg) / len(batch)
            loss.backward()
            total[0] += loss.detach() / world
        total[1] = len(stop)
        if at.step + 1 < cfg.steps:
            batch = next_batch(at.step + 1)  # while the GPU works
        if world > 1:
            dist.all_reduce(flat_grad)
            dist.all_reduce(total)
        flat_grad /= world
        grad_norm = float(flat_grad.norm())
        loss, stopping = total.tolist()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if cfg.grad_clip and grad_norm > cfg.grad_clip:
                flat_grad *= cfg.grad_clip / grad_norm
            set_rates(optimizers, at.step, cfg)
            for optimizer in optimizers:
                optimizer.step()
            if cfg.ema and at.step >= cfg.ema_start * cfg.steps:
                shadow = shadow or [p.detach().clone() for p in params]
                decay = min(cfg.ema, (1 + at.ema_updates) / (EMA_WARMUP + at.ema_updates))
                with torch.no_grad():
                    torch._foreach_lerp_(shadow, params, 1 - decay)
                at.ema_updates += 1
            at.bad = 0
        else:
            at.bad, at.skipped = at.bad + 1, at.skipped + 1
            names = [n for n, p in model.named_parameters() if not p.grad.isfinite().all()]
            say(f"step:{at.step + 1}/{cfg.steps} skipped: loss {loss}, gradient norm {grad_norm}, "
                f"first non-finite gradient: {(names or ['none'])[0]}")
            if at.bad >= cfg.max_bad_steps:
                fail(f"{at.bad} non-finite steps in a row: stopped at step {at.step + 1}; "
                     f"{cfg.out} keeps its last checkpoint; try a lower --lr, look at the data")
        at.step += 1
        recent.append((loss, time.perf_counter() - start))
        at.seconds += recent[-1][1]
        last = at.step == cfg.steps
        if at.step % cfg.log_every == 0 or last:
            mean, seconds = np.mean(recent, 0).tolist()
            recent = []
            rate, lr = cfg.batch_tokens / seconds, optimizers[0].param_groups[0]["lr"]
            say(f"step:{at.step}/{cfg.steps} loss:{mean:.4f} lr:{lr:.2e} tok/s:{rate:.0f} mfu:"
                + (f"{rate * flops / peak:.3f}" if peak else "n/a")
                + f" eta:{datetime.timedelta(seconds=int((cfg.steps - at.step) * seconds))}"
                + (f" skipped:{at.skipped}" if at.skipped else ""),
                {"step": at.step, "loss": mean, "grad_norm": grad_norm, "lr": lr})
        due = last or (cfg.eval_every and at.step % cfg.eval_every == 0)
        at.evaluated = not (due and stopping)  # told to stop, it is made up for after --resume=1
        if due and not stopping:
            log_evaluation()
        if stopping or last or (cfg.ckpt_every and at.step % cfg.ckpt_every == 0):
            if rank == 0:
                save(stopping or last)
        if stopping:
            break
        start = time.perf_counter()

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if at.step < cfg.steps:
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


if __name__ == "__main__":
    main(sys.argv[1:])
