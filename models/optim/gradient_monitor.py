"""What the gradients of a model's parts are like, and which parameters never had one.

A group is a direct child of the model with all its parameters, or a parameter of the model itself: together they cover
every parameter. What stays unnoticed otherwise: a part that nothing trains, because no path leads from it to the loss.
"""

import torch

SMALL, LARGE = 1e-5, 100.0  # norms of a group's gradient below and above which there is a warning
DEAD, MOST_DEAD = 1e-8, 0.5  # a gradient below the first is dead; of these so many may be
EPS = 1e-12  # least norm of weights to divide by


def gradient_of(parameter):
    """The numbers of its gradient, of a sparse one those that it has; one zero where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return parameter.new_zeros(1)
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _numbers_of(parameter):
    """The same, but of a sparse gradient not yet summed by rows: for that the host would have to wait."""
    gradient = parameter.grad
    return gradient._values() if gradient is not None and gradient.is_sparse else gradient_of(parameter)


def warnings(report):
    """What `Monitor.end` returned -> a line for each group whose gradient looks wrong."""
    lines = []
    for group, found in report.items():
        if not SMALL <= found["norm"] <= LARGE:
            side, limit = ("below", SMALL) if found["norm"] < SMALL else ("above", LARGE)
            lines.append(f"{group}: gradient norm {found['norm']:.1e}, {side} {limit:g}")
        if found["dead"] > MOST_DEAD:
            lines.append(f"{group}: {found['dead']:.0%} of the gradient below {DEAD:g}")
    return lines


class Monitor:
    """Watches the parameters of `model`; keeps no history but the names of those that had no gradient yet.

    At each step, after the backward pass: note(). Where a report is wanted: begin() in its place, and end() after the
    optimizer's step. late: beginnings of names that have none at first, where a memory is still empty;
    tables: of those whose rows are not all used in a step, and so not dead.
    """

    def __init__(self, model, late=(), tables=()):
        self.late, self.tables = tuple(late), tuple(tables)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.untrained, self._largest = dict(self.parameters), None  # and the largest norms since these were listed

    def never_trained(self):
        """Names of the parameters whose gradient was 0 or absent at every step so far, but for the `late` ones."""
        if self._largest is not None:
            norms, self._largest = self._largest.tolist(), None
            self.untrained = {
                name: p for (name, p), norm in zip(self.untrained.items(), norms, strict=True) if not norm
            }
        return [name for name in self.untrained if not name.startswith(self.late)]

    def note(self):
        """Note which parameters have a gradient now, on their device: nothing waits for it."""
        if self.untrained:
            norms = torch.stack(torch._foreach_norm([_numbers_of(p) for p in self.untrained.values()]))
            self._largest = norms if self._largest is None else torch.maximum(self._largest, norms)

    @torch.no_grad()
    def begin(self):
        """Take in gradients, before they are clipped, and weights, before they are stepped."""
        self.note()
        self.never_trained()  # crosses off those that had one
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
        """-> {group: norm of its gradient, ratio of the norms of its update and its weights, share of it that is dead}.

        Parameters without a gradient in this step, of another task perhaps, are left out, and so are groups of them.
        """
        now = [p.detach() for p in self.parameters.values()]
        updates = torch.stack(torch._foreach_norm(torch._foreach_sub(now, self._before)))
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
