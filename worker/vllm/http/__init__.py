"""HTTP/1.1 to vLLM servers: connections, framing of answers, where requests go and the keys they carry."""
