import ast
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from bench.case import Case
from bench.errors import UsageError
from bench.export.serve import text
from bench.picture import picture, source
from bench.results import Header, Run
from bench.runtimes.artefact import RUNTIMES
from bench.weights import digest, look
from unet import UNet
from unet.checkpoint import load_weights, save_weights

from .conftest import ROOT, TINY, Bench
from .evidence import record

CASE = Case(**TINY)  # type: ignore[arg-type]


def needs(*modules: str) -> pytest.MarkDecorator:
    lacking = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"{', '.join(lacking)} not installed")


def case(implementation: str, **axes: str | int) -> Case:
    return msgspec.structs.replace(CASE, implementation=implementation, **axes)


def export(bench: Bench, wanted: Case, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return bench.read("export", wanted.id, "--out", str(out), *options)


def python(bench: Bench, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that can `import serve`, and our packages where a bundle needs them; it starts in another folder."""
    variables = {**bench.variables, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    variables.pop("AOTI_RUNTIME_CHECK_INPUTS", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder.parent, env=variables, capture_output=True, text=True, check=False)


def serve(bench: Bench, folder: Path, given: Path, into: Path) -> subprocess.CompletedProcess[str]:
    return python(bench, folder, str(folder / "serve.py"), str(given), str(into))


def rel_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(float) - expected) / np.linalg.norm(expected.astype(float)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet]:
    torch.manual_seed(0)
    model = UNet(3, 2, width=4, depth=2)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            # Statistics that folding must get right.
            layer.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model.eval()
    with torch.no_grad():
        # Both classes as often as each other on a real picture.
        logits = model(picture(1, 64, 64)[0])
        model.outc.conv.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    path = tmp_path_factory.mktemp("weights") / "mine.pt"
    save_weights(model, path)
    return path, model


ENGINES = [
    pytest.param(case("eager"), (2, 40, 56), marks=pytest.mark.slow),
    pytest.param(case("folded", layout="nhwc", precision="bf16"), (2, 40, 56), marks=pytest.mark.slow),
    pytest.param(case("onnx"), (3, 41, 57), marks=[needs("onnxruntime", "onnxscript"), pytest.mark.slow]),
    pytest.param(case("openvino"), (3, 41, 57), marks=[needs("openvino"), pytest.mark.slow]),
    pytest.param(case("openvino", precision="amp_bf16"), (3, 41, 57), marks=[needs("openvino"), pytest.mark.slow]),
    pytest.param(case("aotinductor", precision="amp_bf16", layout="nhwc"), (1, 32, 32), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("wanted", "shape"), ENGINES, ids=lambda part: part.id if isinstance(part, Case) else "")
def test_a_bundle_gives_what_eager_gives_in_a_fresh_process_and_refuses_what_it_was_not_made_for(
    bench: Bench, checkpoint: tuple[Path, UNet], tmp_path: Path, wanted: Case, shape: tuple[int, int, int]
) -> None:
    path, model = checkpoint
    folder = tmp_path / "shipped"
    told = export(bench, wanted, folder, "--weights", str(path))
    assert told.returncode == 0, told.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["case"], manifest["weights"]) == (wanted.id, digest(path))
    assert manifest["files"] == {name: digest(folder / name) for name in manifest["files"]}
    assert {file.name for file in folder.iterdir()} == {*manifest["files"], "manifest.json", "serve.py"}

    batch, height, width = shape
    images, _ = picture(batch, height, width)
    good = images.numpy()
    wrong = {
        "dtype": (good.astype(np.float64), "expected contiguous float32 (N, C, H, W)"),
        "list": (good.tolist(), "expected contiguous float32 (N, C, H, W)"),
        "path": ("tissue.png", "expected contiguous float32 (N, C, H, W)"),
        "rank": (good[0], "expected contiguous float32 (N, C, H, W)"),
        "layout": (np.asfortranarray(good), "expected contiguous float32"),
        "channels": (good[:, :2].copy(), "channels is 2: expected 3 to 3"),
        "none": (good[:0], "batch is 0: expected"),
        "size": (good[:, :, :1].copy(), "height is 1: expected"),
    }
    if wanted.implementation == "aotinductor":
        wrong["width"] = (np.zeros((1, 3, 32, 48), np.float32), "width is 48: expected 32 to 32")
    # One process for all, that has never heard of the export: `predict` is what a server would import.
    code = (
        "import pickle, sys, numpy, serve\n"
        "good, wrong = pickle.load(open(sys.argv[1], 'rb'))\n"
        "numpy.save(sys.argv[2], serve.predict(good))\n"
        "print(*sorted({'bench', 'kernels', 'unet'} & set(sys.modules)))\n"
        "serve.run = None  # what comes so far has passed the check\n"
        "for name, (image, _) in wrong.items():\n"
        "    try: serve.predict(image); print(name, 'passed')\n"
        "    except Exception as error: print(f'{name} {type(error).__name__}: {error}')\n"
    )
    (tmp_path / "images.pickle").write_bytes(pickle.dumps((good, wrong)))
    done = python(bench, folder, "-c", code, str(tmp_path / "images.pickle"), str(tmp_path / "out.npy"))
    assert done.returncode == 0, done.stderr
    ours, *said = done.stdout.splitlines()
    assert ours == ("" if wanted.implementation in RUNTIMES else "bench unet"), "an artefact needs none of ours"
    logits = np.load(tmp_path / "out.npy")
    with torch.inference_mode():
        expected = model(images).numpy()
    assert (logits.dtype, logits.shape) == (np.float32, (batch, 2, height, width))
    # Another picture than the one it was checked with, so a little more than the tolerance.
    assert rel_l2(logits, expected) <= 1.5 * manifest["tolerance"]
    assert len(said) == len(wrong)
    for line, (name, (_, expected_words)) in zip(said, wrong.items(), strict=True):
        assert line.startswith(f"{name} ValueError: ")
        assert expected_words in line


@pytest.mark.parametrize("implementation", ["eager", *RUNTIMES])
def test_what_is_shipped_to_serve_is_read_at_a_glance(implementation: str) -> None:
    program = text(implementation)
    ast.parse(program)
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    assert max(map(len, program.splitlines())) <= 120


@pytest.mark.slow
def test_an_aotinductor_package_itself_refuses_another_shape(
    bench: Bench, checkpoint: tuple[Path, UNet], tmp_path: Path
) -> None:
    """Behind our own check stands the engine's, which is off unless serve.py switches it on."""
    folder = tmp_path / "shipped"
    assert export(bench, case("aotinductor"), folder, "--weights", str(checkpoint[0])).returncode == 0
    code = (
        "import numpy as np, serve\n"
        "serve.run(np.zeros((1, 3, 32, 32), np.float32)); print('right shape runs')\n"
        "serve.run(np.zeros((1, 3, 32, 48), np.float32)); print('wrong shape runs')\n"
    )
    done = python(bench, folder, "-c", code)
    assert done.stdout.splitlines() == ["right shape runs"], done.stderr
    assert "unmatched dim value at 3, expected: 32, but got: 48" in done.stderr


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, fitted_cache: Path, checkpoint: tuple[Path, UNet]
) -> tuple[Bench, Path]:
    """One bundle for the tests that only look at it."""
    folder = tmp_path_factory.mktemp("bundle")
    bench = Bench(folder, fitted_cache)
    told = export(bench, CASE, folder / "shipped", "--weights", str(checkpoint[0]))
    assert told.returncode == 0, told.stderr
    return bench, folder / "shipped"


@pytest.mark.slow
def test_a_picture_becomes_a_picture_of_classes(
    bundle: tuple[Bench, Path], checkpoint: tuple[Path, UNet], tmp_path: Path
) -> None:
    from skimage import data

    bench, folder = bundle
    Image.fromarray(data.immunohistochemistry()).save(tmp_path / "in.png")  # type: ignore[no-untyped-call]
    served = serve(bench, folder, tmp_path / "in.png", tmp_path / "out.png")
    assert served.returncode == 0, served.stderr
    with torch.inference_mode():
        expected = checkpoint[1](torch.tensor(source()[0])[None]).argmax(1)[0].numpy()
    found = np.asarray(Image.open(tmp_path / "out.png"))
    assert set(np.unique(found)) == {0, 255}
    assert ((found == 255) == (expected == 1)).mean() > 0.9999


@pytest.mark.slow
def test_a_grey_picture_of_sixteen_bits_is_seen_as_that_of_eight(bundle: tuple[Bench, Path], tmp_path: Path) -> None:
    from skimage import data

    bench, folder = bundle
    grey = Image.fromarray(data.immunohistochemistry()).convert("L")  # type: ignore[no-untyped-call]
    pictures = {
        "eight": grey,
        "sixteen": Image.fromarray(np.asarray(grey, np.uint16) * 257),
        "colours": grey.convert("RGB"),
    }
    found = {}
    for name, given in pictures.items():
        given.save(tmp_path / f"{name}.png")
        served = serve(bench, folder, tmp_path / f"{name}.png", tmp_path / f"{name}.out.png")
        assert served.returncode == 0, served.stderr
        found[name] = np.asarray(Image.open(tmp_path / f"{name}.out.png"))
    assert set(np.unique(found["eight"])) == {0, 255}
    assert (found["eight"] == found["sixteen"]).mean() > 0.9999
    assert (found["eight"] == found["colours"]).mean() > 0.9999


@pytest.mark.slow
def test_a_folder_that_is_there_stays_as_it_is_unless_told_otherwise(bundle: tuple[Bench, Path]) -> None:
    bench, folder = bundle
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    told = export(bench, CASE, folder)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.splitlines() == [f"bench: {folder}: is there already; name another folder, or add --replace"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
def test_only_a_bundle_is_replaced(bundle: tuple[Bench, Path], tmp_path: Path) -> None:
    from bench.export.bundle import in_the_way

    for name in ("thesis.tex", "serve.py"):
        (tmp_path / name).touch()
        told = in_the_way(tmp_path, replace=True)
        assert told == f"{tmp_path}: is no bundle, so it is not replaced; name another folder"
    assert in_the_way(bundle[1], replace=True) is None
    assert in_the_way(tmp_path / "new", replace=False) is None


@pytest.mark.slow
def test_a_bundle_gives_way_to_another_when_told_to(bundle: tuple[Bench, Path], tmp_path: Path) -> None:
    bench, folder = bundle
    other = tmp_path / "shipped"
    shutil.copytree(folder, other)
    (other / "old").touch()
    told = export(bench, CASE, other, "--replace")
    assert told.returncode == 0, told.stderr
    assert {file.name for file in other.iterdir()} == {"weights.pt", "manifest.json", "serve.py"}
    assert [file.name for file in tmp_path.iterdir()] == ["shipped"]


@pytest.mark.slow
def test_a_file_that_was_changed_since_is_not_served(bundle: tuple[Bench, Path], tmp_path: Path) -> None:
    bench, folder = bundle
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with (copy / "weights.pt").open("ab") as file:
        file.write(b"!")
    served = serve(bench, copy, tmp_path / "in.png", tmp_path / "out.png")
    assert served.returncode == 1
    assert "weights.pt is not the file that was exported" in served.stderr


@pytest.mark.slow
def test_the_manifest_has_what_a_run_measured_and_where(bench: Bench, tmp_path: Path) -> None:
    assert bench.measure(CASE).returncode == 0
    (run,) = bench.runs()
    told = export(bench, CASE, tmp_path / "shipped", "--run", str(run.path))
    assert told.returncode == 0, told.stderr
    assert "not measured" not in told.stdout
    measured = json.loads((tmp_path / "shipped/manifest.json").read_text())["measured"]
    assert measured["figures"] == run.records[0].figures
    assert measured["run"] == run.path.name
    assert run.header.environment.machine.cpu in measured["conditions"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("run(images) * 1.01", r"serve\.py gives logits that are 0\.01 off fp32 eager's"),
        ("run(images) * float('nan')", r"serve\.py gives logits that are nan off fp32 eager's"),
        ("run(images)[:, 9]", r"serve\.py failed: IndexError"),
    ],
    ids=["wrong", "no number", "none"],
)
def test_what_gives_the_wrong_answer_is_not_shipped_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted_cache: Path, answer: str, told: str
) -> None:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    from bench import fitted
    from bench.export import bundle, serve
    from bench.subject import recipe

    monkeypatch.setattr(serve, "TEXT", serve.TEXT.replace("return run(images)", f"return {answer}"))
    with pytest.raises(UsageError, match=told):
        bundle.write(CASE, tmp_path / "shipped", weights=None, weights_file=fitted.path(recipe(CASE)), measured=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("nonsense", "'nonsense' is not possible"),
        (case("eager", task="train").id, "a training step is nothing to ship"),
        (case("eager", devices="2cpu").id, "a bundle runs in one process"),
        (case("eager", frame="tiled").id, "a bundle takes whole images"),
        (case("eager", container="sequential").id, "a bundle is of the plain network"),
        (case("eager", modification="head").id, "a bundle is of the plain network"),
        (case("onnx", precision="amp_bf16").id, "computes in fp32 on a CPU"),
        (case("triton", devices="1gpu").id, "no CUDA device"),
    ],
    ids=lambda part: part[:30],
)
def test_what_cannot_be_shipped_is_refused_in_one_line(
    bench: Bench, tmp_path: Path, wanted: str, expected: str
) -> None:
    bench.variables["CUDA_VISIBLE_DEVICES"] = ""
    told = bench.read("export", wanted, "--out", str(tmp_path / "shipped"))
    assert (told.returncode, told.stdout) == (2, "")
    assert len(told.stderr.splitlines()) == 1
    assert expected in told.stderr
    assert not (tmp_path / "shipped").exists()


def test_a_case_of_another_network_than_the_checkpoint_is_refused(
    bench: Bench, checkpoint: tuple[Path, UNet], tmp_path: Path
) -> None:
    told = export(bench, case("eager", width=6), tmp_path / "shipped", "--weights", str(checkpoint[0]))
    assert (told.returncode, told.stdout) == (2, "")
    assert "is a network of width 6, and" in told.stderr
    assert not (tmp_path / "shipped").exists()


def test_figures_of_other_weights_are_none_of_the_bundle(header: Header, checkpoint: tuple[Path, UNet]) -> None:
    from bench.export.command import _measured

    run = Run(path=Path("x.jsonl"), header=header, records=(record(CASE), record(case("onnx"), "crash")))
    fitted = _measured(CASE, [run], None)
    assert fitted is not None
    assert fitted.figures == run.records[0].figures
    assert _measured(CASE, [run], look(checkpoint[0])) is None
    assert _measured(case("onnx"), [run], None) is None


@pytest.mark.slow
def test_weights_of_the_checkpoint_are_in_the_bundle(
    bench: Bench, checkpoint: tuple[Path, UNet], tmp_path: Path
) -> None:
    path, model = checkpoint
    assert export(bench, CASE, tmp_path / "shipped", "--weights", str(path)).returncode == 0
    other = UNet(3, 2, width=4, depth=2)
    load_weights(other, tmp_path / "shipped/weights.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
