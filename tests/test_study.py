"""The programs of the study against what is known exactly: enumerated likelihoods, closed forms."""
import itertools
import json
import math

import pytest
import runs
import torch
from runs import make_data, one_thread  # noqa: F401
from test_golf import make_checkpoint
from toys import _grid

import sample
from study import likelihood

SCRIPTS = {name: sample.load_script(runs.ROOT / f"{name}.py") for name in sample.SCRIPTS}
KINDS = {"train_mdlm": "mdlm", "train_block": "block", "train_sedd": "sedd", "gpt": "gpt"}
V, T = 3, 4
TEXTS = _grid(V, T)  # (81, T), all of them


def call(program, *flags):
    return runs.train(*flags, script=program)


def table_of(result):
    """A printed markdown table -> [{column: cell}]"""
    assert result.status == 0, result.err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines()
            if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def random_model(name, **settings):
    """A network of random weights, whose answers do not belong to one joint distribution."""
    settings = dict(block_len=2) | settings if name == "train_block" else settings
    cfg = SCRIPTS[name].Config(**{"vocab_size": V, "seq_len": T, "n_layer": 1, "n_head": 1,
                                  "n_embd": 8, **settings})
    torch.manual_seed(1)
    model = SCRIPTS[name].Model(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model.eval(), cfg


# ----------------------------------------------------------------------------- likelihood
@pytest.mark.parametrize("name", ["train_mdlm", "train_block", "train_sedd"])
@pytest.mark.parametrize("steps, threshold", [(None, None), (2, None), (1, None), (None, 0.4)])
def test_a_decoder_gives_all_texts_probability_1(name, steps, threshold):
    model, cfg = random_model(name)
    totals = {}
    for order in ("l2r", "r2l", *sample.RANKS):
        gen = torch.Generator().manual_seed(0)
        choose, u = likelihood.make_rule(order, (1, T), gen, threshold)
        nats, when = likelihood.chain_rule(
            model, cfg, KINDS[name], TEXTS, choose, u.expand(len(TEXTS), T), steps,
            is_blind=order in likelihood.BLIND and threshold is None)
        totals[order] = nats.sum(1).neg().exp().sum().item()
        if threshold is None:
            blocks = 2 if name == "train_block" else 1
            assert (when.amax(1) == min(T, blocks * (steps or T))).all()
    assert all(abs(total - 1) < 1e-5 for total in totals.values()), totals


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_a_rule_that_sees_the_true_token_is_no_decoder(n_tokens):
    model, cfg = random_model("train_mdlm")

    def peek(log_probs, is_mask, **_):
        rank = torch.full(is_mask.shape, -math.inf)
        rank[is_mask] = log_probs.gather(1, TEXTS[is_mask][:, None])[:, 0]
        return is_mask & (rank.argsort(1, descending=True).argsort(1) >= n_tokens)

    nats, _ = likelihood.chain_rule(model, cfg, "mdlm", TEXTS, peek, TEXTS.double())
    assert nats.sum(1).neg().exp().sum() > 1.2


@pytest.mark.parametrize("name", ["train_mdlm", "train_sedd"])
def test_the_mean_over_random_orders_is_the_nelbo(name):
    """Over all orders, and all masks that the bound can draw. Score entropy needs scores that are
    normalised to be that bound."""
    model, cfg = random_model(name, **{"normalized": True} if name == "train_sedd" else {})
    script, by_order, by_mask = SCRIPTS[name], [], []
    for order in itertools.permutations(range(T)):
        order = torch.tensor(order).expand(len(TEXTS), T)
        nats, _ = likelihood.chain_rule(model, cfg, KINDS[name], TEXTS, sample.ordered("random"),
                                        1 - order / T, is_blind=True)
        by_order.append(nats.sum(1))
        for k in range(1, T + 1):
            noise = script.draw_noise(cfg, len(TEXTS), torch.Generator().manual_seed(0), bound=True)
            level = torch.full((len(TEXTS),), float(k))
            noise = noise._replace(level=level, weight=T / level, score=order.float(),
                                   sigma=-torch.log1p(-level / (T + 1)))
            with torch.no_grad():
                by_mask.append(script.nelbo_fn(model, TEXTS, noise, cfg).double())
    a, b = torch.stack(by_order).mean(0), torch.stack(by_mask).mean(0)
    assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


def test_gaps_by_prefix_are_local():
    difference = torch.arange(8.0).double().expand(6, 8)
    rows = likelihood.prefix_gap(difference, torch.full((6, 8), 2))
    assert [(r["first"], r["last"]) for r in rows] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert [r["gap"] for r in rows] == [0, 1, 2.5, 5.5] and all(r["se"] == 0 for r in rows)
    assert [r["cumulative"] for r in rows] == [0, 0.5, 1.5, 3.5]
    assert [r["tail"] for r in rows] == [3.5, 4, 4.5, 5.5]
    assert rows[2]["bpb"] == pytest.approx(2.5 / 2 / math.log(2))


def test_likelihood_from_a_checkpoint(tmp_path):
    data = make_data(tmp_path)
    for name in ("train_mdlm", "gpt"):
        make_checkpoint(tmp_path / f"{name}.pt", name, data=str(data))
    common = (f"--ckpt={tmp_path}/train_mdlm.pt", "--windows=6", "--device=cpu")
    out = call(likelihood, *common, "--orders=l2r,random:2,confidence", f"--out={tmp_path}/a.json",
               f"--against={tmp_path}/gpt.pt")
    rows = {row["order"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert out.status == 0 and rows.keys() == {"NELBO", "l2r", "random:2", "confidence"}, out.err
    assert "32.0" in out.out and rows["l2r"]["nfe"] == 32 and rows["l2r"]["minus_l2r"] == [0, 0]
    mean, error = rows["random:2"]["minus_nelbo"]
    assert abs(mean) < 4 * error
    gap = json.loads((tmp_path / "a.json").read_text())["gap"]
    own, other = rows["l2r"]["nats"][0], call(likelihood, f"--ckpt={tmp_path}/gpt.pt", *common[1:],
                                              "--orders=l2r", f"--out={tmp_path}/b.json")
    other = json.loads((tmp_path / "b.json").read_text())["rows"][0]["nats"][0]
    assert gap[-1]["cumulative"] == pytest.approx(own - other, abs=1e-5)
    runs.assert_refused(call(likelihood, *common, "--orders=best"), "--orders=best", "margin")
    runs.assert_refused(call(likelihood, *common, "--windows=5"), "--windows=5")
