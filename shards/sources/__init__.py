"""Where studies come from: one file (or package) for each source, found by the registry."""
