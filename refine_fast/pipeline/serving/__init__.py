"""The retrieval system at the end of a run: its index, its search, its page."""
