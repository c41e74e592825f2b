"""The store on SSD: open, read, verify, describe. Knows no conversion and no cache."""

from m2jax.store.arrays import ChunkStore, TensorStoreChunks
from m2jax.store.direct import DirectChunks, choose_chunks, raw_rate
from m2jax.store.info import store_info
from m2jax.store.reader import Store, open_store
from m2jax.store.slow import SlowChunks, emulated_rate
from m2jax.store.verify import verify_store

__all__ = [
    "ChunkStore",
    "DirectChunks",
    "SlowChunks",
    "Store",
    "TensorStoreChunks",
    "choose_chunks",
    "emulated_rate",
    "open_store",
    "raw_rate",
    "store_info",
    "verify_store",
]
