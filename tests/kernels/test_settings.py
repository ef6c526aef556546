"""Which settings a launch gets, which are worth measuring, and what tuning writes down."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import kernels
from kernels import KERNELS, conv_moments, conv_weight_gradient, settings, tune
from kernels.candidates import candidates, compiles_well
from kernels.problem import INTERPRETER, Problem, Settings
from kernels.settings import descriptors_serve, settings_for
from kernels.unet_layers import unet_layers

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

    from kernels.spec import Kernel

(KERNEL,) = (kernel for kernel in KERNELS if kernel.name == "conv_bn_relu")
PROBLEM = Problem(batch=1, height=64, width=64, in_channels=64, out_channels=64, precision="bf16")
CUT = Settings(family="tma", rows=8, columns=32, out_block=64, in_block=64, warps=4, stages=3)


@pytest.fixture
def measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    monkeypatch.setattr(settings, "TUNED", tmp_path)
    settings.forget()

    def write(*rows: tuple[Problem, Settings | None], kernel: str = "conv_bn_relu") -> None:
        found = [
            {"kernel": kernel}
            | {"problem": dataclasses.asdict(problem), "settings": None if cut is None else dataclasses.asdict(cut)}
            for problem, cut in rows
        ]
        settings.file_for("NVIDIA H200").write_text(json.dumps({"rows": found}))
        settings.forget()

    yield write
    settings.forget()


def test_exactly_measured_settings_come_first(measured: Callable[..., None]) -> None:
    measured((dataclasses.replace(PROBLEM, batch=2), dataclasses.replace(CUT, rows=4)), (PROBLEM, CUT))
    assert settings_for(PROBLEM, 90, "NVIDIA H200") == CUT
    assert settings_for(PROBLEM, 90, "NVIDIA A100") == settings_for(PROBLEM, 90) != CUT


def test_the_nearest_measured_settings_come_second(measured: Callable[..., None]) -> None:
    near, far = dataclasses.replace(PROBLEM, batch=4), dataclasses.replace(PROBLEM, batch=2)
    measured((near, dataclasses.replace(CUT, rows=4)), (far, CUT))
    assert settings_for(PROBLEM, 90, "NVIDIA H200") == CUT


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "fp16"},
        {"in_channels": 1024},
        {"batch": 16},
    ],
)
def test_the_default_comes_last(other: dict[str, object], measured: Callable[..., None]) -> None:
    measured((dataclasses.replace(PROBLEM, **other), CUT))
    assert settings_for(PROBLEM, 90, "NVIDIA H200") == settings_for(PROBLEM, 90)


def test_measured_descriptors_are_not_given_to_what_pointers_must_read(measured: Callable[..., None]) -> None:
    measured((PROBLEM, CUT), (dataclasses.replace(PROBLEM, batch=2), None))
    assert settings_for(PROBLEM, 90, "NVIDIA H200", family="pointer").family == "pointer"


def test_a_damaged_file_is_refused_by_name(measured: Callable[..., None]) -> None:
    measured()
    settings.file_for("NVIDIA H200").write_text("{}")
    with pytest.raises(ValueError, match=r"nvidia_h200\.json holds no launch settings"):
        settings_for(PROBLEM, 90, "NVIDIA H200")


@pytest.mark.parametrize("capability", [INTERPRETER, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("family", ["tma", "pointer"])
def test_every_problem_has_lawful_defaults(capability: int, precision: str, family: str) -> None:
    for channels_in in (1, 3, 8, 17, 24, 64, 1000):
        for channels_out in (1, 8, 40, 64, 65, 2048):
            problem = dataclasses.replace(
                PROBLEM, in_channels=channels_in, out_channels=channels_out, precision=precision
            )
            cut = settings_for(problem, capability, family=family)
            assert cut.family == "pointer" or descriptors_serve(problem, capability)


@pytest.mark.parametrize(
    "bad", [{"rows": 3}, {"rows": 512}, {"in_block": 8}, {"rows": 1, "columns": 8}, {"warps": 0}], ids=str
)
def test_unlawful_settings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="given"):
        dataclasses.replace(CUT, **bad)


def test_candidates_start_with_the_shipped_and_are_of_one_family() -> None:
    found = candidates(PROBLEM, 90, compiled=False)
    assert found[0] == settings_for(PROBLEM, 90)
    assert {cut.family for cut in found} == {"tma"}
    assert len(found) == len(set(found)) > 20
    assert {cut.family for cut in candidates(PROBLEM, 80, compiled=False)} == {"pointer"}


@pytest.mark.parametrize("layer", unet_layers(batch=1), ids=str)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_layer_has_candidates(layer: Problem, capability: int) -> None:
    assert len(candidates(layer, capability, compiled=False)) > 5


def test_candidates_that_spill_or_do_not_fit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = dataclasses.replace(PROBLEM, precision="tf32", in_channels=128, out_channels=128)
    good = settings_for(problem, 80)
    assert compiles_well(problem, good, 80)
    spilling = dataclasses.replace(good, out_block=128, warps=4, stages=3)
    assert not compiles_well(problem, spilling, 80)
    huge = dataclasses.replace(CUT, rows=16, columns=16, out_block=128, in_block=64, warps=8, stages=4)
    assert compiles_well(dataclasses.replace(PROBLEM, out_channels=128), huge, 90)
    assert not compiles_well(dataclasses.replace(PROBLEM, out_channels=128), huge, 120)


SMALL = [
    Problem(batch=n, height=6, width=6, in_channels=16, out_channels=16, precision=precision)
    for n, precision in ((1, "fp16"), (3, "tf32"))
]


def run(path: pathlib.Path, problems: list[Problem], measure: Callable[..., float] = lambda _: 1.0) -> list[tune.Trial]:
    device = torch.device("cpu")
    return list(tune.tune(KERNEL, problems, device, path=path, clock=tune.Clock(look=measure), compiled=False))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Three candidates, in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cuts = [Settings(family="tma", rows=r, columns=8, out_block=16, in_block=16, warps=4, stages=2) for r in (8, 4, 2)]
    fake = dataclasses.replace(KERNEL, candidates=lambda *_, **__: cuts)
    monkeypatch.setitem(globals(), "KERNEL", fake)
    return cuts


def test_tuning_keeps_the_fastest(tmp_path: pathlib.Path, few: list[Settings]) -> None:
    times = iter([3.0, 1.0, 2.0, 1.0, 2.0, 3.0])
    trials = run(tmp_path / "gpu.json", SMALL, lambda launch: launch() is None or next(times))
    assert [trial.ms for trial in trials] == [3, 1, 2, 1, 2, 3]
    assert settings.load(tmp_path / "gpu.json") == {SMALL[0]: few[1], SMALL[1]: few[0]}


def test_tuning_never_times_a_wrong_answer(
    tmp_path: pathlib.Path, few: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launcher(arguments: tuple[object, ...], problem: Problem, cut: Settings) -> Callable[[], torch.Tensor]:
        launch = KERNEL_RIGHT.launcher(arguments, problem, cut)
        return (lambda: launch() * 1.1) if cut == few[1] else launch

    KERNEL_RIGHT = KERNEL  # noqa: N806
    monkeypatch.setitem(globals(), "KERNEL", dataclasses.replace(KERNEL, launcher=launcher))
    times = iter([3.0, 2.0])
    trials = run(tmp_path / "gpu.json", SMALL[:1], lambda _: next(times))
    assert [trial.ms for trial in trials] == [3, None, 2]
    assert trials[1].reason.startswith("wrong: relative L2 0.1")
    assert settings.load(tmp_path / "gpu.json") == {SMALL[0]: few[2]}


def test_an_answer_left_in_memory_by_another_candidate_is_not_taken_for_this_one_s(
    tmp_path: pathlib.Path, few: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launcher(arguments: tuple[object, ...], problem: Problem, cut: Settings) -> Callable[[], torch.Tensor]:
        right = KERNEL_RIGHT.launcher(arguments, problem, cut)
        left = right()
        return (lambda: left) if cut == few[1] else right

    KERNEL_RIGHT = KERNEL  # noqa: N806
    monkeypatch.setitem(globals(), "KERNEL", dataclasses.replace(KERNEL, launcher=launcher))
    trials = run(tmp_path / "gpu.json", SMALL[:1])
    assert [trial.ms for trial in trials] == [1, None, 1]


def test_tuning_resumes_after_an_interrupt(tmp_path: pathlib.Path, few: list[Settings]) -> None:
    calls: list[int] = []

    def interrupted(_: object) -> float:
        calls.append(1)
        if len(calls) == len(few) + 2:
            raise KeyboardInterrupt
        return float(len(calls))

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "gpu.json", SMALL, interrupted)
    assert list(settings.load(tmp_path / "gpu.json")) == SMALL[:1]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.attempts"}
    trials = run(tmp_path / "gpu.json", SMALL)
    assert [(trial.problem, trial.reason) for trial in trials[:1]] == [(SMALL[0], "measured before")]
    assert list(settings.load(tmp_path / "gpu.json")) == SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"], "what was tried has ended"


def test_the_best_few_are_measured_again_and_that_decides(tmp_path: pathlib.Path, few: list[Settings]) -> None:
    looks, sure = iter([3.0, 1.0, 2.0]), iter([3.5, 2.5, 1.5])
    clock = tune.Clock(look=lambda _: next(looks), measure=lambda _: next(sure))
    list(tune.tune(KERNEL, SMALL[:1], torch.device("cpu"), path=tmp_path / "gpu.json", clock=clock, compiled=False))
    assert settings.load(tmp_path / "gpu.json") == {SMALL[0]: few[2]}
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (row["ms"], row["shipped_ms"], row["tried"], row["failed"]) == (1.5, 3.5, 3, 0)


@pytest.mark.parametrize(("rival_ms", "kept"), [(0.9, False), (1.0, False), (1.1, True)])
def test_settings_are_kept_only_where_they_beat_what_would_run_without_them(
    rival_ms: float, tmp_path: pathlib.Path, few: list[Settings], monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    asked: list[torch.Size] = []
    rival = dataclasses.replace(KERNEL, rival=lambda x, *_: asked.append(x.shape) or x)
    monkeypatch.setitem(globals(), "KERNEL", rival)
    times = iter([3.0, 1.0, 2.0, rival_ms])
    run(tmp_path / "gpu.json", SMALL[:1], lambda launch: launch() is None or next(times))
    assert asked == [(1, 16, 6, 6)]
    assert settings.load(tmp_path / "gpu.json") == ({SMALL[0]: few[1]} if kept else {})
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (row["ms"], row["rival_ms"]) == (1.0, rival_ms)


def test_a_weight_gradient_is_pytorch_s_unless_just_its_problem_was_measured_faster(
    measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(conv_weight_gradient, "place", lambda _: (INTERPRETER, "NVIDIA H200"))
    # As a GPU's name has it, cut as only this file says: shares of 32 pixels.
    problem = Problem(batch=2, height=5, width=6, in_channels=3, out_channels=8, precision="fp32")
    cut = Settings(family="pointer", rows=2, columns=16, out_block=16, in_block=16, warps=4, stages=1)
    rows = ((problem, cut), (dataclasses.replace(problem, batch=3), None))
    measured(*rows, kernel="conv_weight_gradient")
    for batch, ours in ((2, True), (3, False), (4, False)):
        x = torch.randn(batch, 3, 5, 6)
        weight = torch.randn(8, 3, 3, 3, requires_grad=True)
        z, _, _ = conv_moments.conv_moments(x, weight, None)
        with kernels.Account(KERNELS) as account:
            z.square().sum().backward()
        found, weight.grad = weight.grad, None
        assert ["conv_weight_gradient" in (call.kernel for call in account.calls)] == [ours]
        torch.nn.functional.conv2d(x, weight, padding=1).square().sum().backward()
        torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-4)
    assert conv_weight_gradient.settings_for(problem, INTERPRETER, "NVIDIA H200") == cut


KILLER = """
import dataclasses, os, pathlib, sys, torch
from kernels import conv_bn_relu, tune
from kernels.problem import Problem, Settings

cuts = [Settings(family="tma", rows=r, columns=8, out_block=16, in_block=16, warps=4, stages=2) for r in (8, 4, 2)]

def launcher(arguments, problem, cut):
    if cut == cuts[1]:
        os.abort()
    return conv_bn_relu.KERNEL.launcher(arguments, problem, cut)

kernel = dataclasses.replace(conv_bn_relu.KERNEL, candidates=lambda *_, **__: cuts, launcher=launcher)
problem = Problem(batch=1, height=6, width=6, in_channels=16, out_channels=16, precision="fp16")
path, clock = pathlib.Path(sys.argv[1]), tune.Clock(look=lambda _: 1.0)
for trial in tune.tune(kernel, [problem], torch.device("cpu"), path=path, clock=clock, compiled=False):
    print(trial.ms, trial.reason)
"""


@pytest.mark.slow
def test_a_candidate_that_twice_ended_the_process_is_not_tried_again(
    tmp_path: pathlib.Path, few: list[Settings]
) -> None:
    command = [sys.executable, "-c", KILLER, str(tmp_path / "gpu.json")]
    ends = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(3)]
    assert [end.returncode for end in ends] == [-signal.SIGABRT, -signal.SIGABRT, 0], ends[-1].stderr
    assert ends[-1].stdout.splitlines() == ["1.0 ", "None ended the process 2 times", "1.0 "]
    assert settings.load(tmp_path / "gpu.json") == {SMALL[0]: few[0]}


def test_other_code_or_another_triton_measures_anew(
    tmp_path: pathlib.Path, few: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "gpu.json", SMALL[:1])
    monkeypatch.setattr(tune, "source_hash", lambda: "another")
    assert [trial.settings for trial in run(tmp_path / "gpu.json", SMALL[:1])] == few


def test_the_layers_are_those_of_the_unet() -> None:
    from unet import UNet

    found: dict[str, set[Problem]] = {kernel.name: set() for kernel in KERNELS}
    for bilinear, fold in ((False, False), (False, True), (True, False)):
        with torch.device("meta"):
            model = kernels.fuse(UNet(3, 2, bilinear).bfloat16(), fold_transposed=fold)
        image = torch.empty(1, 3, 512, 512, device="meta", dtype=torch.bfloat16)
        for call in kernels.account_for(model, image).calls:
            found[call.kernel].add(call.problem)
    for kernel in (kernel for kernel in KERNELS if found[kernel.name]):
        for batch, precision in itertools.product((1, 16), ("bf16", "fp16")):
            listed = [problem for problem in kernel.layers if (problem.batch, problem.precision) == (batch, precision)]
            expected = {dataclasses.replace(p, batch=batch, precision=precision) for p in found[kernel.name]}
            assert set(listed) == expected
            assert len(listed) == len(expected)


def test_the_layers_of_training_are_those_of_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    from unet import UNet

    monkeypatch.setattr(conv_moments, "measured_faster", lambda *_: True)
    account = kernels.Account(KERNELS)
    for bilinear in (False, True):
        with torch.device("meta"):
            model = kernels.fuse(UNet(3, 2, bilinear).bfloat16(), training=True)
        image = torch.empty(16, 3, 512, 512, device="meta", dtype=torch.bfloat16)
        with account:
            model(image).sum().backward()
    for kernel in KERNELS:
        called = {call.problem for call in account.calls if call.kernel == kernel.name}
        if kernel.name != "conv_transpose":  # inference has it too, in every precision
            assert set(kernel.layers) == called or not called
            assert len(kernel.layers) == len(set(kernel.layers))
    assert {call.kernel for call in account.calls} == {kernel.name for kernel in KERNELS} - {
        *("conv_bn_relu", "conv_bn_relu_pool", "conv_bn_relu_up")
    }


def test_settings_of_one_kernel_are_not_another_s(measured: Callable[..., None]) -> None:
    measured((PROBLEM, CUT))
    assert settings_for(PROBLEM, 90, "NVIDIA H200", kernel="conv_transpose") != CUT


def test_settings_measured_without_what_is_fused_say_nothing_about_it(measured: Callable[..., None]) -> None:
    measured((PROBLEM, CUT))
    for fused in ({"pool": True}, {"classes": 2}, {"in_channels": 128, "second_channels": 64}):
        problem = dataclasses.replace(PROBLEM, **fused)
        assert settings_for(problem, 90, "NVIDIA H200") == settings_for(problem, 90)


@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_kernel_has_candidates_that_serve(kernel: Kernel, capability: int) -> None:
    for problem in {problem.fused: problem for problem in kernel.layers if problem.precision == "bf16"}.values():
        found = kernel.candidates(problem, capability, compiled=False)
        assert found[0] == kernel.settings(problem, capability)
        assert len(found) > 5
        assert all(settings.serves(cut, problem) for cut in found)
