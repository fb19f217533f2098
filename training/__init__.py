"""One component of a run a file."""
