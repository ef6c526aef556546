"""An implementation that is eager, and slower in one checkout by a share that an environment variable holds.

The variable is this file's and `real_gates`' alone: `ROOT=SHARE`, the checkout to slow down and by how much.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from bench.case import Case
from bench.environment import ROOT
from bench.implementations import implementation

VARIABLE = "UNET_BENCH_TESTS_SLOW_DOWN"


@implementation("injected")
def injected(model: nn.Module, _: Case) -> Callable[..., Any]:
    root, _, share = os.environ.get(VARIABLE, "").partition("=")
    if root != str(ROOT):
        return model

    def slowed(*inputs: Any) -> Any:  # noqa: ANN401
        start = time.perf_counter()
        outputs = model(*inputs)
        end = time.perf_counter()
        while time.perf_counter() < end + (end - start) * float(share):
            pass
        return outputs

    return slowed
