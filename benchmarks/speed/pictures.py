"""Figures of train_multimodal.py and its parts, each against a public peer that is called in turn in the same process.

    python benchmarks/multimodal.py                              # all rows
    python benchmarks/multimodal.py --rows render --threads 1
    python benchmarks/multimodal.py --rows sudoku6 --seeds 1 --minutes 20 --arms recursion
    python benchmarks/multimodal.py --rows "" --readme           # only write the table into README.md

Peers are never required; a figure without its peer says how to get it. Runs lie in --home and go on where they were;
what is finished is only read again.
"""

import argparse
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import multimodal_quality
from benchmarks.hrm import Settings, imported
from benchmarks.report import command_line, figure, measure, seconds, timed
from data_utils.pages.render import layout
from data_utils.pages.shard_builder import opener
from data_utils.pages.shard_files import read_manifest
from data_utils.pages.tasks import DIGIT
from models.glyphs import HOLE, SYMBOLS, augmented_patches, to_images, to_patches
from models.multimodal import Multimodal
from models.optim.adam_atan2 import AdamAtan2
from train_multimodal import parse

HERE = Path(__file__).resolve().parent
GET = dict(
    render="pip install pillow",
    optimizer="pip install adam-atan2-pytorch==0.4.1",
    trm="git clone https://github.com/SamsungSAILMontreal/TinyRecursiveModels benchmarks/peers/TinyRecursiveModels",
)
SMALL = "--hidden_size=128", "--num_heads=4", "--global_batch_size=64"  # of the official architecture
TINY = "--hidden_size=32", "--num_heads=2", "--global_batch_size=2"
SIZES = dict(pages=64, rows_of_cells=16, cols_of_cells=28, repeats=50, optimizer_layers=4, optimizer_width=512,
             trm=SMALL, planned=(), streamed="cpu")  # fmt: skip
QUICK = dict(pages=2, rows_of_cells=4, cols_of_cells=28, repeats=1, optimizer_layers=1, optimizer_width=16, trm=TINY,
             planned=TINY, streamed="smoke")  # fmt: skip


# --- pages ------------------------------------------------------------------------------------
def drawn_by_pillow(texts, rows, cols):
    """Draw texts the usual way: words wrapped, a scalable font of 12, white margins of 10, RGB -> function, characters.

    A line takes 16 pixels of the 14 `rows`; what does not fit is not drawn. None without Pillow.
    """
    try:
        from matplotlib import get_data_path
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return None, 0
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 12)
    high, wide = 14 * rows, 8 * cols
    per_line, lines = int((wide - 20) / font.getlength("0")), (high - 20) // 16

    def wrapped(text):
        whole = (textwrap.wrap(line, per_line) or [""] for line in text.split("\n"))
        return [line for part in whole for line in part][:lines]

    def draw():
        pages = []
        for text in texts:
            image = Image.new("RGB", (wide, high), "white")
            pen = ImageDraw.Draw(image)
            for i, line in enumerate(wrapped(text)):
                pen.text((10, 10 + 16 * i), line, fill="black", font=font)
            pages.append(np.array(image))
        return np.stack(pages)

    return draw, sum(len(line) for text in texts for line in wrapped(text))


def render(args):
    """Pages of source code as pixels. Ours start from the pages that a data set holds, Pillow's from their text."""
    rows, cols, count = args.rows_of_cells, args.cols_of_cells, args.pages
    text, cells = inspect.getsource(argparse), rows * cols
    texts = [text[i * cells : (i + 1) * cells] for i in range(count)]

    def laid_out():
        return torch.from_numpy(np.stack([layout(part, rows, cols) for part in texts]))

    pages, generator = laid_out(), torch.Generator().manual_seed(0)
    peer, drawn = drawn_by_pillow(texts, rows, cols)
    ways = {  # target, how often in a round: what takes half a millisecond is not timed once
        "images": (lambda: to_images(pages), ">= 50; >= 150 x", args.repeats),
        "patches of one cell": (lambda: to_patches(pages, 1), "", args.repeats),
        "patches of two cells": (lambda: to_patches(pages, 2), "", args.repeats),
        "augmented float patches of two cells": (lambda: augmented_patches(pages, 2, generator), "", 1),
        "images, from their text": (lambda: to_images(laid_out()), "", args.repeats),
    }
    for name, (ours, target, repeats) in ways.items():

        def repeated(ours=ours, repeats=repeats):
            for _ in range(repeats):
                ours()

        title = f"{name}, {count} pages of {rows} x {cols}, Mchar/s, against Pillow's RGB images"
        units = [repeats * count * cells / 1e6, drawn / 1e6]
        yield timed(title, target, args, [repeated, peer], units, GET["render"])


# --- optimizer --------------------------------------------------------------------------------
def given_gradients(make, args):
    """Weights of attention and feed-forward layers, their gradients given, an optimizer by `make` -> (it, weights)."""
    torch.manual_seed(0)
    C = args.optimizer_width
    shapes = [(3 * C, C), (C, C), (6 * C, C), (C, 3 * C), (C,), (C,), (C,), (C,)] * args.optimizer_layers
    params = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    optimizer = make(params)
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
    return optimizer, params


def optimizer(args):
    """A step, weight decay included, from the same weights and gradients."""
    settings = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    makers = {"AdamAtan2": partial(AdamAtan2, **settings)}
    if not args.quick:
        makers["AdamAtan2, compiled"] = partial(AdamAtan2, **settings, compile=True)
    peers = {"torch's fused AdamW": (partial(torch.optim.AdamW, **settings, fused=True), ">= 0.67 (stretch)")}
    try:
        from adam_atan2_pytorch import AdamAtan2 as Peer

        peers = {"adam-atan2-pytorch": (partial(Peer, **settings), ">= 1.0")} | peers
    except ImportError:
        peers = {"adam-atan2-pytorch": (None, ">= 1.0")} | peers
    for name, make in makers.items():
        for peer, (make_peer, target) in peers.items():
            sides = [given_gradients(each, args) for each in (make, make_peer) if each]
            for stepped, _ in sides * 2:
                stepped.step()
            title, found = f"step of {name}, M parameters/s, against {peer}", ""
            if len(sides) == 2 and "atan2" in peer:
                pairs = zip(*(params for _, params in sides), strict=True)
                difference = max((a - b).abs().max().item() for a, b in pairs)
                assert difference < 1e-7, difference
                found = f"largest difference {difference:.1e}"
            millions = sum(p.numel() for p in sides[0][1]) / 1e6
            row = timed(title, target, args, [stepped.step for stepped, _ in sides], [millions] * 2, GET["optimizer"])
            yield row | dict(spread="; ".join(filter(None, [row["spread"], found])))


# --- training steps ---------------------------------------------------------------------------
def configured(*flags):
    """Settings of train_multimodal.py, and the model that they describe for one grid of Sudoku, in two calls."""
    cfg = parse([*flags])
    (name,) = cfg.tasks
    task = asdict(opener(cfg)()[name].task)
    paths = cfg.latent_num_paths if cfg.enable_latent_planning else 1
    known = asdict(cfg) | dict(tasks={name: task}, paths=paths)
    return cfg, partial(Multimodal, **{key: known[key] for key in inspect.signature(Multimodal).parameters})


def grids(model, batch):
    """A batch of random grids, a third of them holes, with random answers."""
    ((name, task),) = model.tasks.items()
    draw, shape = torch.Generator().manual_seed(0), (batch, task["rows"], task["cols"])
    page, target = (torch.randint(1, task["rows"] + 1, shape, generator=draw) + int(DIGIT) for _ in range(2))
    page[torch.rand(shape, generator=draw) < 1 / 3] = HOLE
    index, pages = torch.arange(batch), page.to(torch.uint8)
    return dict(task=name, page=pages, target=target.flatten(1).to(torch.uint8), index=index, explore=index * 0 - 1,
                id=index * 0)  # fmt: skip


def stepper(model, batch, dtype="bf16", compile=False):
    """A function that does one training step of ours and one that gives only its loss, with gradients."""
    weights = {yes: [(n, p) for n, p in model.named_parameters() if (p.ndim > 1) == yes] for yes in (True, False)}
    groups = [dict(params=params, weight_decay=0.1 * yes) for yes, params in weights.items()]
    optimizer = AdamAtan2(groups, lr=1e-4, betas=(0.9, 0.95))
    call, state = model.compiled() if compile else model, SimpleNamespace(carry=None)

    def backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            state.carry, outputs = call(state.carry or model.initial_carry(batch), batch)
        loss = outputs["aux"]["ce"] + 0.5 * outputs["aux"]["halt_loss"]
        loss.backward()
        return loss.item()

    def step():
        backward()
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, backward


def official(folder):
    """The official code of TRM -> (model, losses) modules; ImportError without."""
    swap = SimpleNamespace(rearrange=lambda x, how: x.transpose(1, 2))  # all that it uses of einops
    shims = dict(einops=swap, pydantic=SimpleNamespace(BaseModel=Settings))
    return imported(folder, shims, "models.recursive_reasoning.trm", "models.losses")


def official_stepper(folder, cfg, ours, batch, dtype):
    """`stepper` of the official code with the weights of `ours`, and the weights that both have, in one order."""
    modules, losses = official(folder)
    task, across = ours.tasks[batch["task"]], cfg.mixer == "mlp_t"
    B, length = len(batch["page"]), task["length"]
    settings = dict(
        batch_size=B, seq_len=length, num_puzzle_identifiers=1, puzzle_emb_ndim=0, puzzle_emb_len=0, H_layers=0,
        vocab_size=SYMBOLS, H_cycles=cfg.H_cycles, L_cycles=cfg.L_cycles, L_layers=cfg.L_layers, expansion=4,
        hidden_size=cfg.hidden_size, num_heads=cfg.num_heads, pos_encodings="none" if across else "rope",
        halt_max_steps=cfg.supervision_steps, halt_exploration_prob=0.0, mlp_t=across,
        forward_dtype=dict(bf16="bfloat16", fp32="float32")[dtype],
    )  # fmt: skip
    model = losses.ACTLossHead(modules.TinyRecursiveReasoningModel_ACTV1(settings), "stablemax_cross_entropy")
    inner = model.model.inner
    theirs = [inner.embed_tokens.embedding_weight, inner.H_init, inner.L_init, *shared(inner, across)]
    with torch.no_grad():
        for there, here in zip(theirs, [ours.embedding.weight, ours.core.start_H, ours.core.start_L, *shared(ours)],
                               strict=True):  # fmt: skip
            there.copy_(here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    about = dict(inputs=batch["page"].flatten(1).int(), labels=batch["target"].long(),
                 puzzle_identifiers=torch.zeros(B, dtype=torch.int32))  # fmt: skip
    state = SimpleNamespace(carry=model.initial_carry(about))

    def backward():
        state.carry, loss, *_ = model(return_keys=[], carry=state.carry, batch=about)
        (loss / B).backward()
        return loss.item() / B

    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, backward, shared(inner, across)


def shared(model, across=False):
    """The weights of the recursion and of the head, in one order: of ours, or of the official inner model."""
    if isinstance(model, Multimodal):
        return [*model.core.stacks.parameters(), model.head.weight]
    found = []
    for layer in model.L_level.layers:
        mixer = layer.mlp_t if across else layer.self_attn
        found += [mixer.gate_up_proj, mixer.down_proj] if across else [mixer.qkv_proj, mixer.o_proj]
        found += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
    return [part.weight for part in (*found, model.lm_head)]


def trm(args):
    """Training steps of the plain recursion and of the official code, from the same weights, all arms in turn."""
    goals = dict(attention=(">= 2.0", ">= 3.5", ">= 0.999"), mlp_t=(">= 1.2", "", ">= 0.99"))
    for mixer, (against_bf16, against_fp32, cosine) in goals.items():
        flags = f"--arch=sudoku9 --mixer={mixer} --bottleneck=tokens --no-relation_bias"
        cfg, build = configured(*flags.split(), *args.trm)
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():  # as the official code has no tables of places; and ours scales what it sees to 1
            for table in model.page_places.parameters():
                table.zero_()
            model.embedding.weight /= model.embedding.weight.norm(dim=1, keepdim=True)
        batch = grids(model, cfg.global_batch_size)
        kinds = ["fp32", "bf16", *["bf16, compiled"] * (not args.quick)]
        arms = {("ours", kind): stepper(deepcopy(model), batch, kind[:4], "compiled" in kind) for kind in kinds}
        with suppress(ImportError):
            theirs = {kind: official_stepper(args.official, cfg, model, batch, kind) for kind in ("fp32", "bf16")}
            yield likeness(mixer, model, batch, {kind: side[1:] for kind, side in theirs.items()}, cosine)
            arms |= {("official", kind): side for kind, side in theirs.items()}
        for step, *_ in list(arms.values()) * min(2, args.times):
            step()
        rounds = [{name: 1 / seconds(step) for name, (step, *_) in arms.items()} for _ in range(min(args.times, 7))]
        pairs = [("fp32", "fp32", ""), ("bf16", "bf16", ""), ("bf16, compiled", "bf16", against_bf16),
                 ("bf16, compiled", "fp32", against_fp32)]  # fmt: skip
        for kind, their, target in pairs:
            if kind in kinds:
                both = [name for name in (("ours", kind), ("official", their)) if name in arms]
                yield figure(f"training steps/s with {mixer} in {kind}, against official TRM in {their}", target,
                             [[found[name] for name in both] for found in rounds], GET["trm"])  # fmt: skip


def likeness(mixer, model, batch, theirs, target):
    """Cosine of the gradients of the first step in bf16 with those in fp32, each side's own; both losses.

    `mlp_t` is not the same function: there the official code scales each coordinate over the positions.
    """
    sides, found = {}, {}
    for kind in ("fp32", "bf16"):
        own = deepcopy(model)
        sides |= {("ours", kind): (stepper(own, batch, kind)[1], shared(own)), ("official", kind): theirs[kind]}
    for name, (backward, weights) in sides.items():
        loss, gradient = backward(), torch.cat([weight.grad.flatten().double() for weight in weights])
        found[name] = loss, gradient
        for weight in weights:
            weight.grad = None

    def cosine(one, other):
        return round(nn.functional.cosine_similarity(found[one][1], found[other][1], 0).item(), 5)

    ours, official = (cosine((side, "bf16"), (side, "fp32")) for side in ("ours", "official"))
    said = ", ".join(f"{' in '.join(name)} {loss:.5f}" for name, (loss, _) in found.items())
    both = cosine(("ours", "fp32"), ("official", "fp32"))
    return dict(figure=f"cosine of gradients in bf16 with those in fp32, {mixer}", ours=ours, peer=official,
                target=target, spread=f"ours in fp32 with official in fp32 {both}; losses: {said}")  # fmt: skip


def planning_cost(args):
    """A training step with four paths against the plain one: 6 x 6 Sudoku, what is left of all else off."""
    sides = []
    for flags in ([], ["--enable_latent_planning", "--latent_num_paths=4", "--latent_planning_depth=2"]):
        cfg, build = configured("--arch=sudoku6", *flags, *args.planned)
        torch.manual_seed(0)
        model = build()
        sides.append(stepper(model, grids(model, cfg.global_batch_size))[0])
    plain, planned = sides
    few = SimpleNamespace(times=min(args.times, 9))
    found = timed("steps/s of planning with K 4, d 2, H 2 and without", "", few, [plain, planned], (1, 1))
    yield found | dict(figure="steps/s without planning, against K 4, d 2, H 2", target="<= 3.0")


# --- streaming --------------------------------------------------------------------------------
def stream(args):
    """From the command on an empty folder to its first optimizer step, while the data are still being built."""
    rounds, building = [], []
    for _ in range(min(args.times, 3)):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-u", HERE.parent / "train_multimodal.py", f"--arch={args.streamed}",
                     f"--data_paths={folder}/data", f"--checkpoint_path={folder}/run", "--log_interval=1",
                     "--log_file=", "--wandb=disabled"]  # fmt: skip
            start = time.perf_counter()
            threads = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
            with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True, env=threads) as process:
                for line in process.stdout:
                    if line.startswith("step 1/"):
                        rounds.append([time.perf_counter() - start])
                        building.append(not read_manifest(f"{folder}/data")["complete"])
                        process.send_signal(signal.SIGTERM)
                        break
                process.stdout.read()
            if process.wait() not in (0, 143):
                raise SystemExit(f"train_multimodal.py left with {process.returncode}")
    found = figure(f"seconds from the command to the first step, arch {args.streamed}, empty folder", "<= 10", rounds)
    yield found | dict(spread=f"{found['spread']}; builder still running in {sum(building)} of {len(building)}")


ROWS = dict(render=render, optimizer=optimizer, trm=trm, stream=stream) | {"planning-cost": planning_cost}
ROWS |= multimodal_quality.ROWS


def main(argv=None):
    parser = command_line(__doc__, ROWS, "multimodal")
    add = parser.add_argument
    add("--quick", action="store_true", help="toy sizes, one round: only to see that it runs")
    add("--home", type=Path, default=HERE / "work" / "multimodal", help="where runs and their data lie")
    add("--minutes", type=float, default=20.0, help="of each run, default 20")
    add("--official", type=Path, default=HERE / "peers" / "TinyRecursiveModels", help="official code of TRM")
    add("--arms", default="", help="only the runs of a row whose names hold one of these words, comma separated")
    for name, default in dict(times=25, threads=2, seeds=3).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.home = args.home.resolve()
    said = "".join(
        f" --{name} {getattr(args, name):g}"
        for name in ("threads", "seeds", "minutes")
        if getattr(args, name) != parser.get_default(name)
    )
    if args.quick:
        args.home, args.seeds = args.home / "quick", 1
    vars(args).update(QUICK | dict(times=1) if args.quick else SIZES)
    measure(args, ROWS, lambda row: said)


if __name__ == "__main__":
    main()
