"""train_mla.py through its real command line at toy size."""

import re

import numpy as np
import pytest
import torch

from data_utils.text.experts import load_expert
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from models.router import FAMILIES
from tests.helpers import MLA, finish, start, start_cold, train_flags


@pytest.fixture(scope="module")
def trained(toy, experts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mla")
    flags = [*train_flags("mla_store", toy, experts), f"--checkpoint_dir={folder}", "--max_steps=12"]
    out, _ = finish(start_cold(*flags))
    assert "static mixture: transformer" in out and "store of 1" in out
    return folder


def test_store_holds_no_validation_text(toy, trained, tmp_path):
    data = DomainText(toy, load_tokenizer("bytes"), domains=(), val_split=0.1, window=32, cache_dir=tmp_path)
    model, checkpoint = load_expert(trained / "nanothink_mla.pt", "mla")
    assert len(model.store) == 1500 and checkpoint["store_hash"]
    index = np.arange(data.windows("val"))
    real = data.batch("val", index)[1] >= 0
    held_out = set(data.documents("val", index)[real].tolist())
    train = set(data.documents("train", np.arange(data.windows("train"))).flatten().tolist())
    assert set(model.store.documents.tolist()) <= train and not held_out & train


@pytest.mark.slow
def test_a_store_larger_than_the_text_is_cut_to_it(toy, experts, tmp_path):
    flags = [*train_flags("mla_store", toy, experts), f"--checkpoint_dir={tmp_path}", "--max_steps=1"]
    out, _ = finish(start(*flags, "--max_vectors=50000000"))
    (size,) = re.findall(r"--max_vectors 50000000: cut to (\d+), all training contexts", out)
    assert f"store of {size} training contexts" in out  # none is left out, and no memory for more is taken


def test_checkpoint_writes_text_and_keeps_its_experts(trained, experts):
    checkpoint = trained / "nanothink_mla.pt"
    ask = ["generate.py", f"--checkpoint={checkpoint}", "--prompt=In the", "--max_new_tokens=60"]
    out, err = finish(start_cold(*ask))
    assert out.startswith("In the") and "state of" in err
    again, _ = finish(start(*ask))
    assert out == again
    model, _ = load_expert(checkpoint)
    for name, expert in model.experts.items():
        source, _ = load_expert(experts / f"{name}_expert.pt")
        assert all(torch.equal(a, b) for a, b in zip(expert.parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize(
    "flags, status, words",
    [
        (["--diffuser_ckpt=none.pt"], 1, "none.pt is missing\ntry: python"),
        (["--diffuser_ckpt=none.pt", "--domains", "code", "general"], 1, "--domains code general --d_model 32"),
        (["--d_model=64"], 2, "transformer_expert.pt differs from this run: d_model 32 -> 64"),
        (["--max_seq_len=16"], 2, "max_seq_len 32 -> 16"),
        (["--n_experts=4"], 2, "invalid choice: 4 (choose from 3)"),
        (["--rope_dim=7"], 2, "--rope_dim 7: expected an even number"),
        (["--kv_latent_dim=-1"], 2, "--kv_latent_dim -1: expected 0 or more"),
        (["--top_k=0"], 2, "--top_k 0: expected 1 or more"),
    ],
)
def test_user_errors(flags, status, words, toy, experts, tmp_path):
    _, err = finish(start(*train_flags("mla", toy, experts), f"--checkpoint_dir={tmp_path}", *flags), status)
    assert words in err and "Traceback" not in err


def test_store_must_be_the_one_of_the_checkpoint(toy, experts, trained, tmp_path):
    for path in trained.glob("nanothink_mla*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def train(name="mla_store", status=0):
        flags = train_flags(name, toy, experts)
        return finish(start(*flags, f"--checkpoint_dir={tmp_path}", "--max_steps=14", "--resume"), status)

    (tmp_path / "nanothink_mla_store.npz").write_bytes(b"another")
    assert "nanothink_mla_store.npz is not the store" in train(status=1)[1]
    (tmp_path / "nanothink_mla_store.npz").unlink()
    assert "nanothink_mla_store.npz is missing" in train(status=1)[1]
    assert "use_vector_store True -> False" in train("mla")[0]  # without a memory from now on
    out, _ = train("mla_store")
    assert "finished" in out or "lambda starts at 0.05" in out


@pytest.mark.parametrize("latent", ["--kv_latent_dim=0", "--kv_latent_dim=16"])
def test_smallest_runs(latent, toy, experts, tmp_path):
    flags = [*train_flags("mla", toy, experts), f"--checkpoint_dir={tmp_path}", "--max_steps=3", latent]
    out, _ = finish(start(*flags))
    assert "nanothink_mla: step 3 of 3" in out and all(name in out for name in FAMILIES)
    assert MLA[1] not in latent or (tmp_path / "nanothink_mla_loss.png").exists()
