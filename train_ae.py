"""Train an autoencoder of particle events: an encoder, a latent space and a decoder, under one of four loops.

    python train_ae.py                                                          # synthetic events, a minute or so
    python train_ae.py phase1.trainer.epochs=20 phase1/latent_space=vq          # or --epochs 20 --latent-space vq
    python train_ae.py --loop gan_ae                                            # or diffusion_ae, test_mlp
    python train_ae.py --multirun latent_space=none,linear,vq epochs=10,20      # a sweep of six jobs
    torchrun --nproc-per-node 2 train_ae.py env=cluster                         # several GPUs

KEY=VALUE is --key value; KEY may begin with phase1.trainer., phase1/, phase1., data. or logging. Writes
outputs/runs/run_<time>_<name>/ with best_val.pt, last.pt, facts and figures, and goes on there when it is started again
with out= that folder. In a notebook: paste this file into a cell, then main(AeConfig(epochs=2)).
"""

from dataclasses import dataclass
from typing import Literal

from data_utils.config import from_cli, launch
from data_utils.overrides import Overrides

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
    weight_decay: float = 0.0  # AdamW decay, on matrices only
    warmup: float = 100.0  # steps of linear warmup, at most a tenth of all steps; a cosine to a tenth of lr follows
    clip: float = 1.0  # largest gradient norm; 0 = off
    # files, figures
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
    adv_weight: float = 0.8  # weight of the discriminator's verdict, in units of the reconstruction's gradient
    adv_start: float = 0.2  # share of the steps after which that counts


@dataclass
class DiffusionAeConfig(AeConfig):
    loop: Literal["ae", "gan_ae", "diffusion_ae", "test_mlp"] = "diffusion_ae"  # how it is trained
    encoder: Part = "gnn"  # reads an event
    decoder: Part = "diffusion"  # writes it
    latent_space: Literal["none", "linear", "vq"] = "none"  # between them
    level: Literal["token", "event"] = "event"  # one latent a particle, or one an event
    latent_dim: int = 16  # width D of a latent
    diffusion_steps: int = 1000  # noise levels
    noise_schedule: Literal["cosine", "linear"] = "cosine"  # how the noise grows; linear: beta 1e-4 to 0.02
    ddim_steps: int = 20  # denoising steps when sampling


@dataclass
class TestMlpConfig(AeConfig):
    loop: Literal["ae", "gan_ae", "diffusion_ae", "test_mlp"] = "test_mlp"  # how it is trained
    task: Literal["regression", "binary"] = "regression"  # what the table asks for


SHARED = {"losses", "metrics", "latency"}  # families of figures
EVENTS = SHARED | {"codebook", "recon", "adversarial"}  # the last with encoder gan
LOOPS = {
    "ae": (AeConfig, EVENTS),
    "gan_ae": (GanAeConfig, EVENTS),
    "diffusion_ae": (DiffusionAeConfig, EVENTS | {"diffusion"}),
    "test_mlp": (TestMlpConfig, SHARED),
}
OVERRIDES = Overrides(
    prefixes=("phase1.trainer.", "phase1/", "phase1.", "data.", "logging."),
    aliases={"phase1.encoder.hidden": "hidden", "phase1.decoder.hidden": "hidden", "data.path": "data",
             "phase1.latent_space.codebook_size": "codebook_size", "hydra.job.name": "name"}
    | {f"logging.families.{f}.enabled": f"plot_{f}" for f in sorted(EVENTS | {"diffusion"})},
    ignored=("hydra=experiment",), folder="configs/ae", bundles=dict(env="env", logging=""),
    snapshot=".hydra/config.yaml",
)  # fmt: skip
Config = AeConfig

if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli({name: cls for name, (cls, _) in LOOPS.items()}, __doc__, by="loop", overrides=OVERRIDES)
    if cfg and cfg.multirun:  # each job is a process of its own; this one needs no torch
        from data_utils.sweep import sweep

        launch(sweep, cfg)


def main(cfg):
    print(cfg)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
