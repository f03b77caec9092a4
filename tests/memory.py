"""Memory that a training step takes, computed without a GPU and without the memory.

    python tests/memory.py train_block                                 # the default of the script
    python tests/memory.py train_sedd --preset=pg19_355m --micro_batch=8 --checkpoint_layers=1

A step is traced on fake tensors, in eager mode and in bf16 by the rules of CUDA's autocast, which
norms and squares in float32, and what is kept is added up:

    states       float32 weights, gradients, momentum or moments, and the average if there is one
    saved        what autograd keeps of a micro-batch for the backward pass, weights apart
    recomputed   with --checkpoint_layers=1: what one layer keeps while its backward pass runs

The rest of the backward pass, logits above all, and the allocator's waste come on top;
torch.compile saves less. The vocabulary is GPT-2's unless --vocab_size or the data says otherwise.
"""

import contextlib
import dataclasses
import importlib
import os
import re
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SCRIPTS = ("gpt", "train_mdlm", "train_block", "train_sedd")
BYTE_DATA, GPT2 = ("stdlib", "shakespeare", "pg19"), 50257
GIB = 2**30

class Kept:
    """Saved-tensor hooks that count every storage once, the parameters' own apart."""
    def __init__(self, model):
        self.skip = {p.untyped_storage()._cdata for p in model.parameters()}
        self.sizes, self.alive = {}, []

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.skip:
            self.sizes[storage._cdata] = storage.nbytes()
            self.alive.append(storage)  # else its number may be given again
        return tensor

def in_float32(f):
    return lambda x, *args, **kwargs: f(x.float(), *args, **kwargs)

def saved_bytes(script, model, x0, noise, cfg):
    """Bytes that the backward pass of loss_fn needs."""
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16), \
            mock.patch.object(F, "rms_norm", in_float32(F.rms_norm)), \
            mock.patch.object(torch.Tensor, "square", in_float32(torch.Tensor.square)):
        script.loss_fn(model, x0, noise, cfg)
    return sum(kept.sizes.values())

def outside(f):
    """f by real tensors: its answer is a number, which fake ones do not have."""
    def call(*args):
        with unset_fake_temporarily():
            return f(*args)
    return call

def measure(script, cfg):
    """-> (parameters, bytes of states, bytes saved, bytes recomputed)."""
    rows, gen = min(cfg.micro_batch, cfg.batch_tokens // cfg.seq_len), torch.Generator()
    noise = script.draw_noise(cfg, rows, gen.manual_seed(0))
    # The short attention of CPUs is not what a GPU runs.
    gpu = {"CPU_SHORT": 0, "head_rows": outside(getattr(script, "head_rows", None))}
    with contextlib.ExitStack() as stack:
        for name in gpu.keys() & vars(script).keys():
            stack.enter_context(mock.patch.object(script, name, gpu[name]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = script.Model(cfg).train()
        x0 = torch.zeros(rows, cfg.seq_len, dtype=torch.int64)
        fake = type(noise)(*(torch.zeros(x.shape, dtype=x.dtype) for x in noise))
        saved = saved_bytes(script, model, x0, fake, cfg)
        layer = 0
        if cfg.checkpoint_layers:
            two = [saved_bytes(script, script.Model(dataclasses.replace(
                cfg, n_layer=n, checkpoint_layers=False)).train(), x0, fake, cfg) for n in (2, 3)]
            layer = two[1] - two[0]
        n_params = sum(p.numel() for p in model.parameters())
        matrices = [p for n, p in model.named_parameters()
                    if re.fullmatch(script.GROUPS["hidden"], n)]
        hidden, rows = (sum(sizes) for sizes in zip(
            *((p.numel(), len(p)) for p in matrices), strict=True))
    # Weight and gradient; Muon keeps one more and NorMuon one a row, AdamW two; the average.
    n_states = 2 * n_params + 2 * (n_params - hidden) + n_params * bool(cfg.ema)
    if cfg.optimizer == "muon":
        n_states += hidden + rows * bool(cfg.muon_beta2)
    else:
        n_states += 2 * hidden
    return n_params, 4 * n_states, saved, layer

def main(argv):
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(__doc__)
        return
    if argv[0].removesuffix(".py") not in SCRIPTS:
        print(f"memory.py: no script {argv[0]}: there are {', '.join(SCRIPTS)}", file=sys.stderr)
        raise SystemExit(2)
    script = importlib.import_module(argv[0].removesuffix(".py"))
    cfg = script.make_config(argv[1:])[0]
    vocab = 256 if os.path.basename(cfg.data) in BYTE_DATA else GPT2
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or vocab)
    script.validate(cfg, 1)
    n_params, states, saved, layer = measure(script, cfg)
    rows = min(cfg.micro_batch, cfg.batch_tokens // cfg.seq_len)
    parts = f"states {states / GIB:.2f}, saved {saved / GIB:.2f}"
    parts += f", recomputed {layer / GIB:.2f}" if layer else ""
    print(f"{argv[0]}: {n_params / 1e6:.2f}M parameters, {rows} x {cfg.seq_len} tokens of "
          f"{cfg.vocab_size}: {parts} = {(states + saved + layer) / GIB:.1f} GiB")

if __name__ == "__main__":
    main(sys.argv[1:])
