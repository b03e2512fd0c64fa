"""A simulated vLLM: it answers as the recorded transcripts of a real one do, and breaks when it is asked to."""
