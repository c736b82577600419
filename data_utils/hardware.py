"""Device, precision and processes of a run: chosen once, printed once."""

import contextlib
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import ModuleList, Parameter
from torch.nn.parallel import DistributedDataParallel

from data_utils.checkpoint import full_tensor
from data_utils.errors import UsageError
from data_utils.files import warn

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
TORCHRUN = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"  # set beside WORLD_SIZE
LARGE = 2e9  # parameters from which on a gathered model may not fit the machine


class Hardware:
    """`device` (auto, cpu, cuda, cuda:1, mps) and `precision` (bf16, fp16, fp32) as asked -> what there is.

    bf16 is taken on CUDA from capability 8.0 on and on CPUs with avx512_bf16 or amx, else fp16 with a GradScaler on
    CUDA, else fp32. Under torchrun the process group is started. fsdp: `shard` shares the weights among its processes.
    Raises UsageError when the device is not there, or there is one process to share among.
    """

    def __init__(self, device, precision, fsdp=False):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.fsdp, self.twin = fsdp, None
        lacking = [name for name in TORCHRUN if name not in os.environ]
        if self.world > 1 and lacking:
            missing = ", ".join(lacking)
            raise UsageError(
                f"WORLD_SIZE is {self.world}, but {missing} not set: left over from another job?\n"
                "try: unset WORLD_SIZE, or start with torchrun"
            )
        if fsdp and self.world == 1:
            raise UsageError("--fsdp shares a model among processes, and this is the only one\n"
                             f"try: torchrun --standalone --nproc-per-node 2 {' '.join(sys.argv)}")  # fmt: skip
        if device == "auto":
            mps = torch.backends.mps.is_available()
            device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        if device.startswith("cuda:") and self.world > 1:
            raise UsageError(f"--device {device} puts all {self.world} processes on one GPU\ntry: --device cuda")
        if device == "cuda" and torch.cuda.is_available():  # set_device takes no device without an index
            device = f"cuda:{os.environ['LOCAL_RANK'] if self.world > 1 else torch.cuda.current_device()}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            reason = str(e).splitlines()[0]
            raise UsageError(f"--device {device} can't be used: {reason}\ntry: --device cpu") from e
        kind = self.device.type
        if kind == "cuda":  # by generation: is_bf16_supported() says yes to a T4, which only emulates it
            capability = torch.cuda.get_device_capability(self.device)
            fast, reason = capability >= (8, 0), f"CUDA capability {capability[0]}.{capability[1]}"
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32, from capability 8.0 on
            reason += ", TF32" * fast
        else:
            has = [n for n in ("avx512_bf16", "amx_tile") if getattr(torch.cpu, f"_is_{n}_supported", bool)()]
            fast, reason = kind == "cpu" and bool(has), f"{kind} with {has[0]}" if has else f"{kind} without bf16 units"
        if precision == "bf16" and not fast:
            precision = "fp16"
        self.precision = "fp32" if precision == "fp16" and kind != "cuda" else precision
        if self.world > 1 and not dist.is_initialized():
            # a restarted group (--max-restarts) must not find the addresses of the one before, which torchrun keeps
            store, rank, world = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)
        self.autocast = torch.autocast(kind, DTYPES[self.precision], enabled=self.precision != "fp32")
        self.scaler = torch.amp.GradScaler(kind, enabled=self.precision == "fp16")
        self.reason = f"{self.device}, {self.precision} ({reason})" + f", {self.world} processes" * (self.world > 1)
        self.reason += " that share the weights" * fsdp

    def shard(self, model, optimizer="adamw"):
        """With fsdp, keep a part of each weight of `model`, in place; the optimizer is built of these parts, later.

        Children of a ModuleList are gathered when they are called, and again in the backward pass; what else there is,
        tied weights too, stays whole from the forward pass on. PyTorch FSDP, arXiv 2304.11277. Raises UsageError for an
        optimizer that needs whole matrices (muon) or blocks of its own (adamw_8bit).
        """
        if not self.fsdp:
            return
        if optimizer != "adamw":
            raise UsageError(f"--fsdp with --optimizer {optimizer}, which needs whole weights\ntry: --optimizer adamw")
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # half a second

        without = {id(p): Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        self.twin = copy.deepcopy(model, without).to("meta")
        how = dict(mesh=init_device_mesh(self.device.type, (self.world,)))
        lists = [part for part in model.modules() if isinstance(part, ModuleList)]
        for child in (child for part in reversed(lists) for child in part if not isinstance(child, ModuleList)):
            fully_shard(child, **how)
            if hasattr(child, "keys"):  # of what a decoder reads: called by itself, before the child
                register_fsdp_forward_method(child, "keys")
        fully_shard(model, **how)
        count = sum(p.numel() for p in model.parameters())
        if count > LARGE and self.rank == 0:
            warn(f"{count / 1e9:.1f} billion parameters: a save takes {12 * count / 1e9:.0f} GB of memory on the CPU")

    def wrap(self, model, compile=False):
        """Return `model` as it is called in training: compiled on request, with gradients averaged over ranks.

        compile: whether, or a mode of torch.compile.
        """
        model = torch.compile(model, mode=compile if isinstance(compile, str) else None) if compile else model
        return DistributedDataParallel(model) if self.world > 1 and not self.fsdp else model

    def travel(self, model, last):
        """Average gradients in the next backward pass of what `wrap` returned only if it is the `last` of a step."""
        if self.fsdp:
            model.set_requires_gradient_sync(last)
        else:
            model.require_backward_grad_sync = last  # read by DDP

    @contextlib.contextmanager
    def whole(self, model):
        """`with hardware.whole(model) as whole:` in eval mode, with all weights on every rank; then training goes on.

        So ranks may call it as often as each likes, and any of its methods.
        """
        whole = model if self.twin is None else self.twin.to_empty(device=self.device)
        if self.twin is not None:
            now = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, part in (*whole.named_parameters(), *whole.named_buffers()):
                part.data.copy_(full_tensor(now[name].detach()))
        whole.eval()
        try:
            yield whole
        finally:
            model.train()
            if self.twin is not None:
                self.twin.to("meta")

    def largest(self, *numbers):
        """The maximum of each over all ranks, so that they skip, save and leave at the same step."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def total(self, *numbers):
        """The sum of each over all ranks."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def average(self, parameters):
        """Average gradients over ranks, of what is not called through `wrap`."""
        for parameter in parameters if self.world > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def gather(self, part):
        """A list with every rank's `part`: plain Python or CPU tensors."""
        parts = [part] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, part)
        return parts

    def _reduce(self, numbers, how):
        if self.world == 1:
            return list(numbers)
        device = self.device if dist.get_backend() == "nccl" else "cpu"
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(numbers, how)
        return numbers.tolist()

    def close(self):
        """Leave the process group.

        Gloo's stays until the process ends (`launch.launch`): its thread may still hold tensors of the last reduction
        and wait for the interpreter, which would wait for that thread while it destroys the group.
        """
        if self.world > 1 and dist.get_backend() == "nccl":
            dist.destroy_process_group()
