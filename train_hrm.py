"""Train a hierarchical reasoning model: a prompt is encoded, thought about by a recursive core, and answered.

    python train_hrm.py --config configs/hrm/addition.yaml --run_name addition     # half a minute: sums, held out
    python train_hrm.py --dataset sudoku --run_name sudoku9                        # minutes: 9 x 9, 40 givens
    python train_hrm.py --dataset data/prepared --run_name text --save_best_model  # of prepare_data.py language
    torchrun --nproc-per-node 2 train_hrm.py --dataset sudoku --run_name sudoku9   # several GPUs; --fsdp shares weights

Writes runs/<run_name>/checkpoints/{step_N,final}.pt with a .yaml each, best-model/, metrics.jsonl and loss.png, and
goes on from the newest checkpoint there when it is started again. In a notebook: paste this file into a cell, then
main(SyntheticConfig(steps=100)).

B batch, S prompt, T answer, V vocabulary; a segment is one optimizer step on a batch, the next goes on from its states.
"""

import inspect
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from data_utils.config import at_least, below_one, check_name, complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import ends_cleanly, launch
from data_utils.reasoning.nested_config import flatten


@dataclass
class HrmConfig:
    # data
    dataset: str = ""  # synthetic, sudoku, or a folder of prepare_data.py
    dry_run: Literal["auto", "1", "0"] = field(default="auto", metadata=dict(bare="1"))  # 1: one random batch, no files
    max_seq_len: int = 256  # ids on each side, prompt and answer; longer rows are cut
    dataset_workers: int = 0  # processes that read JSONL
    data_seed: int = 1  # of built-in data and its split
    reveal: float = 0.1  # sudoku: share of training puzzles with some of the blanks filled in
    skip_bad_lines: bool = False  # count and skip malformed lines instead of stopping
    allow_leak: bool = False  # keep rows whose prompt is their answer
    # model
    d_model: int = 256  # width C
    n_heads: int = 4  # attention heads
    encoder_layers: int = 2  # blocks that read the prompt
    decoder_layers: int = 4  # blocks that write the answer; 0 = a head that fills in each cell of the prompt
    core: Literal["recursive", "plain", "none"] = "recursive"  # the same blocks again and again, once, or none
    core_layers: int = 2  # blocks of a module of the core
    share: bool = True  # the fast and the slow module are one
    h_cycles: int = 2  # slow updates in a segment
    l_steps: int = 2  # fast updates for each slow one
    segments: int = 1  # optimizer steps on a batch, each from the states of the one before
    grad: Literal["last_cycle", "one_step", "bptt"] = "last_cycle"  # how far gradients go back in a segment
    ffn_dim: int = 0  # inner width of the core; 0 = twice d_model
    positions: Literal["rope", "ends", "grid"] = "rope"  # rotary, counted from both ends, or rows, columns and boxes
    relation_bias: bool = False  # cells of a grid know who shares their row, column or box
    halting: bool = False  # learn when an answer is right, and stop there
    halting_weight: float = 0.5  # of that in the loss
    # run
    run_name: str = ""  # files go to runs/<run_name>/
    save_dir: str = ""  # checkpoints right into this folder; a --run_name overrides it
    resume: str = "auto"  # auto: go on if there is anything; or a file
    fresh: bool = False  # start over; old files are renamed to *.bak, *.bak2, ...
    seed: int = 0  # weights and order
    save_best_model: bool = False  # keep the lowest validation loss in runs/<run_name>/best-model
    checkpoint_limit: int = 0  # newest step files kept; 0 = all
    save_minutes: float = 10.0  # minutes between rolling saves: what a crash can cost; 0 = only when stopped
    # optimization
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"  # 8bit: moments in a quarter of the memory
    muon: float = 10.0  # rate of the hidden matrices with muon, in units of learning_rate
    learning_rate: float = field(default=1e-3, metadata=dict(also="lr"))  # peak learning rate
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    lr_min_ratio: float = 0.05  # floor of the schedule as a share of the peak
    warmup_steps: int = 0  # steps of linear warmup
    weight_decay: float = 0.1  # AdamW decay, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    ema: float = 0.99  # decay of the averaged weights that are evaluated; 0 = off
    batch_size: int = 32  # rows per step and process
    grad_clip: float = 0.0  # largest gradient norm; 0 = off
    steps: int = 2000  # optimizer steps in all
    epochs: int = 0  # passes over the rows instead, where steps is 0 or not given
    max_steps: int = 0  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = 0.0  # stop after so many seconds; 0 = off
    # evaluation, hardware
    val_every: int = 0  # steps between evaluations with a checkpoint each; 0 = only at the end
    eval_batch_size: int = 0  # rows per evaluation batch; 0 = as training
    eval_rows: int = 0  # validation rows used; 0 = all
    eval_segments: int = 0  # most segments with halting; 0 = four times segments
    log_steps: int = 10  # steps per line and row of metrics
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    fsdp: bool = False  # several processes keep a part of the weights and of the optimizer each, not all of them
    mixed_precision: Literal["none", "bf16", "fp16", "auto"] = "none"  # auto: bf16 where it is fast
    compile: bool = False  # torch.compile of the core: a minute to start, then faster


@dataclass
class SyntheticConfig(HrmConfig):
    dataset: str = "synthetic"  # synthetic, sudoku, or a folder of prepare_data.py
    batch_size: int = 256  # rows per step and process
    steps: int = 1000  # optimizer steps in all
    max_seq_len: int = 32  # ids on each side, prompt and answer; longer rows are cut
    d_model: int = 64  # width C
    n_heads: int = 2  # attention heads
    encoder_layers: int = 1  # blocks that read the prompt
    decoder_layers: int = 2  # blocks that write the answer; 0 = a head that fills in each cell of the prompt
    core_layers: int = 1  # blocks of a module of the core
    h_cycles: int = 1  # slow updates in a segment
    l_steps: int = 1  # fast updates for each slow one
    positions: Literal["rope", "ends", "grid"] = "ends"  # rotary, counted from both ends, or rows, columns and boxes


@dataclass
class SudokuConfig(HrmConfig):
    dataset: str = "sudoku"  # synthetic, sudoku, or a folder of prepare_data.py
    steps: int = 2300  # optimizer steps in all
    max_seq_len: int = 81  # cells
    d_model: int = 128  # width C
    encoder_layers: int = 0  # blocks that read the prompt
    decoder_layers: int = 0  # blocks that write the answer; 0 = a head that fills in each cell of the prompt
    segments: int = 4  # optimizer steps on a batch, each from the states of the one before
    positions: Literal["rope", "ends", "grid"] = "grid"  # rotary, counted from both ends, or rows, columns and boxes
    relation_bias: bool = True  # cells of a grid know who shares their row, column or box
    halting: bool = True  # learn when an answer is right, and stop there
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "muon"  # 8bit: moments in a quarter of the memory
    warmup_steps: int = 100  # steps of linear warmup
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    mixed_precision: Literal["none", "bf16", "fp16", "auto"] = "auto"  # auto: bf16 where it is fast


def variant(dataset):
    """The class of a data set: a prepared folder says in meta.json whether it holds puzzles."""
    if dataset in ("synthetic", "sudoku"):
        return SyntheticConfig if dataset == "synthetic" else SudokuConfig
    try:
        puzzles = json.loads(Path(dataset, "meta.json").read_text(encoding="utf-8"))["kind"] == "sudoku"
    except (OSError, ValueError, KeyError, TypeError):
        puzzles = False
    return SudokuConfig if puzzles and dataset else HrmConfig


Config = HrmConfig

if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli(variant, __doc__, by="dataset", flatten=flatten)

import numpy as np
import torch

from data_utils import checkpoint, files
from data_utils.hardware import Hardware
from data_utils.metrics import append_row, draw_losses, start_rows
from data_utils.progress import Progress, peak_mb, say
from data_utils.reasoning.answers import summarize
from data_utils.reasoning.questions import open_questions, random_batch
from data_utils.stop import Stop
from models.hrm import HRM
from models.optim.adamw8bit import AdamW8bit
from models.optim.ema import Average
from models.optim.muon import Muon

BAD_STEPS = 10  # non-finite steps in a row that end a run
# what a resumed run may change and still do bit for bit the same
COSMETIC = """dataset dry_run dataset_workers skip_bad_lines run_name save_dir resume fresh save_best_model
checkpoint_limit save_minutes max_steps max_seconds val_every eval_batch_size eval_rows eval_segments log_steps
device fsdp compile""".split()


def kind_of(name, parameter):
    """Weight decay is for matrices, tables of ids and places too: without it held-out sums come much later."""
    return "" if parameter.ndim != 2 else "hidden" if name.startswith(("encoder.", "core.", "decoder.")) else "table"


@ends_cleanly
def main(cfg):
    cfg = complete(cfg, variant, by="dataset")
    train = cfg.dry_run == "0" or cfg.dry_run == "auto" and bool(cfg.dataset)
    if train and not cfg.dataset:
        raise UsageError("--dry_run 0 needs a --dataset: synthetic, sudoku, or a folder of prepare_data.py")
    at_least(cfg, 1, *"d_model n_heads h_cycles l_steps segments max_seq_len batch_size log_steps".split())
    at_least(cfg, 0, *"encoder_layers decoder_layers core_layers ffn_dim warmup_steps learning_rate seed".split())
    at_least(cfg, 0, *"checkpoint_limit save_minutes val_every eval_batch_size eval_rows eval_segments".split())
    at_least(cfg, 0, *"lr_min_ratio weight_decay ema max_steps max_seconds halting_weight reveal muon".split())
    below_one(cfg, "beta1", "beta2")
    if cfg.d_model % (2 * cfg.n_heads):
        raise UsageError(f"--d_model {cfg.d_model} over --n_heads {cfg.n_heads}: the head dim must be whole and even")
    if cfg.segments > 1 and cfg.core != "recursive":
        raise UsageError(f"--segments {cfg.segments} needs --core recursive, it is {cfg.core}")
    if cfg.run_name:
        check_name(cfg, "run_name")

    # --- hardware -------------------------------------------------------------------------
    hardware = Hardware(cfg.device, dict(none="fp32", auto="bf16").get(asked := cfg.mixed_precision, asked), cfg.fsdp)
    rank, world, device, scaler = hardware.rank, hardware.world, hardware.device, hardware.scaler
    if asked == "fp16" and device.type != "cuda":
        raise UsageError("--mixed_precision fp16 needs CUDA\ntry: bf16 or none")
    tell = say if rank == 0 else lambda *_: None
    tell(hardware.reason)
    torch.manual_seed(cfg.seed)

    # --- data -----------------------------------------------------------------------------
    folder = cfg.save_dir or f"checkpoints/hrm/{Path(cfg.dataset).name}"
    home = Path("runs", cfg.run_name) if cfg.run_name else Path(folder)
    folder, best = home / "checkpoints" if cfg.run_name else home, home / "best-model" / "best.pt"
    if train:
        data = open_questions(
            cfg.dataset, max_seq_len=cfg.max_seq_len, data_seed=cfg.data_seed, reveal=cfg.reveal, say=tell, rank=rank,
            workers=cfg.dataset_workers, skip_bad_lines=cfg.skip_bad_lines, allow_leak=cfg.allow_leak, cache_dir=folder,
        )  # fmt: skip

    # --- model and optimizer --------------------------------------------------------------
    def place(batch):
        return {key: ids.to(device) for key, ids in batch.items()}

    known = asdict(cfg) | dict(vocab_size=data.meta["vocab_size"] if train else 98)
    model_args = {name: known[name] for name in inspect.signature(HRM).parameters}
    try:
        raw_model = HRM(**model_args).to(device)  # the one that is saved: no _orig_mod. or module. keys
    except ValueError as e:
        raise UsageError(str(e)) from e
    count = sum(p.numel() for p in raw_model.parameters())
    if not train:
        with hardware.autocast:
            loss, _, _ = raw_model(place(random_batch(cfg.batch_size, cfg.max_seq_len, known["vocab_size"])))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), math.inf).item()
        size = f"{count / 1e6:.2f} M parameters"
        tell(f"dry run: loss {loss.item():.4f}, gradient norm {norm:.3f}, {size}; --dataset trains")
        return dict(step=0, best=math.inf, stopped=0)
    n_val, rows = min(cfg.eval_rows or data.rows("val"), data.rows("val")), cfg.batch_size * world
    if cfg.save_best_model and not (cfg.run_name and n_val):
        raise UsageError("--save_best_model needs a --run_name, and validation rows")
    batches = math.ceil(data.rows("train") / rows)  # an epoch; its last batch is filled up from its start
    steps = cfg.epochs * batches * cfg.segments if cfg.epochs and cfg.steps in (0, type(cfg).steps) else cfg.steps
    if steps < 1:
        raise UsageError(f"--steps {cfg.steps} --epochs {cfg.epochs}: one of them must be 1 or more")
    last = min(steps, cfg.max_steps or steps)  # step at which this run ends, on the schedule of all
    hardware.shard(raw_model, cfg.optimizer)
    trained = dict(raw_model.named_parameters())
    groups = [
        dict(params=[p for name, p in trained.items() if kind_of(name, p) == kind], weight_decay=decay, times=times)
        for kind, decay, times in (("hidden", cfg.weight_decay, cfg.muon), ("table", cfg.weight_decay, 0), ("", 0, 0))
    ]
    fused = partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"))
    kinds = dict(adamw=fused, adamw_8bit=partial(AdamW8bit, seed=cfg.seed), muon=Muon)
    optimizer = kinds[cfg.optimizer](groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2))
    average = Average(trained, cfg.ema)
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler, ema=average)  # all that is saved

    # --- resume ---------------------------------------------------------------------------
    # where the run is, saved and resumed as it stands
    at = SimpleNamespace(step=0, evaluated=0, best_val_loss=math.inf, best_step=0, skipped=0, skipped_in_row=0,
                         halt_threshold=0.0)  # fmt: skip
    kind, snapshot, final, metrics = "hrm", r"step_(\d+)\.pt", folder / "final.pt", home / "metrics.jsonl"
    lock = files.lock_run(folder, "hrm", folder, best.parent) if rank == 0 else None  # noqa: F841  held until main ends
    candidates = checkpoint.by_step(checkpoint.numbered_files(folder, snapshot), final, kind)
    path, state = checkpoint.find_checkpoint(cfg.resume, cfg.fresh, candidates, kind)
    about = dict(kind=kind, format=1, dataset=cfg.dataset, tokenizer=data.tokenizer.name,
                 tokenizer_hash=data.tokenizer.hash, data_hash=data.hash, world_size=world, steps=steps,
                 torch=str(torch.__version__), config=asdict(cfg), model_args=model_args, meta=data.meta)  # fmt: skip
    carry = None  # states of the batch at hand, (B, S, C) each
    if state:
        checkpoint.load_parts(parts, state, path, about)
        vars(at).update({name: state[name] for name in vars(at)})
        whole = [torch.cat(z) for z in zip(*state["carry"], strict=True)]  # of all ranks that there were
        carry = tuple(z[rank * cfg.batch_size :][: cfg.batch_size].to(device) for z in whole if len(z) == rows) or None
        checkpoint.set_aside_later(candidates, at.step) if rank == 0 else None
        tell(checkpoint.resume_notice(path, state, about, COSMETIC))
    if at.step >= steps and (at.evaluated == at.step or not n_val):
        tell(f"{home}: finished at step {at.step}, best val_loss {at.best_val_loss:.4f}; a larger --steps goes on")
        hardware.close()
        return dict(step=at.step, best=at.best_val_loss, stopped=0)
    model, saver = hardware.wrap(raw_model.compiled() if cfg.compile else raw_model, False), checkpoint.Saver()

    def payload(carry):
        return about | vars(at) | dict(carry=carry) | {name: part.state_dict() for name, part in parts.items()}

    def save(path, must=True):
        states = hardware.gather(tuple(z.cpu() for z in carry or ()))
        saver(path, payload(states), must)  # on all ranks, which give what they have of the weights
        if rank == 0:
            data.write_beside(path, asdict(cfg))

    size = checkpoint.rehearse(folder, "hrm", payload([]))
    if rank == 0:
        if not path:
            files.set_aside([*candidates, best, metrics, *(p.with_suffix(".yaml") for p in (*candidates, best))])
        start_rows(metrics, at.step, at.evaluated, asdict(cfg), device)
        tell(f"{home}: {count / 1e6:.2f} M parameters to train, checkpoints of {size / 1e6:.0f} MB in {folder}")

    # --- schedule, evaluation, stop -------------------------------------------------------
    def lr_at(step):  # linear warmup, then down to the floor: a pure function of the step
        if step < cfg.warmup_steps:
            return cfg.learning_rate * (step + 1) / cfg.warmup_steps
        share = min(1.0, (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps))
        left = dict(cosine=0.5 + 0.5 * math.cos(math.pi * share), linear=1 - share, constant=1.0)[cfg.lr_scheduler]
        return cfg.learning_rate * (cfg.lr_min_ratio + (1 - cfg.lr_min_ratio) * left)

    def evaluate():
        """Averaged weights on the same validation rows every time -> a row of numbers; None if stopped."""
        size, found = cfg.eval_batch_size or cfg.batch_size, []
        segments = (cfg.eval_segments or 4 * cfg.segments) if cfg.halting else cfg.segments
        with average.in_place(), hardware.whole(raw_model) as whole, hardware.autocast:
            for start in range(rank * size, n_val, world * size):
                if stop:
                    break
                index = np.arange(start, min(start + size, n_val))
                trace = whole.trace(place(data.batch("val", index)), segments) | data.about("val", index)
                found.append({name: values.cpu() for name, values in trace.items()})
        shards = hardware.gather((bool(stop), found))
        if any(stopped for stopped, _ in shards):
            return None
        row, at.halt_threshold = summarize([part for _, found in shards for part in found], cfg.segments)
        return row

    def due():  # an evaluation
        return n_val and at.evaluated < at.step and (over or cfg.val_every and at.step % cfg.val_every == 0)

    # --- train ----------------------------------------------------------------------------
    epoch_of_order, batch_of_step, val, over = -1, -1, {}, at.step >= steps
    with Stop() as stop, Progress(last, at.step, show=rank == 0 and sys.stderr.isatty()) as progress:
        start = saved = mark = time.monotonic()
        first, seen, stop_now, late = at.step, 0, 0, 0  # labels since mark; signal; whether a rolling save is due
        while True:
            if not due():  # else the run was stopped while it evaluated
                number, segment = divmod(at.step, cfg.segments)
                if batch_of_step != number:
                    if epoch_of_order != number // batches:
                        epoch_of_order = number // batches
                        order = np.resize(data.order(cfg.seed, epoch_of_order), (batches, rows))
                    whole = place(data.batch("train", order[number % batches], number))
                    here = {key: ids[rank * cfg.batch_size :][: cfg.batch_size] for key, ids in whole.items()}
                    targets, batch_of_step = (whole["labels"] >= 0).sum().item(), number
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(at.step)
                with hardware.autocast:
                    loss, _, carry = model(here, carry if segment else None, targets / world)  # the mean is taken
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip or math.inf).item()
                now = time.monotonic()
                late = cfg.save_minutes and now - saved > 60 * cfg.save_minutes
                over = at.step + 1 >= last or 0 < cfg.max_seconds < now - start
                (loss,) = hardware.total(loss.item() / world)
                bad = not math.isfinite(loss + norm)
                bad, stop_now, late, over = hardware.largest(bad, int(stop.signal), late, over)
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                    average.update(at.step)
                elif scaler.is_enabled():  # an overflow, perhaps of another rank: all of them skip and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                at.skipped += bool(bad)
                at.skipped_in_row = at.skipped_in_row + 1 if bad and scaler.get_scale() <= 1 else 0
                if at.skipped_in_row == BAD_STEPS:
                    raise DataError(f"{BAD_STEPS} steps in a row not finite, try a smaller --lr; good: {saver.last}")
                at.step, seen = at.step + 1, seen + targets
                progress(**dict(train=f"{loss:.3f}") | val)
                if rank == 0 and (at.step % cfg.log_steps == 0 or over):
                    rate = (at.step - first) / (now - start)
                    tell(f"step {at.step}/{last} | loss {loss:.3f} | grad {norm:.2f} | lr {lr_at(at.step - 1):.1e} | "
                         f"eta {timedelta(seconds=int((last - at.step) / rate))} | {rate:.1f} it/s")  # fmt: skip
                    append_row(metrics, dict(
                        step=at.step, split="train", loss=loss, lr=lr_at(at.step - 1), grad_norm=norm,
                        tokens_per_s=seen / (now - mark), seconds=now - start, peak_mb=peak_mb(device),
                        skipped=at.skipped))  # fmt: skip
                    seen, mark = 0, now
            if due() and not stop_now:
                before, row = time.monotonic(), evaluate()
                (stop_now,) = hardware.largest(0 if row else int(stop.signal))
                mark += time.monotonic() - before
                if row:
                    at.evaluated, val = at.step, {name: f"{number:.4f}" for name, number in row.items()}
                    tell(f"step {at.step} | val " + " | ".join(f"{name} {number}" for name, number in val.items()))
                    if rank == 0:
                        append_row(metrics, dict(step=at.step, split="val") | row)
                    if improved := row["loss"] < at.best_val_loss:
                        at.best_val_loss, at.best_step = row["loss"], at.step
                    if improved and cfg.save_best_model:
                        save(best)
            if over or stop_now:
                save(final)
                break
            if late or cfg.val_every and at.evaluated == at.step:
                save(folder / f"step_{at.step}.pt", must=not late)
                saved = time.monotonic()
                if rank == 0:
                    checkpoint.rotate(checkpoint.numbered_files(folder, snapshot), cfg.checkpoint_limit)

    # --- summary --------------------------------------------------------------------------
    if rank == 0 and over:
        draw_losses([metrics], home / "loss.png", tell)
    next_command = f"python generate.py --checkpoint {final}" if over else "the same command again"
    tell(f"{home}: step {at.step} of {last}, best val_loss {at.best_val_loss:.4f} at step {at.best_step}, "
         f"{time.monotonic() - start:.0f} s, peak {peak_mb(device):.0f} MB; next: {next_command}")  # fmt: skip
    hardware.close()
    return dict(step=at.step, best=at.best_val_loss, stopped=int(stop_now))


if __name__ == "__main__":
    launch(main, cfg)
