"""Speed of train_multimodal.py and its parts, each against a baseline that is called in turn in the same process.

    python -m benchmarks.speed.pictures                              # all rows
    python -m benchmarks.speed.pictures --rows render --threads 1

A figure whose baseline is missing says how to get it.
"""

import argparse
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

from benchmarks import peers
from benchmarks.report import ROOT, changed_flags, command_line, compared, figure, measure, seconds, timed
from data_utils.pages.render import layout
from data_utils.pages.shard_builder import opener
from data_utils.pages.shard_files import read_manifest
from data_utils.pages.tasks import DIGIT
from models.glyphs import HOLE, SYMBOLS, augmented_patches, to_images, to_patches
from models.multimodal import Multimodal
from models.optim.adam_atan2 import AdamAtan2
from train_multimodal import parse

SMALL = "--hidden_size=128", "--num_heads=4", "--global_batch_size=64"  # of the official architecture
TINY = "--hidden_size=32", "--num_heads=2", "--global_batch_size=2"
SIZES = dict(pages=64, rows_of_cells=16, cols_of_cells=28, repeats=50, optimizer_layers=4, optimizer_width=512,
             trm=SMALL, planned=(), streamed="cpu")  # fmt: skip
QUICK = dict(pages=2, rows_of_cells=4, cols_of_cells=28, repeats=1, optimizer_layers=1, optimizer_width=16, trm=TINY,
             planned=TINY, streamed="smoke", times=1)  # fmt: skip


# --- pages ------------------------------------------------------------------------------------
def render(args):
    """Pages of source code as pixels. Ours start from the pages that a data set holds, Pillow's from their text."""
    rows, cols, count = args.rows_of_cells, args.cols_of_cells, args.pages
    text, cells = inspect.getsource(argparse), rows * cols
    texts = [text[i * cells : (i + 1) * cells] for i in range(count)]

    def laid_out():
        return torch.from_numpy(np.stack([layout(part, rows, cols) for part in texts]))

    pages, generator = laid_out(), torch.Generator().manual_seed(0)
    baseline, drawn = peers.optional(peers.drawn_by_pillow, texts, rows, cols) or (None, 0)
    ways = (  # id, name, ours, target, calls per round: half a millisecond is too short to time once
        ("images", "images", lambda: to_images(pages), ">= 50; >= 150 x", args.repeats),
        ("patches1", "patches of one cell", lambda: to_patches(pages, 1), "", args.repeats),
        ("patches2", "patches of two cells", lambda: to_patches(pages, 2), "", args.repeats),
        ("augmented", "augmented float patches of two cells", lambda: augmented_patches(pages, 2, generator), "", 1),
        ("from_text", "images, from their text", lambda: to_images(laid_out()), "", args.repeats),
    )
    for id, name, ours, target, repeats in ways:

        def repeated(ours=ours, repeats=repeats):
            for _ in range(repeats):
                ours()

        title = f"{name}, {count} pages of {rows} x {cols}, against Pillow's RGB images"
        units = [repeats * count * cells / 1e6, drawn / 1e6]
        yield timed(id, title, args, [repeated, baseline], units, target, unit="Mchar/s", get=peers.GET["Pillow"])


# --- optimizer --------------------------------------------------------------------------------
def given_gradients(make, args):
    """Make weights of attention and feed-forward layers with gradients -> an optimizer by `make`, weights."""
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
    ours = {"AdamAtan2": partial(AdamAtan2, **settings)}
    if not args.quick:
        ours["AdamAtan2, compiled"] = partial(AdamAtan2, **settings, compile=True)
    try:
        from adam_atan2_pytorch import AdamAtan2 as Package

        package = partial(Package, **settings)
    except ImportError:
        package = None
    fused = partial(torch.optim.AdamW, **settings, fused=True)
    baselines = (  # id, name, how it is made, target
        ("package", "adam-atan2-pytorch", package, ">= 1.0"),
        ("fused_adamw", "torch's fused AdamW", fused, ">= 0.67 (stretch)"),
    )
    for name, make in ours.items():
        for id, baseline, make_baseline, target in baselines:
            sides = [given_gradients(maker, args) for maker in (make, make_baseline) if maker]
            for stepped, _ in sides * 2:
                stepped.step()
            equal = ""
            if id == "package" and package:
                pairs = zip(*(params for _, params in sides), strict=True)
                difference = max((a - b).abs().max().item() for a, b in pairs)
                assert difference < 1e-7, difference
                equal = f"largest difference {difference:.1e}"
            millions = sum(p.numel() for p in sides[0][1]) / 1e6
            id = f"{'compiled' if 'compiled' in name else 'plain'}.{id}"
            yield timed(id, f"step of {name}, against {baseline}", args, [stepped.step for stepped, _ in sides],
                        [millions] * 2, target, unit="M parameters/s", spread=equal,
                        get=peers.GET["adam-atan2-pytorch"])  # fmt: skip


# --- training steps ---------------------------------------------------------------------------
def configured(*flags):
    """Return the Config of flags, and a function that builds its model for its one task."""
    cfg = parse([*flags])
    (name,) = cfg.tasks
    task = asdict(opener(cfg)()[name].task)
    paths = cfg.latent_num_paths if cfg.enable_latent_planning else 1
    values = asdict(cfg) | dict(tasks={name: task}, paths=paths)
    return cfg, partial(Multimodal, **{key: values[key] for key in inspect.signature(Multimodal).parameters})


def grids(model, batch):
    """Draw a batch of random grids, a third of them holes, with random answers."""
    ((name, task),) = model.tasks.items()
    draw, shape = torch.Generator().manual_seed(0), (batch, task["rows"], task["cols"])
    page, target = (torch.randint(1, task["rows"] + 1, shape, generator=draw) + int(DIGIT) for _ in range(2))
    page[torch.rand(shape, generator=draw) < 1 / 3] = HOLE
    index, pages = torch.arange(batch), page.to(torch.uint8)
    return dict(task=name, page=pages, target=target.flatten(1).to(torch.uint8), index=index, explore=index * 0 - 1,
                id=index * 0)  # fmt: skip


def stepper(model, batch, dtype="bf16", compile=False):
    """Return two functions of ours: a training step, and one that only makes gradients and returns the loss."""
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


def official_stepper(folder, cfg, ours, batch, dtype):
    """`stepper` of the official TRM with the weights of `ours`, and the weights that both have, in one order."""
    modules, losses = peers.official_trm(folder)
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
    theirs = [inner.embed_tokens.embedding_weight, inner.H_init, inner.L_init, *shared_weights(inner, across)]
    sources = [ours.embedding.weight, ours.core.start_H, ours.core.start_L, *shared_weights(ours)]
    with torch.no_grad():
        for weight, source in zip(theirs, sources, strict=True):
            weight.copy_(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    inputs = dict(inputs=batch["page"].flatten(1).int(), labels=batch["target"].long(),
                  puzzle_identifiers=torch.zeros(B, dtype=torch.int32))  # fmt: skip
    state = SimpleNamespace(carry=model.initial_carry(inputs))

    def backward():
        state.carry, loss, *_ = model(return_keys=[], carry=state.carry, batch=inputs)
        (loss / B).backward()
        return loss.item() / B

    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, backward, shared_weights(inner, across)


def shared_weights(model, across=False):
    """Return the weights of recursion and head in one order: of ours, or of the official inner model."""
    if isinstance(model, Multimodal):
        return [*model.core.stacks.parameters(), model.head.weight]
    layers = []
    for layer in model.L_level.layers:
        mixer = layer.mlp_t if across else layer.self_attn
        layers += [mixer.gate_up_proj, mixer.down_proj] if across else [mixer.qkv_proj, mixer.o_proj]
        layers += [layer.mlp.gate_up_proj, layer.mlp.down_proj]
    return [part.weight for part in (*layers, model.lm_head)]


def trm(args):
    """Training steps of the plain recursion and of the official code, from the same weights, all arms in turn."""
    goals = dict(attention=(">= 2.0", ">= 3.5", ">= 0.999"), mlp_t=(">= 1.2", "", ">= 0.99"))
    for mixer, (against_bf16, against_fp32, cosine) in goals.items():
        flags = f"--arch=sudoku9 --mixer={mixer} --bottleneck=tokens --no-relation_bias"
        cfg, build = configured(*flags.split(), *args.trm)
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():  # the official code has no tables of places, and ours scales its inputs to 1
            for table in model.page_places.parameters():
                table.zero_()
            model.embedding.weight /= model.embedding.weight.norm(dim=1, keepdim=True)
        batch = grids(model, cfg.global_batch_size)
        kinds = ["fp32", "bf16"] if args.quick else ["fp32", "bf16", "bf16, compiled"]
        arms = {("ours", kind): stepper(deepcopy(model), batch, kind[:4], "compiled" in kind) for kind in kinds}
        theirs = {}
        for kind in ("fp32", "bf16"):
            theirs[kind] = peers.optional(official_stepper, args.official, cfg, model, batch, kind)
        if all(theirs.values()):
            yield likeness(mixer, model, batch, {kind: side[1:] for kind, side in theirs.items()}, cosine)
            arms |= {("official", kind): side for kind, side in theirs.items()}
        for step, *_ in list(arms.values()) * min(2, args.times):
            step()
        rounds = [{name: 1 / seconds(step) for name, (step, *_) in arms.items()} for _ in range(min(args.times, 7))]
        pairs = [  # precision of ours, of the official code, target
            ("fp32", "fp32", ""),
            ("bf16", "bf16", ""),
            ("bf16, compiled", "bf16", against_bf16),
            ("bf16, compiled", "fp32", against_fp32),
        ]
        for kind, their_kind, target in pairs:
            if kind in kinds:
                sides = [name for name in (("ours", kind), ("official", their_kind)) if name in arms]
                id = f"{mixer}.{kind.replace(', ', '_')}.official_{their_kind}"
                title = f"training with {mixer} in {kind}, against official TRM in {their_kind}"
                yield compared(id, title, [[rates[name] for name in sides] for rates in rounds], target,
                               peers.GET["TRM"], unit="steps/s")  # fmt: skip


def likeness(mixer, model, batch, theirs, target):
    """Compare the gradients of the first step in bf16 with those in fp32, each side's own; both losses.

    `mlp_t` is not the same function: there the official code scales each coordinate over the positions.
    """
    sides, results = {}, {}
    for kind in ("fp32", "bf16"):
        ours = deepcopy(model)
        sides |= {
            ("ours", kind): (stepper(ours, batch, kind)[1], shared_weights(ours)),
            ("official", kind): theirs[kind],
        }
    for name, (backward, weights) in sides.items():
        loss, gradient = backward(), torch.cat([weight.grad.flatten().double() for weight in weights])
        results[name] = loss, gradient
        for weight in weights:
            weight.grad = None

    def cosine(one, other):
        return round(nn.functional.cosine_similarity(results[one][1], results[other][1], 0).item(), 5)

    ours, official = (cosine((side, "bf16"), (side, "fp32")) for side in ("ours", "official"))
    losses = ", ".join(f"{' in '.join(name)} {loss:.5f}" for name, (loss, _) in results.items())
    across = cosine(("ours", "fp32"), ("official", "fp32"))
    return figure(f"{mixer}.gradients", f"cosine of gradients in bf16 with those in fp32, {mixer}", ours, target,
                  baseline=official,
                  spread=f"ours in fp32 with official in fp32 {across}; losses: {losses}")  # fmt: skip


def planning_cost(args):
    """A training step with four paths against the plain one: 6 x 6 Sudoku, every other part off."""
    sides = []
    for flags in ([], ["--enable_latent_planning", "--latent_num_paths=4", "--latent_planning_depth=2"]):
        cfg, build = configured("--arch=sudoku6", *flags, *args.planned)
        torch.manual_seed(0)
        model = build()
        sides.append(stepper(model, grids(model, cfg.global_batch_size))[0])
    few = SimpleNamespace(times=min(args.times, 9))
    yield timed("steps", "training without planning, against K 4, d 2, H 2", few, sides, (1, 1), "<= 3.0",
                unit="steps/s")  # fmt: skip


# --- streaming --------------------------------------------------------------------------------
def stream(args):
    """From the command on an empty folder to its first optimizer step, while the data are still being built."""
    rounds, building = [], []
    for _ in range(min(args.times, 3)):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-u", f"{ROOT}/train_multimodal.py", f"--arch={args.streamed}",
                     f"--data_paths={folder}/data", f"--checkpoint_path={folder}/run", "--log_interval=1",
                     "--log_file=", "--wandb=disabled"]  # fmt: skip
            start = time.perf_counter()
            threads = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=threads) as process:
                for line in process.stdout:
                    if line.startswith("step 1/"):
                        rounds.append([time.perf_counter() - start])
                        building.append(not read_manifest(f"{folder}/data")["complete"])
                        process.send_signal(signal.SIGTERM)
                        break
                process.stdout.read()
            if process.wait() not in (0, 143):
                raise SystemExit(f"train_multimodal.py left with {process.returncode}")
    title = f"from the command to the first step, arch {args.streamed}, empty folder"
    still = f"builder still running in {sum(building)} of {len(building)}"
    yield compared("first_step", title, rounds, "<= 10", unit="s", spread=still)


ROWS = dict(render=render, optimizer=optimizer, trm=trm, stream=stream) | {"planning-cost": planning_cost}


def main(argv=None):
    parser = command_line(__doc__, ROWS, "speed.pictures", times=25, threads=2)
    parser.add_argument("--official", type=Path, default=peers.CLONES / "TinyRecursiveModels", help="code of TRM")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    flags = changed_flags(parser, args, ["threads"])
    vars(args).update(QUICK if args.quick else SIZES)
    measure(args, ROWS, flags)


if __name__ == "__main__":
    main()
