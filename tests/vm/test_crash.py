# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed at any moment, disturbed at any step, or not alone: configfs is right afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.machine import Disk, Machine
from tests.programs import bench
from tests.vm import nvmet
from tests.vm.conftest import TOOL, BootMachine
from tests.vm.disks import card_reader, expected_uuid, uuids, wait_name
from tests.vm.initiator import Reader, attached, where, write_content
from tests.vm.nvmet import NVMET, Service, exporting, left_over

SCRIPT = Path(__file__).parent / "guest/crash.py"
EARLIER = Path(__file__).parent / "guest/storagetm-earlier"
INSTALLED = "/usr/local/bin/storagetm"
KILLS = 3
SIZE = 4 << 20  # of a disk that is read, in bytes

# One disk takes so many steps at least: two ports, a subsystem and a namespace with their attributes, and
# the notes about them.
LEAST = {"mkdir": 6, "symlink": 3, "write": 20, "rmdir": 5, "unlink": 4, "ioctl": 4}
LEAST_SHARED = {"mkdir": 5, "symlink": 2, "write": 20, "rmdir": 4, "unlink": 3}

# Somebody else's export, under a name and a number that the tool does not want.
MAKE_FOREIGN = f"""
modprobe -a nvmet-tcp dm-mod && truncate -s 1M /run/foreign.img && cd {NVMET}
s=subsystems/nqn.2020-01.org.example:foreign
mkdir $s $s/namespaces/7 ports/7
echo 1 >$s/attr_allow_any_host
echo /run/foreign.img >$s/namespaces/7/device_path && echo 1 >$s/namespaces/7/enable
cd ports/7 && echo tcp >addr_trtype && echo ipv4 >addr_adrfam && echo 127.0.0.1 >addr_traddr
echo 7777 >addr_trsvcid && ln -s {NVMET}/$s subsystems/
"""
REMOVE_FOREIGN = f"""
cd {NVMET}
rm ports/7/subsystems/*; rmdir ports/7
s=subsystems/nqn.2020-01.org.example:foreign; rmdir $s/namespaces/7 $s
"""


@pytest.fixture(autouse=True)
def clean(target: Machine) -> Iterator[None]:
    """Takes away what a test leaves that ends half-way, with the tool just killed."""
    before = nvmet.names(target)
    yield
    if left := nvmet.names(target) - before:
        target.run("systemctl stop 'test-*.service'; systemctl reset-failed 'test-*.service'", check=False)
        nvmet.remove(target, *(nvmet.names(target) & left))
        target.run("rm -f /run/storagetm/*.entries")


@pytest.fixture
def foreign(target: Machine) -> Iterator[None]:
    target.run(MAKE_FOREIGN)
    yield
    target.run(REMOVE_FOREIGN)


def names_for(machine: Machine, *arguments: str) -> tuple[str, dict[str, int]]:
    """The prefix that the tool uses in a machine, and its port for each address family."""
    steps = json.loads(machine.run([TOOL, "--dry-run", "--json", *arguments]).stdout)
    prefix = (
        next(s["path"] for s in steps if "/subsystems/nqn" in s["path"]).split("/")[6].rpartition(".")[0]
    )
    ports = {s["value"]: int(s["path"].split("/")[6]) for s in steps if s["path"].endswith("/addr_adrfam")}
    return prefix, ports


def inodes(machine: Machine) -> dict[str, str]:
    """The inode of each subsystem and port: another one was made anew."""
    lines = machine.run(
        f"cd {NVMET} && stat -c '%n %i' subsystems/* ports/*", check=False
    ).stdout.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("where", ["some", "newer", "older", "shared"])
def test_crash_or_failure_at_every_step_is_recovered(target: Machine, boot: BootMachine, where: str) -> None:
    """Killed or refused at each step, beside somebody else's export.

    With a shared subsystem, only what is different there: it is killed, and there is nothing that makes a
    disk read-only. All steps take ten minutes, so each run has some of them.
    """
    machine, command, counts = target, [INSTALLED], LEAST
    kinds: tuple[str, ...] = ("SIGKILL", "EIO")
    if where in ("older", "shared"):
        image = "bookworm" if where == "older" else None
        machine = boot("other", image=image, disks=[Disk("first", serial="DISK-1")])
        machine.run(MAKE_FOREIGN)
    if where == "shared":
        command = ["SIGKILL", INSTALLED, "--subsystem=shared", "--read-write"]
        kinds, counts = ("SIGKILL",), LEAST_SHARED
    bench.install(machine)
    machine.put("/run/harness/crash.py", SCRIPT)
    every = 9 if where == "some" else 1
    words = ["env", f"CRASH_EVERY={every}", "python3", "/run/harness/crash.py", *command, "/dev/vdb"]
    process = machine.start_process(words)
    assert process.wait(3000) == 0, process.output
    print(process.output)
    result = json.loads(process.output.splitlines()[-1])
    assert result["wrong"] == []
    assert sum(result["counts"].values()) >= 2 * sum(counts.values()) // every
    for kind in kinds if every == 1 else ():
        for call, least in counts.items():
            assert result["counts"][f"{call} {kind}"] >= least


def killed(service: Service) -> None:
    """Kills the tool in the middle of things."""
    service.kill("KILL")
    service.machine.wait_run(f"systemctl is-failed --quiet {service.unit}")
    service.machine.run(f"systemctl reset-failed {service.unit}")


def test_reader_does_not_notice_a_crash(target: Machine, client: Machine, tmp_path: Path) -> None:
    """A client that reads notices neither the tool's death nor its return, only what changed meanwhile."""
    path = tmp_path / "read.raw"
    write_content(path, 3, SIZE)
    target.add_disk(Disk("read", path=path, serial="DISK-READ"))
    try:
        node = f"/dev/{wait_name(target, 'DISK-READ')}"
        target.run("udevadm settle --timeout=120")
        service = Service(target, ["--all"])
        before = service.start()
        wanted, numbers = nvmet.tree(target), inodes(target)
        with attached(client, *where(wanted, node)) as attachment:
            reader = Reader(client, attachment.node, 3, SIZE)
            reader.wait_progress()
            for _ in range(KILLS):
                killed(service)
                reader.wait_progress()  # the kernel needs nobody for that
                service = Service(target, ["--all"])
                service.start()
                assert nvmet.tree(target) == wanted
                assert inodes(target) == numbers
                reader.wait_progress()
            killed(service)
            target.resize_disk("read", 2 * SIZE)
            service = Service(target, ["--all"])
            service.start()
            client.wait_run(f"[ $(blockdev --getsize64 {attachment.node}) = {2 * SIZE} ]")
            reader.wait_progress()
            result = reader.stop()
            attachment.check()
        assert service.stop() == before
    finally:
        target.remove_disk("read", timeout=120)
    assert left_over(target) == []
    print(
        f"{KILLS + 1} times killed and started; the client read {result['size'] / 1e6:.0f} MB, "
        f"longest read {result['longest']:.2f} s."
    )


def test_earlier_version_is_taken_over(target: Machine, client: Machine, tmp_path: Path) -> None:
    """Killed with a client attached, and replaced: the client notices nothing, and all goes in the end.

    The earlier version had what stands between a disk and its export in one record with that.
    """
    path = tmp_path / "read.raw"
    write_content(path, 3, SIZE)
    target.add_disk(Disk("read", path=path, serial="DISK-READ"))
    arguments = ["--all", "--access=DISK-ALPHA:snapshot", "--access=DISK-BETA:read-write"]
    try:
        node = f"/dev/{wait_name(target, 'DISK-READ')}"
        target.run("udevadm settle --timeout=120")
        target.put("/run/harness/earlier.pyz", EARLIER, mode=0o755)
        service = Service(target, arguments, program="/run/harness/earlier.pyz")
        before = service.start()
        wanted, numbers, mappings = nvmet.tree(target), inodes(target), target.run("dmsetup table").stdout
        assert mappings.count("storagetm-") > 2
        with attached(client, *where(wanted, node)) as attachment:
            reader = Reader(client, attachment.node, 3, SIZE)
            reader.wait_progress()
            for _ in range(2):
                killed(service)
                reader.wait_progress()
                service = Service(target, arguments)
                service.start()
                assert nvmet.tree(target) == wanted
                assert inodes(target) == numbers
                assert target.run("dmsetup table").stdout == mappings
                reader.wait_progress()
            reader.stop()
            attachment.check()
        assert service.stop() == before
    finally:
        target.remove_disk("read", timeout=120)
    assert left_over(target) == []
    assert "storagetm-" not in target.run("dmsetup table").stdout


def test_second_instance_needs_another_prefix(target: Machine) -> None:
    """Only one has the say about what has the same prefix; others may work beside it."""
    with exporting(target, "/dev/vdb") as service:
        refused = target.run([TOOL, "/dev/vdc"], check=False)
        assert refused.returncode == 1
        assert f"process {service.pid};" in refused.stderr
        tree = nvmet.tree(target)
        with exporting(target, "--nqn=nqn.2020-01.org.example:beside", "/dev/vdc"):
            assert nvmet.exported(target) == {"vdb", "vdc"}
            both = nvmet.tree(target)
            assert {path: both.get(path) for path in tree} == tree
        assert nvmet.tree(target) == tree
    assert left_over(target) == []


@pytest.mark.usefixtures("foreign")
def test_what_others_have_is_left_alone(target: Machine) -> None:
    """What has the name, the number or the address that the tool wants is left alone, and told of."""
    prefix, ports = names_for(target, "/dev/vdb")
    nqn = f"{prefix}.vdb"
    target.run(
        f"cd {NVMET} && mkdir subsystems/{nqn} subsystems/{nqn}/namespaces/3 ports/{ports['ipv4']} && "
        "mkdir ports/8 && cd ports/8 && "
        "echo tcp >addr_trtype && echo ipv6 >addr_adrfam && echo :: >addr_traddr && "
        f"echo {ports['ipv6']} >addr_trsvcid && "
        f"ln -s {NVMET}/subsystems/nqn.2020-01.org.example:foreign subsystems/"
    )
    try:
        before = nvmet.tree(target)
        named = target.run([TOOL, "/dev/vdb"], check=False)
        assert named.returncode == 1
        taken = f"Failed to export '/dev/vdb': another program made '{nqn}'"
        assert taken in named.stderr
        assert nvmet.tree(target) == before

        with exporting(target, "--all") as service:
            during = nvmet.tree(target)
            assert {path: during.get(path) for path in before} == before
            exported = nvmet.exported(target)
            assert "vdb" not in exported
            assert {"vdc", "sda", "nvme0n1"} <= exported
            lines = service.output
            assert taken in lines
            for family, number in (("IPv4", ports["ipv4"]), ("IPv6", ports["ipv6"])):
                assert re.search(rf"Port {number} is taken, using \d+ for {family}", lines)
        assert nvmet.tree(target) == before
    finally:
        nvmet.remove(target, f"ports/{ports['ipv4']}", "ports/8", f"subsystems/{nqn}")
    assert left_over(target) == []


def test_what_was_replaced_while_dead_is_told(target: Machine) -> None:
    """The next start tells what is still there from what came under the same name."""
    target.run("truncate -s 4M /run/first.card; truncate -s 4M /run/second.card")
    disks = [Disk(name, serial=f"DISK-{name}", bus="scsi") for name in ("stays", "goes")]
    for disk in disks:
        target.add_disk(disk)
    with card_reader(target) as reader:
        reader.insert("/run/first.card")
        names = [wait_name(target, f"DISK-{d.id}") for d in disks]
        card = Path(reader.node).name
        target.wait_run(f"[ $(cat /sys/block/{card}/size) != 0 ] && udevadm settle --timeout=120")
        service = Service(target, ["--all"])
        before = service.start()
        target.wait_until(lambda: {*names, card} <= nvmet.exported(target))
        tree, numbers = nvmet.tree(target), inodes(target)
        prefix = next(iter(n for n in numbers if n.endswith(f".{card}"))).rpartition(".")[0]

        killed(service)
        target.remove_disk("goes", timeout=120)
        target.add_disk(Disk("comes", serial="DISK-comes", bus="scsi"))
        # The kernel was told not to look for media by itself.
        reader.eject()
        target.wait_run(f"! head -c 1 {reader.node} >/run/byte")
        reader.insert("/run/second.card")
        new = wait_name(target, "DISK-comes")
        target.wait_run(f"head -c 1 {reader.node} >/run/byte && udevadm settle --timeout=120")
        # The kernel's exports outlive the tool, and the disks behind them.
        assert inodes(target) == numbers

        service = Service(target, ["--all"])
        service.start()
        target.wait_until(lambda: {names[0], new, card} <= nvmet.exported(target))
        exported = uuids(target)
        expected = {
            expected_uuid(target, f"0QEMU_QEMU_HARDDISK_DISK-{n}"): n for n in ("stays", "comes", "goes")
        }
        assert {expected[u]: node for u, node in exported.items() if u in expected} == {
            "stays": f"/dev/{names[0]}",
            "comes": f"/dev/{new}",
        }
        now = inodes(target)
        changed = {name for name in numbers | now if numbers.get(name) != now.get(name)}
        assert changed == {f"{prefix}.{n}" for n in (names[1], new, card)}
        assert {p: v for p, v in nvmet.tree(target).items() if f".{names[0]}/" in p} == {
            p: v for p, v in tree.items() if f".{names[0]}/" in p
        }
        assert service.stop() == before
    for disk_id in ("stays", "comes"):
        target.remove_disk(disk_id, timeout=120)
    assert left_over(target) == []


def test_stale_notes_harm_nobody(target: Machine) -> None:
    """What the notes of a crash tell of was removed by hand meanwhile, or is somebody else's by now."""
    devices = ["/dev/vdb", "/dev/vdc", "/dev/vdd"]
    prefix, _ = names_for(target, "/dev/vdb")
    service = Service(target, devices)
    before = service.start()
    wanted = nvmet.tree(target)
    killed(service)
    ours = nvmet.names(target) - before
    nvmet.remove(target, *ours)
    assert nvmet.names(target) == before
    service = Service(target, devices)
    service.start()
    assert nvmet.tree(target) == wanted

    # This time half of one is gone, and another one's name was given to something else.
    killed(service)
    gone, taken = f"subsystems/{prefix}.vdb", f"subsystems/{prefix}.vdc"
    target.run(f"cd {NVMET} && rmdir {gone}/namespaces/* && rm ports/*/{taken}")
    nvmet.remove(target, taken)
    target.run(f"cd {NVMET} && mkdir {taken} {taken}/namespaces/1 && echo theirs >{taken}/attr_serial")
    service = Service(target, ["--all"])
    service.start()
    tree = nvmet.tree(target)
    assert tree[f"{taken}/attr_serial"].rstrip() == "theirs"
    assert tree[f"{taken}/namespaces/1/enable"] == "0\n"
    assert {p: v for p, v in tree.items() if p.startswith(f"{gone}/")} == {
        p: v for p, v in wanted.items() if p.startswith(f"{gone}/")
    }
    assert f"another program made '{prefix}.vdc'" in service.output
    assert service.stop() == before | {taken}
    nvmet.remove(target, taken)
    assert left_over(target) == []


def test_machine_stays_awake(target: Machine) -> None:
    """logind has a lock from the start to the stop. Where it does not run, nothing starts it."""
    locks = "systemd-inhibit --list --no-legend --no-pager"
    target.run("systemctl unmask systemd-logind")
    try:
        service = Service(target, ["--nqn=quux", "/dev/nvme0n1"])
        before = service.start()
        killed(service)
        assert target.run("systemctl is-active systemd-logind", check=False).stdout == "inactive\n"
        service = Service(target, ["--nqn=quux", "/dev/nvme0n1"])
        target.run("systemctl start systemd-logind")
        service.start()
        lock = target.wait_run(f"{locks} | grep storagetm").stdout
        assert re.search(r"\ssleep:idle:handle-lid-switch\s.*\sblock$", lock)
        assert target.run("systemctl suspend", check=False).returncode
        assert service.stop() == before
        target.wait_run(f"! {locks} | grep storagetm")
        assert "awake" not in service.output
    finally:
        target.run("systemctl stop systemd-logind && systemctl mask systemd-logind")
