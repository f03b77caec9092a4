"""The study's runner against real runs, a kill and stand-ins for SLURM; tables, plots, texts."""
import fcntl
import json
import math
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import one_thread  # noqa: F401
from test_golf import make_checkpoint

from study import plot, run, sweep, table, zeroshot

MATRIX = dict(mdlm=("train_mdlm.py", ""), gpt=("gpt.py", ""), broken=("gpt.py", "--n_head=3"))

@pytest.fixture
def study(data, tmp_path, monkeypatch):
    """(flags) -> what study/run.py says of a matrix of tiny runs; the folder of its runs"""
    monkeypatch.setitem(run.MATRICES, "toy", MATRIX)
    monkeypatch.setitem(run.SCALES, "tiny", " ".join(runs.tiny("--steps=30", "--ckpt_every=3")))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, text in (("squeue", "cat $0.queue"), ("sbatch", "echo $@ >> $0.calls")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def call(*flags):
        return runs.train("--matrix=toy", "--seeds=2", f"--data={data}", f"--out={tmp_path}",
                          *flags, script=run)

    return call, tmp_path / "toy-tiny"

def states(result):
    lines = map(str.split, result.out.splitlines()[:-1])
    return {line[0]: line[1] for line in lines if "started" not in line}

def test_runs_are_begun_resumed_and_left_alone(study, data):
    call, folder = study
    assert set(states(call("--status=1")).values()) == {"absent"} and not folder.exists()
    # One that was killed, and one that another process is at.
    _, command = run.runs_of("toy", "tiny", 1, folder.parent, data)[0]
    killed = runs.launch(*command)
    runs.wait_for(killed, "step:7/")
    killed.kill()
    killed.wait()
    (folder / "gpt_1").mkdir()
    with open(folder / "gpt_1" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = states(call("--status=1"))
        assert found.pop("mdlm_0") == "stalled" and found.pop("gpt_1") == "running"
        assert set(found.values()) == {"absent"}
        result = call("--jobs=local:2")
    found = states(result)
    assert found == {"mdlm_0": "done", "mdlm_1": "done", "gpt_0": "done", "gpt_1": "running",
                     "broken_0": "failed", "broken_1": "failed"}
    assert "resuming" in (folder / "mdlm_0" / "output.txt").read_text()
    assert "--n_head=3" in result.out and "stalled, started" in result.out
    # Again: nothing but what was locked.
    before = runs.tree(folder / "mdlm_0")
    result = call("--jobs=local:1")
    assert result.out.count("started") == 1 and states(result)["gpt_1"] == "done"
    assert runs.tree(folder / "mdlm_0") == before

def test_slurm_gets_what_fits_into_the_queue_and_is_not_in_it(study):
    call, folder = study
    calls, queue = folder.parent / "sbatch.calls", folder.parent / "squeue.queue"
    queue.write_text("toy-tiny/mdlm_0\nother\n")
    call("--jobs=slurm", "--queue=4")
    jobs = [line.split() for line in calls.read_text().splitlines()]
    assert [job[0] for job in jobs] == ["--job-name=toy-tiny/gpt_0", "--job-name=toy-tiny/broken_0"]
    assert jobs[0][1] == f"--output={folder}/gpt_0/output.txt"
    assert [Path(word).name for word in jobs[0][2:4]] == ["slurm.sh", "gpt.py"]
    assert {"--seed=0", f"--out={folder}/gpt_0"} < set(jobs[0]), jobs
    queue.unlink()
    runs.assert_refused(call("--jobs=slurm"), "squeue")

def test_mistakes_are_refused(study):
    call, _ = study
    runs.assert_refused(call("--matrix=schedules"), "--token_entropy")
    for script, flags in [row for rows in run.MATRICES.values() for row in rows.values()]:
        __import__(script.removesuffix(".py")).parse_flags(flags.split())  # every flag exists

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """mdlm and high (rate) with two seeds each, and a run that has only begun."""
    folder = tmp_path_factory.mktemp("study") / "toy-tiny"
    for name, rate in (("mdlm", 0.01), ("high", 3.0)):
        for seed in range(2):
            runs.train_tiny(f"--data={data}", f"--out={folder}/{name}_{seed}", "--steps=2",
                            f"--seed={seed}", f"--lr={rate}")
    shutil.copytree(folder / "mdlm_0", folder / "part_0")
    text = (folder / "part_0" / "log.txt").read_text()
    (folder / "part_0" / "log.txt").write_text(text[:text.index("\nstep:2/2 val")])
    return folder

def test_table_of_run_folders(finished, tmp_path):
    judged = [dict(text=f"mdlm_{seed}", gen_ppl=[seed + 2.0, 0.1]) for seed in range(2)]
    (tmp_path / "judge.json").write_text(json.dumps(dict(rows=judged)))
    out = runs.train(finished, "--first=mdlm", f"--judge={tmp_path}/judge.json",
                     f"--out={tmp_path}/toy.json", script=table)
    rows = {row["name"]: row for row in json.loads((tmp_path / "toy.json").read_text())["rows"]}
    nats = {name: np.stack([np.load(finished / f"{name}_{seed}" / "val_nats.npy") / runs.SEQ_LEN
                            for seed in range(2)]) for name in rows}
    pairs = (nats["high"] - nats["mdlm"]).mean(0).reshape(-1, 2).mean(1)
    seeds = (nats["high"] - nats["mdlm"]).mean(1)
    want = [pairs.mean(), pairs.std(ddof=1) / len(pairs) ** 0.5, seeds.std(ddof=1) / 2 ** 0.5]
    assert rows["high"]["difference"] == pytest.approx(want, abs=6e-5)
    assert rows["mdlm"]["nats"][0] == pytest.approx(nats["mdlm"].mean())
    assert rows["mdlm"]["gen_ppl"] == 2.5 and "gen_ppl" not in rows["high"]
    lines = out.out.splitlines()
    assert lines[4].startswith("| high |") and lines[4].endswith("| - |"), out
    assert "Left out: part_0 (stalled step 2/2)." in out.out
    again = runs.train(tmp_path / "toy.json", script=table)
    assert again.out.splitlines()[1:] == lines[1:]
    runs.assert_refused(runs.train(tmp_path, script=table), "no finished run")

def test_best_means_by_two_errors():
    low, high, near = (
        [types.SimpleNamespace(nats=np.array(nats), seed=seed) for seed in range(2)]
        for nats in ([1.0, 1.0, 1.2, 1.2], [1.5, 1.5, 1.6, 1.6], [1.3, 1.3, 1.0, 1.0]))
    assert table.is_best(low, [high]) and not table.is_best(high, [low])
    assert not table.is_best(low, [high, near]) and not table.is_best(low[:1], [high[:1]])

def points(figure):
    return {box.get_label(): [line.tolist() for line in box[0].get_data()]
            for box in figure.axes[0].containers}

def test_a_sweep_chooses_by_the_second_half(tmp_path, monkeypatch):
    """The best run there is the worst in the first half, whose figure is the one to quote."""
    started = []
    monkeypatch.setattr(sweep, "run_here", lambda jobs, n: started.extend(jobs))
    monkeypatch.setattr(sweep, "state", lambda folder: ("done", ""))
    monkeypatch.setattr(sweep.compare, "read_run", lambda folder: types.SimpleNamespace(
        nats=np.repeat([float(Path(folder).name), -float(Path(folder).name)], 6)))
    done = runs.train("--space=lr:log:.01:.04,schedule:linear:cosine", "--runs=8",
                      f"--out={tmp_path}", "--flags=--preset=tiny", script=sweep)
    assert "| 7 | --lr=0.0" in done.out and "Run 7 on the first half: 7.0000 ± 0.0000" in done.out
    rates, choices = zip(*(command[2:4] for _, command in started), strict=True)
    places = [4 * math.log2(float(rate.removeprefix("--lr=")) / 0.01) for rate in rates]
    assert sorted(map(int, places)) == [*range(8)]  # one in each eighth of the range
    assert {*choices} == {"--schedule=linear", "--schedule=cosine"}
    runs.assert_refused(runs.train("--space=lr", script=sweep), "--space=lr")

def test_plots_hold_what_the_files_say(finished, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [dict(order=order, threshold=limit, nfe=nfe, nats=[y, 0.1]) for order, limit, nfe, y in (
        ("NELBO", None, None, 2), ("l2r", None, 8, 3), ("l2r", None, 4, 4), ("l2r", 1, 5, 6))]
    gaps = [dict(first=first, last=last, gap=0.1 * last, se=0.01, cumulative=0.2)
            for first, last in ((0, 0), (1, 1), (2, 3))]
    judged = [dict(text=name, entropy=[x, 0.1], gen_ppl=[y, 0.2]) for name, x, y in (
        ("real text", 3, 5), ("mdlm_a", 2, 4), ("mdlm_b", 2.5, 6))]
    about = dict(seq_len=9, ckpt="out/a")
    (tmp_path / "a.json").write_text(json.dumps(dict(rows=rows, gap=gaps, about=about)))
    (tmp_path / "j.json").write_text(json.dumps(dict(rows=judged)))
    for kind, file, want in (
            ("nfe", "a", {"a: NELBO": [[9], [2]], "a: l2r": [[4, 8], [4, 3]],
                          "a: l2r, by threshold": [[5], [6]]}),
            ("gap", "a", {"a: here": [[0, 1, 2], [0, 0.1, 0.3]],
                          "a: mean up to here": [[0, 1, 2], [0.2] * 3]}),
            ("frontier", "j", {"mdlm": [[2, 2.5], [4, 6]], "real text": [[3], [5]]})):
        curves = plot.KINDS[kind]([f"{tmp_path}/{file}.json"], None)
        made = points(plot.draw(*curves, f"{tmp_path}/a.svg"))
        assert made.keys() == want.keys() and all(np.allclose(made[k], want[k]) for k in want)
    curves = plot.loss([finished / "mdlm_0"], types.SimpleNamespace(x="tokens"))
    made = points(plot.draw(*curves, f"{tmp_path}/a.png"))["mdlm_0"]
    tokens, logged = runs.ROWS * runs.SEQ_LEN, runs.log(finished / "mdlm_0")
    logged = [(line["step"] * tokens, line["loss"]) for line in logged if "loss" in line]
    assert made == [[*x] for x in zip(*logged, strict=True)]
    curve, = plot.bound(map(finished.joinpath, ("mdlm_0", "mdlm_1")), None)[0]
    ends = [runs.log(finished / f"mdlm_{seed}")[-1]["val_nelbo"] for seed in range(2)]
    assert [*curve["x"]] == [2 * tokens] and np.allclose(curve["y"] - curve["yerr"][0], min(ends))
    for curve in (curves := plot.density([], None)[0]):
        assert np.trapezoid(curve["y"], curve["x"]) == pytest.approx(1, abs=0.05), curve["label"]
    assert np.allclose(curves[0]["y"], 2 * curves[0]["x"], atol=1e-4)  # of the linear schedule

def test_wiki_lines_become_articles():
    lines = ("| = Bird Song = || The players ' \" old song \" , 1 @,@ 000 @-@ odd ( loud ) . |"
             " = = Notes = = | It didn 't cost $ 5 , said Anna 's aunt : 3 @.@ 5 % .||"
             " = Tree = || Green ; tall .").split("|")
    song, tree = zeroshot.documents("wikitext2", lines)
    assert song == ('= Bird Song =\nThe players\' "old song", 1,000-odd (loud).\n== Notes ==\n'
                    "It didn't cost $5, said Anna's aunt: 3.5%.")
    assert tree == "= Tree =\nGreen; tall."
    raw = zeroshot.documents("wikitext2", lines, raw=True)
    assert "\n".join(raw) == "\n".join(lines[1:])
    assert zeroshot.documents("ptb", [" no it was n't ", " a <unk> "]) == ["no it wasn't a <unk>"]
    assert zeroshot.documents("lm1b", ["a .", "", "b ."]) == ["a.", "b."]

def test_a_uniform_model_in_closed_form(tmp_path):
    lines, n_words = ["= A =", *["some words , here"] * 40], 3 + 160
    (tmp_path / "wiki.txt").write_text("\n".join(lines))
    for name in ("gpt", "train_mdlm"):
        ckpt = make_checkpoint(tmp_path / f"{name}.pt", name)
        ckpt["meta"]["token_bytes"] = None  # as of real bytes
        for weight in ckpt["model"].values():
            weight.zero_()
        torch.save(ckpt, tmp_path / f"{name}.pt")
    out = runs.train("wikitext2", f"--input={tmp_path}/wiki.txt", "--device=cpu",
                     f"--ckpt={tmp_path}/gpt.pt,{tmp_path}/train_mdlm.pt",
                     f"--out={tmp_path}/z.json", script=zeroshot)
    n_bytes = len("= A =") + 40 * len("\nsome words, here")
    assert out.status == 0, out
    rows = json.loads((tmp_path / "z.json").read_text())["rows"]
    assert [row["is_bound"] for row in rows] == [False, True], out
    for row in rows:
        assert (row["tokens"], row["bytes"], row["words"]) == (n_bytes + 1, n_bytes, n_words)
        assert row["nats"][0] == pytest.approx(math.log(256))
        assert row["ppl_word"] == pytest.approx(256 ** ((n_bytes + 1) / n_words), rel=1e-4)
        assert row["bpb"] == pytest.approx(8 * (n_bytes + 1) / n_bytes)
    again = runs.train(tmp_path / "z.json", script=table)
    assert again.out.splitlines()[2:] == [*out.out.splitlines(), ""]
    runs.assert_refused(runs.train("wikitext5", script=zeroshot), "wikitext5", "lm1b")
