"""Going on mid-stream with an answer that broke off: the plan, the requests, the stop strings."""
