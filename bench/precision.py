"""What the axis `precision` means to PyTorch: dtypes, autocast, TF32."""

import contextlib
from collections.abc import Iterator

import torch

AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, PyTorch casts as `precision` says; nothing happens where it is no `amp_…`."""
    dtype = AUTOCAST.get(precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


def dtype_of(precision: str) -> torch.dtype:
    """What weights and images are stored in; under autocast that is float32."""
    return _DTYPE.get(precision, torch.float32)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means IEEE fp32 inside: cuDNN convolutions would run TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    allow_tf32(allow=False)
    try:
        yield
    finally:
        allow_tf32(allow=before)


def allow_tf32(*, allow: bool) -> None:
    """Whether products and convolutions of float32 may round their factors to TF32, in this process."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
