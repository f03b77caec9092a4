"""How good are samples? Generative perplexity, always beside entropy, repetition and real text.

    python sample.py --ckpt=out/train_mdlm --n=64 --length=256 --save=mdlm.jsonl
    python study/judge.py mdlm.jsonl block.jsonl --reference=books --judge=out/gpt --mauve=1

A judge, a checkpoint of gpt.py or a GPT-2 of transformers, reads the samples as text, in tokens of
its own. A model that repeats itself is easy to predict, so every figure stands beside that of real
text, and an asterisk marks an entropy more than .15 nats below that of real text.

    gen ppl     exp of nats per judge token, pooled; errors over samples, by the delta method
    bits/byte   by the judge: the one figure that compares across tokenizers
    entropy     of the frequencies of the tokens in a sample, its own; mean over samples
    distinct-n  different n-grams / n-grams of a sample, mean over samples
    repeated    share of tokens inside a 4-gram that the sample has had before
    retokenized share of judge tokens that are not those written; only with the same tokenizer
    mauve       --mauve=1: on the judge's last features at the last token; compares only for equal
                judge, n, k and c. Real text, two disjoint halves of it, is the ceiling

All texts are cut to --length tokens (0: the longest of the shortest file) and at the end of a
document (--cut=0 goes on behind it); those shorter than half are counted. Prompts and tokens that
begin a document are not scored. The judge begins with its own start, so that the first token
counts; --no_start=1 leaves that out, as most papers do. --reference is a prepared folder with the
tokens of the samples; its texts begin documents, as samples do; --start=anywhere: any windows.
"""
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from study import likelihood  # noqa: E402
from study.golf import require, run_cli  # noqa: E402
from study.likelihood import shown  # noqa: E402
from study.mauve import C, mauve  # noqa: E402

SCRIPT = sample.load_script(ROOT / "train_mdlm.py")  # reads data, like every script
LOW_ENTROPY = 0.15  # nats below real text
QUOTABLE = 2000  # texts a side, for MAUVE
GRAM = 4  # of repetition
ABOUT = "script", "parameters", "sampler", "seed", "device"
BATCH_TOKENS = 2**13

# ----------------------------------------------------------------------------- judges
class Judge(NamedTuple):
    name: str
    encode: Callable  # text -> tokens
    table: list  # bytes of every token
    start: list  # tokens in front of a text
    context: int  # tokens that it reads at once
    forward: Callable  # x (B, S) -> logits (B, S, V), features (B, S, D)
    sha256: str = ""
    data: str = ""  # what it was trained on

def gpt_judge(path, device, dtype):
    """A checkpoint of gpt.py; its features are what its head reads."""
    lm = sample.load(path, None, device=device, dtype=dtype)
    require(lm.kind == "gpt", f"--judge={path}: {lm.name} is not causal: take a gpt.py checkpoint")
    kept = []
    lm.model.layers[-1].register_forward_hook(lambda layer, inputs, h: kept.append(h))

    def forward(x):
        with lm.amp():
            logits = lm.model(x.to(lm.device))
        h = kept.pop().float()
        return logits, F.rms_norm(h, (h.size(-1),))

    return Judge(Path(path).name, lm.tokenizer.encode, lm.tokenizer.table, [lm.cfg.vocab_size],
                 lm.cfg.seq_len, forward, likelihood.digest(lm.path), Path(lm.cfg.data).name)

def gpt2_judge(name, device, dtype, no_start=False, model=None):
    """GPT-2 of transformers: the name of a model of the hub, or its folder."""
    try:
        import tiktoken
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ValueError(f"--judge={name}: needs transformers: pip install transformers; or take a "
                         "checkpoint of gpt.py") from None
    words = tiktoken.get_encoding("gpt2")
    device, _ = SCRIPT.pick_device(device, dtype, 0)
    with sample.naming(f"--judge={name}"):
        model = (model or GPT2LMHeadModel.from_pretrained(name)).to(device).eval()

    def forward(x):
        out = model(x.to(device), output_hidden_states=True)
        return out.logits.float(), out.hidden_states[-1].float()

    table = [words.decode_single_token_bytes(i) for i in range(words.eot_token)] + [b""]
    start = [] if no_start else [words.eot_token]
    return Judge(name, words.encode_ordinary, table, start, model.config.n_positions, forward)

def load_judge(name, device, dtype, no_start=False):
    is_gpt2 = name.startswith("gpt2") or Path(name, "config.json").exists()
    return gpt2_judge(name, device, dtype, no_start) if is_gpt2 else gpt_judge(name, device, dtype)

@torch.no_grad()
def read(judge, texts):
    """[tokens] -> [nats (len,) float64 of each], features (N, D) at their last tokens. What does
    not fit into the context is read in windows, each beginning in the middle of the one before. A
    token without anything in front of it gets 0."""
    room = judge.context - len(judge.start)
    nats = [np.zeros(len(tokens)) for tokens in texts]
    features = [None] * len(texts)
    pieces = [(i, at) for i, tokens in enumerate(texts)
              for at in range(0, max(1, len(tokens) - room + room // 2), room // 2)]
    pieces.sort(key=lambda piece: len(texts[piece[0]]))
    size = max(1, BATCH_TOKENS // judge.context)
    for first in range(0, len(pieces), size):
        batch = pieces[first:first + size]
        rows = [judge.start + texts[i][at:at + room] for i, at in batch]
        x = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(x, rows, strict=True):
            row[:len(tokens)] = torch.tensor(tokens, dtype=torch.long)  # behind it, causality
        logits, hidden = judge.forward(x)
        log_p = -F.cross_entropy(logits[:, :-1].mT, x[:, 1:].to(logits.device), reduction="none")
        skip = 1 - len(judge.start)
        for (i, at), row, h, tokens in zip(batch, log_p.cpu().double(), hidden, rows, strict=True):
            new = -row[:len(tokens) - 1].numpy()
            seen = room // 2 if at else skip  # scored in the window before
            nats[i][at + seen:at + room] = new[seen - skip:]
            if at + room >= len(texts[i]):
                features[i] = h[len(tokens) - 1].cpu()
    return nats, torch.stack(features)

# ----------------------------------------------------------------------------- figures
def trim(tokens, known, length, bos_id, cut):
    """Tokens and which of them were given -> both without what begins a document, up to length and,
    if cut, to the end of the first document."""
    pairs = list(zip(tokens, known, strict=True))[tokens[:1] == [bos_id]:][:length]
    if cut:
        end = next((i for i, (token, _) in enumerate(pairs) if token == bos_id), len(pairs))
        pairs = pairs[:end]
    pairs = [pair for pair in pairs if pair[0] != bos_id]
    return [token for token, _ in pairs], [is_known for _, is_known in pairs]

def ratio(above, below):
    """Sum of above / sum of below, and its standard error over samples (delta method)."""
    above, below = (np.asarray(x, float) for x in (above, below))
    mean, n = above.sum() / below.sum(), len(above)
    rest = ((above - mean * below) ** 2).sum()
    return float(mean), float((n / (n - 1) * rest) ** 0.5 / below.sum())

def entropy(tokens):
    """Nats of the frequencies of tokens in a sample."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())

def grams(tokens, n):
    return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]

def distinct(tokens, n):
    return len(set(grams(tokens, n))) / max(1, len(tokens) - n + 1)

def repeated(tokens):
    """Share of tokens inside a 4-gram that has been there before."""
    seen, is_again = set(), np.zeros(len(tokens), bool)
    for i, gram in enumerate(grams(tokens, GRAM)):
        is_again[i:i + GRAM] |= gram in seen
        seen.add(gram)
    return float(is_again.mean())

def measure(judge, tokenizer, rows, no_start=False):
    """rows: [(tokens, which were given)], without bos_id -> (figures, features (N, D))"""
    texts, scored, sizes, n_changed = [], [], [], 0
    for tokens, known in rows:
        parts = tokenizer.spans(tokens, known)
        given = np.concatenate([np.full(len(text.encode()), bool(kind)) for text, kind in parts])
        texts.append(judge.encode("".join(text for text, _ in parts)))
        sizes.append(np.array([len(judge.table[token]) for token in texts[-1]]))
        end = sizes[-1].cumsum()
        scored.append(~np.maximum.reduceat(given, end - sizes[-1]))  # nothing in it was given
        scored[-1][:no_start] = False
        own_end = np.cumsum([len(tokenizer.table[token]) for token in tokens]).tolist()
        written = set(zip([0, *own_end], own_end, strict=False))
        n_changed += len(end) - len(written & set(
            zip((end - sizes[-1]).tolist(), end.tolist(), strict=True)))
    nats, features = read(judge, texts)
    total, count, n_bytes = ([x[at].sum() for x, at in zip(xs, scored, strict=True)]
                             for xs in (nats, scored, sizes))
    per_token, bits = ratio(total, count), ratio(np.array(total) / math.log(2), n_bytes)
    new = [[t for t, is_known in zip(*row, strict=True) if not is_known] for row in rows]
    by_n = {f"distinct_{n}": float(np.mean([distinct(row, n) for row in new]))
            for n in range(1, 5)}
    ppl = math.exp(per_token[0])
    return dict(
        n=len(rows), tokens=sum(map(len, new)), judge_tokens=int(sum(count)),
        gen_ppl=(ppl, ppl * per_token[1]), nats_per_judge_token=per_token, bits_per_byte=bits,
        entropy=ratio([entropy(row) for row in new], [1] * len(new)), **by_n,
        repeated=float(np.mean(list(map(repeated, new)))),
        retokenized=n_changed / sum(map(len, texts)) if judge.table == tokenizer.table else None,
    ), features

# ----------------------------------------------------------------------------- command line
def read_samples(path):
    """A .jsonl file -> its first line, [(tokens, which of them were given)], passes a sample"""
    try:
        about, *lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        rows = []
        for line in lines:
            given = {at for at, _ in line.get("known", ())}
            rows.append((line["tokens"], [at in given for at in range(len(line["tokens"]))]))
        return about, rows, float(np.mean([line["nfe"] for line in lines]))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: not the samples of sample.py --save=FILE.jsonl ({e})") from None

def print_rows(done):
    rows = done["rows"]
    table, least = [], rows[0]["entropy"][0] - LOW_ENTROPY  # the first row is real text
    for row in rows:
        share = row["retokenized"]
        table.append([
            row["text"], str(row["n"]), f"{row['nfe']:g}" if row["nfe"] else "", str(row["tokens"]),
            shown(row["gen_ppl"], 2, "*" * (row["entropy"][0] < least)),
            shown(row["bits_per_byte"], 3), shown(row["entropy"], 3),
            " ".join(f"{row[f'distinct_{n}']:.3f}" for n in range(1, 5)),
            f"{row['repeated']:.3f}", "" if share is None else f"{share:.3f}",
            *[shown(row[key], 3) for key in ("mauve", "mauve_star") if key in row]])
    head = ["text", "n", "NFE", "tokens", "gen ppl", "bits/byte", "entropy", "distinct-1..4",
            "repeated", "retokenized", "mauve", "mauve star"]
    likelihood.print_table(table, head[:len(table[0])])
    if any(row["entropy"][0] < least for row in rows):
        print("\n\\* entropy more than .15 nats below real text: lower perplexity at lower entropy "
              "is no better text")

def run(flags):
    require(flags.files, "name the samples: FILE.jsonl..")
    require(flags.reference, "--reference=DATA: a prepared folder of real text")
    judge = load_judge(flags.judge, flags.device, flags.dtype, flags.no_start)
    files = [(Path(path).stem, *read_samples(path)) for path in flags.files]
    length = flags.length or min(max(len(tokens) for tokens, _ in rows) for _, _, rows, _ in files)
    cfg = SCRIPT.Config(data=flags.reference, split=flags.split, eval_only=True,
                        seq_len=length + (flags.start == "document"))  # whose start is not scored
    _, windows, meta = SCRIPT.open_data(cfg)
    tokenizer = sample.Tokenizer(meta, meta["vocab_size"])
    for name, about, _, _ in files:
        fits = about["tokenizer"] == tokenizer.name
        require(fits, f"{name}: {about['tokenizer']} tokens, other ones than {cfg.data} has")
    n, text = max(len(rows) for _, _, rows, _ in files), Path(cfg.data).name
    need = n * (1 + flags.mauve)  # the second half is what texts are compared with
    real = likelihood.take_windows(windows, meta, need, flags.start).tolist()
    require(len(real) == need, f"--reference={cfg.data}: {need} windows of {length} tokens are "
            f"needed, {flags.split} has {len(real)} for --start={flags.start}")
    fits = not flags.mauve or all(len(rows) == n for _, _, rows, _ in files)
    require(fits and n > 1, f"{' '.join(flags.files)}: two samples or more, the same number in all")
    real = [(row, [False] * len(row)) for row in real]
    name = f"real text, {text} {flags.split}"
    sets = [("", {}, real[n:], None)] * flags.mauve + [(name, {}, real[:n], None)]
    out, other = [], None
    for name, about, rows, nfe in sets + files:
        rows = [trim(*row, length, meta["bos_id"], flags.cut) for row in rows]
        n_short = sum(len(tokens) < length / 2 for tokens, _ in rows)
        rows = [(tokens, known) for tokens, known in rows if not all(known)]
        figures, features = measure(judge, tokenizer, rows, flags.no_start)
        if not name:
            other = features
            continue
        figures |= mauve(features, other, flags.seed) if flags.mauve else {}
        is_judge = " (the judge itself)" * (about.get("checkpoint") == judge.sha256)
        out.append(dict(text=name + is_judge, nfe=nfe, short=n_short, about=about, **figures))
    is_known = ", trained on this text" * (judge.data == text)
    first = "first token not scored" if flags.no_start else "all tokens scored"
    print(f"judge {judge.name}{is_known}, {first}; {length} tokens a text"
          f"{', cut at the end of a document' * flags.cut}; shorter than half:",
          *(row["short"] for row in out))
    for row in out[1:]:
        print(f"{row['text']}:", *(f"{key} {row['about'].get(key)}" for key in ABOUT))
    if flags.mauve:
        print(f"mauve[{judge.name}], n = {n}, k = {out[0]['k']}, c = {C}; of real text: the "
              f"ceiling{f'; do not quote it, n is below {QUOTABLE}' * (n < QUOTABLE)}")
    about = dict(vars(flags), program="judge", judge_sha256=judge.sha256, length=length)
    likelihood.finish(dict(about=about, rows=out), print_rows, flags.out)

def main(argv):
    run_cli("judge.py", run, argv, __doc__, reference="", judge="gpt2-large", length=0, cut=1,
            split="val", start="document", mauve=0, no_start=0, seed=0, device="auto",
            dtype="fp32", out="")

if __name__ == "__main__":
    main(sys.argv[1:])
