"""What stands for a value that lies elsewhere: a tensor of 16 bytes, whose death frees the place.

Where only a part of the value does, its first quarters, the rest of it stands behind the 16 bytes: memory of its own,
so that the value itself may be let go.
"""

from __future__ import annotations

from memopt.edit import DISK, HOST, TOKEN

WHOLE = 4  # quarters


def moved(count: int, quarters: int) -> int:
    """Elements that lie elsewhere, the first ones, of so many."""
    return count * quarters // WHOLE


def staying_bytes(count: int, itemsize: int, quarters: int) -> int:
    """Bytes of those that stay behind the token."""
    return (count - moved(count, quarters)) * itemsize


def token_bytes(count: int) -> int:
    """Bytes a value of so many elements is packed into."""
    return TOKEN


def part_codec(pool: str, quarters: int) -> str:
    """The codec of a part in this pool, by the codec of whole values."""
    kind, _, number = pool.partition("_")
    return pool if quarters == WHOLE else f"{kind}{quarters}of{WHOLE}_{number}"


def part_of(codec: str) -> tuple[str, int]:
    """The pool's codec of whole values, and the quarters that this one moves."""
    label, _, number = codec.partition("_")
    kind = DISK if label.startswith(DISK) else HOST
    quarters = label.removeprefix(kind).partition("of")[0]
    return f"{kind}_{number}", int(quarters or WHOLE)


def elsewhere(codec: str) -> bool:
    """Whether the codec is a pool's, which copies and packs nothing."""
    return codec.startswith((DISK, HOST))
