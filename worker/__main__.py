"""The program `worker`, also as `python -m worker`: what it does before anything else is loaded."""

import os
import signal
import sys


def main() -> None:
    """Run the command line.

    Linux drops SIGTERM for process 1, as which a container runs its program, until that has a handler. So there is one
    before the rest is loaded, which takes half a second; `worker run` then has its own.

    Ctrl-C in this half second ends the process at once with the status of a shell. Nothing has begun yet, and Python's
    own handler would print where in the imports it came. A shell that ignores SIGINT (`worker … &`) is left to do so.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    heeds_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds_ctrl_c:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from .cli import main as cli  # noqa: PLC0415 - after the handlers

    if heeds_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
