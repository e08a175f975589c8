"""Urza from elsewhere: a store over HTTP, a kernel source over it, and kernels kept on the local disk."""

from esper.services.urza_client.disk_cache import DiskCache
from esper.services.urza_client.source import RemoteKernelSource
from esper.services.urza_client.store import RemoteStore

__all__ = ["DiskCache", "RemoteKernelSource", "RemoteStore"]
