"""What stands for a value that lies elsewhere: a tensor of 16 bytes, whose death frees the place."""

from __future__ import annotations

from memopt.edit import DISK, HOST

TOKEN = 16  # bytes


def token_bytes(count: int) -> int:
    """Bytes a value of so many elements is packed into."""
    return TOKEN


def elsewhere(codec: str) -> bool:
    """Whether the codec is a pool's, which copies and packs nothing."""
    return codec.startswith((f"{DISK}_", f"{HOST}_"))
