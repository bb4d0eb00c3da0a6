# SPDX-License-Identifier: LGPL-2.1-or-later
"""The screen on whatever consoles a machine has: the service is not started on a terminal.

Two of them at a time are in test_units.py.
"""

from __future__ import annotations

from pathlib import Path

from tests.harness import images as harness_images
from tests.harness.images import Image
from tests.harness.initrd_agent import with_agent
from tests.harness.machine import KERNEL_OPTIONS, Disk, Machine, Nic, Wire
from tests.vm.conftest import LOGS
from tests.vm.nvmet import Service, exported, exporting, names
from tests.vm.test_addresses import REDRAW, ROWS, clear, command
from tests.vm.test_initrd import DRACUT_OPTIONS, OPTIONS

ACTIVE = "/sys/devices/virtual/tty/console/active"


def test_service_starts_without_a_console(images: dict[str, Image], tmp_path: Path) -> None:
    """With "console=null" the service starts in spite of it, and there still is a monitor."""
    image = images["trixie"]
    initrd = with_agent(image, harness_images.initrd(image, *DRACUT_OPTIONS), tmp_path / "initrd.img")
    options = [*(o for o in KERNEL_OPTIONS if not o.startswith("console=")), *OPTIONS]
    machine = Machine(
        "no-console",
        image,
        initrd=initrd,
        machine_id="",
        disks=[Disk("virtio")],
        nics=[Nic(Wire(), 0)],
        vga=True,
        log_directory=LOGS,
        # The last one counts.
        qemu_options=["-append", " ".join([*options, "nomodeset", "console=null"])],
    )
    with machine:
        machine.start()
        machine.agent.request({"op": "hello"}, 300)
        assert machine.run("cat /sys/class/tty/console/active").stdout.strip() == ""
        machine.wait_run("systemctl is-active storagetm")
        machine.wait_until(lambda: "connect-all -t tcp -a 169.254." in "\n".join(machine.vga_text()))
        rows = machine.vga_text()
        # In the initrd's own os-release, dracut speaks of itself.
        assert rows[0].endswith(" (Debian GNU/Linux 13 (trixie))")
        assert rows[-1] == "Ctrl-C stops exporting and reboots this machine."
        assert exported(machine) == {"vda"}
        journal = machine.run("journalctl -b --no-pager --output=cat _COMM=storagetm").stdout
        assert "\nExporting '/dev/vda' " in journal
        # Its keyboard is the one that stops it.
        machine.qmp.call("send-key", keys=[{"type": "qcode", "data": key} for key in ("ctrl", "c")])
        machine.wait_end()


def test_serial_line_or_monitor_is_found(target: Machine) -> None:
    """A service without a terminal finds the serial line; and where that has no hardware, the monitor."""
    clear(target)
    service = Service(target, ["--console", "--nqn=quux", "/dev/nvme0n1"])
    service.start()
    rows = target.wait_screen(r"^Ctrl-C stops exporting\.$", redraw=REDRAW)
    assert rows.index("Ctrl-C stops exporting.") == ROWS - 1
    target.wait_screen(f"^  {command('192.0.2.1')}$", redraw=REDRAW)
    service.wait_output(f"^Attach all disks with: {command('192.0.2.1')}$")
    assert {priority for priority, _ in service.journal()} == {6}
    assert target.run(f"ps -o tty= -p {service.pid}").stdout == "ttyS0\n"
    # Another program hangs it up, as some do before they use it (TIOCVHANGUP).
    hang_up = "import fcntl, os; fcntl.ioctl(os.open('/dev/ttyS0', os.O_RDWR | os.O_NOCTTY), 0x5437)"
    clear(target)
    target.run(["python3", "-c", hang_up])
    rows = target.wait_screen(r"^Ctrl-C stops exporting\.$", redraw=REDRAW)
    assert rows.index("Ctrl-C stops exporting.") == ROWS - 1
    assert service.output.count("Exporting '/dev/nvme0n1'") == 1
    # A key that comes before the line is the program's again goes to nobody.
    target.wait_run(f'test "$(ps -o tty= -p {service.pid})" = ttyS0')
    target.send_keys("\x03")
    target.wait_run(f"! systemctl --quiet is-active {service.unit}")
    assert target.run(f"systemctl --quiet is-failed {service.unit}", check=False).returncode
    assert not names(target)

    target.put("/run/active", "ttyS3\n")
    before = len(target.console_bytes())
    hidden = [f"BindReadOnlyPaths=/run/active:{ACTIVE}"]
    with exporting(target, "--console", "--nqn=quux", "/dev/nvme0n1", properties=hidden):
        target.wait_run("fold -w 80 /dev/vcs1 | grep '^Ctrl-C stops'")
        target.run(f"fold -w 80 /dev/vcs1 | grep '^  {command('192.0.2.1')} *$'")
        assert b"nvme connect" not in target.console_bytes()[before:]
