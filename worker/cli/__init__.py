"""The command line `worker`: a module for each group of commands."""
