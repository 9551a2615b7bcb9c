"""The ways to store weights otherwise, frozen ones (memopt/weights.py) or trained ones (memopt/coded.py), as one."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from memopt import coded, weights
from memopt.edit import HOST
from memopt.kernels.codec import PACKED_BYTES, relative_error
from memopt.optim.coded import page_of
from memopt.request import Request
from memopt.runtime.host import room
from memopt.tokens import elsewhere
from memopt.weights import TRAINED, PackedWeights, exact

PREFIX = "trained_"


def trained(codec: str) -> bool:
    """Whether it is one of weights that are trained."""
    return codec in TRAINED.values()


def storable(model: nn.Module, request: Request, codec: str) -> dict[str, Tensor]:
    """The weights that can be stored so, by name."""
    found = coded.codable(model, request.optimizer) if trained(codec) else weights.packable(model)
    return {name: model.get_parameter(name) for name in found}


def takes(codec: str, weight: Tensor, request: Request) -> bool:
    """Whether the codec takes this weight."""
    if trained(codec):
        return coded.takes(codec.removeprefix(PREFIX), weight, page_of(request.device.kind))
    return weights.takes(codec, weight)


def bytes_here(codec: str, weight: Tensor, request: Request) -> int:
    """Bytes of the weight on the device when it is stored so."""
    if trained(codec):
        return coded.coded_bytes(codec.removeprefix(PREFIX), weight, request.device.kind)
    return PACKED_BYTES[codec](weight.shape, weight.itemsize)


def bytes_there(codec: str, weight: Tensor) -> int:
    """Bytes a weight takes in this pool."""
    return room(weight.nbytes) if codec.startswith(HOST) else weight.nbytes


def twin_of(model: nn.Module, request: Request, codec: str, names: Collection[str]) -> tuple[nn.Module, PackedWeights]:
    """A copy of the model with these weights stored so, for planning; it shares all others."""
    if trained(codec):
        kind = request.device.kind
        return coded.coded_twin(model, request.optimizer, codec.removeprefix(PREFIX), names, kind)
    return weights.packed_twin(model, codec, names)


def store(model: nn.Module, request: Request, done: PackedWeights) -> None:
    """Store these weights so, in place."""
    if trained(done.codec):
        codec, kind = done.codec.removeprefix(PREFIX), request.device.kind
        coded.code_weights(model, request.optimizer, codec, done.names, kind)
    else:
        weights.pack_weights(model, done.codec, done.names)


def operation(codec: str) -> str:
    """The operation that reads a weight stored so, as steps spell it."""
    return "memopt.read_pages.default" if trained(codec) else f"memopt.unpack_{codec}.default"


def how(way: str, codec: str) -> str:
    """Which weights are stored where and in what, in words."""
    if elsewhere(codec):
        return f"frozen weights are stored {'in host memory' if codec.startswith(HOST) else 'on disk'} (exact)"
    kind, plain = ("trained", codec.removeprefix(PREFIX)) if trained(codec) else ("frozen", codec)
    if exact(codec):
        return f"{kind} weights are stored with their {plain} coded (exact, allowed as {way})"
    if trained(codec):
        return f"trained weights are stored in 8 bits, each update rounded stochastically (lossy, allowed as {way})"
    return f"frozen weights are stored in {codec} (lossy, allowed as {way}), each read {relative_error(codec):.1%} off"
