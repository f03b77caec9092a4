"""prepare_data.py, seen from outside: what is on disk after it ran, was killed, or was misused."""
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch

import prepare_data

SCRIPT = Path(prepare_data.__file__)
BOS = "<|endoftext|>"

def read_shard(path):
    """A reader of the llm.c format that shares nothing with the writer."""
    raw = path.read_bytes()
    header = np.frombuffer(raw, "<i4", 256)
    assert tuple(header[:2]) == (20240520, 1)
    tokens = np.frombuffer(raw, "<u1" if header[3] == 1 else "<u2", offset=1024)
    assert len(tokens) == header[2]
    return tokens

def read_meta(folder):
    return json.loads((folder / "meta.json").read_text())

def read_split(folder, split):
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"{split}_*.bin"))])

def read_documents(folder, split):
    """Text of every document of a split, decoded by the meta file alone."""
    meta, tokens = read_meta(folder), read_split(folder, split)
    spelling = {i: bytes([i]) for i in range(256)}
    if meta["token_bytes"]:
        spelling = [token.encode("latin-1") for token in meta["token_bytes"]]
    starts = np.flatnonzero(tokens == meta["bos_id"])
    assert starts[0] == 0
    ends = [*starts[1:], len(tokens)]
    return [b"".join(spelling[t] for t in tokens[a + 1:b].tolist()).decode()
            for a, b in zip(starts, ends, strict=True)]

def contents(folder, pattern="[!.]*"):
    """Everything that a run leaves, by name, less the lock."""
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}

def prepare(*args):
    prepare_data.main([str(arg) for arg in args])

def files(path, out, *args):
    """-> documents of training and validation."""
    prepare("files", f"--input={path}", f"--out={out}", *args)
    return read_documents(out, "train"), read_documents(out, "val")

def start(*args, script=(SCRIPT,), **kwargs):
    return subprocess.Popen([sys.executable, *script, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)

def refused(capsys, *args):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        prepare(*args)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1, error
    return error

def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path

def some_texts(n, seed=0, words=120):
    """Documents of code-like and accented words, numbers and white space of every kind."""
    rng = random.Random(seed)
    stock = ["the", "of", "naïve", "x1", "don't", "we'll", "42", "日本", "=>", "🙂", "def"]
    gaps = [" "] * 8 + ["\n", "\n\n    ", "  ", "\t", "", ", "]
    return ["".join(rng.choice(stock) + rng.choice(gaps) for _ in range(rng.randint(1, words)))
            + f" {i}" for i in range(n)]

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "texts.jsonl", some_texts(3000))

@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_round_trip(tmp_path, tokenizer):
    texts = some_texts(60) + [f"a {BOS} b", BOS, f"{BOS}{BOS[:-1]}", "one\0two", "\r\n x\r"]
    path, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    train, val = files(path, out, f"--tokenizer={tokenizer}", "--shard_tokens=1000")
    assert val and sorted(train + val) == sorted(text.replace("\0", "") for text in texts)
    meta = read_meta(out)
    for split, documents in ("train", train), ("val", val):
        tokens, size = read_split(out, split), sum(len(text.encode()) for text in documents)
        assert meta["splits"][split] == {"tokens": len(tokens), "bytes": size,
                                         "documents": len(documents)}
        assert np.array(meta["byte_length"])[tokens].sum() == size
    for name, raw in contents(out, "*.bin").items():
        n_tokens, sha256 = len(read_shard(out / name)), hashlib.sha256(raw).hexdigest()
        assert n_tokens <= 1000 and np.frombuffer(raw, "<i4", 256)[4] == meta["vocab_size"]
        assert meta["shards"].pop(name) == {"tokens": n_tokens, "sha256": sha256}
    assert not meta["shards"]
    n = 256 if tokenizer == "byte" else 400
    assert meta["vocab_size"] == len(meta["byte_length"]) == n and meta["bos_id"] in (0, 399)

def test_no_text_in_two_splits(tmp_path, corpus, capsys):
    """By hash copies stay on one side, and the share is about 2%. Else what is held out, or under
    the tail rule came before, is left out, counted and reported."""
    texts = [json.loads(line)["text"] for line in corpus.open()][:1500]
    shuffled = texts + texts[:300]
    random.Random(1).shuffle(shuffled)
    train, val = files(write_jsonl(tmp_path / "b.jsonl", shuffled), tmp_path / "b")
    assert not set(train) & set(val) and 0.005 < len(val) / len(shuffled) < 0.03
    source = write_jsonl(tmp_path / "a.jsonl", texts[:40])
    own = texts[30:40] + ["new"]
    val = write_jsonl(tmp_path / "v.jsonl", own)
    assert files(source, tmp_path / "own", f"--val_input={val}") == (texts[:30], own)
    few = write_jsonl(tmp_path / "few.jsonl", texts[:5] * 3)
    assert "".join(sum(files(few, tmp_path / "few"), [])) == "".join(texts[:5])
    assert capsys.readouterr().out.count("10 documents left out") == 2
    files(source, tmp_path / "same", f"--val_input={source}")
    assert "40 training documents, all there are, are held out" in capsys.readouterr().out

def test_max_tokens_is_exact(tmp_path, corpus):
    val, one = write_jsonl(tmp_path / "val.jsonl", ["v" * 99] * 7), tmp_path / "one.txt"
    one.write_text("word " * 10000)
    for path, n_val, *args in (corpus, 0), (one, 5001), (corpus, 700, f"--val_input={val}"):
        out = tmp_path / str(n_val)
        files(path, out, "--max_tokens=12_345", "--shard_tokens=5000", *args)
        assert len(read_split(out, "val")) >= n_val
        assert [len(read_shard(p)) for p in sorted(out.glob("train_*"))] == [5000, 5000, 2345]

def test_containers(tmp_path):
    """The same rows in any form, whatever the file is called, give the same shards."""
    texts = [text + " \u2028 \"quoted\",\tcut" for text in some_texts(50)]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    with zipfile.ZipFile(zip_file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/.hidden.txt", "hidden")
        archive.writestr("folder/a.jsonl", lines)
    forms = {"a.jsonl.gz": gzip.compress(lines[:999]) + gzip.compress(lines[999:]),
             "a.jsonl.xz": lzma.compress(lines), "a.jsonl.bz2": bz2.compress(lines),
             "a.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
             "a.zip": zip_file.getvalue(),
             "no_extension": lines, "named.txt": gzip.compress(lines),
             "bom.jsonl": b"\xef\xbb\xbf" + lines, "wide.json": lines.decode().encode("utf-16"),
             "array.json": json.dumps(rows, ensure_ascii=False, indent=1).encode()}
    for name, delimiter in ("a.csv", ","), ("a.tsv", "\t"), ("table", ";"):
        fields = ["\"" + text.replace("\"", "\"\"") + "\"" for text in texts]
        body = "".join(f"{i}{delimiter}{text}\n" for i, text in enumerate(fields))
        forms[name] = f"id{delimiter}text\n{body}".encode()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file := io.BytesIO(), row_group_size=7)
    forms |= {"a.parquet": file.getvalue(), "a.parquet.gz": gzip.compress(file.getvalue())}
    with pyarrow.ipc.new_stream(file := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    forms["data.arrow"] = file.getvalue()
    assert sorted(sum(files(tmp_path / "a.jsonl", tmp_path / "plain"), [])) == sorted(texts)
    plain = contents(tmp_path / "plain", "*.bin")
    for name, raw in forms.items():
        (tmp_path / name).write_bytes(raw)
        files(tmp_path / name, tmp_path / "out" / name)
        assert contents(tmp_path / "out" / name, "*.bin") == plain, name
    run = start("files", "--input=-", f"--out={tmp_path / 'é'}", stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.communicate(lines.decode(), timeout=60) and run.returncode == 0
    assert contents(tmp_path / "é", "*.bin") == plain

@pytest.mark.parametrize("path, args, expected", [
    ("", [], ["a.md", "b/c.py", "b/d.txt.gz"]), ("", ["--glob=**/*.py"], ["b/c.py"]),
    ("b/e.rst", ["--input=tree/a.md"], ["b/e.rst", "a.md"]), ("*/*.py", [], ["b/c.py"])])
def test_folders(tmp_path, monkeypatch, path, args, expected):
    """Files that are named as text, hidden ones left out, or those that --glob picks."""
    monkeypatch.chdir(tmp_path)
    Path("tree/b/.ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.md", "b/c.py", "b/d.txt.gz", "b/.ipynb_checkpoints/d.txt", "b/.hidden.md",
                 "b/image.png", "b/e.rst"):
        raw = f"This is {name}. ".encode() * 20
        Path("tree", name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    Path("val.txt").write_text("validation")
    found = files(f"tree/{path}", tmp_path / "out", "--val_input=val.txt", *args)
    assert found == ([f"This is {name}. " * 20 for name in expected], ["validation"])

def test_encodings(tmp_path, capsys):
    """What is not UTF-8 is refused, and the remedy that is named works in the same folder."""
    path, text = tmp_path / "a.txt", "Où est passée la forêt ? 日本語の森。\n" * 300
    for encoding in ("gbk", "latin-1", "utf-16-le"):
        raw = text.encode(encoding, "ignore")
        path.write_bytes(raw)
        out = tmp_path / encoding
        error = refused(capsys, "files", f"--input={path}", f"--out={out}")
        assert "--encoding=gbk, latin-1, utf-16-le" in error and not out.exists()
        assert "".join(sum(files(path, out, f"--encoding={encoding}"), [])) == raw.decode(encoding)
    raw = (b"x" * 499 + b"\xff\n") * 3000  # wherever a block of the file happens to end
    path.write_bytes(raw)
    found = files(path, tmp_path / "few")
    assert "3,000 characters that could not be decoded" in capsys.readouterr().out
    assert "".join(sum(found, [])) == raw.decode(errors="replace")

def test_fields(tmp_path, capsys):
    """Null, missing and empty texts are skipped and counted; half of them are too many."""
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    rows = [{"data": {"text": f"text {i}"}} for i in range(40)]
    rows[30:30] = [{"data": None}, {"data": {"text": None}}, {}, {"data": {"text": ""}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows)
                    + '{"data": {"text": "half \\ud83d a pair \\ud83d\\ude42"}}')
    error = refused(capsys, "files", f"--input={path}", f"--out={out}")
    assert "45 of 45 rows have no text in the field text; they hold: data" in error
    expected = [*(f"text {i}" for i in range(40)), "half \ufffd a pair \U0001f642"]
    assert sorted(sum(files(path, out, "--text_key=data.text"), [])) == sorted(expected)
    assert "4 rows without text skipped" in capsys.readouterr().out

def test_split_on(tmp_path, capsys):
    stories = [f"Story {i}.\nIts end." for i in range(50)]
    path = tmp_path / "a.txt"
    for name, joint in ((BOS, f"\n{BOS}\n"), ("blank", "\n\n \n")):
        path.write_text(joint.join(stories) + joint)
        found = files(path, tmp_path / name[:5], f"--split_on={name}")
        assert sorted(sum(found, [])) == sorted(stories)
        files(path, tmp_path / f"{name[:5]} as it is")
        assert capsys.readouterr().out.count(f"50 times {BOS} is plain text") == (name == BOS)
    assert len(files(path, tmp_path / "line", "--split_on=line")[0]) > 90

def test_hub(tmp_path, monkeypatch, capsys):
    """A data set as the hub holds it, here a folder: its own splits, or one with --split."""
    monkeypatch.chdir(tmp_path)
    texts = some_texts(60)
    Path("owner/name").mkdir(parents=True)
    for name, some in ("train-0", texts[:20]), ("train-1", texts[20:40]), ("valid-0", texts[40:]):
        pyarrow.parquet.write_table(pyarrow.table({"body": some}), f"owner/name/{name}.parquet")
    assert "they hold: body" in refused(capsys, "hf:owner/name")
    prepare("hf:owner/name", "--text_key=body")
    found = (read_documents(Path("data/name"), split) for split in ("train", "val"))
    assert [*found] == [texts[:40], texts[40:]]
    prepare("hf:owner/name", "--text_key=body", "--split=validation", "--out=one")
    assert len(read_documents(Path("one"), "train")) in (18, 19)
    error = refused(capsys, "hf:owner/name", "--split=dev", "--out=two")
    assert "--split=train or validation" in error

def test_vocabulary_of_another(tmp_path, capsys):
    """Of a prepared folder, of a checkpoint, or of a tokenizer.json: the same ids as there."""
    made, other = tmp_path / "a", write_jsonl(tmp_path / "b.jsonl", some_texts(100, seed=9))
    files(write_jsonl(tmp_path / "a.jsonl", some_texts(300)), made, "--tokenizer=bpe:400")
    torch.save({"meta": read_meta(made)}, tmp_path / "ckpt.pt")
    for name in ("a", "ckpt.pt"):
        files(other, tmp_path / f"by_{name}", f"--tokenizer={tmp_path / name}")
        found = read_meta(tmp_path / f"by_{name}")
        assert all(found[key] == read_meta(made)[key] for key in prepare_data.TOKENIZER_KEYS)
    hf, cut = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    level = cut.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = tokenizers.Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    hf.pre_tokenizer = cut.Sequence([cut.Split(pattern, "isolated"), level])
    hf.train_from_iterator(some_texts(300), tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<s>"], initial_alphabet=level.alphabet()))
    saved = tmp_path / "tokenizer.json"
    hf.save(str(saved))
    documents, _ = files(other, tmp_path / "hf", f"--tokenizer={saved}")
    assert read_meta(tmp_path / "hf")["bos_id"] == 1
    ids = read_split(tmp_path / "hf", "train").tolist()
    assert ids == sum(([1] + hf.encode(text).ids for text in documents), [])
    hf.pre_tokenizer = level  # cuts nowhere, so merges reach over words
    hf.save(str(saved))
    error = refused(capsys, "files", f"--input={other}", f"--tokenizer={saved}",
                    f"--out={tmp_path / 'x'}")
    assert "cuts text in a way" in error

def test_pieces_give_the_tokens_of_the_whole():
    """With a BPE of the same strange text, so that merges reach over every careless cut."""
    rng = random.Random(3)
    alphabet = [*"aBé'1٣Ⅷ-_。日本か한.\\ \n\t\x1c\x85\u00a0\u2003\u0301", "'s", "'ll", "  ", "\r\n"]

    def strange():
        some = rng.sample(alphabet, rng.randint(4, len(alphabet)))
        return "".join(rng.choice(some) for _ in range(rng.randint(1, 300)))

    meta = prepare_data.train_bpe("bpe:1500", (strange() for _ in range(2000)))
    encoder, n_cut = prepare_data.make_encoder(meta), 0
    for case in range(1000):
        text = strange() + "ab 1"
        size, block = rng.choice([40, 64, 100]), rng.randint(1, 150)
        blocks = [text[at:at + block] for at in range(0, len(text), block)]
        cut = [*prepare_data.pieces([blocks], size)]
        assert "".join(piece for _, piece in cut) == text
        assert [first for first, _ in cut] == [True] + [False] * (len(cut) - 1)
        if any(len(piece) == size for _, piece in cut[:-1]):
            continue  # perhaps cut for want of any safe place
        n_cut += len(cut) - 1
        ids = [encoder({"": [piece]})[""] for _, piece in cut]
        assert np.array_equal(np.concatenate(ids), encoder({"": [text]})[""]), case
    assert n_cut > 500

def test_memory_does_not_grow(tmp_path):
    """A line of 100 MB without a single space, read by the child of a small process."""
    n = 100_000_000
    (tmp_path / "a.txt").write_bytes(b"0123456789abcdefghijklmnopqrstuvwxyz=/()" * (n // 40))
    launcher = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    run = start(sys.executable, SCRIPT, "files", f"--input={tmp_path}/a.txt",
                f"--out={tmp_path / 'out'}", script=["-c", launcher])
    said = run.communicate(timeout=60)[0]
    assert read_meta(tmp_path / "out")["splits"]["train"]["bytes"] == 0.9 * n
    assert int(said.split()[-1]) < 450e3  # kB, most of them the libraries'

# Small batches, so that a run saves many positions
SLOW = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import prepare_data as p;"
        "p.PIECE_CHARS, p.SAVE_SECONDS = 4096, 0; p.main(sys.argv[1:])")

def start_slow(*args):
    return start(*args, script=["-c", SLOW, SCRIPT.parent])

def wait_for_state(run, folder):
    while run.poll() is None and not (folder / prepare_data.STATE).exists():
        time.sleep(0.002)

@pytest.fixture(scope="module")
def mixed(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("mixed")
    for i in range(8):
        (folder / f"{i}.txt").write_text("\n".join(some_texts(400, seed=i)))
    (folder / "4.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    val = write_jsonl(folder.parent / "val.jsonl", some_texts(300)[100:])
    args = ["files", f"--input={folder}", f"--val_input={val}", "--shard_tokens=150_000",
            "--tokenizer=bpe:300"]
    prepare(*args, f"--out={folder.parent / 'whole'}")
    return args, contents(folder.parent / "whole")

def test_kill_at_any_moment(tmp_path, mixed):
    """The same command goes on, and gives the bytes of an uninterrupted run."""
    (args, expected), went_on = mixed, 0
    for kill in range(4):
        run = start_slow(*args, f"--out={tmp_path / 'out'}")
        if kill < 3:
            wait_for_state(run, tmp_path / "out")
            time.sleep(random.uniform(0, 0.1) if kill else 0)
            run.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kill])
        went_on += "going on" in run.communicate(timeout=60)[1]
        found = contents(tmp_path / "out", "*.bin")
        assert found.items() <= expected.items()  # shards are whole, or not there
        if kill < 3 and run.returncode == 0:  # too late for a kill
            shutil.rmtree(tmp_path / "out")
    assert went_on and run.returncode == 0 and contents(tmp_path / "out") == expected
    (tmp_path / "out/meta.json").unlink()  # as if killed before that, and too early to save
    shutil.copy(tmp_path / "out/val_000000.bin", tmp_path / "out/val.tokens")
    prepare(*args, f"--out={tmp_path / 'out'}")
    assert contents(tmp_path / "out") == expected

def test_a_broken_row_is_mended(tmp_path):
    """The files before it are done, and stay so."""
    first, last = (write_jsonl(tmp_path / f"{i}.jsonl", some_texts(300, i)) for i in range(2))
    val = write_jsonl(tmp_path / "val.jsonl", ["val"] * 9)
    whole, out = last.read_bytes(), tmp_path / "out"
    last.write_bytes(whole[:-9])
    args = ["files", f"--input={first}", last, f"--val_input={val}"]
    error = start_slow(*args, f"--out={out}").communicate(timeout=60)[1]
    assert "1.jsonl, line 300: not JSON" in error.splitlines()[-1]
    last.write_bytes(whole)
    run = start_slow(*args, f"--out={out}")
    assert "going on" in run.communicate(timeout=60)[1] and run.returncode == 0
    prepare(*args, f"--out={tmp_path / 'whole'}")
    assert contents(out) == contents(tmp_path / "whole")

def test_second_process_and_other_settings(tmp_path, mixed, capsys):
    args = [*mixed[0], f"--out={tmp_path / 'out'}"]
    first = start_slow(*args)
    wait_for_state(first, tmp_path / "out")
    first.send_signal(signal.SIGSTOP)
    assert "could not be acquired" in refused(capsys, *args)
    first.kill()
    first.communicate()
    refused(capsys, *[arg.replace("bpe:300", "bpe300") for arg in args])
    assert (tmp_path / "out" / prepare_data.STATE).exists()  # a slip of the pen costs nothing
    prepare(*args, "--text_key=text", "--max_tokens=100_000")
    assert read_meta(tmp_path / "out")["splits"]["train"]["tokens"] == 100_000
    prepare(*args, "--max_tokens=100_000")
    assert "is complete" in capsys.readouterr().out
    assert "of other settings" in refused(capsys, *args)

def test_full_disk(tmp_path, mixed):
    """A write that fails midway: one line, and the same command goes on."""
    resource = pytest.importorskip("resource")
    args, limit = [*mixed[0], f"--out={tmp_path / 'out'}"], (100_000,) * 2
    run = start(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    error = run.communicate(timeout=60)[1].strip()
    assert run.returncode == 2 and "File too large" in error and len(error.splitlines()) == 1
    prepare(*args)
    assert contents(tmp_path / "out") == mixed[1]

def test_published_shards(tmp_path, corpus, capsys):
    """Shards as llm.c writes them get the meta.json that they lack, and stay as they are."""
    files(write_jsonl(tmp_path / "a.jsonl", some_texts(300)), tmp_path / "a", "--tokenizer=bpe:400")
    made, folder = read_meta(tmp_path / "a"), tmp_path / "published"
    folder.mkdir()
    for name, split in ("my_train.bin", "train"), ("my_val_000000.bin", "val"):
        header, tokens = np.zeros(256, "<i4"), read_split(tmp_path / "a", split)
        header[:3] = 20240520, 1, len(tokens)
        (folder / name).write_bytes(header.tobytes() + tokens.tobytes())
    before = contents(folder)
    assert "another origin" in refused(capsys, "files", f"--input={corpus}", f"--out={folder}")
    assert contents(folder) == before
    args = ["meta", folder, f"--tokenizer={tmp_path / 'a'}"]
    prepare(*args)
    assert read_meta(folder)["splits"] == made["splits"]
    assert contents(folder, "*.bin") == before and set(read_meta(folder)["shards"]) == set(before)
    raw = before["my_train.bin"]
    (folder / "meta.json").unlink()
    for bad in (raw[:-2], b"\1" * 3000, raw[:-2] + b"\xff\xff"):
        (folder / "my_train.bin").write_bytes(bad)
        assert "my_train.bin: not a whole llm.c shard" in refused(capsys, *args)

@pytest.mark.parametrize("args, said", [
    ([], "no source"),
    (["stdlib", "--tokeniser=byte"], "did you mean --tokenizer?"),
    (["stdlib", "--max_tokens=many"], "a whole number above 0"),
    (["files", "--input=empty"], "nothing to read there"),
    (["files", "--input=bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    (["files", "--input=a.txt", "--encoding=none"], "unknown encoding: none"),
    (["files", "--input=cut.txt.gz"], "cut.txt.gz: "),
    (["files", "--input=page"], "--as_text=1"),
    (["files", "--input=book"], "e-book"),
    (["files", "--input=nothing.txt"], "no text for train"),
    (["files", "--input=a.txt", "--val_input=nothing.txt"], "no text for val"),
    (["files", "--input=a.txt", "--tokenizer=bpe:5000"], "use bpe:2"),
])
def test_misuse(tmp_path, monkeypatch, capsys, args, said):
    """One line that names the mistake, and no shard or meta.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(book := io.BytesIO(), "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("a.xhtml", "<?xml version='1.0'?>")
    given = {"a.txt": b"a line of text\n" * 50, "nothing.txt": b"", "book": book.getvalue(),
             "bad.jsonl": b'{"text": "fine"}\n{"text": "fi\n', "page": b"\n<!DOCTYPE html><p>Hi",
             "cut.txt.gz": gzip.compress(os.urandom(5000))[:3000]}
    for name, raw in given.items():
        (tmp_path / name).write_bytes(raw)
    assert said in refused(capsys, *args)
    assert not [*tmp_path.rglob("*.bin"), *tmp_path.rglob("meta.json")]

@pytest.mark.parametrize("args", [["shakespeare"], ["stdlib", "--tokenizer=gpt2"],
                                  ["hf:owner/name"]])
def test_no_network(tmp_path, args):
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
           "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    run = start(*args, cwd=tmp_path, env=env)
    error = run.communicate(timeout=60)[1].strip().splitlines()
    assert run.returncode == 2 and error[-1].startswith("prepare_data.py: "), error
    assert "again" in error[-1] or "TIKTOKEN_CACHE_DIR" in error[-1]
