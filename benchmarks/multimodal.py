"""Figures of train_multimodal.py and its parts, each against a public peer that is called in turn in the same process.

    python benchmarks/multimodal.py                              # all rows
    python benchmarks/multimodal.py --rows optimizer --threads 1
    python benchmarks/multimodal.py --rows "" --readme           # only write the table into README.md

Peers are never required; a figure without its peer says how to get it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.experts import load, save, table, timed, write_readme
from models.adam_atan2 import AdamAtan2

HERE = Path(__file__).resolve().parent
GET = dict(optimizer="pip install adam-atan2-pytorch==0.4.1")
SIZES = dict(optimizer_layers=4, optimizer_width=512)
QUICK = dict(optimizer_layers=1, optimizer_width=16)


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


ROWS = dict(optimizer=optimizer)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}")
    add("--quick", action="store_true", help="toy sizes, one round: only to see that it runs")
    add("--readme", action="store_true", help="write the table into README.md")
    add("--out", type=Path, default=HERE / "multimodal.json")
    for name, default in dict(times=25, threads=2).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    said = f" --threads {args.threads}" * (args.threads != 2)
    vars(args).update(QUICK | dict(times=1) if args.quick else SIZES)
    for name in filter(None, args.rows.split(",")):
        figures = []
        for found in ROWS[name](args):
            figures.append(found | dict(command=f"python benchmarks/multimodal.py --rows {name}{said}"))
            print(json.dumps(figures[-1]), flush=True)
        save(args, name, figures=figures)
    if args.readme:
        write_readme(table(load(args.out)), name="multimodal")


if __name__ == "__main__":
    main()
