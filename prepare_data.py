"""Text -> token shards that every training script reads.

    python prepare_data.py stdlib                                  # this Python's own source; no network
    python prepare_data.py shakespeare                             # Tiny Shakespeare, 1.1 MB
    python prepare_data.py tinystories | pg19 | finewebedu | openwebtext [--max_tokens=1_000_000_000]
    python prepare_data.py finewebedu10B --max_tokens=900_000_000  # published GPT-2 shards, as they are
    python prepare_data.py files --input=FILE_OR_FOLDER_OR_GLOB... [--val_input=PATH...] --tokenizer=gpt2

Flags (--key=value): --tokenizer=byte|gpt2|bpe:8192, --out=FOLDER (data/NAME), --max_tokens (of
training text), --val_input, --test_input, --shard_tokens, --text_key, --workers. Inputs are .txt (one
document a file) and .jsonl (one JSON object a line, text in `text_key`), also as .gz and .xz.

Shard: 256 little-endian int32, [0] 20240520, [1] 1, [2] tokens, [3] bytes per token, [4] vocab size,
then uint8 or uint16 tokens: the llm.c format. meta.json, written last, makes the folder complete.
A document starts with bos_id and holds no NUL. Text that is not UTF-8 has each bad sequence replaced by
U+FFFD under every tokenizer; both removals and replacements are counted and reported.

Validation: the source's own split, or --val_input, or 2% of the documents by hash; a corpus of fewer
than 20 documents gives its last 10%. Long documents are cut only where the pre-tokenizer splits anyway,
so pieces give the tokens of the whole (a run of 512K characters without any such place is cut there).
The same command after Ctrl-C or kill -9 goes on where it stopped and gives the same bytes.
"""
import base64
import collections
import dataclasses
import difflib
import fnmatch
import glob
import gzip
import hashlib
import heapq
import io
import itertools
import json
import lzma
import math
import os
import re
import sys
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: no lock, everything else works
    fcntl = None

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
BLOCK_BYTES = 1 << 20  # one read of a file
PIECE_CHARS = 1 << 19  # longest text handed to a tokenizer at once; also a batch of short documents
HASH_CHARS = 1 << 16  # a document is assigned to a split by its first characters: it may be streamed
MAX_LINE = 1 << 26  # longest .jsonl line: it has to be parsed whole
BPE_CHARS = 50_000_000  # a BPE is trained on this much of the training text, from the start
FEW_DOCUMENTS, TAIL = 20, 0.1  # fewer documents than this: the last tenth is validation
VAL_FRACTION, SCAN_DOCUMENTS = 0.02, 2000  # otherwise this share of documents, judged on the first 2,000
SAVE_SECONDS = 2.0  # work lost to a kill -9
BOS_TEXT = "<|endoftext|>"
STATE, TOKEN_FILE = "state.json", "tokenizer.tiktoken"
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
TINY_SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                    "input.txt")
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PUBLISHED = "kjj0/finewebedu10B-gpt2"  # llm.c shards of 100M tokens: 99 for training, 1 for validation
PUBLISHED_SHARDS, PUBLISHED_TOKENS = 99, 100_000_000

# NAME -> Hugging Face data set, its parquet files by split (None: no split of its own), tokenizer
HUB = {
    "tinystories": ("roneneldan/TinyStories", {"val": "*validation*", "train": "*train*"}, "bpe:8192"),
    "pg19": ("emozilla/pg19", {"val": "*validation*", "test": "*test*", "train": "*train*"}, "byte"),
    "finewebedu": ("HuggingFaceFW/fineweb-edu", {None: "sample/10BT/*"}, "gpt2"),
    "openwebtext": ("Skylion007/openwebtext", {None: "*train*"}, "gpt2"),
}
NO_COUNTS = dict(invalid=0, nul=0, empty=0, tail_bytes=0)
NAMES = ("stdlib", "shakespeare", *HUB, "finewebedu10B", "files")


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = ""  # the source
    input: tuple = ()  # files: paths, folders, globs
    val_input: tuple = ()  # validation text, instead of a share of the corpus
    test_input: tuple = ()  # test text; without it there is no test split
    tokenizer: str = ""  # byte | gpt2 | bpe:N; "" = the source's usual one
    out: str = ""  # folder to write; "" = data/NAME
    max_tokens: int = 0  # training tokens to keep; 0 = all
    shard_tokens: int = 100_000_000  # tokens a shard
    workers: int = 0  # tokenizing threads; 0 = one a core
    text_key: str = "text"  # the field of a .jsonl line that holds the text


def fail(message):
    """The end of every user's mistake: one line, exit status 2."""
    print(f"prepare_data.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def near(word, choices):
    match = difflib.get_close_matches(word, choices, n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def parse(argv):
    """Command line -> Config."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    flags = [name for name in fields if name != "name"]
    values, last = {}, None
    for arg in argv:
        key, equals, value = arg[2:].partition("=")
        if not arg.startswith("-"):
            if last and isinstance(fields[last].default, tuple):
                values[last] += (arg,)  # --input=A B C
            elif "name" in values:
                fail(f"{arg}: expected --key=value after {values['name']}")
            elif arg not in NAMES:
                fail(f"{arg}: unknown source{near(arg, NAMES)}; one of {', '.join(NAMES)}")
            else:
                values["name"] = arg
            continue
        if key not in flags or not arg.startswith("--"):
            guess = near(arg, ["--" + f for f in flags])
            fail(f"{arg.partition('=')[0]}: unknown flag{guess}")
        if not equals or not value:
            fail(f"--{key}: no value; write --{key}=VALUE")
        if key in values:
            fail(f"--{key}: given twice")
        if isinstance(fields[key].default, int):
            try:
                values[key] = int(value)
            except ValueError:
                fail(f"--{key}={value}: not a whole number")
            if values[key] < 1:
                fail(f"--{key}={value}: must be at least 1")
        else:
            values[key] = (value,) if isinstance(fields[key].default, tuple) else value
        last = key
    if "name" not in values:
        fail(f"no source given; one of {', '.join(NAMES)}")
    cfg = Config(**values)
    if (cfg.name == "files") != bool(cfg.input):
        fail("files: say which with --input=PATH" if cfg.name == "files" else
             f"--input: goes with files, not with {cfg.name}")
    usual = {"finewebedu10B": "gpt2", **{name: hub[2] for name, hub in HUB.items()}}
    cfg = dataclasses.replace(cfg, tokenizer=cfg.tokenizer or usual.get(cfg.name, "byte"),
                              out=cfg.out or f"data/{cfg.name}", workers=cfg.workers or cores())
    if cfg.name == "finewebedu10B":
        if cfg.tokenizer != "gpt2":
            fail("--tokenizer: the published shards of finewebedu10B are gpt2; for another tokenizer "
                 "take the text: prepare_data.py finewebedu")
        if cfg.val_input or cfg.test_input or "shard_tokens" in values:
            fail("finewebedu10B: its shards are kept as published; only --out and --max_tokens apply")
    bpe = re.fullmatch(r"bpe:(\d+)", cfg.tokenizer)
    if not bpe and cfg.tokenizer not in ("byte", "gpt2"):
        fail(f"--tokenizer={cfg.tokenizer}: unknown; byte, gpt2 or bpe:N, as in bpe:8192")
    if bpe and not 257 <= int(bpe[1]) <= 65536:
        fail(f"--tokenizer={cfg.tokenizer}: N must lie between 257 (256 bytes and the document "
             "start) and 65536 (tokens are uint16)")
    if cfg.shard_tokens >= 2**31:
        fail(f"--shard_tokens={cfg.shard_tokens}: a header counts at most {2**31 - 1} tokens")
    return cfg


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- sources: a corpus is a list of parts, each a file that holds one document or many


@dataclasses.dataclass(frozen=True)
class Part:
    path: str
    kind: str  # text: the file is one document; jsonl; hub: a parquet file on the Hugging Face hub
    split: str | None  # fixed split, or None: by the corpus's split rule
    size: int  # bytes as stored
    stamp: str  # identifies the content: modification time, or the hub's revision


def local_part(path, split=None):
    name = path.name.lower()
    for packed in (".gz", ".xz"):
        name = name.removesuffix(packed)
    kind = "jsonl" if name.endswith((".jsonl", ".ndjson")) else "text"
    if name.endswith((".json", ".parquet", ".zip", ".bin", ".zst", ".bz2", ".tar", ".tgz", ".pdf")):
        fail(f"{path}: not a kind of file read here; give .txt or .jsonl, plain or as .gz or .xz")
    try:
        with path.open("rb"):
            stat = path.stat()
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    return Part(str(path), kind, split, stat.st_size, str(stat.st_mtime_ns))


def local_parts(flag, given, split=None):
    """Paths, folders and globs in the order given, a folder's files by name."""
    suffixes = tuple(kind + packed for kind in (".txt", ".jsonl") for packed in ("", ".gz", ".xz"))
    found = []
    for item in given:
        path = Path(item).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(suffixes)
                            and p.is_file() and not p.name.startswith("."))
            if not inside:
                fail(f"--{flag}={item}: no .txt or .jsonl file (also .gz, .xz) in this folder")
        elif path.exists():
            inside = [path]
        else:
            inside = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not inside:
                fail(f"--{flag}={item}: no such file")
        found += inside
    return [local_part(path, split) for path in dict.fromkeys(found)]


def stdlib_parts():
    """Python files of the interpreter's library, without tests: some systems do not install those."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if not found:
        fail(f"stdlib: no .py file in {root}; use files --input=PATH")
    return [local_part(path) for path in found]


def shakespeare_parts(folder):
    path = folder / "tinyshakespeare.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(TINY_SHAKESPEARE, timeout=30) as reply:
                data = reply.read()
        except OSError as error:
            fail(f"shakespeare: {TINY_SHAKESPEARE} could not be fetched ({error}); fetch it by other "
                 "means and run: prepare_data.py files --input=PATH --out=data/shakespeare")
        if hashlib.sha256(data).hexdigest() != TINY_SHAKESPEARE_SHA256:
            fail(f"shakespeare: {TINY_SHAKESPEARE} returned another text ({len(data)} bytes); "
                 "try again, or use files --input=PATH")
        write_atomically(path, data)
    return [local_part(path)]


def hub_parts(name):
    """The parquet files of a data set, pinned to one revision so that a resumed run reads the same."""
    repo, patterns, _ = HUB[name]
    library("datasets", name)
    api = library("huggingface_hub", name).HfApi()
    for revision in (None, "refs/convert/parquet"):  # the hub's own conversion, where there is one
        with hub_errors(name):
            info = api.dataset_info(repo, revision=revision, files_metadata=True)
        parts = [Part(f"hf://datasets/{repo}@{info.sha}/{f.rfilename}", "hub", split, f.size or 1,
                      info.sha)
                 for split, pattern in patterns.items()
                 for f in sorted(info.siblings, key=lambda f: f.rfilename)
                 if fnmatch.fnmatch(f.rfilename, pattern) and f.rfilename.endswith(".parquet")]
        if parts:
            return parts
    fail(f"{name}: no parquet files in {repo}; fetch the text and use files --input=PATH")


def library(module, need):
    """Import an optional library where it is used, with the remedy when it is not installed."""
    try:
        return __import__(module)
    except ImportError:
        fail(f"{need} needs the package {module}; install it: pip install {module}")


class hub_errors:
    """Turns what the hub's libraries raise (their own, httpx's, the system's) into one line."""
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind and issubclass(kind, Exception):
            first = (str(error).strip().splitlines() or [""])[0][:200]
            fail(f"{self.name}: the Hugging Face hub could not be read ({kind.__name__}: {first}); run the "
                 "same command again to go on, or fetch the text and use files --input=PATH")


def hub_texts(builder, path, key):
    """Texts of one file, streamed: nothing is kept on disk."""
    import datasets
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(builder, data_files=[path], split="train", streaming=True)
    for row in rows.select_columns([key]):
        yield row[key]


class Reader:
    """Reads parts as a stream of (first, text): blocks of documents, `first` where one starts."""
    def __init__(self, parts, text_key, counts=None):
        self.parts, self.text_key, self.raw = parts, text_key, None
        self.before = list(itertools.accumulate((p.size for p in parts), initial=0))
        self.counts = dict(counts or NO_COUNTS)
        self.current = 0

    def fraction(self):
        """Share of the stored bytes that have been read."""
        here = self.raw.tell() if self.raw and not self.raw.closed else 0
        return (self.before[self.current] + here) / max(1, self.before[-1])

    def read(self, index):
        self.current, part, self.raw = index, self.parts[index], None
        if part.kind == "hub":
            with hub_errors(part.path):
                yield from self.whole(hub_texts("parquet", part.path, self.text_key), part.path)
            return
        try:
            with open(part.path, "rb") as self.raw:
                file = self.raw
                if part.path.lower().endswith(".gz"):
                    file = gzip.GzipFile(fileobj=self.raw)
                elif part.path.lower().endswith(".xz"):
                    file = lzma.LZMAFile(self.raw)
                if part.kind == "jsonl":
                    yield from self.whole(self.lines(part.path, io.BufferedReader(file)), part.path)
                else:
                    yield from self.blocks(file)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                fail(f"{part.path}: {error.strerror}")
            fail(f"{part.path}: damaged or cut short ({error}); fetch or pack it again")

    def decode(self, raw):
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            self.counts["invalid"] += text.count("\ufffd") - raw.count("\ufffd".encode())
        return text

    def clean(self, text):
        if "\0" in text:
            self.counts["nul"] += text.count("\0")
            text = text.replace("\0", "")
        return text

    def blocks(self, file):
        """One document in blocks that end between characters."""
        first, rest = True, b""
        while raw := file.read(BLOCK_BYTES):
            raw, rest, end = rest + raw, b"", None
            for back in range(1, min(4, len(raw))):  # a sequence that may go on in the next block
                if raw[-back] >= 0xC0:
                    end = -back
                if raw[-back] >= 0xC0 or raw[-back] < 0x80:
                    break
            if end:
                raw, rest = raw[:end], raw[end:]
            if text := self.clean(self.decode(raw)):
                yield first, text
                first = False
        if rest and (text := self.clean(self.decode(rest))):
            yield first, text
            first = False
        self.counts["empty"] += first

    def lines(self, path, file):
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                fail(f"{path}, line {number}: longer than {MAX_LINE >> 20} MiB; store such a text as .txt")
            if not line.strip():
                continue
            try:
                row = json.loads(self.decode(line))
                text = row[self.text_key]
            except ValueError as error:
                fail(f"{path}, line {number}: not JSON ({error})")
            except (KeyError, TypeError, IndexError):
                keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                fail(f"{path}, line {number}: no field {self.text_key} ({keys[:200]}); name the field "
                     "of the text with --text_key")
            if not isinstance(text, str):
                fail(f"{path}, line {number}: {self.text_key} holds {type(text).__name__}, not text")
            if b"\\u" in line:  # an escaped half of a surrogate pair is no character
                fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                self.counts["invalid"] += fixed.count("\ufffd") - text.count("\ufffd")
                text = fixed
            yield text

    def whole(self, texts, path):
        for text in texts:
            if not isinstance(text, str):
                fail(f"{path}: a row holds {type(text).__name__} where text is expected")
            if text := self.clean(text):
                for start in range(0, len(text), PIECE_CHARS):
                    yield start == 0, text[start:start + PIECE_CHARS]
            else:
                self.counts["empty"] += 1


    def route(self, index, rule):
        """Blocks of a part as (split, first, text), by the part's own split or the corpus's rule."""
        split = None
        for first, text in self.read(index):
            if self.parts[index].split:
                yield self.parts[index].split, first, text
            elif "hash" in rule:
                if first:
                    split = "val" if document_hash(text) <= rule["hash"] else "train"
                yield split, first, text
            else:
                data = text.encode()
                left = max(0, rule["tail"] - self.counts["tail_bytes"])
                self.counts["tail_bytes"] += len(data)
                head = data[:left].decode(errors="ignore")  # ends on a character
                if head:
                    split = "train"
                    yield split, first, head
                if len(head) < len(text):
                    yield "val", first or split == "train", text[len(head):]
                    split = "val"


def document_hash(text):
    start = text[:HASH_CHARS].encode()
    return int.from_bytes(hashlib.blake2b(start, digest_size=7).digest(), "big")


def split_rule(parts, text_key):
    """How parts without a split of their own are divided; reads the corpus until that is known.

    {"tail": n}: text after n bytes is validation. {"hash": h}: documents hashing to h or less are.
    Of few documents h is the k-th smallest hash, so that validation is never left empty.
    """
    reader, hashes, total = Reader(parts, text_key), [], 0
    for index, part in enumerate(parts):
        for first, text in reader.read(index) if part.split is None else ():
            if first:
                hashes.append(document_hash(text))
            if len(hashes) == SCAN_DOCUMENTS:
                return {"hash": int(VAL_FRACTION * 2**56)}
            if len(hashes) < FEW_DOCUMENTS:
                total += len(text.encode())
    if len(hashes) < FEW_DOCUMENTS:
        return {"tail": total - int(total * TAIL)}
    return {"hash": heapq.nsmallest(math.ceil(VAL_FRACTION * len(hashes)), set(hashes))[-1]}


# A place where GPT2_PATTERN starts a new match whatever stands around it: before ASCII white space that
# follows something else (no alternative runs from text into white space), or where letters, digits
# and punctuation change, except after an apostrophe, which may start a contraction.
LETTER, DIGIT = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3", "0-9"
MARK = r"!-&(-/:-@\[-`{-~\u3001\u3002\u300c\u300d\uff01\uff0c\uff1a\uff1b\uff1f"
CHANGE = re.compile(f"(?<=[{LETTER}])(?=[{DIGIT}{MARK}])|(?<=[{DIGIT}])(?=[{LETTER}{MARK}])"
                    f"|(?<=[{MARK}])(?=[{LETTER}{DIGIT}])")


def safe_cut(text, start, limit):
    """Last safe place in (start, limit), or limit where there is none."""
    at = limit
    while (at := max(text.rfind(" ", start + 1, at), text.rfind("\n", start + 1, at))) > start:
        # Python strips all that \s matches and four control characters more, hence the second look
        at = start + len(text[start:at].rstrip())
        if at > start and text[at] in " \t\r\n":
            return at
    window = max(start + 1, limit - HASH_CHARS)
    changes = collections.deque(CHANGE.finditer(text, window, limit), maxlen=1)
    return changes[0].start() if changes else limit


def pieces(blocks, size):
    """Blocks of documents -> (split, first, text) with documents cut to at most `size` characters."""
    split, first, text = None, True, ""
    for next_split, next_first, block in blocks:
        if next_first:
            if text:
                yield split, first, text
            split, first, text = next_split, True, ""
        text, start = text + block, 0
        while len(text) - start > size:
            end = safe_cut(text, start, start + size)
            yield split, first, text[start:end]
            first, start = False, end
        text = text[start:]
    if text:
        yield split, first, text


def batches(reader, rule, position, wanted):
    """Batches of pieces with the position after each; a position is where a later run goes on."""
    batch, size = [], 0
    for index in range(position["part"], len(reader.parts)):
        counts, skip = dict(reader.counts), position["pieces"] * (index == position["part"])
        for number, piece in enumerate(pieces(reader.route(index, rule), PIECE_CHARS), 1):
            if number <= skip or not wanted(piece[0]):
                continue
            batch.append(piece)
            size += len(piece[2])
            if size >= PIECE_CHARS:
                yield dict(part=index, pieces=number, counts=counts), batch
                batch, size = [], 0
    if batch:
        yield dict(part=len(reader.parts), pieces=0, counts=dict(reader.counts)), batch


# ---- tokenizers


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    name: str
    vocab_size: int
    bos_id: int
    pattern: str | None  # pre-tokenizer; None for bytes
    ranks: dict | None  # bytes -> id, in merge order
    bpe: object  # tiktoken.Encoding

    @property
    def dtype(self):
        return np.dtype("<u1" if self.vocab_size <= 256 else "<u2")

    def byte_length(self):
        """(V,) bytes of text that each id stands for; a document start stands for none."""
        table = np.ones(self.vocab_size, np.int64)
        for token, rank in (self.ranks or {}).items():
            table[rank] = len(token)
        table[self.bos_id] = 0
        return table

    def encode(self, texts):
        """(first, text) pairs -> tokens, a document start before each `first`."""
        if self.bpe is None:
            joined = b"".join(b"\0" * first + text.encode() for first, text in texts)
            return np.frombuffer(joined, self.dtype)
        # Documents are joined by the special token, so that one call outside the GIL does a whole batch.
        # A text that spells the token is encoded by itself, with no special tokens at all.
        out, joined = [], []

        def flush():
            if joined:
                out.append(self.bpe.encode_to_numpy("".join(joined), allowed_special={BOS_TEXT}))
                joined.clear()

        for first, text in texts:
            if first and BOS_TEXT not in text:
                joined.append(BOS_TEXT + text)
                continue
            flush()
            out.append(np.array([self.bos_id] * first, np.uint32))
            out.append(self.bpe.encode_to_numpy(text, disallowed_special=()))
        flush()
        return np.concatenate(out).astype(self.dtype)

    def encode_batch(self, batch):
        """Pieces -> [(split, tokens)], in order."""
        return [(split, self.encode([piece[1:] for piece in group]))
                for split, group in itertools.groupby(batch, key=lambda piece: piece[0])]


def bpe_tokenizer(name, pattern, ranks):
    bos = len(ranks)
    bpe = library("tiktoken", f"--tokenizer={name}").Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={BOS_TEXT: bos})
    return Tokenizer(name, bos + 1, bos, pattern, ranks, bpe)


def gpt2_tokenizer():
    tiktoken = library("tiktoken", "--tokenizer=gpt2")
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' own kinds, or a damaged file in the cache
        fail(f"--tokenizer=gpt2: the GPT-2 vocabulary could not be fetched ({type(error).__name__}); "
             "connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use "
             "--tokenizer=byte")
    return bpe_tokenizer("gpt2", gpt2._pat_str, gpt2._mergeable_ranks)


def train_bpe(name, texts):
    """BPE over texts -> ranks of name's vocabulary less the document start."""
    tokenizers = library("tokenizers", f"--tokenizer={name}")
    size = int(name.partition(":")[2]) - 1
    level = tokenizers.pre_tokenizers.ByteLevel
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = level(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(level.alphabet()),
                                             special_tokens=[], show_progress=False)
    model.train_from_iterator(texts, trainer)
    # ByteLevel writes bytes as printable characters: those that print stand for themselves, the
    # others for U+0100 and up
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in model.get_vocab().items()}
    if len(ranks) < size:
        fail(f"--tokenizer={name}: this text gives only {len(ranks)} tokens; use bpe:{len(ranks) + 1} or "
             "less")
    return ranks


def make_tokenizer(cfg, parts, rule, path, keep):
    """The tokenizer of a run; `path` keeps its vocabulary, and is used again where `keep` says so."""
    if cfg.tokenizer == "byte":
        return Tokenizer("byte", 256, 0, None, None, None)
    if cfg.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif keep:
        with path.open("rb") as file:
            pairs = (line.split() for line in file)
            return bpe_tokenizer(cfg.tokenizer, GPT2_PATTERN,
                                 {base64.b64decode(token): int(rank) for token, rank in pairs})
    else:
        print(f"training {cfg.tokenizer} on up to {BPE_CHARS / 1e6:.0f}M characters", file=sys.stderr)
        reader = Reader(parts, cfg.text_key)

        def sample():
            left = BPE_CHARS
            blocks = itertools.chain.from_iterable(reader.route(i, rule) for i in range(len(parts))
                                                   if parts[i].split in (None, "train"))
            # short texts: the trainer holds 256 of them at a time, and much besides for each
            for split, _, text in pieces(blocks, 1 << 14):
                if split == "train":
                    yield text[:left]
                    left -= len(text)
                    if left <= 0:
                        return

        tokenizer = bpe_tokenizer(cfg.tokenizer, GPT2_PATTERN, train_bpe(cfg.tokenizer, sample()))
    lines = (base64.b64encode(token) + b" %d\n" % rank
             for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]))
    write_atomically(path, b"".join(lines))
    return tokenizer


# ---- files


def write_all(file, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view):]


def sync_folder(folder):
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_atomically(path, data):
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb", buffering=0) as file:
        write_all(file, data)
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def sha256(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def counted(tokens, table, bos_id):
    return dict(tokens=int(tokens.size), bytes=int(table[tokens].sum()),
                documents=int(np.count_nonzero(tokens == bos_id)))


NOTHING = dict(tokens=0, bytes=0, documents=0)
OURS = re.compile(r"(train|val|test)_\d{6}\.bin(\.tmp)?")


class Shards:
    """Writes tokens to shards. A shard has a temporary name until it is whole.

    What is on disk beyond the state of the last save is taken back when a run goes on.
    """
    def __init__(self, folder, tokenizer, shard_tokens, limits, saved):
        self.folder, self.shard_tokens, self.limits = folder, shard_tokens, limits
        self.dtype, self.bos_id = tokenizer.dtype, tokenizer.bos_id
        self.vocab_size, self.table = tokenizer.vocab_size, tokenizer.byte_length()
        self.finished, self.totals = saved["finished"], saved["totals"]
        self.current = saved["current"]  # split -> counts of the shard being written, and its index
        self.files = {}
        for name, shard in self.finished.items():
            path, size = folder / name, HEADER_BYTES + shard["tokens"] * self.dtype.itemsize
            if not path.exists() or path.stat().st_size != size:
                fail(f"{path}: missing or changed since it was written; delete {folder} and start again")
        for split, shard in self.current.items():
            path, size = self.path(split), HEADER_BYTES + shard["tokens"] * self.dtype.itemsize
            temporary = path.with_name(path.name + ".tmp")
            if path.exists():  # finished after the last save
                os.replace(path, temporary)
            if shard["tokens"] and not (temporary.exists() and temporary.stat().st_size >= size):
                fail(f"{temporary}: missing or cut short; delete {folder} and start again")
            self.files[split] = temporary.open("r+b" if shard["tokens"] else "w+b", buffering=0)
            self.files[split].truncate(size)
            self.files[split].seek(size)
        known = {self.path(split).name + ".tmp" for split in self.current} | set(self.finished)
        for path in folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in known:
                path.unlink()

    def path(self, split):
        return self.folder / f"{split}_{self.current[split]['index']:06d}.bin"

    def room(self, split):
        """Tokens that the split still takes."""
        return self.limits.get(split, sys.maxsize) - self.totals.get(split, NOTHING)["tokens"]

    def full(self):
        return {split for split in self.limits if self.room(split) == 0}

    def write(self, split, tokens):
        if split not in self.current:
            self.totals[split] = dict(NOTHING)
            self.start(split, int(split == "train"))
        tokens = tokens[:self.room(split)]
        while tokens.size:
            shard = self.current[split]
            part = tokens[:self.shard_tokens - shard["tokens"]]
            write_all(self.files[split], part)
            for key, count in counted(part, self.table, self.bos_id).items():
                shard[key] += count
                self.totals[split][key] += count
            tokens = tokens[part.size:]
            if shard["tokens"] == self.shard_tokens:
                self.finish(split)
                self.start(split, shard["index"] + 1)

    def start(self, split, index):
        self.current[split] = dict(index=index, **NOTHING)
        path = self.path(split)
        self.files[split] = path.with_name(path.name + ".tmp").open("w+b", buffering=0)
        write_all(self.files[split], bytes(HEADER_BYTES))  # no magic: loads under no name

    def finish(self, split):
        """Complete the split's shard: header, name, checksum. An empty one is removed."""
        shard, file, path = self.current[split], self.files.pop(split), self.path(split)
        if shard["tokens"]:
            header = np.zeros(256, "<i4")
            header[:5] = MAGIC, VERSION, shard["tokens"], self.dtype.itemsize, self.vocab_size
            file.seek(0)
            write_all(file, header)
            os.fsync(file.fileno())
        file.close()
        temporary = path.with_name(path.name + ".tmp")
        if shard["tokens"]:
            digest = sha256(temporary)
            os.replace(temporary, path)
            sync_folder(self.folder)
            self.finished[path.name] = {key: shard[key] for key in NOTHING} | {"sha256": digest}
        else:
            temporary.unlink()

    def state(self):
        return dict(finished=self.finished, current=self.current, totals=self.totals)

    def sync(self):
        for file in self.files.values():
            os.fsync(file.fileno())


def meta(cfg, source, tokenizer, settings, totals, finished):
    shards = {name: {key: shard[key] for key in ("tokens", "bytes", "sha256")}
              for name, shard in sorted(finished.items())}
    return {"format": 1, "name": cfg.name, "source": source, "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
            "pattern": tokenizer.pattern, "token_bytes": TOKEN_FILE if tokenizer.ranks else None,
            "byte_length": tokenizer.byte_length().tolist(), "splits": totals, "shards": shards,
            "settings": settings}


# ---- runs


class Progress:
    """A bar on a terminal, otherwise a line now and then; on stderr."""
    def __init__(self, label):
        self.label, self.began, self.shown = label, time.monotonic(), 0.0
        self.terminal, self.first = sys.stderr.isatty(), None
        self.every = 0.2 if self.terminal else 10.0

    def update(self, fraction, tokens):
        now = time.monotonic()
        self.first = self.first or (fraction, tokens)
        if now - max(self.shown, self.began if not self.terminal else 0) < self.every:
            return
        self.shown, passed = now, max(1e-9, now - self.began)
        gained = fraction - self.first[0]
        eta = (f"{max(0.0, 1 - fraction) / gained * passed:.0f}s" if gained > 0 else "?")
        done = int(24 * min(1.0, fraction))
        bar = f"[{'#' * done}{'.' * (24 - done)}] " if self.terminal else ""
        line = (f"{self.label}: {bar}{100 * fraction:.1f}% {tokens / 1e6:,.1f}M tokens, "
                f"{(tokens - self.first[1]) / passed / 1e6:.2f}M tokens/s, eta {eta}")
        print("\r" + line + "\x1b[K" if self.terminal else line, file=sys.stderr,
              end="" if self.terminal else "\n", flush=True)

    def close(self):
        if self.terminal and self.shown:
            print(file=sys.stderr)


def tokenize(cfg, parts, rule, tokenizer, folder, state):
    """Run the pipeline to its end: this thread reads and writes in order, the others tokenize."""
    limits = {"train": cfg.max_tokens} if cfg.max_tokens else {}
    if cfg.max_tokens and "hash" in rule and any(part.split is None for part in parts):
        limits["val"] = max(1, int(VAL_FRACTION * cfg.max_tokens))
    position = state["position"] or dict(part=0, pieces=0, counts=dict(NO_COUNTS))
    reader = Reader(parts, cfg.text_key, position["counts"])
    shards = Shards(folder, tokenizer, cfg.shard_tokens, limits, state["shards"])
    progress, saved_at, pending = Progress(cfg.name), 0.0, collections.deque()
    full, n_finished = shards.full(), -1
    stream = batches(reader, rule, position, lambda split: split not in full)
    pool = ThreadPoolExecutor(cfg.workers)
    try:
        # Read to the end although training is full where validation is the corpus's tail
        while not limits or len(full) < len(limits) or "tail" in rule:
            if len(shards.finished) > n_finished or time.monotonic() - saved_at > SAVE_SECONDS:
                shards.sync()
                state |= {"position": position, "shards": shards.state()}
                write_json(folder / STATE, state)
                n_finished, saved_at = len(shards.finished), time.monotonic()
            for after, batch in stream:
                pending.append((after, pool.submit(tokenizer.encode_batch, batch)))
                if len(pending) > 2 * cfg.workers or pending[0][1].done():
                    break
            if not pending:
                break
            position, future = pending.popleft()
            for split, tokens in future.result():
                shards.write(split, tokens)
                full = shards.full()
                if limits and len(full) == len(limits) and "tail" not in rule:
                    break
            share = shards.totals.get("train", NOTHING)["tokens"] / (cfg.max_tokens or sys.maxsize)
            progress.update(max(share, reader.fraction()),
                            sum(total["tokens"] for total in shards.totals.values()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()
    for split in ("train", "val"):
        if not shards.totals.get(split, NOTHING)["tokens"]:
            fail(f"{cfg.name}: no text for {split}; delete {folder}, then give "
                 + ("more text" if split == "train" else "--val_input=PATH or more text"))
    for split in list(shards.current):
        shards.finish(split)
    return shards, reader.counts


def adopt(folder, names, tokenizer):
    """Check and count published shards, which stay as they are -> totals, finished."""
    totals, finished, table = {}, {}, tokenizer.byte_length()
    for name in names:
        path, split = folder / name, "train" if "train" in name else "val"
        header = np.fromfile(path, "<i4", 256)
        if header.size < 256 or header[0] != MAGIC or header[1] != VERSION:
            fail(f"{path}: not a token shard; delete it and run the same command again")
        if path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
            fail(f"{path}: cut short or too long for {header[2]} tokens; delete it and run again")
        shard = dict(NOTHING)
        for start in range(0, int(header[2]), BLOCK_BYTES):
            count = min(BLOCK_BYTES, int(header[2]) - start)
            tokens = np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * start)
            if tokens.max() >= tokenizer.vocab_size:
                fail(f"{path}: holds token {tokens.max()}, outside GPT-2's vocabulary; delete it")
            for key, n in counted(tokens, table, tokenizer.bos_id).items():
                shard[key] += n
        finished[name] = shard | {"sha256": sha256(path)}
        totals[split] = {key: totals.get(split, NOTHING)[key] + shard[key] for key in NOTHING}
    return totals, finished


def fetch_published(cfg, folder):
    """Download as many published shards as --max_tokens needs; the hub's library resumes by itself."""
    hub = library("huggingface_hub", cfg.name)
    n = min(PUBLISHED_SHARDS, math.ceil((cfg.max_tokens or sys.maxsize) / PUBLISHED_TOKENS))
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, n + 1)]
    for i, name in enumerate(names):
        print(f"{cfg.name}: {name} ({i + 1} of {len(names)})", file=sys.stderr)
        with hub_errors(cfg.name):
            hub.hf_hub_download(PUBLISHED, name, repo_type="dataset", local_dir=folder)
    return names


def corpus(cfg, folder):
    """-> parts, what the meta file calls the source."""
    source = cfg.name
    if cfg.name == "stdlib":
        parts, source = stdlib_parts(), "standard library of Python " + sys.version.split()[0]
    elif cfg.name == "shakespeare":
        parts, source = shakespeare_parts(folder), TINY_SHAKESPEARE
    elif cfg.name == "files":
        parts = local_parts("input", cfg.input)
        source = ", ".join(Path(part.path).name for part in parts[:10]) + ", ..." * (len(parts) > 10)
    else:
        parts = hub_parts(cfg.name)
        source = f"{HUB[cfg.name][0]} at {parts[0].stamp}"
    for split, given in (("test", cfg.test_input), ("val", cfg.val_input)):
        if given:
            own = local_parts(f"{split}_input", given, split)
            twice = {part.path for part in own} & {part.path for part in parts}
            if twice:
                fail(f"--{split}_input={min(twice)}: also among the other inputs; keep splits apart")
            parts = own + [part for part in parts if part.split != split]
    if cfg.val_input:  # the rest of the corpus trains
        parts = [dataclasses.replace(part, split=part.split or "train") for part in parts]
    return parts, source


def settings_of(cfg, parts):
    """What the bytes written depend on. The content of `files` counts, where they lie does not."""
    stamps = [[Path(p.path).name, p.kind, p.split, p.size, p.stamp] for p in parts]
    return {"name": cfg.name, "tokenizer": cfg.tokenizer, "max_tokens": cfg.max_tokens,
            "shard_tokens": cfg.shard_tokens, "text_key": cfg.text_key,
            "inputs": hashlib.sha256(json.dumps(stamps).encode()).hexdigest()}


def refuse_other(folder, was, wants, what):
    other = [key for key in wants if was.get(key) != wants[key]]
    if other:
        shown = [f"{key} was {was.get(key)}" if key != "inputs" else "other input files" for key in other]
        fail(f"{folder}: holds {what} of other settings ({'; '.join(shown)}); give another --out or "
             "delete that folder")


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error}); delete {path.parent} and start again")


def is_complete(cfg, folder):
    """True when meta.json is there and was made with these settings; refuses other settings."""
    if not (folder / "meta.json").exists():
        return False
    parts = corpus(cfg, folder)[0] if cfg.name == "files" else []
    wants = settings_of(cfg, parts)
    if cfg.name != "files":  # asking the network, or a later Python, is not called for
        del wants["inputs"]
    refuse_other(folder, read_json(folder / "meta.json").get("settings", {}), wants, "a data set")
    return True


def prepare(cfg):
    folder = Path(cfg.out)
    if is_complete(cfg, folder):
        print(f"{folder} is complete with these settings; nothing to do")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{folder}: another process is preparing this folder; wait for it or give another --out")
        began = time.monotonic()
        result, counts = build(cfg, folder)
        write_json(folder / "meta.json", result)
        (folder / STATE).unlink(missing_ok=True)
        (folder / ".lock").unlink(missing_ok=True)
    report(cfg, folder, result, counts, time.monotonic() - began)


def build(cfg, folder):
    """Everything but the meta file -> its content, counts of what was odd in the text."""
    state = read_json(folder / STATE) if (folder / STATE).exists() else None
    if not state and any(folder.glob("*.bin")) and cfg.name != "finewebedu10B":
        fail(f"{folder}: holds .bin files of another origin; give another --out")
    parts, source = ([], PUBLISHED) if cfg.name == "finewebedu10B" else corpus(cfg, folder)
    settings = settings_of(cfg, parts)
    if state and state["position"]:
        refuse_other(folder, state["settings"], settings, "an unfinished run")
    else:
        state = {"settings": settings, "rule": None, "position": None,
                 "shards": dict(finished={}, current={}, totals={})}
        write_json(folder / STATE, state)
    if cfg.name == "finewebedu10B":
        tokenizer = make_tokenizer(cfg, parts, None, folder / TOKEN_FILE, False)
        totals, finished = adopt(folder, fetch_published(cfg, folder), tokenizer)
        return meta(cfg, source, tokenizer, settings, totals, finished), dict(NO_COUNTS)
    resumed = state["position"] is not None
    if resumed:
        print(f"{cfg.name}: going on from an earlier run", file=sys.stderr)
    state["rule"] = state["rule"] or split_rule(parts, cfg.text_key)
    tokenizer = make_tokenizer(cfg, parts, state["rule"], folder / TOKEN_FILE, resumed)
    shards, counts = tokenize(cfg, parts, state["rule"], tokenizer, folder, state)
    return meta(cfg, source, tokenizer, settings, shards.totals, shards.finished), counts


def report(cfg, folder, result, counts, seconds):
    for split, total in result["splits"].items():
        print(f"{split:5} {total['tokens']:15,} tokens {total['bytes']:15,} bytes "
              f"{total['bytes'] / total['tokens']:.3f} bytes/token {total['documents']:,} documents")
    said = {"invalid": "sequences that are not UTF-8 replaced by U+FFFD", "nul": "NUL characters removed",
            "empty": "empty documents skipped"}
    for key, text in said.items():
        if counts[key]:
            print(f"{counts[key]:,} {text}")
    print(f"wrote {folder} in {seconds:.1f}s; next: python train_mdlm.py --data={folder}")


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    cfg = parse(argv)
    try:
        prepare(cfg)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        fail(f"{error.filename or cfg.out}: {error.strerror or error}; the same command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
