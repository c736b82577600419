"""The report of scripts/gpu_check.sh, in its form for a CPU, and what it does with rows that fail or are cut."""

import importlib
import json
import resource
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Config, Row
from data_utils.config import from_cli
from data_utils.errors import DataError, UsageError
from tests.helpers import ROOT, environment


@pytest.mark.slow
def test_the_form_for_a_cpu_runs_every_row_in_under_a_minute(tmp_path):
    out = tmp_path / "report.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--tiny", "--out", str(out)]
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=400)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(out.read_text())
    facts = results.pop("machine")
    rows = gpu_check.all_rows(Config(device="cpu", tiny=True, work=str(tmp_path)))
    assert [*results] == [row.name for row in rows] and len(rows) == 22
    assert {row["outcome"] for row in results.values()} == {"ok"}
    for name, row in results.items():
        if name.endswith("bf16"):
            assert row["speed"] > 0 and row["peak_mb"] > 0 and row["loss"] > 0
        if name.endswith("generate"):
            assert row["compared"] == dict(fp32=0.0, later=0.0, resumed=0.0)  # one CPU agrees with itself
    assert all(0 <= results[f"{name} bf16"]["waits_for_host"] < 1 for name in ("multimodal", "sudoku9"))
    assert rows[-1].name == "sudoku9 hard" and "held out after 10 steps: solved" in results["sudoku9 hard"]["note"]
    assert ended.stdout.splitlines()[0].startswith(f"cpu: {facts['name']}; torch {facts['torch']}")
    assert ended.stdout.splitlines()[-1] == "22 of 22 rows ran"
    page = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in results) and "22 of 22 rows ran" in page
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


def test_the_command_of_every_row_parses(tmp_path):
    rows = gpu_check.all_rows(Config(work=str(tmp_path), device="cuda:1"))
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) == 6 + 9 + 6 + 2 + 6 + 6 + 19 + 1
    assert all(
        f"{script} {how}" in names
        for script in gpu_check.MAIN
        for precision in ("bf16", "fp32", "fp16")
        for how in (precision, f"{precision} compiled")
    )
    count = 0
    for row_name, (path, *flags) in ((row.name, words) for row in rows for words in row.commands):
        if path == gpu_check.FILE and flags[0] == "traced":
            path, *flags = flags[5:]
        module = importlib.import_module(Path(path).stem) if path != gpu_check.FILE else gpu_check
        if module is gpu_check:
            assert flags[0] in gpu_check.INSIDE
        elif module.__name__ == "prepare_data":
            from_cli(module.COMMANDS[flags[0]][0], argv=flags[1:])
        elif module.__name__ == "generate":
            module.parse(flags)
        else:
            cfg = module.parse(flags)
            compiled = cfg.compile_mode != "off" if hasattr(cfg, "compile_mode") else cfg.compile
            assert cfg.device == "cuda:1" or cfg.device == "cpu" and ("generate" in row_name or "data" in row_name)
            assert 0 < (cfg.max_steps or cfg.max_seconds) <= 300 and compiled == row_name.endswith("compiled")
        count += 1
    assert count > 80


@pytest.fixture
def scripts(tmp_path):
    """Paths of programs that do what their names say."""
    texts = dict(
        good="print('fine')",
        bad="raise RuntimeError('no kernel image')",
        endless="import time\ntime.sleep(99)",
        usage="print('error: no such flag')\nprint('try: another')\nraise SystemExit(2)",
    )
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    return {name: [str(tmp_path / f"{name}.py")] for name in texts}


ONE = dict(device="cpu", name="one", capability="", torch="2", cores=1, processor="p", date="d")


def worked_through(tmp_path, rows, seconds=30.0):
    """Run rows without torch, each in an interpreter of its own -> their names in the order in which they ended."""
    done = []
    cfg = Config(device="cpu", tiny=True, work=str(tmp_path), warm=False)
    gpu_check.work_through(rows, cfg, time.monotonic() + seconds, lambda row: done.append(row.name))
    return done


def test_a_row_that_fails_is_a_row_and_the_others_go_on(tmp_path, scripts):
    def broken(logs):
        return dict(speed={}["speed"])

    rows = [
        Row("bad", [scripts["bad"]], lambda logs: {}),
        Row("usage", [scripts["good"], scripts["usage"]], lambda logs: {}),
        Row("endless", [scripts["endless"]], lambda logs: {}, limit=0.5),
        Row("unreadable", [scripts["good"]], broken),
        Row("lacking", [scripts["good"]], lambda logs: {}, needs=[tmp_path / "absent.pt"]),
        Row("beside", [scripts["bad"]], lambda logs: {}, alone=False),
        Row("good", [scripts["good"]], lambda logs: dict(note=logs[0].read_text().strip())),
    ]
    assert worked_through(tmp_path, rows) == [row.name for row in rows]
    assert [row.outcome for row in rows] == ["failed"] * 4 + ["not run", "failed", "ok"]
    assert rows[0].error == "status 1: RuntimeError: no kernel image" and rows[6].figures == dict(note="fine")
    assert rows[1].error == "status 2: error: no such flag"
    assert rows[2].error.startswith("no end after 0 s") and rows[3].error == "KeyError: 'speed'"
    assert rows[4].error == "needs absent.pt, which is not there"
    summary = gpu_check.summary_of(rows)
    assert summary.startswith("1 of 7 rows ran; 5 failed (bad, ") and summary.endswith("1 not run (lacking)")
    page = gpu_check.table(ONE, rows, summary)
    assert "failed: status 1: RuntimeError: no kernel image |" in page


def test_rows_that_the_budget_cut_are_said_to_be_not_run(tmp_path, scripts, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 0.2)
    rows = [Row(name, [scripts[name]], lambda logs: {}) for name in ("good", "endless", "bad")]
    worked_through(tmp_path, rows, seconds=1.5)
    assert [row.outcome for row in rows] == ["ok", "not run", "not run"]
    assert rows[1].error.startswith("cut by the budget after") and rows[2].error == "the minutes were over"


def test_no_row_ran_is_status_1_with_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "look_at", lambda cfg: ONE)
    monkeypatch.setattr(gpu_check, "import_ahead", lambda: None)
    out = tmp_path / "report.json"
    with pytest.raises(DataError, match="0 of 22 rows ran; 22 not run"):
        gpu_check.main(Config(device="cpu", tiny=True, minutes=1e-6, out=str(out)))
    assert {row.get("outcome", "not run") for row in json.loads(out.read_text()).values()} == {"not run"}
    bad = dict(minutes=0), dict(precisions=("int8",)), dict(tiny=False)
    for flags, message in zip(bad, ("--minutes 0", "--precisions int8", "--device cpu --tiny"), strict=True):
        with pytest.raises(UsageError, match=message):
            gpu_check.main(Config(**dict(device="cpu", tiny=True) | flags))


def test_where_forks_cannot_use_the_device_each_row_gets_an_interpreter(tmp_path, monkeypatch):
    class NoFork:
        pid = 2**22 + 1  # of no process

        def __init__(self, words, log, folder, environment):
            log.write_text("RuntimeError: Cannot re-initialize CUDA in forked subprocess\n")

        def poll(self):
            return 1

    monkeypatch.setattr(gpu_check, "Fork", NoFork)
    cfg = Config(device="cpu", tiny=True, work=str(tmp_path))
    assert gpu_check.look_at(cfg)["cores"] and not cfg.warm


@pytest.mark.parametrize(("cpu", "message"), [(4.0, ""), (4.1, r"\(fp32\)"), (4.02, r"\(fp32\)")])
def test_a_loss_far_from_that_of_the_cpu_fails_its_row(tmp_path, monkeypatch, cpu, message):
    row = gpu_check.compared(Config(work=str(tmp_path)), "transformer")
    log = tmp_path / "log"
    log.write_text("resumed a.pt at step 3\n")

    def rows_of(system, folder):
        last = 5 if folder.name.endswith(("cpu", "fp32")) else 3
        first = cpu if folder.name.endswith("cpu") else 4.0
        return [dict(step=step, loss=first if step == 1 else 3.0) for step in range(1, last + 1)]

    monkeypatch.setattr(gpu_check, "rows_of", rows_of)
    if message:
        with pytest.raises(DataError, match=message if cpu == 4.02 else "differ from the CPU's"):
            row.read([log] * 6)
    else:
        assert row.read([log] * 6)["compared"] == dict.fromkeys(("fp32", "bf16", "fp16", "later", "resumed"), 0.0)
        log.write_text("begun anew\n")
        with pytest.raises(DataError, match="did not go on"):
            row.read([log] * 6)


def test_the_share_that_waits_is_what_no_work_covers():
    events = [
        dict(cat="kernel", name="a", ts=0.0, dur=2e5),
        dict(cat="kernel", name="b", ts=1e5, dur=2e5),  # beside a
        dict(cat="gpu_memcpy", name="c", ts=5e5, dur=1e5),
        dict(cat="cuda_runtime", name="cudaStreamSynchronize", ts=3e5, dur=3e5),
        dict(cat="cuda_runtime", name="cudaLaunchKernel", ts=0.0, dur=9e5),
        dict(cat="cpu_op", name="aten::mm", ts=0.0, dur=1e6),
        dict(name="a mark without a category"),
    ]
    shares = gpu_check.shares(events, 1.0)
    assert shares == dict(waits_for_host=pytest.approx(0.6), waits_for_gpu=pytest.approx(0.3))
    assert gpu_check.shares(events[5:], 2.0)["waits_for_host"] == pytest.approx(0.5)
    assert "error" in gpu_check.shares([], 1.0)


def test_the_first_line_says_what_was_checked():
    facts = ONE | dict(device="cuda", name="A", capability="9.0", memory_gb=150.0, driver="570.1", cuda="12.8")
    line = "cuda: A; capability 9.0, 150 GB; driver 570.1, CUDA 12.8; torch 2; 1 cores of p; d"
    assert gpu_check.described(facts) == line
    assert "driver unknown" in gpu_check.described(facts | dict(driver=""))


def test_a_card_without_bf16_gets_no_rows_in_it(tmp_path, monkeypatch, capsys):
    facts = ONE | dict(capability="7.5", memory_gb=16.0, driver="1", cuda="12")
    monkeypatch.setattr(gpu_check, "look_at", lambda cfg: facts)
    out = tmp_path / "report.json"
    with pytest.raises(DataError, match="0 of 41 rows ran"):
        gpu_check.main(Config(tiny=True, minutes=1e-6, warm=False, out=str(out)))
    names = [*json.loads(out.read_text())]
    assert names[5] == "transformer fp16" and "transformer fp32" in names and "bf16" not in " ".join(names)
    assert "no rows in bf16: capability 7.5 takes fp16" in capsys.readouterr().out


def test_the_precision_that_a_run_took_is_read_from_its_log(tmp_path):
    log = tmp_path / "log"
    for line, precision in (("cuda:0, float16", "fp16"), ("cpu, float32, 2 processes", "fp32")):
        log.write_text(f"before\n{line}\nafter\n")
        assert gpu_check.precision_of(log) == precision
