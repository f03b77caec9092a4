"""Checkpoints from strangers, any flag, any text: sample.py writes, or refuses in one line. Never a
traceback, never a hang, nothing run, nothing written over; and it ends well when it is stopped.
"""
import collections
import contextlib
import copy
import dataclasses
import io
import itertools
import os
import pickle
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import (
    ROOT,
    TORTURE,
    Result,
    assert_refused,
    checkpoint,
    finish,
    launch,
    make_data,
    train_tiny,
    tree,
    write_meta,
    write_shard,
)
from runs import one_thread as one_thread

import gpt
import sample
import train_block
import train_mdlm
import train_sedd

HANG = 60  # seconds, for what takes a fraction of one
SMALL = ("--seq_len=16", "--n_embd=16", "--n_head=2", "--batch_tokens=128", "--micro_batch=8",
         "--val_tokens=128", "--steps=1")
MODELS = {  # what the four scripts write; bpe: all bytes, some merges, then the start of documents
    "mdlm": (train_mdlm, "byte", ("--ema=0.5",)),
    "mdlm_bpe": (train_mdlm, "bpe", ("--cond_dim=8", "--unet=1", "--value_residual=1")),
    "block": (train_block, "byte", ("--block_len=4", "--doc_mask=1", "--bos_id=0")),
    "sedd": (train_sedd, "byte", ("--graph=absorb",)),
    "sedd_uniform": (train_sedd, "bpe", ("--graph=uniform",)),
    "gpt": (gpt, "bpe", ("--n_kv_head=1", "--mlp=swiglu", "--tied=1")),
}
MERGES = [b"th", b"the", b" the", "é".encode(), b"  ", b"\n\n"]
TABLE = [bytes([i]) for i in range(256)] + MERGES + [b""]


class Hang(BaseException):
    pass


@contextlib.contextmanager
def no_hang(seconds=HANG):
    def stop(number, frame):
        raise Hang(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Head(io.StringIO):
    """An output that goes away after some text, as of `| head`."""
    def write(self, text):
        if self.tell() > 20_000:
            raise BrokenPipeError
        return super().write(text)


def run(*argv):
    """The command line in this process. A warning would be a second line."""
    out, err, status = Head(), io.StringIO(), 0
    with (no_hang(), warnings.catch_warnings(record=True) as seen, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        warnings.simplefilter("always")
        try:
            sample.main([*argv, "--device=cpu"])
        except SystemExit as stop:
            status = stop.code
    assert not seen, [str(x.message) for x in seen]
    return Result(status, out.getvalue(), err.getvalue())


def survived(result):
    """Written, or refused in one line."""
    if result.status in (0, 141):
        assert not result.err, result
    else:
        assert_refused(result)
        assert "cannot be used" not in result.err, result  # the last resort: nobody had checked
        assert re.fullmatch(r"sample\.py: [^\x00-\x1f\x7f-\x9f]{1,600}\n", result.err), result
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("survive")


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """A batch of a model this small would be tens of thousands of rows."""
    whole, sample.BATCH_NUMBERS = sample.BATCH_NUMBERS, 2**14
    yield
    sample.BATCH_NUMBERS = whole


@pytest.fixture(scope="module")
def paths(home):
    """{name: checkpoint} of MODELS."""
    byte, bpe = home / "byte", home / "bpe"
    byte.mkdir(), bpe.mkdir()
    make_data(byte)
    rng = random.Random(0)
    for name, n in ("train_000001", 4000), ("val_000000", 1000):
        write_shard(bpe / f"{name}.bin", [rng.randrange(97, 262) for _ in range(n)], 2)
    write_meta(bpe, TABLE, bos_id=len(TABLE) - 1, pattern=sample.PATTERNS[0])
    found = {}
    for name, (script, data, flags) in MODELS.items():
        out = home / "out" / name
        given = (*SMALL, f"--data={home / data}", f"--out={out}", *flags)
        assert train_tiny(*given, script=script).status == 0
        found[name] = out / "ckpt.pt"
    return found


@pytest.fixture(scope="module")
def states(paths):
    return {name: checkpoint(path.parent) for name, path in paths.items()}


@pytest.fixture(scope="module")
def models(paths):
    return {name: sample.load(path, device="cpu") for name, path in paths.items()}


@pytest.fixture(scope="module")
def arena(home):
    """A folder for one bad file at a time, from which sample.py is run."""
    folder = home / "arena"
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


COMMANDS = (
    ("--length=4",),
    ("--length=5", "--prompt=ab", "--n=2"),
    ("--length=6", "--steps=2", "--temperature=0.5", "--top_k=3", "--top_p=0.9"),
    ("--length=6", "--order=confidence", "--steps=3", "--watch"),
    ("--length=5", "--weights=raw"),
    ("--infill=a ___ b", "--blank=2"),
    ("--score=the cafe", "--draws=2"),
)


def attempt(arena, how):
    """Run sample.py on what lies in the arena; it leaves that as it is."""
    before = tree(arena)
    result = survived(run("--ckpt=bad.pt", *how))
    assert tree(arena) == before, result
    return result


# ------------------------------------------------------------------------------ what is in it


class Call:
    """Runs when it is unpickled by something that runs code."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CODE = (
    Call(os.system, "touch canary"),
    Call(eval, "open('canary', 'w')"),
    Call(exec, "open('canary', 'w')"),
    Call(subprocess.getoutput, "touch canary"),
    Call(os.mkdir, "canary"),
    Call(open, "canary", "w"),
    Call(getattr, torch, "load"),
    Call(torch.load, "bad.pt"),
    Call(torch.hub.load, "a/b", "c"),
    Call(pickle.loads, pickle.dumps(Call(os.mkdir, "canary"))),
    Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, "canary"))),
)
ROW = torch.zeros(1, dtype=torch.int64)
OTHERS = (
    None, True, False, -1, 0, 1, 2, 3, 5, 255, 2**31, 10**9, 10**12, 2**63, 10**30, -10**30,
    10**5000, 0.5, 1e-320, 1e300, float("nan"), float("inf"), -float("inf"), 1j, "", "x", "byte",
    "gpt2", "os", "../evil", "train_mdlm.py\n# x", "\x1b]0;x\x07\n\r", "\0", "\ud800", "/dev/zero",
    "(a+)+$", r" ?\w+|.", "(", "a" * 100_000, "absorb", "uniform", "entropy", b"", b"x", [], [1],
    (), (1, 2), {}, {1: 2}, {"a": {}}, set(), collections.OrderedDict(), collections.Counter(a=1),
    torch.float32, torch.device("cpu"), torch.device("cuda"), torch.Size((2, 3)), torch.strided,
    torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(1).expand(10**12),
    torch.zeros(1).expand(2**20, 2**20), torch.zeros(1, dtype=torch.uint8).expand(2**40),
    ROW.expand(263), ROW.expand(2**40), torch.full((3,), float("nan")), torch.eye(3).to_sparse(),
    torch.zeros(3, device="meta"), torch.zeros(263, dtype=torch.int64, device="meta"),
    torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.bool),
    torch.nn.Parameter(torch.zeros(3)), *CODE,
)
CHANGES = {  # of a value that stays of its kind
    int: (lambda x: x + 1, lambda x: x - 1, lambda x: 2 * x, lambda x: x * 10**6, lambda x: -x),
    float: (lambda x: x * 2, lambda x: -x, lambda x: x + 1, lambda x: x * 1e300, int),
    str: (lambda x: x + "\n", lambda x: (x * 1000)[:10**5], lambda x: x[1:], lambda x: x.encode()),
    bool: (lambda x: not x, int),
    torch.Tensor: (
        lambda x: x[:-1], lambda x: x[None], lambda x: torch.cat((x, x)), torch.flatten,
        lambda x: x.float() * torch.nan, lambda x: x.float() + torch.inf, lambda x: x * 1e30,
        torch.neg, torch.Tensor.double, torch.Tensor.half, torch.Tensor.long, torch.Tensor.byte,
        torch.Tensor.bool, lambda x: x.to(torch.complex64), lambda x: x.to("meta"),
        lambda x: x[:1].expand(x.shape), lambda x: x.new_zeros(()).expand(x.shape),
        lambda x: x.flip(0), lambda x: x.to_sparse(), lambda x: torch.as_strided(x, (2**40,), (0,)),
        lambda x: torch.full_like(x, -(2**40)) if x.dtype == torch.int64 else x * 0,
        lambda x: x + 2**62 if x.dtype == torch.int64 else x + 3e38,
        lambda x: list(x[:5]), torch.nn.Parameter,
    ),
}
ADDED = ("", "extra", "layers.0.q.weight2", 3, None, b"x", (1,), "bos_id", "seq_len", "__class__")


def places(state):
    """Paths to every dict, list and leaf; an optimizer's are many and read by no sampler."""
    found = []

    def visit(x, path):
        found.append(path)
        if path[:1] == ("optimizers",) and len(path) > 1:
            return
        items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
        for key, inner in items:
            visit(inner, (*path, key))

    visit(state, ())
    return found[1:]


def thin(state):
    """Copies of the dicts and lists, not of the tensors."""
    if type(state) is dict:
        return {k: thin(v) for k, v in state.items()}
    return [thin(x) for x in state] if type(state) is list else state


@st.composite
def hostile(draw):
    """(model, [(place, what becomes of it)]), by numbers that are taken modulo what there is."""
    number = st.integers(0, 10**6)
    return draw(st.sampled_from(sorted(MODELS))), draw(
        st.lists(st.tuples(st.integers(0, 6), number, number), min_size=1, max_size=3))


def change(state, kind, where, what):
    """Put something else in one place. Half of the cases meet the settings and the tokenizer."""
    parts = [p for p in places(state) if p[0] in (("config", "tokenizer") if kind % 2 else state)]
    if not parts:
        return
    path = parts[where % len(parts)]
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    key, old, other = path[-1], inner[path[-1]], thin(OTHERS[what % len(OTHERS)])
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict):
        inner[ADDED[what % len(ADDED)]] = other
    elif kind in (2, 3, 4) and type(old) in CHANGES:
        changes = CHANGES[type(old)]
        with contextlib.suppress(RuntimeError, TypeError, IndexError, OverflowError, ValueError,
                                 NotImplementedError):
            inner[key] = changes[what % len(changes)](old)
    else:
        inner[key] = other


@settings(max_examples=5000 if TORTURE else 100)
@given(hostile(), st.sampled_from(COMMANDS))
def test_a_strangers_checkpoint(states, arena, case, how):
    name, changes = case
    state = thin(states[name])
    for step in changes:
        change(state, *step)
    try:
        torch.save(state, "bad.pt")
    except Exception:  # not everything can be pickled
        return
    attempt(arena, how)


def test_sizes_that_do_not_fit(states, arena):
    """Settings that ask for much more than the weights in the file are refused at once."""
    for name in ("mdlm", "gpt", "block"):
        for changes in (
            {"n_embd": 10**9}, {"n_layer": 10**9}, {"n_layer": 10**5}, {"seq_len": 10**12},
            {"seq_len": 10**12, "batch_tokens": 10**12, "block_len": 10**12},
            {"vocab_size": 10**10}, {"n_head": 10**9, "n_embd": 2 * 10**9},
            {"mlp_ratio": 1e12}, {"mlp_ratio": 1e300}, {"cond_dim": 10**11},
            {"n_embd": 2 * 10**5}, {"n_layer": 10**30},
        ):
            state = thin(states[name])
            keys = changes.keys() & state["config"].keys()
            state["config"].update({key: changes[key] for key in keys})
            torch.save(state, "bad.pt")
            assert attempt(arena, ("--length=4",)).status == 2, changes


def tokenizers():
    """{what is wrong with it: entries}"""
    def made(table, **more):
        return {"vocab_size": len(table), "token_length": torch.tensor([len(x) for x in table]),
                "token_bytes": torch.tensor(list(b"".join(table)), dtype=torch.uint8), **more}

    long = torch.tensor([len(x) for x in TABLE])
    return {
        "short bytes": {"token_bytes": torch.zeros(10, dtype=torch.uint8)},
        "no bytes": {"token_bytes": torch.zeros(0, dtype=torch.uint8)},
        "terabytes": {"token_bytes": torch.zeros(1, dtype=torch.uint8).expand(2**42)},
        "huge length": {"token_length": long.index_fill(0, torch.tensor(5), 2**62)},
        "negative length": {"token_length": long - 2},
        "they cancel": {"token_length": torch.cat((torch.tensor([-99, 101]), long[2:]))},
        "overflow": {"token_length": torch.cat((torch.tensor([2**63 - 1] * 2), long[2:]))},
        "float length": {"token_length": long.double()},
        "many tokens": {"token_length": torch.zeros(1, dtype=torch.int64).expand(2**40),
                        "vocab_size": 2**40},
        "more tokens than the model": made(TABLE + [b"zz"]),
        "duplicate": made([*TABLE[:256], b"th", *TABLE[257:]][:257] + [b"th"] + TABLE[258:]),
        "no b": made([*TABLE[:98], b"bb", *TABLE[99:]]),
        "bos out of range": {"bos_id": 263}, "bos negative": {"bos_id": -1},
        "bos is text": {"bos_id": 98}, "bos is true": {"bos_id": True},
        "bos is huge": {"bos_id": 10**30},
        "bytes by another name": {"name": "byte"}, "no name": {"name": None},
        "long name": {"name": "a" * 10**6}, "name of two lines": {"name": "bpe\n:1"},
        "no pattern": {"pattern": None}, "pattern of 3": {"pattern": 3},
        "pattern of a list": {"pattern": [sample.PATTERNS[0]]}, "empty pattern": {"pattern": ""},
        "invalid pattern": {"pattern": "("}, "pattern that hangs": {"pattern": r"(a|a?)+$"},
        "pattern that backtracks": {"pattern": r"(?=(a+)+$)(?!x)|."},
        "pattern that drops text": {"pattern": "zzz"},
    }


def test_broken_tokenizers(states, arena):
    for what, entries in tokenizers().items():
        for name in ("mdlm_bpe", "gpt"):
            state = thin(states[name])
            state["tokenizer"].update(entries)
            torch.save(state, "bad.pt")
            result = attempt(arena, ("--prompt=" + "a" * 8, "--length=12"))
            assert result.status == 2 and "bad.pt" in result.err, (what, result)


@pytest.mark.parametrize("pattern", sample.PATTERNS)
def test_the_patterns_that_are_taken(states, arena, pattern):
    """All cut as GPT-2's does, in whatever release of tiktoken it was written."""
    state = thin(states["gpt"])
    state["tokenizer"]["pattern"] = pattern
    torch.save(state, "bad.pt")
    tokenizer = sample.load("bad.pt", device="cpu").tokenizer
    text = "the 12 café's\n\n  theory <|endoftext|> it'll\t "
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and tokens[0] == 97 + 19 or tokens[0] in (256, 257)
    assert [tokenizer.table[i] for i in tokens][:3] == [b"the", b" ", b"1"]


def test_not_finite(states, arena):
    for name in MODELS:
        for bad in (float("nan"), float("inf")):
            state = thin(states[name])
            for part in filter(state.get, ("model", "ema")):
                first = next(k for k, x in state[part].items() if x.ndim == 2)
                state[part][first] = state[part][first].clone()
                state[part][first][0, 0] = bad
            torch.save(state, "bad.pt")
            result = attempt(arena, ("--length=4",))
            assert result.status == 2 and first in result.err, result


# ------------------------------------------------------------------------------ its bytes


def test_truncated_anywhere(paths, arena):
    for name, path in paths.items() if TORTURE else [("gpt", paths["gpt"])]:
        whole = path.read_bytes()
        step = 1024 if TORTURE else 16 * 1024
        for size in (*range(0, len(whole), step), 1, 4, 30, 1023, len(whole) - 1, len(whole) - 22):
            (arena / "bad.pt").write_bytes(whole[:size])
            assert attempt(arena, ("--length=4",)).status == 2, (name, size)


def other_forms(state):
    """{name: bytes} of files that torch.load or pickle might run or expand."""
    bomb = Call(os.system, "touch canary")
    forms = {f"pickle {n}": pickle.dumps(bomb, protocol=n) for n in range(6)}
    for name, content in ("", state), (" with code", {**state, "extra": bomb}):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=False)
        forms[f"legacy{name}"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            data = pickle.dumps(bomb, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    forms["tar"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    forms["torchscript"] = buffer.getvalue()
    deep = b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."
    memo = b"\x80\x02" + b"".join(b"r" + struct.pack("<I", 2**31 - 1 - i) for i in range(9)) + b"."
    loop = b"\x80\x02]q\x00h\x00a."
    laugh = b"\x80\x02]q\x00" + b"".join(
        b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1])
        for i in range(40)) + b"."
    forms |= {f"zip of {name}": zipped({"data.pkl": data}) for name, data in {
        "depth": deep, "memo": memo, "a loop": loop, "a billion": laugh, "code": pickle.dumps(bomb),
        "nothing": b"", "half": b"\x80\x02}q\x00(X\x05"}.items()}
    forms["empty"], forms["zeros"], forms["text"] = b"", bytes(10**5), b"no checkpoint\n" * 99
    forms["empty zip"] = b"PK\x05\x06" + bytes(18)
    return forms


def zipped(entries, root="archive", method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in {"version": b"3\n", "byteorder": b"little", **entries}.items():
            file.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


def entries_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def test_other_forms(states, paths, arena):
    for name, data in other_forms(states["mdlm"]).items():
        (arena / "bad.pt").write_bytes(data)
        assert attempt(arena, ("--length=4",)).status == 2, name
    entries = entries_of(paths["mdlm"].read_bytes())
    size = 2**30 if TORTURE else 2**24
    zeros = {name: bytes(size) if name == "data/0" else data for name, data in entries.items()}
    (arena / "bad.pt").write_bytes(zipped(zeros, method=zipfile.ZIP_DEFLATED))
    assert attempt(arena, ("--length=4",)).status == 2


@st.composite
def damage(draw):
    """What to do to the bytes of a checkpoint: numbers, taken modulo its size."""
    number = st.integers(0, 10**9)
    kind = draw(st.sampled_from("flip flip set cut insert double zip pickle".split()))
    spots = st.tuples(number, st.integers(1, 255))
    return kind, draw(st.lists(spots, min_size=1, max_size=4 if kind in ("flip", "set") else 1))


def damaged(data, kind, spots):
    if kind in ("zip", "pickle"):
        entries, names = entries_of(data), sorted(entries_of(data))
        for at, byte in spots:
            name = "data.pkl" if kind == "pickle" else names[at % len(names)]
            old = entries[name]
            if kind == "pickle" or byte < 100:  # the checksums fit
                at //= len(names)
                entries[name] = damaged(old or b"x", ("flip", "set", "cut", "insert")[byte % 4],
                                        [(at, byte)])
            elif byte < 200:
                del entries[name]
            else:
                entries[name] = os.urandom(0) if byte % 2 else old * 2
        return zipped(entries, method=(0, 8)[spots[0][1] % 8 == 0])
    data = bytearray(data)
    for at, byte in spots:
        if kind in ("flip", "set"):
            at = at % len(data) if at % 2 else -1 - at % min(len(data), 6000)  # the directory
            data[at] = data[at] ^ byte if kind == "flip" else byte
        elif kind == "cut":
            del data[at % len(data):][:byte]
        elif kind == "insert":
            data[at % len(data):at % len(data)] = bytes([byte]) * byte
        else:
            data += data[at % len(data):]
    return bytes(data)


@settings(max_examples=4000 if TORTURE else 60)
@given(st.sampled_from(sorted(MODELS)), damage(), st.sampled_from(COMMANDS))
def test_damaged_bytes(paths, arena, name, what, how):
    (arena / "bad.pt").write_bytes(damaged(paths[name].read_bytes(), *what))
    attempt(arena, how)


def test_special_files(paths, arena):
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.mkdir("hollow")
    good = paths["mdlm"]
    try:
        for name in ("pipe", "/dev/zero", "/dev/null", "hollow", "loop", "none", "", ".", "/",
                     "a" * 300, "a\nb", "\x1b[31m", "\udcff", "a\0b", "/proc/self/mem", "pipe/x"):
            for flags in ((f"--ckpt={name}",), (f"--ckpt={good}", f"--race={name}"),
                          (f"--ckpt={good}", f"--script={name}", "--length=4")):
                survived(result := run(*flags))
                assert result.status == 2, flags
        for name in ("pipe", "/dev/zero", "hollow", "/", "/proc/self/mem"):
            assert_refused(survived(run(f"--ckpt={good}", f"--score={name}")), "--score")
    finally:
        os.rmdir("hollow"), os.remove("pipe"), os.remove("loop")


def test_names_on_the_hub(arena):
    """Refused before anything is asked for; a host that does not answer, at once."""
    for spec in ("hf:", "hf:a", "hf:a/b", "hf:a/b/", "hf:/b/c", "hf:a//c", "hf:a/b/../c",
                 "hf:../b/c", "hf:a/b/c/..", "hf:a b/c/d", "hf:a/b/c d", "hf:a/b/\n", "hf:a/b/c;",
                 "hf: / / ",
                 "hf:a/b/./c", "hf:-a/b/c", "hf:a/b/c?x", "hf:\udcff/b/c", "hf:a/b/" + "../" * 99):
        assert "hf:OWNER/REPO/FILE" in survived(run(f"--ckpt={spec}")).err
    process = launch(ROOT / "sample.py", "--ckpt=hf:nobody/nothing/ckpt.pt",
                     HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(arena / "none"))
    assert_refused(finish(process), "hf:nobody/nothing/ckpt.pt: could not be downloaded")


# ------------------------------------------------------------------------------ flags and texts

HUGE = (10**7, 10**12, 2**63, 10**30)
VALUES = {
    int: ("-1", "0", "1", "2", "3", "7", "16", "17", "40", *map(str, HUGE), "9" * 5000, "1_0", "٣"),
    float: ("-1", "0", "1", "0.5", "1e-320", "1e-40", "1e308", "1e400", "nan", "-inf", "", "0x1"),
    bool: ("", "0", "1", "2"),
    str: ("", "auto", "ema", "raw", "fp32", "bf16", "cpu", "meta", "a\0b", "\udcff\n", "-", "ab",
          "___", "x ____ y", "loop", "cap:0.5", "conf:1e-320", "cap:nan", "rescale:", "1,2", "3",
          "0", "-5", "9" * 30, ",", "1," * 50 + "1", "<|endoftext|>", "é" * 9, "hf:a/b",
          *sample.ORDERS),
}
KINDS = {f.name: next(k for k in (bool, int, float, str) if k.__name__ in str(f.type))
         for f in dataclasses.fields(sample.Options)}
flags = st.one_of(
    st.sampled_from(sorted(KINDS.keys() - {"ckpt", "race", "script", "device"})).flatmap(
        lambda name: st.sampled_from(VALUES[KINDS[name]]).map(lambda value: f"--{name}={value}")),
    st.sampled_from(("--watch", "--length=4", "--length=12", "--steps=3", "--score=ab", "-h1", "")),
    st.tuples(st.sampled_from(("prompt", "infill", "score", "blank", "remask", "order", "ckpt")),
              st.text(st.characters(), max_size=12)).map(lambda x: "--{}={}".format(*x)),
    st.text(st.characters(), max_size=10),
)


@settings(max_examples=3000 if TORTURE else 100)
@given(st.sampled_from(sorted(MODELS)), st.lists(flags, min_size=1, max_size=5))
@example("mdlm", ["--n=1000000000000", "--length=4"])
@example("block", ["--length=1000000000000"])
@example("block", ["--length=4", "--steps=1000000"])
@example("mdlm", ["--score=ab", "--draws=1000000000000"])
@example("mdlm", ["--top_k=" + "9" * 30, "--length=4"])
def test_flags(paths, arena, name, argv):
    before = tree(arena)
    survived(run(f"--ckpt={paths[name]}", *argv))
    assert tree(arena) == before


def test_a_race_of_many_samples(paths):
    """They stream, too: what is kept does not grow with their number."""
    lm = sample.load(paths["mdlm"], device="cpu")
    racer = sample.Racer(lm, sample.Options(length=4, n=500), 4)
    with contextlib.redirect_stderr(io.StringIO()):
        racer.run()
    assert racer.n_rows == 500 and len(racer.first) == 4 and len(racer.frames) < 500


@settings(max_examples=2000 if TORTURE else 60)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(("prompt", "score", "infill", "filled")),
       st.text(st.characters(), max_size=40))
@example("gpt", "prompt", "<|endoftext|>")
@example("mdlm_bpe", "score", "a<|endoftext|>\0")
@example("mdlm", "infill", "\0")
@example("gpt", "score", "\udc80\udcff")
@example("gpt", "prompt", "é" * 99 + "\r\n\x85\u2028")
def test_texts(paths, models, name, where, text):
    flags = {"prompt": (f"--prompt={text}",), "infill": (f"--infill={text}", "--blank=1"),
             "score": (f"--score={text}", *(["--draws=2"] if name != "gpt" else [])),
             "filled": (f"--infill={text}___", "--blank=1", "--steps=1")}
    survived(run(f"--ckpt={paths[name]}", *flags[where]))
    tokenizer = models[name].tokenizer
    clean = re.sub("[\ud800-\udfff]", "\ufffd", text)
    if "\0" not in text or tokenizer.name != "byte":
        tokens = tokenizer.encode(text)
        assert tokenizer.bos_id not in tokens and tokenizer.decode(tokens) == clean


def test_files_to_score(paths, arena):
    score = {name: f"--ckpt={paths[name]}" for name in ("mdlm", "gpt")}
    texts = {"plain": b"the cafe\n", "no newline": b"the", "empty": b"", "nul": b"a\0b",
             "invalid": b"caf\xe9 \xff\xfe ok", "crlf": b"a\r\nb\r\n", "bom": b"\xef\xbb\xbfa"}
    try:
        for what, data in texts.items():
            (arena / "text").write_bytes(data)
            for name, flag in score.items():
                result = survived(run(flag, "--score=text"))
                refused = what == "empty" or what == "nul" and name == "mdlm"
                assert result.status == 2 * refused, (what, result)
                assert ("UTF-8" in result.out) == (what == "invalid")
        with open("text", "wb") as file:  # 100 MB that take no room on the disk
            file.truncate(100 * 10**6)
        assert_refused(survived(run(score["gpt"], "--score=text")), "over 16777216 bytes")
        (arena / "text").write_bytes(b" " * 2**20 + b"x")
        assert_refused(survived(run(score["gpt"], "--score=text")), "spaces")
    finally:
        os.remove("text")
    with pytest.raises(ValueError, match="over 16777216"):
        sample.load(paths["gpt"], device="cpu").score("x" * 2**25)


def test_many_blanks(paths):
    for text, flags in (("___ " * 10_000, ()), ("_" * 10_000, ("--blank=1",)), ("", ()),
                        ("a ___ " * 9, ("--blank=" + ",".join("1" * 10_000),))):
        result = survived(run(f"--ckpt={paths['mdlm']}", f"--infill={text}", *flags))
        assert (result.status == 0) == text.startswith("____")


# ------------------------------------------------------------------------------ how it ends


def in_terminal(argv, after=None, number=None, delay=0.0, term="xterm"):
    """Run on a pseudo terminal -> (output, exit status); a signal once some text has been seen, or
    after a delay; SIGHUP by closing the terminal, as a window does."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM=term, OMP_NUM_THREADS="1", COLUMNS="60", LINES="12")
        os.execv(sys.executable, [sys.executable, str(ROOT / "sample.py"), *argv])
    data, start = b"", time.monotonic()
    while time.monotonic() - start < 2 * HANG:
        if number and (after in data if after else time.monotonic() - start > delay):
            if number == signal.SIGINT:
                os.write(fd, b"\x03")
            elif number == signal.SIGHUP:
                break
            else:
                os.kill(pid, number)
            number = None
        if after is None:
            time.sleep(0.01)
        try:
            data += os.read(fd, 65536)
        except OSError:
            break
    os.close(fd)
    with no_hang():
        return data.decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


LONG = ("--device=cpu", "--n=100000")


@pytest.mark.parametrize(("number", "mode"), [
    pytest.param(number, mode, marks=() if (i + j) % 3 == 0 else pytest.mark.torture)
    for i, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    for j, mode in enumerate(("watch", "plain", "race"))])
def test_a_signal_in_a_terminal(paths, number, mode):
    argv = {"watch": ("--n=999", "--watch", "--steps=1000"), "plain": ("--n=99999",),
            "race": ("--n=999", f"--race={paths['block']}")}
    seen = b" passes" if mode != "plain" else b"--- sample 2 "
    how = [f"--ckpt={paths['mdlm']}", "--device=cpu", *argv[mode]]
    out, status = in_terminal(how, seen, number)
    assert status == 128 + number and "Traceback" not in out and "Error" not in out, (status, out)
    assert "\x1b[?25l" not in out  # the cursor is never hidden
    if number != signal.SIGHUP:
        assert out.endswith("\x1b[0m\r\n"), out[-200:]  # nor a colour left on


@pytest.mark.parametrize("seed", range(20 if TORTURE else 1))
def test_an_interrupt_at_any_moment(paths, seed):
    """While modules are imported, the checkpoint is read, or at work."""
    delay = random.Random(seed).uniform(0.5, 5)
    out, status = in_terminal([f"--ckpt={paths['mdlm']}", *LONG], None, signal.SIGINT, delay)
    assert status in (130, -2) and "Traceback" not in out, (status, out)


@pytest.mark.parametrize("flags", [(), *(
    pytest.param(flags, marks=pytest.mark.torture)
    for flags in (("--watch", "--n=30"), ("--score=the", "--draws=9")))])
def test_a_reader_that_leaves(paths, flags):
    """As in `sample.py | head -1`."""
    process = launch(ROOT / "sample.py", f"--ckpt={paths['mdlm']}", *LONG[:1], *(flags or LONG[1:]))
    first = process.stdout.readline()
    process.stdout.close()
    with no_hang():
        err = process.stderr.read()
        assert process.wait() in ((141,) if not flags else (141, 0))
    assert str(paths["mdlm"]) in first and err == ""


def test_closed_and_full_outputs(paths):
    command = [sys.executable, str(ROOT / "sample.py"), f"--ckpt={paths['mdlm']}", "--length=4"]
    cases = ((">/dev/full", 2), (">&- 2>&-", 0), ("--n=0 2>/dev/full", 2), (">&-", 0), ("2>&-", 0),
             ("--n=0 2>&-", 2))
    for redirection, status in cases if TORTURE else cases[:2]:
        done = subprocess.run(["bash", "-c", f'"$@" {redirection}', "-", *command],
                              capture_output=True, text=True, timeout=HANG)
        assert done.returncode == status, (redirection, done)
        assert done.stderr.count("\n") == (redirection == ">/dev/full"), done


# ------------------------------------------------------------------------------ what is shown


def test_control_characters(states, arena, capsys):
    """A stranger's model writes what steers a terminal: there it is spelled, elsewhere kept."""
    state = thin(states["gpt"])
    for part in filter(state.get, ("model", "ema")):
        weights = {k: x.clone() for k, x in state[part].items()}
        weights["embed.weight"][27] = weights["embed.weight"][263] * 50  # after the start: ESC
        state[part] = weights
    torch.save(state, "bad.pt")
    how = ["--ckpt=bad.pt", "--device=cpu", "--length=6", "--temperature=0"]
    sample.main(how)
    assert "\x1b" in capsys.readouterr().out
    cases = itertools.product(("xterm", "dumb"), ((), ("--watch",)))
    for term, flags in cases if TORTURE else (("xterm", ("--watch",)), ("dumb", ())):
        out, status = in_terminal([*how, *flags], term=term)
        assert status == 0 and r"\x1b" in out
        assert not re.search(r"\x1b(?!\[\d*[mJAG])", out)
        assert term == "xterm" or "\x1b" not in out


# ------------------------------------------------------------------------------ a run goes on


REPLACE = """
import os, shutil, sys, time
a, b, to = sys.argv[1:]
print("on", flush=True)
while True:
    for source in a, b:
        shutil.copyfile(source, to + ".partial")
        os.replace(to + ".partial", to)
        time.sleep(0.005)
"""


def test_a_checkpoint_that_is_replaced_meanwhile(states, arena, tmp_path):
    """The old one or the new one, whole; of other sizes, as when a run begins its average."""
    sizes = {"a": {}, "b": {"more": "x" * 50_000}}
    for step, (name, more) in enumerate(sizes.items(), 1):
        state = copy.deepcopy(states["mdlm"])
        for part in filter(state.get, ("model", "ema")):
            state[part] = {k: torch.full_like(x, step) for k, x in state[part].items()}
        torch.save({**state, "step": step, **more}, tmp_path / f"{name}.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "ckpt.pt")
    process = subprocess.Popen([sys.executable, "-c", REPLACE, *(
        str(tmp_path / f"{name}.pt") for name in ("a", "b", "ckpt"))], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        seen = collections.Counter()
        for _ in range(200 if TORTURE else 20):
            lm = sample.load(tmp_path / "ckpt.pt", device="cpu")
            assert {x.mean().item() for x in lm.model.parameters()} == {float(lm.step)}
            seen[lm.step] += 1
        assert seen.keys() == {1, 2}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_file_that_is_cut_after_loading(paths, tmp_path):
    """Nothing of the file is in use any more, so that no access to it can fail."""
    shutil.copy(paths["gpt"], tmp_path / "ckpt.pt")
    code = ("import sys, sample; lm = sample.load(sys.argv[1], device='cpu');"
            "open(sys.argv[1], 'w').close(); lm.generate(length=4); lm.score('the')")
    assert finish(launch("-c", code, tmp_path / "ckpt.pt")) == (0, "", "")
