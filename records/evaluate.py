"""The referee: judge a finished run, and add the verdict to its log.txt.

    python records/evaluate.py --ckpt=out/train_block [--script=FORK.py]

    --ckpt=PATH       checkpoint, or its run folder
    --script=FILE     the script that wrote it, if that is a fork
    --tokens=N        fewer validation tokens, for a quick look; no verdict
    --device=NAME     auto (default), cpu, cuda or mps

The network is the run's own; noise, masks, bound and data are those of the repository, so that a
fork does not grade itself. Figures, in nats per token, with standard errors over pairs of windows:

    bound      the exact one, nelbo_fn of the objective. train_block: k ~ U{1..L} of the L tokens of
               a block are masked, and their cross entropy weighs L / k
    published  train_block only: the formula of the nano-block-diffusion baseline. t ~ U(0,1) for
               each block, its tokens masked with probability t, weight 1 / (t + eps), eps = 1e-3.
               Exactly k are masked with density C(L,k) t^k (1-t)^(L-k), so the draws of the exact
               bound have the same expectation when they weigh L w_k:
                   w_k = C(L,k) int_0^1 t^k (1-t)^(L-k) / (t + eps) dt        (1 / k for eps = 0)
"""

import hashlib
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from check import TRACKS, Parser, check_run, objective_of, read_log, require

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402

EPS = 1e-3  # in the published weight
NODES = 64  # of the quadrature over t
LEAK_SEED = 20240520
LEAK_WINDOWS = 64  # as many as a window of the speedrun has blocks
LEAK_TOLERANCE = 1e-3  # nats, in the log-probability of any token
BOS_SHARE = 0.05  # of the replaced tokens

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
    """(N,) nats of windows -> 'mean+-standard error' per token, over pairs of neighbours."""
    pairs = nats.view(-1, 2).mean(1) / seq_len
    require(bool(pairs.isfinite().all()), "refused: the bound is not finite")
    return f"{pairs.mean():.4f}+-{pairs.std() / len(pairs) ** 0.5:.4f}"

def check_leaks(rules, objective, model, x0, cfg, bos_id):
    """Refuse a network whose answers change with tokens that they must not depend on.

    Every window of x0 (B, T) is cut at another block. From the cut on x0 is replaced by other
    tokens, bos_id among them, and the noised text from the next block on; the logits up to the end
    of the block at the cut have to stay. The two windows of a pass, cut at i and n - 1 - i, must
    not see each other either. Where all of a window may be seen, one of the two is replaced."""
    (B, T), L, V = x0.shape, getattr(cfg, "block_len", 1), cfg.vocab_size
    gen = torch.Generator().manual_seed(LEAK_SEED)
    other = (x0.cpu() + torch.randint(1, V, x0.shape, generator=gen)) % V
    other[torch.rand(x0.shape, generator=gen) < BOS_SHARE] = bos_id
    other, noise = other.to(x0.device), rules.draw_noise(cfg, B, gen, bound=True)
    at = torch.arange(T, device=x0.device)
    for first in range(0, B - 1, 2):  # few rows a pass: their logits are all kept
        rows = slice(first, first + 2)
        piece = rules.take_rows(noise, rows, x0.device)
        a, b = x0[rows], other[rows]
        start = torch.tensor([[first // 2], [B - 1 - first // 2]], device=x0.device)  # of B cuts
        if objective in ("gpt", "train_block"):
            start = start * (T // L) // B * L  # (2, 1)
            end = start + L
        else:
            start = end = torch.tensor([[0], [T]], device=x0.device)
        before = [rules.corrupt(a, piece, cfg)]
        after = [torch.where(at < end, before[0], rules.corrupt(b, piece, cfg))]
        if objective == "train_block":
            before, after = [*before, a], [*after, torch.where(at < start, a, b)]
        elif objective != "gpt":
            before, after = [*before, piece.sigma], [*after, piece.sigma]
        kept = (at < end).flatten().nonzero()[:, 0]
        x, y = (model(*inputs, kept).log_softmax(-1) for inputs in (before, after))
        difference = (x - y).abs().amax(-1)  # (R,)
        place = int(kept[difference.argmax()]) % T
        require(difference.max() <= LEAK_TOLERANCE, f"refused: the output at token {place} moves "
                f"by {difference.max():.3g} nats with tokens that it must not see")

def judge(rules, objective, model, cfg, windows, meta, device):
    """-> {figure: value}"""
    n, token_length = cfg.val_tokens // cfg.seq_len, torch.tensor(meta["byte_length"])
    some = windows.read(range(min(n, LEAK_WINDOWS)), cfg.vocab_size).to(device)
    check_leaks(rules, objective, model, some, cfg, meta["bos_id"])
    published = []

    def bound(x0, noise):
        if objective != "train_block":
            return rules.nelbo_fn(model, x0, noise, cfg)
        exact, other = both_figures(rules, model, x0, noise, cfg)
        published.append(other.cpu().double())
        return exact

    *_, nats = rules.evaluate(bound, cfg, windows, token_length, device, 0, 1)
    figures = {"bound": mean_and_error(nats, cfg.seq_len)}
    if published:
        other = torch.cat(published).view(cfg.val_draws, -1).mean(0)
        figures["published"] = mean_and_error(other, cfg.seq_len)
    return figures | dict(tokens=cfg.val_tokens, draws=cfg.val_draws)

@torch.no_grad()
def run(args):
    path = sample.find_checkpoint(args.ckpt)
    ckpt = sample.load_script(ROOT / "train_mdlm.py").load_checkpoint(path)
    log = read_log(path.parent / "log.txt")
    track = next((t for t in TRACKS.values() if t.data == Path(log.config["data"]).name), None)
    require(track, f"{path}: no track has the data {log.config['data']}")
    check_run(log, track)
    file = Path(args.script or ROOT / f"{ckpt['script']}.py")
    require(file.exists(), f"{path}: written by {ckpt['script']}.py: pass it as --script=FILE")
    require(log.source == file.read_text(encoding="utf-8"),
            f"{log.path}: the run had another script than {file}: pass it as --script=FILE")
    model, own_cfg = sample.build_model(sample.load_script(file), ckpt)

    objective = objective_of(ckpt["config"])
    rules = sample.load_script(ROOT / f"{objective}.py")
    settings = {f.name: getattr(own_cfg, f.name, f.default) for f in fields(rules.Config)}
    cfg = rules.Config(**settings | dict(
        split="val", val_tokens=args.tokens or track.val_tokens, prompt_len=0,
        val_draws=1 if objective == "gpt" else track.val_draws))
    _, windows, meta = rules.open_data(cfg, ckpt)
    n = cfg.val_tokens // cfg.seq_len
    require(n % 2 == 0 and 4 <= n <= len(windows), f"{cfg.val_tokens} tokens: {n} windows; it takes"
            f" an even number from 4 to the {len(windows)} of {cfg.data}")
    device, dtype = rules.pick_device(args.device, cfg.dtype, 0)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        figures = judge(rules, objective, model.to(device), cfg, windows, meta, device)
    with open(windows.paths[0], "rb") as f:
        shard_sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    about = dict(
        objective=objective, parameters=sum(x.numel() for x in model.state_dict().values()),
        step=ckpt["step"], weights="ema" if ckpt["ema"] else "raw", leak="none",
        dtype=str(dtype)[6:], shard_sha256=shard_sha256)
    lines = ["referee " + " ".join(f"{k}:{v}" for k, v in part.items()) + "\n"
             for part in (figures, about)]
    print(*lines, sep="", end="")
    if not args.tokens:
        with open(log.path, "a", encoding="utf-8") as f:
            f.writelines(lines)
        print(f"added to {log.path}")

def main(argv):
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--script")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="auto")
    try:
        run(parser.parse_args(argv))
    except (KeyboardInterrupt, OSError, ValueError) as error:  # UserError is a ValueError
        parser.error(str(error) or "interrupted")

if __name__ == "__main__":
    main(sys.argv[1:])
