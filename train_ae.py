"""Train an autoencoder of particle events: an encoder, a latent space and a decoder, under one of four loops.

    python train_ae.py                                                          # synthetic events, a minute or so
    python train_ae.py phase1.trainer.epochs=20 phase1/latent_space=vq          # or --epochs 20 --latent-space vq
    python train_ae.py --loop gan_ae                                            # or diffusion_ae, test_mlp
    python train_ae.py --multirun latent_space=none,linear,vq epochs=10,20      # a sweep of six jobs
    torchrun --nproc-per-node 2 train_ae.py env=cluster                         # several GPUs

KEY=VALUE is --key value; phase1.trainer., phase1/, phase1., data. or logging. may precede KEY. Writes a run's folder in
outputs/runs/; with out= that folder it goes on. In a notebook: paste this file, then main(AeConfig(epochs=2)).
"""

import inspect
import math
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from data_utils.config import at_least, complete, from_cli
from data_utils.errors import DataError
from data_utils.launch import ends_cleanly, launch
from data_utils.overrides import GUIDE

Part = Literal["mlp", "gnn", "gan", "diffusion"]


@dataclass
class AeConfig:
    # run
    loop: Literal["ae", "gan_ae", "diffusion_ae", "test_mlp"] = "ae"  # how it is trained
    name: str = "experiment"  # end of the run folder's name
    out: str = ""  # this run's folder; "" = {outputs}/runs/run_<time>_<name>
    outputs: str = "outputs"  # root of runs/ and multiruns/
    env: str = "local"  # bundle of a site, configs/ae/env/<env>.yaml
    config: str = ""  # YAML file of flags; --config-name X is configs/ae/X.yaml
    logging: str = ""  # bundle of figures: plots_minimal, plots_standard, plots_full
    resume: str = "auto"  # auto: go on in `out`; none: refuse an `out` with files; or a run folder, file, sweep folder
    seed: int = 42  # of weights, order, noise and split
    # data
    data: str = "decay_chain"  # decay_chain (made in memory), or an .h5, .hdf5 or .npz file
    events: int = 20000  # events to make
    limit: int = 0  # rows of a split that are kept; 0 = all
    labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # processes to keep: tt, tttt, ttH, ttW, ttWW, ttZ
    features: tuple[str, ...] = ("E", "pT", "eta", "phi")  # columns to model, in this order
    phi: Literal["sincos", "raw"] = "sincos"  # raw: a jump at pi, only to repeat measured comparisons
    energy_unit: Literal["GeV", "MeV"] = "GeV"  # of the file
    symmetries: bool = False  # train on events turned about the beam and mirrored, anew in each epoch
    # model
    encoder: Part = "mlp"  # reads an event
    decoder: Part = "mlp"  # writes it
    latent_space: Literal["none", "linear", "vq"] = "vq"  # between them
    level: Literal["token", "event"] = "token"  # one latent a particle, or one an event
    latent_dim: int = 32  # width D of a latent
    hidden: tuple[int, ...] = (128, 128)  # widths of MLPs
    gnn_dim: int = 64  # width of message layers
    gnn_layers: int = 2  # message layers
    activation: Literal["relu", "gelu", "silu"] = "gelu"  # of MLPs
    dropout: float = 0.0  # in MLPs
    side_info: bool = False  # the decoder is told type and slot, and has no type to find
    noise_dim: int = 8  # noise inputs of encoder or decoder gan
    codebook_size: int = 512  # codes K
    beta: float = 0.25  # weight of the commitment
    ema_decay: float = 0.0  # of the codes' running means; 0 = by the number of steps
    revive: float = 0.0  # share of N/K below which a code is dead; 0 = by the number of steps, -1 = off
    vq_init: Literal["kmeans", "random"] = "kmeans"  # first codes
    # losses
    type_weight: float = 0.1  # weight of the types
    globals_beta: float = 0.1  # weight of the missing energy
    latent_adv_weight: float = 0.1  # weight of encoder gan's critic of latents
    d_lr: float = 1e-3  # learning rate of the critic and of a discriminator
    # optimization
    epochs: int = 10  # passes over the events
    batch_size: int = 128  # events per micro-batch and process
    accumulate: int = 1  # micro-batches per optimizer step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # AdamW decay
    warmup: float = 100.0  # steps of linear warmup, at most a tenth of all steps; a cosine to a tenth of lr follows
    clip: float = 1.0  # largest gradient norm; 0 = off
    max_steps: int = 0  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = 0.0  # stop after so many seconds; 0 = off
    # files, figures
    fresh: bool = False  # start over; old files of `out` are renamed to *.bak, *.bak2, ...
    save_minutes: float = 10.0  # minutes between rolling saves: what a crash can cost; 0 = after each epoch only
    save_artifacts: bool = True  # off: nothing is written, the best weights stay in memory
    make_plots: bool = True  # off: no figures
    plot_losses: bool = True  # training and validation loss
    plot_metrics: bool = True  # every other metric
    plot_codebook: bool = True  # use of the codes
    plot_latency: bool = True  # seconds of an epoch
    plot_recon: bool = False  # reconstructions
    plot_adversarial: bool = True  # discriminator or critic
    plot_diffusion: bool = True  # noise prediction
    plot_moments: tuple[str, ...] = ("on_epoch_end", "on_train_end", "on_test_end")  # when figures are drawn
    plot_every: int = 10  # epochs between those of on_epoch_end; the last one always
    plot_detail: Literal["light", "full"] = "light"  # full: more panels
    # sweep, hardware
    multirun: bool = False  # also -m: KEY=a,b runs one job a value, each combination of several keys
    fail_fast: bool = False  # the first job that fails ends the sweep
    sweep_job: int = -1  # run this job of the sweep alone (array jobs); -1 = all
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile: slow to start, then faster on a GPU


@dataclass
class GanAeConfig(AeConfig):
    loop: Literal["ae", "gan_ae", "diffusion_ae", "test_mlp"] = "gan_ae"  # how it is trained
    gnn_dim: int = 32  # width of message layers
    d_lr: float = 3e-4  # learning rate of the critic and of a discriminator
    adv_weight: float = 0.8  # weight of the discriminator's verdict, in units of the reconstruction's gradient
    adv_start: float = 0.2  # share of the steps after which that counts


@dataclass
class DiffusionAeConfig(AeConfig):
    loop: Literal["ae", "gan_ae", "diffusion_ae", "test_mlp"] = "diffusion_ae"  # how it is trained
    latent_space: Literal["none", "linear", "vq"] = "none"  # between them
    level: Literal["token", "event"] = "event"  # one latent a particle, or one an event
    hidden: tuple[int, ...] = (256, 256)  # widths of MLPs
    epochs: int = 20  # passes over the events
    lr: float = 3e-3  # peak learning rate
    diffusion_steps: int = 1000  # noise levels
    noise_schedule: Literal["cosine", "linear"] = "cosine"  # how the noise grows; linear: beta 1e-4 to 0.02
    ddim_steps: int = 20  # denoising steps when sampling


@dataclass
class TestMlpConfig(AeConfig):
    loop: Literal["ae", "gan_ae", "diffusion_ae", "test_mlp"] = "test_mlp"  # how it is trained
    task: Literal["regression", "binary"] = "regression"  # what the table asks for


FAMILIES = {"losses", "metrics", "latency", "codebook", "recon", "adversarial"}  # of figures; the last: encoder gan
LOOPS = {
    "ae": (AeConfig, FAMILIES),
    "gan_ae": (GanAeConfig, FAMILIES),
    "diffusion_ae": (DiffusionAeConfig, FAMILIES | {"diffusion"}),
    "test_mlp": (TestMlpConfig, {"losses", "metrics", "latency"}),
}
CONFIGS = {name: cls for name, (cls, _) in LOOPS.items()}
Config = AeConfig

if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli(CONFIGS, __doc__, by="loop", overrides=GUIDE)
    if cfg and cfg.multirun:  # each job is a process of its own; this one needs no torch
        from data_utils.events.sweep import sweep

        launch(sweep, cfg)


import torch

from data_utils import checkpoint, files
from data_utils.events.dataset import epoch_order, load_events, take, test_table, turned
from data_utils.events.reconstruct import keep_rates, latent_statistics, reconstructed, start_codes
from data_utils.events.run_folder import Recorder, run_folder, take_up
from data_utils.hardware import Hardware
from data_utils.metrics import add, means
from data_utils.progress import Progress, say
from data_utils.stop import Stop
from models.autoencoder import AutoEncoder, Regressor, denominators, loss_sums, regression_sums
from models.codebook import decay_for, revive_for, usage_and_perplexity
from models.diffusion import NoiseSchedule, denoised
from models.gan import Judges

BAD_STEPS = 20  # non-finite steps in a row that end a run
AT_ONCE, DENOISED = 1024, 1024  # events in a batch of evaluation; made from noise there
# what a resumed run may change and still do bit for bit the same
COSMETIC = """name out outputs env config logging resume fresh data save_minutes max_steps max_seconds save_artifacts
make_plots plot_losses plot_metrics plot_codebook plot_latency plot_recon plot_adversarial plot_diffusion plot_moments
plot_every plot_detail multirun fail_fast sweep_job device compile""".split()


@ends_cleanly
def main(cfg):
    cfg = complete(cfg, CONFIGS, by="loop", overrides=GUIDE)
    at_least(cfg, 1, *"epochs batch_size accumulate latent_dim gnn_dim gnn_layers noise_dim plot_every events".split())
    at_least(cfg, 0, *"lr d_lr weight_decay warmup clip dropout limit beta type_weight globals_beta seed".split())
    at_least(cfg, 0, *"latent_adv_weight ema_decay save_minutes max_steps max_seconds".split())

    # --- hardware -------------------------------------------------------------------------
    auto = "float32" if cfg.device == "cpu" or not torch.cuda.is_available() else "bfloat16"
    dtype = auto if cfg.dtype == "auto" else cfg.dtype
    hardware = Hardware(cfg.device, dict(float32="fp32", bfloat16="bf16", float16="fp16")[dtype])
    rank, world, device, scaler = hardware.rank, hardware.world, hardware.device, hardware.scaler
    tell = say if rank == 0 else lambda *_: None
    tell(hardware.reason)
    torch.manual_seed(cfg.seed)

    # --- data -----------------------------------------------------------------------------
    chosen = {name: getattr(cfg, name) for name in "events limit labels features phi energy_unit seed".split()}
    data, meta = test_table(cfg.seed, cfg.task) if cfg.loop == "test_mlp" else load_events(cfg.data, **chosen)
    data = {split: {key: column.to(device) for key, column in columns.items()} for split, columns in data.items()}
    events, rows = len(data["train"]["x"]), cfg.batch_size * cfg.accumulate * world
    batches = math.ceil(events / rows)  # an epoch; its last batch is filled up from its start
    steps = cfg.epochs * batches
    last_step = min(steps, cfg.max_steps or steps)  # at which this run ends, on the schedule of all
    counts = ", ".join(f"{len(columns['x'])} {split}" for split, columns in data.items())
    tell(f"{meta['source']}: {counts} events" + f", dropped: {meta['dropped']}" * bool(meta["dropped"]))

    # --- model and optimizer --------------------------------------------------------------
    known = dict(adv_weight=0.0, adv_start=0.0) | asdict(cfg) | meta
    known |= dict(denoise=cfg.loop == "diffusion_ae", discriminator=cfg.loop == "gan_ae")
    known |= dict(ema_decay=cfg.ema_decay or decay_for(steps), revive=max(0, cfg.revive or revive_for(steps)))

    def build(network):
        arguments = {name: known[name] for name in inspect.signature(network).parameters}
        return network(**arguments).to(device), arguments

    raw_model, model_args = build(Regressor if cfg.loop == "test_mlp" else AutoEncoder)  # the one that is saved
    noises = build(NoiseSchedule)[0] if cfg.loop == "diffusion_ae" else None
    judges = build(Judges)[0] if cfg.loop == "gan_ae" or cfg.loop != "test_mlp" and cfg.encoder == "gan" else None
    groups = [dict(params=list(raw_model.parameters()), peak=cfg.lr, weight_decay=cfg.weight_decay)]
    if judges:
        groups += [dict(params=list(judges.parameters()), peak=cfg.d_lr, weight_decay=0, betas=(0.5, 0.9))]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, fused=device.type in ("cpu", "cuda"))
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)  # all that is saved
    parts |= dict(judges=judges) if judges else {}
    weights = dict(rec_tokens=1, eps_loss=1, miss=1, commit=1, rec_types=cfg.type_weight, rec_globals=cfg.globals_beta)

    # --- resume ---------------------------------------------------------------------------
    # where the run is, saved and resumed as it stands; epoch: how many are validated; sums: of the one under way
    at = SimpleNamespace(step=0, epoch=0, sums={}, best_val_loss=math.inf, best_epoch=-1, test_loss=math.nan, tested=-1,
                         histories={}, seconds=0.0, epoch_seconds=0.0, skipped=0, skipped_in_row=0,
                         run_id=uuid.uuid4().hex)  # fmt: skip
    kind, keep = f"ae:{cfg.loop}", cfg.save_artifacts
    out = Path(hardware.gather(run_folder(cfg))[0])  # one clock for all ranks
    last, best, resume = out / "last.pt", out / "best_val.pt", cfg.resume if Path(cfg.resume).is_file() else "auto"
    lock = files.lock_run(out, "ae", out) if rank == 0 and keep else None  # noqa: F841  held until main ends
    about = dict(kind=kind, format=1, tokenizer="events", tokenizer_hash="", data_hash=meta["data_hash"], meta=meta,
                 world_size=world, steps=steps, torch=str(torch.__version__), config=asdict(cfg),
                 model_args=model_args)  # fmt: skip
    path, state = checkpoint.find_checkpoint(resume, cfg.fresh, [last, best, out / "model.pt"], kind)
    if state:
        keep_rates(raw_model, model_args, state["model_args"], cfg)
        checkpoint.load_parts(parts, state, path, about, same_data="data, labels, limit and seed")
        take_up(at, state, batches)
        tell(checkpoint.resume_notice(path, state, about, COSMETIC))
    elif raw_model.latent_space == "vq":
        start_codes(raw_model, data["train"], cfg)

    def results(stopped=0):
        hardware.close()
        final = at.histories.get("val_loss", [math.nan])[-1]
        return vars(at) | dict(final_val_loss=final, run_dir=str(out) * keep, stopped=stopped)

    if at.tested >= cfg.epochs:
        tell(f"{out}: finished after {at.epoch} epochs, test loss {at.test_loss:.4f}; a larger epochs= goes on")
        return results()
    model, saver, best_state = hardware.wrap(raw_model, cfg.compile), checkpoint.Saver(), None

    def save(path, must=True, state=None):
        if rank == 0 and keep:
            saver(path, state or about | vars(at) | {name: part.state_dict() for name, part in parts.items()}, must)
            files.symlink_to(out / "model.pt", best.name) if path == best else None

    record = Recorder(out if rank == 0 and keep else None, cfg, LOOPS[cfg.loop][1], at, device, new=not path)

    # --- schedule, evaluation, stop -------------------------------------------------------
    def rate_at(step):  # share of the peak: linear warmup, then a cosine down to a tenth
        rise = min(cfg.warmup, 0.1 * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise)))

    def compute_loss(network, batch):
        """Run a batch -> output, {name: (sum, count)}; the loss is the sum of `weights` times their means."""
        if cfg.loop == "test_mlp":
            return (output := network(batch["x"])), regression_sums(output, batch["y"], cfg.task)
        target, noisy = noises.corrupt(batch["x"]) if noises else (batch["x"], {})
        output = network(batch["x"], batch["ids"], batch["ids"] > 0, batch["globals"], **noisy)
        sums = loss_sums(output, target, batch["ids"], batch["globals"], cfg.level)
        if noises:
            sums |= noises.by_quarter(output["x_hat"], target, batch["ids"] > 0, noisy["t"])
            sums["eps_loss"] = sums.pop("rec_tokens")
        return output, sums

    def total(metrics):
        return sum(weight * metrics[name] for name, weight in weights.items() if name in metrics)

    @torch.no_grad()
    def evaluate(split):
        """A whole split -> {metric: mean}, counts of the codes, 0; None, None, the signal if stopped."""
        raw_model.eval()
        found, codes = {}, torch.zeros(cfg.codebook_size, dtype=torch.long)
        for begin in range(rank * AT_ONCE, len(data[split]["x"]), world * AT_ONCE):
            if stop:
                break
            torch.manual_seed(hash((cfg.seed, begin)))  # of the noise that is to be found
            with hardware.autocast:
                output, sums = compute_loss(raw_model, take(data[split], slice(begin, begin + AT_ONCE)))
            add(found, sums)
            if raw_model.latent_space == "vq":
                codes += torch.bincount(output["indices"][output["indices"] >= 0], minlength=len(codes)).cpu()
        if noises and not stop:
            mine = slice(rank, None, world)
            add(found, denoised(raw_model, noises, take(data[split], slice(DENOISED)), cfg.ddim_steps, cfg.seed, mine))
        raw_model.train()
        shards, sums = hardware.gather((int(stop.signal), found, codes)), {}
        if stopped := max(signal for signal, _, _ in shards):
            return None, None, stopped
        for _, found, _ in shards:
            add(sums, found)
        codes, metrics = sum(codes for _, _, codes in shards), means(sums)
        metrics["loss"] = total(metrics)
        if codes.any():
            metrics["usage"], metrics["perplexity"] = usage_and_perplexity(codes)
        return metrics, codes.tolist(), 0

    def due():  # an evaluation
        return at.epoch < at.step // batches

    # --- train ----------------------------------------------------------------------------
    epoch_of_order, shown, stop_now, late, over = -1, {}, 0, False, at.step >= last_step
    with Stop() as stop, Progress(last_step, at.step, show=rank == 0 and sys.stderr.isatty()) as progress, record:
        start = saved = mark = time.monotonic()
        record("on_resume" if path else "on_start")
        while True:
            if not due() and not over:  # else the run was stopped while it evaluated
                epoch, number = divmod(at.step, batches)
                if epoch_of_order != epoch:
                    shape, epoch_of_order = (batches, cfg.accumulate, world, cfg.batch_size), epoch
                    order, train = epoch_order(cfg.seed, epoch, events, shape), data["train"]
                    train = turned(train, meta, cfg.seed, epoch) if cfg.symmetries else train
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate_at(at.step)
                whole, sums = denominators(take(train, order[number].flatten()), cfg.level), {}
                for m in range(cfg.accumulate):
                    torch.manual_seed(hash((cfg.seed, at.step, m * world + rank)))  # of dropout and noise
                    model.require_backward_grad_sync = m == cfg.accumulate - 1  # DDP: one reduction a step
                    batch = take(train, order[number, m, rank])
                    with hardware.autocast:
                        output, found = compute_loss(model, batch)
                        loss = total({name: found[name][0] / count for name, count in whole.items() if name in found})
                        if judges:  # what they lower, and what it costs the model to be found out
                            own, cost, said = judges(batch, output, loss, raw_model.last_weight(), at.step / steps)
                            loss, found = loss + (own + cost) / (cfg.accumulate * world), found | said
                    scaler.scale(loss * world).backward()  # DDP takes the mean over ranks
                    add(sums, found)
                if judges:  # before unscale_, which looks for overflows: all ranks must see those of each
                    hardware.average(judges.parameters())
                scaler.unscale_(optimizer)
                clip, limit = torch.nn.utils.clip_grad_norm_, cfg.clip or math.inf
                norms = [clip(group["params"], limit) for group in optimizer.param_groups]
                now = time.monotonic()
                late = cfg.save_minutes and now - saved > 60 * cfg.save_minutes
                over = at.step + 1 >= last_step or 0 < cfg.max_seconds < now - start
                totals = hardware.total(*(number for pair in sums.values() for number in pair))
                sums = {name: totals[2 * i : 2 * i + 2] for i, name in enumerate(sums)}
                bad = not math.isfinite(sum(norms) + sum(totals))
                bad, stop_now, late, over = hardware.largest(bad, int(stop.signal), late, over)
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                elif scaler.is_enabled():  # an overflow, perhaps of another rank: all of them skip and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                if not bad:
                    add(at.sums, sums | dict(grad_norm=(norms[0], 1)))
                at.skipped += bool(bad)
                at.skipped_in_row = at.skipped_in_row + 1 if bad and scaler.get_scale() <= 1 else 0
                if at.skipped_in_row == BAD_STEPS:
                    good = f"{best}, epoch {at.best_epoch + 1}" if best.exists() else "none"
                    raise DataError(f"{BAD_STEPS} steps in a row not finite, try a smaller lr=; last good: {good}")
                at.step, at.epoch_seconds, mark = at.step + 1, at.epoch_seconds + now - mark, now
                progress(epoch=at.step // batches, **shown)
            if due() and not stop_now:
                mark, (metrics, codes, stop_now) = time.monotonic(), evaluate("val")
            if due() and not stop_now:
                own = means(at.sums) | dict(lr=optimizer.param_groups[0]["lr"], skipped_steps=at.skipped)
                own["loss"], criterion = total(own) if at.sums else math.nan, metrics.get("ddim_mse", metrics["loss"])
                shown = record.epoch(own, metrics, codes, events, time.monotonic() - mark)
                tell(f"epoch {at.epoch}/{cfg.epochs} | " + " | ".join(f"{name} {n}" for name, n in shown.items()))
                at.sums, at.epoch_seconds, late = {}, 0.0, True
                if criterion < at.best_val_loss:
                    at.best_val_loss, at.best_epoch = criterion, at.epoch - 1
                    best_state = {key: value.clone() for key, value in raw_model.state_dict().items()}
                    save(best)
            mark = time.monotonic()
            if late and not at.skipped_in_row or over or stop_now:  # the last good state stays
                save(last, must=bool(over or stop_now))
                saved = time.monotonic()
            if over or stop_now:
                break
        if at.epoch >= cfg.epochs and not stop_now:
            record("on_train_end", epoch=at.epoch - 1, histories=at.histories)
            found = keep and checkpoint.find_checkpoint("auto", False, [best, last], kind)[1] or {}
            raw_model.load_state_dict(best_state or found.get("model_state", raw_model.state_dict()))
            metrics, codes, stop_now = evaluate("test")
            if not stop_now:
                at.test_loss, at.tested = metrics["loss"], at.epoch
                record.test(metrics, codes, reconstructed(raw_model, noises, data["test"], meta, cfg))
                if rank == 0 and keep:  # in last.pt are the last weights, not the best
                    save(best, state=found | latent_statistics(raw_model, data["train"]))
                    saver(last, checkpoint.load_checkpoint(last, kind) | vars(at))
        if stop_now:
            record("on_interrupt", epoch=at.epoch)

    # --- summary --------------------------------------------------------------------------
    tell(record.summary())
    return results(int(stop_now))


if __name__ == "__main__":
    launch(main, cfg)
