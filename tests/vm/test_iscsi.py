# SPDX-License-Identifier: LGPL-2.1-or-later
"""iSCSI, with open-iscsi on another machine."""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.images import Image
from tests.harness.machine import MIB, Disk, Machine, Process
from tests.programs import bench
from tests.vm.conftest import BootMachine
from tests.vm.disks import hang, throttle, wait_name
from tests.vm.initiator import TARGET_ADDRESS
from tests.vm.nvmet import Service, exporting, left_over
from tests.vm.test_nbd import steady_screen

GUEST = Path(__file__).parent / "guest"
TARGETS = "/sys/kernel/config/target"
NQN = "quux"
ISCSI = ("--transport=iscsi", f"--nqn={NQN}")
DISKS = ("/dev/vdb", "/dev/vdc")
CODE = "k7fm-2qxd-9wtr-4hcn"

# Prints LUN, name, size in bytes, 1 for read-only, serial number and character device of each disk that is
# there by iSCSI.
LUNS_SCRIPT = r"""
for b in /sys/block/sd*; do
    d=$(realpath $b/device) || continue
    case $d in */session*) ;; *) continue ;; esac
    echo ${d##*:} ${b##*/} $(($(cat $b/size) * 512)) $(cat $b/ro) \
        $(tail -c +5 $d/vpd_pg80 | tr -d '\0') $(ls $d/scsi_generic)
done
true
"""

# What a client may send to change what is on a disk, or what others get of it (SBC, SPC), with the number of
# bytes that come with it; and the sense keys that say that it was not done.
NOT_READY, ILLEGAL_REQUEST, DATA_PROTECT, MISCOMPARE = "2", "5", "7", "14"
HOSTILE = {
    "WRITE (6)": ("0a0000080100", 512),
    "WRITE (10)": (f"2a00{8:08x}00000100", 512),
    "WRITE (10), FUA": (f"2a08{8:08x}00000100", 512),
    "WRITE (12)": (f"aa00{8:08x}{1:08x}0000", 512),
    "WRITE (16)": (f"8a00{8:016x}{1:08x}0000", 512),
    "WRITE AND VERIFY (10)": (f"2e00{8:08x}00000100", 512),
    "WRITE AND VERIFY (16)": (f"8e00{8:016x}{1:08x}0000", 512),
    "WRITE SAME (10)": (f"4100{8:08x}00000100", 512),
    "WRITE SAME (16)": (f"9300{8:016x}{1:08x}0000", 512),
    "WRITE SAME (16), UNMAP": (f"9308{8:016x}{1:08x}0000", 512),
    "WRITE SAME (16), NDOB": (f"9301{8:016x}{1:08x}0000", 0),
    "UNMAP": ("42000000000000001800", 24),
    "COMPARE AND WRITE": (f"8900{8:016x}000000010000", 1024),
    "ORWRITE (16)": (f"8b00{8:016x}{1:08x}0000", 512),
    "XDWRITEREAD (10)": (f"5300{8:08x}00000100", 512),
    "WRITE ATOMIC (16)": (f"9c00{8:016x}000000010000", 512),
    "EXTENDED COPY": (f"83000000000000000000{16 + 28 * 3:08x}0000", 16 + 28 * 3),
    "FORMAT UNIT": ("040000000000", 0),
    "SANITIZE": ("48020000000000000000", 0),
    "MODE SELECT (10)": ("55100000000000000800", 8),
    "PERSISTENT RESERVE OUT": ("5f000000000000001800", 24),
    "WRITE BUFFER": ("3b020000000000020000", 512),
    "WRITE LONG (10)": (f"3f00{8:08x}00020000", 512),
}


class Lun(NamedTuple):
    """What a client sees of a disk."""

    name: str
    size: int
    read_only: bool
    serial: str
    generic: str

    @property
    def node(self) -> str:
        return f"/dev/{self.name}"


def luns(machine: Machine) -> dict[int, Lun]:
    """The disks that a machine has by iSCSI, by LUN."""
    found = {}
    for line in machine.run(LUNS_SCRIPT).stdout.splitlines():
        fields = line.split()
        if len(fields) == 6:  # not while one comes or goes
            lun, name, size, ro, serial, generic = fields
            found[int(lun)] = Lun(name, int(size), ro == "1", serial, generic)
    return found


def wait_luns(machine: Machine, count: int) -> dict[str, Lun]:
    """Waits until there are so many disks; by the beginning of their serial numbers."""
    machine.wait_until(lambda: len(luns(machine)) == count)
    return {re.sub(r"-[0-9a-f]{16}$", "", lun.serial): lun for lun in luns(machine).values()}


def small_disk(target: Machine) -> str:
    """The smallest disk that the target has, of which all bytes are soon compared."""
    return target.run("readlink -f /dev/disk/by-id/*DISK-SCSI*").stdout.split()[0]


def digest(machine: Machine, node: str) -> str:
    """Of all that is on a disk, past the page cache."""
    return machine.run(f"dd if={node} bs=1M iflag=direct status=none | sha256sum").stdout.split()[0]


def commands(service: Service) -> list[str]:
    """The commands for open-iscsi that a run has told."""
    service.wait_output(r"Attach all disks with: iscsiadm")
    return re.findall(r"^Attach all disks with: (iscsiadm .*)", service.output, re.MULTILINE)


def attach(client: Machine, service: Service) -> None:
    """Attaches all disks at the first address."""
    client.run(next(c for c in commands(service) if f" {TARGET_ADDRESS}:" in c))


def parts(machine: Machine) -> str:
    """All targets and backstores that there are."""
    return machine.run(f"find {TARGETS}/core/iblock_* {TARGETS}/iscsi/iqn* -type d", check=False).stdout


def reading(machine: Machine, node: str) -> Process:
    """Reads a disk again and again, until that fails; then the process ends."""
    script = f"while dd if={node} of=/dev/null bs=64k iflag=direct status=none; do echo read; done"
    process = machine.start_process(script)
    process.wait_output("read")
    return process


def wait_read(process: Process) -> None:
    """Waits until it has read all of it once more."""
    seen = process.output.count("read")
    process.machine.wait_until(lambda: process.output.count("read") > seen + 1 or process.poll() is not None)
    assert process.poll() is None, process.output


@pytest.fixture
def initiator(client: Machine) -> Iterator[Machine]:
    client.run("systemctl start iscsid; modprobe sg")
    client.put("/run/scsi.py", GUEST / "scsi.py")
    yield client
    client.run("iscsiadm -m session -u; iscsiadm -m node -o delete; systemctl stop iscsid", check=False)


def on_screen(target: Machine, pattern: str, key: str = "x") -> str:
    """The screen once it has that, with each command in one line. A blank as key turns pages."""
    target.wait_screen(pattern, redraw=key)
    return re.sub(r" *[\\`]\n +", " ", "\n".join(line.rstrip() for line in steady_screen(target, pattern)))


def test_command_on_the_screen_attaches_all_disks(target: Machine, initiator: Machine) -> None:
    """Read-only; each says who it is; and the stop ends the session, and waits for no reader."""
    with exporting(target, *ISCSI, "--console", *DISKS) as service:
        screen = on_screen(target, r"Connect-IscsiTarget(.*\n)+ +\(on Windows")
        (line,) = (c for c in re.findall(r"^  (iscsiadm .*)", screen, re.MULTILINE) if TARGET_ADDRESS in c)
        (windows,) = re.findall(r"^  (Start-Service msiscsi; .*)", screen, re.MULTILINE)
        (iqn,) = set(re.findall(r"iqn\.2023-10\.io\.systemd:quux-[0-9a-f]{8}\.\w{4}", screen))
        assert windows.endswith(
            f"New-IscsiTargetPortal -TargetPortalAddress {TARGET_ADDRESS} -TargetPortalPortNumber 3260; "
            f"Connect-IscsiTarget -N {iqn}"
        )
        initiator.run(line)
        found = wait_luns(initiator, 2)
        assert found.keys() == {"DISK-ALPHA", "DISK-BETA"}
        for lun, node in zip((found["DISK-ALPHA"], found["DISK-BETA"]), DISKS):
            assert lun.read_only
            assert digest(initiator, lun.node) == digest(target, node)
            assert initiator.run(f"echo x | dd of={lun.node} conv=fsync", check=False).returncode
            service.wait_output(rf"^Exporting '{node}' .*{lun.serial}.* as iSCSI LUN \d+ of {iqn}$")
        names = initiator.run("udevadm settle; ls /dev/disk/by-id").stdout
        assert len(re.findall(r"^wwn-0x6001405", names, re.MULTILINE)) == 2
        discovered = initiator.run(f"iscsiadm -m discovery -t st -p {TARGET_ADDRESS}").stdout
        assert discovered == f"{TARGET_ADDRESS}:3260,1 {iqn}\n"
        on_screen(target, re.escape("192.0.2.2: since "))
        reader = reading(initiator, found["DISK-ALPHA"].node)
    assert parts(target) == ""
    assert left_over(target) == []
    initiator.run("iscsiadm -m session -u")
    reader.wait(120)


def test_link_local_line_works(target: Machine, initiator: Machine) -> None:
    with exporting(target, *ISCSI, DISKS[0]) as service:
        (line,) = (c for c in commands(service) if "%INTERFACE" in c)
        initiator.run(line.replace("INTERFACE", "eth0"))
        found = wait_luns(initiator, 1)
        assert digest(initiator, found["DISK-ALPHA"].node) == digest(target, DISKS[0])
        initiator.run("iscsiadm -m session -u")


@pytest.mark.parametrize("more", [(), ("--clients=any", f"--access={DISKS[0]}:snapshot")])
def test_raw_commands_change_no_byte(target: Machine, initiator: Machine, more: Sequence[str]) -> None:
    """Nothing that SCSI has gets through to a disk that is read-only, nor keeps others from reading it.

    Beside one that can be written to, the kernel lets through what our device over the disk refuses.
    """
    node = small_disk(target)
    before = digest(target, node)
    with exporting(target, *ISCSI, *more, node, DISKS[0]) as service:
        attach(initiator, service)
        lun = wait_luns(initiator, 2)["DISK-SCSI"]
        # Past the host's own protection.
        script = "; ".join(
            f"python3 /run/scsi.py /dev/{lun.generic} {cdb} {count} 2>&1" for cdb, count in HOSTILE.values()
        )
        answers = dict(zip(HOSTILE, initiator.run(script, check=False).stdout.split("\n")))
        refused = (ILLEGAL_REQUEST, *((NOT_READY, MISCOMPARE) if more else (DATA_PROTECT,)))
        assert {name: key for name, key in answers.items() if key not in refused} == {}
        assert answers["WRITE (10)"] == (NOT_READY if more else DATA_PROTECT)
        # The old kind of reservation carries no data, and goes with the session.
        initiator.run(f"python3 /run/scsi.py /dev/{lun.generic} 160000000000", check=False)
        assert digest(initiator, lun.node) == before
        initiator.run("iscsiadm -m session -u")
    assert digest(target, node) == before


@pytest.mark.parametrize("access", ["snapshot", "read-write"])
def test_what_clients_write(target: Machine, initiator: Machine, access: str) -> None:
    """It is on the disk, or forgotten. That many clients might write has to be asked for."""
    node = small_disk(target)
    before = digest(target, node)
    service = Service(target, [*ISCSI, f"--{access}", node])
    with pytest.raises(Exception, match="see --clients=any"):
        service.start()
    with exporting(target, *ISCSI, f"--{access}", "--clients=any", node) as service:
        attach(initiator, service)
        lun = wait_luns(initiator, 1)["DISK-SCSI"]
        assert not lun.read_only
        initiator.run(f"echo from the client | dd of={lun.node} seek=8 oflag=direct conv=sync,fsync")
        seen = digest(initiator, lun.node)
        # The serial number of the disk itself is in front.
        assert lun.serial.startswith("DISK-SCSI-")
        initiator.run("iscsiadm -m session -u")
    assert digest(target, node) == (before if access == "snapshot" else seen)
    assert seen != before
    assert parts(target) == ""


def test_disks_come_grow_and_go_and_a_kill_beside_a_reader(target: Machine, initiator: Machine) -> None:
    """The session goes on, whatever becomes of others, and of the program."""
    arguments = [*ISCSI, "--all"]
    service = Service(target, arguments)
    service.start()
    attach(initiator, service)
    initiator.wait_until(lambda: len(luns(initiator)) >= 4)
    before = luns(initiator)
    reader = reading(initiator, next(n.node for n in before.values() if n.serial.startswith("DISK-ALPHA")))
    target.add_disk(Disk("pulled", serial="DISK-PULLED", size=8 * MIB))
    try:
        (number,) = service.wait_output(r"DISK-PULLED-.* as iSCSI LUN (\d+) of").groups()
        assert int(number) not in before
        initiator.run("iscsiadm -m session -R")
        initiator.wait_until(lambda: int(number) in luns(initiator))
        target.resize_disk("pulled", 12 * MIB)
        service.wait_output(rf"has {12 * MIB} bytes")
        initiator.run("iscsiadm -m session -R")
        initiator.wait_until(lambda: luns(initiator)[int(number)].size == 12 * MIB)
        service.kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {service.unit}")
        was = parts(target)
        wait_read(reader)
        service = Service(target, arguments)
        service.start()
        assert parts(target) == was
        busy = reading(initiator, luns(initiator)[int(number)].node)
    finally:
        target.remove_disk("pulled")
    service.wait_output(r"^No longer: Exporting .*DISK-PULLED")
    busy.wait(120)
    wait_read(reader)
    initiator.run("iscsiadm -m session -u")
    reader.wait(120)
    service.stop()
    assert parts(target) == ""


def test_session_does_not_go_on_after_another_boot(target: Machine, initiator: Machine) -> None:
    """A client takes it for granted that a LUN is what it was: then, it is another target."""
    boot = "/proc/sys/kernel/random/boot_id"
    with exporting(target, *ISCSI, DISKS[0]) as service:
        (name,) = service.wait_output(r"as iSCSI LUN \d+ of (\S+)").groups()
        attach(initiator, service)
        wait_luns(initiator, 1)
    target.run(f"cat /proc/sys/kernel/random/uuid >/run/boot && mount --bind /run/boot {boot}")
    try:
        with exporting(target, *ISCSI, DISKS[0]) as service:
            (other,) = service.wait_output(r"as iSCSI LUN \d+ of (\S+)").groups()
            assert other != name
            initiator.wait_run(
                "journalctl -u iscsid | tail -n 5 | grep -qi 'login rejected\\|not found\\|0203'"
            )
            assert "LOGGED_IN" not in initiator.run("iscsiadm -m session -P 1").stdout
    finally:
        target.run(f"umount {boot}")
    with exporting(target, *ISCSI, DISKS[0]) as service:
        assert service.wait_output(r"as iSCSI LUN \d+ of (\S+)").group(1) == name
        initiator.wait_run("iscsiadm -m session -P 1 | grep LOGGED_IN")
        assert digest(initiator, next(iter(luns(initiator).values())).node) == digest(target, DISKS[0])
        initiator.run("iscsiadm -m session -u")


def test_only_who_has_the_code_gets_in(target: Machine, initiator: Machine) -> None:
    """By CHAP in both directions, with what the screen shows; which no log and no other user has."""
    target.run(f"umask 077; echo {CODE} >/run/code")
    arguments = [*ISCSI, "--code-file=/run/code", *DISKS]
    refused = Service(target, arguments)
    with pytest.raises(Exception, match="iSCSI is not encrypted"):
        refused.start()
    with exporting(target, *arguments, "--encrypt=no", "--console") as service:
        screen = on_screen(target, r"password_in -v \w{16}(.*\n)*.* -l$")
        lines = [c for c in re.findall(r"^  (iscsiadm .*)", screen, re.MULTILINE) if TARGET_ADDRESS in c]
        new, update, login = lines
        secrets = re.findall(r"password(?:_in)? -v (\w{16})", update)
        assert len(set(secrets)) == 2
        # On another page.
        windows = on_screen(target, r"Set-IscsiChapSecret .*(\n.*)*\n +-ChapSecret \w{16}\n +\(on", " ")
        assert set(re.findall(r"-ChapSecret (\w+)", windows)) == set(secrets)
        initiator.run(new)
        for wrong in ("", update.replace(secrets[0], "x" * 16), update.replace(secrets[1], "x" * 16)):
            failed = initiator.run(f"{wrong or 'true'}; {login}", check=False)
            assert failed.returncode
            assert "login fail" in failed.stderr
        initiator.run(f"{update} && {login}")
        found = wait_luns(initiator, 2)
        assert digest(initiator, found["DISK-ALPHA"].node) == digest(target, DISKS[0])
        initiator.run("iscsiadm -m session -u")
        modes = target.run(f"stat -c '%a %n' {TARGETS}/iscsi/*/tpgt_1/auth/password*").stdout
        assert re.findall(r"^\d+", modes, re.MULTILINE) == ["600", "600"]
        assert not any(secret in service.output for secret in (*secrets, CODE))
        seen = target.run(f"cat /proc/{service.pid}/cmdline /run/storagetm/*.entries").stdout
        assert not any(secret in seen for secret in secrets)
    target.run("rm /run/code")


def test_targets_of_others_are_left_alone(target: Machine, initiator: Machine) -> None:
    """One that another program has, with the port and what applies to the whole machine."""
    theirs, name = f"{TARGETS}/iscsi", "iqn.2001-04.com.example:theirs"
    target.run(
        f"""modprobe -a iscsi_target_mod target_core_iblock; mkdir -p {theirs}/{name}/tpgt_1
        mkdir {theirs}/{name}/tpgt_1/np/0.0.0.0:3260
        printf theirs >{theirs}/discovery_auth/userid; echo 1 >{theirs}/{name}/tpgt_1/enable"""
    )
    look = f"find {theirs}/{name} | sort; cat {theirs}/discovery_auth/userid {theirs}/{name}/tpgt_1/enable"
    before = target.run(look).stdout
    try:
        with exporting(target, *ISCSI, *DISKS) as service:
            service.wait_output(r"^TCP port 3260 is taken, using 3261 for iSCSI$")
            attach(initiator, service)
            wait_luns(initiator, 2)
            assert target.run(look).stdout == before
            initiator.run("iscsiadm -m session -u")
        assert target.run(look).stdout == before
    finally:
        target.run(
            f"""echo 0 >{theirs}/{name}/tpgt_1/enable; rmdir {theirs}/{name}/tpgt_1/np/*
            rmdir {theirs}/{name}/tpgt_1 {theirs}/{name}; printf NULL >{theirs}/discovery_auth/userid"""
        )


def test_disk_that_hangs_holds_up_no_other(target: Machine, initiator: Machine) -> None:
    """One is pulled while its driver owes answers: others come and go meanwhile."""
    target.add_disk(Disk("hung", serial="DISK-HUNG", size=32 * MIB))
    service = Service(target, [*ISCSI, "--all"])
    try:
        name = wait_name(target, "DISK-HUNG")
        service.start()
        service.wait_output(r"DISK-HUNG-.* as iSCSI LUN (\d+) of")
        attach(initiator, service)
        node = initiator.wait_until(
            lambda: next((x.node for x in luns(initiator).values() if "DISK-HUNG" in x.serial), "")
        )
        busy = hang(target, initiator, "hung", name, node)
        target.qmp.call("device_del", id="hung-device")
        # Not by the bus of the other, where the kernel waits as well.
        target.add_disk(Disk("next", serial="DISK-NEXT", size=8 * MIB, bus="scsi"))
        service.wait_output(r"DISK-NEXT-.* as iSCSI LUN (\d+) of")
        initiator.run("timeout 60 iscsiadm -m session -R", check=False)
        target.remove_disk("next")
        service.wait_output(r"^No longer: Exporting .*DISK-NEXT")
    finally:
        throttle(target, "hung", 0)
        target.qmp.wait_event("DEVICE_DELETED", 120, device="hung-device")
        target.qmp.call("blockdev-del", node_name="hung")
    busy.wait(120)
    initiator.run("iscsiadm -m session -u")
    service.stop()
    assert parts(target) == ""


def same_everywhere(client: Machine, service: Service, wanted: str, *, writers: Sequence[int] = ()) -> None:
    """Attaches a disk by NVMe/TCP, iSCSI and NBD; `writers` of these write in turn, and all see it."""
    (export,) = service.wait_output(r"NBD export (\S+)").groups()
    (nvme,) = service.wait_output(r"Attach all disks with: (nvme .*)").groups()
    client.run(f"modprobe nvme-tcp; modprobe nbd; {nvme}")
    client.run(f"nbd-client {TARGET_ADDRESS} 10809 /dev/nbd0 -N {export} -b 512")
    attach(client, service)
    try:
        (lun,) = wait_luns(client, 1).values()
        client.wait_run("ls /dev/nvme*n1")
        nodes = [client.run("ls /dev/nvme*n1").stdout.strip(), lun.node, "/dev/nbd0"]
        assert {digest(client, node) for node in nodes} == {wanted}
        for number in writers:
            place = 64 * number
            client.run("head -c 65536 /dev/urandom >/run/data")
            client.run(f"dd bs=4k status=none if=/run/data of={nodes[number]} seek={place} oflag=direct")
            for node in nodes:
                there = f"dd bs=4k status=none if={node} skip={place} count=16 iflag=direct"
                client.run(f"{there} | cmp - /run/data")
        assert len({digest(client, node) for node in nodes}) == 1
    finally:
        client.run("nvme disconnect-all; nbd-client -d /dev/nbd0; iscsiadm -m session -u", check=False)


def test_all_transports_have_the_same_bytes(target: Machine, initiator: Machine) -> None:
    """Read-only, and as one snapshot that can be written to over each."""
    node = small_disk(target)
    before = digest(target, node)
    every = "--transport=nvme-tcp,iscsi,nbd"
    with exporting(target, every, node) as service:
        same_everywhere(initiator, service, before)
    with exporting(target, every, "--snapshot", "--clients=any", node) as service:
        same_everywhere(initiator, service, before, writers=(0, 1, 2))
    assert digest(target, node) == before
    with exporting(target, every, "--snapshot", node) as service:
        service.wait_output(rf"'{node}' is not exported over iscsi: it can be written to")
        service.wait_output(r"not over nbd, since it can be written to and is exported over nvme-tcp")
    assert left_over(target) == []


# Of libiscsi's 238 tests, those that the kernel's target fails (Linux 6.12, libiscsi 1.20).
KNOWN = {
    # All persistent reservations: the kernel keeps them in files below /var/target, a directory that only
    # target-utils have, and refuses each where it cannot.
    **dict.fromkeys(("PrinReadKeys.Truncate", "PrinReportCapabilities.Simple", "ProutClear.Simple"), "PR"),
    **dict.fromkeys(
        ("ProutPreempt.RemoveRegistration", "ProutRegister.Simple", "ProutReserve.Simple"), "PR"
    ),
    **{
        f"ProutReserve.{what}{kind}": "PR"
        for what in ("Access", "Ownership")
        for kind in ("EA", "WE", "EARO", "WERO", "EAAR", "WEAR")
    },
    # What the disk discards at a time is more than the test thinks right.
    "Inquiry.BlockLimits": "UNMAP",
    # The kernel's target does not know these commands, or does not compare the bytes that come with them.
    "Sanitize.Readonly": "SANITIZE",
    **{f"Verify{n}.{kind}": "VERIFY" for n in (10, 16) for kind in ("Dpo", "Mismatch", "VerifyProtect")},
    **{f"iSCSIResiduals.WriteVerify{n}Residuals": "WRITE AND VERIFY" for n in (10, 16)},
}


@pytest.mark.reach
def test_machine_runs_from_a_disk_by_qemus_own_initiator(
    boot: BootMachine, images: dict[str, Image], standard: str
) -> None:
    """The root file system of a machine that has nothing but that is on another one's disk."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uplink = ["-netdev", f"user,id=up,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:3260"]
    uplink += ["-device", "virtio-net-pci,netdev=up,romfile="]
    system = Disk("system", path=images[standard].root, readonly=True, serial="SYSTEM")
    target = boot("store", disks=[system], qemu_options=uplink)
    target.run("ip link set eth0 up && ip address add 10.0.2.15/24 dev eth0")
    # What the other machine writes goes to memory.
    with exporting(target, *ISCSI, "--snapshot=256M", "--clients=any", "/dev/vdb") as service:
        found = service.wait_output(r"as iSCSI LUN (\d+) of (\S+)$")
        url = f"iscsi://127.0.0.1:{port}/{found[2]}/{found[1]}"
        drive = ["-drive", f"if=none,id=root,format=raw,file={url}"]
        drive += ["-device", "virtio-blk-pci,drive=root,serial=root"]
        diskless = boot("diskless", root_disk=False, qemu_options=drive)
        assert diskless.run("findmnt --noheadings --output SOURCE /").stdout == "/dev/vda\n"
        diskless.run("echo written >/var/tmp/file && sync && echo 3 >/proc/sys/vm/drop_caches")
        assert diskless.run("cat /var/tmp/file && find /usr/bin -type f | xargs cat | wc -c").stdout
        assert "I/O error" not in diskless.run("dmesg").stdout
        diskless.kill()


@pytest.mark.reach
def test_libiscsis_own_tests_fail_where_that_is_known_and_nowhere_else(
    target: Machine, initiator: Machine
) -> None:
    with exporting(target, *ISCSI, "--read-write", "--clients=any", DISKS[0]) as service:
        found = service.wait_output(r"as iSCSI LUN (\d+) of (\S+)$")
        url = f"iscsi://{TARGET_ADDRESS}/{found[2]}/{found[1]}"
        command = ["iscsi-test-cu", "--test=ALL", "--dataloss", "--allow-sanitize", url]
        output = initiator.run([*command], timeout=1500, check=False).stdout
    suite, test, failed, count = "", "", set(), 0
    for line in output.splitlines():
        if begins := re.match(r"Suite: (\S+)", line):
            suite = begins[1]
        if begins := re.match(r"  Test: (\S+) \.\.\.", line):
            test, count = begins[1], count + 1
        if re.search(r"(^|\.\.\.)FAILED$", line):
            failed.add(f"{suite}.{test}")
    assert count > 200, output[-2000:]
    assert failed == set(KNOWN)


@pytest.mark.parametrize("kinds", ["SIGKILL", "EIO"])
def test_crash_or_failure_at_every_step_is_recovered(target: Machine, kinds: str) -> None:
    bench.install(target)
    target.put("/run/harness/crash.py", GUEST / "crash.py")
    arguments = [kinds, "/usr/local/bin/storagetm", *ISCSI, DISKS[0]]
    process = target.start_process(
        ["env", f"CONFIGFS_PART={TARGETS}", "python3", "/run/harness/crash.py", *map(shlex.quote, arguments)]
    )
    assert process.wait(3000) == 0, process.output
    print(process.output)
    result = json.loads(process.output.splitlines()[-1])
    assert result["wrong"] == []
    for call, least in {"mkdir": 6, "symlink": 1, "write": 20, "rmdir": 6, "ioctl": 4}.items():
        assert result["counts"][f"{call} {kinds}"] >= least
    assert parts(target) == ""
