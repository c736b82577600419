"""Symbolic regression: expressions, how they are drawn, fitted and searched.

expressions.py         formulas as rows of tokens, their values and their text
algebra.py             sums, products and functions in normal form
simplify.py            the normal form of a formula
distributions.py       distributions written as text
skeletons.py           random formulas with blank constants
pools.py               test sets and saved pools of skeletons in files
holdout.py             which skeletons are never drawn
prepare.py             commands generate-skeleton-pool and import-data
dataset.py             points and formulas, a stream of batches
bundle_files.py        bundles of several YAML files
bundles.py             train.yaml and all that it names
checkpoint_folders.py  checkpoints that are folders
fit.py                 constants of many formulas at once
sums.py                sums of known parts that explain y
search.py              a formula for given points
problems.py            problems of test sets, a user's table, scores
cells.py               columns of numbers out of a user's file
tables.py              which of them are y, x and the uncertainty of y
model_files.py         the folder of a trained model
generate.py            the search as a command
figures.py             a formula and its residuals
"""
