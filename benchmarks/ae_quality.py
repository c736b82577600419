"""Quality of train_ae.py: its codebook against k-means and packages, its latents against PCA, its loops with controls.

    python benchmarks/ae_quality.py                               # all rows, on events that are made here
    python benchmarks/ae_quality.py --data events.npz --rows usage,kmeans --seeds 3
    python benchmarks/ae_quality.py --rows "" --readme            # only write the table into README.md

Runs are those of train_ae.py; they lie in --home and are only read again once they are finished. The reference
protocol: raw phi, no loss of types and globals, 1,024 particles a step, 1,704 steps, error over the test split of
standardised features. What is compared shares data, split, batches and optimizer; ratios are of means over seeds.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_ae
from benchmarks.ae_peers import PACKAGES, STEPS, Quantizer
from benchmarks.experts import load, save, table, write_readme
from data_utils.checkpoint import load_checkpoint
from data_utils.event_runs import load_run
from data_utils.events import load_events, take, to_rows
from data_utils.kinematics import kinematics, w_share
from data_utils.reconstruct import decoded
from models.autoencoder import build_encoder
from models.codebook import Codebook, lloyd, nearest, usage_and_perplexity
from models.diffusion import denoised

HERE = Path(__file__).resolve().parent
REFERENCE = dict(phi="raw", type_weight=0.0, globals_beta=0.0)
EVENT = REFERENCE | dict(globals_beta=0.1, level="event", latent_space="none", hidden=(256, 256), epochs=20)
EVENT |= dict(lr=2e-3, batch_size=64)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}")
    add("--data", default="decay_chain", help="events, a file as of prepare_data.py events; default: made here")
    add("--quick", action="store_true", help="a few steps on few events: only to see that it runs")
    add("--readme", action="store_true", help="write the table into README.md")
    add("--home", type=Path, default=HERE / "work" / "ae_quality", help="where runs lie")
    add("--out", type=Path, default=HERE / "ae_quality.json")
    for name, default in dict(seeds=5, threads=2, events=20000, judged=300).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    said = f" --data {Path(args.data).name}" * (args.data != "decay_chain") + f" --seeds {args.seeds}"
    if args.quick:
        args.seeds, args.events, args.judged, args.home = 1, 300, 2, args.home / "quick"
    for name in filter(None, args.rows.split(",")):
        figures = []
        for found in ROWS[name](args):
            figures.append(found | dict(command=f"python benchmarks/ae_quality.py --rows {name}{said}"))
            print(json.dumps(figures[-1]), flush=True)
        save(args, name, figures=figures)
    if args.readme:
        write_readme(table(load(args.out)), name="ae_quality")


if __name__ == "__main__":
    main()
