"""Training runs through the command line: resume, ranks, evaluation, presets, data, bad input.

Most runs happen in this process, since `main(argv)` is the command line; what needs a launcher or
another environment is a process of its own.
"""
import dataclasses
import errno
import functools
import math
import os
import pickle
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from runs import (
    CONSTANT_RATE,
    FROZEN,
    GENTLE,
    ROWS,
    SCRIPT,
    SEQ_LEN,
    TINY,
    Touch,
    assert_refused,
    assert_same_log,
    assert_same_state,
    babble,
    byte_table,
    checkpoint,
    evaluations,
    finish,
    keep_checkpoints,
    launch,
    log,
    one_thread,  # noqa: F401
    presets,
    tiny,
    train,
    train_tiny,
    tree,
    wait_for,
    write_meta,
    write_shard,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import Iid, seeded

import gpt
import train_block
import train_mdlm
import train_sedd

SCRIPTS = (train_mdlm, gpt, train_block, train_sedd)

@pytest.fixture(scope="module")
def short_run(data, tmp_path_factory):
    """A finished run of four steps: (folder, result). Tests leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "short"
    return out, train_tiny(f"--data={data}", f"--out={out}", "--steps=4", "--eval_every=2",
                           "--ckpt_every=3", "--ema=0.5", "--lr=0.01")

@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Tokens that count upwards modulo 16 from a random start: ln 16 nats a token by frequency, a
    small part of that to who looks at the neighbours."""
    folder = tmp_path_factory.mktemp("counting")
    text = (np.arange(SEQ_LEN) + np.random.default_rng(0).integers(0, 16, (600, 1))) % 16
    write_shard(folder / "train_000001.bin", text[:500].ravel())
    write_shard(folder / "val_000000.bin", text[500:].ravel())
    write_meta(folder, byte_table(16))
    return folder

def moments(state):
    """Running means of the gradients, of every parameter that AdamW has."""
    values = [s for o in state["optimizers"] for s in o["state"].values()]
    return [s["exp_avg"] for s in values if "exp_avg" in s]

def distance(a, b):
    """Largest difference of any parameter between two checkpoints."""
    return max(float((x - b["model"][n]).abs().max()) for n, x in a["model"].items())

UNIFORM = ("--graph=uniform", "--noise=geometric", "--cond_dim=16")
RICH = ("--dropout=0.1", "--ema=0.9", "--ema_start=0.02", "--micro_batch=16", "--muon_beta2=0.95",
        "--cautious=1", "--unet=1", "--value_residual=1", "--n_layer=2")

@pytest.mark.parametrize("script, flags", [
    (train_mdlm, ("--optimizer=adamw", "--lr=0.005", "--ema=0.9", "--checkpoint_layers=1",
                  "--dropout=0.1")),
    (train_mdlm, ("--estimator=bernoulli", "--schedule=cosine", "--loss_weight=elbo",
                  "--cond_dim=16", *RICH)),
    (gpt, ("--dropout=0.1", "--ema=0.9")),
    (train_block, ("--block_len=8", *RICH)),
    (train_sedd, ()),
    (train_sedd, ("--dtype=bf16", *UNIFORM)),
], ids=lambda x: getattr(x, "SCRIPT", None))
def test_learns_a_rule_and_goes_on_bit_for_bit(script, flags, counting, tmp_path):
    """Far below what frequencies give; then once more from the checkpoint in the middle, and an
    evaluation of what came out."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    out.mkdir()
    flags = tiny("--steps=120", "--eval_every=60", "--ckpt_every=60", "--log_every=30",
                 "--batch_tokens=1024", "--micro_batch=32", "--lr=0.02", "--val_tokens=3200",
                 f"--data={counting}", *flags)
    with keep_checkpoints(script, out / "ckpt.pt"):
        result = train(*flags, f"--out={whole}", script=script)
    assert result.status == 0, result.err
    printed = evaluations(result.out)
    (first, *_), last = printed
    # No bound may fall below the entropy: ln 16 for the start, nothing for the rest.
    assert math.log(16) / SEQ_LEN < last[0] < first and last[0] < 0.75 * math.log(16)
    assert "skipped" not in result.out
    (out / "ckpt.pt.partial").write_bytes(b"cut short")  # as a kill leaves it
    again = train("--resume=1", f"--out={out}", script=script)
    assert again.status == 0 and evaluations(again.out) == printed, again.err
    assert_same_state(checkpoint(out), checkpoint(whole))
    alone = train("--eval_only=1", f"--init_from={out / 'ckpt.pt'}", script=script)
    assert alone.status == 0 and evaluations(alone.out) == [last], alone.err

def test_finished_run_stays_as_it_is(short_run):
    folder, _ = short_run
    before = checkpoint(folder)
    for flags in ((), ("--steps=2",)):
        result = train("--resume=1", f"--out={folder}", *flags)
        assert result.status == 0 and "done:" in result.out
        assert_same_state(before, checkpoint(folder))
    assert [x["step"] for x in log(folder) if "loss" in x] == [1, 2, 3, 4]

def test_full_disk_keeps_the_checkpoint_before(data, tmp_path):
    """A line for a checkpoint that has no room; training goes on; the run ends with status 1."""
    flags = (*CONSTANT_RATE, f"--data={data}", f"--out={tmp_path / 'run'}")
    assert train_tiny(*flags, "--steps=2").status == 0
    before = checkpoint(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the logs and not for a checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        result = train("--resume=1", "--steps=4", "--ckpt_every=1", f"--out={tmp_path / 'run'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == 2 and "step:4/4" in result.out
    assert result.out.count("not written") == 2 and os.strerror(errno.EFBIG) in result.out
    assert_same_state(checkpoint(tmp_path / "run"), before)

def test_second_run_in_a_folder_is_refused(data, tmp_path):
    """In one line, as a user sees it."""
    flags = tiny("--steps=100000", f"--data={data}", f"--out={tmp_path / 'run'}")
    first = launch(SCRIPT, *flags)
    wait_for(first, "step:1/")
    first.send_signal(signal.SIGSTOP)
    result = finish(launch(SCRIPT, *flags))
    first.kill()
    assert_refused(result, "--out", "another run")

@pytest.mark.parametrize("script, options", [
    (train_mdlm, ()), (train_mdlm, ("--estimator=bernoulli",)), (train_sedd, UNIFORM),
], ids=lambda x: getattr(x, "SCRIPT", None))
def test_accumulation_and_recomputation_give_the_same_run(script, options, data, tmp_path):
    """From trained weights and by AdamW: at the zero weights of a start, any optimizer that fixes
    the size of its step makes large steps out of rounding errors."""
    flags = tiny("--steps=4", "--eval_every=2", f"--data={data}", *options)
    start = train(*flags, f"--out={tmp_path / 'start'}", script=script)
    assert start.status == 0, start.err
    flags = tiny(*flags, *GENTLE, f"--init_from={tmp_path / 'start' / 'ckpt.pt'}")
    ways = [("--micro_batch=8",), ("--micro_batch=2",), ("--checkpoint_layers=1",)]
    for i, how in enumerate(ways):
        result = train(*tiny(*flags, *how), f"--out={tmp_path / str(i)}", script=script)
        assert result.status == 0, result.err
    a = checkpoint(tmp_path / "0")
    for name in "12":
        b = checkpoint(tmp_path / name)
        assert distance(a, b) < 1e-5
        for x, y in zip(moments(a), moments(b), strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-4 * float(y.abs().max()) + 1e-12)
        assert_same_log(tmp_path / "0", tmp_path / name)

@pytest.mark.parametrize("n, val_tokens, draws", [
    (10, 100_000, 1), (10, 100_000, 2), (4, 4 * SEQ_LEN, 1), (2, 1, 1)])
def test_bound_bits_per_byte_and_error_by_hand(n, val_tokens, draws, tmp_path):
    """Every window repeats one of twelve tokens, so that its bound is -T log p(token), whatever is
    masked. The first n of ten are read: less than a window means two, which make a pair."""
    law, n_bytes = Iid(torch.linspace(0, -9, 12).exp()), torch.tensor([0, *range(1, 12)])
    val = [0, 1, 4, 4, 7, 11, 2, 9, 3, 10]
    write_shard(tmp_path / "val_000000.bin", np.append(np.repeat(val, SEQ_LEN), [1, 2, 3]))
    cfg = train_mdlm.Config(vocab_size=12, seq_len=SEQ_LEN, micro_batch=8, val_tokens=val_tokens,
                            val_draws=draws)
    line, *_ = train_mdlm.evaluate(
        functools.partial(train_mdlm.nelbo_fn, law, cfg=cfg), cfg,
        train_mdlm.Windows(tmp_path, "val", SEQ_LEN), n_bytes, torch.device("cpu"), 0, 1)
    per_token, total = -law.p.log()[val[:n]], SEQ_LEN * n_bytes[val[:n]].sum()
    pairs = per_token.view(-1, 2).mean(1)
    error = pairs.std() / len(pairs) ** 0.5 if n > 2 else math.nan
    bpb = SEQ_LEN * per_token.sum() / math.log(2) / total
    by_hand = [float(x) for x in (per_token.mean(), error, bpb)]
    assert evaluations(line)[0] == pytest.approx(by_hand, abs=1e-4, nan_ok=True)
    assert f"tokens:{n * SEQ_LEN} bytes:{total}" in line

def test_evaluation_depends_on_the_draws_alone(short_run):
    """Masks come from a fixed seed, so that runs compare in pairs however memory cuts them. More
    draws are another estimate of the same bound."""
    folder, result = short_run
    before, (*_, (bound, error, bpb)) = tree(folder), evaluations(result.out)
    same, cut, more, test = (evaluations(train(
        "--eval_only=1", f"--init_from={folder / 'ckpt.pt'}", *flags).out)[0]
        for flags in ((), ("--micro_batch=4",), ("--val_draws=3",), ("--split=test",)))
    assert same == (bound, error, bpb)
    assert bpb == pytest.approx(bound / math.log(2), abs=1e-3)  # bytes
    assert cut == pytest.approx(same, abs=2e-4)
    assert 0 < abs(more[0] - bound) < 5 * error and test != same
    assert tree(folder) == before

def test_average_follows_its_formula(data, tmp_path):
    """ema <- d ema + (1 - d) p with d = min(ema, (1 + n) / (10 + n)) after step n = 0, 1, .."""
    out, decay, weights, average = tmp_path / "run", 0.2, [], {}
    flags = tiny(*CONSTANT_RATE, f"--data={data}", f"--ema={decay}")
    for n in range(4):
        more = (f"--out={out}", f"--steps={n + 1}")
        result = train("--resume=1", *more) if n else train(*flags, *more)
        assert result.status == 0, result.err
        state = checkpoint(out)
        weights.append({k: v.double() for k, v in state["model"].items()})
        d = min(decay, (1 + n) / (10 + n))
        average = {k: d * average.get(k, v) + (1 - d) * v for k, v in weights[n].items()}
        for k, v in average.items():
            assert state["ema"][k].dtype == torch.float32
            assert torch.allclose(state["ema"][k].double(), v, atol=1e-5), (n, k)
    # Begun at half of the steps, it knows nothing of the first ones.
    assert train(*flags, "--ema_start=0.5", "--steps=4", f"--out={tmp_path / 'late'}").status == 0
    for k, v in checkpoint(tmp_path / "late")["ema"].items():
        d = min(decay, 2 / 11)
        assert torch.allclose(v.double(), d * weights[2][k] + (1 - d) * weights[3][k], atol=1e-5)

def rates(data, out, *flags):
    result = train_tiny(*FROZEN[1:], f"--data={data}", f"--out={out}", "--lr=0.01", "--steps=10",
                   *flags)
    assert result.status == 0, result.err
    return np.array([x["lr"] for x in log(out) if "loss" in x]) / 0.01

def test_learning_rate_schedules(data, tmp_path):
    linear = rates(data, tmp_path / "a", "--cooldown=0.5", "--lr_end=0.1", "--warmup=4")
    cooling = [0.1 + 0.9 * (10 - s) / 5 for s in range(5, 10)]
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, *cooling], rel=0.005)
    cosine = rates(data, tmp_path / "b", "--lr_schedule=cosine", "--lr_end=0.2", "--warmup=2")
    falling = [0.2 + 0.4 * (1 + math.cos(math.pi * s / 8)) for s in range(8)]
    assert cosine == pytest.approx([0.5, 1.0, *falling], rel=0.005)
    assert rates(data, tmp_path / "c", "--cooldown=0") == pytest.approx([1.0] * 10)

def test_gradient_is_clipped_to_its_norm(data, tmp_path):
    """AdamW's first moment after one step is (1 - beta1) times the gradient that it was given."""
    norms = {}
    for clip in (0, 0.01, 100):
        out = tmp_path / str(clip)
        result = train_tiny("--optimizer=adamw", "--steps=1", f"--grad_clip={clip}",
                       "--adam_beta1=0.75", f"--data={data}", f"--out={out}")
        assert result.status == 0, result.err
        squares = [float(m.double().square().sum()) for m in moments(checkpoint(out))]
        norms[clip] = math.sqrt(sum(squares)) / 0.25
        # What is logged is the norm before clipping.
        assert log(out)[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-3)
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert norms[100] == pytest.approx(norms[0], rel=1e-5)

# Parameters of each preset: (vocabulary, lowest, highest). A published count is met within 1%, with
# the vocabulary it was published for: 65 characters in the case of Shakespeare.
SIZES = {
    "": (50257, 150e6, 162.5e6),
    "tiny": (256, 3.2e6, 3.3e6),
    "shakespeare_10m": (65, 10.7e6 * 0.99, 10.7e6 * 1.01),
    "shakespeare_10m_muon": (65, 10.7e6 * 0.99, 10.7e6 * 1.01),
    "fineweb_124m": (50257, 124e6 * 0.99, 124e6 * 1.01),
    "golf_19m": (1024, 19.19e6 * 0.99, 19.19e6 * 1.01),
    "tinystories_142m": (8192, 142e6 * 0.99, 142e6 * 1.01),
    "nano_block": (50257, 150e6, 162.5e6),
    "pg19_355m": (256, 355e6 * 0.99, 355e6 * 1.01),
}
HIDDEN = re.compile(r"layers\.\d+\.(q|k|v|o|up|gate|down)\.weight")

def preset_config(script, preset):
    cfg = script.make_config([f"--preset={preset}"] if preset else [])[0]
    return dataclasses.replace(cfg, vocab_size=SIZES[preset][0])

@pytest.mark.parametrize("script, preset", [
    (script, preset) for script in SCRIPTS for preset in ("", *presets(script))],
    ids=lambda x: getattr(x, "SCRIPT", x))
def test_preset_fits_its_description(script, preset):
    """Parameters, an optimizer for each, and a step at the full shape, traced without data."""
    cfg, (_, low, high) = preset_config(script, preset), SIZES[preset]
    script.validate(cfg, 1 if preset else 8)
    n_rows = min(cfg.micro_batch, cfg.batch_tokens // cfg.seq_len)
    noise = script.draw_noise(cfg, n_rows, seeded(), bound=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = script.Model(cfg).train()
        x0 = torch.zeros(n_rows, cfg.seq_len, dtype=torch.int64)
        script.nelbo_fn(model, x0, noise, cfg).sum().backward()
        optimizers = script.make_optimizers(model, cfg)
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    assert all(p.grad is not None for p in model.parameters())
    names = {p: name for name, p in model.named_parameters()}
    held = [[names[p] for g in o.param_groups for p in g["params"]] for o in optimizers]
    assert sorted(sum(held, [])) == sorted(names.values())
    if cfg.optimizer == "muon":
        assert set(held[0]) == set(filter(HIDDEN.fullmatch, names.values()))
    else:
        assert len(held) == 1

@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda x: x.SCRIPT)
def test_presets_of_one_name_can_be_compared(script):
    """Equal tokens and shapes: what the comparison of the objectives rests on."""
    for preset in {"", *presets(script)} & {"", *presets(train_mdlm)}:
        names = {*script.SHAPE_FIELDS, "seq_len", "steps", "batch_tokens", "data", "val_tokens"}
        if script is train_block and not preset:  # the record recipe has its own
            names -= {"value_residual"}
        if preset == "shakespeare_10m":  # as published
            names -= {"steps"}
        a, b = (preset_config(x, preset) for x in (script, train_mdlm))
        assert [getattr(a, k) for k in names] == [getattr(b, k) for k in names]

def test_a_parameter_without_an_optimizer_is_an_error():
    model = train_mdlm.Model(train_mdlm.Config(vocab_size=9, n_embd=12))
    model.layers[0].extra = torch.nn.Parameter(torch.zeros(12, 12))
    with pytest.raises(train_mdlm.UserError, match=r"layers\.0\.extra.* GROUPS"):
        train_mdlm.make_optimizers(model, model.cfg)

def test_flops():
    """Counted by hand: 12 layers of 12 D^2 weights but for SwiGLU's rounding, head, causal half;
    in blocks, two copies of them, the last one half, and the head on 17/32."""
    found = []
    for script, preset in ((gpt, "fineweb_124m"), (train_block, "")):
        cfg = preset_config(script, preset)
        with FakeTensorMode():
            layers = script.Model(cfg).layers
        weights = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
        found.append(script.flops_per_token(cfg, weights))
    by_hand = 6 * (12 * 12 * 768**2 + 50257 * 768) + 6 * 12 * 768 * 1024
    assert abs(found[0] / by_hand - 1) < 0.01
    by_hand = 6 * (2 * 12 * 12 * 768**2 - 10 * 768**2 + 50257 * 768 * 17 / 32)
    assert found[1] == by_hand + 12 * 11.5 * 768 * 1040

def test_non_finite_steps_are_skipped_and_ten_in_a_row_stop(tmp_path, monkeypatch):
    """The batches that hold a token that the text does not have get no finite loss."""
    loss_fn, poison, bad, n_steps = train_mdlm.loss_fn, 200, [3, 4, *range(8, 20)], 20

    def planted(model, x0, noise, cfg):
        return loss_fn(model, x0, noise, cfg) * (math.nan if (x0 == poison).any() else 1.0)

    monkeypatch.setattr(train_mdlm, "loss_fn", planted)
    rows = babble(n_steps * ROWS * SEQ_LEN).reshape(n_steps, -1)
    rows[[step - 1 for step in bad]] = poison
    write_shard(tmp_path / "train_000001.bin", rows.ravel())
    write_shard(tmp_path / "val_000000.bin", babble(600))
    write_meta(tmp_path, byte_table(256), tokenizer="byte")
    result = train_tiny(f"--data={tmp_path}", f"--out={tmp_path / 'run'}", f"--steps={n_steps}",
                        "--shuffle=0", "--ckpt_every=1", "--optimizer=adamw", "--lr=0.001")
    assert_refused(result, "non-finite")
    assert re.search(r"step:3\b.*skipped", result.out)
    losses = {x["step"]: x["loss"] for x in log(tmp_path / "run") if "loss" in x}
    # Steps 8 to 17 are the ten in a row; the last does not come to its line.
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [3, 4, *range(8, 17)]
    state = checkpoint(tmp_path / "run")
    assert state["step"] == max(losses.keys() - set(bad)) == 7
    assert all(x.isfinite().all() for x in state["model"].values())
    assert {float(s["step"]) for s in state["optimizers"][0]["state"].values()} == {5.0}

def test_windows_cover_the_shards_once_an_epoch(tmp_path):
    """Twelve windows in three shards whose tails are no windows, each of one token."""
    names = ["tiny_train.bin", "tiny_train_000002.bin", "tiny_train_000010.bin"]
    for name, tokens in zip(names, (range(5), range(5, 6), range(6, 12)), strict=True):
        write_shard(tmp_path / name, np.append(np.repeat(tokens, SEQ_LEN), [99] * 7))
    windows = train_mdlm.Windows(tmp_path, "train", SEQ_LEN)

    def order(**names):
        cfg = train_mdlm.Config(vocab_size=256, seq_len=SEQ_LEN, batch_tokens=2 * SEQ_LEN, **names)
        batches = [train_mdlm.read_batch(cfg, windows, step, 0, 1, torch.device("cpu"))
                   for step in range(18)]
        x0 = torch.cat([x0 for batch in batches for x0, _ in batch])
        assert (x0 == x0[:, :1]).all()
        return x0[:, 0].tolist()

    everything = list(range(12))
    assert order(shuffle=False) == everything * 3
    epochs = [order()[i:i + 12] for i in (0, 12, 24)]
    assert all(sorted(x) == everything for x in epochs)
    assert everything not in epochs and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order(seed=1) != order()

def test_another_vocabulary_of_the_same_size_is_refused(data, short_run, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    words = [b"", *(bytes([i ^ 1]) for i in range(1, 256))]
    write_meta(tmp_path / "data", words, tokenizer="bpe:256")
    for flags in (["--eval_only=1"], [*TINY, f"--out={tmp_path / 'run'}"]):
        result = train(f"--data={tmp_path / 'data'}", f"--init_from={short_run[0] / 'ckpt.pt'}",
                       *flags)
        assert_refused(result, "another vocabulary", f"{tmp_path}", "ckpt.pt", "--tokenizer=")

def test_no_compiler_is_said_and_survived(tmp_path):
    """On published shards of 16 bits, without a C++ compiler, a home, a network, or an é."""
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        tokens = np.random.default_rng(0).integers(0, 300, 1024)
        write_shard(tmp_path / name, tokens, itemsize=2, stated=0)
    write_meta(tmp_path, [b"x"] * 300)
    (tmp_path / "empty").mkdir()
    empty, nowhere = str(tmp_path / "empty"), "http://127.0.0.1:9"
    result = finish(launch(
        SCRIPT, *tiny("--compile=1", "--steps=2", f"--data={tmp_path}", f"--out={tmp_path}/é"),
        PATH=empty, HOME=empty, CXX="", https_proxy=nowhere, HTTPS_PROXY=nowhere,
        PYTHONIOENCODING="ascii"))
    assert result.status == 0 and "without torch.compile" in result.out, result
    assert "\\xe9/ckpt.pt" in result.out

@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_compiled_losses_equal_eager_ones(data, tmp_path):
    flags = tiny("--steps=3", "--eval_every=0", f"--data={data}", "--ema=0.5", "--lr=0.01")
    flags = [x for x in flags if x != "--compile=0"]
    assert train(*flags, "--compile=0", f"--out={tmp_path / 'eager'}").status == 0
    result = train(*flags, "--compile=1", f"--out={tmp_path / 'compiled'}")
    assert result.status == 0 and "without torch.compile" not in result.out, result
    assert_same_log(tmp_path / "compiled", tmp_path / "eager")
    # A compiled run's checkpoint is one like any other.
    states = [checkpoint(tmp_path / name)["model"] for name in ("compiled", "eager")]
    assert states[0].keys() == states[1].keys()

PROBE = """
import os, random, signal, sys, threading
import numpy as np, torch, torch.distributed as dist

def state():
    return [torch.get_num_threads(), threading.active_count(), torch.get_default_dtype(),
            torch.get_float32_matmul_precision(), torch.get_default_device(),
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(), random.getstate(), dict(os.environ),
            [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
            dist.is_initialized(), torch.cuda.is_initialized(), sorted(os.listdir("."))]

before, scripts = state(), ["train_sedd", "train_block", "train_mdlm", "gpt"]
while scripts:
    __import__(scripts.pop())
    assert state() == before and not {"sample", *scripts} & {*sys.modules}
"""

def test_import_does_nothing():
    assert finish(launch("-c", PROBE, PYTHONDONTWRITEBYTECODE="1")) == (0, "", "")

@pytest.mark.parametrize("script, flags, words", [
    (train_mdlm, "--n_embed=32", "--n_embed n_embd"),
    (train_mdlm, "n_embd=32", "n_embd=32"),
    (train_mdlm, "--preset=tinny", "--preset=tinny tiny"),
    (train_mdlm, "--steps=0", "--steps=0"),
    (train_mdlm, "--mlp=gelu", "--mlp=gelu swiglu"),
    (train_mdlm, "--n_head=3", "--n_head=3 --n_embd"),
    (train_mdlm, "--n_head=4 --n_kv_head=3", "--n_kv_head --n_head=4"),
    (train_mdlm, "--micro_batch=1", "--micro_batch=1 pairs"),
    (train_mdlm, "--micro_batch=6", "--batch_tokens=256 --micro_batch=6"),
    (train_mdlm, "--batch_tokens=250", "--batch_tokens=250 --seq_len=32"),
    (train_mdlm, "--schedule=cosine", "--schedule --estimator=bernoulli"),
    (train_mdlm, "--estimator=bernoulli --token_entropy=none.npy", "none.npy"),
    (train_mdlm, "--loss_weight=clipped", "--loss_weight=clipped --estimator=bernoulli"),
    (train_mdlm, "--data=nowhere", "nowhere prepare_data.py"),
    (train_mdlm, "--eval_only=1", "--eval_only --init_from"),
    (train_mdlm, "--init_from=nowhere.pt", "nowhere.pt"),
    (train_mdlm, "--vocab_size=100", "train_000001.bin vocabulary 100"),
    (train_mdlm, "--device=mps" if torch.cuda.is_available() else "--device=cuda", "--device="),
    (gpt, "--cond_dim=16", "--cond_dim=16"),
    (gpt, "--val_draws=4", "--val_draws=4"),
    (train_block, "--block_len=5", "--block_len=5 --seq_len=32"),
    (train_block, "--t_min=0.9", "--t_min=0.9 --t_max=0.8"),
    (train_block, "--doc_mask=1", "--bos_id=50256"),
    (train_block, "--block_len=32 --micro_batch=1", "pairs"),
    (train_sedd, "--graph=masked", "--graph=masked absorb"),
    (train_sedd, "--sigma_min=0 --noise=geometric", "--sigma_min=0.0"),
    (train_sedd, "--sigma_max=0.00001", "--sigma_max"),
], ids=lambda x: getattr(x, "SCRIPT", x))
def test_flag_is_refused(script, flags, words, data, tmp_path):
    result = train_tiny(f"--data={data}", "--steps=2", f"--out={tmp_path / 'run'}", *flags.split(),
                        script=script)
    assert_refused(result, *words.split())
    assert not (tmp_path / "run" / "ckpt.pt").exists()

def test_help_lists_every_flag():
    result = train("--help")
    assert result.status == 0
    for name in train_mdlm.Config.__dataclass_fields__:
        assert f" {name}: " in result.out

@pytest.mark.parametrize("name, content, words", [
    ("train_000001.bin", b"PK\x03\x04" * 1000, "train_000001.bin"),
    ("train_000002.bin", lambda old: old[:-1], "train_000002.bin cut short"),
    ("val_000000.bin", lambda old: old[:500], "val_000000.bin"),
    ("train_*.bin", None, "train"),
    ("val_*.bin", None, "val"),
    ("train_000001.bin", babble(40), "--batch_tokens"),
    ("val_000000.bin", babble(40), "val"),
    ("train_*.bin", np.full(900, 200), "train_000001.bin 200 128"),
    ("meta.json", b"{", "meta.json"),
    ("meta.json", b'{"tokenizer": "byte"}', "meta.json"),
    ("meta.json", None, "prepare_data.py meta"),
], ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_data_is_refused(name, content, words, data, tmp_path):
    """Before training: not at the first evaluation, hours later."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    if "128" in words:
        write_meta(folder, byte_table(128))
    if "--batch_tokens" in words:
        (folder / "train_000002.bin").unlink()
    for path in folder.glob(name):
        if content is None:
            path.unlink()
        elif isinstance(content, np.ndarray):
            write_shard(path, content)
        else:
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    before = tree(folder)
    result = train_tiny(f"--data={folder}", "--steps=2", f"--out={tmp_path / 'run'}")
    assert_refused(result, *words.split())
    assert tree(folder) == before and "step:" not in result.out

def bad_checkpoint(kind, good, path):
    state = torch.load(good, weights_only=True) | {"ema": None}
    code = Touch(path.parent / "executed")
    if kind == "cut":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("These are words, not weights.\n" * 50)
    elif kind == "code":
        torch.save(state | {"step": code}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": code}, protocol=2))
    elif kind == "foreign":
        torch.save({"model": state["model"]}, path)
    elif kind == "script":
        torch.save(state | {"script": "train_other"}, path)
    elif kind == "shape":
        state["model"]["embed.weight"] = state["model"]["embed.weight"][:-1]
        torch.save(state, path)

@pytest.mark.parametrize("how", ["init_from", "resume", "eval_only"])
@pytest.mark.parametrize("kind", ["cut", "text", "code", "pickle", "foreign", "script", "shape"])
def test_checkpoint_is_refused(kind, how, short_run, data, tmp_path):
    path = tmp_path / "ckpt.pt"
    bad_checkpoint(kind, short_run[0] / "ckpt.pt", path)
    before = tree(tmp_path)
    flags = {"resume": ("--resume=1", f"--out={tmp_path}"),
             "eval_only": ("--eval_only=1", f"--init_from={path}"),
             "init_from": tiny(f"--data={data}", "--steps=2", f"--out={tmp_path / 'run'}",
                               f"--init_from={path}")}
    assert_refused(train(*flags[how]), "ckpt.pt")
    assert tree(tmp_path) == before

@pytest.mark.parametrize("script, heir", [(gpt, train_mdlm), (train_mdlm, train_sedd)],
                         ids=lambda x: x.SCRIPT)
def test_another_scripts_checkpoint(script, heir, data, tmp_path):
    """Some scripts begin with the weights of others, exactly, and go on with none of their runs."""
    source, out = tmp_path / "source", tmp_path / "out"
    given = train_tiny("--steps=2", f"--data={data}", f"--out={source}", script=script)
    assert given.status == 0, given.err
    for other in (heir, train_block):
        blocks = ["--block_len=8"] if other is train_block else []
        flags = tiny("--steps=1", *FROZEN, *blocks, f"--init_from={source}/ckpt.pt",
                     f"--data={data}", f"--out={out / other.SCRIPT}")
        result = train(*flags, script=other)
        assert result.status == 0, result.err
        assert distance(checkpoint(source), checkpoint(out / other.SCRIPT)) == 0
        result = train("--eval_only=1", f"--init_from={source}/ckpt.pt", script=other)
        assert_refused(result, f"a checkpoint of {script.SCRIPT}.py")
    for other in (script, heir):
        result = train_tiny(f"--init_from={out}/train_block/ckpt.pt", f"--data={data}",
                            f"--out={tmp_path / 'run'}", script=other)
        assert_refused(result, "a checkpoint of")

@pytest.mark.parametrize("flags, words", [
    (["--resume=1", "--n_embd=64"], ["--n_embd=64", "32"]),
    ([*TINY, "--data={data}", "--init_from={run}/ckpt.pt", "--n_embd=64"], ["--n_embd=64", "32"]),
    (["--data={data}", "--steps=2", *TINY], ["--resume=1", "--out"]),
    (["--eval_only=1", "--init_from={run}/ckpt.pt", "--n_embd=64"], ["--n_embd=64", "32"]),
])
def test_run_is_not_touched_by_a_mistake(flags, words, short_run, data):
    folder, _ = short_run
    before = tree(folder)
    flags = [x.format(data=data, run=folder) for x in flags]
    result = train(f"--out={folder}", *flags)
    assert_refused(result, *words)
    assert tree(folder) == before
