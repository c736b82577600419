"""Figures of train_hrm.py: what recursion and halting are worth, speed against the official HRM, text with controls.

    python benchmarks/hrm.py                                     # all rows; sudoku takes hours on two cores
    python benchmarks/hrm.py --rows sums,step --threads 2
    python benchmarks/hrm.py --rows text --gsm8k ../gsm8k        # a folder with train.jsonl and test.jsonl
    python benchmarks/hrm.py --rows "" --readme                  # only write tables and figure

Runs lie in --home and go on where they were; what is finished is only read again.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import command_line, figure, measure, seconds, timed
from data_utils.errors import DataError
from data_utils.reasoning.answers import load_reasoner, pick_threshold, stops
from data_utils.reasoning.dataset import open_pairs
from data_utils.reasoning.questions import BUILT_IN
from data_utils.reasoning.sudoku import make, peers
from models.hrm import HRM
from models.optim.adamw8bit import AdamW8bit
from train_hrm import parse

HERE = Path(__file__).resolve().parent
GET = "git clone https://github.com/sapientinc/HRM benchmarks/peers/HRM"
ADAM = "--optimizer adamw"
PLAIN = f"{ADAM} --core plain --segments 1 --no-halting"
SUDOKU = dict(  # what it is called, flags, seeds; steps such that all take about the same seconds
    recursive=("recursion", f"{ADAM} --steps 3300", 3),
    short=("recursion, 2,300 steps", ADAM, 1),
    plain=("the same parameters once", f"{PLAIN} --steps 9200", 1),
    twelve=("twelve layers", f"{PLAIN} --core_layers 12 --steps 2370", 1),
)
ABLATE = {  # what is left out or put in: flags, each for 600 steps
    "as it is": "",
    "AdamW": ADAM,
    "f_L and f_H with weights of their own": "--no-share",
    "gradients through the last two calls": "--grad one_step",
    "gradients through all calls": "--grad bptt",
    "one segment a batch": "--segments 1",
    "no averaged weights": "--ema 0",
    "no relation bias": "--no-relation_bias",
}
SUMS = dict(
    recursive=("recursion", "", 3),
    none=("core none, a layer more", "--core none --encoder_layers 2", 3),
    rope=("positions from the left", "--positions rope", 1),
)
TEXT = "--warmup_steps 50 --grad_clip 1 --batch_size 8 --eval_rows 400 --mixed_precision auto"
SEGMENTS = 16
STEP = dict(width=128, batch=64, length=81, vocab=11, layers=4)  # the architecture of the official code, made small
QUICK = STEP | dict(width=64, batch=2, length=9, layers=1)


# --- runs -------------------------------------------------------------------------------------
def train(args, name, *flags):
    """Run train_hrm.py to its end, or read what it wrote -> (last training row, last validation row)."""
    words = [sys.executable, HERE.parent / "train_hrm.py", f"--run_name={name}", *" ".join(flags).split()]
    words += ["--steps=20"] * args.quick
    args.home.mkdir(parents=True, exist_ok=True)
    threads = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
    subprocess.run(list(map(str, words)), check=True, cwd=args.home, env=threads, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (args.home / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return tuple([row for row in rows if row.get("split") == split][-1] for split in ("train", "val"))


def seeds_of(args, group, arms, *flags):
    """Yield (arm, what it is called, [(training row, validation row) of each seed])."""
    for arm, (called, more, seeds) in arms.items():
        found = []
        for seed in range(min(seeds, args.seeds)):
            found.append(train(args, f"{group}-{arm}-seed{seed}", *flags, more, f"--seed {seed}"))
            print(f"  {group}-{arm}-seed{seed}: {found[-1]}", flush=True)
        yield arm, called, found


def quoted(runs, name):
    """'mean (each seed)' of a number of validation rows, in percent."""
    values = [100 * val[name] for _, val in runs if name in val]
    return f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})" if values else ""


def sums(args):
    """Addition: 1,620 held-out sums of two-digit numbers, 380 with a shorter operand."""
    flags = f"--config {HERE.parent}/configs/hrm/addition.yaml"
    for _, called, runs in seeds_of(args, "sums", SUMS, flags):
        worst = min(val["exact"] for _, val in runs)
        more = f"worst {1620 * worst:.0f} of 1,620; one operand short: {quoted(runs, 'exact_short')}"
        yield dict(figure=f"held-out sums right, %, {called}", ours=quoted(runs, "exact"), target="100", spread=more)


def training_seconds(flags):
    """Steps of a Sudoku arm times what one takes now: the runs themselves may have had company."""
    cfg = parse(["--dataset", "sudoku", *flags.split()])
    known = asdict(cfg) | dict(vocab_size=10)
    model = HRM(**{name: known[name] for name in inspect.signature(HRM).parameters})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randint(1, 10, (2, cfg.batch_size, 81))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss, *_ = model(dict(encoder_ids=x, labels=y))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return cfg.steps * statistics.median([seconds(step) for _ in range(9)])


def singles(puzzles):
    """Share of puzzles (n, side^2) that come out by filling in cells with a single candidate, again and again."""
    side = math.isqrt(puzzles.shape[1])
    digits, seen = set(range(1, side + 1)), peers(side)

    def solved(grid):
        while True:
            free = {i: digits - {grid[j] for j in seen[i]} for i, digit in enumerate(grid) if not digit}
            new = {i: candidates.pop() for i, candidates in free.items() if len(candidates) == 1}
            if not new:
                return not free
            for i, digit in new.items():
                grid[i] = digit

    return statistics.mean(solved(puzzle.tolist()) for puzzle in puzzles)


@cache
def traced(home, name):
    """Trace of a finished run over its validation puzzles, `SEGMENTS` segments: (N, SEGMENTS) each; model; puzzles."""
    with contextlib.chdir(home):
        model, about, _, _ = load_reasoner(name, "", "auto")
    puzzles, solutions = grids(about["config"]["data_seed"])
    parts = []
    for x, y in zip(puzzles.split(100), solutions.split(100), strict=True):
        parts.append(model.trace(dict(encoder_ids=x, labels=y), SEGMENTS if model.core.recursive else 1))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, model, (puzzles, solutions)


@cache
def grids(seed):
    """Held-out puzzles and solutions, (1000, 81) each."""
    return [torch.from_numpy(grid).long() for grid in make(**BUILT_IN, seed=seed, processes=2)["val"]]


def sudoku(args):
    """9 x 9 puzzles of 40 givens that no training puzzle is a disguise of; what a segment more is worth."""
    curves = {}
    for arm, called, runs in seeds_of(args, "sudoku", SUDOKU, "--dataset sudoku --log_steps 100"):
        about = [f"cells {quoted(runs, 'cells')}", f"{training_seconds(SUDOKU[arm][1]):.0f} s of steps, quiet"]
        if arm == "recursive":
            used = statistics.mean(val["segments"] for _, val in runs)
            about.insert(0, f"halting {quoted(runs, 'exact_halting')} after {used:.2f} segments")
        name, target = f"sudoku, 40 givens, held out, % solved, {called}", ">= 95" if arm == "recursive" else ""
        yield dict(figure=name, ours=quoted(runs, "exact"), target=target, spread="; ".join(about))
        traces = [traced(args.home, f"sudoku-{arm}-seed{seed}")[0] for seed in range(len(runs))]
        curves[called] = [100 * trace["right"].double().mean(0) for trace in traces]
    for k in (1, 2, 4, 8, SEGMENTS):
        values = [curve[k - 1].item() for curve in curves["recursion"]]
        yield dict(figure=f"sudoku, % solved after {k} segments", ours=round(statistics.mean(values), 1), target="",
                   spread=f"{min(values):.1f} to {max(values):.1f}")  # fmt: skip
    naked = 100 * singles(grids(1)[0])
    yield dict(figure="sudoku, % solved by cells with a single candidate alone", ours=round(naked, 1), target="beside")
    draw(curves, naked, args.picture)


def givens(args):
    """9 x 9 puzzles by muon, the default; of 32 givens too, where single candidates do for less than half."""
    folder = args.home / "sudoku32"
    if not (folder / "meta.json").exists():
        command = [sys.executable, HERE.parent / "prepare_data.py", "sudoku", "--givens", "32", "--out", folder]
        subprocess.run(list(map(str, command)), check=True)
    hard = torch.from_numpy(np.load(folder / "val.npy")[:, 0]).long()
    arms = [(32, f"--dataset {folder} --steps 3300", hard, "> 47"), (40, "--dataset sudoku", grids(1)[0], ">= 90")]
    for count, flags, puzzles, target in arms:
        _, val = train(args, f"sudoku{count}-seed0", flags, "--log_steps 100")
        steps = "3,300" if "3300" in flags else "2,300"
        yield dict(figure=f"sudoku, {count} givens, held out, % solved, recursion, {steps} steps of muon",
                   target=target, ours=round(100 * val["exact"], 1), peer=round(100 * singles(puzzles), 1),
                   spread=f"halting {100 * val['exact_halting']:.1f} after {val['segments']:.2f} segments; cells "
                          f"{100 * val['cells']:.1f}; beside it cells with a single candidate, repeated")  # fmt: skip


def ablate(args):
    """What each part is worth to 600 steps of Sudoku, 40 givens, one seed, 500 held-out puzzles."""
    for i, (arm, more) in enumerate(ABLATE.items()):
        row, val = train(args, f"ablate-{i}", "--dataset sudoku --steps 600 --eval_rows 500 --log_steps 100", more)
        yield dict(figure=f"sudoku after 600 steps, % solved, {arm}", ours=round(100 * val["exact"], 1), target="",
                   spread=f"halting {100 * val['exact_halting']:.1f}; cells {100 * val['cells']:.1f}; "
                          f"{row['seconds']:.0f} s")  # fmt: skip


def draw(curves, naked, out):
    """% solved over segments, a line a seed; arms without segments as levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (arm, found), colour in zip(curves.items(), plt.get_cmap("tab10").colors, strict=False):
        for seed, curve in enumerate(found):
            label = arm + f", {len(found)} seeds" * (len(found) > 1) if not seed else None
            curve = curve.tolist() * (SEGMENTS if len(curve) == 1 else 1)
            style = dict(marker="o", ms=3.5) if arm == "recursion" else dict(ls="--")
            axes.plot(range(1, SEGMENTS + 1), curve, color=colour, label=label, **style)
    axes.axhline(naked, color="grey", lw=1, ls=":", label="cells with a single candidate, repeated")
    axes.set(xlabel="segments of reasoning", ylabel="puzzles solved (%)", ylim=(-3, 103),
             title="9 x 9 Sudoku, 40 givens, held out: equal training seconds")  # fmt: skip
    axes.set_xticks([1, 2, 4, 8, 12, 16])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    picture.savefig(out, dpi=130)
    plt.close(picture)


def halting(args):
    """Stopping by the halting head, the threshold chosen on one half of the held-out puzzles, measured on the other."""
    for seed in range(args.seeds):
        trace, *_ = traced(args.home, f"sudoku-recursive-seed{seed}")
        half = len(trace["right"]) // 2
        threshold = pick_threshold({key: values[:half] for key, values in trace.items()})
        right, last = trace["right"][half:].double(), stops(trace["halt"][half:], threshold)
        fixed, stopped = 100 * right.mean(0), 100 * right.gather(1, last[:, None]).mean().item()
        first = torch.where(right.any(1), right.argmax(1), SEGMENTS - 1).double().mean().item() + 1
        yield dict(figure=f"sudoku, segments used with halting, of {SEGMENTS}, seed {seed}",
                   ours=round(last.double().mean().item() + 1, 2), peer=SEGMENTS, target="<= 0.6",
                   ratio=round((last.double().mean().item() + 1) / SEGMENTS, 3),
                   spread=f"solved {stopped:.1f} %, best fixed count {fixed.max():.1f} % at {fixed.argmax() + 1}; "
                          f"an oracle would stop after {first:.2f}")  # fmt: skip


def failures(args):
    """Easy puzzles and fixed points: what such models are known to fail at (arXiv 2601.10679)."""
    for seed in range(args.seeds):
        trace, model, (puzzles, solutions) = traced(args.home, f"sudoku-recursive-seed{seed}")
        blank = torch.randint(81, (len(solutions), 1), generator=torch.Generator().manual_seed(0))
        one = model.trace(dict(encoder_ids=solutions.scatter(1, blank, 0), labels=solutions), 4)["right"][:, -1]
        yield dict(figure=f"sudoku, puzzles with one blank solved after 4 segments, %, seed {seed}", target=">= 99.9",
                   ours=round(100 * one.double().mean().item(), 2))  # fmt: skip
        right = trace["right"]
        kept = right[right[:, 3], -1].double().mean().item()
        yield dict(figure=f"sudoku, right after 4 segments and still after {SEGMENTS}, %, seed {seed}",
                   target=">= 99.5", ours=round(100 * kept, 2))  # fmt: skip


# --- speed ------------------------------------------------------------------------------------
class Settings:
    """All that the official code uses of pydantic."""

    def __init__(self, **values):
        self.__dict__ |= values


def imported(folder, shims, *names):
    """Modules `names` of the repository in `folder`, whose `models` is not ours, with `shims` {package: stand-in}.

    Raises ImportError without it.
    """
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "models"}
    before = {name: sys.modules.get(name) for name in shims}
    sys.modules |= shims
    paths = sys.path[:]
    sys.path[:] = [str(folder), *(p for p in paths if not Path(p, "models", "__init__.py").exists())]
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = paths
        for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
            del sys.modules[name]
        sys.modules |= own
        for name, module in before.items():
            sys.modules[name] = module
            if module is None:
                del sys.modules[name]


def official():
    """The official code of HRM with its two CUDA packages replaced -> (model, losses) modules; ImportError without."""

    def attention(q, k, v, causal):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)

    shims = dict(flash_attn=SimpleNamespace(flash_attn_func=attention), pydantic=SimpleNamespace(BaseModel=Settings))
    return imported(HERE / "peers" / "HRM", shims, "models.hrm.hrm_act_v1", "models.losses")


def stepper(side, args, dtype, compile=False):
    """A function that does one training step; `official, one forward` skips its second, for the Q target."""
    s = SimpleNamespace(**args.step)
    torch.manual_seed(0)
    x, y = torch.randint(1, s.vocab, (2, s.batch, s.length))
    if side == "ours":
        model = HRM(vocab_size=s.vocab, d_model=s.width, max_seq_len=s.length, n_heads=s.width // 64, encoder_layers=0,
                    decoder_layers=0, core="recursive", core_layers=s.layers, share=False, h_cycles=2, l_steps=2,
                    grad="one_step", ffn_dim=-(-round(4 * s.width * 2 / 3) // 256) * 256, positions="rope",
                    relation_bias=False, halting=True, halting_weight=0.5)  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        state = SimpleNamespace(carry=None)
        call = model.compiled() if compile else model

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss, _, state.carry = call(dict(encoder_ids=x, labels=y), state.carry)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    modules, losses = official()
    forward_dtype = dict(bf16="bfloat16", fp32="float32")[dtype]
    settings = dict(
        batch_size=s.batch, seq_len=s.length, num_puzzle_identifiers=1, vocab_size=s.vocab, H_cycles=2, L_cycles=2,
        H_layers=s.layers, L_layers=s.layers, hidden_size=s.width, expansion=4, num_heads=s.width // 64,
        pos_encodings="rope", puzzle_emb_ndim=0, rms_norm_eps=1e-5, rope_theta=10000.0, halt_exploration_prob=0.1,
        halt_max_steps=16 if side == "official" else 1, forward_dtype=forward_dtype,
    )  # fmt: skip
    model = losses.ACTLossHead(modules.HierarchicalReasoningModel_ACTV1(settings), "stablemax_cross_entropy")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = dict(inputs=x, labels=y, puzzle_identifiers=torch.zeros(s.batch, dtype=torch.int32))
    state = SimpleNamespace(carry=model.initial_carry(batch))

    def step():
        state.carry, loss, *_ = model(return_keys=[], carry=state.carry, batch=batch)
        (loss / s.batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step(args):
    """Training steps per second of the same architecture, 4 + 4 layers at width 128, in turn."""
    pairs = [("fp32", "fp32", "official", ">= 1.7"), ("bf16", "bf16", "official", ">= 1.6"),
             ("bf16", "fp32", "official", ">= 4"), ("bf16, compiled", "bf16", "official", ">= 2"),
             ("bf16, compiled", "fp32", "official", ">= 4"), ("fp32", "fp32", "official, one forward", "")]  # fmt: skip
    for ours, theirs, side, target in pairs:
        if args.quick and "compiled" in ours:  # takes a minute to start
            continue
        sides = [stepper("ours", args, ours[:4], "compiled" in ours), peer(side, args, theirs)]
        yield timed(f"training steps/s in {ours}, against {side} HRM in {theirs}", target, args, sides, (1, 1), GET)
    rounds = [[peak("ours", args), *filter(None, [peak("official", args)])] for _ in range(min(3, args.times))]
    yield figure("peak MB of the process, training in bf16, against official HRM in fp32", "<= 0.5", rounds, GET)


def peer(side, args, dtype):
    try:
        return stepper(side, args, dtype)
    except ImportError:
        return None


def peak(side, args):
    """Most resident MB of a process that takes two steps; of a child, so that this one's does not count."""
    command = [sys.executable, __file__, "--peak", json.dumps([side, args.step, args.threads])]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(found)


def resident(side, step, threads):
    torch.set_num_threads(threads)
    if run := peer(side, SimpleNamespace(step=step), "bf16" if side == "ours" else "fp32"):
        run(), run()
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def generate(args):
    """Answers of 64 ids to prompts of 256, with the cache and with encoder, core and decoder done again for each id."""
    torch.manual_seed(0)
    model = HRM(vocab_size=8192, d_model=256, max_seq_len=256, n_heads=4, encoder_layers=2, decoder_layers=4,
                core="recursive", core_layers=2, share=True, h_cycles=2, l_steps=2, grad="last_cycle", ffn_dim=0,
                positions="rope", relation_bias=False, halting=False, halting_weight=0.5).frozen()  # fmt: skip
    prompt, n = torch.randint(4, 8192, (1, 256)), 64 if not args.quick else 4

    @torch.no_grad()
    def cached():
        x, bias, z_H, _ = model.think(prompt, None, 1, math.inf)
        state, ids = model.init_state(x, z_H, bias), torch.zeros(1, 1, dtype=torch.long)
        for _ in range(n):
            logits, state = model.step(ids, state)
            ids = logits.argmax(-1, keepdim=True)

    @torch.no_grad()
    def anew():
        ids = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(n):
            x, bias, z_H, _ = model.think(prompt, None, 1, math.inf)
            ids = torch.cat([ids, model.guess(model.answer(x, z_H, bias, ids))[:, -1:]], 1)

    yield timed(
        f"tokens/s of an answer of {n} to a prompt of 256, cached against recomputed",
        ">= 20",
        args,
        [cached, anew],
        (n, n),
    )


# --- text -------------------------------------------------------------------------------------
def prepared(args):
    """GSM8K as questions and answers, by prepare_data.py normalize-qa and language -> folder."""
    if not args.gsm8k:
        raise DataError(
            "text needs GSM8K\ntry: --gsm8k FOLDER, with train.jsonl and test.jsonl of openai/grade-school-math"
        )
    out, home = args.home / "gsm8k", HERE.parent
    if not (out / "meta.json").exists():
        args.home.mkdir(parents=True, exist_ok=True)
        fields = "--question-field question --answer-field answer --fresh"
        steps = (
            f"normalize-qa --input {args.gsm8k}/train.jsonl --output {out}.jsonl {fields}",
            f"language --source {out}.jsonl --dest {out} --val-ratio 0.1 --format bin --vocab-size 4096",
        )
        for words in steps:
            subprocess.run([sys.executable, home / "prepare_data.py", *words.split()], check=True)
    return out


def text(args):
    """Question -> answer on GSM8K: the core against none, and what the prompt is worth."""
    folder, unigram = prepared(args), None
    arms = {"recursion": "", "core none, two layers more": "--core none --encoder_layers 4"}
    for arm, more in arms.items():
        name = f"text-{arm.split()[0].strip(',')}"
        _, val = train(args, name, f"{TEXT} --dataset {folder} --steps {args.text_steps} {more}")
        with contextlib.chdir(args.home):
            model, about, _, _ = load_reasoner(name, "", "auto")
        data = open_pairs(folder, max_seq_len=about["config"]["max_seq_len"])
        rng, rows = np.random.default_rng(0), np.arange(400)
        own, shuffled = (nats(model, data, rows, order) for order in (rows, rng.permutation(rows)))
        mixed = nats(model, data, rows, rows, rng)
        unigram = unigram or entropy(data)
        yield dict(figure=f"GSM8K answers, bits per byte, {arm}", ours=round(val["bpb"], 4), target="",
                   spread=f"nats per token {own:.4f}; with the prompts of other rows {shuffled:.4f}; with the tokens "
                          f"of answers permuted {mixed:.3f}, unigram entropy {unigram:.3f}")  # fmt: skip


@torch.no_grad()
def nats(model, data, rows, prompts, rng=None):
    """Mean nats per label of rows, with the prompts of other rows; rng: with the tokens of each answer permuted."""
    total = count = 0
    for index, other in zip(np.array_split(rows, 20), np.array_split(prompts, 20), strict=True):
        batch, prompt = data.batch("val", index), data.batch("val", other)
        batch |= {name: prompt[name] for name in ("encoder_ids", "encoder_mask")}
        for labels, read in zip(batch["labels"], batch["decoder_input_ids"], strict=True) if rng else ():
            n = int((labels >= 0).sum()) - 1  # all but the end of the answer
            labels[:n] = labels[:n][torch.from_numpy(rng.permutation(n))]
            read[1 : n + 1] = labels[:n]
        found = model.evaluate(batch, 1)["nats"]
        total, count = total + found.sum().item(), count + int((batch["labels"] >= 0).sum())
    return total / count


def entropy(data):
    """Nats per label of the validation rows under the frequencies of the training labels, plus one each."""

    def labels(split, n):
        rows = np.arange(min(n, data.rows(split)))
        found = torch.cat([data.batch(split, index)["labels"].flatten() for index in np.array_split(rows, 20)])
        return torch.bincount(found[found >= 0], minlength=data.meta["vocab_size"]).double()

    seen, asked = labels("train", 100_000) + 1, labels("val", 400)
    return -((seen / seen.sum()).log() * asked / asked.sum()).sum().item()


def moments(args):
    """8-bit AdamW against fp32 on the same batches of text."""
    folder = prepared(args)
    flags = f"{TEXT} --dataset {folder} --steps {args.text_steps // 2} --optimizer "
    found = [train(args, f"text-{name}", flags + name)[1]["loss"] for name in ("adamw_8bit", "adamw")]
    yield figure("GSM8K, validation nats with 8-bit moments, against fp32", "<= 1.01", [tuple(found)])
    p = torch.nn.Parameter(torch.randn(512, 512))
    sizes = []
    for optimizer in (AdamW8bit([p], lr=1e-3, betas=(0.9, 0.95), seed=0), torch.optim.AdamW([p])):
        p.grad = torch.randn_like(p)
        optimizer.step()
        sizes.append(sum(t.nbytes for t in optimizer.state[p].values() if torch.is_tensor(t)))
    yield figure("bytes of both moments of 512 x 512 weights, 8-bit against fp32", "<= 0.3", [tuple(sizes)])


ROWS = dict(sums=sums, sudoku=sudoku, givens=givens, ablate=ablate, halting=halting, failures=failures, step=step,
            generate=generate, text=text, moments=moments)  # fmt: skip


def main(argv=None):
    parser = command_line(__doc__, ROWS, "hrm")
    add = parser.add_argument
    add("--quick", action="store_true", help="toy sizes of the speed rows, runs of 20 steps: only to see that they run")
    add("--home", type=Path, default=HERE / "work" / "hrm", help="where runs/ lies")
    add("--gsm8k", type=Path, help="folder with train.jsonl of GSM8K, for text and moments")
    add("--picture", type=Path, default=HERE / "sudoku.png")
    add("--peak", type=json.loads, help=argparse.SUPPRESS)  # a child process of the memory figure
    for name, default in dict(seeds=3, times=7, threads=2, text_steps=300).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    if args.peak:
        return print(json.dumps(resident(*args.peak)))
    torch.set_num_threads(args.threads)
    args.step = QUICK if args.quick else STEP
    args.home, args.gsm8k = args.home.resolve(), args.gsm8k and args.gsm8k.resolve()
    said = f" --threads {args.threads}" * (args.threads != 2)
    measure(args, ROWS, lambda row: said)


if __name__ == "__main__":
    main()
