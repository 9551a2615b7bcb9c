"""`collected_later`: a stretch of work that makes many objects, nearly all of which stay, without Python's collector of
cyclic garbage, which finds little in it. In capture and planning it took a tenth of the processor time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_later() -> Iterator[None]:
    """No collection of cyclic garbage inside; afterwards the collector is as it was. Of the process, so of all threads.

    Capturing and planning keep a graph of some hundred thousand objects: each full collection walks them all.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
