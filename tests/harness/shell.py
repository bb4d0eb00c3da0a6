# SPDX-License-Identifier: LGPL-2.1-or-later
"""A root shell in an emulated machine with the tool in it and two disks to export: `make shell`.

Whatever happens in the machine is gone when the shell ends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.harness import images
from tests.harness.machine import Disk, Machine, Nic

WELCOME = """\
This is an emulated machine. storagetm is in PATH, and two disks with nothing on them are at
/dev/disk/by-id/virtio-DISK-A and virtio-DISK-B. The machine ends with the shell, or with Ctrl-A X.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make shell", description="A root shell in an emulated machine.")
    parser.add_argument("--release", choices=images.RELEASES, default=images.RELEASES[0])
    parser.add_argument("tool", type=Path, help="the packed program")
    arguments = parser.parse_args()
    if not sys.stdin.isatty():
        raise SystemExit("make shell needs a terminal.")

    image = images.build(arguments.release)[arguments.release]
    disks = [Disk("a", serial="DISK-A"), Disk("b", serial="DISK-B")]
    columns, rows = shutil.get_terminal_size()
    print("Booting ...", flush=True)
    with Machine(
        "shell", image, disks=disks, nics=[Nic()], terminal=(columns, rows), interactive=True
    ) as machine:
        machine.start()
        machine.wait_boot()
        machine.put("/usr/local/bin/storagetm", arguments.tool, mode=0o755)
        machine.put("/etc/motd", WELCOME)
        machine.run(
            f"ip link set eth0 up; dmesg --console-off; stty -F /dev/ttyS0 columns {columns} rows {rows}"
        )
        machine.run("systemctl start --no-block harness-shell.service")
        machine.wait_end(timeout=7 * 24 * 3600)


if __name__ == "__main__":
    main()
