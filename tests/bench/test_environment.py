import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import environment as env
from bench import gpus
from bench import machine as machines

ROOT = Path(env.__file__).resolve().parents[1]
GPU = gpus.Gpu(
    name="NVIDIA H200",
    uuid="GPU-1",
    memory_mib=143771,
    driver="580.1",
    power_limit_w=700.0,
    compute_capability=(9, 0),
)


@pytest.fixture(scope="module")
def here() -> env.Environment:
    return env.environment()


def machine(here: env.Environment, **changes: object) -> machines.Machine:
    return msgspec.structs.replace(here.machine, **{"cpu_half": ("bf16",), **changes})


def in_fresh_python(code: str, **variables: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout


# ── The whole ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_answers_fast_and_without_importing_torch() -> None:
    code = (
        "import os, sys; before = os.times(); from bench import environment as e; e.environment(); after = os.times();"
        "print(sum(after[:4]) - sum(before[:4]),"
        "*(name in sys.modules for name in ('torch', 'triton', 'numpy', 'pandas')))"
    )
    told = [in_fresh_python(code).split() for _ in range(3)]
    assert all(imported == ["False"] * 4 for _, *imported in told)
    # The processor's seconds, those of the children included, the best of three: the machine is shared.
    assert min(float(seconds) for seconds, *_ in told) < 0.3


def test_torch_is_described_as_torch_describes_itself(here: env.Environment) -> None:
    import torch

    assert here.machine.torch_version == str(torch.__version__)
    assert here.machine.torch_cuda == torch.version.cuda


def test_it_survives_the_way_to_a_file_and_back(here: env.Environment) -> None:
    assert msgspec.json.decode(msgspec.json.encode(here), type=env.Environment) == here


def test_it_does_not_tell_the_name_of_the_host(here: env.Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    uname = os.uname()
    named = os.uname_result((uname.sysname, "a-telling-name", uname.release, uname.version, uname.machine))
    monkeypatch.setattr(os, "uname", lambda: named)
    assert b"a-telling-name" not in msgspec.json.encode(env.environment())
    assert here.time.utcoffset() is not None


def test_the_hash_ignores_the_moment_and_sees_the_machine(here: env.Environment) -> None:
    later = msgspec.structs.replace(
        here,
        load_average=(9.0, 9.0, 9.0),
        time=env.datetime.now(env.UTC),
        commit="other",
        dirty=True,
        source_hash="other",
    )
    assert env.environment_hash(later) == env.environment_hash(here)
    for changes in ({"gpus": (GPU,)}, {"torch_version": "0"}, {"cores": 99}, {"cpu": "other"}, {"cxx": None}):
        other = msgspec.structs.replace(here, machine=machine(here, **changes))
        assert env.environment_hash(other) != env.environment_hash(here), changes


# ── The slug ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("AMD EPYC", "amd-epyc-2cpu"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-2cpu"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-2cpu"),
        ("12th Gen Intel(R) Core(TM) i7-12700", "12th-gen-intel-core-i7-12700-2cpu"),
        ("", "unknown-2cpu"),
    ],
)
def test_the_slug_names_the_processor_without_a_gpu(here: env.Environment, cpu: str, expected: str) -> None:
    assert machines.slug(machine(here, cpu=cpu, cores=2, gpus=())) == expected


def test_processors_of_one_name_are_two_machines_where_one_lacks_16_bits(here: env.Environment) -> None:
    slugs = [
        machines.slug(machine(here, cpu="AMD EPYC", cores=2, gpus=(), cpu_half=half)) for half in ((), ("bf16",), None)
    ]
    assert slugs == ["amd-epyc-2cpu-no-16-bit", "amd-epyc-2cpu", "amd-epyc-2cpu"]
    # With a GPU the processor is not what is measured.
    assert machines.slug(machine(here, torch_cuda="13.0", gpus=(GPU,), cpu_half=())) == "nvidia-h200"


def test_the_slug_names_and_counts_the_gpus(here: env.Environment) -> None:
    small = msgspec.structs.replace(GPU, name="Tesla T4")
    assert machines.slug(machine(here, torch_cuda="13.0", gpus=(GPU,))) == "nvidia-h200"
    assert machines.slug(machine(here, torch_cuda="13.0", gpus=(GPU, GPU))) == "2x-nvidia-h200"
    assert machines.slug(machine(here, torch_cuda="13.0", gpus=(GPU, GPU), nodes=4)) == "4-nodes-2x-nvidia-h200"
    assert machines.slug(machine(here, torch_cuda="13.0", gpus=(small, GPU, GPU))) == "2x-nvidia-h200-tesla-t4"


def test_a_gpu_that_torch_cannot_use_gives_no_name(here: env.Environment) -> None:
    unused = machine(here, torch_cuda=None, gpus=(GPU,), cpu="AMD EPYC", cores=2)
    assert machines.usable_gpus(unused) == ()
    assert machines.slug(unused) == "amd-epyc-2cpu"


@given(cpu=st.text(), gpus=st.lists(st.text()), cores=st.integers(1, 512))
@settings(deadline=None)
def test_a_slug_is_always_a_plain_folder_name(here: env.Environment, cpu: str, gpus: list[str], cores: int) -> None:
    named = tuple(msgspec.structs.replace(GPU, name=name) for name in gpus)
    slug = machines.slug(machine(here, cpu=cpu, cores=cores, torch_cuda="13.0", gpus=named))
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)


# ── GPUs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cgroup(root: Path, lines: str, files: dict[str, str]) -> Path:
    texts = {"proc/self/cgroup": lines} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "4:memory:/a/b\n2:cpu,cpuacct:/a/b\n"


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "104857600\n"}, 100),
        ("0::/a/b\n", {"a/memory.max": "104857600\n", "a/b/memory.max": "max\n"}, 100),
        ("0::/host/only\n", {"memory.max": "104857600\n"}, 100),
        (V1, {"memory/a/b/memory.limit_in_bytes": "104857600\n"}, 100),
        (V1 + "0::/\n", {"memory/memory.limit_in_bytes": "104857600\n"}, 100),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("", {}, None),
    ],
)
def test_the_memory_limit_of_a_cgroup_counts(
    tmp_path: Path, lines: str, files: dict[str, str], expected: int | None
) -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert machines.usable_memory_mib(cgroup(tmp_path, lines, files)) == (expected or installed)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/a\n", {"cpu.max": "300000 100000\n", "a/cpu.max": "max 100000\n"}, 3),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "300000\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("", {}, 8),
    ],
)
def test_the_cpu_quota_of_a_cgroup_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machines.usable_cores(cgroup(tmp_path, lines, files)) == expected


def test_a_processor_without_a_model_name_has_its_architecture(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert machines.cpu_model(info) == os.uname().machine
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n")
    assert machines.cpu_model(info) == "AMD EPYC"


WIDE = "flags\t\t: avx2 avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx avx2 fma", ()),
        ("flags\t\t: avx2 avx512f avx512bw", ()),
        (WIDE, ("bf16",)),
        (f"{WIDE} avx512_fp16", ("bf16", "fp16")),
        ("flags\t\t: avx512_fp16", ()),
        ("flags\t\t: avx2 avx_vnni_int8 avx_ne_convert", ("bf16", "fp16")),
        ("Features\t: fp asimd bf16", ("bf16",)),
        ("Features\t: fp asimd", ()),
        ("processor\t: 0", None),
    ],
)
def test_which_16_bit_formats_a_processor_s_convolutions_multiply(
    tmp_path: Path, line: str, expected: tuple[str, ...] | None
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{line}\npower management:\n")
    assert machines.cpu_half(info) == expected


def test_pytorch_says_the_same_of_this_processor() -> None:
    found = in_fresh_python(
        "import torch; ask = torch.ops.mkldnn\n"
        "print(*['bf16'] * ask._is_mkldnn_bf16_supported(), *['fp16'] * ask._is_mkldnn_fp16_supported())"
    )
    assert tuple(found.split()) == machines.cpu_half()


# ── Installed software ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_compiler_is_told_with_the_reason() -> None:
    assert machines.cxx_compiler({"CXX": "no-such-compiler"})[0] is None
    assert "no C++ compiler" in machines.cxx_compiler({"CXX": "no-such-compiler"})[1]
    assert "no C compiler" in machines.c_compiler({"CC": "no-such-compiler"})[1]
    assert machines.cxx_compiler({"CXX": ""})[0] is None


def test_a_compiler_that_does_not_run_is_missing(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert machines.cxx_compiler({"CXX": str(broken)})[0] is None


def test_a_compiler_without_the_headers_of_python_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working = tmp_path / "g++"
    working.write_text("#!/bin/sh\necho g++ 99\n")
    working.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert machines.cxx_compiler({"CXX": str(working)}) == ("g++ 99", "")
    (tmp_path / "Python.h").unlink()
    found, reason = machines.cxx_compiler({"CXX": str(working)})
    assert found is None
    assert "no Python.h" in reason


def test_an_absent_package_assigns_nothing() -> None:
    assert machines.assigned("no_such_package_here", "version.py") == {}
    assert machines.assigned("torch", "no_such_file.py") == {}


# ── Sources ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, env=clean)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("bench/a.py", "kernels/b.py", "kernels/tuned/gpu.json", "unet/c.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    return tmp_path


def committed(checkout: Path) -> Path:
    git(checkout, "init")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "first")
    return checkout


def test_a_clean_checkout_is_not_dirty_and_results_do_not_count(checkout: Path) -> None:
    commit, dirty = env.git_state(committed(checkout))
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert dirty is False
    (checkout / "results").mkdir()
    (checkout / "results" / "run.jsonl").touch()
    assert env.git_state(checkout) == (commit, False)


@pytest.mark.parametrize(
    "name", ["bench/a.py", "kernels/new.py", "unet/c.py", "pyproject.toml", "kernels/tuned/gpu.json"]
)
def test_a_changed_or_untracked_source_is_dirty(checkout: Path, name: str) -> None:
    (committed(checkout) / name).write_text("2\n")
    assert env.git_state(checkout)[1] is True


def test_what_git_does_not_know_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = ("unknown", "unknown")
    assert env.git_state(checkout) == unknown, "not a repository"
    git(checkout, "init")
    assert env.git_state(checkout) == unknown, "no commit yet"
    committed(checkout)
    assert env.git_state(checkout / "bench") == unknown, "somewhere inside another repository"
    monkeypatch.setenv("PATH", "")
    assert env.git_state(checkout) == unknown, "no git"
    assert env.environment(checkout).commit == "unknown"


def test_inside_a_hook_git_still_looks_at_our_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = env.git_state(committed(checkout))
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(checkout / "nothing"))
    assert env.git_state(checkout) == expected


def test_the_source_hash_sees_every_change_of_code_and_nothing_else(checkout: Path) -> None:
    before = env.source_hash(checkout)
    (checkout / "README.md").write_text("no code")
    (checkout / "bench" / "notes.md").write_text("no code")
    assert env.source_hash(checkout) == before
    for name in ("bench/a.py", "unet/new.py", "kernels/tuned/gpu.json"):
        kept = (checkout / name).read_text() if (checkout / name).exists() else None
        (checkout / name).write_text("2\n")
        assert env.source_hash(checkout) != before, name
        (checkout / name).unlink() if kept is None else (checkout / name).write_text(kept)
    assert env.source_hash(checkout) == before
    (checkout / "bench/a.py").rename(checkout / "bench/z.py")
    assert env.source_hash(checkout) != before, "a new name"
