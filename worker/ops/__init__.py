"""What an operator asks of an installation: whether it would work."""
