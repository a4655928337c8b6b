"""Metrics, BM25 and intervals."""
