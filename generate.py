"""Use what was trained: text of a language model, answers to questions and pictures, formulas, events.

    python generate.py --checkpoint checkpoints/transformer_expert.pt --prompt "In the beginning"
    python generate.py --checkpoint checkpoints/diffuser_expert.pt --steps 32 --length 128
    python generate.py --checkpoint checkpoints/nanothink_mla.pt --prompt "In the beginning"
    python generate.py --run_name addition --prompt "What is 12 + 7?"
    python generate.py --run_name sudoku9 --input puzzles.txt                       # one a line, . for blanks
    python generate.py formula --model models/ansr-models/sr-cpu --data points.csv  # y = f(x) for a table
    python generate.py formula --method prior --suite nguyen                        # without a network, on a test set
    python generate.py events outputs/runs/run_20251103-140953_experiment --mode sample --events 1000
    python generate.py multimodal checkpoints/multimodal-sudoku4 --task sudoku4 --input puzzle.txt --png answer.png

Text goes to stdout as it is made, timing to stderr.
"""

import itertools
import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

from data_utils.config import at_least, from_cli
from data_utils.errors import UsageError
from data_utils.launch import launch


@dataclass
class Config:
    checkpoint: str = "checkpoints/transformer_expert.pt"  # a model of train_expert.py or train_mla.py
    prompt: str = ""  # text to go on from
    max_new_tokens: int = 200  # tokens to write; a document may end before
    temperature: float = 0.8  # 1 samples what the model believes, 0 takes the likeliest token
    top_k: int = 50  # choose among so many likeliest tokens; 0 = all
    top_p: float = 1.0  # choose among the likeliest tokens that hold this share of the probability
    num_samples: int = 1  # texts to write
    seed: int = 0  # of the draws; sample number i uses seed + i
    steps: int = 32  # diffuser: denoising steps
    length: int = 128  # diffuser: tokens of a text, the prompt included
    sampler: Literal["ancestral", "ddim"] = "ancestral"  # diffuser: draw a token in each step, or take the mean
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class AnswerConfig:
    run_name: str = ""  # a run of train_hrm.py: its best model, else its final one
    checkpoint: str = ""  # or a file of it
    dataset: str = "auto"  # what it must have been trained on
    prompt: tuple[str, ...] = ()  # questions or puzzles, each in quotes
    input: str = ""  # or a file, one a line
    max_new_tokens: int = 64  # longest answer
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # choose among so many likeliest tokens; 0 = all
    top_p: float = 1.0  # choose among the likeliest tokens that hold this share of the probability
    segments: int = 0  # segments of reasoning; 0 = as evaluated
    halting: bool = True  # stop where the model thinks that it is right, if it learnt to
    seed: int = 0  # of the draws
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class FormulaConfig:
    data: str = ""  # table of numbers with a header: csv, other text, Excel, parquet
    target: str = ""  # its column y; "" = the last one of numbers
    columns: tuple[str, ...] = ()  # columns x; none named = all others that vary
    ignore: tuple[str, ...] = ()  # columns that are no x
    sigma: str = ""  # column with the uncertainty of y
    operators: tuple[str, ...] = ()  # that may occur beside + - * /, such as sin exp sqrt pow; none = all usual
    exclude_terms: tuple[str, ...] = ()  # that may not occur: an operator such as sin, or a term such as "x**2"
    max_length: int = 0  # longest formula, in operators, constants and variables; 0 = as long as it pays
    max_seconds: float = 20.0  # of the search; 0 = until --choices were tried
    choices: int = 512  # candidates, with --max_seconds 0
    model: str = ""  # folder of a network of train_sr.py that proposes formulas; "" = none
    method: Literal["auto", "sampling", "beam", "prior"] = "auto"  # who proposes: the network, or random formulas
    format: Literal["text", "python", "latex", "sympy"] = "text"  # of the answer
    precision: int = 0  # digits of constants; 0 = as many as the fit needs
    top: int = 10  # formulas listed, besides those on the Pareto front
    out: str = ""  # csv or jsonl of all formulas, or of all runs of a suite
    plot: str = ""  # PNG of data, fit, residuals and Pareto front
    predict: str = ""  # table with the same columns x; y is written to NAME.predicted.csv beside it
    fresh: bool = False  # rename files of these names that are not from here to *.bak
    evolve: float = 0.7  # share of candidates bred from the best so far, from the second round on
    restarts: int = 4  # starts of each fit
    refiner: Literal["lm", "bfgs"] = "lm"  # how constants are fitted
    parsimony: float = 0.05  # price of a token while candidates are bred, in tenfold errors
    temperature: float = 1.0  # of the network's draws
    top_k: int = 0  # choose among so many likeliest tokens; 0 = all
    top_p: float = 1.0  # choose among the likeliest tokens that hold this share of the probability
    max_len: int = 64  # longest sequence of the network's tokens, prompt and marks included
    beam_width: int = 32  # of --method beam
    max_points: int = 64  # points that the network reads at once
    complexity: int = 0  # prompt of a network: tokens of the formula; 0 = not told
    allowed_terms: tuple[str, ...] = ()  # prompt: terms that may occur
    include_terms: tuple[str, ...] = ()  # prompt: terms that do occur
    suite: tuple[str, ...] = ()  # nguyen, feynman, fastsrb, csv files like them, or saved pools, instead of --data
    seeds: int = 1  # data sets of each problem
    noise: float = 0.0  # on y, in its standard deviations
    max_variables: int = 0  # problems with more are left out; 0 = none
    seed: int = 0  # of the draws
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        self.began = time.monotonic()  # before torch is imported, which counts for --max_seconds, too


@dataclass
class EventsConfig:
    model: str = ""  # a run of train_ae.py: its folder, or a checkpoint; the flag's name may be left out
    mode: Literal["reconstruct", "encode", "decode", "score", "sample"] = "reconstruct"  # what to do with it
    data: str = ""  # .npz or .h5 of events, or decay_chain; for decode, what encode wrote; "" = the run's own events
    out: str = ""  # .npz, or .csv for score, to write; "" = named by the mode, beside the model
    fresh: bool = False  # rename a file of that name that is not from here to *.bak
    events: int = 1000  # new events, of sample or of --data decay_chain
    limit: int = 0  # events that are read; 0 = all
    split: Literal["all", "train", "val", "test"] = "all"  # of --data, as training splits it
    energy_unit: Literal["GeV", "MeV"] = "GeV"  # of --data
    seed: int = 0  # of the draws
    ddim_steps: int = 0  # denoising steps of diffusion_ae; 0 = as evaluated in training
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class PagesConfig:
    checkpoint: str = ""  # a run of train_multimodal.py: its folder, or a file of it; the flag's name may be left out
    task: str = ""  # one of those that it learnt; "" = the only one
    input: str = ""  # file, or - for standard input: a page of text, a puzzle as lines, an ARC task as JSON
    steps: int = 0  # of reasoning; 0 = as trained
    paths: int = 0  # ways of thinking, of which the surest one answers; 0 = as trained
    noise: float = 0.0  # added to what they think, so that more --paths than were trained differ
    temperature: float = 0.0  # of what is written; 0 takes the likeliest symbol
    votes: int = 16  # ARC: ways to turn and recolour a task, whose answers are voted over
    png: str = ""  # picture of the page, its answer over the steps, and where each capsule looks
    fresh: bool = False  # rename a picture of that name that is not from here to *.bak
    seed: int = 0  # of the draws
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


COMMANDS = dict(formula=FormulaConfig, events=EventsConfig, multimodal=PagesConfig)
FIRST = dict(events="--model", multimodal="--checkpoint")  # flags whose name may be left out


def variant(run_name):
    """The flags of a command, of train_hrm.py's runs, which lie in runs/, or of language models."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]]
    answers = run_name or any("runs/" in word for word in sys.argv)
    return AnswerConfig if answers else Config


def flags(words):
    """The flags in what was typed: without the name of a command, and with that of its first flag."""
    command, words = (words[0], words[1:]) if words and words[0] in COMMANDS else ("", words)
    named = command in FIRST and words and not words[0].startswith("-")
    return [FIRST[command], *words] if named else words


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli(variant, __doc__, flags(sys.argv[1:]), by="run_name")

import torch

from data_utils.hardware import open_device
from data_utils.reasoning.answers import load_reasoner
from data_utils.text.experts import load_expert
from data_utils.tokenizer import load_tokenizer


def choose(logits, temperature, top_k, top_p, generator):
    """Draw one token for each row of logits (B, V) -> (B, 1)."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p  # the likeliest token always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def write(model, ids, n, temperature, top_k, top_p, generator):
    """Yield (token, bytes of the state it was made from) for n tokens after ids (1, T), one model step each.

    When a window of max_seq_len tokens is full, its later half is read anew: positions stay those of the training.
    """
    window = model.max_seq_len
    logits, state = model.step(ids[:, -window:], model.init_state(1))
    read, ids = min(window, ids.shape[1]), ids[:, -window:]
    for _ in range(n):
        token = choose(logits, temperature, top_k, top_p, generator)
        yield token.item(), size_of(state)
        ids = torch.cat([ids, token], 1)[:, -window:]
        if read == window and hasattr(model, "rotary"):
            read, state = window // 2, model.init_state(1)
            logits, state = model.step(ids[:, -read:], state)
        else:
            logits, state = model.step(token, state)
            read += 1


def stream(tokenizer, tokens):
    """Print the text of (token, size) as they come, a character when all its bytes are there -> count, last size."""
    pending, count, last = [], 0, 0
    for token, size in tokens:
        pending, count, last = [*pending, token], count + 1, size
        text = tokenizer.decode(pending)
        if text and not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            pending = []
    print(tokenizer.decode(pending), flush=True)
    return count, last


def size_of(state):
    """Bytes of the tensors in a nested state; of a cache of attention only the part that is in use."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state[0], int):
        return state[0] * size_of(state[1]) // state[1].shape[-2]
    return sum(size_of(part) for part in state)


def answer(cfg):
    """Answer every prompt with a model of train_hrm.py, one by one: answers to stdout, what they took to stderr."""
    at_least(cfg, 0, "temperature", "top_k", "top_p", "seed", "segments")
    device = open_device(cfg.device)
    model, about, encode, tokenizer = load_reasoner(cfg.run_name, cfg.checkpoint, cfg.dataset)
    model.to(device)
    prompts = [*cfg.prompt, *(read_lines(cfg.input) if cfg.input else [])]
    if not prompts:
        raise UsageError('no question\ntry: --prompt "What is 12 + 7?" or --input FILE')
    trained = about["config"]["eval_segments"] or about["config"]["segments"] * (4 if model.halting else 1)
    thinking = dict(segments=cfg.segments or trained, threshold=about["halt_threshold"] if cfg.halting else math.inf)
    generator = torch.Generator(device).manual_seed(cfg.seed)

    def choice(logits):
        return choose(logits, cfg.temperature, cfg.top_k, cfg.top_p, generator)

    for prompt in prompts:
        start, ids = time.monotonic(), torch.tensor([encode(prompt)], device=device)
        if ids.shape[1] > model.max_seq_len:
            raise UsageError(f"a prompt of {ids.shape[1]} tokens, the model was built for {model.max_seq_len}")
        if model.cells:
            found, used = model.solve(ids, **thinking)
            rows = found.view(math.isqrt(ids.shape[1]), -1).tolist()
            text, count = "\n".join("".join(map(str, row)) for row in rows), ids.shape[1]
        else:
            ends = dict(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, max_new_tokens=cfg.max_new_tokens)
            (found,), used = model.generate(ids, None, **ends, **thinking, choose=choice)
            text, count = tokenizer.decode(found), len(found) + 1
        print(text, flush=True)
        rate = count / (time.monotonic() - start)
        print(f"{used.item()} segments, {count} tokens, {rate:.0f} tokens/s", file=sys.stderr)
    return {}


def read_lines(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--input {path}: {e}") from e


def main(cfg):
    if isinstance(cfg, FormulaConfig):
        from data_utils.formulas.generate import find  # the others need none of it

        return find(cfg)
    if isinstance(cfg, EventsConfig):
        from data_utils.events.generate import generate_events

        return generate_events(cfg)
    if isinstance(cfg, PagesConfig):
        from data_utils.pages.generate import answer_pages

        return answer_pages(cfg, choose)
    if isinstance(cfg, AnswerConfig):
        return answer(cfg)
    at_least(cfg, 1, "num_samples", "steps", "length", "max_new_tokens")
    at_least(cfg, 0, "temperature", "top_k", "top_p", "seed")
    device = open_device(cfg.device)
    model, about = load_expert(cfg.checkpoint)
    tokenizer = load_tokenizer(about["tokenizer"])
    if tokenizer.hash != about["tokenizer_hash"]:
        raise UsageError(f"{cfg.checkpoint}: tokenizer {about['tokenizer']} is not the one it was trained with")
    model.to(device)
    ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(cfg.prompt)]], device=device)  # (1, T)
    if about["expert"] == "diffuser" and not ids.shape[1] <= cfg.length <= model.max_seq_len:
        raise UsageError(f"--length {cfg.length}: expected {ids.shape[1]} (the prompt) to {model.max_seq_len}")
    for number in range(cfg.num_samples):
        generator, start, size = torch.Generator(device).manual_seed(cfg.seed + number), time.monotonic(), 0
        if about["expert"] == "diffuser":
            found = model.sample(1, cfg.length, cfg.steps, cfg.temperature, generator, cfg.sampler, ids)[0].tolist()
            count, _ = stream(tokenizer, ((token, 0) for token in found[1:]))
        else:
            print(cfg.prompt, end="", flush=True)

            choice = (cfg.temperature, cfg.top_k, cfg.top_p, generator)
            states = write(model, ids, cfg.max_new_tokens, *choice)
            count, size = stream(tokenizer, itertools.takewhile(lambda made: made[0] != tokenizer.eos, states))
        rate = count / (time.monotonic() - start)
        cache = f", state of {size / 1e6:.2f} MB" if size else ""
        print(f"{count} tokens, {rate:.0f} tokens/s{cache}", file=sys.stderr)
        if number < cfg.num_samples - 1:
            print("---")
    return {}


if __name__ == "__main__":
    launch(main, cfg)
