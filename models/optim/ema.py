"""Exponential moving average of weights, less noisy than the last step; evaluations and saved models use it."""

import contextlib

import torch


class Average:
    """Average of named parameters with decay min(decay, (1 + t) / (20 + t)) at step t.

    The ramp quickly forgets the first steps, which are far from the final weights (as in tf.train's moving averages).
    """

    def __init__(self, parameters, decay):
        """parameters: pairs (name, parameter). decay: in [0, 1); 0 = no average."""
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()} if decay else {}

    def update(self, step):
        """Update the average after step number `step`, counted from 0."""
        if self.decay:
            rate = 1 - min(self.decay, (1 + step) / (20 + step))
            weights = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.values.values()), weights, rate)

    @contextlib.contextmanager
    def in_place(self):
        """Give the parameters their averaged values inside `with average.in_place():`."""
        weights = {name: self.parameters[name].detach().clone() for name in self.values}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(weights)

    def _write(self, values):
        for name, value in values.items():
            self.parameters[name].data.copy_(value)

    def restart(self):
        """Restart the average from the current weights, for checkpoints without one."""
        for name, value in self.values.items():
            value.copy_(self.parameters[name].detach())

    def state_dict(self):
        return dict(self.values)

    def load_state_dict(self, state):
        for name, value in self.values.items():
            value.copy_(state[name])
