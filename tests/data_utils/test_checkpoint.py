"""Checkpoints: written atomically, verified when read, never loaded as another one. Also metrics, stop, logs."""

import datetime
import enum
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_utils import checkpoint, files, metrics, progress
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.launch import ends_cleanly
from data_utils.stop import Stop
from models.optim.ema import Average
from tests.helpers import ROOT

Pair = namedtuple("Pair", "a b")
Colour = enum.Enum("Colour", "RED")


def make_state(step=3, seed=0):
    torch.manual_seed(seed)
    weights = OrderedDict(w=torch.randn(20, 30), b=torch.arange(5), half=torch.randn(3).bfloat16(), empty=torch.ones(0))
    optimizer = dict(state={0: dict(step=torch.tensor(3.0), exp_avg=torch.randn(20, 30))}, param_groups=[dict(lr=0.1)])
    plain = dict(best=math.inf, names=["a", ("b", None)], flag=True, raw=b"\0x", nested={1: {2.5: "é"}})
    return dict(kind="it", step=step, model_state=weights, optimizer_state=optimizer, amp_scaler={}, plain=plain)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.pt"
    checkpoint.save_checkpoint(path, make_state())
    return path


def python(code, *arguments, **more):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


# ---- plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.int64(1),
        np.zeros(2),
        Path("a"),
        Colour.RED,
        datetime.datetime(2020, 1, 1),
        deque([1]),
        defaultdict(int),
        Pair(1, 2),
        frozenset([1]),
        {1},
        range(3),
        1j,
        torch.__version__,
        torch.float32,
        lambda: 0,
    ],
    ids=lambda v: type(v).__name__,
)
def test_saving_refuses_types_that_loading_would_refuse_and_names_the_key(value, tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\.a\.b\[1\] is a .*" + type(value).__name__):
        checkpoint.to_plain(dict(a=dict(b=[0, value])))
    with pytest.raises(TypeError):
        checkpoint.save_checkpoint(tmp_path / "a.pt", dict(kind="it", value=value))
    assert list(tmp_path.iterdir()) == []


def test_to_plain_copies():
    weight = torch.nn.Parameter(torch.ones(2))
    copy = checkpoint.to_plain(dict(w=weight))["w"]
    assert type(copy) is torch.Tensor and not copy.requires_grad
    weight.data += 1
    assert copy.tolist() == [1, 1]


def test_round_trip(file):
    assert same(checkpoint.load_checkpoint(file, "it"), checkpoint.to_plain(make_state()))
    assert same(checkpoint.load_checkpoint(str(file), ["other", "it"])["plain"], make_state()["plain"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value, file):
    before, state = file.read_bytes(), make_state()
    state["model_state"]["w"][1, 2] = value
    with pytest.raises(CheckpointError, match="run.pt was not written: weights are not finite"):
        checkpoint.save_checkpoint(file, state)
    assert file.read_bytes() == before


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos"), KeyError(1)])
def test_a_write_that_fails_midway_leaves_the_old_file_alone(error, file):
    def write(handle):
        handle.write(b"half")
        raise error

    before = file.read_bytes()
    with pytest.raises(KeyError if isinstance(error, KeyError) else CheckpointError):
        files.write_atomic(file, write)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_no_flipped_bit_of_the_directory_gives_another_tensor(file):
    content, good, loaded = file.read_bytes(), checkpoint.load_checkpoint(file, "it"), 0
    with zipfile.ZipFile(file) as archive:
        name = next(entry.filename for entry in archive.infolist() if "/data/" in entry.filename).encode()
    end = content.rindex(name)  # the directory comes last: 46 bytes and the name of each entry
    for place in range(end - 46, end + len(name)):
        for bit in range(8):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                assert same(checkpoint.load_checkpoint(file, "it"), good), (place - end, bit)
                loaded += 1
            except CheckpointError:
                pass
    assert loaded  # some of it means nothing


def test_an_empty_error_is_still_a_message(file):
    def write(handle):
        raise OSError

    with pytest.raises(CheckpointError, match="run.pt was not written"):
        files.write_atomic(file, write)


def test_writing_makes_the_folder(tmp_path):
    files.write_atomic(tmp_path / "a" / "b" / "c", lambda handle: handle.write(b"x"))
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"


FULL_DISK = """
import resource, signal, sys, torch
from data_utils.errors import CheckpointError
from data_utils.checkpoint import Saver, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = dict(kind="it", step=1, model_state=dict(w=torch.ones(50_000)))
save_checkpoint(sys.argv[1], state)
resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, resource.RLIM_INFINITY))
state["step"], saver = 2, Saver()
saver(sys.argv[1], state, must=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.load(sys.argv[1], weights_only=True)["step"] == 1
saver(sys.argv[1], state, must=False)
assert torch.load(sys.argv[1], weights_only=True)["step"] == 2
"""


def test_a_full_disk_leaves_the_old_file_and_a_later_save_works(tmp_path):
    process = python(FULL_DISK, tmp_path / "a.pt")
    assert process.wait() == 0, process.stderr.read()
    assert "was not written" in process.stderr.read() and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_saver_gives_up_after_three_failures_in_a_row_or_at_once_when_it_must(tmp_path, capsys):
    good, bad = tmp_path / "a.pt", tmp_path / "no" / "a.pt"
    (tmp_path / "no").write_text("a file where a folder should be")
    saver = checkpoint.Saver()
    for path in (bad, bad, good, bad, bad):
        saver(path, make_state(), must=False)
    assert capsys.readouterr().err.count("warning: ") == 4
    with pytest.raises(CheckpointError):
        saver(bad, make_state(), must=False)
    with pytest.raises(CheckpointError):
        checkpoint.Saver()(bad, make_state(), must=True)


def test_rehearse(tmp_path, monkeypatch):
    state = make_state()
    size = checkpoint.rehearse(tmp_path, "run", state)
    checkpoint.save_checkpoint(tmp_path / "a.pt", state)
    assert abs(size - (tmp_path / "a.pt").stat().st_size) < 1000
    assert checkpoint.rehearse(tmp_path, "run", state | dict(step=0)) > size + 8 * 600
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1.5 * size))
    with pytest.raises(CheckpointError, match="MB free, a run needs"):
        checkpoint.rehearse(tmp_path, "run", state)


@pytest.mark.parametrize("call", [checkpoint.rehearse, files.lock_run])
def test_a_folder_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="file"):
            call(folder, "run", *[make_state()] * (call is checkpoint.rehearse))
    if os.geteuid():  # root writes anywhere
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(CheckpointError, match="closed"):
            call(tmp_path / "closed", "run", *[make_state()] * (call is checkpoint.rehearse))


def test_a_folder_that_is_absent_is_made(tmp_path):
    checkpoint.rehearse(tmp_path / "a" / "b", "run", make_state())
    assert list((tmp_path / "a" / "b").iterdir()) == []


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4, 100, "half", -1])
def test_a_truncated_file_is_refused(size, file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if size == "half" else size])
    with pytest.raises(CheckpointError, match=r"run.pt can't be read: \w+"):
        checkpoint.load_checkpoint(file, "it")


def test_a_changed_byte_is_refused_or_harmless_never_wrong(file):
    content, expected = file.read_bytes(), checkpoint.to_plain(make_state())
    generator, refused = np.random.default_rng(0), 0
    for at in [*generator.integers(0, len(content), 40), *generator.integers(len(content) - 1500, len(content), 20)]:
        changed = bytearray(content)
        changed[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(changed)
        try:
            assert same(checkpoint.load_checkpoint(file, "it"), expected), at
        except (CheckpointError, UsageError):
            refused += 1
    assert refused > 20


def test_compressed_entries_are_refused(file):
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError):
        checkpoint.load_checkpoint(file, "it")


def test_an_absent_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError):
            checkpoint.load_checkpoint(path, "it")


def test_another_kind_is_a_usage_error_with_both(file):
    with pytest.raises(UsageError, match="kind it, expected mla or hrm"):
        checkpoint.load_checkpoint(file, ["mla", "hrm"])
    for content, kind in (([1], "list"), (torch.ones(1), "Tensor"), ({}, "None")):
        torch.save(content, file)
        with pytest.raises(UsageError, match=f"kind {kind}, expected it"):
            checkpoint.load_checkpoint(file, "it")


# ---- which one -------------------------------------------------------------------------------------------------------


def numbers(folder, *steps):
    for n in steps:
        checkpoint.save_checkpoint(folder / f"run_epoch{n}.pt", make_state(step=n))
        os.utime(folder / f"run_epoch{n}.pt", (1e9 - n, 1e9 - n))  # the largest looks oldest
    return checkpoint.numbered_files(folder, r"run_epoch(\d+)\.pt")


def test_numbered_goes_by_integer_not_by_name_or_time(tmp_path):
    for name in ("run_epoch7.pt.bak", "notes.txt", "run_epochx.pt", "other_epoch8.pt", "run_epoch99.pt.tmp-1"):
        (tmp_path / name).write_text("")
    assert [p.name for p in numbers(tmp_path, 9, 10, 100)] == [f"run_epoch{n}.pt" for n in (100, 10, 9)]
    assert checkpoint.numbered_files(tmp_path / "none", r"(\d+)") == []


def load(path):
    return checkpoint.load_checkpoint(path, "it")


def test_first_good_falls_back_with_a_warning_each(tmp_path, capsys):
    paths = numbers(tmp_path, 1, 2, 3)
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    path, state = checkpoint.first_good([tmp_path / "absent.pt", *paths], load)
    lines = capsys.readouterr().err.splitlines()
    assert (path, state["step"], len(lines)) == (paths[2], 1, 2)
    for line, bad in zip(lines, paths, strict=False):
        assert line.startswith(f"warning: {bad} can't be read: ")
    paths[2].write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="none of 3 checkpoints(.|\n)*--fresh"):
        checkpoint.first_good(paths, load)
    assert checkpoint.first_good([tmp_path / "absent.pt"], load) == (None, None)


def test_find(tmp_path):
    files = [tmp_path / "run_interrupted.pt", *numbers(tmp_path, 9, 10), tmp_path / "run.pt"]
    for resume, fresh, step in [
        ("", False, None),
        ("none", False, None),
        ("latest", False, 10),
        ("auto", False, 10),
        ("", True, None),
        ("latest", True, None),
        ("auto", True, None),
        (str(files[2]), False, 9),
    ]:
        path, state = checkpoint.find_checkpoint(resume, fresh, files, "it")
        assert (state and state["step"]) == step and bool(path) == bool(state), (resume, fresh)
    checkpoint.save_checkpoint(files[0], make_state(step=1))
    assert checkpoint.find_checkpoint("latest", False, files, "it")[0] == files[0]
    with pytest.raises(UsageError, match="--fresh .*--resume a.pt"):
        checkpoint.find_checkpoint("a.pt", True, files, "it")
    with pytest.raises(UsageError, match="none.pt: no such file\n.*run_epoch10.pt, .*run_epoch9.pt"):
        checkpoint.find_checkpoint(str(tmp_path / "none.pt"), False, files, "it")
    with pytest.raises(UsageError, match="of kind it, expected other"):
        checkpoint.find_checkpoint(str(files[1]), False, files, "other")
    files[1].write_bytes(b"")
    with pytest.raises(UsageError, match="run_epoch10.pt can't be read(.|\n)*no fallback for a named file"):
        checkpoint.find_checkpoint(str(files[1]), False, files, "it")


def test_find_where_there_is_nothing(tmp_path):
    files = [tmp_path / "run_interrupted.pt", tmp_path / "run.pt"]
    assert checkpoint.find_checkpoint("auto", False, files, "it") == (None, None)
    with pytest.raises(DataError, match="run_interrupted.pt, run.pt\ntry: without --resume"):
        checkpoint.find_checkpoint("latest", False, files, "it")
    with pytest.raises(UsageError, match="checkpoints of this run: none"):
        checkpoint.find_checkpoint(str(files[0]), False, files, "it")


# ---- into a run ------------------------------------------------------------------------------------------------------


def make_parts(width=4, lr=0.1, decay=0.01, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.Linear(3, 2))
    groups = [dict(params=[p for p in model.parameters() if p.ndim == 2], weight_decay=decay)]
    groups += [dict(params=[p for p in model.parameters() if p.ndim == 1], weight_decay=0.0)]
    return dict(
        model_state=model, optimizer_state=torch.optim.AdamW(groups, lr=lr), amp_scaler=torch.amp.GradScaler("cpu")
    )


def make_header(**changes):
    header = dict(kind="it", step=5, tokenizer="bytes", tokenizer_hash="0" * 64, model_args=dict(width=4), steps=10)
    return header | dict(data_hash="d", world_size=1, config=dict(lr=0.1, device="cpu")) | changes


def trained(**more):
    parts = make_parts(**more)
    for _ in range(3):
        parts["model_state"](torch.randn(8, parts["model_state"][0].in_features)).square().sum().backward()
        parts["optimizer_state"].step()
    return parts


def saved(parts, **changes):
    return checkpoint.to_plain(make_header(**changes) | {name: part.state_dict() for name, part in parts.items()})


def equal_weights(a, b):
    return same(dict(a["model_state"].state_dict()), dict(b["model_state"].state_dict()))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("old", [False, True])
def test_load_parts(prefix, old):
    source, parts = trained(), make_parts(seed=1)
    state = saved(source)
    state["model_state"] = {prefix + k: v for k, v in state["model_state"].items()}
    if old:
        names = dict(model_state="model", optimizer_state="optimizer", amp_scaler="scaler")
        state = {names.get(k, k): v for k, v in state.items()}
    checkpoint.load_parts(parts, state, "a.pt", make_header())
    assert equal_weights(parts, source)
    assert same(parts["optimizer_state"].state_dict()["state"], source["optimizer_state"].state_dict()["state"])
    assert same(parts["amp_scaler"].state_dict(), source["amp_scaler"].state_dict())


def test_the_decay_of_the_run_stands_and_the_rate_is_left_to_the_schedule():
    parts = make_parts(lr=0.7, decay=0.3)
    checkpoint.load_parts(parts, saved(trained(lr=0.1, decay=0.01)), "a.pt", make_header())
    groups = parts["optimizer_state"].param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.3), (0.1, 0.0)]
    parts["model_state"](torch.ones(1, 4)).sum().backward()
    parts["optimizer_state"].step()  # the states lie on the right parameters


@pytest.mark.parametrize("partly", [False, True])
def test_an_average_that_a_file_lacks_begins_at_the_loaded_weights_not_at_random_ones(partly):
    """--ema switched on at a resume, or weights loaded in part: else random weights are evaluated and kept as best."""
    state = saved(trained())
    parts = make_parts(seed=1)
    if partly:
        del state["model_state"]["1.bias"]
    parts["ema"] = Average(dict(parts["model_state"].named_parameters()), 0.999)
    checkpoint.load_parts(parts, state, "a.pt", make_header(), allow_partial=True)
    assert same(parts["ema"].state_dict(), dict(parts["model_state"].state_dict()))
    assert torch.equal(parts["ema"].state_dict()["0.weight"], state["model_state"]["0.weight"])


def test_an_empty_scaler_is_not_loaded_into_an_active_one():
    parts = make_parts()
    before = parts["amp_scaler"].state_dict()
    checkpoint.load_parts(parts, saved(trained()) | dict(amp_scaler={}), "a.pt", make_header())
    assert parts["amp_scaler"].state_dict() == before


def drop(state):
    del state["model_state"]["1.bias"]


def add(state):
    state["model_state"]["extra.w"] = torch.ones(1)


def reshape(state):
    state["model_state"]["0.weight"] = torch.ones(3, 5)


def all_three(state):
    drop(state), add(state), reshape(state)


def most(state):
    del state["model_state"]["0.weight"], state["model_state"]["1.weight"]


@pytest.mark.parametrize(
    "change, words",
    [
        (drop, ["1 missing: 1.bias", "--allow_partial"]),
        (add, ["1 extra: extra.w", "--allow_partial"]),
        (reshape, ["1 wrong shape: 0.weight", "48% of it would fit"]),
        (all_three, ["1 missing: 1.bias", "1 extra: extra.w", "1 wrong shape: 0.weight"]),
        (most, ["2 missing: 0.weight, 1.weight"]),
    ],
)
def test_weights_that_do_not_fit_are_listed(change, words):
    state, parts = saved(trained()), make_parts(seed=1)
    change(state)
    with pytest.raises(UsageError) as error:
        checkpoint.load_parts(parts, state, "a.pt", make_header(), allow_partial=False)
    assert all(word in str(error.value) for word in ["a.pt", *words])
    assert equal_weights(parts, make_parts(seed=1)) and not parts["optimizer_state"].state_dict()["state"]


def test_allow_partial_loads_what_fits_and_starts_the_optimizer_anew(capsys):
    source, parts = trained(), make_parts(seed=1)
    state = saved(source, model_args=dict(width=3))
    drop(state)
    checkpoint.load_parts(parts, state, "a.pt", make_header(), allow_partial=True)
    assert "1 missing: 1.bias; 91% loaded, the optimizer starts anew" in capsys.readouterr().err
    assert not parts["optimizer_state"].state_dict()["state"]
    assert torch.equal(parts["model_state"][0].weight, source["model_state"][0].weight)
    assert torch.equal(parts["model_state"][1].bias, make_parts(seed=1)["model_state"][1].bias)


def test_allow_partial_refuses_under_half():
    state = saved(trained())
    most(state)
    with pytest.raises(UsageError, match="fits only 22% of this model: 2 missing"):
        checkpoint.load_parts(make_parts(), state, "a.pt", make_header(), allow_partial=True)


@pytest.mark.parametrize("partial", [False, True])
def test_another_tokenizer_is_refused_always(partial):
    state = saved(trained(), tokenizer="gpt2", tokenizer_hash="1" * 64)
    with pytest.raises(UsageError, match=r"tokenizer gpt2 \(11111111\), this run has bytes \(00000000\)"):
        checkpoint.load_parts(make_parts(), state, "a.pt", make_header(), partial)


def test_other_model_arguments_are_refused_with_both_values():
    state = saved(trained(), model_args=dict(width=5))
    with pytest.raises(UsageError, match="width 5 -> 4(.|\n)*--allow_partial"):
        checkpoint.load_parts(make_parts(), state, "a.pt", make_header(), allow_partial=False)
    with pytest.raises(UsageError, match="width 5 -> 4\nfix: the settings"):  # a script without that flag
        checkpoint.load_parts(make_parts(), state, "a.pt", make_header())


def test_optimizer_state_of_another_shape_is_refused():
    state = saved(trained())
    state["optimizer_state"]["state"][0]["exp_avg"] = torch.ones(7)
    with pytest.raises(UsageError, match="optimizer state 0 does not fit"):
        checkpoint.load_parts(make_parts(), state, "a.pt", make_header())
    state = saved(trained())
    state["optimizer_state"]["state"][9] = state["optimizer_state"]["state"][0]
    with pytest.raises(UsageError, match="optimizer state 9 does not fit"):
        checkpoint.load_parts(make_parts(), state, "a.pt", make_header())


def test_changed_and_notice():
    old, new = dict(lr=1, names=["a"], gone=1, path="x"), dict(lr=2, names=("a",), new=1, path="y")
    assert checkpoint.changed(old, new) == "lr 1 -> 2, path x -> y"
    assert checkpoint.changed(old, new, ["path"]) == "lr 1 -> 2" and checkpoint.changed(old, old) == ""
    state = make_header()
    assert checkpoint.resume_notice("a.pt", state, make_header(), ()) == "resumed a.pt at step 5"
    other = make_header(data_hash="e", world_size=2, config=dict(lr=0.2, device="cuda"))
    assert checkpoint.resume_notice("a.pt", state, other, ["device"]) == (
        "resumed a.pt at step 5, data_hash d -> e, world_size 1 -> 2, lr 0.1 -> 0.2: exact resume is lost"
    )


@pytest.mark.parametrize("name", ["grad_accum_steps", "gradient_accumulation_steps"])
def test_as_many_micro_batches_on_other_processes_are_no_change(name):
    one, two = (make_header(world_size=world, config={name: count}) for world, count in ((1, 4), (2, 2)))
    assert checkpoint.resume_notice("a.pt", one, two, ()) == "resumed a.pt at step 5"
    two["config"][name] = 4
    assert "world_size 1 -> 2: exact" in checkpoint.resume_notice("a.pt", one, two, ())


# ---- rotate, lock, set aside -----------------------------------------------------------------------------------------


def test_rotate_keeps_the_newest(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    paths = numbers(tmp_path, 9, 10, 100)
    checkpoint.rotate(paths, 0)
    checkpoint.rotate(paths, 3)
    checkpoint.rotate([], 1)
    assert all(p.exists() for p in paths)
    checkpoint.rotate(paths, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "run_epoch100.pt"]


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-9], lambda c: c[:3000] + b"?!" + c[3002:]])
def test_rotate_removes_nothing_while_the_newest_is_damaged(damage, tmp_path):
    paths = numbers(tmp_path, 1, 2)
    paths[0].write_bytes(damage(paths[0].read_bytes()))
    checkpoint.rotate(paths, 1)
    assert all(p.exists() for p in paths)


HOLD = """
import sys, time
from data_utils.files import lock_run
lock = lock_run(sys.argv[1], "run")
print("held", flush=True)
time.sleep(60)
"""


def test_lock_run_refuses_a_second_process_until_the_first_is_gone(tmp_path):
    process = python(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    (tmp_path / "run.pt.tmp-7").write_text("of the one that runs")
    with pytest.raises(UsageError, match=f"run run is in use by process {process.pid} on "):
        files.lock_run(tmp_path, "run")
    assert (tmp_path / "run.pt.tmp-7").exists()
    other = files.lock_run(tmp_path, "other")
    process.kill()
    process.wait()
    lock = files.lock_run(tmp_path, "run")
    assert (tmp_path / ".run.lock").read_text().startswith(f"{os.getpid()} on ")
    lock.close(), other.close()


def test_lock_run_sweeps_the_torn_files_of_this_run_only(tmp_path):
    mine = ["run.pt.tmp-7", "run_epoch3.pt.tmp-12", "run_metrics.jsonl.tmp-1", "run.tmp-rehearsal-5"]
    others = ["other.pt.tmp-7", "run.pt", "notes.tmp", "running.pt.tmp-3", "run2_epoch1.pt.tmp-4", "run.tmp-mine"]
    for name in mine + others:
        (tmp_path / name).write_text("")
    files.lock_run(tmp_path, "run").close()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == sorted(others)


def test_lock_run_sweeps_all_torn_files_of_its_own_folders_but_not_those_of_others(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "folder.tmp-3").mkdir()
    for name in ("mine/latest.pt.tmp-7", "mine/latest.pt", "latest.pt.tmp-7", "mine/notes.tmp-1", "mine/plan.pt.tmp-1"):
        (tmp_path / name).write_text("")
    files.lock_run(tmp_path, "run", tmp_path / "mine", tmp_path / "absent").close()
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "folder.tmp-3", "latest.pt", "notes.tmp-1", "plan.pt.tmp-1"
    ]  # fmt: skip
    assert (tmp_path / "latest.pt.tmp-7").exists()


def test_a_main_that_fails_leaves_neither_lock_nor_empty_folder(tmp_path):
    @ends_cleanly
    def main(folder, error=None, write=""):
        files.lock_run(tmp_path / folder, "run")
        assert (tmp_path / folder / ".run.lock").exists()
        if write:
            (tmp_path / folder / write).write_text("mine")
        if error:
            raise error

    (tmp_path / "old").mkdir()
    for error in (UsageError("no"), RuntimeError("a bug"), KeyboardInterrupt()):
        for folder in ("old", "new/deep"):
            with pytest.raises(type(error)):
                main(folder, error)
        assert [path.name for path in tmp_path.iterdir()] == ["old"] and not list((tmp_path / "old").iterdir())
    with pytest.raises(DataError):
        main("new/deep", DataError("late"), write="rows.bin")
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["rows.bin"]
    main("old")
    with pytest.raises(DataError):
        main("old", DataError("later"))
    assert [path.name for path in (tmp_path / "old").iterdir()] == [".run.lock"]  # of the run that did not fail


def test_a_lock_that_its_failed_run_removed_is_not_shared(tmp_path):
    """A second process opens the file, the first one removes it and ends, the second one locks what it opened."""
    path = tmp_path / ".run.lock"
    first, second = files._RunLock(path), files._RunLock(path)
    assert not second.is_gone(path)
    first.release(failed=True)
    first.release(failed=True)
    assert not path.exists() and second.is_gone(path)
    third = files._RunLock(path)
    assert second.is_gone(path) and not third.is_gone(path)
    second.close(), third.close()


def test_set_aside_numbers_the_backups_and_replaces_none(tmp_path, capsys):
    for generation in "123":
        (tmp_path / "a.pt").write_text(generation)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "x").write_text(generation)
        files.set_aside([tmp_path / "a.pt", tmp_path / "run", tmp_path / "absent.pt"])
        assert f"a.pt -> a.pt.bak{generation.strip('1')}" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.glob("a.pt*")} == {
        "a.pt.bak": "1", "a.pt.bak2": "2", "a.pt.bak3": "3"
    }  # fmt: skip
    assert [(tmp_path / name / "x").read_text() for name in ("run.bak", "run.bak2", "run.bak3")] == ["1", "2", "3"]


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_an_abandoned_branch_is_set_aside(tmp_path):
    for name in ("step_9.pt", "step_10.pt", "step_100.pt", "final.pt"):
        checkpoint.save_checkpoint(tmp_path / name, make_state(step=50))
    (tmp_path / "step_70.pt").write_bytes(b"cut")
    (tmp_path / "checkpoint_11").mkdir()
    names = "step_100.pt step_70.pt final.pt step_10.pt step_9.pt checkpoint_11 absent.pt".split()
    checkpoint.set_aside_later([tmp_path / name for name in names], 10)
    assert {p.name for p in tmp_path.iterdir() if p.name.endswith(".bak")} == {
        "step_100.pt.bak", "step_70.pt.bak", "final.pt.bak", "checkpoint_11.bak"
    }  # fmt: skip
    assert (tmp_path / "step_10.pt").exists() and (tmp_path / "step_9.pt").exists()


def test_a_row_that_the_disk_does_not_take_is_one_warning(tmp_path, capfd):
    for step in (1, 2):
        metrics.append_row(tmp_path, dict(step=step))  # a folder
    err = capfd.readouterr().err
    assert err.count("was not written") == 1 and "training goes on" in err


def test_a_row_that_fits_the_disk_in_part_leaves_no_torn_line(tmp_path, capfd):
    resource = pytest.importorskip("resource")
    path, (soft, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.append_row(path, dict(step=1, text="x" * 20_000))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))  # room for half a row
        metrics.append_row(path, dict(step=2, text="x" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.append_row(path, dict(step=3))
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 3]
    assert "metrics.jsonl was not written" in capfd.readouterr().err


def test_a_figure_that_cannot_be_drawn_is_one_line(tmp_path):
    lines, rows = [], tmp_path / "metrics.jsonl"
    metrics.append_row(rows, dict(step=1, split="train", loss=1.0))
    (tmp_path / "loss.png").mkdir()
    metrics.draw_losses([rows], tmp_path / "loss.png", lines.append)
    metrics.draw_losses([tmp_path / "none.jsonl"], tmp_path / "b.png", lines.append)
    assert len(lines) == 2 and all(line.startswith("no loss curve: ") for line in lines)
    assert "loss.png was not written" in lines[0]
    metrics.draw_losses([rows], tmp_path / "c.png", lines.append)
    assert (tmp_path / "c.png").exists() and len(lines) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "loss.png", "metrics.jsonl"]


# ---- W&B -------------------------------------------------------------------------------------------------------------


class FakeRun:
    """A module wandb that fails as requested."""

    def __init__(self, begin=None, send=None):
        self.begin, self.send, self.rows, self.options = begin, send, [], {}
        self.Settings = dict

    def init(self, **options):
        self.options = options
        if self.begin:
            raise self.begin
        return self

    def log(self, row):
        if self.send:
            raise self.send
        self.rows.append(row)


def start_wandb(monkeypatch, fake, mode="online"):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return metrics.to_wandb(mode, "project", "", "name", {})


@pytest.mark.parametrize("error", [TimeoutError("no network"), RuntimeError(""), PermissionError(13, "denied")])
def test_wandb_that_cannot_begin_is_one_warning(error, monkeypatch, capfd):
    fake = FakeRun(begin=error)
    log = start_wandb(monkeypatch, fake)
    log(dict(step=1))
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "training goes on without it" in err and type(error).__name__ in err
    assert fake.options["settings"]["init_timeout"] <= 30 and not fake.rows


def test_wandb_that_fails_later_is_one_warning(monkeypatch, capfd):
    fake = FakeRun()
    log = start_wandb(monkeypatch, fake)
    log(dict(step=1))
    fake.send = ConnectionError("gone")
    log(dict(step=2))
    fake.send = None
    log(dict(step=3))
    err = capfd.readouterr().err
    assert fake.rows == [dict(step=1)] and err.count("warning: ") == 1 and "ConnectionError: gone" in err


@pytest.mark.parametrize("error", [RuntimeError("Could not determine home directory."), PermissionError(13, "denied")])
def test_a_home_folder_that_is_not_to_be_read_has_no_key_for_wandb(error, monkeypatch, capfd):
    def home():
        raise error

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metrics.Path, "home", home)
    fake = FakeRun()
    start_wandb(monkeypatch, fake, "auto")(dict(step=1))
    assert not fake.options and not fake.rows and not capfd.readouterr().err


def test_wandb_that_is_not_installed_is_one_warning(monkeypatch, capfd):
    start_wandb(monkeypatch, None)(dict(step=1))
    assert "pip install wandb" in capfd.readouterr().err


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_later_is_one_warning(tmp_path, capfd):
    log = progress.Log(tmp_path / "train.log", "run")
    log("first")
    (tmp_path / "train.log").rename(tmp_path / "old.log")
    (tmp_path / "train.log").mkdir()
    for line in ("second", "third"):
        log(line)
    out, err = capfd.readouterr()
    assert out.split() == ["first", "second", "third"] and (tmp_path / "old.log").read_text() == "run: first\n"
    assert err.count("train.log was not written") == 1 and "training goes on" in err


def test_a_log_file_is_tried_before_any_work(tmp_path):
    progress.check_log("")
    progress.check_log(tmp_path / "new" / "folder" / "train.log")
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").write_text("mine")
    progress.check_log(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    for path in (tmp_path, tmp_path / "file" / "train.log"):
        with pytest.raises(UsageError, match="--log_file .* can't be written: .*\ntry: --log_file ''"):
            progress.check_log(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_lines_that_a_full_disk_does_not_take_are_left_out(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w", buffering=1))
    progress.say("a line")
    files.warn("another")
    progress.Log("/dev/full", "run")("a third")


def test_metrics_drop_rows_beyond_the_step_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.read_rows(path) == []
    metrics.start_rows(path, 0, 0, dict(lr=1), "cpu")
    for step in (1, 2, 3):
        metrics.append_row(path, dict(step=step, loss=1.0))
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row.get("step") for row in metrics.read_rows(path)] == [None, 1, 2, 3]
    metrics.start_rows(path, 2, 2, dict(lr=2), "cpu")
    assert path.read_text().endswith("}\n") and [row.get("step") for row in metrics.read_rows(path)] == [None, 1, 2]
    first = metrics.read_rows(path)[0]
    assert first["config"] == dict(lr=1) and set(first) == {"config", "argv", "versions", "commit", "device"}
    metrics.start_rows(path, 0, 0, dict(lr=3), "cpu")
    assert len(metrics.read_rows(path)) == 1
    path.unlink()
    metrics.start_rows(path, 7, 7, dict(lr=4), "cpu")  # resumed without its metrics
    assert metrics.read_rows(path)[0]["config"] == dict(lr=4)


def test_rows_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append_row(path, dict(step=1, a=math.nan, b=[math.inf, (1, -math.inf)], c=dict(d=math.nan, e="é")))

    def refuse(name):
        raise AssertionError(name)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == dict(step=1, a=None, b=[None, [1, None]], c=dict(d=None, e="é"))


def test_a_row_that_cannot_be_written_as_json_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append_row(path, dict(step=1))
    with pytest.raises(TypeError):
        metrics.append_row(path, dict(step=2, tensor=torch.ones(1)))
    assert metrics.read_rows(path) == [dict(step=1)]


def test_averages():
    row = metrics.averages(dict(nll=20.0, extra=5.0, tokens=10.0, bytes=40.0))
    assert row == pytest.approx(dict(nll=2.0, extra=0.5, perplexity=math.exp(2), bpb=20 / math.log(2) / 40, tokens=10))
    assert all(map(math.isfinite, metrics.averages(dict(nll=0.0, tokens=0, bytes=0)).values()))


# ---- stop ------------------------------------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_restored_after_success_and_failure(fails):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with Stop() as stop:
            assert not stop and all(signal.getsignal(n) == stop._note for n in SIGNALS)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_one_delivered_twice_counts_once(number):
    with Stop() as stop:
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.signal == number


def test_an_ignored_signal_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN) if hasattr(signal, "SIGHUP") else None
    try:
        with Stop() as stop:
            if old is not None:
                signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        if old is not None:
            signal.signal(signal.SIGHUP, old)


WAIT = """
import sys, time
from data_utils.stop import Stop
with Stop() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_a_second_signal_after_one_second_leaves_at_once():
    process = python(WAIT)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(1.0)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and time.monotonic() - start < 1


# ---- a schedule in epochs, and the data of a run ---------------------------------------------------------------------


def test_a_schedule_keeps_the_steps_taken_and_the_epochs_left():
    def saved_at(step, steps, per_epoch, epochs=4):
        return dict(step=step, steps=steps, steps_per_epoch=per_epoch, config=dict(epochs=epochs, steps=0))

    assert checkpoint.schedule_steps(4, 10, None) == 40
    for step in (0, 7, 20, 40):
        assert checkpoint.schedule_steps(4, 10, saved_at(step, 40, 10)) == 40  # the same batch
        assert checkpoint.schedule_steps(6, 10, saved_at(step, 40, 10)) == 60  # more epochs
    assert checkpoint.schedule_steps(4, 5, saved_at(20, 40, 10)) == 30  # a batch of twice the size, two epochs left
    assert checkpoint.schedule_steps(4, 5, saved_at(25, 30, 5)) == 30  # and again
    assert checkpoint.schedule_steps(4, 20, saved_at(20, 40, 10)) == 60
    older = saved_at(20, 40, 10)
    del older["steps_per_epoch"]
    assert checkpoint.schedule_steps(4, 5, older) == 30
    in_steps = dict(step=20, steps=30, config=dict(epochs=0, steps=30))
    assert checkpoint.schedule_steps(4, 10, in_steps) == 40


@pytest.mark.parametrize("resume", ["auto", "latest", "a.pt"])
def test_only_a_run_that_nobody_named_is_refused_for_its_data(resume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(theirs, ours, data_hash="other"):
        state = make_header(data_hash=data_hash)
        checkpoint.check_same_data("a b.pt", state, make_header(), resume, (theirs, ours), "--out c")

    check("A/qa", "B/qa", data_hash="d")  # the same data elsewhere
    check("A/qa", f"{tmp_path}/A/qa")  # other data in the same place
    if resume != "auto":
        check("A/qa", "B/qa")
        return
    with pytest.raises(UsageError, match="other data: A/qa, here B/qa; --resume 'a b.pt' goes on.*\ntry: --out c"):
        check("A/qa", "B/qa")


REMEDIES = {
    "a.pt2": "torch.export.load reads this file",
    "a.safetensors": "safetensors.torch.load_file reads this file",
    "tokenizer.json": "a checkpoint, whose name ends in .pt",
    "a.pt": "",
}


@pytest.mark.parametrize("name, remedy", REMEDIES.items())
def test_a_file_that_is_no_checkpoint_is_named_with_a_remedy(name, remedy, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(tmp_path / name)
    advice = str(error.value).partition("\n")[2]
    assert advice.endswith(remedy) if remedy else not advice
