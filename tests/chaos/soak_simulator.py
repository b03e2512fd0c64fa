"""One simulated vLLM as a process, until it is killed: `python soak_simulator.py PORT RECORD [IGNORED FIELD …]`."""

import asyncio
import sys
from pathlib import Path

from worker.sandbox.simulator.server import Options, Scenario, serve_forever

if __name__ == "__main__":
    options = Options(
        scenario=Scenario(rate=300), keep_alive=0.2, record=Path(sys.argv[2]), ignores=frozenset(sys.argv[3:])
    )
    asyncio.run(serve_forever(options, host="127.0.0.1", port=int(sys.argv[1])))
