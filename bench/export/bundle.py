"""Writes a bundle: artefact, manifest and `serve.py`, seen to give the right answer before they get their name."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from bench.engine.accuracy import FLOOR, MARGIN, rel_l2
from bench.environment import ROOT, environment
from bench.errors import UsageError
from bench.export.manifest import MANIFEST, Input, Manifest
from bench.export.serve import WEIGHTS, text
from bench.implementations import IMPLEMENTATIONS
from bench.machine import assigned
from bench.precision import full_precision
from bench.runtimes.artefact import LARGEST, RUNTIMES, Sizes
from bench.runtimes.convert import convert
from bench.subject import build
from unet.checkpoint import save_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.case import Case
    from bench.export.manifest import Measured
    from bench.subject import Subject
    from bench.weights import Weights

SERVE = "serve.py"
# What another program would do; in a process of its own, since this one has loaded more than a bundle may need.
ASK = "import sys, numpy, serve; numpy.save(sys.argv[2], serve.predict(numpy.load(sys.argv[1])))"
SERVE_S = 600


def write(
    case: Case,
    out: Path,
    *,
    weights: Weights | None,
    weights_file: Path,
    measured: Measured | None,
    replace: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Make the bundle of a case in a new folder.

    All is written beside `out`, run once by its own `serve.py`, and renamed when the answer was right.

    Args:
        case: supported here, whole frame, inference.
        out: the folder.
        weights: the checkpoint; None for the fitted weights of the case.
        weights_file: the file that the weights come from.
        measured: figures for the manifest.
        replace: whether a folder that is there gives way, once the new one is whole.
        tell: is told what happens next.

    Raises:
        UsageError: the folder is there, the engine cannot, or the answer is not right; nothing of it is left.
    """
    out = out.resolve()
    if (why := in_the_way(out, replace=replace)) is not None:
        raise UsageError(why)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        manifest = _fill(case, part, weights, weights_file, measured, tell)
        if out.exists():
            old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
            out.rename(old)
            part.rename(out)
            shutil.rmtree(old)
        else:
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def in_the_way(out: Path, *, replace: bool) -> str | None:
    """Why a bundle cannot take this name: something has it, and is not to give way or is no bundle."""
    if not out.exists():
        return None
    if not replace:
        return f"{out}: is there already; name another folder, or add --replace"
    if not ((out / MANIFEST).is_file() and (out / SERVE).is_file()):
        return f"{out}: is no bundle, so it is not replaced; name another folder"
    return None


def _fill(
    case: Case,
    folder: Path,
    weights: Weights | None,
    weights_file: Path,
    measured: Measured | None,
    tell: Callable[[str], None],
) -> Manifest:
    from bench.distributed import Group

    subject = build(msgspec.structs.replace(case, implementation="eager"), Group(), weights)
    network: Any = subject.call
    runtime = RUNTIMES.get(case.implementation)
    files: tuple[str, ...] = (WEIGHTS,)
    if runtime is None:
        save_weights(network, folder / WEIGHTS)
        sizes = _sizes(case)
    else:
        tell(f"making {' and '.join(runtime.files)}")
        try:
            convert(runtime, network, case, folder)
        except (MemoryError, RuntimeError) as error:
            raise UsageError(str(error)) from error
        files, sizes = runtime.files, runtime.sizes(case)
    manifest = Manifest(
        case=case.id,
        network=_arguments(subject),
        weights=hashlib.sha256(weights_file.read_bytes()).hexdigest(),
        weights_from="checkpoint" if weights is not None else "fitted by the suite",
        files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        input=Input(
            shape={
                "batch": sizes.batch,
                "channels": (subject.inputs[0].shape[1],) * 2,
                "height": sizes.height,
                "width": sizes.width,
            }
        ),
        settings=runtime.settings(case) if runtime is not None else {},
        tolerance=_tolerance(subject),
        rel_l2=0.0,
        measured=measured,
        versions=_versions(case),
        environment=environment(),
    )
    (folder / SERVE).write_text(text(case.implementation), encoding="utf-8")
    manifest.write(folder)
    tell(f"running {SERVE} in a process of its own")
    apart = _served(folder, subject)
    if not apart <= manifest.tolerance:
        raise UsageError(
            f"{SERVE} gives logits that are {apart:.3g} off fp32 eager's, and {manifest.tolerance:.3g} is allowed"
        )
    manifest = msgspec.structs.replace(manifest, rel_l2=apart)
    manifest.write(folder)
    return manifest


def _sizes(case: Case) -> Sizes:
    """What the network takes where PyTorch runs it; a recorded graph takes the case's size alone."""
    if IMPLEMENTATIONS[case.implementation].one_size:
        return Sizes(batch=(case.batch,) * 2, height=(case.height,) * 2, width=(case.breadth,) * 2)
    side = 2**case.depth, LARGEST
    return Sizes(batch=(1, LARGEST), height=side, width=side)


def _arguments(subject: Subject) -> dict[str, int | bool]:
    network: Any = subject.call
    return {
        "n_channels": network.n_channels,
        "n_classes": network.n_classes,
        "bilinear": network.bilinear,
        "width": network.width,
        "depth": network.depth,
    }


def _versions(case: Case) -> dict[str, str]:
    from importlib.metadata import version

    runtime = RUNTIMES.get(case.implementation)
    found = {"python": platform.python_version(), "torch": assigned("torch", "version.py")["__version__"]}
    return found if runtime is None else {**found, runtime.package: version(runtime.package)}


def _tolerance(subject: Subject) -> float:
    """As for a measured case: 1.5 times what eager shows at the case's precision, with a floor."""
    at_precision = rel_l2([subject.forward(subject.call)[0]], [_reference(subject)])
    return max(MARGIN["infer"] * at_precision, FLOOR["infer"])


def _reference(subject: Subject) -> torch.Tensor:
    with full_precision():
        return subject.forward(subject.eager("fp32"), "fp32")[0]


def _served(folder: Path, subject: Subject) -> float:
    """Relative L2 between what `serve.predict` says of the case's images and fp32 eager."""
    image, logits = folder / ".image.npy", folder / ".logits.npy"
    np.save(image, subject.inputs[0].float().contiguous().cpu().numpy())
    command = [sys.executable, "-c", ASK, str(image), str(logits)]
    # A bundle that PyTorch runs imports our packages, which may not be installed here.
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(  # noqa: S603 (this Python, our own program)
            command,
            capture_output=True,
            text=True,
            timeout=SERVE_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise UsageError(f"{SERVE} failed: {said[-1] if said else f'status {done.returncode}'}")
        return rel_l2([torch.from_numpy(np.load(logits))], [_reference(subject).cpu()])
    finally:
        for file in (image, logits):
            file.unlink(missing_ok=True)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
