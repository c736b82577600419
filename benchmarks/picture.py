"""The picture of results.md: figures of benchmarks as times of their targets."""

from matplotlib.ticker import NullFormatter

from data_utils.figures import COLOURS, RED, plt, write_figure

LABEL = 72  # characters of a figure's name
REACH = 10  # times


def plot_results(panels, out):
    """Write how many times better figures are than their targets, a panel per system, in two columns, to `out`.

    panels: [(title, [(figure, times, what stands beside it, whether the target is met)])]; a bar goes from 1, which is
    just the target, and ends at REACH or 1 / REACH, where an arrow says that it is beyond.
    """
    sizes = [len(bars) + 3.0 for _, bars in panels]  # lines
    half = min(range(len(panels) + 1), key=lambda n: max(sum(sizes[:n]), sum(sizes[n:])))
    columns = [part for part in (panels[:half], panels[half:]) if part]
    lines = max(sum(sizes[:half]), sum(sizes[half:]))
    figure = plt.figure(figsize=(6.5 * len(columns), 0.14 * lines + 0.9), layout="constrained")
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False).flat, columns, strict=True):
        heights = [len(bars) + 3.0 for _, bars in column]
        heights += [lines - sum(heights)] * (lines > sum(heights))
        axes = list(part.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat)
        for ax in axes:
            ax.set_visible(False)
        for ax, (title, bars) in zip(axes, column, strict=False):
            ax.set_visible(True)
            _times(ax, title, bars)
    figure.suptitle("figures as times of their target, log scale: blue meets it, red does not", fontsize=10)
    write_figure(figure, out)


def _times(ax, title, bars):
    for y, (_, times, words, met) in enumerate(bars):
        end = min(max(times, 1 / REACH), REACH)
        colour = COLOURS[0] if met else RED
        ax.plot([1, end], [y, y], color=colour, lw=5, solid_capstyle="butt")
        ax.plot(end, y, ">" if times > REACH else "<" if times < 1 / REACH else "o", color=colour, ms=4.5)
        ax.annotate(words, (max(end, 1), y), (7, 0), textcoords="offset points", va="center", fontsize=6)
    ax.axvline(1, color="0.3", lw=0.8)
    ax.set_yticks(range(len(bars)), [_shortened(name) for name, *_ in bars], fontsize=6)
    ax.set(xscale="log", xlim=(0.8 / REACH, REACH**2.2), ylim=(len(bars) - 0.4, -0.6))  # the first on top
    ax.set_xticks([1 / REACH, 1, REACH], [f"1/{REACH}", "1", f"{REACH}"], fontsize=6)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(length=2, which="both")
    ax.set_title(title, fontsize=8, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _shortened(name):
    """At most LABEL characters: the beginning without what follows a semicolon, and the end, which tells rows apart."""
    name = name.split(";")[0].replace("`", "")
    if len(name) <= LABEL:
        return name
    return f"{name[: LABEL - 30].rpartition(' ')[0].rstrip(',')} … {name[-28:].partition(' ')[2]}"
