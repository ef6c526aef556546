"""Which GPUs CUDA will see, and what the driver says of each; see test_nvml for what they say of a moment."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gpus

UUIDS = ["GPU-aa1", "GPU-ab2", "GPU-b33"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("0, 2", [0, 2]),
        ("0,7,1", [0]),
        ("0,-1,1", [0]),
        ("1,1", []),
        ("GPU-b33,GPU-aa", [2, 0]),
        ("GPU-a", []),
        ("GPU-b,GPU-zz,GPU-aa", [2]),
    ],
)
def test_cuda_visible_devices_is_honoured(selection: str | None, expected: list[int]) -> None:
    assert gpus.visible(selection, UUIDS) == expected


@given(words=st.lists(st.integers(-3, 5).map(str), max_size=5))
@settings(deadline=None)
def test_numbers_select_as_in_torch(words: list[str]) -> None:
    from torch.cuda import _parse_visible_devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(words))
        said = [int(index) for index in _parse_visible_devices()]
    within = [index < len(UUIDS) for index in said]
    assume_until = within.index(False) if False in within else len(said)
    chosen = gpus.visible(",".join(words), UUIDS)
    # torch empties the list for a number named twice, wherever; what comes after an absent device is never reached.
    assert chosen == said[:assume_until] or (not said and len(set(words)) < len(words))


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", raiser(pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)))
    assert gpus.gpus() == ()


def raiser(error: Exception):  # noqa: ANN201
    def raises(*_arguments: object) -> None:
        raise error

    return raises


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """Stand-in for the driver, which no machine without a GPU has."""
    import pynvml

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"580.159.03",
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: UUIDS[handle],
        "nvmlDeviceGetMigMode": raiser(pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)),
        "nvmlDeviceGetName": lambda handle: f"GPU {handle}",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * 2**30),
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetCudaComputeCapability": lambda _: (9, 0),
        "nvmlDeviceGetMaxClockInfo": lambda _handle, _kind: 1980,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return pynvml


def test_gpus_are_described_in_the_units_of_their_fields(nvml: object, monkeypatch: pytest.MonkeyPatch) -> None:
    del nvml
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    first, second = gpus.gpus()
    assert (first.name, second.name) == ("GPU 2", "GPU 0")
    assert (first.uuid, first.driver) == ("GPU-b33", "580.159.03")
    assert (first.memory_mib, first.power_limit_w, first.compute_capability) == (80 * 1024, 700.0, (9, 0))


def test_what_a_gpu_does_not_answer_is_none(nvml: object, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = raiser(nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED))  # type: ignore[attr-defined]
    for name in (
        "DeviceGetMemoryInfo",
        "DeviceGetEnforcedPowerLimit",
        "DeviceGetCudaComputeCapability",
        "DeviceGetUUID",
        "DeviceGetMaxClockInfo",
    ):
        monkeypatch.setattr(nvml, f"nvml{name}", refuses)
    monkeypatch.setattr(nvml, "nvmlSystemGetDriverVersion", refuses)
    assert gpus.gpus()[0] == gpus.Gpu(
        name="GPU 0", uuid=None, memory_mib=None, driver=None, power_limit_w=None, compute_capability=None
    )


# ── CPU and memory ────────────────────────────────────────────────────────────────────────────────────────────────────
