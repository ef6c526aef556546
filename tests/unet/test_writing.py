"""Writing a file: the old one or the new one, whatever happens meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from unet.files import write

if TYPE_CHECKING:
    from pathlib import Path

SLOW_SAVE = """
import sys, time, torch
from unet import files
save = torch.save
def half(content, file):
    save(content, file)
    file.truncate(file.tell() // 2)
    file.flush()
    print("half", flush=True)
    time.sleep(60)
torch.save = half
files.write({"new": torch.ones(1000)}, sys.argv[1])
"""


def test_a_process_killed_in_the_middle_of_saving_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    write({"old": torch.zeros(3)}, path)
    child = subprocess.Popen([sys.executable, "-c", SLOW_SAVE, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert torch.load(path)["old"].tolist() == [0, 0, 0]
    (part,) = (other.name for other in tmp_path.iterdir() if other != path)
    assert part.startswith(".file.pt.")
    assert part.endswith(".part")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    write({"old": 1}, path)
    with pytest.raises(Exception, match=r"pickle"):
        write({"new": lambda: None}, path)
    assert torch.load(path) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]
    with pytest.raises(FileNotFoundError):
        write({}, tmp_path / "nowhere" / "file.pt")


def test_a_link_is_followed_and_the_usual_permissions_hold(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "file.pt")
    write({"a": 1}, link)
    assert link.is_symlink()
    assert torch.load(tmp_path / "real" / "file.pt") == {"a": 1}
    (tmp_path / "usual").touch()
    assert link.stat().st_mode == (tmp_path / "usual").stat().st_mode
