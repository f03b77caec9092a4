"""Runs that are killed, lose a rank or go on with another number of them.

Real processes and real SIGKILLs: a run that was killed and resumed, however often, must end in the
very bits of one that was left alone. Runs that are killed at random moments are started as a user
starts them; others are forked off this process, which has imported torch already.
"""
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time

import pytest
from runs import (
    LAUNCH_LIMIT,
    TORTURE,
    Result,
    assert_refused,
    assert_same_state,
    checkpoint,
    children,
    finish,
    launch,
    log,
    make_data,
    tiny,
    torchrun,
    train,
)

import gpt
import train_block
import train_mdlm
import train_sedd

SCRIPTS = {"mdlm": train_mdlm, "gpt": gpt, "block": train_block, "sedd": train_sedd}
EVERY, CKPT_EVERY = 5, 3  # steps between evaluations, and between checkpoints
FLAGS = tiny("--n_layer=2", "--micro_batch=2", "--dropout=0.1", "--ema=0.9", "--lr=0.005",
             f"--eval_every={EVERY}", f"--ckpt_every={CKPT_EVERY}")
FORKED = []  # like runs.LAUNCHED, of processes forked off this one


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def no_fork_outlives_its_test():
    yield
    for process in FORKED:
        process.kill()


# ----------------------------------------------------------------------------- forked ranks
def be_a_rank(script, flags, environment, output):
    """What a forked process does: the command line of a script, its output into a file."""
    with open(output, "wb") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    os.environ.update(environment)
    script.main(list(map(str, flags)))


def fork(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    FORKED.append(process)
    return process


class Ranks:
    """A run of some ranks without a launcher: nobody ends a rank because another one died."""

    def __init__(self, script, world, folder, *flags, **environment):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.outputs = [folder.with_name(f"{folder.name}.rank{rank}") for rank in range(world)]
        self.processes = [
            fork(be_a_rank, script, (*flags, f"--out={folder}"), dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment), output)
            for rank, output in enumerate(self.outputs)]

    def wait_for(self, pattern, rank=0):
        until(lambda: re.search(pattern, self.printed(rank)) or not self.alive(rank))
        assert re.search(pattern, self.printed(rank)), self.printed(rank)

    def alive(self, rank):
        return self.processes[rank].is_alive()

    def printed(self, rank):
        path = self.outputs[rank]
        return path.read_text() if path.exists() else ""

    def finish(self, rank):
        """Output and errors of a forked process are one stream."""
        self.processes[rank].join(LAUNCH_LIMIT)
        assert not self.alive(rank), self.printed(rank)
        return Result(self.processes[rank].exitcode, self.printed(rank), "")


def until(condition, seconds=LAUNCH_LIMIT):
    """Wait for a condition, looking often: some last for a millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


def run_whole(script, world, folder, *flags, **environment):
    """A run that nobody disturbs, or what is left of one. -> the first rank's output"""
    ranks = Ranks(script, world, folder, *flags, **environment)
    results = [ranks.finish(rank) for rank in range(world)]
    assert [r.status for r in results] == [0] * world, results
    return results[0].out


def go_on(out, flags):
    """The flags that continue a run; before its first checkpoint those that began it."""
    return ("--resume=1",) if (out / "ckpt.pt").exists() else flags


def assert_same_run(out, whole):
    assert_same_state(checkpoint(out), checkpoint(whole))
    assert log(out) == log(whole)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


# ----------------------------------------------------------------------------- killed
# The moments of a kill: in the write of a checkpoint, in a step, in an evaluation, while the logs
# are rewritten for a run that goes on, and anywhere in the seconds of its start.
MOMENTS = ("write", "step", "evaluation", "rewrite", "start")
KILLED_AT = MOMENTS * 4 if TORTURE else MOMENTS[:1]
WIDE = ("--n_embd=128", f"--steps={200 if TORTURE else 40}")  # so that a write takes a while
KILLED = [(name, ranks) for name in (SCRIPTS if TORTURE else ["block"]) for ranks in (1, 2)]


def read_to(process, pattern):
    """Read the output of a process to a line that matches, or to its end."""
    return any(re.search(pattern, line) for line in process.stdout)


def strike(process, out, moment, rng):
    """Kill every process of a run at a moment of it."""
    def ended():
        return process.poll() is not None

    if moment == "start":
        time.sleep(rng.uniform(0, 4))
    elif moment == "rewrite":
        logs = [out / "log.txt", out / "log.jsonl"]
        before = [x.stat().st_ino if x.exists() else None for x in logs]
        until(lambda: list(out.glob("log.*.partial")) or ended()
              or all(x.exists() for x in logs) and before[1] != logs[1].stat().st_ino)
        time.sleep(rng.uniform(0, 0.001))
    elif moment == "write":
        read_to(process, r"step:\d+/\d+ loss")
        until(lambda: list(out.glob("*.partial")) or ended())
        time.sleep(rng.uniform(0, 0.01))
    else:
        last_digits = "05" if moment == "evaluation" else "0-9"
        for _ in range(rng.randint(1, 2)):
            read_to(process, rf"step:\d*[{last_digits}]/\d+ loss")
        time.sleep(rng.uniform(0, 0.03))
    for number in (process.pid, *children(process.pid)):
        os.kill(number, signal.SIGKILL)


def steps_logged(out):
    return [x["step"] for x in log(out) if "loss" in x] if (out / "log.jsonl").exists() else []


def assert_sound(out, last):
    """What a kill must leave: a checkpoint that loads, not older than before, if there was one;
    and every step once in the log. -> the step of the checkpoint, -1 without one"""
    step = checkpoint(out)["step"] if (out / "ckpt.pt").exists() else -1
    assert step >= last
    if (out / "ckpt_prev.pt").exists():
        assert -1 < checkpoint(out, "ckpt_prev.pt")["step"] <= step
    logged = steps_logged(out)
    assert logged == list(range(1, len(logged) + 1)) and len(logged) >= step
    return step


@pytest.mark.parametrize("name, ranks", KILLED)
def test_killed_run_ends_as_one_left_alone(name, ranks, data, tmp_path):
    script, out, whole = SCRIPTS[name], tmp_path / "out", tmp_path / "whole"
    flags, step = (*tiny(*FLAGS, *WIDE), f"--data={data}"), -1
    rng = random.Random(f"{name} {ranks}")
    for moment in KILLED_AT:
        command = (*go_on(out, flags), f"--out={out}")
        process = (launch(script.__file__, *command) if ranks == 1 else
                   torchrun(*command, script=script.__file__, ranks=ranks))
        strike(process, out, moment, rng)
        result = finish(process)
        assert result.status == -signal.SIGKILL, result  # not over before it was killed
        assert "Traceback" not in result.err, result.err
        step = assert_sound(out, step)
    run_whole(script, ranks, out, *go_on(out, flags))
    run_whole(script, ranks, whole, *flags)
    assert_same_run(out, whole)


# ----------------------------------------------------------------------------- file by file
SHORT = ("--steps=5", "--eval_every=2", "--ckpt_every=2")


def die_at_file(n, folder, *arguments):
    """What a forked process does: a rank that kills itself as it is about to touch a path of the
    run's folder for the n-th time (open, rename, link, remove, ..)."""
    touched = itertools.count(1)

    def hook(event, arguments):
        paths = [x for x in arguments if isinstance(x, str)]
        if any(x == str(folder) or x.startswith(f"{folder}/") for x in paths):
            if next(touched) == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    be_a_rank(*arguments)


@pytest.mark.parametrize("begun", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("name", SCRIPTS if TORTURE else ["mdlm"])
def test_run_killed_at_any_file_operation(name, begun, data, tmp_path):
    """Random moments hardly ever fall between two calls that must not be parted."""
    script, whole, start = SCRIPTS[name], tmp_path / "whole", tmp_path / "start"
    flags = (*tiny(*FLAGS, *SHORT), f"--data={data}")
    run_whole(script, 1, whole, *flags)
    if begun:  # killed after step 4, which has an evaluation that its checkpoint lacks
        ranks = Ranks(script, 1, start, *tiny(*flags, "--ckpt_every=3"))
        ranks.wait_for("step:4/")
        ranks.processes[0].kill()
        ranks.finish(0)
    for n in itertools.count(1, 1 if TORTURE else 9):
        out, output = tmp_path / str(n), tmp_path / f"{n}.output"
        if start.exists():
            shutil.copytree(start, out)
        command = (*go_on(out, flags), f"--out={out}")
        process = fork(die_at_file, n, out, script, command, {}, output)
        process.join(LAUNCH_LIMIT)
        if process.exitcode == 0:  # it has no n-th one
            break
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        assert_sound(out, 3 if begun else -1)
        run_whole(script, 1, out, *go_on(out, flags))
        assert_same_run(out, whole)
    assert n > 9


# ----------------------------------------------------------------------------- other ranks
CONSTANT_RATE = ("--cooldown=0", "--momentum_warmup=0")  # a step then does not depend on --steps


GENTLE = ("--optimizer=adamw",
          *(f"--{name}=0.001" for name in "lr embed_lr head_lr scalar_lr".split()))


def gap(a, b):
    """Largest distance of a parameter of two checkpoints, relative to its norm."""
    return max(float((x - b[part][name]).norm() / x.norm())
               for part in ("model", "ema") for name, x in a[part].items())


@pytest.mark.parametrize("optimizer", [GENTLE, ()] if TORTURE else [GENTLE],
                         ids=lambda flags: "adamw" if flags else "muon")
@pytest.mark.parametrize("name", SCRIPTS if TORTURE else ["sedd"])
def test_run_of_two_ranks_goes_on_with_one_and_with_four(name, optimizer, data, tmp_path):
    """Losses can agree so well only if batches, noise and dropout are the same. Muon makes every
    singular value of a step equal, those of rounding errors too, so its weights part sooner."""
    script = SCRIPTS[name]
    flags = (*tiny(*FLAGS, *CONSTANT_RATE, *optimizer, "--eval_every=3"), f"--data={data}")
    run_whole(script, 2, tmp_path / "saved", *flags, "--steps=6")
    run_whole(script, 1, tmp_path / "alone", *flags, "--steps=12")
    expected = checkpoint(tmp_path / "alone")
    for world in (1, 2, 4):
        out = tmp_path / str(world)
        shutil.copytree(tmp_path / "saved", out)
        run_whole(script, world, out, "--resume=1", "--steps=12")
        for a, b in zip(log(out), log(tmp_path / "alone"), strict=True):
            assert a == pytest.approx(b, rel=2e-4), world
        state = checkpoint(out)
        assert state["step"] == 12 and state["tokens_seen"] == expected["tokens_seen"]
        if optimizer:
            assert gap(state, expected) < 5e-4


# ----------------------------------------------------------------------------- a rank is lost
# Checkpoints far apart: the steps after one are given more time, as slow disks need it.
LOSING = ("--steps=80", "--ckpt_every=20")
LOST = ("rank {} lost contact with another rank.*: stopped; "
        "--resume=1 continues from the last checkpoint")


def assert_says_that_a_rank_is_lost(rank, result):
    assert result.status == 1, result
    assert re.search(LOST.format(rank), result.out), result.out
    assert "Traceback" not in result.out, result.out


@pytest.mark.parametrize("lost", [0, 1])
def test_rank_that_dies_stops_the_other(lost, data, tmp_path):
    flags = (*tiny(*FLAGS, *LOSING), f"--data={data}")
    ranks = Ranks(train_mdlm, 2, tmp_path / "out", *flags)
    ranks.wait_for("step:27/")
    ranks.processes[lost].kill()
    assert_says_that_a_rank_is_lost(1 - lost, ranks.finish(1 - lost))
    assert assert_sound(tmp_path / "out", 20) == 20
    if lost:
        run_whole(train_mdlm, 2, tmp_path / "out", "--resume=1")
    else:  # as torchrun --max-restarts does it: the same command, and a count
        run_whole(train_mdlm, 2, tmp_path / "out", *flags, TORCHELASTIC_RESTART_COUNT="1")
    run_whole(train_mdlm, 2, tmp_path / "whole", *flags)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.torture
def test_rank_that_hangs_stops_the_other(data, tmp_path):
    """Within LAUNCH_LIMIT, two minutes; and it stops itself when it comes back."""
    flags = (*tiny(*FLAGS, *LOSING), f"--data={data}")
    runs = [Ranks(train_mdlm, 2, tmp_path / f"out{hung}", *flags) for hung in (0, 1)]
    for hung, ranks in enumerate(runs):
        ranks.wait_for("step:27/")
        os.kill(ranks.processes[hung].pid, signal.SIGSTOP)
    run_whole(train_mdlm, 2, tmp_path / "whole", *flags)
    for hung, ranks in enumerate(runs):
        out = tmp_path / f"out{hung}"
        assert_says_that_a_rank_is_lost(1 - hung, ranks.finish(1 - hung))
        assert assert_sound(out, 20) == 20
        os.kill(ranks.processes[hung].pid, signal.SIGCONT)
        assert_says_that_a_rank_is_lost(hung, ranks.finish(hung))
        assert assert_sound(out, 20) == 20
        run_whole(train_mdlm, 2, out, "--resume=1")
        assert_same_run(out, tmp_path / "whole")


def kill_worker(process, which):
    os.kill(sorted(children(process.pid))[which], signal.SIGKILL)


@pytest.mark.torture
@pytest.mark.parametrize("name", SCRIPTS)
def test_torchrun_restarts_a_run_that_lost_a_rank(name, data, tmp_path):
    script, flags = SCRIPTS[name], (*tiny(*FLAGS, "--steps=200"), f"--data={data}")
    process = torchrun(*flags, f"--out={tmp_path / 'out'}", script=script.__file__,
                       options=("--max-restarts=2",))
    read_to(process, " parameters, ")  # once before there is anything to go on from
    kill_worker(process, 0)
    read_to(process, "step:7/")
    kill_worker(process, 1)
    result = finish(process)
    assert result.status == 0, result.err
    assert "resuming" in result.out
    run_whole(script, 2, tmp_path / "whole", *flags)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.torture
def test_torchrun_ends_a_run_that_lost_a_rank(data, tmp_path):
    flags = (*tiny(*FLAGS, "--steps=200"), f"--data={data}")
    process = torchrun(*flags, f"--out={tmp_path / 'out'}")
    read_to(process, "step:7/")
    kill_worker(process, 1)
    result = finish(process)
    assert result.status == 1
    assert re.search(LOST.format(0), result.err) or "SIGTERM" in result.err, result.err
    assert_sound(tmp_path / "out", 3)
    run_whole(train_mdlm, 2, tmp_path / "out", "--resume=1")
    run_whole(train_mdlm, 2, tmp_path / "whole", *flags)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.torture
def test_workers_of_a_killed_launcher_keep_their_folder(data, tmp_path):
    """They go on to the end; meanwhile another run is refused, which would write the same files."""
    out, flags = tmp_path / "out", (*tiny(*FLAGS, "--steps=200"), f"--data={data}")
    process = torchrun(*flags, f"--out={out}")
    read_to(process, "step:7/")
    process.kill()
    assert_refused(train("--resume=1", f"--out={out}"), "--out", "another run")
    finish(process)  # their ends of the pipes close when the workers end
    run_whole(train_mdlm, 2, tmp_path / "whole", *flags)
    assert_same_run(out, tmp_path / "whole")
