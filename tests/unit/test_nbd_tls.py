# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD for who knows a code: by libnbd, QEMU and OpenSSL, and by those who do not know it."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storagetm
from storagetm import Admission, AllowedHost, Code, Nbd
from tests.unit.exports import Named, made_export
from tests.unit.test_nbd import (
    ACK,
    GO,
    INVALID,
    LIST,
    SET_CONTEXT,
    STARTTLS,
    STRUCTURED,
    UNSUP,
    Client,
    Serving,
)

CODE = Code.parse("k7fm-2qxd-9wtr-4hcn")
KEY = CODE.nbd_key().reveal().hex()
OTHER = Code.parse("0123-4567-89ab-cdef").nbd_key().reveal().hex()
EXPORT_NAME, ABORT = 1, 2
TLS_REQD = 0x80000005
REPLY = bytes.fromhex("0003e889045565a9")

# Serves a file; for each line of its input it prints who is attached. With an "x" it takes the file away.
PROGRAM = """
import json, os, select, sys
sys.path.insert(0, sys.argv[1])
import storagetm
from tests.unit.exports import made_disk
path = sys.argv[2]
storagetm.NbdSession.PATIENCE_SEC = float(sys.argv[3])
code = storagetm.Code.parse("k7fm-2qxd-9wtr-4hcn")
transport = storagetm.Nbd(admission=storagetm.Admission((), "required", code=code))
transport.prepare()
server = transport.server
disk = made_disk(path, size=os.path.getsize(path), block=512)
server.serve("disk", storagetm.NbdDisk(path, disk, read_only=True))
server.listen("127.0.0.1", 0)
print(server.listening["127.0.0.1"].getsockname()[1], flush=True)
poll = select.poll()
poll.register(server.poll.fileno(), select.POLLIN)
poll.register(0, select.POLLIN)
while True:
    for fd, _ in poll.poll():
        if fd:
            server.accept()
        elif not (word := os.read(0, 1)):
            sys.exit()
        elif word == b"x":
            server.withdraw("disk")
        else:
            print(json.dumps([client.about() for client in transport.attached()]), flush=True)
"""


def capable_python() -> str:
    """An interpreter that can do it; empty if there is none."""
    names = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in (15, 14, 13))]
    names += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.1[3-9]*/bin/python3")))
    check = "import ssl; assert ssl.HAS_PSK and ssl.SSLContext.set_psk_server_callback"
    for name in filter(None, names):
        if subprocess.run((name, "-c", check), check=False, stderr=subprocess.DEVNULL).returncode == 0:
            return name
    return ""


PYTHON = capable_python()
needs_keys = pytest.mark.skipif(not PYTHON, reason="no Python 3.13 or later here; tests/vm has one")


class Server:
    """One that only takes those who know the code, in a process of its own."""

    def __init__(self, path: Path, image: Path, patience: float = 10) -> None:
        self.errors = path / "errors"
        self.program = subprocess.Popen(
            (PYTHON, "-c", PROGRAM, Path(storagetm.__file__).parent, image, str(patience)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            env={**os.environ, "SYSTEMD_LOG_LEVEL": "debug"},
            text=True,
        )
        assert self.program.stdout
        self.port = int(self.program.stdout.readline())

    def attached(self) -> list[str]:
        assert self.program.stdin
        assert self.program.stdout
        self.program.stdin.write("\n")
        self.program.stdin.flush()
        return list(json.loads(self.program.stdout.readline()))

    def close(self) -> str:
        """What it has said."""
        self.program.communicate()
        assert self.program.returncode == 0
        said = self.errors.read_text()
        assert "Traceback" not in said
        assert "Exception" not in said
        assert KEY not in said
        return said


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image"
    path.write_bytes(os.urandom(3 << 20))
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[Server]:
    made = Server(tmp_path, image)
    yield made
    made.close()


def wait_until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def start_tls(server: Any) -> socket.socket:
    """A connection on which TLS is to begin now."""
    client = Client(server)
    assert client.option(STARTTLS) == [(ACK, b"")]
    return client.socket


class Relay:
    """For a client that knows TLS and not NBD: what comes before TLS is done when it connects."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.received = bytearray()  # from the server
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        inner, _ = self.listener.accept()
        outer = start_tls(self.server)
        back = threading.Thread(target=self.pump, args=(outer, inner))
        back.start()
        self.pump(inner, outer)
        back.join()
        inner.close()
        outer.close()
        self.listener.close()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.received += data if source.getpeername()[1] == self.server.port else b""
                target.sendall(data)
        except OSError:
            pass
        try:
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def openssl(server: Server, *words: str | bytes | Path, sent: bytes) -> tuple[bytes, str]:
    """What a client of OpenSSL's gets when it sends this, and what it says."""
    relay = Relay(server)
    done = subprocess.run(
        ("openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{relay.port}", *words),
        input=sent,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.stdout, done.stderr.decode(errors="replace")


RIGHT = ("-psk", KEY, "-psk_identity", "storagetm")


@needs_keys
def test_who_knows_the_code_is_let_in(server: Server) -> None:
    """And has forgotten what was negotiated before: that may have been slipped in."""
    sent = option(LIST) + option(STARTTLS) + option(SET_CONTEXT, struct.pack(">I", 4) + b"disk" + bytes(4))
    found, _ = openssl(server, *RIGHT, sent=sent + option(STRUCTURED) + option(ABORT))
    answers = [struct.unpack(">III", part[:12]) for part in found.split(REPLY)[1:]]
    assert [(number, kind) for number, kind, _ in answers] == [
        (LIST, 2),
        (LIST, ACK),
        (STARTTLS, INVALID),
        (SET_CONTEXT, INVALID),
        (STRUCTURED, ACK),
        (ABORT, ACK),
    ]


@needs_keys
def test_nobody_else_is_let_in(server: Server, tmp_path: Path) -> None:
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "2")
    certificate = ("-key", tmp_path / "key", "-cert", tmp_path / "cert")
    subprocess.run(
        (*made, "-keyout", "key", "-out", "cert"), check=True, cwd=tmp_path, stderr=subprocess.PIPE
    )
    for words in (
        (),
        certificate,
        ("-psk", OTHER, "-psk_identity", "storagetm"),
        ("-psk", OTHER, "-psk_identity", "storagetm", *certificate),
        ("-psk", KEY, "-psk_identity", ""),
        ("-psk", KEY, "-psk_identity", "Storagetm"),
        ("-psk", KEY, "-psk_identity", b"\xff\xfe"),
        ("-psk", "00", "-psk_identity", "storagetm"),
        (*RIGHT, "-tls1_2"),
        (*RIGHT, "-tls1_2", "-cipher", "PSK"),
        # The key is for SHA-256.
        (*RIGHT, "-ciphersuites", "TLS_AES_256_GCM_SHA384"),
    ):
        found, said = openssl(server, *words, sent=option(LIST))
        assert found == b"", words
        assert "alert" in said or "error" in said, words
    for suite in ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"):
        found, _ = openssl(server, *RIGHT, "-ciphersuites", suite, sent=option(LIST) + option(ABORT))
        assert found.count(REPLY) == 3
    assert server.attached() == []


@needs_keys
def test_what_is_slipped_in_before_tls_counts_for_nothing(server: Server) -> None:
    """Bytes behind the option that begins TLS are TLS's, and none of it."""
    with Client(server) as client:  # type: ignore[arg-type]
        client.socket.sendall(option(STARTTLS) + option(STRUCTURED) + option(LIST))
        found = b""
        try:
            while data := client.socket.recv(65536):
                found += data
        except ConnectionError:
            pass
        assert found.count(REPLY) == 1
        assert found.startswith(REPLY + struct.pack(">II", STARTTLS, ACK))
    assert "no TLS" in server.errors.read_text()


@needs_keys
def test_slow_handshake_holds_up_nobody(tmp_path: Path, image: Path) -> None:
    server = Server(tmp_path, image, patience=2)
    slow = [start_tls(server) for _ in range(20)]
    slow[0].sendall(b"\x16\x03\x01\x02\x00")  # a record's beginning
    begin = time.monotonic()
    found, _ = openssl(server, *RIGHT, sent=option(LIST) + option(ABORT))
    assert found.count(REPLY) == 3
    for number, each in enumerate(slow):
        try:
            while each.recv(100):
                each.sendall(b"\0" * (number & 1))
        except ConnectionError:
            pass
        each.close()
    assert time.monotonic() - begin < 6
    server.close()


def paired(port: int = 10809) -> Nbd:
    transport = Nbd(storagetm.Listening(["127.0.0.1"], port), admission=Admission((), "required", code=CODE))
    transport.texts = ["127.0.0.1"]
    return transport


HERE = storagetm.Address(storagetm.AF_INET, "127.0.0.1", "lo", False)


def pasted(instruction: storagetm.Instruction, width: int = 79) -> str:
    return "\n".join(line for _, line in instruction.shown(width))


@needs_keys
def test_commands_on_the_screen_work(
    server: Server, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file that only its owner can read, and no command whose line has the key in it."""
    monkeypatch.chdir(tmp_path)
    transport = paired(server.port)
    (first,) = transport.instructions([made_export("disk")], [HERE])
    lines = pasted(first).replace("modprobe nbd", "").partition("qemu-nbd")[0]
    subprocess.run(("sh", "-s"), input=f"umask 0\n{lines}", check=True, text=True)
    file = Path(transport.KEY_FILE)
    assert file.read_text() == f"storagetm:{KEY}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    # As the command has it, but for what attaches it.
    words = [
        "qemu-img",
        "convert",
        "-O",
        "raw",
        *pasted(first).partition("/dev/nbd0")[2].replace("\\\n", "").split(),
    ]
    subprocess.run((*words, "converted"), check=True)
    assert Path("converted").read_bytes() == image.read_bytes()
    hint = transport.way([HERE]).hint
    command = re.search(r"nbdcopy '.*' FILE", hint)
    assert command
    subprocess.run(("sh", "-c", command[0].replace("NAME", "disk").replace("FILE", "copied")), check=True)
    assert Path("copied").read_bytes() == image.read_bytes()
    said = subprocess.run(
        ("nbdinfo", "--list", f"nbd://127.0.0.1:{server.port}"), check=False, capture_output=True
    )
    assert said.returncode


@needs_keys
@pytest.mark.parametrize("taken", [False, True])
def test_client_is_shown_as_encrypted(server: Server, taken: bool) -> None:
    """Until it leaves, or its disk is taken away; and then nothing goes over the wire without encryption."""
    relay = Relay(server)
    words = ("openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{relay.port}", *RIGHT)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
        assert client.stdin
        client.stdin.write(option(GO, struct.pack(">I", 4) + b"disk\0\0"))
        # So much that it cannot all be sent.
        requests = [struct.pack(">IHHQQI", 0x25609513, 0, 0, n, 0, 3 << 20) for n in range(20)]
        client.stdin.write(b"".join(requests if taken else []))
        client.stdin.flush()
        wait_until(server.attached)
        (found,) = server.attached()
        assert re.search(r"1 connection, encrypted \(TLS 1\.3, (AES-128-GCM|ChaCha20-Poly1305)\)$", found)
        if taken:
            client.send_signal(signal.SIGSTOP)
            assert server.program.stdin
            server.program.stdin.write("x")
            wait_until(lambda: not server.attached())
            client.send_signal(signal.SIGCONT)
        else:
            client.stdin.write(struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0))
    wait_until(lambda: not server.attached())
    records = bytes(relay.received)
    while len(records) >= 5:
        assert records[0] in (20, 21, 22, 23)
        assert records[1:3] == b"\3\3"
        records = records[5 + int.from_bytes(records[3:5], "big") :]


def test_before_tls_nothing_is_told(image: Path) -> None:
    """Not even where there is no TLS: a server that has a key answers nobody without it."""
    made = storagetm.NbdServer(CODE.nbd_key())
    made.listen("127.0.0.1", 0)
    serving = Serving(made)
    serving.add(image)
    try:
        with Client(serving) as client:
            for number in (LIST, GO, 6, STRUCTURED, 9, SET_CONTEXT, 11, 4711, 0):
                assert client.option(number) == [(TLS_REQD, b"")]
            assert client.option(GO, struct.pack(">I", 4) + b"disk\0\0") == [(TLS_REQD, b"")]
            assert client.option(STARTTLS, b"x") == [(INVALID, b"")]
            assert client.option(STARTTLS) == [(UNSUP, b"")]
            assert client.option(ABORT) == [(ACK, b"")]
        for name in (b"disk", b"", b"nice"):
            with Client(serving) as client:
                client.socket.sendall(option(EXPORT_NAME, name))
                with pytest.raises((EOFError, ConnectionError)):
                    client.take(1)
        assert not made.disks["disk"].users
    finally:
        serving.close()


def test_screen_of_who_has_the_code() -> None:
    """The key is in nothing but what a screen shows."""
    transport = paired()
    exports = [made_export(name, live={"nbd": None}) for name in ("vda", "vdb,x")]
    report = storagetm.take_report(Named(), [transport, transport], [HERE], exports, storagetm.Memory())
    assert report.codes == [CODE.text()]
    first, second = transport.instructions(exports, [HERE])
    assert KEY in pasted(first)
    assert KEY not in first.line + second.line + pasted(second) + repr(first.before)
    assert all(len(line) < 80 for line in pasted(first).split("\n") if KEY not in line)
    assert all(len(line) < 80 for line in pasted(first).split("\n"))
    assert "export=vdb,,x" in second.line
    assert "-r " in second.line
    assert "nbd-client" not in pasted(first) + pasted(second)
    assert "nbd-client cannot" in transport.way([HERE]).hint
    assert KEY not in transport.way([HERE]).hint
    # And no other user of the other machine sees it there.
    shown = "\n".join(text for block in report.blocks(80) for _, text in block)
    assert KEY in shown
    assert "Other users" not in shown


HOST = AllowedHost("nqn.2014-08.org.nvmexpress:uuid:79338e9a-2392-49a9-91f4-9675489fb8f3")


@pytest.mark.parametrize(
    ("admission", "why"),
    [
        (Admission([HOST]), "NBD knows no names of hosts"),
        (Admission([HOST], "required"), "NBD knows no names of hosts"),
        (Admission([AllowedHost("nqn.x")], "required", code=CODE), "NBD knows no names of hosts"),
        (Admission((), "offered", code=CODE), ""),
        (Admission((), "no", code=CODE), ""),
        (Admission((), "required", code=CODE), ""),
        (Admission(), ""),
    ],
)
@pytest.mark.parametrize("names", [["nbd"], ["nvme-tcp", "nbd"]])
def test_what_nbd_cannot_keep_out_is_refused(admission: Admission, why: str, names: list[str]) -> None:
    options = storagetm.Options()
    options.transports = names
    access = storagetm.Access((), storagetm.READ_ONLY)
    if why:
        with pytest.raises(storagetm.UsageError, match=why):
            storagetm.chosen_transports(options, Named(), "quux", access, admission)
        return
    found = storagetm.chosen_transports(options, Named(), "quux", access, admission)
    (nbd,) = [t for t in found if isinstance(t, Nbd)]
    assert bool(nbd.server.key) == nbd.restricted == admission.restricted


@pytest.mark.parametrize("lacks", ["callback", "keys", "module"])
def test_python_that_cannot_do_it_is_refused(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks == "module":
        monkeypatch.setitem(sys.modules, "ssl", None)
    elif lacks == "callback":
        monkeypatch.delattr(ssl.SSLContext, "set_psk_server_callback", raising=False)
    else:
        monkeypatch.setattr(ssl.SSLContext, "set_psk_server_callback", None, raising=False)
        monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    transport = paired()
    with pytest.raises(
        storagetm.UserError, match=r"Over NBD nobody can be kept out here: .*\. Leave out --tr"
    ):
        transport.prepare()
    assert transport.server.tls is None
    Nbd().prepare()  # it needs none


def test_code_of_its_own_outlives_a_kill_alone(tmp_path: Path) -> None:
    kept = tmp_path / "code"
    transport = Nbd(admission=Admission((), "required", code=CODE, own=True, kept=str(kept)))
    transport.adopt({})
    assert kept.read_text() == CODE.text()
    assert kept.stat().st_mode & 0o777 == 0o600
    transport.end()
    assert not kept.exists()
    assert errno.ENOENT
