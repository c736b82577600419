"""What the router over frozen experts is worth, against the best of them and against training that one on.

    python -m benchmarks.quality.router                              # all arms, 3 seeds, after bash scripts/experts.sh
    python -m benchmarks.quality.router --arms router,control --seeds 1

Every arm sees the same batches in the same number of steps; validation tokens are the same for all, and for the rows
of the experts alone. A finished arm is kept in the JSON at once and not repeated.
"""

import argparse
import copy
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import figure, load, results_file, rounded, save
from benchmarks.training import cosine, fit, grouped
from data_utils.text.experts import load_expert
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.router import FAMILIES, NanoThink
from models.vector_store import VectorStore

ARMS = ["router", "control", "store", "no residual", *(f"without {name}" for name in FAMILIES)]
SEVERAL = ("router", "control", "store")  # these get several seeds
REGULARISERS = dict(entropy_reg=0.01, balance_reg=0.01, z_reg=0.001)
COMMAND = "python -m benchmarks.quality.router"


class Bench:
    """Data, experts and budget that all arms share."""

    def __init__(self, args):
        self.args = args
        loaded = {name: load_expert(f"{args.experts}/{name}_expert.pt", name) for name in FAMILIES}
        self.experts = {name: expert for name, (expert, _) in loaded.items()}
        self.model_args = {name: checkpoint["model_args"] for name, (_, checkpoint) in loaded.items()}
        checkpoint = loaded["transformer"][1]
        self.data = DomainText(args.data_dir, load_tokenizer(checkpoint["tokenizer"]), domains=(), val_split=0.1,
                               cache_dir=args.data_dir, window=checkpoint["model_args"]["max_seq_len"])  # fmt: skip
        count = self.data.windows("val")
        self.val = np.linspace(0, count, min(args.val_windows, count), endpoint=False, dtype=np.int64)
        self.alone = {name: self.nats(expert, "val", self.val).mean().item() for name, expert in self.experts.items()}

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16)

    def router(self, seed):
        """Build a router as train_mla.py starts it."""
        torch.manual_seed(seed)
        transformer = self.model_args["transformer"]
        sizes = {name: transformer[name] for name in ("vocab_size", "d_model", "max_seq_len", "n_heads")}
        width = sizes["d_model"]
        latent = dict(n_layers=2, kv_latent_dim=width // 3 // 2 * 2, rope_dim=width // 12 // 2 * 2)
        model = NanoThink(**sizes, **latent, **REGULARISERS, rope_base=10000.0, ffn_mult=4, dropout=0.0,
                          experts=self.model_args)  # fmt: skip
        model.start_from(self.experts)
        order = self.data.order(42, 0, math.ceil(50_000 / sizes["max_seq_len"]))
        model.set_static(self.nats(model, "train", order)[:, 1:])
        return model

    @torch.no_grad()
    def nats(self, model, split, windows):
        """Return (N, 1 + E) nats of a router and its experts, or (N, 1) of a language model, over counted tokens."""
        columns = []
        for index in np.array_split(windows, -(-len(windows) // self.args.batch)):
            x, y = self.data.batch(split, index)
            with self.autocast():
                _, report = model.eval()(x, y)
            names = ["nll", *(name for name in FAMILIES if name in report)]
            columns.append(torch.stack([report[name][y >= 0] for name in names], -1))
        model.train()
        return torch.cat(columns)

    def train(self, model, seed, lr):
        """Train in place -> seconds per step."""
        steps, is_router = self.args.steps, isinstance(model, NanoThink)
        warmup = max(1, steps // 10)
        groups = grouped(model, 0.05, lambda name, p: p.ndim == 2)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

        def loss_of(index):
            x, y = self.data.batch("train", index)
            more = dict(documents=self.data.documents("train", index)) if is_router else {}
            with self.autocast():
                loss, _ = model(x, y, **more)
            return loss / (y >= 0).sum()

        def factor(step):
            return min((step + 1) / warmup, cosine((step + 1 - warmup) / max(1, steps - warmup)))

        order = self.data.order(seed, 0, steps * self.args.batch).reshape(steps, -1)
        _, seconds = fit(model, optimizer, loss_of, iter(order), factor, every=50, total=steps)
        return seconds / steps

    def store(self, model):
        """Fill a store with windows at even distances, as train_mla.py does."""
        memory, count = VectorStore(model.embedding.embedding_dim, 32, self.args.vectors), self.data.windows("train")
        n = min(count, math.ceil(self.args.vectors / self.data.window))
        for index in np.array_split(np.linspace(0, count, n, endpoint=False, dtype=np.int64), -(-n // 16)):
            x, y = self.data.batch("train", index)
            keep = y >= 0
            memory.add(model.keys(x)[keep], y[keep], self.data.documents("train", index)[keep])
        memory.build()
        return memory

    def run(self, arm, seed):
        """Train one arm -> its validation loss in nats, and that of its start."""
        if arm == "control":
            best = min(FAMILIES, key=lambda name: self.alone[name])
            model = copy.deepcopy(self.experts[best]).requires_grad_(True)
            step_seconds = self.train(model, seed, self.args.control_lr)
            val = self.nats(model, "val", self.val).mean().item()
            return dict(val=val, step_seconds=step_seconds, trained_on=best)
        model = self.router(seed)
        if arm == "store":
            model.attach(self.store(model))
        if arm == "no residual":
            model.correct.requires_grad_(False)  # it is 0
            model.fuse.requires_grad_(False)
        if arm.startswith("without"):  # a logit that no step of this length brings back
            model.router_out.bias.data[list(FAMILIES).index(arm.removeprefix("without "))] = -50.0
        start = self.nats(model, "val", self.val).mean(0)[0].item()
        step_seconds = self.train(model, seed, self.args.lr)
        return dict(val=self.nats(model, "val", self.val).mean(0)[0].item(), start=start, step_seconds=step_seconds)


def figures_of(runs, alone):
    """Yield a figure per arm beside the best expert alone, and of the store beside the router without.

    runs: {"ARM seed N": dict(val, ...)}, alone: {expert: nats}; the ratio is a difference.
    """
    arms = {}  # {arm: {seed: nats}}
    for key, run in runs.items():
        arm, seed = key.rsplit(" seed ", 1)
        arms.setdefault(arm, {})[seed] = run["val"]
        if arm == "router":
            arms.setdefault("static mixture, the router's start", {})["0"] = run["start"]
    best = min(alone, key=alone.get)
    pairs = [(arm, f"{best} alone, the best expert", dict.fromkeys(seeds, alone[best])) for arm, seeds in arms.items()]
    if {"store", "router"} <= arms.keys():
        pairs.append(("store", "the router without", arms["router"]))
    for arm, name, baseline in pairs:
        rounds = [(value, baseline[seed]) for seed, value in arms[arm].items() if seed in baseline]
        differences = [ours - theirs for ours, theirs in rounds]
        against_router = baseline is arms.get("router")
        target = "<= -0.02" if against_router else "<= -0.05" if arm == "router" else ""
        ours, theirs = (rounded(statistics.mean(column)) for column in zip(*rounds, strict=True))
        yield figure(f"router.{arm.split(',')[0].replace(' ', '_')}{'.router' if against_router else ''}",
                     f"validation loss, {arm}, against {name}, difference", ours, target, unit="nats", baseline=theirs,
                     ratio=rounded(statistics.mean(differences)), seeds=len(rounds), command=COMMAND,
                     spread=f"{min(differences):.4f} to {max(differences):.4f}")  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", default=",".join(ARMS))
    add("--experts", default="checkpoints/demo", help="folder of the three checkpoints")
    add("--data_dir", default="data/demo")
    add("--out", type=Path, default=results_file("quality.router"))
    add("--bf16", action=argparse.BooleanOptionalAction, default=True)
    sizes = dict(seeds=3, steps=300, batch=16, lr=2e-3, control_lr=1e-3, val_windows=400, vectors=100_000, threads=2)
    for name, default in sizes.items():
        add(f"--{name}", type=type(default), default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = load(args.out).get("arms", {})
    runs, alone = results.get("runs", {}), results.get("alone", {})
    bench = Bench(args)
    if alone and any(abs(bench.alone[name] - alone[name]) > 2e-3 for name in FAMILIES):
        raise SystemExit(f"{args.out} was measured on other experts: {alone}, these: {bench.alone}\n"
                         "try: another --out")  # fmt: skip
    settings = {name: getattr(args, name) for name in "steps batch lr control_lr val_windows vectors bf16".split()}
    for arm in args.arms.split(","):
        for seed in range(args.seeds if arm in SEVERAL else 1):
            key = f"{arm} seed {seed}"
            if key not in runs:
                runs[key] = bench.run(arm, seed)
                save(args, "arms", figures=list(figures_of(runs, bench.alone)), runs=runs, alone=bench.alone,
                     settings=settings)  # fmt: skip
            print(key, json.dumps(runs[key]), flush=True)


if __name__ == "__main__":
    main()
