"""Several reasoning paths for one sample. In training only the best path learns; in use the best one answers.

B batch, K paths, N positions, D width, T steps, L answer. Winner takes all: arXiv 2601.19085; noise at test time:
2605.19943.
"""

import torch


def starts(first, paths):
    """Return orthogonal starts of the paths, of root mean square 1: `first` (D) -> (K, D).

    Path 0 starts at `first` unchanged, so that a single path is the plain model; the others are orthogonal to it.
    Raises ValueError for K > D.
    """
    if paths > len(first):
        raise ValueError(f"{paths} paths in {len(first)} dimensions can't be orthogonal")
    rows = torch.cat([first[:, None], torch.randn(len(first), paths - 1)], 1)
    rows = torch.linalg.qr(rows)[0].T * len(first) ** 0.5
    return torch.cat([first[None], rows[1:]])


@torch.no_grad()
def all_paths(core, x, z_H, z_L, rotary):
    """Run a segment on every path: x (B, N, D), states (B, K, N, D) -> (states before its last cycle, states after)."""
    K = z_H.shape[1]
    x = x.repeat_interleave(K, 0)
    before = core(x, z_H.flatten(0, 1), z_L.flatten(0, 1), rotary, None, last=-1)
    after = core(x, *before, rotary, None, first=-1)
    return (*([z.unflatten(0, (-1, K)) for z in pair] for pair in (before, after)),)


def pick(values, path):
    """Select one path per sample: values (B, K, ...), path (B) -> (B, ...)."""
    return values[torch.arange(len(path), device=path.device), path]


def put(values, path, new):
    """Return values (B, K, ...) in which those of `path` (B) are replaced by new (B, ...)."""
    values = values.clone()
    values[torch.arange(len(path), device=path.device), path] = new.to(values.dtype)
    return values


def share_winner(z_H, path, due):
    """Copy the state of the winner `path` (B) to all paths of the samples that are `due` (B): z_H (B, K, N, D)."""
    return torch.where(due[:, None, None, None], pick(z_H, path)[:, None], z_H)


def select(answers, halt, rule):
    """Choose the path that answers after each step: answers (T, B, K, L), halt (T, B, K) logits -> path (T, B).

    rule: `score` takes the highest logit; `first_to_halt` the first path whose logit was above 0, before that as
    `score`; `vote` the answer that most paths give, ties by the sum of their probabilities.
    """
    best = halt.argmax(2)
    if rule == "first_to_halt":
        over = (halt > 0).cummax(0)[0]  # (T, B, K)
        first = over.float().cumsum(0).argmax(2)  # the path that has been above 0 for longest
        return torch.where(over.any(2), first, best)
    if rule == "vote":
        same = (answers[:, :, :, None] == answers[:, :, None]).all(-1).float()  # (T, B, K, K)
        votes, weight = same.sum(3), (same @ halt.sigmoid()[..., None])[..., 0]
        return (votes + weight / (2 * votes.shape[2])).argmax(2)
    return best
