"""Any elementwise optimizer over several ranks, each of which holds and advances the state of its own stretch (ZeRO-1).

Every rank has all parameters and a batch of its own. A step averages each gradient over the ranks, each rank getting
its stretch of the average; updates that stretch of the parameter; and fetches the other stretches. Rajbhandari et al.,
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054: as many bytes are sent as by
data parallelism without shards. Updated in backward (`memopt.compile(..., update="backward")`) gradients are not kept
either (ZeRO-2, and beyond).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from memopt.errors import MemoptError
from memopt.optim import moments
from memopt.optim.adamw import AdamW
from memopt.optim.alone import BLOCKWISE
from memopt.optim.family import in_order, plain_step
from memopt.optim.ranks import Ranks, ranks_within


class Sharded(Optimizer):
    """`Sharded(model.parameters(), torch.optim.AdamW, lr=1e-3)` on every rank, in the place of the optimizer itself.

    kind: class of the optimizer; options: its own. group: a process group, the default one if left out; ranks: how many
    there would be, to plan without a process group. shards: ranks that share one copy of the state, a divisor of the
    ranks; left out, as many as a plan asks for, without one all. max_norm: clip the averaged gradient to this norm, as
    a step is the first to know it.

    All ranks must see gradients for the same parameters, and step, save and load together; after a step `.grad` is of
    no use. A rank that skips a step, as GradScaler may, leaves the others waiting. What the first rank's parameters
    hold is given to the others here. Raises ValueError for a class whose updates are not elementwise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        kind: type[Optimizer],
        *,
        group: Any = None,
        ranks: int | None = None,
        shards: int | None = None,
        max_norm: float | None = None,
        **options: Any,
    ) -> None:
        if kind not in BLOCKWISE:
            known = ", ".join(sorted({each.__name__ for each in BLOCKWISE}))
            raise ValueError(f"{getattr(kind, '__name__', kind)!r} cannot be sharded by element; can be: {known}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm!r} refused: it is the largest norm a gradient may have, above 0")
        self.kind = kind
        self.plain = kind(params, **options)
        super().__init__(self.plain.param_groups, self.plain.defaults)
        self.max_norm, self.imagined, self.shards = max_norm, ranks is not None, shards
        self.within, self.across = _ranks(group, ranks, shards)
        self.group = None if self.imagined else group or dist.group.WORLD
        for p in self._parameters() if not self.alone else ():
            dist.broadcast(p.detach(), group=self.group, group_src=0)

    @property
    def size(self) -> int:
        """Ranks that take part, of all shard groups."""
        return self.within.size * self.across.size

    @property
    def alone(self) -> bool:
        """Whether no other rank is there."""
        return self.imagined or self.size == 1

    def sharings(self) -> list[int]:
        """Ranks that may share one copy of the state, most first; what was asked for, or is in use, alone."""
        if self.shards is not None or self.state:
            return [self.within.size]
        return [count for count in range(self.size, 0, -1) if self.size % count == 0]

    def shared_by(self, count: int) -> Sharded:
        """This optimizer as the first rank has it, whose stretches are the longest, with the state shared by so many;
        it has none yet. For planning, which comes to the same on every rank."""
        double: Sharded = object.__new__(Sharded)
        vars(double).update({**vars(self), "state": defaultdict(dict), "shards": count})
        double.within, double.across = Ranks(count), Ranks(self.size // count)
        return double

    def share(self, count: int) -> None:
        """Have so many ranks share one copy of the state, from the first step on. Every rank must call it."""
        if count != self.within.size and not self.imagined:
            self.within, self.across = ranks_within(self.group, count)
        self.shards = count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each parameter that has a gradient, which is averaged first. Returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._check(p for p, _ in ready)
        for p, _ in ready if self.max_norm is not None else ():
            self.average(p)
        scale = self.clipping(p for p, _ in ready)
        for p, group in ready:
            if self.max_norm is None:
                self.average(p)
            self.advance(p, group, scale)
            self.within.gather(in_order(p.detach(), p))
        return loss

    def _check(self, params: Iterable[Tensor]) -> None:
        """Raise for what cannot be stepped: ranks that are not there, gradients without strides."""
        for p in params:
            if self.imagined and not isinstance(p, FakeTensor):
                raise MemoptError("Sharded(..., ranks=...) is for planning alone; to train, leave ranks= out")
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("Sharded takes no sparse gradients")

    def average(self, p: Tensor) -> None:
        """This rank's stretch of the gradient becomes the mean over all ranks, in place."""
        assert p.grad is not None
        if p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)
        values = in_order(p.grad, p)
        if self.size > 1:
            values.div_(self.size)
        self.within.reduce(values)
        self.across.total(values[self.own(p)])

    def own(self, p: Tensor) -> slice:
        """The elements of a parameter, in memory order, that this rank updates."""
        return self.within.own(p.numel())

    def clipping(self, params: Iterable[Tensor]) -> Tensor | None:
        """What to multiply gradients by, so that their norm over all parameters is at most `max_norm`, by the formula
        of torch.nn.utils.clip_grad_norm_; None: nothing."""
        if self.max_norm is None:
            return None
        squares = [in_order(p.grad, p)[self.own(p)].float().square().sum() for p in params if p.grad is not None]
        total = torch.stack(squares).sum().view(1) if squares else torch.zeros(1)
        self.within.total(total)
        return (self.max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)

    def advance(self, p: Tensor, group: Mapping[str, Any], scale: Tensor | None) -> None:
        """Update this rank's stretch of a parameter."""
        assert p.grad is not None
        mine = self.stretch(p)
        if not mine.numel():
            return
        mine.grad = in_order(p.grad, p)[self.own(p)]
        if scale is not None:
            mine.grad.mul_(scale)
        plain_step(self.over({mine: self.state[p]}, [self.group_of(p, group, mine)]))

    def stretch(self, p: Tensor) -> Tensor:
        """This rank's elements of a parameter, a flat view of them."""
        return in_order(p.detach(), p)[self.own(p)]

    def group_of(self, p: Tensor, group: Mapping[str, Any], mine: Tensor | int) -> dict[str, Any]:
        """The group of a stretch, stored as the whole parameter would be: in fp32 if that is small."""
        least = {"least": 0 if p.numel() >= group["least"] else p.numel() + 1} if "least" in group else {}
        return {**group, **least, "params": [mine]}

    def over(self, state: dict[Tensor, Any], groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer itself over stretches, whose state it shares."""
        double: Optimizer = object.__new__(self.kind)
        vars(double).update({**vars(self.plain), "state": state, "param_groups": groups})
        return double

    def traffic(self) -> int:
        """Bytes this rank sends in a step, by ring algorithms: (n - 1) / n of a tensor to reduce or gather it."""
        n, m, sent = self.within.size, self.across.size, 0.0
        for p in self._parameters():
            whole = p.numel() * p.element_size()
            sent += 2 * whole * (n - 1) / n + 2 * whole / n * (m - 1) / m
        return round(sent)

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer itself, whole, as it would be on one rank: any number of ranks can load it, and so
        can the optimizer without shards. Every rank must call this, and gets it."""
        packed = super().state_dict()
        mine = [{key: _kind(value) for key, value in self.state.get(p, {}).items()} for p in self._parameters()]
        known = self.within.first(mine)  # a rank without a stretch of a parameter has no state of it
        named = ((p, group) for group in self.param_groups for p in group["params"])
        for name, ((p, group), keys) in enumerate(zip(named, known, strict=True)):
            if keys:
                packed["state"][name] = {key: self._whole(key, kind, p, group) for key, kind in keys.items()}
        return packed

    def _whole(self, key: str, kind: Any, p: Tensor, group: Mapping[str, Any]) -> Any:
        """One entry of a parameter's state, from all ranks' stretches."""
        value = self.state.get(p, {}).get(key)
        if not isinstance(kind, torch.dtype):
            return kind if value is None else value
        if kind is torch.uint8:
            return self._whole_codes(key, value, p, group)
        whole = torch.zeros_like(p, dtype=kind)
        if value is not None:
            in_order(whole, p)[self.own(p)] = value
        self.within.gather(in_order(whole, p))
        return whole

    def _whole_codes(self, key: str, value: Tensor | None, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Codes are moved, not made again: a block whose largest value is negative would get another scale."""
        whole = moments.empty_moments(p, group)[key]
        if value is not None:
            for there, here in self._codes(key, whole, value, p, group):
                there.copy_(here)
        self.within.total(whole)  # all but one rank's bytes are zero
        return whole

    def _codes(
        self, key: str, whole: Tensor, own: Tensor, p: Tensor, group: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and codes of this rank's stretch: (among those of the parameter, by themselves), views."""
        mine = self.stretch(p)
        alone = moments.coded_part(key, own, mine, slice(0, mine.numel()), self.group_of(p, group, mine))
        return zip(moments.coded_part(key, whole, p, self.own(p), group), alone, strict=True)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint of `state_dict` here on any number of ranks, or of the optimizer without shards.

        Raises ValueError, and changes nothing, for one whose state is not that of these parameters.
        """
        saved = [(name, group) for group in state_dict["param_groups"] for name in group["params"]]
        named = [(p, group) for group in self.param_groups for p in group["params"]]
        loaded: dict[Tensor, Any] = {}
        for (name, new), (p, group) in zip(saved, named, strict=False):
            mine = self.stretch(p)
            if name in state_dict["state"] and mine.numel():
                loaded[p] = self._loaded(name, state_dict["state"][name], {**group, **new}, p, mine)
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(loaded)

    def _loaded(self, name: Any, saved: Mapping[str, Any], group: Mapping[str, Any], p: Tensor, mine: Tensor) -> Any:
        """The state of a stretch from that of the parameter, checked and cast as the optimizer itself does it."""
        cut = {key: self._cut(name, key, value, p, group) for key, value in saved.items()}
        double = self.over(defaultdict(dict), [self.group_of(p, group, mine)])
        double.load_state_dict({"state": {0: cut}, "param_groups": [self.group_of(p, group, 0)]})
        return double.state[mine]

    def _cut(self, name: Any, key: str, value: Any, p: Tensor, group: Mapping[str, Any]) -> Any:
        """This rank's stretch of one entry of a parameter's state."""
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if value.shape == p.shape:
            return in_order(value.to(p.device), p)[self.own(p)].clone()
        coded = issubclass(self.kind, AdamW) and value.dtype is torch.uint8
        if coded and value.shape == moments.empty_moments(p.to("meta"), group)[key].shape:
            mine = self.stretch(p)
            made = moments.empty_moments(mine, self.group_of(p, group, mine))[key]
            for there, here in self._codes(key, value.to(p.device), made, p, group):
                here.copy_(there)
            return made
        raise ValueError(
            f"the state of parameter {name} is not one of {self.kind.__name__}: its {key} is {tuple(value.shape)} "
            f"{value.dtype}, the parameter {tuple(p.shape)}; nothing was changed"
        )


def _kind(value: Any) -> Any:
    """The dtype of what a state has for each element; of anything else, itself."""
    return value.dtype if isinstance(value, Tensor) and value.dim() else value


def _ranks(group: Any, ranks: int | None, shards: int | None) -> tuple[Ranks, Ranks]:
    """Those of this rank's shard group, and those of the same shard in others."""
    if ranks is not None:
        if group is not None:
            raise ValueError("group= is for ranks there are, ranks= for ranks there would be: give one")
        each = ranks if shards is None else shards
        counts = (isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in (ranks, each))
        if not all(counts) or ranks % each:
            raise ValueError(f"ranks={ranks!r}, shards={shards!r} refused: shards must divide the ranks, 1 or more")
        return Ranks(each), Ranks(ranks // each)
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("no process group: call torch.distributed.init_process_group first, or plan with ranks=")
    group = group or dist.group.WORLD
    return ranks_within(group, dist.get_world_size(group) if shards is None else shards)
