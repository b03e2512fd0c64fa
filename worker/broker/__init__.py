"""Jobs and token logs on Redis. Nothing in this package depends on vLLM."""
