"""Converts the chunks of a completion from any OpenAI-compatible server into fields of log entries. No I/O."""
