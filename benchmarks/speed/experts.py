"""Figures of the language-model experts, each against a baseline that is called in turn in the same process.

    python -m benchmarks.speed.experts                                  # all rows; loss takes hours on two cores
    python -m benchmarks.speed.experts --rows speed,memory --threads 2
    python -m benchmarks.speed.experts --rows loss --width 192 --layers 4 --tokens 2000000

A figure whose baseline is missing says how to get it. --quick runs everything at toy size and keeps it apart. Loss and
tokenizing read domain folders, see prepare_data.py.
"""

import contextlib
import math
import operator
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import peers
from benchmarks.report import (
    changed_flags,
    child_peak,
    command_line,
    compared,
    figure,
    load,
    measure,
    process_peak,
    save,
    seconds,
    timed,
)
from benchmarks.training import cosine, fit, grouped, update
from data_utils.errors import DataError
from data_utils.text.windows import DomainText, _tokenize
from data_utils.tokenizer import load_tokenizer
from models.router import NanoThink
from models.state_space import StateSpace
from models.transformer import SwiGLU, Transformer, initialize
from models.vector_store import VectorStore

QUICK = dict(width=64, layers=1, batch=2, length=16, times=1, tokens=64, seeds=1, val_windows=2)
V, LARGE_V = 8192, 50257


# --- models -----------------------------------------------------------------------------------
def build(side, args, vocab):
    """Build a language model without dropout; `ours` is a transformer with nanoGPT's number of parameters."""
    C, heads, layers, length = args.width, args.width // 64, args.layers, args.length
    sizes = dict(vocab_size=vocab, d_model=C, max_seq_len=length, n_layers=layers, dropout=0.0)
    scan = dict(d_state=16, d_inner=2 * C, d_conv=4, dt_rank=C // 16)
    attention = dict(n_heads=heads, rope_base=10000.0, ffn_mult=4)
    if side == "S6":
        return StateSpace(**scan, **sizes)
    if side == "nanoGPT":
        return peers.nanogpt(vocab, C, layers, length)
    if side == "MLA":  # over experts of these sizes, the diffuser two thirds as deep, as by default
        diffuser = dict(encoder_layers=layers, training_steps=100, inference_steps=10, objective="ce", ramp=16.0,
                        schedule="linear", latent_layer=0, noise_scale=0, next_weight=0.2, next_share=0.2)  # fmt: skip
        experts = dict(
            transformer=sizes | attention,
            state_space=sizes | scan,
            diffuser=sizes | attention | diffuser | dict(n_layers=-(-2 * layers // 3)),
        )
        latent = dict(n_layers=2, kv_latent_dim=C // 3, rope_dim=C // 24 * 2)  # 128 and 32 at width 384
        model = NanoThink(**sizes | attention | latent, experts=experts, entropy_reg=0.01, balance_reg=0.01, z_reg=1e-3)
        model.start_from(model.experts)
        return model
    model = Transformer(**attention, **sizes)
    if side == "ours":
        for block in model.blocks:
            block.ffn = SwiGLU(d_model=C, inner=8 * C // 3)  # 3 matrices of 8/3 C^2 for 2 of 4 C^2
        initialize(model, ("out", "down"), layers)
    return model


def mean_nats(model, x, y):
    """Return the mean loss of our model (a sum comes first) or nanoGPT's (logits come first); targets of -1 don't
    count."""
    first, second = model(x, y)
    return first / (y >= 0).sum() if isinstance(model, Transformer) else second


def adamw(model, lr):
    """Return the optimizer of both sides: decay on matrices that are no embeddings."""

    def decayed(name, p):
        return p.ndim == 2 and not any(word in name for word in ("embedding", "wte", "wpe"))

    return torch.optim.AdamW(grouped(model, 0.1, decayed), lr=lr, betas=(0.9, 0.95), fused=True)


def loss_in(model, x, y, dtype):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        return mean_nats(model, x, y)


def scan_step(side, args):
    """Return a function: forward and backward through the Mamba blocks of ours or of mambapy, same weights."""
    model, x = build("S6", args, 259), torch.randn(args.batch // 2, args.length, args.width)

    def forward(x):  # the blocks alone, (B, T, C) -> (B, T, C): mambapy has neither embedding nor head
        states, x = model.init_state(len(x)), x.transpose(0, 1)
        for block, (tail, h) in zip(model.blocks, states, strict=True):
            x, _, _ = block(x, tail, h)
        return x.transpose(0, 1)

    stack = forward
    if side == "mambapy":
        stack = peers.mambapy(model.blocks, args.width)
        with torch.no_grad():
            torch.testing.assert_close(stack(x), forward(x), atol=1e-4, rtol=0)
    return lambda: stack(x).square().mean().backward()  # gradients add up, which costs both the same


def stepper(side, args, vocab, dtype):
    """Return a function that does one training step of `side` on random input; None if the baseline is missing."""
    torch.manual_seed(0)
    try:
        if side in ("S6", "mambapy"):
            return scan_step(side, args)
        model = build(side, args, vocab)
    except ImportError:
        return None
    optimizer = adamw(model, 3e-4)
    x, y = torch.randint(vocab, (2, args.batch, args.length))
    return lambda: update(model, optimizer, loss_in(model, x, y, dtype))


# --- speed and memory -------------------------------------------------------------------------
def two_steps(side, args, vocab, dtype):
    """Train two steps -> 2, or None if the baseline is missing; args may be a dict, as it comes from JSON."""
    args = SimpleNamespace(**args) if isinstance(args, dict) else args
    torch.set_num_threads(args.threads)
    step = stepper(side, args, vocab, dtype)
    if not step:
        return None
    step()
    step()
    return 2


def peaks(id, title, target, args, sides, vocab, dtype):
    """Compare the peak memory of two sides, each time in a new process."""
    rounds = []
    for _ in range(min(3, args.times)):
        if args.quick:
            peak = [process_peak(two_steps, side, args, vocab, dtype) for side in sides]
        else:
            peak = [child_peak(two_steps, side, vars(args), vocab, dtype) for side in sides]
        rounds.append([mb for mb in peak if mb])
    return compared(id, title, rounds, target, unit="MB", get=peers.GET[sides[1]])


def speed(args):
    """Training tokens/s against nanoGPT at equal parameters."""
    for vocab, target in ((V, ">= 1.0"), (LARGE_V, ">= 1.2")):
        for dtype in ("bf16", "fp32"):
            sides = [stepper(side, args, vocab, dtype) for side in ("ours", "nanoGPT")]
            yield timed(f"v{vocab}.{dtype}", f"transformer training, V {vocab}, {dtype}, against nanoGPT", args, sides,
                        [args.batch * args.length] * 2, target, unit="tokens/s",
                        get=peers.GET["nanoGPT"])  # fmt: skip


def memory(args):
    """Peak memory of training steps at a large vocabulary."""
    for dtype in ("bf16", "fp32"):
        title = f"transformer training, peak memory of the process, V {LARGE_V}, {dtype}, against nanoGPT"
        yield peaks(f"v{LARGE_V}.{dtype}", title, "ours <= 2000", args, ("ours", "nanoGPT"), LARGE_V, dtype)


def scan(args):
    """Forward and backward of the state-space blocks against mambapy with the same weights, fp32."""
    sides, title = ("S6", "mambapy"), "S6 forward + backward"
    yield peaks("memory", f"{title}, peak memory of the process, against mambapy", "<= 0.333", args, sides, 0, "fp32")
    steps = [stepper(side, args, 0, "fp32") for side in sides]
    yield timed("speed", f"{title}, against mambapy", args, steps, [args.batch // 2 * args.length] * 2, ">= 3",
                unit="tokens/s", get=peers.GET["mambapy"])  # fmt: skip


@torch.no_grad()
def generation(args):
    """A cached step against a forward over the whole text, for the last token and for all tokens of a text; fp32."""
    T, figures = args.length, []
    lengths = range(max(1, T // 32), T + 1, max(1, T // 16))  # 16, whose mean cost is that of all T forwards
    for side in ("transformer", "S6", "MLA"):
        torch.manual_seed(0)
        model, x = build(side, args, V).eval(), torch.randint(V, (1, T))
        _, near_end = model.step(x[:, :-10], model.init_state(1))

        def cached(tokens, state=None, model=model):
            state = state or model.init_state(1)
            for token in tokens.split(1, 1):
                _, state = model.step(token, state)

        def full(lengths, model=model, x=x):
            for t in lengths:
                model(x[:, :t])

        for id, place, sides, units in (
            ("last", f"at length {T}", (partial(cached, x[:, -10:], near_end), partial(full, [T])), (10, 1)),
            ("text", f"over a text of {T}", (partial(cached, x), partial(full, lengths)), (T, len(lengths))),
        ):
            title = f"{side} generation {place}, cached against full forwards"
            figures.append(timed(f"{side.lower()}.{id}", title, args, sides, units, ">= 20", unit="tokens/s"))
    return figures


def latent(args):
    """Bytes that latent attention caches for a token and layer, against keys and values of all heads."""
    cached = build("MLA", args, V).blocks[0].init_cache(1, 1).nbytes
    plain = build("transformer", args, V).init_state(1)[1].nbytes / args.layers / args.length
    title = "latent attention, cache per token and layer, against plain attention"
    yield compared("cache", title, [(cached, plain)], "<= 160 / 768", unit="bytes")


def store(args):
    """Seconds that a training step of the router, forward and backward, spends in the search of a full store."""
    model, C = build("MLA", args, V).train(), args.width
    x, y = torch.randint(V, (2, args.batch, args.length))
    memory = VectorStore(C, top_k=32, max_vectors=1000 if args.quick else 100_000)
    centres, n = torch.randn(2000, C), len(memory.tokens)  # hidden states lie in clusters
    keys = torch.nn.functional.normalize(centres[torch.randint(2000, (n,))] + 0.7 * torch.randn(n, C), dim=-1)
    memory.add(keys, torch.randint(V, (n,)), torch.arange(n))
    memory.build()
    model.attach(memory)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(x, y)[0].backward()

    index = torch.randint(n, (x.numel(),))
    query = torch.nn.functional.normalize(keys[index] + 0.3 * torch.randn(x.numel(), C) / C**0.5, dim=-1)
    sides = (lambda: memory.search(query, torch.zeros(len(query))), step)
    for run in sides:
        run()
    rounds = [[seconds(run) for run in sides] for _ in range(args.times)]
    title = f"store of {n}, search in a step of the router, against the step"
    yield compared("search", title, rounds, "<= 0.1", unit="s")


# --- text -------------------------------------------------------------------------------------
def corpus(args):
    tokenizer = load_tokenizer(args.tokenizer)
    return DomainText(args.data_dir, tokenizer, domains=(), val_split=0.1, window=args.length, cache_dir=args.data_dir)


def validation_nats(side, seed, args, data):
    """Train one model -> its validation loss in nats, in fp32."""
    torch.manual_seed(seed)
    model, count = build(side, args, data.tokenizer.vocab_size).to(args.device), data.windows("val")
    steps = math.ceil(args.tokens / args.batch / args.length)
    order, warmup = data.order(seed, 0, steps * args.batch).reshape(steps, -1), max(1, steps // 10)

    def batch(split, index):
        return [t.clamp_min(-1).to(args.device) for t in data.batch(split, index)]  # (B, T) each

    def factor(step):
        return min((step + 1) / warmup, cosine((step - warmup) / max(1, steps - warmup)))

    print(f"{side} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M) seed {seed}", flush=True)
    fit(model, adamw(model, args.lr), lambda pair: loss_in(model, *pair, args.dtype),
        (batch("train", index) for index in order), factor, every=max(1, steps // 20), total=steps)  # fmt: skip
    nats = targets = 0
    windows = np.linspace(0, count, min(args.val_windows, count), endpoint=False, dtype=np.int64)
    with torch.no_grad():
        for index in np.array_split(windows, -(-len(windows) // args.batch)):
            x, y = batch("val", index)
            n = (y >= 0).sum().item()
            nats, targets = nats + mean_nats(model.eval(), x, y).item() * n, targets + n
    return nats / targets


def loss(args):
    """Validation loss of equal parameters on the same batches; a finished run is kept at once and not repeated."""
    data = corpus(args)
    names = "width layers length batch lr tokens val_windows dtype device".split()
    settings = {name: getattr(args, name) for name in names} | dict(data=f"{data.hash[:8]} {data.tokenizer.hash[:8]}")
    key_end = " ".join(f"{name} {value}" for name, value in settings.items())
    runs, rounds = load(args.out).get("loss", {}).get("runs", {}), []
    for seed in range(args.seeds):
        rounds.append([])
        for side in ("ours", "nanoGPT"):
            key = f"{side} seed {seed} {key_end}"
            with contextlib.suppress(ImportError):
                if key not in runs:
                    runs[key] = round(validation_nats(side, seed, args, data), 4)
                    save(args, "loss", runs=runs)
                rounds[-1].append(runs[key])
                print(f"  {key}: {runs[key]}", flush=True)
    title = f"validation loss at {args.tokens:,} tokens, against nanoGPT, difference"
    yield compared("nats", title, rounds, "<= 0.02", peers.GET["nanoGPT"], operator.sub, statistics.mean,
                   unit="nats", spread=f"by seed {rounds}", seeds=args.seeds, settings=settings)  # fmt: skip


def tokenizing(args):
    """Tokens per second of CPU time, from JSONL to the cache, file by file; and the first batch."""
    for spec in dict.fromkeys((args.tokenizer, "gpt2")):
        try:
            tokenizer, rounds = load_tokenizer(spec), []
        except DataError as error:
            yield figure(spec, f"tokenizing, {spec}", None, baseline=str(error).replace("\n", "; "))
            continue
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(Path(args.data_dir).glob("[!.]*/*.jsonl")):
                start = time.process_time()
                _tokenize(path, tokenizer, f"{folder}/part", np.uint16, False)
                spent = time.process_time() - start
                rounds.append([Path(f"{folder}/part.bin").stat().st_size / 2 / spent])
        V = tokenizer.vocab_size
        yield compared(f"v{V}", f"tokenizing, V {V}, by file", rounds, ">= 400000", unit="tokens/s per core")

    def first():
        data = corpus(args)
        data.batch("train", data.order(0, 0, data.windows("train"))[: args.batch])

    first()  # fills the cache
    rounds = [[seconds(first)] for _ in range(args.times)]
    yield compared("first_batch", "first batch of a cached corpus", rounds, "< 1", unit="s")


ROWS = dict(speed=speed, memory=memory, scan=scan, generation=generation, tokenizing=tokenizing, loss=loss,
            latent=latent, store=store)  # fmt: skip


def main(argv=None):
    sizes = dict(threads=2, times=5, width=384, layers=6, batch=8, length=512)
    runs = dict(tokens=4_000_000, seeds=3, lr=1e-3, val_windows=256, dtype="bf16", device="cpu")  # of loss
    parser = command_line(__doc__, ROWS, "speed.experts", **sizes, **runs)
    parser.add_argument("--data_dir", default="data", help="loss, tokenizing: root of the domain folders")
    parser.add_argument("--tokenizer", default="", help="loss, tokenizing: default bpe:DATA_DIR/bpe8192.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    flags = changed_flags(parser, args, [*sizes, *runs])
    vars(args).update(QUICK if args.quick else {})
    args.tokenizer = args.tokenizer or f"bpe:{args.data_dir}/bpe8192.json"
    measure(args, ROWS, flags)


if __name__ == "__main__":
    main()
