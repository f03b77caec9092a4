"""Likelihood of texts that a model was not trained on, in figures that compare across tokenizers.

    python study/zeroshot.py wikitext2 --ckpt=out/train_mdlm,out/gpt --out=zeroshot.json
    python study/zeroshot.py wikitext2 --input=wiki.test.raw --ckpt=out/gpt     # a file at hand

In wikitext2 and wikitext103 (raw) an article, from one line "= Title =" to the next, is a document;
in ptb the file; in lambada and lm1b every line or row. All are split into words, with spaces before
commas, which is undone as well as rules do it (--raw=1 leaves it). Documents begin with the
checkpoint's bos_id and are cut into windows, which its script evaluates as always. Printed:

    nats/token, ppl  of the checkpoint's tokens: compare among equal tokenizers
    ppl_word         exp(nats of the text / words of the original file, between white space):
                     compares across tokenizers. Other counts of WikiText add a word for every line
    bits/byte        nats of the text / ln 2 / bytes of the text that was read

The nats of the text are nats per token times all tokens; the last ones that fill no window are not
read. --split=test or validation; --tokens=N: no more than that; --draws of the bound's noise.
"""
import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
from study.golf import bound, open_checkpoint, require, run_cli  # noqa: E402
from study.likelihood import digest, finish, mean_and_error, print_table  # noqa: E402

CONVERTED = "refs/convert/parquet"  # where the hub keeps what was a program, without its name
SOURCES = {  # data set of the hub, configuration, field, revision
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", None),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text", None),
    "ptb": ("ptb-text-only/ptb_text_only", None, "sentence", CONVERTED),
    "lambada": ("EleutherAI/lambada_openai", "default", "text", None),
    "lm1b": ("billion-word-benchmark/lm1b", None, "text", CONVERTED),
}
COUNTS = "documents", "words", "tokens", "bytes"
TITLE = re.compile(r"\s*= (?!=)(.*[^= ]) =\s*")
RULES = [(re.compile(pattern, re.M), replacement) for pattern, replacement in (
    (r"[^\S\n]+", " "),
    (r"^ | $", ""),
    (r"\n{2,}", "\n"),
    (r" @([-,.])@ ", r"\1"),  # WikiText's hyphens and numbers
    (r"= (?==)|(?<==) (?==)", "="),  # its headings
    (r" (n't|'(?:s|t|re|ve|ll|d|m))\b", r"\1"),
    (r"(?<=s) '(?= )", "'"),
    (r"`` | ''", '"'),
    (r'" ([^"\n]*) "', r'"\1"'),
    (r" (?=[.,:;?!%)\]])", ""),
    (r"(?<=[(\[$£€]) ", ""),
)]

def detokenize(text):
    """Undo the splitting into words."""
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text.strip()

def read_lines(source, path, split):
    """The lines of the original file, from a path or from the hub"""
    if path:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        is_json = path.endswith((".jsonl", ".json"))
        return [json.loads(line)["text"] for line in lines if line] if is_json else lines
    name, config, key, revision = SOURCES[source]
    try:
        import datasets
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
        return [row[key].rstrip("\n") for row in rows]
    except Exception as e:
        raise ValueError(f"{source}: {name}, {split}: {type(e).__name__}: {str(e)[:200]}; with the "
                         "file at hand: --input=FILE") from None

def documents(source, lines, raw=False):
    if source.startswith("wikitext"):
        titles = [i for i, line in enumerate(lines) if TITLE.fullmatch(line)]
        texts = ["\n".join(lines[start:end])
                 for start, end in zip([0, *titles], [*titles, None], strict=True)]
    else:
        texts = [" ".join(line.strip() for line in lines)] if source == "ptb" else lines
    texts = [text if raw else detokenize(text) for text in texts]
    return [text for text in texts if text.strip()]

def evaluate(name, texts, n_words, flags):
    """A checkpoint -> its figures, by its own script, on shards in its tokens"""
    path, ckpt, module = open_checkpoint(name)
    ckpt["config"] |= dict(split="val", prompt_len=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        file = Path(folder, "texts.jsonl")
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        prepare_data.prepare(prepare_data.Config(
            name="files", input=(str(file),), val_input=(str(file),), tokenizer=str(path),
            out=folder))
        size = json.loads(Path(folder, "meta.json").read_text())["splits"]["val"]
        _, nats = bound(ckpt, module, argparse.Namespace(
            data=folder, val_tokens=flags.tokens or size["tokens"], val_draws=flags.draws,
            device=flags.device))
    mean, error = mean_and_error(nats)
    total = mean * size["tokens"]
    return dict(name=path.parent.name if path.name == "ckpt.pt" else path.stem,
                script=module.SCRIPT, checkpoint=digest(path), nats=(mean, error),
                is_bound=module.METRIC != "val_nll", ppl=math.exp(mean),
                ppl_word=math.exp(total / n_words), bpb=total / math.log(2) / size["bytes"],
                words=n_words, **size)

def print_rows(done):
    about = done["about"]
    print(f"{about['files'][0]}, {about['input'] or about['split']}, "
          f"{'as in the file' if about['raw'] else 'detokenized'}\n")
    table = [[row["name"], row["script"],
              f"{'≤ ' * row['is_bound']}{row['nats'][0]:.4f} ± {row['nats'][1]:.4f}",
              f"{row['ppl']:.3f}", f"{row['ppl_word']:.1f}", f"{row['bpb']:.4f}",
              *(f"{row[key]:,}" for key in COUNTS)] for row in done["rows"]]
    print_table(table, ["run", "script", "nats/token", "ppl", "ppl_word", "bits/byte", *COUNTS])

def run(flags):
    source, *rest = flags.files or [""]
    require(source in SOURCES and not rest and flags.ckpt,
            f"{' '.join(flags.files)}: give one of {', '.join(SOURCES)}, and --ckpt=PATH")
    lines = read_lines(source, flags.input, flags.split)
    texts = documents(source, lines, flags.raw)
    require(texts, f"--input={flags.input}: no text in it")
    n_words = sum(len(line.split()) for line in lines)
    rows = [evaluate(name, texts, n_words, flags) for name in flags.ckpt.split(",")]
    finish(dict(about=dict(vars(flags), program="zeroshot"), rows=rows), print_rows, flags.out)

def main(argv):
    run_cli("zeroshot.py", run, argv, __doc__, ckpt="", input="", split="test", raw=0, tokens=0,
            draws=0, device="auto", out="")

if __name__ == "__main__":
    main(sys.argv[1:])
