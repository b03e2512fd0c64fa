"""Jobs and token logs on Redis. Nothing here knows of vLLM."""
