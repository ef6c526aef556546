import dataclasses
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet import UNet
from unet.checkpoint import Architecture, CheckpointError, architecture, deduce, load_weights, save_weights

architectures = st.builds(
    Architecture,
    n_channels=st.integers(1, 5),
    n_classes=st.integers(1, 5),
    bilinear=st.booleans(),
    width=st.integers(1, 12),
    depth=st.integers(1, 6),
)


def state_of(found: Architecture) -> OrderedDict[str, torch.Tensor]:
    with torch.device("meta"):
        state = UNet(**dataclasses.asdict(found)).state_dict()
    # Memory that nobody writes costs nothing, whatever the size of the network.
    return OrderedDict((name, torch.empty_like(tensor, device="cpu")) for name, tensor in state.items())


@settings(max_examples=20)
@given(architectures)
def test_the_keys_say_which_network_it_is(given_: Architecture) -> None:
    assert deduce(state_of(given_)) == given_


@settings(max_examples=30)
@given(architectures, st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3).map("".join))
def test_prefixes_of_wrappers_hide_nothing(given_: Architecture, prefix: str) -> None:
    state = OrderedDict((prefix + name, tensor) for name, tensor in state_of(given_).items())
    assert deduce(state) == given_


@settings(max_examples=30)
@given(architectures, st.data())
def test_a_tensor_too_few_or_of_another_shape_is_no_such_network(given_: Architecture, data: st.DataObject) -> None:
    state = state_of(given_)
    name = data.draw(st.sampled_from(list(state)))
    if data.draw(st.booleans()):
        state[name] = torch.empty(*state[name].shape, 7)
    else:
        del state[name]
    # Without a level's tensors or up1's weight another network is meant, and its other tensors do not fit.
    with pytest.raises(ValueError, match=r"is no U-Net's|differs from it"):
        deduce(state)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inc.extra": torch.ones(1)}, r"differs from it: 1 unexpected \(inc.extra\)"),
        ({"inc.double_conv.0.weight": torch.ones(4)}, "is no U-Net's: expected a convolution inc.double_conv.0.weight"),
        ({"outc.conv.weight": torch.ones(0, 4, 1, 1)}, "is no U-Net's: "),
        ({"down99.x": torch.ones(1)}, r"is no U-Net's: no tensors are as large as .*depth=99"),
        ({"inc.double_conv.0.weight": torch.ones(1).expand(2**40, 3, 3, 3)}, "no tensors are as large as .*width=1099"),
    ],
)
def test_a_tensor_too_many_or_of_no_convolution_is_no_such_network(changes: dict[str, torch.Tensor], told: str) -> None:
    found = Architecture(n_channels=3, n_classes=2, bilinear=True, width=4, depth=1)
    with pytest.raises(ValueError, match=told):
        deduce({**state_of(found), **changes})


@given(st.dictionaries(st.text(max_size=20), st.integers(1, 4).map(lambda n: torch.empty(n, n))))
def test_any_other_tensors_are_refused_in_words(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"is no U-Net's: expected a convolution|two tensors are called"):
        deduce(state)


def test_an_older_network_with_biases_is_the_same_network() -> None:
    found = Architecture(n_channels=3, n_classes=2, bilinear=False, width=4, depth=2)
    state = OrderedDict(UNet(**dataclasses.asdict(found)).state_dict())
    for name in [name for name in state if name.endswith(("double_conv.0.weight", "double_conv.3.weight"))]:
        state[name.replace("weight", "bias")] = torch.zeros(state[name].shape[0])
    assert deduce(state) == found


def test_a_file_gives_the_network_that_takes_its_weights(tmp_path: Path) -> None:
    model = UNet(1, 3, bilinear=True, width=6, depth=3)
    save_weights(torch.nn.DataParallel(model), tmp_path / "unet.pt", mask_values=[0, 127, 255])
    found = architecture(tmp_path / "unet.pt")
    other = UNet(**dataclasses.asdict(found))
    load_weights(other, tmp_path / "unet.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"other\.pt: is no U-Net's: expected a convolution inc"):
        architecture(path)
