"""Which packages of the project are missing here. Needs nothing but Python: it is asked when something is not there.

A machine with a GPU may have PyTorch and no network: what is missing must be known before it is rented.
"""

import importlib.metadata
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def missing(*groups: str) -> list[str]:
    """Requirements of the project, and of dependency groups, that are not installed or too old; as they are written.

    Empty where there is no pyproject.toml: an installed package brought its own.
    """
    if not PROJECT.exists():
        return []
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"]]
    for group in groups:
        wanted += [entry for entry in project["dependency-groups"][group] if isinstance(entry, str)]
    return [requirement for requirement in wanted if not _is_there(requirement)]


def _is_there(requirement: str) -> bool:
    plain = requirement.partition(";")[0].strip()
    name = plain
    for sign in "<>=!~ [":
        name = name.partition(sign)[0]
    try:
        version = importlib.metadata.version(name)
        from packaging.requirements import Requirement
    except importlib.metadata.PackageNotFoundError:
        return False
    except ModuleNotFoundError:  # it comes with pytest; without it versions are not looked at
        return True
    return Requirement(plain).specifier.contains(version, prereleases=True)
