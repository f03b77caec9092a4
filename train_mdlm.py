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

import base64
import dataclasses
import difflib
import functools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

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
    mlp: str = "relu2"  # relu2 or swiglu
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
    optimizer: str = "muon"  # of the hidden matrices: muon or adamw; AdamW takes the rest
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
    lr_schedule: str = "linear"  # linear (constant, then cooldown) or cosine
    lr_end: float = 0.0  # final learning rate / peak
    grad_clip: float = 0.0  # global gradient norm; 0: off
    ema: float = 0.0  # decay of the averaged weights; 0: off
    ema_start: float = 0.0  # fraction of the steps after which the average starts
    max_bad_steps: int = 10  # consecutive non-finite steps after which the run stops
    # evaluation, checkpoints, log
    eval_every: int = 250  # steps; 0: only at the end
    val_tokens: int = 10_485_760  # at most, in file order
    val_draws: int = 1  # noise draws a window
    split: str = "val"  # what evaluation reads: val or test
    eval_only: bool = False  # evaluate --init_from and leave
    ckpt_every: int = 1000  # steps; 0: only at the end
    log_every: int = 10  # steps
    init_from: str = ""  # checkpoint whose weights to start from
    resume: bool = False  # continue the run in --out
    # machine
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the matrix products: auto, bf16, fp16 or fp32
    compile: bool = True  # torch.compile
    backend: str = "auto"  # process group: auto, nccl or gloo
    # >>> objective
    schedule: str = "linear"  # masked fraction at t, for bernoulli: see MASKED_FRACTION
    estimator: str = "exact_k"  # exact_k (antithetic pairs) or bernoulli
    masking: str = "uniform"  # which tokens: uniform, or entropy (needs token_entropy)
    token_entropy: str = ""  # .npy file, one entropy (any unit) for every token id
    loss_weight: str = "uniform"  # in training only: elbo, uniform, masked_mean or clipped
    weight_clip: float = 100.0  # largest weight of a masked token under clipped
    # <<< objective


# What must agree between a checkpoint and the model that takes its weights.
SHAPE_FIELDS = (
    "vocab_size n_layer n_head n_kv_head n_embd mlp mlp_ratio cond_dim tied unet softcap".split()
)
# What may change when a run goes on; everything else would make it another run.
RESUME_FIELDS = (
    "data out steps eval_every val_tokens val_draws ckpt_every log_every micro_batch device dtype "
    "compile backend max_bad_steps resume split checkpoint_layers".split()
)
CHOICES = {
    "mlp": ("relu2", "swiglu"),
    "optimizer": ("muon", "adamw"),
    "lr_schedule": ("linear", "cosine"),
    "split": ("val", "test"),
    "dtype": ("auto", "bf16", "fp16", "fp32"),
    "backend": ("auto", "nccl", "gloo"),
}


def fail(message):
    """A user's mistake: one line, exit status 2. Before ranks part, only the first one speaks."""
    if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
        print(f"{SCRIPT}.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def usage():
    """Text of --help: the docstring, then every flag with the comment beside it in Config."""
    lines = [__doc__, "Flags (--name=value):"]
    with open(__file__, encoding="utf-8") as f:
        body = f.read().split("class Config:")[1].split("\n\n\n")[0]
    seen = {}
    for name, default, comment in re.findall(r"^    (\w+): \w+ = (.+?)  # (.+)$", body, re.M):
        if name in seen:
            comment = seen[name][1]
        seen[name] = (default, comment)
    lines += [f"  --{name}={default}  {comment}" for name, (default, comment) in seen.items()]
    lines.append("Presets: " + ", ".join(PRESETS))
    return "\n".join(lines)


def parse_value(field, text):
    """One flag's text as the type of its field."""
    if field.type is bool:
        if text.lower() in ("1", "true"):
            return True
        if text.lower() in ("0", "false"):
            return False
        fail(f"--{field.name}={text}: 0 or 1 expected")
    try:
        value = field.type(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[field.type]
        fail(f"--{field.name}={text}: {kind} expected")
    if field.type is float and not math.isfinite(value):
        fail(f"--{field.name}={text}: a finite number expected")
    return value


def parse_flags(argv):
    """['--name=value', ..] -> {name: value}, typed; mistakes are refused with the near miss."""
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
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            fail(f"unknown flag {arg}: {hint}")
        if not equals:
            fail(f"--{name} needs a value: --{name}=VALUE")
        if name in flags:
            fail(f"--{name} is given twice")
        flags[name] = parse_value(fields[name], text)
    return flags


def parse_args(argv):
    """Flags -> Config. Presets come below flags; a checkpoint that is resumed or started from
    supplies what the flags leave open, and may not be contradicted in what fixes its shape."""
    flags = parse_flags(argv)
    preset = flags.get("preset", "")
    if preset and preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        fail(f"--preset={preset}: " + (f"did you mean {near[0]}? " if near else "")
             + "there are " + ", ".join(PRESETS))
    base = dict(PRESETS[preset], preset=preset) if preset else {}
    base.setdefault("out", os.path.join("out", SCRIPT + (f"-{preset}" if preset else "")))
    out = flags.get("out") or base["out"]
    if flags.get("eval_only") and not flags.get("init_from"):
        fail("--eval_only=1 needs a checkpoint: --init_from=PATH")
    if flags.get("resume"):
        if flags.get("init_from"):
            fail("--resume=1 and --init_from exclude each other")
        path = os.path.join(out, "ckpt.pt")
        if not os.path.exists(path):
            fail(f"--resume=1: there is no {path}: name the run with --out")
        saved = load_checkpoint(path)["config"]
        for name, value in flags.items():
            if name not in RESUME_FIELDS and name != "preset" and value != saved.get(name, value):
                fail(f"--{name}={value}: the run in {out} has {saved[name]}, which stays")
        base = saved
    elif flags.get("init_from"):
        saved = load_checkpoint(flags["init_from"])["config"]
        if flags.get("eval_only"):
            base = dict(saved, init_from=flags["init_from"], split="val")
        else:
            base.update({name: saved[name] for name in SHAPE_FIELDS if name in saved})
        for name in SHAPE_FIELDS:
            if name in flags and name in saved and flags[name] != saved[name]:
                fail(f"--{name}={flags[name]}: {flags['init_from']} has {saved[name]}")
    names = {f.name for f in dataclasses.fields(Config)}
    return Config(**{k: v for k, v in base.items() if k in names} | flags | {"out": out})


def validate(cfg, world):
    """Refuse what cannot work, before anything is opened or written."""
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            fail(f"--{name}={getattr(cfg, name)}: one of {', '.join(choices)}")
    for name in "seq_len n_layer n_head n_embd steps batch_tokens micro_batch val_tokens val_draws \
                 max_bad_steps log_every mlp_ratio".split():
        if getattr(cfg, name) <= 0:
            fail(f"--{name}={getattr(cfg, name)}: must be positive")
    for name in "vocab_size n_kv_head cond_dim softcap eval_every ckpt_every warmup grad_clip lr \
                 embed_lr head_lr scalar_lr cond_lr weight_decay adam_weight_decay \
                 momentum_warmup seed".split():
        if getattr(cfg, name) < 0:
            fail(f"--{name}={getattr(cfg, name)}: must not be negative")
    for name in "dropout ema ema_start momentum muon_beta2 adam_beta1 adam_beta2".split():
        if not 0 <= getattr(cfg, name) < 1:
            fail(f"--{name}={getattr(cfg, name)}: must lie in [0, 1)")
    for name in "cooldown lr_end".split():
        if not 0 <= getattr(cfg, name) <= 1:
            fail(f"--{name}={getattr(cfg, name)}: must lie in [0, 1]")
    if cfg.n_embd % cfg.n_head or cfg.n_embd // cfg.n_head % 2:
        fail(f"--n_head={cfg.n_head}: {cfg.n_embd} wide does not divide into heads of even width")
    if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
        fail(f"--n_kv_head={cfg.n_kv_head}: must divide --n_head={cfg.n_head}")
    if cfg.batch_tokens % cfg.seq_len:
        fail(f"--batch_tokens={cfg.batch_tokens}: not a multiple of --seq_len={cfg.seq_len}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    if n_rows % world:
        fail(f"--batch_tokens={cfg.batch_tokens}: its {n_rows} rows do not divide by {world} ranks")
    if n_rows // world % min(cfg.micro_batch, n_rows // world):
        fail(f"--micro_batch={cfg.micro_batch}: {n_rows // world} rows a rank are no multiple")
    check_objective(cfg, n_rows, min(cfg.micro_batch, n_rows // world))


# ----------------------------------------------------------------------------- data
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_VOCAB = 50257


def open_shard(path):
    """A shard of llm.c's format as a memory map of tokens, (n,) uint8 or uint16."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
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
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        name, vocab_size, bos_id = str(meta["tokenizer"]), meta["vocab_size"], meta["bos_id"]
        lengths, pattern, table = meta["byte_length"], meta.get("pattern"), meta.get("token_bytes")
        token_bytes = [bytes([i]) for i in range(256)] if table is None else [b""] * vocab_size
        if table is not None:
            with open(os.path.join(folder, os.path.basename(table)), "rb") as f:
                for line in f:
                    token, rank = line.split()
                    token_bytes[int(rank)] = base64.b64decode(token)
        token_bytes[bos_id] = b""
        if [len(b) for b in token_bytes] != lengths or len(lengths) != vocab_size:
            fail(f"{path}: byte_length does not fit the vocabulary; prepare the data again")
    except FileNotFoundError as e:
        if e.filename != path:
            fail(f"{e.filename}: named by meta.json and missing; prepare the data again")
        name, pattern = ("byte", None) if dtype == np.uint8 else ("gpt2", None)
        vocab_size, bos_id = (256, 0) if dtype == np.uint8 else (GPT2_VOCAB, GPT2_VOCAB - 1)
        token_bytes = [bytes([i]) for i in range(256)] if dtype == np.uint8 else gpt2_bytes()
        if dtype != np.uint8 and token_bytes:
            pattern = gpt2_encoding()._pat_str
        token_bytes = token_bytes or [b""] * vocab_size
        token_bytes[bos_id] = b""
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        fail(f"{path}: not readable as the description of a data set ({type(e).__name__}: {e})")
    return {
        "name": name, "vocab_size": vocab_size, "bos_id": bos_id, "pattern": pattern,
        "token_bytes": torch.tensor(list(b"".join(token_bytes)), dtype=torch.uint8),
        "token_length": torch.tensor([len(b) for b in token_bytes]),
    }


def gpt2_encoding():
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def gpt2_bytes():
    """Bytes of GPT-2's ids; [] where its vocabulary cannot be had: then bits per byte are not."""
    try:
        encoding = gpt2_encoding()
    except Exception as e:  # tiktoken downloads: no network, a proxy, a full disk, not installed
        print(f"{SCRIPT}.py: no GPT-2 vocabulary ({type(e).__name__}), so no bits per byte; it "
              "comes over the network, or from the folder in TIKTOKEN_CACHE_DIR", file=sys.stderr)
        return []
    return [encoding.decode_single_token_bytes(i) for i in range(GPT2_VOCAB - 1)] + [b""]


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
    weights = ("elbo", "uniform", "masked_mean", "clipped")
    for name, choices in (("schedule", tuple(MASKED_FRACTION)), ("loss_weight", weights),
                          ("estimator", ("exact_k", "bernoulli")),
                          ("masking", ("uniform", "entropy"))):
        if getattr(cfg, name) not in choices:
            fail(f"--{name}={getattr(cfg, name)}: one of {', '.join(choices)}")
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
    """Number of masked tokens, rounded up to one of ROW_SIZES sizes, so that shapes rarely change."""
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
    """Figures of the literature that are no bounds: the mean over all masked tokens of a batch
    gives heavily masked rows more weight. nats (N,) from nelbo_fn, with its noise."""
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
    part = name.split(".")
    return part[0] == "layers" and part[-2] in MUON_MATRICES


def make_optimizers(model, cfg):
    """[hidden matrices by Muon or AdamW, everything else by AdamW]."""
    hidden, groups = [], {"embed": [], "head": [], "scalar": [], "cond": []}
    for name, p in model.named_parameters():
        if is_hidden(name):
            hidden.append(p)
        elif name == "embed.weight":
            groups["embed"].append(p)
        elif name == "head.weight":
            groups["head"].append(p)
        elif p.ndim < 2:
            groups["scalar"].append(p)
        else:
            groups["cond"].append(p)
    owned = [id(p) for ps in (hidden, *groups.values()) for p in ps]
    assert len(set(owned)) == len(owned) == len(list(model.parameters()))

    adam = dict(betas=(cfg.adam_beta1, cfg.adam_beta2), eps=1e-10,
                fused=hidden[0].device.type in ("cpu", "cuda"))
    rates = {"embed": cfg.embed_lr, "head": cfg.head_lr, "scalar": cfg.scalar_lr,
             "cond": cfg.cond_lr}
    rest = [dict(params=ps, lr=rates[name], weight_decay=cfg.adam_weight_decay)
            for name, ps in groups.items() if ps]
    if cfg.optimizer == "adamw":
        rest.append(dict(params=hidden, lr=cfg.lr, weight_decay=cfg.weight_decay))
        optimizers = [torch.optim.AdamW(rest, **adam)]
    else:
        muon = Muon(hidden, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay,
                    beta2=cfg.muon_beta2 or None, cautious=cfg.cautious)
        optimizers = [muon, torch.optim.AdamW(rest, **adam)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
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
    factor = lr_factor(step, cfg)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            if isinstance(optimizer, Muon):
                cold = max(0.0, 1 - step / cfg.momentum_warmup) if cfg.momentum_warmup else 0.0
                group["momentum"] = cfg.momentum - cold * max(0, cfg.momentum - MOMENTUM_START)


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
    torch._foreach_lerp_(shadow, params, 1 - decay)


@contextmanager
def averaged(params, shadow):
    """Inside, the parameters hold the average; both are put back as they were."""
    if not shadow:
        yield
        return
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, shadow)
        try:
            yield
        finally:
            torch._foreach_copy_(params, kept)


# ----------------------------------------------------------------------------- evaluation
EVAL_SEED = 20240520  # of masks and times, the same for every run, so that runs compare in pairs


def derive_seed(*path):
    """A seed for one purpose out of numbers that name it."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


@torch.no_grad()
def evaluate(nelbo, cfg, windows, tokenizer, device, rank, world):
    """Bound over the first val_tokens of a split; the same digits on any number of ranks.

    nelbo(x0, noise) -> (B,) nats. Batches are fixed sets of windows with noise of their own, dealt
    to the ranks in turn; sums are in float64. -> {metric: nats per token, se: its standard error
    over pairs of neighbouring windows (antithetic in their noise), bpb, ppl, tokens, bytes, ..},
    and the nats of every window (N, draws).
    """
    n_windows = min(len(windows), max(2, cfg.val_tokens // cfg.seq_len)) // 2 * 2
    if not n_windows:
        fail(f"--data={cfg.data}: the {cfg.split} split is shorter than two windows of "
             f"{cfg.seq_len} tokens")
    B = min(cfg.micro_batch + cfg.micro_batch % 2, n_windows)
    vocab_size, draws = cfg.vocab_size, cfg.val_draws
    nats = torch.zeros(n_windows, draws, dtype=torch.float64)
    n_bytes = torch.zeros(1, dtype=torch.float64)
    noises = [[] for _ in range(draws)]
    for batch, first in enumerate(range(0, n_windows, B)):
        n = min(B, n_windows - first)
        for d in range(draws):
            gen = torch.Generator().manual_seed(derive_seed(EVAL_SEED, batch, d))
            noise = draw_noise(cfg, n, gen, bound=True)
            noises[d].append([x if x.ndim == 1 else x[:, :0] for x in noise])  # levels, not masks
            if batch % world == rank:
                if d == 0:
                    x0 = windows.read(range(first, first + n), vocab_size)
                    n_bytes += tokenizer["token_length"][x0].sum()
                    x0 = x0.to(device)
                nats[first:first + n, d] = nelbo(x0, to_device(noise, device)).double().cpu()
    if world > 1:
        both = torch.cat((nats.flatten(), n_bytes)).to(device)
        dist.all_reduce(both)
        nats, n_bytes = both[:-1].view_as(nats).cpu(), both[-1:].cpu()
    n_tokens = n_windows * cfg.seq_len
    pairs = nats.mean(1).view(-1, 2).mean(1) / cfg.seq_len
    mean = float(nats.mean()) / cfg.seq_len
    result = {
        METRIC: mean,
        "se": float(pairs.std() / len(pairs) ** 0.5) if len(pairs) > 1 else math.nan,
        "bpb": mean * n_tokens / math.log(2) / float(n_bytes) if n_bytes else math.nan,
        "ppl": math.exp(min(mean, 700)),
        "tokens": n_tokens, "bytes": int(n_bytes), "draws": draws, "seed": EVAL_SEED,
    }
    joined = [type(noise)(*map(torch.cat, zip(*parts, strict=True))) for parts in noises]
    for d, parts in enumerate(joined):
        for name, value in other_figures(nats[:, d], parts).items():
            result[name] = result.get(name, 0.0) + value / draws
    return result, nats


def describe(result):
    """The figures of one evaluation as they are printed."""
    known = {METRIC, "se", "bpb", "ppl", "tokens", "bytes", "draws", "seed"}
    bpb = "n/a" if math.isnan(result["bpb"]) else f"{result['bpb']:.4f}"
    line = f"{METRIC}:{result[METRIC]:.4f}+-{result['se']:.4f} bpb:{bpb} ppl:{result['ppl']:.2f}"
    return line + "".join(f" {k}:{v:.4f}" for k, v in result.items() if k not in known)


# ----------------------------------------------------------------------------- checkpoints
CKPT_FORMAT = 1
CKPT_TYPES = {"format": int, "script": str, "config": dict, "model": dict, "optimizers": list,
              "tokenizer": dict, "step": int, "position": int, "tokens_seen": int}


def save_checkpoint(path, state):
    """Write beside, then swap in, keeping the one before: some checkpoint always loads."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            previous = path.removesuffix(".pt") + "_prev.pt"
            link = f"{previous}.partial"
            try:
                os.link(path, link)  # path itself stays until it is replaced
            except OSError:
                shutil.copyfile(path, link)
            os.replace(link, previous)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch.save wraps what the disk says
        if os.path.exists(partial):
            os.remove(partial)
        return str(e).splitlines()[0]
    return ""


def load_checkpoint(path):
    """Read and check a checkpoint; tensors and plain values only, never code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as e:  # the unpickler meets arbitrary bytes
        what = "holds objects other than tensors and plain values, which are not loaded" \
            if "weights_only" in str(e) or "Unsupported" in str(e) else "cut short or damaged"
        fail(f"{path}: no checkpoint of ours: {what} ({type(e).__name__})")
    if not isinstance(state, dict) or any(
            not isinstance(state.get(k), t) for k, t in CKPT_TYPES.items()):
        fail(f"{path}: no checkpoint of ours: its entries are missing or of other types")
    if state["format"] != CKPT_FORMAT:
        fail(f"{path}: format {state['format']}, this script reads {CKPT_FORMAT}")
    return state


def load_weights(model, weights, path):
    """Copy a checkpoint's weights, all of them and in their shapes, or refuse."""
    own = dict(model.named_parameters())
    for name in sorted(own.keys() | weights.keys()):
        got, want = weights.get(name), own.get(name)
        if not isinstance(got, Tensor) or want is None or got.shape != want.shape:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else "none" for x in (got, want)]
            fail(f"{path}: {name} is {shapes[0]} there and {shapes[1]} here: another shape; "
                 "give the flags it was trained with")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


def build_model(ckpt, weights="ema", device="cpu", path="checkpoint"):
    """A checkpoint (load_checkpoint) -> model in eval mode and its Config; weights ema or raw."""
    names = {f.name: f.type for f in dataclasses.fields(Config)}
    for name, value in ckpt["config"].items():
        if name not in names or type(value) is not names[name]:
            fail(f"{path}: its config has {name}={value!r}, which this script does not know")
    cfg = Config(**ckpt["config"])
    model = Model(cfg)
    load_weights(model, ckpt.get("ema") if weights == "ema" and ckpt.get("ema") else ckpt["model"],
                 path)
    return model.to(device).eval(), cfg


# ----------------------------------------------------------------------------- runtime
# Dense bf16 peak by part of the device's name, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 5090": 209e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}
RECOMPILE_LIMIT = 32  # shapes: training, evaluation, and the row sizes of a Bernoulli estimator
FP16_SCALE = 2.0**15  # initial loss scale; halved at an overflow, doubled after
FP16_GROWTH = 1000  # good steps
COLLECTIVE_TIMEOUT = 100  # seconds after which a rank that waits for a lost one gives up


def pick_device(cfg, local_rank):
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    if name not in ("cpu", "cuda", "mps"):
        fail(f"--device={name}: auto, cpu, cuda or mps; torchrun gives each rank its GPU")
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda: PyTorch sees no CUDA device here; --device=auto takes what there is")
    if name == "mps" and not torch.backends.mps.is_available():
        fail("--device=mps: PyTorch sees no Apple GPU here; --device=auto takes what there is")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            fail(f"rank {local_rank} has no GPU: torchrun --nproc_per_node is at most "
                 f"{torch.cuda.device_count()} here")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)


def pick_dtype(cfg, device):
    """dtype of the matrix products -> (dtype, notice). bf16 where the hardware multiplies it."""
    if device.type == "cuda":
        best = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    elif device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, p, bool)() for p in probes)
        best = torch.bfloat16 if fast else torch.float32
    else:
        best = torch.float32
    wanted = {"auto": best, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = wanted[cfg.dtype]
    if dtype == torch.float16 and device.type != "cuda":
        return torch.float32, f"no fp16 training on {device.type}: using fp32"
    if dtype == torch.bfloat16 and device.type == "cuda" and best != dtype:
        return best, "this GPU has no bf16: using fp16 with a loss scale"
    return dtype, ""


def peak_flops(device):
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def no_compiler(device):
    """Why torch.compile cannot work here, or ''."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
        return ""
    if device.type == "cpu":
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as e:  # its type differs between versions
            return f"no working C++ compiler ({str(e).splitlines()[0]})"
        return ""
    return f"not used on {device.type}"


def to_device(noise, device):
    if device.type == "cuda":
        return type(noise)(*(x.pin_memory().to(device, non_blocking=True) for x in noise))
    return type(noise)(*(x.to(device) for x in noise))


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def trim_logs(folder, step):
    """Drop what was logged after the step that a run resumes from."""
    for name, pattern in (("log.txt", r"step:(\d+)"), ("log.jsonl", r'\{"step": (\d+)')):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
        kept = [x for x in lines if not (m := re.match(pattern, x)) or int(m[1]) <= step]
        with open(path + ".partial", "w", encoding="utf-8") as f:
            f.writelines(kept)
        os.replace(path + ".partial", path)


def log_head(cfg, device, world):
    """What a log starts with: everything needed to run it again."""
    parts = []
    for path in (os.path.abspath(__file__), os.path.abspath(sys.modules["muon"].__file__)):
        with open(path, encoding="utf-8") as f:
            parts.append(f.read())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    parts.append(f"python {platform.python_version()} torch {torch.__version__} "
                 f"numpy {np.__version__} device {device.type} {name} ranks {world} "
                 f"threads {torch.get_num_threads()}\n" + json.dumps(dataclasses.asdict(cfg)))
    return ("\n" + "=" * 100 + "\n").join(parts) + "\n" + "=" * 100 + "\n"


def main(argv):
    cfg = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(cfg, world)
    folder = data_folder(cfg.data)
    val = Windows(folder, cfg.split, cfg.seq_len)
    train = val if cfg.eval_only else Windows(folder, "train", cfg.seq_len)
    tokenizer = load_tokenizer(folder, val.dtype)
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or tokenizer["vocab_size"])
    if cfg.vocab_size < tokenizer["vocab_size"]:
        fail(f"--vocab_size={cfg.vocab_size}: the data in {folder} has {tokenizer['vocab_size']}")
    if train.dtype != val.dtype:
        fail(f"{folder}: train shards hold {train.dtype}, {cfg.split} shards {val.dtype}")
    n_rows = cfg.batch_tokens // cfg.seq_len
    if len(train) < n_rows and not cfg.eval_only:
        fail(f"--data={cfg.data}: {len(train)} windows of {cfg.seq_len} tokens are fewer than the "
             f"{n_rows} of a batch; lower --batch_tokens")
    path = os.path.join(cfg.out, "ckpt.pt")
    if os.path.exists(path) and not cfg.resume and not cfg.eval_only:
        fail(f"{cfg.out} holds a run already: --resume=1 continues it, --out=FOLDER starts another")
    device = pick_device(cfg, int(os.environ.get("LOCAL_RANK", 0)))
    dtype, notice = pick_dtype(cfg, device)
    master = rank == 0

    ckpt = None
    if cfg.resume or cfg.init_from:
        source = path if cfg.resume else cfg.init_from
        ckpt = load_checkpoint(source)
        if ckpt["script"] != SCRIPT and (cfg.resume or ckpt["script"] not in INIT_FROM):
            fail(f"{source}: a checkpoint of {ckpt['script']}.py")
    torch.manual_seed(derive_seed(cfg.seed))
    model = Model(cfg)
    if ckpt is not None:
        average = cfg.init_from and ckpt.get("ema")
        load_weights(model, ckpt["ema"] if average else ckpt["model"], source)
    model.to(device)
    params = list(model.parameters())

    if world > 1:
        backend = cfg.backend if cfg.backend != "auto" else \
            "nccl" if device.type == "cuda" else "gloo"
        import datetime

        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")

    def say(line, record=None):
        if not master:
            return
        print(line, flush=True)
        if logs:
            for name, text in (("log.txt", line), ("log.jsonl", record and json.dumps(record))):
                if text:
                    with open(os.path.join(cfg.out, name), "a", encoding="utf-8") as f:
                        f.write(text + "\n")

    logs = not cfg.eval_only
    if master and logs:
        try:
            os.makedirs(cfg.out, exist_ok=True)
            if cfg.resume:
                trim_logs(cfg.out, ckpt["step"])
            else:
                with open(os.path.join(cfg.out, "log.txt"), "w", encoding="utf-8") as f:
                    f.write(log_head(cfg, device, world))
                open(os.path.join(cfg.out, "log.jsonl"), "w").close()
        except OSError as e:
            fail(f"--out={cfg.out}: {e.strerror}")
    if notice:
        say(notice)

    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def loss_of(x0, noise):
        with autocast:
            return loss_fn(model, x0, noise, cfg)

    def nelbo_of(x0, noise):
        with autocast:
            return nelbo_fn(model, x0, noise, cfg)

    if cfg.compile:
        reason = no_compiler(device)
        if reason:
            say(f"running without torch.compile: {reason}")
        else:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
            if device.type == "cpu":  # one small graph for all layers: seconds, not a minute
                for layer in model.layers:
                    layer.compile(dynamic=False)
            else:
                loss_of, nelbo_of = (torch.compile(f, dynamic=False) for f in (loss_of, nelbo_of))

    def run_evaluation(shadow=None):
        model.eval()
        with averaged(params, shadow):
            result, nats = evaluate(nelbo_of, cfg, val, tokenizer, device, rank, world)
        model.train()
        return result, nats

    flops = flops_per_token(cfg, model)
    n_params = sum(p.numel() for p in params)
    name = str(dtype).removeprefix("torch.")
    say(f"{n_params / 1e6:.2f}M parameters, {flops / 1e6:.1f} MFLOP per token, {world} x "
        f"{device.type} {name}, {folder}: {len(train) * cfg.seq_len:,} tokens")
    if cfg.eval_only:
        result, _ = run_evaluation()
        say(f"split:{cfg.split} {describe(result)}")
        say(" ".join(f"{k}:{result[k]}" for k in ("tokens", "bytes", "draws", "seed")))
        if world > 1:
            dist.destroy_process_group()
        return

    # From here on: training.
    flat_grad = flatten_grads(params)
    optimizers = make_optimizers(model, cfg)
    shadow, ema_updates = [], 0
    step, position, bad_steps, skipped = 0, 0, 0, 0
    train_seconds, scale, good_steps = 0.0, FP16_SCALE if dtype == torch.float16 else 1.0, 0
    evaluated = True
    if cfg.resume:
        try:
            for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            step, position, skipped = ckpt["step"], ckpt["position"], ckpt["skipped"]
            train_seconds, evaluated = ckpt["train_seconds"], ckpt["evaluated"]
            scale, good_steps, ema_updates = ckpt["scale"], ckpt["good_steps"], ckpt["ema_updates"]
            if ckpt["ema"]:
                shadow = [ckpt["ema"][n].to(device) for n, _ in model.named_parameters()]
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            fail(f"{path}: cannot be continued ({type(e).__name__}: {e})")
        say(f"resuming {cfg.out} after step {step}")
    ckpt = None

    per_rank = n_rows // world
    micro = min(cfg.micro_batch, per_rank)
    accumulate = per_rank // micro

    def next_batch(step, position):
        """Rows of this rank at a step: tokens and noise, cut into micro-batches."""
        gen = torch.Generator().manual_seed(derive_seed(cfg.seed, step))
        noise = draw_noise(cfg, n_rows, gen)
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        x0 = train.read(training_rows(train, position, n_rows, cfg)[mine], cfg.vocab_size)
        noise = to_device(type(noise)(*(x[mine] for x in noise)), device)
        x0 = x0.to(device)
        return [(x0[a:a + micro], type(noise)(*(x[a:a + micro] for x in noise)))
                for a in range(0, per_rank, micro)]

    def save(step):
        if not master:
            return
        named = {n: p.detach() for n, p in model.named_parameters()}
        problem = save_checkpoint(path, {
            "format": CKPT_FORMAT, "script": SCRIPT, "config": dataclasses.asdict(cfg),
            "tokenizer": tokenizer, "model": named,
            "ema": dict(zip(named, shadow, strict=True)) if shadow else None,
            "optimizers": [o.state_dict() for o in optimizers], "step": step,
            "position": position, "tokens_seen": step * cfg.batch_tokens, "skipped": skipped,
            "train_seconds": train_seconds, "evaluated": evaluated, "scale": scale,
            "good_steps": good_steps, "ema_updates": ema_updates})
        if problem:
            say(f"checkpoint of step {step} not written ({problem}): the one before it stays")
        return problem

    def run_eval_step(step):
        result, nats = run_evaluation(shadow)
        average = 1000 * train_seconds / max(step, 1)
        say(f"step:{step}/{cfg.steps} {describe(result)} train_time:{1000 * train_seconds:.0f}ms "
            f"step_avg:{average:.2f}ms", {"step": step, **result})
        if step == cfg.steps and master:
            np.save(os.path.join(cfg.out, f"{cfg.split}_nats.npy"), nats.numpy())

    stop = []  # signals received
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number))
                for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    peak = peak_flops(device)
    if not evaluated:
        run_eval_step(step)
    model.train()
    batch = next_batch(step, position) if step < cfg.steps else []
    window_loss, window_steps, window_seconds = 0.0, 0, 0.0
    start = time.perf_counter()
    while step < cfg.steps:
        flat_grad.zero_()
        total = torch.zeros(2, device=device)  # loss, and whether some rank was told to stop
        for i, (x0, noise) in enumerate(batch):
            if cfg.dropout:
                torch.manual_seed(derive_seed(cfg.seed, step, rank * accumulate + i))
            loss = loss_of(x0, noise) / accumulate
            (loss * scale).backward()
            total[0] += loss.detach()
        total[1] = len(stop)
        position += n_rows
        if step + 1 < cfg.steps:
            batch = next_batch(step + 1, position)  # while the GPU works
        if world > 1:
            dist.all_reduce(flat_grad)
            dist.all_reduce(total)
            total[0] /= world
        flat_grad /= world * scale
        norm = flat_grad.norm()
        loss, stopping = total.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            if cfg.grad_clip:
                flat_grad *= (cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            set_rates(optimizers, step, cfg)
            for optimizer in optimizers:
                optimizer.step()
            if cfg.ema and step >= cfg.ema_start * cfg.steps:
                if not shadow:
                    shadow = [p.detach().clone() for p in params]
                update_ema(shadow, params, ema_updates, cfg)
                ema_updates += 1
            bad_steps, good_steps = 0, good_steps + 1
            if scale > 1 and good_steps % FP16_GROWTH == 0:
                scale *= 2
        elif scale > 1:
            scale, good_steps = scale / 2, 0
        else:
            bad_steps, skipped = bad_steps + 1, skipped + 1
            bad = next((n for n, p in model.named_parameters() if not p.grad.isfinite().all()), "")
            say(f"step:{step + 1} skipped: loss {loss}, gradient norm {float(norm)}"
                + (f", first in {bad}" if bad else ""))
            if bad_steps >= cfg.max_bad_steps:
                fail(f"{bad_steps} non-finite steps in a row: stopped after step {step - bad_steps}"
                     f"; the last good checkpoint stays in {cfg.out}; a lower --lr may help")
        step += 1
        now = time.perf_counter()
        train_seconds += now - start
        window_seconds, start = window_seconds + now - start, now
        if finite:
            window_loss, window_steps = window_loss + loss, window_steps + 1

        if step % cfg.log_every == 0 or step == cfg.steps:
            rate = cfg.log_every * cfg.batch_tokens / window_seconds
            mfu = f"{rate * flops / peak / world:.3f}" if peak else "n/a"
            mean = window_loss / max(window_steps, 1)
            lr = optimizers[0].param_groups[-1]["lr"]
            say(f"step:{step}/{cfg.steps} loss:{mean:.4f} lr:{lr:.2e} tok/s:{rate:.0f} mfu:{mfu} "
                f"eta:{clock((cfg.steps - step) * cfg.batch_tokens / rate)}"
                + (f" skipped:{skipped}" if skipped else ""),
                {"step": step, "loss": mean, "grad_norm": float(norm), "lr": lr})
            window_loss, window_steps, window_seconds = 0.0, 0, 0.0
        due = step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0)
        if due and not stopping:
            run_eval_step(step)
        evaluated = not (due and stopping)
        if stopping or step == cfg.steps or (cfg.ckpt_every and step % cfg.ckpt_every == 0):
            problem = save(step)
            if problem and step == cfg.steps:
                fail(f"{path}: {problem}")
        if stopping:
            break
        start = time.perf_counter()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    out = shlex.quote(cfg.out)
    if step < cfg.steps:
        say(f"stopped after step {step}; continue with: {launcher} {SCRIPT}.py --resume=1 "
            f"--out={out}")
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
