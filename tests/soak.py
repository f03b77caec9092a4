"""Run a training script for an hour and see whether its memory or its open files grow.

    python prepare_data.py stdlib
    python tests/soak.py --minutes=60                                    # train_mdlm, preset tiny
    python tests/soak.py --minutes=3 --script=gpt.py --preset=tiny --compile=0

--every=10 are the seconds between samples; all other flags go to the script. Evaluation and
checkpoints come often, so that what they might keep shows. Counted are the resident memory (VmRSS)
and the open files of the process and all its descendants; the slopes are least squares over the
second half, when everything is warm. Exit status 1 where something grows.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFTEN = ("--steps=100000000", "--eval_every=50", "--ckpt_every=25", "--val_tokens=4096")
# Growth over the second half that is not noise: beyond these, and beyond three standard errors.
LEAST = {"memory": 4.0, "handles": 2.0}  # MiB; open files
STOP_SECONDS = 120  # for the last checkpoint


def slope(seconds, values):
    """Least squares -> (units per hour, standard error); the error takes samples as independent,
    so it is too small where they wander slowly."""
    n, hours = len(seconds), [s / 3600 for s in seconds]
    x, y = sum(hours) / n, sum(values) / n
    spread = sum((h - x) ** 2 for h in hours)
    rate = sum((h - x) * (v - y) for h, v in zip(hours, values, strict=True)) / spread
    rest = sum((v - y - rate * (h - x)) ** 2 for h, v in zip(hours, values, strict=True))
    return rate, (rest / (n - 2) / spread) ** 0.5


@dataclass
class Soaked:
    """Samples of a run, and what it left."""
    seconds: list = field(default_factory=list)
    memory: list = field(default_factory=list)  # MiB
    handles: list = field(default_factory=list)
    checkpoints: int = 0
    status: int = 0
    lines: int = 0  # of log.jsonl
    log_bytes: int = 0  # of log.txt and log.jsonl
    err: str = ""

    def second_half(self, name):
        half = len(self.seconds) // 2
        return self.seconds[half:], getattr(self, name)[half:]

    def grows(self, name):
        seconds, values = self.second_half(name)
        rate, se = slope(seconds, values)
        hours = (seconds[-1] - seconds[0]) / 3600
        return rate > 3 * se and rate * hours > LEAST[name]


def family(pid):
    """A process and its descendants, from Linux's /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def usage(pid):
    """(MiB, open files) of a process and its descendants."""
    memory = handles = 0
    for one in family(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
            handles += len(os.listdir(f"/proc/{one}/fd"))
        except OSError:
            continue
        memory += sum(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS"))
    return memory / 1024, handles


def soak(script, flags, seconds, every, checkpoints=2):
    """Run a script for that long with samples taken, until there are so many checkpoints at least
    -> Soaked. flags must name --out."""
    out = Path(next(x.partition("=")[2] for x in flags if x.startswith("--out=")))
    found, written = Soaked(), None
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, str(script), *map(str, flags)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=err)
        try:
            while not (out / "ckpt.pt").exists() and process.poll() is None:
                time.sleep(0.1)
            start = time.monotonic()
            while process.poll() is None and (time.monotonic() < start + seconds
                                              or found.checkpoints < checkpoints):
                memory, handles = usage(process.pid)
                found.seconds.append(time.monotonic() - start)
                found.memory.append(memory)
                found.handles.append(handles)
                stat = (out / "ckpt.pt").stat()
                found.checkpoints += stat.st_ino != written
                written = stat.st_ino
                time.sleep(every)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            found.status = process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()
        err.seek(0)
        found.err = err.read()
    if (out / "log.jsonl").exists():
        records = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
        found.lines = len(records)
        found.log_bytes = sum((out / x).stat().st_size for x in ("log.txt", "log.jsonl"))
        steps = [x["step"] for x in records]
        assert steps == sorted(steps), "log.jsonl is not in order"
    return found


def main(argv):
    given = {x.partition("=")[0]: x for x in argv}
    minutes, every, script = (given.pop(f"--{name}", f"={default}").partition("=")[2]
                              for name, default in (("minutes", 60), ("every", 10),
                                                    ("script", "train_mdlm.py")))
    for name, value in (("minutes", minutes), ("every", every)):
        if not re.fullmatch(r"\d+(\.\d+)?", value) or not float(value):
            print(f"soak.py: --{name}={value}: a number above 0 expected", file=sys.stderr)
            return 2
    if not (ROOT / script).is_file():
        print(f"soak.py: --script={script}: no such file", file=sys.stderr)
        return 2
    if not {"--preset", "--n_embd"} & given.keys():
        given["--preset"] = "--preset=tiny"
    named = {x.partition("=")[0]: x for x in OFTEN} | given
    with tempfile.TemporaryDirectory() as folder:
        named.setdefault("--out", f"--out={folder}/run")
        found = soak(ROOT / script, list(named.values()), 60 * float(minutes), float(every))
    if found.status or len(found.seconds) < 8:
        print(f"{script}: status {found.status} after {len(found.seconds)} samples\n{found.err}",
              file=sys.stderr)
        return 2
    print(f"{script}: {found.seconds[-1] / 60:.1f} minutes, {len(found.seconds)} samples, at least "
          f"{found.checkpoints} checkpoints; log.jsonl {found.lines} lines, both logs "
          f"{found.log_bytes / 1024:.0f} KiB")
    status = 0
    for name, unit in (("memory", "MiB"), ("handles", "files")):
        series, (rate, se) = getattr(found, name), slope(*found.second_half(name))
        grows = found.grows(name)
        status |= grows
        print(f"{name}: {series[0]:.1f} {unit} at the start, {series[-1]:.1f} at the end, slope of "
              f"the second half {rate:+.2f} +- {se:.2f} {unit} an hour: "
              + ("it grows" if grows else "no growth"))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
