"""The four lessons in steps/, shortened: what each one prints must meet its oracle."""
import contextlib
import io
import re
import sys
from pathlib import Path

STEPS = sorted((Path(__file__).resolve().parent.parent / "steps").glob("?_*.py"))

def run(i, n, monkeypatch, change=("", ""), until=None):
    """The output of step i with --steps=n, its text changed or cut off."""
    monkeypatch.setattr(sys, "argv", [STEPS[i].name, f"--steps={n}"])
    source = STEPS[i].read_text(encoding="utf-8").partition(until or "\0")[0]
    assert change[0] in source
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source.replace(*change), STEPS[i].name, "exec"), {"__name__": "lesson"})
    return out.getvalue()

def numbers(pattern, text):
    return [float(x) for x in re.search(pattern.replace("N", r"(\d+\.\d+)"), text).groups()]

def test_lessons_are_short():
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in STEPS]
    assert len(lengths) == 4 and max(lengths) <= 120

def test_noise_follows_its_law(monkeypatch):
    outs = [run(0, 2000, monkeypatch, ("< fraction", less)) for less in ("< fraction", "< 0.9")]
    right, wrong = (list(map(float, re.findall(r"p (\d\.\d+)$", out, re.M))) for out in outs)
    assert len(right) == len(wrong) == 7 and min(right) > 1e-3 > max(wrong)

def test_a_denoiser_without_context_reaches_the_entropy_of_bytes(monkeypatch):
    nats, entropy = numbers("bound N, entropy of its bytes N", run(1, 300, monkeypatch))
    assert abs(nats - entropy) < 0.05

def test_the_bound_is_the_entropy_and_the_masked_mean_is_not(monkeypatch):
    pattern = "entropy N nats per token, bound N, masked mean N"
    entropy, nats, masked_mean = numbers(pattern, run(2, 2, monkeypatch))
    assert abs(nats - entropy) < 0.01 and masked_mean - nats > 0.04
    out = run(2, 2, monkeypatch, ("torch.randint(1, x0.size(1) + 1", "torch.randint(1, x0.size(1)"),
              until="\nmodel =")
    assert numbers(pattern, out)[1] < entropy - 0.05

def test_samplers_meet_the_law_and_the_bound(monkeypatch):
    out = run(3, 2, monkeypatch, ("(len(val), (32,))", "(len(val), (8,))"))
    assert numbers("1 pass.*off by N", out) > [0.1] and numbers("2 pass.*off by N", out) < [0.01]
    assert numbers("sum to N", out) == [1.0]
    nats, in_random_order = numbers(r"bound on 32 rows N[\s\S]*first hitting.* N\n", out)
    assert abs(nats - in_random_order) < 0.05
    out = run(3, 2, monkeypatch, ("(rank < n)", "(rank < 2)"), until="\nmodel =")
    assert numbers("2 pass.*off by N", out) > [0.1]
