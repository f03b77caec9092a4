"""Text -> token shards that every training script reads.

    python prepare_data.py stdlib                  # this Python's own source code; no network
    python prepare_data.py shakespeare             # Tiny Shakespeare, 1.1 MB
    python prepare_data.py tinystories|pg19|finewebedu|openwebtext [--max_tokens=N]    # streamed
    python prepare_data.py hf:OWNER/NAME [--config=C] [--split=S] [--text_key=FIELD]   # streamed
    python prepare_data.py files --input=PATH... [--val_input=PATH...] --tokenizer=gpt2
    python prepare_data.py finewebedu10B --max_tokens=900_000_000    # published GPT-2 shards
    python prepare_data.py meta FOLDER             # write the meta.json that such shards lack

PATH is a file, a folder, a glob, or - for standard input. What it holds is told by its content: gz,
xz, bz2, zst and zip are unpacked; rows of JSON, csv, parquet and arrow give their field --text_key
(a.b is b in a); all else is text, one document or many (--split_on). Tokenizers: byte, gpt2, bpe:N
(trained on the corpus), or the PATH of a prepared folder, a checkpoint, or a tokenizer.json with
byte-level BPE. All flags are the fields of Config below.

A shard is the llm.c format: 256 little-endian int32 ([0] 20240520, [1] 1, [2] tokens, [3] bytes
per token, [4] vocab size), then uint8 or uint16 tokens. Every document starts with bos_id, which
stands nowhere else. Validation is the source's own, or --val_input, or the documents of lowest hash
up to 2% of the text, or the last 10% of fewer than 20 documents. The same command after Ctrl-C,
kill -9 or a full disk goes on after the last file that was finished.
"""
import bz2
import contextlib
import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
from tqdm import tqdm

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
PIECE_CHARS = 1 << 19  # longest text tokenized in one go, and size of a batch of short ones
SAVE_SECONDS = 3  # a file that is finished is noted this often
HASH_CHARS = 1 << 16  # a document's split depends on its start, since the rest may not be read yet
MAX_ROW = 1 << 26  # longest JSON row, csv field or separated document: it is held whole
MAX_LOSS = 0.01  # a text of which more characters cannot be decoded is refused
BPE_CHARS = 50_000_000  # a BPE is trained on this much of the training text, from the start
FEW_DOCUMENTS, TAIL, VAL_FRACTION = 20, 0.1, 0.02
SCAN_DOCUMENTS = 2000  # the hash that gives VAL_FRACTION is found on the first of them
SMALL_CORPUS = 50_000_000  # tokens; the command at the end takes a preset below
STATE, START = "state.json", {"part": 0, "counts": {}, "totals": {}}
HIDDEN, HELD_OUT = re.compile(r"(.*/)?(\.|__MACOSX)"), ("val", "test")
READABLE = re.compile(r".*\.(txt|md|py|jsonl?|ndjson|csv|tsv|parquet|arrow)"
                      r"(\.(gz|xz|zst|bz2|zip))?", re.I)
NOT_TEXT = re.compile(rb"%PDF|\{\\rtf|\xd0\xcf\x11\xe0|.{257}ustar", re.S)
JSON = re.compile(r"[\[\s]*\{\s*\"[^\"\n]*\"\s*:")
HTML = re.compile(r"<(!doctype|!--|\?xml|(html|head|body|title|meta|div|p)\b)", re.I)
SAFE = re.compile(r".*[^\W_](?=[ \n])", re.DOTALL)  # as much text as may be cut off
SEPARATORS = {"line": r"\r?\n", "blank": r"\r?\n(?:[ \t]*\r?\n)+"}
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BOS_TEXTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "</s>", "<eos>")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TOKENIZER_KEYS = ("tokenizer", "vocab_size", "bos_id", "pattern", "token_bytes", "byte_length")
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
PUBLISHED, PUBLISHED_SHARDS, PUBLISHED_TOKENS = "kjj0/finewebedu10B-gpt2", 99, 100_000_000
HUB = {  # NAME -> data set, configuration, tokenizer
    "tinystories": ("roneneldan/TinyStories", "", "bpe:8192"),
    "pg19": ("emozilla/pg19", "", "byte"),
    "finewebedu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "gpt2"),
    "openwebtext": ("Skylion007/openwebtext", "", "gpt2"),
}
SPLITS = {"test": "test", "validation": "val", "valid": "val", "val": "val", "dev": "val",
          "train": "train"}
SPELLED = "times <|endoftext|> is plain text; if it separates documents: --split_on='<|endoftext|>'"
REPEATED = "documents left out: the same text is held out, or came before"
KEPT = "training documents, all there are, are held out, too: the loss tells little"
NAMES = ("stdlib", "shakespeare", *HUB, "hf:OWNER/NAME", "files", "finewebedu10B", "meta")
# A file of a corpus. split: None = by split_rule; held: rows of the hub, or a temporary file
Part = namedtuple("Part", "path split stamp held", defaults=[None])


@dataclasses.dataclass(frozen=True)
class Config:
    name: tuple = ()  # the source; for meta, the folder too
    input: tuple = ()  # files: paths, folders, globs, or - for standard input
    val_input: tuple = ()  # validation text, instead of a share of the corpus
    glob: str = ""  # files of a folder to read, as in **/*.py; "" = those named as text or rows
    as_text: int = 0  # 1: html, JSON and csv are to be read as they stand
    encoding: str = ""  # of text, JSON and csv; "" = UTF-8, or UTF-16 after its mark
    split_on: str = ""  # documents of a text: line, blank, or a separator; "" = one document
    text_key: str = "text"  # field of a row that holds the text
    config: str = ""  # hf: configuration of the data set
    split: str = ""  # hf: the only split to read
    tokenizer: str = ""  # byte, gpt2, bpe:N or a path; "" = the source's usual one
    out: str = ""  # folder to write; "" = data/NAME
    max_tokens: int = 0  # training tokens to keep; 0 = all
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0  # tokenizing threads; 0 = one a core


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print("prepare_data.py:", " ".join(message[:1000].split()), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def doing(what, remedy):
    """Whatever goes wrong inside becomes one line that says what to do."""
    try:
        yield
    except ImportError as error:
        fail(f"{what}: needs a package: pip install {error.name}")
    except Exception as error:
        fail(f"{what}: {type(error).__name__}: {str(error)[:300]}; {remedy}")


def parse(argv):
    """Command line -> Config."""
    default, values, key = dataclasses.asdict(Config()), {}, "name"
    for arg in argv:
        flag, _, value = arg.partition("=") if arg.startswith("--") else (f"--{key}", "", arg)
        key = flag[2:]
        if key not in default:
            near = difflib.get_close_matches(flag, [f"--{name}" for name in default], n=1)
            fail(f"{flag}: unknown flag; did you mean {''.join(near) or '--help'}?")
        kind = type(default[key])
        pattern = r"[1-9](_?\d){,17}" if kind is int else "(?s).+"
        if not re.fullmatch(pattern, value) or key in values and kind is not tuple:
            fail(f"{arg}: give --{key} once" + ", with a whole number above 0" * (kind is int))
        values[key] = values.get(key, ()) + (value,) if kind is tuple else kind(value)
    name, *rest = values.get("name", ["no source"])
    if (name not in NAMES and not re.fullmatch("hf:[^/]+/[^/]+", name)
            or len(rest) != (name == "meta") or ("input" in values) != (name == "files")):
        fail(f"{name}: give one of {', '.join(NAMES)}; meta goes with a FOLDER, files with --input")
    values["name"], usual = name, "" if name in ("meta", "finewebedu10B") else "byte"
    values.setdefault("tokenizer", HUB[name][2] if name in HUB else usual)
    values.setdefault("out", f"data/{name.removeprefix('hf:').split('/')[-1]}")
    values["out"] = rest[0] if rest else values["out"]
    return Config(**values)


def local_parts(given, split=None, pattern=""):
    """Paths, folders and globs in the order given, the files of a folder by name."""
    found = {}
    for item in given:
        path, spool = Path(item).expanduser(), None
        if item == "-":  # it cannot be read twice
            spool = tempfile.NamedTemporaryFile()
            shutil.copyfileobj(sys.stdin.buffer, spool)
            spool.flush()
            path = Path(spool.name)
        files = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
        if path.is_dir():
            files = [file for file in path.glob(pattern or "**/*")
                     if not HIDDEN.match(file.relative_to(path).as_posix())
                     and (pattern or READABLE.fullmatch(file.name))]
        files = sorted(file for file in files if file.is_file())
        if not files:
            fail(f"{item}: no such file, or nothing to read there; --glob='**/*.txt' picks files")
        for file in files:
            stamp = f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
            found[file.resolve()] = Part(str(file), split, stamp, spool)
    return list(found.values())


def hub_parts(cfg):
    """Files of a data set, pinned to a revision so that a resumed run reads the same."""
    import datasets
    import huggingface_hub
    repo, config, _ = HUB.get(cfg.name, (cfg.name.removeprefix("hf:"), cfg.config, ""))
    # A folder of that name is read as the hub would read it.
    revision = None if os.path.isdir(repo) else huggingface_hub.HfApi().dataset_info(repo).sha
    found = datasets.load_dataset(repo, config or None, revision=revision, streaming=True)
    chosen = {cfg.split: None} if cfg.split else {n: SPLITS[n] for n in found if n in SPLITS}
    if not cfg.split and "val" not in chosen.values():
        chosen["train"] = None
    if not set(chosen) <= set(found):
        fail(f"{cfg.name}: name a split by --split={' or '.join(found)}")
    return [Part(f"hf:{repo} {name} {i}", split, f"{revision} {name} {i}",
                 found[name].shard(found[name].num_shards, i))
            for name, split in chosen.items() for i in range(found[name].num_shards)]


def corpus(cfg, folder):
    """-> parts, held-out ones first."""
    with doing(cfg.name, "the same command tries again; or use files that you have"):
        if cfg.name == "files":
            parts = local_parts(cfg.input, pattern=cfg.glob)
        elif cfg.name == "stdlib":  # less the tests, which some systems leave out
            root = Path(os.__file__).parent
            parts = local_parts(path for path in sorted(root.rglob("*.py"))
                                if not NOT_STDLIB & set(path.relative_to(root).parts))
        elif cfg.name == "shakespeare":
            path = folder / "tinyshakespeare.txt"
            if not path.exists():
                with urllib.request.urlopen(SHAKESPEARE, timeout=30) as reply:
                    write_atomically(path, reply.read())
            parts = local_parts([path])
        else:
            parts = hub_parts(cfg)
    if cfg.val_input:
        parts = local_parts(cfg.val_input, "val") + [
            part._replace(split=part.split or "train") for part in parts if part.split != "val"]
    return sorted(parts, key=lambda part: part.split not in HELD_OUT)


def digest(parts):
    return hashlib.sha256(json.dumps([(p.stamp, p.split) for p in parts]).encode()).hexdigest()


def unpack(name, file):
    """(name, stream) of a file, or of all that is packed in it, by its first bytes."""
    file = io.BufferedReader(file, 1 << 20)
    head = file.peek(300)
    for magic, opener in {
        b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open,
        b"\x28\xb5\x2f\xfd": lambda file: pyarrow.CompressedInputStream(file, "zstd"),
    }.items():
        if head.startswith(magic):
            return (yield from unpack(re.sub(r"\.\w+$", "", name), opener(file)))
    if not head.startswith(b"PK\3\4"):
        return (yield name, file)
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if not HIDDEN.match(n) and not n.endswith("/")]
        if {"mimetype", "[Content_Types].xml"} & set(names):
            fail(f"{name}: an e-book or an Office document; save it as text")
        for member in [n for n in names if READABLE.fullmatch(n)] or names:
            with archive.open(member) as inner:
                yield from unpack(f"{name}/{member}", inner)


def kind_of(name, start, text_key):
    """What a text is by its name in lower case and its start: json, csv, html or text."""
    line, second = [*start.lstrip().split("\n", 2), ""][:2]
    columns = [column.strip("\" \r") for column in re.split("[,;\t]", line)]
    is_header = text_key in columns or (
        all(map(str.isidentifier, columns)) and re.search("[,;\t]", second))
    if name.endswith((".json", ".jsonl", ".ndjson")) or JSON.match(start):
        return "json"
    if name.endswith((".csv", ".tsv")) or len(columns) > 1 and is_header:
        return "csv"
    is_html = HTML.match(line) and not name.endswith(".md")
    return "html" if is_html or name.endswith((".html", ".htm", ".xhtml", ".xml")) else "text"


def json_rows(name, blocks):
    """Rows of JSON, one a line or in an array, parsed as they come."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[\]]*")
    text, at, n_lines = "", 0, 1
    while True:
        at = between.match(text, at).end()
        try:
            row, at = decoder.raw_decode(text, at)
            yield row
        except ValueError as error:  # of half a row, too: read on
            n_lines, text, at = n_lines + text.count("\n", 0, at), text[at:], 0
            block = next(blocks, "") if len(text) < MAX_ROW else ""
            if text and not block:
                fail(f"{name}, line {n_lines}: not JSON ({error}); mend or remove it")
            if not block:
                return
            text += block


def separated(name, blocks, separator):
    """Blocks of text cut into strings at each match of a pattern."""
    rest = ""
    for block in blocks:
        *whole, rest = re.split(separator, rest + block)
        if len(rest) > MAX_ROW:
            fail(f"{name}: {len(rest):,} characters without a separator; check --split_on")
        yield from whole
    yield rest


def table_rows(stream, kind):
    """Rows of a parquet or an arrow file, which cannot be read from front to back."""
    import datasets
    with tempfile.NamedTemporaryFile() as file:
        path = stream.raw.name if isinstance(stream.raw, io.FileIO) else file.name
        if path == file.name:
            shutil.copyfileobj(stream, file)
            file.flush()
        yield from datasets.load_dataset(kind, data_files=path, split="train", streaming=True)


def texts_of(cfg, name, rows, counts):
    """Texts in rows; rows without are counted, and refused if they are many."""
    n_rows = n_missing = 0
    for n_rows, row in enumerate(rows, 1):
        text = row = row if isinstance(row, dict) else {cfg.text_key: row}
        for key in [cfg.text_key] if cfg.text_key in row else cfg.text_key.split("."):
            text = text.get(key) if isinstance(text, dict) else None
        if isinstance(text, str) and text:
            # JSON may escape half of a surrogate pair, which is no character.
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        else:
            n_missing += 1
        if n_missing > max(1000, n_rows / 2):
            break
    if n_missing > n_rows / 2:
        fail(f"{name}: {n_missing:,} of {n_rows:,} rows have no text in the field {cfg.text_key}; "
             f"they hold: {', '.join(map(str, row))}; name another by --text_key, or --as_text=1")
    counts["rows without text skipped"] += n_missing


def documents(cfg, name, stream, counts):
    """Texts of a file that is not packed, or blocks of it if it is one document."""
    head = stream.peek(300)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        rows = table_rows(stream, "parquet" if head.startswith(b"PAR1") else "arrow")
        return texts_of(cfg, name, rows, counts)
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    file = io.TextIOWrapper(stream, cfg.encoding or encoding, "replace", newline="")
    start = file.read(PIECE_CHARS)
    blocks = itertools.chain([start], iter(lambda: file.read(PIECE_CHARS), ""))
    kind = "text" if cfg.as_text else kind_of(name.lower(), start, cfg.text_key)
    if kind == "html" or NOT_TEXT.match(head) and not cfg.as_text:
        fail(f"{name}: HTML, XML, PDF, RTF, Word or tar; extract the text, or use --as_text=1")
    if kind == "json":
        return texts_of(cfg, name, json_rows(name, blocks), counts)
    if kind == "csv":
        csv.field_size_limit(MAX_ROW)
        delimiter = max(",\t;", key=start.partition("\n")[0].count)
        lines = (line + "\n" for line in separated(name, blocks, "\n"))
        return texts_of(cfg, name, csv.DictReader(lines, delimiter=delimiter), counts)
    if cfg.split_on:
        separator = SEPARATORS.get(cfg.split_on, re.escape(cfg.split_on))
        return (text.strip("\r\n") for text in separated(name, blocks, separator))
    return [blocks]


def pieces(texts, size):
    """Texts, or blocks of a text -> (first, text) of at most `size` characters; `first` begins a
    text. Every pre-tokenizer begins a match at white space after a letter or a digit, so a cut
    there changes no token; where there is none, text is cut all the same."""
    for text in texts:
        first, rest = True, ""
        for block in [text] if isinstance(text, str) else text:
            rest += block
            while len(rest) > size:
                safe = SAFE.match(rest, 0, size + 1)
                end = safe.end() if safe else size
                yield first, rest[:end]
                first, rest = False, rest[end:]
        if rest:
            yield first, rest


def read(cfg, part, counts):
    """A part as pieces (code, text) without NUL, which marks documents. The code is a hash of the
    document at its first piece, None at the others."""
    with doing(part.path, "mend, replace or leave it out"), contextlib.ExitStack() as stack:
        if part.path.startswith("hf:"):
            files = [(part.path, texts_of(cfg, part.path, part.held, counts))]
        else:
            file = stack.enter_context(open(part.path, "rb", buffering=0))
            files = ((name, documents(cfg, name, stream, counts))
                     for name, stream in unpack(part.path, file))
        for name, texts in files:
            size = lost = 0
            for first, text in pieces(texts, PIECE_CHARS):
                n_nul = text.count("\0")
                size, lost = size + len(text), lost + n_nul + text.count("\ufffd")
                if lost > MAX_LOSS * max(size, PIECE_CHARS):
                    break
                text = text.replace("\0", "") if n_nul else text
                start = text[:HASH_CHARS].encode() if first else b""
                yield first and hashlib.blake2b(start, digest_size=7).hexdigest(), text
            counts["characters that could not be decoded are U+FFFD, or removed NUL"] += lost
            if lost > MAX_LOSS * size:
                fail(f"{name}: {lost:,} of {size:,} characters are not {cfg.encoding or 'UTF-8'}; "
                     "name its encoding: --encoding=gbk, latin-1, utf-16-le ..")


def split_rule(cfg, parts):
    """How parts without a split of their own are divided: documents of a hash up to rule["hash"]
    are validation, about 2% of the text, and so is all after rule["tail"] characters."""
    sizes, code = {}, None
    found = (piece for part in parts if not part.split for piece in read(cfg, part, Counter()))
    for start, text in found:
        if start and start not in sizes and len(sizes) == SCAN_DOCUMENTS:
            break
        if start:
            code = None if start in sizes else start
        if code:
            sizes[code] = sizes.get(code, 0) + len(text)
    total, order = sum(sizes.values()), sorted(sizes)
    if len(sizes) < FEW_DOCUMENTS:
        return {"hash": "", "tail": total - int(total * TAIL) if sizes else sys.maxsize}
    n = sum(size <= VAL_FRACTION * total for size in itertools.accumulate(map(sizes.get, order)))
    return {"hash": order[max(1, n) - 1], "tail": sys.maxsize}


def route(cfg, part, run, counts):
    """Pieces of a part as (split, first, text), by its own split or by the corpus's rule. Hashes of
    documents that are not to come again in training are keys of `counts`, too."""
    rule = {"hash": "", "tail": sys.maxsize} if part.split else run["rule"]
    for code, text in read(cfg, part, counts):
        if code:
            split = part.split or ("val" if code <= rule["hash"] else "train")
            is_repeat = code in counts and part.split not in HELD_OUT
            if part.split in HELD_OUT or rule["tail"] < sys.maxsize:
                counts[code] = 0
            counts[KEPT if run["keeps"] else REPEATED] += is_repeat
        if is_repeat and not run["keeps"]:
            continue
        left = max(0, rule["tail"] - counts["characters"])
        counts["characters"] += len(text)
        for name, half in (split, text[:left]), ("val", text[left:]):
            if half:
                yield name, bool(code) or name != split, half
                split = name


def batches(cfg, parts, run):
    """(state, pieces): a run that has written these goes on from that state, unless it is None."""
    counts = Counter(run["counts"])
    for index in range(run["part"], len(parts)):
        batch, size = [], 0
        for piece in route(cfg, parts[index], run, counts):
            counts[SPELLED] += piece[2].count(BOS_TEXTS[0])
            batch.append(piece)
            size += len(piece[2])
            if size >= PIECE_CHARS:
                yield None, batch
                batch, size = [], 0
        yield {"part": index + 1, "counts": dict(counts)}, batch


def tokenizer_meta(name, table=None, pattern=None, bos_id=0):
    """A tokenizer as it stands in meta.json; its table holds bytes as characters U+0000 to U+00FF,
    and is None for raw bytes."""
    lengths = [len(token) for token in table or ["?"] * 256]
    lengths[bos_id] = 0
    return dict(zip(TOKENIZER_KEYS, (name, len(lengths), bos_id, pattern, table, lengths),
                    strict=True))


def dtype_of(meta):
    return np.dtype("<u2" if meta["vocab_size"] > 256 else "<u1")


def make_encoder(meta):
    """-> a function: pieces -> [(split, ids)], in order."""
    table, bos_id, name = meta["token_bytes"], meta["bos_id"], meta["tokenizer"]
    if table:
        import tiktoken
        ranks = {t.encode("latin-1"): i for i, t in enumerate(table) if t and i != bos_id}
        if len(table) > 65536 or not all(bytes([byte]) in ranks for byte in range(256)):
            fail(f"--tokenizer={name}: more than 65536 tokens, or not all bytes among them")
        bpe = tiktoken.Encoding(name, pat_str=meta["pattern"], mergeable_ranks=ranks,
                                special_tokens={"\0": bos_id})

    def encode(batch):
        runs = []
        for split, group in itertools.groupby(batch, key=lambda piece: piece[0]):
            # NUL, which no text holds, stands for the document start: one call does a batch.
            text = "".join("\0" * first + text for _, first, text in group)
            ids = (bpe.encode_to_numpy(text, allowed_special={"\0"}) if table else
                   np.frombuffer(text.encode(), np.uint8))
            runs.append((split, ids.astype(dtype_of(meta))))
        return runs

    return encode


def hf_tokenizer(name, hf):
    """A tokenizer of the library `tokenizers` in the form of tiktoken, if that cuts text alike."""
    saved, vocab = json.loads(hf.to_str()), hf.get_vocab()
    steps = saved["pre_tokenizer"].get("pretokenizers", [saved["pre_tokenizer"]])
    pattern = next((step["pattern"]["Regex"] for step in steps if step["type"] == "Split"),
                   GPT2_PATTERN)
    # Byte-level BPE writes bytes as characters: those that print as they are, others from U+0100
    others = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b)]
    byte_of = {256 + i: byte for i, byte in enumerate(others)}
    added = {token["content"]: token["id"] for token in saved["added_tokens"]}
    table = [""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        table[i] = token.encode().decode("latin-1") if token in added else token.translate(byte_of)
    bos_id = next((added[text] for text in BOS_TEXTS if text in added), len(table))
    meta = tokenizer_meta(name, table + [""] * (bos_id == len(table)), pattern, bos_id)
    text = f"{__doc__} d\u00e9j\u00e0 \u65e5\u672c, don't\n\n\tx = [-1]!\n"
    [(_, ids)] = make_encoder(meta)([("", False, text)])
    if ids.tolist() != hf.encode(text, add_special_tokens=False).ids:
        fail(f"--tokenizer={name}: cuts text in a way that this program does not; use another")
    return meta


def training_texts(cfg, parts, run):
    """What a BPE is trained on, in short texts: the trainer holds 256, each with much besides."""
    n, counts = 0, Counter()
    found = (piece for part in parts if part.split not in HELD_OUT
             for piece in route(cfg, part, run, counts))
    for _, text in pieces((text for split, _, text in found if split == "train"), 1 << 14):
        n += len(text)
        if n > BPE_CHARS:
            return
        yield text


def train_bpe(name, texts):
    """A BPE of so many tokens over texts, the document start the last of them."""
    import tokenizers as hf
    size, byte_level = int(name.removeprefix("bpe:")) - 1, hf.pre_tokenizers.ByteLevel
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=True)
    model.train_from_iterator(texts, hf.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False))
    if (n := model.get_vocab_size()) != size:
        fail(f"--tokenizer={name}: the text yields {n} tokens; use bpe:{n + 1}")
    return hf_tokenizer(name, model)


def make_tokenizer(name, texts):
    """A tokenizer by its name, or from a prepared folder, a checkpoint or a tokenizer.json."""
    remedy = ("give byte, gpt2 (from the network or TIKTOKEN_CACHE_DIR), bpe:N as in bpe:8192, or "
              "the path of a prepared folder, a checkpoint or a byte-level tokenizer.json")
    with doing(f"--tokenizer={name}", remedy):
        if name == "byte":
            return tokenizer_meta("byte")
        if name == "gpt2":
            import tiktoken
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
            table = [token.decode("latin-1") for token in sorted(ranks, key=ranks.get)]
            return tokenizer_meta("gpt2", [*table, ""], GPT2_PATTERN, len(table))
        if name.startswith("bpe:"):
            return train_bpe(name, texts)
        file = Path(name)
        if file.is_dir():
            file /= "meta.json" if (file / "meta.json").exists() else "tokenizer.json"
        if file.suffix == ".pt":
            import torch
            saved = torch.load(file, map_location="cpu", weights_only=True)["meta"]
        else:
            saved = json.loads(file.read_bytes())
        if "model" in saved:
            import tokenizers
            return hf_tokenizer(file.name, tokenizers.Tokenizer.from_file(str(file)))
        return {key: saved[key] for key in TOKENIZER_KEYS}


def write_atomically(path, *chunks):
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.writelines(chunks)
    os.replace(temporary, path)


def describe(folder, meta):
    """Check and count the shards of a folder -> what meta.json says of splits and shards."""
    splits, shards, size, dtype = {}, {}, meta["vocab_size"], dtype_of(meta)
    for path in sorted(folder.glob("*.bin")):
        match = re.fullmatch(r"(?:.*_)?(train|val|test)(_\d+)?\.bin", path.name)
        raw = np.memmap(path)
        header, tokens = raw[:20].view("<i4").tolist(), raw[HEADER_BYTES:].view(dtype)
        counts = sum(np.bincount(part, minlength=1 << 16)
                     for part in np.array_split(tokens, 1 + len(tokens) // (1 << 20)))
        if (not match or counts[size:].any() or header[:3] != [MAGIC, VERSION, len(tokens)]
                or header[3] not in (0, dtype.itemsize) or header[4] not in (0, size)):
            fail(f"{path}: not a whole llm.c shard of {meta['tokenizer']} tokens; see --tokenizer")
        n_bytes = int(counts[:size] @ np.array(meta["byte_length"]))
        splits.setdefault(match[1], Counter()).update(
            tokens=len(tokens), bytes=n_bytes, documents=int(counts[meta["bos_id"]]))
        shards[path.name] = {"tokens": len(tokens), "sha256": hashlib.sha256(raw).hexdigest()}
    return {"splits": splits, "shards": shards}


def tokenize(cfg, parts, folder, run):
    """Write the tokens of every split to a file; a later run goes on from what `run` saves."""
    totals, pending, saved, rule = Counter(run["totals"]), deque(), time.monotonic(), run["rule"]
    encode, itemsize = make_encoder(run["tokenizer"]), dtype_of(run["tokenizer"]).itemsize
    for path in folder.glob("*.tokens"):  # an earlier run may have written more than it saved
        os.truncate(path, totals[path.stem] * itemsize)
    max_train, n_workers = cfg.max_tokens or sys.maxsize, cfg.workers or os.cpu_count()
    bar = tqdm(total=cfg.max_tokens or None, unit="tok", unit_scale=True, disable=None)
    with ThreadPoolExecutor(n_workers) as pool, bar:
        flush = [(None, [])] * 2 * n_workers
        for state, batch in itertools.chain(batches(cfg, parts, run), flush):
            pending.append((state, pool.submit(encode, batch)))
            if len(pending) <= len(flush):
                continue
            state, future = pending.popleft()
            for split, tokens in future.result():
                room = max_train - totals["train"] if split == "train" else tokens.size
                with (folder / f"{split}.tokens").open("ab") as file:
                    file.write(tokens[:room].data)
                totals[split] += min(room, tokens.size)
            bar.update(totals.total() - bar.n)
            run |= {**(state or {}), "totals": dict(totals)}
            if state and time.monotonic() - saved >= SAVE_SECONDS:
                run["inputs"] = digest(parts[:run["part"]])
                write_atomically(folder / STATE, json.dumps(run).encode())
                saved = time.monotonic()
            if totals["train"] >= max_train and totals["val"] and rule["tail"] == sys.maxsize:
                break


def resume(cfg, folder, parts, settings):
    """What an unfinished run has saved, as far as its inputs are the same, or a new run."""
    new = {"settings": settings, "rule": split_rule(cfg, parts), "keeps": False, **START}
    if (folder / STATE).exists():
        run = json.loads((folder / STATE).read_bytes())
        same = settings, new["rule"], digest(parts[:run["part"]])
        if same == (run["settings"], run["rule"], run["inputs"]):
            print(f"{cfg.name}: going on from an earlier run", file=sys.stderr)
            return run
        print(f"{folder}: begun with other settings or files; starting over", file=sys.stderr)
    elif [*folder.glob("*.bin")] and not [*folder.glob("*.tokens")]:
        fail(f"{folder}: holds shards of another origin; give another --out")
    return new | {"tokenizer": make_tokenizer(cfg.tokenizer, training_texts(cfg, parts, new))}


def from_text(cfg, folder, parts, settings):
    """Write the shards -> their tokenizer, and counts of what was odd in the text."""
    run = resume(cfg, folder, parts, settings)
    tokenize(cfg, parts, folder, run)
    if not run["totals"].get("train") and run["counts"].get(REPEATED):
        run |= {"keeps": True, **START}  # all of the text is held out, too
        tokenize(cfg, parts, folder, run)
    for split in "train", "val":
        if not run["totals"].get(split):
            fail(f"{cfg.name}: no text for {split}; give more text or --val_input=PATH")
    for path in folder.glob("*.bin"):  # of a run that was killed at this point
        path.unlink()
    dtype, header = dtype_of(run["tokenizer"]), np.zeros(256, "<i4")
    for path in folder.glob("*.tokens"):
        tokens = np.memmap(path, dtype)
        for number, start in enumerate(range(0, len(tokens), cfg.shard_tokens)):
            shard = tokens[start:start + cfg.shard_tokens]
            header[:5] = MAGIC, VERSION, len(shard), dtype.itemsize, run["tokenizer"]["vocab_size"]
            name = f"{path.stem}_{number + (path.stem == 'train'):06d}.bin"
            write_atomically(folder / name, header.data, shard.data)
    return run["tokenizer"], run["counts"]


def from_shards(cfg, folder):
    """Fetch shards, or take those that are there -> their tokenizer."""
    if cfg.name == "finewebedu10B":
        import huggingface_hub
        n = min(PUBLISHED_SHARDS, math.ceil((cfg.max_tokens or sys.maxsize) / PUBLISHED_TOKENS))
        for name in "val_000000", *(f"train_{i + 1:06d}" for i in range(n)):
            huggingface_hub.hf_hub_download(PUBLISHED, f"finewebedu_{name}.bin",
                                            repo_type="dataset", local_dir=folder)
    widths = [np.fromfile(path, "<i4", 256)[3:4] for path in folder.glob("*.bin")]
    if not widths:
        fail(f"{folder}: no such folder, or no *train*.bin or *val*.bin there")
    return make_tokenizer(cfg.tokenizer or ("byte" if 1 in widths else "gpt2"), ())


def prepare(cfg):
    """Make the folder complete, from whatever state it is in."""
    folder, path = Path(cfg.out), Path(cfg.out, "meta.json")
    is_text = cfg.name not in ("meta", "finewebedu10B")
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another process is at work there; wait for it, or give another --out")
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    try:
        made = json.loads(path.read_bytes())["settings"] if path.exists() else {}
        parts = corpus(cfg, folder) if is_text and (cfg.name == "files" or not made) else []
        settings = {key: value for key, value in dataclasses.asdict(cfg).items()
                    if not key.endswith("input") and key not in ("out", "workers")}
        now = settings | ({"inputs": digest(parts)} if cfg.name == "files" else {})
        if made == now:
            print(f"{folder} is complete; nothing to do")
            return
        if made and (is_text or made["name"] != cfg.name):
            differs = ", ".join(key for key in now if made.get(key) != now[key])
            fail(f"{folder}: holds data of another {differs}; delete it or give another --out")
        meta, counts = (from_text(cfg, folder, parts, settings) if is_text else
                        (from_shards(cfg, folder), {}))
        meta = {"name": cfg.name, **meta, **describe(folder, meta), "settings": now}
        write_atomically(path, json.dumps(meta).encode(), b"\n")
        (folder / STATE).unlink(missing_ok=True)
        report(folder, meta, counts)
    finally:
        lock.close()
        if not (folder / STATE).exists():  # nothing to go on from is left behind
            for leftover in *folder.glob("*.tokens"), *folder.glob("*.new"), folder / "lock":
                leftover.unlink()
            with contextlib.suppress(OSError):
                for parent in missing:
                    parent.rmdir()


def report(folder, meta, counts):
    """What was written, what was odd, and a command that trains on it on this machine."""
    for split, total in meta["splits"].items():
        print(f"{split:5} {total['tokens']:13,} tokens {total['bytes']:13,} bytes "
              f"{total['bytes'] / total['tokens']:.3f} bytes/token {total['documents']:,} docs")
    for said, n in counts.items():
        if n and " " in said:
            print(f"{n:,} {said}")
    n_train, n_val = (meta["splits"].get(split, {}).get("tokens", 0) for split in ("train", "val"))
    if n_val < 512:
        print(f"{n_val} tokens of validation are few; give more text or --val_input=PATH")
    command = f"python train_mdlm.py --data={shlex.quote(str(folder))}"
    if n_train < SMALL_CORPUS or not shutil.which("nvidia-smi"):
        seq_len = min(256, max(2, 1 << n_val.bit_length() >> 2))
        batch = min(4096, max(2 * seq_len, 1 << (n_train - n_train % seq_len).bit_length() >> 1))
        command += " --preset=tiny" + f" --seq_len={seq_len}" * (seq_len < 256)
        command += f" --batch_tokens={batch}" * (batch < 4096)
    print(f"{folder} is complete; next: {command}")


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__ + "\n" + inspect.getsource(Config))
        return
    cfg = parse(argv)
    with doing(cfg.out, "once mended, the same command goes on from here"):
        prepare(cfg)


if __name__ == "__main__":
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
