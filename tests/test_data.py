"""prepare_data.py, seen from outside: what is on disk after it ran, was killed, or was misused."""
import gzip
import hashlib
import json
import lzma
import os
import random
import re
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


@pytest.fixture
def tokenizer_of(corpus):
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    texts = [json.loads(line)["text"] for line in corpus.open()]
    return prepare_data.bpe_tokenizer("bpe:400", prepare_data.train_bpe("bpe:400", texts))


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


def test_own_splits_and_forms_of_files(tmp_path):
    """Folder, glob, list, gz and xz all give the same bytes as the plain files."""
    texts, plain, packed = some_texts(50), tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    write_jsonl(plain / "a.jsonl", texts[:48])
    (plain / "b.txt").write_text(texts[48])
    (plain / "notes.md").write_text("not asked for")
    (packed / "a.jsonl.xz").write_bytes(lzma.compress((plain / "a.jsonl").read_bytes()))
    (packed / "b.txt.gz").write_bytes(gzip.compress((plain / "b.txt").read_bytes()))
    val, test = tmp_path / "val.txt", write_jsonl(tmp_path / "test.jsonl", texts[:3])
    val.write_text(texts[49])
    inputs = {"folder": [f"--input={plain}"], "list": [f"--input={plain}/a.jsonl", plain / "b.txt"],
              "glob": [f"--input={plain}/*.[jt]*"], "packed": [f"--input={packed}"]}
    shards = {}
    for name, given in inputs.items():
        out = tmp_path / name
        prepare("files", *given, f"--val_input={val}", f"--test_input={test}", f"--out={out}")
        assert read_documents(out, "train") == texts[:49]
        assert read_documents(out, "val") == [texts[49]]
        assert read_documents(out, "test") == texts[:3]
        shards[name] = {k: v for k, v in contents(out).items() if k.endswith(".bin")}
    assert all(value == shards["folder"] for value in shards.values())


def test_invalid_utf8_is_replaced_and_counted(tmp_path, capsys):
    """Wherever a block of the file happens to end."""
    raw = b"ab\xff\xe2\x82cd\xf0\x9f\x99\x82\n" * 200_000 + b"\xe2\x82"
    (tmp_path / "a.txt").write_bytes(raw)
    prepare("files", f"--input={tmp_path}/a.txt", f"--out={tmp_path / 'out'}")
    (train,), (val,) = (read_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == raw.decode(errors="replace")
    assert "400,001 sequences that are not UTF-8" in capsys.readouterr().out


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


def test_pieces_give_the_tokens_of_the_whole():
    """With a BPE of the same strange text, so that merges reach over every careless cut."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    rng = random.Random(3)
    alphabet = [*"aBé'1٣Ⅷ-_。日本か한.\\ \n\t\x1c\x85\u00a0\u2003\u0301", "'s", "'ll", "  ", "\r\n"]

    def strange():
        some = rng.sample(alphabet, rng.randint(4, len(alphabet)))
        return "".join(rng.choice(some) for _ in range(rng.randint(1, 300)))

    ranks = prepare_data.train_bpe("bpe:1500", (strange() for _ in range(2000)))
    whole_of = prepare_data.bpe_tokenizer("bpe:1500", ranks).bpe.encode_ordinary
    n_cut = 0
    for case in range(1500):
        text = strange() + "ab 1"
        size, block = rng.choice([40, 64, 100]), rng.randint(1, 150)
        blocks = [("train", at == 0, text[at:at + block]) for at in range(0, len(text), block)]
        cut = list(prepare_data.pieces(blocks, size))
        assert "".join(piece for _, _, piece in cut) == text
        assert [first for _, first, _ in cut] == [True] + [False] * (len(cut) - 1)
        if any(len(piece) == size for _, _, piece in cut[:-1]):
            continue  # perhaps cut for want of any safe place
        n_cut += len(cut) - 1
        assert sum((whole_of(piece) for _, _, piece in cut), []) == whole_of(text), case
    assert n_cut > 1000


def test_batch_encodes_as_documents_one_by_one(tokenizer_of):
    texts = [*some_texts(40, seed=5), BOS, f"x{BOS}", "<", BOS[1:], " ", "\n\n", BOS[:-1], ">"]
    firsts = [i % 5 > 0 for i in range(len(texts))]
    expected = sum(([tokenizer_of.bos_id] * first + tokenizer_of.bpe.encode_ordinary(text)
                    for first, text in zip(firsts, texts, strict=True)), [])
    assert tokenizer_of.encode(list(zip(firsts, texts, strict=True))).tolist() == expected


def test_bpe_is_the_same_every_time(corpus):
    pytest.importorskip("tokenizers")
    texts = [json.loads(line)["text"] for line in corpus.open()]
    first, second = (prepare_data.train_bpe("bpe:600", iter(texts)) for _ in range(2))
    assert first == second and len(first) == 599
    assert all(bytes([b]) in first for b in range(256))


def test_long_lines(tmp_path, capsys):
    """A line of 100 MB without a single space goes through in pieces, in little memory."""
    unit = "0123456789abcdefghijklmnopqrstuvwxyz=/" * 27000
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(100):
            file.write(unit)
    # Started by a small process: a child's peak includes that of the process it is forked from.
    launcher = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    run = subprocess.run(
        [sys.executable, "-c", launcher, sys.executable, prepare_data.__file__, "files",
         f"--input={tmp_path}/a.txt", f"--out={tmp_path / 'out'}", "--max_tokens=3_000_000"],
        capture_output=True, text=True, check=True, timeout=60)
    assert read_documents(tmp_path / "out", "train") == [(unit * 3)[:2_999_999]]
    assert int(run.stdout.split()[-1]) < 400e3  # kB
    with (tmp_path / "a.jsonl").open("w") as file:
        file.write('{"text": "short"}\n{"text": "' + unit * 35 + '"}\n')
    error = refused(capsys, "files", f"--input={tmp_path}/a.jsonl", f"--out={tmp_path / 'b'}")
    assert "a.jsonl, line 2: longer than 32 MiB" in error


# ---- the same bytes, whatever happens


def test_workers_do_not_matter(tmp_path, corpus):
    pytest.importorskip("tokenizers")
    for workers in (1, 2, 5):
        prepare("files", f"--input={corpus}", f"--out={tmp_path / str(workers)}",
                "--tokenizer=bpe:500", "--shard_tokens=20_000", f"--workers={workers}")
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_kill_between_name_and_state(tmp_path, corpus):
    """Every state of the folder that a kill can leave, by replaying an older state file."""
    args = ["files", f"--input={corpus}", f"--out={tmp_path / 'out'}", "--shard_tokens=100_000"]
    run = start(*args)
    state = tmp_path / "out/state.json"
    states = set()
    while run.poll() is None and not list((tmp_path / "out").glob("train_000002.bin")):
        if state.exists():
            states.add(state.read_bytes())
    run.kill()
    run.wait()
    if not (tmp_path / "out/meta.json").exists() and states:
        state.write_bytes(min(states, key=len))
    prepare(*args)
    prepare(*args[:2], *args[3:], f"--out={tmp_path / 'whole'}")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_complete_folder_is_left_alone(tmp_path, corpus, capsys):
    args = ["files", f"--input={corpus}", f"--out={tmp_path}", "--shard_tokens=90_000"]
    prepare(*args)
    stamps = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    capsys.readouterr()
    prepare(*args)
    assert "complete" in capsys.readouterr().out
    assert "--max_tokens=0" in refused(capsys, *args, "--max_tokens=5000")
    other = write_jsonl(tmp_path.parent / "other.jsonl", ["x"] * 30)
    assert "other input files" in refused(capsys, "files", f"--input={other}", *args[2:])
    assert stamps == {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}


def test_unfinished_folder_refuses_another_run(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(some_texts(3000)) * 20)
    args = ["files", f"--input={tmp_path}/a.txt", f"--out={tmp_path / 'out'}"]
    run = start(*args, "--shard_tokens=300_000")
    while run.poll() is None and not list((tmp_path / "out").glob("train_000002.bin")):
        time.sleep(0.002)
    if os.name == "posix":
        error = refused(capsys, *args, "--shard_tokens=300_000")
        assert "another process" in error
    run.kill()
    run.wait()
    if not (tmp_path / "out/meta.json").exists():
        assert "an unfinished run made with --shard_tokens=300000" in refused(capsys, *args)


def test_foreign_shards_are_kept(tmp_path, corpus, capsys):
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"precious")
    assert "another origin" in refused(capsys, "files", f"--input={corpus}", f"--out={tmp_path}")
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == b"precious"


# ---- shards and texts of others


def test_published_shards(tmp_path, tokenizer_of, capsys):
    """Shards as llm.c writes them, with nothing in the header beyond the count."""
    tokens = np.concatenate([[tokenizer_of.bos_id] + tokenizer_of.bpe.encode_ordinary(text)
                             for text in some_texts(30)]).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    names = ["finewebedu_train_000001.bin", "finewebedu_val_000000.bin"]
    for name in names:
        (tmp_path / name).write_bytes(header.tobytes() + tokens.tobytes())
    before = contents(tmp_path)
    totals, shards = prepare_data.adopt(tmp_path, names, tokenizer_of)
    size = sum(len(text.encode()) for text in some_texts(30))
    expected = {"tokens": len(tokens), "bytes": size, "documents": 30}
    assert totals == {"train": expected, "val": expected}
    assert set(shards) == set(names) and contents(tmp_path) == before
    bad = {"cut": before[names[0]][:-2], "magic": b"\1" * 3000, "short": b"",
           "token": before[names[0]][:-2] + b"\xff\xff"}
    for raw in bad.values():
        (tmp_path / names[0]).write_bytes(raw)
        with pytest.raises(SystemExit) as stop:
            prepare_data.adopt(tmp_path, names, tokenizer_of)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_streaming_a_data_set(tmp_path, corpus, capsys):
    """A parquet file read as those on the hub are, here from a folder."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet
    texts = [json.loads(line)["text"] for line in corpus.open()][:500] + ["", "a\0b", "x" * 600_000]
    path = str(tmp_path / "a.parquet")
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    reader = prepare_data.Reader([prepare_data.Part(path, "hub", None, 1, "")], "text")
    found = list(prepare_data.pieces(reader.route(0, {"hash": -1}), 1_000_000))
    assert [text for _, _, text in found] == [*texts[:500], "ab", texts[-1]]
    assert reader.counts["nul"] == reader.counts["empty"] == 1
    with pytest.raises(SystemExit) as stop:
        part = prepare_data.Part(path + "x", "hub", None, 1, "")
        list(prepare_data.Reader([part], "text").read(0))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "the same command tries again" in error.splitlines()[-1]


@pytest.mark.parametrize("args, remedy", [
    (["shakespeare"], "files --input=PATH"),
    (["stdlib", "--tokenizer=gpt2"], "TIKTOKEN_CACHE_DIR"),
    (["tinystories"], "files --input=PATH"),
])
def test_no_network(tmp_path, args, remedy):
    env = {**os.environ, **OFFLINE, "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}
    run = start(*args, cwd=tmp_path, env=env)
    error = run.communicate(timeout=50)[1].strip().splitlines()
    assert run.returncode == 2 and len(error) == 1 and remedy in error[0]
    assert not (tmp_path / "data" / args[0]).exists()


# ---- misuse


@pytest.mark.parametrize("args, said", [
    ([], "no source given"),
    (["stdlbi"], "did you mean stdlib?"),
    (["stdlib", "--tokeniser=byte"], "did you mean --tokenizer?"),
    (["stdlib", "--tokenizer"], "--tokenizer=VALUE"),
    (["stdlib", "--tokenizer=gpt3"], "byte, gpt2 or bpe:N"),
    (["stdlib", "--tokenizer=bpe:70000"], "65536"),
    (["stdlib", "--tokenizer=bpe:256"], "257"),
    (["stdlib", "--max_tokens=many"], "not a whole number"),
    (["stdlib", "--max_tokens=0"], "above 0"),
    (["stdlib", "--workers=1", "--workers=2"], "given twice"),
    (["stdlib", "shakespeare"], "one source at a time"),
    (["stdlib", "--input=x"], "goes with files"),
    (["stdlib", "--shard_tokens=3_000_000_000"], "--shard_tokens"),
    (["files"], "--input=PATH"),
    (["files", "--input=nowhere/*.txt"], "no such file"),
    (["files", "--input=.", "--val_input=gone.txt"], "--val_input=gone.txt"),
    (["files", "--input=empty"], "no .txt or .jsonl"),
    (["files", "--input=table.parquet"], "cannot be read"),
    (["files", "--input=bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    (["files", "--input=list.jsonl"], "list.jsonl, line 1: no text in field text of list"),
    (["files", "--input=field.jsonl"], "field.jsonl, line 1: no text in field text of body, id"),
    (["files", "--input=cut.txt.gz"], "cut.txt.gz: damaged or cut short"),
    (["files", "--input=cut.txt.xz"], "cut.txt.xz: damaged or cut short"),
    (["files", "--input=not.txt.gz"], "not.txt.gz: damaged"),
    (["files", "--input=wide.txt"], "UTF-16"),
    (["files", "--input=a.txt", "--val_input=a.txt"], "keep splits apart"),
    (["files", "--input=nothing.txt"], "no text for train"),
    (["files", "--input=a.txt", "--val_input=nothing.txt"], "no text for val"),
    (["finewebedu10B", "--tokenizer=byte"], "published in gpt2"),
    (["finewebedu10B", "--shard_tokens=5"], "as published"),
])
def test_misuse(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    text = "a line of text\n" * 50
    files = {"a.txt": text.encode(), "table.parquet": b"PAR1", "nothing.txt": b"",
             "bad.jsonl": b'{"text": "fine"}\n{"text": "fi\n', "list.jsonl": b"[1, 2]\n",
             "field.jsonl": b'{"body": "x", "id": 3}\n', "wide.txt": text.encode("utf-16"),
             "cut.txt.gz": gzip.compress(os.urandom(5000))[:3000], "not.txt.gz": text.encode(),
             "cut.txt.xz": lzma.compress(os.urandom(5000))[:3000]}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    assert said in refused(capsys, *args)
    assert not re.search("meta.json|_[0-9]{6}.bin$", " ".join(map(str, tmp_path.rglob("*"))))


def test_too_little_text_for_a_bpe(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("abc " * 100)
    run = start("files", f"--input={tmp_path}/a.txt", f"--out={tmp_path / 'out'}",
                "--tokenizer=bpe:5000")
    error = run.communicate(timeout=30)[1]
    assert run.returncode == 2 and "use bpe:2" in error.splitlines()[-1]


def test_missing_library_is_named(tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError")
    run = start("stdlib", f"--out={tmp_path / 'out'}", "--tokenizer=bpe:400",
                env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "pip install tokenizers" in run.communicate(timeout=30)[1] and run.returncode == 2


@pytest.mark.parametrize("width", [1, 2])
def test_published_shards_get_the_meta_json_that_they_lack(width, tmp_path, monkeypatch, capsys):
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, 100, 0 if width == 2 else 1
    dtype = "<u2" if width == 2 else np.uint8
    path = tmp_path / "corpus_train.bin"
    path.write_bytes(header.tobytes() + np.arange(100).astype(dtype).tobytes())
    monkeypatch.setattr(prepare_data, "gpt2_tokenizer", lambda: prepare_data.bpe_tokenizer(
        "gpt2", {bytes([i]): i for i in range(256)}))
    prepare_data.main(["meta", str(tmp_path)])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["tokenizer"] == ("gpt2" if width == 2 else "byte")
    assert len(meta["byte_length"]) == meta["vocab_size"]
    assert meta["pattern"] == (prepare_data.GPT2_PATTERN if width == 2 else None)
