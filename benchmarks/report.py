"""What the benchmarks share: command line, figures of sides that are timed, results as JSON and as README tables."""

import argparse
import json
import operator
import re
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.files import write_atomic

HERE = Path(__file__).resolve().parent


# --- figures ----------------------------------------------------------------------------------
def figure(name, target, rounds, get="", how=operator.truediv, middle=statistics.median):
    """[(ours, peer) or (ours,)] -> a figure: the middle of each and of ours / peer, and the range of that."""
    ours, *peer = (float(f"{middle(column):.5g}") for column in zip(*rounds, strict=True))
    found = dict(figure=name, ours=ours, peer=peer[0] if peer else get, target=target)
    compared = [how(*r) for r in rounds] if peer else [r[0] for r in rounds]
    if peer:
        found["ratio"] = float(f"{middle(compared):.3g}")
    return found | dict(spread=f"{min(compared):.3g} to {max(compared):.3g}")


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(name, target, args, sides, units, get=""):
    """Call the sides in turn, `times` rounds after a warm-up -> a figure in units per second."""
    sides = [run for run in sides if run]
    for run in sides * min(2, args.times):
        run()
    rounds = [[n / seconds(run) for run, n in zip(sides, units, strict=False)] for _ in range(args.times)]
    return figure(name, target, rounds, get)


# --- command line -----------------------------------------------------------------------------
def command_line(doc, rows, name):
    """A parser with the flags that every benchmark has: rows, readme, out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(name=name)
    parser.add_argument("--rows", default=",".join(rows), help=f"of {','.join(rows)}")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument(
        "--out", type=Path, help=f"default: benchmarks/{name}.json, with --quick one in benchmarks/work"
    )
    return parser


def measure(args, rows, said):
    """Print and save the figures of the rows that are asked for, {row: function(args) that yields them}; the table.

    said: the flags that belong to the command of a row's figures.
    """
    args.out = args.out or HERE / ("work" if vars(args).get("quick") else "") / f"{args.name}.json"
    for row in filter(None, args.rows.split(",")):
        figures = []
        for found in rows[row](args):
            figures.append(found | dict(command=f"python benchmarks/{args.name}.py --rows {row}{said(row)}"))
            print(json.dumps(figures[-1]), flush=True)
        save(args, row, figures=figures)
    if args.readme:
        write_readme(table(load(args.out)), args.name)


# --- results ----------------------------------------------------------------------------------
def load(path):
    return json.loads(path.read_text()) if path.exists() else {}


def save(args, name, **found):
    """Merge one row into the results, with the machine that it was measured on."""
    cpu = [torch.backends.cpu.get_cpu_capability()]
    asked = dict(avx512_bf16="_is_avx512_bf16_supported", amx="_is_amx_tile_supported")  # which make bf16 fast
    cpu += [name for name, supported in asked.items() if getattr(torch.cpu, supported, bool)()]
    about = dict(threads=args.threads, torch=str(torch.__version__), date=time.strftime("%Y-%m-%d"), cpu=cpu)
    results = load(args.out)
    results[name] = results.get(name, {}) | about | found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


def table(results):
    """Results -> markdown."""
    lines = ["| figure | ours | peer | ratio | spread | target | command |", "| --- " * 7 + "|"]
    for row in results.values():
        for f in row.get("figures", []):
            cells = [str(f.get(k, "")) for k in ("figure", "ours", "peer", "ratio", "spread", "target")]
            lines.append(f"| {' | '.join(cells)} | `{f['command']}` |")
    return "\n".join(lines)


def write_readme(text, name, path=HERE.parent / "README.md"):
    """Put `text` between the markers `name` of the README; print it when there are none."""
    begin, end, old = f"<!-- {name}:begin -->", f"<!-- {name}:end -->", path.read_text() if path.exists() else ""
    new, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL)
    path.write_text(new) if count else print(f"{path} lacks {begin} {end}; it would get\n{text}")
