"""Simulate a missing device: tensors on the CPU that claim to be on "cuda" or "mps".

Within `pretend("cuda")`, torch reports a GPU, and whole scripts run as if on it. Operations that
would fail there raise here too: mixing tensors of two devices, converting a tensor of the device to
NumPy, and float64 on MPS. Non-blocking copies that would silently give wrong values also raise:
they may be read before they are complete, or from freed memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
# Functions whose arguments may be on several devices
OF_SEVERAL_DEVICES = {
    "copy_", "to", "type_as", "__getitem__", "__setitem__", "index_put_", "set_", "__set__",
    "is_set_to", "_has_compatible_shallow_copy_type", "__deepcopy__", "__repr__", "__format__",
}  # fmt: skip
# Functions whose result is on the device of the first argument
LIKE_THE_FIRST = {"copy_", "__deepcopy__", "__getitem__", "__setitem__", "index_put_"}


def device_of(tensor: torch.Tensor) -> torch.device:
    return getattr(tensor, "_pretended", CPU)


def place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Make a tensor claim to be on a device."""
    with torch._C.DisableTorchFunction():
        if device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        tensor._pretended = device
    return tensor


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in tuples, lists and dicts; torch's tree_leaves takes far longer."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


class PretendedDevice(TorchFunctionMode):
    """Tracks the claimed device of each tensor through all torch operations."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)

    def resolve(self, target: Any) -> torch.device:
        target = torch.device(target)
        if target.type not in ("cpu", self.device.type):
            raise AssertionError(f"there is no {target} here")
        return CPU if target.type == "cpu" else self.device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, owner = function.__name__, getattr(function, "__self__", None)
        attribute = getattr(owner, "__name__", "")  # the property, if a getter or setter is called
        if name == "__get__" and attribute == "device":
            return device_of(args[0])
        if name == "__get__" and attribute in ("is_cuda", "is_mps", "is_cpu"):
            return device_of(args[0]).type == attribute.removeprefix("is_")
        if name == "__get__" and attribute == "grad":
            gradient = function(*args)
            return gradient if gradient is None else place(gradient, device_of(args[0]))
        if name == "__set__" and attribute == "data":
            function(*args)
            return place(args[0], device_of(args[1]))

        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        self.check_devices(name, tensors, args)
        target = self.target_of(name, args, kwargs)
        if name in ("to", "cpu", "cuda"):
            return self.copy(function, args, kwargs, target)
        if target is not None:
            kwargs["device"] = CPU
        result = function(*args, **kwargs)
        if target is None:
            first = tensors[:1] if name in LIKE_THE_FIRST else tensors
            target = next((d for d in map(device_of, first) if d != CPU), CPU)
        for tensor in tensors_in(result):
            place(tensor, target)
        return result

    def check_devices(self, name: str, tensors: list[torch.Tensor], args: tuple) -> None:
        """Raise torch's errors for mixed devices, and for NumPy from a tensor off the CPU."""
        if name in ("numpy", "__array__") and device_of(args[0]) != CPU:
            raise TypeError(f"can't convert {device_of(args[0])} device type tensor to numpy")
        numbers_may_differ = [t for t in tensors if t.dim() or device_of(t) != CPU]
        if name not in OF_SEVERAL_DEVICES and len(set(map(device_of, numbers_may_differ))) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device (in {name})")
        if (
            name == "__getitem__"
            and device_of(args[0]) == CPU
            and set(map(device_of, tensors)) != {CPU}
        ):
            raise RuntimeError("indices should be either on cpu or on the device of the tensor")

    def target_of(self, name: str, args: tuple, kwargs: dict) -> torch.device | None:
        """Return the device that a call requests, or None."""
        if name in ("cpu", "cuda"):
            return self.resolve(name)
        if kwargs.get("device") is not None:
            return self.resolve(kwargs["device"])
        if name in ("to", "type_as"):
            for value in args[1:]:
                if isinstance(value, (torch.device, str)):
                    return self.resolve(value)
                if isinstance(value, torch.Tensor):
                    return device_of(value)
        return None

    def copy(self, function, args, kwargs, target: torch.device | None) -> torch.Tensor:
        """Copy or convert a tensor as .to(), .cpu() and .cuda() do."""
        source = args[0]
        target = device_of(source) if target is None else target
        if target != device_of(source):
            non_blocking = kwargs.get("non_blocking") or any(value is True for value in args[1:])
            if non_blocking and target.type != "cuda":
                raise AssertionError(f"a non-blocking copy to {target}: it may read freed memory")
        if function is torch.Tensor.cuda:
            return place(source.clone(), target)
        if "device" in kwargs:
            kwargs["device"] = CPU
        is_device = (torch.device, str)
        result = function(*(CPU if isinstance(arg, is_device) else arg for arg in args), **kwargs)
        if result is source and target != device_of(source):
            result = source.clone()
        return place(result, target)


@contextlib.contextmanager
def pretend(kind: str) -> Iterator[None]:
    """Make torch report one device of this kind, cuda or mps, and no other except the CPU."""
    real_autocast = torch.autocast

    def autocast(device_type: str, dtype: torch.dtype, **options: Any):
        assert (device_type, kind) != ("mps", "cuda") and device_type != "cpu", device_type
        return real_autocast("cpu", dtype=dtype, **options)

    def untouched(method):
        """Let a torch method compute on the CPU without device tracking."""

        @functools.wraps(method)
        def call(*args, **kwargs):
            with torch._C.DisableTorchFunction():
                return method(*args, **kwargs)

        return call

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "autocast", autocast),
        (torch.cuda, "is_available", lambda: kind == "cuda"),
        (torch.cuda, "device_count", lambda: int(kind == "cuda")),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "get_device_name", lambda device: "a pretended GPU"),
        (torch.cuda, "get_arch_list", lambda: ["sm_90"]),
        (torch.cuda, "get_device_capability", lambda device: (9, 0)),
        (torch.cuda, "mem_get_info", lambda device=None: (8 * 10**9, 8 * 10**9)),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.backends.mps, "is_available", lambda: kind == "mps"),
        (torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone()),
        (torch.Tensor, "is_pinned", lambda tensor, device=None: True),
        (torch.optim.AdamW, "step", untouched(torch.optim.AdamW.step)),
    ]
    for name in ("scale", "unscale_", "step", "update"):
        replaced.append(
            (torch.amp.GradScaler, name, untouched(getattr(torch.amp.GradScaler, name)))
        )
    for name in ("is_available", "current_accelerator", "current_device_index", "set_device_index"):
        if hasattr(torch, "accelerator"):
            answers = {"is_available": True, "current_accelerator": torch.device(kind)}
            answer = answers.get(name, 0)
            replaced.append((torch.accelerator, name, lambda *_, answer=answer, **__: answer))
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            replaced.append((torch.optim.Optimizer, name, lambda optimizer: None))
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(PretendedDevice(kind))
        yield
