"""What the command line offers besides a run."""
