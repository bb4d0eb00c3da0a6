# SPDX-License-Identifier: LGPL-2.1-or-later
"""Emulated machines for the tests: real kernels, real udev, real nvmet, and no risk to the machine that runs
the tests.

- `images` makes root file systems of three Debian releases, kept in a cache.
- `machine` boots them in QEMU, without hardware virtualisation, and runs commands in them.
- `guest/agent.py` is the part that runs inside and carries out these commands.

A test that needs a machine of its own, with a second disk that is plugged in later:

    def test_hot_plug(boot: BootMachine) -> None:
        machine = boot("target", image="bookworm", disks=[Disk("first", serial="DISK-A")])
        machine.add_disk(Disk("second", size=64 << 20, serial="DISK-B"))
        machine.run("udevadm wait --timeout=20 /dev/disk/by-id/virtio-DISK-B")

A machine takes a while to boot, so tests share one where they can: see the fixtures in
tests/vm/conftest.py.
"""
