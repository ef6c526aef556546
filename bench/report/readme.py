"""The generated parts of the READMEs: each stands between two comments, the first of which says where it comes from.

    <!-- markdown of: python -m bench report results/….jsonl --markdown - -->
    <!-- output of: python -m bench list --axes -->
    <!-- ladder of: results/….jsonl infer-bilinear-b1-256x256-1cpu as results/ladder.svg -->
    …
    <!-- end -->

Markdown goes in as it is, output under its command, a ladder as a picture with its caption as the text in its place.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.environment import ROOT
from bench.results import ResultsError, read

FILES = ("README.md", "results/README.md")
_PART = re.compile(r"(<!-- (markdown|output|ladder) of: (.+?) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def generated(files: tuple[str, ...] = FILES) -> Iterator[tuple[Path, str]]:
    """Every file with generated parts, and what it must contain: the texts and the pictures they show.

    Raises:
        ResultsError: a part's source cannot be read, or its command fails.
    """
    for name in files:
        path = ROOT / name
        pictures: list[tuple[Path, str]] = []

        def part(found: re.Match[str], pictures: list[tuple[Path, str]] = pictures, path: Path = path) -> str:
            begin, kind, source, _, end = found.groups()
            if kind == "ladder":
                picture, svg, text = _ladder(path, source)
                pictures.append((picture, svg))
            else:
                text = _output(source)
                text = text if kind == "markdown" else f"```console\n$ {source}\n{_trimmed(text)}```\n"
            return f"{begin}\n{text}\n{end}"

        yield path, _PART.sub(part, path.read_text(encoding="utf-8"))
        yield from pictures


def _trimmed(text: str) -> str:
    """Without the blanks that pad the last column of a table."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def write() -> Iterator[Path]:
    """Write what is stale; give its path."""
    for path, text in generated():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            yield path


def _ladder(readme: Path, source: str) -> tuple[Path, str, str]:
    from bench.report import pictures

    run, scene, _, picture = source.split()
    svg, caption = pictures.ladder(read(ROOT / run), scene)
    shown = os.path.relpath(ROOT / picture, readme.parent)
    return ROOT / picture, svg, f"![The ladder of {scene}. {caption}]({shown})\n"


def _output(command: str) -> str:
    python, *arguments = shlex.split(command)
    if (python, *arguments[:2]) != ("python", "-m", "bench"):
        raise ResultsError(f"{command!r} is not run for a README; expected `python -m bench …`")
    variables = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(  # noqa: S603 (our own command line)
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ResultsError(f"{command}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
