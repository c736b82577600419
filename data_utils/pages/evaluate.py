"""What a model of multimodal.py makes of held-out pages: scores after 1, 2, 4, 8, 16 steps, and who knew them.

n samples, T steps, K paths, L symbols of an answer.
"""

import numpy as np
import torch

from data_utils import distributed
from data_utils.pages.rolling_batch import batch_of
from data_utils.pages.scores import score
from data_utils.pages.shards import Stopped
from models.codebook import usage_and_perplexity
from models.glyphs import PADDING
from models.planning import select

STEPS = 1, 2, 4, 8, 16  # after which an answer is scored


@torch.no_grad()
def traces(model, name, task, held, *, size, seed, device, autocast, rank=0, world=1, stop=False, **how):
    """Think about all of `held`, `size` pages at a time -> what Multimodal.trace returns, as arrays; None if stopped.

    held: page, target, id (n, ...). Rows are split over ranks, and all ranks get all. how: as of trace.
    """
    n, found = len(held["page"]), []
    generator = torch.Generator().manual_seed(seed)
    mine = range(rank * size, n, world * size)
    for first in mine:
        if stop:
            break
        index = np.arange(first, min(first + size, n))
        part = {key: values[index] for key, values in held.items()}
        batch = batch_of(part, name, task, model.augment, seed, -2 - index)  # training's samples count from 0
        batch = {key: part if key == "task" else part.to(device) for key, part in batch.items()}
        with autocast:
            trace = model.trace(batch, generator=generator, **how)
        kept = {key: trace[key].movedim(1, 0).cpu() for key in ("answers", "halt", "nats")}  # samples first
        kept |= {key: trace[key].cpu() for key in ("codes",) if key in trace}
        found.append((first, {key: values.float() if key != "answers" else values for key, values in kept.items()}))
    shards = distributed.gather((bool(stop), found))
    if any(stopped for stopped, _ in shards):
        return None
    parts = [part for _, part in sorted((pair for _, found in shards for pair in found), key=lambda pair: pair[0])]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def mean(values):
    """Of those that are there, nan for none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def auc(values, good):
    """How often a good sample has the larger value than a bad one, ties half, (n) and (n) bool; nan for one kind."""
    good = np.asarray(good, bool)
    few, many = np.sort(values[~good]), values[good]
    if not len(few) or not len(many):
        return float("nan")
    return float((few.searchsorted(many, "left") + few.searchsorted(many, "right")).mean() / (2 * len(few)))


def judge(task, held, found, how="score"):
    """Scores of `traces` -> {name: number}, the one that selects the best model first, then the same @ earlier steps.

    With several paths also path_0 alone, oracle (any path right), gap between it and the answer, and the largest share
    of samples that one path answers. halt_auc: how well the halting logit tells right answers; halt_steps, halted: mean
    steps if it decides, and the score then. loss: nats a symbol.
    """
    pages, targets = held["page"].numpy(), held["target"].numpy()
    answers, halt = found["answers"].movedim(0, 1), found["halt"].movedim(0, 1)  # (T, n, K, L), (T, n, K)
    path = select(answers, halt, how)  # (T, n)
    (T, n), each = path.shape, torch.arange(len(pages))

    def scores(step, path):
        return score(task, pages, targets, answers[step, each, path].numpy())

    final = scores(T - 1, path[-1])
    first, row = next(iter(final)), {name: mean(values) for name, values in final.items()}
    row |= {f"{first}@{t}": mean(scores(t - 1, path[t - 1])[first]) for t in STEPS if t < T}
    logits = halt.gather(2, path[..., None])[..., 0]  # (T, n)
    over = (logits > 0).float()
    over[-1] = 1
    leave = over.argmax(0)  # the first step that is believed
    row["halted"], row["halt_steps"] = mean(scores(leave, path[leave, each])[first]), leave.float().mean().item() + 1
    wrong = (answers != held["target"][:, None]) & (held["target"] != PADDING)[:, None]
    right = ~wrong.any(3)  # (T, n, K)
    row["halt_auc"] = auc(logits[-1].numpy(), right[-1, each, path[-1]].numpy())
    if path.numel() and halt.shape[2] > 1:
        oracle, exact = right[-1].any(1).float().mean().item(), right[-1, each, path[-1]].float().mean().item()
        alone = mean(scores(T - 1, torch.zeros_like(path[-1]))[first])
        share = path[-1].bincount(minlength=halt.shape[2]).max().item() / n
        row |= dict(path_0=alone, oracle=oracle, gap=oracle - exact, largest_share=share)
    nats = found["nats"].movedim(0, 1)[-1, each, path[-1]]
    row["loss"] = (nats / (held["target"] != PADDING).sum(1)).mean().item()
    if "codes" in found:
        size = int(found["codes"].max()) + 1
        usage, perplexity = usage_and_perplexity(torch.bincount(found["codes"].long().flatten(), minlength=size))
        row |= dict(codes_used=usage * size, perplexity=perplexity)
    return row


CONTROLS = dict(shuffled=lambda pages: pages.roll(1, 0), blank=torch.zeros_like)  # another's page, no page


def examine(model, sources, data, split, *, paths, noise, select, change=None, **how):
    """All tasks on one half of what is held out -> {score, loss: means over tasks, task/name: number}, or None.

    score: of the first score of each. None: stopped. change: of the pages that are shown, for a control.
    """
    row, firsts = {}, []
    for name, source in sources.items():
        try:
            held = data.held_out(name, split)
        except Stopped:
            return None
        steps = model.limit(name)
        shown = held | dict(page=change(held["page"])) if change else held  # what is right is that of its own page
        found = traces(model, name, source.task, shown, steps=steps, paths=paths, noise=noise, **how)
        if not found:
            return None
        judged = judge(source.task, held, found, select)
        firsts.append(next(iter(judged.values())))
        row |= {f"{name}/{key}": value for key, value in judged.items()}
    loss = sum(row[f"{name}/loss"] for name in sources) / len(sources)
    return dict(score=sum(firsts) / len(firsts), loss=loss) | row


def report(model, average, *args, controls, **how):
    """`examine` with averaged weights and, with "raw/" before, those of this step; None if stopped.

    controls: also the CONTROLS, with their names before.
    """
    model.eval()
    with average.in_place():
        rows = {"": examine(model, *args, **how)}
        for name, change in CONTROLS.items() if controls else ():
            rows[f"{name}/"] = examine(model, *args, change=change, **how)
    if average.decay:
        rows["raw/"] = examine(model, *args, **how)
    model.train()
    if any(row is None for row in rows.values()):
        return None
    return {before + key: value for before, row in rows.items() for key, value in row.items()}
