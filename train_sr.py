"""Train symbolic regression: a set of points (x, y) in, the formula out, on formulas that are drawn while it trains.

    python train_sr.py                                                           # an hour on two cores
    ./scripts/train.sh configs/test                                              # every part once, in seconds
    python train_sr.py -c configs/v23.0-3M/train.yaml -ci 250000 -vi 10000       # a bundle, for a GPU
    python train_sr.py --resume-from auto                                        # go on where it stopped
    torchrun --nproc-per-node 2 train_sr.py --batch_size 32                      # a process a core, or several GPUs;
                                                                                 # --fsdp shares the weights

Writes models/ansr-models/<bundle>/: checkpoint_<step>/ folders, metrics.jsonl, loss.png, and at the end model.yaml,
tokenizer.yaml and state_dict.pt, which is all that `generate.py formula` needs; each folder is a bundle too. In a
notebook: paste this file into a cell, then main(Config(steps=100)).

B batch, M points, D variables, T tokens, V tokens of the alphabet.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from data_utils.config import at_least, below_one, complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.formulas.bundle_files import save_config
from data_utils.formulas.bundles import load_flags
from data_utils.formulas.dataset import DataConfig
from data_utils.formulas.skeletons import PoolConfig
from data_utils.launch import ends_cleanly, launch

Norm = Literal["rms", "rms_set", "layer", "none"]


@dataclass
class ModelConfig:
    encoder_max_n_variables: int = 0  # columns of the points with y; 0 = as many as there are variables, and y
    encoder_dim: int = 128  # width of the encoder
    encoder_n_heads: int = 4  # its attention heads
    encoder_n_isab: int = 0  # its blocks that attend by inducing points
    encoder_n_sab: int = 2  # its blocks after the pooling
    encoder_n_inducing_points: int = 32  # of each isab block
    encoder_n_seeds: int = 12  # vectors that a set becomes
    encoder_ffn_hidden_dim: int = 384  # inner width
    encoder_dropout: float = 0.0
    encoder_attn_norm: Norm = "rms_set"
    encoder_ffn_norm: Norm = "rms_set"
    encoder_output_norm: Norm = "rms_set"
    decoder_input_dim: int = 128  # width of the vectors of a set
    decoder_model_dim: int = 128  # width of the decoder
    decoder_n_heads: int = 4  # its attention heads
    decoder_n_layers: int = 3  # its blocks
    decoder_max_seq_len: int = 64  # tokens of a sequence T, prompt included
    decoder_ffn_hidden_dim: int = 384  # inner width
    decoder_dropout: float = 0.0
    decoder_block_self_attn_norm: Norm = "rms"
    decoder_block_cross_attn_norm: Norm = "rms"
    decoder_block_ffn_norm: Norm = "rms"
    decoder_cross_attn_kv_norm: Norm = "rms"
    decoder_output_norm: Norm = "rms"
    decoder_use_rope_self_attn: bool = True  # rotary positions of the tokens
    decoder_use_rope_cross_attn: bool = False  # and of the vectors of the set
    float_features: Literal["fourier", "ieee"] = "fourier"  # how a number is given to the encoder
    pre_encoder_noise_scale: float = 0.1  # noise on ieee features in training
    use_checkpointing: bool = False  # less memory for more time


@dataclass
class SRConfig(ModelConfig, PoolConfig, DataConfig):
    # run
    config: str = ""  # train.yaml of a bundle
    output_dir: str = field(default="", metadata=dict(short="-o"))  # "" = models/ansr-models/<name of the bundle>
    verbose: bool = field(default=True, metadata=dict(short="-v"))  # a bar; else a line per validation
    resume_from: str = ""  # a checkpoint folder, an output folder, or auto: the newest there, if there is one
    resume_step: int = -1  # step of that checkpoint, if it does not say
    fresh: bool = False  # start over; the old output folder is renamed to *.bak, *.bak2, ...
    seed: int = 0  # weights, data and dropout all follow from it
    # data
    skeleton_pool: str = ""  # saved pool to draw from; "" = drawn while training
    num_workers: int = field(default=0, metadata=dict(short="-w"))  # data processes; 0 = inside the training process
    # optimization
    lr: float = 1e-3  # peak learning rate
    warmup: float = 0.05  # share of the steps with a rising rate
    cooldown: float = 0.4  # share of the steps with a falling rate
    lr_schedule: str = ""  # points 0:0,100000:1e-4,... instead: linear between, flat after the last
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "muon"  # 8bit: moments in a quarter of the memory
    muon: float = 8.0  # rate of the hidden matrices with muon, in units of lr
    weight_decay: float = 0.01  # decay, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    clip: float = 2.0  # largest gradient norm; 0 = off
    batch_size: int = 64  # samples per micro-batch and process
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    steps: int = 40000  # optimizer steps in all
    max_steps: int = 0  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = 0.0  # stop after so many seconds; 0 = off
    # evaluation, checkpoints, hardware
    validate_interval: int = field(default=1000, metadata=dict(short="-vi"))  # steps between validations
    val_size: int = 1024  # fixed validation samples
    val_batch_size: int = 128  # of them at a time
    val_problems: int = 48  # problems solved at each validation; 0 = off
    val_choices: int = 64  # candidates for each of them
    checkpoint_interval: int = field(
        default=0, metadata=dict(short="-ci")
    )  # steps between checkpoints that stay; 0 = off
    save_minutes: float = 10.0  # minutes between rolling saves: what a crash can cost; 0 = only when stopped
    log_interval: int = 50  # steps per row of metrics
    wandb_mode: Literal["disabled", "online", "offline"] = field(default="disabled", metadata=dict(also="mode"))  # W&B
    project: str = "petri-sr"  # of W&B
    entity: str = ""  # of W&B
    name: str = ""  # of the run in W&B
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    fsdp: bool = False  # several processes keep a part of the weights and of the optimizer each, not all of them
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
    compile_mode: Literal["", "off", "default", "reduce-overhead", "max-autotune"] = ""  # of torch.compile


Config = SRConfig


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli(SRConfig, __doc__, load=load_flags)

import torch

from data_utils import checkpoint, files
from data_utils.formulas.bundles import open_formulas
from data_utils.formulas.checkpoint_folders import find_folder, prune, save_folder, step_of, sweep
from data_utils.formulas.model_files import build_model, save_model
from data_utils.formulas.search import solve_problems
from data_utils.hardware import Hardware
from data_utils.metrics import append_row, draw_losses, start_rows, to_wandb
from data_utils.progress import Progress, peak_mb, say
from data_utils.stop import Stop
from models.formula_model import ARGUMENTS
from models.optim.adamw8bit import AdamW8bit
from models.optim.muon import Muon

BAD_STEPS = 10  # non-finite steps in a row that end a run
SAVED = "state_dict optimizer lr_scheduler scaler".split()
# what a resumed run may change and still do bit for bit the same
COSMETIC = """config output_dir verbose resume_from resume_step fresh num_workers max_steps max_seconds
validate_interval val_size val_batch_size val_problems val_choices checkpoint_interval save_minutes log_interval
wandb_mode project entity name device fsdp compile_mode""".split()


def kind_of(name, parameter):
    """Weight decay is for matrices: not for norms, biases, embeddings, seeds and inducing points."""
    if parameter.ndim != 2 or any(word in name for word in ("token.", "slots.", "seeds", "inducing")):
        return ""
    return "last" if name.startswith("head.3") else "hidden"


def schedule(cfg):
    """Points (step, rate) of the learning rate, linear between them and flat after the last."""
    if not cfg.lr_schedule:
        rise, fall = cfg.warmup * cfg.steps, (1 - cfg.cooldown) * cfg.steps
        return [(0, 0.0 if rise else cfg.lr), (rise, cfg.lr), (fall, cfg.lr), (cfg.steps, 0.0)]
    try:
        points = [tuple(map(float, point.split(":"))) for point in cfg.lr_schedule.split(",")]
        if any(len(point) != 2 for point in points) or points != sorted(points):
            raise ValueError
    except ValueError:
        raise UsageError(f"--lr_schedule {cfg.lr_schedule}: expected STEP:RATE,STEP:RATE,... by rising step") from None
    return points


@ends_cleanly
def main(cfg):
    cfg = complete(cfg, SRConfig, load=load_flags)
    at_least(cfg, 1, *"batch_size gradient_accumulation_steps steps validate_interval val_batch_size".split())
    at_least(cfg, 1, "log_interval", "val_choices", "val_size")
    at_least(cfg, 0, *"num_workers warmup cooldown weight_decay clip max_steps max_seconds seed save_minutes".split())
    at_least(cfg, 0, "checkpoint_interval", "val_problems", "lr", "muon")
    below_one(cfg, "beta1", "beta2")
    if cfg.warmup + cfg.cooldown > 1:
        raise UsageError(f"--warmup {cfg.warmup} --cooldown {cfg.cooldown}: shares of the steps, together at most 1")
    points = schedule(cfg)
    last = min(cfg.steps, cfg.max_steps or cfg.steps)  # step at which this run ends, on the schedule of all

    # --- hardware -------------------------------------------------------------------------
    auto = "float32" if cfg.device == "cpu" or not torch.cuda.is_available() else "bfloat16"
    dtype = auto if cfg.dtype == "auto" else cfg.dtype
    hardware = Hardware(cfg.device, dict(float32="fp32", bfloat16="bf16", float16="fp16")[dtype], cfg.fsdp)
    rank, world, device, scaler = hardware.rank, hardware.world, hardware.device, hardware.scaler
    tell = say if rank == 0 else lambda *_: None
    tell(hardware.reason)
    torch.manual_seed(cfg.seed)

    # --- data -----------------------------------------------------------------------------
    name = Path(cfg.config).resolve().parent.name if cfg.config else "sr-cpu"
    out = Path(cfg.output_dir or f"models/ansr-models/{name}")
    data = open_formulas(cfg, rank, world)
    alphabet, bundle = data.alphabet, data.bundle

    def place(batch):
        return {key: tensor.to(device) for key, tensor in batch.items()}

    # --- model and optimizer --------------------------------------------------------------
    model_args = {name: getattr(cfg, name) for name in ARGUMENTS}
    raw_model = build_model(alphabet, model_args)  # the one that is saved: no _orig_mod. or module. keys
    raw_model.to(device)
    hardware.shard(raw_model, cfg.optimizer)
    trained = dict(raw_model.named_parameters())
    groups = [
        dict(params=[p for name, p in trained.items() if kind_of(name, p) == kind], weight_decay=decay, times=times)
        for kind, decay, times in (("hidden", cfg.weight_decay, cfg.muon), ("last", cfg.weight_decay, 0), ("", 0, 0))
    ]
    fused = partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"))
    kinds = dict(adamw=fused, adamw_8bit=partial(AdamW8bit, seed=cfg.seed), muon=Muon)
    optimizer = kinds[cfg.optimizer](groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    count = {part: sum(p.numel() for name, p in trained.items() if name.startswith("encoder") == (part == "encoder"))
             for part in ("encoder", "decoder")}  # fmt: skip

    # --- resume ---------------------------------------------------------------------------
    # where the run is, saved and resumed as it stands
    at = SimpleNamespace(step=0, evaluated=0, best_val_loss=math.inf, best_step=0, skipped=0, skipped_in_row=0,
                         samples=0, total_pflops=0.0)  # fmt: skip
    kind, metrics, final = "sr", out / "metrics.jsonl", out / "state_dict.pt"
    lock = files.lock_run(out.parent, out.name) if rank == 0 else None  # noqa: F841  held until main ends
    sweep(out) if rank == 0 else None
    path, state, found = find_folder("" if cfg.fresh else cfg.resume_from, out, kind, SAVED)
    there = checkpoint.numbered_files(out, r"checkpoint_(\d+)")
    if not path and out.exists() and not cfg.fresh and there and not final.exists():
        raise UsageError(f"{out} holds an unfinished run, up to {there[0].name}\n"
                         "try: --resume-from auto, which goes on, or --fresh, which keeps it as *.bak")  # fmt: skip
    about = dict(kind=kind, format=1, tokenizer="formulas", tokenizer_hash=" ".join(alphabet.tokens), data_hash="",
                 world_size=world, steps=cfg.steps, torch=str(torch.__version__), config=asdict(cfg),
                 model_args=model_args)  # fmt: skip
    if path:
        lacking = [f"{name}.pt" for name in SAVED[:2] if name not in found]
        if lacking:
            raise UsageError(f"{path} has no {', '.join(lacking)}: nothing to go on from")
        step = step_of(path, state, cfg.resume_step)
        if state and state["step"] != step:
            files.warn(f"{path} is of step {state['step']}, --resume-step {step} is taken")
        for name in [name for name in SAVED[2:] if name not in found]:
            tell(f"{path} has no {name}.pt: begun anew")
        state = about | vars(at) | state  # all but its step may be lost
        loaded = dict(model_state=found["state_dict"], optimizer_state=found["optimizer"],
                      amp_scaler=found.get("scaler", {}))  # fmt: skip
        parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)
        checkpoint.load_parts(parts, state | loaded, path, about)
        vars(at).update({name: state[name] for name in vars(at)})
        at.step = step
        checkpoint.set_aside_later(there, at.step) if rank == 0 else None
        tell(checkpoint.resume_notice(path, state, about, COSMETIC))
    if at.step >= cfg.steps and at.evaluated == at.step and final.exists():
        tell(f"{out}: finished at step {at.step}, val_loss {at.best_val_loss:.4f}; a larger --steps goes on")
        hardware.close()
        return dict(step=at.step, best=at.best_val_loss, stopped=0)
    if rank == 0:
        if not path:
            files.set_aside([out])
        out.mkdir(parents=True, exist_ok=True)
    weights = dict(model_state=raw_model.state_dict(), optimizer_state=optimizer.state_dict())
    size = checkpoint.rehearse(out, "checkpoint", about | vars(at) | weights)
    if rank == 0:
        files.set_aside([final])  # with it the folder counts as finished
        start_rows(metrics, at.step, at.evaluated, asdict(cfg), device)
        sizes = " + ".join(f"{n / 1e6:.2f} M {part}" for part, n in count.items())
        tell(f"{out}: {sizes} parameters to train, {len(alphabet.tokens)} tokens, {len(alphabet.variables)} variables, "
             f"checkpoints of {size / 1e6:.0f} MB")  # fmt: skip

    def save(must=True):  # on all ranks, which give what they have of the weights
        parts = dict(state_dict=raw_model.state_dict(), optimizer=optimizer.state_dict(),
                     lr_scheduler=dict(step=at.step, points=points), scaler=scaler.state_dict())  # fmt: skip
        saver(out / f"checkpoint_{at.step}", (parts, about | vars(at), bundle), must)
        if rank == 0:
            prune(out, cfg.checkpoint_interval)

    call = hardware.wrap(raw_model, "" if cfg.compile_mode == "off" else cfg.compile_mode)
    saver = checkpoint.Saver(save_folder)
    log = to_wandb(cfg.wandb_mode if rank == 0 else "disabled", cfg.project, cfg.entity, cfg.name, asdict(cfg))

    def write(row):
        append_row(metrics, row)
        log(row)

    # --- schedule, evaluation, stop -------------------------------------------------------
    def lr_at(step):  # linear between the points: a pure function of the step
        for (left, low), (right, high) in zip(points, points[1:], strict=False):
            if left <= step < right:
                share = min(1.0, (step + 1 - left) / (right - left))  # a rise of part of a step is one step
                return low + (high - low) * share
        return points[-1][1] if step >= points[-1][0] else points[0][1]

    @torch.no_grad()
    def evaluate():
        """Fixed samples and problems of skeletons that are never trained on -> a row of numbers; None if stopped."""
        sums, solved = dict(loss=0.0, mrr=0.0, top1=0.0, tokens=0), 0
        problems = range(rank, min(cfg.val_problems, cfg.val_size), world)
        with hardware.whole(raw_model) as whole:
            for batch in data.val[rank::world]:
                if stop:
                    break
                with hardware.autocast:
                    nats, report = whole.loss(place(batch))
                ranks = report["rank"][report["counted"]].cpu().double()
                new = dict(loss=nats.item(), mrr=(1 / ranks).sum().item(), top1=(ranks == 1).sum().item())
                sums = {name: sums[name] + number for name, number in (new | dict(tokens=len(ranks))).items()}
            if not stop:
                solved = solve_problems(whole, data.val, problems, cfg.val_choices, cfg.seed, stop)
        (stopped,), totals = hardware.largest(bool(stop)), hardware.total(*sums.values(), solved)
        if stopped:
            return None
        row = dict(zip(sums, totals, strict=False))
        row = {name: row[name] / row["tokens"] for name in ("loss", "mrr", "top1")}
        return row | (dict(recovery=totals[-1] / min(cfg.val_problems, cfg.val_size)) if cfg.val_problems else {})

    def due():  # an evaluation
        return at.evaluated < at.step and (over or at.step % cfg.validate_interval == 0)

    # --- train ----------------------------------------------------------------------------
    val_row, over = {}, at.step >= cfg.steps
    stream = data.train.iterate(at.step, max(0, cfg.steps - at.step))
    with data.train, Stop() as stop, Progress(last, at.step, show=rank == 0 and cfg.verbose) as progress:
        start = saved_at = mark = time.monotonic()
        seen, drawing, stop_now, late = 0, 0.0, 0, 0  # samples, seconds of data since mark; signal; a save is due
        while True:
            if not due():  # else the run was stopped while it evaluated
                before = time.monotonic()
                micro = [place(next(stream)) for _ in range(cfg.gradient_accumulation_steps)]
                drawing += time.monotonic() - before
                (targets,) = hardware.total(sum((batch["labels"] >= 0).sum().item() for batch in micro))
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(at.step)
                loss = 0.0
                for m, batch in enumerate(micro):
                    torch.manual_seed(hash((cfg.seed, at.step, m * world + rank)))  # of dropout and feature noise
                    hardware.travel(call, m == len(micro) - 1)  # one reduction a step
                    with hardware.autocast:
                        nats, _ = raw_model.loss(batch, call)
                    scaler.scale(nats * (world / targets)).backward()  # what travels is the mean over ranks
                    loss += nats.item() / targets
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.clip or math.inf).item()
                now = time.monotonic()
                late = cfg.save_minutes and now - saved_at > 60 * cfg.save_minutes
                over = at.step + 1 >= last or 0 < cfg.max_seconds < now - start
                (loss,) = hardware.total(loss)
                bad = not math.isfinite(loss + norm)
                bad, stop_now, late, over = hardware.largest(bad, int(stop.signal), late, over)
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                elif scaler.is_enabled():  # an overflow, perhaps of another rank: all of them skip and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                at.skipped += bool(bad)
                at.skipped_in_row = at.skipped_in_row + 1 if bad and scaler.get_scale() <= 1 else 0
                if at.skipped_in_row == BAD_STEPS:
                    raise DataError(f"{BAD_STEPS} steps in a row not finite, try a smaller --lr; good: {saver.last}")
                samples = cfg.batch_size * world * len(micro)
                work = (
                    count["encoder"] * micro[0]["x_tensors"].shape[1]
                    + count["decoder"] * micro[0]["input_ids"].shape[1]
                )
                at.step, at.samples, seen = at.step + 1, at.samples + samples, seen + samples
                at.total_pflops += 6e-15 * samples * work
                progress(loss=f"{loss:.3f}", **val_row, lr=f"{lr_at(at.step - 1):.1e}")
                if rank == 0 and (at.step % cfg.log_interval == 0 or over):
                    write(dict(
                        step=at.step, split="train", loss=loss, lr=lr_at(at.step - 1), grad_norm=norm,
                        samples=at.samples, samples_per_s=seen / (now - mark), data_share=drawing / (now - mark),
                        pflops=at.total_pflops, seconds=now - start, peak_mb=peak_mb(device),
                        skipped=at.skipped))  # fmt: skip
                    seen, drawing, mark = 0, 0.0, now
            if due() and not stop_now:
                before, row = time.monotonic(), evaluate()
                (stop_now,) = hardware.largest(0 if row else int(stop.signal))
                mark += time.monotonic() - before
                if row:
                    at.evaluated, val_row = at.step, {n: f"{number:.3f}" for n, number in row.items() if n != "loss"}
                    if rank == 0:
                        write(dict(step=at.step, split="val", samples=at.samples) | row)
                        if not cfg.verbose:
                            tell(f"step {at.step} | val " + " | ".join(f"{k} {v:.4f}" for k, v in row.items()))
                    if row["loss"] < at.best_val_loss:
                        at.best_val_loss, at.best_step = row["loss"], at.step
            if over or stop_now:
                save()
                break
            if late or cfg.checkpoint_interval and at.step % cfg.checkpoint_interval == 0:
                save(must=not late)
                saved_at = time.monotonic()

    # --- summary --------------------------------------------------------------------------
    if rank == 0 and over:
        if at.step >= cfg.steps:
            save_config(bundle, out)
            weights = checkpoint.read(out / f"checkpoint_{at.step}" / "state_dict.pt")  # a rank may have a part alone
            save_model(raw_model, out, weights, dtype=cfg.dtype)  # last: with it the run counts as finished
        draw_losses([metrics], out / "loss.png", tell)
    again = " ".join(["python", *sys.argv, "--resume-from", "auto"])
    next_command = f"python generate.py formula --model {out} --data points.csv" if at.step >= cfg.steps else again
    tell(f"{out}: step {at.step} of {last}, best val_loss {at.best_val_loss:.4f} at step {at.best_step}, "
         f"{time.monotonic() - start:.0f} s, peak {peak_mb(device):.0f} MB; next: {next_command}")  # fmt: skip
    hardware.close()
    return dict(step=at.step, best=at.best_val_loss, stopped=int(stop_now))


if __name__ == "__main__":
    launch(main, cfg)
