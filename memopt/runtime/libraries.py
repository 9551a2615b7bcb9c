"""Memory that libraries take from torch's allocator at their first call and never give back: part of every step."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

SIDE = 64  # of the matrices multiplied to find out


def kept_by_libraries(where: torch.device) -> int:
    """Bytes of cuBLAS's workspaces, once the forward's thread and autograd's have multiplied; 0 on the CPU.

    One a thread and stream: 32 MiB on Hopper, 8.1 MiB before, unless CUBLAS_WORKSPACE_CONFIG says otherwise
    (aten/src/ATen/cuda/CublasHandlePool.cpp). Found out by doing it, as versions of torch differ.
    """
    if where.type != "cuda":
        return 0
    with unset_fake_temporarily(), torch.enable_grad():
        left = torch.ones(SIDE, SIDE, device=where, requires_grad=True)
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated(where)
        (left @ left).sum().backward()
        left.grad = None
        torch.cuda.synchronize(where)
        return torch.cuda.memory_allocated(where) - before
