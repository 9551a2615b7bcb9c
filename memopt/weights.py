"""Frozen weights in fewer bits, or on disk or in host memory, read where they are used: exact, or lossy by consent.

A frozen matrix becomes bytes, from which each use makes the matrix anew (`torch.nn.utils.parametrize`). That is an
operation of the step like any other: the planner sees its bytes and seconds, and rather than hold what it made for the
backward it can make it again. So QLoRA (Dettmers et al., arXiv:2305.14314) is a model whose frozen weights are packed,
adapters on top, and a plan; with the bytes a token of what lies elsewhere (memopt/tokens.py), it is a model whose
frozen weights are streamed. Gradients are those of the model with the matrices as they are read, exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize

from memopt.capture import fake_tensor, mode_of
from memopt.kernels import exponents, nf4, quantise  # noqa: F401  # their operations
from memopt.operations import overload
from memopt.tokens import elsewhere

# By consent, as what is written into a packed weight is lost; tried in this order, the least loss first.
WEIGHTS = {"coded_weights": "exponents", "int8_weights": "int8", "nf4_weights": "nf4"}
CODECS = tuple(WEIGHTS.values())
CODED = "exponents"  # the exact one of them
TRAINED = {"coded_trained": "trained_exponents", "int8_trained": "trained_int8"}  # of trained ones: memopt/coded.py
ELSEWHERE = ("weights_on_host", "weights_on_disk")  # exact: they lie there, and each use copies them back
LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)  # whose rows are read, not their matrix
LEAST = 4096  # elements below which packing saves nothing worth an operation
NAME, STORED = "weight", "original"  # the second is parametrize's name


def ways(disk: tuple[int, str], host: tuple[int, str], off: Collection[str]) -> tuple[tuple[str, str], ...]:
    """(name, codec) of the ways to store weights that are permitted, in the order to try them: exact ones first.

    disk, host: bytes that may lie there, 0 for none, and the pool's codec. off: names that are not.
    """
    pools = zip(ELSEWHERE, (host, disk), strict=True)
    every = (*WEIGHTS.items(), *TRAINED.items(), *((name, codec) for name, (limit, codec) in pools if limit))
    every = tuple(sorted(every, key=lambda way: not exact(way[1])))
    return tuple(way for way in every if way[0] not in off)


@dataclass(frozen=True)
class PackedWeights:
    """What was packed. names: of the weights; before, after: bytes of all of them."""

    codec: str
    names: tuple[str, ...]
    before: int
    after: int


class Packed(nn.Module):
    """How a weight is read: of its bytes, which are its owner's buffer. kept: what stands for a weight that lies
    elsewhere, whose death frees the place: held also when the owner was moved, which replaces its buffers."""

    def __init__(self, codec: str, weight: Tensor) -> None:
        super().__init__()
        self.codec, self.size, self.strides, self.dtype = codec, tuple(weight.shape), weight.stride(), weight.dtype
        self.kept: Tensor | None = None

    def forward(self, packed: Tensor) -> Tensor:
        """The weight, a new tensor each time."""
        return self.unpack(packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """The owner is converted, as by `.half()`: so is what is read."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return cast(Packed, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def pack(self, weight: Tensor) -> Tensor:
        """Its bytes."""
        made: Tensor = overload(f"memopt.pack_{self.codec}.default")(weight.detach(), self.strides)
        self.kept = made if elsewhere(self.codec) else None
        return made

    def unpack(self, packed: Tensor) -> Tensor:
        made: Tensor = overload(f"memopt.unpack_{self.codec}.default")(packed, self.size, self.strides, self.dtype)
        return made

    def extra_repr(self) -> str:
        return f"{self.codec}, {str(self.dtype)[6:]}{list(self.size)}"


def exact(codec: str) -> bool:
    """Whether weights are read as they were."""
    return codec in (CODED, TRAINED["coded_trained"]) or elsewhere(codec)


def takes(codec: str, weight: Tensor) -> bool:
    """Whether the codec packs this weight, by its type and, unless it is fake, its values."""
    if codec != CODED:
        return True
    fake = isinstance(weight, FakeTensor) or weight.is_meta
    return weight.dtype in exponents.WORDS if fake else exponents.suits(weight)


def packable(model: nn.Module) -> dict[str, nn.Module]:
    """Owners of the weights that can be packed, by the weights' names: the frozen ones of `matrices`."""
    return matrices(model, lambda weight: not weight.requires_grad)


def matrices(model: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> dict[str, nn.Module]:
    """Owners of the weights that may be read anew for each use, by the weights' names: matrices of one layer each, but
    for embeddings, whose rows are looked up, and output heads, whose loss reads them in parts."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    heads = {id(head) for head in _heads(model)}
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get(NAME)
        if weight is None or not wanted(weight) or owners[id(weight)] > 1 or weight.dim() != 2:
            continue
        if isinstance(module, LOOKED_UP) or id(module) in heads or parametrize.is_parametrized(module):
            continue
        if weight.is_floating_point() and weight.numel() >= LEAST and weight.is_contiguous():
            found[f"{name}.{NAME}" if name else NAME] = module
    return found


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Output layers, of models that name theirs as transformers' do."""
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            yield head


@torch.no_grad()
def pack_weights(model: nn.Module, codec: str = "nf4", names: Collection[str] | None = None) -> PackedWeights:
    """Pack the model's frozen weights in place. codec: "nf4" (4.13 bits an element), "int8" (8.25) or "exponents" (12.1
    of bf16 and 28.1 of fp32, exact). names: of which ones, among those of `packable`; None: all that the codec takes.

    Keys and values of `state_dict` stay those of the plain model, with the weights as they are read; loading weights
    packs them, and loading what is there already changes no bit. A layer's `weight` is then a new tensor each time it
    is read: what is written into it is lost, so adapters are merged after `unpack_weights`. What a weight was packed
    into is held beside it until all are packed: if that fails, the model is as it was.
    Raises ValueError, nothing packed, for an unknown codec, where nothing can be packed, and for weights that are to be
    in fewer bits and are not finite.
    """
    if codec not in CODECS and not elsewhere(codec):
        raise ValueError(f"codec={codec!r} is not known; known are {', '.join(CODECS)}")
    found = packable(model)
    if unknown := [name for name in names or () if name not in found]:
        raise ValueError(f"{unknown[0]!r} cannot be packed; what can is {', '.join(found) or 'nothing'}")
    found = {name: module for name, module in found.items() if names is None or name in names}
    spread = [name for name, module in found.items() if not takes(codec, module.get_parameter(NAME))]
    if names is not None and spread:
        raise ValueError(f"{spread[0]!r} cannot be packed as {codec}: its exponents are spread too far, or of no use")
    found = {name: module for name, module in found.items() if name not in spread}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no weight to pack: no frozen matrix of {LEAST} elements or more that one "
            "layer has to itself; freeze what is not trained by requires_grad_(False)"
        )
    if not exact(codec):
        _refuse_infinite(found)
    weights = {name: module.get_parameter(NAME) for name, module in found.items()}
    readers = {name: Packed(codec, weight) for name, weight in weights.items()}
    made = {name: readers[name].pack(weight) for name, weight in weights.items()}
    for name, module in found.items():
        _pack(module, readers[name], made[name])
    before, after = (sum(tensor.nbytes for tensor in held.values()) for held in (weights, made))
    return PackedWeights(codec, tuple(found), before, after)


def packed_twin(model: nn.Module, codec: str, names: Collection[str] | None = None) -> tuple[nn.Module, PackedWeights]:
    """The model as `pack_weights` would leave it, for planning: a copy whose packed weights are fake, and that shares
    every other tensor with it."""
    twin, mode = shared_copy(model)
    for name, module in packable(twin).items():
        if names is None or name in names:
            weight = fake_tensor(twin.get_parameter(name).detach(), mode)
            module._parameters[NAME] = nn.Parameter(weight, requires_grad=False)
    return twin, pack_weights(twin, codec, names)


def shared_copy(model: nn.Module) -> tuple[nn.Module, FakeTensorMode]:
    """A copy that shares every tensor with the model, and a mode to make fakes in for it."""
    mode = mode_of(model) or FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared), mode


def _refuse_infinite(found: dict[str, nn.Module]) -> None:
    for name, module in found.items():
        weight = module.get_parameter(NAME)
        if not isinstance(weight, FakeTensor) and not bool(torch.isfinite(weight.sum(dtype=torch.float64))):
            raise ValueError(f"{name} is not finite, so it cannot be packed; nothing was changed")


def _pack(module: nn.Module, reader: Packed, made: Tensor) -> None:
    parametrize.register_parametrization(module, NAME, reader, unsafe=True)
    home = _home(module)
    del home._parameters[STORED]  # the weight itself
    home.register_buffer(STORED, made)
    module._register_state_dict_hook(_plain_keys)
    module._register_load_state_dict_pre_hook(_packed_keys, with_module=True)


def unpack_weights(model: nn.Module) -> tuple[str, ...]:
    """Make packed weights frozen parameters again, of the values that are read. Their names are returned."""
    found = {f"{name}.{NAME}" if name else NAME: module for name, module in model.named_modules() if packed(module)}
    for module in found.values():
        _unpack(module)
    return tuple(found)


def _unpack(module: nn.Module) -> None:
    weight = _weight_of(module)
    own_class(module)
    parametrize.remove_parametrizations(module, NAME, leave_parametrized=False)
    del module._buffers[NAME]  # the bytes
    setattr(module, NAME, nn.Parameter(weight, requires_grad=False))
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_plain_keys, _packed_keys):
                del hooks[key]


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: a deep copy shares the one that is taken apart."""
    mixed = type(module)
    own = {name: value for name, value in vars(mixed).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(mixed.__name__, mixed.__bases__, own)


def packed(module: nn.Module) -> bool:
    """Whether this layer's weight is packed."""
    return parametrize.is_parametrized(module, NAME) and isinstance(_reader(module), Packed)


def _home(module: nn.Module) -> parametrize.ParametrizationList:
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[NAME])


def _reader(module: nn.Module) -> Any:
    return _home(module)[0]


def _bytes_of(module: nn.Module) -> Tensor:
    return _home(module).get_buffer(STORED)


def _weight_of(module: nn.Module) -> Tensor:
    made: Tensor = _reader(module).unpack(_bytes_of(module).detach())
    return made


def _key(prefix: str) -> str:
    return f"{prefix}parametrizations.{NAME}.{STORED}"


def _plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The weight as it is read in place of its bytes."""
    if state.pop(_key(prefix), None) is not None:
        state[f"{prefix}{NAME}"] = _weight_of(module)


@torch.no_grad()
def _packed_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Bytes in place of the weight: those that are there if they stand for it, which packing it again might change."""
    weight = state.pop(f"{prefix}{NAME}", None)
    reader, here = _reader(module), _bytes_of(module)
    if isinstance(weight, Tensor) and tuple(weight.shape) == reader.size:
        weight = weight.to(device=here.device, dtype=reader.dtype)
        if not torch.equal(weight, reader.unpack(here)):
            _home(module).register_buffer(STORED, reader.pack(weight))
        state[_key(prefix)] = _bytes_of(module)
    elif weight is not None:
        state[f"{prefix}{NAME}"] = weight  # unexpected as it is, and said so by torch
