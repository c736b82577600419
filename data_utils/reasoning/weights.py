"""`prepare_data.py weights`: a published checkpoint of HRM or TRM becomes one that generate.py reads.

The official code saves bare weights. What weights don't show (heads, cycles) stands in the all_config.yaml that it
writes beside them; without that file, the published values count. P places of the puzzle's vector, C width.
"""

import re
import shlex
from pathlib import Path

import yaml

from data_utils.checkpoint import canonical_keys, kind_of, read, save_checkpoint
from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.files import check_replaceable, make_room
from data_utils.progress import say

KIND = "token_grid"
NAMES = (  # in the official weights, and in models/token_grid.py; in this order
    ("embed_tokens.embedding_weight", "embedding.weight"),
    ("embed_pos.embedding_weight", "places.weight"),
    ("puzzle_emb.weights", "puzzles.weight"),
    ("lm_head.", "head."),
    ("q_head.", "halt."),
    ("H_init", "start_H"),
    ("L_init", "start_L"),
    ("H_level.layers.", "slow."),
    ("L_level.layers.", "fast."),
    ("self_attn.qkv_proj", "mixer.qkv"),
    ("self_attn.o_proj", "mixer.out"),
    ("mlp_t.", "mixer."),
    ("mlp.", "ffn."),
    ("gate_up_proj", "gate_up"),
    ("down_proj", "down"),
)
TASKS = {  # vocabulary: (task, cells, sign of each token); the first token is padding
    11: ("sudoku", 81, "?.123456789"),
    6: ("maze", 900, "?# SGo"),
    12: ("arc", 900, ""),
}
PUBLISHED = dict(  # what all_config.yaml holds of a published run
    trm=dict(H_cycles=3, L_cycles=6, puzzle_emb_len=16),
    hrm=dict(H_cycles=2, L_cycles=2, puzzle_emb_len=0),
)
HEAD_DIM = 64  # of all published models
SEGMENTS = 16


def convert(cfg):
    """Write the checkpoint once: cfg is WeightsConfig of prepare_data.py."""
    at_least(cfg, 0, "num_heads", "H_cycles", "L_cycles", "seq_len")
    if not cfg.source:
        raise UsageError("--source FILE is needed: a checkpoint of the official code, such as step_65100")
    out = cfg.out or f"{cfg.source}.pt"
    check_replaceable(out, cfg.fresh, is_converted, inputs=[cfg.source])
    weights = official_weights(cfg.source)
    kind = "hrm" if any(name.startswith("slow.") for name in weights) else "trm"
    if cfg.kind not in ("auto", kind):
        raise UsageError(f"--kind {cfg.kind}: {cfg.source} holds weights of {kind}\ntry: --kind {kind}")
    arch, given = official_settings(cfg, kind)
    args = model_args(weights, kind, arch, cfg)
    check_fit(weights, args, cfg.source)
    task, _, signs = TASKS.get(args["vocab_size"], ("puzzles", 0, ""))
    segments = int(arch.get("halt_max_steps", SEGMENTS))
    state = dict(kind=KIND, format=1, dataset=task, signs=signs, tokenizer="signs", tokenizer_hash="",
                 config=dict(segments=segments, eval_segments=segments), halt_threshold=0.0,
                 model_args=args, model_state=weights, ema={})  # fmt: skip
    make_room(out, is_converted)
    save_checkpoint(out, state)
    count = sum(weight.numel() for weight in weights.values())
    mixer = "mlp_t" if args["across"] else "attention"
    print(f"{out}: {kind.upper()} for {task}, {count / 1e6:.2f} M parameters, width {args['d_model']}, {mixer}, "
          f"{args['n_heads']} heads, H_cycles {args['h_cycles']}, L_cycles {args['l_steps']} {given}")  # fmt: skip
    if signs:
        say(f"next: python generate.py {shlex.quote(str(out))} --input puzzles.txt")
    return {}


def is_converted(path):
    """Return whether a file is a checkpoint of this command."""
    return kind_of(path) == KIND


def official_weights(path):
    """Return the weights of an official checkpoint in float32, under the names of models/token_grid.py.

    Raises UsageError for no such file, DataError for other content.
    """
    if not Path(path).is_file():
        raise UsageError(f"--source {path}: no such file")
    state = read(path)
    if isinstance(state, dict):
        state = canonical_keys(state)
        state = state.get("model_state", state)
    weights = {}
    for name, weight in state.items() if isinstance(state, dict) else ():
        name = re.sub(r"^((_orig_mod|module|model|inner)\.)+", "", str(name))
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        if hasattr(weight, "float"):
            weights[name] = weight.float()
    lacking = {"embedding.weight", "head.weight", "halt.weight", "start_H", "start_L"} - set(weights)
    if lacking or not any(name.startswith("fast.") for name in weights):
        names = ", ".join(list(weights)[:3]) or type(state).__name__
        raise DataError(f"{path} holds no weights of HRM or TRM: it begins with {names}")
    return weights


def official_settings(cfg, kind):
    """Return (settings of the model, where they come from): all_config.yaml, published values, and flags above both."""
    path = Path(cfg.config or Path(cfg.source).with_name("all_config.yaml"))
    settings = dict(PUBLISHED[kind])
    given = "as published, since there is no all_config.yaml"
    if cfg.config or path.is_file():
        try:
            settings |= yaml.safe_load(path.read_text(encoding="utf-8"))["arch"]
            sizes = {name: settings.get(name, 1) for name in ("num_heads", "H_cycles", "L_cycles", "halt_max_steps")}
            if not all(type(size) is int and size > 0 for size in sizes.values()):
                raise ValueError(f"expected positive numbers, found {sizes}")
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise DataError(f"{path}: no settings of the official code under arch: {reason}") from e
        given = f"by {path.name}"
    flags = {name: getattr(cfg, name) for name in ("num_heads", "H_cycles", "L_cycles") if getattr(cfg, name)}
    return settings | flags, " ".join([given, *["and flags"] * bool(flags)])


def model_args(weights, kind, arch, cfg):
    """Return the arguments of TokenGrid: sizes from the shapes of the weights, the rest from the settings `arch`."""
    vocab_size, width = weights["embedding.weight"].shape
    puzzles, puzzle_dim = weights["puzzles.weight"].shape if "puzzles.weight" in weights else (0, 0)
    across = weights["fast.0.mixer.down.weight"].shape[1] if "fast.0.mixer.down.weight" in weights else 0
    places = (arch["puzzle_emb_len"] or -(-puzzle_dim // width)) if puzzle_dim else 0
    length = 0  # of cells and puzzle's vector together, where a weight shows it
    if across:
        length = weights["fast.0.mixer.down.weight"].shape[0]
    if "places.weight" in weights:
        length = weights["places.weight"].shape[0]
    cells = cfg.seq_len or (length - places if length else TASKS.get(vocab_size, ("", 0))[1])
    if cells < 1:
        raise UsageError(f"a vocabulary of {vocab_size} does not tell the number of cells\ntry: --seq_len 81")
    positions = "learned" if "places.weight" in weights else arch.get("pos_encodings", "rope")
    return dict(
        vocab_size=vocab_size,
        cells=cells,
        puzzles=puzzles,
        puzzle_dim=puzzle_dim,
        puzzle_places=places,
        d_model=width,
        n_heads=arch.get("num_heads") or max(1, width // HEAD_DIM),
        slow_layers=layers_of(weights, "slow"),
        fast_layers=layers_of(weights, "fast"),
        h_cycles=arch["H_cycles"],
        l_steps=arch["L_cycles"],
        inner=weights["fast.0.ffn.down.weight"].shape[1],
        across=across,
        positions="none" if across and positions == "rope" else positions,
        rope_base=float(arch.get("rope_theta", 10000.0)),
        eps=float(arch.get("rms_norm_eps", 1e-5)),
        halting="stop" if kind == "trm" and arch.get("no_ACT_continue", True) else "compare",
    )


def layers_of(weights, stack):
    """Return the number of blocks of `stack`, slow or fast."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stack}.")})


def check_fit(weights, args, source):
    """Raise DataError if a model with these arguments can't be built, or does not take the weights."""
    from models.token_grid import TokenGrid

    try:
        TokenGrid(**args).load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:300]
        raise DataError(f"{source} does not fit its settings: {reason}\nfix: --num_heads, --seq_len or --config") from e
