"""Figures of train_ae.py's runs and sweeps: which are drawn, of what, and where."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import plot
import train_ae
from data_utils.errors import DataError, UsageError
from data_utils.events import facts, figures
from data_utils.events.decay_chain import decay_chain
from data_utils.events.roc import compare
from data_utils.figures import show_dollars
from tests.helpers import letters

pytestmark = [
    pytest.mark.filterwarnings("error"),  # a limit below 0 on a logarithmic axis, a layout that collapses
    pytest.mark.usefixtures("full_pictures"),
]


@pytest.fixture(autouse=True)
def closed():
    """Close the figures that a test caught, since matplotlib warns of more than 20 open ones."""
    yield
    figures.plt.close("all")


EVERY = dict(  # the metrics of each loop in three epochs; a metric that starts late has None first
    ae="rec_tokens rec_types type_accuracy rec_globals commit perplexity usage revived lr grad_norm skipped_steps",
    gan_ae="d_loss g_loss d_acc_real d_acc_fake adv_w",
    diffusion_ae="eps_loss eps_q0 eps_q1 eps_q2 eps_q3 ddim_mse ddim_mse_shuffled rec_types",
    test_mlp="miss lr",
)


def histories(loop):
    names = (EVERY["ae"].split() if loop == "gan_ae" else []) + EVERY[loop].split()
    fields = "train_loss", "val_loss", "epoch_time_s", "throughput"
    return {name: [0.01, None, 3.0] if name == "commit" else [20.0, 2.0, 0.5] for name in (*fields, *names)}


def drawn(tmp_path, monkeypatch, loop, full=False, moment="on_test_end", really=False, **payload):
    """{family: figure} of one moment; drawing them `really` is slow."""
    cfg = SimpleNamespace(plot_every=1, plot_moments=[moment], plot_detail="full" if full else "light")
    vars(cfg).update({f"plot_{family}": True for family in figures.FIGURES})
    drawings, old = {}, figures.write_figure

    def write(figure, out):
        drawings[out.name.split("-")[0]] = figure
        if really:
            old(figure, out)
        out.parent.mkdir(exist_ok=True)
        out.touch()

    monkeypatch.setattr(figures, "write_figure", write)
    common = dict(run_dir=str(tmp_path), epoch=2, last=True, histories=histories(loop), codes=[5, 0, 3])
    figures.handle_event(cfg, train_ae.LOOPS[loop][1], moment, common | payload)
    files = {path.name for path in (tmp_path / "figures").glob("*")}
    assert files == {f"{family}-{moment}-e002.png" for family in drawings}
    return drawings


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


# ---- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("loop", EVERY)
def test_every_family_that_a_loop_knows_of_is_drawn(tmp_path, monkeypatch, capsys, loop, full):
    rows = decay_chain(50, 0)[0]
    codes = [5, 0, 3] if "gan" in loop or loop == "ae" else [0, 0, 0]
    drawings = drawn(
        tmp_path, monkeypatch, loop, full, rows=(rows, rows), codes=codes, really=not full and loop == "gan_ae"
    )
    expected = {"losses", "metrics", "latency"}
    expected |= {"recon"} if loop != "test_mlp" else set()
    expected |= {"codebook"} if any(codes) else set()
    expected |= {"adversarial"} if loop == "gan_ae" else {"diffusion"} if loop == "diffusion_ae" else set()
    assert set(drawings) == expected and "warning" not in capsys.readouterr().err
    assert len(panels(drawings["latency"])) == 1 + full
    if "recon" in drawings:
        assert len(panels(drawings["recon"])) == (6 if full else 2 if loop == "diffusion_ae" else 3)
    for figure in drawings.values():
        assert letters(figure) >= 11
        for axes in panels(figure):
            assert axes.get_xlabel() and axes.get_ylabel() and axes.has_data()


def test_without_a_test_s_rows_recon_is_of_epochs(tmp_path, monkeypatch):
    assert len(panels(drawn(tmp_path, monkeypatch, "ae", True, "on_epoch_end")["recon"])) == 3


def test_a_critic_of_latents_is_drawn_alone(tmp_path, monkeypatch):
    values = histories("ae") | dict(latent_d_loss=[1.3, 1.2, 1.0])
    (axes,) = panels(drawn(tmp_path, monkeypatch, "ae", histories=values)["adversarial"])
    assert "critic" in axes.get_title()


def test_axes(tmp_path, monkeypatch):
    drawings = drawn(tmp_path, monkeypatch, "gan_ae")
    (loss,), (seconds,) = panels(drawings["losses"]), panels(drawings["latency"])
    assert loss.get_yscale() == "log" and seconds.get_yscale() == "linear" and seconds.get_ylim()[0] == 0
    usage = next(axes for axes in panels(drawings["codebook"]) if axes.get_title() == "usage")
    assert usage.get_yscale() == "linear" and usage.get_ylim() == (0, 1.05)
    low, high = loss.get_ylim()
    ticks = [label.get_text() for label in loss.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert ticks == ["0.5", "1", "2", "5", "10", "20"]  # plain numbers, and more than one
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]
    assert [list(line.get_xdata()) for line in panels(drawings["codebook"])[2].lines] == [[1, 3]]  # None is left out


def test_histograms_are_densities_of_all_events(tmp_path, monkeypatch):
    before = decay_chain(300, 0)[0]
    after = before.copy()
    after[:, 18] = 40.1  # a spike
    drawings = drawn(tmp_path, monkeypatch, "ae", True, rows=(before, after))
    by_name = {axes.get_xlabel().split(" [")[0]: axes for axes in panels(drawings["recon"])}
    shown, rebuilt = (patch.get_data() for patch in by_name["MET"].patches)
    inside = (before[:, 18] <= 200).mean()
    assert math.isclose((shown.values * np.diff(shown.edges)).sum(), inside)
    assert math.isclose((rebuilt.values * np.diff(rebuilt.edges)).sum(), 1) and rebuilt.values.max() == 1 / 4
    assert by_name["MET"].get_ylim()[1] < 4 * shown.values.max()
    same = [patch.get_data().values for patch in by_name["pT of an object"].patches]
    assert np.array_equal(*same)


def test_a_figure_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    drawings = drawn(tmp_path, monkeypatch, "ae", True, rows=(np.zeros((1, 3)), None))
    assert "recon" not in drawings and "losses" in drawings and "warning: no figure of recon" in capsys.readouterr().err


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(folder, offset=0.0, epochs=3, test=True, **flags):
    """A folder of facts and flags."""
    for epoch in range(epochs):
        losses = dict(train_loss=1 / (epoch + 1) + offset, val_loss=1.5 / (epoch + 1) + offset)
        event = facts.build_event_payload(moment="on_epoch_end", run_dir=folder, epoch=epoch, **losses,
                                          metrics=dict(rec_tokens=0.1 * (epoch + 1)))  # fmt: skip
        facts.append_jsonl_event(folder, event)
    if test:
        metrics = dict(type_accuracy=0.9, test_loss=0.25 + offset, rec_tokens=0.3)
        facts.append_jsonl_event(
            folder, facts.build_event_payload(moment="on_test_end", run_dir=folder, metrics=metrics)
        )
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(dict(plot_every=1, seed=1) | flags))
    return str(folder)


def test_runs_are_overlaid(tmp_path, monkeypatch, capsys):
    runs = [run(tmp_path / f"run_{i}", 0.1 * i, latent_space=s, hidden=[8], plot_every=i) for i, s in enumerate("ab")]
    drawings = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, out: drawings.append((figure, out)))
    plot.main(plot.Config(runs=tuple(runs)))
    ((figure, out),) = drawings
    left, right = figure.axes
    assert out == str(tmp_path / "run_0" / "figures" / "runs.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["latent_space=a", "latent_space=b"]
    assert len(left.lines) == 4 and np.allclose(left.lines[3].get_ydata(), [1.6, 0.85, 0.6])
    assert np.allclose(right.lines[0].get_ydata(), [0.1, 0.2, 0.3])
    lines = capsys.readouterr().out.splitlines()
    assert "latent_space=b: best_val_loss 0.6  best_epoch 3  test_loss 0.35" in lines[1] and lines[2] == out


def test_many_runs_that_do_not_differ(tmp_path, monkeypatch):
    runs = [run(tmp_path / f"run_{i:02}") for i in range(13)]
    drawings = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, out: drawings.append(figure))
    plot.main(plot.Config(runs=tuple(runs), out=str(tmp_path / "a.png")))
    (figure,) = drawings
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [f"run_{i:02}" for i in range(13)]
    assert len({tuple(line.get_color()) for line in figure.axes[1].lines}) == 13


def test_runs_that_can_not_be_overlaid(tmp_path):
    good, young = run(tmp_path / "good"), run(tmp_path / "young", epochs=0, test=False)
    (tmp_path / "a_metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="nowhere: no such"):
        plot.main(plot.Config(runs=("nowhere",)))
    with pytest.raises(DataError, match="young: no complete epoch"):
        plot.main(plot.Config(runs=(good, young)))
    with pytest.raises(UsageError, match="runs and files in one figure"):
        plot.main(plot.Config(runs=(good, str(tmp_path / "a_metrics.jsonl"))))


def test_a_folder_stands_for_its_metrics(tmp_path):
    names = [str(tmp_path / f"{name}_metrics.jsonl") for name in "ab"]
    for name in names:
        open(name, "w").close()
    assert plot.metrics_of(str(tmp_path)) == names and plot.metrics_of(names[0]) == names[:1]
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot.metrics_of(str(tmp_path)) == [str(tmp_path / "metrics.jsonl")]


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    runs = [run(tmp_path / f"run_{i}", name=f"cost_${i} of $x^{{") for i in range(2)]
    plot.main(plot.Config(runs=tuple(runs), out=str(tmp_path / "a.png")))
    assert (tmp_path / "a.png").stat().st_size > 1000
    figure, ax = figures.plt.subplots()
    ax.bar(["a_$", "$b{", "c"], [1, 100, 10000])
    ax.set(yscale="log", ylabel="cost_$ or $", title="$\\alpha$")
    show_dollars(figure)
    figure.canvas.draw()
    assert not any(text.get_parse_math() for text in (ax.title, ax.yaxis.label, *ax.get_xticklabels()))
    powers = [tick.label1 for tick in ax.yaxis.get_major_ticks()]
    assert all(text.get_parse_math() for text in powers) and "10^{4}" in "".join(text.get_text() for text in powers)


# ---- scores and latents ----------------------------------------------------------------------------------------------


def test_curves_and_latents_are_drawn(tmp_path, monkeypatch):
    drawings = {}
    monkeypatch.setattr(figures, "write_figure", lambda figure, out: drawings.setdefault(out, figure))
    rng = np.random.default_rng(0)
    signal = dict(label=np.repeat([2, 5], 30), rec_tokens=rng.normal(1, 1, 60), rec_globals=rng.normal(0, 1, 60))
    background = dict(label=np.zeros(50), rec_tokens=rng.normal(0, 1, 50), rec_globals=rng.normal(0, 1, 50))
    curves = compare(background, signal, "b")
    figures.plot_roc(curves, "title", "roc")
    left, right = panels(drawings["roc"])
    labels = [line.get_label() for line in left.lines[:3]]
    assert labels == [f"{row['signal']}: {row['auc']:.3f}" for row in curves[:3]] and len(right.lines) == 4
    assert left.lines[0].get_xdata()[0] == 0 and left.lines[0].get_ydata()[-1] == 1
    z = rng.normal(0, [3, 1, 0.1], (60, 3)) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    figures.plot_latents(z, signal["label"], "title", "pca")
    (ax,) = panels(drawings["pca"])
    points = np.concatenate([part.get_offsets() for part in ax.collections])
    theirs = np.linalg.svd(z - z.mean(0), full_matrices=False)
    assert np.allclose(abs(points), abs(theirs[0][:, :2] * theirs[1][:2]))
    share = theirs[1][0] ** 2 / (theirs[1] ** 2).sum()
    assert ax.get_xlabel() == f"first component, {share:.0%} of the variance"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["label 2", "label 5"]
    for other in (z[:, :1], np.zeros((60, 2)), z[:1]):
        figures.plot_latents(other, signal["label"][: len(other)], "title", "odd")


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def sweep(root, statuses):
    jobs, folder = [], root / "multiruns" / "exp_a"
    for i, status in enumerate(statuses):
        if status != "waiting":
            run(root / "runs" / f"run_a_job{i}", 0.1 * i, test=status == "done", epochs=3 * (status != "failed"))
        jobs.append(dict(overrides=["seed=1", f"latent_space={'none linear vq'.split()[i % 3]}", f"epochs={i}"],
                         run_dir=f"elsewhere/run_a_job{i}", status=status, exit_code=None, best_val_loss=None,
                         seconds=1.5 * i))  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(dict(script="train_ae.py", jobs=jobs)))
    return folder


def test_a_sweep_s_summary_and_figures(tmp_path, capsys):
    folder = sweep(tmp_path, ["done", "interrupted", "failed", "waiting", "done"])
    plot.main(plot.Config(runs=(str(folder),)))
    names = ["summary.csv", "losses.png", "results.png"]
    assert capsys.readouterr().out.split() == [str(folder / name) for name in names]
    assert all((folder / name).stat().st_size > 100 for name in names)
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "interrupted", "failed", "waiting", "done"]
    assert [row["best_val_loss"] for row in rows] == ["0.5", "0.6", "", "", "0.9"]
    assert [row["test_loss"] for row in rows] == ["0.25", "", "", "", "0.65"] and rows[4]["type_accuracy"] == "0.9"
    assert rows[1]["overrides"] == "seed=1 latent_space=linear epochs=1" and rows[4]["seconds"] == "6"
    assert rows[0]["run_dir"].endswith("runs/run_a_job0") and rows[3]["run_dir"] == "elsewhere/run_a_job3"


def test_bars_of_a_sweep(tmp_path, monkeypatch):
    folder, drawings = sweep(tmp_path, ["done"] * 45), []
    monkeypatch.setattr(figures, "write_figure", lambda figure, out: drawings.append(figure))
    figures.plot_sweep(folder)
    left = drawings[1].axes[0]
    names = [t.get_text() for t in left.get_yticklabels()]
    assert names[:2] == ["0 latent_space=none epochs=0", "1 latent_space=linear epochs=1"]
    assert len(left.patches) == 40 and drawings[1].get_suptitle() == "40 of 45 jobs"  # the best ones
    assert all(letters(figure) >= 11 for figure in drawings)
    shades = {patch.get_facecolor()[:3] for patch in left.patches[1:]}
    assert left.patches[0].get_facecolor()[:3] not in shades and len(shades) == 1


def test_sweeps_that_can_not_be_drawn(tmp_path):
    folder = sweep(tmp_path, ["waiting", "failed"])
    assert figures.plot_sweep(folder) == [folder / "summary.csv"]  # nothing to draw yet
    with pytest.raises(UsageError, match="sweeps and runs"):
        plot.main(plot.Config(runs=(str(folder), run(tmp_path / "a"))))
    with pytest.raises(UsageError, match="--out"):
        plot.main(plot.Config(runs=(str(folder),), out="a.png"))
    for text in ("jobs: 3", "jobs: [{run_dir: a}]", "{", "[]"):
        (folder / "sweep.yaml").write_text(text)
        with pytest.raises(DataError, match="sweep.yaml can't be read"):
            figures.plot_sweep(folder)


def test_differences():
    assert figures.differences([["a=1", "b=2"], ["a=1", "b=3"]]) == ["b=2", "b=3"]
    assert figures.differences([["a=1"]]) == [""] and figures.differences([["--x", "1"], ["--x", "2"]]) == ["1", "2"]
