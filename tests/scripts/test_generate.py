"""generate.py and `load` with checkpoints and runs of all six scripts, moved, exported, and with odd streams."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import generate
from data_utils import events, formulas, pages, reasoning, text
from data_utils.checkpoint import kind_of
from data_utils.errors import UsageError
from data_utils.events.decay_chain import decay_chain
from tests.helpers import ROOT, environment, finish, slow, start

OLD = ROOT / "tests" / "old_checkpoints"
TRANSFORMER = OLD / "text" / "transformer_expert_interrupted.pt"
PLACES = {  # path in OLD: (kind, configuration)
    "text/transformer_expert_interrupted.pt": ("expert:transformer", generate.Config),
    "text/nanothink_mla_interrupted.pt": ("expert:mla", generate.Config),
    "hrm": ("hrm", generate.AnswerConfig),
    "hrm/final.pt": ("hrm", generate.AnswerConfig),
    "formulas": ("sr", generate.FormulaConfig),
    "formulas/checkpoint_4": ("sr", generate.FormulaConfig),
    "formulas/checkpoint_4/state_dict.pt": ("sr", generate.FormulaConfig),
    "events": ("ae:ae", generate.EventsConfig),
    "events/last.pt": ("ae:ae", generate.EventsConfig),
    "pages": ("multimodal", generate.PagesConfig),
    "pages/latest.pt": ("multimodal", generate.PagesConfig),
}


# ---- which model is meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_or_a_run_says_what_it_is(place):
    kind, cls = PLACES[place]
    path = str(OLD / place)
    assert kind_of(path) == kind
    for words in ([path], ["--checkpoint", path], [f"--checkpoint={path}"]):
        cfg = generate.parse([*words, "--seed=3"])
        assert type(cfg) is cls and cfg.seed == 3
        assert path in (getattr(cfg, "checkpoint", ""), getattr(cfg, "model", ""))


def test_a_prompt_may_hold_anything():
    cfg = generate.parse([str(TRANSFORMER), "--prompt", "Look into runs/ for"])
    assert type(cfg) is generate.Config and cfg.prompt == "Look into runs/ for"
    assert type(generate.parse(["--prompt", "runs/x"])) is generate.Config
    assert type(generate.parse(["--run_name", "x", "--prompt", "1", "2"])) is generate.AnswerConfig
    assert type(generate.parse(["formula", "--data", "runs/x.csv"])) is generate.FormulaConfig
    assert generate.parse(["events", "run_a", "--mode", "sample"]).model == "run_a"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", b"\x80\x04K\x01."])
def test_the_kind_of_what_is_no_checkpoint_is_empty(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    assert kind_of(tmp_path / "x.pt") == kind_of(tmp_path) == kind_of(tmp_path / "none") == ""


def test_commands_of_each_kind(tmp_path):
    """Run what needs no long training: a folder or file as the first word, then the flags of its kind."""
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{i},{2 * i}\n" for i in range(1, 8)))
    (tmp_path / "p.txt").write_text("1...3......4..2.\n")
    commands = [
        (OLD / "hrm", "--prompt", "What is 1 + 2?"),
        (OLD / "formulas", "--data=t.csv", "--max_seconds=0", "--choices=4", "--max_len=20", "--max_points=8"),
        (OLD / "events", "--mode=reconstruct", "--data=decay_chain", "--limit=5", "--out=r.npz"),
        (OLD / "pages", "--input=p.txt", "--steps=1"),
    ]
    for command in commands:
        status = 1 if command[0].name == "pages" else 0  # its model of three steps solves no Sudoku
        out, _ = finish(start("generate.py", *command, "--device=cpu", cwd=tmp_path), status)
        assert out.strip()


def test_a_folder_with_several_models_names_them():
    with pytest.raises(UsageError, match="diffuser_expert_interrupted.pt, nanothink_mla_interrupted.pt"):
        text.load(OLD / "text")


# ---- a checkpoint is all that is needed ------------------------------------------------------------------------------


def test_a_model_outlives_its_tokenizer_file(toy, tmp_path):
    new = ["prepare_data.py", "tokenizer", "--data_dir", toy, "--out", "bpe.json", "--vocab_size"]
    finish(start(*new, 300, cwd=tmp_path))
    before = (tmp_path / "bpe.json").read_bytes()
    tiny = "--d_model 16 --n_heads 2 --n_layers 1 --max_seq_len 16 --batch_size 4 --eval_windows 16 --device cpu"
    train = [
        "train_expert.py",
        "--expert=transformer",
        "--tokenizer=bpe:bpe.json",
        "--data_dir",
        toy,
        *tiny.split(),
        "--max_steps",
    ]
    finish(start(*train, 2, cwd=tmp_path))
    ask = ["--prompt=the", "--max_new_tokens=5"]
    model = tmp_path / "checkpoints" / "transformer_expert.pt"
    first, _ = finish(start("generate.py", model, *ask, cwd=tmp_path))

    (tmp_path / "bpe.json").unlink()
    finish(start(*new, 280, cwd=tmp_path))
    moved = tmp_path / "elsewhere" / "model.pt"
    moved.parent.mkdir()
    shutil.copy(model, moved)
    for path, folder in ((model, tmp_path), (moved, moved.parent)):
        assert finish(start("generate.py", path, *ask, cwd=folder))[0] == first

    # The run goes on once the checkpoint has given its tokenizer back.
    _, err = finish(start(*train, 3, "--resume", cwd=tmp_path), 2)
    assert "was trained with tokenizer bpe:bpe.json" in err and "--export" in err
    finish(start("generate.py", model, "--export=old.json", cwd=tmp_path))
    assert (tmp_path / "old.json").read_bytes() == before
    shutil.move(tmp_path / "old.json", tmp_path / "bpe.json")
    out, _ = finish(start(*train, 3, "--resume", cwd=tmp_path))
    assert "at step 2\n" in out and "exact resume is lost" not in out


def test_a_reasoner_needs_no_file_beside_it(tmp_path):
    sizes = "--d_model=16 --n_heads=2 --batch_size=8 --eval_rows=8 --mixed_precision=none --device=cpu"
    finish(start("train_hrm.py", "--dataset=synthetic", *sizes.split(), "--steps=2", "--save_dir=r", cwd=tmp_path))
    shutil.copy(tmp_path / "r" / "final.pt", tmp_path / "alone.pt")
    answers = [
        finish(start("generate.py", path, "--prompt=1 + 2", cwd=tmp_path))[0]
        for path in ("r", "r/final.pt", "alone.pt")
    ]
    assert answers[0] == answers[1] == answers[2]
    model, tokenizer = reasoning.load(tmp_path / "alone.pt")
    assert model.answer("1 + 2") + "\n" == answers[0] and tokenizer.vocab_size == 98


# ---- from Python -----------------------------------------------------------------------------------------------------


def test_rooms_import_torch_only_for_load():
    code = (
        "import sys\nfrom data_utils import text, reasoning, formulas, events, pages\nprint('torch' in sys.modules)\n"
    )
    code += "from data_utils.text import load\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\nTrue\n", done.stderr
    with pytest.raises(AttributeError, match="data_utils.pages"):
        pages.lod  # noqa: B018


@pytest.mark.parametrize("expert", ["transformer_expert", "state_space_expert", "diffuser_expert", "nanothink_mla"])
def test_language_models(expert, capsys):
    path = OLD / "text" / f"{expert}_interrupted.pt"
    model, tokenizer = text.load(path)
    assert model(torch.tensor([tokenizer.encode("In the")])).shape == (1, 6, tokenizer.vocab_size)
    answer = model.generate("In the", max_new_tokens=8, seed=1)
    assert answer.startswith("In the") and answer == model.generate("In the", max_new_tokens=8, seed=1)
    assert model.generate("In the", length=10).startswith("In the")
    generate.main(generate.Config(checkpoint=path, prompt="In the", max_new_tokens=8, seed=1, device="cpu"))
    assert capsys.readouterr().out == answer + "\n"


def test_other_rooms(tmp_path):
    network, alphabet = formulas.load(OLD / "formulas")
    assert alphabet is network.alphabet and not network.training
    regressor = formulas.SymbolicRegressor(max_seconds=0, choices=4, model=network).fit([[1.0], [2], [3]], [2.0, 4, 6])
    assert regressor.formula_

    rows, _ = decay_chain(12, seed=1)
    model, meta = events.load(OLD / "events")
    codes = model.encode(rows)
    again = model.decode(**codes)
    assert again.shape == rows.shape and np.isfinite(again).all() and meta["n_tokens"] == codes["ids"].shape[1]

    model, tasks = pages.load(OLD / "pages")
    answer = model.answer("1...3......4..2.", steps=1)
    assert list(tasks) == ["sudoku4"] and [len(line) for line in answer.split("\n")] == [4] * 4


# ---- export ----------------------------------------------------------------------------------------------------------


def export(path, out, **more):
    return generate.main(generate.parse([str(path), "--export", str(out), *[f"--{key}" for key in more]]))


@pytest.mark.parametrize(
    "place", ["text/transformer_expert_interrupted.pt", slow("text/diffuser_expert_interrupted.pt"), slow("hrm")]
)
def test_an_exported_program_has_the_outputs_of_the_model(place, tmp_path, capsys):
    export(OLD / place, tmp_path / "model.pt2")
    assert "forward pass of ids" in capsys.readouterr().out
    extra = {"petri.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    header = json.loads(extra["petri.json"])
    assert json.loads(header["kind"]) == PLACES.get(place, ["expert:diffuser"])[0]
    model, _ = (reasoning if place == "hrm" else text).load(OLD / place)
    for length in (5, 16):
        inputs = model.example(1, length)
        torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    if "transformer" in place:
        export(OLD / place, tmp_path / "model.pt2")  # its own file is replaced
    (tmp_path / "model.pt2").write_text("of the user's\n")
    with pytest.raises(UsageError, match="--fresh"):
        export(OLD / place, tmp_path / "model.pt2")


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: False)
    with pytest.raises(generate.DataError, match="differ"):
        export(TRANSFORMER, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["text/transformer_expert_interrupted.pt", "text/diffuser_expert_interrupted.pt",
                                   "text/state_space_expert_interrupted.pt", "text/nanothink_mla_interrupted.pt",
                                   "hrm"])  # fmt: skip
def test_safetensors_hold_the_weights_and_what_rebuilds_the_model(place, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    export(OLD / place, path)
    export(OLD / place, path)  # its own file is replaced
    model, _ = (reasoning if place == "hrm" else text).load(OLD / place)
    with safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        header = {name: value if name == "origin" else json.loads(value) for name, value in file.metadata().items()}
    assert {name: header[name] for name in model.header} == json.loads(json.dumps(model.header))
    network = type(model.network)(**header["model_args"])
    network.load_state_dict(weights)
    state = model.network.state_dict()
    assert weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)
    path.write_text("of the user's\n")
    with pytest.raises(UsageError, match="--fresh"):
        export(OLD / place, path)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="pip install safetensors\ntry: --export .*none.pt2"):
        export(TRANSFORMER, tmp_path / "none.safetensors")


# ---- streams ---------------------------------------------------------------------------------------------------------


def shell(command, **variables):
    script = f"set -o pipefail; {sys.executable} {ROOT}/generate.py {TRANSFORMER} --device cpu {command}"
    return subprocess.run(["bash", "-c", script], capture_output=True, env=environment(**variables))


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_a_reader_that_leaves():
    done = shell("--max_new_tokens 300 | head -c 1")
    assert (done.returncode, len(done.stdout)) == (141, 1) and b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_an_old_code_page():
    done = shell("--max_new_tokens 5 --prompt '\N{RIGHTWARDS ARROW}'", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and done.stdout.startswith(b"\\u2192"), done.stderr
    done = shell("--prompt $'caf\\xe9'")
    assert done.returncode == 2 and b"0xe9" in done.stderr and b"Traceback" not in done.stderr
