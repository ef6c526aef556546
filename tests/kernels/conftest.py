"""Where kernel tests run: in Triton's interpreter, and once more on a GPU where there is one."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=NEEDS_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        # Read at each launch: other tests of this process, torch.compile's among them, never see it.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _ieee_fp32() -> Iterator[None]:
    # PyTorch's default multiplies fp32 in TF32 on a GPU: here fp32 means fp32, so that eager is a fair witness.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# Longest that a test may take on a GPU, compilation included, before its worker is given up.
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def _a_gpu_that_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a launch has broken is said of the test that launched it, and the tests after it meet a GPU in order.

    After an illegal access nothing works in the process any more, and a launch that never ends can't be ended from
    Python: with pytest-xdist the worker then dies, the test is told as its crash, and another worker goes on.
    """
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    signal.alarm(PATIENCE_S if in_worker else 0)
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if in_worker:
            os._exit(1)
        pytest.exit(f"the CUDA context is lost: {error}", returncode=1)
    signal.alarm(0)


@pytest.fixture
def lively() -> Callable[[nn.Module], nn.Module]:
    """Statistics and affine parameters as training would leave them: a fresh BatchNorm hides every mistake."""

    def enliven(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3, generator=generator)
                    module.running_var.uniform_(0.4, 2, generator=generator)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                    nn.init.normal_(module.bias, 0, 0.3, generator=generator)
        return model.eval()

    return enliven
