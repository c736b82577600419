"""Text of models/diffuser.py against its controls, at equal CPU time on one thread.

    python -m benchmarks.diffuser --data_dir data --seconds 180 --arms ce_warm mse_warm masked_warm
    python -m benchmarks.diffuser --data_dir data --arms --readme     # only write the table into README.md

An arm is objective_start, `ce` or `mse` or `masked` (a masked-diffusion head on the same blocks) from the `warm`
transformer or from `scratch`, then any of ,lr=0.001 ,batch=32 ,ema=0.999 and ,name=value of a Diffuser argument.
Two judges: the transformer that the warm arms start from, which flatters them, and a trigram model. Low entropy makes
any text look good to a judge, so no figure is without it. Everything is kept in --work and not made twice; all that
lies there goes into diffuser.json, diffuser_samples.md and the table on stdout.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.report import write_readme
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.diffuser import Diffuser
from models.transformer import Transformer

HERE, T, SAMPLES = Path(__file__).parent, 128, 64
SIZES = dict(d_model=128, max_seq_len=T, n_heads=4, dropout=0.0, rope_base=10000.0, n_layers=4, ffn_mult=4)
OWN = dict(encoder_layers=4, training_steps=100, inference_steps=10, objective="ce", schedule="information",
           latent_layer=0, noise_scale=0.0, ramp=16.0, next_weight=0.2, next_share=0.2)  # fmt: skip
FIGURES = "nll trigram entropy sequence_entropy distinct_2 known".split()


def autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def fit(model, loss_of, data, seconds, lr, batch, seed, ema=0.0):
    """AdamW with a short warmup and a cosine over CPU seconds; `loss_of(x, y)` is a mean -> number of steps.

    ema > 0: the model ends with the average of its weights.
    """
    torch.manual_seed(seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrix = {n for n, p in trained.items() if p.ndim == 2 and "embedding" not in n and "head" not in n}
    groups = [dict(params=[p for n, p in trained.items() if n in matrix], weight_decay=0.05),
              dict(params=[p for n, p in trained.items() if n not in matrix], weight_decay=0.0)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    order, step, start = data.order(seed, 0, 100_000), 0, time.process_time()
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 40) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share)))
        x, y = data.batch("train", order[np.arange(step * batch, (step + 1) * batch) % len(order)])
        with autocast():
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if ema:
            average.update_parameters(model)
        if step % 100 == 0:
            print(f"  step {step} loss {loss.item():.3f} cpu {time.process_time() - start:.0f} s", flush=True)
    if ema:
        model.load_state_dict(average.module.state_dict())
    return step


class Masked(nn.Module):
    """MDLM (arXiv 2406.07524) with the network of a Diffuser: a token is known or masked, each at the time t."""

    def __init__(self, net):
        super().__init__()
        self.net, self.mask = net, nn.Parameter(torch.zeros(net.mean.shape))

    def logits(self, ids, masked, t):
        """ids, masked: (B, T), t: (B, 1) -> logits of the masked tokens (n, V)."""
        known = torch.where(masked[..., None], self.mask, self.net.latents(ids))
        k = (t * (len(self.net.noise) - 1)).long().expand_as(ids)
        h = self.net._hidden(known, torch.zeros_like(known), k, 0)[:, :-1]
        return self.net.head(h[masked]).float()

    def forward(self, x, y):
        """-> mean over tokens of the bound on the nats of x (eq. 10): cross-entropy over t of what is masked."""
        B = len(x)
        t = ((torch.randperm(B) + torch.rand(1)) / B).clamp_min(1 / T)[:, None]
        masked = torch.rand(x.shape) < t
        nats = F.cross_entropy(self.logits(x, masked, t), x[masked], reduction="none")
        return (nats / t.expand_as(x)[masked]).sum() / x.numel()

    @torch.no_grad()
    def sample(self, n, length, steps, temperature, generator, sampler):
        ids, masked = torch.zeros(n, length, dtype=torch.long), torch.ones(n, length, dtype=torch.bool)
        for i in range(steps, 0, -1):
            shown = masked & (torch.rand(n, length, generator=generator) < 1 / i)
            logits = self.logits(ids, masked, torch.full((n, 1), i / steps)) / temperature
            drawn = ids.masked_scatter(masked, torch.multinomial(logits.softmax(-1), 1, generator=generator))
            ids, masked = torch.where(shown, drawn, ids), masked & ~shown
        return ids


class Judge:
    """The figures of ids (n, T): FIGURES by name."""

    def __init__(self, tokenizer, transformer, stream):
        """stream: (n,) ids of the training text, from which the trigram model and the known words come."""
        self.tokenizer, self.transformer, V = tokenizer, transformer, tokenizer.vocab_size
        self.words = set(tokenizer.decode(stream).split())
        counts = np.bincount(stream, minlength=V) + 0.1
        self.unigram = counts / counts.sum()  # (V,)
        pair = stream[:-1] * V + stream[1:]
        self.tables = []  # per order: sorted keys with their counts, sorted contexts with sum and number of successors
        for keys in (pair, pair[:-1] * V + stream[2:]):
            keys, counts = np.unique(keys, return_counts=True)
            contexts, first = np.unique(keys // V, return_index=True)
            followers = np.diff(np.append(first, len(keys)))
            self.tables.append(((keys, counts), (contexts, np.add.reduceat(counts, first)), (contexts, followers)))
        self.bigram = torch.zeros(V, V)
        keys, counts = self.tables[0][0]
        self.bigram.view(-1)[torch.from_numpy(keys)] = torch.from_numpy(counts).float()

    def trigram(self, ids, discount=0.75):
        """Mean nats per token from the third on, by absolute discounting down to the unigram."""
        V, x = len(self.unigram), ids.numpy()
        a, b, c = x[:, :-2].ravel(), x[:, 1:-1].ravel(), x[:, 2:].ravel()
        p = self.unigram[c]

        def find(table, wanted):
            keys, values = table
            i = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            return np.where(keys[i] == wanted, values[i], 0)

        for (grams, totals, followers), context in zip(self.tables, (b, a * V + b), strict=True):
            total = find(totals, context)
            seen = (find(grams, context * V + c) - discount).clip(min=0) + discount * find(followers, context) * p
            p = np.where(total > 0, seen / total.clip(min=1), p)
        return float(-np.log(p).mean())

    def nll(self, ids):
        """Mean nats per token from the second on, by the transformer."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.transformer(ids[:, :-1], ids[:, 1:])[1]["nll"].mean().item()

    def __call__(self, ids):
        V, rows = len(self.unigram), ids.tolist()
        pairs = ids[:, :-1] * V + ids[:, 1:]
        words = [w for row in rows for w in self.tokenizer.decode(row).split()[1:-1]]
        known = sum(w in self.words for w in words) / max(1, len(words))
        each = statistics.mean(entropy(row) for row in rows)
        figures = self.nll(ids), self.trigram(ids), entropy(ids.flatten().tolist()), each
        return dict(zip(FIGURES, (*figures, len(pairs.unique()) / pairs.numel(), known), strict=True))


def entropy(ids):
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values())


def controls(judge, data, generator):
    """Yield (name, temperature, ids (SAMPLES, T)) of what needs no training but the judge's transformer."""
    n = data.windows("val")
    some = np.random.default_rng(0).choice(n, SAMPLES, replace=n < SAMPLES)
    yield "real text", 1.0, data.batch("val", some)[0]
    unigram = torch.from_numpy(judge.unigram).float()
    ids = torch.multinomial(unigram, SAMPLES * T, True, generator=generator).view(SAMPLES, T)
    yield "unigram", 1.0, ids
    first, model = ids[:, :1], judge.transformer
    for temperature in (1.0, 0.8):
        table, x = (judge.bigram / judge.bigram.sum(1, keepdim=True).clamp_min(1)) ** (1 / temperature) + 1e-12, first
        while x.shape[1] < T:
            x = torch.cat([x, torch.multinomial(table[x[:, -1]], 1, generator=generator)], 1)
        yield "bigram table", temperature, x
    for temperature in (1.0, 0.8):
        x, state = first, model.init_state(SAMPLES)
        while x.shape[1] < T:
            with torch.no_grad():
                logits, state = model.step(x[:, -1:], state)
            x = torch.cat([x, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)], 1)
        yield "transformer", temperature, x


def arm_model(arm, seed, transformer, ids):
    """Build the model of an arm's name -> model, loss_of, options of `fit`."""
    name, *pairs = arm.split(",")
    objective, start = name.split("_")
    values = {key: type({**OWN, **SIZES}.get(key, 0.1))(value) for key, value in (pair.split("=") for pair in pairs)}
    options = dict(lr=values.pop("lr", 2e-3), batch=int(values.pop("batch", 16)), ema=values.pop("ema", 0.0))
    torch.manual_seed(seed)
    args = dict(vocab_size=len(transformer.embedding.weight)) | SIZES | OWN | values
    args["objective"] = "ce" if objective == "masked" else objective
    model, fresh = Diffuser(**args), Diffuser(**args)
    model.start_from(transformer, ids)
    if start == "scratch":  # the same table of latents, but nothing learnt
        for part in ("blocks", "norm", "head"):
            getattr(model, part).load_state_dict(getattr(fresh, part).state_dict())
    if objective == "masked":
        model.head_next.requires_grad_(False)  # has no part in it
        masked = Masked(model)
        return masked, masked, options
    return model, lambda x, y: model(x, y)[0] / x.numel(), options


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="domain folders, and the tokenizer bpe2048.json")
    parser.add_argument("--domains", nargs="+", default=["academic", "general", "theology"])
    parser.add_argument("--work", type=Path, default=HERE / "work", help="what is kept")
    parser.add_argument("--seconds", type=float, default=180, help="CPU seconds of an arm")
    parser.add_argument("--transformer_seconds", type=float, default=150, help="CPU seconds of the transformer")
    parser.add_argument(
        "--arms", nargs="*", default=["ce_warm", "mse_warm", "ce_scratch", "mse_scratch", "masked_warm"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 32], help="of the samplers")
    parser.add_argument("--samplers", nargs="+", default=["ancestral", "ddim"])
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--out", type=Path, default=HERE / "diffuser.json", help="results, the samples beside them")
    cfg = parser.parse_args()
    torch.set_num_threads(1)
    cfg.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(f"bpe:{cfg.data_dir}/bpe2048.json")
    data = DomainText(cfg.data_dir, tokenizer, domains=cfg.domains, val_split=0.1, window=T, cache_dir=cfg.work)
    transformer = Transformer(vocab_size=tokenizer.vocab_size, **SIZES)
    path = cfg.work / f"transformer-{cfg.transformer_seconds:.0f}.pt"
    if not path.exists():
        torch.manual_seed(0)
        transformer = Transformer(vocab_size=tokenizer.vocab_size, **SIZES)
        steps = fit(
            transformer, lambda x, y: transformer(x, y)[0] / x.numel(), data, cfg.transformer_seconds, 4e-3, 32, 0
        )
        print(f"transformer: {steps} steps")
        torch.save(transformer.state_dict(), path)
    transformer.load_state_dict(torch.load(path, weights_only=True))
    transformer.eval().requires_grad_(False)
    stream = data.batch("train", np.arange(data.windows("train")))[0].flatten()
    some = data.batch("train", data.order(42, 0, 100_000 // T))[0].flatten()  # of all domains alike
    judge = Judge(tokenizer, transformer, stream.numpy())

    def keep(name, temperature, ids, **more):
        row = dict(name=name, temperature=temperature, n=len(ids), **more, **judge(ids))
        print(json.dumps(row), flush=True)
        return row | dict(samples=[tokenizer.decode(ids[i].tolist()) for i in range(4)])

    path = cfg.work / "controls.json"
    if not path.exists():
        rows = [keep(*parts) for parts in controls(judge, data, torch.Generator().manual_seed(1))]
        path.write_text(json.dumps(rows))
    n = data.windows("val")
    index = np.random.default_rng(1).choice(n, 128, replace=n < 128)
    x, y = data.batch("val", index)
    for seed in cfg.seeds:
        for arm in cfg.arms:
            path = cfg.work / f"arm-{arm}-{seed}-{cfg.seconds:.0f}.json"
            if path.exists():
                continue
            print(path.stem, flush=True)
            model, loss_of, options = arm_model(arm, seed, transformer, some)
            steps = fit(model, loss_of, data, cfg.seconds, seed=seed, **options)
            torch.save(model.state_dict(), path.with_suffix(".pt"))
            model.eval()
            trained = dict(arm=arm, seed=seed, seconds=cfg.seconds, train_steps=steps)
            rows = []
            with autocast():
                if isinstance(model, Diffuser):
                    with torch.no_grad():
                        report = model(x, y, torch.from_numpy(index))[1]
                    trained |= {name: (n.sum() / (y >= 0).sum()).item() for name, n in report.items() if name != "nll"}
                    trained["next_nll"] = (report["nll"].sum() / (y >= 0).sum()).item()
                for sampler in cfg.samplers if isinstance(model, Diffuser) else ["ancestral"]:
                    for count in cfg.steps:
                        for temperature in (1.0, 0.8):
                            start, g = time.process_time(), torch.Generator().manual_seed(seed)
                            ids = model.sample(SAMPLES, T, count, temperature, g, sampler)
                            spent = time.process_time() - start
                            more = dict(sampler=sampler, steps=count, sample_seconds=spent, **trained)
                            rows.append(keep(arm, temperature, ids, **more))
                            path.write_text(json.dumps(rows))
    table = write(cfg.work, cfg.out)
    print(table)
    if cfg.readme:
        write_readme(table, name="diffuser")


def write(work, out):
    """All rows that were kept -> `out` and its _samples.md; returns the table, means over seeds."""
    files = [work / "controls.json", *sorted(work.glob("arm-*.json"))]
    rows = [row for path in files for row in json.loads(path.read_text())]
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row.get("seconds", 0), row.get("sampler", ""), row.get("steps", 0),
                           row["temperature"]), []).append(row)  # fmt: skip
    table = ["| text | CPU s | sampler | steps | T | seeds | NLL | trigram NLL | entropy | per sequence | distinct-2 "
             "| known words |", "| --- " * 12 + "|"]  # fmt: skip
    samples = ["# Samples of the diffuser benchmark, and what they are compared with", ""]
    for (name, seconds, sampler, steps, temperature), found in groups.items():
        cells = []
        for figure in FIGURES:
            values = [row[figure] for row in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        head = [name, f"{seconds:.0f}" if seconds else "", sampler, str(steps or ""), str(temperature), str(len(found))]
        table.append("| " + " | ".join([*head, *cells]) + " |")
        samples += [f"## {' '.join(part for part in head[:5] if part)}", ""]
        samples += [f"NLL {cells[0]}, entropy {cells[2]}", ""]
        for text in found[0]["samples"][:2]:
            samples += ["".join(f"    {line}\n" for line in text.splitlines())]
    out.write_text(json.dumps([{k: v for k, v in r.items() if k != "samples"} for r in rows], indent=1))
    out.with_name(f"{out.stem}_samples.md").write_text("\n".join(samples))
    return "\n".join(table)


if __name__ == "__main__":
    main()
