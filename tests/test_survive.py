"""Runs that are killed, told to stop, lose a rank or go on with another number of them.

Real processes, SIGKILLs and signals: a run that was killed and resumed, however often, ends in the
very bits of one that was left alone (make torture: 20 kills for every script and number of ranks).
"""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from runs import (
    CONSTANT_RATE,
    GENTLE,
    LAUNCHED,
    ROOT,
    SCRIPT,
    TORTURE,
    assert_same_log,
    assert_same_state,
    checkpoint,
    children,
    evaluations,
    finish,
    kill,
    launch,
    log,
    one_thread,  # noqa: F401
    tiny,
    torchrun,
    train,
    wait_for,
)

import gpt
import train_block
import train_mdlm
import train_sedd

SCRIPTS = {"mdlm": train_mdlm, "gpt": gpt, "block": train_block, "sedd": train_sedd}
FLAGS = tiny("--n_layer=2", "--micro_batch=2", "--dropout=0.1", "--ema=0.9", "--lr=0.005",
             "--eval_every=5", "--ckpt_every=3")
# Runs that end when they are told to; with a constant rate a step does not depend on --steps.
ENDLESS = tiny(*FLAGS, *CONSTANT_RATE, "--steps=1000000")

def start(script, ranks, *flags):
    """As a user starts it, on one rank or by torchrun."""
    if ranks == 1:
        return launch(script.__file__, *flags)
    return torchrun(*flags, script=script.__file__, ranks=ranks)

def run_whole(script, ranks, out, *flags):
    """A run that nobody disturbs, or what is left of one."""
    flags = (*flags, f"--out={out}")
    if ranks == 1:
        result = train(*flags, script=script)
    else:
        result = finish(torchrun(*flags, script=script.__file__, ranks=ranks))
    assert result.status == 0, result

def assert_same_run(out, whole):
    """The same weights, averages and optimizer states, and the same figures in the log, of which
    the last of repeated steps count."""
    assert_same_state(checkpoint(out), checkpoint(whole))
    logs = [{(x["step"], "loss" in x): x for x in log(folder)} for folder in (out, whole)]
    evaluated = [{k: x for k, x in records.items() if not k[1]} for records in logs]
    assert evaluated[0] == evaluated[1]
    assert (out / "val_nats.npy").read_bytes() == (whole / "val_nats.npy").read_bytes()

MOMENTS = ("write", "step", "evaluation", "start")
KILLS = [(name, ranks, 5 * MOMENTS) for name in SCRIPTS for ranks in (1, 2)] if TORTURE else [
    ("block", 1, MOMENTS[:1]), ("mdlm", 2, ())]

def strike(process, out, moment, rng):
    """Kill every process of a run at a moment of it."""
    if moment == "start":
        time.sleep(rng.uniform(0, 4))
    elif moment == "write":
        wait_for(process, r"step:\d+/\d+ loss")
        while not list(out.glob("*.partial")) and process.poll() is None:
            time.sleep(0.0002)
    else:
        last_digits = "05" if moment == "evaluation" else "0-9"
        for _ in range(rng.randint(1, 3)):
            wait_for(process, rf"step:\d*[{last_digits}]/\d+ loss")
        time.sleep(rng.uniform(0, 0.03))
    kill(process)

# Enough steps for a test on a busy machine to notice the moment before the run is over.
KILL_FLAGS = tiny(*FLAGS, "--n_embd=128", "--micro_batch=4", "--resume=1",
                  *(("--steps=400",) if TORTURE else ("--steps=60", "--eval_every=20")))

@pytest.mark.parametrize("name, ranks, moments", KILLS)
def test_killed_run_ends_as_one_left_alone(name, ranks, moments, data, tmp_path):
    """Killed whole; and of two ranks one that dies, which ends the other, and torchrun starts both
    again."""
    script, out, flags = SCRIPTS[name], tmp_path / "out", (*KILL_FLAGS, f"--data={data}")
    rng, step = random.Random(f"{name} {ranks}"), -1
    for moment in moments:
        process = start(script, ranks, *flags, f"--out={out}")
        strike(process, out, moment, rng)
        result = finish(process)
        assert result.status == -signal.SIGKILL, result  # it was not over before
        assert "Traceback" not in result.err, result.err
        if (out / "ckpt.pt").exists():  # always one that loads, and never an older one
            step, before = checkpoint(out)["step"], step
            assert step >= before
    if ranks > 1:
        process = torchrun(*flags, f"--out={out}", script=script.__file__,
                           options=("--max-restarts=1",))
        before = wait_for(process, r"step:([4-9]|\d\d+)/")  # there is a checkpoint of step 3
        os.kill(max(children(process.pid)), signal.SIGKILL)
        result = finish(process)
        assert result.status == 0 and "resuming" in result.out, (before, result)
    else:
        run_whole(script, ranks, out, *flags)
    run_whole(script, ranks, tmp_path / "whole", *flags)
    assert_same_run(out, tmp_path / "whole")

def gap(a, b):
    """Largest distance of a parameter of two checkpoints, relative to its norm."""
    return max(float((x - b[part][name]).norm() / x.norm())
               for part in ("model", "ema") for name, x in a[part].items())

@pytest.mark.parametrize("name", SCRIPTS if TORTURE else ["sedd"])
def test_another_number_of_ranks_goes_on_with_a_run(name, data, tmp_path):
    """Losses can agree so well only if batches, noise and dropout are the same."""
    script, out, worlds = SCRIPTS[name], tmp_path / "out", (1, 4, 2, 1) if TORTURE else (1, 2, 1)
    flags = (*tiny(*FLAGS, *CONSTANT_RATE, *GENTLE, "--eval_every=3"), f"--data={data}")
    run_whole(script, 1, tmp_path / "alone", *flags, f"--steps={3 * len(worlds)}")
    for i, world in enumerate(worlds):
        how = ("--resume=1",) if i else flags
        run_whole(script, world, out, *how, f"--steps={3 * i + 3}")
        # On the very same weights one rank prints the very same digits.
        alone = train("--eval_only=1", f"--init_from={out / 'ckpt.pt'}", script=script)
        assert evaluations(alone.out) == evaluations((out / "log.txt").read_text())[-1:]
    assert_same_log(out, tmp_path / "alone")
    assert gap(checkpoint(out), checkpoint(tmp_path / "alone")) < 5e-4

LONG = {  # seconds, of one step or one evaluation
    "step": ("--batch_tokens=8192", "--n_layer=12", "--ckpt_every=0"),
    "evaluation": ("--val_draws=100000", "--ckpt_every=0"),
}

def stopped_at(out, result):
    """The step that the last line names, with all that goes with it."""
    text = r"^stopped after step (\d+); --resume=1 --out=(.*) continues$"
    lines = re.findall(text, result.out, re.M)
    assert len(lines) == 1 and lines[0][1] == str(out), result
    return int(lines[0][0])

@pytest.mark.parametrize("long, name", [("evaluation", "TERM"), ("step", "INT")])
def test_long_step_or_evaluation_is_broken_off(long, name, data, tmp_path):
    """A step that is dropped costs nothing: its noise and its batch come back."""
    out, flags = tmp_path / "out", tiny(*FLAGS, f"--data={data}", "--steps=7")
    process = launch(SCRIPT, *tiny(*flags, *LONG[long]), f"--out={out}")
    before = wait_for(process, " parameters, " if long == "step" else "step:5/7 loss")
    time.sleep(0.3)
    process.send_signal(getattr(signal, f"SIG{name}"))
    result = finish(process, before)
    assert result.status == (130 if name == "INT" else 0), result
    assert stopped_at(out, result) == (0 if long == "step" else 5)
    assert "Traceback" not in result.err and not evaluations(result.out)
    if long == "evaluation":
        again = train("--resume=1", f"--out={out}", "--val_draws=1", "--ckpt_every=3")
        assert again.status == 0, again.err
        run_whole(train_mdlm, 1, tmp_path / "whole", *flags)
        assert_same_run(out, tmp_path / "whole")

STOPS = [(who, name) for who in ("launcher", "0", "1") for name in ("TERM", "USR1", "INT")]

def test_two_ranks_stop_at_the_same_step_and_save(data, tmp_path):
    """One run, told to stop in one way after the other; then as one left alone."""
    out, flags = tmp_path / "out", (*tiny(*ENDLESS, "--ckpt_every=0"), f"--data={data}")
    for who, name in STOPS if TORTURE else [("1", "TERM")]:
        process = torchrun(*flags, "--resume=1", f"--out={out}",
                           options=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1",))
        before = wait_for(process, "step:.* loss")
        workers = sorted(children(process.pid))
        number = process.pid if who == "launcher" else workers[int(who)]
        os.kill(number, getattr(signal, f"SIG{name}"))
        step = stopped_at(out, finish(process, before))
    run_whole(train_mdlm, 2, tmp_path / "whole", *tiny(*flags, f"--steps={step}"))
    assert_same_state(checkpoint(out), checkpoint(tmp_path / "whole"))

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
    job = dict(SLURM_JOB_ID="71", CALLS=str(calls), OMP_NUM_THREADS="1", SLURM_GPUS_ON_NODE="1",
               PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")

    def begin(*arguments):
        process = subprocess.Popen(
            ["bash", ROOT / "slurm.sh", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **job})
        LAUNCHED.append(process)
        return process

    return begin, lambda: calls.read_text().splitlines()

def test_batch_script_queues_itself_again_until_done(sbatch, data, tmp_path):
    begin, calls = sbatch
    out, flags = tmp_path / "out", (*ENDLESS, f"--data={data}")
    process = begin("train_block.py", *flags, f"--out={out}")
    before = wait_for(process, "step:7/")
    process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: says
    result = finish(process, before)
    assert result.status == 0 and calls() == ["requeue 71"], result
    flags = tiny(*flags, f"--steps={stopped_at(out, result) + 6}")
    result = finish(begin("train_block.py", *flags, f"--out={out}"))
    assert result.status == 0 and "resuming" in result.out and "done:" in result.out, result
    assert calls() == ["requeue 71"]
    run_whole(train_block, 1, tmp_path / "whole", *flags)
    assert_same_run(out, tmp_path / "whole")
