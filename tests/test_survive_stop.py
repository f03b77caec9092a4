"""Runs that are told to stop: they save, say how to go on, and lose nothing.

Real signals to real processes, in a step or an evaluation that would last for minutes, to one rank,
to all of them and to torchrun; and the batch script, under a scheduler made of four small programs.
"""
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import (
    LAUNCHED,
    ROOT,
    SCRIPT,
    SEQ_LEN,
    TORTURE,
    assert_refused,
    assert_same_state,
    babble,
    checkpoint,
    children,
    evaluations,
    finish,
    launch,
    log,
    make_data,
    tiny,
    torchrun,
    train,
    wait_for,
    write_shard,
)
from test_survive_kill import (
    CONSTANT_RATE,
    FLAGS,
    assert_same_run,
    assert_sound,
    go_on,
    run_whole,
    until,
)

import train_block
import train_mdlm

ROWS = 2048  # of the batch of a long step
LONG = {
    "step": (f"--batch_tokens={ROWS * SEQ_LEN}", "--ckpt_every=0"),
    "evaluation": ("--val_draws=100000", "--ckpt_every=0"),
}
# Runs that end when they are told to; with a constant rate a step does not depend on --steps.
ENDLESS = tiny(*FLAGS, *CONSTANT_RATE, "--steps=1000000")
MORE = 6  # steps that a stopped run then does: an evaluation and two checkpoints
STATUS = {"TERM": 0, "USR1": 0, "HUP": 0, "INT": 130}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def large_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    text = babble(20_000)
    write_shard(folder / "train_000001.bin", np.tile(text, ROWS * SEQ_LEN // len(text) + 1))
    write_shard(folder / "val_000000.bin", text[:2000])
    return folder


def send(process, *names):
    for name in names:
        process.send_signal(getattr(signal, f"SIG{name}"))


def minds(pid, name):
    """Has a process a handler of its own for a signal? From Linux's /proc."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return int(caught, 16) >> getattr(signal, f"SIG{name}") - 1 & 1


def stopped_at(out, result):
    """The step that the last line names, with all that goes with it."""
    assert "Traceback" not in result.err or "torch/distributed/run.py" in result.err, result.err
    lines = re.findall(r"^stopped after step (\d+); continue with: (.*)$", result.out, re.M)
    assert len(lines) == 1, result
    step, command = int(lines[0][0]), lines[0][1]
    assert checkpoint(out)["step"] == step
    assert "--resume=1" in command and f"--out={out}" in shlex.split(command), command
    return step


# ----------------------------------------------------------------------------- one process
# name: (what is long, signals in a row); the first ones are quick
STOPS = {"step": ("step", ["TERM", "USR1"]), "evaluation": ("evaluation", ["HUP", "HUP"])}
if TORTURE:
    STOPS |= {f"{long} {' '.join(names)}": (long, names) for long in LONG
              for names in (["TERM"], ["USR1"], ["INT"], ["HUP"], ["INT", "INT"], ["TERM"] * 3)}


@pytest.fixture(scope="module")
def begun(data, large_data, tmp_path_factory):
    """{name: (folder, process)}; all that is quick starts at once."""
    processes = {}

    def begin(name):
        long = STOPS[name][0]
        out = tmp_path_factory.mktemp("stop") / "out"
        folder = large_data if long == "step" else data
        flags = tiny(*FLAGS, *LONG[long], f"--data={folder}", f"--out={out}", "--steps=7")
        processes[name] = out, launch(SCRIPT, *flags)
        return processes[name]

    for name in list(STOPS)[:2]:
        begin(name)
    return lambda name: processes.get(name) or begin(name)


@pytest.mark.parametrize("name", STOPS)
def test_long_step_or_evaluation_is_broken_off(name, begun, data, tmp_path):
    """A step that is dropped costs nothing: its noise and its batch come back."""
    (long, names), (out, process) = STOPS[name], begun(name)
    before = wait_for(process, " parameters, " if long == "step" else "step:5/7 loss")
    until(lambda: minds(process.pid, "TERM"))
    time.sleep(0.5)
    send(process, *names)
    result = finish(process, before)
    assert result.status == STATUS[names[0]], result
    assert stopped_at(out, result) == (0 if long == "step" else 5)
    assert not (out / "ckpt_prev.pt").exists()  # written once
    assert not evaluations(result.out)
    if long == "step":
        again = train("--resume=1", f"--out={out}", "--steps=1", f"--micro_batch={ROWS // 8}")
        assert again.status == 0, again.err
        assert [x["step"] for x in log(out) if "loss" in x] == [1]
    else:
        again = train("--resume=1", f"--out={out}", "--val_draws=1", "--ckpt_every=3")
        assert again.status == 0, again.err
        flags = tiny(*FLAGS, f"--data={data}", "--steps=7", "--val_draws=1")
        assert train(*flags, f"--out={tmp_path / 'whole'}").status == 0
        assert log(out) == log(tmp_path / "whole")


IGNORE_HUP = ("import os, signal, sys\n"
              "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
              "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")


@pytest.mark.torture
def test_hangup_is_ignored_under_nohup(data, tmp_path):
    out = tmp_path / "out"
    process = launch("-c", IGNORE_HUP, SCRIPT, *ENDLESS, f"--data={data}", f"--out={out}")
    before = wait_for(process, "step:7/")
    send(process, "HUP")
    before += wait_for(process, "step:30/")
    send(process, "TERM")
    result = finish(process, before)
    assert result.status == 0 and stopped_at(out, result) >= 30


@pytest.mark.torture
def test_signals_during_the_start_lose_nothing(data, tmp_path):
    """Before a run has its handlers a signal ends it at once; afterwards it stops and saves."""
    rng, out, whole = random.Random(0), tmp_path / "out", tmp_path / "whole"
    flags, step = (*tiny(*FLAGS, "--steps=200"), f"--data={data}"), -1
    for name in ("TERM", "USR1", "HUP") * 4:
        process = launch(SCRIPT, *go_on(out, flags), f"--out={out}")
        time.sleep(rng.uniform(0, 4))
        send(process, name)
        result = finish(process)
        assert result.status in (0, -getattr(signal, f"SIG{name}")), result
        assert "Traceback" not in result.err, result.err
        step = assert_sound(out, step)
    run_whole(train_mdlm, 1, out, *go_on(out, flags))
    run_whole(train_mdlm, 1, whole, *flags)
    assert_same_run(out, whole)


# ----------------------------------------------------------------------------- torchrun
FORWARD = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1",)
# What torchrun returns when it is told to stop itself, with SIGUSR1 made known to it or not.
LAUNCHER_STATUS = {("TERM", ()): 1, ("INT", ()): 1, ("HUP", ()): 1, ("USR1", FORWARD): 1}


def send_to(process, target, name):
    """Signal the launcher, all its workers, or one of them."""
    workers = sorted(children(process.pid))
    picked = {"launcher": [process.pid], "all": workers}.get(target) or [workers[int(target)]]
    for number in picked:
        os.kill(number, getattr(signal, f"SIG{name}"))


def assert_continues(out, result, flags, tmp_path):
    """A stopped run of two ranks goes on as one left alone."""
    steps = f"--steps={stopped_at(out, result) + MORE}"
    assert "continue with: torchrun --nproc_per_node=2 train_mdlm.py" in result.out
    assert not (out / "ckpt_prev.pt").exists()  # written once
    run_whole(train_mdlm, 2, out, "--resume=1", steps)
    run_whole(train_mdlm, 2, tmp_path / "whole", *tiny(*flags, steps))
    assert_same_state(checkpoint(out), checkpoint(tmp_path / "whole"))
    assert log(out) == log(tmp_path / "whole")


@pytest.mark.torture
@pytest.mark.parametrize("target", ["0", "1", "all"])
@pytest.mark.parametrize("name", STATUS)
def test_workers_agree_on_the_step(name, target, data, tmp_path):
    flags = (*tiny(*ENDLESS, "--ckpt_every=0"), f"--data={data}")
    process = torchrun(*flags, f"--out={tmp_path / 'out'}")
    before = wait_for(process, "step:7/")
    send_to(process, target, name)
    result = finish(process, before)
    # A worker that ends with 130 has failed, for torchrun.
    assert result.status == (1 if name == "INT" else 0), result
    assert_continues(tmp_path / "out", result, flags, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("name, options", LAUNCHER_STATUS)
def test_launcher_passes_a_signal_on(name, options, data, tmp_path):
    flags = (*tiny(*ENDLESS, "--ckpt_every=0"), f"--data={data}")
    process = torchrun(*flags, f"--out={tmp_path / 'out'}", options=options)
    before = wait_for(process, "step:7/")
    send_to(process, "launcher", name)
    result = finish(process, before)
    assert result.status == LAUNCHER_STATUS[name, options], result
    assert_continues(tmp_path / "out", result, flags, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("long, target", [("step", "launcher"), ("evaluation", "launcher"),
                                          ("evaluation", "1")])
def test_ranks_break_off_what_is_long(long, target, data, large_data, tmp_path):
    """torchrun kills workers that take more than 30 seconds."""
    folder = large_data if long == "step" else data
    process = torchrun(*tiny(*FLAGS, *LONG[long], "--steps=7"), f"--data={folder}",
                       f"--out={tmp_path / 'out'}")
    before = wait_for(process, " parameters, " if long == "step" else "step:5/7 loss")
    until(lambda: all(minds(n, "TERM") for n in children(process.pid)))
    time.sleep(0.5)
    send_to(process, target, "TERM")
    result = finish(process, before)
    assert stopped_at(tmp_path / "out", result) == (0 if long == "step" else 5)
    assert "Unable to shutdown" not in result.err, result.err
    assert result.status == (1 if target == "launcher" else 0), result


# ----------------------------------------------------------------------------- SLURM
# Stand-ins: srun passes a signal to every process of its step, scontrol keeps what it was asked.
STAND_INS = {
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    "srun": '"$@" & step=$!\n'
            'trap \'kill -USR1 $step $(cat /proc/$step/task/$step/children)\' USR1\n'
            'while kill -0 $step 2>/dev/null; do wait $step; status=$?; done; exit $status',
    "scontrol": 'echo "$@" >> "$CALLS"',
}


@pytest.fixture
def sbatch(tmp_path):
    """(arguments) -> the batch script with them, started as by SLURM; and what scontrol heard."""
    if not shutil.which("bash"):
        pytest.skip("no bash")
    calls, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    calls.touch()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    job = dict(SLURM_JOB_ID="71", CALLS=str(calls), OMP_NUM_THREADS="1",
               PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")

    def begin(*arguments, ranks=2):
        process = subprocess.Popen(
            ["bash", ROOT / "slurm.sh", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **job, "SLURM_GPUS_ON_NODE": str(ranks)})
        LAUNCHED.append(process)
        return process

    return begin, lambda: calls.read_text().splitlines()


def test_batch_script_queues_itself_again_until_done(sbatch, data, tmp_path):
    begin, calls = sbatch
    out, ranks, step = tmp_path / "out", 2 if TORTURE else 1, 0
    flags = (*ENDLESS, f"--data={data}")
    # Where the warning comes: seconds after the start, before torchrun or ranks have handlers, or
    # at a step.
    moments = [0.5, 2.0, "step:7/", 3.0, "loss"] if TORTURE else ["step:7/"]
    for n, moment in enumerate(moments, 1):
        process, before = begin("train_block.py", *flags, f"--out={out}", ranks=ranks), ""
        if isinstance(moment, str):
            before = wait_for(process, moment)
        else:
            time.sleep(moment)
        process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: says
        result = finish(process, before)
        assert result.status == 0, result
        assert calls() == ["requeue 71"] * n
        if before:
            step = stopped_at(out, result)
    flags = tiny(*flags, f"--steps={step + MORE}")
    result = finish(begin("train_block.py", *flags, f"--out={out}", ranks=ranks))
    assert result.status == 0, result
    assert "resuming" in result.out and "done:" in result.out
    assert calls() == ["requeue 71"] * len(moments)
    run_whole(train_block, ranks, tmp_path / "whole", *flags)
    assert_same_run(out, tmp_path / "whole")


def test_batch_script_says_when_a_run_has_no_folder(sbatch):
    begin, calls = sbatch
    result = finish(begin("train_block.py", "--steps=3"))
    assert_refused(result, "--out")
    assert not calls()


@pytest.mark.torture
def test_batch_script_does_not_repeat_a_mistake(sbatch, data, tmp_path):
    begin, calls = sbatch
    result = finish(begin("train_block.py", *FLAGS, "--data=nowhere", f"--out={tmp_path / 'out'}"))
    assert result.status == 1 and "--data=nowhere" in result.err, result
    assert not calls()


@pytest.mark.torture
def test_batch_script_goes_on_from_a_checkpoint_of_another_run(sbatch, data, tmp_path):
    """--init_from belongs to the first start alone; a finished run is not queued again, though the
    warning came in its last steps."""
    begin, calls = sbatch
    flags, out = (*ENDLESS, f"--data={data}"), tmp_path / "out"
    run_whole(train_block, 2, tmp_path / "first", *tiny(*flags, "--steps=20"))
    flags = (*flags, f"--init_from={tmp_path / 'first' / 'ckpt.pt'}")
    process = begin("train_block.py", *flags, f"--out={out}")
    before = wait_for(process, "step:7/")
    process.send_signal(signal.SIGUSR1)
    flags = tiny(*flags, f"--steps={stopped_at(out, finish(process, before)) + MORE}")
    assert calls() == ["requeue 71"]
    process = begin("train_block.py", *flags, f"--out={out}")
    before = wait_for(process, "done:")
    process.send_signal(signal.SIGUSR1)
    result = finish(process, before)
    assert result.status == 0 and "resuming" in before, result
    assert calls() == ["requeue 71"]
    run_whole(train_block, 2, tmp_path / "whole", *flags)
    assert_same_run(out, tmp_path / "whole")
