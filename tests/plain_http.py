"""What lets a test make an HTTP client cheaply: its servers are on this machine, and speak no TLS."""

import ssl

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For `verify` of a client. Each client of httpx would read the certificates of all authorities otherwise.

That took 40 ms of CPU time, in most tests of the gateway and of the simulator:

    .venv/bin/python -m timeit -n 1 -s 'import httpx' 'httpx.create_ssl_context()'
"""
