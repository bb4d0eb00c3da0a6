# SPDX-License-Identifier: LGPL-2.1-or-later
"""Emulated machines: QEMU without hardware virtualisation, controlled from the outside and the inside.

    with Machine("target", image, disks=[Disk("data", serial="DISK-A")]) as machine:
        machine.start()
        machine.wait_boot()
        print(machine.run("lsblk").stdout)

- From the inside, through the agent: `run()`, `start_process()`, `put()`, `get()`.
- From the outside, through QEMU: `add_disk()`, `remove_disk()`, `resize_disk()`, `insert_medium()`,
  `eject_medium()`, `set_link()`, `reset()`, `kill()`, `screendump()`, `vga_text()`.
- As somebody who sits in front of it: `screen()`, `wait_screen()`, `send_keys()` for the serial console.

Nothing that a machine does to its root disk is kept. Machines are `start()`ed from the main thread: they die
with the thread that started them, so that a test run that is killed leaves none behind. To boot several at a
time, start them all and then wait for each.

All times are in seconds. They are limits for a machine that is stuck, not expectations: emulation is slow,
and a host that is busy with something else makes it slower.
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import hashlib
import json
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, Union

import pyte

from tests.harness.images import Image

MIB = 1 << 20

BOOT_TIMEOUT = 300.0
COMMAND_TIMEOUT = 120.0

Command = Union[str, Sequence[str]]
T = TypeVar("T")

# Drivers for what an emulated machine has and no test needs. They can still be loaded by name.
BLACKLIST = ",".join(
    (
        *(
            "aesni_intel",
            "crc32_pclmul",
            "crct10dif_pclmul",
            "ghash_clmulni_intel",
            "sha1_ssse3",
            "sha256_ssse3",
        ),
        *("sha512_ssse3", "floppy", "i2c_piix4", "kvm_amd", "pcspkr", "psmouse", "qemu_fw_cfg", "serio_raw"),
    )
)

# Quick to boot, and quiet: console output is slow when the port is emulated.
KERNEL_OPTIONS = (
    "console=ttyS0",
    "loglevel=5",
    "mitigations=off",
    "nokaslr",
    "audit=0",
    "cryptomgr.notests",
    "init_on_alloc=0",
    "kfence.sample_interval=0",
    "lpj=10000000",  # Saves measuring it, which fails.
    "lsm=yama",
    f"modprobe.blacklist={BLACKLIST}",
    "no_timer_check",
    "net.ifnames=0",
    "panic=-1",
    "random.trust_cpu=on",
    "systemd.show_status=0",
    "tsc=reliable",
)

_live: weakref.WeakSet[Machine] = weakref.WeakSet()


class MachineError(Exception):
    """Something went wrong in or with a machine; the message ends with what its console showed last."""


class CommandError(MachineError):
    """A command in a machine failed."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command in a machine did."""

    returncode: int
    stdout_bytes: bytes
    stderr_bytes: bytes

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk, or with `kind="cd"` a CD drive, that is empty unless it has a path.

    `size` and `block_size` are in bytes. Without a path the disk is a new file full of zeros, see
    `Machine.disk_path()`. The machine gets an error when it reads one of `bad_sectors`, of 512 bytes each.
    """

    id: str
    size: int = 64 * MIB
    path: Path | None = None
    serial: str | None = None
    bus: Literal["virtio", "scsi", "nvme", "ide", "usb"] = "virtio"
    kind: Literal["disk", "cd"] = "disk"
    readonly: bool = False
    block_size: int = 512
    bad_sectors: tuple[int, ...] = ()


class Wire:
    """A network cable: give one end to each of two machines.

    An end can be used again once its machine is gone. Packets into an end without a machine are lost, as
    they should be.
    """

    def __init__(self) -> None:
        # In /tmp, since the path of a socket may have no more than 107 bytes.
        self._directory = tempfile.TemporaryDirectory(prefix="stm-", dir="/tmp")
        paths = [Path(self._directory.name) / end for end in "ab"]
        self.ends = ((paths[0], paths[1]), (paths[1], paths[0]))


@dataclasses.dataclass(frozen=True)
class Nic:
    """A network adapter, plugged into one end of a wire or, without one, into nothing.

    `device` is QEMU's name for the adapter's kind.
    """

    wire: Wire | None = None
    end: Literal[0, 1] = 0
    mac: str | None = None
    device: str = "virtio-net-pci"


class Qmp:
    """QEMU's control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._lock = threading.RLock()
        self._events: list[dict[str, Any]] = []
        self._read()  # The greeting.
        self.call("qmp_capabilities")

    def _read(self, timeout: float | None = 60.0) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        line = self._file.readline()
        if not line:
            raise MachineError("QEMU has closed its control socket.")
        message: dict[str, Any] = json.loads(line)
        return message

    def call(self, command: str, **arguments: Any) -> Any:
        """Carry out a QMP command; underscores in arguments' names become dashes, but not in properties."""
        if command != "device_add":
            arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        with self._lock:
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            while True:
                message = self._read()
                if "event" in message:
                    self._events.append(message)
                elif "error" in message:
                    raise MachineError(f"QEMU: {command}: {message['error']['desc']}")
                else:
                    return message["return"]

    def monitor(self, command: str) -> str:
        """Carry out a command of the human monitor."""
        return str(self.call("human-monitor-command", command_line=command))

    def wait_event(self, name: str, timeout: float, **data: str) -> dict[str, Any]:
        """Wait for an event whose data has these values; it may have come in since the last wait for it."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while True:
                for event in self._events:
                    if event["event"] == name and data.items() <= event.get("data", {}).items():
                        self._events.remove(event)
                        return event
                # Asking for something makes waiting events come in, and never leaves a line read by half.
                self.call("query-name")
                if time.monotonic() > deadline:
                    raise MachineError(f"QEMU sent no event {name} {data} within {timeout:.0f} s.")
                time.sleep(0.02)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Terminal:
    """A terminal of a fixed size that understands what programs write to the serial console."""

    # pyte prints these, which it doesn't know, instead of skipping them: control sequences with intermediate
    # bytes or private parameters that only xterm knows, and device control, application and privacy strings.
    UNKNOWN = re.compile(
        rb"\x1b\[[0-?]*[ -/]+[@-~]|\x1b\[[<=>][0-?]*[@-~]|\x1b[PX^_].*?(?:\x1b\\|\x07)", re.DOTALL
    )
    UNFINISHED = re.compile(
        rb"\x1b(?:\[[0-?]*[ -/]*|[PX^_][^\x1b\x07]{0,4096}\x1b?|\][^\x1b\x07]{0,4096}\x1b?)?\Z"
    )

    def __init__(self, columns: int, rows: int, reply: Callable[[str], None] | None = None) -> None:
        self._screen = pyte.Screen(columns, rows)
        if reply:
            self._screen.write_process_input = reply  # type: ignore[assignment]
        self._stream = pyte.ByteStream(self._screen)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        data = self.UNKNOWN.sub(b"", self._rest + data)
        unfinished = self.UNFINISHED.search(data)
        cut = unfinished.start() if unfinished else len(data)
        data, self._rest = data[:cut], data[cut:]
        try:
            self._stream.feed(data)
        except Exception:
            # pyte trips over some sequences, and its parser is of no use afterwards.
            self._stream = pyte.ByteStream(self._screen)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    @property
    def cursor(self) -> tuple[int, int]:
        """Column and row, counted from 0."""
        return self._screen.cursor.x, self._screen.cursor.y

    def style(self, column: int, row: int) -> Any:
        """A cell with its colours and other attributes: pyte's Char."""
        return self._screen.buffer[row][column]


class Process:
    """A command that goes on in a machine while a test does something else."""

    def __init__(self, machine: Machine, pid: int) -> None:
        self.machine = machine
        self.pid = pid
        self._output = b""

    def poll(self, timeout: float = 0) -> int | None:
        """The return code, or None if it is still running after this time."""
        reply = self.machine.agent.request(
            {"op": "poll", "pid": self.pid, "timeout": timeout, "offset": len(self._output)}, timeout + 60
        )
        self._output += base64.b64decode(reply["output"])
        returncode: int | None = reply["returncode"]
        return returncode

    def wait(self, timeout: float = COMMAND_TIMEOUT) -> int:
        """Wait for its end and return its return code."""
        returncode = self.poll(timeout)
        if returncode is None:
            raise self.machine.error(
                f"Process {self.pid} has not ended within {timeout:.0f} s; it wrote:\n{self.output}"
            )
        return returncode

    @property
    def output(self) -> str:
        """All that it has written so far to its standard output and error."""
        self.poll()
        return self._output.decode(errors="replace")

    def wait_output(self, pattern: str, timeout: float = COMMAND_TIMEOUT) -> re.Match[str]:
        """Wait until a regular expression is found in what it has written."""

        def search() -> re.Match[str] | None:
            return re.search(pattern, self.output, re.MULTILINE)

        try:
            return self.machine.wait_until(search, timeout)
        except TimeoutError:
            raise self.machine.error(
                f"Process {self.pid} has not written {pattern!r} within {timeout:.0f} s, but:\n{self.output}"
            ) from None

    def kill(self, number: int = signal.SIGTERM, *, group: bool = False) -> None:
        """Send a signal to it, or with `group` also to what it has started."""
        self.machine.agent.request(
            {"op": "signal", "pid": self.pid, "signal": int(number), "group": group}, 60
        )


class Agent:
    """The connection to the agent in a machine."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self._machine = machine
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lock = threading.Lock()
        self._replies: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._last_id = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        received = bytearray()
        while True:
            try:
                data = self._socket.recv(1 << 20)
            except OSError:
                return
            if not data:
                return
            received += data
            if b"\n" not in data:
                continue
            *lines, rest = bytes(received).split(b"\n")
            received = bytearray(rest)
            for line in lines:
                try:
                    reply = json.loads(line)
                except ValueError:
                    continue  # Half a line, cut off by a reset.
                waiting = self._replies.pop(reply["id"], None)
                if waiting:
                    waiting.put(reply)

    def request(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for its reply."""
        replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        with self._lock:
            self._last_id += 1
            number = self._last_id
            self._replies[number] = replies
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps({"id": number, **request}).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while True:
            try:
                reply = replies.get(timeout=0.5)
                break
            except queue.Empty:
                if not self._machine.running:
                    raise self._machine.error(f"The machine ended during {request['op']}.") from None
                if time.monotonic() > deadline:
                    self._replies.pop(number, None)
                    raise self._machine.error(
                        f"The agent has not answered {request['op']} within {timeout:.0f} s."
                    ) from None
        if "error" in reply:
            raise self._machine.error(f"{request['op']}: {reply['error']}")
        return reply

    def close(self) -> None:
        self._socket.close()


class Machine:
    """One emulated machine.

    With more than one of `cpus`, QEMU 7.2 was seen to lose a processor's flags while another one patched the
    code that the first one ran, and the guest's kernel died.

    `memory` is in MiB (by default enough), `terminal` the columns and rows of the terminal on the serial
    console. `kernel_options` are added to the command line. With an `initrd` the machine boots that instead
    of the image's, and has no root disk unless `root_disk` is true.

    `machine_id` is what systemd takes for the machine's ID, by default one made from the name; an empty
    string leaves it to the machine. `reboots` says what a reboot does: boot again, or end the machine. The
    clock of a `steady` machine, which has one processor, counts instructions (2 ns each) instead of seconds,
    so that times do not depend on what else the host does. With `tpm` the machine has a new TPM 2.0.
    """

    def __init__(
        self,
        name: str,
        image: Image,
        *,
        disks: Sequence[Disk] = (),
        nics: Sequence[Nic] = (),
        kernel_options: Sequence[str] = (),
        initrd: Path | None = None,
        root_disk: bool | None = None,
        machine_id: str | None = None,
        memory: int | None = None,
        cpus: int = 1,
        vga: bool = False,
        reboots: bool = False,
        terminal: tuple[int, int] = (80, 25),
        qemu_options: Sequence[str] = (),
        log_directory: Path | None = None,
        interactive: bool = False,
        steady: bool = False,
        tpm: bool = False,
    ) -> None:
        self.name = name
        self.image = image
        self.machine_id = hashlib.md5(name.encode()).hexdigest() if machine_id is None else machine_id
        # In /tmp, since the path of a socket may have no more than 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="stm-", dir="/tmp"))
        log_directory = log_directory or self.directory
        log_directory.mkdir(parents=True, exist_ok=True)
        self.console_log = log_directory / f"{name}-console.log"
        self.qemu_log = log_directory / f"{name}-qemu.log"
        self.terminal = Terminal(*terminal, self.send_keys)
        self._initrd = initrd
        self._root_disk = initrd is None if root_disk is None else root_disk
        self._disks = tuple(disks)
        self._nics = tuple(nics)
        self._kernel_options = tuple(kernel_options)
        # An initrd with the drivers for everything takes 250 MiB, twice while it is unpacked.
        self._memory = memory or (1024 if initrd else 768)
        self._cpus = cpus
        self._vga = vga
        self._reboots = reboots
        self._terminal_size = terminal
        self._qemu_options = tuple(qemu_options)
        self._interactive = interactive
        self._steady = steady
        self._tpm = tpm
        self._disk_paths: dict[str, Path] = {}
        self._console = bytearray()
        self._console_socket: socket.socket | None = None
        self._console_changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: Agent | None = None
        self._qmp: Qmp | None = None
        self._tpm_process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    # Starting and ending.

    def command_line(self) -> list[str]:
        """The command that emulates the machine."""
        columns, rows = self._terminal_size
        options = [*KERNEL_OPTIONS, f"systemd.tty.columns.ttyS0={columns}", f"systemd.tty.rows.ttyS0={rows}"]
        if self.machine_id:
            options.append(f"systemd.machine_id={self.machine_id}")
        command = [
            # Ends QEMU if this process ends, however that comes about.
            *("setpriv", "--pdeathsig", "KILL"),
            *(
                "qemu-system-x86_64",
                "-name",
                self.name,
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ),
            # The plain old PC: any of its PCI slots takes a disk while it runs, and it has an IDE bus.
            *("-machine", "pc,usb=off"),
            *(
                ("-accel", "tcg,thread=single,tb-size=256", "-icount", "shift=1,sleep=off")
                if self._steady
                else ("-accel", "tcg,thread=multi,tb-size=256")
            ),
            # Five-level page tables only make emulation slower. After cmpxchg16b QEMU 7 has wrong flags: the
            # guest's kernel, whose slab allocator uses it, dies of that once in hours.
            *(
                "-cpu",
                "max,la57=off,cx16=off",
                "-smp",
                str(1 if self._steady else self._cpus),
                "-m",
                str(self._memory),
            ),
            *("-kernel", str(self.image.kernel), "-initrd", str(self._initrd or self.image.boot_initrd)),
            *("-append", " ".join([*options, *self._kernel_options])),
            *("-qmp", f"unix:{self.directory}/qmp,server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=serial"),
            *("-chardev", f"socket,id=agent,path={self.directory}/agent,server=on,wait=off"),
            *("-device", "virtserialport,bus=serial.0,chardev=agent,name=storagetm.agent"),
            *("-device", "virtio-rng-pci"),
            *("-vga", "std" if self._vga else "none"),
        ]
        if self._interactive:
            # With mux, Ctrl-A X ends the machine; without signal, Ctrl-C is the machine's.
            command += ["-chardev", f"stdio,id=console,mux=on,signal=off,logfile={self.console_log}"]
            command += ["-serial", "chardev:console", "-mon", "chardev=console"]
        else:
            command += [
                "-chardev",
                f"socket,id=console,path={self.directory}/console,server=on,wait=on,logfile={self.console_log}",
                *("-serial", "chardev:console"),
            ]
        if not self._reboots:
            command.append("-no-reboot")
        if self._tpm:
            command += ["-chardev", f"socket,id=tpm,path={self.directory}/tpm"]
            command += ["-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm"]
        if self._root_disk:
            # First, so that it is /dev/vda.
            command += [
                "-drive",
                f"if=none,id=root,format=raw,file={self.image.root},snapshot=on,cache=unsafe",
            ]
            command += ["-device", "virtio-blk-pci,drive=root,serial=root"]
        command += ["-device", "virtio-scsi-pci,id=scsi"]
        if any(disk.bus == "usb" for disk in self._disks):
            command += ["-device", "qemu-xhci,id=usb"]
        for number, nic in enumerate(self._nics):
            mac = nic.mac or f"52:54:00:{hashlib.md5(f'{self.name} {number}'.encode()).hexdigest()[:6]}"
            mac = re.sub(r"(?<=[0-9a-f]{2}:00:)(..)(..)(..)$", r"\1:\2:\3", mac)
            if nic.wire:
                local, remote = nic.wire.ends[nic.end]
                netdev = f"dgram,local.type=unix,local.path={local},remote.type=unix,remote.path={remote}"
            else:
                netdev = f"hubport,hubid={number}"
            command += ["-netdev", f"{netdev},id=net{number}"]
            command += ["-device", f"{nic.device},netdev=net{number},id=nic{number},mac={mac},romfile="]
        for disk in self._disks:
            if disk.kind != "cd" or disk.path:
                command += ["-blockdev", json.dumps(self._block_node(disk))]
            command += ["-device", json.dumps(self._device(disk))]
        return [*command, *self._qemu_options]

    def start(self) -> None:
        """Switch the machine on. Call this in the main thread: see above."""
        if self._tpm:
            self._start_tpm()
        with self.qemu_log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command_line(),
                stdin=None if self._interactive else subprocess.DEVNULL,
                stdout=None if self._interactive else log,
                stderr=log,
            )
        _live.add(self)
        if not self._interactive:
            # QEMU waits for this one, so nothing that the console shows is lost.
            self._console_socket = socket.socket(socket.AF_UNIX)
            self._connect(self._console_socket.connect, self.directory / "console")
            threading.Thread(target=self._read_console, daemon=True).start()
        self._qmp = self._connect(Qmp, self.directory / "qmp")
        self._agent = self._connect(lambda path: Agent(self, Path(path)), self.directory / "agent")

    def _start_tpm(self) -> None:
        """Start a TPM, which ends with QEMU."""
        path = self.directory / "tpm"
        self._tpm_process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "swtpm", "socket", "--tpm2", "--terminate"),
                *("--tpmstate", f"dir={self.directory}", "--ctrl", f"type=unixio,path={path}"),
            ],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not path.exists():
            if time.monotonic() > deadline:
                raise MachineError(f"The TPM of {self.name} does not start.")
            time.sleep(0.02)

    def _connect(self, connect: Callable[[Any], T], path: Path) -> T:
        deadline = time.monotonic() + 60
        while True:
            try:
                return connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.running or time.monotonic() > deadline:
                    raise self.error(f"QEMU does not start: {self.qemu_log.read_text()}") from None
                time.sleep(0.02)

    def wait_boot(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Wait until the agent runs and udev has dealt with all devices."""
        self.agent.request({"op": "hello"}, timeout)
        self.run("udevadm settle --timeout=120", timeout=130)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def nic_count(self) -> int:
        return len(self._nics)

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            raise MachineError(f"{self.name} is not running.")
        return self._agent

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise MachineError(f"{self.name} is not running.")
        return self._qmp

    def wait_end(self, timeout: float = COMMAND_TIMEOUT) -> None:
        """Wait until the machine has switched itself off, or with `reboots=False` rebooted."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"{self.name} has not ended within {timeout:.0f} s.") from None

    def reset(self) -> None:
        """Press the reset button. Use `wait_boot()` afterwards."""
        self.qmp.call("system_reset")

    def power_button(self) -> None:
        """Press the power button."""
        self.qmp.call("system_powerdown")

    def kill(self) -> None:
        """Pull the plug, and remove everything of the machine but its logs."""
        if self._process:
            self._process.kill()
            self._process.wait()
        if self._tpm_process:
            self._tpm_process.kill()
            self._tpm_process.wait()
        for connection in (self._agent, self._qmp, self._console_socket):
            if connection:
                connection.close()
        self._agent = self._qmp = self._console_socket = None
        _live.discard(self)
        shutil.rmtree(self.directory, ignore_errors=True)

    def error(self, message: str) -> MachineError:
        """An exception that also tells what the console showed last."""
        return MachineError(f"{self.name}: {message}{self._tail_note()}")

    def _tail_note(self) -> str:
        return (
            f"\n--- the last lines of {self.name}'s console, {self.console_log} ---\n{self.console_tail()}"
        )

    # Inside, through the agent.

    def run(
        self,
        command: Command,
        *,
        check: bool = True,
        stdin: str | bytes = b"",
        environment: Mapping[str, str] | None = None,
        timeout: float = COMMAND_TIMEOUT,
    ) -> Result:
        """Run a command as root and wait for its end. A string is run by bash; a list is not.

        With `check` a return code other than 0 is a CommandError. A time-out always is a MachineError.
        """
        reply = self.agent.request(
            {
                "op": "run",
                "command": command if isinstance(command, str) else list(command),
                "stdin": base64.b64encode(stdin.encode() if isinstance(stdin, str) else stdin).decode(),
                "environment": dict(environment or {}),
                "timeout": timeout,
            },
            timeout + 60,
        )
        stdout, stderr = base64.b64decode(reply["stdout"]), base64.b64decode(reply["stderr"])
        shown = command if isinstance(command, str) else shlex.join(command)
        result = Result(reply["returncode"], stdout, stderr)
        output = f"--- stdout ---\n{result.stdout}\n--- stderr ---\n{result.stderr}"
        if reply["timed_out"]:
            raise self.error(f"`{shown}` has not ended within {timeout:.0f} s.\n{output}")
        if check and result.returncode != 0:
            raise CommandError(
                f"{self.name}: `{shown}` returned {result.returncode}.\n{output}{self._tail_note()}"
            )
        return result

    def start_process(self, command: Command, *, environment: Mapping[str, str] | None = None) -> Process:
        """Start a command as root and return at once."""
        reply = self.agent.request(
            {
                "op": "start",
                "command": command if isinstance(command, str) else list(command),
                "environment": dict(environment or {}),
            },
            60,
        )
        return Process(self, reply["pid"])

    def put(self, path: str, data: str | bytes | Path, mode: int = 0o644) -> None:
        """Write a file in the machine: a text, bytes, or what is in a file here."""
        if isinstance(data, Path):
            data = data.read_bytes()
        content = data.encode() if isinstance(data, str) else data
        self.agent.request(
            {"op": "put", "path": path, "data": base64.b64encode(content).decode(), "mode": mode},
            COMMAND_TIMEOUT,
        )

    def get(self, path: str) -> bytes:
        """Read a file in the machine."""
        return base64.b64decode(self.agent.request({"op": "get", "path": path}, COMMAND_TIMEOUT)["data"])

    def wait_until(
        self, condition: Callable[[], T | None], timeout: float = COMMAND_TIMEOUT, interval: float = 0.2
    ) -> T:
        """Wait until a function returns something true, and return that. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"Not within {timeout:.0f} s: {condition}{self._tail_note()}")
            time.sleep(interval)

    def wait_run(self, command: Command, timeout: float = COMMAND_TIMEOUT, interval: float = 0.3) -> Result:
        """Run a command again and again until it returns 0."""

        def attempt() -> Result | None:
            result = self.run(command, check=False, timeout=timeout)
            return result if result.returncode == 0 else None

        try:
            return self.wait_until(attempt, timeout, interval)
        except TimeoutError:
            return self.run(command, timeout=timeout)  # Its error says more.

    # Disks.

    def disk_path(self, disk_id: str) -> Path:
        """The file here that holds a disk's contents. It can be read while the machine runs."""
        return self._disk_paths[disk_id]

    def _block_node(self, disk: Disk) -> dict[str, Any]:
        path = disk.path
        if path is None:
            path = self.directory / f"{disk.id}.raw"
            with path.open("ab") as file:
                file.truncate(disk.size)
        self._disk_paths[disk.id] = path
        protocol: dict[str, Any] = {"driver": "file", "filename": str(path), "locking": "off"}
        if disk.bad_sectors:
            errors = [
                {"event": "none", "iotype": "read", "errno": 5, "sector": sector, "once": False}
                for sector in disk.bad_sectors
            ]
            protocol = {"driver": "blkdebug", "image": protocol, "inject-error": errors}
        return {
            "node-name": disk.id,
            "driver": "raw",
            "read-only": disk.readonly or disk.kind == "cd",
            "discard": "unmap",
            "file": protocol,
        }

    def _device(self, disk: Disk) -> dict[str, Any]:
        drivers = {
            ("virtio", "disk"): {"driver": "virtio-blk-pci"},
            ("scsi", "disk"): {"driver": "scsi-hd", "bus": "scsi.0"},
            ("scsi", "cd"): {"driver": "scsi-cd", "bus": "scsi.0"},
            ("nvme", "disk"): {"driver": "nvme"},
            ("ide", "disk"): {"driver": "ide-hd"},
            ("ide", "cd"): {"driver": "ide-cd"},
            ("usb", "disk"): {"driver": "usb-storage", "bus": "usb.0"},
        }
        device: dict[str, Any] = {**drivers[disk.bus, disk.kind], "id": f"{disk.id}-device"}
        if disk.kind != "cd" or disk.path:
            device["drive"] = disk.id
        if disk.serial is not None:
            device["serial"] = disk.serial
        elif disk.bus == "nvme":
            device["serial"] = disk.id  # Mandatory.
        if disk.block_size != 512:
            device["logical_block_size"] = device["physical_block_size"] = disk.block_size
        return device

    def add_disk(self, disk: Disk) -> None:
        """Plug a disk in. The machine notices in its own time. Not for `bus="ide"`."""
        if disk.kind != "cd" or disk.path:
            self.qmp.call("blockdev-add", **self._block_node(disk))
        self.qmp.call("device_add", **self._device(disk))

    def remove_disk(self, disk_id: str, timeout: float = 60.0) -> None:
        """Unplug a disk, and wait until the machine has let go of it."""
        self.qmp.call("device_del", id=f"{disk_id}-device")
        self.qmp.wait_event("DEVICE_DELETED", timeout, device=f"{disk_id}-device")
        self.qmp.call("blockdev-del", node_name=disk_id)

    def resize_disk(self, disk_id: str, size: int) -> None:
        """Change the size, in bytes, of a disk that is in use."""
        self.qmp.call("block_resize", node_name=disk_id, size=size)

    def insert_medium(self, drive_id: str, path: Path) -> None:
        """Put a CD, the contents of a file here, into a drive."""
        # Also an empty drive may be locked: by udev's rules for a CD that was taken out while they ran.
        self._press_button("blockdev-change-medium", drive_id, filename=str(path), format="raw")

    def eject_medium(self, drive_id: str, *, force: bool = False) -> None:
        """Press a CD drive's eject button, or with `force` pull the CD out although the machine has locked
        the drive.
        """
        self._press_button("eject", drive_id, force=force)

    def _press_button(self, command: str, drive_id: str, **arguments: Any) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.qmp.call(command, id=f"{drive_id}-device", **arguments)
                return
            except MachineError as e:
                # The machine was told of the button, and its udev rules unlock and open the drive.
                if "is locked" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    # The network.

    def set_link(self, up: bool, nic: int = 0) -> None:
        """Plug the cable of a network adapter in or out."""
        self.qmp.call("set_link", name=f"nic{nic}", up=up)

    # Consoles.

    def _read_console(self) -> None:
        connection = self._console_socket
        while connection:
            try:
                data = connection.recv(65536)
            except OSError:
                break
            if not data:
                break
            with self._console_changed:
                self._console += data
                self.terminal.feed(data)
                self._console_changed.notify_all()

    def console_tail(self, lines: int = 40) -> str:
        """The last lines that the serial console has shown, without what controls the terminal."""
        # Each row of a screen that is drawn in place begins with the cursor's way there.
        console = re.sub(rb"\x1b\[\d+;1H", b"\n", bytes(self._console))
        text = re.sub(
            rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])|\r",
            b"",
            console,
        )
        return "\n".join(text.decode(errors="replace").splitlines()[-lines:])

    def console_bytes(self) -> bytes:
        """All that has been written to the serial console."""
        with self._console_changed:
            return bytes(self._console)

    def screen(self, columns: int | None = None, rows: int | None = None) -> list[str]:
        """What the serial console shows on a terminal, line by line.

        Without a size it is that of the terminal that the machine knows of. For another one, all that was
        ever written is drawn again.
        """
        with self._console_changed:
            if columns is None and rows is None:
                return self.terminal.lines()
            terminal = Terminal(columns or self._terminal_size[0], rows or self._terminal_size[1])
            terminal.feed(bytes(self._console))
            return terminal.lines()

    def wait_screen(self, pattern: str, timeout: float = BOOT_TIMEOUT, redraw: str = "") -> list[str]:
        """Wait until a regular expression matches what the screen shows; return the screen then.

        QEMU's serial line doubles a character now and then. `redraw` is a key that has a program draw its
        screen anew, and is pressed every few seconds.
        """
        deadline = time.monotonic() + timeout
        redraw_at = time.monotonic() + 5
        with self._console_changed:
            while True:
                if redraw and time.monotonic() > redraw_at:
                    redraw_at = time.monotonic() + 5
                    self.send_keys(redraw)
                lines = self.terminal.lines()
                if re.search(pattern, "\n".join(lines), re.MULTILINE):
                    return lines
                if not self.running or time.monotonic() > deadline:
                    shown = "\n".join(lines)
                    why = f"within {timeout:.0f} s" if self.running else "before the machine ended"
                    raise self.error(f"The screen has not shown {pattern!r} {why}, but:\n{shown}")
                self._console_changed.wait(0.5)

    def send_keys(self, keys: str) -> None:
        """Type on the serial console. Return is "\\r", Ctrl-C "\\x03", cursor up "\\x1b[A"."""
        if self._console_socket:
            self._console_socket.sendall(keys.encode())

    def screendump(self, path: Path) -> None:
        """Save a picture of the VGA console as PNG. Needs `vga=True`."""
        self.qmp.call("screendump", filename=str(path), format="png")

    def vga_text(self, columns: int = 80, rows: int = 25) -> list[str]:
        """What the VGA console shows, line by line, while it is in text mode: `vga=True`, kernel option
        `nomodeset`.
        """
        start = 0
        for register in (0x0C, 0x0D):
            self.qmp.monitor(f"o/b 0x3d4 {register}")
            value = self.qmp.monitor("i/b 0x3d5").rpartition("=")[2]
            start = start << 8 | int(value, 16)
        path = self.directory / "vga-text"
        self.qmp.call("pmemsave", val=0xB8000 + 2 * start, size=2 * columns * rows, filename=str(path))
        text = path.read_bytes()[::2].decode("cp437")
        return [text[row * columns : (row + 1) * columns].replace("\0", " ").rstrip() for row in range(rows)]


def live_machines() -> list[Machine]:
    """The machines that run now."""
    return sorted(_live, key=lambda machine: machine.name)


def _kill_all() -> None:
    for machine in live_machines():
        machine.kill()


atexit.register(_kill_all)


def boot_all(*machines: Machine, timeout: float = BOOT_TIMEOUT) -> None:
    """Boot several machines at the same time."""
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.wait_boot(timeout)
