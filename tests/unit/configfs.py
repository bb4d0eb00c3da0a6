# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory that behaves like nvmet's part of configfs, for tests of what is done there, as any user.

The real kernel is tested in machines. Here it is about the order of steps and what is left when they stop.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import storagetm

if TYPE_CHECKING:
    from tests.unit.devicemapper import DeviceMapper

SUBSYSTEM = (
    "attr_allow_any_host",
    "attr_cntlid_max",
    "attr_cntlid_min",
    "attr_firmware",
    "attr_model",
    "attr_serial",
)
NAMESPACE = ("buffered_io", "device_nguid", "device_path", "device_uuid", "enable", "revalidate_size")
PORT = ("addr_adrfam", "addr_traddr", "addr_trsvcid", "addr_trtype")
PROTECTED = "write_protected"  # a file that a namespace has once a host has asked for that
LISTENING = {"127.0.0.1": ("127.0.0.1", "0.0.0.0"), "::1": ("::1", "::")}  # what lets a host in, by where to


class Nvmet:
    """Patches mkdir(2), rmdir(2), symlink(2), unlink(2) and write(2) below `root`.

    A new object has its attributes and groups at once; removing one removes them too, but not if there are
    objects or links in it, nor if a link points to it. `calls` are the system calls that would change
    something, and `intercept` is called before each with its number in that list. In place of a host that
    comes in over the network there is a Host. `mapper` is the device-mapper beside it, if there is one.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: list[str] = []
        self.intercept: Callable[[int], object] = bool
        self.room_for_two = False  # whether a range of controllers' IDs has two at least, as with Linux 6.1
        self.mapper: DeviceMapper | None = None
        # Held by what the real kernel does in one go.
        self.lock = threading.RLock()
        (root / "nvmet/subsystems").mkdir(parents=True)
        (root / "nvmet/ports").mkdir()
        self._mkdir, self._rmdir, self._write = os.mkdir, os.rmdir, os.write
        self._symlink, self._unlink = os.symlink, os.unlink
        for name in ("mkdir", "rmdir", "symlink", "unlink", "write"):
            monkeypatch.setattr(os, name, getattr(self, name))
        monkeypatch.setattr(storagetm, "NvmeHost", lambda *whom: Host(self, *whom))

    def path(self, path: str) -> Path:
        return self.root / path

    def _relative(self, path: Any) -> str:
        """The path below the root; empty for others."""
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return text[len(str(self.root)) + 1 :] if text.startswith(f"{self.root}/") else ""

    def called(self, call: str) -> None:
        with self.lock:
            self.calls.append(call)
            number = len(self.calls) - 1
        self.intercept(number)

    @staticmethod
    def _layout(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Attributes and groups of an object."""
        if re.fullmatch(r"nvmet/subsystems/[^/]+", path):
            return SUBSYSTEM, ("namespaces",)
        if re.fullmatch(r"nvmet/subsystems/[^/]+/namespaces/[^/]+", path):
            return NAMESPACE, ()
        if re.fullmatch(r"nvmet/ports/[^/]+", path):
            return PORT, ("subsystems",)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    def mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        relative = self._relative(path)
        if not relative:
            self._mkdir(path, mode, **options)
            return
        attributes, groups = self._layout(relative)
        self.called(f"mkdir {relative}")
        with self.lock:
            self._mkdir(path)
            for name in attributes:
                fd = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT, 0o600)
                self._write(fd, b"\n" if name.startswith("attr_") or "addr_" in name else b"0\n")
                os.close(fd)
            for name in groups:
                self._mkdir(f"{path}/{name}")

    def rmdir(self, path: Any, **options: Any) -> None:
        relative = self._relative(path)
        if not relative:
            self._rmdir(path, **options)
            return
        self.called(f"rmdir {relative}")
        with self.lock:
            self._remove_object(path, relative)

    def _remove_object(self, path: Any, relative: str) -> None:
        if not os.path.isdir(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        attributes, groups = self._layout(relative)
        if any(os.listdir(f"{path}/{name}") for name in groups):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        if path in self._targets():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        for name in (*attributes, PROTECTED):
            if os.path.exists(f"{path}/{name}"):
                self._unlink(f"{path}/{name}")
        for name in groups:
            self._rmdir(f"{path}/{name}")
        self._rmdir(path)

    def _targets(self) -> set[str]:
        links = self.root.glob("nvmet/ports/*/subsystems/*")
        return {os.path.normpath(os.path.join(link.parent, os.readlink(link))) for link in links}

    def symlink(self, target: Any, path: Any, *is_directory: bool, **options: Any) -> None:
        if relative := self._relative(path):
            self.called(f"symlink {relative}")
            if not os.path.isdir(target):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target)
            target = os.path.relpath(target, os.path.dirname(path))  # as configfs does
        self._symlink(target, path, *is_directory, **options)

    def unlink(self, path: Any, **options: Any) -> None:
        if (relative := self._relative(path)) and os.path.lexists(path):
            self.called(f"unlink {relative}")
        self._unlink(path, **options)

    def write(self, fd: int, data: bytes) -> int:
        relative = self._relative(os.readlink(f"/proc/self/fd/{fd}"))
        if not relative:
            return self._write(fd, data)
        self.called(f"write {relative} {data.decode()}")
        with self.lock:
            return self._write_attribute(fd, relative, data)

    def _write_attribute(self, fd: int, relative: str, data: bytes) -> int:
        parent = os.path.dirname(self.path(relative))
        name = relative.rpartition("/")[2]
        enable = f"{parent}/enable"
        if name in ("device_path", "device_uuid", "device_nguid", "buffered_io"):
            with open(enable) as file:
                if file.read() != "0\n":
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if name == "enable" and data == b"1":
            with open(f"{parent}/device_path") as file:
                device = file.read().strip()
            if device == "0":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if self.mapper:
                self.mapper.check_open(device)
        if name in PORT and os.listdir(f"{parent}/subsystems"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if name == "attr_cntlid_max" and self.room_for_two:
            with open(f"{parent}/attr_cntlid_min") as file:
                if int(data) <= int(file.read()):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if name != "revalidate_size":  # which cannot be read
            os.ftruncate(fd, 0)
            self._write(fd, data + b"\n")
        return len(data)

    # What tests do with it.

    def contents(self) -> dict[str, str]:
        """All there is: attributes with their text, directories, links with what they point to.

        Devices of device-mapper are called by their names, which are the same each time.
        """
        found = self.mapper.contents() if self.mapper else {}
        for directory, names, files in os.walk(self.root):
            for name in (*names, *files):
                path = f"{directory}/{name}"
                relative = self._relative(path)
                if os.path.islink(path):
                    target = os.path.normpath(os.path.join(directory, os.readlink(path)))
                    found[relative] = "-> " + os.path.relpath(target, self.root)
                elif os.path.isdir(path):
                    found[relative] = "directory"
                else:
                    with open(path) as file:
                        found[relative] = file.read().strip()
                    if (
                        name == "device_path"
                        and self.mapper
                        and (device := self.mapper.name_of(found[relative]))
                    ):
                        found[relative] = f"/dev/mapper/{device}"
        return found

    def exports(self, node: str) -> int:
        """How many namespaces there are of a block device, which nvmet has open for them."""
        return sum(
            (path.parent / "enable").read_text() == "1\n"
            for path in self.root.glob("nvmet/subsystems/*/namespaces/*/device_path")
            if path.read_text() == f"{node}\n"
        )

    def fail_at(self, number: int, code: int = errno.EIO) -> None:
        """Has the call of that number from now on, counted from 0, fail."""
        wanted = len(self.calls) + number

        def intercept(current: int) -> None:
            if current == wanted:
                raise OSError(code, os.strerror(code))

        self.intercept = intercept

    def succeed(self) -> None:
        """Lets no more calls fail."""
        self.intercept = bool

    def run_and_kill_at(self, number: int, function: Callable[[], object]) -> bool:
        """Calls a function in a process of its own that is killed before that call; False if it ended."""
        pid = os.fork()
        if pid == 0:
            wanted = len(self.calls) + number

            def intercept(current: int) -> None:
                if current == wanted:
                    with self.lock:  # no other thread is in the middle of something
                        os.kill(os.getpid(), signal.SIGKILL)

            self.intercept = intercept
            status = 2
            try:
                function()
                status = 0
            finally:
                os._exit(status)
        result = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(result):
            return True
        assert os.waitstatus_to_exitcode(result) == 0
        return False


class Host:
    """Stands for storagetm.NvmeHost, which has tests of its own: a host that attaches itself to a subsystem.

    It is let in by a port that listens at this address and that the subsystem is linked to.
    """

    def __init__(self, nvmet: Nvmet, address: tuple[str, int], nqn: str, _: str) -> None:
        self.nvmet, self.address, self.nqn = nvmet, address, nqn
        nvmet.called(f"connect {nqn}")
        if not (listening := self.listening()):
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        if nqn not in listening:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def listening(self) -> list[str]:
        """The subsystems that one is let in to at the address."""
        found: list[str] = []
        for port in self.nvmet.root.glob("nvmet/ports/*"):
            where = (port / "addr_traddr").read_text().strip(), (port / "addr_trsvcid").read_text().strip()
            if where in [(traddr, str(self.address[1])) for traddr in LISTENING[self.address[0]]]:
                found += os.listdir(port / "subsystems")
        return found

    def close(self) -> None:
        """Nothing in the kernel is left of it."""

    def is_attached(self) -> bool:
        return self.nqn in self.listening()

    def finish(self) -> None:
        """All was answered at once."""

    def attach(self, number: int = 0) -> None:
        if not number:
            return
        namespace = f"nvmet/subsystems/{self.nqn}/namespaces/{number}"
        self.nvmet.called(f"protect {namespace}")
        enable = self.nvmet.path(namespace) / "enable"
        with self.nvmet.lock:
            if not enable.exists() or enable.read_text() != "1\n":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            (enable.parent / PROTECTED).write_text("1\n")


def is_courtesy(call: str, passage: str) -> bool:
    """Whether a call is on the way on which hosts are told of write protection, over this port."""
    return f"{call.split()[1]}/".startswith(f"{passage}/") or call.startswith(("connect", "protect"))


# What makes and removes objects in a plain directory when a shell runs the commands of a dry run.
SHELL = rf"""
mkdir() {{
    command mkdir "$1" || exit
    case $1 in
        */namespaces/*) names='{" ".join(NAMESPACE)}' value=0 ;;
        */subsystems/*) names='{" ".join(SUBSYSTEM)}' value= group=namespaces ;;
        */ports/*) names='{" ".join(PORT)}' value= group=subsystems ;;
    esac
    for name in $names; do echo $value >"$1/$name"; done
    test -z "$group" || command mkdir "$1/$group"
    group=
}}
rmdir() {{
    rm -f "$1"/[abderw]*
    for group in namespaces subsystems; do
        test ! -d "$1/$group" || command rmdir "$1/$group" || exit
    done
    group=
    command rmdir "$1" || exit
}}
set -e
"""
