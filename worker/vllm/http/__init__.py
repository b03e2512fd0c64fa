"""HTTP/1.1 to vLLM servers: connections, the framing of responses, the targets of requests and their API keys."""
