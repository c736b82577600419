"""What the benchmarks share: figures, timing, peak memory, command line, results as JSON.

A figure is a dict; empty parts are left out:

id        short, stable, unique in its file: hrm.step.bf16.official_fp32
title     what the page shows
settings  {name: value} that the title does not hold
unit      of ours and baseline
ours      a number, or text that begins with one: "96.4 (97.5, 95.9, 95.8)" is a mean and each seed
baseline  the same, or the command that installs a baseline that is missing
ratio     ours / baseline, or their difference where the title says so
target    ">= 2", "ours <= 400", "0.9 to 1.1", ...: see `bounds` in run.py
spread    range over rounds or seeds, and what else belongs beside the number
seeds     how many
command   measures the figure again
"""

import argparse
import importlib
import json
import operator
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from data_utils.files import write_atomic
from data_utils.progress import peak_mb

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
WORK = HERE / "work"  # runs and toy results; ignored by git
ORDER = "id title settings unit ours baseline ratio target spread seeds command".split()


# --- figures ----------------------------------------------------------------------------------
def figure(id, title, ours, target="", **parts):
    """Return a figure without its empty parts."""
    parts |= dict(id=id, title=title, ours=ours, target=target)
    if isinstance(parts.get("spread"), (list, tuple)):
        parts["spread"] = "; ".join(filter(None, parts["spread"]))
    return {name: parts[name] for name in ORDER if parts.get(name) not in (None, "", {})}


def compared(
    id, title, rounds, target="", get="", ratio_of=operator.truediv, middle=statistics.median, spread="", **parts
):
    """Return the figure of [(ours, baseline) or (ours,)], one pair per round.

    middle: how rounds become one number; ratio_of: (ours, baseline) -> ratio; get: installs a baseline that is missing.
    """
    ours, *baseline = (rounded(middle(column)) for column in zip(*rounds, strict=True))
    ratios = [ratio_of(*sides) for sides in rounds] if baseline else [sides[0] for sides in rounds]
    parts |= dict(baseline=baseline[0], ratio=rounded(middle(ratios), 3)) if baseline else dict(baseline=get)
    return figure(id, title, ours, target, spread=[f"{min(ratios):.3g} to {max(ratios):.3g}", spread], **parts)


def timed(id, title, args, sides, units, target="", **parts):
    """Call the sides in turn, `args.times` rounds after a warm-up -> a figure in units per second.

    sides: functions, None for a baseline that is missing; units: how many each does in a call.
    """
    sides = [run for run in sides if run]
    for run in sides * min(2, args.times):
        run()
    rounds = [[n / seconds(run) for run, n in zip(sides, units, strict=False)] for _ in range(args.times)]
    return compared(id, title, rounds, target, **parts)


def rounded(number, digits=5):
    return float(f"{number:.{digits}g}")


def mean_and_each(values, scale=100):
    """Return 'mean (each)' of shares in percent; a value just below 100 is not rounded to 100."""
    values = [scale * float(value) for value in values]
    mean, *each = (f"{v:.{1 + (99.9 < v < 100)}f}" for v in (statistics.mean(values), *values))
    return f"{mean} ({', '.join(each)})" if len(each) > 1 else mean


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# --- memory -----------------------------------------------------------------------------------
def child_peak(function, *arguments):
    """Call a function of a module in a new process -> its peak MB, Python and torch included; None if it returns None.

    A new process, since the peak of this one would stay.
    """
    module = function.__globals__["__spec__"].name  # also of a program that is run with -m
    request = json.dumps([module, function.__name__, arguments], default=str)
    command = [sys.executable, "-m", "benchmarks.report", request]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)


def process_peak(function, *arguments):
    """The same in this process."""
    if function(*arguments) is None:
        return None
    status = Path("/proc/self/status")  # ru_maxrss of a child starts at the size of its parent
    match = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 / 1e6 if match else peak_mb(torch.device("cpu"))


# --- command line -----------------------------------------------------------------------------
def command_line(doc, rows, name, **numbers):
    """Return a parser with the flags of every benchmark and with those of `numbers`: {flag: default}.

    name: that of the module below benchmarks, as in speed.experts.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(name=name)
    parser.add_argument("--rows", default=",".join(rows), help=f"some of {','.join(rows)}")
    parser.add_argument("--quick", action="store_true", help="toy sizes: only shows that it runs")
    parser.add_argument("--out", type=Path, help=f"results; default: {results_file(name).relative_to(ROOT)}")
    for flag, default in numbers.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=f"default {default}")
    return parser


def results_file(name, folder=RESULTS):
    return folder / f"{name.replace('.', '_')}.json"


def changed_flags(parser, args, names):
    """Return ' --name value' of the flags that are not at their defaults."""
    changed = [name for name in names if getattr(args, name) != parser.get_default(name)]
    return "".join(f" --{name} {getattr(args, name)}" for name in changed)


def measure(args, rows, flags):
    """Measure, print and save the rows that --rows names; rows: {name: function(args) that yields figures}.

    flags: those that belong to the command of the figures, or a function of the row.
    """
    args.out = args.out or results_file(args.name, WORK if args.quick else RESULTS)
    for row in filter(None, args.rows.split(",")):
        more = flags(row) if callable(flags) else flags
        command = f"python -m benchmarks.{args.name} --rows {row}{more}"
        figures = []
        for f in rows[row](args):
            figures.append(f | dict(id=f"{args.name.split('.')[-1]}.{row}.{f['id']}", command=command))
            print(json.dumps(figures[-1]), flush=True)
        save(args, row, figures=figures)


# --- results ----------------------------------------------------------------------------------
def load(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


def circumstances(threads):
    """Return what a row was measured with: threads, torch, date, features of the CPU that decide its speed."""
    cpu = [torch.backends.cpu.get_cpu_capability()]
    features = dict(avx512_bf16="_is_avx512_bf16_supported", amx="_is_amx_tile_supported")  # they make bf16 fast
    cpu += [name for name, supported in features.items() if getattr(torch.cpu, supported, bool)()]
    return dict(threads=threads, torch=str(torch.__version__), date=time.strftime("%Y-%m-%d"), cpu=cpu)


def save(args, row, **parts):
    """Merge one row into the results, with its circumstances."""
    results = load(args.out)
    results[row] = results.get(row, {}) | circumstances(args.threads) | parts
    write_json(args.out, results)


if __name__ == "__main__":  # the new process of child_peak
    module, name, arguments = json.loads(sys.argv[1])
    print(json.dumps(process_peak(getattr(importlib.import_module(module), name), *arguments)))
