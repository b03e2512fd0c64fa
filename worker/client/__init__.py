"""The Python client: enqueue jobs, follow their logs, cancel them. It does not import the worker process."""
