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
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import multimodal_quality
from benchmarks.experts import load, save, table, timed, write_readme
from data_utils.render import augmented_patches, layout, to_images, to_patches

HERE = Path(__file__).resolve().parent
GET = dict(render="pip install pillow")
SIZES = dict(pages=64, rows_of_cells=16, cols_of_cells=28, repeats=50)
QUICK = dict(pages=2, rows_of_cells=4, cols_of_cells=28, repeats=1)


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


ROWS = dict(render=render) | multimodal_quality.ROWS


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}")
    add("--quick", action="store_true", help="toy sizes, one round: only to see that it runs")
    add("--readme", action="store_true", help="write the table into README.md")
    add("--out", type=Path, default=HERE / "multimodal.json")
    add("--home", type=Path, default=HERE / "work" / "multimodal", help="where runs and their data lie")
    add("--minutes", type=float, default=20.0, help="of each run, default 20")
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
