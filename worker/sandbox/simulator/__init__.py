"""A simulated vLLM: it answers as a real one did in recorded transcripts, and breaks streams on request."""
