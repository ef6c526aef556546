import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from bench.case import Case
from bench.environment import Environment
from bench.fitted import Recipe
from bench.machine import Machine
from bench.results import Header, Record, Run, Settings, read

ROOT = Path(__file__).resolve().parents[2]
# One thread: two that wait for each other stand still for seconds where others use the cores too.
TINY = {"width": 4, "depth": 2, "size": "32x32", "threads": 1}


@pytest.fixture(scope="session")
def fitted_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted weights of tiny networks, made once for all tests."""
    cache = tmp_path_factory.mktemp("cache")
    recipe = cache / "recipe.json"
    recipe.write_bytes(msgspec.json.encode(Recipe(upsampling="transposed", width=TINY["width"], depth=TINY["depth"])))
    variables = {**os.environ, "UNET_BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "bench.fitted", str(recipe)], cwd=ROOT, env=variables, check=True)
    return cache


class Bench:
    """`pytest bench` and `python -m bench` as a person runs them, in child processes."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.results = folder / "results"
        self.variables = {**os.environ, "UNET_BENCH_CACHE": str(cache), "COLUMNS": "200"}
        # A run under test is a person's: it knows nothing of the options and workers of the tests around it.
        for name in [name for name in self.variables if name == "PYTEST_ADDOPTS" or name.startswith("PYTEST_XDIST")]:
            del self.variables[name]

    def command(self, *cases: Case, options: tuple[str, ...] = ()) -> list[str]:
        ids = [word for case in cases for word in ("--case", case.id)]
        quick = ("--measure-s", "0.2", "--warmup-s", "0.1", "--load", "tests.bench.faulty")
        # Of the tests around it too, and longer to import than all that a run's parent needs.
        without = ("-p", "no:hypothesispytest")
        return [
            *(sys.executable, "-m", "pytest", "bench", "--results", str(self.results)),
            *(*without, *quick, *ids, *options),
        ]

    @contextlib.contextmanager
    def started(self, *cases: Case, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
        """A run in the background; it is gone in the end, whatever the test does."""
        process = subprocess.Popen(
            self.command(*cases, options=options),
            cwd=ROOT,
            env=self.variables,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_default_signals,  # noqa: PLW1509 (it takes no lock)
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def measure(self, *cases: Case, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self.call(*self.command(*cases, options=options))

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.variables, capture_output=True, text=True, timeout=600, check=False
        )

    def read(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", "bench", *arguments)

    def runs(self) -> list[Run]:
        return [read(path) for path in sorted(self.results.glob("*/*.jsonl"))]

    def records(self) -> dict[str, Record]:
        return {record.case.implementation: record for run in self.runs() for record in run.records}


def _default_signals() -> None:
    """A shell's background jobs, and what nohup starts, ignore some: the run under test is one in the foreground."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def bench(tmp_path: Path, fitted_cache: Path) -> Bench:
    return Bench(tmp_path, fitted_cache)


MACHINE = Machine(
    gpus=(),
    cpu="AMD EPYC",
    cores=2,
    memory_mib=8000,
    torch_version="2.13.0",
    torch_cuda=None,
    triton_version="3.7.1",
    cxx="g++ 12",
    cxx_missing="",
    cc="gcc 12",
    cc_missing="",
    python="3.11.7",
    os="Debian",
    kernel="Linux",
)


@pytest.fixture(scope="session")
def header() -> Header:
    environment = Environment(
        machine=MACHINE,
        commit="0123456789abcdef",
        dirty=False,
        source_hash="f" * 64,
        load_average=(0.5, 0.4, 0.3),
        time=datetime(2026, 11, 23, 12, 0, tzinfo=UTC),
    )
    return Header(environment=environment, settings=Settings(), preset="quick")


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    def make(case: Case, status: str = "ok", reason: str = "", **figures: float | str | bool) -> Record:
        return msgspec.convert(
            {
                "case": case,
                "status": status,
                "reason": reason,
                "figures": figures,
                "samples_ms": [1.0, 2.0, 4.0],
                "started": datetime(2026, 11, 23, 12, 0, tzinfo=UTC),
            },
            Record,
        )

    return make
