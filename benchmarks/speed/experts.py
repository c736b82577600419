"""Figures of the language-model experts, each against a public peer that is called in turn in the same process.

    python benchmarks/experts.py                                  # all rows; loss takes hours on two cores
    python benchmarks/experts.py --rows speed,memory --threads 2
    python benchmarks/experts.py --rows loss --width 192 --layers 4 --tokens 2000000
    python benchmarks/experts.py --rows "" --readme               # only write the table into README.md

Peers are never required; a figure without its peer says how to get it. Rows are merged into experts.json; --quick runs
everything at toy size and keeps it apart. Loss and tokenizing read domain folders, see prepare_data.py.
"""

import argparse
import contextlib
import io
import json
import math
import operator
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import command_line, figure, load, measure, save, seconds, timed
from data_utils.errors import DataError
from data_utils.progress import peak_mb
from data_utils.text.windows import DomainText, _tokenize
from data_utils.tokenizer import load_tokenizer
from models.router import NanoThink
from models.state_space import StateSpace
from models.transformer import SwiGLU, Transformer, initialize
from models.vector_store import VectorStore

HERE = Path(__file__).resolve().parent
GET = dict(nanoGPT="git clone https://github.com/karpathy/nanoGPT benchmarks/peers/nanoGPT",
           mambapy="pip install mambapy==1.2.0")  # fmt: skip
QUICK = dict(width=64, layers=1, batch=2, length=16, times=1, tokens=64, seeds=1, val_windows=2)
V, LARGE_V = 8192, 50257
sys.path.insert(1, str(HERE / "peers"))


def build(side, args, vocab):
    """A language model without dropout; `ours` is a transformer with nanoGPT's number of parameters."""
    C, heads, layers, length = args.width, args.width // 64, args.layers, args.length
    sizes = dict(vocab_size=vocab, d_model=C, max_seq_len=length, n_layers=layers, dropout=0.0)
    scan = dict(d_state=16, d_inner=2 * C, d_conv=4, dt_rank=C // 16)
    if side == "S6":
        return StateSpace(**scan, **sizes)
    if side == "MLA":  # over experts of these sizes, the diffuser two thirds as deep, as by default
        attention = dict(n_heads=heads, rope_base=10000.0, ffn_mult=4)
        diffuser = dict(encoder_layers=layers, training_steps=100, inference_steps=10, objective="ce", ramp=16.0,
                        schedule="linear", latent_layer=0, noise_scale=0, next_weight=0.2, next_share=0.2)  # fmt: skip
        experts = dict(transformer=sizes | attention, state_space=sizes | scan,
                       diffuser=sizes | attention | diffuser | dict(n_layers=-(-2 * layers // 3)))  # fmt: skip
        latent = dict(n_layers=2, kv_latent_dim=C // 3, rope_dim=C // 24 * 2)  # 128 and 32 at width 384
        model = NanoThink(**sizes | attention | latent, experts=experts, entropy_reg=0.01, balance_reg=0.01, z_reg=1e-3)
        model.start_from(model.experts)
        return model
    if side == "nanoGPT":
        from nanoGPT.model import GPT, GPTConfig

        with contextlib.redirect_stdout(io.StringIO()):
            return GPT(GPTConfig(length, vocab, layers, heads, C, dropout=0.0, bias=False))
    model = Transformer(n_heads=heads, rope_base=10000.0, ffn_mult=4, **sizes)
    if side == "ours":
        for block in model.blocks:
            block.ffn = SwiGLU(d_model=C, inner=8 * C // 3)  # 3 matrices of 8/3 C^2 for 2 of 4 C^2
        initialize(model, ("out", "down"), layers)
    return model


def mean_nats(model, x, y):
    """Mean loss of our model (which gives a sum first) or nanoGPT's (logits first); targets of -1 don't count."""
    first, second = model(x, y)
    return first / (y >= 0).sum() if isinstance(model, Transformer) else second


def adamw(model, lr):
    """The same for both: decay on matrices that are no embeddings."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[p.ndim == 2 and not any(word in name for word in ("embedding", "wte", "wpe"))].append(p)
    groups = [dict(params=groups[True], weight_decay=0.1), dict(params=groups[False], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learn(model, optimizer, x, y, dtype):
    """Forward, backward, clip, AdamW -> loss."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        loss = mean_nats(model, x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def scan_step(side, args):
    """Forward and backward through the Mamba blocks of ours or, with the same weights, of mambapy."""
    model, x = build("S6", args, 259), torch.randn(args.batch // 2, args.length, args.width)

    def forward(x):  # the blocks alone, (B, T, C) -> (B, T, C): mambapy has neither embedding nor head
        states, x = model.init_state(len(x)), x.transpose(0, 1)
        for block, (tail, h) in zip(model.blocks, states, strict=True):
            x, _, _ = block(x, tail, h)
        return x.transpose(0, 1)

    stack = forward
    if side == "mambapy":
        from mambapy.mamba import Mamba, MambaConfig

        stack = Mamba(MambaConfig(d_model=args.width, n_layers=args.layers, d_state=16, rms_norm_eps=1e-6))
        weights = model.blocks.state_dict().items()
        rename = {n: n.replace("mamba.", "mixer.").replace("conv.", "conv1d.") for n, _ in weights}
        stack.load_state_dict({f"layers.{rename[n]}": w for n, w in weights})
        with torch.no_grad():
            torch.testing.assert_close(stack(x), forward(x), atol=1e-4, rtol=0)
    return lambda: stack(x).square().mean().backward()  # gradients add up, which costs both the same


def stepper(side, args, vocab, dtype):
    """A function that does one training step of `side` on random input; None if the peer is not there."""
    torch.manual_seed(0)
    try:
        if side in ("S6", "mambapy"):
            return scan_step(side, args)
        model = build(side, args, vocab)
        optimizer, (x, y) = adamw(model, 3e-4), torch.randint(vocab, (2, args.batch, args.length))
        return lambda: learn(model, optimizer, x, y, dtype)
    except ImportError:
        return None


def peak(side, args, vocab, dtype):
    """Most resident MB of this whole process, Python and torch included, after two training steps; None: no peer."""
    if not (step := stepper(side, args, vocab, dtype)):
        return None
    step(), step()
    status = Path("/proc/self/status")  # ru_maxrss of a child starts at the size of its parent
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else peak_mb(torch.device("cpu"))


def peaks(name, target, args, sides, vocab, dtype):
    """`peak` of two sides, each time in a process of its own -> a figure."""

    def alone(side):
        request = json.dumps(dict(side=side, args=vars(args), vocab=vocab, dtype=dtype), default=str)
        command = [sys.executable, __file__, "--peak", request]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    run = partial(peak, args=args, vocab=vocab, dtype=dtype) if args.quick else alone
    rounds = [[mb for side in sides if (mb := run(side))] for _ in range(min(3, args.times))]
    return figure(name, target, rounds, GET[sides[1]])


def speed(args):
    """Training tokens/s against nanoGPT at equal parameters."""
    for vocab, target in ((V, ">= 1.0"), (LARGE_V, ">= 1.2")):
        for dtype in ("bf16", "fp32"):
            sides = [stepper(side, args, vocab, dtype) for side in ("ours", "nanoGPT")]
            name = f"transformer training, tokens/s, V {vocab}, {dtype}, against nanoGPT"
            yield timed(name, target, args, sides, [args.batch * args.length] * 2, GET["nanoGPT"])


def memory(args):
    """Peak memory of training steps at a large vocabulary."""
    for dtype in ("bf16", "fp32"):
        name = f"transformer training, peak MB of the process, V {LARGE_V}, {dtype}, against nanoGPT"
        yield peaks(name, "ours <= 2000", args, ("ours", "nanoGPT"), LARGE_V, dtype)


def scan(args):
    """Forward and backward of the state-space blocks against mambapy with the same weights, fp32."""
    sides, units = ("S6", "mambapy"), [args.batch // 2 * args.length] * 2
    yield peaks("S6 forward + backward, peak MB of the process, against mambapy", "<= 0.333", args, sides, 0, "fp32")
    steps = [stepper(side, args, 0, "fp32") for side in sides]
    yield timed("S6 forward + backward, tokens/s, against mambapy", ">= 3", args, steps, units, GET["mambapy"])


@torch.no_grad()
def generation(args):
    """A cached step against a forward over the whole text, for the last token and for all tokens of a text; fp32."""
    T, found = args.length, []
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

        for name, sides, units in (
            (f"at length {T}", (partial(cached, x[:, -10:], near_end), partial(full, [T])), (10, 1)),
            (f"over a text of {T}", (partial(cached, x), partial(full, lengths)), (T, len(lengths))),
        ):
            name = f"{side} generation, tokens/s {name}, cached against full forwards"
            found.append(timed(name, ">= 20", args, sides, units))
    return found


def latent(args):
    """Bytes that latent attention caches for a token and layer, against keys and values of all heads."""
    latent = build("MLA", args, V).blocks[0].init_cache(1, 1).nbytes
    plain = build("transformer", args, V).init_state(1)[1].nbytes / args.layers / args.length
    yield figure(
        "latent attention, bytes cached for a token and layer, against plain", "<= 160 / 768", [(latent, plain)]
    )


def store(args):
    """Seconds that a training step of the router, forward and backward, spends in the search of a full store."""
    model, C = build("MLA", args, V).train(), args.width
    x, y = torch.randint(V, (2, args.batch, args.length))
    found = VectorStore(C, top_k=32, max_vectors=100_000 if not args.quick else 1000)
    centres, n = torch.randn(2000, C), len(found.tokens)  # hidden states lie in clusters
    keys = torch.nn.functional.normalize(centres[torch.randint(2000, (n,))] + 0.7 * torch.randn(n, C), dim=-1)
    found.add(keys, torch.randint(V, (n,)), torch.arange(n))
    found.build()
    model.attach(found)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(x, y)[0].backward()

    index = torch.randint(n, (x.numel(),))
    query = torch.nn.functional.normalize(keys[index] + 0.3 * torch.randn(x.numel(), C) / C**0.5, dim=-1)
    sides = (lambda: found.search(query, torch.zeros(len(query))), step)
    for run in sides:
        run()
    rounds = [[seconds(run) for run in sides] for _ in range(args.times)]
    yield figure(f"store of {n}, seconds of search in a step of the router, against the step", "<= 0.1", rounds)


def corpus(args):
    tokenizer = load_tokenizer(args.tokenizer)
    return DomainText(args.data_dir, tokenizer, domains=(), val_split=0.1, window=args.length, cache_dir=args.data_dir)


def fit(side, seed, args, data):
    """Train one model, print how it goes -> its validation loss in nats, in fp32."""
    torch.manual_seed(seed)
    model, count = build(side, args, data.tokenizer.vocab_size).to(args.device), data.windows("val")
    optimizer, steps = adamw(model, args.lr), math.ceil(args.tokens / args.batch / args.length)
    order, warmup = data.order(seed, 0, steps * args.batch).reshape(steps, -1), max(1, steps // 10)
    name, start = f"{side} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M) seed {seed}", time.monotonic()

    def batch(split, index):
        return [t.clamp_min(-1).to(args.device) for t in data.batch(split, index)]  # (B, T) each

    for step, index in enumerate(order, 1):
        cosine = 0.55 + 0.45 * math.cos(math.pi * max(0, step - 1 - warmup) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / warmup, cosine)
        loss = learn(model, optimizer, *batch("train", index), args.dtype)
        if step % max(1, steps // 20) == 0:
            rate = step * args.batch * args.length / (time.monotonic() - start)
            left = (steps - step) / step * (time.monotonic() - start) / 60
            print(f"  {name}: step {step}/{steps}, loss {loss:.3f}, {rate:.0f} tokens/s, {left:.1f} min", flush=True)
    nats = targets = 0
    windows = np.linspace(0, count, min(args.val_windows, count), endpoint=False, dtype=np.int64)
    with torch.no_grad():
        for index in np.array_split(windows, -(-len(windows) // args.batch)):
            x, y = batch("val", index)
            n = (y >= 0).sum().item()
            nats, targets = nats + mean_nats(model.eval(), x, y).item() * n, targets + n
    return nats / targets


def loss(args):
    """Validation loss of equal parameters on the same batches; a finished run is kept at once and not made twice."""
    data = corpus(args)
    names = "width layers length batch lr tokens val_windows dtype device".split()
    settings = " ".join(f"{n} {getattr(args, n)}" for n in names) + f" data {data.hash[:8]} {data.tokenizer.hash[:8]}"
    runs, rounds = load(args.out).get("loss", {}).get("runs", {}), []
    for seed in range(args.seeds):
        rounds.append([])
        for side in ("ours", "nanoGPT"):
            key = f"{side} seed {seed} {settings}"
            with contextlib.suppress(ImportError):
                if key not in runs:
                    runs[key] = round(fit(side, seed, args, data), 4)
                    save(args, "loss", runs=runs)
                rounds[-1].append(runs[key])
                print(f"  {key}: {runs[key]}", flush=True)
        name = f"validation nats at {args.tokens} tokens, against nanoGPT, difference; {settings}; by seed {rounds}"
        result = figure(name, "<= 0.02", rounds, GET["nanoGPT"], operator.sub, statistics.mean)
    return [result]


def tokenizing(args):
    """Tokens per second of CPU time, from JSONL to the cache, file by file; and the first batch."""
    for spec in dict.fromkeys((args.tokenizer, "gpt2")):
        try:
            tokenizer, rounds = load_tokenizer(spec), []
        except DataError as e:
            yield dict(figure=f"tokenizing, {spec}", peer=str(e).replace("\n", "; "))
            continue
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(Path(args.data_dir).glob("[!.]*/*.jsonl")):
                start = time.process_time()
                _tokenize(path, tokenizer, f"{folder}/part", np.uint16, False)
                spent = time.process_time() - start
                rounds.append([Path(f"{folder}/part.bin").stat().st_size / 2 / spent])
        yield figure(f"tokenizing, tokens/s per core, V {tokenizer.vocab_size}, by file", ">= 400000", rounds)

    def first():
        data = corpus(args)
        data.batch("train", data.order(0, 0, data.windows("train"))[: args.batch])

    first()  # fills the cache
    rounds = [[seconds(first)] for _ in range(args.times)]
    yield figure("seconds to the first batch, cached corpus", "< 1", rounds)


ROWS = dict(speed=speed, memory=memory, scan=scan, generation=generation, tokenizing=tokenizing, loss=loss,
            latent=latent, store=store)  # fmt: skip


def main(argv=None):
    parser = command_line(__doc__, ROWS, "experts")
    add = parser.add_argument
    add("--quick", action="store_true", help="toy sizes, one round, no child processes: only to see that it runs")
    add("--peak", type=json.loads, help=argparse.SUPPRESS)  # a child process of the memory figures
    add("--data_dir", default="data", help="loss, tokenizing: root of the domain folders")
    add("--tokenizer", default="", help="loss, tokenizing: default bpe:DATA_DIR/bpe8192.json")
    sizes = dict(threads=2, times=5, width=384, layers=6, batch=8, length=512)
    sizes |= dict(tokens=4_000_000, seeds=3, lr=1e-3, val_windows=256, dtype="bf16", device="cpu")
    for name, default in sizes.items():
        use = "loss: " * (name in list(sizes)[6:]) + f"default {default}"
        add(f"--{name}", type=type(default), default=default, help=use)
    args = parser.parse_args(argv)
    if args.peak:
        request = args.peak | dict(args=SimpleNamespace(**args.peak["args"]))
        torch.set_num_threads(request["args"].threads)
        return print(json.dumps(peak(**request)))
    torch.set_num_threads(args.threads)
    said = "".join(f" --{n} {getattr(args, n)}" for n in sizes if getattr(args, n) != sizes[n])
    vars(args).update(QUICK if args.quick else {})
    args.tokenizer = args.tokenizer or f"bpe:{args.data_dir}/bpe8192.json"
    measure(args, ROWS, lambda row: said)


if __name__ == "__main__":
    main()
