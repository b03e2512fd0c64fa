"""Everything that talks to vLLM servers. Nothing in this package knows of Redis."""
