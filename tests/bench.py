"""Benchmarks: one table, each row a ratio against a baseline measured in the same run.

    make bench                      everything, minutes on two cores
    python tests/bench.py train     only the rows whose name starts so

Each ratio is the median over rounds of ratios of neighbouring measurements, so that a machine whose
speed drifts does no harm. Ratios above 1 favour this code. (Memory: memory.py.)
"""
import contextlib
import functools
import io
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import tiktoken
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from toys import with_samplers  # noqa: E402

import gpt  # noqa: E402
import prepare_data  # noqa: E402
import sample  # noqa: E402
import train_block as block  # noqa: E402
import train_mdlm as mdlm  # noqa: E402

ROUNDS = 7
LONG = dict(n_layer=6, n_head=6, n_embd=384, seq_len=1024)
BF16 = torch.bfloat16

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

def row(name, what, shape, ours, baseline, unit):
    """Print a row: paired measurements -> medians and the median of the ratios."""
    ratio = median(a / b for a, b in zip(ours, baseline, strict=True))
    print(f"| {name} | {what} | {shape} | {median(ours):,.4g} {unit} "
          f"| {median(baseline):,.4g} {unit} | **{ratio:.2f}** |", flush=True)

def rounds(*functions, n=ROUNDS):
    """Interleaved times of several functions, after one call of each: a list for every one."""
    for f in functions:
        f()
    times = [[seconds(f) for f in functions] for _ in range(n)]
    return [list(column) for column in zip(*times, strict=True)]

def network(preset, batch, script=mdlm, **names):
    names = {"vocab_size": 256, "dropout": 0.0} | names
    cfg = script.Config(**((script.read_preset(preset) if preset else {}) | names))
    torch.manual_seed(0)
    model = script.Model(cfg)
    gen = torch.Generator().manual_seed(0)
    x0 = torch.randint(cfg.vocab_size, (batch, cfg.seq_len), generator=gen)
    return cfg, model, x0, script.draw_noise(cfg, batch, gen)

def writer(preset, script=mdlm, **names):
    """A network to sample from, untrained, but not uniform."""
    cfg, model, *_ = network(preset, 2, script, **names)
    model.eval().head.weight.data.normal_(std=0.02)
    return cfg, model

def full_logits_loss(model, x0, noise, cfg):
    """The same loss as a plain script writes it: logits and cross entropy of every position."""
    xt = mdlm.corrupt(x0, noise, cfg)
    logits = model(xt, noise.sigma)
    ce = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
    return (noise.weight[:, None] * ce * (xt != x0)).sum() / x0.numel()

def plain_attention(q, k, v, ctx):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1))

def train():
    """Forward and backward at the shape of shakespeare_10m."""
    batch = 16
    steps = {}
    for name, compiled, dtype in (("gathered rows", False, torch.float32),
                                  ("bf16", False, BF16), ("bf16, compiled", True, BF16)):
        cfg, model, x0, noise = network("shakespeare_10m_muon", batch)
        if compiled:
            for layer in model.layers:
                layer.compile(dynamic=False)

        def step(model=model, dtype=dtype, x0=x0, noise=noise, cfg=cfg):
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype == BF16):
                mdlm.loss_fn(model, x0, noise, cfg).backward()

        steps[name] = step
    plain = network("shakespeare_10m_muon", batch)[1]

    def baseline():
        ours, mdlm.attend = mdlm.attend, plain_attention
        plain.zero_grad()
        full_logits_loss(plain, x0, noise, cfg).backward()
        mdlm.attend = ours

    times = rounds(*steps.values(), baseline)
    rate = [[batch * cfg.seq_len / t for t in column] for column in times]
    for name, column in zip(steps, rate, strict=False):
        row("train", f"{name} / plain fp32 eager, full logits, SDPA",
            f"6L 384, T {cfg.seq_len}, {batch} rows, {'bf16' if 'bf16' in name else 'fp32'}",
            column, rate[-1], "tok/s")

def objectives():
    """Forward and backward of every objective at the shape of tiny, compiled as in training."""
    batch, steps = 16, []
    for script in (gpt, block, mdlm):
        cfg, model, x0, noise = network("tiny", batch, script)
        for layer in model.layers:
            layer.compile(dynamic=False)

        def step(script=script, model=model, x0=x0, noise=noise, cfg=cfg):
            model.zero_grad()
            with torch.autocast("cpu", BF16):
                script.loss_fn(model, x0, noise, cfg).backward()

        steps.append(step)
    times = rounds(*steps)
    rate = [[batch * cfg.seq_len / t for t in column] for column in times]
    for name, column in zip(("gpt", "train_block"), rate, strict=False):
        row("objectives", f"{name} / train_mdlm, compiled",
            f"6L 208, T {cfg.seq_len}, {batch} rows, bf16", column, rate[-1], "tok/s")

def encode_all(corpus, n_threads=1):
    """Plain tiktoken, in calls of the size that prepare_data.py makes."""
    gpt2, size = tiktoken.get_encoding("gpt2"), 1 << 19
    with ThreadPoolExecutor(n_threads) as pool:
        for start in range(0, len(corpus), size):
            pool.submit(gpt2.encode_ordinary, corpus[start:start + size])

def tokenizer():
    """prepare_data.py on all cores against tiktoken on one of them, times their number, and against
    tiktoken on all: where cores share hardware, two do less than twice the work of one."""
    try:
        tiktoken.get_encoding("gpt2")
    except Exception as e:  # it comes over the network
        print(f"| tokenizer | no GPT-2 vocabulary here ({type(e).__name__}) | | | | |")
        return
    folder = Path(os.__file__).parent  # a few megabytes of text that every machine has
    corpus = 24 * "".join(p.read_text(encoding="utf-8", errors="replace")
                         for p in sorted(folder.glob("*.py")))
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(corpus, encoding="utf-8")
        megabytes = path.stat().st_size / 1e6
        runs = iter(range(100))

        def ours():
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                prepare_data.main(["files", f"--input={path}", "--tokenizer=gpt2",
                                   f"--out={folder}/{next(runs)}"])

        times = rounds(ours, lambda: encode_all(corpus), lambda: encode_all(corpus, cores), n=5)
    ours, one, all_cores = ([megabytes / t for t in column] for column in times)
    for what, rate in ((f"{cores} x tiktoken on one", [cores * x for x in one]),
                       (f"tiktoken in {cores} threads", all_cores)):
        row("tokenizer", f"prepare_data.py on {cores} cores / {what}",
            f"{megabytes:.0f} MB of source code, gpt2", ours, rate, "MB/s")

def sampling():
    """Tokens per second of every sampler against first-hitting, one network pass a token."""
    cfg, model = writer("tiny")
    batch, length = 4, 128
    known = torch.zeros(batch, length, dtype=torch.int64)
    fill = with_samplers(mdlm).generate

    def sampler(**how):
        def run():
            fill(model, cfg, known, known > 0, gen=torch.Generator().manual_seed(0), **how)
        return run
    half = length // 2
    ways = {
        f"ancestral, {half} steps": dict(steps=half),
        f"ancestral, {length} steps": dict(steps=length),
        f"confidence, {half} steps": dict(steps=half, choose=sample.ordered("confidence")),
        f"entropy, {length // 8} steps": dict(steps=length // 8, choose=sample.ordered("entropy")),
        f"ReMDM loop, {length} steps": dict(steps=length, choose=sample.remasking("loop")),
    }
    times = rounds(*(sampler(**how) for how in ways.values()), sampler(steps=None), n=3)
    rate = [[batch * length / t for t in column] for column in times]
    for name, column in zip(ways, rate, strict=False):
        row("sampling", f"{name} / first-hitting", f"6L 208, {batch} x {length} tokens, fp32",
            column, rate[-1], "tok/s")

def caching():
    """Tokens per second with cached keys and values, and with all earlier tokens computed anew."""
    for script, what, length, how in ((block, "train_block, 4 passes a block of 16", 512,
                                       {"steps": 4}), (gpt, "gpt", 256, {})):
        cfg, model = writer("", script, **LONG)
        fill = with_samplers(script).generate
        known = torch.zeros(1, length, dtype=torch.int64)

        def run(cached, fill=fill, model=model, cfg=cfg, known=known, how=how):
            gen = torch.Generator().manual_seed(0)
            fill(model, cfg, known, known > 0, gen=gen, cached=cached, **how)

        times = rounds(lambda run=run: run(True), lambda run=run: run(False), n=1)
        rate = [[length / t for t in column] for column in times]
        row("caching", f"{what}, cached / earlier tokens computed anew",
            f"6L 384, 1 x {length:,} tokens, fp32", *rate, "tok/s")

def approximate():
    """Tokens per second of masked diffusion in blocks, with an approximate cache and with none."""
    cfg, model = writer("tiny")
    fill, length = with_samplers(mdlm).generate, 256
    known = torch.zeros(1, length, dtype=torch.int64)

    def run(cache):
        fill(model, cfg, known, known > 0, gen=torch.Generator().manual_seed(0), steps=8,
             block_len=32, cache=cache)

    caches = "prefix", "dual"
    times = rounds(*(functools.partial(run, cache) for cache in (*caches, "")), n=3)
    rate = [[length / t for t in column] for column in times]
    for cache, column in zip(caches, rate, strict=False):
        row("approximate", f"train_mdlm, 8 passes a block of 32, {cache} cache / none",
            f"6L 208, 1 x {length} tokens, fp32", column, rate[-1], "tok/s")

BENCHMARKS = {f.__name__: f for f in (train, objectives, tokenizer, sampling, caching,
                                      approximate)}

def main(argv):
    unknown = [a for a in argv if not any(name.startswith(a) for name in BENCHMARKS)]
    if unknown:
        print(f"bench.py: no benchmark {unknown[0]}: {', '.join(BENCHMARKS)}", file=sys.stderr)
        raise SystemExit(2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU\n")
    print("| what | ours / baseline | shape, dtype | ours | baseline | ratio |")
    print("|---|---|---|---|---|---|")
    for name, run in BENCHMARKS.items():
        if not argv or any(name.startswith(a) for a in argv):
            run()

if __name__ == "__main__":
    main(sys.argv[1:])
