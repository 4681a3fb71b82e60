"""Pure decisions of the mirror: no I/O, no clock, no threads, no randomness."""
