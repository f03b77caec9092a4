"""What a training step does on a GPU, seen without one: graphs, breaks, recompilations, waits.

The branch that CUDA takes, FlexAttention included, is compiled for CPU tensors and its graphs are
run as they were traced. Where the host waits for the GPU is counted in a run on the CPU: every line
of the loop that reads a number from a tensor, or copies one without non_blocking.
"""
import collections
import contextlib
import importlib
import itertools
import sys
from unittest import mock

import pytest
import torch
from runs import make_data, train_tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import sample
import train_block

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
SCRIPTS = ("gpt", "train_mdlm", "train_block", "train_sedd")
STEPS = 4
CASES = [(name, {}, "eager") for name in SCRIPTS] + [
    ("train_block", dict(checkpoint_layers=True), "aot_eager"),  # the backward pass, too
    ("train_block", dict(doc_mask=True, bos_id=3, n_kv_head=1, unet=True, estimator="bernoulli"),
     "eager"),
    ("train_mdlm", dict(estimator="bernoulli"), "eager"),
]

@contextlib.contextmanager
def as_on_cuda(script):
    """The choices that a CUDA device makes, for CPU tensors. FlexAttention's backward pass works on
    them, too, where it is not compiled; a guard says otherwise."""
    import torch.nn.attention.flex_attention as flex

    if not hasattr(flex, "_validate_device"):
        pytest.skip("this torch guards FlexAttention's backward pass on CPUs in another way")
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(flex, "_validate_device", lambda *args: None))
        stack.enter_context(patch(script, "FLEX", "cpu"))
        if hasattr(script, "CPU_SHORT"):
            stack.enter_context(patch(script, "CPU_SHORT", 0))
        yield

def compile_steps(name, names, backend):
    """Training steps with new noise each -> (graphs compiled, reasons of graph breaks)."""
    script = importlib.import_module(name)
    cfg = script.Config(**(dict(vocab_size=11, seq_len=32, n_layer=2, n_head=2, n_embd=32) | names))
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend(backend)
    step = torch.compile(script.loss_fn, backend=backend, dynamic=False)
    model = script.Model(cfg).train()
    with as_on_cuda(script):
        for seed in range(STEPS):
            gen = torch.Generator().manual_seed(seed)
            x0 = torch.randint(cfg.vocab_size, (4, cfg.seq_len), generator=gen)
            noise = script.draw_noise(cfg, 4, gen)
            with torch.autocast("cpu", torch.bfloat16):
                loss = step(model, x0, noise, cfg)
            loss.backward()
            assert loss.isfinite()
    return backend.frame_count, list(counters["graph_break"])

@pytest.mark.parametrize(("name", "names", "backend"), CASES)
def test_a_training_step_is_one_graph(name, names, backend):
    """No graph break, and no recompilation over steps."""
    assert compile_steps(name, names, backend) == (1, [])

# Where the host would wait for a GPU: methods of tensors that give numbers or values to the host.
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
ON_HOST = {"draw_noise", "read", "read_batch", "evaluate", "head_rows"}  # take CPU tensors

class Waits(collections.Counter):
    """{line of a script: how often the host waits there}."""
    def note(self, script, on_host):
        frame = sys._getframe(2)
        while frame and frame.f_code.co_filename != script.__file__:
            frame = frame.f_back
        names, outer = set(), frame
        while outer:
            names.add(outer.f_code.co_name)
            outer = outer.f_back
        if frame and not names & on_host:
            self[f"{frame.f_code.co_name}:{frame.f_lineno}"] += 1

    @contextlib.contextmanager
    def watch(self, script):
        with contextlib.ExitStack() as stack:
            def patch(name, is_wait, on_host=ON_HOST):
                method = getattr(torch.Tensor, name)

                def call(tensor, *args, **kwargs):
                    if is_wait(args, kwargs):
                        self.note(script, on_host)
                    return method(tensor, *args, **kwargs)
                stack.enter_context(mock.patch.object(torch.Tensor, name, call))

            for name in READS:
                patch(name, lambda args, kwargs: True)
            # A Python number that is put into a CUDA tensor is copied there, and waited for.
            patch("__setitem__", lambda args, kwargs: not isinstance(args[1], torch.Tensor))
            patch("to", lambda args, kwargs: not kwargs.get("non_blocking") and any(
                isinstance(x, str | torch.device) for x in (*args, kwargs.get("device"))),
                ON_HOST - {"read_batch"})
            yield

def waits_in_a_step(name, folder, *flags):
    """A short run on the CPU -> Waits from its third to its fourth update."""
    script = importlib.import_module(name)
    seen, at_update, set_rates = Waits(), [], script.set_rates

    def count(*args):
        at_update.append(Waits(seen))
        return set_rates(*args)

    data = make_data(folder)
    with mock.patch.object(script, "set_rates", count), seen.watch(script):
        done = train_tiny(f"--data={data}", f"--out={folder / 'run'}", "--steps=5",
                          "--eval_every=0", "--ckpt_every=0", "--log_every=100", "--micro_batch=4",
                          *flags, script=script)
    assert done.status == 0, done
    return at_update[3] - at_update[2]

@pytest.mark.parametrize(("name", "flags"), [
    *((name, ()) for name in SCRIPTS), ("train_mdlm", ("--estimator=bernoulli",)),
    ("train_block", ("--estimator=bernoulli",))])
def test_waits_of_a_step(name, flags, tmp_path):
    """Once: the host reads the loss, the signals and the norm of the gradients."""
    waits = waits_in_a_step(name, tmp_path, *flags)
    assert sum(waits.values()) == 1 and all(line.startswith("main:") for line in waits), waits

def test_a_failure_to_compile_is_said_in_one_line(tmp_path):
    broken = mock.Mock(side_effect=RuntimeError("no tool chain\nat all"))
    with (mock.patch.object(train_block, "FLEX", "cpu"),
          mock.patch("torch._inductor.compile_fx.compile_fx", broken)):
        done = train_tiny(f"--data={make_data(tmp_path)}", f"--out={tmp_path / 'run'}",
                          "--steps=1", "--compile=1", script=train_block)
    torch.compiler.set_stance("default")
    said = [x for x in done.out.splitlines() if x.startswith(("compiling", "running"))]
    assert done.status == 0 and len(said) == 2, done
    assert "with FlexAttention" in said[0] and "attention dense: " in said[1]

def test_the_longer_name_of_a_gpu_comes_first():
    """H100 PCIe before H100, L40S before L4."""
    for first, second in itertools.combinations(train_block.PEAK_FLOPS, 2):
        assert first not in second

class Float64OnHost(TorchFunctionMode):
    """MPS has no float64: what the network computes may become that only after .cpu()."""
    on_host = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            self.on_host += (out,)
        elif getattr(out, "dtype", None) == torch.float64:
            floats = [x for x in args if getattr(x, "dtype", None) == torch.float32]
            assert all(any(x is y for y in self.on_host) for x in floats), func
        return out

@pytest.mark.parametrize("name", SCRIPTS)
def test_scores_and_samples_need_no_float64_of_the_device(name, tmp_path, monkeypatch):
    flags = f"--data={make_data(tmp_path)}", f"--out={tmp_path / 'run'}", "--steps=1"
    assert train_tiny(*flags, script=importlib.import_module(name)).status == 0
    lm = sample.load(tmp_path / "run/ckpt.pt")
    monkeypatch.setattr(sample, "float64", lambda x: x.cpu().double())  # as on MPS
    with Float64OnHost():
        assert lm.score("a text").nats > 0
        assert lm.generate(n=2, length=8)
