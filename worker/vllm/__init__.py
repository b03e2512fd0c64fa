"""The client of vLLM servers. Nothing in this package depends on Redis."""
