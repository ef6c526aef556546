"""Broken and hostile files, and names of every kind: a clear error, no code run, the model untouched."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet import UNet
from unet.checkpoint import NETWORK_CLASSES, CheckpointError, load_model, load_training, load_weights, save_weights
from unet.files import read
from unet.state import canonical, compare, not_finite, strip_prefixes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def bombs(folder: Path, marker: Path) -> list[Path]:
    """Hostile files of every kind, by name."""
    state = UNet(3, 2, width=2, depth=1).state_dict()
    torch.save(state | {"extra": Bomb(marker)}, folder / "beside the weights")
    torch.save(Bomb(marker), folder / "alone")
    torch.save({"model": state, "epoch": 1, "optimizer": Bomb(marker)}, folder / "training")
    torch.save(Bomb(marker), folder / "older", _use_new_zipfile_serialization=False)
    (folder / "plain pickle").write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    model = UNet(3, 2, width=2, depth=1)
    model.hook = Bomb(marker)
    torch.save(model, folder / "whole")
    for way in (os.system, eval, exec, __import__):

        class Call:
            def __reduce__(self, way: Callable[..., object] = way) -> tuple[Callable[..., object], tuple[str]]:
                return way, (f"__import__('os').mkdir({str(marker)!r})",)

        torch.save(Call(), folder / f"call {way.__name__}")
    return sorted(path for path in folder.iterdir() if path != marker)


def test_no_code_of_a_hostile_file_runs_by_any_way_of_loading(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for path in bombs(tmp_path, marker):
        model = UNet(3, 2, width=2, depth=1)
        before = copy.deepcopy(model.state_dict())
        for load in (
            lambda model=model, path=path: load_weights(model, path),
            lambda model=model, path=path: load_weights(model, path, fast=True),
            lambda model=model, path=path: load_weights(model, path, partial=True),
            lambda model=model, path=path: load_training(model, path),
            lambda path=path: load_model(path),
            lambda path=path: load_model(path, allow=NETWORK_CLASSES),
        ):
            with pytest.raises(CheckpointError) as caught:
                load()
            assert str(caught.value).startswith(f"{path}: ")
            assert "none of its code was run" in str(caught.value)
        assert not marker.exists(), path
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_hostile_file_is_really_hostile(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save(Bomb(marker), tmp_path / "bomb")
    read(tmp_path / "bomb", trusted=True)
    assert marker.exists()


@pytest.mark.parametrize("fast", [False, True])
def test_a_broken_file_is_named_with_its_fault_and_the_model_untouched(tmp_path: Path, *, fast: bool) -> None:
    model = UNet(3, 2, width=2, depth=1)
    before = copy.deepcopy(model.state_dict())
    save_weights(model, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    contents = {
        "truncated": (good[: len(good) // 2], "can't be read, it is truncated, damaged or of another kind"),
        "stub": (good[:30], "truncated"),
        "empty": (b"", "is empty; a write may have been cut short"),
        "text": (b"weights go here\n", "is no checkpoint: it starts with b'weig'"),
        "short": (b"P", "is no checkpoint"),
        "garbage pickle": (b"\x80\x02garbage", "damaged"),
        "empty pickle": (b"\x80\x02.", "damaged"),
        "half a pickle": (pickle.dumps({"a": [1] * 100}, protocol=2)[:20], "truncated|damaged"),
    }
    for name, (content, said) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: .*{said}"):
            load_weights(model, tmp_path / name, fast=fast)
    with zipfile.ZipFile(tmp_path / "foreign zip", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(
        CheckpointError, match=r"foreign zip: can't be read, it is truncated, damaged or of another kind"
    ):
        load_weights(model, tmp_path / "foreign zip", fast=fast)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"folder: is a directory; expected a checkpoint file"):
        load_weights(model, tmp_path / "folder", fast=fast)
    with pytest.raises(CheckpointError, match=r"nothing there: can't be opened: No such file"):
        load_weights(model, tmp_path / "nothing there", fast=fast)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fast", [False, True])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: float, *, fast: bool) -> None:
    model = UNet(3, 2, width=2, depth=1)
    bad = copy.deepcopy(model)
    bad.up1.up.bias.data[1] = value
    before = copy.deepcopy(model.state_dict())
    save_weights(bad, tmp_path / "file")
    for partial in (False, True):
        with pytest.raises(CheckpointError, match=r"file: has a NaN or an infinity in up1.up.bias, 1 tensors in all"):
            load_weights(model, tmp_path / "file", fast=fast, partial=partial)
    torch.save(bad, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"NaN or an infinity in up1.up.bias"):
        load_model(tmp_path / "whole", trusted=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list; expected a state_dict$"),
        (torch.ones(2), "holds a Tensor; expected a state_dict"),
        ({}, "holds no tensors, but nothing"),
        ({"epoch": 3, "lr": 0.1}, "holds no tensors, but 'epoch', 'lr'"),
        ({1: torch.ones(2)}, r"has tensors under \[1\]; expected names"),
        ({"model": {"state_dict": {"x": torch.ones(2)}}}, "does not fit this UNet: 40 missing .*1 unexpected .x.$"),
    ],
)
def test_a_file_of_something_else_says_what_it_holds(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match=rf"file: {said}"):
        load_weights(UNet(3, 2, width=2, depth=1), tmp_path / "file")


def test_another_architecture_is_refused_with_the_difference(tmp_path: Path) -> None:
    save_weights(UNet(3, 2, width=2), tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"8 unexpected \(up1.up.weight, .*25 that do not fit \(down4"):
        load_weights(UNet(3, 2, bilinear=True, width=2), tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"inc.double_conv.0.weight is \(2, 3, 3, 3\), expected \(2, 1, 3, 3\)"):
        load_weights(UNet(1, 2, width=2), tmp_path / "file")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(2, dtype=torch.int64), "outc.conv.bias is torch.int64, expected torch.float32"),
        (torch.ones(2, dtype=torch.complex64), "outc.conv.bias is torch.complex64"),
        (torch.ones(2).to_sparse(), "outc.conv.bias is no dense tensor with values"),
        (torch.ones(2, device="meta"), "outc.conv.bias is no dense tensor with values"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 says so while it reads one
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, tensor: Tensor, said: str) -> None:
    state = UNet(3, 2, width=2, depth=1).state_dict()
    state["outc.conv.bias"] = tensor
    torch.save(state, tmp_path / "file")
    with pytest.raises(CheckpointError, match=said):
        load_weights(UNet(3, 2, width=2, depth=1), tmp_path / "file")


def test_a_count_in_place_of_a_number_is_refused() -> None:
    fit = compare({"n": torch.ones(())}, {"n": torch.ones((), dtype=torch.int64)})
    assert fit.mismatched == {"n": "n is torch.float32, expected torch.int64"}
    complex_ = compare({"n": torch.ones((), dtype=torch.complex64)}, {"n": torch.ones((), dtype=torch.int64)})
    assert complex_.mismatched == {"n": "n is torch.complex64, expected torch.int64"}


def test_an_empty_tensor_has_no_number_that_is_none() -> None:
    assert not_finite({"empty": torch.empty(0), "bad": torch.tensor([1.0, torch.inf])}) == ["bad"]


# Names --------------------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(["module", "submodule", "inc", "0", "module_list", "modules", "my_module", "x"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
KEYS = st.lists(NAMES, min_size=1, max_size=8, unique=True)
PREFIXES = st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=4)


@settings(deadline=None)
@given(keys=KEYS, prefix=PREFIXES, where=st.data())
def test_any_prefixes_come_off_any_names_and_nothing_else_does(
    keys: list[str], prefix: str, where: st.DataObject
) -> None:
    def dressed(key: str) -> str:
        parts = key.split(".")
        at = where.draw(st.integers(0, len(parts) - 1))
        return ".".join([*prefix, *parts[:at], "_orig_mod", *parts[at:]])

    tensors = {dressed(key): torch.full((), i) for i, key in enumerate(keys)}
    stripped = strip_prefixes(tensors, keys)
    # Names may be such that taking off one more or less meets as many; then fewer come off.
    front = {tuple(key.split("."))[:1] for key in keys}
    if ("module",) not in front:
        assert list(stripped) == keys
    assert [int(value) for value in stripped.values()] == list(range(len(keys)))
    assert not any("_orig_mod" in key.split(".") for key in stripped)


@settings(deadline=None)
@given(keys=KEYS)
def test_names_without_a_prefix_stay_as_they_are(keys: list[str]) -> None:
    stripped = strip_prefixes({key: torch.zeros(()) for key in keys}, keys)
    assert list(stripped) == keys


@settings(deadline=None)
@given(count=st.integers(0, 3))
def test_a_layer_called_module_or_submodule_keeps_its_name_below_the_wrappers(count: int) -> None:
    names = ["module.submodule.x", "submodule.x", "module.x", "submodule_x"]
    dressed = {"module." * count + name: torch.zeros(()) for name in names}
    assert list(strip_prefixes(dressed, names)) == names


def test_without_a_network_module_comes_off_only_where_every_name_has_it() -> None:
    one = torch.zeros(())
    assert list(strip_prefixes({"module.module.a": one, "module.b": one})) == ["module.a", "b"]
    assert list(strip_prefixes({"module.a": one, "b": one})) == ["module.a", "b"]
    assert list(strip_prefixes({"_orig_mod.module.module": one})) == ["module"]
    assert strip_prefixes({}) == OrderedDict()
    assert strip_prefixes({}, ["a"]) == OrderedDict()


def test_two_tensors_of_one_name_are_refused() -> None:
    state = {"a._orig_mod.x": torch.zeros(()), "a.x": torch.zeros(()), "b": torch.zeros(())}
    with pytest.raises(ValueError, match=r"two tensors are called a.x once"):
        strip_prefixes(state, ["a.x", "b"])


def test_metadata_is_renamed_with_the_names() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    wrapped = nn.DataParallel(model)
    state = wrapped.state_dict()
    assert set(state._metadata) == {"", "module", "module.0"}
    state._metadata["module"]["mark"] = 1
    stripped = strip_prefixes(state, model.state_dict())
    assert stripped._metadata == {"": {"version": 1, "mark": 1}, "0": {"version": 2}}


@pytest.mark.parametrize("word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_torchs_own_wrappers_vanish_wherever_they_stand(word: str) -> None:
    assert canonical(f"{word}.inc.{word}.0.weight") == "inc.0.weight"
    assert canonical(f"inc.x{word}.weight") == f"inc.x{word}.weight"


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_missing_or_extra_keys_are_named_and_nothing_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    model = UNet(1, 1, width=2, depth=1)
    state = model.state_dict()
    keys = list(state)
    gone = data.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True))
    more = data.draw(st.lists(NAMES.map("extra.{}".format), max_size=3, unique=True))
    prefix = "".join(part + "." for part in data.draw(PREFIXES))
    path = tmp_path_factory.mktemp("keys") / "file"
    content = {prefix + key: tensor + 1 for key, tensor in state.items() if key not in gone}
    torch.save(content | {prefix + key: torch.zeros(1) for key in more}, path)
    before = copy.deepcopy(state)
    if gone or more:
        with pytest.raises(CheckpointError) as caught:
            load_weights(model, path)
        assert all(key in str(caught.value) for key in [*gone, *more])
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    report = load_weights(model, path, partial=True)
    assert set(report.missing) == set(gone)
    assert set(report.skipped) == set(more)
    assert all(torch.equal(t, before[key] + (key not in gone)) for key, t in model.state_dict().items())
