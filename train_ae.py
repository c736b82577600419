"""Train an autoencoder of particle events: an encoder, a latent space and a decoder.

    python train_ae.py                                        # made events, about a minute
    python train_ae.py --epochs 20 --latent-space linear      # or epochs=20 latent_space=linear
    python train_ae.py --loop gan_ae                          # or diffusion_ae, test_mlp
    python train_ae.py resume=outputs/runs/run_<time>_<name>  # go on where it stopped
    python train_ae.py --multirun latent_space=none,vq epochs=10,20  # a sweep of four jobs
    torchrun --nproc-per-node 2 train_ae.py env=cluster       # several GPUs

KEY=VALUE is --key value. One of phase1.trainer., phase1/, phase1., data. and logging. may precede
KEY. A run writes last.pt, best_val.pt, a link model.pt, facts/, figures/ and .hydra/ to a folder
of its own in outputs/runs/, or to --out, where the same command goes on. In a notebook, paste this
file into a cell, then call main(AeConfig(epochs=2)).

An event is a set of particles. Its features, types and globals (the missing energy) are encoded.
"""

import math
import os
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from data_utils.config import at_least, complete, cosmetic, cosmetic_names, flag, from_cli, one_of
from data_utils.errors import DataError, UsageError
from data_utils.launch import check_torchrun, ends_cleanly, launch
from data_utils.overrides import Overrides
from models.parts import DECODERS, ENCODERS, LATENT_SPACES, named, part

LOOPS = {}  # loop -> (its configuration, the figures that it can draw); filled below
MOMENTS = ("on_epoch_end", "on_train_end", "on_test_end")  # when figures can be drawn


# A `cosmetic` field may change on a resume, and the run still ends with the same bits. Names in
# `also` are further names of the flag. Of a field and the one that it is `instead` of, the one that
# is given resets the other to 0.
@dataclass
class AeConfig:
    # run
    loop: str = flag("ae", choices=LOOPS)  # how it is trained
    name: str = cosmetic("experiment")  # end of the run folder's name
    out: str = cosmetic("")  # folder of this run; none named = {outputs}/runs/run_<time>_<name>
    outputs: str = cosmetic("outputs")  # root of runs/ and multiruns/
    env: str = cosmetic("local")  # bundle of a site: configs/ae/env/<env>.yaml
    config: str = cosmetic("")  # YAML file of flags; --config-name X is configs/ae/X.yaml
    logging: str = cosmetic("")  # bundle of figures: plots_minimal, plots_standard, plots_full
    resume: str = cosmetic("auto")  # auto: go on in out; none: begin; or a run, a file, a sweep
    seed: int = 42  # of weights, data order, noise and split
    # data
    data: str = cosmetic("decay_chain")  # decay_chain: made in memory; or a .h5, .hdf5, .npz file
    events: int = 20000  # events to make
    limit: int = 0  # events of a split that are kept; 0 = all
    labels: tuple[int, ...] = cosmetic(())  # processes that are kept, such as 0 2; none named = all
    features: tuple[str, ...] = ()  # columns to model, such as pT eta phi; none named = all
    phi: Literal["sincos", "raw"] = "sincos"  # raw jumps at pi: only to repeat old comparisons
    energy_unit: Literal["GeV", "MeV"] = "GeV"  # of the file
    symmetries: bool = False  # turn events about the beam and mirror them, anew in each epoch
    # model
    encoder: str = flag("mlp", choices=ENCODERS)  # reads an event
    decoder: str = flag("mlp", choices=DECODERS)  # writes it
    latent_space: str = flag("vq", choices=LATENT_SPACES)  # between them
    level: Literal["token", "event"] = "token"  # one latent per particle, or one per event
    latent_dim: int = 32  # width D of a latent
    hidden: tuple[int, ...] = (128, 128)  # widths of MLPs
    gnn_dim: int = 64  # width of message layers
    gnn_layers: int = 2  # message layers
    activation: Literal["relu", "gelu", "silu"] = "gelu"  # of MLPs
    dropout: float = 0.0  # in MLPs
    side_info: bool = False  # the decoder reads type and slot, and guesses no type
    noise_dim: int = 8  # noise inputs of encoder or decoder gan
    codebook_size: int = 512  # codes K
    beta: float = 0.25  # weight of the commitment
    codebook_decay: float = flag(0.0, also="ema_decay")  # of the codes' means; 0 = by the steps
    revive: float = 0.0  # share of N/K below which a code is dead; 0 = by the steps, -1 = off
    vq_init: Literal["kmeans", "random"] = "kmeans"  # first codes
    # losses
    type_weight: float = 0.1  # weight of the types
    globals_beta: float = 0.1  # weight of the missing energy
    latent_adv_weight: float = 0.1  # weight of encoder gan's critic of latents
    d_lr: float = 1e-3  # peak learning rate of the critic and of a discriminator
    # optimization
    epochs: int = flag(10, also="max_epochs", instead="steps")  # passes over the events
    batch_size: int = 128  # events per micro-batch and process
    accumulate: int = flag(  # micro-batches per optimizer step
        1, also=("grad_accum_steps", "gradient_accumulation_steps")
    )
    lr: float = flag(1e-3, also="learning_rate")  # peak learning rate
    min_lr_ratio: float = flag(0.1, also="lr_min_ratio")  # floor of the cosine, share of the peak
    weight_decay: float = 0.0  # AdamW decay
    warmup: float = flag(100.0, also="warmup_steps")  # steps of it; at most a tenth of the schedule
    clip: float = flag(1.0, also=("grad_clip", "gradient_clip"))  # largest gradient norm; 0 = off
    steps: int = 0  # length of the schedule in optimizer steps; 0 = as epochs says
    max_steps: int = cosmetic(0)  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = cosmetic(0.0)  # stop after so many seconds; 0 = off
    # files and figures
    fresh: bool = cosmetic(False)  # start over; old files of out are renamed to *.bak, *.bak2, ...
    save_minutes: float = cosmetic(10.0)  # minutes between rolling saves; 0 = after each epoch only
    save_artifacts: bool = cosmetic(True)  # off: nothing is written, best weights stay in memory
    make_plots: bool = cosmetic(True)  # off: no figures
    plot_losses: bool = cosmetic(True)  # training and validation loss
    plot_metrics: bool = cosmetic(True)  # every other metric
    plot_codebook: bool = cosmetic(True)  # use of the codes
    plot_latency: bool = cosmetic(True)  # seconds of an epoch
    plot_recon: bool = cosmetic(False)  # reconstructions
    plot_adversarial: bool = cosmetic(True)  # discriminator or critic
    plot_diffusion: bool = cosmetic(True)  # noise prediction
    plot_moments: tuple[str, ...] = cosmetic(MOMENTS)  # when figures are drawn
    plot_every: int = cosmetic(10)  # epochs between those of on_epoch_end; the last one always
    plot_detail: Literal["light", "full"] = cosmetic("light")  # full: more panels
    # sweep and hardware
    multirun: bool = cosmetic(False)  # also -m: KEY=a,b runs a job per value; keys are combined
    fail_fast: bool = cosmetic(False)  # the first job that fails ends the sweep
    sweep_job: int = cosmetic(-1)  # run this job of the sweep alone (array jobs); -1 = all
    device: str = cosmetic("auto")  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    compile: bool = cosmetic(False)  # torch.compile: slow to start, then faster on a GPU

    # --help shows these, by purpose; --help all shows every flag.
    common = dict(
        data="data events",
        model="loop encoder decoder latent_space level hidden codebook_size",
        training="lr batch_size epochs",
        run="out resume multirun",
    )

    @property
    def remedy(self):
        """Return keys that need less memory and keep the size of a step."""
        return f"batch_size={max(1, self.batch_size // 2)} accumulate={2 * self.accumulate}"

    # Flags of other scripts, and why they are not here.
    absent = dict(
        fsdp="its models are small\ntry: torchrun --standalone --nproc-per-node 2 train_ae.py",
        init_from="latents of other events would mean something else\n"
        "fix: resume=FILE, which goes on with the same events",
    )
    denoise = False  # whether the decoder removes noise
    discriminator = False  # whether a discriminator judges reconstructions


@dataclass
class GanAeConfig(AeConfig):
    loop: str = flag("gan_ae", choices=LOOPS)  # how it is trained
    gnn_dim: int = 32  # width of message layers
    d_lr: float = 3e-4  # peak learning rate of the critic and of a discriminator
    adv_weight: float = 0.8  # pull of the discriminator, as a share of the reconstruction's
    adv_start: float = 0.2  # share of the steps after which it pulls
    discriminator = True


@dataclass
class DiffusionAeConfig(AeConfig):
    loop: str = flag("diffusion_ae", choices=LOOPS)  # how it is trained
    latent_space: str = flag("none", choices=LATENT_SPACES)  # between them
    level: Literal["token", "event"] = "event"  # one latent per particle, or one per event
    hidden: tuple[int, ...] = (256, 256)  # widths of MLPs
    epochs: int = flag(20, also="max_epochs", instead="steps")  # passes over the events
    lr: float = flag(3e-3, also="learning_rate")  # peak learning rate
    diffusion_steps: int = 1000  # noise levels
    noise_schedule: Literal["cosine", "linear"] = "cosine"  # linear: beta rises from 1e-4 to 0.02
    ddim_steps: int = 20  # denoising steps when sampling
    denoise = True


@dataclass
class TestMlpConfig(AeConfig):
    loop: str = flag("test_mlp", choices=LOOPS)  # how it is trained
    task: Literal["regression", "binary"] = "regression"  # what the table asks for


FIGURES = ("losses", "metrics", "codebook", "latency", "recon", "adversarial", "diffusion")
LOOPS |= dict(  # the first is the default
    ae=(AeConfig, {*FIGURES} - {"diffusion"}),
    gan_ae=(GanAeConfig, {*FIGURES} - {"diffusion"}),
    diffusion_ae=(DiffusionAeConfig, {*FIGURES}),
    test_mlp=(TestMlpConfig, {"losses", "metrics", "latency"}),
)
CONFIGS = {name: config for name, (config, _) in LOOPS.items()}
Config = AeConfig
GUIDE = Overrides(  # the keys of the training guide
    prefixes=("phase1.trainer.", "phase1/", "phase1.", "data.", "logging."),
    aliases={
        "phase1.encoder.hidden": "hidden",
        "phase1.decoder.hidden": "hidden",
        "phase1.latent_space.codebook_size": "codebook_size",
        "data.path": "data",
        "hydra.job.name": "name",
        **{f"logging.families.{name}.enabled": f"plot_{name}" for name in FIGURES},
    },
    ignored=("hydra=experiment",),
    folder="configs/ae",
    bundles=dict(env="env", logging=""),
    optional=("loop", "encoder", "decoder", "latent_space"),
    snapshot=".hydra/config.yaml",
)


def parse(argv=None):
    """Return the configuration, or the Jobs of a sweep, that the command line asks for."""
    return from_cli(CONFIGS, __doc__, argv, by="loop", overrides=GUIDE)


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = parse()
    if cfg and cfg.multirun:  # each job is a process of its own; this one needs no torch
        from data_utils.events.sweep import sweep

        launch(sweep, cfg)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data_utils import checkpoint, distributed, files
from data_utils.events.dataset import epoch_order, load_events, rotate_and_mirror, take, test_table
from data_utils.events.reconstruct import keep_rates, latent_statistics, reconstruct_rows, start_codebook
from data_utils.events.run_folder import Recorder, rename_old_flags, run_folder
from data_utils.metrics import add, means
from data_utils.progress import Progress, say
from data_utils.stop import Stop
from models.autoencoder import (
    REPORTED,
    AutoEncoder,
    Regressor,
    denominators,
    loss_sums,
    regression_sums,
)
from models.codebook import decay_for, revive_for, usage_and_perplexity
from models.diffusion import NoiseSchedule, ddim_errors
from models.gan import Judges

BAD_STEPS = 10  # steps in a row without a finite loss and gradient that end a run
DIVERGED = 1e3  # validation loss over the largest weight that ends a run; features have variance 1
EVAL_BATCH = 1024  # events in a batch of an evaluation
DENOISED = 1024  # events that an evaluation of diffusion_ae makes from noise


@dataclass
class RunState:
    """Where the run is. All of it is saved, and a resumed run goes on from it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done and validated
    sums: dict = field(default_factory=dict)  # {metric: (sum, count)} of the epoch under way
    best_val_loss: float = math.inf  # lowest validation loss, of diffusion_ae lowest ddim_mse
    best_epoch: int = -1  # epoch that has it, from 0
    test_loss: float = math.nan  # of the best weights
    tested: int = -1  # epochs done at that test
    histories: dict = field(default_factory=dict)  # {metric: a value per epoch}
    seconds: float = 0.0  # of the run, all its parts together
    epoch_seconds: float = 0.0  # of training in the epoch under way
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_row: int = 0  # those since the last good step
    run_id: str = ""  # the same in all files of a run


def check(cfg):
    """Raise UsageError for a value that no run can have."""
    at_least(cfg, 1, "batch_size", "accumulate", "latent_dim", "gnn_dim", "gnn_layers")
    at_least(cfg, 1, "noise_dim", "plot_every", "events")
    at_least(cfg, 0, "lr", "min_lr_ratio", "d_lr", "weight_decay", "warmup", "clip", "dropout")
    at_least(cfg, 0, "limit", "beta", "type_weight", "globals_beta", "seed", "latent_adv_weight")
    at_least(cfg, 0, "codebook_decay", "save_minutes", "max_steps", "max_seconds")
    one_of(cfg, "steps", "epochs")


@ends_cleanly
def main(cfg):
    """Train as `cfg` says.

    Returns a dict: the last RunState, final_val_loss, run_dir ("" if nothing is written), and
    stopped: the signal that ended it, or 0.
    """
    cfg = complete(cfg, CONFIGS, by="loop", overrides=GUIDE)
    check(cfg)
    dtype = cfg.dtype
    if dtype == "auto":
        on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
        dtype = "bfloat16" if on_gpu else "float32"

    # --- hardware -------------------------------------------------------------------------
    # These lines are the same in all six scripts, and a test keeps them so.
    check_torchrun(cfg.device)
    rank = int(os.environ.get("RANK", 0))  # number of this process; torchrun sets these three
    world = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # number of this process on its machine
    device = cfg.device
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    # Some drivers fail only when a device is used. One number on it shows that now.
    try:
        device = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UsageError(f"--device {device} can't be used: {reason}\ntry: --device cpu") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
        fast_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # before, it is emulated
    else:
        # A CPU without these instructions emulates bfloat16, which is slower than float32.
        fast_bf16 = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    # Old GPUs have float16 in place of bfloat16. Off a GPU, float16 is no faster than float32.
    if dtype == "bfloat16" and not fast_bf16:
        dtype = "float16"
    if dtype == "float16" and device.type != "cuda":
        dtype = "float32"
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    # Only float16 needs a scaler: its small gradients would become zero. Disabled, it does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    if world > 1 and not dist.is_initialized():
        # A group that torchrun restarted must not find the addresses of the one before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store, *_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    # One rank speaks for all. Each line would appear once per process otherwise.
    log = say if rank == 0 else lambda *_: None
    hardware = f"{device}, {dtype}"
    if device.type == "cuda" and fast_bf16:
        hardware += ", TF32"
    if world > 1:
        hardware += f", {world} processes"
    log(hardware)
    # The weights start from this seed. Each step of the training has a seed of its own.
    torch.manual_seed(cfg.seed)
    # The marked lines end here.

    # --- data -----------------------------------------------------------------------------
    if cfg.loop == "test_mlp":
        data, meta = test_table(cfg.seed, cfg.task)
    else:
        names = ("events", "limit", "labels", "features", "phi", "energy_unit", "seed")
        data, meta = load_events(cfg.data, **{name: getattr(cfg, name) for name in names})
    for split, columns in data.items():  # small enough to stay on the device
        data[split] = {name: column.to(device) for name, column in columns.items()}
    sizes = ", ".join(f"{len(columns['x'])} {split}" for split, columns in data.items())
    dropped = f", dropped: {meta['dropped']}" if meta["dropped"] else ""
    log(f"{meta['source']}: {sizes} events{dropped}")
    for note in meta.pop("notes"):
        log(note)
    rows_hash = meta.pop("rows_hash", "")
    if cfg.loop != "test_mlp":
        cfg = replace(cfg, labels=tuple(meta["labels"]), features=tuple(meta["features"]))
    events = len(data["train"]["x"])
    batch_size = min(cfg.batch_size, math.ceil(events / (cfg.accumulate * world)))
    if batch_size < cfg.batch_size:
        log(f"batch_size cut from {cfg.batch_size} to {batch_size}: {events} train events")
        cfg = replace(cfg, batch_size=batch_size)
    # The last step of an epoch is filled up with events of its start.
    steps_per_epoch = math.ceil(events / (cfg.batch_size * cfg.accumulate * world))
    # The rate follows from `steps` alone. A run that stops early and goes on takes the same steps.
    steps = cfg.steps or cfg.epochs * steps_per_epoch
    epochs = math.ceil(steps / steps_per_epoch)  # with --steps, the last one may be shorter
    last_step = min(steps, cfg.max_steps or steps)  # where this command ends
    warmup = min(cfg.warmup, 0.1 * steps)
    if warmup < cfg.warmup:
        log(f"warmup cut from {cfg.warmup:g} to {warmup:g} steps, a tenth of the schedule")

    # --- model and optimizer --------------------------------------------------------------
    settings = dict(adv_weight=0.0, adv_start=0.0) | asdict(cfg) | meta
    for name in cosmetic_names(cfg):  # no model depends on these
        del settings[name]
    settings["denoise"] = cfg.denoise
    settings["discriminator"] = cfg.discriminator
    settings["ema_decay"] = cfg.codebook_decay or decay_for(steps)
    settings["revive"] = max(0, cfg.revive or revive_for(steps))

    def build(network, *components):
        """Return a module of the class `network`, and its arguments and those of its components."""
        arguments = {}
        for needs in (network, *components):
            arguments |= named(needs, settings)
        try:
            return network(**arguments).to(device), arguments
        except ValueError as e:
            remedy = f"fix: a field in {type(cfg).__name__}, which is a flag too"
            raise UsageError(f"{e}\n{remedy}") from e

    # The order of these modules decides which random numbers each of them starts from.
    if cfg.loop == "test_mlp":
        raw_model, model_args = build(Regressor)
    else:
        components = [part(ENCODERS, cfg.encoder), part(DECODERS, cfg.decoder)]
        components.append(part(LATENT_SPACES, cfg.latent_space))
        raw_model, model_args = build(AutoEncoder, *components)
    noises = None  # adds noise to features, which the decoder removes
    if cfg.denoise:
        noises, _ = build(NoiseSchedule)
    judges = None  # a discriminator of events, a critic of the latents of encoder gan, or both
    if cfg.discriminator or (cfg.loop != "test_mlp" and cfg.encoder == "gan"):
        judges, _ = build(Judges)
    groups = [dict(peak=cfg.lr, weight_decay=cfg.weight_decay, params=list(raw_model.parameters()))]
    if judges:
        # Their target moves with the model, so the mean of their gradients must forget sooner.
        groups.append(
            dict(
                peak=cfg.d_lr,
                weight_decay=0,
                betas=(0.5, 0.9),
                params=list(judges.parameters()),
            )
        )
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, fused=device.type in ("cpu", "cuda"))
    # One dict both saves and loads, so that no part of a run is saved and then forgotten.
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)
    if judges:
        parts["judges"] = judges
    # The loss is the sum of these means, as far as a loop has them. A loss NAME that is not among
    # them has the weight cfg.NAME_weight.
    loss_weights = dict(rec_tokens=1, eps_loss=1, miss=1, commit=1)
    loss_weights |= dict(rec_types=cfg.type_weight, rec_globals=cfg.globals_beta)

    # --- resume ---------------------------------------------------------------------------
    state = RunState(run_id=uuid.uuid4().hex)
    kind = f"ae:{cfg.loop}"
    folder = Path(distributed.gather(run_folder(cfg))[0])  # one clock names it for all ranks
    best_file = folder / "best_val.pt"
    rolling_file = folder / "last.pt"
    link = folder / "model.pt"  # to the best file
    writes = rank == 0 and cfg.save_artifacts
    # A second run in this folder would overwrite the files of the first.
    if writes:
        files.lock_run(folder, "ae", folder)
    # A file that --resume names is taken as it is. Otherwise the newest good one of the folder is.
    resume = cfg.resume if Path(cfg.resume).is_file() else "auto"
    candidates = [rolling_file, best_file, link]
    resumed_from, saved = checkpoint.find_checkpoint(resume, cfg.fresh, candidates, kind)
    # A resume compares this with its own and names each difference that ends exactness.
    header = dict(
        kind=kind,
        format=1,
        tokenizer="events",
        tokenizer_hash="",
        data_hash=meta["data_hash"],
        meta=meta,
        world_size=world,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        torch=str(torch.__version__),
        config=asdict(cfg),
        model_args=model_args,
    )
    if saved:
        rename_old_flags(saved["config"])
        if saved["data_hash"] == rows_hash:
            saved["data_hash"] = meta["data_hash"]  # older files have that of the rows
        # The codebook's rates follow from the steps of the first start, in a longer run too.
        keep_rates(raw_model, model_args, saved["model_args"], cfg)
        same_data = "data, labels, limit and seed"
        checkpoint.load_parts(parts, saved, resumed_from, header, same_data=same_data)
        state = RunState(**{name: saved[name] for name in vars(state)})
        before = saved.get("steps_per_epoch")  # older files have none, and no schedule but epochs
        before = before or saved["steps"] // saved["config"]["epochs"]
        if before != steps_per_epoch:
            # An epoch has another number of steps now, so the one under way begins again.
            state.step = state.epoch * steps_per_epoch
            state.sums = {}
            state.epoch_seconds = 0.0
        if state.step < steps:
            # A shorter --steps may have ended within an epoch. That epoch now goes on.
            state.epoch = min(state.epoch, state.step // steps_per_epoch)
            histories = state.histories.items()
            state.histories = {name: values[: state.epoch] for name, values in histories}
        log(checkpoint.resume_notice(resumed_from, saved, header, cosmetic_names(cfg)))
        del saved
    elif raw_model.latent_space == "vq":
        # They are drawn in an order that no epoch has: that of the number of all epochs.
        start_codebook(raw_model, data["train"], replace(cfg, epochs=epochs))

    def results(stopped=0):
        """Return what main returns."""
        final = (state.histories.get("val_loss") or [math.nan])[-1]
        run_dir = str(folder) if cfg.save_artifacts else ""
        more = dict(best_epoch=state.best_epoch + 1, final_val_loss=final)  # counted from 1, as it is printed
        return asdict(state) | more | dict(run_dir=run_dir, stopped=int(stopped))

    # The same command, started again after its end, is no error.
    validated = state.epoch >= state.step // steps_per_epoch
    at_budget = last_step <= state.step < steps and validated
    if at_budget or (state.tested >= epochs and state.step >= steps):
        after = f"at step {state.step}"
        if not at_budget:
            after = f"after {state.epoch} epochs, test loss {state.test_loss:.4f}"
        limits = []
        if state.step >= steps:
            limits.append(f"steps={2 * state.step}" if cfg.steps else f"epochs={2 * max(cfg.epochs, state.epoch)}")
        if 0 < cfg.max_steps <= state.step:
            limits.append(f"max_steps={2 * state.step}")
        names = " and ".join(limit.partition("=")[0] + "=" for limit in limits)
        further = f"a larger {names} goes on\nnext: {' '.join(limits)}"
        log(f"{folder}: finished {after}; {further}")
        distributed.close()
        return results()

    # Checkpoints hold raw_model: both wrappers prefix the names of the weights.
    model = torch.compile(raw_model) if cfg.compile else raw_model
    if world > 1:
        model = DistributedDataParallel(model)
    saver = checkpoint.Saver()

    def payload():
        """Return all that a checkpoint holds."""
        tensors = {name: part.state_dict() for name, part in parts.items()}
        return header | asdict(state) | tensors

    def save(path, content, must=True):
        """Write a checkpoint, if this process writes any."""
        if writes:
            saver(path, content, must)
        if writes and path == best_file:
            files.symlink_to(link, best_file.name)

    # The recorder keeps facts and figures. It fills state.histories and counts state.epoch.
    _, figures = LOOPS[cfg.loop]
    facts = folder if writes else None
    record = Recorder(facts, cfg, figures, state, epochs, device, new=not resumed_from)

    # --- schedule, evaluation, stop -------------------------------------------------------
    def epochs_at(step):
        """Return how many epochs have ended by a step; the end of the schedule ends one."""
        return epochs if step >= steps else step // steps_per_epoch

    def lr_at(step, peak):
        """Return the rate of a step: linear warmup to the peak, then a cosine to the floor."""
        if step < warmup:
            return peak * ((step + 1) / (warmup + 1))
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        middle = (1 + cfg.min_lr_ratio) / 2
        swing = (1 - cfg.min_lr_ratio) / 2
        return peak * (middle + swing * math.cos(math.pi * share))

    def compute_loss(network, batch):
        """Run a batch: return the output, its losses and other metrics, both {name: (sum, count)}.

        Losses are trained with their weights. Metrics are only reported.
        """
        metrics = {}
        inputs = [batch["x"]]
        if cfg.loop != "test_mlp":
            inputs += [batch["ids"], batch["ids"] > 0, batch["globals"]]
        if cfg.loop == "test_mlp":
            output = network(*inputs)
            losses = regression_sums(output, batch["y"], cfg.task)
        elif noises:
            # The target, and what the decoder also reads.
            velocity, noisy = noises.corrupt(batch["x"])
            output = network(*inputs, **noisy)
            losses = loss_sums(output, velocity, batch["ids"], batch["globals"], cfg.level)
            metrics = noises.by_quarter(output["x_hat"], velocity, batch["ids"] > 0, noisy["t"])
            losses["eps_loss"] = losses.pop("rec_tokens")
        else:
            output = network(*inputs)
            losses = loss_sums(output, batch["x"], batch["ids"], batch["globals"], cfg.level)
        metrics |= {name: losses.pop(name) for name in REPORTED if name in losses}
        for name in losses:
            weight = loss_weights.setdefault(name, getattr(cfg, f"{name}_weight", None))
            if weight is None:
                remedy = f"fix: a field {name}_weight: float = 1.0 in {type(cfg).__name__}"
                raise UsageError(f"the loss {name} has no weight\n{remedy}")
        return output, losses, metrics

    def total(metrics):
        """Return the loss: the weighted sum of those metrics that are part of it."""
        return sum(w * metrics[name] for name, w in loss_weights.items() if name in metrics)

    @torch.no_grad()
    def evaluate(split):
        """Score the same events with the same noise every time.

        Returns a row of means and the count of each code; None, None if a signal came meanwhile.
        """
        columns = data[split]
        sums = {}
        # Each rank scores some of the batches, so the model is called without DDP.
        code_counts = torch.zeros(cfg.codebook_size, dtype=torch.long)
        raw_model.eval()
        for start in range(rank * EVAL_BATCH, len(columns["x"]), world * EVAL_BATCH):
            if stop:
                break
            torch.manual_seed(hash((cfg.seed, start)))
            with autocast:
                batch = take(columns, slice(start, start + EVAL_BATCH))
                output, losses, metrics = compute_loss(raw_model, batch)
            add(sums, losses | metrics)
            if raw_model.latent_space == "vq":
                used = output["indices"][output["indices"] >= 0]  # -1 in empty slots
                code_counts += torch.bincount(used, minlength=len(code_counts)).cpu()
        if noises and not stop:
            batch = take(columns, slice(DENOISED))
            local_events = slice(rank, None, world)
            batch_sums = ddim_errors(raw_model, noises, batch, cfg.ddim_steps, cfg.seed, local_events)
            add(sums, batch_sums)
        raw_model.train()
        # A signal may have reached some ranks only. All of them drop the evaluation then.
        shards = distributed.gather((bool(stop), sums, code_counts))
        if any(stopped for stopped, _, _ in shards):
            return None, None
        sums = {}
        for _, shard_sums, _ in shards:
            add(sums, shard_sums)
        code_counts = sum(counts for _, _, counts in shards)
        row = means(sums)
        row["loss"] = total(row)
        if code_counts.any():
            row["usage"], row["perplexity"] = usage_and_perplexity(code_counts)
        return row, code_counts.tolist()

    # --- train ----------------------------------------------------------------------------
    order_of = -1  # epoch that `order` and `train` are of
    shown = {}  # newest figures, for the progress bar
    best_weights = None  # of the best epoch of this process
    finished = state.step >= last_step
    stop_signal = 0
    save_due = False
    # A run that was stopped while it evaluated begins with that evaluation.
    epoch_ended = state.epoch < epochs_at(state.step)
    show = rank == 0 and sys.stderr.isatty()
    # The first signal only sets `stop`: the step that is under way is finished and saved.
    with Stop() as stop, Progress(last_step, state.step, show=show) as progress, record:
        start = saved_at = time.monotonic()
        record("on_resume" if resumed_from else "on_start")
        while True:
            if not epoch_ended and not finished:
                # 1. Data: the events of this step, by micro-batch and rank.
                step_start = time.monotonic()
                epoch, number = divmod(state.step, steps_per_epoch)
                if order_of != epoch:
                    order_of = epoch
                    shape = (steps_per_epoch, cfg.accumulate, world, cfg.batch_size)
                    order = epoch_order(cfg.seed, epoch, events, shape)
                    train = data["train"]
                    if cfg.symmetries:
                        train = rotate_and_mirror(train, meta, cfg.seed, epoch)
                # A mean is over all micro-batches and ranks, so sums are divided by these counts.
                counts = denominators(take(train, order[number].flatten()), cfg.level)

                # 2. Forward and backward.
                sums = {}
                for m in range(cfg.accumulate):
                    # Dropout and noise follow from seed, step, micro-batch and rank.
                    torch.manual_seed(hash((cfg.seed, state.step, m * world + rank)))
                    if world > 1:  # gradients are averaged once a step
                        model.require_backward_grad_sync = m == cfg.accumulate - 1
                    batch = take(train, order[number, m, rank])
                    with autocast:
                        output, losses, metrics = compute_loss(model, batch)
                        # A loss of your own has no such count: the mean of its means is taken.
                        shares = {
                            name: value / counts.get(name, count * cfg.accumulate * world)
                            for name, (value, count) in losses.items()
                        }
                        loss = total(shares)
                        if judges:
                            # They return their own loss and what they add to the model's. Neither
                            # has a gradient in the weights of the other side.
                            share = state.step / steps
                            verdict = judges(batch, output, loss, raw_model.last_weight(), share)
                            judges_loss, penalty, judges_sums = verdict
                            loss = loss + (judges_loss + penalty) / (cfg.accumulate * world)
                            metrics |= judges_sums
                    # The mean over ranks is taken, so the sum needs the factor `world`.
                    scaler.scale(loss * world).backward()
                    add(sums, losses | metrics)
                if judges:  # before unscale_: all ranks must see an overflow of one of them
                    distributed.average_gradients(judges.parameters())

                # 3. Step. All ranks take or skip it together.
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(state.step, group["peak"])
                # The limit is meant for true gradients, so the scale goes first. Model and judges
                # are clipped apart, or the larger gradient would shrink the other one.
                scaler.unscale_(optimizer)
                max_norm = cfg.clip or math.inf
                clip = torch.nn.utils.clip_grad_norm_
                norms = [clip(group["params"], max_norm) for group in optimizer.param_groups]
                now = time.monotonic()
                save_due = 0 < 60 * cfg.save_minutes < now - saved_at
                finished = state.step + 1 >= last_step or 0 < cfg.max_seconds < now - start
                # A rank that left or skipped alone would leave the others waiting for it.
                numbers = [number for pair in sums.values() for number in pair]
                numbers = distributed.sum_over_ranks(*numbers)
                bad = not math.isfinite(sum(norms) + sum(numbers))
                bad, stop_signal, save_due, finished = distributed.max_over_ranks(
                    bad, int(stop.signal), save_due, finished
                )
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                    pairs = zip(numbers[::2], numbers[1::2], strict=True)
                    add(state.sums, dict(zip(sums, pairs, strict=True)))
                    add(state.sums, dict(grad_norm=(norms[0], 1)))
                elif scaler.is_enabled():  # an overflow of some rank: skip, and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                # A skipped step counts too: its events and its rate don't come again.
                state.step += 1
                if bad:
                    state.skipped += 1
                    state.skipped_in_row += scaler.get_scale() <= 1  # else fp16 may lower its scale
                else:
                    state.skipped_in_row = 0
                if state.skipped_in_row == BAD_STEPS:
                    raise DataError(
                        f"{BAD_STEPS} steps in a row were not finite, up to step {state.step}; "
                        f"last good file: {saver.last}\n"
                        f"try: --lr {cfg.lr / 10:g}"
                    )
                state.epoch_seconds += now - step_start
                epoch_ended = state.epoch < epochs_at(state.step)

                # 4. Log. Rows of metrics are written per epoch.
                progress(epoch=state.step // steps_per_epoch, **shown)

            # 5. Evaluate.
            val_row = None
            improved = False
            if epoch_ended and not stop_signal:
                before = time.monotonic()
                val_row, code_counts = evaluate("val")
                (stop_signal,) = distributed.max_over_ranks(0 if val_row else int(stop.signal))
            if val_row:
                epoch_ended = False
                # diffusion_ae is judged by the features that it makes from noise, not by its loss.
                criterion = val_row.get("ddim_mse", val_row["loss"])
                counting = state.skipped_in_row and not finished  # towards BAD_STEPS, or a recovery
                limit = DIVERGED * max(1, *loss_weights.values())
                if not val_row["loss"] < limit and not counting:  # NaN is not below it
                    kept = f"epoch {state.best_epoch + 1} is in {best_file}"
                    kept = kept if state.best_epoch >= 0 else "no epoch was better"
                    raise DataError(
                        f"diverged: val_loss {val_row['loss']:.3g} in epoch {state.epoch + 1}; {kept}\n"
                        f"try: lr={cfg.lr / 10:g}"
                    )
                train_row = means(state.sums)
                train_row["lr"] = optimizer.param_groups[0]["lr"]
                train_row["skipped_steps"] = state.skipped
                train_row["loss"] = total(train_row) if state.sums else math.nan
                val_seconds = time.monotonic() - before
                shown = record.epoch(train_row, val_row, code_counts, events, val_seconds)
                texts = " | ".join(f"{name} {text}" for name, text in shown.items())
                log(f"epoch {state.epoch}/{epochs} | {texts}")
                state.sums = {}
                state.epoch_seconds = 0.0
                save_due = True
                improved = criterion < state.best_val_loss
            if improved:
                state.best_val_loss = criterion
                state.best_epoch = state.epoch - 1
                # A copy, since a run with --no-save_artifacts has no file to take them from.
                weights = raw_model.state_dict()
                best_weights = {name: weight.clone() for name, weight in weights.items()}

            # 6. Save. The best file comes first: a run must not go on without it.
            if improved:
                save(best_file, payload())
            leaving = bool(finished or stop_signal)
            # After a step that was not finite, the last good file stays.
            if leaving or (save_due and not state.skipped_in_row):
                save(rolling_file, payload(), must=leaving)
                saved_at = time.monotonic()

            # 7. Leave.
            if leaving:
                break

        # After the last epoch the best weights are tested.
        if state.epoch >= epochs and not stop_signal:
            record("on_train_end", epoch=state.epoch - 1, histories=state.histories)
            candidates = [best_file, rolling_file] if cfg.save_artifacts else []
            # The best epoch may be one of an earlier process.
            _, saved = checkpoint.find_checkpoint("auto", False, candidates, kind)
            saved = saved or {}
            best_weights = best_weights or saved.get("model_state", raw_model.state_dict())
            raw_model.load_state_dict(best_weights)
            test_row, code_counts = evaluate("test")
            (stop_signal,) = distributed.max_over_ranks(0 if test_row else int(stop.signal))
            if test_row:
                state.test_loss = test_row["loss"]
                state.tested = state.epoch
                drawn = reconstruct_rows(raw_model, noises, data["test"], meta, cfg)
                record.test(test_row, code_counts, drawn)
            if test_row and writes:
                # The best file also gets what generate.py draws new latents from. The rolling
                # file keeps the last weights and learns of the test.
                save(best_file, saved | latent_statistics(raw_model, data["train"]))
                saver(rolling_file, checkpoint.load_checkpoint(rolling_file, kind) | asdict(state))
        if stop_signal:
            record("on_interrupt", epoch=state.epoch)

    # --- summary --------------------------------------------------------------------------
    log(record.summary())
    distributed.close()
    return results(stop_signal)


if __name__ == "__main__":
    launch(main, cfg)
