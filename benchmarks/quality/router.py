"""What the router over frozen experts is worth, against the best of them and against training that one on.

    python -m benchmarks.mla                                   # all arms, 3 seeds, after bash scripts/experts.sh
    python -m benchmarks.mla --arms router,control --seeds 1
    python -m benchmarks.mla --arms "" --readme                # only write the table into README.md

Every arm sees the same batches in the same number of steps; validation tokens are the same for all, and for the rows
of the experts alone. A finished arm is kept in mla.json at once and not made twice.
"""

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import load, save, write_readme
from data_utils.text.experts import load_expert
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.router import FAMILIES, NanoThink
from models.vector_store import VectorStore

HERE = Path(__file__).resolve().parent
ARMS = ["router", "control", "store", "no residual", *(f"without {name}" for name in FAMILIES)]
REGULARISERS = dict(entropy_reg=0.01, balance_reg=0.01, z_reg=0.001)


class Bench:
    """Data, experts and budget that all arms share."""

    def __init__(self, args):
        self.args = args
        loaded = {name: load_expert(f"{args.experts}/{name}_expert.pt", name) for name in FAMILIES}
        self.experts = {name: expert for name, (expert, _) in loaded.items()}
        about = loaded["transformer"][1]
        self.model_args = {name: source["model_args"] for name, (_, source) in loaded.items()}
        tokenizer = load_tokenizer(about["tokenizer"])
        self.data = DomainText(args.data_dir, tokenizer, domains=(), val_split=0.1, cache_dir=args.data_dir,
                               window=about["model_args"]["max_seq_len"])  # fmt: skip
        count = self.data.windows("val")
        self.val = np.linspace(0, count, min(args.val_windows, count), endpoint=False, dtype=np.int64)

    def batches(self, seed):
        args = self.args
        yield from self.data.order(seed, 0, args.steps * args.batch).reshape(args.steps, -1)

    def model(self, seed):
        """A router as train_mla.py starts it."""
        torch.manual_seed(seed)
        sizes = {name: self.model_args["transformer"][name] for name in ("vocab_size", "d_model", "max_seq_len")}
        sizes |= dict(n_heads=self.model_args["transformer"]["n_heads"], rope_base=10000.0, ffn_mult=4, dropout=0.0)
        latent = dict(
            n_layers=2, kv_latent_dim=sizes["d_model"] // 3 // 2 * 2, rope_dim=sizes["d_model"] // 12 // 2 * 2
        )
        model = NanoThink(**sizes, **latent, **REGULARISERS, experts=self.model_args)
        model.start_from(self.experts)
        order = self.data.order(42, 0, math.ceil(50_000 / sizes["max_seq_len"]))
        model.set_static(self.nats(model, "train", order)[:, 1:])
        return model

    @torch.no_grad()
    def nats(self, model, split, windows):
        """(N, 1 + E) of a router and its experts, or (N, 1) of a language model alone, over the counted tokens."""
        found = []
        for index in np.array_split(windows, -(-len(windows) // self.args.batch)):
            x, y = self.data.batch(split, index)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                _, report = model.eval()(x, y)
            names = ["nll", *(n for n in FAMILIES if n in report)]
            found.append(torch.stack([report[n][y >= 0] for n in names], -1))
        model.train()
        return torch.cat(found)

    def fit(self, model, seed, lr):
        """Train in place -> seconds a step."""
        args, start = self.args, time.monotonic()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in trained if (p.ndim == 2) == matrix]) for matrix in (True, False)]
        groups[1]["weight_decay"] = 0.0
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
        router, warmup = isinstance(model, NanoThink), max(1, args.steps // 10)
        for step, index in enumerate(self.batches(seed), 1):
            cosine = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / max(1, args.steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(step / warmup, cosine)
            x, y = self.data.batch("train", index)
            more = dict(documents=self.data.documents("train", index)) if router else {}
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss, _ = model(x, y, **more)
            (loss / (y >= 0).sum()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 50 == 0:
                print(f"  step {step}/{args.steps}, {time.monotonic() - start:.0f} s", flush=True)
        return (time.monotonic() - start) / args.steps

    def store(self, model):
        """A store of windows at even distances, as train_mla.py fills it."""
        found, count = VectorStore(model.embedding.embedding_dim, 32, self.args.vectors), self.data.windows("train")
        n = min(count, math.ceil(self.args.vectors / self.data.window))
        for index in np.array_split(np.linspace(0, count, n, endpoint=False, dtype=np.int64), -(-n // 16)):
            x, y = self.data.batch("train", index)
            keep = y >= 0
            found.add(model.keys(x)[keep], y[keep], self.data.documents("train", index)[keep])
        found.build()
        return found

    def run(self, arm, seed):
        """One arm -> its validation loss in nats, beside those of its experts where it has them."""
        best = min(FAMILIES, key=lambda name: self.alone[name])
        if arm.startswith("control"):
            model = copy.deepcopy(self.experts[best]).requires_grad_(True)
            spent = self.fit(model, seed, self.args.control_lr)
            return dict(val=self.nats(model, "val", self.val).mean().item(), step_seconds=spent, trained_on=best)
        model = self.model(seed)
        if arm == "store":
            model.attach(self.store(model))
        if arm == "no residual":
            model.correct.requires_grad_(False)  # it is 0
            model.fuse.requires_grad_(False)
        if arm.startswith("without"):  # a logit that no step of this length brings back
            model.router_out.bias.data[list(FAMILIES).index(arm.removeprefix("without "))] = -50.0
        before = self.nats(model, "val", self.val).mean(0)[0].item()
        spent = self.fit(model, seed, self.args.lr)
        return dict(val=self.nats(model, "val", self.val).mean(0)[0].item(), start=before, step_seconds=spent)


def table(runs, alone):
    """Results -> markdown: mean and spread over seeds, difference to the best expert."""
    best = min(alone.values())
    lines = ["| what | seeds | validation nats | against the best expert | worst seed |", "| --- " * 5 + "|"]
    for name, nats in alone.items():
        lines.append(f"| {name} alone | 1 | {nats:.4f} | {nats - best:+.4f} | |")
    arms = {}
    for key, run in runs.items():
        arms.setdefault(key.rsplit(" seed ", 1)[0], []).append(run)
    if "router" in arms:
        starts = [run["start"] for run in arms["router"]]
        lines.append(f"| static mixture (the router's start) | 1 | {starts[0]:.4f} | {starts[0] - best:+.4f} | |")
    names = {"router": "**router**", "control": "control: best expert trained on", "store": "router with the store"}
    for arm, found in sorted(arms.items(), key=lambda item: ARMS.index(item[0])):
        values = [run["val"] for run in found]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        worst = f"{max(values) - best:+.4f}" if len(values) > 1 else ""
        name = names.get(arm, f"router {arm}")
        mean = statistics.mean(values)
        lines.append(f"| {name} | {len(values)} | {mean:.4f}{spread} | {mean - best:+.4f} | {worst} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", default=",".join(ARMS))
    add("--experts", default="checkpoints/demo", help="folder of the three checkpoints")
    add("--data_dir", default="data/demo")
    add("--out", type=Path, default=HERE / "mla.json")
    add("--readme", action="store_true", help="write the table into README.md")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True)
    sizes = dict(seeds=3, steps=300, batch=16, lr=2e-3, control_lr=1e-3, val_windows=400, vectors=100_000, threads=2)
    for name, default in sizes.items():
        add(f"--{name}", type=type(default), default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = load(args.out).get("mla", {})
    runs, alone = results.get("runs", {}), results.get("alone", {})
    if args.arms:
        bench = Bench(args)
        nats = {name: bench.nats(expert, "val", bench.val).mean().item() for name, expert in bench.experts.items()}
        if alone and any(abs(nats[name] - alone[name]) > 2e-3 for name in FAMILIES):
            raise SystemExit(f"{args.out} was measured on other experts: {alone}, these: {nats}\ntry: another --out")
        alone = bench.alone = nats
        names = "steps batch lr control_lr val_windows vectors bf16".split()
        settings = {name: getattr(args, name) for name in names}
        for arm in args.arms.split(","):
            for seed in range(args.seeds if arm in ("router", "control", "store") else 1):
                key = f"{arm} seed {seed}"
                if key not in runs:
                    runs[key] = bench.run(arm, seed)
                    save(args, "mla", runs=runs, alone=alone, settings=settings)
                print(key, json.dumps(runs[key]), flush=True)
    if args.readme:
        write_readme(table(runs, alone), name="mla")


if __name__ == "__main__":
    main()
