"""Evaluate a model of multimodal.py on held-out pages: scores after 1, 2, 4, 8, 16 steps, halting and paths.

n samples, T steps, K paths, L symbols of an answer.
"""

import numpy as np
import torch

from data_utils import distributed
from data_utils.pages.rolling_batch import batch_of, to_device
from data_utils.pages.scores import score_answers
from data_utils.pages.shards import Stopped
from models.codebook import usage_and_perplexity
from models.glyphs import PADDING
from models.planning import select

STEPS = 1, 2, 4, 8, 16  # numbers of steps after which an answer is scored


@torch.no_grad()
def traces(model, name, task, held, *, size, seed, device, autocast, rank=0, world=1, stop=False, **options):
    """Run the model on all `held` samples, `size` at a time; return Multimodal.trace with samples first, on the CPU.

    held: page, target, id (n, ...). options: as in trace. The ranks share the samples, and each gets all results:
    answers (n, T, K, L), halt and nats (n, T, K), codes (n, ...) with a codebook. None if stopped.
    """
    n, results = len(held["page"]), []
    generator = torch.Generator().manual_seed(seed)
    for first in range(rank * size, n, world * size):
        if stop:
            break
        index = np.arange(first, min(first + size, n))
        samples = {key: values[index] for key, values in held.items()}
        batch = batch_of(samples, name, task, model.augment, seed, -2 - index)  # below the numbers of training samples
        with autocast:
            trace = model.trace(to_device(batch, device), generator=generator, **options)
        result = dict(answers=trace["answers"].movedim(1, 0).cpu())
        result |= {key: trace[key].movedim(1, 0).cpu().float() for key in ("halt", "nats")}
        if "codes" in trace:
            result["codes"] = trace["codes"].cpu().float()
        results.append((first, result))
    shards = distributed.gather((bool(stop), results))
    if any(stopped for stopped, _ in shards):
        return None
    pairs = sorted((pair for _, results in shards for pair in results), key=lambda pair: pair[0])
    return {key: torch.cat([result[key] for _, result in pairs]) for key in pairs[0][1]}


def mean(values):
    """Return the mean of the values that are not NaN; NaN without any."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def auc(values, good):
    """Return how often a good sample has a larger value than a bad one; ties count half, NaN without both kinds.

    values: (n,), good: (n,) bool.
    """
    good = np.asarray(good, bool)
    negatives, positives = np.sort(values[~good]), values[good]
    if not len(negatives) or not len(positives):
        return float("nan")
    below = negatives.searchsorted(positives, "left") + negatives.searchsorted(positives, "right")
    return float(below.mean() / (2 * len(negatives)))


def judge(task, held, trace, rule="score"):
    """Score the result of `traces`: {name: number}, the score that selects the best model first, and it @ early steps.

    rule: of planning.select, which chooses the path.
    loss                             nats per symbol
    halt_auc                         how well the halting logit tells right answers from wrong ones
    halt_steps, halted               mean number of steps if the logit decides, and the score then
    path_0, oracle, gap              with several paths: path 0 alone, any path right, oracle minus exact
    largest_share                    largest share of samples that one path answers
    codes_used, perplexity           with a codebook
    """
    pages, targets = held["page"].numpy(), held["target"].numpy()
    answers, halt = trace["answers"].movedim(0, 1), trace["halt"].movedim(0, 1)  # (T, n, K, L), (T, n, K)
    path = select(answers, halt, rule)  # (T, n)
    T, n = path.shape
    each = torch.arange(n)

    def scores(step, path):
        return score_answers(task, pages, targets, answers[step, each, path].numpy())

    row = {name: mean(values) for name, values in scores(T - 1, path[-1]).items()}
    first = next(iter(row))
    row |= {f"{first}@{t}": mean(scores(t - 1, path[t - 1])[first]) for t in STEPS if t < T}
    logits = halt.gather(2, path[..., None])[..., 0]  # (T, n)
    halts = (logits > 0).float()
    halts[-1] = 1
    last = halts.argmax(0)  # the first step at which the model halts
    row["halted"] = mean(scores(last, path[last, each])[first])
    row["halt_steps"] = last.float().mean().item() + 1
    wrong = (answers != held["target"][:, None]) & (held["target"] != PADDING)[:, None]
    right = ~wrong.any(3)  # (T, n, K)
    chosen = right[-1, each, path[-1]]
    row["halt_auc"] = auc(logits[-1].numpy(), chosen.numpy())
    if path.numel() and halt.shape[2] > 1:
        row["path_0"] = mean(scores(T - 1, torch.zeros_like(path[-1]))[first])
        row["oracle"] = right[-1].any(1).float().mean().item()
        row["gap"] = row["oracle"] - chosen.float().mean().item()
        row["largest_share"] = path[-1].bincount(minlength=halt.shape[2]).max().item() / n
    nats = trace["nats"].movedim(0, 1)[-1, each, path[-1]]
    row["loss"] = (nats / (held["target"] != PADDING).sum(1)).mean().item()
    if "codes" in trace:
        size = int(trace["codes"].max()) + 1
        usage, perplexity = usage_and_perplexity(torch.bincount(trace["codes"].long().flatten(), minlength=size))
        row |= dict(codes_used=usage * size, perplexity=perplexity)
    return row


CONTROLS = dict(shuffled=lambda pages: pages.roll(1, 0), blank=torch.zeros_like)  # the next sample's page, no page


def examine(model, sources, data, split, *, paths, noise, select, change=None, **options):
    """Judge all tasks on one half of the held-out samples: {score, loss: means over tasks, task/name: number}.

    score is the mean of the first score of each task. change: a function of the pages that the model sees, for a
    control. options: as in `traces`. None if stopped.
    """
    row, firsts = {}, []
    for name, source in sources.items():
        try:
            held = data.held_out(name, split)
        except Stopped:
            return None
        shown = held | dict(page=change(held["page"])) if change else held  # scores use the unchanged page
        steps = model.limit(name)
        trace = traces(model, name, source.task, shown, steps=steps, paths=paths, noise=noise, **options)
        if not trace:
            return None
        scores = judge(source.task, held, trace, select)
        firsts.append(next(iter(scores.values())))
        row |= {f"{name}/{key}": value for key, value in scores.items()}
    loss = sum(row[f"{name}/loss"] for name in sources) / len(sources)
    return dict(score=sum(firsts) / len(firsts), loss=loss) | row


def report(model, average, *args, controls, **options):
    """Run `examine` with averaged weights and, under "raw/", with the weights of this step. None if stopped.

    controls: also run the CONTROLS, under their names.
    """
    model.eval()
    with average.in_place():
        rows = {"": examine(model, *args, **options)}
        if controls:
            for name, change in CONTROLS.items():
                rows[f"{name}/"] = examine(model, *args, change=change, **options)
    if average.decay:
        rows["raw/"] = examine(model, *args, **options)
    model.train()
    if any(row is None for row in rows.values()):
        return None
    return {prefix + key: value for prefix, row in rows.items() for key, value in row.items()}
