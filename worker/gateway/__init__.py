"""The HTTP gateway: requests from browsers and OpenAI clients go to the queue, and the logs go back as streams."""
