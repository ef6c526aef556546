"""What a GPU says of itself at one moment: clock, heat, energy, memory, and what holds its clock down.

Asked through the driver's management library (NVML). Imports no torch. Whatever a device, driver or container does not
answer is None.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bench.gpus import MIB, asked, handle_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons (before driver 535: …ThrottleReasons), as nvml.h numbers them."""

WANTED = frozenset({"gpu_idle", "applications_clocks_setting", "display_clock_setting", "sync_boost"})
"""Those that somebody chose, or that an idle device has: no sign of trouble."""


class Watch:
    """One GPU, asked again and again.

    Args:
        uuid: as torch or NVML writes it, with or without the `GPU-` or `MIG-` before it; None asks nobody.
    """

    def __init__(self, uuid: str | None) -> None:
        import pynvml

        self._nvml = pynvml
        self._handle: Any = None
        if uuid is not None and asked(lambda: pynvml.nvmlInit() or True):
            self._handle = handle_of(uuid)

    def sm_mhz(self) -> int | None:
        """Clock of the multiprocessors now, MHz."""
        return self._number("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)

    def temperature_c(self) -> int | None:
        """Of the chip, °C."""
        return self._number("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)

    def slowed_by(self) -> tuple[str, ...]:
        """Everything that holds the clock down now, by name; what somebody chose included."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        unknown = bits & ~sum(REASONS)
        names = tuple(name for bit, name in REASONS.items() if bits & bit)
        return (*names, f"unknown_{unknown:#x}") if unknown else names

    def throttled_by(self) -> tuple[str, ...]:
        """What holds the clock down now against everyone's will."""
        return tuple(name for name in self.slowed_by() if name not in WANTED)

    def energy_j(self) -> float | None:
        """Energy since the driver was loaded, J; it moves about every 100 ms. None for a part of a GPU (MIG)."""
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None or self.is_part() else found / 1000

    def power_w(self) -> tuple[float | None, float | None]:
        """The power limit in force and the one that the board came with, W."""
        limits = self._ask("nvmlDeviceGetEnforcedPowerLimit"), self._ask("nvmlDeviceGetPowerManagementDefaultLimit")
        in_force, default = (None if limit is None else limit / 1000 for limit in limits)
        return in_force, default

    def is_persistent(self) -> bool | None:
        """Whether the driver stays loaded while nobody uses the GPU; without that each process waits for it."""
        mode = self._ask("nvmlDeviceGetPersistenceMode")
        return None if mode is None else bool(mode)

    def is_part(self) -> bool:
        """Whether this is an instance of a divided GPU (MIG)."""
        return bool(self._ask("nvmlDeviceIsMigDeviceHandle"))

    def process_mib(self, pid: int | None = None) -> float | None:
        """Memory on this GPU that a process holds, its CUDA context included, MiB; this process without `pid`."""
        used = dict(self._processes()).get(pid or os.getpid())
        return None if used is None else used / MIB

    def foreign(self) -> dict[int, float | None]:
        """Other processes on this GPU: their ids → MiB that they hold, None where the driver does not tell."""
        others = {pid: used for pid, used in self._processes() if pid != os.getpid()}
        return {pid: None if used is None else used / MIB for pid, used in others.items()}

    def _processes(self) -> Iterator[tuple[int, int | None]]:
        for kind in ("Compute", "Graphics"):
            for one in self._ask(f"nvmlDeviceGet{kind}RunningProcesses") or ():
                yield int(one.pid), one.usedGpuMemory

    def _number(self, query: str, *arguments: object) -> int | None:
        answer = self._ask(query, *arguments)
        return None if answer is None else int(answer)

    def _ask(self, query: str, *arguments: object) -> Any:  # noqa: ANN401 (whatever NVML answers)
        function = getattr(self._nvml, query, None)  # absent in an older package
        return None if self._handle is None or function is None else asked(function, self._handle, *arguments)


def watch(device: torch.device) -> Watch:
    """The GPU that torch calls `device`; of a CPU nothing is known."""
    import torch

    return Watch(str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None)
