"""prepare_data.py weights: logits of the official code, sizes without settings, generate.py, files that are none."""

import numpy as np
import pytest
import torch
import yaml

import generate
import prepare_data
from benchmarks import peers
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.reasoning import load
from data_utils.reasoning.generate import tokens_of_cells
from data_utils.reasoning.maze import SIGNS
from data_utils.reasoning.puzzle_rows import Form
from models.token_grid import TokenGrid

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SETTINGS = dict(  # kind: settings of the official code
    trm=dict(H_cycles=3, L_cycles=6, H_layers=0, L_layers=2, puzzle_emb_len=16, mlp_t=False, pos_encodings="rope"),
    trm_mlp_t=dict(H_cycles=3, L_cycles=6, H_layers=0, L_layers=2, puzzle_emb_len=16, mlp_t=True, pos_encodings="none"),
    trm_learned=dict(H_cycles=2, L_cycles=2, H_layers=0, L_layers=1, puzzle_emb_len=0, pos_encodings="learned"),
    trm_plain=dict(H_cycles=2, L_cycles=2, H_layers=0, L_layers=1, puzzle_emb_len=0, puzzle_emb_ndim=0,
                   no_ACT_continue=False, pos_encodings="rope"),
    hrm=dict(H_cycles=2, L_cycles=2, H_layers=4, L_layers=4, pos_encodings="rope"),
    hrm_learned=dict(H_cycles=2, L_cycles=3, H_layers=1, L_layers=2, pos_encodings="learned", rope_theta=500.0),
)  # fmt: skip


def official(kind, vocab_size=11, seq_len=81):
    """Return the official inner model with random weights, also where it starts from zeros, and its settings."""
    trm = kind.startswith("trm")
    try:
        if trm:
            modules, _ = peers.official_trm(peers.CLONES / "TinyRecursiveModels")
        else:
            modules, _ = peers.official_hrm()
    except ImportError:
        pytest.skip(peers.GET["TRM" if trm else "HRM"])
    arch = dict(hidden_size=128, num_heads=4, expansion=4, halt_max_steps=8, halt_exploration_prob=0.1,
                puzzle_emb_ndim=128, forward_dtype="float32") | SETTINGS[kind]  # fmt: skip
    sizes = dict(batch_size=2, seq_len=seq_len, vocab_size=vocab_size, num_puzzle_identifiers=5)
    torch.manual_seed(0)
    name = "TinyRecursiveReasoningModel_ACTV1" if trm else "HierarchicalReasoningModel_ACTV1"
    model = getattr(modules, name)(arch | sizes).eval()
    with torch.no_grad():
        model.inner.q_head.weight.normal_()
        if arch["puzzle_emb_ndim"]:
            model.inner.puzzle_emb.weights.normal_()
    return model, arch


def save_official(model, arch, folder, prefix="_orig_mod.model."):
    """Save what the official pretrain.py saves -> path of the weights."""
    path = folder / "step_100"
    torch.save({prefix + name: weight for name, weight in model.state_dict().items()}, path)
    (folder / "all_config.yaml").write_text(
        yaml.safe_dump(dict(arch=arch | dict(name="trm", loss=dict(name="x")), lr=1e-4))
    )
    return path


def convert(source, **flags):
    prepare_data.main(prepare_data.WeightsConfig(source=str(source), **flags))
    return f"{source}.pt"


@pytest.mark.parametrize("kind", SETTINGS)
@torch.no_grad()
def test_logits_are_those_of_the_official_code(tmp_path, kind):
    model, arch = official(kind)
    network = load(convert(save_official(model, arch, tmp_path)))[0].network
    ids, numbers = torch.randint(11, (2, 81)), torch.tensor([4, 1])
    batch = dict(inputs=ids.int(), puzzle_identifiers=numbers.int(), labels=ids.int())
    carry = model.initial_carry(batch)
    x = network.encode(ids, numbers)
    z_H, z_L = network.start(x)
    for _ in range(2):
        carry, outputs = model(carry, batch)
        z_H, z_L = network.segment(x, z_H, z_L)
        torch.testing.assert_close(network.head(network.answer(x, z_H)), outputs["logits"], rtol=0, atol=1e-5)
        halt = outputs["q_halt_logits"]
        if kind.startswith("hrm") or kind == "trm_plain":
            halt = halt - outputs["q_continue_logits"]
        torch.testing.assert_close(network.confidence(z_H), halt, rtol=0, atol=1e-5)
    assert load(tmp_path / "step_100.pt")[0].segments == 8


def renamed(network):
    """Return the weights of a TokenGrid under the names of the official code."""
    names = dict(embedding="embed_tokens", puzzles="puzzle_emb", head="lm_head", halt="q_head", fast="L_level.layers",
                 slow="H_level.layers", start_H="H_init", start_L="L_init", ffn="mlp", qkv="qkv_proj", out="o_proj",
                 gate_up="gate_up_proj", down="down_proj", places="embed_pos")  # fmt: skip
    state = {}
    for name, weight in network.state_dict().items():
        mixer = "self_attn" if "qkv" in name or ".out." in name else "mlp_t"
        name = ".".join(dict(names, mixer=mixer).get(part, part) for part in name.split("."))
        name = name.replace("embed_tokens.weight", "embed_tokens.embedding_weight")
        name = name.replace("embed_pos.weight", "embed_pos.embedding_weight")
        state["model.inner." + name.replace("puzzle_emb.weight", "puzzle_emb.weights")] = weight
    return state


ARGS = dict(vocab_size=11, cells=81, puzzles=1, puzzle_dim=128, puzzle_places=16, d_model=128, n_heads=2, slow_layers=0,
            fast_layers=2, h_cycles=3, l_steps=6, inner=512, across=0, positions="rope", rope_base=10000.0, eps=1e-5,
            halting="stop")  # fmt: skip


def published(folder, **changes):
    """Save random weights as the official code would -> path, model."""
    torch.manual_seed(0)
    network = TokenGrid(**ARGS | changes)
    path = folder / "step_7"
    torch.save(renamed(network), path)
    return path, network


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(across=512, positions="none"),
        dict(slow_layers=2, h_cycles=2, l_steps=2, puzzle_places=1, halting="compare"),
        dict(vocab_size=6, cells=900, positions="learned"),
    ],
)
def test_without_settings_the_published_values_count(tmp_path, changes, capsys):
    path, network = published(tmp_path, **changes)
    state = torch.load(convert(path), weights_only=True)
    assert state["model_args"] == ARGS | changes and state["kind"] == "token_grid"
    shown = capsys.readouterr().out
    assert "as published, since there is no all_config.yaml" in shown and f"generate.py {path}.pt" in shown
    for name, weight in network.state_dict().items():
        assert torch.equal(state["model_state"][name], weight), name


def test_flags_stand_above_the_settings(tmp_path, capsys):
    path, _ = published(tmp_path)
    (tmp_path / "other.yaml").write_text("arch: {num_heads: 8, H_cycles: 5, L_cycles: 4, halt_max_steps: 3}")
    convert(path, config=str(tmp_path / "other.yaml"), H_cycles=1)
    state = torch.load(f"{path}.pt", weights_only=True)
    args = state["model_args"]
    assert (args["n_heads"], args["h_cycles"], args["l_steps"], state["config"]["segments"]) == (8, 1, 4, 3)
    assert "by other.yaml and flags" in capsys.readouterr().out


def test_generate_fills_in_puzzles(tmp_path, capsys):
    path, network = published(tmp_path)
    checkpoint = convert(path)
    capsys.readouterr()
    (tmp_path / "puzzles.txt").write_text(f"{PUZZLE}\n{PUZZLE.replace('.', '0')}\n")
    generate.main(generate.parse([checkpoint, f"--input={tmp_path}/puzzles.txt", "--segments=2", "--no-halting"]))
    shown = capsys.readouterr()
    tokens = network.solve(torch.tensor([[0 if s == "." else int(s) for s in PUZZLE]]) + 1, 2)[0]
    rows = ["".join("00123456789"[token] for token in row) for row in tokens.view(9, 9).tolist()]
    assert shown.out.splitlines() == [*rows, "", *rows] and "2 segments, 81 tokens" in shown.err
    with pytest.raises(UsageError, match="contradictory puzzle"):
        generate.main(generate.parse([checkpoint, f"--prompt=55{PUZZLE[2:]}"]))
    model, tokenizer = load(checkpoint)
    assert tokenizer is None and model.answer(PUZZLE, segments=2, halting=False) == "\n".join(rows)
    puzzle = np.array([[0 if s == "." else int(s) for s in PUZZLE]], np.uint8)
    answer, segments = model.fill(puzzle, segments=2, halting=False, views=3)
    assert answer.shape == (1, 81) and answer.dtype == np.uint8 and segments == [6]
    with pytest.raises(UsageError, match="--views 0"):
        generate.main(generate.parse([checkpoint, f"--prompt={PUZZLE}", "--views=0"]))


def test_views_are_for_sudokus(tmp_path):
    path, _ = published(tmp_path, vocab_size=6, cells=900)
    checkpoint = convert(path)
    with pytest.raises(UsageError, match="only Sudokus are read"):
        generate.main(generate.parse([checkpoint, f"--prompt={' ' * 898}SG", "--views=2"]))


@torch.no_grad()
def test_the_forward_pass_that_is_exported(tmp_path):
    path, network = published(tmp_path, fast_layers=1)
    (tmp_path / "all_config.yaml").write_text("arch: {H_cycles: 3, L_cycles: 6, halt_max_steps: 2}")
    model, _ = load(convert(path))
    (ids,) = model.example(2, 81)
    assert torch.equal(model(ids), network(ids, segments=2)[0]) and list(model.axes) == ["ids"]


def test_cells_become_the_tokens_of_a_published_model_and_back():
    assert tokens_of_cells(Form("sudoku", 9, 9), "?.123456789").tolist() == list(range(1, 11))
    maze = Form("maze", 2, 2)
    assert tokens_of_cells(maze, "?# SGo")[maze_cells("#S G")].tolist() == [1, 3, 2, 4]
    assert tokens_of_cells(maze, "").tolist() == list(range(5))


def maze_cells(text):
    return [SIGNS.index(sign) for sign in text]


def test_other_files_are_refused(tmp_path):
    path, network = published(tmp_path)
    bad = tmp_path / "bad"
    with pytest.raises(UsageError, match="--source FILE"):
        convert("")
    with pytest.raises(UsageError, match="no such file"):
        convert(bad)
    with pytest.raises(UsageError, match="--kind hrm.*holds weights of trm"):
        convert(path, kind="hrm")
    bad.write_text("no weights")
    with pytest.raises(CheckpointError, match="can't be read"):
        convert(bad)
    torch.save(dict(embedding=torch.zeros(2)), bad)
    with pytest.raises(DataError, match="no weights of HRM or TRM: it begins with embedding"):
        convert(bad)
    torch.save([1, 2], bad)
    with pytest.raises(DataError, match="no weights of HRM or TRM: it begins with list"):
        convert(bad)
    state = renamed(network)
    del state["model.inner.L_level.layers.1.self_attn.o_proj.weight"]
    torch.save(state, bad)
    with pytest.raises(DataError, match="does not fit its settings"):
        convert(bad)
    with pytest.raises(DataError, match="the head dim must be whole and even"):
        convert(path, num_heads=3)
    for text in ("arch: 7", "lr: 1", "[", "arch: {H_cycles: many}", "arch: {num_heads: -1}"):
        (tmp_path / "all_config.yaml").write_text(text)
        with pytest.raises(DataError, match="no settings of the official code under arch"):
            convert(path)
    (tmp_path / "all_config.yaml").unlink()
    path.with_suffix(".pt").write_text("mine")
    with pytest.raises(UsageError, match="--fresh"):
        convert(path)
    assert path.with_suffix(".pt").read_text() == "mine"
    convert(path, fresh=True)
    assert path.with_suffix(".pt.bak").read_text() == "mine"
    convert(path)  # its own file is replaced


def test_a_vocabulary_without_a_known_puzzle_needs_the_number_of_cells(tmp_path):
    path, _ = published(tmp_path, vocab_size=40, cells=10)
    with pytest.raises(UsageError, match="--seq_len 81"):
        convert(path)
    convert(path, seq_len=10)
    model, _ = load(f"{path}.pt")
    tokens, _ = model.network.solve(torch.randint(40, (3, 10)), 1, puzzle=torch.zeros(3, dtype=torch.long))
    assert tokens.shape == (3, 10)
    with pytest.raises(UsageError, match="reads tokens, not text"):
        model.answer("12")
