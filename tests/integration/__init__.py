"""Black-box tests: real processes, real clients that others wrote; nothing of the product is imported."""
