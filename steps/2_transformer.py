"""Step 2 of 4: a denoiser with context, a bidirectional transformer.

    python steps/2_transformer.py [--data=FILE] [--steps=N]

Every token attends to every other one, before and behind it. What the network knows of positions
is a learned bias of attention for every distance. All else is as in step 1.

Check: for two tokens of a known law the bound of the exact denoiser must be their entropy. Beside
the bound stands the masked mean, over all hidden tokens of a batch at once, which many scripts call
their loss. Rows with many hidden tokens, the hard ones, weigh more in it, so it is larger, and it
is no bound. Before you compare two published losses, find out which of the two each one is.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

T, MASK = 64, 256  # tokens in a row; a token is a byte, 0 to 255, and the mask comes after them
WIDTH, HEADS = 96, 4
parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default="data/shakespeare/tinyshakespeare.txt")
parser.add_argument("--steps", type=int, default=800)
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
    nats = -log_p * (xt == MASK)
    return (nats / k).sum(1).mean(), nats.sum() / k.sum()

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, 2 * T - 1))  # by distance, left and right

    def forward(self, h):  # (B, T, WIDTH)
        x = F.layer_norm(h, (WIDTH,))
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(h.size(1))
        bias = 20 * self.bias[:, at[:, None] - at + T - 1]  # (HEADS, T, T); 20: learned sooner
        y = F.scaled_dot_product_attention(q, k, v, bias)  # every token sees every token
        h = h + self.out(y.transpose(1, 2).flatten(2))
        return h + self.down(F.relu(self.up(F.layer_norm(h, (WIDTH,)))))

def exact(x):
    return given[x.flip(1).clamp(max=3)].log()  # (B, 2, 3)

law = torch.tensor([[0.4, 0.1, 0.02], [0.1, 0.2, 0.02], [0.02, 0.02, 0.12]])  # P(first, second)
given = torch.cat((law / law.sum(1, keepdim=True), law.sum(0)[None]))  # (4, 3); 3 is the mask
drawn = law.flatten().multinomial(100_000, True)
nats, masked_mean = bound(exact, torch.stack((drawn // 3, drawn % 3), 1))
print(f"two tokens: entropy {torch.special.entr(law).sum() / 2:.3f} nats per token, "
      f"bound {nats:.3f}, masked mean {masked_mean:.3f}")

model = nn.Sequential(nn.Embedding(MASK + 1, WIDTH), Layer(), Layer(), Layer(),
                      nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))  # (B, T) -> (B, T, 256)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(args.steps):
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / args.steps)
    loss, _ = bound(model, train[torch.randint(len(train), (32,))])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:4}  bound {loss.item():.3f}")

rows = val[torch.randint(len(val), (1000,))]
with torch.no_grad():
    nats, masked_mean = bound(model, rows)
    xt = corrupt(rows[:4], 0.4 * T)
    guess = torch.where(xt == MASK, model(xt).argmax(-1), xt)
print(f"validation text: bound {nats:.3f}, masked mean {masked_mean:.3f} nats per token")
for states in zip(xt, guess, rows, strict=False):
    print("", *map(show, states), sep="\n")
