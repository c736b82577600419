"""What the ranks of a run tell each other, and weights that they share (FSDP2).

Every function may be called in a run of one process too, where it does nothing or returns what it was given. All ranks
must call each of them, in the same order.
"""

import contextlib
import copy
import weakref

import torch
import torch.distributed as dist
from torch.nn import ModuleList, Parameter

from data_utils.checkpoint import full_tensor
from data_utils.errors import UsageError
from data_utils.files import warn

LARGE = 2e9  # parameters from which on a gathered model may not fit the machine
TWINS = weakref.WeakKeyDictionary()  # sharded model -> its modules without memory, for evaluations


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def max_over_ranks(*numbers):
    """Return the maximum of each number, so that ranks skip, save and leave at the same step."""
    return _reduce(numbers, dist.ReduceOp.MAX)


def sum_over_ranks(*numbers):
    """Return the sum of each number."""
    return _reduce(numbers, dist.ReduceOp.SUM)


def _reduce(numbers, operation):
    if world_size() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, operation)
    return numbers.tolist()


def gather(part):
    """Return a list with the `part` of every rank: plain Python or CPU tensors."""
    parts = [part] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, part)
    return parts


def average_gradients(parameters):
    """Average the gradients of parameters that DistributedDataParallel does not know."""
    if world_size() == 1:
        return
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def shard(model, optimizer="adamw"):
    """Let each rank keep a part of every weight of `model`, in place. Build the optimizer of these parts, afterwards.

    Children of a ModuleList are gathered when they are called, and again in the backward pass. The rest, tied weights
    too, is gathered in the forward pass and kept. PyTorch FSDP, arXiv 2304.11277. Raises UsageError for an optimizer
    that needs whole matrices (muon) or blocks of its own (adamw_8bit).
    """
    if optimizer != "adamw":
        raise UsageError(f"--fsdp with --optimizer {optimizer}, which needs whole weights\ntry: --optimizer adamw")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes half a second

    empty = {id(p): Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    TWINS[model] = copy.deepcopy(model, empty).to("meta")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    lists = [part for part in model.modules() if isinstance(part, ModuleList)]
    for child in (child for part in reversed(lists) for child in part if not isinstance(child, ModuleList)):
        fully_shard(child, mesh=mesh)
        if hasattr(child, "keys"):  # of what a decoder reads: called by itself, before the child
            register_fsdp_forward_method(child, "keys")
    fully_shard(model, mesh=mesh)
    count = sum(p.numel() for p in model.parameters())
    if count > LARGE and dist.get_rank() == 0:
        warn(f"{count / 1e9:.1f} billion parameters: a save takes {12 * count / 1e9:.0f} GB of memory on the CPU")


@contextlib.contextmanager
def full_weights(model):
    """`with full_weights(model) as full_model:` a model in eval mode, with all weights on every rank.

    Each rank may call it as often as it likes, and any of its methods. Afterwards `model` trains on.
    """
    full_model = model
    if model in TWINS:
        full_model = TWINS[model].to_empty(device=next(model.parameters()).device)
        parts = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, weight in (*full_model.named_parameters(), *full_model.named_buffers()):
            weight.data.copy_(full_tensor(parts[name].detach()))
    full_model.eval()
    try:
        yield full_model
    finally:
        model.train()
        if model in TWINS:
            full_model.to("meta")


def close():
    """Leave the process group.

    Gloo's stays until the process ends (`launch`): its thread may still hold tensors of the last reduction and wait for
    the interpreter, which would wait for that thread while it destroys the group.
    """
    if world_size() > 1 and dist.get_backend() == "nccl":
        dist.destroy_process_group()
