"""prepare_data.py, seen from outside: what is on disk after it ran, was killed, or was misused."""
import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "prepare_data.py"
sys.path.insert(0, str(SCRIPT.parent))
import prepare_data  # noqa: E402

BOS = "<|endoftext|>"
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


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
    shards = sorted(folder.glob(f"{split}_*.bin"))
    return np.concatenate([read_shard(path) for path in shards]) if shards else np.zeros(0, "<u1")


def read_documents(folder, split):
    """Text of every document of a split, decoded by the meta file alone."""
    meta, tokens = read_meta(folder), read_split(folder, split)
    spelling = {i: bytes([i]) for i in range(256)}
    if meta["token_bytes"]:
        spelling = [token.encode("latin-1") for token in meta["token_bytes"]]
    starts = np.flatnonzero(tokens == meta["bos_id"])
    assert not len(tokens) or starts[0] == 0
    ends = [*starts[1:], len(tokens)]
    return [b"".join(spelling[t] for t in tokens[a + 1:b].tolist()).decode()
            for a, b in zip(starts, ends, strict=True)]


def contents(folder):
    """Everything that a run leaves, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare(*args):
    prepare_data.main([str(arg) for arg in args])


def start(*args, **kwargs):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **kwargs)


def refused(capsys, *args):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        prepare(*args)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1, error
    return error


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
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


# ---- what is written


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_round_trip(tmp_path, tokenizer):
    if tokenizer != "byte":
        pytest.importorskip("tokenizers")
    texts = some_texts(60)
    texts += ["", f"a {BOS} b", BOS, f"{BOS}{BOS[:-1]}", "one\0two", "\0", "\r\n x\r"]
    path, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    prepare("files", f"--input={path}", f"--out={out}", f"--tokenizer={tokenizer}",
            "--shard_tokens=1000")
    meta = read_meta(out)
    found = {split: read_documents(out, split) for split in ("train", "val")}
    kept = [text.replace("\0", "") for text in texts if text.strip("\0")]
    assert found["val"] and sorted(found["train"] + found["val"]) == sorted(kept)
    assert not set(found["train"]) & set(found["val"])
    assert [text for text in kept if text in set(found["train"])] == found["train"]
    for split, documents in found.items():
        tokens = read_split(out, split)
        size = sum(len(text.encode()) for text in documents)
        assert meta["splits"][split] == {"tokens": len(tokens), "bytes": size,
                                         "documents": len(documents)}
        assert np.array(meta["byte_length"])[tokens].sum() == size
    assert set(meta["shards"]) == {path.name for path in out.glob("*.bin")}
    for name, shard in meta["shards"].items():
        tokens, raw = read_shard(out / name), (out / name).read_bytes()
        assert shard["tokens"] == len(tokens) <= 1000
        assert shard["bytes"] == np.array(meta["byte_length"])[tokens].sum()
        assert shard["sha256"] == hashlib.sha256(raw).hexdigest()
        header = np.frombuffer(raw, "<i4", 256)
        assert header[3] == (1 if tokenizer == "byte" else 2) and header[4] == meta["vocab_size"]
    assert meta["vocab_size"] == len(meta["byte_length"]) == (256 if tokenizer == "byte" else 400)
    assert meta["bos_id"] == (0 if tokenizer == "byte" else 399)


def test_few_documents_give_their_tail(tmp_path):
    text = "héllo wörld\n" * 997
    (tmp_path / "a.txt").write_text(text)
    prepare("files", f"--input={tmp_path / 'a.txt'}", f"--out={tmp_path / 'one'}")
    (train,), (val,) = (read_documents(tmp_path / "one", split) for split in ("train", "val"))
    assert train + val == text
    assert 0 <= len(val.encode()) - len(text.encode()) // 10 <= 1
    # several documents: the cut falls inside the second, whose two halves both start with BOS
    texts = ["é" * 1001, "b" * 10001, "c" * 100]
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepare("files", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'three'}")
    train, val = (read_documents(tmp_path / "three", split) for split in ("train", "val"))
    assert train[0] == texts[0] and val[1] == texts[2] and train[1] + val[0] == texts[1]
    assert sum(map(len, val)) == sum(len(text.encode()) for text in texts) // 10


def test_split_by_hash_follows_the_text(tmp_path, corpus):
    """Copies of a document stay on one side, order does not matter, and the share is about 2%."""
    texts = [json.loads(line)["text"] for line in corpus.open()][:1500]
    shuffled = texts + texts[:300]
    random.Random(1).shuffle(shuffled)
    for name, given in (("a", texts), ("b", shuffled)):
        write_jsonl(tmp_path / f"{name}.jsonl", given)
        prepare("files", f"--input={tmp_path}/{name}.jsonl", f"--out={tmp_path / name}")
        train, val = (read_documents(tmp_path / name, split) for split in ("train", "val"))
        assert not set(train) & set(val)
        assert 0.005 < len(val) / len(given) < 0.03


def test_lone_surrogate_and_other_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a \\ud83d b \\ud83d\\ude42"}\n\n{"body": "cccccccccc"}')
    prepare("files", f"--input={path}", "--text_key=body", f"--out={tmp_path / 'out'}")
    assert read_documents(tmp_path / "out", "train")[0] == "a \ufffd b 🙂"


def test_max_tokens_is_exact(tmp_path, corpus):
    val, one = write_jsonl(tmp_path / "val.jsonl", ["v" * 99] * 7), tmp_path / "one.txt"
    one.write_text("word " * 10000)
    for name, source, rest, n_val in (("hash", corpus, [], 124), ("tail", one, [], 5001),
                                      ("own", corpus, [f"--val_input={val}"], 700)):
        out = tmp_path / name
        prepare("files", f"--input={source}", f"--out={out}", "--max_tokens=12345",
                "--shard_tokens=5000", *rest)
        assert read_meta(out)["splits"]["train"]["tokens"] == 12345 == len(read_split(out, "train"))
        assert len(read_split(out, "val")) == n_val
        assert [len(read_shard(p)) for p in sorted(out.glob("train_*"))] == [5000, 5000, 2345]


def test_stdlib(tmp_path):
    prepare("stdlib", f"--out={tmp_path}")
    meta = read_meta(tmp_path)
    share = meta["splits"]["val"]["bytes"] / meta["splits"]["train"]["bytes"]
    assert meta["splits"]["train"]["bytes"] > 5e6 and 0.002 < share < 0.03
    assert any("def dataclass(" in text for split in ("train", "val")
               for text in read_documents(tmp_path, split))


# ---- pieces, long lines, tokens


# ---- the same bytes, whatever happens


def test_workers_do_not_matter(tmp_path, corpus):
    pytest.importorskip("tokenizers")
    for workers in (1, 2, 5):
        prepare("files", f"--input={corpus}", f"--out={tmp_path / str(workers)}",
                "--tokenizer=bpe:500", "--shard_tokens=20_000", f"--workers={workers}")
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_foreign_shards_are_kept(tmp_path, corpus, capsys):
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"precious")
    assert "another origin" in refused(capsys, "files", f"--input={corpus}", f"--out={tmp_path}")
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == b"precious"


# ---- shards and texts of others


# ---- misuse


def test_too_little_text_for_a_bpe(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("abc " * 100)
    run = start("files", f"--input={tmp_path}/a.txt", f"--out={tmp_path / 'out'}",
                "--tokenizer=bpe:5000")
    error = run.communicate(timeout=30)[1]
    assert run.returncode == 2 and "use bpe:2" in error.splitlines()[-1]




# What people have.


def run_command(*arguments, cwd, stdin=None):
    """The command line in a process -> (status, what it printed)."""
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, text=True,
                          input=stdin, capture_output=True, env={**os.environ, **OFFLINE})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


STORIES = [f"Story {i}: once upon a time there were {i} frogs. " + "The end. " * i
           for i in range(30)]
ROWS = "".join(json.dumps({"id": i, "text": s, "data": {"body": s}}) + "\n"
               for i, s in enumerate(STORIES))


def write_forms(folder):
    import pyarrow
    import pyarrow.parquet

    (folder / "a.jsonl").write_text(ROWS)
    (folder / "a.json").write_text("[" + ",".join(ROWS.splitlines()) + "]")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(ROWS.encode()))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(ROWS.encode()))
    (folder / "noextension").write_text(ROWS)
    (folder / "a.csv").write_text(
        "id,text\n" + "".join(f'{i},"{s}"\n' for i, s in enumerate(STORIES)))
    pyarrow.parquet.write_table(pyarrow.table({"text": STORIES}), folder / "a.parquet")
    (folder / "eot.txt").write_text(BOS.join(STORIES))


@pytest.mark.parametrize("form, flags", [
    ("a.jsonl", ["--text_key=data.body"]), ("a.json", []), ("a.jsonl.gz", []), ("a.jsonl.xz", []),
    ("noextension", []), ("a.csv", ["--text_key=text"]), ("a.parquet", []),
    ("eot.txt", [f"--split_on={BOS}"])])
def test_every_form_gives_the_same_documents(form, flags, tmp_path):
    write_forms(tmp_path)
    status, said = run_command("files", f"--input={form}", "--out=out", *flags, cwd=tmp_path)
    assert status == 0, said
    texts = read_documents(tmp_path / "out", "train") + read_documents(tmp_path / "out", "val")
    assert sorted(text.strip() for text in texts) == sorted(s.strip() for s in STORIES)


def test_standard_input(tmp_path):
    status, said = run_command("files", "--input=-", "--out=out", cwd=tmp_path,
                               stdin="words " * 500)
    assert status == 0, said
    assert "".join(read_documents(tmp_path / "out", "train")).startswith("words words")


@pytest.mark.parametrize("name, data, flags, words", [
    ("gbk.txt", "从前有一座山。".encode("gbk") * 50, [], "--encoding"),
    ("latin.txt", "un été à la forêt ".encode("latin-1") * 50, [], "--encoding"),
    ("utf16.txt", "no mark at all ".encode("utf-16-le") * 50, [], "--encoding"),
    ("page.html", b"<!DOCTYPE html><html><body><p>text</p></body></html>" * 9, [], "HTML"),
    ("content.jsonl", b'{"content": "some text"}\n' * 40, [], "--text_key"),
    ("null.jsonl", b'{"text": null}\n' * 30 + b'{"text": "x"}\n', [], "no text"),
    ("gone.txt", None, [], "gone.txt"),
    ("ok.txt", b"words " * 900, ["--tokenizr=byte"], "tokeni"),
    ("ok.txt", b"words " * 900, ["--tokenizer=gpt3"], "--tokenizer=gpt3"),
    ("cut.txt.gz", gzip.compress(b"words " * 900)[:-9], [], "cut.txt.gz"),
])
def test_what_is_no_text_is_refused_and_leaves_nothing(name, data, flags, words, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    status, said = run_command("files", f"--input={name}", "--out=out", *flags, cwd=tmp_path)
    assert status == 2 and words in said, said
    assert not (tmp_path / "out").exists()


def test_another_encoding_is_read_when_it_is_named(tmp_path):
    text = "从前有一座山，山里有座庙。" * 50
    (tmp_path / "gbk.txt").write_bytes(text.encode("gbk"))
    status, said = run_command("files", "--input=gbk.txt", "--encoding=gbk", "--out=out",
                               cwd=tmp_path)
    assert status == 0, said
    parts = [read_documents(tmp_path / "out", split) for split in ("train", "val")]
    assert "".join(parts[0] + parts[1]) == text


def test_hidden_folders_and_rows_without_text_are_skipped(tmp_path):
    for name in ("src/a.py", ".git/b.py", "src/.ipynb_checkpoints/a.py"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"print('{name}')  # text\n" * 40)
    status, said = run_command("files", "--input=tree", "--glob=**/*.py", "--out=out", cwd=tmp_path)
    assert status == 0, said
    texts = read_documents(tmp_path / "out", "train") + read_documents(tmp_path / "out", "val")
    assert all("src/a.py" in text for text in texts)
    (tmp_path / "rows.jsonl").write_text(ROWS + '{"text": null}\n{"id": 3}\n{"text": ""}\n')
    status, said = run_command("files", "--input=rows.jsonl", "--out=rows", cwd=tmp_path)
    assert status == 0 and "skipped" in said, said


def test_vocabulary_of_a_prepared_folder(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(STORIES))
    for tokenizer, out in (("bpe:300", "one"), ("one", "two")):
        status, said = run_command("files", "--input=a.txt", f"--tokenizer={tokenizer}",
                               f"--out={out}", cwd=tmp_path)
        assert status == 0, said
    one, two = read_meta(tmp_path / "one"), read_meta(tmp_path / "two")
    assert all(one[key] == two[key] for key in ("token_bytes", "pattern", "bos_id"))
    assert np.array_equal(read_split(tmp_path / "one", "train"),
                          read_split(tmp_path / "two", "train"))


def test_published_shards_get_the_meta_json_that_they_lack(tmp_path):
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, 100, 1
    for split in ("train", "val"):
        tokens = np.arange(100).astype(np.uint8).tobytes()
        (tmp_path / f"corpus_{split}.bin").write_bytes(header.tobytes() + tokens)
    status, said = run_command("meta", tmp_path, cwd=tmp_path)
    assert status == 0, said
    meta = read_meta(tmp_path)
    assert meta["tokenizer"] == "byte" and len(meta["byte_length"]) == meta["vocab_size"] == 256


def test_killed_run_gives_the_same_bytes(tmp_path):
    for i in range(40):
        (tmp_path / f"in{i:02}.txt").write_text(f"file {i} " + "words and more words " * 30_000)
    flags = ("files", "--input=.", "--glob=in*.txt", "--tokenizer=byte")
    status, said = run_command(*flags, "--out=whole", cwd=tmp_path)
    assert status == 0, said
    for seconds in (1.0, 1.6, 2.2):
        run = subprocess.Popen([sys.executable, str(SCRIPT), *flags, "--out=out"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        run.kill()
        run.wait()
    status, said = run_command(*flags, "--out=out", cwd=tmp_path)
    assert status == 0, said
    for path in (tmp_path / "whole").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
