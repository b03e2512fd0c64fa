"""All that speaks to Redis; nothing in here knows of vLLM."""
