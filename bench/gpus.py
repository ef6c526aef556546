"""The NVIDIA GPUs that CUDA will see, as the driver's management library (NVML) describes them. Imports no torch."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

MIB = 2**20


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One CUDA device, as the driver's management library (NVML) describes it.

    Attributes:
        name: Marketing name, for instance as `nvidia-smi` prints it.
        uuid: `GPU-…` or `MIG-…`.
        memory_mib: All of its memory, in use or not.
        driver: Version of the driver.
        power_limit_w: The limit in force, in watts.
        compute_capability: (major, minor).
        most_sm_mhz: The highest clock of its multiprocessors, MHz.
    """

    name: str
    uuid: str | None
    memory_mib: int | None
    driver: str | None
    power_limit_w: float | None
    compute_capability: tuple[int, int] | None
    most_sm_mhz: int | None = None


def gpus() -> tuple[Gpu, ...]:
    """Describe the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none without a driver.

    Where it is not set the order is NVML's, by bus. CUDA's own default order puts the fastest first, so on a machine of
    unlike GPUs the numbers agree only under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = _text(asked(pynvml.nvmlSystemGetDriverVersion))
        return tuple(_gpu(handle, driver) for handle in _visible_handles(os.environ.get("CUDA_VISIBLE_DEVICES")))
    finally:
        asked(pynvml.nvmlShutdown)


def visible(selection: str | None, uuids: Sequence[str]) -> list[int]:
    """Read CUDA_VISIBLE_DEVICES as CUDA does.

    Args:
        selection: Its value: indices or beginnings of UUIDs, parted by commas; None where it is not set.
        uuids: The UUIDs of all GPUs of the machine.

    Returns:
        Indices into `uuids`. The first word that names no device ends the list; a device named twice empties it.
    """
    if selection is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for word in selection.split(","):
        index = _device_index(word.strip(), uuids)
        if index is None:
            break
        if index in chosen:
            return []
        chosen.append(index)
    return chosen


def _device_index(word: str, uuids: Sequence[str]) -> int | None:
    if word.startswith("GPU-"):
        matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(word)]
        return matches[0] if len(matches) == 1 else None
    number = re.match(r"\+?([0-9]+)", word)  # as strtoul: what follows the digits is ignored
    return int(number[1]) if number and int(number[1]) < len(uuids) else None


def _visible_handles(selection: str | None) -> list[Any]:
    import pynvml

    if selection is not None and selection.startswith("MIG-"):
        instance = asked(pynvml.nvmlDeviceGetHandleByUUID, selection.partition(",")[0])
        return [] if instance is None else [instance]
    count = asked(pynvml.nvmlDeviceGetCount) or 0
    found = [asked(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
    handles = [handle for handle in found if handle is not None]
    uuids = [_text(asked(pynvml.nvmlDeviceGetUUID, handle)) or "" for handle in handles]
    return [_instance(handles[index]) for index in visible(selection, uuids)]


def handle_of(uuid: str) -> Any:  # noqa: ANN401 (NVML's handles have no type)
    """Find the device with this UUID, `GPU-` or `MIG-` before it or not; None where there is none. NVML is running."""
    import pynvml

    plain = uuid.removeprefix("GPU-").removeprefix("MIG-")
    names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"MIG-{plain}", f"GPU-{plain}"]
    found = (asked(pynvml.nvmlDeviceGetHandleByUUID, name) for name in names)
    return next((handle for handle in found if handle is not None), None)


def _instance(handle: Any) -> Any:  # noqa: ANN401 (NVML's handles have no type)
    """Of a GPU that is divided (MIG) CUDA sees one instance, the first unless told otherwise, and never the whole."""
    import pynvml

    mode = asked(pynvml.nvmlDeviceGetMigMode, handle)
    if not mode or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return handle
    for index in range(asked(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = asked(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if instance is not None:
            return instance
    return handle


def _gpu(handle: Any, driver: str | None) -> Gpu:  # noqa: ANN401 (NVML's handles have no type)
    import pynvml

    memory = asked(pynvml.nvmlDeviceGetMemoryInfo, handle)
    limit_mw = asked(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    capability = asked(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        name=_text(asked(pynvml.nvmlDeviceGetName, handle)) or "unknown GPU",
        uuid=_text(asked(pynvml.nvmlDeviceGetUUID, handle)),
        memory_mib=None if memory is None else int(memory.total) // MIB,
        driver=driver,
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        most_sm_mhz=asked(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
    )


def asked(query: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 (whatever NVML answers)
    """Ask NVML; None where this device, driver, container or version of the library does not answer that."""
    import pynvml

    # A function that an old driver lacks is an exception of another family.
    errors = pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError)
    try:
        return query(*arguments)
    except errors:
        return None


def _text(answer: str | bytes | None) -> str | None:
    """Older versions of pynvml answer in bytes."""
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer
