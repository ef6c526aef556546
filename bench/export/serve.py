"""The text of `serve.py`: a program of some thirty lines that serves an artefact where this project is not installed.

What it takes stands in the manifest, and one check reads it. An engine adds the lines that load and run its artefact.
"""

from bench.runtimes.artefact import RUNTIMES

WEIGHTS = "weights.pt"
PREPROCESSING = "each channel with mean 0 and variance 1, as the suite's own weights were fitted; put yours here"

TEXT = '''"""Runs FILE: `python serve.py PICTURE CLASSES.png`, or `import serve` and ask `serve.predict`."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
INPUT, SETTINGS = MANIFEST["input"], MANIFEST["settings"]
for name, sha256 in MANIFEST["files"].items():
    if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != sha256:
        sys.exit(f"{name} is not the file that was exported")

ENGINE


def predict(images):
    """Logits (N, classes, H, W), float32, of images as the manifest's `input` has them; others are refused."""
    if (images := np.asarray(images)).dtype != INPUT["dtype"] or images.ndim != 4 or not images.flags.c_contiguous:
        raise ValueError(f"images are {images.dtype} {images.shape}: expected contiguous {INPUT['dtype']} (N, C, H, W)")
    for size, (axis, (low, high)) in zip(images.shape, INPUT["shape"].items()):
        if not low <= size <= high:
            raise ValueError(f"{axis} is {size}: expected {low} to {high}")
    return run(images)


if __name__ == "__main__":
    from PIL import Image

    picture, channels = Image.open(sys.argv[1]), INPUT["shape"]["channels"][0]
    mode = "RGB" if channels == 3 and picture.mode[0] not in "IF" else "F"  # which keeps more than 8 bits
    pixels = np.atleast_3d(np.asarray(picture.convert(mode), np.float32)).transpose(2, 0, 1)[None]
    # PREPROCESSING
    pixels = (pixels - pixels.mean((2, 3), keepdims=True)) / (pixels.std((2, 3), keepdims=True) + 1e-6)
    logits = predict(np.repeat(pixels, channels if mode == "F" else 1, axis=1))[0]
    classes = logits.argmax(0) if len(logits) > 1 else logits[0] > 0
    Image.fromarray(np.uint8(classes * (255 / max(1, len(logits) - 1)))).save(sys.argv[2])
'''

PYTORCH = """# PyTorch runs it, and these packages of unet-bench, at the commit that the manifest names, know how.
from bench.export.pytorch import load

run = load(HERE / "weights.pt", MANIFEST["case"], MANIFEST["network"])
"""


def text(implementation: str) -> str:
    """The program for an artefact of this implementation; one that PyTorch runs is loaded as the suite loads it."""
    runtime = RUNTIMES.get(implementation)
    engine, file = (runtime.serve, runtime.files[0]) if runtime is not None else (PYTORCH, WEIGHTS)
    return TEXT.replace("FILE", file).replace("PREPROCESSING", PREPROCESSING).replace("ENGINE\n", engine)
