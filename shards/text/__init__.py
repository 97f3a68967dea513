"""Report text: sections, sentences, cleaning. Pure functions of strings."""
