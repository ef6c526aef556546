"""AOTInductor: what torch.compile would make of the network, compiled ahead of time into a `.pt2` package.

Its code takes the shape of an image on trust, and computes nonsense from another, unless `AOTI_RUNTIME_CHECK_INPUTS=1`
stands in the environment when the package is loaded.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from bench.implementations import cxx
from bench.runtimes.artefact import Runtime, Sizes, register

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from bench.case import Case
    from bench.machine import Machine
    from bench.runtimes.artefact import Call

FILE = "unet.pt2"
SERVE = """import os

import torch._inductor

# Without it the code takes the shape of an image on trust, and computes nonsense from another.
os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
torch.set_num_threads(SETTINGS["threads"] or torch.get_num_threads())
package = torch._inductor.aoti_load_package(str(HERE / "unet.pt2"))


def run(images):
    given = torch.from_numpy(images).to(SETTINGS["device"], memory_format=getattr(torch, SETTINGS["layout"]))
    with torch.inference_mode():
        return package(given).float().cpu().numpy()
"""
CHECK = "AOTI_RUNTIME_CHECK_INPUTS"


def sizes(case: Case) -> Sizes:
    """The case's own alone: with free sizes its code packs no weights ahead, and was seen to take twice as long."""
    height, width = case.height, case.breadth
    if case.frame == "padded":
        step = 2**case.depth
        height, width = (-(-length // step) * step for length in (height, width))
    return Sizes(batch=(case.batch,) * 2, height=(height,) * 2, width=(width,) * 2)


def settings(case: Case) -> dict[str, str | int]:
    """Device, PyTorch's name of the layout, and threads; 0 is all cores."""
    layout = "channels_last" if case.layout == "nhwc" else "contiguous_format"
    return {"device": "cuda" if case.on_gpu else "cpu", "layout": layout, "threads": case.threads}


def save(network: nn.Module, case: Case, folder: Path) -> None:
    """Compile for the case's device and precision, and write `unet.pt2`."""
    from torch._inductor import aoti_compile_and_package

    from bench.runtimes.program import program

    exported = program(network, case, sizes(case), autocast=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aoti_compile_and_package(exported, package_path=str(folder / FILE))


def load(folder: Path, case: Case) -> Call:
    """The package's function, which refuses what it was not compiled for."""
    from torch._inductor import aoti_load_package

    del case  # everything it decides is in the package, and threads are the process's
    os.environ[CHECK] = "1"
    call: Call = aoti_load_package(str(folder / FILE))
    return call


def _fp32_images(case: Case, _: Machine) -> str | None:
    return "takes fp32 images: lower precision by autocast alone" if case.precision in {"bf16", "fp16"} else None


register(
    Runtime(
        name="aotinductor",
        package="torch",
        files=(FILE,),
        save=save,
        load=load,
        serve=SERVE,
        settings=settings,
        sizes=sizes,
    ),
    cxx,
    _fp32_images,
    one_size=True,
)
