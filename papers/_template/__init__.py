"""The few names a user imports."""

from .model import Network

__all__ = ["Network"]
