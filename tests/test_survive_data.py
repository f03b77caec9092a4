"""prepare_data.py under kills, signals, full disks, hostile text and broken state.

Each promise has one test, short in `make test` and long with `pytest --torture`.
"""
import base64
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import TORTURE, Result, assert_refused, train, tree
from test_data import (
    BOS,
    SCRIPT,
    contents,
    read_documents,
    read_meta,
    read_shard,
    read_split,
    some_texts,
    start,
    write_jsonl,
)

import prepare_data

TOKENIZERS = ("byte", "bpe:300", "gpt2")
KILLS = 20 if TORTURE else 1
LIMIT = 100  # seconds for a process that takes one or two
if not hasattr(os, "fork"):
    pytest.skip("signals and mounts are those of POSIX", allow_module_level=True)


def run_main(*args):
    return train(*args, script=prepare_data)


def result(process):
    out, err = process.communicate(timeout=LIMIT)
    return Result(process.returncode, out, err)


def small_bpe(n=300):
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    ranks = prepare_data.train_bpe(f"bpe:{n}", some_texts(300))
    return prepare_data.bpe_tokenizer(f"bpe:{n}", ranks)


GPT2_LIKE = '''
import base64, pathlib, tiktoken.registry as registry
def gpt2():
    tokens = pathlib.Path(__file__).with_name("tokens").read_text().split()
    return {"name": "gpt2", "pat_str": %r, "special_tokens": {"<|endoftext|>": len(tokens)},
            "mergeable_ranks": {base64.b64decode(t): i for i, t in enumerate(tokens)}}
registry._find_constructors()
registry.ENCODING_CONSTRUCTORS["gpt2"] = gpt2
''' % prepare_data.GPT2_PATTERN


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """In which a small vocabulary stands for GPT-2's, which would have to be fetched."""
    folder = tmp_path_factory.mktemp("gpt2")
    ranks = small_bpe(600).ranks
    tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
    (folder / "tokens").write_text("\n".join(tokens))
    (folder / "sitecustomize.py").write_text(GPT2_LIKE)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Every form of input, with all that is altered in it -> arguments."""
    folder = tmp_path_factory.mktemp("mixed")
    odd = f"\0 {BOS}\r\n\ufeff{BOS[:7]}".encode() + b"\xff\xe2\x82 "
    n = 3000 if TORTURE else 1200
    text = "\n".join(some_texts(n, seed=1)).encode()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + text + odd + text)
    (folder / "b.txt.xz").write_bytes(lzma.compress(odd.join([text] * 3), preset=0))
    lines = write_jsonl(folder / "c.jsonl", [*some_texts(n, seed=2), "", f"x{BOS}"])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes() * 2, 1))
    return ["files", f"--input={folder}", "--shard_tokens=150_000"]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, mixed, env):
    """Finished folders of uninterrupted runs, and the seconds these took."""
    made = {}

    def whole(tokenizer):
        if tokenizer not in made:
            out, began = tmp_path_factory.mktemp("whole") / "out", time.monotonic()
            end = result(start(*mixed, f"--tokenizer={tokenizer}", f"--out={out}", env=env))
            assert end.status == 0, end
            made[tokenizer] = contents(out), time.monotonic() - began
        return made[tokenizer]

    return whole


def whole_or_absent(folder):
    """No file with a shard's name holds anything but a whole shard."""
    for path in folder.glob("*.bin"):
        read_shard(path)


def wait_for_shards(run, out, n=1):
    while run.poll() is None and len(list(out.glob("*.bin"))) < n:
        time.sleep(0.002)
    assert run.poll() is None, ("ended too soon", run.communicate())


# ---- kills and signals


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_kill_at_any_moment(tmp_path, mixed, wholes, env, tokenizer):
    """The same command goes on, and the folder is that of an uninterrupted run, byte for byte."""
    (expected, seconds), rng, kills, runs = wholes(tokenizer), random.Random(), 0, 0
    args, out = [*mixed, f"--tokenizer={tokenizer}", "--workers=2"], tmp_path / "out"
    while kills < KILLS:
        run, runs = start(*args, f"--out={out}", env=env), runs + 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(rng.uniform(0.3, 1) * seconds)
        run.kill()
        error = run.communicate()[1]
        assert run.returncode in (0, -signal.SIGKILL), error
        whole_or_absent(out)
        kills += run.returncode != 0
        if run.returncode == 0:
            assert contents(out) == expected
            shutil.rmtree(out)
    assert result(start(*args, f"--out={out}", env=env)).status == 0
    assert contents(out) == expected
    print(f"{tokenizer}: {kills} kills in {runs} runs of {seconds:.1f}s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals(tmp_path, mixed, wholes, env, number):
    args, out = [*mixed, f"--out={tmp_path / 'out'}"], tmp_path / "out"
    run = start(*args, "--workers=1", env=env)
    wait_for_shards(run, out)
    for _ in range(3):  # and an impatient user
        run.send_signal(number)
    end = result(run)
    assert end.err == (f"prepare_data.py: interrupted by {number.name}; the same command goes on "
                       "from here\n")
    assert end.status == 128 + number
    whole_or_absent(out)
    assert run_main(*args).status == 0
    assert contents(out) == wholes("byte")[0]


def test_nohup(tmp_path, mixed, wholes, env):
    run = start(*mixed, f"--out={tmp_path / 'out'}", env=env,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_shards(run, tmp_path / "out")
    run.send_signal(signal.SIGHUP)
    assert result(run).status == 0 and contents(tmp_path / "out") == wholes("byte")[0]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("into", ["head", "full disk", "closed"])
def test_output_that_goes_away(tmp_path, stream, into):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(30))
    out = tmp_path / "donn\u00e9es"
    script = f"{sys.executable} {SCRIPT} files --input={path} --out={out} --tokenizer=byte"
    number, other = ("1", "2") if stream == "stdout" else ("2", "1")
    end = {"head": f"{number}>&1 {other}>{tmp_path}/other | (exec <&-; true)",
           "full disk": f"{number}>/dev/full {other}>{tmp_path}/other",
           "closed": f"{number}>&- {other}>{tmp_path}/other"}[into]
    if (stream, into) == ("stderr", "head"):
        end = f"2>&1 >{tmp_path}/other | (exec <&-; true)"
    for again in range(1 + TORTURE):  # complete, and complete already
        command = f"set -o pipefail; {script} {end}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                              env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=LIMIT)
        assert done.returncode == 0, (again, done)
        assert "Traceback" not in (said := done.stderr + (tmp_path / "other").read_text()), said
        assert "ignored" not in said and read_meta(out)
    refused = subprocess.run(["bash", "-c", f"set -o pipefail; {script} --workers=0 {end}"],
                             capture_output=True, text=True, timeout=LIMIT)
    assert refused.returncode == 2


# ---- disks and folders


@pytest.fixture
def disk(tmp_path):
    """A small disk -> its folder, and a function that mounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options, *more):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, *more, "tmpfs", folder],
                              capture_output=True, text=True)

    if shutil.which("mount") is None or mount("size=300k").returncode:
        pytest.skip("no right to mount a small disk; test_limit_on_file_size does without")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("tokenizer", TOKENIZERS if TORTURE else ["bpe:300"])
def test_full_disk(disk, mixed, wholes, env, tokenizer):
    folder, remount = disk
    args = [*mixed, f"--tokenizer={tokenizer}", f"--out={folder / 'out'}"]
    expected = wholes(tokenizer)[0]
    size = sum(len(raw) for raw in expected.values()) >> 10
    full = 0
    for share in [*np.linspace(0.01, 1.02, 20)] if TORTURE else [0.01, 0.7]:
        remount(f"size={int(share * size)}k")
        end = result(start(*args, env=env))
        if end.status == 2:
            line = end.err.splitlines()[-1]
            assert "No space left on device; once mended, the same command goes on" in line
            assert "Traceback" not in end.err
            whole_or_absent(folder / "out") if (folder / "out").exists() else None
            full += 1
    assert full > 1
    remount(f"size={size * 3}k")
    assert result(start(*args, env=env)).status == 0
    assert contents(folder / "out") == expected


def test_limit_on_file_size(tmp_path, mixed, wholes):
    """Another way for a write to fail midway."""
    args = [*mixed, f"--out={tmp_path / 'out'}"]
    run = start(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2))
    assert_refused(result(run), "File too large", "goes on from here")
    assert not list((tmp_path / "out").glob("*.bin"))
    assert run_main(*args).status == 0 and contents(tmp_path / "out") == wholes("byte")[0]


def test_read_only(disk, mixed, wholes):
    folder, remount = disk
    remount("size=30M")
    (folder / "empty").mkdir()
    complete = [*mixed, f"--out={folder / 'out'}"]
    assert run_main(*complete).status == 0
    before = tree(folder)
    remount("ro")
    for out in (folder / "empty", folder / "new/deep"):
        assert_refused(run_main(*mixed, f"--out={out}"), str(folder), "Read-only file system")
    assert "is complete" in run_main(*complete).out and tree(folder) == before
    remount("rw")
    assert run_main(*mixed, f"--out={folder / 'empty'}").status == 0


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced"])
def test_folder_that_vanishes(tmp_path, mixed, wholes, env, how):
    out, away = tmp_path / "out", tmp_path / "away"
    args = [*mixed, f"--out={out}", "--workers=1"]
    run = start(*args, env=env)
    wait_for_shards(run, out)
    run.send_signal(signal.SIGSTOP)
    out.rename(away)
    if how == "deleted":
        shutil.rmtree(away)
    if how == "replaced":  # by another process, at work there
        shutil.copytree(away, out)
        theirs = tree(out)
    run.send_signal(signal.SIGCONT)
    end = result(run)
    assert end.status == 2 and "Traceback" not in end.err
    assert "deleted or moved in mid-run" in end.err.splitlines()[-1]
    if how == "replaced":
        assert tree(out) == theirs
        shutil.rmtree(out)
    if how != "deleted":
        away.rename(out)
    assert run_main(*args).status == 0
    assert contents(out) == wholes("byte")[0]


@pytest.mark.parametrize("how", ["grows", "shrinks", "other bytes", "next one goes"])
def test_input_that_changes(tmp_path, how):
    """The run stops; with the old file back in place it goes on, so nothing new was taken in."""
    path, next_path, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out"
    path.write_text("\n".join(some_texts(3000)) * 4)
    next_path.write_text("the end")
    shutil.copy2(path, tmp_path / "copy")
    args = ["files", f"--input={path}", next_path, "--shard_tokens=100_000", "--workers=1"]
    run = start(*args, f"--out={out}")
    wait_for_shards(run, out)
    run.send_signal(signal.SIGSTOP)
    size = path.stat().st_size
    if how == "next one goes":
        next_path.rename(tmp_path / "gone")
    else:
        with path.open("r+b") as file:
            file.truncate(size // 2 if how == "shrinks" else size)
            file.seek(size // 3 if how == "other bytes" else size)
            file.write(b"" if how == "shrinks" else b"new" * 9999)
            file.truncate(size // 2 if how == "shrinks" else size + (how == "grows"))
    run.send_signal(signal.SIGCONT)
    said = "b.txt: No such file" if how == "next one goes" else "a.txt: changed in mid-run"
    assert_refused(result(run), said)
    whole_or_absent(out)
    if how == "next one goes":
        (tmp_path / "gone").rename(next_path)
    else:
        assert_refused(run_main(*args, f"--out={out}"), "made from other input files")
        shutil.copy2(tmp_path / "copy", path)
    assert run_main(*args, f"--out={out}").status == 0
    assert run_main(*args, f"--out={tmp_path / 'whole'}").status == 0
    assert contents(out) == contents(tmp_path / "whole")


# ---- two processes


def test_second_process_is_refused(tmp_path, mixed, wholes, env):
    out, other = tmp_path / "out", tmp_path / "link"
    other.symlink_to(out)
    args = [*mixed, "--workers=1"]
    first = start(*args, f"--out={out}", env=env)
    wait_for_shards(first, out)
    first.send_signal(signal.SIGSTOP)
    before = tree(out)
    for path in (out, other):
        assert_refused(run_main(*args, f"--out={path}"), "another process is at work there")
    assert tree(out) == before
    first.send_signal(signal.SIGCONT)
    assert result(first).status == 0
    assert contents(out) == wholes("byte")[0]


def test_many_at_once(tmp_path, mixed, wholes, env):
    """Whoever comes first makes it; who comes when it is complete finds it so."""
    rng, expected = random.Random(), wholes("byte")[0]
    for case in range(12 if TORTURE else 1):
        out, runs = tmp_path / f"deep/{case}", []
        for _ in range(6 if TORTURE else 3):
            runs.append(start(*mixed, f"--out={out}", env=env))
            time.sleep(rng.uniform(0, 0.3))
        ends = [result(run) for run in runs]
        assert any(end.status == 0 for end in ends)
        for end in ends:
            if end.status:
                assert_refused(end, "another process is at work there")
        assert contents(out) == expected


def test_no_locks_to_be_had(tmp_path, mixed, wholes):
    (tmp_path / "fcntl.py").write_text("LOCK_EX = LOCK_NB = 0\n"
                                       "def flock(*args): raise OSError(37, 'No locks available')")
    run = start(*mixed, f"--out={tmp_path / 'out'}",
                env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result(run).status == 0 and contents(tmp_path / "out") == wholes("byte")[0]


# ---- hostile text


@pytest.fixture(scope="module")
def scratch():
    """A folder for many small files, in memory where there is one."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def tokenizers():
    return [prepare_data.Tokenizer("byte"), small_bpe()]


def token_documents(ids, tokenizer):
    """Texts behind ids, by the rule that a document starts with bos_id and holds no other."""
    spelling = {rank: token for token, rank in tokenizer.ranks.items()}
    texts = []
    for i in ids.tolist():
        if i == tokenizer.bos_id:
            texts.append([])
        else:
            texts[-1].append(spelling.get(i, bytes([i & 255])))
    return [b"".join(text) for text in texts]


ATOMS = [b"\0", b"\xff", b"\xe2\x82", b"\xe2", b"\x82\xac", b"\xf0\x9f", b"\x99\x82",
         b"\xed\xa0\x80", b"\xc0\x80", b"\xef\xbb\xbf", b"\r\n", b"\r", b" ", b"\n\n",
         b"a", b"don't", "é🙂\u2028".encode(), BOS.encode(), BOS[:5].encode(), BOS[5:].encode(),
         b"<", b"|>", b"<|endofprompt|>",
         b"<|fim_prefix|>", b"x" * 30]
raw_text = st.lists(st.sampled_from(ATOMS), max_size=40).map(b"".join) | st.binary(max_size=60)


def encoded(paths, tokenizer, monkeypatch, block, piece):
    """Ids and counts of files, read in small blocks and cut into small pieces."""
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", block)
    monkeypatch.setattr(prepare_data, "PIECE_CHARS", piece)
    reader = prepare_data.Reader([prepare_data.local_part(p, "train") for p in paths], "text")
    position = {"part": 0, "pieces": 0, "counts": {}}
    runs = [run for _, batch in prepare_data.batches(reader, {}, position, lambda split: True)
            for run in tokenizer.encode_batch(batch)]
    monkeypatch.undo()
    return np.concatenate([ids for _, ids, _ in runs] or [np.zeros(0, int)]), reader.counts


@given(raws=st.lists(raw_text, max_size=4), block=st.integers(4, 40), piece=st.integers(1, 60))
@settings(max_examples=3000 if TORTURE else 100)
@example(raws=[b"\xef\xbb\xbf" * 2], block=4, piece=1)
@example(raws=[BOS.encode() * 3, BOS[:-1].encode(), b">", b""], block=13, piece=13)
@example(raws=[b"ab\xe2\0\x82\xac"], block=4, piece=60)
def test_any_bytes_as_text(scratch, tokenizers, raws, block, piece):
    """A document start stands once before each document, and the ids decode to the text."""
    paths, marked = [], [raw for raw in raws if raw[:2] not in (b"\xff\xfe", b"\xfe\xff")]
    for i, raw in enumerate(marked):
        paths.append(scratch / f"{i}.txt")
        paths[-1].write_bytes(raw)
    texts = [raw.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").decode(errors="replace")
             for raw in marked]
    for tokenizer in tokenizers:
        with pytest.MonkeyPatch.context() as monkeypatch:
            ids, counts = encoded(paths, tokenizer, monkeypatch, block, piece)
        assert [t.decode() for t in token_documents(ids, tokenizer)] == [t for t in texts if t]
        assert counts["empty"] == sum(not text for text in texts)
        assert counts["nul"] == sum(raw.count(b"\0") for raw in marked)
        assert counts["bom"] == sum(raw.startswith(b"\xef\xbb\xbf") for raw in marked)
        assert counts["spelled"] == sum(text.count(BOS) for text in texts)
        assert counts["invalid"] == sum(t.count("\ufffd") for t in texts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["\ud83d", "\0", BOS, "\ufeff", "\ude42\ud83d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=3), max_leaves=6)
rows = st.dictionaries(st.sampled_from(["text", "id", "\0"]), json_values, max_size=3)
json_line = (rows | json_values | st.fixed_dictionaries({"text": st.text(max_size=30)})).map(
    lambda row: json.dumps(row).encode())
mangled = st.tuples(json_line, raw_text).map(lambda pair: pair[0][:7] + pair[1] + pair[0][7:])
BIG_NUMBER = b'{"id": ' + b"9" * 10_000 + b', "text": "x"}'
ODD_LINES = [b"[" * 100_000, b'{"text":' * 100_000, BIG_NUMBER,
             b'{"text": 1e999}', b'{"text": "\\u0000\\ud83d\\ude42\\ud83d"}', b"\xef\xbb\xbf{}",
             b'\xef\xbb\xbf{"text": "\xef\xbb\xbfkept"}', '{"text": "wide"}'.encode("utf-16"),
             b"\r",
             b'{"text": "a"}\r', b'{"text": "a"} {"text": "b"}', b"NaN", b'{"text": NaN}']


@given(lines=st.lists(json_line | mangled | st.sampled_from(ODD_LINES), max_size=4))
@settings(max_examples=5000 if TORTURE else 100)
@example(lines=[BIG_NUMBER])
@example(lines=[b'\xef\xbb\xbf{"text": "\xef\xbb\xbfkept"}', b'{"text": "\\u0000\\ud83da"}'])
@example(lines=ODD_LINES[:1])
@example(lines=ODD_LINES[1:2])
def test_any_bytes_as_jsonl(scratch, tokenizers, lines):
    path = scratch / "a.jsonl"
    path.write_bytes(b"\n".join(lines))

    def read():
        with pytest.MonkeyPatch.context() as monkeypatch:
            return encoded([path], tokenizers[1], monkeypatch, 1 << 20, 1 << 19)

    (ids, counts), error = call(read)
    if error is not None:
        assert re.match(r"prepare_data.py: \S+a.jsonl(, line \d+)?: ", error) and ";" in error
        return
    texts = []
    for i, line in enumerate(path.read_bytes().split(b"\n")):
        line = line.replace(b"\0", b"").decode(errors="replace")
        line = line.removeprefix("\ufeff") if i == 0 else line
        if line.strip(" \t\r\n\v\f"):
            sys.set_int_max_str_digits(0)
            text = json.loads(line)["text"].replace("\0", "")
            texts.append(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    found = [text.decode() for text in token_documents(ids, tokenizers[1])]
    assert found == [text for text in texts if text]
    assert counts["empty"] == len(texts) - len(found)


def call(function, *args):
    """-> what it returns and None, or (None, None) and the one line with which it refuses."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            return function(*args), None
    except SystemExit as stop:
        line = error.getvalue()
        assert stop.code == 2 and line.count("\n") == 1 and line.endswith("\n"), line
        return (None, None), line


@given(data=st.data())
@settings(max_examples=10_000 if TORTURE else 200)
def test_damaged_archives(scratch, data):
    """Cut or with other bytes, an archive is refused in a line or gives (some) text."""
    packed = data.draw(st.sampled_from(PACKED))
    raw = data.draw(damaged(packed[1]))
    path = scratch / f"a.txt{packed[0]}"
    path.write_bytes(raw)

    def read():
        part = prepare_data.local_part(path)
        return "".join(text for _, text, _ in prepare_data.Reader([part], "text").read(0)), 0

    (text, _), error = call(read)
    if raw == packed[1]:
        assert text == ARCHIVED
    if error is not None:
        assert f"{path}: " in error and "mend or replace the file" in error


def damaged(raw):
    """Bytes cut short, with other bytes, with more of them."""
    places = st.integers(0, max(0, len(raw) - 1))
    flip = st.tuples(places, st.integers(1, 255)).map(
        lambda f: raw[:f[0]] + bytes([raw[f[0]] ^ f[1]]) + raw[f[0] + 1:])
    more = st.tuples(places, st.binary(max_size=9))
    return (flip | places.map(lambda n: raw[:n])
            | more.map(lambda f: raw[:f[0]] + f[1] + raw[f[0]:])
            | st.tuples(places, places).map(lambda f: raw[:f[0]] + raw[f[1]:])
            | st.binary(max_size=40))


ARCHIVED = "".join(some_texts(20))
PACKED = [(".gz", gzip.compress(ARCHIVED.encode())), (".xz", lzma.compress(ARCHIVED.encode())),
          (".xz", lzma.compress(ARCHIVED.encode(), format=lzma.FORMAT_ALONE))]


def measured(*args, address_space=None):
    """Run in a process of its own -> its end, and the most memory that it held in MB."""
    launcher = ("import resource, subprocess, sys; run = subprocess.run(sys.argv[2:]);"
                "open(sys.argv[1], 'w').write(str("
                "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss));sys.exit(run.returncode)")
    with tempfile.NamedTemporaryFile("r") as file:
        run = subprocess.run(
            [sys.executable, "-c", launcher, file.name, sys.executable, SCRIPT, *map(str, args)],
            capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=address_space and (
                lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space,) * 2)))
        return Result(run.returncode, run.stdout, run.stderr), int(file.read()) / 1024


@pytest.mark.parametrize("form", ["txt.gz", "jsonl.xz"])
def test_bombs(tmp_path, form):
    """A gigabyte of one byte (quick: 40 MB), packed to nothing, is streamed in little memory."""
    size, block = 1000 if TORTURE else 40, bytes(1 << 20)
    path = tmp_path / f"a.{form}"
    opened = gzip.open(path, "wb", 1) if form.endswith("gz") else lzma.open(path, "wb", preset=0)
    with opened as f:
        for _ in range(size):
            f.write(block)
    end, memory = measured("files", f"--input={path}", f"--out={tmp_path / 'out'}")
    print(f"{size} MB of NUL as {form}: {memory:.0f} MB")
    assert memory < 300
    said = "store such a text as .txt" if form.startswith("jsonl") else "no text for train"
    assert end.status == 2 and said in end.err.splitlines()[-1]  # behind lines of progress
    assert not (tmp_path / "out/meta.json").exists()


def test_archive_that_asks_for_memory(tmp_path):
    """An .xz whose header asks for 4 GiB to be unpacked, where there is less."""
    raw = bytearray(lzma.compress(b"text " * 1000))
    assert raw[12:14] == b"\x02\x00" and raw[14:16] == b"\x21\x01"  # LZMA2 and its dictionary
    raw[16] = 40
    raw[20:24] = zlib.crc32(raw[12:20]).to_bytes(4, "little")
    (tmp_path / "a.txt.xz").write_bytes(raw)
    end, _ = measured("files", f"--input={tmp_path}/a.txt.xz", f"--out={tmp_path / 'out'}",
                      address_space=3 << 30)
    assert_refused(end, "a.txt.xz: takes more memory than there is")


@pytest.mark.torture
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_memory_of_long_lines(tmp_path, tokenizer):
    """100 MB without a line end or a space, and the longest .jsonl lines, all of it taken."""
    with (tmp_path / "a.txt").open("w") as file:
        for i in range(100):
            file.write(f"{i}0123456789abcdefghijklmnop\u00e9qrstuvwxyz=/" * 25_000)
    with (tmp_path / "b.jsonl").open("w") as file:
        for _ in range(3):
            file.write('{"text": "' + "\\ud83d\\ude42" * 2_790_000 + '"}\n')
            file.write(json.dumps({"text": "\U0001f642" * 8_380_000}, ensure_ascii=False) + "\n")
    for name, most in [("a.txt", 200), ("b.jsonl", 500)][:2 if tokenizer == "byte" else 1]:
        began = time.monotonic()
        end, memory = measured("files", f"--input={tmp_path / name}", f"--tokenizer={tokenizer}",
                               f"--out={tmp_path / name}.out", "--workers=2")
        print(f"{name}, {tokenizer}: {memory:.0f} MB, {time.monotonic() - began:.0f}s")
        assert (end.status == 0 or "the text yields" in end.err) and memory < most, end


def test_what_was_altered_is_said(tmp_path):
    """At the true size of blocks and pieces, with the odd parts on their borders."""
    pytest.importorskip("tokenizers")
    block, piece = prepare_data.BLOCK_BYTES, prepare_data.PIECE_CHARS
    filler = "\n".join(some_texts(4000)).encode().decode("ascii", "ignore")
    for at in range(13) if TORTURE else (0, 6, 12):
        text = filler[:piece - at] + BOS + filler[:block - piece - 13 - 3] + "\n"
        raw = b"\xef\xbb\xbf" + text.encode() + b"\0\xff\xe2\0\x82\xac" + BOS.encode() + b"\r\nend"
        (tmp_path / f"{at:02}.txt").write_bytes(raw)
    (tmp_path / "empty.txt").write_bytes(b"")
    out = tmp_path / "out"
    end = run_main("files", f"--input={tmp_path}", f"--val_input={SCRIPT}", "--tokenizer=bpe:300",
                   f"--out={out}")
    assert end.status == 0, end
    texts = [path.read_bytes()[3:].replace(b"\0", b"").decode(errors="replace")
             for path in sorted(tmp_path.glob("*.txt")) if path.stat().st_size]
    assert read_documents(out, "train") == texts
    n = len(texts)
    assert (read_split(out, "train") == read_meta(out)["bos_id"]).sum() == n
    spelled = 2 * n + SCRIPT.read_text().count(BOS)
    for line in (f"{spelled} spellings of {BOS} in the text are plain text",
                 f"{2 * n} NUL characters removed", f"{n} byte order marks removed",
                 f"{n} sequences that are not UTF-8 became U+FFFD", "1 empty documents skipped"):
        assert line in end.out.splitlines()


# ---- broken state


@pytest.fixture(scope="module", params=["byte", "bpe:300"])
def unfinished(request, scratch):
    """A run that was killed midway -> arguments, the folder that holds all of it."""
    if request.param != "byte":
        pytest.importorskip("tokenizers")
    folder = scratch / request.param.replace(":", "")
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", some_texts(7000))
    args = ["files", f"--input={folder}/a.jsonl", f"--tokenizer={request.param}",
            "--shard_tokens=50_000", "--workers=1", f"--out={folder / 'out'}"]
    run, state = start(*args), folder / "out/state.json"
    while run.poll() is None and not (state.exists() and "train_000001.bin" in state.read_text()):
        time.sleep(0.001)
    run.kill()
    run.communicate()
    assert not (folder / "out/meta.json").exists()
    return args, folder


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


JUNK = st.sampled_from([None, True, -1, 0, 1, 1 << 62, 1 << 64, 10**400, 0.5, float("nan"), "",
                        "x", "../../canary", "/etc/passwd", "\0", "\ud83d", [], {}, [1],
                        {"tokens": 1},
                        {"../../canary": {"tokens": 0}}, nested(0, 500)]
                       ).map(lambda value: json.loads(json.dumps(value)))  # a copy, to be altered
JSON_BYTES = (st.binary(max_size=30) | st.sampled_from(
    [b"", b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000,
     b"\xff\xfe{\0}\0", b"NaN", b'{"settings": {}}', b'{"settings": {"name": "files"}}',
     '{"settings": 1}'.encode("utf-16"),
     b'{"settings": {"name": ' + b"[" * 900 + b"]" * 900 + b"}}"])
    | json_values.map(lambda value: json.dumps(value).encode()))


def places(value, path=()):
    """Where something stands in nested dicts."""
    yield from [path] if path else []
    for key in value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


@st.composite
def altered(draw, value):
    """A copy with a part replaced by something else, gone, renamed, or one more."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(value))
        if not spots:
            break
        *way, last = draw(st.sampled_from(spots))
        table = value
        for key in way:
            table = table[key]
        how = draw(st.sampled_from(["junk", "junk", "gone", "renamed", "more"]))
        if how == "junk":
            table[last] = draw(JUNK)
        elif how == "gone":
            del table[last]
        elif how == "renamed":
            table[draw(st.sampled_from(["../canary", "../../canary_000001.bin", "x", "", "train",
                                        "train_000001.bin", "\0_000001.bin"]))] = table.pop(last)
        else:
            table["../../canary_000001.bin"] = draw(JUNK)
    return value


def refused_or_done(args, folder, before=None):
    """One line at most, and nothing changes outside, nor inside if refused -> whether it was."""
    outside = {k: v for k, v in tree(folder).items() if not k.startswith(f"{folder}/out")}
    end = run_main(*args)
    after = tree(folder)
    assert outside == {k: v for k, v in after.items() if not k.startswith(f"{folder}/out")}
    assert end.status in (0, 2), end
    if end.status == 2:
        lines = [x for x in end.err.splitlines() if not re.search("going on|training", x)]
        assert len(lines) == 1 and str(folder) in lines[0], end.err
        if before is not None:
            changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
            assert not changed, changed
    return end.status == 2


def restore(folder, before):
    shutil.rmtree(folder / "out")
    for name, raw in before.items():
        if name.startswith(f"{folder}/out/"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(raw)


@given(data=st.data())
@settings(max_examples=2000 if TORTURE else 40)
def test_damaged_state(unfinished, data):
    """Damaged by chance, it is refused; made up on purpose, it leads to nothing outside."""
    args, folder = unfinished
    (folder / "canary").write_text("mine")
    (folder / "canary_000001.bin").write_text("mine, too")
    before = tree(folder)
    path = folder / "out/state.json"
    raw = path.read_bytes()
    made_up = data.draw(st.booleans())
    if made_up:
        state = json.loads(raw)
        del state["sha256"]
        state = data.draw(altered(state))
        with contextlib.suppress(RecursionError):
            state["sha256"] = prepare_data.digest(json.dumps(state).encode())
        new = json.dumps(state).encode()
    else:
        new = data.draw(damaged(raw) | JSON_BYTES)
    path.write_bytes(new)
    refused = False
    try:
        # With its hash made up, too, the run may begin on what it finds, inside
        refused = refused_or_done(args, folder,
                                  None if made_up else {**before, str(path): new})
        if not refused and not made_up:
            assert new.split() == raw.split() or json.loads(new) == json.loads(raw)
    finally:
        if refused and not made_up:
            path.write_bytes(raw)
        else:
            restore(folder, before)


def test_mended_it_goes_on(unfinished):
    args, folder = unfinished
    before = tree(folder)
    assert run_main(*args).status == 0
    assert run_main(*args[:-1], f"--out={folder / 'whole'}").status == 0
    assert contents(folder / "out") == contents(folder / "whole")
    shutil.rmtree(folder / "whole")
    restore(folder, before)


@given(data=st.data())
@settings(max_examples=3000 if TORTURE else 100)
def test_damaged_meta(scratch, data):
    folder = scratch / "complete"
    args = ["files", f"--input={folder}/a.txt", f"--out={folder / 'out'}"]
    if not folder.exists():
        folder.mkdir()
        (folder / "a.txt").write_text("some text " * 50)
        assert run_main(*args).status == 0
    path = folder / "out/meta.json"
    raw = path.read_bytes()
    new = data.draw(damaged(raw) | JSON_BYTES | altered(json.loads(raw)).map(
        lambda meta: json.dumps(meta).encode()))
    path.write_bytes(new)
    try:
        refused_or_done(args, folder, tree(folder))
        assert path.read_bytes() == new
    finally:
        path.write_bytes(raw)


@given(data=st.data())
@settings(max_examples=10_000 if TORTURE else 200)
def test_damaged_shards_of_others(scratch, tokenizers, data):
    """Published shards are counted right or refused; only what no reader looks at may change."""
    tokenizer, folder = tokenizers[1], scratch / "published"
    folder.mkdir(exist_ok=True)
    ids = np.concatenate([[tokenizer.bos_id] + tokenizer.bpe.encode_ordinary(text)
                          for text in some_texts(3)]).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    raw = header.tobytes() + ids.tobytes()
    field = st.tuples(st.integers(0, 5), st.integers(-2**31, 2**31 - 1) | st.sampled_from(
        [0, 1, 2, 4, len(ids) - 1, len(ids) + 1, 20240520, tokenizer.vocab_size]))

    def with_field(change):
        other = header.copy()
        other[change[0]] = change[1]
        return other.tobytes() + ids.tobytes()

    new = data.draw(damaged(raw) | field.map(with_field) | st.integers(0, 2**16 - 1).map(
        lambda token: raw[:-2] + np.array([token], "<u2").tobytes())
        | st.just(np.array([20240520, 1, *[0] * 254], "<i4").tobytes()))
    path = folder / "finewebedu_train_000001.bin"
    path.write_bytes(new)
    (totals, finished), error = call(prepare_data.adopt, folder, [path.name], tokenizer)
    assert path.read_bytes() == new
    if error is not None:
        assert str(path) in error and "delete it" in error
        return
    tokens = np.frombuffer(new, "<u2", offset=1024)
    assert new[:12] == raw[:12] and len(tokens) == len(ids) and tokens.max() < tokenizer.vocab_size
    assert totals["train"]["tokens"] == len(ids) == finished[path.name]["tokens"]
    assert totals["train"]["documents"] == (tokens == tokenizer.bos_id).sum()


def test_special_files(tmp_path, unfinished):
    """Pipes, devices, folders and links in place of files: a line, no waiting, nothing followed."""
    args, folder = unfinished
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for name, said in ((tmp_path / "pipe.txt", "not a regular file"),
                       ("/dev/zero", "not a regular"),
                       (tmp_path / "folder.txt", "no .txt or .jsonl"), ("/dev/stdin", "/dev/stdin"),
                       (tmp_path / "loop.txt", "loop.txt"), ("x" * 5000, "xxx"),
                       ("~nobody/x", "~")):
        for flag in ("--input", "--val_input"):
            given = [f"--input={folder}/a.jsonl"] * (flag != "--input") + [f"{flag}={name}"]
            assert_refused(run_main("files", *given, f"--out={tmp_path / 'new'}"), said)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/x", tmp_path / "loop.txt", "/dev/null/x",
                tmp_path / ("y" * 300)):
        assert_refused(run_main(*args[:-1], f"--out={out}"), str(out))
    before, canary = tree(folder), tmp_path / "canary"
    canary.write_bytes(b"mine" * 100_000)
    shards = sorted(p.name for p in (folder / "out").iterdir() if p.suffix == ".tmp")
    for name in ("state.json", "meta.json", *shards):
        path = folder / "out" / name
        had = path.exists()
        for make in (os.mkfifo, os.mkdir, lambda p: os.symlink(canary, p),
                     lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink("gone", p)):
            path.unlink(missing_ok=True)
            make(path)
            end = run_main(*args)
            assert end.status == 2 or not had, (name, end)
            if end.status == 2:
                assert "Traceback" not in end.err and name in end.err.splitlines()[-1]
            assert canary.read_bytes() == b"mine" * 100_000
            restore(folder, before)
    for name in ("state.json", "meta.json", shards[0], "train_099999.bin"):
        for tail in (".tmp", "") if name.startswith("train_099999") else (".tmp",):
            path = folder / "out" / (name.removesuffix(".tmp") + tail)
            path.unlink(missing_ok=True)
            path.symlink_to(canary)
            end = run_main(*args)
            assert end.status == (2 if name == shards[0] else 0), end
            assert canary.read_bytes() == b"mine" * 100_000
            restore(folder, before)


@pytest.mark.parametrize("name", ["train_000001.bin", "train_000001.bin.tmp", "mine.bin"])
def test_files_of_others_stay(tmp_path, name):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    before = tree(tmp_path)
    assert_refused(run_main("files", f"--input={tmp_path}/a.txt", f"--out={tmp_path / 'out'}"),
                   name, "of another origin", "--out")
    assert tree(tmp_path) == before


# ---- flags


FLAGS = ["--input", "--val_input", "--test_input", "--tokenizer", "--out", "--max_tokens",
         "--shard_tokens", "--workers", "--text_key"]
VALUES = ["", "0", "0_", "_1", "1_000", "007", "-1", "1e3", "9" * 19, "9" * 5000, "\u0663", "nan",
          "1000000", "256", "257", "byte", "bpe:", "bpe:300", "bpe:" + "9" * 5000,
          "bpe:\u0663\u0660\u0660", "bpe:65536", "a.txt", "*.txt", "[", "[]", "[!a", "**", "**/*",
          "?", "~", "~nobody", "b.jsonl", "\0", "a\nb", "\ud83d", "\x1b[2J", "x" * 300, "none",
          "out",
          "out/x", "text", "a.txt/b", "="]
words = st.sampled_from(VALUES) | st.text(max_size=8)
near_flags = st.sampled_from(FLAGS).flatmap(
    lambda flag: st.sampled_from([flag, flag, flag, flag[1:], flag[:-1], flag + "x", flag.upper()]))
arguments = st.lists(
    st.tuples(near_flags, st.sampled_from(["=", "=", "=", "", "==", " "]), words).map("".join)
    | st.sampled_from([*prepare_data.NAMES, "-h", "--help", "--", "-", "", "stdlbi"]) | words,
    max_size=5)


@given(argv=arguments)
@settings(max_examples=10_000 if TORTURE else 300)
def test_any_arguments(argv):
    cfg, error = call(lambda: (prepare_data.parse(argv), 0))
    if error is None:
        cfg = cfg[0]
        assert 0 <= cfg.workers <= 256 and 0 < cfg.shard_tokens < 2**31
        assert 0 <= cfg.max_tokens < 10**18 and cfg.out.isprintable()
        assert re.fullmatch("byte|gpt2|bpe:[0-9]{3,5}", cfg.tokenizer)
    else:
        assert error.isprintable() or error[:-1].isprintable()


@given(more=arguments, inputs=st.lists(words, min_size=1, max_size=3),
       out=st.sampled_from(["out", "new", "a.txt", "a.txt/x", "deep/er", "[x]", "x" * 300,
                            "donn\u00e9es"]))
@settings(max_examples=3000 if TORTURE else 60)
def test_any_command(scratch, more, inputs, out):
    """What is refused writes nothing; what is not makes a complete folder."""
    folder = scratch / "here"
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("some text " * 9)
    write_jsonl(folder / "b.jsonl", some_texts(9))
    back = os.getcwd()
    os.chdir(folder)
    before = tree(Path("."))
    # no network, no walks through the whole disk, no work on the standard library
    more = [arg for arg in more if not re.search(r"~|=/|^/|\.\.|gpt2|^--out|^-h|^--help", arg)
            and arg not in prepare_data.NAMES]
    inputs = [x for x in inputs if not re.match(r"[~/.]", x)]
    try:
        end = run_main("files", "--input=" + (inputs or ["a.txt"])[0], *inputs[1:], *more,
                       f"--out={out}")
        assert end.status in (None, 0, 2), end
        if end.status == 2:
            lines = [x for x in end.err.splitlines() if "training" not in x]
            assert len(lines) == 1 and lines[0].isprintable(), end.err
            after = tree(Path("."))
            kept = {name for name in after if name.startswith(f"{out}/state.json")}
            assert before == after or kept, after
        else:
            assert read_meta(folder / out)
    finally:
        os.chdir(back)
        shutil.rmtree(folder)
