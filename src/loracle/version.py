"""The version, importable by every room without a cycle."""

__version__ = "0.1.0"
