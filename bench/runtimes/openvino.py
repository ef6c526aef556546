"""OpenVINO on a CPU, from its intermediate representation (IR); bf16 is a setting of the engine, not of the file."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from bench.runtimes.artefact import Runtime, any_size, installed, on_cpu_as_it_likes, register

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bench.case import Case
    from bench.runtimes.artefact import Call

FILES = ("unet.xml", "unet.bin")
SERVE = """import openvino

compiled = openvino.Core().compile_model(HERE / "unet.xml", "CPU", SETTINGS)


def run(images):
    return compiled(images)[0]
"""
PRECISION = {"fp32": "f32", "amp_bf16": "bf16"}


def settings(case: Case) -> dict[str, str | int]:
    """What the engine is told, in its own words; 0 threads are all cores."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISION[case.precision],
        "INFERENCE_NUM_THREADS": case.threads,
    }


def save(network: nn.Module, case: Case, folder: Path) -> None:
    """Write `unet.xml` and `unet.bin`, weights in fp32."""
    import openvino

    from bench.runtimes.program import program

    exported = program(network, case, any_size(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(exported)
    openvino.save_model(converted, folder / FILES[0], compress_to_fp16=False)


def load(folder: Path, case: Case) -> Call:
    """The network compiled for this CPU, with as many threads as PyTorch has in this process."""
    import openvino
    import torch

    told = settings(case) | {"INFERENCE_NUM_THREADS": case.threads or torch.get_num_threads()}
    compiled = openvino.Core().compile_model(folder / FILES[0], "CPU", told)

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0])

    return call


register(
    Runtime(name="openvino", package="openvino", files=FILES, save=save, load=load, serve=SERVE, settings=settings),
    installed("openvino", "openvino"),
    on_cpu_as_it_likes(*PRECISION),
)
