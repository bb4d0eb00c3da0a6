# SPDX-License-Identifier: LGPL-2.1-or-later
"""A part of configfs that behaves like that of LIO, the kernel's SCSI target, with iSCSI as its fabric.

These are drivers/target/target_core_configfs.c, target_core_fabric_configfs.c, target_core_iblock.c and
iscsi/iscsi_target_configfs.c.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import ClassVar

import pytest

import storagetm
from tests.unit.configfs import Nvmet, failure

UNIT_SERIAL = "T10 VPD Unit Serial Number: "
# Attributes of objects, with what they are at first, and the groups that come with them.
BACKSTORE = {"control": "", "enable": "0", "info": ""}
DEVICE_ATTRIBUTES = {"emulate_3pc": "1", "emulate_pr": "1", "emulate_tpu": "0", "emulate_write_cache": "0"}
WWN = {"product_id": "IBLOCK", "revision": "4.0", "vendor_id": "LIO-ORG", "vpd_unit_serial": UNIT_SERIAL}
LIMITS = {"product_id": 16, "revision": 4, "vendor_id": 8, "vpd_unit_serial": 253}
PORTAL_GROUP = {"dynamic_sessions": "", "enable": "0"}
GROUP_ATTRIBUTES = {
    "authentication": "1",
    "cache_dynamic_acls": "0",
    "demo_mode_discovery": "1",
    "demo_mode_write_protect": "1",
    "generate_node_acls": "0",
    "prod_mode_write_protect": "0",
}
AUTH = {"authenticate_target": "0", "password": "", "password_mutual": "", "userid": "", "userid_mutual": ""}
Layout = tuple[dict[str, str], tuple[str, ...]]
OBJECTS: dict[str, Layout] = {  # by what a path matches below "target"
    r"core/iblock_\d+": ({"hba_info": "HBA Index: 0 plugin: iblock version: v4.1.0", "hba_mode": "0"}, ()),
    r"core/iblock_\d+/[^/]+": (BACKSTORE, ("alua", "attrib", "pr", "statistics", "wwn")),
    r"iscsi/[^/]+": ({}, ("fabric_statistics",)),
    r"iscsi/[^/]+/tpgt_[^/]+": (PORTAL_GROUP, ("acls", "attrib", "auth", "lun", "np", "param")),
    r"iscsi/[^/]+/tpgt_\d+/lun/lun_[^/]+": ({"alua_tg_pt_offline": "0"}, ("statistics",)),
    r"iscsi/[^/]+/tpgt_\d+/np/[^/]+": ({"cxgbit": "0", "iser": "0"}, ()),
}
GROUPS: dict[str, dict[str, str]] = {  # what is in groups that come with others
    r"core/[^/]+/[^/]+/attrib": DEVICE_ATTRIBUTES,
    r"core/[^/]+/[^/]+/wwn": WWN,
    r"iscsi/[^/]+/[^/]+/attrib": GROUP_ATTRIBUTES,
    r"iscsi/[^/]+/[^/]+/auth": AUTH,
}
NEWER = ("emulate_pr", "product_id", "revision", "vendor_id")


def matching(patterns: dict[str, Layout], below: str) -> Layout | None:
    return next((made for pattern, made in patterns.items() if re.fullmatch(pattern, below)), None)


def parsed(portal: str) -> tuple[str, int]:
    """Address and port of a portal's name. Raises OSError for what is none."""
    address, _, port = portal.rpartition(":")
    address = address.strip("[]")
    if not port.isdecimal() or not storagetm.parse_listen(address):
        raise failure(errno.EINVAL)
    return address, int(port)


class Lio:
    """The part of `nvmet` that is below "target", all of it in files, to outlive a process that is killed.

    `taken` are portals at which other programs listen. `claims` are nodes that this process has claimed, by
    what for; they end with it. An `old` kernel (before Linux 5.1) lacks some attributes, and (before 5.16) a
    portal group can only be enabled if it is not.
    """

    claims: ClassVar[dict[str, str]] = {}

    def __init__(self, nvmet: Nvmet, sys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nvmet = nvmet
        self.sys = sys
        self.old = False
        self.taken: set[str] = set()
        self.ipv6_only = False  # whether what is at [::] has no IPv4 (net.ipv6.bindv6only)
        self.absent: set[str] = set()  # addresses that this machine has not, or whose family it lacks
        self.claims.clear()
        for path in ("target", "target/core", "target/iscsi", "target/iscsi/discovery_auth"):
            nvmet._mkdir(nvmet.root / path)
        nvmet.lio = self
        monkeypatch.setattr(storagetm, "claim", self.claim)
        monkeypatch.setattr(storagetm, "release", lambda what: self.claims.pop(what, None))
        monkeypatch.setattr(storagetm, "why_no_listener", self.why_no_listener)

    def path(self, relative: str) -> Path:
        return self.nvmet.root / relative

    def read(self, relative: str) -> str:
        return self.path(relative).read_text().strip()

    @staticmethod
    def layout(relative: str) -> Layout | None:
        """Attributes and groups of an object; None if it is none."""
        return matching(OBJECTS, relative.partition("/")[2])

    # Devices

    def claim(self, what: str, node: str) -> int:
        """In place of storagetm.claim()."""
        if self.claimant(node):
            return errno.EBUSY
        self.claims[what] = node
        return 0

    def backstores(self) -> list[str]:
        found = self.nvmet.root.glob("target/core/iblock_*/*/enable")
        return [str(p.parent.relative_to(self.nvmet.root)) for p in found if p.read_text() == "1\n"]

    def node(self, backstore: str) -> str:
        found = re.search(r"UDEV PATH: (\S+)", self.read(f"{backstore}/info"))
        return found[1] if found else ""

    def opened(self, node: str) -> int:
        """How many backstores have a device open."""
        return sum(self.node(backstore) == node for backstore in self.backstores())

    def claimant(self, node: str) -> bool:
        """Whether something has claimed a device."""
        claimed = self.nvmet.mapper.claimed if self.nvmet.mapper else ()
        return node in self.claims.values() or self.opened(node) > 0 or self.numbers(node) in claimed

    @staticmethod
    def numbers(node: str) -> str:
        return storagetm.device_numbers(os.stat(node).st_rdev)

    def links(self, backstore: str) -> list[Path]:
        """Links in LUNs to a backstore."""
        found = [p for p in self.nvmet.root.glob("target/iscsi/*/*/lun/*/*") if p.is_symlink()]
        return [p for p in found if os.path.realpath(p) == os.path.realpath(self.path(backstore))]

    # What is made and removed

    def mkdir(self, relative: str) -> None:
        self.nvmet.called(f"mkdir {relative}")
        with self.nvmet.lock:
            path, name = self.path(relative), relative.rpartition("/")[2]
            if not path.parent.is_dir():
                raise failure(errno.ENOENT)
            if path.exists():
                raise failure(errno.EEXIST)
            if relative == "target/iscsi":
                self.nvmet._mkdir(path)  # the module that this has the kernel load
                return
            if not self.layout(relative):
                raise failure(errno.EPERM)
            self.check_name(relative, name)
            self.make(relative)
            self.nvmet.inspect()

    def check_name(self, relative: str, name: str) -> None:
        kind = relative.rpartition("/")[0].rpartition("/")[2]
        number = name.partition("_")[2]
        if kind == "iscsi" and (len(name) > 223 or not name.startswith(("iqn.", "eui.", "naa."))):
            raise failure(errno.EINVAL)
        if name.startswith("tpgt_") and (not number.isdecimal() or int(number) > 65535):
            raise failure(errno.EINVAL)
        if kind == "lun" and (not number.isdecimal() or int(number) >= 1 << 32):
            raise failure(errno.EINVAL)
        if kind == "np":
            address, port = parsed(name)
            if self.why_no_listener(address, port):
                raise failure(errno.EINVAL)  # whatever it was (target_fabric_make_np())

    def why_no_listener(self, address: str, port: int) -> int:
        """The error that a socket gets there; 0 for none. Targets share what is the same."""
        if address in self.absent:
            return errno.EADDRNOTAVAIL
        others = {p.name for p in self.nvmet.root.glob("target/iscsi/*/*/np/*")}
        listening = [parsed(name) for name in self.taken]
        listening += [found for name in others if (found := parsed(name)) != (address, port)]
        return errno.EADDRINUSE if any(p == port and self.collide(a, address) for a, p in listening) else 0

    def collide(self, one: str, other: str) -> bool:
        """Whether no two sockets can listen at these addresses, at one port."""
        four = ":" not in one, ":" not in other
        if four[0] != four[1] and (self.ipv6_only or "::" not in (one, other)):
            return False
        return one == other or not {one, other}.isdisjoint(("::", "0.0.0.0"))

    def make(self, relative: str) -> None:
        below = relative.partition("/")[2]
        attributes, groups = self.layout(relative) or ({}, ())
        attributes = attributes or next((a for p, a in GROUPS.items() if re.fullmatch(p, below)), {})
        self.nvmet._mkdir(self.path(relative))
        for name, value in attributes.items():
            if not (self.old and name in NEWER):
                self.path(f"{relative}/{name}").write_text(f"{value}\n" if name != "control" else "")
                self.path(f"{relative}/{name}").chmod(0o644)
        for name in groups:
            self.make(f"{relative}/{name}")

    def rmdir(self, relative: str) -> None:
        path = self.path(relative)
        if not path.is_dir():
            raise failure(errno.ENOENT)
        if not self.layout(relative):
            raise failure(errno.EPERM)
        # In this order (configfs_detach_prep()).
        if self.links(relative):
            raise failure(errno.EBUSY)
        self.check_empty(relative)
        self.remove(path)

    def check_empty(self, relative: str) -> None:
        groups = (self.layout(relative) or ({}, ()))[1]
        for child in self.path(relative).iterdir():
            if child.name in groups:
                self.check_empty(f"{relative}/{child.name}")
            elif child.is_dir() or child.is_symlink():
                raise failure(errno.ENOTEMPTY)

    def remove(self, path: Path) -> None:
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                self.remove(child)
            else:
                self.nvmet._unlink(child)
        self.nvmet._rmdir(path)

    def check_link(self, target: str, relative: str) -> None:
        """As target_fabric_port_link() does."""
        if not re.fullmatch(r"target/core/[^/]+/[^/]+", target):
            raise failure(errno.EFAULT)
        if not re.search(r"/lun/lun_\d+/[^/]+$", relative):
            raise failure(errno.EPERM)
        if any(p.is_symlink() for p in self.path(relative).parent.iterdir()):
            raise failure(errno.EEXIST)
        if self.read(f"{target}/enable") != "1":
            raise failure(errno.ENODEV)

    # What is written

    def write(self, relative: str, text: str) -> None:
        parent, _, name = relative.rpartition("/")
        kind, value = parent.rpartition("/")[2], text.removesuffix("\n")
        if kind == "wwn":
            self.identify(relative, name, value)
        elif kind == "auth":
            self.path(relative).write_text(f"{text}\n")  # a line feed is a part of it
        elif name == "control":
            self.control(parent, text)
        elif name == "enable" and parent.startswith("target/core/"):
            self.configure(parent, value)
        else:
            if value not in ("0", "1"):
                raise failure(errno.EINVAL)
            if name == "enable" and self.old and self.read(relative) == value:
                raise failure(errno.EINVAL)
            if name == "emulate_tpu" and value == "1" and not self.discards(parent.rpartition("/")[0]):
                raise failure(errno.ENOSYS)
            if name == "emulate_write_cache":
                raise failure(errno.EINVAL)
            self.path(relative).write_text(f"{value}\n")
        self.nvmet.inspect()

    def identify(self, relative: str, name: str, value: str) -> None:
        if len(value) > LIMITS[name]:
            raise failure(errno.EOVERFLOW)
        if self.links(relative.rpartition("/wwn/")[0]) or not (value.isascii() and value.isprintable()):
            raise failure(errno.EINVAL)
        prose = UNIT_SERIAL if name == "vpd_unit_serial" else ""
        self.path(relative).write_text(f"{prose}{value.strip()}\n")

    def control(self, backstore: str, text: str) -> None:
        if self.read(f"{backstore}/enable") == "1":
            raise failure(errno.EEXIST)
        words = dict(word.split("=", 1) for word in text.rstrip("\n").split(","))
        if not words.keys() <= {"udev_path", "readonly"} or words.get("readonly", "0") not in ("0", "1"):
            raise failure(errno.EINVAL)
        self.path(f"{backstore}/control").write_text(text + "\n")  # which cannot be read
        shown = "Status: DEACTIVATED  Max Queue Depth: 0  SectorSize: 0  HwMaxSectors: 0\n"
        shown += f"          UDEV PATH: {words['udev_path']}  readonly: {words.get('readonly', '0')}\n"
        self.path(f"{backstore}/info").write_text(shown + "        Major: 0 Minor: 0\n")

    def configure(self, backstore: str, value: str) -> None:
        """As target_configure_device() and iblock_configure_device() do."""
        if value != "1":
            raise failure(errno.EINVAL)
        if self.read(f"{backstore}/enable") == "1":
            raise failure(errno.EEXIST)
        found = re.search(r"UDEV PATH: (\S+)  readonly: (\d)", self.read(f"{backstore}/info"))
        if not found:
            raise failure(errno.EINVAL)
        node = found[1]
        if self.nvmet.mapper:
            self.nvmet.mapper.check_open(node)
        major, _, minor = self.numbers(node).partition(":")
        if self.claimant(node):
            raise failure(errno.EBUSY)
        shown = "Status: ACTIVATED  Max Queue Depth: 0  SectorSize: 512  HwMaxSectors: 65528\n"
        shown += (
            f"        iBlock device: {os.path.basename(node)}  UDEV PATH: {node}  readonly: {found[2]}\n"
        )
        shown += f"        Major: {major} Minor: {minor}  CLAIMED: IBLOCK\n"
        self.path(f"{backstore}/info").write_text(shown)
        self.path(f"{backstore}/enable").write_text("1\n")

    def discards(self, backstore: str) -> bool:
        numbers = self.numbers(self.node(backstore))
        return storagetm.read_attribute(f"{self.sys}/dev/block/{numbers}/queue/discard_max_bytes") not in (
            "",
            "0",
        )

    # What tests do with it

    def shown(self, relative: str, text: str) -> str:
        """What an attribute says, with the name of a device of ours in place of its number."""
        name = relative.rpartition("/")[2]
        if (
            not relative.startswith("target/core/")
            or name not in ("control", "info")
            or not self.nvmet.mapper
        ):
            return text
        device = self.nvmet.mapper.name_of(node[0]) if (node := re.search(r"/dev/dm-\d+", text)) else ""
        if not device:
            return text
        text = re.sub(r"Minor: \d+", f"Minor: {device}", text)
        return re.sub(r"dm-\d+", f"mapper/{device}", text)

    def foreign(self, iqn: str = "", adapter: str = "", portal: str = "") -> None:
        """Makes a target as another program would, at this portal, or an adapter."""
        if adapter:
            self.make(adapter)
        if iqn:
            group = f"target/iscsi/{iqn}/tpgt_1"
            self.make(f"target/iscsi/{iqn}")
            self.make(group)
            if portal:
                self.make(f"{group}/np/{portal}")


def lio_shell() -> str:
    """What makes objects in a plain directory when a shell runs the commands of a dry run."""
    patterns: dict[str, dict[str, str]] = {
        "*/core/*/*/attrib": DEVICE_ATTRIBUTES,
        "*/core/*/*/wwn": WWN,
        "*/core/*/*/alua | */core/*/*/pr | */statistics | */fabric_statistics": {},
        "*/tpgt_*/attrib": GROUP_ATTRIBUTES,
        "*/tpgt_*/auth": AUTH,
        "*/tpgt_*/acls | */tpgt_*/lun | */tpgt_*/np | */tpgt_*/param": {},
        "*/tpgt_*/np/*": OBJECTS[r"iscsi/[^/]+/tpgt_\d+/np/[^/]+"][0],
        "*/lun/lun_*": OBJECTS[r"iscsi/[^/]+/tpgt_\d+/lun/lun_[^/]+"][0],
        "*/tpgt_*": PORTAL_GROUP,
        "*/core/iblock_*/*": BACKSTORE,
        "*/core/iblock_*": OBJECTS[r"core/iblock_\d+"][0],
        "*": {},
    }
    groups = {
        "*/lun/lun_*": ("statistics",),
        "*/tpgt_*": ("acls", "attrib", "auth", "lun", "np", "param"),
        "*/core/iblock_*/*": ("alua", "attrib", "pr", "statistics", "wwn"),
        "*": ("fabric_statistics",),
    }
    lines = ["make() {", 'command mkdir "$1" || exit', "case $1 in"]
    for pattern, attributes in patterns.items():
        lines.append(f"{pattern})")
        lines += [
            f'echo "{value}" >"$1/{name}"' if name != "control" else f': >"$1/{name}"'
            for name, value in attributes.items()
        ]
        lines += [f'make "$1/{name}"' for name in groups.get(pattern, ())]
        lines.append(";;")
    return "\n".join([*lines, "esac", "}", 'mkdir() { make "$1"; }', "set -e", ""])
