"""Telemetry of a running worker: events, metrics, logs, and whether the process is alive. It never holds a prompt."""
