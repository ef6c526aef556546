"""ONNX Runtime on a CPU, from an ONNX file made by PyTorch's own exporter."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from bench.runtimes.artefact import Runtime, any_size, installed, on_cpu_as_it_likes, register

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bench.case import Case
    from bench.runtimes.artefact import Call

FILE = "unet.onnx"
SERVE = """import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = SETTINGS["threads"]
session = onnxruntime.InferenceSession(HERE / "unet.onnx", options, providers=["CPUExecutionProvider"])


def run(images):
    return session.run(None, {"image": images})[0]
"""


def settings(case: Case) -> dict[str, str | int]:
    """Threads; 0 is all cores."""
    return {"threads": case.threads}


def save(network: nn.Module, case: Case, folder: Path) -> None:
    """Write `unet.onnx`: input `image`, output `logits`, weights inside."""
    import torch

    from bench.runtimes.program import program

    exported = program(network, case, any_size(case))
    # It tells of a package that is not wanted here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            exported, dynamo=True, input_names=["image"], output_names=["logits"], optimize=True, verbose=False
        )
    if made is None:
        raise RuntimeError("torch.onnx.export gave no program")
    made.save(folder / FILE)


def load(folder: Path, case: Case) -> Call:
    """A session with as many threads as PyTorch has in this process."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"image": images.numpy()})
        return torch.from_numpy(logits)

    return call


register(
    Runtime(name="onnx", package="onnxruntime", files=(FILE,), save=save, load=load, serve=SERVE, settings=settings),
    installed("onnx", "onnxruntime", "onnxscript"),
    on_cpu_as_it_likes("fp32"),
)
