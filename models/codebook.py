"""A codebook whose codes follow moving averages of their vectors; codes that nothing uses are restarted.

N vectors, K codes, D width. VQ-VAE with the averages of its appendix A.1 (arXiv 1711.00937); restarts: Jukebox
(2005.00341), section 3.1. Other implementations fail because counts start at zero and sums at random. Here both start
consistent, and a rarely used code becomes a vector of the batch.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

ROWS = dict(cpu=2048)  # vectors whose distances to all codes exist at a time; they stay in the cache
MANY_ROWS = 65_536  # the same on an accelerator
BLOCK = 64  # codes that `least` reduces at a time
REVIVED = 0.5  # count of a revived code, as a share of the mean count
ITERATIONS = 10  # of k-means, at the start


def decay_for(steps):
    """Return the decay of the averages for a run of `steps` optimizer steps: 0.8 up to 200, 0.99 from 4,000 on."""
    return min(max(1 - 40 / max(steps, 1), 0.8), 0.99)


def revive_for(steps):
    """Return the share of the mean count below which a code is dead: 0.15 for short runs, down to 0.025."""
    return min(max(30 / max(steps, 1), 0.025), 0.15)


def least(scores):
    """Return the index of the least score of each row, the first of equals: (n, K) -> (n).

    On a CPU argmin reads one number at a time, amin many. So amin finds the block, and argmin searches only that.
    """
    n, size = scores.shape
    if scores.is_cuda or size % BLOCK:
        return scores.argmin(1)
    blocks = scores.unflatten(1, (size // BLOCK, BLOCK))
    block = blocks.amin(2).argmin(1)
    return BLOCK * block + blocks[torch.arange(n, device=scores.device), block].argmin(1)


def nearest(vectors, codes):
    """Return the index of the nearest code: vectors (N, D), codes (K, D), float32 -> (N).

    Scores are |c|^2 / 2 - x c, half the squared distance without |x|^2, which is the same for all codes.
    """
    N, D = vectors.shape
    n = min(ROWS.get(vectors.device.type, MANY_ROWS), len(vectors))
    with torch.autocast(vectors.device.type, enabled=False):  # bfloat16 would change 1 % of the codes
        weight = torch.cat([-codes, codes.square().sum(1, keepdim=True) / 2], 1).T  # [x, 1] times this is the score
        rows, scores = vectors.new_ones(n, D + 1), vectors.new_empty(n, len(codes))
        index = torch.empty(N, dtype=torch.long, device=vectors.device)
        for part, part_index in zip(vectors.split(max(1, n)), index.split(max(1, n)), strict=True):
            rows[: len(part), :D] = part
            part_index.copy_(least(torch.mm(rows[: len(part)], weight, out=scores[: len(part)])))
    return index


def totals(vectors, index, size):
    """Count and sum the vectors (N, D) of each code, given their codes (N): counts (K), sums (K, D)."""
    sums = vectors.new_zeros(size, vectors.shape[1]).index_add_(0, index, vectors)
    return torch.bincount(index, minlength=size).to(sums.dtype), sums


def lloyd(vectors, codes, generator):
    """Run ITERATIONS of k-means from `codes` (K, D): each code becomes the mean of its vectors (N, D) -> (K, D).

    A code without vectors becomes one of the vectors.
    """
    for _ in range(ITERATIONS):
        counts, sums = totals(vectors, nearest(vectors, codes), len(codes))
        spare = vectors[torch.randint(len(vectors), (len(codes),), generator=generator).to(vectors.device)]
        codes = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], spare)
    return codes


def usage_and_perplexity(counts):
    """Counts (K) of each code over a split -> (share of codes that were used, exp of the entropy)."""
    counts = counts.cpu()
    p = counts.double() / counts.sum().clamp_min(1)
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


class StraightThrough(torch.autograd.Function):
    """x, q (..., D) and a weight -> q, whose gradient goes to x, and weight |x - q|^2, with a gradient for x only."""

    @staticmethod
    def forward(ctx, x, q, weight):
        difference = x - q
        ctx.save_for_backward(difference)
        ctx.weight = weight
        flat = difference.flatten()
        return q, flat.dot(flat) * weight

    @staticmethod
    def backward(ctx, grad, grad_commit):
        (difference,) = ctx.saved_tensors
        return torch.addcmul(grad, difference, grad_commit, value=2 * ctx.weight), None, None


class Codebook(nn.Module):
    """Replace vectors by their nearest codes. In training mode the codes follow the vectors.

    Counts and sums are added over ranks. `revived` is the number of codes that were restarted in the last step.
    """

    def __init__(self, *, size, dim, beta, decay, revive, eps):
        """size: K. dim: D. beta: weight of the commitment loss, which pulls vectors towards their codes.

        decay: of the averages. revive: a code whose count is below this share of the mean count becomes a vector of the
        batch (of rank 0); 0 = never. eps: smallest count to divide by.
        """
        super().__init__()
        self.beta, self.decay, self.revive, self.eps = beta, decay, revive, eps
        self.register_buffer("codes", torch.randn(size, dim))
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("revived", torch.zeros((), dtype=torch.long), persistent=False)

    def assign(self, vectors):
        """Return the index of the nearest code: vectors (N, D) of any float type -> (N) int64."""
        return nearest(vectors.detach().float(), self.codes)

    @torch.no_grad()
    def start(self, vectors, kmeans, generator):
        """Initialize the codes from vectors (N, D), by k-means or as random vectors. The same on every rank.

        With fewer vectors than codes some codes start equal. Raises ValueError without any vector.
        """
        if not len(vectors):
            raise ValueError("no vectors to start a codebook from")
        vectors = vectors.float()
        size = len(self.codes)
        rounds = -(-size // len(vectors))
        order = torch.cat([torch.randperm(len(vectors), generator=generator) for _ in range(rounds)])[:size]
        codes = vectors[order.to(vectors.device)]
        self.codes.copy_(lloyd(vectors, codes, generator) if kmeans else codes)
        self.sums.copy_(self.codes)
        self.counts.fill_(1.0)

    def forward(self, z, mask=None):
        """z (..., D), mask (...) or None -> (codes (..., D), index (...) int64, commitment loss, a scalar).

        Where mask is False the codes are 0 and the index is -1. The gradient of the codes goes to z unchanged.
        """
        with torch.autocast(z.device.type, enabled=False):
            x = z.float() if mask is None else z.float().masked_fill(~mask[..., None], 0)
            with torch.no_grad():
                vectors = x.flatten(0, -2) if mask is None else x[mask]  # (N, D)
                index = self.assign(vectors)  # (N)
                q = F.embedding(index, self.codes)
                if self.training:
                    self._follow(vectors, index)
                if mask is None:
                    q, index = q.view_as(x), index.view(x.shape[:-1])
                else:
                    q = torch.zeros_like(x).masked_scatter_(mask[..., None], q)
                    index = torch.full_like(mask, -1, dtype=torch.long).masked_scatter_(mask, index)
            q, commit = StraightThrough.apply(x, q, self.beta / max(1, vectors.numel()))
        return q.to(z.dtype), index, commit

    def _follow(self, vectors, index):
        """Update the averages with vectors (N, D) of codes `index` (N).

        Nothing changes without vectors, or if one of them is not finite.
        """
        size, D = self.codes.shape
        pool = vectors if len(vectors) else self.codes
        counts, sums = totals(vectors, index, size)
        spare = pool[torch.randint(len(pool), (size,), device=pool.device)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.cat([counts[:, None], sums, spare * (dist.get_rank() == 0)], 1)
            dist.all_reduce(both)
            counts, sums, spare = both[:, 0], both[:, 1 : D + 1], both[:, D + 1 :]
        good = sums.isfinite().all() & (counts.sum() > 0)
        rate = (1 - self.decay) * good  # a tensor, so that the host need not wait for the device
        counts = self.counts.lerp(torch.where(good, counts, self.counts), rate)
        sums = self.sums.lerp(torch.where(good, sums, self.sums), rate)
        dead = (counts < self.revive * counts.mean()) & good
        counts = torch.where(dead, REVIVED * counts.mean(), counts)
        sums = torch.where(dead[:, None], spare * counts[:, None], sums)
        self.revived.copy_(dead.sum())
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.codes.copy_(torch.where(good, sums / counts.clamp_min(self.eps)[:, None], self.codes))
