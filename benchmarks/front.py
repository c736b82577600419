"""Draw the picture at the top of README.md: a Sudoku solved over segments, a formula, and the loss of the demo.

    python -m benchmarks.front

Writes benchmarks/results/front.png. Reads the pretrained model sudoku9, benchmarks/pendulum.csv and the metrics of
scripts/demo.sh.
"""

from dataclasses import dataclass
from pathlib import Path

from data_utils.config import from_cli
from data_utils.errors import DataError
from data_utils.launch import launch


@dataclass
class Config:
    model: str = "sudoku9"  # a solver of 9 x 9 Sudokus
    metrics: str = "checkpoints/demo/transformer_expert_metrics.jsonl"  # of scripts/demo.sh
    out: str = "benchmarks/results/front.png"  # PNG to write


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

import pandas
import torch

from benchmarks.quality.pretrained import PUZZLE
from data_utils.figures import COLOURS, RED, WIDTH, open_frame, plt, write_figure
from data_utils.formulas import SymbolicRegressor
from data_utils.metrics import read_rows
from data_utils.reasoning import load
from data_utils.reasoning.sudoku import parse_puzzle

PENDULUM = Path(__file__).parent / "pendulum.csv"


def draw_board(ax, puzzle, answer, title):
    """Draw a 9 x 9 board: givens black, answers blue, those that break a rule red."""
    for line in range(10):
        style = dict(color="0.2", lw=1.8 if line % 3 == 0 else 0.5)
        ax.plot([line, line], [0, 9], **style)
        ax.plot([0, 9], [line, line], **style)
    for cell in range(81):
        row, column = divmod(cell, 9)
        digit = answer[cell]
        if not digit:
            continue
        colour = "0.1" if puzzle[cell] else RED if breaks_rule(answer, cell) else COLOURS[0]
        place = dict(ha="center", va="center", fontsize=13)
        ax.text(column + 0.5, 8.46 - row, str(digit), color=colour, **place)
    ax.set(xlim=(-0.1, 9.1), ylim=(-0.1, 9.1), aspect="equal", title=title)
    ax.axis("off")


def breaks_rule(answer, cell):
    """Return whether another cell of the same row, column or box has the digit of `cell`."""
    row, column = divmod(cell, 9)
    for other in range(81):
        r, c = divmod(other, 9)
        related = r == row or c == column or (r // 3, c // 3) == (row // 3, column // 3)
        if related and other != cell and answer[other] == answer[cell]:
            return True
    return False


@torch.no_grad()
def boards(path):
    """Return [(title, cells)] of a puzzle: as it is given, after one segment of reasoning and after all."""
    model, _ = load(path)
    puzzle = parse_puzzle(PUZZLE)
    ids = torch.as_tensor(puzzle).long()[None]
    panels = [("given", puzzle.tolist())]
    for segments in range(1, 17):
        answer = model.network.solve(ids, segments)[0][0].tolist()
        if answer != panels[-1][1]:
            panels.append((f"after segment {segments}", answer))
    return [panels[0], panels[1], panels[-1]]


def draw_formula(ax):
    """Draw the pendulum's table and the formula that the search gives for it."""
    table = pandas.read_csv(PENDULUM)
    X, y = table[["length_m"]], table["period_s"]
    model = SymbolicRegressor(max_seconds=0).fit(X, y)
    ax.plot(X, y, "o", ms=5, alpha=0.7, label=f"{len(y)} measurements")
    ax.plot(X, model.predict(X), color=COLOURS[1], label=f"{model.target_} = {model.formula_}")
    ax.set(xlabel="length of a pendulum (m)", ylabel="period (s)", title="a formula for a table")
    ax.legend(frameon=False)


def draw_loss(ax, metrics):
    """Draw bits per byte by domain over the steps of the demo. Raises DataError without its metrics."""
    rows = [row for row in read_rows(metrics) if row.get("split") == "val"]
    if not rows:
        raise DataError(f"{metrics}: no metrics of the demo\ntry: bash scripts/demo.sh")
    for domain in rows[-1]["domains"]:
        points = [row["domains"][domain]["bpb"] for row in rows]
        ax.plot([row["step"] for row in rows], points, "o-", ms=4, label=f"{domain} {points[-1]:.2f}")
    ax.set(xlabel="step", ylabel="bits per byte, held out", title="a language model on five domains")
    ax.legend(frameon=False)


def main(cfg):
    """Write the picture."""
    figure = plt.figure(figsize=(WIDTH, 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.08, 1])
    panels = boards(cfg.model)
    for ax, (title, cells) in zip(above.subplots(1, 3), panels, strict=True):
        draw_board(ax, panels[0][1], cells, title)
    left, right = below.subplots(1, 2)
    draw_formula(left)
    draw_loss(right, cfg.metrics)
    for ax in (left, right):
        open_frame(ax)
    write_figure(figure, cfg.out)
    print(cfg.out)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
