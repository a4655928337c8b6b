"""Documents, chunks and retrieval sets."""
