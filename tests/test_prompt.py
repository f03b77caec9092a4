"""The first prompt_len tokens of a window are given: never masked, never scored. The bound is then
that of the others, given them."""
import math

import pytest
import torch
import torch.nn.functional as F
import toys
from toys import AbsorbScore, Blocks, Joint, LeftToRight, UniformScore, correlated, seeded

import gpt
import train_block
import train_mdlm
import train_sedd

V, T = 2, 4
JOINT = Joint(correlated(V, T))
ELBO = dict(loss_weight="elbo")
CASES = {  # (script, exact denoiser, settings, tokens of the prompt)
    "mdlm": (train_mdlm, JOINT, ELBO, 2),
    "gpt": (gpt, LeftToRight(JOINT, T), {}, 3),
    "absorb": (train_sedd, AbsorbScore(JOINT), {}, 1),
    "block": (train_block, Blocks(JOINT, T, 2), dict(block_len=2, t_min=0.0, t_max=1.0, **ELBO), 2),
    "inside a block": (train_block, Blocks(JOINT, T, 2), dict(block_len=2), 1),
    "the end, too": (train_block, Blocks(JOINT, T, 3), dict(block_len=3), 1),
}

def given(x0, prompt_len):
    """(B, T) -> (B,) exact nats of what follows the prompt, given it."""
    prompt = JOINT.p.view(V**prompt_len, -1).sum(1)  # its law
    return JOINT.nll(x0) + prompt[JOINT.code(x0, V) // V**(T - prompt_len)].log()

@pytest.mark.parametrize("name", CASES)
def test_bound_is_that_of_the_answer(name):
    script, model, names, prompt_len = CASES[name]
    cfg = script.Config(vocab_size=V, seq_len=T, prompt_len=prompt_len, **names)
    gen, n_rows = seeded(1), 4096
    x0, noise = JOINT.draw(n_rows, gen), script.draw_noise(cfg, n_rows, gen, bound=True)
    nelbo = script.nelbo_fn(model, x0, noise, cfg).double()
    difference = nelbo - given(x0, prompt_len)
    error = difference.std() / math.sqrt(n_rows)
    assert abs(difference.mean()) <= toys.Z_LIMIT * error + 1e-6 and error < 0.02
    if name != "gpt":
        xt = script.corrupt(x0, noise, cfg)
        assert torch.equal(xt[:, :prompt_len], x0[:, :prompt_len]) and (xt == V).any()
    if "loss_weight" in names or name in ("gpt", "absorb"):  # the loss is the mean of the bound
        loss = script.loss_fn(model, x0, noise, cfg)
        torch.testing.assert_close(loss * (T - prompt_len), nelbo.mean().float())

def test_uniform_noise_spares_the_prompt():
    """Whatever the network says at the prompt, the bound is that of the answer alone."""
    answer = Joint(correlated(V, 2))
    short = train_sedd.Config(vocab_size=V, seq_len=2, graph="uniform")
    long = train_sedd.Config(vocab_size=V, seq_len=5, prompt_len=3, graph="uniform")

    def model(xt, sigma, rows=None):
        log_score = UniformScore(answer)(xt[:, 3:], sigma)
        return toys.take_rows(F.pad(log_score, (0, 0, 3, 0), value=7.0), rows)

    n_rows = 4096
    x0 = answer.draw(n_rows, seeded(2))
    bounds = []
    for cfg, network in ((short, UniformScore(answer)), (long, model)):
        tokens = F.pad(x0, (cfg.prompt_len, 0))
        noise = train_sedd.draw_noise(cfg, n_rows, seeded(3), bound=True)
        assert torch.equal(train_sedd.corrupt(tokens, noise, cfg)[:, :cfg.prompt_len],
                           tokens[:, :cfg.prompt_len])
        bounds.append(train_sedd.nelbo_fn(network, tokens, noise, cfg).double())
    error = (bounds[0] - bounds[1]).std() / math.sqrt(n_rows)
    assert abs((bounds[0] - bounds[1]).mean()) < toys.Z_LIMIT * error

def test_row_mean_is_the_bound_but_for_rows_without_masks():
    """1 / (masks of a row) is the weight T / k of the bound; one of T + 1 counts is 0."""
    cfg = train_mdlm.Config(vocab_size=V, seq_len=T, estimator="bernoulli", loss_weight="row_mean")
    gen = seeded(4)
    losses = torch.stack([train_mdlm.loss_fn(
        JOINT, JOINT.draw(64, gen), train_mdlm.draw_noise(cfg, 64, gen), cfg) for _ in range(200)])
    losses = losses[losses.isfinite()].double()  # of more masks than there are rows for the head
    z = (losses.mean() - JOINT.entropy / (T + 1)) / (losses.std() / math.sqrt(len(losses)))
    assert abs(z) < toys.Z_LIMIT and len(losses) > 190
