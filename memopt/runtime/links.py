"""Copies between a GPU and the host beside what computes: one stream each way, ordered against the computing stream.

A copy begins after all that the computing stream was given before it: what it reads is made by then, and the memory
it fills is no longer used by whoever had it earlier. Whoever waits has the computing stream wait and goes on at once:
memory that is let go after a wait is used again only by what runs after the copy. So nothing needs `record_stream`,
whose blocks come back late, as the device happens to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Flight:
    """A copy under way. event: of its end, None where it has ended already. kept: the value, for as long as a step that
    fails would otherwise let go of memory in use."""

    kept: Tensor | None
    device: torch.device
    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Have what the current stream is given from now on run after the copy."""
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)

    end = wait  # nothing fails on the way

    def settle(self) -> None:
        """Let go of the value if the copy has ended."""
        if self.event is None or self.event.query():
            self.kept = None


class Link:
    """One way between a device and the host. On a CPU a copy ends before it returns: there is nothing between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: Tensor, source: Tensor, value: Tensor) -> Flight:
        """Begin to copy. value: which of the two is the device's."""
        if self.stream is None:
            to.copy_(source)
            return Flight(value, self.device, None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        return Flight(value, self.device, self.stream.record_event())
