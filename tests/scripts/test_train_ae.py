"""The script train_ae.py as a user starts it, at toy size."""

import csv
import json
import math
import os
import random
import shlex
import signal
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train_ae
from data_utils.checkpoint import load_checkpoint
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import write_events
from data_utils.events.decay_chain import decay_chain
from data_utils.launch import launch
from data_utils.overrides import Jobs
from models.parts import DECODERS, ENCODERS, LATENT_SPACES
from tests.helpers import ROOT, THREADS, finish, slow, start, start_cold, start_two
from tests.scripts.test_resume import assert_same
from train_ae import AeConfig, DiffusionAeConfig, TestMlpConfig, main

TOY = """hidden=[8,8] latent_dim=4 codebook_size=8 gnn_dim=8 gnn_layers=1 limit=64 batch_size=16 device=cpu epochs=2
make_plots=false outputs=outputs""".split()
WEIGHTS = dict(rec_tokens=1, commit=1, rec_types=0.1, rec_globals=0.1)  # of the losses of loop ae
TIMES = "epoch_time_s total_time_s throughput max_memory_mib meta".split()  # of an event; what a clock measures
TestMlpConfig.__test__ = False  # not a test in spite of its name


@pytest.fixture(scope="session")
def events(tmp_path_factory):
    path = tmp_path_factory.mktemp("events") / "few.npz"
    write_events(path, *decay_chain(200, 0), seed=0)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working folder of its own, and threads as the processes that it starts."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(THREADS))
    yield
    torch.set_num_threads(threads)


def read(*words):
    """The configuration of a command line, its words in one string or several."""
    words = [word for text in words for word in shlex.split(str(text))]
    return train_ae.parse(words)


def run(events, *words):
    """A toy run in this process -> what `main` returns."""
    return main(read(*TOY, f"data={events}", *words))


def launched(events, *words, status):
    """Its last words as a program that leaves with `status`, on at most three lines."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            launch(main, read(*TOY, f"data={events}", *words))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == status


def lines(home):
    """The events of a run; each line is strict JSON."""

    def constant(name):
        raise AssertionError(f"{name} is not strict JSON")

    text = Path(home, "facts", "events.jsonl").read_text()
    return [json.loads(line, parse_constant=constant) for line in text.splitlines()]


def moments(home):
    return [line["moment"] for line in lines(home)]


def saved(home):
    """What the checkpoints of a run hold, and its facts, without what a clock measures and without interruptions."""
    states = {}
    for name in ("last.pt", "best_val.pt"):
        state = load_checkpoint(Path(home, name), [f"ae:{loop}" for loop in train_ae.LOOPS])
        state |= dict(seconds=0, epoch_seconds=0, run_id="", test_loss=repr(state["test_loss"]))  # nan is not nan
        states[name] = state | dict(histories=without_times(state["histories"]))
    entries = [without_times(line) for line in lines(home)]
    entries = [line for line in entries if line["moment"] not in ("on_start", "on_resume", "on_interrupt")]
    entries = [line | dict(run_dir="", histories=without_times(line.get("histories") or {})) for line in entries]
    rows = csv.DictReader(Path(home, "facts", "scalars.csv").read_text().splitlines())
    return states, entries, [without_times(row) for row in rows]


def without_times(row):
    return {name: value for name, value in row.items() if name not in TIMES}


# ---- commands --------------------------------------------------------------------------------------------------------

COMMANDS = [  # of the training guide, and the same with flags
    ("", ""),
    ("phase1.trainer.epochs=20 phase1/latent_space=vq", "--epochs 20 --latent-space vq"),
    ("loop=ae", "--loop ae"),
    ("loop=gan_ae", "--loop gan_ae"),
    ("loop=diffusion_ae", "--loop diffusion_ae"),
    ("loop=test_mlp", "--loop test_mlp"),
    ("phase1.trainer.lr=0.001", "--lr 1e-3"),
    ("phase1.trainer.seed=43", "--seed 43"),
    ("data.batch_size=256", "--batch-size 256"),
    (
        "phase1/encoder=gnn phase1/decoder=diffusion phase1/latent_space=linear",
        "--encoder gnn --decoder diffusion --latent-space linear",
    ),
    ("logging=plots_minimal", "--logging plots_minimal"),
    ("logging=plots_standard", "--logging plots_standard"),
    ("logging=plots_full", "--logging plots_full"),
    ("logging.save_artifacts=false", "--no-save-artifacts"),
    ("logging.make_plots=false", "--no-make-plots"),
    (
        "logging.families.losses.enabled=true logging.families.recon.enabled=false",
        "--plot-losses --no-plot-recon",
    ),
    ("env=cluster phase1.trainer.epochs=20", "--env cluster --epochs 20"),
]
SWEEPS = {  # and how many jobs they make
    "--multirun phase1/latent_space=none,linear,vq": 3,
    "--multirun hydra=experiment phase1/latent_space=none,vq phase1.trainer.epochs=10,20": 4,
    "--multirun hydra=experiment hydra.job.name=latent_comparison phase1/latent_space=none,vq": 2,
    "--multirun --name latent_comparison latent_space=none,vq": 2,
    "--config-name=phase1/experiment/compare_vq_vs_none": 3,
    "--config-name=phase1/experiment/compare_vq_vs_none phase1.trainer.epochs=50": 3,
    f"--config {ROOT}/configs/ae/experiment/compare_vq_vs_none.yaml": 3,
}


@pytest.mark.parametrize("overrides, flags", COMMANDS, ids=[overrides for overrides, _ in COMMANDS])
def test_a_command_of_the_guide_runs(overrides, flags, events):
    assert read(overrides) == read(flags)
    few = "batch_size=1000" if "mlp" in overrides else "batch_size=16"
    result = run(events, overrides, few, "epochs=2 make_plots=false")
    losses = [result[name] for name in ("final_val_loss", "best_val_loss", "test_loss")]
    assert all(map(math.isfinite, losses)) and result["best_epoch"] in (1, 2)
    assert bool(result["run_dir"]) == ("save_artifacts" not in overrides)


@pytest.mark.parametrize("line", SWEEPS)
def test_a_sweep_of_the_guide_parses(line):
    jobs = read(line)
    assert isinstance(jobs, Jobs) and len(jobs.configs) == SWEEPS[line]
    assert len({tuple(vars(cfg).items()) for cfg in jobs.configs}) == SWEEPS[line]


def test_a_whole_run_as_a_process(tmp_path):
    words = ["--config", ROOT / "configs" / "ae" / "smoke.yaml", "--device=cpu"]
    out, err = finish(start_cold("train_ae.py", *words, cwd=tmp_path))
    (home,) = Path("outputs", "runs").iterdir()
    assert home.name.startswith("run_2") and home.name.endswith("_smoke")
    assert "epoch 2/2 | train_loss" in out and "perplexity" in out and not err
    assert f"{home}: epoch 2 of 2, best val_loss" in out.splitlines()[-1] and "test_loss" in out.splitlines()[-1]
    assert moments(home) == ["on_start", "on_epoch_end", "on_epoch_end", "on_train_end", "on_test_end"]
    assert {p.name for p in home.iterdir()} == {".ae.lock", ".hydra", "facts", "figures", "best_val.pt", "last.pt",
                                                "model.pt"}  # fmt: skip
    assert os.readlink(home / "model.pt") == "best_val.pt"
    drawn = {p.name for p in (home / "figures").iterdir()}
    assert drawn >= {f"losses-{moment}-e001.png" for moment in ("on_epoch_end", "on_train_end", "on_test_end")}
    assert not [name for name in drawn if "e000" in name or name.startswith(("adversarial", "diffusion", "recon"))]
    assert {p.name for p in (home / ".hydra").iterdir()} == {"config.yaml", "overrides.yaml", "hydra.yaml"}
    assert yaml.safe_load((home / ".hydra" / "overrides.yaml").read_text()) == list(map(str, words))
    header = yaml.safe_load((home / ".hydra" / "hydra.yaml").read_text())
    assert {line["meta"]["run_id"] for line in lines(home)} == {header["run_id"]}


# ---- every combination -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["third", slow("every")])
def test_smoke_of_every_combination(share, events):
    """A third of them has each pair of an encoder, a decoder and a latent space with each loop."""
    loops = [cls for name, (cls, _) in train_ae.LOOPS.items() if name != "test_mlp"]
    few = dict(data=str(events), hidden=(8, 8), latent_dim=4, codebook_size=8, gnn_dim=8, limit=32, batch_size=16,
               epochs=1, device="cpu", save_artifacts=False, make_plots=False)  # fmt: skip
    parts = ENCODERS, DECODERS, LATENT_SPACES
    configs = [
        replace(cls(encoder=encoder, decoder=decoder, latent_space=space, **few),
                **dict(diffusion_steps=10, ddim_steps=2) if cls is DiffusionAeConfig else {})
        for cls, (i, encoder), (j, decoder), (k, space) in product(loops, *map(enumerate, parts))
        if share == "every" or (i + j + k) % 3 == 0
    ]  # fmt: skip
    mlp = few | dict(batch_size=2000)
    for cfg in [*configs, TestMlpConfig(**mlp), TestMlpConfig(task="binary", **mlp)]:
        result = main(cfg)
        assert result["step"] == 2 and result["skipped"] == 0, cfg
        assert all(math.isfinite(result[name]) for name in ("final_val_loss", "test_loss")), cfg
    assert not list(Path().iterdir())  # nothing is written


def test_a_loss_is_trained_with_its_weight_or_an_error(events, monkeypatch):
    @dataclass
    class Weighted(AeConfig):
        size_weight: float = 100.0  # weight of the loss size

    def with_size(output, *rest):
        return loss_sums(output, *rest) | dict(size=((output["x_hat"] - 1).square().sum(), output["x_hat"].numel()))

    loss_sums = train_ae.loss_sums
    toy = dict(hidden=(8, 8), latent_dim=4, latent_space="none", limit=64, batch_size=16, accumulate=2, epochs=8,
               make_plots=False, device="cpu", data=str(events), lr=0.05)  # fmt: skip
    plain = main(AeConfig(**toy, save_artifacts=False))
    monkeypatch.setattr(train_ae, "loss_sums", with_size)
    with pytest.raises(UsageError, match="the loss size has no weight(.|\n)*size_weight: float"):
        main(AeConfig(**toy, save_artifacts=False))
    heavy = main(Weighted(**toy, out="heavy"))["histories"]
    light = main(Weighted(**toy, save_artifacts=False, size_weight=0.0))
    assert heavy["size"][-1] < 0.5 * light["histories"]["size"][-1]
    last = lines("heavy")[8]["metrics"]
    parts = [last[name] * weight for name, weight in WEIGHTS.items()]
    assert last["size"] > 0 and heavy["val_loss"][-1] == pytest.approx(sum(parts) + 100 * last["size"])
    assert light["histories"]["val_loss"] == plain["histories"]["val_loss"]  # weight 0 changes no bit


def test_the_test_of_the_guide(tmp_path):
    result = main(AeConfig(epochs=2, save_artifacts=False, limit=64, make_plots=False))
    assert result["final_val_loss"] > 0 and result["run_dir"] == "" and not list(tmp_path.iterdir())


# ---- resume ----------------------------------------------------------------------------------------------------------

LONG = ["epochs=20", "batch_size=8", "accumulate=2", "dropout=0.1", "symmetries=true"]
KINDS = dict(
    ae="encoder=gnn noise_dim=3",
    gan_ae="loop=gan_ae encoder=gan decoder=gan",
    diffusion_ae="loop=diffusion_ae encoder=mlp ddim_steps=2",
)


def wait_for(there, process):
    while not there() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["ae", slow("gan_ae"), slow("diffusion_ae")])
def test_interrupted_and_resumed_equals_uninterrupted(kind, events, tmp_path):
    words, pick = [*KINDS[kind].split(), *LONG], random.Random(kind)
    line = ["train_ae.py", *TOY, f"data={events}", *words, "out=cut", "save_minutes=0.001"]
    process = start(*line, cwd=tmp_path)
    wait_for(Path("cut", "last.pt").exists, process)
    time.sleep(0.2 * pick.random())
    process.kill()
    finish(process, -signal.SIGKILL)
    process = start(*line, cwd=tmp_path)
    wait_for(lambda: "on_resume" in moments("cut"), process)
    time.sleep(0.2 * pick.random())
    process.terminate()
    out, _ = finish(process, 143)
    assert "resumed cut/last.pt at step" in out and "exact resume is lost" not in out
    assert moments("cut")[-1] == "on_interrupt"
    run(events, *words, "out=cut")
    run(events, *words, "out=whole")
    assert_same(saved("cut"), saved("whole"))
    assert len({line["meta"]["run_id"] for line in lines("cut")}) == 1
    epochs = [line["epoch"] for line in lines("cut") if line["moment"] == "on_epoch_end"]
    assert epochs == list(range(20)) and moments("cut").count("on_resume") == 2
    totals = [line["total_time_s"] for line in lines("cut") if line["moment"] == "on_epoch_end"]
    assert totals == sorted(totals)  # resumes are added


def test_two_ranks_equal_one(events, tmp_path, capfd):
    Path("two.py").write_text("""
import sys
from data_utils.launch import launch
import train_ae

def main(lines):
    for line in lines:
        train_ae.main(train_ae.parse(line.split()))
    return {}

launch(main, sys.argv[1:])
""")
    toy = " ".join([*TOY, f"data={events}"])
    others = [f"{toy} loop={loop} encoder=gan batch_size=8 out={loop}" for loop in ("gan_ae", "diffusion_ae")]
    two = start_two(tmp_path / "two.py", f"{toy} batch_size=8 revive=-1 symmetries=true out=two", *others, cwd=tmp_path)
    run(events, "batch_size=16 revive=-1 symmetries=true out=one")
    for process in two:
        finish(process)
    one, two = (load_checkpoint(f"{name}/last.pt", "ae:ae") for name in ("one", "two"))
    torch.testing.assert_close(two["model_state"], one["model_state"], rtol=0, atol=1e-5)
    for name in ("val_loss", "train_loss", "rec_tokens", "usage", "perplexity"):
        assert two["histories"][name] == pytest.approx(one["histories"][name], abs=1e-5), name
    assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-5)
    assert all(math.isfinite(load_checkpoint(f"{loop}/last.pt", f"ae:{loop}")["test_loss"]) for loop in
               ("gan_ae", "diffusion_ae"))  # fmt: skip
    # one process goes on for two: an epoch has more batches
    run(events, "batch_size=8 revive=-1 symmetries=true out=two epochs=3")
    assert "world_size 2 -> 1" in capfd.readouterr().out
    assert load_checkpoint("two/last.pt", "ae:ae")["step"] == 3 * 8 and len(lines("two")) == 7


def test_what_cannot_be_read_is_named_and_the_next_is_taken(events, capfd):
    run(events, "out=a epochs=3")
    expected = saved("a")
    Path("a", "last.pt").write_bytes(b"cut")
    run(events, "out=a epochs=3")
    out, err = capfd.readouterr()
    assert "a/last.pt can't be read" in err and "resumed a/best_val.pt" in out
    assert_same(saved("a"), expected)
    for name in ("last.pt", "best_val.pt"):
        Path("a", name).write_bytes(b"cut")
    launched(events, "out=a epochs=3", status=1)
    assert "checkpoints can be read" in capfd.readouterr().err
    launched(events, "resume=a/last.pt", status=2)
    assert "no fallback for a named file" in capfd.readouterr().err


def test_a_run_is_repeated_finished_and_made_longer(events, capfd):
    first = run(events, "out=a encoder=gnn labels=[0,1,2] name=some lr=0.002")
    before = {p: p.stat().st_mtime_ns for p in Path("a").glob("*.pt")}
    again = run(events, "out=a encoder=gnn labels=[0,1,2] name=some lr=0.002")
    assert "a: finished after 2 epochs" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path("a").glob("*.pt")} == before
    assert again["test_loss"] == first["test_loss"] and len(lines("a")) == 5
    main(read("--config a/.hydra/config.yaml out=b"))
    assert_same(saved("b"), saved("a"))
    result = main(read("resume=a epochs=4"))
    assert result["run_dir"] == "a" and result["epoch"] == 4 and result["run_id"] == first["run_id"]
    settings = yaml.safe_load(Path("a", ".hydra", "config.yaml").read_text())
    assert (settings["epochs"], settings["encoder"], settings["labels"], settings["lr"]) == (4, "gnn", [0, 1, 2], 0.002)
    assert not {"config", "env", "logging", "out", "resume"} & settings.keys()
    ends = [line["epoch"] for line in lines("a") if line["moment"] == "on_epoch_end"]
    assert ends == [0, 1, 2, 3] and moments("a").count("on_test_end") == 1
    main(read("resume=a/best_val.pt --config a/.hydra/config.yaml out=c"))  # all trained, not yet tested
    assert moments("c") == ["on_resume", "on_train_end", "on_test_end"]


def test_a_longer_run_keeps_the_rates_of_its_codebook(events):
    run(events, "out=a batch_size=1 limit=16 epochs=13")
    rates = load_checkpoint("a/last.pt", "ae:ae")["model_args"]
    assert rates["ema_decay"] > 0.8
    run(events, "out=a batch_size=1 limit=16 epochs=14")
    assert load_checkpoint("a/last.pt", "ae:ae")["model_args"] == rates


def test_early_ends(events):
    result = run(events, "out=a max_steps=3")
    assert result["step"] == 3 and moments("a") == ["on_start"] and math.isnan(result["test_loss"])
    assert run(events, "out=a max_steps=3")["step"] == 3
    run(events, "out=a")
    run(events, "out=b")
    assert_same(saved("a"), saved("b"))
    assert run(events, "out=c max_seconds=1e-9")["step"] == 1
    run(events, "out=b fresh=true seed=3")
    assert Path("b", "last.pt.bak").exists() and Path("b", "facts.bak").is_dir() and len(lines("b")) == 5


def test_a_schedule_in_steps_may_end_within_an_epoch(events, capfd):
    result = run(events, "out=a epochs=0 steps=6")  # of four steps in an epoch
    assert (result["step"], result["epoch"], result["tested"]) == (6, 2, 2)
    assert len(result["histories"]["val_loss"]) == 2 and math.isfinite(result["test_loss"])
    assert run(events, "out=a epochs=0 steps=6")["step"] == 6 and "a larger steps= goes on" in capfd.readouterr().out
    result = run(events, "out=a epochs=0 steps=10")  # its second epoch goes on
    assert (result["step"], result["epoch"], result["tested"]) == (10, 3, 3)
    assert len(result["histories"]["val_loss"]) == 3
    assert [line["epoch"] for line in lines("a") if line["moment"] == "on_epoch_end"] == [0, 1, 2]
    run(events, "out=b epochs=0 steps=8")
    run(events, "out=c")  # as many steps, in epochs
    for name in ("model_state", "optimizer_state"):
        states = [load_checkpoint(f"{home}/last.pt", "ae:ae")[name] for home in "bc"]
        assert_same(*states)


def as_before_flags_were_renamed(home):
    """Give the files of a run the keys that they had when `codebook_decay` was `ema_decay` and the floor fixed."""
    for path in (Path(home, "last.pt"), Path(home, "best_val.pt")):
        state = load_checkpoint(path, "ae:ae")
        config = state["config"]
        config["ema_decay"] = config.pop("codebook_decay")
        del config["min_lr_ratio"]
        torch.save(state, path)
    path = Path(home, ".hydra", "config.yaml")
    settings = yaml.safe_load(path.read_text())
    settings["ema_decay"] = settings.pop("codebook_decay")
    del settings["min_lr_ratio"]
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def test_a_run_of_an_older_version_goes_on(events, capfd):
    run(events, "out=old codebook_decay=0.9 max_steps=6")
    as_before_flags_were_renamed("old")
    run(events, "out=new ema_decay=0.9")
    capfd.readouterr()
    main(read("resume=old max_steps=0"))  # with the settings in its folder
    out = capfd.readouterr().out
    assert "resumed old/last.pt at step 6" in out and "exact resume is lost" not in out
    assert_same(saved("old"), saved("new"))
    as_before_flags_were_renamed("old")
    main(read("resume=old max_steps=0 epochs=3 min_lr_ratio=0.2"))
    assert "min_lr_ratio 0.1 -> 0.2: exact resume is lost" in capfd.readouterr().out


def test_common_names_of_flags_work_too():
    words = "learning_rate=0.1 phase1.trainer.max_epochs=3 --grad_accum_steps=2 grad_clip=2 lr_min_ratio=0"
    cfg = read(words, "warmup_steps=7")
    assert (cfg.lr, cfg.epochs, cfg.accumulate, cfg.clip, cfg.min_lr_ratio, cfg.warmup) == (0.1, 3, 2, 2.0, 0.0, 7.0)
    cfg = read("loop=diffusion_ae --gradient-accumulation-steps 2 --gradient_clip 3 learning_rate=0.5 max-epochs=4")
    assert (cfg.accumulate, cfg.clip, cfg.lr, cfg.epochs) == (2, 3.0, 0.5, 4)
    jobs = read("--multirun learning_rate=0.1,0.2 ema_decay=0.5")
    assert [(cfg.lr, cfg.codebook_decay) for cfg in jobs.configs] == [(0.1, 0.5), (0.2, 0.5)]


def test_the_floor_of_the_learning_rate(events):
    run(events, "out=a epochs=8 min_lr_ratio=0.5 lr=0.001")
    rates = load_checkpoint("a/last.pt", "ae:ae")["histories"]["lr"]
    assert 0.0005 <= rates[-1] < 0.00051 and max(rates) < 0.001


@pytest.fixture(scope="module")
def finished(events, tmp_path_factory):
    """The folder of a finished run."""
    home = tmp_path_factory.mktemp("finished") / "a"
    run(events, f"out={home}")
    return home


REFUSED = [  # (words, exit status, what the message must name); {a} is a finished run
    ("out={a} latent_dim=5", 2, "latent_dim 4 -> 5"),
    ("out={a} codebook_size=9", 2, "codebook_size 8 -> 9"),
    ("out={a} encoder=gnn", 2, "encoder mlp -> gnn"),
    ("out={a} latent_space=none", 2, "latent_space vq -> none"),
    ("out={a} codebook_decay=0.5", 2, "ema_decay 0.8 -> 0.5"),
    ("out={a} ema_decay=0.5", 2, "ema_decay 0.8 -> 0.5"),
    ("out={a} labels=[0,1]", 2, "data_hash"),
    ("out={a} limit=63", 2, "data_hash"),
    ("out={a} loop=gan_ae", 2, "ae:gan_ae"),
    ("out={a} resume=none", 2, "{a} is not empty"),
    ("name=../x", 2, "--name ../x"),
    ("name=nul", 2, "--name nul"),
    ("resume={a}/none.pt", 2, "no such run"),
    ("resume=.", 2, "no such run"),
    ("device=cuda:7", 2, "--device cpu"),
    ("epochs=0", 2, "--epochs 0: expected one of them"),
    ("lr=-1", 2, "--lr -1.0: expected 0"),
    ("batch_size=0", 2, "--batch_size 0"),
    ("labels=[7]", 1, "labels there: 0 1 2 3 4 5"),
    ("features=[E,mass]", 2, "E pT eta phi"),
    ("data=none.npz", 1, "prepare_data.py events"),
    ("data=none.csv", 2, ".npz"),
    ("out={file}/x", 1, "can't be written"),
]


@pytest.mark.parametrize("words, status, name", REFUSED, ids=[words for words, _, _ in REFUSED])
def test_what_is_refused(words, status, name, events, finished, tmp_path, capfd):
    places = dict(a=finished, file=tmp_path / "file")
    places["file"].write_text("")
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    launched(events, words.format(**places), status=status)
    err = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(err) <= 3 and err[0].startswith("error: ") and name.format(**places) in "\n".join(err), err
    assert {p: p.read_bytes() for p in before} == before and [p.name for p in tmp_path.rglob("*")] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(events):
    with pytest.raises(UsageError, match="--device cuda(.|\n)*--device cpu"):
        run(events, "device=cuda")
    assert run(events, "device=auto out=a")["epoch"] == 2


def test_more_codes_than_particles(events, capfd):
    run(events, "limit=4 codebook_size=512 batch_size=2")
    assert "codebook_size=" in capfd.readouterr().err


# ---- files -----------------------------------------------------------------------------------------------------------


def test_no_symlinks(events, monkeypatch):
    def refuse(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "symlink", refuse)
    run(events, "out=a")
    assert not Path("a", "model.pt").is_symlink()
    assert Path("a", "model.pt").read_bytes() == Path("a", "best_val.pt").read_bytes()
    Path("a", "last.pt").unlink()
    Path("a", "best_val.pt").unlink()
    assert run(events, "out=a epochs=3")["epoch"] == 3  # from the copy


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(events, capfd):
    Path("closed").mkdir(mode=0o500)
    launched(events, "out=closed/a", status=1)
    assert "closed/a can't be written" in capfd.readouterr().err
    assert run(events, "out=closed/a save_artifacts=false")["test_loss"] > 0


def test_a_disk_that_fills_up(events, monkeypatch, capfd):
    run(events, "out=a")
    before = Path("a", "best_val.pt").read_bytes()

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        launched(events, "out=a epochs=4", status=1)
    assert "was not written" in capfd.readouterr().err and moments("a")[-1] == "on_exception"
    assert Path("a", "best_val.pt").read_bytes() == before and not list(Path("a").glob("*.tmp-*"))
    run(events, "out=a epochs=4")
    run(events, "out=b epochs=2")
    run(events, "out=b epochs=4")
    assert_same(saved("a")[0], saved("b")[0])


def test_nothing_is_written_without_artifacts(events, tmp_path):
    result = run(events, "save_artifacts=false make_plots=true plot_every=1 plot_recon=true")
    assert result["run_dir"] == "" and not list(tmp_path.iterdir())
    with_files = run(events, "out=a")
    assert_same(without_times(result["histories"]), without_times(with_files["histories"]))
    assert all(result[name] == with_files[name] for name in ("final_val_loss", "best_val_loss", "test_loss"))


def test_the_batch_size_acts(events):
    assert [run(events, f"save_artifacts=false epochs=1 batch_size={n}")["step"] for n in (16, 32, 48)] == [4, 2, 2]


def test_facts(events):
    run(events, "out=a loop=gan_ae encoder=gan epochs=12 lr=0.003")
    entries, home = lines("a"), Path("a")
    sizes = [len(line) for line in (home / "facts" / "events.jsonl").read_text().splitlines()]
    assert sizes[12] < 1.2 * sizes[1]  # an epoch's line does not grow
    last = entries[12]
    assert (last["epoch"], last["step"], last["split"], last["run_dir"]) == (11, 48, "val", "a")
    assert set(last["metrics"]) >= set(
        """rec_tokens rec_types type_accuracy rec_globals commit perplexity usage revived
        lr grad_norm skipped_steps d_loss g_loss d_acc_real d_acc_fake adv_w""".split()
    )
    assert last["val_loss"] > 0 and last["throughput"] > 0 and last["max_memory_mib"] > 10
    assert last["total_time_s"] > last["epoch_time_s"] > 0 and last["meta"]["loop"] == "gan_ae"
    histories = entries[13]["histories"]
    assert entries[13]["moment"] == "on_train_end" and len(histories["val_loss"]) == 12
    assert histories["val_loss"] == [line["val_loss"] for line in entries[1:13]]
    assert sum("histories" in line and line["histories"] is not None for line in entries) == 1
    rows = list(csv.DictReader((home / "facts" / "scalars.csv").read_text().splitlines()))
    assert [(row["epoch"], row["split"]) for row in rows] == [
        *((str(epoch), split) for epoch in range(12) for split in ("train", "val")), ("11", "test")
    ]  # fmt: skip
    assert float(rows[-1]["metric_test_loss"]) == pytest.approx(load_checkpoint("a/last.pt", "ae:gan_ae")["test_loss"])
    assert rows[0]["val_loss"] == rows[1]["val_loss"] != "" and rows[-1]["val_loss"] == ""


def test_an_exception_is_recorded_and_goes_on(events, monkeypatch, capfd):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    run(events, "out=a")
    monkeypatch.setattr(train_ae, "loss_sums", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(events, "out=a epochs=3")
    event = lines("a")[-1]
    assert event["moment"] == "on_exception" and event["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "in out_of_memory" in event["traceback"] and event["meta"]["run_id"] == lines("a")[0]["meta"]["run_id"]
    launched(events, "out=a epochs=3", status=1)
    assert "try: batch_size=" in capfd.readouterr().err


def test_steps_that_are_not_finite_end_a_run_but_not_what_it_had(events, capfd):
    run(events, "out=a")
    expected = saved("a")[0]
    launched(events, "out=a epochs=20 lr=1e38 clip=0", status=1)
    err = capfd.readouterr().err
    assert "10 steps in a row were not finite, up to step" in err and "--lr" in err and "last good file: " in err
    assert_same(saved("a")[0], expected)
    event = lines("a")[-1]
    assert event["moment"] == "on_exception" and event["error"].startswith("DataError: 10 steps")
    bad = [line for line in lines("a") if "val_loss" in line["nonfinite"]]
    assert bad and all(line["val_loss"] is None for line in bad)
    with pytest.raises(DataError, match="last good file: none"):
        run(events, "save_artifacts=false epochs=20 lr=1e38 clip=0")
    run(events, "out=a epochs=3")
    assert [line["epoch"] for line in lines("a") if line["moment"] == "on_epoch_end"] == [0, 1, 2]


def test_a_run_that_diverges_ends_and_keeps_its_last_good_epoch(events, monkeypatch, capfd):
    launched(events, "out=b lr=10 epochs=30", status=1)
    err = capfd.readouterr().err
    assert "error: diverged: val_loss " in err and "in epoch 1; no epoch was better\ntry: lr=1\n" in err
    assert not list(Path("b").glob("*.pt"))
    run(events, "out=a")
    before = [Path("a", name).read_bytes() for name in ("best_val.pt", "last.pt")]
    monkeypatch.setattr(train_ae, "DIVERGED", 0.0)
    with pytest.raises(DataError, match="diverged: val_loss .* in epoch 3; epoch 2 is in a/best_val.pt\ntry: lr="):
        run(events, "out=a epochs=3")
    assert [Path("a", name).read_bytes() for name in ("best_val.pt", "last.pt")] == before


def test_a_batch_is_at_most_all_events(events, capfd):
    state = run(events, "save_artifacts=false batch_size=100000 epochs=1")
    assert "batch_size cut from 100000 to 64: 64 train events" in capfd.readouterr().out and state["step"] == 1
    run(events, "save_artifacts=false batch_size=100000 accumulate=3 epochs=1")
    assert "batch_size cut from 100000 to 22: 64 train events" in capfd.readouterr().out


def test_labels_and_features_are_those_of_the_file(events, capfd):
    run(events, "out=a labels=[0,1]")
    assert "left out: labels 2 3 4 5" in capfd.readouterr().out
    config = saved("a")[0]["last.pt"]["config"]
    assert tuple(config["labels"]) == (0, 1) and tuple(config["features"]) == ("E", "pT", "eta", "phi")
    with np.load(events) as arrays:
        unlabelled = {name: array for name, array in arrays.items() if name[0] == "X"}
    np.savez("none.npz", **unlabelled)
    run(Path("none.npz").absolute(), "out=b")
    assert "left out" not in capfd.readouterr().out and tuple(saved("b")[0]["last.pt"]["config"]["labels"]) == (-1,)


def test_stoomboot_takes_its_paths_from_variables(monkeypatch):
    plain = read("env=stoomboot phase1.trainer.epochs=20")
    assert (plain.data, plain.outputs, plain.epochs) == ("decay_chain", "outputs", 20)
    monkeypatch.setenv("PETRI_DATA", "/data/atlas/a.npz")
    monkeypatch.setenv("PETRI_OUTPUTS", "/data/atlas/out")
    named = read("env=stoomboot")
    assert (named.data, named.outputs) == ("/data/atlas/a.npz", "/data/atlas/out")


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Names of the figures that are written, in place of drawing them well."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda figure, out, **_: out.write(b"drawn"))
    return lambda home: sorted(p.stem for p in Path(home, "figures").glob("*.png"))


def test_families_and_moments_are_chosen(events, drawn, capfd):
    run(events, "out=none")
    assert not Path("none", "figures").exists()
    run(events, "out=minimal make_plots=true logging=plots_minimal")
    assert drawn("minimal") == ["losses-on_test_end-e001", "losses-on_train_end-e001"]
    ends = "plot_moments=on_test_end make_plots=true epochs=1"
    for words, names in {
        "": "codebook latency losses metrics",
        "latent_space=none": "latency losses metrics",
        "plot_losses=false logging.families.recon.enabled=true": "codebook latency metrics recon",
        "encoder=gan plot_latency=no": "adversarial codebook losses metrics",
        "loop=gan_ae plot_metrics=no": "adversarial codebook latency losses",
        "loop=diffusion_ae diffusion_steps=10 ddim_steps=2": "diffusion latency losses metrics",
        "loop=test_mlp batch_size=2000 plot_recon=true": "latency losses metrics",
    }.items():
        home = Path("run" + words.replace("=", "").replace(" ", ""))
        run(events, ends, words, f"out={home}")
        assert drawn(home) == [f"{name}-on_test_end-e000" for name in names.split()], words
    assert "no figure" not in capfd.readouterr().err


def test_figures_that_fail_and_full_ones(events, drawn, monkeypatch, capfd):
    run(events, "out=full make_plots=true logging=plots_full epochs=1")
    assert [name for name in drawn("full") if "test_end" in name] == [
        f"{name}-on_test_end-e000" for name in ("codebook", "latency", "losses", "metrics", "recon")
    ]
    run(events, "out=mlp make_plots=true loop=test_mlp logging=plots_full batch_size=2000")
    assert not [name for name in drawn("mlp") if "recon" in name]
    assert "no figure" not in capfd.readouterr().err
    from data_utils.events import figures

    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setitem(figures.FIGURES, "losses", fail)
    assert run(events, "out=b make_plots=true plot_moments=on_train_end")["epoch"] == 2
    assert "no figure of losses: ValueError: no ink" in capfd.readouterr().err and drawn("b")


# ---- a sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_survives_a_job_that_is_killed(events, tmp_path):
    toy = [word for word in TOY if word != "epochs=2"]  # a key stands there once
    swept = ["latent_space=none,vq", "epochs=20"]
    process = start("train_ae.py", "--multirun", *swept, *toy, f"data={events}", cwd=tmp_path)

    def first():
        return next(Path("outputs", "runs").glob("*_job0"), Path("none"))

    wait_for(lambda: (first() / "last.pt").exists(), process)
    os.kill(int((first() / ".ae.lock").read_text().split()[0]), signal.SIGKILL)
    _, err = finish(process, 1)
    (folder,) = Path("outputs", "multiruns").iterdir()
    rows = yaml.safe_load((folder / "sweep.yaml").read_text())["jobs"]
    assert [(row["status"], row["exit_code"]) for row in rows] == [("failed", 137), ("done", 0)]
    assert "job 0 of" in err and f"resume={folder}" in err
    before = {p: p.stat().st_mtime_ns for row in rows[1:] for p in Path(row["run_dir"]).rglob("*")}
    out, _ = finish(start("train_ae.py", f"resume={folder}", cwd=tmp_path))
    assert "2 of 2 jobs done" in out and "resumed outputs/runs" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    rows = yaml.safe_load((folder / "sweep.yaml").read_text())["jobs"]
    assert all(row["status"] == "done" and math.isfinite(row["best_val_loss"]) for row in rows)
    main(read("--config", Path(rows[0]["run_dir"], ".hydra", "config.yaml"), "out=alone"))
    assert_same(saved(rows[0]["run_dir"])[0], saved("alone")[0])
    assert lines(rows[1]["run_dir"])[0]["meta"]["job"] == 1
