"""Compile one kernel for a GPU that need not be here, and read what its machine code uses.

`cuobjdump` and `nvdisasm` come with triton. The figures are exact and repeatable for one version of triton.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from kernels.spec import Compilation

# Shared memory that one program may ask for, KiB: CUDA C++ programming guide, table of compute capabilities.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
TENSOR_CORE = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|OMMA|UTC\w*MMA)")
ASYNC_COPY = re.compile(r"(LDGSTS|UTMALDG|UTMASTG|UBLKCP)")
_WARP = 32
_CONSTANTS_TOO = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


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


def inspect(compilation: Compilation, capability: int) -> Resources:
    """Compile, and read what the machine code uses; remembered on disk beside triton's cache.

    Raises:
        Exception: whatever triton's compiler raises where the settings are impossible on that target.
    """
    compiled = compile_ahead(compilation, capability)
    remembered = pathlib.Path(triton.knobs.cache.dir) / "unet-bench-resources" / f"{compiled.hash}.json"
    if remembered.exists():
        return Resources(**json.loads(remembered.read_text()))
    resources = _read(compiled.asm["cubin"], compiled.metadata.shared)
    write_atomically(remembered, json.dumps(dataclasses.asdict(resources)))
    return resources


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a program may use on `capability`; for one unknown here, the smallest."""
    return 1024 * SHARED_KIB.get(capability, min(SHARED_KIB.values()))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write `text` so that whoever reads `path`, or stops this process, finds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write(text)
    pathlib.Path(part.name).replace(path)


def _read(machine_code: bytes, shared_bytes: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(machine_code)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = _tool("nvdisasm", "-c", "-ndf", str(path))  # no data flow: names are counted, and it takes longer
    counts = Counter(_INSTRUCTION.findall(listing))

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
        shared_bytes=shared_bytes,
        tensor_core=instructions(TENSOR_CORE),
        async_copies=instructions(ASYNC_COPY),
        instructions=sum(count for name, count in counts.items() if name != "NOP"),
    )


def _tool(name: str, *arguments: str) -> str:
    own = _TOOLS / name
    command = [str(own) if own.exists() and os.access(own, os.X_OK) else name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - a tool of triton's
