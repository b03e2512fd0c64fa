"""`python -m worker`: the command `worker`."""

from worker.cli import main

main()
