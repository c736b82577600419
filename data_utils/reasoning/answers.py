"""Hierarchical reasoning models in use: rebuilt from a checkpoint, their answers scored, and when to stop.

N rows, K segments; a trace holds tensors of a number for each row after each segment (see models/hrm.py).
"""

import math
from functools import partial
from pathlib import Path

import torch

from data_utils.checkpoint import load_checkpoint, numbered_files
from data_utils.errors import CheckpointError, UsageError
from data_utils.reasoning.dataset import open_tokenizer
from data_utils.reasoning.sudoku import parse
from data_utils.tokenizer import SimpleTokenizer
from models.hrm import HRM

THRESHOLDS = -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.inf  # of the halting logit
SLACK = 0.005  # share of right answers that an early stop may cost on the rows it is chosen with


def stops(halt, threshold):
    """halt (N, K) logits -> the segment after which each row stops: the first above `threshold`, else the last: (N)."""
    above = halt > threshold
    return torch.where(above.any(1), above.int().argmax(1), halt.shape[1] - 1)


def pick_threshold(trace):
    """The threshold that stops soonest among those within SLACK of the best, on the rows of the trace."""
    found = []
    for threshold in THRESHOLDS:
        last = stops(trace["halt"], threshold)
        right = trace["right"].gather(1, last[:, None]).double().mean().item()
        found.append((right, last.double().mean().item(), threshold))
    best = max(right for right, _, _ in found)
    return min((used, threshold) for right, used, threshold in found if right >= best - SLACK)[1]


def summarize(parts, segments):
    """Traces of batches -> numbers of a row of metrics, after `segments` segments; the halting threshold, inf without.

    Each also has, for each row (N), `labels`: how many there are, `asked`: how many of them count as cells, `bytes`: of
    the text of the answer, or `short`: of the rows with a shorter prompt, which are counted apart.
    """
    trace = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    k, rows, threshold = segments - 1, {name: values.double() for name, values in trace.items()}, math.inf
    nats, right = rows["nats"][:, k].sum().item(), rows["right"][:, k]
    found = dict(loss=nats / rows["labels"].sum().item(), exact=right.mean().item())
    if "asked" in rows:
        found["cells"] = (rows["hits"][:, k].sum() / rows["asked"].sum().clamp_min(1)).item()
    if "bytes" in rows:
        found["bpb"] = nats / math.log(2) / max(1.0, rows["bytes"].sum().item())
    if "short" in rows and rows["short"].any():
        short = trace["short"]
        found |= dict(exact=right[~short].mean().item(), exact_short=right[short].mean().item())
    if "halt" in trace:
        threshold = pick_threshold(trace)
        last = stops(trace["halt"], threshold)
        stopped = trace["right"].gather(1, last[:, None]).double().mean().item()
        found |= dict(exact_halting=stopped, segments=last.double().mean().item() + 1)
    return found, threshold


def load_reasoner(run_name, path, dataset):
    """Return (frozen averaged model in eval mode, its checkpoint, prompt -> ids, tokenizer; none for puzzles).

    run_name: best-model, else final.pt, else the newest step of runs/<run_name>; or a path. dataset: `auto`, or that
    of the run. Raises UsageError naming what there is, CheckpointError for what can't be read.
    """
    if run_name:
        home = Path("runs", run_name)
        steps = numbered_files(home / "checkpoints", r"step_(\d+)\.pt")
        files = [home / "best-model" / "best.pt", home / "checkpoints" / "final.pt", *steps]
        path = next((file for file in files if file.exists()), "")
        if not path:
            there = ", ".join(sorted(p.name for p in Path("runs").glob("*"))) or "none"
            raise UsageError(f"--run_name {run_name}: no checkpoint in {home}; runs there are: {there}")
    if not Path(path).exists():
        there = ", ".join(str(p) for p in sorted(Path(path).parent.glob("*.pt"))) or "none"
        raise UsageError(f"--checkpoint {path}: no such file; checkpoints there: {there}")
    state = load_checkpoint(path, "hrm")
    if dataset not in ("auto", state["dataset"]):
        raise UsageError(f"--dataset {dataset}: {path} was trained on {state['dataset']}")
    model = HRM(**state["model_args"])
    try:
        model.load_state_dict(state["model_state"])
        model.load_state_dict(state["ema"], strict=False)
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not fit its own model_args: {str(e).splitlines()[0]}") from e
    if model.cells:
        return model.frozen(), state, lambda prompt: parse(prompt).tolist(), None
    tokenizer = open_tokenizer(Path(path).parent, state["meta"] | dict(tokenizer_file="tokenizer.json"))
    plain = (
        partial(tokenizer.encode, add_specials=False) if isinstance(tokenizer, SimpleTokenizer) else tokenizer.encode
    )
    return (
        model.frozen(),
        state,
        lambda prompt: [tokenizer.bos_id, *plain(prompt), tokenizer.eos_id],
        tokenizer,
    )
