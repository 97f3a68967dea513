"""Measures, each a function of numpy arrays; nothing here knows a task, a network or a file."""
