"""The recipes of docs/extending.md, followed to the letter in a copy of the repo."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_utils.checkpoint import load_checkpoint
from data_utils.events.facts import read_events
from tests.helpers import ROOT, finish, start

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TOY = """events=200 limit=64 hidden=[8,8] latent_dim=4 codebook_size=8 gnn_dim=8 gnn_layers=1 batch_size=16 epochs=2
device=cpu make_plots=false""".split()


def blocks(page):
    """Yield (file, place, text) of the blocks of a page whose first line says where they go."""
    for block in re.findall(r"```\w+\n(# \S+, .*?)```", page, re.S):
        first, text = block.split("\n", 1)
        yield *re.fullmatch(r"# (\S+), (a new file|(?:below|above): .*)", first).groups(), text


def follow(page, folder):
    """Do what the blocks of a page say, in the copy `folder`."""
    for name, place, text in blocks(page):
        path = Path(folder, name)
        if place == "a new file":
            path.parent.mkdir(exist_ok=True)
            assert not path.exists()
            path.write_text(text)
            continue
        side, line = place.split(": ", 1)
        lines = path.read_text().splitlines(keepends=True)
        (number,) = [i for i, there in enumerate(lines) if there.strip() == line]
        lines.insert(number + (side == "below"), text)
        path.write_text("".join(lines))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repo with all recipes of the page."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("models", "data_utils", "configs/ae", "train_ae.py", "generate.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    follow(PAGE, folder)
    return folder


def train(copy, *words):
    """Train two epochs -> the checkpoint, the metrics of the last epoch with its val_loss, the folder."""
    home = copy / "-".join(words).replace("/", ".")
    finish(start(copy / "train_ae.py", *TOY, *words, f"out={home}", cwd=copy))
    event = [event for event in read_events(home) if event["moment"] == "on_epoch_end"][-1]
    state = load_checkpoint(home / "best_val.pt", ["ae:ae", "ae:my_loop"])
    return state, event["metrics"] | dict(val_loss=event["val_loss"]), home


def generated(copy, home, mode, name):
    """An array that a mode of generate.py writes."""
    finish(start(copy / "generate.py", "events", home, f"--mode={mode}", "--device=cpu", "--events=20", cwd=copy))
    with np.load(home / f"{mode}.npz") as file:
        return file[name]


def test_the_page_has_the_recipes():
    names = [name for name, place, _ in blocks(PAGE) if place == "a new file"]
    assert names == ["models/my_encoder.py", "configs/ae/encoder/my_encoder.yaml", "models/my_decoder.py",
                     "models/my_space.py", "models/my_loss.py"]  # fmt: skip
    assert len(list(blocks(PAGE))) == 16


def test_an_encoder(copy):
    state, _, home = train(copy, "phase1/encoder=my_encoder", "level=event", "decoder=gnn", "latent_space=none")
    assert state["model_args"]["custom_param"] == 123  # of its bundle
    assert state["model_state"]["encoder.first.weight"].shape == (123, 5)
    assert generated(copy, home, "encode", "latents").shape[1:] == (4,)
    settings = yaml.safe_load((home / ".hydra" / "config.yaml").read_text())
    assert (settings["encoder"], settings["custom_param"]) == ("my_encoder", 123)
    out, _ = finish(start(copy / "train_ae.py", f"resume={home}", "epochs=3", cwd=copy))
    assert f"resumed {home}/last.pt at step 8" in out and "custom_param" not in out
    _, err = finish(start(copy / "train_ae.py", f"resume={home}", "custom_param=7", "epochs=4", cwd=copy), 2)
    assert "custom_param 123 -> 7" in err


def test_a_decoder_and_a_latent_space_and_a_loss(copy):
    words = "decoder=my_decoder latent_space=my_space custom_param=9 absolute_weight=0.5 kl_weight=2".split()
    state, metrics, home = train(copy, *words)
    assert state["model_state"]["decoder.net.0.weight"].shape[0] == 9 and state["model_args"]["custom_param"] == 9
    weights = dict(rec_tokens=1, rec_types=0.1, rec_globals=0.1, absolute=0.5, kl=2)
    assert metrics["kl"] > 0 and metrics["absolute"] > 0
    assert metrics["val_loss"] == pytest.approx(sum(weight * metrics[name] for name, weight in weights.items()))
    assert generated(copy, home, "sample", "X").shape == (20, 92)
    assert generated(copy, home, "reconstruct", "X").shape[1] == 92


def test_a_loop(copy):
    state, metrics, home = train(copy, "loop=my_loop", "smear=0.2", "level=event")
    assert state["kind"] == "ae:my_loop" and state["config"]["smear"] == 0.2 and metrics["val_loss"] > 0
    assert generated(copy, home, "reconstruct", "X").shape[1] == 92


def test_help_and_slips_know_the_new_words(copy):
    out, _ = finish(start(copy / "train_ae.py", "--help", "all", cwd=copy))
    text = " ".join(out.split())
    assert "width of my_encoder (default: 42)" in text
    for key, words in dict(loop="my_loop", encoder="my_encoder", decoder="my_decoder", latent_space="my_space").items():
        assert words in text
        _, err = finish(start(copy / "train_ae.py", f"{key}=my_x", cwd=copy), 2)
        assert words in err
    _, err = finish(start(copy / "train_ae.py", "decoder=my_encoder", cwd=copy), 2)
    assert "my_decoder" in err and "invalid choice" in err
