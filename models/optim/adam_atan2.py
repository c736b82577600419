"""Adam-atan2: Adam whose step is an angle. It needs no epsilon, and scaling the loss does not change the step.

Everett et al. 2024, "Scaling Exponents Across Parameterizations and Optimizers" (arXiv 2407.05872), section 5: the step
is a atan2(m, b sqrt(v)) with bias-corrected moments m, v. Decoupled weight decay (1711.05101). n: number of elements.
"""

import inspect
import math

import torch
import torch.distributed as dist

A, B = 1.27, 1.0  # a and b of the paper; a step is at most A pi / 2 times the rate
PIECE = dict(cpu=131_072)  # elements that a thread updates at a time, so that they stay in the cache
LARGE_PIECE = 16_777_216  # the same on an accelerator
# atan(t) / t as a polynomial of t^2 for t in [0, 1], to 7e-9: least squares at Chebyshev's nodes, lowest power first
ARCTAN = (0.999999871, -0.333325240, 0.199848847, -0.141548060, 0.104775392, -0.071943845, 0.039345413, -0.014152348,
          0.002398139)  # fmt: skip
ALIGN = 64  # each parameter begins at a multiple of this many elements


def gather_rows(x):
    """Gather rows (n, ...) of all ranks in the order of ranks: (world n, ...). n must be the same on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def moved(x, device):
    """Copy a tensor of the host to `device`; with CUDA the host does not wait for work in progress."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def advance(value, gradient, m, v, beta1, beta2, correction, keep, rate):
    """Take one step in place: value <- keep value - rate atan2(m, correction sqrt(v)). All buffers are (n).

    This goes piece by piece, so that intermediate results stay in the cache.
    """
    piece = PIECE.get(value.device.type, LARGE_PIECE) * torch.get_num_threads()
    root, angle = value.new_empty(2, min(piece, len(value)))
    for x, g, m_part, v_part in zip(*(buffer.split(piece) for buffer in (value, gradient, m, v)), strict=True):
        m_part.lerp_(g, 1 - beta1)
        v_part.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        d, u = root[: len(x)], angle[: len(x)]
        torch.atan2(m_part, torch.sqrt(v_part, out=d).mul_(correction), out=u)
        x.mul_(keep).sub_(u, alpha=rate)


def advance_compiled(value, gradient, m, v, beta1, beta2, correction, keep, rate):
    """`advance` for torch.compile: one fused loop with a vectorized arctangent. The last three are tensors."""
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    d, size = v.sqrt() * correction, m.abs()
    t = torch.minimum(size, d) / torch.maximum(size, d).clamp_min(torch.finfo(d.dtype).tiny)  # 0 for 0 / 0
    square = t * t
    angle = ARCTAN[-1]
    for factor in ARCTAN[-2::-1]:
        angle = angle * square + factor
    angle = angle * t
    angle = torch.where(size > d, math.pi / 2 - angle, angle).copysign(m)
    value.mul_(keep).sub_(angle * rate)


class Flat:
    """One buffer each for the values, gradients and both moments of a group of parameters.

    The parameters and their gradients become views of the first two. Raises ValueError for mixed types or devices.
    """

    def __init__(self, params):
        like = params[0] if params else torch.empty(0)
        if any(p.dtype != like.dtype or p.device != like.device for p in params):
            raise ValueError("the parameters of a group need one type and one device")
        sizes = [p.numel() + -p.numel() % ALIGN for p in params]
        self.params = params
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.values, self.gradients, self.m, self.v = torch.zeros(4, sum(sizes), dtype=like.dtype, device=like.device)
        for p, value, gradient in zip(params, self.views(self.values), self.views(self.gradients), strict=True):
            value.copy_(p.data)
            p.data, p.grad = value, gradient

    def views(self, buffer):
        """Return the view of a buffer for each parameter, in its shape."""
        return [buffer[i : i + p.numel()].view(p.shape) for i, p in zip(self.starts, self.params, strict=True)]


class Plain(torch.optim.Optimizer):
    """torch.optim.Optimizer without the wrappers that exclude its methods from compiled graphs.

    Their first call imports torch._dynamo, which costs a second at the start of every run that compiles nothing.
    """

    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    )


class AdamAtan2(Plain):
    """Adam-atan2 on one flat buffer per group.

    Parameters and gradients become views of the buffers: move the model to its device first, and never set a gradient
    to None. A gradient of 0 counts like any other and lets moments decay; a parameter whose gradient was always 0 only
    decays. State is saved per parameter, as torch's own optimizers do.
    """

    def __init__(self, groups, *, lr, betas, weight_decay=0.0, compile=False):
        """groups: as for torch optimizers, of parameters or (name, parameter); each may have its own weight_decay.

        compile: takes seconds to start; then a step takes a third of the time.
        """
        super().__init__(groups, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.compiled = torch.compile(advance_compiled, dynamic=False) if compile else None
        self.flat = [Flat(group["params"]) for group in self.param_groups]
        self.steps = 0

    @property
    def flat_gradients(self):
        """The gradients of each group as one tensor (n)."""
        return [flat.gradients for flat in self.flat]

    def zero_grad(self, set_to_none=True):
        """Set all gradients to 0; `set_to_none` is ignored."""
        for gradients in self.flat_gradients:
            gradients.zero_()

    def average_gradients(self, world, others=()):
        """Average the gradients over `world` ranks, which is all that data parallelism needs after the backward pass.

        others: gradients of this rank that another optimizer uses. If one of them is not finite, the averages are not
        finite either, so that all ranks skip the step. With a GradScaler, call this before `unscale_`.
        """
        for gradient in others:
            self.flat_gradients[0][0] += 0 * gradient.sum()  # 0 times infinity is nan
        for gradients in self.flat_gradients if world > 1 else ():
            dist.all_reduce(gradients)
            gradients /= world

    def clip_(self, max_norm):
        """Scale all gradients so that their norm is at most max_norm; return the norm before, a scalar on their device.

        The host does not wait for the device.
        """
        pieces = [piece for gradients in self.flat_gradients for piece in gradients.split(PIECE["cpu"])]
        norm = torch.stack(torch._foreach_norm(pieces)).norm()  # on a CPU a norm of millions at once is 0.1 % off
        if math.isfinite(max_norm):
            factor = (max_norm / norm).clamp(max=1)
            for gradients in self.flat_gradients:
                gradients *= factor
        return norm

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for group, flat in zip(self.param_groups, self.flat, strict=True):
            beta1, beta2 = group["betas"]
            correction = B * (1 - beta1**self.steps) / (1 - beta2**self.steps) ** 0.5
            numbers = correction, 1 - group["lr"] * group["weight_decay"], A * group["lr"]
            if self.compiled:  # as tensors, since every change of a number would recompile
                numbers = torch.tensor(numbers, device=flat.values.device).unbind()
            advance_by = self.compiled or advance
            advance_by(flat.values, flat.gradients, flat.m, flat.v, beta1, beta2, *numbers)

    def state_dict(self):
        """Return torch's state_dict (step and moments of each parameter, none before the first step) and the names."""
        state = {i: dict(step=self.steps, m=m, v=v) for i, (m, v) in enumerate(self._moments()) if self.steps}
        return super().state_dict() | dict(state=state, names=self._names())

    def load_state_dict(self, state_dict):
        """Load a state; raise ValueError unless its names and shapes are those of this optimizer."""
        state = list(state_dict["state"].values())
        moments = self._moments()
        if state_dict["names"] != self._names():
            raise ValueError("the optimizer's state is of parameters of other names, or in another order")
        if state and [s["m"].shape for s in state] != [m.shape for m, _ in moments]:
            raise ValueError("the optimizer's state is of parameters of other shapes")
        super().load_state_dict(state_dict | dict(state={}))  # loads the groups
        self.steps = state[0]["step"] if state else 0
        for i, (m, v) in enumerate(moments):
            m.copy_(state[i]["m"] if state else torch.zeros(()))
            v.copy_(state[i]["v"] if state else torch.zeros(()))

    def _moments(self):
        """Return both moments of each parameter, as views of the buffers."""
        return [pair for flat in self.flat for pair in zip(flat.views(flat.m), flat.views(flat.v), strict=True)]

    def _names(self):
        """Return the names of the parameters, if the groups were given with names."""
        return [name for group in self.param_groups for name in group.get("param_names", ())]


class SignRows(Plain):
    """Sign descent with decoupled decay on the rows of an nn.Embedding(.., sparse=True) that a batch has used.

    Other rows do not change. All ranks take the same step; each must have looked up the same number of rows. This is
    the optimizer of the puzzle table in the Tiny Recursive Model (arXiv 2510.04871). It has no state.
    """

    def __init__(self, groups, *, lr, weight_decay=0.0):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    def gradients(self):
        """Return the values of each sparse gradient of this rank."""
        return [p.grad._values() for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                index, gradient = gather_rows(p.grad._indices()[0]), gather_rows(p.grad._values())
                # Sums rows in a fixed order, unlike index_add_. A row that was used twice is written twice, with the
                # same value; merging duplicates would make the host wait for their number.
                total = (index[:, None] == index).to(gradient.dtype) @ gradient
                shrunk = p[index] * (1 - group["lr"] * group["weight_decay"])
                p[index] = shrunk - group["lr"] * total.sign()
