"""The worker process: it takes jobs, runs them, renews their leases and ends them."""
