"""Corpora: tokens of documents on disk, sorted by suffix, so that what followed a phrase is found quickly."""
