"""Answers of a trained reasoner: `generate.py --run_name RUN`, and `load` for Python.

B batch, S prompt, T answer, V vocabulary.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data_utils.checkpoint import by_name, load_checkpoint, numbered_files
from data_utils.config import at_least, check_unicode
from data_utils.documents import read_text
from data_utils.errors import CheckpointError, UsageError
from data_utils.files import check_replaceable, warn
from data_utils.hardware import open_device
from data_utils.reasoning import maze, sudoku
from data_utils.reasoning.dataset import open_tokenizer
from data_utils.reasoning.folder import PUZZLES
from data_utils.reasoning.puzzle_layouts import Problems
from data_utils.reasoning.puzzle_rows import form_of, is_answers, read_questions, result_of, write_answers
from data_utils.tokenizer import SimpleTokenizer, restore_tokenizer
from models.hrm import HRM
from models.planning import pick, select
from models.sampling import choose
from models.token_grid import TokenGrid

NETWORKS = dict(hrm=HRM, token_grid=TokenGrid)  # by the kind of a checkpoint: trained here, or published

PUZZLES_AT_ONCE = 32
VIEWS = 8  # that a wrong answer suggests


def answer(cfg):
    """Answer each prompt: answers go to stdout, segments and speed to stderr. cfg: AnswerConfig of generate.py."""
    at_least(cfg, 0, "temperature", "top_k", "top_p", "seed", "segments")
    at_least(cfg, 1, "views")
    check_unicode(cfg, "prompt")
    path = best_of_run(Path("runs", cfg.run_name)) if cfg.run_name else cfg.checkpoint
    check_replaceable(cfg.out, cfg.fresh, is_answers, inputs=[cfg.input])
    model, _ = load(path, cfg.device, cfg.dataset)
    if model.form:
        return answer_puzzles(cfg, model)
    if cfg.out:
        raise UsageError(f"--out {cfg.out}: only answers to puzzles become a table\nfix: > FILE in its place")
    prompts = [prompt.removeprefix("\ufeff") for prompt in cfg.prompt]  # a byte order mark is no character
    prompts += _read_lines(cfg.input) if cfg.input else []
    if not prompts:
        raise UsageError('no question: --prompt or --input FILE\ntry: --prompt "What is 12 + 7?"')
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "segments", "halting")
    options = {name: getattr(cfg, name) for name in names}
    generator = torch.Generator(model.network.head.weight.device).manual_seed(cfg.seed)
    for prompt in prompts:
        start = time.monotonic()
        text, count, segments = model.reason(prompt, generator=generator, **options)
        print(text, flush=True)
        rate = count / (time.monotonic() - start)
        print(f"{segments} segments, {count} tokens, {rate:.0f} tokens/s", file=sys.stderr)
    return {}


def answer_puzzles(cfg, model):
    """Answer puzzles: answers go to stdout, verdicts to stderr, both to --out. cfg: AnswerConfig of generate.py.

    The status is 1 if an answer breaks the rules or a row of --input is no puzzle.
    """
    form = model.form
    if cfg.views > 1 and form.kind != "sudoku":
        raise UsageError(f"--views {cfg.views}: only Sudokus are read in several symmetric versions\nfix: leave it out")
    problems = Problems()
    questions = [("--prompt", form.parse(prompt.removeprefix("\ufeff"))) for prompt in cfg.prompt]
    if cfg.input:
        text = read_text("-") if cfg.input == "-" else None
        questions += [(place, cells) for place, _, cells in read_questions(cfg.input, form, problems, text)[1]]
    if not questions and not problems.count:
        advice = f"try: --prompt {'.' * form.cells}" if form.kind == "sudoku" else "fix: --input FILE"
        raise UsageError(f"no puzzle: --prompt or --input FILE\n{advice}")
    rows, wrong = [], []
    solvable = False  # whether one of the wrong ones has a solution
    for start in range(0, len(questions), PUZZLES_AT_ONCE):
        batch = questions[start : start + PUZZLES_AT_ONCE]
        began = time.monotonic()
        puzzles = np.stack([cells for _, cells in batch])
        answers, segments = model.fill(puzzles, cfg.segments, cfg.halting, cfg.views)
        rate = answers.size / (time.monotonic() - began)
        for (place, cells), filled, used in zip(batch, answers, segments, strict=True):
            right, words = form.verdict(cells, filled)
            if rows:
                print()  # mazes over several lines are read again only with a line between two
            print(form.show(filled), flush=True)
            print(f"{words}; {used} segments, {form.cells} tokens, {rate:.0f} tokens/s", file=sys.stderr)
            rows.append((form.line(cells), form.line(filled), words))
            if not right:
                wrong.append(place)
                solvable |= "the puzzle has" not in words  # no solution, or several
    if cfg.out:
        write_answers(cfg.out, rows)
    if solvable and form.kind == "sudoku" and cfg.views < VIEWS:
        warn(f"a vote of several symmetric versions solves more\ntry: --views {VIEWS}")
    return result_of(wrong, len(rows), problems, cfg.input)


class Reasoner(nn.Module):
    """A trained reasoner with its tokenizer, which is None for puzzles: model.answer(prompt) -> text."""

    def __init__(self, network, tokenizer, encode, state):
        """encode: prompt -> ids. state: the checkpoint."""
        super().__init__()
        self.form = form_of_model(network, state)  # of its puzzles; None for text
        self.network = network
        self.tokenizer = tokenizer
        self.encode = encode
        config = state["config"]
        self.segments = config["eval_segments"] or config["segments"] * (4 if network.halting else 1)
        self.threshold = state["halt_threshold"]  # halting logit that ends the reasoning earlier
        self.tokens = tokens_of_cells(self.form, state.get("signs", "")) if self.form else None
        self.header = {name: state[name] for name in ("kind", "model_args", "tokenizer", "tokenizer_hash")}
        self.header["tokenizer_json"] = tokenizer.json_text if tokenizer else ""
        self.fixed_length = network.cells
        self.axes = dict(ids="cells")  # inputs of `forward`, and the name of their second dimension
        if not network.cells:
            self.axes = dict(ids="prompt", mask="prompt", decoder_input_ids="answer")

    def forward(self, ids, mask=None, decoder_input_ids=None):
        """Prompts ids (B, S) and an answer so far (B, T) -> logits of its next tokens (B, T, V).

        mask (B, S): 0 = padding; None = none. Puzzles (B, S) have neither mask nor decoder: logits of the cells
        (B, S, V). All segments of reasoning are used.
        """
        network = self.network
        x, bias, z_H, _ = network.think(ids, mask, self.segments, math.inf)
        return network.head(network.answer(x, z_H, bias, decoder_input_ids))

    def example(self, batch, length):
        """Return random inputs of `forward`; puzzles have one length."""
        network = self.network
        sizes = (batch, network.max_seq_len if network.cells else length)
        ids = torch.randint(network.embedding.num_embeddings, sizes)
        return (ids,) if network.cells else (ids, torch.ones_like(ids), ids)

    def answer(self, prompt, **options):
        """Return the answer to one question, or the filled puzzle; options as in `reason`."""
        return self.reason(prompt, **options)[0]

    def reason(self, prompt, *, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, segments=0, halting=True,
               generator=None):  # fmt: skip
        """Return (answer, tokens written, segments used). Arguments as in generate.AnswerConfig.

        Raises UsageError for a prompt that the model can't read.
        """
        network = self.network
        ids = torch.tensor([self.encode(prompt)], device=network.head.weight.device)  # (1, S)
        S = ids.shape[1]
        if S > network.max_seq_len:
            raise UsageError(f"a prompt of {S} tokens, the model was built for {network.max_seq_len}")
        if network.cells:
            (filled,), (used,) = self.fill(ids.cpu().numpy(), segments, halting)
            return self.form.show(filled), S, used
        thinking = dict(segments=segments or self.segments, threshold=self.threshold if halting else math.inf)

        def choose_token(logits):
            return choose(logits, temperature, top_k, top_p, generator)

        limits = dict(bos_id=self.tokenizer.bos_id, eos_id=self.tokenizer.eos_id, max_new_tokens=max_new_tokens)
        (tokens,), used = network.generate(ids, None, **limits, **thinking, choose=choose_token)
        return self.tokenizer.decode(tokens), len(tokens) + 1, used.item()

    def fill(self, puzzles, segments=0, halting=True, views=1):
        """Return (answers (n, N) uint8, segments used [n]) of puzzles (n, N). Arguments as in generate.AnswerConfig."""
        network, n = self.network, len(puzzles)
        device = network.head.weight.device
        cells = np.zeros(network.embedding.num_embeddings, np.uint8)  # of each token; padding becomes a blank
        cells[self.tokens] = np.arange(len(self.tokens))
        answers, halts, used = [], [], 0
        for view in range(views):
            shown, symmetry = puzzles, None
            if view:
                symmetry = sudoku.symmetries(n, self.form.rows, np.random.default_rng(view))
                shown = np.take_along_axis(symmetry[1], np.take_along_axis(puzzles, symmetry[0], 1), 1)
            ids = torch.from_numpy(self.tokens[shown]).to(device)
            thinking = segments or self.segments, self.threshold if halting else math.inf
            x, bias, z_H, spent = network.think(ids, None, *thinking)
            answer = cells[network.guess(network.answer(x, z_H, bias, None)).cpu().numpy()]
            answers.append(torch.from_numpy(sudoku.undo(answer, *symmetry) if view else answer))
            halts.append(network.confidence(z_H) if network.halting else torch.zeros(n, device=device))
            used = used + spent
        answers, halts = torch.stack(answers, 1), torch.stack(halts, 1).cpu()
        return pick(answers, select(answers[None], halts[None], "vote")[0]).numpy(), used.tolist()


def form_of_model(network, state):
    """Return the Form of the puzzles that a model fills in, None for a model of text."""
    if not network.cells:
        return None
    side = math.isqrt(network.max_seq_len)
    meta = state.get("meta", {})
    if state["kind"] == "token_grid":
        if not state["signs"] or side * side != network.max_seq_len:
            return None
        meta = dict(kind="sudoku" if "." in state["signs"] else "maze", size=side)
    return form_of(meta if meta.get("kind") in PUZZLES else dict(kind="sudoku", size=side))


def tokens_of_cells(form, signs):
    """Return the token of each cell of a Form (cells,) int64. signs: of the tokens of a published model, or "".

    Models that are trained here have the cells themselves as tokens.
    """
    if not signs:
        return np.arange(form.ids)
    return np.array([signs.index(sign) for sign in (".123456789" if form.kind == "sudoku" else maze.SIGNS)])


def _no_text(prompt):
    raise UsageError(
        "this model reads tokens, not text\n"
        "fix: in Python, data_utils.reasoning.load(FILE)[0].network.solve(ids, 16, puzzle=numbers)"
    )


def _read_lines(path):
    try:
        return [line for line in read_text(path).split("\n") if line.strip()]
    except OSError as e:
        raise UsageError(f"--input {path}: {e.strerror}") from e


def load(path, device="cpu", dataset="auto"):
    """Load a checkpoint of train_hrm.py -> (Reasoner with averaged weights, its tokenizer or None).

    path: a file, also of `prepare_data.py weights`, the folder of a run, or the name of a pretrained model. dataset:
    that of the training, or "auto". Raises UsageError, listing the checkpoints, or CheckpointError.
    """
    path = Path(by_name(path))
    device = open_device(device)
    if path.is_dir():
        path = best_of_run(path)
    network, state, encode, tokenizer = load_reasoner(path, dataset)
    return Reasoner(network.to(device), tokenizer, encode, state), tokenizer


def load_reasoner(path, dataset="auto"):
    """Return (frozen averaged model in eval mode, its checkpoint, prompt -> ids, tokenizer; None for puzzles).

    dataset: that of the training, or "auto". Raises UsageError, listing the checkpoints, or CheckpointError.
    """
    if not Path(path).exists():
        existing = ", ".join(str(file) for file in sorted(Path(path).parent.glob("*.pt"))) or "none"
        raise UsageError(f"--checkpoint {path}: no such file; checkpoints there: {existing}")
    state = load_checkpoint(path, [*NETWORKS])
    if dataset not in ("auto", state["dataset"]):
        raise UsageError(f"--dataset {dataset}: {path} was trained on {state['dataset']}")
    model = NETWORKS[state["kind"]](**state["model_args"])
    try:
        model.load_state_dict(state["model_state"])
        model.load_state_dict(state["ema"], strict=False)
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not fit its own model_args: {str(e).splitlines()[0]}") from e
    if model.cells:
        form = form_of_model(model, state)
        return model.frozen(), state, (lambda prompt: form.parse(prompt).tolist()) if form else _no_text, None
    if state.get("tokenizer_json"):
        tokenizer = restore_tokenizer(state, path)
    else:  # a checkpoint of before
        tokenizer = open_tokenizer(Path(path).parent, state["meta"] | dict(tokenizer_file="tokenizer.json"))
    encode = tokenizer.encode
    if isinstance(tokenizer, SimpleTokenizer):
        encode = partial(tokenizer.encode, add_specials=False)
    return model.frozen(), state, lambda prompt: [tokenizer.bos_id, *encode(prompt), tokenizer.eos_id], tokenizer


def best_of_run(folder):
    """Return the best checkpoint in the folder of a run. Raises UsageError, listing the neighbours, if it has none."""
    folder = Path(folder)
    places = [folder / "best-model" / "best.pt", folder / "checkpoints" / "final.pt", folder / "final.pt"]
    for place in (folder / "checkpoints", folder):
        places += numbered_files(place, r"step_(\d+)\.pt")
    places.append(folder / "best.pt")
    for path in places:
        if path.exists():
            return path
    existing = ", ".join(sorted(path.name for path in folder.parent.glob("*"))) or "none"
    raise UsageError(f"no checkpoint in {folder}; runs there are: {existing}")
