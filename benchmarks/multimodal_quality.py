"""What the parts of train_multimodal.py are worth: rows of multimodal.py, each of runs that train for some minutes.

A run is a folder in --home: finished it is only read again, interrupted it goes on. Its data lie beside it and are
built before its minutes begin. Figures are of the held-out half that selects nothing, averaged weights unless they
say `raw`; n samples, T steps, K paths.
"""

import contextlib
import hashlib
import io
import random
import statistics
from types import SimpleNamespace

import numpy as np
import torch

import train_multimodal
from benchmarks.hrm import singles
from data_utils import puzzles
from data_utils.checkpoint import load_checkpoint, named
from data_utils.config import from_cli
from data_utils.hardware import Hardware
from data_utils.judge import traces
from data_utils.metrics import read_rows
from data_utils.overrides import PICTURES
from data_utils.render import HOLE
from data_utils.scores import score
from data_utils.shards import Shards
from data_utils.tasks import DIGIT, Task
from models.multimodal import Multimodal

DATA = """tasks train_samples test_samples page_rows page_cols text_source stories code_dir arc_set arc_side seed
build_batch""".split()  # flags that change samples
QUICK = """--train_samples=32 --test_samples=8 --hidden_size=32 --num_heads=2 --global_batch_size=4 --max_steps=3
--supervision_steps=2 --text_supervision_steps=2 --build_batch=4 --memory_slots=8 --vq_size=16""".split()
HELD_OUT = 1024  # samples, half of them reported
CURVE = 1, 2, 4, 8, 16
CODES = "codes_used", "perplexity"
ONCE = "--H_cycles=1 --L_cycles=1 --supervision_steps=1"
MAZE = "--arch=maze --relation_bias --global_batch_size=32"
READ = "--arch=read --warmup_steps=100"
ARMS = dict(  # row: {what is trained: (flags, most seeds, target)}; the first is the one that the row is about
    sudoku4={
        "recursion on pictures": ("--arch=sudoku4", 3, ">= 99.5"),
        "the same layers once": (f"--arch=sudoku4 {ONCE}", 1, ""),
        "tokens in place of pictures": ("--arch=sudoku4 --bottleneck=tokens", 1, "within 1"),
        "12 capsules": ("--arch=sudoku4 --bottleneck=capsules", 1, ""),
    },
    sudoku6={
        "recursion on pictures": ("--arch=sudoku6", 3, ">= 97"),
        "the same layers once": (f"--arch=sudoku6 {ONCE}", 1, ""),
        "tokens in place of pictures": ("--arch=sudoku6 --bottleneck=tokens", 1, ""),
        "12 capsules": ("--arch=sudoku6 --bottleneck=capsules", 1, ""),
    },
    maze={
        "attention with a bias per offset": (MAZE, 3, ">= 70"),
        "the same layers once": (f"{MAZE} {ONCE}", 1, ""),
        "mlp_t": ("--arch=maze --mixer=mlp_t", 1, ""),
        "attention with RoPE": ("--arch=maze", 1, ""),
        "tokens in place of pictures": (f"{MAZE} --bottleneck=tokens", 1, ""),
    },
    reading={
        "4 characters a capsule": (READ, 3, ">= 99.9"),
        "8 characters a capsule": (f"{READ} --page_rows=4", 1, ">= 99"),
        "16 characters a capsule": (f"{READ} --page_rows=8", 1, ""),
        "32 characters a capsule": (f"{READ} --page_rows=16", 1, ""),
        "4 a capsule, the same layers once": (f"{READ} --L_cycles=1", 1, ""),
        "4 a capsule of 1 code": (f"{READ} --use_vq_codebook --vq_groups=1", 1, ""),
        "4 a capsule of 4 codes": (f"{READ} --use_vq_codebook --vq_groups=4", 1, ""),
        "4 a capsule of 16 codes": (f"{READ} --use_vq_codebook --vq_groups=16", 1, ""),
        "no capsules, every page drawn another way": (f"{READ} --bottleneck=patches --augment", 1, ">= 99.5"),
        "no capsules, tokens in place of pictures": (f"{READ} --bottleneck=tokens", 1, ""),
    },
)


# --- runs -------------------------------------------------------------------------------------
def train(args, name, flags, seed, steps=0):
    """Train to the end of --minutes, or of `steps`, or read what is there -> home, cfg, rows, test: the last row."""
    words = [*flags.split(), f"--seed={seed}", f"--test_samples={HELD_OUT}", "--wandb=disabled", "--save_minutes=2"]
    words += QUICK if args.quick else [f"--max_steps={steps}"] if steps else []
    cfg = from_cli({"multimodal": train_multimodal.Config}, argv=words, prog="train_multimodal.py", overrides=PICTURES)
    about = hashlib.blake2b(repr([getattr(cfg, name) for name in DATA]).encode(), digest_size=4).hexdigest()
    home = args.home / "-".join(f"{name} seed {seed}".replace(",", "").split())
    cfg.data_paths, cfg.checkpoint_path = (str(args.home / "data" / f"{'-'.join(cfg.tasks)}-{about}"),), str(home)
    cfg.log_file = str(args.home / "train.log")
    args.home.mkdir(parents=True, exist_ok=True)
    run = SimpleNamespace(home=home, cfg=cfg, rows=rows_of(home))
    if not (run.rows and run.rows[-1]["split"] == "test"):
        if not steps:
            cfg.max_seconds = max(1.0, 60 * args.minutes - spent(run.rows))
        for cfg.dataset_only in (True, False):  # the data first: a builder would take its share of the minutes
            with contextlib.redirect_stdout(io.StringIO()):
                if train_multimodal.main(cfg)["stopped"]:
                    raise SystemExit(f"{home}: stopped; started again, it goes on")
        run.rows = rows_of(home)
    run.test = run.rows[-1]
    return run


def rows_of(home):
    """The rows of metrics.jsonl that belong to a split, [] without any."""
    return [row for row in read_rows(home / "metrics.jsonl") if row.get("split")]


def spent(rows):
    """Seconds that a run took so far, over all its starts: each counts its own."""
    total = last = 0.0
    for row in rows:
        now = row.get("seconds", last)
        total, last = total + (last if now < last else 0), now
    return total + last


def runs_of(args, row, arm):
    """The runs of an arm, a seed each."""
    flags, most, _ = ARMS[row][arm]
    return [train(args, f"{row} {arm}", flags, seed) for seed in range(min(most, args.seeds))]


def asked_for(args, row):
    """The arms of a row that are asked for: all, or those with one of the words of --arms."""
    return [arm for arm in ARMS[row] if not args.arms or any(word in arm for word in args.arms.split(","))]


def quoted(values, digits=1):
    """'mean (each)' of shares, in percent."""
    values = [100 * float(value) for value in values]
    each = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{each}"


class Trained:
    """Averaged weights of a finished run of one task, and what is held out for it."""

    def __init__(self, run):
        state = named(load_checkpoint(run.home / "ema_model.pt", "multimodal"))
        self.model, self.run = Multimodal(**state["model_args"]), run
        self.model.load_state_dict(state["model_state"])
        self.model.eval()
        ((self.name, task),) = self.model.tasks.items()
        self.task, self.hardware = Task(**task), Hardware("cpu", "bf16")
        self.data = Shards(run.cfg.data_paths, [self.name], seed=run.cfg.seed)
        self.steps = self.model.limit(self.name)

    def think(self, held, *, steps=0, paths=0, noise=0.0):
        """Answers (n, T, K, L), halt and nats (n, T, K)."""
        how = dict(size=self.run.cfg.global_batch_size, seed=0, hardware=self.hardware, paths=paths, noise=noise)
        return traces(self.model, self.name, self.task, held, steps=steps or self.steps, **how)

    def held_out(self, split="test"):
        return self.data.held_out(self.name, split)

    def score(self, held, answers):
        """{name: (n) numbers} of answers (n, L)."""
        return score(self.task, *(np.asarray(part) for part in (held["page"], held["target"], answers)))


# --- one task ---------------------------------------------------------------------------------
def learned(args, row, title):
    """A figure for each arm of a row: its first score with controls, then how it grows with the steps."""
    for arm in asked_for(args, row):
        runs, target = runs_of(args, row, arm), ARMS[row][arm][-1]
        task = runs[0].cfg.tasks[0]
        first = next(key.split("/")[1] for key in runs[0].test if key.startswith(f"{task}/"))

        def percent(key, runs=runs, task=task):
            return quoted(run.test[f"{key.replace('TASK', task)}"] for run in runs)

        others = [key.split("/")[1] for key in runs[0].test if key.startswith(f"{task}/")]
        others = [name for name in others if name in "cells blanks valid no_spaces exact cer".split() and name != first]
        about = [f"{name} {percent(f'TASK/{name}')}" for name in others]
        about += [f"{control} {percent(f'{control}/TASK/{first}')}" for control in ("raw", "shuffled", "blank")]
        about += [f"majority symbol {majority(runs[0], first):.1f}"]
        if f"{task}/codes_used" in runs[0].test:
            used, spread = (statistics.mean(run.test[f"{task}/{key}"] for run in runs) for key in CODES)
            bits = runs[0].cfg.vq_groups * np.log2(runs[0].cfg.vq_size)
            about += [f"{bits:.0f} bits a capsule, {used:.0f} codes used, perplexity {spread:.0f}"]
        about += [f"{statistics.mean(run.test['step'] for run in runs):.0f} steps in {spent(runs[0].rows):.0f} s"]
        yield dict(figure=f"{title}, {arm}", ours=percent(f"TASK/{first}"), target=target, spread="; ".join(about))
        curve = [key for key in (f"{task}/{first}@{t}" for t in CURVE) if key in runs[0].test] + [f"{task}/{first}"]
        if arm == next(iter(ARMS[row])) and len(curve) > 1:
            steps = [key.partition("@")[2] or str(runs[0].cfg.supervision_steps) for key in curve]
            values = [100 * statistics.mean(run.test[key] for run in runs) for key in curve]
            yield dict(figure=f"{title}, {arm}, after {', '.join(steps)} steps", target="rising",
                       ours=", ".join(f"{value:.1f}" for value in values))  # fmt: skip


def majority(run, first):
    """The first score of answers that are all the most frequent symbol of what is held out, in percent."""
    trained = Trained(run)
    held = trained.held_out()
    answers = torch.full_like(held["target"], int(held["target"].flatten().bincount().argmax()))
    return 100 * float(np.nanmean(trained.score(held, answers)[first]))


def averaging(row, runs):
    """Averaged weights against those of the same step, over the evaluations of each run."""
    for seed, run in enumerate(runs):
        first = next(key for key in run.test if key.startswith(f"{run.cfg.tasks[0]}/"))
        seen = [(r["step"], 100 * r[first], 100 * r[f"raw/{first}"]) for r in run.rows if r["split"] == "val"]
        best = max(ema - raw for _, ema, raw in seen)
        said = ", ".join(f"step {step}: {ema:.1f} and {raw:.1f}" for step, ema, raw in seen)
        yield dict(figure=f"{row}, averaged weights above those of the step, points of %, most, seed {seed}",
                   ours=round(best, 1), target=">= 2", spread=said)  # fmt: skip


def first_above(run, share):
    """Seconds of training when the first evaluation was at `share` or more; None if none was."""
    first, seconds = next(key for key in run.test if key.startswith(f"{run.cfg.tasks[0]}/")), 0.0
    for row in run.rows:
        seconds = row.get("seconds", seconds)
        if row["split"] == "val" and row[first] >= share:
            return seconds
    return None


# --- Sudoku -----------------------------------------------------------------------------------
def other_pages(pages, held):
    """The held-out samples with other pages (n, R, C) of the same answers."""
    pages = torch.as_tensor(pages).to(torch.uint8).view_as(held["page"])
    return held | dict(page=pages)


def sudoku(args, side):
    """n x n puzzles that no training puzzle is the solution of, 6 of 16 and 14 of 36 givens."""
    row = f"sudoku{side}"
    yield from learned(args, row, f"{side} x {side} Sudoku, held out, % solved")
    if (first := next(iter(ARMS[row]))) not in asked_for(args, row):
        return
    runs = runs_of(args, row, first)
    yield from averaging(row, runs)
    if side == 4:
        reached = [first_above(run, 0.99) for run in runs]
        yield dict(figure="4 x 4 Sudoku, seconds to the first evaluation at 99 %", target="<= 180",
                   ours=", ".join("never" if s is None else f"{s:.0f}" for s in reached))  # fmt: skip
    found = [easy_and_hard(Trained(run), side) for run in runs]
    one, kept, minimal, naked, naked_minimal, givens = zip(*found, strict=True)
    yield dict(figure=f"{side} x {side} Sudoku, one blank, % solved", ours=quoted(one), target="100",
               spread=f"after 4 steps and still after 16 more {quoted(kept)}")  # fmt: skip
    yield dict(figure=f"{side} x {side} Sudoku, minimal puzzles, % solved", ours=quoted(minimal), target="beside",
               peer=quoted(naked_minimal), spread=f"{statistics.mean(givens):.1f} givens; peer: single candidates, "
               f"which solve {quoted(naked)} of the puzzles that were trained on")  # fmt: skip


def easy_and_hard(trained, side):
    """Shares solved: one blank, still solved after 16 more steps, minimal puzzles; by single candidates; givens."""
    held = trained.held_out()
    targets, draw = held["target"].numpy(), random.Random(0)
    pages = targets.copy()
    pages[np.arange(len(pages)), [draw.randrange(side * side) for _ in pages]] = HOLE
    held = other_pages(pages, held)
    answers = trained.think(held, steps=4 if trained.steps < 16 else 20)["answers"][:, :, 0]
    early, late = (trained.score(held, answers[:, t])["exact"] for t in (3, -1))
    grids = [puzzles.empty((row - DIGIT).tolist(), side, 0, random.Random(i)) for i, row in enumerate(targets)]
    grids = np.array(grids, np.uint8)
    hard = other_pages(np.where(grids == 0, np.uint8(HOLE), grids + DIGIT), held)
    minimal = trained.score(hard, trained.think(hard)["answers"][:, -1, 0])["exact"]
    own = trained.held_out()["page"].flatten(1).numpy()
    own = np.where(own == HOLE, 0, own - DIGIT)
    shares = [early.mean(), late[early > 0].mean() if early.any() else float("nan"), minimal.mean()]
    return *shares, singles(own), singles(grids), (grids > 0).sum(1).mean()


def sudoku4(args):
    yield from sudoku(args, 4)


def sudoku6(args):
    yield from sudoku(args, 6)


def maze(args):
    """11 x 11 mazes, scored by search: any shortest way is right."""
    yield from learned(args, "maze", "11 x 11 mazes, held out, % with a shortest way")


def reading(args):
    """Pages of unseen files and stories; without `augment` a patch is two whole characters, a lookup."""
    yield from learned(args, "reading", "reading through 12 capsules, unseen text, % of characters")


ROWS = dict(sudoku4=sudoku4, sudoku6=sudoku6, maze=maze, reading=reading)
