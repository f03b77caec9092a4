"""What tests of whole runs share: data, the command line in this process or in others, checkpoints.
"""
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_mdlm

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_mdlm.py"
SEQ_LEN, ROWS = 32, 8
TINY = (f"--seq_len={SEQ_LEN}", f"--batch_tokens={ROWS * SEQ_LEN}", f"--micro_batch={ROWS}",
        "--n_layer=1", "--n_head=2", "--n_embd=32", "--val_tokens=512", "--device=cpu",
        "--dtype=fp32", "--compile=0", "--log_every=1")
RATES = "lr embed_lr head_lr scalar_lr cond_lr".split()
FROZEN = tuple(f"--{name}=0" for name in RATES)
GENTLE = ("--optimizer=adamw", *(f"--{name}=0.001" for name in RATES))
CONSTANT_RATE = ("--cooldown=0", "--momentum_warmup=0")  # a step then does not depend on --steps
TORTURE = os.environ.get("TORTURE") == "1"  # pytest --torture: more of everything
LAUNCHED = []  # processes, so that none outlives a test that failed
LAUNCH_LIMIT = 600  # seconds, for a process that takes five on an idle machine

class Touch:
    """Pickled, it is code that makes a file when loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)

class Result(NamedTuple):
    status: int
    out: str
    err: str

def train(*flags, script=train_mdlm):
    """Run the command line of a training script in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main(list(map(str, flags))) or 0
        except SystemExit as e:
            status = e.code
        except ValueError as e:  # as the scripts do where they are run
            if type(e).__name__ != "UserError":
                raise
            status = 2
            print(f"{Path(script.__file__).name}: {' '.join(str(e).split())}", file=err)
    return Result(status, out.getvalue(), err.getvalue())

def tiny(*flags):
    """TINY with these flags, which win."""
    named = {x.partition("=")[0]: x for x in (*TINY, *map(str, flags))}
    return tuple(named.values())

def train_tiny(*flags, script=train_mdlm):
    return train(*tiny(*flags), script=script)

def launch(*command, **environment):
    """Start a process with one thread per rank; its output is read by `finish`."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    LAUNCHED.append(process)
    return process

def finish(process, before=""):
    out, err = process.communicate(timeout=LAUNCH_LIMIT)
    return Result(process.returncode, before + out, err)

def torchrun(*flags, script=SCRIPT, ranks=2, options=()):
    return launch("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                  *options, script, *flags)

def wait_for(process, pattern):
    """Read the output up to a line that matches."""
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"no {pattern!r} in:\n{seen}\n{process.stderr.read()}")

def checkpoint(folder, name="ckpt.pt"):
    """Of any script: they read all alike."""
    return train_mdlm.load_checkpoint(str(folder / name))

def log(folder):
    """The figures of every line of a log that has a loss or an evaluation, as printed, but for
    those of time."""
    text = (folder / "log.txt").read_text()
    lines = re.findall(r"^step:(\d+)/\d+ ((?:loss|val_).*)$", text, re.M)
    number = re.compile(r"(?<!\S)([\w/]+):([-+.\de]+|nan)(?!\S)")
    found = {}  # of a resumed run the last line of each step counts
    for step, line in lines:
        values = {k: float(v.partition("+-")[0]) for k, v in number.findall(line) if k != "tok/s"}
        found[step, "loss" in values] = {"step": int(step)} | values
    return list(found.values())

def presets(script):
    return sorted(p.stem for p in (ROOT / "presets" / script.OBJECTIVE).glob("*.txt"))

def evaluations(text):
    """[(bound, standard error, bits per byte), ..] as printed."""
    found = re.findall(r"val_n\w+:([\d.]+)\+-([\d.]+|nan) bpb:([\d.]+|nan)", text)
    return [tuple(float(x) for x in line) for line in found]

def tree(folder):
    """Every path under a folder with its content."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}

def write_shard(path, tokens, itemsize=1, stated=None):
    """A shard by the description of the format; stated=0 is what the published ones say."""
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, len(tokens), itemsize if stated is None else stated
    body = np.asarray(tokens).astype({1: np.uint8, 2: "<u2"}[itemsize])
    path.write_bytes(header.tobytes() + body.tobytes())

def write_meta(folder, table, **changes):
    """meta.json of tokens that stand for these bytes; token 0 is BOS."""
    meta = {"format": 1, "name": folder.name, "source": "test", "tokenizer": "bpe:test",
            "vocab_size": len(table), "bos_id": 0, "pattern": None,
            "token_bytes": [b.decode("latin-1") for b in table],
            "byte_length": [len(b) for b in table], "splits": {}, "shards": {}}
    (folder / "meta.json").write_text(json.dumps(meta | changes))

def byte_table(n):
    return [b""] + [bytes([i]) for i in range(1, n)]

def babble(n, seed=0):
    """n bytes of random words out of sixty."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(97, 123, rng.integers(2, 7)) for _ in range(60)]
    picked = [x for i in rng.integers(0, 60, n) for x in (*words[i], 32)]
    return np.array(picked[:n])

@contextlib.contextmanager
def keep_checkpoints(script, path):
    """Copies the first checkpoint of a run, which later ones replace."""
    save = script.save_checkpoint

    def save_and_keep(name, state):
        save(name, state)
        if not path.exists():
            save(path, state)

    script.save_checkpoint = save_and_keep
    try:
        yield
    finally:
        script.save_checkpoint = save

def make_data(folder):
    """Bytes, the training text in two shards."""
    text = babble(16_000)
    write_shard(folder / "train_000001.bin", text[:9000])
    write_shard(folder / "train_000002.bin", text[9000:14_000])
    write_shard(folder / "val_000000.bin", text[14_000:])
    write_shard(folder / "test_000000.bin", babble(2000, seed=1))
    write_meta(folder, byte_table(256), tokenizer="byte")
    return folder

def children(parent):
    """Process numbers, from Linux's /proc: the field behind name and state is the parent's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found

def kill(process):
    """And all its children, at once."""
    for number in (process.pid, *children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """An end to the processes that are left over."""
    yield
    for process in LAUNCHED:
        if process.poll() is None:
            kill(process)
            process.wait()

def flat(state):
    """Nested dicts and lists of a checkpoint -> {path: leaf}."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {f"{k}.{name}".rstrip("."): x for k, v in items for name, x in flat(v).items()}
    return {"": state}

def assert_same_state(a, b):
    """All of two checkpoints but the flags and the clock."""
    a, b = ({k: v for k, v in flat(x).items() if k.split(".")[0] != "config" and "seconds" not in k}
            for x in (a, b))
    assert a.keys() == b.keys()
    for name, x in a.items():
        same = torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
        assert same, name

def assert_same_log(a, b):
    """The figures of two logs, but for the last of the digits printed."""
    for x, y in zip(log(a), log(b), strict=True):
        assert x.pop("grad_norm", 0) == pytest.approx(y.pop("grad_norm", 0), rel=2e-3)
        assert x == pytest.approx(y, rel=1e-4)

def assert_refused(result, *words):
    assert result.status == 2, result
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for word in words:
        assert word in result.err, result.err
