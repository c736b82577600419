"""Statistics of the gradients of a model's parts, and a list of parameters that never had a gradient.

A group is a direct child of the model with all its parameters, or a parameter of the model itself, so that groups cover
all parameters. The monitor reveals parts that are not trained because no path leads from them to the loss.
"""

import torch

SMALL, LARGE = 1e-5, 100.0  # a gradient norm of a group outside this range gives a warning
DEAD = 1e-8  # magnitude below which an element of a gradient is dead
MOST_DEAD = 0.5  # share of dead elements above which a group gives a warning
EPS = 1e-12  # smallest norm of weights to divide by


def gradient_of(parameter):
    """Return the gradient of a parameter: the rows of a sparse gradient, one zero without a gradient."""
    gradient = parameter.grad
    if gradient is None:
        return parameter.new_zeros(1)
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _numbers_of(parameter):
    """Return the gradient of a parameter, but sparse rows not yet summed, for which the host would have to wait."""
    gradient = parameter.grad
    return gradient._values() if gradient is not None and gradient.is_sparse else gradient_of(parameter)


def warnings(report):
    """Describe suspicious gradients in a report of `Monitor.end`, one line each."""
    lines = []
    for group, numbers in report.items():
        norm, dead = numbers["norm"], numbers["dead"]
        if not SMALL <= norm <= LARGE:
            side, limit = ("below", SMALL) if norm < SMALL else ("above", LARGE)
            lines.append(f"{group}: gradient norm {norm:.1e}, {side} {limit:g}")
        if dead > MOST_DEAD:
            lines.append(f"{group}: {dead:.0%} of the gradient below {DEAD:g}")
    return lines


class Monitor:
    """Watches the parameters of `model`. Its only history is the set of parameters that had no gradient so far.

    Call note() at each step, after the backward pass. For a report call begin() instead, and end() after the
    optimizer's step.
    """

    def __init__(self, model, late=(), tables=()):
        """late: name prefixes of parameters that may lack a gradient at first, as while a memory is empty.

        tables: name prefixes of tables, whose unused rows do not count as dead.
        """
        self.late, self.tables = tuple(late), tuple(tables)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.untrained = dict(self.parameters)
        self._largest = None  # largest gradient norms of `untrained` since the last never_trained()

    def never_trained(self):
        """Return the names of parameters whose gradient was 0 or absent at every step, except the `late` ones."""
        if self._largest is not None:
            norms = self._largest.tolist()
            self._largest = None
            self.untrained = {
                name: p for (name, p), norm in zip(self.untrained.items(), norms, strict=True) if not norm
            }
        return [name for name in self.untrained if not name.startswith(self.late)]

    def note(self):
        """Record on the device which parameters have a gradient now; the host does not wait."""
        if self.untrained:
            norms = torch.stack(torch._foreach_norm([_numbers_of(p) for p in self.untrained.values()]))
            self._largest = norms if self._largest is None else torch.maximum(self._largest, norms)

    @torch.no_grad()
    def begin(self):
        """Record the gradients before clipping and the weights before the optimizer's step."""
        self.note()
        self.never_trained()  # removes those that had a gradient from `untrained`
        gradients = [gradient_of(p) for p in self.parameters.values()]
        self._norms = torch.stack(torch._foreach_norm(gradients))
        used = [
            g.any(-1) if name.startswith(self.tables) else ...
            for name, g in zip(self.parameters, gradients, strict=True)
        ]
        self._dead = torch.stack([(g[rows].abs() < DEAD).sum() for g, rows in zip(gradients, used, strict=True)])
        self._sizes = [g.numel() for g in gradients]
        self._before = [p.detach().clone() for p in self.parameters.values()]

    @torch.no_grad()
    def end(self):
        """Return {group: dict(norm, ratio, dead)} of this step.

        norm: of the gradient. ratio: norm of the update over norm of the weights. dead: share of dead elements.
        Parameters without a gradient in this step, perhaps of another task, are left out, and so are their groups.
        """
        weights_after = [p.detach() for p in self.parameters.values()]
        updates = torch.stack(torch._foreach_norm(torch._foreach_sub(weights_after, self._before)))
        weights = torch.stack(torch._foreach_norm(self._before))
        columns = torch.stack([self._norms, updates, weights]).cpu().double().square().tolist()
        groups = {}
        for name, *row in zip(self.parameters, *columns, self._dead.tolist(), self._sizes, strict=True):
            if row[0]:
                groups.setdefault(name.split(".")[0], []).append(row)
        self._before = None
        sums = {group: [sum(column) for column in zip(*rows, strict=True)] for group, rows in groups.items()}
        return {
            group: dict(norm=norm**0.5, ratio=(update / max(weight, EPS**2)) ** 0.5, dead=dead / max(1, size))
            for group, (norm, update, weight, dead, size) in sums.items()
        }
