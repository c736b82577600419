"""The folder of a trained formula model: model.yaml, tokenizer.yaml and state_dict.pt."""

import re
from pathlib import Path

import torch

from data_utils.checkpoint import numbered_files, read
from data_utils.errors import DataError, UsageError
from data_utils.files import root, write_atomic
from data_utils.formulas.bundles import load_config, save_config
from data_utils.formulas.expressions import Alphabet
from data_utils.hardware import open_device
from models.formula_model import ARGUMENTS, FlashANSRModel

PRETRAINED = "pretrained"  # the name of the model that comes with the repo
CONFIG, TOKENIZER, WEIGHTS = "model.yaml", "tokenizer.yaml", "state_dict.pt"


def build_model(alphabet: Alphabet, model_args: dict) -> FlashANSRModel:
    """Return a new FlashANSRModel. Raises UsageError, with the flags, for sizes that don't fit together."""
    try:
        return FlashANSRModel(alphabet, **model_args)
    except ValueError as e:
        raise UsageError(re.sub(rf"\b({'|'.join(ARGUMENTS)})\b", r"--\1", str(e))) from e


def save_model(model: FlashANSRModel, folder, weights: dict | None = None, **more):
    """Write a model into `folder`. more: further keys of model.yaml; weights: a state_dict in place of the model's.

    The weights are written last: with them the folder counts as finished.
    """
    alphabet = model.alphabet
    special = len(alphabet.tokens) - len(alphabet.operators) - len(alphabet.variables)
    tokenizer = dict(
        special_tokens=alphabet.tokens[:special], operators=alphabet.operators, variables=alphabet.variables
    )
    save_config(model.model_args | dict(tokenizer=tokenizer) | more, folder, "model")
    weights = {name: tensor.detach().cpu() for name, tensor in (weights or model.state_dict()).items()}
    write_atomic(Path(folder) / WEIGHTS, lambda file: torch.save(weights, file))


def load(path, device="cpu"):
    """Load the network of a run of train_sr.py -> (FlashANSRModel in eval mode, its Alphabet).

    path: as in `model_folder`. SymbolicRegressor(model=network) searches with it. Raises UsageError, DataError.
    """
    model = load_model(model_folder(path)).to(open_device(device))
    return model, model.alphabet


def model_folder(path):
    """Return the folder of a trained model: `path`, the folder of that file, or the newest checkpoint in the folder.

    PRETRAINED names the one that comes with the repo.
    """
    folder = root() / "models" / "ansr-models" / PRETRAINED if path == PRETRAINED else Path(path)
    if folder.is_file():
        folder = folder.parent
    checkpoints = [place for place in numbered_files(folder, r"checkpoint_(\d+)") if (place / WEIGHTS).is_file()]
    return checkpoints[0] if checkpoints and not (folder / WEIGHTS).is_file() else folder


def suited(model, path, D):
    """Return `model`, None where it is the one that comes with the repo and reads fewer than D columns."""
    return None if path == PRETRAINED and D > len(model.alphabet.variables) else model


def load_source(path):
    """Return weights, arguments and alphabet of the model that --init_from names, as checkpoint.start_from takes them.

    Raises UsageError, DataError.
    """
    folder = model_folder(path)
    try:
        model = load_model(folder)
    except UsageError as e:
        raise UsageError(f"--init_from {e}\nfix: name the output folder of a run, or a checkpoint_N in it") from e
    step = re.search(r"checkpoint_(\d+)$", str(folder))
    return dict(
        tokenizer="formulas",
        tokenizer_hash=" ".join(model.alphabet.tokens),
        model_args=model.model_args,
        model_state=model.state_dict(),
        step=int(step[1]) if step else "last",
    )


def load_model(folder) -> FlashANSRModel:
    """Return the model that `save_model` wrote into `folder`, on the CPU, for inference.

    Raises UsageError for files that are missing or of another model, DataError for damaged ones.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, TOKENIZER, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} has no {', '.join(missing)}: expected the folder of a trained model")
    config = _read_keys(folder / CONFIG, ARGUMENTS)
    tokenizer = _read_keys(folder / TOKENIZER, ("special_tokens", "operators", "variables"))
    alphabet = Alphabet(tokenizer["operators"], tokenizer["variables"], tokenizer["special_tokens"])
    try:
        model = FlashANSRModel(alphabet, **{name: config[name] for name in ARGUMENTS})
    except ValueError as e:
        raise UsageError(f"{folder / CONFIG}: {e}") from e
    weights = read(folder / WEIGHTS)
    if not isinstance(weights, dict) or not all(torch.is_tensor(weight) for weight in weights.values()):
        raise DataError(f"{folder / WEIGHTS}: expected a dict of tensors, found {type(weights).__name__}")
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    present = {name: weight.shape for name, weight in weights.items()}
    differing = sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))
    if differing:
        raise UsageError(f"{folder / WEIGHTS} is not of the model in {CONFIG}: {', '.join(differing[:3])} differ")
    model.load_state_dict(weights)
    return model.eval()


def _read_keys(path, needed):
    """Return the dict of a YAML file. Raises UsageError for one that lacks a key of `needed`."""
    try:
        values = load_config(path, resolve_paths=False)
    except UsageError as e:
        raise DataError(f"{path.parent} can't be read: {e}") from e
    absent = [key for key in needed if key not in values]
    if absent:
        raise UsageError(f"{path} has no {', '.join(absent)}")
    return values
