# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one file that the program is packed into, and what is loaded when it starts."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import storagetm

PROJECT = Path(storagetm.__file__).parent


def build(output: Path, *arguments: str, **environment: str) -> bytes:
    subprocess.run(
        [sys.executable, PROJECT / "build_zipapp.py", "--output", output, *arguments],
        env={**os.environ, **environment},
        check=True,
    )
    return output.read_bytes()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "storagetm.pyz"
    build(path)
    return path


def test_reproducible(packed: Path, tmp_path: Path) -> None:
    """The same bytes from a copy of the sources that was made at another time, with another umask."""
    shutil.copy(PROJECT / "storagetm.py", tmp_path)
    os.utime(tmp_path / "storagetm.py", (1e9, 1e9))
    (tmp_path / "storagetm.py").chmod(0o640)
    assert build(tmp_path / "x.pyz", str(tmp_path / "storagetm.py")) == packed.read_bytes()


def test_source_date_epoch(packed: Path, tmp_path: Path) -> None:
    dated = build(tmp_path / "x.pyz", SOURCE_DATE_EPOCH="1700000000")
    assert dated != packed.read_bytes()
    assert build(tmp_path / "y.pyz", SOURCE_DATE_EPOCH="1700000000", TZ="Asia/Tokyo") == dated
    with zipfile.ZipFile(tmp_path / "x.pyz") as archive:
        assert {i.date_time for i in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}
    # Zip files know no time before 1980.
    assert build(tmp_path / "z.pyz", SOURCE_DATE_EPOCH="0") == packed.read_bytes()


def statements(source: bytes) -> list[tuple[int, str]]:
    """Line and meaning of each statement; docstrings are all the same."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.append((node.lineno, "docstring"))
        elif isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node.lineno, ast.dump(node) if not hasattr(node, "body") else type(node).__name__))
    return found


def test_executable_and_small(packed: Path) -> None:
    assert packed.stat().st_mode & 0o777 == 0o755
    assert packed.stat().st_size < 48 * 1024
    assert packed.read_bytes().startswith(b"#!/usr/bin/python3 -IS\n")
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        packed_source, source = archive.read("storagetm.py"), (PROJECT / "storagetm.py").read_bytes()
    # The same program, each statement in its line, but for what only people read.
    assert statements(packed_source) == statements(source)
    assert len(packed_source) < 0.9 * len(source)
    assert packed_source.split(b"\n")[1] == b"# SPDX-License-Identifier: LGPL-2.1-or-later"
    assert list(packed.parent.iterdir()) == [packed]


def test_other_interpreter(tmp_path: Path) -> None:
    assert build(tmp_path / "x.pyz", "--python", "/opt/python -I").startswith(b"#!/opt/python -I\n")


def test_runs(packed: Path, tmp_path: Path) -> None:
    """By its interpreter line, and whatever lies about in the environment and the working directory."""
    (tmp_path / "os.py").write_text("raise SystemExit('not this one')")
    result = subprocess.run(
        [packed, "--version"],
        capture_output=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nonexistent"},
        check=False,
        timeout=60,
    )
    assert (result.stdout, result.stderr, result.returncode) == (
        f"storagetm {storagetm.__version__}\n".encode(),
        b"",
        0,
    )


def test_exit_code(packed: Path) -> None:
    result = subprocess.run([sys.executable, "-IS", packed, "--nonsense"], capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr == b"Unknown option '--nonsense'; see --help\n"


# Each of these would cost time and room in an initrd at every start.
EXPENSIVE = (
    *("argparse", "asyncio", "collections.abc", "contextlib", "dataclasses", "email", "enum", "functools"),
    *("hashlib", "hmac", "inspect", "json", "logging", "pathlib", "random", "re", "selectors", "shutil"),
    *("signal", "socket", "string", "subprocess", "tempfile", "termios", "threading", "traceback", "typing"),
    *("urllib", "uuid", "zipfile"),
)


def test_imports_at_start() -> None:
    """In isolation, as it is run. What Python itself has loaded by then does not count."""
    code = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); import storagetm;"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-IS", "-c", code, PROJECT], stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "storagetm" in loaded
    assert "ctypes" in loaded
    assert not loaded & set(EXPENSIVE)


def test_imports_for_help() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import storagetm; storagetm.main(['--help']);"
        "print('loaded:', *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-IS", "-c", code, PROJECT], stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(result.stdout.rpartition("loaded:")[2].split())
    assert not loaded & set(EXPENSIVE)
