"""The text of `serve.py`: what an artefact is loaded and asked with, where nothing of this project need be installed.

One text for all engines but for a few lines that load and run; `predict` refuses what the manifest does not promise
before the engine sees it.
"""

from bench.runtimes.artefact import RUNTIMES

WEIGHTS = "weights.pt"

TEXT = '''"""Runs {file}: `python serve.py PICTURE.png CLASSES.png`, .npy for tensors; or `import serve`."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
for name, expected in MANIFEST["files"].items():
    if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != expected:
        sys.exit(f"{{name}} is not the file that was exported")

{engine}

def predict(image):
    """Logits (N, classes, H, W), float32, of images (N, channels, H, W), float32."""
    wanted = MANIFEST["input"]
    if not isinstance(image, np.ndarray) or image.dtype != wanted["dtype"]:
        raise TypeError(f"the image is {{getattr(image, 'dtype', type(image))}}: expected {{wanted['dtype']}}")
    if image.ndim != 4 or image.shape[1] != wanted["channels"]:
        raise ValueError(f"the image is {{image.shape}}: expected (N, {{wanted['channels']}}, H, W)")
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        low, high = wanted[name]
        if not low <= image.shape[axis] <= high:
            raise ValueError(f"{{name}} is {{image.shape[axis]}}: expected {{low}} to {{high}}")
    if not image.flags.c_contiguous:
        raise ValueError("the image's memory is not in the order N, C, H, W: np.ascontiguousarray(image)")
    return run(image)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    if source.endswith(".npy"):
        image = np.load(source)
    else:
        from PIL import Image

        mode = "L" if MANIFEST["input"]["channels"] == 1 else "RGB"
        pixels = np.asarray(Image.open(source).convert(mode), np.float32)
        pixels = np.atleast_3d(pixels).transpose(2, 0, 1)[None]
        # {preprocessing}
        image = (pixels - pixels.mean((2, 3), keepdims=True)) / pixels.std((2, 3), keepdims=True)
        image = np.ascontiguousarray(image, np.float32)
    logits = predict(image)
    if target.endswith(".npy"):
        np.save(target, logits)
    else:
        classes = logits[0].argmax(0) if logits.shape[1] > 1 else logits[0, 0] > 0
        from PIL import Image

        Image.fromarray((classes * (255 // max(1, logits.shape[1] - 1))).astype(np.uint8)).save(target)
'''

PREPROCESSING = "each channel with mean 0 and variance 1, as the suite's own weights were fitted; put yours here"

PYTORCH = """# Needs torch and this project's packages, unet-bench, at the commit that the manifest names.
import torch
from bench.case import parse_id
from bench.implementations import IMPLEMENTATIONS
from unet import UNet
from unet.checkpoint import load_weights

CASE = parse_id(MANIFEST["case"])
DEVICE = "cuda" if CASE.on_gpu else "cpu"
LAYOUT = torch.channels_last if CASE.layout == "nhwc" else torch.contiguous_format
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(CASE.precision, torch.float32)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = CASE.precision == "tf32"
if CASE.threads:
    torch.set_num_threads(CASE.threads)
network = UNet(**MANIFEST["network"]).eval()
load_weights(network, HERE / "weights.pt")
call = IMPLEMENTATIONS[CASE.implementation].build(network.to(DEVICE, STORED, memory_format=LAYOUT), CASE)


def run(image):
    dtype = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(CASE.precision)
    with torch.inference_mode(), torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        return call(torch.from_numpy(image).to(DEVICE, STORED, memory_format=LAYOUT)).float().cpu().numpy()
"""


def text(implementation: str) -> str:
    """The program for an artefact of this implementation; one that PyTorch runs is loaded as the suite loads it."""
    runtime = RUNTIMES.get(implementation)
    engine, file = (runtime.serve, runtime.files[0]) if runtime is not None else (PYTORCH, WEIGHTS)
    return TEXT.format(file=file, engine=engine, preprocessing=PREPROCESSING)
