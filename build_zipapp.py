#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packs storagetm.py into one executable file, byte for byte the same from the same source.

The interpreter line starts Python isolated (-I) and without site (-S): a service that writes to disks must
not pick up modules from the environment or a user's home, and both also shorten the start. It names
/usr/bin/python3 and not env, because the kernel hands everything after the interpreter over as one argument,
and the env of small systems can't split that (-S).
"""

import argparse
import io
import os
import time
import tokenize
import zipfile
from pathlib import Path

INTERPRETER = "/usr/bin/python3 -IS"
# What the compiler takes, some 10 MB, Python does not give back. So a child compiles, and the service, which
# may run for days, gets the code through a pipe.
MAIN = """\
import marshal
import os
import sys

incoming, outgoing = os.pipe()
if (child := os.fork()) == 0:
    try:
        with open(outgoing, "wb") as pipe:
            marshal.dump(__loader__.get_code("storagetm"), pipe)
    finally:
        os._exit(0)
os.close(outgoing)
with open(incoming, "rb") as pipe:
    code = marshal.load(pipe)
os.waitpid(child, 0)
module = sys.modules["storagetm"] = type(sys)("storagetm")
exec(code, module.__dict__)
sys.exit(module.main())
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


def pack(source: bytes, *, interpreter: str = INTERPRETER) -> bytes:
    files = {"__main__.py": MAIN.encode(), "storagetm.py": without_comments(source)}

    buffer = io.BytesIO()
    buffer.write(f"#!{interpreter}\n".encode())
    date = timestamp()
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, date)
            info.compress_type = zipfile.ZIP_DEFLATED
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
        "--python", default=INTERPRETER, metavar="COMMAND", help="interpreter line (default: %(default)s)"
    )
    parser.add_argument(
        "source", nargs="?", type=Path, default=Path(__file__).resolve().with_name("storagetm.py")
    )
    args = parser.parse_args()

    content = pack(args.source.read_bytes(), interpreter=args.python)
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
