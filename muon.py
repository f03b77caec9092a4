"""Muon: momentum, orthogonalised. For the hidden matrices of a network; AdamW takes the rest.

    m <- beta m + (1 - beta) g                   momentum
    u  = (1 - beta) g + beta m                   Nesterov look-ahead (or u = m)
    o  = NS(u)                                   close to U V^T, where u = U S V^T
    w <- (1 - lr wd) w - lr max(1, rows/cols)^.5 o

An (out, in) matrix with orthonormal rows or columns changes every output by about the same amount
whatever its shape, so one learning rate serves all hidden matrices. Three options: `cautious`
decay only where it pulls the same way as the update, `beta2` NorMuon's second moment per output
neuron, and, when torch.distributed is initialised, Newton-Schulz shared out over the ranks.

References: Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
NorMuon, arXiv 2510.05491. Cautious weight decay, arXiv 2510.12402.
"""

import torch
import torch.distributed as dist

# The quintic of Jordan et al.: steepest at 0 among those that keep [0, 1] bounded. It does not
# converge to 1: five steps take singular values between .002 and 1 to between .68 and 1.21.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7  # floor of the Frobenius norm, for a gradient of zeros
CPU_STACK = 4  # matrices multiplied at a time on CPU: larger stacks leave the cache (8% slower)
NORMUON_EPS = 1e-8  # added to a row's rms; the smallest that matters is about cols^-.5

def default_ns_dtype(device):
    """bfloat16 where the device multiplies in it natively, float32 elsewhere."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32

def newton_schulz(G, steps=5, dtype=torch.bfloat16):
    """Move every singular value of G towards 1; the singular vectors stay.

    G (rows, cols) or a stack (k, rows, cols) of any float type -> the same shape in `dtype`.
    Each step is X <- a X + b (X X^T) X + c (X X^T)^2 X on X scaled to Frobenius norm 1. A matrix
    gets the same bits on CPU whatever else is in its stack.
    """
    a, b, c = NS_COEFFICIENTS
    tall = G.size(-2) > G.size(-1)
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = (X.mT if tall else X).contiguous()  # (k, short, long): the Gram matrix is the small one
    # By row first: a sum over a whole matrix would be split by thread count and stack size.
    wide = torch.promote_types(dtype, torch.float32)
    norm = torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=wide)
    norm = torch.linalg.vector_norm(norm, dim=-2, keepdim=True).clamp(min=NS_EPS)
    X = X / norm.to(dtype)
    for _ in range(steps):
        A = torch.bmm(X, X.mT)                       # (k, short, short)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)           # a X + B X
    return (X.mT if tall else X).reshape(G.shape)

def muon_update(grad, momentum, beta=0.95, nesterov=True, steps=5, dtype=torch.bfloat16):
    """The orthogonalised direction, before learning rate and shape scale.

    grad and momentum (rows, cols) or (k, rows, cols); `momentum` already holds this gradient.
    Nothing is changed in place. -> the same shape in `dtype`.
    """
    u = grad.lerp(momentum, beta) if nesterov else momentum
    return newton_schulz(u, steps, dtype)

def normuon_scale(update, second_moment, beta2):
    """NorMuon (2510.05491, algorithm 1): divide each row by its running rms, keep the norm.

    update (k, rows, cols) float32, second_moment (k, rows, 1) -> both, new. The paper sets the
    Frobenius norm to a constant; here it stays as it was, so that `lr` means the same with and
    without. No bias correction: it would be a common factor, which restoring the norm removes.
    """
    second_moment = second_moment.lerp(update.square().mean(-1, keepdim=True), 1 - beta2)
    scaled = update / (second_moment.sqrt() + NORMUON_EPS)
    old, new = (torch.linalg.matrix_norm(x, keepdim=True) for x in (update, scaled))
    return scaled * (old / new.clamp(min=NS_EPS)), second_moment

class Muon(torch.optim.Optimizer):
    """Muon for float32 parameters that are matrices or (k, rows, cols) stacks of them.

    lr: about .02, the spectral norm of a step. weight_decay: times lr, not the shape scale.
    momentum, lr and the other values may be changed in `param_groups` before any step.
    beta2: NorMuon's decay rate, None = off. ns_dtype: None = `default_ns_dtype` of the device.
    Plain settings give the parameters of `torch.optim.Muon(adjust_lr_fn="original")`.

    Ranks: gradients must be averaged already. Every rank holds the whole state, which costs memory
    but makes any rank's state_dict complete and independent of the number of ranks; only
    Newton-Schulz, where the time goes, is divided, and its results travel in `ns_dtype`.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True,
                 ns_steps=5, cautious=False, beta2=None, ns_dtype=None):
        if lr < 0:
            raise ValueError(f"lr must be 0 or more, not {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {momentum}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more, not {weight_decay}")
        if beta2 is not None and not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must be None or in [0, 1), not {beta2}")
        if ns_steps < 1:
            raise ValueError(f"ns_steps must be 1 or more, not {ns_steps}")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
                        ns_steps=ns_steps, cautious=cautious, beta2=beta2)
        super().__init__(params, defaults)
        # Not in a group: it belongs to the device, and a checkpoint may move to another.
        self.ns_dtype = ns_dtype

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim not in (2, 3) or p.dtype != torch.float32 or p.numel() == 0:
                raise ValueError("Muon takes float32 matrices (rows, cols) or stacks of them, not "
                                 f"{p.dtype} of shape {tuple(p.shape)}: give that one to AdamW")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launched = []
        for group in self.param_groups:
            for bucket in self._buckets(group):
                launched.append((group, bucket, *self._orthogonalise(group, bucket)))
        # A loop of its own: one bucket's exchange runs while the next is computed.
        for group, bucket, ortho, exchange in launched:
            if exchange is not None:
                exchange.wait()
            self._apply(group, bucket, ortho)
        return loss

    def _buckets(self, group):
        """Update the momenta, then sort matrices by shape: lists of (weight, grad, state views)."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            if group["beta2"] is not None and "second_moment" not in self.state[p]:
                self.state[p]["second_moment"] = p.new_zeros(*p.shape[:-1], 1)
        if params:
            torch._foreach_lerp_([self.state[p]["momentum"] for p in params],
                                 [p.grad for p in params], 1 - group["momentum"])
        buckets = {}
        for p in params:
            tensors = [p, p.grad, self.state[p]["momentum"]]
            if group["beta2"] is not None:
                tensors.append(self.state[p]["second_moment"])
            views = zip(*(x.view(-1, *x.shape[-2:]) for x in tensors), strict=True)
            buckets.setdefault((p.shape[-2:], p.device), []).extend(views)
        return buckets.values()

    def _orthogonalise(self, group, bucket):
        """-> ortho (len(bucket) or more, rows, cols), and the exchange that fills it."""
        weight = bucket[0][0]
        dtype = self.ns_dtype or default_ns_dtype(weight.device)
        sharded = dist.is_available() and dist.is_initialized()
        rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
        share = -(-len(bucket) // n_ranks)  # rounded up: the exchange needs equal shares
        mine = bucket[rank * share:(rank + 1) * share]
        ortho = weight.new_empty(share, *weight.shape, dtype=dtype)  # the last may stay part empty
        stride = CPU_STACK if weight.device.type == "cpu" else share
        for i in range(0, len(mine), stride):
            _, grads, momenta, *_ = zip(*mine[i:i + stride], strict=True)
            ortho[i:i + len(grads)] = muon_update(torch.stack(grads), torch.stack(momenta),
                                              group["momentum"], group["nesterov"],
                                              group["ns_steps"], dtype)
        if n_ranks == 1:
            return ortho, None
        gathered = ortho.new_empty(n_ranks * share, *weight.shape)
        # Renamed in PyTorch 2.13, which warns of the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gathered, all_gather(gathered, ortho, async_op=True)

    def _apply(self, group, bucket, ortho):
        weights, _, _, *second_moments = map(list, zip(*bucket, strict=True))
        ortho = ortho[:len(bucket)].float()
        if second_moments:
            ortho, v = normuon_scale(ortho, torch.stack(second_moments[0]), group["beta2"])
            torch._foreach_copy_(second_moments[0], v.unbind())
        rows, cols = weights[0].shape
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            W = torch.stack(weights)
            torch._foreach_sub_(weights, (W * (ortho * W >= 0)).unbind(), alpha=decay)
        elif decay:
            torch._foreach_mul_(weights, 1 - decay)
        torch._foreach_add_(weights, ortho.unbind(), alpha=-lr * max(1, rows / cols) ** 0.5)
