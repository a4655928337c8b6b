"""Training queries: from the user, from the documents alone, or from a language model."""
