# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit tests: they run as any user, change nothing outside temporary directories, and take seconds.

`unpack` makes a captured machine (see capture.py) the one that the program sees.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

import storagetm

if TYPE_CHECKING:
    from tests.unit.configfs import Nvmet

CAPTURES = Path(__file__).parent / "captures"
# Machines and kernels have thousands of files, which are made and removed many times.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# No file is left behind, and how busy this computer is decides nothing.
settings.register_profile("unit", database=None, deadline=None, max_examples=30)
settings.load_profile("unit")


@pytest.fixture
def tmp_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory if there is a place for that."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="storagetm-") as made:
        yield Path(made)
        monkeypatch.undo()  # a made-up machine would be asked for what is removed


@pytest.fixture(autouse=True)
def this_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone: no module is loaded, and a made-up disk may have the number of one that it has."""
    run_program = storagetm.run_program
    monkeypatch.setattr(storagetm, "run_program", lambda *a: 127 if a[0] == "modprobe" else run_program(*a))
    monkeypatch.setattr(storagetm, "claim", lambda *_: 0)
    monkeypatch.setattr(storagetm, "reread_partitions", lambda _: None)


@pytest.fixture(autouse=True)
def no_logind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests are run, they keep no computer awake."""
    monkeypatch.setattr(storagetm, "LOGIND", ())


class CapturedMachine:
    """A captured machine below `root`, where its files can be changed.

    Its device nodes can't be made without root: what stat(2), open(2) and ioctl(2) have answered for them
    there is given as the answer here. What they open is a file of their own, so that locks are real.
    """

    def __init__(self, name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        capture: dict[str, Any] = json.loads((CAPTURES / f"{name}.json").read_text())
        self.root = root
        self.status: dict[str, list[int]] = capture["status"]
        self.answers: dict[str, dict[str, Any]] = capture["answers"]
        self.opened: list[tuple[str, int]] = []  # nodes, with the flags they were opened with
        for path in capture["directories"]:
            self.path(path).mkdir(parents=True, exist_ok=True)
        for path, content in capture["files"].items():
            self.write(path, content.encode("latin-1"))
        for path, target in capture["links"].items():
            self.path(path).parent.mkdir(parents=True, exist_ok=True)
            self.path(path).symlink_to(target)
        for name, path in (
            ("CONFIGFS", "sys/kernel/config"),
            ("ETC", "etc"),
            ("PROC", "proc"),
            ("RUN", "run/storagetm"),
            ("SYS", "sys"),
            ("UDEV", "run/udev"),
        ):
            monkeypatch.setattr(storagetm, name, f"{root}/{path}/")
        self._stat, self._open, self._ioctl = os.stat, os.open, fcntl.ioctl
        monkeypatch.setattr(os, "stat", self.stat)
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def write(self, path: str, content: bytes | str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    def attribute(self, sysname: str, name: str, value: str) -> None:
        """Changes an attribute of a block device in sysfs."""
        (self.path(f"/sys/class/block/{sysname}") / name).write_text(value + "\n")

    def is_ours(self, path: object) -> bool:
        """Whether the captured machine, and not this one, has to answer for a path."""
        if not isinstance(path, (str, bytes)):
            return False
        text = os.fsdecode(path)
        return text in self.status or (
            text.startswith("/dev/")
            and text not in ("/dev/null", "/dev/urandom")
            and not f"{text}/".startswith(f"{self.root.parent}/")  # which may be below /dev/shm
        )

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        if not self.is_ours(path):
            return self._stat(path, **options)
        mode, device, inode, number = self._status(path)
        values = (mode, inode, device, 1, 0, 0, 0, 0, 0, 0)
        return os.stat_result(values, {"st_rdev": number})

    def _status(self, path: Any) -> list[int]:
        if (found := self.status.get(os.fsdecode(path))) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def open(self, path: Any, flags: int, *mode: int, **options: Any) -> int:
        if not self.is_ours(path):
            return self._open(path, flags, *mode, **options)
        status = self._status(path)
        number = f"{os.major(status[3])}:{os.minor(status[3])}"
        kind = "exclusive" if flags & os.O_EXCL else "nonblock" if flags & os.O_NONBLOCK else "plain"
        self.opened.append((os.fsdecode(path), flags))
        if stat.S_ISBLK(status[0]) and (name := self.answers[number][kind]):
            code = getattr(errno, name)
            raise OSError(code, os.strerror(code), path)
        return self._open(f"{self.root}/open-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> Any:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if request != storagetm.CDROM_DRIVE_STATUS or not path.startswith(f"{self.root}/open-"):
            return self._ioctl(fd, request, argument)
        answer = self.answers[path.rpartition("-")[2]]
        if "drive" not in answer:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return answer["drive"]


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's options did to messages is nothing to the next, nor is who reads those of pytest."""
    for name in ("JOURNAL_STREAM", "SYSTEMD_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storagetm, "log", storagetm.Log())


@pytest.fixture
def unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], CapturedMachine]:
    """Make a captured machine the one that the program sees."""
    return lambda name: CapturedMachine(name, tmp_path / name, monkeypatch)


@pytest.fixture
def machine(unpack: Callable[[str], CapturedMachine]) -> CapturedMachine:
    return unpack("trixie-fresh")


@pytest.fixture
def nvmet(machine: CapturedMachine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvmet]:
    """The captured machine's kernel, as far as exports are made in it."""
    from tests.unit.devicemapper import captured_kernel  # which needs this module

    made = captured_kernel(machine, monkeypatch)
    yield made
    assert made.mapper
    made.mapper.close()
