"""Loading an encoder, and texts to vectors."""
