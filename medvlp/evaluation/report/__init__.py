"""Results on disk and on paper: evaluation.json, its parts put together, and tables."""
