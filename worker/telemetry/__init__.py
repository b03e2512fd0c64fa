"""Telemetry of a running worker: events, and their two receivers, metrics and logs. It never holds a prompt."""
