"""Prototypes: learned ones, clusters of the prototype service, and k-means over all ranks."""
