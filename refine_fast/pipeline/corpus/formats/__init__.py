"""File formats: one module for each, and ``files`` that chooses among them."""
