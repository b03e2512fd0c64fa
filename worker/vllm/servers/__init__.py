"""The vLLM servers of a worker: what each serves, which one gets a request, probes and circuits."""
