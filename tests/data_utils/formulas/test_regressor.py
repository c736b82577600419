"""SymbolicRegressor: what it finds, how it says it, and the conventions of scikit-learn."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest

from data_utils.formulas import SymbolicRegressor, forms, score, search, sums
from data_utils.formulas.regressor import _rounding, _weighted
from tests.helpers import ROOT, run_python, slow

QUICK = dict(max_seconds=0, choices=16, operators=("pow", "pow2"))


@pytest.fixture(scope="module", autouse=True)
def short_search():
    """Rank a few formulas of a few forms: a test needs an answer, not the best one."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((search, "FINAL", 3), (search, "EXTENDED", 1), (forms, "QUANTITIES", 1)):
            patch.setattr(module, name, value)
        yield


def law(n=40, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(0.5, 3, (n, 2))
    return X, 2.5 * X[:, 0] ** 2 / X[:, 1] * (1 + 0.01 * rng.standard_normal(n))


@pytest.fixture(scope="module")
def fitted():
    return SymbolicRegressor(**QUICK).fit(*law())


def test_it_finds_a_law(fitted):
    X, y = law(seed=1)
    assert fitted.score(X, y) > 0.999 and fitted.predict(X).shape == (40,) and fitted.n_features_in_ == 2
    np.testing.assert_allclose(run_python(fitted.python(), "y", X[:, 0], X[:, 1]), fitted.predict(X), rtol=0.01)
    assert fitted.latex().startswith("y = ") and "x_{1}^{2}" in fitted.latex() and "x1**2" in fitted.formula_
    assert fitted.text(0) == fitted.formula_ and fitted.text(1) != fitted.formula_


def test_equations(fitted):
    pytest.importorskip("pandas")
    frame = fitted.equations_
    assert list(frame.columns) == ["formula", "length", "bits", "R2", "constants", "front"]
    assert frame.formula[0] == fitted.formula_ and frame.bits.is_monotonic_increasing and frame.front.sum() >= 2
    for i in (0, len(frame) // 2):
        X, y = law()
        r2 = 1 - np.mean((fitted.predict(X, i) - y) ** 2) / np.var(y)
        assert r2 == pytest.approx(frame.R2[i], abs=1e-3)


def test_sympy(fitted, monkeypatch):
    sympy = pytest.importorskip("sympy")
    a, b = sympy.symbols("x1 x2", real=True)
    assert float(fitted.sympy().subs({a: 2, b: 3})) == pytest.approx(fitted.predict([[2, 3]])[0], rel=1e-12)
    monkeypatch.setitem(sys.modules, "sympy", None)
    with pytest.raises(ImportError, match="sympy is missing"):
        fitted.sympy()


def test_plot(fitted, tmp_path, full_pictures):
    pytest.importorskip("matplotlib")
    fitted.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 20_000
    assert len(fitted.plot().axes) == 3


def test_names_of_a_dataframe_are_kept():
    pandas = pytest.importorskip("pandas")
    X, y = law()
    frame, y = pandas.DataFrame(X, columns=["r", "d [m]"]), pandas.Series(y, name="area")
    model = SymbolicRegressor(**QUICK).fit(frame, y)
    assert list(model.feature_names_in_) == ["r", "d [m]"] and "r**2" in model.formula_ and "d [m]" in model.formula_
    assert model.python().splitlines()[3].startswith("def area(r, d_m):")
    assert model.latex().startswith("\\mathrm{area} = ")
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[["d [m]", "r"]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(X)


def test_parameters():
    model = SymbolicRegressor(max_seconds=3, operators=("sin",))
    assert repr(model) == "SymbolicRegressor(max_seconds=3, operators=('sin',))" and repr(SymbolicRegressor()) == (
        "SymbolicRegressor()"
    )
    assert model.set_params(choices=7) is model and model.get_params()["choices"] == 7
    with pytest.raises(ValueError, match="Invalid parameter 'seconds'.*max_seconds"):
        model.set_params(seconds=3)
    for name in ("predict", "score", "latex", "plot"):
        with pytest.raises((AttributeError, ValueError), match="not fitted"):
            getattr(model, name)(*([[1.0]], [1.0])[: dict(predict=1, score=2).get(name, 0)])


def test_columns_of_one_name_are_refused():
    pandas = pytest.importorskip("pandas")
    X, y = law()
    with pytest.raises(ValueError, match="several columns of X are named a$"):
        SymbolicRegressor(**QUICK).fit(pandas.DataFrame(X, columns=["a"] * X.shape[1]), y)


def test_terms_operators_and_length():
    X, y = law()
    model = SymbolicRegressor(**QUICK | dict(exclude_terms=("x2",), operators=("log",), max_length=7)).fit(X, y)
    for i in range(len(model._answers)):
        text = model.text(i)
        assert "x2" not in text and "**" not in text and "sqrt" not in text and model._answers[i].length <= 7
    with pytest.raises(ValueError, match="^exclude_terms sinus"):
        SymbolicRegressor(**QUICK, exclude_terms=("sinus",)).fit(X, y)
    with pytest.raises(ValueError, match="max_seconds"):
        SymbolicRegressor(max_seconds=-1).fit(X, y)


def test_the_same_seed_gives_the_same_and_order_does_not_matter():
    X, y = law()
    first, second = (SymbolicRegressor(**QUICK).fit(X[::step], y[::step]) for step in (1, -1))
    assert [answer.prefix for answer in first._answers] == [answer.prefix for answer in second._answers]
    np.testing.assert_array_equal(first.predict(X), second.predict(X))


def test_weights():
    X, y = law(12)
    weights = np.arange(12) % 3
    again = np.repeat(np.arange(12), weights)
    for got, expected in zip(_weighted(X, y, weights), _weighted(X[again], y[again], None), strict=True):
        np.testing.assert_array_equal(got, expected)
    rows, _, sigma = _weighted(X, y, weights + 0.5)
    assert sigma.shape == (12,) and sorted(set(sigma.round(6))) == sorted(set((1 / np.sqrt([0.5, 1.5, 2.5])).round(6)))
    outlier = y.copy()
    outlier[3] += 1000
    model = SymbolicRegressor(**QUICK).fit(X, outlier, sample_weight=np.where(np.arange(12) == 3, 0, 1))
    assert model.score(X, y) > 0.99 and model.score(X, outlier, sample_weight=np.arange(12) != 3) > 0.99


def test_rounding_is_seen_in_numbers():
    assert (_rounding(np.array([1.5, 2.25, 3.0])) == 0.005).all() and (_rounding(np.array([1.0, 7.0])) == 0.5).all()
    assert _rounding(np.array([1 / 3, 2.0])) is None and _rounding(np.array([1e-8, 3.5e-7])) is not None


def test_a_fitted_model_is_copied(fitted):
    X, _ = law()
    np.testing.assert_array_equal(copy.deepcopy(fitted).predict(X), fitted.predict(X))


def test_the_package_imports_no_torch_before_it_is_used():
    code = "import sys, data_utils.formulas as f; assert 'torch' not in sys.modules; f.SymbolicRegressor; "
    code += "assert 'sklearn' not in sys.modules and 'pandas' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("share", [4, slow(1)])
def test_it_passes_the_checks_of_scikit_learn(share, monkeypatch):
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    # dozens of fits, none of which has to be good: what is checked is how data and parameters are taken
    for name, least in dict(DRAWS=64, ROUND=32, SUMS=1, SWEPT=4, FINAL=4, BEHIND=0).items():
        monkeypatch.setattr(search, name, least)
    monkeypatch.setattr(search, "starts", lambda *args: iter(()))
    monkeypatch.setattr(score, "SNAPS", 0)
    monkeypatch.setattr(sums, "LINKS", dict(list(sums.LINKS.items())[:2]))
    model = SymbolicRegressor(max_seconds=0, choices=1, operators=("exp",), model=None)
    for estimator, check in itertools.islice(checks.estimator_checks_generator(model), 0, None, share):
        check(estimator)


def test_it_is_a_step_of_a_pipeline():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, y = law()
    assert cross_val_score(make_pipeline(StandardScaler(), SymbolicRegressor(**QUICK)), X, y, cv=2).shape == (2,)
