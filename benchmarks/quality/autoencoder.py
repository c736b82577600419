"""Quality of train_ae.py: its codebook against k-means and packages, its latents against PCA, its loops with controls.

    python -m benchmarks.quality.autoencoder                               # all rows, on events that are made here
    python -m benchmarks.quality.autoencoder --data events.npz --rows usage,kmeans --seeds 3

Runs are those of train_ae.py; they lie in --home, and finished ones are only read again. The reference protocol: raw
phi, no loss of types and globals, 1,024 particles per step, 1,704 steps, error over the test split of standardised
features. Both sides share data, split, batches and optimizer; ratios are of means over seeds.
"""

import contextlib
import io
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train_ae
from benchmarks.peers import GET, QUANTIZERS, STEPS, Quantizer
from benchmarks.report import WORK, command_line, figure, measure, rounded
from data_utils.checkpoint import load_checkpoint
from data_utils.events.dataset import load_events, take, to_rows
from data_utils.events.generate import load_run
from data_utils.events.kinematics import kinematics, pair_masses
from data_utils.events.reconstruct import reconstruct_batch
from models.autoencoder import build_encoder
from models.codebook import Codebook, lloyd, nearest, usage_and_perplexity
from models.diffusion import ddim_errors

REFERENCE = dict(phi="raw", type_weight=0.0, globals_beta=0.0)
EVENT = REFERENCE | dict(globals_beta=0.1, level="event", latent_space="none", hidden=(256, 256), epochs=20)
EVENT |= dict(lr=2e-3, batch_size=64)
TURNED = EVENT | dict(lr=1.5e-3, batch_size=32, epochs=30, symmetries=True)  # where events would be learnt by heart
GRAPH = REFERENCE | dict(encoder="gnn", decoder="gnn", side_info=True, lr=3e-3, batch_size=64)
TOKENS = 1024
W_MASS, WINDOW = 80.4, 10.0  # GeV: a pair of light jets within the window counts as a W
CYCLE = dict(lr=2e-3, warmup=530.0)  # of the runs of 5,300 steps
CHOICES = "events limit labels features phi energy_unit seed".split()


# --- runs -------------------------------------------------------------------------------------
def fit(args, name, seed, steps=0, quantizer=None, **flags):
    """Run train_ae.main to its end, or read its files -> model, noise schedule, data, meta, config.

    steps: stop after so many, of about TOKENS particles each; 0: `epochs` decide, and the best weights are taken, not
    the last. quantizer: replaces the class Codebook.
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


def fits(args, name, steps=0, quantizer=None, **flags):
    """Return the runs of all seeds."""
    return [fit(args, name, seed, steps, quantizer, **flags) for seed in range(args.seeds)]


def references(args, name="ours", steps=STEPS, quantizer=None, **more):
    return fits(args, f"{name}-{steps}", steps, quantizer, **REFERENCE | more)


@torch.no_grad()
def reconstructed(run, columns=None):
    """Return the model's features (N, T, F) of events, by default of the test split."""
    columns = columns or run.data["test"]
    return reconstruct_batch(run.model, run.noises, columns, getattr(run.cfg, "ddim_steps", 0), 0)[0]


def error(run, x_hat=None):
    """Return the mean squared error of reconstructions over the particles of the test split."""
    test, x_hat = run.data["test"], reconstructed(run) if x_hat is None else x_hat
    return (x_hat - test["x"])[test["ids"] > 0].square().mean().item()


@torch.no_grad()
def code_use(run):
    """Return the codes in use over the test split, %, and their perplexity."""
    test, mask = run.data["test"], run.data["test"]["ids"] > 0
    index = run.model(test["x"], test["ids"], mask, test["globals"])["indices"][mask]
    share, perplexity = usage_and_perplexity(torch.bincount(index, minlength=run.cfg.codebook_size))
    return 100 * share, perplexity


def over_seeds(id, title, target, ours, baseline=(), worst=max, more="", get="", unit=""):
    """Return a figure: means over seeds and their ratio, the worst seed and the range."""
    ours, baseline, mean = list(map(float, ours)), list(map(float, baseline)), statistics.mean
    spread = f"worst of {len(ours)} seeds {worst(ours):.4g}, {min(ours):.4g} to {max(ours):.4g}"
    parts = dict(baseline=get)
    if baseline:
        parts = dict(baseline=rounded(mean(baseline), 4), ratio=rounded(mean(ours) / mean(baseline), 4))
    return figure(id, title, rounded(mean(ours), 4), target, spread=[spread, more], unit=unit, seeds=len(ours), **parts)


def auroc(normal, odd):
    """Return the share of pairs in which the odd one's score is the higher: (N), (M) -> 0 to 1."""
    return (odd[:, None] > normal).double().mean().item()


# --- codebook ---------------------------------------------------------------------------------
def usage(args):
    """Codes in use over the whole test split, after the whole budget and after 200 steps on few events."""
    runs = references(args)
    shares, perplexities = zip(*map(code_use, runs), strict=True)
    yield over_seeds("codes", f"codes in use after {STEPS} steps", ">= 99", shares, worst=min, unit="%")
    yield over_seeds("perplexity", f"perplexity after {STEPS} steps, of 512", ">= 476", perplexities, worst=min)
    few = 40 * runs[0].cfg.batch_size  # events, five epochs of which are 200 steps
    runs = references(args, "few", 200, limit=few)
    shares, _ = zip(*map(code_use, runs), strict=True)
    yield over_seeds("few.codes", "codes in use after 200 steps on 41k particles", ">= 95", shares, worst=min, unit="%")
    yield over_seeds("few.error", "error after 200 steps on 41k particles", "<= 0.028", map(error, runs))


def kmeans(args):
    """Codes that an encoder learnt to use against codes for the features themselves: the best a code can do."""
    best = []
    for seed, run in enumerate(references(args)):
        train, test = (part["x"][part["ids"] > 0] for part in (run.data["train"], run.data["test"]))
        codes = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:512]]
        for i in range(1 if args.quick else 15):  # of ten iterations each
            codes = lloyd(train, codes, torch.Generator().manual_seed(seed + i))
        best.append((codes[nearest(test, codes)] - test).square().mean().item())
    for steps, target, more in ((STEPS, 1.09, {}), (5300, 1.02, CYCLE)):
        runs = references(args, steps=steps, **more)
        yield over_seeds(f"steps{steps}", f"error after {steps} steps, against k-means of 512", f"<= {target}",
                         map(error, runs), best)  # fmt: skip


def packages(args):
    """Other packages' quantizers in our encoder, decoder, batches and optimizer."""
    for i, (id, name, build, package, steps, target) in enumerate(QUANTIZERS):
        errors, more = [], ""
        with contextlib.suppress(ImportError):
            runs = references(args, f"package{i}", steps, partial(Quantizer, build))
            errors = list(map(error, runs))
            share, perplexity = map(statistics.mean, zip(*map(code_use, runs), strict=True))
            more = f"its worst {max(errors):.4g}; it uses {share:.1f} % of the codes, perplexity {perplexity:.0f}"
        ours = map(error, references(args, steps=steps))
        yield over_seeds(id, f"error after {steps} steps, against {name}", f"<= {target}", ours, errors, more=more,
                         get=GET[package])  # fmt: skip


# --- latents ----------------------------------------------------------------------------------
def principal(train, columns, dim):
    """Return features (N, T, F) of events from the first `dim` principal components of `train`'s features and
    globals."""
    flat, given = (torch.cat([part["x"].flatten(1), part["globals"]], 1) for part in (train, columns))
    middle = flat.mean(0)
    axes = torch.linalg.svd(flat - middle, full_matrices=False)[2][:dim]
    projected = (given - middle) @ axes.T @ axes + middle
    return projected[:, : -columns["globals"].shape[1]].view_as(columns["x"])


def event(args):
    """One latent of D numbers per event against as many principal components of the same features."""
    for dim, target in ((8, 0.6), (16, 0.6), (32, 0.2)):
        runs = fits(args, f"event-{dim}", latent_dim=dim, **TURNED)
        pca = [error(run, principal(run.data["train"], run.data["test"], dim)) for run in runs]
        yield over_seeds(f"dim{dim}", f"error from {dim} numbers per event, against PCA", f"<= {target}",
                         map(error, runs), pca)  # fmt: skip


def messages(args):
    """The same network of message layers with all messages 0: the worth of what particles tell each other."""
    heard = list(map(error, fits(args, "messages", **GRAPH)))
    with mock.patch("models.autoencoder.message_weights", lambda mask: torch.zeros(*mask.shape, mask.shape[1])):
        silent = list(map(error, fits(args, "silence", **GRAPH)))
    yield over_seeds("graph", "error of a graph network, against it without messages", "<= 0.85", heard, silent)


# --- loops ------------------------------------------------------------------------------------
def diffusion(args):
    """Events from noise given their own latent, and that of another event with as many particles."""
    errors = []
    for seed, run in enumerate(fits(args, "diffusion", loop="diffusion_ae")):
        columns = take(run.data["test"], slice(1024))
        sums = ddim_errors(run.model, run.noises, columns, run.cfg.ddim_steps, seed, slice(None))
        errors.append([(total / count).item() for total, count in sums.values()])
    given, other = zip(*errors, strict=True)
    worst = f"worst ratio {min(theirs / ours for ours, theirs in errors):.3g}"
    title = "diffusion_ae: error given another event's latent, against its own"
    yield over_seeds("latent", title, ">= 5", other, given, min, worst)


def detected(run, reconstruction, seed, steps):
    """Train a fresh graph network to tell half of the test events from their reconstructions -> AUROC on the rest."""
    torch.manual_seed(seed)
    test, half = run.data["test"], len(reconstruction) // 2
    shape = {name: run.meta[name] for name in ("cont_dim", "n_tokens", "num_types", "n_globals")}
    shape |= dict(hidden=(), gnn_dim=64, gnn_layers=2, noise_dim=0, activation="gelu", dropout=0.0)
    judge = build_encoder("gnn", level="event", latent_dim=1, **shape)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)

    def scores(index):
        rest = [test["ids"][index], test["ids"][index] > 0, test["globals"][index]]
        return [judge(x[index], *rest)[:, 0] for x in (test["x"], reconstruction)]

    for _ in range(steps):
        real, fake = scores(torch.randint(half, (128,)))
        (F.softplus(real) + F.softplus(-fake)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return auroc(*scores(slice(half, None)))


def gan(args):
    """The same networks with a discriminator and without: error, and whether a fresh classifier tells them apart."""
    plain, flags = vars(train_ae.AeConfig()), vars(train_ae.GanAeConfig())
    flags = {name: value for name, value in flags.items() if plain.get(name, value) != value and name != "loop"}
    errors, areas = [], []
    for loop in ("gan_ae", "ae"):
        runs = fits(args, loop, loop=loop, **flags)
        errors.append(list(map(error, runs)))
        areas.append([detected(run, reconstructed(run), seed, args.judged) for seed, run in enumerate(runs)])
    yield over_seeds("error", "gan_ae: error, against ae", "<= 1.1", *errors)
    more = f"lower by {statistics.mean(areas[1]) - statistics.mean(areas[0]):.3g}"
    yield over_seeds("auroc", "gan_ae: AUROC of a fresh classifier, real or reconstructed, beside ae",
                     "lower by >= 0.05", *areas, more=more)  # fmt: skip


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
    """Return the AUROC of the error per event: of a model, and of as many principal components as a code has
    numbers."""
    scores = []
    for columns in (normal, odd):
        mask = columns["ids"] > 0
        guesses = reconstructed(run, columns), principal(run.data["train"], columns, run.cfg.latent_dim)
        scores.append([((x - columns["x"]).square().mean(2) * mask).sum(1) / mask.sum(1) for x in guesses])
    return [auroc(*pair) for pair in zip(*scores, strict=True)]


def anomaly(args):
    """Error as a sign of odd particles, of a graph network with codes; of odd events, of 32 numbers; against PCA."""
    kinds = ("noise 0.1", "a particle dropped", "types permuted")
    pairs = {kind: [] for kind in (*kinds, "four tops, never seen")}
    for seed in range(args.seeds):
        run, rng = fit(args, "messages", seed, **GRAPH), torch.Generator().manual_seed(seed)
        for kind in kinds:
            pairs[kind].append(areas(run, run.data["test"], odd_events(run.data["test"], kind, rng)))
        run = fit(args, "but-four-tops", seed, labels=(0, 2, 3, 4, 5), latent_dim=32, **EVENT)
        odd = events(run.cfg, labels=(1,), stats=run.meta["stats"])[0]["test"]
        pairs["four tops, never seen"].append(areas(run, run.data["test"], odd))
    for id, (kind, values) in zip(("noise", "dropped", "permuted", "four_tops"), pairs.items(), strict=True):
        yield over_seeds(id, f"AUROC of the error, {kind}, against PCA", "ratio > 1", *zip(*values, strict=True),
                         worst=min)  # fmt: skip


def w_mass_share(rows):
    """Return the share of events that have a pair of light jets with the mass of a W, of those with any pair."""
    masses = pair_masses(rows)
    with_pair = np.isfinite(masses).any(1)
    near = np.abs(np.nan_to_num(masses, nan=1e9) - W_MASS) < WINDOW
    return near[with_pair].any(1).mean() if with_pair.any() else 0.0


PHYSICS = dict(  # column: (title, unit, number of rows, within so many %)
    HT=("mean HT", "GeV", lambda rows: kinematics(rows)["HT"].mean(), 5),
    MET=("mean missing momentum", "GeV", lambda rows: kinematics(rows)["MET"].mean(), 5),
    m_jj=("share of events with two light jets of the mass of a W", "", w_mass_share, 10),
)


def physics(args):
    """Distributions that a physicist looks at, reconstructed and measured; latents of particles lack the missing
    momentum."""
    kinds = dict(code=("a code per particle", {}))
    kinds["event"] = ("32 numbers per event", TURNED | dict(phi="sincos", type_weight=0.1))
    for kind, (kind_name, flags) in kinds.items():
        rows = []  # per seed: measured and reconstructed, in GeV
        for run in fits(args, f"physics-{flags.get('level', 'token')}", **flags):
            test, (x, globals) = run.data["test"], reconstruct_batch(run.model, None, run.data["test"], 0, 0)
            rows.append([to_rows(a, test["ids"], b, run.meta) for a, b in ((test["x"], test["globals"]), (x, globals))])
        columns = [[kinematics(part) for part in pair] for pair in rows]
        for column, (title, unit, number, within) in PHYSICS.items():
            measured, modelled = ([number(pair[side]) for pair in rows] for side in (0, 1))
            difference = statistics.mean(histogram_difference(*(part[column] for part in pair)) for pair in columns)
            yield over_seeds(f"{kind}.{column.lower()}", f"{title}, from {kind_name}", f"within {within} %", modelled,
                             measured, more=f"histograms differ by {difference:.3g}, at most 1", unit=unit)  # fmt: skip
        turned = [[(part["phi"] + np.pi + 0.1) % (2 * np.pi) for part in pair] for pair in columns]
        counts = [[np.histogram(part, 31, (0, 2 * np.pi))[0] for part in pair] for pair in turned]
        edge, *others = np.transpose([after / before.clip(1) for before, after in counts])
        more = f"in the 30 other bins {np.min(others):.3g} to {np.max(others):.3g}"
        yield over_seeds(f"{kind}.phi", f"particles reconstructed / measured around phi = +-pi, from {kind_name}",
                         "as elsewhere", edge, more=more)  # fmt: skip


def histogram_difference(a, b):
    """Return half of the summed differences of two histograms of 50 bins over the middle 99 % of `a`."""
    bins = np.linspace(*np.quantile(a, (0.005, 0.995)), 51)
    return abs(np.histogram(a, bins)[0] / len(a) - np.histogram(b, bins)[0] / len(b)).sum() / 2


ROWS = dict(usage=usage, kmeans=kmeans, packages=packages, event=event, messages=messages, diffusion=diffusion, gan=gan,
            anomaly=anomaly, physics=physics)  # fmt: skip


def main(argv=None):
    parser = command_line(__doc__, ROWS, "quality.autoencoder", seeds=5, threads=2, events=20000, judged=300)
    add = parser.add_argument
    add("--data", default="decay_chain", help="events, a file as of prepare_data.py events; default: made here")
    add("--home", type=Path, default=WORK / "ae_quality", help="where runs lie")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    flags = f" --seeds {args.seeds}"
    if args.data != "decay_chain":
        flags = f" --data data/{Path(args.data).name}{flags}"
    if args.quick:
        args.seeds, args.events, args.judged, args.home = 1, 300, 2, args.home / "quick"
    measure(args, ROWS, flags)


if __name__ == "__main__":
    main()
