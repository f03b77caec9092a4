"""Text -> token shards that every training script reads.

    python prepare_data.py stdlib                  # this Python's own source code; no network
    python prepare_data.py shakespeare             # Tiny Shakespeare, 1.1 MB
    python prepare_data.py tinystories|pg19|finewebedu|openwebtext [--max_tokens=N]    # streamed
    python prepare_data.py hf:OWNER/NAME [--config=C] [--split=S] [--text_key=FIELD]   # streamed
    python prepare_data.py files --input=PATH... [--val_input=PATH...] --tokenizer=gpt2
    python prepare_data.py finewebedu10B --max_tokens=900_000_000    # published GPT-2 shards
    python prepare_data.py meta FOLDER             # write the meta.json that such shards lack

PATH is a file, a folder, a glob, or - for standard input; --glob='**/*.py' picks files of a folder.
What a file holds is told by its content: gz, xz, bz2, zst and zip are unpacked; rows of JSON, csv,
parquet and arrow give their field --text_key (a.b is b in a); all else is text, one document or
many (--split_on=line, blank, or a separator such as '<|endoftext|>'). --kind=text|json|csv
overrides that, --encoding reads what is not UTF-8. Tokenizers: byte, gpt2, bpe:N (trained on the
corpus), or the PATH of a prepared folder, a checkpoint, or a tokenizer.json with byte-level BPE.
Other flags: --out=FOLDER (data/NAME), --test_input, --max_tokens (of training text),
--shard_tokens, --workers.

A shard is the llm.c format: 256 little-endian int32 ([0] 20240520, [1] 1, [2] tokens, [3] bytes
per token, [4] vocab size), then uint8 or uint16 tokens. meta.json, written last, makes a folder
complete. A document starts with bos_id, which stands nowhere else: text that spells <|endoftext|>
stays text. Validation is the source's own, or --val_input, or the documents of lowest hash up to 2%
of the text; a corpus of fewer than 20 documents gives its last 10%. What is removed, replaced or
left out is reported. The same command after Ctrl-C, kill -9 or a full disk goes on from there.
"""
import contextlib
import csv
import dataclasses
import difflib
import glob
import hashlib
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
import urllib.request
import zipfile
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no lock, everything else works
    fcntl = None

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
PIECE_CHARS = 1 << 19  # longest text tokenized in one go, and size of a batch of short ones
CUT_CHARS = 1 << 16  # how far back from there a safe place to cut is looked for
SAVE_BATCHES = 32  # batches between two saved positions, which is the most that a kill can lose
HASH_CHARS = 1 << 16  # a document's split depends on its start, since the rest may not be read yet
MAX_ROW = 1 << 26  # longest JSON row, csv field or separated document: it is held whole
MAX_LOSS = 0.01  # a text of which more characters cannot be decoded is refused
BPE_CHARS = 50_000_000  # a BPE is trained on this much of the training text, from the start
FEW_DOCUMENTS, TAIL = 20, 0.1
VAL_FRACTION, SCAN_DOCUMENTS = 0.02, 2000  # the hash that gives 2% is found on the first 2,000
SMALL_CORPUS = 50_000_000  # tokens; the command at the end takes a preset below
STATE, START = "state.json", {"part": 0, "pieces": 0, "counts": {}, "totals": {}}
READABLE = re.compile(r".*\.(txt|md|py|jsonl?|ndjson|csv|tsv|parquet|arrow)"
                      r"(\.(gz|xz|zst|bz2|zip))?", re.I)
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
NAMES = ("stdlib", "shakespeare", *HUB, "hf:OWNER/NAME", "files", "finewebedu10B", "meta")
# A file of a corpus. split: None if the corpus's rule decides; stamp: tells a changed file; held:
# the rows of a file on the hub, the temporary file of standard input.
Part = namedtuple("Part", "path split stamp held", defaults=[None])


@dataclasses.dataclass(frozen=True)
class Config:
    name: tuple = ()  # the source; meta FOLDER has two words
    input: tuple = ()  # files: paths, folders, globs, or - for standard input
    val_input: tuple = ()  # validation text, instead of a share of the corpus
    test_input: tuple = ()  # test text
    glob: str = ""  # files of a folder to read, as in **/*.py; "" = those named as text or rows
    kind: str = ""  # text, json or csv, instead of what the content looks like
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
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:1000])
    print(f"prepare_data.py: {line}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def doing(what, remedy):
    """Whatever goes wrong inside becomes one line that says what to do."""
    try:
        yield
    except ImportError as error:
        fail(f"{what}: needs a package: pip install {error.name}")
    except Exception as error:
        fail(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; {remedy}")


def near(word, choices):
    match = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def parse(argv):
    """Command line -> Config."""
    default = {f.name: f.default for f in dataclasses.fields(Config)}
    values, key = {}, "name"
    for arg in argv:
        flag, _, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        key = flag[2:] or key
        if key not in default or flag == "--name":
            hint = near(flag, [f"--{name}" for name in default])
            fail(f"{flag}: unknown flag{hint}; --help lists them")
        kind = type(default[key])
        if not value or key in values and (flag or kind is not tuple):
            fail(f"{arg}: write flags once and with a value, --key=VALUE; the source comes first")
        if kind is int and not re.fullmatch(r"0*[1-9](_?\d){,18}", value):
            fail(f"{arg}: not a whole number above 0, or too large")
        values[key] = (*values.get(key, ()), value) if kind is tuple else kind(value)
    cfg = Config(**values)
    name, *rest = cfg.name or ("no source",)
    if name not in NAMES and not re.fullmatch("hf:[^/]+/[^/]+", name):
        fail(f"{name}: unknown source{near(name, NAMES)}; one of {', '.join(NAMES)}")
    if len(rest) != (name == "meta") or bool(cfg.input) != (name == "files"):
        fail(f"{' '.join(cfg.name)}: give one word, but meta FOLDER; files needs --input=PATH")
    if cfg.kind not in ("", "text", "json", "csv"):
        fail(f"--kind={cfg.kind}: is one of text, json and csv")
    usual = HUB[name][2] if name in HUB else "" if name in ("meta", "finewebedu10B") else "byte"
    out = rest[0] if rest else cfg.out or f"data/{name.removeprefix('hf:').split('/')[-1]}"
    return dataclasses.replace(cfg, name=name, tokenizer=cfg.tokenizer or usual, out=out)


def is_hidden(path):
    return any(name.startswith((".", "__MACOSX")) for name in Path(path).parts)


def local_parts(given, split=None, pattern=""):
    """Paths, folders and globs in the order given, the files of a folder by name."""
    found = {}
    for item in given:
        path = Path("/dev/stdin" if item == "-" else item).expanduser()
        if path.is_fifo():  # it could not be read twice
            spool = tempfile.NamedTemporaryFile()
            with path.open("rb") as pipe:
                shutil.copyfileobj(pipe, spool)
            spool.seek(0)
            stamp = hashlib.file_digest(spool, "sha256").hexdigest()
            found[path] = Part(spool.name, split, stamp, spool)
            continue
        files = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
        if path.is_dir():
            files = [p for p in path.glob(pattern or "**/*") if not is_hidden(p.relative_to(path))
                     and (pattern or READABLE.fullmatch(p.name))]
        files = sorted(p for p in files if p.is_file())
        if not files:
            fail(f"{item}: no such file, or nothing to read in that folder; name files, or pick "
                 "some of a folder with --glob='**/*.txt'")
        for path in files:
            about = path.stat()
            stamp = f"{path.name} {about.st_size} {about.st_mtime_ns}"
            found[path.resolve()] = Part(str(path), split, stamp)
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
    remedy = "the same command tries again; or fetch the text by other means and use files"
    with doing(cfg.name, remedy):
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
    for split, given in ("val", cfg.val_input), ("test", cfg.test_input):
        own = local_parts(given, split)
        parts = own + [part for part in parts if not own or part.split != split]
    if cfg.val_input:
        parts = [part._replace(split=part.split or "train") for part in parts]
    return sorted(parts, key=lambda part: {"test": 0, "val": 1}.get(part.split, 2))


def digest(parts):
    return hashlib.sha256(json.dumps([(p.stamp, p.split) for p in parts]).encode()).hexdigest()


def unpack(name, file):
    """(name, stream) of a file, or of all that is packed in it, by its first bytes."""
    file = io.BufferedReader(file, 1 << 20)
    head = file.peek(8)
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
    codec = next((packed[magic] for magic in packed if head.startswith(magic)), None)
    if codec:
        stream = lzma.open(file) if codec == "xz" else pyarrow.CompressedInputStream(file, codec)
        yield from unpack(re.sub(r"\.\w+$", "", name), stream)
    elif head.startswith(b"PK\3\4"):
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if not is_hidden(n) and not n.endswith("/")]
            if {"mimetype", "[Content_Types].xml"} & set(names):
                fail(f"{name}: an e-book or an Office document; save it as text")
            for member in [n for n in names if READABLE.fullmatch(n)] or names:
                with archive.open(member) as inner:
                    yield from unpack(f"{name}/{member}", inner)
    else:
        yield name, file


def kind_of(name, start, text_key):
    """What a text is by its name and its start: json, csv, html or text."""
    line = start.lstrip().partition("\n")[0].strip()
    columns = re.split("[,;\t]", line)
    if re.search(r"\.(jsonl?|ndjson)$", name, re.I):
        return "json"
    if re.search(r"\.[ct]sv$", name, re.I) or len(columns) > 1 and text_key in columns:
        return "csv"
    if re.match(r"<(!doctype|html|head|body|\?xml)\b", line, re.I):
        return "html"
    with contextlib.suppress(ValueError, RecursionError):
        row = json.JSONDecoder().raw_decode(start.lstrip("[ \t\r\n"))[0]
        return "json" if row and isinstance(row, dict) else "text"
    return "text"


def json_rows(name, blocks):
    """Rows of JSON, one a line or in an array, parsed as they come."""
    decoder, between = json.JSONDecoder(parse_int=float), re.compile(r"[\s,\[\]]*")
    text, at, n_lines = "", 0, 1
    while True:
        at = between.match(text, at).end()
        try:
            row, at = decoder.raw_decode(text, at)
            yield row
        except (ValueError, RecursionError) as error:  # of half a row, too: read on
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
            fail(f"{name}: {len(rest):,} characters without a separator; check --split_on, --kind")
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
    n_rows, n_missing, held = 0, 0, ""
    for n_rows, row in enumerate(rows, 1):
        row = text = row if isinstance(row, dict) else {}
        for key in [cfg.text_key] if cfg.text_key in row else cfg.text_key.split("."):
            text = text.get(key) if isinstance(text, dict) else None
        if isinstance(text, str) and text:
            # JSON may escape half of a surrogate pair, which is no character.
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            continue
        n_missing, held = n_missing + 1, ", ".join(map(str, row))
        if n_missing > max(1000, n_rows / 2):
            break
    if n_missing > n_rows / 2:
        fail(f"{name}: {n_missing:,} of {n_rows:,} rows have no text in the field {cfg.text_key}; "
             f"they hold: {held}; name another by --text_key (a.b is b in a)")
    counts["missing"] += n_missing


def checked(name, blocks):
    """Decoded text as it is; what is not text in its encoding is refused."""
    size = lost = 0
    for block in blocks:
        size, lost = size + len(block), lost + block.count("\ufffd") + block.count("\0")
        if lost > MAX_LOSS * size:
            fail(f"{name}: {lost:,} of {size:,} characters are not text in UTF-8 or the --encoding "
                 "given; name another, as in --encoding=gbk, latin-1 or utf-16-le, or leave it out")
        yield block


def documents(cfg, name, stream, counts):
    """Texts of a file that is not packed, or blocks of it if it is one document."""
    head = stream.peek(6)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        rows = table_rows(stream, "parquet" if head.startswith(b"PAR1") else "arrow")
        return (yield from texts_of(cfg, name, rows, counts))
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    file = io.TextIOWrapper(stream, cfg.encoding or encoding, "replace", newline="")
    start = file.read(PIECE_CHARS)
    blocks = checked(name, itertools.chain([start], iter(lambda: file.read(PIECE_CHARS), "")))
    kind = cfg.kind or kind_of(name, start, cfg.text_key)
    if kind == "html":
        fail(f"{name}: HTML or XML, whose tags would become training text; extract the text, or "
             "read it as it stands with --kind=text")
    if kind == "json":
        yield from texts_of(cfg, name, json_rows(name, blocks), counts)
    elif kind == "csv":
        csv.field_size_limit(MAX_ROW)
        delimiter = max(",\t;", key=start.partition("\n")[0].count)
        lines = (line + "\n" for line in separated(name, blocks, "\n"))
        yield from texts_of(cfg, name, csv.DictReader(lines, delimiter=delimiter), counts)
    elif cfg.split_on:
        separator = SEPARATORS.get(cfg.split_on, re.escape(cfg.split_on))
        yield from (text.strip("\r\n") for text in separated(name, blocks, separator))
    else:
        yield blocks


def read(cfg, part, counts):
    """A part as blocks (first, text), without NUL, which marks documents; `first` marks the start
    of a document."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(doing(part.path, "mend, replace or leave out what cannot be read"))
        if part.path.startswith("hf:"):
            found = texts_of(cfg, part.path, part.held, counts)
        else:
            file = stack.enter_context(open(part.path, "rb", buffering=0))
            found = (text for name, stream in unpack(part.path, file)
                     for text in documents(cfg, name, stream, counts))
        for text in found:
            blocks = text
            if isinstance(text, str):
                blocks = (text[i:i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))
            for number, block in enumerate(blocks):
                counts["nul"] += block.count("\0")
                counts["invalid"] += block.count("\ufffd")
                yield number == 0, block.replace("\0", "")


def document_hash(text):
    start = hashlib.blake2b(text[:HASH_CHARS].encode(), digest_size=7)
    return int.from_bytes(start.digest(), "big")


def split_rule(cfg, parts):
    """How parts without a split of their own are divided; reads them until that is known.

    {"tail": n}: text after n bytes is validation. {"hash": h}: documents hashing to h or less are,
    as many as 2% of the text holds, one at least.
    """
    sizes, code, is_repeat = {}, 0, False
    blocks = (block for part in parts if not part.split for block in read(cfg, part, Counter()))
    for first, text in blocks:
        if first:
            code = document_hash(text)
            is_repeat = code in sizes
        if len(sizes) == SCAN_DOCUMENTS and code not in sizes:
            break
        if not is_repeat:
            sizes[code] = sizes.get(code, 0) + len(text.encode())
    if not sizes:
        return {}
    total = sum(sizes.values())
    if len(sizes) < FEW_DOCUMENTS:
        return {"tail": total - int(total * TAIL)}
    order = sorted(sizes)
    n = sum(size <= VAL_FRACTION * total for size in itertools.accumulate(map(sizes.get, order)))
    return {"hash": order[max(1, n) - 1]}


def route(cfg, part, run, counts):
    """Blocks of a part as (split, first, text), by its own split or by the corpus's rule."""
    rule, split, is_repeat = run["rule"], part.split, False
    has_tail = not split and "tail" in rule
    for first, text in read(cfg, part, counts):
        if first:
            code, counts["documents"] = document_hash(text), counts["documents"] + 1
            if not part.split and "hash" in rule:
                split = "val" if code <= rule["hash"] else "train"
            # Held-out text comes first; training, and all under the tail rule, does without it.
            owner = f"document {counts['documents']}" if has_tail else split
            is_repeat = run["seen"].get(str(code), owner) != owner
            if has_tail or part.split in ("val", "test"):
                run["seen"].setdefault(str(code), owner)
            counts["kept" if run["keeps"] else "repeated"] += is_repeat
        if is_repeat and not run["keeps"]:
            continue
        if has_tail:
            raw, left = text.encode(), max(0, rule["tail"] - counts["tail_bytes"])
            counts["tail_bytes"] += len(raw)
            head = raw[:left].decode(errors="ignore")  # ends on a character
            if left < len(raw):
                if head:
                    yield "train", first, head
                first |= bool(head) or split == "train"
                text = text[len(head):]
            split = "val" if left < len(raw) else "train"
        yield split, first, text


def pieces(blocks, size):
    """Blocks -> (split, first, text) of at most `size` characters, cut alike for any blocks. Every
    pre-tokenizer begins a match at white space after a letter or a digit, so a cut there changes no
    token; where there is none, text is cut all the same."""
    split, first, text = None, True, ""
    for next_split, next_first, block in itertools.chain(blocks, [(None, True, "")]):
        if next_first:
            if text:
                yield split, first, text
            split, first, text = next_split, True, ""
        text += block
        while len(text) > size:
            end, low = size, max(0, size - CUT_CHARS)
            while end > low and not (text[end] in " \n" and text[end - 1].isalnum()):
                end = max(text.rfind(" ", low, end), text.rfind("\n", low, end))
            end = end if end > low else size
            yield split, first, text[:end]
            first, text = False, text[end:]


def batches(cfg, parts, run, position, is_wanted):
    """(position, pieces): a run that has written these goes on from that position."""
    batch, size, counts = [], 0, Counter(position["counts"])
    for index in range(position["part"], len(parts)):
        before, skip = dict(counts), position["pieces"] * (index == position["part"])
        blocks = route(cfg, parts[index], run, counts)
        for number, piece in enumerate(pieces(blocks, PIECE_CHARS), 1):
            counts["spelled"] += piece[2].count(BOS_TEXTS[0])
            if number > skip and is_wanted(piece[0]):
                batch.append(piece)
                size += len(piece[2])
            if size >= PIECE_CHARS:
                yield {"part": index, "pieces": number, "counts": before}, batch
                batch, size = [], 0
    yield {"part": len(parts), "pieces": 0, "counts": dict(counts)}, batch


def tokenizer_meta(name, table=None, pattern=None, bos_id=0):
    """A tokenizer as it stands in meta.json; its table holds bytes as characters U+0000 to U+00FF,
    and is None for raw bytes."""
    lengths = [len(token) for token in table or ["?"] * 256]
    lengths[bos_id] = 0
    return dict(zip(TOKENIZER_KEYS, (name, len(lengths), bos_id, pattern, table, lengths),
                    strict=True))


def make_encoder(meta):
    """-> dtype of ids, and a function: pieces -> [(split, ids)], in order."""
    table, bos_id, name = meta["token_bytes"], meta["bos_id"], meta["tokenizer"]
    dtype = np.dtype("<u2" if meta["vocab_size"] > 256 else "<u1")
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
            runs.append((split, ids.astype(dtype)))
        return runs

    return dtype, encode


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
    text = text.replace(BOS_TEXTS[0], "")
    [(_, ids)] = make_encoder(meta)[1]([("", False, text)])
    if ids.tolist() != hf.encode(text, add_special_tokens=False).ids:
        fail(f"--tokenizer={name}: cuts text in a way that this program does not; use another")
    return meta


def train_bpe(name, texts):
    """A BPE of so many tokens over texts, the document start the last of them."""
    import tokenizers as hf
    size, byte_level = int(name.partition(":")[2]) - 1, hf.pre_tokenizers.ByteLevel
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=True)
    model.train_from_iterator(texts, hf.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False))
    if (n := model.get_vocab_size()) != size:
        fail(f"--tokenizer={name}: the text yields {n} tokens; use bpe:{n + 1}")
    return hf_tokenizer(name, model)


def training_texts(cfg, parts, run):
    """What a BPE is trained on, in short texts: the trainer holds 256, each with much besides."""
    blocks = (block for part in parts if part.split in (None, "train")
              for block in route(cfg, part, {**run, "seen": {}}, Counter()))
    n = 0
    for split, _, text in pieces(blocks, 1 << 14):
        n += len(text) * (split == "train")
        if n > BPE_CHARS:
            return
        if split == "train":
            yield text


def make_tokenizer(name, texts):
    """A tokenizer by its name, or from a prepared folder, a checkpoint or a tokenizer.json."""
    if name == "byte":
        return tokenizer_meta("byte")
    if name == "gpt2":
        with doing("--tokenizer=gpt2", "connect once, or set TIKTOKEN_CACHE_DIR to its folder"):
            import tiktoken
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        table = [token.decode("latin-1") for token in sorted(ranks, key=ranks.get)]
        return tokenizer_meta("gpt2", [*table, ""], GPT2_PATTERN, len(table))
    with doing(f"--tokenizer={name}", "give byte, gpt2, bpe:N as in bpe:8192, or the path of a "
               "prepared folder, a checkpoint or a byte-level tokenizer.json"):
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


def write_atomically(path, data):
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def take_back(folder, totals, cfg, width):
    """Remove what an earlier run wrote beyond these tokens of each split."""
    for path in folder.glob("*.bin*"):
        if not (match := re.fullmatch(r"(train|val|test)_(\d{6})\.bin(\.tmp)?", path.name)):
            continue
        split, index, _ = match.groups()
        n = totals.get(split, 0) - (int(index) - (split == "train")) * cfg.shard_tokens
        path = path.rename(folder / f"{split}_{index}.bin.tmp")
        if n <= 0:
            path.unlink()
        else:
            os.truncate(path, HEADER_BYTES + min(n, cfg.shard_tokens) * width)


def append(folder, cfg, split, tokens, totals):
    """Write tokens to the split's shards, under temporary names."""
    while tokens.size:
        index, n = divmod(totals[split], cfg.shard_tokens)
        name = f"{split}_{index + (split == 'train'):06d}.bin.tmp"
        part = tokens[:cfg.shard_tokens - n]
        with (folder / name).open("ab") as file:
            file.write(b"" if n else bytes(HEADER_BYTES))
            file.write(part.data)
        totals[split] += part.size
        tokens = tokens[part.size:]


def finish(folder, dtype, vocab_size):
    """Give the shards, whole now, their headers and names."""
    for path in sorted(folder.glob("*.bin.tmp")):
        header = np.zeros(256, "<i4")
        n = (path.stat().st_size - HEADER_BYTES) // dtype.itemsize
        header[:5] = MAGIC, VERSION, n, dtype.itemsize, vocab_size
        with path.open("r+b") as file:
            file.write(header.data)
            file.flush()
            os.fsync(file.fileno())
        path.rename(path.with_suffix(""))


def describe(folder, meta, dtype):
    """Check and count the shards of a folder -> what meta.json says of splits and shards."""
    splits, shards, size = {}, {}, meta["vocab_size"]
    for path in sorted(folder.glob("*.bin")):
        match = re.fullmatch(r"(?:.*_)?(train|val|test)(_\d+)?\.bin", path.name)
        header, n = [*np.fromfile(path, "<i4", 256), 0, 0, 0, 0, 0][:5], 1 << 20
        tokens = np.memmap(path, dtype)[HEADER_BYTES // dtype.itemsize:]
        counts = sum(np.bincount(tokens[i:i + n], minlength=1 << 16)
                     for i in range(0, max(1, len(tokens)), n))
        if not match or counts[size:].any() or header[:3] != [MAGIC, VERSION, len(tokens)] or (
                header[3] not in (0, dtype.itemsize) or header[4] not in (0, size)):
            fail(f"{path}: not a whole llm.c shard of {meta['tokenizer']} tokens; fetch or make it "
                 "again, name its vocabulary by --tokenizer, or move it away")
        found = {"tokens": len(tokens), "bytes": int(counts[:size] @ np.array(meta["byte_length"])),
                 "documents": int(counts[meta["bos_id"]])}
        splits.setdefault(match[1], Counter()).update(found)
        with path.open("rb") as file:
            shards[path.name] = found | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return {"splits": splits, "shards": shards}


def in_order(pool, work, stream, ahead):
    """(position, work(batch)) in the order of the stream, at most `ahead` batches under way."""
    pending = deque()
    for position, batch in stream:
        pending.append((position, pool.submit(work, batch)))
        if len(pending) > ahead:
            position, future = pending.popleft()
            yield position, future.result()
    for position, future in pending:
        yield position, future.result()


def tokenize(cfg, parts, encode, folder, run):
    """The pipeline: this thread reads and writes in order, the workers tokenize."""
    limits, is_tail = {"train": cfg.max_tokens} if cfg.max_tokens else {}, "tail" in run["rule"]
    if limits and "hash" in run["rule"]:  # half the usual share: training is seldom full before
        limits["val"] = math.ceil(VAL_FRACTION / 2 * cfg.max_tokens)
    position = earlier = run["positions"][0]
    totals = Counter(position["totals"])

    def room(split):
        return limits.get(split, sys.maxsize) - totals[split]

    n_workers = cfg.workers or os.cpu_count()
    stream = batches(cfg, parts, run, position, lambda split: room(split) > 0)
    bar = tqdm(total=cfg.max_tokens or None, unit="tok", unit_scale=True, disable=None)
    with ThreadPoolExecutor(n_workers) as pool, bar:
        found = in_order(pool, encode, stream, 2 * n_workers)
        for number, (reached, runs) in enumerate(found, 1):
            for split, tokens in runs:
                append(folder, cfg, split, tokens[:room(split)], totals)
            bar.set_description(f"file {min(reached['part'] + 1, len(parts))} of {len(parts)}")
            bar.update(totals.total() - bar.n)
            if number % SAVE_BATCHES == 0 and reached["part"] < len(parts):
                earlier = position if reached["part"] > position["part"] else earlier
                n = len(parts) if is_tail else reached["part"] + 1
                position = {**reached, "totals": dict(totals), "inputs": digest(parts[:n])}
                run["positions"] = [position, earlier]
                write_atomically(folder / STATE, json.dumps(run).encode())
            # Under the tail rule validation comes last: reading goes on past a full training split
            if limits and not is_tail and not any(room(split) > 0 for split in limits):
                break
    return Counter(reached["counts"]) | totals


def resume(cfg, folder, parts, settings):
    """What an unfinished run has saved, as far as its inputs are the same, or a new run."""
    run = {"settings": settings, "seen": {}, "keeps": False}
    if (folder / STATE).exists():
        saved = json.loads((folder / STATE).read_bytes())
        for position in saved["positions"] if saved["settings"] == settings else ():
            n = len(parts) if "tail" in saved["rule"] else position["part"] + 1
            if position.get("inputs") == digest(parts[:n]):
                print(f"{cfg.name}: going on from an earlier run", file=sys.stderr)
                return saved | {"positions": [position]}
        print(f"{folder}: begun with other settings or files; starting over", file=sys.stderr)
    elif path := next(folder.glob("*.bin"), None):
        fail(f"{path}: of another origin; give another --out")
    return run | {"rule": split_rule(cfg, parts), "positions": [START]}


def build(cfg, folder, parts, settings):
    """Write all but meta.json -> its content, and counts of what was odd in the text."""
    if cfg.name == "finewebedu10B":
        import huggingface_hub
        n = min(PUBLISHED_SHARDS, math.ceil((cfg.max_tokens or sys.maxsize) / PUBLISHED_TOKENS))
        for name in "val_000000", *(f"train_{i + 1:06d}" for i in range(n)):
            with doing(f"{cfg.name}: the Hugging Face hub", "the same command tries again"):
                huggingface_hub.hf_hub_download(PUBLISHED, f"finewebedu_{name}.bin",
                                                repo_type="dataset", local_dir=folder)
    if parts:
        run = resume(cfg, folder, parts, settings)
        if "tokenizer" not in run:
            run["tokenizer"] = make_tokenizer(cfg.tokenizer, training_texts(cfg, parts, run))
        meta, totals = run["tokenizer"], run["positions"][0]["totals"]
        dtype, encode = make_encoder(meta)
        take_back(folder, totals, cfg, dtype.itemsize)
        counts = tokenize(cfg, parts, encode, folder, run)
        if not counts["train"] and counts["repeated"]:  # all of it is held out, too: keep it
            run |= {"keeps": True, "positions": [START]}
            take_back(folder, {}, cfg, dtype.itemsize)
            counts = tokenize(cfg, parts, encode, folder, run)
        for split in "train", "val":
            if not counts[split]:
                fail(f"{cfg.name}: no text for {split}; give more text or --val_input=PATH")
        finish(folder, dtype, meta["vocab_size"])
        source = ", ".join(Path(part.path).name for part in parts[:9]) + ", ..." * (len(parts) > 9)
    else:
        widths = [np.fromfile(path, "<i4", 256)[3:4] for path in folder.glob("*.bin")]
        if not widths:
            fail(f"{folder}: no such folder, or no *train*.bin or *val*.bin there")
        meta = make_tokenizer(cfg.tokenizer or ("byte" if 1 in widths else "gpt2"), ())
        dtype, counts = make_encoder(meta)[0], Counter()
        source = PUBLISHED if cfg.name == "finewebedu10B" else "shards made elsewhere"
    return {"format": 1, "name": cfg.name, "source": source, **meta,
            **describe(folder, meta, dtype)}, counts


def hold(folder, lock):
    """Keep other processes out of a folder until the lock is closed."""
    if not fcntl:
        return
    handle = os.open(folder, os.O_RDONLY)
    lock.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another process is at work there; wait for it, or give another --out")
    except OSError:
        pass  # a file system without locks


def prepare(cfg):
    """Make the folder complete, from whatever state it is in."""
    folder, path = Path(cfg.out), Path(cfg.out, "meta.json")
    is_text, made = cfg.name not in ("meta", "finewebedu10B"), {}
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = contextlib.ExitStack()
    try:
        hold(folder, lock)
        if path.exists():
            made = json.loads(path.read_bytes())
        parts = corpus(cfg, folder) if is_text and (cfg.name == "files" or not made) else []
        settings = {key: value for key, value in dataclasses.asdict(cfg).items()
                    if not key.endswith("input") and key not in ("out", "workers")}
        now = settings | ({"inputs": digest(parts)} if cfg.name == "files" else {})
        differs = [key for key in now if made and made["settings"].get(key) != now[key]]
        if differs and (is_text or made["name"] != cfg.name):
            fail(f"{folder}: holds a data set of another {', '.join(differs)}; give another --out, "
                 "or delete that folder")
        if made and not differs:
            print(f"{folder} is complete; nothing to do")
            return
        meta, counts = build(cfg, folder, parts, settings)
        write_atomically(path, json.dumps(meta | {"settings": now}).encode() + b"\n")
        (folder / STATE).unlink(missing_ok=True)
    except BaseException:
        if not (folder / STATE).exists():  # nothing is saved, so nothing is left behind
            for shard in folder.glob("*.bin.tmp"):
                shard.unlink()
            with contextlib.suppress(OSError):
                for parent in missing:
                    parent.rmdir()
        raise
    finally:
        lock.close()
    report(folder, meta, counts)


def report(folder, meta, counts):
    """What was written, what was odd, and a command that trains on it on this machine."""
    for split, total in meta["splits"].items():
        print(f"{split:5} {total['tokens']:13,} tokens {total['bytes']:13,} bytes "
              f"{total['bytes'] / total['tokens']:.3f} bytes/token {total['documents']:,} docs")
    for key, text in {
        "invalid": "characters that could not be decoded are U+FFFD",
        "nul": "NUL characters removed", "missing": "rows without text skipped",
        "repeated": "documents left out: the same text is held out, or came before",
        "kept": "training documents, all there are, are held out, too: the loss tells little",
    }.items():
        if counts[key]:
            print(f"{counts[key]:,} {text}")
    if counts["spelled"] > 1:
        print(f"{counts['spelled']:,} spellings of {BOS_TEXTS[0]} are plain text; if they separate "
              f"documents, use --split_on='{BOS_TEXTS[0]}'")
    n_train, n_val = (meta["splits"].get(split, {}).get("tokens", 0) for split in ("train", "val"))
    seq_len, batch, flags = 256, 4096, ""
    if n_train < SMALL_CORPUS or not shutil.which("nvidia-smi"):
        while seq_len > 8 and 2 * seq_len > n_val:
            seq_len //= 2
        while batch > 2 * seq_len and batch > n_train // seq_len * seq_len:
            batch //= 2
        flags = (" --preset=tiny" + f" --seq_len={seq_len}" * (seq_len < 256)
                 + f" --batch_tokens={batch}" * (batch < 4096))
    if n_val < 512:
        print(f"{n_val} tokens for validation are few: two windows of --seq_len are needed; give "
              "more text or --val_input=PATH")
    data = shlex.quote(str(folder))
    print(f"{folder} is complete; next: python train_mdlm.py --data={data}{flags}")


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    cfg = parse(argv)
    try:
        with doing(cfg.out, "once mended, the same command goes on from here"):
            prepare(cfg)
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")
    main(sys.argv[1:])
