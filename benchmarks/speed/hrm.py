"""Speed of the recursive model of train_hrm.py against the official HRM, and of cached answers.

python -m benchmarks.speed.hrm                            # all rows
python -m benchmarks.speed.hrm --rows step --threads 2
"""

import math
from types import SimpleNamespace

import torch

from benchmarks import peers
from benchmarks.report import changed_flags, child_peak, command_line, compared, measure, timed
from models.hrm import HRM

STEP = dict(width=128, batch=64, length=81, vocab=11, layers=4)  # the architecture of the official code, made small
QUICK = STEP | dict(width=64, batch=2, length=9, layers=1)


def our_stepper(s, x, y, dtype, compile):
    model = HRM(vocab_size=s.vocab, d_model=s.width, max_seq_len=s.length, n_heads=s.width // 64, encoder_layers=0,
                decoder_layers=0, core="recursive", core_layers=s.layers, share=False, h_cycles=2, l_steps=2,
                grad="one_step", ffn_dim=-(-round(4 * s.width * 2 / 3) // 256) * 256, positions="rope",
                relation_bias=False, halting=True, halting_weight=0.5)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    state = SimpleNamespace(carry=None)
    call = model.compiled() if compile else model

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss, _, state.carry = call(dict(encoder_ids=x, labels=y), state.carry)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def official_stepper(s, x, y, dtype, forwards):
    """forwards 2: as the code comes, with a second forward for the Q target; 1: without."""
    modules, losses = peers.official_hrm()
    settings = dict(
        batch_size=s.batch, seq_len=s.length, num_puzzle_identifiers=1, vocab_size=s.vocab, H_cycles=2, L_cycles=2,
        H_layers=s.layers, L_layers=s.layers, hidden_size=s.width, expansion=4, num_heads=s.width // 64,
        pos_encodings="rope", puzzle_emb_ndim=0, rms_norm_eps=1e-5, rope_theta=10000.0, halt_exploration_prob=0.1,
        halt_max_steps=16 if forwards == 2 else 1, forward_dtype=dict(bf16="bfloat16", fp32="float32")[dtype],
    )  # fmt: skip
    model = losses.ACTLossHead(modules.HierarchicalReasoningModel_ACTV1(settings), "stablemax_cross_entropy")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = dict(inputs=x, labels=y, puzzle_identifiers=torch.zeros(s.batch, dtype=torch.int32))
    state = SimpleNamespace(carry=model.initial_carry(batch))

    def step():
        state.carry, loss, *_ = model(return_keys=[], carry=state.carry, batch=batch)
        (loss / s.batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def stepper(side, sizes, dtype, compile=False):
    """Return a function that does one training step; None if the official code is missing.

    side: ours, official, or official_one_forward.
    """
    s = SimpleNamespace(**sizes)
    torch.manual_seed(0)
    x, y = torch.randint(1, s.vocab, (2, s.batch, s.length))
    if side == "ours":
        return our_stepper(s, x, y, dtype, compile)
    return peers.optional(official_stepper, s, x, y, dtype, 2 if side == "official" else 1)


def two_steps(side, sizes, threads):
    torch.set_num_threads(threads)
    step = stepper(side, sizes, "bf16" if side == "ours" else "fp32")
    if not step:
        return None
    step()
    step()
    return 2


def step(args):
    """Training steps per second of the same architecture, 4 + 4 layers at width 128, in turn."""
    pairs = [  # ours, baseline, in which precision, target
        ("fp32", "official", "fp32", ">= 1.7"),
        ("bf16", "official", "bf16", ">= 1.6"),
        ("bf16", "official", "fp32", ">= 4"),
        ("bf16, compiled", "official", "bf16", ">= 2"),
        ("bf16, compiled", "official", "fp32", ">= 4"),
        ("fp32", "official_one_forward", "fp32", ""),
    ]
    for ours, side, dtype, target in pairs:
        compile = "compiled" in ours
        if args.quick and compile:  # takes a minute to start
            continue
        sides = [stepper("ours", args.sizes, ours[:4], compile), stepper(side, args.sizes, dtype)]
        id = f"{ours.replace(', ', '_')}.{side}_{dtype}"
        baseline = "official HRM" if side == "official" else "official HRM with one forward"
        title = f"training in {ours}, against {baseline} in {dtype}"
        yield timed(id, title, args, sides, (1, 1), target, unit="steps/s", get=peers.GET["HRM"])
    rounds = []
    for _ in range(min(3, args.times)):
        peaks = [child_peak(two_steps, side, args.sizes, args.threads) for side in ("ours", "official")]
        rounds.append([mb for mb in peaks if mb])
    title = "training in bf16, peak memory of the process, against official HRM in fp32"
    yield compared("memory", title, rounds, "<= 0.5", peers.GET["HRM"], unit="MB")


def generate(args):
    """Answers of 64 ids to prompts of 256, with the cache and with encoder, core and decoder done again for each id."""
    torch.manual_seed(0)
    model = HRM(vocab_size=8192, d_model=256, max_seq_len=256, n_heads=4, encoder_layers=2, decoder_layers=4,
                core="recursive", core_layers=2, share=True, h_cycles=2, l_steps=2, grad="last_cycle", ffn_dim=0,
                positions="rope", relation_bias=False, halting=False, halting_weight=0.5).frozen()  # fmt: skip
    prompt, n = torch.randint(4, 8192, (1, 256)), 4 if args.quick else 64

    @torch.no_grad()
    def cached():
        x, bias, z_H, _ = model.think(prompt, None, 1, math.inf)
        state, ids = model.init_state(x, z_H, bias), torch.zeros(1, 1, dtype=torch.long)
        for _ in range(n):
            logits, state = model.step(ids, state)
            ids = logits.argmax(-1, keepdim=True)

    @torch.no_grad()
    def recomputed():
        ids = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(n):
            x, bias, z_H, _ = model.think(prompt, None, 1, math.inf)
            ids = torch.cat([ids, model.guess(model.answer(x, z_H, bias, ids))[:, -1:]], 1)

    title = f"answer of {n} to a prompt of 256, cached against recomputed"
    yield timed("cached", title, args, [cached, recomputed], (n, n), ">= 20", unit="tokens/s")


ROWS = dict(step=step, generate=generate)


def main(argv=None):
    parser = command_line(__doc__, ROWS, "speed.hrm", times=7, threads=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.sizes = QUICK if args.quick else STEP
    measure(args, ROWS, changed_flags(parser, args, ["threads"]))


if __name__ == "__main__":
    main()
