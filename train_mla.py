"""Train latent attention and a router over the three frozen experts of train_expert.py.

    python train_mla.py                                  # after the three, see train_expert.py
    python train_mla.py --use_vector_store               # with a memory: kNN over training contexts
    python train_mla.py --resume                         # go on where it stopped
    python train_mla.py --config configs/mla/smoke.yaml  # a bundle of flags
    torchrun --nproc-per-node 2 train_mla.py             # several GPUs

Writes nanothink_mla.pt (best), nanothink_mla_epoch{N}.pt, nanothink_mla_interrupted.pt,
nanothink_mla_metrics.jsonl, nanothink_mla_loss.png and, with a memory, nanothink_mla_store.npz to
--checkpoint_dir. KEY=VALUE is --key value. In a notebook, paste this file into a cell, then call
main(Config(steps=100)).

B batch, T time, V vocabulary. A window is T tokens and, as targets, the T tokens that follow each.
main is that of train_expert.py, but for the parts that begin with `Differs:`.
"""

import inspect
import math
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_utils.config import at_least, complete, cosmetic, cosmetic_names, flag, from_cli, one_of
from data_utils.errors import DataError, UsageError
from data_utils.launch import check_torchrun, ends_cleanly, launch
from data_utils.overrides import Overrides


@dataclass
class ModelConfig:
    d_model: int = 384  # width C
    max_seq_len: int = 512  # tokens in a window T
    n_heads: int = 6  # attention heads H; the head dim is d_model / n_heads
    dropout: float = 0.1  # on what each layer adds to the residual stream
    rope_base: float = 10000.0  # slowest rotary wavelength, in units of 2 pi tokens


@dataclass
class MLAConfig(ModelConfig):
    n_experts: Literal[3] = 3  # one of each family; there are no others
    n_layers: int = 2  # blocks of latent attention
    ffn_mult: int = 4  # inner width of the feed-forward part, in d_model
    kv_latent_dim: int = 128  # numbers cached per token and layer; 0 = plain attention
    rope_dim: int = 32  # rotary coordinates of the key that the heads share, cached too
    entropy_reg: float = 0.01  # weight of ln 3 - entropy of the mean weights: all experts are used
    balance_reg: float = 0.01  # weight of the Switch balance loss
    z_reg: float = 0.001  # weight of the squared log-sum-exp of the router's logits


@dataclass
class DataConfig:
    tokenizer: str = "gpt2"  # gpt2, bytes, or bpe:FILE from prepare_data.py tokenizer
    val_split: float = 0.1  # share of documents held out, per domain
    data_dir: str = cosmetic("data")  # root of the domain folders
    domains: tuple[str, ...] = ()  # folders to use; none named = all
    text_field: str = cosmetic("text")  # field or column of the text in .jsonl, .csv, .parquet
    skip_bad_lines: bool = cosmetic(False)  # count and skip malformed lines instead of stopping


# A `cosmetic` field may change on a resume, and the run still ends with the same bits. Names in
# `also` are further names of the flag. Of a field and the one that it is `instead` of, the one that
# is given resets the other to 0.
@dataclass
class TrainMLAConfig(MLAConfig, DataConfig):
    # run
    checkpoint_dir: str = cosmetic("checkpoints", also="out")  # folder of all files of a run
    resume: str = cosmetic("")  # alone: newest checkpoint; auto: if there is one; or a file
    fresh: bool = cosmetic(False)  # start over; old files are renamed to *.bak, *.bak2, ...
    init_from: str = cosmetic("")  # fine-tune: checkpoint whose weights a new run begins with
    allow_partial: bool = cosmetic(False)  # load the weights that fit and list those that do not
    seed: int = 0  # of weights, data order and dropout
    transformer_ckpt: str = cosmetic("checkpoints/transformer_expert.pt")  # frozen expert
    state_space_ckpt: str = cosmetic("checkpoints/state_space_expert.pt")  # frozen expert
    diffuser_ckpt: str = cosmetic("checkpoints/diffuser_expert.pt")  # frozen expert
    use_vector_store: bool = False  # remember training contexts and what followed them
    top_k: int = 32  # neighbours asked of the store
    max_vectors: int = 100_000  # entries of the store
    # optimization
    lr: float = flag(1e-4, also="learning_rate")  # peak learning rate
    min_lr_ratio: float = flag(0.1, also="lr_min_ratio")  # floor of the cosine, share of the peak
    warmup_steps: int = 500  # steps of linear warmup; at most a tenth of the schedule
    weight_decay: float = 0.05  # AdamW decay, on matrices only
    batch_size: int = 16  # windows per micro-batch and process
    grad_accum_steps: int = flag(  # micro-batches per optimizer step
        4, also=("gradient_accumulation_steps", "accumulate")
    )
    grad_clip: float = flag(1.0, also=("gradient_clip", "clip"))  # largest gradient norm; 0 = off
    max_epochs: int = cosmetic(  # passes over as many windows as there are
        30, also="epochs", instead="steps"
    )
    steps: int = 0  # length of the schedule in optimizer steps; 0 = as max_epochs says
    max_steps: int = cosmetic(0)  # stop earlier, on the same schedule; 0 = off
    max_seconds: float = cosmetic(0.0)  # stop after so many seconds; 0 = off
    patience: int = cosmetic(5)  # epochs without improvement before an early stop; 0 = off
    # evaluation, checkpoints, hardware
    save_every: int = cosmetic(5)  # epochs between numbered snapshots
    save_minutes: float = cosmetic(10.0)  # minutes between rolling saves; 0 = only when stopped
    keep: int = cosmetic(0, also="checkpoint_limit")  # numbered snapshots kept; 0 = all
    log_interval: int = cosmetic(50, also="log_steps")  # steps per row of metrics
    eval_interval: int = cosmetic(  # steps between extra evaluations; 0 = after each epoch only
        0, also=("val_every", "validate_interval")
    )
    eval_windows: int = cosmetic(0)  # validation windows per evaluation; 0 = all
    device: str = cosmetic("auto")  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the next two say
    use_amp: bool = True  # mixed precision
    amp_dtype: Literal["bf16", "fp16"] = "bf16"  # fp16 where bf16 is slow; fp32 where both are
    compile: bool = cosmetic(False)  # torch.compile: slow to start, then faster on a GPU

    # --help shows these, by purpose; --help all shows every flag.
    common = dict(
        data="data_dir domains tokenizer",
        model="transformer_ckpt state_space_ckpt diffuser_ckpt use_vector_store",
        training="lr batch_size max_epochs steps",
        run="checkpoint_dir resume fresh device",
    )
    # Flags of other scripts, and why they are not here.
    absent = dict(
        fsdp="each rank needs the frozen experts as they are\n"
        "try: torchrun --standalone --nproc-per-node 2 train_mla.py"
    )

    @property
    def remedy(self):
        """Return flags that need less memory and keep the size of a step."""
        return f"--batch_size {max(1, self.batch_size // 2)} --grad_accum_steps {2 * self.grad_accum_steps}"


Config = TrainMLAConfig


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for."""
    return from_cli(Config, __doc__, argv, overrides=Overrides())


if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = parse()

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data_utils import checkpoint, distributed, files
from data_utils.metrics import append_row, averages, draw_losses, start_rows
from data_utils.progress import Progress, peak_mb, say
from data_utils.stop import Stop
from data_utils.text.experts import load_expert, load_store, save_store, typed_flags
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.router import FAMILIES, NanoThink
from models.vector_store import VectorStore

BAD_STEPS = 10  # steps in a row without a finite loss and gradient that end a run
EM_TOKENS = 50_000  # training tokens that the static mixture is fitted to
READ_TOKENS = 4_096  # tokens that are read at once where nothing is trained, if a batch has fewer


@dataclass
class RunState:
    """Where the run is. All of it is saved, and a resumed run goes on from it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    step_in_epoch: int = 0  # steps done of the next epoch
    evaluated: int = 0  # step of the last whole evaluation
    best_val_loss: float = math.inf  # lowest validation loss
    best_step: int = 0  # step that has it
    patience_used: int = 0  # whole epochs without a lower one
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_row: int = 0  # those since the last good step


def decays(name, parameter):
    """Return whether weight decay applies: to matrices, but not to embeddings, heads and A."""
    return parameter.ndim == 2 and not any(word in name for word in ("embedding", "head", "A_log"))


def check(cfg):
    """Raise UsageError for a value that no run can have."""
    at_least(cfg, 1, "d_model", "n_heads", "n_layers", "max_seq_len", "batch_size")
    at_least(cfg, 1, "grad_accum_steps", "save_every", "log_interval")
    at_least(cfg, 0, "lr", "min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip", "dropout")
    at_least(cfg, 0, "seed", "max_steps", "max_seconds", "patience", "save_minutes", "keep")
    at_least(cfg, 0, "eval_interval", "eval_windows")
    one_of(cfg, "steps", "max_epochs")
    if cfg.d_model % (2 * cfg.n_heads):
        sizes = f"--d_model {cfg.d_model} over --n_heads {cfg.n_heads}"
        raise UsageError(f"{sizes}: the head dim must be whole and even")
    if cfg.dropout >= 1:
        raise UsageError(f"--dropout {cfg.dropout}: expected a share below 1")
    # Differs: latent attention, the router and the store have limits of their own.
    at_least(cfg, 1, "top_k", "max_vectors")
    at_least(cfg, 0, "kv_latent_dim", "entropy_reg", "balance_reg", "z_reg")
    if cfg.kv_latent_dim and (cfg.rope_dim < 2 or cfg.rope_dim % 2):
        raise UsageError(f"--rope_dim {cfg.rope_dim}: expected an even number of 2 or more")


@ends_cleanly
def main(cfg):
    """Train as `cfg` says -> dict(step, best_val_loss, stopped: the signal that ended it, or 0)."""
    cfg = complete(cfg, Config)
    check(cfg)
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = dict(bf16="bfloat16", fp16="float16")[cfg.amp_dtype] if cfg.use_amp else "float32"

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
    # Differs: no --fsdp, since a frozen expert is needed whole on each rank.

    # --- data -----------------------------------------------------------------------------
    folder = Path(cfg.checkpoint_dir)
    run = "nanothink_mla"  # how the names of its files begin
    tokenizer = load_tokenizer(cfg.tokenizer)
    data = DomainText(
        cfg.data_dir,
        tokenizer,
        domains=cfg.domains,
        val_split=cfg.val_split,
        window=cfg.max_seq_len,
        cache_dir=folder,
        skip_bad_lines=cfg.skip_bad_lines,
        text_field=cfg.text_field,
        rank=rank,
        say=log,
    )
    log(data.describe())
    # Tokens differ between tokenizers, bytes don't: only losses per byte can be compared.
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)  # (V,) UTF-8 bytes of each
    # An epoch has as many micro-batches for each rank. Its last step may have fewer than others.
    batches = math.ceil(data.windows("train") / (cfg.batch_size * world)) * world
    steps_per_epoch = math.ceil(batches / (cfg.grad_accum_steps * world))

    def batch(split, index):
        """Return inputs and targets of the windows `index`: (B, T), (B, T)."""
        return [ids.to(device) for ids in data.batch(split, index)]

    # --- model and optimizer --------------------------------------------------------------
    settings = asdict(cfg) | dict(vocab_size=tokenizer.vocab_size)
    # Differs: three trained experts are arguments of the model, which copies their weights.
    names = ("vocab_size", "d_model", "max_seq_len")
    expected = {name: settings[name] for name in names} | dict(tokenizer_hash=tokenizer.hash)
    experts = {}
    settings["experts"] = {}
    flags = typed_flags(cfg, "data_dir", "domains", "text_field", "tokenizer", "d_model", "n_heads", "max_seq_len")
    for name in FAMILIES:
        experts[name], source = load_expert(settings[f"{name}_ckpt"], name, expected, flags)
        settings["experts"][name] = source["model_args"]
    arguments = inspect.signature(NanoThink).parameters
    model_args = {name: settings[name] for name in arguments}
    # Models know no flags. Sizes that don't fit each other are the user's to mend.
    try:
        raw_model = NanoThink(**model_args)  # saved without _orig_mod. and module.
    except ValueError as e:
        raise UsageError(str(e)) from e
    raw_model.to(device)
    # Differs: the experts are frozen. The store's two parameters have their place in the optimizer
    # in every run, so that a resumed run may begin to use a store.
    raw_model.start_from(experts)
    del experts
    trained = dict(raw_model.named_parameters())
    trained = {name: p for name, p in trained.items() if not name.startswith("experts.")}
    matrices = [p for name, p in trained.items() if decays(name, p)]
    others = [p for name, p in trained.items() if not decays(name, p)]
    # Decay would pull the gains of norms and the vectors of rare tokens to zero.
    groups = [
        dict(params=matrices, weight_decay=cfg.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    fused = device.type in ("cpu", "cuda")  # one kernel for all parameters, where there is one
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=fused)
    # One dict both saves and loads, so that no part of a run is saved and then forgotten.
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)

    # --- resume ---------------------------------------------------------------------------
    state = RunState()
    kind = "expert:mla"
    best_file = folder / f"{run}.pt"
    rolling_file = folder / f"{run}_interrupted.pt"
    metrics_file = folder / f"{run}_metrics.jsonl"
    store_file = folder / f"{run}_store.npz"  # Differs: the memory is a file of its own.
    snapshot_name = rf"{run}_epoch(\d+)\.pt"
    # A second run in this folder would overwrite the files of the first.
    if rank == 0:
        files.lock_run(folder, run)
    snapshots = checkpoint.numbered_files(folder, snapshot_name)
    # The rolling file is the newest one as a rule: it goes when a snapshot is written.
    candidates = [rolling_file, *snapshots, best_file]
    resumed_from, saved = checkpoint.find_checkpoint(
        cfg.resume,
        cfg.fresh,
        candidates,
        kind,
        cfg.init_from,
    )
    if saved:
        state = RunState(**{name: saved[name] for name in vars(state)})
        # With a larger batch an epoch has fewer steps than this one has done: its evaluation ends
        # it, unless that was the last thing the run did.
        state.step_in_epoch = min(state.step_in_epoch, steps_per_epoch)
        if state.step_in_epoch == steps_per_epoch and state.evaluated == state.step:
            state.epoch += 1
            state.step_in_epoch = 0
    # The rate follows from `steps` alone. A run that stops early and goes on takes the same steps.
    # Another batch size changes the steps of the epochs that are left, not those that are done.
    epochs_left = cfg.max_epochs - state.epoch
    steps = cfg.steps or state.step - state.step_in_epoch + epochs_left * steps_per_epoch
    last_step = min(steps, cfg.max_steps or steps)  # where this command ends
    warmup = min(cfg.warmup_steps, max(1, steps // 10))
    if warmup < cfg.warmup_steps:
        log(f"warmup cut from {cfg.warmup_steps} to {warmup} steps, a tenth of the schedule")
    # A resume compares this with its own and names each difference that ends exactness.
    header = dict(
        kind=kind,
        format=1,
        expert="mla",
        tokenizer=cfg.tokenizer,
        tokenizer_hash=tokenizer.hash,
        tokenizer_json=tokenizer.json_text,  # so that the file is all that is needed to use it
        data_hash=data.hash,
        world_size=world,
        steps=steps,
        torch=str(torch.__version__),
        config=asdict(cfg),
        model_args=model_args,
        store_hash="",  # Differs: the memory that the weights were trained with; "" = none
    )
    store_hash = saved["store_hash"] if saved else ""
    other_data = bool(saved) and saved["data_hash"] != data.hash
    if saved:
        checkpoint.load_parts(parts, saved, resumed_from, header, cfg.allow_partial)
        log(checkpoint.resume_notice(resumed_from, saved, header, cosmetic_names(cfg)))
        newer = [path for path in snapshots if int(path.stem.split("_epoch")[1]) > state.epoch]
        if newer and resumed_from == rolling_file:
            files.warn(f"{rolling_file} is older than {newer[0]} but comes first")
        elif newer and rank == 0:
            # A rewind: a later --resume must not jump back to the branch that is left here.
            files.set_aside([rolling_file, *newer])
        # Losses on other data can't be compared.
        if other_data:
            log("other data than before: best and patience begin anew")
            state.best_val_loss = math.inf
            state.best_step = 0
            state.patience_used = 0
        del saved
    # Fine-tuning: where nothing is to be resumed, the weights may be those of another run.
    if cfg.init_from and not resumed_from:
        source = checkpoint.load_source(cfg.init_from, kind)
        # Differs: the frozen experts are those that the flags name.
        frozen = {n: w for n, w in raw_model.state_dict().items() if n.startswith("experts.")}
        source["model_state"] |= frozen
        log(checkpoint.start_from(cfg, parts, source, header))
        del source
    # The same command, started again after its end, is no error.
    out_of_patience = 0 < cfg.patience <= state.patience_used
    if state.evaluated == state.step and (state.step >= last_step or out_of_patience):
        limits = []
        if state.step >= steps:
            epochs = 2 * max(cfg.max_epochs, state.epoch)
            limits.append(f"--steps {2 * state.step}" if cfg.steps else f"--max_epochs {epochs}")
        if 0 < cfg.max_steps <= state.step:
            limits.append(f"--max_steps {2 * state.step}")
        if out_of_patience and state.step < last_step:
            limits = [f"--patience {2 * state.patience_used}"]
        names = " and ".join(limit.split()[0] for limit in limits)
        further = f"a larger {names} goes on\nnext: {' '.join(limits)}"
        best = f"best val_loss {state.best_val_loss:.4f}"
        log(f"{run}: finished at step {state.step}, {best}; {further}")
        distributed.close()
        return dict(step=state.step, best_val_loss=state.best_val_loss, stopped=0)

    # Differs: a new run fits the router's start, and reads the contexts that the store holds.
    def training_batches(windows):
        """Yield index, inputs and targets of training windows, a batch at a time."""
        size = max(cfg.batch_size, READ_TOKENS // cfg.max_seq_len)
        for index in np.array_split(windows, math.ceil(len(windows) / size)):
            yield index, *batch("train", index)

    raw_model.eval()
    with torch.no_grad(), autocast:
        # An untrained router would have to find the best fixed mixture first. EM finds it at once.
        if not resumed_from and not cfg.init_from:
            count = min(data.windows("train"), math.ceil(EM_TOKENS / cfg.max_seq_len))
            windows = data.order(42, 0, count)
            reports = [raw_model(x, y)[1] for _, x, y in training_batches(windows)]
            nats = [torch.cat([report[name].flatten() for report in reports]) for name in FAMILIES]
            raw_model.set_static(torch.stack(nats, 1))
            weights = zip(FAMILIES, raw_model.static.tolist(), strict=True)
            log("static mixture:", *(f"{name} {weight:.3f}" for name, weight in weights))
        if cfg.use_vector_store and store_hash:
            raw_model.attach(load_store(store_file, store_hash))
        elif cfg.use_vector_store:
            count = data.windows("train")
            # Every window of a domain is full but an only one: the last one overlaps the one before.
            contexts = sum(
                stream.tokens if stream.windows == 1 else stream.windows * cfg.max_seq_len
                for stream in data.streams["train"]
            )
            if cfg.max_vectors > contexts:
                log(f"--max_vectors {cfg.max_vectors}: cut to {contexts}, all training contexts")
            store = VectorStore(cfg.d_model, cfg.top_k, min(cfg.max_vectors, contexts))
            windows = min(count, math.ceil(cfg.max_vectors / cfg.max_seq_len))
            windows = np.linspace(0, count, windows, endpoint=False, dtype=np.int64)
            for index, x, y in training_batches(windows):
                counted = y >= 0
                documents = data.documents("train", index)[counted.cpu()]
                store.add(raw_model.keys(x)[counted].cpu(), y[counted].cpu(), documents)
            store.build()
            raw_model.attach(store)
            share = raw_model.router_recall.bias.sigmoid().item()
            log(f"store of {len(store)} training contexts; lambda starts at {share:.2f}")
    raw_model.train()

    # Checkpoints hold raw_model: both wrappers prefix the names of the weights.
    model = torch.compile(raw_model) if cfg.compile else raw_model
    if world > 1:  # Differs: there is no --fsdp.
        model = DistributedDataParallel(model)
    saver = checkpoint.Saver()

    def payload():
        tensors = {name: part.state_dict() for name, part in parts.items()}
        return header | asdict(state) | tensors

    def save(path, must=True):
        saver(path, payload(), must)  # on all ranks; the first one writes

    # A full disk or a value that can't be saved is found here, not after an hour of training.
    size = checkpoint.rehearse(folder, run, payload())
    if rank == 0:
        if not resumed_from:
            files.set_aside([rolling_file, *snapshots, best_file, metrics_file])
        elif other_data:  # the best model on the earlier data stays
            files.set_aside([best_file])
        # Differs: checkpoints name the store by its hash.
        if not resumed_from:
            files.set_aside([store_file])
        if cfg.use_vector_store:
            header["store_hash"] = store_hash or save_store(store_file, raw_model.store)
        start_rows(metrics_file, state.step, state.evaluated, asdict(cfg), device)
        millions = sum(p.numel() for p in trained.values()) / 1e6
        where = f"checkpoints of {size / 1e6:.0f} MB in {folder}"
        log(f"{run}: {millions:.1f} M parameters to train, {where}")

    # --- schedule, evaluation, stop -------------------------------------------------------
    def lr_at(step):
        """Return the rate at a step: linear warmup, then a cosine to the floor."""
        if step < warmup:
            return cfg.lr * (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        cosine = 0.5 + 0.5 * math.cos(math.pi * share)
        return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)

    @torch.no_grad()
    def evaluate():
        """Score the same validation windows every time.

        Returns a row of means, over all tokens and by domain; None if a signal came meanwhile.
        """
        count = data.windows("val")
        windows = min(cfg.eval_windows or count, count)
        # Windows at even distances, and one of each domain that lies between them.
        windows = np.linspace(0, count, windows, endpoint=False, dtype=np.int64)
        filled = np.flatnonzero(np.diff(data.edges["val"]))  # domains with windows
        absent = np.setdiff1d(filled, data.domain("val", windows))
        windows = np.union1d(windows, data.edges["val"][absent])
        sums = {}  # name -> (domains,)
        with distributed.full_weights(raw_model) as full_model, autocast:
            for start in range(rank * cfg.batch_size, len(windows), world * cfg.batch_size):
                if stop:
                    break
                index = windows[start : start + cfg.batch_size]
                x, y = batch("val", index)
                _, report = full_model(x, y, torch.from_numpy(index))
                report["tokens"] = y >= 0
                report["bytes"] = token_bytes[y.clamp_min(0)] * (y >= 0)
                for name, numbers in report.items():
                    if name not in sums:
                        sums[name] = torch.zeros(len(data.domains), dtype=torch.float64)
                    window_sums = numbers.cpu().double().sum(1)  # (B,); mps has no float64
                    sums[name].index_add_(0, data.domain("val", index), window_sums)
        # A signal may have reached some ranks only. All of them drop the evaluation then.
        shards = distributed.gather((bool(stop), sums))
        if any(stopped for stopped, _ in shards):
            return None
        sums = {name: sum(part[name] for _, part in shards if part) for name in shards[0][1]}
        row = averages({name: values.sum().item() for name, values in sums.items()})
        # A domain whose windows hold no target has no loss.
        row["domains"] = {
            domain: averages({name: values[i].item() for name, values in sums.items()})
            for i, domain in enumerate(data.domains)
            if sums["tokens"][i] > 0
        }
        return row

    def at_evaluation():
        """Return whether an epoch, the budget or an interval ends with the current step."""
        at_interval = cfg.eval_interval > 0 and state.step % cfg.eval_interval == 0
        return state.step_in_epoch == steps_per_epoch or state.step >= last_step or at_interval

    # --- train ----------------------------------------------------------------------------
    order_of = -1  # epoch that `order` is of
    shown = {}  # newest validation figures, for the progress bar
    finished = False
    out_of_time = False
    stop_signal = 0
    save_due = False
    # A run that was stopped while it evaluated begins with that evaluation.
    repeat_evaluation = state.evaluated < state.step and at_evaluation()
    # The first signal only sets `stop`: the step that is under way is finished and saved.
    with Stop() as stop, Progress(last_step, state.step, show=rank == 0) as progress:
        start = saved_at = mark = time.monotonic()
        tokens_since_mark = 0
        while not finished and not stop_signal:
            if not repeat_evaluation:
                # 1. Data: the micro-batches of this step that are this rank's.
                if order_of != state.epoch:
                    order_of = state.epoch
                    order = data.order(cfg.seed, state.epoch, batches * cfg.batch_size)
                    order = order.reshape(batches, cfg.batch_size)
                first = state.step_in_epoch * cfg.grad_accum_steps * world
                end = min(first + cfg.grad_accum_steps * world, batches)
                # Ranks take turns, so that a step has the same windows on any number of processes.
                numbers = range(first + rank, end, world)
                micro_batches = {m: batch("train", order[m]) for m in numbers}
                # The loss is a mean over all targets of the step. A mean of means would give those
                # of a short window more weight.
                local_targets = sum((y >= 0).sum().item() for _, y in micro_batches.values())
                (targets,) = distributed.sum_over_ranks(local_targets)

                # 2. Forward and backward.
                loss = 0.0
                for m, (x, y) in micro_batches.items():
                    # Dropout and noise follow from seed, step and micro-batch, on whatever rank.
                    seed = np.random.SeedSequence((cfg.seed, state.step, m - first))
                    torch.manual_seed(int(seed.generate_state(1)[0]))
                    last = m == numbers[-1]  # gradients are averaged once a step
                    # Differs: what the store holds of a text itself does not count in training.
                    documents = data.documents("train", order[m])
                    if world > 1:
                        model.require_backward_grad_sync = last
                    with autocast:
                        nats, report = model(x, y, documents=documents)
                    # The mean over ranks is taken, so the sum needs the factor `world`.
                    scaler.scale(nats * (world / targets)).backward()
                    loss += nats.item() / targets

                # 3. Step. All ranks take or skip it together.
                rate = lr_at(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # The limit is meant for true gradients, so the scale goes first.
                scaler.unscale_(optimizer)
                max_norm = cfg.grad_clip or math.inf
                norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm).item()
                now = time.monotonic()
                save_due = 0 < 60 * cfg.save_minutes < now - saved_at
                out_of_time = 0 < cfg.max_seconds < now - start
                # A rank that left or skipped alone would leave the others waiting for it.
                (loss,) = distributed.sum_over_ranks(loss)
                bad, stop_signal, save_due, out_of_time = distributed.max_over_ranks(
                    not math.isfinite(loss + norm), int(stop.signal), save_due, out_of_time
                )
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                elif scaler.is_enabled():  # an overflow of some rank: skip, and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                # A skipped step counts too: its batch and its rate don't come again.
                state.step += 1
                state.step_in_epoch += 1
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
                tokens_since_mark += int(targets)
                tokens_per_s = tokens_since_mark / (time.monotonic() - mark)
                progress(loss=f"{loss:.3f}", **shown, lr=f"{rate:.1e}", tok_s=f"{tokens_per_s:.0f}")
                if state.step % cfg.log_interval == 0:
                    tokens_since_mark = 0
                    mark = time.monotonic()
                    if rank == 0:
                        row = dict(
                            step=state.step,
                            epoch=state.epoch + 1,
                            split="train",
                            loss=loss,
                            lr=rate,
                            grad_norm=norm,
                            tokens=int(targets),
                            tokens_per_s=tokens_per_s,
                            seconds=now - start,
                            peak_mb=peak_mb(device),
                            skipped=state.skipped,
                        )
                        # Differs: the last micro-batch says how the router weighs the experts.
                        counted = (y >= 0).sum()
                        for name, numbers in report.items():
                            if name != "loss":
                                row[name] = (numbers.sum() / counted).item()
                        append_row(metrics_file, row)

            # 5. Evaluate.
            evaluate_now = repeat_evaluation or at_evaluation() or out_of_time
            repeat_evaluation = False
            if evaluate_now and not stop_signal:
                before = time.monotonic()
                val_row = evaluate()
                (stop_signal,) = distributed.max_over_ranks(0 if val_row else int(stop.signal))
                mark += time.monotonic() - before  # speed is that of training alone

            # 6. Save. A rolling save holds the state before the evaluation: one that was cut is
            # repeated when the run goes on. It may fail, since a full disk can have room later.
            if stop_signal or save_due:
                save(rolling_file, must=bool(stop_signal))
                saved_at = time.monotonic()
            if stop_signal or not evaluate_now:
                continue
            state.evaluated = state.step
            shown = dict(val=f"{val_row['loss']:.3f}", bpb=f"{val_row['bpb']:.3f}")
            if rank == 0:
                row = dict(step=state.step, epoch=state.epoch + 1, split="val") | val_row
                append_row(metrics_file, row)

            # 7. Best so far, end of an epoch, end of the run. Every evaluation counts for the best
            # file. An epoch counts against the patience if none of its evaluations improved.
            improved = val_row["loss"] < state.best_val_loss
            if improved:
                state.best_val_loss = val_row["loss"]
                state.best_step = state.step
            epoch_ended = state.step_in_epoch == steps_per_epoch
            if epoch_ended:
                improving = state.best_step > state.step - steps_per_epoch
                state.epoch += 1
                state.step_in_epoch = 0
                state.patience_used = 0 if improving else state.patience_used + 1
            out_of_patience = 0 < cfg.patience <= state.patience_used
            finished = state.step >= last_step or out_of_time or out_of_patience
            if improved:
                save(best_file)  # it holds its own score, so the state changes first
            if epoch_ended and (finished or state.epoch % cfg.save_every == 0):
                save(folder / f"{run}_epoch{state.epoch}.pt")
                if rank == 0:
                    rolling_file.unlink(missing_ok=True)  # older than the file just written
                    checkpoint.rotate(checkpoint.numbered_files(folder, snapshot_name), cfg.keep)
            elif finished:  # in the middle of an epoch: a larger budget goes on from here
                save(rolling_file)

    # --- summary --------------------------------------------------------------------------
    if rank == 0 and finished:
        draw_losses([metrics_file], folder / f"{run}_loss.png", log)
        # Differs: the mixture stands beside each of its experts.
        columns = "".join(f"{name:>13} weight" for name in FAMILIES)
        log(f"  {'nats':10} {run:>14} (bpb) {'static':>9}{columns}")
        for domain, numbers in (val_row["domains"] | dict(all=val_row)).items():
            pairs = [(numbers[name], numbers[f"weight_{name}"]) for name in FAMILIES]
            experts = "".join(f"{nats:13.4f} {weight:6.3f}" for nats, weight in pairs)
            mixture = f"{numbers['loss']:14.4f} {numbers['bpb']:5.3f} {numbers['static']:9.4f}"
            log(f"  {domain:10} {mixture}{experts}")
    if finished:
        next_command = f"python generate.py --checkpoint {shlex.quote(str(best_file))}"
    else:
        next_command = "--resume"
    best = f"best val_loss {state.best_val_loss:.4f} at step {state.best_step}"
    if state.best_val_loss == math.inf:
        best = "not evaluated yet"
    log(
        f"{run}: step {state.step} of {max(state.step, last_step)}, {best}, "
        f"{time.monotonic() - start:.0f} s, "
        f"peak {peak_mb(device):.0f} MB; next: {next_command}"
    )
    distributed.close()
    return dict(step=state.step, best_val_loss=state.best_val_loss, stopped=int(stop_signal))


if __name__ == "__main__":
    launch(main, cfg)
