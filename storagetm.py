#!/usr/bin/python3 -IS
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Storage target mode: this machine's disks on another machine, over NVMe/TCP, USB, NBD or iSCSI.

The file stands alone and imports little, because it is started in an initrd, where every module costs room
in the image and time at boot. It computes from disks, addresses and options what should be in the kernel
(*wanted*), reads what is there (*live*), and applies the difference (a *plan*). Start, hot-plug, a change of
port, restart after a crash, dry run and stop are all this one operation.

A section uses nothing but those above it:

 1. Constants
 2. Structures of the kernel
 3. Text and messages
 4. Files, programs and services
 5. Device-mapper and loop devices
 6. Identity of this machine
 7. Codes, secrets and keys
 8. Block devices
 9. What uses a block device
10. Disks
11. Exports
12. Which disks there are
13. Addresses and news
14. Home directories
15. Entries and branches
16. The ledger
17. The tree
18. Stores of snapshots
19. Between a disk and its export
20. Memory and media
21. Transports
22. Hosts that are allowed
23. TCP ports
24. A host of our own
25. Parts of NVMe/TCP
26. NVMe/TCP
27. USB
28. Parts of NBD
29. A server for NBD
30. NBD
31. iSCSI
32. The exporter
33. The report
34. Outputs
35. The service
36. The command line
37. The program

Some words have one meaning here:

- disk: a block device or image file as it is found, with what tells it from others
- source: where disks come from: all of this machine's, or those that were named
- export: a disk that is handed out, or could be, and why it is not
- access: read-only, snapshot or read-write: what clients may do to a disk
- backing: what stands between a disk and all that it is exported by; a claim, a device-mapper device
- entry: one thing in the kernel that is made and unmade in one step
- branch: entries that stand or fall together; it may need other branches
- scaffold: a branch that is only there while others are made
- wanted, live: the branches that there should be, and those that there are
- plan: what has to be done to come from the live branches to the wanted ones
- ledger: the file that says which branches are ours
- transport: what says which branches make a disk reachable in some way
- news: what the program waits for; output: where it shows what there is
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import os
import select
import stat
import sys
import time

try:
    import ctypes
except ImportError:
    # Distributions that pack Python in parts leave this one out of the smallest.
    sys.exit(
        "Python's module 'ctypes' is missing; install the package 'python3', of which 'python3-minimal' is "
        "only a part"
    )

# The modules behind the standard library's socket, signal and hashlib: those three import enum, re,
# selectors and OpenSSL, which together take longer than everything else at start. The public ones serve
# where these are missing.
try:
    import _signal as signal  # type: ignore[import-not-found, unused-ignore]
    import _socket as socket
except ImportError:
    import signal
    import socket  # type: ignore[no-redef]
try:
    from _sha2 import sha256  # type: ignore[import-not-found, unused-ignore]  # Python 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from hashlib import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence
    from typing import Any, ClassVar

__version__ = "1"


# -----------------------------------------------------------------------------------------------------------
# 1. Constants
# -----------------------------------------------------------------------------------------------------------

AF_INET = 2
AF_INET6 = 10
AF_NETLINK = 16
AF_UNIX = 1
AT_FDCWD = -100
BLKDISCARD = 0x1277
BLKRRPART = 0x125F
BLKZEROOUT = 0x127F
CDROM_DRIVE_STATUS = 0x5326
DM_DEV_ARM_POLL = 0xC138FD10
DM_DEV_CREATE = 0xC138FD03
DM_DEV_REMOVE = 0xC138FD04
DM_DEV_STATUS = 0xC138FD07
DM_DEV_SUSPEND = 0xC138FD06
DM_LIST_VERSIONS = 0xC138FD0D
DM_TABLE_LOAD = 0xC138FD09
DM_TABLE_STATUS = 0xC138FD0C
DM_ACTIVE_PRESENT_FLAG = 0x20
DM_DEFERRED_REMOVE = 0x20000
DM_NOFLUSH_FLAG = 0x800
DM_STATUS_TABLE_FLAG = 0x10
DM_SKIP_LOCKFS_FLAG = 0x400
DM_SUSPEND_FLAG = 0x2
CDS_DISC_OK = 4
CDS_NO_INFO = 0
FALLOC_FL_KEEP_SIZE = 0x1
FALLOC_FL_PUNCH_HOLE = 0x2
FALLOC_FL_ZERO_RANGE = 0x10
F_GETPIPE_SZ = 1032
F_SETPIPE_SZ = 1031
IFA_ADDRESS = 1
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_TENTATIVE = 0x40
IFA_FLAGS = 8
IFA_LOCAL = 2
IFF_LOOPBACK = 0x8
IFF_RUNNING = 0x40
IFF_UP = 0x1
IFLA_IFNAME = 3
INET_DIAG_INFO = 2
INET_DIAG_MARK = 15
INET_DIAG_ULP_INFO = 19
INET_ULP_INFO_TLS = 2
IPPROTO_IPV6 = 41
IPPROTO_TCP = 6
IPV6_V6ONLY = 26
KDGETMODE = 0x4B3B
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16
LO_FLAGS_READ_ONLY = 1
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_STATUS64 = 0x4C04
KD_GRAPHICS = 1
NETLINK_KOBJECT_UEVENT = 15
NETLINK_NETFILTER = 12
NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NFTA_CHAIN_HOOK = 4
NFTA_CHAIN_POLICY = 5
NFTA_CHAIN_USE = 6
NFTA_HOOK_HOOKNUM = 1
NFT_MSG_GETCHAIN = 10 << 8 | 4  # with NFNL_SUBSYS_NFTABLES
NFT_MSG_NEWCHAIN = 10 << 8 | 3
NF_DROP = 0
NF_INET_LOCAL_IN = 1
NLA_TYPE_MASK = 0x3FFF
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLM_F_REQUEST = 0x1
NLMSG_DONE = 3
NLMSG_ERROR = 2
RTM_GETADDR = 22
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_NEWLINK = 16
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100
RTMGRP_LINK = 0x1
RT_SCOPE_HOST = 254
RT_SCOPE_LINK = 253
SKNLGRP_INET6_TCP_DESTROY = 3
SKNLGRP_INET_TCP_DESTROY = 1
SOCK_DIAG_BY_FAMILY = 20
SO_RCVBUFFORCE = 33
PR_SET_DUMPABLE = 4
SHUT_RDWR = 2
SIOCSIFFLAGS = 0x8914
SOCK_CLOEXEC = 0o2000000
SOCK_DGRAM = 2
SOCK_NONBLOCK = 0o4000
SOCK_RAW = 3
SOCK_STREAM = 1
SOL_SOCKET = 1
SO_KEEPALIVE = 9
SO_REUSEADDR = 2
SPLICE_F_NONBLOCK = 2
STATX_BTIME = 0x800
TCP_ESTABLISHED = 1
TCP_NODELAY = 1
TLS_CONF_BASE = 1
TLS_INFO_CIPHER = 2
TLS_INFO_RXCONF = 4
TLS_INFO_TXCONF = 3
TLS_INFO_VERSION = 1
UDEV_MONITOR_MAGIC = b"libudev\0"
UEVENT_GROUP_KERNEL = 1
UEVENT_GROUP_UDEV = 2

ENCRYPT = ("no", "offered", "required")  # values of --encrypt=
# Of DH-HMAC-CHAP, as the kernel names them (drivers/nvme/common/auth.c). Without a group, who has listened
# can try out secrets at leisure.
DHGROUPS = ("ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192")
HASHES = ("sha256", "sha384", "sha512")
ENOTSUPP = 524  # of the kernel alone, which tells it all the same
# Limits of the NVMe base specification (2.0, figures 275 and 4.5) as the kernel's drivers/nvme/target
# enforces them.
NQN_MAX = 223
IQN_STEM_MAX = 223 - len(".k7fm")
# Namespaces' numbers may have 32 bits. But Linux hosts search their list once for each free number below
# the largest (nvme_scan_ns_list() in drivers/nvme/host/core.c), and with 31 bits were busy for minutes.
NSID_MAX = 0xFFFF
CNTLID_MIN, CNTLID_MAX = 1024, 0xFFEF  # of what has a limit; the kernel gives the lowest ones to all others
MODEL_MAX = 40
SERIAL_MAX = 20
FIRMWARE_MAX = 8

LOCK_WAIT_SEC = 10  # a lock held longer than this is named, and the other disks no longer wait for it
START_WAIT_SEC = 30  # so long all wait at the start for a disk that udev has not finished with
RETURN_WAIT_SEC = 20  # and for one that was exported until the last stop
BUSY_SEC = 2  # for which another program may have a device open in passing
STORE_POLL_SEC = (0.05, 1)  # shortest and longest pause between two looks at how full the snapshots are
STORE_FILL = 1 << 30  # bytes a second with which a client is expected to fill one
# What connecting to a port of our own fails with where packets are filtered.
UNREACHABLE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EPERM, errno.ETIMEDOUT)
COURTESY_SEC = (10, 600)  # first and longest pause until hosts are told again that a disk is read-only
LOCK_POLL_SEC = (0.02, 0.5)  # first and longest pause between two tries for a lock
UDEV_WAIT_SEC = 60  # a disk that udev has not finished with by then is taken as sysfs describes it
MEDIUM_POLL_MSEC = 2000  # between two looks into a drive
PLYMOUTH_MAX = 253  # bytes of a message, without the NUL that ends it
PLYMOUTH_WAIT_SEC = 3  # for Plymouth to let go of the console
# Of the kernel; all that the program may have loaded. An initrd gets those that --modules prints.
COMMON_MODULES = ("configfs", "dm-mod", "dm-flakey", "dm-snapshot", "loop")  # whatever the transport
# The kernel loads these by itself, for secrets and for TLS.
AUTH_MODULES = (
    "nvme-auth",
    "nvme-keyring",
    "dh_generic",
    "tls",
    "gcm",
    "ctr",
    "ghash-generic",
    "aesni-intel",
)
MAPPING_PREFIX = "storagetm-"  # of the names of our device-mapper devices
CONSOLE_WAIT_SEC = 1  # until consoles that are out of order are tried again; each time twice as long
REDRAW_SEC = 0.75  # between two redraws; what changes meanwhile is shown together
REMOVAL_WAIT_SEC = 0.2  # a removal that takes longer (its I/O hangs) goes on without holding up the rest
THREADS = 16  # for what is mostly waiting for the kernel
CLIENTS_MAX = 100  # that may be asked for, so that 600 disks have controllers' IDs of their own
FILES_SURE = 400  # disks, each with two files open; systemd and shells allow 1024 unless told otherwise

READ_ONLY = "read-only"  # kinds of access
SNAPSHOT = "snapshot"
READ_WRITE = "read-write"
SNAPSHOT_FULL = "snapshot FULL"
OVERFLOW = "Overflow"  # what device-mapper says of a snapshot whose store is full
INVALID = "Invalid"  # and of one that it could not copy something into
ACCESS = (READ_ONLY, SNAPSHOT, READ_WRITE)
AUTO = "auto"  # the default transport, and others where the machine has what these need
PER_DISK = "per-disk"  # which subsystem a disk is in
SHARED = "shared"
DEFAULT_ACCESS = READ_ONLY
NQN_STEM = "nqn.2023-10.io.systemd:storagetm."
NQN_APPLICATION = "b4f94e52b8e245db88846e2ec3f4ef18"
# By what the kernel's names begin with.
NETWORK_DISKS = {"nbd": "NBD", "rbd": "Ceph", "rnbd": "RNBD", "etherd!": "ATA over Ethernet"}
NO_DISKS = {"loop": "a loop device", "zram": "a compressed RAM disk", "ram": "a RAM disk"}
MEMORY_FILE = "/memfd:storagetm"  # as the kernel calls one that has a snapshot's changes, up to a hyphen
SECRETS_MAX = 1 << 20  # bytes of a file with secrets
STORE_MIN = 1 << 20  # bytes for the changes of snapshots
STORE_COST = 4 << 20  # bytes that the kernel itself takes for a snapshot, for tables and buffers
CHUNK_SECTORS = 8  # of 512 bytes: a snapshot's unit, if nothing on the disk begins in the middle of one
MEMORY_KEPT = 8, 64 << 20  # changes never take this part of all memory, nor this many bytes

UNKNOWN = "?"
FILE_TAG = "file "  # what the tag of a regular file begins with
POLL_NOTE = "events_poll_msecs."  # before a drive's name: the file that keeps what the kernel had there

NO_MEDIUM = "No medium found; insert one and it will be exported"
NO_MEDIUM_NAMED = "No medium found; insert one and start again"

CONFIGFS = "/sys/kernel/config/"
DEV = "/dev/"
ETC = "/etc/"
PROC = "/proc/"
RUN = "/run/storagetm/"
SYS = "/sys/"
UDEV = "/run/udev/"
UDEV_RULE = "54-storagetm.rules"  # before 55-dm.rules
UDEV_RULES = tuple(p + "/udev/rules.d/" for p in ("/usr/local/lib", "/usr/lib", "/lib", "/etc", "/run"))
# One is there while logind runs, by how control groups are mounted. Where it does not run, nobody sends the
# machine to sleep, and asking on D-Bus would start it.
CGROUPS = tuple(f"{SYS}fs/cgroup/{p}" for p in ("", "unified/", "systemd/"))
LOGIND = tuple(p + "system.slice/systemd-logind.service" for p in CGROUPS)
PROGRAMS = ("/usr/sbin/", "/usr/bin/", "/sbin/", "/bin/")


# -----------------------------------------------------------------------------------------------------------
# 2. Structures of the kernel
# -----------------------------------------------------------------------------------------------------------


class nlmsghdr(ctypes.Structure):
    """Header of every netlink message (include/uapi/linux/netlink.h)."""

    _fields_ = [
        ("nlmsg_len", ctypes.c_uint32),
        ("nlmsg_type", ctypes.c_uint16),
        ("nlmsg_flags", ctypes.c_uint16),
        ("nlmsg_seq", ctypes.c_uint32),
        ("nlmsg_pid", ctypes.c_uint32),
    ]


class ifinfomsg(ctypes.Structure):
    """Body of RTM_NEWLINK (include/uapi/linux/rtnetlink.h)."""

    _fields_ = [
        ("ifi_family", ctypes.c_uint8),
        ("ifi_pad", ctypes.c_uint8),
        ("ifi_type", ctypes.c_uint16),
        ("ifi_index", ctypes.c_int32),
        ("ifi_flags", ctypes.c_uint32),
        ("ifi_change", ctypes.c_uint32),
    ]


class ifaddrmsg(ctypes.Structure):
    """Body of RTM_NEWADDR (include/uapi/linux/if_addr.h)."""

    _fields_ = [
        ("ifa_family", ctypes.c_uint8),
        ("ifa_prefixlen", ctypes.c_uint8),
        ("ifa_flags", ctypes.c_uint8),
        ("ifa_scope", ctypes.c_uint8),
        ("ifa_index", ctypes.c_uint32),
    ]


class nfgenmsg(ctypes.Structure):
    """Body of all messages about packet filters (include/uapi/linux/netfilter/nfnetlink.h)."""

    _fields_ = [("nfgen_family", ctypes.c_uint8), ("version", ctypes.c_uint8), ("res_id", ctypes.c_uint16)]


class inet_diag_sockid(ctypes.Structure):
    """Both ends of a connection; ports and addresses are in the network's order (inet_diag.h)."""

    _fields_ = [
        ("idiag_sport", ctypes.c_uint8 * 2),
        ("idiag_dport", ctypes.c_uint8 * 2),
        ("idiag_src", ctypes.c_uint8 * 16),
        ("idiag_dst", ctypes.c_uint8 * 16),
        ("idiag_if", ctypes.c_uint32),
        ("idiag_cookie", ctypes.c_uint32 * 2),
    ]


class inet_diag_req_v2(ctypes.Structure):
    """Body of a question about sockets (include/uapi/linux/inet_diag.h)."""

    _fields_ = [
        ("sdiag_family", ctypes.c_uint8),
        ("sdiag_protocol", ctypes.c_uint8),
        ("idiag_ext", ctypes.c_uint8),
        ("pad", ctypes.c_uint8),
        ("idiag_states", ctypes.c_uint32),
        ("id", inet_diag_sockid),
    ]


class inet_diag_msg(ctypes.Structure):
    """Body of an answer about a socket (include/uapi/linux/inet_diag.h)."""

    _fields_ = [
        ("idiag_family", ctypes.c_uint8),
        ("idiag_state", ctypes.c_uint8),
        ("idiag_timer", ctypes.c_uint8),
        ("idiag_retrans", ctypes.c_uint8),
        ("id", inet_diag_sockid),
        ("idiag_expires", ctypes.c_uint32),
        ("idiag_rqueue", ctypes.c_uint32),
        ("idiag_wqueue", ctypes.c_uint32),
        ("idiag_uid", ctypes.c_uint32),
        ("idiag_inode", ctypes.c_uint32),
    ]


class rtattr(ctypes.Structure):
    """Header of an attribute after a body (include/uapi/linux/rtnetlink.h)."""

    _fields_ = [("rta_len", ctypes.c_uint16), ("rta_type", ctypes.c_uint16)]


class dm_ioctl(ctypes.Structure):
    """Head of the argument of all of device-mapper's ioctls (include/uapi/linux/dm-ioctl.h)."""

    _fields_ = [
        ("version", ctypes.c_uint32 * 3),
        ("data_size", ctypes.c_uint32),
        ("data_start", ctypes.c_uint32),
        ("target_count", ctypes.c_uint32),
        ("open_count", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("event_nr", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("dev", ctypes.c_uint64),
        ("name", ctypes.c_char * 128),
        ("uuid", ctypes.c_char * 129),
        ("data", ctypes.c_char * 7),
    ]


class dm_target_spec(ctypes.Structure):
    """One line of a table, in front of its parameters (include/uapi/linux/dm-ioctl.h)."""

    _fields_ = [
        ("sector_start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("status", ctypes.c_int32),
        ("next", ctypes.c_uint32),
        ("target_type", ctypes.c_char * 16),
    ]


class loop_info64(ctypes.Structure):
    """What a loop device is (include/uapi/linux/loop.h)."""

    _fields_ = [
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_uint8 * 64),
        ("lo_crypt_name", ctypes.c_uint8 * 64),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    ]


class statx(ctypes.Structure):
    """What statx(2) tells of a file, as far as it is asked for here (include/uapi/linux/stat.h)."""

    _fields_ = [
        ("stx_mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 76),
        ("stx_btime_sec", ctypes.c_int64),
        ("stx_btime_nsec", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 164),
    ]


class loop_config(ctypes.Structure):
    """Argument of LOOP_CONFIGURE, Linux 5.8 (include/uapi/linux/loop.h)."""

    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", loop_info64),
        ("reserved", ctypes.c_uint64 * 8),
    ]


class gpt_header(ctypes.LittleEndianStructure):
    """Header of a GUID partition table (UEFI 2.10, 5.3.2)."""

    _pack_ = 1
    _fields_ = [
        ("signature", ctypes.c_char * 8),
        ("revision", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("crc", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("own_lba", ctypes.c_uint64),
        ("other_lba", ctypes.c_uint64),
        ("first_usable", ctypes.c_uint64),
        ("last_usable", ctypes.c_uint64),
        ("guid", ctypes.c_ubyte * 16),
        ("array_lba", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("entry_size", ctypes.c_uint32),
        ("array_crc", ctypes.c_uint32),
    ]


class gpt_entry(ctypes.LittleEndianStructure):
    """A partition in a GUID partition table (UEFI 2.10, 5.3.3)."""

    _pack_ = 1
    _fields_ = [
        ("type", ctypes.c_ubyte * 16),
        ("guid", ctypes.c_ubyte * 16),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("attributes", ctypes.c_uint64),
        ("name", ctypes.c_ubyte * 72),
    ]


class nvme_tcp_hdr(ctypes.LittleEndianStructure):
    """Head of every NVMe/TCP PDU (NVMe/TCP transport specification 1.0, 3.6.1)."""

    _fields_ = [
        ("type", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("hlen", ctypes.c_uint8),
        ("pdo", ctypes.c_uint8),
        ("plen", ctypes.c_uint32),
    ]


class nvme_command(ctypes.LittleEndianStructure):
    """A submission queue entry, as the Fabrics commands and Set Features use it (NVMe base 2.0, 3.3.3.1)."""

    _pack_ = 1
    _layout_ = "ms"  # what that means, which Python 3.14 wants to be told
    _fields_ = [
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("command_id", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),  # of Fabrics commands the first byte: the command's type
        ("reserved", ctypes.c_uint8 * 16),
        ("sgl_address", ctypes.c_uint64),
        ("sgl_length", ctypes.c_uint32),
        ("sgl_reserved", ctypes.c_uint8 * 3),
        ("sgl_type", ctypes.c_uint8),
        ("cdw10", ctypes.c_uint32),
        ("cdw11", ctypes.c_uint32),
        ("cdw12", ctypes.c_uint32),
        ("cdw13", ctypes.c_uint32),
        ("cdw14", ctypes.c_uint32),
        ("cdw15", ctypes.c_uint32),
    ]


class nbd_option(ctypes.BigEndianStructure):
    """What a client asks for before it has chosen a disk (NBD protocol, "Option types")."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("magic", ctypes.c_uint64), ("option", ctypes.c_uint32), ("length", ctypes.c_uint32))


class nbd_request(ctypes.BigEndianStructure):
    """What a client asks of a disk (NBD protocol, "Request message")."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("flags", ctypes.c_uint16),
        ("type", ctypes.c_uint16),
        ("cookie", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
    )


# -----------------------------------------------------------------------------------------------------------
# 3. Text and messages
# -----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that can happen, with the sentence for the user. Ends the program with `code`."""

    code = 1


class UsageError(UserError):
    """The command line makes no sense."""

    code = 2


class IoPending(OSError):
    """A disk is gone, and its driver still has I/O of clients."""


def printable(raw: bytes) -> str:
    """`raw` as text that is safe to show: whatever is not UTF-8 or would move a cursor becomes `?`."""
    return shown(raw.decode("utf-8", "replace"))


def shown(text: str) -> str:
    """`text` with everything that would move a cursor, but for line feeds, replaced by `?`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def is_unicode(text: str) -> bool:
    """Whether it is text throughout, and no bytes of a file's name that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def utf8(text: str) -> bytes:
    """`text` in UTF-8, whatever the locale, with the bytes that were not UTF-8 when it was read.

    What is shown, written and hashed is then the same under each locale, and a letter that a locale lacks is
    no error. os.fsencode() has it otherwise.
    """
    return text.encode("utf-8", "surrogateescape")


def quoted(text: str) -> str:
    """`text` as one word of a POSIX shell."""
    if text and all(map(is_plain, text)):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def is_plain(c: str) -> bool:
    """Whether a character is just itself to a shell."""
    return c.isascii() and (c.isalnum() or c in "@%+=:,./-_")


def typed(text: str) -> str:
    """`text` as one word of a shell, in ASCII, so that it can be shown on any terminal and typed off it.

    Other letters become $'\\303\\244', which POSIX has since 2024, and bash, zsh and busybox for long.
    """
    if text.isascii():
        return quoted(text)
    return "$'" + "".join(c if is_plain(c := chr(b)) else f"\\{b:03o}" for b in utf8(text)) + "'"


def columns(text: str) -> int:
    """The columns that `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    try:
        import unicodedata
    except ImportError:  # on small systems
        return sum(2 if c >= "\u1100" else 1 for c in text)  # rather too many than too few
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "FW")
        for c in text
    )


def cut(text: str, width: int) -> str:
    """As much of the beginning of `text` as fits into so many columns."""
    if text.isascii():
        return text[: max(0, width)]
    taken = 0
    for i, c in enumerate(text):
        taken += columns(c)
        if taken > width:
            return text[:i]
    return text


def padded(text: str, width: int) -> str:
    """`text` with blanks behind it, at least so many columns wide."""
    return text + " " * (width - columns(text))


def pieces(text: str, width: int) -> list[str]:
    """`text` cut into pieces of so many columns at most; a letter that is wider is a piece by itself."""
    found = []
    while text:
        found.append(cut(text, width) or text[0])
        text = text[len(found[-1]) :]
    return found


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of so many columns at most, broken between words where that can be done."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and columns(lines[-1]) + 1 + columns(word) <= width:
            lines[-1] += " " + word
        else:
            lines += pieces(word, width)
    return lines[1:] or lines


def reason_of(error: OSError) -> str:
    """What went wrong, without the traces of Python's own formatting."""
    if error.errno == errno.EMFILE:
        return f"{os.strerror(error.errno)}; raise the limit that 'ulimit -Hn' shows"
    return os.strerror(error.errno) if error.errno else str(error)


def failure_text(problem: UserError | OSError) -> str:
    """What ended the program, for the user."""
    if isinstance(problem, UserError):
        return str(problem)
    where = f" at '{problem.filename}'" if problem.filename else ""
    return f"Failed{where}: {reason_of(problem)}"


class Log:
    """Messages with syslog priorities: to the journal with `<N>` in front, to people without.

    While a screen is shown (`screen` is set), messages go there, since they would tear it.
    """

    def __init__(self) -> None:
        self.debug = os.environ.get("SYSTEMD_LOG_LEVEL", "") in ("debug", "7")
        self.journal = {fd for fd in (1, 2) if is_journal(fd)}
        self.errors = 2  # descriptor for what is wrong
        self.screen: Callable[[str], None] | None = None
        self.early: list[str] = []  # the last warnings from before there was a screen, which covers them

    def __call__(self, priority: int, message: str) -> None:
        if priority == 7 and not self.debug:
            return
        if priority == 4 and not self.screen:
            self.early = [*self.early, message][-3:]
        if self.screen and priority < 7:
            self.screen(message)
            if os.isatty(self.errors):
                return
        self.write(priority, message)

    def write(self, priority: int, message: str) -> None:
        """Past the screen."""
        # Facts are output, the rest is about them.
        fd = 1 if 4 < priority < 7 else self.errors
        try:
            os.write(fd, utf8(f"<{priority}>{message}\n" if fd in self.journal else message + "\n"))
        except OSError:
            pass  # a closed descriptor never stops the service


def is_journal(fd: int) -> bool:
    """Whether what is written there goes to the journal (systemd.exec(5), "$JOURNAL_STREAM")."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        st = os.fstat(fd)
    except OSError:
        return False
    # It names standard error alone, where output is another socket. Programs that a service starts inherit
    # the variable, and may write elsewhere.
    return stream == f"{st.st_dev}:{st.st_ino}" or (stream != "" and stat.S_ISSOCK(st.st_mode))


log = Log()


def error(message: str) -> None:
    log(3, message)


def warning(message: str) -> None:
    log(4, message)


def info(message: str) -> None:
    log(6, message)


def debug(message: str) -> None:
    log(7, message)


def size_text(size: int) -> str:
    """Bytes as people say them, in powers of 1000."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} PB"


def split_command_line(raw: bytes) -> list[str]:
    """The words of the kernel command line, as systemd has them. Takes any bytes.

    Quotes of both kinds may be anywhere in a word and are taken away, a backslash is a backslash, and what
    is not closed ends with the line.
    """
    words: list[str] = []
    word, quote, begun = "", "", False
    for c in raw.strip(b"\0\n").decode("utf-8", "replace") + " ":
        if quote:
            word, quote = (word, "") if c == quote else (word + c, quote)
        elif c in "\"'":
            quote, begun = c, True
        elif c.isspace():
            words += [word] if begun else []
            word, begun = "", False
        else:
            word, begun = word + c, True
    words += [word[:-1]] if quote else []
    return [printable(w.encode()) for w in words]


# -----------------------------------------------------------------------------------------------------------
# 4. Files, programs and services
# -----------------------------------------------------------------------------------------------------------


def read_bytes(path: str) -> bytes:
    """All bytes of the file at `path`. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(fd, 16384):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


def read_page(path: str) -> bytes:
    """The bytes of an attribute in sysfs, which is at most a page long. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def read_attribute(path: str) -> str:
    """The text of an attribute, without blanks around it; empty if it cannot be read."""
    try:
        return printable(read_page(path).strip())
    except OSError:
        return ""


def write_attribute(path: str, value: str) -> None:
    """Writes `value` in one write(2) to an existing file, as sysfs and configfs ask. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, utf8(value))
    finally:
        os.close(fd)


def append(fd: int, record: bytes) -> None:
    """Appends the whole record to a file, or nothing. Raises OSError."""
    written = os.write(fd, record)
    if written < len(record):
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def list_directory(path: str) -> list[str]:
    """The names in a directory; none if it cannot be read."""
    try:
        return os.listdir(path)
    except OSError:
        return []


def allow_files(disks: int) -> None:
    """Raises the limit of open files to what the system allows, once so many disks come near it."""
    if disks <= FILES_SURE:
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_program(name: str, *arguments: str) -> int:
    """Runs a system program silently. Returns 0 if it succeeded, 1 if not, 127 if there is no such one."""
    path = find_program(name)
    if not path:
        return 127
    null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(path, (name, *arguments), {}, file_actions=null)
    return 1 if os.waitpid(pid, 0)[1] else 0


def load_module(name: str) -> int:
    """Has the kernel load a module. Returns 0 on success, 1 on failure, 127 without modprobe(8)."""
    return run_program("modprobe", "-q", name)


def find_process(name: str, last: str = "") -> str:
    """The number of a process of that name; empty if there is none. `last` is what it was the last time."""
    numbers = [last] if last else []
    numbers += [number for number in list_directory(PROC) if number.isdecimal()]
    return next((n for n in numbers if read_attribute(f"{PROC}{n}/comm") == name), "")


def kernel_version() -> tuple[int, int]:
    """Major and minor number of this kernel's version; zeros for what is none."""
    numbers = [n for n in os.uname().release.split("-")[0].split(".")[:2] if n.isascii() and n.isdecimal()]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else (0, 0)


def find_program(name: str) -> str:
    """The path of a system program; empty if there is no such one."""
    return next((p + name for p in PROGRAMS if os.access(p + name, os.X_OK)), "")


def birth_time(path: str) -> str:
    """When a file was made, in seconds and nanoseconds; empty if that is not known."""
    libc = ctypes.CDLL(None)
    answer = statx()
    try:
        failed = libc.statx(AT_FDCWD, utf8(path), 0, STATX_BTIME, ctypes.byref(answer))
    except AttributeError:  # musl before 1.2.5
        failed = -1
    if failed or not answer.stx_mask & STATX_BTIME:
        return ""
    return f"{answer.stx_btime_sec}.{answer.stx_btime_nsec:09}"


def mount_configfs() -> None:
    """Mounts configfs at its place. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = 0x2 | 0x4 | 0x8  # MS_NOSUID, MS_NODEV, MS_NOEXEC
    if libc.mount(b"configfs", os.fsencode(CONFIGFS), b"configfs", ctypes.c_ulong(flags), None) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def prepare_configfs() -> None:
    """Loads configfs and mounts it, where that is missing. Raises UserError."""
    if not os.path.isdir(CONFIGFS):
        load_module("configfs")
    if not os.path.isdir(CONFIGFS):
        raise UserError(
            "This kernel has no configfs, through which disks are exported; boot one with CONFIG_CONFIGFS_FS"
        )
    if not os.path.ismount(CONFIGFS):
        try:
            mount_configfs()
        except OSError as e:
            raise UserError(
                f"Failed to mount configfs on '{CONFIGFS}': {reason_of(e)}; mount it, then start again"
            ) from e


class ConsoleLevel:
    """Keeps kernel messages off the console while a screen is shown there, and puts the level back.

    The level found first is kept in RUN as well: after a crash, the next run would mistake the lowered level
    for the original.
    """

    def __init__(self) -> None:
        self.file = PROC + "sys/kernel/printk"
        self.saved = RUN + "printk"

    def lower(self) -> None:
        try:
            if not os.path.exists(self.saved):
                write_new_file(self.saved, read_bytes(self.file).split()[0])
            write_attribute(self.file, "1")
        except OSError as e:
            debug(f"Failed to lower the console's log level, ignoring: {reason_of(e)}")

    def restore(self) -> None:
        level = read_attribute(self.saved)
        if not level.isdigit():
            return
        try:
            write_attribute(self.file, level)
            os.unlink(self.saved)
        except OSError as e:
            debug(f"Failed to put back the console's log level, ignoring: {reason_of(e)}")


def write_new_file(path: str, content: bytes) -> None:
    """Makes or replaces a file so that no reader and no crash ever sees half of it. Raises OSError."""
    new = path + ".new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            append(fd, content)
        finally:
            os.close(fd)
        os.rename(new, path)
    except OSError:
        os.unlink(new)
        raise


def send_datagram(name: str, message: bytes) -> None:
    """Sends to a unix datagram socket, `@` standing for the abstract name space. Errors are ignored."""
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        s = socket.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
        try:
            s.connect(address)
            s.send(message)
        finally:
            s.close()
    except OSError:
        pass


def notify(state: str) -> None:
    """Tells the service manager, if there is one (sd_notify(3))."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name[:1] in ("/", "@"):
        send_datagram(name, utf8(state))


def plymouth(message: str) -> None:
    """Has Plymouth show `message`, where it runs (protocol: ply-boot-protocol.h, "M")."""
    text = utf8(message)[:PLYMOUTH_MAX] + b"\0"
    plymouth_request(b"M\x02" + bytes([len(text)]) + text)


def end_text_plymouth() -> bool:
    """Has Plymouth end, unless it shows graphics and so hides the console; True if it was asked to.

    Where it shows text it takes the console's keys, Ctrl-C among them, and locks its settings.
    """
    consoles = read_attribute(SYS + "class/tty/console/active").split()
    # /dev/console is the last of them. What is on a virtual terminal says nothing about a serial line.
    if consoles[-1:] == ["tty0"]:
        try:
            fd = os.open(DEV + "tty0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                if int.from_bytes(fcntl.ioctl(fd, KDGETMODE, bytes(4)), sys.byteorder) == KD_GRAPHICS:
                    return False
            finally:
                os.close(fd)
        except OSError:
            pass
    plymouth_request(b"Q\x02\x01\0", PLYMOUTH_WAIT_SEC)
    return True


def plymouth_request(request: bytes, wait_sec: float = 0) -> None:
    """Sends a request to Plymouth, where it runs, and waits that long for it to hang up. No errors."""
    try:
        s = socket.socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            s.settimeout(wait_sec)
            s.connect("\0/org/freedesktop/plymouthd")
            s.send(request)
            while wait_sec and s.recv(64):
                pass
        finally:
            s.close()
    except OSError:
        pass


# -----------------------------------------------------------------------------------------------------------
# 5. Device-mapper and loop devices
# -----------------------------------------------------------------------------------------------------------

# What udev is not to do with our devices: probe them, link to them, show them to others (libdm's
# DM_UDEV_DISABLE_DM_RULES_FLAG, _SUBSYSTEM_RULES_FLAG, _DISK_RULES_FLAG, _OTHER_RULES_FLAG, and
# _PRIMARY_SOURCE_FLAG, by which it remembers that).
DM_COOKIE = (0x1 | 0x2 | 0x4 | 0x8 | 0x40) << 16
SUSPENDING = _thread.allocate_lock()  # held by who suspends a device of ours, until it is resumed
CONTROLS: dict[str, int] = {}  # descriptors of the devices that control others, by path; kept open
NO_DEVICE = (errno.ENXIO, errno.ENOENT, errno.ENODEV)  # there is no such device, or no device-mapper
CLAIMS: dict[str, int] = {}  # exclusively opened descriptors of what is exported, by path in the tree


def has_udev_rule() -> bool:
    """Whether udev has a rule for our devices. Then it needs no cookie, for which it runs two programs."""
    return any(os.path.exists(directory + UDEV_RULE) for directory in UDEV_RULES)


def open_control(name: str, module: str) -> int:
    """The descriptor of a device that controls others; its module is loaded if missing. Raises OSError."""
    path = DEV + name
    if path not in CONTROLS:
        try:
            CONTROLS[path] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            if not module or load_module(module):
                raise
            CONTROLS[path] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return CONTROLS[path]


def dm_call(request: int, name: str, *, uuid: str = "", flags: int = 0, table: bytes = b"") -> bytearray:
    """One ioctl on device-mapper for the device `name`; its answer. Raises OSError."""
    # With more than 1024 bytes Python holds up its other threads meanwhile.
    buffer = bytearray(16384 if request == DM_LIST_VERSIONS else 1024)
    head = dm_ioctl.from_buffer(buffer)
    head.version[0] = 4
    head.data_size, head.data_start = len(buffer), ctypes.sizeof(dm_ioctl)
    head.flags = flags
    head.name, head.uuid = name.encode(), uuid.encode()
    if table:
        head.target_count = 1
        buffer[head.data_start : head.data_start + len(table)] = table
    if request == DM_DEV_SUSPEND and not has_udev_rule():
        head.event_nr = DM_COOKIE
    control = open_control("mapper/control", "dm-mod" if request == DM_DEV_CREATE else "")
    fcntl.ioctl(control, request, buffer)
    return buffer


def dm_status(name: str) -> dm_ioctl | None:
    """What there is of a device-mapper device; None if there is no such device. Raises OSError."""
    try:
        return dm_ioctl.from_buffer_copy(dm_call(DM_DEV_STATUS, name))
    except OSError as e:
        if e.errno in NO_DEVICE:
            return None
        raise


def dm_table(sectors: int, target: str, parameters: str) -> bytes:
    """A table of one line, `sectors` of 512 bytes long."""
    text = parameters.encode() + b"\0"
    text += bytes(-len(text) % 8)
    spec = dm_target_spec(0, sectors, 0, ctypes.sizeof(dm_target_spec) + len(text), target.encode())
    return bytes(spec) + text


def dm_replace(name: str, table: bytes) -> None:
    """Gives a device another table in one go; I/O waits meanwhile. Raises OSError."""
    dm_call(DM_TABLE_LOAD, name, table=table)
    dm_call(DM_DEV_SUSPEND, name, flags=DM_SKIP_LOCKFS_FLAG)


def dm_arm() -> int:
    """A descriptor that can be read as soon as device-mapper has news from now on; -1 if there is none."""
    try:
        dm_call(DM_DEV_ARM_POLL, "")
    except OSError:
        return -1
    return CONTROLS[DEV + "mapper/control"]


def dm_target_text(answer: bytes) -> str:
    """What the answer to DM_TABLE_STATUS says of the first target, its state or its parameters."""
    start = dm_ioctl.from_buffer_copy(answer).data_start + ctypes.sizeof(dm_target_spec)
    return printable(answer[start:].split(b"\0")[0]) if start < len(answer) else ""


def claim(path: str, node: str) -> int:
    """Keeps the rest of this machine off a block device as long as it is exported; 0 or the error number.

    nvmet opens it without a claim. So md, a mount or LVM could take it meanwhile, and would write to what
    clients write to, or to what is thrown away. With a claim they get EBUSY until release().
    """
    if path not in CLAIMS:
        try:
            CLAIMS[path] = os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            debug(f"Failed to claim '{node}', ignoring: {reason_of(e)}")
            return e.errno or errno.EIO
    return 0


def release(path: str) -> None:
    """Ends a claim; does nothing where there is none."""
    fd = CLAIMS.pop(path, -1)
    if fd >= 0:
        os.close(fd)


def attach_loop(
    backing: int, *, read_only: bool, limit: int = 0, block: int = 0, direct: bool = False
) -> tuple[int, int]:
    """Makes a loop device of an open file or device; its descriptor and number.

    The kernel detaches it on last close. `limit` bounds its size, `block` is that of its sectors, in bytes
    (0: 512). A `direct` one has no page cache of its own, where the file system can do without. Raises
    OSError.
    """
    control = open_control("loop-control", "loop")
    while True:
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        fd = os.open(f"{DEV}loop{number}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        config = loop_config(fd=backing, block_size=block)
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if read_only else 0)
        config.info.lo_flags |= LO_FLAGS_DIRECT_IO if direct else 0
        config.info.lo_sizelimit = limit
        try:
            fcntl.ioctl(fd, LOOP_CONFIGURE, bytes(config))
            return fd, number
        except OSError as e:
            os.close(fd)
            if e.errno != errno.EBUSY:  # another program took it meanwhile
                raise


# -----------------------------------------------------------------------------------------------------------
# 6. Identity of this machine
# -----------------------------------------------------------------------------------------------------------


def siphash24(key: bytes, data: bytes) -> int:
    """SipHash-2-4 of `data` under a key of 16 bytes, 64 bits (Aumasson and Bernstein, 2012)."""
    mask = 0xFFFFFFFFFFFFFFFF
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    a, b = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D
    c, d = k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573

    def rounds(count: int) -> None:
        nonlocal a, b, c, d
        for _ in range(count):
            a, c = (a + b) & mask, (c + d) & mask
            b, d = ((b << 13 | b >> 51) & mask) ^ a, ((d << 16 | d >> 48) & mask) ^ c
            a = (a << 32 | a >> 32) & mask
            a, c = (a + d) & mask, (c + b) & mask
            d, b = ((d << 21 | d >> 43) & mask) ^ a, ((b << 17 | b >> 47) & mask) ^ c
            c = (c << 32 | c >> 32) & mask

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for i in range(0, len(padded), 8):
        word = int.from_bytes(padded[i : i + 8], "little")
        d ^= word
        rounds(2)
        a ^= word
    c ^= 0xFF
    rounds(4)
    return a ^ b ^ c ^ d


def uuid4_from(digest: bytes) -> str:
    """The first 16 bytes of `digest` as a UUID of version 4, variant 1 (RFC 9562), 32 hexadecimal digits."""
    raw = bytearray(digest[:16])
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return raw.hex()


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) for keys of at most 64 bytes. The standard library's brings OpenSSL with it."""
    padded = int.from_bytes(key.ljust(64, b"\0"), "big")
    inner, outer = ((padded ^ int(pad * 64, 16)).to_bytes(64, "big") for pad in ("36", "5c"))
    return bytes(sha256(outer + sha256(inner + message).digest()).digest())


def dashed(uuid: str) -> str:
    """32 hexadecimal digits in the form 8-4-4-4-12."""
    return f"{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}"


def is_id128(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text) and text.strip("0") != ""


# What the firmware of many machines has for a UUID, since nobody has set one: from the lists of those who
# count machines, such as FreeBSD's rc.d/hostid, FOG and CapaInstaller.
SHARED_UUIDS = (
    "000102030405060708090a0b0c0d0e0f",
    "00020003000400050006000700080009",
    "0102030405060708090a0b0c0d0e0f10",
    "07090201010303010807060504030201",
    "11111111222233334444555555555555",
    "12345678123456781234567812345678",
    "123456781234567890abcddeefaabbcc",
    "4c4c4544000010108010c4c04f313233",
    "4c4c454400002010802080c04f202020",
    "890e2d14cacd45d1ae66bc80e8bfeb0f",
    "8e275844178f44a8aceba7d7e5178c63",
    "dc698397fa544cf282c8b1b5307a6a7f",
    "deadbeefdeadbeefdeadbeefdeadbeef",
)


def is_own_uuid(text: str) -> bool:
    """Whether a firmware's UUID, 32 hexadecimal digits, can be one machine's alone (SMBIOS 3.6, 7.2.1)."""
    if not is_id128(text):
        return False
    raw = bytes.fromhex(text)
    # Old firmware has the first three fields in the other byte order.
    other = raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]
    # Where it is not set, all bytes are the same, such as 0xff, or all but those of a product.
    same = len(set(raw)) <= 2 or text.endswith("f" * 24)
    return not same and text not in SHARED_UUIDS and other.hex() not in SHARED_UUIDS


def parse_assignments(raw: bytes) -> dict[str, str]:
    """KEY=VALUE lines, as in os-release(5) and sysfs's uevent files; other lines are ignored."""
    found = {}
    text = raw.decode("utf-8", "replace")
    if not text.replace("\n", "").isprintable():
        text = shown(text)
    for line in text.split("\n"):
        key, equals, value = line.strip().partition("=")
        if not equals or not key or key[0] == "#":
            continue
        if value[:1] in ("'", '"') and len(value) >= 2 and value[0] == value[-1]:
            value = value[1:-1]
        found[key] = value
    return found


def read_assignments(*paths: str) -> dict[str, str]:
    """The assignments in the first of these files that can be read."""
    for path in paths:
        try:
            return parse_assignments(read_bytes(path))
        except OSError:
            pass
    return {}


def nvme_string(text: str, length: int) -> str:
    """`text` as the kernel takes it for an NVMe identity: printable ASCII, no blanks around it, cut."""
    if not (text.isascii() and text.isprintable()):
        text = "".join(c if " " <= c <= "~" else "_" for c in text)
    clean = text.strip()
    return clean[:length].rstrip()


def firmware_uuids() -> list[str]:
    """What the firmware has for this machine's UUID, as 32 hexadecimal digits, whatever it is worth."""
    paths = SYS + "class/dmi/id/product_uuid", PROC + "device-tree/vm,uuid"
    return [read_attribute(path).strip("\0?").replace("-", "").lower() for path in paths]


def hardware() -> dict[str, str]:
    """What tells this machine from others, as digests by kind; empty where there is nothing of the kind."""
    serials = [
        read_attribute(f"{SYS}class/dmi/id/{name}_serial") for name in ("product", "board", "chassis")
    ]
    serials.append(read_attribute(PROC + "device-tree/serial-number"))
    uuid = next(filter(is_own_uuid, firmware_uuids()), "")
    kinds = {"UUID": uuid, "SERIALS": "\0".join(serials) if any(serials) else ""}
    return {kind: sha256(os.fsencode(text)).hexdigest() if text else "" for kind, text in kinds.items()}


def is_of_other_machine(machine_id: str) -> bool:
    """Whether an initrd's machine ID came with the image, and that was made on another machine.

    Unless the kernel command line says that it is this machine's all the same.
    """
    image = read_assignments(ETC + "storagetm-image")
    if image.get("MACHINE_ID") != machine_id:
        return False
    try:
        words = split_command_line(read_bytes(PROC + "cmdline"))
    except OSError:
        words = []
    if any(word.startswith("systemd.machine_id=") for word in words):
        return False
    for kind, here in hardware().items():
        if here and (there := image.get(kind)):
            return here != there
    return False


class Machine:
    """Who this machine is: its ID, its name, its operating system."""

    def __init__(self) -> None:
        self.id = self.machine_id()
        release = read_assignments(ETC + "os-release", "/usr/lib/os-release")
        self.os = release.get("IMAGE_ID") or release.get("ID") or ""
        self.os_version = release.get("IMAGE_VERSION") or release.get("VERSION_ID") or ""
        # dracut's own os-release may speak of dracut alone; its module leaves a copy of the system's.
        made_on = read_assignments(ETC + "storagetm/os-release")
        self.os_name = made_on.get("PRETTY_NAME") or release.get("PRETTY_NAME") or self.os or "Linux"

    @property
    def name(self) -> str:
        """What people call it. An initrd mostly has no host name of its own: then it is the product's."""
        name = read_assignments(ETC + "machine-info").get("PRETTY_HOSTNAME") or os.uname().nodename
        if name in ("", "(none)", "localhost", "localhost.localdomain"):
            return read_attribute(SYS + "class/dmi/id/product_name") or "this machine"
        return name

    @staticmethod
    def machine_id() -> bytes:
        """machine-id(5), 16 bytes; else the firmware's UUID, or else a random one for this boot."""
        firmware = [u for u in firmware_uuids() if is_own_uuid(u)]
        why = f"'{ETC}machine-id' holds no machine ID"
        way_out = "run 'systemd-machine-id-setup' to fix them"
        if is_id128(found := read_attribute(ETC + "machine-id")):
            if is_of_other_machine(found):
                # Its names and, of disks without serial numbers, its UUIDs would be the other machine's.
                # A client takes one's disk for a path to the other's and writes to either (Linux 6.12).
                why = f"'{ETC}machine-id' is that of the machine on which this image was made"
                way_out = "make an image on this machine to fix them"
            elif found in firmware_uuids() and found not in firmware:
                why = f"'{ETC}machine-id' is a UUID that the firmware of many machines has"
            else:
                return bytes.fromhex(found)
        if firmware:
            warning(f"{why}, using the firmware's UUID instead")
            return bytes.fromhex(firmware[0])
        # Kept, so that a restart finds again what was exported under it.
        if not is_id128(found := read_attribute(RUN + "machine-id")):
            found = uuid4_from(os.urandom(16))
            try:
                os.makedirs(RUN, 0o700, exist_ok=True)
                write_new_file(RUN + "machine-id", found.encode())
            except OSError as e:
                debug(f"Failed to keep the random machine ID, ignoring: {reason_of(e)}")
        warning(
            f"{why} and the firmware has none of its own: names and ports are random and change at the next "
            f"boot; {way_out}"
        )
        return bytes.fromhex(found)

    def instance(self) -> str:
        """What tells what one run has made from what others have, unless --nqn says another."""
        return NQN_STEM + self.app_specific(NQN_APPLICATION)

    def app_specific(self, application: str) -> str:
        """sd_id128_get_app_specific(3): an ID derived from the machine's that does not give it away."""
        return uuid4_from(hmac_sha256(self.id, bytes.fromhex(application)))


# -----------------------------------------------------------------------------------------------------------
# 7. Codes, secrets and keys
# -----------------------------------------------------------------------------------------------------------


# Crockford's base 32: no letter looks like a digit, and those that do are read as what they look like.
CODE_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
CODE_ALIASES = {"o": "0", "i": "1", "l": "1"}
INITIATOR_SECRET, TARGET_SECRET = "CHAP initiator secret", "CHAP target secret"  # what they are derived by
CODE_MIN, CODE_MAX = 16, 64  # letters, of 5 bits each
IQN_STEM = "iqn.2023-10.io.systemd:"
HOST_STEM = "nqn.2014-08.org.nvmexpress:uuid:"
DISCOVERY_NQN = "nqn.2014-08.org.nvmexpress.discovery"
FABRICS_SEED = b"NVMe-over-Fabrics"


class Secret:
    """Bytes that only reveal() shows: no message, list or traceback does."""

    __slots__ = ("_bytes",)

    def __init__(self, raw: bytes) -> None:
        self._bytes = raw

    def reveal(self) -> bytes:
        return self._bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def __repr__(self) -> str:
        return "(secret)"


class Confidential(str):
    """Text for a screen. Where something that has it is shown, as in a traceback or a list, it is not."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "(confidential)"


def letters(number: int, count: int) -> str:
    """So many letters for a number, the lowest five bits first."""
    return "".join(CODE_LETTERS[number >> 5 * i & 31] for i in range(count))


class Code:
    """What a person reads off the screen, and all that a host needs is derived from.

    The manual page has the derivations, under "Pairing", with test vectors.
    """

    def __init__(self, letters: Secret) -> None:
        self.letters = letters

    @staticmethod
    def random() -> Code:
        """One of 80 bits."""
        number = int.from_bytes(os.urandom(10), "big")
        return Code(Secret(letters(number, CODE_MIN).encode()))

    @staticmethod
    def parse(text: str) -> Code:
        """A code as people write it: in any case, with or without blanks and hyphens. Raises ValueError."""
        letters = [CODE_ALIASES.get(c, c) for c in text.lower() if c not in "- \t\r\n"]
        if not all(c in CODE_LETTERS for c in letters):
            raise ValueError("it may only have digits and letters other than u")
        if not CODE_MIN <= len(letters) <= CODE_MAX:
            raise ValueError(f"it has {len(letters)} letters and digits, not {CODE_MIN} to {CODE_MAX}")
        return Code(Secret("".join(letters).encode()))

    def text(self) -> str:
        """As it is shown: in groups of four."""
        letters = self.letters.reveal().decode()
        return "-".join(letters[i : i + 4] for i in range(0, len(letters), 4))

    def derive(self, label: str) -> bytes:
        """32 bytes for one purpose."""
        return hmac_sha256(self.letters.reveal(), b"storagetm " + label.encode())

    def chap_secret(self, label: str) -> Secret:
        """A secret of 80 bits and 16 letters, which is the most that Windows takes."""
        number = int.from_bytes(self.derive(label)[:10], "big")
        return Secret(letters(number, 16).encode())

    def nbd_key(self) -> Secret:
        """What TLS with NBD has for a pre-shared key."""
        return Secret(self.derive("NBD TLS PSK"))

    def host(self) -> AllowedHost:
        """The host that knows the code."""
        return AllowedHost(
            HOST_STEM + dashed(uuid4_from(self.derive("host ID"))),
            secret=Secret(dhchap_text(self.derive("host secret"))),
            controller_secret=Secret(dhchap_text(self.derive("controller secret"))),
            psk=Secret(self.derive("TLS PSK")),
        )


class AllowedHost:
    """A host that may connect, and what proves that it is that one.

    `secret` and `controller_secret` are DH-HMAC-CHAP's, as DHHC-1 texts; `psk` is TLS's configured PSK.
    """

    __slots__ = ("controller_secret", "nqn", "psk", "secret")

    def __init__(
        self,
        nqn: str,
        *,
        secret: Secret | None = None,
        controller_secret: Secret | None = None,
        psk: Secret | None = None,
    ) -> None:
        self.nqn = nqn
        self.secret = secret
        self.controller_secret = controller_secret
        self.psk = psk

    @property
    def host_id(self) -> str:
        """The ID that belongs to the NQN, dashed; empty if it says none."""
        text = self.nqn[len(HOST_STEM) :] if self.nqn.startswith(HOST_STEM) else ""
        return text if is_id128(text.replace("-", "").lower()) else ""

    def root(self) -> str:
        """The root of its branch."""
        return f"nvmet/hosts/{self.nqn}"


def with_crc(raw: bytes) -> str:
    """Base 64 of `raw` and its CRC-32, little-endian, as NVMe writes secrets and keys."""
    import binascii

    text = binascii.b2a_base64(raw + binascii.crc32(raw).to_bytes(4, "little"), newline=False)
    return text.decode()


def without_crc(text: str) -> bytes:
    """The reverse of with_crc(). Raises ValueError, without the text in it."""
    import binascii

    try:
        raw = binascii.a2b_base64(text.encode("ascii"))
    except ValueError:
        raise ValueError("it is no base 64") from None
    # What b2a_base64() would not write is a slip of the pen, which the function skips.
    if binascii.b2a_base64(raw, newline=False).decode() != text:
        raise ValueError("it is no base 64")
    if len(raw) - 4 not in (32, 48, 64):
        raise ValueError(f"it holds {max(0, len(raw) - 4)} bytes, not 32, 48 or 64")
    if binascii.crc32(raw[:-4]).to_bytes(4, "little") != raw[-4:]:
        raise ValueError("its check sum is wrong: a letter is missing or mistyped")
    return raw[:-4]


def dhchap_text(raw: bytes, transform: int = 0) -> bytes:
    """A secret for DH-HMAC-CHAP (NVMe base specification 2.0, 8.13.5.8): 32, 48 or 64 bytes.

    `transform` is the hash by which both sides change it first: 0 for none, 1 to 3 for SHA-256, -384, -512.
    """
    return f"DHHC-1:{transform:02}:{with_crc(raw)}:".encode()


def parse_dhchap(text: str) -> Secret:
    """A DHHC-1 text, checked as the kernel would only do when a host connects. Raises ValueError."""
    kind, _, rest = text.partition(":")
    transform, _, rest = rest.partition(":")
    if kind != "DHHC-1" or transform not in ("00", "01", "02", "03") or rest[-1:] != ":":
        raise ValueError("it is not of the form DHHC-1:00:...:")
    without_crc(rest[:-1])
    return Secret(text.encode())


def psk_text(psk: Secret) -> str:
    """The interchange format of a configured PSK for SHA-256 (NVMe/TCP transport specification, 3.6.1.5)."""
    return f"NVMeTLSkey-1:01:{with_crc(psk.reveal())}:"


def parse_psk(text: str) -> Secret:
    """The configured PSK in its interchange format. Raises ValueError."""
    kind, _, rest = text.partition(":")
    hash_, _, rest = rest.partition(":")
    if kind != "NVMeTLSkey-1" or rest[-1:] != ":":
        raise ValueError("it is not of the form NVMeTLSkey-1:01:...:")
    raw = without_crc(rest[:-1])
    # tlshd with an older GnuTLS takes SHA-256 for all of them, and fails.
    if hash_ != "01" or len(raw) != 32:
        raise ValueError("it is not for SHA-256; make one with 'nvme gen-tls-key --hmac=1'")
    return Secret(raw)


def expand_label(key: bytes, label: str, context: bytes, *, exact: bool) -> bytes:
    """32 bytes by HKDF-Expand-Label with SHA-256 (RFC 8446, 7.1), of the key by HKDF-Extract (RFC 5869).

    nvme-cli before libnvme 1.16 has it without the two octets of lengths, and with the length of the result
    in the other byte order: that is not `exact`.
    """
    name = b"tls13 " + label.encode()
    if exact:
        info = (32).to_bytes(2, "big") + bytes([len(name)]) + name + bytes([len(context)]) + context
    else:
        info = (32).to_bytes(2, "little") + name + context
    return hmac_sha256(hmac_sha256(bytes(32), key), info + b"\x01")


def tls_key(host: AllowedHost, subsystem: str, *, exact: bool) -> tuple[str, Secret]:
    """The identity, of version 1, and the TLS PSK for a host and a subsystem, for TLS_AES_128_GCM_SHA256.

    NVMe/TCP transport specification 1.1, 3.6.1.3 and 3.6.1.4. The identity has a digest of the retained PSK,
    so that those of both derivations can be there.
    """
    import binascii

    configured = host.psk.reveal() if host.psk else b""
    nqn = utf8(host.nqn)
    retained = expand_label(configured, "HostNQN", nqn, exact=exact)
    digest = hmac_sha256(retained, b" ".join((nqn, utf8(subsystem), FABRICS_SEED)))
    text = binascii.b2a_base64(digest, newline=False)
    key = expand_label(retained, "nvme-tls-psk", b"01 " + text, exact=exact)
    return f"NVMe1R01 {host.nqn} {subsystem} {text.decode()}", Secret(key)


def parse_hosts(raw: bytes, where: str) -> list[AllowedHost]:
    """Hosts and their secrets, one in a line: NQN, secret, and perhaps the controller's secret.

    A TLS PSK in its interchange format may be among them. Empty lines, and those that begin with `#`, count
    for nothing. Raises UserError, which never has a secret in it.
    """
    found: dict[str, AllowedHost] = {}
    for number, line in enumerate(raw.decode("utf-8", "replace").split("\n"), 1):
        words = line.split()
        if not words or words[0][:1] == "#":
            continue
        at = f"{where}, line {number}"
        host = AllowedHost(words[0])
        try:
            check_host_nqn(host.nqn)
        except ValueError as e:
            raise UserError(f"{at}: the first word is no host NQN: {e}") from None
        for place, word in enumerate(words[1:], 2):
            try:
                if word.startswith("NVMeTLSkey-1:") and host.psk is None:
                    host.psk = parse_psk(word)
                elif host.secret is None:
                    host.secret = parse_dhchap(word)
                elif host.controller_secret is None:
                    host.controller_secret = parse_dhchap(word)
                else:
                    raise ValueError("there is nothing it could be for")
            except ValueError as e:
                raise UserError(f"{at}: word {place} is no secret: {e}") from None
        if host.nqn in found:
            raise UserError(f"{at}: the host is there twice; leave one of its lines out")
        found[host.nqn] = host
    return list(found.values())


def check_host_nqn(nqn: str) -> None:
    """Raises ValueError unless it can be a host's NQN, and the name of a directory of the kernel's."""
    if not nqn.startswith("nqn.") or not (nqn.isascii() and nqn.isprintable()):
        raise ValueError("it does not begin with 'nqn.', or is no printable ASCII")
    if any(c in nqn for c in "/, "):
        raise ValueError("it has a '/', a comma or a blank in it")
    if len(nqn) > NQN_MAX:
        raise ValueError(f"it has {len(nqn)} bytes, {NQN_MAX} are allowed")
    if nqn == DISCOVERY_NQN:
        raise ValueError("it is that of discovery")


def read_secrets(path: str, what: str) -> bytes:
    """The bytes of a file with secrets, which nobody else may read or change. Raises UserError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"The {what} '{path}' is no regular file")
            if status.st_mode & 0o077:
                raise UserError(
                    f"The {what} '{path}' can be read or changed by others (mode "
                    f"{stat.S_IMODE(status.st_mode):04o}); take that away with 'chmod go= {quoted(path)}'"
                )
            if status.st_uid not in (0, os.geteuid()):
                raise UserError(f"The {what} '{path}' belongs to another user; make it root's")
            if len(found := os.read(fd, SECRETS_MAX + 1)) > SECRETS_MAX:
                raise UserError(f"The {what} '{path}' has over {SECRETS_MAX} bytes; give the right one")
            return found
        finally:
            os.close(fd)
    except OSError as e:
        raise UserError(f"Failed to read the {what} '{path}': {reason_of(e)}") from e


UNENCRYPTED = (
    "without it names of hosts cross the wire in the clear, who listens can read along, and clients cannot "
    "tell a false target"
)


# The last Linux that was seen to ask for the secret at each queue of a host. Linux 7.2 asks at the first one
# alone, and lets in who knows the names that a host has sent in the clear.
LAST_TO_ASK_QUEUES = (6, 12)


class Admission:
    """Who may connect: anybody, or the `hosts` that are allowed, each by what it proves; and how encrypted.

    `paired` is the one of them that knows the `code`, if there is one; `kept` is the file for a code of our
    `own`, which only outlives a run that is killed; empty for a dry run. `dhgroup` and `hash` are
    DH-HMAC-CHAP's, as the kernel names them.
    """

    NO, OFFERED, REQUIRED = ENCRYPT

    def __init__(
        self,
        hosts: Sequence[AllowedHost] = (),
        encrypt: str = "no",
        *,
        code: Code | None = None,
        own: bool = False,
        kept: str = "",
        dhgroup: str = "",
        hash_: str = "",
    ) -> None:
        self.hosts = list(hosts)
        self.encrypt = encrypt
        self.code = code
        self.own = own
        self.kept = kept
        self.paired = code.host() if code else None
        if self.paired:
            if encrypt == self.REQUIRED:
                # That it knows the code it shows by the key.
                self.paired.secret = self.paired.controller_secret = None
            self.hosts.insert(0, self.paired)
        self.dhgroup = dhgroup or DHGROUPS[1]
        self.hash = hash_ or HASHES[0]

    @property
    def restricted(self) -> bool:
        """Whether only some hosts may connect."""
        return bool(self.hosts)

    @property
    def encrypted(self) -> bool:
        """Whether there is TLS, be it required or offered."""
        return self.encrypt != self.NO

    @property
    def required(self) -> bool:
        return self.encrypt == self.REQUIRED

    def keep(self) -> None:
        """Notes a code of our own for the run after this one, and forgets that of the one before.

        Called once nobody else can do so. Raises UserError.
        """
        if not (self.own and self.code):
            self.forget()
        elif self.kept:
            try:
                write_new_file(self.kept, utf8(self.code.text()))
            except OSError as e:
                raise UserError(
                    f"Failed to keep the code at '{self.kept}': {reason_of(e)}; mount a tmpfs on '/run'"
                ) from e

    def forget(self) -> None:
        """Removes the file with the code, and what is left of one that was being written."""
        for path in (self.kept, self.kept + ".new") if self.kept else ():
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as e:
                warning(f"Failed to remove '{path}', which has the code in it: {reason_of(e)}; remove it")


# Numbers of add_key(2) and keyctl(2), which the C library has no functions for (arch/*/syscalls/*.tbl).
KEY_CALLS = {
    "aarch64": (217, 219),
    "armv7l": (309, 311),
    "i686": (286, 288),
    "loongarch64": (217, 219),
    "ppc64": (269, 271),
    "ppc64le": (269, 271),
    "riscv64": (217, 219),
    "s390x": (278, 280),
    "x86_64": (248, 250),
}


def keep_memory_private() -> None:
    """Has the kernel write no core dump of this process (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def key_calls(machine: str, *, narrow: bool) -> tuple[int, int] | None:
    """The numbers on this machine, as uname(2) has it; None if they are not known.

    A 32-bit program, which is `narrow`, has its own, whatever the kernel is.
    """
    if narrow:
        machine = {"aarch64": "armv7l", "x86_64": "i686"}.get(machine, machine)
    if machine.startswith("arm"):
        machine = "armv7l"
    elif machine in ("i386", "i486", "i586"):
        machine = "i686"
    return KEY_CALLS.get(machine)


class NvmeKeyring:
    """The kernel's keyring for TLS, `.nvme` (keyrings(7); drivers/nvme/common/keyring.c).

    Whoever has it in a keyring of his own possesses the keys in it, and so may read and search them. All
    methods raise OSError.
    """

    DESCRIBE, LINK, SEARCH, READ, INVALIDATE = 6, 8, 10, 11, 21  # operations of keyctl(2)
    PROCESS = -2  # the keyring of this process

    def __init__(self) -> None:
        self.serial = 0

    def call(self, number: int, *arguments: bytes | int | None) -> int:
        calls = key_calls(os.uname().machine, narrow=ctypes.sizeof(ctypes.c_void_p) == 4)
        if calls is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        result = int(libc.syscall(ctypes.c_long(calls[number]), *words))
        if result < 0:
            problem = ctypes.get_errno()
            raise OSError(problem, os.strerror(problem))
        return result

    def fetch(self, operation: int, serial: int) -> bytes:
        """What the kernel writes into a buffer, up to the 64 KiB that are more than it has."""
        buffer = ctypes.create_string_buffer(1 << 16)
        length = self.call(1, operation, serial, ctypes.addressof(buffer), len(buffer))
        return buffer.raw[: min(length, len(buffer))]

    def open(self) -> int:
        """Finds the keyring and takes possession of it; its serial number."""
        if not self.serial:
            serial = parse_keys(read_bytes(PROC + "keys"), "keyring", ".nvme")
            if not serial:
                raise OSError(errno.ENOKEY, os.strerror(errno.ENOKEY))
            self.call(1, self.LINK, serial, self.PROCESS)
            self.serial = serial
        return self.serial

    def find(self, identity: str) -> int:
        """The serial number of the key with this identity; 0 if there is none."""
        try:
            return self.call(1, self.SEARCH, self.open(), b"psk", utf8(identity), 0)
        except OSError as e:
            if e.errno in (errno.ENOKEY, errno.EKEYREVOKED, errno.EKEYEXPIRED):
                return 0
            raise

    def read(self, serial: int) -> Secret:
        return Secret(self.fetch(self.READ, serial))

    def add(self, identity: str, key: Secret) -> int:
        """Puts a key in; its serial number."""
        raw = key.reveal()
        return self.call(0, b"psk", utf8(identity), raw, len(raw), self.open())

    def remove(self, serial: int) -> None:
        """Makes a key useless at once, to everybody who has it. The kernel takes it out a moment later."""
        self.call(1, self.INVALIDATE, serial)

    def identities(self) -> set[str]:
        """The identities of all keys that can be used."""
        found = set()
        # A keyring is read as the serial numbers of what is in it.
        for serial in memoryview(self.fetch(self.READ, self.open())).cast("i"):
            try:
                description = self.fetch(self.DESCRIBE, serial)
            except OSError:
                continue  # it is gone
            # Its type, user, group and rights come before its name (keyctl_describe(3)).
            kind, *_, name = description.rstrip(b"\0").split(b";", 4)
            if kind == b"psk":
                found.add(printable(name))
        return found


def parse_keys(raw: bytes, kind: str, name: str) -> int:
    """The serial number of a key of root's in /proc/keys; 0 if it has none of that kind and name.

    Takes any bytes.
    """
    for line in raw.decode("utf-8", "replace").split("\n"):
        words = line.split(None, 8)
        # Long names of types are cut.
        if len(words) == 9 and words[5] == "0" and words[7] == kind and words[8].partition(": ")[0] == name:
            try:
                return int(words[0], 16)
            except ValueError:
                pass
    return 0


# -----------------------------------------------------------------------------------------------------------
# 8. Block devices
# -----------------------------------------------------------------------------------------------------------


def links_in(entry: bytes) -> list[str]:
    """The links that udev has made to a device, from its entry in the database. Takes any bytes."""
    return [DEV + printable(x[2:]) for x in entry.split(b"\n") if x.startswith(b"S:")]


def sys_block(sysname: str) -> str:
    return f"{SYS}class/block/{sysname}"


def sys_device(sysname: str) -> str:
    """A block device's directory in the device tree, where sys_block() is a link to. Raises OSError."""
    target = os.readlink(sys_block(sysname))
    # All are "../../devices/...". To join and normalize paths takes 6 microseconds a disk in place of 4.
    return SYS + target[6:] if target[:6] == "../../" else os.path.join(SYS + "class/block", target)


def whole_place(place: str) -> str:
    """The directory of the disk that a partition is on, given the partition's; a disk's own is returned."""
    return os.path.dirname(place) if os.path.exists(place + "/partition") else place


def is_going(place: str) -> bool:
    """Whether the kernel is taking away a disk of size 0, given its directory in sysfs.

    Since Linux 6.16, del_gendisk() waits for all I/O of the disk, for as long as that takes, before it
    removes that directory and sends a uevent: elevator_set_none() freezes the queue. Before that, on older
    kernels too, it sets the size to 0 and removes the disk's backing device, with a uevent of that.
    """
    return not os.path.lexists(place + "/bdi")


def is_busy(sysname: str) -> bool:
    """Whether a block device has I/O under way, as far as the kernel counts it."""
    try:
        return any(count != b"0" for count in read_page(f"{SYS}block/{sysname}/inflight").split())
    except OSError:
        return False


def sysname_of(devnum: int) -> str:
    """The kernel's name of a block device number; empty if there is none."""
    try:
        return os.path.basename(os.readlink(f"{SYS}dev/block/{os.major(devnum)}:{os.minor(devnum)}"))
    except OSError:
        return ""


def sysname_of_node(path: str) -> str:
    """The kernel's name of the block device that a path leads to; empty if it leads to none."""
    return device_below(path) if device_number(path) else ""


def device_number(node: str) -> str:
    """MAJOR:MINOR of a block device's node; empty if `node` is none."""
    try:
        st = os.stat(node)
    except (OSError, ValueError):
        return ""
    return f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}" if stat.S_ISBLK(st.st_mode) else ""


def is_partition(sysname: str) -> bool:
    return os.path.exists(sys_block(sysname) + "/partition")


def is_stacked(sysname: str) -> bool:
    """Whether a block device is made of others, as those of bcache, device-mapper and md are."""
    return sysname.startswith(("bcache", "dm-", "md"))


def dm_uuid(sysname: str) -> str:
    """The UUID of a device-mapper device, which begins with its owner's name; empty for others."""
    return read_attribute(sys_block(sysname) + "/dm/uuid") if sysname.startswith("dm-") else ""


def is_multipath(sysname: str) -> bool:
    """Whether a block device is a disk that several others are paths to (multipath-tools)."""
    return dm_uuid(sysname).startswith("mpath-")


def is_mapped_partition(sysname: str) -> bool:
    """Whether a block device is a partition of another one, made by kpartx: its UUID is "part1-..."."""
    prefix, _, rest = dm_uuid(sysname).partition("-")
    return prefix[:4] == "part" and prefix[4:].isdigit() and rest != ""


def below(sysname: str, found: set[str] | None = None) -> set[str]:
    """The block devices that one is on or made of, through all layers."""
    found = set() if found is None else found
    base = sys_block(sysname)
    lower = list_directory(base + "/slaves")
    if os.path.exists(base + "/partition"):
        lower.append(os.path.basename(os.path.dirname(os.path.realpath(base))))
    for name in lower:
        if name not in found:
            found.add(name)
            below(name, found)
    return found


def is_mapping(sysname: str) -> bool:
    """Whether a block device is one of ours, in between a disk and its export."""
    return dm_uuid(sysname).startswith(MAPPING_PREFIX)


def mapped_disk(sysname: str) -> str:
    """The node or file that a mapping of ours leads to; empty if it does not show."""
    for lower in list_directory(sys_block(sysname) + "/slaves"):
        backing = read_attribute(f"{sys_block(lower)}/loop/backing_file")
        if not backing.startswith(MEMORY_FILE):
            return backing or device_node(lower)
    return ""


def why_ours(sysname: str, depth: int = 0) -> str:
    """How a block device leads to a mapping of ours, and so is an export itself; empty if it does not."""
    if is_mapping(sysname):
        return f"'{DEV}{sysname}', through which '{mapped_disk(sysname)}' is exported"
    lower: list[str] = []
    if is_partition(sysname):
        lower = [whole_disk(sysname)]
    elif is_stacked(sysname):
        lower = list_directory(sys_block(sysname) + "/slaves")
    elif sysname.startswith("loop"):
        lower = [device_below(read_attribute(sys_block(sysname) + "/loop/backing_file"))]
    return next((why for n in lower if n and depth < 16 and (why := why_ours(n, depth + 1))), "")


def device_below(path: str) -> str:
    """The kernel's name of the block device that a path leads to, or that a file is on; empty if unknown."""
    try:
        st = os.stat(path)
    except (OSError, ValueError):
        return ""
    return sysname_of(st.st_rdev if stat.S_ISBLK(st.st_mode) else st.st_dev)


def is_no_disk(sysname: str) -> bool:
    """Whether to hide a block device: an unbound loop device, or one between a disk and its export."""
    if sysname.startswith("loop"):
        source = read_attribute(sys_block(sysname) + "/loop/backing_file")
        holders = list_directory(sys_block(sysname) + "/holders")
        return not source or source.startswith(MEMORY_FILE) or any(map(is_mapping, holders))
    return is_mapping(sysname)


def is_between(sysname: str) -> bool:
    """Whether a block device is there only between a disk and its export, so that its news is no news."""
    if sysname.startswith("loop"):
        return is_no_disk(sysname) and bool(read_attribute(sys_block(sysname) + "/loop/backing_file"))
    return is_mapping(sysname)


def logical_block_size(node: str) -> int:
    """The size of a block device's sectors, in bytes; 0 if that is not known."""
    base = f"{SYS}dev/block/{device_number(node)}"
    if os.path.exists(base + "/partition"):
        base = os.path.dirname(os.path.realpath(base))
    size = read_attribute(base + "/queue/logical_block_size")
    return int(size) if size.isdigit() else 0


def partitions_of(sysname: str) -> list[str]:
    base = sys_block(sysname)
    return [
        n for n in list_directory(base) if n.startswith(sysname) and os.path.exists(f"{base}/{n}/partition")
    ]


def natural_order(name: str) -> tuple[int, str]:
    """sda before sdb before sdaa, nvme0n1 before nvme10n1."""
    return len(name), name


def parse_block_uevent(raw: bytes) -> tuple[str, str]:
    """MAJOR:MINOR and DISKSEQ, if it is there, from a block device's uevent file. Takes any bytes.

    With parse_assignments() it would take 2.5 microseconds in place of 0.8, for each disk.
    """
    text = "\n" + raw.decode("ascii", "replace")
    # They become part of paths.
    major, minor, diskseq = [
        value if value.isdecimal() else ""
        for value in [
            text.partition(name)[2].partition("\n")[0] for name in ("\nMAJOR=", "\nMINOR=", "\nDISKSEQ=")
        ]
    ]
    return f"{major}:{minor}", diskseq


def udev_runs() -> bool:
    return os.path.exists(UDEV + "control")


def parse_udev_database(raw: bytes) -> dict[str, str]:
    """The properties of an entry of udev's database (systemd's device-private.c). Takes any bytes."""
    # All others begin with links and tags, of which there may be many.
    lines = [line[2:] for line in raw.split(b"\n") if line[:5] == b"E:ID_"]
    return parse_assignments(b"\n".join(lines)) if lines else {}


def is_of_former_disk(entry: bytes, diskseq: str) -> bool:
    """Whether an entry of udev's database is about the disk or medium that had the same number before.

    A busy udev may take the entry away, or replace it, only when the next disk has been there for a while.
    Its links tell since systemd 250. Takes any bytes.
    """
    stem = b"S:disk/by-diskseq/"
    if not diskseq or stem not in entry or stem + diskseq.encode() + b"\n" in entry:
        return False
    links = [line[len(stem) :] for line in entry.split(b"\n") if line.startswith(stem)]
    return bool(links) and diskseq.encode() not in [x.partition(b"-")[0] for x in links]


def parse_vpd_serial(raw: bytes) -> str:
    """The unit serial number of SCSI's vital product data page 0x80 (SPC-4, 7.8.15). Takes any bytes."""
    if len(raw) < 4 or raw[1] != 0x80:
        return ""
    return printable(raw[4 : 4 + int.from_bytes(raw[2:4], "big")]).strip("\0? \n")


def read_vpd(path: str) -> bytes:
    """A page of SCSI's vital product data; empty if there is none."""
    try:
        return read_bytes(path)
    except OSError:
        return b""


def read_udev_entry(number: str, diskseq: str) -> bytes:
    """What udev's database has on the device MAJOR:MINOR, which now is the disk or medium `diskseq`.

    Raises OSError if there is nothing (yet).
    """
    path = f"{UDEV}data/b{number}"
    entry = read_bytes(path)
    if is_of_former_disk(entry, diskseq):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return entry


def parse_vpd_name(raw: bytes) -> tuple[int, str]:
    """Type and text of the best name in SCSI's page 0x83 (SPC-4, 7.8.6), type 3 (NAA) before 2, 1 and 0.

    Written as udev's scsi_id does it; (-1, "") if there is none. Takes any bytes.
    """
    best = -1, -1, ""
    offset = 4
    while offset + 4 <= len(raw) and raw[1] == 0x83:
        code_set, kind, length = raw[offset] & 15, raw[offset + 1] & 0x3F, raw[offset + 3]
        name = raw[offset + 4 : offset + 4 + length]
        offset += 4 + length
        # Others are of the port or the target, or of types that are no names.
        if kind <= 3 and name and code_set in (1, 2):
            rank = name[0] >> 4 if kind == 3 and code_set == 1 else 0  # registered ones are 5 and 6
            best = max(best, (kind, rank, name.hex() if code_set == 1 else printable(name.rstrip(b"\0"))))
    return best[0], best[2]


def usb_serial(device: str) -> str:
    """The serial number of the USB device that a SCSI device is; empty if it is none or has none."""
    path = os.path.realpath(device)
    if "/usb" not in path:
        return ""
    while len(path) > len(SYS) and not os.path.exists(path + "/idVendor"):
        path = os.path.dirname(path)
    return read_attribute(path + "/serial")


def device_node(sysname: str) -> str:
    """The node of a block device as devtmpfs names it."""
    return DEV + sysname.replace("!", "/")


def whole_disk(sysname: str) -> str:
    """The kernel's name of the disk that a partition is on; empty if the device is gone or no partition."""
    if not is_partition(sysname):
        return ""
    return os.path.basename(os.path.dirname(os.path.realpath(sys_block(sysname))))


def block_tag(place: str, number: str, diskseq: str) -> str:
    """What tells a disk or medium from the next one with the same number MAJOR:MINOR. Raises OSError.

    That is DISKSEQ (Linux 5.15); partitions have their disk's. Before, a disk that is plugged in has a new
    directory at least.
    """
    whole = place if diskseq else whole_place(place)
    if whole != place:
        diskseq = parse_block_uevent(read_page(whole + "/uevent"))[1]
    return f"{number} {diskseq or f'inode {os.stat(whole).st_ino}'}"


def sysname_tagged(tag: str) -> str:
    """The kernel's name of a block device, given its block_tag(); empty if it is gone.

    Another one may have its number by then.
    """
    try:
        found = os.path.basename(os.readlink(f"{SYS}dev/block/{tag.partition(' ')[0]}"))
        place = sys_device(found)
        here = block_tag(place, *parse_block_uevent(read_page(place + "/uevent")))
        return found if here == tag else ""
    except OSError:
        return ""


def has_gone(tag: str) -> bool:
    """Whether a block device, given its block_tag(), is no longer there, or is being taken away."""
    if not (name := sysname_tagged(tag)):
        return not tag.startswith(FILE_TAG)
    try:
        return is_going(whole_place(sys_device(name)))
    except OSError:
        return True


# -----------------------------------------------------------------------------------------------------------
# 9. What uses a block device
# -----------------------------------------------------------------------------------------------------------


def why_network(sysname: str, place: str = "", depth: int = 0) -> str:
    """How a disk, or one that it is stacked on, comes over the network itself; empty if it is local.

    `place` is its directory in the device tree, if that is known already.

    Exporting such a disk, then attaching the export on this machine, makes a new disk to export, and so on.
    """
    for prefix in NETWORK_DISKS:
        if sysname.startswith(prefix):
            return f"comes over the network ({NETWORK_DISKS[prefix]})"
    try:
        place = place or sys_device(sysname)
    except OSError:
        return "may come over the network (it is not in sysfs)"
    for part in place.split("/") if "/session" in place or "/rport-" in place else ():
        if part.startswith("session") and part[7:].isdigit():
            return "comes over the network (iSCSI)"
        if part.startswith("rport-"):
            return "comes over the network (Fibre Channel)"
    if sysname.startswith("nvme"):
        # With multipath the disk hangs below its subsystem, and the controllers are beside it.
        parent = os.path.dirname(place)
        controllers = [parent] if os.path.exists(parent + "/transport") else []
        for name in () if controllers else list_directory(parent):
            if name.startswith("nvme") and name[4:].isdigit():
                controllers.append(f"{parent}/{name}")
        transports = {read_attribute(c + "/transport") for c in controllers}
        if not transports or "" in transports:
            return "may come over the network (its NVMe controller does not say)"
        if others := transports - {"pcie", "apple-nvme"}:
            return f"comes over the network (NVMe/{sorted(others)[0].upper()})"
    if is_stacked(sysname) and depth < 16:
        for lower in list_directory(sys_block(sysname) + "/slaves"):
            if why := why_network(lower, depth=depth + 1):
                return f"is made of '{lower}', which {why}"
    return ""


def why_looped(place: str) -> str:
    """Whether a disk, given its directory in sysfs, is at the other end of a gadget of this machine.

    That is so with dummy_hcd(4), and with a cable from one port to another.
    """
    if "/usb" not in place:
        return ""
    serial = usb_serial(place + "/device")
    for gadget in list_directory(CONFIGFS + "usb_gadget"):
        own = read_attribute(f"{CONFIGFS}usb_gadget/{gadget}/strings/0x409/serialnumber")
        if serial and serial == own:
            return f"comes from this machine's own USB gadget '{gadget}'"
    return ""


def unescape_octal(raw: bytes) -> bytes:
    r"""Undoes the \040 of mountinfo and swaps (fs/proc_namespace.c). Takes any bytes."""
    head, *rest = raw.split(b"\\")
    for part in rest:
        code = part[:3]
        if len(code) == 3 and all(0x30 <= c <= 0x37 for c in code) and int(code, 8) < 256:
            head += bytes([int(code, 8)]) + part[3:]
        else:
            head += b"\\" + part
    return head


def parse_mountinfo(raw: bytes) -> Iterator[tuple[str, bytes, str]]:
    """MAJOR:MINOR, source and mount point of every mount in mountinfo (proc(5)). Takes any bytes."""
    for line in raw.split(b"\n"):
        fields = line.split(b" ")
        if len(fields) < 10 or b"-" not in fields[6:-2]:
            continue
        source = fields[fields.index(b"-", 6) + 2]
        yield printable(fields[2]), unescape_octal(source), printable(unescape_octal(fields[4]))


def parse_swaps(raw: bytes) -> Iterator[bytes]:
    """The paths in /proc/swaps. Takes any bytes."""
    for line in raw.split(b"\n")[1:]:
        path = line.split(b" ")[0].split(b"\t")[0]
        if path:
            yield unescape_octal(path)


class Usage:
    """What the running system does with its block devices, read once.

    `direct` maps MAJOR:MINOR to a sentence's end ("is mounted on '/'"), `mounts` to the mount point, `loops`
    a block device or file behind a loop device to that. Raises OSError if it cannot be read, and then
    nothing is known.
    """

    def __init__(self) -> None:
        self.direct: dict[str, str] = {}
        self.loops: dict[str, str] = {}
        self.mounts: dict[str, str] = {}
        for devnum, source, where in parse_mountinfo(read_bytes(PROC + "self/mountinfo")):
            use = f"is mounted on '{where}'"
            self.direct.setdefault(devnum, use)
            self.mounts.setdefault(devnum, where)
            # btrfs, ZFS, bcachefs and overlays have device numbers of their own, the source tells more.
            if source.startswith(b"/dev/"):
                for part in source.split(b":"):
                    if number := device_number(os.fsdecode(part)):
                        self.direct.setdefault(number, use)
        for path in parse_swaps(read_bytes(PROC + "swaps")) if os.path.exists(PROC + "swaps") else ():
            key = self.key(os.fsdecode(path))
            self.direct.setdefault(key, "is active swap")
        for fs in list_directory(SYS + "fs/btrfs"):
            for name in list_directory(f"{SYS}fs/btrfs/{fs}/devices"):
                number = read_attribute(sys_block(name) + "/dev")
                self.direct.setdefault(number, "is part of a mounted btrfs")
        for name in list_directory(SYS + "block"):
            if name.startswith("loop"):
                backing = read_attribute(f"{SYS}block/{name}/loop/backing_file")
                if backing and (key := self.key(backing)):
                    self.loops[key] = name
        self.direct.pop("", None)

    @staticmethod
    def key(path: str) -> str:
        """MAJOR:MINOR of a block device, or something as unique for a file."""
        try:
            st = os.stat(path)
        except (OSError, ValueError):
            return ""
        if stat.S_ISBLK(st.st_mode):
            return f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
        return f"file {st.st_dev}:{st.st_ino}"

    def of(self, sysname: str) -> str:
        """How the system uses a block device, its partitions, or what is stacked on them; empty if not."""
        # Every user except a loop device claims the device exclusively, so for most disks this one check is
        # enough.
        if not self.loops and claim_error(sysname) == 0:
            return ""
        return self.search(sysname, set())

    def search(self, sysname: str, seen: set[str]) -> str:
        """Looks for the use through all layers above; `seen` has those that were looked at."""
        if sysname in seen:
            return ""
        seen.add(sysname)
        base = sys_block(sysname)
        number = read_attribute(base + "/dev")
        if not number:
            return f"its use cannot be determined ('{base}/dev' cannot be read)"
        if number in self.direct:
            return f"'{DEV}{sysname}'{layer_name(sysname)} {self.direct[number]}"
        try:
            upper = os.listdir(base + "/holders") + partitions_of(sysname)
        except OSError as e:
            return f"its use cannot be determined ('{base}/holders': {reason_of(e)})"
        if number in self.loops:
            upper.append(self.loops[number])
        for name in sorted(upper, key=natural_order):
            # What stands on a mapping of ours uses the export. It does not end one of an earlier run.
            if not is_mapping(name) and (use := self.search(name, seen)):
                return use
        return "" if upper else why_claimed(sysname)

    def of_file(self, path: str) -> str:
        key = self.key(path)
        if key in self.direct:
            return f"'{path}' {self.direct[key]}"
        return self.search(self.loops[key], set()) if key in self.loops else ""


def what_holds(sysname: str, usage: Usage | None = None) -> tuple[str, list[str]]:
    """Who uses a block device, as a sentence that is empty if it does not show; the commands that end it."""
    try:
        usage = usage or Usage()
    except OSError:
        return "", []
    node = device_node(sysname)
    for name in sorted(list_directory(sys_block(sysname) + "/holders") + partitions_of(sysname)):
        fact, commands = what_holds(name, usage)
        return fact or f"'{device_node(name)}' is made of '{node}'", [*commands, *how_to_end(name)]
    number = read_attribute(sys_block(sysname) + "/dev")
    if number in usage.mounts:
        return f"'{node}' {usage.direct[number]}", [f"umount {quoted(usage.mounts[number])}"]
    if number in usage.direct:
        return f"'{node}' {usage.direct[number]}", [f"swapoff {node}"]
    if loop := usage.loops.get(number):
        fact, commands = what_holds(loop, usage)
        return fact or f"'{DEV}{loop}' is made of '{node}'", [*commands, f"losetup -d {DEV}{loop}"]
    for pid in list_directory(PROC):
        if pid.isdigit() and int(pid) != os.getpid():
            for fd in list_directory(f"{PROC}{pid}/fd"):
                # Only what leads to a device can be it, and most descriptors are something else.
                if device_number(f"{PROC}{pid}/fd/{fd}") == number:
                    name = read_attribute(f"{PROC}{pid}/comm")
                    return f"process {pid} ({name}) has '{node}' open", [f"kill {pid}"]
    return "", []


def in_brackets(commands: Sequence[str]) -> str:
    return f" ('{' && '.join(commands)}')" if commands else ""


def how_to_end(sysname: str) -> list[str]:
    """The command that takes a stacked block device apart; none for a partition."""
    node = device_node(sysname)
    if sysname.startswith("dm-"):
        name = read_attribute(sys_block(sysname) + "/dm/name")
        uuid = read_attribute(sys_block(sysname) + "/dm/uuid")
        if uuid.startswith("LVM-"):
            # A volume is called GROUP-VOLUME there, and each hyphen of theirs is doubled.
            group = name.replace("--", "\0").partition("-")[0].replace("\0", "-")
            return [f"vgchange -an {quoted(group)}"]
        return [f"{'cryptsetup close' if uuid.startswith('CRYPT-') else 'dmsetup remove'} {quoted(name)}"]
    if sysname.startswith("bcache"):
        return [f"echo 1 >{sys_block(sysname)}/bcache/stop"]
    return [f"mdadm --stop {node}"] if is_stacked(sysname) and not is_partition(sysname) else []


def layer_name(sysname: str) -> str:
    """The name that people gave a device-mapper device, in brackets."""
    name = read_attribute(sys_block(sysname) + "/dm/name")
    return f" ({name})" if name else ""


def claim_error(sysname: str) -> int:
    """0 if nobody uses a block device or a partition of it exclusively, or else the error number.

    O_EXCL is the kernel's own answer (bd_prepare_to_claim() in block/bdev.c); the claim ends with close(2).
    """
    try:
        os.close(os.open(device_node(sysname), os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as e:
        return e.errno or errno.EIO
    return 0


def why_claimed(sysname: str) -> str:
    """Whether anything but a holder in sysfs uses it: ZFS, an external journal, a mount elsewhere."""
    number = claim_error(sysname)
    if number == errno.EBUSY:
        return f"'{device_node(sysname)}' is in use by the system, which does not tell what for"
    unprivileged = number in (errno.EACCES, errno.EPERM) and os.geteuid() != 0
    if number in (0, errno.ENOMEDIUM, errno.ENXIO, errno.EROFS) or unprivileged:
        return ""
    return f"its use cannot be determined ('{device_node(sysname)}': {os.strerror(number)})"


# -----------------------------------------------------------------------------------------------------------
# 10. Disks
# -----------------------------------------------------------------------------------------------------------


class Reason(str):
    """Why a disk is not exported, or not yet: a text for people that is empty if nothing is in the way.

    `kind` is what the program goes by, so that a text may be worded anew at any time.
    """

    IN_USE = "in use"  # by this system
    LAYERED = "layered"  # over or under a disk that is exported
    NO_MEDIUM = "no medium"
    NO_WAY = "no way"  # no transport can export it now
    UDEV = "udev"  # has not finished with the disk, or with one of its partitions

    kind = ""

    def __new__(cls, text: str = "", kind: str = "") -> Reason:
        found = super().__new__(cls, text)
        found.kind = kind
        return found

    @property
    def passing(self) -> bool:
        """Whether it may end without an event of the disk."""
        return self.kind in (self.IN_USE, self.LAYERED, self.NO_WAY)


class Disk:
    """A disk as it is found. All of it are facts, or what follows from them.

    `node` is the path to open and show, `size` in bytes. What a disk is called depends on what for: `key` is
    what it is known by while it is here; `tag` is another one as soon as another disk or medium is there
    under the same key; `name` is what clients call it, and need not be unique; `sysname` is the kernel's
    name; identity() tells it from all others, also after a reboot, if it lasts().
    """

    __slots__ = (
        "block",
        "cached",
        "home",
        "id_serial",
        "model",
        "name",
        "node",
        "parts",
        "place",
        "read_only",
        "relatives",
        "removable",
        "rest",
        "serial",
        "size",
        "sysname",
        "tag",
        "typed",
        "udev_entry",
        "unready",
        "usual",
    )

    def __init__(self, name: str, node: str, sysname: str = "") -> None:
        self.name = name
        self.node = node
        self.home = ""  # whose home directory it is, if it is one
        self.usual = DEFAULT_ACCESS  # what clients may do to it where the user has asked for nothing
        self.sysname = sysname  # empty for an image
        self.place = ""  # its directory in sysfs, once probed
        self.cached: dict[str, str] = {}  # what stable(), location() and Stays have found
        self.tag = ""
        self.size = 0
        self.read_only = False
        self.removable = False
        self.udev_entry = b""  # of udev's database
        self.unready = Reason()  # what has to be known of it before, and is not yet
        self.typed: set[str] = set()  # what it was called on the command line
        self.parts: list[list[str]] = []  # nodes and links of each of its partitions, if rules ask for them
        self.relatives: list[list[str]] = []  # the same of what it is made of, and of what is made of it
        self.model = ""
        self.serial = ""  # ID_SERIAL_SHORT
        self.id_serial = ""  # ID_SERIAL
        self.rest = 0  # bytes behind the last whole sector
        self.block = 0  # size of its sectors in bytes, where it has none of its own

    @property
    def names(self) -> list[str]:
        """What a rule may call it: paths, serial numbers, model."""
        # virtio disks have the serial number in ID_SERIAL alone.
        about = self.serial, self.id_serial, self.model, self.model.replace("_", " ")
        return [
            name for name in (self.node, *links_in(self.udev_entry), *sorted(self.typed), *about) if name
        ]

    @property
    def key(self) -> str:
        return self.sysname or self.node

    def set_tag(self, tag: str) -> bool:
        """Whether that is another one than before."""
        if tag == self.tag:
            return False
        self.tag = tag
        self.cached = {}
        return True

    def fingerprint(self) -> tuple[str, int, bool]:
        """What must change before an export that failed is tried again."""
        return self.tag, self.size, self.read_only

    def probe(self, *, held: bool = False) -> None:
        """Reads what can change. Raises OSError once it is gone.

        One that is `held` is known to clients, and stays what it is for them while its tag is the same.
        """
        raise NotImplementedError

    def find_relatives(self) -> None:
        """Reads what a rule may call the partitions of it, what it is made of and what is made of it."""

    def lock(self, fd: int) -> None:
        """Takes its BSD lock (systemd: "Locking Block Device Access"). Raises OSError.

        It is held as long as the disk is exported, so that udev does not probe what clients are changing.
        """
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def use(self, usage: Usage) -> str:
        """How the running system uses it; empty if it does not."""
        raise NotImplementedError

    def below(self) -> set[str]:
        """The keys of the disks that it is on or made of."""
        return set()

    def is_drive(self) -> bool:
        """Whether its medium may be exchanged without a word, as a card may. A CD's drive has a door."""
        return False

    def why_empty(self) -> Reason:
        """Whether a medium is missing."""
        return Reason()

    def watch_medium(self) -> None:
        """Has the kernel look for a medium now and then, where nobody else does."""

    def why_ours(self) -> str:
        """How it leads to a disk that is exported; empty if it does not."""
        raise NotImplementedError

    def is_zoned(self) -> bool:
        return False

    def stable(self) -> str:
        """Identifies a disk that has no serial number; stable as long as it stays in the same slot."""
        return self.node

    def identity(self) -> str:
        """What tells it from all others, also after a reboot, if it lasts()."""
        raise NotImplementedError

    def location(self) -> str:
        """Names the slot that it is in."""
        return self.node

    def lasts(self) -> bool:
        """Whether its serial number means the same disk after the machine was booted again."""
        raise NotImplementedError

    def vendor(self) -> str:
        """Who made it, as it tells itself; empty if it does not."""
        return ""


class BlockDevice(Disk):
    """A disk that the kernel has."""

    __slots__ = ()

    def probe(self, *, held: bool = False) -> None:
        # The link is followed once: with a thousand disks, the kernel's way through it counts.
        self.place = base = sys_device(self.sysname)
        number, diskseq = parse_block_uevent(read_page(base + "/uevent"))
        changed = self.set_tag(block_tag(base, number, diskseq))
        size = read_page(base + "/size").strip()
        self.size = int(size) * 512 if size.isdigit() else 0
        if not self.size and is_going(whole_place(base)):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self.read_only = read_page(base + "/ro")[:1] == b"1"
        # Asked only where a medium can be taken out: of SCSI disks and drives, MMC and floppy drives.
        drive = self.sysname.startswith(("sd", "sr", "mmcblk", "fd"))
        self.removable = drive and read_attribute(whole_place(base) + "/removable") == "1"
        try:
            entry: bytes | None = read_udev_entry(number, diskseq)
        except OSError:
            entry = None
        self.unready = (
            Reason("udev is not done with it", Reason.UDEV) if entry is None and udev_runs() else Reason()
        )
        self.udev_entry = self.udev_entry if entry is None else entry
        # A disk does not turn into another while its clients look on, even if udev or its database goes.
        if not held or changed:
            if entry is None:
                self.identify_by_sysfs()
            else:
                self.identify_by_udev(parse_udev_database(entry))

    def identify_by_udev(self, properties: dict[str, str]) -> None:
        """Takes what udev found out (its rules 60-persistent-storage.rules and its hardware database)."""
        self.model = properties.get("ID_MODEL_FROM_DATABASE") or properties.get("ID_MODEL") or ""
        self.serial = properties.get("ID_SERIAL_SHORT") or ""
        self.id_serial = properties.get("ID_SERIAL") or ""

    def identify_by_sysfs(self) -> None:
        """Composes model and serial number as udev's rules do it, for want of udev."""
        base = sys_block(self.sysname)

        def joined(text: str) -> str:
            return "_".join(text.split())

        device = base + "/device"
        model = read_attribute(device + "/model") or read_attribute(device + "/name")
        vendor = read_attribute(device + "/vendor")
        self.model = joined(model)
        if serial := read_attribute(base + "/serial"):  # virtio-blk
            self.serial, self.id_serial = "", joined(serial)
        elif serial := read_attribute(device + "/serial"):  # NVMe, MMC
            self.serial = self.id_serial = joined(serial)
            if namespace := read_attribute(base + "/nsid"):
                self.id_serial = f"{self.model}_{self.serial}_{namespace}"
                self.model = model
        elif serial := usb_serial(device):
            self.serial = joined(serial)
            address = os.path.basename(os.path.realpath(device)).split(":")
            self.id_serial = f"{joined(vendor)}_{self.model}_{self.serial}-{':'.join(address[2:])}"
        elif serial := parse_vpd_serial(
            read_vpd(device + "/vpd_pg80")
        ):  # SCSI, and ATA, whose vendor is always "ATA"
            self.serial = joined(serial)
            kind, name = parse_vpd_name(read_vpd(device + "/vpd_pg83"))
            if vendor == "ATA":
                self.id_serial = f"{self.model}_{self.serial}"
            elif kind > 0:
                self.id_serial = f"{kind}{joined(name)}"
            else:
                prefix = "" if kind < 0 else "0"
                self.id_serial = f"{prefix}{joined(vendor)}_{self.model}_{joined(name) or self.serial}"

    def find_relatives(self) -> None:
        # Without its partitions' links a disk is not known either, so udev has to be done with these, too.
        self.parts = []
        for name in partitions_of(self.sysname):
            names, known = names_of(name)
            self.parts.append(names)
            if not known and udev_runs() and not self.unready:
                self.unready = Reason(f"udev is not done with '{device_node(name)}'", Reason.UDEV)
        seen = {self.sysname}
        below, above = (list(stack(self.sysname, direction, seen)) for direction in ("slaves", "holders"))
        self.relatives = [names_of(name)[0] for name in below + above]

    def lock(self, fd: int) -> None:
        # What is on a disc does not change, and udev has to see to the eject button meanwhile.
        if not self.sysname.startswith("sr"):
            super().lock(fd)

    def use(self, usage: Usage) -> str:
        return usage.of(self.sysname)

    def below(self) -> set[str]:
        return below(self.sysname)

    def is_drive(self) -> bool:
        return self.removable and not self.sysname.startswith("sr") and " inode " not in self.tag

    def why_empty(self) -> Reason:
        """Asks a drive for its medium, without closing its tray or spinning it up for long."""
        if not self.removable:
            return Reason()
        optical = read_attribute(sys_block(self.sysname) + "/device/type") == "5"
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if optical else 0)
        try:
            fd = os.open(self.node, flags)
        except OSError as e:
            self.size = 0
            missing = e.errno in (errno.ENOMEDIUM, errno.ENXIO)
            return Reason(NO_MEDIUM, Reason.NO_MEDIUM) if missing else Reason()
        try:
            # sr(4) keeps the size of the last disc in sysfs, or 1 GiB, so the drive itself has to tell.
            if optical and fcntl.ioctl(fd, CDROM_DRIVE_STATUS, 0) not in (CDS_NO_INFO, CDS_DISC_OK):
                self.size = 0
                return Reason(NO_MEDIUM, Reason.NO_MEDIUM)
        except OSError as e:
            debug(f"Failed to ask '{self.node}' for its medium, ignoring: {reason_of(e)}")
        finally:
            os.close(fd)
        return Reason()

    def watch_medium(self) -> None:
        # As udev's 60-block.rules have it where udev runs.
        base = sys_block(self.sysname)
        default = SYS + "module/block/parameters/events_dfl_poll_msecs"
        if read_attribute(base + "/events_poll_msecs") == "-1" and read_attribute(default) == "0":
            try:
                write_attribute(base + "/events_poll_msecs", str(MEDIUM_POLL_MSEC))
            except OSError as e:
                debug(f"Failed to have '{self.node}' watched for a medium, ignoring: {reason_of(e)}")

    def why_ours(self) -> str:
        if is_mapping(self.sysname):
            return "it is an export already"
        why = why_ours(self.sysname)
        return f"it is on {why}" if why else ""

    def is_zoned(self) -> bool:
        return read_attribute(sys_block(self.sysname) + "/queue/zoned") not in ("", "none")

    def vendor(self) -> str:
        found = parse_udev_database(self.udev_entry).get("ID_VENDOR") or read_attribute(
            sys_block(self.sysname) + "/device/vendor"
        )
        # Of ATA disks the kernel tells that they are some; of those on virtio it tells a number.
        return "" if found == "ATA" or found.startswith("0x") else found

    def stable(self) -> str:
        if self.sysname.startswith("dm-"):
            dm = self.place + "/dm"
            return read_attribute(dm + "/uuid") or read_attribute(dm + "/name") or self.node
        # Kept, as is the slot: with 256 disks that saves 7 % of the time to start and 15 % of that to stop.
        if "stable" not in self.cached:
            self.cached["stable"] = (
                read_attribute(self.place + "/wwid")
                or read_attribute(self.place + "/device/wwid")
                or self.location()
            )
        return self.cached["stable"]

    def identity(self) -> str:
        return self.id_serial or self.stable()

    def location(self) -> str:
        if "location" not in self.cached:
            self.cached["location"] = self.slot()
        return self.cached["location"]

    def slot(self) -> str:
        """Names the slot by its device in sysfs."""
        whole = whole_place(self.place)
        device = whole + "/device"
        if not os.path.exists(device):
            return self.node
        # The boot partitions of an eMMC are disks of their own with the same device.
        area = self.sysname.partition("boot")[2] if self.sysname.startswith("mmcblk") else ""
        partition = self.place[len(whole) :].rpartition("/")[2]
        # As realpath() has it, which takes ten times as long: there are no other links on the way.
        path = os.path.normpath(os.path.join(whole, os.readlink(device)))
        return "/".join(filter(None, (path, area, partition)))

    def lasts(self) -> bool:
        # A card reader or dock tells its own, whatever is in it, and USB does not tell these from disks.
        if self.sysname.startswith("dm-"):
            return read_attribute(self.place + "/dm/uuid") != ""
        if self.removable or "/usb" in self.place:
            return False
        return self.id_serial != "" or self.stable() not in (self.node, self.location())


class Image(Disk):
    """A regular file that is a disk to clients. It has sectors of `block` bytes."""

    __slots__ = ()

    def probe(self, *, held: bool = False) -> None:
        st = os.stat(self.node)
        changed = self.set_tag(f"{FILE_TAG}{st.st_dev}:{st.st_ino} {birth_time(self.node) or UNKNOWN}")
        if not held or changed:  # what clients have attached keeps the size of its sectors
            self.block = self.sectors()
        self.size = st.st_size // self.block * self.block
        self.rest = st.st_size - self.size
        self.read_only = not os.access(self.node, os.W_OK)

    def sectors(self) -> int:
        """The size that its sectors have, in bytes. Raises OSError."""
        return image_sectors(self.node)

    def use(self, usage: Usage) -> str:
        return usage.of_file(self.node)

    def why_ours(self) -> str:
        why = why_ours(device_below(self.node))
        return f"it is on {why}" if why else ""

    def identity(self) -> str:
        # Another file may have come under the same path. The file system's number changes with each boot.
        return self.node + self.tag.partition(":")[2]

    def lasts(self) -> bool:
        return not self.tag.endswith(UNKNOWN)


class Source:
    """Where disks come from, and which of them it hands on."""

    named = False  # whether the user has named each of its disks

    def scan(self, known: dict[str, Disk], only: Iterable[str] | None = None) -> list[Disk]:
        """The disks that there are now, in the order in which to look at them.

        With `only` those of these keys, and others if that is simpler. Of those `known` these same objects,
        by key.
        """
        raise NotImplementedError

    def why_not(self, disk: Disk) -> str:
        """Why it leaves a disk out, whoever uses it; empty if it does not."""
        return ""

    def may_write(self) -> bool:
        """Whether there may be a disk that clients can write to although the user has not asked for it."""
        return False

    def news(self, update: Callable[[Iterable[str]], None]) -> list[News]:
        """What it waits for, once disks are exported.

        Calls `update` with the keys of disks to read again.
        """
        return []

    def missing(self) -> list[str]:
        """A sentence, without its full stop, for each thing that was asked for and is not there."""
        return []

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        """What else there is to say, a sentence each without its full stop, of those of its disks."""
        return []

    def interrupted(self, exports: Iterable[Export]) -> None:
        """Called when those of its disks were taken away while clients had some of them attached."""


def stack(sysname: str, direction: str, seen: set[str]) -> Iterator[str]:
    """The block devices below ("slaves") or above ("holders") one, and their partitions or whole disks."""
    near = list_directory(f"{sys_block(sysname)}/{direction}")
    near += partitions_of(sysname) if direction == "holders" else [whole_disk(sysname)]
    for name in near:
        if name and name not in seen and not is_mapping(name):
            seen.add(name)
            yield name
            yield from stack(name, direction, seen)


def partition_properties(sysname: str) -> dict[str, str]:
    """What udev knows of a partition; nothing if it does not."""
    try:
        return parse_udev_database(
            read_udev_entry(*parse_block_uevent(read_page(sys_block(sysname) + "/uevent")))
        )
    except OSError:
        return {}


def names_of(sysname: str) -> tuple[list[str], bool]:
    """Node and links of a block device, and whether udev's database has it."""
    names = [device_node(sysname)]
    if label := read_attribute(sys_block(sysname) + "/dm/name"):
        names.append(f"{DEV}mapper/{label}")
    try:
        entry = read_udev_entry(*parse_block_uevent(read_page(sys_block(sysname) + "/uevent")))
    except OSError:
        return names, False
    return [*names, *links_in(entry)], True


def image_sectors(path: str) -> int:
    """The size of the sectors that an image has, in bytes: 512, or 4096 if that is what its GPT is for.

    The header is in the second sector (UEFI 2.10, 5.3.2). Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = [size for size in (512, 4096) if os.pread(fd, 8, size) == b"EFI PART"]
    finally:
        os.close(fd)
    return 4096 if found == [4096] else 512


# -----------------------------------------------------------------------------------------------------------
# 11. Exports
# -----------------------------------------------------------------------------------------------------------


class Stay:
    """A disk or medium from when it came until it leaves: who it is to clients.

    `number` is its namespace's: unlike the other identities it is part of each command, so that one that
    has waited for a disk never reaches another. `name` is what serial number and NGUID are made from: the
    disk's own serial number, or what stands for that. If an earlier disk had the same name, or would have
    had the same UUID, it is one that this one has as its `own`, and the UUID is made from it, too: a host
    takes no second namespace with a UUID that it knows. `place` is for clients that know small numbers only.
    """

    __slots__ = ("index", "name", "number", "origin", "own", "place")

    def __init__(self, number: int, own: str, origin: str = "", index: int = 0, place: int = -1) -> None:
        self.index = index  # counts them from 0
        self.place = place  # below Stays.PLACES; -1 once all of these are taken
        self.origin = origin  # the digests of name and slot
        self.number = number
        self.own = own
        self.name = own


class Stays:
    """The stays of all disks since the machine was booted, kept in a file.

    A line for each: the namespace's number, then digests of the disk's tag, what its UUID is made from, its
    name, and its slot. No number is given twice. After a reboot a disk has the same one if it can be told
    for sure by its serial number, and else a random one: better to lose a disk than to become another.

    Places are not in the file: each is the first from the number on that no earlier stay has taken.
    """

    PLACES = 255

    def __init__(self, path: str = "", salt: bytes = b"") -> None:
        self.path = path
        self.salt = salt  # the machine's ID
        self.boot = ""
        self.known: dict[str, Stay] = {}  # by the digest of the disk's tag
        self.numbers: set[int] = set()
        self.places: set[int] = set()
        self.taken: set[str] = set()  # what UUIDs are made from, and names
        self.moves: dict[str, int] = {}  # how often a disk of a name was in a slot
        self.awaited: dict[str, tuple[str, str]] = {}  # origin and node, by the digest of the disk's tag
        self.first: set[str] | None = None  # the digests of the tags of the disks that were here first
        self.new: list[str] = []  # lines that are not in the file yet
        self.kept = False  # whether they go there

    def digest(self, *parts: str) -> str:
        return str(sha256(self.salt + utf8("\0".join(parts))).hexdigest()[:32])

    def read(self) -> None:
        self.boot = read_attribute(PROC + "sys/kernel/random/boot_id") or "?"
        try:
            for number, tag, *rest in self.parse(read_bytes(self.path)):
                self.add(int(number), tag, *rest)
            for tag, (origin, node) in self.parse_awaited(read_bytes(self.path + ".awaited")).items():
                self.awaited[tag] = origin, node
        except OSError as e:
            debug(f"No disks are noted in '{e.filename}': {reason_of(e)}")

    @staticmethod
    def parse_awaited(raw: bytes) -> dict[str, tuple[str, str]]:
        """Origin and node by tag. Takes any bytes."""
        fields = [printable(line).split(" ", 2) for line in raw.split(b"\n")[:-1]]
        return {f[0]: (f[1], f[2]) for f in fields if len(f) == 3}

    @staticmethod
    def parse(raw: bytes) -> Iterator[list[str]]:
        """The fields of each line. Takes any bytes."""
        for line in raw.split(b"\n")[:-1]:
            fields = printable(line).split(" ")
            number = fields[0] if len(fields) == 5 else ""
            # int() refuses texts of thousands of digits.
            is_number = number.isascii() and number.isdecimal() and len(number) <= 10
            if is_number and 0 < int(number) <= NSID_MAX:
                yield fields

    def add(self, number: int, tag: str, uuid: str, name: str, slot: str) -> None:
        """Adds a stay after those that are known, or goes on with one."""
        move = name + slot
        if tag in self.known:
            return
        if number in self.numbers:
            if same := [s for s in self.known.values() if s.number == number and s.origin == move]:
                self.known[tag] = same[0]
            return
        self.moves[move] = self.moves.get(move, 0) + 1
        repeated = uuid in self.taken or name in self.taken
        own = self.digest(move, str(self.moves[move])) if repeated else ""
        self.known[tag] = Stay(number, own, move, len(self.numbers), self.free_place(number))
        self.numbers.add(number)
        self.taken |= {uuid, name}

    def free_place(self, number: int) -> int:
        """Takes the first place that is free from where a number leads to; -1 if there is none."""
        candidates = ((number + i) % self.PLACES for i in range(self.PLACES))
        place = next((p for p in candidates if p not in self.places), -1)
        self.places.add(place)
        return place

    def tag_of(self, disk: Disk) -> str:
        """The digest of a disk's tag. Kept, since it is asked for five times at the start."""
        if self.boot not in disk.cached:
            disk.cached[self.boot] = self.digest(self.boot, disk.tag)
        return disk.cached[self.boot]

    def of(self, disk: Disk) -> Stay | None:
        """A disk's stay, if it was begun before."""
        if not self.boot:
            self.read()
        stay = self.known.get(self.tag_of(disk))
        if stay and not stay.name:
            # Cached: while a disk is being unplugged, parts of its sysfs directory are already gone.
            stay.name = disk.id_serial or disk.stable()
        return stay

    def choice(self, name: str, attempt: int = 0) -> int:
        """The number that follows from a name."""
        return 1 + int(self.digest("namespace", name, str(attempt))[:16], 16) % NSID_MAX

    def begin(self, disk: Disk, *, alone: bool) -> Stay | None:
        """A disk's stay. `alone` is whether no other disk that is here would have the same number.

        None once all numbers are taken.
        """
        while not (found := self.of(disk)):
            if len(self.numbers) >= NSID_MAX:
                return None
            tag, name = self.tag_of(disk), self.digest(disk.id_serial or disk.stable())
            slot = self.digest(disk.location())
            number = returned = self.returning(disk, name + slot) if alone else 0
            if not number and alone and name not in self.taken and disk.lasts():
                number = self.choice(disk.identity())
            attempt = 0
            while not number or (number in self.numbers and number != returned):
                number, attempt = self.choice(tag, attempt), attempt + 1
            line = [tag, self.digest(disk.id_serial or disk.node), name, slot]
            self.add(number, *line)
            self.new.append(" ".join((str(number), *line)) + "\n")
        return found

    def returning(self, disk: Disk, origin: str) -> int:
        """The number of the awaited disk that this one is, which came back to its slot; 0 if it is none."""
        tags = [t for t, (wanted, _) in self.awaited.items() if wanted == origin and t in self.known]
        if not tags or not disk.lasts() or self.tag_of(disk) in (self.first or ()):
            return 0
        del self.awaited[tags[0]]
        return self.known[tags[0]].number

    def begin_with(self, disks: Iterable[Disk]) -> None:
        """Takes note of the disks that are here first: none of them returns, nor one whose slot is taken."""
        tags = [self.tag_of(d) for d in disks if self.of(d) or self.awaited]
        slots = {self.digest(d.location()) for d in disks if self.awaited}
        self.first = set(tags)
        self.awaited = {t: a for t, a in self.awaited.items() if t not in tags and a[0][32:] not in slots}

    def forget_awaited(self) -> None:
        """Stops waiting for disks."""
        self.awaited = {}
        try:
            os.unlink(self.path + ".awaited")
        except OSError:
            pass

    def leave(self, disks: Iterable[Disk]) -> None:
        """Notes that these were exported until now: the next run awaits them."""
        if not self.path:
            return
        tags = [(self.tag_of(d), d.node) for d in disks]
        lines = [f"{tag} {self.known[tag].origin} {node}\n" for tag, node in tags if tag in self.known]
        try:
            # Half a line does not count, and no file is one that says nothing.
            fd = os.open(self.path + ".awaited", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, utf8("".join(lines)))
            finally:
                os.close(fd)
        except OSError as e:
            debug(f"Failed to note which disks were exported, ignoring: {reason_of(e)}")

    def note(self) -> None:
        """Notes what is new, before anything of it is exported."""
        lines, self.new = "".join(self.new), []
        if not lines or not self.kept:
            return
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                append(fd, lines.encode())
            finally:
                os.close(fd)
        except OSError as e:
            warning(f"Failed to note the numbers of namespaces in '{self.path}': {reason_of(e)}")


class Export:
    """A disk that is handed out, or could be: with which access, what of it is live, and why it is not.

    One of these tells why it is not exported: `left_out` (nobody could, or should), `waiting` (not yet), and
    by transport, or "" for all of them, `failed` (the kernel refused, until the disk changes).
    """

    __slots__ = (
        "access",
        "backing",
        "disk",
        "failed",
        "fd",
        "left_out",
        "live",
        "reported",
        "source",
        "stay",
        "waiting",
        "waiting_named",
        "waiting_since",
        "wanted",
    )

    def __init__(self, disk: Disk, source: Source) -> None:
        self.disk = disk
        self.source = source
        self.access = DEFAULT_ACCESS
        self.stay: Stay | None = None  # who it is to clients, once that was asked for
        self.fd = -1  # with the disk's lock
        self.left_out = Reason()
        self.waiting = Reason()
        self.waiting_since = 0.0  # in seconds of the monotonic clock; 0 for not waiting
        self.waiting_named = False  # whether it has waited for so long that what it waits for is looked up
        self.failed: dict[str, Reason] = {}
        self.reported: dict[str, str] = {}  # what was said of failures, by transport
        self.live: dict[str, Branch] = {}  # what exports it now, by transport
        self.backing: Branch | None = None  # what is live between it and these
        self.wanted: tuple[object, dict[str, Branch]] | None = None  # the last ones computed, and from what

    @property
    def named(self) -> bool:
        """Whether the user has named it: then the start fails where it cannot be exported."""
        return self.source.named

    @property
    def held(self) -> bool:
        """Whether its lock is ours, as it is as long as it is exported."""
        return self.fd >= 0

    @property
    def why_not(self) -> Reason:
        """Why it is not exported, as far as it is not; empty if nothing is in the way."""
        return self.left_out or next(iter(self.failed.values()), self.waiting)

    def claim(self) -> bool:
        """Takes the disk's lock, once for all transports; False if that has to wait. Raises OSError."""
        if not self.held:
            fd = os.open(self.disk.node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                self.disk.lock(fd)
            except OSError as e:
                os.close(fd)
                if e.errno != errno.EWOULDBLOCK:
                    raise
                # Looked up only once that takes long: the kernel lists all locks there are.
                who = lock_holder(self.disk.node) if self.waiting_named else "another process"
                self.waiting = Reason(f"{who} holds its lock")
                return False
            self.fd = fd
        self.waiting = Reason()
        return True

    def release(self) -> None:
        """Gives the lock back."""
        if self.held:
            os.close(self.fd)
            self.fd = -1

    def leave_out(self, reason: Reason) -> None:
        """Has it not exported, because of the disk itself and not of what the kernel says."""
        self.left_out, self.waiting = reason, Reason()
        self.release()


def lock_holder(path: str) -> str:
    """Who holds a BSD lock on a file, as far as /proc/locks tells."""
    try:
        inode = os.stat(path).st_ino
        lines = printable(read_bytes(PROC + "locks")).split("\n")
    except OSError:
        return "another process"
    for line in lines:
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            name = read_attribute(f"{PROC}{fields[4]}/comm")
            return f"process {fields[4]} ({name})" if name else f"process {fields[4]}"
    return "another process"


def why_unfit(export: Export) -> Reason:
    """Why the kernel could not export a disk at all, whoever asks."""
    disk = export.disk
    # Not of a drive whose medium is exported: to ask opens the way to the next one (see MediumWatch).
    if not (export.held and disk.is_drive()) and (empty := disk.why_empty()):
        return empty
    why = ""
    if disk.size == 0 and disk.rest:
        why = f"it has {disk.rest} bytes, less than one sector of {disk.block}"
    elif disk.size == 0:
        why = "it has size 0"
    elif ours := disk.why_ours():
        why = ours
    elif disk.read_only and export.access == READ_WRITE:
        why = "it is read-only, and was asked for read-write; see --read-only and --snapshot"
    elif export.access != READ_WRITE and disk.is_zoned():
        # dm-flakey lets a reset of a zone pass, which deletes what is in it.
        why = "it is a zoned device, which cannot be protected from clients; see --read-write"
    elif not is_unicode(disk.name):
        why = "its name is not UTF-8, as an NQN has to be; rename it"
    elif not disk.name.isprintable() or not disk.node.isprintable():
        why = "its name has control characters; rename it"
    return Reason(why)


# -----------------------------------------------------------------------------------------------------------
# 12. Which disks there are
# -----------------------------------------------------------------------------------------------------------


class Access:
    """Which disks may be written to, and how.

    What a rule is for may be misspelled, or come later. So as long as a rule that protects has matched
    nothing, all disks that it might be for are read-only: those that no rule before it matches.
    """

    def __init__(self, rules: Sequence[tuple[str, str]] = (), mode: str = "") -> None:
        self.rules = rules
        self.asked = mode
        self.mode = mode or DEFAULT_ACCESS
        self.matched: set[int] = set()  # the rules that have matched a device of this machine at any time

    def may_write(self) -> bool:
        """Whether there may be a disk that clients can write to, now or later."""
        return any(mode != READ_ONLY for mode in (self.mode, *(mode for _, mode in self.rules)))

    def noted(self) -> bytes:
        """All of this as it is kept in a file."""
        return utf8("".join(f"{glob}:{mode}\n" for glob, mode in (*self.rules, ("*", self.mode))))

    def match(self, names: Iterable[str]) -> list[int]:
        """The rules that match one of the names of a device, in their order."""
        from fnmatch import fnmatchcase

        found = [i for i, (glob, _) in enumerate(self.rules) if any(fnmatchcase(n, glob) for n in names)]
        self.matched.update(found)
        return found

    def of(self, disk: Disk) -> str:
        """The mode for a disk: read-only, too, if a rule that has matched nothing may be for it."""
        mode, doubt = self.judge(disk)
        return READ_ONLY if doubt is not None else mode

    def doubt(self, disk: Disk) -> int | None:
        """The first rule that may be for the disk, has matched nothing, and would protect it."""
        return self.judge(disk)[1]

    def judge(self, disk: Disk) -> tuple[str, int | None]:
        """What the rules say of a disk, and the rule that makes this doubtful.

        The first rule counts that matches the disk or one of its partitions. If a partition, or what stands
        above or below the disk, has a rule of its own that protects more, the whole disk is protected so.
        """
        usual = self.asked or disk.usual
        if not self.rules:
            return usual, None
        own = self.match(disk.names)
        parts = [self.match(names) for names in disk.parts]
        relatives = [self.match(names) for names in disk.relatives]
        first = min((found[0] for found in (own, *parts) if found), default=len(self.rules))
        mode = self.rules[first][1] if first < len(self.rules) else usual
        for found in (*parts, *relatives):
            if found and found[0] not in own:
                mode = min(mode, self.rules[found[0]][1], key=ACCESS.index)
        idle = (i for i in range(first) if i not in self.matched)
        return mode, next((i for i in idle if self.protects(i, mode)), None)

    def protects(self, rule: int, mode: str) -> bool:
        return ACCESS.index(self.rules[rule][1]) < ACCESS.index(mode)

    def idle(self, disks: Iterable[Disk]) -> list[str]:
        """A sentence for each rule that has matched nothing so far."""
        found = []
        for i in (i for i in range(len(self.rules)) if i not in self.matched):
            glob, mode = self.rules[i]
            text = f"--access={glob}:{mode} matches no disk"
            text += self.near_miss(glob, disks)
            after = [mode for _, mode in self.rules[i + 1 :]] + [self.mode]
            if any(self.protects(i, other) for other in after):
                text += "; until one does, all that no rule before it matches are read-only"
            found.append(text)
        return found

    @staticmethod
    def near_miss(glob: str, disks: Iterable[Disk]) -> str:
        """What may have been meant, in brackets."""
        from fnmatch import fnmatchcase

        for disk in disks:
            for name in (*disk.names, *(name for part in disk.parts for name in part)):
                if fnmatchcase(name.casefold(), glob.casefold()):
                    return f" (there is '{name}', and case matters)"
        if device := sysname_of_node(glob):
            return f" (it leads to '{device_node(device)}', but udev does not know it; give that)"
        return ""


class BlockDevices(Source):
    """All block devices of this machine that are disks of their own."""

    def scan(self, known: dict[str, Disk], only: Iterable[str] | None = None) -> list[Disk]:
        if only is None:
            names = list_directory(SYS + "block")
        else:
            names = [n for n in only if n in known or os.path.exists(f"{SYS}block/{n}")]
        # Removable drives last: some take seconds to say that they are empty.
        names.sort(key=lambda n: (n.startswith(("fd", "sr")), natural_order(n)))
        return [known.get(n) or self.made(n) for n in names if not is_no_disk(n) and not self.is_path(n)]

    @staticmethod
    def is_path(name: str) -> bool:
        """Whether it is one path of an NVMe multipath disk, without a node."""
        return name.startswith("nvme") and read_attribute(f"{SYS}block/{name}/hidden") == "1"

    @staticmethod
    def made(name: str) -> Disk:
        node = device_node(name)
        return BlockDevice(os.path.basename(node), node, name)

    def why_not(self, disk: Disk) -> str:
        """Whether it is no disk of its own, stacked upon, or not local."""
        if what := NO_DISKS.get(disk.sysname.rstrip("0123456789")):
            return f"it is {what}"
        if is_mapped_partition(disk.sysname):
            whole = list_directory(disk.place + "/slaves")
            if not whole:
                return "it is a partition"
            return f"it is a partition of '{DEV}{whole[0]}'{layer_name(whole[0])}"
        holders = sorted(list_directory(disk.place + "/holders"), key=natural_order)
        if paths := [n for n in holders if is_multipath(n)]:
            return f"it is a path to '{DEV}{paths[0]}'{layer_name(paths[0])}"
        if is_stacked(disk.sysname):
            holders = [n for n in holders if not is_mapping(n) and not is_mapped_partition(n)]
            if holders:
                return f"it is part of '{DEV}{holders[0]}'"
        if why := why_network(disk.sysname, disk.place) or why_looped(whole_place(disk.place)):
            return f"it {why}"
        return ""


class NamedDisks(Source):
    """The block devices and regular files that the user has named."""

    named = True

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def scan(self, known: dict[str, Disk], only: Iterable[str] | None = None) -> list[Disk]:
        found = dict(known)
        for path in self.paths:
            try:
                disk = self.resolve(path)
            except UserError as e:
                debug(str(e))
                continue
            found.setdefault(disk.key, disk)
        return list(found.values())

    @staticmethod
    def resolve(path: str) -> Disk:
        """The disk that a path on the command line stands for. Raises UserError."""
        absolute = os.path.abspath(path)
        try:
            st = os.stat(absolute)
            if stat.S_ISBLK(st.st_mode):
                os.close(os.open(absolute, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            elif stat.S_ISREG(st.st_mode):
                os.close(os.open(absolute, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as e:
            hint = ""
            if e.errno in (errno.ENOMEDIUM, errno.ENXIO):
                hint = "; insert one and start again" if e.errno == errno.ENOMEDIUM else ""
            raise UserError(f"Failed to export '{path}': {reason_of(e)}{hint}") from e
        disk: Disk
        if stat.S_ISBLK(st.st_mode):
            sysname = sysname_of(st.st_rdev)
            if not sysname:
                raise UserError(f"Failed to export '{path}': No such device; its node is left over")
            node = device_node(sysname)
            if not os.path.exists(node):
                node = absolute
            # Named as it was called, so that a link can give it a name that stays.
            disk = BlockDevice(os.path.basename(absolute), node, sysname)
        elif stat.S_ISREG(st.st_mode):
            disk = Image(os.path.basename(absolute), absolute)
            disk.id_serial = path  # what the UUID is made from, as systemd-storagetm has it
        else:
            known = {stat.S_IFDIR: "a directory", stat.S_IFCHR: "a character device"}
            what = known.get(stat.S_IFMT(st.st_mode), "something else")
            raise UserError(f"Failed to export '{path}': it is {what}, no block device or regular file")
        disk.typed = {path, absolute}
        return disk


class Inventory:
    """The disks of this machine, from one source or more, and which of them are to be exported."""

    def __init__(
        self,
        sources: Sequence[Source],
        access: Access | None = None,
        stays: Stays | None = None,
        *,
        force: bool = False,
        stacked: bool = False,
    ) -> None:
        self.sources = sources
        self.access = access or Access()
        self.stays = stays or Stays()
        self.force = force  # also what is in use
        self.stacked = stacked  # what is made of disks, and not these
        self.exports: dict[str, Export] = {}  # by Disk.key

    @property
    def all_named(self) -> bool:
        """Whether there are no disks but those that were named."""
        return all(source.named for source in self.sources)

    def may_write(self) -> bool:
        """Whether there may be a disk that clients can write to, now or later."""
        usual = not self.access.asked and any(source.may_write() for source in self.sources)
        return self.access.may_write() or usual

    def rescan(self) -> None:
        """Reads all disks again."""
        self.look(None)

    def update(self, sysnames: Iterable[str]) -> None:
        """Reads those disks again, and those that are left out for their use, which may have ended."""
        again = set(sysnames)
        if self.access.rules:
            again.update(filter(None, map(whole_disk, sysnames)))
        again.update(key for key, export in self.exports.items() if export.left_out.passing)
        self.look(again)

    def look(self, only: set[str] | None) -> None:
        """Reads the disks of these keys again, or all."""
        usage = self.usage()
        for source in self.sources:
            mine = {k: e.disk for k, e in self.exports.items() if e.source is source}
            found = source.scan(mine, only)
            for key in mine.keys() - {disk.key for disk in found}:
                if only is None or key in only:
                    self.forget(key)
            for disk in found:
                # What two sources have is the first one's.
                if (known := self.exports.get(disk.key)) is None or known.source is source:
                    self.examine(disk, source, usage)
        self.settle(usage)
        self.untangle()

    def untangle(self) -> None:
        """Leaves out what is made of disks that are exported, or these disks.

        Otherwise clients would see the same data twice, assemble the parts once more, and write to both.
        What is exported already stays, and so does what was named.
        """
        free = {k: e for k, e in self.exports.items() if not (e.left_out or e.named)}
        for upper in [export for key, export in free.items() if is_stacked(key)]:
            for lower in [free[k] for k in sorted(upper.disk.below(), key=natural_order) if k in free]:
                if lower.left_out or upper.left_out or (upper.held and lower.held):
                    continue
                if lower.held or (not upper.held and not self.stacked):
                    out, why = upper, f"it is made of '{lower.disk.node}', which is exported; see --stacked"
                else:
                    name = f"'{upper.disk.node}'{layer_name(upper.disk.sysname)}"
                    out, why = lower, f"{name}, which is made of it, is exported"
                out.leave_out(Reason(why, Reason.LAYERED))

    def settle(self, usage: Usage | None) -> None:
        """Gives each disk the access that the rules ask for, now that it is known what they match."""
        access = self.access
        if len(access.matched) < len(access.rules):
            # A rule may be for a disk that is not exported, and then says nothing of others.
            for disk in BlockDevices().scan({}):
                if disk.key in self.exports:
                    continue
                try:
                    disk.probe()
                except OSError as e:
                    debug(f"Failed to look at '{disk.node}', ignoring: {reason_of(e)}")
                    continue
                disk.find_relatives()
                access.of(disk)
        for export in list(self.exports.values()):
            if not export.held and export.access != access.of(export.disk):
                self.examine(export.disk, export.source, usage)

    def check_rules(self) -> None:
        """Raises UserError for a rule that cannot match anything here."""
        for i, (glob, mode) in enumerate(self.access.rules):
            if i not in self.access.matched and glob.startswith(DEV + "disk/") and not udev_runs():
                device = sysname_of_node(glob)
                instead = f"--access={device_node(device)}:{mode}" if device else "see --list-devices"
                raise UserError(
                    f"--access={glob}:{mode} cannot match, since udev, which knows the links below "
                    f"'{DEV}disk', does not run here; name the disk by its node, serial number or model: "
                    f"{instead}"
                )

    def missing(self) -> list[str]:
        """A sentence for each disk that was asked for and is not there."""
        return [text for source in self.sources for text in source.missing()]

    def idle_rules(self) -> list[str]:
        """A sentence for each rule that has matched nothing so far."""
        return self.access.idle(export.disk for export in self.exports.values())

    def undecided(self, export: Export, now: float) -> str:
        """The node of another disk that udev is not done with, if the access of this one depends on it."""
        if self.access.doubt(export.disk) is None:
            return ""
        for other in self.exports.values():
            since = now - (other.waiting_since or now)
            if other is not export and other.waiting.kind == Reason.UDEV and since < UDEV_WAIT_SEC:
                return other.disk.node
        return ""

    def usage(self) -> Usage | None:
        try:
            return Usage()
        except OSError as e:
            warning(f"Failed to find out which disks are in use: {reason_of(e)}; all are left out")
            return None

    def check_named(self) -> None:
        """Takes stock of the disks that were named, before anything is exported. Raises UserError."""
        usage = self.usage()
        for source in self.sources:
            if isinstance(source, NamedDisks):
                by_name = self.take_named(source)
                self.settle(usage)
                for name, path in by_name.items():
                    self.check_fit(path, name, usage)
                source.paths = list(by_name.values())

    def take_named(self, source: NamedDisks) -> dict[str, str]:
        """Paths by name, without those that are named twice."""
        by_name: dict[str, str] = {}
        for path in source.paths:
            export = Export(source.resolve(path), source)
            disk = export.disk
            try:
                self.probe(export)
            except OSError as e:
                raise UserError(f"Failed to export '{disk.node}': {reason_of(e)}") from e
            if same := [e.disk for e in self.exports.values() if e.disk.tag == disk.tag]:
                warning(f"'{path}' is the same as '{same[0].node}', exporting it once")
                same[0].typed |= disk.typed
                continue
            if disk.name in by_name:
                raise UserError(
                    f"Failed to export '{path}': its NQN would be that of '{by_name[disk.name]}', which "
                    "has the same name; rename one of them"
                )
            by_name[disk.name] = path
            self.exports[disk.key] = export
        return by_name

    def check_fit(self, path: str, name: str, usage: Usage | None) -> None:
        """Raises UserError if a disk that was named cannot be exported."""
        export = next(e for e in self.exports.values() if e.named and e.disk.name == name)
        disk = export.disk
        export.access = self.access.of(disk)
        if why := why_unfit(export):
            text = NO_MEDIUM_NAMED if why.kind == Reason.NO_MEDIUM else why
            raise UserError(f"Failed to export '{path}': {text}")
        if disk.rest:
            warning(
                f"The last {disk.rest} bytes of '{path}' are not exported, "
                f"since they are no whole sector ({disk.block} bytes)"
            )
        if why := self.why_used(disk, usage):
            raise UserError(f"Failed to export '{path}': {why}; stop that use first, or give --force")
        for key in sorted(disk.below() & self.exports.keys()):
            raise UserError(
                f"Failed to export '{path}': its data is on '{self.exports[key].disk.node}', "
                "which is named, too; name one of them"
            )

    def why_used(self, disk: Disk, usage: Usage | None) -> Reason:
        # Two machines that have a home directory mounted destroy it, so nobody is asked for that by the way.
        if self.force and not disk.home:
            return Reason()
        if usage is None:
            return Reason("its use by the running system cannot be determined", Reason.IN_USE)
        use = disk.use(usage)
        return Reason(f"it is in use: {use}", Reason.IN_USE) if use else Reason()

    def probe(self, export: Export) -> None:
        """Reads a disk again. Raises OSError if it has gone meanwhile."""
        disk, tag = export.disk, export.disk.tag
        disk.probe(held=export.held)
        if disk.tag != tag:
            export.stay = None
            export.release()  # the lock belongs to the disk that was here before
        if export.stay is None:
            export.stay = self.stays.of(disk)
        if not export.held:  # once exported, a disk keeps the access that its clients have seen
            self.decide(export)
        export.waiting = disk.unready

    def decide(self, export: Export) -> None:
        """Sets the access of a disk by the rules."""
        if self.access.rules:
            export.disk.find_relatives()
        export.access = self.access.of(export.disk)

    def examine(self, disk: Disk, source: Source, usage: Usage | None) -> None:
        """Reads one disk again and decides whether it is exported; forgets it if it is gone."""
        export = self.exports.get(disk.key) or Export(disk, source)
        before = disk.fingerprint()
        try:
            self.probe(export)
        except OSError as e:
            debug(f"Failed to look at '{disk.node}', forgetting it: {reason_of(e)}")
            self.forget(disk.key)
            return
        self.exports[disk.key] = export
        if disk.fingerprint() != before:
            export.failed.clear()
        if export.held:
            # What is exported stays so even if the system begins to use it: clients are writing to it.
            why = why_unfit(export) if disk.removable or disk.size == 0 else Reason()
            export.waiting = Reason()
        else:
            why = Reason(source.why_not(disk)) or why_unfit(export) or self.why_used(disk, usage)
        export.left_out = why
        if why:
            export.leave_out(why)

    def forget(self, key: str) -> None:
        if export := self.exports.pop(key, None):
            export.release()

    def begin_stays(self, exports: Iterable[Export]) -> None:
        """Decides who those disks are to clients."""
        new = [e for e in exports if e.stay is None]
        counts: dict[int, int] = {}
        for disk in [e.disk for e in self.exports.values()] if new else ():
            if disk.id_serial:
                number = self.stays.choice(disk.identity())
                counts[number] = counts.get(number, 0) + 1

        def is_alone(disk: Disk) -> bool:
            return not disk.id_serial or counts[self.stays.choice(disk.identity())] == 1

        # In the same order after each boot; before those with random numbers, which may be anybody's.
        new.sort(key=lambda e: (not (e.disk.lasts() and is_alone(e.disk)), e.disk.identity()))
        for export in new:
            export.stay = self.stays.begin(export.disk, alone=is_alone(export.disk))
            if export.stay is None:
                why = "this machine has seen more disks than there are namespaces; boot it again"
                export.leave_out(Reason(why))
        if new:
            self.stays.note()

    def candidates(self, kind: str = "") -> list[Export]:
        """The disks that are to be exported, or are being waited for, in the order to show them.

        And with a `kind` of reasons, those that are left out for these.
        """
        found = [e for e in self.exports.values() if not e.left_out or (kind and e.left_out.kind == kind)]
        return sorted(found, key=lambda e: natural_order(e.disk.name))


# -----------------------------------------------------------------------------------------------------------
# 13. Addresses and news
# -----------------------------------------------------------------------------------------------------------


HARDWARE = 0  # what is behind an interface
SOFTWARE = 1
BRIDGE_PORT = 2


class News:
    """Something that the service waits for."""

    def wants(self) -> tuple[int, int]:
        """The descriptor to wait at, -1 for none, and for which of poll(2)'s events."""
        return -1, 0

    def due(self) -> float | None:
        """When to act whatever comes, in seconds of the monotonic clock; None for never."""
        return None

    def act(self) -> bool:
        """Takes what has come; True if exports have to be looked at again."""
        return False


class Incoming(News):
    """Something that comes in at a socket, or at one of several, and what takes it, as act() does."""

    def __init__(self, where: socket.socket | select.epoll, take: Callable[[], bool]) -> None:
        self.where = where
        self.take = take

    def wants(self) -> tuple[int, int]:
        return self.where.fileno(), select.POLLIN

    def act(self) -> bool:
        return self.take()


def attend(news: Sequence[News]) -> Iterator[News]:
    """Waits until some of them have to act, and yields those, each as soon as the one before has acted."""
    poll = select.poll()
    masks: dict[int, int] = {}
    waiting = [(each, *each.wants()) for each in news]
    for _, fd, events in waiting:
        if fd >= 0:
            masks[fd] = masks.get(fd, 0) | events
            poll.register(fd, masks[fd])
    deadlines = [due for each in news if (due := each.due()) is not None]
    timeout = max(0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None
    ready = {fd for fd, _ in poll.poll(timeout)}
    now = time.monotonic()
    for each, fd, _ in waiting:
        # What others have done meanwhile may be what it waits for.
        if fd in ready or ((due := each.due()) is not None and due <= now):
            yield each


class Address:
    """An address that another machine can use, `interface` being this machine's name of where it is.

    `kind` is HARDWARE, SOFTWARE or BRIDGE_PORT.
    """

    __slots__ = ("family", "interface", "kind", "link_local", "text")

    def __init__(self, family: int, text: str, interface: str, link_local: bool) -> None:
        self.family = family
        self.text = text
        self.interface = interface
        self.link_local = link_local
        self.kind = HARDWARE

    def rank(self) -> tuple[int, bool, bool, str, str]:
        """Interfaces with hardware first; on either kind IPv4, then global IPv6, then link-local IPv6."""
        return self.kind, self.family == AF_INET6, self.link_local, self.interface, self.text

    @property
    def scoped(self) -> str:
        """It as something listens there: a link-local IPv6 address is one only on its interface."""
        return f"{self.text}%{self.interface}" if self.link_local and self.family == AF_INET6 else self.text


class Listening:
    """Where alone clients may come in: `words` are addresses and interfaces, `port` a TCP port, 0 for none.

    0.0.0.0 stands for itself. A socket at [::] takes connections over IPv4, too, at the same TCP port; so ::
    stands for each IPv6 address that other machines can use.
    """

    ALL = ("0.0.0.0", "::")

    def __init__(self, words: Sequence[str] = (), port: int = 0) -> None:
        self.words = words or self.ALL
        self.port = port
        self.missing: list[str] = []  # the words that stood for nothing when last looked at

    def places(self, addresses: Sequence[Address]) -> list[str]:
        """Where to listen now, of all addresses that there are."""
        found: dict[str, None] = {}
        self.missing = []
        for word in self.words:
            meant = [word] if word == "0.0.0.0" else [a.scoped for a in addresses if self.means(word, a)]
            # All that is missing with :: is IPv6.
            self.missing += [word] if not meant and word != "::" else []
            found.update(dict.fromkeys(meant))
        return [text for text in found if text == "0.0.0.0" or ":" in text or "0.0.0.0" not in found]

    @staticmethod
    def means(word: str, address: Address) -> bool:
        """Whether a word stands for an address."""
        if word == "::":
            return address.family == AF_INET6 and not is_loopback(address.text)
        return word in (address.text, address.interface, f"{address.text}%{address.interface}")

    @staticmethod
    def reachable(places: Container[str], addresses: Iterable[Address]) -> list[Address]:
        """Those of the addresses at which something listens."""
        return [a for a in addresses if a.scoped in places or (a.family == AF_INET and "0.0.0.0" in places)]


def is_loopback(text: str) -> bool:
    """Whether nobody but this machine has an address."""
    return text == "::1" or text.startswith("127.")


def parse_listen(text: str) -> str:
    """An address as the kernel writes it, or an interface's possible name; empty for what is neither."""
    address, percent, interface = text.partition("%")
    for family in (AF_INET, AF_INET6):
        try:
            plain = socket.inet_ntop(family, socket.inet_pton(family, address))
        except (OSError, ValueError):
            continue
        if not percent:
            return plain
        return f"{plain}%{interface}" if family == AF_INET6 and is_interface_name(interface) else ""
    return text if is_interface_name(text) else ""


def is_interface_name(text: str) -> bool:
    """Whether an interface may be called so (dev_valid_name() in net/core/dev.c)."""
    fits = text not in ("", ".", "..") and len(utf8(text)) < 16
    return fits and text.isprintable() and not any(c in "/:%" or c.isspace() for c in text)


class Instruction:
    """What to type on another machine to attach disks from an address of this one."""

    __slots__ = (
        *("address", "before", "brief", "command", "disk", "exposes", "interface", "kind", "mark"),
        *("more", "note", "secrets", "transport"),
    )

    def __init__(
        self,
        at: Address,
        command: str,
        more: Sequence[str] = (),
        *,
        note: str = "",
        brief: str = "",
        disk: str = "",
        secrets: Sequence[str] = (),
        before: Sequence[Sequence[str]] = (),
        mark: str = "\\",
    ) -> None:
        self.address = at.text
        self.interface = at.interface
        self.kind = at.kind
        self.command = command
        self.more = list(more)  # further operands, each of which may be on a line of its own
        self.note = note  # what to say of it
        self.brief = brief  # another command that attaches all disks, if that may be shorter
        self.disk = disk  # the key of the only one that it attaches; empty for all
        self.secrets = list(secrets)  # further operands, for a screen and nothing else
        self.before = list(
            before
        )  # commands to type before, in parts, with secrets in them: for a screen, too
        self.exposes = self.confidential  # whether others can see the secrets while it runs
        self.mark = mark  # by which a line goes on in the next one
        self.transport = ""  # the name of the one that it is for

    @property
    def line(self) -> str:
        """All of it that anybody may see."""
        hidden = [f"{option.partition(' ')[0]} SECRET" for option in self.secrets]
        return " ".join([self.command, *self.more, *hidden])

    @property
    def confidential(self) -> bool:
        """Whether a screen shows more of it."""
        return bool(self.secrets or self.before)

    def shown(self, width: int) -> list[tuple[str, str]]:
        """Lines and their styles, as a screen of so many columns has them."""
        commands = [*self.before, [self.command, *self.more, *self.secrets]]
        return [("command", line) for parts in commands for line in folded(parts, width, self.mark)]


def folded(parts: Sequence[str], width: int, mark: str = "\\") -> list[str]:
    """A command in as many lines as its parts need, with the shell's sign for that: it can be pasted."""
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 2 < width:
            lines[-1] += f" {part}"
        else:
            lines[-1] += f" {mark}"
            lines.append(f"    {part}")
    return lines


class Way:
    """How clients come in by a transport now, in words.

    `where` is what the numbers end with; empty if there is nothing to say of it at all. If nobody can come
    in, `shut` says why, `effect` what follows from that, and `remedy` what to do. `hint` says how to come in
    where no command is needed.
    """

    __slots__ = ("effect", "hint", "remedy", "shut", "where")

    def __init__(
        self, where: str, shut: str = "", effect: str = "", remedy: str = "", *, hint: str = ""
    ) -> None:
        self.where = where
        self.hint = hint
        self.shut = shut
        self.effect = effect
        self.remedy = remedy

    def about(self, more: str) -> str:
        """Why nobody can come in, as a sentence with `more` behind it."""
        return f"{self.shut[:1].upper()}{self.shut[1:]}: {more}"


def interface_kind(name: str, depth: int = 0) -> int:
    """Whether packets from other machines can come in at an interface, as far as sysfs tells.

    That is, whether it is an adapter, or a bond, bridge, VLAN or the like with an adapter below. A port of a
    bridge or bond hands all of them over to that.
    """
    base = f"{SYS}class/net/{name}"
    if depth == 0 and os.path.exists(base + "/master") and device_type(base + "/master") != "vrf":
        return BRIDGE_PORT
    if os.path.exists(base + "/device"):
        return HARDWARE
    if depth < 8 and device_type(base) not in ("vxlan", "geneve"):
        for entry in list_directory(base):
            if entry.startswith("lower_") and interface_kind(entry[6:], depth + 1) == HARDWARE:
                return HARDWARE
    return SOFTWARE


def device_type(base: str) -> str:
    """What kind of virtual interface it is ("bridge", "bond", "vlan", ...); empty for an adapter."""
    return read_assignments(base + "/uevent").get("DEVTYPE", "")


def parse_messages(raw: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and body of each netlink message. Takes any bytes: what is cut off is left out."""
    size = ctypes.sizeof(nlmsghdr)
    offset = 0
    while offset + size <= len(raw):
        header = nlmsghdr.from_buffer_copy(raw, offset)
        length = header.nlmsg_len
        if length < size or offset + length > len(raw):
            return
        yield header.nlmsg_type, header.nlmsg_flags, raw[offset + size : offset + length]
        offset += (length + 3) & ~3


def parse_attributes(raw: bytes) -> dict[int, bytes]:
    """The attributes after a message's body. Takes any bytes."""
    size = ctypes.sizeof(rtattr)
    found = {}
    offset = 0
    while offset + size <= len(raw):
        header = rtattr.from_buffer_copy(raw, offset)
        if header.rta_len < size or offset + header.rta_len > len(raw):
            break
        found[header.rta_type & NLA_TYPE_MASK] = raw[offset + size : offset + header.rta_len]
        offset += (header.rta_len + 3) & ~3
    return found


def parse_link(body: bytes) -> tuple[int, int, str] | None:
    """Index, flags and name of an RTM_NEWLINK message's interface. Takes any bytes."""
    size = ctypes.sizeof(ifinfomsg)
    if len(body) < size:
        return None
    message = ifinfomsg.from_buffer_copy(body)
    name = parse_attributes(body[size:]).get(IFLA_IFNAME, b"")
    return message.ifi_index, message.ifi_flags, printable(name.rstrip(b"\0"))


def parse_address(body: bytes, *, idle: bool = False) -> tuple[int, Address] | None:
    """Interface index and address of RTM_NEWADDR, if another machine can use it. Takes any bytes.

    With `idle`, if anything can be done at it.
    """
    size = ctypes.sizeof(ifaddrmsg)
    if len(body) < size:
        return None
    message = ifaddrmsg.from_buffer_copy(body)
    attributes = parse_attributes(body[size:])
    # The header has room for the first 8 flags only, and carries no others.
    flags = int.from_bytes(attributes.get(IFA_FLAGS, b""), sys.byteorder) or message.ifa_flags
    if flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED):
        return None
    if not idle and (flags & IFA_F_DEPRECATED or message.ifa_scope >= RT_SCOPE_HOST):
        return None
    # On a point-to-point link IFA_ADDRESS is the other end's.
    raw = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS, b"")
    if len(raw) != {AF_INET: 4, AF_INET6: 16}.get(message.ifa_family):
        return None
    text = socket.inet_ntop(message.ifa_family, raw)
    return message.ifa_index, Address(message.ifa_family, text, "", message.ifa_scope == RT_SCOPE_LINK)


class Network:
    """This machine's addresses, and word of their changes (rtnetlink(7))."""

    def __init__(self) -> None:
        self.socket = socket.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE)
        self.socket.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))

    def changed(self) -> bool:
        """Takes all pending messages. They only say *that* something changed: what, is read anew."""
        return bool(drain(self.socket))

    def held(self) -> list[Address]:
        """All addresses at which something can listen. Raises OSError.

        Also where no cable is plugged in just now, and those that this machine no longer prefers: who came
        in there stays.
        """
        return self.addresses(idle=True)

    def addresses(self, *, idle: bool = False) -> list[Address]:
        """All usable addresses, in the order to show them; with `idle`, see held(). Raises OSError."""
        # A dump that was interrupted by a change is repeated; if eight in a row were, the last one is used.
        for _ in range(8):
            links, settled = self.dump(RTM_GETLINK, ifinfomsg())
            bodies, settled_too = self.dump(RTM_GETADDR, ifaddrmsg())
            if settled and settled_too:
                break
        names = {}
        for kind, body in links:
            link = parse_link(body) if kind == RTM_NEWLINK else None
            used = link and link[1] & IFF_UP and link[1] & IFF_RUNNING and not link[1] & IFF_LOOPBACK
            if link and (used or idle):
                names[link[0]] = link[2]
        found = []
        kinds = {name: interface_kind(name) for name in names.values()}
        for kind, body in bodies:
            parsed = parse_address(body, idle=idle) if kind == RTM_NEWADDR else None
            if parsed and parsed[0] in names:
                index, address = parsed
                address.interface = names[index]
                address.kind = kinds[address.interface]
                # A bridge answers for the IPv4 addresses of its ports, too, but not for IPv6.
                if address.kind != BRIDGE_PORT or address.family == AF_INET or idle:
                    found.append(address)
        return sorted(found, key=Address.rank)

    @staticmethod
    def dump(
        kind: int, body: ctypes.Structure, protocol: int = NETLINK_ROUTE
    ) -> tuple[list[tuple[int, bytes]], bool]:
        """All messages that answer a dump request, and whether they fit together (NLM_F_DUMP_INTR)."""
        found: list[tuple[int, bytes]] = []
        consistent = True
        header = nlmsghdr(
            ctypes.sizeof(nlmsghdr) + ctypes.sizeof(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0
        )
        s = socket.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
        try:
            s.settimeout(5)
            s.connect((0, 0))
            s.send(bytes(header) + bytes(body))
            while True:
                for answer, flags, content in parse_messages(s.recv(65536)):
                    consistent = consistent and not flags & NLM_F_DUMP_INTR
                    if answer == NLMSG_DONE:
                        return found, consistent
                    if answer == NLMSG_ERROR:
                        number = -int.from_bytes(content[:4], sys.byteorder, signed=True)
                        raise OSError(number, os.strerror(number))
                    found.append((answer, content))
        finally:
            s.close()


def filters_input() -> bool:
    """Whether this machine has rules for packets that come in, which may keep clients out.

    What the rules say, only the firewall's own tools could tell.
    """
    for name in ("ip_tables_names", "ip6_tables_names"):
        if "filter" in read_attribute(f"{PROC}net/{name}").split():
            return True
    if not os.path.isdir(SYS + "module/nf_tables"):
        return False  # and to ask would load it
    try:
        chains, _ = Network.dump(NFT_MSG_GETCHAIN, nfgenmsg(), NETLINK_NETFILTER)
    except OSError as e:
        debug(f"Failed to ask for packet filters, ignoring: {reason_of(e)}")
        return False
    return any(kind == NFT_MSG_NEWCHAIN and is_input_filter(body) for kind, body in chains)


def is_input_filter(body: bytes) -> bool:
    """Whether an NFT_MSG_NEWCHAIN message is about a chain that may drop what comes in. Takes any bytes."""
    if body[:1] not in (b"\x01", b"\x02", b"\x0a"):  # NFPROTO_INET, _IPV4 and _IPV6
        return False
    attributes = parse_attributes(body[ctypes.sizeof(nfgenmsg) :])

    def number(raw: bytes) -> int:
        return int.from_bytes(raw, "big") if len(raw) == 4 else -1

    hook = parse_attributes(attributes.get(NFTA_CHAIN_HOOK, b""))
    return number(hook.get(NFTA_HOOK_HOOKNUM, b"")) == NF_INET_LOCAL_IN and (
        number(attributes.get(NFTA_CHAIN_POLICY, b"")) == NF_DROP
        or number(attributes.get(NFTA_CHAIN_USE, b"")) > 0  # the number of its rules
    )


def drain(s: socket.socket) -> list[bytes]:
    """All datagrams pending on a netlink socket; an empty one stands for those that were lost (ENOBUFS)."""
    found: list[bytes] = []
    while True:
        try:
            data, sender = s.recvfrom(65536)
        except BlockingIOError:
            return found
        except OSError as e:
            if e.errno != errno.ENOBUFS:
                raise
            found.append(b"")
            continue
        # Multicast needs privileges; a unicast message could come from anyone, and is ignored.
        if sender[1] != 0:
            found.append(data)


def parse_uevent(raw: bytes, subsystem: str = "block") -> str:
    """The name of the device that a uevent is about; empty if it is in another subsystem. Takes any bytes.

    Either the kernel's (lib/kobject_uevent.c) or udev's, which has a header in front (systemd's
    device-monitor.c) that says at which offset the properties begin, in the machine's byte order. Of a
    disk that is being taken away it is the number, as MAJOR:MINOR; see is_going().
    """
    if raw.startswith(UDEV_MONITOR_MAGIC):
        start = int.from_bytes(raw[16:20], sys.byteorder)
        raw = raw[start:] if 40 <= start < len(raw) else b""
    properties = raw.split(b"\0")
    going = subsystem == "block" and b"SUBSYSTEM=bdi" in properties and b"ACTION=remove" in properties
    if b"SUBSYSTEM=" + subsystem.encode() not in properties and not going:
        return ""
    for line in properties:
        if line.startswith(b"DEVPATH="):
            name = os.fsdecode(line[line.rfind(b"/") + 1 :]) if b"/" in line else ""
            # File systems have backing devices, too: those without a disk under names, or major number 0.
            return name if not going or is_device_number(name) else ""
    return ""


def is_device_number(text: str) -> bool:
    """Whether this is MAJOR:MINOR, with no more digits than the kernel's numbers have."""
    major, _, minor = text.partition(":")
    return text.isascii() and all(part.isdecimal() and len(part) < 8 for part in (major, minor))


class Connection:
    """A connection to one of our TCP ports: the other end, and what is known of its encryption.

    `encrypted` is None if nobody knows.
    """

    __slots__ = ("address", "cipher", "encrypted", "port")

    def __init__(self, address: str, port: int, *, encrypted: bool | None = None, cipher: str = "") -> None:
        self.address = address.removeprefix("::ffff:") if "." in address else address
        self.port = port
        self.encrypted = encrypted
        self.cipher = cipher


def parse_sockets(raw: bytes, ports: Container[int]) -> list[Connection]:
    """All connections to these ports in /proc/net/tcp and tcp6 (proc(5)). Takes any bytes."""
    found = []
    for line in raw.split(b"\n"):
        fields = line.split()
        if len(fields) < 4 or fields[3] != b"01":  # TCP_ESTABLISHED
            continue
        try:
            if int(fields[1].rpartition(b":")[2], 16) not in ports:
                continue
            digits, _, port = fields[2].rpartition(b":")
            words = [int(digits[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(digits), 8)]
            address = socket.inet_ntop(AF_INET6 if len(words) == 4 else AF_INET, b"".join(words))
            found.append(Connection(address, int(port, 16)))
        except (ValueError, OverflowError):
            pass
    return found


TLS_CIPHERS = {51: "AES-128-GCM", 52: "AES-256-GCM", 53: "AES-128-CCM", 54: "ChaCha20-Poly1305"}  # tls.h


def parse_connection(body: bytes, ports: Container[int]) -> Connection | None:
    """What an answer of sock_diag(7) tells of a connection to one of these ports. Takes any bytes."""
    size = ctypes.sizeof(inet_diag_msg)
    if len(body) < size:
        return None
    message = inet_diag_msg.from_buffer_copy(body)
    length = {AF_INET: 4, AF_INET6: 16}.get(message.idiag_family, 0)
    if not length or message.idiag_state != TCP_ESTABLISHED:
        return None
    if int.from_bytes(message.id.idiag_sport, "big") not in ports:
        return None
    address = socket.inet_ntop(message.idiag_family, bytes(message.id.idiag_dst)[:length])
    port = int.from_bytes(message.id.idiag_dport, "big")
    attributes = parse_attributes(body[size:])
    upper = parse_attributes(attributes.get(INET_DIAG_ULP_INFO, b""))
    facts = {
        kind: int.from_bytes(raw, sys.byteorder)
        for kind, raw in parse_attributes(upper.get(INET_ULP_INFO_TLS, b"")).items()
    }
    # Until it has keys, TLS hands through what it gets.
    both = (facts.get(TLS_INFO_RXCONF, TLS_CONF_BASE), facts.get(TLS_INFO_TXCONF, TLS_CONF_BASE))
    encrypted = all(conf > TLS_CONF_BASE for conf in both)
    if not encrypted and INET_DIAG_MARK not in attributes:
        return Connection(address, port)  # whoever lacks CAP_NET_ADMIN is told neither
    version = {0x303: "TLS 1.2", 0x304: "TLS 1.3"}.get(facts.get(TLS_INFO_VERSION, 0), "")
    cipher = TLS_CIPHERS.get(facts.get(TLS_INFO_CIPHER, 0), "")
    return Connection(
        address, port, encrypted=encrypted, cipher=", ".join(filter(None, (version, cipher))) * encrypted
    )


class Clients(News):
    """Who is attached by TCP, and word of connections that end (sock_diag(7)).

    The kernel tells nobody of connections that begin. But who is turned away ends one. Calls `outdate`.
    """

    def __init__(self, outdate: Callable[[], None]) -> None:
        self.outdate = outdate
        self.socket = socket.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_SOCK_DIAG)
        groups = 1 << (SKNLGRP_INET_TCP_DESTROY - 1) | 1 << (SKNLGRP_INET6_TCP_DESTROY - 1)
        try:
            self.socket.bind((0, groups))
        except OSError as e:
            debug(f"Failed to listen to the ends of connections, ignoring: {reason_of(e)}")

    def wants(self) -> tuple[int, int]:
        return self.socket.fileno(), select.POLLIN

    def act(self) -> bool:
        if drain(self.socket):
            self.outdate()
        return False

    dump = staticmethod(Network.dump)
    knows = True  # whether the kernel has sock_diag(7), for which it looks for modules each time

    @classmethod
    def connections(cls, ports: Container[int]) -> list[Connection]:
        """All connections to these TCP ports. Raises OSError."""
        if cls.knows:
            try:
                return [found for family in (AF_INET, AF_INET6) for found in cls.ask(family, ports)]
            except OSError as e:
                cls.knows = False
                debug(f"Failed to ask for connections, reading '{PROC}net' instead: {reason_of(e)}")
        found = []
        for name in ("tcp", "tcp6"):
            try:
                found += parse_sockets(read_bytes(f"{PROC}net/{name}"), ports)
            except FileNotFoundError:
                if name == "tcp":  # without IPv6, the other one is missing
                    raise
        return found

    @classmethod
    def ask(cls, family: int, ports: Container[int]) -> list[Connection]:
        # With the statistics, which are not needed, comes what is above TCP (inet_sk_diag_fill()).
        more = 1 << (INET_DIAG_INFO - 1)
        request = inet_diag_req_v2(family, IPPROTO_TCP, more, idiag_states=1 << TCP_ESTABLISHED)
        answers, _ = cls.dump(SOCK_DIAG_BY_FAMILY, request, NETLINK_SOCK_DIAG)
        parsed = [parse_connection(body, ports) for kind, body in answers if kind == SOCK_DIAG_BY_FAMILY]
        return [connection for connection in parsed if connection]


class Uevents:
    """Word of block devices, or others, that come, go and change."""

    def __init__(self, subsystem: str = "block") -> None:
        self.subsystem = subsystem
        self.socket = socket.socket(
            AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT
        )
        try:
            self.socket.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        except OSError as e:
            debug(f"Failed to enlarge the receive buffer for uevents, ignoring: {reason_of(e)}")
        # From udev comes word that a new disk's database entry is there. But while a disk's lock is held,
        # udev puts its events off, so changes of size and medium come from the kernel.
        self.socket.bind((0, UEVENT_GROUP_KERNEL | UEVENT_GROUP_UDEV))

    def changed(self) -> set[str] | None:
        """The names of devices with news; None if messages were lost and all have to be read again."""
        names = set()
        for message in drain(self.socket):
            if not message:
                return None
            name = parse_uevent(message, self.subsystem)
            if is_device_number(name):
                major, minor = map(int, name.split(":"))
                name = sysname_of(os.makedev(major, minor))
            if name:
                names.add(name)
        return names


# -----------------------------------------------------------------------------------------------------------
# 14. Home directories
# -----------------------------------------------------------------------------------------------------------


# A home directory of systemd-homed in LUKS storage is a disk of its own: a GUID partition table with one
# partition of a type for that, in it LUKS2, in it the file system (systemd: "Home Directories"). Mostly it
# is a file, /home/NAME.home. While it is active, systemd-homed holds the file's BSD lock.

HOME_DIRECTORY = "/home"
HOME_RECORDS = "/var/lib/systemd/home"
HOME_TYPE = "773f91ef-66d4-49b5-bd83-d683bf40ad16"
HOME_TYPE_RAW = bytes.fromhex("ef913f77d466b549bd83d683bf40ad16")  # the first three fields are little-endian
HOME_DIRTY = "user.home-dirty"
HOME_SECTOR = 512  # bytes; with others, nobody finds the partition
USER_MAX = 256  # characters of a user's name
NO_HOMES = {
    "directory": "a directory",
    "subvolume": "a btrfs subvolume",
    "fscrypt": "a directory with fscrypt",
    "cifs": "on a file server",
}
# Closed after writing, moved away and here, made, deleted.
INOTIFY_EVENTS = 0x8 | 0x40 | 0x80 | 0x100 | 0x200


class Gpt:
    """A GUID partition table with sectors of 512 bytes (UEFI 2.10, 5.3)."""

    SIGNATURE = b"EFI PART"

    def __init__(self, header: gpt_header, array: bytes) -> None:
        self.header = header
        self.array = array

    @classmethod
    def read(cls, fd: int, lba: int = 1) -> Gpt | None:
        """The table whose header is in a sector; None if there is none, or its checksums are wrong.

        Takes any bytes. Raises OSError.
        """
        raw = os.pread(fd, HOME_SECTOR, lba * HOME_SECTOR) if lba < 1 << 50 else b""
        if len(raw) < HOME_SECTOR:
            return None
        header = gpt_header.from_buffer_copy(raw)
        length = header.count * header.entry_size
        if header.signature != cls.SIGNATURE or header.entry_size < ctypes.sizeof(gpt_entry):
            return None
        if not ctypes.sizeof(header) <= header.size <= HOME_SECTOR or not 0 < length <= 1 << 20:
            return None
        if header.own_lba != lba or header.array_lba >= 1 << 50:
            return None
        array = os.pread(fd, length, header.array_lba * HOME_SECTOR)
        found = cls(header, array)
        whole = len(array) == length
        return found if whole and found.checksums() == (header.crc, header.array_crc) else None

    def checksums(self) -> tuple[int, int]:
        """Of the header, as it is with its own field zero, and of the array."""
        from binascii import crc32

        copy = gpt_header.from_buffer_copy(bytes(self.header))
        copy.crc = 0
        # Whatever a longer header has behind this is zero.
        padding = bytes(self.header.size - ctypes.sizeof(copy))
        return crc32(bytes(copy) + padding), crc32(self.array)

    def partitions(self) -> list[tuple[int, gpt_entry]]:
        """Those that there are, with the offset of each in the array."""
        step = self.header.entry_size
        entries = [(i, gpt_entry.from_buffer_copy(self.array, i)) for i in range(0, len(self.array), step)]
        return [(i, entry) for i, entry in entries if any(entry.type)]

    def write(self, fd: int) -> None:
        """Writes it where it is from, with new checksums. Raises OSError."""
        self.header.array_crc = self.checksums()[1]
        self.header.crc = self.checksums()[0]
        header = self.header.own_lba * HOME_SECTOR, bytes(self.header).ljust(HOME_SECTOR, b"\0")
        (place, data), (then, more) = sorted((header, (self.header.array_lba * HOME_SECTOR, self.array)))
        if place + len(data) == then:
            # In one go, so that a kill leaves no checksum that is wrong. This is how everybody has them.
            data, more = data + more, b""
        os.pwrite(fd, data, place)
        os.pwrite(fd, more, then)


def home_partitions(gpt: Gpt | None) -> list[tuple[int, gpt_entry]]:
    """The partitions of a table, if it has one, and that is a home directory's."""
    found = gpt.partitions() if gpt else []
    return found if len(found) == 1 and bytes(found[0][1].type) == HOME_TYPE_RAW else []


def gpt_of(path: str) -> Gpt | None:
    """The partition table in a file, if it has one. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Gpt.read(fd)
    finally:
        os.close(fd)


def plain_user(name: str) -> str:
    """The user in NAME or NAME@REALM; empty for what cannot be a part of a disk's name.

    Whoever has made a stick or a file has chosen it.
    """
    user = name.partition("@")[0]
    return user if user.isprintable() and "/" not in user and len(user) <= USER_MAX else ""


def user_in(gpt: Gpt | None) -> str:
    """Whose home directory a disk is by the name of its partition; empty if nobody's."""
    for _, entry in home_partitions(gpt):
        # UTF-16, of which an initrd's Python has no codec. Half of a pair is no character that may be in a
        # name.
        raw = bytes(entry.name)
        units = (raw[i] | raw[i + 1] << 8 for i in range(0, len(raw), 2))
        return plain_user("".join(map(chr, units)).split("\0")[0])
    return ""


def widen_partition(path: str) -> bool:
    """Makes a home's partition as large again as it can be; False if it is so. Raises OSError.

    On a block device systemd-homed shrinks file system and partition at the end of a session, but never the
    device. A file shrinks with them, and when it comes home larger than what is in it, that is never used
    again (home_resize_luks() in systemd's src/home/homework-luks.c). The next session grows the rest.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        gpt = Gpt.read(fd)
        other = Gpt.read(fd, gpt.header.other_lba) if gpt else None
        if not (gpt and other and home_partitions(gpt) and home_partitions(other)):
            return False
        changed = False
        # The second copy comes first: if this is cut short, the first one is as it was.
        for table in (other, gpt):
            for offset, entry in home_partitions(table):
                last = (table.header.last_usable + 1) // 2048 * 2048 - 1  # a whole MiB
                if entry.first <= entry.last < last:
                    entry.last = last
                    end = offset + ctypes.sizeof(entry)
                    table.array = table.array[:offset] + bytes(entry) + table.array[end:]
                    table.write(fd)
                    os.fsync(fd)
                    changed = True
        return changed
    finally:
        os.close(fd)


class HomeImage(Image):
    """A home directory in a file."""

    __slots__ = ()

    def __init__(self, user: str, path: str) -> None:
        super().__init__(user, path)
        self.home = user
        self.model = f"home of {user}"

    def sectors(self) -> int:
        return HOME_SECTOR

    def use(self, usage: Usage) -> str:
        return f"{self.home} is logged in here" if super().use(usage) else ""

    def why_no_home(self) -> str:
        try:
            found = home_partitions(gpt_of(self.node))
        except OSError as e:
            return reason_of(e)
        return "" if found else "it has no partition of a home directory"


class HomeDrive(BlockDevice):
    """A home directory that has a block device for itself, such as a stick."""

    __slots__ = ()

    def __init__(self, user: str, sysname: str) -> None:
        super().__init__(user, device_node(sysname), sysname)
        self.home = user

    def probe(self, *, held: bool = False) -> None:
        super().probe(held=held)
        self.model = f"home of {self.home}"

    def use(self, usage: Usage) -> str:
        return f"{self.home} is logged in here" if super().use(usage) else ""


class NoHomeDisk(Disk):
    """A home directory that is no disk, `why` not."""

    __slots__ = ("why",)

    def __init__(self, user: str, node: str, why: str) -> None:
        super().__init__(user, node)
        self.home = user
        self.why = why

    def probe(self, *, held: bool = False) -> None:
        st = os.stat(self.node)
        self.set_tag(f"{FILE_TAG}{st.st_dev}:{st.st_ino}")

    def use(self, usage: Usage) -> str:
        return ""

    def why_ours(self) -> str:
        return ""

    def identity(self) -> str:
        return self.node

    def lasts(self) -> bool:
        return False


def parse_home_record(raw: bytes, machine_id: str) -> tuple[str, str]:
    """Storage and path of a home directory on a machine, from a user's record; both empty if it has none.

    It is a JSON user record (systemd: "JSON User Records"): what is so on one machine alone is below
    `binding` and the machine's ID. Takes any bytes.
    """
    import json

    try:
        record = json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return "", ""
    binding = record.get("binding") if isinstance(record, dict) else None
    here = binding.get(machine_id) if isinstance(binding, dict) else None
    if not isinstance(here, dict):
        return "", ""
    storage, path = here.get("storage"), here.get("imagePath")
    path = path if isinstance(path, str) and path.startswith("/") and "\0" not in path else ""
    return (storage, path) if isinstance(storage, str) else ("", "")


class Homes(Source):
    """The home directories of systemd-homed that are here, of all users or of some.

    `usual` is what clients may do to them unless the user says something else, `root` where the root file
    system is.
    """

    def __init__(self, machine_id: str, users: Sequence[str] = (), usual: str = "", root: str = "") -> None:
        self.machine_id = machine_id
        self.users = list(dict.fromkeys(users))
        self.usual = usual or DEFAULT_ACCESS
        self.root = root
        self.keys: list[str] = []  # of what was found last
        self.found: set[str] = set()  # the users whose home directories were found last

    def may_write(self) -> bool:
        return self.usual != READ_ONLY

    # What there is

    def scan(self, known: dict[str, Disk], only: Iterable[str] | None = None) -> list[Disk]:
        disks: dict[str, Disk] = {}
        for disk in (*self.recorded(), *self.in_directory(), *self.on_drives()):
            if self.users and disk.home not in self.users:
                continue
            disk.usual = self.usual
            before = known.get(disk.key)
            same = before and type(before) is type(disk) and before.home == disk.home
            disks.setdefault(disk.key, before if before and same else disk)
        self.keys, self.found = list(disks), {disk.home for disk in disks.values()}
        return list(disks.values())

    def recorded(self) -> Iterator[Disk]:
        """Those that systemd-homed has records of."""
        directory = self.root + HOME_RECORDS
        for name in sorted(list_directory(directory)):
            user, dot, kind = name.rpartition(".")
            if not dot or kind != "identity" or not user:
                continue
            try:
                raw = read_bytes(f"{directory}/{name}")
            except OSError as e:
                debug(f"Failed to read '{directory}/{name}', ignoring: {reason_of(e)}")
                continue
            storage, path = parse_home_record(raw, self.machine_id)
            if storage == "luks":
                place = path or f"{HOME_DIRECTORY}/{user}.home"
                if disk := self.disk_at(user, place if place.startswith(DEV) else self.root + place):
                    yield disk
            elif storage in NO_HOMES:
                where = self.root + (path or f"{HOME_DIRECTORY}/{user}.homedir")
                # On a file server there is nothing here but the record.
                where = where if os.path.isdir(where) else f"{directory}/{name}"
                yield NoHomeDisk(user, where, self.why_no_disk(storage))

    def in_directory(self) -> Iterator[Disk]:
        """Those in /home of which there may be no record."""
        directory = self.root + HOME_DIRECTORY
        for name in sorted(list_directory(directory)):
            user, dot, kind = name.rpartition(".")
            path = f"{directory}/{name}"
            if dot and user and kind == "home" and os.path.isfile(path):
                yield HomeImage(self.owner(path) or user, path)
            elif dot and user and kind == "homedir" and os.path.isdir(path):
                yield NoHomeDisk(user, path, self.why_no_disk("directory"))

    def on_drives(self) -> Iterator[Disk]:
        """Those that udev knows on block devices."""
        for name in list_directory(SYS + "block"):
            parts = partitions_of(name)
            for part in parts:
                properties = partition_properties(part)
                if properties.get("ID_PART_ENTRY_TYPE") == HOME_TYPE:
                    user = plain_user(properties.get("ID_PART_ENTRY_NAME", "")) or part
                    yield self.drive(user, name, part, alone=len(parts) == 1)

    def disk_at(self, user: str, path: str) -> Disk | None:
        """The disk that a record names; None if it is not here."""
        if os.path.isfile(path):
            return HomeImage(user, path)
        if not (part := sysname_of_node(path)):
            return None
        whole = whole_disk(part) or part
        return self.drive(user, whole, part, alone=len(partitions_of(whole)) <= 1)

    @staticmethod
    def drive(user: str, whole: str, part: str, *, alone: bool) -> Disk:
        if alone:
            return HomeDrive(user, whole)
        why = f"it is beside other partitions on '{device_node(whole)}', which --all exports as a whole"
        return NoHomeDisk(user, device_node(part), why)

    @staticmethod
    def why_no_disk(storage: str) -> str:
        return f"it is {NO_HOMES[storage]}; only home directories in LUKS storage are disks"

    @staticmethod
    def owner(path: str) -> str:
        """Whose home directory a file is, as it tells itself; empty if it does not."""
        try:
            return user_in(gpt_of(path))
        except OSError:
            return ""

    def why_not(self, disk: Disk) -> str:
        if isinstance(disk, NoHomeDisk):
            return disk.why
        return disk.why_no_home() if isinstance(disk, HomeImage) else BlockDevices().why_not(disk)

    # What people are told

    def missing(self) -> list[str]:
        where = f"'{self.root}{HOME_DIRECTORY}' or on a partition"
        found = [
            f"There is no home directory of '{user}' in {where}; it is exported as soon as it is there"
            for user in self.users
            if user not in self.found
        ]
        if not self.users and not self.found:
            found.append(
                f"There is no home directory of systemd-homed in {where}; one that comes is exported"
            )
        return found

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        found = []
        writable = [e.disk.home for e in exports if e.access != READ_ONLY]
        if any(e.access == READ_ONLY for e in exports):
            found.append(
                "Home directories that are read-only cannot be logged in to; start with --pair, or with "
                "--read-write or --snapshot, to use them on the other machine"
            )
        if writable:
            found.append(
                "Each home directory is for one client at a time. Once its disk is attached, log in there "
                f"as its user, or run 'homectl activate {writable[0]}'; if that machine does not know the "
                "user, see storagetm(8), HOME DIRECTORIES"
            )
        return found

    def interrupted(self, exports: Iterable[Export]) -> None:
        """Marks them as systemd-homed does while they are active (run_mark_dirty() in homework-luks.c)."""
        for export in exports:
            if export.access != READ_WRITE or export.disk.sysname:
                continue
            node = export.disk.node
            warning(
                f"'{node}' was taken away while a client was attached: what {export.disk.home} changed last "
                "may be missing, and the next session here checks its file system"
            )
            try:
                os.setxattr(node, HOME_DIRTY, b"1")
            except OSError as e:
                debug(f"Failed to mark '{node}', ignoring: {reason_of(e)}")

    def news(self, update: Callable[[Iterable[str]], None]) -> list[News]:
        paths = [self.root + HOME_DIRECTORY, self.root + HOME_RECORDS]
        try:
            return [FileNews(paths, lambda: update(self.keys))]
        except OSError as e:
            warning(
                f"Home directories that come and go are not noticed: {reason_of(e)}; start again after a "
                "change"
            )
            return []


class FileNews(News):
    """Word of files in some directories that come, go, or are let go of (inotify(7))."""

    def __init__(self, paths: Sequence[str], changed: Callable[[], None]) -> None:
        """Raises OSError."""
        self.paths = paths
        self.changed = changed
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = int(self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def wants(self) -> tuple[int, int]:
        # Each time: a directory may have come, or another one been mounted over it. What is watched already
        # stays so.
        for path in self.paths:
            self.libc.inotify_add_watch(self.fd, os.fsencode(path), ctypes.c_uint32(INOTIFY_EVENTS))
        return self.fd, select.POLLIN

    def act(self) -> bool:
        try:
            while os.read(self.fd, 65536):
                pass
        except BlockingIOError:
            pass
        self.changed()
        return True


# -----------------------------------------------------------------------------------------------------------
# 15. Entries and branches
# -----------------------------------------------------------------------------------------------------------


class Entry:
    """One thing in the wanted tree, made and unmade in one step. Paths are relative to the tree's root."""

    __slots__ = ("path", "value")
    LETTER = (
        ""  # its kind in the ledger; empty for what vanishes with its branch's root, or with this process
    )
    LIVE = False  # whether it may be made, or made again, while clients use its branch
    ADMITS = False  # whether it lets clients in: of all branches, these are made last and unmade first
    WAITS = False  # whether making it is mostly waiting, so that many are made at a time
    TOGETHER = False  # whether make_all() makes those of all branches, once all else is there but ADMITS
    FOLLOWS = False  # whether it only tells of a change, of which there is none in a branch that is new
    CLOSES = False  # whether no client can change anything in its branch once it is unmade
    CONTENT = False  # whether it is what is in an attribute of another branch, where nothing is another's
    RESTRICTS = False  # whether it has a branch let in only some clients
    LISTED = True  # whether what has its name is in the directory of its path; else identity() tells

    kinds: ClassVar[dict[str, type[Entry]]] = {}  # by letter

    def __init_subclass__(cls) -> None:
        if "LETTER" in vars(cls):
            Entry.kinds[cls.LETTER] = cls

    def __init__(self, path: str, value: str = "") -> None:
        self.path = path
        self.value = value

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Entry)
            and type(self) is type(other)
            and self.path == other.path
            and self.value == other.value
        )

    __hash__ = None  # type: ignore[assignment]

    def make(self, root: str) -> None:
        """Raises OSError."""

    @classmethod
    def make_all(cls, entries: Sequence[Entry], root: str) -> None:
        """Makes many of a kind that is made TOGETHER. Raises nothing: what fails is theirs to note."""

    def unmake(self, root: str) -> None:
        """Raises OSError, but not for what is not there."""

    def is_live(self, root: str) -> bool:
        """Whether the kernel has it just so."""
        return True

    def place(self, root: str) -> str:
        """Where people find it."""
        return root + self.path

    def identity(self, root: str) -> str:
        """What tells it from another's of the same name, in one line of text; empty if it is not there."""
        return ""

    def is_open(self, root: str) -> bool:
        """Whether it is there, and clients can come in by it."""
        return False

    def is_begun(self, root: str) -> bool:
        """Whether it shows that the root of its branch is not one that we have made just now."""
        return False

    def is_wrong(self, root: str) -> bool:
        """Whether something else is there that has to go first, now that it is known not to be live."""
        return self.ADMITS and os.path.lexists(root + self.path)

    def guard(self, *, adopted: bool) -> None:
        """Keeps the rest of this machine off the device that it stands for, if it stands for one.

        Called when it was made, or `adopted` from an earlier run.
        """

    def owes(self) -> bool:
        """Whether I/O of clients on the device that it stands for has not ended yet. Raises OSError."""
        return False

    def dooms(self, error: OSError) -> bool:
        """Whether making it failed for a reason for which it would fail in all other branches as well."""
        return False

    def crowd(self) -> str:
        """The directory that the kernel lets nobody into while this is unmade; empty if there is none."""
        return ""

    def described(self, root: str) -> dict[str, str] | None:
        """What make() does: `step`, its operands, and the shell command for it; None if it does nothing."""
        return None

    def described_again(self, root: str) -> dict[str, str] | None:
        """What make() does while clients use its branch, when the entry may be there already."""
        return self.described(root)

    def undescribed(self, root: str) -> dict[str, str] | None:
        """What unmake() does, in the same form; None if it does nothing."""
        return None


class Directory(Entry):
    """A directory of configfs, that is, an object of the kernel."""

    LETTER = "d"

    def make(self, root: str) -> None:
        os.mkdir(root + self.path)

    def unmake(self, root: str) -> None:
        try:
            os.rmdir(root + self.path)
        except FileNotFoundError:
            pass

    def is_live(self, root: str) -> bool:
        return os.path.isdir(root + self.path)

    def identity(self, root: str) -> str:
        """The inode number, which configfs keeps as long as the object lives."""
        try:
            return str(os.stat(root + self.path).st_ino)
        except OSError:
            return ""

    def is_begun(self, root: str) -> bool:
        return self.is_live(root)

    def crowd(self) -> str:
        return self.path.rpartition("/")[0]

    def described(self, root: str) -> dict[str, str]:
        path = root + self.path
        return {"step": "mkdir", "path": path, "command": f"mkdir {quoted(path)}"}

    def undescribed(self, root: str) -> dict[str, str]:
        path = root + self.path
        return {"step": "rmdir", "path": path, "command": f"rmdir {quoted(path)}"}


class DefaultGroup(Entry):
    """A directory that the kernel makes, empty, with the one it is in. Other branches are made in it."""

    LETTER = "i"

    def is_begun(self, root: str) -> bool:
        return bool(list_directory(root + self.path))


class Attribute(Entry):
    """An attribute, written once: where it differs in a live object, the object is made anew."""

    def text(self) -> str:
        """What is written to it."""
        return self.value

    def make(self, root: str) -> None:
        write_attribute(root + self.path, self.text())

    def is_live(self, root: str) -> bool:
        return read_attribute(root + self.path) == self.value

    def described(self, root: str) -> dict[str, str]:
        path, value = root + self.path, self.text()
        command = f"echo {quoted(value)} > {quoted(path)}"
        return {"step": "write", "path": path, "value": value, "command": command}


class OptionalAttribute(Attribute):
    """An attribute that older kernels lack, and that is skipped there."""

    def make(self, root: str) -> None:
        try:
            write_attribute(root + self.path, self.text())
        except FileNotFoundError:
            pass

    def is_live(self, root: str) -> bool:
        return super().is_live(root) or not os.path.exists(root + self.path)


class Untouched(Entry):
    """An attribute that has to be as a new object has it, or missing: else the object is made anew."""

    def is_live(self, root: str) -> bool:
        return read_attribute(root + self.path) in ("", self.value)


class Trigger(OptionalAttribute):
    """An attribute to which 1 is written after a restart, and each time `value` has changed."""

    LIVE = FOLLOWS = True

    def text(self) -> str:
        return "1"

    def is_live(self, root: str) -> bool:
        return False


class Link(Entry):
    """A symbolic link to the directory `value`. Links may be added to and taken from a live object."""

    LETTER = "l"
    LIVE = ADMITS = CLOSES = True

    def make(self, root: str) -> None:
        os.symlink(root + self.value, root + self.path)

    def unmake(self, root: str) -> None:
        try:
            os.unlink(root + self.path)
        except FileNotFoundError:
            pass

    def is_live(self, root: str) -> bool:
        path = root + self.path
        try:
            # configfs makes the target relative.
            target = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            return False
        return os.path.normpath(target) == os.path.normpath(root + self.value)

    def is_open(self, root: str) -> bool:
        return os.path.lexists(root + self.path)

    def described(self, root: str) -> dict[str, str] | None:
        target, path = root + self.value, root + self.path
        command = f"ln -s {quoted(target)} {quoted(path)}"
        return {"step": "symlink", "path": path, "target": target, "command": command}

    def undescribed(self, root: str) -> dict[str, str]:
        path = root + self.path
        return {"step": "unlink", "path": path, "command": f"rm {quoted(path)}"}


class Links(Link):
    """All links in the directory `path`, which are made and known by others. Made anew, there are none."""

    LETTER = "g"

    def make(self, root: str) -> None:
        self.unmake(root)

    def unmake(self, root: str) -> None:
        for name in list_directory(root + self.path):
            os.unlink(f"{root}{self.path}/{name}")

    def is_live(self, root: str) -> bool:
        return False  # what an earlier run has left there is not known

    def is_open(self, root: str) -> bool:
        return False  # they are there for ourselves

    def described(self, root: str) -> None:
        return None

    def undescribed(self, root: str) -> dict[str, str]:
        path = f"{root}{self.path}/*"
        return {"step": "unlink", "path": path, "command": f"rm -f {path}"}


class Branch:
    """A part of the tree that stands or falls as a whole.

    Its `entries` are in the order in which they are made; the path of the first is its `root`, by which it
    is known. `tag` tells what it was made for: under another tag it is another branch. It is made after the
    branches whose roots it `needs`, and is removed before them; those in `scaffold` have to be there while
    it is made, and no longer. An `adopted` one was made by an earlier run: of its entries, those in the
    ledger are known, all others have to be read. `claims` are kinds and values of identities that no other
    branch may have.
    """

    __slots__ = (
        *("admitting", "adopted", "claims", "entries", "needs", "plain", "root", "scaffold", "tag"),
        *("together", "waits"),
    )

    def __init__(
        self,
        tag: str,
        entries: list[Entry],
        *,
        needs: Sequence[str] = (),
        scaffold: Sequence[str] = (),
        adopted: bool = False,
        claims: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.tag = tag
        self.entries = entries
        # Apart by when they are made. Each is asked once, since there are a dozen for each of many disks.
        self.plain: list[Entry] = []
        self.together: list[Entry] = []
        self.admitting: list[Entry] = []
        self.waits = False
        for entry in entries:
            if entry.ADMITS:
                self.admitting.append(entry)
            elif entry.TOGETHER:
                self.together.append(entry)
            else:
                self.plain.append(entry)
                self.waits = self.waits or entry.WAITS
        self.root = entries[0].path
        self.needs = tuple(needs)
        self.scaffold = tuple(scaffold)
        self.adopted = adopted
        self.claims = claims

    def same_as(self, other: Branch) -> bool:
        return (
            not self.adopted
            and not other.adopted
            and self.tag == other.tag
            and self.needs == other.needs
            and self.entries == other.entries
        )

    def to_compare(self) -> Branch:
        """A copy of which each entry has to be looked at, since it is not known what is there of it."""
        return Branch(self.tag, self.entries, needs=self.needs, scaffold=self.scaffold, adopted=True)


def owes(branches: Iterable[Branch]) -> bool:
    """Whether devices that these stand for have I/O of clients that has not ended."""
    for branch in branches:
        for entry in branch.entries:
            try:
                if entry.owes():
                    return True
            except OSError as e:
                debug(f"Failed to look at '{entry.path}', ignoring: {reason_of(e)}")
    return False


def in_levels(branches: Iterable[Branch]) -> list[list[Branch]]:
    """First those that need none of the others, then those that need just these, and so on."""
    left = {b.root: b for b in branches}
    levels = []
    while left:
        level = [b for b in left.values() if not any(root in left for root in b.needs)]
        assert level, "branches that need each other"
        levels.append(level)
        for branch in level:
            del left[branch.root]
    return levels


class Failure:
    """What could not be made or unmade: an `entry` of a `branch`, because of `error`.

    With a `cause`, nothing of the branch was tried, because what it needs has failed.
    """

    __slots__ = ("branch", "cause", "entry", "error")

    def __init__(self, branch: Branch, entry: Entry, error: OSError, cause: Failure | None = None) -> None:
        self.branch = branch
        self.entry = entry
        # Before Python 3.10, what came too late has no number.
        self.error = error if error.errno else OSError(errno.EIO, reason_of(error))
        self.cause = cause


class Patch:
    """What changes in a branch that clients go on using: what is unmade, and what is made."""

    __slots__ = ("branch", "missing", "stale")

    def __init__(self, branch: Branch, stale: list[Entry], missing: list[Entry]) -> None:
        self.branch = branch
        self.stale = stale
        self.missing = missing


# -----------------------------------------------------------------------------------------------------------
# 16. The ledger
# -----------------------------------------------------------------------------------------------------------


class Ledger:
    """Which branches are ours: a file of intentions, so that a crash at any moment leaves none unknown.

    Records are appended and the last one for a root counts: `+` root, tag, letter and path of each entry
    that has a letter, and `n` and root for each branch that it needs, written *before* the first of them is
    made; `=` root and the identity of its first entry, right after that was made; `-` root, when all is
    gone. Fields end with NUL, records with NUL and a line feed; one that is cut off does not count. Without
    its lock, the file is only read.
    """

    NEED = "n"
    BETWEEN = "mrvw"  # letters of what stands between a disk and its export
    MUCH = 4096  # records after which those that no longer count are dropped

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.lock_fd = -1
        self.records = 0
        self.mutex = _thread.allocate_lock()

    def lock(self) -> None:
        """Opens the file and makes sure that no other instance uses it. Raises UserError."""
        path = self.path + ".lock"
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            self.lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.lock_fd, 0)
            os.write(self.lock_fd, str(os.getpid()).encode())
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            # A record that was cut off would take the next one with it.
            whole, end, _ = read_bytes(self.path).rpartition(b"\0\n")
            os.ftruncate(self.fd, len(whole + end))
        except BlockingIOError as e:
            pid = read_attribute(path)
            self.close()
            raise UserError(
                f"Another storagetm exports under this NQN already, process {pid or 'unknown'}; "
                "stop it or give another --nqn"
            ) from e
        except OSError as e:
            raise UserError(
                f"Failed to write to '{path}', where it is noted what is exported: {reason_of(e)}; "
                "mount a tmpfs on '/run'"
            ) from e

    def close(self) -> None:
        for fd in (self.fd, self.lock_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.lock_fd = -1

    @staticmethod
    def parse(raw: bytes) -> dict[str, tuple[Branch, str]]:
        """The branches noted, by root, with the identity if it was. Takes any bytes."""
        found: dict[str, tuple[Branch, str]] = {}
        parts: dict[str, str] = {}  # what was split off, by what it was split from
        for record in raw.split(b"\0\n")[:-1]:
            kind, *fields = (os.fsdecode(f) for f in record.split(b"\0"))
            if kind == "+" and len(fields) >= 3:
                for branch in Ledger.branches(*fields):
                    identity = found[branch.root][1] if branch.root in found else ""
                    found[branch.root] = branch, identity
                    if branch.root != fields[0]:
                        parts[fields[0]] = branch.root
            elif kind == "=" and len(fields) == 2 and fields[0] in found:
                found[fields[0]] = found[fields[0]][0], fields[1]
            elif kind == "-" and len(fields) == 1:
                found.pop(fields[0], None)
                found.pop(parts.pop(fields[0], ""), None)
        return found

    @staticmethod
    def branches(root: str, tag: str, *fields: str) -> list[Branch]:
        """The branch of a record; none if it makes no sense.

        Earlier versions had what stands between a disk and its export among the other entries of the disk's
        branch: that gives two. They noted no needs, which then follow from what paths begin with.
        """
        entries = [Entry.kinds[f[0]](f[1:]) for f in fields if f[:1] in Entry.kinds and len(f) > 1]
        if any(".." in entry.path.split("/") for entry in entries):
            return []
        needs = [f[1:] for f in fields if f[:1] == Ledger.NEED]
        between = [entry for entry in entries if entry.LETTER in Ledger.BETWEEN]
        others = [entry for entry in entries if entry.LETTER not in Ledger.BETWEEN]
        if between and others:
            needs.append(between[0].path)
        found = [Branch(tag, part, adopted=True) for part in (between, others) if part]
        if not found or found[-1].root != root:
            return []
        found[-1].needs = tuple(needs)
        return found

    def read(self, root: str) -> dict[str, Branch]:
        """The branches of an earlier run that are still there and still ours. Raises OSError."""
        found = {}
        for name, (branch, noted) in self.parse(read_bytes(self.path)).items():
            identity = branch.entries[0].identity(root)
            # Died between the making and the note of its identity: then nothing can have been made in it.
            begun = not noted and any(e.is_begun(root) for e in branch.entries[1:])
            if identity and not begun and noted in ("", identity):
                found[name] = branch
            elif identity:
                debug(f"'{root}{name}' has the name of an entry of ours, but is another's")
        for branch in found.values():
            for entry in branch.entries:
                path = entry.path
                while path := path.rpartition("/")[0]:
                    if path in found and path != branch.root and path not in branch.needs:
                        branch.needs += (path,)
        return found

    def add(self, branch: Branch, identity: str = "") -> None:
        """Notes what is about to be made, unless all of it goes with this process. Raises OSError."""
        if intention := self.intention(branch):
            self.append_all([intention, *([("=", branch.root, identity)] if identity else [])])

    def add_all(self, branches: Sequence[Branch]) -> None:
        """Notes that several branches are about to be made. Raises OSError."""
        self.append_all(list(filter(None, map(self.intention, branches))))

    def intention(self, branch: Branch) -> tuple[str, ...]:
        """The record of a branch; empty for one that goes with this process."""
        if not (fields := [e.LETTER + e.path for e in branch.entries if e.LETTER]):
            return ()
        return "+", branch.root, branch.tag, *fields, *(self.NEED + root for root in branch.needs)

    def confirm(self, branch: Branch, root: str) -> None:
        """Notes that the first entry of a branch is made, unless its name says well enough whose it is."""
        if (letter := branch.entries[0].LETTER) and letter not in self.BETWEEN:
            self.append("=", branch.root, branch.entries[0].identity(root))

    def remove(self, *branches: Branch) -> None:
        """Notes that branches are gone. Raises OSError."""
        self.append_all([("-", branch.root) for branch in branches])

    def append(self, *fields: str) -> None:
        self.append_all([fields])

    def append_all(self, records: Sequence[Sequence[str]]) -> None:
        """Appends records in one go."""
        if self.fd < 0 or not records:
            return
        raw = utf8("".join("\0".join((*fields, "\n")) for fields in records))
        with self.mutex:
            append(self.fd, raw)
            self.records += len(records)

    def shorten(self, branches: Iterable[Branch], root: str) -> None:
        """Drops what no longer counts, once there is much of it. Raises OSError."""
        if self.records >= self.MUCH:
            self.rewrite(branches, root)

    def rewrite(self, branches: Iterable[Branch], root: str) -> None:
        """Leaves only records of these branches. Raises OSError."""
        new = Ledger(self.path + ".new")
        new.fd = os.open(new.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            for branch in branches:
                if not any(e.LETTER for e in branch.entries):
                    continue
                if not (identity := branch.entries[0].identity(root)):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), branch.root)
                new.add(branch, identity)
            os.rename(new.path, self.path)
        except OSError:
            new.close()
            raise
        os.close(self.fd)
        self.fd, self.records = new.fd, 0

    def clear(self) -> None:
        """Removes the file after a clean stop. The lock's file stays: someone may be waiting for it."""
        try:
            os.unlink(self.path)
        except OSError as e:
            debug(f"Failed to remove '{self.path}', ignoring: {reason_of(e)}")


# -----------------------------------------------------------------------------------------------------------
# 17. The tree
# -----------------------------------------------------------------------------------------------------------


def in_threads(
    items: Sequence[Any],
    work: Callable[[Any], None],
    patience: float | None,
    wake: Callable[[], None],
) -> None:
    """Does `work` for each item, for many at a time, and calls `wake` after each.

    What takes over `patience` seconds goes on in the background (None: all is waited for).
    """
    pending, unfinished = list(reversed(items)), len(items)
    counting, all_done = _thread.allocate_lock(), _thread.allocate_lock()
    all_done.acquire()

    def run() -> None:
        nonlocal unfinished
        while True:
            try:
                item = pending.pop()
            except IndexError:
                return
            try:
                work(item)
            finally:
                with counting:
                    unfinished -= 1
                    if not unfinished:
                        all_done.release()
                wake()

    for _ in range(min(THREADS, len(items))):
        _thread.start_new_thread(run, ())
    all_done.acquire(True, -1 if patience is None else patience)


def together(branches: Iterable[Branch], patches: dict[str, Patch]) -> list[list[Entry]]:
    """The entries of these branches that are to be made together, by kind."""
    kinds: dict[type[Entry], list[Entry]] = {}
    for branch in branches:
        patch = patches.get(branch.root)
        for entry in branch.together:
            if patch is None or entry in patch.missing:
                kinds.setdefault(type(entry), []).append(entry)
    return list(kinds.values())


def is_doomed(failures: dict[str, Failure]) -> bool:
    """Whether all else would fail in the same way as something has."""
    return any(f.entry.dooms(f.error) for f in list(failures.values())) if failures else False


def backings_of(going: Sequence[Branch], live: Iterable[Branch]) -> dict[str, Branch]:
    """What goes right after each of these branches, by its root: what no other live one needs.

    That is what takes no time of its own; in threads of its own it would take a stop with 256 disks 0.37 s
    instead of 0.32. What the kernel takes time for goes better all at once: 0.79 s instead of 0.87.
    """
    needed: dict[str, int] = {}
    for branch in live:
        for root in branch.needs:
            needed[root] = needed.get(root, 0) + 1
    only = {b.root: b for b in going if needed.get(b.root) == 1 and not b.needs and not b.waits}
    return {b.root: only[r] for b in going for r in b.needs if r in only and only[r].tag == b.tag}


class Plan:
    """The difference between what is live and what is wanted: what has to be done.

    `scaffolds` are those that something needs that is to be made, whether they are there or not. What cannot
    be done before a removal has ended is not in it.
    """

    def __init__(self, tree: Tree, wanted: Sequence[Branch], scaffolds: Sequence[Branch]) -> None:
        self.tree = tree
        self.made: dict[str, Branch] = {}
        self.patched: dict[str, Patch] = {}
        roots = {b.root for b in wanted}
        if tree.leaving:
            # The kernel removes no port while it waits for a disk.
            roots.update(b.root for b in scaffolds)
        self.stale = {r for r in tree.live if r not in roots and r not in tree.leaving}
        possible = self.possible(wanted) if tree.leaving else wanted
        for want in possible:
            self.compare(want)
        # A branch is removed together with what it needs.
        while self.stale and (more := [b for b in possible if self.is_uprooted(b)]):
            for want in more:
                self.make_anew(want)
                self.patched.pop(want.root, None)
        for want in possible if self.stale else ():
            self.hang_anew(want)
        changed = [*self.made.values(), *(patch.branch for patch in self.patched.values())]
        needed = {root for b in changed for root in b.scaffold}
        self.scaffolds = [b for b in scaffolds if b.root in needed]
        self.removals = [b for r, b in tree.live.items() if r in self.stale and r not in needed]
        self.creations = list(self.made.values())
        self.patches = list(self.patched.values())

    def __bool__(self) -> bool:
        return bool(self.removals or self.creations or self.patches)

    def compare(self, want: Branch) -> None:
        """Takes note of what has to be done about a branch."""
        have = self.tree.live.get(want.root)
        if have is None:
            self.made[want.root] = want
        elif have is not want and not have.same_as(want):
            if patch := self.tree.patch_for(have, want):
                self.patched[want.root] = patch
            else:
                self.make_anew(want)

    def make_anew(self, want: Branch) -> None:
        self.stale.add(want.root)
        # Of one that stays from an earlier run, not enough is known to make it.
        if not want.adopted:
            self.made[want.root] = want

    def lost_needs(self, want: Branch) -> set[str]:
        """Roots that a live branch needs, now and later, and that are going to be taken away."""
        have = self.tree.live.get(want.root)
        if have is None or want.root in self.stale:
            return set()
        return self.stale.intersection(have.needs, want.needs)

    def is_uprooted(self, want: Branch) -> bool:
        """Whether it cannot stay where something is taken away that it needs.

        It can if all that it has in there may be made again while clients use it.
        """
        inside = [self.inside(want, root) for root in self.lost_needs(want)]
        if want.adopted:
            return bool(inside)
        return not all(entries and all(e.LIVE for e in entries) for entries in inside)

    @staticmethod
    def inside(want: Branch, root: str) -> list[Entry]:
        """The entries of a branch that are in another one."""
        return [e for e in want.entries if e.path.startswith(root + "/")]

    def hang_anew(self, want: Branch) -> None:
        """Has a branch that stays let go of what is taken away that it needs, and take hold of it again."""
        for root in self.lost_needs(want):
            inside = self.inside(want, root)
            patch = self.patched.setdefault(want.root, Patch(want, [], []))
            patch.stale += [e for e in inside if e not in patch.stale]
            patch.missing += [e for e in inside if e not in patch.missing]

    def possible(self, wanted: Sequence[Branch]) -> list[Branch]:
        """Those that need not wait for what is still being removed, nor for others that have to."""
        leaving, crowded = self.tree.leaving, self.tree.crowded()
        waiting = {
            b.root
            for b in wanted
            if not leaving.isdisjoint((b.root, *b.needs, *b.scaffold))
            or (b.root not in self.tree.live and any(e.crowd() in crowded for e in b.entries))
        }
        going_on = {root for b in wanted if b.root not in waiting for root in b.needs}
        idle = (
            {root for b in wanted if b.root in waiting for root in b.needs}
            - going_on
            - self.tree.live.keys()
        )
        return [b for b in wanted if b.root not in waiting and b.root not in idle]


class Live:
    """What is live of ours, and what takes it away."""

    threads = True  # whether many things are done at a time

    def __init__(self, root: str, ledger: Ledger) -> None:
        self.root = root
        self.ledger = ledger
        self.live: dict[str, Branch] = {}
        self.inherited: set[str] = set()  # roots of what an earlier run left
        self.leaving: set[str] = set()  # roots whose removal takes longer, in a thread of its own
        self.ended = False  # whether one of these has ended, for which something may have been put off
        self.owed: dict[str, float] = {}  # since when I/O of disks that are gone is waited for, by root
        self.ending = False  # whether that is given up after LOCK_WAIT_SEC
        self.finished: list[tuple[Branch, Failure | None]] = []
        self.wake: Callable[[], None] = lambda: None

    def adopt(self) -> None:
        """Takes over what an earlier run left. Raises OSError."""
        self.live = self.ledger.read(self.root)
        self.inherited = set(self.live)
        if self.live and self.ledger.fd >= 0:
            # Records of an earlier version, which had two branches in one, cannot be taken back one by one.
            try:
                self.ledger.rewrite(self.live.values(), self.root)
            except OSError as e:
                debug(f"Failed to write '{self.ledger.path}' anew, ignoring: {reason_of(e)}")

    def admits(self) -> bool:
        """Whether clients can come in to anything that is live."""
        return any(e.is_open(self.root) for b in self.live.values() for e in b.entries)

    def restricts(self) -> bool:
        """Whether only some clients can come in."""
        return any(e.RESTRICTS for b in self.live.values() for e in b.entries)

    def guard(self) -> None:
        """Keeps the rest of this machine off what an earlier run has exported, too."""
        for root in self.inherited & self.live.keys():
            for entry in self.live[root].entries:
                entry.guard(adopted=True)

    def crowded(self) -> set[str]:
        """Directories that the kernel lets nobody into, since it is taking something out of them."""
        going = [self.live[root].entries for root in self.leaving if root in self.live]
        # The innermost directory is the first to be removed.
        return {next((c for e in reversed(entries) if (c := e.crowd())), "") for entries in going} - {""}

    def undo(self, entry: Entry) -> None:
        """Unmakes an entry. Raises OSError."""
        entry.unmake(self.root)

    def undo_all(self, branch: Branch, entries: Iterable[Entry], failures: dict[str, Failure]) -> bool:
        for entry in entries:
            try:
                self.undo(entry)
            except OSError as e:
                failures[branch.root] = Failure(branch, entry, e)
                return False
        return True

    def remove(
        self,
        branches: Sequence[Branch],
        patience: float | None,
        failures: dict[str, Failure],
        made: Sequence[Entry] | None = None,
    ) -> None:
        """Removes branches, or of one just what was `made`.

        What lets clients in is the first to go, then one level after the other, for many branches at a time:
        taking away a namespace waits for a grace period of RCU in the kernel, some 20 ms each, unless many
        do it at once; and for the I/O of a disk that is gone, for which nobody else should wait. What a
        branch needs that cannot be removed stays.
        """
        ready = []
        for branch in branches:
            entries = branch.entries if made is None else made
            if self.undo_all(branch, [e for e in reversed(entries) if e.ADMITS], failures):
                ready.append(branch)
        # What goes on in the background is a branch alone.
        at_once = made is None and patience is None
        backings = backings_of(ready, self.live.values()) if at_once else {}
        followers = {b.root for b in backings.values()}
        for level in reversed(in_levels(b for b in ready if b.root not in followers)):
            free = level
            if made is None and (needed := self.needed_by_rest(branches)):
                free = [b for b in level if b.root not in needed]
            chains = [[b, backings[b.root]] if b.root in backings else [b] for b in free]
            self.remove_chains(chains, patience, made)
            failures.update(self.collect())

    def needed_by_rest(self, going: Sequence[Branch]) -> set[str]:
        """What branches need that were to be removed and are still there."""
        kept = [self.live[root] for root in self.leaving if root in self.live]
        kept += [b for b in going if b.root in self.live]
        return {root for b in kept for root in b.needs}

    def remove_chains(
        self, chains: Sequence[list[Branch]], patience: float | None, made: Sequence[Entry] | None
    ) -> None:
        """Removes the branches of each chain in turn, as far as that goes."""

        def unmake(chain: list[Branch]) -> None:
            for branch in chain:
                entries = branch.entries if made is None else made
                problems: dict[str, Failure] = {}
                try:
                    self.await_io(branch)
                    self.undo_all(branch, [e for e in reversed(entries) if not e.ADMITS], problems)
                except OSError as e:
                    problems[branch.root] = Failure(branch, branch.entries[0], e)
                self.finished.append((branch, problems.get(branch.root)))
                if problems:
                    return

        if not chains or not self.threads or (patience is None and len(chains) <= 4):
            for chain in chains:
                unmake(chain)
        else:
            in_threads(chains, unmake, patience, self.wake)
            done = {branch.root for branch, _ in list(self.finished)}
            self.leaving.update(chain[0].root for chain in chains if chain[0].root not in done)

    def await_io(self, branch: Branch) -> None:
        """Waits until a disk that is gone has answered its clients, or its driver has in its place.

        The kernel would wait for that when the namespace is taken away, and nothing could end that wait, nor
        this process meanwhile. Raises IoPending when it is given up. Clients have lost the links by then;
        where they can go on writing, the kernel has to wait, which lets them do nothing more.
        """
        if not any(e.CLOSES for e in branch.entries):
            return
        pause = LOCK_POLL_SEC[0]
        while has_gone(branch.tag) and owes([self.live[r] for r in branch.needs if r in self.live]):
            now = time.monotonic()
            if now - self.owed.setdefault(branch.root, now) > LOCK_WAIT_SEC and self.ending:
                raise IoPending(errno.EBUSY, os.strerror(errno.EBUSY))
            time.sleep(pause)
            pause = min(pause * 1.5, LOCK_POLL_SEC[1])
        self.owed.pop(branch.root, None)

    def collect(self) -> dict[str, Failure]:
        """Takes note of removals that have ended; returns those that failed, by root."""
        failures = {}
        gone = []
        while self.finished:
            branch, failure = self.finished.pop()
            if branch.root in self.leaving:
                self.leaving.discard(branch.root)
                self.ended = True
            if failure is None:
                self.live.pop(branch.root, None)
                gone.append(branch)
            else:
                failures[branch.root] = failure
                if branch.root in self.live:
                    self.live[branch.root] = branch.to_compare()
        try:
            self.ledger.remove(*gone)
        except OSError as e:
            debug(f"Failed to note removals, ignoring: {reason_of(e)}")
        return failures


class Tree(Live):
    """What brings all that is live of ours to what is wanted; what fails half-way is undone."""

    def __init__(self, root: str, ledger: Ledger) -> None:
        super().__init__(root, ledger)
        self.present: dict[str, set[str]] = {}  # names in the directories in which something is to be made
        self.noted: set[str] = set()  # roots that the ledger has as about to be made

    def plan(self, wanted: Sequence[Branch], scaffolds: Sequence[Branch] = ()) -> Plan:
        """What has to be done so that just the wanted branches of ours are live. Changes nothing."""
        return Plan(self, wanted, scaffolds)

    def patch_for(self, have: Branch, want: Branch) -> Patch | None:
        """What to take away and to add for `want`; None if it has to be made anew."""
        paths = {e.path for e in want.entries}
        stale = [e for e in have.entries if e.LETTER and e.path not in paths]
        missing = [e for e in want.entries if not e.is_live(self.root)]
        if have.tag != want.tag or not all(e.LIVE for e in missing) or not all(e.ADMITS for e in stale):
            return None
        wrong = [e for e in missing if e.is_wrong(self.root)]
        return Patch(want, stale + wrong, missing)

    def apply(self, plan: Plan, patience: float | None = None) -> list[Failure]:
        """Does what is planned; returns what failed, what failed because of something else after that.

        Failed branches are gone, unless even their removal failed. Removals that take longer than `patience`
        seconds go on in the background (None: all are waited for).
        """
        failures: dict[str, Failure] = {}
        self.present, self.noted = {}, set()
        for patch in plan.patches:
            self.undo_all(patch.branch, patch.stale, failures)
        self.close(plan.scaffolds, failures)
        self.remove(plan.removals, patience, failures)
        for scaffold in plan.scaffolds:
            self.raise_scaffold(scaffold, failures)
        crowded = self.crowded()
        # What has the name of one of these could not be removed, or is still being removed.
        free = [b for b in plan.creations if b.root not in self.live]
        if crowded:
            free = [b for b in free if not any(e.crowd() in crowded for e in b.entries)]
        patches = {patch.branch.root: patch for patch in plan.patches}
        changed = [*free, *(patch.branch for patch in plan.patches)]
        for level in in_levels(changed):
            self.note([b for b in level if b.root not in patches])
            self.for_each(level, lambda branch: self.make(branch, patches.get(branch.root), failures))
        self.take_back([b for b in changed if b.root in self.noted and b.root not in self.live])
        there = [b for b in changed if b.root in self.live and b.root not in failures]
        for entries in together(there, patches):
            self.do_all(entries)
        # Once one disk lets clients in, they may ask for others, and give up those that do not yet.
        for branch in changed:
            if branch.root in self.live and branch.root not in failures and not is_doomed(failures):
                self.admit(branch, patches.get(branch.root), failures)
        for scaffold in plan.scaffolds:
            self.take_down(scaffold, failures)
        return list(failures.values())

    def do(self, entry: Entry, *, again: bool = False) -> None:
        """Makes an entry, or makes one `again` that clients use. Raises OSError."""
        entry.make(self.root)
        entry.guard(adopted=False)

    def do_all(self, entries: list[Entry]) -> None:
        """Makes entries of one kind that are made together."""
        entries[0].make_all(entries, self.root)

    def is_gone(self, path: str) -> bool:
        """Whether something that is there would not be, if the steps so far had been taken."""
        return False

    def is_taken(self, entry: Entry) -> bool:
        """Whether something of that name is there, made by others.

        A directory is read once for all that is made in it: for each name asked for, configfs goes through
        all that it has.
        """
        if entry.CONTENT:
            return False
        path = entry.path
        if not entry.LISTED:
            return bool(entry.identity(self.root)) and not self.is_gone(path)
        directory, _, name = path.rpartition("/")
        names = self.present.get(directory)
        if names is None:
            names = self.present[directory] = set(list_directory(self.root + directory))
        return name in names and not self.is_gone(path)

    def make(self, branch: Branch, patch: Patch | None, failures: dict[str, Failure]) -> None:
        """Makes a branch, or what a patch adds, but not what lets clients in; if what it needs is there.

        What a scaffold is for has to cope with it being missing.
        """
        if branch.root in failures:
            return
        for root in branch.needs:
            if cause := failures.get(root):
                failures[branch.root] = Failure(branch, branch.entries[0], cause.error, cause)
                return
        stands = all(root in self.live for root in branch.needs)
        if patch:
            self.amend(patch, failures)
        elif branch.root not in self.live and stands and not is_doomed(failures):
            self.create(branch, failures)

    def take_back(self, branches: Sequence[Branch]) -> None:
        """Notes that these were not made after all: whoever makes them later is another program."""
        try:
            self.ledger.remove(*branches)
        except OSError as e:
            debug(f"Failed to take back {len(branches)} intentions, ignoring: {reason_of(e)}")

    def note(self, branches: Iterable[Branch]) -> None:
        """Notes in one go which of these are about to be made. What fails is tried again for each alone."""
        coming = [b for b in branches if b.root not in self.live and not self.is_taken(b.entries[0])]
        if len(coming) > 1:
            try:
                self.ledger.add_all(coming)
                self.noted.update(b.root for b in coming)
            except OSError as e:
                debug(f"Failed to note {len(coming)} intentions, ignoring: {reason_of(e)}")

    def create(self, branch: Branch, failures: dict[str, Failure]) -> None:
        made: list[Entry] = []
        entry = branch.entries[0]
        noted = False
        try:
            if branch.root not in self.noted:
                if self.is_taken(branch.entries[0]):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                noted = True
                self.ledger.add(branch)
            noted = True
            for entry in branch.plain:
                if not entry.FOLLOWS:
                    self.do(entry)
                made.append(entry)
                if len(made) == 1:
                    self.ledger.confirm(branch, self.root)
        except OSError as e:
            failures[branch.root] = Failure(branch, entry, e)
            if noted:
                self.revoke(branch, made)
            return
        complete = len(made) == len(branch.entries)
        self.live[branch.root] = branch if complete else branch.to_compare()

    def amend(self, patch: Patch, failures: dict[str, Failure]) -> None:
        branch = patch.branch
        self.live[branch.root] = branch.to_compare()
        entry = branch.entries[0]
        try:
            if any(e.LETTER for e in patch.missing):
                self.ledger.add(branch, entry.identity(self.root))
            for entry in patch.missing:
                if not entry.ADMITS and not entry.TOGETHER:
                    self.do(entry, again=True)
        except OSError as e:
            failures[branch.root] = Failure(branch, entry, e)
            return
        if not any(e.ADMITS or e.TOGETHER for e in patch.missing):
            self.live[branch.root] = branch

    def admit(self, branch: Branch, patch: Patch | None, failures: dict[str, Failure]) -> None:
        """Makes what lets clients in. What cannot be completed is removed, unless clients use it."""
        admitting = [e for e in patch.missing if e.ADMITS] if patch else branch.admitting
        made = [*branch.plain, *branch.together]
        entry = branch.entries[0]
        try:
            for entry in admitting:
                self.do(entry, again=patch is not None)
                made.append(entry)
                if entry is branch.entries[0]:
                    self.ledger.confirm(branch, self.root)
        except OSError as e:
            failures[branch.root] = Failure(branch, entry, e)
            if not patch:
                self.revoke(branch, made)
            return
        self.live[branch.root] = branch

    def revoke(self, branch: Branch, made: Sequence[Entry]) -> None:
        """Takes away what was made of a branch that could not be made as a whole."""
        self.live[branch.root] = branch.to_compare()
        self.remove([self.live[branch.root]], None, {}, made)

    def close(self, scaffolds: Iterable[Branch], failures: dict[str, Failure]) -> None:
        """Closes scaffolds of a run that was killed: what they let in to could not be removed."""
        for have in [self.live[s.root] for s in scaffolds if s.root in self.live]:
            self.undo_all(have, [e for e in reversed(have.entries) if e.ADMITS], failures)

    def raise_scaffold(self, scaffold: Branch, failures: dict[str, Failure]) -> None:
        """Makes a scaffold, or opens one that had to stay."""
        have = self.live.get(scaffold.root)
        patch = self.patch_for(have, scaffold) if have else None
        if patch:
            self.undo_all(scaffold, patch.stale, failures)
        elif have:
            self.remove([have], None, failures)
        self.make(scaffold, patch, failures)
        if scaffold.root in self.live and scaffold.root not in failures:
            self.admit(scaffold, patch, failures)

    def take_down(self, scaffold: Branch, failures: dict[str, Failure]) -> None:
        """Removes a scaffold, or only closes it: the kernel removes no port while it waits for a disk."""
        if not (have := self.live.get(scaffold.root)) or scaffold.root in self.leaving:
            return
        if not self.leaving:
            self.remove([have], None, failures)
        elif self.undo_all(have, [e for e in reversed(have.entries) if e.ADMITS], failures):
            self.live[have.root] = have.to_compare()

    def for_each(self, branches: Sequence[Branch], work: Callable[[Branch], None]) -> None:
        """Does `work` for each branch in turn, and for many at a time where it is mostly waiting."""
        waiting = []
        for branch in branches:
            if self.threads and branch.waits:
                waiting.append(branch)
            else:
                work(branch)
        if len(waiting) == 1:
            work(waiting[0])
        elif waiting:
            in_threads(waiting, work, None, self.wake)


class Rehearsal(Tree):
    """A tree that shows its steps instead of taking them."""

    threads = False

    def __init__(self, root: str, ledger: Ledger, show: Callable[[dict[str, str]], None]) -> None:
        super().__init__(root, ledger)
        self.show = show
        self.gone: set[str] = set()  # paths of what would have been removed by now

    def do(self, entry: Entry, *, again: bool = False) -> None:
        if step := (entry.described_again if again else entry.described)(self.root):
            self.show(step)

    def do_all(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.do(entry)

    def undo(self, entry: Entry) -> None:
        if step := entry.undescribed(self.root):
            self.gone.add(entry.path)
            self.show(step)

    def is_gone(self, path: str) -> bool:
        return path in self.gone

    def await_io(self, branch: Branch) -> None:
        pass


# -----------------------------------------------------------------------------------------------------------
# 18. Stores of snapshots
# -----------------------------------------------------------------------------------------------------------


def meminfo() -> dict[str, int]:
    """The lines of proc(5)'s meminfo, in bytes; none if it cannot be read."""
    found = {}
    try:
        for line in read_bytes(PROC + "meminfo").split(b"\n"):
            fields = line.split()
            if len(fields) > 1 and fields[1].isdigit() and len(fields[1]) < 16:
                found[printable(fields[0].rstrip(b":"))] = int(fields[1]) * 1024
    except OSError:
        pass
    return found


def spare_memory() -> int:
    """How many bytes of memory can be filled for good, and the machine still has what it needs to run.

    What is in a memory file cannot be dropped or written out. If there were little else, the kernel would
    kill one process after the other, and then give up: "System is deadlocked on memory".
    """
    found = meminfo()
    part, least = MEMORY_KEPT
    spare = found.get("MemAvailable", 0) - max(found.get("MemTotal", 0) // part, least)
    if read_attribute(PROC + "sys/vm/overcommit_memory") == "2":
        spare = min(spare, found.get("CommitLimit", 0) - found.get("Committed_AS", 0))
    return max(0, spare)


def chunk_sectors(source: str) -> int:
    """The unit of a snapshot of a device or file, in sectors of 512 bytes.

    Of one that is overwritten as a whole, the kernel does not read what was there before, which may be
    unreadable. File systems write multiples of 4 KiB from their partition's beginning on. Larger units would
    be faster to read, and fill the memory with what lies beside scattered changes.
    """
    sysname = device_below(source)
    if not sysname or not device_number(source):
        return CHUNK_SECTORS
    chunk = CHUNK_SECTORS
    for name in partitions_of(sysname):
        start = read_attribute(f"{sys_block(name)}/start")
        while chunk > 1 and start.isdigit() and int(start) % chunk:
            chunk //= 2
    block = read_attribute(sys_block(sysname) + "/queue/logical_block_size")
    return max(chunk, int(block) // 512 if block.isdigit() else 1)


def snapshot_state(name: str) -> tuple[int, int, str] | None:
    """Used bytes of a snapshot's store, its limit in bytes, and OVERFLOW, INVALID or nothing.

    None if there is no such snapshot.
    """
    try:
        text = dm_target_text(bytes(dm_call(DM_TABLE_STATUS, name, flags=DM_NOFLUSH_FLAG)))
    except OSError:
        return None
    sectors, _, total = text.partition(" ")[0].partition("/")
    if sectors.isdigit() and total.isdigit():
        return int(sectors) * 512, int(total) * 512, ""
    operands = snapshot_operands(name)
    if text not in (OVERFLOW, INVALID) or not operands:
        return None
    size = read_attribute(f"{SYS}dev/block/{operands[1]}/size")
    size_bytes = int(size) * 512 if size.isdigit() else 0
    return size_bytes, size_bytes, text


def loop_status(fd: int) -> loop_info64:
    info = bytearray(ctypes.sizeof(loop_info64))
    fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    return loop_info64.from_buffer(info)


def set_autoclear(fd: int, *, on: bool) -> None:
    """Whether the kernel detaches a loop device on last close. Raises OSError."""
    info = loop_status(fd)
    info.lo_flags = info.lo_flags & ~LO_FLAGS_AUTOCLEAR | (LO_FLAGS_AUTOCLEAR if on else 0)
    fcntl.ioctl(fd, LOOP_SET_STATUS64, bytes(info))


def make_store_valid(number: str) -> None:
    """Takes back what the kernel has noted at the beginning of a store, /dev/loopNUMBER: that it is invalid.

    The format is that of struct disk_header in drivers/md/dm-snap-persistent.c. Raises OSError.
    """
    import mmap

    # Past the cache, which may have what udev read there before.
    fd = os.open(f"{DEV}loop{number}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        page = mmap.mmap(-1, 4096)
        if os.preadv(fd, [page], 0) != 4096 or page[:4] != b"SnAp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if page[4:8] != b"\1\0\0\0":
            page[4:8] = b"\1\0\0\0"
            os.pwritev(fd, [page], 0)
    finally:
        os.close(fd)


def kept_store(name: str) -> str:
    """The number of the loop device with the changes of a snapshot whose table is away. Raises OSError."""
    for loop in list_directory(SYS + "block"):
        backing = read_attribute(f"{SYS}block/{loop}/loop/backing_file") if loop.startswith("loop") else ""
        if backing.partition(" ")[0] == f"/memfd:{name}":
            return loop[4:]
    raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def device_numbers(dev: int) -> str:
    """MAJOR:MINOR of a number as device-mapper gives it (huge_encode_dev() in the kernel)."""
    return f"{os.major(dev)}:{os.minor(dev)}"


def dm_sectors(name: str) -> int:
    """The length of a device's first target. Raises OSError."""
    answer = bytes(dm_call(DM_TABLE_STATUS, name, flags=DM_STATUS_TABLE_FLAG))
    return int(dm_target_spec.from_buffer_copy(answer, dm_ioctl.from_buffer_copy(answer).data_start).length)


def snapshot_operands(name: str) -> list[str]:
    """A snapshot's table: origin and store as MAJOR:MINOR, "PO", and the unit; empty if it is none."""
    try:
        answer = bytes(dm_call(DM_TABLE_STATUS, name, flags=DM_STATUS_TABLE_FLAG))
    except OSError:
        return []
    fields = dm_target_text(answer).split(" ")
    return fields[:4] if len(fields) > 3 and fields[2] == "PO" else []


def snapshot_store(name: str) -> str:
    """MAJOR:MINOR of the device that a snapshot keeps its changes on; empty if there is no such snapshot."""
    return (snapshot_operands(name) or ["", ""])[1]


# -----------------------------------------------------------------------------------------------------------
# 19. Between a disk and its export
# -----------------------------------------------------------------------------------------------------------


class Mapping(Entry):
    """A device-mapper device of ours over another device or a regular file, under the path "dm/NAME".

    It is recognised by its name, which is its UUID as well, and changes with all that it is made of but the
    size. There is a loop device in between, which the kernel detaches with it, where the source is a file,
    or cannot be opened for writing or claimed. `store` is what a snapshot may keep in memory at first,
    `block` the size of a file's sectors, both in bytes.
    """

    __slots__ = ("block", "device", "store", "target")
    LETTER = "m"
    LIVE = WAITS = True

    abandoned: ClassVar[list[str]] = []  # names of those that others held when they were to be removed
    # Reads pass, all that would write fails (drivers/md/dm-flakey.c): up for 0 s, down for 1 s, always.
    READ_ONLY = "flakey"
    # Writes go to memory; when that is full, they fail, and reads go on (drivers/md/dm-snap.c).
    SNAPSHOT = "snapshot"
    # All passes (drivers/md/dm-linear.c).
    READ_WRITE = "linear"
    PARAMETERS: ClassVar[dict[str, str]] = {
        READ_ONLY: "{} 0 0 1 1 error_writes",
        SNAPSHOT: "{} {} PO {}",
        READ_WRITE: "{} 0",
    }

    def __init__(self, path: str, target: str = "", source: str = "", size: int = 0, block: int = 0) -> None:
        super().__init__(path, f"{source} {size // 512}")
        self.target = target
        self.block = block
        self.store = 0
        self.device = 0  # its device number, once it is made

    @classmethod
    def path_for(cls, name: str, *made_of: str) -> str:
        """The path for a device that people know as `name`."""
        clean = "".join(c if c.isascii() and (c.isalnum() or c in "+-.=_") else "_" for c in name)
        digest = sha256(utf8("\0".join((name, *made_of)))).hexdigest()
        return f"dm/{MAPPING_PREFIX}{clean[:80]}-{digest[:16]}"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def source(self) -> tuple[str, int]:
        """What it is made of, and its size in sectors of 512 bytes."""
        source, _, sectors = self.value.rpartition(" ")
        return source, int(sectors)

    def state(self) -> dm_ioctl | None:
        """What there is of it; None if there is nothing, or another program's. Raises OSError."""
        state = dm_status(self.name)
        return state if state and state.uuid == self.name.encode() else None

    def make(self, root: str) -> None:
        known = None
        try:
            dm_call(DM_DEV_CREATE, self.name, uuid=self.name)
        except OSError as e:
            if e.errno != errno.EBUSY or (known := self.state()) is None or known.flags & DM_DEFERRED_REMOVE:
                raise
        opened: list[int] = []
        try:
            self.load(known, opened)
            flags = DM_SKIP_LOCKFS_FLAG
            state = dm_ioctl.from_buffer_copy(dm_call(DM_DEV_SUSPEND, self.name, flags=flags))
            self.device = state.dev
            # Without a cache to flush there is nothing that a client without ill will gets an error for. It
            # takes the kernel 10 ms, and so is only done where there is one.
            if self.target == self.READ_ONLY and self.cache(state.dev) != "write through":
                write_attribute(self.cache_path(state.dev), "write through")
        except OSError:
            if known is None:
                self.unmake(root)
            raise
        finally:
            for fd in opened:
                os.close(fd)

    @staticmethod
    def cache_path(dev: int) -> str:
        return f"{SYS}dev/block/{device_numbers(dev)}/queue/write_cache"

    def cache(self, dev: int) -> str:
        """What kind of cache clients see: "write through" is none that they would have to flush."""
        return read_attribute(self.cache_path(dev))

    def load(self, known: dm_ioctl | None, opened: list[int]) -> None:
        """Loads its table. What has to stay open until it is in use is added to `opened`."""
        source, sectors = self.source()
        operands = [device_number(source) or source]
        if self.target == self.SNAPSHOT:
            operands += self.store_and_unit(known, opened)
        if operands[0] != source:
            try:
                self.load_table(sectors, operands)
                return
            except OSError as e:
                # In use, so that it cannot be claimed, or write-protected, so that sd(4) refuses to open it.
                if e.errno not in (errno.EBUSY, errno.EROFS, errno.EACCES):
                    raise
        writable = self.target == self.READ_WRITE
        fd = os.open(source, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            # Clients find partitions by the numbers of sectors, which have to be as large as the disk's.
            block = self.block or logical_block_size(source)
            direct = writable or self.block > 0
            loop, number = attach_loop(fd, read_only=not writable, block=block, direct=direct)
        finally:
            os.close(fd)
        opened.append(loop)
        self.load_table(sectors, [f"7:{number}", *operands[1:]])

    def store_and_unit(self, known: dm_ioctl | None, opened: list[int]) -> tuple[str, str]:
        """Where a snapshot keeps changes, MAJOR:MINOR, and its unit in sectors."""
        active = known is not None and known.flags & DM_ACTIVE_PRESENT_FLAG
        if active and (operands := snapshot_operands(self.name)):
            return operands[1], operands[3]
        chunk = str(chunk_sectors(self.source()[0]))
        if active:
            # An earlier run was killed while the table was away.
            kept = kept_store(self.name)
            opened.append(os.open(f"{DEV}loop{kept}", os.O_RDWR | os.O_CLOEXEC))
            set_autoclear(opened[-1], on=True)
            make_store_valid(kept)
            return f"7:{kept}", chunk
        if spare_memory() < STORE_COST:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        fd = os.memfd_create(self.name, os.MFD_CLOEXEC)
        try:
            # It takes no room before it is written to.
            os.ftruncate(fd, 1 << 62)
            loop, number = attach_loop(fd, read_only=False, limit=self.store)
        finally:
            os.close(fd)
        opened.append(loop)
        return f"7:{number}", chunk

    def load_table(self, sectors: int, operands: Sequence[str]) -> None:
        parameters = self.PARAMETERS[self.target].format(*operands)
        dm_call(DM_TABLE_LOAD, self.name, table=dm_table(sectors, self.target, parameters))

    def guard(self, *, adopted: bool) -> None:
        try:
            if not self.sysname() or claim(self.path, self.node()) != errno.EBUSY:
                return
        except OSError as e:
            debug(f"Failed to claim '{self.name}', ignoring: {reason_of(e)}")
            return
        fact, commands = what_holds(self.sysname())
        disk, fact = mapped_disk(self.sysname()), fact or f"something has '{self.node()}' open"
        warning(
            f"This machine itself uses the export of '{disk}', and what it writes there is lost: {fact}; "
            f"end that{in_brackets(commands)}"
        )

    def unmake(self, root: str) -> None:
        release(self.path)
        deadline = time.monotonic() + BUSY_SEC
        # One of an earlier run may be of any kind.
        if self.target in ("", self.SNAPSHOT) and self.state() is not None:
            self.let_go_of_store()
        while True:
            try:
                # By the UUID, so that it cannot be another program's.
                dm_call(DM_DEV_REMOVE, "", uuid=self.name)
                return
            except OSError as e:
                if e.errno in NO_DEVICE:
                    return
                # udev or a disk monitor may be looking at it. What has claimed it stays.
                if e.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline or claim(self.path, self.node()) == errno.EBUSY:
                    self.abandon()
                    return
                release(self.path)
                time.sleep(LOCK_POLL_SEC[0])

    def let_go_of_store(self) -> None:
        """Has the kernel detach a snapshot's store with it.

        A run that was killed while it revived the snapshot has left the store so that it would stay.
        """
        try:
            answer = bytes(dm_call(DM_TABLE_STATUS, self.name, flags=DM_STATUS_TABLE_FLAG))
            spec = dm_target_spec.from_buffer_copy(answer, dm_ioctl.from_buffer_copy(answer).data_start)
            number = snapshot_store(self.name).partition(":")[2]
            if spec.target_type == b"error":
                number = kept_store(self.name)
            if not number:
                return
            fd = os.open(f"{DEV}loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not loop_status(fd).lo_flags & LO_FLAGS_AUTOCLEAR:
                    set_autoclear(fd, on=True)
            finally:
                os.close(fd)
        except OSError as e:
            debug(f"Failed to let go of what '{self.name}' has kept, ignoring: {reason_of(e)}")

    def abandon(self) -> None:
        """Has the kernel remove it on last close, and says who has it open."""
        fact, commands = what_holds(self.sysname())
        disk, fact = mapped_disk(self.sysname()), fact or f"something has '{self.node()}' open"
        dm_call(DM_DEV_REMOVE, self.name, flags=DM_DEFERRED_REMOVE)
        self.abandoned.append(self.name)
        error(
            f"'{disk}' is no longer exported, but still in use: {fact}; "
            f"end that{in_brackets(commands)}, and it is free"
        )

    def sysname(self) -> str:
        """The kernel's name for it; empty if there is none."""
        if not self.device and (state := self.state()):
            self.device = state.dev
        return f"dm-{os.minor(self.device)}" if self.device else ""

    def node(self) -> str:
        return DEV + self.sysname()

    def place(self, root: str) -> str:
        return DEV + "mapper/" + self.name

    def identity(self, root: str) -> str:
        try:
            return self.name if self.sysname() else ""
        except OSError:
            return ""

    def owes(self) -> bool:
        return is_busy(name) if (name := self.sysname()) else False

    def is_live(self, root: str) -> bool:
        try:
            state = self.state()
        except OSError:
            return False
        if state is None or not state.flags & DM_ACTIVE_PRESENT_FLAG or state.flags & DM_SUSPEND_FLAG:
            return False
        if self.target == self.SNAPSHOT and not snapshot_operands(self.name):
            return False
        if self.target == self.READ_ONLY and self.cache(state.dev) != "write through":
            return False
        size = read_attribute(f"{SYS}dev/block/{device_numbers(state.dev)}/size")
        return size == str(self.source()[1])

    def described(self, root: str) -> dict[str, str]:
        source, sectors = self.source()
        operands = source, "MEMORY", chunk_sectors(source)
        table = f"0 {sectors} {self.target} " + self.PARAMETERS[self.target].format(*operands)
        command = f"dmsetup create {self.name} --uuid {self.name} --table {quoted(table)}"
        return {"step": "map", "path": DEV + "mapper/" + self.name, "value": table, "command": command}

    def described_again(self, root: str) -> dict[str, str]:
        description = self.described(root)
        try:
            if self.state() is not None:
                table = quoted(description["value"])
                reload = f"dmsetup reload {self.name} --table {table}"
                description["command"] = f"{reload} && dmsetup resume {self.name}"
        except OSError as e:
            debug(f"Failed to look at '{self.name}', ignoring: {reason_of(e)}")
        return description

    def undescribed(self, root: str) -> dict[str, str]:
        path = DEV + "mapper/" + self.name
        return {"step": "unmap", "path": path, "command": f"dmsetup remove {self.name}"}


class LentMapping(Mapping):
    """One that the kernel claims for an export by itself, and could not if this process had."""

    __slots__ = ()
    LETTER = "v"

    def guard(self, *, adopted: bool) -> None:
        pass


class Writable(Entry):
    """A block device that clients write to, and that is claimed meanwhile: "disk/" and its tag.

    Clients may change the partition table, of which the kernel takes no notice. So that is read again in the
    end, unless the device is gone by then or nothing was written. `value` is the kernel's name, if known. It
    is not claimed where it is `mapped`: then our device over it has it.
    """

    __slots__ = ("mapped",)
    LETTER = "w"

    PREFIX = "disk/"
    written: ClassVar[dict[str, str]] = {}  # by path: the sectors written to the device before the export

    def __init__(self, path: str, value: str = "", *, mapped: bool = False) -> None:
        super().__init__(path, value)
        self.mapped = mapped

    @classmethod
    def path_for(cls, tag: str) -> str:
        return cls.PREFIX + tag.replace(" ", "-")

    def sysname(self) -> str:
        """The kernel's name of the device; empty if it is gone."""
        return sysname_tagged(self.path[len(self.PREFIX) :].replace("-", " "))

    def place(self, root: str) -> str:
        return device_node(name) if (name := self.sysname()) else self.path

    def identity(self, root: str) -> str:
        return self.path

    def owes(self) -> bool:
        return is_busy(name) if (name := self.sysname()) else False

    def guard(self, *, adopted: bool) -> None:
        if (name := self.sysname() if adopted else self.value) and not self.mapped:
            claim(self.path, device_node(name))
        if name and not adopted:
            self.written[self.path] = sectors_written(name)

    def unmake(self, root: str) -> None:
        release(self.path)
        before = self.written.pop(self.path, "")
        if not (name := self.sysname()):
            return
        counted = before and read_attribute(sys_block(name) + "/queue/iostats") == "1"
        if not counted or before != sectors_written(name):
            reread_partitions(name)

    def undescribed(self, root: str) -> dict[str, str] | None:
        if not (name := self.sysname()):
            return None
        path = device_node(name)
        return {"step": "reread", "path": path, "command": f"blockdev --rereadpt {path}"}


class LentHome(Entry):
    """A home directory in a file that clients write to: "home/" and its path.

    What they shrank in it is made as large again in the end as the file is.
    """

    __slots__ = ()
    LETTER = "r"
    PREFIX = "home/"

    def node(self) -> str:
        return self.path[len(self.PREFIX) :]

    def place(self, root: str) -> str:
        return self.node()

    def identity(self, root: str) -> str:
        return self.path

    def unmake(self, root: str) -> None:
        try:
            # The lock of a run that was killed is gone, so that somebody may have logged in here since.
            if use := Usage().of_file(self.node()):
                warning(
                    f"'{self.node()}' was exported until now and is used here, too ({use}), so both may "
                    "have written to it; log out here, and log in again to have its file system checked"
                )
            elif widen_partition(self.node()):
                debug(f"The partition in '{self.node()}' is as large as the file again")
        except OSError as e:
            warning(
                f"Failed to make the partition in '{self.node()}' as large as the file: {reason_of(e)}; "
                "what clients shrank stays small"
            )

    def undescribed(self, root: str) -> dict[str, str]:
        command = f"echo ', +' | sfdisk -N 1 {quoted(self.node())}"
        return {"step": "widen", "path": self.node(), "command": command}


def sectors_written(sysname: str) -> str:
    """The count of sectors written to a block device so far; empty if it is not known."""
    try:
        return os.fsdecode(b"".join(read_page(sys_block(sysname) + "/stat").split()[6:7]))
    except OSError:
        return ""


def reread_partitions(sysname: str) -> None:
    """Has the kernel read a disk's partition table again; says why if it cannot. Raises nothing."""
    node = device_node(sysname)
    deadline = time.monotonic() + BUSY_SEC
    while True:
        try:
            fd = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, BLKRRPART)
            finally:
                os.close(fd)
            return
        except OSError as e:
            # EINVAL: it can have no partitions.
            if e.errno in (errno.EINVAL, errno.ENOTTY, errno.ENOMEDIUM, errno.ENXIO, errno.ENOENT):
                return
            use = what_uses(sysname) if e.errno == errno.EBUSY else ""
            if e.errno == errno.EBUSY and not use and time.monotonic() < deadline:
                time.sleep(LOCK_POLL_SEC[0])
                continue
            reason = use or reason_of(e)
            warning(
                f"The kernel may have an old partition table of '{node}', which was exported read-write: "
                f"{reason}; end that use, then run 'blockdev --rereadpt {node}' before you use a partition"
            )
            return


def what_uses(sysname: str) -> str:
    """How the system uses a block device; empty if it does not, or if that is not known."""
    try:
        return Usage().of(sysname)
    except OSError:
        return ""


class MappedNode(Attribute):
    """An attribute that takes the node of `mapping`."""

    __slots__ = ("mapping",)

    def __init__(self, path: str, mapping: Mapping) -> None:
        super().__init__(path, mapping.path)
        self.mapping = mapping

    def text(self) -> str:
        return self.mapping.node() if self.mapping.sysname() else ""

    def is_live(self, root: str) -> bool:
        try:
            return read_attribute(root + self.path) == (self.text() or "?")
        except OSError:
            return False

    def described(self, root: str) -> dict[str, str]:
        # Its number is not known before it is made.
        return Attribute(self.path, f"{DEV}mapper/{self.mapping.name}").described(root)


def mapping_target(disk: Disk, access: str, *, lent: bool = False) -> str:
    """The kind of device-mapper device between a disk and its export; empty if there is none."""
    if access == READ_WRITE:
        # nvmet would give a file the block size of its file system, and cannot be stopped for a moment.
        return Mapping.READ_WRITE if lent or disk.block or disk.is_drive() else ""
    return Mapping.READ_ONLY if access == READ_ONLY else Mapping.SNAPSHOT


def backing(disk: Disk, access: str, instance: str, *, lent: bool = False) -> Branch:
    """What stands between a disk and all that it is exported by, for this kind of access.

    `instance` tells its device-mapper device from that of another program of this kind for the same disk.
    With `lent` there always is one, which the kernel claims for an export.
    """
    entries: list[Entry] = []
    target = mapping_target(disk, access, lent=lent)
    if access == READ_WRITE and disk.sysname:
        # Before the mapping, so that it comes after that when all is taken away.
        entries.append(Writable(Writable.path_for(disk.tag), disk.sysname, mapped=bool(target)))
    elif access == READ_WRITE and disk.home:
        entries.append(LentHome(LentHome.PREFIX + disk.node))
    if target:
        path = Mapping.path_for(disk.name, instance, disk.tag, disk.node, target)
        kind = LentMapping if lent else Mapping
        entries.append(kind(path, target, disk.node, disk.size, disk.block))
    return Branch(disk.tag, entries)


def mapping_of(branch: Branch | None) -> Mapping | None:
    """The device-mapper device of a backing; None if it has none."""
    # In a backing there is nothing above it.
    last = branch.entries[-1] if branch else None
    return last if isinstance(last, Mapping) else None


def live_mappings(live: dict[str, Branch], target: str) -> list[Mapping]:
    """The live device-mapper devices of a kind."""
    return [m for m in map(mapping_of, live.values()) if m and m.target == target]


def lacking_modules(disk: Disk, access: str, *, lent: bool = False) -> list[str]:
    """The kernel's modules that a kind of access needs and that are neither there nor can be loaded."""
    target = mapping_target(disk, access, lent=lent)
    if not target:
        return []
    lacking = []
    if not os.path.exists(SYS + "class/misc/device-mapper"):
        load_module("dm-mod")
    if not os.path.exists(DEV + "mapper/control"):
        lacking.append("dm-mod")
    elif (
        target != Mapping.READ_WRITE
        and not has_target(target)
        and (load_module(f"dm-{target}") or not has_target(target))
    ):
        lacking.append(f"dm-{target}")
    if not os.path.exists(SYS + "class/misc/loop-control"):
        load_module("loop")
    if (access == SNAPSHOT or disk.block) and not os.path.exists(DEV + "loop-control"):
        lacking.append("loop")
    return lacking


def has_target(target: str) -> bool:
    """Whether device-mapper has this kind of target now."""
    try:
        answer = bytes(dm_call(DM_LIST_VERSIONS, ""))
    except OSError:
        return False
    return b"\0" + target.encode() + b"\0" in answer


def why_not_backed(failure: Failure, disk: Disk, access: str) -> str:
    """Why a disk cannot be protected from its clients, and what to do instead."""
    problem = failure.error
    lent = isinstance(mapping_of(failure.branch), LentMapping)
    if not (lacking := lacking_modules(disk, access, lent=lent)):
        reason = reason_of(problem)
        name = failure.entry.path.rpartition("/")[2]
        if problem.errno == errno.EBUSY:
            mapping = Mapping(failure.entry.path)
            if mapping.state():
                fact, commands = what_holds(mapping.sysname())
                return f"its last export is still in use: {fact}; end that{in_brackets(commands)}"
            return f"another program made the device-mapper device '{name}'; remove it with 'dmsetup remove'"
        if problem.errno == errno.ENODATA:
            return "what clients had changed is lost; stop storagetm and start it again"
        if problem.errno == errno.ENOMEM and access == SNAPSHOT:
            return "too little memory is left for a snapshot; give --read-only or --read-write, or free some"
        return f"it cannot be exported {access}, since device-mapper says: {reason}"
    missing = " and ".join(f"'{name}'" for name in lacking)
    advice = f"{access} access needs {missing}, which this kernel does not have; install it"
    working = [mode for mode in ACCESS if mode != access and not lacking_modules(disk, mode, lent=lent)]
    if not working:
        return advice
    return f"{advice}, or give --access={quoted(disk.node)}:{working[0]}, which would work"


# -----------------------------------------------------------------------------------------------------------
# 20. Memory and media
# -----------------------------------------------------------------------------------------------------------


class Memory:
    """What all snapshots together may keep in memory, in bytes.

    Each has a store of its own with a limit. The limits are moved as the stores fill and as the machine's
    memory does, and add up to no more than `size` at any time. `asked` is what was asked for; without that,
    half of what is available at the start.
    """

    def __init__(self, asked: int = 0) -> None:
        self.asked = asked
        self.most = asked
        self.size = 0
        # By name: used and limit, and what keeps it from being written to: OVERFLOW, or nothing.
        self.filled: dict[str, tuple[int, int, str]] = {}
        self.repaired: set[str] = set()  # those that had been invalid at the last look
        self.lost: set[str] = set()  # those that still are

    @property
    def used(self) -> int:
        return sum(used for used, _, _ in self.filled.values())

    @property
    def full(self) -> bool:
        return any(trouble for _, _, trouble in self.filled.values())

    @property
    def pause(self) -> float:
        """In how many seconds to look again, so that none runs full before while others have room."""
        slack = [limit - used for used, limit, trouble in self.filled.values() if not trouble]
        shortest, longest = STORE_POLL_SEC
        # The last bits are not worth the looking.
        if len(slack) < 2 or self.size - self.used < len(slack) * STORE_MIN // 8:
            return longest
        return min(max(shortest, len(slack) / 1000, min(slack) / STORE_FILL / 2), longest)

    def measure(self) -> None:
        """Brings `size` up to date: what is used and what can be spared now, but no more than asked for."""
        if not self.most:
            self.most = max(STORE_MIN, meminfo().get("MemAvailable", 0) // 2)
        self.size = max(self.used, min(self.most, self.used + spare_memory()))

    def share(self, live: Iterable[Mapping], coming: Sequence[Mapping] = ()) -> None:
        """Looks how full the stores are, and divides what is left among them and those that are coming."""
        self.filled, self.repaired, self.lost = {}, set(), set()
        stores = {m.name: m for m in live}
        for name in stores:
            if state := self.look(name):
                self.filled[name] = state
        sharers = len(self.filled) + len(coming)
        if not sharers:
            return
        self.measure()
        part = max(0, self.size - self.used) // sharers & ~0xFFF
        # Shrink first, to make room. A snapshot is suspended while it shrinks, so ignore small differences.
        for name, (used, limit, trouble) in self.filled.items():
            if limit - used - part > part // 4 and not trouble:
                self.move(name, used + part, part, shrinks=True)
        room = self.size - sum(limit for _, limit, _ in self.filled.values())
        for mapping in coming:
            mapping.store = max(min(part, room) & ~0xFFF, STORE_MIN // 8)
            room -= mapping.store
        for name, (used, limit, trouble) in self.filled.items():
            more = min(used + part - limit, room)
            # One that ran full is not to run full again in a moment.
            if more > (max(STORE_COST, self.size // 16) if trouble else part // 4):
                self.move(name, limit + more, part, shrinks=False)
                room -= self.filled[name][1] - limit

    def look(self, name: str) -> tuple[int, int, str] | None:
        """How full a store is. One that has become invalid is made valid first."""
        state = snapshot_state(name)
        if state is None or state[2] != INVALID or not SUSPENDING.acquire(False):
            return state
        try:
            revive_snapshot(name)
            self.repaired.add(name)
            return snapshot_state(name)
        except OSError as e:
            debug(f"Failed to revive '{name}': {reason_of(e)}")
            self.lost.add(name)
            return None
        finally:
            SUSPENDING.release()

    def move(self, name: str, limit: int, slack: int, *, shrinks: bool) -> None:
        used, _, trouble = self.filled[name]
        if not SUSPENDING.acquire(False):
            return  # a drive is being looked into; soon there is another try
        try:
            limit = set_snapshot_limit(name, limit, slack, shrinks)
            if trouble:
                revive_snapshot(name)
            self.filled[name] = used, limit, ""
        except OSError as e:
            debug(f"Failed to change the limit of '{name}', ignoring: {reason_of(e)}")
            if trouble and not snapshot_operands(name):
                self.lost.add(name)
        finally:
            SUSPENDING.release()


class MediumWatch:
    """Looks into drives whose media are exported, so that no client's command reaches the next medium.

    When a medium was exchanged, the kernel fails all commands, but only until somebody asks whether it was:
    then it lets them pass again (sd_check_events() in drivers/scsi/sd.c). So it is kept from asking itself,
    as it does every 2 s. It is asked here, while all I/O is held back in our device over the drive. What has
    waited then finds the same medium, or none at all. A drive may take long to answer, so that a thread does
    it.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        # Node, tag of the medium and what is over it, by the kernel's name of the drive. Not the disk, which
        # may be read again while the thread looks.
        self.watched: dict[str, tuple[str, str, Mapping]] = {}
        self.mutex = _thread.allocate_lock()
        self.runs = False

    def watch(self, exports: Iterable[Export]) -> None:
        """Watches the drives among these disks, as far as they are exported, and no others."""
        found = {}
        for export in exports:
            disk, between = export.disk, export.backing
            if disk.is_drive() and export.live and between and (mapping := mapping_of(between)):
                found[disk.sysname] = disk.node, between.tag, mapping
        with self.mutex:
            self.watched = found
        for name in [n for n in list_directory(RUN) if n.startswith(POLL_NOTE)]:
            if name[len(POLL_NOTE) :] not in found:
                self.restore(name[len(POLL_NOTE) :])
        for name in found:
            self.keep_from_asking(name)
        if found and not self.runs:
            self.runs = True
            _thread.start_new_thread(self.run, ())

    @staticmethod
    def keep_from_asking(sysname: str) -> None:
        """Switches the kernel's own looking off, and notes what it was."""
        poll, note = sys_block(sysname) + "/events_poll_msecs", RUN + POLL_NOTE + sysname
        try:
            if not os.path.exists(note):
                write_new_file(note, read_page(poll))
            if read_attribute(poll) != "0":
                write_attribute(poll, "0")
        except OSError as e:
            debug(f"Failed to keep the kernel from looking for media, ignoring: {reason_of(e)}")

    @staticmethod
    def restore(sysname: str) -> None:
        try:
            write_attribute(
                sys_block(sysname) + "/events_poll_msecs", read_attribute(RUN + POLL_NOTE + sysname)
            )
        except OSError as e:
            debug(f"Failed to have the kernel look for media again, ignoring: {reason_of(e)}")
        try:
            os.unlink(RUN + POLL_NOTE + sysname)
        except OSError:
            pass

    def run(self) -> None:
        while True:
            time.sleep(MEDIUM_POLL_MSEC / 1000)
            with self.mutex:
                watched = list(self.watched.items())
                self.runs = bool(watched)
            if not watched:
                return
            for sysname, (node, tag, mapping) in watched:
                try:
                    if not self.is_same(sysname, node, tag, mapping):
                        self.wake()
                except OSError as e:
                    debug(f"Failed to look into '{node}', ignoring: {reason_of(e)}")

    @staticmethod
    def is_same(sysname: str, node: str, tag: str, mapping: Mapping) -> bool:
        """Whether the medium is still in. If not, all I/O fails from now on. Raises OSError."""
        with SUSPENDING:
            same = False
            dm_call(DM_DEV_SUSPEND, mapping.name, flags=DM_SUSPEND_FLAG | DM_SKIP_LOCKFS_FLAG)
            try:
                # This is what asks.
                os.close(os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                same = tag == " ".join(parse_block_uevent(read_page(sys_device(sysname) + "/uevent")))
            finally:
                if not same:
                    sectors = mapping.source()[1]
                    dm_call(DM_TABLE_LOAD, mapping.name, table=dm_table(sectors, "error", ""))
                dm_call(DM_DEV_SUSPEND, mapping.name, flags=DM_SKIP_LOCKFS_FLAG)
        return same


def set_snapshot_limit(name: str, limit: int, slack: int, shrinks: bool) -> int:
    """Sets the size of a snapshot's store; the new one, in bytes. Raises OSError.

    What is in the store must stay inside. So that it does not grow meanwhile, the snapshot is stopped while
    the store shrinks.
    """
    number = snapshot_store(name).rpartition(":")[2]
    fd = os.open(f"{DEV}loop{number}", os.O_RDWR | os.O_CLOEXEC)
    if shrinks:
        dm_call(DM_DEV_SUSPEND, name, flags=DM_SUSPEND_FLAG | DM_SKIP_LOCKFS_FLAG)
    try:
        if shrinks and (state := snapshot_state(name)):
            limit = max(limit, state[0] + slack // 2)
        info = loop_status(fd)
        info.lo_sizelimit = limit & ~0xFFF
        fcntl.ioctl(fd, LOOP_SET_STATUS64, bytes(info))
    finally:
        if shrinks:
            dm_call(DM_DEV_SUSPEND, name, flags=DM_SKIP_LOCKFS_FLAG)
        os.close(fd)
    return limit & ~0xFFF


def revive_snapshot(name: str) -> None:
    """Has the kernel begin anew with the store of a snapshot that has run full or become invalid.

    When something to be copied cannot be read, the kernel marks the snapshot as invalid and fails all I/O
    from then on, but what clients have changed before is still in the store. And one that ran full takes no
    more writes, even if there is room again. A new table reads the store, once the old one is gone. Raises
    OSError, and then the changes are lost.
    """
    operands = snapshot_operands(name)
    if not operands:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    origin, store, _, chunk = operands
    sectors = dm_sectors(name)
    fds: list[int] = []
    try:
        for number in (x.partition(":")[2] for x in (store, origin) if x.startswith("7:")):
            fds.append(os.open(f"{DEV}loop{number}", os.O_RDWR if not fds else os.O_RDONLY))
        # If this process is killed in between, the next one finds it.
        set_autoclear(fds[0], on=False)
        dm_replace(name, dm_table(sectors, "error", ""))
        make_store_valid(store.partition(":")[2])
        table = dm_table(sectors, Mapping.SNAPSHOT, f"{origin} {store} PO {chunk}")
        try:
            dm_replace(name, table)
        except OSError:  # for want of memory: what the old table had is free in a moment
            time.sleep(LOCK_POLL_SEC[0])
            dm_replace(name, table)
    finally:
        if fds:
            set_autoclear(fds[0], on=True)
        for fd in fds:
            os.close(fd)


# -----------------------------------------------------------------------------------------------------------
# 21. Transports
# -----------------------------------------------------------------------------------------------------------


# Before you add a transport
#
# A transport is a class derived from Transport, in a section of its own. It says which branches make a
# disk reachable, and nothing else. To make and remove them, to note them, to take them over after a crash,
# to show them in a dry run: that is for the tree, which knows no transport. So
#
# - think of what the kernel has when the process is killed after each step, and when the step fails: a
#   branch's first entry has to tell whose it is (Entry.identity()), and what lets clients in is the last
#   (ADMITS);
# - put into common() what there is however many disks there are; into branch() what makes one disk
#   reachable, which needs the disk's backing, so that all transports share that; into scaffolds() what only
#   has to be there while others are made;
# - see to it that what a client has attached never turns into something else: numbers and names follow from
#   Export.stay;
# - say in `cached` if the kernel's page cache is in between, and in CLAIMS if it claims what it exports;
# - name in attached() all who have disks, or the screen calls it safe to switch this machine off;
# - put right in explain() what would mislead people.
#
# Then add the class to TRANSPORTS. Outside this file there are: the manual page and README; the modprobe
# lines of units/storagetm.service; the tests of kills and failures at each step, and of what clients see.


class Client:
    """Somebody who has disks, as far as a transport knows.

    `who` tells it from others, as people know it; `since` is when it was first seen, in hours and minutes.
    `connections` is 0 where these are not counted, and `encrypted` None if nobody knows.
    """

    __slots__ = ("cipher", "connections", "encrypted", "since", "who")

    def __init__(
        self, who: str, since: str, connections: int = 0, *, encrypted: bool | None = None, cipher: str = ""
    ) -> None:
        self.who = who
        self.since = since
        self.connections = connections
        self.encrypted = encrypted
        self.cipher = cipher  # and the protocol's version, if it is encrypted

    def about(self) -> str:
        """What there is to say of it."""
        count = f"{self.connections} connection{'s' if self.connections > 1 else ''}"
        how = "" if self.encrypted is None else "encrypted" if self.encrypted else "not encrypted"
        parts = [f"since {self.since}", count * bool(self.connections), how]
        return f"{self.who}: {', '.join(filter(None, parts))}" + (f" ({self.cipher})" if self.cipher else "")


class Arrivals:
    """Since when who is there has been so: from when it was first seen, which the kernel does not tell."""

    def __init__(self) -> None:
        self.times: dict[str, str] = {}

    def since(self, present: Iterable[str]) -> dict[str, str]:
        """The times of those who are there now. All others are new when they come again."""
        now = time.strftime("%H:%M")
        self.times = {who: self.times.get(who, now) for who in present}
        return self.times

    def clients(self, connections: Iterable[Connection]) -> list[Client]:
        """Whose these connections are, by address."""
        found: dict[str, list[Connection]] = {}
        for connection in connections:
            found.setdefault(connection.address, []).append(connection)
        times = self.since(sorted(found))
        clients = []
        for who, since in times.items():
            # One that is not encrypted gives away what goes over it.
            worst = min(found[who], key=lambda c: bool(c.encrypted))
            clients.append(
                Client(who, since, len(found[who]), encrypted=worst.encrypted, cipher=worst.cipher)
            )
        return clients


class Transport:
    """One way to hand disks out. It knows no screen, no lock and no other transport."""

    name = ""  # as options, the ledger and JSON have it
    restricted = False  # whether only some clients are to be let in
    modules: tuple[str, ...] = ()  # the kernel's, as modprobe(8) knows them
    cached = False  # whether the kernel's page cache is in between
    CLAIMS = False  # whether the kernel claims what it exports in this way, as nobody else can then

    def prepare(self) -> None:
        """Loads what the kernel lacks. Raises UserError if it cannot do this at all."""

    def check(self, exports: Iterable[Export]) -> None:
        """Raises UserError for what makes a start senseless, before anything is exported."""

    def adopt(self, live: dict[str, Branch]) -> None:
        """Goes on with what an earlier run has left `live`, by root."""

    def follow(self, held: Callable[[], list[Address]]) -> bool:
        """Takes note of where it can listen, which `held` tells; True if something else is wanted then.

        Called at the start, once it has adopted, and when addresses have changed. Raises OSError.
        """
        return False

    def arrange(self, exports: Sequence[Export], live: dict[str, Branch]) -> None:
        """Makes room for these disks, before anything else is asked about them. `live` is what is ours."""

    def why_not(self, export: Export) -> str:
        """Why a disk cannot be exported in this way, whatever the kernel says; empty if it can."""
        return self.why_never(export)

    def why_never(self, export: Export) -> str:
        """The same, where only other options would change it."""
        return ""

    def root(self, export: Export) -> str:
        """The root of the disk's branch."""
        raise NotImplementedError

    def basis(self) -> object:
        """What branches and why_not() are computed from beside the disk: with it equal, they are."""
        return None

    def common(self) -> list[Branch]:
        """What there is however many disks there are."""
        return []

    def scaffolds(self, live: dict[str, Branch]) -> list[Branch]:
        """What only has to be there while something else is made. `live` is what is ours, by root."""
        return []

    def branch(self, export: Export, between: Branch) -> Branch:
        """What makes a disk reachable, by way of what stands `between`."""
        raise NotImplementedError

    def keeps(self, live: Branch) -> bool:
        """Whether what an earlier run has made of a disk may stay as it is, while the disk is waited for."""
        return True

    def adapt(self, failure: Failure) -> bool:
        """Changes what is wanted after a failure; False if nothing could be changed."""
        return False

    def explain(self, failure: Failure) -> str:
        """Why the kernel would not do a step of this transport, where errno would mislead; or else empty."""
        return ""

    def about_twins(self, kind: str) -> str:
        """What to do about two disks with the same identity of a kind; empty if it is their own."""
        return ""

    @property
    def due(self) -> float:
        """When to try something again, in seconds of the monotonic clock; 0 for never."""
        return 0.0

    def note(self, live: dict[str, Branch]) -> None:
        """Called after each change, with what is live then, by root."""

    def try_again(self, live: dict[str, Branch]) -> None:
        """Has the next change try again what is due."""

    def end(self) -> None:
        """Called after a clean stop, when nothing is exported any longer."""

    def limit(self, access: str) -> int:
        """How many clients may attach a disk at a time; 0 for any."""
        return 0

    def news(self, outdate: Callable[[], None]) -> list[News]:
        """What it waits for, once disks are exported. Calls `outdate` when something to show has changed."""
        return []

    # What people are told

    together = False  # whether one command attaches all disks, which then have numbers
    NUMBERED = ""  # what those are called that have the numbers

    def label(self, export: Export) -> str:
        """What clients call a disk."""
        raise NotImplementedError

    def number_text(self, export: Export) -> str:
        """A disk's number, where clients tell disks by that; else empty."""
        return ""

    def serial_shown(self, export: Export) -> str:
        """A disk's serial number as clients see it, or where they see none, as people know it."""
        return export.disk.serial or export.disk.id_serial

    def instructions(self, exports: Iterable[Export], addresses: Sequence[Address]) -> list[Instruction]:
        """What attaches all disks at each address, then what attaches each one at the first address."""
        raise NotImplementedError

    def way(self, addresses: Sequence[Address]) -> Way:
        """How clients come in."""
        raise NotImplementedError

    def attached(self) -> list[Client]:
        """Who has disks. Raises OSError if that cannot be told."""
        return []

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        """What else there is to say, a sentence each without its full stop, of the disks that it has."""
        return []

    def firewall_text(self) -> str:
        """What a firewall on this machine has to let in; empty for nothing."""
        return ""

    def alerts(self) -> list[str]:
        """What may do harm, a sentence each without its full stop."""
        return []

    def code(self) -> str:
        """What a client has to know, for a screen and nothing else; empty for nothing."""
        return ""


# -----------------------------------------------------------------------------------------------------------
# 22. Hosts that are allowed
# -----------------------------------------------------------------------------------------------------------


class Allowance(Link):
    """A host's link in a subsystem, without which it cannot connect there.

    To take it away keeps the host out from then on, but does not end what it has. So when other hosts are
    to be let in than before, the subsystem is made anew.
    """

    LETTER = "h"
    LIVE = ADMITS = CLOSES = False
    RESTRICTS = True

    def __init__(self, subsystem: str, host: AllowedHost | None = None) -> None:
        # What the ledger has is the path alone.
        path = f"{subsystem}/allowed_hosts/{host.nqn}" if host else subsystem
        super().__init__(path, host.root() if host else "")

    def is_open(self, root: str) -> bool:
        return False


class Allowances(Links):
    """All links to a host, given its directory, in whatever subsystems."""

    LETTER = "q"

    def links(self, root: str) -> list[str]:
        subsystems, name = root + "nvmet/subsystems/", os.path.basename(self.path)
        return [f"{subsystems}{nqn}/allowed_hosts/{name}" for nqn in list_directory(subsystems)]

    def unmake(self, root: str) -> None:
        for link in self.links(root):
            try:
                os.unlink(link)
            except FileNotFoundError:
                pass  # in most, where a subsystem may be going at this moment, too

    def undescribed(self, root: str) -> dict[str, str]:
        path = f"{root}nvmet/subsystems/*/allowed_hosts/{os.path.basename(self.path)}"
        return {"step": "unlink", "path": path, "command": f"rm -f {path}"}


class SecretAttribute(Attribute):
    """An attribute of a host that only root may read. The kernel has it readable for everybody at first."""

    def __init__(self, path: str, secret: Secret) -> None:
        # With it two of them compare; nobody learns the secret from it.
        super().__init__(path, str(sha256(secret.reveal()).hexdigest()))
        self.secret = secret

    def make(self, root: str) -> None:
        os.chmod(root + self.path, 0o600)
        write_attribute(root + self.path, self.secret.reveal().decode())

    def is_live(self, root: str) -> bool:
        try:
            shut = not os.stat(root + self.path).st_mode & 0o077
        except OSError:
            return False
        return shut and read_attribute(root + self.path) == self.secret.reveal().decode()

    def described(self, root: str) -> dict[str, str]:
        path = root + self.path
        command = f"chmod 600 {quoted(path)} # and write the secret to it"
        return {"step": "write-secret", "path": path, "command": command}


class OwnSecret(SecretAttribute):
    """That of a host of our own, which a kernel that asks no host for a secret has no place for."""

    def make(self, root: str) -> None:
        try:
            super().make(root)
        except FileNotFoundError:
            pass

    def is_live(self, root: str) -> bool:
        return super().is_live(root) or not os.path.exists(root + self.path)


class TlsKey(Entry):
    """A TLS PSK in the kernel's keyring, under its identity; in the path, the digest has `_` for `/`."""

    LETTER = "k"
    LISTED = False
    STEM = "keyring/"

    keyring = NvmeKeyring()

    def __init__(self, path: str, key: Secret | None = None) -> None:
        super().__init__(path, str(sha256(key.reveal()).hexdigest()) if key else "")
        self.key = key
        self.serial = 0  # once it is known to be ours
        names, _, digest = path[len(self.STEM) :].rpartition(" ")
        self.name = f"{names} {digest.replace('_', '/')}"

    @classmethod
    def of(cls, host: AllowedHost, subsystem: str, *, exact: bool) -> TlsKey:
        name, key = tls_key(host, subsystem, exact=exact)
        names, _, digest = name.rpartition(" ")
        return cls(f"{cls.STEM}{names} {digest.replace('/', '_')}", key)

    def make(self, _: str) -> None:
        if self.keyring.find(self.name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if self.key:
            self.serial = self.keyring.add(self.name, self.key)

    def unmake(self, _: str) -> None:
        """Another program may have put its own in the place of ours, which is gone then."""
        serial = self.keyring.find(self.name)
        if serial and self.serial in (0, serial):
            self.keyring.remove(serial)
        self.serial = 0

    def is_live(self, _: str) -> bool:
        try:
            serial = self.keyring.find(self.name)
            live = bool(serial) and self.keyring.read(serial) == self.key
        except OSError:
            return False
        self.serial = serial if live else 0
        return live

    def identity(self, _: str) -> str:
        """The serial number, which is never given twice as long as the kernel runs."""
        try:
            return str(self.keyring.find(self.name) or "")
        except OSError:
            return ""

    def place(self, _: str) -> str:
        return f"{self.name} in the keyring .nvme"

    def described(self, _: str) -> dict[str, str]:
        command = f"# keyctl add psk {quoted(self.name)} (the key) %:.nvme"
        return {"step": "add-key", "path": self.name, "command": command}

    def undescribed(self, _: str) -> dict[str, str]:
        command = f"keyctl unlink $(keyctl search %:.nvme psk {quoted(self.name)}) %:.nvme"
        return {"step": "remove-key", "path": self.name, "command": command}


# -----------------------------------------------------------------------------------------------------------
# 23. TCP ports
# -----------------------------------------------------------------------------------------------------------


def random_port() -> int:
    return 1024 + int.from_bytes(os.urandom(4), "little") % (65535 - 1024)


def port_root(number: int) -> str:
    """The root of a port's branch."""
    return f"nvmet/ports/{number}"


def why_no_listener(text: str, port: int) -> int:
    """The error number that a socket gets that is to listen at an address as others do; 0 for none."""
    host, _, interface = text.partition("%")
    where: tuple[Any, ...] = (host, port)
    try:
        if ":" in host:
            where = (host, port, 0, socket.if_nametoindex(interface) if interface else 0)
        listener = socket.socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(1)
        finally:
            listener.close()
    except OSError as e:
        # Without a number, or with one of these: there is no such interface.
        return errno.EADDRNOTAVAIL if e.errno in (None, errno.ENODEV, errno.ENXIO) else e.errno
    return 0


class SinglePorts(Transport):
    """Ports for single addresses, where clients may come in at these only, or at one TCP port.

    They have the TCP port in common that is asked for, or one for each family; in configfs each has a number
    of its own, which follows from its address.
    """

    ATTEMPTS = 16

    def __init__(self, prefix: str, listening: Listening | None) -> None:
        self.prefix = prefix  # of all NQNs
        self.listening = listening  # None for all addresses and the numbers that follow from the NQN
        self.ports: dict[int, int] = {}  # TCP port by address family
        self.attempts = 0
        self.texts: list[str] = []  # the addresses to listen at now
        self.numbers: dict[str, int] = {}  # in configfs, of all that were ever listened at
        self.opened: set[str] = set()  # the addresses with a port that was live after the last change
        self.refused: set[str] = set()  # those whose TCP port is another program's

    @staticmethod
    def family(text: str) -> int:
        return AF_INET6 if ":" in text else AF_INET

    def adopt_single(self, live: dict[str, Branch]) -> None:
        """Goes on with the numbers of an earlier run."""
        for root, branch in live.items():
            kind, _, text = branch.tag.partition(" ")
            if kind != "port" or not text:
                continue
            self.numbers[text] = int(root.rpartition("/")[2])
            self.opened.add(text)
            port = read_attribute(f"{CONFIGFS}{root}/addr_trsvcid")
            if port.isdecimal() and self.listening and not self.listening.port:
                self.ports[self.family(text)] = int(port)

    def follow(self, held: Callable[[], list[Address]]) -> bool:
        if not self.listening:
            return False
        before, found = self.texts, self.listening.places(held())
        self.refused &= set(found)
        self.texts = [t for t in found if t not in self.refused and self.family(t) in self.ports]
        for text in self.texts:
            if text not in self.numbers:
                self.number_anew(text)
        return self.texts != before

    def number_anew(self, text: str) -> None:
        """Gives an address a number that is free."""
        taken = {*map(str, self.numbers.values()), *list_directory(CONFIGFS + "nvmet/ports")}
        digest = sha256(utf8(f"{self.prefix} {text}")).digest()
        number = 1024 + int.from_bytes(digest[:4], "little") % (65535 - 1024)
        while str(number) in taken:
            number = random_port()
        self.numbers[text] = number

    def adapt_single(self, error: OSError, text: str, *, made: bool) -> bool:
        """Changes what is wanted after a failure at an address; see adapt(). `made`: its port was there."""
        if error.errno == errno.EEXIST and not made:
            self.number_anew(text)
            return self.is_tried_again()
        if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            self.texts = [t for t in self.texts if t != text]  # it has gone again, of which there is news
            return True
        if error.errno != errno.EADDRINUSE or not self.listening:
            return False
        family = self.family(text)
        if not self.listening.port and family not in map(self.family, self.opened):
            taken = self.ports[family]
            self.ports[family] = random_port() & 0xFFFE | (family == AF_INET6)
            warning(f"Port {taken} is taken at {text}, using {self.ports[family]}")
            return self.is_tried_again()
        self.refused.add(text)
        self.texts = [t for t in self.texts if t != text]
        warning(f"{self.refused_text(text)}; stop that and start storagetm again, or give another --port")
        return True

    def is_tried_again(self) -> bool:
        """Whether to try another number, as has not been done too often."""
        self.attempts += 1
        return self.attempts <= self.ATTEMPTS

    def refused_text(self, text: str) -> str:
        port = self.ports[self.family(text)]
        return f"TCP port {port} is taken at {text} by another program: no disk is exported there"

    def note(self, live: dict[str, Branch]) -> None:
        self.opened = {b.tag.partition(" ")[2] for b in live.values() if b.tag.startswith("port ")}

    def why_shut(self) -> tuple[str, str] | None:
        """Why there is nothing that clients could come in at, and what to do; None if it is the network."""
        if not self.listening or self.texts:
            return None
        if self.refused:
            port = self.ports[self.family(min(self.refused))]
            remedy = "stop that and start storagetm again, or give another --port"
            return f"TCP port {port} is taken by another program", remedy
        if not self.listening.missing:
            return None
        return self.absent_text(self.listening.missing), "plug in a cable, or wait for an address"

    @staticmethod
    def absent_text(words: Sequence[str]) -> str:
        """What of --listen= this machine does not have yet."""
        addresses = [w for w in words if ":" in w or w.replace(".", "").isdecimal()]
        interfaces = [w for w in words if w not in addresses]
        found = [f"{w} is no address of this machine yet" for w in addresses]
        return ", and ".join(found + [f"{w} has no address yet" for w in interfaces])

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        if not self.listening or not self.texts:
            return []
        absent = [self.absent_text(self.listening.missing)] if self.listening.missing else []
        return absent + [self.refused_text(text) for text in sorted(self.refused)]


class OnePort(Transport):
    """A transport with one TCP port at all addresses, its own or the next that is free."""

    what = ""  # as people call it
    PORT = 0  # the first to try
    ATTEMPTS = 16  # ports after that to try

    def __init__(self, listening: Listening | None) -> None:
        self.listening = listening or Listening()
        self.port = self.listening.port or self.PORT
        self.texts: list[str] = []  # the addresses to listen at now
        self.settled = bool(self.listening.port)  # whether clients may know the port
        self.absent: set[int] = set()  # address families that this kernel lacks
        self.refused: set[str] = set()  # addresses at which the port is another program's
        self.arrivals = Arrivals()

    def everywhere(self) -> list[str]:
        """What stands for all addresses."""
        return list(Listening.ALL)

    def text_of(self, entry: Entry) -> str:
        """The address at which an entry listens; empty for any other."""
        raise NotImplementedError

    def follow(self, held: Callable[[], list[Address]]) -> bool:
        before = self.texts
        everywhere = self.listening.words == Listening.ALL
        found = self.everywhere() if everywhere else self.listening.places(held())
        self.refused &= set(found)
        self.texts = [t for t in found if t not in self.refused and SinglePorts.family(t) not in self.absent]
        return self.texts != before

    def adapt(self, failure: Failure) -> bool:
        code = failure.error.errno
        if failure.cause or not (text := self.text_of(failure.entry)):
            return False
        if code in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            if text in Listening.ALL:
                self.absent.add(SinglePorts.family(text))
            self.texts = [other for other in self.texts if other != text]
            return True
        if code != errno.EADDRINUSE:
            return False
        if not self.settled and self.port < self.PORT + self.ATTEMPTS:
            self.port = self.next_port()
            return True
        self.refused.add(text)
        self.texts = [other for other in self.texts if other != text]
        warning(f"{self.refused_text(text)}; stop that and start storagetm again, or give another --port")
        return True

    def next_port(self) -> int:
        """The port after one that is taken."""
        warning(f"TCP port {self.port} is taken, using {self.port + 1} for {self.what}")
        return self.port + 1

    def note(self, live: dict[str, Branch]) -> None:
        entries = [entry for branch in live.values() for entry in branch.entries[:1]]
        self.settled = self.settled or any(map(self.text_of, entries))

    def refused_text(self, text: str) -> str:
        return (
            f"TCP port {self.port} is taken at {text} by another program: {self.what} is not offered there"
        )

    def reachable(self, addresses: Sequence[Address]) -> list[Address]:
        """Those of the addresses at which clients can come in."""
        found = Listening.reachable(self.texts, addresses)
        if "::" not in self.texts:
            return found
        also = [AF_INET6] if "0.0.0.0" in self.texts else [AF_INET, AF_INET6]
        return found + [a for a in addresses if a.family in also]

    def hint(self, at: Address) -> str:
        """How to come in at an address where no command is needed."""
        return ""

    def way(self, addresses: Sequence[Address]) -> Way:
        if usable := self.reachable(addresses):
            many = "es" * (len(usable) > 1)
            return Way(f"{len(usable)} address{many} ({self.what})", hint=self.hint(usable[0]))
        if self.refused:
            shut, remedy = f"TCP port {self.port} is taken by another program", "give another --port"
        else:
            shut, remedy = "the network is down", "plug in a cable, or wait for an address"
        effect = f"no disk can be attached by {self.what} yet"
        return Way(f"no address ({self.what}: {shut})", shut, effect, remedy)

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        absent = self.listening.missing if self.listening.words != Listening.ALL else []
        found = [SinglePorts.absent_text(absent)] if absent and self.texts else []
        return found + [self.refused_text(text) for text in sorted(self.refused) if self.texts]

    def firewall_text(self) -> str:
        return f"This machine has a firewall, which must let in TCP port {self.port} for {self.what}"


# -----------------------------------------------------------------------------------------------------------
# 24. A host of our own
# -----------------------------------------------------------------------------------------------------------


class NvmeHost:
    """The few commands that a target of our own needs from a host: an admin queue over NVMe/TCP.

    NVMe base specification 2.0, NVMe over Fabrics 1.1, NVMe/TCP transport specification 1.0. All methods
    raise OSError, for an answer that makes no sense (EPROTO) or that is late (ETIMEDOUT), too.
    """

    TIMEOUT_SEC = 20  # for an answer; a kernel that is busy with many disks takes its time
    CONNECT_SEC = 3  # for a connection, which waits for nobody; a lost packet is sent again after 1 s
    ICREQ, ICRESP, COMMAND, RESPONSE, DATA = 0, 1, 4, 5, 7  # types of PDU
    FABRICS = 0x7F
    PROPERTY_SET, CONNECT, AUTH_SEND, AUTH_RECEIVE = 0, 1, 5, 6
    AUTH_REQUIRED = 1 << 17  # in the answer to Connect
    SET_FEATURES = 0x09
    WRITE_PROTECT = 0x84
    CC = 0x14  # property: the controller's configuration
    ENABLE = 0x460001  # entries of 64 and 16 bytes, enabled
    # One more than the commands that are under way. For each, nvmet makes two, with four buffers each: with
    # 32, as other hosts have, a start with 256 disks took 2 % longer.
    QUEUE_SIZE = 3
    ANSWER_MAX = 8192  # longest PDU to take, in bytes
    MESSAGE_MAX = 512  # longest message of authentication to take, in bytes

    def __init__(self, address: tuple[Any, ...], nqn: str, host_id: str) -> None:
        """Connects, and sends what it is attached by. attach() is next, then finish()."""
        self.begin()
        family = AF_INET6 if ":" in address[0] else AF_INET
        self.socket = socket.socket(family, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            self.socket.settimeout(self.CONNECT_SEC)
            self.socket.connect(address)
            self.socket.settimeout(self.TIMEOUT_SEC)
            self.greet(nqn, host_id)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        self.number = 0  # of the last command
        self.owed: set[int] = set()  # numbers of commands that are not answered; 0 is the first PDU
        self.unsent = b""
        self.buffer = b""  # what has arrived and is not yet looked at
        self.result = 0  # of the last command
        self.data = b""  # the last that has come in
        self.secret = b""  # for DH-HMAC-CHAP, 32 bytes, where the target asks for it

    def close(self) -> None:
        self.socket.close()

    def is_attached(self) -> bool:
        """Whether the target still has the connection."""
        self.socket.settimeout(0)
        try:
            return bool(self.socket.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def greet(self, nqn: str, host_id: str) -> None:
        """Sends the PDU that a connection begins with, and the Fabrics command Connect for the admin queue.

        There are no digests, no alignment and no keep-alive. The kernel takes the two in one go
        (nvmet_tcp_done_recv_pdu()), which saves a round trip.
        """
        self.unsent += bytes(nvme_tcp_hdr(self.ICREQ, 0, 128, 0, 128)).ljust(128, b"\0")
        self.owed.add(0)
        self.nqn, self.host_nqn = nqn, HOST_STEM + dashed(host_id)
        data = bytes.fromhex(host_id) + b"\xff\xff" + bytes(238)
        data += utf8(self.nqn).ljust(256, b"\0") + utf8(self.host_nqn).ljust(256, b"\0")
        self.add(self.FABRICS, self.CONNECT, 0, self.QUEUE_SIZE - 1, 0, data.ljust(1024, b"\0"))
        self.flush()

    def attach(self, write_protect: int = 0) -> None:
        """Waits until it is attached, then has the controller switched on.

        And a namespace write-protected, until that goes or a host takes it back. nvmet is ready as soon as
        it is told to be (nvmet_start_ctrl()).
        """
        self.finish()
        if self.result & self.AUTH_REQUIRED:
            self.authenticate()
        self.add(self.FABRICS, self.PROPERTY_SET, 0, self.CC, self.ENABLE)
        if write_protect:
            self.add(self.SET_FEATURES, write_protect, self.WRITE_PROTECT, 1)
        self.flush()

    def authenticate(self) -> None:
        """Proves to know the secret, by DH-HMAC-CHAP with SHA-256 and without a group.

        NVMe base specification 2.0, 8.13.5. On a loopback interface nobody listens who is not root.
        """
        number = (1).to_bytes(2, "little")  # of the transaction
        # Linux takes the group that it has itself; but where that is the first one offered, it looks for a
        # module for it, and finds no group (nvmet_auth_negotiate()). So ffdhe2048 comes before none.
        hashes, groups = b"\x01".ljust(30, b"\0"), b"\x01".ljust(30, b"\0")
        self.send_message(b"\0\0\0\0" + number + b"\0\x01" + b"\x01\0\x01\x02" + hashes + groups)
        challenge = self.receive_message(0x01)
        sequence, value = challenge[12:16], challenge[16 : 16 + challenge[6]]
        names = b"HostHost" + utf8(self.host_nqn) + b"\0" + utf8(self.nqn)
        response = hmac_sha256(self.secret, value + sequence + number + b"\0" + names)
        head = b"\x01\x02\0\0" + number + bytes([len(response), 0, 0, 0, 0, 0]) + sequence
        self.send_message(head + response + bytes(len(response)))
        self.receive_message(0x03)

    def send_message(self, message: bytes) -> None:
        """Sends a message of authentication."""
        self.add(self.FABRICS, self.AUTH_SEND, 0xE9010100, len(message), data=message)
        self.flush()
        self.finish()

    def receive_message(self, kind: int) -> bytes:
        """Asks for a message of authentication, which has to be of this kind."""
        self.add(self.FABRICS, self.AUTH_RECEIVE, 0xE9010100, self.MESSAGE_MAX, expected=self.MESSAGE_MAX)
        self.flush()
        self.data = b""
        self.finish()
        if len(self.data) < 16 or self.data[0] != 0x01 or self.data[1] != kind:
            raise malformed(f"message {self.data[:2].hex()} of authentication")
        return self.data

    def add(
        self,
        opcode: int,
        nsid: int,
        cdw10: int,
        cdw11: int,
        cdw12: int = 0,
        data: bytes = b"",
        expected: int = 0,
    ) -> None:
        """Adds one command, with `data` inside or so many bytes to come, to what is to be sent."""
        self.number += 1
        command = nvme_command(opcode, command_id=self.number, nsid=nsid)
        command.cdw10, command.cdw11, command.cdw12 = cdw10, cdw11, cdw12
        command.flags = 0x40  # an SGL describes the data
        command.sgl_length = len(data) or expected
        # Data at an offset in the capsule, or else the transport's own descriptor, which stands for none.
        command.sgl_type = 0x01 if data else 0x5A
        head = nvme_tcp_hdr(self.COMMAND, 0, 72, 72 if data else 0, 72 + len(data))
        self.unsent += bytes(head) + bytes(command) + data
        self.owed.add(self.number)

    def flush(self) -> None:
        self.socket.sendall(self.unsent)
        self.unsent = b""

    def finish(self) -> None:
        """Waits until all has been answered."""
        while self.owed:
            kind, body = self.receive()
            if 0 in self.owed:
                if kind != self.ICRESP or len(body) != 120 or body[:2] != b"\0\0" or body[3] & 3:
                    raise malformed(f"answer {kind} to the first PDU")
                self.owed.remove(0)
                continue
            if kind == self.DATA and len(body) > 16:
                self.data = body[16:]
                continue
            if kind != self.RESPONSE or len(body) != 16:
                raise malformed(f"answer {kind} to a command")
            self.result = int.from_bytes(body[:4], "little")
            if (number := int.from_bytes(body[12:14], "little")) not in self.owed:
                raise malformed("answer to another command")
            self.owed.remove(number)
            if status := int.from_bytes(body[14:16], "little") >> 1:
                debug(f"The target refused command {number} with status {status:#x}")
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def receive(self) -> tuple[int, bytes]:
        """Type and body of the next PDU."""
        self.fill(8)
        head = nvme_tcp_hdr.from_buffer_copy(self.buffer)
        if not (8 <= head.hlen <= head.plen <= self.ANSWER_MAX) or head.flags & 3:
            raise malformed(f"PDU {head.type} of {head.plen} bytes")
        self.fill(head.plen)
        body, self.buffer = self.buffer[8 : head.plen], self.buffer[head.plen :]
        return head.type, body

    def fill(self, length: int) -> None:
        while len(self.buffer) < length:
            part = self.socket.recv(self.ANSWER_MAX)
            if not part:
                raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            self.buffer += part


def raise_loopback() -> None:
    """Switches the loopback interface on, which gives it its address. Raises OSError."""
    s = socket.socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        request = b"lo".ljust(16, b"\0") + (IFF_UP | IFF_LOOPBACK).to_bytes(2, sys.byteorder)
        fcntl.ioctl(s.fileno(), SIOCSIFFLAGS, request.ljust(40, b"\0"))
    finally:
        s.close()


def malformed(what: str) -> OSError:
    debug(f"The target's answer is malformed: {what}")
    return OSError(errno.EPROTO, os.strerror(errno.EPROTO))


class PrivateNetwork:
    """A network of this process alone, with nothing but a loopback interface (network_namespaces(7)).

    While a thread is in it, the sockets that it makes belong there, and so do those that the kernel makes
    for it: a port of nvmet listens in the network of whoever links the first subsystem to it
    (nvmet_tcp_add_port()). All methods raise OSError.
    """

    CLONE_NEWNET = 0x40000000
    lock = _thread.allocate_lock()  # held while one is made

    def __init__(self) -> None:
        self.fds: tuple[int, int] = (-1, -1)  # this network, and that of this machine

    def __enter__(self) -> None:
        with self.lock:
            if self.fds[0] < 0:
                self.begin()
        self.enter(self.fds[0])

    def __exit__(self, *_: object) -> None:
        self.enter(self.fds[1])

    def begin(self) -> None:
        """Makes it, in a thread of its own, since a thread that has left its network has to find back."""
        made: list[int | OSError] = []

        def make(_: object) -> None:
            try:
                self.call("unshare", self.CLONE_NEWNET)
                raise_loopback()
                made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            except OSError as e:
                made.append(e)

        in_threads([None], make, None, lambda: None)
        if isinstance(made[0], OSError):
            raise made[0]
        self.fds = made[0], os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def enter(self, network: int) -> None:
        self.call("setns", network, self.CLONE_NEWNET)

    def call(self, name: str, *arguments: int) -> None:
        if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
            problem = ctypes.get_errno()
            raise OSError(problem, os.strerror(problem))

    def end(self) -> None:
        """Lets go of it: it stays for as long as there are sockets in it."""
        fds, self.fds = self.fds, (-1, -1)
        for fd in fds:
            if fd >= 0:
                os.close(fd)


class OwnHost:
    """How this process comes in to its own target, as a host.

    Over the passage: a port on the loopback interface that is only there while namespaces are
    write-protected. And over the first of the ports that clients use, to take a seat there.
    """

    ATTEMPTS = 16

    def __init__(self, admission: Admission, ports: dict[int, int], passage: int) -> None:
        self.admission = admission
        self.network = PrivateNetwork()
        self.host_id = uuid4_from(os.urandom(16))  # which nobody can guess
        self.secret = os.urandom(32)  # since everybody on this machine can read the names of hosts
        self.ports = ports  # TCP port by address family
        self.passage = passage  # number of the passage's port
        self.passage_port = 0  # its TCP port, once something is linked there
        self.untold: dict[str, OSError] = {}  # by path of WriteProtection: why hosts are not told of it
        self.roomy: set[str] = set()  # subsystems that let in one client more than they should
        self.seats: dict[str, NvmeHost] = {}  # by path of Seat
        self.seated: dict[str, str] = {}  # the address of the port that it was taken at, likewise
        self.unreachable_until = 0.0  # when to connect to ourselves again, where that could not be done

    def passage_root(self) -> str:
        return port_root(self.passage)

    def allowed(self) -> AllowedHost:
        """Ourselves, as the kernel has us where only some hosts are let in."""
        return AllowedHost(HOST_STEM + dashed(self.host_id), secret=Secret(dhchap_text(self.secret)))

    def passage_branch(self, live: dict[str, Branch], used: Iterable[int] = ()) -> Branch:
        """The passage, under a number that is free and none of those `used` by other ports.

        `live` is what is ours, among it perhaps the passage of a run that was killed.
        """
        ours = {r.rpartition("/")[2] for r, b in live.items() if b.tag == "passage"}
        taken = set(list_directory(CONFIGFS + "nvmet/ports")) - ours
        taken.update(map(str, (*self.ports.values(), *used)))
        while str(self.passage) in taken:
            self.passage, self.passage_port = random_port(), 0
        path = self.passage_root()
        entries = [
            Directory(path),
            Attribute(path + "/addr_adrfam", "ipv4"),
            Attribute(path + "/addr_trtype", "tcp"),
            Attribute(path + "/addr_trsvcid", str(self.passage_port or self.passage)),
            Attribute(path + "/addr_traddr", "127.0.0.1"),
            Links(path + "/subsystems"),
        ]
        if self.admission.restricted:
            # Only as long as the passage is there may this host connect.
            me = self.allowed()
            entries += [Directory(me.root()), Allowances(me.root())]
            if me.secret:
                entries.append(OwnSecret(me.root() + "/dhchap_key", me.secret))
        return Branch("passage", entries)

    def passage_link(self, root: str, subsystem: str) -> str:
        return f"{root}{self.passage_root()}/subsystems/{os.path.basename(subsystem)}"

    def come_in(self, root: str, subsystem: str) -> NvmeHost:
        """Connects to a subsystem over the passage. Raises OSError.

        The passage has no TLS, and a host whose key is its proof has no secret there. So where only some
        hosts are let in, nobody else on this machine can get at it.
        """
        if not self.admission.restricted:
            return self.connect(root, subsystem)
        with self.network:
            return self.connect(root, subsystem)

    def connect(self, root: str, subsystem: str) -> NvmeHost:
        host = NvmeHost(self.open_passage(root, subsystem), os.path.basename(subsystem), self.host_id)
        host.secret = self.secret
        return host

    def open_passage(self, root: str, subsystem: str) -> tuple[str, int]:
        """Lets ourselves in to a subsystem; address and TCP port. Raises OSError."""
        port = root + self.passage_root()
        if self.admission.restricted:
            try:
                Allowance(subsystem, self.allowed()).make(root)
            except FileExistsError:
                pass  # for another disk of the same subsystem, perhaps by another thread just now
        for attempt in range(self.ATTEMPTS):
            try:
                os.symlink(root + subsystem, self.passage_link(root, subsystem))
                break
            except FileExistsError:
                break
            except OSError as e:
                if e.errno == errno.EADDRNOTAVAIL and attempt == 0:
                    raise_loopback()
                    continue
                # Nothing listens before the first link is there, so the number may still be changed.
                if e.errno != errno.EADDRINUSE or attempt == self.ATTEMPTS - 1:
                    raise
                try:
                    write_attribute(port + "/addr_trsvcid", str(random_port()))
                except PermissionError:
                    pass  # another thread has found a free one meanwhile
                self.passage_port = 0
        self.passage_port = self.passage_port or int(read_attribute(port + "/addr_trsvcid"))
        return "127.0.0.1", self.passage_port

    def note_untold(self, path: str, e: OSError) -> None:
        """Notes that hosts are not told of a namespace that it is read-only, and why."""
        self.untold[path] = e if e.errno else OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if self.untold[path].errno not in (errno.EIO, errno.EPROTO):
            # It would be the same for the other disks, and take the time once more.
            self.unreachable_until = time.monotonic() + COURTESY_SEC[0]

    def why_untold(self, path: str) -> str:
        """The warning that hosts are not told of a namespace, or of none, that it is read-only."""
        problem = self.untold[path]
        if problem.errno in (errno.EIO, errno.EPROTO):
            nqn = path.rpartition("/namespaces/")[0].rpartition("/")[2]
            return (
                f"Failed to tell clients that '{nqn}' is read-only: {reason_of(problem)}; their writes fail"
            )
        way_out = "it is tried again"
        if self.admission.restricted and problem.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
            way_out = "boot a kernel with CONFIG_NET_NS, or start it where processes may have networks"
        elif problem.errno in UNREACHABLE:
            way_out = "let this machine's firewall accept all packets on 'lo'"
        elif problem.errno == errno.EADDRNOTAVAIL:
            way_out = "give 'lo' the address 127.0.0.1"
        return (
            f"Failed to tell clients which disks are read-only: {reason_of(problem)}; {way_out}. "
            "Their writes fail all the same"
        )

    def ends(self) -> set[tuple[str, int]]:
        """Our ends of the connections for seats, as the target sees them."""
        names = []
        for seat in self.seats.values():
            try:
                names.append(seat.socket.getsockname())
            except OSError as e:
                debug(f"Failed to look at a connection of our own, ignoring: {reason_of(e)}")
        return {(name[0].partition("%")[0], name[1]) for name in names}

    def attached(self, address: tuple[Any, ...], subsystem: str) -> NvmeHost:
        """A host that is attached to a subsystem. Raises OSError."""
        host = NvmeHost(address, os.path.basename(subsystem), self.host_id)
        host.secret = self.secret
        try:
            host.attach()
            host.finish()
        except BaseException:
            host.close()
            raise
        return host

    def seat_address(self, text: str) -> tuple[Any, ...]:
        """Where to take a seat at a port that listens at an address, as socket.connect() takes it."""
        host, _, interface = text.partition("%")
        port = self.ports[AF_INET6 if ":" in text else AF_INET]
        if interface:
            return host, port, 0, socket.if_nametoindex(interface)
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port

    def take_seat(self, subsystem: str, text: str) -> NvmeHost:
        """Attaches ourselves to a subsystem that is linked to the port of an address.

        Raises OSError, with EBUSY if clients have all places.
        """
        if time.monotonic() < self.unreachable_until:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        address = self.seat_address(text)
        raised = False
        while True:
            try:
                return self.attached(address, subsystem)
            except OSError as e:
                if e.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL) and not raised:
                    raise_loopback()
                    raised = True
                    continue
                # Before Python 3.10, what came too late has no number.
                number = e.errno or errno.ETIMEDOUT
                if number == errno.EIO:
                    number = errno.EBUSY
                if number == errno.ETIMEDOUT:
                    # It would be the same for the other disks, and take the time once more.
                    self.unreachable_until = time.monotonic() + COURTESY_SEC[0]
                raise OSError(number, os.strerror(number)) from e


class Courtesy:
    """Says once if hosts are not told which disks are read-only, and when to try that again."""

    def __init__(self, host: OwnHost) -> None:
        self.host = host
        self.said: set[str] = set()
        self.again = 0.0  # when to try again, in seconds of the monotonic clock; 0 for never
        self.pause = COURTESY_SEC[0]

    def note(self, live: dict[str, Branch]) -> None:
        """Called after each change, with what is live then."""
        untold = self.host.untold
        if untold:
            paths = {e.path for b in live.values() for e in b.entries}
            for path in set(untold) - paths:
                del untold[path]
        messages = set(map(self.host.why_untold, untold))
        for message in sorted(messages - self.said):
            warning(message)
        if self.said and not messages:
            info("Clients are told again which disks are read-only")
        self.said = messages
        now = time.monotonic()
        if not messages:
            self.again, self.pause = 0.0, COURTESY_SEC[0]
        elif self.again <= now:
            self.again = now + self.pause
            self.pause = min(2 * self.pause, COURTESY_SEC[1])

    def forget(self, live: dict[str, Branch]) -> None:
        """Has the next change try again what could not be done: as if it had been found like that."""
        for root, branch in list(live.items()):
            if any(e.path in self.host.untold for e in branch.entries):
                live[root] = branch.to_compare()


# -----------------------------------------------------------------------------------------------------------
# 25. Parts of NVMe/TCP
# -----------------------------------------------------------------------------------------------------------


class WriteProtection(Entry):
    """Namespace Write Protect for the only namespace of a subsystem.

    Hosts may take it back, so it is a hint to them, not the protection itself, and its state is not
    compared. Only a host can ask for it. That is this process, over the passage of OwnHost.
    Where it fails, the disk is exported all the same, since the protection is below; OwnHost notes it.
    """

    LIVE = TOGETHER = CLOSES = True
    AT_ONCE = 64  # connections; nvmet lets 128 wait, and what comes after them is only let in a second later

    def __init__(self, path: str, host: OwnHost) -> None:
        super().__init__(path)
        self.host = host
        self.guest: NvmeHost | None = None  # ourselves, while we ask

    def unmake(self, root: str) -> None:
        try:
            os.unlink(self.host.passage_link(root, self.path.partition("/namespaces/")[0]))
        except (FileNotFoundError, NotADirectoryError):
            pass
        if self.host.admission.restricted:
            Allowance(self.path.partition("/namespaces/")[0], self.host.allowed()).unmake(root)

    def make(self, root: str) -> None:
        self.make_all([self], root)

    @classmethod
    def make_all(cls, entries: Sequence[Entry], root: str) -> None:
        """Asks for many at a time, since most of it is waiting for the kernel.

        With 256 disks that takes a start no longer than 16 threads would, and 1.1 MB less memory.
        """
        asked = [e for e in entries if isinstance(e, WriteProtection)]
        for first in range(0, len(asked), cls.AT_ONCE):
            some = going_on = asked[first : first + cls.AT_ONCE]
            for step in (cls.come_in, cls.ask, cls.hear):
                going_on = [e for e in going_on if e.take(step, root)]
            for entry in going_on:
                entry.host.untold.pop(entry.path, None)
            for entry in some:
                entry.leave()

    def take(self, step: Callable[[WriteProtection, str], None], root: str) -> bool:
        """Takes a step on the way; False if that fails."""
        if time.monotonic() < self.host.unreachable_until:
            self.host.untold[self.path] = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            return False
        try:
            step(self, root)
        except OSError as e:
            self.host.note_untold(self.path, e)
            return False
        return True

    def come_in(self, root: str) -> None:
        """Connects to the kernel. Raises OSError, as do ask() and hear()."""
        self.guest = self.host.come_in(root, self.path.partition("/namespaces/")[0])

    def ask(self, _: str) -> None:
        """Asks for it, once the kernel has let us in."""
        if self.guest:
            self.guest.attach(int(self.path.rsplit("/", 2)[1]))

    def hear(self, _: str) -> None:
        """Hears whether it was done."""
        if self.guest:
            self.guest.finish()

    def leave(self) -> None:
        if self.guest:
            self.guest.close()
            self.guest = None

    def is_live(self, root: str) -> bool:
        return False

    def described(self, root: str) -> dict[str, str]:
        path = root + self.path
        _, nqn, _, namespace, _ = path.rsplit("/", 4)
        command = f"# as a host of {nqn}: nvme set-feature -n {namespace} -f 0x84 -v 1"
        return {"step": "write-protect", "path": path, "command": command}


class SharedWriteProtection(WriteProtection):
    """Namespace Write Protect for one namespace of many, which clients may see as soon as it is there."""

    WAITS = True
    TOGETHER = False

    def unmake(self, root: str) -> None:
        """The other namespaces need the link, and it does not hold this one."""


class PortLink(Link):
    """What lets clients in to a subsystem by a port. With the first one the kernel begins to listen."""

    def __init__(self, port: str, subsystem: str) -> None:
        super().__init__(f"{port}/subsystems/{os.path.basename(subsystem)}", subsystem)
        self.port = port  # the root of its branch

    def dooms(self, error: OSError) -> bool:
        return error.errno in (errno.EADDRINUSE, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


class ClientLimit(Attribute):
    """The last ID that a subsystem's controllers may have.

    Linux 6.1 refuses the same as the first one (nvmet_subsys_attr_cntlid_max_store()), Linux 6.12 takes it.
    One more is allowed then, which a Seat takes.
    """

    def __init__(self, path: str, value: str, host: OwnHost) -> None:
        super().__init__(path, value)
        self.host = host

    def one_more(self) -> str:
        return str(int(self.value) + 1)

    def make(self, root: str) -> None:
        try:
            super().make(root)
        except OSError as e:
            # The seat would have to be let in by what only clients know.
            if e.errno != errno.EINVAL or self.host.admission.restricted:
                raise
            write_attribute(root + self.path, self.one_more())
            self.host.roomy.add(os.path.dirname(self.path))

    def is_live(self, root: str) -> bool:
        found = read_attribute(root + self.path)
        if found == self.one_more():
            self.host.roomy.add(os.path.dirname(self.path))
        return found in (self.value, self.one_more())


class Seat(Entry):
    """A connection of our own to a subsystem where the kernel lets in one client more than it should.

    It is made between the subsystem's first link and the others. A crash gives it up, and the next run takes
    it again; EBUSY if a client was quicker.
    """

    LIVE = ADMITS = CLOSES = True

    def __init__(self, subsystem: str, host: OwnHost, text: str) -> None:
        super().__init__(subsystem + "/seat", text)  # the address of the first port
        self.subsystem = subsystem
        self.host = host

    def make(self, root: str) -> None:
        self.unmake(root)
        if self.subsystem in self.host.roomy:
            self.host.seats[self.path] = self.host.take_seat(self.subsystem, self.value)
            self.host.seated[self.path] = self.value

    def unmake(self, root: str) -> None:
        if seat := self.host.seats.pop(self.path, None):
            seat.close()

    def is_live(self, root: str) -> bool:
        """As far as it is needed, which the subsystem's ClientLimit finds out before."""
        if self.subsystem not in self.host.roomy:
            return True
        seat = self.host.seats.get(self.path)
        return seat is not None and self.host.seated[self.path] == self.value and seat.is_attached()

    def described(self, root: str) -> dict[str, str] | None:
        """Nothing about a subsystem that is not there yet, since the kernel has not said what it allows."""
        if self.subsystem not in self.host.roomy:
            return None
        command = f"nvme connect -t tcp -n {quoted(os.path.basename(self.subsystem))}"
        return {
            "step": "attach",
            "path": root + self.subsystem,
            "command": f"# as a host of this machine: {command}",
        }

    def undescribed(self, root: str) -> None:
        """The kernel ends the connection with the link."""


class Identities:
    """By what clients know disks: model, firmware, serial number, UUID and NGUID."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.overrides = {
            name: os.environ.get(f"SYSTEMD_NVME_{name}", "")
            for name in ("MODEL", "FIRMWARE", "SERIAL", "UUID")
        }
        self.firmware = nvme_string(self.overrides["FIRMWARE"] or machine.os_version, FIRMWARE_MAX)

    def model(self, export: Export | None) -> str:
        """The model of a disk's subsystem, or of the one that is for all."""
        if override := self.overrides["MODEL"]:
            return nvme_string(override, MODEL_MAX)
        # Not the host name, which may change while clients are attached.
        model, system = export.disk.model if export else "Storage target", self.machine.os
        return nvme_string(f"{model} ({system})" if model and system else model or system, MODEL_MAX)

    def serial(self, export: Export | None) -> str:
        """The disk's serial number, or one that is stable for the disk and unique on this machine.

        That of the machine for the subsystem that is for all disks.
        """
        given = self.overrides["SERIAL"] or (export.disk.serial if export and not self.own(export) else "")
        if given and (text := nvme_string(given, SERIAL_MAX)):
            return text
        name = b"serial" + utf8(self.name(export)) if export else b"machine"
        return str(sha256(self.machine.id + name).hexdigest()[:SERIAL_MAX])

    def uuid(self, export: Export) -> str:
        if self.overrides["UUID"]:
            override = self.overrides["UUID"].replace("-", "").lower()
            if is_id128(override):
                return dashed(override)
            warning("$SYSTEMD_NVME_UUID is not a UUID, ignoring it")
        name = self.own(export) or export.disk.id_serial or export.disk.node
        return dashed(uuid4_from(sha256(self.machine.id + utf8(name)).digest()))

    def nguid(self, export: Export) -> str:
        """Made like the UUID, but different for disks without a serial number, and not to be overridden."""
        digest = sha256(self.machine.id + b"nguid" + utf8(self.name(export)))
        return dashed(digest.hexdigest()[:32])

    @staticmethod
    def own(export: Export) -> str:
        """What a disk's identities are made from in place of its serial number; empty for that."""
        return export.stay.own if export.stay else ""

    @staticmethod
    def name(export: Export) -> str:
        return export.stay.name if export.stay else export.disk.id_serial or export.disk.stable()


# -----------------------------------------------------------------------------------------------------------
# 26. NVMe/TCP
# -----------------------------------------------------------------------------------------------------------


class NvmePorts(SinglePorts):
    """The ports of NVMe/TCP, one for each address family, under numbers that follow from the NQNs.

    Or those for single addresses, where something else is asked for.
    """

    PORT_KEY = "d10b67b5e2b74a918d6b27b635c19fd9"
    FAMILIES: ClassVar[dict[int, tuple[str, str, str]]] = {
        AF_INET: ("ipv4", "0.0.0.0", "IPv4"),
        AF_INET6: ("ipv6", "::", "IPv6"),
    }

    def __init__(
        self, prefix: str, admission: Admission | None = None, listening: Listening | None = None
    ) -> None:
        super().__init__(prefix, listening)
        self.admission = admission or Admission()
        self.restricted = self.admission.restricted
        self.subsystems: list[str] = []  # NQNs of those that there are to be
        self.known_keys: dict[str, list[Branch]] = {}  # by NQN
        self.daemon = ""  # the number of tlshd's process, as it was last

    @property
    def places(self) -> dict[str, int]:
        """The numbers of all ports in configfs, by the address that each listens at."""
        if self.listening:
            return {text: self.numbers[text] for text in self.texts}
        return {self.FAMILIES[family][1]: number for family, number in self.ports.items()}

    def port_number(self, family: int) -> int:
        """The TCP port, and number in configfs, that follows from the NQN; even for IPv4, odd for IPv6."""
        data = utf8(self.prefix) + family.to_bytes(4, sys.byteorder)
        number = 1024 + siphash24(bytes.fromhex(self.PORT_KEY), data) % (65535 - 1024)
        return number & 0xFFFE | (family == AF_INET6)

    def adopt(self, live: dict[str, Branch]) -> None:
        """Takes the ports of an earlier run, or those that follow from the NQN unless they are taken."""
        ours = [int(r.rpartition("/")[2]) for r, b in live.items() if b.tag == "port"]
        for family in self.FAMILIES:
            if family == AF_INET6 and not os.path.exists(PROC + "net/if_inet6"):
                debug("IPv6 is off, exporting over IPv4 only")
                continue
            if self.listening:
                self.ports[family] = self.listening.port or self.port_number(family)
                continue
            earlier = [n for n in ours if n & 1 == (family == AF_INET6)]
            self.ports[family] = earlier[0] if earlier else self.port_number(family)
            while not earlier and os.path.lexists(f"{CONFIGFS}nvmet/ports/{self.ports[family]}"):
                if not self.next_port(family):
                    raise UserError(
                        f"Failed to find a free port for {self.FAMILIES[family][2]}; remove some from nvmet"
                    )
        self.adopt_single(live)
        self.admission.keep()

    def end(self) -> None:
        self.admission.forget()

    def next_port(self, family: int) -> bool:
        """Goes on to a random port of the same parity; False if that was done often enough."""
        taken = self.ports[family]
        self.ports[family] = random_port() & 0xFFFE | (family == AF_INET6)
        # A warning: clients may have been told the port; and --dry-run has nothing but steps in its output.
        warning(f"Port {taken} is taken, using {self.ports[family]} for {self.FAMILIES[family][2]}")
        return self.is_tried_again()

    def adapt(self, failure: Failure) -> bool:
        e, entry = failure.error, failure.entry
        port = entry.port if isinstance(entry, PortLink) else failure.branch.root
        text = next((text for text, n in self.places.items() if port_root(n) == port), "")
        if not text or failure.cause:
            return False
        if self.listening:
            return self.adapt_single(e, text, made=port != failure.branch.root)
        family = self.family(text)
        if e.errno == errno.EADDRINUSE or (e.errno == errno.EEXIST and port == failure.branch.root):
            return self.next_port(family)
        if e.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(self.ports) > 1:
            info(f"{self.FAMILIES[family][2]} is off, exporting without it")
            del self.ports[family]
            return True
        return False

    def encryption(self, port: str) -> list[Entry]:
        """What has a port take TLS, or nothing else."""
        if not self.admission.encrypted:
            return [Untouched(port + "/addr_tsas", "none")]
        treq = "required" if self.admission.required else "not required"
        return [Attribute(port + "/addr_tsas", "tls1.3"), Attribute(port + "/addr_treq", treq)]

    def common(self) -> list[Branch]:
        """The hosts that are allowed, their keys, and the ports."""
        branches = [self.host_branch(host) for host in self.admission.hosts]
        if self.admission.restricted:
            branches += [key for nqn in (DISCOVERY_NQN, *self.subsystems) for key in self.keys(nqn)]
        for traddr, number in self.places.items():
            family = self.family(traddr)
            path = port_root(number)
            branches.append(
                Branch(
                    f"port {traddr}" if self.listening else "port",
                    [
                        Directory(path),
                        Attribute(path + "/addr_adrfam", self.FAMILIES[family][0]),
                        Attribute(path + "/addr_trtype", "tcp"),
                        Attribute(path + "/addr_trsvcid", str(self.ports[family])),
                        Attribute(path + "/addr_traddr", traddr),
                        *self.encryption(path),
                        DefaultGroup(path + "/subsystems"),
                    ],
                )
            )
        return branches

    def host_branch(self, host: AllowedHost) -> Branch:
        """A host, with what it has to prove by itself.

        Where TLS is required, the host of a code has shown with that that it knows the code.
        """
        path = host.root()
        entries: list[Entry] = [Directory(path)]
        if host.secret:
            entries.append(Attribute(path + "/dhchap_hash", f"hmac({self.admission.hash})"))
            entries.append(Attribute(path + "/dhchap_dhgroup", self.admission.dhgroup))
        for name, secret in (("dhchap_key", host.secret), ("dhchap_ctrl_key", host.controller_secret)):
            entry = f"{path}/{name}"
            entries.append(SecretAttribute(entry, secret) if secret else Untouched(entry))
        return Branch("host", entries)

    def keys(self, subsystem: str) -> list[Branch]:
        """The keys by which hosts open TLS connections to a subsystem, as old and new clients have them."""
        if not self.admission.encrypted:
            return []
        if subsystem not in self.known_keys:
            self.known_keys[subsystem] = [
                Branch("key", [TlsKey.of(host, subsystem, exact=exact)])
                for host in self.admission.hosts
                if host.psk
                for exact in (True, False)
            ]
        return self.known_keys[subsystem]

    def needed(self, subsystem: str) -> list[str]:
        """The roots of what a subsystem needs before clients may come in to it."""
        ports = [port_root(n) for n in self.places.values()]
        if not self.admission.restricted:
            return ports
        keys = [b.root for nqn in (DISCOVERY_NQN, subsystem) for b in self.keys(nqn)]
        return [*(h.root() for h in self.admission.hosts), *keys, *ports]

    def admission_explained(self, failure: Failure) -> str:
        """Why the kernel does not take what keeps others away."""
        e, entry = failure.error, failure.entry
        name = os.path.basename(entry.path)
        if isinstance(entry, TlsKey) and e.errno == errno.EEXIST:
            return "another program put a key there; remove it"
        if entry.path == failure.branch.root and entry.path.startswith("nvmet/hosts/"):
            if e.errno == errno.EEXIST:
                return "another program has that host in nvmet; stop that, or let in another host"
            if e.errno == errno.EBUSY:
                return (
                    f"{reason_of(e)}: another program lets that host in to a subsystem of its own; remove "
                    "its link from 'allowed_hosts' there"
                )
        if name.startswith("dhchap_") and e.errno in (errno.ENOENT, errno.EACCES):
            return (
                "this kernel cannot ask hosts for their secrets; boot one with CONFIG_NVME_TARGET_AUTH "
                "(Linux 6.0 and later)"
            )
        if e.errno not in (errno.ENOENT, errno.EACCES, errno.EINVAL, ENOTSUPP):
            return ""
        if name in ("dhchap_hash", "dhchap_dhgroup"):
            return f"this kernel has no '{entry.value}'; give another --hash= or --dhgroup="
        if name in ("dhchap_key", "dhchap_ctrl_key"):
            return (
                "this kernel lacks the hash by which the host's secret is changed; make one with "
                "'nvme gen-dhchap-key --hmac=0'"
            )
        if name in ("addr_tsas", "addr_treq"):
            return (
                "this kernel cannot encrypt NVMe/TCP; boot one with CONFIG_NVME_TARGET_TCP_TLS (Linux 6.7 "
                f"and later), or see --encrypt=no: {UNENCRYPTED}"
            )
        return ""

    def prepare_tls(self) -> None:
        """Loads what the kernel lacks for TLS, and looks for the daemon that opens connections for it."""
        for module in ("nvme-keyring", "tls"):
            load_module(module)
        way_out = f"or see --encrypt=no: {UNENCRYPTED}"
        try:
            TlsKey.keyring.open()
        except OSError as e:
            raise UserError(
                f"This kernel cannot encrypt NVMe/TCP: no keyring '.nvme' ({reason_of(e)}); boot one with "
                f"CONFIG_NVME_TARGET_TCP_TLS (Linux 6.7 and later), {way_out}"
            ) from e
        # In an initrd, our own unit has it.
        if not self.find_daemon() and run_program("systemctl", "start", "storagetm-tlshd.service"):
            debug("Failed to start storagetm-tlshd.service")
        if not self.find_daemon():
            raise UserError(
                "Nothing on this machine opens TLS connections for the kernel; install ktls-utils and start "
                f"tlshd, {way_out}"
            )

    def find_daemon(self) -> bool:
        """Whether something opens TLS connections for the kernel."""
        self.daemon = find_process("tlshd", self.daemon)
        return bool(self.daemon)

    def other_keys(self) -> list[str]:
        """The identities of keys that another program has put where the kernel looks for ours."""
        ours = {
            entry.name
            for branches in self.known_keys.values()
            for branch in branches
            for entry in branch.entries
            if isinstance(entry, TlsKey)
        }
        try:
            return sorted(TlsKey.keyring.identities() - ours)
        except OSError as e:
            debug(f"Failed to look for others' keys, ignoring: {reason_of(e)}")
            return []

    def instruction(self, at: Address, what: str, nqn: str = "", disk: str = "") -> Instruction:
        """The command that attaches `what` ("connect", "connect-all") on the client.

        A link-local IPv6 address means nothing without the interface, and that is the client's. Behind the
        address (`%eth0`) it is lost in "connect-all", which goes on with addresses that the target has told,
        without any.
        """
        scope = note = ""
        if at.family == AF_INET6 and at.link_local:
            scope = " -f INTERFACE"
            note = "(INTERFACE: the other machine's interface to this one, see 'ip link')"
        where = f"-t tcp -a {at.text} -s {self.ports[at.family]}{scope}"
        more = [f"-n {typed(nqn)}"] if nqn else []
        if not (host := self.admission.paired):
            brief = f"nvme connect-all {where}"
            return Instruction(at, f"nvme {what} {where}", more, note=note, brief=brief, disk=disk)
        # The short options are --hostnqn= and --hostid=, below --subsysnqn= and --keydata=, --dhchap-secret=
        # and --dhchap-ctrl-secret=. With these, a line has less than 80 columns.
        more += [f"-q {host.nqn}", f"-I {host.host_id}"]
        secrets, before = [], [["modprobe nvme-tcp"]]
        if self.admission.encrypted and host.psk:
            more.append("--tls")
            # tlshd looks for the keyring when it starts.
            before = [["modprobe -a nvme-tcp nvme-keyring"], ["systemctl restart tlshd"]]
            names = f"-n {host.nqn}", f"-c {typed(nqn)}"
            key = Confidential(f"-d {psk_text(host.psk)}")
            before.append(["nvme check-tls-key -I 1 --insert", *names, key])
        for option, secret in ("-S", host.secret), ("-C", host.controller_secret):
            if secret:
                secrets.append(Confidential(f"{option} {secret.reveal().decode()}"))
        return Instruction(
            at, f"nvme {what} {where}", more, note=note, disk=disk, secrets=secrets, before=before
        )

    def code(self) -> str:
        return Confidential(self.admission.code.text()) if self.admission.code else ""

    def alerts(self) -> list[str]:
        """What those can do who are not let in, but listen."""
        admission = self.admission
        found = [
            f"The host {host.nqn} is let in by its name alone, which crosses the network in the clear and "
            "proves nothing"
            for host in admission.hosts
            if not (host.secret or (admission.required and host.psk))
        ]
        if admission.restricted and not admission.required:
            text = "What clients read and write is not encrypted: who listens on the network can read along"
            if kernel_version() > LAST_TO_ASK_QUEUES:
                text += (
                    ", and with this kernel read and write the disks as a client does, without its secret"
                )
            found.append(text)
        if admission.encrypted:
            if not self.find_daemon():
                found.append(
                    "tlshd has ended, so no client can connect with TLS; start it again, as with 'systemctl "
                    "restart tlshd'"
                )
            # What counts is that the kernel has a key: neither its host nor its subsystem is compared.
            if others := self.other_keys():
                found.append(
                    "Another program has put keys into the keyring .nvme; who has one of them can pass for "
                    f"a host that is let in: {', '.join(map(repr, others))}"
                )
        return found


class NvmeTcp(NvmePorts):
    """NVMe/TCP through the kernel's nvmet: a subsystem for each disk, a port for each address family.

    Names, ports and identities are those of systemd-storagetm.
    """

    name = "nvme-tcp"
    modules = ("nvmet", "nvmet-tcp")

    def __init__(
        self,
        machine: Machine,
        instance: str = "",
        *,
        clients: int = 1,
        writable: bool = False,
        admission: Admission | None = None,
        listening: Listening | None = None,
    ) -> None:
        super().__init__(instance or machine.instance(), admission, listening)
        self.machine = machine
        self.clients = clients  # how many may attach a disk that they can write to at a time; 0 for any
        self.writable = writable  # whether there may be a disk that clients can write to
        self.identities = Identities(machine)
        self.host = OwnHost(self.admission, self.ports, self.port_number(0))
        self.courtesy = Courtesy(self.host)
        self.arrivals = Arrivals()

    def prepare(self) -> None:
        """Loads the kernel's target and mounts configfs, where they are missing."""
        # Built in, it has no directory there, but modprobe knows.
        loaded = os.path.isdir(SYS + "module/nvmet_tcp")
        if not loaded and load_module("nvmet-tcp") == 1:
            raise UserError(
                "The module 'nvmet-tcp', the kernel's NVMe target, cannot be loaded; install the modules of "
                f"kernel {os.uname().release}, or boot one with CONFIG_NVME_TARGET_TCP"
            )
        if not os.path.isdir(CONFIGFS + "nvmet"):
            prepare_configfs()
        if not os.path.isdir(CONFIGFS + "nvmet"):
            raise UserError(
                f"This kernel ({os.uname().release}) has no NVMe target, or its module 'nvmet' is not "
                "loaded; boot one with CONFIG_NVME_TARGET_TCP"
            )
        if self.admission.encrypted:
            self.prepare_tls()

    # Names

    def nqn(self, export: Export) -> str:
        return f"{self.prefix}.{export.disk.name}"

    def label(self, export: Export) -> str:
        """What clients call a disk."""
        return self.nqn(export)

    def root(self, export: Export) -> str:
        """The root of the disk's branch of the tree."""
        return f"nvmet/subsystems/{self.nqn(export)}"

    def namespace(self, export: Export) -> str:
        """The path of a disk's namespace."""
        return f"nvmet/subsystems/{self.nqn(export)}/namespaces/{self.number(export)}"

    @staticmethod
    def number(export: Export) -> int:
        """The number of a disk's namespace; 0 as long as it has none."""
        return export.stay.number if export.stay else 0

    def why_not(self, export: Export) -> str:
        if "," in self.nqn(export):
            return "its name has a comma, which no client can have in an NQN; rename it"
        return self.why_too_long(export)

    def why_too_long(self, export: Export) -> str:
        """Why the disk's NQN does not fit; empty if it does."""
        length = len(utf8(self.nqn(export)))
        return (
            f"its NQN '{self.nqn(export)}' has {length} bytes, {NQN_MAX} are allowed"
            if length > NQN_MAX
            else ""
        )

    def check(self, exports: Iterable[Export]) -> None:
        for export in exports:
            node = export.disk.node
            if why := self.why_too_long(export):
                raise UsageError(f"--nqn= is too long for '{node}': {why}")
            if export.named and (why := self.why_not(export)):
                raise UserError(f"Failed to export '{node}': {why}")

    def keeps(self, live: Branch) -> bool:
        """Not if it lets in others than those who are to be let in now."""
        # Ports that are other ones now are made anew, and all that needs them with them.
        ports = {port_root(number) for number in self.places.values()}
        return set(self.needed(os.path.basename(live.root))) - ports <= set(live.needs)

    def explain(self, failure: Failure) -> str:
        e, entry = failure.error, failure.entry
        if why := self.admission_explained(failure):
            return why
        if e.errno == errno.EEXIST and failure.branch.root.startswith("nvmet/"):
            name = os.path.basename(failure.branch.root.partition("/namespaces/")[0])
            return f"another program made '{name}'; stop it, or give another --nqn"
        if isinstance(entry, Seat):
            if e.errno == errno.EBUSY:
                return "several clients have attached it already; detach it from all, or see --clients=any"
            return (
                f"this kernel keeps other clients away only while storagetm is one, and that fails: "
                f"{reason_of(e)}; let this machine's firewall accept all packets on "
                "'lo', or see --clients=any"
            )
        name = os.path.basename(entry.path)
        if e.errno in (errno.ENOENT, errno.EACCES, errno.EINVAL) and name.startswith("attr_cntlid_"):
            return "this kernel cannot keep other clients away (Linux 6.12 can); see --clients=any"
        return ""

    # The wanted tree

    def arrange(self, exports: Sequence[Export], live: dict[str, Branch]) -> None:
        if self.admission.encrypted:
            self.subsystems = [self.nqn(export) for export in exports]

    def scaffolds(self, live: dict[str, Branch]) -> list[Branch]:
        return [self.host.passage_branch(live, self.places.values())]

    def limit(self, access: str) -> int:
        """How many clients may attach a disk at a time; 0 for any.

        Most file systems break when two machines write to them.
        """
        return 0 if access == READ_ONLY else self.clients

    def subsystem_entries(self, path: str, model: str, serial: str, limit: int, index: int) -> list[Entry]:
        """All of a subsystem but its namespaces. `index` tells it from others that have a `limit`."""
        anybody = "0" if self.admission.restricted else "1"
        entries: list[Entry] = [Directory(path), Attribute(path + "/attr_allow_any_host", anybody)]
        entries += [Allowance(path, host) for host in self.admission.hosts]
        if limit:
            # The kernel refuses a host when all controllers' IDs between these are taken (Linux 5.8). One is
            # taken whichever subsystem it is used in. Where a Seat is taken, there is one more.
            each = limit + 1
            first = CNTLID_MIN + index % ((CNTLID_MAX - CNTLID_MIN + 1) // each) * each
            entries.append(Attribute(path + "/attr_cntlid_min", str(first)))
            entries.append(ClientLimit(path + "/attr_cntlid_max", str(first + limit - 1), self.host))
        for name, value in (("model", model), ("firmware", self.identities.firmware), ("serial", serial)):
            if value:
                entries.append(OptionalAttribute(f"{path}/attr_{name}", value))
        return entries

    def links(self, subsystem: str, limit: int) -> list[Entry]:
        """What lets clients in, and so comes last."""
        links: list[Entry] = [PortLink(port_root(n), subsystem) for n in self.places.values()]
        if limit != 1 or not links:
            return links
        # The last ID that Linux 6.1 takes for the first is one that makes room for two.
        return [links[0], Seat(subsystem, self.host, next(iter(self.places))), *links[1:]]

    def basis(self) -> object:
        return (*self.places.items(), self.host.passage)

    def branch(self, export: Export, between: Branch) -> Branch:
        root = self.root(export)
        limit, index = self.limit(export.access), export.stay.index if export.stay else 0
        identity = self.subsystem_entries(
            root, self.identities.model(export), self.identities.serial(export), limit, index
        )
        namespace = self.namespace_entries(export, between)
        needs = [between.root, *self.needed(self.nqn(export))]
        return self.branch_of(export, [*identity, *namespace, *self.links(root, limit)], needs)

    def branch_of(self, export: Export, entries: list[Entry], needs: list[str]) -> Branch:
        protected = any(isinstance(e, WriteProtection) for e in entries)
        scaffold = [self.host.passage_root()] if protected else []
        return Branch(export.disk.tag, entries, needs=needs, scaffold=scaffold, claims=self.claims(export))

    def namespace_entries(self, export: Export, between: Branch, *more: Entry) -> list[Entry]:
        """A disk's namespace, with `more` that has to be there before it is enabled."""
        path = self.namespace(export)
        device: Entry = Attribute(path + "/device_path", export.disk.node)
        if mapping := mapping_of(between):
            device = MappedNode(path + "/device_path", mapping)
        entries: list[Entry] = [
            Directory(path),
            device,
            OptionalAttribute(path + "/device_uuid", self.identities.uuid(export)),
            *more,
            Attribute(path + "/enable", "1"),
            # Linux 5.8; before, clients see a new size when they attach anew.
            Trigger(path + "/revalidate_size", str(export.disk.size)),
        ]
        if export.access == READ_ONLY:
            kind = SharedWriteProtection if self.together else WriteProtection
            entries.append(kind(path + "/write_protect", self.host))
        return entries

    def claims(self, export: Export) -> list[tuple[str, str]]:
        """The identities by which clients would take two disks for one."""
        found = [("UUID", self.identities.uuid(export)), ("NGUID", self.identities.nguid(export))]
        if not self.identities.overrides["SERIAL"] and not export.disk.serial and not self.together:
            found.append(("serial number", self.identities.serial(export)))
        return found

    def about_twins(self, kind: str) -> str:
        """What to do about two disks with the same identity of a kind; empty if it is their own."""
        return "unset $SYSTEMD_NVME_UUID" if kind == "UUID" and self.identities.overrides["UUID"] else ""

    # Hosts that could not be told which disks are read-only

    @property
    def due(self) -> float:
        return self.courtesy.again

    def note(self, live: dict[str, Branch]) -> None:
        super().note(live)
        self.courtesy.note(live)
        self.host.network.end()

    def try_again(self, live: dict[str, Branch]) -> None:
        self.courtesy.forget(live)

    def firewall_text(self) -> str:
        """What a firewall on this machine has to let in."""
        ports = list(dict.fromkeys(str(self.ports[self.family(text)]) for text in self.places))
        many = "s" * (len(ports) > 1)
        return f"This machine has a firewall, which must let in TCP port{many} {' and '.join(ports)}"

    # The client's side

    def reachable(self, addresses: Sequence[Address]) -> list[Address]:
        if not self.listening:
            return [a for a in addresses if a.family in self.ports]
        # Who comes in by way of a tunnel types this machine's own address.
        inside = [Address(self.family(t), t, "lo", False) for t in self.places if is_loopback(t)]
        return Listening.reachable(self.places, addresses) + inside

    def way(self, addresses: Sequence[Address]) -> Way:
        if not (usable := self.reachable(addresses)):
            if why := self.why_shut():
                shut, remedy = why
                return Way(f"no address ({shut})", shut, "no disk can be attached yet", remedy)
            return Way(
                "no address (the network is down)",
                "the network is down",
                "no address yet at which disks could be attached",
                "plug in a cable, or wait for an address",
            )
        return Way(f"{len(usable)} address{'es' if len(usable) > 1 else ''}")

    def instructions(self, exports: Iterable[Export], addresses: Sequence[Address]) -> list[Instruction]:
        usable = self.reachable(addresses)
        single = [
            self.instruction(a, "connect", self.nqn(e), e.disk.key) for a in usable[:1] for e in exports
        ]
        if self.admission.encrypted:
            # A key is for one subsystem, so that no single command could attach all of them.
            return single
        return [self.instruction(a, "connect-all") for a in usable if self.tells_all(a)] + single

    def tells_all(self, at: Address) -> bool:
        """Whether "connect-all" works at an address.

        The target tells what the port has in addr_traddr, where that is no wildcard: there with the name of
        this machine's interface, which the client takes for one of its own.
        """
        return not self.listening or "%" not in at.scoped

    def news(self, outdate: Callable[[], None]) -> list[News]:
        return [Clients(outdate)]

    def attached(self) -> list[Client]:
        own = self.host.ends()
        found = Clients.connections(self.ports.values())
        return self.arrivals.clients(c for c in found if (c.address, c.port) not in own)

    def number_text(self, export: Export) -> str:
        """A disk's number, where clients tell disks by that."""
        return f"{self.number(export):#x}" if self.together else ""

    def serial_shown(self, export: Export) -> str:
        """A disk's serial number as clients see it."""
        return self.identities.serial(export)


class SharedNvmeTcp(NvmeTcp):
    """NVMe/TCP with one subsystem for all disks, each of which is a namespace of it."""

    together = True
    NUMBERED = "Namespaces"

    def nqn(self, export: Export) -> str:
        return self.prefix

    def label(self, export: Export) -> str:
        return f"{self.prefix}, namespace {self.number(export):#x}"

    def root(self, export: Export) -> str:
        return self.namespace(export)

    def keeps(self, live: Branch) -> bool:
        return True  # that depends on the subsystem alone

    def explain(self, failure: Failure) -> str:
        # nvmet_ns_enable(): not files of ours.
        if failure.error.errno == errno.EMFILE and os.path.basename(failure.entry.path) == "enable":
            return "the kernel allows no more namespaces in one subsystem (1024); see --subsystem=per-disk"
        return super().explain(failure)

    def common(self) -> list[Branch]:
        """What all of them have, and the subsystem."""
        self.subsystems = [self.prefix]
        branches = super().common()
        path = f"nvmet/subsystems/{self.prefix}"
        limit = self.limit(READ_WRITE if self.writable else READ_ONLY)
        identity = self.subsystem_entries(
            path, self.identities.model(None), self.identities.serial(None), limit, 0
        )
        entries = [*identity, DefaultGroup(path + "/namespaces"), *self.links(path, limit)]
        return [*branches, Branch("subsystem", entries, needs=self.needed(self.prefix))]

    def branch(self, export: Export, between: Branch) -> Branch:
        nguid = OptionalAttribute(self.namespace(export) + "/device_nguid", self.identities.nguid(export))
        entries = self.namespace_entries(export, between, nguid)
        return self.branch_of(export, entries, [between.root, f"nvmet/subsystems/{self.prefix}"])

    def instructions(self, exports: Iterable[Export], addresses: Sequence[Address]) -> list[Instruction]:
        found = [self.instruction(a, "connect", self.prefix) for a in self.reachable(addresses)]
        for instruction in found[1:]:
            instruction.before = []  # once is enough
        return found

    def serial_shown(self, export: Export) -> str:
        return Transport.serial_shown(self, export)  # clients see that of the subsystem


# -----------------------------------------------------------------------------------------------------------
# 27. USB
# -----------------------------------------------------------------------------------------------------------


class Lun(Entry):
    """A disk in one of the gadget's drives: `path` is the attribute that takes its node.

    The kernel opens the node when it is written there, and asks for its size only then. What the host has
    ejected is gone from there, too (do_start_stop() in drivers/usb/gadget/function/f_mass_storage.c). So it
    is ours as long as the drive is the one that we have made.
    """

    LETTER = "u"
    LIVE = CLOSES = CONTENT = True

    opened: ClassVar[dict[str, int]] = {}  # sizes in bytes with which the kernel has opened them, by path

    def __init__(
        self,
        path: str,
        disk: Disk | None = None,
        mapping: Mapping | None = None,
        *,
        read_only: bool = True,
    ) -> None:
        size = disk.size if disk else 0
        inquiry = inquiry_string(disk.vendor(), disk.model, disk.sysname) if disk else ""
        super().__init__(path, f"{size} {int(read_only)} {inquiry}")
        self.disk_node = disk.node if disk else ""
        self.mapping = mapping
        self.size = size
        self.read_only = read_only
        self.inquiry = inquiry

    def node(self) -> str:
        """What is written: the device over the disk, where there is one."""
        if self.mapping is None:
            return self.disk_node
        return self.mapping.node() if self.mapping.sysname() else ""

    def drive(self, root: str) -> str:
        """The directory of the drive."""
        return root + os.path.dirname(self.path)

    def make(self, root: str) -> None:
        lun = self.drive(root)
        if self.is_inserted(root):
            self.insert_again(root)
            return
        if read_attribute(root + self.path):
            self.unmake(root)
        # Only of an empty drive can it be changed.
        write_attribute(lun + "/ro", str(int(self.read_only)))
        try:
            write_attribute(lun + "/inquiry_string", self.inquiry)
        except FileNotFoundError:  # before Linux 4.10
            pass
        write_attribute(root + self.path, self.node())
        self.opened[self.path] = self.size

    def unmake(self, root: str) -> None:
        self.opened.pop(self.path, None)
        try:
            write_attribute(root + self.path, "\n")
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ENOTDIR):
                return
            # The host has locked it.
            if e.errno != errno.EBUSY:
                raise
            try:
                write_attribute(self.drive(root) + "/forced_eject", "1")
            except FileNotFoundError:  # before Linux 6.0
                raise e from None

    def insert_again(self, root: str) -> None:
        """Has the kernel ask for the size anew.

        To the host it is another medium, and what it has mounted would be lost. So while it has the drive
        locked, this waits until it connects again.
        """
        try:
            write_attribute(root + self.path, self.node())
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            debug(f"The host has locked '{self.disk_node}', it sees the new size when it connects again")
            return
        self.opened[self.path] = self.size

    def identity(self, root: str) -> str:
        return Directory(os.path.dirname(self.path)).identity(root)

    def is_inserted(self, root: str) -> bool:
        """Whether it is in the drive, of whatever size."""
        try:
            node = self.node()
        except OSError:
            return False
        # The kernel tells where the node was found.
        same = node != "" and read_attribute(root + self.path) == shown(os.path.realpath(node))
        return same and read_attribute(self.drive(root) + "/ro") == str(int(self.read_only))

    def is_wrong(self, root: str) -> bool:
        """Whether it has another device open, which then cannot be removed."""
        return read_attribute(root + self.path) != "" and not self.is_inserted(root)

    def is_live(self, root: str) -> bool:
        if self.is_ejected(root):
            return True
        # What an earlier run has left is taken to have the size that the disk has now.
        return self.is_inserted(root) and self.opened.setdefault(self.path, self.size) == self.size

    def is_ejected(self, root: str) -> bool:
        """Whether the host has ejected it, and not connected anew since."""
        return self.path in self.opened and not read_attribute(root + self.path)

    @classmethod
    def put_back(cls) -> None:
        """Has what a host has ejected be put in again."""
        for path in [path for path in cls.opened if not read_attribute(CONFIGFS + path)]:
            del cls.opened[path]

    def described(self, root: str) -> dict[str, str]:
        lun = self.drive(root)
        # The number of a device that is not there yet is not known.
        node = f"{DEV}mapper/{self.mapping.name}" if self.mapping else self.disk_node
        command = (
            f"echo {int(self.read_only)} > {quoted(lun + '/ro')} && "
            f"echo {quoted(self.inquiry)} > {quoted(lun + '/inquiry_string')} && "
            f"echo {quoted(node)} > {quoted(root + self.path)}"
        )
        return {"step": "insert", "path": root + self.path, "value": node, "command": command}

    def undescribed(self, root: str) -> dict[str, str]:
        path = root + self.path
        return {"step": "eject", "path": path, "command": f"echo > {quoted(path)}"}


class Function(Link):
    """A function's link in a gadget's configuration. As long as the gadget is not bound, no host sees it."""

    LETTER = "f"
    ADMITS = CLOSES = False

    def is_open(self, root: str) -> bool:
        return False


class Binding(Entry):
    """What a gadget is bound to, a USB device controller: with that, a host sees it."""

    LETTER = "b"
    LIVE = ADMITS = CLOSES = CONTENT = True

    def make(self, root: str) -> None:
        if read_attribute(root + self.path):
            self.unmake(root)
        write_attribute(root + self.path, self.value)

    def unmake(self, root: str) -> None:
        try:
            write_attribute(root + self.path, "\n")
        except OSError as e:
            # ENODEV: it is not bound, or its controller has gone.
            if e.errno not in (errno.ENODEV, errno.ENOENT, errno.ENOTDIR):
                raise

    def identity(self, root: str) -> str:
        return Directory(os.path.dirname(self.path)).identity(root)

    def is_live(self, root: str) -> bool:
        # A controller that has gone is still named there, and when it returns, old kernels do not bind it.
        user = read_attribute(f"{SYS}class/udc/{self.value}/function")
        gadget = os.path.basename(os.path.dirname(self.path))
        return read_attribute(root + self.path) == self.value and user == shown(gadget)

    def is_open(self, root: str) -> bool:
        return read_attribute(root + self.path) != ""

    def described(self, root: str) -> dict[str, str]:
        path = root + self.path
        command = f"echo {quoted(self.value)} > {quoted(path)}"
        return {"step": "bind", "path": path, "value": self.value, "command": command}

    def undescribed(self, root: str) -> dict[str, str]:
        path = root + self.path
        return {"step": "unbind", "path": path, "command": f"echo > {quoted(path)}"}


def inquiry_string(vendor: str, model: str, sysname: str) -> str:
    """Vendor (8 characters), product (16) and revision (4) as SCSI's INQUIRY has them: printable ASCII.

    Disks that tell no vendor mostly have that as the first word of their model.
    """

    def words(text: str) -> list[str]:
        return "".join(c if 0x20 < ord(c) < 0x7F else " " for c in text.replace("_", " ")).split()

    product, maker = words(model), " ".join(words(vendor))
    if len(product) > 1 and (product[0] == maker or (not maker and len(product[0]) <= 8)):
        maker = product.pop(0)
    name = " ".join(product or words(sysname)) or "image"
    return f"{maker or 'Linux':8.8}{name:16.16}{'0001':4.4}"


class UsbState(News):
    """What the USB device controller tells of the host: sysfs says when that changes."""

    def __init__(self, transport: UsbGadget, outdate: Callable[[], None]) -> None:
        self.transport = transport
        self.outdate = outdate
        self.fd = -1
        self.name = ""

    def wants(self) -> tuple[int, int]:
        if self.name != self.transport.controller:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd, self.name = -1, self.transport.controller
            try:
                path = f"{SYS}class/udc/{self.name}/state"
                self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if self.name else -1
                self.read()
            except OSError as e:
                debug(f"Failed to watch '{self.name}', ignoring: {reason_of(e)}")
        return self.fd, select.POLLPRI

    def read(self) -> str:
        """The state. Only once it is read, poll(2) waits for the next."""
        return printable(os.pread(self.fd, 100, 0).strip()) if self.fd >= 0 else ""

    def act(self) -> bool:
        state = ""
        try:
            state = self.read()
        except OSError:  # the controller has gone
            os.close(self.fd)
            self.fd, self.name = -1, ""
        self.transport.take_state(state)
        self.outdate()
        return True


class Ejections(News):
    """Looks for what a host has ejected, as long as there is a host: the kernel tells nobody."""

    LOOK_SEC = 2

    def __init__(self, transport: UsbGadget, outdate: Callable[[], None]) -> None:
        self.transport = transport
        self.outdate = outdate
        self.looked = 0.0  # in seconds of the monotonic clock

    def due(self) -> float | None:
        return self.looked + self.LOOK_SEC if self.transport.told and self.transport.is_used() else None

    def act(self) -> bool:
        self.looked = time.monotonic()
        if any(self.transport.is_ejected(path) != known for path, known in self.transport.told.items()):
            self.outdate()
        return False


class UsbGadget(Transport):
    """USB mass storage: one gadget, with a drive (LUN) for each disk, and a few that are empty for others.

    Drives can only be added while the gadget is not bound. So there are some more than disks, and when these
    do not suffice, the gadget is made anew as soon as no host uses it. All are removable, so that what is in
    them may come and go, which the host asks for.
    """

    name = "usb"
    modules = ("libcomposite", "usb_f_mass_storage")
    cached = True
    LUNS_MAX = 16
    # A function could have 16 (FSG_MAX_LUNS), but says that it is a SCSI-2 device, of which Linux as a host
    # shows no more than 8 (scsi_sequential_lun_scan()).
    FUNCTION_LUNS = 8
    SPARE = 2
    LARGE = 1 << 41  # bytes from which on it needs READ CAPACITY (16), which came with Linux 5.16

    def __init__(self, machine: Machine, instance: str = "", *, optional: bool = False) -> None:
        self.gadget = "usb_gadget/" + (instance or machine.instance())
        self.binding = self.gadget + "/UDC"
        self.optional = optional  # whether nothing is said where the machine has no controller
        self.lacking = False  # whether the kernel has no gadgets, and need not have
        # The class asks for 12 digits at least, upper case. A host must not learn the machine's ID.
        self.serial = str(sha256(machine.id + utf8(self.gadget)).hexdigest()[:16]).upper()
        self.product = "Storage target"
        self.controller = ""
        self.blocked = ""  # the other gadget that has the only controller
        self.refused: dict[str, str] = {}  # why the gadget could not be bound, by controller
        self.state = ""
        self.luns = 0
        self.places: dict[str, int] = {}  # by the disk's tag
        self.told: dict[
            str, bool
        ] = {}  # whether it was shown that the host has ejected what was in the drive
        self.again = 0.0
        self.replugged = False  # whether a host has come or gone, for which ejected disks are put back
        self.arrivals = Arrivals()

    def prepare(self) -> None:
        for module in self.modules:
            if not os.path.isdir(SYS + "module/" + module):
                load_module(module)
        prepare_configfs()
        self.lacking = not os.path.isdir(CONFIGFS + "usb_gadget")
        if self.lacking and not self.optional:
            raise UserError(
                f"This kernel ({os.uname().release}) has no USB gadgets, or its module 'libcomposite' is "
                "missing; boot one with CONFIG_USB_CONFIGFS_MASS_STORAGE, or leave out --transport=usb"
            )

    # The controller

    def look(self) -> None:
        """Finds a controller that is free or ours."""
        own = shown(os.path.basename(self.gadget))
        names = [] if self.lacking else sorted(list_directory(SYS + "class/udc"))
        users = {
            name: read_attribute(f"{SYS}class/udc/{name}/function")
            for name in names
            if name not in self.refused
        }
        mine = [name for name, user in users.items() if user == own]
        free = [name for name, user in users.items() if not user]
        self.controller = (mine or free or [""])[0]
        self.blocked = "" if self.controller else next(iter(users.values()), "")
        # Without a gadget, the kernel still shows what it was with the last one.
        self.state = read_attribute(f"{SYS}class/udc/{self.controller}/state") if mine else ""

    def take_state(self, state: str = "") -> None:
        """Takes note of what our controller tells; without a state, of news of any controller.

        States that follow each other fast may be told as one. What a host has ejected is put back for the
        next one.
        """
        self.refused.clear()
        self.look()
        self.state = state or self.state
        self.replugged |= state in ("configured", "not attached")
        self.again = time.monotonic()

    @property
    def due(self) -> float:
        return self.again

    def try_again(self, live: dict[str, Branch]) -> None:
        prefix = self.gadget + "/" if self.replugged else self.binding
        if self.replugged:
            Lun.put_back()
        self.again, self.replugged = 0.0, False
        for root, branch in list(live.items()):
            if root.startswith(prefix):
                live[root] = branch.to_compare()

    def is_used(self) -> bool:
        """Whether a host has the drives."""
        return self.state in ("configured", "suspended")

    def is_ejected(self, path: str) -> bool:
        """Whether a drive is empty in which there should be a disk."""
        return not read_attribute(CONFIGFS + path)

    # Places

    def adopt(self, live: dict[str, Branch]) -> None:
        self.look()
        for root, branch in live.items():
            if root == self.gadget:
                parts = [os.path.relpath(e.path, root).split("/") for e in branch.entries]
                # The first one comes with the function.
                self.luns = sum(p[0] == "functions" and (len(p) == 2 or p[2] != "lun.0") for p in parts)
            elif (number := self.number(root)) >= 0:
                self.places[branch.tag] = number

    def drive(self, number: int) -> str:
        """The directory of a drive."""
        function, lun = divmod(number, self.FUNCTION_LUNS)
        return f"{self.gadget}/functions/mass_storage.{function}/lun.{lun}"

    def number(self, root: str) -> int:
        """The drive that a branch is for, given its root; -1 if it is for none."""
        return next((n for n in range(self.LUNS_MAX) if root == self.drive(n) + "/file"), -1)

    def arrange(self, exports: Sequence[Export], live: dict[str, Branch]) -> None:
        tags = [e.disk.tag for e in exports if not self.why_unfit(e)]
        new = [tag for tag in tags if tag not in self.places]
        kept = {t: n for t, n in self.places.items() if t in tags}
        if len(kept) + len(new) > self.luns and not (self.luns and self.is_used()):
            self.luns = min(self.LUNS_MAX, len(kept) + len(new) + self.SPARE)
        # Where a disk was that is going now, another one comes last.
        going = set(map(self.number, live))
        free = [n for n in range(self.luns) if n not in kept.values()]
        self.places = {**kept, **dict(zip(new, sorted(free, key=lambda n: n in going)))}

    def basis(self) -> object:
        return self.luns, self.controller == "" and self.optional, tuple(sorted(self.places.items()))

    def why_unfit(self, export: Export) -> str:
        """Why a disk is none for any drive."""
        if export.disk.size >= self.LARGE and kernel_version() < (5, 16):
            return "it has 2 TiB or more, which USB takes from Linux 5.16 on"
        return ""

    def why_not(self, export: Export) -> str:
        if self.optional and not self.controller:
            return (
                f"the USB device controller is used by the gadget '{self.blocked}'"
                if self.blocked
                else "this machine has no USB device controller"
            )
        if why := self.why_unfit(export):
            return why
        if export.disk.tag in self.places:
            return ""
        way_out = "unplug the cable for a moment" if self.luns < self.LUNS_MAX else "pull another disk"
        return f"no LUN is left; {way_out}"

    def root(self, export: Export) -> str:
        return self.drive(self.places.get(export.disk.tag, -1)) + "/file"

    # The wanted tree

    def common(self) -> list[Branch]:
        if self.optional and not self.controller:
            return []
        top, strings = self.gadget, self.gadget + "/strings/0x409"
        config = top + "/configs/c.1"
        entries: list[Entry] = [
            Directory(top),
            Attribute(top + "/idVendor", "0x1d6b"),  # the Linux Foundation's
            Attribute(top + "/idProduct", "0x0104"),  # a gadget of several functions
            Directory(strings),
            Attribute(strings + "/manufacturer", "Linux"),
            Attribute(strings + "/product", self.product),
            Attribute(strings + "/serialnumber", self.serial),
        ]
        driver = os.path.realpath(f"{SYS}class/udc/{self.controller}/device/driver")
        links: list[Entry] = []
        for number in range(max(1, self.luns)):
            lun = self.drive(number)
            function = os.path.dirname(lun)
            if number % self.FUNCTION_LUNS:
                entries.append(Directory(lun))
            else:  # comes with the function
                entries.append(Directory(function))
                links.append(Function(f"{config}/{os.path.basename(function)}", function))
                if self.controller and os.path.basename(driver) == "dwc2":
                    # It does not halt endpoints well, and some hosts reset it again and again for that.
                    entries.append(Attribute(function + "/stall", "0"))
            entries.append(Attribute(lun + "/removable", "1"))
        entries += [Directory(config), *links]
        found = [Branch("gadget", entries)]
        if self.controller:
            # When it cannot be bound, the disks need not be put in anew.
            found.append(Branch("binding", [Binding(self.binding, self.controller)], needs=[top]))
        return found

    def branch(self, export: Export, between: Branch) -> Branch:
        read_only = export.access == READ_ONLY
        lun = Lun(self.root(export), export.disk, mapping_of(between), read_only=read_only)
        return Branch(export.disk.tag, [lun], needs=[between.root, self.gadget])

    def explain(self, failure: Failure) -> str:
        if failure.error.errno == errno.EEXIST and failure.branch.root == self.gadget:
            name = os.path.basename(self.gadget)
            return f"another program made the gadget '{name}'; remove it, or give another --nqn"
        if failure.entry.path == os.path.dirname(self.drive(0)) and failure.error.errno == errno.ENOENT:
            return (
                "this kernel has no USB mass storage, or its module 'usb_f_mass_storage' is missing; boot "
                "one with CONFIG_USB_CONFIGFS_MASS_STORAGE, or leave out --transport=usb"
            )
        if isinstance(failure.entry, Lun) and failure.error.errno == errno.EBUSY:
            return "the host has locked it; eject it there, or unplug the cable"
        return ""

    def adapt(self, failure: Failure) -> bool:
        """Leaves a controller alone that the gadget cannot be bound to, until there is news of it."""
        entry = failure.entry
        if failure.cause:
            return False
        if isinstance(entry, Binding) and entry.value and entry.value == self.controller:
            why = reason_of(failure.error)
            warning(
                f"Failed to use the USB device controller '{entry.value}': {why}; see the kernel's messages"
            )
            self.refused[entry.value] = why
            # The kernel has ejected all disks if it was the function that could not be bound (fsg_bind()).
            self.replugged, self.again = True, time.monotonic()
            self.look()
            return True
        if self.optional and failure.branch.root == self.gadget and not self.lacking:
            warning(f"Exporting nothing over USB: {self.explain(failure) or reason_of(failure.error)}")
            self.lacking = True
            self.look()
            return True
        return False

    # What people are told

    def label(self, export: Export) -> str:
        return f"USB LUN {self.places.get(export.disk.tag, 0)}"

    def instructions(self, exports: Iterable[Export], addresses: Sequence[Address]) -> list[Instruction]:
        return []

    def way(self, addresses: Sequence[Address]) -> Way:
        if self.optional and not self.controller:
            return Way("")
        effect = "no disk can be attached by USB yet"
        if self.blocked:
            shut = f"the USB device controller is used by the gadget '{self.blocked}'"
            return Way("USB (in use)", shut, effect, "stop the program that made it")
        if self.refused and not self.controller:
            name, why = next(iter(self.refused.items()))
            shut = f"the USB device controller '{name}' cannot be used: {why}"
            return Way("USB (no controller)", shut, effect, "see the kernel's messages")
        if not self.controller:
            shut = "this machine has no USB device controller"
            return Way("USB (no controller)", shut, effect, "plug in one, or load its driver")
        hint = "Connect this machine's USB device port to another machine, and the disks appear there"
        where = "USB (a host is connected)" if self.is_used() else "USB"
        return Way(where, hint="" if self.is_used() else hint)

    def attached(self) -> list[Client]:
        times = self.arrivals.since(["the USB host"] if self.is_used() else [])
        return [Client(who, since) for who, since in times.items()]

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        found = ["USB: a host is connected"] if self.is_used() else []
        if self.optional and self.blocked:
            found.append(
                f"USB: no disk is exported over it: the gadget '{self.blocked}' uses the device "
                "controller; stop the program that made it"
            )
        self.told = {}
        for export in exports:
            path = self.root(export)
            self.told[path] = self.is_ejected(path)
            if self.told[path]:
                found.append(
                    f"USB: the host has ejected '{export.disk.node}'; it comes back when the cable is "
                    "plugged in again"
                )
        return found

    def news(self, outdate: Callable[[], None]) -> list[News]:
        uevents = Uevents("udc")

        def take() -> bool:
            if changed := uevents.changed() != set():
                self.take_state()
                outdate()
            return changed

        # There may have been news before this listened.
        before = self.controller
        self.look()
        if self.controller != before:
            self.again = time.monotonic()

        return [Incoming(uevents.socket, take), UsbState(self, outdate), Ejections(self, outdate)]


# -----------------------------------------------------------------------------------------------------------
# 28. Parts of NBD
# -----------------------------------------------------------------------------------------------------------


# The numbers of the NBD protocol (doc/proto.md of the NBD project).
NBD_MAGIC, NBD_OPTIONS_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
NBD_REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
NBD_FIXED_NEWSTYLE, NBD_NO_ZEROES = 1, 2
NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_STARTTLS = 1, 2, 3, 5
NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY = 6, 7, 8
NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT = 9, 10
NBD_REP_ACK, NBD_REP_SERVER, NBD_REP_INFO, NBD_REP_META_CONTEXT = 1, 2, 3, 4
NBD_REP_ERR_UNSUP, NBD_REP_ERR_POLICY, NBD_REP_ERR_INVALID = 0x80000001, 0x80000002, 0x80000003
NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNKNOWN = 0x80000005, 0x80000006
NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE = 0, 1, 2, 3
NBD_HAS_FLAGS, NBD_READ_ONLY, NBD_SEND_FLUSH, NBD_SEND_FUA, NBD_ROTATIONAL = 1, 2, 4, 8, 16
NBD_SEND_TRIM, NBD_SEND_WRITE_ZEROES, NBD_SEND_DF, NBD_CAN_MULTI_CONN = 32, 64, 128, 256
NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH, NBD_CMD_TRIM = 0, 1, 2, 3, 4
NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS = 6, 7
NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_REQ_ONE = 1, 2, 4, 8
# What each request may have. FUA may come with all of them, and counts where something is changed.
NBD_CMD_FLAGS = {
    NBD_CMD_READ: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF,
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA,
    NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE,
}
NBD_CHANGES = (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)
# All that a client may be told; the numbers are Linux's.
NBD_ERRORS = (*(errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC), errno.EOVERFLOW)
NBD_REPLY_FLAG_DONE = 1
NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_ERROR = 1, 5, 0x8001
NBD_STATE_HOLE, NBD_STATE_ZERO = 1, 2
ALLOCATION = 1  # what stands for base:allocation, the only kind of extents there is
REQUEST_MAX = 32 << 20  # bytes of a read or write; what all servers take
EXTENTS_MAX = 1024  # in one answer


def big(number: int, size: int) -> bytes:
    """A number as the protocol has it, in so many bytes."""
    return number.to_bytes(size, "big")


def counted(data: bytes) -> tuple[bytes, bytes]:
    """What stands behind its own length, of 4 bytes, and the rest. Raises ValueError."""
    end = 4 + int.from_bytes(data[:4], "big")
    if len(data) < max(4, end):
        raise ValueError("cut off")
    return data[4:end], data[end:]


def new_buffer(size: int) -> memoryview:
    """Memory that begins at a page, as I/O past the page cache asks for."""
    import mmap  # needed for this alone

    return memoryview(mmap.mmap(-1, size))


def device_range(offset: int, length: int) -> bytes:
    """What ioctls of block devices take (include/uapi/linux/fs.h)."""
    return offset.to_bytes(8, sys.byteorder) + length.to_bytes(8, sys.byteorder)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), of which Python has a part only. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))


class Malformed(OSError):
    """A client does not keep to the protocol, so that nothing it sends next would make sense."""


class NbdTls:
    """TLS 1.3 with a key that both sides know. All methods but the first raise OSError.

    No certificate is ever loaded: where a key is not taken, OpenSSL goes on to certificates, and so has to
    fail. Nothing is resumed: each connection has to show that its other end knows the key.
    """

    IDENTITY = "storagetm"  # of the key; no secret
    CIPHERS: ClassVar[dict[str, str]] = {
        "TLS_AES_128_GCM_SHA256": "AES-128-GCM",
        "TLS_CHACHA20_POLY1305_SHA256": "ChaCha20-Poly1305",
    }

    def __init__(self, key: Secret) -> None:
        import ssl  # takes long, and needs OpenSSL

        self.keys = {self.IDENTITY: key}
        self.no_key = Secret(os.urandom(32))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = self.context.maximum_version = ssl.TLSVersion.TLSv1_3
        self.context.num_tickets = 0
        self.context.set_psk_server_callback(self.find)  # type: ignore[attr-defined, unused-ignore]

    @staticmethod
    def why_not() -> str:
        """Why there cannot be any here, and the way out; empty if there can."""
        try:
            import ssl
        except ImportError:
            return (
                "Python's module 'ssl' is missing; install it, or for an initrd see storagetm_nbd_tls= in "
                "storagetm(8)"
            )
        if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
            return f"Python {sys.version.partition(' ')[0]} has no TLS with keys; Python 3.13 and later have"
        if not getattr(ssl, "HAS_PSK", False):
            return "the OpenSSL of this Python was built without TLS with keys; install another one"
        return ""

    def find(self, identity: str | None) -> bytes:
        """The key of an identity; for any other one a key that nobody has.

        With none, or an exception, OpenSSL would go on as if the client had offered no key.
        """
        return self.keys.get(identity or "", self.no_key).reveal()

    def wrap(self, connection: Any) -> Any:
        """What takes the place of a connection, before the handshake."""
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def cipher_text(self, connection: Any) -> str:
        name = (connection.cipher() or ("",))[0]
        return f"TLS 1.3, {self.CIPHERS.get(name, name)}"


class Conduit:
    """A pipe, by which what is on a disk gets to a socket without being copied. Raises OSError.

    All that goes into it is there before anything comes out, so that a client is told nothing of what cannot
    be read. (sendfile(2) finds out half-way, when what it promises has been said.) Beside reading and
    sending, it takes a third of the processor's time, 0.14 s instead of 0.4 s for each GB, and nbdcopy gets
    1.7 times as much with one connection, and 2.9 times with four, of which the threads wait for each other.
    """

    SIZE = 1 << 20  # bytes; who is not root gets no more, and perhaps less
    # Linux 6.5 began to read past the page cache into pages of the pipe's own.
    DIRECT = (6, 5)

    def __init__(self) -> None:
        self.ends = os.pipe2(os.O_CLOEXEC)
        try:
            fcntl.fcntl(self.ends[1], F_SETPIPE_SZ, self.SIZE)
        except OSError:
            pass  # it does with less
        # Half is enough: in pages, what stands before the data takes one, and data may begin within one.
        self.piece = fcntl.fcntl(self.ends[1], F_GETPIPE_SZ) // 2

    @classmethod
    def open(cls, disk: NbdDisk) -> Conduit | None:
        """One for a disk; None if that is read as ever."""
        if not hasattr(os, "splice") or (not disk.read_only and kernel_version() < cls.DIRECT):
            return None  # Python 3.9, or an old kernel
        try:
            return cls()
        except OSError as e:
            debug(f"NBD: no pipe: {reason_of(e)}")
            return None

    def close(self) -> None:
        for fd in self.ends:
            os.close(fd)

    def fill(self, head: bytes, fd: int, offset: int, count: int) -> None:
        """Puts in these bytes and then so many of a file's."""
        os.write(self.ends[1], head)
        while count:
            # Never waits for room, which nobody would make.
            done = os.splice(fd, self.ends[1], count, offset, flags=SPLICE_F_NONBLOCK)  # novm
            if not done:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            offset, count = offset + done, count - done

    def empty(self, fd: int, count: int) -> None:
        """Sends so many bytes that are in it."""
        while count:
            count -= os.splice(self.ends[0], fd, count)  # novm


class NbdDisk:
    """A disk as clients of NBD see it, and those who use it. All methods raise OSError.

    Where it can be written to, I/O goes past the page cache, so that clients of other transports see the
    same. Sizes are in bytes.
    """

    PIECE = 1 << 20  # at most in one call
    ZEROES = 1 << 28  # likewise, of what is only zeroed or discarded

    def __init__(self, node: str, disk: Disk, *, read_only: bool, clients: int = 0) -> None:
        self.node = node
        self.clients = clients  # how many machines may use it at a time; 0 for any
        self.size = disk.size
        self.block = max(512, disk.block or logical_block_size(node))
        self.read_only = read_only
        self.description = ", ".join(filter(None, (size_text(disk.size), disk.model, disk.serial)))
        # Of a file that others can change, a hole may be one no longer when a client hears of it.
        self.file = disk.node if read_only and not disk.sysname else ""
        self.users: set[NbdNegotiation] = set()
        self.ragged = 0  # how many of them may write parts of blocks
        self.mutex = _thread.allocate_lock()  # held while a part of a block is written
        self.fd = self.holes = self.past_cache = -1
        try:
            self.open()
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        mode = os.O_RDONLY if self.read_only else os.O_RDWR | os.O_DIRECT
        try:
            self.fd = os.open(self.node, mode | os.O_CLOEXEC)
        except OSError as e:
            # On tmpfs there is nothing to go past (before Linux 6.6).
            if self.read_only or e.errno != errno.EINVAL:
                raise
            self.fd = os.open(self.node, os.O_RDWR | os.O_CLOEXEC)
        self.is_device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
        if self.is_device and self.read_only:
            self.past_cache = os.open(self.node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        if self.file:
            self.holes = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        queue = f"{sys_block(sysname_of(os.fstat(self.fd).st_rdev))}/queue/" if self.is_device else ""
        self.rotates = bool(queue) and read_attribute(queue + "rotational") == "1"
        self.discards = not queue or read_attribute(queue + "discard_max_bytes") not in ("", "0")

    def close(self) -> None:
        for fd in (self.fd, self.holes, self.past_cache):
            if fd >= 0:
                os.close(fd)
        self.fd = self.holes = self.past_cache = -1

    @property
    def flags(self) -> int:
        """What it can do, as the protocol's transmission flags."""
        flags = NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_SEND_DF | NBD_CAN_MULTI_CONN
        flags |= NBD_ROTATIONAL * self.rotates
        if self.read_only:
            return flags | NBD_READ_ONLY
        return flags | NBD_SEND_WRITE_ZEROES | NBD_SEND_TRIM * self.discards

    def around(self, offset: int, length: int) -> tuple[int, int]:
        """Where the blocks begin and end that have these bytes in them."""
        return offset - offset % self.block, offset + length + -(offset + length) % self.block

    def read(self, buffer: memoryview, offset: int, length: int) -> memoryview:
        """So many bytes of the disk, in the buffer."""
        begin, end = self.around(offset, length)
        try:
            count = os.preadv(self.fd, [buffer[: end - begin]], begin)
        except OSError:
            if self.past_cache < 0:
                raise
            # With a sector, all of a page could not be read.
            count = os.preadv(self.past_cache, [buffer[: end - begin]], begin)
        if count < offset - begin + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return buffer[offset - begin : offset - begin + length]

    def write(self, buffer: memoryview, offset: int, length: int, *, durable: bool) -> None:
        """Writes bytes that are in the buffer at where the disk has them in its first block."""
        begin, end = self.around(offset, length)
        if (end - begin != length) or self.ragged:
            with self.mutex:
                self.complete(buffer, offset, length)
                self.write_blocks(buffer[: end - begin], begin, durable=durable)
        else:
            self.write_blocks(buffer[:length], begin, durable=durable)

    def complete(self, buffer: memoryview, offset: int, length: int) -> None:
        """Puts in front of bytes to write, and behind them, what the disk has there."""
        begin, end = self.around(offset, length)
        if head := offset - begin:
            buffer[:head] = self.one_block(begin)[:head]
        if tail := end - offset - length:
            buffer[end - begin - tail : end - begin] = self.one_block(end - self.block)[-tail:]

    def one_block(self, offset: int) -> memoryview:
        return self.read(new_buffer(self.block), offset, self.block)

    def write_blocks(self, data: memoryview, offset: int, *, durable: bool) -> None:
        if os.pwritev(self.fd, [data], offset, os.RWF_DSYNC if durable else 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Lets the disk forget whole blocks; to forget less than asked for is allowed."""
        begin, end = offset + -offset % self.block, offset + length - (offset + length) % self.block
        for start in range(begin, end, self.ZEROES):
            count = min(self.ZEROES, end - start)
            try:
                if self.is_device:
                    fcntl.ioctl(self.fd, BLKDISCARD, device_range(start, count))
                else:
                    fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, count)
            except OSError as e:
                if e.errno != errno.EOPNOTSUPP:
                    raise
                return

    def zero(self, buffer: memoryview, offset: int, length: int, *, hole: bool, durable: bool) -> None:
        """Has so many bytes be zeroes; with `hole` the space that they take may be given back."""
        begin, end = offset + -offset % self.block, offset + length - (offset + length) % self.block
        parts = [(offset, min(begin, offset + length)), (max(begin, end), offset + length)]
        for start, stop in parts if begin <= end else [(offset, offset + length)]:
            self.write_zeroes(buffer, start, stop, durable=durable)
        for start in range(begin, end, self.ZEROES):
            count = min(self.ZEROES, end - start)
            try:
                if self.is_device:
                    fcntl.ioctl(self.fd, BLKZEROOUT, device_range(start, count))
                else:
                    how = FALLOC_FL_PUNCH_HOLE if hole else FALLOC_FL_ZERO_RANGE
                    fallocate(self.fd, how | FALLOC_FL_KEEP_SIZE, start, count)
            except OSError as e:
                if e.errno != errno.EOPNOTSUPP:
                    raise
                self.write_zeroes(buffer, start, start + count, durable=durable)
        if durable:
            self.flush()

    def write_zeroes(self, buffer: memoryview, begin: int, end: int, *, durable: bool) -> None:
        while begin < end:
            count = min(self.PIECE, end - begin)
            place = begin % self.block
            buffer[place : place + count] = bytes(count)
            self.write(buffer, begin, count, durable=durable)
            begin += count

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is there of so many bytes: lengths, with 3 for a hole, which reads as zeroes, or 0."""
        if self.holes < 0:
            return [(length, 0)]
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end and len(found) < EXTENTS_MAX:
            try:
                data = os.lseek(self.holes, offset, os.SEEK_DATA)
                hole = os.lseek(self.holes, offset, os.SEEK_HOLE)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                data = hole = end  # there is nothing more
            stop = min(end, hole if data == offset else data)
            found.append((stop - offset, 0 if data == offset else NBD_STATE_HOLE | NBD_STATE_ZERO))
            offset = stop
        return found


# -----------------------------------------------------------------------------------------------------------
# 29. A server for NBD
# -----------------------------------------------------------------------------------------------------------


class NbdNegotiation:
    """What is said on a connection before a disk is chosen. All methods raise OSError.

    That is the NBD protocol's "Fixed newstyle negotiation". A client that sends nonsense, or sends too
    slowly, loses the connection.
    """

    PATIENCE_SEC = 10  # for all that comes before a disk is chosen
    OPTIONS = 64  # at most before that
    OPTION_MAX = 8192  # bytes of one; a name has 4096 at most

    def __init__(self, server: NbdServer, connection: socket.socket, address: str, port: int) -> None:
        self.server = server
        self.socket: Any = connection
        self.address = address
        self.port = port
        self.cipher = ""  # what it is encrypted with, if it is
        self.deadline = time.monotonic() + self.PATIENCE_SEC
        self.disk: NbdDisk | None = None
        self.structured = self.aware = self.zeroes = False
        self.context = ""  # the name of the disk whose extents were asked for

    # Bytes

    def hurry(self) -> None:
        """Leaves the next step no more time than there is for all."""
        self.socket.settimeout(max(0.01, self.deadline - time.monotonic()))

    def take_into(self, view: memoryview) -> None:
        while view:
            if not self.disk:
                self.hurry()
            if not (count := self.socket.recv_into(view)):
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            view = view[count:]

    def take(self, count: int) -> bytes:
        found = bytearray(count)
        self.take_into(memoryview(found))
        return bytes(found)

    def put(self, *parts: bytes | memoryview) -> None:
        if self.cipher:
            # Each part would be a record of its own.
            small = sum(map(len, parts)) <= self.OPTION_MAX
            for part in [b"".join(parts)] if small else parts:
                self.socket.sendall(part)
            return
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            count = self.socket.sendmsg(left)
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]

    # Before a disk is chosen

    def negotiate(self) -> bool:
        """Whether the client has chosen a disk."""
        self.put(NBD_MAGIC, NBD_OPTIONS_MAGIC, big(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES, 2))
        flags = int.from_bytes(self.take(4), "big")
        if flags & ~(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES):
            raise Malformed(errno.EPROTO, "unknown flags")
        self.zeroes = not flags & NBD_NO_ZEROES
        for _ in range(self.OPTIONS):
            option = nbd_option.from_buffer_copy(self.take(ctypes.sizeof(nbd_option)))
            if big(option.magic, 8) != NBD_OPTIONS_MAGIC or option.length > self.OPTION_MAX:
                raise Malformed(errno.EPROTO, "no option")
            data = self.take(option.length)
            barred = self.server.key is not None and not self.cipher
            if option.option == NBD_OPT_EXPORT_NAME:
                if barred:
                    raise Malformed(errno.EPERM, "not encrypted")
                return self.choose_at_once(data)
            if option.option == NBD_OPT_ABORT:
                self.answer(option.option, NBD_REP_ACK)
                return False
            if barred and option.option != NBD_OPT_STARTTLS:
                self.answer(option.option, NBD_REP_ERR_TLS_REQD)
                continue
            answer = self.ANSWERS.get(option.option)
            if answer is None:
                self.answer(option.option, NBD_REP_ERR_UNSUP)
                continue
            try:
                answer(self, option.option, data)
            except (IndexError, ValueError):
                self.answer(option.option, NBD_REP_ERR_INVALID)
            if self.disk:
                return True
        raise Malformed(errno.EPROTO, "too many options")

    def answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self.put(NBD_REPLY_MAGIC, big(option, 4), big(kind, 4), big(len(data), 4), data)

    def encrypt(self, option: int, data: bytes) -> None:
        """Goes on with TLS, and forgets what was said before, since anybody may have said that.

        Nothing that was sent after the option has been read from the socket: TLS gets all of it, and if that
        was slipped in, fails.
        """
        if data or self.cipher:
            raise ValueError
        if not (tls := self.server.tls):
            self.answer(option, NBD_REP_ERR_UNSUP)
            return
        self.answer(option, NBD_REP_ACK)
        self.structured, self.context = False, ""
        self.socket = tls.wrap(self.socket)
        self.hurry()
        try:
            self.socket.do_handshake()
        except OSError as e:
            raise Malformed(f"no TLS: {e}") from None  # its errno is OpenSSL's
        self.cipher = tls.cipher_text(self.socket)

    def choose_at_once(self, data: bytes) -> bool:
        """The oldest way to choose a disk, in which a refusal is the end."""
        if not (disk := self.server.find(data)) or self.server.admit(self, disk):
            return False
        self.put(big(disk.size, 8), big(disk.flags, 2), bytes(124 * self.zeroes))
        return True

    def list_disks(self, option: int, data: bytes) -> None:
        if data:
            raise ValueError
        for name, disk in sorted(dict(self.server.disks).items(), key=lambda item: natural_order(item[0])):
            raw = utf8(name)
            self.answer(option, NBD_REP_SERVER, big(len(raw), 4) + raw + utf8(disk.description))
        self.answer(option, NBD_REP_ACK)

    def tell(self, option: int, data: bytes) -> None:
        """What there is to know of a disk (INFO), which is the choice of it, too (GO)."""
        name, rest = counted(data)
        asked = {int.from_bytes(rest[i : i + 2], "big") for i in range(2, len(rest), 2)}
        if len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big") or len(rest) < 2:
            raise ValueError
        if not (disk := self.server.find(name)):
            self.answer(option, NBD_REP_ERR_UNKNOWN)
            return
        if option == NBD_OPT_GO:
            self.aware = NBD_INFO_BLOCK_SIZE in asked
            if why := self.server.admit(self, disk):
                self.answer(option, NBD_REP_ERR_POLICY, utf8(why))
                return
        facts = {
            NBD_INFO_EXPORT: big(disk.size, 8) + big(disk.flags, 2),
            NBD_INFO_NAME: utf8(self.server.name_of(disk)),
            NBD_INFO_DESCRIPTION: utf8(disk.description),
            NBD_INFO_BLOCK_SIZE: big(disk.block, 4) + big(max(4096, disk.block), 4) + big(REQUEST_MAX, 4),
        }
        for kind, fact in facts.items():
            if kind == NBD_INFO_EXPORT or kind in asked:
                self.answer(option, NBD_REP_INFO, big(kind, 2) + fact)
        self.answer(option, NBD_REP_ACK)

    def structure(self, option: int, data: bytes) -> None:
        if data:
            raise ValueError
        self.structured = True
        self.answer(option, NBD_REP_ACK)

    def contexts(self, option: int, data: bytes) -> None:
        """Which kinds of extents there are (LIST), or are to be told (SET): just base:allocation."""
        name, rest = counted(data)
        count, rest = int.from_bytes(rest[:4], "big"), rest[4:]
        queries = []
        while rest:
            query, rest = counted(rest)
            queries.append(query)
        listing = option == NBD_OPT_LIST_META_CONTEXT
        if len(queries) != count or not self.structured:
            raise ValueError
        self.context = "" if not listing else self.context
        if not (disk := self.server.find(name)):
            self.answer(option, NBD_REP_ERR_UNKNOWN)
            return
        wanted = (b"base:allocation", *([b"base:"] if listing else []))
        if any(query in wanted for query in queries) or (listing and not queries):
            if not listing:
                self.context = self.server.name_of(disk)
            self.answer(option, NBD_REP_META_CONTEXT, big(0 if listing else ALLOCATION, 4) + wanted[0])
        self.answer(option, NBD_REP_ACK)

    ANSWERS: ClassVar[dict[int, Callable[[NbdNegotiation, int, bytes], None]]] = {
        NBD_OPT_LIST: list_disks,
        NBD_OPT_STARTTLS: encrypt,
        NBD_OPT_INFO: tell,
        NBD_OPT_GO: tell,
        NBD_OPT_STRUCTURED_REPLY: structure,
        NBD_OPT_LIST_META_CONTEXT: contexts,
        NBD_OPT_SET_META_CONTEXT: contexts,
    }

    def end(self) -> None:
        """Ends the connection from another thread."""
        try:
            # TLS's own method would have the thread of the connection go on without encryption.
            socket.socket.shutdown(self.socket, SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself


class NbdSession(NbdNegotiation):
    """A connection, from the beginning to the end, in a thread of its own.

    Once a disk is chosen, the NBD protocol's "Transmission phase" is followed. What a client sends is never
    kept longer than it takes to answer it, and never takes more memory than one piece.
    """

    buffer: memoryview
    conduit: Conduit | None = None

    def run(self) -> None:
        try:
            self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            self.socket.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            if self.negotiate():
                self.socket.settimeout(None)
                self.serve()
            self.say_goodbye()
        except OSError as e:
            debug(f"NBD: the connection of {self.address} ends: {reason_of(e)}")
        finally:
            self.socket.close()
            if self.conduit:
                self.conduit.close()
            self.server.leave(self)

    def say_goodbye(self) -> None:
        """Tells TLS at the other end that nothing was cut off, without waiting for it to say the same."""
        if self.cipher:
            self.socket.settimeout(0)
            try:
                self.socket.unwrap()
            except OSError:
                pass  # it has not said so yet, or has gone

    def serve(self) -> None:
        """Answers one request after the other until the client says that it was the last."""
        disk = self.disk
        assert disk
        self.buffer = new_buffer(NbdDisk.PIECE + 2 * disk.block)
        if not self.cipher:
            self.conduit = Conduit.open(disk)
        while True:
            request = nbd_request.from_buffer_copy(self.take(ctypes.sizeof(nbd_request)))
            if request.magic != NBD_REQUEST_MAGIC:
                raise Malformed(errno.EPROTO, "no request")
            if request.type == NBD_CMD_DISC:
                return
            if request.type == NBD_CMD_WRITE:
                self.write(disk, request)
            else:
                self.do(disk, request)

    def do(self, disk: NbdDisk, request: nbd_request) -> None:
        found: list[tuple[int, int]] = []
        try:
            self.check(disk, request)
            if request.type == NBD_CMD_BLOCK_STATUS:
                found = disk.extents(request.offset, request.length)
            elif request.type != NBD_CMD_READ:
                self.change(disk, request)
        except OSError as e:
            self.refuse(request, e)
            return
        if request.type == NBD_CMD_READ:
            self.read(disk, request)
        elif request.type == NBD_CMD_BLOCK_STATUS:
            self.tell_extents(request, found)
        else:
            self.put(big(NBD_SIMPLE_REPLY_MAGIC, 4), bytes(4), big(request.cookie, 8))

    def change(self, disk: NbdDisk, request: nbd_request) -> None:
        """What takes no data and gives none."""
        offset, length, durable = request.offset, request.length, bool(request.flags & NBD_CMD_FLAG_FUA)
        if request.type == NBD_CMD_FLUSH and not disk.read_only:
            disk.flush()
        elif request.type == NBD_CMD_TRIM:
            disk.discard(offset, length)
            if durable:
                disk.flush()
        elif request.type == NBD_CMD_WRITE_ZEROES:
            hole = not request.flags & NBD_CMD_FLAG_NO_HOLE
            disk.zero(self.buffer, offset, length, hole=hole, durable=durable)

    def check(self, disk: NbdDisk, request: nbd_request) -> None:
        """Raises OSError, with what the client is told, for what cannot be done."""
        flags = NBD_CMD_FLAGS.get(request.type)
        known = flags is not None and not request.flags & ~flags
        if request.type == NBD_CMD_BLOCK_STATUS and self.server.disks.get(self.context) is not disk:
            known = False
        outside = request.offset + request.length > disk.size
        if request.type == NBD_CMD_READ and request.length > REQUEST_MAX:
            known = False
        if not known or (request.type != NBD_CMD_FLUSH and not request.length):
            raise OSError(errno.EINVAL, "no such request")
        if disk.read_only and request.type in NBD_CHANGES:
            raise OSError(errno.EPERM, "read-only")
        if outside:
            raise OSError(errno.ENOSPC if request.type in NBD_CHANGES else errno.EINVAL, "outside")
        if request.type == NBD_CMD_READ and request.flags & NBD_CMD_FLAG_DF and request.length > disk.PIECE:
            raise OSError(errno.EOVERFLOW, "too long for one piece")

    def refuse(self, request: nbd_request, problem: OSError) -> None:
        """Says why a request is not done."""
        code = problem.errno if problem.errno in NBD_ERRORS else errno.EIO
        if self.structured and request.type in (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS):
            self.put(self.chunk(request, NBD_REPLY_TYPE_ERROR, 6), big(code, 4), bytes(2))
        else:
            self.put(big(NBD_SIMPLE_REPLY_MAGIC, 4), big(code, 4), big(request.cookie, 8))

    def chunk(self, request: nbd_request, kind: int, length: int, *, last: bool = True) -> bytes:
        """What a part of a structured reply begins with."""
        head = big(NBD_STRUCTURED_REPLY_MAGIC, 4) + big(NBD_REPLY_FLAG_DONE * last, 2) + big(kind, 2)
        return head + big(request.cookie, 8) + big(length, 4)

    def read(self, disk: NbdDisk, request: nbd_request) -> None:
        """Answers with what is on the disk, a piece after the other.

        Each is there before the client is told that it comes, so that one that cannot be read is an error of
        this request alone, where the client knows structured replies.
        """
        offset, end = request.offset, request.offset + request.length
        conduit = self.conduit
        # Past the page cache there are only whole blocks.
        if request.flags & NBD_CMD_FLAG_DF or (not disk.read_only and (offset | end) % disk.block):
            conduit = None
        while offset < end:
            count = min(conduit.piece if conduit else disk.PIECE, end - offset)
            head = b""
            if self.structured:
                last = offset + count == end
                head = self.chunk(request, NBD_REPLY_TYPE_OFFSET_DATA, 8 + count, last=last) + big(offset, 8)
            elif offset == request.offset:
                head = big(NBD_SIMPLE_REPLY_MAGIC, 4) + bytes(4) + big(request.cookie, 8)
            if conduit and self.fill(conduit, disk, head, offset, count):
                conduit.empty(self.socket.fileno(), len(head) + count)
            else:
                conduit = None
                try:
                    data = disk.read(self.buffer, offset, count)
                except OSError as e:
                    if not (head or self.structured):
                        raise Malformed(errno.EIO, "a piece cannot be read") from None
                    self.refuse(request, e)
                    return
                self.put(head, data)
            offset += count

    def fill(self, conduit: Conduit, disk: NbdDisk, head: bytes, offset: int, count: int) -> bool:
        """Whether the conduit has a piece, so that it does not have to be read."""
        try:
            conduit.fill(head, disk.fd, offset, count)
        except OSError:
            # Part of it may be in there. Reading tells what is wrong.
            self.conduit = None
            conduit.close()
            return False
        return True

    def write(self, disk: NbdDisk, request: nbd_request) -> None:
        """Takes what is to be written, a piece after the other, whether it can be written or not."""
        if request.length > REQUEST_MAX:
            raise Malformed(errno.EOVERFLOW, "more than was allowed")
        problem: OSError | None = None
        try:
            self.check(disk, request)
        except OSError as e:
            problem = e
        offset, end = request.offset, request.offset + request.length
        while offset < end:
            count = min(disk.PIECE, end - offset)
            place = offset % disk.block
            self.take_into(self.buffer[place : place + count])
            if not problem:
                try:
                    disk.write(self.buffer, offset, count, durable=bool(request.flags & NBD_CMD_FLAG_FUA))
                except OSError as e:
                    problem = e
            offset += count
        if problem:
            self.refuse(request, problem)
        else:
            self.put(big(NBD_SIMPLE_REPLY_MAGIC, 4), bytes(4), big(request.cookie, 8))

    def tell_extents(self, request: nbd_request, found: list[tuple[int, int]]) -> None:
        if request.flags & NBD_CMD_FLAG_REQ_ONE:
            del found[1:]
        data = b"".join(big(length, 4) + big(state, 4) for length, state in found)
        self.put(self.chunk(request, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + len(data)), big(ALLOCATION, 4), data)


class NbdServer:
    """Who listens, which disks there are, and who uses them. A thread serves each connection."""

    CONNECTIONS = 256
    EACH = 64  # for one address, of those that have chosen a disk

    def __init__(self, key: Secret | None = None) -> None:
        self.key = key  # without which nobody gets further than to TLS
        self.tls: NbdTls | None = None
        self.disks: dict[str, NbdDisk] = {}  # by name
        self.sessions: set[NbdNegotiation] = set()
        self.listening: dict[str, socket.socket] = {}  # by address
        self.mutex = _thread.allocate_lock()  # held while who uses what changes
        self.poll = select.epoll()
        self.fd, self.wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.poll.register(self.fd, select.EPOLLIN)

    # Addresses

    def listen(self, text: str, port: int) -> None:
        """Begins to listen at an address, "fe80::1%eth0", too. Raises OSError."""
        host, _, interface = text.partition("%")
        family = AF_INET6 if ":" in host else AF_INET
        listener = socket.socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
        try:
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            where: tuple[Any, ...] = (host, port)
            if family == AF_INET6:
                listener.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 1)
                where = (host, port, 0, socket.if_nametoindex(interface) if interface else 0)
            listener.bind(where)
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        self.listening[text] = listener
        self.poll.register(listener.fileno(), select.EPOLLIN)

    def stop_listening(self, text: str) -> None:
        if listener := self.listening.pop(text, None):
            self.poll.unregister(listener.fileno())
            listener.close()

    def accept(self) -> bool:
        """Lets in who waits at an address; True if there is news to show. Never waits."""
        ready = {fd for fd, _ in self.poll.poll(0)}
        for listener in [s for s in self.listening.values() if s.fileno() in ready]:
            try:
                fd, where = listener._accept()  # type: ignore[attr-defined, unused-ignore]
            except OSError as e:
                debug(f"NBD: failed to let somebody in, ignoring: {reason_of(e)}")
                # Nothing has been taken from what is waited for, as where there are no more descriptors.
                time.sleep(LOCK_POLL_SEC[0])
                continue
            connection = socket.socket(listener.family, SOCK_STREAM, 0, fileno=fd)
            session = NbdSession(self, connection, where[0].partition("%")[0], where[1])
            if not self.make_room(session):
                connection.close()
                continue
            try:
                _thread.start_new_thread(session.run, ())
            except RuntimeError as e:  # no memory for one
                debug(f"NBD: failed to serve somebody: {e}")
                connection.close()
                self.leave(session)
        if self.fd in ready:
            os.read(self.fd, 4096)
        return self.fd in ready

    def make_room(self, session: NbdNegotiation) -> bool:
        """Whether there is room for a connection.

        If there are too many, the oldest that has not chosen a disk has to go: so who opens a thousand of
        them keeps nobody out.
        """
        with self.mutex:
            waiting = [s for s in self.sessions if not s.disk]
            if len(self.sessions) >= self.CONNECTIONS:
                if not waiting:
                    return False
                oldest = min(waiting, key=lambda s: s.deadline)
                self.sessions.discard(oldest)
                oldest.end()
            self.sessions.add(session)
            return True

    # Disks

    def find(self, name: bytes) -> NbdDisk | None:
        """The disk of this name, or the only one for none."""
        disks = dict(self.disks)
        if not name and len(disks) == 1:
            return next(iter(disks.values()))
        return disks.get(os.fsdecode(name))

    def name_of(self, disk: NbdDisk) -> str:
        return next((name for name, each in list(self.disks.items()) if each is disk), "")

    def admit(self, session: NbdNegotiation, disk: NbdDisk) -> str:
        """Lets a client use a disk, or says why not. Connections from one address are one client's."""
        with self.mutex:
            others = {user.address for user in disk.users} - {session.address}
            if session not in self.sessions or self.name_of(disk) == "":
                return "it is just being taken away"
            if disk.clients and len(others) >= disk.clients:
                return f"it is for {disk.clients} at a time, and taken"
            if sum(s.address == session.address for s in self.sessions if s.disk) >= self.EACH:
                return f"there are {self.EACH} connections from this address"
            session.disk = disk
            disk.users.add(session)
            disk.ragged += not session.aware
        self.tell()
        return ""

    def leave(self, session: NbdNegotiation) -> None:
        with self.mutex:
            self.sessions.discard(session)
            if session.disk:
                session.disk.users.discard(session)
                session.disk.ragged -= not session.aware
        self.tell()

    def tell(self) -> None:
        """Has the main thread look at who is there."""
        try:
            os.write(self.wakeup, b"\0")
        except OSError:
            pass  # full: it wakes up anyway

    def serve(self, name: str, disk: NbdDisk) -> None:
        with self.mutex:
            self.disks[name] = disk

    def withdraw(self, name: str) -> None:
        """Ends all use of a disk. Raises IoPending if its driver does not end the I/O of clients."""
        with self.mutex:
            if not (disk := self.disks.pop(name, None)):
                return
            users = list(disk.users)
        for session in users:
            session.end()
        deadline = time.monotonic() + LOCK_WAIT_SEC
        while disk.users:
            if time.monotonic() > deadline:
                self.disks[name] = disk
                raise IoPending(errno.EBUSY, os.strerror(errno.EBUSY))
            time.sleep(LOCK_POLL_SEC[0])
        disk.close()


# -----------------------------------------------------------------------------------------------------------
# 30. NBD
# -----------------------------------------------------------------------------------------------------------


class NbdListener(Entry):
    """An address at which clients may come in; `value` is the TCP port. It goes with this process."""

    LISTED = False
    STEM = "nbd/at "

    def __init__(self, server: NbdServer, text: str, port: int) -> None:
        super().__init__(self.STEM + text, str(port))
        self.server = server
        self.text = text

    def make(self, _: str) -> None:
        self.server.listen(self.text, int(self.value))

    def unmake(self, _: str) -> None:
        self.server.stop_listening(self.text)

    def is_live(self, _: str) -> bool:
        listener = self.server.listening.get(self.text)
        return listener is not None and str(listener.getsockname()[1]) == self.value

    def identity(self, _: str) -> str:
        return ""  # of no other program

    def place(self, _: str) -> str:
        return f"NBD at {self.text}, TCP port {self.value}"

    def described(self, _: str) -> dict[str, str]:
        tls = ", TLS required" * bool(self.server.key)
        command = f"# listen at {self.text}, TCP port {self.value}{tls}"
        return {"step": "listen", "path": self.path, "value": self.value, "command": command}

    def undescribed(self, _: str) -> dict[str, str]:
        command = f"# listen at {self.text} no longer"
        return {"step": "stop-listening", "path": self.path, "command": command}


class NbdServed(Entry):
    """A disk that clients may choose by its name. It goes with this process."""

    LISTED = False
    LIVE = ADMITS = CLOSES = True
    STEM = "nbd/"

    def __init__(
        self,
        server: NbdServer,
        name: str,
        disk: Disk,
        mapping: Mapping | None,
        *,
        read_only: bool,
        clients: int = 0,
    ) -> None:
        where = mapping.path if mapping else disk.node
        super().__init__(self.STEM + name, f"{disk.tag} {disk.size} {int(read_only)} {where}")
        self.server = server
        self.name = name
        self.disk = disk
        self.mapping = mapping
        self.read_only = read_only
        self.clients = clients

    def make(self, root: str) -> None:
        node = self.mapping.node() if self.mapping else self.disk.node
        there = self.server.disks.get(self.name)
        if there and (there.node, there.read_only) == (node, self.read_only):
            there.size = self.disk.size
            return
        self.unmake(root)
        served = NbdDisk(node, self.disk, read_only=self.read_only, clients=self.clients)
        self.server.serve(self.name, served)

    def unmake(self, _: str) -> None:
        self.server.withdraw(self.name)

    def is_live(self, _: str) -> bool:
        there = self.server.disks.get(self.name)
        if not there or there.size != self.disk.size or there.read_only != self.read_only:
            return False
        return there.node == (self.mapping.node() if self.mapping else self.disk.node)

    def identity(self, _: str) -> str:
        return ""

    def is_open(self, _: str) -> bool:
        return self.name in self.server.disks

    def place(self, _: str) -> str:
        return f"NBD export {self.name}"

    def described(self, _: str) -> dict[str, str]:
        node = f"{DEV}mapper/{self.mapping.name}" if self.mapping else self.disk.node
        access = " --read-only" if self.read_only else ""
        command = f"# as nbdkit{access} -e {quoted(self.name)} file {quoted(node)}"
        return {"step": "serve", "path": self.path, "value": node, "command": command}

    def undescribed(self, _: str) -> dict[str, str]:
        return {
            "step": "withdraw",
            "path": self.path,
            "command": f"# end the NBD export {quoted(self.name)}",
        }


class Nbd(OnePort):
    """NBD (Network Block Device), served by this process: for clients without NVMe/TCP, or without root.

    Names are the disks' own. A client of which this process ends, or is killed, has to connect anew.
    """

    name = "nbd"
    what = "NBD"
    PORT = 10809  # by IANA
    KEY_FILE = "storagetm/keys.psk"  # on the client; QEMU wants that name in a directory

    def __init__(
        self, listening: Listening | None = None, clients: int = 1, admission: Admission | None = None
    ) -> None:
        super().__init__(listening)
        self.clients = clients  # how many may attach a disk that they can write to at a time; 0 for any
        self.admission = admission or Admission()
        self.restricted = self.admission.restricted
        code = self.admission.code
        self.server = NbdServer(code.nbd_key() if code else None)

    @staticmethod
    def check_admission(admission: Admission) -> None:
        """Raises UsageError unless NBD can keep out all whom it is to keep out.

        By nothing but the key for TLS it knows who has the code: so there is TLS whatever --encrypt= says.
        """
        if not admission.restricted:
            return
        if not admission.code or len(admission.hosts) > 1:
            raise UsageError(
                "NBD knows no names of hosts, only who has the code; leave out --transport=nbd, or give "
                "--pair without --allow-host= and --secret-file="
            )

    def prepare(self) -> None:
        allow_files(3 * self.server.CONNECTIONS)  # a socket and a pipe for each
        if not self.server.key:
            return
        if why := NbdTls.why_not():
            raise UserError(
                f"Over NBD nobody can be kept out here: {why}. Leave out --transport=nbd, or leave out "
                "--pair, and whoever reaches this machine can read and change its disks"
            )
        self.server.tls = NbdTls(self.server.key)

    def adopt(self, live: dict[str, Branch]) -> None:
        self.admission.keep()

    def end(self) -> None:
        self.admission.forget()

    def limit(self, access: str) -> int:
        return 0 if access == READ_ONLY else self.clients

    def root(self, export: Export) -> str:
        return NbdServed.STEM + export.disk.name

    def common(self) -> list[Branch]:
        return [Branch("nbd", [NbdListener(self.server, text, self.port)]) for text in self.texts]

    def branch(self, export: Export, between: Branch) -> Branch:
        read_only = export.access == READ_ONLY
        served = NbdServed(
            self.server,
            export.disk.name,
            export.disk,
            mapping_of(between),
            read_only=read_only,
            clients=self.limit(export.access),
        )
        return Branch(export.disk.tag, [served], needs=[between.root])

    def text_of(self, entry: Entry) -> str:
        return entry.text if isinstance(entry, NbdListener) else ""

    # What people are told

    def label(self, export: Export) -> str:
        return f"NBD export {export.disk.name}"

    def hint(self, at: Address) -> str:
        url = self.url(at)
        if self.server.key:
            return (
                "By NBD, also for who is not root there, once the first two commands have made "
                f"'{self.KEY_FILE}': nbdcopy '{url}/NAME?tls-psk-file={self.KEY_FILE}' FILE; nbd-client "
                "cannot do it"
            )
        return (
            f"By NBD, also for who is not root there: 'nbdinfo --list {url}' lists the disks, and "
            f"'nbdcopy', 'qemu-img' and others take {url}/NAME"
        )

    def instructions(self, exports: Iterable[Export], addresses: Sequence[Address]) -> list[Instruction]:
        found = []
        for at in self.reachable(addresses)[:1]:
            found += [self.instruction(at, e, number) for number, e in enumerate(exports)]
        if found and (key := self.server.key):
            line = Confidential(f"{NbdTls.IDENTITY}:{key.reveal().hex()}")
            # The shell's own "echo" has it in no command line that others could see: `exposes` stays False.
            found[0].before = [
                [f"install -D -m 600 /dev/null {self.KEY_FILE}"],
                [f">{self.KEY_FILE} echo", line],
                ["modprobe nbd"],
            ]
        return found

    def instruction(self, at: Address, export: Export, number: int) -> Instruction:
        """The command that attaches a disk on the client."""
        name, host = export.disk.name, f"{at.text}%INTERFACE" if self.is_scoped(at) else at.text
        if self.server.key:
            # nbd-client has certificates only.
            command = f"qemu-nbd {'-r ' * (export.access == READ_ONLY)}-c /dev/nbd{number}"
            tls = f"tls-creds-psk,id=tls,endpoint=client,dir={os.path.dirname(self.KEY_FILE)}"
            place = f"driver=nbd,host={host},port={self.port},tls-creds=tls,export={name.replace(',', ',,')}"
            more = ["--object", f"{tls},username={NbdTls.IDENTITY}", "--image-opts", typed(place)]
        else:
            disk = self.server.disks.get(name)
            command = f"nbd-client {host} {self.port} /dev/nbd{number} -N {typed(name)}"
            more = [f"-b {disk.block if disk else 512}", "-persist", "-timeout 60"]
        return Instruction(at, command, more, disk=export.disk.key)

    @staticmethod
    def is_scoped(at: Address) -> bool:
        """Whether an address means nothing without the client's interface."""
        return at.family == AF_INET6 and at.link_local

    def url(self, at: Address) -> str:
        """What tools take that attach nothing; there, `%` before an interface is `%25`."""
        host = f"{at.text}%25INTERFACE" if self.is_scoped(at) else at.text
        port = "" if self.port == self.PORT else f":{self.port}"
        scheme = f"nbds://{NbdTls.IDENTITY}@" if self.server.key else "nbd://"
        return f"{scheme}{f'[{host}]' if at.family == AF_INET6 else host}{port}"

    def code(self) -> str:
        return Confidential(self.admission.code.text()) if self.admission.code else ""

    def news(self, outdate: Callable[[], None]) -> list[News]:
        def accept() -> bool:
            if self.server.accept():
                outdate()
            return False

        return [Incoming(self.server.poll, accept)]

    def attached(self) -> list[Client]:
        users = [s for s in list(self.server.sessions) if s.disk]
        return self.arrivals.clients(
            Connection(s.address, s.port, encrypted=bool(s.cipher), cipher=s.cipher) for s in users
        )


# -----------------------------------------------------------------------------------------------------------
# 31. iSCSI
# -----------------------------------------------------------------------------------------------------------


class Backstore(Attribute):
    """What a backstore makes a SCSI disk of: the device over one of ours.

    It is written as words, and read as prose (drivers/target/target_core_iblock.c).
    """

    __slots__ = ("mapping", "read_only")

    def __init__(self, path: str, mapping: Mapping, *, read_only: bool) -> None:
        super().__init__(path, f"{mapping.path} {int(read_only)}")
        self.mapping = mapping
        self.read_only = read_only

    def text(self) -> str:
        return f"udev_path={self.mapping.node()},readonly={int(self.read_only)}"

    def is_live(self, root: str) -> bool:
        words = read_attribute(f"{root}{os.path.dirname(self.path)}/info").split()
        try:
            device = device_numbers(self.mapping.device) if self.mapping.sysname() else ""
        except OSError:
            return False
        facts = dict(zip(words, words[1:]))
        return device != "" and (f"{facts.get('Major:')}:{facts.get('Minor:')}", facts.get("readonly:")) == (
            device,
            str(int(self.read_only)),
        )

    def described(self, root: str) -> dict[str, str]:
        # Its number is not known before it is made.
        node = f"{DEV}mapper/{self.mapping.name}"
        return Attribute(self.path, f"udev_path={node},readonly={int(self.read_only)}").described(root)


class Identity(OptionalAttribute):
    """What a SCSI disk says that it is. Older kernels cannot be told all of that."""

    __slots__ = ()

    # What the kernel says in front of the serial number.
    PROSE = "T10 VPD Unit Serial Number: "

    def is_live(self, root: str) -> bool:
        path = root + self.path
        text = read_attribute(path)
        return self.value in (text, text[len(self.PROSE) :]) or not os.path.exists(path)


class Unmapping(OptionalAttribute):
    """Whether clients may have blocks forgotten: as `mapping` can. The attribute is 0 at first."""

    __slots__ = ("mapping",)

    def __init__(self, path: str, mapping: Mapping) -> None:
        super().__init__(path, mapping.path)
        self.mapping = mapping

    def text(self) -> str:
        queue = f"{sys_block(self.mapping.sysname())}/queue/"
        return str(int(read_attribute(queue + "discard_max_bytes") not in ("", "0")))

    def is_live(self, root: str) -> bool:
        try:
            return read_attribute(root + self.path) in ("", self.text())
        except OSError:
            return False

    def described(self, root: str) -> dict[str, str]:
        return Attribute(self.path, "1").described(root)


class LunLink(Link):
    """A backstore's link in a LUN, with which the kernel waits for the commands of clients when it goes.

    As long as the target is not enabled, no client sees it.
    """

    __slots__ = ()
    LETTER = "t"
    ADMITS = False

    def is_open(self, root: str) -> bool:
        return False

    def crowd(self) -> str:
        return os.path.dirname(self.path)  # the LUN, where nothing else is made


class ChapName(Attribute):
    """A name that clients or the target prove secrets by. The kernel takes a line feed for a part of it."""

    __slots__ = ()

    def described(self, root: str) -> dict[str, str]:
        command = f"printf %s {quoted(self.value)} > {quoted(root + self.path)}"
        return {**super().described(root), "command": command}


class ChapRequired(Attribute):
    """Whether clients have to know secrets."""

    __slots__ = ()
    LETTER = "c"
    RESTRICTS = True

    def __init__(self, path: str, value: str = "1") -> None:
        super().__init__(path, value)


class TargetEnabled(Attribute):
    """Lets clients in to a target, and ends the sessions of all when it is unmade."""

    __slots__ = ()
    LETTER = "e"
    LIVE = ADMITS = CLOSES = True

    def __init__(self, path: str, value: str = "1") -> None:
        super().__init__(path, value)

    def unmake(self, root: str) -> None:
        try:
            write_attribute(root + self.path, "0")
        except OSError as e:
            # EINVAL: it is not enabled.
            if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
                raise

    def is_open(self, root: str) -> bool:
        return read_attribute(root + self.path) == self.value

    def is_wrong(self, root: str) -> bool:
        return False

    def undescribed(self, root: str) -> dict[str, str]:
        return Attribute(self.path, "0").described(root)


def iqn(nqn: str) -> str:
    """What the name of an iSCSI target begins with, from an NQN (RFC 3720, "iSCSI Names").

    One without a naming authority and its date gets those of systemd-storagetm's NQNs. What may not be in it
    becomes a hyphen. A digest then tells it from others.
    """
    stem, _, rest = nqn.partition(":")
    kind, year, month, authority = stem[:4], stem[4:8], stem[9:11], stem[12:]
    dated = stem.isascii() and (year + month).isdecimal() and stem[8:12:3] == "-."
    whole = kind == "nqn." and dated and authority != "" and rest != ""
    name = "iqn" + nqn[3:] if whole else IQN_STEM + nqn
    clean = "".join(c if c in "-.:" or (c.isascii() and c.isalnum()) else "-" for c in name.lower())
    if whole and clean == name and len(clean) <= IQN_STEM_MAX:
        return clean
    return f"{clean[: IQN_STEM_MAX - 9]}-{sha256(utf8(nqn)).hexdigest()[:8]}"


def numbered(text: str, mark: str) -> int:
    """The number behind the last `mark`; -1 if there is none, or one that the kernel has not made."""
    number = text.rpartition(mark)[2]
    return int(number) if number.isascii() and number.isdecimal() and len(number) <= 10 else -1


class IscsiTarget(OnePort):
    """The target of iSCSI, and who may come in."""

    modules = ("target_core_mod", "target_core_iblock", "iscsi_target_mod")
    PORT = 3260  # by IANA
    USER, TARGET_USER = "storagetm", "storagetm-target"  # as CHAP has them, of which neither is secret

    def __init__(
        self,
        machine: Machine,
        instance: str = "",
        listening: Listening | None = None,
        *,
        clients: int = 1,
        writable: bool = False,
        admission: Admission | None = None,
    ) -> None:
        super().__init__(listening)
        self.writable = writable and not clients  # whether there may be a disk that clients can write to
        self.instance = instance or machine.instance()
        self.stem = iqn(self.instance)
        boot = read_attribute(PROC + "sys/kernel/random/boot_id")
        digest = sha256(utf8(f"{self.instance} {boot}")).hexdigest()
        # Short, so that a command with it fits into 80 columns.
        self.iqn = f"{self.stem}.{letters(int(digest[:5], 16), 4)}"
        self.clients = clients  # how many may attach a disk that they can write to at a time; 0 for any
        self.admission = admission or Admission()
        self.restricted = self.admission.restricted
        self.identities = Identities(machine)
        # A number of 31 bits, among those of others.
        self.adapter = int(sha256(utf8(self.instance)).hexdigest()[:8], 16) >> 1

    @property
    def target(self) -> str:
        return f"target/iscsi/{self.iqn}"

    @property
    def group(self) -> str:
        """The portal group, of which there is one."""
        return self.target + "/tpgt_1"

    @property
    def store(self) -> str:
        """The directory of all backstores."""
        return f"target/core/iblock_{self.adapter}"

    @staticmethod
    def check_admission(admission: Admission) -> None:
        """Raises UsageError for what iSCSI cannot do to let in only some."""
        if len(admission.hosts) > bool(admission.code):
            raise UsageError(
                "Over iSCSI only who has the code can be let in, and no host by its NQN; leave out "
                "--transport=iscsi, or all but --pair"
            )
        if admission.required:
            raise UsageError(
                f"iSCSI is not encrypted; leave out --transport=iscsi, or see --encrypt=no: {UNENCRYPTED}"
            )

    def prepare(self) -> None:
        for module in self.modules:
            if not os.path.isdir(SYS + "module/" + module):
                load_module(module)
        prepare_configfs()
        fabric = CONFIGFS + "target/iscsi"
        try:
            os.mkdir(fabric)
        except FileExistsError:
            pass
        except OSError as e:
            raise UserError(
                f"This kernel ({os.uname().release}) has no iSCSI target ({reason_of(e)}), or its module "
                "'iscsi_target_mod' is missing; boot one with CONFIG_ISCSI_TARGET, or leave out "
                "--transport=iscsi"
            ) from e

    def adopt(self, live: dict[str, Branch]) -> None:
        # In this order the target comes before its portals.
        for root, branch in sorted(live.items()):
            place, _, name = root.rpartition("/")
            if branch.tag == "adapter" and place == "target/core" and name.startswith("iblock_"):
                self.adapter = numbered(name, "_") if numbered(name, "_") >= 0 else self.adapter
            if branch.tag == "target" and place == "target/iscsi" and name.startswith(self.stem):
                self.iqn = name
            if place == f"{self.group}/np" and not self.settled and 0 < numbered(name, ":") < 65536:
                self.port, self.settled = numbered(name, ":"), True
        taken = self.others()
        while self.port in taken and not self.settled and self.port < self.PORT + self.ATTEMPTS:
            self.port = self.next_port()
        self.admission.keep()

    def others(self) -> set[int]:
        """The TCP ports of other targets, which the kernel would have us share with them.

        For IPv6 it then listens nowhere (iscsit_check_np_match()).
        """
        fabric = CONFIGFS + "target/iscsi"
        groups = [
            f"{fabric}/{t}/{g}" for t in list_directory(fabric) for g in list_directory(f"{fabric}/{t}")
        ]
        portals = [p for group in groups for p in list_directory(group + "/np")]
        return {numbered(portal, ":") for portal in portals}

    def end(self) -> None:
        self.admission.forget()

    def everywhere(self) -> list[str]:
        if not os.path.exists(PROC + "net/if_inet6"):
            return ["0.0.0.0"]
        # Beside it, the kernel takes none for IPv4 alone, unless it has been told otherwise.
        alone = read_attribute(PROC + "sys/net/ipv6/bindv6only") == "1"
        return list(Listening.ALL) if alone else ["::"]

    def common(self) -> list[Branch]:
        attributes = self.group + "/attrib"
        entries: list[Entry] = [
            Directory(self.target),
            Directory(self.group),
            # For all LUNs or none. A backstore that is read-only by itself only says so, and lets commands
            # pass to the device, which refuses them.
            Attribute(attributes + "/demo_mode_write_protect", str(int(not self.writable))),
            Attribute(attributes + "/generate_node_acls", "1"),
            *self.secrets(),
            TargetEnabled(self.group + "/enable"),
        ]
        portals = [
            Branch("portal", [Directory(f"{self.group}/np/{self.socket(text)}")], needs=[self.target])
            for text in self.texts
        ]
        return [Branch("adapter", [Directory(self.store)]), Branch("target", entries), *portals]

    def secrets(self) -> list[Entry]:
        """What has clients prove that they know the code, and the target, too."""
        if not (code := self.admission.code):
            return [Attribute(self.group + "/attrib/authentication", "0")]
        auth = self.group + "/auth/"
        return [
            ChapName(auth + "userid", self.USER),
            SecretAttribute(auth + "password", code.chap_secret(INITIATOR_SECRET)),
            ChapName(auth + "userid_mutual", self.TARGET_USER),
            SecretAttribute(auth + "password_mutual", code.chap_secret(TARGET_SECRET)),
            ChapRequired(self.group + "/attrib/authentication"),
        ]

    def socket(self, text: str) -> str:
        """An address with the port, as portals are called."""
        return f"[{text}]:{self.port}" if ":" in text else f"{text}:{self.port}"

    def text_of(self, entry: Entry) -> str:
        prefix = f"{self.group}/np/"
        return (
            entry.path[len(prefix) :].rpartition(":")[0].strip("[]") if entry.path.startswith(prefix) else ""
        )

    def adapt(self, failure: Failure) -> bool:
        if failure.branch.root == self.store and failure.error.errno == errno.EEXIST and not failure.cause:
            self.adapter = int.from_bytes(os.urandom(4), "little") >> 1
            return True
        text = self.text_of(failure.entry)
        if text and failure.error.errno == errno.EINVAL and not failure.cause:
            # The kernel says so whatever it was (target_fabric_make_np()).
            code = why_no_listener(text, self.port) or errno.EINVAL
            failure = Failure(failure.branch, failure.entry, OSError(code, os.strerror(code)))
        return super().adapt(failure)

    def remarks(self, exports: Iterable[Export]) -> list[str]:
        found = super().remarks(exports)
        if self.restricted:
            found.append(
                "iSCSI: everybody on the network can see this target's name and addresses; only who has the "
                "code can attach disks"
            )
        return found

    def code(self) -> str:
        return Confidential(self.admission.code.text()) if self.admission.code else ""

    def alerts(self) -> list[str]:
        if not self.restricted:
            return []
        return [
            "What clients read and write over iSCSI is not encrypted: who listens on the network can read "
            "along, and change what they read and write"
        ]

    def news(self, outdate: Callable[[], None]) -> list[News]:
        return [Clients(outdate)]

    def attached(self) -> list[Client]:
        # Where there is no portal, whose clients these are is not known.
        return self.arrivals.clients(Clients.connections([self.port]) if self.texts else [])


class Iscsi(IscsiTarget):
    """iSCSI through the kernel's LIO: one target, with a LUN for each disk.

    The kernel takes each device for itself alone, which therefore is always one of ours over the disk. An
    initiator that comes back takes it for granted that LUNs are what they were. So no number is given twice
    as long as the machine runs, and after another boot the target has another name. (The portal group's tag
    could tell, but open-iscsi 2.1 does not look at it when it comes back.)
    """

    name = "iscsi"
    what = "iSCSI"
    CLAIMS = True
    together = True
    NUMBERED = "LUNs"

    # The wanted tree

    def root(self, export: Export) -> str:
        disk = export.disk
        return f"{self.store}/{os.path.basename(Mapping.path_for(disk.name, self.instance, disk.tag))}"

    def lun(self, export: Export) -> int:
        """A disk's LUN; -1 if there is none for it."""
        return export.stay.place if export.stay else 0

    def why_not(self, export: Export) -> str:
        why = "no LUN is left; boot this machine again" if self.lun(export) < 0 else ""
        return self.why_never(export) or why

    def why_never(self, export: Export) -> str:
        if not self.clients or export.access == READ_ONLY:
            return ""
        if export.disk.home:
            return (
                "it can be written to, and iSCSI cannot keep it for one client at a time; see --transport="
            )
        return (
            "it can be written to, and iSCSI cannot keep it for one client at a time; see --clients=any, "
            "and attach it to one machine only"
        )

    def basis(self) -> object:
        return self.adapter, self.iqn

    def branch(self, export: Export, between: Branch) -> Branch:
        mapping = mapping_of(between)
        assert mapping
        disk, read_only = export.disk, export.access == READ_ONLY
        root, lun = self.root(export), f"{self.group}/lun/lun_{self.lun(export)}"
        inquiry = inquiry_string(disk.vendor(), disk.model, disk.sysname)
        parts = {"vendor_id": inquiry[:8], "product_id": inquiry[8:24], "revision": inquiry[24:]}
        parts["vpd_unit_serial"] = self.serial(export)
        entries: list[Entry] = [
            Directory(root),
            Backstore(root + "/control", mapping, read_only=read_only),
            Attribute(root + "/enable", "1"),
            *(Identity(f"{root}/wwn/{name}", text.strip()) for name, text in parts.items()),
            # EXTENDED COPY would reach all other LUNs of the machine, also those of other targets.
            OptionalAttribute(root + "/attrib/emulate_3pc", "0"),
        ]
        if read_only:
            # Whoever reserves it would keep away others that read.
            entries.append(OptionalAttribute(root + "/attrib/emulate_pr", "0"))
        else:
            entries.append(Unmapping(root + "/attrib/emulate_tpu", mapping))
        entries += [Directory(lun), LunLink(f"{lun}/{os.path.basename(root)}", root)]
        claims = [("SCSI serial number", self.serial(export))]
        return Branch(disk.tag, entries, needs=[between.root, self.store, self.target], claims=claims)

    def serial(self, export: Export) -> str:
        """The disk's own serial number, with a digest behind it.

        From the hexadecimal digits in it the kernel makes the NAA identity, by which hosts tell disks: those
        of the serial number alone may be the same for many disks.
        """
        serial = export.disk.serial or export.disk.id_serial
        own = "" if self.identities.own(export) else nvme_string(serial, SERIAL_MAX)
        name = utf8(self.identities.name(export))
        digest = sha256(self.identities.machine.id + b"scsi" + name).hexdigest()[:16]
        return f"{own}-{digest}" if own else str(digest)

    def explain(self, failure: Failure) -> str:
        e, entry = failure.error, failure.entry
        if e.errno == errno.EEXIST and failure.branch.root == self.target:
            return f"another program made the iSCSI target '{self.iqn}'; remove it, or give another --nqn"
        if e.errno == errno.EBUSY and entry.path == f"{failure.branch.root}/enable":
            return "something on this machine has it for itself; end that, or leave out --transport=iscsi"
        return ""

    # What people are told

    def label(self, export: Export) -> str:
        return f"iSCSI LUN {self.lun(export)} of {self.iqn}"

    def number_text(self, export: Export) -> str:
        return str(self.lun(export))

    def serial_shown(self, export: Export) -> str:
        return self.serial(export)

    def instructions(self, exports: Iterable[Export], addresses: Sequence[Address]) -> list[Instruction]:
        usable = self.reachable(addresses) if any(exports) else []
        # What Windows finds by discovery has no interface behind it.
        plain = [at for at in usable if at.family == AF_INET or not at.link_local]
        return [self.instruction(at) for at in usable] + [self.for_windows(at) for at in plain[:1]]

    def instruction(self, at: Address) -> Instruction:
        """The commands for open-iscsi."""
        node, name, host, note = "iscsiadm -m node", f"-T {self.iqn}", at.text, ""
        if at.family == AF_INET6 and at.link_local:
            host += "%INTERFACE"
            note = "(INTERFACE: the other machine's interface to this one, see 'ip link')"
        where = f"-p {quoted(self.socket(host))}"
        if not (code := self.admission.code):
            return Instruction(at, node, [name, where, "-o new", f"&& {node}", name, where, "-l"], note=note)
        settings = {
            "authmethod": "CHAP",
            "username": self.USER,
            "password": code.chap_secret(INITIATOR_SECRET).reveal().decode(),
            "username_in": self.TARGET_USER,
            "password_in": code.chap_secret(TARGET_SECRET).reveal().decode(),
        }
        parts = [f"-n node.session.auth.{name} -v {value}" for name, value in settings.items()]
        before = [[node, name, where, "-o new"], [node, name, where, "-o update", *map(Confidential, parts)]]
        return Instruction(at, node, [name, where, "-l"], note=note, before=before)

    def for_windows(self, at: Address) -> Instruction:
        """The commands for Windows, which has an initiator built in."""
        command = f"Start-Service msiscsi; New-IscsiTargetPortal -TargetPortalAddress {at.text}"
        port = f"-TargetPortalPortNumber {self.port};"
        # Short for -NodeAddress. With it, a line has less than 80 columns.
        more = [port, "Connect-IscsiTarget", f"-N {self.iqn}"]
        note = "(on Windows, in PowerShell as administrator; 'Get-Disk' lists the disks)"
        if not (code := self.admission.code):
            return Instruction(at, command, more, note=note, mark="`")
        secret = code.chap_secret(INITIATOR_SECRET).reveal().decode()
        mutual = code.chap_secret(TARGET_SECRET).reveal().decode()
        more.append(f"-AuthenticationType MUTUALCHAP -ChapUsername {self.USER}")
        before = [[Confidential(f"Set-IscsiChapSecret -ChapSecret {mutual}")]]
        secrets = [Confidential(f"-ChapSecret {secret}")]
        return Instruction(at, command, more, note=note, mark="`", secrets=secrets, before=before)


TRANSPORTS: tuple[type[Transport], ...] = (NvmeTcp, UsbGadget, Nbd, Iscsi)
# All that may be needed. The dracut module asks for them.
MODULES = (*(m for transport in TRANSPORTS for m in transport.modules), *COMMON_MODULES, *AUTH_MODULES)


# -----------------------------------------------------------------------------------------------------------
# 32. The exporter
# -----------------------------------------------------------------------------------------------------------


class Stores:
    """What snapshots keep in memory, divided among those that are live and those that are going to be."""

    def __init__(self, memory: Memory, tree: Tree, inventory: Inventory) -> None:
        self.memory = memory
        self.tree = tree
        self.inventory = inventory
        self.divided = 0.0  # when that was done last, in seconds of the monotonic clock
        self.news = -1  # descriptor that can be read when device-mapper has news since then
        self.damaged: set[str] = set()  # mappings whose disks were found to have unreadable sectors

    def divide(self, wanted: Iterable[Branch] = ()) -> list[Export]:
        """Looks how full they are and divides what is left; returns those whose changes are lost."""
        self.divided = time.monotonic()
        live = {m.path: m for m in live_mappings(self.tree.live, Mapping.SNAPSHOT)}
        self.news = dm_arm() if live else -1
        coming = [m for m in map(mapping_of, wanted) if m and m.target == Mapping.SNAPSHOT]
        coming = [m for m in coming if m.path not in live]
        before = self.memory.filled
        if live or coming or before:
            self.memory.share(live.values(), coming)
        for name in self.memory.repaired - self.damaged:
            self.damaged.add(name)
            export = self.mapped(name)
            warning(
                f"A client's write to '{export.disk.node if export else name}' failed, since a sector "
                "beside it cannot be read, and other I/O may have failed at that moment; what clients "
                "changed before is kept"
            )
        if not before and self.memory.filled and self.memory.size < self.memory.asked:
            size, asked = size_text(self.memory.size), size_text(self.memory.asked)
            warning(f"Snapshots get {size} of memory instead of {asked}: this machine cannot spare more")
        return [export for name in self.memory.lost if (export := self.mapped(name))]

    def mapped(self, name: str) -> Export | None:
        """The disk that is exported through a mapping."""
        for export in self.inventory.exports.values():
            if (mapping := mapping_of(export.backing)) and mapping.name == name:
                return export
        return None


class NotedRules:
    """Finds out whether an earlier run that was killed had the same rules for access.

    Then no access changes that clients have, although rules may match other disks by now.
    """

    def __init__(self, path: str, access: Access) -> None:
        self.path = path
        self.access = access
        self.same = False
        self.noted = False

    def compare(self) -> None:
        try:
            self.same = read_bytes(self.path) == self.access.noted()
            if not self.same:
                os.unlink(self.path)
        except OSError as e:
            debug(f"No rules of an earlier run: {reason_of(e)}")

    def note(self) -> None:
        """Notes the rules, once all that is exported is exported by them."""
        self.noted = True
        try:
            if self.access.rules:
                write_new_file(self.path, self.access.noted())
        except OSError as e:
            debug(f"Failed to note the rules, ignoring: {reason_of(e)}")

    def forget(self) -> None:
        """Called when nothing is exported any longer."""
        if self.access.rules and os.path.exists(self.path):
            os.unlink(self.path)


def why_not_opened(problem: OSError) -> Reason:
    if problem.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return Reason(f"{reason_of(problem)}; it may be write-protected")
    if problem.errno in (errno.ENOMEDIUM, errno.ENXIO):
        return Reason(NO_MEDIUM, Reason.NO_MEDIUM)
    return Reason(reason_of(problem) + (f" ('{problem.filename}')" if problem.filename else ""))


def why_failed(export: Export, failure: Failure, transports: Iterable[Transport]) -> Reason:
    """Why a disk is not exported, and what to do about it, from whoever has made the entry that failed."""
    while failure.cause:
        failure = failure.cause
    problem = failure.error
    if mapping_of(failure.branch):
        return Reason(why_not_backed(failure, export.disk, export.access))
    if why := next(filter(None, (t.explain(failure) for t in transports)), ""):
        return Reason(why)
    if problem.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOMEDIUM, errno.ENXIO):
        return why_not_opened(problem)
    return Reason(f"{reason_of(problem)} ('{failure.entry.path}')")


class Wanted:
    """What disks ask for, and what is there of it.

    `locks` is whether a disk is only exported once its lock is held.
    """

    def __init__(self, instance: str, transports: Sequence[Transport], tree: Tree, *, locks: bool) -> None:
        self.instance = instance
        self.transports = transports
        self.tree = tree
        self.locks = locks

    def check(self, exports: Sequence[Export]) -> None:
        """Raises UserError for what makes a start senseless, before anything is exported."""
        for transport in self.transports:
            transport.check(exports)
        for export in exports:
            reasons = [transport.why_never(export) for transport in self.transports]
            if export.named and reasons and all(reasons):
                raise UserError(f"Failed to export '{export.disk.node}': {reasons[0]}")

    def follow(self, held: Callable[[], list[Address]]) -> bool:
        """Tells transports where they can listen; True if other things are wanted then. Raises OSError."""
        changed = [transport.follow(held) for transport in self.transports]
        return any(changed)

    def arrange(self, exports: Sequence[Export]) -> Sequence[Export]:
        """Has transports make room for these disks, which are returned."""
        for transport in self.transports:
            transport.arrange(exports, self.tree.live)
        return exports

    def why_no_transport(self, export: Export) -> str:
        """Why a disk can be exported in no way; empty if it can."""
        reasons = [transport.why_not(export) for transport in self.transports]
        return reasons[0] if reasons and all(reasons) else ""

    def is_hopeless(self, export: Export) -> bool:
        """Whether all that could export a disk has failed."""
        return "" in export.failed or all(t.name in export.failed for t in self.transports)

    def mixed(self, export: Export) -> list[tuple[str, str]]:
        """Transports over which a disk must not be exported besides others, by name, and why not.

        Of what one client writes through the page cache, another one past it sees nothing, or old data. And
        of clients that come in by different ways, none knows how many have come by the other.
        """
        usable = [t for t in self.transports if not t.why_not(export) and t.name not in export.failed]
        # What clients have attached counts before the order that was asked for.
        live = self.live_of(export)
        usable.sort(key=lambda t: t.name not in live)
        found = []
        for t in usable[1:] if export.access != READ_ONLY else ():
            first = usable[0]
            why = f"not over {t.name}, since it can be written to and is exported over {first.name}: "
            if t.cached != first.cached:
                found.append(
                    (t.name, why + "only one of these goes through the page cache; see --read-only")
                )
            elif t.limit(export.access) and first.limit(export.access):
                found.append((t.name, why + "clients of both could write to it; see --clients=any"))
        return found

    def scaffolds(self) -> list[Branch]:
        return [s for transport in self.transports for s in transport.scaffolds(self.tree.live)]

    def branches(self, exports: Iterable[Export]) -> tuple[list[Branch], dict[str, tuple[Export, str]]]:
        """All branches that these disks ask for; and whose they are, disk and transport or "", by root."""
        branches = [branch for transport in self.transports for branch in transport.common()]
        owners: dict[str, tuple[Export, str]] = {}
        claimed: dict[tuple[str, str], Export] = {}
        # Disks that clients know come first.
        for export in sorted(exports, key=lambda e: not e.live):
            if not (found := self.of(export)):
                continue
            claims = [("name", export.disk.name)]
            claims += [claim for branch in found.values() for claim in branch.claims]
            if twins := [(kind, claimed[kind, x]) for kind, x in claims if (kind, x) in claimed]:
                self.leave_out_twin(export, *twins[0])
                continue
            claimed.update(dict.fromkeys(claims, export))
            branches += found.values()
            owners.update((branch.root, (export, name)) for name, branch in found.items())
        return branches, owners

    def is_lent(self, export: Export) -> bool:
        """Whether the kernel is to claim a disk's device of ours for one of the transports."""
        return any(t.CLAIMS and not t.why_not(export) for t in self.transports)

    def of(self, export: Export) -> dict[str, Branch]:
        """What makes a disk reachable, by transport, after what stands between, which is under ""."""
        if self.is_hopeless(export):
            return {}
        if not export.held and self.locks:
            # What an earlier run exported stays while the lock that died with it is waited for.
            live = self.live_of(export)
            found = {
                t.name: live[t.name] for t in self.transports if t.name in live and t.keeps(live[t.name])
            }
            between = self.backing_of(found.values())
            return {"": between, **found} if between else found
        disk = export.disk
        about = disk.tag, disk.size, disk.model, disk.serial, disk.id_serial, export.access, export.stay
        basis = (*about, *(transport.basis() for transport in self.transports))
        if export.wanted is None or export.wanted[0] != basis:
            between = backing(disk, export.access, self.instance, lent=self.is_lent(export))
            usable = [t for t in self.transports if not t.why_not(export)]
            branches = {t.name: t.branch(export, between) for t in usable}
            export.wanted = basis, {"": between, **branches}
        found = {name: b for name, b in export.wanted[1].items() if name not in export.failed}
        return found if len(found) > 1 else {}

    def live_of(self, export: Export) -> dict[str, Branch]:
        """What of a disk is live, by transport."""
        found = {t.name: self.tree.live.get(t.root(export)) for t in self.transports}
        return {name: branch for name, branch in found.items() if branch and branch.tag == export.disk.tag}

    def backing_of(self, branches: Iterable[Branch]) -> Branch | None:
        """What is live between a disk and the branches that export it."""
        needs = [(branch.tag, self.tree.live.get(root)) for branch in branches for root in branch.needs]
        return next((b for tag, b in needs if b and b.tag == tag), None)

    def live_access(self, export: Export) -> str:
        """The kind of access with which a disk is exported now; empty if it is not."""
        needs = {root for branch in self.live_of(export).values() for root in branch.needs}
        lent = self.is_lent(export)
        wanted = {a: backing(export.disk, a, self.instance, lent=lent).root for a in ACCESS}
        return next((access for access, root in wanted.items() if root in needs), "")

    def note_live(self, exports: Iterable[Export], failures: Iterable[Failure]) -> None:
        """Brings up to date what of each disk is live."""
        gone = {failure.branch.root for failure in failures} | self.tree.leaving
        for export in exports:
            roots = [(t.name, t.root(export)) for t in self.transports]
            live = [(name, self.tree.live.get(root)) for name, root in roots if root not in gone]
            # Another disk's may have the same root.
            export.live = {name: b for name, b in live if b and b.tag == export.disk.tag}
            export.backing = self.backing_of(export.live.values())

    def lent_homes(self, exports: Iterable[Export]) -> list[Export]:
        """Home directories that clients may have at this moment, as far as that can be told."""
        homes = [export for export in exports if export.live and export.disk.home]
        try:
            return homes if homes and any(transport.attached() for transport in self.transports) else []
        except OSError as e:
            debug(f"Failed to find out which clients are attached, ignoring: {reason_of(e)}")
            return []

    def end(self) -> None:
        """Called after a clean stop, when nothing is exported any longer."""
        for transport in self.transports:
            transport.end()

    def explain(self, failure: Failure) -> str:
        """Why the kernel would not do a step, and what to do about it; empty for what errno says."""
        return next(filter(None, (t.explain(failure) for t in self.transports)), "")

    def leave_out_twin(self, export: Export, kind: str, other: Export) -> None:
        """Keeps a disk out that would have an identity of another one."""
        why = f"its {kind} would be that of '{other.disk.node}', and clients would take it for that one"
        advice = "".join(f"; {text}" for t in self.transports if (text := t.about_twins(kind)))
        export.leave_out(Reason(why + advice))


def set_urgent(urgent: bool) -> None:
    """Has this process come before all others, or no longer.

    Not by a nice value, which counts only inside a session (sched(7), "The autogroup feature").
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR if urgent else os.SCHED_OTHER, os.sched_param(int(urgent)))
    except OSError as e:
        debug(f"Failed to change the priority, ignoring: {reason_of(e)}")


class Exporter:
    """Brings what is exported to what the disks ask for: at first, later, after a crash and at the end.

    `instance` tells what this run has in /run and device-mapper from what another one has.
    """

    def __init__(
        self,
        instance: str,
        transports: Sequence[Transport],
        inventory: Inventory,
        memory: Memory | None = None,
        rehearse: Callable[[dict[str, str]], None] | None = None,
    ) -> None:
        self.instance = instance
        self.transports = transports
        self.inventory = inventory
        self.memory = memory or Memory()
        self.ledger = Ledger(f"{RUN}{instance}.entries")
        self.tree = Rehearsal(CONFIGFS, self.ledger, rehearse) if rehearse else Tree(CONFIGFS, self.ledger)
        self.want = Wanted(instance, transports, self.tree, locks=rehearse is None)
        self.media = MediumWatch(lambda: self.tree.wake())
        self.rules = NotedRules(f"{RUN}{instance}.access", inventory.access)
        self.started = time.monotonic()
        self.opened = False  # whether clients may come in
        self.awaited: list[str] = []  # the disks that this waits for, with the reasons
        self.outdated = False  # exports have to be looked at again
        self.stores = Stores(self.memory, self.tree, inventory)

    def check(self) -> None:
        """Raises UserError for what makes a start senseless, before anything is exported."""
        self.want.check(self.inventory.candidates())

    def begin(self) -> None:
        """Goes on with what an earlier run left. Raises UserError and OSError."""
        self.tree.adopt()
        self.opened = self.tree.admits()
        self.rules.compare()
        for transport in self.transports:
            transport.adopt(self.tree.live)

    # Wanted, live, difference

    def synchronise(self, *, strict: bool = False) -> None:
        """Makes the kernel have what the disks ask for.

        `strict`: what fails for a disk that was named raises UserError. At first nothing is exported before
        all disks that are here can be: a host that reconnects while one is missing loses it.
        """
        now = time.monotonic()
        strict = strict or not self.opened
        exports = self.choose()
        for export in self.inventory.exports.values():
            if export.disk.removable:
                export.disk.watch_medium()
        allow_files(len(exports))
        for export in exports:
            if not (export.held or self.want.is_hopeless(export)):
                self.claim(export, now, strict=strict)
        if self.inventory.stays.first is None:
            self.inventory.stays.begin_with([e.disk for e in self.inventory.exports.values()])
        self.inventory.begin_stays(e for e in exports if e.held)
        if not self.opened:
            self.awaited = self.still_awaited(now)
            if self.awaited:
                return
            self.opened = True
            self.inventory.stays.forget_awaited()
        self.refuse_mixed([e for e in exports if e.held])
        # udev looks at each device that is made on the way: that can wait.
        set_urgent(True)
        try:
            self.apply(exports, strict=strict)
        finally:
            set_urgent(False)
        for transport in self.transports:
            transport.note(self.tree.live)
        try:
            self.ledger.shorten(self.tree.live.values(), CONFIGFS)
        except OSError as e:
            debug(f"Failed to shorten '{self.ledger.path}', ignoring: {reason_of(e)}")
        if not self.rules.noted and not self.pending():
            self.rules.note()

    def choose(self) -> list[Export]:
        """The disks that one of the transports can export, in the order to show them."""
        able = self.want.arrange(self.inventory.candidates(Reason.NO_WAY))
        if any(e.left_out and not self.want.why_no_transport(e) for e in able):
            self.inventory.update(())  # they may have come into use meanwhile
            self.want.arrange(self.inventory.candidates(Reason.NO_WAY))
        for export in self.inventory.candidates():
            if why := self.want.why_no_transport(export):
                export.leave_out(Reason(why, Reason.NO_WAY))
        return self.inventory.candidates()

    def rehearse(self) -> list[Failure]:
        """Shows the steps to what is wanted, without waiting for anything; returns what would fail."""
        try:
            self.tree.adopt()
        except OSError as e:
            debug(f"Nothing of ours is noted as exported: {reason_of(e)}")
        for transport in self.transports:
            transport.adopt(self.tree.live)
        self.want.follow(lambda: Network().held())
        exports = self.choose()
        self.refuse_mixed(exports)
        self.inventory.begin_stays(exports)
        scaffolds = self.want.scaffolds()
        return self.tree.apply(self.tree.plan(self.want.branches(exports)[0], scaffolds))

    def refuse_mixed(self, exports: Iterable[Export]) -> None:
        for export in exports:
            for name, why in self.want.mixed(export):
                self.give_up(export, Reason(why), name, fatal=False)

    def pending(self) -> list[Export]:
        able = (e for e in self.inventory.candidates() if not self.want.is_hopeless(e))
        return [e for e in able if e.waiting and not e.held]

    def still_awaited(self, now: float) -> list[str]:
        """The disks without which no client is let in yet, with the reasons."""
        found = []
        for export in self.pending():
            patience = START_WAIT_SEC if export.waiting.kind == Reason.UDEV else LOCK_WAIT_SEC
            if now - export.waiting_since < patience:
                found.append(f"'{export.disk.node}' ({export.waiting})")
        # Those that were named are all here; of others, nobody knows whether they are wanted this time.
        if now - self.started < RETURN_WAIT_SEC and not self.inventory.all_named:
            awaited = self.inventory.stays.awaited.values()
            found += [f"'{node}' (exported until the last stop)" for _, node in awaited]
        return found

    def claim(self, export: Export, now: float, *, strict: bool) -> None:
        """Takes a disk's lock, if udev is done with it and nobody holds it; says when that takes long."""
        if not export.waiting_since:
            export.waiting_since = now
        waited = now - export.waiting_since
        if export.waiting.kind == Reason.UDEV and waited < UDEV_WAIT_SEC:
            return  # until udev says so, and the disk is read again
        if other := self.inventory.undecided(export, now):
            export.waiting = Reason(f"its access depends on '{other}', which udev is not done with")
            return
        told = export.waiting_named
        export.waiting_named = waited > LOCK_WAIT_SEC
        try:
            claimed = export.claim()
        except OSError as e:
            self.give_up(export, why_not_opened(e), fatal=strict and export.named)
            return
        if claimed:
            export.waiting_since, export.waiting_named = 0.0, False
            # To open it has waited for the kernel to read its partition table.
            self.inventory.decide(export)
            if self.rules.same and (access := self.want.live_access(export)):
                export.access = access
        elif export.waiting_named and not told:
            warning(
                f"'{export.disk.node}' is not exported yet: {export.waiting}; it will be as soon as that is "
                "released"
            )

    def apply(self, exports: Sequence[Export], *, strict: bool) -> None:
        """Makes what these disks ask for, and takes away all else."""
        self.tree.ended = True
        while self.tree.ended:
            # A removal that finishes during this pass raises no further event, but a creation may be waiting
            # for it.
            self.tree.collect()
            self.tree.ended = False
            self.apply_once(exports, strict=strict)

    def apply_once(self, exports: Sequence[Export], *, strict: bool) -> None:
        patience = LOCK_WAIT_SEC if strict else REMOVAL_WAIT_SEC
        tries = 3  # for what cannot be removed
        while True:
            scaffolds = self.want.scaffolds()
            branches, owners = self.want.branches(exports)
            self.share_memory(branches)
            failures = self.tree.apply(self.tree.plan(branches, scaffolds), patience)
            if any(transport.adapt(failure) for failure in failures for transport in self.transports):
                continue
            self.want.note_live(self.inventory.exports.values(), failures)
            tries -= 1
            for failure in failures:
                owner = owners.get(failure.branch.root)
                if owner or not tries or failure.branch.root not in self.tree.live:
                    self.fail(owner, failure, strict=strict)
            if not failures or not tries:
                break
        if self.memory.filled or live_mappings(self.tree.live, Mapping.SNAPSHOT):
            self.share_memory()
        self.media.watch(self.inventory.exports.values())
        for export in exports:
            if export.held:
                left = "" if export.live else "the kernel is still taking away what was there before it"
                export.waiting = Reason(left)

    # The end

    def stop(self) -> bool:
        """Takes all exports down again; False if some would not go."""
        exports = self.inventory.exports.values()
        lent = self.want.lent_homes(exports)
        self.end_removals()
        self.media.watch(())
        if self.opened:
            # All others are new ones when they return.
            self.inventory.stays.leave(e.disk for e in exports if e.live and e.disk.lasts())
        for failure in self.take_away():
            why = self.want.explain(failure) or f"{reason_of(failure.error)}; remove what is below it"
            if isinstance(failure.error, IoPending):
                why = (
                    "the disk is gone, but its driver has not ended all I/O of clients; when it has, start "
                    "storagetm and stop it again, or boot this machine"
                )
            error(f"Failed to remove '{failure.branch.entries[0].place(CONFIGFS)}': {why}")
        for source in self.inventory.sources if lent else ():
            source.interrupted([e for e in lent if e.source is source])
        for export in self.inventory.exports.values():
            export.release()
        if not self.tree.live:
            self.ledger.clear()
            self.rules.forget()
            self.want.end()
        self.ledger.close()
        return not self.tree.live and not any(map(dm_status, Mapping.abandoned))

    def end_removals(self) -> None:
        """Waits for disks that are being removed, up to a limit.

        All others go at once, but not what they need: the kernel would wait for the same I/O when it removes
        a port (flush_workqueue()).
        """
        self.tree.ending = True
        if self.tree.leaving:
            self.tree.apply(self.tree.plan([]), REMOVAL_WAIT_SEC)
        while self.tree.leaving:  # a second signal ends this, too
            time.sleep(LOCK_POLL_SEC[0])
            self.tree.collect()

    def take_away(self) -> list[Failure]:
        """Removes all that there is, with a few tries; returns what still failed."""
        failures: list[Failure] = []
        for _ in range(3):
            self.tree.collect()
            failures = self.tree.apply(self.tree.plan([]))
            if not failures:
                break
        return failures

    # Failures

    def fail(self, owner: tuple[Export, str] | None, failure: Failure, *, strict: bool) -> None:
        """Tells the user, once, what could not be done, and leaves the disk alone until it changes."""
        if owner:
            export, transport = owner
            if not self.want.is_hopeless(export) and transport not in export.failed:
                why = why_failed(export, failure, self.transports)
                fatal = strict and (export.named or failure.entry.dooms(failure.error))
                self.give_up(export, why, transport, fatal=fatal)
            return
        left = failure.branch.root in self.tree.live
        why_not = self.want.explain(failure) or reason_of(failure.error)
        place = failure.branch.entries[0].place(CONFIGFS)
        message = f"Failed to {'remove' if left else 'make'} '{place}': {why_not}"
        if strict and not left:
            raise UserError(message)
        error(message)

    def give_up(self, export: Export, reason: Reason, transport: str = "", *, fatal: bool) -> None:
        """Leaves a disk alone until it changes, for a transport or for all, and says why.

        Raises UserError if that is `fatal`.
        """
        message = f"Failed to export '{export.disk.node}': {reason}"
        export.failed[transport] = reason
        if self.want.is_hopeless(export):
            export.release()
        if fatal:
            raise UserError(message)
        if export.reported.get(transport) != message:
            error(message)
            export.reported[transport] = message

    # What comes up later

    def share_memory(self, wanted: Sequence[Branch] = ()) -> None:
        """Divides the memory for snapshots; ends the export of disks whose changes are gone.

        To their clients they would be other disks.
        """
        for export in self.stores.divide(wanted):
            why = "what clients had changed is lost; start storagetm again to export it without that"
            export.failed[""] = Reason(why)
            export.release()
            error(f"'{export.disk.node}' is no longer exported: {why}")
            self.outdated = True

    def due(self) -> float:
        """When a transport wants to try something again, in seconds of the monotonic clock; 0 for never."""
        return min(filter(None, (transport.due for transport in self.transports)), default=0.0)


def withdraw(exporter: Exporter) -> None:
    """Takes away what an earlier run lets anybody in to: this one was to let in only some, and fails."""
    if not os.path.exists(exporter.ledger.path):
        return
    try:
        if exporter.ledger.fd < 0:
            exporter.ledger.lock()
        exporter.tree.adopt()
    except (UserError, OSError) as e:
        debug(f"Nothing of an earlier run is taken away: {failure_text(e)}")
        return
    if exporter.tree.admits() and not exporter.tree.restricts():
        warning("Ending what an earlier start lets anybody in to, since this one is to let in only some")
        exporter.stop()
    else:
        exporter.ledger.close()


# -----------------------------------------------------------------------------------------------------------
# 33. The report
# -----------------------------------------------------------------------------------------------------------


class ExportRow:
    """An exported disk as it is shown. `key` and `tag` tell it from others, and from earlier ones."""

    __slots__ = (
        "access",
        "access_text",
        "commands",
        "key",
        "label",
        "model",
        "node",
        "number",
        "serial",
        "size",
        "tag",
    )  # fmt: skip

    def __init__(self, export: Export, memory: Memory) -> None:
        disk = export.disk
        self.key = disk.key
        self.tag = disk.tag
        self.node = disk.node
        self.size = disk.size
        self.model = disk.model
        self.access = export.access
        self.access_text = access_text(export, memory)
        self.serial = ""
        self.label = ""  # what clients call it
        self.number = ""  # among disks that are attached together
        self.commands: list[Instruction] = []  # that attach it alone

    @property
    def full(self) -> bool:
        """Whether there is no room for what clients change."""
        return self.access_text == SNAPSHOT_FULL

    def about(self, width: int) -> list[str]:
        """What there is to say of it, in columns. A long path has a line of its own."""
        number = f"{self.number:>6} " if self.number else ""
        middle = f" {size_text(self.size):>8}  {self.access_text:<13} "
        node, lines = padded(number + self.node, len(number) + 12), []
        room = min(width - 1, 57) - len(middle)
        if columns(node) > room:
            lines, node = pieces(node.rstrip(), width - 1), " " * min(len(number) + 12, room)
        left = cut(node + middle + self.model.replace("_", " "), 57)
        return [*lines, cut(f"{padded(left, 57)}  {self.serial}", width - 1)]


class OtherRow:
    """A disk that is not exported, as it is shown."""

    __slots__ = ("failed", "key", "node", "reason", "waiting")

    def __init__(self, export: Export) -> None:
        self.key = export.disk.key
        self.node = export.disk.node
        self.reason = str(export.why_not)  # empty for one of which there is nothing to say
        self.waiting = bool(export.waiting)
        self.failed = bool(export.failed)

    def about(self, width: int) -> list[str]:
        """What there is to say of it. The whole reason: its end says what to do."""
        short = columns(self.node) < 14 and width > 40
        indent = " " * (14 if short else 4)
        first, *rest = wrapped(self.reason, width - 1 - len(indent))
        first = padded(self.node, 14) + first if short else indent + first
        return [*([] if short else pieces(self.node, width - 1)), first, *(indent + line for line in rest)]


class Fact:
    """What a journal should have once. `kind` and `key` tell what it is about."""

    __slots__ = ("key", "kind", "text")

    NOT_AT_FIRST = ("size",)  # a disk's first size is in its first line
    WITHOUT_END = ("other", "shut", "size", "start")  # another fact says how it goes on

    def __init__(self, kind: str, key: str, text: str) -> None:
        self.kind = kind
        self.key = key
        self.text = text


class Report:
    """What there is to show, taken at one moment: texts and numbers, nothing that could be asked later."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.refused = ""  # why nothing is exported, if it is not to be
        self.reboots = False  # whether the end of the program boots the machine
        self.ways: list[Way] = []
        self.commands: list[Instruction] = []  # that attach all disks, those of the best addresses first
        self.exported: list[ExportRow] = []
        self.others: list[OtherRow] = []
        self.numbered = ""  # what disks are that are attached together; empty if each may be by itself
        self.awaited: list[str] = []  # disks without which nothing is exported yet
        self.attached = ""  # who has disks
        self.clients: list[str] = []  # what is known of each of them
        self.clients_known = True  # whether these are all
        self.limit = ""  # why others may be turned away
        self.firewall = ""  # what it has to let in, where there is one
        self.notes: list[str] = []  # what else transports say
        self.alerts: list[str] = []  # what may do harm
        self.codes: list[str] = []  # what clients have to know, for a screen alone
        self.idle: list[str] = []  # what to say of rules that have matched nothing
        self.memory = ""  # how full it is with snapshots, if there are any
        self.memory_full = False
        self.messages: list[str] = []  # the last ones, with the time

    def status(self) -> str:
        """The numbers, for the service manager."""
        if self.refused:
            return f"Exporting nothing: {self.refused}."
        disks = count_text(len(self.exported), "disk")
        if writable := sum(row.access == READ_WRITE for row in self.exported):
            disks += f" ({writable} read-write)"
        waiting, failed = sum(row.waiting for row in self.others), sum(row.failed for row in self.others)
        more = (f", {waiting} waiting" if waiting else "") + (f", {failed} failed" if failed else "")
        where = " and ".join(filter(None, (way.where for way in self.ways)))
        to = f" to {count_text(len(self.clients), 'client')}" if self.clients else ""
        return f"Exporting {disks} at {where}{to}{more}{'; ' if self.memory else ''}{self.memory}."

    @property
    def shut(self) -> list[Way]:
        """The ways by which nobody can come in; none as long as one is open."""
        told = [way for way in self.ways if way.where]
        return told if all(way.shut for way in told) else []

    @property
    def interrupt_text(self) -> str:
        """What Ctrl-C does."""
        if self.refused:
            return "Ctrl-C reboots this machine." if self.reboots else "Ctrl-C ends this."
        return f"Ctrl-C stops exporting{' and reboots this machine' if self.reboots else ''}."

    @property
    def confidential(self) -> bool:
        """Whether there are secrets in the commands, as a screen has them."""
        return any(c.confidential for c in self.all_commands)

    @property
    def all_commands(self) -> list[Instruction]:
        return self.commands + [c for row in self.exported for c in row.commands]

    def for_plymouth(self) -> str:
        """The shortest command for all disks, at an address of the best kind there is."""
        if self.refused:
            return f"No disk is exported: {self.refused}"
        if self.confidential:
            return "Storage target mode: press Esc to see how to attach the disks"
        if not self.commands:
            texts = [way.shut for way in self.shut] or [way.hint or way.where for way in self.ways]
            return f"Storage target mode: {'; '.join(filter(None, texts))}"
        best = [c for c in self.commands if c.kind == self.commands[0].kind]
        line = min((c.line for c in best), key=len)
        return line if len(line) <= PLYMOUTH_MAX else min((c.brief or c.line for c in best), key=len)

    def facts(self) -> list[Fact]:
        """What a journal should have."""
        if self.refused:
            return []
        found = [
            Fact(
                "address",
                f"{c.transport} {c.address} {c.interface} {c.mark}",
                f"Attach all disks with: {c.line}",
            )
            for c in self.commands
        ]
        found += [Fact("shut", way.shut, way.about(way.effect)) for way in self.shut]
        for row in self.exported:
            described = ", ".join(filter(None, (size_text(row.size), row.model, row.serial, row.access)))
            key = f"{row.key} {row.tag}"
            found.append(Fact("disk", key, f"Exporting '{row.node}' ({described}) as {row.label}"))
            found.append(Fact("size", key, f"'{row.node}' has {row.size} bytes"))
        if self.attached:
            found.append(Fact("clients", "", self.attached))
        if self.firewall:
            found.append(Fact("firewall", "", self.firewall))
        found += [Fact("note", text, text) for text in self.alerts + self.notes]
        for row in self.exported:
            if row.full:
                text = f"The memory for changes of '{row.node}' is full: writes to it fail, reads go on"
                found.append(Fact("full", row.key, text))
        for other in self.others:
            if other.reason:
                found.append(Fact("other", other.key, f"Not exporting '{other.node}': {other.reason}"))
        if self.awaited:
            text = f"Exporting nothing yet, waiting for {', '.join(self.awaited)}"
            found.append(Fact("start", "", text))
        return found

    def blocks(self, width: int) -> list[list[tuple[str, str]]]:
        """The screen's body: groups of lines to keep together, each line with its style."""
        if self.refused:
            why = [("alert", "No disk is exported:"), ("", ""), ("alert", self.refused)]
            way_out = [("", ""), ("", "Change that, then boot this machine again.")]
            return [why + way_out if self.reboots else why]
        return self.present(width) + self.way_in(width) + self.disks(width) + self.remarks(width)

    def present(self, width: int) -> list[list[tuple[str, str]]]:
        """Who has disks, for whoever is about to switch this machine off."""
        if not self.clients:
            return []
        count = len(self.clients)
        verb = "client is" if count == 1 else "clients are"
        text = f"{count} {verb} attached: detach the disks there before you switch this machine off."
        lines = [("alert", line) for line in wrapped(text, width)]
        for client in self.clients:
            lines += [("", "  " + line) for line in wrapped(client, width - 3)]
        if self.limit:
            lines += [("", line) for line in wrapped(f"{self.limit[0].upper()}{self.limit[1:]}.", width - 1)]
        return [[*lines, ("", "")]]

    def way_in(self, width: int) -> list[list[tuple[str, str]]]:
        """How to attach all disks."""
        blocks: list[list[tuple[str, str]]] = []
        count = len(self.exported)
        for way in self.shut:
            blocks.append([("alert", f"{way.about(way.remedy)}."), ("", "")])
        for text in self.alerts:
            blocks.append([("alert", line) for line in wrapped(f"{text}.", width)] + [("", "")])
        for text in self.codes:
            blocks.append([("command", f"Code: {text}"), ("", "")])
        if any(c.exposes for c in self.all_commands):
            text = "Other users of the other machine can see the secrets in the commands below."
            blocks.append([("dim", line) for line in wrapped(text, width)] + [("", "")])
        if self.commands and count:
            all_of_them = "its disk" if count == 1 else f"all {count} disks"
            blocks.append([("", f"To attach {all_of_them}, type as root on the other machine:"), ("", "")])
            for c in self.commands:
                lines = c.shown(width)
                if c.note:
                    lines.append(("dim", f"    {c.note}"))
                blocks.append([*lines, ("", "")])
        for way in self.ways if count else ():
            if way.hint:
                blocks.append([("", line) for line in wrapped(f"{way.hint}.", width)] + [("", "")])
        if self.firewall and count:
            blocks.append([("", f"{self.firewall}."), ("", "")])
        return blocks

    def disks(self, width: int) -> list[list[tuple[str, str]]]:
        """Those that are exported, or why there are none."""
        blocks: list[list[tuple[str, str]]] = []
        if self.awaited:
            text = f"No disk is exported yet, waiting for {', '.join(self.awaited)}."
            blocks.append([("alert", line) for line in wrapped(text, width)] + [("", "")])
        elif not self.exported:
            blocks.append([("alert", "No disk is exported; plug one in, and it will be."), ("", "")])
        elif self.numbered:
            blocks.append([("", f"{self.numbered}:"), ("", "")])
        elif any(row.commands for row in self.exported):
            blocks.append([("", "To attach one disk:"), ("", "")])
        for row in self.exported:
            lines = [(row.access, line) for line in row.about(width)]
            for c in row.commands:
                lines += c.shown(width)
            blocks.append(lines if self.numbered else [*lines, ("", "")])
        if self.numbered and self.exported:
            blocks.append([("", "")])
        return blocks

    def remarks(self, width: int) -> list[list[tuple[str, str]]]:
        """What else there is to say, and what is not exported."""
        blocks: list[list[tuple[str, str]]] = []
        if self.exported and not self.clients and self.clients_known:
            text = "No client is attached: it is safe to switch this machine off."
            blocks.append([("safe", line) for line in wrapped(text, width - 1)] + [("", "")])
        for text in self.notes:
            blocks.append([("", line) for line in wrapped(f"{text}.", width)] + [("", "")])
        for text in self.idle:
            blocks.append([("alert", line) for line in wrapped(f"{text}.", width)] + [("", "")])
        if self.memory:
            style = "alert" if self.memory_full else ""
            blocks.append([(style, f"{self.memory[0].upper()}{self.memory[1:]}."), ("", "")])
        if others := [row for row in self.others if row.reason]:
            blocks.append([("", "Not exported:")])
            blocks += [[("dim", line) for line in row.about(width)] for row in others]
        return blocks


def access_text(export: Export, memory: Memory) -> str:
    """A disk's access as the screen has it."""
    if export.access == SNAPSHOT and export.live and (mapping := mapping_of(export.backing)):
        used, limit, full = memory.filled.get(mapping.name, (0, 0, ""))
        if full or limit:
            return SNAPSHOT_FULL if full else f"snapshot {100 * used // limit:2} %"
    return export.access.upper() if export.access == READ_WRITE else export.access


def memory_text(memory: Memory) -> str:
    """How full the memory for snapshots is; empty if there are none."""
    if not memory.filled:
        return ""
    used, size, asked = memory.used, memory.size, memory.asked
    share = f"{100 * used // max(1, size)} %"
    if size < asked:
        share += f"; this machine cannot spare the {size_text(asked)} asked for"
    text = f"snapshots use {size_text(used)} of {size_text(size)} of memory ({share})"
    return text + (", which is full: writes fail" if memory.full else "")


def count_text(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def attached_text(clients: Sequence[Client], limit: str) -> str:
    """Who has disks, and why others may be turned away; empty if nobody has."""
    if not clients:
        return ""
    many = f" ({len(clients)} clients)" if len(clients) > 1 else ""
    return f"Attached from {', '.join(client.who for client in clients)}{many}{'; ' * bool(limit)}{limit}"


def take_report(
    machine: Machine,
    transports: Sequence[Transport],
    addresses: Sequence[Address],
    exports: Iterable[Export],
    memory: Memory,
    *,
    filtered: bool = False,
) -> Report:
    """What there is to show of these disks now. Nothing else asks disks and transports for it.

    `filtered` is whether there may be a firewall.
    """
    ordered = sorted(exports, key=lambda e: natural_order(e.disk.name))
    exported = [e for e in ordered if e.live]
    report = Report(f"Storage target mode: {machine.name} ({machine.os_name})")
    report.exported = [ExportRow(e, memory) for e in exported]
    report.others = [OtherRow(e) for e in ordered if not e.live]
    for row, export in zip(report.exported, exported):
        ways = [t for t in transports if t.name in export.live]
        row.label = " and ".join(t.label(export) for t in ways)
        row.number = next(filter(None, (t.number_text(export) for t in ways)), "")
        row.serial = next(filter(None, (t.serial_shown(export) for t in ways)), "")
    rows = {row.key: row for row in report.exported}
    report.ways = [t.way(addresses) for t in transports]
    for transport, way in zip(transports, report.ways):
        report.alerts += transport.alerts()
        code = transport.code()
        report.codes += [code] * (code not in ("", *report.codes))
        reached = [e for e in exported if transport.name in e.live]
        report.notes += transport.remarks(reached)
        for export in exported if way.where else ():
            if export not in reached and (why := transport.why_not(export)):
                report.notes.append(f"'{export.disk.node}' is not exported over {transport.name}: {why}")
        for instruction in transport.instructions(reached, addresses):
            instruction.transport = transport.name
            where = rows[instruction.disk].commands if instruction.disk else report.commands
            where.append(instruction)
    for source in dict.fromkeys(e.source for e in exported):
        report.notes += source.remarks([e for e in exported if e.source is source])
    report.numbered = next(filter(None, (t.NUMBERED for t in transports)), "")
    limits = [t.limit(e.access) for t in transports for e in exported]
    if limit := max(limits, default=0):
        report.limit = f"what can be written to is for {count_text(limit, 'client')} at a time"
    clients: list[Client] = []
    try:
        clients += [client for t in transports for client in t.attached()]
    except OSError as e:
        report.clients_known = False
        debug(f"Failed to find out which clients are attached, ignoring: {reason_of(e)}")
    report.clients = [client.about() for client in clients]
    report.attached = attached_text(clients, report.limit)
    if filtered:
        report.firewall = "; ".join(filter(None, (t.firewall_text() for t in transports)))
    report.memory, report.memory_full = memory_text(memory), memory.full
    return report


# -----------------------------------------------------------------------------------------------------------
# 34. Outputs
# -----------------------------------------------------------------------------------------------------------


class Output(News):
    """Somewhere where the report is shown, or a part of it."""

    def show(self, report: Report) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leaves it as it was."""


class Journal(Output):
    """For all that is no terminal: lines, each fact once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Fact] = {}

    def show(self, report: Report) -> None:
        facts = {(fact.kind, fact.key): fact for fact in report.facts()}
        for key, fact in facts.items():
            before = self.known.get(key)
            if before is None and fact.kind in Fact.NOT_AT_FIRST:
                continue
            if before is None or before.text != fact.text:
                log.write(6, fact.text)
        for key, fact in self.known.items():
            if key not in facts and fact.kind not in Fact.WITHOUT_END:
                log.write(6, f"No longer: {fact.text}")
        self.known = facts


class Manager(Output):
    """The service manager, which shows the numbers with the service's status."""

    def __init__(self) -> None:
        self.told = ""

    def show(self, report: Report) -> None:
        if (status := report.status()) != self.told:
            self.told = status
            notify(f"STATUS={status}")


class Terminal(Output):
    """A terminal with all of the report. Without a `path`, it is the one that the program was started on."""

    HAS_MESSAGES = False  # whether it shows what is logged, too

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.descriptor = 1  # to write to
        self.gone = False  # whether it was hung up
        self.beside_plymouth = True  # whether Plymouth may show something, too

    @property
    def whole(self) -> bool:
        """Whether all of it works."""
        return not self.gone

    def news(self) -> list[News]:
        """What the loop has to wait for."""
        return [self]


class Plain(Terminal):
    """A terminal that cannot move its cursor: the whole text again after each change, plain ASCII."""

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        if path:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)

    def show(self, report: Report) -> None:
        lines = ["", report.title, ""] + [text for block in report.blocks(80) for _, text in block]
        try:
            os.write(self.descriptor, "\n".join([*map(one_line, lines), ""]).encode("ascii", "replace"))
        except BlockingIOError:
            pass
        except OSError as e:
            self.gone = True
            debug(f"Failed to write to the terminal, ignoring: {reason_of(e)}")


class Screen(Terminal):
    """A full screen on a terminal, redrawn in place. Space and `b` turn pages, where there are several.

    Raises OSError if `path` cannot be opened. Calls `outdate` when it has to be shown again.
    """

    HAS_MESSAGES = True
    STYLES: ClassVar[dict[str, str]] = {
        "title": "\x1b[7m",
        "command": "\x1b[1m",
        READ_ONLY: "\x1b[32m",
        SNAPSHOT: "\x1b[36m",
        READ_WRITE: "\x1b[1;33m",
        "alert": "\x1b[1;31m",
        "safe": "\x1b[1;32m",
        "dim": "\x1b[2m",
    }

    def __init__(self, path: str = "", outdate: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self.outdate = outdate
        self.keys = -1  # descriptor to read keys from
        self.page = 0
        self.pages = 1
        self.colour = not os.environ.get("NO_COLOR")
        self.saved: list[Any] | None = None  # the terminal's settings
        self.settings = -1  # descriptor to put them back with
        self.level: ConsoleLevel | None = None
        self.unsent = b""  # what the terminal would not take yet
        self.skipped = False  # whether there is a newer report than the one that is on its way
        try:
            # Opened anew, so that only this writing never blocks: after Ctrl-S a terminal takes no more.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self.descriptor = os.open(path or os.ttyname(1), flags)
        except OSError as e:
            if path:
                raise
            debug(f"Failed to open the terminal, using what is there: {reason_of(e)}")
        try:
            # A pseudo terminal never gets kernel messages; the console, serial lines and virtual terminals
            # may.
            if not (path or os.ttyname(1)).startswith("/dev/pts/"):
                self.level = ConsoleLevel()
                self.level.lower()
                # It may take longer, and would write what it is told into the screen.
                self.beside_plymouth = not end_text_plymouth()
        except OSError:
            pass
        self.take_keys()
        self.write("\x1b[?1049h\x1b[?25l\x1b[2J")

    @property
    def whole(self) -> bool:
        """Whether all of it works: a console whose keys could not be opened has no way out."""
        return not self.gone and not (self.path and self.keys < 0)

    def news(self) -> list[News]:
        return [self, Unsent(self)]

    def wants(self) -> tuple[int, int]:
        return self.keys, select.POLLIN

    def act(self) -> bool:
        """Turns the page. Raises nothing: a terminal that is gone has no keys."""
        try:
            typed = os.read(self.keys, 64)
        except BlockingIOError:
            return False
        except OSError:
            typed = b""
        if not typed:
            self.keys = -1
            self.gone = self.gone or bool(self.path)  # it was hung up, and takes no output any more, either
            return False
        if b"\x03" in typed:
            os.kill(os.getpid(), signal.SIGINT)
        # Keys pressed quickly, or held down, are read together.
        forward = sum(map(typed.count, (b" ", b"n", b"j", b"\x1b[6~", b"\x1b[B", b"\x1b[C", b"\r", b"\n")))
        back = sum(map(typed.count, (b"b", b"p", b"k", b"\x1b[5~", b"\x1b[A", b"\x1b[D")))
        self.page = (self.page + forward - back) % max(1, self.pages)
        self.outdate()
        return False

    def take_keys(self) -> None:
        """Reads keys unbuffered and without echo, which would tear the screen, if this terminal is ours.

        Called again for a console, which the service manager and others set as they need it.
        """
        try:
            if not self.path and (not os.isatty(0) or os.tcgetpgrp(0) != os.getpgrp()):
                return
            import termios

            # Opened anew, so that only this reading never blocks: another program may take the key first.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            keys = self.keys if self.keys >= 0 else os.open(self.path or os.ttyname(0), flags)
            try:
                mode = termios.tcgetattr(keys)
                if self.saved is not None and not mode[3] & (termios.ICANON | termios.ECHO):
                    return
                self.saved = self.saved or termios.tcgetattr(keys)
                mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
                # Ctrl-C is a signal, which also ends a stop that hangs, on the one terminal that controls
                # this process. On others it is a key.
                if not self.path or take_terminal(keys):
                    mode[3] |= termios.ISIG
                termios.tcsetattr(keys, termios.TCSANOW, mode)
            finally:
                self.keys = self.settings = keys
        except (OSError, ImportError) as e:
            debug(f"Failed to set up the terminal's keys, ignoring: {e}")
        except Exception as e:  # termios.error is no OSError
            debug(f"Failed to set up the terminal's keys, ignoring: {e}")

    def show(self, report: Report) -> None:
        self.skipped = bool(self.unsent)
        if self.gone or self.unsent:
            return
        if self.path:
            self.take_keys()
        width, height = self.size()
        self.write(self.drawn(report, width, height))

    def size(self) -> tuple[int, int]:
        """Columns and rows. A serial line does not know its own."""
        try:
            columns, rows = os.get_terminal_size(self.descriptor)
        except OSError:
            columns = rows = 0
        if self.path and not (columns and rows):
            columns, rows = configured_size(self.path)
        return columns or 80, rows or 24

    def drawn(self, report: Report, width: int, height: int) -> str:
        """The bytes that draw the page, each line cleared behind its end, so that nothing flickers."""
        messages = [line for m in report.messages for line in pieces(one_line(m), width - 1)]
        messages = messages[max(0, len(messages) - max(0, height - 8)) :]
        room = max(1, height - 4 - len(messages))
        blocks = [
            [(style, line) for style, text in b for line in fitting(text, width)]
            for b in report.blocks(width)
        ]
        pages = paginated(blocks, width, room)
        self.pages = len(pages)
        self.page = min(self.page, self.pages - 1)
        turn = f"  Page {self.page + 1} of {self.pages} (Space: next, b: back)" if self.pages > 1 else ""
        lines = [
            ("title", padded(cut(f" {one_line(report.title)}", width - 1), width - 1)),
            ("", ""),
            *pages[self.page],
            *[("", "")] * (room - sum(rows_of(text, width) for _, text in pages[self.page])),
            *[("alert", m) for m in messages],
        ]
        hint = self.styled("dim", cut(f"{report.interrupt_text}{turn}", width - 1))
        drawn, row = "\x1b[H", 1
        for style, text in lines:
            rows = rows_of(text, width)
            if row + rows > max(2, height):
                break
            styled = self.styled(style, text)
            if not text.isascii():
                # Terminals differ in how wide some letters are. A line that turns out too wide must not go
                # on in the next row: on the last one, all would move up.
                styled = f"\x1b[?7l{styled}\x1b[?7h"
            # After a full row the cursor is still on its last character, and clearing would take that.
            clear = "" if text and columns(text) % width == 0 else "\x1b[K"
            drawn += f"\x1b[{row};1H{styled}{clear}"
            row += rows
        return drawn + (f"\x1b[{row};1H\x1b[J\x1b[{height};1H{hint}\x1b[K" if row <= height else "")

    def styled(self, style: str, text: str) -> str:
        code = self.STYLES.get(style, "")
        return f"{code}{text}\x1b[0m" if code and text and (self.colour or style == "title") else text

    def write(self, text: str) -> None:
        self.unsent += text.encode("utf-8", "replace")
        self.send()

    def send(self) -> None:
        """Writes what the terminal takes now. Once it has all, what has changed meanwhile is shown."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.descriptor, self.unsent) :]
        except BlockingIOError:
            return
        except OSError as e:
            self.gone, self.unsent = True, b""
            debug(f"The terminal is gone, going on without: {reason_of(e)}")
        if self.skipped:
            self.outdate()

    def close(self) -> None:
        self.write("\x1b[?25h\x1b[?1049l\x1b[0m")
        if self.saved is not None:
            import termios

            try:
                termios.tcsetattr(self.settings, termios.TCSANOW, self.saved)
            except Exception as e:  # termios.error is no OSError
                debug(f"Failed to put back the terminal's settings, ignoring: {e}")
        if self.level:
            self.level.restore()


class Unsent(News):
    """Word that a screen's terminal takes more of what it would not take yet."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def wants(self) -> tuple[int, int]:
        return (self.screen.descriptor, select.POLLOUT) if self.screen.unsent else (-1, 0)

    def act(self) -> bool:
        self.screen.send()
        return False


class Views(Output):
    """The journal and the terminals on which all of the report is shown.

    That is the terminal that the program was started on; or else the journal, and the machine's consoles too
    if asked to. A console may work later than this program, or be hung up: then they are opened anew.
    """

    MESSAGES = 3
    # What the service manager prints on the console about this very start is drawn over a little later.
    REDRAWS_SEC = (1, 4)

    def __init__(self, outdate: Callable[[], None], *, on_consoles: bool = False) -> None:
        self.outdate = outdate
        self.on_consoles = on_consoles
        self.journal = Journal()
        self.terminals: list[Terminal] = []
        self.own = False  # whether it is the terminal that the program was started on
        self.paths: list[str] = []  # of the terminals that it is shown on
        self.named: list[str] = []  # the consoles that the kernel had then, whether they work or not
        self.messages: list[str] = []  # the last ones; none where no terminal shows them
        self.beside_plymouth = False  # whether what is shown now leaves Plymouth alone
        self.redraws: list[float] = []  # when to draw over what others may have written, and look anew
        self.pause = 0.0  # until consoles that are out of order are tried again
        self.lost: set[str] = set()  # those when that was set

    def begin(self) -> None:
        """Opens them, and again later what does not work yet."""
        self.open()
        if self.on_consoles or any(t.HAS_MESSAGES for t in self.terminals):
            now = time.monotonic()
            self.redraws = [now + pause for pause in self.REDRAWS_SEC]

    def open(self) -> None:
        self.own = os.isatty(1)
        term = os.environ.get("TERM", "dumb" if self.own else "")
        self.paths = [""] if self.own else consoles() if self.on_consoles else []
        self.named = named_consoles() if self.on_consoles and not self.own else []
        self.terminals = []
        for path in self.paths:
            try:
                self.terminals.append(Plain(path) if term == "dumb" else Screen(path, self.outdate))
            except OSError as e:
                debug(f"Failed to open '{path}', ignoring: {reason_of(e)}")
        self.beside_plymouth = all(terminal.beside_plymouth for terminal in self.terminals)
        if any(terminal.HAS_MESSAGES for terminal in self.terminals):
            log.screen = self.add_message
            # Standard error may be on the console as well.
            log.errors = 2 if self.own else 1
            for message in [] if self.messages else log.early:
                self.add_message(message)
        else:
            self.messages = []
            log.screen, log.errors = None, 2

    def add_message(self, message: str) -> None:
        self.messages = [*self.messages, f"{time.strftime('%H:%M:%S')} {message}"][-self.MESSAGES :]
        self.outdate()

    def show(self, report: Report) -> None:
        if not self.own:
            self.journal.show(report)
        for terminal in self.terminals:
            terminal.show(report)

    def close(self) -> None:
        for terminal in self.terminals:
            terminal.close()

    def news(self) -> list[News]:
        """What the loop has to wait for on the terminals."""
        return [news for terminal in self.terminals for news in terminal.news()]

    def due(self) -> float | None:
        if self.lost != self.lost_consoles():
            return 0.0
        return self.redraws[0] if self.redraws else None

    def act(self) -> bool:
        now = time.monotonic()
        if self.redraws and self.redraws[0] <= now:
            self.redraws.pop(0)
            self.follow()
            self.outdate()
        if self.lost != self.lost_consoles():
            self.lost = self.lost_consoles()
            self.pause, self.redraws = CONSOLE_WAIT_SEC, []
        if self.lost and self.on_consoles and not self.redraws:
            self.redraws.append(now + self.pause)
            self.pause *= 2
        return False

    def lost_consoles(self) -> set[str]:
        """Consoles that nothing is shown on or that have no keys: hung up, or out of order when opened.

        A serial line does not work for a moment while the service manager, or whoever has hung it up, closes
        it; one without hardware never does.
        """
        return {*self.named, *self.paths} - {t.path for t in self.terminals if t.whole}

    def follow(self) -> None:
        """Opens the consoles anew if others work now, or if one was hung up."""
        if not self.on_consoles or self.own:
            return
        if consoles() == self.paths and not self.lost_consoles().intersection(self.paths):
            return
        self.close()
        self.open()


class Splash(Output):
    """Plymouth's message, where that does not disturb what the views show."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self.told = ""

    def show(self, report: Report) -> None:
        if self.views.beside_plymouth and (text := report.for_plymouth()) != self.told:
            self.told = text
            plymouth(text)

    def close(self) -> None:
        if self.told:
            plymouth("")
            self.told = ""


class Display(News):
    """Has the outputs show a report when it is due: what changes within REDRAW_SEC, together."""

    def __init__(self, take: Callable[[], Report]) -> None:
        self.take = take
        self.outputs: list[Output] = []
        self.outdated = True  # whether something to show has changed
        self.shown = -REDRAW_SEC  # when it was shown last, in seconds of the monotonic clock

    def outdate(self) -> None:
        self.outdated = True

    def due(self) -> float | None:
        return self.shown + REDRAW_SEC if self.outdated else None

    def act(self) -> bool:
        self.outdated = False
        report = self.take()
        for output in self.outputs:
            output.show(report)
        # Not when it began: with many disks that takes long, and other work has to get its turn.
        self.shown = time.monotonic()
        return False

    def close(self) -> None:
        for output in self.outputs:
            output.close()


def named_consoles() -> list[str]:
    """The nodes of the consoles that the kernel names, the main one first, whether they work or not."""
    found: list[str] = []
    for name in reversed(read_attribute(SYS + "class/tty/console/active").split()):
        if name == "tty0":  # which stands for the one in the foreground
            name = read_attribute(SYS + "class/tty/tty0/active") or name
        # The null console takes whatever is written.
        if DEV + name not in found and not name.startswith("ttynull"):
            found.append(DEV + name)
    return found


def consoles() -> list[str]:
    """The nodes of the machine's consoles that work, the main one first; else that of a virtual terminal.

    Where there is no hardware behind a serial line, the kernel has the console all the same, and each write
    to its terminal fails.
    """
    found = list(filter(is_working_terminal, named_consoles()))
    return found or [path for path in [DEV + "tty1"] if is_working_terminal(path)]


def is_working_terminal(path: str) -> bool:
    """Whether there is a terminal at `path` that can be written to."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            os.write(fd, b"")
            return os.isatty(fd)
        finally:
            os.close(fd)
    except OSError as e:
        debug(f"'{path}' is no terminal that works: {reason_of(e)}")
        return False


def take_terminal(fd: int) -> bool:
    """Makes a terminal the one that controls this process, if neither has another one already."""
    import termios

    try:
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    except OSError as e:
        debug(f"Failed to make a terminal the controlling one, ignoring: {reason_of(e)}")
        return False
    return True


def configured_size(path: str) -> tuple[int, int]:
    """Columns and rows of a terminal as the kernel command line has them for systemd, or else 0."""
    try:
        words = dict(w.partition("=")[::2] for w in split_command_line(read_bytes(PROC + "cmdline")))
    except OSError:
        return 0, 0
    texts = [words.get(f"systemd.tty.{name}.{os.path.basename(path)}", "") for name in ("columns", "rows")]
    columns, rows = (int(text) if text.isdecimal() and len(text) < 5 else 0 for text in texts)
    return columns, rows


def one_line(text: str) -> str:
    """`text` without what would move a cursor."""
    return shown(text).replace("\n", " ")


def fitting(text: str, width: int) -> list[str]:
    """`text` in lines that no terminal wraps; but ASCII in one, since commands are pasted whole."""
    text = one_line(text)
    return [text] if text.isascii() else pieces(text, width - 1)


def rows_of(text: str, width: int) -> int:
    """The rows that a line of fitting() takes on a terminal."""
    return max(1, -(-len(text) // width)) if text.isascii() else 1


def paginated(blocks: Iterable[list[tuple[str, str]]], width: int, room: int) -> list[list[tuple[str, str]]]:
    """Blocks of lines put on pages of `room` rows; a block is only cut if it is longer than a page."""
    pages: list[list[tuple[str, str]]] = [[]]
    used = 0
    for block in blocks:
        rows = sum(rows_of(text, width) for _, text in block)
        # The blank line that ends a block may fall off the page.
        needed = rows - 1 if block[-1][1] == "" else rows
        if used and used + needed > room:
            pages.append([])
            used = 0
        for line in block:
            if used and used + rows_of(line[1], width) > room:
                if line[1] == "":
                    continue
                pages.append([])
                used = 0
            pages[-1].append(line)
            used += rows_of(line[1], width)
    return pages


# -----------------------------------------------------------------------------------------------------------
# 35. The service
# -----------------------------------------------------------------------------------------------------------


class SleepLock(News):
    """Keeps logind from sending this machine to sleep: on command, when idle, or when a lid is closed.

    logind's lock lasts as long as a descriptor that it gives to whoever asks on D-Bus. systemd-inhibit(1)
    has that, and ends with its child, here a program that reads from a pipe. The other end of the pipe is in
    this process alone, so the lock ends when this process does, even if it is killed.
    """

    WHAT = "sleep:idle:handle-lid-switch"

    def __init__(self) -> None:
        self.pid = 0
        self.fd = -1  # the end of the pipe; it has an error once systemd-inhibit has ended
        self.asked = False

    def take(self) -> None:
        """Asks for the lock, once, without waiting for it. That it cannot be had is no error."""
        if self.asked:
            return
        self.asked = True
        program, reader = find_program("systemd-inhibit"), find_program("cat")
        if not (program and reader and any(map(os.path.isdir, LOGIND))):
            return
        arguments = ("--who=storagetm", "--why=Other machines may be using its disks", "--mode=block")
        # What it prints is not needed: if it fails, it ends, and the pipe shows that.
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (1, 2)]
        reading, self.fd = os.pipe()
        try:
            self.pid = os.posix_spawn(
                program,
                ("systemd-inhibit", f"--what={self.WHAT}", *arguments, reader),
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), *null],
                setpgroup=0,  # Ctrl-C is for us alone: disks are exported until we have stopped
            )
        except OSError as e:
            debug(f"Failed to start '{program}', ignoring: {reason_of(e)}")
            self.release()
        finally:
            os.close(reading)

    def wants(self) -> tuple[int, int]:
        return self.fd, 0  # just the error, which the kernel always reports

    def act(self) -> bool:
        """Called when systemd-inhibit has ended: logind has refused, or cannot be reached."""
        self.release()
        os.waitpid(self.pid, 0)
        warning(
            "Failed to keep this machine awake: systemd-inhibit has ended; it may go to sleep when it is "
            "idle or its lid is closed"
        )
        return False

    def release(self) -> None:
        """Gives the lock back, without waiting for that."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Signals(News):
    """What signals ask for. Word of them, and of threads that have ended, comes through a pipe.

    The first signal asks the program to stop. Once that is under way, a second one is from a user who does
    not want to wait for a disk that hangs: then `leave` is called, and the process ends.
    """

    def __init__(self, outdate: Callable[[], None], leave: Callable[[], None]) -> None:
        self.outdate = outdate
        self.leave = leave
        self.stop_asked = False
        self.stopping = False
        self.fd = self.wakeup = -1  # the pipe's ends

    def catch(self) -> None:
        if self.fd >= 0:
            return
        self.fd, self.wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCONT):
            signal.signal(number, self.on_signal)
        # A terminal that hangs up ends what is shown on it, not what is exported.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def on_signal(self, number: int, frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            if self.stopping:
                self.leave()
                os._exit(1)
            self.stop_asked = True

    def wake(self) -> None:
        """Called by threads."""
        try:
            os.write(self.wakeup, b"\0")
        except OSError:
            pass  # full: it wakes up anyway

    def wants(self) -> tuple[int, int]:
        return self.fd, select.POLLIN

    def act(self) -> bool:
        os.read(self.fd, 4096)
        self.outdate()
        return False


class SnapshotNews(News):
    """How full the memory for snapshots is: looked at from time to time and on device-mapper's word."""

    def __init__(self, exporter: Exporter, outdate: Callable[[], None]) -> None:
        self.exporter = exporter
        self.outdate = outdate
        self.put_off = False  # whether device-mapper has news that were not looked at yet

    def wants(self) -> tuple[int, int]:
        # Its descriptor stays readable until then.
        return -1 if self.put_off else self.exporter.stores.news, select.POLLIN

    def due(self) -> float | None:
        memory = self.exporter.memory
        if not memory.filled:
            return None
        return self.exporter.stores.divided + (STORE_POLL_SEC[0] if self.put_off else memory.pause)

    def act(self) -> bool:
        before = self.exporter.memory.filled
        early = time.monotonic() < self.exporter.stores.divided + STORE_POLL_SEC[0]
        self.put_off = early or not before
        if not self.put_off:
            self.exporter.share_memory()
            if self.exporter.memory.filled != before:
                self.outdate()
        return False


class Attendance(News):
    """Looks who is attached, and what may do harm, as long as a terminal shows it: nobody tells."""

    LOOK_SEC = 2

    def __init__(self, transports: Sequence[Transport], views: Views, outdate: Callable[[], None]) -> None:
        self.transports = transports
        self.views = views
        self.outdate = outdate
        self.looked = 0.0  # in seconds of the monotonic clock
        self.seen: list[str] = []

    def due(self) -> float | None:
        return self.looked + self.LOOK_SEC if any(not t.gone for t in self.views.terminals) else None

    def act(self) -> bool:
        self.looked = time.monotonic()
        try:
            found = [client.about() for t in self.transports for client in t.attached()]
        except OSError:
            return False  # the report says that nobody knows
        found += [text for t in self.transports for text in t.alerts()]
        if found != self.seen:
            self.seen = found
            self.outdate()
        return False


class Reminder(News):
    """What transports want to try again, such as to tell clients what these were not told."""

    def __init__(self, exporter: Exporter) -> None:
        self.exporter = exporter

    def due(self) -> float | None:
        return self.exporter.due() or None

    def act(self) -> bool:
        for transport in self.exporter.transports:
            transport.try_again(self.exporter.tree.live)
        return True


class Exports(News):
    """What is exported, when it has to be looked at again.

    That is after news; or again and again, less and less often, while a disk is waited for.
    """

    def __init__(self, exporter: Exporter, synchronise: Callable[[], None]) -> None:
        self.exporter = exporter
        self.synchronise = synchronise
        self.pause = LOCK_POLL_SEC[0]
        self.note()

    def note(self) -> None:
        """Notes when that was done, and whether to try again.

        That is not looked up each time the loop goes round: with 256 disks, it took two thirds of the time
        for udev's events.
        """
        self.tried = time.monotonic()
        self.waits = bool(self.exporter.pending()) or not self.exporter.opened

    @property
    def outdated(self) -> bool:
        return self.exporter.outdated or bool(self.exporter.tree.finished)

    def due(self) -> float | None:
        if self.outdated:
            return 0.0
        return self.tried + self.pause if self.waits else None

    def act(self) -> bool:
        self.pause = LOCK_POLL_SEC[0] if self.outdated else min(self.pause * 1.5, LOCK_POLL_SEC[1])
        self.exporter.outdated = False
        self.synchronise()
        self.note()
        return False


class Service:
    """Exports disks until it is told to stop."""

    def __init__(
        self,
        machine: Machine,
        exporter: Exporter,
        refused: str = "",
        *,
        on_consoles: bool = False,
        reboots: bool = False,
    ) -> None:
        self.machine = machine
        self.exporter = exporter
        self.inventory = exporter.inventory
        self.refused = refused  # why nothing is exported, if it is not to be
        # Whether the end of this process boots the machine, as it does in our unit. Then what prevents the
        # start is shown instead: it would be there again after the boot, and nobody could have read it.
        self.reboots = reboots
        self.sleep_lock = SleepLock()
        self.addresses: list[Address] = []
        self.display = Display(self.report)
        # The screen is shown on the machine's consoles `on_consoles`.
        self.views = Views(self.display.outdate, on_consoles=on_consoles)
        self.display.outputs = [self.views, Manager(), Splash(self.views)]
        self.signals = Signals(self.display.outdate, self.views.close)
        self.sources: list[News] = []  # what has a say in exports; none while nothing is exported
        self.ready = False
        self.running = False  # past all that a start may fail at

    def run(self) -> int:
        """Returns the exit code. Raises UserError or OSError for what prevents the start, unless it is shown
        instead of the disks: see `reboots`.
        """
        if not self.refused:
            try:
                return self.export()
            except (UserError, OSError) as e:
                if not self.reboots or self.running:
                    raise
                self.refused = failure_text(e)
                if self.exporter.tree.live:
                    self.refused += "; but what an earlier start exported still is"
        return self.refuse()

    def refuse(self) -> int:
        """Shows why nothing is exported, until it is told to stop. Returns the exit code."""
        error(self.refused)
        self.sources = []
        self.signals.stopping = False
        self.signals.catch()
        self.views.begin()
        notify("READY=1")
        try:
            self.loop()
        finally:
            notify("STOPPING=1")
            self.close_display(failed=False)
        return 0

    def export(self) -> int:
        """Exports disks until it is told to stop; returns the exit code. Raises UserError and OSError."""
        try:
            self.inventory.check_named()
            self.exporter.check()
            for transport in self.exporter.transports:
                transport.prepare()
            self.exporter.ledger.lock()
            self.exporter.begin()
        except (UserError, OSError):
            if any(transport.restricted for transport in self.exporter.transports):
                withdraw(self.exporter)
            raise
        self.inventory.stays.kept = True
        self.signals.catch()
        self.exporter.tree.wake = self.signals.wake
        failed = True
        last: list[str] = []  # messages of the stop
        try:
            # Listening comes before looking: what happens in between is then looked at twice, not missed.
            uevents, network = Uevents(), Network()
            self.exporter.want.follow(network.held)
            if not self.inventory.all_named:
                self.inventory.rescan()
                self.exporter.check()
            self.inventory.check_rules()
            self.synchronise(strict=True)
            self.addresses = network.addresses()
            self.sources = [
                SnapshotNews(self.exporter, self.display.outdate),
                Reminder(self.exporter),
                Attendance(self.exporter.transports, self.views, self.display.outdate),
                Incoming(network.socket, lambda: self.read_addresses(network)),
                *(news for t in self.exporter.transports for news in t.news(self.display.outdate)),
                *(news for s in self.inventory.sources for news in s.news(self.inventory.update)),
                Incoming(uevents.socket, lambda: self.read_disks(uevents)),
                Exports(self.exporter, self.synchronise),
            ]
            self.views.begin()
            self.running = True
            self.exporter.tree.guard()
            self.loop()
            failed = False
        finally:
            if log.screen:
                log.screen = last.append
            clean = self.stop()
            shown_only = os.isatty(log.errors)  # elsewhere they were written at once
            self.close_display(failed=failed)
            for message in last if shown_only else []:
                error(message)
        return 0 if clean else 1

    def close_display(self, *, failed: bool) -> None:
        self.display.close()
        log.screen, log.errors = None, 2
        for message in self.views.messages if failed else []:
            error(message)

    def synchronise(self, *, strict: bool = False) -> None:
        """Has exported what the disks ask for; see Exporter.synchronise()."""
        self.display.outdate()
        self.exporter.synchronise(strict=strict)
        if not self.exporter.opened:
            return
        self.sleep_lock.take()
        waited = time.monotonic() - self.exporter.started
        if not self.ready and (not self.exporter.pending() or waited > LOCK_WAIT_SEC):
            self.ready = True
            notify("READY=1")
            for text in self.idle_rules():
                warning(text)

    def idle_rules(self) -> list[str]:
        """What was asked for and is not there, once all disks were looked at."""
        if not self.ready:
            return []
        return [*self.inventory.missing(), *self.inventory.idle_rules()]

    # Events

    def loop(self) -> None:
        """Waits for news and acts on it, until a signal says to stop. Nothing wakes it up without reason."""
        while not self.signals.stop_asked:
            # Disks come before what is shown of them, and that before the consoles that it was shown on.
            news = [
                self.signals,
                self.sleep_lock,
                *self.sources,
                *self.views.news(),
                self.display,
                self.views,
            ]
            for each in attend(news):
                # A service manager ends all processes of a unit, also the one that keeps the machine awake.
                if self.signals.stop_asked:
                    break
                if each.act():
                    self.exporter.outdated = True

    def read_addresses(self, network: Network) -> bool:
        """Brings the addresses up to date; True if other things are to be exported for that."""
        if not network.changed():
            return False
        self.display.outdate()
        try:
            self.addresses = network.addresses()
            return self.exporter.want.follow(network.held)
        except OSError as e:
            warning(f"Failed to read this machine's addresses: {reason_of(e)}")
            return False

    def read_disks(self, uevents: Uevents) -> bool:
        """Brings the disks up to date; True if there is news of some."""
        names = uevents.changed()
        if names is None:
            debug("Uevents were lost, reading all disks again")
            self.inventory.rescan()
            return True
        names = {name for name in names if not is_between(name)}
        if names:
            self.inventory.update(names)
        return bool(names)

    def report(self) -> Report:
        """What there is to show now."""
        report = take_report(
            self.machine,
            self.exporter.transports,
            self.addresses,
            self.inventory.exports.values(),
            self.exporter.memory,
            filtered=filters_input(),
        )
        report.refused = self.refused
        report.reboots = self.reboots
        report.awaited = list(self.exporter.awaited)
        report.idle = self.idle_rules()
        report.messages = list(self.views.messages)
        return report

    def stop(self) -> bool:
        """Takes all exports down again; False if some would not go."""
        self.signals.stopping = True
        if self.running or not self.reboots:
            notify("STOPPING=1")
        clean = self.exporter.stop()
        self.sleep_lock.release()
        return clean


# -----------------------------------------------------------------------------------------------------------
# 36. The command line
# -----------------------------------------------------------------------------------------------------------


class Options:
    """What the command line asks for."""

    def __init__(self) -> None:
        self.devices: list[str] = []
        self.all = 0
        self.homes = False
        self.users: list[str] = []  # whose home directories; empty for all
        self.nqn = ""
        self.list_devices = False
        self.modules = False
        self.dry_run = False
        self.json = False
        self.force = False
        self.stacked = False
        self.mode = ""  # one of ACCESS; empty if none was asked for
        self.store = 0  # for the changes of snapshots, in bytes; 0 for half of what is available
        self.rules: list[tuple[str, str]] = []  # glob and kind of access
        self.subsystem = ""  # PER_DISK or SHARED; empty if none was asked for
        self.clients = -1  # at a time; 0 for any, -1 if nothing was asked for
        self.transports: list[str] = []  # by name, or AUTO; empty if none was asked for
        self.pair = False
        self.code_file = ""
        self.allow_hosts: list[str] = []  # host NQNs
        self.secret_file = ""
        self.encrypt = ""  # one of ENCRYPT; empty if nothing was asked for
        self.dhgroup = ""
        self.hash = ""
        self.listen: list[str] = []  # addresses and interfaces; empty for all
        self.port = 0  # for TCP; 0 for those that follow from the NQN
        self.kernel_command_line = False
        self.console = False
        self.refused = ""  # why nothing is exported although the service runs, for which see Service.reboots
        self.help = False
        self.version = False

    @property
    def action(self) -> bool:
        """Whether something is to be printed, and nothing exported."""
        return self.help or self.version or self.list_devices or self.modules or self.dry_run


class Option:
    """An option of the command line, and of the kernel's, with `storagetm.` in place of the hyphens.

    `value` is how help has its value: after "=", in brackets if it may be left out, empty if it takes none.
    `whole` is whether it cannot be shortened, so that it takes no other option's short form away.
    """

    __slots__ = ("name", "short", "text", "value", "whole")

    def __init__(
        self, name: str, text: str, *, value: str = "", short: str = "", whole: bool = False
    ) -> None:
        self.name = name
        self.text = text
        self.value = value
        self.short = short
        self.whole = whole

    @property
    def needs_value(self) -> bool:
        return self.value.startswith("=")


# argparse would be the largest import.
OPTIONS = (
    Option(
        "all",
        "Export all local disks, now and as they come and go;\ntwice: also those in use by this system",
        short="a",
    ),
    Option(
        "homes",
        "Export the home directories of systemd-homed, or\nof these users, now and as they come and go",
        value="[=USER,...]",
        whole=True,
    ),
    Option("nqn", "Use this NVMe Qualified Name before the disks' names", value="=NQN"),
    Option("read-only", "Let nobody write to the disks (default)"),
    Option(
        "snapshot",
        "Keep what is written in memory, at most SIZE bytes\n(or K, M, G, T), and forget it at the end",
        value="[=SIZE]",
    ),
    Option("read-write", "Let whoever attaches the disks change them"),
    Option(
        "access",
        "Use this mode for disks whose node, link, serial\nnumber or model matches; the first one counts",
        value="=GLOB:MODE",
    ),
    Option(
        "subsystem",
        "One NVMe subsystem for each disk (per-disk, default)\nor one for all (shared)",
        value="=KIND",
    ),
    Option(
        "clients",
        "Let N clients at a time attach a disk that they can\nwrite to (default: 1)",
        value="=N|any",
    ),
    Option(
        "transport",
        "nvme-tcp (default), usb, nbd, iscsi, or more of\n"
        "them, with commas; auto: nvme-tcp, and usb if it has\na port for it",
        value="=LIST",
    ),
    Option("pair", "Let in who knows the code on the screen, encrypted"),
    # Whoever gives the code itself shall not read that it is no file.
    Option("code-file", "Take the code from this file, and pair", value="=FILE", whole=True),
    Option("allow-host", "Let in this host, and no other; can be repeated", value="=HOSTNQN"),
    Option("secret-file", "Take hosts' secrets from this file: HOSTNQN SECRET", value="=FILE", whole=True),
    Option("encrypt", "TLS: required (with --pair), offered or no", value="=KIND"),
    Option("dhgroup", "Diffie-Hellman group for secrets (ffdhe3072)", value="=GROUP"),
    Option("hash", "Hash for secrets (sha256)", value="=HASH"),
    Option(
        "listen",
        "Let clients in over NVMe/TCP at this address or\ninterface only; can be given several times",
        value="=ADDRESS|IF",
        whole=True,
    ),
    Option("port", "Use this TCP port", value="=N"),
    Option("stacked", "Export idle arrays and volumes, and not their disks"),
    Option("force", "Export the named devices even if they are in use"),
    Option("list-devices", "Show what --all would export, what not, and why"),
    Option("modules", "List the kernel's modules that may be needed"),
    Option("dry-run", "Show each step and do none; needs no root"),
    Option("json", "With --list-devices or --dry-run: as JSON"),
    Option("kernel-command-line", "Take rd.storagetm.OPTION there for --OPTION, too"),
    Option("console", "Show the screen on this machine's consoles, where\nthe output is no terminal"),
    Option("help", "Show this help", short="h"),
    Option("version", "Show the version"),
)


PEER_OPTIONS = ("all", "help", "list-devices", "nqn", "version")


def help_text() -> str:
    lines = [
        "storagetm [OPTIONS...] DEVICE...",
        "storagetm [OPTIONS...] --all",
        "storagetm [OPTIONS...] --homes[=USER,...]",
        "storagetm --list-devices",
        "",
        "Export block devices or regular files over NVMe/TCP, USB, NBD or iSCSI.",
        "",
    ]
    for option in OPTIONS:
        left = (f"-{option.short} " if option.short else "   ") + f"--{option.name}{option.value}"
        first, *rest = option.text.split("\n")
        lines.append(f"  {left:<25}{first}")
        lines += [" " * 27 + line for line in rest]
    return "\n".join([*lines, "", "See storagetm(8) for the details."])


def parse_arguments(argv: Sequence[str]) -> Options:
    """The options of the command line and, where it says so, of the kernel's. Raises UsageError.

    With `--kernel-command-line` what makes no sense is in `refused` instead: a service's unit cannot be
    edited where this is used, and if it failed, it would reboot the machine before anyone could read why.
    """
    options = Options()
    try:
        parse_words(options, argv)
        if options.kernel_command_line:
            words = []
            try:
                words = split_command_line(read_bytes(PROC + "cmdline"))
            except OSError as e:
                why = f"Failed to read the kernel command line: {reason_of(e)}; mount proc on '/proc'"
                if not options.action:  # what is there may be meant to keep somebody out
                    raise UsageError(why) from e
                warning(why)
            add_options(options, options_from_kernel(words, os.path.exists(ETC + "initrd-release")))
        if not (options.help or options.version):
            check_arguments(options)
    except UsageError as e:
        options.kernel_command_line = options.kernel_command_line or "--kernel-command-line" in argv
        if not options.kernel_command_line or options.action:
            raise
        options.refused = str(e)
    return options


def parse_words(options: Options, argv: Sequence[str]) -> None:
    """Options and devices in any order, as getopt_long(3) takes them. Raises UsageError."""
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            options.devices += rest
            break
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            matches = [o for o in OPTIONS if o.name == name] or [
                o for o in OPTIONS if o.name.startswith(name) and not o.whole
            ]
            if len(matches) > 1:  # what systemd-storagetm takes for an abbreviation stays one
                matches = [o for o in matches if o.name in PEER_OPTIONS] or matches
            if len(matches) != 1:
                raise UsageError(f"{'Ambiguous' if matches else 'Unknown'} option '--{name}'; see --help")
            option = matches[0]
            if option.needs_value and not equals:
                if not rest:
                    raise UsageError(f"Option '--{option.name}' needs a value")
                value = rest.pop(0)
            elif equals and not option.value:
                raise UsageError(f"Option '--{option.name}' takes no value")
            elif equals and not value and not option.needs_value:
                raise UsageError(f"--{option.name}= is empty")
            set_option(options, option.name, value)
        elif argument.startswith("-") and argument != "-":
            for letter in argument[1:]:
                known = [o for o in OPTIONS if o.short == letter]
                if not known:
                    raise UsageError(f"Unknown option '-{letter}'; see --help")
                set_option(options, known[0].name, "")
        else:
            options.devices.append(argument)


SECURITY = ("code_file", "secret_file", "encrypt", "dhgroup", "hash")  # each counts once
CHOICES = {"encrypt": ENCRYPT, "dhgroup": DHGROUPS, "hash": HASHES}


def set_option(options: Options, name: str, value: str, before: str = "--") -> None:
    """Takes an option, whose name has `before` in front of it where it stands. Raises UsageError."""
    if name == "nqn":
        check_nqn(value, before)
        options.nqn = value
    elif name == "all":
        options.all += 1
    elif name == "homes":
        options.homes = True
        options.users += parse_users(value, before)
    elif name in ACCESS:
        if options.mode not in ("", name):
            raise UsageError(
                f"{before}{name} and {before}{options.mode} do not go together; see {before}access="
            )
        options.mode = name
        options.store = parse_size(value, before) if value else options.store
    elif name == "subsystem":
        if value not in (PER_DISK, SHARED):
            raise UsageError(f"{before}subsystem={value} is neither {PER_DISK} nor {SHARED}")
        options.subsystem = value
    elif name == "clients":
        if value != "any" and not (
            value.isascii() and value.isdecimal() and 0 < int(value[:4]) <= CLIENTS_MAX
        ):
            raise UsageError(f"{before}clients={value} is neither a number from 1 to {CLIENTS_MAX} nor any")
        options.clients = 0 if value == "any" else int(value)
    elif name == "transport":
        for word in value.split(","):
            if word not in (*(t.name for t in TRANSPORTS), AUTO):
                known = ", ".join([*(t.name for t in TRANSPORTS), AUTO])
                raise UsageError(f"{before}transport={value} is no list of {known}")
            options.transports += [word] * (word not in options.transports)
    elif name == "listen":
        if not (word := parse_listen(value)):
            raise UsageError(f"{before}listen={value} is neither an address nor the name of an interface")
        options.listen += [word] * (word not in options.listen)
    elif name == "port":
        if not (value.isascii() and value.isdecimal() and 0 < int(value[:6]) <= 65535):
            raise UsageError(f"{before}port={value} is no number from 1 to 65535")
        options.port = int(value)
    elif name == "access":
        options.rules.append(parse_rule(value, before))
    elif name == "allow-host":
        try:
            check_host_nqn(value)
        except ValueError as e:
            raise UsageError(f"{before}allow-host={value} is no host NQN: {e}") from None
        options.allow_hosts += [value] * (value not in options.allow_hosts)
    elif name in ("code-file", "secret-file"):
        if not value or "\0" in value:
            raise UsageError(f"{before}{name}= names no file")
        setattr(options, name.replace("-", "_"), value)
    elif name in CHOICES:
        if value not in CHOICES[name]:
            raise UsageError(f"{before}{name}={value} is not one of {', '.join(CHOICES[name])}")
        setattr(options, name, value)
    else:
        setattr(options, name.replace("-", "_"), True)


def parse_users(text: str, before: str = "--") -> list[str]:
    """Users, with commas in between; none for all. Raises UsageError."""
    users = text.split(",") if text else []
    if any(not user or "/" in user or not user.isprintable() for user in users):
        raise UsageError(f"{before}homes={text} is no list of users")
    return users


def parse_size(text: str, before: str = "--") -> int:
    """Bytes, from a number that K, M, G or T (powers of 1024) may follow. Raises UsageError."""
    digits = text[:-1] if text[-1:].upper() in "KMGT" else text
    shift = 10 * (1 + "KMGT".index(text[-1].upper())) if digits != text else 0
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 16):
        raise UsageError(f"{before}snapshot={text} is no size; give bytes, or a number with K, M, G or T")
    size = int(digits) << shift
    if not STORE_MIN <= size < 1 << 62:
        raise UsageError(f"{before}snapshot={text} is too {'small' if size < STORE_MIN else 'large'}")
    return size


def parse_rule(text: str, before: str = "--") -> tuple[str, str]:
    """Glob and kind of access. The last colon is between them: by-path links have others.

    Raises UsageError.
    """
    glob, _, mode = text.rpartition(":")
    if not glob or mode not in ACCESS:
        raise UsageError(f"{before}access={text} is not GLOB:MODE with one of the modes {', '.join(ACCESS)}")
    return glob, mode


def options_from_kernel(words: Iterable[str], initrd: bool) -> Options:
    """The options in `storagetm.NAME[=VALUE]`. Those with `rd.` in front count in an initrd only.

    Raises UsageError for bad values.
    """
    found = Options()
    for word in words:
        key, equals, value = word.partition("=")
        prefix, dot, name = key.removeprefix("rd.").partition(".") if initrd else key.partition(".")
        if prefix != "storagetm" or not dot:
            continue
        if name in ("code", "hosts", "key", "psk", "secret"):
            raise UsageError(
                f"Kernel command line: everybody can read it, so '{key}' is no place for a secret; hand it "
                "over as the credential storagetm.code or storagetm.hosts"
            )
        known = [o for o in OPTIONS if o.name == name.replace("_", "-") and o.name != "kernel-command-line"]
        if not known:
            # It may have been meant to keep somebody out.
            raise UsageError(f"Kernel command line: unknown option '{key}'; correct it")
        try:
            if equals and not known[0].value:
                raise UsageError(f"'{key}' takes no value")
            if (not equals and known[0].needs_value) or (equals and not value):
                raise UsageError(f"'{key}' needs a value")
            set_option(found, known[0].name, value, "storagetm.")
            if found.action or found.json:
                raise UsageError(f"'{key}' prints text and exports nothing, which only helps in a shell")
        except UsageError as e:
            raise UsageError(f"Kernel command line: {e}; correct it") from e
    return found


def add_options(options: Options, more: Options) -> None:
    """Adds options that count less than those that are there."""
    if not options.mode:
        options.rules += more.rules
        options.mode = more.mode
    options.store = options.store or more.store
    options.nqn = options.nqn or more.nqn
    options.users = options.users if options.homes else more.users
    options.homes = options.homes or more.homes
    options.subsystem = options.subsystem or more.subsystem
    options.transports = options.transports or more.transports
    options.listen = options.listen or more.listen
    options.port = options.port or more.port
    options.clients = more.clients if options.clients < 0 else options.clients
    options.all = max(options.all, more.all) if not options.devices else options.all
    options.allow_hosts = options.allow_hosts or more.allow_hosts
    for name in ("force", "stacked", "console", "pair", *SECURITY):
        setattr(options, name, getattr(options, name) or getattr(more, name))


def check_nqn(nqn: str, before: str = "--") -> None:
    """Raises UsageError unless `nqn` can stand in front of a disk's name, in an NQN and as a file name."""
    if not nqn:
        raise UsageError(f"{before}nqn= is empty")
    try:
        length = len(nqn.encode())
    except UnicodeEncodeError as e:
        raise UsageError(f"{before}nqn= is not UTF-8") from e
    if "/" in nqn:
        raise UsageError(f"{before}nqn={nqn} has a '/' in it")
    if "," in nqn:
        # They hand it to their kernels in a list that has commas in between (drivers/nvme/host/fabrics.c).
        raise UsageError(f"{before}nqn={nqn} has a comma in it, and no client could attach that")
    if not nqn.isprintable():
        raise UsageError(f"{before}nqn= has control characters in it")
    if length + 2 > NQN_MAX:
        raise UsageError(
            f"{before}nqn= is too long: {length} bytes, and with '.' and a disk's name {NQN_MAX} are allowed"
        )


def check_arguments(options: Options) -> None:
    """Raises UsageError for options that do not go together."""
    if options.json and not (options.list_devices or options.dry_run):
        raise UsageError("--json goes with --list-devices or --dry-run")
    if options.devices and (options.all or options.list_devices):
        raise UsageError(
            f"--{'all' if options.all else 'list-devices'} takes no device ('{options.devices[0]}')"
        )
    if options.stacked and options.devices:
        raise UsageError(
            "--stacked goes with --all; a device that is named is exported whatever it is made of"
        )
    if not (options.devices or options.all or options.homes or options.list_devices or options.modules):
        raise UsageError("Name a device, or give --all or --homes; see --help")
    if options.homes and options.clients not in (-1, 1):
        raise UsageError(
            "--clients= does not go with --homes, since a home directory that two machines write to at the "
            "same time is lost; leave one of them out"
        )
    if any("\0" in d or not d for d in options.devices):
        raise UsageError("A device's name is empty")


# -----------------------------------------------------------------------------------------------------------
# 37. The program
# -----------------------------------------------------------------------------------------------------------


def write_output(text: str) -> None:
    """Writes a line to standard output, whole. Raises UserError: half of what was asked for is a failure."""
    data = utf8(text + "\n")
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:  # another program may have set the pipe so
            poll = select.poll()
            poll.register(1, select.POLLOUT)
            poll.poll()
        except OSError as e:
            raise UserError(f"Failed to write the output: {reason_of(e)}; it is incomplete") from e


def write_json(value: object) -> None:
    import json

    write_output(json.dumps(value, indent=2))


def list_devices(options: Options) -> int:
    """Says what --all would export, what not, and why."""
    access = Access(options.rules, options.mode)
    sources: list[Source] = [BlockDevices()]
    if options.homes:
        sources.insert(0, homes(options, paired=options.pair or options.code_file != ""))
    inventory = Inventory(sources, access, force=options.all > 1, stacked=options.stacked)
    inventory.rescan()
    inventory.check_rules()
    for text in (*inventory.missing(), *inventory.idle_rules()):
        warning(text)
    exports = sorted(inventory.exports.values(), key=lambda e: natural_order(e.disk.name))
    if options.json:
        write_json(
            [
                {
                    "node": e.disk.node,
                    "size": e.disk.size,
                    "model": e.disk.model or None,
                    "serial": e.disk.serial or None,
                    "export": not e.left_out,
                    "access": None if e.left_out else e.access,
                    "reason": e.left_out or None,
                }
                for e in exports
            ]
        )
        return 0
    rows = [("NODE", "SIZE", "MODEL", "SERIAL", "EXPORT")]
    for export in exports:
        disk, verdict = export.disk, f"no: {export.left_out}" if export.left_out else export.access
        rows.append((disk.node, size_text(disk.size), disk.model, disk.serial, verdict))
    widths = [max(columns(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        write_output("  ".join([padded(cell, width) for cell, width in zip(row, widths)] + [row[4]]))
    return 0


def dry_run(options: Options, exporter: Exporter, steps: list[dict[str, str]]) -> int:
    """Shows the steps from what is live now to what is wanted, which are added to `steps`."""
    inventory = exporter.inventory
    inventory.check_named()
    if not inventory.all_named:
        inventory.rescan()
    inventory.check_rules()
    for text in (*inventory.missing(), *inventory.idle_rules()):
        warning(text)
    exporter.check()
    failures = exporter.rehearse()
    for failure in (failure for failure in failures if not failure.cause):
        error(f"Would fail at '{failure.entry.place(CONFIGFS)}': {reason_of(failure.error)}")
    if options.json:
        write_json([{k: v for k, v in step.items() if k != "command"} for step in steps])
    else:
        for step in steps:
            write_output(step["command"])
    return 1 if failures else 0


def credential(name: str) -> str:
    """The path of a credential that the service manager has for us; empty if it has none."""
    path = f"{os.environ.get('CREDENTIALS_DIRECTORY', '')}/storagetm.{name}"
    return path if path.startswith("/") and os.path.exists(path) else ""


def chosen_admission(options: Options, kept: str) -> Admission:
    """Who is let in. `kept` is where a code of our own is, from the start until a clean stop.

    Raises UserError, and then nothing is exported.
    """
    code = None
    code_file = options.code_file or credential("code")
    secret_file = options.secret_file or credential("hosts")
    if options.pair or code_file or secret_file:
        keep_memory_private()
    if code_file:
        try:
            code = Code.parse(read_secrets(code_file, "code file").decode("utf-8", "replace"))
        except ValueError as e:
            raise UserError(f"'{code_file}' has no code in it: {e}") from None
    elif options.pair:
        if not (options.dry_run or options.console or os.isatty(1)):
            raise UsageError(
                "--pair shows a code on a screen, and there is none: the output is no terminal; start it on "
                "one, add --console, or give --code-file="
            )
        code = kept_code(kept)
    hosts: list[AllowedHost] = []
    if path := secret_file:
        hosts = parse_hosts(read_secrets(path, "secret file"), f"'{path}'")
        if not hosts:
            raise UserError(f"'{path}' has no host in it; add a line with its NQN and its secret")
    if options.allow_hosts:
        known = {host.nqn: host for host in hosts}
        for nqn in options.allow_hosts if secret_file else ():
            if nqn not in known:
                raise UserError(
                    f"The host '{nqn}' is not in '{secret_file}'; add a line for it, or leave it out of "
                    "--allow-host="
                )
        hosts = [known.get(nqn) or AllowedHost(nqn) for nqn in options.allow_hosts]
    if code and (own := code.host().nqn) in [host.nqn for host in hosts]:
        raise UserError(f"The host '{own}' is that of the code; leave it out of the other hosts")
    encrypt = options.encrypt or (Admission.REQUIRED if code else Admission.NO)
    if encrypt != Admission.NO and not (code or hosts):
        raise UsageError(f"--encrypt={encrypt} goes with --pair or --allow-host=: keys are those of hosts")
    for host in hosts if encrypt == Admission.REQUIRED else ():
        if not host.psk:
            raise UserError(
                f"The host '{host.nqn}' has no key for TLS; add one to its line of the secret file, as "
                "'nvme gen-tls-key --hmac=1' prints it, or see --encrypt="
            )
    return Admission(
        hosts,
        encrypt,
        code=code,
        own=not code_file,
        kept="" if options.dry_run else kept,
        dhgroup=options.dhgroup,
        hash_=options.hash,
    )


def kept_code(path: str) -> Code:
    """The code of a run that was killed, so that clients stay; or else a new one."""
    try:
        return Code.parse(read_bytes(path).decode("utf-8", "replace"))
    except (OSError, ValueError) as e:
        debug(f"No code of an earlier run: {e}")
    return Code.random()


def homes(options: Options, *, paired: bool) -> Homes:
    """The home directories that were asked for. In an initrd, those of the root file system if it is there.

    To be of use elsewhere they have to be written to, but only by those who are let in.
    """
    root = "/sysroot" if os.path.exists(ETC + "initrd-release") else ""
    machine_id = read_attribute(root + ETC + "machine-id")
    return Homes(machine_id, options.users, READ_WRITE if paired else "", root)


def chosen_sources(options: Options, admission: Admission | None) -> list[Source]:
    """Where the disks come from that were asked for. What two sources have is the first one's."""
    found: list[Source] = []
    if options.homes:
        found.append(homes(options, paired=admission is not None and admission.code is not None))
    if options.all:
        found.append(BlockDevices())
    elif options.devices or not options.homes:
        found.append(NamedDisks(options.devices))
    return found


def chosen_transports(
    options: Options,
    machine: Machine,
    instance: str,
    access: Access | Inventory,
    admission: Admission | None = None,
) -> list[Transport]:
    """The transports that were asked for, in that order. Raises UsageError."""
    restricted = admission is not None and admission.restricted
    names = [name for name in options.transports or [NvmeTcp.name] if name != AUTO]
    if AUTO in options.transports:
        at = options.transports.index(AUTO)
        names[at:at] = [NvmeTcp.name, *([] if restricted else [UsbGadget.name])]
    if admission and Iscsi.name in names:
        Iscsi.check_admission(admission)
    if admission and Nbd.name in names:
        Nbd.check_admission(admission)
    if restricted and UsbGadget.name in names:
        raise UsageError(
            "Over USB nobody can be kept out but by who has the cable; leave out --transport=usb, or --pair "
            "and --allow-host="
        )
    # The other machine then needs one key and one command.
    shared = options.subsystem == SHARED or (restricted and options.subsystem != PER_DISK)
    clients = 1 if options.clients < 0 else options.clients
    writable = access.may_write()
    found: list[Transport] = []
    for name in dict.fromkeys(names):
        # Of several, a port that was asked for is the first one's that everybody has.
        port = options.port if name == NvmeTcp.name or len(options.transports) == 1 else 0
        where = Listening(options.listen, port) if options.listen or port else None
        if name == NvmeTcp.name:
            tcp = SharedNvmeTcp if shared else NvmeTcp
            found.append(
                tcp(
                    machine,
                    instance,
                    clients=clients,
                    writable=writable,
                    admission=admission,
                    listening=where,
                )
            )
        elif name == Nbd.name:
            found.append(Nbd(where, clients, admission))
        elif name == Iscsi.name:
            found.append(
                Iscsi(machine, instance, where, clients=clients, writable=writable, admission=admission)
            )
        else:
            found.append(UsbGadget(machine, instance, optional=UsbGadget.name not in options.transports))
    return found


def start(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code. Raises UserError."""
    options = parse_arguments(argv)
    if options.help:
        write_output(help_text())
        return 0
    if options.version:
        write_output(f"storagetm {__version__}")
        return 0
    if options.modules:
        write_output("\n".join(MODULES))
        return 0
    if not os.path.isdir(SYS + "block"):
        problem = f"'{SYS}' is not mounted, or this kernel has no block devices; mount sysfs there"
        if not options.kernel_command_line or options.action:
            raise UserError(problem)
        options.refused = options.refused or problem
    if options.list_devices:
        return list_devices(options)
    if not options.dry_run and os.geteuid() != 0:
        raise UserError("Only root can export disks; run it as root, or see what it would do with --dry-run")
    machine = Machine()
    instance = options.nqn or machine.instance()
    code = f"{RUN}{instance}.code"
    admission = None
    inventory = Inventory([])
    try:
        admission = chosen_admission(options, code)
        inventory = Inventory(
            chosen_sources(options, admission),
            Access(options.rules, options.mode),
            Stays(f"{RUN}{instance}.disks", machine.id),
            force=options.force or options.all > 1,
            stacked=options.stacked,
        )
        transports = chosen_transports(options, machine, instance, inventory, admission)
    except UserError as e:
        if not options.dry_run and (admission is None or admission.restricted):
            withdraw(Exporter(instance, [], Inventory([])))
        if not options.kernel_command_line or options.action:
            raise
        options.refused = options.refused or str(e)
        transports = []
    if options.refused:
        inventory.sources = []
    if options.dry_run:
        steps: list[dict[str, str]] = []
        rehearsing = Exporter(instance, transports, inventory, rehearse=steps.append)
        return dry_run(options, rehearsing, steps)
    exporter = Exporter(instance, transports, inventory, Memory(options.store))
    reboots = options.kernel_command_line
    return Service(machine, exporter, options.refused, on_consoles=options.console, reboots=reboots).run()


def use_utf8() -> None:
    """Starts the program once more in Python's UTF-8 mode, if the locale has another encoding.

    The names of files are bytes. Python decodes them as the locale says, and everything else here is UTF-8:
    the NQN of a disk and the path to open would depend on the locale. It cannot be changed later.
    """
    program = sys.argv[0]
    if sys.getfilesystemencoding() == "utf-8" or not os.path.isfile(program):
        return
    try:
        # Without $PATH, Python may not know where it is itself.
        interpreter = sys.executable or os.readlink(PROC + "self/exe")
        os.execv(interpreter, (interpreter, "-ISXutf8", program, *sys.argv[1:]))
    except OSError as e:
        debug(f"Failed to start again in UTF-8, going on without: {reason_of(e)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 after a clean stop, 1 on failure, 2 on wrong usage."""
    if argv is None:
        use_utf8()
    # If standard input, output or error is closed, the next file opened would get its number and the output.
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    try:
        return start(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError) as e:
        error(failure_text(e))
        return e.code if isinstance(e, UserError) else 1
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
