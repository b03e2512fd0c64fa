"""Redis as such: clients, topologies, retries, pipelined connections and pub/sub. Nothing here knows of jobs."""
