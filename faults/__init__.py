"""Faults in real runs of the six training scripts, each with what must follow: python -m faults

__main__.py   command line, results
child.py      injects faults in a child process, and starts children
lab.py        tiny runs of the six scripts, and what they must leave
rows/         one function per fault, by kind
"""
