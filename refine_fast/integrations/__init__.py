"""Drop-ins for sentence-transformers, and approximate mining with faiss."""
