"""Shards: kills of the builder change no content, and the reader refuses all damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data
from data_utils.config import from_cli
from data_utils.errors import DataError, UsageError
from data_utils.files import lock_run
from data_utils.pages import shard_builder, shard_files, shards
from tests.helpers import ROOT

SIZES = dict(train_samples=23, test_samples=5, build_batch=2, seed=3)


@dataclass(frozen=True)
class Task:
    name: str
    rows: int = 2
    cols: int = 3
    length: int = 4
    ids: int = 0


class Source:
    """Random symbols; the task "few" has ids, and 7 samples."""

    def __init__(self, name, delay):
        self.task, self.spec, self.delay = Task(name, ids=9 * (name == "few")), dict(version=1), delay

    def limit(self, split):
        return 7 if self.task.name == "few" else 0

    def make(self, index, split, seed):
        time.sleep(self.delay)
        draw = np.random.default_rng((seed, len(self.task.name), len(split), index))
        page, target = draw.integers(0, 112, (2, 3), np.uint8), draw.integers(0, 112, 4, np.uint8)
        return SimpleNamespace(page=page, target=target, key=draw.bytes(16), id=index % 9 if self.task.ids else 0)


def fake(names, *, delay=0.0):
    return {name: Source(name, delay) for name in names}


NAMES = ("few", "plain")
FAKE = partial(fake, NAMES)
SLOW = partial(fake, NAMES, delay=0.002)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shard_files, "SHARD", 5)
    monkeypatch.setattr(shard_builder, "POLL", 0.01)


def build(out, sources=FAKE, **more):
    return shard_builder.build(out, sources, **SIZES | dict(workers=1, tell=lambda line: None) | more)


def manifest(out):
    return json.loads((Path(out) / "manifest.json").read_text())


def reader(*folders, names=NAMES, **more):
    return shards.Shards(folders, names, **dict(seed=1, tell=lambda line: None) | more)


@pytest.fixture
def data(tmp_path):
    assert build(tmp_path / "data") == 0
    return tmp_path / "data"


# ---- plan and order --------------------------------------------------------------------------------------------------


def test_batches_take_turns():
    assert shard_files.batches(dict(b=5, a=3, c=1), 2) == [
        ("a", 0, 2), ("b", 0, 2), ("c", 0, 1), ("a", 2, 1), ("b", 2, 2), ("b", 4, 1)
    ]  # fmt: skip


def test_the_stream_is_a_function(data):
    read = reader(data)
    planned = shard_files.batches(dict(few=7, plain=23), 2)
    for task, n in dict(few=7, plain=23).items():
        assert read.rows(task) == n
        for epoch in range(3):
            assert sorted(read.order(task, epoch)) == list(range(n))
        assert list(read.order(task, 1)) != list(read.order(task, 2))
        positions = np.array([0, 3, 2 * n + 1, n, n - 1, 5 * n])
        expected = [read.order(task, j // n)[j % n] for j in positions.tolist()]
        assert read.at(task, positions).tolist() == expected
        assert reader(data).at(task, positions).tolist() == expected
        if n > 7:  # few numbers have few orders
            assert reader(data, seed=2).at(task, np.arange(n)).tolist() != read.at(task, np.arange(n)).tolist()
        place = {
            i: b // 5 for b, (name, first, m) in enumerate(planned) if name == task for i in range(first, first + m)
        }
        shard_of = [place[i] for i in read.order(task, 0).tolist()]
        assert shard_of == sorted(shard_of)  # the first epoch goes shard by shard


# ---- builder ---------------------------------------------------------------------------------------------------------


def test_content(data):
    content, read = manifest(data), reader(data)
    assert content["complete"] and content["samples"] == dict(few=7, plain=23) and len(content["shards"]) == 4
    names = {"manifest.json", "test.pt", ".build.lock", *(f"consolidated_00{i}.pt" for i in range(4))}
    assert {path.name for path in data.iterdir()} == names
    assert read.hash == content["spec_sha256"]
    draw = np.random.default_rng(0)
    for task, source in FAKE().items():
        indices = draw.integers(0, read.rows(task), 40)
        held_out = [read.held_out(task, "val"), read.held_out(task, "test")]
        pairs = [(read.samples(task, indices), [("train", i) for i in indices.tolist()])]
        pairs += [(half, [("test", i) for i in range(odd, 5, 2)]) for odd, half in enumerate(held_out)]
        for samples, numbers in pairs:
            for name in ("page", "target", "id"):
                expected = np.array([getattr(source.make(i, split, 3), name) for split, i in numbers])
                assert np.array_equal(samples[name].numpy(), expected)
            assert str(samples["id"].dtype) == "torch.int64" and len(samples) == 3
    with pytest.raises(IndexError, match="few: samples are 0 to 6"):
        read.samples("few", [7])


@pytest.mark.slow
def test_processes_change_nothing(data, tmp_path):
    build(tmp_path / "two", workers=2)
    one, two = manifest(data), manifest(tmp_path / "two")
    assert one | dict(builder=0) == two | dict(builder=0)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from data_utils.pages import shard_builder, shard_files
import tests.data_utils.pages.test_shards as t

shard_files.SHARD = 2
t.SIZES = dict(train_samples=6, test_samples=2, build_batch=2, seed=3)  # 6 batches
os.fsync = lambda file: None  # a killed process loses nothing that it wrote
root, random = Path(sys.argv[1]), random.Random(0)
t.build(root / "clean")
clean = t.manifest(root / "clean")["content"]

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return pid

def kill_at(out, step, calls, **more):  # before one of these calls, which change the folder
    count = 0
    def wrap(call):
        def wrapped(*args, **more):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)
        return wrapped
    for owner, name in calls:
        setattr(owner, name, wrap(getattr(owner, name)))
    t.build(out, **more)
    os._exit(1)

step, status = 0, 9
calls = [(os, "replace"), (Path, "unlink"), (Path, "write_bytes")]
while status == 9:
    step += 1
    status = os.waitpid(child(lambda: kill_at(root / f"at_{step}", step, calls)), 0)[1]
    t.build(root / f"at_{step}")
    assert t.manifest(root / f"at_{step}")["content"] == clean, step
    assert {p.name for p in (root / f"at_{step}").iterdir()} == {p.name for p in (root / "clean").iterdir()}, step
assert step > 30, step
status, step = 9, 0
calls = [(os, "rename"), (Path, "rmdir")]
while status == 9:  # old data replaced by new
    step += 1
    out = root / f"new_{step}"
    t.build(out, **t.SIZES | dict(seed=4))
    status = os.waitpid(child(lambda: kill_at(out, step, calls, rebuild_dataset=True)), 0)[1]
    shard_builder.finish_swap(out)
    assert t.manifest(out)["complete"]
    t.build(out, rebuild_dataset=True)
    assert t.manifest(out)["content"] == clean, step
    assert not (root / f"new_{step}.new").exists() and not (root / f"new_{step}.replaced").exists(), step
assert step == 4, step
for workers, times, longest in (1, 20, 0.06), (2, 2, 1.5):
    out = root / f"random_{workers}"
    for _ in range(times):
        pid = child(lambda: t.build(out, t.SLOW, workers=workers))
        time.sleep(random.uniform(0.01, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    t.build(out)
    assert t.manifest(out)["content"] == clean, workers
print("as clean")
"""


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", KILLS, tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.stdout == "as clean\n", result.stderr[-3000:]


def test_torn_batches_are_made_again_and_foreign_files_stay(tmp_path, monkeypatch):
    build(tmp_path / "clean")
    out, puts, put = tmp_path / "out", [], shard_builder._put

    def put_and_halt(path, content):  # in the middle of the second shard
        puts.append(path)
        if len(puts) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        put(path, content)

    monkeypatch.setattr(shard_builder, "_put", put_and_halt)
    assert build(out) == signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr(shard_files, "SHARD", 5)
    paths = sorted(out.glob("batch_*"))
    assert [path.name for path in paths] == [f"batch_{i:05d}.pt" for i in range(5, 9)]
    paths[2].write_bytes(paths[1].read_bytes())  # whole, but of the other task
    paths[1].write_bytes(paths[1].read_bytes()[:-7])
    (out / "batch_00003.pt").write_bytes(b"inside a listed shard")
    (out / "consolidated_001.pt").write_bytes(b"not listed")
    (out / "notes.txt").write_text("mine")
    assert build(out) == 0 and manifest(out)["content"] == manifest(tmp_path / "clean")["content"]
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "clean").iterdir()} | {"notes.txt"}


def test_one_writer(tmp_path):
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    lock = lock_run(out, "build")
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        build(out)
    threading.Timer(0.2, lock.close).start()
    try:  # for a trainer it waits until the other has ended
        assert build(out, parent=os.getppid()) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert build(tmp_path / "orphan", parent=1 << 30) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, handler)


def test_other_data_are_refused_then_replaced(data):
    before = manifest(data)
    (data / "notes.txt").write_text("mine")
    differs = r"holds other data: few.train 7 -> 6, plain.train 23 -> 6, seed 3 -> 4\ntry: --rebuild-dataset"
    with pytest.raises(DataError, match=differs):
        build(data, seed=4, train_samples=6)
    assert manifest(data) == before
    assert build(data, seed=4, rebuild_dataset=True) == 0
    assert manifest(data)["spec"]["seed"] == 4
    assert [path.name for path in data.parent.glob("data.replaced/*")] == ["notes.txt"]
    with pytest.raises(DataError, match="few: 1 test samples in its data, 2 needed\nfix: add"):
        build(data.parent / "small", test_samples=1)


# ---- reader ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incremental", [True, False])
def test_reading_while_it_is_built(tmp_path, data, incremental):
    drawn, failed = [], []

    def follow(folder, into):
        read = reader(folder, wait_timeout=30, incremental=incremental)
        for k in range(30):  # more than one epoch; slots i of 4 draw unevenly
            for task in NAMES:
                into.append(read.samples(task, read.at(task, np.arange(4) * (1 + k % 2) + 4 * (k // 2))))
        into += [read.held_out(task, split) for task in NAMES for split in ("val", "test")]

    def run():
        try:
            follow(tmp_path / "slow", drawn)
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    build(tmp_path / "slow", SLOW)
    thread.join()
    expected = []
    follow(data, expected)
    assert not failed and len(drawn) == len(expected) == 64
    for a, b in zip(drawn, expected, strict=True):
        assert all((a[name] == b[name]).all() for name in ("page", "target", "id"))


def test_several_folders(data, tmp_path):
    build(tmp_path / "more", partial(fake, ("plain",)), seed=9)
    read, one = reader(data, tmp_path / "more"), reader(data)
    assert (read.rows("few"), read.rows("plain")) == (7, 46) and read.hash != one.hash
    source = FAKE()["plain"]
    for i, seed in (22, 3), (23, 9):
        page = read.samples("plain", [i])["page"][0].numpy()
        assert (page == source.make(i % 23, "train", seed).page).all()
    assert len(read.held_out("plain", "val")["id"]) == 6
    assert sorted(read.order("plain", 0)) == list(range(46))
    with pytest.raises(DataError, match="no task other in .*: there are few, plain"):
        reader(data, names=("other",))
    with pytest.raises(DataError, match=r"No consolidated files found in \S+none\ntry: --dataset-only"):
        reader(data, tmp_path / "none")


def spoil(path, **changes):
    content = json.loads(path.read_text()) | changes
    content["spec_sha256"] = changes.get("spec_sha256", shard_files.hash_of(content["spec"]))
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: (d / "manifest.json").write_bytes(b"{"), "manifest.json can't be used: JSONDecodeError"),
        (lambda d: (d / "manifest.json").write_bytes(b"[" * 100_000), "manifest.json can't be used"),
        (lambda d: (d / "manifest.json").write_bytes(b"[]"), "manifest.json can't be used: TypeError"),
        (lambda d: spoil(d / "manifest.json", spec_sha256="0" * 64), "spec_sha256 is not that of spec"),
        (lambda d: spoil(d / "manifest.json", samples=dict(few=8, plain=23)), "samples are not those of spec"),
        (lambda d: spoil(d / "manifest.json", format=2), "format 2, expected 1"),
        (lambda d: spoil(d / "manifest.json", shards=[manifest(d)["shards"][0] | dict(file="../x.pt")]), "'../x.pt'"),
        (lambda d: spoil(d / "manifest.json", test=manifest(d)["test"] | dict(file="/etc/x")), "test is not test.pt"),
        (lambda d: spoil(d / "manifest.json", builder={}), "KeyError: 'pid'"),
        (lambda d: (d / "consolidated_002.pt").unlink(), "consolidated_002.pt can't be used: FileNotFoundError"),
        (
            lambda d: (d / "consolidated_002.pt").write_bytes(b""),
            "consolidated_002.pt can't be used: ValueError: its",
        ),
        (lambda d: (d / "test.pt").write_bytes((d / "consolidated_000.pt").read_bytes()), "test.pt can't be used"),
    ],
)
def test_damage_is_named(data, harm, message):
    harm(data)
    with pytest.raises(DataError, match=message.replace(".", r"\.")) as e:
        read = reader(data)
        read.samples("plain", np.arange(23))
        read.held_out("plain", "val")
    assert str(e.value).endswith(f"try: {shard_files.REBUILD}") and str(e.value).count("\n") == 1


def test_a_rightly_hashed_file_of_wrong_content_is_refused(data):
    import torch

    path = data / "consolidated_000.pt"
    content = torch.load(path, weights_only=True)
    for task, field, value, message in [
        ("few", "page", torch.full((6, 2, 3), 112, dtype=torch.uint8), "few has symbols of 112 and more"),
        ("few", "id", torch.full((6,), 9, dtype=torch.int32), "few has ids outside 0 to 8"),
        ("plain", "id", torch.full((4,), -1, dtype=torch.int32), "plain has ids outside 0 to 0"),
        (
            "plain",
            "target",
            torch.zeros(4, 5, dtype=torch.uint8),
            "plain.target is uint8 (4, 5), expected uint8 (4, 4)",
        ),
        ("plain", "page", torch.zeros(4, 2, 3), "plain.page is float32 (4, 2, 3), expected uint8 (4, 2, 3)"),
        ("other", "id", torch.zeros(1), "holds few, other, plain, expected few, plain"),
    ]:
        tasks = {name: dict(fields) for name, fields in content["tasks"].items()}
        tasks.setdefault(task, {})[field] = value
        torch.save(dict(format=1, tasks=tasks), path)
        entry = manifest(data)["shards"][0] | dict(sha256=shard_files.hashlib.sha256(path.read_bytes()).hexdigest())
        spoil(data / "manifest.json", shards=[entry, *manifest(data)["shards"][1:]])
        with pytest.raises(DataError) as e:
            reader(data).samples("plain", [0])
        assert message in str(e.value)


def test_waiting_ends(tmp_path, data, monkeypatch):
    with pytest.raises(DataError, match="No consolidated files found in .*none"):
        reader(tmp_path / "none")
    with pytest.raises(DataError, match="none: no new batch in 0.05 s"):
        reader(tmp_path / "none", wait_timeout=0.05)
    with pytest.raises(shards.Stopped):
        reader(tmp_path / "none", wait_timeout=9, stop=[1])
    spec = manifest(data)["spec"]
    with pytest.raises(DataError, match="holds other data: seed 3 -> 5\ntry: --rebuild-dataset"):
        reader(data, spec=spec | dict(seed=5))
    spoil(data / "manifest.json", complete=False, shards=manifest(data)["shards"][:2])
    read = reader(data, spec=spec, wait_timeout=9)
    first, last = read.order("plain", 0)[[0, -1]]
    assert read.ready("plain", [first]) and not read.ready("plain", [last])
    with pytest.raises(DataError, match="data is unfinished\ntry: --dataset-only"):
        reader(data, incremental=False)
    monkeypatch.setattr(shards, "STALE", 0.05)
    with pytest.raises(DataError, match=f"its builder, process {os.getpid()}, gave no sign in 0.05 s"):
        read.samples("plain", [last])
    process = subprocess.Popen(["sh", "-c", "exit 3"])
    process.wait()
    (data / "build.log").write_text("one\ntwo\nerror: no room\ntry: less\n")
    failed = shards.Builder(data, process)
    for call in (partial(reader, data, incremental=False, wait_timeout=9, alive=failed.check), failed.wait):
        with pytest.raises(DataError, match="data: no room; see .*build.log\ntry: less"):
            call()
    (data / "build.log").write_text("one\nkilled\n")
    with pytest.raises(DataError, match=r"ended with status 3: one \| killed; see"):
        reader(data, wait_timeout=9, alive=failed.check).ready("plain", [last])
    asleep = shards.Builder(data, subprocess.Popen(["sleep", "60"]))
    with asleep, pytest.raises(shards.Stopped):
        asleep.wait(stop=[1])
    assert asleep.process.returncode == -signal.SIGTERM
    shutil.rmtree(data)
    with pytest.raises(DataError, match="was replaced by other data"):
        read.samples("plain", [last])


# ---- the command -----------------------------------------------------------------------------------------------------

PARENT = """
import sys, time
from types import SimpleNamespace
from data_utils.pages.shards import start_builder
start_builder(sys.argv[1], SimpleNamespace(**flags))
assert "torch" not in sys.modules
print("started", flush=True)
time.sleep(60)
"""
FLAGS = dict(tasks=("sudoku6",), train_samples=400, test_samples=8, build_batch=2, workers=1, seed=0,
             page_rows=2, page_cols=24, text_source="both", stories="", code_dir="", arc_set="agi1",
             arc_side=10, puzzles="")  # fmt: skip


@pytest.mark.slow
def test_a_trainer_dies_and_the_next_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "SHARD", 100)  # as the command has it
    out, cfg = tmp_path / "data", SimpleNamespace(**FLAGS)
    source = PARENT.replace("**flags", ", ".join(f"{name}={value!r}" for name, value in FLAGS.items()))
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    trainer = subprocess.Popen([sys.executable, "-c", source, str(out)], env=environment, stdout=subprocess.PIPE)
    assert trainer.stdout.readline() == b"started\n"
    wait_for(lambda: list(out.glob("batch_*.pt")) or list(out.glob("consolidated_*.pt")))
    trainer.kill()
    trainer.communicate()
    wait_for(lambda: "stopped; the same command goes on" in (out / "build.log").read_text())
    assert not manifest(out)["complete"]
    sources = shard_builder.opener(cfg)()
    spec = shard_files.describe(sources, **shard_builder.sizes(cfg))
    with shards.start_builder(out, cfg) as builder:
        assert os.getpgid(builder.process.pid) == builder.process.pid
        read = shards.Shards([out], sources, seed=0, spec=spec, wait_timeout=60, alive=builder.check)
        os.kill(builder.process.pid, signal.SIGINT)  # which it leaves to the trainer
        indices = read.at("sudoku6", np.arange(380, 420))  # the end of one epoch, the beginning of the next
        pages = read.samples("sudoku6", indices)["page"].numpy()
        assert np.array_equal(pages, [sources["sudoku6"].make(i, "train", 0).page for i in indices.tolist()])
        builder.wait()
        assert manifest(out)["complete"] and builder.process.returncode == 0
    assert shards.start_builder(out, cfg).process is None


def test_the_command_of_a_trainer(data, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: started.append((command, more["env"])))
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = SimpleNamespace(**FLAGS | dict(stories="my stories.txt", tasks=("read", "maze")))
    shards.start_builder(data, cfg, rebuild_dataset=True)
    (_, program, name, *argv), environment = started[0]
    parsed = asdict(from_cli(*prepare_data.COMMANDS[name][:1], argv=argv))
    assert parsed == vars(cfg) | dict(out=str(data), rebuild_dataset=True, parent=os.getpid())
    assert program == str(ROOT / "prepare_data.py") and "WORLD_SIZE" not in environment
    assert (data.parent / "data.new" / "build.log").exists()


def wait_for(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "sudoku5"], ["sudoku5", "sudoku4"]),
        (["--tasks", "sudoku4", "--build_batch", "0"], ["--build_batch 0"]),
        (["--tasks", "sudoku4", "--test-samples", "1"], ["--test_samples 1"]),
    ],
)
def test_usage(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as e:
        prepare_data.run(["multimodal", f"--out={tmp_path}/out", *flags])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") <= 3
    assert all(word in err for word in words) and not (tmp_path / "out").exists()


def test_a_builder_that_can_not_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    cfg = SimpleNamespace(**FLAGS)
    with pytest.raises(DataError, match="its builder can't start: No such file"):
        shards.start_builder(tmp_path / "data", cfg)
