"""The program `worker`, also as `python -m worker`: what it does before anything else is loaded."""

import os
import signal
import sys


def main() -> None:
    """Run the command line.

    Linux drops SIGTERM for process 1, as which a container runs its program, until that has a handler. So there is one
    before the rest is loaded, which takes half a second; `worker run` then has its own.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from worker import cli  # noqa: PLC0415 - after the handler

    cli.main()


if __name__ == "__main__":
    main()
