"""Urza from elsewhere: an HTTP client, a store and a kernel source over it, and kernels kept on the local disk."""

from esper.services.urza_client.client import UrzaClient
from esper.services.urza_client.disk_cache import DiskCache
from esper.services.urza_client.remote_store import RemoteStore
from esper.services.urza_client.source import RemoteKernelSource

__all__ = ["DiskCache", "RemoteKernelSource", "RemoteStore", "UrzaClient"]
