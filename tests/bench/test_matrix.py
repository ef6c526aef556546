import msgspec
import pytest

from bench import matrix
from bench.case import Case, CaseError, parse_axes, parse_id
from bench.gpus import Gpu
from bench.machine import Machine
from bench.matrix import PRESETS, cases
from bench.support import unsupported

from .conftest import MACHINE

CPU = MACHINE
H200 = Gpu(name="NVIDIA H200", uuid=None, memory_mib=143771, driver=None, power_limit_w=None, compute_capability=(9, 0))
GPU = msgspec.structs.replace(CPU, gpus=(H200,), torch_cuda="13.0")
TWO = msgspec.structs.replace(GPU, gpus=(H200, H200))
NO_COMPILER = msgspec.structs.replace(CPU, cxx=None, cxx_missing="no C++ compiler")


def nodes(machine: Machine, count: int) -> Machine:
    return msgspec.structs.replace(machine, nodes=count)


def supported(machine: Machine, preset: str) -> list[Case]:
    return [case for case in cases(machine, preset=preset) if unsupported(case, machine) is None]


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_no_case_twice(preset: str, machine: Machine) -> None:
    found = cases(machine, preset=preset)
    assert len(set(found)) == len(found) > 0


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_quick_compares_everything_the_mission_names(machine: Machine) -> None:
    found = cases(machine)
    precisions = {"fp32", "amp_bf16"} | ({"tf32", "amp_fp16"} if machine is GPU else set())
    for task in ("infer", "train"):
        mine = [case for case in found if case.task == task]
        assert {case.implementation for case in mine} == {"eager", "compile", "triton"}
        assert {case.upsampling for case in mine} == {"bilinear", "transposed"}
        assert {case.precision for case in mine} == precisions
    assert {case.processes for case in found} == {1, 2}
    assert len(found) <= 40


def test_quick_on_a_cpu_is_the_whole_product_and_a_pair_of_one_and_two_processes() -> None:
    found = cases(CPU)
    assert len(found) == 2 * 3 * 2 * 2 + 2
    one, two = (case for case in found if case.threads == 1)
    assert msgspec.structs.replace(two, devices="1cpu") == one


def test_quick_on_a_gpu_has_both_batches_and_a_pair_of_one_and_two_devices() -> None:
    found = cases(GPU)
    assert {case.batch for case in found} == {1, 16}
    pairs = [case for case in found if case.devices == "2gpu"]
    assert pairs
    assert all(msgspec.structs.replace(case, devices="1gpu") in found for case in pairs)


def test_h200_holds_every_implementation_layers_regimes_and_scaling() -> None:
    found = cases(GPU, preset="h200")
    assert {case.implementation for case in found} == set(matrix.EVERY_IMPLEMENTATION)
    assert {case.task for case in found} == {"infer", "train", "layer"}
    assert {case.regime for case in found} == {"burst", "sustained"}
    assert {case.cache for case in found} == {"warm", "cold"}
    assert {case.processes for case in found} == {1, 2, 4, 8}
    assert {unsupported(case, GPU) for case in found} <= {None, *(f"{n} GPUs wanted, 1 here" for n in (2, 4, 8))}
    assert {unsupported(case, CPU) for case in found} == {"no CUDA device"}


def test_ci_is_small_and_has_inference_and_training_eager_and_compiled() -> None:
    found = cases(CPU, preset="ci")
    assert supported(CPU, "ci") == [*found]
    assert {(case.task, case.implementation) for case in found} == {
        (task, implementation) for task in ("infer", "train") for implementation in ("eager", "compile")
    }
    assert {case.upsampling for case in found} == {"bilinear", "transposed"}
    assert all(case.threads == 1 and case.processes == 1 for case in found), "the gate compares one process with one"
    assert len(found) <= 10
    assert all(case.on_gpu and case.processes == 1 for case in cases(GPU, preset="ci"))


def test_a_gpu_that_torch_cannot_use_is_no_gpu_to_a_preset() -> None:
    assert all(not case.on_gpu for case in cases(msgspec.structs.replace(GPU, torch_cuda=None)))


def test_plain_numbers_of_devices_are_those_the_machine_has() -> None:
    axes = parse_axes(["devices=1,2", "devices=1gpu"])
    assert {case.devices for case in cases(CPU, preset="smoke", axes=axes)} == {"1cpu", "2cpu", "1gpu"}
    assert {case.devices for case in cases(GPU, preset="smoke", axes=axes)} == {"1gpu", "2gpu"}
    with pytest.raises(CaseError):
        parse_id(Case().id.replace("1cpu", "1"))


@pytest.mark.parametrize("task", ["infer", "train"])
def test_every_implementation_is_measured_on_several_devices(task: str) -> None:
    for name in ("eager", "compile", "triton"):
        one = Case(task=task, implementation=name, devices="1gpu")
        many = msgspec.structs.replace(one, devices="2gpu")
        assert unsupported(many, TWO) == unsupported(one, TWO)


def test_chosen_cases_stand_for_themselves_and_not_for_a_preset() -> None:
    assert cases(CPU, chosen=[Case()]) == (Case(),)


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(CaseError, match=r"unknown preset 'quik'; allowed: smoke, quick, full, ci, h200"):
        cases(CPU, preset="quik")


@pytest.mark.parametrize(
    ("case", "machine", "reason"),
    [
        (Case(implementation="triton"), CPU, "no CUDA device"),
        (Case(implementation="triton", task="train"), CPU, "no CUDA device"),
        (
            Case(implementation="triton", task="train", activations="recomputed", devices="1gpu"),
            GPU,
            "a fused network keeps the raw convolutions",
        ),
        (
            Case(implementation="triton_graph", task="train", devices="1gpu"),
            GPU,
            "for inference alone: training changes the weights",
        ),
        (Case(implementation="compile"), NO_COMPILER, "no C++ compiler"),
        (Case(devices="1gpu"), CPU, "no CUDA device"),
        (Case(devices="2gpu"), GPU, "2 GPUs wanted, 1 here"),
        (Case(devices="1gpu"), msgspec.structs.replace(GPU, torch_cuda=None), "torch 2.13.0 is built without CUDA"),
        (Case(devices="3cpu"), CPU, "3 processes wanted, 2 CPU cores here"),
        (Case(precision="tf32"), CPU, "TF32 is arithmetic of CUDA devices"),
        (Case(precision="amp_bf16"), msgspec.structs.replace(CPU, cpu_half=()), "no bf16 convolutions on this CPU"),
        (Case(precision="fp16"), msgspec.structs.replace(CPU, cpu_half=("bf16",)), "no fp16 convolutions on this CPU"),
        (Case(precision="fp16", task="train"), CPU, "AdamW's steps vanish in fp16 weights"),
        (Case(implementation="eager_graph"), CPU, "CUDA graphs are for CUDA devices: no CUDA device"),
        (Case(implementation="compile_reduce_overhead"), CPU, "CUDA graphs are for CUDA devices: no CUDA device"),
        (
            Case(implementation="compile_freezing", task="train"),
            CPU,
            "for inference alone: training changes the weights",
        ),
        (Case(layer="up1_1"), CPU, "layer up1_1 is for the task layer"),
        (Case(cache="cold"), CPU, "a cold cache is for the task layer"),
        (Case(task="layer", devices="2cpu"), CPU, "a layer runs on one device"),
        (Case(task="layer", container="sequential"), CPU, "layers are named as the plain UNet names them"),
        (Case(task="layer", layer="down4_1", depth=3), CPU, "a network of depth 3 has no layer down4_1"),
        (Case(task="layer", activations="recomputed"), CPU, "inference keeps no activations"),
        (Case(size="15x64"), CPU, "an image of 15x64 is too small for 4 halvings: 16 pixels a side at least"),
        (Case(devices="2cpu", strategy="dp"), CPU, "DataParallel on CPUs silently passes everything through"),
        (Case(devices="2cpu", strategy="single"), CPU, "one device wanted by strategy single, 2 by devices"),
        (Case(strategy="replicas"), CPU, "strategy replicas shares a step among several devices: there is one"),
        (Case(devices="2cpu", strategy="ddp"), CPU, "DistributedDataParallel averages gradients, inference has none"),
        (Case(devices="2cpu", strategy="replicas", task="train"), CPU, "replicas exchange no gradients"),
        (Case(devices="2gpu", strategy="dp", implementation="compile"), TWO, "DataParallel makes new replicas"),
        (Case(devices="2gpu", batchnorm="syncbn", strategy="dp", task="train"), TWO, "SyncBatchNorm synchronizes the"),
        (Case(batchnorm="syncbn", task="train"), CPU, "SyncBatchNorm synchronizes the ranks of ddp, not single"),
        (Case(devices="2cpu", batchnorm="syncbn"), CPU, "SyncBatchNorm synchronizes the ranks of ddp, not replicas"),
        (Case(devices="2cpu", scaling="strong"), CPU, "1 images cannot be shared among 2 processes"),
        (Case(accumulation=2), CPU, "inference has no gradients to accumulate"),
        (
            Case(devices="2gpu", batchnorm="syncbn", task="train", implementation="triton"),
            TWO,
            "the kernels of triton take the statistics of one device",
        ),
        (Case(size="16x16", task="train"), CPU, "BatchNorm cannot train on one value a channel"),
        (Case(), nodes(CPU, 2), "1 process cannot be shared out evenly among 2 nodes"),
        (Case(devices="3cpu"), nodes(CPU, 2), "3 processes cannot be shared out evenly among 2 nodes"),
        (Case(devices="8cpu"), nodes(CPU, 2), "8 processes wanted, 2 CPU cores here and on each of 2 nodes"),
        (Case(devices="8gpu"), nodes(TWO, 2), "8 GPUs wanted, 2 here and on each of 2 nodes"),
    ],
    ids=lambda part: part.id if isinstance(part, Case) else None,
)
def test_a_case_that_makes_no_sense_is_unsupported_with_the_reason(case: Case, machine: Machine, reason: str) -> None:
    assert (unsupported(case, machine) or "").startswith(reason)


@pytest.mark.parametrize("case", [Case(), Case(precision="bf16"), Case(precision="amp_bf16", devices="1gpu")])
def test_what_a_processor_multiplies_forbids_nothing_else(case: Case) -> None:
    both = msgspec.structs.replace(GPU, cpu_half=("bf16",) if case.precision == "bf16" else ())
    assert unsupported(case, both) is None


def test_small_cases_are_measured_by_whatever_multiplies_them() -> None:
    old = msgspec.structs.replace(CPU, cpu_half=())
    small = Case(precision="amp_bf16", size="64x64", width=8)
    assert unsupported(small, old) is None
    for larger in ({"size": "256x256"}, {"width": 32}, {"batch": 16}):
        assert unsupported(msgspec.structs.replace(small, **larger), old) is not None


def test_the_devices_of_a_case_are_those_of_all_nodes() -> None:
    assert unsupported(Case(devices="16gpu"), nodes(TWO, 8)) is None
    assert unsupported(Case(devices="4cpu", task="train"), nodes(CPU, 2)) is None


def test_without_a_compiler_everything_but_compile_still_runs() -> None:
    lost = set(supported(CPU, "quick")) - set(supported(NO_COMPILER, "quick"))
    assert {case.implementation for case in lost} == {"compile"}
    assert len(supported(NO_COMPILER, "quick")) == 8 + 2
