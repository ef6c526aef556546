"""A network fitted to the picture, kept in a cache: with random weights two implementations' agreement means nothing.

`python -m bench.fitted RECIPE.json` fits one in a process of its own. What the parent needs, `Recipe`, `path` and
`cached`, imports no torch.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from bench import allowance
from bench.environment import ROOT, files_hash
from bench.lifeline import stop_with_parent
from bench.machine import assigned, usable_cores

if TYPE_CHECKING:
    from torch import Tensor

UNUSED_DAYS = 30
INGREDIENTS = ("bench/fitting.py", "bench/loss.py", "bench/picture.py", "unet/blocks.py", "unet/model.py")


class NotFittedError(LookupError):
    """There are no weights for this recipe, or the file that holds them is damaged."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Which network is fitted, and how.

    Attributes:
        upsampling: As in the case.
        width: Channels of the first level.
        depth: How often the resolution is halved, 1 to 6.
        steps: Optimizer steps, at least one for each half of the fit.
        seed: Of the first weights and of the crops.
    """

    upsampling: Literal["bilinear", "transposed"]
    width: Annotated[int, msgspec.Meta(ge=1)] = 64
    depth: Annotated[int, msgspec.Meta(ge=1, le=6)] = 4
    steps: Annotated[int, msgspec.Meta(ge=2)] = 100
    seed: int = 0


def cache_folder() -> Path:
    """Give the folder of the fitted weights: $UNET_BENCH_CACHE, or unet-bench in the user's cache folder."""
    if chosen := os.environ.get("UNET_BENCH_CACHE"):
        return Path(chosen).expanduser()
    users = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(users).is_absolute():
        with contextlib.suppress(RuntimeError):  # a user without a home, as in many containers
            users = str(Path.home() / ".cache")
    # The XDG specification: a relative path is invalid and ignored.
    return (Path(users) if Path(users).is_absolute() else Path(tempfile.gettempdir())) / "unet-bench"


def path(recipe: Recipe) -> Path:
    """Give the file of a recipe, present or not; its name holds a hash of all that the weights come from."""
    parts = (
        msgspec.json.encode(recipe).decode(),
        files_hash(ROOT, [ROOT / name for name in INGREDIENTS]),
        assigned("torch", "version.py").get("__version__", ""),
    )
    made_of = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"{recipe.upsampling}-w{recipe.width}-d{recipe.depth}-{made_of}.pt"


def cached(recipe: Recipe) -> bool:
    """Tell whether the weights are there and their file is whole, without reading them.

    The file is a zip archive, whose directory stands at its end: a truncated one has none. A byte changed in the middle
    is left to `load`.
    """
    try:
        zipfile.ZipFile(path(recipe)).close()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def load(recipe: Recipe) -> tuple[dict[str, "Tensor"], float]:
    """Read the weights of a recipe.

    The tensors are views of the file (mmap): copy them into a model, as `load_state_dict` does.

    Returns:
        state_dict: Of `UNet`, fp32, on the CPU.
        dice: Of class 1, in eval mode, on the 256×256 pixels that were kept from the fit.

    Raises:
        NotFittedError: There is no such file, or it is damaged; then it is also removed, so that the next `cached` says
            so and it is fitted again.
        OSError: It cannot be opened.
    """
    import torch

    file = path(recipe)
    try:
        file.open("rb").close()
    except FileNotFoundError:
        raise NotFittedError(f"no fitted weights for {recipe}: {file} does not exist") from None
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        weights, dice, digest = found["weights"], float(found["dice"]), found["digest"]
        intact = digest == _digest(weights, dice)
    except MemoryError:  # says nothing about the file
        raise
    except Exception:  # noqa: BLE001 (a damaged archive or pickle raises anything, OSError too)
        intact = False
    if not intact:
        file.unlink(missing_ok=True)
        raise NotFittedError(f"the fitted weights in {file} were damaged; they are removed: run it again")
    with contextlib.suppress(OSError):  # a cache one may only read
        os.utime(file)
    return weights, dice


def fit(recipe: Recipe, progress: Callable[[int, int], None] = lambda _step, _steps: None) -> Path:
    """Fit a network on the CPU and write it to the cache.

    Weights and crops come from the recipe's seed; the same number of threads gives the same weights. Torch's generator
    and settings are left as they were. Several processes may fit the same recipe at once: the last one's file stays.

    Args:
        recipe: What to fit.
        progress: Called after each step with its number, from 1, and the number of steps.

    Returns:
        The file.

    Raises:
        OSError: The cache cannot be written.
    """
    import torch

    from bench.fitting import fitted, held_out_dice

    file = path(recipe)
    # Before the work, not after it: a cache that cannot be written says so at once.
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        model = fitted(recipe, progress)
        dice = held_out_dice(model)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    _write({"weights": weights, "dice": dice, "digest": _digest(weights, dice)}, file)
    _tidy(file.parent)
    return file


def _digest(weights: dict[str, "Tensor"], dice: float) -> str:
    """Hash names, shapes, dtypes and bytes: torch reads the archive without checking its CRCs."""
    digest = hashlib.sha256(repr(dice).encode())
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


def _write(what: dict[str, Any], file: Path) -> None:
    """Save under another name, and give it its own when every byte is on the disk."""
    import torch

    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.stem, suffix=".part", delete=False) as part:
        try:
            torch.save(what, part)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(file)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _tidy(folder: Path) -> None:
    """Remove what no run has used for a month: every change of an ingredient leaves a file of up to 120 MiB behind."""
    for file in [*folder.glob("*-w*-d*-*.pt"), *folder.glob("*-w*-d*-*.part")]:
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                file.unlink()


def main(arguments: list[str]) -> None:
    """Fit the recipe that a JSON file holds, unless it is there, with all cores that this process may use."""
    import torch

    stop_with_parent()
    allowance.limit(allowance.free_mib())
    recipe = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Recipe)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # torch knows no cgroup's quota
    if cached(recipe):
        return
    try:
        fit(recipe, lambda step, steps: print(f"step {step}/{steps}", flush=True))  # noqa: T201 (its way to tell)
    except Exception as error:
        if not allowance.is_out_of_memory(error):
            raise
        sys.exit(allowance.OUT_OF_MEMORY)


if __name__ == "__main__":
    main(sys.argv[1:])
