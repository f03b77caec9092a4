"""Step 0 of 4: noise. Text dissolves into masks.

    python steps/0_noise.py [--data=FILE] [--steps=ROWS, 1000 or more]

The text is Tiny Shakespeare, after "python prepare_data.py shakespeare", or else Python's source.

A masked diffusion model learns to undo this. Every token is hidden with the same probability, which
grows with time t from 0 (all text) to 1 (all masks); a schedule says how. There is no network yet.

Checks: under every schedule, the number of hidden tokens in a row follows the binomial law. And if
the schedule is linear and t is drawn uniformly, every number from 0 to T is equally likely: step 1
draws the number itself and needs no schedule. p says how often true counts would be as far from the
law as these are, or further: anything but a number below .001 is fine.
"""
import argparse
import math
from pathlib import Path

import torch

T, MASK = 64, 256  # tokens in a row; a token is a byte, 0 to 255, and the mask comes after them
parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default="data/shakespeare/tinyshakespeare.txt")
parser.add_argument("--steps", type=int, default=20_000)
args = parser.parse_args()
files = [args.data] if args.data.exists() else sorted(Path(argparse.__file__).parent.glob("*.py"))
text = torch.tensor(list(b"".join(file.read_bytes() for file in files)[:2_000_000]))
print(f"text: {files[0]}{', ..' * (len(files) > 1)}, {len(text):,} bytes")
torch.manual_seed(0)

def show(row):  # tokens (T,) -> one line of text
    return "".join("░" if i == MASK else chr(i) if 31 < i < 127 else "/" for i in row.tolist())

def corrupt(x0, fraction):  # hide each token of x0 (B, T) with probability fraction (B, 1)
    is_mask = torch.rand(x0.shape) < fraction
    return torch.where(is_mask, MASK, x0)

def chi_square_p(counts, law):  # Pearson's test; outcomes expected less than 5 times are pooled
    expected = counts.sum() * law
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp(min=1e-9)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2).item()

SCHEDULES = {  # the probability that a token is hidden at time t
    "linear": lambda t: t,
    "cosine": lambda t: 1 - torch.cos(math.pi / 2 * t),
    "loglinear": lambda t: (1 - 1e-3) * t,
    "sqrt": lambda t: t.sqrt(),
    "clipped_cosine": lambda t: 0.05 + 0.9 * (1 - torch.cos(math.pi / 2 * t)),
    "sigmoid": lambda t: torch.sigmoid(10 * (t - 0.5)),
}
rows = torch.zeros(args.steps, T, dtype=torch.long)
k = torch.arange(T + 1.0)
log_choose = math.lgamma(T + 1) - torch.lgamma(k + 1) - torch.lgamma(T - k + 1)
print("share of hidden tokens, formula/counted;  p of their number at t = .5")
print(f"{'t =':14}", *(f"{t:<11}" for t in (0.25, 0.5, 0.75, 1.0)))
for name, schedule in SCHEDULES.items():
    shares, n_hidden = [], {}
    for t in (0.25, 0.5, 0.75, 1.0):
        fraction = schedule(torch.tensor(t))
        n_hidden[t] = (corrupt(rows, fraction) == MASK).sum(1)  # (B,)
        shares.append(f"{fraction:.3f}/{n_hidden[t].float().mean() / T:.3f}")
    fraction = schedule(torch.tensor(0.5))
    binomial = (log_choose + k * fraction.log() + (T - k) * torch.log1p(-fraction)).exp()
    p = chi_square_p(n_hidden[0.5].bincount(minlength=T + 1), binomial)
    print(f"{name:14}", *shares, f"p {p:.3f}")

t = torch.rand(len(rows), 1)  # a time of its own for every row
n_hidden = (corrupt(rows, t) == MASK).sum(1)
p = chi_square_p(n_hidden.bincount(minlength=T + 1), torch.full((T + 1,), 1 / (T + 1)))
print(f"linear, t uniform: 0 to {T} hidden tokens are equally likely, p {p:.3f}\n")
for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
    print(f"t = {t:.1f}  {show(corrupt(text[:T], t))}")
