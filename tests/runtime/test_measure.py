from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memopt.errors import MemoptError
from memopt.runtime.measure import measure, measure_step, training_step
from memopt.runtime.phases import phase
from memopt.runtime.resident import distinct_bytes, resident_tensors

KB = 1024


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_resident_bytes_count_once_through_views() -> None:
    held = block(4 * KB)

    def step() -> None:
        first = block(KB)
        second = block(2 * KB)
        del first
        third = block(3 * KB)
        del second, third

    assert measure(step, resident=(held, held[1:], held.view(4, KB))).peak_bytes == (4 + 2 + 3) * KB


def test_what_the_warm_up_keeps_counts() -> None:
    state: list[Tensor] = []

    def step() -> None:
        if not state:
            state.append(block(8 * KB))
        block(KB)

    assert measure(step, warmup=1).peak_bytes == 9 * KB
    assert measure(step, warmup=1).peak_bytes == KB  # now it was there before, and nobody said so
    assert measure(step, warmup=1, resident=state).peak_bytes == 9 * KB


def test_phases_have_their_own_peaks() -> None:
    def step() -> None:
        with phase("forward"):
            kept = block(2 * KB)
            block(KB)
        with phase("backward"):
            block(5 * KB)
        with phase("backward"):
            block(KB)
        del kept

    held = block(KB)
    measured = measure(step, resident=(held,))
    assert measured.phases == {"forward": 4 * KB, "backward": 8 * KB}
    assert measured.peak_bytes == 8 * KB
    assert measured.seconds > 0


def test_repeats_run_the_step_without_a_profiler() -> None:
    seen: list[bool] = []
    measure(lambda: seen.append(torch.autograd._profiler_enabled()), warmup=2, repeats=3)
    assert seen == [True] * 3 + [False] * 3


def test_a_resident_tensor_freed_inside_is_refused() -> None:
    held = [block(KB)]
    with pytest.raises(MemoptError, match="1 resident tensors were freed"):
        measure(lambda: held.clear(), resident=(tensor for tensor in held))


def test_a_training_step_derived_by_hand() -> None:
    """y = x w; loss = y.sum(): w (a, b), x (n, a), y (n, b), all fp32; SGD without momentum."""
    n, a, b = 64, 128, 256
    w, x = nn.Parameter(torch.zeros(a, b)), torch.ones(n, a)
    optimizer = torch.optim.SGD([w], lr=0.1, foreach=False)
    measured = measure_step(lambda: (x @ w).sum(), optimizer, resident=(x,))
    size_w, size_x, size_y = 4 * a * b, 4 * n * a, 4 * n * b
    resident = size_w + size_x
    assert measured.phases["forward"] == resident + size_y + 4  # y is freed at once: sum saves only its sizes
    # loss, its gradient, gradient of w; the gradient of y is the expanded scalar, copied dense for the product
    assert measured.phases["backward"] == resident + 4 + 4 + size_y + size_w
    assert measured.phases["optimizer"] == resident + 4 + size_w
    assert measured.peak_bytes == max(measured.phases.values())


def test_accumulated_gradients_are_held_through_the_later_forwards() -> None:
    w = nn.Parameter(torch.zeros(256, 256))
    x = torch.ones(1, 256)
    optimizer = torch.optim.SGD([w], lr=0.1, foreach=False)
    once = measure_step(lambda: (x @ w).sum(), optimizer, resident=(x,))
    twice = measure_step(lambda: (x @ w).sum(), optimizer, resident=(x,), accumulate=2)
    size = 256 * 256 * 4
    assert twice.phases["forward"] - once.phases["forward"] == size + 4  # and the loss of the first forward
    assert twice.phases["backward"] - once.phases["backward"] == size


def test_resident_tensors_finds_parameters_buffers_gradients_and_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    found = resident_tensors(model, optimizer, {"x": [torch.zeros(2)]})
    parameters = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    steps = 4 * len(list(model.parameters()))
    assert distinct_bytes(found) == 4 * parameters + buffers + steps + 8


def test_an_adam_step_counts_its_state() -> None:
    model = nn.Linear(256, 256, bias=False)
    x = torch.randn(1, 256)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    measured = measure_step(lambda: model(x).sum(), optimizer, resident=(model, x))
    size = 256 * 256 * 4
    assert measured.phases["optimizer"] >= 5 * size  # parameter, gradient, two moments, one temporary at least
    assert measured.phases["forward"] < 4 * size


def test_training_step_without_an_optimizer_keeps_the_gradients() -> None:
    w = nn.Parameter(torch.zeros(4))
    training_step(lambda: (w * 2).sum(), None)()
    assert w.grad is not None
    assert w.grad.tolist() == [2.0] * 4
