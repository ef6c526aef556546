"""Compile kernels for a GPU that need not be here, and read what their machine code uses.

`cuobjdump` and `nvdisasm` come with triton. The figures are exact and repeatable for one version of triton.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
import pathlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kernels.spec import Compilation

# Shared memory that one program may ask for, KiB: CUDA C++ programming guide, table of compute capabilities.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
TENSOR_CORE = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|OMMA|UTC\w*MMA)")
ASYNC_COPY = re.compile(r"(LDGSTS|UTMALDG|UTMASTG|UBLKCP)")
_WARP = 32
_CONSTANTS_TOO = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What the compiler made of one kernel.

    `registers` per thread, `spill_bytes` of local memory per thread, `shared_bytes` per program; `tensor_core`,
    `async_copies` and `instructions` are counts in the machine code (a loop's body counts once).
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: int
    async_copies: int
    instructions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel compiled for `capability`.

    `hash` is the name under which Triton keeps it, `shared_bytes` what a program takes of shared memory, `cubin` its
    machine code, an ELF file.
    """

    hash: str
    capability: int
    shared_bytes: int
    cubin: bytes


def compile_ahead(compilation: Compilation, capability: int) -> Any:  # noqa: ANN401 - triton's CompiledKernel
    """Compile for `capability` (80, 89, 90, 100, 120 …), as a launch on such a GPU would.

    Raises:
        Exception: whatever triton's compiler raises where the settings are impossible on that target.
    """
    source, options = as_compiled(compilation)
    return triton.compile(source, target=GPUTarget("cuda", capability, _WARP), options=options)


def as_compiled(compilation: Compilation) -> tuple[ASTSource, dict[str, int]]:
    """Triton's own source and options, equal to a launch's to the letter: its disk cache then serves both."""
    function = compilation.function
    types = {name: compilation.types.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(fn=function, signature=types, constexprs=compilation.constants, attrs=_attributes(compilation))
    return source, {"num_warps": compilation.warps, "num_stages": compilation.stages}


def _attributes(compilation: Compilation) -> dict[tuple[int], list[list[object]]]:
    """What is known of each argument, also of those of which it is nothing: the cache is keyed by this text."""
    found: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(compilation.function.params):
        kind = compilation.types.get(parameter.name)
        if kind is None:  # a constant
            asked = _CONSTANTS_TOO or isinstance(compilation.constants[parameter.name], str)
        else:
            asked = not (parameter.do_not_specialize or kind.startswith(("tensordesc", "fp32")))
        if asked:
            found[index,] = [["tt.divisibility", 16]] if parameter.name in compilation.aligned else []
    return found


def compiled(compilation: Compilation, capability: int) -> Compiled:
    """`compile_ahead`, as `read` takes it.

    Raises:
        Exception: whatever triton's compiler raises where the settings are impossible on that target.
    """
    made = compile_ahead(compilation, capability)
    return Compiled(hash=made.hash, capability=capability, shared_bytes=made.metadata.shared, cubin=made.asm["cubin"])


def inspect(compilation: Compilation, capability: int) -> Resources:
    """Compile, and read what the machine code uses.

    Raises:
        Exception: whatever triton's compiler raises where the settings are impossible on that target.
    """
    return read([compiled(compilation, capability)])[0]


def read(kernels: Iterable[Compiled]) -> list[Resources]:
    """What the machine code of each uses, in their order; remembered on disk beside triton's cache."""
    kernels = list(kernels)
    folder = pathlib.Path(triton.knobs.cache.dir) / "unet-bench-resources"
    places = {kernel.hash: folder / f"{kernel.hash}.json" for kernel in kernels}
    fresh: dict[int, dict[str, Compiled]] = {}
    for kernel in kernels:
        if not places[kernel.hash].exists():
            fresh.setdefault(kernel.capability, {})[kernel.hash] = kernel
    for capability, alike in fresh.items():
        for name, resources in zip(alike, _read(list(alike.values()), capability), strict=True):
            write_atomically(places[name], json.dumps(dataclasses.asdict(resources)))
    return [Resources(**json.loads(places[kernel.hash].read_text())) for kernel in kernels]


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a program may use on `capability`; for one unknown here, the smallest."""
    return 1024 * SHARED_KIB.get(capability, min(SHARED_KIB.values()))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write `text` so that whoever reads `path`, or stops this process, finds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write(text)
    pathlib.Path(part.name).replace(path)


def _read(kernels: Sequence[Compiled], capability: int) -> list[Resources]:
    counts = _instructions([_code(kernel.cubin) for kernel in kernels], capability)
    return [_used(kernel, counted) for kernel, counted in zip(kernels, counts, strict=True)]


def _used(kernel: Compiled, counts: Counter[str]) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)

    def used(what: str) -> int:
        found = re.search(rf"{what}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reported no {what}: {usage.strip()}")
        return int(found.group(1))

    def instructions(pattern: re.Pattern[str]) -> int:
        return sum(count for name, count in counts.items() if pattern.match(name))

    return Resources(
        registers=used("REG"),
        # ptxas keeps spilled registers on the stack; these kernels have no other use for one.
        spill_bytes=used("STACK") + used("LOCAL"),
        shared_bytes=kernel.shared_bytes,
        tensor_core=instructions(TENSOR_CORE),
        async_copies=instructions(ASYNC_COPY),
        instructions=sum(count for name, count in counts.items() if name != "NOP"),
    )


def _instructions(codes: Sequence[bytes], capability: int) -> list[Counter[str]]:
    """How often each instruction is in each kernel's code.

    All are listed as one: nvdisasm takes a quarter of a second to start, and milliseconds for a kernel.
    """
    ends = list(itertools.accumulate(len(code) for code in codes))
    architecture = f"SM{capability}{'a' if capability >= 90 else ''}"  # noqa: PLR2004 - as triton compiles for it
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        listing = _tool("nvdisasm", "--binary", architecture, "-ndf", file.name)
    counts: list[Counter[str]] = [Counter() for _ in codes]
    for address, name in _INSTRUCTION.findall(listing):
        counts[bisect.bisect_right(ends, int(address, 16))][name] += 1
    return counts


def _code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin: the section `.text.<kernel>` of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: where its name begins, four fields more, and of these where it begins and how long it is.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(number)]
    beginning = sections[names][4]
    (code,) = (
        cubin[start : start + length]
        for name, *_, start, length in sections
        if cubin.startswith(b".text.", beginning + name)
    )
    return code


def _tool(name: str, *arguments: str) -> str:
    own = _TOOLS / name
    command = [str(own) if own.exists() and os.access(own, os.X_OK) else name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - a tool of triton's
