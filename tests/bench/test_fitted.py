import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import fitted, fitting
from bench.fitted import NotFittedError, Recipe
from bench.loss import segmentation_loss
from bench.picture import source
from unet.model import UNet

ROOT = Path(fitted.__file__).resolve().parents[1]
SMALL = Recipe(upsampling="transposed", width=4, depth=2, steps=10)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of so small a network spend their time waiting for each other, seconds of it on a busy machine."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNET_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return fitted.fit(SMALL).read_bytes()


def placed(content: bytes) -> Path:
    file = fitted.path(SMALL)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def python(*arguments: str, **options: Any) -> "subprocess.Popen[str]":  # noqa: ANN401 (Popen's own)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


# ── Fitting and loading ───────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_fitted_is_loaded_with_its_own_dice() -> None:
    assert not fitted.cached(SMALL)
    with pytest.raises(NotFittedError, match="no fitted weights"):
        fitted.load(SMALL)
    steps: list[tuple[int, int]] = []
    fitted.fit(SMALL, lambda step, of: steps.append((step, of)))
    assert steps == [(step, 10) for step in range(1, 11)]
    assert fitted.cached(SMALL)
    weights, dice = fitted.load(SMALL)
    model = UNet(3, 2, bilinear=False, width=4, depth=2)
    model.load_state_dict(weights)
    image, mask = source()
    with torch.inference_mode():
        ones = model.eval()(torch.tensor(image[None, :, :256, 256:])).argmax(1).numpy()[0] == 1
    truth = mask[:256, 256:] == 1
    assert dice == pytest.approx(2 * (ones & truth).sum() / (ones.sum() + truth.sum()))


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
def test_the_fit_is_good_enough_for_agreement_to_mean_something(
    upsampling: Literal["bilinear", "transposed"], width: int
) -> None:
    recipe = Recipe(upsampling=upsampling, width=width)
    fitted.fit(recipe)
    assert fitted.load(recipe)[1] >= 0.95


@pytest.mark.parametrize("depth", [1, 5, 6])
def test_every_allowed_depth_can_be_fitted(depth: int) -> None:
    recipe = Recipe(upsampling="bilinear", width=1, depth=depth, steps=2)
    fitted.fit(recipe)
    assert 0 <= fitted.load(recipe)[1] <= 1


def test_no_crop_touches_what_is_held_out() -> None:
    image, mask = source()
    rows, columns = fitting.HELD_OUT
    where = {image[:, top, left].tobytes() for top in range(256) for left in range(256, 512)}
    elsewhere = {image[:, y, x].tobytes() for y in range(512) for x in range(512) if y >= 256 or x < 256}
    only_held_out = where - elsewhere
    assert 0.4 < mask[rows, columns].mean() < 0.6
    crops = zip(range(40), fitting._crops(SMALL), strict=False)
    for _, (crop, target) in crops:
        assert crop.shape == (1, 3, 64, 64)
        assert target.shape == (1, 64, 64)
        assert not only_held_out & {pixel.tobytes() for pixel in crop[0].flatten(1).T.contiguous().numpy()}


def test_a_fit_repeats_bit_by_bit_and_leaves_no_trace_in_torch() -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.no_grad():
        first = torch.load(fitted.fit(SMALL))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.manual_seed(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.load(fitted.fit(SMALL))["digest"] == first["digest"]
    other = torch.load(fitted.fit(msgspec.structs.replace(SMALL, seed=1)))
    assert other["digest"] != first["digest"]


@pytest.mark.parametrize("changes", [{"width": 0}, {"depth": 0}, {"depth": 7}, {"steps": 1}, {"upsampling": "nearest"}])
def test_a_recipe_that_cannot_be_fitted_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(msgspec.ValidationError, match=name):
        msgspec.convert({"upsampling": "bilinear"} | changes, Recipe)


# ── The cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_looking_into_the_cache_imports_no_torch(small_file: bytes) -> None:
    placed(small_file)
    code = (
        "import sys; from bench.fitted import *;"
        "r = Recipe(upsampling='transposed', width=4, depth=2, steps=10); assert cached(r), path(r);"
        "assert not {'torch', 'numpy', 'skimage'} & sys.modules.keys()"
    )
    process = python("-c", code)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_the_folder_is_chosen_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("UNET_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fitted.cache_folder() == tmp_path / "xdg" / "unet-bench"
    monkeypatch.setenv("HOME", str(tmp_path))
    for useless in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert fitted.cache_folder() == tmp_path / ".cache" / "unet-bench"


def test_weights_of_another_recipe_code_or_torch_are_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {fitted.path(SMALL)}
    for changes in ({"upsampling": "bilinear"}, {"width": 5}, {"depth": 3}, {"steps": 11}, {"seed": 1}):
        names.add(fitted.path(msgspec.structs.replace(SMALL, **changes)))
    assert len(names) == 6
    for name in fitted.INGREDIENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(fitted, "ROOT", tmp_path)
    assert fitted.path(SMALL) in names, "a moved checkout keeps its weights"
    for name in fitted.INGREDIENTS:
        with (tmp_path / name).open("a") as source_file:
            source_file.write("# changed\n")
        names.add(fitted.path(SMALL))
    assert len(names) == 6 + len(fitted.INGREDIENTS)
    monkeypatch.setattr(fitted, "assigned", lambda *_: {"__version__": "another"})
    assert fitted.path(SMALL) not in names


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.25, 0.5, 0.9, 0.99, 0.9999, 1.0])
def test_a_truncated_file_counts_as_absent(small_file: bytes, share: float) -> None:
    file = placed(small_file[: min(int(len(small_file) * share), len(small_file) - 1)])
    assert not fitted.cached(SMALL)
    with pytest.raises(NotFittedError, match="damaged"):
        fitted.load(SMALL)
    assert not file.exists()


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_never_gives_other_weights(small_file: bytes, position: float, flip: int) -> None:
    placed(small_file)
    expected = {name: tensor.clone() for name, tensor in fitted.load(SMALL)[0].items()}
    damaged = bytearray(small_file)
    damaged[int(position * len(damaged))] ^= flip
    placed(bytes(damaged))
    try:
        weights, _ = fitted.load(SMALL)
    except NotFittedError:
        assert not fitted.cached(SMALL), "it is fitted again next time"
    else:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_hostile_file_runs_no_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    file = fitted.path(SMALL)
    file.parent.mkdir()
    torch.save({"weights": Hostile(), "dice": 1.0, "digest": ""}, file)
    with pytest.raises(NotFittedError):
        fitted.load(SMALL)
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_cannot_be_read_is_not_called_damaged(small_file: bytes) -> None:
    file = placed(small_file)
    file.unlink()
    file.mkdir()
    assert not fitted.cached(SMALL)
    with pytest.raises(OSError, match="directory"):
        fitted.load(SMALL)
    assert file.exists()


@pytest.mark.slow
def test_two_processes_that_fit_at_once_leave_one_whole_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes(msgspec.json.encode(SMALL))
    processes = [python("-m", "bench.fitted", str(tmp_path / "recipe.json"), stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [file.name for file in cache.iterdir()] == [fitted.path(SMALL).name]
    assert fitted.load(SMALL)[1] > 0
    assert any("step 10/10" in out for out, _ in said)


@pytest.mark.slow
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_litter(cache: Path, small_file: bytes) -> None:
    placed(small_file)
    code = "from bench.fitted import *;fit(Recipe(upsampling='transposed', width=4, depth=2, steps=10))"
    half = len(small_file) // 2
    process = python("-c", code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    assert "File too large" in process.communicate()[1]
    assert process.returncode == 1
    assert [file.read_bytes() for file in cache.iterdir()] == [small_file]


def test_what_no_run_uses_any_more_goes_away(small_file: bytes) -> None:
    file = placed(small_file)
    stale, recent, foreign = (file.with_name(name) for name in ("bilinear-w8-d4-0.pt", "bilinear-w8-d4-1.pt", "my.pt"))
    for other in (stale, recent, foreign):
        other.touch()
    month_ago = time.time() - 31 * 24 * 3600
    for old in (stale, foreign, file):
        os.utime(old, (month_ago, month_ago))
    fitted.load(SMALL)  # using it makes it young again
    fitted._tidy(file.parent)
    assert {left.name for left in file.parent.iterdir()} == {file.name, recent.name, foreign.name}


# ── The loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def reference_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Both terms in fp64, pixel by pixel as they are written."""
    p = logits.double().softmax(1)
    entropy = -p.gather(1, mask[:, None]).log().mean()
    terms = []
    for c in range(logits.shape[1]):
        t = (mask == c).double()
        terms.append((2 * (p[:, c] * t).sum() + 1) / (p[:, c].sum() + t.sum() + 1))
    return entropy + 1 - torch.stack(terms).mean()


@given(n=st.integers(1, 3), c=st.integers(2, 4), h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_the_loss_and_its_gradient_are_what_the_formula_says(n: int, c: int, h: int, w: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, h, w, generator=generator).requires_grad_()
    mask = torch.randint(0, c, (n, h, w), generator=generator)
    loss, expected = segmentation_loss(logits, mask), reference_loss(logits, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_a_large_half_precision_image_is_summed_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 2, 512, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = (torch.arange(512 * 512).view(1, 512, 512).expand(2, 512, 512) % 3 == 0).long()
    with torch.autocast("cpu", dtype=dtype):
        loss = segmentation_loss(logits, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference_loss(logits, mask), rtol=1e-5, atol=0)


def test_the_loss_falls_from_wrong_to_right_and_ends_at_zero() -> None:
    mask = torch.tensor([[[0, 1], [1, 0]]])
    right = torch.where(mask[:, None] == torch.arange(2).view(1, 2, 1, 1), 50.0, -50.0)
    assert segmentation_loss(right, mask) == pytest.approx(0, abs=1e-6)
    assert segmentation_loss(0 * right, mask) > 0.5
    assert segmentation_loss(-right, mask) > 50
