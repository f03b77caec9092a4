"""Step 3 of 4: writing. Begin with masks alone and reveal tokens, pass by pass.

    python steps/3_sampling.py [--data=FILE] [--steps=N]

The tokens of one pass are drawn independently of each other: few passes are fast and wrong, one
random token a pass is exact (first hitting, arXiv 2409.02908). The same loop scores a text: it
reveals the tokens of that text and sums their -log p. That is exact, because which ones come next
depends on visible tokens alone; in random order its mean is the bound of step 1.

Checks: two tokens of a known law are right after two passes, wrong after one; the probabilities of
all texts of two bytes, the surest byte first, sum to 1. From here, go on to train_mdlm.py.
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
    return (-log_p * (xt == MASK) / k).sum(1).mean()

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

@torch.no_grad()
def decode(model, shape, n_revealed, order, x0=None):
    """Reveal until n_revealed[i] tokens stand after pass i: drawn ones, or those of x0.
    -> the states (B, T) of all passes, -log p (B,) of the last one."""
    states, nats = [torch.full(shape, MASK)], torch.zeros(shape[0])
    for n in n_revealed:
        is_mask = states[-1] == MASK
        log_p = model(states[-1]).log_softmax(-1)  # (B, T, V)
        score = torch.rand(shape) if order == "random" else log_p.amax(-1)
        rank = score.masked_fill(~is_mask, 1).argsort(1, descending=True).argsort(1)
        is_new = is_mask & (rank < n)
        token = torch.distributions.Categorical(logits=log_p).sample() if x0 is None else x0
        nats -= (log_p.gather(-1, token[..., None])[..., 0] * is_new).sum(1)
        states.append(torch.where(is_new, token, states[-1]))
    return states, nats

def exact(x):
    return given[x.flip(1).clamp(max=3)].log()  # (B, 2, 3)

law = torch.tensor([[0.4, 0.1, 0.02], [0.1, 0.2, 0.02], [0.02, 0.02, 0.12]])  # P(first, second)
given = torch.cat((law / law.sum(1, keepdim=True), law.sum(0)[None]))  # (4, 3); 3 is the mask
for n_revealed in ([2], [1, 2]):
    drawn = decode(exact, (20_000, 2), n_revealed, "random")[0][-1]
    error = (3 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=9) / len(drawn) - law.flatten()
    print(f"two tokens in {len(n_revealed)} pass(es): probabilities off by {error.abs().max():.3f}")

model = nn.Sequential(nn.Embedding(MASK + 1, WIDTH), Layer(), Layer(), Layer(),
                      nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))  # (B, T) -> (B, T, 256)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(args.steps):
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / args.steps)
    loss = bound(model, train[torch.randint(len(train), (32,))])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:4}  bound {loss.item():.3f}")

two = torch.cartesian_prod(torch.arange(256), torch.arange(256))
total = decode(model, two.shape, [1, 2], "confidence", two)[1].neg().exp().sum()
print(f"probabilities of all texts of two bytes, surest first: they sum to {total:.4f}")
rows, even = val[torch.randint(len(val), (32,))], range(4, T + 1, 4)
cosine = (T * (1 - torch.cos(torch.pi / 2 * torch.arange(1, 17) / 16))).ceil()
print(f"bound on 32 rows {sum(bound(model, rows).item() for _ in range(30)) / 30:.3f}")
print("sampler        passes  entropy  nats per token of these rows")
for name, n_revealed, order in (
        ("one pass", [T], "random"), ("random", even, "random"), ("confidence", even, "confidence"),
        ("cosine pace", cosine, "confidence"), ("first hitting", range(1, T + 1), "random")):
    states, _ = decode(model, rows.shape, n_revealed, order)
    _, nats = decode(model, rows.shape, n_revealed, order, rows)
    entropy = sum(torch.special.entr(x.bincount() / T).sum() for x in states[-1]) / len(rows)
    print(f"{name:14} {len(n_revealed):6}  {entropy:7.3f}  {nats.mean() / T:.3f}")
print(*(show(x[0]) for x in states[::16]), sep="\n")
