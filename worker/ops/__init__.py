"""What an operator checks in an installation: whether a worker could work there."""
