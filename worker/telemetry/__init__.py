"""What an operator sees of a running worker: events, and their two receivers, metrics and logs. Never a prompt."""
