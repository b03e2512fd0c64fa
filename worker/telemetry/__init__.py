"""What an operator sees of a running worker. Prompts and outputs are never part of it."""
