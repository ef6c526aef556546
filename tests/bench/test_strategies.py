"""What several ranks compute, against one process that has all their images; every rank is a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.case import Case
from bench.distributed import Group
from bench.engine.latency import Latency
from bench.results import Settings
from bench.strategies import SyncedBatchNorm, share, synchronized, unexchanged
from bench.subject import build
from unet import UNet
from unet.checkpoint import load_training, save_training

from .conftest import ROOT, TINY

STEPS = 3
TRAINING = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from bench.case import Case
from tests.bench.test_strategies import train
from unet.checkpoint import save_training

rank, folder, variants = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
for name, axes in variants.items():
    case = Case(task="train", devices="2cpu", **axes)
    model, optimizer = train(case, rank, 2, folder / "start.pt" if (folder / "start.pt").exists() else None)
    torch.save(model.state_dict(), folder / f"{name} {rank}.pt")
    if rank == 0:
        save_training(model, folder / "training.pt", epoch=1, optimizer=optimizer)
dist.barrier()
dist.destroy_process_group()
"""


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 16, 16, generator=generator)
    return images, (images.mean(1) > 0.5).long()


def train(case: Case, rank: int, size: int, start: Path | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A few steps of a rank on its share of the images, each image weighing the same, as the harness trains."""
    torch.manual_seed(0)
    # fp64, so that nothing but another order of the sums tells the two ways apart.
    network = UNet(3, 2, width=4, depth=2).double().train()
    model = share(synchronized(network, case), case, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if start is not None:
        load_training(model, start, optimizer=optimizer)
    images, masks = pictures(case.joined_batch)
    mine = case.share(rank)
    weight = len(images[mine]) * size / case.joined_batch / case.accumulation
    for _ in range(STEPS):
        optimizer.zero_grad()
        for more in reversed(range(case.accumulation)):
            with unexchanged(model, wanted=more > 0):
                (nn.functional.cross_entropy(model(images[mine].double()), masks[mine]) * weight).backward()
        optimizer.step()
    return model, optimizer


VARIANTS: dict[str, dict[str, Any]] = {
    "even": {"batch": 2, "batchnorm": "syncbn"},
    "uneven shares": {"batch": 5, "scaling": "strong", "batchnorm": "syncbn"},
    "accumulated": {"batch": 2, "accumulation": 2, "batchnorm": "syncbn"},
    "own statistics": {"batch": 2},
}
State = dict[str, torch.Tensor]


def ranks(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, tuple[State, State]]:
    """The states of two ranks after each training."""
    command = [sys.executable, "-c", TRAINING]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder), json.dumps(variants)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in started]
    assert [rank.returncode for rank in started] == [0, 0], errors

    def state(name: str, rank: int) -> State:
        return {key.removeprefix("module."): tensor for key, tensor in torch.load(folder / f"{name} {rank}.pt").items()}

    return {name: (state(name, 0), state(name, 1)) for name in variants}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[State, State]]:
    return ranks(tmp_path_factory.mktemp("ranks"), VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, axes in VARIANTS.items() if "batchnorm" in axes])
def test_synchronized_ranks_train_as_one_process_with_the_joined_batch(
    trained: dict[str, tuple[State, State]], name: str
) -> None:
    case = Case(task="train", devices="2cpu", **VARIANTS[name])
    alone = Case(task="train", batch=case.joined_batch, accumulation=case.accumulation)
    for key, tensor in train(alone, 0, 1)[0].state_dict().items():
        one, other = (state[key] for state in trained[name])
        assert torch.equal(one, other), f"{key} differs between ranks"
        torch.testing.assert_close(one, tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_without_synchronized_statistics_ranks_agree_to_the_bit_though_not_with_the_joined_batch(
    trained: dict[str, tuple[State, State]],
) -> None:
    one, other = trained["own statistics"]
    for key, _ in UNet(3, 2, width=4, depth=2).named_parameters():
        assert torch.equal(one[key], other[key]), key
    expected = train(Case(task="train", batch=4), 0, 1)[0].state_dict()
    assert not torch.allclose(one["inc.double_conv.0.weight"], expected["inc.double_conv.0.weight"], rtol=1e-4)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_in_one_process_and_back(tmp_path: Path) -> None:
    """Two ranks, one process, two ranks, each from the other's file: as one process throughout."""
    both = {"both": VARIANTS["even"]}
    alone = Case(task="train", batch=4)
    (tmp_path / "there").mkdir()
    (tmp_path / "back").mkdir()
    ranks(tmp_path / "there", both)
    model, optimizer = train(alone, 0, 1, tmp_path / "there" / "training.pt")
    save_training(model, tmp_path / "back" / "start.pt", epoch=2, optimizer=optimizer)
    one, other = ranks(tmp_path / "back", both)["both"]

    start = None
    for number in range(3):
        model, optimizer = train(alone, 0, 1, start)
        start = tmp_path / f"{number}.pt"
        save_training(model, start, epoch=number, optimizer=optimizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(one[key], other[key])
        torch.testing.assert_close(one[key], tensor, rtol=1e-9, atol=1e-12)


def test_synchronized_statistics_of_one_process_are_those_of_batchnorm(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain = nn.BatchNorm2d(3)
        nn.init.uniform_(plain.weight)
        synced = SyncedBatchNorm.of(nn.BatchNorm2d(3))
        synced.load_state_dict(plain.state_dict())
        x = torch.randn(4, 3, 5, 7) * 3 + 1
        torch.testing.assert_close(synced(x), plain(x))
        torch.testing.assert_close(synced.state_dict(), plain.state_dict())
        torch.testing.assert_close(synced.eval()(x), plain.eval()(x))
    finally:
        dist.destroy_process_group()


class Told(Group):
    """One of several ranks, of which rank 0 ends the warm-up and the timing at its first look at the clock."""

    def agree(self, decision: Any) -> Any:  # noqa: ANN401 (whatever the ranks agree on)
        return "time" if isinstance(decision, str) else True


def test_a_rank_stops_timing_when_rank_0_says_so_whatever_its_own_clock(
    fitted_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    taken = []
    subject = build(Case(**TINY), Told())  # type: ignore[arg-type]
    monkeypatch.setattr(Told, "slowest", lambda _, durations: taken.append(len(durations)) or list(durations))
    found = Latency().measure(subject, Settings(measure_s=60.0))
    assert found["stopped"] == "time"
    assert found["samples"] == taken[-1], "one block"
