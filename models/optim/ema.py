"""Exponential moving average of weights: smoother than the last step, and what is evaluated and used."""

import contextlib

import torch


class Average:
    """Average of named parameters with decay min(decay, (1 + t) / (20 + t)) at step t; decay 0 keeps none.

    The ramp lets the first steps, far from where training ends, be forgotten soon (as tf.train's moving averages).
    """

    def __init__(self, parameters, decay):
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()} if decay else {}

    def update(self, step):
        """Take in the parameters after step number `step`, counted from 0."""
        if self.decay:
            share = 1 - min(self.decay, (1 + step) / (20 + step))
            now = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.values.values()), now, share)

    @contextlib.contextmanager
    def in_place(self):
        """`with average.in_place():` the parameters have the averaged values, afterwards their own again."""
        own = {name: self.parameters[name].detach().clone() for name in self.values}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(own)

    def _write(self, values):
        for name, value in values.items():
            self.parameters[name].data.copy_(value)

    def restart(self):
        """Begin anew from the weights as they are: those of a checkpoint that has no average."""
        for name, value in self.values.items():
            value.copy_(self.parameters[name].detach())

    def state_dict(self):
        return dict(self.values)

    def load_state_dict(self, state):
        for name, value in self.values.items():
            value.copy_(state[name])
