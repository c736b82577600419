"""Quality of train_ae.py: its codebook against k-means and packages, its latents against PCA, its loops with controls.

    python benchmarks/ae_quality.py                               # all rows, on events that are made here
    python benchmarks/ae_quality.py --data events.npz --rows usage,kmeans --seeds 3
    python benchmarks/ae_quality.py --rows "" --readme            # only write the table into README.md

Runs are those of train_ae.py; they lie in --home and are only read again once they are finished. The reference
protocol: raw phi, no loss of types and globals, 1,024 particles a step, 1,704 steps, error over the test split of
standardised features. What is compared shares data, split, batches and optimizer; ratios are of means over seeds.
"""

import contextlib
import io
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
from benchmarks.report import command_line, measure
from data_utils.checkpoint import load_checkpoint
from data_utils.events.dataset import load_events, take, to_rows
from data_utils.events.generate import load_run
from data_utils.events.kinematics import kinematics, w_share
from data_utils.events.reconstruct import decoded
from models.autoencoder import build_encoder
from models.codebook import Codebook, lloyd, nearest, usage_and_perplexity
from models.diffusion import denoised

HERE = Path(__file__).resolve().parent
REFERENCE = dict(phi="raw", type_weight=0.0, globals_beta=0.0)
EVENT = REFERENCE | dict(globals_beta=0.1, level="event", latent_space="none", hidden=(256, 256), epochs=20)
EVENT |= dict(lr=2e-3, batch_size=64)
TURNED = EVENT | dict(lr=1.5e-3, batch_size=32, epochs=30, symmetries=True)  # where events would be learnt by heart
GRAPH = REFERENCE | dict(encoder="gnn", decoder="gnn", side_info=True, lr=3e-3, batch_size=64)
TOKENS = 1024
CYCLE = dict(lr=2e-3, warmup=530.0)  # of the runs of 5,300 steps
CHOICES = "events limit labels features phi energy_unit seed".split()


# --- runs -------------------------------------------------------------------------------------
def fit(args, name, seed, steps=0, quantizer=None, **flags):
    """Run train_ae.main to its end, or read what it left -> its model, data, meta, config and noise schedule.

    steps: stop after so many, of about TOKENS particles each; 0: `epochs` decide, and the best weights are taken, not
    the last. quantizer: what stands in for the class Codebook.
    """
    kind = flags.get("loop", "ae")
    flags = dict(data=args.data, events=args.events, seed=seed, make_plots=False, device="cpu") | flags
    cfg = train_ae.LOOPS[kind][0](**flags, out=str(args.home / Path(args.data).stem / f"{name}-seed{seed}"))
    if args.quick:
        cfg.epochs, steps = 1, min(steps, 3)
    data, meta = events(cfg)
    if steps:
        cfg.batch_size = round(TOKENS / (data["train"]["ids"] > 0).sum().item() * len(data["train"]["x"]))
        cfg.epochs = -(-steps // -(-len(data["train"]["x"]) // cfg.batch_size))
        cfg.max_steps = steps
    path = Path(cfg.out, "last.pt" if steps else "best_val.pt")
    with mock.patch("models.autoencoder.Codebook", quantizer or Codebook):
        if not (steps and path.exists() and load_checkpoint(path, f"ae:{kind}")["step"] >= steps):
            with contextlib.redirect_stdout(io.StringIO()):
                if train_ae.main(cfg)["stopped"]:
                    raise SystemExit(f"{cfg.out}: stopped; started again, it goes on")
        run = load_run(path, torch.device("cpu"))
    return SimpleNamespace(model=run.model, noises=run.noises, data=data, meta=meta, cfg=cfg)


def events(cfg, **other):
    return load_events(cfg.data, **{name: getattr(cfg, name) for name in CHOICES} | other)


def reference(args, seed, name="ours", steps=STEPS, **more):
    return fit(args, f"{name}-{steps}", seed, steps, **REFERENCE | more)


@torch.no_grad()
def made(run, columns=None):
    """What the model makes of events, by default of the test split: features (N, T, F)."""
    columns = columns or run.data["test"]
    return decoded(run.model, run.noises, columns, getattr(run.cfg, "ddim_steps", 0), 0)[0]


def error(run, x_hat=None):
    """Mean squared error over the particles of the test split, of what the model makes of them."""
    test, x_hat = run.data["test"], made(run) if x_hat is None else x_hat
    return (x_hat - test["x"])[test["ids"] > 0].square().mean().item()


@torch.no_grad()
def use(run):
    """Codes in use over the test split, %, and perplexity."""
    test, mask = run.data["test"], run.data["test"]["ids"] > 0
    index = run.model(test["x"], test["ids"], mask, test["globals"])["indices"][mask]
    share, perplexity = usage_and_perplexity(torch.bincount(index, minlength=run.cfg.codebook_size))
    return 100 * share, perplexity


def row(name, target, ours, peer=(), worst=max, more="", get=""):
    """A figure: means over seeds and their ratio, the worst seed and the range."""
    ours, mean = list(map(float, ours)), statistics.mean
    found = dict(figure=name, ours=float(f"{mean(ours):.4g}"), target=target, peer=get)
    if len(peer):
        found |= dict(peer=float(f"{mean(map(float, peer)):.4g}"), ratio=float(f"{mean(ours) / mean(peer):.4g}"))
    said = f"worst of {len(ours)} seeds {worst(ours):.4g}, {min(ours):.4g} to {max(ours):.4g}"
    return found | dict(spread="; ".join(filter(None, [said, more])))


def auroc(normal, odd):
    """Share of pairs in which the odd one's score is the higher: (N), (M) -> 0 to 1."""
    return (odd[:, None] > normal).double().mean().item()


# --- codebook ---------------------------------------------------------------------------------
def usage(args):
    """How many codes are in use over the whole test split, after the whole budget and after 200 steps on few events."""
    runs = [reference(args, seed) for seed in range(args.seeds)]
    shares, perplexities = zip(*map(use, runs), strict=True)
    yield row(f"codes in use after {STEPS} steps, %", ">= 99", shares, worst=min)
    yield row(f"perplexity after {STEPS} steps, of 512", ">= 476", perplexities, worst=min)
    few = 40 * runs[0].cfg.batch_size  # events, five epochs of which are 200 steps
    runs = [reference(args, seed, "few", 200, limit=few) for seed in range(args.seeds)]
    shares, _ = zip(*map(use, runs), strict=True)
    yield row("codes in use after 200 steps on 41k particles, %", ">= 95", shares, worst=min)
    yield row("error after 200 steps on 41k particles", "<= 0.028", map(error, runs))


def kmeans(args):
    """Codes that an encoder learnt to use against codes for the features themselves: what a code can do at best."""
    best = []
    for seed in range(args.seeds):
        data = reference(args, seed).data
        train, test = (part["x"][part["ids"] > 0] for part in (data["train"], data["test"]))
        codes = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:512]]
        for i in range(1 if args.quick else 15):  # of ten iterations each
            codes = lloyd(train, codes, torch.Generator().manual_seed(seed + i))
        best.append((codes[nearest(test, codes)] - test).square().mean().item())
    for steps, target, more in ((STEPS, 1.09, {}), (5300, 1.02, CYCLE)):
        runs = [reference(args, seed, steps=steps, **more) for seed in range(args.seeds)]
        yield row(f"error after {steps} steps, against k-means of 512", f"<= {target}", map(error, runs), best)


def packages(args):
    """Other packages' quantizers in our encoder, decoder, batches and optimizer."""
    for i, (name, build, get, steps, target) in enumerate(PACKAGES):
        theirs, more = [], ""
        with contextlib.suppress(ImportError):
            swap = dict(quantizer=partial(Quantizer, build))
            runs = [reference(args, seed, f"package{i}", steps, **swap) for seed in range(args.seeds)]
            theirs, (share, perplexity) = (
                list(map(error, runs)),
                map(statistics.mean, zip(*map(use, runs), strict=True)),
            )
            more = f"its worst {max(theirs):.4g}; it uses {share:.1f} % of the codes, perplexity {perplexity:.0f}"
        ours = [error(reference(args, seed, steps=steps)) for seed in range(args.seeds)]
        yield row(f"error after {steps} steps, against {name}", f"<= {target}", ours, theirs, more=more, get=get)


# --- latents ----------------------------------------------------------------------------------
def principal(train, columns, dim):
    """Features (N, T, F) of events from the first `dim` principal components of features and globals of others."""
    flat, given = (torch.cat([part["x"].flatten(1), part["globals"]], 1) for part in (train, columns))
    middle = flat.mean(0)
    axes = torch.linalg.svd(flat - middle, full_matrices=False)[2][:dim]
    again = (given - middle) @ axes.T @ axes + middle
    return again[:, : -columns["globals"].shape[1]].view_as(columns["x"])


def event(args):
    """One latent of D numbers an event against as many principal components of the same features."""
    for dim, target in ((8, 0.6), (16, 0.6), (32, 0.2)):
        runs = [fit(args, f"event-{dim}", seed, latent_dim=dim, **TURNED) for seed in range(args.seeds)]
        theirs = [error(run, principal(run.data["train"], run.data["test"], dim)) for run in runs]
        yield row(f"error from {dim} numbers an event, against PCA", f"<= {target}", map(error, runs), theirs)


def messages(args):
    """The same network of message layers with all messages 0: what particles say about each other."""
    heard = [error(fit(args, "messages", seed, **GRAPH)) for seed in range(args.seeds)]
    with mock.patch("models.autoencoder.message_weights", lambda mask: torch.zeros(*mask.shape, mask.shape[1])):
        silent = [error(fit(args, "silence", seed, **GRAPH)) for seed in range(args.seeds)]
    yield row("error of a graph network, against it without messages", "<= 0.85", heard, silent)


# --- loops ------------------------------------------------------------------------------------
def diffusion(args):
    """Events from noise given their own latent, and that of another event with as many particles."""
    found = []
    for seed in range(args.seeds):
        run = fit(args, "diffusion", seed, loop="diffusion_ae")
        some = take(run.data["test"], slice(1024))
        sums = denoised(run.model, run.noises, some, run.cfg.ddim_steps, seed, slice(None))
        found.append([(total / count).item() for total, count in sums.values()])
    worst = f"worst ratio {min(other / own for own, other in found):.3g}"
    own, other = zip(*found, strict=True)
    yield row("diffusion_ae: error given another event's latent, against the own", ">= 5", other, own, min, worst)


def told_apart(run, false, seed, steps):
    """AUROC of a fresh graph network that learns from half of the test events, and what was made of them."""
    torch.manual_seed(seed)
    test, half = run.data["test"], len(false) // 2
    shape = {name: run.meta[name] for name in ("cont_dim", "n_tokens", "num_types", "n_globals")}
    shape |= dict(hidden=(), gnn_dim=64, gnn_layers=2, noise_dim=0, activation="gelu", dropout=0.0)
    judge = build_encoder("gnn", level="event", latent_dim=1, **shape)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)

    def scores(index):
        about = [test["ids"][index], test["ids"][index] > 0, test["globals"][index]]
        return [judge(x[index], *about)[:, 0] for x in (test["x"], false)]

    for _ in range(steps):
        real, made_up = scores(torch.randint(half, (128,)))
        (F.softplus(real) + F.softplus(-made_up)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return auroc(*scores(slice(half, None)))


def gan(args):
    """The same networks with a discriminator and without: error, and whether a fresh classifier tells them apart."""
    plain, alike = vars(train_ae.AeConfig()), vars(train_ae.GanAeConfig())
    alike = {name: value for name, value in alike.items() if plain.get(name, value) != value and name != "loop"}
    found = []
    for loop in ("gan_ae", "ae"):
        runs = [fit(args, loop, seed, loop=loop, **alike) for seed in range(args.seeds)]
        told = [told_apart(run, made(run), seed, args.judged) for seed, run in enumerate(runs)]
        found.append((list(map(error, runs)), told))
    errors, told = zip(*found, strict=True)
    yield row("gan_ae: error, against ae", "<= 1.1", *errors)
    more = f"lower by {statistics.mean(told[1]) - statistics.mean(told[0]):.3g}"
    yield row("gan_ae: AUROC of a fresh classifier, real or made, beside ae", "lower by >= 0.05", *told, more=more)


# --- use --------------------------------------------------------------------------------------
def odd_events(columns, kind, rng):
    """Events (x, ids, globals) with noise 0.1, without one of their particles, or with their types permuted."""
    x, ids, mask = columns["x"], columns["ids"], columns["ids"] > 0
    key = torch.rand(ids.shape, generator=rng).masked_fill(~mask, 2)  # particles first, at random
    if kind == "noise 0.1":
        return columns | dict(x=x + 0.1 * torch.randn(x.shape, generator=rng) * mask[..., None])
    if kind == "types permuted":
        return columns | dict(ids=ids.gather(1, key.argsort(1)).masked_fill(~mask, 0))
    gone = (key == key.amin(1, keepdim=True)) & (mask.sum(1, keepdim=True) > 1)
    order = (gone | ~mask).int().argsort(dim=1, stable=True)
    x = x.masked_fill(gone[..., None], 0).gather(1, order[..., None].expand_as(x))
    return columns | dict(x=x, ids=ids.masked_fill(gone, 0).gather(1, order))


def areas(run, normal, odd):
    """AUROC of the error per event: that of a model, that of principal components, as many as a code has numbers."""
    scores = []
    for columns in (normal, odd):
        mask = columns["ids"] > 0
        guesses = made(run, columns), principal(run.data["train"], columns, run.cfg.latent_dim)
        scores.append([((x - columns["x"]).square().mean(2) * mask).sum(1) / mask.sum(1) for x in guesses])
    return [auroc(*pair) for pair in zip(*scores, strict=True)]


def anomaly(args):
    """Error as a sign of odd particles, of a graph network with codes; of odd events, of 32 numbers; against PCA."""
    found = {kind: [] for kind in ("noise 0.1", "a particle dropped", "types permuted", "four tops, never seen")}
    for seed in range(args.seeds):
        run, rng = fit(args, "messages", seed, **GRAPH), torch.Generator().manual_seed(seed)
        for kind in list(found)[:3]:
            found[kind].append(areas(run, run.data["test"], odd_events(run.data["test"], kind, rng)))
        run = fit(args, "but-four-tops", seed, labels=(0, 2, 3, 4, 5), latent_dim=32, **EVENT)
        odd = events(run.cfg, labels=(1,), stats=run.meta["stats"])[0]["test"]
        found["four tops, never seen"].append(areas(run, run.data["test"], odd))
    for kind, pairs in found.items():
        ours, theirs = zip(*pairs, strict=True)
        yield row(f"AUROC of the error, {kind}, against PCA", "ratio > 1", ours, theirs, worst=min)


PHYSICS = {  # column: (what is compared, how of rows, within so many %)
    "HT": ("mean HT", lambda rows: kinematics(rows)["HT"].mean(), 5),
    "MET": ("mean missing momentum", lambda rows: kinematics(rows)["MET"].mean(), 5),
    "m_jj": ("share of events with two light jets of the mass of a W", w_share, 10),
}


def physics(args):
    """What a physicist looks at, made and measured. Of missing momentum the latents of particles are not told."""
    kinds = {"a code a particle": {}, "32 numbers an event": TURNED | dict(phi="sincos", type_weight=0.1)}
    for kind, flags in kinds.items():
        runs = [fit(args, f"physics-{flags.get('level', 'token')}", seed, **flags) for seed in range(args.seeds)]
        rows = []  # in GeV, measured and made
        for run in runs:
            test, (x, globals) = run.data["test"], decoded(run.model, None, run.data["test"], 0, 0)
            rows.append([to_rows(a, test["ids"], b, run.meta) for a, b in ((test["x"], test["globals"]), (x, globals))])
        columns = [[kinematics(part) for part in pair] for pair in rows]
        for name, (title, how, within) in PHYSICS.items():
            measured, made_up = ([how(pair[side]) for pair in rows] for side in (0, 1))
            apart = statistics.mean(differ(*(part[name] for part in pair)) for pair in columns)
            more = f"histograms differ by {apart:.3g}, at most 1"
            yield row(f"{title}, from {kind}", f"within {within} %", made_up, measured, more=more)
        turned = [[(part["phi"] + np.pi + 0.1) % (2 * np.pi) for part in pair] for pair in columns]
        counts = [[np.histogram(part, 31, (0, 2 * np.pi))[0] for part in pair] for pair in turned]
        edge, *others = np.transpose([after / before.clip(1) for before, after in counts])
        more = f"in the 30 other bins {np.min(others):.3g} to {np.max(others):.3g}"
        yield row(f"particles made / measured around phi = +-pi, from {kind}", "as elsewhere", edge, more=more)


def differ(a, b):
    """Half of the summed differences of two histograms of 50 bins over the middle 99 % of `a`."""
    bins = np.linspace(*np.quantile(a, (0.005, 0.995)), 51)
    return abs(np.histogram(a, bins)[0] / len(a) - np.histogram(b, bins)[0] / len(b)).sum() / 2


ROWS = dict(usage=usage, kmeans=kmeans, packages=packages, event=event, messages=messages, diffusion=diffusion, gan=gan,
            anomaly=anomaly, physics=physics)  # fmt: skip


def main(argv=None):
    parser = command_line(__doc__, ROWS, "ae_quality")
    add = parser.add_argument
    add("--data", default="decay_chain", help="events, a file as of prepare_data.py events; default: made here")
    add("--quick", action="store_true", help="a few steps on few events: only to see that it runs")
    add("--home", type=Path, default=HERE / "work" / "ae_quality", help="where runs lie")
    for name, default in dict(seeds=5, threads=2, events=20000, judged=300).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    said = f" --data data/{Path(args.data).name}" * (args.data != "decay_chain") + f" --seeds {args.seeds}"
    if args.quick:
        args.seeds, args.events, args.judged, args.home = 1, 300, 2, args.home / "quick"
    measure(args, ROWS, lambda row: said)


if __name__ == "__main__":
    main()
