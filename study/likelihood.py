"""The exact likelihood of a decoder, by order and number of passes; and where it lags behind AR.

    python study/likelihood.py --ckpt=out/train_mdlm --orders=l2r,r2l,confidence,entropy,random:4
    python study/likelihood.py --ckpt=out/train_mdlm --orders=l2r,confidence --steps=8,32
    python study/likelihood.py --ckpt=out/train_mdlm --orders=l2r --against=out/gpt

A decoder begins with masks. In each pass its rule picks positions, whose tokens are drawn
independently. So the probability that it writes a text is a product over passes, of the true tokens
at the positions that the rule picks when the text so far is the true one: exact, without samples or
a judge, for several tokens a pass, too. Each rule is a decoder of its own, not a tighter bound of
one model. The NELBO, here over --draws=8 of its noise, is the mean over random orders, one token
a pass (of train_sedd: if --normalized=1).

    --orders     l2r, r2l, random[:K] (mean over K orders), and those of sample.py: confidence,
                 entropy, margin..; of gpt.py only l2r. train_block: inside each block
    --steps      passes, of train_block in each block, with commas; without it one token a pass
    --threshold  instead of them: one token a pass, and all whose top probability is above it
    --block_length  of train_mdlm: in blocks from left to right; --steps and order inside each
    --cache      none, prefix, dual, with commas: keys and values kept within a block, as sample.py
                 does. It is another decoder, whose likelihood is exact all the same
    --windows    how many (64), the first of --split (val) of --data (the run's); --start=document:
                 the first that begin with a document
    --against    a checkpoint of gpt.py: nats per token minus its own, by position in the window
    --out        FILE.json for all figures; FILE.npz beside it for nats and passes by position

Another dtype or device rounds otherwise, which can change an order. Errors: over pairs of windows.
"""
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from study.golf import require, run_cli  # noqa: E402

BLIND = ("l2r", "r2l", "random")  # orders that do not look at the network's answers
NELBO_SEED = 20240520

@torch.no_grad()
def chain_rule(model, cfg, kind, x0, choose, u, steps=None, is_blind=False, block_length=0,
               cache=""):
    """-log p of x0 (B, T) for the decoder whose rule is choose (sample.ordered), in `steps` passes
    for every block; None: as many as it has tokens. u (B, T): random numbers of the rule. is_blind:
    the rule does not look at log-probabilities. block_length, cache: see sample.Options.
    -> nats (B, T) float64; which pass of its row, from 1 on, revealed each token, (B, T)"""
    (B, T), mask_id = x0.shape, cfg.vocab_size
    L = cfg.block_len if kind == "block" else block_length or T
    reader = sample.Reader(model, cfg, kind, L, cache)
    tokens = torch.full_like(x0, mask_id)
    nats, when = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.long)
    n_passes = torch.zeros(B, 1, dtype=torch.long)
    for start in range(0, T, L):
        here = slice(start, start + L)
        for i in range(steps or L):
            is_mask = tokens[:, here] == mask_id  # (B, L)
            if not is_mask.any():
                break
            rows, log_p = is_mask.flatten().nonzero()[:, 0], torch.zeros(int(is_mask.sum()), 1)
            if not is_blind:
                log_p = reader.read(tokens, start, rows).log_softmax(-1)  # (R, V)
            is_left = choose(log_p, is_mask, step=i, steps=steps, u=u[:, here])
            is_picked = ~is_left.flatten()[rows]
            rows, log_p = rows[is_picked], log_p[is_picked]
            if is_blind:  # the head has to answer for what is revealed alone
                log_p = reader.read(tokens, start, rows).log_softmax(-1)
            true = x0[:, here].flatten()[rows]
            is_new = (is_mask & ~is_left).cpu()
            nats[:, here][is_new] = -log_p.gather(1, true[:, None])[:, 0].cpu().double()
            n_passes += is_mask.any(1, keepdim=True).cpu()
            when[:, here][is_new] = n_passes.expand(-1, L)[is_new]
            tokens[:, here] = torch.where(is_left, mask_id, x0[:, here])
    return nats, when

def make_rule(order, shape, gen, threshold=None):
    """An order -> (choose, u (N, T) float64), as sample.py would use it. l2r and r2l are its random
    order with numbers that are not random."""
    u = torch.rand(shape, generator=gen, dtype=torch.float64)
    if order in ("l2r", "r2l"):
        u = torch.arange(shape[1], dtype=torch.float64).expand(shape) / shape[1]
        u = 1 - u if order == "l2r" else u
    name = "random" if order in BLIND else order
    return sample.ordered(name, threshold), u

def decoder_nats(lm, x0, order, steps=None, threshold=None, cache="", block_length=0, seed=0):
    """x0 (N, T) -> nats (N, T), which pass revealed each token (N, T), how many there were (N,);
    each a mean over the K orders of random:K"""
    order, _, count = order.partition(":")
    parts, gen = [], torch.Generator().manual_seed(seed)
    for _ in range(int(count or 1)):
        choose, u = make_rule(order, x0.shape, gen, threshold)
        is_blind, found = order in BLIND and threshold is None, []
        for rows in torch.arange(len(x0)).split(lm.batch_rows(x0.size(1))):
            with lm.amp():
                found.append(chain_rule(lm.net, lm.cfg, lm.kind, x0[rows].to(lm.device), choose,
                                        u[rows], steps, is_blind, block_length, cache))
        nats, when = (torch.cat(x) for x in zip(*found, strict=True))
        parts.append((nats, when, when.amax(1)))
    return [torch.stack(x).double().mean(0) for x in zip(*parts, strict=True)]

@torch.no_grad()
def causal_nats(lm, x0):
    """gpt.py: x0 (N, T) -> nats (N, T)"""
    found = []
    for x in x0.split(lm.batch_rows(x0.size(1))):
        x = x.to(lm.device)
        with lm.amp():
            logits = lm.model(F.pad(x[:, :-1], (1, 0), value=lm.cfg.vocab_size))  # (B, T, V)
        found.append(F.cross_entropy(logits.mT, x, reduction="none").cpu().double())
    return torch.cat(found)

@torch.no_grad()
def nelbo(lm, x0, draws):
    """x0 (N, T) -> nats per token (N,), a mean over draws of the noise that evaluation uses"""
    total = torch.zeros(len(x0), dtype=torch.float64)
    for draw in range(draws):
        gen = torch.Generator().manual_seed(lm.script.derive_seed(NELBO_SEED, draw))
        noise = lm.script.draw_noise(lm.cfg, len(x0), gen, bound=True)
        for rows in torch.arange(len(x0)).split(2 * -(-lm.batch_rows(x0.size(1)) // 2)):  # pairs
            piece = lm.script.take_rows(noise, rows, lm.device)
            with lm.amp():
                nats = lm.script.nelbo_fn(lm.model, x0[rows].to(lm.device), piece, lm.cfg)
            total[rows] += nats.cpu().double() / draws
    return total / x0.size(1)

def mean_and_error(x):
    """(N,) float64 -> mean and its standard error over pairs of neighbours"""
    pairs = x.view(-1, 2).mean(1)
    return x.mean().item(), pairs.std().item() / len(pairs) ** 0.5

def prefix_gap(difference, n_bytes):
    """difference (N, T) in nats and bytes (N, T) of the tokens -> [{first, last (position),
    gap, se (nats per token inside the bin), bpb, cumulative (up to last), tail (from first on)}],
    bins 0, 1, 2-3, 4-7.."""
    T, rows, first = difference.size(1), [], 0
    while first < T:
        last = min(T, 2 * first or 1)
        local = difference[:, first:last]
        gap, se = mean_and_error(local.mean(1))
        bits, size = local.sum().item() / math.log(2), int(n_bytes[:, first:last].sum())
        rows.append(dict(first=first, last=last - 1, gap=gap, se=se,
                         bpb=bits / size if size else None,
                         cumulative=difference[:, :last].mean().item(),
                         tail=difference[:, first:].mean().item()))
        first = last
    return rows

def take_windows(windows, meta, n, start):
    """The first n windows (.., T) of a split, or fewer if it has no more: as evaluation cuts them
    (anywhere), or those that begin with a document, without overlap."""
    require(start in ("document", "anywhere"), f"--start={start}: document or anywhere")
    if start == "anywhere":
        return windows.read(range(min(n, len(windows))), meta["vocab_size"])
    rows, T = [], windows.shards[0].shape[1]
    for shard in windows.shards:
        text, end = shard.reshape(-1), 0
        for at in np.flatnonzero(text == meta["bos_id"]):
            if end <= at <= len(text) - T and len(rows) < n:
                rows, end = [*rows, text[at:at + T].astype(np.int64)], at + T
    return torch.from_numpy(np.array(rows, np.int64).reshape(-1, T))

def read_windows(lm, flags):
    """-> x0 (N, T), bytes (N, T) of its tokens, the name of the data"""
    require(not lm.cfg.prompt_len, f"{lm.path}: trained on answers alone, by --prompt_len")
    cfg = dataclasses.replace(lm.cfg, data=flags.data or lm.cfg.data, split=flags.split,
                              eval_only=True, init_from="")
    _, windows, meta = lm.script.open_data(cfg)
    is_same = sample.Tokenizer(meta, cfg.vocab_size).table == lm.tokenizer.table
    require(is_same, f"--data={cfg.data}: its tokens are not those of {flags.ckpt}")
    x0 = take_windows(windows, meta, flags.windows, flags.start)
    x0 = x0[:len(x0) // 2 * 2]
    require(len(x0) >= 4, f"--windows={flags.windows}: four or more are needed; {flags.split} of "
            f"{cfg.data} has {len(x0)} for --start={flags.start}")
    return x0, torch.tensor(meta["byte_length"])[x0], cfg.data

def settings(flags, lm):
    """[(order, steps or None, threshold or None, cache)], checked"""
    orders = [name for name in flags.orders.split(",") if name]
    known = ("l2r",) if lm.kind == "gpt" else (*BLIND[:2], *sample.RANKS)
    for order in orders:
        name, _, count = order.partition(":")
        fits = name in known and (not count or name == "random" and count.isdecimal())
        require(fits, f"--orders={order}: {lm.name} has {', '.join(known)}; random takes :K")
    require(lm.graph != "uniform", f"--ckpt={flags.ckpt}: nothing is masked under --graph=uniform")
    fits = re.fullmatch(r"[\d,]* [\d.,]*", f"{flags.steps} {flags.threshold}")
    require(fits, f"--steps={flags.steps} --threshold={flags.threshold}: numbers, with commas")
    ways = [(int(x), None) for x in flags.steps.split(",") if x]
    ways += [(None, float(x)) for x in flags.threshold.split(",") if x]
    L, caches = flags.block_length, flags.cache.replace("none", "").split(",")
    for cache in caches:
        require(cache in ("", "prefix", "dual") and (L or not cache), f"--cache={cache}: there are "
                "none, prefix and dual, with --block_length")
    require(not L or lm.kind == "mdlm" and lm.cfg.seq_len % L == 0, f"--block_length={L}: takes a "
            f"checkpoint of train_mdlm and a divisor of its context, {lm.cfg.seq_len}")
    return [(order, *way, cache) for order in orders for way in ways or [(None, None)]
            for cache in caches]

def say_estimate(lm, x0, todo, seconds, block_length):  # of a pass over whole windows
    T, n_passes = x0.size(1), 0
    L = lm.block_len or block_length or T
    for order, steps, *_ in todo:
        n_passes += int(order.partition(":")[2] or 1) * min(T, T // L * (steps or L))
    seconds *= n_passes * (L / T if lm.kind == "block" else 1)
    print(f"{n_passes} passes over {len(x0)} windows of {T} tokens: about {seconds:.0f} s",
          file=sys.stderr)

def print_table(rows, head):
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")

def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def finish(done, print_rows, out):
    print_rows(done)
    if out:
        Path(out).write_text(json.dumps(done, indent=1) + "\n")

def shown(pair, digits=4, star=""):
    return "" if pair is None else f"{pair[0]:.{digits}f}{star} ± {pair[1]:.{digits}f}"

def print_rows(done):
    head = ["order", "steps", "threshold", "NFE a window", "nats per token", "bits per byte",
            "minus NELBO", "minus l2r"]
    rows = [[row["order"], str(row["steps"] or ""), str(row["threshold"] or ""),
             f"{row['nfe']:.1f}" if row["nfe"] else "", shown(row["nats"]), f"{row['bpb']:.4f}",
             shown(row.get("minus_nelbo")), shown(row.get("minus_l2r"))] for row in done["rows"]]
    if any(row.get("cache") for row in done["rows"]):
        head += ["cache", "minus uncached"]
        for cells, row in zip(rows, done["rows"], strict=True):
            cells += [row.get("cache", ""), shown(row.get("minus_uncached"))]
    print_table(rows, head)
    if done["gap"]:
        print(f"\nl2r minus {done['about']['against']}, nats per token:\n")
        print_table([
            [f"{g['first']}-{g['last']}", shown((g["gap"], g["se"])), str(g["bpb"] and
             round(g["bpb"], 4)), f"{g['cumulative']:.4f}", f"{g['tail']:.4f}"]
            for g in done["gap"]],
            ["positions", "gap here", "bits per byte", "up to here", "from here on"])

def run(flags):
    require(not flags.files, f"{' '.join(flags.files)}: name the checkpoint with --ckpt=PATH")
    how = dict(device=flags.device, dtype=flags.dtype)
    lm = sample.load(flags.ckpt, flags.script or None, **how)
    todo = settings(flags, lm)
    x0, n_bytes, data = read_windows(lm, flags)
    N, T = x0.shape
    other = flags.against and sample.load(flags.against, **how)
    if other:
        fits = (other.kind == "gpt" and other.tokenizer.table == lm.tokenizer.table
                and other.cfg.seq_len >= T and ("l2r", None, None, "") in todo)
        require(fits, f"--against={flags.against}: a gpt.py checkpoint with the same tokens and a "
                f"context of {T}, beside --orders=l2r without --steps and --threshold")
    print(f"{lm.summary}\n{N} windows of {T} tokens of {data} ({flags.split}), begin: "
          f"{flags.start}, {lm.where}", file=sys.stderr)
    start = time.perf_counter()
    bound = None if lm.kind == "gpt" else nelbo(lm, x0, flags.draws)
    seconds = (time.perf_counter() - start) / flags.draws
    rows, arrays, bits = [], {}, math.log(2) * int(n_bytes.sum())
    base = plain = None
    if bound is not None:
        say_estimate(lm, x0, todo, seconds, flags.block_length)
        arrays["nelbo"] = bound.numpy()
        rows.append(dict(order="NELBO", steps=None, threshold=None, nfe=None,
                         nats=mean_and_error(bound), bpb=bound.sum().item() * T / bits))
    for order, steps, threshold, cache in todo:
        if lm.kind == "gpt":
            nats, when = causal_nats(lm, x0), torch.arange(1.0, T + 1).expand(N, T)
            nfe = when[:, -1]
        else:
            nats, when, nfe = decoder_nats(lm, x0, order, steps, threshold, cache,
                                           flags.block_length, flags.seed)
        name = " ".join(str(x) for x in (order, steps, threshold, cache) if x)
        arrays |= {f"{name} nats": nats.float().numpy(), f"{name} pass": when.float().numpy()}
        mean = nats.mean(1)
        base = mean if base is None and order == "l2r" else base
        plain = plain if cache else mean
        rows.append(dict(
            order=order, steps=steps, threshold=threshold, cache=cache, nfe=nfe.mean().item(),
            nats=mean_and_error(mean), bpb=nats.sum().item() / bits,
            minus_nelbo=None if bound is None else mean_and_error(mean - bound),
            minus_l2r=None if base is None else mean_and_error(mean - base),
            minus_uncached=mean_and_error(mean - plain) if cache and plain is not None else None))
    gap = None
    if other:
        arrays["against nats"] = causal_nats(other, x0).float().numpy()
        difference = torch.from_numpy(arrays["l2r nats"] - arrays["against nats"]).double()
        gap = prefix_gap(difference, n_bytes)
    done = dict(about=dict(vars(flags), program="likelihood", checkpoint=digest(lm.path),
                           script=lm.name, data=data, windows=N, seq_len=T, where=lm.where,
                           torch=torch.__version__), rows=rows, gap=gap)
    finish(done, print_rows, flags.out)
    if flags.out:
        np.savez_compressed(Path(flags.out).with_suffix(".npz"), **arrays)

def main(argv):
    run_cli("likelihood.py", run, argv, __doc__, ckpt="", script="", orders="l2r,confidence,random",
            steps="", threshold="", block_length=0, cache="none", windows=64, data="", split="val",
            start="anywhere", against="", draws=8, seed=0, out="", device="auto", dtype="fp32")

if __name__ == "__main__":
    main(sys.argv[1:])
