"""Where an element lies, while views are followed: sums of digits of the variables a kernel counts with.

A kernel counts rows and columns (or elements). After a reshape, row 37 of (batch, heads) is batch 37 // heads, head
37 % heads: a *digit* of the row's number. An `Index` is a constant and a sum of digits, each times a number. Merging
dimensions adds such sums up, splitting takes them apart; what is put together again becomes one digit again, so that
the address of a contiguous tensor comes out as `row * 512 + col`, however many views stand between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


class Unreadable(Exception):  # no error: the region is left alone, and the message says why
    """Something that no kernel is written for."""


@dataclass(frozen=True, order=True)
class Digit:
    """(variable // step) % size, of a variable that counts to `count`."""

    variable: str
    step: int
    size: int
    count: int

    def text(self) -> str:
        """In Triton's words, without what changes nothing."""
        found = self.variable if self.step == 1 else f"{self.variable} // {self.step}"
        return found if self.step * self.size >= self.count else f"{found} % {self.size}"


@dataclass(frozen=True)
class Index:
    """constant + the sum of factor * digit, the largest factor first."""

    terms: tuple[tuple[int, Digit], ...] = ()
    constant: int = 0

    @property
    def most(self) -> int:
        """The largest value it takes."""
        return self.constant + sum(factor * (digit.size - 1) for factor, digit in self.terms)

    def variables(self) -> set[str]:
        """What it counts with."""
        return {digit.variable for _, digit in self.terms}

    def shifted(self, by: int) -> Index:
        """The index plus a number."""
        return Index(self.terms, self.constant + by)

    def text(self) -> str:
        """As Triton's code; variables of several digits in brackets where they are multiplied."""
        words = []
        for factor, digit in self.terms:
            found = digit.text()
            found = found if found == digit.variable or factor == 1 else f"({found})"
            words.append(found if factor == 1 else f"{found} * {factor}")
        if self.constant or not words:
            words.append(str(self.constant))
        return " + ".join(words).replace("+ -", "- ")


ZERO = Index()


def counting(variable: str, count: int) -> Index:
    """All values of a variable, one after the other."""
    return Index(((1, Digit(variable, 1, count, count)),)) if count > 1 else ZERO


def total(parts: Sequence[tuple[int, Index]]) -> Index:
    """The sum of factor * index, digits that belong together joined."""
    terms: dict[Digit, int] = {}
    for factor, index in parts:
        for own, digit in index.terms:
            terms[digit] = terms.get(digit, 0) + factor * own
    constant = sum(factor * index.constant for factor, index in parts)
    ordered = sorted(((f, d) for d, f in terms.items() if f), key=lambda term: (-term[0], term[1]))
    return Index(tuple(_joined(ordered)), constant)


def _joined(terms: Sequence[tuple[int, Digit]]) -> list[tuple[int, Digit]]:
    """Neighbouring digits of one variable as one, where their factors are those they have in it."""
    found: list[tuple[int, Digit]] = []
    for factor, low in terms:
        above = next((pair for pair in found if _continues(pair, (factor, low))), None)
        if above is None:
            found.append((factor, low))
            continue
        high = above[1]
        found[found.index(above)] = factor, Digit(low.variable, low.step, low.size * high.size, low.count)
    return found


def _continues(above: tuple[int, Digit], below: tuple[int, Digit]) -> bool:
    (high_factor, high), (factor, low) = above, below
    same = high.variable == low.variable
    return same and high.step == low.step * low.size and high_factor == factor * low.size


def flattened(index: Sequence[Index], strides: Sequence[int]) -> Index:
    """The offset of an element."""
    return total(list(zip(strides, index, strict=True)))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor in the order of its dimensions."""
    return tuple(prod(shape[at + 1 :]) for at in range(len(shape)))


def divided(index: Index, by: int) -> tuple[Index, Index]:
    """(index // by, index % by). Raises Unreadable where that is no sum of digits."""
    high: list[tuple[int, Index]] = []
    low: list[tuple[int, Index]] = []
    for factor, digit in index.terms:
        if factor % by == 0:
            high.append((factor // by, Index(((1, digit),))))
        elif by % factor == 0 and digit.size % (by // factor) == 0 and digit.size > by // factor:
            inner = by // factor
            low.append((factor, Index(((1, Digit(digit.variable, digit.step, inner, digit.count)),))))
            outer = Digit(digit.variable, digit.step * inner, digit.size // inner, digit.count)
            high.append((1, Index(((1, outer),))))
        else:
            low.append((factor, Index(((1, digit),))))
    above, below = divmod(index.constant, by)
    quotient, rest = total(high).shifted(above), total(low).shifted(below)
    if rest.most >= by or any(factor < 0 for factor, _ in index.terms):
        raise Unreadable("an index that is no sum of digits")
    return quotient, rest


def unravelled(index: Index, shape: Sequence[int]) -> tuple[Index, ...]:
    """The index of each dimension of an element whose place in row-major order this is."""
    found = [ZERO] * len(shape)
    places = [at for at, size in enumerate(shape) if size != 1]
    for at in reversed(places[1:]):
        index, found[at] = divided(index, shape[at])
    if places:
        found[places[0]] = index  # which may go beyond where a mask keeps it from that: in half of a concatenation
    return tuple(found)


def reshaped(index: Sequence[Index], shape: Sequence[int], to: Sequence[int]) -> tuple[Index, ...]:
    """The index in shape `to` of the element that is at `index` in `shape`: dimensions that split or merge among
    themselves are followed by themselves, so that a shifted one next to them does not matter."""
    found: list[Index] = []
    a = b = 0
    while a < len(shape) or b < len(to):
        left, right = a, b
        a, b = min(a + 1, len(shape)), min(b + 1, len(to))
        while (one := prod(shape[left:a])) != (other := prod(to[right:b])):
            if one < other:
                a += 1
            else:
                b += 1
        part = shape[left:a]
        if a - left == b - right == 1:
            found.append(index[left])
        else:
            found.extend(unravelled(flattened(index[left:a], contiguous(part)), to[right:b]))
    return tuple(found)
