# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which interface comes first: that with the cable, whatever else a machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import storagetm
from tests.unit.exports import Named
from tests.unit.test_shown import PREFIX, disk

V4, V6 = storagetm.AF_INET, storagetm.AF_INET6
HARDWARE, SOFTWARE, PORT = storagetm.HARDWARE, storagetm.SOFTWARE, storagetm.BRIDGE_PORT

# Name, DEVTYPE, whether it is an adapter, what it is a port of, what is below it.
INTERFACES = {
    "docker0": ("bridge", False, "", ["veth1"]),
    "veth1": ("", False, "docker0", []),
    "wg0": ("wireguard", False, "", []),
    "vxlan0": ("vxlan", False, "", ["enp1s0"]),
    "tun0": ("", False, "", []),
    "enp1s0": ("", True, "", []),
    "enp1s0.7": ("vlan", False, "", ["enp1s0"]),
    "macvlan0": ("macvlan", False, "", ["enp1s0"]),
    "wlan0": ("wlan", True, "", []),
    "usb0": ("gadget", True, "", []),
    "br0": ("bridge", False, "", ["vnet0", "bond0.5"]),
    "vnet0": ("", False, "br0", []),
    "bond0.5": ("vlan", False, "br0", ["bond0"]),
    "bond0": ("bond", False, "", ["enp2s0", "enp3s0"]),
    "enp2s0": ("", True, "bond0", []),
    "enp3s0": ("", True, "bond0", []),
    "red": ("vrf", False, "", ["enp4s0"]),
    "enp4s0": ("", True, "red", []),
}
KINDS = {
    **dict.fromkeys(("docker0", "wg0", "vxlan0", "tun0"), SOFTWARE),
    **dict.fromkeys(("enp1s0", "enp1s0.7", "macvlan0", "wlan0", "usb0", "br0", "bond0", "enp4s0"), HARDWARE),
    **dict.fromkeys(("veth1", "vnet0", "bond0.5", "enp2s0", "enp3s0"), PORT),
}


@pytest.fixture
def interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/sys/class/net of a machine that has some of everything."""
    monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/")
    net = tmp_path / "class/net"
    for name, (kind, adapter, master, below) in INTERFACES.items():
        (net / name).mkdir(parents=True)
        (net / name / "uevent").write_text((f"DEVTYPE={kind}\n" if kind else "") + f"INTERFACE={name}\n")
        if adapter:
            (net / name / "device").mkdir()
        if master:
            (net / name / "master").symlink_to(f"../{master}")
        for lower in below:
            (net / name / f"lower_{lower}").symlink_to(f"../{lower}")


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_interface_is_told(name: str) -> None:
    assert storagetm.interface_kind(name) == KINDS[name]


@pytest.mark.usefixtures("interfaces")
def test_interface_that_is_gone_is_software() -> None:
    assert storagetm.interface_kind("eth9") == SOFTWARE


def test_search_in_a_loop_of_interfaces_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sysfs never has one; a kernel with a fault in it does not hang us."""
    monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/")
    (tmp_path / "class/net/a").mkdir(parents=True)
    (tmp_path / "class/net/a/lower_a").symlink_to("../a")
    assert storagetm.interface_kind("a") == SOFTWARE


def link(index: int, name: str) -> tuple[int, bytes]:
    head = storagetm.ifinfomsg(ifi_index=index, ifi_flags=storagetm.IFF_UP | storagetm.IFF_RUNNING)
    return storagetm.RTM_NEWLINK, bytes(head) + attribute(storagetm.IFLA_IFNAME, name.encode() + b"\0")


def address(index: int, family: int, raw: bytes, scope: int = 0) -> tuple[int, bytes]:
    head = storagetm.ifaddrmsg(ifa_family=family, ifa_scope=scope, ifa_index=index)
    return storagetm.RTM_NEWADDR, bytes(head) + attribute(storagetm.IFA_ADDRESS, raw)


def attribute(kind: int, raw: bytes) -> bytes:
    return bytes(storagetm.rtattr(4 + len(raw), kind)) + raw + bytes(-len(raw) % 4)


@pytest.mark.usefixtures("interfaces")
def test_adapters_come_first_and_ports_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters before the rest, even with less convenient addresses; ports last, and of these only IPv4."""
    local = b"\xfe\x80" + bytes(13)
    links = [link(i, name) for i, name in enumerate(INTERFACES, 1)]
    index = {name: i for i, name in enumerate(INTERFACES, 1)}
    found = [
        address(index["docker0"], V4, bytes([172, 17, 0, 1])),
        address(index["enp2s0"], V4, bytes([10, 0, 0, 2])),
        address(index["enp2s0"], V6, local + b"\x02", storagetm.RT_SCOPE_LINK),
        address(index["wg0"], V6, b"\x20\x01" + bytes(13) + b"\x09"),
        address(index["enp1s0"], V6, local + b"\x01", storagetm.RT_SCOPE_LINK),
        address(index["br0"], V6, b"\x20\x01" + bytes(13) + b"\x01"),
        address(index["br0"], V4, bytes([192, 0, 2, 1])),
    ]

    def dump(kind: int, _: Any) -> tuple[list[tuple[int, bytes]], bool]:
        return (links if kind == storagetm.RTM_GETLINK else found), True

    monkeypatch.setattr(storagetm.Network, "dump", staticmethod(dump))
    network = storagetm.Network()
    network.socket.close()
    assert [(a.interface, a.text) for a in network.addresses()] == [
        ("br0", "192.0.2.1"),
        ("br0", "2001::1"),
        ("enp1s0", "fe80::1"),
        ("docker0", "172.17.0.1"),
        ("wg0", "2001::9"),
        ("enp2s0", "10.0.0.2"),
    ]


def test_best_address_is_shown() -> None:
    """With each disk, and by Plymouth, though the other address is shorter."""
    cable = storagetm.Address(V6, "fe80::5054:ff:fe12:3456", "enp1s0", True)
    bridge = storagetm.Address(V4, "172.17.0.1", "docker0", False)
    bridge.kind = SOFTWARE
    transport = storagetm.NvmeTcp(Named(), PREFIX)
    transport.ports = {V4: 59936, V6: 36681}
    ordered = sorted([bridge, cable], key=storagetm.Address.rank)
    shown = storagetm.take_report(Named(), [transport], ordered, [disk("vda")], storagetm.Memory())
    command = f"-t tcp -a {cable.text} -s 36681 -f INTERFACE"
    assert shown.for_plymouth() == f"nvme connect-all {command}"
    text = "\n".join(line for block in shown.blocks(200) for _, line in block)
    assert f"nvme connect {command} -n {PREFIX}.vda" in text
    assert text.index(cable.text) < text.index("172.17.0.1")
    assert "nvme connect -t tcp -a 172.17.0.1" not in text
