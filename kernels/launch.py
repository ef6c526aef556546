"""Start a Triton kernel: on the GPU, or without one in Triton's interpreter.

`TRITON_INTERPRET=1` is read at every launch, not when a kernel is defined. One process can therefore run kernels
in the interpreter, compile the same kernels for a GPU that is not here, and let torch.compile use Triton, in any order.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.problem import INTERPRETER
from kernels.spec import Compilation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_FIRST_MAJOR = 8  # bf16 tensor cores and cp.async
# The interpreter replaces functions of triton.language while a kernel runs: one kernel at a time.
_ONE_AT_A_TIME = threading.RLock()


def interpreting() -> bool:
    """Whether launches go to the interpreter: the environment says TRITON_INTERPRET=1 at this moment."""
    return bool(triton.knobs.runtime.interpret)


def place(device: torch.device) -> tuple[int, str | None]:
    """Where a launch on `device` goes: (capability as 80, 89, 90, the GPU's name), or (`INTERPRETER`, None).

    Raises:
        NotImplementedError: neither a CUDA device of capability 8.0 or newer nor the interpreter.
    """
    if interpreting():
        return INTERPRETER, None
    if device.type != "cuda":
        raise NotImplementedError(
            f"unsupported: Triton kernels run on a CUDA device; given a tensor on {device}. Move the model and its "
            "input to a GPU, or set TRITON_INTERPRET=1 to interpret them (slow, for tests)"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < _FIRST_MAJOR:
        raise NotImplementedError(
            f"unsupported: the kernels need compute capability 8.0 or newer; {device} has {major}.{minor}. "
            "Use the unfused model"
        )
    return 10 * major + minor, torch.cuda.get_device_name(device)


def ahead(
    kernel: Any,  # noqa: ANN401 - of triton
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int,
) -> Compilation:
    """What Triton would compile for a launch of `kernel` with these arguments; their tensors may be on "meta".

    Args:
        kernel: a function under `@triton.jit`.
        arguments: its run-time arguments by name; tensors and descriptors count as aligned to 16 bytes.
        constants: its constants by name.
        warps: num_warps.
        stages: num_stages.
    """
    types: dict[str, str] = {}
    fixed = dict(constants)
    aligned = []
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    for name, value in arguments.items():
        if value is None or (isinstance(value, int) and value == 1 and name not in unspecialized):
            fixed[name] = value  # Triton makes a constant of an argument that is None or 1
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, TensorDescriptor):
            types[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialized:
                aligned.append(name)
    return Compilation(
        function=kernel, types=types, constants=fixed, aligned=tuple(aligned), warps=warps, stages=stages
    )


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, *args: Any, **options: Any) -> None:  # noqa: ANN401
    """Run `kernel` over `grid` on `device`'s current stream, or in the interpreter.

    Args:
        kernel: a function under `@triton.jit`.
        grid: number of programs along each axis.
        device: where the tensors in `args` live; it becomes the current device for the launch.
        args: the kernel's arguments in order.
        options: its constants by name, num_warps and num_stages.
    """
    if interpreting():
        with _ONE_AT_A_TIME, _device_functions_interpreted():
            interpreter.InterpretedFunction(kernel.fn)[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)


@contextlib.contextmanager
def _device_functions_interpreted() -> Iterator[None]:
    # A kernel calls tl.cdiv, tl.max and helpers of ours. They were wrapped for compilation when the environment said
    # nothing on import, and refuse a plain call; for the length of one launch they are interpreted too.
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return _interpreted(self.fn)(*args, **kwargs)

    # Both modules that they may name are patched here, once: the interpreter would do so at every call, for longer
    # than most of them take.
    patches = interpreter._patch_lang(_names_both)  # noqa: SLF001 - the interpreter has no public way
    original = JITFunction.__call__
    JITFunction.__call__ = call
    try:
        yield
    finally:
        JITFunction.__call__ = original
        patches.restore()


def _names_both() -> tuple[Any, Any]:
    return tl, core


@functools.cache
def _interpreted(function: Any) -> Any:  # noqa: ANN401 - as it is rewritten for the interpreter
    return interpreter.InterpretedFunction(function).rewrite()
