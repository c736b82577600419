"""Train symbolic regression: a set of points (x, y) in, the formula out.

    python train_sr.py                                               # nearly three hours of a core
    ./scripts/train.sh configs/test                                  # every part once, in seconds
    python train_sr.py -c configs/v23.0-3M/train.yaml -ci 250000     # a bundle, for a GPU
    python train_sr.py --resume                                      # go on where it stopped
    torchrun --nproc-per-node 2 train_sr.py --batch_size 32          # two processes or GPUs

KEY=VALUE is --key value. --fsdp lets the processes share the weights. The formulas are drawn while
the model trains.

Writes models/ansr-models/<bundle>/: checkpoint_<step>/ folders, metrics.jsonl, loss.png, and at
the end model.yaml, tokenizer.yaml and state_dict.pt: all that `generate.py formula` needs. Each
folder is a bundle too. In a notebook, paste this file into a cell, then main(Config(steps=100)).

B batch, M points, D variables, T tokens, V tokens of the alphabet.
"""

import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
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
)
from data_utils.errors import DataError, UsageError
from data_utils.formulas.bundles import load_flags, save_config
from data_utils.formulas.dataset import DataConfig
from data_utils.formulas.skeletons import PoolConfig
from data_utils.launch import check_torchrun, ends_cleanly, launch
from data_utils.overrides import Overrides

Norm = Literal["rms", "rms_set", "layer", "none"]
CompileMode = Literal["", "off", "default", "reduce-overhead", "max-autotune"]


@dataclass
class ModelConfig:
    encoder_max_n_variables: int = 0  # columns of the points with y; 0 = one more than variables
    encoder_dim: int = 128  # width of the encoder
    encoder_n_heads: int = 4  # its attention heads
    encoder_n_isab: int = 0  # its blocks that attend by inducing points
    encoder_n_sab: int = 2  # its blocks after the pooling
    encoder_n_inducing_points: int = 32  # inducing points of each isab block
    encoder_n_seeds: int = 12  # vectors that a set becomes
    encoder_ffn_hidden_dim: int = 384  # inner width of its feed-forward parts
    encoder_dropout: float = 0.0  # on what each of its layers adds
    encoder_attn_norm: Norm = "rms_set"  # before its attention; rms_set is over points and width
    encoder_ffn_norm: Norm = "rms_set"  # before its feed-forward parts
    encoder_output_norm: Norm = "rms_set"  # after its last block
    decoder_input_dim: int = 128  # width of the vectors of a set
    decoder_model_dim: int = 128  # width of the decoder
    decoder_n_heads: int = 4  # its attention heads
    decoder_n_layers: int = 3  # its blocks
    decoder_max_seq_len: int = 64  # tokens of a sequence T, prompt included
    decoder_ffn_hidden_dim: int = 384  # inner width of its feed-forward parts
    decoder_dropout: float = 0.0  # on what each of its layers adds
    decoder_block_self_attn_norm: Norm = "rms"  # before its self-attention
    decoder_block_cross_attn_norm: Norm = "rms"  # before its attention to the points
    decoder_block_ffn_norm: Norm = "rms"  # before its feed-forward parts
    decoder_cross_attn_kv_norm: Norm = "rms"  # on the vectors of a set
    decoder_output_norm: Norm = "rms"  # before its head
    decoder_use_rope_self_attn: bool = True  # rotary positions of the tokens
    decoder_use_rope_cross_attn: bool = False  # rotary positions of the vectors of a set
    float_features: Literal["fourier", "ieee"] = "fourier"  # how the encoder reads a number
    pre_encoder_noise_scale: float = 0.1  # noise on ieee features in training
    use_checkpointing: bool = False  # less memory for more time


# A `cosmetic` field may change on a resume, and the run still ends with the same bits. Names in
# `also` are further names of the flag. Of a field and the one that it is `instead` of, the one that
# is given resets the other to 0.
@dataclass
class SRConfig(ModelConfig, PoolConfig, DataConfig):
    # run
    config: str = cosmetic("")  # train.yaml of a bundle
    output_dir: str = cosmetic("", short="-o", also="out")  # "" = models/ansr-models/<bundle>
    verbose: bool = cosmetic(True, short="-v")  # a bar; else a line per validation
    resume_from: str = cosmetic(  # a checkpoint or output folder; auto or alone: the newest, if any
        "", also="resume", bare="auto"
    )
    resume_step: int = cosmetic(-1)  # step of that checkpoint, if it does not say
    fresh: bool = cosmetic(False)  # start over; the old folder is renamed to *.bak, *.bak2, ...
    init_from: str = cosmetic("")  # fine-tune: checkpoint whose weights a new run begins with
    seed: int = 0  # of weights, data and dropout
    # data
    skeleton_pool: str = ""  # saved pool to draw from; "" = drawn while training
    num_workers: int = cosmetic(  # data processes; 0 = inside the training process
        0, short="-w", also=("dataset_workers", "workers")
    )
    # optimization
    lr: float = flag(1e-3, also="learning_rate")  # peak learning rate
    min_lr_ratio: float = flag(0.0, also="lr_min_ratio")  # last rate as a share of the peak
    warmup: float = flag(0.05, also="warmup_share")  # share of the steps with a rising rate
    warmup_steps: int = flag(0, instead="warmup")  # steps of linear warmup; 0 = as warmup says
    cooldown: float = 0.4  # share of the steps with a falling rate
    lr_schedule: str = ""  # points 0:0,100000:1e-4,... instead: linear between, flat after the last
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "muon"  # 8bit: moments in 1/4 of the memory
    muon: float = 8.0  # rate of the hidden matrices with muon, in units of lr
    weight_decay: float = 0.01  # decay, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    clip: float = flag(2.0, also=("grad_clip", "gradient_clip"))  # largest gradient norm; 0 = off
    batch_size: int = 64  # samples per micro-batch and process
    gradient_accumulation_steps: int = flag(  # micro-batches per optimizer step
        1, also=("grad_accum_steps", "accumulate")
    )
    steps: int = 40000  # length of the schedule in optimizer steps
    max_steps: int = cosmetic(0)  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = cosmetic(0.0)  # stop after so many seconds; 0 = off
    # evaluation, checkpoints, hardware
    validate_interval: int = cosmetic(  # steps between validations
        1000, short="-vi", also=("eval_interval", "val_every")
    )
    val_size: int = cosmetic(1024)  # fixed validation samples
    val_batch_size: int = cosmetic(128)  # validation samples at a time
    val_problems: int = cosmetic(48)  # problems solved at each validation; 0 = off
    val_choices: int = cosmetic(64)  # candidates for each of them
    checkpoint_interval: int = cosmetic(0, short="-ci")  # steps between kept checkpoints; 0 = off
    save_minutes: float = cosmetic(10.0)  # minutes between rolling saves; 0 = only when stopped
    log_interval: int = cosmetic(50, also="log_steps")  # steps per row of metrics
    wandb_mode: Literal["disabled", "online", "offline"] = cosmetic("disabled", also="mode")  # W&B
    project: str = cosmetic("petri-sr")  # of W&B
    entity: str = cosmetic("")  # of W&B
    name: str = cosmetic("")  # of the run in W&B
    device: str = cosmetic("auto")  # auto, cpu, cuda, cuda:1, mps
    fsdp: bool = cosmetic(False)  # processes share the weights and the optimizer's state (FSDP2)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    compile: bool = cosmetic(False)  # torch.compile, in mode default unless compile_mode says more
    compile_mode: CompileMode = cosmetic("")  # torch.compile in this mode; "" and off: as --compile

    # --help shows these, by purpose; --help all shows every flag.
    common = dict(
        data="variables operators num_workers",
        model="encoder_dim decoder_model_dim decoder_n_layers",
        training="lr batch_size steps validate_interval",
        run="output_dir resume_from fresh device",
    )
    # Flags of other scripts, and why they are not here.
    absent = dict.fromkeys(
        ("epochs", "max_epochs"),
        "formulas are drawn anew at each step: --steps says how many\ntry: without --epochs --max_epochs",
    ) | dict.fromkeys(
        ("data", "data_dir", "data_paths"),
        "it trains on formulas that it draws\nfix: python generate.py formula --data TABLE finds one for a table",
    )

    @property
    def remedy(self):
        """Return flags that need less memory and keep the size of a step."""
        accumulate = 2 * self.gradient_accumulation_steps
        return f"--batch_size {max(1, self.batch_size // 2)} --accumulate {accumulate}"


Config = SRConfig


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for."""
    return from_cli(SRConfig, __doc__, argv, load=load_flags, overrides=Overrides())


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = parse()

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data_utils import checkpoint, distributed, files
from data_utils.formulas.bundles import open_formulas
from data_utils.formulas.checkpoint_folders import find_folder, prune, save_folder, step_of, sweep
from data_utils.formulas.model_files import build_model, load_source, save_model
from data_utils.formulas.search import solve_problems
from data_utils.metrics import append_row, draw_losses, start_rows, to_wandb
from data_utils.progress import Progress, peak_mb, say
from data_utils.stop import Stop
from models.formula_model import ARGUMENTS
from models.optim.adamw8bit import AdamW8bit
from models.optim.muon import Muon

BAD_STEPS = 10  # steps in a row without a finite loss and gradient that end a run
# The parts of a run, each with the file that holds it in a checkpoint folder.
PART_FILES = dict(model_state="state_dict", optimizer_state="optimizer", amp_scaler="scaler")
SAVED = (*PART_FILES.values(), "lr_scheduler")  # the files, without their .pt


@dataclass
class RunState:
    """Where the run is. All of it is saved, and a resumed run goes on from it."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # step of the last whole evaluation
    best_val_loss: float = math.inf  # lowest validation loss
    best_step: int = 0  # step that has it
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_row: int = 0  # those since the last good step
    samples: int = 0  # samples trained on, by all processes
    total_pflops: float = 0.0  # arithmetic done, in 1e15 operations


def kind_of(name, parameter):
    """Return "hidden" or "last" for a matrix; "" for other parameters, which have no decay."""
    no_decay = ("token.", "slots.", "seeds", "inducing")  # embeddings, and vectors that are learned
    if parameter.ndim != 2 or any(word in name for word in no_decay):
        return ""
    return "last" if name.startswith("head.3") else "hidden"


def schedule(cfg):
    """Return points (step, rate): linear between them, flat after the last. Raises UsageError."""
    if not cfg.lr_schedule:
        rise = min(cfg.warmup_steps, cfg.steps) or cfg.warmup * cfg.steps
        fall = max(rise, (1 - cfg.cooldown) * cfg.steps)
        begin = 0.0 if rise else cfg.lr
        return [(0, begin), (rise, cfg.lr), (fall, cfg.lr), (cfg.steps, cfg.min_lr_ratio * cfg.lr)]
    try:
        points = [tuple(map(float, point.split(":"))) for point in cfg.lr_schedule.split(",")]
        if any(len(point) != 2 for point in points) or points != sorted(points):
            raise ValueError
    except ValueError:
        expected = "expected STEP:RATE,STEP:RATE,... by rising step"
        raise UsageError(f"--lr_schedule {cfg.lr_schedule}: {expected}") from None
    return points


def check(cfg):
    """Raise UsageError for a value that no run can have."""
    at_least(cfg, 1, "batch_size", "gradient_accumulation_steps", "steps", "validate_interval")
    at_least(cfg, 1, "val_batch_size", "log_interval", "val_choices", "val_size")
    at_least(cfg, 0, "num_workers", "warmup", "cooldown", "weight_decay", "clip", "max_steps")
    at_least(cfg, 0, "max_seconds", "seed", "save_minutes", "checkpoint_interval", "val_problems")
    at_least(cfg, 0, "lr", "min_lr_ratio", "muon", "warmup_steps")
    below_one(cfg, "beta1", "beta2")
    if cfg.warmup_steps and cfg.warmup:
        both = f"--warmup_steps {cfg.warmup_steps} --warmup {cfg.warmup}"
        raise UsageError(f"{both}: expected one of them")
    if cfg.warmup + cfg.cooldown > 1:
        shares = f"--warmup {cfg.warmup} --cooldown {cfg.cooldown}"
        raise UsageError(f"{shares}: shares of the steps, together at most 1")


@ends_cleanly
def main(cfg):
    """Train as `cfg` says -> dict(step, best_val_loss, stopped: the signal that ended it, or 0)."""
    cfg = complete(cfg, SRConfig, load=load_flags)
    check(cfg)
    # The rate follows from --steps alone. A run that stops early and goes on takes the same steps.
    points = schedule(cfg)
    last_step = min(cfg.steps, cfg.max_steps or cfg.steps)  # where this command ends
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cfg.device != "cpu" and torch.cuda.is_available() else "float32"

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
    if cfg.fsdp and world == 1:
        raise UsageError(
            "--fsdp shares a model among processes, and this is the only one\n"
            f"try: torchrun --standalone --nproc-per-node 2 {shlex.join(sys.argv)}"
        )

    # --- data -----------------------------------------------------------------------------
    bundle_name = Path(cfg.config).resolve().parent.name if cfg.config else "sr-cpu"
    folder = Path(cfg.output_dir or f"models/ansr-models/{bundle_name}")
    data = open_formulas(cfg, rank, world)
    alphabet = data.alphabet
    if cfg.warmup_steps > cfg.steps:
        log(f"warmup cut from {cfg.warmup_steps} to {cfg.steps} steps, the whole schedule")

    def place(batch):
        """Return a batch with its tensors on the device."""
        return {name: tensor.to(device) for name, tensor in batch.items()}

    # --- model and optimizer --------------------------------------------------------------
    model_args = {name: getattr(cfg, name) for name in ARGUMENTS}
    raw_model = build_model(alphabet, model_args)  # saved without _orig_mod. and module.
    raw_model.to(device)
    # Shards come before the optimizer, whose state then has their shapes.
    if cfg.fsdp:
        distributed.shard(raw_model, cfg.optimizer)
    trained = dict(raw_model.named_parameters())
    # Encoder and decoder are counted apart: one works per point, the other per token.
    encoder_size = sum(p.numel() for name, p in trained.items() if name.startswith("encoder"))
    decoder_size = sum(p.numel() for p in trained.values()) - encoder_size
    hidden_weights = [p for name, p in trained.items() if kind_of(name, p) == "hidden"]
    last_weights = [p for name, p in trained.items() if kind_of(name, p) == "last"]
    other_weights = [p for name, p in trained.items() if kind_of(name, p) == ""]
    # Muon steps the groups with `times`, at so many times the rate, and the others as AdamW does.
    groups = [
        dict(params=hidden_weights, weight_decay=cfg.weight_decay, times=cfg.muon),
        dict(params=last_weights, weight_decay=cfg.weight_decay, times=0),
        dict(params=other_weights, weight_decay=0, times=0),
    ]
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer == "muon":
        optimizer = Muon(groups, lr=cfg.lr, betas=betas)
    elif cfg.optimizer == "adamw_8bit":
        optimizer = AdamW8bit(groups, lr=cfg.lr, betas=betas, seed=cfg.seed)
    else:
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, fused=fused)
    # One dict both saves and loads, so that no part of a run is saved and then forgotten.
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)

    # --- resume ---------------------------------------------------------------------------
    state = RunState()
    metrics_file = folder / "metrics.jsonl"
    model_file = folder / "state_dict.pt"  # a run that has it counts as finished
    # A second run in this folder would overwrite the files of the first. The lock lies beside it,
    # since --fresh renames the folder itself.
    if rank == 0:
        files.lock_run(folder.parent, folder.name)
        sweep(folder)
    resumed_from, saved, saved_parts = find_folder(cfg.resume_from, cfg.fresh, folder, "sr", SAVED)
    snapshots = checkpoint.numbered_files(folder, r"checkpoint_(\d+)")
    # The guide resumes by name only. Starting over here would bury hours of work in a *.bak.
    unfinished = snapshots and not model_file.exists()
    if unfinished and not resumed_from and not cfg.fresh:
        raise UsageError(
            f"{folder} holds an unfinished run, up to {snapshots[0].name}: --resume-from auto goes "
            "on, --fresh keeps it as *.bak\ntry: --resume-from auto\ntry: --fresh"
        )
    # A resume compares this with its own and names each difference that ends exactness.
    header = dict(
        kind="sr",
        format=1,
        tokenizer="formulas",
        tokenizer_hash=" ".join(alphabet.tokens),
        data_hash=data.hash,
        world_size=world,
        steps=cfg.steps,
        torch=str(torch.__version__),
        config=asdict(cfg),
        model_args=model_args,
    )
    if resumed_from:
        missing = [name for name in SAVED if name not in saved_parts]
        needed = [f"{name}.pt" for name in ("state_dict", "optimizer") if name in missing]
        if needed:
            raise UsageError(f"{resumed_from} has no {', '.join(needed)}: nothing to go on from")
        step = step_of(resumed_from, saved, cfg.resume_step)
        if saved and saved["step"] != step:
            files.warn(f"{resumed_from} is of step {saved['step']}, --resume-step {step} is taken")
        for name in missing:
            log(f"{resumed_from} has no {name}.pt: begun anew")
        # A folder that someone renamed or copied in part may lack all but the weights.
        saved = header | asdict(state) | saved | dict(step=step)
        saved["data_hash"] = saved["data_hash"] or data.hash  # older files have none
        tensors = {name: saved_parts.get(file, {}) for name, file in PART_FILES.items()}
        checkpoint.load_parts(parts, saved | tensors, resumed_from, header)
        state = RunState(**{name: saved[name] for name in vars(state)})
        log(checkpoint.resume_notice(resumed_from, saved, header, cosmetic_names(cfg)))
        if rank == 0:
            # A rewind: a later --resume must not jump back to the branch that is left here.
            checkpoint.set_aside_later(snapshots, state.step)
        # Losses on other data can't be compared.
        if saved["data_hash"] != data.hash:
            log("other data than before: best begins anew")
            state.best_val_loss = math.inf
            state.best_step = 0
        del saved, saved_parts, tensors
    # Fine-tuning: where nothing is to be resumed, the weights may be those of another run.
    if cfg.init_from and not resumed_from:
        source = load_source(cfg.init_from)
        log(checkpoint.start_from(cfg, parts, source, header))
        del source
    # The same command, started again after its end, is no error.
    complete_run = state.step < cfg.steps or model_file.exists()
    if state.step >= last_step and state.evaluated == state.step and complete_run:
        limits = [f"--steps {2 * state.step}"] if state.step >= cfg.steps else []
        if 0 < cfg.max_steps <= state.step:
            limits.append(f"--max_steps {2 * state.step}")
        names = " and ".join(limit.split()[0] for limit in limits)
        further = f"a larger {names} goes on\nnext: {' '.join(limits)}"
        best = f"best val_loss {state.best_val_loss:.4f}"
        log(f"{folder}: finished at step {state.step}, {best}; {further}")
        distributed.close()
        return dict(step=state.step, best_val_loss=state.best_val_loss, stopped=0)

    compile_mode = "" if cfg.compile_mode == "off" else cfg.compile_mode
    if cfg.compile and not compile_mode:
        compile_mode = "default"
    # Checkpoints hold raw_model: both wrappers prefix the names of the weights.
    model = torch.compile(raw_model, mode=compile_mode) if compile_mode else raw_model
    if world > 1 and not cfg.fsdp:
        model = DistributedDataParallel(model)
    saver = checkpoint.Saver(save_folder)

    def save(must=True):
        """Save a checkpoint folder. All ranks take part: with --fsdp each has a part."""
        tensors = {PART_FILES[name]: part.state_dict() for name, part in parts.items()}
        tensors["lr_scheduler"] = dict(step=state.step, points=points)
        content = (tensors, header | asdict(state), data.bundle)
        saver(folder / f"checkpoint_{state.step}", content, must)
        if rank == 0:
            prune(folder, cfg.checkpoint_interval)

    if rank == 0:
        if not resumed_from:
            files.set_aside([folder])
        folder.mkdir(parents=True, exist_ok=True)
    # A full disk or a value that can't be saved is found here, not after an hour of training.
    tensors = {name: part.state_dict() for name, part in parts.items()}
    size = checkpoint.rehearse(folder, "checkpoint", header | asdict(state) | tensors)
    del tensors
    # The model of an earlier end goes aside: a run counts as finished where that file is.
    if rank == 0:
        files.set_aside([model_file])
        start_rows(metrics_file, state.step, state.evaluated, asdict(cfg), device)
        sizes = f"{encoder_size / 1e6:.2f} M encoder + {decoder_size / 1e6:.2f} M decoder"
        log(
            f"{folder}: {sizes} parameters to train, {len(alphabet.tokens)} tokens, "
            f"{len(alphabet.variables)} variables, checkpoints of {size / 1e6:.0f} MB"
        )
    wandb_mode = cfg.wandb_mode if rank == 0 else "disabled"
    send_row = to_wandb(wandb_mode, cfg.project, cfg.entity, cfg.name, asdict(cfg))

    def write(row):
        """Append a row to the metrics, and send it to W&B."""
        append_row(metrics_file, row)
        send_row(row)

    # --- schedule, evaluation, stop -------------------------------------------------------
    def lr_at(step):
        """Return the rate, a pure function of the step: linear between the points."""
        for (left, low), (right, high) in zip(points, points[1:], strict=False):
            if left <= step < right:
                # A warmup may take less than a step. The rate then begins at the peak.
                share = min(1.0, (step + 1 - left) / (right - left))
                return low + (high - low) * share
        return points[-1][1] if step >= points[-1][0] else points[0][1]

    @torch.no_grad()
    def evaluate():
        """Score the same samples every time, of skeletons that are never trained on.

        Returns a row of means over their tokens, with the share of problems that were solved; None
        if a signal came meanwhile.
        """
        sums = dict.fromkeys(("loss", "mrr", "top1", "tokens"), 0.0)
        solved = 0
        problems = min(cfg.val_problems, cfg.val_size)
        choices = cfg.val_choices
        with distributed.full_weights(raw_model) as full_model:
            for batch in data.val[rank::world]:
                if stop:
                    break
                with autocast:
                    nats, report = full_model.loss(place(batch))
                ranks = report["rank"][report["counted"]].cpu().double()  # 1 = most likely
                sums["loss"] += nats.item()
                sums["mrr"] += (1 / ranks).sum().item()
                sums["top1"] += (ranks == 1).sum().item()
                sums["tokens"] += len(ranks)
            if not stop:
                numbers = range(rank, problems, world)
                solved = solve_problems(full_model, data.val, numbers, choices, cfg.seed, stop)
        # A signal may have reached some ranks only. All of them drop the evaluation then.
        (stopped,) = distributed.max_over_ranks(bool(stop))
        *totals, solved = distributed.sum_over_ranks(*sums.values(), solved)
        if stopped:
            return None
        totals = dict(zip(sums, totals, strict=True))
        row = {name: totals[name] / totals["tokens"] for name in ("loss", "mrr", "top1")}
        if problems:
            row["recovery"] = solved / problems
        return row

    # --- train ----------------------------------------------------------------------------
    shown = {}  # newest validation figures, for the progress bar
    finished = state.step >= last_step  # the last step is done; its evaluation may be missing
    stop_signal = 0
    save_due = False
    # A run that was stopped while it evaluated begins with that evaluation.
    at_interval = state.step % cfg.validate_interval == 0
    repeat_evaluation = state.evaluated < state.step and (finished or at_interval)
    # A batch is a function of the seed and its number, so the stream can begin at any step.
    stream = data.train.iterate(state.step, max(0, cfg.steps - state.step))
    bar = Progress(last_step, state.step, show=rank == 0 and cfg.verbose)
    # The first signal only sets `stop`: the step that is under way is finished and saved.
    with data.train, Stop() as stop, bar as progress:
        start = saved_at = mark = time.monotonic()
        samples_since_mark = 0
        data_seconds = 0.0  # waited for data since mark
        while True:
            if not repeat_evaluation and not finished:
                # 1. Data: the micro-batches of this step that are this rank's.
                before = time.monotonic()
                numbers = range(cfg.gradient_accumulation_steps)
                micro_batches = [place(next(stream)) for _ in numbers]
                data_seconds += time.monotonic() - before
                # The loss is a mean over all targets of the step. A mean of means would give those
                # of a short formula more weight.
                local_targets = sum((batch["labels"] >= 0).sum().item() for batch in micro_batches)
                (targets,) = distributed.sum_over_ranks(local_targets)

                # 2. Forward and backward.
                loss = 0.0
                for m, batch in enumerate(micro_batches):
                    # Dropout and noise follow from seed, step and micro-batch, on whatever rank.
                    torch.manual_seed(hash((cfg.seed, state.step, m * world + rank)))
                    last = m == len(micro_batches) - 1  # gradients are averaged once a step
                    if cfg.fsdp:
                        model.set_requires_gradient_sync(last)
                    elif world > 1:
                        model.require_backward_grad_sync = last
                    with autocast:
                        nats, _ = raw_model.loss(batch, model)
                    # The mean over ranks is taken, so the sum needs the factor `world`.
                    scaler.scale(nats * (world / targets)).backward()
                    loss += nats.item() / targets

                # 3. Step. All ranks take or skip it together.
                rate = lr_at(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # The limit is meant for true gradients, so the scale goes first.
                scaler.unscale_(optimizer)
                max_norm = cfg.clip or math.inf
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_norm).item()
                now = time.monotonic()
                save_due = 0 < 60 * cfg.save_minutes < now - saved_at
                finished = state.step + 1 >= last_step or 0 < cfg.max_seconds < now - start
                # A rank that left or skipped alone would leave the others waiting for it.
                (loss,) = distributed.sum_over_ranks(loss)
                bad, stop_signal, save_due, finished = distributed.max_over_ranks(
                    not math.isfinite(loss + norm), int(stop.signal), save_due, finished
                )
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                elif scaler.is_enabled():  # an overflow of some rank: skip, and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                # A skipped step counts too: its formulas and its rate don't come again.
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

                # 4. Log.
                samples = cfg.batch_size * world * len(micro_batches)
                points_read = micro_batches[0]["x_tensors"].shape[1]  # M
                tokens_read = micro_batches[0]["input_ids"].shape[1]  # T
                state.samples += samples
                # A weight takes 2 operations per position forward, and 4 backward.
                work = encoder_size * points_read + decoder_size * tokens_read
                state.total_pflops += 6e-15 * samples * work
                samples_since_mark += samples
                progress(loss=f"{loss:.3f}", **shown, lr=f"{rate:.1e}")
                if state.step % cfg.log_interval == 0 or finished:
                    seconds = now - mark
                    if rank == 0:
                        row = dict(
                            step=state.step,
                            split="train",
                            loss=loss,
                            lr=rate,
                            grad_norm=norm,
                            samples=state.samples,
                            samples_per_s=samples_since_mark / seconds,
                            data_share=data_seconds / seconds,
                            pflops=state.total_pflops,
                            seconds=now - start,
                            peak_mb=peak_mb(device),
                            skipped=state.skipped,
                        )
                        write(row)
                    samples_since_mark = 0
                    data_seconds = 0.0
                    mark = now

            # 5. Evaluate.
            at_interval = state.step % cfg.validate_interval == 0
            evaluate_now = state.evaluated < state.step and (finished or at_interval)
            repeat_evaluation = False
            if evaluate_now and not stop_signal:
                before = time.monotonic()
                val_row = evaluate()
                (stop_signal,) = distributed.max_over_ranks(0 if val_row else int(stop.signal))
                mark += time.monotonic() - before  # speed is that of training alone
                # An evaluation that a signal cut short is repeated when the run goes on.
                if val_row:
                    state.evaluated = state.step
                    shown = {name: f"{val_row[name]:.3f}" for name in val_row if name != "loss"}
                    if val_row["loss"] < state.best_val_loss:
                        state.best_val_loss = val_row["loss"]
                        state.best_step = state.step
                    if rank == 0:
                        write(dict(step=state.step, split="val", samples=state.samples) | val_row)
                    if not cfg.verbose:
                        figures = " | ".join(f"{name} {val_row[name]:.4f}" for name in val_row)
                        log(f"step {state.step} | val {figures}")

            # 6. Save. A disk that is full for a while ends no run: a rolling save may fail.
            leave = finished or stop_signal
            every = cfg.checkpoint_interval
            if leave or save_due or (every > 0 and state.step % every == 0):
                save(must=bool(leave or not save_due))
                saved_at = time.monotonic()

            # 7. Leave.
            if leave:
                break

    # --- summary --------------------------------------------------------------------------
    if rank == 0 and finished:
        if state.step >= cfg.steps:
            save_config(data.bundle, folder)
            # The weights come from the checkpoint: with --fsdp this rank has only a part of them.
            weights = checkpoint.read(folder / f"checkpoint_{state.step}" / "state_dict.pt")
            # This comes last: the run counts as finished from here on.
            save_model(raw_model, folder, weights, dtype=cfg.dtype)
        draw_losses([metrics_file], folder / "loss.png", log)
    if state.step >= cfg.steps:
        table = os.path.relpath(files.root() / "benchmarks" / "pendulum.csv")
        model = shlex.quote(str(folder))
        next_command = f"python generate.py formula --model {model} --data {shlex.quote(table)}"
    else:
        next_command = "--resume-from auto"
    best = f"best val_loss {state.best_val_loss:.4f} at step {state.best_step}"
    if state.best_val_loss == math.inf:
        best = "not evaluated yet"
    log(
        f"{folder}: step {state.step} of {max(state.step, last_step)}, {best}, "
        f"{time.monotonic() - start:.0f} s, "
        f"peak {peak_mb(device):.0f} MB; next: {next_command}"
    )
    distributed.close()
    return dict(step=state.step, best_val_loss=state.best_val_loss, stopped=int(stop_signal))


if __name__ == "__main__":
    launch(main, cfg)
