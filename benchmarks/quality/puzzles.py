"""9 x 9 Sudokus from easy to hard: models of this repo beside the official HRM and TRM, and a recipe for hard ones.

    python -m benchmarks.quality.puzzles                                            # all rows, hours of one core
    python -m benchmarks.quality.puzzles --rows models --minutes 20 --arms "train_hrm,official TRM"
    python -m benchmarks.quality.puzzles --rows recipe --minutes 60                 # 60 minutes for each of three arms
    python -m benchmarks.quality.puzzles --rows pretrained --test 300               # no training, 20 minutes
    python -m benchmarks.quality.puzzles --rows ""                                  # none: draw ratings.png again

Every arm learns for --minutes CPU minutes of this process from the same puzzles in the same order. Hard puzzles have as
few givens as possible, 26 at most; easier ones come from them by filling in cells. Training goes from 40 givens down to
hard ones in its first half, then mixes all. Held-out solutions are tested with 40, with 32 and with as few givens as
possible. The rating of a puzzle is how often a search must guess. The recipe compares ways to answer of the same cost.

The official code has its published settings, but the width, batch and rate of the others here. Its puzzle vector stays
at zero: Sudoku has one for all puzzles. An arm that was trained lies in --home and is only read again.
"""

import copy
import inspect
import itertools
import math
import re
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import prepare_data
import train_hrm
from benchmarks import peers
from benchmarks.quality.pictures import id_of, selected
from benchmarks.quality.sudoku import singles
from benchmarks.report import WORK, changed_flags, command_line, figure, measure
from benchmarks.report import load as load_figures
from benchmarks.speed.pictures import configured
from benchmarks.training import cosine, fit
from data_utils.checkpoint import load_checkpoint, save_checkpoint
from data_utils.hardware import bf16_autocast, open_device
from data_utils.pages.tasks import DIGIT
from data_utils.reasoning import load
from data_utils.reasoning import sudoku as puzzles_of
from data_utils.reasoning.halting import stops
from data_utils.workers import cores
from models.glyphs import HOLE
from models.hrm import HRM
from models.optim.adam_atan2 import AdamAtan2
from models.optim.ema import Average
from models.optim.muon import Muon
from models.planning import pick, select

COUNTS = 1, 2, 4, 8, 16  # segments after which answers are scored
ROUNDS = 16, 64  # in which blanks are filled
MOST_GIVENS, FEWEST = 26, 17  # of hard puzzles
HARD = f"{FEWEST} to {MOST_GIVENS} givens"
FIRST = 100  # puzzles on which the way to answer is chosen; the figures are of the others
EASY, DOWN_AT = 40, 0.5  # givens at the start of the training, share of it after which all givens are hard ones
BANDS = (0, 0), (1, 9), (10, 49), (50, 10**9)  # ratings
NOISE = 0.1, 0.3, 1.0  # standard deviations that are tried
DECAY = 0.995  # of averaged weights
WARMUP = 0.02  # share of the training
CHUNK = 100  # puzzles at a time in a test
LEAST_DRAWN = 10  # puzzles of a line in the picture


# --- puzzles ----------------------------------------------------------------------------------
def rows_of(args):
    """Return hard puzzles to train on, and {name: (puzzles, solutions, ratings)} to test; made once, then read."""
    path = args.home / f"puzzles-{args.train}-{args.test}.npz"
    if not path.exists():
        processes = 1 if args.quick else cores()
        hard = puzzles_of.make(size=9, givens=0, train=args.train, val=args.test, seed=1, processes=processes)
        kept = {split: (x > 0).sum(1) <= MOST_GIVENS for split, (x, _) in hard.items()}
        train, test = ([grid[kept[split]] for grid in hard[split]] for split in ("train", "val"))
        arrays = dict(train_x=train[0], train_y=train[1], hard=test[0], solutions=test[1])
        arrays["ratings"] = np.array([puzzles_of.rate(x, 9) for x in test[0]])
        for givens in (40, 32):
            draws = [np.random.default_rng((givens, i)) for i in range(len(test[0]))]
            rows = zip(*test, draws, strict=True)
            arrays[f"givens{givens}"] = np.stack([reveal(x[None], y[None], givens, rng)[0] for x, y, rng in rows])
            arrays[f"ratings{givens}"] = np.array([puzzles_of.rate(x, 9) for x in arrays[f"givens{givens}"]])
        args.home.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    arrays = np.load(path, allow_pickle=False)
    tests = {f"{n} givens": (arrays[f"givens{n}"], arrays["solutions"], arrays[f"ratings{n}"]) for n in (40, 32)}
    tests[HARD] = arrays["hard"], arrays["solutions"], arrays["ratings"]
    return (arrays["train_x"], arrays["train_y"]), tests


def reveal(puzzles, solutions, givens, rng):
    """Fill in random blanks of puzzles (n, N) up to so many givens, a number or (n, 1); more givens stay."""
    blank = puzzles == 0
    order = np.where(blank, rng.random(puzzles.shape), 2.0).argsort(1).argsort(1)  # of each blank among the blanks
    return np.where(blank & (order < givens - (~blank).sum(1, keepdims=True)), solutions, puzzles)


def batches(rows, size, segments, share, curriculum):
    """Yield (puzzles, solutions, segment) endlessly, each batch for `segments` steps.

    share(): of the training so far. Half of a batch has the fewest givens of now, the rest between those and EASY.
    """
    puzzles, solutions = rows
    for number in itertools.count():
        rng = np.random.default_rng((2, number))
        index = rng.integers(len(puzzles), size=size)
        x, y = puzzles_of.augment(puzzles[index], solutions[index], size=9, rng=rng)
        least = FEWEST
        if curriculum:
            least = max(FEWEST, EASY - round((EASY - FEWEST) * share() / DOWN_AT))
        givens = rng.integers(least, EASY + 1, size=(size, 1))
        givens[: size // 2] = least
        x = reveal(x, y, givens, rng)
        x, y = (torch.from_numpy(grid).long() for grid in (x, y))
        for segment in range(segments):
            yield x, y, segment


# --- arms -------------------------------------------------------------------------------------
@dataclass
class Arm:
    """A model to train and to test.

    learn(batch) returns the loss of a step. trace(ids, segments, noise, generator) returns digits (n, T, 81) and
    halting logits (n, T) for puzzles (n, 81). segments: steps on a batch. once: the model has no second segment.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learn: object
    trace: object
    segments: int = 1
    once: bool = False


def ours(args, flags=""):
    """The model of train_hrm.py with its defaults for Sudoku."""
    cfg = train_hrm.parse(["--dataset=sudoku", f"--batch_size={args.batch}", *flags.split()])
    values = asdict(cfg) | dict(vocab_size=10, d_model=args.width)
    model = HRM(**{name: values[name] for name in inspect.signature(HRM).parameters})
    groups = {name: [] for name in ("hidden", "table", "vector")}
    for name, parameter in model.named_parameters():
        groups[train_hrm.group_of(name, parameter)].append(parameter)
    optimizer = Muon(
        [
            dict(params=groups["hidden"], weight_decay=cfg.weight_decay, times=cfg.muon),
            dict(params=groups["table"], weight_decay=cfg.weight_decay, times=0),
            dict(params=groups["vector"], weight_decay=0, times=0),
        ],
        lr=cfg.learning_rate,
        betas=(cfg.beta1, cfg.beta2),
    )
    carry = [None]

    def learn(batch):
        x, y, segment = batch
        loss, _, carry[0] = model(dict(encoder_ids=x, labels=y), carry[0] if segment else None)
        return loss

    return Arm(model, optimizer, learn, partial(trace_of, model), cfg.segments, cfg.core != "recursive")


def trace_of(model, ids, segments, noise, generator):
    """`trace` of an Arm whose model is an HRM with a head per cell."""
    x, bias = model.encode(ids)
    z_H, z_L = model.start(x)
    answers, halt = [], []
    for _ in range(segments):
        if noise:
            z_H, z_L = (z + noise * torch.randn(z.shape, generator=generator) for z in (z_H, z_L))
        z_H, z_L = model.core(x, z_H, z_L, model.rotary, bias)
        answers.append(model.guess(z_H))
        halt.append(model.confidence(z_H, None) if model.halting else torch.zeros(len(x)))
    return torch.stack(answers, 1), torch.stack(halt, 1)


def multimodal(args):
    """The model of train_multimodal.py with the settings of its smaller Sudoku, on tokens."""
    flags = f"--tasks=sudoku9 --bottleneck=tokens --hidden_size={args.width} --global_batch_size={args.batch}"
    cfg, build = configured("--arch=sudoku6", *flags.split())
    model = build()
    parameters = {big: [p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False)}
    groups = [dict(params=some, weight_decay=cfg.weight_decay * big) for big, some in parameters.items()]
    optimizer = AdamAtan2(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    state = dict(carry=None, batch=None)

    def batch_of(x, y):
        index = torch.arange(len(x))
        page = torch.where(x == 0, HOLE, x + int(DIGIT)).to(torch.uint8).view(-1, 9, 9)
        target = (y + int(DIGIT)).to(torch.uint8)
        return dict(task="sudoku9", page=page, target=target, index=index, explore=index * 0 - 1, id=index * 0)

    def learn(batch):
        new = batch_of(*batch[:2])
        if state["carry"] is None:
            state.update(carry=model.initial_carry(new), batch=new)
        halted = state["carry"]["halted"]
        for name in ("page", "target"):
            mask = halted.view(-1, *[1] * (new[name].ndim - 1))
            state["batch"][name] = torch.where(mask, new[name], state["batch"][name])
        state["carry"], outputs = model(state["carry"], state["batch"])
        state["carry"]["halted"] = state["carry"]["halted"] | (outputs["q_halt"] > 0)
        return outputs["aux"]["ce"] + cfg.halt_weight * outputs["aux"]["halt_loss"]

    def trace(ids, segments, noise, generator):
        results = model.trace(batch_of(ids, ids), steps=segments, noise=noise, generator=generator)
        answers = results["answers"][:, :, 0].transpose(0, 1).long() - int(DIGIT)
        return answers.clamp(0, 9), results["halt"][:, :, 0].T

    return Arm(model, optimizer, learn, trace)


def official(args, kind, across=False):
    """The official code; `across`: TRM with an MLP over the cells. Raises ImportError without it."""
    width = args.width
    dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"
    settings = dict(
        batch_size=args.batch, seq_len=81, vocab_size=11, num_puzzle_identifiers=1, puzzle_emb_ndim=width,
        hidden_size=width, num_heads=max(1, width // 32), expansion=4, pos_encodings="rope", halt_max_steps=max(COUNTS),
        halt_exploration_prob=0.1, forward_dtype=dtype,
    )  # fmt: skip
    if kind == "trm":
        modules, losses = peers.official_trm(args.peers / "TinyRecursiveModels")
        network = modules.TinyRecursiveReasoningModel_ACTV1
        settings |= dict(H_cycles=3, L_cycles=6, H_layers=0, L_layers=2, puzzle_emb_len=16, mlp_t=across)
    else:
        modules, losses = peers.official_hrm(args.peers / "HRM")
        network = modules.HierarchicalReasoningModel_ACTV1
        settings |= dict(H_cycles=2, L_cycles=2, H_layers=4, L_layers=4)
    model = losses.ACTLossHead(network(settings), "stablemax_cross_entropy")
    groups = [dict(params=list(model.parameters()), weight_decay=1.0)]
    optimizer = AdamAtan2(groups, lr=args.official_lr, betas=(0.9, 0.95))
    carry = [None]

    def batch_of(x, y):
        return dict(inputs=(x + 1).int(), labels=y + 1, puzzle_identifiers=torch.zeros(len(x), dtype=torch.int32))

    def learn(batch):
        new = batch_of(*batch[:2])
        carry[0], loss, *_ = model(return_keys=[], carry=carry[0] or model.initial_carry(new), batch=new)
        return loss / len(batch[0])

    def trace(ids, segments, noise, generator):
        batch = batch_of(ids, ids)
        state, answers, halt = model.initial_carry(batch), [], []
        for _ in range(min(segments, max(COUNTS))):
            state, outputs = model.model(carry=state, batch=batch)
            answers.append((outputs["logits"].argmax(-1) - 1).clamp_min(0))
            go_on = outputs["q_continue_logits"] if kind == "hrm" else 0
            halt.append(outputs["q_halt_logits"] - go_on)
        return torch.stack(answers, 1), torch.stack(halt, 1)

    return Arm(model, optimizer, learn, trace)


HRM_ARM = "train_hrm"
MODELS = {  # arm: (builder, how to get its code)
    HRM_ARM: (ours, ""),
    "train_multimodal": (multimodal, ""),
    "official TRM": (partial(official, kind="trm"), "TRM"),
    "official TRM with mlp_t": (partial(official, kind="trm", across=True), "TRM"),
    "official HRM": (partial(official, kind="hrm"), "HRM"),
}
ONCE = partial(ours, flags="--core=plain --segments=1 --no-halting")


def trained(args, name, build, rows, curriculum=True):
    """Train an arm for --minutes of CPU time, or read it -> Arm with averaged weights, words on its steps."""
    torch.manual_seed(0)
    arm = build(args)
    path = args.home / f"{id_of(name)}-{args.minutes:g}.pt"
    autocast = bf16_autocast(open_device("cpu"))
    if not path.exists():
        print(f"{name}: {sum(p.numel() for p in arm.model.parameters()) / 1e6:.2f} M parameters", flush=True)
        average = Average(arm.model.named_parameters(), DECAY)
        begun = time.process_time()

        def share():
            return (time.process_time() - begun) / (60 * args.minutes)

        def factor(step):
            if step:
                average.update(step - 1)
            if share() >= 1 or args.quick and step == 4:
                return None
            return cosine(share()) * min(1.0, (step + 1) / 100, share() / WARMUP + 1e-3)

        def loss_of(batch):
            with autocast:
                return arm.learn(batch)

        arm.model.train()
        stream = batches(rows, args.batch, arm.segments, share, curriculum)
        steps, _ = fit(arm.model, arm.optimizer, loss_of, stream, factor)
        seconds = time.process_time() - begun
        with average.in_place():
            state = dict(kind="benchmark", steps=steps, seconds=seconds, model_state=arm.model.state_dict())
            save_checkpoint(path, state)
    state = load_checkpoint(path, "benchmark")
    arm.model.load_state_dict(state["model_state"])
    arm.model.eval()
    return arm, f"{state['steps']} steps in {state['seconds']:.0f} CPU s"


# --- tests ------------------------------------------------------------------------------------
@torch.no_grad()
def think(arm, puzzles, segments, noise=0.0, seed=0):
    """Return answers (n, T, 81) and halting logits (n, T) of puzzles (n, 81), T = 1 for an arm without segments."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.as_tensor(puzzles).long()
    parts = []
    with bf16_autocast(open_device("cpu")):
        for chunk in ids.split(CHUNK):
            parts.append(arm.trace(chunk, 1 if arm.once else segments, noise, generator))
    answers, halt = (torch.cat(side) for side in zip(*parts, strict=True))
    return answers, halt.float()


def voted(arm, puzzles, segments, views):
    """Return the answers (n, 81) that most of so many symmetric versions of each puzzle agree on."""
    n, answers, halts = len(puzzles), [], []
    each = np.arange(n)[:, None]
    for view in range(views):
        cells, digits = puzzles_of.symmetries(n, 9, np.random.default_rng((3, view)))
        if not view:  # the puzzle itself
            cells[:], digits[:] = np.arange(81), np.arange(10)
        answer, halt = think(arm, digits[each, puzzles[each, cells]], segments)
        answers.append(torch.from_numpy(puzzles_of.undo(answer[:, -1].numpy(), cells, digits)))
        halts.append(halt[:, -1])
    answers, halts = torch.stack(answers, 1), torch.stack(halts, 1)
    return pick(answers, select(answers[None], halts[None], "vote")[0])


def surest(arm, puzzles, segments, noise, paths):
    """Return the answers (n, 81) of the surest of so many paths, noise on their states."""
    results = [think(arm, puzzles, segments, noise, seed) for seed in range(paths)]
    answers, halts = (torch.stack([part[:, -1] for part in side], 1) for side in zip(*results, strict=True))
    return pick(answers, halts.argmax(1))


def fill_surest(ids, logits, tokens, left):
    """Fill in the surest blanks of puzzles, one of `left` equal parts of them: ids (B, S) -> (B, S).

    logits: (B, S, V). tokens (K,): the blank, then those that may stand in its place.
    """
    blank = ids == tokens[0]
    sure, choice = logits[..., tokens[1:]].float().softmax(-1).max(-1)
    rank = sure.masked_fill(~blank, -1.0).argsort(1, descending=True).argsort(1)
    now = blank & (rank < (blank.sum(1, keepdim=True) / left).ceil())
    return torch.where(now, tokens[1:][choice], ids)


@torch.no_grad()
def filled(arm, puzzles, segments, rounds):
    """Return the answers (n, 81) of an arm of `ours` that fills in the surest cells first, over so many rounds."""
    tokens = torch.arange(10)
    parts = []
    with bf16_autocast(open_device("cpu")):
        for ids in torch.as_tensor(puzzles).long().split(CHUNK):
            for left in range(rounds, 0, -1):
                x, bias, z_H, _ = arm.model.think(ids, None, 1 if arm.once else segments, math.inf)
                ids = fill_surest(ids, arm.model.head(arm.model.answer(x, z_H, bias, None)), tokens, left)
            parts.append(ids)
    return torch.cat(parts)


def solved(answers, solutions):
    """Return whether all cells are right: answers (..., 81) -> (...) bool as numbers."""
    return (answers == torch.from_numpy(solutions).long().view(-1, *[1] * (answers.ndim - 2), 81)).all(-1).double()


def percent(values):
    return round(100 * float(values.mean()), 1) if len(values) else 0.0


def scores(arm, rows, views):
    """Return (percent solved after the last segment, texts on everything else) of test rows."""
    puzzles, solutions, ratings = rows
    answers, halt = think(arm, puzzles, max(COUNTS))
    right = solved(answers, solutions)  # (n, T)
    blank = torch.from_numpy(puzzles == 0)
    cells = (answers[:, -1] == torch.from_numpy(solutions))[blank].double()
    texts = [f"cells {percent(cells)}"]
    if not arm.once:
        last = stops(halt, 0.0)
        halted = right.gather(1, last[:, None])
        texts.append(f"after {', '.join(map(str, COUNTS))} segments "
                     f"{', '.join(str(percent(right[:, k - 1])) for k in COUNTS)}")  # fmt: skip
        texts.append(f"halting {percent(halted)} after {last.double().mean() + 1:.1f} segments")
        if views > 1:
            share = percent(solved(voted(arm, puzzles, max(COUNTS), views), solutions))
            texts.append(f"{views} views of {max(COUNTS)} segments vote {share}")
    bands = []
    for low, high in BANDS:
        inside = torch.from_numpy((ratings >= low) & (ratings <= high))
        name = str(low) if low == high else f"{low} to {high}" if high < 10**9 else f"{low} and more"
        if inside.any():
            counts = [k for k in COUNTS if k <= right.shape[1]]
            shares = ", ".join(str(percent(right[inside, k - 1])) for k in counts)
            bands.append(f"with {name} guesses {shares} of {int(inside.sum())}")
    texts += bands
    return percent(right[:, -1]), texts


# --- rows -------------------------------------------------------------------------------------
def models(args):
    """Every model on the same rows, and the official weights read by this repo."""
    rows, tests = rows_of(args)
    for name in selected(args, MODELS):
        build, code = MODELS[name]
        try:
            arm, steps = trained(args, name, build, rows)
        except ImportError:
            yield figure(id_of(name), f"9 x 9 Sudoku, held out, solved, {name}", None, baseline=peers.GET[code])
            continue
        for test, held in tests.items():
            value, texts = scores(arm, held, args.views)
            yield figure(f"{id_of(name)}.{id_of(test)}", f"9 x 9 Sudoku, {test}, held out, solved, {name}", value,
                         unit="%", baseline=percent(singles_of(held[0])),
                         spread=[*texts, steps, "baseline: single candidates, repeated"])  # fmt: skip
        if code:
            yield read_by_us(args, name, arm, held[0][:CHUNK])


def singles_of(puzzles):
    return np.array([singles(puzzle[None]) for puzzle in puzzles])


@torch.no_grad()
def read_by_us(args, name, arm, puzzles):
    """Return the figure of the largest difference between official logits and those of `prepare_data.py weights`."""
    path = args.home / f"{id_of(name)}-official"
    torch.save(arm.model.state_dict(), path)
    config = arm.model.model.config
    out = f"{path}.pt"
    prepare_data.main(prepare_data.WeightsConfig(source=str(path), out=out, num_heads=config.num_heads, fresh=True))
    network = load(out)[0].network
    ids = torch.as_tensor(puzzles).long() + 1
    inner = arm.model.model.inner
    inner.forward_dtype = torch.float32
    for part in inner.modules():
        if hasattr(part, "cast_to"):
            part.cast_to = torch.float32
    batch = dict(inputs=ids.int(), puzzle_identifiers=torch.zeros(len(ids), dtype=torch.int32))
    carry = inner.reset_carry(torch.ones(len(ids), dtype=torch.bool), inner.empty_carry(len(ids)))
    _, logits, _ = inner(carry, batch)
    difference = (network(ids)[0] - logits).abs().max().item()
    return figure(f"{id_of(name)}.read", f"logits of {name}, read by prepare_data.py weights, largest difference",
                  float(f"{difference:.2g}"), "<= 0.00001")  # fmt: skip


def ways(args, arm):
    """Return {name: function of puzzles} of ways to answer, each of --segments segments for a puzzle."""
    total = args.segments
    result = {f"{args.views} views vote": lambda puzzles: voted(arm, puzzles, total // args.views, args.views)}
    for rounds in ROUNDS:
        name = f"surest cells first, {rounds} rounds"
        result[name] = partial(filled, arm, segments=max(1, total // rounds), rounds=rounds)
    if arm.once:
        return result | {"one pass": lambda puzzles: think(arm, puzzles, 1)[0][:, -1]}
    for noise in NOISE:
        name = f"surest of {args.paths} paths with noise {noise:g}"
        result[name] = partial(surest, arm, segments=total // args.paths, noise=noise, paths=args.paths)
    return result | {f"{total} segments": lambda puzzles: think(arm, puzzles, total)[0][:, -1]}


def best_way(args, arm, held):
    """Answer puzzles in the way that is best on the first ones -> (its name, percent of the others, percent by way)."""
    first = min(FIRST, len(held[0]) // 2)
    answers = ways(args, arm)

    def share(way, side):
        return percent(solved(answers[way](held[0][side]), held[1][side]))

    chosen = max(answers, key=lambda way: share(way, slice(first)))
    each = {way: share(way, slice(first, None)) for way in answers}
    return chosen, each[chosen], [f"{way} {value}" for way, value in each.items()]


def recipe(args):
    """Hard puzzles: the recipe and what is in it, against equal parameters used once and against single candidates."""
    rows, tests = rows_of(args)
    held = tests[HARD]
    setting = [f"{(held[0] > 0).sum(1).mean():.1f} givens, {statistics.mean(held[2]):.0f} guesses",
               "baseline: single candidates, repeated"]  # fmt: skip
    arms = {
        HRM_ARM: ("recursion", "recursion", ours, True),
        "the same parameters once": ("once", "the same parameters once", ONCE, True),
        "recursion without the curriculum": ("no_curriculum", "recursion without the curriculum", ours, False),
    }
    for arm_name in selected(args, arms):
        id, words, build, curriculum = arms[arm_name]
        arm, steps = trained(args, arm_name, build, rows, curriculum)
        way, value, each = best_way(args, arm, held)
        _, texts = scores(arm, held, args.views)
        yield figure(id, f"9 x 9 Sudoku, {HARD}, held out, solved, {words}, {way}", value,
                     ">= 30" if arm_name == HRM_ARM else "", unit="%", baseline=percent(singles_of(held[0])),
                     spread=[*each, *texts, steps, *setting])  # fmt: skip


def pretrained(args):
    """Hard puzzles: the model that comes with the repo, trained on 32 givens for 3,000 steps.

    The hash of a solution decides what is held out. The training of sudoku9 held out one in eleven; these are no more.
    """
    args = copy.copy(args)
    if not args.quick:
        args.test = min(args.test, args.train // 10)
    held = rows_of(args)[1][HARD]
    model = load("sudoku9")[0].network
    way, value, each = best_way(args, Arm(model, None, None, partial(trace_of, model)), held)
    yield figure("sudoku9", f"9 x 9 Sudoku, {HARD}, held out, solved, the pretrained sudoku9, {way}", value, ">= 30",
                 unit="%", baseline=percent(singles_of(held[0])),
                 spread=[*each, f"{len(held[0])} puzzles", "baseline: single candidates, repeated"])  # fmt: skip


def draw(figures, out):
    """Draw % solved of hard puzzles over segments, a line per rating, from the figures of `models`: ours."""
    from data_utils.figures import WIDTH, open_frame, plt, small_legend, write_figure

    hard = {f["title"].rpartition(", ")[2]: f["spread"] for f in figures if HARD in f["title"]}
    arms = [name for name, (_, code) in MODELS.items() if not code and name in hard]
    if not arms:
        return
    picture, axes = plt.subplots(1, len(arms), figsize=(WIDTH, 4.5), layout="constrained", sharey=True, squeeze=False)
    for ax, arm in zip(axes[0], arms, strict=True):
        for guesses, shares, n in re.findall(r"with ([\w ]+) guesses ([\d., ]+) of (\d+)", hard[arm]):
            if int(n) >= LEAST_DRAWN:
                ax.plot(COUNTS, [float(share) for share in shares.split(", ")], "o-", label=f"{guesses} ({n} puzzles)")
        ax.set(xlabel="segments of reasoning", xticks=COUNTS, ylim=(-3, 103), title=f"{arm}, {HARD}, held out")
        open_frame(ax)
        if ax.lines:
            small_legend(ax, loc="upper left", title="guesses of a search")
    axes[0, 0].set_ylabel("puzzles solved (%)")
    write_figure(picture, out)


ROWS = dict(models=models, recipe=recipe, pretrained=pretrained)
QUICK = dict(train=6, test=2, minutes=0.05, batch=4, width=32, views=2, paths=2, segments=4)


def main(argv=None):
    parser = command_line(__doc__, ROWS, "quality.puzzles", threads=1, minutes=60.0, train=4000, test=600, batch=32,
                          width=128, official_lr=1e-3, views=8, paths=8, segments=128)  # fmt: skip
    add = parser.add_argument
    add("--home", type=Path, default=WORK / "puzzles", help="where puzzles and trained arms lie")
    add("--peers", type=Path, default=peers.CLONES, help="clones of the official code")
    add("--arms", default="", help="only the models whose names hold one of these words, comma separated")
    args = parser.parse_args(argv)
    numbers = ["threads", "minutes", "train", "test", "batch", "width", "official_lr", "views", "paths", "segments"]
    flags = changed_flags(parser, args, numbers)
    if args.quick:
        vars(args).update(QUICK)
        args.home = args.home / "quick"
    torch.set_num_threads(args.threads)
    args.home = args.home.resolve()
    measure(args, ROWS, flags)
    if "models" in (results := load_figures(args.out)):
        draw(results["models"]["figures"], args.out.with_name("ratings.png"))


if __name__ == "__main__":
    main()
