"""Base runs base's code and base's ops: otherwise every regression of a kernel would read SAME."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gate.checkout import checked_out
from bench.gate.processes import Processes

from .conftest import ROOT
from .toy import Toy

# Both versions in one process, built in this order; what each one's step gives, before and after the other's.
BOTH = """
import json, sys
from pathlib import Path
from bench.gate.sides import Local
from bench.gate.versions import Version
base, head = (Local(Version(Path(root), tag), "infer-toy", 1) for root, tag in zip(sys.argv[1:3], {tags}))
for side in (base, head): side.build()
def value(side):
    with side.version.active():
        return float(side.subject.step()[0]), Path(sys.modules["kernels"].__file__).parents[1].name
def outside():
    import torch
    left = [name for name in ("kernels", "unet") if name in sys.modules]
    return left + ["toy_kernels"] * hasattr(torch.ops.toy_kernels, "work")
print(json.dumps([value(base), value(head), value(base), outside(), sys.modules["bench"].__file__]))
"""


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    (tmp_path / "toy").mkdir()
    return Toy(tmp_path / "toy")


def both(toy: Toy, base: str, tags: tuple[str, str]) -> list[list[object]]:
    """What base's commit and the working tree do in one process."""
    with checked_out(toy.root, base) as side:
        command = [sys.executable, "-c", BOTH.format(tags=tags), side.root, str(toy.root)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.slow
def test_an_op_that_both_versions_register_under_one_name_stays_each_ones_own(toy: Toy) -> None:
    base = toy.commit()
    toy.change("unet/__init__.py", "2.0", "3.0")
    of_base, of_head, again, outside, mine = both(toy, base, ("base", "head"))
    assert of_base == again == [2.0, base[:12]]
    assert of_head == [3.0, "toy"]
    assert outside == [], "neither is left behind when no version is active"
    assert str(mine).startswith(str(ROOT))


@pytest.mark.slow
def test_without_namespaces_of_their_own_base_would_run_heads_op(toy: Toy) -> None:
    """The guard taken out: what the test above would see."""
    base = toy.commit()
    toy.change("unet/__init__.py", "2.0", "3.0")
    of_base, of_head, *_ = both(toy, base, ("", ""))
    assert of_base[0] == of_head[0] == 3.0


def test_a_version_that_registers_into_somebody_elses_namespace_wants_a_process_of_its_own(
    toy: Toy, tmp_path: Path
) -> None:
    base = toy.commit()
    foreign = "import torch\nlibrary = torch.library.Library('aten', 'FRAGMENT')\n"
    toy.change("kernels/__init__.py", "import torch\n", foreign)
    with checked_out(toy.root, base) as side:
        answer = Processes(tmp_path, ()).trial("infer-toy", (side.root, str(toy.root)), together=True, seed=0)
    assert answer.status == "unshareable"
    assert answer.reason == "it registers into 'aten', which belongs to the whole process"


@pytest.mark.slow
def test_versions_that_set_the_process_differently_get_one_each(toy: Toy, tmp_path: Path) -> None:
    """Shared, the later one's threads would be both's, and the change would read SAME."""
    base = toy.commit()
    toy.change("bench/subject.py", "set_num_threads(1)", "set_num_threads(2)")
    toy.change("unet/__init__.py", "2.0", "20.0")
    work = Processes(tmp_path, ())
    with checked_out(toy.root, base) as side:
        roots = (side.root, str(toy.root))
        together = work.trial("infer-toy", roots, together=True, seed=0)
        apart = work.trial("infer-toy", roots, together=False, seed=0)
    assert (together.status, together.reason) == ("unshareable", "they set threads differently")
    assert apart.status == "ok", apart.reason
    assert min(apart.head_ms) >= 20.0
    assert min(apart.base_ms) < 20.0
