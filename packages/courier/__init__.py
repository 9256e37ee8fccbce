"""Courier for Pythons and machines that Launchpad has no wheel for: the same classes, in Python.

Launchpad's wheels bring a Courier of their own, in C++ on gRPC; where they fit, this package is not
installed. The differences:

- Messages are msgpack (`messages.py`): nothing that is received can run code.
- A server may listen on a Unix socket, `Server(path=...)`, for its own user alone. On a port it
  listens for this machine alone.
- Batched handlers and health checks do not exist.
"""

from .client import Client, list_methods
from .errors import StatusCode, StatusNotOk
from .server import Server

__all__ = ['Client', 'Server', 'StatusCode', 'StatusNotOk', 'list_methods']
