"""The wire contract, which other services code against: keys, ids, jobs and entries. Pure data, no I/O."""
