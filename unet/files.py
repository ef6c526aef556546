"""Reading and writing checkpoint files: nothing of the file's own runs, and a crash leaves the old file whole."""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

ZIP, PICKLE = b"PK\x03\x04", b"\x80"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used: the message names the file and what is wrong with it."""


def write(content: object, path: str | Path) -> None:
    """Save `content` with torch.save so that `path` holds either what it held or all of `content`, at any instant.

    It is written to a new file beside `path`, flushed to the disk, and renamed. A killed process may leave that file,
    `.<name>.<random>.part`, behind.

    Args:
        content: what torch.save takes.
        path: where to; a link is followed, missing folders are not made.

    Raises:
        OSError: the folder is missing, full or not to be written to.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # The rename itself is on the disk only once its folder is.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(
    path: str | Path,
    *,
    map_location: str | torch.device = "cpu",
    mmap: bool = False,
    trusted: bool = False,
    allow: Sequence[type] = (),
) -> Any:  # noqa: ANN401 - a file may hold anything
    """What torch.save wrote to `path`, read as tensors and plain data unless the caller trusts the file.

    Args:
        path: the file, in torch's zip format or the older one.
        map_location: the device that every tensor comes to.
        mmap: let the tensors stay in the file until they are touched; only the zip format can, the older is read.
        trusted: unpickle anything, which runs whatever code the file names. Only for files of your own.
        allow: classes that may be made beside tensors and plain data. argparse.Namespace always may: it is plain.

    Raises:
        CheckpointError: the file is missing, a directory, empty, truncated, no checkpoint, or holds more than it may.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; expected a checkpoint file")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be opened: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path}: is empty; a write may have been cut short")
    if start != ZIP and start[:1] != PICKLE:
        raise CheckpointError(f"{path}: is no checkpoint: it starts with {start!r}, not like a zip or a pickle")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allow]):
            return torch.load(path, map_location=map_location, mmap=mmap and start == ZIP, weights_only=not trusted)
    except Exception as error:  # a broken pickle raises whatever it likes
        raise CheckpointError(f"{path}: {_fault(path, error, allow)}") from error


# Types that torch reads back without trust; a subclass, such as numpy's float64, it does not.
PLAIN = (torch.Tensor, torch.dtype, torch.device, torch.Size, bool, int, float, str, bytes, type(None))


def plain(value: Any, where: str) -> Any:  # noqa: ANN401 - any plain data
    """`value` as tensors and plain data, which `read` takes back: a Path becomes text, a Namespace a dict.

    Args:
        value: tensors, numbers, texts, and dicts, lists, tuples and sets of them.
        where: what to call it in the message.

    Raises:
        TypeError: something else is in it; says where, and of which type.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if type(value) in (dict, OrderedDict):
        return {plain(key, f"{where} (a key)"): plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if type(value) in PLAIN:
        return value
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: expected tensors and plain data"
    )


def _fault(path: Path, error: Exception, allow: Sequence[type]) -> str:
    """What is wrong with a file that torch could not read, in a sentence."""
    message = str(error)
    if "Weights only load failed" not in message and "weights_only" not in message:
        first = message.strip().splitlines()[0] if message.strip() else "no message"
        return f"can't be read, it is truncated, damaged or of another kind ({type(error).__name__}: {first})"
    names = set(re.findall(r"GLOBAL ([\w.]+)", message))
    try:
        # Found by looking at the pickle, not by running it.
        with torch.serialization.safe_globals([argparse.Namespace, *allow]):
            names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001, S110 - only a help for the message
        pass
    if not names:
        return "is damaged, or holds more than tensors and plain data; none of its code was run"
    hint = "if it is a whole model and you trust its origin, use load_model with trusted=True or allow=…"
    if names & {"builtins.getattr", "getattr", "__builtin__.getattr"}:
        hint = "it may be the method `model.state_dict`, saved without calling it; save `model.state_dict()`"
    listed = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")  # noqa: PLR2004 - enough to see
    return f"holds more than tensors and plain data ({listed}); none of its code was run; {hint}"
