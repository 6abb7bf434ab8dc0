"""Trunkline: factories train one shared backbone together and keep everything else at home."""

__version__ = "0.1.0"
