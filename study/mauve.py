"""MAUVE (Pillutla et al. 2021, arXiv 2102.01454): how alike two sets of texts are, from 0 to 1.

The features of all texts, normalised, are projected on the directions that hold 90% of their
variance and clustered into n/10 clusters. Between the two histograms p and q of the clusters lie
the mixtures r = w p + (1-w) q; the points (exp(-c KL(q|r)), exp(-c KL(p|r))) draw a curve, and
MAUVE is the area under it. The sums are those of mauve-text 0.4.
"""
import math

import torch
import torch.nn.functional as F

C, POINTS, SEEDS = 5, 25, 3  # scale of the divergences, mixtures, clusterings
VARIANCE = 0.9  # that the projection keeps
STARTS, STEPS = 5, 500  # of a clustering

def k_means(x, k, gen):
    """x (N, D) float64 -> cluster (N,) of the best of several starts, by Lloyd's algorithm."""
    best = math.inf, None
    for _ in range(STARTS):
        centers, before = x[torch.randperm(len(x), generator=gen)[:k]], None
        for _ in range(STEPS):
            distance, cluster = torch.cdist(x, centers).min(1)
            if before is not None and torch.equal(cluster, before):
                break
            before, total = cluster, torch.zeros_like(centers).index_add(0, cluster, x)
            count = cluster.bincount(minlength=k)[:, None]
            centers = torch.where(count > 0, total / count.clamp(min=1), centers)
        best = min(best, (distance.square().sum().item(), cluster), key=lambda pair: pair[0])
    return best[1]

def area(p, q):
    """The area under the divergence curve of two histograms (k,), as mauve-text computes it."""
    p, q = p.double() / p.sum(), q.double() / q.sum()
    w = torch.linspace(1e-6, 1 - 1e-6, POINTS, dtype=torch.float64)[:, None]
    r = w * p + (1 - w) * q  # (points, k)
    x, y = ((-C * torch.special.xlogy(a, a / r).sum(1)).exp() for a in (q, p))
    x, y = F.pad(x, (1, 1)), F.pad(y, (1, 1))
    x[0] = y[-1] = 1  # the ends of the curve: (1, 0) and (0, 1)
    return sum(torch.trapezoid(b[a.argsort()], a.sort().values) for a, b in ((x, y), (y, x))) / 2

def mauve(ours, theirs, seed=0):
    """Features (n, D) of two sets of texts -> {mauve, mauve_star: (mean, spread of seeds), k}
    star: with half a count more in every cluster, which is less biased."""
    x = F.normalize(torch.cat((ours, theirs)).double(), dim=1)
    x = x - x.mean(0)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    x = x @ v[:int((share < VARIANCE).sum()) + 1].T
    k, found = max(2, min(len(ours), len(theirs)) // 10), []
    for i in range(SEEDS):
        cluster = k_means(x, k, torch.Generator().manual_seed(seed + i))
        p, q = (c.bincount(minlength=k) for c in cluster.split([len(ours), len(theirs)]))
        found.append(torch.stack((area(p, q), area(p + 0.5, q + 0.5))))
    found = torch.stack(found)
    plain, star = zip(found.mean(0).tolist(), found.std(0).tolist(), strict=True)
    return dict(mauve=plain, mauve_star=star, k=k)
