"""Published autoregressive weights -> a checkpoint that study/gpt2_mdlm.py goes on with.

    python study/convert.py --from=gpt2 --out=out/gpt2
    python study/gpt2_mdlm.py --init_from=out/gpt2 --data=DATA   # tokens of --tokenizer=gpt2

--from is a model of GPT-2's kind on the hub, or a folder of one; it takes the package transformers.
--tokenizer as in prepare_data.py, by default gpt2; DATA must be prepared with the same. No weight
is changed, only where it stands; the one new row, of the mask, is the mean of the embeddings.
"""
import dataclasses
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
from study import gpt2_mdlm  # noqa: E402
from study.golf import require, run_cli  # noqa: E402


def read_gpt2(name):
    """A model by its name -> GPT2LMHeadModel of transformers"""
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
    except ImportError:
        raise ValueError("needs a package: pip install transformers") from None
    config = AutoConfig.from_pretrained(name)
    fits = config.model_type == "gpt2" and config.activation_function == "gelu_new"
    fits &= config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    require(fits and config.tie_word_embeddings, f"--from={name}: not a network of GPT-2's kind")
    return GPT2LMHeadModel.from_pretrained(name)

def rename(source, n_layer):
    """GPT-2's weights by its names -> by those of gpt2_mdlm.Model"""
    embed = source["transformer.wte.weight"]
    weights = {"embed.weight": torch.cat((embed, embed.mean(0, keepdim=True))),
               "positions.weight": source["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        weights[f"ln_f.{kind}"] = source[f"transformer.ln_f.{kind}"]
        for i in range(n_layer):
            old, new = f"transformer.h.{i}", f"layers.{i}"
            for norm in ("ln_1", "ln_2"):
                weights[f"{new}.{norm}.{kind}"] = source[f"{old}.{norm}.{kind}"]
            # Its matrices are (in, out); q, k and v are one.
            qkv = source[f"{old}.attn.c_attn.{kind}"].t().chunk(3)
            parts = dict(zip("qkv", qkv, strict=True), o=source[f"{old}.attn.c_proj.{kind}"].t(),
                         up=source[f"{old}.mlp.c_fc.{kind}"].t(),
                         down=source[f"{old}.mlp.c_proj.{kind}"].t())
            weights |= {f"{new}.{part}.{kind}": x for part, x in parts.items()}
    return {name: x.detach().clone().contiguous() for name, x in weights.items()}

def convert(gpt2, meta):
    """-> a checkpoint for training by gpt2_mdlm.py"""
    shape, n_ids = gpt2.config, meta["vocab_size"]
    require(shape.vocab_size == n_ids, f"--tokenizer={meta['tokenizer']}: has {n_ids} tokens, the "
            f"network {shape.vocab_size}")
    cfg = gpt2_mdlm.Config(
        vocab_size=n_ids, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
        mlp_ratio=(shape.n_inner or 4 * shape.n_embd) / shape.n_embd, start_id=meta["bos_id"],
        n_positions=shape.n_positions, seq_len=min(512, shape.n_positions // 2))
    weights = rename(gpt2.state_dict(), shape.n_layer)
    gpt2_mdlm.Model(cfg).load_state_dict(weights)  # whether every one has its place
    return dict(format=3, script=gpt2_mdlm.SCRIPT, config=dataclasses.asdict(cfg), meta=meta,
                model=weights, ema=None, optimizers=[], step=0, seconds=0.0)

def run(flags):
    name = getattr(flags, "from")
    require(name and flags.out, "--from=MODEL and --out=FOLDER are needed")
    cfg = prepare_data.Config(tokenizer=flags.tokenizer)
    ckpt = convert(read_gpt2(name), prepare_data.make_tokenizer(cfg, [], []))
    path = Path(flags.out, "ckpt.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    gpt2_mdlm.save_checkpoint(str(path), ckpt)
    n = sum(x.numel() for x in ckpt["model"].values())
    print(f"{path}: {n / 1e6:.1f}M parameters of {name}", file=sys.stderr)

def main(argv):
    run_cli("convert.py", run, argv, __doc__, **{"from": ""}, tokenizer="gpt2", out="")

if __name__ == "__main__":
    main(sys.argv[1:])
