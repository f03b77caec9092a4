"""Text -> token shards that every training script reads.

    python prepare_data.py stdlib                  # this Python's own source code; no network
    python prepare_data.py shakespeare             # Tiny Shakespeare, 1.1 MB
    python prepare_data.py finewebedu10B --max_tokens=900_000_000    # published GPT-2 shards
    python prepare_data.py tinystories|pg19|finewebedu|openwebtext [--max_tokens=N]    # streamed
    python prepare_data.py files --input=PATH... [--val_input=PATH...] --tokenizer=gpt2
    python prepare_data.py meta FOLDER             # meta.json for published shards that lack it

PATH is a file, a folder or a glob: .txt is one document, .jsonl one JSON object a line with the
text in the field --text_key; both also as .gz and .xz. Tokenizers: byte, gpt2, bpe:N (trained on
the corpus). Other flags: --out=FOLDER (data/NAME), --test_input, --max_tokens (of training text),
--shard_tokens, --workers.

A shard is the llm.c format: 256 little-endian int32 ([0] 20240520, [1] 1, [2] tokens, [3] bytes
per token, [4] vocab size), then uint8 or uint16 tokens. meta.json, written last, makes a folder
complete. A document starts with bos_id, which stands nowhere else: text that spells <|endoftext|>
stays text. NUL and a byte order mark at the start of a file are removed, bytes that are not UTF-8
become U+FFFD, under every tokenizer alike; all of this is counted and reported. Line ends stay.

Validation is the source's own, or --val_input, or the documents of lowest hash up to 2% of the
text; a corpus of fewer than 20 documents gives its last 10%. Long documents are cut where the
pre-tokenizer splits anyway, so the tokens are those of the whole (64K characters without such a
place are cut all the same). The same command after Ctrl-C, SIGTERM, kill -9 or a full disk goes on,
and gives the same bytes. One process at a time works on a folder; inputs must not change meanwhile.
"""
import bisect
import contextlib
import dataclasses
import difflib
import fnmatch
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import os
import re
import signal
import stat
import sys
import sysconfig
import time
import urllib.request
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: no lock, everything else works
    fcntl = None

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
BLOCK_BYTES = 1 << 20  # one read of a file
PIECE_CHARS = 1 << 19  # longest text tokenized in one go, and size of a batch of short ones
CUT_CHARS = 1 << 16  # how far back from there a safe place to cut is looked for
HASH_CHARS = 1 << 16  # a document's split depends on its start, since the rest may not be read yet
MAX_LINE = 1 << 25  # longest .jsonl line in bytes: it is parsed whole
MAX_JSON = 1 << 26  # longest file of our own that is read back, in bytes
MAX_WORKERS = 256
BPE_CHARS = 50_000_000  # a BPE is trained on this much of the training text, from the start
FEW_DOCUMENTS, TAIL = 20, 0.1
VAL_FRACTION, SCAN_DOCUMENTS = 0.02, 2000  # the hash that gives 2% is found on the first 2,000
SAVE_SECONDS = 2.0  # the most work that a kill can lose
STATE = "state.json"
SHARD = re.compile(r"(train|val|test)_[0-9]{6}\.bin")
LAST_SHARD = 99_999
BOS_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PUBLISHED, PUBLISHED_SHARDS, PUBLISHED_TOKENS = "kjj0/finewebedu10B-gpt2", 99, 100_000_000
# NAME -> data set, its parquet files by split (None: it has no splits), tokenizer
OWN_SPLITS = {"val": "*validation*", "test": "*test*", "train": "*train*"}
HUB = {
    "tinystories": ("roneneldan/TinyStories", OWN_SPLITS, "bpe:8192"),
    "pg19": ("emozilla/pg19", OWN_SPLITS, "byte"),
    "finewebedu": ("HuggingFaceFW/fineweb-edu", {None: "sample/10BT/*"}, "gpt2"),
    "openwebtext": ("Skylion007/openwebtext", {None: "*train*"}, "gpt2"),
}
NAMES = ("stdlib", "shakespeare", *HUB, "finewebedu10B", "files")


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = ""  # the source
    input: tuple = ()  # files: paths, folders, globs
    val_input: tuple = ()  # validation text, instead of a share of the corpus
    test_input: tuple = ()  # test text
    tokenizer: str = ""  # byte, gpt2 or bpe:N; "" = the source's usual one
    out: str = ""  # folder to write; "" = data/NAME
    max_tokens: int = 0  # training tokens to keep; 0 = all
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0  # tokenizing threads, at most 256; 0 = one a core
    text_key: str = "text"  # field of a .jsonl line


def say(text, stream=None, end="\n"):
    """Print; a reader that goes away (| head) or a full disk there does not stop a run."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end,
              flush=True)
    except OSError:  # what follows goes nowhere, the rest of the buffer at exit included
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def note(text, end="\n"):
    say(text, sys.stderr, end)


def fail(message):
    """A user's mistake: one line, exit status 2."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:2000])
    note(f"prepare_data.py: {line}")
    raise SystemExit(2)


def near(word, choices):
    match = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def parse(argv):
    """Command line -> Config."""
    default = {f.name: f.default for f in dataclasses.fields(Config)}
    flags = [f"--{name}" for name in default if name != "name"]
    values, last = {}, None
    for arg in argv:
        flag, equals, value = arg.partition("=")
        if not arg or not arg.isprintable():
            fail(f"{arg or 'an argument'}: empty, or with characters that do not print; give the "
                 "folder of files so named")
        if not arg.startswith("-"):
            if last and isinstance(default[last], tuple):  # --input=A B C
                values[last] += (arg,)
                continue
            if "name" in values:
                fail(f"{arg}: one source at a time, and flags are written --key=value")
            if arg not in NAMES:
                fail(f"{arg}: unknown source{near(arg, NAMES)}; one of {', '.join(NAMES)}")
            values["name"] = arg
            continue
        if flag not in flags:
            fail(f"{flag}: unknown flag{near(flag, flags)}; --help lists them")
        last = flag[2:]
        if not value:
            fail(f"{flag}: no value; write {flag}=VALUE")
        if last in values:
            fail(f"{flag}: given twice")
        if isinstance(default[last], int):
            number = value if re.fullmatch("[0-9]+(_[0-9]+)*", value) and len(value) < 99 else 0
            value = int(number)
            if not 0 < value < 10**18:
                fail(f"{arg}: not a whole number above 0 (and below 10^18)")
        values[last] = (value,) if isinstance(default[last], tuple) else value
    if "name" not in values:
        fail(f"no source given; one of {', '.join(NAMES)}")
    name = values["name"]
    usual = {"finewebedu10B": "gpt2"} | {key: hub[2] for key, hub in HUB.items()}
    cfg = Config(**{"tokenizer": usual.get(name, "byte"), "out": f"data/{name}", **values})
    if name == "files" and not cfg.input:
        fail("files: say which with --input=PATH")
    if name != "files" and cfg.input:
        fail(f"--input: goes with files, not with {name}")
    if name == "finewebedu10B":
        if cfg.tokenizer != "gpt2":
            fail("--tokenizer: finewebedu10B is published in gpt2 tokens; the text is finewebedu")
        if values.keys() - {"name", "tokenizer", "out", "max_tokens"}:
            fail("finewebedu10B: only --out and --max_tokens apply; its shards stay as published")
    bpe = re.fullmatch(r"bpe:([1-9][0-9]{0,9})", cfg.tokenizer)
    if not bpe and cfg.tokenizer not in ("byte", "gpt2"):
        fail(f"--tokenizer={cfg.tokenizer}: unknown; byte, gpt2 or bpe:N, as in bpe:8192")
    if bpe and not 257 <= int(bpe[1]) <= 65536:
        fail(f"--tokenizer={cfg.tokenizer}: N must be from 257 (256 bytes and a document start) "
             "to 65536 (tokens are uint16)")
    if cfg.shard_tokens >= 2**31:
        fail(f"--shard_tokens={cfg.shard_tokens}: a shard's header counts to {2**31 - 1}")
    if cfg.workers > MAX_WORKERS:
        fail(f"--workers={cfg.workers}: at most {MAX_WORKERS}; one a core is best")
    return cfg


def library(module, need):
    """Import an optional package where it is used."""
    try:
        return importlib.import_module(module)
    except ImportError:
        fail(f"{need} needs the package {module}: pip install {module}")


# ---- sources: a corpus is a list of parts, a part is a file that holds one document or many


@dataclasses.dataclass(frozen=True)
class Part:
    path: str
    kind: str  # text (the file is one document), jsonl, or hub (a parquet file on the hub)
    split: str | None  # None: decided by the corpus's rule
    size: int  # bytes as stored
    stamp: str  # tells a changed file: its time in ns, or the hub's revision


def local_part(path, split=None):
    name = re.sub(r"\.(gz|xz)$", "", path.name.lower())
    if name.endswith((".json", ".parquet", ".zip", ".bin", ".zst", ".bz2", ".tar", ".tgz", ".pdf")):
        fail(f"{path}: cannot be read; give .txt or .jsonl, plain or as .gz or .xz")
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe could not be read twice
            fail(f"{path}: not a regular file; write the text to one")
        path.open("rb").close()
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    kind = "jsonl" if name.endswith((".jsonl", ".ndjson")) else "text"
    return Part(str(path), kind, split, about.st_size, str(about.st_mtime_ns))


def local_parts(flag, given, split=None):
    """Paths, folders and globs in the order given, the files of a folder by name."""
    found = []
    for item in given:
        path = Path(os.path.expanduser(item))
        if path.is_dir():
            files = sorted(p for p in path.rglob("[!.]*") if p.is_file()
                           and re.search(r"\.(txt|jsonl)(\.gz|\.xz)?$", p.name.lower()))
        else:
            files = [path] if path.exists() else sorted(
                p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            fail(f"--{flag}={item}: no such file, or no .txt or .jsonl (.gz, .xz) in the folder")
        found += files
    return [local_part(path, split) for path in {p.resolve(): p for p in found}.values()]


def stdlib_parts():
    """Python files of the interpreter's library, less the tests, which some systems leave out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if not files:
        fail(f"stdlib: no .py file in {root}; use files --input=PATH")
    return [local_part(path) for path in files]


def shakespeare_parts(folder):
    path = folder / "tinyshakespeare.txt"
    if not path.exists():
        remedy = "fetch it by other means and run: prepare_data.py files --input=PATH"
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as reply:
                data = reply.read()
        except OSError as error:
            fail(f"shakespeare: {SHAKESPEARE} could not be fetched ({error}); {remedy}")
        if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
            fail(f"shakespeare: {SHAKESPEARE} holds another text ({len(data)} bytes); {remedy}")
        write_atomically(path, data)
    return [local_part(path)]


@contextlib.contextmanager
def hub_errors(what):
    """One line for whatever the hub's libraries raise: their own errors, httpx's, the system's."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        fail(f"{what}: the Hugging Face hub could not be read ({type(error).__name__}: {reason}); "
             "the same command tries again, files --input=PATH takes text fetched by other means")


def hub_parts(name):
    """Parquet files of a data set, pinned to a revision so that a resumed run reads the same."""
    repo, patterns, _ = HUB[name]
    library("datasets", name)
    api = library("huggingface_hub", name).HfApi()
    for revision in (None, "refs/convert/parquet"):  # as published, else the hub's own conversion
        with hub_errors(name):
            info = api.dataset_info(repo, revision=revision, files_metadata=True)
        files = sorted((f for f in info.siblings if f.rfilename.endswith(".parquet")),
                       key=lambda f: f.rfilename)
        parts = [Part(f"hf://datasets/{repo}@{info.sha}/{f.rfilename}", "hub", split, f.size or 1,
                      info.sha)
                 for split, pattern in patterns.items() for f in files
                 if fnmatch.fnmatch(f.rfilename, pattern)]
        if parts:
            return parts
    fail(f"{name}: {repo} has no parquet files; fetch the text and use files --input=PATH")


def hub_texts(builder, path, key):
    """Texts of one file, streamed: nothing is kept on disk."""
    datasets = library("datasets", path)
    rows = datasets.load_dataset(builder, data_files=[path], split="train", streaming=True)
    for row in rows.select_columns([key]):
        yield row[key]


class Reader:
    """Reads parts as blocks (first, text, UTF-8 bytes); `first` marks the start of a document."""
    def __init__(self, parts, text_key, counts=None):
        self.parts, self.text_key, self.file, self.index = parts, text_key, None, 0
        self.before = list(itertools.accumulate((p.size for p in parts), initial=0))
        self.counts = Counter(counts)  # what was odd; tail_bytes: where the tail rule stands

    def fraction(self):
        """Share of the stored bytes that have been read."""
        here = self.file.tell() if self.file and not self.file.closed else 0
        return (self.before[self.index] + here) / max(1, self.before[-1])

    def check(self, path=None):
        """The file at hand is the one that the run began with, or else shards would mix texts."""
        if path or self.file and not self.file.closed:
            about, part = os.stat(path or self.file.fileno()), self.parts[self.index]
            if (about.st_size, str(about.st_mtime_ns)) != (part.size, part.stamp):
                fail(f"{part.path}: changed in mid-run; start again with another --out once "
                     "nothing writes to it")

    def read(self, index):
        part, self.index, self.file = self.parts[index], index, None
        if part.kind == "hub":
            with hub_errors(part.path):
                yield from self.whole(hub_texts("parquet", part.path, "text"), part.path)
            return
        try:
            with open(part.path, "rb") as self.file:
                self.check()
                packed = Path(part.path).suffix.lower()
                file = (gzip.GzipFile(fileobj=self.file) if packed == ".gz" else
                        lzma.LZMAFile(self.file) if packed == ".xz" else self.file)
                if part.kind == "jsonl":
                    yield from self.whole(self.lines(part.path, io.BufferedReader(file)), part.path)
                else:
                    yield from self.blocks(part.path, file)
                self.check()
        except (EOFError, OSError, MemoryError, lzma.LZMAError, zlib.error) as error:
            with contextlib.suppress(OSError):
                self.check(part.path)
            reason = getattr(error, "strerror", None) or f"damaged or cut short ({error})"
            if isinstance(error, MemoryError):  # the header of an .xz names what it takes to read
                reason = "takes more memory than there is"
            fail(f"{part.path}: {reason}; mend or replace the file")

    def clean(self, raw, path, start):
        """Bytes less NUL, which marks documents among byte tokens, and less a byte order mark."""
        if start and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            fail(f"{path}: UTF-16; convert it to UTF-8")
        if start and raw.startswith(b"\xef\xbb\xbf"):
            self.counts["bom"] += 1
            raw = raw[3:]
        if b"\0" in raw:
            self.counts["nul"] += raw.count(b"\0")
            raw = raw.replace(b"\0", b"")
        return raw

    def decode(self, raw):
        """-> text, its bytes in UTF-8."""
        try:
            return raw.decode(), len(raw)
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            self.counts["invalid"] += text.count("\ufffd") - raw.count("\ufffd".encode())
            return text, len(text.encode())

    def blocks(self, path, file):
        """A file as one document, in blocks that end between characters."""
        first, rest = True, b""
        for number in itertools.count():
            if not (read := file.read(BLOCK_BYTES)):
                break
            raw, end = rest + self.clean(read, path, number == 0), 0
            for back in range(1, min(3, len(raw)) + 1):  # a lead byte whose character may go on
                if raw[-back] >= 0xC0:
                    end = back
                if raw[-back] >= 0xC0 or raw[-back] < 0x80:
                    break
            raw, rest = raw[:len(raw) - end], raw[len(raw) - end:]
            text, size = self.decode(raw)
            if text:
                yield first, text, size
                first = False
        text, size = self.decode(rest)
        if text:
            yield first, text, size
            first = False
        self.counts["empty"] += first

    def lines(self, path, file):
        """Texts of a .jsonl file."""
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            where = f"{path}, line {number}"
            if not line:
                return
            if len(line) > MAX_LINE:
                fail(f"{where}: longer than {MAX_LINE >> 20} MiB; store such a text as .txt")
            line = self.clean(line, path, number == 1)
            if not line.strip():
                continue
            try:  # a number may have more digits than Python turns into an int
                row = json.loads(self.decode(line)[0], parse_int=float)
            except (ValueError, RecursionError) as error:
                fail(f"{where}: not JSON ({error}); mend or remove the line")
            if not isinstance(row, dict) or not isinstance(row.get(self.text_key), str):
                held = ", ".join(row)[:120] if isinstance(row, dict) else type(row).__name__
                fail(f"{where}: no text in field {self.text_key} of {held}; name it by --text_key")
            text = row[self.text_key]
            if b"\\u" in line:  # half of an escaped surrogate pair is no character
                fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                self.counts["invalid"] += fixed.count("\ufffd") - text.count("\ufffd")
                text = fixed
            yield text

    def whole(self, texts, path):
        for text in texts:
            if not isinstance(text, str):
                fail(f"{path}: a row holds {type(text).__name__} instead of text")
            if "\0" in text:
                self.counts["nul"] += text.count("\0")
                text = text.replace("\0", "")
            self.counts["empty"] += not text
            for start in range(0, len(text), PIECE_CHARS):
                block = text[start:start + PIECE_CHARS]
                yield start == 0, block, len(block) if block.isascii() else len(block.encode())

    def route(self, index, rule):
        """Blocks of a part as (split, first, text), by its own split or by the corpus's rule."""
        split, end = self.parts[index].split, ""
        for first, text, size in self.read(index):
            here = text if first else end + text  # a spelling may begin in the block before
            self.counts["spelled"] += here.count(BOS_TEXT)
            end = here[1 - len(BOS_TEXT):]
            if self.parts[index].split is None and "hash" in rule and first:
                split = "val" if document_hash(text) <= rule["hash"] else "train"
            elif self.parts[index].split is None and "tail" in rule:
                left = max(0, rule["tail"] - self.counts["tail_bytes"])
                self.counts["tail_bytes"] += size
                if left < size:
                    head = text.encode()[:left].decode(errors="ignore")  # ends on a character
                    if head:
                        yield "train", first, head
                    first |= bool(head) or split == "train"
                    split, text = "val", text[len(head):]
                else:
                    split = "train"
            yield split, first, text


def document_hash(text):
    start = hashlib.blake2b(text[:HASH_CHARS].encode(), digest_size=7)
    return int.from_bytes(start.digest(), "big")


def split_rule(parts, text_key):
    """How parts without a split of their own are divided; reads them until that is known.

    {"tail": n}: text after n bytes is validation. {"hash": h}: documents hashing to h or less are:
    as many as 2% of the text holds, one at least.
    """
    if all(part.split for part in parts):
        return {}
    reader, hashes, sizes = Reader(parts, text_key), [], Counter()
    for first, text, size in (block for index, part in enumerate(parts) if part.split is None
                              for block in reader.read(index)):
        if first and len(hashes) == SCAN_DOCUMENTS:
            break
        if first:
            hashes.append(document_hash(text))
        sizes[hashes[-1]] += size
    total = sum(sizes.values())
    if len(hashes) < FEW_DOCUMENTS:
        return {"tail": total - int(total * TAIL)}
    order = sorted(sizes)
    reached = list(itertools.accumulate(sizes[h] for h in order))
    return {"hash": order[max(1, bisect.bisect_right(reached, VAL_FRACTION * total)) - 1]}


# GPT2_PATTERN starts a match here whatever stands around: before white space after something
# else (no alternative runs from text into white space), and where letters, digits and marks change,
# except after an apostrophe, which may begin a contraction.
LETTER, DIGIT = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3", "0-9"
MARK = r"!-&(-/:-@\[-`{-~\u3001\u3002\u300c\u300d\uff01\uff0c\uff1a\uff1b\uff1f"
CHANGE = re.compile(f"(?<=[{LETTER}])(?=[{DIGIT}{MARK}])|(?<=[{DIGIT}])(?=[{LETTER}{MARK}])"
                    f"|(?<=[{MARK}])(?=[{LETTER}{DIGIT}])")


def safe_cut(text, start, limit):
    """Last place in (start, limit] where a cut changes no token, or limit where there is none."""
    at, start = limit, max(start, limit - CUT_CHARS)
    while (at := max(text.rfind(" ", start, at), text.rfind("\n", start, at))) > start:
        at = start + len(text[start:at].rstrip())
        # rstrip takes all that \s matches and four control characters that it does not
        if at > start and text[at] not in "\x1c\x1d\x1e\x1f":
            return at
    cuts = deque(CHANGE.finditer(text, start + 1, limit), maxlen=1)
    return cuts[0].start() if cuts else limit


def pieces(blocks, size):
    """Blocks -> (split, first, text) of at most `size` characters, cut alike for any blocks."""
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
    """(position, pieces): a run that has written these goes on from that position."""
    batch, size = [], 0
    for index in range(position["part"], len(reader.parts)):
        counts, skip = Counter(reader.counts), position["pieces"] * (index == position["part"])
        for number, piece in enumerate(pieces(reader.route(index, rule), PIECE_CHARS), 1):
            if number > skip and wanted(piece[0]):
                batch.append(piece)
                size += len(piece[2])
            if size >= PIECE_CHARS:
                yield {"part": index, "pieces": number, "counts": counts}, batch
                batch, size = [], 0
    yield {"part": len(reader.parts), "pieces": 0, "counts": Counter(reader.counts)}, batch


# ---- tokenizers


class Tokenizer:
    """Text -> ids. `bpe` is a tiktoken.Encoding, or None for bytes; `dtype` that of the shards."""
    def __init__(self, name, bpe=None):
        self.name, self.bpe = name, bpe
        self.ranks = bpe._mergeable_ranks if bpe else {}
        self.bos_id = len(self.ranks)
        self.vocab_size = self.bos_id + 1 if bpe else 256
        self.dtype = np.dtype("<u2" if self.vocab_size > 256 else "<u1")
        self.byte_length = np.ones(self.vocab_size, np.int32)  # of text that an id stands for
        for token, rank in self.ranks.items():
            self.byte_length[rank] = len(token)
        self.byte_length[self.bos_id] = 0

    def count(self, tokens):
        size = self.byte_length[tokens].sum(dtype=np.int64)
        return Counter(tokens=int(tokens.size), bytes=int(size),
                       documents=int(np.count_nonzero(tokens == self.bos_id)))

    def encode(self, texts):
        """(first, text) pairs -> ids, with a document start before each `first`."""
        if self.bpe is None:
            joined = b"".join(b"\0" * first + text.encode() for first, text in texts)
            return np.frombuffer(joined, self.dtype)
        # Documents are joined by the special token: one call, free of the GIL, does a batch. A
        # text that spells the token goes by itself and without special tokens.
        ids = []
        for plain, group in itertools.groupby(texts, lambda t: t[0] and BOS_TEXT not in t[1]):
            if plain:
                joined = "".join(BOS_TEXT + text for _, text in group)
                ids.append(self.bpe.encode_to_numpy(joined, allowed_special={BOS_TEXT}))
                continue
            for first, text in group:
                ids += [np.array([self.bos_id] * first, np.uint32),
                        self.bpe.encode_to_numpy(text, disallowed_special=())]
        return np.concatenate(ids).astype(self.dtype)

    def encode_batch(self, batch):
        """Pieces -> [(split, ids, their counts)], in order."""
        runs = [(split, self.encode([piece[1:] for piece in group]))
                for split, group in itertools.groupby(batch, key=lambda piece: piece[0])]
        return [(split, ids, self.count(ids)) for split, ids in runs]


def bpe_tokenizer(name, ranks):
    tiktoken = library("tiktoken", f"--tokenizer={name}")
    return Tokenizer(name, tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                             special_tokens={BOS_TEXT: len(ranks)}))


def gpt2_tokenizer():
    tiktoken = library("tiktoken", "--tokenizer=gpt2")
    try:
        return Tokenizer("gpt2", tiktoken.get_encoding("gpt2"))
    except Exception as error:  # of the HTTP library, or for a damaged file in the cache
        fail(f"--tokenizer=gpt2: its vocabulary could not be fetched ({type(error).__name__}); "
             "connect once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use byte")


def train_bpe(name, texts):
    """BPE over texts -> ranks (bytes -> id) of name's vocabulary less the document start."""
    hf = library("tokenizers", f"--tokenizer={name}")
    size = int(name.partition(":")[2]) - 1
    byte_level = hf.pre_tokenizers.ByteLevel
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=True)
    model.train_from_iterator(texts, hf.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False))
    # Byte-level BPE writes bytes as characters: those that print as they are, others from U+0100
    prints = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    rest = sorted(set(range(256)) - set(prints))
    byte = {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(rest)}
    ranks = {bytes(byte[c] for c in token): rank for token, rank in model.get_vocab().items()}
    if len(ranks) < size:
        fail(f"--tokenizer={name}: the text yields {len(ranks)} tokens; use bpe:{len(ranks) + 1}")
    return ranks


def make_tokenizer(cfg, parts, state, folder):
    """The tokenizer of a run; `state` keeps a vocabulary that it has trained."""
    if cfg.tokenizer in ("byte", "gpt2"):
        return Tokenizer("byte") if cfg.tokenizer == "byte" else gpt2_tokenizer()
    if "vocabulary" not in state:  # bytes as the characters U+0000 to U+00FF
        ranks = train_bpe(cfg.tokenizer, training_texts(cfg, parts, state["rule"]))
        state["vocabulary"] = [t.decode("latin-1") for t in sorted(ranks, key=ranks.get)]
    try:
        ranks = {t.encode("latin-1"): rank for rank, t in enumerate(state["vocabulary"])}
    except (AttributeError, TypeError, UnicodeError):
        ranks = {}
    size = int(cfg.tokenizer.partition(":")[2]) - 1
    if (len(ranks) != size or len(state["vocabulary"]) != size or b"" in ranks
            or not all(bytes([b]) in ranks for b in range(256))):
        fail(f"{folder / STATE}: damaged; delete {folder} and start again")
    return bpe_tokenizer(cfg.tokenizer, ranks)


def training_texts(cfg, parts, rule):
    """What a BPE is trained on, in short texts: the trainer holds 256, each with much besides."""
    note(f"{cfg.name}: training {cfg.tokenizer}")
    reader = Reader(parts, cfg.text_key)
    blocks = itertools.chain.from_iterable(reader.route(index, rule)
                                           for index, part in enumerate(parts)
                                           if part.split in (None, "train"))
    texts = (text for split, _, text in pieces(blocks, 1 << 14) if split == "train")
    read = itertools.accumulate(texts, lambda seen, text: (seen[0] + len(text), text),
                                initial=(0, ""))
    return (text for _, text in itertools.takewhile(lambda seen: seen[0] <= BPE_CHARS, read))


# ---- files


def write_all(file, data):
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view):]


def replace(temporary, path):
    """Rename for good: the name survives a power cut, too."""
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def new_file(path):
    """An empty file under a temporary name; what has that name goes: a link is not followed."""
    with_tmp(path).unlink(missing_ok=True)
    return with_tmp(path).open("x+b", buffering=0)


def write_atomically(path, data):
    try:
        with new_file(path) as file:
            write_all(file, data)
            os.fsync(file.fileno())
        replace(with_tmp(path), path)
    except OSError:
        with contextlib.suppress(OSError):
            with_tmp(path).unlink()
        raise


def write_json(path, value):
    write_atomically(path, (json.dumps(value) + "\n").encode())


def read_json(path):
    """What an earlier run, or anyone, has written."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_JSON:
        fail(f"{path}: not a file that this script wrote; give another --out")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        fail(f"{path}: cannot be read ({error}); delete {path.parent} and start again")
    return value if isinstance(value, dict) else {}


def save_state(folder, state):
    write_json(folder / STATE, state | {"sha256": digest(json.dumps(state).encode())})


def sound_state(state, parts, shard_tokens):
    """Whether a state file is whole, and of a form that leads to no files but those of a run."""
    try:
        whole = state.pop("sha256") == digest(json.dumps(state).encode())
        rule, position, shards = state["rule"], state["position"], state["shards"]
        finished, totals, current = (shards[key] for key in ("finished", "totals", "current"))
        numbers = [*rule.values(), position["part"], position["pieces"],
                   *position["counts"].values(), *(c["index"] for c in current.values()),
                   *(c[key] for table in (finished, totals, current) for c in table.values()
                     for key in ("tokens", "bytes", "documents"))]
        rest = Counter({split: c["tokens"] for split, c in totals.items()})
        for name, c in [*finished.items(), *current.items()]:
            rest[name.partition("_")[0]] -= c["tokens"]
        return (whole and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
                and position["part"] <= len(parts) and rule.keys() <= {"tail", "hash"}
                and len(rule) == any(part.split is None for part in parts)
                and {*totals, *current} <= {"train", "val", "test"} and not any(rest.values())
                and all(c["tokens"] < shard_tokens for c in current.values())
                and all(SHARD.fullmatch(name) and isinstance(c["sha256"], str)
                        for name, c in finished.items()))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False


@contextlib.contextmanager
def alone(folder):
    """Hold the folder, so that another process is refused -> a check that it is still the same."""
    if not fcntl:
        yield lambda: None
        return
    handle = os.open(folder, os.O_RDONLY)

    def check():
        if not folder.exists() or not os.path.samestat(folder.stat(), os.fstat(handle)):
            fail(f"{folder}: deleted or moved in mid-run; the same command makes it again")

    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder}: another process is at work there; wait for it, or give another --out")
        except OSError:  # a file system without locks
            pass
        check()
        yield check
    finally:
        os.close(handle)


def with_tmp(path):
    return path.with_name(path.name + ".tmp")


def digest(raw):
    return hashlib.sha256(raw).hexdigest()


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards:
    """Writes shards under temporary names until they are whole, one open for each split.

    `state()` describes what is written. A later run given it takes back whatever came after.
    """
    def __init__(self, folder, tokenizer, shard_tokens, limits, state, still_ours):
        self.folder, self.tokenizer, self.files = folder, tokenizer, {}
        self.still_ours = still_ours  # from `alone`
        self.shard_tokens, self.limits = shard_tokens, limits
        self.finished = state["finished"]  # name -> counts and sha256
        self.totals = {split: Counter(c) for split, c in state["totals"].items()}
        self.current = {split: Counter(c) for split, c in state["current"].items()}  # and index
        for path in list(folder.iterdir()):
            name = path.name.removesuffix(".tmp")
            if SHARD.fullmatch(name) and path.name not in self.finished:
                split, index = name.removesuffix(".bin").split("_")
                if int(index) != self.current.get(split, {}).get("index"):
                    path.unlink()
                elif path.suffix == ".bin":  # became whole after the state was saved
                    os.replace(path, with_tmp(path))
        for name, counts in self.finished.items():
            self.check(folder / name, counts)
        for split, counts in self.current.items():
            if not counts["tokens"]:
                self.start(split, counts["index"])
                continue
            path = with_tmp(self.path(split))
            self.check(path, counts, unfinished=True)
            self.files[split] = path.open("r+b", buffering=0)
            self.files[split].truncate(self.size(counts))
            self.files[split].seek(self.size(counts))

    def state(self):
        return {"finished": self.finished, "totals": self.totals, "current": self.current}

    def size(self, counts):
        return HEADER_BYTES + counts["tokens"] * self.tokenizer.dtype.itemsize

    def check(self, path, counts, unfinished=False):
        """Whole shards may be links to another disk; one that is written to may not."""
        about = path.stat(follow_symlinks=not unfinished) if path.exists() else None
        size = about.st_size if about and stat.S_ISREG(about.st_mode) else -1
        if size < self.size(counts) or size > self.size(counts) and not unfinished:
            fail(f"{path}: changed since it was written; delete {self.folder} and start again")

    def path(self, split):
        return self.folder / f"{split}_{self.current[split]['index']:06d}.bin"

    def room(self, split):
        """Tokens that the split still takes."""
        return self.limits.get(split, sys.maxsize) - self.totals.get(split, Counter())["tokens"]

    def start(self, split, index):
        if index > LAST_SHARD:
            fail(f"--shard_tokens={self.shard_tokens}: gives more than {LAST_SHARD} shards; delete "
                 f"{self.folder} and give a larger number")
        self.still_ours()
        self.current[split] = Counter(index=index, tokens=0, bytes=0, documents=0)
        self.files[split] = new_file(self.path(split))
        write_all(self.files[split], bytes(HEADER_BYTES))

    def write(self, split, tokens, counts):
        if split not in self.current:
            self.totals[split] = Counter(tokens=0, bytes=0, documents=0)
            self.start(split, int(split == "train"))
        rest = tokens[:self.room(split)]
        while rest.size:
            part = rest[:self.shard_tokens - self.current[split]["tokens"]]
            write_all(self.files[split], part)
            if part.size < tokens.size:
                counts = self.tokenizer.count(part)
            self.current[split].update(counts)
            self.totals[split].update(counts)
            rest = rest[part.size:]
            if self.current[split]["tokens"] == self.shard_tokens:
                index = self.current[split]["index"]
                self.finish(split)
                self.start(split, index + 1)

    def finish(self, split):
        """Give the split's shard its header and its name; an empty one goes."""
        path, counts = self.path(split), self.current.pop(split)
        with self.files.pop(split) as file:
            header = np.zeros(256, "<i4")
            header[:5] = (MAGIC, VERSION, counts["tokens"], self.tokenizer.dtype.itemsize,
                          self.tokenizer.vocab_size)
            file.seek(0)
            write_all(file, header)
            os.fsync(file.fileno())
        if counts["tokens"]:
            self.still_ours()
            self.finished[path.name] = dict(counts, sha256=sha256(with_tmp(path)))
            replace(with_tmp(path), path)
        else:
            with_tmp(path).unlink(missing_ok=True)


# ---- runs


class Progress:
    """A bar on a terminal, otherwise a line every ten seconds; on stderr."""
    def __init__(self, name):
        self.name, self.began, self.first = name, time.monotonic(), None
        self.terminal = bool(sys.stderr) and sys.stderr.isatty()
        self.next = self.began + 10 * (not self.terminal)

    def show(self, share, tokens):
        now, share = time.monotonic(), min(1.0, share)
        self.first = self.first or (share, tokens)
        if now < self.next:
            return
        passed, gained = now - self.began, share - self.first[0]
        self.next = now + (0.2 if self.terminal else 10)
        bar = "[" + ("#" * int(24 * share)).ljust(24, ".") + "] "
        line = (f"{self.name}: {bar * self.terminal}{share:.1%} {tokens / 1e6:,.1f}M tokens "
                f"{(tokens - self.first[1]) / 1e6 / max(passed, 1e-9):.2f}M/s "
                f"eta {f'{(1 - share) / gained * passed:,.0f}s' if gained else '?'}")
        note(f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n")

    def close(self):
        if self.terminal and self.first:
            note("")


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


def tokenize(cfg, parts, tokenizer, folder, state, still_ours):
    """The pipeline: this thread reads and writes in order, the workers tokenize."""
    rule, position = state["rule"], state["position"]
    limits = {"train": cfg.max_tokens} if cfg.max_tokens else {}
    if limits and "hash" in rule:  # half the usual share, so that training is seldom full before
        limits["val"] = math.ceil(VAL_FRACTION / 2 * cfg.max_tokens)
    reader = Reader(parts, cfg.text_key, position["counts"])
    shards = Shards(folder, tokenizer, cfg.shard_tokens, limits, state["shards"], still_ours)
    if shards.totals:
        note(f"{cfg.name}: going on from an earlier run")
    workers = cfg.workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity")
                                 else range(os.cpu_count() or 1))
    stream = batches(reader, rule, position, lambda split: shards.room(split) > 0)
    progress, saved, finished = Progress(cfg.name), 0.0, None
    pool = ThreadPoolExecutor(workers)
    try:
        for position, runs in in_order(pool, tokenizer.encode_batch, stream, 2 * workers):
            for split, tokens, counts in runs:
                shards.write(split, tokens, counts)
            if time.monotonic() - saved > SAVE_SECONDS or len(shards.finished) != finished:
                for file in shards.files.values():
                    os.fsync(file.fileno())
                reader.check()  # what is saved was read while the input was as at the start
                still_ours()
                state |= {"position": position, "shards": shards.state()}
                save_state(folder, state)
                saved, finished = time.monotonic(), len(shards.finished)
            tokens = sum(total["tokens"] for total in shards.totals.values())
            progress.show(max(reader.fraction(), tokens / (cfg.max_tokens or sys.maxsize)), tokens)
            # Under the tail rule validation comes last: reading goes on past a full training split
            if limits and "tail" not in rule and not any(map(shards.room, limits)):
                break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()
    for split in ("train", "val"):
        if not shards.totals.get(split, Counter())["tokens"]:
            fail(f"{cfg.name}: no text for {split}; give more text or --val_input=PATH, and "
                 f"another --out (or delete {folder})")
    for split in list(shards.current):
        shards.finish(split)
    return shards.totals, shards.finished, reader.counts


def adopt(folder, names, tokenizer):
    """Check and count published shards, which stay as they are."""
    totals, finished = {}, {}
    for name in names:
        path, split = folder / name, "train" if "train" in name else "val"
        header = np.fromfile(path, "<i4", 256) if path.is_file() else np.zeros(0, "<i4")
        counts = Counter()
        if (header.size < 256 or tuple(header[:2]) != (MAGIC, VERSION) or header[3] not in (0, 2)
                or header[4] not in (0, tokenizer.vocab_size)):
            fail(f"{path}: not a shard of GPT-2 tokens; delete it and run the same command again")
        if header[2] < 1 or path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
            fail(f"{path}: not the size of its {header[2]} tokens; delete it and run again")
        for start in range(0, int(header[2]), BLOCK_BYTES):
            tokens = np.fromfile(path, "<u2", min(BLOCK_BYTES, int(header[2]) - start),
                                 offset=HEADER_BYTES + 2 * start)
            if tokens.max(initial=0) >= tokenizer.vocab_size:
                fail(f"{path}: token {tokens.max()} is not GPT-2's; delete it and run again")
            counts.update(tokenizer.count(tokens))
        finished[name] = dict(counts, sha256=sha256(path))
        totals.setdefault(split, Counter()).update(counts)
    return totals, finished


def fetch_published(cfg, folder):
    """Fetch as many published shards as --max_tokens asks for; the hub's library resumes them."""
    hub = library("huggingface_hub", cfg.name)
    n = min(PUBLISHED_SHARDS, math.ceil((cfg.max_tokens or sys.maxsize) / PUBLISHED_TOKENS))
    names = {"finewebedu_val_000000.bin", *(f"finewebedu_train_{i + 1:06d}.bin" for i in range(n))}
    for path in folder.glob("*.bin"):  # an earlier run may have fetched more
        if not re.fullmatch(r"finewebedu_(train|val)_\d{6}\.bin", path.name):
            fail(f"{path}: of another origin; give another --out")
        names.add(path.name)
    for number, name in enumerate(names := sorted(names, key=lambda n: ("train" in n, n)), 1):
        note(f"{cfg.name}: {name}, {number} of {len(names)}")
        with hub_errors(cfg.name):
            hub.hf_hub_download(PUBLISHED, name, repo_type="dataset", local_dir=folder)
    return names


def corpus(cfg, folder):
    """-> parts, and what meta.json names as the source."""
    if cfg.name == "finewebedu10B":
        return [], PUBLISHED
    if cfg.name == "stdlib":
        parts, source = stdlib_parts(), "standard library of Python " + sys.version.split()[0]
    elif cfg.name == "shakespeare":
        parts, source = shakespeare_parts(folder), SHAKESPEARE
    elif cfg.name == "files":
        parts = local_parts("input", cfg.input)
        source = ", ".join(Path(p.path).name for p in parts[:9]) + ", ..." * (len(parts) > 9)
    else:
        parts = hub_parts(cfg.name)
        source = f"{HUB[cfg.name][0]} at {parts[0].stamp}"
    for split, given in (("test", cfg.test_input), ("val", cfg.val_input)):
        own = local_parts(f"{split}_input", given, split)
        for path in {Path(p.path).resolve() for p in own} & {Path(p.path).resolve() for p in parts}:
            fail(f"--{split}_input: {path} is among the other inputs, too; keep splits apart")
        parts = own + [part for part in parts if not own or part.split != split]
    if cfg.val_input:
        parts = [dataclasses.replace(part, split=part.split or "train") for part in parts]
    return parts, source


def settings_of(cfg, parts):
    """What the bytes written depend on."""
    stamps = [(Path(p.path).name, p.kind, p.split, p.size, p.stamp) for p in parts]
    kept = ("name", "tokenizer", "max_tokens", "shard_tokens", "text_key")
    return {key: getattr(cfg, key) for key in kept} | {
        "val_input": [Path(item).name for item in cfg.val_input],
        "test_input": [Path(item).name for item in cfg.test_input],
        "inputs": hashlib.sha256(json.dumps(stamps).encode()).hexdigest()}


def refuse_other(folder, what, was, settings):
    values = was.values() if isinstance(was, dict) else [None]
    if not all(isinstance(item, str | int)
               for value in values for item in (value if isinstance(value, list) else [value])):
        fail(f"{folder}: holds {what} that this script did not make; give another --out")
    for key in settings:
        if was.get(key) != settings[key]:
            other = {"inputs": "from other input files", "name": f"from {was.get('name')}"}.get(
                key, f"with --{key}={was.get(key)}")
            fail(f"{folder}: holds {what} made {other}; give another --out, or delete that folder")


def complete(cfg, folder):
    """Whether there is nothing to do; another data set is refused."""
    if not (folder / "meta.json").exists():
        return False
    settings = settings_of(cfg, corpus(cfg, folder)[0] if cfg.name == "files" else [])
    if cfg.name != "files":  # neither the network nor a newer Python is asked
        del settings["inputs"]
    made = read_json(folder / "meta.json").get("settings")
    refuse_other(folder, "a data set", made, settings)
    with contextlib.suppress(OSError):  # of a run killed just before its end
        (folder / STATE).unlink()
    say(f"{folder} is complete; nothing to do")
    return True


def prepare(cfg):
    """Make the folder complete, from whatever state it is in."""
    folder, began = Path(cfg.out), time.monotonic()
    if complete(cfg, folder):
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder) as still_ours:
        if complete(cfg, folder):  # by a process that has just ended
            return
        try:
            meta, counts = build(cfg, folder, still_ours)
        except BaseException:  # a command that is refused leaves no folder behind
            with contextlib.suppress(OSError):
                for path in missing:
                    path.rmdir()
            raise
        still_ours()
        write_json(folder / "meta.json", meta)
        (folder / STATE).unlink(missing_ok=True)
    for split, total in meta["splits"].items():
        say(f"{split:5} {total['tokens']:13,} tokens {total['bytes']:13,} bytes "
            f"{total['bytes'] / total['tokens']:.3f} bytes/token {total['documents']:,} docs")
    for key, text in (("invalid", "sequences that are not UTF-8 became U+FFFD"),
                      ("nul", "NUL characters removed"), ("bom", "byte order marks removed"),
                      ("spelled", f"spellings of {BOS_TEXT} in the text are plain text"),
                      ("empty", "empty documents skipped")):
        if counts[key] and (key != "spelled" or meta["token_bytes"]):
            say(f"{counts[key]:,} {text}")
    say(f"{folder} is complete after {time.monotonic() - began:.1f}s; "
        f"next: python train_mdlm.py --data={folder}")


def build(cfg, folder, still_ours):
    """Write all but meta.json -> its content, and counts of what was odd in the text."""
    state = read_json(folder / STATE) if os.path.lexists(folder / STATE) else None
    for path in folder.iterdir() if state is None and cfg.name != "finewebedu10B" else ():
        if path.name.endswith((".bin", ".bin.tmp")):
            fail(f"{path}: of another origin; give another --out")
    parts, source = corpus(cfg, folder)
    settings = settings_of(cfg, parts)
    if state is not None:
        refuse_other(folder, "an unfinished run", state.get("settings"), settings)
        if not sound_state(state, parts, cfg.shard_tokens):
            fail(f"{folder / STATE}: damaged; delete {folder} and start again")
    else:
        state = {"settings": settings, "rule": split_rule(parts, cfg.text_key),
                 "position": {"part": 0, "pieces": 0, "counts": {}},
                 "shards": {"finished": {}, "totals": {}, "current": {}}}
    tokenizer = make_tokenizer(cfg, parts, state, folder)
    if cfg.name == "finewebedu10B":
        totals, finished = adopt(folder, fetch_published(cfg, folder), tokenizer)
        counts = Counter()
    else:
        save_state(folder, state)  # from here on, the .bin files in the folder are ours
        totals, finished, counts = tokenize(cfg, parts, tokenizer, folder, state, still_ours)
    shards = {name: {key: finished[name][key] for key in ("tokens", "bytes", "sha256")}
              for name in sorted(finished)}
    meta = dict(name=cfg.name, source=source, splits=totals, shards=shards, settings=settings)
    return meta | describe(tokenizer), counts


def describe(tokenizer):
    """What meta.json says of the tokens."""
    bpe, spelling = tokenizer.bpe, None
    if bpe:  # bytes as the characters U+0000 to U+00FF; the document start spells nothing
        by_rank = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
        spelling = [token.decode("latin-1") for token in by_rank] + [""]
    return {"format": 1, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id, "pattern": GPT2_PATTERN if bpe else None,
            "token_bytes": spelling, "byte_length": tokenizer.byte_length.tolist()}


def describe_published(folder):
    """meta.json for shards that come without: uint16 tokens are GPT-2's, uint8 ones are bytes."""
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        fail(f"meta {folder}: no .bin file in it")
    header = np.fromfile(paths[0], "<i4", 256)
    if header.size < 256 or header[0] != MAGIC:
        fail(f"{paths[0]}: not a token shard")
    tokenizer = Tokenizer("byte") if header[3] == 1 else gpt2_tokenizer()
    write_json(folder / "meta.json", {"name": folder.name, "source": "published shards",
                                      "splits": {}, "shards": {}} | describe(tokenizer))
    say(f"{folder / 'meta.json'}: {tokenizer.name} tokens; next: python train_mdlm.py "
        f"--data={folder}")


def stop(number, frame):
    raise KeyboardInterrupt(number)


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        say(__doc__.strip())
        return
    if argv[:1] == ["meta"] and len(argv) == 2:
        describe_published(Path(argv[1]))
        return
    cfg = parse(argv)
    stops = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1")
             if hasattr(signal, name)]
    for number in stops:
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup, SIGHUP is ignored
            signal.signal(number, stop)
    try:
        prepare(cfg)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        for another in (signal.SIGINT, *stops):  # while threads end their batch
            signal.signal(another, signal.SIG_IGN)
        note(f"prepare_data.py: interrupted by {signal.Signals(number).name}; the same command "
             "goes on from here")
        raise SystemExit(128 + number) from None
    except OSError as error:
        fail(f"{error.filename or cfg.out}: {error.strerror or error}; once mended, the same "
             "command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
