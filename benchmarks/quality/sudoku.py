"""What recursion and halting of train_hrm.py are worth: sums, Sudoku and GSM8K answers, with controls.

    python -m benchmarks.quality.sudoku                            # all rows; sudoku takes hours on two cores
    python -m benchmarks.quality.sudoku --rows sums --threads 2
    python -m benchmarks.quality.sudoku --rows text --gsm8k data/gsm8k     # a folder with train.jsonl and test.jsonl
    python -m benchmarks.quality.sudoku --rows ""                  # none: draw sudoku.png from the stored row sudoku

Runs lie in --home and go on where they were; finished ones are only read again.
"""

import contextlib
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import (
    ROOT,
    WORK,
    changed_flags,
    command_line,
    compared,
    figure,
    load,
    measure,
    seconds,
)
from benchmarks.training import update
from data_utils.errors import DataError
from data_utils.reasoning import sudoku as puzzles_of
from data_utils.reasoning.dataset import BUILT_IN, open_pairs
from data_utils.reasoning.generate import best_of_run, load_reasoner
from data_utils.reasoning.halting import pick_threshold, stops
from models.hrm import HRM
from models.optim.adamw8bit import AdamW8bit
from train_hrm import parse

ADAM = "--optimizer adamw"
PLAIN = f"{ADAM} --core plain --segments 1 --no-halting"
SUDOKU = dict(  # arm: (name, flags, seeds); steps such that all take about the same seconds
    recursive=("recursion", f"{ADAM} --steps 3300", 3),
    short=("recursion, 2,300 steps", ADAM, 1),
    plain=("the same parameters once", f"{PLAIN} --steps 9200", 1),
    twelve=("twelve layers", f"{PLAIN} --core_layers 12 --steps 2370", 1),
)
ABLATE = dict(  # arm: (which part is removed or added, flags), each for 600 steps
    default=("as it is", ""),
    adamw=("AdamW", ADAM),
    no_share=("f_L and f_H with weights of their own", "--no-share"),
    two_calls=("gradients through the last two calls", "--grad one_step"),
    all_calls=("gradients through all calls", "--grad bptt"),
    one_segment=("one segment a batch", "--segments 1"),
    no_average=("no averaged weights", "--ema 0"),
    no_relation=("no relation bias", "--no-relation_bias"),
)
SUMS = dict(
    recursive=("recursion", "", 3),
    none=("core none, a layer more", "--core none --encoder_layers 2", 3),
    rope=("positions from the left", "--positions rope", 1),
)
TEXT = "--warmup_steps 50 --grad_clip 1 --batch_size 8 --eval_rows 400 --mixed_precision auto"
CURVE = 1, 2, 4, 8, 16
SEGMENTS = CURVE[-1]


# --- runs -------------------------------------------------------------------------------------
def train(args, name, *flags):
    """Run train_hrm.py to its end, or read its files -> last training row, last validation row."""
    words = [sys.executable, f"{ROOT}/train_hrm.py", f"--run_name={name}", *" ".join(flags).split()]
    if args.quick:
        words.append("--steps=20")
    args.home.mkdir(parents=True, exist_ok=True)
    threads = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
    subprocess.run(words, check=True, cwd=args.home, env=threads, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (args.home / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return tuple([row for row in rows if row.get("split") == split][-1] for split in ("train", "val"))


def runs_of(args, group, arms, *flags):
    """Yield (arm, its name, [validation row of each seed])."""
    for arm, (name, more, seeds) in arms.items():
        runs = []
        for seed in range(min(seeds, args.seeds)):
            run = f"{group}-{arm}-seed{seed}"
            runs.append(train(args, run, *flags, more, f"--seed {seed}")[1])
            print(f"  {run}: {runs[-1]}", flush=True)
        yield arm, name, runs


def percent(runs, name):
    """Return 'mean (each seed)' of a number of validation rows, in percent."""
    values = [100 * val[name] for val in runs if name in val]
    return f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})" if values else ""


def sums(args):
    """Addition: 1,620 held-out sums of two-digit numbers, 380 with a shorter operand."""
    for arm, name, runs in runs_of(args, "sums", SUMS, f"--config {ROOT}/configs/hrm/addition.yaml"):
        worst = min(val["exact"] for val in runs)
        spread = f"worst {1620 * worst:.0f} of 1,620; one operand short: {percent(runs, 'exact_short')}"
        yield figure(arm, f"held-out sums right, {name}", percent(runs, "exact"), "100", unit="%", seeds=len(runs),
                     spread=spread)  # fmt: skip


# --- Sudoku -----------------------------------------------------------------------------------
def training_seconds(flags):
    """Return steps of a Sudoku arm times the seconds of one now: the runs themselves may have had company."""
    cfg = parse(["--dataset", "sudoku", *flags.split()])
    values = asdict(cfg) | dict(vocab_size=10)
    model = HRM(**{name: values[name] for name in inspect.signature(HRM).parameters})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randint(1, 10, (2, cfg.batch_size, 81))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss, *_ = model(dict(encoder_ids=x, labels=y))
        update(model, optimizer, loss)

    return cfg.steps * statistics.median([seconds(step) for _ in range(9)])


def singles(puzzles):
    """Return the share of puzzles (n, side^2) solved by filling in cells with a single candidate, again and again."""
    side = math.isqrt(puzzles.shape[1])
    digits, peers = set(range(1, side + 1)), puzzles_of.peers(side)

    def solved(grid):
        while True:
            free = {i: digits - {grid[j] for j in peers[i]} for i, digit in enumerate(grid) if not digit}
            new = {i: candidates.pop() for i, candidates in free.items() if len(candidates) == 1}
            if not new:
                return not free
            for i, digit in new.items():
                grid[i] = digit

    return statistics.mean(solved(puzzle.tolist()) for puzzle in puzzles)


@cache
def traced(home, name):
    """Trace a finished run over its validation puzzles -> (N, SEGMENTS) each, model, puzzles and solutions."""
    with contextlib.chdir(home):
        model, checkpoint, _, _ = load_reasoner(best_of_run(Path("runs", name)))
    puzzles, solutions = grids(checkpoint["config"]["data_seed"])
    parts = []
    for x, y in zip(puzzles.split(100), solutions.split(100), strict=True):
        parts.append(model.trace(dict(encoder_ids=x, labels=y), SEGMENTS if model.core.recursive else 1))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, model, (puzzles, solutions)


@cache
def grids(seed):
    """Return held-out puzzles and solutions, (1000, 81) each."""
    return [torch.from_numpy(grid).long() for grid in puzzles_of.make(**BUILT_IN, seed=seed, processes=2)["val"]]


def sudoku(args):
    """9 x 9 puzzles of 40 givens that no training puzzle is a disguise of; the worth of another segment."""
    for arm, name, runs in runs_of(args, "sudoku", SUDOKU, "--dataset sudoku --log_steps 100"):
        spread = [f"cells {percent(runs, 'cells')}", f"{training_seconds(SUDOKU[arm][1]):.0f} s of steps, quiet"]
        if arm == "recursive":
            used = statistics.mean(val["segments"] for val in runs)
            spread.insert(0, f"halting {percent(runs, 'exact_halting')} after {used:.2f} segments")
        yield figure(arm, f"sudoku, 40 givens, held out, solved, {name}", percent(runs, "exact"),
                     ">= 95" if arm == "recursive" else "", unit="%", spread=spread, seeds=len(runs))  # fmt: skip
        if arm == "recursive":
            traces = [traced(args.home, f"sudoku-{arm}-seed{seed}")[0] for seed in range(len(runs))]
            curves = [100 * trace["right"].double().mean(0) for trace in traces]
    for k in CURVE:
        values = [curve[k - 1].item() for curve in curves]
        yield figure(f"segments{k}", f"sudoku, solved after {k} segments", round(statistics.mean(values), 1), unit="%",
                     spread=f"{min(values):.1f} to {max(values):.1f}", seeds=len(values))  # fmt: skip
    naked = 100 * singles(grids(1)[0])
    yield figure("singles", "sudoku, solved by cells with a single candidate alone", round(naked, 1), "beside",
                 unit="%")  # fmt: skip


def givens(args):
    """9 x 9 puzzles by muon, the default; of 32 givens too, where single candidates solve less than half."""
    folder = args.home / "sudoku32"
    if not (folder / "meta.json").exists():
        words = [sys.executable, f"{ROOT}/prepare_data.py", "sudoku", "--givens", "32", "--out", str(folder)]
        subprocess.run(words, check=True)
    hard = torch.from_numpy(np.load(folder / "val.npy")[:, 0]).long()
    arms = (  # givens, flags, steps, puzzles, target
        (32, f"--dataset {folder} --steps 3300", "3,300", hard, "> 47"),
        (40, "--dataset sudoku", "2,300", grids(1)[0], ">= 90"),
    )
    for count, flags, steps, puzzles, target in arms:
        _, val = train(args, f"sudoku{count}-seed0", flags, "--log_steps 100")
        title = f"sudoku, {count} givens, held out, solved, recursion, {steps} steps of muon"
        yield figure(f"{count}", title, round(100 * val["exact"], 1), target, unit="%",
                     baseline=round(100 * singles(puzzles), 1),
                     spread=[f"halting {100 * val['exact_halting']:.1f} after {val['segments']:.2f} segments",
                             f"cells {100 * val['cells']:.1f}",
                             "baseline: cells with a single candidate, repeated"])  # fmt: skip


def ablate(args):
    """Score 600 steps of Sudoku without each part: 40 givens, one seed, 500 held-out puzzles."""
    for i, (arm, (name, more)) in enumerate(ABLATE.items()):
        row, val = train(args, f"ablate-{i}", "--dataset sudoku --steps 600 --eval_rows 500 --log_steps 100", more)
        yield figure(arm, f"sudoku after 600 steps, solved, {name}", round(100 * val["exact"], 1), unit="%",
                     spread=[f"halting {100 * val['exact_halting']:.1f}", f"cells {100 * val['cells']:.1f}",
                             f"{row['seconds']:.0f} s"])  # fmt: skip


def draw(figures, out):
    """Draw % solved over segments, with the range of the seeds, from the figures of `sudoku`; other arms as levels."""
    from data_utils.figures import COLOURS, WIDTH, open_frame, plt, small_legend, write_figure

    values = {f["id"].split(".")[-1]: f for f in figures}
    solved = [values[f"segments{k}"] for k in CURVE]
    low, high = zip(*(map(float, f["spread"].split(" to ")) for f in solved), strict=True)
    picture, ax = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    ax.plot(CURVE, [f["ours"] for f in solved], "o-", label=f"recursion, {solved[0]['seeds']} seeds: mean and range")
    ax.fill_between(CURVE, low, high, alpha=0.25)
    levels = {arm: name for arm, (name, *_) in SUDOKU.items() if arm in ("plain", "twelve")}
    levels["singles"] = "cells with a single candidate, repeated"
    for colour, (arm, name) in zip(COLOURS[1:], levels.items(), strict=False):
        level = float(str(values[arm]["ours"]).split()[0])  # the mean, before each seed
        ax.axhline(level, color=colour, ls="--", label=f"{name}: {level:g} %")
    ax.set(xlabel="segments of reasoning", ylabel="puzzles solved (%)", ylim=(-3, 103), xticks=CURVE,
           title="9 x 9 Sudoku, 40 givens, held out: equal training seconds")  # fmt: skip
    open_frame(ax)
    small_legend(ax, loc="center right")
    write_figure(picture, out)


def halting(args):
    """Stopping by the halting head: the threshold is chosen on half of the held-out puzzles, scored on the others."""
    for seed in range(args.seeds):
        trace, *_ = traced(args.home, f"sudoku-recursive-seed{seed}")
        half = len(trace["right"]) // 2
        threshold = pick_threshold({key: values[:half] for key, values in trace.items()})
        right, last = trace["right"][half:].double(), stops(trace["halt"][half:], threshold)
        fixed, stopped = 100 * right.mean(0), 100 * right.gather(1, last[:, None]).mean().item()
        oracle = torch.where(right.any(1), right.argmax(1), SEGMENTS - 1).double().mean().item() + 1
        used = last.double().mean().item() + 1
        yield figure(f"seed{seed}", f"sudoku, segments used with halting, of {SEGMENTS}, seed {seed}", round(used, 2),
                     "<= 0.6", baseline=SEGMENTS, ratio=round(used / SEGMENTS, 3),
                     spread=f"solved {stopped:.1f} %, best fixed count {fixed.max():.1f} % at {fixed.argmax() + 1}; "
                            f"an oracle would stop after {oracle:.2f}")  # fmt: skip


def failures(args):
    """Easy puzzles and fixed points: known failures of such models (arXiv 2601.10679)."""
    for seed in range(args.seeds):
        trace, model, (_, solutions) = traced(args.home, f"sudoku-recursive-seed{seed}")
        blank = torch.randint(81, (len(solutions), 1), generator=torch.Generator().manual_seed(0))
        one = model.trace(dict(encoder_ids=solutions.scatter(1, blank, 0), labels=solutions), 4)["right"][:, -1]
        yield figure(f"one_blank.seed{seed}", f"sudoku, puzzles with one blank solved after 4 segments, seed {seed}",
                     round(100 * one.double().mean().item(), 2), ">= 99.9", unit="%")  # fmt: skip
        right = trace["right"]
        still = right[right[:, 3], -1].double().mean().item()
        yield figure(f"still.seed{seed}", f"sudoku, right after 4 segments and still after {SEGMENTS}, seed {seed}",
                     round(100 * still, 2), ">= 99.5", unit="%")  # fmt: skip


# --- text -------------------------------------------------------------------------------------
def prepared(args):
    """Prepare GSM8K as questions and answers, by prepare_data.py normalize-qa and language -> folder."""
    if not args.gsm8k:
        raise DataError("text needs GSM8K\n"
                        "try: --gsm8k FOLDER, with train.jsonl and test.jsonl of openai/grade-school-math")  # fmt: skip
    folder = args.home / "gsm8k"
    if not (folder / "meta.json").exists():
        args.home.mkdir(parents=True, exist_ok=True)
        fields = "--question-field question --answer-field answer --fresh"
        for words in (
            f"normalize-qa --input {args.gsm8k}/train.jsonl --output {folder}.jsonl {fields}",
            f"language --source {folder}.jsonl --dest {folder} --val-ratio 0.1 --format bin --vocab-size 4096",
        ):
            subprocess.run([sys.executable, f"{ROOT}/prepare_data.py", *words.split()], check=True)
    return folder


def text(args):
    """Question -> answer on GSM8K: the core against none, and the worth of the prompt."""
    folder, unigram = prepared(args), None
    arms = dict(recursion=("recursion", ""), core=("core none, two layers more", "--core none --encoder_layers 4"))
    for arm, (arm_name, more) in arms.items():
        name = f"text-{arm}"
        _, val = train(args, name, f"{TEXT} --dataset {folder} --steps {args.text_steps} {more}")
        with contextlib.chdir(args.home):
            model, checkpoint, _, _ = load_reasoner(best_of_run(Path("runs", name)))
        data = open_pairs(folder, max_seq_len=checkpoint["config"]["max_seq_len"])
        rng, rows = np.random.default_rng(0), np.arange(400)
        right, shuffled = (nats(model, data, rows, prompts) for prompts in (rows, rng.permutation(rows)))
        permuted = nats(model, data, rows, rows, rng)
        unigram = unigram or entropy(data)
        yield figure("none" if arm == "core" else arm, f"GSM8K answers, {arm_name}", round(val["bpb"], 4),
                     unit="bits per byte",
                     spread=f"nats per token {right:.4f}; with the prompts of other rows {shuffled:.4f}; with the "
                            f"tokens of answers permuted {permuted:.3f}, unigram entropy {unigram:.3f}")  # fmt: skip


@torch.no_grad()
def nats(model, data, rows, prompts, rng=None):
    """Return mean nats per label of rows with the prompts of `prompts`; rng: the tokens of each answer permuted."""
    total = count = 0
    for index, other in zip(np.array_split(rows, 20), np.array_split(prompts, 20), strict=True):
        batch, prompt = data.batch("val", index), data.batch("val", other)
        batch |= {name: prompt[name] for name in ("encoder_ids", "encoder_mask")}
        for labels, inputs in zip(batch["labels"], batch["decoder_input_ids"], strict=True) if rng else ():
            n = int((labels >= 0).sum()) - 1  # all but the end of the answer
            labels[:n] = labels[:n][torch.from_numpy(rng.permutation(n))]
            inputs[1 : n + 1] = labels[:n]
        total += model.trace(batch, 1)["nats"].sum().item()
        count += int((batch["labels"] >= 0).sum())
    return total / count


def entropy(data):
    """Return nats per label of the validation rows under the frequencies of the training labels, plus one each."""

    def counts(split, n):
        rows = np.arange(min(n, data.rows(split)))
        labels = torch.cat([data.batch(split, index)["labels"].flatten() for index in np.array_split(rows, 20)])
        return torch.bincount(labels[labels >= 0], minlength=data.meta["vocab_size"]).double()

    train_counts, val_counts = counts("train", 100_000) + 1, counts("val", 400)
    return -((train_counts / train_counts.sum()).log() * val_counts / val_counts.sum()).sum().item()


def moments(args):
    """8-bit AdamW against fp32 on the same batches of text."""
    flags = f"{TEXT} --dataset {prepared(args)} --steps {args.text_steps // 2} --optimizer "
    losses = [train(args, f"text-{name}", flags + name)[1]["loss"] for name in ("adamw_8bit", "adamw")]
    yield compared("loss", "GSM8K, validation loss with 8-bit moments, against fp32", [losses], "<= 1.01", unit="nats")
    p = torch.nn.Parameter(torch.randn(512, 512))
    sizes = []
    for optimizer in (AdamW8bit([p], lr=1e-3, betas=(0.9, 0.95), seed=0), torch.optim.AdamW([p])):
        p.grad = torch.randn_like(p)
        optimizer.step()
        sizes.append(sum(t.nbytes for t in optimizer.state[p].values() if torch.is_tensor(t)))
    yield compared("size", "both moments of 512 x 512 weights, 8-bit against fp32", [sizes], "<= 0.3", unit="bytes")


ROWS = dict(sums=sums, sudoku=sudoku, givens=givens, ablate=ablate, halting=halting, failures=failures, text=text,
            moments=moments)  # fmt: skip


def main(argv=None):
    parser = command_line(__doc__, ROWS, "quality.sudoku", seeds=3, threads=2, text_steps=300)
    add = parser.add_argument
    add("--home", type=Path, default=WORK / "hrm", help="where runs/ lies")
    add("--gsm8k", type=Path, help="folder with train.jsonl of GSM8K, for text and moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.home, args.gsm8k = args.home.resolve(), args.gsm8k and args.gsm8k.resolve()
    measure(args, ROWS, changed_flags(parser, args, ["threads"]))
    if "sudoku" in (results := load(args.out)):
        draw(results["sudoku"]["figures"], args.out.with_name("sudoku.png"))


if __name__ == "__main__":
    main()
