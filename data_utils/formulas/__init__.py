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
search.py              a formula for given points
problems.py            problems of test sets, a user's table, scores
generate.py            the search as a command
figures.py             a formula and its residuals
"""
