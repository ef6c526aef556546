"""The fused network on its way through the harness, in Triton's interpreter: what a GPU will run, but never timed."""

from pathlib import Path
from typing import Any

import pytest

from bench.case import Case
from bench.distributed import Group
from bench.engine.accuracy import Accuracy
from bench.engine.fusion import Fusion
from bench.engine.saved import Saved
from bench.engine.work import Work
from bench.results import Settings
from bench.subject import build

from .conftest import TINY


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_the_fused_network_passes_the_accuracy_check_of_every_case(
    fitted_cache: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    axes: dict[str, Any] = {**TINY, "precision": precision, "layout": "nhwc", "size": "32x48"}
    fused = build(Case(implementation="triton", **axes), Group())
    found = Accuracy().measure(fused, Settings())
    assert found.fault == ""
    if precision == "fp32":
        assert 0 < found["rel_l2"] < 1e-5, "it is a computation of its own, and a right one"
    assert Fusion().measure(fused, Settings()) == {"chains_fused": 10, "chains_left": 0}
    eager = build(Case(**axes), Group())
    assert Work().measure(fused, Settings()) == Work().measure(eager, Settings()), "the network's work, whoever does it"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_the_fused_network_trains_as_every_case_does(
    fitted_cache: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    axes: dict[str, Any] = {**TINY, "task": "train", "precision": precision, "layout": "nhwc"}
    fused, eager = build(Case(implementation="triton", **axes), Group()), build(Case(**axes), Group())
    assert fused.network is not None
    before = [parameter.clone() for parameter in fused.network.parameters()]
    fused.step()
    assert all((p != old).any() for p, old in zip(fused.network.parameters(), before, strict=True)), (
        "its own parameters"
    )
    assert Fusion().measure(fused, Settings()) == {"chains_fused": 10, "chains_left": 0}
    kept, all_kept = (Saved().measure(one, Settings())["saved_mib"] for one in (fused, eager))
    assert isinstance(kept, float)
    assert isinstance(all_kept, float)
    assert kept < 0.75 * all_kept
    found = Accuracy().measure(fused, Settings())
    assert found.fault == ""
    if precision == "fp32":
        assert 0 < found["rel_l2"] < 4e-3, "it is a computation of its own, and a right one"
