"""Use a trained model: text of language models, answers to questions and pictures, formulas, events.

    python generate.py                                                 # the models that come with the repo
    python generate.py addition --prompt "What is 12 + 7?"             # one of them, by its name
    python generate.py --checkpoint checkpoints/transformer_expert.pt --prompt "In the beginning"
    python generate.py --checkpoint checkpoints/diffuser_expert.pt --steps 32 --length 128
    python generate.py --checkpoint checkpoints/nanothink_mla.pt --prompt "In the beginning"
    python generate.py --run_name addition --prompt "What is 12 + 7?"
    python generate.py --run_name sudoku9 --input puzzles.txt --out answers.csv     # one per line, . for blanks
    python generate.py formula --model models/ansr-models/sr-cpu --data points.csv  # y = f(x) for a table
    python generate.py formula --method prior --suite nguyen                        # a test set, without a network
    python generate.py events outputs/runs/run_20251103-140953_experiment --mode sample --events 1000
    python generate.py multimodal checkpoints/multimodal-sudoku4 --task sudoku4 --input puzzle.txt --png answer.png
    python generate.py PATH --help        # any checkpoint, or folder of a run: the flags of its kind of model
    python generate.py PATH --export model.safetensors                              # or model.pt2, the forward pass

Text goes to stdout while it is generated, timing to stderr.
"""

import contextlib
import difflib
import io
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_utils.checkpoint import PRETRAINED, by_name, kind_of
from data_utils.config import Parser, complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.files import MARK, check_replaceable, is_marked, make_room, write_atomic
from data_utils.launch import ends_cleanly, launch

STARTED = time.monotonic()  # imports count for --max_seconds, too


@dataclass
class Config:
    checkpoint: str = "checkpoints/transformer_expert.pt"  # a model of train_expert.py or train_mla.py
    prompt: str = ""  # text to continue
    max_new_tokens: int = 0  # tokens to write; a document may end earlier; 0 = 200, or as length says
    temperature: float = 0.8  # 1 samples from the model's probabilities, 0 takes the likeliest token
    top_k: int = -1  # sample from this many likeliest tokens; 0 = all; -1 = 50, but all for the diffuser
    top_p: float = 1.0  # sample from the likeliest tokens with this share of the probability
    num_samples: int = 1  # texts to write
    seed: int = 0  # sample number i uses seed + i
    steps: int = 32  # diffuser: denoising steps
    length: int = 0  # tokens of a text, including the prompt; 0 = 128 for the diffuser, if it has as many
    sampler: Literal["ancestral", "ddim"] = "ancestral"  # diffuser: draw tokens in each step, or take the mean
    export: str = ""  # write no text, but the model: FILE.safetensors has weights, FILE.pt2 the forward pass
    fresh: bool = False  # rename a file of other origin with that name to *.bak
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class AnswerConfig:
    run_name: str = ""  # run of train_hrm.py: its best model, else its final one
    checkpoint: str = ""  # a checkpoint file instead of --run_name
    dataset: str = "auto"  # data set that it must have been trained on
    prompt: tuple[str, ...] = ()  # questions or puzzles, each in quotes
    input: str = ""  # file with more of them, one per line; puzzles in any layout that prepare_data.py puzzles reads
    out: str = ""  # puzzles: csv file of question, answer and verdict
    max_new_tokens: int = 64  # longest answer, in tokens
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # sample from this many likeliest tokens; 0 = all
    top_p: float = 1.0  # sample from the likeliest tokens with this share of the probability
    segments: int = 0  # segments of reasoning; 0 = as in evaluation
    halting: bool = True  # stop when the model expects to be right, if it has learnt to
    views: int = 1  # Sudokus: symmetric versions that are answered; the answer that most agree on counts
    export: str = ""  # write no answer, but the model: FILE.safetensors has weights, FILE.pt2 the forward pass
    fresh: bool = False  # rename a file of other origin with that name to *.bak
    seed: int = 0  # random seed
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


@dataclass
class FormulaConfig:
    data: str = ""  # table of numbers with a header: csv, other text, Excel, parquet; - reads standard input
    target: str = ""  # its column y; "" = the last one of numbers
    columns: tuple[str, ...] = ()  # columns x; none named = all others that vary
    ignore: tuple[str, ...] = ()  # columns that are no x
    sigma: str = ""  # column with the uncertainty of y
    operators: tuple[str, ...] = ()  # that may occur beside + - * /, such as sin exp sqrt pow; none = all usual
    exclude_terms: tuple[str, ...] = ()  # that may not occur: an operator such as sin, or a term such as "x**2"
    max_length: int = 0  # longest formula, in operators, constants and variables; 0 = as long as it pays
    max_seconds: float = 20.0  # of the search; 0 = until --choices were tried
    choices: int = 512  # candidates, with --max_seconds 0
    model: str = "pretrained"  # network that proposes formulas: folder of train_sr.py, "pretrained", or "" = none
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

    # --help shows these, by purpose; --help all shows every flag.
    common = dict(
        table="data target columns sigma",
        search="operators exclude_terms max_length max_seconds model",
        answer="format precision top out plot predict",
    )


@dataclass
class EventsConfig:
    model: str = ""  # run folder or checkpoint of train_ae.py; the flag's name may be left out
    mode: Literal["reconstruct", "encode", "decode", "score", "sample"] = "reconstruct"  # what to do
    data: str = ""  # .npz or .h5 of events, or decay_chain; decode: output of encode; "" = the data of the run
    against: str = ""  # score: .npz or .h5 of other events; how well errors tell them from --data (ROC curves)
    out: str = ""  # .npz file to write, .csv for score; "" = named by mode and data, beside the model
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
    prompt: str = ""  # page or puzzle as text
    input: str = ""  # file, or - for stdin: a page of text, puzzles or ARC tasks as prepare_data.py puzzles reads them
    out: str = ""  # csv of question, answer and verdict of puzzles; submission.json of ARC tasks, with two attempts
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
KINDS = dict(  # kind in a checkpoint, up to its colon: (its configuration, the flag that names the checkpoint)
    expert=(Config, "--checkpoint"),
    hrm=(AnswerConfig, "--checkpoint"),
    token_grid=(AnswerConfig, "--checkpoint"),
    sr=(FormulaConfig, "--model"),
    ae=(EventsConfig, "--model"),
    multimodal=(PagesConfig, "--checkpoint"),
)


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for.

    The first word may be a command, or a checkpoint, a run or the name of a pretrained model, whose kind says what is
    meant.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    first = words[0] if words else ""
    if first in COMMANDS:
        argv = words[1:]
        if first in FIRST and argv and not argv[0].startswith("-"):
            argv = [FIRST[first], *argv]
        return from_cli(COMMANDS[first], __doc__, argv, prog=f"generate.py {first}")
    path, others = first, words[1:]
    if not first or first.startswith("-"):
        path, others = take_checkpoint(words)
    elif not Path(by_name(path)).exists():
        near = difflib.get_close_matches(path, [*COMMANDS, *(file.stem for file in PRETRAINED.glob("*.pt"))], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        Parser().error(f"{path}: no such file, folder or command{hint}")
    path = by_name(path)
    cls, flag = KINDS.get(kind_of(path).partition(":")[0], (Config, "--checkpoint"))
    if path:
        argv = [f"{flag}={path}", *others]
    # A run of train_hrm.py may be named instead.
    return from_cli(lambda run_name: AnswerConfig if run_name else cls, __doc__, argv, by="run_name")


def take_checkpoint(words):
    """Return (the value of --checkpoint in a command line, "" without it; the other words)."""
    for i, word in enumerate(words):
        flag, equals, path = word.partition("=")
        if flag == "--checkpoint" and equals:
            return path, words[:i] + words[i + 1 :]
        if flag == "--checkpoint" and i + 1 < len(words):
            return words[i + 1], words[:i] + words[i + 2 :]
    return "", words


def list_pretrained(cfg):
    """Print the models that come with the repo, each with the command of its card."""
    print("Models that come with the repo:\n")
    for path in sorted(PRETRAINED.glob("*.md")):
        title, _, command, *_ = path.read_text(encoding="utf-8").splitlines()
        print(f"{title.removeprefix('# ')}\n{command}\n")
    print("A model of yours: python generate.py PATH --help; all commands: python generate.py --help")
    return {}


# torch is imported by the branch that needs it, so that --help and typos answer at once


def export_model(cfg):
    """Write the model of a Config or AnswerConfig to the file --export, whose ending names the format.

    .safetensors: the weights by name; kind, model_args and tokenizer are in its metadata. .pt2: the forward pass, by
    torch.export; the file is written only if its outputs are those of the model. .json: the tokenizer.
    Raises UsageError, DataError.
    """
    path = Path(cfg.export)
    if path.suffix not in (".safetensors", ".pt2", ".json"):
        raise UsageError(f"--export {path}: expected FILE.safetensors, FILE.pt2, or FILE.json for the tokenizer")
    checkpoint = cfg.checkpoint
    if isinstance(cfg, AnswerConfig):
        from data_utils.reasoning.generate import best_of_run, load

        if cfg.run_name:
            checkpoint = best_of_run(Path("runs", cfg.run_name))
    else:
        from data_utils.text.generate import load
    model, _ = load(checkpoint)
    tokenizer = model.header["tokenizer_json"].encode()
    if path.suffix == ".json" and not tokenizer:
        raise UsageError(f"--export {path}: a model of puzzles has no tokenizer")

    def is_export(path):
        return is_marked(path) or path.read_bytes() == tokenizer

    check_replaceable(path, cfg.fresh, is_export, flag="--export", inputs=[checkpoint])
    header = {name: json.dumps(value) for name, value in model.header.items()} | dict(origin=MARK.decode())
    if path.suffix == ".safetensors":
        content = to_safetensors(model, header, path)
        note = "weights"
    elif path.suffix == ".pt2":
        content, note = to_program(model, header, path)
    else:
        content = tokenizer
        note = "tokenizer"
    make_room(path, is_export)
    write_atomic(path, lambda file: file.write(content))
    print(f"{path}: {note}, {len(content) / 1e6:.2f} MB")
    return {}


def to_safetensors(model, header, path):
    """Return the bytes of a safetensors file of a model's weights. Raises UsageError without that package."""
    try:
        from safetensors.torch import save
    except ImportError as e:
        raise UsageError(
            f"--export {path}: the package safetensors is not installed\n"
            f"try: pip install safetensors\ntry: --export {shlex.quote(str(path.with_suffix('.pt2')))}"
        ) from e
    # The format has no two names for one tensor, so each gets a copy.
    weights = {name: weight.contiguous().clone() for name, weight in model.network.state_dict().items()}
    return save(weights, header)


def to_program(model, header, path):
    """Return (bytes of the exported forward pass, a note on its inputs).

    Batch and lengths stay free where the model's code allows it; else the program takes one row, else one row of the
    model's whole window. Raises UsageError if the model can't be exported, DataError if the program's outputs differ.
    """
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # a reasoner has some by columns, which the format does not know
    window = model.network.max_seq_len
    half = max(2, window // 2)
    batch = torch.export.Dim("batch", max=2**16)
    lengths = {axis: torch.export.Dim(axis, max=window) for axis in model.axes.values() if not model.fixed_length}
    attempts = []
    for rows, free, length in ((batch, lengths, half), (1, lengths, half), (1, {}, window)):
        shapes = [(rows, free.get(axis, window)) for axis in model.axes.values()]
        attempts.append((model.example(1 if rows == 1 else 2, length), shapes))
    for inputs, shapes in attempts:
        free = tuple({i: dim for i, dim in enumerate(shape) if not isinstance(dim, int)} for shape in shapes)
        try:
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
                program = torch.export.export(model, inputs, dynamic_shapes=free)
            break
        except Exception as e:  # of a dozen types
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
    else:
        raise UsageError(f"--export {path}: torch.export can't follow this model: {reason}")
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"petri.json": json.dumps(header)})
    restored = torch.export.load(io.BytesIO(content.getvalue())).module()
    for example in (inputs, model.example(1, window)):
        with torch.no_grad():
            if not torch.allclose(restored(*example), model(*example), rtol=1e-4, atol=1e-4):
                raise DataError(f"{path} was not written: its outputs differ from those of the model")
    words = [[getattr(dim, "__name__", str(dim)) for dim in shape] for shape in shapes]
    sizes = [f"{name} ({', '.join(shape)})" for name, shape in zip(model.axes, words, strict=True)]
    return content.getvalue(), f"forward pass of {', '.join(sizes)}"


@ends_cleanly
def main(cfg):
    """Generate what the class of `cfg` stands for. Each branch imports only what it needs."""
    cfg = complete(cfg, type(cfg))
    if getattr(cfg, "export", ""):
        return export_model(cfg)
    if isinstance(cfg, FormulaConfig):
        from data_utils.formulas.generate import find

        return find(cfg, STARTED if __name__ == "__main__" else time.monotonic())
    if isinstance(cfg, EventsConfig):
        from data_utils.events.generate import generate_events

        return generate_events(cfg)
    if isinstance(cfg, PagesConfig):
        from data_utils.pages.generate import answer_pages

        return answer_pages(cfg)
    if isinstance(cfg, AnswerConfig):
        from data_utils.reasoning.generate import answer

        return answer(cfg)
    from data_utils.text.generate import write_texts

    return write_texts(cfg)


if __name__ == "__main__":
    launch(main if len(sys.argv) > 1 else list_pretrained, parse())
