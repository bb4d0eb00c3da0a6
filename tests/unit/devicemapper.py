# SPDX-License-Identifier: LGPL-2.1-or-later
"""What behaves like device-mapper and the driver of loop devices, for tests of what is done there.

All that this kernel knows is in files, so that it outlives a process that is killed. The program's own
ioctls arrive here, and it finds its devices in sysfs and below /dev as they are on a real machine.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import storagetm
from storagetm import dm_ioctl, dm_target_spec, loop_config, loop_info64
from tests.unit.configfs import Nvmet
from tests.unit.conftest import CapturedMachine

MAJOR = 252
LOOP_MAJOR = 7
FIRST_LOOP = 8  # those before are there at the boot, and a captured machine has them
INACTIVE_PRESENT_FLAG = 0x40
TARGETS = ("error", "flakey", "linear", "snapshot")
CONTROL, LOOP_CONTROL = "/dev/mapper/control", "/dev/loop-control"
CHANGES = {
    storagetm.DM_DEV_CREATE: "create",
    storagetm.DM_TABLE_LOAD: "load",
    storagetm.DM_DEV_SUSPEND: "resume",
    storagetm.DM_DEV_REMOVE: "remove",
}
MEMINFO = "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n"


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def captured_kernel(machine: CapturedMachine, monkeypatch: pytest.MonkeyPatch) -> Nvmet:
    """The kernel of a captured machine, which exports nothing yet."""
    made = Nvmet(machine.path("/sys/kernel/config"), monkeypatch)
    DeviceMapper(made, machine.root, monkeypatch)
    # Nobody looks into drives any more once a test has ended.
    monkeypatch.setattr(storagetm.MediumWatch, "run", lambda _: None)
    return made


class DeviceMapper:
    """Patches open(2), stat(2), ioctl(2) and write(2) for the devices that it has, beside those of `nvmet`.

    `base` has sysfs and proc below it. `nodes` are the block devices that there are besides, by path;
    MAJOR:MINOR in `claimed` are those that others have opened exclusively, names in `held` are devices of
    ours that others have open. Each call that would change something is in the list of nvmet's calls.
    """

    def __init__(self, nvmet: Nvmet, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nvmet = nvmet
        self.sys, self.state = base / "sys", base / "device-mapper"
        self.nodes: dict[str, int] = {}
        self.claimed: set[str] = set()
        self.held: set[str] = set()
        for name in ("devices", "loops"):
            (self.state / name).mkdir(parents=True)
        for name in ("control", "loop-control", "node"):
            (self.state / name).touch()
        for name in (
            "block",
            "class/block",
            "dev/block",
            "class/misc/device-mapper",
            "class/misc/loop-control",
        ):
            (self.sys / name).mkdir(parents=True, exist_ok=True)
        (base / "proc").mkdir(exist_ok=True)
        if not (base / "proc/meminfo").exists():
            (base / "proc/meminfo").write_text(MEMINFO)
        self.controls: dict[str, int] = {}
        monkeypatch.setattr(storagetm, "CONTROLS", self.controls)
        monkeypatch.setattr(storagetm, "SYS", f"{self.sys}/")
        monkeypatch.setattr(storagetm, "PROC", f"{base}/proc/")
        self._open, self._stat, self._ioctl, self._write = os.open, os.stat, fcntl.ioctl, os.write
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "stat", self.stat)
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)
        nvmet.mapper = self

    def close(self) -> None:
        """Ends what the program has opened and keeps."""
        while self.controls:
            os.close(self.controls.popitem()[1])

    # Nodes

    def _file(self, path: Any) -> Path | None:
        """The file that stands for a device's node; None if it is none of ours. Raises OSError."""
        if not isinstance(path, str) or not path.startswith("/dev/"):
            return None
        if path in (CONTROL, LOOP_CONTROL):
            return self.state / os.path.basename(path)
        if path in self.nodes:
            return self.state / "node"
        if (found := re.fullmatch(r"/dev/loop(\d+)", path)) and int(found[1]) >= FIRST_LOOP:
            file = self.state / "loops" / found[1]
        elif found := re.fullmatch(r"/dev/dm-(\d+)", path):
            file = self.state / "node" if self.name_of(path) else self.state / "nothing"
        else:
            return None
        if not file.exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return file

    def open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        with self.nvmet.lock:
            file = self._file(path)
            if file is None:
                return self._open(path, flags, mode, **options)
            fd = self._open(file, os.O_RDWR | os.O_CLOEXEC)
            # By this it is known that somebody has it open; it ends with a process that is killed.
            fcntl.flock(fd, fcntl.LOCK_SH)
            return fd

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        if self._file(path) is None:
            return self._stat(path, **options)
        kind = stat.S_IFCHR if path in (CONTROL, LOOP_CONTROL) else stat.S_IFBLK
        number = self.nodes.get(path, 0)
        if found := re.fullmatch(r"/dev/(loop|dm-)(\d+)", path):
            number = os.makedev(LOOP_MAJOR if found[1] == "loop" else MAJOR, int(found[2]))
        return os.stat_result((kind | 0o600, 0, 0, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": number})

    def write(self, fd: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")
        found = re.fullmatch(
            rf"{re.escape(str(self.sys))}/devices/virtual/block/(dm-\d+)/queue/write_cache", path
        )
        if not found:
            return self._write(fd, data)
        self.nvmet.called(f"cache dm/{self.name_of(f'/dev/{found[1]}')} {data.decode()}")
        with self.nvmet.lock:
            os.ftruncate(fd, 0)
            return self._write(fd, data)

    def ioctl(self, fd: int, request: int, argument: Any = 0, *mutate: bool) -> Any:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == self.state / "control":
            return self._mapper_call(request, argument)
        if path == self.state / "loop-control" and request == storagetm.LOOP_CTL_GET_FREE:
            return self._free_loop()
        if path.parent == self.state / "loops":
            return self._loop_call(path, request, argument)
        return self._ioctl(fd, request, argument, *mutate)

    # Device-mapper

    def _devices(self) -> dict[str, dict[str, Any]]:
        with self.nvmet.lock:
            return {p.name: json.loads(p.read_text()) for p in (self.state / "devices").iterdir()}

    def _save(self, name: str, device: dict[str, Any]) -> None:
        (self.state / "devices" / name).write_text(json.dumps(device))

    def _mapper_call(self, request: int, buffer: bytearray) -> int:
        head = dm_ioctl.from_buffer(buffer)
        name, call = head.name.decode() or self._name_by_uuid(head.uuid.decode()), CHANGES.get(request, "")
        if request == storagetm.DM_DEV_SUSPEND and head.flags & storagetm.DM_SUSPEND_FLAG:
            call = "suspend"
        if call:
            self.nvmet.called(f"{call} dm/{name}")
        with self.nvmet.lock:
            self._settle()
            if request == storagetm.DM_LIST_VERSIONS:
                self._tell(buffer, b"".join(bytes(24) + t.encode() + b"\0" for t in TARGETS))
            elif request == storagetm.DM_DEV_CREATE:
                self._create(name, head.uuid.decode())
            elif request != storagetm.DM_DEV_ARM_POLL:
                device = self._devices().get(name)
                if device is None:
                    raise failure(errno.ENXIO)
                if call == "load":
                    self._load(name, device, buffer)
                elif call == "resume":
                    self._resume(name, device)
                elif call == "suspend":
                    device["suspended"] = True
                    self._save(name, device)
                elif call == "remove":
                    self._remove(name, device, deferred=bool(head.flags & storagetm.DM_DEFERRED_REMOVE))
                elif request == storagetm.DM_TABLE_STATUS:
                    self._tell_table(buffer, device)
                else:
                    assert request == storagetm.DM_DEV_STATUS, request
            if device := self._devices().get(name):
                head.dev = os.makedev(MAJOR, device["minor"])
                head.uuid = device["uuid"].encode()
                head.open_count = self._opened(name, device)
                head.flags = (
                    (storagetm.DM_ACTIVE_PRESENT_FLAG if device["active"] else 0)
                    | (INACTIVE_PRESENT_FLAG if device["inactive"] else 0)
                    | (storagetm.DM_SUSPEND_FLAG if device["suspended"] else 0)
                    | (storagetm.DM_DEFERRED_REMOVE if device["deferred"] else 0)
                )
        return 0

    def _name_by_uuid(self, uuid: str) -> str:
        return next((name for name, d in self._devices().items() if uuid and d["uuid"] == uuid), uuid)

    @staticmethod
    def _tell(buffer: bytearray, data: bytes) -> None:
        start = dm_ioctl.from_buffer(buffer).data_start
        buffer[start : start + len(data)] = data

    def _tell_table(self, buffer: bytearray, device: dict[str, Any]) -> None:
        if not device["active"]:
            return
        start, sectors, target, parameters = device["active"].split(" ", 3)
        head = dm_ioctl.from_buffer(buffer)
        if not head.flags & storagetm.DM_STATUS_TABLE_FLAG:
            parameters = (
                device["trouble"] or self._filled(device, parameters) if target == "snapshot" else ""
            )
        text = parameters.encode() + b"\0"
        spec = dm_target_spec(int(start), int(sectors), 0, 0, target.encode())
        self._tell(buffer, bytes(spec) + text)
        head.target_count = 1

    def _filled(self, device: dict[str, Any], parameters: str) -> str:
        """How full a snapshot's store is."""
        size = storagetm.read_attribute(f"{self.sys}/dev/block/{parameters.split()[1]}/size")
        return f"{device['used']}/{size} 16"

    def _create(self, name: str, uuid: str) -> None:
        devices = self._devices()
        if name in devices or (uuid and any(d["uuid"] == uuid for d in devices.values())):
            raise failure(errno.EBUSY)
        minors = {d["minor"] for d in devices.values()}
        minor = next(n for n in range(len(devices) + 1) if n not in minors)
        device = {"uuid": uuid, "minor": minor, "active": "", "inactive": "", "trouble": "", "used": 0}
        self._save(name, device | {"suspended": False, "deferred": False})
        place = self._publish(f"dm-{minor}", MAJOR, minor)
        (place / "dm").mkdir()
        (place / "dm/name").write_text(f"{name}\n")
        (place / "dm/uuid").write_text(f"{uuid}\n")
        (place / "queue").mkdir()
        (place / "queue/write_cache").write_text("write back\n")

    def _load(self, name: str, device: dict[str, Any], buffer: bytearray) -> None:
        head = dm_ioctl.from_buffer(buffer)
        assert head.target_count == 1
        spec = dm_target_spec.from_buffer_copy(buffer, head.data_start)
        start = head.data_start + ctypes.sizeof(dm_target_spec)
        parameters = bytes(buffer[start:]).split(b"\0")[0].decode()
        target = spec.target_type.decode()
        if target not in TARGETS or not spec.length:
            raise failure(errno.EINVAL)
        for number in self._lower(f"- - - {parameters}"):
            if not os.path.lexists(self.sys / "dev/block" / number) and (
                number not in map(storagetm.device_numbers, self.nodes.values())
            ):
                raise failure(errno.ENODEV)
            if number in self.claimed:
                raise failure(errno.EBUSY)
        if target == "snapshot":
            store = self.state / "loops" / parameters.split()[1].partition(":")[2]
            header = store.read_bytes()[:8]
            if header[:4] != b"SnAp":
                store.write_bytes(b"SnAp\1\0\0\0".ljust(4096, b"\0"))
            device["trouble"] = storagetm.INVALID if header == b"SnAp\0\0\0\0" else ""
        device["inactive"] = f"{spec.sector_start} {spec.length} {target} {parameters}"
        self._save(name, device)

    def _resume(self, name: str, device: dict[str, Any]) -> None:
        if not device["inactive"] and not device["active"]:
            raise failure(errno.EINVAL)
        place = self.sys / f"devices/virtual/block/dm-{device['minor']}"
        if device["inactive"]:
            self._hold(place.name, device["active"], held=False)
            device["active"], device["inactive"] = device["inactive"], ""
            self._hold(place.name, device["active"], held=True)
            (place / "size").write_text(device["active"].split()[1] + "\n")
            # It is what the device below has.
            (place / "queue/write_cache").write_text("write back\n")
        device["suspended"] = False
        self._save(name, device)

    def _remove(self, name: str, device: dict[str, Any], *, deferred: bool) -> None:
        if not self._opened(name, device):
            self._drop(name, device)
        elif not deferred:
            raise failure(errno.EBUSY)
        else:
            self._save(name, device | {"deferred": True})

    def _drop(self, name: str, device: dict[str, Any]) -> None:
        self._hold(f"dm-{device['minor']}", device["active"], held=False)
        (self.state / "devices" / name).unlink()
        self._unpublish(f"dm-{device['minor']}", MAJOR, device["minor"])
        self._settle()

    def _opened(self, name: str, device: dict[str, Any]) -> int:
        """How often a device is open: by namespaces, by other programs, and by what is made of it."""
        number = f"{MAJOR}:{device['minor']}"
        above = [
            d for d in self._devices().values() if number in self._lower(d["active"] + " " + d["inactive"])
        ]
        return self.nvmet.exports(f"/dev/dm-{device['minor']}") + (name in self.held) + len(above)

    def _settle(self) -> None:
        """Lets go what nobody has open any longer and what was to go then."""
        devices = self._devices()
        for name, device in devices.items():
            if device["deferred"] and name in self._devices() and not self._opened(name, device):
                self._drop(name, device)
        used = {n for d in devices.values() for n in self._lower(d["active"] + " " + d["inactive"])}
        for file in (self.state / "loops").iterdir():
            loop = self._loop(file)
            if not loop or not loop["autoclear"] or f"{LOOP_MAJOR}:{file.name}" in used:
                continue
            fd = self._open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            finally:
                os.close(fd)
            file.unlink()
            self._unpublish(f"loop{file.name}", LOOP_MAJOR, int(file.name))
            self._note(file).unlink()

    @staticmethod
    def _lower(table: str) -> Sequence[str]:
        """The devices, MAJOR:MINOR, that a table is made of."""
        return re.findall(r"(?<= )\d+:\d+(?= |$)", table)

    # Loop devices

    def _note(self, file: Path) -> Path:
        """Where it is kept what is known of a loop device, whose content is in `file`."""
        return self.state / f"loop{file.name}"

    def _loop(self, file: Path) -> dict[str, Any]:
        """What is known of a loop device; nothing as long as it is none of anything."""
        note = self._note(file)
        found: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
        return found

    def _free_loop(self) -> int:
        with self.nvmet.lock:
            self._settle()
            number = next(n for n in range(FIRST_LOOP, 10000) if not (self.state / f"loop{n}").exists())
            (self.state / "loops" / str(number)).touch()
            return number

    def _loop_call(self, file: Path, request: int, argument: Any) -> int:
        number = file.name
        if request == storagetm.LOOP_GET_STATUS64:
            info, loop = loop_info64.from_buffer(argument), self._loop(file)
            info.lo_number, info.lo_sizelimit = int(number), loop["limit"]
            info.lo_flags = storagetm.LO_FLAGS_AUTOCLEAR if loop["autoclear"] else 0
            info.lo_flags |= storagetm.LO_FLAGS_READ_ONLY if loop["read only"] else 0
            return 0
        source = ""
        if request == storagetm.LOOP_CONFIGURE:
            config = loop_config.from_buffer_copy(argument)
            info, source = config.info, os.readlink(f"/proc/self/fd/{config.fd}")
            if source == str(self.state / "node"):
                source = "/dev/?"
            self.nvmet.called(f"bind loop/{number} {source}")
        else:
            assert request == storagetm.LOOP_SET_STATUS64, request
            info = loop_info64.from_buffer_copy(argument)
            self.nvmet.called(f"set loop/{number}")
        with self.nvmet.lock:
            loop = self._loop(file)
            if source and loop:
                raise failure(errno.EBUSY)
            loop = {
                "source": source or loop["source"],
                "limit": info.lo_sizelimit,
                "autoclear": bool(info.lo_flags & storagetm.LO_FLAGS_AUTOCLEAR),
                "read only": bool(info.lo_flags & storagetm.LO_FLAGS_READ_ONLY),
            }
            self._note(file).write_text(json.dumps(loop))
            if source:
                place = self._publish(f"loop{number}", LOOP_MAJOR, int(number))
                (place / "loop").mkdir()
                (place / "loop/backing_file").write_text(f"{source}\n")
            size = self.sys / f"devices/virtual/block/loop{number}/size"
            size.write_text(f"{(info.lo_sizelimit or 1 << 62) // 512}\n")
        return 0

    # sysfs

    def _publish(self, name: str, major: int, minor: int) -> Path:
        place = self.sys / "devices/virtual/block" / name
        for directory in ("slaves", "holders"):
            (place / directory).mkdir(parents=True)
        number = f"{major}:{minor}"
        for attribute, text in (
            ("dev", number),
            ("inflight", "0 0"),
            ("size", "0"),
            ("uevent", f"MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\nDEVTYPE=disk"),
        ):
            (place / attribute).write_text(text + "\n")
        for link in (f"class/block/{name}", f"dev/block/{number}"):
            (self.sys / link).symlink_to(f"../../devices/virtual/block/{name}")
        (self.sys / "block" / name).symlink_to(f"../devices/virtual/block/{name}")
        return place

    def _unpublish(self, name: str, major: int, minor: int) -> None:
        for link in (f"class/block/{name}", f"dev/block/{major}:{minor}", f"block/{name}"):
            (self.sys / link).unlink()
        shutil.rmtree(self.sys / "devices/virtual/block" / name)

    def _hold(self, name: str, table: str, *, held: bool) -> None:
        """Notes, or no longer, with the devices below that one is made of them."""
        for number in self._lower(table):
            place = Path(os.path.realpath(self.sys / "dev/block" / number))
            above = place / "holders" / name
            below = self.sys / "devices/virtual/block" / name / "slaves" / place.name
            if held and above.parent.is_dir():
                above.symlink_to(self.sys / "devices/virtual/block" / name)
                below.symlink_to(place)
            elif not held:
                above.unlink(missing_ok=True)
                below.unlink(missing_ok=True)

    # What nvmet and tests do with it

    def name_of(self, node: str) -> str:
        """The name of the device with a node; empty if there is none."""
        devices = self._devices().items()
        return next((name for name, device in devices if node == f"/dev/dm-{device['minor']}"), "")

    def check_open(self, node: str) -> None:
        """Raises OSError for a device of ours that is not there, or not to be used yet."""
        if not node.startswith("/dev/dm-"):
            return
        device = self._devices().get(self.name_of(node))
        if device is None:
            raise failure(errno.ENOENT)
        if not device["active"] or device["suspended"]:
            raise failure(errno.ENXIO)

    def _shown(self, table: str) -> str:
        """A table with what is the same each time in place of the devices' numbers."""

        def text(match: re.Match[str]) -> str:
            number = match[0]
            if number.startswith(f"{LOOP_MAJOR}:"):
                source = str(self._loop(Path(number.partition(":")[2])).get("source", number))
                return "MEMORY" if source.startswith("/memfd:") else f"loop:{source}"
            numbers = {storagetm.device_numbers(device): node for node, device in self.nodes.items()}
            return numbers.get(number, number)

        return re.sub(r"(?<= )\d+:\d+(?= |$)", text, table)

    def contents(self) -> dict[str, str]:
        """All devices by "dm/NAME", with what they are, and loop devices that no device is made of."""
        found = {}
        with self.nvmet.lock:
            self._settle()
            devices = self._devices()
            for name, device in devices.items():
                state = [word for word in ("inactive", "suspended", "deferred", "trouble") if device[word]]
                cache = self.sys / f"devices/virtual/block/dm-{device['minor']}/queue/write_cache"
                found[f"dm/{name}"] = ", ".join([self._shown(device["active"]), *state])
                found[f"dm/{name}/uuid"] = device["uuid"]
                if cache.exists():
                    found[f"dm/{name}/write_cache"] = cache.read_text().strip()
            used = {n for d in devices.values() for n in self._lower(d["active"] + " " + d["inactive"])}
            for file in (self.state / "loops").iterdir():
                if (loop := self._loop(file)) and f"{LOOP_MAJOR}:{file.name}" not in used:
                    found[f"loop/{file.name}"] = loop["source"]
        return found

    def make(self, name: str, uuid: str = "") -> Callable[[], bool]:
        """Makes a device as another program would; returns what tells whether it is as it was."""
        with self.nvmet.lock:
            self._create(name, uuid)
            device = self._devices()[name] | {"active": "0 8 error "}
            self._save(name, device)
        return lambda: self._devices().get(name) == device

    def fill(self, name: str, trouble: str = "", used: int = 0) -> None:
        """Has a snapshot's store filled, or marked as what device-mapper says of its `trouble`."""
        device = self._devices()[name] | {"trouble": trouble, "used": used}
        self._save(name, device)
        if trouble == storagetm.INVALID:
            store = self.state / "loops" / device["active"].split()[4].partition(":")[2]
            store.write_bytes(b"SnAp\0\0\0\0".ljust(4096, b"\0"))

    @property
    def shell(self) -> str:
        """What makes and removes devices when a shell runs the commands of a dry run."""
        devices = self.state / "devices"
        return rf"""
dmsetup() {{
    file="{devices}/$2" minor=0
    case "$1 $3 $5" in
        "create --uuid --table") test ! -e "$file" || exit ;;
        "reload --table ") sed -i 's|"inactive": ""|"inactive": "'"$4"'"|' "$file"; return ;;
        "resume  ")
            sed -i 's|"active": "[^"]*"\(.*\)"inactive": "\([^"]*\)"|"active": "\2"\1"inactive": ""|' "$file"
            return ;;
        "remove  ") command rm "$file"; return ;;
        *) exit 1 ;;
    esac
    while cat "{devices}"/* 2>/dev/null | grep -q '"minor": '"$minor,"; do minor=$((minor + 1)); done
    printf '{{"uuid": "%s", "active": "%s", "minor": %d, "inactive": "", "trouble": "", "used": 0, ' \
        "$4" "$6" $minor >"$file"
    printf '"suspended": false, "deferred": false}}' >>"$file"
}}
"""
