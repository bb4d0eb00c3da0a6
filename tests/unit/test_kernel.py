# SPDX-License-Identifier: LGPL-2.1-or-later
"""The thin wrappers around kernel and service manager, with the real ones where that needs no root."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import storagetm
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import Named, made_disk


def test_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 200_000)
    assert storagetm.read_bytes(str(path)) == b"x" * 200_000
    with pytest.raises(FileNotFoundError):
        storagetm.read_bytes(str(tmp_path / "missing"))


def test_attribute_is_read_as_printable_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"  QEMU\x1b HARDDISK \n")
    assert storagetm.read_attribute(str(path)) == "QEMU? HARDDISK"
    assert storagetm.read_attribute(str(tmp_path / "missing")) == ""
    assert storagetm.read_attribute(str(tmp_path)) == ""


def test_write_to_an_attribute_makes_no_file(tmp_path: Path) -> None:
    """Never makes a file: in configfs that would be another error than the kernel's own."""
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        storagetm.write_attribute(str(path), "1")
    path.write_bytes(b"")
    storagetm.write_attribute(str(path), "/dev/\udcff")
    assert path.read_bytes() == b"/dev/\xff"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    storagetm.read_attribute("/proc/self/stat")
    storagetm.read_attribute(str(tmp_path))
    storagetm.write_new_file(str(tmp_path / "x"), b"x")
    storagetm.write_attribute(str(tmp_path / "x"), "x")
    storagetm.send_datagram(str(tmp_path / "missing"), b"x")
    assert os.listdir("/proc/self/fd") == before


def test_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"2"):
        storagetm.write_new_file(str(path), content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_status_of_a_program_is_returned() -> None:
    assert storagetm.run_program("true") == 0
    assert storagetm.run_program("false") == 1
    assert storagetm.run_program("storagetm-no-such-program") == 127


def test_service_manager_is_told_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (f"{tmp_path}/notify", f"@storagetm-test-{os.getpid()}"):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(name.replace("@", "\0"))
            manager.settimeout(60)
            storagetm.notify("STATUS=é")
            assert manager.recv(100) == "STATUS=é".encode()
    # Nobody there, or no manager at all.
    storagetm.notify("READY=1")
    for name in ("", "relative", f"{tmp_path}/missing"):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        storagetm.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    storagetm.notify("READY=1")


def test_closed_output_ends_nothing() -> None:
    code = "import storagetm; storagetm.info('x'); storagetm.error('y')"
    script = f'cd "$1"; exec "$2" -c "{code}" >&- 2>&-'
    command = ["sh", "-c", script, "sh", str(Path(storagetm.__file__).parent), sys.executable]
    assert subprocess.run(command, check=False).returncode == 0


# Netlink


@pytest.mark.parametrize(
    ("structure", "size"),
    [(storagetm.nlmsghdr, 16), (storagetm.ifinfomsg, 16), (storagetm.ifaddrmsg, 8), (storagetm.rtattr, 4)],
)
def test_structures_have_the_kernels_sizes(structure: type[ctypes.Structure], size: int) -> None:
    assert ctypes.sizeof(structure) == size


def test_addresses_of_this_machine_can_be_connected_to() -> None:
    """The real kernel's, whatever they are: never loopback, and each as text that can be connected to."""
    network = storagetm.Network()
    try:
        found = network.addresses()
    finally:
        network.socket.close()
    assert found == sorted(found, key=storagetm.Address.rank)
    for address in found:
        assert address.interface != "lo"
        assert not address.text.startswith("127.")
        assert address.text != "::1"
        assert socket.inet_pton(address.family, address.text)


def test_uevents_can_be_received() -> None:
    uevents = storagetm.Uevents()
    try:
        # Nobody can say what happens to this computer's disks meanwhile.
        assert isinstance(uevents.changed(), (set, type(None)))
    finally:
        uevents.socket.close()


def test_refused_dump_raises() -> None:
    with pytest.raises(OSError, match=r"\[Errno \d+\]"):
        storagetm.Network.dump(9999, storagetm.ifinfomsg())


class Pending:
    """A netlink socket in which datagrams wait, each with the groups it was sent to, or errors.

    A real one that others can send to needs root.
    """

    def __init__(self, *things: tuple[bytes, int] | OSError) -> None:
        self.things = list(things)

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.things:
            raise BlockingIOError
        thing = self.things.pop(0)
        if isinstance(thing, OSError):
            raise thing
        return thing[0][:size], (4711, thing[1])


def drained(*things: tuple[bytes, int] | OSError) -> list[bytes]:
    return storagetm.drain(Pending(*things))  # type: ignore[arg-type]


def test_only_groups_are_believed() -> None:
    """Anyone may send to this socket alone."""
    assert drained() == []
    assert drained((b"kernel", 1), (b"forged", 0), (b"udev", 2)) == [b"kernel", b"udev"]


def test_lost_messages_take_no_others_with_them() -> None:
    """They leave an empty one behind, and the rest is taken all the same."""
    full = OSError(errno.ENOBUFS, "No buffer space available")
    assert drained((b"a", 1), full, (b"b", 1)) == [b"a", b"", b"b"]
    with pytest.raises(OSError, match="broken"):
        drained(OSError(errno.EIO, "broken"))


def test_news_name_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, also where the kernel tells of the number alone."""
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block/254:16").symlink_to("../../devices/virtio4/block/vdb")
    monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/")
    messages = [
        b"remove@/x\0ACTION=remove\0DEVPATH=/devices/virtual/bdi/%b\0SUBSYSTEM=bdi" % number
        for number in (b"254:16", b"254:32", b"9999999:9999999", b"0:0", b"btrfs-1")
    ]
    # A name may have a colon in it, that of an array for example.
    messages.append(b"change@/x\0DEVPATH=/devices/virtual/block/md_a:1\0SUBSYSTEM=block")
    uevents = storagetm.Uevents()
    uevents.socket.close()
    uevents.socket = Pending(*((m, 1) for m in messages))  # type: ignore[assignment]
    assert uevents.changed() == {"vdb", "md_a:1"}
    assert uevents.changed() == set()


# Locks


def test_process_that_holds_a_lock_is_named(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    assert storagetm.lock_holder(f"{path}-gone") == "another process"
    with open(path, "rb") as theirs:
        assert storagetm.lock_holder(str(path)) == "another process"
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with open("/proc/self/comm") as comm:
            expected = f"process {os.getpid()} ({comm.read().strip()})"
        assert storagetm.lock_holder(str(path)) == expected


# The kernel's parts


class Modprobe:
    """Stands for the program: what it was asked for, and what it returns."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.returncode = 0

    def __call__(self, *argv: str) -> int:
        self.asked.append(argv[-1])
        # Only what is in the list gets into an initrd.
        assert argv[-1] in storagetm.MODULES
        return self.returncode


@pytest.fixture
def modprobe(unpack: Callable[[str], CapturedMachine], monkeypatch: pytest.MonkeyPatch) -> Modprobe:
    """A machine without nvmet and configfs."""
    unpack("trixie-fresh")
    made = Modprobe()
    monkeypatch.setattr(storagetm, "run_program", made)
    return made


def why_not(pattern: str) -> None:
    with pytest.raises(storagetm.UserError, match=pattern):
        storagetm.NvmeTcp(Named(), "nqn.test").prepare()


def test_missing_configfs_is_named(modprobe: Modprobe) -> None:
    why_not("has no configfs")
    assert modprobe.asked == ["nvmet-tcp", "configfs"]


def test_missing_modules_are_named(modprobe: Modprobe) -> None:
    modprobe.returncode = 1
    why_not(f"'nvmet-tcp'.* cannot be loaded; install the modules of kernel {os.uname().release}")


def test_modprobe_may_be_missing(modprobe: Modprobe) -> None:
    """All may be built in."""
    modprobe.returncode = 127
    os.makedirs(storagetm.CONFIGFS + "nvmet")
    storagetm.NvmeTcp(Named(), "nqn.test").prepare()


def test_configfs_is_mounted_or_why_not_is_said(modprobe: Modprobe, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(storagetm.CONFIGFS)

    def mount() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(storagetm, "mount_configfs", mount)
    why_not(r"Failed to mount configfs on .*: Operation not permitted; mount it, then start again")
    monkeypatch.setattr(storagetm, "mount_configfs", lambda: os.mkdir(storagetm.CONFIGFS + "nvmet"))
    storagetm.NvmeTcp(Named(), "nqn.test").prepare()
    assert "configfs" not in modprobe.asked


def test_missing_nvmet_is_named(modprobe: Modprobe, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(storagetm.CONFIGFS)
    monkeypatch.setattr(storagetm, "mount_configfs", lambda: None)
    why_not(r"has no NVMe target.*CONFIG_NVME_TARGET_TCP")
    assert modprobe.asked == ["nvmet-tcp"]


def test_nothing_is_loaded_where_all_is_there(modprobe: Modprobe) -> None:
    os.makedirs(storagetm.CONFIGFS + "nvmet")
    os.makedirs(storagetm.SYS + "module/nvmet_tcp")
    storagetm.NvmeTcp(Named(), "nqn.test").prepare()
    assert modprobe.asked == []


def test_each_access_asks_for_modules_of_the_list(
    modprobe: Modprobe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a kind of access needs is asked for, and is in the list of what an initrd gets."""
    monkeypatch.setattr(storagetm, "DEV", f"{storagetm.SYS}dev/")
    os.makedirs(storagetm.DEV + "mapper")
    monkeypatch.setattr(storagetm, "has_target", lambda _: False)
    disk = made_disk("/run/disk.img")
    disk.block = 512
    for _ in range(2):
        for access in storagetm.ACCESS:
            storagetm.lacking_modules(disk, access)
        open(storagetm.DEV + "mapper/control", "w").close()
    assert set(modprobe.asked) == {"dm-mod", "dm-flakey", "dm-snapshot", "loop"}


def test_unit_loads_what_the_program_needs() -> None:
    unit = (Path(storagetm.__file__).parent / "units/storagetm.service").read_text()
    named = {name.replace("_", "-") for name in re.findall(r"modprobe@(\w+)\.service", unit)}
    # The other one is for the network.
    assert named == {"nvmet-tcp", "thunderbolt-net"}
    assert named & set(storagetm.MODULES) == {"nvmet-tcp"}


def test_modules_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert storagetm.main(["--modules"]) == 0
    assert capfd.readouterr().out.split() == list(storagetm.MODULES)


def test_many_disks_may_open_many_files() -> None:
    """With many disks as many files may be open as the system allows at all."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (900, before[1]))
        storagetm.allow_files(400)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 900
        storagetm.allow_files(900)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
