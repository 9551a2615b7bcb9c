"""Trained weights in bytes: exact with their exponents coded, or by consent in 8 bits rounded stochastically.

As with frozen weights (memopt/weights.py) each use reads the matrix anew of its bytes, an operation of the step that
the plan may repeat rather than hold what it made. Its gradient goes to the parameter, which stays the object the
optimizer holds and takes no memory (memopt/optim/coded.py); the update reads its values, and writes them back. So
NeuZip (Hao et al., arXiv:2410.20650) and the weights of Q-GaLore (Zhang et al., arXiv:2407.08296) are forms of a
weight, for any optimizer that updates each parameter by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from memopt.capture import fake_tensor
from memopt.kernels import exponents
from memopt.kernels.codec import chunks
from memopt.kernels.pages import READ_PAGES, nbytes
from memopt.local import apart
from memopt.optim.coded import EXACT, LOADED, MARK, Coded, coded_of, decode, encode, page_of, stand_in
from memopt.optim.lomo import Lomo
from memopt.optim.portions import separate
from memopt.optim.sharded import Sharded
from memopt.optim.stepper import Stepper, watched
from memopt.weights import LEAST, NAME, STORED, PackedWeights, matrices, own_class, shared_copy

CODECS = ("exponents", "int8")
ROUNDED = "trained_int8"  # among the ways to store weights (memopt/weights.py)
LOADING = "_memopt_loading"
SAVED = "_memopt_saved"  # of a parameter: bytes from a checkpoint that nobody has taken yet
BYTES = "memopt_bytes"  # of an optimizer's checkpoint: by the parameter's number


class CodedWeight(nn.Module):
    """How a weight is read of its bytes."""

    packed: Tensor

    def __init__(self, codec: str, page: int, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.codec, self.page, self.dtype = codec, page, dtype
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, p: Tensor) -> Tensor:
        """The weight, a new tensor each time."""
        made: Tensor = READ_PAGES(p, self.packed, self.codec, self.page)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> CodedWeight:
        """Raises RuntimeError where the model is to be of another type or on another device."""
        here = torch.empty(0, dtype=self.dtype, device=self.packed.device)
        if (moved := fn(here)).device != here.device or moved.dtype != here.dtype:
            raise RuntimeError(
                "trained weights that are stored in bytes cannot be moved or converted: call "
                "memopt.coded.decode_weights(model), then this again"
            )
        return cast(CodedWeight, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{self.codec}, {self.packed.numel()} bytes"


def codable(model: nn.Module, optimizer: Optimizer | None) -> dict[str, nn.Module]:
    """Owners of the weights that can be, by the weights' names: trained matrices of one layer each that this optimizer
    updates by themselves, and nobody else waits for; as of frozen ones not embeddings, nor output heads."""
    hooked = isinstance(optimizer, Lomo) and optimizer.in_backward
    if optimizer is None or isinstance(optimizer, Sharded) or hooked or not separate(optimizer):
        return {}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = held - {id(p) for p in model.parameters() if not p.requires_grad or watched(p) or apart(p)}
    return matrices(model, lambda weight: id(weight) in wanted)


def takes(codec: str, weight: Tensor, page: int) -> bool:
    """Whether the codec takes this weight, by its type and, unless it is fake, its values."""
    if codec != EXACT:
        return True
    if isinstance(weight, FakeTensor) or weight.is_meta:
        return weight.dtype in exponents.WORDS
    values = weight.detach().reshape(-1)
    return all(exponents.suits(values[part]) for part in chunks(len(values), page))


def coded_bytes(codec: str, weight: Tensor, kind: str) -> int:
    """Bytes of this weight on this kind of device."""
    return nbytes(codec, weight.numel(), weight.itemsize, page_of(kind))


def store_weights(
    model: nn.Module, optimizer: Optimizer, codec: str = EXACT, names: Collection[str] | None = None
) -> PackedWeights:
    """Store the model's trained weights in bytes, in place, and have the optimizer update them there, without a plan.

    codec: "exponents" (12.1 bits an element of bf16, 28.1 of fp32, exact) or "int8" (8.25). names: of which ones, among
    those of `codable`; None: all that the codec takes. Keys and values of `state_dict` stay those of the plain model. A
    layer's `weight` is then a new tensor each time it is read, and what is written into it is lost; the parameter that
    the optimizer holds has a gradient, and NaN for values. Checkpoints are loaded afterwards, so that of weights in 8
    bits the very bytes come back, which the optimizer's `state_dict` has. An optimizer that is made later finds a
    layer's weight behind its bias.
    Raises ValueError, nothing changed, for an unknown codec, where nothing can be stored so, for weights that are not
    finite, and for a model that memopt.compile has, whose plan decides.
    """
    if hasattr(model, "memopt"):
        raise ValueError(
            'memopt.compile has planned this model: store its weights before, or by allow=("coded_trained",) there'
        )
    done = code_weights(model, optimizer, codec, names, next(model.parameters()).device.type)
    Stepper(optimizer).install()
    return done


@torch.no_grad()
def code_weights(
    model: nn.Module, optimizer: Optimizer | None, codec: str, names: Collection[str] | None, kind: str
) -> PackedWeights:
    """As `store_weights`, but that the optimizer is left as it is. kind: of the device that reads them."""
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r} is not known; known are {', '.join(CODECS)}")
    page, found = page_of(kind), codable(model, optimizer)
    if unknown := [name for name in names or () if name not in found]:
        raise ValueError(f"{unknown[0]!r} cannot be stored so; what can is {', '.join(found) or 'nothing'}")
    weights = {name: module.get_parameter(NAME) for name, module in found.items() if names is None or name in names}
    spread = [name for name, weight in weights.items() if not takes(codec, weight, page)]
    if names is not None and spread:
        raise ValueError(f"{spread[0]!r} cannot be stored as {codec}: its exponents are spread too far, or of no use")
    weights = {name: weight for name, weight in weights.items() if name not in spread}
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no trained weight to store in bytes: no matrix of {LEAST} elements or more "
            "that one layer has to itself and the optimizer updates by itself"
        )
    before, after = sum(weight.nbytes for weight in weights.values()), 0
    made = {name: _encoded(name, weight, codec, page) for name, weight in weights.items()}
    for name, weight in weights.items():
        _store(found[name], weight, Coded(made[name], codec, page))
        after += made[name].nbytes
    if codec != EXACT and optimizer is not None:
        with_bytes(optimizer)
    return PackedWeights(f"trained_{codec}", tuple(weights), before, after)


def coded_twin(
    model: nn.Module, optimizer: Optimizer | None, codec: str, names: Collection[str], kind: str
) -> tuple[nn.Module, PackedWeights]:
    """The model as `code_weights` would leave it, for planning: a copy whose weights in bytes are fake, and that shares
    every other tensor with it."""
    twin, mode = shared_copy(model)
    owners, page, before, after = codable(model, optimizer), page_of(kind), 0, 0
    for name in names:
        weight = owners[name].get_parameter(NAME)
        module = twin.get_submodule(name.rpartition(".")[0])
        with mode:
            packed = torch.empty(coded_bytes(codec, weight, kind), dtype=torch.uint8, device=weight.device)
        fake = nn.Parameter(fake_tensor(stand_in(weight.detach(), weight.shape), mode))
        module._parameters[NAME] = fake
        _read_by(module, CodedWeight(codec, page, packed, weight.dtype))
        setattr(fake, MARK, Coded(packed, codec, page, of=weight))
        before, after = before + weight.nbytes, after + packed.nbytes
    return twin, PackedWeights(f"trained_{codec}", tuple(names), before, after)


@torch.no_grad()
def decode_weights(model: nn.Module) -> tuple[str, ...]:
    """Give weights that are in bytes their values back. Their names are returned. A plan that counts on bytes does not
    hold any more: the next step is planned anew, which is refused if it does not fit."""
    found = {f"{name}.{NAME}" if name else NAME: module for name, module in model.named_modules() if coded(module)}
    for module in found.values():
        p = _home(module).get_parameter(STORED)
        if coded_of(p) is not None:
            decode(p)
        own_class(module)
        parametrize.remove_parametrizations(module, NAME, leave_parametrized=False)
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in HOOKS:
                    del hooks[key]
    return tuple(found)


def coded(module: nn.Module) -> bool:
    """Whether this layer's weight is read of bytes that are trained."""
    return parametrize.is_parametrized(module, NAME) and isinstance(_home(module)[0], CodedWeight)


def _encoded(name: str, weight: Tensor, codec: str, page: int) -> Tensor:
    packed = weight.new_empty(nbytes(codec, weight.numel(), weight.itemsize, page), dtype=torch.uint8)
    if codec != EXACT and not finite(weight):
        raise ValueError(f"{name} is not finite, so it cannot be stored in 8 bits; nothing was changed")
    values = Coded(packed, codec, page)
    if not _as_saved(weight, weight, values):
        values.write(weight, None, weight, new=True)
    return packed


def finite(weight: Tensor) -> bool:
    """Whether all of it is."""
    return bool(torch.isfinite(weight.sum(dtype=torch.float64)))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a type are equal, signs of zeros included."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))


def _store(module: nn.Module, p: nn.Parameter, values: Coded) -> None:
    _read_by(module, CodedWeight(values.codec, values.page, values.packed, p.dtype))
    encode(p, values)
    module._register_state_dict_hook(_plain_keys)
    module._register_load_state_dict_pre_hook(_bytes_of, with_module=True)
    module.register_load_state_dict_post_hook(_loaded)


def _read_by(module: nn.Module, reader: CodedWeight) -> None:
    parametrize.register_parametrization(module, NAME, reader, unsafe=True)


def _home(module: nn.Module) -> parametrize.ParametrizationList:
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[NAME])


def _reader(module: nn.Module) -> CodedWeight:
    return cast(CodedWeight, _home(module)[0])


# -- state dicts: the plain model's keys, with values --------------------------------------------------------------


def _key(prefix: str) -> str:
    return f"{prefix}parametrizations.{NAME}.{STORED}"


@torch.no_grad()
def _plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The weight as it is read in place of the parameter, in front of the bias as before."""
    if state.pop(_key(prefix), None) is not None:
        state[f"{prefix}{NAME}"] = _reader(module)(_home(module).get_parameter(STORED).detach())
        for name in module._parameters:
            if f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = state.pop(f"{prefix}{name}")


@torch.no_grad()
def _bytes_of(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A weight that is loaded goes into the bytes, which stay those that are there if they stand for it."""
    p = _home(module).get_parameter(STORED)
    value, values = state.pop(f"{prefix}{NAME}", None), coded_of(p)
    loading = module.__dict__[LOADING] = {_key(prefix): f"{prefix}{NAME}"}  # what torch will miss, and what to say
    if value is None:
        return
    if values is None or not isinstance(value, Tensor) or value.shape != p.shape:
        state[_key(prefix)] = value  # torch loads it, or says what is wrong
        return
    value = value.to(device=p.device, dtype=p.dtype)
    if not same_bits(value, values.read(p, None)) and not _as_saved(p, value, values):
        if takes(values.codec, value, values.page) and (values.codec == EXACT or finite(value)):
            values.write(p, None, value, new=True)
            if values.codec != EXACT:
                setattr(p, LOADED, digest(value))
        else:
            decode(p, value.clone())
    loading[_key(prefix)] = ""


def _loaded(module: nn.Module, keys: Any) -> None:
    """torch misses what went into the bytes; of what was not there it is to miss the plain name."""
    told = module.__dict__.pop(LOADING, {})
    keys.missing_keys[:] = filter(None, (told.get(key, key) for key in keys.missing_keys))


# -- checkpoints of the optimizer: the very bytes of rounded weights, which their values do not give again -------------


def with_bytes(optimizer: Optimizer) -> None:
    """Have its `state_dict` carry them beside what torch reads, so that a run goes on bit for bit. Other optimizers
    pass over them. They are taken once the weight is what they stand for, whichever is loaded first: bytes of another
    checkpoint than the model's are not."""
    if any(hook is _saved for hook in optimizer._optimizer_state_dict_post_hooks.values()):
        return
    given: list[dict[int, Tensor]] = []

    def keep(_: Optimizer, state: dict[str, Any]) -> None:
        given[:] = [state.get(BYTES, {})]

    def put(_: Optimizer) -> None:
        for at, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if (saved := given[0].get(at)) is not None:
                setattr(p, SAVED, saved)
                if (values := coded_of(p)) is not None:
                    _as_saved(p, values.read(p, None), values)  # or what was loaded, and rounded

    optimizer.register_state_dict_post_hook(_saved)
    optimizer.register_load_state_dict_pre_hook(keep)
    optimizer.register_load_state_dict_post_hook(put)


def _saved(optimizer: Optimizer, state: dict[str, Any]) -> None:
    every = enumerate(coded_of(p) for group in optimizer.param_groups for p in group["params"])
    state[BYTES] = {at: values.packed for at, values in every if values is not None and values.codec != EXACT}


@torch.no_grad()
def _as_saved(p: Tensor, value: Tensor, values: Coded) -> bool:
    """Take the bytes that a checkpoint had of this parameter, if they stand for this value."""
    saved = getattr(p, SAVED, None)
    if saved is None or values.codec == EXACT or saved.shape != values.packed.shape:
        return False
    saved = saved.to(values.packed.device)
    stood = replace(values, packed=saved).read(p, None)
    if not same_bits(stood, value.view(p.shape)) and digest(stood) != getattr(p, LOADED, None):
        return False
    values.packed.copy_(saved)
    delattr(p, SAVED)
    return True


def digest(value: Tensor) -> bytes:
    """Of its bits."""
    words = value.detach().contiguous().view(torch.uint8).cpu()
    return hashlib.blake2b(words.numpy().data, digest_size=16).digest()


HOOKS = (_plain_keys, _bytes_of, _loaded)
