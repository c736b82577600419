"""Facts of a run: strict, whole at any moment, of constant size an event, and once an epoch over all resumes."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_utils.errors import DataError
from data_utils.events import facts
from train_ae import AeConfig

CFG = SimpleNamespace(seed=42, loop="ae", sweep_job=3)
KEYS = """schema_version moment run_dir epoch step split train_loss val_loss metrics epoch_time_s total_time_s
throughput max_memory_mib meta nonfinite""".split()


def event(run, moment="on_epoch_end", **more):
    payload = facts.build_event_payload(moment=moment, run_dir=run, cfg=CFG, run_id="abc", **more)
    facts.append_jsonl_event(run, payload)
    return payload


def row(run, epoch, split="val", val_loss=0.5, **metrics):
    facts.append_scalars_csv(run, epoch=epoch, split=split, train_loss=1.0, val_loss=val_loss, metrics=metrics,
                             epoch_time_s=2.0, throughput=1e6 / 3, max_memory_mib=100.0)  # fmt: skip


def lines(run):
    def constant(name):
        raise AssertionError(f"{name} is not strict JSON")

    text = (run / "facts" / "events.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=constant) for line in text.splitlines()]


def table(run):
    with open(run / "facts" / "scalars.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_an_event_has_the_documented_fields(tmp_path):
    event(tmp_path, epoch=0, step=7, split="val", train_loss=1.0, val_loss=np.float32(0.5), metrics=dict(lr=1e-3))
    (line,) = lines(tmp_path)
    assert set(line) == set(KEYS) and line["schema_version"] == 2 and line["val_loss"] == 0.5
    meta = line["meta"]
    assert (meta["run_id"], meta["seed"], meta["loop"], meta["job"]) == ("abc", 42, "ae", 3)
    assert set(meta) == set("timestamp run_id git_commit hostname cuda_info seed loop job".split())
    assert set(meta["cuda_info"]) == {"available", "device_count", "current_device", "device_name"}
    with pytest.raises(ValueError, match="on_epoch_end"):
        facts.build_event_payload(moment="on_epoch", run_dir=tmp_path)


def test_run_dir_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "runs" / "a"
    assert facts.build_event_payload(moment="on_start", run_dir=run)["run_dir"] == "outputs/runs/a"


def test_nan_and_infinity_are_null_and_named(tmp_path):
    histories = dict(train_loss=[1.0, math.nan], val_loss=[1.0, 2.0])
    event(
        tmp_path, train_loss=math.nan, metrics=dict(perplexity=torch.tensor(math.inf), usage=0.5), histories=histories
    )
    event(tmp_path, "on_train_end", histories=histories)
    first, last = lines(tmp_path)
    assert first["train_loss"] is None and first["metrics"] == dict(perplexity=None, usage=0.5)
    assert first["nonfinite"] == ["train_loss", "perplexity"] and last["nonfinite"] == ["train_loss"]
    row(tmp_path, 0, val_loss=math.nan, perplexity=math.inf, usage=0.5)
    assert table(tmp_path)[0]["val_loss"] == table(tmp_path)[0]["metric_perplexity"] == ""
    assert "nan" not in (tmp_path / "facts" / "scalars.csv").read_text()


def test_an_event_is_of_constant_size_and_histories_come_once(tmp_path):
    histories = dict(train_loss=[], val_loss=[])
    sizes = []
    for epoch in range(501):
        for name in histories:
            histories[name].append(1 / (epoch + 3))
        loss = histories["val_loss"][-1]
        payload = event(
            tmp_path, epoch=epoch, train_loss=loss, val_loss=loss, histories=histories, metrics=dict(a=loss)
        )
        assert payload["histories"] is histories  # for figures
        sizes.append((tmp_path / "facts" / "events.jsonl").stat().st_size)
    assert sizes[500] - sizes[499] <= 1.2 * (sizes[5] - sizes[4])
    event(tmp_path, "on_train_end", histories=histories)
    assert [line["moment"] for line in lines(tmp_path) if "histories" in line] == ["on_train_end"]
    rebuilt = facts.read_histories(tmp_path)
    assert {name: rebuilt[name] for name in histories} == histories and rebuilt["a"] == histories["val_loss"]
    assert facts.best_val_loss(tmp_path) == 1 / 503


def test_histories_have_none_where_nothing_is_known(tmp_path):
    assert facts.read_histories(tmp_path)["val_loss"] == [] and facts.best_val_loss(tmp_path) is None
    event(tmp_path, epoch=0, train_loss=3.0, val_loss=math.nan)
    event(tmp_path, epoch=2, train_loss=1.0, val_loss=1.5, metrics=dict(usage=0.5), epoch_time_s=4.0)
    event(tmp_path, epoch=2, train_loss=1.0, val_loss=1.25, metrics=dict(usage=0.75), epoch_time_s=4.0)
    histories = facts.read_histories(tmp_path)
    assert histories["train_loss"] == [3.0, None, 1.0] and histories["val_loss"] == [None, None, 1.25]
    assert histories["usage"] == [None, None, 0.75] and histories["epoch_time_s"] == [None, None, 4.0]
    assert facts.best_val_loss(tmp_path) == 1.25


def test_the_loop_of_the_guide_writes_and_draws_as_it_stands(tmp_path, monkeypatch):
    figures = pytest.importorskip("data_utils.events.figures")
    drawn = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, out: drawn.append(out.name))
    cfg, families, outdir = AeConfig(plot_every=2), {"losses", "metrics"}, str(tmp_path)
    payload = facts.build_event_payload(moment="on_start", run_dir=outdir, cfg=cfg)
    facts.append_jsonl_event(outdir, payload)
    figures.handle_event(cfg, families, "on_start", payload)
    histories = dict(train_loss=[], val_loss=[], my_metric=[])
    for epoch in range(3):
        for values in histories.values():
            values.append(torch.tensor(1 / (epoch + 1)).item())
        payload = facts.build_event_payload(moment="on_epoch_end", run_dir=outdir, epoch=epoch, train_loss=0.5,
                                            val_loss=0.25, histories=histories, cfg=cfg)  # fmt: skip
        facts.append_jsonl_event(outdir, payload)
        facts.append_scalars_csv(outdir, epoch=epoch, split="val", train_loss=0.5, val_loss=0.25, metrics={},
                                 epoch_time_s=None, throughput=None, max_memory_mib=None)  # fmt: skip
        figures.handle_event(cfg, families, "on_epoch_end", payload)
    payload = facts.build_event_payload(moment="on_train_end", run_dir=outdir, histories=histories, cfg=cfg)
    facts.append_jsonl_event(outdir, payload)
    figures.handle_event(cfg, families, "on_train_end", payload)
    facts.append_jsonl_event(
        outdir, facts.build_event_payload(moment="on_exception", run_dir=outdir, error="x", cfg=cfg)
    )
    assert [line["moment"] for line in lines(tmp_path)] == ["on_start", *["on_epoch_end"] * 3, "on_train_end",
                                                            "on_exception"]  # fmt: skip
    assert drawn == [f"{name}-{moment}-e00{epoch}.png" for moment, epoch in (("on_epoch_end", 1), ("on_train_end", 2))
                     for name in ("losses", "metrics")]  # fmt: skip
    assert len(table(tmp_path)) == 3 and lines(tmp_path)[4]["histories"]["my_metric"][0] == 1


def test_an_exception_is_an_event(tmp_path):
    event(tmp_path, "on_exception", epoch=1, error="KeyError: 'x'", traceback="Traceback ...")
    (line,) = lines(tmp_path)
    assert line["error"] == "KeyError: 'x'" and line["traceback"] == "Traceback ..."


# ---- the table -------------------------------------------------------------------------------------------------------


def test_rows_and_numbers_of_the_table(tmp_path):
    row(tmp_path, 0, "train", val_loss=None, b=2.0, a=1)
    row(tmp_path, 0, "val", val_loss=1 / 3, a=3)
    text = (tmp_path / "facts" / "scalars.csv").read_text().splitlines()
    assert text[0] == "epoch,split,train_loss,val_loss,epoch_time_s,throughput,max_memory_mib,metric_a,metric_b"
    assert text[1] == "0,train,1,,2,333333.33,100,1,2" and text[2] == "0,val,1,0.33333333,2,333333.33,100,3,"


def test_a_late_metric_rewrites_the_table_under_all_names(tmp_path):
    row(tmp_path, 0, a=1.0)
    inode = (tmp_path / "facts" / "scalars.csv").stat().st_ino
    row(tmp_path, 1, a=2.0)
    assert (tmp_path / "facts" / "scalars.csv").stat().st_ino == inode  # appended
    row(tmp_path, 2, c=3.0)
    row(tmp_path, 3, b=4.0)
    assert [(r["epoch"], r["metric_a"], r["metric_b"], r["metric_c"]) for r in table(tmp_path)] == [
        ("0", "1", "", ""), ("1", "2", "", ""), ("2", "", "", "3"), ("3", "", "4", "")
    ]  # fmt: skip
    assert list(table(tmp_path)[0])[-3:] == ["metric_a", "metric_b", "metric_c"]
    assert [p.name for p in (tmp_path / "facts").iterdir()] == ["scalars.csv"]


# ---- kills, resumes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_ignored_by_readers_and_cut_by_writers(tmp_path, cut):
    for epoch in range(3):
        event(tmp_path, epoch=epoch, val_loss=float(epoch))
        row(tmp_path, epoch, val_loss=float(epoch))
    for name in ("events.jsonl", "scalars.csv"):
        path = tmp_path / "facts" / name
        path.write_bytes(path.read_bytes()[: -min(cut, 20 if name == "scalars.csv" else cut)])
    assert facts.read_histories(tmp_path)["val_loss"] == [0.0, 1.0] and len(facts.read_scalars(tmp_path)) == 2
    event(tmp_path, epoch=2, val_loss=7.0)
    row(tmp_path, 2, val_loss=7.0, late=1.0)
    assert facts.read_histories(tmp_path)["val_loss"] == [0.0, 1.0, 7.0]
    assert [r["val_loss"] for r in table(tmp_path)] == ["0", "1", "7"] and len(lines(tmp_path)) == 3


def test_a_file_that_is_one_torn_line(tmp_path):
    (tmp_path / "facts").mkdir()
    for name, text in (("events.jsonl", '{"moment": "on_st'), ("scalars.csv", "epoch,spl")):
        (tmp_path / "facts" / name).write_text(text)
    assert facts.read_events(tmp_path) == facts.read_scalars(tmp_path) == []
    event(tmp_path, "on_start")
    row(tmp_path, 0)
    assert len(lines(tmp_path)) == len(table(tmp_path)) == 1


def test_rewind_drops_what_will_come_again(tmp_path):
    facts.rewind(tmp_path, 0)  # of a run that left nothing
    event(tmp_path, "on_start")
    for epoch in range(4):
        event(tmp_path, epoch=epoch, val_loss=float(epoch))
        row(tmp_path, epoch, "train")
        row(tmp_path, epoch, "val")
    event(tmp_path, "on_interrupt", epoch=3)
    event(tmp_path, "on_train_end", epoch=3, histories=dict(train_loss=[], val_loss=[]))
    event(tmp_path, "on_test_end", epoch=1)
    row(tmp_path, 1, "test", test_loss=0.5)
    facts.rewind(tmp_path, 2)
    assert [(e["moment"], e["epoch"]) for e in lines(tmp_path)] == [
        ("on_start", None), ("on_epoch_end", 0), ("on_epoch_end", 1), ("on_interrupt", 3)
    ]  # fmt: skip
    assert [(r["epoch"], r["split"]) for r in table(tmp_path)] == [
        ("0", "train"),
        ("0", "val"),
        ("1", "train"),
        ("1", "val"),
    ]
    event(tmp_path, "on_resume", epoch=2)
    assert {e["meta"]["run_id"] for e in lines(tmp_path)} == {"abc"}


def test_what_can_not_be_written_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "facts").write_text("in the way")
    with pytest.raises(DataError, match="events.jsonl was not written"):
        event(tmp_path, "on_start")
    with pytest.raises(DataError, match="scalars.csv"):
        row(tmp_path, 0)
