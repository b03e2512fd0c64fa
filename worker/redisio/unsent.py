"""The unsent bytes of a connection, which distinguish a slow network from a silent server."""

import asyncio
import struct
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ


def unsent(transport: asyncio.WriteTransport) -> int:
    """Bytes that the other host has not acknowledged, in the transport's buffer and in the kernel's (see tcp(7)).

    The kernel's bytes are omitted if it does not report them, as for a closed connection.
    """
    size = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError, ValueError):  # the file descriptor of a closed connection is -1
            size += struct.unpack("i", ioctl(connection.fileno(), TIOCOUTQ, bytes(4)))[0]
    return size
