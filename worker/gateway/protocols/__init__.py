"""The protocols in which the gateway streams a log. Each is a pure function from entries to bytes."""
