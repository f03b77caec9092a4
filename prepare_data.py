"""Text -> token shards that every training script reads.

    python prepare_data.py stdlib                  # this Python's own source code; no network
    python prepare_data.py shakespeare             # Tiny Shakespeare, 1.1 MB
    python prepare_data.py tinystories|pg19|finewebedu|openwebtext [--max_tokens=N]    # streamed
    python prepare_data.py hf:OWNER/NAME [--config=C] [--split=S] [--text_key=FIELD]   # streamed
    python prepare_data.py files --input=PATH... [--val_input=PATH...] --tokenizer=gpt2
    python prepare_data.py finewebedu10B --max_tokens=900_000_000    # published GPT-2 shards
    python prepare_data.py meta FOLDER             # write the meta.json that such shards lack

PATH is a file, a folder, a glob, or - for standard input. Its content tells what it holds: text, or
rows of JSON, csv, parquet or arrow with a field --text_key, plain or in gz, xz, bz2, zst or zip.
Tokenizers: byte, gpt2, bpe:N (trained on the corpus), or the PATH of a prepared folder, a
checkpoint or a byte-level tokenizer.json. Config below has all flags.

Shards as llm.c has them: 256 little-endian int32 (20240520, 1, tokens, bytes a token, vocabulary),
then uint8 or uint16 tokens, with bos_id before every document. Validation is the source's own, or
--val_input, or the documents of lowest hash up to 2% of the text, or the last 10% of fewer than 20.
After Ctrl-C, kill -9 or a full disk the same command goes on after the last file finished.
"""
import contextlib
import csv
import dataclasses
import difflib
import glob
import hashlib
import inspect
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pyarrow
import tiktoken
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
STATE, START = "state.json", {"part": 0, "totals": {}, "counts": {}}
HIDDEN, HELD_OUT = re.compile(r"(.*/)?(\.|__MACOSX)"), ("val", "test")
READABLE = re.compile(r"(?i).*\.(txt|md|py|\w*jsonl?|[ct]sv|parquet|arrow)(\.(gz|xz|zst|bz2|zip))?")
NOT_TEXT = re.compile(rb"%PDF|\{\\rtf|\xd0\xcf\x11\xe0|.{257}ustar", re.S)
JSON = re.compile(r"[\[\s]*\{\s*\"[^\"\n]*\"\s*:")
HTML = re.compile(r"<(!doctype|!--|\?xml|(html|head|body|title|meta|div|p|mediawiki)\b)", re.I)
SAFE = re.compile(r".*[^\W_](?=[ \n])", re.DOTALL)  # as much text as may be cut off
CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
TABLES = {b"PAR1": "parquet", b"ARRO": "arrow", b"\xff\xff\xff\xff": "arrow"}
SEPARATORS = {"line": r"\r?\n", "blank": r"\r?\n(?:[ \t]*\r?\n)+"}
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
BOS_TEXTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "</s>", "<eos>")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TOKENIZER_KEYS = ("tokenizer", "vocab_size", "bos_id", "pattern", "token_bytes", "byte_length")
SHAKESPEARE = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
SHARDS, SHARDS_TOKENS = "kjj0/finewebedu10B-gpt2", 9_900_000_000
HUB = {  # NAME -> data set, configuration, tokenizer
    "tinystories": ("roneneldan/TinyStories", "", "bpe:8192"),
    "pg19": ("emozilla/pg19", "", "byte"),
    "finewebedu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "gpt2"),
    "openwebtext": ("Skylion007/openwebtext", "", "gpt2")}
SPLITS = {"train": "train", "test": "test", "validation": "val", "valid": "val", "val": "val"}
SPELLED = "times <|endoftext|> is plain text; if it separates documents: --split_on='<|endoftext|>'"
REPEATED = "documents left out: the same text is held out, or came before"
KEPT = "training documents, all there are, are held out, too: the loss tells little"
PUBLISHED_AS = ("finewebedu10B", "meta")
NAMES = ("stdlib", "shakespeare", *HUB, "hf:OWNER/NAME", "files", *PUBLISHED_AS)
Part = namedtuple("Part", "path split stamp held")  # held: rows of the hub, or a temporary file

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

def fail(message):
    """A user's mistake: one line, exit status 2."""
    print("prepare_data.py:", " ".join(message[:1000].split()), file=sys.stderr)
    raise SystemExit(2)

@contextlib.contextmanager
def doing(what, remedy):
    """Whatever goes wrong inside becomes one line that says what to do."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here")
    except Exception as error:
        fail(f"{what}: {type(error).__name__}: {str(error)[:300]}; {remedy}")

def parse(argv):
    default, values, key = dataclasses.asdict(Config()), {}, "name"
    for arg in argv:
        flag, _, value = arg.partition("=") if arg.startswith("--") else (key, "", arg)
        key = flag.removeprefix("--")
        if key not in default:
            near = difflib.get_close_matches(key, default, n=1)
            fail(f"--{key}: unknown flag; did you mean --{''.join(near) or 'help'}?")
        kind = type(default[key])
        pattern = r"[1-9](_?\d){,17}" if kind is int else "(?s).+"
        if not re.fullmatch(pattern, value) or key in values and kind is not tuple:
            fail(f"{arg}: give --{key} once" + ", with a whole number above 0" * (kind is int))
        values[key] = values.get(key, ()) + (value,) if kind is tuple else kind(value)
    name, *rest = values.get("name", ["no source"])
    if (name not in NAMES and not re.fullmatch("hf:[^/]+/[^/]+", name)
            or len(rest) != (name == "meta") or ("input" in values) != (name == "files")):
        fail(f"{name}: give one of {', '.join(NAMES)}; meta goes with a FOLDER, files with --input")
    usual = HUB[name][2] if name in HUB else "gpt2" if name in PUBLISHED_AS else "byte"
    out = rest[0] if rest else f"data/{name.removeprefix('hf:').split('/')[-1]}"
    return Config(**{"tokenizer": usual, "out": out, **values, "name": name})

def spooled(stream):
    """A stream as a file on disk, for what is read twice or out of order."""
    file = tempfile.NamedTemporaryFile(buffering=0)
    shutil.copyfileobj(stream, file)
    return file

def local_parts(given, split=None, pattern=""):
    """Paths, folders and globs in the order given, the files of a folder by name."""
    found = {}
    for item in given:
        spool = spooled(sys.stdin.buffer) if item == "-" else None
        path = spool.name if spool else os.path.expanduser(item)
        files = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        if os.path.isdir(path):
            files = glob.glob(f"{glob.escape(path)}/{pattern or '**'}", recursive=True)
            files = [file for file in files if pattern or READABLE.fullmatch(file)]
        files = sorted(Path(file) for file in files if os.path.isfile(file))
        if not files:
            fail(f"{item}: no such file, or nothing to read there; --glob='**/*.txt' picks files")
        for file in files:
            stamp = f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
            found[file.resolve()] = Part(str(file), split, stamp, spool)
    return list(found.values())

def hub_parts(cfg):
    """Files of a data set, pinned to a revision so that a resumed run reads the same."""
    import datasets
    repo, config, _ = HUB.get(cfg.name, (cfg.name.removeprefix("hf:"), cfg.config, ""))
    builder = datasets.load_dataset_builder(repo, config or None)
    found = builder.as_streaming_dataset()
    chosen = {name: SPLITS[name] for name in found if name in SPLITS}
    if "val" not in chosen.values():
        chosen["train"] = None
    if cfg.split:
        chosen = {cfg.split: None}
    if not set(chosen) <= set(found):
        fail(f"{cfg.name}: name a split by --split={' or '.join(found)}")
    return [Part(f"hf:{repo} {name} {i}", split, f"{builder.hash} {name} {i}",
                 found[name].shard(found[name].num_shards, i))
            for name, split in chosen.items() for i in range(found[name].num_shards)]

def corpus(cfg, folder):
    """-> parts, held-out ones first."""
    if cfg.name == "files":
        parts = local_parts(cfg.input, pattern=cfg.glob)
    elif cfg.name == "stdlib":  # less the tests, which some systems leave out
        root = Path(os.__file__).parent
        parts = local_parts(path for path in sorted(root.rglob("*.py"))
                            if not NOT_STDLIB & set(path.relative_to(root).parts))
    elif cfg.name == "shakespeare":
        path = folder / "tinyshakespeare.txt"
        if not path.exists():
            write_atomically(path, urllib.request.urlopen(SHAKESPEARE, timeout=30).read())
        parts = local_parts([path])
    else:
        parts = hub_parts(cfg)
    if cfg.val_input:
        parts = local_parts(cfg.val_input, "val") + [
            part._replace(split=part.split or "train") for part in parts if part.split != "val"]
    return sorted(parts, key=lambda part: part.split not in HELD_OUT)

def unpack(name, file):
    """(name, stream) of a file, or of all that is packed in it, by its first bytes."""
    file = io.BufferedReader(file, 1 << 20)
    head = file.peek(300)
    for magic, codec in CODECS.items():
        if head.startswith(magic):
            inner = lzma.open(file) if codec == "xz" else pyarrow.CompressedInputStream(file, codec)
            return (yield from unpack(re.sub(r"\.\w+$", "", name), inner))
    if not head.startswith(b"PK\3\4"):
        return (yield name, file)
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if not HIDDEN.match(n) and not n.endswith("/")]
        for member in [n for n in names if READABLE.fullmatch(n)] or names:
            with archive.open(member) as inner:
                yield from unpack(f"{name}/{member}", inner)

def kind_of(name, start, text_key):
    """What a text is by its name in lower case and its start: json, csv, html or text."""
    line = start.lstrip().partition("\n")[0]
    columns = [column.strip("\" \r") for column in re.split("[,;\t]", line)]
    if name.endswith((".json", ".jsonl", ".ndjson")) or JSON.match(start):
        return "json"
    if name.endswith((".csv", ".tsv")) or len(columns) > 1 and text_key in columns:
        return "csv"
    return "html" if HTML.match(line) and not name.endswith(".md") else "text"

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
    file = stream.raw if isinstance(stream.raw, io.FileIO) else spooled(stream)
    yield from datasets.load_dataset(kind, data_files=file.name, split="train", streaming=True)

def texts_of(cfg, name, rows, counts):
    """Texts in rows; rows without are counted, and refused if they are many."""
    n_rows = n_missing = 0
    for n_rows, row in enumerate(rows, 1):
        text = row = row if isinstance(row, dict) else {cfg.text_key: row}
        for key in cfg.text_key.split("."):
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
    head = stream.peek()
    if head[:4] in TABLES:
        return texts_of(cfg, name, table_rows(stream, TABLES[head[:4]]), counts)
    encoding = cfg.encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    start = head.decode(encoding, "replace")
    kind = "text" if cfg.as_text else kind_of(name.lower(), start, cfg.text_key)
    if kind == "html" or NOT_TEXT.match(head) and not cfg.as_text:
        fail(f"{name}: HTML, XML, PDF, RTF, Word, e-book or tar; extract the text, or --as_text=1")
    file = io.TextIOWrapper(stream, encoding, "replace", newline="")
    blocks = iter(lambda: file.read(PIECE_CHARS), "")
    if kind == "json":
        return texts_of(cfg, name, json_rows(name, blocks), counts)
    if kind == "csv":
        csv.field_size_limit(MAX_ROW)
        delimiter = max(",\t;", key=start.partition("\n")[0].count)
        return texts_of(cfg, name, csv.DictReader(file, delimiter=delimiter), counts)
    if cfg.split_on:
        separator = SEPARATORS.get(cfg.split_on, re.escape(cfg.split_on))
        return (text.strip("\r\n") for text in separated(name, blocks, separator))
    return [blocks]

def pieces(texts, size):
    """Texts, or blocks of a text -> (is first, at most `size` characters). Pre-tokenizers begin a
    match at a space or newline after a letter or digit, so that a cut there changes no token."""
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
    """A part as pieces (hash of the document if the piece is its first, else False; text)."""
    with doing(part.path, "mend, replace or leave it out"):
        if part.path.startswith("hf:"):
            files = [(part.path, texts_of(cfg, part.path, part.held, counts))]
        else:
            files = ((name, documents(cfg, name, stream, counts)) for name, stream
                     in unpack(part.path, open(part.path, "rb", buffering=0)))
        for name, texts in files:
            size = lost = 0
            for first, text in pieces(texts, PIECE_CHARS):
                size += len(text)
                lost += text.count("\0") + text.count("\ufffd")
                if lost > MAX_LOSS * max(size, PIECE_CHARS):
                    break
                text = text.replace("\0", "")  # which is to mark documents
                start = text[:HASH_CHARS].encode()
                yield first and hashlib.blake2b(start, digest_size=7).hexdigest(), text
            counts["characters that could not be decoded are U+FFFD, or removed NUL"] += lost
            if lost > MAX_LOSS * size:
                fail(f"{name}: {lost:,} of {size:,} characters are lost; name another --encoding, "
                     "as in --encoding=gbk, latin-1, utf-16-le ..")

def split_rule(cfg, parts):
    """[hash, tail]: documents up to that hash are validation, and text after `tail` characters."""
    sizes, found = Counter(), (piece for part in parts if not part.split
                               for piece in read(cfg, part, Counter()))
    for code, text in found:
        if code:
            document, is_new = code, code not in sizes
            if is_new and len(sizes) == SCAN_DOCUMENTS:
                break
        if is_new:
            sizes[document] += len(text)
    total, order = sizes.total(), sorted(sizes)
    if len(sizes) < FEW_DOCUMENTS:
        return ["", total - int(total * TAIL) if sizes else sys.maxsize]
    n = sum(size <= VAL_FRACTION * total for size in itertools.accumulate(map(sizes.get, order)))
    return [order[max(1, n) - 1], sys.maxsize]

def route(cfg, part, rule, counts):
    """Pieces of a part as (split, text), NUL before each document. `counts` has hashes of some."""
    last_hash, tail = ["", sys.maxsize] if part.split else rule
    is_held_out, said = part.split in HELD_OUT, KEPT if KEPT in counts else REPEATED
    for code, text in read(cfg, part, counts):
        if code:
            split = part.split or ("val" if code <= last_hash else "train")
            is_repeat = code in counts and not is_held_out
            counts[said] += is_repeat
            if is_held_out or tail < sys.maxsize:
                counts[code] = 0
        if is_repeat and said == REPEATED:
            continue
        left = max(0, tail - counts["characters"])
        counts["characters"] += len(text)
        for name, half in (split, text[:left]), ("val", text[left:]):
            if half:
                yield name, "\0" * (bool(code) or name != split) + half
                split = name

def batches(cfg, parts, run):
    """(state, {split: texts}): a run that has written these goes on from that state, if any."""
    counts = Counter(run["counts"])
    for index in range(run["part"], len(parts)):
        batch, size = {}, 0
        for split, text in route(cfg, parts[index], run["rule"], counts):
            counts[SPELLED] += text.count(BOS_TEXTS[0])
            batch.setdefault(split, []).append(text)
            size += len(text)
            if size >= PIECE_CHARS:
                yield {}, batch
                batch, size = {}, 0
        yield {"part": index + 1, "counts": dict(counts)}, batch

def tokenizer_meta(name, table=None, pattern=None, bos_id=0):
    """A tokenizer as in meta.json; its table, None for bytes, has U+0000 to U+00FF for bytes."""
    lengths = [len(token) for token in table or ["?"] * 256]
    lengths[bos_id] = 0
    values = name, len(lengths), bos_id, pattern, table, lengths
    return dict(zip(TOKENIZER_KEYS, values, strict=True))

def dtype_of(meta):
    return np.dtype("<u2" if meta["vocab_size"] > 256 else "<u1")

def make_encoder(meta):
    """-> a function: {split: texts} -> {split: ids}. NUL stands for bos_id."""
    table, bos_id, name = meta["token_bytes"], meta["bos_id"], meta["tokenizer"]
    if table:
        ranks = {t.encode("latin-1"): i for i, t in enumerate(table) if t and i != bos_id}
        if len(table) > 65536 or not all(bytes([byte]) in ranks for byte in range(256)):
            fail(f"--tokenizer={name}: more than 65536 tokens, or not all bytes among them")
        bpe = tiktoken.Encoding(name, pat_str=meta["pattern"], mergeable_ranks=ranks,
                                special_tokens={"\0": bos_id})

    def encode(texts):
        text = "".join(texts)  # one call does them all
        if not table:
            return np.frombuffer(text.encode(), np.uint8)
        return bpe.encode_to_numpy(text, allowed_special={"\0"}).astype(dtype_of(meta))
    return lambda batch: {split: encode(texts) for split, texts in batch.items()}

def hf_tokenizer(name, hf):
    """A tokenizer of the library `tokenizers` in the form of tiktoken, if that cuts text alike."""
    saved, vocab = json.loads(hf.to_str()), hf.get_vocab()
    steps = saved["pre_tokenizer"].get("pretokenizers", [saved["pre_tokenizer"]])
    patterns = [s["pattern"]["Regex"] for s in steps if s["type"] == "Split"] + [GPT2_PATTERN]
    # Byte-level BPE writes bytes as characters: those that print as they are, others from U+0100
    others = [b for b in range(256) if b == 32 or not chr(b).isprintable()]
    byte_of = {256 + i: byte for i, byte in enumerate(others)}
    spelled = {i: token.translate(byte_of) for token, i in vocab.items()}
    table = [spelled.get(i, "") for i in range(max(spelled) + 1)]
    bos_id = next((vocab[text] for text in BOS_TEXTS if text in vocab), len(table))
    meta = tokenizer_meta(name, table + [""] * (bos_id == len(table)), patterns[0], bos_id)
    text = f"{__doc__} d\u00e9j\u00e0 \u65e5\u672c, don't\n\n\tx = [-1]!\n"
    ids = make_encoder(meta)({"": [text]})[""]
    if ids.tolist() != hf.encode(text, add_special_tokens=False).ids:
        fail(f"--tokenizer={name}: cuts text in a way that this program does not; use another")
    return meta

def training_texts(cfg, parts, rule):
    """What a BPE is trained on, in short texts: the trainer holds 256, each with much besides."""
    n, counts = 0, Counter()
    found = (piece for part in parts if part.split not in HELD_OUT
             for piece in route(cfg, part, rule, counts))
    texts = (text.lstrip("\0") for split, text in found if split == "train")
    for _, text in pieces(texts, 1 << 14):
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

def make_tokenizer(cfg, parts, rule):
    """A tokenizer by its name, or from a prepared folder, a checkpoint or a tokenizer.json."""
    name = cfg.tokenizer
    remedy = "give byte, gpt2 (network or TIKTOKEN_CACHE_DIR), bpe:N as in bpe:8192, or a path"
    with doing(f"--tokenizer={name}", remedy):
        if name == "byte":
            return tokenizer_meta("byte")
        if name == "gpt2":
            bpe = tiktoken.get_encoding("gpt2")
            table = [t.decode("latin-1") for t in bpe.decode_tokens_bytes(range(bpe.eot_token))]
            return tokenizer_meta("gpt2", [*table, ""], GPT2_PATTERN, len(table))
        if name.startswith("bpe:"):
            return train_bpe(name, training_texts(cfg, parts, rule))
        file = Path(name, "meta.json" if os.path.isdir(name) else "")
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
                or header[4] not in (0, size)):
            fail(f"{path}: not a whole llm.c shard of {meta['tokenizer']} tokens; see --tokenizer")
        n_bytes = int(counts[:size] @ np.array(meta["byte_length"]))
        splits.setdefault(match[1], Counter()).update(
            tokens=len(tokens), bytes=n_bytes, documents=int(counts[meta["bos_id"]]))
        shards[path.name] = {"tokens": len(tokens), "sha256": hashlib.sha256(raw).hexdigest()}
    return {"splits": splits, "shards": shards}

def tokenize(cfg, parts, folder, run):
    """Write the tokens of every split to a file; a later run goes on from what `run` saves."""
    run["totals"] = totals = Counter(run["totals"])
    pending, saved = deque(), time.monotonic()
    encode, itemsize = make_encoder(run["tokenizer"]), dtype_of(run["tokenizer"]).itemsize
    for path in folder.glob("*.tokens"):  # an earlier run may have written more than it saved
        os.truncate(path, totals[path.stem] * itemsize)
    max_train, n_workers = cfg.max_tokens or sys.maxsize, os.cpu_count()
    bar = tqdm(total=cfg.max_tokens or None, unit="tok", unit_scale=True, disable=None)
    with ThreadPoolExecutor(n_workers) as pool, bar:
        flush = [({}, [])] * 2 * n_workers
        for state, batch in itertools.chain(batches(cfg, parts, run), flush):
            pending.append((state, pool.submit(encode, batch)))
            if len(pending) <= len(flush):
                continue
            state, future = pending.popleft()
            for split, tokens in future.result().items():
                if split == "train":
                    tokens = tokens[:max_train - totals["train"]]
                with (folder / f"{split}.tokens").open("ab") as file:
                    file.write(tokens.data)
                totals[split] += tokens.size
            bar.update(totals.total() - bar.n)
            run |= state
            if state and time.monotonic() - saved >= SAVE_SECONDS:
                run["stamps"] = [part.stamp for part in parts[:run["part"]]]
                write_atomically(folder / STATE, json.dumps(run).encode())
                saved = time.monotonic()
            if totals["train"] >= max_train and totals["val"] and run["rule"][1] == sys.maxsize:
                break

def from_text(cfg, folder, settings):
    """Write the shards -> their tokenizer, and counts of what was odd in the text."""
    parts, state = corpus(cfg, folder), folder / STATE
    new = {"settings": settings, "rule": split_rule(cfg, parts)}
    run = json.loads(state.read_bytes()) if state.exists() else START
    if run == run | new | {"stamps": [part.stamp for part in parts[:run["part"]]]}:
        print(f"{cfg.name}: going on from an earlier run", file=sys.stderr)
    elif run == START and [*folder.glob("*.bin")] and not [*folder.glob("*.tokens")]:
        fail(f"{folder}: holds shards of another origin; give another --out")
    else:
        run = new | START | {"tokenizer": make_tokenizer(cfg, parts, new["rule"])}
        for leftover in *folder.glob(STATE), *folder.glob("*.tokens"), *folder.glob("*.bin"):
            leftover.unlink()
    tokenize(cfg, parts, folder, run)
    if not run["totals"]["train"] and run["counts"].get(REPEATED):
        run |= START | {"counts": {KEPT: 0}}
        tokenize(cfg, parts, folder, run)
    for split in "train", "val":
        if not run["totals"][split]:
            fail(f"{cfg.name}: no text for {split}; give more text or --val_input=PATH")
    meta, header = run["tokenizer"], np.zeros(256, "<i4")
    dtype = dtype_of(meta)
    for path in folder.glob("*.tokens"):
        tokens = np.memmap(path, dtype)
        for number, start in enumerate(range(0, len(tokens), cfg.shard_tokens)):
            shard = tokens[start:start + cfg.shard_tokens]
            header[:5] = MAGIC, VERSION, len(shard), dtype.itemsize, meta["vocab_size"]
            name = f"{path.stem}_{number + (path.stem == 'train'):06d}.bin"
            write_atomically(folder / name, header.data, shard.data)
    return meta, run["counts"]

def prepare(cfg):
    folder, path = Path(cfg.out), Path(cfg.out, "meta.json")
    # A hash, since this goes into every checkpoint, and paths are nobody else's business.
    settings = hashlib.sha256(repr(dataclasses.replace(cfg, out="")).encode()).hexdigest()
    made = json.loads(path.read_bytes())["settings"] if path.exists() else ""
    if made == settings:
        print(f"{folder} is complete; delete it to make it anew")
        return
    if cfg.name not in PUBLISHED_AS:
        if made:
            fail(f"{folder}: holds data of other settings; delete it, or give another --out")
        meta, counts = from_text(cfg, folder, settings)
    else:
        if cfg.name == "finewebedu10B":
            from huggingface_hub import snapshot_download
            n_shards = 1 + ((cfg.max_tokens or SHARDS_TOKENS) - 1) // 100_000_000
            names = ["*_val_*", *(f"*_train_{i + 1:06d}*" for i in range(n_shards))]
            snapshot_download(SHARDS, repo_type="dataset", local_dir=folder, allow_patterns=names)
        if not [*folder.glob("*.bin")]:
            fail(f"{folder}: no such folder, or no *train*.bin or *val*.bin there")
        meta, counts = make_tokenizer(cfg, [], []), {}
    meta = {"name": cfg.name, **meta, **describe(folder, meta), "settings": settings}
    write_atomically(path, json.dumps(meta).encode(), b"\n")
    for leftover in *folder.glob(STATE), *folder.glob("*.tokens"):
        leftover.unlink()
    for split, n in meta["splits"].items():
        print(f"{split:5} {n['tokens']:13,} tokens {n['bytes']:13,} bytes {n['documents']:,} docs")
    for said, n in counts.items():
        if n and " " in said:
            print(f"{n:,} {said}")
    T = max(2, min(256, 1 << meta["splits"].get("val", {}).get("tokens", 0).bit_length() >> 2))
    few = f" --seq_len={T} --batch_tokens={16 * T}  # or more text: --val_input=PATH" * (T < 256)
    print(f"{folder} is complete; next: python train_mdlm.py --preset=tiny --data={folder}{few}")

def main(argv):
    if {"-h", "--help"} & set(argv):
        return print(__doc__, inspect.getsource(Config), sep="\n")
    cfg = parse(argv)
    remedy = "mend that, or wait for the other run there; then give the same command again"
    with doing(cfg.out, remedy), filelock.FileLock(f"{cfg.out}/.lock", timeout=0):
        try:
            prepare(cfg)
        finally:
            if os.listdir(cfg.out) == [".lock"]:  # nothing was written
                shutil.rmtree(cfg.out)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # what a code page lacks
    main(sys.argv[1:])
