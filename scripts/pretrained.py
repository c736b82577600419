"""Keep the weights of a trained model in checkpoints/pretrained, with a card that says where they come from.

    python scripts/pretrained.py --name sudoku9 --checkpoint FILE.pt --command "python train_hrm.py ..."

Averaged weights win. They are stored in half precision if that leaves the model's figure as it is. The optimizer and
all else that only a training needs stay behind. scripts/pretrained.sh trains every model anew and calls this.
"""

import hashlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_utils.config import from_cli
from data_utils.errors import UsageError
from data_utils.launch import launch

TRAINING_ONLY = "optimizer_state amp_scaler ema_state carry slots dqn judges histories sums".split()


@dataclass
class Config:
    name: str = ""  # of the model, one of MODELS in benchmarks/quality/pretrained.py
    checkpoint: str = ""  # file that the training left
    command: str = ""  # that trained it, for the card


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

import torch

from benchmarks.quality.pretrained import MODELS, figure_of
from data_utils.checkpoint import OTHER_NAMES, PRETRAINED, canonical_keys, read, save_checkpoint
from data_utils.files import write_atomic


def weights_alone(state):
    """Return what using a checkpoint needs of it, with averaged weights in place of the last ones."""
    state = canonical_keys(state)
    weights = state["model_state"]
    for averages in (state.get("ema", {}), state.get("ema_state", {})):
        weights = weights | {name: averages[name] for name in weights.keys() & averages.keys()}
    unused = {*TRAINING_ONLY, *(old for others in OTHER_NAMES.values() for old in others)}
    return {key: value for key, value in state.items() if key not in unused} | dict(model_state=weights, ema={})


def halved(state):
    """Return the same with weights in half precision."""
    weights = {name: w.half() if w.dtype == torch.float32 else w for name, w in state["model_state"].items()}
    return state | dict(model_state=weights)


def card(name, state, figure, path, command):
    """Return the text of a model's card."""
    model = MODELS[name]
    precisions = {str(w.dtype).removeprefix("torch.") for w in state["model_state"].values() if w.is_floating_point()}
    facts = {
        "figure": f"{model.title}: {figure:g} {model.unit}".strip(),
        "made by": f"`{command}`",
        "data": model.data,
        "seed": state["config"]["seed"],
        "torch": state["torch"],
        "weights": f"{' and '.join(sorted(precisions))}, {path.stat().st_size / 1e6:.2f} MB",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    return "\n".join([f"# {name}: {model.does}", "", f"    {model.command}", "", "| | |", "| --- | --- |", *rows, ""])


def main(cfg):
    """Write the weights and the card of the model `cfg.name`."""
    if cfg.name not in MODELS:
        raise UsageError(f"--name {cfg.name}: expected one of {', '.join(MODELS)}")
    state = weights_alone(read(cfg.checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        for content in (state, halved(state)):
            trial = Path(folder, "trial.pt")
            save_checkpoint(trial, content)
            figures.append(figure_of(cfg.name, trial))
    print(f"{cfg.name}: {figures[0]:g} in single precision, {figures[1]:g} in half")
    if figures[0] == figures[1]:
        state = halved(state)
    path = PRETRAINED / f"{cfg.name}.pt"
    save_checkpoint(path, state)
    text = card(cfg.name, state, figures[0], path, cfg.command)
    write_atomic(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return {}


if __name__ == "__main__":
    launch(main, cfg)
