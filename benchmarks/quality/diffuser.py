"""Text of models/diffuser.py against its controls, at equal CPU time on one thread.

    python -m benchmarks.quality.diffuser --data_dir data --seconds 180 --arms ce_warm mse_warm masked_warm

An arm is objective_start: `ce` or `mse` or `masked` (a masked-diffusion head on the same blocks) from the `warm`
transformer or from `scratch`. Two judges: the transformer that the warm arms start from, which flatters them, and a
trigram model. Low entropy makes any text look good to a judge, so no figure is without it. Finished arms stay in --work
and are not repeated; all of them go into the JSON and diffuser_samples.md.
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.report import WORK, figure, results_file, rounded, save
from benchmarks.training import cosine, fit, grouped
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.diffuser import Diffuser
from models.transformer import Transformer

T, SAMPLES = 128, 64
SIZES = dict(d_model=128, max_seq_len=T, n_heads=4, dropout=0.0, rope_base=10000.0, n_layers=4, ffn_mult=4)
DIFFUSER = dict(encoder_layers=4, training_steps=100, inference_steps=10, objective="ce", schedule="information",
                latent_layer=0, noise_scale=0.0, ramp=16.0, next_weight=0.2, next_share=0.2)  # fmt: skip
SCORES = "nll trigram entropy sequence_entropy distinct_2 known".split()


# --- training ---------------------------------------------------------------------------------
def autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def train(model, loss_of, data, seconds, seed, lr=2e-3, batch=16):
    """Train with a short warmup and a cosine over CPU seconds; `loss_of(x, y)` is a mean -> number of steps."""
    torch.manual_seed(seed)

    def decayed(name, p):
        return p.ndim == 2 and "embedding" not in name and "head" not in name

    optimizer = torch.optim.AdamW(grouped(model, 0.05, decayed), lr=lr, betas=(0.9, 0.95), fused=True)
    order, start = data.order(seed, 0, 100_000), time.process_time()

    def batches():
        step = 0
        while True:
            yield data.batch("train", order[np.arange(step * batch, (step + 1) * batch) % len(order)])
            step += 1

    def factor(step):
        share = (time.process_time() - start) / seconds
        return min(1, (step + 1) / 40) * cosine(share, floor=0.05) if share < 1 else None

    def loss(pair):
        with autocast():
            return loss_of(*pair)

    return fit(model, optimizer, loss, batches(), factor)[0]


class Masked(nn.Module):
    """MDLM (arXiv 2406.07524) with the network of a Diffuser: a token is clean or masked, each at the time t."""

    def __init__(self, net):
        super().__init__()
        self.net, self.mask = net, nn.Parameter(torch.zeros(net.mean.shape))

    def logits(self, ids, masked, t):
        """Return the logits of the masked tokens (n, V); ids, masked: (B, T), t: (B, 1)."""
        clean = torch.where(masked[..., None], self.mask, self.net.latents(ids))
        k = (t * (len(self.net.noise) - 1)).long().expand_as(ids)
        h = self.net._hidden(clean, torch.zeros_like(clean), k, 0)[:, :-1]
        return self.net.head(h[masked]).float()

    def forward(self, x, y):
        """Return the mean over tokens of the bound on the nats of x (eq. 10): cross-entropy over t where masked."""
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


def arm_model(arm, seed, transformer, ids):
    """Build the model that an arm's name describes -> model, loss_of."""
    objective, start = arm.split("_")
    torch.manual_seed(seed)
    args = dict(vocab_size=len(transformer.embedding.weight)) | SIZES | DIFFUSER
    args["objective"] = "ce" if objective == "masked" else objective
    model, fresh = Diffuser(**args), Diffuser(**args)
    model.start_from(transformer, ids)
    if start == "scratch":  # the same table of latents, but nothing learnt
        for part in ("blocks", "norm", "head"):
            getattr(model, part).load_state_dict(getattr(fresh, part).state_dict())
    if objective == "masked":
        model.head_next.requires_grad_(False)  # has no part in it
        masked = Masked(model)
        return masked, masked
    return model, lambda x, y: model(x, y)[0] / x.numel()


# --- judging ----------------------------------------------------------------------------------
class Judge:
    """Return the SCORES of ids (n, T) by name."""

    def __init__(self, tokenizer, transformer, stream):
        """stream: (n,) ids of the training text, which gives the trigram model and the words that count as known."""
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
        """Return mean nats per token from the third on, by absolute discounting down to the unigram."""
        V, x = len(self.unigram), ids.numpy()
        a, b, c = x[:, :-2].ravel(), x[:, 1:-1].ravel(), x[:, 2:].ravel()
        p = self.unigram[c]

        def look_up(table, wanted):
            keys, values = table
            i = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            return np.where(keys[i] == wanted, values[i], 0)

        for (grams, totals, followers), context in zip(self.tables, (b, a * V + b), strict=True):
            total = look_up(totals, context)
            seen = (look_up(grams, context * V + c) - discount).clip(min=0)
            seen = seen + discount * look_up(followers, context) * p
            p = np.where(total > 0, seen / total.clip(min=1), p)
        return float(-np.log(p).mean())

    def nll(self, ids):
        """Return mean nats per token from the second on, by the transformer."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.transformer(ids[:, :-1], ids[:, 1:])[1]["nll"].mean().item()

    def __call__(self, ids):
        V, rows = len(self.unigram), ids.tolist()
        pairs = ids[:, :-1] * V + ids[:, 1:]
        words = [word for row in rows for word in self.tokenizer.decode(row).split()[1:-1]]
        return dict(
            nll=self.nll(ids),
            trigram=self.trigram(ids),
            entropy=entropy(ids.flatten().tolist()),
            sequence_entropy=statistics.mean(entropy(row) for row in rows),
            distinct_2=len(pairs.unique()) / pairs.numel(),
            known=sum(word in self.words for word in words) / max(1, len(words)),
        )


def entropy(ids):
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values())


def controls(judge, data, generator):
    """Yield (name, temperature, ids (SAMPLES, T)) of texts that need no model but the judge's transformer."""
    n = data.windows("val")
    index = np.random.default_rng(0).choice(n, SAMPLES, replace=n < SAMPLES)
    yield "real text", 1.0, data.batch("val", index)[0]
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


# --- figures ----------------------------------------------------------------------------------
def grouped_rows(rows):
    """Group rows over their seeds -> {(name, seconds, sampler, steps, temperature): rows}."""
    groups = {}
    for row in rows:
        key = [row["name"], row.get("seconds", 0), row.get("sampler", ""), row.get("steps", 0), row["temperature"]]
        groups.setdefault(tuple(key), []).append(row)
    return groups


def figures_of(rows):
    """Yield the judged nats of each text beside unigram text, those of ten minutes and more beside the masked control.

    Ten minutes and more also get the entropy beside that of real text. The ratio is a difference.
    """
    groups = grouped_rows(rows)
    means = {name: {key: statistics.mean(row[name] for row in group) for key, group in groups.items()}
             for name in SCORES}  # fmt: skip
    unigram, real = (next(key for key in groups if key[0] == name) for name in ("unigram", "real text"))
    for key, group in groups.items():
        name, seconds, sampler, steps, temperature = key
        is_long = name.startswith("ce") and seconds >= 600
        parts = [name, *([f"{seconds:g} s {sampler} {steps} steps"] if seconds else []), f"T {temperature:g}"]
        text = " ".join(parts)
        id = "diffuser." + "_".join([*text.removesuffix(f" T {temperature:g}").split(), f"t{temperature:g}"])
        target = is_long and temperature == 1
        others = ", ".join(f"{score} {means[score][key]:.2f}" for score in ("trigram", "entropy", "distinct_2"))
        command = "python -m benchmarks.quality.diffuser" + (f" --seconds {seconds:g}" if seconds else "")
        pairs = [("nll", unigram, "unigram text", "<= -1.5")]  # score, key of the baseline, its name, target
        if is_long:
            pairs.append(("nll", ("masked_warm", *key[1:]), "masked control", "<= 0.4"))
        if target:
            pairs.append(("entropy", real, "real text", "-0.3 to 0.3"))
        for score, baseline, baseline_name, bound in pairs:
            if baseline not in groups or baseline == key:
                continue
            ours, theirs = means[score][key], means[score][baseline]
            title = f"{'judged loss' if score == 'nll' else 'entropy'}, {text}, minus {baseline_name}"
            yield figure(f"{id}.{baseline_name.replace(' ', '_')}", title, rounded(ours), bound if target else "",
                         unit="nats", baseline=rounded(theirs), ratio=rounded(rounded(ours) - rounded(theirs), 4),
                         spread=others, seeds=len(group), command=command)  # fmt: skip


def sample_page(rows):
    """Render two samples of each text as Markdown."""
    lines = ["# Samples of the diffuser benchmark, and of its controls", ""]
    for (name, seconds, sampler, steps, temperature), group in grouped_rows(rows).items():
        head = [name, f"{seconds:.0f}" if seconds else "", sampler, str(steps or ""), str(temperature)]
        nll, spread = (statistics.mean(row[score] for row in group) for score in ("nll", "entropy"))
        lines += [f"## {' '.join(filter(None, head))}", "", f"NLL {nll:.2f}, entropy {spread:.2f}", ""]
        lines += ["".join(f"    {line}\n" for line in text.splitlines()) for text in group[0]["samples"][:2]]
    return "\n".join(lines)


# --- run --------------------------------------------------------------------------------------
def judged_transformer(args, data):
    """Return the transformer that judges and that warm arms start from, trained once."""
    torch.manual_seed(0)
    transformer = Transformer(vocab_size=data.tokenizer.vocab_size, **SIZES)
    path = args.work / f"transformer-{args.transformer_seconds:.0f}.pt"
    if not path.exists():
        seconds = args.transformer_seconds
        steps = train(transformer, lambda x, y: transformer(x, y)[0] / x.numel(), data, seconds, 0, 4e-3, 32)
        print(f"transformer: {steps} steps")
        torch.save(transformer.state_dict(), path)
    transformer.load_state_dict(torch.load(path, weights_only=True))
    return transformer.eval().requires_grad_(False)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", default="data", help="domain folders, and the tokenizer bpe2048.json")
    add("--domains", nargs="+", default=["academic", "general", "theology"])
    add("--work", type=Path, default=WORK, help="finished arms")
    add("--seconds", type=float, default=180, help="CPU seconds of an arm")
    add("--transformer_seconds", type=float, default=150, help="CPU seconds of the transformer")
    add("--arms", nargs="*", default=["ce_warm", "mse_warm", "ce_scratch", "mse_scratch", "masked_warm"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, nargs="+", default=[10, 32], help="of the samplers")
    add("--samplers", nargs="+", default=["ancestral", "ddim"])
    add("--out", type=Path, default=results_file("quality.diffuser"), help="results; the samples lie beside them")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(f"bpe:{args.data_dir}/bpe2048.json")
    data = DomainText(args.data_dir, tokenizer, domains=args.domains, val_split=0.1, window=T, cache_dir=args.work)
    transformer = judged_transformer(args, data)
    stream = data.batch("train", np.arange(data.windows("train")))[0].flatten()
    ids = data.batch("train", data.order(42, 0, 100_000 // T))[0].flatten()  # of all domains alike
    judge = Judge(tokenizer, transformer, stream.numpy())

    def judged(name, temperature, ids, **facts):
        row = dict(name=name, temperature=temperature, n=len(ids), **facts, **judge(ids))
        print(json.dumps(row), flush=True)
        return row | dict(samples=[tokenizer.decode(ids[i].tolist()) for i in range(4)])

    path = args.work / "controls.json"
    if not path.exists():
        rows = [judged(*text) for text in controls(judge, data, torch.Generator().manual_seed(1))]
        path.write_text(json.dumps(rows))
    for seed in args.seeds:
        for arm in args.arms:
            path = args.work / f"arm-{arm}-{seed}-{args.seconds:.0f}.json"
            if not path.exists():
                print(path.stem, flush=True)
                run_arm(args, arm, seed, transformer, ids, data, judged, path)
    files = [args.work / "controls.json", *sorted(args.work.glob("arm-*.json"))]
    rows = [row for path in files for row in json.loads(path.read_text())]
    bare = [{key: value for key, value in row.items() if key != "samples"} for row in rows]
    save(SimpleNamespace(out=args.out, threads=1), "text", figures=list(figures_of(bare)), rows=bare)
    args.out.with_name("diffuser_samples.md").write_text(sample_page(rows))


def run_arm(args, arm, seed, transformer, ids, data, judged, path):
    """Train an arm and judge its samples; the rows go into `path`."""
    model, loss_of = arm_model(arm, seed, transformer, ids)
    steps = train(model, loss_of, data, args.seconds, seed)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    model.eval()
    trained = dict(arm=arm, seed=seed, seconds=args.seconds, train_steps=steps)
    samplers, rows = ["ancestral"], []
    with autocast():
        if isinstance(model, Diffuser):
            samplers = args.samplers
            n = data.windows("val")
            index = np.random.default_rng(1).choice(n, 128, replace=n < 128)
            x, y = data.batch("val", index)
            with torch.no_grad():
                report = model(x, y, torch.from_numpy(index))[1]
            means = {name: (values.sum() / (y >= 0).sum()).item() for name, values in report.items()}
            trained["next_nll"] = means.pop("nll")
            trained |= means
        for sampler in samplers:
            for count in args.steps:
                for temperature in (1.0, 0.8):
                    start, generator = time.process_time(), torch.Generator().manual_seed(seed)
                    samples = model.sample(SAMPLES, T, count, temperature, generator, sampler)
                    spent = time.process_time() - start
                    rows.append(judged(arm, temperature, samples, sampler=sampler, steps=count, sample_seconds=spent,
                                       **trained))  # fmt: skip
                    path.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
