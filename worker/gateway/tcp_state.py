"""What the kernel knows of a connection before the event loop does. Outside of Linux it knows less."""

import asyncio
import fcntl
import socket
import struct
import termios

_ESTABLISHED = 1
"""The state of a TCP connection that neither end has closed (Linux, `tcp_states.h`)."""


def is_established(transport: asyncio.WriteTransport) -> bool | None:
    """Whether neither end has closed a connection; None if the kernel cannot be asked."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    if transport.is_closing():
        return False
    connection = transport.get_extra_info("socket")
    return bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED)


def is_acknowledged(transport: asyncio.WriteTransport) -> bool:
    """Whether the other end's kernel has everything that was written to a connection that is not closing."""
    number = transport.get_extra_info("socket").fileno()
    (waiting,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
    return not (waiting or transport.get_write_buffer_size())
