"""The token stream of one answer: server-sent events, and time limits on silence."""
