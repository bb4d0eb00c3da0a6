# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks and their exports, made up for tests that look at no machine."""

from __future__ import annotations

from typing import Any

import storagetm

FACTS = frozenset(storagetm.Disk.__slots__)


def made_disk(name: str = "vda", **facts: Any) -> storagetm.Disk:
    """A block device of this name with these attributes; an image where the name is a path."""
    if "/" in name:
        disk: storagetm.Disk = storagetm.Image(name.rpartition("/")[2], name)
    else:
        disk = storagetm.BlockDevice(name, f"/dev/{name}", name)
    for fact, value in facts.items():
        setattr(disk, fact, value)
    return disk


def made_export(name: str = "vda", **facts: Any) -> storagetm.Export:
    """A disk that could be exported; `facts` are attributes of the disk or of the export."""
    disk = made_disk(name, **{k: v for k, v in facts.items() if k in FACTS})
    export = storagetm.Export(disk, storagetm.BlockDevices())
    for fact, value in facts.items():
        if fact not in FACTS:
            setattr(export, fact, value)
    return export


def wanted_of(
    transport: storagetm.Transport, export: storagetm.Export, instance: str
) -> list[storagetm.Branch]:
    """What makes a disk reachable by one transport, after what stands between; locked or not."""
    tree = storagetm.Tree("/nonexistent/", storagetm.Ledger("/nonexistent/ledger"))
    return list(storagetm.Wanted(instance, [transport], tree, locks=False).of(export).values())


class Named(storagetm.Machine):
    """A machine that is called target, without asking this one."""

    name = "target"

    def __init__(self, machine_id: bytes = bytes(16)) -> None:
        self.id, self.os, self.os_version = machine_id, "debian", "13"
        self.os_name = "Debian GNU/Linux 13 (trixie)"


def made_service(
    machine: storagetm.Machine,
    transport: storagetm.NvmeTcp | None = None,
    inventory: storagetm.Inventory | None = None,
    **options: Any,
) -> storagetm.Service:
    """One that exports all block devices over NVMe/TCP, unless told otherwise; nothing is begun."""
    transport = transport or storagetm.NvmeTcp(machine)
    inventory = inventory or storagetm.Inventory([storagetm.BlockDevices()])
    return storagetm.Service(
        machine, storagetm.Exporter(transport.prefix, [transport], inventory), **options
    )
