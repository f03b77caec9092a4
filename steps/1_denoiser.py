"""Step 1 of 4: a denoiser without context, and the loss that bounds the likelihood.

    python steps/1_denoiser.py [--data=FILE] [--steps=N]

Step 0 hid tokens; now a network learns to name them. Hide k of T tokens, k uniform over 1..T. Then
(Hoogeboom et al. 2021, arXiv 2110.02037, eq. 8)

    -log p(x0) <= E_k [ T/k  sum over the hidden tokens of -log p(token | what is visible) ]

Per token, so divided by T, this is the mean over a row's hidden tokens, averaged over rows.

This network looks at one position at a time. A hidden one holds the mask, whatever the text, so all
it can learn is how frequent every byte is. The check: the bound comes down to the entropy of those
frequencies and no further, 3.309 nats for Tiny Shakespeare. A published "MLP denoiser" with a loss
of 3.31 has learned just that. Step 2 lets tokens see each other.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

T, MASK = 64, 256  # tokens in a row; a token is a byte, 0 to 255, and the mask comes after them
WIDTH = 96
parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default="data/shakespeare/tinyshakespeare.txt")
parser.add_argument("--steps", type=int, default=500)
args = parser.parse_args()
files = [args.data] if args.data.exists() else sorted(Path(argparse.__file__).parent.glob("*.py"))
text = torch.tensor(list(b"".join(file.read_bytes() for file in files)[:2_000_000]))
train, val = (part.unfold(0, T, 1) for part in text.tensor_split([len(text) * 9 // 10]))  # (N, T)
print(f"text: {files[0]}{', ..' * (len(files) > 1)}, {len(text):,} bytes")
torch.manual_seed(0)

def show(row):  # tokens (T,) -> one line of text
    return "".join("░" if i == MASK else chr(i) if 31 < i < 127 else "/" for i in row.tolist())

def corrupt(x0, k):  # hide k (B, 1) random tokens of every row x0 (B, T)
    rank = torch.rand(x0.shape).argsort(1).argsort(1)
    return torch.where(rank < k, MASK, x0)

def bound(model, x0):  # of -log p(x0), nats per token, by one random masking of every row
    k = torch.randint(1, x0.size(1) + 1, (len(x0), 1))
    xt = corrupt(x0, k)
    log_p = model(xt).log_softmax(-1).gather(-1, x0[..., None])[..., 0]  # (B, T)
    return (-log_p * (xt == MASK) / k).sum(1).mean()

model = nn.Sequential(nn.Embedding(MASK + 1, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
                      nn.Linear(WIDTH, 256))  # (B, T) -> (B, T, 256)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(args.steps):
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / args.steps)
    loss = bound(model, train[torch.randint(len(train), (32,))])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:4}  bound {loss.item():.3f}")

entropy = torch.special.entr(train[:, 0].bincount() / len(train)).sum()
with torch.no_grad():
    nats = bound(model, train[torch.randint(len(train), (4000,))])
    p = model(torch.full((4, T), MASK)).softmax(-1)  # (4, T, 256)
print(f"training text: bound {nats:.3f}, entropy of its bytes {entropy:.3f} nats per token")
for row in torch.distributions.Categorical(p).sample():
    print("written:", show(row))
