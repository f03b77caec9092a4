"""The memory that memory.py computes, against tensors that are there."""
import importlib
import types

import memory
import pytest
import torch
import torch.nn.functional as F


def small(name, **names):
    script = importlib.import_module(name)
    names = dict(vocab_size=11, n_layer=3, n_head=2, n_embd=32, seq_len=64, batch_tokens=512,
                 micro_batch=8) | names
    return script, script.Config(**names)

@pytest.mark.parametrize("name", memory.SCRIPTS)
def test_fake_and_real_tensors_take_the_same_memory(name, monkeypatch):
    script, cfg = small(name)
    if hasattr(script, "CPU_SHORT"):
        monkeypatch.setattr(script, "CPU_SHORT", 0)  # as on a GPU
    n_params, states, saved, layer = memory.measure(script, cfg)
    model = script.Model(cfg).train()
    noise = script.draw_noise(cfg, 8, torch.Generator().manual_seed(0))
    real = memory.saved_bytes(script, model, torch.zeros(8, 64, dtype=torch.int64), noise, cfg)
    assert saved == pytest.approx(real, rel=0.02) and layer == 0
    for optimizer in script.make_optimizers(model, cfg):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        sizes = [x.numel() for s in optimizer.state.values() for x in s.values() if x.ndim]
        states -= 4 * sum(sizes)
    assert n_params == sum(p.numel() for p in model.parameters())
    assert states == pytest.approx(2 * 4 * n_params, rel=0.01)  # weights and gradients

def test_norms_and_squares_are_kept_in_float32():
    """As CUDA's autocast does, unlike a CPU's."""
    h = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    for f in (lambda x: F.rms_norm(x, (1000,)), lambda x: x.relu().square()):
        script = types.SimpleNamespace(loss_fn=lambda model, x0, noise, cfg, f=f: f(h).sum())
        assert memory.saved_bytes(script, torch.nn.Linear(1, 1), None, None, None) >= 4000
