"""One encoder without a loss."""
