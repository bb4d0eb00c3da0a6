#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packs storagetm.py into one executable file, byte for byte the same from the same source and interpreters.

The interpreter line starts Python isolated (-I) and without site (-S): a service that writes to disks must
not pick up modules from the environment or a user's home, and both also shorten the start. It names
/usr/bin/python3 and not env, because the kernel hands everything after the interpreter over as one argument,
and the env of small systems can't split that (-S).

After these options it can say one thing more: a program (-c), which here reads the archive's __main__.py and
runs it. Without that, Python runs an archive by way of runpy with all that it imports, and of compile(),
whose first call makes the types of all syntax trees. This is a fifth of the whole start, and what
`python3 storagetm.pyz` still does.

Beside the source lies its bytecode, for the Python that builds and for each one that --bytecode names.
"""

import argparse
import inspect
import io
import os
import subprocess
import sys
import time
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

# With "#!" and the end of the line less than 128 bytes, which is all that Linux reads before 5.1.
INTERPRETER = (
    "/usr/bin/python3 -ISc"
    "import sys,zipimport as z;a=sys.argv;del a[0];exec(z.zipimporter(a[0]).get_data('__main__.py'))"
)
# What tracebacks name, whatever the archive will be called.
FILE_NAME = "storagetm.pyz/storagetm.py"
# Run by the Python whose bytecode it is, which looks for modules in the working directory, too; these it has
# built in.
COMPILE = """\
import marshal, sys
from _frozen_importlib_external import MAGIC_NUMBER
code = compile(sys.stdin.buffer.read(), sys.argv[1], "exec", dont_inherit=True)
sys.stdout.buffer.write(MAGIC_NUMBER + marshal.dumps(code))
"""
# Zip archives know no time before 1980; this is the date of everything where the caller sets none.
FALLBACK_EPOCH = 315532800


def timestamp() -> tuple[int, int, int, int, int, int]:
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or FALLBACK_EPOCH)
    t = time.gmtime(max(epoch, FALLBACK_EPOCH))
    return (t.tm_year, t.tm_mon, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec)


def without_comments(source: bytes) -> bytes:
    """`source` without what only people read, which is a third of it; each line keeps its number.

    Docstrings become empty strings, since a function may have nothing else in it. The licence stays.
    """
    lines = source.decode().splitlines(keepends=True)
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    found = []
    statement_begins = True
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.COMMENT and "SPDX" not in token.string:
            found.append((token.start, token.end, ""))
        if token.type == tokenize.STRING and statement_begins:
            found.append((token.start, token.end, '""'))
        statement_begins = token.type in layout and (statement_begins or token.type == tokenize.NEWLINE)
    for (row, column), (end_row, end_column), instead in reversed(found):
        line = lines[row - 1][:column] + instead + "\n" * (end_row - row) + lines[end_row - 1][end_column:]
        lines[row - 1 : end_row] = [line if instead else line.rstrip() + "\n"]
    return "".join(lines).encode()


# The annotation is a string because that type is not there either.
def load() -> "ModuleType":
    """The program as a module. Nothing here calls this: with its imports it is the archive's __main__.py."""
    import marshal
    from zipimport import zipimporter

    archive = zipimporter(sys.argv[0])
    try:
        from _frozen_importlib_external import MAGIC_NUMBER
        from zlib import decompress

        # Damage must not get as far as marshal, which may crash on it; zlib compares a checksum.
        code = marshal.loads(decompress(archive.get_data("bytecode/" + MAGIC_NUMBER.hex())))
    except Exception:
        # There is none for this Python, or something is wrong with it. The source is the same program.
        code = None
    if code is None:
        # What the compiler takes, some 10 MB, Python does not give back. So a child compiles, and the
        # service, which may run for days, gets the code through a pipe.
        import os

        incoming, outgoing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                with open(outgoing, "wb") as pipe:
                    marshal.dump(archive.get_code("storagetm"), pipe)
            finally:
                os._exit(0)
        os.close(outgoing)
        with open(incoming, "rb") as pipe:
            code = marshal.load(pipe)
        os.waitpid(child, 0)
    module = sys.modules["storagetm"] = type(sys)("storagetm")
    exec(code, module.__dict__)
    return module


def main_source() -> bytes:
    """The source of the archive's __main__.py."""
    return without_comments(f"import sys\n{inspect.getsource(load)}sys.exit(load().main())\n".encode())


def bytecode(source: bytes, python: str) -> tuple[bytes, bytes]:
    """Magic number and marshalled code of `source`, compiled by the interpreter `python`.

    marshal writes sets in the order of their hashes, and marks what has more than one reference, be it from
    elsewhere in the interpreter. So a new one compiles, to which the environment says nothing. It notes no
    columns: these are half of the bytecode when compressed, and no traceback shows them without the source.
    """
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    output = subprocess.run(
        (python, *("-sSB", "-X", "utf8", "-X", "no_debug_ranges", "-c", COMPILE, FILE_NAME)),
        env={**environment, "PYTHONHASHSEED": "0"},
        input=source,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return output[:4], output[4:]


def pack(
    source: bytes, *, interpreter: str = INTERPRETER, pythons: Sequence[str] = (sys.executable,)
) -> bytes:
    """The content of the file, with bytecode of the interpreters `pythons`."""
    source = without_comments(source)
    files = {"__main__.py": main_source(), "storagetm.py": source}
    for python in pythons:
        magic, code = bytecode(source, python)
        files[f"bytecode/{magic.hex()}"] = zlib.compress(code, 9)

    buffer = io.BytesIO()
    buffer.write(f"#!{interpreter}\n".encode())
    date = timestamp()
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, date)
            # Bytecode is compressed already, in the format that has a checksum which is looked at.
            info.compress_type = zipfile.ZIP_STORED if "/" in name else zipfile.ZIP_DEFLATED
            # ZipInfo takes the system from the one it runs on, and the mode of a regular file from nowhere.
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content, compresslevel=9)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Packs storagetm.py into one executable file.", allow_abbrev=False
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("storagetm.pyz"), metavar="FILE")
    parser.add_argument(
        "--python",
        default=INTERPRETER,
        metavar="COMMAND",
        help="interpreter line (default: %(default)s); '/usr/bin/python3 -IS' is enough, but slower",
    )
    parser.add_argument(
        "--bytecode",
        action="append",
        default=[],
        metavar="PYTHON",
        help="pack the bytecode of this interpreter, too, such as python3.13; can be given several times. "
        "That of the interpreter which packs is always there, and all others compile at each start",
    )
    parser.add_argument(
        "source", nargs="?", type=Path, default=Path(__file__).resolve().with_name("storagetm.py")
    )
    args = parser.parse_args()

    pythons = (sys.executable, *args.bytecode)
    try:
        content = pack(args.source.read_bytes(), interpreter=args.python, pythons=pythons)
    except subprocess.CalledProcessError as e:
        sys.exit(f"{e.cmd[0]} failed to compile {args.source}")
    except OSError as e:
        sys.exit(str(e))
    # Renamed into place: a program that is running meanwhile may yet import from the archive it has open.
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        temporary.replace(args.output)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
