"""Masked diffusion on GPT-2's network: train_mdlm.py with another Model.

    python study/convert.py --from=gpt2 --out=out/gpt2                    # its weights
    python study/gpt2_mdlm.py --init_from=out/gpt2 --data=DATA            # go on with them
    python sample.py --script=study/gpt2_mdlm.py --ckpt=out/gpt2_mdlm

GPT-2 has learned positions, LayerNorm with bias, GELU and a tied head, none of which the trunk of
train_mdlm.py can express, so its weights need a network of their own; data, noise, bound, training
and checkpoints are train_mdlm's. Two things change. Attention is no longer causal. And as GPT-2
answers for a token at the place before it, so does this network: it reads a start (GPT-2's
<|endoftext|>) before the window, and place i of its output, which has read token i - 1, answers for
token i. With a causal mask it is GPT-2, to the rounding. A log holds the source of train_mdlm.py.
"""
import dataclasses
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402

# A copy of its own, in which names are replaced below.
base = sample.load_script(ROOT / "train_mdlm.py")
globals().update({name: x for name, x in vars(base).items() if not name.startswith("__")})

@dataclasses.dataclass(frozen=True)
class Config(base.Config):
    """Flags as in train_mdlm.py, with the shape of the small GPT-2 and rates for fine-tuning."""
    seq_len: int = 512  # context T, tokens; below n_positions
    n_positions: int = 1024  # learned positions
    n_head: int = 12  # attention heads
    mlp_ratio: float = 4.0  # hidden width / D
    start_id: int = 50256  # token that is read before the window
    optimizer: str = "adamw"  # of hidden matrices; muon is possible
    lr: float = 3e-4  # hidden matrices
    embed_lr: float = 3e-4  # embeddings of tokens, which are the head, and of positions
    scalar_lr: float = 3e-4  # biases and gains
    warmup: int = 100  # steps of linear learning-rate warmup
    adam_beta1: float = 0.9  # AdamW
    adam_weight_decay: float = 0.0  # everything else
    grad_clip: float = 1.0  # global gradient norm

class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, hidden = cfg.n_embd, round(cfg.mlp_ratio * cfg.n_embd)
        self.cfg = cfg
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, D)

    def forward(self, h, is_causal):
        """h (B, S, D) -> (B, S, D)"""
        B, S, D = h.shape
        x = self.ln_1(h)
        q, k, v = (f(x).view(B, S, self.cfg.n_head, -1).transpose(1, 2)
                   for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # (B, H, S, D/H)
        y = self.o(y.transpose(1, 2).reshape(B, S, D))
        h = h + F.dropout(y, self.cfg.dropout, self.training)
        y = self.down(F.gelu(self.up(self.ln_2(h)), approximate="tanh"))
        return h + F.dropout(y, self.cfg.dropout, self.training)

class Model(nn.Module):
    """Denoiser: p(x0_i | xt) for every i at once."""
    def __init__(self, cfg):
        super().__init__()
        base.require(cfg.seq_len < cfg.n_positions, f"--seq_len={cfg.seq_len}: with the start it "
                     f"must fit --n_positions={cfg.n_positions}")
        self.cfg, V, D = cfg, cfg.vocab_size, cfg.n_embd
        self.embed = nn.Embedding(V + 1, D)  # the last row: the mask
        self.positions = nn.Embedding(cfg.n_positions, D)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(D)
        for p in self.parameters():  # as GPT-2, where there are no weights to start from
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, xt, sigma=None, rows=None, is_causal=False):
        """xt (B, T) int64 with mask_id = vocab_size -> logits (B, T, V), or (R, V) at the flat
        positions rows (R,). sigma is not read."""
        x = F.pad(xt, (1, 0), value=self.cfg.start_id)  # (B, T + 1)
        h = self.embed(x) + self.positions.weight[:x.size(1)]
        for layer in self.layers:
            h = layer(h, is_causal)
        h = self.ln_f(h[:, :-1])  # (B, T, D)
        if rows is not None:
            h = h.flatten(0, 1).index_select(0, rows)  # (R, D)
        return F.linear(h, self.embed.weight[:-1]).float()

SCRIPT = "gpt2_mdlm"
INIT_FROM = ()
SHAPE_FIELDS = (*base.SHAPE_FIELDS, "n_positions", "start_id")
GROUPS = {
    "hidden": r"layers\.\d+\.(q|k|v|o|up|down)\.weight",
    "embed": r"(embed|positions)\.weight",
    "head": "",
    "scalar": r".*(bias|ln_\w+\.weight)",
    "cond": "",
}
for name in ("Config", "Model", "SCRIPT", "INIT_FROM", "SHAPE_FIELDS", "GROUPS"):
    setattr(base, name, globals()[name])

if __name__ == "__main__":
    try:
        status = base.main(sys.argv[1:])
        if base.dist.is_initialized():
            base.dist.barrier()
            base.dist.destroy_process_group()
        sys.exit(status)
    except base.UserError as e:
        print(f"gpt2_mdlm.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
