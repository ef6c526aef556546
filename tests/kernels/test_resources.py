"""What the compiler makes of the shipped settings for GPUs that are not here: no spills, tensor cores, it fits."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import kernels
from kernels import KERNELS, conv_bn_relu_up, conv_transpose, conv_weight_gradient, convolve, passes, resources
from kernels.convolve import compilation
from kernels.inspection import SHARED_KIB, as_compiled, compile_ahead, compiled, inspect, read, shared_limit
from kernels.launch import ahead
from kernels.problem import Precision, Problem, Settings
from kernels.resources import TARGETS, capability_of
from kernels.settings import settings_for
from kernels.spec import Compilation
from kernels.unet_layers import folded_layers, unet_layers

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from kernels.spec import Kernel


@pytest.fixture
def a_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(dataclasses.replace(kernel, layers=kernel.layers[1:2], compiled=()) for kernel in KERNELS)
    monkeypatch.setattr(kernels, "KERNELS", few)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("a_few_layers")
def test_a_few_layers_compile_well(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_well(target, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_compiles_well(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_well(target, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_training_compiles_well_in_other_precisions(
    target: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = []
    for kernel in (kernel for kernel in KERNELS if kernel.compiled):
        # Of each kind the fewest registers that it may have: the narrow tile, where a multiplication is one.
        kinds = {problem.fused: problem for problem in kernel.compiled[::-1] if problem.in_channels > 3}
        layers = tuple(dataclasses.replace(problem, precision=precision) for problem in kinds.values())
        few.append(dataclasses.replace(kernel, layers=layers, compiled=()))
    assert len(few) == 6
    monkeypatch.setattr(kernels, "KERNELS", tuple(few))
    compile_well(target, monkeypatch)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_compiled_stands_for_every_layer(target: str) -> None:
    lengths = {"IN_CHANNELS", "PIXELS"}  # of loops

    def code(kernel: Kernel, problem: Problem) -> str:
        made = kernel.compilation(problem, kernel.settings(problem, capability_of(target)))
        constants = {name: value for name, value in made.constants.items() if name not in lengths}
        constants["SECOND"] = problem.second_channels > 0
        return repr((made.function.fn, made.types, constants, made.aligned, made.warps, made.stages))

    for kernel in (kernel for kernel in KERNELS if kernel.compiled):
        assert set(kernel.compiled) <= set(kernel.layers)
        assert {code(kernel, problem) for problem in kernel.compiled} == {code(kernel, p) for p in kernel.layers}


def compile_well(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiling processes
    done: list[tuple[int, int]] = []
    rows = resources.rows([target], progress=lambda *counts: done.append(counts))
    assert len(rows) == sum(len(kernel.compiled or kernel.layers) for kernel in kernels.KERNELS)
    assert len({(row.kernel, row.target, row.config) for row in rows}) == len(rows)
    assert max(done) == (len(done), len(done))
    assert [row for row in rows if row.spill_bytes] == []
    assert [row for row in rows if row.shared_bytes > row.shared_limit_bytes] == []
    convolve = {kernel.name for kernel in KERNELS if kernel.flops(kernel.layers[0])}
    assert [r for r in rows if r.kernel in convolve and not r.tensor_core and "fp32" not in r.config] == []
    assert all(row.registers <= 255 and row.instructions > 100 for row in rows)
    by_descriptor = [row for row in rows if "| tma" in row.config]
    assert all(row.async_copies for row in by_descriptor)
    assert bool(by_descriptor) is (capability_of(target) >= 90)


def test_a_spill_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = Problem(batch=1, height=64, width=64, in_channels=128, out_channels=128, precision="tf32")
    cut = Settings(family="pointer", rows=8, columns=16, out_block=128, in_block=32, warps=4, stages=3)
    assert inspect(compilation(problem, cut), 80).spill_bytes > 0
    without_tensor_cores = Problem(batch=1, height=64, width=64, in_channels=128, out_channels=128, precision="fp32")
    small = Settings(family="pointer", rows=8, columns=8, out_block=64, in_block=16, warps=8, stages=2)
    assert inspect(compilation(without_tensor_cores, small), 80).tensor_core == 0


@pytest.mark.slow
@pytest.mark.parametrize(("target", "channels"), [("sm_80", 24), ("sm_120", 1)])
def test_passes_over_channels_of_no_unet_do_not_spill(
    target: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = []
    for kernel in (kernel for kernel in KERNELS if kernel.settings is passes.settings_for):
        layer = dataclasses.replace(
            kernel.layers[0], height=63, width=65, in_channels=channels, out_channels=channels, pool=True
        )
        few.append(dataclasses.replace(kernel, layers=(layer,), compiled=()))
    assert len(few) == 3
    monkeypatch.setattr(kernels, "KERNELS", tuple(few))
    assert [row for row in resources.rows([target]) if row.spill_bytes] == []


def test_what_is_read_together_is_what_each_uses_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problems = [
        Problem(batch=1, height=64, width=64, in_channels=i, out_channels=o, precision="bf16")
        for i, o in ((3, 64), (64, 64), (128, 128))
    ]
    made = [compiled(compilation(one, settings_for(one, target)), target) for target in (80, 90) for one in problems]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "together"))  # where nothing is remembered
    together = read(made)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "alone"))
    assert together == [read([one])[0] for one in made]
    assert len(set(together)) == len(made)
    assert all(one.tensor_core for one in together)


@pytest.mark.parametrize(
    ("name", "shape", "fused", "capability"),
    [
        ("conv_bn_relu", (2, 16, 32, 64, 64, "bf16"), {}, 90),
        ("conv_bn_relu", (1, 17, 33, 3, 64, "fp16"), {}, 90),
        ("conv_bn_relu", (2, 16, 32, 64, 1, "tf32"), {}, 80),
        ("conv_bn_relu", (1, 16, 32, 64, 64, "bf16"), {"second_channels": 32}, 90),
        ("conv_bn_relu", (1, 16, 32, 64, 64, "bf16"), {"second_channels": 32}, 80),
        ("conv_bn_relu", (1, 16, 32, 64, 64, "bf16"), {"second_channels": 32, "upsample": True}, 90),
        ("conv_bn_relu", (1, 16, 32, 64, 64, "bf16"), {"classes": 2}, 90),
        ("conv_bn_relu_pool", (1, 16, 32, 64, 64, "bf16"), {"pool": True}, 90),
        ("conv_bn_relu_pool", (1, 17, 33, 64, 64, "bf16"), {"pool": True}, 80),
        ("conv_bn_relu_up", (2, 16, 32, 192, 64, "bf16"), {"second_channels": 128}, 90),
        ("conv_bn_relu_up", (1, 16, 34, 192, 64, "bf16"), {"second_channels": 128}, 80),
        ("conv_transpose", (2, 16, 32, 64, 32, "bf16"), {}, 90),
        ("conv_transpose", (2, 16, 32, 64, 1, "bf16"), {}, 80),
        ("conv_moments", (2, 16, 32, 64, 64, "bf16"), {}, 90),
        ("conv_moments", (1, 17, 33, 3, 64, "bf16"), {}, 80),
        ("norm_relu", (2, 16, 32, 64, 64, "bf16"), {"pool": True}, 90),
        ("norm_relu_sums", (2, 16, 32, 64, 64, "bf16"), {"pool": True}, 90),
        ("norm_relu_gradient", (2, 17, 33, 8, 8, "bf16"), {}, 80),
        ("conv_gradient", (2, 16, 32, 64, 32, "bf16"), {}, 90),
        ("conv_weight_gradient", (2, 16, 32, 64, 32, "bf16"), {}, 90),
        ("conv_weight_gradient", (1, 17, 33, 3, 64, "fp32"), {}, 80),
    ],
    ids=str,
)
def test_what_is_compiled_ahead_is_what_a_launch_compiles(
    name: str,
    shape: tuple[object, ...],
    fused: dict[str, object],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == name)
    names = [field.name for field in dataclasses.fields(Problem)]
    problem = Problem(**dict(zip(names, shape, strict=False)), **fused)
    cut = kernel.settings(problem, capability)
    launched: list[tuple[Any, ...]] = []
    for module in (convolve, conv_bn_relu_up, conv_transpose, passes, conv_weight_gradient):
        monkeypatch.setattr(
            module, "launch", lambda kernel, _grid, _device, *a, **options: launched.append((kernel, a, options))
        )
    kernel.launcher(kernel.inputs(problem, torch.device("cpu"), torch.Generator()), problem, cut)()
    ((function, arguments, options),) = launched
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bound, specialization, rest = create_function_from_signature(function.signature, function.params, backend)(
        *arguments, **options
    )
    made, types, constants, attributes = function._pack_args(backend, options, bound, specialization, rest)
    ahead = kernel.compilation(problem, cut)
    names = function.arg_names
    assert types == {name: ahead.types.get(name, "constexpr") for name in names}
    assert {names[path[0]]: value for path, value in constants.items()} == ahead.constants
    assert {names[path[0]] for path, value in attributes.items() if value} == set(ahead.aligned)
    assert (made.num_warps, made.num_stages) == (ahead.warps, ahead.stages)
    # So a launch compiles nothing that was compiled ahead: Triton's disk cache names both alike.
    mine, options = as_compiled(ahead)
    assert mine.hash() == ASTSource(function, types, constants, attributes).hash()
    assert backend.parse_options(options).hash() == made.hash()


# Of everything that PTX adds up in memory where others add as well: in which order, nobody knows.
ATOMIC = re.compile(r"\b(?:atom|red|cp\.reduce)\.")


@pytest.mark.parametrize(
    "target", [target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in TARGETS]
)
@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
def test_no_kernel_has_an_atomic(kernel: Kernel, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    capability = capability_of(target)
    # One layer of each kind of code, as training and inference take them.
    kinds = {(layer.fused, layer.in_channels < 16): layer for layer in kernel.layers if layer.precision == "bf16"}
    assert kinds
    for layer in kinds.values():
        made = kernel.compilation(layer, kernel.settings(layer, capability))
        assert ATOMIC.findall(compile_ahead(made, capability).asm["ptx"]) == []


@triton.jit  # type: ignore[untyped-decorator] # triton's
def sums_in_one_place(total_ptr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201 - types would be compiled
    tl.atomic_add(total_ptr, 1.0)


@pytest.mark.parametrize("target", TARGETS)
def test_an_atomic_would_be_seen(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = Compilation(
        function=sums_in_one_place, types={"total_ptr": "*fp32"}, constants={}, aligned=(), warps=4, stages=1
    )
    assert ATOMIC.findall(compile_ahead(made, capability_of(target)).asm["ptx"])


def test_offsets_of_many_classes_are_computed_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 maps of 12,000² are more than 2^31 logits: in NCHW the last ones' offsets do not fit 32 bits.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = Problem(batch=1, height=16, width=32, in_channels=64, out_channels=64, precision="bf16", classes=16)
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(convolve, "launch", lambda kernel, _grid, _device, *a, **o: launched.append((kernel, a, o)))
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "conv_bn_relu")
    *arguments, _image = kernel.inputs(problem, torch.device("cpu"), torch.Generator())
    cut = kernel.settings(problem, 80)
    kernel.launcher(tuple(arguments), problem, cut)()
    ((function, given, options),) = launched
    named = dict(zip(function.arg_names, given, strict=False))
    constants = {name: value for name, value in options.items() if name.isupper()}
    made = ahead(function, named, constants, warps=cut.warps, stages=cut.stages)
    ttir = compile_ahead(made, 80).asm["ttir"]
    assert "%logits_c: i32" in ttir
    assert re.findall(r"arith.muli .*%logits_c.* : i32", ttir) == []


@pytest.mark.parametrize("family", ["tma", "pointer"])
def test_nan_survives_the_relu_in_the_machine_s_own_words(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter's maximum keeps NaN in any case; the GPU's does where it is told.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = Problem(batch=1, height=64, width=64, in_channels=64, out_channels=64, precision="bf16")
    ptx = compile_ahead(compilation(problem, settings_for(problem, 90, family=family)), 90).asm["ptx"]
    assert "max.NaN.f32" in ptx
    assert "max.f32" not in ptx


@pytest.mark.parametrize(
    ("kernel", "layer"),
    [
        *((convolve, layer) for layer in unet_layers(batch=16) if layer.in_channels > 3 and not layer.upsample),
        *((conv_bn_relu_up, layer) for layer in folded_layers(batch=16)),
    ],
    ids=lambda part: str(part) if isinstance(part, Problem) else part.__name__,
)
def test_wgmma_takes_both_operands_from_shared_memory(
    kernel: ModuleType, layer: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that goes through registers costs 16 of them and a load a step; a dimension of size 1 in the wrong place of a
    # descriptor's block is enough.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cut = getattr(kernel, "settings_for", settings_for)(layer, 90)
    ptx = compile_ahead(kernel.compilation(layer, cut), 90).asm["ptx"]
    multiplications = [line for line in ptx.splitlines() if "wgmma.mma_async" in line]
    assert multiplications
    assert all(re.search(r"\}, %rd\d+, %rd\d+,", line) for line in multiplications)


def test_one_kernel_by_name() -> None:
    with pytest.raises(
        ValueError, match="no kernel is called 'nothing'; there are: conv_bn_relu, conv_bn_relu_pool, conv_bn_relu_up, "
    ):
        resources.rows(["sm_90"], "nothing")


@pytest.mark.parametrize("target", ["90", "sm90", "sm_x", "sm_999", "hopper"])
def test_a_target_is_written_as_nvidia_writes_it(target: str) -> None:
    with pytest.raises(ValueError, match="a target is one of sm_80"):
        resources.rows([target])


def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = Problem(batch=1, height=64, width=64, in_channels=64, out_channels=64, precision="bf16")
    cut = Settings(family="pointer", rows=8, columns=16, out_block=64, in_block=64, warps=4, stages=3)
    broken = compilation(problem, cut)
    broken.types.pop("height")
    with pytest.raises(Exception, match="height"):
        inspect(broken, 80)


def test_an_unknown_gpu_is_held_to_the_smallest_shared_memory() -> None:
    assert shared_limit(200) == 1024 * min(SHARED_KIB.values())
    assert shared_limit(90) == 232448
