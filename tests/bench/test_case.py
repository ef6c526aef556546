import contextlib
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.case import AXES, Case, CaseError, allowed, parse_axes, parse_id, product, value, vary

cases = st.builds(
    Case,
    task=st.sampled_from(["infer", "train", "layer"]),
    implementation=st.sampled_from(["eager", "compile", "compile_max_autotune", "triton"]),
    precision=st.sampled_from(["fp32", "tf32", "amp_bf16", "amp_fp16", "bf16", "fp16"]),
    layout=st.sampled_from(["nchw", "nhwc"]),
    upsampling=st.sampled_from(["bilinear", "transposed"]),
    batch=st.integers(1, 512),
    size=st.from_regex(r"\A[1-9][0-9]{0,3}x[1-9][0-9]{0,3}\Z"),
    devices=st.from_regex(r"\A[1-9][0-9]?(cpu|gpu)\Z"),
    width=st.integers(1, 256),
    depth=st.integers(1, 6),
    container=st.sampled_from(["unet", "sequential", "ordered", "modulelist", "moduledict"]),
    modification=st.sampled_from(["none", "head", "vector", "plane", "supervision", "features"]),
    activations=st.sampled_from(["kept", "recomputed"]),
    threads=st.integers(0, 128),
    layer=st.from_regex(r"\A(inc|down[1-6]|up[1-6])_[12]\Z"),
    regime=st.sampled_from(["burst", "sustained"]),
    cache=st.sampled_from(["warm", "cold"]),
    frame=st.sampled_from(["whole", "padded", "tiled"]),
    strategy=st.sampled_from(["auto", "single", "ddp", "dp", "replicas"]),
    scaling=st.sampled_from(["weak", "strong"]),
    accumulation=st.integers(1, 64),
    batchnorm=st.sampled_from(["local", "syncbn"]),
)


@given(cases)
def test_an_id_names_one_case_and_reads_back(case: Case) -> None:
    assert parse_id(case.id) == case


@given(cases)
def test_an_id_is_safe_in_a_shell_a_path_and_a_test_name(case: Case) -> None:
    assert re.fullmatch(r"[a-z0-9_-]+", case.id)


@given(cases, cases)
def test_unlike_cases_have_unlike_ids(one: Case, other: Case) -> None:
    assert (one == other) == (one.id == other.id)


def test_an_id_reads_as_documented() -> None:
    case = Case(
        implementation="triton",
        precision="amp_bf16",
        layout="nhwc",
        upsampling="bilinear",
        batch=8,
        size="512x512",
        devices="1gpu",
    )
    assert case.id == "infer-triton-amp_bf16-nhwc-bilinear-b8-512x512-1gpu"


def test_an_axis_that_is_rare_renames_no_case_at_its_default() -> None:
    assert "w64" not in Case().id
    assert Case(width=16, threads=1).id == f"{Case().id}-w16-t1"


def test_no_case_from_before_layers_regimes_and_caches_has_another_name_now() -> None:
    axes = {"implementation": "compile", "precision": "amp_fp16", "width": 8, "activations": "recomputed", "threads": 2}
    case = Case(task="train", **axes)
    assert case.id == "train-compile-amp_fp16-nchw-transposed-b1-256x256-1cpu-w8-recomputed-t2"


def test_height_comes_first_in_a_size() -> None:
    case = Case(size="640x959", batch=3, devices="2gpu")
    assert (case.height, case.breadth, case.images, case.processes, case.on_gpu) == (640, 959, 6, 2, True)


@pytest.mark.parametrize(
    "setting",
    [
        "task=predict",
        "implementation=tensorflow",
        "batch=0",
        "batch=-1",
        "batch=1.5",
        "batch=99999999999",
        "batch=1,,2",
        "batch=",
        "size=512",
        "size=0x5",
        "size=512x512x3",
        "devices=0gpu",
        "devices=1tpu",
        "depth=7",
        "threads=-1",
    ],
)
def test_an_impossible_value_is_refused_with_what_is_allowed(setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(CaseError) as caught:
        parse_axes([setting])
    assert str(caught.value).endswith(allowed(name))
    assert "\n" not in str(caught.value)


def test_an_unknown_axis_is_refused_with_the_axes_there_are() -> None:
    with pytest.raises(CaseError, match=r"unknown axis 'colour'; the axes are task, implementation, .*batchnorm$"):
        parse_axes(["colour=red"])


def test_a_setting_without_a_value_is_refused_with_an_example() -> None:
    with pytest.raises(CaseError, match=r"expected name=value\[,value\.\.\.\], such as batch=1,8"):
        parse_axes(["batch"])


@pytest.mark.parametrize(
    "text", ["", "infer", "infer-eager", f"{Case().id}-x", f"x{Case().id}", f"{Case().id}-w16-w16", "é" * 300]
)
def test_a_text_that_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(CaseError):
        parse_id(text)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reading_of_ids_and_axes(text: str) -> None:
    for read in (parse_id, lambda line: parse_axes([line]), lambda line: value("batch", line)):
        with contextlib.suppress(CaseError):
            read(text)


def test_axes_given_twice_add_up() -> None:
    assert parse_axes(["batch=1", "batch=8,16", "task=train"]) == {"batch": (1, 8, 16), "task": ("train",)}


def test_varying_replaces_an_axis_and_keeps_equal_cases_once() -> None:
    three = product(implementation=("eager", "compile"), batch=(1, 2))
    assert vary(three, {"implementation": ("eager",)}) == (Case(), Case(batch=2))
    assert vary([Case()], {"batch": (1, 4), "task": ("infer", "train")}) == (
        Case(),
        Case(task="train"),
        Case(batch=4),
        Case(task="train", batch=4),
    )


@pytest.mark.parametrize(
    ("axes", "part"),
    [
        ({"strategy": "single"}, "-1cpu"),
        ({"strategy": "replicas", "devices": "2cpu"}, "-2cpu"),
        ({"strategy": "ddp", "devices": "2gpu", "task": "train"}, "-2gpu"),
        ({"strategy": "dp", "devices": "2gpu", "task": "train"}, "-2gpu-dp"),
        ({"scaling": "strong"}, "-1cpu"),
        ({"scaling": "strong", "batchnorm": "syncbn", "devices": "2cpu", "accumulation": 4}, "-2cpu-strong-a4-syncbn"),
    ],
)
def test_what_goes_without_saying_is_not_in_an_id(axes: dict[str, Any], part: str) -> None:
    case = Case(**axes)
    assert case.id.endswith(part)
    assert parse_id(case.id) == case


@given(st.integers(1, 50), st.integers(1, 8), st.sampled_from(["weak", "strong"]))
def test_every_image_is_one_ranks_and_shares_differ_by_one_at_most(batch: int, devices: int, scaling: str) -> None:
    case = Case(batch=batch, devices=f"{devices}cpu", scaling=scaling)
    shares = [range(case.joined_batch)[case.share(rank)] for rank in range(devices)]
    assert [image for share in shares for image in share] == list(range(case.joined_batch))
    assert len(shares[0]) - len(shares[-1]) in {0, 1}
    assert case.joined_batch == (batch if scaling == "strong" else batch * devices)


def test_every_axis_explains_itself() -> None:
    for name, axis in AXES.items():
        assert axis.help
        assert allowed(name)


@given(cases)
def test_a_case_survives_the_way_to_its_process_and_into_a_file(case: Case) -> None:
    assert msgspec.json.decode(msgspec.json.encode(case), type=Case) == case
