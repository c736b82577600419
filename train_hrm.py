"""Train a hierarchical reasoning model, which thinks about a prompt again and again and answers.

    python train_hrm.py --config configs/hrm/addition.yaml --run_name addition     # half a minute
    python train_hrm.py --dataset sudoku --run_name sudoku9                        # minutes
    python train_hrm.py --dataset data/prepared --run_name text --save_best_model  # prepared rows
    python train_hrm.py --dry_run                                                  # a random batch
    torchrun --nproc-per-node 2 train_hrm.py --dataset sudoku --run_name sudoku9   # several GPUs

KEY=VALUE is --key value. --fsdp lets the processes share the weights. prepare_data.py language
makes the prepared rows, and prepare_data.py puzzles reads published Sudokus and mazes.

Writes runs/<run_name>/checkpoints/{step_N,final}.pt with a .yaml each, best-model/, metrics.jsonl
and loss.png. The same command goes on from the newest checkpoint there. In a notebook, paste this
file into a cell, then call main(SyntheticConfig(steps=100)).

B batch, S prompt, T answer, C width, V vocabulary. A segment is one optimizer step on a batch, and
the next goes on from its states.
"""

import inspect
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from data_utils.config import (
    at_least,
    below_one,
    check_name,
    complete,
    cosmetic,
    cosmetic_names,
    flag,
    from_cli,
)
from data_utils.errors import DataError, UsageError
from data_utils.launch import check_torchrun, ends_cleanly, launch
from data_utils.overrides import Overrides
from data_utils.reasoning.nested_config import flatten


# A `cosmetic` field may change on a resume, and the run still ends with the same bits. Names in
# `also` are further names of the flag. Of a field and the one that it is `instead` of, the one that
# is given resets the other to 0.
@dataclass
class HrmConfig:
    # data
    dataset: str = cosmetic("")  # synthetic, sudoku, or a folder of prepare_data.py
    dry_run: Literal["auto", "1", "0"] = cosmetic("auto", bare="1")  # 1: one random batch, no files
    max_seq_len: int = 256  # ids on each side, prompt and answer; longer rows are cut
    dataset_workers: int = cosmetic(0, also=("num_workers", "workers"))  # processes that read JSONL
    data_seed: int = 1  # of built-in data and its split
    reveal: float = 0.1  # sudoku: share of training puzzles with some of the blanks filled in
    skip_bad_lines: bool = cosmetic(False)  # count and skip malformed lines instead of stopping
    allow_leak: bool = False  # keep rows whose prompt is their answer
    # model
    d_model: int = 256  # width C
    n_heads: int = 4  # attention heads
    encoder_layers: int = 2  # blocks that read the prompt
    decoder_layers: int = 4  # blocks that write the answer; 0 = a head that fills in the prompt
    core: Literal["recursive", "plain", "none"] = "recursive"  # blocks used again, once, or none
    core_layers: int = 2  # blocks of a module of the core
    share: bool = True  # the fast and the slow module are one
    h_cycles: int = 2  # slow updates in a segment
    l_steps: int = 2  # fast updates for each slow one
    segments: int = 1  # optimizer steps on a batch, each from the states of the one before
    grad: Literal["last_cycle", "one_step", "bptt"] = "last_cycle"  # how far gradients go back
    ffn_dim: int = 0  # inner width of the core; 0 = twice d_model
    positions: Literal["rope", "ends", "grid"] = "rope"  # rotary, counted from both ends, or a grid
    relation_bias: bool = False  # cells of a grid know who shares their row, column or box
    halting: bool = False  # learn when an answer is right, and stop there
    halting_weight: float = 0.5  # weight of the halting loss
    # run
    run_name: str = cosmetic("")  # files go to runs/<run_name>/
    save_dir: str = cosmetic("", also=("out",))  # folder of all files; a --run_name overrides it
    resume: str = cosmetic("auto")  # auto: go on if there is anything; or a file
    fresh: bool = cosmetic(False)  # start over; old files are renamed to *.bak, *.bak2, ...
    init_from: str = cosmetic("")  # fine-tune: checkpoint whose weights a new run begins with
    seed: int = 0  # of weights and order
    save_best_model: bool = cosmetic(False)  # keep the best weights in runs/<run_name>/best-model
    checkpoint_limit: int = cosmetic(0, also=("keep",))  # newest step files kept; 0 = all
    save_minutes: float = cosmetic(10.0)  # minutes between rolling saves; 0 = only when stopped
    # optimization
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"  # 8bit: in a quarter of the memory
    muon: float = 10.0  # rate of the hidden matrices with muon, in units of learning_rate
    learning_rate: float = flag(1e-3, also=("lr",))  # peak learning rate
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    lr_min_ratio: float = flag(0.05, also=("min_lr_ratio",))  # floor as a share of the peak
    warmup_steps: int = 0  # steps of linear warmup; at most all steps of the schedule
    weight_decay: float = 0.1  # AdamW decay, on matrices only
    beta1: float = 0.9  # AdamW decay of the mean gradient
    beta2: float = 0.95  # AdamW decay of the mean squared gradient
    ema: float = 0.99  # decay of the averaged weights that are evaluated; 0 = off
    batch_size: int = 32  # rows per step and process
    grad_clip: float = flag(0.0, also=("clip", "gradient_clip"))  # largest gradient norm; 0 = off
    steps: int = 2000  # length of the schedule in optimizer steps; 0 = as epochs says
    epochs: int = flag(  # passes over the rows; of no effect beside a given steps
        0, also=("max_epochs",), instead="steps"
    )
    max_steps: int = cosmetic(0)  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = cosmetic(0.0)  # stop after so many seconds; 0 = off
    # evaluation, hardware
    val_every: int = cosmetic(  # steps between evaluations; 0 = at the end only
        0, also=("eval_interval", "validate_interval")
    )
    eval_batch_size: int = cosmetic(0)  # rows per evaluation batch; 0 = as training
    eval_rows: int = cosmetic(0)  # validation rows used; 0 = all
    eval_segments: int = cosmetic(0)  # most segments with halting; 0 = four times segments
    log_steps: int = cosmetic(10, also=("log_interval",))  # steps per line and row of metrics
    device: str = cosmetic("auto")  # auto, cpu, cuda, cuda:1, mps
    fsdp: bool = cosmetic(False)  # processes share the weights and the optimizer's state (FSDP2)
    mixed_precision: Literal["none", "bf16", "fp16", "auto"] = "none"  # auto: bf16 where it is fast
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: by mixed_precision
    compile: bool = cosmetic(False)  # torch.compile of the core: a minute to start, then faster

    # --help shows these, by purpose; --help all shows every flag.
    common = dict(
        data="dataset max_seq_len",
        model="d_model core segments halting",
        training="learning_rate batch_size steps optimizer val_every",
        run="run_name save_best_model fresh device",
    )
    # Flags of other scripts, and why they are not here.
    absent = dict(grad_accum_steps="each segment is an optimizer step of its own\nfix: a larger --batch_size")

    @property
    def remedy(self):
        """Return flags that need less memory."""
        return f"--batch_size {max(1, self.batch_size // 2)}"


@dataclass
class SyntheticConfig(HrmConfig):
    dataset: str = cosmetic("synthetic")  # synthetic, sudoku, or a folder of prepare_data.py
    batch_size: int = 256  # rows per step and process
    steps: int = 1000  # length of the schedule in optimizer steps; 0 = as epochs says
    max_seq_len: int = 32  # ids on each side, prompt and answer; longer rows are cut
    d_model: int = 64  # width C
    n_heads: int = 2  # attention heads
    encoder_layers: int = 1  # blocks that read the prompt
    decoder_layers: int = 2  # blocks that write the answer; 0 = a head that fills in the prompt
    core_layers: int = 1  # blocks of a module of the core
    h_cycles: int = 1  # slow updates in a segment
    l_steps: int = 1  # fast updates for each slow one
    positions: Literal["rope", "ends", "grid"] = "ends"  # rotary, counted from both ends, or a grid


@dataclass
class SudokuConfig(HrmConfig):
    dataset: str = cosmetic("sudoku")  # synthetic, sudoku, or a folder of prepare_data.py
    steps: int = 2300  # length of the schedule in optimizer steps; 0 = as epochs says
    max_seq_len: int = 81  # cells
    d_model: int = 128  # width C
    encoder_layers: int = 0  # blocks that read the prompt
    decoder_layers: int = 0  # blocks that write the answer; 0 = a head that fills in the prompt
    segments: int = 4  # optimizer steps on a batch, each from the states of the one before
    positions: Literal["rope", "ends", "grid"] = "grid"  # rotary, counted from both ends, or a grid
    relation_bias: bool = True  # cells of a grid know who shares their row, column or box
    halting: bool = True  # learn when an answer is right, and stop there
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "muon"  # 8bit: in a quarter of the memory
    warmup_steps: int = 100  # steps of linear warmup; at most all steps of the schedule
    grad_clip: float = flag(1.0, also=("clip", "gradient_clip"))  # largest gradient norm; 0 = off
    mixed_precision: Literal["none", "bf16", "fp16", "auto"] = "auto"  # auto: bf16 where it is fast


@dataclass
class MazeConfig(SudokuConfig):
    max_seq_len: int = 900  # cells
    positions: Literal["rope", "ends", "grid"] = "rope"  # rotary, counted from both ends, or a grid
    relation_bias: bool = False  # cells of a grid know who shares their row, column or box


def variant(dataset):
    """Return the class of a data set; meta.json of a prepared folder tells puzzles from rows."""
    classes = {"synthetic": SyntheticConfig, "sudoku": SudokuConfig, "": HrmConfig}
    if dataset in classes:
        return classes[dataset]
    try:
        meta = json.loads(Path(dataset, "meta.json").read_text(encoding="utf-8"))
        return dict(sudoku=SudokuConfig, maze=MazeConfig).get(meta["kind"], HrmConfig)
    except (OSError, ValueError, KeyError, TypeError):
        return HrmConfig


Config = HrmConfig


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for."""
    return from_cli(variant, __doc__, argv, by="dataset", flatten=flatten, overrides=Overrides())


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = parse()

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data_utils import checkpoint, distributed, files
from data_utils.metrics import append_row, draw_losses, start_rows
from data_utils.progress import Progress, peak_mb, say
from data_utils.reasoning.dataset import open_dataset, random_batch
from data_utils.reasoning.halting import summarize
from data_utils.stop import Stop
from models.hrm import HRM
from models.optim.adamw8bit import AdamW8bit
from models.optim.ema import Average
from models.optim.muon import Muon

BAD_STEPS = 10  # steps in a row without a finite loss and gradient that end a run


@dataclass
class RunState:
    """Where the run is. All of it is saved, and a resumed run goes on from it."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # step of the last whole evaluation
    best_val_loss: float = math.inf  # lowest validation loss
    best_step: int = 0  # step that has it
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_row: int = 0  # those since the last good step
    halt_threshold: float = 0.0  # halting logit that stops an answer, of the last evaluation


def group_of(name, parameter):
    """Return the parameter's group in the optimizer: hidden (matrices), table, or vector.

    Tables of ids and places decay like the matrices: without that, held-out sums come much later.
    """
    if parameter.ndim != 2:
        return "vector"
    return "hidden" if name.startswith(("encoder.", "core.", "decoder.")) else "table"


def check(cfg):
    """Raise UsageError for a value that no run can have."""
    if cfg.dry_run == "0" and not cfg.dataset:
        raise UsageError("--dry_run 0 needs a --dataset: synthetic, sudoku, or a folder of rows")
    at_least(cfg, 1, "d_model", "n_heads", "h_cycles", "l_steps", "segments", "max_seq_len")
    at_least(cfg, 1, "batch_size", "log_steps")
    at_least(cfg, 0, "encoder_layers", "decoder_layers", "core_layers", "ffn_dim", "warmup_steps")
    at_least(cfg, 0, "learning_rate", "seed", "checkpoint_limit", "save_minutes", "val_every")
    at_least(cfg, 0, "eval_batch_size", "eval_rows", "eval_segments", "lr_min_ratio", "muon")
    at_least(cfg, 0, "weight_decay", "ema", "max_steps", "max_seconds", "halting_weight", "reveal")
    if max(cfg.steps, cfg.epochs) < 1:
        raise UsageError(f"--steps {cfg.steps} --epochs {cfg.epochs}: one must be 1 or more")
    below_one(cfg, "beta1", "beta2")
    if cfg.d_model % (2 * cfg.n_heads):
        sizes = f"--d_model {cfg.d_model} over --n_heads {cfg.n_heads}"
        raise UsageError(f"{sizes}: the head dim must be whole and even")
    if cfg.segments > 1 and cfg.core != "recursive":
        raise UsageError(f"--segments {cfg.segments} needs --core recursive, it is {cfg.core}")
    if cfg.run_name:
        check_name(cfg, "run_name")


@ends_cleanly
def main(cfg):
    """Train as `cfg` says -> dict(step, best_val_loss, stopped: the signal that ended it, or 0)."""
    cfg = complete(cfg, variant, by="dataset")
    check(cfg)
    train = cfg.dry_run == "0" or (cfg.dry_run == "auto" and bool(cfg.dataset))
    precisions = dict(none="float32", bf16="bfloat16", fp16="float16", auto="bfloat16")
    dtype = precisions[cfg.mixed_precision] if cfg.dtype == "auto" else cfg.dtype
    requested_dtype = dtype

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
    # The guide promises CUDA for fp16. Another precision must not take its place unseen.
    if requested_dtype == "float16" and device.type != "cuda":
        typed = "--mixed_precision fp16" if cfg.dtype == "auto" else "--dtype float16"
        raise UsageError(f"{typed} needs CUDA\ntry: --dtype bfloat16")
    if cfg.fsdp and world == 1:
        raise UsageError(
            "--fsdp shares a model among processes, and this is the only one\n"
            f"try: torchrun --standalone --nproc-per-node 2 {shlex.join(sys.argv)}"
        )

    # --- data -----------------------------------------------------------------------------
    home = Path(cfg.save_dir or f"checkpoints/hrm/{Path(cfg.dataset).name}")  # of metrics, figure
    folder = home
    if cfg.run_name:
        home = Path("runs", cfg.run_name)
        folder = home / "checkpoints"
    vocab_size = 98  # of a dry run, which reads no data
    # A dry run reads no data: it needs the sizes of a batch alone.
    if train:
        data = open_dataset(
            cfg.dataset,
            max_seq_len=cfg.max_seq_len,
            data_seed=cfg.data_seed,
            reveal=cfg.reveal,
            say=log,
            rank=rank,
            workers=cfg.dataset_workers,
            skip_bad_lines=cfg.skip_bad_lines,
            allow_leak=cfg.allow_leak,
            cache_dir=folder,
        )
        vocab_size = data.meta["vocab_size"]
        n_val = min(cfg.eval_rows or data.rows("val"), data.rows("val"))
        if cfg.save_best_model and not cfg.run_name:
            raise UsageError("--save_best_model needs a --run_name")
        if cfg.save_best_model and not n_val:
            raise UsageError(f"--save_best_model: {cfg.dataset} has no validation rows\nfix: prepare it with more")
        # The last batch of an epoch is filled up with rows from the epoch's start, so that each
        # rank has as many rows in each batch.
        rows_per_batch = cfg.batch_size * world
        batches = math.ceil(data.rows("train") / rows_per_batch)  # per epoch
        local_rows = slice(rank * cfg.batch_size, (rank + 1) * cfg.batch_size)  # of a batch
        steps_per_epoch = batches * cfg.segments
        if cfg.steps > 0 and cfg.epochs > 0:  # as the guide has it
            log(f"--steps {cfg.steps} overrides --epochs {cfg.epochs}")

    def to_device(batch):
        """Return the tensors of a batch on the device."""
        return {name: ids.to(device) for name, ids in batch.items()}

    # --- model and optimizer --------------------------------------------------------------
    settings = asdict(cfg) | dict(vocab_size=vocab_size)
    model_args = {name: settings[name] for name in inspect.signature(HRM).parameters}
    # Models know no flags. Sizes that don't fit each other are the user's to mend.
    try:
        raw_model = HRM(**model_args)  # saved without _orig_mod. and module.
    except ValueError as e:
        raise UsageError(str(e)) from e
    raw_model.to(device)
    millions = sum(p.numel() for p in raw_model.parameters()) / 1e6
    # A dry run shows that the model fits and has gradients, before there are data.
    if not train:
        batch = to_device(random_batch(cfg.batch_size, cfg.max_seq_len, vocab_size))
        with autocast:
            loss, _, _ = raw_model(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), math.inf).item()
        figures = f"loss {loss.item():.4f}, gradient norm {norm:.3f}, {millions:.2f} M parameters"
        log(f"dry run: {figures}; --dataset trains")
        distributed.close()
        return dict(step=0, best_val_loss=math.inf, stopped=0)
    # Shards come before the optimizer, whose state then has their shapes.
    if cfg.fsdp:
        distributed.shard(raw_model, cfg.optimizer)
    trained = dict(raw_model.named_parameters())
    hidden = [p for name, p in trained.items() if group_of(name, p) == "hidden"]
    tables = [p for name, p in trained.items() if group_of(name, p) == "table"]
    vectors = [p for name, p in trained.items() if group_of(name, p) == "vector"]
    # Muon steps the group with `times` above 0, at so many times the rate. AdamW reads no `times`.
    groups = [
        dict(params=hidden, weight_decay=cfg.weight_decay, times=cfg.muon),
        dict(params=tables, weight_decay=cfg.weight_decay, times=0),
        dict(params=vectors, weight_decay=0, times=0),
    ]
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer == "muon":
        optimizer = Muon(groups, lr=cfg.learning_rate, betas=betas)
    elif cfg.optimizer == "adamw_8bit":
        optimizer = AdamW8bit(groups, lr=cfg.learning_rate, betas=betas, seed=cfg.seed)
    else:
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused)
    # The averaged weights are evaluated: those of a single step vary too much to be compared.
    average = Average(trained, cfg.ema)
    # One dict both saves and loads, so that no part of a run is saved and then forgotten.
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler, ema=average)

    # --- resume ---------------------------------------------------------------------------
    state = RunState()
    kind = "hrm"
    best_file = home / "best-model" / "best.pt"
    final_file = folder / "final.pt"  # where a run ended or was stopped
    metrics_file = home / "metrics.jsonl"
    snapshot_name = r"step_(\d+)\.pt"
    # A second run in this folder would overwrite the files of the first.
    if rank == 0:
        files.lock_run(folder, kind, folder, best_file.parent)
    snapshots = checkpoint.numbered_files(folder, snapshot_name)
    candidates = checkpoint.by_step(snapshots, final_file, kind)
    resumed_from, saved = checkpoint.find_checkpoint(
        cfg.resume,
        cfg.fresh,
        candidates,
        kind,
        cfg.init_from,
    )
    # The rate follows from `steps` alone. A run that stops early and goes on takes the same steps.
    steps = cfg.steps
    if steps <= 0:
        steps = checkpoint.schedule_steps(cfg.epochs, steps_per_epoch, saved)
    last_step = min(steps, cfg.max_steps or steps)  # where this command ends
    warmup = min(cfg.warmup_steps, steps)
    if warmup < cfg.warmup_steps:
        log(f"warmup cut from {cfg.warmup_steps} to {warmup} steps, the whole schedule")
    # A resume compares this with its own and names each difference that ends exactness.
    header = dict(
        kind=kind,
        format=1,
        dataset=cfg.dataset,
        tokenizer=data.tokenizer.name,
        tokenizer_hash=data.tokenizer.hash,
        tokenizer_json=data.tokenizer.json_text,  # so that the file is all that is needed to use it
        data_hash=data.hash,
        world_size=world,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        torch=str(torch.__version__),
        config=asdict(cfg),
        model_args=model_args,
        meta=data.meta,
    )
    carry = None  # states of the batch at hand after its newest segment, (B, S, C) each
    if saved:
        # The name of a folder may be that of an earlier run. Data sets share no run by accident.
        places = (saved["dataset"], cfg.dataset)
        remedy = f"--run_name {shlex.quote(f'{cfg.run_name or Path(cfg.dataset).name}2')}"
        checkpoint.check_same_data(resumed_from, saved, header, cfg.resume, places, remedy)
        checkpoint.load_parts(parts, saved, resumed_from, header)
        state = RunState(**{name: saved[name] for name in vars(state)})
        # The file has the states of all ranks of then. The ranks of now may share the rows anew.
        # With another batch size the states fit no batch, and the next segment begins without.
        states = [torch.cat(shards) for shards in zip(*saved["carry"], strict=True)]
        if states and len(states[0]) == rows_per_batch:
            carry = tuple(z[local_rows].to(device) for z in states)
        # A rewind: the next start must not jump back to the branch that is left here.
        if rank == 0:
            checkpoint.set_aside_later(candidates, state.step)
        log(checkpoint.resume_notice(resumed_from, saved, header, cosmetic_names(cfg)))
        # Losses on other data can't be compared. The best model on the earlier data stays as *.bak.
        if saved["data_hash"] != data.hash:
            log("other data than before: best begins anew")
            state.best_val_loss = math.inf
            state.best_step = 0
            if rank == 0:
                files.set_aside([best_file, best_file.with_suffix(".yaml")])
        del saved
    # Fine-tuning: where nothing is to be resumed, the weights may be those of another run.
    if cfg.init_from and not resumed_from:
        source = checkpoint.load_source(cfg.init_from, kind)
        log(checkpoint.start_from(cfg, parts, source, header))
        del source
    # This comes before the first step, so that the same command again trains nothing.
    if state.step >= last_step and (state.evaluated == state.step or not n_val):
        limits = []
        if state.step >= steps:
            epochs = max(2 * cfg.epochs, math.ceil(2 * state.step / steps_per_epoch))
            limits.append(f"--steps {2 * state.step}" if cfg.steps > 0 else f"--epochs {epochs}")
        if 0 < cfg.max_steps <= state.step:
            limits.append(f"--max_steps {2 * state.step}")
        names = " and ".join(limit.split()[0] for limit in limits)
        further = f"a larger {names} goes on\nnext: {' '.join(limits)}"
        best = f"best val_loss {state.best_val_loss:.4f}"
        log(f"{home}: finished at step {state.step}, {best}; {further}")
        distributed.close()
        return dict(step=state.step, best_val_loss=state.best_val_loss, stopped=0)

    # Checkpoints hold raw_model: DDP prefixes the names of the weights.
    model = raw_model
    if cfg.compile:
        model = raw_model.compiled()  # the core's stacks alone, in place: weights keep their names
    if world > 1 and not cfg.fsdp:
        model = DistributedDataParallel(model)
    saver = checkpoint.Saver()

    def payload(carries):
        """Return all that a checkpoint holds; `carries` has the states of every rank."""
        tensors = {name: part.state_dict() for name, part in parts.items()}
        return header | asdict(state) | dict(carry=carries) | tensors

    def save(path, must=True):
        """Write a checkpoint and its neighbours. All ranks call this, for their part of it."""
        carries = distributed.gather(tuple(z.cpu() for z in carry or ()))
        saver(path, payload(carries), must)
        if rank == 0:
            data.write_beside(path, asdict(cfg))

    # A full disk or a value that can't be saved is found here, not after an hour of training.
    size = checkpoint.rehearse(folder, kind, payload([]))
    if rank == 0:
        if not resumed_from:
            configs = [path.with_suffix(".yaml") for path in (*candidates, best_file)]
            files.set_aside([*candidates, best_file, metrics_file, *configs])
        start_rows(metrics_file, state.step, state.evaluated, asdict(cfg), device)
        where = f"checkpoints of {size / 1e6:.0f} MB in {folder}"
        log(f"{home}: {millions:.2f} M parameters to train, {where}")

    # --- schedule, evaluation, stop -------------------------------------------------------
    def lr_at(step):
        """Return the rate, a pure function of the step: linear warmup, then down to the floor."""
        if step < warmup:
            return cfg.learning_rate * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        cosine = 0.5 + 0.5 * math.cos(math.pi * share)
        height = dict(cosine=cosine, linear=1 - share, constant=1.0)[cfg.lr_scheduler]
        return cfg.learning_rate * (cfg.lr_min_ratio + (1 - cfg.lr_min_ratio) * height)

    def evaluate():
        """Score the averaged weights on the same validation rows every time.

        Returns a row of numbers and sets the halting threshold; None if a signal came meanwhile.
        """
        size = cfg.eval_batch_size or cfg.batch_size
        segments = cfg.segments
        if cfg.halting:  # answers that need more segments than in training get them
            segments = cfg.eval_segments or 4 * cfg.segments
        traces = []
        with average.in_place(), distributed.full_weights(raw_model) as full_model, autocast:
            for start in range(rank * size, n_val, world * size):
                if stop:
                    break
                index = np.arange(start, min(start + size, n_val))
                trace = full_model.trace(to_device(data.batch("val", index)), segments)
                trace |= data.row_facts("val", index)
                traces.append({name: values.cpu() for name, values in trace.items()})
        # A signal may have reached some ranks only. All of them drop the evaluation then.
        shards = distributed.gather((bool(stop), traces))
        if any(stopped for stopped, _ in shards):
            return None
        traces = [trace for _, shard in shards for trace in shard]
        row, state.halt_threshold = summarize(traces, cfg.segments)
        return row

    def at_evaluation(finished):
        """Return whether the end of the run or an interval calls for an evaluation of this step."""
        at_interval = cfg.val_every > 0 and state.step % cfg.val_every == 0
        return n_val > 0 and bool(finished or at_interval)

    # --- train ----------------------------------------------------------------------------
    order_of = -1  # epoch that `order` is of
    batch_at_hand = -1  # number of the batch that is on the device
    shown = {}  # newest validation figures, for the progress bar
    finished = state.step >= last_step
    stop_signal = 0
    save_due = False
    # A run that was stopped while it evaluated begins with that evaluation.
    repeat_evaluation = state.evaluated < state.step and at_evaluation(finished)
    show = rank == 0 and sys.stderr.isatty()  # the lines of stage 4 tell the same elsewhere
    # The first signal only sets `stop`: the step that is under way is finished and saved.
    with Stop() as stop, Progress(last_step, state.step, show=show) as progress:
        start = saved_at = mark = time.monotonic()
        first_step = state.step
        targets_since_mark = 0
        while True:
            if not repeat_evaluation:
                # 1. Data: a new batch once its predecessor has had all its segments.
                number, segment = divmod(state.step, cfg.segments)
                # The number of a step alone says which batch and segment it is, on a resume too.
                if batch_at_hand != number:
                    batch_at_hand = number
                    if order_of != number // batches:
                        order_of = number // batches
                        order = np.resize(data.order(cfg.seed, order_of), (batches, rows_per_batch))
                    # Each rank reads the rows of all: the padding and the label count are shared.
                    batch = to_device(data.batch("train", order[number % batches], number))
                    local_batch = {name: ids[local_rows] for name, ids in batch.items()}
                    targets = (batch["labels"] >= 0).sum().item()

                # 2. Forward and backward: one segment, from the states of the one before. Its
                # gradient ends there, so the memory of a step doesn't grow with the segments.
                states = carry if segment else None
                with autocast:  # DDP takes the mean over ranks, hence the share of the targets
                    local_loss, _, carry = model(local_batch, states, targets / world)
                scaler.scale(local_loss).backward()

                # 3. Step. All ranks take or skip it together.
                rate = lr_at(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # The limit is meant for true gradients, so the scale goes first.
                scaler.unscale_(optimizer)
                max_norm = cfg.grad_clip or math.inf
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_norm).item()
                now = time.monotonic()
                save_due = 0 < 60 * cfg.save_minutes < now - saved_at
                finished = state.step + 1 >= last_step or 0 < cfg.max_seconds < now - start
                # A rank that left or skipped alone would leave the others waiting for it.
                (loss,) = distributed.sum_over_ranks(local_loss.item() / world)
                bad, stop_signal, save_due, finished = distributed.max_over_ranks(
                    not math.isfinite(loss + norm), int(stop.signal), save_due, finished
                )
                # A bad step also leaves the average as it is.
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                    average.update(state.step)
                elif scaler.is_enabled():  # an overflow of some rank: skip, and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
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
                        f"try: --learning_rate {cfg.learning_rate / 10:g}"
                    )

                # 4. Log.
                targets_since_mark += targets
                progress(train=f"{loss:.3f}", **shown)
                if rank == 0 and (state.step % cfg.log_steps == 0 or finished):
                    steps_per_s = (state.step - first_step) / (now - start)
                    eta = timedelta(seconds=int((last_step - state.step) / steps_per_s))
                    log(
                        f"step {state.step}/{last_step} | loss {loss:.3f} | grad {norm:.2f} | "
                        f"lr {rate:.1e} | eta {eta} | {steps_per_s:.1f} it/s"
                    )
                    row = dict(
                        step=state.step,
                        split="train",
                        loss=loss,
                        lr=rate,
                        grad_norm=norm,
                        tokens_per_s=targets_since_mark / (now - mark),
                        seconds=now - start,
                        peak_mb=peak_mb(device),
                        skipped=state.skipped,
                    )
                    append_row(metrics_file, row)
                    targets_since_mark = 0
                    mark = now

            # 5. Evaluate, unless a signal came. One that is cut is repeated when the run goes on.
            evaluate_now = repeat_evaluation or at_evaluation(finished)
            repeat_evaluation = False
            if evaluate_now and not stop_signal:
                before = time.monotonic()
                val_row = evaluate()
                (stop_signal,) = distributed.max_over_ranks(0 if val_row else int(stop.signal))
                mark += time.monotonic() - before  # speed is that of training alone
            if evaluate_now and not stop_signal:
                state.evaluated = state.step
                shown = {name: f"{value:.4f}" for name, value in val_row.items()}
                figures = " | ".join(f"{name} {value}" for name, value in shown.items())
                log(f"step {state.step} | val {figures}")
                if rank == 0:
                    append_row(metrics_file, dict(step=state.step, split="val") | val_row)
                if val_row["loss"] < state.best_val_loss:
                    state.best_val_loss = val_row["loss"]
                    state.best_step = state.step
                    # It holds its own score, so the state changes first.
                    if cfg.save_best_model:
                        save(best_file)

            # 6. Save under the number of the step. Training survives a rolling save that fails: a
            # disk that is full now may have room at the next one.
            leaving = finished or stop_signal
            if not leaving and (save_due or evaluate_now):
                save(folder / f"step_{state.step}.pt", must=not save_due)
                saved_at = time.monotonic()
                if rank == 0:
                    step_files = checkpoint.numbered_files(folder, snapshot_name)
                    checkpoint.rotate(step_files, cfg.checkpoint_limit)

            # 7. Leave: final.pt holds the last state, whatever ended the run.
            if leaving:
                save(final_file)
                break

    # --- summary --------------------------------------------------------------------------
    if rank == 0 and finished:
        draw_losses([metrics_file], home / "loss.png", log)
    next_command = "without --fresh"
    if finished:
        prompt = shlex.quote(data.example())
        path = shlex.quote(str(final_file))
        next_command = f"python generate.py --checkpoint {path} --prompt {prompt}"
    best = f"best val_loss {state.best_val_loss:.4f} at step {state.best_step}"
    if state.best_val_loss == math.inf:
        best = "not evaluated yet"
    log(
        f"{home}: step {state.step} of {max(state.step, last_step)}, {best}, "
        f"{time.monotonic() - start:.0f} s, "
        f"peak {peak_mb(device):.0f} MB; next: {next_command}"
    )
    distributed.close()
    return dict(step=state.step, best_val_loss=state.best_val_loss, stopped=int(stop_signal))


if __name__ == "__main__":
    launch(main, cfg)
