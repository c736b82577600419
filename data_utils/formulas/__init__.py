"""Symbolic regression: formulas, and how they are drawn, fitted and searched.

expressions.py         formulas as rows of tokens, their values and their text
algebra.py             sums, products and functions in normal form
simplify.py            the normal form of a formula
distributions.py       distributions written as text
skeletons.py           random formulas with blank constants
pools.py               test sets and saved pools of skeletons in files
holdout.py             which skeletons are never drawn
prepare.py             the commands generate-skeleton-pool and import-data
samples.py             constants, points and noise for skeletons
prompts.py             prompts in front of a formula
dataset.py             a stream of batches of points and formulas
bundles.py             a train.yaml and all files that it names
checkpoint_folders.py  checkpoints that are folders
model_files.py         the folder of a trained model
fit.py                 constants of many formulas at once
sums.py                sums of known parts that explain y
forms.py               general forms from which a search starts
factors.py             products of factors and sums of parts from which it starts, too
scaling.py             columns near 1, and formulas back in the user's units
score.py               bits of a formula and of what it leaves of the data
search.py              a formula for given points
cells.py               columns of numbers out of a user's file
tables.py              which of them are y, x and the uncertainty of y
answers.py             the search in a user's words: operators, excluded terms, answers
formats.py             digits of constants; formulas as text, Python, LaTeX, sympy
problems.py            problems of test sets, scores
generate.py            the search as a command
regressor.py           the search as an estimator with scikit-learn's methods
figures.py             a formula, its residuals and the formulas beside it

`from data_utils.formulas import SymbolicRegressor` works in a notebook, and so does `load`.
"""


def __getattr__(name):  # torch is imported only where the search is used
    if name == "SymbolicRegressor":
        from data_utils.formulas.regressor import SymbolicRegressor

        return SymbolicRegressor
    if name == "load":
        from data_utils.formulas.model_files import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
