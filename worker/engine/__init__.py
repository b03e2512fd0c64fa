"""The worker process: it takes jobs, runs them, keeps their leases and ends them."""
