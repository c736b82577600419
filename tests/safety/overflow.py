"""A rank of a script in fp16 on the CPU, as test_overflow.py starts two: overflow.py SCRIPT FLAGS...

Autocast and the GradScaler are those of an older GPU, under gloo. In the third step the backward pass of rank 1 alone
overflows, in the optimizer's last group: in train_ae.py that of its judges. After each step `weights-RANK.jsonl` gets a
line: the sum of all weights, whether they are finite, the scale.
"""

import json
import math
import os
import runpy
import sys
from pathlib import Path

import torch

OVERFLOW = 3  # the step in which rank 1 overflows
RANK = int(os.environ["RANK"])


class Autocast(torch.autocast):
    """fp16 where a script names a dtype. Models name none: they only turn autocast off."""

    def __init__(self, device_type, dtype=None, enabled=True, **how):
        if dtype is not None:
            device_type, dtype, enabled = "cpu", torch.float16, True
        super().__init__(device_type, dtype, enabled, **how)


class Scaler(torch.amp.GradScaler):
    def __init__(self, *_, **__):
        super().__init__("cpu", init_scale=1024.0)
        self.steps = 0
        self.optimizer = None  # from the first step on
        self.hooks = []

    def scale(self, outputs):
        if RANK == 1 and self.steps == OVERFLOW - 1:  # what DDP averages comes after these hooks
            for weight in self.optimizer.param_groups[-1]["params"]:
                self.hooks.append(weight.register_hook(lambda gradient: gradient * math.inf))
        return super().scale(outputs)

    def step(self, optimizer, *args, **kwargs):
        self.optimizer = optimizer
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale=None):
        super().update(new_scale)
        self.steps += 1
        while self.hooks:
            self.hooks.pop().remove()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        weights = torch.cat([weight.detach().double().flatten() for weight in weights])
        line = dict(sum=weights.abs().sum().item(), finite=weights.isfinite().all().item(), scale=self.get_scale())
        with open(f"weights-{RANK}.jsonl", "a") as file:
            print(json.dumps(line), file=file)


torch.autocast = Autocast
torch.amp.GradScaler = Scaler
sys.argv = [str(Path(__file__).parents[2] / sys.argv[1]), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
