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
    export = storagetm.Export(made_disk(name, **{k: v for k, v in facts.items() if k in FACTS}))
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


def machine(
    system: str = "debian", version: str = "13", identity: bytes = bytes(range(16))
) -> storagetm.Machine:
    """One that this computer is not asked about."""
    made = storagetm.Machine.__new__(storagetm.Machine)
    made.id, made.os, made.os_version = identity, system, version
    made.name, made.os_name = "rescue", "Debian"
    return made
