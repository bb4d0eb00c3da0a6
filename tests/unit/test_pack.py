# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one file that the program is packed into, and what is loaded when it starts."""

from __future__ import annotations

import ast
import dis
import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

import storagetm

PROJECT = Path(storagetm.__file__).parent
BYTECODE = f"bytecode/{importlib.util.MAGIC_NUMBER.hex()}"


def build(output: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> bytes:
    subprocess.run(
        [sys.executable, PROJECT / "build_zipapp.py", "--output", output, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        check=True,
    )
    return output.read_bytes()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "storagetm.pyz"
    build(path)
    return path


def test_file_is_reproducible(packed: Path, tmp_path: Path) -> None:
    """The same bytes from a copy of the sources that was made at another time, with another umask."""
    shutil.copy(PROJECT / "storagetm.py", tmp_path)
    os.utime(tmp_path / "storagetm.py", (1e9, 1e9))
    (tmp_path / "storagetm.py").chmod(0o640)
    assert build(tmp_path / "x.pyz", str(tmp_path / "storagetm.py")) == packed.read_bytes()


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1"},
        {"PYTHONHASHSEED": "2", "PYTHONOPTIMIZE": "2", "PYTHONUTF8": "0", "LC_ALL": "C"},
        {
            "PYTHONPATH": ".",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
            "A": "wanted",
            "wanted": "A",
        },
    ],
)
def test_environment_changes_no_byte(packed: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """The same bytecode, too, whatever the process that makes it is told about itself."""
    (tmp_path / "marshal.py").write_text("raise SystemExit('not this one')")
    assert build(tmp_path / "x.pyz", cwd=tmp_path, **environment) == packed.read_bytes()


def test_source_date_epoch_dates_the_file(packed: Path, tmp_path: Path) -> None:
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


def test_file_is_executable_and_small(packed: Path) -> None:
    assert packed.stat().st_mode & 0o777 == 0o755
    assert packed.stat().st_size < 380_000
    line = packed.read_bytes().partition(b"\n")[0]
    assert line.startswith(b"#!/usr/bin/python3 -ISc")
    # Linux before 5.1 reads no more, and cuts off what is longer.
    assert len(line) < 127
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        packed_source, source = archive.read("storagetm.py"), (PROJECT / "storagetm.py").read_bytes()
    # The same program, each statement in its line, but for what only people read.
    assert statements(packed_source) == statements(source)
    assert len(packed_source) < 0.9 * len(source)
    assert packed_source.split(b"\n")[1] == b"# SPDX-License-Identifier: LGPL-2.1-or-later"
    assert list(packed.parent.iterdir()) == [packed]


def test_other_interpreter_may_be_named(tmp_path: Path) -> None:
    """The interpreter line needs not say more than which Python it is."""
    path = tmp_path / "x.pyz"
    assert build(path, "--python", f"{sys.executable} -I").startswith(f"#!{sys.executable} -I\n".encode())
    assert run(path, "--version") == FROM_BYTECODE


def test_file_runs_by_itself_anywhere(packed: Path, tmp_path: Path) -> None:
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


def by_interpreter_line(path: Path, *options: str) -> list[str]:
    """The command that Linux makes of the interpreter line, here with further options of Python."""
    interpreter, argument = path.read_bytes().partition(b"\n")[0][2:].decode().split(" ", 1)
    return [interpreter, *options, argument, str(path)]


@pytest.mark.parametrize("way", ["by itself", "by Python", "by a relative path"])
def test_exit_code_is_the_programs(packed: Path, way: str) -> None:
    commands: dict[str, list[str | Path]] = {
        "by itself": [packed],
        "by Python": [sys.executable, "-IS", packed],
        "by a relative path": ["env", "-C", packed.parent, f"./{packed.name}"],
    }
    assert run(*commands[way], "--nonsense") == ("", "Unknown option '--nonsense'; see --help\n", 2)


def test_file_may_have_any_name(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "\udcff '\"日本.pyz"
    shutil.copy(packed, path)
    assert run(path, "--version") == FROM_BYTECODE


# Bytecode


def altered(path: Path, packed: Path, **contents: bytes | None) -> Path:
    """A copy of the one file with other contents, whose checksums are right. None takes a file out."""
    with zipfile.ZipFile(packed) as archive:
        files = {i: archive.read(i) for i in archive.infolist()}
    path.write_bytes(packed.read_bytes().partition(b"\n")[0] + b"\n")
    path.chmod(0o755)
    with zipfile.ZipFile(path, "a") as archive:
        for info, content in files.items():
            key = info.filename.partition(".")[0].partition("/")[0]
            changed = contents.get(key, content)
            if changed is not None:
                archive.writestr(info, changed)
    return path


def run(*command: str | Path) -> tuple[str, str, int]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout, done.stderr, done.returncode


def by_this_python(path: Path) -> tuple[str, str, int]:
    """What the one file prints, and whether a child compiles it."""
    script = (
        "import runpy, sys\n"
        "sys.addaudithook(lambda event, _: event == 'os.fork' and print('fork', flush=True))\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    return run(sys.executable, "-IS", "-c", script, path, "--version")


@pytest.fixture
def two_programs(packed: Path, tmp_path: Path) -> Path:
    """The one file with a source that is another program than the bytecode, to see which of them runs."""
    source = b"def main():\n    print('source')\n    return 3\n"
    return altered(tmp_path / "two.pyz", packed, storagetm=source)


FROM_BYTECODE = (f"storagetm {storagetm.__version__}\n", "", 0)
FROM_SOURCE = ("fork\nsource\n", "", 3)


def test_bytecode_that_fits_is_used(two_programs: Path) -> None:
    """Nothing is compiled, and no process made for it."""
    assert by_this_python(two_programs) == FROM_BYTECODE


def test_bytecode_of_another_python_is_not_used(two_programs: Path) -> None:
    """The magic number is not this one's."""
    content = two_programs.read_bytes()
    other = (int.from_bytes(importlib.util.MAGIC_NUMBER[:2], "little") ^ 1).to_bytes(2, "little") + b"\r\n"
    assert content.count(BYTECODE.encode()) == 2
    two_programs.write_bytes(content.replace(BYTECODE.encode(), f"bytecode/{other.hex()}".encode()))
    assert by_this_python(two_programs) == FROM_SOURCE


def test_without_bytecode_the_source_is_used(two_programs: Path, tmp_path: Path) -> None:
    assert by_this_python(altered(tmp_path / "without.pyz", two_programs, bytecode=None)) == FROM_SOURCE


@pytest.mark.parametrize("where", [0, 1, 2, 10, 1000, 0.1, 0.5, 0.9, -1000, -5, -4, -1])
def test_bytecode_with_a_flipped_bit_is_not_used(two_programs: Path, where: float) -> None:
    """In the file itself: zipimport does not look at the checksums of the archive."""
    content = bytearray(two_programs.read_bytes())
    with zipfile.ZipFile(two_programs) as archive:
        compressed = archive.read(BYTECODE)
    begin = content.index(compressed)
    content[begin + (int(where * len(compressed)) if 0 < where < 1 else int(where) % len(compressed))] ^= 16
    two_programs.write_bytes(content)
    try:
        # The last bits before the checksum may be there to fill a byte only.
        whole = zlib.decompress(content[begin : begin + len(compressed)]) == zlib.decompress(compressed)
    except zlib.error:
        whole = False
    assert by_this_python(two_programs) == (FROM_BYTECODE if whole else FROM_SOURCE)
    assert not whole or where == -5


@pytest.mark.parametrize("damage", ["empty", "short", "zeros", "not compressed", "no code", "half"])
def test_damaged_bytecode_is_not_used(two_programs: Path, tmp_path: Path, damage: str) -> None:
    with zipfile.ZipFile(two_programs) as archive:
        compressed = archive.read(BYTECODE)
    code = zlib.decompress(compressed)
    spoilt = {
        "empty": b"",
        "short": compressed[:-1],
        "zeros": compressed[:5000] + bytes(5000) + compressed[10000:],
        "not compressed": code,
        "no code": zlib.compress(b""),
        "half": zlib.compress(code[: len(code) // 2]),
    }[damage]
    assert by_this_python(altered(tmp_path / "spoilt.pyz", two_programs, bytecode=spoilt)) == FROM_SOURCE


def code_objects(code: CodeType) -> Iterator[tuple[object, ...]]:
    """What each function is, and what a traceback says of it."""
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    yield (
        code.co_filename,
        code.co_name,
        list(dis.findlinestarts(code)),
        code.co_code,
        code.co_names,
        constants,
    )
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_objects(constant)


def test_bytecode_is_of_the_source(packed: Path) -> None:
    """Also its line numbers. Tracebacks name the file as they do without bytecode, but for where it lies."""
    with zipfile.ZipFile(packed) as archive:
        source, code = archive.read("storagetm.py"), marshal.loads(zlib.decompress(archive.read(BYTECODE)))
    expected = compile(source, "storagetm.pyz/storagetm.py", "exec", dont_inherit=True)
    assert list(code_objects(code)) == list(code_objects(expected))


def test_bytecode_of_named_interpreters_is_packed(packed: Path, tmp_path: Path) -> None:
    """Bytecode of several, once for each magic number, beside that of the Python that builds."""
    other = tmp_path / "python3.99"
    # This Python, with another magic number.
    other.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        f"done = subprocess.run([{sys.executable!r}, *sys.argv[1:]], check=True, stdout=subprocess.PIPE)\n"
        "sys.stdout.buffer.write(b'\\1\\2\\r\\n' + done.stdout[4:])\n"
    )
    other.chmod(0o755)
    arguments = (f"--bytecode={other}", f"--bytecode={sys.executable}")
    content = build(tmp_path / "x.pyz", *arguments)
    with zipfile.ZipFile(tmp_path / "x.pyz") as archive:
        found = {name: archive.read(name) for name in archive.namelist() if name.startswith("bytecode/")}
    assert sorted(found) == sorted([BYTECODE, "bytecode/01020d0a"])
    assert len(set(found.values())) == 1
    assert by_this_python(tmp_path / "x.pyz") == FROM_BYTECODE
    assert build(tmp_path / "y.pyz", *reversed(arguments)) == content != packed.read_bytes()


def test_interpreters_reach_the_packer_through_make() -> None:
    command = ("make", "--dry-run", "--always-make", "BYTECODE=python3.98 python3.99", "storagetm.pyz")
    stdout, _, code = run("env", "-C", PROJECT, *command)
    assert code == 0
    assert "build_zipapp.py --output storagetm.pyz --bytecode=python3.98 --bytecode=python3.99\n" in stdout


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/nonexistent/python", "[Errno 2] No such file or directory: '/nonexistent/python'\n"),
        ("false", f"false failed to compile {PROJECT / 'storagetm.py'}\n"),
    ],
)
def test_interpreter_that_does_not_work_leaves_no_file(tmp_path: Path, python: str, message: str) -> None:
    """There is no file then, rather than one without what was asked for."""
    command = (sys.executable, PROJECT / "build_zipapp.py", "-o", tmp_path / "x.pyz", f"--bytecode={python}")
    assert run(*command) == ("", message, 1)
    assert not list(tmp_path.iterdir())


def test_help_says_which_bytecode_there_is() -> None:
    stdout, stderr, code = run(sys.executable, PROJECT / "build_zipapp.py", "--help")
    assert (stderr, code) == ("", 0)
    assert "--bytecode PYTHON" in stdout
    assert "That of the interpreter which packs is always there" in " ".join(stdout.split())


# Each of these would cost time and room in an initrd at every start.
EXPENSIVE = (
    *("argparse", "asyncio", "collections.abc", "contextlib", "dataclasses", "email", "enum", "functools"),
    *("hashlib", "hmac", "inspect", "json", "logging", "pathlib", "random", "re", "selectors", "shutil"),
    *("signal", "socket", "string", "subprocess", "tempfile", "termios", "threading", "traceback", "typing"),
    *("urllib", "uuid", "zipfile"),
)


@pytest.mark.parametrize("what", ["one file", "source"])
def test_part_of_python_is_refused_in_a_sentence(packed: Path, what: str) -> None:
    """Without what python3-minimal leaves out there is a sentence, and no traceback."""
    path = packed if what == "one file" else PROJECT / "storagetm.py"
    script = (
        "import runpy, sys\n"
        "sys.modules['ctypes'] = None\n"
        "path = sys.argv.pop(1)\n"
        "runpy.run_path(path, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", script, path, "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Python's module 'ctypes' is missing; install the package 'python3', of which 'python3-minimal' is "
        "only a part\n"
    )


def test_one_file_imports_no_more_than_the_program(packed: Path) -> None:
    """By its interpreter line it loads what Python itself and the program do, and to read itself no more."""
    script = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from storagetm import main; main()"
    command = by_interpreter_line(packed, "-X", "importtime")
    imports = []
    for start in (command, [*command[:3], f"-ISc{script}"]):
        stdout, stderr, code = run(*start, "--version")
        assert (stdout, code) == FROM_BYTECODE[::2]
        imports.append({line.rpartition("|")[2].strip() for line in stderr.splitlines()})
    assert imports[0] - imports[1] == {"zlib"}
    assert "ctypes" in imports[0]


def test_start_imports_little() -> None:
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


def test_help_imports_nothing_expensive() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import storagetm; storagetm.main(['--help']);"
        "print('loaded:', *sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-IS", "-c", code, PROJECT], stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(result.stdout.rpartition("loaded:")[2].split())
    assert not loaded & set(EXPENSIVE)
