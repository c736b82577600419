"""No file of the user's is deleted or replaced unasked: files that this project did not write stay, or become *.bak."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import plot
import prepare_data
from data_utils import checkpoint, figures, files
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import read_events
from data_utils.formulas import checkpoint_folders as folders
from data_utils.formulas import generate as formula
from data_utils.formulas import prepare as pools
from data_utils.pages import shard_builder as builder
from data_utils.reasoning import folder as prepared
from data_utils.reasoning import normalize_qa as qa
from data_utils.reasoning import prepare
from data_utils.text import corpus
from tests.data_utils.reasoning.test_prepare import config, content, language, put, texts


def refused(call, *words):
    """Run a call that must be refused; return the flag and the value that its last line advises."""
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words), message
    return tuple(shlex.split(re.search(r"(?m)^try: (--\w+ .+)$", message)[1]))


def tree(folder):
    """Return {name: bytes} of all files below a folder, but for locks and caches."""
    names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    return {name: Path(folder, name).read_bytes() for name in names if ".cache" not in name and ".lock" not in name}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of the user's own: rows of text as train.jsonl."""
    return put(tmp_path_factory.mktemp("rows") / "mine" / "train.jsonl", texts(30)).parent


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """A prepared folder."""
    dest = tmp_path_factory.mktemp("prepared") / "folder"
    language(source, dest)
    return dest


# ---- prepared folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["same", "below", "around", "link", "file", "linked_file"])
def test_source_and_dest_that_overlap_are_refused_and_the_advice_works(source, tmp_path, place):
    mine = shutil.copytree(source, tmp_path / "raw" / "mine")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rows.jsonl").symlink_to(mine / "train.jsonl")
    given, dest = dict(
        same=(mine, mine), below=(mine, mine / "out"), around=(mine, tmp_path / "raw"), link=(tmp_path / "link", mine),
        file=(mine / "train.jsonl", mine), linked_file=(tmp_path / "elsewhere", mine),
    )[place]  # fmt: skip
    before = tree(tmp_path)
    flag, other = refused(lambda: language(given, dest, fresh=True), "overlap")
    assert flag == "--dest" and tree(tmp_path) == before
    language(given, other)
    assert before.items() <= tree(tmp_path).items() and (Path(other) / "meta.json").exists()


NAMES = ["train.jsonl", "val.jsonl", "tokenizer.json", "train.bin", "val.idx.npy", "train.npy", "train.jsonl.partial"]


@pytest.mark.parametrize("command", ["language", "arithmetic", "sudoku", "convert", "mix", "merge"])
def test_a_folder_with_the_users_files_is_refused_and_fresh_sets_them_aside(source, folder, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    for name in (*NAMES, "notes.tmp-1", "train.jsonl.tmp-1.txt"):
        (out / name).write_text(f"my {name}")
    chunks = tmp_path / "chunks"
    shutil.copytree(folder, chunks / "a")
    before = tree(tmp_path)

    def call(dest=out, **more):
        if command == "language":
            return language(source, dest, **more)
        given = dict(
            arithmetic=dict(out=str(dest), digits=1), sudoku=dict(out=str(dest), size=4, givens=8, train=9, val=3),
            convert=dict(dataset=str(folder), output_dir=str(dest)), merge=dict(batches=str(chunks), keep_chunks=True),
            mix=dict(sources=(str(folder), str(chunks / "a")), weights=(1.0, 1.0)),
        )[command]  # fmt: skip
        given |= dict(output_dir=str(dest)) if command in ("mix", "merge") else {}
        name = "merge" if command == "mix" else command
        return getattr(prepare, name)(config(name, **given, **more))

    flag, other = refused(call, "not written by prepare_data.py", "--fresh")
    assert flag == dict(language="--dest", arithmetic="--out", sudoku="--out").get(command, "--output_dir")
    assert tree(tmp_path) == before
    call(other)
    assert (Path(other) / "meta.json").exists()
    call(fresh=True)
    assert {name: (out / f"{name}.bak").read_text() for name in NAMES} == {name: f"my {name}" for name in NAMES}
    assert (out / "notes.tmp-1").exists() and (out / "train.jsonl.tmp-1.txt").exists()
    once = tree(out)
    assert {name: part for name, part in once.items() if ".bak" not in name and ".tmp-" not in name} == tree(other)
    call(fresh=True)  # its own files, which are made again without a backup
    assert tree(out) == once


def test_a_file_that_the_user_put_into_a_finished_folder_survives_fresh(folder, source, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "train.bin").write_text("mine, of another name than the data here")
    (out / "val.jsonl").write_text("mine, instead of what was written")
    (out / "tokenizer.json").write_text("mine too")
    with pytest.raises(UsageError, match="is complete"):
        language(source, out)
    language(source, out, fresh=True)
    assert {name for name in tree(out) if ".bak" in name} == {
        "train.bin.bak", "tokenizer.json.bak", "meta.json.bak", "train.jsonl.bak", "val.jsonl.bak"
    }  # fmt: skip
    assert (out / "val.jsonl.bak").read_text() == "mine, instead of what was written"
    assert {name: part for name, part in tree(out).items() if ".bak" not in name} == content(folder)


def test_a_folder_of_an_older_version_without_hashes_can_be_made_again(folder, source, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if not k.endswith("sha256")}))
    language(source, out, fresh=True)
    assert content(folder).items() <= content(out).items() and (out / "train.jsonl.bak").exists()


def test_a_finished_file_beside_the_partial_one_is_refused(source, tmp_path):
    with prepare.Writer(tmp_path, "jsonl", dict(command="x")):
        pass
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="train.jsonl is in the way"):
        prepare.Writer(tmp_path, "jsonl", dict(command="x"))
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_folder_whose_progress_is_of_another_program_is_refused(source, tmp_path):
    (tmp_path / "progress.json").write_text('{"done": 3}')
    refused(lambda: language(source, tmp_path), "progress.json", "not written")
    assert (tmp_path / "progress.json").read_text() == '{"done": 3}'


def test_merge_deletes_of_a_chunk_only_what_it_merged(folder, tmp_path):
    chunk = shutil.copytree(folder, tmp_path / "chunks" / "a")
    (chunk / "train.bin").write_text("mine")
    (chunk / "train.npy").write_text("mine")
    prepare.merge(config("merge", batches=str(chunk.parent), output_dir=str(tmp_path / "out")))
    assert tree(chunk) == {"train.bin": b"mine", "train.npy": b"mine"}


@pytest.mark.parametrize("command", ["convert", "mix", "merge"])
def test_an_output_that_is_an_input_is_refused(folder, tmp_path, command):
    copies = [shutil.copytree(folder, tmp_path / "chunks" / name) for name in "ab"]
    (tmp_path / "link").symlink_to(copies[0])
    given = dict(convert=dict(dataset=str(copies[0])), merge=dict(batches=str(tmp_path / "chunks")),
                 mix=dict(sources=tuple(map(str, copies)), weights=(1.0, 1.0)))[command]  # fmt: skip
    function = prepare.convert if command == "convert" else prepare.merge
    before = tree(tmp_path)
    outputs = [copies[0] / "x", tmp_path / "chunks"] + [tmp_path / "link"] * (command != "merge")
    for output in outputs:
        options = dict(output_dir=str(output), fresh=True) | given
        refused(lambda o=options: function(config("merge" if command == "mix" else command, **o)), "overlap")
    assert tree(tmp_path) == before


def test_the_hint_for_a_raw_folder_makes_one_that_train_hrm_reads(source, tmp_path):
    mine = shutil.copytree(source, tmp_path / "my rows")
    with pytest.raises(DataError) as error:
        prepared.read_meta(mine)
    words = shlex.split(str(error.value).split("try: ")[1])
    assert words[:3] == ["python", "prepare_data.py", "language"]
    assert words[3:] == ["--source", str(mine), "--dest", f"{mine}_prepared"]
    language(words[4], words[6])
    assert prepared.read_meta(words[6])["train_samples"] and tree(mine) == tree(source)


# ---- single files ----------------------------------------------------------------------------------------------------


def test_normalize_qa_never_writes_over_its_input_and_fresh_sets_aside(tmp_path):
    path = put(tmp_path / "a.jsonl", [dict(q="x", a="y")])

    def call(output, **more):
        given = dict(input=str(tmp_path), question_field="q", answer_field="a", num_threads=1)
        qa.normalize(config("normalize-qa", output=str(output), **given | more))

    before = path.read_bytes()
    assert refused(lambda: call(path, fresh=True), "reads")[0] == "--output"
    (tmp_path / "link.jsonl").symlink_to(path)
    refused(lambda: call(tmp_path / "link.jsonl", fresh=True, input=str(path)), "reads")
    assert path.read_bytes() == before
    (tmp_path / "qa.out").write_text("mine")
    with pytest.raises(UsageError, match="--fresh"):
        call(tmp_path / "qa.out")
    for _ in range(2):  # the second time the content is equal
        call(tmp_path / "qa.out", fresh=True)
    assert not (tmp_path / "qa.out.bak2").exists()
    assert (tmp_path / "qa.out.bak").read_text() == "mine" and b"prompt" in (tmp_path / "qa.out").read_bytes()


def test_a_tokenizer_that_differs_is_not_replaced(tmp_path):
    put(tmp_path / "data" / "a" / "x.jsonl", texts(20))
    out = tmp_path / "bpe.json"

    def call(**more):
        given = dict(data_dir=str(tmp_path / "data"), vocab_size=300, out=str(out))
        prepare_data.tokenizer(config("tokenizer", **given | more))

    call()
    first = out.read_bytes()
    call()  # the same again
    refused(lambda: call(vocab_size=280), "--fresh")
    assert out.read_bytes() == first and not (tmp_path / "bpe.json.bak").exists()
    call(vocab_size=280, fresh=True)
    assert (tmp_path / "bpe.json.bak").read_bytes() == first != out.read_bytes()
    refused(lambda: call(out=str(tmp_path / "data" / "a" / "x.jsonl"), fresh=True), "reads")
    (tmp_path / "my.json").write_text("{}")
    refused(lambda: call(out=str(tmp_path / "my.json")), "my.json")


def test_the_corpus_replaces_what_it_wrote_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TOY", dict(list(corpus.TOY.items())[:2]))
    first, second = corpus.TOY

    def call(**more):
        prepare_data.expert(config("expert", data_dir=str(tmp_path), toy=True, **more))

    path = put(tmp_path / second / "toy.jsonl", [dict(text="mine", source="toy", id=0)])
    before = tree(tmp_path)
    assert refused(call, f"{second}/toy.jsonl")[0] == "--data_dir"
    assert tree(tmp_path) == before
    call(fresh=True)
    assert json.loads((path.parent / "toy.jsonl.bak").read_text())["text"] == "mine"
    complete = tree(tmp_path)
    call()
    assert tree(tmp_path) == complete
    monkeypatch.setattr(corpus, "toy", lambda domain: [("1", "another version of the text " * 20)])
    call()  # as written, so of this command
    assert b"another version" in path.read_bytes() and not list(tmp_path.rglob("*.bak2"))
    (tmp_path / "SOURCES.md").write_text("# Where my own text comes from\n")
    refused(call, "SOURCES.md")
    (tmp_path / "SOURCES.md").unlink()
    monkeypatch.undo()
    assert refused(call, "toy.jsonl")  # nothing proves any more who wrote these


def test_events_of_the_user_are_not_replaced(tmp_path, capsys):
    out = tmp_path / "events.npz"

    def call(**more):
        prepare_data.events(config("events", events=30, out=str(out), **more))

    call()
    rows = read_events(out, seed=0)[0]
    call(seed=1)
    assert not np.array_equal(read_events(out, seed=0)[0], rows)
    with np.load(out) as arrays:
        mine = dict(arrays)
    np.savez(out, **mine)  # the documented keys, of another program
    before = out.read_bytes()
    flag, other = refused(call, "--fresh")
    assert (flag, other) == ("--out", str(tmp_path / "events_new.npz")) and out.read_bytes() == before
    call(fresh=True)
    assert (tmp_path / "events.npz.bak").read_bytes() == before and len(read_events(out, seed=0)[0]) == 30


def test_a_pool_is_not_written_over_a_bundle_of_the_user(tmp_path):
    mine = tmp_path / "skeleton_pool.yaml"
    shutil.copy(Path(prepare_data.__file__).parent / "configs/test/skeleton_pool_val.yaml", mine)
    before = mine.read_bytes()

    def call(given=mine, **more):
        flags = dict(config=str(given), output_dir=str(tmp_path), size=5) | more
        pools.generate_skeleton_pool(config("generate-skeleton-pool", **flags))

    assert refused(call, "reads")[0] == "--output_dir"
    refused(lambda: call(fresh=True), "reads")
    given = shutil.copy(mine, tmp_path / "given.yaml")
    refused(lambda: call(given), "skeleton_pool.yaml", "--fresh")
    assert mine.read_bytes() == before and not (tmp_path / "skeletons.npz").exists()
    call(given, fresh=True)
    call(given, fresh=True)  # its own
    assert (tmp_path / "skeleton_pool.yaml.bak").read_bytes() == before and not list(tmp_path.glob("*.bak2"))
    assert not (tmp_path / "skeletons.npz.bak").exists()


@pytest.mark.parametrize("name", ["all.csv", "all.jsonl"])
def test_formulas_replace_their_own_table_and_no_other(tmp_path, name):
    path, rows = tmp_path / name, [dict(rank=1, formula="x", prefix="x", constants=[], fvu=np.inf)]
    for _ in range(2):
        formula.write_rows(str(path), rows)
    assert formula.made_here(path) and [p.name for p in tmp_path.iterdir()] == [name]
    path.write_text("x,y\n1,2\n")
    assert not formula.made_here(path)
    formula.write_rows(str(path), rows)
    assert (tmp_path / f"{name}.bak").read_text() == "x,y\n1,2\n"
    refused(lambda: files.check_replaceable(tmp_path / f"{name}.bak", False, formula.made_here), "--fresh")


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "jpg"])
def test_a_picture_is_drawn_over_only_where_it_says_that_it_was_drawn_here(tmp_path, ending, capsys):
    rows = [dict(step=i, split=split, loss=1.0, bpb=1.0) for i in (1, 2) for split in ("train", "val")]
    metrics = put(tmp_path / "a_metrics.jsonl", rows)
    out = tmp_path / f"a.{ending}"

    def call(**more):
        plot.main(plot.Config(runs=(str(metrics),), **dict(out=str(out)) | more))

    call()
    if ending == "jpg":  # which holds no such word
        refused(call, "--fresh")
    else:
        call()
    assert not list(tmp_path.glob("*.bak"))
    figures.plt.figure().savefig(out)
    before = out.read_bytes()
    assert refused(call, "--fresh")[0] == "--out" and out.read_bytes() == before
    call(fresh=True)
    assert (tmp_path / f"a.{ending}.bak").read_bytes() == before
    refused(lambda: call(out=str(metrics), fresh=True), "reads")
    if ending == "png":  # the name that a run gives its figure: a run is not ended by it
        (tmp_path / "a_loss.png").write_bytes(b"mine")
        call(out="")
        assert (tmp_path / "a_loss.png.bak").read_bytes() == b"mine" and "a_loss.png.bak" in capsys.readouterr().err


def test_a_folder_for_pages_with_the_users_files_is_refused_and_rebuilding_keeps_them(tmp_path, monkeypatch):
    cfg = config("multimodal", out=str(tmp_path / "out"), tasks=("sudoku4",), train_samples=4, test_samples=2)
    (tmp_path / "out").mkdir()
    for name in ("test.pt", "batch_00001.pt"):
        (tmp_path / "out" / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"holds batch_00001.pt, test.pt, not made here"):
        prepare_data.multimodal(cfg)
    assert tree(tmp_path) == before
    cfg.rebuild_dataset = True
    prepare_data.multimodal(cfg)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert {name: (tmp_path / "out.replaced" / name).read_text() for name in ("test.pt", "batch_00001.pt")} == {
        "test.pt": "mine", "batch_00001.pt": "mine"
    }  # fmt: skip
    shutil.rmtree(tmp_path / "out.replaced")
    prepare_data.multimodal(cfg)
    assert not (tmp_path / "out.replaced").exists()


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_files_beside_a_checkpoint_are_set_aside_if_they_differ(tmp_path):
    (tmp_path / "meta.json").write_text("of my data")
    (tmp_path / "step_notes.yaml").write_text("mine")
    (tmp_path / "step_3.yaml").write_text("of a step file that is gone")
    for _ in range(2):
        prepared.write_beside(tmp_path / "final.pt", dict(lr=1), dict(vocab_size=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.yaml", "meta.json", "meta.json.bak", "step_notes.yaml"]
    assert (tmp_path / "meta.json.bak").read_text() == "of my data"


def saved(out, *steps, interval):
    """Write checkpoint folders of these steps, as a run with -ci `interval` does."""
    for step in steps:
        state = dict(kind="sr", step=step, config=dict(checkpoint_interval=interval))
        folders.save_folder(out / f"checkpoint_{step}", (dict(state_dict={}, optimizer={}), state, dict(seed=0)))


def test_checkpoints_that_an_earlier_run_was_asked_to_keep_are_never_pruned(tmp_path):
    saved(tmp_path, 2, 4, 5, interval=2)
    saved(tmp_path, 6, 7, 9, 10, interval=0)
    (tmp_path / "checkpoint_3").mkdir()  # does not say who wrote it
    (tmp_path / "checkpoint_7" / "notes.txt").write_text("mine")
    folders.prune(tmp_path, 0)
    names = ["checkpoint_10", "checkpoint_2", "checkpoint_3", "checkpoint_4", "checkpoint_7"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    saved(tmp_path, 12, 15, 16, interval=5)
    folders.prune(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "checkpoint_15", "checkpoint_16"])


def test_saving_a_step_again_sets_a_folder_with_other_files_aside(tmp_path):
    for _ in range(2):
        saved(tmp_path, 3, interval=0)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_3"]
    (tmp_path / "checkpoint_3" / "notes.txt").write_text("mine")
    saved(tmp_path, 3, interval=0)
    assert (tmp_path / "checkpoint_3.bak" / "notes.txt").exists()
    assert not (tmp_path / "checkpoint_3" / "notes.txt").exists()


def test_the_sweep_of_a_run_removes_only_what_the_run_left_half_written(tmp_path):
    torn = ["metrics.jsonl.tmp-7", "checkpoint.tmp-rehearsal-7", "train.yaml.tmp-7", "state_dict.pt.tmp-1"]
    others = ["notes.tmp-1", "checkpoint_notes.tmp-1", "metrics.jsonl.tmp-old"]
    for name in torn + others:
        (tmp_path / name).write_text("")
    for name in ("checkpoint_4.tmp-7", "plans.tmp-2", "checkpoint_4.tmp-mine"):
        (tmp_path / name).mkdir()
    folders.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*others, "plans.tmp-2", "checkpoint_4.tmp-mine"}


def test_no_limit_removes_nothing_and_a_lower_one_what_it_says(tmp_path):
    for n in range(1, 6):
        checkpoint.save_checkpoint(tmp_path / f"step_{n}.pt", dict(model_state={}, step=n))
    for limit, remaining in ((0, 5), (7, 5), (2, 2)):
        checkpoint.rotate(checkpoint.numbered_files(tmp_path, r"step_(\d+)\.pt"), limit)
        assert len(list(tmp_path.iterdir())) == remaining


def test_a_damaged_manifest_is_no_reason_to_leave_old_pages_behind(tmp_path):
    cfg = config("multimodal", out=str(tmp_path / "out"), tasks=("sudoku4",), train_samples=4, test_samples=2)
    prepare_data.multimodal(cfg)
    (tmp_path / "out" / "manifest.json").write_text("{")
    cfg.rebuild_dataset = True
    prepare_data.multimodal(cfg)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]
    assert builder.finish_swap(tmp_path / "out") is None and os.path.exists(tmp_path / "out" / "test.pt")
