# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks over USB: a machine that is device and host at once, as dummy_hcd joins the two.

So what it exports appears to itself as further disks, which it must not export again. No test uses
`soft_connect` of the controller: dummy_hcd answers no host after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.images import Image
from tests.harness.machine import MIB, Disk, Machine, Process
from tests.programs import bench
from tests.vm.conftest import LOGS, TOOL, prepare
from tests.vm.disks import card_reader
from tests.vm.initiator import attached
from tests.vm.nvmet import Service, exporting, left_over

SCSI = Path(__file__).parent / "guest/scsi.py"
CRASH = Path(__file__).parent / "guest/crash.py"
# One disk takes so many steps at least: a gadget with three drives, and a device over the disk.
LEAST = {"mkdir": 6, "symlink": 1, "write": 20, "rmdir": 6, "ioctl": 4}
NQN = "quux"
PORT = 16858  # that follows from the NQN
USB = ("--transport=usb", f"--nqn={NQN}")
GADGETS = "/sys/kernel/config/usb_gadget"
GADGET = f"{GADGETS}/{NQN}"
SIZES = {"vdb": 8 * MIB, "vdc": 9 * MIB, "vdd": 10 * MIB}

# SCSI-2 and SBC: the 6, 10, 12 and 16 bytes of a WRITE of block 8.
WRITES = ("0a0000080100", f"2a00{8:08x}00000100", f"aa00{8:08x}{1:08x}0000", f"8a00{8:016x}{1:08x}0000")
ALLOW_MEDIUM_REMOVAL, EJECT = "1e0000000000", "1b0000000200"
DATA_PROTECT = "7"

# Prints interface, LUN, name, size in sectors, write protection and character device of each of the host's
# drives.
DRIVES_SCRIPT = r"""
for b in /sys/block/sd*; do
    d=$(realpath $b/device) || continue
    case $d in */dummy_hcd*) ;; *) continue ;; esac
    i=${d%/host*}
    echo ${i##*.} ${d##*:} ${b##*/} $(cat $b/size $b/ro) $(ls $d/scsi_generic)
done
true
"""


class Drive(NamedTuple):
    """What the host sees of a drive."""

    name: str
    size: int
    read_only: bool
    generic: str

    @property
    def node(self) -> str:
        return f"/dev/{self.name}"


def drives(machine: Machine) -> dict[int, Drive]:
    """The drives with a medium in them that the machine has as a host, by LUN; eight on each interface."""
    found = {}
    for line in machine.run(DRIVES_SCRIPT).stdout.splitlines():
        with contextlib.suppress(ValueError):  # while one comes or goes
            interface, lun, name, size, ro, generic = line.split()
            if int(size):
                found[8 * int(interface) + int(lun)] = Drive(name, 512 * int(size), ro == "1", generic)
    return found


def wait_drives(machine: Machine, *sizes: int) -> dict[int, Drive]:
    """Waits until there are drives of these sizes, and nothing else; udev has looked at them then."""

    def found() -> bool:
        return sorted(d.size for d in drives(machine).values()) == sorted(sizes)

    try:
        machine.wait_until(found)
    except TimeoutError:
        pytest.fail(f"Wanted {sizes}, but: {drives(machine)}")
    machine.run("udevadm settle")
    return drives(machine)


def digest(machine: Machine, drive: Drive) -> str:
    """Of all that the host reads, past its cache."""
    script = f"dd if={drive.node} bs=1M iflag=direct status=none | sha256sum"
    return machine.run(script).stdout.split()[0]


def content(machine: Machine, name: str) -> str:
    """The digest of what is on a disk."""
    return hashlib.sha256(machine.disk_path(name).read_bytes()).hexdigest()


def scsi(machine: Machine, drive: Drive, command: str, data: int = 0) -> str:
    """Sends the host's drive a command; returns the sense key."""
    arguments = ["python3", "/run/scsi.py", f"/dev/{drive.generic}", command, str(data)]
    return machine.run(arguments).stdout.strip()


def gadgets(machine: Machine) -> list[str]:
    return machine.run(["ls", GADGETS]).stdout.split()


def kernel_log(machine: Machine, *, clear: bool = False) -> str:
    return machine.run(["dmesg", "--clear" if clear else "--kernel"]).stdout


def killed(machine: Machine, service: Service) -> None:
    service.kill("KILL")
    machine.wait_run(f"systemctl is-failed --quiet {service.unit} && systemctl reset-failed {service.unit}")


def reading(machine: Machine, drive: Drive) -> Process:
    """Reads a drive again and again, until that fails; then the process ends."""
    script = f"while dd if={drive.node} of=/dev/null bs=64k iflag=direct status=none; do echo read; done"
    process = machine.start_process(script)
    process.wait_output("read")
    return process


def reconnect(machine: Machine) -> None:
    """Has the host let go of the device and connect again."""
    machine.run("cd /sys/bus/usb/drivers/usb && d=$(ls -d ?-1) && echo $d >unbind && echo $d >bind")


@pytest.fixture(scope="module")
def shared_machine(images: dict[str, Image], standard: str, tool: Path) -> Iterator[Machine]:
    disks = [Disk(name, size=size, serial=f"DISK-{name}") for name, size in SIZES.items()]
    with Machine("usb", images[standard], disks=disks, log_directory=LOGS) as machine:
        machine.start()
        machine.wait_boot()
        prepare(machine, tool)
        machine.put("/run/scsi.py", SCSI)
        machine.run("modprobe -a dummy_hcd libcomposite usb-storage sg nvme-tcp && ip link set lo up")
        for name in SIZES:
            machine.run(f"dd if=/dev/urandom of=/dev/{name} bs=1M oflag=direct status=none", check=False)
        yield machine


@pytest.fixture
def machine(shared_machine: Machine) -> Iterator[Machine]:
    """The machine with the disks vdb, vdc and vdd, whose kernel's log is empty."""
    kernel_log(shared_machine, clear=True)
    yield shared_machine
    script = "systemctl stop 'test-*'; systemctl reset-failed 'test-*'; umount /mnt"
    shared_machine.run(f"{script}; rm -f /run/storagetm/*.disks*", check=False)


def test_access_is_what_was_asked_for(machine: Machine) -> None:
    """What a host can write to, and what of that arrives on the disk."""
    before = {name: content(machine, name) for name in SIZES}
    access = ("--access=/dev/vdc:snapshot", "--access=/dev/vdd:read-write")
    with exporting(machine, *USB, *access, *(f"/dev/{name}" for name in SIZES)) as service:
        host = wait_drives(machine, *SIZES.values())
        assert [host[n].size for n in range(3)] == list(SIZES.values())
        assert [host[n].read_only for n in range(3)] == [True, False, False]
        assert {name: digest(machine, host[n]) for n, name in enumerate(SIZES)} == before
        assert re.search(
            r"^Exporting '/dev/vdb' \(8\.4 MB, .*read-only\) as USB LUN 0$", service.output, re.MULTILINE
        )
        service.wait_output("^USB: a host is connected$")
        assert "Exporting 3 disks (1 read-write) at USB (a host is connected)" in service.show("StatusText")
        # The host's kernel would not let anybody try. These commands reach the gadget.
        assert [scsi(machine, host[0], command, 512) for command in WRITES] == [DATA_PROTECT] * 4
        assert [scsi(machine, host[1], command, 512) for command in WRITES[:3]] == ["0"] * 3
        assert digest(machine, host[0]) == before["vdb"]
        for drive in (host[1], host[2]):
            machine.run(f"dd if=/dev/urandom of={drive.node} bs=64k seek=9 count=16 oflag=direct conv=fsync")
        written = {name: digest(machine, host[n]) for n, name in enumerate(SIZES)}
        assert [name for name in SIZES if written[name] != before[name]] == ["vdc", "vdd"]
    assert gadgets(machine) == []
    wait_drives(machine)
    assert {name: content(machine, name) for name in SIZES} == {**before, "vdd": written["vdd"]}
    assert left_over(machine) == []


def test_disks_come_and_go_beside_a_reader(machine: Machine) -> None:
    """The host sees a disk that is plugged in and pulled, without connecting anew.

    And what it sees is not exported again to itself.
    """
    with exporting(machine, *USB, "--all") as service:
        host = wait_drives(machine, *SIZES.values())
        reader = reading(machine, host[0])
        machine.add_disk(Disk("late", size=4 * MIB, serial="DISK-LATE"))
        try:
            now = wait_drives(machine, *SIZES.values(), 4 * MIB)
            assert {n: now[n] for n in range(3)} == host
            assert digest(machine, now[3]) == hashlib.sha256(bytes(4 * MIB)).hexdigest()
            why = f"it comes from this machine's own USB gadget '{NQN}'"
            said = {f"Not exporting '{drive.node}': {why}" for drive in now.values()}
            machine.wait_until(lambda: said <= set(service.output.splitlines()))
            assert service.show("StatusText").startswith("Exporting 4 disks at USB (a host is connected)")
        finally:
            machine.remove_disk("late", timeout=120)
        wait_drives(machine, *SIZES.values())
        assert reader.poll() is None
        reader.kill(group=True)
        log = kernel_log(machine)
        assert log.count("USB device number") == 1, log
        assert "USB disconnect" not in log
    wait_drives(machine)


def test_host_notices_no_kill(machine: Machine) -> None:
    """Killed while a host reads, and started again: the host has no error and does not connect anew.

    Only an end takes everything away, also what the host has locked, since it has it mounted.
    """
    machine.run("mkfs.ext4 -q /dev/vdb && udevadm settle")
    arguments = [*USB, "--read-write", "/dev/vdb", "/dev/vdc"]
    service = Service(machine, arguments)
    service.start()
    host = wait_drives(machine, SIZES["vdb"], SIZES["vdc"])
    machine.run(f"mount {host[0].node} /mnt && seq 1000 >/mnt/before && sync -f /mnt")
    reader = reading(machine, host[1])
    log = kernel_log(machine)
    for _ in range(2):
        killed(machine, service)
        service = Service(machine, arguments)
        service.start()
    machine.run("seq 2000 >/mnt/after && sync -f /mnt && seq 1000 | cmp - /mnt/before")
    assert reader.poll() is None
    assert drives(machine) == host
    assert re.findall("usb |I/O error|reset|sd [0-9:]+", kernel_log(machine)[len(log) :]) == []
    service.stop()
    assert gadgets(machine) == []
    wait_drives(machine)
    reader.wait()
    machine.run("umount -l /mnt; mount /dev/vdb /mnt && seq 2000 | cmp - /mnt/after; umount /mnt")
    assert left_over(machine) == []


def test_ejected_disk_comes_back_with_the_next_connection(machine: Machine) -> None:
    """A disk that the host has ejected is shown as that, and is back when it connects again."""
    with exporting(machine, *USB, "--console", "/dev/vdb", "/dev/vdc") as service:
        host = wait_drives(machine, SIZES["vdb"], SIZES["vdc"])
        machine.wait_screen("^USB: a host is connected", redraw="x")
        machine.wait_until(
            lambda: scsi(machine, host[0], ALLOW_MEDIUM_REMOVAL) == scsi(machine, host[0], EJECT) == "0"
        )
        wait_drives(machine, SIZES["vdc"])
        said = "USB: the host has ejected '/dev/vdb'; it comes back when the cable is plugged in again"
        service.wait_output(f"^{said}$")
        # Nothing else that happens puts it in again.
        machine.add_disk(Disk("late", size=4 * MIB))
        machine.wait_run("udevadm settle && ls /dev/vde")
        machine.remove_disk("late", timeout=120)
        assert set(drives(machine)) == {1}
        reconnect(machine)
        again = wait_drives(machine, SIZES["vdb"], SIZES["vdc"])
        assert digest(machine, again[0]) == content(machine, "vdb")
        screen = machine.wait_screen("^Ctrl-C stops", redraw="x")
        assert "has ejected" not in "\n".join(screen)


def test_host_sees_sixteen_disks(machine: Machine) -> None:
    """Of seventeen disks the host sees sixteen, and the other one is said to have no place."""
    images = [f"/run/{number}.img" for number in range(17)]
    machine.run(f"for i in {' '.join(images)}; do truncate -s 1M $i; done")
    arguments = [*USB, "--read-only", *images]
    service = Service(machine, arguments)
    service.start()
    assert set(wait_drives(machine, *16 * [MIB])) == set(range(16))
    refused = re.findall(
        r"^Not exporting '(.*)': no LUN is left; pull another disk$", service.output, re.MULTILINE
    )
    assert len(refused) == 1
    assert "Exporting 16 disks" in service.show("StatusText")
    # They keep their drives over a crash.
    killed(machine, service)
    service = Service(machine, arguments)
    service.start()
    assert set(drives(machine)) == set(range(16))
    assert f"Not exporting '{refused[0]}': no LUN is left; pull another disk\n" in service.output
    assert "USB disconnect" not in kernel_log(machine)
    service.stop()
    assert gadgets(machine) == []


def test_controller_of_others_is_left_alone(machine: Machine) -> None:
    """A gadget of another program keeps the only controller; once there is one, the disks are there."""
    usb = [*USB, "/dev/vdb"]
    steps = json.loads(machine.run([TOOL, *usb, "--dry-run", "--json"]).stdout)
    (bound,) = (s for s in steps if s["step"] == "bind")
    assert (bound["path"], bound["value"]) == (f"{GADGET}/UDC", "dummy_udc.0")
    (inserted,) = (s for s in steps if s["step"] == "insert")
    assert inserted["path"] == f"{GADGET}/functions/mass_storage.0/lun.0/file"
    with card_reader(machine), exporting(machine, *usb) as service:
        service.wait_output(
            "^The USB device controller is used by the gadget 'reader': no disk can be attached by USB yet$"
        )
        assert service.show("StatusText").startswith("Exporting 1 disk at USB (in use).")
        assert machine.run(f"cat {GADGETS}/reader/UDC").stdout == "dummy_udc.0\n"
        assert drives(machine) == {}
        machine.run(f"echo >{GADGETS}/reader/UDC")
        wait_drives(machine, SIZES["vdb"])
    wait_drives(machine)
    machine.run("modprobe -r dummy_hcd")
    with exporting(machine, *usb) as service:
        said = "This machine has no USB device controller: no disk can be attached by USB yet"
        service.wait_output(f"^{said}$")
        for _ in range(2):
            machine.run("modprobe dummy_hcd")
            (drive,) = wait_drives(machine, SIZES["vdb"]).values()
            assert digest(machine, drive) == content(machine, "vdb")
            machine.run("modprobe -r dummy_hcd")
        machine.run("modprobe dummy_hcd")
        wait_drives(machine, SIZES["vdb"])
    wait_drives(machine)


def test_both_transports_have_what_is_only_read(machine: Machine) -> None:
    """Read-only a disk is there over both transports; what can be written to, over the first one alone."""
    options = ("--transport=nvme-tcp,usb", f"--nqn={NQN}", "--access=/dev/vdc:read-write")
    with exporting(machine, *options, "/dev/vdb", "/dev/vdc") as service:
        host = wait_drives(machine, SIZES["vdb"])
        (drive,) = host.values()
        assert drive.read_only
        output = service.output
        assert re.search(
            r"^Exporting '/dev/vdb' .* read-only\) as quux\.vdb and USB LUN \d$", output, re.MULTILINE
        )
        assert (
            "Failed to export '/dev/vdc': not over usb, since it can be written to and is exported over "
            "nvme-tcp: only one of these goes through the page cache; see --read-only\n"
        ) in output
        assert re.search(r"^Exporting '/dev/vdc' .* read-write\) as quux\.vdc$", output, re.MULTILINE)
        with attached(machine, f"{NQN}.vdb", PORT, "127.0.0.1") as attachment:
            node = Drive(attachment.node.removeprefix("/dev/"), 0, True, "")
            assert digest(machine, node) == digest(machine, drive) == content(machine, "vdb")
        with attached(machine, f"{NQN}.vdc", PORT, "127.0.0.1") as attachment:
            machine.run(f"dd if=/dev/urandom of={attachment.node} bs=1M count=1 oflag=direct conv=fsync")
            after = digest(machine, Drive(attachment.node.removeprefix("/dev/"), 0, True, ""))
    wait_drives(machine)
    assert content(machine, "vdc") == after
    assert left_over(machine) == []


def test_crash_or_failure_at_every_step_is_recovered(machine: Machine) -> None:
    """Killed or refused at each step, while a host has the drives."""
    bench.install(machine)
    machine.put("/run/harness/crash.py", CRASH)
    arguments = ["SIGKILL,EIO", "/usr/local/bin/storagetm", *USB, "/dev/vdb"]
    process = machine.start_process(
        ["env", f"CONFIGFS_PART={GADGETS}", "python3", "/run/harness/crash.py", *arguments]
    )
    assert process.wait(3000) == 0, process.output
    print(process.output)
    result = json.loads(process.output.splitlines()[-1])
    assert result["wrong"] == []
    for kind in ("SIGKILL", "EIO"):
        for call, least in LEAST.items():
            assert result["counts"][f"{call} {kind}"] >= least
    assert gadgets(machine) == []
