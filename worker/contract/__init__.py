"""What other services code against: keys, ids, jobs and entries. Pure data, no I/O, nothing of the worker's."""
