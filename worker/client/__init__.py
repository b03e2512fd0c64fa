"""The Python client: enqueue jobs, follow their logs, cancel them. Nothing here imports the worker process."""
