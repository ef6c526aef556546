"""Where a run was measured, on which sources and when. Imports no torch."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from bench.machine import Machine, machine

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bench", "kernels", "unet")


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """First line of a results file: the machine, the sources and the moment. The host's name is left out.

    Attributes:
        machine: The machine.
        commit: Full git hash, or "unknown" without git, a repository or a commit.
        dirty: Whether the sources differ from `commit`; "unknown" (which is true in a condition) with `commit`.
        source_hash: Hash over the packages' .py files and tuned settings: results of changed code never mix.
        load_average: Runnable processes over 1, 5 and 15 minutes.
        time: When it was looked at, in UTC.
    """

    machine: Machine
    commit: str
    dirty: bool | Literal["unknown"]
    source_hash: str
    load_average: tuple[float, float, float]
    time: datetime


def environment(root: Path = ROOT) -> Environment:
    """Look at everything once; about 0.1 s without a GPU.

    Args:
        root: The checkout, or the folder that the packages are installed in.
    """
    commit, dirty = git_state(root)
    return Environment(
        machine=machine(),
        commit=commit,
        dirty=dirty,
        source_hash=source_hash(root),
        load_average=os.getloadavg(),
        time=datetime.now(UTC),
    )


def environment_hash(env: Environment) -> str:
    """Hash over what must be equal for two runs to be continued or compared: 64 hexadecimal digits.

    The moment is left out, and so are load, commit and sources (which have fields of their own) and the size of the
    memory, which a kernel reports a little differently after each boot.
    """
    stable = msgspec.structs.replace(env.machine, memory_mib=0)
    return hashlib.sha256(msgspec.json.encode(stable, order="sorted")).hexdigest()


def git_state(root: Path = ROOT) -> tuple[str, bool | Literal["unknown"]]:
    """Give the commit, and whether sources (packages, pyproject.toml) are changed or untracked; results/ do not count.

    Args:
        root: Top of the checkout. A folder further down, as of an installed package in someone's environment, is not
            ours to speak about: "unknown".
    """
    head = (git(root, "rev-parse", "--show-toplevel", "HEAD") or "").splitlines()
    if len(head) != 2 or Path(head[0]).resolve() != root.resolve():  # noqa: PLR2004 (one line for each of the two asked)
        return "unknown", "unknown"
    changes = git(root, "status", "--porcelain", "--", *SOURCES, "pyproject.toml")
    return head[1], "unknown" if changes is None else bool(changes)


def git(root: Path, *arguments: str, text: str = "") -> str | None:
    """Ask git, with `text` on its standard input; None where it is absent or fails."""
    command = ["git", "-C", str(root), *arguments]
    # A look must not get in the way of someone's commit.
    variables = {**git_variables(), "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(  # noqa: S603 (git, no shell)
            command, input=text, capture_output=True, text=True, timeout=30, check=True, env=variables
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def git_variables() -> dict[str, str]:
    """The environment in which git goes by its `-C`: a hook is run with others, which name its own repository."""
    others = {"GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}
    return {name: value for name, value in os.environ.items() if name not in others}


def source_hash(root: Path = ROOT) -> str:
    """Hash the .py files of bench, kernels and unet and the tuned launch settings: 64 hexadecimal digits.

    Results carry it, so that those of changed code never mix.

    Raises:
        OSError: A file of them cannot be read.
    """
    files = [path for source in SOURCES for path in (root / source).rglob("*.py")]
    files += (root / "kernels" / "tuned").rglob("*.json")
    return files_hash(root, files)


def files_hash(root: Path, files: Sequence[Path]) -> str:
    """Hash files by name and content, whatever their order: 64 hexadecimal digits.

    Args:
        root: Names are taken relative to it, so that a moved checkout keeps its hash.
        files: The files.

    Raises:
        OSError: One of them cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
