"""Use a trained model: text of language models, answers to questions and pictures, formulas, events.

    python generate.py --checkpoint checkpoints/transformer_expert.pt --prompt "In the beginning"
    python generate.py --checkpoint checkpoints/diffuser_expert.pt --steps 32 --length 128
    python generate.py --checkpoint checkpoints/nanothink_mla.pt --prompt "In the beginning"
    python generate.py --run_name addition --prompt "What is 12 + 7?"
    python generate.py --run_name sudoku9 --input puzzles.txt                       # one per line, . for blanks
    python generate.py formula --model models/ansr-models/sr-cpu --data points.csv  # y = f(x) for a table
    python generate.py formula --method prior --suite nguyen                        # a test set, without a network
    python generate.py events outputs/runs/run_20251103-140953_experiment --mode sample --events 1000
    python generate.py multimodal checkpoints/multimodal-sudoku4 --task sudoku4 --input puzzle.txt --png answer.png

Text goes to stdout while it is generated, timing to stderr.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from typing import Literal

from data_utils.config import at_least, complete, from_cli
from data_utils.errors import UsageError
from data_utils.launch import ends_cleanly, launch


@dataclass
class Config:
    checkpoint: str = "checkpoints/transformer_expert.pt"  # a model of train_expert.py or train_mla.py
    prompt: str = ""  # text to continue
    max_new_tokens: int = 200  # tokens to write; a document may end earlier
    temperature: float = 0.8  # 1 samples from the model's probabilities, 0 takes the likeliest token
    top_k: int = 50  # sample from this many likeliest tokens; 0 = all
    top_p: float = 1.0  # sample from the likeliest tokens with this share of the probability
    num_samples: int = 1  # texts to write
    seed: int = 0  # sample number i uses seed + i
    steps: int = 32  # diffuser: denoising steps
    length: int = 128  # diffuser: tokens of a text, including the prompt
    sampler: Literal["ancestral", "ddim"] = "ancestral"  # diffuser: draw tokens in each step, or take the mean
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class AnswerConfig:
    run_name: str = ""  # run of train_hrm.py: its best model, else its final one
    checkpoint: str = ""  # a checkpoint file instead of --run_name
    dataset: str = "auto"  # data set that it must have been trained on
    prompt: tuple[str, ...] = ()  # questions or puzzles, each in quotes
    input: str = ""  # file with more of them, one per line
    max_new_tokens: int = 64  # longest answer, in tokens
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # sample from this many likeliest tokens; 0 = all
    top_p: float = 1.0  # sample from the likeliest tokens with this share of the probability
    segments: int = 0  # segments of reasoning; 0 = as in evaluation
    halting: bool = True  # stop when the model expects to be right, if it has learnt to
    seed: int = 0  # random seed
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
    noise: float = 0.0  # noise on y, in its standard deviations
    max_variables: int = 0  # leave out problems with more variables; 0 = none
    seed: int = 0  # random seed
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        self.began = time.monotonic()  # before torch is imported, which counts for --max_seconds, too


@dataclass
class EventsConfig:
    model: str = ""  # run folder or checkpoint of train_ae.py; the flag's name may be left out
    mode: Literal["reconstruct", "encode", "decode", "score", "sample"] = "reconstruct"  # what to do
    data: str = ""  # .npz or .h5 of events, or decay_chain; decode: output of encode; "" = the data of the run
    out: str = ""  # .npz file to write, .csv for score; "" = named by the mode, beside the model
    fresh: bool = False  # rename a file of other origin with that name to *.bak
    events: int = 1000  # new events of sample or of --data decay_chain
    limit: int = 0  # events to read; 0 = all
    split: Literal["all", "train", "val", "test"] = "all"  # part of --data, split as in training
    energy_unit: Literal["GeV", "MeV"] = "GeV"  # unit of --data
    seed: int = 0  # random seed
    ddim_steps: int = 0  # denoising steps of diffusion_ae; 0 = as in evaluation
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class PagesConfig:
    checkpoint: str = ""  # run folder or checkpoint of train_multimodal.py; the flag's name may be left out
    task: str = ""  # a task of the model; "" = the only one
    input: str = ""  # file, or - for stdin: a page of text, lines of a puzzle, an ARC task as JSON
    steps: int = 0  # steps of reasoning; 0 = as trained
    paths: int = 0  # reasoning paths, of which the most confident answers; 0 = as trained
    noise: float = 0.0  # noise on their states, so that more --paths than in training differ
    temperature: float = 0.0  # of written symbols; 0 takes the likeliest one
    votes: int = 16  # ARC: answers to turned and recoloured versions that vote
    png: str = ""  # PNG file for the page, the answer over the steps, the focus of each capsule
    fresh: bool = False  # rename a picture of other origin with that name to *.bak
    seed: int = 0  # random seed
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


COMMANDS = dict(formula=FormulaConfig, events=EventsConfig, multimodal=PagesConfig)
FIRST = dict(events="--model", multimodal="--checkpoint")  # flags whose name may be left out


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for."""
    words = sys.argv[1:] if argv is None else list(argv)
    command = words[0] if words and words[0] in COMMANDS else ""
    if command:
        argv = words[1:]
        if command in FIRST and argv and not argv[0].startswith("-"):
            argv = [FIRST[command], *argv]

    def variant(run_name):
        """Return the class of a command, of a run of train_hrm.py (they lie in runs/), or of a language model."""
        if command:
            return COMMANDS[command]
        return AnswerConfig if run_name or any("runs/" in word for word in words) else Config

    return from_cli(variant, __doc__, argv, by="run_name")


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = parse()

import torch

from data_utils.hardware import open_device
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
    """Print --num_samples texts of a language model."""
    at_least(cfg, 1, "num_samples", "steps", "length", "max_new_tokens")
    at_least(cfg, 0, "temperature", "top_k", "top_p", "seed")
    device = open_device(cfg.device)
    model, state = load_expert(cfg.checkpoint)
    tokenizer = load_tokenizer(state["tokenizer"])
    if tokenizer.hash != state["tokenizer_hash"]:
        raise UsageError(f"{cfg.checkpoint}: tokenizer {state['tokenizer']} is not the one it was trained with")
    model.to(device)
    prompt = cfg.prompt.removeprefix("\ufeff")  # a byte order mark is no character
    ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(prompt)]], device=device)  # (1, T)
    diffuser = state["expert"] == "diffuser"
    if diffuser and not ids.shape[1] <= cfg.length <= model.max_seq_len:
        raise UsageError(f"--length {cfg.length}: expected {ids.shape[1]} (the prompt) to {model.max_seq_len}")
    for number in range(cfg.num_samples):
        generator = torch.Generator(device).manual_seed(cfg.seed + number)
        start = time.monotonic()
        if diffuser:
            sample = model.sample(1, cfg.length, cfg.steps, cfg.temperature, generator, cfg.sampler, ids)[0].tolist()
            count, size = stream(tokenizer, ((token, 0) for token in sample[1:]))
        else:
            print(prompt, end="", flush=True)
            tokens = write(model, ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, generator)
            tokens = itertools.takewhile(lambda pair: pair[0] != tokenizer.eos, tokens)
            count, size = stream(tokenizer, tokens)
        rate = count / (time.monotonic() - start)
        cache = f", state of {size / 1e6:.2f} MB" if size else ""
        print(f"{count} tokens, {rate:.0f} tokens/s{cache}", file=sys.stderr)
        if number < cfg.num_samples - 1:
            print("---")
    return {}


@ends_cleanly
def main(cfg):
    """Generate what the class of `cfg` stands for. Each branch imports only what it needs."""
    cfg = complete(cfg, type(cfg))
    if isinstance(cfg, FormulaConfig):
        from data_utils.formulas.generate import find

        return find(cfg)
    if isinstance(cfg, EventsConfig):
        from data_utils.events.generate import generate_events

        return generate_events(cfg)
    if isinstance(cfg, PagesConfig):
        from data_utils.pages.generate import answer_pages

        return answer_pages(cfg, choose)
    if isinstance(cfg, AnswerConfig):
        from data_utils.reasoning.generate import answer

        return answer(cfg, choose)
    return write_texts(cfg)


if __name__ == "__main__":
    launch(main, cfg)
