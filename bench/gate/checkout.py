"""Commits as folders: a worktree of git for each, gone in the end whatever happens."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.environment import git_state, git_variables
from bench.errors import UsageError


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two that are compared.

    Args:
        ref: as it was given; "working tree" where no commit was.
        commit: full hash, or "unknown".
        dirty: whether the sources differ from it.
        root: where it lies while the gate runs.
    """

    ref: str
    commit: str
    dirty: bool = False
    root: str = ""

    @property
    def name(self) -> str:
        """`main (f1957e7)`, or `working tree (7abe945, with changes)`."""
        return f"{self.ref} ({self.commit[:7]}{', with changes' if self.dirty else ''})"


@contextlib.contextmanager
def checked_out(repository: Path, ref: str | None) -> Iterator[Side]:
    """A folder with the sources of `ref`; the repository's own, as they are, if it is None.

    Raises:
        UsageError: no repository, no such commit, or git cannot make a worktree of it.
    """
    if ref is None:
        commit, dirty = git_state(repository)
        yield Side(ref="working tree", commit=commit, dirty=bool(dirty), root=str(repository))
        return
    try:
        commit = _git(repository, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}", check=True).strip()
    except subprocess.CalledProcessError as error:
        why = error.stderr.partition("\n")[0]
        if _git(repository, "rev-parse", "--is-shallow-repository").strip() == "true":
            why = "the clone is shallow: `git fetch --unshallow` brings what is older"
        raise UsageError(
            f"{ref!r} is no commit of {repository}: give a branch, a tag or a hash that git knows here ({why})"
        ) from error
    with tempfile.TemporaryDirectory(prefix="unet-bench-gate-") as folder:
        root = Path(folder) / commit[:12]
        try:
            try:
                _git(repository, "worktree", "add", "--detach", "--force", str(root), commit, check=True)
            except subprocess.CalledProcessError as error:
                raise UsageError(f"git cannot check out {ref!r}: {error.stderr.strip()}") from error
            yield Side(ref=ref, commit=commit, root=str(root))
        finally:
            # Of a worktree that never came to be this removes nothing, and git's complaint is not heard.
            _git(repository, "worktree", "remove", "--force", str(root))


def _git(repository: Path, *arguments: str, check: bool = False) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        process = subprocess.Popen(  # noqa: S603 (git, no shell)
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=git_variables()
        )
    except FileNotFoundError:
        raise UsageError("the gate compares commits, and there is no git here: install it") from None
    with process:
        try:
            output, complaint = process.communicate()
        except KeyboardInterrupt:
            # Killed halfway, it would leave a worktree locked as "initializing", which nothing removes.
            process.wait()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, complaint)
    return output
