"""Score the models that come with the repo, checkpoints/pretrained, on data that they never saw.

    python -m benchmarks.quality.pretrained                   # every model that is there, minutes
    python -m benchmarks.quality.pretrained --rows sudoku9

scripts/pretrained.py writes these models and their cards, with the same figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.report import command_line, figure, measure
from data_utils.checkpoint import PRETRAINED, load_checkpoint
from data_utils.errors import DataError
from data_utils.events.decay_chain import decay_chain
from data_utils.events.generate import encode_rows, load_run
from data_utils.events.reconstruct import event_errors, from_latents
from data_utils.hardware import open_device
from data_utils.pages.evaluate import judge, traces
from data_utils.pages.generate import load_model
from data_utils.pages.tasks import Task, open_tasks
from data_utils.reasoning import load as load_reasoner
from data_utils.reasoning.dataset import open_dataset
from data_utils.reasoning.halting import summarize
from data_utils.reasoning.sudoku import make, solved
from data_utils.reasoning.sudoku import sudoku as draw_puzzles
from data_utils.text import load as load_language_model
from data_utils.text.windows import DomainText

UNSEEN = 1_000_001  # seed of puzzles and events that no training draws


@dataclass(frozen=True)
class Model:
    """A model that comes with the repo: what its card says, and how it is scored."""

    does: str  # begins its card
    command: str  # shows it
    data: str  # it was trained on
    title: str  # of its figure
    unit: str
    score: Callable  # (path, count) -> number
    count: int  # of samples for the figure


# --- scores -----------------------------------------------------------------------------------
@torch.no_grad()
def sums(path, count):
    """Return the percentage of held-out sums, both operands of two digits, that a reasoner adds right."""
    model, _ = load_reasoner(path)
    config = load_checkpoint(path, "hrm")["config"]
    sizes = dict(max_seq_len=config["max_seq_len"], data_seed=config["data_seed"], reveal=0)
    data = open_dataset("synthetic", **sizes, say=lambda line: None)
    index = np.arange(data.rows("val"))[:count]
    trace = model.network.trace(data.batch("val", index), model.segments)
    row, _ = summarize([trace | data.row_facts("val", index)], model.segments)
    return 100 * row["exact"]


@torch.no_grad()
def grids(path, count, size, givens):
    """Return the percentage of held-out Sudokus that a reasoner solves, with halting as generate.py has it."""
    model, _ = load_reasoner(path)
    if size == 4:  # there are few grids, so the split of the training data decides
        puzzles, _ = make(size=4, givens=givens, train=2000, val=1000, seed=1)["val"]
    else:
        puzzles, _ = draw_puzzles(size=size, givens=givens, n=count, seed=UNSEEN)
    puzzles = np.asarray(puzzles)[:count]
    answers, _ = model.network.solve(torch.from_numpy(puzzles).long(), model.segments, model.threshold)
    answers = answers.numpy()
    kept = ((puzzles == 0) | (puzzles == answers)).all(1)
    return 100 * (kept & solved(answers, size)).mean().item()


def pages(path, count, name):
    """Return the percentage of held-out pages of a task that are answered right, by the task's first score."""
    network, config = load_model(path)
    source = open_tasks([name], **{key: config[key] for key in PAGE_FLAGS})[name]
    samples = [source.make(i, "test", config["seed"]) for i in range(1, 2 * count, 2)]  # even ones select models
    held = {key: torch.from_numpy(np.stack([getattr(s, key) for s in samples])) for key in ("page", "target")}
    held["id"] = torch.zeros(count, dtype=torch.long)
    task = Task(**network.tasks[name])
    options = dict(size=128, seed=0, device=torch.device("cpu"), autocast=torch.autocast("cpu", enabled=False))
    trace = traces(network, name, task, held, steps=network.limit(name), paths=0, noise=0.0, **options)
    return 100 * next(iter(judge(task, held, trace).values()))


PAGE_FLAGS = "page_rows page_cols text_source stories code_dir arc_set arc_side".split()


@torch.no_grad()
def text(path, count):
    """Return bits per byte of a language model on held-out windows of the demo's five domains."""
    model, tokenizer = load_language_model(path)
    config = load_checkpoint(path, "expert:transformer")["config"]
    sizes = dict(window=config["max_seq_len"], val_split=config["val_split"], domains=tuple(config["domains"]))
    data = DomainText(config["data_dir"], tokenizer, **sizes, cache_dir=config["data_dir"], say=lambda line: None)
    windows = np.linspace(0, data.windows("val"), count, endpoint=False, dtype=np.int64)
    token_bytes = torch.from_numpy(tokenizer.token_bytes)
    nats = n_bytes = 0.0
    for index in np.array_split(windows, max(1, count // 16)):
        x, y = data.batch("val", index)
        nats += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
        n_bytes += (token_bytes[y.clamp_min(0)] * (y >= 0)).sum().item()
    return nats / np.log(2) / n_bytes


@torch.no_grad()
def events(path, count):
    """Return the squared error per feature of reconstructed particles, in units of each feature's variance."""
    run = load_run(path, open_device("cpu"))
    run.steps = run.config.get("ddim_steps", 0)
    rows, _ = decay_chain(count, seed=UNSEEN)
    total = objects = 0
    for i, batch, z, _ in encode_rows(rows, run):
        outputs = from_latents(run.model, run.noises, z, batch["ids"], run.steps, i)
        errors = event_errors(*outputs, batch, run.model.level)
        n = (batch["ids"] > 0).sum(1).numpy()
        total += (errors["rec_tokens"] * n).sum()
        objects += n.sum()
    return total / objects


PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
MAZE = "###########\\n#S    #   #\\n##### # # #\\n#     # # #\\n# ##### # #\\n#       # #\\n# ### ### #\\n"
MAZE += "# #   #   #\\n# # ### ###\\n# #      G#\\n###########\\n"
MODELS = dict(
    addition=Model(
        "adds two numbers below 100",
        'python generate.py addition --prompt "What is 12 + 7?"',
        "sums of two numbers below 100; one in five is held out",
        "held-out sums of two-digit numbers right",
        "%", sums, 2000,
    ),
    sudoku4=Model(
        "fills 4 x 4 Sudokus",
        "python generate.py sudoku4 --prompt 1...3......4..2.",
        "2,000 puzzles of prepare_data.py sudoku, 6 givens",
        "held-out 4 x 4 Sudokus of 6 givens solved",
        "%", partial(grids, size=4, givens=6), 1000,
    ),
    sudoku9=Model(
        "fills 9 x 9 Sudokus",
        f"python generate.py sudoku9 --prompt {PUZZLE}",
        "puzzles of prepare_data.py sudoku, 32 givens",
        "new 9 x 9 Sudokus of 32 givens solved",
        "%", partial(grids, size=9, givens=32), 200,
    ),
    sudoku6=Model(
        "solves pictures of 6 x 6 Sudokus",
        "python generate.py sudoku6 --prompt 52..13.3..26.5...2....5.2....531....",
        "pictures of puzzles of 14 givens; one solution in twenty is held out",
        "held-out pictures of 6 x 6 Sudokus solved",
        "%", partial(pages, name="sudoku6"), 512,
    ),
    maze=Model(
        "finds the shortest way through pictures of mazes",
        f"printf '{MAZE}' | python generate.py maze --input -",
        "pictures of mazes of 11 x 11 cells; one in twenty is held out",
        "held-out mazes of 11 x 11 cells with a shortest way",
        "%", partial(pages, name="maze"), 512,
    ),
    demo=Model(
        "writes text like the demo's five domains",
        'python generate.py demo --prompt "In the beginning" --max_new_tokens 60',
        "five domains of installed packages, by prepare_data.py expert; one document in ten is held out",
        "held-out text of five domains",
        "bits per byte", text, 400,
    ),
    codebook=Model(
        "turns particles into one of 512 codes and back",
        "python generate.py codebook --data decay_chain --events 100 --out events100.npz",
        "20,000 events of decay_chain",
        "squared error of new particles, in units of the variance",
        "", events, 2000,
    ),
)  # fmt: skip


# --- rows -------------------------------------------------------------------------------------
def figure_of(name, path=None, count=0):
    """Return the rounded figure of a model, by its name or by the path of a file like it."""
    model = MODELS[name]
    return float(f"{model.score(path or PRETRAINED / f'{name}.pt', count or model.count):.4g}")


def rows_of(name, args):
    """Yield the figure of a model, if it is there."""
    if (PRETRAINED / f"{name}.pt").exists():
        model, value, missing = MODELS[name], None, None
        try:
            value = figure_of(name, count=8 if args.quick else 0)
        except DataError:
            if not (args.quick and name == "demo"):  # its text comes from packages, and toy sizes do without
                raise
            missing = "bash scripts/demo.sh"
        yield figure("figure", f"{name}, {model.title}", value, unit=model.unit, baseline=missing)


ROWS = {name: partial(rows_of, name) for name in MODELS}


def main(argv=None):
    args = command_line(__doc__, ROWS, "quality.pretrained", threads=2).parse_args(argv)
    torch.set_num_threads(args.threads)
    measure(args, ROWS, "")


if __name__ == "__main__":
    main()
