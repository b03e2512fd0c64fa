"""Chunks of a completion, as any OpenAI-compatible server sends them, into fields of log entries. No I/O."""
