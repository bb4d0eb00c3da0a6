# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cannot work says why in one sentence, and leaves nothing behind; what can work does, with little."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import Image
from tests.harness.machine import Disk, Machine
from tests.vm.conftest import LOGS, TOOL, prepare
from tests.vm.nvmet import NVMET, exported, exporting, names, tree

GOOD = "/dev/nvme0n1"

# A disk that is missing, and so on: what makes it in the directory /root/bad, its name there or elsewhere,
# and what the tool says.
BAD_DEVICES = {
    "missing": ("", "missing", "No such file or directory"),
    "missing-node": ("", "/dev/vdz", "No such file or directory"),
    "not-a-directory": ("", "/dev/null/vda", "Not a directory"),
    "dangling-link": ("ln -s nowhere link", "link", "No such file or directory"),
    "loop-of-links": ("ln -s turning turning", "turning", "Too many levels of symbolic links"),
    "directory": ("", ".", "it is a directory, no block device or regular file"),
    "character-device": ("", "/dev/zero", "it is a character device, no block device or regular file"),
    "fifo": ("mkfifo fifo", "fifo", "it is something else, no block device or regular file"),
    "empty-drive": ("", "/dev/sr0", "No medium found; insert one and start again"),
    "node-left-over": ("mknod node b 240 77", "node", "No such device or address"),
    "empty-file": ("touch empty", "empty", "it has size 0"),
    "read-only-disk": (
        "blockdev --setro /dev/disk/by-id/virtio-DISK-BETA",
        "/dev/disk/by-id/virtio-DISK-BETA",
        "it is read-only, and was asked for read-write; see --read-only and --snapshot",
    ),
    "control-character": (
        "truncate -s 1M $'new\\nline'",
        "new\nline",
        "its name has control characters; rename it",
    ),
    "comma": (
        "truncate -s 1M a,b.img",
        "/root/bad/a,b.img",
        "its name has a comma, which no client can have in an NQN; rename it",
    ),
    "not-utf-8": (
        "truncate -s 1M $'\\xff'",
        "\udcff",
        "its name is not UTF-8, as an NQN has to be; rename it",
    ),
}


def refuse(machine: Machine, command: str, sentence: str, returncode: int = 1) -> None:
    """Asserts that a command ends with just this sentence, and leaves configfs alone."""
    before = names(machine)
    result = machine.run(command, check=False)
    assert result.stderr_bytes.decode("utf-8", "surrogateescape") == sentence + "\n"
    assert result.stdout == ""
    assert result.returncode == returncode
    assert names(machine) == before


@pytest.fixture(scope="module")
def bad_devices(target: Machine) -> Iterator[None]:
    target.run("modprobe nvmet-tcp; mkdir /root/bad")
    target.run("set -e; cd /root/bad;" + ";".join(make or "true" for make, _, _ in BAD_DEVICES.values()))
    yield
    target.run("rm -r /root/bad; blockdev --setrw /dev/disk/by-id/virtio-DISK-BETA")


@pytest.mark.usefixtures("bad_devices")
@pytest.mark.parametrize("kind", BAD_DEVICES)
def test_one_bad_device_keeps_all_from_being_exported(target: Machine, kind: str) -> None:
    """One bad device, behind one that could be exported, and isn't."""
    _, name, why = BAD_DEVICES[kind]
    written = {"not-utf-8": "$'\\xff'", "control-character": "$'new\\nline'"}.get(kind, shlex.quote(name))
    access = "--read-write" if kind == "read-only-disk" else "--read-only"
    refuse(target, f"cd /root/bad; {TOOL} {access} {GOOD} {written}", f"Failed to export '{name}': {why}")


def test_missing_permission_is_named(target: Machine) -> None:
    """Root without the power to read everything, as in a container or under a security module."""
    target.run("truncate -s 1M /run/secret; chown nobody: /run/secret; chmod 600 /run/secret")
    try:
        refuse(
            target,
            f"setpriv --bounding-set=-dac_override,-dac_read_search {TOOL} {GOOD} /run/secret",
            "Failed to export '/run/secret': Permission denied",
        )
    finally:
        target.run("rm /run/secret")


def test_only_root_can_export(target: Machine) -> None:
    sentence = "Only root can export disks; run it as root, or see what it would do with --dry-run"
    for arguments in ("--all", GOOD, "/dev/no-such-disk"):
        refuse(target, f"setpriv --reuid=nobody --clear-groups {TOOL} {arguments}", sentence)
    # It may look, though. A disk that it cannot open is in use as far as anybody knows.
    for arguments in ("--list-devices", "--all --dry-run", "--version", "--help"):
        result = target.run(f"setpriv --reuid=nobody --clear-groups {TOOL} {arguments}")
        assert result.stdout
        assert "Traceback" not in result.stderr
    steps = target.run(f"setpriv --reuid=nobody --clear-groups {TOOL} --all --dry-run --nqn=quux").stdout
    assert "subsystems/quux.nvme0n1" in steps
    assert "subsystems/quux.vda\n" not in steps
    assert not names(target)


def test_files_are_disks_like_any_other(target: Machine, client: Machine) -> None:
    """Files on ext4 and on tmpfs are disks like any other."""
    files = ["/var/tmp/file on ext4", "/run/file-on-tmpfs"]
    assert target.run("stat -f -c %T /var/tmp /run").stdout.split() == ["ext2/ext3", "tmpfs"]
    for file in files:
        target.run(f"head -c 1M /dev/urandom > {shlex.quote(file)}")
    digests = [target.run(f"sha256sum < {shlex.quote(file)}").stdout for file in files]
    client.run("modprobe nvme-tcp")
    try:
        with exporting(target, "--nqn=quux", "--read-write", *files):
            client.run("nvme connect-all -t tcp -a 192.0.2.1 -s 16858")
            client.wait_run("test $(ls /dev/nvme*n1 | wc -l) = 2")
            found = client.run("for disk in /dev/nvme*n1; do sha256sum < $disk; done").stdout
            assert sorted(found.splitlines()) == sorted("".join(digests).splitlines())
            client.run("for disk in /dev/nvme*n1; do printf written | dd of=$disk conv=fsync; done")
            client.run("nvme disconnect-all")
        for file in files:
            assert target.run(f"stat -c %s {shlex.quote(file)}; head -c 7 {shlex.quote(file)}").stdout == (
                "1048576\nwritten"
            )
    finally:
        client.run("nvme disconnect-all")
        target.run(["rm", *files])


def test_ipv4_does_where_ipv6_is_off_for_interfaces(target: Machine) -> None:
    """No IPv6 address on any interface: exports over IPv4, with the line for it."""
    target.run("sysctl -q net.ipv6.conf.all.disable_ipv6=1")
    try:
        with exporting(target, "--nqn=quux", GOOD) as service:
            assert exported(target) == {"nvme0n1"}
            service.wait_output("^Attach all disks with: nvme connect-all -t tcp -a 192.0.2.1 -s 16858$")
            assert service.show("StatusText") == "Exporting 1 disk at 1 address."
    finally:
        target.run("sysctl -q net.ipv6.conf.all.disable_ipv6=0; sysctl -q net.ipv6.conf.lo.disable_ipv6=0")
        target.wait_run("ip -6 address show dev eth0 | grep fe80::")


# From here on: a machine where things are missing.

FIRMWARE_ID = "8e1b5a3c-66f0-4c4d-9f0a-2b7d1c9e4f55"


@pytest.fixture(scope="module")
def bare(images: dict[str, Image], tool: Path) -> Iterator[Machine]:
    """A machine without a network adapter, and without IPv6 in its kernel.

    The NVMe target's modules are not loaded, and configfs is not mounted.
    """
    machine = Machine(
        "bare",
        images["trixie"],
        disks=[
            Disk("alpha", serial="DISK-ALPHA"),
            Disk("plain"),
            Disk("small", bus="scsi", serial="DISK-SCSI"),
            Disk("ata", bus="ide", serial="DISK-ATA"),
            Disk("usb", bus="usb", serial="DISK-USB"),
            Disk("flash", bus="nvme", serial="DISK-NVME"),
        ],
        kernel_options=["ipv6.disable=1"],
        qemu_options=["-uuid", FIRMWARE_ID],
        log_directory=LOGS,
    )
    with machine:
        machine.start()
        machine.wait_boot()
        prepare(machine, tool)
        machine.run("umount /sys/kernel/config; ! test -d /sys/module/nvmet")
        yield machine


def test_missing_modules_are_named(bare: Machine) -> None:
    """A kernel without an NVMe target, or without its modules."""
    release = bare.run("uname -r").stdout.strip()
    hidden = f"/lib/modules/{release}/kernel/drivers/nvme/target"
    bare.run(f"mv {hidden} /var/tmp/hidden && depmod")
    try:
        for arguments in ("--all", GOOD):
            refuse(
                bare,
                f"{TOOL} {arguments}",
                "The module 'nvmet-tcp', the kernel's NVMe target, cannot be loaded; install the modules of "
                f"kernel {release}, or boot one with CONFIG_NVME_TARGET_TCP",
            )
    finally:
        bare.run(f"mv /var/tmp/hidden {hidden} && depmod")


def test_configfs_that_cannot_be_mounted_is_named(bare: Machine) -> None:
    bare.run("modprobe nvmet-tcp")
    try:
        refuse(
            bare,
            f"setpriv --bounding-set=-sys_admin {TOOL} {GOOD}",
            "Failed to mount configfs on '/sys/kernel/config/': Operation not permitted; "
            "mount it, then start again",
        )
    finally:
        bare.run("modprobe -r nvmet-tcp")


def test_nothing_has_to_be_prepared(bare: Machine) -> None:
    """Neither configfs mounted nor the module loaded, no IPv6, and no network but `lo`."""
    bare.run("! mountpoint /sys/kernel/config; ! test -e /proc/net/if_inet6")
    assert bare.run("ls /sys/class/net").stdout == "lo\n"
    bare.run("! test -d /sys/module/nvmet")
    with exporting(bare, "--nqn=quux", GOOD) as service:
        assert exported(bare) == {"nvme0n1"}
        assert names(bare) == {"subsystems/quux.nvme0n1", "ports/16858"}
        service.wait_output("^The network is down: no address yet at which disks could be attached$")
        assert service.show("StatusText") == "Exporting 1 disk at no address (the network is down)."
        # An address of `lo` is none; any other is shown.
        bare.run("ip address add 198.51.100.1/32 dev lo; modprobe dummy numdummies=1")
        bare.run("ip address add 198.51.100.7/24 dev dummy0; ip link set dummy0 up")
        service.wait_output("^Attach all disks with: nvme connect-all -t tcp -a 198.51.100.7 -s 16858$")
        assert "198.51.100.1 " not in service.output
    bare.run("modprobe -r dummy; ip address delete 198.51.100.1/32 dev lo")


@pytest.mark.parametrize("content", ["uninitialized\n", "", "0" * 32 + "\n", "x" * 32 + "\n"])
def test_firmware_replaces_a_bad_machine_id(bare: Machine, content: str) -> None:
    """A machine ID that is none: the firmware's is used, so that names stay."""
    bare.put("/run/machine-id-test", content)
    with exporting(
        bare, GOOD, properties=["BindReadOnlyPaths=/run/machine-id-test:/etc/machine-id"]
    ) as service:
        journal = service.journal()
        warning = "'/etc/machine-id' holds no machine ID, using the firmware's UUID instead"
        assert [line for priority, line in journal if priority == 4] == [warning]
        bare.put("/run/machine-id-test", FIRMWARE_ID.replace("-", ""))
        with_warning = names(bare)
    with exporting(
        bare, GOOD, properties=["BindReadOnlyPaths=/run/machine-id-test:/etc/machine-id"]
    ) as service:
        assert names(bare) == with_warning
        assert {priority for priority, _ in service.journal()} == {6}


def test_random_machine_id_outlasts_a_restart(bare: Machine) -> None:
    """Neither has the firmware one: it is made up once for this boot, which lets a restart find its own."""
    hide = ["InaccessiblePaths=/sys/class/dmi/id/product_uuid", "InaccessiblePaths=/etc/machine-id"]
    found = []
    for _ in range(2):
        with exporting(bare, GOOD, properties=hide) as service:
            found.append(names(bare))
            warnings = [line for priority, line in service.journal() if priority == 4]
            assert len(warnings) == 1
            assert warnings[0].startswith(
                "'/etc/machine-id' holds no machine ID and the firmware has none of its own: "
            )
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_identities_are_the_same_without_udev(bare: Machine) -> None:
    """Without udev and without a service manager: identities are the same, and disks are followed."""
    with exporting(bare, "--all", "--nqn=quux"):
        with_udev = tree(bare)
        before = exported(bare)
    bare.run(
        "systemctl stop systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service;"
        "mv /run/udev /run/udev-away"
    )
    try:
        process = bare.start_process(["env", "-i", TOOL, "--all", "--nqn=quux"])
        bare.wait_until(lambda: exported(bare) == before)
        assert {p: v for p, v in tree(bare).items() if with_udev.get(p) != v} == {}
        bare.add_disk(Disk("late", serial="DISK-LATE"))
        bare.wait_until(lambda: len(exported(bare)) == len(before) + 1)
        late = min(exported(bare) - before)
        assert bare.run(f"cat {NVMET}/subsystems/quux.{late}/namespaces/*/enable").stdout == "1\n"
        bare.remove_disk("late")
        bare.wait_until(lambda: exported(bare) == before)
        process.kill()
        assert process.wait() == 0
        assert not re.search("Traceback|Failed", process.output)
    finally:
        bare.run("mv /run/udev-away /run/udev; systemctl start systemd-udevd.service")
    assert not names(bare)
