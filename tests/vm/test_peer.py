# SPDX-License-Identifier: LGPL-2.1-or-later
"""Beside systemd-storagetm on one kernel, in turn: what both put into configfs is the same, but for the
differences that are meant. Each of these is asserted, so that one that goes away is noticed as well.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import shlex
from collections.abc import Iterator

import pytest

from tests.harness.machine import Disk, Machine
from tests.vm.conftest import TOOL
from tests.vm.nvmet import NVMET, exporting, names, remove, tree

PEER = "/usr/lib/systemd/systemd-storagetm"

VECTOR_ID = "0123456789abcdef" * 2
VECTOR_PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
MACHINE_IDS = (
    VECTOR_ID,
    "f" * 32,
    "00000000000000000000000000000001",
    "8f1d5c2e9ab04d6f9e3c7b1a2d4e6f80",
)

DISK_IMAGE = "/var/tmp/disk.img"
OTHER_IMAGES = ("/var/tmp/Zweite Platte.raw", "/var/tmp/third")

# Whose subsystem a path in configfs is in, or linked to.
NODE = re.compile(r"(?:^|/)subsystems/([^/]+)")


def app_specific_id(machine_id: str, application: str) -> str:
    """An application-specific ID (sd_id128_get_app_specific(3)), by other means than the tool's."""
    raw = bytearray(hmac.digest(bytes.fromhex(machine_id), bytes.fromhex(application), "sha256")[:16])
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return raw.hex()


def disk_uuid(machine_id: str, identity: str) -> str:
    """The UUID of a namespace: version 4, from the machine ID and what identifies the disk."""
    raw = bytearray(hashlib.sha256(bytes.fromhex(machine_id) + identity.encode()).digest()[:16])
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


@pytest.fixture(scope="module")
def machine(target: Machine) -> Iterator[Machine]:
    """The target, with one more disk that has a serial number of the vectors, one without any, and files."""
    target.run("modprobe -a nvmet-tcp null_blk")
    target.add_disk(Disk("vector", serial="DISK-A"))
    images = shlex.join([DISK_IMAGE, *OTHER_IMAGES])
    target.run(
        f"truncate -s 1M {images}; ln -s third /var/tmp/image-link; mkdir -p /run/machine-ids;"
        + "".join(f"echo {i} > /run/machine-ids/{i};" for i in MACHINE_IDS)
    )
    target.wait_run("test -e /dev/disk/by-id/virtio-DISK-A && udevadm settle")
    try:
        yield target
    finally:
        target.remove_disk("vector")
        target.run(
            f"rm -r {images} /var/tmp/image-link /run/machine-ids; modprobe -r null_blk; udevadm settle"
        )


def node_of(machine: Machine, disk: str) -> str:
    """The name of the virtio disk with this serial number, vdX."""
    return machine.run(["readlink", f"/dev/disk/by-id/virtio-{disk}"]).stdout.strip().rpartition("/")[2]


def as_machine(machine_id: str) -> list[str]:
    """Has a service see this machine ID, and leaves the machine's own alone."""
    return [f"BindReadOnlyPaths=/run/machine-ids/{machine_id}:/etc/machine-id"]


def both(
    machine: Machine,
    machine_id: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    access: str = "--read-write",
) -> tuple[dict[str, str], dict[str, str]]:
    """The trees that the peer and the project make, in this order. The peer has only one kind of access.

    The peer leaves those disks behind that it could not switch on: an empty drive.
    """
    trees = []
    for program in (PEER, TOOL):
        with exporting(
            machine,
            *([access] if program == TOOL else []),
            *arguments,
            environment=environment,
            properties=["WorkingDirectory=/var/tmp", *as_machine(machine_id)],
            program=program,
        ):
            found = tree(machine)
            if program == TOOL:
                assert not any("/namespaces/1/" in path for path in found)
                # The number follows from the disk: clients can tell it from another of the same name.
                found = {re.sub(r"/namespaces/\d+/", "/namespaces/1/", p): v for p, v in found.items()}
            trees.append(found)
        remove(machine, *names(machine))
    return trees[0], trees[1]


class Comparison:
    """What two trees have in common, and what not."""

    def __init__(self, peer: dict[str, str], project: dict[str, str]) -> None:
        self.peer = peer
        self.project = project
        self.same = {p for p in peer.keys() & project.keys() if peer[p] == project[p]}
        self.other = {p for p in peer.keys() & project.keys() if peer[p] != project[p]}
        self.only_peer = peer.keys() - project.keys()
        self.only_project = project.keys() - peer.keys()

    def attributes(self) -> int:
        """How many attributes are the same."""
        return sum(1 for p in self.same if not p.endswith("/"))

    def check(self, serials: dict[str, str], shared_serial: str | None) -> None:
        """Asserts that the trees differ in what they should, and in nothing else.

        `serials` are the NQNs of the disks that are exported, each with its own serial number, if it has
        one; `shared_serial` is what the peer gives to those without.
        """
        ours: set[str] = set()
        limits = set()
        for nqn, serial in serials.items():
            path = f"subsystems/{nqn}/namespaces/1/device_path"
            # The peer opens the device, and names it by its own file descriptor.
            match = re.fullmatch(r"/proc/\d+/fd/\d+\n-> (.*)", self.peer[path])
            assert match
            # A file has a loop device in between, or it would have the block size of its file system.
            node = "/dev/loop" if match[1].startswith("/var/") else match[1]
            assert f"\n-> {node}" in self.project[path]
            assert not self.project[path].startswith("/proc/")
            self.other.remove(path)
            # One client at a time.
            ids = [f"subsystems/{nqn}/attr_cntlid_{end}" for end in ("min", "max")]
            assert [self.peer[i] for i in ids] == ["1\n", "65519\n"]
            assert self.project[ids[0]] == self.project[ids[1]]
            limits.add(self.project[ids[0]])
            self.other -= set(ids)
            path = f"subsystems/{nqn}/attr_serial"
            if serial:
                # The kernel fills it up with blanks.
                assert self.project[path] == f"{serial:<20}\n"
            elif shared_serial:
                assert self.peer[path] == shared_serial + "\n"
                assert re.fullmatch(r"[0-9a-f]{20}\n", self.project[path])
                ours.add(self.project[path])
                self.other.remove(path)
        assert len(limits) == len(serials)
        if shared_serial:
            assert shared_serial + "\n" not in ours
            assert len(ours) == sum(1 for s in serials.values() if not s)
        assert {p: (self.peer[p], self.project[p]) for p in self.other} == {}
        assert self.only_peer == set()
        assert self.only_project == set()
        assert {
            m[1] for p in self.project if p.startswith("ports/") and (m := NODE.search(p[6:])) and m[1]
        } == set(serials)


def without(found: dict[str, str], nqn: str) -> dict[str, str]:
    """A tree without one subsystem."""
    return {p: v for p, v in found.items() if not ((m := NODE.search(p)) and m[1] == nqn)}


def serial_numbers(machine: Machine, prefix: str) -> dict[str, str]:
    """The NQN of each disk that --all exports, with udev's ID_SERIAL_SHORT."""
    found = {}
    for name in machine.run("ls /sys/block").stdout.split():
        if re.match(r"loop|ram|sr|vda", name):
            continue
        properties = machine.run(["udevadm", "info", "--query=property", f"/dev/{name}"]).stdout
        match = re.search("^ID_SERIAL_SHORT=(.*)", properties, re.MULTILINE)
        found[f"{prefix}.{name}"] = match[1] if match else ""
    return found


@pytest.mark.parametrize("machine_id", MACHINE_IDS)
def test_all_looks_like_the_peers_to_clients(machine: Machine, machine_id: str) -> None:
    """Virtio, SCSI and NVMe disks and one of null_blk, with serial numbers and without."""
    prefix = "nqn.2023-10.io.systemd:storagetm." + app_specific_id(
        machine_id, "b4f94e52b8e245db88846e2ec3f4ef18"
    )
    serials = serial_numbers(machine, prefix)
    assert sorted(serials.values()) == [""] * 5 + ["DISK-NVME", "DISK-SCSI"]
    peer, project = both(machine, machine_id, "--all")

    # An empty drive, which cannot be exported, is left behind by the peer.
    drive = f"subsystems/{prefix}.sr0"
    assert peer[f"{drive}/namespaces/1/enable"] == "0\n"
    assert drive + "/" not in project
    peer = without(peer, f"{prefix}.sr0")

    comparison = Comparison(peer, project)
    print(f"{comparison.attributes()} attributes are the same.")
    # Every subsystem has at least this many, so that they really have been read.
    assert comparison.attributes() > 15 * len(serials)
    comparison.check(serials, app_specific_id(machine_id, "397f4dbf1ebf466db3cb45b80d495bc1")[:20])
    uuids = [v for p, v in project.items() if p.endswith("/device_uuid")]
    assert len(set(uuids)) == len(serials)

    if machine_id == VECTOR_ID:
        assert prefix == VECTOR_PREFIX
        assert ports(project) == {59936, 36681}
        vector = node_of(machine, "DISK-A")
        assert project[f"subsystems/{prefix}.{vector}/namespaces/1/device_uuid"] == (
            "23f6dcb9-5617-4019-9db0-49e2af0000e9\n"
        )
        assert project[f"subsystems/{prefix}.nullb0/namespaces/1/device_uuid"] == (
            "6cae16a3-f3e1-4b3b-9b53-091692726f45\n"
        )
        assert peer[f"subsystems/{prefix}.nullb0/attr_serial"] == "0e06ea54baca4c67a335\n"


def test_read_only_differs_only_in_what_is_between(machine: Machine) -> None:
    """Exported read-only, there is something between the disk and its export, and that is all."""
    arguments = ["--nqn=quux", "/dev/nvme0n1", "/dev/disk/by-id/virtio-DISK-A", DISK_IMAGE]
    peer, project = both(machine, VECTOR_ID, *arguments, access="--read-only")
    for name, node in (("nvme0n1", "/dev/nvme0n1"), ("virtio-DISK-A", f"/dev/{node_of(machine, 'DISK-A')}")):
        path = f"subsystems/quux.{name}/namespaces/1/device_path"
        # What tree() shows is what is below.
        assert project.pop(path).endswith(f"-> {node}")
        assert peer.pop(path).endswith(f"-> {node}")
    path = "subsystems/quux.disk.img/namespaces/1/device_path"
    assert project.pop(path).startswith("/dev/loop")
    assert peer.pop(path).endswith(f"-> {DISK_IMAGE}")
    changed = {
        p: (peer.get(p), project.get(p))
        for p in peer.keys() | project.keys()
        if peer.get(p) != project.get(p)
    }
    # Ours has a serial number of its own for each disk without, as it does read-write.
    assert {p.partition("/namespaces/")[2] or p.rpartition("/")[2] for p in changed} <= {"attr_serial"}


def ports(found: dict[str, str]) -> set[int]:
    """The numbers of the ports in a tree."""
    return {int(m[1]) for p in found if (m := re.fullmatch("ports/([^/]+)/", p))}


@pytest.mark.parametrize(
    "prefix", ["quux", "nqn.2014-08.org.example:ümläut and blank"], ids=["word", "strange"]
)
def test_named_disks_look_like_the_peers(machine: Machine, prefix: str) -> None:
    """Disks and files, by links and relative paths, in any order, with another prefix. A variable that makes
    no sense changes nothing.
    """
    arguments = ["/dev/nvme0n1", DISK_IMAGE, f"--nqn={prefix}", "/dev/disk/by-id/virtio-DISK-A"]
    arguments += ["./Zweite Platte.raw", "image-link", f"/dev/{node_of(machine, 'DISK-BETA')}"]
    peer, project = both(machine, VECTOR_ID, *arguments, environment={"SYSTEMD_NVME_UUID": "nonsense"})
    # Each name is that of the path which was given.
    serials = {
        f"{prefix}.nvme0n1": "DISK-NVME",
        f"{prefix}.virtio-DISK-A": "",
        f"{prefix}.{node_of(machine, 'DISK-BETA')}": "",
        f"{prefix}.disk.img": "",
        f"{prefix}.Zweite Platte.raw": "",
        f"{prefix}.image-link": "",
    }
    Comparison(peer, project).check(serials, "0e06ea54baca4c67a335")
    uuids = {
        "virtio-DISK-A": "23f6dcb9-5617-4019-9db0-49e2af0000e9",
        "disk.img": "56ff4049-df8e-4fca-aa73-09aabc53d99b",
        "Zweite Platte.raw": disk_uuid(VECTOR_ID, "./Zweite Platte.raw"),
        "image-link": disk_uuid(VECTOR_ID, "image-link"),
    }
    for name, uuid in uuids.items():
        assert project[f"subsystems/{prefix}.{name}/namespaces/1/device_uuid"] == f"{uuid}\n"
    if prefix == "quux":
        assert ports(project) == {16858, 29423}


@pytest.mark.parametrize(
    "environment",
    [
        {
            "SYSTEMD_NVME_MODEL": "Model of mine",
            "SYSTEMD_NVME_FIRMWARE": "1.2",
            "SYSTEMD_NVME_SERIAL": "S/N 4711",
            "SYSTEMD_NVME_UUID": "2f1a9d2e-06e0-4b3a-9c9c-7a8f5f0f1a2b",
        },
        {  # Each is too long, or has another form.
            "SYSTEMD_NVME_MODEL": "M" * 41,
            "SYSTEMD_NVME_FIRMWARE": "F" * 9,
            "SYSTEMD_NVME_SERIAL": "S" * 21,
            "SYSTEMD_NVME_UUID": "2F1A9D2E06E04B3A9C9C7A8F5F0F1A2B",
        },
    ],
    ids=["plain", "long"],
)
def test_variables_do_what_they_do_for_the_peer(machine: Machine, environment: dict[str, str]) -> None:
    """The variables that override a disk's identity."""
    prefix = "nqn.2023-10.io.systemd:storagetm.099edbb9e5114193a828c46d31d9228f"
    peer, project = both(machine, VECTOR_ID, f"--nqn={prefix}", "/dev/nvme0n1", environment=environment)
    subsystem = f"{prefix}.nvme0n1"
    Comparison(peer, project).check({subsystem: environment["SYSTEMD_NVME_SERIAL"][:20]}, None)
    assert project[f"subsystems/{subsystem}/attr_model"] == environment["SYSTEMD_NVME_MODEL"][:40] + "\n"
    assert (
        project[f"subsystems/{subsystem}/attr_firmware"] == environment["SYSTEMD_NVME_FIRMWARE"][:8] + "\n"
    )
    assert project[f"subsystems/{subsystem}/namespaces/1/device_uuid"] == (
        "2f1a9d2e-06e0-4b3a-9c9c-7a8f5f0f1a2b\n"
    )
    assert ports(project) == {63558, 55673}


LISTENER = """
import socket, time
for family, address, port in ((socket.AF_INET, "0.0.0.0", 16858), (socket.AF_INET6, "::", 29423)):
    s = socket.socket(family)
    # Connections of clients that others have served there may not have ended for good.
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((address, port))
    s.listen()
    s.detach()
print("listening", flush=True)
time.sleep(10000)
"""


def chosen_ports(machine: Machine) -> dict[str, int]:
    """The port for each address family at which quux's NVMe disk is exported."""
    found = {}
    for path in tree(machine):
        if match := re.fullmatch(r"ports/(\d+)/subsystems/quux.nvme0n1", path):
            family = machine.run(["cat", f"{NVMET}/ports/{match[1]}/addr_adrfam"]).stdout.strip()
            assert machine.run(["cat", f"{NVMET}/ports/{match[1]}/addr_trsvcid"]).stdout == f"{match[1]}\n"
            found[family] = int(match[1])
    return found


def check_next_ports(machine: Machine, taken: set[int], output: str) -> None:
    """Asserts that, instead of those that are taken, others of the same kind have been chosen."""
    ports = chosen_ports(machine)
    usual = {"ipv4": 16858, "ipv6": 29423}
    assert ports.keys() == usual.keys()
    for family, number in usual.items():
        assert (ports[family] != number) == (number in taken)
        assert ports[family] % 2 == number % 2
        assert 1024 <= ports[family] <= 65535
        if number in taken:
            assert re.search(rf"Port {number} is taken, using {ports[family]} for IPv[46]$", output, re.M)
        # Somebody listens there.
        address = "127.0.0.1" if family == "ipv4" else "::1"
        machine.run(
            ["python3", "-c", f"import socket; socket.create_connection(('{address}', {ports[family]}))"]
        )


def test_port_taken_by_a_program_is_replaced(machine: Machine) -> None:
    """A program listens on both ports."""
    listener = machine.start_process(["python3", "-c", LISTENER])
    try:
        listener.wait_output("listening")
        with exporting(machine, "--nqn=quux", "/dev/nvme0n1") as service:
            check_next_ports(machine, {16858, 29423}, service.output)
            assert not {"ports/16858", "ports/29423"} & names(machine)
    finally:
        listener.kill()
        listener.wait()


def test_port_taken_by_an_entry_is_replaced(machine: Machine) -> None:
    """Directories of these numbers are in configfs already, and stay as they are."""
    foreign = f"{NVMET}/ports/16858 {NVMET}/ports/29423"
    machine.run(f"mkdir {foreign} && for port in {foreign}; do echo rdma > $port/addr_trtype; done")
    try:
        before = tree(machine)
        with exporting(machine, "--nqn=quux", "/dev/nvme0n1") as service:
            check_next_ports(machine, {16858, 29423}, service.output)
            assert before.items() <= tree(machine).items()
        assert tree(machine) == before
    finally:
        machine.run(f"rmdir {foreign}")
