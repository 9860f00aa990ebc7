"""Template (Author and Author, Conference 2020): what it is in one line. Below, the few names a user imports."""

from .model import Network

__all__ = ["Network"]
