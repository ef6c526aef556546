"""What the device at hand does at its best: a large matrix product in each precision, a large copy.

`python -m bench ceilings` asks; `python -m bench.ceilings FOLDER` measures in a process of its own. Shares of these
are what a figure like MFU means here: a peak from a data sheet may be that of sparse matrices, of another form factor,
or of a clock never reached.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.case import Case
from bench.derive import place_of
from bench.lifeline import stop_with_parent
from bench.readings import Ceiling

if TYPE_CHECKING:
    import torch

# Bytes copied: many times any last-level cache. Sides of the matrices: enough to fill the device. A CPU that multiplies
# no 16 bits takes minutes for those; a product of this many seconds is as good.
COPIED_BYTES = {"gpu": 2**30, "cpu": 2**28}
SIDE = {"gpu": 8192, "cpu": 2048}
LONG_ENOUGH_S = 0.05
# The best of the repeats in so many seconds: a ceiling is what is possible.
SECONDS = 0.5


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Which ceilings: device (`cpu` or `gpu`), CPU threads (0 on a GPU) and precisions, those of cases and `fp8`."""

    device: str
    threads: int
    precisions: tuple[str, ...]


def requests(cases: Sequence[Case], cores: int) -> list[Request]:
    """What must be measured so that each of the cases has its ceiling."""
    wanted: dict[tuple[str, int], dict[str, None]] = {}
    for case in cases:
        device, threads, precision = place_of(case, cores)
        wanted.setdefault((device, threads), {})[precision] = None
    return [
        Request(device=device, threads=threads, precisions=tuple(precisions))
        for (device, threads), precisions in wanted.items()
    ]


def ceilings(request: Request) -> Iterator[Ceiling]:
    """Measure, in this process, which is prepared for nothing else; fp8 only where the device multiplies it."""
    import torch

    if request.threads:
        torch.set_num_threads(request.threads)
    device = torch.device("cuda" if request.device == "gpu" else "cpu")
    copied = _copy_gb_per_s(COPIED_BYTES[request.device], device)
    for precision in request.precisions:
        if precision == "fp8" and not _multiplies_fp8(device):
            continue
        side = SIDE[request.device] if request.device == "gpu" else _side(precision, device)
        seconds = _best_s(_product(precision, side, device), device)
        yield Ceiling(
            device=request.device,
            threads=request.threads,
            precision=precision,
            tflop_per_s=2 * side**3 / seconds / 1e12,
            gb_per_s=copied,
        )


def _side(precision: str, device: "torch.device") -> int:
    """The side of the smallest matrices whose product takes long enough, of those up to the largest."""
    side = 128
    while side < SIDE["cpu"]:
        product = _product(precision, side, device)
        product()
        start = time.perf_counter()
        product()
        if time.perf_counter() - start > LONG_ENOUGH_S:
            break
        side *= 2
    return side


def _multiplies_fp8(device: "torch.device") -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _product(precision: str, side: int, device: "torch.device") -> Callable[[], object]:
    """A matrix product of random numbers: zeros would be faster than anything real."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    if precision != "fp8":
        return functools.partial(torch.mm, left, right, out=torch.empty_like(left))
    one = torch.ones((), device=device)
    narrow = (left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t())  # as cuBLAS wants them: by columns
    # Sums in the registers' own width are what a kernel of ours would use too.
    return functools.partial(
        torch._scaled_mm,  # noqa: SLF001 (no public name of this age)
        *narrow,
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _copy_gb_per_s(size: int, device: "torch.device") -> float:
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_s(functools.partial(target.copy_, source), device) / 1e9


def _best_s(work: Callable[[], object], device: "torch.device") -> float:
    """The shortest of at least three repeats, s, after one that counts for nothing."""
    import torch

    def once() -> float:
        if device.type == "cpu":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    once()
    stop = time.perf_counter() + SECONDS
    taken: list[float] = []
    while len(taken) < 3 or time.perf_counter() < stop:  # noqa: PLR2004 (three, however slow)
        taken.append(once())
    return min(taken)


if __name__ == "__main__":
    stop_with_parent()
    folder = Path(sys.argv[1])
    request = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request)
    (folder / "ceilings.json").write_bytes(msgspec.json.encode(list(ceilings(request))))
