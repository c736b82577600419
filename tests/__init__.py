"""Tests, laid out as the code: models/, data_utils/<room>/, scripts/, benchmarks/.

safety/ holds what no part of the repo may break. helpers.py starts scripts, warm.py makes that fast, conftest.py has
the fixtures.
"""
