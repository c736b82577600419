"""Trained language models, rebuilt from their checkpoints."""

from pathlib import Path

from data_utils.checkpoint import CheckpointError, changed, load_checkpoint
from data_utils.config import DataError, UsageError
from models.diffuser import Diffuser
from models.state_space import StateSpace
from models.transformer import Transformer

EXPERTS = dict(transformer=Transformer, state_space=StateSpace, diffuser=Diffuser)


def load_expert(path, expert="", expected=None):
    """Return (frozen model in eval mode, its checkpoint without the weights).

    expert: the one that it must be; "" takes any. expected: model_args and tokenizer_hash that it must have. Raises
    DataError, naming the command that makes it, when it is missing or damaged, UsageError when it is another one.
    """
    if not Path(path).exists():
        raise DataError(f"{path} is missing\ntry: python train_expert.py --expert {expert or 'transformer'}")
    state = load_checkpoint(path, f"expert:{expert}" if expert else [f"expert:{name}" for name in EXPERTS])
    differs = changed(state["model_args"] | dict(tokenizer_hash=state["tokenizer_hash"]), expected or {})
    if differs:
        raise UsageError(f"{path} differs from this run: {differs}\ntry: the flags it was trained with")
    model = EXPERTS[state["expert"]](**state["model_args"])
    try:
        model.load_state_dict(state.pop("model_state"))
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not fit its own model_args: {str(e).splitlines()[0]}") from e
    del state["optimizer_state"]
    return model.requires_grad_(False).eval(), state
