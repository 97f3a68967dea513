"""Entities: what a report says is present or absent, and where, in the words of two fixed vocabularies."""
