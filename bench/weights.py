"""A checkpoint of one's own in place of the fitted weights: which file, and which network its keys say it is.

What the parent needs imports no torch; the file is read by `python -m bench.weights FILE`, in a process of its own.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.environment import ROOT
from bench.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from bench.case import Case

READ_S = 300


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, and the network in it.

    Args:
        path: the file.
        sha256: of its bytes, in hexadecimal.
        channels: of the image.
        classes: channels of the logits; one is a foreground whose logit is above 0.
        upsampling: bilinear or transposed.
        width: channels of the first level.
        depth: levels below the first.
    """

    path: str
    sha256: str
    channels: int
    classes: int
    upsampling: str
    width: int
    depth: int

    @property
    def axes(self) -> Mapping[str, Sequence[str | int]]:
        """The values that cases of this network have."""
        return {"upsampling": (self.upsampling,), "width": (self.width,), "depth": (self.depth,)}

    def asked_for(
        self, axes: Mapping[str, Sequence[str | int]], chosen: "Iterable[Case]" = ()
    ) -> Mapping[str, Sequence[str | int]]:
        """The axes that a person named, with those of this network.

        Raises:
            UsageError: an axis or a case names another network; says what differs.
        """
        named = [(value, f"--axis {name}={value}", name) for name in axes for value in axes[name]]
        named += [(getattr(case, name), f"--case {case.id}", name) for case in chosen for name in self.axes]
        for value, where, name in named:
            if name in self.axes and value not in self.axes[name]:
                raise UsageError(
                    f"{where} is a network of {name} {value}, and {self.path} holds one of {name} {self.axes[name][0]}"
                )
        return {**axes, **self.axes}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the weights ({error.strerror})") from error


def look(path: Path) -> Weights:
    """Read a checkpoint far enough to say which network it holds; a few seconds.

    Raises:
        UsageError: no such file, no checkpoint, or no U-Net's; one line that says what is wrong.
    """
    path = path.resolve()
    sha256 = digest(path)
    command = [sys.executable, "-m", "bench.weights", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=READ_S, cwd=ROOT, check=False)  # noqa: S603
    if done.returncode != 0:
        raise UsageError((done.stderr.strip().splitlines() or [f"{path}: reading it failed"])[-1])
    found = msgspec.json.decode(done.stdout, type=dict[str, int | str])
    return msgspec.convert({"path": str(path), "sha256": sha256, **found}, Weights)


def state_of(weights: Weights) -> "dict[str, Tensor]":
    """The state_dict of the checkpoint's network, as `UNet` has it today: prefixes and older forms are gone.

    Raises:
        CheckpointError: the file has changed since it was looked at, or does not fit.
    """
    from unet import UNet
    from unet.checkpoint import CheckpointError, load_weights

    if digest(Path(weights.path)) != weights.sha256:
        raise CheckpointError(f"{weights.path}: has changed since the run began")
    bilinear = weights.upsampling == "bilinear"
    model = UNet(weights.channels, weights.classes, bilinear, weights.width, weights.depth)
    load_weights(model, weights.path)
    return model.state_dict()


def main(path: str) -> int:
    """Print the network in the file as JSON, or on standard error what is wrong with it."""
    from unet.checkpoint import CheckpointError, architecture

    try:
        found = architecture(path)
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    described = {
        "channels": found.n_channels,
        "classes": found.n_classes,
        "upsampling": "bilinear" if found.bilinear else "transposed",
        "width": found.width,
        "depth": found.depth,
    }
    sys.stdout.write(msgspec.json.encode(described).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
