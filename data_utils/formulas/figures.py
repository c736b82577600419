"""The figure of a formula: the points that it was fitted to, and what is left."""

from data_utils.figures import COLOURS, open_frame, plt, write_figure


def plot_fit(X, y, predicted, names, target, title, out):
    """Write points X (M, D), y (M,) and what a formula gives for them to `out`: fit and residuals.

    Over x for one variable; for more, predictions over data.
    """
    one = X.shape[1] == 1
    x = X[:, 0] if one else y
    order = x.argsort()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    if one:
        left.plot(x, y, "o", ms=4, alpha=0.7, label="data")
    style, label = ("-", "formula") if one else ("o", "points")
    left.plot(x[order], predicted[order], style, ms=4, color=COLOURS[1], label=label)
    if not one:
        left.axline((y.mean(), y.mean()), slope=1, color="grey", lw=1, label="equal")
    left.set(xlabel=names[0] if one else f"{target}, data", ylabel=target if one else f"{target}, formula")
    right.axhline(0, color="grey", lw=1)
    right.plot(x, y - predicted, "o", ms=4, color=COLOURS[2])
    right.set(xlabel=left.get_xlabel(), ylabel="data minus formula", title="residuals")
    left.legend(frameon=False)
    left.set_title(title if len(title) < 70 else title[:67] + "...", fontsize=10)
    for axes in (left, right):
        open_frame(axes)
    write_figure(figure, out)
