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


def make_checkpoint(path, name, scale=0.3, **settings):
    """A checkpoint of a small network, none of whose weights are zero -> what is in it."""
    module = SCRIPTS[name]
    cfg = module.Config(**{"vocab_size": 256, "seq_len": 32, "n_layer": 2, "n_head": 2,
                           "n_embd": 32, "val_tokens": 512, "dtype": "fp32", **settings})
    torch.manual_seed(0)
    model = module.Model(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=scale)
    meta = {"tokenizer": "byte", "vocab_size": 256, "bos_id": 0, "pattern": None,
            "token_bytes": [bytes([i] if i else []).decode("latin-1") for i in range(256)],
            "byte_length": [0] + 255 * [1]}
    ckpt = {"format": module.CKPT_FORMAT, "script": name, "config": dataclasses.asdict(cfg),
            "meta": meta, "model": model.state_dict(), "ema": None, "optimizers": [], "step": 7}
    module.save_checkpoint(str(path), ckpt)
    return ckpt


def call(*flags):
    return runs.train(*flags, script=types.SimpleNamespace(main=golf.main))


def test_fp8_is_the_format():
    """Every finite value by the definition: 4 bits of exponent with bias 7, 3 of mantissa."""
    table = []
    for code in range(256):
        e, m = code >> 3 & 15, code & 7
        value = (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
        table.append(-value if code & 128 else value)
    finite = [code for code in range(256) if code & 127 != 127]
    codes = torch.tensor(finite, dtype=torch.uint8).view(-1, 1).view(torch.float8_e4m3fn)
    zero = torch.zeros(len(finite), dtype=torch.int32)
    assert golf.from_fp8(codes, zero)[:, 0].tolist() == [table[code] for code in finite]
    assert golf.to_fp8(torch.tensor([[1e9, -449.0]]), zero[:1]).float().tolist() == [[448, -448]]


def test_rows_are_scaled_so_that_small_weights_survive():
    x = torch.randn(50, 300) * torch.logspace(-8, 3, 50)[:, None]
    x[3] = 0
    e = golf.row_exponents(x, "row")
    top = torch.ldexp(x, -e[:, None]).abs().amax(1)
    assert ((top > 224) & (top <= 448))[x.any(1)].all()
    error = (golf.from_fp8(golf.to_fp8(x, e), e) - x).abs()
    assert (error <= x.abs() / 16 + torch.exp2(e - 10.0)[:, None]).all()
    e = golf.row_exponents(1e-4 * x[-1:], "none")
    assert golf.from_fp8(golf.to_fp8(1e-4 * x[:1], e), e).count_nonzero() == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_round_trip(name, tmp_path):
    """What is read is what was written, for every script, and the figures are of what is read."""
    data = make_data(tmp_path)
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", name)
    done = call(f"--pack={tmp_path / 'ckpt.pt'}", f"--data={data}")
    assert done.status == 0, done.err
    path = tmp_path / "ckpt.golf"
    assert golf.is_artifact(path) and not golf.is_artifact(tmp_path / "ckpt.pt")
    back = golf.read(path)
    assert all(back[key] == ckpt[key] for key in golf.KEPT) and back["ema"] is None
    assert golf.decode(golf.encode(back))["model"].keys() == ckpt["model"].keys()
    for name, x in golf.decode(golf.encode(back))["model"].items():  # nothing is lost twice
        assert torch.equal(x, back["model"][name])
        assert (x - ckpt["model"][name]).norm() < 0.04 * ckpt["model"][name].norm() + 1e-3
    back["optimizers"] = []
    script = SCRIPTS[ckpt["script"]]
    script.save_checkpoint(str(tmp_path / "back.pt"), back)  # the weights in float32
    lines = [call(f"--eval={path}", f"--data={data}").out,
             call(f"--eval={path}", f"--against={tmp_path / 'back.pt'}", f"--data={data}").out]
    assert lines[0].strip() in done.out and lines[0].strip() in lines[1]
    assert "difference: +0.00000+-0.00000" in lines[1]
    assert "difference: +0.00000+-0.00000" not in done.out


def test_the_average_is_packed_and_the_limit_holds(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", "gpt")
    ckpt["ema"] = {name: 2 * x for name, x in ckpt["model"].items()}
    SCRIPTS["gpt"].save_checkpoint(str(tmp_path / "ckpt.pt"), ckpt)
    flags = f"--pack={tmp_path}", f"--out={tmp_path / 'a'}"
    done = call(*flags, "--limit=60000")
    assert done.status == 2 and "--limit=60000" in done.err and not (tmp_path / "a").exists()
    assert call(*flags, "--scale=none").status == 0
    name = "layers.0.q.weight"
    assert torch.allclose(golf.read(tmp_path / "a")["model"][name], ckpt["ema"][name], rtol=0.07,
                          atol=2e-3)


def damaged(raw):
    """[(what is wrong, file)], one fault each."""
    size, = struct.unpack_from("<I", raw)
    head, payload = json.loads(raw[4:4 + size]), raw[4 + size:]

    def file(raw, **changes):
        if changes:
            text = json.dumps(head | changes).encode()
            raw = struct.pack("<I", len(text)) + text + payload
        return golf.compress(raw)["zlib"]

    good, tensors = file(raw), head["tensors"]
    renamed = [[name.replace("up", "top"), shape] for name, shape in tensors]
    huge = head["config"] | {"n_layer": 10**9}
    bomb = bytes(golf.MAX_INFLATION * golf.LIMIT + 1)
    yield "not an artifact", b"", "empty"
    for cut in (5, 16, 40, len(good) // 2, len(good) - 1):
        yield "", good[:cut], cut
    yield "behind its end", good + b"x", "tail"
    yield "checksum", file(raw[:-1] + bytes([raw[-1] ^ 1])), "flip"
    yield "more than", golf.MAGIC + b"z" + zlib.compress(bomb), "zlib bomb"
    yield "more than", golf.MAGIC + b"x" + lzma.compress(bomb), "lzma bomb"
    yield "a header of", file(struct.pack("<I", 2**32 - 1) + raw[4:]), "header"
    yield "RecursionError", file(struct.pack("<I", 10**6) + 10**6 * b"["), "deep"
    yield "KeyError", file(struct.pack("<I", 2) + b"{}"), "keys"
    yield "not of the shape", file(raw, tensors=renamed), "renamed"
    yield "not of the shape", file(raw, config=head["config"] | {"n_embd": 64}), "width"
    yield "n_layer", file(raw, config=huge), "layers"
    yield "no sense", file(raw, tensors=[[tensors[0][0], [-1, -1]], *tensors[1:]]), "negative"
    yield "bytes of weights", file(raw, tensors=tensors[1:]), "fewer"


def test_what_is_no_artifact_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(golf, "LIMIT", 10**6)
    raw = golf.encode(make_checkpoint(tmp_path / "ckpt.pt", "train_mdlm"))
    for expected, data, what in damaged(raw):
        path = tmp_path / "bad.golf"
        path.write_bytes(data)
        done = call(f"--eval={path}")
        assert done.status == 2 and done.err.count("\n") == 1, what
        assert "bad.golf: " in done.err and expected in done.err, (what, done.err)
    for flags in ((), ("--pack=a", "--eval=b"), ("--pak=a",), (f"--eval={tmp_path / 'no'}",),
                  ("--pack=a", "--limit=x")):
        assert call(*flags).status == 2
