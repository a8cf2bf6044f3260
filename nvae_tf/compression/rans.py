"""Asymmetric numeral systems: a stack of symbols that is as short as their probabilities allow.

What is pushed last is popped first. Popping with a distribution draws a symbol from it, with the bits
of the stack as randomness; pushing that symbol with the same distribution puts the same bits back.
Bits-back coding rests on that.

This is range ANS with several interleaved states ("lanes"), each of 64 bits, which share one stack of
32-bit words. NumPy works on all lanes at once.

References: Duda, *Asymmetric numeral systems*, 2013; Giesen, *Interleaved entropy coders*, 2014;
Townsend et al., *Practical lossless compression with latent variables using bits back coding*, 2019.
"""

from collections.abc import Callable

import numpy as np

PRECISION = 28  # bits of a probability
TOTAL = 1 << PRECISION  # the sum of the frequencies of all symbols
LOWEST = np.uint64(1 << 32)  # states are from here on, below 2^64
_SHIFT, _REST = np.uint64(PRECISION), np.uint64(64 - PRECISION)
_MASK = np.uint64(TOTAL - 1)
_WORD, _WORD_MASK = np.uint64(32), np.uint64((1 << 32) - 1)
_GROWTH = 1 << 12  # words by which the stack grows at least

# An integer distribution function: the sums of the frequencies of all symbols below the given ones.
# It is 0 for symbol 0 and TOTAL for the number of symbols.
#
# Args: the positions whose distributions are asked for, an integer array (n,), and a symbol for each,
# (n,). Returns: uint64 (n,).
Cumulative = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Exhausted(Exception):
    """More was popped than the stack holds, or a symbol is pushed that has no place: it is damaged."""


class Stack:
    """A stack of symbols.

    Args:
        heads: The states, uint64 (lanes,), each at least `LOWEST`.
        words: What the lanes have in common, uint32, the top at the end.
        more: Gives random words, uint32 (count,), for an empty stack; None: popping from an empty stack
            is an error.

    Attributes:
        drawn: The random words so far, in the order of `more`.
    """

    def __init__(
        self,
        heads: np.ndarray,
        words: np.ndarray | None = None,
        more: Callable[[int], np.ndarray] | None = None,
    ):
        self.heads = np.array(heads, np.uint64)
        self._words = np.zeros(0, np.uint32) if words is None else np.array(words, np.uint32)
        self._size = len(self._words)
        self._more = more
        self.drawn: list[int] = []

    @classmethod
    def random(cls, lanes: int, more: Callable[[int], np.ndarray]) -> "Stack":
        """A stack that holds random bits, without end.

        Its states are random, too: others would make the first symbols that are popped the same always.

        Args:
            lanes: Number of states. More are faster for many symbols, and cost 64 bits each.
            more: As for the constructor.
        """
        return cls(LOWEST | more(lanes).astype(np.uint64), more=more)

    @property
    def words(self) -> np.ndarray:
        """The words below the states, uint32, the top at the end."""
        return self._words[: self._size]

    @property
    def bits(self) -> float:
        """What the stack holds beyond the smallest states and the words that were drawn, in bits."""
        in_heads = np.log2(self.heads.astype(np.float64) / float(LOWEST)).sum()
        return float(in_heads) + 32.0 * (self._size - len(self.drawn))

    def push(self, starts: np.ndarray, frequencies: np.ndarray) -> None:
        """Pushes symbols, the last one first.

        Args:
            starts: The sum of the frequencies below each symbol, uint64 (n,).
            frequencies: The frequency of each, above 0, uint64 (n,).

        Raises:
            Exhausted: A frequency is 0. Only what was popped from a damaged stack has none.
        """
        lanes = len(self.heads)
        for first in reversed(range(0, len(starts), lanes)):
            self._push_block(starts[first : first + lanes], frequencies[first : first + lanes])

    def pop(self, cumulative: Cumulative, positions: np.ndarray, num_symbols: int) -> np.ndarray:
        """Pops a symbol for each position, the first one first.

        Args:
            cumulative: The distributions.
            positions: Positions, integers (n,).
            num_symbols: Number of symbols.

        Returns:
            The symbols, int64 (n,).

        Raises:
            Exhausted: The stack is empty.
        """
        lanes, symbols = len(self.heads), np.empty(len(positions), np.int64)
        for first in range(0, len(positions), lanes):
            block = positions[first : first + lanes]
            heads = self.heads[: len(block)]
            target = heads & _MASK
            found = _bisect(cumulative, block, target, num_symbols)
            starts, frequencies = interval(cumulative, block, found)
            self._pop_block(heads, target, starts, frequencies)
            symbols[first : first + lanes] = found
        return symbols

    def draw(self, count: int) -> np.ndarray:
        """Draws random words, uint32 (count,), as popping from an empty stack does."""
        if self._more is None:
            raise Exhausted
        fresh = self._more(count)
        self.drawn.extend(fresh.tolist())
        return fresh

    def _push_block(self, starts, frequencies):
        if (frequencies - np.uint64(1) >= TOTAL).any():  # 0 becomes the largest number
            raise Exhausted
        heads = self.heads[: len(starts)]
        full = (heads >> _REST) >= frequencies
        if full.any():
            self._append((heads[full] & _WORD_MASK).astype(np.uint32))
            heads = np.where(full, heads >> _WORD, heads)
        quotients, remainders = np.divmod(heads, frequencies)
        self.heads[: len(starts)] = (quotients << _SHIFT) + remainders + starts

    def _pop_block(self, heads, target, starts, frequencies):
        heads = frequencies * (heads >> _SHIFT) + (target - starts)
        low = heads < LOWEST
        count = np.count_nonzero(low)
        if count:
            heads[low] = (heads[low] << _WORD) | self._take(count).astype(np.uint64)
        self.heads[: len(heads)] = heads

    def _append(self, words):
        end = self._size + len(words)
        if end > len(self._words):
            room = max(end + _GROWTH, 2 * len(self._words))
            self._words = np.concatenate(
                [self.words, np.zeros(room - self._size, np.uint32)], dtype=np.uint32
            )
        self._words[self._size : end] = words
        self._size = end

    def _take(self, count: int) -> np.ndarray:
        missing = count - self._size
        if missing > 0:
            fresh = self.draw(missing)
            words = np.concatenate([fresh[::-1].astype(np.uint32), self.words])
            self._size = 0
            return words
        self._size -= count
        return self._words[self._size : self._size + count].copy()


def interval(cumulative: Cumulative, positions, symbols) -> tuple[np.ndarray, np.ndarray]:
    """Starts and frequencies of symbols, as `Stack.push` takes them.

    Args:
        cumulative: The distributions.
        positions: Positions, integers (n,).
        symbols: A symbol for each, (n,).
    """
    starts = cumulative(positions, symbols)
    return starts, cumulative(positions, symbols + 1) - starts


def intervals(cumulative: Cumulative, positions, symbols, lanes: int):
    """`interval` in blocks of as many as there are lanes, as `Stack.pop` asks.

    So both directions compute arrays of the same shapes.
    """
    blocks = [
        interval(cumulative, positions[first : first + lanes], symbols[first : first + lanes])
        for first in range(0, len(positions), lanes)
    ]
    if not blocks:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    starts, frequencies = zip(*blocks, strict=True)
    return np.concatenate(starts), np.concatenate(frequencies)


def _bisect(cumulative: Cumulative, positions, target, num_symbols: int) -> np.ndarray:
    """The symbols whose intervals hold the targets.

    It does not need a function that rises without exception: what it finds holds the target.
    """
    low = np.zeros(len(positions), np.int64)
    high = np.full(len(positions), num_symbols, np.int64)
    for _ in range(max(num_symbols - 1, 1).bit_length()):
        middle = (low + high) >> 1
        above = cumulative(positions, middle) > target
        high, low = np.where(above, middle, high), np.where(above, low, middle)
    return low
