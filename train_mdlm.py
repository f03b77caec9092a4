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
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
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
FRACTIONS = "dropout ema ema_start momentum muon_beta2 adam_beta1 adam_beta2".split()


def fail(message):
    """A user's mistake: one line, exit status 2. Before ranks part, only the first one speaks."""
    if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
        print(f"{SCRIPT}.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def usage():
    """Text of --help: the docstring, then every flag with the comment beside it in Config."""
    with open(__file__, encoding="utf-8") as f:
        body = f.read().split("class Config:")[1].split("\n\n\n")[0]
    comments = dict(re.findall(r"^    (\w+): [^#]+# (.+)$", body, re.M))
    lines = [f"  --{f.name}={f.default}  {comments[f.name]}"
             + (f" ({', '.join(get_args(f.type))})" if get_args(f.type) else "")
             for f in dataclasses.fields(Config)]
    return "\n".join([__doc__, "Flags (--name=value):", *lines, "Presets: " + ", ".join(PRESETS)])


def near(word, words, otherwise):
    """The end of a message about a word that is none of the words."""
    close = difflib.get_close_matches(word, words, 1)
    return f"did you mean {close[0]}?" if close else otherwise


def parse_value(field, text):
    """The text of one flag as a value of its field's type."""
    kind, choices = type(field.default), get_args(field.type)
    try:
        if choices and text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        if kind is bool and text not in ("0", "1"):
            raise ValueError("0 or 1")
        value = kind(int(text)) if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("a finite number")
        return value
    except ValueError as e:
        wanted = {int: "a whole number", float: "a number"}.get(kind, e)
        fail(f"--{field.name}={text}: {wanted} expected")


def parse_flags(argv):
    """['--name=value', ..] -> {name: value}, typed; anything else is refused."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    flags = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(usage())
            raise SystemExit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        if name == "block_size":
            fail("--block_size means three things elsewhere: --seq_len is the context in tokens")
        if not arg.startswith("--") or name not in fields:
            fail(f"unknown flag {arg}: " + near(name, fields, "--help lists the flags"))
        if not equals or name in flags:
            fail(f"--{name} " + ("is given twice" if equals else f"needs a value: --{name}=VALUE"))
        flags[name] = parse_value(fields[name], text)
    return flags


def parse_args(argv):
    """Flags -> Config. A preset stands below the flags. A run that is resumed keeps its settings;
    a checkpoint that is started from fixes the shape of the model."""
    flags = parse_flags(argv)
    preset = flags.get("preset", "")
    if preset and preset not in PRESETS:
        fail(f"--preset={preset}: " + near(preset, PRESETS, f"there are {', '.join(PRESETS)}"))
    base = {"out": os.path.join("out", SCRIPT + (f"-{preset}" if preset else "")),
            **PRESETS.get(preset, {})}
    source = flags.get("init_from", "")
    if flags.get("resume"):
        if source:
            fail("--resume=1 and --init_from exclude each other")
        source = os.path.join(flags.get("out", base["out"]), "ckpt.pt")
        if not os.path.exists(source):
            fail(f"--resume=1: there is no {source}: name the run's folder with --out")
    elif flags.get("eval_only") and not source:
        fail("--eval_only=1 needs a checkpoint: --init_from=PATH")
    if source:
        saved = load_checkpoint(source)["config"]
        saved = {f.name: saved[f.name] for f in dataclasses.fields(Config) if f.name in saved}
        fixed = set(saved) - set(RESUME_FIELDS) if flags.get("resume") else SHAPE_FIELDS
        for name in fixed:
            if flags.get(name, saved.get(name)) != saved.get(name):
                fail(f"--{name}={flags[name]}: {source} has {saved[name]}, which stays")
        if flags.get("resume") or flags.get("eval_only"):
            base = dict(saved, split="val", out=base["out"])
        else:
            base.update((name, saved[name]) for name in SHAPE_FIELDS if name in saved)
    return Config(**(base | flags))


def validate(cfg, world):
    """Refuse what cannot work, before anything is opened or written."""
    def refuse(name, why):
        fail(f"--{name}={getattr(cfg, name)}: {why}")

    for field in dataclasses.fields(Config):
        name, value = field.name, getattr(cfg, field.name)
        if isinstance(value, str):
            continue
        if value < 0 or (name in POSITIVE and value == 0):
            refuse(name, "must be positive" if name in POSITIVE else "must not be negative")
        if (name in FRACTIONS and value >= 1) or (name in ("cooldown", "lr_end") and value > 1):
            refuse(name, "must be below 1" if name in FRACTIONS else "must be at most 1")
    if cfg.n_embd % (2 * cfg.n_head):
        refuse("n_head", f"{cfg.n_embd} wide does not divide into heads of even width")
    if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
        refuse("n_kv_head", f"must divide --n_head={cfg.n_head}")
    if cfg.batch_tokens % cfg.seq_len:
        refuse("batch_tokens", f"not a multiple of --seq_len={cfg.seq_len}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    if n_rows % world:
        refuse("batch_tokens", f"its {n_rows} rows do not divide by {world} ranks")
    micro = min(cfg.micro_batch, n_rows // world)
    if n_rows // world % micro:
        refuse("micro_batch", f"the {n_rows // world} rows of a rank are no multiple of it")
    check_objective(cfg, n_rows, micro)


# ----------------------------------------------------------------------------- data
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_VOCAB = 50257


def open_shard(path):
    """A shard of llm.c's format as a memory map of tokens, (n,) uint8 or uint16."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except OSError as e:
        fail(f"{path}: {e.strerror}")
    if header.size < HEADER_BYTES // 4 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        fail(f"{path}: not a token shard; make them with prepare_data.py")
    n_tokens, itemsize = int(header[2]), int(header[3]) or 2
    if itemsize not in (1, 2) or n_tokens <= 0:
        fail(f"{path}: bad header ({n_tokens} tokens of {itemsize} bytes); prepare it again")
    if size != HEADER_BYTES + n_tokens * itemsize:
        fail(f"{path}: {size} bytes, {HEADER_BYTES + n_tokens * itemsize} expected: "
             "cut short or damaged; prepare it again")
    dtype = np.uint8 if itemsize == 1 else np.dtype("<u2")
    return np.memmap(path, dtype, "r", HEADER_BYTES, (n_tokens,))


class Windows:
    """All windows of seq_len tokens of one split, shard after shard; a shard's tail is left out."""

    def __init__(self, folder, split, seq_len):
        names = sorted(n for n in os.listdir(folder) if re.search(rf"{split}_\w*\.bin$", n))
        if not names:
            fail(f"--data={folder}: no *{split}_*.bin in it")
        self.paths = [os.path.join(folder, n) for n in names]
        self.shards = [open_shard(p) for p in self.paths]
        for shard, path in zip(self.shards, self.paths, strict=True):
            if shard.dtype != self.shards[0].dtype:
                fail(f"{path}: {shard.dtype} tokens beside {self.shards[0].dtype}: prepare anew")
        self.dtype = self.shards[0].dtype
        self.starts = np.cumsum([0] + [len(s) // seq_len for s in self.shards])
        self.seq_len = seq_len

    def __len__(self):
        return int(self.starts[-1])

    def read(self, indices, vocab_size):
        """Windows -> (len(indices), seq_len) int64."""
        T = self.seq_len
        rows = np.empty((len(indices), T), np.int64)
        for row, index in zip(rows, indices, strict=True):
            shard = int(np.searchsorted(self.starts, index, "right")) - 1
            start = int(index - self.starts[shard]) * T
            row[:] = self.shards[shard][start:start + T]
            if row.max() >= vocab_size:
                fail(f"{self.paths[shard]}: token id {row.max()} with a vocabulary of {vocab_size}")
        return torch.from_numpy(rows)


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_rows(windows, position, n_rows, cfg):
    """Window numbers of rows position .. position + n_rows - 1 of an endless, shuffled stream."""
    n = len(windows)
    rows = np.arange(position, position + n_rows)
    if not cfg.shuffle:
        return rows % n
    return np.array([permutation(cfg.seed, int(r) // n, n)[r % n] for r in rows])


def data_folder(name):
    folder = name if os.path.isdir(name) else os.path.join("data", name)
    if not os.path.isdir(folder):
        fail(f"--data={name}: no such folder, nor {folder}; 'python prepare_data.py {name}' may "
             "make it, 'python prepare_data.py --help' lists what there is")
    return folder


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
        table = [chr(i) for i in range(256)] if meta["token_bytes"] is None else meta["token_bytes"]
        table = [text.encode("latin-1") for text in table]
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
MUON_MATRICES = ("q", "k", "v", "o", "up", "gate", "down")
EMBED_STD = 1.0  # untied; h0 is normalised, so this only sets the relative step size
TIED_STD = 0.02
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


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary(x, cos, sin):
    """Rotate pairs (i, i + d/2) of x (B, H, S, d) by the angles of cos, sin (S, d/2)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


def rotary_tables(positions, head_dim):
    """positions (S,) -> cos, sin, each (S, head_dim / 2) float32."""
    freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angle = positions[:, None].float() * freq  # (S, head_dim / 2)
    return angle.cos(), angle.sin()


def init_matrix(weight, zero=False):
    """Uniform with the variance 1 / (3 fan_in) of a linear layer, or zero."""
    bound = 0.0 if zero else weight.size(1) ** -0.5
    nn.init.uniform_(weight, -bound, bound)


class Layer(nn.Module):
    """Attention and MLP, pre-norm, each added to the residual stream."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.n_embd
        self.n_head, self.n_kv_head = cfg.n_head, cfg.n_kv_head or cfg.n_head
        self.head_dim = D // cfg.n_head
        self.dropout = cfg.dropout
        kv_dim = self.n_kv_head * self.head_dim
        # Separate matrices, because Muon orthogonalises each; forward joins them into one product.
        self.q = nn.Linear(D, D, bias=False)
        self.k = nn.Linear(D, kv_dim, bias=False)
        self.v = nn.Linear(D, kv_dim, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        hidden = round(cfg.mlp_ratio * D)
        if cfg.mlp == "swiglu":
            hidden = math.ceil(hidden * 2 / 3 / 64) * 64
            self.gate = nn.Linear(D, hidden, bias=False)
        self.up = nn.Linear(D, hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)
        self.swiglu = cfg.mlp == "swiglu"
        self.residual = nn.Parameter(torch.tensor([1.0, 0.0]))  # weights of h and of h0
        self.mod = nn.Linear(cfg.cond_dim, 6 * D, bias=False) if cfg.cond_dim else None
        # Every layer starts as the identity: by adaLN's zero gates, or else by zero projections.
        for name, module in self.named_children():
            zero = name == "mod" or (name in ("o", "down") and not cfg.cond_dim)
            init_matrix(module.weight, zero)

    def forward(self, h, ctx, n_query=None):
        """h (B, S, D) -> (B, N, D), N = n_query leading positions, or all S."""
        B, S, D = h.shape
        N = n_query or S
        h = self.residual[0] * h + self.residual[1] * ctx.h0  # (B, S, D)
        if self.mod is not None:
            mod = self.mod(ctx.cond)[:, None]  # (B, 1, 6D)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mod.chunk(6, -1)

        x = norm(h)
        if self.mod is not None:
            x = x * (1 + scale_a) + shift_a
        if N == S:
            qkv = F.linear(x, torch.cat((self.q.weight, self.k.weight, self.v.weight)))
            q, k, v = qkv.split((D, self.k.out_features, self.v.out_features), -1)
        else:
            q = self.q(x[:, :N])
            k, v = F.linear(x, torch.cat((self.k.weight, self.v.weight))).chunk(2, -1)
        q = q.view(B, N, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, N, d)
        k = k.reshape(B, S, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, Hkv, S, d)
        v = v.reshape(B, S, self.n_kv_head, self.head_dim).transpose(1, 2)
        q = rotary(norm(q), ctx.cos[:N], ctx.sin[:N])
        k = rotary(norm(k), ctx.cos, ctx.sin)
        y = attend(q, k, v, ctx)  # (B, H, N, d)
        y = self.o(y.transpose(1, 2).reshape(B, N, D))
        y = F.dropout(y, self.dropout, self.training)
        h = h[:, :N] + (y if self.mod is None else gate_a * y)

        x = norm(h)
        if self.mod is not None:
            x = x * (1 + scale_m) + shift_m
        if self.swiglu:
            gate, up = F.linear(x, torch.cat((self.gate.weight, self.up.weight))).chunk(2, -1)
            x = F.silu(gate) * up  # (B, N, hidden)
        else:
            x = F.relu(self.up(x)).square()
        y = F.dropout(self.down(x), self.dropout, self.training)
        return h + (y if self.mod is None else gate_m * y)


class Trunk(nn.Module):
    """Embedding, layers and head; Model below says what goes in and what comes out."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D, V = cfg.n_embd, cfg.vocab_size
        self.embed = nn.Embedding(V + 1, D)  # the last row is the mask
        nn.init.normal_(self.embed.weight, std=TIED_STD if cfg.tied else EMBED_STD)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.head = None if cfg.tied else nn.Linear(D, V, bias=False)
        if self.head is not None:
            init_matrix(self.head.weight, zero=True)
        self.skip = nn.Parameter(torch.ones(cfg.n_layer // 2)) if cfg.unet else None
        self.sigma_mlp = self.final_mod = None
        if cfg.cond_dim:
            C = cfg.cond_dim
            self.sigma_mlp = nn.Sequential(nn.Linear(SIGMA_FEATURES, C, bias=False), nn.SiLU(),
                                           nn.Linear(C, C, bias=False), nn.SiLU())
            init_matrix(self.sigma_mlp[0].weight)
            init_matrix(self.sigma_mlp[2].weight)
            self.final_mod = nn.Linear(C, 2 * D, bias=False)
            init_matrix(self.final_mod.weight, zero=True)

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
        h, skips = ctx.h0, []
        n = len(self.layers)
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
        h = norm(h)
        if self.final_mod is not None:
            shift, scale = self.final_mod(cond)[:, None].chunk(2, -1)
            h = h * (1 + scale) + shift
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
        data="stdlib", seq_len=256, n_layer=4, n_head=4, n_embd=256, steps=400,
        batch_tokens=8192, micro_batch=32, lr=0.03, eval_every=100, val_tokens=65_536,
        ckpt_every=200),
    "shakespeare_10m": dict(
        data="shakespeare", seq_len=256, n_layer=6, n_head=6, n_embd=384, steps=1500,
        batch_tokens=16_384, micro_batch=64, dropout=0.1, ema=0.99, val_draws=4),
    "fineweb_124m": dict(
        n_head=12, mlp="swiglu", tied=True, steps=100_000, batch_tokens=32_768, micro_batch=32,
        optimizer="adamw", lr=6e-4, embed_lr=6e-4, head_lr=6e-4, scalar_lr=6e-4, warmup=2000,
        lr_schedule="cosine", lr_end=0.1, weight_decay=0.1, adam_beta1=0.9, grad_clip=1.0,
        eval_every=1000),
    "golf_19m": dict(
        vocab_size=1024, n_layer=8, n_head=8, n_kv_head=4, n_embd=576, mlp_ratio=2.0, unet=True,
        softcap=30.0, tied=True, steps=80_000, batch_tokens=524_288, micro_batch=64, lr=0.02,
        embed_lr=0.05, scalar_lr=0.05, adam_beta1=0.9, ema=0.999, ema_start=0.1,
        estimator="bernoulli", loss_weight="clipped", weight_clip=100.0, eval_every=1000),
    "tinystories_142m": dict(
        data="tinystories", vocab_size=8192, seq_len=256, n_head=12, cond_dim=768, steps=20_000,
        batch_tokens=131_072, micro_batch=64, schedule="cosine", estimator="bernoulli",
        loss_weight="uniform", eval_every=1000),
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
    n_layers = sum(p.numel() for n, p in model.named_parameters() if is_hidden(n))
    masked = (cfg.seq_len + 1) / (2 * cfg.seq_len)
    n_head = masked * cfg.n_embd * cfg.vocab_size
    return 6 * (n_layers + n_head) + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


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

    exact_k: pair j of P takes u in stratum j of P of (0, 1/2) and masks k = 1 + floor(uT) positions
    in one row and T + 1 - k in the other. Strata are dealt to the pairs at random and the order in
    a pair is a coin toss, so each row alone has k ~ U{1..T}, as arXiv 2110.02037, eq. 8 asks.
    bound=True draws this whatever training uses.
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
        # The literature's mean over the masked tokens of the batch: of the global one, so that it
        # does not depend on how the batch is cut.
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


def masked_rows(is_mask, n_masked):
    """Flat positions of the masked tokens, (n_masked,); unmasked ones at the end are padding."""
    return is_mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:n_masked]


def row_sums(model, x0, xt, noise, rows):
    """Weighted cross entropy of the masked tokens, (R,), each at its flat position in rows."""
    logits = model(xt, noise.sigma, rows)
    ce = F.cross_entropy(logits, x0.flatten()[rows], reduction="none")
    weight = noise.weight[:, None] * (xt != x0)  # (B, T), 0 at padding
    return ce * weight.flatten()[rows]


def loss_fn(model, x0, noise, cfg):
    """Training loss, nats per token: weighted sum over masked tokens / (B T)."""
    B, T = x0.shape
    xt = corrupt(x0, noise, cfg)
    is_mask = xt != x0
    if cfg.estimator == "exact_k" and B % 2 == 0:
        n_masked = B // 2 * (T + 1)
        loss = row_sums(model, x0, xt, noise, masked_rows(is_mask, n_masked)).sum() / (B * T)
        # Rows that are no antithetic pairs would lose tokens here; better no number than that.
        return torch.where(is_mask.sum() == n_masked, loss, torch.nan)
    rows = masked_rows(is_mask, padded_count(is_mask))
    return row_sums(model, x0, xt, noise, rows).sum() / (B * T)


def nelbo_fn(model, x0, noise, cfg):
    """Bound on -log p(x0) in nats per sequence, (B,); noise by draw_noise(bound=True)."""
    B, T = x0.shape
    xt = torch.where(noise.score < noise.level[:, None], cfg.vocab_size, x0)
    rows = masked_rows(xt != x0, padded_count(xt != x0))
    sums = row_sums(model, x0, xt, noise, rows)
    return torch.zeros(B, dtype=sums.dtype, device=sums.device).index_add(0, rows // T, sums)


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

    def uniform():
        return torch.stack([torch.rand(2, T, generator=g, dtype=torch.float64) for g in gens])

    tokens = torch.where(is_known, known, mask_id)
    order = torch.zeros_like(known)
    nfe, passes = 0, T if steps is None else steps
    for i in range(passes):
        is_mask = tokens == mask_id
        pick, u = uniform().unbind(1)  # (B, T) each, CPU float64
        sigma = -torch.log1p(-is_mask.sum(1).clamp(min=1) / (T + 1))
        if choose is None:
            if steps is None:
                first = pick.masked_fill(~is_mask.cpu(), -1).argmax(1, keepdim=True)
                commit = torch.zeros(B, T, dtype=torch.bool).scatter_(1, first, True)
            else:
                commit = pick * (steps - i) < 1
            commit = commit.to(device) & is_mask
            if not commit.any():
                if steps is None:
                    break
                continue
            rows = commit.flatten().nonzero()[:, 0]
            log_probs = model(tokens, sigma, rows).log_softmax(-1)  # (R, V)
            nfe += 1
        else:
            rows = is_mask.flatten().nonzero()[:, 0]
            log_probs = torch.zeros(0, mask_id, device=device)
            if len(rows):
                log_probs = model(tokens, sigma, rows).log_softmax(-1)
                nfe += 1
            new_mask = choose(log_probs, is_mask, step=i, steps=steps, u=pick) & ~is_known
            if i == passes - 1:
                new_mask = torch.zeros_like(is_mask)
            commit = is_mask & ~new_mask
            tokens = torch.where(new_mask, mask_id, tokens)
            at = commit.flatten()[rows]
            rows, log_probs = rows[at], log_probs[at]
        if warp is not None and len(rows):
            log_probs = warp(log_probs)
        if len(rows):
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


def is_hidden(name):
    """Does Muon take this parameter? The matrices of the layers, conditioning apart."""
    parts = name.split(".")
    return parts[0] == "layers" and parts[-2] in MUON_MATRICES


def make_optimizers(model, cfg):
    """[hidden matrices by Muon or AdamW, everything else by AdamW]."""
    groups = {"hidden": [], "embed": [], "head": [], "scalar": [], "cond": []}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        kind = "hidden" if is_hidden(name) else part if part in groups else \
            "scalar" if p.ndim < 2 else "cond"
        groups[kind].append(p)
    owned = [id(p) for ps in groups.values() for p in ps]
    assert len(set(owned)) == len(owned) == len(list(model.parameters()))

    hidden = groups.pop("hidden")
    rates = {"embed": cfg.embed_lr, "head": cfg.head_lr, "scalar": cfg.scalar_lr,
             "cond": cfg.cond_lr}
    rest = [dict(params=ps, lr=rates[kind], weight_decay=cfg.adam_weight_decay)
            for kind, ps in groups.items() if ps]
    optimizers = []
    if cfg.optimizer == "muon":
        optimizers = [Muon(hidden, lr=cfg.lr, momentum=cfg.momentum, cautious=cfg.cautious,
                           weight_decay=cfg.weight_decay, beta2=cfg.muon_beta2 or None)]
    else:
        rest.insert(0, dict(params=hidden, lr=cfg.lr, weight_decay=cfg.weight_decay))
    optimizers.append(torch.optim.AdamW(rest, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=1e-10,
                                        fused=hidden[0].device.type in ("cpu", "cuda")))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step, cfg):
    """Learning rate of 0-based step / its peak."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    if cfg.lr_schedule == "cosine":
        x = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        return cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * x))
    x = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
    return cfg.lr_end + (1 - cfg.lr_end) * min(1.0, x)


def set_rates(optimizers, step, cfg):
    """Learning rate of every group and Muon's momentum, as they are at a step."""
    cold = max(0.0, 1 - step / cfg.momentum_warmup) if cfg.momentum_warmup else 0.0
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * lr_factor(step, cfg)
        if "momentum" in group:
            group["momentum"] = cfg.momentum - cold * max(0.0, cfg.momentum - MOMENTUM_START)


def flatten_grads(params):
    """Make every .grad a view of one flat buffer: one all-reduce, one norm, one memset a step."""
    align = 64  # elements, so that each view starts on a cache line
    sizes = [-(-p.numel() // align) * align for p in params]
    flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, part in zip(params, flat.split(sizes), strict=True):
        p.grad = part[:p.numel()].view_as(p)
    return flat


def update_ema(shadow, params, n, cfg):
    """n-th update (0, 1, ..) of the fp32 average, its decay warmed up."""
    decay = min(cfg.ema, (1 + n) / (EMA_WARMUP + n))
    with torch.no_grad():
        torch._foreach_lerp_(shadow, params, 1 - decay)


@contextmanager
def averaged(params, shadow):
    """Inside, the parameters hold the average, if there is one; afterwards they are as before."""
    kept = [p.detach().clone() for p in params] if shadow else []
    try:
        with torch.no_grad():
            for p, average in zip(params, shadow, strict=bool(shadow)):
                p.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(params, kept, strict=bool(shadow)):
                p.copy_(before)


# ----------------------------------------------------------------------------- evaluation
EVAL_SEED = 20240520  # of masks and times, the same for every run, so that runs compare in pairs


def derive_seed(*path):
    """A seed for one purpose out of numbers that name it."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


def take_rows(noise, rows, device):
    """The rows of a batch's noise on a device."""
    return type(noise)(*(x[rows].to(device, non_blocking=True) for x in noise))


@torch.no_grad()
def evaluate(nelbo, cfg, windows, tokenizer, device, rank, world):
    """Bound over the first val_tokens of a split; the same digits on any number of ranks.

    nelbo(x0, noise) -> (B,) nats. The noise of all windows is one stratified draw; batches of them
    are dealt to the ranks in turn, sums are in float64. -> ({METRIC: nats per token, se: standard
    error over pairs of neighbouring windows, antithetic in their noise, bpb, ppl, tokens, ..},
    nats of every window (N, draws))."""
    n = min(len(windows), max(2, cfg.val_tokens // cfg.seq_len)) // 2 * 2
    if not n:
        fail(f"--data={cfg.data}: the {cfg.split} split is shorter than two windows of "
             f"{cfg.seq_len} tokens")
    nats = torch.zeros(n, cfg.val_draws, dtype=torch.float64)
    n_bytes = torch.zeros(1, dtype=torch.float64)
    others = {}
    size = cfg.micro_batch + cfg.micro_batch % 2
    for draw in range(cfg.val_draws):
        gen = torch.Generator().manual_seed(derive_seed(EVAL_SEED, draw))
        noise = draw_noise(cfg, n, gen, bound=True)
        for first in range(rank * size, n, world * size):
            rows = slice(first, min(first + size, n))
            x0 = windows.read(range(rows.start, rows.stop), cfg.vocab_size)
            n_bytes += tokenizer["token_length"][x0].sum() if draw == 0 else 0
            nats[rows, draw] = nelbo(x0.to(device), take_rows(noise, rows, device)).cpu().double()
        if world > 1:
            column = nats[:, draw].to(device)
            dist.all_reduce(column)
            nats[:, draw] = column.cpu()
        for name, value in other_figures(nats[:, draw], noise).items():
            others[name] = others.get(name, 0.0) + value / cfg.val_draws
    if world > 1:
        n_bytes = n_bytes.to(device)
        dist.all_reduce(n_bytes)
    mean = float(nats.mean()) / cfg.seq_len
    pairs = nats.mean(1).view(-1, 2).mean(1) / cfg.seq_len
    n_bytes = int(n_bytes)
    bpb = float(nats.mean()) * n / math.log(2) / n_bytes if n_bytes else None
    return {METRIC: mean, "se": float(pairs.std() / len(pairs) ** 0.5) if n > 2 else None,
            "bpb": bpb, "ppl": math.exp(min(mean, 700.0)), **others, "tokens": n * cfg.seq_len,
            "bytes": n_bytes, "draws": cfg.val_draws, "seed": EVAL_SEED}, nats


def describe(result):
    """The figures of one evaluation as they are printed."""
    shown = {k: "n/a" if v is None else f"{v:.4f}" for k, v in result.items()}
    line = f"{METRIC}:{shown.pop(METRIC)}+-{shown.pop('se')}"
    for name in ("tokens", "bytes", "draws", "seed"):
        shown.pop(name)
    return line + "".join(f" {k}:{v}" for k, v in shown.items())


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
        state = torch.load(path, map_location="cpu", weights_only=True)
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
    own = dict(model.named_parameters())
    for name in sorted(own.keys() | weights.keys()):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else "none"
                  for x in (weights.get(name), own.get(name))]
        if shapes[0] != shapes[1] or name not in own:
            fail(f"{path}: {name} is {shapes[0]} there and {shapes[1]} here: another shape; "
                 "give the flags it was trained with")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


def build_model(ckpt, weights="ema", device="cpu", path="checkpoint"):
    """A checkpoint (load_checkpoint) -> (model in eval mode, its Config); weights: ema or raw."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for name, value in ckpt["config"].items():
        if name not in defaults or type(value) is not type(defaults[name]):
            fail(f"{path}: its config has {name}={value!r}, which this script does not know")
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
RECOMPILE_LIMIT = 32  # shapes: training, evaluation, and the row sizes of a Bernoulli estimator
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


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def trim_logs(folder, step):
    """Drop what was logged after the step that a run resumes from."""
    for name, pattern in (("log.txt", r"step:(\d+)"), ("log.jsonl", r'\{"step": (\d+)')):
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
        with open(f"{path}.partial", "w", encoding="utf-8") as f:
            f.writelines(x for x in lines if int((re.match(pattern, x) or [0, 0])[1]) <= step)
        os.replace(f"{path}.partial", path)


def log_head(cfg, device, world):
    """What a log starts with: everything needed to run it again."""
    parts = []
    for path in (__file__, sys.modules["muon"].__file__):
        with open(path, encoding="utf-8") as f:
            parts.append(f.read())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parts.append(f"python {sys.version.split()[0]} torch {torch.__version__} numpy {np.__version__}"
                 f" device {name} ranks {world} threads {torch.get_num_threads()}\n"
                 + json.dumps(dataclasses.asdict(cfg)) + "\n")
    return ("\n" + "=" * 100 + "\n").join(parts) + "=" * 100 + "\n"


def main(argv):
    cfg = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(cfg, world)
    folder = data_folder(cfg.data)
    val = Windows(folder, cfg.split, cfg.seq_len)
    train = val if cfg.eval_only else Windows(folder, "train", cfg.seq_len)
    if train.dtype != val.dtype:
        fail(f"{folder}: train shards hold {train.dtype}, {cfg.split} shards {val.dtype}")
    tokenizer = load_tokenizer(folder, val.dtype)
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer["vocab_size"])
    if cfg.vocab_size < tokenizer["vocab_size"]:
        fail(f"--vocab_size={cfg.vocab_size}: the data in {folder} has {tokenizer['vocab_size']}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    if len(train) < n_rows and not cfg.eval_only:
        fail(f"--data={cfg.data}: {len(train)} windows of {cfg.seq_len} tokens are fewer than the "
             f"{n_rows} of a batch; lower --batch_tokens")
    path = os.path.join(cfg.out, "ckpt.pt")
    if os.path.exists(path) and not cfg.resume and not cfg.eval_only:
        fail(f"--out={cfg.out} holds a run: --resume=1 continues it, another --out starts afresh")
    device = pick_device(cfg, int(os.environ.get("LOCAL_RANK", 0)))
    dtype, notice = pick_dtype(cfg, device)

    torch.manual_seed(derive_seed(cfg.seed))
    model, ckpt = Model(cfg), None
    if cfg.resume or cfg.init_from:
        source = path if cfg.resume else cfg.init_from
        ckpt = load_checkpoint(source)
        if ckpt["script"] not in ((SCRIPT,) if cfg.resume else INIT_FROM):
            fail(f"{source}: a checkpoint of {ckpt['script']}.py")
        load_weights(model, (cfg.init_from and ckpt.get("ema")) or ckpt["model"], source)
    model.to(device)
    params = list(model.parameters())
    if world > 1:
        auto = "nccl" if device.type == "cuda" else "gloo"
        backend = auto if cfg.backend == "auto" else cfg.backend
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")

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
            os.makedirs(cfg.out, exist_ok=True)
            if cfg.resume:
                trim_logs(cfg.out, ckpt["step"])
            else:
                for name, text in (("log.txt", log_head(cfg, device, world)), ("log.jsonl", "")):
                    with open(os.path.join(cfg.out, name), "w", encoding="utf-8") as f:
                        f.write(text)
        except OSError as e:
            fail(f"--out={cfg.out}: {e.strerror}")

    def loss_of(x0, noise):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return loss_fn(model, x0, noise, cfg)

    def nelbo_of(x0, noise):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return nelbo_fn(model, x0, noise, cfg)

    flops, peak = flops_per_token(cfg, model), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((world * f for part, f in PEAK_FLOPS.items() if part in name), None)
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per "
        f"token, {world} x {device.type} in {str(dtype)[6:]}, {folder}: "
        f"{len(train) * cfg.seq_len:,} tokens")
    if notice:
        say(notice)
    if cfg.compile:
        try:  # a small function first: is there a compiler at all?
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
            if device.type == "cpu":  # one small graph for all layers: seconds, not a minute
                for layer in model.layers:
                    layer.compile(dynamic=False)
            else:
                loss_of, nelbo_of = (torch.compile(f, dynamic=False) for f in (loss_of, nelbo_of))
            say("compiling: the first steps take longer (--compile=0 does without)")
        except Exception as e:  # whatever a missing or broken tool chain raises
            say(f"running without torch.compile: {str(e).strip().splitlines()[0]}")
    if cfg.eval_only:
        model.eval()
        result, _ = evaluate(nelbo_of, cfg, val, tokenizer, device, rank, world)
        say(f"split:{cfg.split} {describe(result)}")
        say(" ".join(f"{k}:{result[k]}" for k in ("tokens", "bytes", "draws", "seed")))
        if world > 1:
            dist.destroy_process_group()
        return

    flat_grad = flatten_grads(params)
    optimizers = make_optimizers(model, cfg)
    shadow = []  # the averaged weights
    # Everything else that a resumed run needs; rows is the position in the data.
    at = dict(step=0, rows=0, seconds=0.0, bad=0, skipped=0, evaluated=True, ema_updates=0)
    if cfg.resume:
        try:
            for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            at = {k: type(v)(ckpt["progress"][k]) for k, v in at.items()}
            shadow = [ckpt["ema"][n].to(device) for n, _ in model.named_parameters()] \
                if ckpt["ema"] else []
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            fail(f"{path}: cannot be continued ({type(e).__name__}: {e})")
        say(f"resuming {cfg.out} after step {at['step']}")
    ckpt = None
    per_rank = n_rows // world
    micro = min(cfg.micro_batch, per_rank)

    def next_batch(step, first):
        """Micro-batches (x0, noise) of this rank at a step whose rows start at first."""
        gen = torch.Generator().manual_seed(derive_seed(cfg.seed, step))
        noise = draw_noise(cfg, n_rows, gen)
        batch = []
        for row in range(rank * per_rank, (rank + 1) * per_rank, micro):
            indices = training_rows(train, first + row, micro, cfg)
            x0 = train.read(indices, cfg.vocab_size).to(device)
            batch.append((x0, take_rows(noise, slice(row, row + micro), device)))
        return batch

    def save():
        named = {n: p.detach() for n, p in model.named_parameters()}
        problem = save_checkpoint(path, {
            "format": CKPT_FORMAT, "script": SCRIPT, "config": dataclasses.asdict(cfg),
            "tokenizer": tokenizer, "model": named, "step": at["step"], "progress": at,
            "ema": dict(zip(named, shadow, strict=True)) if shadow else None,
            "optimizers": [o.state_dict() for o in optimizers],
            "tokens_seen": at["step"] * cfg.batch_tokens}) if rank == 0 else ""
        if problem:
            say(f"checkpoint of step {at['step']} not written ({problem}); the one before it stays")
        return problem

    def run_evaluation():
        model.eval()
        with averaged(params, shadow):
            result, nats = evaluate(nelbo_of, cfg, val, tokenizer, device, rank, world)
        model.train()
        step, ms = at["step"], 1000 * at["seconds"]
        say(f"step:{step}/{cfg.steps} {describe(result)} train_time:{ms:.0f}ms "
            f"step_avg:{ms / step:.2f}ms", {"step": step, **result})
        if step == cfg.steps and rank == 0:
            np.save(os.path.join(cfg.out, f"{cfg.split}_nats.npy"), nats.numpy())

    stop = []  # signals received
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number))
                for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    model.train()
    if not at["evaluated"]:
        run_evaluation()
    batch = next_batch(at["step"], at["rows"])
    recent = []  # (loss, seconds) of the steps since the last line
    start = time.perf_counter()
    while at["step"] < cfg.steps:
        flat_grad.zero_()
        total = torch.zeros(2, device=device)  # loss; ranks that were told to stop
        for i, (x0, noise) in enumerate(batch):
            if cfg.dropout:
                torch.manual_seed(derive_seed(cfg.seed, at["step"], rank * len(batch) + i))
            loss = loss_of(x0, noise) / len(batch)
            loss.backward()
            total[0] += loss.detach() / world
        total[1] = len(stop)
        at["rows"] += n_rows
        if at["step"] + 1 < cfg.steps:
            batch = next_batch(at["step"] + 1, at["rows"])  # while the GPU works
        if world > 1:
            dist.all_reduce(flat_grad)
            dist.all_reduce(total)
        flat_grad /= world
        norm = float(flat_grad.norm())
        loss, stopping = total.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            if cfg.grad_clip and norm > cfg.grad_clip:
                flat_grad *= cfg.grad_clip / norm
            set_rates(optimizers, at["step"], cfg)
            for optimizer in optimizers:
                optimizer.step()
            if cfg.ema and at["step"] >= cfg.ema_start * cfg.steps:
                shadow = shadow or [p.detach().clone() for p in params]
                update_ema(shadow, params, at["ema_updates"], cfg)
                at["ema_updates"] += 1
            at["bad"] = 0
        else:
            at["bad"], at["skipped"] = at["bad"] + 1, at["skipped"] + 1
            names = [n for n, p in model.named_parameters() if not p.grad.isfinite().all()]
            say(f"step:{at['step'] + 1}/{cfg.steps} skipped: loss {loss}, gradient norm {norm}, "
                f"first non-finite gradient: {(names or ['none'])[0]}")
            if at["bad"] >= cfg.max_bad_steps:
                fail(f"{at['bad']} non-finite steps in a row: stopped at step {at['step'] + 1}; "
                     f"{cfg.out} keeps its last checkpoint; try a lower --lr, look at the data")
        at["step"] += 1
        step = at["step"]
        recent.append((loss, time.perf_counter() - start))
        at["seconds"] += recent[-1][1]
        if step % cfg.log_every == 0 or step == cfg.steps:
            mean, rate = np.mean(recent, 0).tolist()
            rate, recent = cfg.batch_tokens / rate, []
            lr = optimizers[0].param_groups[0]["lr"]
            say(f"step:{step}/{cfg.steps} loss:{mean:.4f} lr:{lr:.2e} tok/s:{rate:.0f} mfu:"
                + (f"{rate * flops / peak:.3f}" if peak else "n/a")
                + f" eta:{clock((cfg.steps - step) * cfg.batch_tokens / rate)}"
                + (f" skipped:{at['skipped']}" if at["skipped"] else ""),
                {"step": step, "loss": mean, "grad_norm": norm, "lr": lr})
        due = step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0)
        at["evaluated"] = not (due and stopping)
        if due and not stopping:
            run_evaluation()
        if stopping or step == cfg.steps or (cfg.ckpt_every and step % cfg.ckpt_every == 0):
            problem = save()
            if problem and step == cfg.steps:
                fail(f"--out={cfg.out}: {problem}")
        if stopping:
            break
        start = time.perf_counter()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if at["step"] < cfg.steps:
        launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
        say(f"stopped after step {at['step']}; continue with: {launcher} {SCRIPT}.py --resume=1 "
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
