"""Servers to play with: an embedded Redis and a simulated vLLM, for the demo and the tests. Not for production."""
