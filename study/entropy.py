"""How predictable is each token? The file that train_mdlm --token_entropy=FILE.npy masks by.

    python study/entropy.py --judge=out/gpt --data=books --out=token_entropy.npy

A causal judge, a checkpoint of gpt.py or a GPT-2 of transformers, reads --tokens (10M) of the
training text. The entropy of a token id is the mean, over the places where it stands, of the
entropy of the judge's prediction there; --what=surprisal: of -log p(token). Ids that occur fewer
than --min_count (10) times are taken for average ones.

Training takes the total noise of a token times 2 - entropy / unit, between .5 and 1.5. With the
mean over the vocabulary as unit, which rare tokens rule, the text is masked more than its schedule
says: a second thing that changes. So FILE.npy (V,) float32 is in the unit for which the linear
schedule masks as much of the text as without, clamps included: a tilt w masks w / (1 + w) of a
token's occurrences. FILE.json has that unit in nats, the masked shares relative to the schedule's,
and how much of vocabulary and text has been counted.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from study.golf import require, run_cli  # noqa: E402
from study.judge import BATCH_TOKENS, SCRIPT, load_judge  # noqa: E402

TILT_MIN, TILT_MAX = 0.5, 1.5  # as in train_mdlm.py

@torch.no_grad()
def add_up(judge, batches, vocab_size, what):
    """Batches (B, T) of tokens -> (sum of nats, count) of every id, (V,) float64 each"""
    total, count = torch.zeros(2, vocab_size, dtype=torch.float64)
    for x0 in batches:
        start = torch.full((len(x0), 1), judge.start[0])
        logits, _ = judge.forward(torch.cat((start, x0[:, :-1]), 1))  # (B, T, V)
        if what == "surprisal":
            nats = F.cross_entropy(logits.mT, x0.to(logits.device), reduction="none")
        else:
            nats = torch.special.entr(logits.softmax(-1)).sum(-1)  # (B, T)
        total.index_add_(0, x0.flatten(), nats.flatten().cpu().double())
        count += x0.flatten().bincount(minlength=vocab_size)
    return total, count

def in_units(total, count, min_count):
    """Sums and counts (V,) -> entropies (V,) in the unit that masks as much of the text as without;
    {how the unit is taken: masked share, relative to that}, and that unit in nats"""
    is_known = count >= min_count
    entropy = total[is_known] / count[is_known]
    share = count[is_known] / count[is_known].sum()

    def masked(unit):
        tilt = (2 - entropy / unit).clamp(TILT_MIN, TILT_MAX)
        return float((share * 2 * tilt / (1 + tilt)).sum())

    low, high = 0.0, 4 * float(entropy.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if masked(middle) < 1 else (low, middle)
    result = torch.ones(len(count), dtype=torch.float64)
    result[is_known] = entropy / high
    mean = float((share * entropy).sum())
    shares = {"by vocabulary": masked(float(entropy.mean())), "by mean of text": masked(mean),
             "by text": masked(high), "unit": high}
    return result, shares

def run(flags):
    require(flags.what in ("entropy", "surprisal"), f"--what={flags.what}: entropy or surprisal")
    require(flags.data and not flags.files, "--data=DATA: a prepared folder")
    judge = load_judge(flags.judge, flags.device, flags.dtype)
    cfg = SCRIPT.Config(data=flags.data, split="train", seq_len=judge.context, eval_only=True)
    _, windows, meta = SCRIPT.open_data(cfg)
    V = meta["vocab_size"]
    is_same = sample.Tokenizer(meta, V).table[:V] == judge.table[:V]
    require(is_same, f"--data={cfg.data}: its tokens are not those of {flags.judge}")
    n = min(len(windows), max(1, flags.tokens // judge.context))
    places = np.linspace(0, len(windows) - 1, n).astype(int)
    size = max(1, BATCH_TOKENS // judge.context)
    batches = (windows.read(places[i:i + size].tolist(), V) for i in range(0, n, size))
    total, count = add_up(judge, batches, V, flags.what)
    result, shares = in_units(total, count, flags.min_count)
    is_known = count >= flags.min_count
    unit, ids = shares.pop("unit"), float(is_known.double().mean())
    occurrences = float(count[is_known].sum() / count.sum())
    print(f"{flags.what} of {n * judge.context} tokens of {cfg.data} by {judge.name}: "
          f"{float(total.sum() / count.sum()):.4f} nats a token, unit {unit:.4f} nats")
    print(f"counted {ids:.1%} of the ids, {occurrences:.2%} of the text")
    print("masked share / the schedule's, " + ", ".join(f"{k}: {v:.4f}" for k, v in shares.items()))
    path = Path(flags.out)
    np.save(path, result.float().numpy())
    about = dict(judge=judge.name, judge_sha256=judge.sha256, data=cfg.data, what=flags.what,
                 tokens=n * judge.context, min_count=flags.min_count, unit=unit, masked=shares,
                 coverage=dict(ids=ids, occurrences=occurrences))
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")

def main(argv):
    run_cli("entropy.py", run, argv, __doc__, judge="gpt2", data="", tokens=10_000_000,
            min_count=10, what="entropy", out="token_entropy.npy", device="auto", dtype="fp32")

if __name__ == "__main__":
    main(sys.argv[1:])
