"""A trained model as a folder of the Hugging Face hub: weights, settings, tokenizer, model card.

    python study/publish.py --ckpt=out/train_mdlm --repo=OWNER/NAME      writes out/hub/NAME and
                                                                         uploads it
    python study/publish.py .. --dry_run=1                               writes it only
    python sample.py --ckpt=hf:OWNER/NAME                                reads it

ckpt.pt holds the weights alone (the averaged ones, where there are some), config.json the settings
of the run, tokenizer.json its tokens for the tokenizers library. README.md is filled from the
run's log. Other flags: --out=FOLDER, and --script=FORK.py, which is published with muon.py.
Uploading needs huggingface_hub and its login.
"""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from study.golf import open_checkpoint, require, run_cli  # noqa: E402

NO_FLAG = ("out", "preset", "resume", "eval_only")  # the other settings are all there

def printed_bytes():
    """{byte: character}: how byte-level BPE writes bytes, as GPT-2 does."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}

def tokenizer_json(meta):
    """meta of a checkpoint -> tokenizer.json: byte-level BPE, for bytes without merges."""
    words = map(chr, range(256)) if meta["tokenizer"] == "byte" else meta["token_bytes"]
    table = [word.encode("latin-1") for word in words]
    ranks = {word: i for i, word in enumerate(table) if word and i != meta["bos_id"]}
    show = printed_bytes()
    spell = {word: "".join(show[b] for b in word) for word in ranks}
    merges = []  # tiktoken joins any two tokens that are one together, the lowest first
    for word in ranks:
        halves = [(word[:i], word[i:]) for i in range(1, len(word))]
        halves = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        halves.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spell[a], spell[b]] for a, b in halves]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": meta["pattern"] is not None}
    special = {"id": meta["bos_id"], "content": "<|endoftext|>", "single_word": False,
               "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {"<|endoftext|>": meta["bos_id"]} | {spell[word]: i for word, i in ranks.items()}
    return {"version": "1.0", "added_tokens": [special], "pre_tokenizer": byte_level,
            "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}

def command(config, module, script):
    """The flags that are not the script's defaults, as a shell takes them."""
    default = vars(module.Config())
    flags = [f"--{name}={int(value) if isinstance(value, bool) else value}"
             for name, value in config.items()
             if name not in NO_FLAG and value != default.get(name)]
    return f"python {script}.py " + " ".join(map(shlex.quote, flags))

def figures(path, metric):
    """The last evaluation in the run's log -> rows of a table."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.findall(rf"^step:\S+ {metric}:(\S+)\+-(\S+) bpb:(\S+) .*tokens:(\d+)", text, re.M)
    if not found:
        return "| no evaluation in its log | |"
    nats, error, bits, n = found[-1]
    bound = "" if metric == "val_nll" else "at most "
    return (f"| nats per token | {bound}{nats} ± {error} |\n| bits per byte | {bound}{bits} |\n"
            f"| validation tokens | {int(n):,} |")

def write_folder(flags, folder):
    """Everything that is uploaded."""
    path, ckpt, module = open_checkpoint(flags.ckpt, flags.script)
    own = f"{ckpt['config']['out']}/ckpt.pt"  # --init_from of a run that was resumed
    config = {k: v for k, v in ckpt["config"].items() if k not in NO_FLAG and v != own}
    weights = ckpt["ema"] or ckpt["model"]
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"model": weights, "ema": None, "optimizers": []}
    module.save_checkpoint(str(folder / "ckpt.pt"), ckpt | kept)
    card = Path(__file__).with_name("card.md").read_text(encoding="utf-8").format(
        name=folder.name, repo=flags.repo, script=ckpt["script"], step=ckpt["step"],
        millions=sum(x.numel() for x in weights.values()) / 1e6,
        trained=ckpt["step"] * config["batch_tokens"], data=Path(config["data"]).name,
        tokenizer=ckpt["meta"]["tokenizer"], seq_len=config["seq_len"],
        weights="averaged" if ckpt["ema"] else "last",
        command=command(config, module, ckpt["script"]),
        figures=figures(path.with_name("log.txt"), module.METRIC),
        fork=f" --script={Path(flags.script).name}" if flags.script else "")
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name, content in (("config", {"script": ckpt["script"], **config}),
                          ("tokenizer", tokenizer_json(ckpt["meta"]))):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for file in (flags.script, ROOT / "muon.py") if flags.script else ():
        shutil.copy(file, folder)

def publish(flags):
    require(flags.repo.count("/") == 1 and all(flags.repo.split("/")),
            f"--repo={flags.repo}: write OWNER/NAME")
    folder = Path(flags.out or f"out/hub/{flags.repo.split('/')[1]}")
    write_folder(flags, folder)
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    if flags.dry_run:
        return
    try:
        from huggingface_hub import HfApi

        HfApi().create_repo(flags.repo, exist_ok=True)
        HfApi().upload_folder(repo_id=flags.repo, folder_path=folder)
    except Exception as e:  # its errors share no base class across versions
        require(False, f"--repo={flags.repo}: not uploaded: {type(e).__name__}: {e}")
    print(f"https://huggingface.co/{flags.repo}")

def main(argv):
    run_cli("publish.py", publish, argv, __doc__, ckpt="", repo="", out="", script="", dry_run=0)

if __name__ == "__main__":
    main(sys.argv[1:])
