# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory that behaves like nvmet's and USB gadgets' parts of configfs, for tests as any user.

LIO's is in lio.py.

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
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import storagetm

if TYPE_CHECKING:
    from tests.unit.devicemapper import DeviceMapper
    from tests.unit.keyring import Keyring
    from tests.unit.lio import Lio

SUBSYSTEM = (
    "attr_allow_any_host",
    "attr_cntlid_max",
    "attr_cntlid_min",
    "attr_firmware",
    "attr_model",
    "attr_serial",
)
NAMESPACE = ("buffered_io", "device_nguid", "device_path", "device_uuid", "enable", "revalidate_size")
PORT = ("addr_adrfam", "addr_traddr", "addr_treq", "addr_trsvcid", "addr_trtype", "addr_tsas")
HOST = ("dhchap_ctrl_key", "dhchap_dhgroup", "dhchap_hash", "dhchap_key")
# What attributes say at first, if that is not "" (of subsystems and ports) or "0".
FIRST = {
    "addr_treq": "not specified",
    "addr_tsas": "reserved",
    "dhchap_ctrl_key": "",
    "dhchap_dhgroup": "null",
    "dhchap_hash": "hmac(sha256)",
    "dhchap_key": "",
}
HASHES = ("hmac(sha256)", "hmac(sha384)", "hmac(sha512)")
ENOTSUPP = 524  # of the kernel alone, which tells it all the same
PROTECTED = "write_protected"  # a file that a namespace has once a host has asked for that
LISTENING = {"127.0.0.1": ("127.0.0.1", "0.0.0.0"), "::1": ("::1", "::")}  # what lets a host in, by where to


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Networks:
    """Stands for the networks of the kernel: the machine's, and those that the program makes for itself.

    A port listens in the network of the thread that links the first subsystem to it, for as long as there
    are links, whatever becomes of that thread.
    """

    names: ClassVar[dict[int, str]] = {}  # by what stands for a descriptor
    thread = threading.local()

    def __init__(self, base: Path) -> None:
        self.base = base

    @property
    def here(self) -> str:
        """The network of this thread; empty for the machine's."""
        return str(getattr(self.thread, "name", ""))

    def begin(self, network: storagetm.PrivateNetwork) -> None:
        network.fds = 1_000_000 + len(self.names), 1_000_001 + len(self.names)
        self.names[network.fds[0]], self.names[network.fds[1]] = os.urandom(8).hex(), self.here

    @staticmethod
    def end(network: storagetm.PrivateNetwork) -> None:
        network.fds = -1, -1

    def enter(self, fd: int) -> None:
        self.thread.name = self.names[fd]

    def listen(self, port: str) -> None:
        self.base.mkdir(exist_ok=True)
        (self.base / os.path.basename(port)).write_text(self.here)

    def of(self, port: str) -> str:
        path = self.base / os.path.basename(port)
        return path.read_text() if path.exists() else ""


class Nvmet:
    """Patches mkdir(2), rmdir(2), symlink(2), unlink(2) and write(2) below `root`.

    A new object has its attributes and groups at once; removing one removes them too, but not if there are
    objects or links in it, nor if a link points to it. `calls` are the system calls that would change
    something, and `intercept` is called before each with its number in that list, `inspect` after each that
    has succeeded. In place of a host that comes in over the network there is a Host. `mapper` is the
    device-mapper beside it, if there is one, `keyring` the kernel's keyring for TLS. It is Linux 6.12,
    unless it has no `authentication` (CONFIG_NVME_TARGET_AUTH) or `encryption` (CONFIG_NVME_TARGET_TCP_TLS),
    or is `old` (before 6.7) and knows of no TLS.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: list[str] = []
        self.intercept: Callable[[int], object] = bool
        self.room_for_two = False  # whether a range of controllers' IDs has two at least, as with Linux 6.1
        self.authentication = self.encryption = True
        self.old = False
        self.groups = {"null", "ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192"}
        self.hashes = set(HASHES)
        self.mapper: DeviceMapper | None = None
        self.keyring: Keyring | None = None
        self.gadgets: Gadgets | None = None
        self.lio: Lio | None = None
        self.inspect: Callable[[], object] = bool
        # Held by what the real kernel does in one go.
        self.lock = threading.RLock()
        (root / "nvmet/subsystems").mkdir(parents=True)
        for name in ("hosts", "ports"):
            (root / "nvmet" / name).mkdir()
        self._mkdir, self._rmdir, self._write = os.mkdir, os.rmdir, os.write
        self._symlink, self._unlink = os.symlink, os.unlink
        for name in ("mkdir", "rmdir", "symlink", "unlink", "write"):
            monkeypatch.setattr(os, name, getattr(self, name))
        monkeypatch.setattr(storagetm, "NvmeHost", lambda *whom: Host(self, *whom))
        self.networks = Networks(root.with_name(root.name + ".networks"))
        monkeypatch.setattr(storagetm.PrivateNetwork, "begin", lambda network: self.networks.begin(network))
        monkeypatch.setattr(storagetm.PrivateNetwork, "enter", lambda _, fd: self.networks.enter(fd))
        monkeypatch.setattr(storagetm.PrivateNetwork, "end", Networks.end)

    def path(self, path: str) -> Path:
        return self.root / path

    def _relative(self, path: Any) -> str:
        """The path below the root; empty for others."""
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return text[len(str(self.root)) + 1 :] if text.startswith(f"{self.root}/") else ""

    def _other(self, relative: str) -> Gadgets | Lio | None:
        """What a path belongs to, if it is to USB gadgets or to LIO."""
        if relative.startswith("usb_gadget/"):
            return self.gadgets
        return self.lio if relative.startswith("target/") else None

    def called(self, call: str) -> None:
        with self.lock:
            self.calls.append(call)
            number = len(self.calls) - 1
        self.intercept(number)

    def _layout(self, path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Attributes and groups of an object."""
        if re.fullmatch(r"nvmet/hosts/[^/]+", path):
            return (HOST if self.authentication else ()), ()
        if re.fullmatch(r"nvmet/subsystems/[^/]+", path):
            return SUBSYSTEM, ("allowed_hosts", "namespaces")
        if re.fullmatch(r"nvmet/subsystems/[^/]+/namespaces/[^/]+", path):
            return NAMESPACE, ()
        if re.fullmatch(r"nvmet/ports/[^/]+", path):
            return tuple(n for n in PORT if n != "addr_tsas" or not self.old), ("subsystems",)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    def mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        relative = self._relative(path)
        if not relative:
            self._mkdir(path, mode, **options)
            return
        if other := self._other(relative):
            other.mkdir(relative)
            return
        attributes, groups = self._layout(relative)
        self.called(f"mkdir {relative}")
        with self.lock:
            self._mkdir(path)
            for name in attributes:
                fd = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT, 0o600)
                first = FIRST.get(name, "" if name.startswith(("attr_", "addr_")) else "0")
                self._write(fd, f"{first}\n".encode())
                os.fchmod(fd, 0o644)
                os.close(fd)
            for name in groups:
                self._mkdir(f"{path}/{name}")
            self.inspect()

    def rmdir(self, path: Any, **options: Any) -> None:
        relative = self._relative(path)
        if not relative:
            self._rmdir(path, **options)
            return
        self.called(f"rmdir {relative}")
        with self.lock:
            if other := self._other(relative):
                other.rmdir(relative)
            else:
                self._remove_object(path, relative)
            self.inspect()

    def _remove_object(self, path: Any, relative: str) -> None:
        if not os.path.isdir(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        attributes, groups = self._layout(relative)
        # In this order (configfs_detach_prep()).
        if path in self._targets():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        if any(os.listdir(f"{path}/{name}") for name in groups):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        for name in (*attributes, PROTECTED):
            if os.path.exists(f"{path}/{name}"):
                self._unlink(f"{path}/{name}")
        for name in groups:
            self._rmdir(f"{path}/{name}")
        self._rmdir(path)

    def _targets(self) -> set[str]:
        links = [p for kind in ("ports/*/subsystems", "subsystems/*/allowed_hosts") for p in self._all(kind)]
        return {os.path.normpath(os.path.join(link.parent, os.readlink(link))) for link in links}

    def _all(self, kind: str) -> list[Path]:
        return list(self.root.glob(f"nvmet/{kind}/*"))

    def _check_link(self, target: str, relative: str) -> None:
        """As nvmet_port_subsys_allow_link() and nvmet_allowed_hosts_allow_link() do."""
        groups, of = relative.rpartition("/")[0], target.rpartition("/")[0]
        kinds = {"subsystems": "nvmet/subsystems", "allowed_hosts": "nvmet/hosts"}
        if of != kinds.get(groups.rpartition("/")[2]):
            raise failure(errno.EINVAL)
        if of == "nvmet/hosts":
            anybody = self.path(groups).parent / "attr_allow_any_host"
            if anybody.read_text() == "1\n":
                raise failure(errno.EINVAL)
        if any(os.path.realpath(p) == str(self.path(target)) for p in self.path(groups).iterdir()):
            raise failure(errno.EEXIST)

    def symlink(self, target: Any, path: Any, *is_directory: bool, **options: Any) -> None:
        if not (relative := self._relative(path)):
            self._symlink(target, path, *is_directory, **options)
            return
        self.called(f"symlink {relative}")
        with self.lock:
            if not os.path.isdir(target):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target)
            if other := self._other(relative):
                other.check_link(self._relative(target), relative)
            else:
                self._check_link(self._relative(target), relative)
            port = relative.partition("/subsystems/")[0]
            if port.startswith("nvmet/ports/") and not os.listdir(self.path(port) / "subsystems"):
                self.networks.listen(port)
            # As configfs does.
            self._symlink(os.path.relpath(target, os.path.dirname(path)), path, *is_directory, **options)
            self.inspect()

    def unlink(self, path: Any, **options: Any) -> None:
        if (relative := self._relative(path)) and os.path.lexists(path):
            self.called(f"unlink {relative}")
            if isinstance(other := self._other(relative), Gadgets):
                other.unbind(relative)
            with self.lock:
                self._unlink(path, **options)
                self.inspect()
            return
        self._unlink(path, **options)

    def write(self, fd: int, data: bytes) -> int:
        relative = self._relative(os.readlink(f"/proc/self/fd/{fd}"))
        if not relative:
            return self._write(fd, data)
        self.called(f"write {relative} {data.decode()}")
        with self.lock:
            if data and (other := self._other(relative)):
                other.write(relative, data.decode())
                return len(data)
            written = self._write_attribute(fd, relative, data)
            self.inspect()
            return written

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
        if name in PORT:
            self._check_port(parent, name, data.decode().strip())
        if name in HOST:
            self._check_host(name, data.decode().strip())
        if name == "attr_allow_any_host" and data == b"1" and os.listdir(f"{parent}/allowed_hosts"):
            raise failure(errno.EINVAL)
        if name == "attr_cntlid_max" and self.room_for_two:
            with open(f"{parent}/attr_cntlid_min") as file:
                if int(data) <= int(file.read()):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if name != "revalidate_size":  # which cannot be read
            os.ftruncate(fd, 0)
            self._write(fd, data + b"\n")
        return len(data)

    def _check_port(self, port: str, name: str, value: str) -> None:
        """Raises OSError for what a port does not take, and brings up to date what follows from the rest."""
        if os.listdir(f"{port}/subsystems"):
            raise failure(errno.EACCES)
        treq, tsas = Path(port, "addr_treq"), Path(port, "addr_tsas")
        if name == "addr_trtype" and not self.old:
            tsas.write_text("none\n")
        elif name == "addr_treq":
            if value not in ("not specified", "required", "not required"):
                raise failure(errno.EINVAL)
            if value == "not specified" and not self.old and tsas.read_text() == "tls1.3\n":
                raise failure(errno.EINVAL)
        elif name == "addr_tsas":
            if value not in ("none", "tls1.3") or Path(port, "addr_trtype").read_text() != "tcp\n":
                raise failure(errno.EINVAL)
            if value == "tls1.3" and not (self.encryption and self.keyring):
                raise failure(errno.EINVAL)
            if value == "none" or treq.read_text() == "not specified\n":
                treq.write_text("required\n" if value == "tls1.3" else "not specified\n")

    def _check_host(self, name: str, value: str) -> None:
        """Raises OSError for what a host's secret cannot be, or have. The rest shows when it connects."""
        if name in ("dhchap_key", "dhchap_ctrl_key"):
            if not (found := re.match(r"DHHC-1:(\d+):\S", value)) or int(found[1]) > len(HASHES):
                raise failure(errno.EINVAL)
            if int(found[1]) and HASHES[int(found[1]) - 1] not in self.hashes:
                raise failure(ENOTSUPP)
        elif name == "dhchap_hash":
            if value not in HASHES:
                raise failure(errno.EINVAL)
            if value not in self.hashes:
                raise failure(ENOTSUPP)
        elif value not in self.groups:
            raise failure(errno.EINVAL)

    # What tests do with it.

    def contents(self) -> dict[str, str]:
        """All there is: attributes with their text, directories, links with what they point to.

        Devices of device-mapper are called by their names, which are the same each time.
        """
        found = self.mapper.contents() if self.mapper else {}
        if self.keyring:
            found.update(self.keyring.contents())
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
                        name in ("device_path", "file")
                        and self.mapper
                        and (device := self.mapper.name_of(found[relative]))
                    ):
                        found[relative] = f"/dev/mapper/{device}"
                    if self.lio:
                        found[relative] = self.lio.shown(relative, found[relative])
        return found

    def exports(self, node: str) -> int:
        """How many namespaces and LUNs there are of a block device, which is open for them."""
        luns = self.root.glob("usb_gadget/*/functions/*/lun.*/file")
        backstores = self.lio.opened(node) if self.lio else 0
        return (
            backstores
            + sum(path.read_text() == f"{node}\n" for path in luns)
            + sum(
                (path.parent / "enable").read_text() == "1\n"
                for path in self.root.glob("nvmet/subsystems/*/namespaces/*/device_path")
                if path.read_text() == f"{node}\n"
            )
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


# Attributes of the objects of a gadget, with what they are at first, and the groups that come with them.
# These are drivers/usb/gadget/configfs.c and function/f_mass_storage.c.
LUN = {"cdrom": "0", "file": "", "forced_eject": "", "inquiry_string": "", "nofua": "0", "removable": "1"}
LUN |= {"ro": "0"}
GADGET = {
    "UDC": "",
    "bcdDevice": "0x0612",
    "bcdUSB": "0x0000",
    "bDeviceClass": "0x00",
    "idProduct": "0x0000",
}
GADGET |= {"idVendor": "0x0000", "max_speed": "super-speed-plus"}
STRINGS = {"manufacturer": "", "product": "", "serialnumber": ""}
CONFIGURATION = {"MaxPower": "500", "bmAttributes": "0x80"}
FUNCTION = {"stall": "1"}
OBJECTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # by what a path matches below "usb_gadget"
    r"[^/]+": (GADGET, ("configs", "functions", "os_desc", "strings")),
    r"[^/]+/strings/0x409": (STRINGS, ()),
    r"[^/]+/configs/[^/.]+\.[0-9]+": (CONFIGURATION, ("strings",)),
    r"[^/]+/functions/mass_storage\.[^/]+": (FUNCTION, ("lun.0",)),
    r"[^/]+/functions/[^/]+/lun\.[^/]+": (LUN, ()),
}
LUNS_MAX = 16
NOT_ATTACHED, CONFIGURED = "not attached", "configured"


class Gadgets:
    """The part of `nvmet` that is for USB gadgets, controllers in sysfs at `sys`, and a host at the cable.

    All of it is in files, so that it outlives a process that is killed. With an `old` kernel (before Linux
    5.19), errors of a controller are told as they are, and none gets its gadget back when it returns;
    without `forces` (before 6.0) there is no `forced_eject`.
    """

    def __init__(self, nvmet: Nvmet, sys: Path) -> None:
        self.nvmet = nvmet
        self.udc = sys / "class/udc"
        self.locked = sys / "usb-host"  # a file for each LUN that the host has locked
        self.old, self.forces = False, True
        self.functions = {"mass_storage"}  # whose modules there are
        self.refusing: set[str] = set()  # controllers that have too few endpoints
        nvmet._mkdir(nvmet.root / "usb_gadget")
        self.locked.mkdir(parents=True)
        nvmet.gadgets = self

    def path(self, relative: str) -> Path:
        return self.nvmet.root / relative

    @staticmethod
    def gadget(relative: str) -> str:
        """The gadget that a path is in."""
        return "/".join(relative.split("/")[:2])

    @staticmethod
    def layout(relative: str) -> tuple[dict[str, str], tuple[str, ...]]:
        below = relative.partition("/")[2]
        found = [made for pattern, made in OBJECTS.items() if re.fullmatch(pattern, below)]
        if not found:
            raise failure(errno.EPERM)
        return found[0]

    def is_linked(self, relative: str) -> bool:
        """Whether the function that a path is in is linked; for others, whether any of the gadget's is."""
        links = [p for p in self.path(self.gadget(relative)).glob("configs/*/*") if p.is_symlink()]
        function = "/".join(relative.split("/")[:4]) if "/functions/" in relative else ""
        return any(not function or os.path.samefile(link, self.path(function)) for link in links)

    # What is made and removed

    def mkdir(self, relative: str) -> None:
        self.layout(relative)
        self.nvmet.called(f"mkdir {relative}")
        with self.nvmet.lock:
            name = relative.rpartition("/")[2]
            if "/lun." in relative:
                number = name.partition(".")[2]
                if not number.isdecimal():
                    raise failure(errno.EINVAL)
                if int(number) >= LUNS_MAX:
                    raise failure(errno.ERANGE)
                if self.is_linked(relative):
                    raise failure(errno.EBUSY)
            elif "/functions/" in relative and name.partition(".")[0] not in self.functions:
                raise failure(errno.ENOENT)
            self.make(relative)

    def make(self, relative: str) -> None:
        attributes, groups = self.layout(relative) if self.is_object(relative) else ({}, ())
        self.nvmet._mkdir(self.path(relative))
        for name, value in attributes.items():
            if name != "forced_eject" or self.forces:
                self.path(f"{relative}/{name}").write_text(f"{value}\n" if value or name == "UDC" else "")
        for name in groups:
            self.make(f"{relative}/{name}")

    def is_object(self, relative: str) -> bool:
        try:
            return bool(self.layout(relative))
        except OSError:
            return False

    def rmdir(self, relative: str) -> None:
        path = self.path(relative)
        if not path.is_dir():
            raise failure(errno.ENOENT)
        parent, _, name = relative.rpartition("/")
        if not self.is_object(relative) or (self.is_object(parent) and name in self.layout(parent)[1]):
            raise failure(errno.EPERM)
        targets = {
            link.parent / os.readlink(link)
            for link in self.nvmet.root.glob("usb_gadget/*/configs/*/*")
            if link.is_symlink()
        }
        if path in {Path(os.path.normpath(target)) for target in targets}:
            raise failure(errno.EBUSY)
        self.check_empty(relative)
        if "/lun." in relative and self.is_linked(relative):
            self.unbind(relative)
        self.remove(path)

    def check_empty(self, relative: str) -> None:
        groups = self.layout(relative)[1] if self.is_object(relative) else ()
        for child in self.path(relative).iterdir():
            if child.name in groups:
                self.check_empty(f"{relative}/{child.name}")
            elif child.is_dir():
                raise failure(errno.ENOTEMPTY)

    def remove(self, path: Path) -> None:
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                self.remove(child)
            else:
                self.nvmet._unlink(child)
        self.nvmet._rmdir(path)

    def check_link(self, target: str, relative: str) -> None:
        functions = self.gadget(relative) + "/functions/"
        if not target.startswith(functions) or not re.search(r"/configs/[^/]+/[^/]+$", relative):
            raise failure(errno.EINVAL)
        config = self.nvmet.path(relative).parent
        # A function is in a configuration once.
        if any(
            os.path.realpath(link) == os.path.realpath(self.nvmet.path(target)) for link in config.iterdir()
        ):
            raise failure(errno.EEXIST)

    # What is written

    def write(self, relative: str, text: str) -> None:
        name = relative.rpartition("/")[2]
        value = text.removesuffix("\n")
        if name == "UDC":
            self.bind(relative, value)
        elif name == "file":
            self.insert(relative, value)
        elif name == "forced_eject":
            file = f"{relative.rpartition('/')[0]}/file"
            self.unlock(file)
            self.insert(file, "")
        else:
            self.set(relative, name, value)

    def set(self, relative: str, name: str, value: str) -> None:
        if name in LUN and name != "inquiry_string":
            if value not in ("0", "1"):
                raise failure(errno.EINVAL)
            if name == "ro" and self.medium(f"{relative.rpartition('/')[0]}/file"):
                raise failure(errno.EBUSY)
        elif name == "stall" and self.is_linked(relative):
            raise failure(errno.EBUSY)
        elif name == "inquiry_string":
            value = f"{value:28.28}"
        elif name in STRINGS and len(value) > 126:
            raise failure(errno.EOVERFLOW)
        elif name.startswith("id"):
            value = f"{int(value, 0):#06x}"
        self.path(relative).write_text(f"{value}\n")

    def medium(self, file: str) -> str:
        """What is in a LUN, given its attribute."""
        return self.path(file).read_text().removesuffix("\n")

    def insert(self, file: str, node: str) -> None:
        """As fsg_store_file(): what is there before is locked, replaced, or ejected."""
        if self.lock_of(file).exists() and self.medium(file):
            raise failure(errno.EBUSY)
        if node and self.nvmet.mapper:
            self.nvmet.mapper.check_open(node)
        self.path(file).write_text(f"{os.path.realpath(node)}\n" if node else "")

    def bind(self, relative: str, name: str) -> None:
        bound = self.path(relative).read_text().strip()
        if name in ("", "none"):
            if not bound:
                raise failure(errno.ENODEV)
            self.unbind(relative)
            return
        if bound:
            raise failure(errno.EBUSY)
        function = self.udc / name / "function"
        code = 0
        if not function.exists():
            code = errno.ENODEV
        elif function.read_bytes():
            code = errno.EBUSY
        elif not self.is_linked(relative):
            code = errno.EINVAL
        elif name in self.refusing:
            code = errno.EOPNOTSUPP
            for file in self.files(relative):
                self.path(file).write_text("")  # the end of its thread ejects all
        if code:
            raise failure(code if self.old else errno.EBUSY)
        self.path(relative).write_text(f"{name}\n")
        function.write_text(f"{self.gadget(relative).rpartition('/')[2]}\n")

    def unbind(self, relative: str) -> None:
        """Ends the binding of the gadget that a path is in, if there is one."""
        gadget = self.gadget(relative)
        name = self.path(f"{gadget}/UDC").read_text().strip()
        self.path(f"{gadget}/UDC").write_text("\n")
        function = self.udc / name / "function"
        if name and function.exists() and function.read_bytes() == f"{gadget.rpartition('/')[2]}\n".encode():
            function.write_text("")
            self.unplug(name)

    def files(self, relative: str) -> list[str]:
        found = self.path(self.gadget(relative)).glob("functions/*/lun.*/file")
        return [str(path.relative_to(self.nvmet.root)) for path in found]

    # What controllers do, and other programs

    def appear(self, name: str, user: str = "") -> None:
        """A controller that is used by another gadget, or free."""
        (self.udc / name).mkdir(parents=True)
        (self.udc / name / "function").write_text(f"{user}\n" if user else "")
        (self.udc / name / "state").write_text(f"{NOT_ATTACHED}\n")
        for path in self.nvmet.root.glob("usb_gadget/*/UDC"):
            if path.read_text() == f"{name}\n" and not self.old:
                (self.udc / name / "function").write_text(f"{path.parent.name}\n")

    def vanish(self, name: str) -> None:
        """Its gadget goes on having its name."""
        self.unplug(name)
        for attribute in ("function", "state"):
            (self.udc / name / attribute).unlink()
        (self.udc / name).rmdir()

    def use(self, name: str, user: str) -> None:
        """Has another gadget use a controller, or none."""
        (self.udc / name / "function").write_text(f"{user}\n" if user else "")

    # What the host does

    def state(self, name: str, state: str) -> None:
        (self.udc / name / "state").write_text(f"{state}\n")

    def plug(self, name: str) -> None:
        assert (self.udc / name / "function").read_text(), "nothing is bound"
        self.state(name, CONFIGURED)

    def unplug(self, name: str) -> None:
        """That ends all locks, too (handle_exception())."""
        self.state(name, NOT_ATTACHED)
        for path in self.locked.iterdir():
            path.unlink()

    def lock_of(self, file: str) -> Path:
        return self.locked / file.replace("/", "!")

    def lock(self, file: str) -> None:
        assert self.medium(file), "no medium"
        self.lock_of(file).touch()

    def unlock(self, file: str) -> None:
        self.lock_of(file).unlink(missing_ok=True)

    def eject(self, file: str) -> None:
        """As do_start_stop() does it."""
        self.unlock(file)
        self.path(file).write_text("")


class Host:
    """Stands for storagetm.NvmeHost, which has tests of its own: a host that attaches itself to a subsystem.

    It is let in by a port that listens at this address, without TLS, and that the subsystem is linked to; if
    that allows any host, or this one; and if it can prove the secret that the target has of it.
    """

    def __init__(self, nvmet: Nvmet, address: tuple[str, int], nqn: str, host_id: str) -> None:
        self.nvmet, self.address, self.nqn = nvmet, address, nqn
        self.host_nqn = storagetm.HOST_STEM + storagetm.dashed(host_id)
        self.secret = b""
        nvmet.called(f"connect {nqn}")
        if not (listening := self.listening()):
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        if nqn not in listening or not self.is_allowed():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def is_allowed(self) -> bool:
        subsystem = self.nvmet.path("nvmet/subsystems") / self.nqn
        anybody = (subsystem / "attr_allow_any_host").read_text() == "1\n"
        return anybody or (subsystem / "allowed_hosts" / self.host_nqn).exists()

    def listening(self) -> list[str]:
        """The subsystems that one is let in to at the address."""
        found: list[str] = []
        for port in self.nvmet.root.glob("nvmet/ports/*"):
            if (port / "addr_treq").read_text() == "required\n":
                continue  # what is no TLS, the kernel hangs up on
            where = (port / "addr_traddr").read_text().strip(), (port / "addr_trsvcid").read_text().strip()
            here = self.nvmet.networks.here == self.nvmet.networks.of(f"nvmet/ports/{port.name}")
            if here and where in [(traddr, str(self.address[1])) for traddr in LISTENING[self.address[0]]]:
                found += os.listdir(port / "subsystems")
        return found

    def close(self) -> None:
        """Nothing in the kernel is left of it."""

    def is_attached(self) -> bool:
        return self.nqn in self.listening()

    def finish(self) -> None:
        """All was answered at once."""

    def proves(self) -> bool:
        """Whether it knows the secret, if it is asked for one (nvmet_setup_auth())."""
        if (self.nvmet.path("nvmet/subsystems") / self.nqn / "attr_allow_any_host").read_text() == "1\n":
            return True
        asked = storagetm.read_attribute(f"{self.nvmet.path('nvmet/hosts')}/{self.host_nqn}/dhchap_key")
        return asked in ("", storagetm.dhchap_text(self.secret).decode())

    def attach(self, number: int = 0) -> None:
        if not self.proves():
            raise failure(errno.EIO)
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
        */subsystems/*) names='{" ".join(SUBSYSTEM)}' value= groups='allowed_hosts namespaces' ;;
        */ports/*) names='{" ".join(PORT)}' value= groups=subsystems ;;
    esac
    for name in $names; do echo $value >"$1/$name"; done
    for group in $groups; do command mkdir "$1/$group" || exit; done
    groups=
    case $1 in
        */ports/*) echo 'not specified' >"$1/addr_treq"; echo none >"$1/addr_tsas" ;;
    esac
}}
rmdir() {{
    rm -f "$1"/addr_* "$1"/attr_* "$1"/[bderw]*
    for group in allowed_hosts namespaces subsystems; do
        test ! -d "$1/$group" || command rmdir "$1/$group" || exit
    done
    command rmdir "$1" || exit
}}
set -e
"""


def gadgets_shell() -> str:
    """The same for gadgets."""
    patterns = {
        "*/lun.*": (LUN, ()),
        "*/functions/*.*": OBJECTS[r"[^/]+/functions/mass_storage\.[^/]+"],
        "*/configs/*.*/strings": ({}, ()),
        "*/configs/*.*": (CONFIGURATION, ("strings",)),
        "*/strings/*": (STRINGS, ()),
        "*/configs | */functions | */os_desc | */strings": ({}, ()),
        "*": OBJECTS[r"[^/]+"],
    }
    lines = ["make() {", 'command mkdir "$1" || exit', "case $1 in"]
    for pattern, (attributes, groups) in patterns.items():
        lines.append(f"{pattern})")
        lines += [f'echo "{value}" >"$1/{name}"' for name, value in attributes.items()]
        lines += [f'make "$1/{name}"' for name in groups]
        lines.append(";;")
    return "\n".join([*lines, "esac", "}", 'mkdir() { make "$1"; }', "set -e", ""])
