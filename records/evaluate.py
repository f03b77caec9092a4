"""The referee: judge a finished run, and add the verdict to its log.txt.

    python records/evaluate.py --ckpt=out/train_block/ckpt.pt [--script=FORK.py]

The network is the run's own (--script); noise, masks, bound and data are those of the repository,
so that a fork does not grade itself. One pass over the validation text gives two figures, in nats
per token, with standard errors over pairs of windows:

    bound      the exact one, nelbo_fn of the objective. train_block: k ~ U{1..L} of the L tokens of
               a block are masked, and their cross entropy weighs L / k
    published  train_block alone: the formula of the nano-block-diffusion baseline. t ~ U(0,1) for
               each block, its tokens masked with probability t, weight 1 / (t + eps), eps = 1e-3.
               Exactly k are masked with density C(L,k) t^k (1-t)^(L-k), so the draws of the exact
               bound have its expectation, too, when they weigh L w_k:

                   w_k = C(L,k) int_0^1 t^k (1-t)^(L-k) / (t + eps) dt        (1 / k for eps = 0)

Refused: what the rules of the track refuse (README.md beside this file), a network that sees what
it is to predict, or other rows of its batch, and one that does not answer twice alike.

    --ckpt=PATH       checkpoint, or its run folder
    --script=FILE     the script that wrote it, when that is an edited one
    --objective=NAME  the script that a fork was made from, where its name does not say: gpt,
                      train_block (on the speedrun always) or train_mdlm
    --data=FOLDER     shards, or a name under data/; it also names the track (default: as trained)
    --tokens=N        fewer validation tokens, for a quick look; the log is left alone
    --append=0        the log is left alone
    --device=NAME     auto (default), cpu, cuda or mps
"""

import dataclasses
import difflib
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
from check import EVAL_SEED, TRACKS, draws_of, read_log, source_sha256

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402

EPS = 1e-3  # in the published weight
NODES = 64  # of the quadrature over t
LEAK_WINDOWS = 64  # as many as a window of the speedrun has blocks
LEAK_ROWS = 2  # windows a pass: their logits are all kept
LEAK_TOLERANCE = 1e-3  # nats, in the log-probability of any token
BOS_SHARE = 0.05  # of the tokens put in to look for a leak
SECOND_LOOK = 1e-3  # nats per token
DEFAULTS = dict(ckpt="", script="", objective="", data="", tokens=0, append=True, device="auto")


def fail(message):
    print(f"evaluate.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def require(condition, message):
    if not condition:
        fail(message)


def parse_args(argv):
    """['--name=value', ..] -> {name: value} over the defaults."""
    flags = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            print(__doc__)
            raise SystemExit(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        near = (difflib.get_close_matches(name, DEFAULTS, 1) or ["help"])[0]
        known = arg.startswith("--") and name in DEFAULTS
        require(known, f"unknown flag {arg}: did you mean --{near}?")
        require(equals and text, f"--{name} needs a value: --{name}=VALUE")
        require(name not in flags, f"--{name} is given twice")
        if name == "append":
            require(text in "01", f"{arg}: 0 or 1")
        if name == "tokens":
            require(text.isdecimal() and int(text) > 0, f"{arg}: a number of tokens")
        flags[name] = int(text) if name in ("append", "tokens") else text
    flags = DEFAULTS | flags
    require(flags["ckpt"], "--ckpt=PATH: which checkpoint? A run leaves it in out/<run>/ckpt.pt")
    return flags


# ----------------------------------------------------------------------------- figures
def published_weights(L):
    """(L + 1,) float64: w_k of the docstring, and 0 for k = 0.

    t = e^u - eps turns dt / (t + eps) into du, and leaves a polynomial in e^u: Gauss-Legendre."""
    node, weight = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(NODES))
    low, high = math.log(EPS), math.log1p(EPS)
    t = (low + (high - low) * (node + 1) / 2).exp() - EPS  # (NODES,)
    rows = [math.comb(L, k) * t**k * (1 - t) ** (L - k) for k in range(1, L + 1)]
    w = torch.stack(rows) @ weight * (high - low) / 2  # (L,)
    return torch.cat((w.new_zeros(1), w))


def both_figures(rules, model, x0, noise, cfg):
    """(exact, published), each (B,) nats per sequence, from one pass of a block denoiser."""
    logits = []  # kept for the second sum, over the same tokens with other weights

    def once(*inputs):
        logits[:] = logits or [model(*inputs)]
        return logits[0]

    exact = rules.nelbo_fn(once, x0, noise, cfg)
    weight = cfg.block_len * published_weights(cfg.block_len).to(noise.weight)
    noise = noise._replace(weight=weight[noise.level.long()])
    return exact, rules.nelbo_fn(once, x0, noise, cfg)


def mean_and_error(nats, seq_len):
    """(N,) nats of windows -> nats per token and its standard error over neighbouring pairs."""
    pairs = nats.view(-1, 2).mean(1) / seq_len
    return float(pairs.mean()), float(pairs.std() / len(pairs) ** 0.5)


# ----------------------------------------------------------------------------- leaks
def find_leak(rules, objective, model, x0, cfg, bos_id):
    """'' or which answer a network sees: logits that change with what they must not depend on.

    Every window of x0 (B, T) is cut at another block. From the cut on x0 is replaced by other
    tokens, bos_id among them, and xt from the next block on; the logits up to the end of the block
    at the cut have to stay. The two windows of a pass, cut at i and n - 1 - i, must not see each
    other either. A masked denoiser is shown xt alone: there one window is replaced altogether."""
    (B, T), L, V = x0.shape, getattr(cfg, "block_len", 1), cfg.vocab_size
    gen = torch.Generator().manual_seed(EVAL_SEED)
    other = (x0.cpu() + torch.randint(1, V, x0.shape, generator=gen)) % V
    other[torch.rand(x0.shape, generator=gen) < BOS_SHARE] = bos_id
    other, noise = other.to(x0.device), rules.draw_noise(cfg, B, gen, bound=True)
    at = torch.arange(T, device=x0.device)
    for first in range(0, B - B % LEAK_ROWS, LEAK_ROWS):
        rows = slice(first, first + LEAK_ROWS)
        piece = rules.take_rows(noise, rows, x0.device)
        a, b = x0[rows], other[rows]
        start = torch.tensor([[first // 2], [B - 1 - first // 2]], device=x0.device)  # of B cuts
        if objective in ("gpt", "train_block"):
            start = start * (T // L) // B * L  # (LEAK_ROWS, 1)
            end = start + L
        else:
            start = end = torch.tensor([[0], [T]], device=x0.device)
        changed = torch.where(at < start, a, b)
        xt = rules.corrupt(a, piece, cfg)
        if objective == "gpt":
            pair = (xt,), (rules.corrupt(changed, piece, cfg),)
        elif objective == "train_block":
            pair = (xt, a), (torch.where(at < end, xt, rules.corrupt(b, piece, cfg)), changed)
        else:
            pair = (xt, piece.sigma), (rules.corrupt(changed, piece, cfg), piece.sigma)
        kept = (at < end).flatten().nonzero()[:, 0]
        before, after = (model(*inputs, kept).log_softmax(-1) for inputs in pair)
        difference = (before - after).abs().max(-1).values  # (R,)
        if not difference.max() <= LEAK_TOLERANCE:
            row, place = divmod(int(kept[difference.argmax()]), T)
            return (f"the output at token {place} moves by {difference.max():.3g} nats with tokens"
                    f" that it must not see (row {row} of {LEAK_ROWS} in the batch)")
    return ""


# ----------------------------------------------------------------------------- the verdict
def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load(flags):
    """-> (rules: the repository's script, objective, track, model, its config, checkpoint, the
    script's text, folder of the data)."""
    path = sample.find_checkpoint(flags["ckpt"])
    ckpt = sample.load_script(ROOT / f"{sample.SCRIPTS[0]}.py").load_checkpoint(path)
    name, file = ckpt["script"], Path(flags["script"] or ROOT / f"{ckpt['script']}.py")
    require(flags["script"] or name in sample.SCRIPTS,
            f"--ckpt={path}: written by {name}.py: pass that file as --script=PATH")
    script = sample.load_script(file)
    require(file.stem == name, f"--script={file}: {path} was written by {name}.py")
    data = flags["data"] or str(ckpt["config"].get("data"))
    folder = Path(data) if Path(data).is_dir() else Path("data", data)
    require(folder.is_dir(), f"--data={data}: no such folder, nor {folder}")
    track = next((t for t in TRACKS.values() if t.data == Path(data).name), None)
    require(track, f"--data={data}: no track has this data; there are "
            + ", ".join(f"{t.data} ({n})" for n, t in TRACKS.items()))
    objective = flags["objective"] or (name if name in sample.SCRIPTS else track.objectives[0])
    settled = flags["objective"] or name in sample.SCRIPTS or len(track.objectives) == 1
    require(settled, f"--objective=NAME: which of {', '.join(sample.SCRIPTS)} is {file} made from?")
    require(objective in track.objectives and objective in sample.SCRIPTS,
            f"--objective={objective}: this track has "
            + ", ".join(x for x in track.objectives if x in sample.SCRIPTS))
    require(name == objective or name not in sample.SCRIPTS,
            f"--objective={objective}: {path} was written by {name}.py: drop the flag")
    rules = sample.load_script(ROOT / f"{objective}.py")
    for field, value in track.settings.items():
        if field not in ("val_tokens", "split"):  # the referee's own
            found = ckpt["config"].get(field)
            require(found == value, f"{path}: {field} is {found!r}, the track has {value!r}")
    model, cfg = script.build_model(ckpt, "ema", path=path)
    n = sum(x.numel() for x in model.state_dict().values())
    require(n <= track.max_parameters,
            f"{path}: {n:,} parameters, the track has {track.max_parameters:,} at the most")
    fields = {f.name for f in dataclasses.fields(rules.Config)}
    known = {k: v for k, v in ckpt["config"].items() if k in fields}
    cfg = rules.Config(**known | dict(
        val_draws=draws_of(track, objective), val_tokens=flags["tokens"] or track.val_tokens,
        split="val", device=flags["device"]))
    return rules, objective, track, model, cfg, ckpt, file.read_text(encoding="utf-8"), folder


def find_log(path, ckpt, source, may_change):
    """The log.txt that a verdict belongs into; may_change: settings that a resumed run may have
    changed."""
    try:
        log = read_log(path)
    except (OSError, ValueError) as e:
        fail(f"{path}: {e.strerror if isinstance(e, OSError) else e}; --append=0 only prints")
    require(not log.referee, f"{path}: judged before; --append=0 only prints")
    settings = log.config | {k: v for k, v in ckpt["config"].items() if k in may_change}
    require(settings == ckpt["config"], f"{path}: another run's settings than the checkpoint's; "
            "--append=0 only prints")
    require(log.source == source, f"{path}: holds another script: give the one that ran as "
            "--script=FILE, or --append=0 only prints")
    return path


def judge(rules, objective, model, cfg, windows, tokenizer, device):
    """-> {figure: text}, or refuses a network that leaks or does not answer twice alike."""
    n = cfg.val_tokens // cfg.seq_len
    some = windows.read(range(min(n, LEAK_WINDOWS)), cfg.vocab_size).to(device)
    leak = find_leak(rules, objective, model, some, cfg, tokenizer["bos_id"])
    require(not leak, f"refused: {leak}")
    published, first = [], []

    def look(x0, noise):
        if objective != "train_block":
            return rules.nelbo_fn(model, x0, noise, cfg), None
        return both_figures(rules, model, x0, noise, cfg)

    def bound(x0, noise):
        exact, other = look(x0, noise)
        first[:] = first or [x0, noise, exact]
        published.append(other)
        if sys.stderr.isatty():
            share = min(1, len(published) * len(first[0]) / (n * cfg.val_draws))
            print(f"\r{share:4.0%}", end="", file=sys.stderr, flush=True)
        return exact

    result, counts, nats = rules.evaluate(bound, cfg, windows, tokenizer, device, 0, 1)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    mean, error = mean_and_error(nats, cfg.seq_len)
    require(math.isfinite(mean), "refused: the bound is not finite")
    x0, noise, exact = first
    again = (look(x0, noise)[0] - exact).abs().max() / cfg.seq_len
    require(again <= SECOND_LOOK, f"refused: the first windows, evaluated again, give other nats "
            f"(by {again:.3g} a token): the network remembers or is random")
    figures = {"bound": f"{mean:.4f}+-{error:.4f}"}
    if objective == "train_block":
        other = torch.cat(published).cpu().double().view(cfg.val_draws, -1).mean(0)
        figures["published"] = "{:.4f}+-{:.4f}".format(*mean_and_error(other, cfg.seq_len))
    figures["bpb"] = "n/a" if result["bpb"] is None else f"{result['bpb']:.4f}"
    return figures | {k: str(v) for k, v in counts.items()}


@torch.no_grad()
def run(flags):
    rules, objective, track, model, cfg, ckpt, source, folder = load(flags)
    path = sample.find_checkpoint(flags["ckpt"])
    keep = flags["append"] and cfg.val_tokens == track.val_tokens
    may_change = {*rules.RESUME_FIELDS} - {"steps"}
    log = find_log(path.parent / "log.txt", ckpt, source, may_change) if keep else None
    windows = rules.Windows(str(folder), "val", cfg.seq_len)
    enough = len(windows) * cfg.seq_len >= cfg.val_tokens
    require(enough, f"--data={folder}: fewer than {cfg.val_tokens:,} validation tokens")
    require(cfg.val_tokens // cfg.seq_len >= 4, f"--tokens={cfg.val_tokens}: two pairs of windows "
            f"are {4 * cfg.seq_len} tokens")
    tokenizer = rules.load_tokenizer(str(folder), windows.dtype)
    require(not keep or tokenizer["token_length"].any(), f"--data={folder}: the bytes of its tokens"
            " are not known, and a record has bits per byte: pip install tiktoken")
    device = rules.pick_device(cfg, 0)
    dtype, _ = rules.pick_dtype(cfg, device)
    model.to(device)

    def net(*inputs):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(*inputs)

    figures = judge(rules, objective, net, cfg, windows, tokenizer, device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    what = dict(
        objective=objective, parameters=sum(x.numel() for x in model.state_dict().values()),
        step=ckpt["step"], weights="ema" if ckpt["ema"] else "raw", seq_len=cfg.seq_len,
        **({"block_len": cfg.block_len} if objective == "train_block" else {}), leak="none")
    where = dict(
        checkpoint_sha256=sha256_of(path), source_sha256=source_sha256(source),
        shard=Path(windows.paths[0]).name, shard_sha256=sha256_of(windows.paths[0]),
        dtype=str(dtype)[6:], device=hardware.replace(" ", "_"), torch=torch.__version__)
    lines = ["referee " + " ".join(f"{k}:{v}" for k, v in part.items())
             for part in (figures, what, where)]
    print("\n".join(lines))
    if log:
        with open(log, "a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
        print(f"added to {log}")
    elif flags["append"]:
        print(f"{cfg.val_tokens:,} of {track.val_tokens:,} tokens are no verdict: the log is left "
              "alone")


def main(argv):
    try:
        run(parse_args(argv))
    except sample.SampleError as error:
        fail(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
