"""The n* that were found, kept."""

from __future__ import annotations


class NegativeCache:
    """DNS images and their captions, by everything that they depend on.

    Attributes:
        hits, misses: how often one was there, and was not.
    """

    def __init__(self, entries: int = 256) -> None:
        self.hits = self.misses = 0
