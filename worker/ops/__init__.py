"""Checks of an installation for operators: whether a worker can work there."""
