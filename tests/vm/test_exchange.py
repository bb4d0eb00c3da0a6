# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client has attached never turns into something else: media and disks are exchanged under it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.machine import MIB, Disk, Machine, Nic, Process, Wire
from tests.vm import nvmet
from tests.vm.conftest import BootMachine, prepare
from tests.vm.disks import CardReader, card_reader, wait_name
from tests.vm.initiator import TARGET_ADDRESS, attached
from tests.vm.nvmet import Service, exporting

PORT = 16858
SIZE = 8 * MIB

# Writes to or reads from an open disk again and again, whatever errors there are, until it has no size any
# more, or for so many seconds. Prints how often that went well, and whether anything but A was read.
INSISTING_SCRIPT = """
import mmap, os, random, sys, time
path, what, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
fd = os.open(path, (os.O_RDONLY if what == "read" else os.O_RDWR) | os.O_DIRECT)
size = os.lseek(fd, 0, os.SEEK_END)
buffer = mmap.mmap(-1, 4096)
buffer.write(b"W" * 4096)
end, done, wrong, begun = time.monotonic() + seconds, 0, 0, False
while time.monotonic() < end:
    offset = random.randrange(size // 4096) * 4096
    try:
        if what == "read":
            os.preadv(fd, [buffer], offset)
            wrong += buffer[:] != b"A" * 4096
        else:
            os.pwrite(fd, buffer, offset)
        done += 1
        if not begun:
            begun = print("begun", flush=True) is None
    except OSError as e:
        if e.errno == 28:  # ENOSPC: the disk is gone
            break
        time.sleep(0.001)
print(f"done {done} wrong {wrong}", flush=True)
"""


def insist(client: Machine, node: str, access: str, seconds: int = 60) -> Process:
    what = "read" if access == "read-only" else "write"
    process = client.start_process(["python3", "-c", INSISTING_SCRIPT, node, what, str(seconds)])
    process.wait_output("^begun$")
    return process


def uuids(client: Machine) -> dict[str, str]:
    """The nodes of the disks that a client has, by their UUIDs."""
    script = (
        "cd /sys/block; for d in nvme*n*; do case $d in *c*) ;; *) echo $(cat $d/uuid) /dev/$d;; esac; done"
    )
    return dict(line.split() for line in client.run(script, check=False).stdout.splitlines() if " " in line)


@pytest.fixture(autouse=True)
def detached(client: Machine) -> Iterator[None]:
    yield
    client.set_link(True)
    client.run("nvme disconnect-all")


class Reader:
    """A card reader whose cards are full of one letter each, and what the tool says of it."""

    def __init__(self, reader: CardReader, service: Service) -> None:
        self.reader = reader
        self.service = service
        self.machine = reader.machine

    def exports(self) -> int:
        return len(re.findall(f"^Exporting '{self.reader.node}'", self.service.output, re.MULTILINE))

    def exchange(self, letter: str) -> None:
        """Puts another card in, as quickly as can be, and waits until that is exported."""
        before = self.exports()
        self.machine.run(f"head -c {SIZE} /dev/zero | tr '\\0' {letter} >/run/{letter}.card")
        lun = self.reader.lun
        self.machine.run(f"echo 1 >{lun}/forced_eject; echo /run/{letter}.card >{lun}/file")
        self.machine.wait_until(lambda: self.exports() > before)

    def other_bytes(self, letter: str) -> str:
        """How many bytes of a card are not as they were."""
        return self.machine.run(f"tr -d {letter} </run/{letter}.card | wc -c").stdout.strip()


@pytest.mark.parametrize(
    ("access", "kind"),
    [
        ("read-write", "per-disk"),
        ("read-write", "shared"),
        ("read-only", "per-disk"),
        pytest.param("snapshot", "per-disk", marks=pytest.mark.reach),
        pytest.param("snapshot", "shared", marks=pytest.mark.reach),
        pytest.param("read-only", "shared", marks=pytest.mark.reach),
    ],
)
def test_next_card_is_neither_read_nor_written(
    target: Machine, client: Machine, access: str, kind: str
) -> None:
    """Quickly, and with the client's cable out: not a byte of the next card is written or read."""
    arguments = ["--nqn=quux", f"--subsystem={kind}", f"--{access}", "--all"]
    with card_reader(target) as slot, exporting(target, *arguments) as service:
        reader = Reader(slot, service)
        nqn = "quux" if kind == "shared" else f"quux.{slot.node.removeprefix('/dev/')}"
        for unplugged in (False, True):
            reader.exchange("A")
            with attached(client, nqn, PORT):
                before = client.wait_until(lambda: letters(client).get("A") and uuids(client))
                insisting = insist(client, letters(client)["A"], access)
                if unplugged:
                    client.set_link(False)
                reader.exchange("B")
                assert reader.other_bytes("B") == "0"
                if unplugged:
                    client.set_link(True)
                # The first disk goes, and the next card appears as a new one, all of it.
                new = client.wait_until(lambda known=set(before): uuids(client).keys() - known, 120)  # type: ignore[misc]
                (node,) = (uuids(client)[uuid] for uuid in new)
                insisting.kill()
                insisting.wait()
                assert "wrong" not in insisting.output.replace("wrong 0", "")
                read = f"dd if={node} bs=1M iflag=direct status=none | tr -d B | wc -c"
                assert client.run(read).stdout.strip() == "0"
                assert reader.other_bytes("B") == "0"
                if access != "read-write":
                    assert reader.other_bytes("A") == "0"


def letters(client: Machine) -> dict[str, str]:
    """The nodes of the disks that are full of a letter, by that."""
    script = "for d in {}; do echo $(blockdev --getsize64 $d) $(head -c 1 $d | tr '\\0' -) $d; done"
    lines = client.run(script.format(" ".join(uuids(client).values())), check=False).stdout.splitlines()
    found = {}
    for line in lines:
        size, *rest = line.split()
        if size == str(SIZE) and len(rest) == 2:
            found[rest[0]] = rest[1]
    return found


def disk_names(machine: Machine) -> set[str]:
    return set(machine.run("ls /sys/block").stdout.split())


def content(letter: str, directory: Path) -> Path:
    path = directory / letter
    path.write_bytes(letter.encode() * SIZE)
    return path


@pytest.mark.parametrize(
    "serials", [("", ""), ("SAME", "SAME"), ("ONE", "TWO")], ids=["none", "equal", "other"]
)
def test_disk_in_the_place_of_another_is_not_written(
    target: Machine, client: Machine, tmp_path: Path, serials: tuple[str, str]
) -> None:
    """Pulled, or stopped, exchanged and started: nothing that waits on the client is written to the next."""
    first, second = (Disk(f"disk-{x}", path=content(x, tmp_path), serial=s) for x, s in zip("AB", serials))
    for stopped in (False, True):
        before = disk_names(target)
        target.add_disk(first)
        target.wait_until(lambda known=before: disk_names(target) - known)  # type: ignore[misc]
        (name,) = disk_names(target) - before
        target.run("udevadm settle --timeout=120")
        service = Service(target, ["--nqn=quux", "--read-write", "--all"])
        service.start()
        client.run(f"modprobe nvme-tcp; nvme connect -t tcp -a {TARGET_ADDRESS} -s {PORT} -n quux.{name}")
        node = client.wait_until(lambda: list(uuids(client).values()))[0]
        insisting = insist(client, node, "read-write")
        if stopped:
            service.stop()
        target.remove_disk(first.id, timeout=120)
        target.add_disk(second)
        target.wait_run(f"[ -e /sys/block/{name} ] && udevadm settle --timeout=120")
        if stopped:
            service = Service(target, ["--nqn=quux", "--read-write", "--all"])
            service.start()
        service.wait_output(f"^Exporting '/dev/{name}' \\({SIZE / 1e6:.1f} MB")
        target.wait_until(lambda: name in nvmet.exported(target))  # noqa: B023
        # The client comes back to what has the old disk's NQN, or gives it up.
        insisting.wait(120)
        assert (tmp_path / "B").read_bytes() == b"B" * SIZE
        assert (tmp_path / "A").read_bytes().count(b"W") > 0
        client.run("nvme disconnect-all")
        service.stop()
        target.remove_disk(second.id, timeout=120)
        content("A", tmp_path)
        target.run("rm -f /run/storagetm/*.disks*")


def test_disks_that_change_places_over_a_reboot_are_not_mixed_up(
    boot: BootMachine, tool: Path, tmp_path: Path
) -> None:
    """Writes that waited on the client for one disk do not land on the other that has its node now."""
    wire = Wire()
    # Not SCSI disks, which the kernel names in any order.
    one, two = (Disk(f"disk-{x}", path=content(x, tmp_path), serial=f"DISK-{x}") for x in "AB")
    target = boot("swap-target", wait=False, disks=[one, two], nics=[Nic(wire, 0)], machine_id="1" * 32)
    client = boot("swap-client", wait=False, nics=[Nic(wire, 1)])
    for number, machine in enumerate((target, client), 1):
        machine.wait_boot()
        prepare(machine, tool, number)
    node = wait_name(target, "DISK-A")
    Service(target, ["--nqn=quux", "--read-write", "--all"]).start()
    client.run(f"modprobe nvme-tcp; nvme connect -t tcp -a {TARGET_ADDRESS} -s {PORT} -n quux.{node}")
    theirs = client.wait_until(lambda: list(uuids(client).values()))[0]
    insisting = insist(client, theirs, "read-write", 120)
    target.kill()
    written = (tmp_path / "A").read_bytes().count(b"W")
    target = boot("swap-target", wait=False, disks=[two, one], nics=[Nic(wire, 0)], machine_id="1" * 32)
    target.wait_boot()
    prepare(target, tool, 1)
    assert wait_name(target, "DISK-B") == node
    Service(target, ["--nqn=quux", "--read-write", "--all"]).start()
    insisting.wait(180)
    assert (tmp_path / "B").read_bytes() == b"B" * SIZE
    assert (tmp_path / "A").read_bytes().count(b"W") == written > 0


def test_disks_with_one_serial_number_are_all_attached(
    target: Machine, client: Machine, tmp_path: Path
) -> None:
    """A client gets all of them, each with its own content, and the same ones after a restart."""
    disks = [Disk(f"disk-{x}", path=content(x, tmp_path), serial="SAME", bus="scsi") for x in "ABC"]
    target.run("udevadm settle --timeout=120")
    for disk in disks:
        target.add_disk(disk)
    try:
        target.wait_run(f"[ $(grep -l {SIZE // 512} /sys/block/sd*/size | wc -l) = 3 ] && udevadm settle")
        for kind in ("shared", "per-disk"):
            seen = []
            for _ in range(2):
                with exporting(target, "--nqn=quux", f"--subsystem={kind}", "--all"):
                    what = "connect -n quux" if kind == "shared" else "connect-all"
                    client.run(f"modprobe nvme-tcp; nvme {what} -t tcp -a {TARGET_ADDRESS} -s {PORT}")
                    listed = len(nvmet.exported(target)) if kind == "per-disk" else 8
                    client.wait_until(lambda n=listed: len(uuids(client)) == n)  # type: ignore[misc]
                    nodes = {node: uuid for uuid, node in uuids(client).items()}
                    seen.append({letter: nodes[node] for letter, node in letters(client).items()})
                    assert seen[-1].keys() == set("ABC")
                    client.run("nvme disconnect-all")
            assert seen[0] == seen[1]
            target.run("rm -f /run/storagetm/*.disks*")
    finally:
        for disk in disks:
            target.remove_disk(disk.id, timeout=120)


MULTIPATH = """
modprobe -a dm-multipath dm-round-robin dm-mod
size=$(blockdev --getsz /dev/{0})
a=$(cat /sys/block/{0}/dev) b=$(cat /sys/block/{1}/dev)
printf 'start=1MiB, size=2MiB' | sfdisk --quiet --label gpt --no-reread /dev/{0}
dmsetup create mpatha --uuid mpath-3600 --table "0 $size multipath 0 0 1 1 round-robin 0 2 1 $a 100 $b 100"
dmsetup create mpatha-part1 --uuid part1-mpath-3600 --table "0 4096 linear /dev/mapper/mpatha 2048"
udevadm settle --timeout=120
"""


def test_multipath_disk_is_exported_and_no_path(target: Machine, client: Machine) -> None:
    """The disk is exported, and neither its partition nor a path to it; the client finds the partition."""
    size = 16 * MIB
    for number in (1, 2):
        target.add_disk(Disk(f"path-{number}", size=size, serial=f"PATH-{number}", bus="scsi"))
    paths = [wait_name(target, f"PATH-{number}") for number in (1, 2)]
    try:
        target.run("udevadm settle --timeout=120; " + MULTIPATH.format(*paths))
        disk, part = (
            target.run(f"readlink /dev/mapper/{n}").stdout.strip()[3:] for n in ("mpatha", "mpatha-part1")
        )
        with exporting(target, "--nqn=quux", "--all") as service:
            exported = nvmet.exported(target)
            assert disk in exported
            assert not {part, *paths} & exported
            for path in paths:
                assert (
                    f"Not exporting '/dev/{path}': it is a path to '/dev/{disk}' (mpatha)" in service.output
                )
            assert (
                f"Not exporting '/dev/{part}': it is a partition of '/dev/{disk}' (mpatha)" in service.output
            )
            with attached(client, f"quux.{disk}", PORT) as attachment:
                client.wait_run(f"test -b {attachment.node}p1")
    finally:
        target.run("dmsetup remove mpatha-part1; dmsetup remove mpatha", check=False)
        for number in (1, 2):
            target.remove_disk(f"path-{number}", timeout=120)


LATE = 8  # seconds


@pytest.mark.parametrize("kind", ["per-disk", "shared"])
def test_client_keeps_twelve_disks_over_restart_and_reboot(
    boot: BootMachine, tool: Path, tmp_path: Path, kind: str
) -> None:
    """A client that reads loses none, also if one is not there before 8 s after the restart."""
    wire = Wire()
    disks = []
    for number in range(12):
        path = tmp_path / f"disk-{number}"
        path.write_bytes(random.Random(number).randbytes(MIB))
        # Not SCSI, whose disks the kernel names at each boot in the order in which they answer.
        disks.append(Disk(f"disk-{number}", path=path, serial=f"DISK-{number}"))

    def boot_target(disks: list[Disk]) -> Machine:
        machine = boot(f"twelve-{kind}", wait=False, disks=disks, nics=[Nic(wire, 0)], machine_id="2" * 32)
        machine.wait_boot()
        prepare(machine, tool, 1)
        return machine

    target = boot_target(disks)
    client = boot(f"twelve-client-{kind}", wait=False, nics=[Nic(wire, 1)])
    client.wait_boot()
    prepare(client, tool, 2)
    arguments = ["--nqn=quux", f"--subsystem={kind}", "--all"]
    service = Service(target, arguments)
    service.start()
    what = "connect -n quux" if kind == "shared" else "connect-all"
    client.run(f"modprobe nvme-tcp; nvme {what} -t tcp -a {TARGET_ADDRESS} -s {PORT}", timeout=180)
    client.wait_until(lambda: len(uuids(client)) == 12)
    before = uuids(client)

    def read_all(lost: int = 0) -> None:
        """Every disk can be read, and has the content that it had."""
        assert uuids(client).items() <= before.items()
        script = (
            "for d in "
            + " ".join(before.values())
            + "; do dd if=$d bs=1M iflag=direct status=none | sha256sum; done"
        )
        found = client.run(script, timeout=400).stdout.split()[::2]
        wanted = sorted(target.run("for d in /dev/vd[b-m]; do sha256sum <$d; done").stdout.split()[::2])
        assert len(set(found) & set(wanted)) == 12 - lost

    read_all()
    # Restarted, with one disk that has gone meanwhile, and comes back late.
    service.stop()
    target.remove_disk("disk-5", timeout=120)
    client.wait_run("grep -qv live /sys/class/nvme/nvme*/state")
    service = Service(target, arguments)
    starting = target.start_process(service.command)
    service.wait_output(r"^Exporting nothing yet, waiting for '/dev/vd.' \(exported until the last stop\)")
    target.run(f"sleep {LATE}")
    target.add_disk(disks[5])
    assert starting.wait(180) == 0
    read_all()
    # Booted again: nobody says which disks there were, but all that are there are awaited.
    target.kill()
    target = boot_target(disks)
    Service(target, arguments).start()
    read_all()
    # Booted again, without one: that one is lost, and no other.
    target.kill()
    target = boot_target(disks[:11])
    Service(target, arguments).start()
    client.wait_until(lambda: len(uuids(client)) == 11, 180)
    read_all(1)
    assert re.search("live", client.run("cat /sys/class/nvme/nvme*/state").stdout)
