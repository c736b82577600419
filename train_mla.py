"""Train a router over the three frozen experts of train_expert.py, with latent attention and an optional memory.

    python train_mla.py                                         # after the three experts, see train_expert.py
    python train_mla.py --use_vector_store                      # kNN over training contexts, with FAISS
    python train_mla.py --resume                                # go on where it stopped
    python train_mla.py --config configs/mla/smoke.yaml         # a bundle of flags
    torchrun --nproc-per-node 2 train_mla.py                    # several GPUs

Writes nanothink_mla.pt (best), nanothink_mla_epoch{N}.pt, nanothink_mla_interrupted.pt, _store.npz, _metrics.jsonl and
_loss.png to --checkpoint_dir. In a notebook: paste this file into a cell, then main(Config(max_steps=100)).

B batch, T time, V vocabulary; a window is T tokens and the T that follow them.
"""

import inspect
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from data_utils.config import at_least, complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import ends_cleanly, launch


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
    kv_latent_dim: int = 128  # numbers cached per token and layer for keys and values; 0 = plain attention
    rope_dim: int = 32  # rotary coordinates of the key that the heads share, cached too
    entropy_reg: float = 0.01  # weight of ln 3 - entropy of the batch's mean weights: all experts are used
    balance_reg: float = 0.01  # weight of the Switch balance loss
    z_reg: float = 0.001  # weight of the squared log-sum-exp of the router's logits


@dataclass
class DataConfig:
    tokenizer: str = "gpt2"  # gpt2, bytes, or bpe:FILE from prepare_data.py tokenizer
    val_split: float = 0.1  # share of documents held out, per domain
    data_dir: str = "data"  # root of the domain folders
    domains: tuple[str, ...] = ()  # folders to use; none named = all
    skip_bad_lines: bool = False  # count and skip malformed lines instead of stopping


@dataclass
class TrainMLAConfig(MLAConfig, DataConfig):
    # run
    checkpoint_dir: str = "checkpoints"  # folder of all files of a run
    resume: str = ""  # alone: from the newest checkpoint; auto: if there is one; or a file
    fresh: bool = False  # start over; old files are renamed to *.bak, *.bak2, ... (also the default without --resume)
    allow_partial: bool = False  # load the weights that fit and list those that do not
    seed: int = 0  # weights, data order and dropout all follow from it
    transformer_ckpt: str = "checkpoints/transformer_expert.pt"  # frozen expert
    state_space_ckpt: str = "checkpoints/state_space_expert.pt"  # frozen expert
    diffuser_ckpt: str = "checkpoints/diffuser_expert.pt"  # frozen expert
    use_vector_store: bool = False  # remember training contexts and what followed them
    top_k: int = 32  # neighbours asked of the store
    max_vectors: int = 100_000  # entries of the store
    # optimization
    lr: float = 1e-4  # peak learning rate
    min_lr_ratio: float = 0.1  # floor of the cosine as a share of the peak
    warmup_steps: int = 500  # steps of linear warmup; at most a tenth of all steps
    weight_decay: float = 0.05  # AdamW decay, on matrices only
    batch_size: int = 16  # windows per micro-batch and process
    grad_accum_steps: int = 4  # micro-batches per optimizer step
    grad_clip: float = 1.0  # largest gradient norm; 0 = off
    max_epochs: int = 30  # passes over as many windows as there are
    max_steps: int = 0  # end after so many optimizer steps; 0 = off
    max_seconds: float = 0.0  # end after so many seconds; 0 = off
    patience: int = 5  # epochs without improvement before an early stop; 0 = off
    # evaluation, checkpoints, hardware
    save_every: int = 5  # epochs between numbered snapshots
    save_minutes: float = 10.0  # minutes between rolling saves: what a crash can cost; 0 = only when stopped
    keep: int = 0  # numbered snapshots kept; 0 = all
    log_interval: int = 50  # steps per row of metrics
    eval_interval: int = 0  # steps between extra evaluations; 0 = only after each epoch
    eval_windows: int = 0  # validation windows per evaluation; 0 = all
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    use_amp: bool = True  # mixed precision
    amp_dtype: Literal["bf16", "fp16"] = "bf16"  # fp16 where bf16 is slow; fp32 where both are
    compile: bool = False  # torch.compile: slow to start, then faster on a GPU


Config = TrainMLAConfig

if __name__ == "__main__":  # before torch is imported, so that --help and typos answer at once
    cfg = from_cli(Config, __doc__)

import numpy as np
import torch

from data_utils import checkpoint, files
from data_utils.hardware import Hardware
from data_utils.metrics import append_row, averages, draw_losses, start_rows
from data_utils.progress import Progress, peak_mb, say
from data_utils.stop import Stop
from data_utils.text.experts import load_expert, load_store, save_store
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.router import FAMILIES, NanoThink
from models.vector_store import VectorStore

BAD_STEPS = 10  # non-finite steps in a row that end a run
EM_TOKENS = 50_000  # training tokens that the static mixture is fitted to
# what a resumed run may change and still do bit for bit the same
COSMETIC = """resume fresh allow_partial checkpoint_dir transformer_ckpt state_space_ckpt diffuser_ckpt data_dir
device compile skip_bad_lines patience save_every save_minutes keep log_interval eval_interval eval_windows max_epochs
max_steps max_seconds""".split()


def decays(name, parameter):
    """Weight decay is for matrices: not for embeddings, heads, norms, biases and the state matrix A."""
    return parameter.ndim == 2 and not any(word in name for word in ("embedding", "head", "A_log"))


@ends_cleanly
def main(cfg):
    cfg = complete(cfg, Config)
    at_least(cfg, 1, *"d_model n_heads n_layers max_seq_len batch_size grad_accum_steps max_epochs".split())
    at_least(cfg, 1, *"save_every log_interval top_k max_vectors".split())
    at_least(cfg, 0, *"lr min_lr_ratio warmup_steps weight_decay grad_clip max_steps max_seconds dropout seed".split())
    at_least(cfg, 0, *"patience save_minutes keep eval_interval eval_windows".split())
    at_least(cfg, 0, *"kv_latent_dim entropy_reg balance_reg z_reg".split())
    if cfg.kv_latent_dim and (cfg.rope_dim < 2 or cfg.rope_dim % 2):
        raise UsageError(f"--rope_dim {cfg.rope_dim}: expected an even number of 2 or more")
    if cfg.d_model % (2 * cfg.n_heads):
        raise UsageError(f"--d_model {cfg.d_model} over --n_heads {cfg.n_heads}: the head dim must be whole and even")
    if cfg.dropout >= 1:
        raise UsageError(f"--dropout {cfg.dropout}: expected a share below 1")

    # --- hardware -------------------------------------------------------------------------
    hardware = Hardware(cfg.device, cfg.amp_dtype if cfg.use_amp else "fp32")
    rank, world, device, scaler = hardware.rank, hardware.world, hardware.device, hardware.scaler
    tell = say if rank == 0 else lambda *_: None
    tell(hardware.reason)
    torch.manual_seed(cfg.seed)

    # --- data -----------------------------------------------------------------------------
    run, folder = "nanothink_mla", Path(cfg.checkpoint_dir)
    tokenizer = load_tokenizer(cfg.tokenizer)
    data = DomainText(
        cfg.data_dir, tokenizer, domains=cfg.domains, val_split=cfg.val_split, window=cfg.max_seq_len,
        cache_dir=folder, skip_bad_lines=cfg.skip_bad_lines, rank=rank, say=tell,
    )  # fmt: skip
    tell(data.describe())
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)  # (V,)
    batches = math.ceil(data.windows("train") / (cfg.batch_size * world)) * world  # micro-batches an epoch, all ranks
    steps_per_epoch = math.ceil(batches / (cfg.grad_accum_steps * world))  # the last step may have fewer micro-batches
    steps = min(cfg.max_epochs * steps_per_epoch, cfg.max_steps or math.inf)
    warmup = min(cfg.warmup_steps, max(1, steps // 10))
    if warmup < cfg.warmup_steps:
        tell(f"warmup cut from {cfg.warmup_steps} to {warmup} steps, a tenth of the run's {steps}")

    def batch(split, index):  # (B, T), (B, T)
        return [ids.to(device) for ids in data.batch(split, index)]

    # --- model and optimizer --------------------------------------------------------------
    known = asdict(cfg) | dict(vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash)
    expected = {name: known[name] for name in ("vocab_size", "d_model", "max_seq_len", "tokenizer_hash")}
    loaded = {name: load_expert(known[f"{name}_ckpt"], name, expected) for name in FAMILIES}
    known |= dict(experts={name: source["model_args"] for name, (_, source) in loaded.items()})
    model_args = {name: known[name] for name in inspect.signature(NanoThink).parameters}
    raw_model = NanoThink(**model_args)  # the one that is saved: no _orig_mod. or module. keys
    raw_model.start_from({name: expert for name, (expert, _) in loaded.items()})
    del loaded
    raw_model.to(device)
    trained = {name: p for name, p in raw_model.named_parameters() if not name.startswith("experts.")}
    groups = [
        dict(params=[p for name, p in trained.items() if decays(name, p)], weight_decay=cfg.weight_decay),
        dict(params=[p for name, p in trained.items() if not decays(name, p)], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
    parts = dict(model_state=raw_model, optimizer_state=optimizer, amp_scaler=scaler)  # all that is saved and resumed

    # --- resume ---------------------------------------------------------------------------
    # where the run is, saved and resumed as it stands
    at = SimpleNamespace(step=0, epoch=0, step_in_epoch=0, evaluated=0, best_val_loss=math.inf, best_step=0,
                         patience_used=0, skipped=0, skipped_in_row=0)  # fmt: skip
    kind, snapshot = "expert:mla", rf"{run}_epoch(\d+)\.pt"
    ends = (".pt", "_interrupted.pt", "_metrics.jsonl", "_store.npz")
    best_file, rolling, metrics, store_file = (folder / f"{run}{end}" for end in ends)
    lock = files.lock_run(folder, run) if rank == 0 else None  # noqa: F841  held until main ends
    snapshots = checkpoint.numbered_files(folder, snapshot)
    path, state = checkpoint.find_checkpoint(cfg.resume, cfg.fresh, [rolling, *snapshots, best_file], kind)
    about = dict(kind=kind, format=1, expert="mla", tokenizer=cfg.tokenizer, tokenizer_hash=tokenizer.hash,
                 data_hash=data.hash, world_size=world, steps=steps, torch=str(torch.__version__), config=asdict(cfg),
                 model_args=model_args, store_hash="")  # fmt: skip
    store_hash = state["store_hash"] if state else ""
    if state:
        checkpoint.load_parts(parts, state, path, about, cfg.allow_partial)
        vars(at).update({name: state[name] for name in vars(at)})
        at.step_in_epoch = min(at.step_in_epoch, steps_per_epoch)
        tell(checkpoint.resume_notice(path, state, about, COSMETIC))
        newer = [p for p in snapshots if int(p.stem.split("_epoch")[1]) > at.epoch]
        if newer and path == rolling:
            files.warn(f"{rolling} is older than {newer[0]} but comes first")
        elif newer and rank == 0:  # a rewind: a later --resume must not jump back to the branch left here
            files.set_aside([rolling, *newer])
        del state
    if at.evaluated == at.step and (at.step >= steps or 0 < cfg.patience <= at.patience_used):
        tell(f"{run}: finished at step {at.step}, best val_loss {at.best_val_loss:.4f}; a larger --max_epochs goes on")
        hardware.close()
        return dict(step=at.step, best=at.best_val_loss, stopped=0)

    def read(numbers):  # training windows, a batch at a time
        for index in np.array_split(numbers, math.ceil(len(numbers) / cfg.batch_size)):
            yield index, *batch("train", index)

    raw_model.eval()
    with torch.no_grad(), hardware.autocast:
        if not path:
            order = data.order(42, 0, min(data.windows("train"), math.ceil(EM_TOKENS / cfg.max_seq_len)))
            reports = [raw_model(x, y)[1] for _, x, y in read(order)]
            raw_model.set_static(torch.stack([torch.cat([r[n].flatten() for r in reports]) for n in FAMILIES], 1))
            tell("static mixture:", *(f"{n} {w:.3f}" for n, w in zip(FAMILIES, raw_model.static.tolist(), strict=True)))
        if cfg.use_vector_store and store_hash:
            raw_model.attach(load_store(store_file, store_hash))
        elif cfg.use_vector_store:  # filled from windows at even distances
            store, count = VectorStore(cfg.d_model, cfg.top_k, cfg.max_vectors), data.windows("train")
            windows = min(count, math.ceil(cfg.max_vectors / cfg.max_seq_len))
            for index, x, y in read(np.linspace(0, count, windows, endpoint=False, dtype=np.int64)):
                keep = y >= 0
                store.add(raw_model.keys(x)[keep].cpu(), y[keep].cpu(), data.documents("train", index)[keep.cpu()])
            store.build()
            raw_model.attach(store)
            tell(f"store of {len(store)} training contexts; lambda starts at 0.05")
    raw_model.train()
    model, saver = hardware.wrap(raw_model, cfg.compile), checkpoint.Saver()

    def payload():
        return about | vars(at) | {name: part.state_dict() for name, part in parts.items()}

    def save(path, must=True):
        if rank == 0:
            saver(path, payload(), must)

    if rank == 0:
        size, count = checkpoint.rehearse(folder, run, payload()), sum(p.numel() for p in trained.values())
        if not path:
            files.set_aside([rolling, *snapshots, best_file, metrics, store_file])
        if cfg.use_vector_store:
            about["store_hash"] = store_hash or save_store(store_file, raw_model.store)
        start_rows(metrics, at.step, at.evaluated, asdict(cfg), device)
        tell(f"{run}: {count / 1e6:.1f} M parameters to train, checkpoints of {size / 1e6:.0f} MB in {folder}")

    # --- schedule, evaluation, stop -------------------------------------------------------
    def lr_at(step):  # linear warmup, then a cosine to the floor: a pure function of the step
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        cosine = cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * (0.5 + 0.5 * math.cos(math.pi * share))
        return cfg.lr * ((step + 1) / warmup if step < warmup else cosine)

    @torch.no_grad()
    def evaluate():
        """The same validation windows every time -> a row of numbers, overall and by domain; None if stopped."""
        raw_model.eval()
        count = data.windows("val")
        windows = np.linspace(0, count, min(cfg.eval_windows or count, count), endpoint=False, dtype=np.int64)
        sums = {}  # name -> (domains,)
        for start in range(rank * cfg.batch_size, len(windows), world * cfg.batch_size):
            if stop:
                break
            index = windows[start : start + cfg.batch_size]
            x, y = batch("val", index)
            with hardware.autocast:
                _, report = raw_model(x, y, torch.from_numpy(index))
            report |= dict(tokens=y >= 0, bytes=token_bytes[y.clamp_min(0)] * (y >= 0))
            for name, numbers in report.items():
                sums.setdefault(name, torch.zeros(len(data.domains), dtype=torch.float64))
                sums[name].index_add_(0, data.domain("val", index), numbers.cpu().double().sum(1))
        raw_model.train()
        shards = hardware.gather((bool(stop), sums))
        if any(stopped for stopped, _ in shards):
            return None
        sums = {name: sum(part[name] for _, part in shards if part) for name in shards[0][1]}
        domains = {d: averages({k: v[i].item() for k, v in sums.items()}) for i, d in enumerate(data.domains)}
        return averages({k: v.sum().item() for k, v in sums.items()}) | dict(domains=domains)

    def closing():  # the end of an epoch or of the budget
        return at.step_in_epoch == steps_per_epoch or at.step >= steps or out_of_time

    def due():  # an evaluation
        extra = cfg.eval_interval and at.step % cfg.eval_interval == 0
        return at.evaluated < at.step and (closing() or extra)

    # --- train ----------------------------------------------------------------------------
    epoch_of_order, val, over, out_of_time = -1, {}, False, False
    with Stop() as stop, Progress(steps, at.step, show=rank == 0) as progress:
        start = saved = mark = time.monotonic()
        seen, stop_now, late = 0, 0, 0  # tokens since mark; signal; whether a rolling save is due
        while not over and not stop_now:
            if not due():  # else the run was stopped while it evaluated
                if epoch_of_order != at.epoch:
                    epoch_of_order = at.epoch
                    order = data.order(cfg.seed, at.epoch, batches * cfg.batch_size).reshape(batches, cfg.batch_size)
                first = at.step_in_epoch * cfg.grad_accum_steps * world
                numbers = range(first + rank, min(first + cfg.grad_accum_steps * world, batches), world)
                micro = {m: batch("train", order[m]) for m in numbers}
                (targets,) = hardware.total(sum((y >= 0).sum().item() for _, y in micro.values()))
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(at.step)
                loss = 0.0
                for m, (x, y) in micro.items():
                    mix = np.random.SeedSequence((cfg.seed, at.step, m - first))  # of dropout and noise
                    torch.manual_seed(int(mix.generate_state(1)[0]))
                    model.require_backward_grad_sync = m == numbers[-1]  # DDP: one reduction a step
                    documents = data.documents("train", order[m])
                    with hardware.autocast:
                        nats, report = model(x, y, documents=documents)
                    scaler.scale(nats * (world / targets)).backward()  # DDP takes the mean over ranks
                    loss += nats.item() / targets
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf).item()
                now = time.monotonic()
                late = cfg.save_minutes and now - saved > 60 * cfg.save_minutes
                out_of_time = cfg.max_seconds and now - start > cfg.max_seconds
                (loss,) = hardware.total(loss)
                bad = not math.isfinite(loss + norm)
                bad, stop_now, late, out_of_time = hardware.largest(bad, int(stop.signal), late, out_of_time)
                if not bad:
                    scaler.step(optimizer)
                    scaler.update()
                elif scaler.is_enabled():  # an overflow, perhaps of another rank: all of them skip and lower the scale
                    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
                optimizer.zero_grad(set_to_none=True)
                at.skipped += bool(bad)
                at.skipped_in_row = at.skipped_in_row + 1 if bad and scaler.get_scale() <= 1 else 0
                if at.skipped_in_row == BAD_STEPS:
                    raise DataError(f"{BAD_STEPS} steps in a row were not finite, up to step {at.step + 1}\n"
                                    f"try: a smaller --lr, or --no-use_amp; last good file: {saver.last}")  # fmt: skip
                at.step, at.step_in_epoch, seen = at.step + 1, at.step_in_epoch + 1, seen + int(targets)
                rate = seen / (time.monotonic() - mark)
                progress(loss=f"{loss:.3f}", **val, lr=f"{lr_at(at.step - 1):.1e}", tok_s=f"{rate:.0f}")
                if at.step % cfg.log_interval == 0:
                    seen, mark = 0, time.monotonic()
                    if rank == 0:
                        mixture = {n: (v.sum() / (y >= 0).sum()).item() for n, v in report.items() if n != "loss"}
                        append_row(metrics, dict(
                            step=at.step, epoch=at.epoch + 1, split="train", loss=loss, lr=lr_at(at.step - 1),
                            grad_norm=norm, tokens=int(targets), tokens_per_s=rate, seconds=now - start,
                            peak_mb=peak_mb(device), skipped=at.skipped, **mixture))  # fmt: skip
            if due() and not stop_now:
                before, row = time.monotonic(), evaluate()
                (stop_now,) = hardware.largest(0 if row else int(stop.signal))
                mark += time.monotonic() - before
            if stop_now or late:  # as of before the evaluation: one that was cut is repeated when the run goes on
                save(rolling, must=bool(stop_now))
                saved = time.monotonic()
            if stop_now or not due():
                continue
            at.evaluated, val = at.step, dict(val=f"{row['loss']:.3f}", bpb=f"{row['bpb']:.3f}")
            if rank == 0:
                append_row(metrics, dict(step=at.step, epoch=at.epoch + 1, split="val") | row)
            if not closing():
                continue
            improved, ended = row["loss"] < at.best_val_loss, at.step_in_epoch == steps_per_epoch
            if ended:
                at.epoch, at.step_in_epoch = at.epoch + 1, 0
                at.patience_used = 0 if improved else at.patience_used + 1
            over = at.step >= steps or out_of_time or 0 < cfg.patience <= at.patience_used
            if improved:
                at.best_val_loss, at.best_step = row["loss"], at.step
                save(best_file)
            if ended and (over or at.epoch % cfg.save_every == 0):
                save(folder / f"{run}_epoch{at.epoch}.pt")
                if rank == 0:
                    rolling.unlink(missing_ok=True)  # older than the file just written
                    checkpoint.rotate(checkpoint.numbered_files(folder, snapshot), cfg.keep)
            elif over:  # in the middle of an epoch: a larger budget goes on from here
                save(rolling)

    # --- summary --------------------------------------------------------------------------
    if rank == 0 and over:
        draw_losses([metrics], folder / f"{run}_loss.png", tell)
        tell(f"  {'nats':10} {run:>14} (bpb) {'static':>9}" + "".join(f"{n:>13} weight" for n in FAMILIES))
        for domain, numbers in (row["domains"] | {"all": row}).items():
            experts = "".join(f"{numbers[n]:13.4f} {numbers[f'weight_{n}']:6.3f}" for n in FAMILIES)
            tell(f"  {domain:10} {numbers['loss']:14.4f} {numbers['bpb']:5.3f} {numbers['static']:9.4f}{experts}")
    again = " ".join(["python", *(word for word in sys.argv if word != "--resume"), "--resume"])
    next_command = f"python generate.py --checkpoint {best_file}" if over else again
    tell(f"{run}: step {at.step} of {steps}, best val_loss {at.best_val_loss:.4f} at step {at.best_step}, "
         f"{time.monotonic() - start:.0f} s, peak {peak_mb(device):.0f} MB; next: {next_command}")  # fmt: skip
    hardware.close()
    return dict(step=at.step, best=at.best_val_loss, stopped=int(stop_now))


if __name__ == "__main__":
    launch(main, cfg)
