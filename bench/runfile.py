"""A run file that is being written: one process at a time, and whole whatever happens."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench.machine import slug
from bench.results import RESULTS, SUFFIX, Header, Record, ResultsError


class RunFile:
    """A run that is being written. Each record is on disk before `append` returns."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self._held: Any = None

    @classmethod
    def create(cls, header: Header, results: Path = RESULTS) -> "RunFile":
        """Begin `results/<machine>/<UTC>_<sha7>[-dirty].jsonl`.

        Raises:
            ResultsError: the file cannot be written.
        """
        env = header.environment
        dirty = "-dirty" if env.dirty is True else ""
        stem = f"{env.time:%Y%m%dT%H%M%SZ}_{env.commit[:7]}{dirty}"
        folder = results / slug(env.machine)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in _names(stem):
                with contextlib.suppress(FileExistsError):
                    path = folder / name
                    path.touch(exist_ok=False)
                    break
        except OSError as error:
            raise ResultsError(f"{folder}: cannot write results there: {error.strerror}") from error
        run = cls(path, header)
        run.append(header)
        return run

    def hold(self) -> None:
        """Keep every other process from continuing this run while it is being written, until `release`.

        Raises:
            ResultsError: another process holds it.
        """
        try:
            self._held = self.path.open("rb")
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ResultsError(
                f"{self.path}: another process is measuring into it; wait for its end, or leave out --resume"
            ) from error
        except OSError:  # a file system without locks
            self.release()

    def release(self) -> None:
        """Let others continue it."""
        if self._held is not None:
            self._held.close()
        self._held = None

    def append(self, line: Header | Record) -> None:
        """Write one record, or the header before all of them; on failure the file is as it was before.

        Raises:
            ResultsError: the disk is full or the file is gone.
        """
        try:
            # Without buffering: a write that fails half-way fails here, not when the file is closed.
            with self.path.open("r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                # A run that was cut off in mid-line is continued on a line of its own.
                text = (b"" if _ends_line(file, end) else b"\n") + msgspec.json.encode(line) + b"\n"
                file.seek(end)
                try:
                    while text:
                        text = text[file.write(text) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise ResultsError(
                f"{self.path}: cannot write ({error.strerror}); what was recorded before is whole. "
                "Make room and go on with --resume"
            ) from error


def _names(stem: str) -> Iterator[str]:
    yield stem + SUFFIX
    yield from (f"{stem}_{number}{SUFFIX}" for number in range(2, 1000))


def _ends_line(file: Any, end: int) -> bool:  # noqa: ANN401 (an unbuffered binary file has no public type)
    if end == 0:
        return True
    file.seek(end - 1)
    return bool(file.read(1) == b"\n")
