"""Memory and time of a run before it is run: the real step, traced without weights or a GPU."""
