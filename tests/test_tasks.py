"""Tasks with exact answers, GPT-2's weights, lm-evaluation-harness."""
import dataclasses
import itertools
import json
import random
import types

import numpy as np
import pytest
import runs
import torch
from runs import one_thread  # noqa: F401
from test_golf import make_checkpoint

import sample
import train_mdlm
from study import convert, gpt2_mdlm, puzzles, tasks

KEYS = {"sudoku4": lambda row: row[16:], "sudoku6": lambda row: row[36:],
        "countdown": lambda row: sorted(row[:8].strip(".").split("=")[0]),
        "addition": lambda row: sorted((row[:5], row[6:11])), "brackets": lambda row: row[:20],
        "sort": lambda row: row[12:], "sudoku9": lambda row: row[81:]}

@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    for name, task in puzzles.TASKS.items():
        small = dataclasses.replace(task, n_train=400, n_test=40)
        monkeypatch.setitem(puzzles.TASKS, name, small)

def call(*flags, main=tasks.main):
    return runs.train(*flags, script=types.SimpleNamespace(main=main))

SIX = "346521215643163452524136652314431265"
SCORED = [  # task, question, right answers, wrong ones
    ("sudoku4", "12..34..........", ["1234341221434321"],
     ["2134341212434321", "1234341221434312", "1234431221434321", "1234341211111111", "1" * 16]),
    ("sudoku4", 16 * ".", ["1234341221434321", "3412123443212143"],
     ["1234123412341234", "1234234134124123", "5234345221434325"]),
    ("sudoku6", 36 * ".", [SIX], [SIX[:-2] + "56", SIX[6:12] + SIX[:6] + SIX[12:18] * 4]),
    ("sudoku9", 81 * ".", [], ["".join((2 * "123456789")[i:i + 9] for i in range(9))]),
    ("countdown", ".1389=24", ["8*9/3*1.....", "8*(9/3)*1...", "3*8.........", "(9-1)*3....."],
     ["8*9/3+1.....", "8*3*8/8.....", "24..........", "8*9/(3......", "9+8+3+4.....",
      "9//3*8......", "8**1*3......", "8*3/(1-1)...", "............", "8*3)*(1.....",
      "-8*-3.......", "8(3)........"]),
    ("countdown", "..1392=6", ["1/3*9*2....."], ["1//3*9*2....", "9*2*1/(3-3)."]),
    ("brackets", "[[](........)](())()", ["()()[][]", "[](()())", "())([][]"],
     ["()()[]([", "][][][][", "........", "(][)()()"]),
]

@pytest.mark.parametrize("name, question, right, wrong", SCORED)
def test_a_scorer_knows_right_from_wrong(name, question, right, wrong):
    is_right = puzzles.TASKS[name].is_right
    assert [a for a in right + wrong if is_right(question, a)] == right

def test_random_answers_score_at_chance():
    question = "[[](........)](())()"
    share = np.mean([puzzles.closes_brackets(question, "".join(x))
                     for x in itertools.product("()[]", repeat=8)])
    random.seed(0)
    task, n = puzzles.TASKS["brackets"], 20_000
    answers = ["".join(random.choices("()[]", k=8)) for _ in range(n)]
    found = tasks.count_right(task, [dict(question=question)] * n, answers)
    low, high = tasks.wilson(found, n)
    assert low < share < high and 0 < share < 0.02
    assert tasks.wilson(45, 50) == pytest.approx([0.7864, 0.9565], abs=1e-4)

@pytest.mark.parametrize("name", puzzles.TASKS)
def test_training_and_test_have_no_problem_in_common(tmp_path, name):
    task = puzzles.TASKS[name]
    assert call("make", f"--task={name}", f"--out={tmp_path}").status == 0
    cfg = train_mdlm.Config(data=str(tmp_path), seq_len=task.seq_len, batch_tokens=task.seq_len)
    train, val, meta = train_mdlm.open_data(cfg)
    train, val = ([bytes(row).decode() for row in np.concatenate(x.shards)] for x in (train, val))
    items = [json.loads(line) for line in (tmp_path / "test.jsonl").open()]
    assert meta["tokenizer"] == "byte" and len(val) == task.n_test
    assert tasks.count_right(task, items, [item["answer"] for item in items]) == len(items)
    if name == "reversal":
        shown = [item["row"].replace("____", item["answer"])[3:] for item in items]
        backward, forward, hole_first = (shown[i:i + 40] for i in (0, 40, 80))
        rows = {row[3:] for row in train}
        assert not rows & {*backward} and rows >= {*forward} and {*forward} == {*hole_first}
        assert len(rows) == len(train) == 2 * task.n_train + task.n_test
    else:
        keys, held_out = ({str(KEYS[name](row)) for row in rows} for rows in (train, val))
        assert not keys & held_out and len(train) == task.n_train
    runs.assert_refused(call("make", f"--task={name}", "--seed=1", f"--out={tmp_path}"), "holds")

@pytest.mark.parametrize("name", sample.SCRIPTS)
def test_answers_are_read_from_the_holes(tmp_path, monkeypatch, name):
    """A network that answers a for whatever it reads, on questions of which half ask for it."""
    task = dataclasses.replace(puzzles.TASKS["reversal"], n_test=20)
    monkeypatch.setitem(puzzles.TASKS, "reversal", task)
    ways = [("prefix", "{}=____"), ("infill", "____={}")]
    items = [dict(asked=asked, row=row.format(f"..x{i:04}"), answer="aaab" if i % 2 else "aaaa")
             for asked, row in ways for i in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, items)))
    blocks = dict(block_len=4) if name == "train_block" else {}
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", name, seq_len=12, **blocks)
    head, embed = ckpt["model"]["head.weight"], ckpt["model"]["embed.weight"]
    for key, x in ckpt["model"].items():
        if key.endswith((".o.weight", ".down.weight")):
            x.zero_()  # layers that change nothing
        if key.endswith(".residual"):
            x.copy_(torch.tensor([1.0, 0.0]))
    head.zero_()
    head[ord("a")] = embed[[ord("="), ord("a"), 256]].sum(0) * 10
    embed[[ord("="), ord("a"), 256]] = head[ord("a")]
    train_mdlm.save_checkpoint(str(tmp_path / "ckpt.pt"), ckpt)
    lm = sample.load(tmp_path / "ckpt.pt", dtype="fp32")
    rows = tasks.score(lm, "reversal", tmp_path, ["random", "confidence"], [0, 2])
    asked = ["prefix"] if name in ("gpt", "train_block") else ["prefix", "infill"]
    assert [*dict.fromkeys(row["asked"] for row in rows)] == asked
    assert {row["right"] for row in rows} == {10}, rows
    n_passes = {row["passes"] for row in rows}
    assert n_passes == {"gpt": {4}, "train_sedd": {1}}.get(name, {4, 2}), rows

def test_a_network_of_two_steps_is_at_chance_and_a_run_goes_on(tmp_path):
    flags = ("run", "--tasks=reversal", "--scripts=gpt,train_mdlm", "--seeds=1", "--tokens=8192",
             f"--data={tmp_path}", f"--out={tmp_path}/out", "--orders=confidence")
    done = call(*flags)
    assert done.status == 0, done
    rows = sum((json.loads(path.read_text()) for path in tmp_path.glob("out/*/*/score.json")), [])
    assert len(rows) == 2 + 3 and all(row["right"] == 0 for row in rows)
    assert len({(row["parameters"], row["tokens"]) for row in rows}) == 1
    assert all(row["n"] == 40 for row in rows) and done.out.count("0.0% (0.0% to 8.8%)") == 5
    again = call(*flags)
    assert (again.out, again.err) == (done.out, "")
    runs.assert_refused(call("run", "--tasks=chess"), "chess", "sudoku4")
    runs.assert_refused(call("play"), "play", "table")

def test_converted_weights_are_gpt2_until_the_mask_goes(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    for p in gpt2.parameters():
        torch.nn.init.normal_(p, std=0.3)
    gpt2.save_pretrained(tmp_path)
    done = call(f"--from={tmp_path}", "--tokenizer=byte", f"--out={tmp_path}", main=convert.main)
    assert done.status == 0, done
    model, cfg = sample.build_model(gpt2_mdlm, gpt2_mdlm.load_checkpoint(str(tmp_path)))
    x = torch.randint(256, (3, cfg.seq_len))
    with torch.no_grad():
        theirs = gpt2(torch.cat((torch.zeros(3, 1, dtype=torch.long), x), 1)).logits[:, :-1]
        assert (model(x, is_causal=True) - theirs).abs().max() < 1e-4
        assert (model(x) - theirs).abs().max() > 0.1
        assert torch.equal(model.embed.weight[-1], gpt2.transformer.wte.weight.mean(0))
    call("make", "--task=sudoku4", f"--out={tmp_path}/data")
    done = runs.train_tiny(f"--init_from={tmp_path}/ckpt.pt", f"--data={tmp_path}/data",
                           *(f"--n_{x}" for x in ("layer=2", "head=4", "embd=32")), "--steps=2",
                           f"--out={tmp_path}/out", script=gpt2_mdlm)
    assert done.status == 0, done
    assert runs.checkpoint(tmp_path / "out")["config"]["n_positions"] == 64

def test_a_network_of_gpt2s_shape_trains_and_writes(tmp_path):
    data = runs.make_data(tmp_path)
    out = runs.train_tiny(f"--data={data}", f"--out={tmp_path}/out", "--steps=3",
                          "--n_positions=40", "--start_id=0", script=gpt2_mdlm)
    assert out.status == 0 and runs.log(tmp_path / "out")[-1]["val_nelbo"] < 6, out
    lm = sample.load(tmp_path / "out", script=gpt2_mdlm.__file__)
    assert lm.generate("ab", length=20, order="confidence").nfe == 18
    out = runs.train_tiny(f"--data={data}", "--n_positions=32", script=gpt2_mdlm)
    runs.assert_refused(out, "--seq_len=32", "n_positions")

def test_the_harness_asks_and_is_answered(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    from study import harness
    rows = [dict(q="ab", choices=["cd", "xy"], gold=0), dict(q="a c", choices=["c", "yz"], gold=1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dict(data_files={"test": f"{tmp_path}/rows.jsonl"}, cache_dir=str(tmp_path))
    task = dict(task="pick", output_type="multiple_choice", dataset_path="json", test_split="test",
                dataset_kwargs=data, doc_to_text="{{q}}", doc_to_choice="choices",
                doc_to_target="gold")
    (tmp_path / "pick.yaml").write_text(json.dumps(task))  # which is yaml, too
    for name in ("gpt", "train_mdlm"):
        ckpt = make_checkpoint(tmp_path / f"{name}.pt", name)
        ckpt["model"]["head.weight"][[*range(32), *range(127, 256)]] = 0  # writes what can be read
        train_mdlm.save_checkpoint(str(tmp_path / f"{name}.pt"), ckpt)
        done = call(f"--ckpt={tmp_path}/{name}.pt", "--tasks=pick", f"--include={tmp_path}",
                    main=harness.main)
        assert done.status == 0 and "|acc " in done.out and "4 likelihoods" in done.out, done
        model = harness.Adapter(sample.load(tmp_path / f"{name}.pt", dtype="fp32"), draws=400)
        text = model.write("ab", 4, temperature=0.0)
        asked = [types.SimpleNamespace(args=args) for args in (("ab", text), ("ab", "zzz"))]
        (given, is_greedy), (_, other) = model.loglikelihood(asked)
        assert (is_greedy, other) == (True, False)
        whole = [types.SimpleNamespace(args=(x,)) for x in (f"ab{text}", "ab")]
        whole, part = model.loglikelihood_rolling(whole)
        assert name != "gpt" or given == pytest.approx(whole - part, abs=1e-4)
        ask = types.SimpleNamespace(args=(40 * "b" + "ab", dict(until=text[1], max_gen_toks=4)))
        assert text[1] not in model.generate_until([ask])[0]
