"""What a case needs to know of the machine to be supported. Imports no torch: `list` must answer within a second.

A fact that cannot be read is None or "unknown"; none is guessed.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from bench.gpus import MIB, Gpu, gpus

ENGINES = ("onnxruntime", "onnxscript", "openvino")
"""Distributions of engines beside PyTorch: what is measured depends on their versions too."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which cases can run here, and what their figures may be compared with.

    Attributes:
        gpus: The devices that CUDA_VISIBLE_DEVICES leaves, whether or not the installed torch can use them.
        cpu: Model name of the processor.
        cores: CPUs this process may use: affinity and cgroup quota, at least 1.
        memory_mib: Memory this process may use: the machine's, or the cgroup's limit where that is smaller.
        torch_version: As `torch.__version__`; None where torch is not installed.
        torch_cuda: CUDA version that torch was built for; None for a build without CUDA.
        triton_version: As `triton.__version__`; None where triton is not installed.
        cxx: Version line of the C++ compiler that torch.compile would take for a CPU; None where it would find none.
        cxx_missing: Why `cxx` is None; empty where it is not.
        cc: Version line of the C compiler that triton needs for its launchers; None where it would find none.
        cc_missing: Why `cc` is None; empty where it is not.
        python: Version of Python.
        os: Name and version of the distribution.
        kernel: System, release and architecture.
        engines: Version of each distribution of `ENGINES` that is installed.
        cpu_half: 16-bit formats that the processor's convolutions multiply, of "bf16" and "fp16"; None where that is
            not known.
        nodes: How many such machines run a case together.
    """

    gpus: tuple[Gpu, ...]
    cpu: str
    cores: int
    memory_mib: int
    torch_version: str | None
    torch_cuda: str | None
    triton_version: str | None
    cxx: str | None
    cxx_missing: str
    cc: str | None
    cc_missing: str
    python: str
    os: str
    kernel: str
    engines: dict[str, str] = {}
    cpu_half: tuple[str, ...] | None = None
    nodes: int = 1


def machine() -> Machine:
    """Look at the machine only."""
    torch = assigned("torch", "version.py")
    cxx, cxx_missing = cxx_compiler()
    cc, cc_missing = c_compiler()
    return Machine(
        gpus=gpus(),
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_mib=usable_memory_mib(),
        torch_version=torch.get("__version__"),
        torch_cuda=torch.get("cuda"),
        triton_version=assigned("triton", "__init__.py").get("__version__"),
        cxx=cxx,
        cxx_missing=cxx_missing,
        cc=cc,
        cc_missing=cc_missing,
        python=platform.python_version(),
        os=distribution(),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        engines=engines(),
        cpu_half=cpu_half(),
    )


def engines() -> dict[str, str]:
    """Look for the engines of the optional extras, and for what makes their files."""
    found = {}
    for name in ENGINES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def usable_gpus(machine: Machine) -> tuple[Gpu, ...]:
    """Give the GPUs that the installed torch can drive: none for a build without CUDA."""
    return machine.gpus if machine.torch_cuda is not None else ()


def slug(machine: Machine) -> str:
    """Name the folder under results/: `nvidia-h200`, `2x-nvidia-h200`, or without a usable GPU `amd-epyc-2cpu`.

    Of several machines: `2-nodes-8x-nvidia-h200`. Processors of several generations are called `AMD EPYC`, and results
    of two must not pass for those of one machine: where 16 bits cannot be multiplied, `amd-epyc-2cpu-no-16-bit`.
    """
    names = Counter(gpu.name for gpu in usable_gpus(machine))
    several = f"{machine.nodes}-nodes-" if machine.nodes > 1 else ""
    if not names:
        lacks = "-no-16-bit" if machine.cpu_half == () else ""
        return f"{several}{_slugged(_plain_cpu_name(machine.cpu))}-{machine.cores}cpu{lacks}"
    return several + "-".join(
        f"{count}x-{_slugged(name)}" if count > 1 else _slugged(name) for name, count in sorted(names.items())
    )


def _slugged(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _plain_cpu_name(name: str) -> str:
    """`Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz` → `Intel Xeon Platinum 8481C`."""
    name = re.sub(r"\((?:R|TM|C)\)|\d+-Core\b|\b(?:CPU|Processor)\b", " ", name, flags=re.IGNORECASE)
    return name.partition("@")[0]


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Give the processor's model name; the architecture where the kernel has no name for it, as on Arm."""
    name = re.search(r"^model name\s*:\s*(\S.*)$", _read(cpuinfo), flags=re.MULTILINE)
    return name[1].strip() if name else platform.machine() or "unknown"


def cpu_half(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...] | None:
    """Which 16-bit formats the processor's convolutions multiply, by what oneDNN, which PyTorch has them from, wants.

    On x86 AVX-512 with its byte, word, double word and vector length parts for bf16, AVX512-FP16 for fp16, or for both
    the pair AVX-VNNI-INT8 and AVX-NE-CONVERT; on Arm the extension bf16.
    """
    line = re.search(r"^(flags|Features)\s*:(.*)$", _read(cpuinfo), flags=re.MULTILINE)
    if line is None:
        return None
    flags = set(line[2].split())
    if line[1] == "Features":
        return ("bf16",) if "bf16" in flags else ()
    small = {"avx_vnni_int8", "avx_ne_convert"} <= flags
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    wanted = {"bf16": wide or small, "fp16": (wide and "avx512_fp16" in flags) or small}
    return tuple(name for name, found in wanted.items() if found)


def usable_cores(root: Path = Path("/")) -> int:
    """Count the CPUs of this process's affinity, or of its cgroup's quota (rounded down) where that is fewer.

    Args:
        root: Where /proc and /sys stand.
    """
    return max(1, int(min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])))


def usable_memory_mib(root: Path = Path("/")) -> int:
    """Give the machine's memory, or its cgroup's limit where that is smaller, in MiB.

    Args:
        root: Where /proc and /sys stand.
    """
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *_memory_limits(root)]) // MIB


def _cpu_quotas(root: Path) -> Iterator[float]:
    for folder in _cgroups(root, "cpu"):
        # Version 2 has `cpu.max`: "200000 100000" or "max 100000"; version 1 has a file for each, and -1 for no quota.
        words = (_read(folder / "cpu.max") or _read(folder / "cpu.cfs_quota_us")).split()
        period = words[1] if len(words) > 1 else _read(folder / "cpu.cfs_period_us").strip()
        if words and words[0].isdigit() and period.isdigit() and int(period) > 0:
            yield int(words[0]) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    for folder in _cgroups(root, "memory"):
        limit = (_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")).strip()
        if limit.isdigit():  # not "max"; version 1's huge "no limit" loses against the installed memory
            yield int(limit)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Give the folders of this process's cgroup and all above it, in version 1 and 2: each may set a limit."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            bases = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            bases = [mounts / controller, mounts / controllers]
        else:
            continue
        relative = Path(path.lstrip("/"))
        # In a container without a cgroup namespace `path` is the host's and is not here: the top then holds the limit.
        for level in (relative, *relative.parents):
            yield from (base / level for base in bases)


def distribution() -> str:
    """Name the Linux distribution with its version, or "unknown"."""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def assigned(package: str, file: str) -> dict[str, str]:
    """Read the strings that a file of an installed package assigns at its top level, without importing the package.

    Args:
        package: Name of a top-level package.
        file: Path inside it.

    Returns:
        Name → string; empty where the package or the file is missing or unreadable.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return {}
    try:
        body = ast.parse(_read(Path(spec.origin).parent / file)).body
    except SyntaxError:
        return {}
    found: dict[str, str] = {}
    for line in body:
        if not isinstance(line, ast.Assign | ast.AnnAssign):
            continue
        targets = line.targets if isinstance(line, ast.Assign) else [line.target]
        if isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
            found |= {target.id: line.value.value for target in targets if isinstance(target, ast.Name)}
    return found


def cxx_compiler(variables: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """Look for the C++ compiler as torch.compile does: `$CXX`, one word and no arguments, or else `g++`.

    Returns:
        Its version line and "", or None and the reason.
    """
    return _compiler("C++", variables.get("CXX", "g++"))


def c_compiler(variables: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """Look for the C compiler as triton does: `$CC`, or else `gcc`, or else `clang`.

    Returns:
        Its version line and "", or None and the reason.
    """
    found = shutil.which("gcc", path=variables.get("PATH")) or shutil.which("clang", path=variables.get("PATH"))
    return _compiler("C", variables.get("CC", found or "gcc"))


def _compiler(language: str, command: str) -> tuple[str | None, str]:
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, f"no {language} compiler: `{Path(command).name} --version` does not run"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return None, f"no Python.h: the headers of Python {platform.python_version()} are not installed"
    return (answer.stdout.splitlines() or [Path(command).name])[0], ""


def _read(path: Path) -> str:
    """Read a text file; "" where that fails."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
