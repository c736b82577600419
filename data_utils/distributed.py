"""Collectives: numbers and objects over all ranks of a run, and sharded weights (FSDP2).

All ranks must call each function, in the same order. In a run of one process they do nothing or return their argument.
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

LARGE = 2e9  # parameters above which the full model may not fit into memory
TWINS = weakref.WeakKeyDictionary()  # sharded model -> the same modules on the meta device, for evaluation


def world_size():
    """Return the number of ranks."""
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
    """Return a list with the `part` of every rank, which holds plain Python or CPU tensors."""
    parts = [part] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, part)
    return parts


def average_gradients(parameters):
    """Average over ranks the gradients of parameters outside DistributedDataParallel."""
    if world_size() == 1:
        return
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def shard(model, optimizer="adamw"):
    """Shard every weight of `model` over the ranks, in place (PyTorch FSDP, arXiv 2304.11277).

    Build the optimizer afterwards, from the sharded parameters. Children of a ModuleList are gathered when they are
    called, and again in the backward pass. The other weights, tied ones too, are gathered in the forward pass and
    kept. Raises UsageError for an optimizer that needs full matrices (muon) or its own blocks (adamw_8bit).
    """
    if optimizer != "adamw":
        raise UsageError(f"--fsdp with --optimizer {optimizer}, which needs full weights\ntry: --optimizer adamw")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # half a second

    empty = {id(p): Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    TWINS[model] = copy.deepcopy(model, empty).to("meta")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    lists = [part for part in model.modules() if isinstance(part, ModuleList)]
    children = [child for part in reversed(lists) for child in part if not isinstance(child, ModuleList)]
    for child in children:
        fully_shard(child, mesh=mesh)
        if hasattr(child, "keys"):  # a decoder calls this method before the child itself
            register_fsdp_forward_method(child, "keys")
    fully_shard(model, mesh=mesh)
    count = sum(p.numel() for p in model.parameters())
    if count > LARGE and dist.get_rank() == 0:
        warn(f"{count / 1e9:.1f} billion parameters: a save takes {12 * count / 1e9:.0f} GB of memory on the CPU")


@contextlib.contextmanager
def full_weights(model):
    """`with full_weights(model) as full_model:` gives a model in eval mode with all weights on every rank.

    Each rank may call any of its methods, any number of times. Afterwards `model` is in train mode again.
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
    """Leave the process group, unless it is Gloo's, which stays until the process ends (see `launch`).

    Gloo's thread may still hold tensors of the last reduction. It waits for the interpreter, and destroying the group
    would make the interpreter wait for that thread.
    """
    if world_size() > 1 and dist.get_backend() == "nccl":
        dist.destroy_process_group()
