"""An embedded Redis and a simulated vLLM, for the demo and the tests. Not for production."""
