"""The programs of the study against what is known exactly: enumerated likelihoods, closed forms."""
import itertools
import json
import math
import types

import numpy as np
import pytest
import runs
import torch
from runs import make_data, one_thread  # noqa: F401
from test_golf import make_checkpoint
from toys import _grid

import sample
from study import crosscheck, entropy, judge, likelihood, mauve

SCRIPTS = {name: sample.load_script(runs.ROOT / f"{name}.py") for name in sample.SCRIPTS}
V, T = 3, 4
TEXTS = _grid(V, T)  # (81, T), all of them

def random_model(name, n_layer=1, **settings):
    """A network of random weights, whose answers do not belong to one joint distribution."""
    settings |= dict(block_len=2) if name == "train_block" else {}
    cfg = SCRIPTS[name].Config(vocab_size=V, seq_len=T, n_layer=n_layer, n_head=1, n_embd=8,
                               **settings)
    torch.manual_seed(1)
    model = SCRIPTS[name].Model(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model.eval(), cfg

@pytest.mark.parametrize("name, how", [
    ("train_mdlm", {}), ("train_block", {}), ("train_sedd", {}),
    *(("train_mdlm", dict(block_length=2, cache=cache)) for cache in ("", "prefix", "dual"))])
@pytest.mark.parametrize("steps, threshold", [(None, None), (2, None), (1, None), (None, 0.4)])
def test_a_decoder_gives_all_texts_probability_1(name, how, steps, threshold):
    model, cfg = random_model(name, n_layer=2)
    for order in ("l2r", "r2l", *sample.RANKS):
        choose, u = likelihood.make_rule(order, (1, T), torch.Generator(), threshold)
        nats, when = likelihood.chain_rule(
            model, cfg, name[6:], TEXTS, choose, u.expand(len(TEXTS), T), steps,
            is_blind=order in likelihood.BLIND and threshold is None, **how)
        assert nats.sum(1).neg().exp().sum().item() == pytest.approx(1, abs=1e-5), order
        assert order != "l2r" or (when.diff() >= 0).all()
        if threshold is None:
            n_blocks = 2 if how or name == "train_block" else 1
            assert (when.amax(1) == min(T, n_blocks * (steps or T))).all()

@pytest.mark.parametrize("n_tokens", [1, 2])
def test_a_rule_that_sees_the_true_token_is_no_decoder(n_tokens):
    model, cfg = random_model("train_mdlm")

    def peek(log_probs, is_mask, **_):
        rank = torch.full(is_mask.shape, -math.inf)
        rank[is_mask] = log_probs.gather(1, TEXTS[is_mask][:, None])[:, 0]
        return is_mask & (rank.argsort(1, descending=True).argsort(1) >= n_tokens)

    nats, _ = likelihood.chain_rule(model, cfg, "mdlm", TEXTS, peek, TEXTS.double())
    assert nats.sum(1).neg().exp().sum() > 1.2

@pytest.mark.parametrize("name, settings", [("train_mdlm", {}), ("train_sedd", {"normalized": 1})])
def test_the_mean_over_random_orders_is_the_nelbo(name, settings):
    """Over all orders, and all masks that the bound can draw."""
    model, cfg = random_model(name, **settings)
    script, by_order, by_mask = SCRIPTS[name], [], []
    for order in itertools.permutations(range(T)):
        order = torch.tensor(order).expand(len(TEXTS), T)
        nats, _ = likelihood.chain_rule(model, cfg, name[6:], TEXTS, sample.ordered("random"),
                                        1 - order / T, is_blind=True)
        by_order.append(nats.sum(1))
        for k in range(1, T + 1):
            noise = script.draw_noise(cfg, len(TEXTS), torch.Generator().manual_seed(0), bound=True)
            level = torch.full((len(TEXTS),), float(k))
            noise = noise._replace(level=level, weight=T / level, score=order.float(),
                                   sigma=-torch.log1p(-level / (T + 1)))
            by_mask.append(script.nelbo_fn(model, TEXTS, noise, cfg).detach().double())
    by_order, by_mask = (torch.stack(x).mean(0) for x in (by_order, by_mask))
    assert torch.allclose(by_order, by_mask, atol=1e-5), (by_order - by_mask).abs().max()

def test_gaps_by_prefix_are_local():
    difference = torch.arange(8.0).double().expand(6, 8)
    rows = likelihood.prefix_gap(difference, torch.full((6, 8), 2))
    assert [r["gap"] for r in rows] == [0, 1, 2.5, 5.5] and all(r["se"] == 0 for r in rows)
    rest = [tuple(r[key] for key in ("first", "last", "cumulative", "tail")) for r in rows]
    assert rest == [(0, 0, 0, 3.5), (1, 1, 0.5, 4), (2, 3, 1.5, 4.5), (4, 7, 3.5, 5.5)]
    assert rows[2]["bpb"] == pytest.approx(2.5 / 2 / math.log(2))

def test_likelihood_from_a_checkpoint(tmp_path):
    data = make_data(tmp_path)
    for name in ("train_mdlm", "gpt"):
        make_checkpoint(tmp_path / f"{name}.pt", name, data=str(data))
    common = (f"--ckpt={tmp_path}/train_mdlm.pt", "--windows=6", "--device=cpu")
    out = runs.train(*common, "--orders=l2r,random:2,confidence", f"--out={tmp_path}/a.json",
                     f"--against={tmp_path}/gpt.pt", script=likelihood)
    done = json.loads((tmp_path / "a.json").read_text())
    rows = {row["order"]: row for row in done["rows"]}
    assert out.status == 0 and rows.keys() == {"NELBO", "l2r", "random:2", "confidence"}, out.err
    assert [row["nfe"] for row in rows.values()] == [None, 32, 32, 32], rows
    mean, error = rows["random:2"]["minus_nelbo"]
    assert abs(mean) < 4 * error
    runs.train(f"--ckpt={tmp_path}/gpt.pt", *common[1:], "--orders=l2r", f"--out={tmp_path}/b.json",
               script=likelihood)
    other, = json.loads((tmp_path / "b.json").read_text())["rows"]
    difference = rows["l2r"]["nats"][0] - other["nats"][0]
    assert done["gap"][-1]["cumulative"] == pytest.approx(difference, abs=1e-5)
    runs.train(*common, "--orders=random", "--steps=4", "--block_length=8",
               "--cache=none,prefix,dual", f"--out={tmp_path}/c.json", script=likelihood)
    none, *cached = json.loads((tmp_path / "c.json").read_text())["rows"][1:]
    assert none["nfe"] == 16 and [row["cache"] for row in cached] == ["prefix", "dual"]
    for row in cached:
        difference = row["nats"][0] - none["nats"][0]
        assert difference == pytest.approx(row["minus_uncached"][0]) and difference
    for flag, *words in ("--orders=best", "=best", "margin"), ("--cache=dual", "--block_length"):
        runs.assert_refused(runs.train(*common, flag, script=likelihood), *words)

BYTES = sample.Tokenizer({"tokenizer": "byte", "bos_id": 0}, 256)
CHAIN = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4]], dtype=torch.float64)
LAW = torch.linalg.matrix_power(CHAIN, 99)[0]  # of a letter: a, b or c

def bigram_judge(context=64):
    """The exact judge of letters drawn from CHAIN."""
    table = torch.full((257, 256), 1e-30, dtype=torch.float64)
    table[97:100, 97:100], table[256, 97:100] = CHAIN, LAW
    return judge.Judge("bigram", lambda text: list(text.encode()), BYTES.table, [256], context,
                       lambda x: (table.log()[x], torch.nn.functional.one_hot(x, 257).double()))

def letters(n, length, seed=0):
    gen = torch.Generator().manual_seed(seed)
    rows = [LAW.multinomial(n, True, generator=gen)]
    for _ in range(length - 1):
        rows.append(CHAIN[rows[-1]].multinomial(1, generator=gen)[:, 0])
    return (97 + torch.stack(rows, 1)).tolist()

def test_an_exact_judge_finds_the_entropy_rate():
    entropy = -(LAW * LAW.log()).sum().item()
    rate = -(LAW @ (CHAIN * CHAIN.log())).sum().item()
    rows = [(row, [False] * 40) for row in letters(500, 40)]
    figures, features = judge.measure(bigram_judge(), BYTES, rows)
    nats, error = figures["nats_per_judge_token"]
    assert abs(nats - (entropy + 39 * rate) / 40) < 4 * error < 0.04
    found = figures["gen_ppl"][0], figures["bits_per_byte"][0]
    assert found == pytest.approx((math.exp(nats), nats / math.log(2)))
    assert features.argmax(1).tolist() == [row[-1] for row, _ in rows]
    # A text longer than the context is read in windows, and the first token can be left out.
    windowed, _ = judge.measure(bigram_judge(context=9), BYTES, rows)
    assert windowed["gen_ppl"] == pytest.approx(figures["gen_ppl"])
    later, _ = judge.measure(bigram_judge(), BYTES, rows, no_start=True)
    assert later["judge_tokens"] == 500 * 39 and later["gen_ppl"][0] < figures["gen_ppl"][0]
    # A sharper sampler: lower perplexity and lower entropy together.
    dull, _ = judge.measure(bigram_judge(), BYTES, [([97] * 40, [False] * 40)] * 2)
    assert dull["gen_ppl"][0] < figures["gen_ppl"][0] and dull["entropy"] == (0, 0)

def test_prompts_and_what_begins_documents_are_not_scored():
    row, known = judge.trim([0, *b"abcab", 0, *b"ccc"], [True] * 3 + [False] * 7, 9, 0, cut=True)
    assert bytes(row) == b"abcab" and known == [True] * 2 + [False] * 3
    row, _ = judge.trim([0, *b"abcab", 0, *b"ccc"], [False] * 10, 8, 0, cut=False)
    assert bytes(row) == b"abcabcc"
    figures, _ = judge.measure(bigram_judge(), BYTES, [(list(b"abcab"), known)] * 2)
    want = -sum(CHAIN["abc".index(a), "abc".index(b)].log().item() for a, b in ("bc", "ca", "ab"))
    assert figures["tokens"] == figures["judge_tokens"] == 6
    assert figures["nats_per_judge_token"][0] == pytest.approx(want / 3)

def test_diversity_and_retokenizing():
    assert judge.entropy([5, 5, 5]) == 0 and judge.entropy([3, 1, 2]) == pytest.approx(math.log(3))
    assert judge.distinct([1, 2, 1, 2], 2) == 2 / 3 and judge.distinct([1], 2) == 0
    assert judge.repeated([1, 2, 3, 4, 9, 1, 2, 3, 4]) == 4 / 9
    own = types.SimpleNamespace(table=[b"", b"a", b"b", b"ab"], spans=lambda tokens, kinds: [
        (own.table[token].decode(), kind) for token, kind in zip(tokens, kinds, strict=True)])
    joined = bigram_judge()._replace(
        encode=lambda text: [3] * (len(text) // 2), table=own.table,
        forward=lambda x: (torch.zeros(*x.shape, 4), torch.zeros(*x.shape, 1)))
    rows = [([3, 1, 2, 3], [False] * 4), ([3, 3, 3, 1, 2], [False] * 5)]
    assert judge.measure(joined, own, rows)[0]["retokenized"] == 2 / 7

def test_mauve_is_an_area(monkeypatch):
    p, q = torch.tensor([3.0, 5, 2]), torch.tensor([1.0, 4, 5])
    assert mauve.area(p, p) == pytest.approx(1) and mauve.area(p, q) < 0.9
    assert mauve.area(p, q) == pytest.approx(mauve.area(q, p))
    one, other = torch.eye(2)
    assert mauve.area(one, other) == pytest.approx(0.0041, abs=5e-5)
    gen = torch.Generator().manual_seed(0)
    a, b, far = torch.randn(3, 200, 8, generator=gen) + 3 * torch.tensor([0, 0, 1])[:, None, None]
    near, apart = mauve.mauve(a, b), mauve.mauve(a, far)
    assert near["mauve"][0] > 0.8 and apart["mauve"][0] < apart["mauve_star"][0] < 0.2
    monkeypatch.setattr(mauve, "POINTS", 20_001)
    assert mauve.area(one, other) == pytest.approx(1 / 252, abs=1e-5)

def test_a_judge_from_a_checkpoint(tmp_path):
    data, path = make_data(tmp_path), tmp_path / "mine.jsonl"
    make_checkpoint(tmp_path / "gpt.pt", "gpt", data=str(data))
    about = dict(script="train_mdlm", sampler="random", seed=0, tokenizer="byte", checkpoint="")
    lines = [dict(tokens=[97] * 30, known=[[0, 97]], nfe=30)] * 8
    path.write_text("\n".join(map(json.dumps, [about, *lines])))
    flags = (path, f"--reference={data}", f"--judge={tmp_path}/gpt.pt", "--device=cpu")
    out = runs.train(*flags, "--start=anywhere", "--mauve=1", f"--out={tmp_path}/judge.json",
                     script=judge)
    real, mine = json.loads((tmp_path / "judge.json").read_text())["rows"]
    assert "real text" in real["text"] and mine["n"] == 8 and mine["tokens"] == 8 * 29
    for words in ("| mine | 8 | 30 | 232 |", "* ±", "trained on this text", "do not quote"):
        assert words in out.out, out
    done = runs.train(f"--data={data}", *flags[2:], "--tokens=1000", f"--out={tmp_path}/h.npy",
                      script=entropy)
    assert done.status == 0 and np.load(tmp_path / "h.npy").shape == (256,), done.err
    path.write_text(json.dumps(dict(about, tokenizer="gpt2")) + "\n" + json.dumps(lines[0]))
    runs.assert_refused(runs.train(*flags, script=judge), "mine", "gpt2")

def test_gpt2_as_judge():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32))
    try:
        gpt2 = judge.gpt2_judge("gpt2", "cpu", "fp32", model=model)
    except OSError:  # requests' errors are
        pytest.skip("the vocabulary of GPT-2 is not at hand")
    tokens = gpt2.encode("To be or not to be")
    law = model.eval()(torch.tensor([[50256, *tokens]])).logits[0].log_softmax(-1)
    nats, _ = judge.read(gpt2, [tokens])
    assert nats[0] == pytest.approx([-law[i, t].item() for i, t in enumerate(tokens)], abs=1e-5)

def test_entropy_of_tokens_in_closed_form():
    """H_v: the entropy of what may follow u, over the letters u that come before v."""
    text = torch.tensor(letters(3000, 30))
    total, count = entropy.add_up(bigram_judge(), text.split(500), 256, "entropy")
    want = (LAW * -(CHAIN * CHAIN.log()).sum(1)) @ CHAIN / LAW
    want = (29 * want - (LAW * LAW.log()).sum()) / 30  # the first letter follows the start alone
    assert torch.allclose((total / count)[97:100], want, atol=0.01)

def test_the_mean_masked_share_is_that_of_uniform_masking():
    """Also where clamps bite, and with tokens that hardly occur."""
    count = torch.tensor([900.0, 90, 9, 1, 0]).double()
    total = count * torch.tensor([0.1, 3.0, 0.5, 9.0, 0.0]).double()
    unit, shares = entropy.in_units(total, count, min_count=5)
    assert unit[3] == unit[4] == 1
    times = torch.linspace(0, 1, 1001)[:, None]  # the linear schedule's masked fractions
    masked = (1 - (1 - times) ** (2 - unit[:3]).clamp(0.5, 1.5)).mean(0)
    assert (count[:3] * masked).sum() / count[:3].sum() == pytest.approx(0.5, abs=1e-3)
    assert shares["by text"] == pytest.approx(1, abs=1e-6) and shares["by vocabulary"] > 1.1

@pytest.mark.parametrize("extra", [0, 0.05])
def test_only_another_loss_differs_from_ours(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(crosscheck, "COPIES", 1)
    (tmp_path / "evaluate_fineweb.py").write_text(f"""import torch, lit_gpt.model
def get_loss_diff(model, x):
    p = 1e-3 + (1 - 1e-3) * torch.rand(len(x), 1)
    is_mask = torch.rand(x.shape) < p
    answer = model(torch.where(is_mask, 32_000, x)).mT
    nats = torch.nn.functional.cross_entropy(answer, x, reduction="none")
    return (nats * is_mask / (p + {extra})).mean()""")
    out = runs.train(f"--smdm={tmp_path}", "--draws=4", script=crosscheck)
    difference, error = (float(x) for x in out.out.split("|")[-3:-1])
    assert difference > 5 * error if extra else abs(difference) < 1e-6, out
    runs.assert_refused(runs.train(f"--mdlm={tmp_path}", script=crosscheck), "no diffusion.py")
