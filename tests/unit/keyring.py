# SPDX-License-Identifier: LGPL-2.1-or-later
"""What behaves like the kernel's keyring for TLS, for tests of what is put there.

All that this kernel knows is in files, so that it outlives a process that is killed.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import storagetm
from tests.unit.configfs import Nvmet, failure

SERIAL = 0x1A2B3C4D
ADD_KEY = 0  # its place in storagetm.KEY_CALLS
DESCRIPTION_MAX = 4095
# A user's keyring of the same name is not the kernel's.
KEYS = f"""\
0d5e2ac1 I--Q---     4 perm 3f030000  1000 65534 keyring   .nvme: empty
{SERIAL:08x} I------     1 perm 3f0f0000     0     0 keyring   .nvme: empty
"""


class Keyring(storagetm.NvmeKeyring):
    """In place of add_key(2) and keyctl(2); with what they are called for, the program itself deals.

    It does what security/keys and drivers/nvme/common/keyring.c do. A key of type "psk" cannot be updated,
    so that add_key(2) makes another one, which takes the place of the one with the same description. No
    serial number is given twice. A key that is invalidated is gone at once.
    Only who has the keyring in one of his own, as of `possession`, may search it and read what is in it.
    """

    def __init__(self, nvmet: Nvmet, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.nvmet = nvmet
        self.keys = base / "keyring"
        self.keys.mkdir()
        self.proc = base / "proc/keys"
        self.proc.parent.mkdir(exist_ok=True)
        self.proc.write_text(KEYS)
        self.possession = False
        nvmet.keyring = self
        monkeypatch.setattr(storagetm.TlsKey, "keyring", self)

    def begin(self) -> None:
        """Has the program be a process that has not looked for the keyring yet."""
        self.serial, self.possession = 0, False

    def disappear(self) -> None:
        """Has the kernel have none."""
        self.proc.write_text("")
        self.nvmet.keyring = None

    # System calls

    def call(self, number: int, *arguments: Any) -> int:
        with self.nvmet.lock:
            if number == ADD_KEY:
                return self.add_key(*arguments)
            operations: dict[int, Callable[..., int]] = {
                self.LINK: self.link,
                self.SEARCH: self.search,
                self.READ: self.read_key,
                self.DESCRIBE: self.describe,
                self.INVALIDATE: self.invalidate,
            }
            return operations[arguments[0]](*arguments[1:])

    def check_possession(self, keyring: int) -> None:
        assert keyring == SERIAL
        if not self.possession:
            raise failure(errno.EACCES)

    def link(self, serial: int, where: int) -> int:
        assert (serial, where) == (SERIAL, self.PROCESS)
        self.possession = True
        return 0

    def add_key(self, kind: bytes, description: bytes, raw: bytes, length: int, keyring: int) -> int:
        assert keyring == SERIAL
        assert kind == b"psk"
        assert len(raw) == length
        if not 0 < length < 1 << 15 or len(description) > DESCRIPTION_MAX:
            raise failure(errno.EINVAL)
        name = description.decode()
        self.nvmet.called(f"add-key {name.replace(' ', '_')}")
        return self.put(name, raw)

    def search(self, keyring: int, kind: bytes, description: bytes, where: int) -> int:
        self.check_possession(keyring)
        assert (kind, where) == (b"psk", 0)
        found = [(s, k) for s, k in self.all().items() if k["name"] == description.decode()]
        if not found:
            raise failure(errno.ENOKEY)
        ((serial, _),) = found
        return serial

    def read_key(self, serial: int, address: int, size: int) -> int:
        self.check_possession(SERIAL)
        if serial == SERIAL:
            raw = array.array("i", sorted(self.all())).tobytes()
        else:
            raw = bytes.fromhex(self.known(serial)["raw"])
        ctypes.memmove(address, raw, min(len(raw), size))
        return len(raw)

    def describe(self, serial: int, address: int, size: int) -> int:
        raw = f"psk;0;0;3f010000;{self.known(serial)['name']}".encode() + b"\0"
        ctypes.memmove(address, raw, min(len(raw), size))
        return len(raw)

    def invalidate(self, serial: int) -> int:
        self.check_possession(SERIAL)
        self.nvmet.called(f"invalidate-key {serial}")
        self.known(serial)
        (self.keys / str(serial)).unlink()
        self.nvmet.inspect()
        return 0

    # Keys

    def all(self) -> dict[int, dict[str, Any]]:
        return {int(p.name): json.loads(p.read_text()) for p in self.keys.iterdir() if p.name.isdecimal()}

    def known(self, serial: int) -> dict[str, Any]:
        if (key := self.all().get(serial)) is None:
            raise failure(errno.ENOKEY)
        return key

    def save(self, serial: int, key: dict[str, Any]) -> None:
        (self.keys / str(serial)).write_text(json.dumps(key))

    def put(self, name: str, raw: bytes) -> int:
        """As add_key(2), for another program, too."""
        last = self.keys / "last"
        serial = int(last.read_text()) + 1 if last.exists() else 1000
        last.write_text(str(serial))
        for other, key in self.all().items():
            if key["name"] == name:
                (self.keys / str(other)).unlink()
        self.save(serial, {"name": name, "raw": raw.hex()})
        self.nvmet.inspect()
        return serial

    def usable(self) -> dict[str, int]:
        """The serial numbers of all that can be used, by identity."""
        return {key["name"]: serial for serial, key in self.all().items()}

    def contents(self) -> dict[str, str]:
        """What can be used, by the paths of TlsKey. The serial numbers are others each time."""
        return {self.path(k["name"]): k["raw"] for k in self.all().values()}

    @staticmethod
    def path(name: str) -> str:
        return storagetm.TlsKey.STEM + name.replace("/", "_")

    def make(self, name: str) -> Callable[[], bool]:
        """Makes a key as another program would; returns what tells whether it is as it was."""
        serial = self.put(name, b"another program's")
        return lambda: self.all().get(serial) == {"name": name, "raw": b"another program's".hex()}
