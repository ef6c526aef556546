"""Saving and loading: from one device or many to one or many, whole or weights, fast or slow, resumed bit by bit."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from unet import UNet
from unet.checkpoint import (
    NETWORK_CLASSES,
    CheckpointError,
    construct,
    load_model,
    load_training,
    load_weights,
    save_model,
    save_weights,
)
from unet.containers import CONTAINERS, build
from unet.modify import CHANGES, change, replace_head
from unet.state import state_of

from .conftest import same

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.linspace(-1, 1, 3 * 32 * 40).view(1, 3, 32, 40)


def compiled(model: nn.Module) -> nn.Module:
    """Wrapped by torch.compile, which compiles nothing before the first call."""
    return torch.compile(model, backend="eager")


WRAPPINGS = {
    "": [],
    "module.": [DataParallel],
    "_orig_mod.": [compiled],
    "module._orig_mod.": [compiled, DataParallel],
    "_orig_mod.module.": [DataParallel, compiled],
    "module.module.": [DataParallel, DataParallel],
    "_orig_mod.module._orig_mod.": [compiled, DataParallel, compiled],
}


def wrap(model: nn.Module, prefix: str) -> nn.Module:
    for wrapper in WRAPPINGS[prefix]:
        model = wrapper(model)
    return model


# Eight combinations, and every wrapping -----------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", ["one", "many"])
@pytest.mark.parametrize("saved", ["one", "many"])
@pytest.mark.parametrize("kind", ["weights", "whole"])
@pytest.mark.parametrize("by", ["us", "torch"])
def test_all_eight_combinations_of_saving_and_loading_give_the_same_logits(
    alive: Callable[..., UNet], tmp_path: Path, kind: str, saved: str, loaded: str, by: str
) -> None:
    model, path = alive(), tmp_path / "file.pt"
    source = DataParallel(model) if saved == "many" else model
    if by == "us":
        (save_weights if kind == "weights" else save_model)(source, path)
    else:
        torch.save(source.state_dict() if kind == "weights" else source, path)
    if kind == "weights":
        target = UNet(3, 2, width=4).eval()
        target = DataParallel(target) if loaded == "many" else target
        load_weights(target, path)
    else:
        target, _ = load_model(path, trusted=True)
        target = DataParallel(target) if loaded == "many" else target
    assert torch.equal(target.eval()(X), model(X))
    assert same(target, model)


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(WRAPPINGS, WRAPPINGS)))
def test_any_order_of_prefixes_loads_into_any_wrapping(
    alive: Callable[..., UNet], tmp_path: Path, saved: str, loaded: str
) -> None:
    model, path = alive(depth=1), tmp_path / "file.pt"
    wrapped = wrap(model, saved)
    assert next(iter(wrapped.state_dict())) == f"{saved}inc.double_conv.0.weight"
    torch.save(wrapped.state_dict(), path)
    target = wrap(UNet(3, 2, width=4, depth=1), loaded)
    report = load_weights(target, path)
    assert same(target, model)
    assert (report.loaded, report.skipped, report.missing) == (40, {}, ())


def test_a_part_compiled_by_itself_and_compiling_in_place_change_no_file(
    alive: Callable[..., UNet], tmp_path: Path
) -> None:
    model, path = alive(depth=1), tmp_path / "file.pt"
    expected = list(model.state_dict())
    regional = copy.deepcopy(model)
    regional.inc = compiled(regional.inc)
    assert "inc._orig_mod.double_conv.0.weight" in regional.state_dict()
    save_weights(regional, path)
    assert list(torch.load(path)) == expected
    torch.save(regional.state_dict(), path)
    for target in (UNet(3, 2, width=4, depth=1), copy.deepcopy(regional)):
        with torch.no_grad():
            for p in target.parameters():
                p.zero_()
        load_weights(target, path)
        assert torch.equal(target.eval()(X), model(X))
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    save_weights(in_place, path)
    assert list(torch.load(path)) == expected


@pytest.mark.parametrize("prefix", WRAPPINGS)
def test_a_file_has_plain_names_and_keeps_its_metadata(alive: Callable[..., UNet], tmp_path: Path, prefix: str) -> None:
    model, path = alive(depth=1), tmp_path / "file.pt"
    save_weights(wrap(model, prefix), path)
    state = torch.load(path)
    assert list(state) == list(model.state_dict())
    assert state._metadata == model.state_dict()._metadata
    assert state._metadata["inc.double_conv.1"] == {"version": 2}


DDP = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from unet import UNet
from unet.checkpoint import load_weights, save_model, save_training, save_weights
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(rank)
model = torch.nn.parallel.DistributedDataParallel(UNet(3, 2, width=4, depth=2))
load_weights(model, folder / "start.pt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.full((1, 3, 16, 16), 1.0 + rank) * torch.linspace(0, 1, 16)).square().mean().backward()
    optimizer.step()
digest = torch.stack([p.detach().double().sum() for p in model.parameters()])
both = [torch.empty_like(digest) for _ in range(2)]
dist.all_gather(both, digest)
assert torch.equal(*both), "the ranks disagree"
if rank == 0:
    torch.save(model.state_dict(), folder / "raw.pt")
    save_weights(model, folder / "weights.pt")
    save_model(model, folder / "whole.pt")
    save_training(model, folder / "training.pt", epoch=2, optimizer=optimizer)
try:
    load_weights(model, folder / "start.pt", fast=True)
except ValueError as error:
    assert "load first, then wrap" in str(error)
else:
    raise AssertionError("fast loading into DDP was not refused")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_ddp_load_train_alike_and_save_files_that_fit_one(
    alive: Callable[..., UNet], tmp_path: Path
) -> None:
    start = alive(depth=2)
    save_weights(start, tmp_path / "start.pt")
    command = [sys.executable, "-c", DDP]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert next(iter(torch.load(tmp_path / "raw.pt"))).startswith("module.inc.")
    models = [UNet(3, 2, width=4, depth=2) for _ in range(3)]
    load_weights(models[0], tmp_path / "raw.pt")
    load_weights(models[1], tmp_path / "weights.pt")
    assert load_training(models[2], tmp_path / "training.pt").epoch == 2
    models.append(load_model(tmp_path / "whole.pt", allow=NETWORK_CLASSES)[0])
    assert all(same(models[0], other) for other in models[1:])
    assert not torch.equal(models[0].inc.double_conv[0].weight, start.inc.double_conv[0].weight)
    # Into many again: DataParallel around what DDP saved.
    many = DataParallel(UNet(3, 2, width=4, depth=2))
    load_weights(many, tmp_path / "raw.pt")
    assert same(many, models[0])


# Fast ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_a_cold_start_gives_the_saved_network_fast_or_slow(
    alive: Callable[..., UNet], tmp_path: Path, *, fast: bool
) -> None:
    model, path = alive(), tmp_path / "file.pt"
    save_weights(model, path)
    started, report = construct(lambda: UNet(3, 2, width=4), path, fast=fast)
    assert same(started, model)
    assert report.mode == "train"
    assert torch.equal(started.eval()(X), model(X))
    started.train()(torch.cat([X, X])).sum().backward()
    assert started.inc.double_conv[0].weight.grad is not None


def test_fast_takes_dtype_and_memory_format_of_the_file_and_slow_keeps_the_models(
    alive: Callable[..., UNet], tmp_path: Path
) -> None:
    path = tmp_path / "file.pt"
    half = alive().to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    save_weights(half, path)
    _, fast = construct(lambda: UNet(3, 2, width=4).eval(), path, fast=True)
    assert (fast.mode, fast.dtypes, fast.memory_format) == ("eval", ("torch.bfloat16",), "channels_last")
    model, slow = construct(lambda: UNet(3, 2, width=4), path, fast=False)
    assert (slow.mode, slow.dtypes, slow.memory_format) == ("train", ("torch.float32",), "contiguous")
    assert slow.devices == ("cpu",)
    torch.testing.assert_close(model.state_dict(), half.float().state_dict())
    model.to(memory_format=torch.channels_last)
    assert load_weights(model, path).memory_format == "channels_last"
    assert load_weights(model.half(), path).dtypes == ("torch.float16",)


def test_fast_copies_nothing_and_a_new_file_in_its_place_harms_nothing(
    alive: Callable[..., UNet], tmp_path: Path
) -> None:
    model, path = alive(), tmp_path / "file.pt"
    save_weights(model, path)
    started, _ = construct(lambda: UNet(3, 2, width=4).eval(), path)
    assert str(path) in Path("/proc/self/maps").read_text()
    logits = started(X)
    # Writing to its weights stays in memory; saving over the file gives it a new one.
    with torch.no_grad():
        started.outc.conv.bias += 1
    torch.testing.assert_close(torch.load(path)["outc.conv.bias"], model.outc.conv.bias.detach())
    save_weights(started, path)
    torch.testing.assert_close(started(X), logits + 1)
    assert same(construct(lambda: UNet(3, 2, width=4), path)[0], started)


def test_fast_reads_the_older_format_as_well(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(), tmp_path / "file.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    for fast in (False, True):
        assert same(construct(lambda: UNet(3, 2, width=4), path, fast=fast)[0], model)


def test_a_model_without_memory_is_told_to_load_fast_and_completely(alive: Callable[..., UNet], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_weights(alive(), path)
    with torch.device("meta"):
        model = UNet(3, 2, width=4)
        other = UNet(3, 5, width=4)
    with pytest.raises(CheckpointError, match=r"no memory for inc.double_conv.0.weight.*fast=True"):
        load_weights(model, path)
    with pytest.raises(CheckpointError, match=r"no memory for outc.conv.weight, outc.conv.bias"):
        load_weights(other, path, fast=True, partial=True)


def test_map_location_reaches_the_tensors(alive: Callable[..., UNet], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_model(alive(), path)
    model, report = load_model(path, trusted=True, map_location="cpu")
    assert report.devices == ("cpu",)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    # Another device than the CPU, to see that it is asked for: on "meta" nothing has values.
    save_weights(alive(), path)
    with pytest.raises(CheckpointError, match=r"no dense tensor with values"):
        load_weights(UNet(3, 2, width=4), path, map_location="meta")


# Partial ------------------------------------------------------------------------------------------------------------


def test_a_partial_load_names_what_it_skipped_and_loads_the_rest(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(), tmp_path / "file.pt"
    save_weights(model, path)
    target = replace_head(UNet(3, 2, width=4), 5)
    head = target.outc.conv.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"outc.conv.weight is \(2, 4, 1, 1\), expected \(5, 4, 1, 1\).*partial=T"
    ):
        load_weights(target, path)
    assert not torch.equal(target.inc.double_conv[0].weight, model.inc.double_conv[0].weight)
    report = load_weights(target, path, partial=True)
    assert set(report.skipped) == set(report.missing) == {"outc.conv.weight", "outc.conv.bias"}
    assert report.loaded == 116
    assert "skipped: outc.conv.weight is (2, 4, 1, 1), expected (5, 4, 1, 1)" in str(report)
    assert torch.equal(target.outc.conv.weight, head)
    assert torch.equal(target.eval().encode(X)[-1], model.encode(X)[-1])


def test_a_partial_load_brings_an_old_file_into_a_changed_network(alive: Callable[..., UNet], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_weights(alive(), path)
    report = load_weights(change(UNet(3, 2, width=4), "supervision"), path, partial=True)
    assert report.loaded == 118
    assert report.skipped == {}
    assert report.missing == tuple(f"heads.{i}.conv.{kind}" for i in range(3) for kind in ("weight", "bias"))
    report = load_weights(UNet(3, 2, width=4, depth=3), path, partial=True)
    assert report.skipped["up4.up.bias"] == "up4.up.bias is not in the model"


def test_nothing_that_fits_is_a_fault_even_in_part(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"fc.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"nothing in it fits this UNet: 118 missing .*1 unexpected .fc.weight"):
        load_weights(UNet(3, 2, width=4), path, partial=True)


# Whole models -------------------------------------------------------------------------------------------------------


def test_a_whole_model_needs_trust_or_a_list_of_classes(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(), tmp_path / "file.pt"
    save_model(compiled(DataParallel(model)), path)
    with pytest.raises(
        CheckpointError, match=r"file.pt: holds more than tensors .*none of its code was run.*trusted=True"
    ):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"unet.blocks.DoubleConv"):
        load_model(path, allow=[kind for kind in NETWORK_CLASSES if kind.__name__ != "DoubleConv"])
    with pytest.raises(CheckpointError, match=r"use load_model"):
        load_weights(UNet(3, 2, width=4), path)
    for how in ({"trusted": True}, {"allow": NETWORK_CLASSES}):
        loaded, report = load_model(path, **how)
        assert type(loaded) is UNet
        assert same(loaded, model)
        assert (report.loaded, report.mode) == (118, "eval")
        assert torch.equal(loaded(X), model(X))
    target = UNet(3, 2, width=4)
    load_weights(target, path, trusted=True)
    assert same(target, model)
    torch.save(DataParallel(model), path)
    assert type(load_model(path, allow=NETWORK_CLASSES)[0]) is UNet, "whoever wrote the file"


@pytest.mark.parametrize("make", [*CONTAINERS, *CHANGES[1:]])
def test_the_list_of_classes_covers_every_network_of_the_package(
    alive: Callable[..., UNet], tmp_path: Path, make: str
) -> None:
    path = tmp_path / "file.pt"
    model = build(make, 3, 2, width=4, depth=1) if make in CONTAINERS else change(alive(depth=1), make)
    save_model(model, path)
    assert same(load_model(path, allow=NETWORK_CLASSES)[0], model)


def test_weights_are_no_whole_model(alive: Callable[..., UNet], tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_weights(alive(), path)
    with pytest.raises(CheckpointError, match=r"holds a OrderedDict, not a whole model; use load_weights"):
        load_model(path)


def test_report_tells_layers_in_different_modes_and_formats(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(), tmp_path / "file.pt"
    save_weights(model, path)
    model.outc.train()
    assert load_weights(model, path).mode == "mixed"
    model.inc.to(memory_format=torch.channels_last)
    assert load_weights(model, path).memory_format == "mixed"
    odd = nn.Sequential(nn.Conv2d(1, 2, 1))
    save_weights(odd, path)
    assert load_weights(odd, path).memory_format == "contiguous"
    assert str(load_weights(odd, path)) == "2 tensors, train, torch.float32, contiguous, cpu"


def test_state_of_a_network_whose_only_child_is_called_module_keeps_its_names(tmp_path: Path) -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert list(state_of(DataParallel(model))) == ["module.weight", "module.bias"]
    save_weights(DataParallel(model), tmp_path / "file.pt")
    assert load_weights(DataParallel(copy.deepcopy(model)), tmp_path / "file.pt").loaded == 2


@pytest.mark.slow
def test_a_fast_cold_start_is_faster(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_weights(UNet(3, 2), path)

    def seconds(*, fast: bool) -> float:
        start = time.process_time()
        construct(lambda: UNet(3, 2), path, fast=fast)
        return time.process_time() - start

    assert min(seconds(fast=True) for _ in range(3)) < min(seconds(fast=False) for _ in range(3)) / 2
