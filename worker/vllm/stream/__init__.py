"""The token stream of one answer: server-sent events and the limits on silence."""
