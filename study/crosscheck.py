"""The bounds beside others' code: same networks, same noise, and what theirs leaves out.

    python study/crosscheck.py --sedd=PATH --mdlm=PATH --bd3lms=PATH --duo=PATH --smdm=PATH

Any of these checkouts, tried with: louaaron/Score-Entropy-Discrete-Diffusion 0605786,
kuleshov-group/mdlm c112c52, kuleshov-group/bd3lms 1c3e8f4, s-sahoo/duo 7c9b498, ML-GSAI/SMDM
583aa47. Their loss is called as it is, on bytes, with networks of ours (2 layers, random weights).
Stand-ins take the place of what they import but do not compute with. Nats per token:

ours        the bound B, by the noise of evaluation: --draws=32 of 33 rows for each of 63 windows
theirs      the mean of their losses, by noise of theirs, whose weights 1/t make it the rougher one
left out    they average over t in (e, 1), e = .001. If `outside` is the part of B that belongs to
            noise below that of t = e or above that of t = 1: B - (B - outside) / (1 - e)
difference  ours - theirs in pairs, without what is left out: both draw t, coins and tokens from one
            seed, in this order, and ours has the weights of their interval. Errors are over draws
"""
import importlib
import itertools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace as Names
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_block  # noqa: E402
import train_mdlm  # noqa: E402
import train_sedd  # noqa: E402
from study.golf import require, run_cli  # noqa: E402

V, T, L, EPS = 256, 9, 3, 1e-3
WINDOWS, COPIES = 63, 33  # odd, as T / L is: nelbo_fn then has room for any number of masks
STAND_INS = dict.fromkeys("""dataloader einops evaluate_diff fsspec hydra hydra.utils lit_gpt
    lit_gpt.diffmodel lit_gpt.model metrics model.transformer models omegaconf safetensors
    safetensors.torch tqdm transformers utils""".split(), mock.MagicMock())
STAND_INS |= dict(lightning=Names(LightningModule=object),  # what classes derive from
                  huggingface_hub=Names(PyTorchModelHubMixin=object),
                  torchmetrics=Names(aggregation=Names(MeanMetric=object)))
SCHEDULES = {  # t -> sigma, dsigma/dt
    "sigma": lambda t: (t, torch.ones_like(t)),
    "linear": lambda t: (-torch.log1p(-t), 1 / (1 - t)),
    "loglinear": lambda t: train_sedd.total_noise(t, train_sedd.Config()),
    "geometric": lambda t: train_sedd.total_noise(t, train_sedd.Config(noise="geometric"))}

def load(root, name):
    """A module of a checkout, forgotten again: others have modules of the same names."""
    require((root / f"{name}.py").is_file(), f"{root}: not such a checkout: no {name}.py in it")
    with (mock.patch.dict(sys.modules, STAND_INS), mock.patch.object(torch, "compile"),
          mock.patch.object(sys, "path", [str(root), *sys.path])):
        return importlib.import_module(name)

def network(script, **settings):
    """-> script, model, cfg, prior in nats per token or, but for the uniform graph, None"""
    cfg = script.Config(vocab_size=V, seq_len=T, n_layer=2, n_head=2, n_embd=32, **settings)
    torch.manual_seed(0)
    model = script.Model(cfg).eval()
    for p in model.parameters():
        p += 0.2 * torch.randn_like(p)  # some begin as zeros
    return script, model, cfg, script.prior_nats(cfg) if "uniform" in settings.values() else None

def draw(net, x0, schedule, low=EPS, high=1.0):
    """Our losses without the prior, nats per token, for t between low and high."""
    script, model, cfg, prior = net
    t = torch.rand(len(x0), *[T // L] * (script is train_block))
    sigma, dsigma = SCHEDULES[schedule](low + (high - low) * t)
    score = torch.rand(x0.shape)
    token = torch.full_like(x0, V) if prior is None else torch.randint_like(x0, V)
    weight = dsigma / torch.expm1(sigma) if prior is None else dsigma
    given = dict(level=-torch.expm1(-sigma), sigma=sigma, weight=weight, score=score, token=token)
    noise = script.Noise(*(given[name] for name in script.Noise._fields))
    return script.nelbo_fn(model, x0, noise, cfg).mean() / T - (prior or 0)

def bound(net, x0, schedule):
    """-> B; its part outside their noise. With masks, let h(k) be the loss of a token that is one
    of k masked among n: p h(1) + q h(n) + O(e^2), if p are masked at t = e and 1 - q at t = 1."""
    script, model, cfg, prior = net
    noise = script.draw_noise(cfg, len(x0), torch.default_generator, bound=True)
    total = script.nelbo_fn(model, x0, noise, cfg).mean() / T
    first, last = SCHEDULES[schedule](torch.tensor([EPS, 1.0]))[0]
    if prior is not None:
        return total, first * draw(net, x0, "sigma", 0.0, first) + prior
    n, p, q = L if script is train_block else T, -torch.expm1(-first), torch.exp(-last)
    h = [script.nelbo_fn(model, x0, noise._replace(level=k, weight=n / k), cfg).mean() / T
         for k in (torch.ones_like(noise.level), torch.full_like(noise.level, n))]
    return total, p * h[0] + q * h[1]

class Called(torch.nn.Module):
    """A network of ours as they call theirs, with n more outputs: they have one for the mask."""
    def __init__(self, answer, n=1):
        super().__init__()
        self.answer, self.n = answer, n

    def forward(self, x, sigma=None, **_):
        return F.pad(self.answer(x, sigma), (0, self.n))

def logits(net):
    return lambda x, sigma: net[1].predict(x, torch.arange(T))

def stand_in(base, net, noise, n=1, **names):
    """An object of a class of theirs: not initialised, but with these attributes."""
    given = dict(backbone=Called(logits(net), n), noise=noise, T=0, mask_index=V, vocab_size=V + n,
                 neg_infinity=-1e6, antithetic_sampling=False, sampling_eps=EPS, ignore_bos=False,
                 time_conditioning=True)
    return object.__new__(type("StandIn", (base,), given | names))

# What each checkout offers: quantity, our network, their noise, their loss of x0.

def sedd(root):
    losses, noises = load(root, "losses"), load(root, "noise_lib")
    graphs = dict(absorb=losses.graph_lib.Absorbing(V), uniform=losses.graph_lib.Uniform(V))
    for graph, noise in itertools.product(graphs, ("loglinear", "geometric")):
        net = network(train_sedd, graph=graph, noise=noise)
        sigmas = dict(loglinear=noises.LogLinearNoise(),
                      geometric=noises.GeometricNoise(net[2].sigma_min, net[2].sigma_max))
        model = Called(net[1], n=int(graph == "absorb"))
        loss = losses.get_loss_fn(sigmas[noise], graphs[graph], train=False)
        yield (f"SEDD {graph}, {noise}: Score-Entropy-Discrete-Diffusion", net, noise,
               lambda x0, loss=loss, model=model: loss(model, x0) / T)

def mdlm(root):
    module = load(root, "diffusion")
    for name, kind, net in (("SEDD absorb, loglinear: mdlm", "sedd", network(train_sedd)),
                            ("MDLM: SUBS of mdlm", "subs", network(train_mdlm))):
        theirs = stand_in(module.Diffusion, net, module.noise_schedule.LogLinearNoise(),
                          parameterization=kind, config=Names(model=Names(length=T)),
                          importance_sampling=False, change_of_variables=False)
        yield (name, net, "loglinear",
               lambda x0, theirs=theirs: theirs._loss(x0, torch.ones_like(x0)).nlls)

def bd3lms(root):
    module, dit = load(root, "diffusion"), load(root / "models", "dit")
    net, place = network(train_block, block_len=L), torch.arange(2 * T)
    mask = dit.block_diff_mask(None, None, place[:, None], place, L, T)

    def attend(q, k, v, ctx):
        return F.scaled_dot_product_attention(q, k, v, mask[:q.size(2)])
    backbone = Called(lambda x, _: net[1].predict(x, place % T, n_query=T, attend=attend))
    config = Names(algo=Names(name="bd3lm"), model=Names(length=T), training=Names(resample=False))
    theirs = stand_in(module.Diffusion, net, module.noise_schedule.LogLinearNoise(), config=config,
                      backbone=backbone, parameterization="subs", cross_attn=True, block_size=L,
                      num_tokens=T, mdlm_loss_scale=False)
    yield ("BD3-LM: bd3lms with its mask, t independent", net, "linear",
           lambda x0: theirs._loss(x0, torch.ones_like(x0)).nlls)

def duo(root):
    algo = load(root, "algo")
    normalized = network(train_sedd, graph="uniform", normalized=True)
    for name, base, net, n in (("uniform, normalised: duo", algo.DUO_BASE, normalized, 0),
                               ("MDLM: duo", algo.MDLM, network(train_mdlm), 1)):
        theirs = stand_in(base, net, algo.trainer_base.LogLinear(EPS), n, device="cpu",
                          class_conditional=False, loss_type="elbo")
        yield name, net, "loglinear", lambda x0, theirs=theirs: theirs.nll(x0, None, None)

def smdm(root):
    module, net = load(root, "evaluate_fineweb"), network(train_mdlm)
    model = Called(lambda x, _: logits(net)(x.clamp(max=V), None), n=0)  # its mask is 32,000
    yield "MDLM: SMDM, evaluate_fineweb", net, "linear", lambda x0: module.get_loss_diff(model, x0)

CHECKOUTS = dict(sedd=sedd, mdlm=mdlm, bd3lms=bd3lms, duo=duo, smdm=smdm)

def compare(net, x0, schedule, loss, seed):
    """-> ours, what is outside their noise, theirs, ours - theirs on the same noise"""
    torch.manual_seed(seed)
    whole = bound(net, x0, schedule)
    torch.set_default_dtype(torch.float64)  # so that no coin falls between two roundings
    try:
        torch.manual_seed(seed)
        theirs = loss(x0).mean()
        torch.manual_seed(seed)
        return torch.stack((*whole, theirs, draw(net, x0, schedule) - theirs))
    finally:
        torch.set_default_dtype(torch.float32)

@torch.no_grad()
def run(flags):
    warnings.filterwarnings("ignore")
    paths = {name: getattr(flags, name) for name in CHECKOUTS if getattr(flags, name)}
    require(paths, f"give a checkout: --{'=PATH, --'.join(CHECKOUTS)}=PATH")
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()[:WINDOWS * T]))
    x0 = text.view(WINDOWS, T).repeat(COPIES, 1)
    print("| quantity, other code | ours | theirs | left out | difference | s.e. |")
    print("| --- " * 6 + "|")
    for name, path in paths.items():
        for quantity, net, schedule, loss in CHECKOUTS[name](Path(path).resolve()):
            found = torch.stack([compare(net, x0, schedule, loss, i) for i in range(flags.draws)])
            ours, outside, theirs, difference = found.mean(0).tolist()
            error = (found.std(0) / flags.draws**0.5).tolist()
            left = (outside - EPS * ours) / (1 - EPS)
            print(f"| {quantity} | {ours:.4f} ± {error[0]:.4f} | {theirs:.4f} ± {error[2]:.4f} | "
                  f"{left:+.4f} | {difference:+.0e} | {error[3]:.0e} |", flush=True)

def main(argv):
    run_cli("crosscheck.py", run, argv, __doc__, draws=32, **dict.fromkeys(CHECKOUTS, ""))

if __name__ == "__main__":
    main(sys.argv[1:])
