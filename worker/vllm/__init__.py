"""All that speaks to vLLM; nothing in here knows of Redis."""
