"""Settings of the whole process. Versions that share one share them too, so both must want the same.

A head that switched cuDNN's autotuner on would switch it on for base as well, and read SAME.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

_FUNCTIONS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
}
_ATTRIBUTES: Mapping[str, tuple[Any, str]] = {
    "cudnn.enabled": (torch.backends.cudnn, "enabled"),
    "cudnn.benchmark": (torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": (torch.backends.cudnn, "deterministic"),
    "cudnn.allow_tf32": (torch.backends.cudnn, "allow_tf32"),
    "cuda.matmul.allow_tf32": (torch.backends.cuda.matmul, "allow_tf32"),
    "mkldnn.enabled": (torch.backends.mkldnn, "enabled"),
}
_CONFIGS = ("torch._dynamo.config", "torch._inductor.config")


def read() -> dict[str, Any]:
    """What the process is set to now: name → value, environment variables and the compiler's settings included."""
    found = {name: get() for name, (get, _) in _FUNCTIONS.items()}
    found |= {name: getattr(of, attribute) for name, (of, attribute) in _ATTRIBUTES.items()}
    for name in _CONFIGS:
        found[name] = _changed(sys.modules[name]) if name in sys.modules else {}
    # PyTorch keeps notes of its own there, once a process, under names that begin with an underscore.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("_")}
    return {**found, "environment variables": variables}


def _changed(config: Any) -> dict[str, Any]:  # noqa: ANN401 (a module that is no module)
    """What is not at its default in a module of the compiler's settings."""
    names = [name for name in config._config if not config._is_default(name)]  # noqa: SLF001 (no public way)
    return {name: getattr(config, name) for name in names}


def restore(before: Mapping[str, Any]) -> None:
    """Set back what `read` found."""
    now = read()
    for name, (_, put) in _FUNCTIONS.items():
        if now[name] != before[name]:
            put(before[name])
    for name, (of, attribute) in _ATTRIBUTES.items():
        if now[name] != before[name]:
            setattr(of, attribute, before[name])
    for name in _CONFIGS:
        for key in now[name].keys() - before[name].keys():
            config: Any = sys.modules[name]
            setattr(config, key, config._config[key].default)  # noqa: SLF001 (no public way back to one default)
        for key, value in before[name].items():
            setattr(sys.modules[name], key, value)
    for name in now["environment variables"].keys() - before["environment variables"].keys():
        del os.environ[name]
    os.environ.update(before["environment variables"])


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Names of the settings that two readings do not share; empty if none."""
    return ", ".join(name for name in first if first[name] != second[name])
