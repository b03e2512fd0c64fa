"""The program `worker`, also as `python -m worker`: it handles signals before it loads the command line."""

import os
import signal
import sys


def main() -> None:
    """Run the command line.

    A container runs its program as process 1, for which Linux drops SIGTERM until there is a handler. So a handler is
    set before the command line is loaded, which takes half a second. `worker run` then sets its own.

    Ctrl-C in this half second ends the process at once with the status of a shell: nothing has begun yet, and Python's
    own handler would print a traceback of the imports. Where a shell ignores SIGINT (`worker … &`), it stays ignored.
    """
    _open_missing_streams()
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    handles_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handles_ctrl_c:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if sys.argv[1:2] == ["health"]:  # without the rest of the command line, since containers run it every few seconds
        from .cli.health import health  # noqa: PLC0415 - see above

        health.main(sys.argv[2:], prog_name="worker health")
    from .cli import main as cli  # noqa: PLC0415 - after the handlers

    if handles_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _open_missing_streams() -> None:
    """Open /dev/null for each standard stream that is closed (`worker … >&-`).

    Else its number is given to the next file that is opened. The event loop ends the process for that (libuv 1).
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, open(opened, "w" if number else "r", closefd=False))  # noqa: SIM115 - for the whole run


if __name__ == "__main__":
    main()
