"""The door that measures: `pytest bench`. Options become cases, a case a test, a result a record and a benchmark."""

import contextlib
import io
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from bench import options
from bench.case import Case
from bench.errors import UsageError
from bench.results import ResultsError

if TYPE_CHECKING:
    from bench.session import Session

EXIT_CANNOT_WRITE = 3


class ReplayClock:
    """A timer for pytest-benchmark that gives back durations measured elsewhere.

    pytest-benchmark times an asynchronous device wrongly, so the engine times; `benchmark.pedantic` reads its timer
    exactly twice a round, and 0.0, d, 0.0, d, … makes its data equal to the samples, bit for bit.
    """

    __name__ = "bench.engine"  # stored in the JSON as the timer's name

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        """Hand over the durations to be read next."""
        self._ticks = itertools.chain.from_iterable((0.0, second) for second in seconds)

    def __call__(self) -> float:
        """Give 0.0, the first duration, 0.0, the second, and so on."""
        return next(self._ticks)


_clock = pytest.StashKey[ReplayClock]()
_options = pytest.StashKey[options.Options]()
_session = pytest.StashKey["Session"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of a run."""
    options.add(parser)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the options; a wrong one is one line, before anything is collected."""
    # Said here, by the process that would start them: workers of pytest-xdist could only fail one by one.
    if config.getoption("numprocesses", None) and _measures(config):
        raise pytest.UsageError("cases are measured one at a time, or they would disturb each other: leave out -n")
    try:
        config.stash[_options] = options.read(config.getoption)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    # The table at the end is ours; pytest-benchmark's has no room for memory, accuracy and what did not run.
    config.option.benchmark_quiet = True


def _measures(config: pytest.Config) -> bool:
    """Whether the paths that pytest was given lead to cases."""
    cases = Path(__file__).resolve().parent
    paths = [Path(config.invocation_params.dir, text.partition("::")[0]).resolve() for text in config.args]
    return any(path.is_relative_to(cases) or cases.is_relative_to(path) for path in paths)


def _get_session(config: pytest.Config) -> "Session":
    from bench.session import Session

    if _session not in config.stash:
        config.stash[_session] = Session(config.stash[_options])
    return config.stash[_session]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `case` and `measure` becomes one test a case."""
    if not {"case", "measure"} <= set(metafunc.fixturenames):
        return
    cases = _writing(lambda: _get_session(metafunc.config)).cases
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give each case a clock of its own: pytest-benchmark takes the timer from the marker when it sets up."""
    if _is_case(item):
        item.stash[_clock] = ReplayClock()
        item.add_marker(pytest.mark.benchmark(timer=item.stash[_clock], disable_gc=False))


def _is_case(item: pytest.Item) -> bool:
    return {"case", "measure"} <= set(getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Begin the run's file, or say the plan: a selection that is empty, or that pytest refuses, leaves no file."""
    option = session.config.option
    if option.collectonly or (session.testsfailed and not option.continue_on_collection_errors):
        return None
    cases = [item.callspec.params["case"] for item in session.items if _is_case(item)]  # type: ignore[attr-defined]
    if cases:
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        # One line a case is printed when it has ended; a file name with letters behind it would stand in between.
        reporter.showfspath = False
        reporter.ensure_newline()
        begin = _get_session(session.config).plan if option.dry_run else _get_session(session.config).open
        _writing(lambda: begin(cases, _console()))
    return True if option.dry_run else None


def _console() -> Console:
    from bench.report.terminal import console

    return console()


def _writing(action: Callable[[], Any]) -> Any:  # noqa: ANN401 (whatever the action gives)
    try:
        return action()
    except ResultsError as error:
        pytest.exit(str(error), returncode=EXIT_CANNOT_WRITE)
    except UsageError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case], None]:  # noqa: ANN401 (pytest-benchmark has no types)
    """A function that measures a case, records it, and passes, skips or fails as the case did."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def run(case: Case) -> None:
        session = _get_session(request.config)
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            record = _writing(lambda: session.measure(case, _console()))
        if record.status == "unsupported":
            pytest.skip(f"unsupported: {record.reason}")
        if record.status != "ok":
            pytest.fail(f"{record.status}: {record.reason}\nto repeat: {record.repeat}", pytrace=False)
        seconds = [sample / 1000 for sample in record.samples_ms]
        request.node.stash[_clock].load(seconds)
        benchmark.group = case.task
        benchmark.extra_info.update(record.figures)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return run


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Cases have said their line already: no letter for them, the counts at the end stay."""
    if report.when == "call" and "bench/test_unet.py::" in report.nodeid:
        return report.outcome, "", report.outcome.upper()
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:  # noqa: ANN401 (pytest's reporter is private)
    """The comparison, and where it was saved."""
    if _session not in config.stash or (run := config.stash[_session].close()) is None:
        return
    from bench.report.terminal import console, show

    out = io.StringIO()
    plain = not config.get_terminal_writer().hasmarkup
    show(run, console(out, terminal=terminalreporter.isatty, plain=plain))
    terminalreporter.ensure_newline()
    terminalreporter.write(out.getvalue())
    session = config.stash[_session]
    terminalreporter.write_line(f"\nsaved: {run.path}")
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        terminalreporter.write_line("interrupted: the same command with --resume goes on from here")
    if session.benchmark_path.exists():
        terminalreporter.write_line(f"saved: {session.benchmark_path} (for pytest-benchmark compare)")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, object, object]:
    """Part from other machines, when the summary too is written."""
    try:
        return (yield)
    finally:
        if _session in session.config.stash:
            whole = exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
            session.config.stash[_session].leave(together=whole)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Tell pytest-benchmark's own JSON what the machine is, GPUs and versions included."""
    if _session in config.stash:
        import msgspec

        machine_info |= msgspec.to_builtins(config.stash[_session].environment.machine)
