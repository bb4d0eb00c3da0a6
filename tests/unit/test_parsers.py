# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reads the kernel's and udev's formats: exactly right for real data, no crash for any other."""

from __future__ import annotations

import ctypes
import json
import re
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import storagetm

CAPTURE: Any = json.loads((Path(__file__).parent / "captures" / "trixie-fresh.json").read_text())


@pytest.fixture
def capture() -> Any:
    """A machine with the addresses 192.0.2.1 and 2001:db8::1, and 2001:db8::2, which is deprecated."""
    return CAPTURE


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body + bytes(-len(body) % 4)


# Netlink


def test_captured_links_are_understood(capture: Any) -> None:
    messages = list(storagetm.parse_messages(bytes.fromhex(capture["netlink"]["links"])))
    assert [kind for kind, _, _ in messages] == [storagetm.RTM_NEWLINK] * 3 + [storagetm.NLMSG_DONE]
    links = [storagetm.parse_link(body) for _, _, body in messages[:-1]]
    up_and_running = storagetm.IFF_UP | storagetm.IFF_RUNNING
    assert [(link[0], link[2]) for link in links if link] == [(1, "lo"), (2, "eth0"), (3, "eth1")]
    assert [link[1] & up_and_running == up_and_running for link in links if link] == [True, True, False]
    assert [bool(link[1] & storagetm.IFF_LOOPBACK) for link in links if link] == [True, False, False]


def test_captured_addresses_are_understood(capture: Any) -> None:
    """Not ::1 and 127.0.0.1, and not 2001:db8::2, which is deprecated."""
    messages = storagetm.parse_messages(bytes.fromhex(capture["netlink"]["addresses"]))
    found = [storagetm.parse_address(body) for kind, _, body in messages if kind == storagetm.RTM_NEWADDR]
    assert [(f[0], f[1].family, f[1].text, f[1].link_local) for f in found if f] == [
        (2, storagetm.AF_INET, "192.0.2.1", False),
        (2, storagetm.AF_INET6, "2001:db8::1", False),
        (2, storagetm.AF_INET6, "fe80::5054:ff:fe6a:da5c", True),
    ]
    assert len(found) == 6


def address(
    *attributes: tuple[int, bytes], family: int = storagetm.AF_INET, flags: int = 0x80, scope: int = 0
) -> bytes:
    return struct.pack("=BBBBI", family, 24, flags, scope, 7) + b"".join(attribute(*a) for a in attributes)


V4 = socket.inet_aton("192.0.2.1")
V6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1")


def test_own_end_of_a_point_to_point_link_counts() -> None:
    far = socket.inet_aton("198.51.100.1")
    found = storagetm.parse_address(address((storagetm.IFA_ADDRESS, far), (storagetm.IFA_LOCAL, V4)))
    assert found
    assert (found[0], found[1].text) == (7, "192.0.2.1")


@pytest.mark.parametrize(
    ("flag", "usable"),
    [
        (storagetm.IFA_F_TENTATIVE, False),
        (storagetm.IFA_F_DEPRECATED, False),
        (storagetm.IFA_F_DADFAILED, False),
        (0x80, True),  # IFA_F_PERMANENT
        (0x01, True),  # IFA_F_TEMPORARY
    ],
)
def test_flags_decide_whether_an_address_is_usable(flag: int, usable: bool) -> None:
    """They are in the header, and in an attribute with room for more, which counts."""
    body = address((storagetm.IFA_ADDRESS, V6), family=storagetm.AF_INET6, flags=flag)
    assert bool(storagetm.parse_address(body)) is usable
    flags = (storagetm.IFA_FLAGS, (flag | 0x200).to_bytes(4, sys.byteorder))
    body = address((storagetm.IFA_ADDRESS, V6), flags, family=storagetm.AF_INET6, flags=0x80)
    assert bool(storagetm.parse_address(body)) is usable


@pytest.mark.parametrize(
    ("scope", "usable", "link_local"),
    [(0, True, False), (200, True, False), (253, True, True), (254, False, False)],
)
def test_scope_decides_whether_an_address_is_usable(scope: int, usable: bool, link_local: bool) -> None:
    found = storagetm.parse_address(address((storagetm.IFA_ADDRESS, V4), scope=scope))
    assert bool(found) is usable
    if found:
        assert found[1].link_local is link_local


def test_addresses_that_make_no_sense_are_left_out() -> None:
    assert storagetm.parse_address(address((storagetm.IFA_ADDRESS, V6))) is None
    assert storagetm.parse_address(address((storagetm.IFA_ADDRESS, V4), family=storagetm.AF_INET6)) is None
    assert storagetm.parse_address(address((storagetm.IFA_ADDRESS, V4), family=28)) is None
    assert storagetm.parse_address(address()) is None
    assert storagetm.parse_address(b"") is None


def test_messages_are_split_up_to_the_first_bad_one() -> None:
    raw = message(1, b"a") + message(2, b"bcde", 7) + message(3, b"")
    assert list(storagetm.parse_messages(raw)) == [(1, 0, b"a"), (2, 7, b"bcde"), (3, 0, b"")]
    assert list(storagetm.parse_messages(raw[:-1])) == [(1, 0, b"a"), (2, 7, b"bcde")]
    # One that is shorter than its header would never end.
    assert list(storagetm.parse_messages(struct.pack("=IHHII", 0, 1, 0, 1, 0) * 2)) == []


def test_attributes_are_split_up_to_the_first_bad_one() -> None:
    raw = attribute(1, b"abc") + attribute(2, b"") + attribute(1, b"last")
    assert storagetm.parse_attributes(raw) == {1: b"last", 2: b""}
    assert storagetm.parse_attributes(raw[:-1]) == {1: b"abc", 2: b""}
    assert storagetm.parse_attributes(struct.pack("=HH", 3, 1) + raw) == {}


@given(st.binary(max_size=200))
@example(b"\0" * 64)
@example(b"\xff" * 64)
def test_netlink_may_be_any_bytes(raw: bytes) -> None:
    for kind, flags, body in storagetm.parse_messages(raw):
        assert kind < 1 << 16
        assert flags < 1 << 16
        assert body in raw
    assert all(value in raw for value in storagetm.parse_attributes(raw).values())
    storagetm.parse_link(raw)
    storagetm.parse_address(raw)


@given(st.data())
def test_netlink_may_be_damaged(data: st.DataObject) -> None:
    """Real dumps with some bytes changed and cut off."""
    raw = bytearray(bytes.fromhex(CAPTURE["netlink"][data.draw(st.sampled_from(["links", "addresses"]))]))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for _, _, body in storagetm.parse_messages(bytes(raw[: data.draw(st.integers(0, len(raw)))])):
        link = storagetm.parse_link(body)
        assert link is None or link[2].isprintable()
        found = storagetm.parse_address(body)
        assert found is None or socket.inet_pton(found[1].family, found[1].text)


# Uevents


def test_captured_uevents_are_understood(capture: Any) -> None:
    kernel, udev = (bytes.fromhex(capture["netlink"][name]) for name in ("kernel", "udev"))
    assert kernel.startswith(b"change@/devices/")
    assert udev.startswith(b"libudev\0\xfe\xed\xca\xfe")
    assert storagetm.parse_uevent(kernel) == "vdb"
    assert storagetm.parse_uevent(udev) == "vdb"


def udev_message(properties: bytes, start: int = 40) -> bytes:
    header = struct.pack("=8sIIII", b"libudev\0", socket.htonl(0xFEEDCAFE), 40, start, len(properties))
    return header.ljust(40, b"\0") + properties


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        (b"ACTION=add\0DEVPATH=/devices/x/block/sda/sda1\0SUBSYSTEM=block\0", "sda1"),
        (b"SUBSYSTEM=block\0DEVPATH=/devices/virtual/block/cciss!c0d0\0", "cciss!c0d0"),
        (b"ACTION=add\0DEVPATH=/devices/x/net/eth0\0SUBSYSTEM=net\0", ""),
        (b"ACTION=add\0DEVPATH=/devices/x/block/sda\0SUBSYSTEM=blockade\0", ""),
        (b"ACTION=add\0SUBSYSTEM=block\0", ""),
        (b"DEVPATH=sda\0SUBSYSTEM=block\0", ""),
        (b"DEVPATH=/devices/\0SUBSYSTEM=block\0", ""),
        # The backing device of a disk that is going, and of file systems without one.
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/254:16\0SUBSYSTEM=bdi\0", "254:16"),
        (b"ACTION=add\0DEVPATH=/devices/virtual/bdi/254:16\0SUBSYSTEM=bdi\0", ""),
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/btrfs-1\0SUBSYSTEM=bdi\0", ""),
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/0:45-fuseblk\0SUBSYSTEM=bdi\0", ""),
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/1:" + b"9" * 5000 + b"\0SUBSYSTEM=bdi\0", ""),
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/\xd9\xa1:2\0SUBSYSTEM=bdi\0", ""),
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/:\0SUBSYSTEM=bdi\0", ""),
        (b"ACTION=remove\0DEVPATH=/devices/virtual/bdi/1:2:3\0SUBSYSTEM=bdi\0", ""),
    ],
)
def test_uevents_name_disks(properties: bytes, name: str) -> None:
    assert storagetm.parse_uevent(b"add@/devices/x\0" + properties) == name
    assert storagetm.parse_uevent(udev_message(properties)) == name


def test_udev_message_may_have_a_longer_header() -> None:
    properties = b"DEVPATH=/devices/x/block/sda\0SUBSYSTEM=block\0"
    assert storagetm.parse_uevent(udev_message(bytes(8) + properties, 48)) == "sda"
    # An offset into the header, or behind the end, is nonsense.
    for start in (0, 39, 40 + len(properties), 1 << 31):
        assert storagetm.parse_uevent(udev_message(properties, start)) == ""


@given(st.binary(max_size=100), st.integers(0, 120))
def test_uevent_may_be_any_bytes(raw: bytes, start: int) -> None:
    going = b"SUBSYSTEM=bdi\0ACTION=remove\0DEVPATH=/" + raw
    parts = (raw, udev_message(raw, start), b"libudev\0" + raw, b"SUBSYSTEM=block\0DEVPATH=" + raw)
    for part in (*parts, going):
        name = storagetm.parse_uevent(part)
        assert "/" not in name
        assert "\0" not in name
        if part is going and name:
            assert re.fullmatch("[0-9]{1,7}:[0-9]{1,7}", name)


# A block device's uevent file in sysfs


def test_captured_block_uevents_are_understood(capture: Any) -> None:
    files = {p: v.encode("latin-1") for p, v in capture["files"].items() if p.endswith("/uevent")}
    disks = {p.split("/")[-2]: v for p, v in files.items() if b"\nDEVTYPE=disk\n" in v}
    assert len(disks) > 5
    for raw in disks.values():
        fields = storagetm.parse_assignments(raw)
        number = f"{fields['MAJOR']}:{fields['MINOR']}"
        assert storagetm.parse_block_uevent(raw) == (number, fields["DISKSEQ"])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"MAJOR=8\nMINOR=16\nDEVNAME=sdb\nDEVTYPE=disk\nDISKSEQ=9\n", ("8:16", "9")),
        (b"MAJOR=8\nMINOR=16\nDEVNAME=sdb\nDEVTYPE=disk", ("8:16", "")),  # before Linux 5.15
        (b"DISKSEQ=9\nXMAJOR=1\nMINOR=2\nMAJOR=3", ("3:2", "9")),
        (b"MAJOR=../x\nMINOR=\xb2\nDISKSEQ=9\0", (":", "")),
        (b"", (":", "")),
    ],
)
def test_block_uevent_gives_number_and_diskseq(raw: bytes, expected: tuple[str, str]) -> None:
    assert storagetm.parse_block_uevent(raw) == expected


@given(st.binary(max_size=60))
def test_block_uevent_may_be_any_bytes(raw: bytes) -> None:
    for variant in (raw, b"MAJOR=" + raw, b"MAJOR=8\nMINOR=" + raw + b"\nDISKSEQ=" + raw):
        number, diskseq = storagetm.parse_block_uevent(variant)
        assert set(number + diskseq) <= set("0123456789:")


# udev's database and files of assignments


def test_captured_udev_database_is_understood(capture: Any) -> None:
    raw = capture["files"]["/run/udev/data/b8:16"].encode("latin-1")
    found = storagetm.parse_udev_database(raw)
    assert found["ID_SERIAL"] == "QEMU_HARDDISK_DISK-ATA"
    assert found["ID_SERIAL_SHORT"] == "DISK-ATA"
    assert found["ID_MODEL"] == "QEMU_HARDDISK"


def test_udev_database_gives_identities() -> None:
    raw = b"S:disk/by-id/x\nE:ID_MODEL=a=b\nI:123\nE:ID_SERIAL=\xff\nID_SERIAL=no\nG:systemd\nE:ID_\n"
    assert storagetm.parse_udev_database(raw) == {"ID_MODEL": "a=b", "ID_SERIAL": "\ufffd"}


def test_captured_assignments_are_understood(capture: Any) -> None:
    found = storagetm.parse_assignments(capture["files"]["/etc/os-release"].encode("latin-1"))
    assert found["ID"] == "debian"
    assert found["VERSION_ID"] == "13"
    assert found["PRETTY_NAME"] == "Debian GNU/Linux 13 (trixie)"


def test_assignments_lose_quotes_and_blanks() -> None:
    raw = b"\n# A=comment\n  B=2  \nC='it''s'\nD=\"x y\"\nE='\nF=\nG\n=h\nI=\"\x1b[2J\"\nB=3"
    assert storagetm.parse_assignments(raw) == {
        "B": "3",
        "C": "it''s",
        "D": "x y",
        "E": "'",
        "F": "",
        "I": "?[2J",
    }


@given(st.binary(max_size=100))
def test_assignments_may_be_any_bytes(raw: bytes) -> None:
    for found in (
        storagetm.parse_assignments(raw),
        storagetm.parse_udev_database(raw.replace(b"\n", b"\nE:ID_")),
    ):
        for key, value in found.items():
            assert key
            assert (key + value).isprintable()


# procfs


def test_captured_mountinfo_is_understood(capture: Any) -> None:
    raw = capture["files"]["/proc/self/mountinfo"].encode("latin-1")
    found = list(storagetm.parse_mountinfo(raw))
    assert len(found) == raw.count(b"\n")
    assert ("254:0", b"/dev/vda", "/") in found
    assert {where for _, _, where in found} >= {"/", "/dev", "/proc", "/sys", "/run"}


def test_mountinfo_gives_number_source_and_place() -> None:
    raw = b"""\
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue
37 35 0:45 / /with\\040blank\\012and\\134all rw - btrfs /dev/sd\\040a rw
39 35 8:1 / /short rw - ext4
"""
    assert list(storagetm.parse_mountinfo(raw)) == [
        ("98:0", b"/dev/root", "/mnt2"),
        ("0:45", b"/dev/sd a", "/with blank\nand\\all"),
    ]


def test_swaps_give_files_and_partitions() -> None:
    raw = (
        b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        b"/dev/vda2                               partition\t1048572\t\t0\t\t-2\n"
        b"/swap\\040file                          file\t\t1048572\t\t0\t\t-3\n"
        b"/short\tfile\n"
    )
    assert list(storagetm.parse_swaps(raw)) == [b"/dev/vda2", b"/swap file", b"/short"]
    assert list(storagetm.parse_swaps(b"")) == []


@given(st.binary(max_size=100))
def test_octal_escapes_are_undone(raw: bytes) -> None:
    """What the kernel's mangle() makes of a path comes out as it was."""
    mangled = b"".join(b"\\%03o" % c if c in b" \t\n\\" else bytes([c]) for c in raw)
    assert storagetm.unescape_octal(mangled) == raw


@pytest.mark.parametrize("raw", [b"\\", b"a\\04", b"\\080", b"\\400", b"\\777", b"\\x41"])
def test_what_is_no_octal_escape_stays(raw: bytes) -> None:
    assert storagetm.unescape_octal(raw) == raw


@given(st.binary(max_size=100))
@example(b"- - - - - - - - - - -")
@example(b"a b c d e f g - h i\\")
def test_procfs_may_be_any_bytes(raw: bytes) -> None:
    for raw_variant in (raw, raw.replace(b"\0", b" "), raw.replace(b"\0", b"\n")):
        for number, _, where in storagetm.parse_mountinfo(raw_variant):
            assert "\n" not in number
            where.encode()
        list(storagetm.parse_swaps(b"\n" + raw_variant))
        storagetm.unescape_octal(raw_variant)


@pytest.mark.parametrize(
    ("entry", "diskseq", "former"),
    [
        (b"S:disk/by-id/x\nS:disk/by-diskseq/7\nE:ID_SERIAL=x\n", "7", False),
        (b"S:disk/by-id/x\nS:disk/by-diskseq/7\nE:ID_SERIAL=x\n", "8", True),
        (b"S:disk/by-diskseq/7\n", "77", True),
        (b"S:disk/by-diskseq/7-part1\n", "7", False),
        (b"S:disk/by-diskseq/7-part1\n", "6", True),
        # Neither older versions of udev nor older kernels tell.
        (b"S:disk/by-id/x\n", "8", False),
        (b"S:disk/by-diskseq/7\n", "", False),
        (b"", "8", False),
    ],
)
def test_entry_of_a_former_disk_is_told(entry: bytes, diskseq: str, former: bool) -> None:
    assert storagetm.is_of_former_disk(entry, diskseq) == former


# SCSI


def test_captured_vpd_pages_are_understood(capture: Any) -> None:
    pages = {p: v.encode("latin-1") for p, v in capture["files"].items() if p.endswith("/vpd_pg80")}
    assert sorted(map(storagetm.parse_vpd_serial, pages.values())) == ["DISK-ATA", "DISK-SCSI"]


@pytest.mark.parametrize(
    ("raw", "serial"),
    [
        (b"\0\x80\0\x04WD-1", "WD-1"),
        (b"\0\x80\0\x04WD-1 and more", "WD-1"),
        (b"\0\x80\0\x14   WD-1     \0\0\0\0\0\0\0\0", "WD-1"),
        (b"\0\x80\x01\x04" + b"x" * 300, "x" * 260),
        (b"\0\x80\0\xffWD", "WD"),
        (b"\0\x83\0\x04WD-1", ""),
        (b"\0\x80\0", ""),
        (b"", ""),
    ],
)
def test_vpd_page_gives_the_serial_number(raw: bytes, serial: str) -> None:
    assert storagetm.parse_vpd_serial(raw) == serial


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        # A vendor's own, as ASCII, from an emulated disk.
        (b"\0\x83\0\x0d\x02\0\0\x09DISK-SCSI", (0, "DISK-SCSI")),
        # NAA, binary; the registered extended one before the registered one, whatever their order.
        (b"\0\x83\0\x0c\x01\x03\0\x08\x50\x01\x43\x80\0\0\0\x01", (3, "5001438000000001")),
        (
            b"\0\x83\0\x20\x01\x03\0\x10\x60" + bytes(15) + b"\x01\x03\0\x08\x50" + bytes(7),
            (3, "60" + "00" * 15),
        ),
        # EUI-64 before T10's; one of the target port does not count.
        (
            b"\0\x83\0\x14\x02\x01\0\x04WDC1\x01\x02\0\x08\x11\x22\x33\x44\x55\x66\x77\x88",
            (2, "1122334455667788"),
        ),
        (b"\0\x83\0\x0c\x01\x13\0\x08\x50" + bytes(7), (-1, "")),
        (b"\0\x80\0\x04WD-1", (-1, "")),
        (b"\0\x83", (-1, "")),
        (b"", (-1, "")),
    ],
)
def test_vpd_page_gives_the_name(raw: bytes, name: tuple[int, str]) -> None:
    assert storagetm.parse_vpd_name(raw) == name


@given(st.binary(max_size=50))
def test_vpd_page_may_be_any_bytes(raw: bytes) -> None:
    for page in (raw, b"\0\x80" + raw, b"\0\x83\0\0" + raw):
        assert "\0" not in storagetm.parse_vpd_serial(page)
        assert "\0" not in storagetm.parse_vpd_name(page)[1]


# Sockets

TCP = b"""\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 010200C0:41DA 020200C0:D4F2 01 00000000:00000000 02:000A2C2B 00000000     0        0 17225
   1: 00000000:41DA 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 17218
   2: 010200C0:0016 030200C0:D4F4 01 00000000:00000000 02:000A2C2B 00000000     0        0 17226
"""
TCP6 = b"""\
   0: 000080FE00000000FF005450563412FE:72EF 000080FE00000000FF00545078563412:AF4E 01 0:0 2:0
"""
# One that came in over IPv4 at [::].
MAPPED = b"""\
   0: 0000000000000000FFFF0000010200C0:41DA 0000000000000000FFFF0000020200C0:D4F2 01 0:0 2:0
"""


@pytest.mark.skipif(sys.byteorder == "big", reason="captured on a little-endian machine")
def test_only_who_is_connected_to_the_ports_is_attached() -> None:
    """Those that are connected to the ports, and no others."""

    def ends(raw: bytes, ports: set[int]) -> list[tuple[str, int]]:
        return [(c.address, c.port) for c in storagetm.parse_sockets(raw, ports)]

    assert ends(TCP, {16858, 29423}) == [("192.0.2.2", 0xD4F2)]
    assert ends(TCP6, {16858, 29423}) == [("fe80::5054:ff:1234:5678", 0xAF4E)]
    assert ends(TCP + TCP6, {4420}) == []
    assert ends(MAPPED, {16858}) == [("192.0.2.2", 0xD4F2)]


@given(st.binary(max_size=300))
@example(b"0: 0:41DA 0:0 01")
@example(b"0: 0:41DA zz:0 01")
@example(b"0: 0:41DA -1:0 01\n0: 0:41DA fffffffff:0 01\n0: 0:_ 00000000:0 01")
def test_sockets_may_be_any_bytes(raw: bytes) -> None:
    assert all(c.address.isprintable() for c in storagetm.parse_sockets(raw, {0x41DA}))


def diagnosis(
    peer: str,
    port: int = 0xD4F2,
    own: int = 16858,
    state: int = 1,
    tls: dict[int, int] | None = None,
    *,
    privileged: bool = True,
) -> bytes:
    """What sock_diag(7) answers about a connection."""
    family = storagetm.AF_INET6 if ":" in peer else storagetm.AF_INET
    message = storagetm.inet_diag_msg(idiag_family=family, idiag_state=state)
    raw = struct.pack("!HH16s16s", own, port, b"", socket.inet_pton(family, peer))
    ctypes.memmove(ctypes.byref(message, storagetm.inet_diag_msg.id.offset), raw, len(raw))
    mark = attribute(storagetm.INET_DIAG_MARK, bytes(4)) if privileged else b""
    if tls is None:
        return bytes(message) + mark
    facts = b"".join(attribute(kind, value.to_bytes(2, sys.byteorder)) for kind, value in tls.items())
    upper = attribute(1, b"tls\0") + attribute(storagetm.INET_ULP_INFO_TLS, facts)
    # Others come before it.
    return bytes(message) + mark + attribute(8, b"\0") + attribute(storagetm.INET_DIAG_ULP_INFO, upper)


KEYS = {storagetm.TLS_INFO_TXCONF: 2, storagetm.TLS_INFO_RXCONF: 2}


@pytest.mark.parametrize(
    ("tls", "encrypted", "cipher"),
    [
        (None, False, ""),
        (
            {**KEYS, storagetm.TLS_INFO_VERSION: 0x304, storagetm.TLS_INFO_CIPHER: 51},
            True,
            "TLS 1.3, AES-128-GCM",
        ),
        (
            {**KEYS, storagetm.TLS_INFO_VERSION: 0x304, storagetm.TLS_INFO_CIPHER: 52},
            True,
            "TLS 1.3, AES-256-GCM",
        ),
        ({**KEYS, storagetm.TLS_INFO_VERSION: 0x305, storagetm.TLS_INFO_CIPHER: 99}, True, ""),
        # There are no keys yet, or for one direction only.
        ({**KEYS, storagetm.TLS_INFO_RXCONF: 1, storagetm.TLS_INFO_VERSION: 0x304}, False, ""),
        ({storagetm.TLS_INFO_TXCONF: 3, storagetm.TLS_INFO_VERSION: 0x304}, False, ""),
        ({}, False, ""),
    ],
)
def test_connection_is_encrypted_once_it_has_keys(
    tls: dict[int, int] | None, encrypted: bool, cipher: str
) -> None:
    found = storagetm.parse_connection(diagnosis("192.0.2.2", tls=tls), {16858})
    assert found
    assert (found.address, found.port, found.encrypted, found.cipher) == (
        "192.0.2.2",
        0xD4F2,
        encrypted,
        cipher,
    )


# What Linux 6.12 answers about a connection of its NVMe target over which it speaks TLS.
ENCRYPTED = bytes.fromhex(
    """
    0201000041da8e5ec0000201000000000000000000000000c00002020000000000000000000000000000000001000000
    000000000000000000000000000000000000000056050000050008000000000008000f00000000000c001500b1010000
    000000000600160052000000fc0002000100000000077700c04b0300409c0000a80500005e0400000000000000000000
    00000000000000000000000064090000000000007009000038090000dc050000a8050100752f00000b2c000068000000
    68000000a8050000030000002823000090380000000000005af6e20000000000ffffffffffffffffd03f0a0000000000
    9d16000000000000df0100006900000000000000350200002f000000dc010000e2b71100000000004084040000000000
    803e0000000000000000000000000000dd01000000000000d03f0a000000000000000000000000000000000000000000
    0000000000f60d00000601000000000000000000000000003000130008000100746c7300240002000600010004030000
    060002003300000006000300020000000600040002000000
"""
)


@pytest.mark.skipif(sys.byteorder == "big", reason="captured on a little-endian machine")
def test_captured_connection_is_encrypted() -> None:
    found = storagetm.parse_connection(ENCRYPTED, {16858})
    assert found
    assert (found.address, found.encrypted, found.cipher) == ("192.0.2.2", True, "TLS 1.3, AES-128-GCM")


def test_whoever_is_not_told_does_not_know() -> None:
    found = storagetm.parse_connection(diagnosis("192.0.2.2", privileged=False), {16858})
    assert found
    assert found.encrypted is None


def test_only_connections_to_the_ports_count() -> None:
    for peer in ("fe80::5054:ff:1234:5678", "2001:db8::1"):
        found = storagetm.parse_connection(diagnosis(peer), {16858})
        assert found
        assert found.address == peer
    mapped = storagetm.parse_connection(diagnosis("::ffff:192.0.2.2"), {16858})
    assert mapped
    assert mapped.address == "192.0.2.2"
    assert storagetm.parse_connection(diagnosis("192.0.2.2", own=0xDA41), {16858}) is None
    assert storagetm.parse_connection(diagnosis("192.0.2.2", state=10), {16858}) is None
    assert storagetm.parse_connection(diagnosis("192.0.2.2", privileged=False)[:-1], {16858}) is None


@given(st.binary(max_size=200))
@example(diagnosis("192.0.2.2", tls=KEYS)[:-3])
def test_answers_about_sockets_may_be_any_bytes(raw: bytes) -> None:
    head = diagnosis("192.0.2.2")
    for body in (raw, head + raw, head + attribute(storagetm.INET_DIAG_ULP_INFO, raw)):
        found = storagetm.parse_connection(body, range(65536))
        assert found is None or found.address.isprintable()
