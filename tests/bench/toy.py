"""A project of three packages with the names of ours, small enough to be changed, broken and committed in a test.

Its one case spends its time in an op, `toy_kernels::work`, which every commit registers under the same name. A step
waits a given time by the clock, so that a busy machine slows base and head alike.
"""

import os
import subprocess
from pathlib import Path

FILES = {
    "bench/__init__.py": "",
    "bench/__main__.py": """
        import json, sys
        from bench.case import CASES
        LAYER = {"kernel": "work", "config": "1x8x8 4→4 bf16 | w4", "spill_bytes": 0, "shared_bytes": 64}
        REGISTERS = 100
        if "resources" in sys.argv:
            for target in sys.argv[-1].split(","):
                print(json.dumps({**LAYER, "target": target, "registers": REGISTERS, "instructions": 50}))
        else:
            for case in CASES:
                print(json.dumps({"id": case, "unsupported": None}))
    """,
    "bench/case.py": """
        CASES = ("infer-toy",)
        class CaseError(ValueError): pass
        def parse_id(text):
            if text not in CASES: raise CaseError(f"no case {text}")
            return text
    """,
    "bench/distributed.py": """
        class Group: pass
    """,
    "bench/fitted.py": """
        def cached(recipe): return True
    """,
    "bench/implementations.py": """
        def load(modules): pass
    """,
    "bench/subject.py": """
        import torch
        import kernels
        class Subject:
            device, network = torch.device("cpu"), None
            def step(self): return torch.ops.toy_kernels.work(torch.zeros(4))
            def synchronize(self): pass
        def recipe(case): return case
        def prepare_process(case, cores): torch.set_num_threads(1)
        def build(case, group): return Subject()
    """,
    "kernels/__init__.py": """
        import time
        import torch
        from unet import MILLISECONDS
        @torch.library.custom_op("toy_kernels::work", mutates_args=())
        def work(x: torch.Tensor) -> torch.Tensor:
            end = time.perf_counter() + MILLISECONDS / 1000
            while time.perf_counter() < end: pass
            return x + MILLISECONDS
        @torch.library.register_fake("toy_kernels::work")
        def _(x): return torch.empty_like(x)
    """,
    "unet/__init__.py": """
        MILLISECONDS = 2.0
    """,
}


class Toy:
    """The project as a git repository.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q")
        self.write(**FILES)

    def git(self, *arguments: str) -> str:
        names = {
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@t",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@t",
        }
        command = ["git", "-C", str(self.root), *arguments]
        return subprocess.run(command, env={**os.environ, **names}, check=True, capture_output=True, text=True).stdout

    def write(self, **files: str) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = text.splitlines()
            indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
            path.write_text("\n".join(line[indent:] for line in lines))

    def change(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        text = path.read_text()
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new))

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "state")
        return self.git("rev-parse", "HEAD").strip()
