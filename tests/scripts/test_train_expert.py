"""train_expert.py through its real command line at toy size."""

import json
import math
import re
import shutil

import pytest
import torch

from data_utils.checkpoint import load_checkpoint
from data_utils.text.windows import DomainText
from data_utils.tokenizer import load_tokenizer
from tests.helpers import ROOT, SIZES, TINY, finish, start, start_cold
from train_expert import CONFIGS, decays


def rows(folder, split="train", expert="transformer"):
    lines = (folder / f"{expert}_expert_metrics.jsonl").read_text().splitlines()[1:]
    return [row for row in map(json.loads, lines) if row["split"] == split]


def test_one_file_by_domain_or_in_a_folder_of_its_own(toy, tmp_path):
    domain = tmp_path / "data" / "my_domain"
    domain.mkdir(parents=True)
    shutil.copy(toy / "general" / "toy.jsonl", domain)
    shutil.copytree(toy / "code", tmp_path / "data" / "code")
    shutil.copytree(domain, tmp_path / "my_training_data" / "my_domain")
    common = ["--expert=transformer", "--max_steps=3", *TINY]
    by_domain = start("train_expert.py", *common, "--domains", "my_domain", "--checkpoint_dir=a", cwd=tmp_path)
    isolated = start("train_expert.py", *common, "--data_dir=my_training_data", "--checkpoint_dir=b", cwd=tmp_path)
    assert "my_domain" in finish(by_domain)[0] and "my_domain" in finish(isolated)[0]
    assert list(rows(tmp_path / "a", "val")[-1]["domains"]) == ["my_domain"]
    losses = [rows(tmp_path / name, "val")[-1]["loss"] for name in "ab"]
    assert losses[0] == losses[1]


def test_few_windows_hold_each_domain(toy, tmp_path):
    few = ["--expert=transformer", "--max_steps=1", *TINY, "--eval_windows=1", f"--data_dir={toy}"]
    finish(start("train_expert.py", *few, f"--checkpoint_dir={tmp_path}"))
    domains = rows(tmp_path, "val")[-1]["domains"]
    assert set(domains) == {folder.name for folder in toy.iterdir() if folder.is_dir() and folder.name[0] != "."}


def test_the_smoke_bundle_learns(toy, tmp_path):
    flags = ["--config", ROOT / "configs/expert/smoke.yaml", "--data_dir", toy, "--checkpoint_dir", tmp_path]
    out, _ = finish(start_cold("train_expert.py", *flags))
    assert "bits per byte" in out and re.search(r"next: python \S*generate.py", out.splitlines()[-1])
    assert rows(tmp_path, "val")[-1]["loss"] < 0.6 * math.log(259)
    assert (tmp_path / "transformer_expert_loss.png").stat().st_size > 10_000


def test_every_file_has_the_documented_fields(experts):
    for expert in SIZES:
        state = load_checkpoint(experts / f"{expert}_expert.pt", f"expert:{expert}")
        documented = {"model_state", "optimizer_state", "step", "epoch", "amp_scaler", "step_in_epoch", "best_val_loss",
                      "patience_used", "config", "model_args", "expert", "tokenizer", "tokenizer_hash", "data_hash",
                      "world_size", "format"}  # fmt: skip
        assert documented <= state.keys()


def test_accumulation_equals_the_large_batch_and_a_leftover_group_steps(toy, tmp_path):
    def even(T):  # so that both runs draw equally many windows
        data = DomainText(toy, load_tokenizer("bytes"), domains=(), val_split=0.1, window=T, cache_dir=tmp_path)
        return math.ceil(data.windows("train") / 128) % 2 == 0

    T = next(T for T in range(32, 64) if even(T))
    common = ["--expert=transformer", *TINY, f"--data_dir={toy}", f"--max_seq_len={T}", "--dropout=0", "--no-use_amp",
              "--log_interval=1", "--max_epochs=1"]  # fmt: skip
    runs = dict(large=["--batch_size=256"], parts=["--batch_size=128", "--grad_accum_steps=2"],
                leftover=["--batch_size=128", "--grad_accum_steps=7"])  # fmt: skip
    for process in [start("train_expert.py", *common, *f, f"--checkpoint_dir={tmp_path / n}") for n, f in runs.items()]:
        finish(process)
    large, parts, leftover = (rows(tmp_path / name) for name in runs)
    assert [r["loss"] for r in large] == pytest.approx([r["loss"] for r in parts], abs=1e-5)
    states = [load_checkpoint(tmp_path / n / "transformer_expert.pt", "expert:transformer") for n in ("large", "parts")]
    for key, weight in states[0]["model_state"].items():
        torch.testing.assert_close(weight, states[1]["model_state"][key], rtol=0, atol=1e-5)
    batches = sum(r["tokens"] for r in parts) // (128 * T)
    assert len(leftover) == math.ceil(batches / 7)
    assert leftover[-1]["tokens"] == (batches % 7 or 7) * 128 * T and leftover[0]["tokens"] == 7 * 128 * T


def test_decay_is_for_matrices_only(experts):
    from data_utils.text.experts import load_expert

    for expert in SIZES:
        model, _ = load_expert(experts / f"{expert}_expert.pt", expert)
        decayed = {name for name, p in model.named_parameters() if decays(name, p)}
        assert decayed and all("proj" in n or n.endswith(("weight", "start")) for n in decayed)
        assert not [n for n in decayed if "norm" in n or "embedding" in n or "A_log" in n or "bias" in n]


def test_documented_defaults():
    transformer, state_space, diffuser = (cls() for cls in CONFIGS.values())
    assert (transformer.d_model, transformer.max_seq_len, transformer.n_layers, transformer.ffn_mult) == (
        384,
        512,
        6,
        4,
    )
    assert (state_space.n_layers, state_space.d_state) == (6, 16)
    assert (diffuser.n_layers, diffuser.training_steps, diffuser.lr, diffuser.batch_size) == (4, 100, 1e-4, 64)
    assert (transformer.lr, transformer.batch_size, transformer.max_epochs, transformer.patience) == (3e-4, 32, 20, 5)
    assert (transformer.grad_clip, transformer.tokenizer, transformer.val_split) == (1.0, "gpt2", 0.1)


def test_early_stop_rotation_and_budgets(toy, tmp_path):
    common = ["--expert=transformer", f"--data_dir={toy}", *TINY, "--batch_size=256"]
    still = start("train_expert.py", *common, "--lr=0", "--patience=2", "--max_epochs=9", "--save_every=1", "--keep=1",
                  f"--checkpoint_dir={tmp_path / 'still'}")  # fmt: skip
    short = start("train_expert.py", *common, "--max_seconds=0.001", "--eval_interval=2", "--amp_dtype=fp16",
                  f"--checkpoint_dir={tmp_path / 'short'}")  # fmt: skip
    assert "cpu, float32" in finish(short)[0] and len(rows(tmp_path / "short", "val")) == 1
    finish(still)
    assert len(rows(tmp_path / "still", "val")) == 3  # one that improves on nothing, two that do not improve
    assert [p.name for p in (tmp_path / "still").glob("*epoch*.pt")] == ["transformer_expert_epoch3.pt"]
    more = ["--max_steps=6", "--eval_interval=2", "--resume", f"--checkpoint_dir={tmp_path / 'short'}"]
    again = start("train_expert.py", *common, *more)
    over = start("train_expert.py", *common, "--patience=2", "--resume", f"--checkpoint_dir={tmp_path / 'still'}")
    assert "at step 1" in finish(again)[0] and "finished at step" in finish(over)[0]
    assert [r["step"] for r in rows(tmp_path / "short", "val")] == [1, 2, 4, 6]
