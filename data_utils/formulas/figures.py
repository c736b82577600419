"""The figure of a formula: the points that it was fitted to, what is left of them, and the formulas beside it."""

from data_utils.figures import COLOURS, RED, WIDTH, open_frame, plt, show_dollars, write_figure

LEAST = 1e-16  # 1 - R2 that is drawn for an exact fit
TITLE = 90  # characters


def draw_fit(X, y, predicted, names, title, answers=(), sigma=None):
    """Return the figure of points X (M, D), y (M,) and the values (M,) of a formula: fit, residuals, Pareto front.

    Fit and residuals are drawn over x for one column, else predictions over data. names: of the columns and of y.
    answers: the Answers of a search, of which those on the front are drawn. sigma (M,): uncertainties of y.
    """
    *columns, target = names
    single = X.shape[1] == 1
    x = X[:, 0] if single else y
    order = x.argsort()
    figure, panels = plt.subplots(1, 3 if answers else 2, figsize=(WIDTH, 4), layout="constrained")
    left, right = panels[:2]
    if single:
        left.errorbar(x, y, sigma, fmt="o", ms=4, alpha=0.7, elinewidth=1, label="data")
        left.plot(x[order], predicted[order], color=COLOURS[1], label="formula")
        left.set(xlabel=columns[0], ylabel=target)
    else:
        left.plot(x, predicted, "o", ms=4, color=COLOURS[1], label="points")
        left.axline((y.mean(), y.mean()), slope=1, color="grey", lw=1, label="equal")
        left.set(xlabel=f"{target}, data", ylabel=f"{target}, formula")
    left.set_title("fit")
    right.axhline(0, color="grey", lw=1)
    right.errorbar(x, y - predicted, sigma, fmt="o", ms=4, elinewidth=1, color=COLOURS[2])
    right.set(xlabel=left.get_xlabel(), ylabel="data minus formula", title="residuals")
    left.legend(frameon=False)
    if answers:
        front = sorted((answer for answer in answers if answer.front), key=lambda answer: answer.length)
        lengths, errors = [answer.length for answer in front], [max(answer.fvu, LEAST) for answer in front]
        panels[2].plot(lengths, errors, "o-", ms=5, label="Pareto front")
        panels[2].plot(answers[0].length, max(answers[0].fvu, LEAST), "o", ms=9, color=RED, label="first answer")
        panels[2].set(xlabel="length", ylabel="1 - R2", yscale="log", title="error and length")
        panels[2].xaxis.get_major_locator().set_params(integer=True)
        panels[2].legend(frameon=False)
    figure.suptitle(title if len(title) < TITLE else title[: TITLE - 3] + "...")
    for axes in panels:
        open_frame(axes)
    show_dollars(figure)
    return figure


def plot_fit(X, y, predicted, names, title, out, answers=(), sigma=None):
    """Write the figure of draw_fit to the file `out`."""
    write_figure(draw_fit(X, y, predicted, names, title, answers, sigma), out)
