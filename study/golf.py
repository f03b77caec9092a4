"""A checkpoint as a small file: fp8 weights, compressed, and what that costs in nats.

    python study/golf.py --pack=out/train_mdlm --out=small.golf      # sample.py --ckpt=small.golf
    python study/golf.py --eval=small.golf [--against=out/train_mdlm]

Matrices become float8_e4m3fn with a power of two for every row, so that its largest number is at
most 448 and scaling is exact; --scale=tensor takes one for the whole matrix, none no scale at all.
Without one, weights below 2^-6 lose digits and those below 2^-10 all of them. Vectors become fp16.
The averaged weights are packed where there are any. Other flags:

    --script=FORK.py      the script that wrote the checkpoint, if that is an edited one
    --limit=16_000_000    bytes that file and code (the script and muon.py) stay below
    --data, --val_tokens, --val_draws    of the bound; the run's own by default
    --device              auto (default), cpu, cuda or mps

The file: magic, compression (z: zlib, x: lzma), then compressed: uint32 length of a JSON header,
the header, all fp8 bytes, an int8 exponent for each row, all fp16 numbers, in the model's order.
Reading unpacks nothing beyond a bound, checks every shape against the model and runs no code.
"""
import argparse
import dataclasses
import hashlib
import json
import lzma
import math
import os
import re
import struct
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402

MAGIC = b"nanodlm-golf-1\n"
LIMIT = 16_000_000  # bytes, of the artifacts of the parameter golf
MAX_INFLATION = 8  # unpacked bytes, by those of the limit or of the file, whichever is larger
MAX_HEADER = 2**24  # bytes of JSON
FP8_MAX, FP8_MIN_NORMAL = 448.0, 2.0**-6
MIN_EXPONENT = -100  # far from where float32 ends
KEPT = ("format", "script", "config", "meta", "step")  # of a checkpoint, as they are

class UserError(ValueError):
    """A user's mistake, in one line that names the flag or file and the remedy."""

def require(condition, message):
    if not condition:
        raise UserError(message)

class Parser(argparse.ArgumentParser):
    """A mistake is one line, help is the docstring."""
    def error(self, message):
        print(f"{self.prog}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self):
        return self.description

def run_cli(program, main, argv, doc, **defaults):
    """Call main(flags): --name=value, typed as the defaults are, and files; -o is --out."""
    parser = Parser(program, description=doc, allow_abbrev=False)
    parser.add_argument("files", nargs="*")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", *["-o"] * (name == "out"), default=value, type=type(value))
    try:
        main(parser.parse_args(argv))
    except (OSError, ValueError) as e:
        parser.error(str(e))

# ----------------------------------------------------------------------------- fp8
def row_exponents(x, scale):
    """x (R, C) -> (R,) int32: x / 2^exponent fits into fp8, the largest number closely."""
    if scale == "none":
        return torch.zeros(len(x), dtype=torch.int32)
    amax = x.abs().amax(1)
    mantissa, exponent = torch.frexp(amax if scale == "row" else amax.max().expand(len(x)))
    exponent = exponent - torch.where(mantissa <= FP8_MAX / 512, 9, 8)  # 448 is .875 of 2^9
    return torch.where(mantissa == 0, 0, exponent).clamp(MIN_EXPONENT, 127).int()

def to_fp8(x, exponents):
    """(R, C) float32 -> (R, C) float8_e4m3fn. Clamped, since a cast may overflow into NaN."""
    x = torch.ldexp(x, -exponents[:, None])
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)

def from_fp8(x, exponents):
    return torch.ldexp(x.float(), exponents[:, None])

# ----------------------------------------------------------------------------- files
def encode(ckpt, scale="row"):
    """A checkpoint -> the bytes of an artifact before compression."""
    weights = ckpt["ema"] or ckpt["model"]
    fp8, exponents, fp16 = bytearray(), bytearray(), bytearray()
    for name, x in weights.items():
        require(x.is_floating_point(), f"{name}: {x.dtype} cannot be packed")
        x = x.detach().cpu().float()
        if x.ndim < 2:
            fp16 += x.half().numpy().tobytes()
            require(x.half().isfinite().all(), f"{name}: numbers too large for fp16")
        else:
            e = row_exponents(x.flatten(1), scale)
            fp8 += to_fp8(x.flatten(1), e).view(torch.uint8).numpy().tobytes()
            exponents += e.to(torch.int8).numpy().tobytes()
    payload, tensors = bytes(fp8 + exponents + fp16), [[k, [*x.shape]] for k, x in weights.items()]
    head = {key: ckpt[key] for key in KEPT} | dict(
        weights="ema" if ckpt["ema"] else "raw", scale=scale, tensors=tensors,
        sha256=hashlib.sha256(payload).hexdigest())
    head = json.dumps(head).encode()
    require(len(head) <= MAX_HEADER, f"{len(head)} bytes of settings and tokens, over {MAX_HEADER}")
    return struct.pack("<I", len(head)) + head + payload

def compress(raw):
    """-> {codec: the whole file}"""
    lz = lzma.compress(raw, lzma.FORMAT_XZ, preset=6)
    return {"zlib": MAGIC + b"z" + zlib.compress(raw, 9), "lzma": MAGIC + b"x" + lz}

def decompress(data, bound):
    """The bytes of a file -> what is in it, at most `bound` bytes."""
    data, codec = data[len(MAGIC) + 1:], data[len(MAGIC):len(MAGIC) + 1]
    require(codec in (b"z", b"x"), "unknown compression")
    machine = zlib.decompressobj() if codec == b"z" else lzma.LZMADecompressor(
        lzma.FORMAT_XZ, memlimit=2**28)
    raw = machine.decompress(data, bound + 1)
    require(len(raw) <= bound, f"more than {bound} bytes in it")
    require(machine.eof and not machine.unused_data, "cut short, or with something behind its end")
    return raw

def decode(raw):
    """The inverse of encode -> a checkpoint, its weights in float32."""
    size, = struct.unpack_from("<I", raw)
    require(size <= MAX_HEADER, f"a header of {size} bytes")
    head, payload = json.loads(raw[4:4 + size]), raw[4 + size:]
    is_whole = hashlib.sha256(payload).hexdigest() == head["sha256"]
    require(is_whole, "damaged: its checksum is another one")
    shapes = {str(name): tuple(shape) for name, shape in head["tensors"]}
    is_sane = all(type(n) is int and n > 0 for shape in shapes.values() for n in shape)
    require(is_sane and len(shapes) == len(head["tensors"]), "its shapes make no sense")
    matrices = [shape for shape in shapes.values() if len(shape) > 1]
    n_small = sum(math.prod(shape) for shape in shapes.values() if len(shape) < 2)
    sizes = [sum(map(math.prod, matrices)), sum(shape[0] for shape in matrices), 2 * n_small]
    require(sum(sizes) == len(payload), f"{len(payload)} bytes for {sum(sizes)} bytes of weights")
    fp8, exponents, fp16 = torch.frombuffer(bytearray(payload), dtype=torch.uint8).split(sizes)
    fp8, exponents = fp8.view(torch.float8_e4m3fn), exponents.view(torch.int8).int()
    fp16, model = fp16.clone().view(torch.float16), {}
    for name, shape in shapes.items():
        n = math.prod(shape)
        if len(shape) < 2:
            x, fp16 = fp16[:n].float(), fp16[n:]
        else:
            x = from_fp8(fp8[:n].view(shape[0], -1), exponents[:shape[0]])
            fp8, exponents = fp8[n:], exponents[shape[0]:]
        model[name] = x.view(shape)
    return {key: head[key] for key in KEPT} | dict(model=model, ema=None, scale=head["scale"])

def check_shapes(ckpt, module):
    """Refuse weights that the model of these settings does not have, before it takes memory.
    Settings that the script has no longer, which did not make the model, are left out."""
    fields = {field.name for field in dataclasses.fields(module.Config)}
    ckpt["config"] = {k: v for k, v in ckpt["config"].items() if k in fields}
    cfg = module.Config(**ckpt["config"])
    require(0 < cfg.n_layer <= len(ckpt["model"]), f"n_layer={cfg.n_layer}")
    with torch.device("meta"):
        expected = {name: x.shape for name, x in module.Model(cfg).state_dict().items()}
    for name in expected.keys() | ckpt["model"].keys():
        there, here = ckpt["model"].get(name), expected.get(name)
        fits = there is not None and there.shape == here
        require(fits, f"{name} is not of the shape {here and tuple(here)}")

def is_artifact(path):
    """Does a file begin as an artifact does?"""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return f.read(len(MAGIC)) == MAGIC

def read(path, script=None):
    """An artifact -> a checkpoint as load_checkpoint gives it, without average and optimizers.

    script: the file that wrote it, if it is not one of the repository. UserError names the file in
    whatever is wrong with it."""
    try:
        require(is_artifact(path), "not an artifact of study/golf.py")
        data = Path(path).read_bytes()
        ckpt = decode(decompress(data, MAX_INFLATION * max(LIMIT, len(data))))
        if script or ckpt["script"] in sample.SCRIPTS:
            check_shapes(ckpt, sample.load_script(script or ROOT / f"{ckpt['script']}.py"))
        return ckpt
    except Exception as e:  # a file may hold anything
        line = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{path}: {line}") from None

# ----------------------------------------------------------------------------- figures
def print_errors(weights, scale):
    """A table of what rounding does to each kind of matrix."""
    groups = defaultdict(list)
    for name, x in weights.items():
        if x.ndim > 1:
            x = x.cpu().float().flatten(1)
            exponents = row_exponents(x, scale)
            code = to_fp8(x, exponents)
            kind = re.sub(r"layers\.\d+\.|\.weight$", "", name)
            groups[kind].append([y.flatten() for y in (x, from_fp8(code, exponents), code.float())])
    print("          weights rms error   largest  to zero subnormal")
    for kind, parts in groups.items():
        x, y, code = map(torch.cat, zip(*parts, strict=True))
        error = ((x - y).norm() / x.norm().clamp(min=1e-30)).item()
        flushed = ((x != 0) & (code == 0)).double().mean()
        small = ((code != 0) & (code.abs() < FP8_MIN_NORMAL)).double().mean()
        print(f"{kind:6} {len(x):10,} {error:9.2%} {x.abs().max():9.3g} {flushed:8.3%} "
              f"{small:9.3%}")

def bound(ckpt, module, flags):
    """-> (line, nats per token of every window), by the script's own evaluation."""
    given = dict(data=flags.data, val_tokens=flags.val_tokens, val_draws=flags.val_draws)
    model, cfg = sample.build_model(module, ckpt)
    cfg = dataclasses.replace(cfg, eval_only=True, **{k: v for k, v in given.items() if v})
    _, val, meta = module.open_data(cfg, ckpt)
    device, dtype = module.pick_device(flags.device, cfg.dtype, 0)
    model.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        line, nats = module.evaluate(
            lambda x0, noise: module.nelbo_fn(model, x0, noise, cfg), cfg, val,
            torch.tensor(meta["byte_length"]), device, 0, 1)
    line += f" draws:{cfg.val_draws} {str(dtype)[6:]} on {device.type}"
    return line, nats / (cfg.seq_len - cfg.prompt_len)

def print_bounds(artifact, ckpt, module, flags):
    """The bound of an artifact, and how far it is from the checkpoint's on the same noise."""
    line, after = bound(artifact, module, flags)
    if not ckpt:
        print(line)
        return
    first, before = bound(ckpt, module, flags)
    pairs = (after - before).view(-1, 2).mean(1)
    print(f"before: {first}\nafter:  {line}\ndifference: {pairs.mean():+.5f}+-"
          f"{pairs.std() / len(pairs) ** 0.5:.5f} nats per token, same windows and noise")

def open_checkpoint(name, script=None):
    """-> (its path, what is in it, the module of the script that wrote it)"""
    path = sample.find_checkpoint(name)
    ckpt = sample.load_script(ROOT / "train_mdlm.py").load_checkpoint(path)
    script = Path(script or ROOT / f"{ckpt['script']}.py")
    fits = script.is_file() and script.stem == ckpt["script"]
    require(fits, f"{path}: written by {ckpt['script']}.py: pass it as --script=FILE")
    return path, ckpt, sample.load_script(script)

def pack(flags):
    path, ckpt, module = open_checkpoint(flags.pack, flags.script)
    require(flags.scale in ("row", "tensor", "none"), f"--scale={flags.scale}: row, tensor or none")
    out = Path(flags.out or path.with_suffix(".golf"))
    raw = encode(ckpt, flags.scale)
    files = compress(raw)
    sizes = {codec: len(data) for codec, data in files.items()}
    code = sum(os.path.getsize(p) for p in (module.__file__, ROOT / "muon.py"))
    best = min(sizes, key=sizes.get)
    total, n = sizes[best] + code, sum(x.numel() for x in ckpt["model"].values())
    print(f"{path}: {'average' if ckpt['ema'] else 'last weights'} of step {ckpt['step']}, {n:,} "
          f"numbers\nbytes: raw {len(raw):,}, " + ", ".join(f"{c} {s:,}" for c, s in sizes.items())
          + f", code {code:,}, total {total:,}, {flags.limit - total:,} below the limit; "
          f"{8 * sizes[best] / n:.2f} bits per number")
    require(total < flags.limit, f"{total:,} bytes: --limit={flags.limit} asks for fewer")
    out.write_bytes(files[best])
    artifact = read(out, flags.script)
    print_errors(ckpt["ema"] or ckpt["model"], flags.scale)
    print(f"{out}: written, sha256 {hashlib.sha256(files[best]).hexdigest()}")
    return artifact, ckpt, module

@torch.no_grad()
def pack_or_evaluate(flags):
    require(bool(flags.pack) != bool(flags.eval), "one of --pack=CKPT and --eval=FILE")
    if flags.pack:
        artifact, ckpt, module = pack(flags)
    else:
        artifact = read(flags.eval, flags.script)
        module = sample.load_script(flags.script or ROOT / f"{artifact['script']}.py")
        ckpt = flags.against and open_checkpoint(flags.against, flags.script)[1]
    print_bounds(artifact, ckpt, module, flags)

def main(argv):
    run_cli("golf.py", pack_or_evaluate, argv, __doc__, pack="", eval="", against="", script="",
            out="", scale="row", limit=LIMIT, data="", val_tokens=0, val_draws=0, device="auto")

if __name__ == "__main__":
    main(sys.argv[1:])
