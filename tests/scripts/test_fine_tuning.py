"""Going on with other data: --init_from, a resume on other data, and the command that a finished run prints."""

import itertools
import json
import math
import re
import shlex
import shutil

import pytest
import torch

from data_utils.checkpoint import canonical_keys, read
from tests.helpers import finish, slow, start, train_flags
from tests.scripts.test_resume import assert_same
from tests.scripts.test_train_hrm import SIZES
from tests.scripts.test_train_multimodal import TOY
from tests.scripts.test_train_sr import TINY

NAMES = "expert mla hrm sr multimodal".split()
SLOW = "mla", "sr", "multimodal"


def each(names):
    """Return rows for pytest.mark.parametrize; what is alike in all scripts is quick for two of them."""
    return [slow(name) if name in SLOW else name for name in names]


SUMS = [*SIZES, "--dataset=synthetic", "--eval_rows=40", "--log_steps=1"]
PICTURES = [*TOY, "tasks=[sudoku4]", "enable_mtp=false", "log_interval=1", "log_file="]


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids") / "data"
    finish(start("train_multimodal.py", *PICTURES, f"data_paths={folder}", "dataset_only=true"))
    return folder


@pytest.fixture(scope="module")
def run(toy, experts, grids):
    """Call run(name, out, *flags): start a tiny run of 8 steps that writes to `out`."""
    words = dict(
        expert=train_flags("transformer", toy, experts),
        mla=train_flags("mla", toy, experts),
        hrm=["train_hrm.py", *SUMS],
        sr=["train_sr.py", *TINY, "--val_problems=0", "-vi=4"],
        multimodal=["train_multimodal.py", *PICTURES, f"data_paths={grids}", "epochs=0"],
    )

    def call(name, out, *flags):
        return start(*words[name], f"--out={out}", "--steps=8", "--warmup_steps=0", "--log_interval=1", *flags)

    return call


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """{name: what --init_from is given}, of a run on data of its own."""
    folder = tmp_path_factory.mktemp("trained")
    other = dict(hrm=["--data_seed=2"], sr=["--max_operators=2"], expert=["--domains=code"], mla=["--domains=code"])
    for process in [run(name, folder / name, *other.get(name, ())) for name in NAMES]:
        finish(process)
    files = dict(expert="transformer_expert.pt", mla="nanothink_mla.pt", hrm="final.pt", multimodal="latest.pt")
    return {name: folder / name / files.get(name, "") for name in NAMES}


def last_state(name, folder):
    """The newest state in the folder of a run, its parts under their common names."""
    if name == "sr":
        newest = max(folder.glob("checkpoint_*[0-9]"), key=lambda path: int(path.name.split("_")[1]))
        parts = dict(model_state=read(newest / "state_dict.pt"), optimizer_state=read(newest / "optimizer.pt"))
        return read(newest / "training_state.pt") | parts
    states = [canonical_keys(read(path)) for path in folder.glob("*.pt")]
    return max((state for state in states if "optimizer_state" in state), key=lambda state: state["step"])


def weights_of(name, path):
    """The weights that --init_from takes: the averaged ones if there are any."""
    if name == "sr":
        return read(path / "state_dict.pt")
    state = canonical_keys(read(path))
    return state["model_state"] | (state.get("ema_state") or state.get("ema") or {})


def rates(folder):
    (path,) = folder.glob("*metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [row["lr"] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("name", each(NAMES))
def test_a_new_run_begins_with_the_weights_and_nothing_else(name, run, trained, tmp_path):
    still = run(name, tmp_path / "still", f"--init_from={trained[name]}", "--lr=0", "--max_steps=1")
    tuned = run(name, tmp_path / "tuned", f"--init_from={trained[name]}")
    new = run(name, tmp_path / "new")
    out, _ = finish(still)
    assert f"weights of {trained[name]}" in out and "a new run begins with them" in out
    state = last_state(name, tmp_path / "still")
    assert state["step"] == 1 and state.get("best_step", 1) == 1
    expected = weights_of(name, trained[name])
    moving = ("memory.", "quantizer.codebook.")  # these change without a rate
    for key, weight in state["model_state"].items():
        assert key.startswith(moving) or torch.equal(weight, expected[key]), key
    finish(tuned)
    finish(new)
    assert rates(tmp_path / "tuned") == rates(tmp_path / "new") and len(rates(tmp_path / "new")) == 8
    ends = [last_state(name, tmp_path / folder) for folder in ("tuned", "new")]
    assert ends[0]["step"] == ends[1]["step"] == 8
    pairs = zip(*(end["model_state"].values() for end in ends), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", each(NAMES))
def test_interrupted_fine_tuning_goes_on(name, run, trained, tmp_path):
    """The second start takes its own checkpoint, not --init_from, which may even be gone."""
    source = shutil.copytree if trained[name].is_dir() else shutil.copy
    source(trained[name], tmp_path / "source.pt")
    flags = [f"--init_from={tmp_path}/source.pt", "--resume=auto"]
    uninterrupted = run(name, tmp_path / "one", *flags)
    finish(run(name, tmp_path / "two", *flags, "--max_steps=3"))
    finish(uninterrupted)
    (tmp_path / "source.pt").rename(tmp_path / "gone")
    out, _ = finish(run(name, tmp_path / "two", *flags))
    assert "at step 3" in out and "--init_from is for a new run" in out and "exact resume is lost" not in out
    one, two = (last_state(name, tmp_path / folder) for folder in ("one", "two"))
    for part in ("model_state", "optimizer_state"):
        assert_same(two[part], one[part])


def test_resume_alone_begins_with_the_weights_where_there_is_nothing_to_resume(run, trained, tmp_path):
    out, _ = finish(run("expert", tmp_path, f"--init_from={trained['expert']}", "--resume", "--max_steps=1"))
    assert "a new run begins with them" in out
    out, _ = finish(run("expert", tmp_path, f"--init_from={trained['expert']}", "--resume", "--max_steps=2"))
    assert "resumed" in out and "at step 1" in out


def test_another_dropout_is_no_other_model(run, trained, tmp_path):
    flags = ["--dropout=0.3", "--max_steps=1"]
    assert "step 1 of 1" in finish(run("expert", tmp_path, f"--init_from={trained['expert']}", *flags))[0]


REFUSED = [  # (script, --init_from, more flags, words of the message, words of the advice)
    ("expert", "mla", [], "is of kind expert:mla, expected expert:transformer", "train_mla.py --init_from"),
    ("mla", "expert", [], "is of kind expert:transformer, expected expert:mla", "--expert transformer --init_from"),
    ("hrm", "multimodal", [], "is of kind multimodal, expected hrm", "train_multimodal.py --init_from"),
    ("sr", "hrm", [], "has no model.yaml", "the output folder of a run"),  # no command helps
    ("expert", "expert", ["--n_layers=3"], "has another model: n_layers 1 -> 3", "--n_layers 1"),
    ("hrm", "hrm", ["--core_layers=2"], "has another model: core_layers 1 -> 2", "--core_layers 1"),
    ("sr", "sr", ["--decoder_n_layers=2"], "another model: decoder_n_layers 1 -> 2", "--decoder_n_layers 1"),
    ("multimodal", "multimodal", ["H_cycles=3"], "has another model: H_cycles 2 -> 3", "--H_cycles 2"),
    ("multimodal", "multimodal", ["tasks=[maze]", "dataset"], "has another model: tasks", "--allow_partial"),
]


@pytest.mark.parametrize("name, source, flags, words, advice", REFUSED)
def test_weights_that_do_not_fit(name, source, flags, words, advice, run, trained, tmp_path):
    if "dataset" in flags:
        flags = [*flags[:-1], f"data_paths={tmp_path}/mazes", "build_batch=8", "incremental=true", "train_samples=8"]
    _, err = finish(run(name, tmp_path / "out", f"--init_from={trained[source]}", *flags), 2)
    lines = err.strip().splitlines()
    assert (
        words in err
        and lines[-1].startswith(("try: python", "fix: "))
        and advice in lines[-1]
        and "Traceback" not in err
    )
    assert not list((tmp_path / "out").rglob("*.pt"))


@pytest.mark.parametrize("name", each(["expert", "hrm", "multimodal"]))
def test_a_file_that_is_not_there_is_named_with_its_neighbours(name, run, trained, tmp_path):
    place = trained[name].parent
    for wrong, problem in ((place / "none.pt", "no such file"), (place, "a folder, expected a file")):
        _, err = finish(run(name, tmp_path, f"--init_from={wrong}"), 2)
        assert problem in err and trained[name].name in err


def test_the_advice_for_other_sizes_works_when_pasted(run, trained, tmp_path):
    flags = [f"--init_from={trained['expert']}", "--n_layers=3", "--max_steps=1"]
    _, err = finish(run("expert", tmp_path / "with a space", *flags), 2)
    words = shlex.split(err.strip().splitlines()[-1].removeprefix("try: "))
    assert words[0] == "python" and "--n_layers=3" not in words
    out, _ = finish(start("train_expert.py", *words[2:]))
    assert "step 1 of 1" in out and (tmp_path / "with a space" / "transformer_expert.pt").exists()


def test_another_tokenizer(run, trained, toy, tmp_path):
    finish(start("prepare_data.py", "tokenizer", f"--data_dir={toy}", "--vocab_size=300", f"--out={tmp_path}/t.json"))
    flags = [f"--init_from={trained['expert']}", f"--tokenizer=bpe:{tmp_path}/t.json"]
    _, err = finish(run("expert", tmp_path / "out", *flags), 2)
    assert "was trained with tokenizer bytes" in err and "--tokenizer bytes\n" in err


# ---- a resume on other data ------------------------------------------------------------------------------------------

OTHER = dict(  # name: (flags that change the data, files of the best model)
    expert=(["--domains=general"], "transformer_expert.pt"),
    mla=(["--domains=general"], "nanothink_mla.pt"),
    hrm=(["--data_seed=5"], ""),
    sr=(["--max_operators=2"], ""),
)


@pytest.mark.parametrize("name", each(OTHER))
def test_a_resume_on_other_data_begins_best_anew(name, run, tmp_path):
    flags, best = OTHER[name]
    finish(run(name, tmp_path, "--max_steps=4"))
    before = last_state(name, tmp_path)
    out, err = finish(run(name, tmp_path, *flags, "--resume=auto", "--max_steps=6"))
    assert "other data than before: best" in out and "begin" in out and "data_hash" in out
    state = last_state(name, tmp_path)
    assert before["best_step"] <= 4 < state["best_step"] <= 6 and math.isfinite(state["best_val_loss"])
    if best:
        assert f"{best} -> {best}.bak" in err and (tmp_path / best).exists()
    again, _ = finish(run(name, tmp_path, *flags, "--resume=auto", "--max_steps=7"))
    assert "other data" not in again


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two folders of the name qa with different rows."""
    folder = tmp_path_factory.mktemp("questions")
    for place, end in (("A", "one"), ("B", "two")):
        (folder / place).mkdir()
        rows = [json.dumps(dict(question=f"who is {i}", answer=f"{end} {i}")) for i in range(60)]
        (folder / f"{place}.jsonl").write_text("\n".join(rows) + "\n")
        finish(start("prepare_data.py", "language", f"--source={folder}/{place}.jsonl", f"--dest={folder}/{place}/qa",
                     "--vocab_size=300", "--val_ratio=0.2", "--tokenizer_num_threads=1", *(
                         [f"--tokenizer={folder}/A/qa/tokenizer.json"] * (place == "B"))))  # fmt: skip
    return folder


def test_two_data_sets_of_one_name_share_no_run(questions, tmp_path):
    small = [*SIZES, "--max_seq_len=32", "--encoder_layers=1", "--decoder_layers=1", "--steps=2"]

    def train(place, *flags, status=0):
        return finish(start("train_hrm.py", f"--dataset={questions}/{place}/qa", *small, *flags, cwd=tmp_path), status)

    train("A")
    _, err = train("B", status=2)
    assert "is of a run on other data" in err and f"{questions}/A/qa" in err and f"{questions}/B/qa" in err
    words = shlex.split(err.strip().splitlines()[-1].removeprefix("try: "))
    out, _ = finish(start("train_hrm.py", *words[2:], cwd=tmp_path))
    assert "step 2 of 2" in out and (tmp_path / "runs" / "qa2").is_dir()
    out, _ = train("B", "--resume=checkpoints/hrm/qa/final.pt", "--steps=3")
    assert "other data than before: best begins anew" in out and "step 3 of 3" in out
    # The same folder with other rows goes on, aloud.
    shutil.copytree(questions / "A", tmp_path / "C")
    flags = [f"--dataset={tmp_path}/C/qa", *small]
    finish(start("train_hrm.py", *flags, cwd=tmp_path / "C"))
    shutil.rmtree(tmp_path / "C" / "qa")
    shutil.copytree(questions / "B" / "qa", tmp_path / "C" / "qa")
    out, _ = finish(start("train_hrm.py", *flags, "--steps=4", cwd=tmp_path / "C"))
    assert "other data than before: best begins anew" in out and "step 4 of 4" in out


@pytest.mark.slow
def test_pictures_of_another_folder_share_no_run(run, grids, tmp_path):
    shutil.copytree(grids, tmp_path / "copy")
    finish(run("multimodal", tmp_path / "out", "max_steps=1"))
    out, _ = finish(run("multimodal", tmp_path / "out", "max_steps=2", f"data_paths={tmp_path}/copy"))
    assert "resumed" in out and "other data" not in out  # the same data elsewhere
    other = [f"data_paths={tmp_path}/other", "train_samples=32"]
    _, err = finish(run("multimodal", tmp_path / "out", "max_steps=3", *other), 2)
    assert "is of a run on other data" in err and err.strip().splitlines()[-1].startswith("try: python")
    out, _ = finish(run("multimodal", tmp_path / "out", "max_steps=3", *other, f"resume={tmp_path}/out/latest.pt"))
    assert "other data than before: best begins anew" in out and "step 3 of 3" in out
    assert (tmp_path / "out" / "best_model.pt.bak").exists()


# ---- finished --------------------------------------------------------------------------------------------------------


# both limits in each script, one of them alone in every second
BUDGETS = [(name, "steps max_steps") for name in NAMES]
BUDGETS += zip(NAMES, itertools.cycle(["max_steps", "steps"]), strict=False)


@pytest.mark.parametrize("name, budget", [slow(*row) if row[0] in SLOW else row for row in BUDGETS])
def test_a_finished_run_names_the_flag_and_a_command_that_goes_on(name, budget, run, tmp_path):
    budget = [f"--{flag}" for flag in budget.split()]
    flags = [f"{flag}=2" for flag in budget] + ["--resume=auto"]
    finish(run(name, tmp_path, *flags))
    before = last_state(name, tmp_path)
    out, _ = finish(run(name, tmp_path, *flags))
    assert "finished at step 2" in out
    assert_same(last_state(name, tmp_path), before)
    (further,) = re.findall(rf"a larger {' and '.join(budget)} goes on\nnext: (.*)", out)
    words = shlex.split(further)
    assert words[0] == "python" and not {*flags[:-1]} & {*words}
    out, _ = finish(start(words[1].rpartition("/")[2], *words[2:]))
    assert "step 4 of 4" in out


def test_patience_and_epochs_are_named_too(toy, experts, tmp_path):
    flags = [*train_flags("transformer", toy, experts), "--batch_size=256", "--lr=0", "--warmup_steps=0"]
    flags += ["--resume=auto", f"--out={tmp_path}"]
    finish(start(*flags, "--patience=1", "--max_epochs=9"))
    assert "a larger --patience goes on\nnext: python" in finish(start(*flags, "--patience=1", "--max_epochs=9"))[0]
    assert "a larger --max_epochs goes on\nnext: python" in finish(start(*flags, "--patience=1", "--max_epochs=2"))[0]


BATCHES = dict(  # name: (flag of the batch, a small one, a larger one, flag of the epochs)
    expert=("--batch_size", 32, 96, "--max_epochs=4"),
    hrm=("--batch_size", 1024, 4096, "--epochs=2"),
    multimodal=("global_batch_size", 8, 32, "epochs=4"),
)


@pytest.mark.parametrize("name", ["expert", slow("hrm"), slow("multimodal")])
def test_a_larger_batch_does_not_end_a_run(name, run, tmp_path):
    flag, small, large, epochs = BATCHES[name]

    def train(size, budget):
        words = ["--steps=0", epochs, f"{flag}={size}", f"--max_steps={budget}", "--resume=auto"]
        out, _ = finish(run(name, tmp_path, *words))
        assert f"step {budget} of {budget}" in out
        return last_state(name, tmp_path)["steps"]

    steps = train(small, 1)
    done = steps // 2  # half of the epochs
    assert train(small, done) == steps
    longer = train(large, done + 1)
    assert done + 1 < longer < steps  # the others have fewer steps
    assert train(large, done + 2) == longer  # and their number stays


@pytest.mark.parametrize("name", each(["expert", "mla"]))
def test_a_larger_batch_ends_an_epoch_that_was_cut(name, run, tmp_path):
    """It has done more steps than it has now, and its evaluation is over."""
    stem = dict(expert="transformer_expert", mla="nanothink_mla")[name]
    for size, budget in ((8, 30), (256, 34), (256, 38)):
        words = ["--steps=900", "--grad_accum_steps=1", f"--batch_size={size}", f"--max_steps={budget}"]
        finish(run(name, tmp_path, *words, "--resume=auto"))
    rows = [json.loads(line) for line in (tmp_path / f"{stem}_metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("split") == "train"]
    assert [row["step"] for row in steps] == list(range(1, 39)) and all(row["loss"] and row["tokens"] for row in steps)
    assert steps[29]["epoch"] == 1 < steps[30]["epoch"]


# ---- evaluations -----------------------------------------------------------------------------------------------------


def test_an_evaluation_within_an_epoch_counts_for_the_best(run, tmp_path):
    out, _ = finish(run("expert", tmp_path, "--steps=500", "--max_steps=5", "--eval_interval=2"))
    assert "best val_loss inf" not in out
    lines = (tmp_path / "transformer_expert_metrics.jsonl").read_text().splitlines()[1:]
    losses = {row["step"]: row["loss"] for row in map(json.loads, lines) if row["split"] == "val"}
    assert list(losses) == [2, 4, 5]
    best = read(tmp_path / "transformer_expert.pt")
    assert (best["best_step"], best["best_val_loss"]) == min(losses.items(), key=lambda pair: pair[1])
    assert best["epoch"] == 0 and best["patience_used"] == 0


@pytest.mark.parametrize("name", each(["expert", "mla"]))
def test_every_domain_has_an_evaluated_window_and_a_line(name, run, toy, tmp_path):
    out, _ = finish(run(name, tmp_path, "--max_steps=2", "--eval_windows=2"))
    (path,) = tmp_path.glob("*metrics.jsonl")
    row = [json.loads(line) for line in path.read_text().splitlines()[1:]][-1]
    folders = {path.name for path in toy.iterdir() if path.is_dir() and path.name[0] != "."}
    assert row["split"] == "val" and set(row["domains"]) == folders
    shown = re.findall(r"^  (\w+) +(?:loss )?[\d.]+ ", out, re.M)
    assert set(shown) == {*row["domains"], "all"} and " 0.0000" not in out


def test_a_domain_that_is_added_has_a_line_of_its_own(run, toy, tmp_path):
    finish(run("expert", tmp_path, "--domains=general", "--max_steps=2"))
    out, _ = finish(run("expert", tmp_path, "--domains", "general", "code", "--max_steps=4", "--resume"))
    assert "no loss curve" not in out and "other data than before: best and patience begin anew" in out
    picture = tmp_path / "transformer_expert_loss.png"
    picture.unlink()
    finish(start("plot.py", tmp_path / "transformer_expert_metrics.jsonl"))
    assert picture.exists()
