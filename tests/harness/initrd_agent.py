# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test harness's agent in an initrd: a second archive behind that of dracut, which stays as it is.

The kernel unpacks both, one after the other. The agent needs more of Python than the program does, so it
brings a library of its own in a place of its own: what dracut has put into the initrd for the program has to
be enough for the program.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.harness.images import GUEST, Image, base_path

UNIT = """\
[Unit]
Description=Agent of the Test Harness
DefaultDependencies=no
IgnoreOnIsolate=yes

[Service]
Environment=PYTHONHOME=/agent PYTHONDONTWRITEBYTECODE=1
ExecStartPre=-modprobe virtio_console
ExecStart=/usr/bin/python3 -s -S /agent/agent.py
WorkingDirectory=/
"""

# The target that everything is wanted by here, and nothing in an initrd isolates into.
WANTED_BY = "storage-target-mode.target"

# What takes room and what no agent imports.
LEAVE_OUT = (
    "__pycache__",
    "test",
    "idlelib",
    "tkinter",
    "lib2to3",
    "ensurepip",
    "config-*",
    "pydoc_data",
    "sitecustomize.py",
)


def with_agent(
    image: Image, initrd: Path, path: Path, files: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Write to `path` an initrd for a machine in which `Machine.run()` works. It also has these further
    `files`, in place of those that are at the same paths.
    """
    (library,) = (base_path(image.release) / "root/usr/lib").glob("python3.*")
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        shutil.copytree(
            library, tree / "agent/lib" / library.name, ignore=shutil.ignore_patterns(*LEAVE_OUT)
        )
        shutil.copy(GUEST / "agent.py", tree / "agent")
        (tree / "root").mkdir(mode=0o700)
        units = tree / "etc/systemd/system"
        (units / f"{WANTED_BY}.wants").mkdir(parents=True)
        (units / "harness-agent.service").write_text(UNIT)
        (units / f"{WANTED_BY}.wants/harness-agent.service").symlink_to("../harness-agent.service")
        for path_there, text in files.items():
            further = tree / path_there.lstrip("/")
            further.parent.mkdir(parents=True, exist_ok=True)
            further.write_text(text)
        names = sorted(str(file.relative_to(tree)) for file in tree.rglob("*"))
        archive = subprocess.run(
            ["cpio", "--quiet", "--create", "--format=newc", "--owner=+0:+0"],
            cwd=tree,
            input="\n".join(names).encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    shutil.copyfile(initrd, path)
    with path.open("r+b") as file:
        # An archive begins at a multiple of four bytes.
        file.seek(-(-initrd.stat().st_size // 4) * 4)
        file.write(archive)
    return path
