"""Report text: sections and sentences. Pure functions of strings."""
