"""Hostile and broken input of the four training scripts: flags, shards, meta.json, checkpoints.

Every case runs the whole command line in this process. It ends as a run would, or in one line on
stderr and status 2: no traceback, no hang (a watchdog), nothing executed, nothing overwritten, and
memory stays bounded (a limit on the address space).
"""
import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from runs import (
    TINY,
    TORTURE,
    Result,
    assert_refused,
    babble,
    byte_table,
    flat,
    make_data,
    tiny,
    train_tiny,
    tree,
    write_meta,
    write_shard,
)
from runs import one_thread as one_thread  # a fixture

import gpt
import train_block
import train_mdlm
import train_sedd

SCRIPTS = {s.SCRIPT: s for s in (train_mdlm, gpt, train_block, train_sedd)}
each_script = pytest.mark.parametrize("name", SCRIPTS)
LIMIT = 30  # seconds for a case that takes a twentieth
GRACE = 1.5  # seconds after which a run that goes on and on is told to stop
BOMB = 512 if TORTURE else 64  # MB in a file of a few hundred KB
SPARE = 4 << 30  # bytes of address space that a case may take
LARGE = 10**30
MARK = "placeholder"


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for damaged input."""


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Relative paths of a case end in a folder of its own."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


def attempt(name, *flags):
    """Run a command line as a terminal would show it. A run that starts is told to stop after two
    steps, or after a while."""
    script, calls, told = SCRIPTS[name], [], []
    original, deadline = script.loss_fn, time.monotonic() + LIMIT

    def tell():
        # Without a handler the signal would end the tests.
        if callable(signal.getsignal(signal.SIGTERM)) and not told:
            told.append(signal.raise_signal(signal.SIGTERM))

    def two_steps(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            tell()
        return original(*args, **kwargs)

    def tick(number, frame):
        tell()
        if time.monotonic() > deadline:
            raise Hang(f"{name}.py {' '.join(map(str, flags))}")

    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    before = signal.signal(signal.SIGALRM, tick)
    script.loss_fn, status = two_steps, 0
    signal.setitimer(signal.ITIMER_REAL, GRACE, GRACE)
    faulthandler.dump_traceback_later(3 * LIMIT, exit=True)  # of what does not heed a signal
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(err):
            # Shown as in a terminal; pytest would keep them.
            warnings.simplefilter("always")
            for hidden in DeprecationWarning, PendingDeprecationWarning, ResourceWarning:
                warnings.simplefilter("ignore", hidden)
            warnings.showwarning = lambda *args, **_: print("warning:", *args[:2], file=sys.stderr)
            script.main(list(map(str, flags)))
    except SystemExit as e:
        status = e.code
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        script.loss_fn = original
    if told and status == 128 + signal.SIGTERM:  # of an evaluation
        status = 0
    return Result(status, *(x.buffer.getvalue().decode() for x in (out, err)))


def assert_survived(result, *words):
    """-> whether it ran. If not: one readable line that names something the user gave."""
    if result.status == 0:
        assert result.err == ""
        return True
    assert_refused(result)
    assert result.err[:-1].isprintable(), result.err
    assert len(result.err) < 20_000
    assert not words or any(x in result.err for x in words), result.err
    return False


def case(name, folder, *flags, words=()):
    """A case whose run folder is folder/run; all else under the folder stays as it is."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    before = tree(folder)
    result = attempt(name, *flags)
    ran = assert_survived(result, *words)
    shutil.rmtree(folder / "run", ignore_errors=True)
    assert tree(folder) == before
    return ran, result


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes with meta.json."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    write_meta(folder, byte_table(256), tokenizer="byte")
    return folder


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """{script: a run folder of two steps}, with averages and every kind of optimizer state."""
    folders = {}
    for name, script in SCRIPTS.items():
        folders[name] = tmp_path_factory.mktemp("saved") / name
        result = train_tiny(f"--data={data}", f"--out={folders[name]}", "--steps=2", "--ema=0.5",
                            "--muon_beta2=0.95", "--ckpt_every=1", "--n_embd=16", script=script)
        assert result.status == 0, result.err
    return folders


def cases(quick, torture):
    """Examples are small as they are drawn: to shrink one would take longer than to read it."""
    return settings(max_examples=torture if TORTURE else quick,
                    phases=(Phase.explicit, Phase.generate))


# ----------------------------------------------------------------------------- flags
TEXTS = ["", " ", "0", "1", "x" * 5000, "a\nb", "\x1b[31m", "\0", "\udcff", "\u0661", "\u202e",
         "-1", "--", "=", "{}", "%s", "/dev/null", "/dev/full", "/proc/self/mem", "nan", "None"]
# Small, or too much for any machine: what lies between would only take long.
WHOLE = [str(x) for x in (0, -1, -LARGE, 1, 2, 3, 7, 8, 32, 2**52, 2**63, LARGE, 10**4000)]
WHOLE += ["9" * 5000, "1e3", "1.0", "0x10", "1_0", "\u0661", " 2", "+2", "-0", "\0"]
REAL = ["0", "-0.0", "-1", "0.5", "1", "1.5", "1e308", "1e999", "-1e308", "1e-320", "nan", "inf",
        "-inf", "1e", "0,5", "1_0", "\u0661", "0x1p3", "9" * 400, "\0"]


def values(script, field):
    """Extreme texts for a flag."""
    kind, name = type(field.default), field.name
    if name == "compile":
        return st.sampled_from(["0", "2", "yes", "", "\0"])  # a compiler is not what is tested
    if kind is bool:
        return st.sampled_from(["0", "1", "2", "-1", "true", "", "\u0661"])
    if kind is int:
        return st.sampled_from(WHOLE)
    if kind is float:
        return st.sampled_from(REAL)
    choices = list(train_mdlm.get_args(field.type))
    if name == "preset":
        choices = list(script.PRESETS)
    return st.sampled_from(choices + TEXTS) | st.text(max_size=20)


@st.composite
def command_lines(draw):
    """(script, flags) -- a small run with some flags that are extreme, unknown or twice there."""
    name = draw(st.sampled_from(list(SCRIPTS)))
    fields = draw(st.lists(st.sampled_from(
        [f for f in SCRIPTS[name].Config.__dataclass_fields__.values() if f.name != "out"]),
        min_size=1, max_size=4))
    flags = [f"--{f.name}={draw(values(SCRIPTS[name], f))}" for f in fields]
    if draw(st.integers(0, 9)) == 0:
        flags.append(draw(st.text(max_size=30) | st.sampled_from(["--", "-", "=", "--=", "--lr"])))
    return name, flags, draw(st.integers(0, 7)) == 0


@cases(120, 4500)
@given(command_lines())
def test_flags(data, tmp_path, drawn):
    name, flags, twice = drawn
    base = ["--steps=2", f"--data={data}", f"--out={tmp_path / 'run'}", "--device=cpu"]
    given = {x.partition("=")[0] for x in flags}
    base = [x for x in tiny(*base) if x.partition("=")[0] not in given]
    base += [base[0]] * twice
    if not {"-h", "--help"} & set(flags):
        words = ["--", "unknown flag", "cannot be shown", *(x.partition("=")[2] for x in flags)]
        case(name, tmp_path, *base, *flags, words=list(filter(None, words)))


@cases(60, 500)
@given(st.sampled_from(list(SCRIPTS)), st.sampled_from(TEXTS) | st.text(max_size=300))
def test_run_folder_of_any_name(data, tmp_path, name, text):
    """Also one that cannot be printed, or made."""
    before = tree(data)
    os.makedirs("here", exist_ok=True)
    # Nothing but a path below here, or a file that is no folder.
    device = text.startswith(("/dev", "/proc"))
    out = text if device else "here/" + text.replace("..", "").lstrip("/")
    assert_survived(attempt(name, *TINY, "--steps=1", f"--data={data}", f"--out={out}"), "--out")
    shutil.rmtree("here")
    assert tree(data) == before


# ----------------------------------------------------------------------------- shards
def special(kind, path):
    """Put what is no regular file at a path."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nothing")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    else:
        path.symlink_to(kind)  # a device


SPECIAL = ["fifo", "folder", "dangling", "loop", "socket", "/dev/zero", "/dev/null", "/dev/full"]
HEADERS = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 255, 256, 900, 901, 20240520, 20240519, 1 << 30,
                           2**31 - 1, -2**31]) | st.integers(-2**31, 2**31 - 1)


@st.composite
def damages(draw):
    """A change of the bytes of a shard."""
    kind = draw(st.sampled_from(["header", "header", "bits", "size", "tokens", "whole", "other"]))
    if kind == "header":
        places = st.integers(0, 5) | st.integers(0, 255)
        return kind, draw(st.lists(st.tuples(places, HEADERS), min_size=1, max_size=3))
    if kind == "bits":
        return kind, draw(st.lists(st.integers(0, 8 * 1100), min_size=1, max_size=4))
    if kind == "size":
        return kind, draw(st.sampled_from([0, 1, 3, 4, 1023, 1024, 1025]) | st.integers(0, 10_000))
    if kind == "tokens":
        ids = st.sampled_from([99, 100, 255, 256, 65535])
        return kind, draw(st.tuples(ids, st.integers(0, 899), st.sampled_from([0, 1, 2, 4])))
    if kind == "whole":
        return kind, draw(st.tuples(st.integers(0, 900), st.sampled_from([1, 2]),
                                    st.sampled_from([0, 1, 2, 3, 2**31 - 1])))
    return kind, draw(st.binary(max_size=2000))


def damage(path, change):
    kind, what = change
    content = bytearray(path.read_bytes())
    if kind == "header":
        for place, value in what:
            content[4 * place:4 * place + 4] = np.array(value, "<i4").tobytes()
    elif kind == "bits":
        for bit in what:
            content[bit // 8] ^= 1 << bit % 8
    elif kind == "size":
        content = (content * 20)[:what]
    elif kind == "other":
        content = what
    elif kind == "tokens":
        token, place, stated = what
        tokens = np.full(900, 65)
        tokens[place] = token
        write_shard(path, tokens, 2 if token > 255 else 1, stated)
        return
    else:
        n, itemsize, stated = what
        write_shard(path, np.full(n, 65), itemsize, stated)
        return
    path.write_bytes(content)


SHARDS = ["train_000001.bin", "train_000002.bin", "val_000000.bin"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A hundred kinds of bytes in little shards."""
    folder = tmp_path_factory.mktemp("small")
    for i, name in enumerate(SHARDS):
        write_shard(folder / name, babble(900, seed=i) % 100)
    write_meta(folder, byte_table(100))
    return folder


@cases(100, 2000)
@given(st.sampled_from(list(SCRIPTS)), st.sampled_from(SHARDS), damages())
def test_shard(small, tmp_path, name, shard, change):
    folder = shutil.copytree(small, tmp_path / "data", dirs_exist_ok=True)
    damage(folder / shard, change)
    case(name, tmp_path, *TINY, "--steps=2", f"--data={folder}", f"--out={tmp_path / 'run'}",
         words=SHARDS + ["--data", str(folder)])


@each_script
@pytest.mark.parametrize("kind", SPECIAL)
def test_shard_that_is_no_file(small, tmp_path, name, kind):
    folder = shutil.copytree(small, tmp_path / "data")
    (folder / SHARDS[0]).unlink()
    special(kind, folder / SHARDS[0])
    ran, _ = case(name, tmp_path, *TINY, "--steps=2", f"--data={folder}",
                  f"--out={tmp_path / 'run'}", words=SHARDS[:1])
    assert not ran


# ----------------------------------------------------------------------------- meta.json
KEYS = ("format name source tokenizer vocab_size bos_id pattern token_bytes byte_length splits "
        "shards").split()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([-1, 0, 99, 100, 256, 2**31, 2**63, LARGE, -LARGE, 1e308, "a\nb", "\x1b",
                       "byte", "gpt2", "bpe:99999999999", "(", "\0", "x" * 100_000]),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x, max_size=4),
    max_leaves=6)
RAW = [b"", b"{", b"[]", b"null", b"NaN", b"1", b'"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"\0" * 100,
       b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}",
       b'{"a": 1, "a": 2}', b"-" * 1000, b"{} {}", b"\x80\x04K\x01."]


@st.composite
def descriptions(draw):
    """Bytes of a meta.json: of other kinds, cut short, or with other values."""
    kind = draw(st.integers(0, 9))
    meta = {"format": 1, "name": "x", "source": "test", "tokenizer": "bpe:test", "vocab_size": 100,
            "bos_id": 0, "pattern": None, "splits": {}, "shards": {},
            "token_bytes": [b.decode("latin-1") for b in byte_table(100)],
            "byte_length": [len(b) for b in byte_table(100)]}
    if kind == 0:
        return draw(st.sampled_from(RAW) | st.binary(max_size=50))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3, min_size=1)):
        if draw(st.integers(0, 5)) == 0:
            meta.pop(key, None)
        else:
            meta[key] = draw(JSON)
    if kind == 1:  # another table, consistent or nearly
        n = draw(st.integers(0, 300))
        meta |= {"vocab_size": n, "token_bytes": [draw(st.sampled_from(["a", "", "\xff"]))] * n}
    elif kind == 2:  # one wrong entry
        table = meta.get("token_bytes")
        if isinstance(table, list):
            meta["token_bytes"] = table[:50] + [draw(JSON)] + table[51:]
    text = json.dumps(meta).encode()
    return text[:draw(st.integers(0, len(text)))] if kind == 3 else text


@cases(100, 2500)
@given(st.sampled_from(list(SCRIPTS)), descriptions())
def test_meta_json(small, tmp_path, name, text):
    folder = shutil.copytree(small, tmp_path / "data", dirs_exist_ok=True)
    (folder / "meta.json").write_bytes(text)
    ran, _ = case(name, tmp_path, *TINY, "--steps=2", f"--data={folder}",
                  f"--out={tmp_path / 'run'}", words=["meta.json", *SHARDS])
    if ran:  # then it described the data
        meta = json.loads(text)
        n, bos, table = meta["vocab_size"], meta["bos_id"], meta["token_bytes"]
        assert type(n) is int and type(bos) is int and 0 <= bos < n
        assert table is None or (type(table) is list and len(table) == n)


@each_script
@pytest.mark.parametrize("kind", [*SPECIAL, "large"])
def test_meta_json_that_is_no_file(small, tmp_path, name, kind):
    folder = shutil.copytree(small, tmp_path / "data")
    path = folder / "meta.json"
    path.unlink()
    if kind == "large":  # without taking room; a gigabyte of zeros where it is read
        path.touch()
        os.truncate(path, 1 << 30)
    else:
        special(kind, path)
    result = attempt(name, *TINY, "--steps=2", f"--data={folder}", f"--out={tmp_path / 'run'}")
    assert_refused(result, "meta.json")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- token entropies
def entropies(kind, path):
    if kind in SPECIAL:
        special(kind, path)
        return
    array = {
        "object": np.array([1.0, None] * 50, object), "text": np.array(["a"] * 100),
        "complex": np.ones(100, complex), "nan": np.full(100, math.nan), "zero": np.zeros(100),
        "negative": -np.ones(100), "few": np.ones(99), "matrix": np.ones((100, 1)),
        "scalar": np.float64(1), "dates": np.zeros(100, "M8[s]"), "bool": np.ones(100, bool),
        "fields": np.zeros(100, [("a", "f4")]), "huge": np.full(100, 1e308)}.get(kind)
    if array is not None:
        with open(path, "wb") as f:
            np.save(f, array)
    elif kind == "claims":
        header = str({"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}).encode()
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    elif kind == "archive":
        with open(path, "wb") as f:
            np.savez(f, np.ones(100))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(path.parent / "executed")))
    else:
        path.write_bytes({"empty": b"", "cut": b"\x93NUMPY\x01", "words": b"one two"}[kind])


@pytest.mark.parametrize("kind", [*SPECIAL, *(
    "object text complex nan zero negative few matrix scalar dates bool fields huge claims archive "
    "pickle empty cut words".split())])
def test_token_entropies(small, tmp_path, kind):
    path = tmp_path / "entropy.npy"
    entropies(kind, path)
    ran, _ = case("train_mdlm", tmp_path, *TINY, "--steps=2", f"--data={small}",
                  f"--out={tmp_path / 'run'}", "--masking=entropy", "--estimator=bernoulli",
                  f"--token_entropy={path}", words=["--token_entropy", str(path)])
    assert not ran or kind == "bool"


# ----------------------------------------------------------------------------- checkpoints
class Touch:
    """Pickled, it is code that makes a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


HOW = ["resume", "init_from", "eval_only"]


def open_checkpoint(name, how, folder, data):
    """Use folder/given/ckpt.pt. What stood there stays, unless the run went on."""
    path = folder / "given" / "ckpt.pt"
    flags = {"resume": ["--resume=1", f"--out={path.parent}"],
             "init_from": [f"--init_from={path}", "--steps=2", f"--data={data}",
                           *TINY[:3], "--val_tokens=512", "--device=cpu", "--dtype=fp32",
                           "--compile=0", f"--out={folder / 'run'}"],
             "eval_only": [f"--init_from={path}", "--eval_only=1", "--device=cpu"]}[how]
    shutil.rmtree(folder / "run", ignore_errors=True)
    before = tree(folder)
    result = attempt(name, *flags)
    ran = assert_survived(result, str(path), "--")
    shutil.rmtree(folder / "run", ignore_errors=True)
    if ran and how == "resume":
        assert set(tree(folder)) >= set(before)
    else:
        assert tree(folder) == before
    assert not (folder / "executed").exists()
    return ran, result


def paths_of(state, at=()):
    """Every path of a nested state."""
    found = [at] if at else []
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            found += paths_of(value, (*at, key))
    return found


def lists(state):
    """Tuples as lists, so that they can be changed."""
    if isinstance(state, dict):
        return {k: lists(v) for k, v in state.items()}
    return [lists(x) for x in state] if isinstance(state, list | tuple) else state


def laughs():
    """Ten thousand million leaves that take no room."""
    leaf = [0] * 10
    for _ in range(9):
        leaf = [leaf] * 10
    return leaf


def cycle():
    ring = {}
    ring["ring"] = [ring]
    return ring


WRONG = {
    "none": None, "true": True, "minus": -1, "zero": 0, "one": 1, "large": LARGE, "word": 2**63,
    "digits": 10**5000, "nan": math.nan, "inf": math.inf, "small": 1e-320, "long": "x" * 10**6,
    "text": "a\nb\x1b[31m", "surrogate": "\udcff", "list": [], "dict": {}, "tuple": (1, "a"),
    "bytes": b"ab", "keys": {1: 2, None: 3, (1,): 4}, "complex": 1j, "tensor": torch.zeros(()),
    "empty": torch.zeros(0), "nans": torch.full((3,), math.nan), "ids": torch.arange(5),
    "claim": torch.zeros(1).expand(1 << 40), "bits": torch.zeros(16, dtype=torch.bool),
    "claims": torch.zeros(1, 1).expand(1 << 20, 1 << 20), "sparse": torch.eye(16).to_sparse(),
    "half": torch.zeros(16).half(), "bf16": torch.zeros(16).bfloat16(), "many": (0,) * 10**5,
    "imaginary": torch.zeros(16, dtype=torch.complex64), "dtype": torch.float32,
    "meta": torch.zeros(16, 16, device="meta"), "parameter": torch.nn.Parameter(torch.zeros(16)),
    "size": torch.Size([1]), "device": torch.device("cuda"), "set": {1},
}
SAME_SHAPE = {  # tensors in the place of a tensor
    "nan": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x - 1,
    "one nan": lambda x: poison(x), "double": lambda x: x.double(), "half": lambda x: x.half(),
    "inf": lambda x: x + math.inf if x.is_floating_point() else -x,
    "huge": lambda x: x * 1e38 if x.is_floating_point() else x + 2**40,
    "expanded": lambda x: torch.zeros_like(x).flatten()[:1].expand(x.numel()).view(x.shape),
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x, "extra": lambda x: x[None],
    "int": lambda x: x.long(), "bool": lambda x: x.bool(), "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64), "flat": lambda x: x.flatten()[:-1],
    "sparse": lambda x: x.to_sparse(),
}


def poison(x):
    x = x.clone()
    if x.is_floating_point():
        x.view(-1)[-1:] = math.nan
    return x


def put(state, path, change):
    """Change one place of a state. change: (what, name)."""
    *way, last = path
    for key in way:
        state = state[key]
    if not isinstance(state, dict | list):
        raise KeyError(last)
    what, name = change
    if what == "drop":
        del state[last]
    elif what == "tensor" and isinstance(state[last], torch.Tensor):
        state[last] = SAME_SHAPE[name](state[last])
    elif what == "more":
        if isinstance(state, dict):
            state[name] = WRONG.get(name)
        else:
            state.append(WRONG.get(name))
    else:
        state[last] = {"laughs": laughs, "cycle": cycle}.get(name, lambda: WRONG.get(name))()


CHANGES = (st.tuples(st.just("value"), st.sampled_from([*WRONG, "laughs", "cycle"]))
           | st.tuples(st.just("tensor"), st.sampled_from(list(SAME_SHAPE)))
           | st.tuples(st.just("drop"), st.just(""))
           | st.tuples(st.just("more"), st.sampled_from(list(WRONG))))


class Quiet(dict):
    """Of which a failed case does not print all tensors."""
    __repr__ = object.__repr__


@pytest.fixture(scope="module")
def states(saved):
    """{script: (its checkpoint, every path of it, weighted: each top-level entry as often)}"""
    found = Quiet()
    for name, folder in saved.items():
        state = lists(torch.load(folder / "ckpt.pt", weights_only=True))
        found[name] = state, {k: [p for p in paths_of(state) if p[0] == k] for k in state}
    return found


@cases(120, 4000)
@given(st.sampled_from(list(SCRIPTS)), st.sampled_from(HOW), st.data())
def test_checkpoint_with_a_wrong_entry(saved, states, data, tmp_path, name, how, more):
    state, places = states[name]
    state = copy.deepcopy(state)
    for _ in range(more.draw(st.sampled_from([1, 1, 1, 2]))):
        top = more.draw(st.sampled_from([k for k in places if k in state]))
        path = more.draw(st.sampled_from(places[top]))
        with contextlib.suppress(KeyError, IndexError, TypeError, RuntimeError):
            put(state, path, more.draw(CHANGES))  # unless the first change took the place away
    folder = tmp_path / "given"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.save(state, folder / "ckpt.pt")
    ran, _ = open_checkpoint(name, how, tmp_path, data)
    if ran and how == "resume":
        after = train_mdlm.load_checkpoint(str(folder / "ckpt.pt"))
        for place, x in flat({k: after[k] for k in ("model", "ema", "optimizers")}).items():
            assert not isinstance(x, torch.Tensor) or x.isfinite().all(), place


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for entry, content in entries.items():
            z.writestr(entry, content)


def entries_of(path):
    with zipfile.ZipFile(path) as z:
        return {i.filename: z.read(i) for i in z.infolist()}


def pickled(good, path, opcodes):
    """A checkpoint in whose pickle one setting became other opcodes."""
    state = torch.load(good, weights_only=True)
    state["config"]["mlp"] = MARK
    torch.save(state, path)
    entries = entries_of(path)
    inside = next(k for k in entries if k.endswith("data.pkl"))
    text = b"X" + len(MARK).to_bytes(4, "little") + MARK.encode()
    assert entries[inside].count(text) == 1
    entries[inside] = entries[inside].replace(text, opcodes)
    archive(path, entries)


def deep(n):
    return b"]" * n + b"a" * (n - 1)


def craft(kind, good, path):
    """A checkpoint file of another kind."""
    state = torch.load(good, weights_only=True)
    if kind in SPECIAL:
        special(kind, path)
    elif kind == "code":
        torch.save(state | {"step": Touch(path.parent.parent / "executed")}, path)
    elif kind == "code in config":
        state["config"]["data"] = Touch(path.parent.parent / "executed")
        torch.save(state, path)
    elif kind == "code, legacy":
        torch.save(state | {"step": Touch(path.parent.parent / "executed")}, path,
                   _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(path.parent.parent / "executed"), protocol=2))
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "model":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif kind == "compressed":
        archive(path, entries_of(good), zipfile.ZIP_DEFLATED)
    elif kind == "bomb":
        entries = entries_of(good)
        inside = max(entries, key=lambda k: len(entries[k]) if "/data/" in k else 0)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
            for entry, content in entries.items():
                if entry != inside:
                    z.writestr(entry, content)
            with z.open(inside, "w", force_zip64=True) as f:
                for _ in range(BOMB):
                    f.write(bytes(1 << 20))
    elif kind == "bomb in the pickle":
        entries = entries_of(good)
        inside = next(k for k in entries if k.endswith("data.pkl"))
        archive(path, entries | {inside: entries[inside][:-1] + b"N0" * (BOMB << 18) + b"."},
                zipfile.ZIP_DEFLATED)
    elif kind == "words":
        archive(path, {"a/data.pkl": b"These are words.", "a/version": b"3"})
    elif kind == "no pickle":
        archive(path, {k: v for k, v in entries_of(good).items() if "data.pkl" not in k})
    elif kind == "no tensors":
        archive(path, {k: v for k, v in entries_of(good).items() if "/data/" not in k})
    elif kind == "short tensors":
        archive(path, {k: v[:len(v) // 2] if "/data/" in k else v
                       for k, v in entries_of(good).items()})
    elif kind == "two pickles":
        entries = entries_of(good)
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as z:
            for entry, content in (*entries.items(), *entries.items()):
                z.writestr(entry, content)
    elif kind == "climbing":
        archive(path, {f"../../{k}": v for k, v in entries_of(good).items()})
    elif kind == "big endian":
        archive(path, {k: b"big" if k.endswith("byteorder") else v
                       for k, v in entries_of(good).items()})
    elif kind == "other version":
        archive(path, {k: b"99999\n" if k.endswith("/version") else v
                       for k, v in entries_of(good).items()})
    elif kind == "behind text":
        path.write_bytes(b"#!/bin/sh\ntouch executed\n" + good.read_bytes())
    elif kind == "tail":
        path.write_bytes(good.read_bytes() + b"x" * 70_000)
    elif kind == "sparse file":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        opcodes = {"deep": deep(500), "deeper": deep(100_000), "million digits":
                   b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6,
                   "long text": b"X" + (2**31 - 1).to_bytes(4, "little") + b"a",
                   "memo": b"h\xff", "far memo": b"r\xff\xff\xff\x7f" + b"N",
                   "global": b"cos\nsystem\n", "getattr": b"cbuiltins\ngetattr\n",
                   "reduce": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
                   "unhashable": b"}]Ns"}[kind]
        pickled(good, path, opcodes)


CRAFTED = [*SPECIAL, *(
    "code, code in config, code, legacy, pickle, legacy, model, script, compressed, bomb, "
    "bomb in the pickle, words, no pickle, no tensors, short tensors, two pickles, climbing, "
    "big endian, other version, behind text, tail, sparse file, deep, deeper, million digits, "
    "long text, memo, far memo, global, getattr, reduce, unhashable").replace(
        "code, legacy", "code+legacy").split(", ")]
HARMLESS = ("tail", "climbing", "two pickles")  # the tensors are all there


@pytest.mark.parametrize("kind", CRAFTED)
def test_checkpoint_of_another_kind(saved, data, tmp_path, kind):
    kind = kind.replace("+", ", ")
    for name in SCRIPTS if TORTURE else ["train_mdlm"]:
        for how in HOW:
            shutil.rmtree(tmp_path / "given", ignore_errors=True)
            (tmp_path / "given").mkdir()
            craft(kind, saved[name] / "ckpt.pt", tmp_path / "given" / "ckpt.pt")
            if kind == "sparse file":  # tree() would read it
                path = tmp_path / "given" / "ckpt.pt"
                result = attempt(name, "--eval_only=1", f"--init_from={path}")
                assert_refused(result, str(path))
                continue
            ran, _ = open_checkpoint(name, how, tmp_path, data)
            assert not ran or kind in HARMLESS


@each_script
def test_checkpoint_cut_at_every_kilobyte(name, saved, data, tmp_path):
    whole = (saved[name] / "ckpt.pt").read_bytes()
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "ckpt.pt"
    for size in range(0, len(whole), 1024 if TORTURE else 16 * 1024):
        path.write_bytes(whole[:size])
        for how in HOW if TORTURE else [HOW[size // 1024 // 16 % 3]]:
            ran, result = open_checkpoint(name, how, tmp_path, data)
            assert not ran, size


@cases(80, 2000)
@given(st.sampled_from(list(SCRIPTS)), st.sampled_from(HOW),
       st.lists(st.tuples(st.sampled_from(["pickle", "end", "start", "any"]), st.floats(0, 1),
                          st.integers(1, 255)), min_size=1, max_size=3),
       st.sampled_from(["flip", "flip", "cut", "zero"]))
def test_checkpoint_with_flipped_bytes(saved, data, tmp_path, name, how, places, kind):
    content = bytearray((saved[name] / "ckpt.pt").read_bytes())
    pickle_at = content.find(b"data.pkl")
    ends = {"pickle": (pickle_at, pickle_at + 8000), "end": (len(content) - 4000, len(content)),
            "start": (0, 200), "any": (0, len(content))}
    for part, fraction, mask in places:
        first, last = ends[part]
        place = min(first + int(fraction * (last - first)), len(content) - 1)
        if kind == "flip":
            content[place] ^= mask
        elif kind == "zero":
            content[place:place + mask] = bytes(len(content[place:place + mask]))
        else:
            del content[place:place + mask]
    folder = tmp_path / "given"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(content)
    open_checkpoint(name, how, tmp_path, data)


@each_script
def test_damaged_checkpoint_names_the_one_before(name, saved, tmp_path):
    """And going back to it by what the line says works."""
    folder = shutil.copytree(saved[name], tmp_path / "run")
    path = folder / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = tree(folder)
    result = attempt(name, "--resume=1", f"--out={folder}")
    assert_refused(result, str(path), "ckpt_prev.pt")
    assert tree(folder) == before
    shutil.copy(folder / "ckpt_prev.pt", path)
    result = attempt(name, "--resume=1", f"--out={folder}")
    assert result.status == 0, result.err
    assert train_mdlm.load_checkpoint(str(path))["step"] == 2


