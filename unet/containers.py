"""One U-Net, five ways to hold its layers: attributes, Sequential (by position and by name), ModuleList, ModuleDict.

The layers, their order and so their numbers are the same to the bit; what differs is who runs them and what the keys
of a checkpoint are called.

- `nn.Sequential` runs its children itself, each on what the last one gave. A skip needs two inputs, so the network
  nests: every level is a Sequential that holds the level below.
- `nn.ModuleList` and `nn.ModuleDict` only hold: they have no `forward`, and calling one is an error. The loop over
  them is written out.
- A plain list or dict in place of them would hold layers too, but register none: no parameters, no keys, no `.to()`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from unet.blocks import pad_to
from unet.model import UNet, check_image

if TYPE_CHECKING:
    from collections.abc import Mapping

# Known to torch.fx as leaves in this module too.
torch.fx.wrap("check_image")
torch.fx.wrap("pad_to")

CONTAINERS = ("unet", "sequential", "ordered", "modulelist", "moduledict")


def build(
    container: str,
    n_channels: int,
    n_classes: int,
    *,
    bilinear: bool = False,
    width: int = 64,
    depth: int = 4,
) -> nn.Module:
    """The U-Net held by `container`: (N, n_channels, H, W) → logits (N, n_classes, H, W), in fp32, freshly drawn.

    Args:
        container: one of `CONTAINERS`: "unet" (attributes and blocks, as `UNet`), "sequential" (keys are positions),
            "ordered" (a Sequential of an OrderedDict: keys are names), "modulelist", "moduledict".
        n_channels: channels of the image.
        n_classes: channels of the logits.
        bilinear: upsample by interpolation instead of by transposed convolutions.
        width: channels of the first level.
        depth: how often the resolution is halved.

    Raises:
        ValueError: no such container, or a number out of its range.
    """
    if container not in CONTAINERS:
        raise ValueError(f"container is {container!r}: expected one of {', '.join(CONTAINERS)}")
    # The plain network draws the weights and checks the numbers; its layers then move into the container.
    plain = UNet(n_channels, n_classes, bilinear, width, depth)
    match container:
        case "sequential":
            return InSequential(plain, named=False)
        case "ordered":
            return InSequential(plain, named=True)
        case "modulelist":
            return InModuleList(plain)
        case "moduledict":
            return InModuleDict(plain)
        case _:
            return plain


def key_map(source: str, target: str, *, bilinear: bool = False, depth: int = 4) -> dict[str, str]:
    """The name in container `target` of each key of container `source`, in the order of execution.

    Every container registers its layers in the order in which they run, and a state_dict keeps that order; so the
    two lists of keys are each other's translation, place by place.

    Raises:
        ValueError: no such container.
    """
    with torch.device("meta"):
        a, b = (build(name, 1, 1, bilinear=bilinear, width=2, depth=depth).state_dict() for name in (source, target))
    return dict(zip(a, b, strict=True))


def convert(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    """The tensors of `state`, shared, under the names that `keys` gives them.

    Args:
        state: a state_dict.
        keys: old name → new name, as from `key_map`.

    Raises:
        ValueError: a key of `state` has no new name, or a name expected is not there.
    """
    if state.keys() != keys.keys():
        unknown, missing = sorted(state.keys() - keys.keys()), sorted(keys.keys() - state.keys())
        raise ValueError(f"the keys are not of this container: unknown {unknown[:3]}, missing {missing[:3]}")
    return OrderedDict((keys[name], tensor) for name, tensor in state.items())


class Skip(nn.Module):
    """[x, pad(inner(x))]: the input itself, then what came back from the level below, concatenated by channels.

    Shapes: (N, C, H, W) → (N, C + D, H, W), where `inner` gives (N, D, H or H − 1, W or W − 1).

    Args:
        inner: the way down, the level below, and the way up.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C + D, H, W)."""
        return torch.cat([x, pad_to(self.inner(x), x)], 1)


class _Contained(nn.Module):
    """What the containers have in common: the numbers of the network, and the check of its input.

    Args:
        plain: the network whose layers the container takes over.
    """

    def __init__(self, plain: UNet) -> None:
        super().__init__()
        self.n_channels, self.n_classes, self.bilinear = plain.n_channels, plain.n_classes, plain.bilinear
        self.width, self.depth = plain.width, plain.depth

    def check(self, x: Tensor, encode: nn.Module) -> Tensor:
        """`x`, if the network whose first double convolution is `encode` can take it; see `check_image`."""
        first = cast("nn.Conv2d", cast("nn.Sequential", encode)[0])
        return check_image(x, first.weight, self.depth, training=self.training and isinstance(x, Tensor))


class InSequential(_Contained):
    """The network as Sequentials within Sequentials, from the bottleneck outwards.

    A level is [double convolution, Skip(pool, level below, upsampling), double convolution]; the lowest is a double
    convolution alone. Inside each, a double convolution is a Sequential of six layers.

    Args:
        plain: the network whose layers are taken over.
        named: name the children, with an OrderedDict, rather than number them.
    """

    def __init__(self, plain: UNet, *, named: bool) -> None:
        super().__init__(plain)

        def sequence(**layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(OrderedDict(layers)) if named else nn.Sequential(*layers.values())

        encoder, pools, ups, decoder = _layers(plain)
        level = encoder[-1]
        for encode, pool, up, decode in zip(encoder[-2::-1], pools[::-1], ups, decoder, strict=True):
            level = sequence(encode=encode, skip=Skip(sequence(pool=pool, level=level, up=up)), decode=decode)
        self.net = sequence(unet=level, head=plain.outc.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, n_channels, H, W) → logits (N, n_classes, H, W)."""
        level = cast("nn.Sequential", self.net[0])
        logits: Tensor = self.net(self.check(x, level[0]))
        return logits


class InModuleList(_Contained):
    """The network as four ModuleLists and a head, with the loop over them written out.

    Args:
        plain: the network whose layers are taken over.
    """

    def __init__(self, plain: UNet) -> None:
        super().__init__(plain)
        encoder, pools, ups, decoder = _layers(plain)
        self.encoder, self.pools = nn.ModuleList(encoder), nn.ModuleList(pools)
        # Pairs of (upsampling, double convolution), so that the order of the keys is the order of execution.
        self.decoder = nn.ModuleList(nn.ModuleList(pair) for pair in zip(ups, decoder, strict=True))
        self.head = plain.outc.conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, n_channels, H, W) → logits (N, n_classes, H, W)."""
        x = self.encoder[0](self.check(x, self.encoder[0]))
        skips = []
        for pool, encode in zip(self.pools, list(self.encoder)[1:], strict=True):
            skips.append(x)
            x = encode(pool(x))
        for pair in self.decoder:
            up, decode = cast("nn.ModuleList", pair)
            skip = skips.pop()
            x = decode(torch.cat([skip, pad_to(up(x), skip)], 1))
        logits: Tensor = self.head(x)
        return logits


class InModuleDict(_Contained):
    """The network as one ModuleDict, layers found by name: encode0, pool1, encode1, …, up1, decode1, …, head.

    Args:
        plain: the network whose layers are taken over.
    """

    def __init__(self, plain: UNet) -> None:
        super().__init__(plain)
        encoder, pools, ups, decoder = _layers(plain)
        self.net = nn.ModuleDict({"encode0": encoder[0]})
        for i, (pool, encode) in enumerate(zip(pools, encoder[1:], strict=True), start=1):
            self.net.update({f"pool{i}": pool, f"encode{i}": encode})
        for i, (up, decode) in enumerate(zip(ups, decoder, strict=True), start=1):
            self.net.update({f"up{i}": up, f"decode{i}": decode})
        self.net["head"] = plain.outc.conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, n_channels, H, W) → logits (N, n_classes, H, W)."""
        features = [self.net["encode0"](self.check(x, self.net["encode0"]))]
        for i in range(1, self.depth + 1):
            features.append(self.net[f"encode{i}"](self.net[f"pool{i}"](features[-1])))
        x = features.pop()
        for i in range(1, self.depth + 1):
            skip = features.pop()
            x = self.net[f"decode{i}"](torch.cat([skip, pad_to(self.net[f"up{i}"](x), skip)], 1))
        logits: Tensor = self.net["head"](x)
        return logits


def _layers(plain: UNet) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module], list[nn.Module]]:
    """The Sequentials of six of the encoder, the pools, the upsamplings, the Sequentials of six of the decoder."""
    downs = [cast("nn.Sequential", plain.get_submodule(f"down{i}.maxpool_conv")) for i in range(1, plain.depth + 1)]
    ups = [plain.get_submodule(f"up{i}") for i in range(1, plain.depth + 1)]
    encoder = [plain.inc.double_conv, *(down.get_submodule("1.double_conv") for down in downs)]
    return (
        encoder,
        [down[0] for down in downs],
        [up.get_submodule("up") for up in ups],
        [up.get_submodule("conv.double_conv") for up in ups],
    )
