"""Answer questions with a trained reasoner: `generate.py --run_name RUN`."""

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

from data_utils.checkpoint import load_checkpoint, numbered_files
from data_utils.config import at_least
from data_utils.documents import read_text
from data_utils.errors import CheckpointError, UsageError
from data_utils.hardware import open_device
from data_utils.reasoning.dataset import open_tokenizer
from data_utils.reasoning.sudoku import parse_puzzle
from data_utils.tokenizer import SimpleTokenizer
from models.hrm import HRM


def answer(cfg, choose):
    """Answer each prompt: answers go to stdout, segments and speed to stderr.

    cfg: AnswerConfig of generate.py; choose(logits, temperature, top_k, top_p, generator) draws a token.
    """
    at_least(cfg, 0, "temperature", "top_k", "top_p", "seed", "segments")
    device = open_device(cfg.device)
    model, state, encode, tokenizer = load_reasoner(cfg.run_name, cfg.checkpoint, cfg.dataset)
    model.to(device)
    prompts = [prompt.removeprefix("\ufeff") for prompt in cfg.prompt]  # a byte order mark is no character
    prompts += _read_lines(cfg.input) if cfg.input else []
    if not prompts:
        raise UsageError('no question\ntry: --prompt "What is 12 + 7?" or --input FILE')
    evaluated = state["config"]["eval_segments"] or state["config"]["segments"] * (4 if model.halting else 1)
    thinking = dict(segments=cfg.segments or evaluated, threshold=state["halt_threshold"] if cfg.halting else math.inf)
    generator = torch.Generator(device).manual_seed(cfg.seed)

    def choose_token(logits):
        return choose(logits, cfg.temperature, cfg.top_k, cfg.top_p, generator)

    for prompt in prompts:
        start = time.monotonic()
        ids = torch.tensor([encode(prompt)], device=device)  # (1, S)
        if ids.shape[1] > model.max_seq_len:
            raise UsageError(f"a prompt of {ids.shape[1]} tokens, the model was built for {model.max_seq_len}")
        if model.cells:
            digits, used = model.solve(ids, **thinking)
            rows = digits.view(math.isqrt(ids.shape[1]), -1).tolist()
            text = "\n".join("".join(map(str, row)) for row in rows)
            count = ids.shape[1]
        else:
            limits = dict(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, max_new_tokens=cfg.max_new_tokens)
            (tokens,), used = model.generate(ids, None, **limits, **thinking, choose=choose_token)
            text = tokenizer.decode(tokens)
            count = len(tokens) + 1
        print(text, flush=True)
        rate = count / (time.monotonic() - start)
        print(f"{used.item()} segments, {count} tokens, {rate:.0f} tokens/s", file=sys.stderr)
    return {}


def _read_lines(path):
    try:
        return [line for line in read_text(path).split("\n") if line.strip()]
    except OSError as e:
        raise UsageError(f"--input {path}: {e.strerror}") from e


def load_reasoner(run_name, path, dataset):
    """Return (frozen averaged model in eval mode, its checkpoint, prompt -> ids, tokenizer; None for puzzles).

    run_name: take best-model, else final.pt, else the newest step of runs/<run_name>; "" takes `path`. dataset: that
    of the training, or "auto". Raises UsageError, listing the checkpoints, or CheckpointError.
    """
    if run_name:
        path = _best_of_run(run_name)
    if not Path(path).exists():
        existing = ", ".join(str(file) for file in sorted(Path(path).parent.glob("*.pt"))) or "none"
        raise UsageError(f"--checkpoint {path}: no such file; checkpoints there: {existing}")
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
        return model.frozen(), state, lambda prompt: parse_puzzle(prompt).tolist(), None
    tokenizer = open_tokenizer(Path(path).parent, state["meta"] | dict(tokenizer_file="tokenizer.json"))
    encode = tokenizer.encode
    if isinstance(tokenizer, SimpleTokenizer):
        encode = partial(tokenizer.encode, add_specials=False)
    return model.frozen(), state, lambda prompt: [tokenizer.bos_id, *encode(prompt), tokenizer.eos_id], tokenizer


def _best_of_run(run_name):
    """Return the best checkpoint of a run. Raises UsageError, listing the runs, if it has none."""
    home = Path("runs", run_name)
    steps = numbered_files(home / "checkpoints", r"step_(\d+)\.pt")
    for path in (home / "best-model" / "best.pt", home / "checkpoints" / "final.pt", *steps):
        if path.exists():
            return path
    existing = ", ".join(sorted(path.name for path in Path("runs").glob("*"))) or "none"
    raise UsageError(f"--run_name {run_name}: no checkpoint in {home}; runs there are: {existing}")
