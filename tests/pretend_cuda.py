"""Run a program of this repository on a pretended CUDA device, where there is none: with torch's CPU build and g++.

    python tests/pretend_cuda.py grpo --root out --max_steps 2 --out out/pretended
    python tests/pretend_cuda.py pytest tests -k cuda

Tensors say that they are on cuda:0 and hold their values on the CPU. An operation on tensors of both devices fails as on CUDA;
autocast is CUDA's, in bf16; a CUDA graph records the operations of a step, takes back what they wrote, and replays them, so a
number of Python's that changes from token to token would be frozen in it. Several processes are several devices; gloo stands in
for NCCL. At the end: graphs, replays, and how often the program waited for the device. Not shown: CUDA's kernels, their speed and
memory, and NCCL.
"""
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

# Autograd asks C++ for the device and its streams.
LIBRARY = """
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
static Device cuda() { return Device(DeviceType::CUDA, 0); }
static Stream stream() { return Stream(Stream::DEFAULT, cuda()); }
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return cuda(); }
  Device getDevice() const override { return cuda(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
};
static c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace at::accelerator {
std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
bool isAccelerator(DeviceType d) { return d == DeviceType::CUDA; }
}
"""
PRELOADED = "PRETENDED_CUDA"  # in the environment of a process that has the library
CUDA = torch.device("cuda", 0)
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_unique2",
         "_assert_async")
MIXES = "copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"  # take tensors of both devices
counts = Counter()
recording = None  # the graph that is being captured


class Pretend(torch.Tensor):
    """A tensor of cuda:0; `held` has its values, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=CUDA, requires_grad=False)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.tolist:
            counts["tolist"] += 1
            return args[0].held.tolist()
        if func == torch.Tensor.numpy:
            raise TypeError("can't convert a tensor of CUDA to numpy")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs or {})
        if func == torch.Tensor.data.__set__:
            args[0].held = args[1].held
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)

    def storage(self):
        return self.held.storage()

    def untyped_storage(self):
        return self.held.untyped_storage()


def dispatch(func, args, kwargs):
    """One operation, computed on the CPU."""
    name, asked = func.overloadpacket.__name__, kwargs.get("device")
    flat, _ = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, Pretend)]
    theirs = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Pretend)]
    if ours and any(x.dim() for x in theirs) and name not in MIXES:
        raise RuntimeError(f"expected all tensors on one device: {func} of a CPU's of {[tuple(x.shape) for x in theirs]}")
    if name == "_fused_sdp_choice":
        return 0  # attention in plain operations
    args, kwargs = (tree_map(lambda x: x.held if isinstance(x, Pretend) else x, x) for x in (args, kwargs))
    to_cuda = bool(ours) if asked is None else torch.device(asked).type == "cuda"
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    if name == "copy_" and ours and flat[0] is not ours[0]:
        to_cuda = False
    if name in WAITS:
        counts[name] += 1
    if recording is not None:
        if name in WAITS or name in ("copy_", "_to_copy") and (theirs or not to_cuda):
            raise RuntimeError(f"{name} in a graph: it waits for the device, or copies from one to the other")
        if func._schema.is_mutable:
            recording.before.append((args[0], args[0].clone()))
    out = func(*args, **kwargs)
    if recording is not None:
        recording.operations.append((func, args, kwargs, out))
    known = {id(x.held): x for x in ours}  # an operation in place answers with what it was given

    def wrapped(x):
        if id(x) in known:
            return known[id(x)]
        return Pretend(x) if to_cuda else x
    return tree_map_only(torch.Tensor, wrapped, out)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch would do in C++ before any operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).long(), *args[2:])
        if func == torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], CUDA)

        def numbered(x):
            cuda = x == "cuda" if isinstance(x, str) else isinstance(x, torch.device) and x.type == "cuda"
            return CUDA if cuda else x
        if func == torch.Tensor.to or "device" in kwargs:
            args = tuple(numbered(x) for x in args)
            kwargs = {name: numbered(x) for name, x in kwargs.items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            args = tree_map(lambda x: x.item() if isinstance(x, Pretend) and x.dim() == 0 else x, args)
            return func(*args, **kwargs | dict(device="cpu")).to(CUDA)
        return func(*args, **kwargs)


class Graph:
    def __init__(self):
        self.operations, self.before = [], []
        counts["graphs"] += 1

    def replay(self):
        counts["replays"] += 1
        for func, args, kwargs, old in self.operations:
            new = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for a, b in zip(tree_flatten(old)[0], tree_flatten(new)[0], strict=True):
                if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():
                    a.copy_(b)


@contextlib.contextmanager
def capture(graph, **_):
    global recording
    recording = graph
    try:
        yield
    finally:
        recording = None
        for tensor, old in reversed(graph.before):
            tensor.copy_(old)


def backward(loss):
    """Straight to the engine: torch's own way there switches the modes below off, which checkpointed layers need."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.asked = torch.device(device)
        return made

    device = property(lambda self: self.asked)


def on_gloo(call):
    """A collective of torch.distributed on the values that a pretended tensor holds."""
    def called(tensor, *args, **knobs):
        return call(tensor.held if isinstance(tensor, Pretend) else tensor, *args, **knobs)
    return called


@contextlib.contextmanager
def pretended():
    answers = dict(is_available=True, device_count=8, is_bf16_supported=True, set_device=None, current_device=0, synchronize=None,
                   max_memory_allocated=0, reset_peak_memory_stats=None, _lazy_init=None, set_stream=None, current_stream=None)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(f"torch.cuda.{name}", lambda *_, answer=answer, **__: answer))
        for name, stand_in in (("Generator", Generator), ("Tensor.backward", backward), ("cuda.CUDAGraph", Graph), ("cuda.graph", capture)):
            stack.enter_context(patch(f"torch.{name}", stand_in))
        for name in ("all_reduce", "broadcast"):
            stack.enter_context(patch(f"torch.distributed.{name}", on_gloo(getattr(dist, name))))
        stack.enter_context(patch("torch.distributed.init_process_group", lambda _, started=dist.init_process_group, **knobs:
                                  started("gloo", **knobs)))
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(Functions())
        stack.enter_context(Operations())
        yield


def compiled(folder):
    """LIBRARY, to be preloaded -> its path. OSError or CalledProcessError where it can't be compiled."""
    root, source, library = Path(torch.__file__).parent, Path(folder, "cuda.cpp"), Path(folder, "cuda.so")
    source.write_text(LIBRARY)
    subprocess.run(["g++", "-std=c++20", "-w", "-shared", "-fPIC", "-I", root / "include", source, "-o", library,
                    "-L", root / "lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"], check=True)
    return library


def preloading(library):
    """The environment of a process that has it."""
    return os.environ | {PRELOADED: library, "LD_PRELOAD": library}


def main():
    if PRELOADED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            again = subprocess.run([sys.executable, *sys.argv], env=preloading(str(compiled(folder))))
            sys.exit(again.returncode)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with pretended():
        code = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
    print(dict(counts), flush=True)
    # Not sys.exit: a thread of gloo's that lets go of one of these tensors while the interpreter ends would abort the process.
    os._exit(code or 0)


if __name__ == "__main__":
    main()
