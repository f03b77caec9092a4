"""The artifact: what fp8 does to weights, files that come back, files that are refused."""
import dataclasses
import json
import lzma
import struct
import types
import zlib

import pytest
import runs
import torch
from runs import make_data, one_thread  # noqa: F401

import sample
from study import golf

SCRIPTS = {name: sample.load_script(runs.ROOT / f"{name}.py") for name in sample.SCRIPTS}

def make_checkpoint(path, name, **settings):
    """A checkpoint of a small network, none of whose weights are zero -> what is in it."""
    module = SCRIPTS[name]
    cfg = module.Config(**{"vocab_size": 256, "seq_len": 32, "n_layer": 2, "n_head": 2,
                           "n_embd": 32, "val_tokens": 512, "dtype": "fp32", **settings})
    torch.manual_seed(0)
    model = module.Model(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    meta = {"tokenizer": "byte", "vocab_size": 256, "bos_id": 0, "pattern": None,
            "token_bytes": [bytes([i] if i else []).decode("latin-1") for i in range(256)],
            "byte_length": [0] + 255 * [1]}
    ckpt = {"format": 3, "script": name, "config": dataclasses.asdict(cfg),
            "meta": meta, "model": model.state_dict(), "ema": None, "optimizers": [], "step": 7}
    module.save_checkpoint(str(path), ckpt)
    return ckpt

def call(*flags, main=golf.main):
    return runs.train(*flags, script=types.SimpleNamespace(main=main))

def test_fp8_is_the_format_and_rows_are_scaled():
    """Every finite value by the definition: 4 bits of exponent with bias 7, 3 of mantissa."""
    codes = [code for code in range(256) if code & 127 != 127]
    table = [(1 - 2 * (c >> 7)) * ((1 + c % 8 / 8) * 2.0 ** ((c >> 3 & 15) - 7) if c >> 3 & 15
                                   else c % 8 / 8 * 2.0**-6) for c in codes]
    fp8 = torch.tensor(codes, dtype=torch.uint8).view(-1, 1).view(torch.float8_e4m3fn)
    zero = torch.zeros(len(codes), dtype=torch.int32)
    assert golf.from_fp8(fp8, zero)[:, 0].tolist() == table
    assert golf.to_fp8(torch.tensor([[1e9, -449.0]]), zero[:1]).float().tolist() == [[448, -448]]
    x = torch.randn(50, 300) * torch.logspace(-8, 3, 50)[:, None]
    x[3] = 0
    e = golf.row_exponents(x, "row")
    top = torch.ldexp(x, -e[:, None]).abs().amax(1)
    assert ((top > 224) & (top <= 448))[x.any(1)].all()
    error = (golf.from_fp8(golf.to_fp8(x, e), e) - x).abs()
    assert (error <= x.abs() / 16 + torch.exp2(e - 10.0)[:, None]).all()
    assert golf.to_fp8(x[:1], golf.row_exponents(x[:1], "none")).float().count_nonzero() == 0

@pytest.mark.parametrize("name", SCRIPTS)
def test_round_trip(name, tmp_path):
    """What is read is what was written, for every script, and the figures are of what is read."""
    data, path = make_data(tmp_path), tmp_path / "ckpt.golf"
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", name)
    done = call(f"--pack={tmp_path / 'ckpt.pt'}", f"--data={data}")
    assert done.status == 0, done.err
    assert golf.is_artifact(path) and not golf.is_artifact(tmp_path / "ckpt.pt")
    back = golf.read(path)
    assert all(back[key] == ckpt[key] for key in golf.KEPT) and back["ema"] is None
    again = golf.decode(golf.encode(back))["model"]
    assert again.keys() == ckpt["model"].keys()
    for key, x in again.items():  # nothing is lost twice
        assert torch.equal(x, back["model"][key])
        assert (x - ckpt["model"][key]).norm() < 0.04 * ckpt["model"][key].norm() + 1e-3
    old = golf.encode(back | {"config": back["config"] | {"gone": 1}})  # a setting of other days
    (tmp_path / "old").write_bytes(golf.compress(old)["lzma"])
    assert golf.read(tmp_path / "old")["config"] == ckpt["config"]
    SCRIPTS[name].save_checkpoint(str(tmp_path / "back.pt"), back)  # the weights in float32
    alone = call(f"--eval={path}", f"--data={data}").out
    pair = call(f"--eval={path}", f"--against={tmp_path / 'back.pt'}", f"--data={data}").out
    assert alone.strip() in done.out and alone.strip() in pair
    assert "difference: +0.00000+-0.00000" in pair and "+0.00000+-0.00000" not in done.out

def test_the_average_is_packed_and_the_limit_holds(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", "gpt", data=str(make_data(tmp_path)))
    ckpt["ema"] = {name: 2 * x for name, x in ckpt["model"].items()}
    SCRIPTS["gpt"].save_checkpoint(str(tmp_path / "ckpt.pt"), ckpt)
    flags = f"--pack={tmp_path}", f"--out={tmp_path / 'a'}"
    done = call(*flags, "--limit=60_000")
    assert done.status == 2 and "--limit=60000" in done.err and not (tmp_path / "a").exists()
    assert call(*flags, "--scale=none").status == 0
    for name, x in golf.read(tmp_path / "a")["model"].items():
        assert torch.allclose(x, ckpt["ema"][name], rtol=0.07, atol=2e-3)

def damaged(raw):
    """[(part of the message, file)], one fault each."""
    size, = struct.unpack_from("<I", raw)
    head, payload = json.loads(raw[4:4 + size]), raw[4 + size:]
    config, (first, *rest) = head["config"], head["tensors"]

    def file(**changes):
        text = json.dumps(head | changes).encode()
        return golf.compress(struct.pack("<I", len(text)) + text + payload)["zlib"]

    good, bomb = file(), bytes(golf.MAX_INFLATION * golf.LIMIT + 1)
    yield from (("bad.golf: ", good[:cut]) for cut in (0, 5, 16, 40, 9999, len(good) - 1))
    yield "behind its end", good + b"x"
    yield "checksum", file(sha256="0")
    yield "more than", golf.MAGIC + b"z" + zlib.compress(bomb)
    yield "more than", golf.MAGIC + b"x" + lzma.compress(bomb)
    yield "a header of", golf.compress(b"\xff" * 99)["lzma"]
    yield "RecursionError", golf.compress(struct.pack("<I", 10**6) + 10**6 * b"[")["lzma"]
    yield "KeyError", golf.compress(struct.pack("<I", 2) + b"{}")["lzma"]
    yield "not of the shape", file(tensors=[["emb", first[1]], *rest])
    yield "not of the shape", file(config=config | {"n_embd": 64})
    yield "n_layer", file(config=config | {"n_layer": 10**9})
    yield "no sense", file(tensors=[[first[0], [-1, -1]], *rest])
    yield "bytes of weights", file(tensors=rest)

def test_what_is_no_artifact_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(golf, "LIMIT", 10**6)
    raw = golf.encode(make_checkpoint(tmp_path / "ckpt.pt", "train_mdlm"))
    for expected, data in damaged(raw):
        (tmp_path / "bad.golf").write_bytes(data)
        done = call(f"--eval={tmp_path / 'bad.golf'}")
        assert done.status == 2 and done.err.count("\n") == 1
        assert "bad.golf: " in done.err and expected in done.err, done.err
    for flags in ((), ("--pack=a", "--eval=b"), ("--pak=a",), ("--pack=a", "--limit=x")):
        assert call(*flags).status == 2
