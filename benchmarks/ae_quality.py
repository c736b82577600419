"""Quality of train_ae.py: its codebook against k-means and packages, its latents against PCA, its loops with controls.

    python benchmarks/ae_quality.py                               # all rows, on events that are made here
    python benchmarks/ae_quality.py --data ../shared/data/events/pythia_events.npz --rows usage,kmeans,packages
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
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_ae
from benchmarks.experts import load, save, table, write_readme
from data_utils.checkpoint import load_checkpoint
from data_utils.events import load_events, take
from data_utils.kinematics import kinematics, w_share
from data_utils.reconstruct import decoded, reconstructed
from models.autoencoder import AutoEncoder
from models.codebook import lloyd, nearest, usage_and_perplexity
from models.diffusion import NoiseSchedule, denoised

HERE = Path(__file__).resolve().parent
GET = dict(vq="pip install vector-quantize-pytorch==1.32.0", pythae="pip install pythae==0.1.2")
REFERENCE = dict(phi="raw", type_weight=0.0, globals_beta=0.0)
TOKENS, STEPS = 1024, 1704
CYCLE = dict(lr=2e-3, warmup=530.0)  # of the runs of 5,300 steps
LLOYD = 15  # times ten iterations
CHOICES = "events limit labels features phi energy_unit seed".split()


# --- runs -------------------------------------------------------------------------------------
def fit(args, name, seed, steps=0, per_step=0, quantizer=None, **flags):
    """Run train_ae.main to its end, or read what it left -> its model, data, meta, config and noise schedule.

    steps, per_step: stop after so many steps of about so many particles each; 0: `epochs` decide, and the best
    weights are taken, not the last. quantizer: a class that stands in for the codebook.
    """
    loop = train_ae.LOOPS[flags.pop("loop", "ae")][0]
    flags = dict(data=args.data, events=args.events, seed=seed, make_plots=False, device="cpu") | flags
    cfg = loop(**flags, out=str(args.home / f"{name}-seed{seed}"))
    if args.quick:
        cfg.epochs, steps = 1, min(steps, 3)
    data, meta = events(args, cfg)
    if steps:
        cfg.batch_size = round(per_step / (data["train"]["ids"] > 0).sum().item() * len(data["train"]["x"]))
        cfg.epochs = -(-steps // -(-len(data["train"]["x"]) // cfg.batch_size))
        cfg.max_steps = steps
    path = Path(cfg.out, "last.pt" if steps else "best_val.pt")
    swap = mock.patch("models.autoencoder.Codebook", quantizer) if quantizer else contextlib.nullcontext()
    with swap:
        if not path.exists() or load_checkpoint(path.with_name("last.pt"), f"ae:{cfg.loop}")["step"] < steps:
            with contextlib.redirect_stdout(io.StringIO()):
                train_ae.main(cfg)
        state = load_checkpoint(path, f"ae:{cfg.loop}")
        model = AutoEncoder(**state["model_args"])
        model.load_state_dict(state["model_state"])
    noises = NoiseSchedule(cfg.diffusion_steps, cfg.noise_schedule) if cfg.loop == "diffusion_ae" else None
    return SimpleNamespace(model=model.eval(), data=data, meta=meta, cfg=cfg, noises=noises)


@cache
def _events(**chosen):
    return load_events(**chosen)


def events(args, cfg):
    return _events(data=cfg.data, **{name: getattr(cfg, name) for name in CHOICES})


def reference(args, seed, name="ours", steps=STEPS, **more):
    return fit(args, f"{name}-{steps}", seed, steps, TOKENS, **REFERENCE | more)


@torch.no_grad()
def made(run, columns):
    """What the model makes of events: features (N, T, F)."""
    return decoded(run.model, run.noises, columns, getattr(run.cfg, "ddim_steps", 0), 0)[0]


def per_event(x_hat, columns):
    """Mean squared error of the features of the particles of each event, (N)."""
    mask = (columns["ids"] > 0)[..., None]
    return ((x_hat - columns["x"]).square() * mask).sum((1, 2)) / mask.sum((1, 2)) / columns["x"].shape[-1]


def error(run):
    """Mean squared error over the particles of the test split."""
    columns = run.data["test"]
    mask = columns["ids"] > 0
    return (made(run, columns) - columns["x"])[mask].square().mean().item()


def use(run):
    """Share of the codes in use over the test split, and perplexity."""
    columns = run.data["test"]
    mask = columns["ids"] > 0
    with torch.no_grad():
        found = run.model.quantize(run.model.encode(columns["x"], columns["ids"], mask, columns["globals"]), mask)[1]
    return usage_and_perplexity(torch.bincount(found[mask], minlength=run.cfg.codebook_size))


def row(name, target, ours, peer=(), get="", worst=max, more=""):
    """A figure: means over seeds, their ratio, the worst seed and the range."""
    ours = [float(x) for x in ours]
    found = dict(figure=name, ours=float(f"{statistics.mean(ours):.4g}"), target=target, peer=get)
    if len(peer):
        mean = statistics.mean(map(float, peer))
        found |= dict(peer=float(f"{mean:.4g}"), ratio=float(f"{statistics.mean(ours) / mean:.4g}"))
    said = f"worst of {len(ours)} seeds {worst(ours):.4g}, {min(ours):.4g} to {max(ours):.4g}"
    return found | dict(spread="; ".join(filter(None, [said, more])))


def auroc(normal, odd):
    """Area under the ROC curve of scores (N) and (M), odd ones being higher."""
    ranks = torch.cat([normal, odd]).double().argsort().argsort().double() + 1
    n, m = len(normal), len(odd)
    return ((ranks[n:].sum() - m * (m + 1) / 2) / (n * m)).item()


# --- codebook ---------------------------------------------------------------------------------
def usage(args):
    """How many codes are in use over the whole test split, after the whole budget and after 200 steps."""
    runs = [reference(args, seed) for seed in range(args.seeds)]
    shares, perplexities = zip(*map(use, runs), strict=True)
    yield row(f"codes in use after {STEPS} steps, %", ">= 99", [100 * s for s in shares], worst=min)
    yield row(f"perplexity after {STEPS} steps, of 512", ">= 476", perplexities, worst=min)
    few = round(200 / 5 * TOKENS / particles(runs[0]))  # events of 41k particles, five epochs of which are 200 steps
    runs = [reference(args, seed, "few", 200, limit=few) for seed in range(args.seeds)]
    shares, perplexities = zip(*map(use, runs), strict=True)
    title = "after 200 steps on 41k particles"
    more = f"perplexity {statistics.mean(perplexities):.0f}"
    yield row(f"codes in use {title}, %", ">= 95", [100 * s for s in shares], worst=min, more=more)
    yield row(f"error {title}", "<= 0.028", map(error, runs))


def particles(run):
    """Mean number of particles of a training event."""
    return (run.data["train"]["ids"] > 0).sum(1).double().mean().item()


def kmeans(args):
    """Codes that an encoder learnt to use against codes for the features themselves: what a code can do at best."""
    best = []
    for seed in range(args.seeds):
        data = reference(args, seed).data
        train, test = (data[split]["x"][data[split]["ids"] > 0] for split in ("train", "test"))
        codes = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:512]]
        for i in range(1 if args.quick else LLOYD):
            codes = lloyd(train, codes, torch.Generator().manual_seed(seed + i))
        best.append((codes[nearest(test, codes)] - test).square().mean().item())
    for steps, target, more in ((STEPS, 1.09, {}), (5300, 1.02, CYCLE)):
        runs = [reference(args, seed, steps=steps, **more) for seed in range(args.seeds)]
        yield row(f"error after {steps} steps, against k-means of 512", f"<= {target}", map(error, runs), best)


def stand_in(build):
    """A class with the interface of Codebook around a quantizer of a package: (N, D) -> codes, index, loss."""

    class Quantizer(nn.Module):
        def __init__(self, *, size, dim, beta, decay, revive, eps):
            super().__init__()
            self.inner = build(dim, size, beta)
            self.revived = torch.zeros((), dtype=torch.long)

        def start(self, vectors, kmeans, generator):
            """The package starts by itself."""

        def forward(self, z, mask):
            q, index, loss = self.inner(z[mask])
            q = torch.zeros_like(z).masked_scatter(mask[..., None], q)
            return q, torch.full_like(mask, -1, dtype=torch.long).masked_scatter(mask, index), loss

    return Quantizer


def vector_quantize(**options):
    """VectorQuantize of vector-quantize-pytorch. Raises ImportError without it."""
    from vector_quantize_pytorch import VectorQuantize

    class Inner(VectorQuantize):
        def forward(self, x):
            q, index, loss = super().forward(x[None])
            return q[0], index[0], loss.sum()

    return stand_in(lambda dim, size, beta: Inner(dim=dim, codebook_size=size, **options))


def pythae():
    """QuantizerEMA of pythae, given (N, 1, 1, D), or it would spend D indices on a vector. ImportError without it."""
    from pythae.models.vq_vae.vq_vae_utils import QuantizerEMA

    class Inner(QuantizerEMA):
        def forward(self, x):
            out = super().forward(x[:, None, None])
            return out.quantized_vector.flatten(1), out.quantized_indices.flatten(), out.loss

    def build(dim, size, beta):
        config = SimpleNamespace(embedding_dim=dim, num_embeddings=size, commitment_loss_factor=beta, decay=0.99)
        return Inner(config)

    return stand_in(build)


ALIKE = dict(decay=0.99, commitment_weight=0.25)  # as ours
TUNED = ALIKE | dict(kmeans_init=True, threshold_ema_dead_code=0.05, rotation_trick=False)
PACKAGES = {  # what it is called: (how it is made, how to get it, steps, target)
    "vector-quantize-pytorch, k-means start, expiry 0.05": (lambda: vector_quantize(**TUNED), "vq", STEPS, 1.02),
    "vector-quantize-pytorch, our decay and commitment": (lambda: vector_quantize(**ALIKE), "vq", STEPS, 0.5),
    "vector-quantize-pytorch, as it comes": (vector_quantize, "vq", STEPS, 0.5),
    "pythae with moving averages": (pythae, "pythae", 200, 0.25),
}


def packages(args):
    """Other packages' quantizers in our encoder, decoder, batches and optimizer."""
    for i, (name, (quantizer, get, steps, target)) in enumerate(PACKAGES.items()):
        ours, theirs = [error(reference(args, seed, steps=steps)) for seed in range(args.seeds)], []
        with contextlib.suppress(ImportError):
            swap = quantizer()
            runs = [reference(args, seed, f"package{i}", steps, quantizer=swap) for seed in range(args.seeds)]
            theirs = [error(run) for run in runs]
        more = ""
        if theirs:
            shares, perplexities = zip(*map(use, runs), strict=True)
            worst, mean = max(theirs), [statistics.mean(x) for x in (shares, perplexities)]
            more = f"its worst {worst:.4g}; it uses {100 * mean[0]:.1f} % of the codes, perplexity {mean[1]:.0f}"
        yield row(f"error after {steps} steps, against {name}", f"<= {target}", ours, theirs, GET[get], more=more)


# --- latents ----------------------------------------------------------------------------------
def principal(train, dim):
    """A function x (N, T, F) -> the same from the first `dim` principal components of the training features."""
    flat = train.flatten(1)
    middle = flat.mean(0)
    axes = torch.linalg.svd(flat - middle, full_matrices=False)[2][:dim]
    return lambda x: ((x.flatten(1) - middle) @ axes.T @ axes + middle).view_as(x)


EVENT = REFERENCE | dict(level="event", latent_space="none", hidden=(256, 256), epochs=20)


def event(args):
    """One latent of D numbers an event against as many principal components of the same features."""
    for dim, target in ((8, 0.6), (16, 0.6), (32, 0.2)):
        ours, theirs = [], []
        for seed in range(args.seeds):
            run = fit(args, f"event-{dim}", seed, latent_dim=dim, **EVENT)
            test = run.data["test"]
            mask = test["ids"] > 0
            ours.append(error(run))
            again = principal(run.data["train"]["x"], dim)(test["x"])
            theirs.append((again - test["x"])[mask].square().mean())
        yield row(f"error from {dim} numbers an event, against PCA", f"<= {target}", ours, theirs)


def messages(args):
    """The same network of message layers with all messages 0: what particles say about each other."""
    flags = REFERENCE | dict(encoder="gnn", decoder="gnn", side_info=True, lr=3e-3)
    with_them, without = [], []
    for seed in range(args.seeds):
        with_them.append(error(fit(args, "messages", seed, **flags)))
        with mock.patch("models.autoencoder.message_weights", lambda mask: torch.zeros(*mask.shape, mask.shape[1])):
            without.append(error(fit(args, "silence", seed, **flags)))
    yield row("error of a graph network, against it without messages", "<= 0.85", with_them, without)


# --- loops ------------------------------------------------------------------------------------
def diffusion(args):
    """Events from noise given their own latent, and that of another event with as many particles."""
    found = []
    for seed in range(args.seeds):
        run = fit(args, "diffusion", seed, loop="diffusion_ae")
        some = take(run.data["test"], slice(1024))
        sums = denoised(run.model, run.noises, some, run.cfg.ddim_steps, seed, slice(None))
        found.append([(total / count).item() for total, count in sums.values()])
    own, other = zip(*found, strict=True)
    yield row("diffusion_ae: error given the latent of another event, against the own", ">= 5", other, own, worst=min)


class Judge(nn.Module):
    """Are features (B, T, F) of particles of types (B, T) measured or made -> (B): a sum over particles."""

    def __init__(self, features, width=64):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(features + 8, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.all = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, x, ids):
        real = (ids > 0)[..., None]
        h = self.each(torch.cat([x, F.one_hot(ids, 8)], -1)) * real
        return self.all(torch.cat([h.sum(1) / real.sum(1), h.sum(1) / 4], -1)).squeeze(-1)


def told_apart(real, false, ids, seed, steps):
    """AUROC of a fresh classifier, trained on the first half of events and on what was made of them."""
    torch.manual_seed(seed)
    judge, half = Judge(real.shape[-1]), len(ids) // 2
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(steps):
        index = torch.randint(half, (128,))
        scores = [judge(x[index], ids[index]) for x in (real, false)]
        (F.softplus(scores[0]) + F.softplus(-scores[1])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return auroc(*(judge(x[half:], ids[half:]) for x in (real, false)))


def gan(args):
    """The same networks with a discriminator and without: error, and whether a fresh classifier tells them apart."""
    errors, areas = {}, {}
    shape = {name: getattr(train_ae.GanAeConfig, name) for name in "encoder decoder latent_space level epochs".split()}
    for loop in ("gan_ae", "ae"):
        runs = [fit(args, loop, seed, loop=loop, **shape) for seed in range(args.seeds)]
        errors[loop] = [error(run) for run in runs]
        areas[loop] = []
        for seed, run in enumerate(runs):
            test = run.data["test"]
            steps = 3 if args.quick else 600
            areas[loop].append(told_apart(test["x"], made(run, test), test["ids"], seed, steps))
    yield row("gan_ae: error, against ae", "<= 1.1", *errors.values())
    gap = statistics.mean(areas["ae"]) - statistics.mean(areas["gan_ae"])
    more = f"lower by {gap:.3g}"
    yield row("gan_ae: AUROC real against made, against ae", "lower by >= 0.05", *areas.values(), more=more)


# --- use --------------------------------------------------------------------------------------
def odd_events(columns, kind, rng):
    """Events (x, ids, globals) with noise 0.1, without one of their particles, or with their types permuted."""
    x, ids = columns["x"].clone(), columns["ids"].clone()
    mask = ids > 0
    key = torch.rand(ids.shape, generator=rng).masked_fill(~mask, 2)  # particles first, at random
    if kind == "noise 0.1":
        x += 0.1 * torch.randn(x.shape, generator=rng) * mask[..., None]
    elif kind == "a particle dropped":
        gone = (key == key.amin(1, keepdim=True)) & (mask.sum(1, keepdim=True) > 1)
        order = (gone | ~mask).int().argsort(dim=1, stable=True)
        ids, x = ids.masked_fill(gone, 0).gather(1, order), x.masked_fill(gone[..., None], 0)
        x = x.gather(1, order[..., None].expand_as(x))
    else:
        swapped = ids.gather(1, key.argsort(1))  # the empty slots keep their places: they have the highest keys
        ids = torch.where(mask, swapped, 0)
    return columns | dict(x=x, ids=ids)


def areas(run, normal, odd):
    """AUROC of the error per event: that of a model, that of principal components of the same number."""
    again = principal(run.data["train"]["x"], run.cfg.latent_dim)
    scores = [(per_event(made(run, c), c), per_event(again(c["x"]), c)) for c in (normal, odd)]
    return [auroc(*pair) for pair in zip(*scores, strict=True)]


HELD_OUT = 1  # label of four tops


def anomaly(args):
    """Error of an event as a sign that it is odd, against that of as many principal components; one latent an event."""
    flags = EVENT | dict(latent_dim=32, encoder="gnn")
    kinds = ("noise 0.1", "a particle dropped", "types permuted")
    found = {kind: [] for kind in (*kinds, "four tops, never seen")}
    for seed in range(args.seeds):
        run, rng = fit(args, "anomaly", seed, **flags), torch.Generator().manual_seed(seed)
        test = run.data["test"]
        for kind in kinds:
            found[kind].append(areas(run, test, odd_events(test, kind, rng)))
        labels = tuple(label for label in run.cfg.labels if label != HELD_OUT)
        run = fit(args, "anomaly-but-one", seed, labels=labels, **flags)
        chosen = {name: getattr(run.cfg, name) for name in CHOICES} | dict(labels=(HELD_OUT,))
        odd = load_events(run.cfg.data, **chosen, stats=run.meta["stats"])[0]["test"]
        found["four tops, never seen"].append(areas(run, run.data["test"], odd))
    for kind, pairs in found.items():
        ours, theirs = zip(*pairs, strict=True)
        yield row(f"AUROC of the error, {kind}, against PCA", "ratio > 1", ours, theirs, worst=min)


def physics(args):
    """What a physicist looks at, before and after: default settings, a code a particle."""
    means, names = {}, dict(HT="within 5 %", MET="within 5 %", m_jj="within 10 %", edge="within 10 %")
    apart = {name: [] for name in ("HT", "MET", "m_jj")}
    for seed in range(args.seeds):
        run = fit(args, "physics", seed)
        both = reconstructed(run.model, run.noises, run.data["test"], run.meta, run.cfg)
        columns = [kinematics(rows) for rows in both]
        for side, (rows, column) in enumerate(zip(both, columns, strict=True)):
            found = {name: column[name].mean() for name in ("HT", "MET")} | dict(m_jj=w_share(rows))
            found["edge"] = (np.abs(column["phi"]) > np.pi - 0.1).mean()
            for name, value in found.items():
                means.setdefault(name, ([], []))[side].append(value)
        for name, distances in apart.items():
            distances.append(distance(*(column[name] for column in columns)))
    titles = dict(HT="mean HT, GeV", MET="mean missing momentum, GeV", edge="share of phi within 0.1 of +-pi",
                  m_jj="share of the events with a pair of light jets within 10 GeV of the W")  # fmt: skip
    for name, target in names.items():
        before, after = means[name]
        more = f"histograms differ by {statistics.mean(apart[name]):.3g}" if name in apart else ""
        yield row(f"{titles[name]}: reconstructed, against measured", target, after, before, more=more)


def distance(a, b):
    """Half of the summed differences of two histograms of 50 bins over the middle 99 % of `a`: 0 to 1."""
    bins = np.linspace(*np.quantile(a, (0.005, 0.995)), 51)
    return sum(np.abs(np.histogram(a, bins)[0] / len(a) - np.histogram(b, bins)[0] / len(b))) / 2


ROWS = dict(usage=usage, kmeans=kmeans, packages=packages, event=event, messages=messages, diffusion=diffusion, gan=gan,
            anomaly=anomaly, physics=physics)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}")
    add("--data", default="decay_chain", help="events, a file as of prepare_data.py events; default: made here")
    add("--quick", action="store_true", help="a few steps on few events: only to see that it runs")
    add("--readme", action="store_true", help="write the table into README.md")
    add("--home", type=Path, help="where runs lie; default benchmarks/work/ae_quality")
    add("--out", type=Path, help="default: benchmarks/ae_quality.json, with --quick benchmarks/work/ae_quality.json")
    for name, default in dict(seeds=5, threads=2, events=20000).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    said = f" --data {Path(args.data).name}" * (args.data != "decay_chain") + f" --seeds {args.seeds}"
    if args.quick:
        args.seeds, args.events = 1, min(args.events, 1000)
    args.out = args.out or HERE / ("work/ae_quality.json" if args.quick else "ae_quality.json")
    args.home = args.home or HERE / "work" / ("ae_quality-quick" if args.quick else "ae_quality")
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
