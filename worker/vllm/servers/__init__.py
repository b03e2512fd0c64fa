"""The vLLM servers of a worker: their models, the choice of a server for each request, probes and circuits."""
