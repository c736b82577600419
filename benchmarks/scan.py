"""Figures of models/state_space.py: time and memory against mambapy with the same weights, and generation.

    pip install mambapy==1.2.0
    python -m benchmarks.scan

Prints one JSON row per figure. Takes about three minutes on two cores.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from models.state_space import StateSpace

SIZES = dict(d_model=384, n_layers=6, d_state=16, d_inner=768, d_conv=4, dt_rank=24)
BATCH, TIME = 4, 512


def build():
    """The model without dropout; its vocabulary is the bytes'."""
    torch.manual_seed(0)
    return StateSpace(vocab_size=259, max_seq_len=TIME, dropout=0.0, **SIZES)


def ours(model):
    """The stack of blocks alone, (B, T, C) -> (B, T, C): mambapy has neither embedding nor head."""

    def forward(x):
        x = x.transpose(0, 1)
        for block, (tail, h) in zip(model.blocks, model.init_state(BATCH), strict=True):
            x, _, _ = block(x, tail, h)
        return x.transpose(0, 1)

    return forward


def mambapy(model):
    """mambapy's stack with the weights of `model`: (B, T, C) -> (B, T, C)."""
    from mambapy.mamba import Mamba, MambaConfig

    peer = Mamba(MambaConfig(d_model=384, n_layers=6, d_state=16, rms_norm_eps=1e-6))
    names = dict(mixer="mamba", conv1d="conv")
    weights = model.blocks.state_dict()
    peer.load_state_dict(
        {name: weights[".".join(names.get(part, part) for part in name.split(".")[1:])] for name in peer.state_dict()}
    )
    return peer


def train_step(forward, x):
    """Forward and backward of one batch; the gradients are summed up, which costs both sides the same."""
    forward(x).square().mean().backward()


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(runs, times):
    """Median and (min, max) seconds of each of `runs`, called in turn after one warm-up each."""
    for run in runs:
        run()
    rounds = [[seconds(run) for run in runs] for _ in range(times)]
    return [(statistics.median(column), min(column), max(column)) for column in zip(*rounds, strict=True)]


def peak_mb(name):
    """Growth in MB of the peak resident memory of this process over one training step."""
    forward = {"ours": ours, "mambapy": mambapy}[name](build())
    x = torch.randn(BATCH, TIME, SIZES["d_model"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_step(forward, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # Linux counts in KiB


def peak_mb_alone(name):
    """`peak_mb` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scan", "--memory", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def training_rows(times=5):
    """Forward and backward against mambapy: a time row and a memory row."""
    if importlib.util.find_spec("mambapy") is None:
        return [dict(figure="S6 against mambapy", skipped="pip install mambapy==1.2.0")]
    # Memory first: a child's peak starts at its parent's size, and this process is still small.
    memory, peer_memory = peak_mb_alone("ours"), peak_mb_alone("mambapy")
    model = build()
    sides = ours(model), mambapy(model)
    x = torch.randn(BATCH, TIME, SIZES["d_model"])
    with torch.no_grad():
        difference = (sides[0](x) - sides[1](x)).abs().max().item()
    if difference > 1e-4:
        raise ValueError(f"the same weights give outputs that differ by {difference:.1e}")
    (mine, *spread), (peer, *peer_spread) = alternate([lambda s=side: train_step(s, x) for side in sides], times)
    return [
        dict(
            figure="S6 forward + backward, tokens/s, against mambapy",
            ours=round(BATCH * TIME / mine),
            peer=round(BATCH * TIME / peer),
            ratio=round(peer / mine, 2),
            target=">= 3",
            seconds=[round(s, 3) for s in (mine, *spread)],
            peer_seconds=[round(s, 3) for s in (peer, *peer_spread)],
            largest_difference=difference,
        ),
        dict(
            figure="S6 peak memory in MB, against mambapy",
            ours=round(memory),
            peer=round(peer_memory),
            ratio=round(memory / peer_memory, 3),
            target="<= 0.333",
        ),
    ]


@torch.no_grad()
def generation_rows(times=5):
    """Seconds of one token after 512: a recurrent step against a full forward over the last 512."""
    model = build().eval()
    x = torch.randint(259, (1, TIME))
    _, state = model.step(x, model.init_state(1))
    full, step = alternate([lambda: model(x), lambda: [model.step(x[:, :1], state) for _ in range(10)]], times)
    return [
        dict(
            figure="S6 generation at length 512, tokens/s, against full forwards",
            ours=round(10 / step[0], 1),
            peer=round(1 / full[0], 1),
            ratio=round(full[0] / (step[0] / 10), 1),
            target=">= 20",
            seconds=[round(s / 10, 5) for s in step],
            peer_seconds=[round(s, 4) for s in full],
        )
    ]


def scan_rows(times=5):
    """All rows; `seconds` are median, smallest and largest of `times` alternated runs."""
    return training_rows(times) + generation_rows(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="alternated runs per figure")
    parser.add_argument("--memory", choices=["ours", "mambapy"], help="only the peak memory of one side, in MB")
    args = parser.parse_args()
    if args.memory:
        print(peak_mb(args.memory))
    else:
        for row in scan_rows(args.times):
            print(json.dumps(row))
