"""Access to Redis: clients, topologies, retries, pipelined connections and pub/sub. It does not depend on jobs."""
