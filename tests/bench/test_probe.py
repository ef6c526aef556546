"""Deterministic figures against what can be worked out by hand, in real processes."""

from pathlib import Path

import pytest

from bench.gate.checkout import Side
from bench.gate.processes import Processes
from bench.gate.protocol import Answer

from .toy import Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    (tmp_path / "toy").mkdir()
    return Toy(tmp_path / "toy")


def probe(toy: Toy, folder: Path) -> Answer:
    return Processes(folder, ()).probe("infer-toy", Side(ref="", commit="", root=str(toy.root)))


LINEAR = """
    import torch
    from torch import nn
    class Subject:
        device, network, images = torch.device("cpu"), nn.Linear(256, 256, bias=False), torch.ones(1024, 256)
        def step(self):
            self.network.zero_grad(set_to_none=True)
            self.network(self.images).relu().sum().backward()
        def synchronize(self): pass
    def recipe(case): return case
    def prepare_process(case, cores): torch.set_num_threads(1)
    def build(case, group): return Subject()
"""


def test_memory_and_arithmetic_are_those_of_the_step(toy: Toy, tmp_path: Path) -> None:
    toy.write(**{"bench/subject.py": LINEAR})
    answer = probe(toy, tmp_path)
    assert answer.status == "ok", answer.reason
    figures = answer.figures
    # 1 MiB of images for the weight's gradient, 1 MiB of activations for ReLU's; the weight itself is not counted.
    assert figures["saved_mib"] == 2.0
    # 2 · 1024 · 256 · 256 forward, as many for the weight's gradient.
    assert figures["gflop"] == pytest.approx(2 * 2 * 1024 * 256 * 256 / 1e9)
    # Two tensors of 1 MiB at a time: ReLU's input and output, later its output and the gradient; and a few numbers.
    assert 2.0 <= figures["live_mib"] <= 2.01
    assert "graph_breaks" not in figures, "nothing was compiled"


def test_an_inaccurate_version_is_broken_however_fast(toy: Toy, tmp_path: Path) -> None:
    accuracy = """
        class Accuracy:
            def measure(self, subject, settings):
                class Found: fault = "relative L2 0.5 against fp32 eager, limit 0.0001"
                return Found()
    """
    results = """
        class Settings: pass
    """
    toy.write(**{"bench/engine/__init__.py": "", "bench/engine/accuracy.py": accuracy, "bench/results.py": results})
    answer = probe(toy, tmp_path)
    assert answer.status == "broken"
    assert answer.reason.startswith("inaccurate: relative L2 0.5")


COMPILED = """
    import torch
    def compute(x):
        x = torch.sin(x).cumsum(0)
        return torch.cos(x) + 1
    class Subject:
        device, network, images = torch.device("cpu"), None, torch.ones(1024)
        compiled = staticmethod(torch.compile(compute))
        def step(self): return self.compiled(self.images)
        def synchronize(self): pass
    def recipe(case): return case
    def prepare_process(case, cores): torch.set_num_threads(1)
    def build(case, group): return Subject()
"""


@pytest.mark.slow
def test_a_graph_break_is_counted_and_so_are_the_kernels_it_costs(toy: Toy, tmp_path: Path) -> None:
    toy.write(**{"bench/subject.py": COMPILED})
    answer = probe(toy, tmp_path)
    assert answer.status == "ok", answer.reason
    whole = answer.figures
    toy.change("bench/subject.py", "return torch.cos(x)", "torch._dynamo.graph_break(); return torch.cos(x)")
    broken = probe(toy, tmp_path).figures
    assert (whole["graph_breaks"], whole["graphs"]) == (0, 1)
    assert (broken["graph_breaks"], broken["graphs"]) == (1, 2)
    assert whole["compiled_kernels"] >= 1
    assert broken["compiled_kernels"] >= whole["compiled_kernels"]
