# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a machine and prints as JSON what the program would read there about disks and addresses.

    python3 -I capture.py [DISK] >machine.json

`files`, `links` and `directories` are of sysfs, procfs, /run/udev and /etc, bytes as Latin-1. What cannot be
unpacked elsewhere without root is written down as the kernel's answers: `status` has mode, device, inode and
device number of every path that leads to a block device or is one's backing file; `answers` has, by
MAJOR:MINOR, the errno names of opening it ("" for none), exclusively and not, and the CD drive's status.
`netlink` has, in hexadecimal digits, dumps of interfaces and addresses, and the uevents of kernel and udev
after a "change" of DISK.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import stat
import struct
import sys
import time
from typing import Any

ATTRIBUTES = (
    "dev",
    "dm/name",
    "dm/uuid",
    "hidden",
    "loop/backing_file",
    "md/level",
    "model",
    "name",
    "nsid",
    "partition",
    "removable",
    "ro",
    "serial",
    "size",
    "transport",
    "type",
    "uevent",
    "vendor",
    "vpd_pg80",
    "wwid",
)
PLAIN_FILES = (
    "/etc/machine-id",
    "/etc/os-release",
    "/proc/net/if_inet6",
    "/proc/self/mountinfo",
    "/proc/swaps",
    "/sys/class/dmi/id/product_name",
    "/sys/class/dmi/id/product_uuid",
)
CDROM_DRIVE_STATUS = 0x5326


class Capture:
    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.directories: set[str] = set()
        self.status: dict[str, tuple[int, int, int, int]] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.netlink: dict[str, str] = {}

    def file(self, path: str) -> None:
        try:
            with open(path, "rb") as f:
                self.files[path] = f.read().decode("latin-1")
        except OSError:
            pass

    def link(self, path: str) -> None:
        if os.path.islink(path):
            self.links[path] = os.readlink(path)

    def attributes(self, directory: str) -> None:
        for name in ATTRIBUTES:
            if os.path.isfile(f"{directory}/{name}"):
                self.file(f"{directory}/{name}")

    def block_device(self, name: str) -> None:
        self.link(f"/sys/block/{name}")
        self.link(f"/sys/class/block/{name}")
        path = os.path.realpath(f"/sys/class/block/{name}")
        self.attributes(path)
        number = self.files[path + "/dev"].strip() if path + "/dev" in self.files else ""
        self.link(f"/sys/dev/block/{number}")
        self.file(f"/run/udev/data/b{number}")
        for kind in ("holders", "slaves"):
            if os.path.isdir(f"{path}/{kind}"):
                self.directories.add(f"{path}/{kind}")
                for other in os.listdir(f"{path}/{kind}"):
                    self.link(f"{path}/{kind}/{other}")
        for other in ("bdi", "device"):
            self.link(f"{path}/{other}")
        if os.path.exists(path + "/device"):
            self.attributes(os.path.realpath(path + "/device"))
        # An NVMe disk's controllers: above it or, with multipath, beside it.
        parent = os.path.dirname(path)
        if name.startswith("nvme"):
            self.attributes(parent)
            for other in os.listdir(parent):
                if other.startswith("nvme") and os.path.isdir(f"{parent}/{other}"):
                    self.link(f"{parent}/{other}")
                    self.attributes(os.path.realpath(f"{parent}/{other}"))
        if path + "/loop/backing_file" in self.files:
            self.path(self.files[path + "/loop/backing_file"].strip())

    def path(self, path: str) -> None:
        try:
            st = os.stat(path)
        except OSError:
            return
        self.status[path] = (st.st_mode, st.st_dev, st.st_ino, st.st_rdev)

    def node(self, path: str) -> None:
        self.path(path)
        st = self.status.get(path)
        if st is None or not stat.S_ISBLK(st[0]):
            self.status.pop(path, None)
            return
        number = f"{os.major(st[3])}:{os.minor(st[3])}"
        if number in self.answers:
            return
        answers: dict[str, Any] = {}
        for what, flags in (
            ("plain", os.O_RDONLY),
            ("nonblock", os.O_RDONLY | os.O_NONBLOCK),
            ("exclusive", os.O_RDONLY | os.O_NONBLOCK | os.O_EXCL),
        ):
            try:
                fd = os.open(path, flags)
            except OSError as e:
                answers[what] = errno.errorcode[e.errno or 0]
                continue
            answers[what] = ""
            if what == "nonblock":
                try:
                    answers["drive"] = fcntl.ioctl(fd, CDROM_DRIVE_STATUS, 0)
                except OSError:
                    pass
            os.close(fd)
        self.answers[number] = answers

    def dump(self, kind: int, body: int) -> str:
        """The answer to a dump request of rtnetlink, whose body is so many zero bytes long."""
        received = b""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
            s.send(struct.pack("=IHHII", 16 + body, kind, 0x301, 1, 0) + bytes(body))
            while True:
                part = s.recv(1 << 20)
                received += part
                if struct.unpack_from("=H", part, 4)[0] == 3:  # NLMSG_DONE
                    return received.hex()

    def uevents(self, disk: str) -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as s:
            s.bind((0, 3))
            with open(f"/sys/class/block/{disk}/uevent", "w") as f:
                f.write("change")
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not {"kernel", "udev"} <= self.netlink.keys():
                if select.select([s], [], [], 1)[0]:
                    data = s.recv(1 << 16)
                    if b"DEVNAME=/dev/" + disk.encode() in data or b"DEVNAME=" + disk.encode() in data:
                        self.netlink["udev" if data.startswith(b"libudev\0") else "kernel"] = data.hex()

    def all(self) -> None:
        for path in PLAIN_FILES:
            self.file(path)
        for path in ("/sys/module/nvmet_tcp", "/sys/kernel/config/nvmet", "/sys/block"):
            if os.path.isdir(path):
                self.directories.add(path)
        if os.path.exists("/run/udev/control"):
            self.files["/run/udev/control"] = ""
        for name in os.listdir("/sys/class/block"):
            self.block_device(name)
        if os.path.isdir("/sys/fs/btrfs"):
            for fs in os.listdir("/sys/fs/btrfs"):
                devices = f"/sys/fs/btrfs/{fs}/devices"
                if os.path.isdir(devices):
                    self.directories.add(devices)
                    for name in os.listdir(devices):
                        self.link(f"{devices}/{name}")
        for directory, _, names in os.walk("/dev"):
            for name in names:
                self.node(f"{directory}/{name}")
        for line in self.files["/proc/swaps"].split("\n")[1:]:
            if line:
                self.path(line.split()[0])
        self.netlink["links"] = self.dump(18, 16)
        self.netlink["addresses"] = self.dump(22, 8)


def main() -> None:
    capture = Capture()
    capture.all()
    if len(sys.argv) > 1:
        capture.uevents(sys.argv[1])
    value = {**vars(capture), "directories": sorted(capture.directories)}
    json.dump(value, sys.stdout, indent=0, sort_keys=True)


if __name__ == "__main__":
    main()
