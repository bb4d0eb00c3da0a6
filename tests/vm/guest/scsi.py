# SPDX-License-Identifier: LGPL-2.1-or-later
"""A SCSI command to a disk as its host may send one: `scsi.py NODE CDB [BYTES]`.

CDB is in hexadecimal. BYTES, if there are any, are written. Prints the sense key, or 0 for success.
"""

import ctypes
import fcntl
import os
import sys

SG_IO = 0x2285  # include/scsi/sg.h
SG_DXFER_NONE, SG_DXFER_TO_DEV = -1, -2


class sg_io_hdr(ctypes.Structure):
    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


def main() -> None:
    node, words, *more = sys.argv[1:]
    cdb, data = bytes.fromhex(words), b"x" * int(more[0] if more else 0)
    command, sense = ctypes.create_string_buffer(cdb, len(cdb)), ctypes.create_string_buffer(64)
    buffer = ctypes.create_string_buffer(data, len(data) or 1)
    header = sg_io_hdr(
        interface_id=ord("S"),
        dxfer_direction=SG_DXFER_TO_DEV if data else SG_DXFER_NONE,
        cmd_len=len(cdb),
        mx_sb_len=len(sense),
        dxfer_len=len(data),
        dxferp=ctypes.addressof(buffer),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=60000,
    )
    # Even what the kernel takes for write-protected can be opened like this, as root.
    fd = os.open(node, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, SG_IO, header)
    if header.host_status or header.status not in (0, 2):
        sys.exit(f"status {header.status}, of the host adapter {header.host_status}")
    print(sense.raw[2] & 15 if header.status else 0)


if __name__ == "__main__":
    main()
