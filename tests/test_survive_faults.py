"""Faults in mid-run: numbers that are not finite, disks that fill up or go away, two runs in one
folder, and memory or handles that grow.

Most faults are planted into a real run in this process, by the loss that it computes; the tmpfs
that fills up is a real one, for which the test must be allowed to mount.
"""
import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import soak
import torch
from runs import (
    LAUNCH_LIMIT,
    LAUNCHED,
    ROOT,
    TORTURE,
    assert_refused,
    assert_same_state,
    checkpoint,
    children,
    finish,
    flat,
    launch,
    log,
    make_data,
    tiny,
    torchrun,
    train,
    tree,
    wait_for,
)
from runs import one_thread as one_thread  # a fixture

import gpt
import train_block
import train_mdlm
import train_sedd

SCRIPTS = {s.SCRIPT: s for s in (train_mdlm, gpt, train_block, train_sedd)}
each_script = pytest.mark.parametrize("name", SCRIPTS)
# Where nothing but the shared text is tested.
some_scripts = pytest.mark.parametrize("name", SCRIPTS if TORTURE else ["train_mdlm"])
STEPS = 6
FAULT = 3  # the step that it comes in; there is a checkpoint of the one before
RUN = tiny(f"--steps={STEPS}", "--ckpt_every=1", "--eval_every=2", "--ema=0.5")
ENDLESS = tiny("--steps=1000000", "--ckpt_every=25", "--eval_every=50", "--val_tokens=64")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """{script: the folder of a whole run}"""
    folders = {}
    for name, script in SCRIPTS.items():
        folders[name] = tmp_path_factory.mktemp("whole") / name
        result = train(*RUN, f"--data={data}", f"--out={folders[name]}", script=script)
        assert result.status == 0, result.err
    return folders


@contextlib.contextmanager
def planted(script, fault):
    """Call fault(step, model, loss) -> loss where a run computes the loss of a step, from 1 on."""
    original, steps = script.loss_fn, []

    def loss_fn(model, *args):
        steps.append(None)
        return fault(len(steps), model, original(model, *args))

    script.loss_fn = loss_fn
    try:
        yield
    finally:
        script.loss_fn = original


def at(step, action):
    """A fault that does something in one step and leaves the loss alone."""
    def fault(now, model, loss):
        if now == step:
            action()
        return loss
    return fault


def local(name):
    """A variable of the run that is computing a loss."""
    frame = sys._getframe()
    while not (frame.f_code.co_name == "run" and name in frame.f_locals):
        frame = frame.f_back
    return frame.f_locals[name]


def resumed(script, folder, whole):
    """Going on leads to the end of the undisturbed run."""
    result = train("--resume=1", f"--out={folder}", script=script)
    assert result.status == 0, result.err
    assert_same_numbers(folder, whole)
    return result


def assert_same_numbers(folder, whole):
    a, b = checkpoint(folder), checkpoint(whole)
    assert_same_state(a, b)


def assert_finite(folder, name="ckpt.pt"):
    state = checkpoint(folder, name)
    for place, x in flat({k: state[k] for k in ("model", "ema", "optimizers")}).items():
        assert not isinstance(x, torch.Tensor) or x.isfinite().all(), place
    return state


# ----------------------------------------------------------------------------- numbers
def values(folder):
    """Parameters, averages and optimizer states of a checkpoint."""
    state = checkpoint(folder)
    return {k: x.clone() for k, x in flat({k: state[k] for k in ("model", "ema", "optimizers")}
                                          ).items() if isinstance(x, torch.Tensor)}


def bad_loss(value):
    def fault(step, model, loss):
        return loss * value if step == FAULT else loss
    return fault, "gradient"


def bad_gradient(value, place):
    """In one element of one tensor."""
    def fault(step, model, loss):
        if step == FAULT:
            name, p = list(model.named_parameters())[place]
            handle = p.register_hook(spoil)
            bad_gradient.name, bad_gradient.handle = name, handle
        elif step == FAULT + 1:
            bad_gradient.handle.remove()
        return loss

    def spoil(grad):
        grad = grad.clone()
        grad.view(-1)[-1] = value
        return grad
    return fault, None


@each_script
@pytest.mark.parametrize("kind", ["loss nan", "loss inf", "gradient nan", "gradient -inf"])
def test_bad_step_is_skipped_whole(kind, name, data, tmp_path):
    """Nothing of it enters weights, averages or optimizer states, and the line names the tensor."""
    script, out, seen = SCRIPTS[name], tmp_path / "run", {}
    what, value = kind.split()
    place = -1 if "nan" in value else 0
    fault, word = (bad_loss(float(value)) if what == "loss" else bad_gradient(float(value), place))

    def watched(step, model, loss):
        if step in (FAULT, FAULT + 1):
            seen[step] = values(out)
        return fault(step, model, loss)

    with planted(script, watched):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    assert result.status == 0, result.err
    line, = [x for x in result.out.splitlines() if "skipped:" in x and "loss:" not in x]
    assert line.startswith(f"step:{FAULT}/") and (word or bad_gradient.name) in line
    assert "skipped:1" in result.out.splitlines()[-3]
    assert seen[FAULT].keys() == seen[FAULT + 1].keys()
    for key, x in seen[FAULT].items():
        assert torch.equal(x, seen[FAULT + 1][key]), key
    state = assert_finite(out)
    assert state["step"] == STEPS and state["progress"]["skipped"] == 1
    losses = {x["step"]: x["loss"] for x in log(out) if "loss" in x}
    assert list(losses) == list(range(1, STEPS + 1))
    assert [s for s, x in losses.items() if x is None] == [FAULT] * (what == "loss")


def spoil_weight(model):
    """All of one hidden matrix, so that every loss shows it."""
    name, p = next((n, p) for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)
    p.data.fill_(float("nan"))
    return name


def spoil_unused_weight(model):
    """A token that no text has: losses and gradients do not show it."""
    name, p = next((n, p) for n, p in model.named_parameters() if "embed" in n)
    p.data[1] = float("inf")
    return name


def spoil_momentum(model, value=float("nan"), key=None):
    """Every number of one state. The update takes it into the weight."""
    for optimizer in local("optimizers"):
        for p, state in optimizer.state.items():
            for k, x in state.items():
                if isinstance(x, torch.Tensor) and x.ndim and (key or k) == k:
                    x.fill_(value)
                    return next(n for n, q in model.named_parameters() if q is p)
    raise AssertionError(key)


def spoil_second_moment(model):
    """Infinite, it makes the update zero: the weight stays finite, and the state is lost."""
    return spoil_momentum(model, float("inf"), "exp_avg_sq")


def spoil_average(model):
    shadow = local("shadow")
    shadow[0].view(-1)[0] = float("nan")
    return next(iter(dict(model.named_parameters())))


SPOILERS = {"weight": spoil_weight, "unused weight": spoil_unused_weight,
            "momentum": spoil_momentum, "second moment": spoil_second_moment,
            "average": spoil_average}
# What the message names: the weight, or the state by its place in the checkpoint.
SPOILED = dict.fromkeys(SPOILERS, "{}") | {"average": r"ema\.{}",
                                           "second moment": r"optimizers\S* is not finite"}


@each_script
@pytest.mark.parametrize("kind", SPOILERS)
@pytest.mark.parametrize("step", [FAULT, STEPS], ids=["amid", "last"])
def test_bad_state_stops_the_run(kind, step, name, data, undisturbed, tmp_path):
    """The last good checkpoint stays byte for byte, and going on from it makes the whole run."""
    script, out, spoiled, kept = SCRIPTS[name], tmp_path / "run", [], []

    def fault(now, model, loss):
        if now == step:
            kept.append((out / "ckpt.pt").read_bytes())
            spoiled.append(SPOILERS[kind](model))
            if kind == "weight":  # this loss was computed before
                loss = loss * float("nan")
        return loss

    with planted(script, fault):
        result = train(*RUN, "--max_bad_steps=2", f"--data={data}", f"--out={out}", script=script)
    assert_refused(result)
    named = re.search(SPOILED[kind].format(re.escape(spoiled[0])), result.out + result.err)
    assert named and result.err[:-1].isprintable(), result
    assert (out / "ckpt.pt").read_bytes() == kept[0]
    assert assert_finite(out)["step"] == step - 1
    assert not list(out.glob("*.partial"))
    resumed(script, out, undisturbed[name])


@each_script
def test_signal_does_not_save_bad_weights(name, data, undisturbed, tmp_path):
    """Who stops a run whose weights are lost keeps the checkpoint before."""
    script, out, kept = SCRIPTS[name], tmp_path / "run", []

    def fault(step, model, loss):
        if step == FAULT:
            spoil_unused_weight(model)
        elif step == FAULT + 1:
            kept.append((out / "ckpt.pt").read_bytes())
            signal.raise_signal(signal.SIGTERM)
        return loss

    with planted(script, fault):
        result = train(*tiny(*RUN, "--ckpt_every=2"), f"--data={data}", f"--out={out}",
                       script=script)
    assert_refused(result, "embed")
    assert (out / "ckpt.pt").read_bytes() == kept[0]
    resumed(script, out, undisturbed[name])


FORK = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import {name} as script

original, calls = script.loss_fn, []
rank = int(os.environ["RANK"])

def loss_fn(model, *args):
    calls.append(model)
    loss = original(model, *args)
    if rank == 1 and len(calls) == {fault}:
        {action}
    return loss

script.loss_fn = loss_fn
if __name__ == "__main__":
    try:
        script.main(sys.argv[1:])
    finally:
        torch.save(calls[0].state_dict(), f"{out}/rank{{rank}}.pt")
"""
ON_ONE_RANK = {
    "loss": "loss = loss * float('nan')",
    "gradient": "next(model.parameters()).register_hook(lambda g: g * float('inf') "
                "if len(calls) == {fault} else g)",
    "weight": "next(model.parameters()).data.fill_(float('nan'))"}


@pytest.fixture(scope="module")
def on_one_rank(data, tmp_path_factory):
    """{(script, kind): (folder, process)} of two ranks, the second of which meets the fault."""
    scripts, kinds = (SCRIPTS, ON_ONE_RANK) if TORTURE else (["train_mdlm"], ["loss"])
    folder, started = tmp_path_factory.mktemp("ranks"), {}
    for name in scripts:
        for kind in kinds:
            out = folder / f"{name}-{kind}"
            fork = folder / f"fork_{name}_{kind}.py"
            action = ON_ONE_RANK[kind].replace("{fault}", str(FAULT))
            fork.write_text(FORK.format(root=str(ROOT), name=name, fault=FAULT, out=folder / out,
                                        action=action))
            process = torchrun(*tiny(*RUN, "--micro_batch=4", "--max_bad_steps=2"),
                               f"--data={data}", f"--out={out}", script=fork)
            started[name, kind] = out, process
            if TORTURE:  # one after the other
                process.wait(LAUNCH_LIMIT)
    return started


def test_ranks_agree_on_a_bad_step(on_one_rank):
    for (name, kind), (out, process) in on_one_rank.items():
        result = finish(process)
        if kind == "weight":  # its first loss was computed before
            assert f"step:{FAULT + 1}/{STEPS} skipped" in result.out, (name, kind, result)
            assert result.status != 0 and f"{name}.py: " in result.err, result
            assert_finite(out)
            continue
        assert f"step:{FAULT}/{STEPS} skipped" in result.out, (name, kind, result)
        assert result.status == 0, result.err
        assert assert_finite(out)["progress"]["skipped"] == 1
        a, b = (torch.load(out / f"rank{r}.pt") for r in (0, 1))
        for key, x in a.items():
            assert torch.equal(x, b[key]), (name, kind, key)


# ----------------------------------------------------------------------------- disk
@pytest.fixture
def disk(tmp_path):
    """A disk of its own of a few checkpoints' size; its path."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", str(folder)],
                          capture_output=True) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    """Leave not a byte."""
    with open(disk / "ballast", "ab", buffering=0) as f:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while f.write(bytes(size)) == size:
                    pass


def make_room(disk):
    (disk / "ballast").unlink()


NO_SPACE = os.strerror(errno.ENOSPC)


@some_scripts
def test_disk_that_is_full_for_a_while(name, data, undisturbed, disk):
    """The run goes on, says what it did not write, and writes again when there is room."""
    script, out, kept = SCRIPTS[name], disk / "run", []

    def fault(step, model, loss):
        if step == FAULT:
            kept.append((out / "ckpt.pt").read_bytes())
            fill(disk)
        elif step == FAULT + 2:
            kept.append((out / "ckpt.pt").read_bytes())
            assert_finite(out)
            make_room(disk)
        return loss

    with planted(script, fault):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    assert result.status == 0, result.err
    assert kept[0] == kept[1]
    told = [x for x in result.out.splitlines() if NO_SPACE in x]
    assert len(told) == 2 and all(str(out / "ckpt.pt") in x for x in told), result.out
    assert_same_numbers(out, undisturbed[name])
    assert not list(out.glob("*.partial*"))
    assert [x["step"] for x in log(out) if "loss" in x][-1] == STEPS


@some_scripts
def test_end_of_a_run_waits_for_room(name, data, undisturbed, disk, monkeypatch):
    script, out = SCRIPTS[name], disk / "run"
    monkeypatch.setattr(script, "END_RETRY", LAUNCH_LIMIT)
    timer = threading.Timer(1.5, make_room, [disk])

    def full():
        fill(disk)
        timer.start()

    with planted(script, at(STEPS, full)):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    timer.join()
    assert result.status == 0, result.err
    assert NO_SPACE in result.out + result.err
    assert_same_numbers(out, undisturbed[name])


@some_scripts
def test_end_of_a_run_on_a_disk_that_stays_full(name, data, undisturbed, disk, monkeypatch):
    script, out, kept = SCRIPTS[name], disk / "run", []
    monkeypatch.setattr(script, "END_RETRY", 0.5)

    def full():
        kept.append((out / "ckpt.pt").read_bytes())
        fill(disk)

    with planted(script, at(STEPS, full)):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    assert result.status == 2 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert NO_SPACE in last and "--resume=1" in last and str(out / "ckpt.pt") in last
    assert (out / "ckpt.pt").read_bytes() == kept[0]
    assert not list(out.glob("*.partial*"))
    make_room(disk)
    resumed(script, out, undisturbed[name])
    assert [x["step"] for x in log(out) if "loss" in x] == list(range(1, STEPS + 1))


@some_scripts
def test_disk_that_is_full_from_the_start(name, data, disk):
    fill(disk)
    before = tree(disk)
    result = train(*RUN, f"--data={data}", f"--out={disk / 'run'}", script=SCRIPTS[name])
    assert_refused(result, "--out", NO_SPACE)
    shutil.rmtree(disk / "run", ignore_errors=True)
    assert tree(disk) == before


@some_scripts
def test_read_only_disk(name, data, disk, undisturbed):
    """It is read from, not written to, and says so."""
    script = SCRIPTS[name]
    shutil.copytree(undisturbed[name], disk / "run", ignore=shutil.ignore_patterns("ckpt_prev*"))
    before = tree(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = ("--out", os.strerror(errno.EROFS))
    assert_refused(train(*RUN, f"--data={data}", f"--out={disk / 'new'}", script=script), *words)
    assert_refused(train("--resume=1", "--steps=8", f"--out={disk / 'run'}", script=script), *words)
    result = train("--eval_only=1", f"--init_from={disk / 'run' / 'ckpt.pt'}", script=script)
    assert result.status == 0, result.err
    assert tree(disk) == before


def immutable(folder, on):
    """A folder in which not even root may change anything."""
    made = shutil.which("chattr") and subprocess.run(
        ["chattr", "+i" if on else "-i", str(folder)], capture_output=True).returncode == 0
    if on and not made:
        pytest.skip("needs chattr +i")


@some_scripts
def test_folder_that_is_read_only_for_a_while(name, data, undisturbed, tmp_path):
    script, out, kept = SCRIPTS[name], tmp_path / "run", []

    def fault(step, model, loss):
        if step in (FAULT, FAULT + 2):
            kept.append((out / "ckpt.pt").read_bytes())
            immutable(out, step == FAULT)
        return loss

    try:
        with planted(script, fault):
            result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    finally:
        if out.exists():
            immutable(out, False)
    assert result.status == 0, result.err
    assert kept[0] == kept[1]
    assert len([x for x in result.out.splitlines() if "not written" in x]) == 2
    assert_same_numbers(out, undisturbed[name])


@some_scripts
def test_run_folder_that_vanishes(name, data, undisturbed, tmp_path):
    script, out = SCRIPTS[name], tmp_path / "run"
    with planted(script, at(FAULT, lambda: shutil.rmtree(out))):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    assert result.status == 0, result.err
    assert_same_numbers(out, undisturbed[name])
    resumed(script, out, undisturbed[name])


@some_scripts
def test_run_folder_that_becomes_a_file(name, data, undisturbed, tmp_path, monkeypatch):
    """The file stays; the run goes on, and writes when the file has gone."""
    script, out, moved = SCRIPTS[name], tmp_path / "run", tmp_path / "moved"
    monkeypatch.setattr(script, "END_RETRY", 0.5)

    def replace():
        out.rename(moved)
        out.write_text("keep me")

    with planted(script, at(FAULT, replace)):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    assert result.status == 2 and "Traceback" not in result.err
    assert str(out) in result.err.splitlines()[-1]
    assert out.read_text() == "keep me"
    assert assert_finite(moved)["step"] == FAULT - 1
    out.unlink()
    moved.rename(out)
    resumed(script, out, undisturbed[name])


@some_scripts
def test_logs_that_cannot_be_written(name, data, undisturbed, tmp_path):
    """Said once, on stderr; the run does not depend on them."""
    script, out = SCRIPTS[name], tmp_path / "run"

    def replace():
        (out / "log.jsonl").unlink()
        (out / "log.jsonl").mkdir()

    with planted(script, at(FAULT, replace)):
        result = train(*RUN, f"--data={data}", f"--out={out}", script=script)
    assert result.status == 0, result.err
    assert_one_warning(result, os.strerror(errno.EISDIR))
    assert f"step:{STEPS}/{STEPS} loss:" in result.out
    assert f"step:{STEPS}/{STEPS} loss:" in (out / "log.txt").read_text()
    assert_same_numbers(out, undisturbed[name])


def assert_one_warning(result, *words):
    assert result.err.count("\n") == 1 and "log" in result.err, result.err
    for word in words:
        assert word in result.err, result.err


@some_scripts
def test_logs_on_a_full_disk(name, data, disk):
    """Whole lines or none; the numbers are those of a run without any trouble."""
    script, out, n = SCRIPTS[name], disk / "run", 150
    flags = (*tiny(f"--steps={n}", "--eval_every=0", "--val_tokens=64"), f"--data={data}")

    def fault(step, model, loss):
        if step == 10:
            fill(disk)
        elif step == n - 10:
            make_room(disk)
        return loss

    with planted(script, fault):
        result = train(*flags, f"--out={out}", script=script)
    assert result.status == 0, result.err
    assert_one_warning(result, NO_SPACE)
    steps = [x["step"] for x in log(out) if "loss" in x]  # every line is JSON
    assert steps == sorted(set(steps)) and {*range(1, 10), n} < set(steps) < {*range(1, n + 1)}
    text = (out / "log.txt").read_text()
    assert all(re.match(r"step:\d+/150 (loss|val_)", x) for x in text.splitlines()
               if x.startswith("step:"))
    shutil.copytree(out, disk.parent / "kept")
    alone = disk.parent / "alone"
    assert train(*flags, f"--out={alone}", script=script).status == 0
    assert_same_numbers(disk.parent / "kept", alone)


STDOUTS = {"goes away": "exec {run} | head -n 3"}
if TORTURE:
    STDOUTS |= {"full": "exec {run} >/dev/full", "closed": "exec {run} >&-",
                "both closed": "exec {run} >&- 2>&-",
                "both go away": "exec {run} 2>&1 | head -n 3"}


def test_output_that_goes_away(data, undisturbed, tmp_path):
    """A pipe that its reader leaves, no stdout at all, a full disk behind it."""
    processes = {}
    for name in SCRIPTS if TORTURE else ["train_mdlm"]:
        for kind, line in STDOUTS.items():
            out = tmp_path / f"{name}-{kind}"
            command = [sys.executable, ROOT / f"{name}.py", *RUN, f"--data={data}", f"--out={out}"]
            run = " ".join(f"'{x}'" for x in command)
            process = subprocess.Popen(["bash", "-o", "pipefail", "-c", line.format(run=run)],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            LAUNCHED.append(process)
            processes[name, kind] = out, process
    for (name, kind), (out, process) in processes.items():
        result = finish(process)
        assert result.status == 0, (kind, result)
        assert "Traceback" not in result.err and result.err.count("\n") <= 1, (kind, result)
        assert_same_numbers(out, undisturbed[name])
        assert [x["step"] for x in log(out) if "loss" in x] == list(range(1, STEPS + 1)), kind


# ----------------------------------------------------------------------------- two runs, one folder
AT_WORK = "another run is at work there"
LONG = tiny("--steps=200", "--ckpt_every=25", "--eval_every=50", "--val_tokens=64")


@contextlib.contextmanager
def forked(script, *flags):
    """A run in a copy of this process, which spares the imports; killed in the end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = train(*flags, script=script).status
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_for_step(folder, step):
    """Until a run has logged that."""
    until = time.monotonic() + LAUNCH_LIMIT
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            lines = (folder / "log.jsonl").read_text().splitlines()
            if any(f'"step": {step},' in x for x in lines):
                return
        time.sleep(0.01)
    raise AssertionError(f"{folder}: no step {step}")


@some_scripts
def test_second_run_is_refused(name, data, tmp_path):
    """And leaves the first one alone: logs and checkpoints are those of a lone run."""
    out, script, link = tmp_path / "run", SCRIPTS[name], tmp_path / "link"
    link.symlink_to(out)
    with forked(script, *LONG, f"--data={data}", f"--out={out}") as first:
        wait_for_step(out, 3)  # there is no checkpoint so far
        for other in SCRIPTS.values() if TORTURE else [script]:
            assert_refused(train(*LONG, f"--data={data}", f"--out={out}", script=other),
                           f"--out={out}", AT_WORK)
        wait_for_step(out, 30)
        again = train("--resume=1", f"--out={out}", script=script)
        by_link = train("--resume=1", f"--out={link}", script=script)
        reading = train("--eval_only=1", f"--init_from={out / 'ckpt.pt'}", script=script)
        assert os.waitpid(first, os.WNOHANG) == (0, 0), "it was to be at work all the time"
        assert_refused(again, f"--out={out}", AT_WORK)
        assert_refused(by_link, f"--out={link}", AT_WORK)
        assert reading.status == 0, reading.err
        assert os.waitpid(first, 0)[1] == 0
    alone = tmp_path / "alone"
    result = train(*LONG, f"--data={data}", f"--out={alone}", script=script)
    assert result.status == 0, result.err
    assert_same_numbers(out, alone)
    assert log(out) == log(alone)
    assert {p.name for p in out.iterdir()} == {p.name for p in alone.iterdir()}


def test_lock_of_a_killed_run_is_free_at_once(data, tmp_path):
    out = tmp_path / "run"
    with forked(train_mdlm, *ENDLESS, f"--data={data}", f"--out={out}") as first:
        wait_for_step(out, 30)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        step = checkpoint(out)["step"]
        result = train("--resume=1", f"--steps={step + 2}", f"--out={out}")
    assert result.status == 0, result.err


def start_together(n, action):
    """n forks of this process that begin at one moment -> their (status, out, err)."""
    gate_out, gate_in = os.pipe()
    pids, results = [], []
    for _ in range(n):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(gate_in)
                os.read(gate_out, 1)  # until the gate is closed
                with os.fdopen(write, "w") as f:
                    f.write(repr(tuple(action())))
            finally:
                os._exit(0)
        os.close(write)
        pids.append((pid, read))
    os.close(gate_out)
    os.close(gate_in)
    for pid, read in pids:
        with os.fdopen(read) as f:
            results.append(f.read())
        os.waitpid(pid, 0)
    return [eval(x) for x in results]  # written by repr above


@pytest.mark.parametrize("turn", range(20 if TORTURE else 1))
def test_one_of_ten_trains(turn, data, tmp_path):
    """Ten that start at the same moment on a folder that is not there yet."""
    name = list(SCRIPTS)[turn % 4]
    out = tmp_path / "run"
    flags = (*tiny("--steps=100", "--eval_every=0", "--val_tokens=64", "--ckpt_every=20"),
             f"--data={data}")
    results = start_together(10, lambda: train(*flags, f"--out={out}", script=SCRIPTS[name]))
    assert sorted(x[0] for x in results) == [0] + 9 * [2], results
    for status, _, err in results:
        # Who came after the end finds a finished run instead.
        assert status == 0 or (err.count("\n") == 1 and
                               (AT_WORK in err or "holds a run" in err)), err
    assert train(*flags, f"--out={tmp_path / 'alone'}", script=SCRIPTS[name]).status == 0
    assert_same_numbers(out, tmp_path / "alone")
    assert log(out) == log(tmp_path / "alone")


def test_second_run_beside_two_ranks(data, tmp_path):
    out = tmp_path / "run"
    flags = (*tiny(*ENDLESS, "--micro_batch=4", "--ckpt_every=0"), f"--data={data}", f"--out={out}")
    first = torchrun(*flags)
    before = wait_for(first, "step:3/")
    assert_refused(train(*ENDLESS, f"--data={data}", f"--out={out}"), f"--out={out}", AT_WORK)
    if TORTURE:
        second = finish(torchrun(*flags))
        assert second.status != 0 and "step:" not in second.out
        # Once, with a report by the launcher around it.
        assert second.err.count(AT_WORK) == 1, second.err
    os.kill(min(children(first.pid)), signal.SIGTERM)
    result = finish(first, before)
    assert result.status == 0 and "continue with:" in result.out, result.err
    steps = [x["step"] for x in log(out) if "loss" in x]
    assert steps == list(range(1, checkpoint(out)["step"] + 1))


@pytest.mark.torture
def test_one_of_three_torchruns_trains(data, tmp_path):
    out = tmp_path / "run"
    flags = (*tiny("--steps=300", "--ckpt_every=50", "--micro_batch=4"), f"--data={data}",
             f"--out={out}")
    results = [finish(x) for x in [torchrun(*flags) for _ in range(3)]]
    assert [x.status == 0 for x in results].count(True) == 1, results
    for result in results:
        found = AT_WORK in result.err or "holds a run" in result.err
        assert result.status == 0 or (found and "step:" not in result.out), result
    assert [x["step"] for x in log(out) if "loss" in x] == list(range(1, 301))


# ----------------------------------------------------------------------------- long runs
LEAK = """
import sys
sys.path.insert(0, {root!r})
import train_mdlm as script

original, kept = script.loss_fn, []

def loss_fn(*args):
    {action}
    return original(*args)

script.loss_fn = loss_fn
if __name__ == "__main__":
    script.main(sys.argv[1:])
"""
LEAKS = {"memory": "kept.append(bytearray(b'x') * 100_000)",
         "handles": "kept.append(open('/dev/null'))"}


def test_slope_of_a_line_with_noise():
    """By hand: y = 2 + 3 t in hours, with +-1 around it in turn."""
    times = [36.0 * i for i in range(100)]
    slope, se = soak.slope(times, [2 + 3 * t / 3600 + (-1) ** i for i, t in enumerate(times)])
    assert abs(slope - 3) < 3 * se and 0.2 < se < 0.6
    assert soak.slope(times, [5.0] * 100) == (0, 0)


def test_soak_tells_a_leak(data, tmp_path):
    """A run that keeps 100 KB a step, and one that keeps a handle."""
    flags = [*tiny(*ENDLESS, "--log_every=10"), f"--data={data}"]

    def leaking(kind):
        fork = tmp_path / f"leak_{kind}.py"
        fork.write_text(LEAK.format(root=str(ROOT), action=LEAKS[kind]))
        return soak.soak(fork, flags + [f"--out={tmp_path / kind}"], seconds=2, every=0.1,
                         checkpoints=6)

    with ThreadPoolExecutor() as pool:
        for kind, found in zip(LEAKS, pool.map(leaking, LEAKS), strict=True):
            assert found.status == 0 and found.checkpoints > 0, found
            assert [x for x in ("memory", "handles") if found.grows(x)] == [kind], found


@pytest.mark.torture
def test_soak_of_each_script(data, tmp_path):
    """Minutes here; python tests/soak.py --minutes=60 for the hour."""
    started = {name: launch(ROOT / "tests" / "soak.py", "--minutes=3", "--every=1",
                            f"--script={name}.py", *ENDLESS, f"--data={data}",
                            f"--out={tmp_path / name}")
               for name in SCRIPTS}
    for name, process in started.items():
        out, err = process.communicate(timeout=180 + LAUNCH_LIMIT)
        assert process.returncode == 0, (name, out, err)


