"""`SymbolicRegressor`: the search of a formula with the methods of a scikit-learn estimator.

scikit-learn need not be installed: its classes are used where it is loaded already. M points, D variables.
"""

import inspect
import os
import sys
import warnings

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.formulas.answers import search_formulas, to_answers
from data_utils.formulas.formats import to_sympy, write_equation, write_formula
from data_utils.formulas.model_files import load_model, model_folder, suited
from data_utils.formulas.score import Data
from data_utils.formulas.search import predict

REPEATED = 4_000_000  # rows up to which a row of weight k is taken as k rows
DRAWN = 5000  # points that are kept for `plot`
NETWORK = dict(max_points=64, temperature=1.0, top_k=0, top_p=1.0)
DECIMALS, SIGNIFICANT = 12, 9  # of y: a column with fewer digits was rounded


class SymbolicRegressor:
    """Find a formula y = f(x) for measurements.

        model = SymbolicRegressor(max_seconds=20).fit(X, y)
        print(model, model.equations_, model.latex())
        model.predict(X_new)

    max_seconds: of the search, 0 = until `choices` candidates were tried, which gives the same answer each time.
    operators: those that may occur beside + - * /, such as ("sin", "exp", "sqrt"); None = all usual ones.
    exclude_terms: those that may not occur, such as ("tan", "x1**2"). max_length: longest formula, in operators,
    constants and variables; 0 = as long as it pays. model: what proposes formulas beside chance, a network or the
    folder of one of train_sr.py; "pretrained" = the one that comes with the repo, for up to three columns; None =
    nothing. random_state: seed, or None for another search each time.

    After `fit`: equations_ (a DataFrame of all formulas, best first), formula_ (text), target_, n_features_in_,
    feature_names_in_ (where X was a DataFrame).
    """

    _estimator_type = "regressor"

    def __init__(self, max_seconds=20, operators=None, exclude_terms=(), max_length=0, model="pretrained", choices=512,
                 random_state=0):  # fmt: skip
        self.max_seconds = max_seconds
        self.operators = operators
        self.exclude_terms = exclude_terms
        self.max_length = max_length
        self.model = model
        self.choices = choices
        self.random_state = random_state

    # ---- fit and predict

    def fit(self, X, y, sample_weight=None):
        """Search a formula for X (M, D) and y (M,), arrays or DataFrames. Ctrl+C ends the search; the best one stays.

        sample_weight (M,): a row with a whole weight k counts as k rows; other weights are in proportion to
        1 / uncertainty of y squared. Raises ValueError for what can't be searched.
        """
        if not (self.max_seconds >= 0 and self.choices >= 1 and self.max_length >= 0):
            raise ValueError(f"{self!r}: expected max_seconds and max_length of 0 or more, choices of 1 or more")
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        names = _column_names(X)
        target = getattr(y, "name", None)
        X, y = _matrix(X), _vector(y)
        if len(y) != len(X):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: {[len(X), len(y)]}")
        if len(X) < 2:
            raise ValueError(f"n_samples = {len(X)}: a minimum of 2 is required, 1 sample can't tell a formula")
        self.n_features_in_ = X.shape[1]
        if names is not None:
            self.feature_names_in_ = np.array(names, object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self.target_ = "y" if target is None else str(target)
        self._names = [f"x{j + 1}" for j in range(X.shape[1])] if names is None else names
        X, y, sigma = _weighted(X, y, sample_weight)
        rng = _generator(self.random_state)
        rows = np.sort(rng.permutation(len(y))[:DRAWN])
        self._points = X[rows], y[rows], None if sigma is None else sigma[rows]
        half, network, settings = _rounding(y), self.model, {}
        try:
            if isinstance(network, (str, os.PathLike)):
                network = suited(load_model(model_folder(network)), network, X.shape[1])
            if network is not None:
                settings["network"] = NETWORK | dict(max_len=network.max_seq_len)
            self._alphabet, formulas, self._tried = search_formulas(
                X, y, self._names, rng, model=network, operators=self.operators or (), longest=self.max_length,
                exclude_terms=self.exclude_terms, sigma=sigma, half=half, max_seconds=self.max_seconds,
                choices=self.choices, **settings,
            )  # fmt: skip
        except (UsageError, DataError) as e:
            raise ValueError(str(e).replace("--", "")) from e
        self._answers = to_answers(self._alphabet, formulas, Data(X, y, sigma, half))
        self.formula_ = self.text()
        return self

    def predict(self, X, index=0):
        """Return the values (M,) of a formula at X (M, D). index: of the formula in equations_."""
        answer = self._answer(index)
        self._check_names(X)
        X = _matrix(X)
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                             f"{self.n_features_in_} features as input")  # fmt: skip
        return predict(self._alphabet, answer, X)

    def score(self, X, y, sample_weight=None):
        """Return R2 of the first formula on X (M, D), y (M,)."""
        y, values = _vector(y), self.predict(X)
        weights = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, float)
        left = weights @ (y - values) ** 2
        total = weights @ (y - np.average(y, weights=weights)) ** 2
        if total == 0:
            return float(left == 0)
        return float(1 - left / total)

    # ---- what was found

    @property
    def equations_(self):
        """DataFrame of all formulas, best first: formula, length, bits, R2, constants, and whether on the front."""
        self._answer(0)
        import pandas

        rows = [
            dict(formula=self.text(i), length=a.length, bits=a.bits, R2=1 - a.fvu, constants=a.constants, front=a.front)
            for i, a in enumerate(self._answers)
        ]
        return pandas.DataFrame(rows)

    def text(self, index=0):
        """Return a formula as text, its constants with as many digits as the fit needs."""
        answer = self._answer(index)
        return write_formula(answer.prefix, answer.numbers, self._names)

    def python(self, index=0):
        """Return the source of a Python function of numpy arrays."""
        return self._written("python", index)

    def latex(self, index=0):
        """Return an equation as LaTeX."""
        return self._written("latex", index)

    def sympy(self, index=0):
        """Return a formula as a sympy expression, its constants with all digits. Raises ImportError without sympy."""
        answer = self._answer(index)
        return to_sympy(answer.prefix, answer.constants, self._names)

    def plot(self, path="", index=0):
        """Return the figure of data, fit, residuals and Pareto front, or write it to the file `path`."""
        answer = self._answer(index)
        from data_utils.figures import write_figure
        from data_utils.formulas.figures import draw_fit

        X, y, sigma = self._points
        title = write_equation(answer.prefix, answer.numbers, self._names, self.target_)
        figure = draw_fit(
            X, y, predict(self._alphabet, answer, X), [*self._names, self.target_], title, self._answers, sigma
        )
        if not path:
            return figure
        write_figure(figure, path)

    def _written(self, style, index):
        answer = self._answer(index)
        return write_equation(answer.prefix, answer.numbers, self._names, self.target_, style)

    def _answer(self, index):
        if not hasattr(self, "_answers"):
            message = f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with X and y first."
            loaded = sys.modules.get("sklearn.exceptions")
            raise (loaded.NotFittedError if loaded else AttributeError)(message)
        return self._answers[index]

    # ---- the conventions of scikit-learn

    @classmethod
    def _defaults(cls):
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def get_params(self, deep=True):
        """Return the arguments of the constructor as a dict."""
        return {name: getattr(self, name) for name in self._defaults()}

    def set_params(self, **params):
        """Change arguments of the constructor."""
        valid = self._defaults()
        for name, value in params.items():
            if name not in valid:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self!r}. "
                                 f"Valid parameters are: {list(valid)}.")  # fmt: skip
            setattr(self, name, value)
        return self

    def __repr__(self):
        params, defaults = self.get_params(), self._defaults()
        changed = [f"{name}={params[name]!r}" for name in params if repr(params[name]) != repr(defaults[name])]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_answers")

    def __sklearn_tags__(self):
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(estimator_type="regressor", target_tags=TargetTags(required=True), transformer_tags=None,
                    classifier_tags=None, regressor_tags=RegressorTags(), input_tags=InputTags(),
                    non_deterministic=bool(self.max_seconds))  # fmt: skip

    def _check_names(self, X):
        """Warn or raise as scikit-learn does where the columns of X are not those of fit."""
        names, expected = _column_names(X), getattr(self, "feature_names_in_", None)
        kind = type(self).__name__
        if names is None and expected is None:
            return
        if expected is None:
            warnings.warn(f"X has feature names, but {kind} was fitted without feature names", stacklevel=3)
        elif names is None:
            message = f"X does not have valid feature names, but {kind} was fitted with feature names"
            warnings.warn(message, stacklevel=3)
        elif names != list(expected):
            unseen = [name for name in names if name not in expected]
            missing = [name for name in expected if name not in names]
            message = "The feature names should match those that were passed during fit.\n"
            if unseen:
                message += "Feature names unseen at fit time:\n" + "".join(f"- {name}\n" for name in unseen[:5])
            if missing:
                message += "Feature names seen at fit time, yet now missing:\n"
                message += "".join(f"- {name}\n" for name in missing[:5])
            if not missing and not unseen:
                message += "Feature names must be in the same order as they were in fit.\n"
            raise ValueError(message)


# ---- arrays


def _column_names(X):
    """Return the names of the columns of a DataFrame whose names are all texts; None for what has no such names."""
    columns = getattr(X, "columns", None)
    if columns is None:
        return None
    names = list(columns)
    texts = [isinstance(name, str) for name in names]
    if any(texts) and not all(texts):
        kinds = sorted({type(name).__name__ for name in names})
        raise TypeError("Feature names are only supported if all input features have string names, but your input has "
                        f"{kinds} as feature name / column name types.")  # fmt: skip
    if all(texts) and len(set(names)) < len(names):
        raise ValueError(f"several columns of X are named {', '.join({n for n in names if names.count(n) > 1})}")
    return names if names and all(texts) else None


def _matrix(X):
    """Return X as float64 (M, D). Raises ValueError or TypeError, in scikit-learn's words, for what is none."""
    if hasattr(X, "tocsr") or hasattr(X, "todense"):
        raise TypeError("Sparse data was passed, but dense data is required. Use '.toarray()' to convert it.")
    array = _real(X, "X")
    if array.ndim != 2:
        raise ValueError(f"Expected 2D array, got {'scalar' if not array.ndim else f'{array.ndim}D'} array instead.\n"
                         "Reshape your data either using array.reshape(-1, 1) if your data has a single feature or "
                         "array.reshape(1, -1) if it contains a single sample.")  # fmt: skip
    for axis, kind in enumerate(("sample", "feature")):
        if not array.shape[axis]:
            raise ValueError(f"Found array with 0 {kind}(s) (shape={array.shape}) while a minimum of 1 is required.")
    return array


def _vector(y):
    """Return y as float64 (M,); a column is taken with scikit-learn's warning."""
    array = _real(y, "y")
    if array.ndim == 2 and array.shape[1] == 1:
        loaded = sys.modules.get("sklearn.exceptions")
        kind = loaded.DataConversionWarning if loaded else UserWarning
        message = (
            "A column-vector y was passed when a 1d array was expected. Please change the shape of y to (n_samples,)."
        )
        warnings.warn(message, kind, stacklevel=3)
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"y should be a 1d array, got an array of shape {array.shape} instead.")
    return array


def _real(values, name):
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported\n{array}\n")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        fault = "NaN" if np.isnan(array).any() else "infinity"
        raise ValueError(f"Input {name} contains {fault}: expected finite numbers (no NaN, no inf)")
    return array


def _weighted(X, y, weights):
    """Return X, y and the uncertainties of y (None without) that stand for rows with weights, in an order of their own.

    The order of the rows does not matter to the search then, nor whether a row has the weight 2 or stands there twice.
    """
    sigma = None
    if weights is not None:
        weights = _real(weights, "sample_weight")
        if weights.ndim == 0:
            weights = np.full(len(y), float(weights))
        if weights.shape != y.shape:
            raise ValueError(f"sample_weight.shape == {weights.shape}, expected {y.shape}!")
        if (weights < 0).any() or not weights.any():
            raise ValueError("sample_weight: expected no negative numbers, and one above zero")
        if (weights == np.rint(weights)).all() and weights.sum() <= REPEATED:
            rows = np.repeat(np.arange(len(y)), weights.astype(int))
        else:
            rows = np.flatnonzero(weights)
            sigma = 1 / np.sqrt(weights[rows])
        X, y = X[rows], y[rows]
    order = np.lexsort([y, *X.T[::-1]])
    return X[order], y[order], None if sigma is None else sigma[order]


def _rounding(y):
    """Return half a unit (M,) of the last decimal of y where all its numbers have few digits, else None."""
    largest = np.abs(y).max()
    for decimals in range(DECIMALS + 1):
        if largest * 10.0**decimals >= 10.0**SIGNIFICANT:
            return None
        if np.allclose(np.round(y, decimals), y, rtol=1e-15, atol=0):
            return np.full(len(y), 0.5 * 10.0**-decimals)
    return None


def _generator(random_state):
    """Return numpy's Generator for a seed, None, a Generator or a RandomState."""
    if hasattr(random_state, "randint"):
        random_state = random_state.randint(2**31)
    return np.random.default_rng(random_state)
