"""Procedural chest-radiograph phantoms: a seeded generator of images, reports and exact annotations."""

from shards.sources.phantom.findings import FINDINGS
from shards.sources.phantom.source import PhantomSource

__all__ = ["FINDINGS", "PhantomSource"]
