"""Text of a trained language model: `generate.py --checkpoint FILE`, and `load` for Python.

B batch, T time, V vocabulary, P tokens of a prompt with the end-of-text token before it.
"""

import itertools
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

from data_utils.checkpoint import by_name
from data_utils.config import at_least, check_unicode
from data_utils.errors import UsageError
from data_utils.hardware import open_device
from data_utils.text.experts import load_expert
from data_utils.tokenizer import restore_tokenizer
from models.sampling import choose

NEW_TOKENS = 200  # tokens that a model writes if nothing else is said
LENGTH = 128  # tokens of a diffuser's text, prompt included, if nothing else is said
TOP_K = 50  # likeliest tokens that a model samples from; a diffuser, which draws all tokens at once, takes all


def load(path, device="cpu"):
    """Load a checkpoint of train_expert.py or train_mla.py -> (LanguageModel in eval mode, its tokenizer).

    path: a file, a folder with one trained model, or the name of a pretrained one. Raises DataError if the file is
    missing or damaged, UsageError if it is of another kind or one of several.
    """
    device = open_device(device)
    path = by_name(path)
    if Path(path).is_dir():
        path = model_in(path)
    network, state = load_expert(path)
    tokenizer = restore_tokenizer(state, path)
    return LanguageModel(network, tokenizer, state).to(device), tokenizer


def model_in(folder):
    """Return the only trained model in a folder. Raises UsageError, listing them, if there are several or none."""
    folder = Path(folder)
    models = [*sorted(folder.glob("*_expert.pt")), *folder.glob("nanothink_mla.pt")]
    models = models or sorted(folder.glob("*.pt"))  # a run that was stopped has no best file yet
    if not models:
        raise UsageError(f"{folder}: no model in it\nfix: a file, or the folder of a run of language models")
    if len(models) > 1:
        names, first = ", ".join(path.name for path in models), shlex.quote(str(models[0]))
        raise UsageError(f"{folder}: expected one model, found {names}\ntry: python generate.py {first}")
    return models[0]


class LanguageModel(nn.Module):
    """A trained network and its tokenizer: model(ids) -> logits, model.generate(prompt) -> text."""

    axes = dict(ids="time")  # inputs of `forward`, and the name of their second dimension
    fixed_length = False

    def __init__(self, network, tokenizer, state):
        """state: the checkpoint. A Diffuser writes all tokens of a text together, the others one after the other."""
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.diffuses = state["expert"] == "diffuser"
        self.header = {name: state[name] for name in ("kind", "model_args", "tokenizer", "tokenizer_hash")}
        self.header["tokenizer_json"] = tokenizer.json_text

    def forward(self, ids):
        """ids (B, T) -> logits of the next token (B, T, V); of the router log-probabilities."""
        return self.network(ids)

    def example(self, batch, length):
        """Return random inputs of `forward`."""
        return (torch.randint(self.tokenizer.vocab_size, (batch, length)),)

    def generate(self, prompt="", max_new_tokens=0, *, length=0, temperature=0.8, top_k=-1, top_p=1.0, seed=0,
                 steps=32, sampler="ancestral"):  # fmt: skip
        """Return the prompt and its continuation as one text. Arguments as in generate.Config."""
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, steps=steps, sampler=sampler)
        tokens = [token for token, _ in self.tokens(prompt, max_new_tokens, length, **options)]
        return self.tokenizer.decode(tokens) if self.diffuses else prompt + self.tokenizer.decode(tokens)

    def tokens(self, prompt, max_new_tokens, length, *, temperature, top_k, top_p, seed, steps, sampler):
        """Yield (token, bytes of the state that predicted it): those after the prompt, of a diffuser the whole text.

        Raises UsageError if the sizes don't fit the model.
        """
        device = next(self.network.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        ids = torch.tensor([[self.tokenizer.eos, *self.tokenizer.encode(prompt)]], device=device)  # (1, P)
        P = ids.shape[1]
        if top_k < 0:
            top_k = 0 if self.diffuses else TOP_K
        if self.diffuses and sampler == "ddim" and (top_k or top_p < 1):
            raise UsageError(
                "--top_k and --top_p choose among draws, but ddim takes the mean\ntry: --sampler ancestral"
            )
        if max_new_tokens and length:
            raise UsageError("--length counts the prompt, --max_new_tokens does not: give one of them")
        if not self.diffuses:
            count = max_new_tokens or NEW_TOKENS
            if length:
                count = max(0, length - P)
            tokens = write(self.network, ids, count, temperature, top_k, top_p, generator)
            return itertools.takewhile(lambda pair: pair[0] != self.tokenizer.eos, tokens)
        window = self.network.max_seq_len
        if max_new_tokens and not P + max_new_tokens <= window:
            raise UsageError(
                f"--max_new_tokens {max_new_tokens}: expected at most {window - P}, since the model has a window of "
                f"{window} tokens and the prompt has {P}"
            )
        if max_new_tokens:
            length = P + max_new_tokens
        length = length or min(LENGTH, window)
        if not P <= length <= window:
            raise UsageError(f"--length {length}: expected {P} (the prompt) to {window}")
        (text,) = self.network.sample(
            1, length, steps, temperature, generator, sampler, ids, top_k=top_k, top_p=top_p
        ).tolist()
        return ((token, 0) for token in text[1:])


@torch.no_grad()
def write(model, ids, n, temperature, top_k, top_p, generator):
    """Yield (token, bytes of the state that predicted it) for n tokens after ids (1, T), one model step each.

    When the window of max_seq_len tokens is full, its later half is read again, so that positions stay in the range
    of the training.
    """
    window = model.max_seq_len
    ids = ids[:, -window:]
    n_read = ids.shape[1]
    logits, state = model.step(ids, model.init_state(1))
    for _ in range(n):
        token = choose(logits, temperature, top_k, top_p, generator)
        yield token.item(), size_of(state)
        ids = torch.cat([ids, token], 1)[:, -window:]
        if n_read == window and hasattr(model, "rotary"):  # a state space model has no positions
            n_read = window // 2
            logits, state = model.step(ids[:, -n_read:], model.init_state(1))
        else:
            logits, state = model.step(token, state)
            n_read += 1


def stream(tokenizer, tokens):
    """Print the text of (token, size) pairs, a character once all its bytes are there; return (count, last size)."""
    pending = []
    count = last_size = 0
    for token, size in tokens:
        pending.append(token)
        count += 1
        last_size = size
        text = tokenizer.decode(pending)
        if text and not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            pending = []
    print(tokenizer.decode(pending), flush=True)
    return count, last_size


def size_of(state):
    """Return the bytes of the tensors in a nested state; of an attention cache only the used part counts."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state[0], int):  # (used positions, cache)
        return state[0] * size_of(state[1]) // state[1].shape[-2]
    return sum(size_of(part) for part in state)


def write_texts(cfg):
    """Print --num_samples texts of a language model: cfg has the fields of generate.Config."""
    at_least(cfg, 1, "num_samples", "steps")
    at_least(cfg, 0, "temperature", "top_p", "seed", "length", "max_new_tokens")
    at_least(cfg, -1, "top_k")
    check_unicode(cfg, "prompt")
    model, tokenizer = load(cfg.checkpoint, cfg.device)
    prompt = cfg.prompt.removeprefix("\ufeff")  # a byte order mark is no character
    options = {name: getattr(cfg, name) for name in ("temperature", "top_k", "top_p", "steps", "sampler")}
    for number in range(cfg.num_samples):
        start = time.monotonic()
        tokens = model.tokens(prompt, cfg.max_new_tokens, cfg.length, seed=cfg.seed + number, **options)
        if not model.diffuses:
            print(prompt, end="", flush=True)
        count, size = stream(tokenizer, tokens)
        rate = count / (time.monotonic() - start)
        cache = f", state of {size / 1e6:.2f} MB" if size else ""
        print(f"{count} tokens, {rate:.0f} tokens/s{cache}", file=sys.stderr)
        if number < cfg.num_samples - 1:
            print("---")
    return {}
