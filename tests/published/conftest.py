"""A small phantom dataset."""

from tests.export.conftest import data as data
