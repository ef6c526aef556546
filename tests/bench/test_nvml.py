"""What a GPU says of itself, asked through the real pynvml of a library that answers as a driver's would."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.engine.latency import clocks
from bench.nvml import Watch
from bench.readings import Block

from .conftest import ROOT

ASK = """
import json, sys
from bench.nvml import Watch
seen = Watch(sys.argv[1])
print(json.dumps({name: getattr(seen, name)() for name in (
    "sm_mhz", "temperature_c", "slowed_by", "throttled_by", "energy_j", "power_w", "is_persistent",
    "is_part", "process_mib", "foreign",
)}))
"""
DIAGNOSE = """
import json, msgspec
from bench.doctor import findings
from bench.machine import machine
here = msgspec.structs.replace(machine(), torch_cuda="13.0")
print(json.dumps([[one.level, one.what] for one in findings(here, 0.1)]))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(tmp_path_factory.mktemp("driver"))


def _built(folder: Path, *options: str) -> Path:
    if (compiler := shutil.which("gcc") or shutil.which("clang")) is None:
        pytest.skip("no C compiler")
    source = Path(__file__).with_name("fake_nvml.c")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", str(library), str(source)], check=True)
    return folder


def asked(driver: Path, code: str = ASK, uuid: str = "1234", **variables: str) -> Any:  # noqa: ANN401
    own = {**os.environ, "LD_LIBRARY_PATH": str(driver), **variables}
    told = subprocess.run(
        [sys.executable, "-c", code, uuid], cwd=ROOT, env=own, capture_output=True, text=True, check=True
    )
    return json.loads(told.stdout)


def test_readings_come_in_the_units_of_their_names(driver: Path) -> None:
    seen = asked(driver, ENERGY_MJ="12345")
    assert (seen["sm_mhz"], seen["temperature_c"]) == (1755, 61)
    assert seen["energy_j"] == 12.345
    assert seen["power_w"] == [700, 700]
    assert seen["process_mib"] == 512
    assert seen["foreign"] == {}
    assert (seen["is_part"], seen["is_persistent"]) == (False, True)


def test_what_holds_the_clock_down_has_its_name_and_what_somebody_chose_is_no_trouble(driver: Path) -> None:
    seen = asked(driver, REASONS=str(0x4 | 0x40 | 0x2))
    assert seen["slowed_by"] == ["applications_clocks_setting", "sw_power_cap", "hw_thermal_slowdown"]
    assert seen["throttled_by"] == ["sw_power_cap", "hw_thermal_slowdown"]
    assert asked(driver, REASONS=str(0x8000))["throttled_by"] == ["unknown_0x8000"]


def test_the_names_of_reasons_are_those_of_the_package() -> None:
    import pynvml

    from bench.nvml import REASONS

    for bit, name in REASONS.items():
        words = "".join(word.capitalize() for word in name.split("_"))
        assert getattr(pynvml, f"nvmlClocksThrottleReason{words}") == bit


def test_an_older_driver_that_calls_them_throttle_reasons_is_understood(tmp_path: Path) -> None:
    assert asked(_built(tmp_path, "-DOLD"), REASONS=str(0x8))["throttled_by"] == ["hw_slowdown"]


def test_a_board_without_a_counter_and_a_part_of_a_gpu_have_no_energy(driver: Path) -> None:
    assert asked(driver)["energy_j"] is None
    assert asked(driver, ENERGY_MJ="12345", MIG="1")["energy_j"] is None


def test_memory_that_the_driver_does_not_tell_is_none(driver: Path) -> None:
    assert asked(driver, FOREIGN="77")["foreign"] == {"77": None}


def test_a_gpu_that_nvml_does_not_know_answers_nothing(driver: Path) -> None:
    seen = asked(driver, uuid="9999", ENERGY_MJ="12345", REASONS="4")
    assert seen["sm_mhz"] is None
    assert seen["throttled_by"] == []
    assert seen["power_w"] == [None, None]


def test_without_a_driver_everything_is_none() -> None:
    assert Watch(None).sm_mhz() is None
    assert Watch(None).throttled_by() == ()


def test_the_doctor_names_each_trouble_of_a_gpu(driver: Path) -> None:
    fine = asked(driver, DIAGNOSE)
    assert ["note", "clocks are free, up to 1980 MHz: they follow heat and load"] in fine
    assert ["good", "NVIDIA H200, driver 580.159.03"] in fine
    assert ["good", "nobody else on the GPU"] in fine
    ill = asked(driver, DIAGNOSE, LIMIT_MW="500000", FOREIGN="77", REASONS="4", MIG="1", PERSISTENT="0")
    told = {what: level for level, what in ill}
    assert told["power is capped at 500 W, the board came with 700 W"] == "note"
    assert told["other processes on the GPU: 77"] == "bad"
    assert told["the clock is held down while nothing of ours runs: sw_power_cap"] == "bad"
    assert told["the driver is unloaded between processes"] == "note"
    assert any("divided GPU (MIG)" in what for what in told)


def test_blocks_that_were_all_throttled_still_have_finite_figures() -> None:
    blocks = [Block(samples=10, sm_mhz=1200 + mhz, temperature_c=80, throttled=("sw_power_cap",)) for mhz in range(3)]
    found = clocks(blocks)
    assert found == {"sm_mhz": 1201, "temperature_c": 80, "throttled": "sw_power_cap", "throttled_share": 1.0}


def test_blocks_of_a_gpu_that_tells_nothing_have_no_clock() -> None:
    assert clocks([Block(samples=4), Block(samples=4)]) == {"throttled": "", "throttled_share": 0.0}
