"""A GPU that is not there: runs scripts on tensors that say cuda:0 or mps:0 and keep their numbers on the CPU.

It refuses what real devices refuse: CPU tensors beside those of the device, a generator of the other device, .numpy(),
float64 on mps, torch.cuda.set_device without an index. Autograd, autocast, GradScaler and optimizers are torch's own.
It says nothing of speed, memory, kernels, torch.compile, NCCL, DDP and FSDP.

    simulate("cuda", (8, 0), [["train_ae.py", "epochs=1"], ...], folder)    # each command in a fork, one torch import

A tensor class wraps a tensor of the CPU; a dispatch mode and a function mode see every call. Torch looks up what a
device offers in C++: SHIM registers just enough there, and is built with g++ once per version of torch.
"""

import ctypes
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
# imported before the forks: what the scripts import
MODULES = (
    "torch._dynamo matplotlib.pyplot tokenizers faiss numpy generate plot train_expert train_mla train_hrm train_sr"
)
MODULES += (
    " train_ae train_multimodal data_utils.formulas.generate data_utils.events.generate data_utils.pages.generate"
)
MODULES += " data_utils.text.generate data_utils.reasoning.generate"

SHIM = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <cstring>
using namespace c10;

template <DeviceType kind> struct Guard final : impl::DeviceGuardImplInterface {
  static Device only() { return Device(kind, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, only()); }
  DeviceType type() const override { return kind; }
  Device exchangeDevice(Device) const override { return only(); }
  Device getDevice() const override { return only(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

template <class Interface> struct Hooks : Interface {
  virtual const char* name() const = 0;
  bool asked() const { return !strcmp(getenv("SIMULATED_DEVICE"), name()); }
  void init() const override {}
  bool isBuilt() const override { return asked(); }
  bool isAvailable() const override { return asked(); }
  bool hasPrimaryContext(DeviceIndex) const override { return asked(); }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

namespace at {  // torch looks these two up by the names of the classes
struct CUDAHooks : Hooks<CUDAHooksInterface> {
  CUDAHooks(CUDAHooksArgs) {}
  const char* name() const override { return "cuda"; }
  bool hasCUDA() const override { return asked(); }
};
struct MPSHooks : Hooks<MPSHooksInterface> {
  const char* name() const override { return "mps"; }
  bool hasMPS() const override { return asked(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
REGISTER_MPS_HOOKS(MPSHooks)
}
C10_REGISTER_GUARD_IMPL(CUDA, Guard<DeviceType::CUDA>)
C10_REGISTER_GUARD_IMPL(MPS, Guard<DeviceType::MPS>)
"""


# ---- in the test -----------------------------------------------------------------------------------------------------


def build(folder):
    """Build SHIM in `folder` for this version of torch, unless it is there -> its path; None without a g++."""
    import torch

    compiler, library = shutil.which("g++"), Path(folder, f"simulated-{torch.__version__}.so")
    if not compiler or library.exists():
        return library if compiler else None
    home, unfinished = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
    library.parent.mkdir(parents=True, exist_ok=True)
    paths = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    words = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(unfinished), *paths]
    subprocess.run([*words, "-lc10", "-ltorch_cpu"], input=SHIM, text=True, check=True)
    unfinished.replace(library)  # other workers of pytest may build it at the same time
    return library


def simulate(library, kind, capability, commands, folder):
    """Run commands [script, *flags] one after the other in `folder` -> [(status, output)]."""
    asked = dict(library=str(library), kind=kind, capability=capability, commands=commands)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), WANDB_MODE="disabled", MPLBACKEND="agg")
    words = [sys.executable, __file__, json.dumps(asked)]
    process = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# ---- in the simulation -----------------------------------------------------------------------------------------------


def simulated(kind, capability):
    """Let torch believe in a device -> the two modes in which it is there."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, here = torch.ops.aten, torch.device(kind, 0)
    copies = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
    indexing = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
    attention = torch.nn.functional.scaled_dot_product_attention

    class DeviceTensor(torch.Tensor):
        """What says that it is on the device; `host` has the numbers."""

        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, host):
            layout = dict(dtype=host.dtype, layout=host.layout, device=here)
            if host.layout is torch.strided:
                layout |= dict(strides=host.stride(), storage_offset=host.storage_offset())
            tensor = torch.Tensor._make_wrapper_subclass(cls, host.shape, **layout)
            tensor.host = host
            return tensor

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return run(func, args, kwargs or {})

        def __deepcopy__(self, memo):
            with torch.no_grad():
                twin = DeviceTensor(self.host.detach().clone())
            if getattr(self, "_is_param", False):
                twin = torch.nn.Parameter(twin, self.requires_grad)
            memo[id(self)] = twin
            return twin

        def __format__(self, how):  # as a torch.Tensor does it
            return format(self.item() if self.dim() == 0 else str(self.host), how)

    def leaves(values):
        for value in values:
            if isinstance(value, (list, tuple)):
                yield from leaves(value)
            elif isinstance(value, (torch.Tensor, torch.Generator)):
                yield value

    def mapped(function, value):
        if isinstance(value, (list, tuple)):
            return type(value)(mapped(function, part) for part in value)
        return function(value) if isinstance(value, torch.Tensor) else value

    def to_host(tensor):
        return tensor.host if isinstance(tensor, DeviceTensor) else tensor

    def to_device(tensor):
        if isinstance(tensor, DeviceTensor):
            return tensor
        if kind == "mps" and tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return DeviceTensor(tensor)

    def is_here(device):
        return device is not None and torch.device(device).type == kind

    def check(func, args, tensors):
        """Raise RuntimeError if tensors of both devices meet: but numbers, copies, and indices from the CPU may."""
        strangers = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim()]
        if func in indexing:
            if not isinstance(args[0], DeviceTensor):
                raise RuntimeError(f"indices should be on the same device as the indexed tensor (cpu): {func}")
            strangers = [t for t in leaves(args[2:]) if not isinstance(t, DeviceTensor) and t.dim()]
        if strangers and func not in copies:
            raise RuntimeError(f"Expected all tensors to be on the same device, {here}, not on the CPU: {func}")

    @functools.cache
    def written(func):
        """Which arguments an operation changes: places and names."""
        arguments = func._schema.arguments
        return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(func, args, kwargs):
        """An operation on the device: done with what the tensors have on the CPU."""
        tensors = [leaf for leaf in leaves((*args, *kwargs.values())) if isinstance(leaf, torch.Tensor)]
        ours = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if ours:
            check(func, args, tensors)
        device = kwargs.get("device", here if ours else None)
        named = {name: mapped(to_host, value) for name, value in kwargs.items() if name != "non_blocking"}
        named |= dict(device="cpu") if named.get("device") is not None else {}
        result = func(*mapped(to_host, args), **named)
        if func._schema.is_mutable:
            changed = [args[i] if i < len(args) else kwargs.get(name) for i, name in written(func)]
            for tensor in leaves(changed):
                if isinstance(tensor, DeviceTensor) and tensor.shape != tensor.host.shape:
                    raise NotImplementedError(f"{func} changes a shape in place")
            returns = func._schema.returns
            if not returns or all(value.alias_info is not None for value in returns):
                return (changed[0] if len(returns) == 1 else tuple(changed)) if returns else None
        if func is aten._local_scalar_dense.default or not is_here(device):
            return result
        return mapped(to_device, result)

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if is_here(kwargs.get("device")) or DeviceTensor in types:
                return run(func, args, kwargs)
            return func(*args, **kwargs)

    class DeviceGenerator(torch.Generator):
        """One that says whose it is; it draws as those of the CPU."""

        def __new__(cls, device="cpu"):
            generator = super().__new__(cls)
            generator.of = torch.device(device)
            return generator

        def __init__(self, device="cpu"):
            pass

        device = property(lambda self: self.of)

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        """Attention by its definition: what a device has for it isn't there."""
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        with torch.autocast(kind, enabled=False):
            return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, **more)[0]

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            device, seen = kwargs.get("device"), list(leaves((*args, *kwargs.values())))
            ours = is_here(device) or any(isinstance(value, DeviceTensor) for value in seen)
            for generator in (value for value in seen if isinstance(value, torch.Generator)):
                if is_here(generator.device) != ours and generator not in args[:1]:
                    wanted = here if ours else "cpu"
                    raise RuntimeError(
                        f"Expected a '{wanted}' device type for generator but found '{generator.device}'"
                    )
            if not ours:
                return func(*args, **kwargs)
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError(f"can't convert {here} device type tensor to numpy. Use Tensor.cpu() first")
            if func is torch.Tensor.tolist:
                return args[0].detach().cpu().tolist()
            if func is attention:
                return attend(*args, **kwargs)
            if func is torch.Tensor.data.__set__:
                args[0].host = to_host(args[1])
            if func in (torch.tensor, torch.as_tensor) and is_here(device):
                result = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
                return result.to(device)
            return func(*args, **kwargs)

    def moved(module, function, recurse=True, memo=None):
        """Module._apply whose parameters stay tied: on real devices they stay the same objects."""
        memo = {} if memo is None else memo
        for child in module.children():
            moved(child, function, True, memo)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in memo:
                with torch.no_grad():
                    new = function(parameter)
                if type(new) is type(parameter) is torch.nn.Parameter:
                    new = torch.nn.Parameter(new, parameter.requires_grad)
                elif new is not parameter:
                    new = torch.nn.Parameter(new.detach(), parameter.requires_grad)
                memo[id(parameter)] = parameter, new  # with the old one, so that no other takes its id
            if parameter is not None:
                module._parameters[name] = memo[id(parameter)][1]
        module._buffers.update({name: b if b is None else function(b) for name, b in module._buffers.items()})
        return module

    torch.Generator, torch.nn.Module._apply = DeviceGenerator, moved
    if kind == "mps":
        torch.backends.mps.is_available = lambda: True
        return Functions(), Dispatch()

    def set_device(device):
        torch.cuda._utils._get_device_index(device)  # raises ValueError for one without an index, as torch does

    known = dict(is_available=True, device_count=1, current_device=0, get_device_capability=tuple(capability))
    known |= dict(get_device_name="simulated", max_memory_allocated=0, _lazy_init=None, is_bf16_supported=True)
    for name, answer in known.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.set_device = set_device
    return Functions(), Dispatch()


def main(library, kind, capability, commands):
    os.environ["SIMULATED_DEVICE"] = kind
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # before torch looks for devices
    functions, dispatch = simulated(kind, capability)
    for name in MODULES.split():
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    sys.modules["data_utils.figures"].plot_losses = lambda *_: None  # curves know no devices and take half a second
    gc.freeze()  # else each fork copies most of it
    results = []
    for number, (script, *flags) in enumerate(commands):
        output = Path(f"{number}.out").absolute()
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            results.append((os.waitstatus_to_exitcode(status), output.read_text()))
            continue
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
        sys.argv, status = [str(ROOT / script), *flags], 0
        try:
            with functions, dispatch:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    print(json.dumps(results))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
