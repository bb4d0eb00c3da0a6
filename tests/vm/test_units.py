# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units on a running system: from a login prompt into storage target mode, and nothing reboots."""

from __future__ import annotations

import io
import re
import tarfile
from typing import Any

from tests.harness.images import PROJECT
from tests.harness.machine import Disk, Machine, Nic, Wire
from tests.vm.conftest import BootMachine
from tests.vm.nvmet import exported

# What `make install` needs.
SOURCES = ("Makefile", "build_zipapp.py", "docs", "dracut-module", "storagetm.py", "units")

NETWORK = """\
[Match]
Name=eth0

[Network]
Address=192.0.2.7/24
LinkLocalAddressing=ipv6
"""


def install(machine: Machine) -> None:
    """Install the project in a machine, by its Makefile and for the machine's own Python."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in SOURCES:
            tar.add(PROJECT / name, name)
    machine.put("/root/project.tar", archive.getvalue())
    machine.run("mkdir /root/project && tar -C /root/project -xf /root/project.tar")
    machine.run("make -C /root/project install && systemctl daemon-reload")


def boot_system(boot: BootMachine, release: str, getty: str, **options: Any) -> Machine:
    """Boot a system as people have them: with networkd, a mounted disk, a login prompt on the console."""
    disks = [
        Disk("free", serial="FREE"),
        Disk("mounted", serial="MOUNTED", bus="scsi"),
        Disk("flash", serial="FLASH", bus="nvme"),
    ]
    machine = boot("running", image=release, disks=disks, nics=[Nic(Wire())], **options)
    install(machine)
    # Isolating stops the agent like everything else, so it is told not to.
    machine.put("/etc/systemd/system/harness-agent.service.d/test.conf", "[Unit]\nIgnoreOnIsolate=yes\n")
    machine.put("/etc/systemd/network/test.network", NETWORK)
    machine.run("mkfs.ext4 -q /dev/sda && mount /dev/sda /mnt")
    machine.run(f"rm /etc/systemd/system/{getty} && systemctl daemon-reload")
    # The test machines leave out terminals when they boot.
    machine.run("udevadm trigger --action=add --subsystem-match=tty && udevadm settle")
    machine.run(f"systemctl start systemd-networkd {getty}")
    machine.wait_run("ip address show dev eth0 | grep 192.0.2.7")
    assert machine.run(["systemctl", "is-active", getty]).stdout == "active\n"
    return machine


def check_storage_target_mode(machine: Machine, getty: str) -> None:
    """All that does not depend on where the console is."""
    machine.wait_run("systemctl is-active storage-target-mode.target storagetm.service", timeout=180)
    assert exported(machine) == {"vdb", "nvme0n1"}
    # Debian 13 has a target of this name, too.
    paths = machine.run(
        "systemctl show --value --property=FragmentPath storage-target-mode.target storagetm.service"
    ).stdout.split()
    assert paths == [
        f"/usr/local/lib/systemd/system/{unit}"
        for unit in ("storage-target-mode.target", "storagetm.service")
    ]
    units = machine.run("systemctl list-units --plain --no-legend").stdout
    active = {line.split()[0] for line in units.splitlines() if line.split()[2] == "active"}
    assert {"systemd-networkd.service", "systemd-udevd.service", "systemd-journald.service"} < active
    assert (
        not {getty, "getty.target", "multi-user.target", "dbus.service", "systemd-storagetm.service"}
        & active
    )
    assert machine.run("systemctl list-units --failed --plain --no-legend").stdout == ""
    # udev and systemd leave alone what is between a disk and its export.
    mapped = "for d in /sys/block/dm-*; do udevadm info -q property $d; done"
    assert machine.run(f"{mapped} | grep -c ^DM_UDEV_DISABLE_OTHER_RULES_FLAG=1").stdout == "2\n"
    assert "COOKIE=" not in machine.run(mapped).stdout
    assert machine.run("find /dev/disk /dev/mapper -lname '*/dm-*'").stdout == ""
    assert "block-dm" not in units
    status = machine.run("systemctl status --no-pager storagetm.service").stdout
    assert re.search(r'Status: "Exporting 2 disks at 2 addresses\."', status)
    assert machine.run("findmnt --noheadings --output=TARGET /dev/sda").stdout == "/mnt\n"
    assert "192.0.2.7/24" in machine.run("ip address show dev eth0").stdout


def check_screen(screen: str) -> None:
    assert re.search(r"^  nvme connect-all -t tcp -a 192\.0\.2\.7 -s \d+$", screen, re.MULTILINE)
    assert re.search(r"^/dev/nvme0n1 .* FLASH$", screen, re.MULTILINE)
    assert re.search(r"^/dev/vdb ", screen, re.MULTILINE)
    assert re.search(r"^/dev/sda +.*mounted on '/mnt'", screen, re.MULTILINE)
    assert "login:" not in screen


def test_isolate_works_from_a_serial_console(boot: BootMachine, release: str) -> None:
    """Somebody who is logged in on the console types it there."""
    getty = "serial-getty@ttyS0.service"
    machine = boot_system(boot, release, getty)
    machine.send_keys("\r")
    machine.wait_screen("login: *$")
    machine.send_keys("root\r")
    machine.wait_screen(r"^root@.*# *$")
    machine.send_keys("systemctl isolate storage-target-mode.target\r")
    machine.wait_screen(r"connect-all -t tcp -a 192(.*\n)*.*Ctrl-C")
    check_storage_target_mode(machine, getty)
    screen = "\n".join(machine.screen())
    check_screen(screen)

    # What the kernel says meanwhile stays in its log; a key echoes nothing.
    seen = len(machine.console_bytes())
    machine.run("echo '<3>a kernel message' > /dev/kmsg; dmesg | grep 'a kernel message'")
    machine.send_keys("x")
    machine.add_disk(Disk("another", serial="ANOTHER"))
    machine.wait_screen(r"^To attach all 3 disks(.*\n)*/dev/vdc ")
    assert b"a kernel message" not in machine.console_bytes()[seen:]


def test_isolate_works_from_a_virtual_terminal(boot: BootMachine) -> None:
    """The main console is a virtual terminal with a login prompt on it, and somebody else isolates.

    The serial line is a console as well, so the screen is there, too. Whoever sits there can end it.
    """
    getty = "getty@tty1.service"
    machine = boot_system(boot, "trixie", getty, vga=True, kernel_options=["nomodeset", "console=tty0"])
    machine.wait_until(lambda: "login:" in "\n".join(machine.vga_text()))
    machine.run("systemctl isolate --no-block storage-target-mode.target")
    machine.wait_until(lambda: "Ctrl-C" in "\n".join(machine.vga_text()), timeout=180)
    check_storage_target_mode(machine, getty)
    check_screen("\n".join(machine.vga_text()))
    machine.wait_screen(r"connect-all -t tcp -a 192(.*\n)*.*Ctrl-C", redraw="x")
    check_screen("\n".join(machine.screen()))
    machine.send_keys("\x03")
    machine.wait_end()
