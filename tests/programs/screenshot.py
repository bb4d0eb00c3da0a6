# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes docs/screen.png: a machine in storage target mode, as it looks to somebody in front of it.

    .venv/bin/python -m tests.programs.screenshot [FILE]

The machine boots from an initrd like that of `make demo`. Its disks are empty files, whose sizes, models and
serial numbers are made up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.harness import images
from tests.harness.images import PROJECT
from tests.harness.initrd_agent import with_agent
from tests.harness.machine import Machine, Nic

# A virtual terminal of 80 columns and 30 rows.
OPTIONS = (
    "rd.systemd.unit=storage-target-mode.target",
    "ip=link-local",
    "console=tty0",
    "video=640x480",
    "quiet",
    # One of each kind.
    "rd.storagetm.access=ST4000*:read-write",
    "rd.storagetm.access=/dev/nvme*:snapshot",
)
MACHINE_ID = "5f1d43c6c6d34c0c8a5c32c1f7a0e0d1"
PRODUCT = "Workstation W30"

# Options of QEMU's devices, and the sizes in bytes.
DISKS = (
    ("ide-hd,bus=ide.0,model=Samsung SSD 870 EVO 1TB,serial=S626NF0R302498T", 1_000_204_886_016),
    ("ide-hd,bus=ide.1,model=ST4000DM004-2CV104,serial=ZFN0K1WD", 4_000_787_030_016),
    ("nvme,serial=PHM2913500AB480B", 480_103_981_056),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=PROJECT / "docs" / "screen.png")
    output: Path = parser.parse_args().output
    image = images.build("trixie")["trixie"]
    with tempfile.TemporaryDirectory() as name:
        options = ["-smbios", f"type=1,product={PRODUCT}"]
        for number, (device, size) in enumerate(DISKS):
            path = Path(name) / f"{number}.raw"
            with path.open("wb") as file:
                file.truncate(size)
            options += ["-drive", f"if=none,id=disk{number},format=raw,file={path}"]
            options += ["-device", f"{device},drive=disk{number}"]
        with Machine(
            "screenshot",
            image,
            initrd=with_agent(image, images.initrd(image), Path(name) / "initrd.img"),
            machine_id=MACHINE_ID,
            kernel_options=OPTIONS,
            nics=[Nic()],
            qemu_options=options,
            memory=2048,
            vga=True,
        ) as machine:
            machine.start()
            machine.agent.request({"op": "hello"}, 300)
            status = f"Exporting {len(DISKS)} disks (1 read-write) at 2 addresses"
            machine.wait_run(
                f"systemctl show --property=StatusText storagetm.service | grep '{status}'", 180
            )
            time.sleep(10)  # until nothing of the start is left to be drawn over
            machine.screendump(output)
    print(f"{output} is made.")


if __name__ == "__main__":
    main()
