"""How much of what was written to a connection is still on its way: a slow way is told from a silent one by it."""

import asyncio
import struct
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ


def unsent(transport: asyncio.WriteTransport) -> int:
    """Bytes that the other host has not acknowledged, in the transport's buffer and in the kernel's (see tcp(7)).

    Where the kernel does not say, as of a connection that is closed by now, its own are left out.
    """
    size = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError, ValueError):  # the file descriptor of a closed one is -1
            size += struct.unpack("i", ioctl(connection.fileno(), TIOCOUTQ, bytes(4)))[0]
    return size
