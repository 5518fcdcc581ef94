"""Values and rules of the problem itself. No I/O, and nothing of ours is imported but the errors."""
