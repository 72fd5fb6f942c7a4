"""The endless stream of samples that a plan lays into batches: parts of a mixture, by their weights.

    part "captions"  weight 3   c c c c c c c c ...     each part shuffled anew in every epoch
    part "clips"     weight 1   v v v v v v v v ...
    stream                      c c v c c c v c ...

Which part comes next is not drawn: it is the one that is furthest behind its share, so the shares hold over every
stretch of the stream and not only on average. Everything follows from (parts, seed) and from how many samples were
taken of each part, which is all that `Stream.state` holds.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qwenvl_jax.errors import ConfigError

WeighBy = Literal["samples", "tokens"]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The samples that one part of a mixture gives.

    Attributes:
      entries: i64[n, R], for each of its n samples the entry of the plan's facts that it is at each of the R frame
        rates; R is 1 where none are drawn.
      name: for messages, and for the seed of its shuffles, so that a part is shuffled alike in any company.
      weight: its share of the stream, beside the weights of the others.
      final_weight: its weight at the end of the stage, reached in a straight line; None keeps `weight`.
      max_epochs: how often each of its samples is given at most; None has no end.
    """

    entries: np.ndarray
    name: str = ""
    weight: float = 1.0
    final_weight: float | None = None
    max_epochs: float | None = None

    @property
    def most(self) -> float:
        """Samples that it gives at most."""
        return np.inf if self.max_epochs is None else int(self.max_epochs * len(self.entries))

    def weight_at(self, progress: float) -> float:
        """Its weight when a share `progress` of the stage is done."""
        end = self.weight if self.final_weight is None else self.final_weight
        return self.weight + (end - self.weight) * progress


def one_part(count: int) -> tuple[Part, ...]:
    """A mixture of a single part whose samples are the entries themselves."""
    return (Part(np.arange(count, dtype=np.int64)[:, None]),)


class Stream:
    """Draws entries, one after the other.

    Args:
      parts: of the mixture.
      tokens: i64[entries], tokens of each entry.
      seed: of shuffles and of frame rates.
      shuffle: whether an epoch of a part is shuffled; else it has the order of the data.
      rate_weights: R weights, how often each frame rate is drawn beside the others.
      weigh_by: whether weights are shares of the samples or of the tokens.

    Raises:
      ConfigError: weights that are no shares.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokens: np.ndarray,
        *,
        seed: int,
        shuffle: bool = True,
        rate_weights: Sequence[float] = (1.0,),
        weigh_by: WeighBy = "samples",
    ):
        self._parts, self._tokens = tuple(parts), tokens
        self._seed, self._shuffle, self._weigh_by = seed, shuffle, weigh_by
        self._chances = np.asarray(rate_weights, np.float64) / np.sum(rate_weights)
        self._taken = [0] * len(self._parts)
        # How much each part is behind its share, in samples or tokens.
        self._behind = [0.0] * len(self._parts)
        self._epochs: list[tuple[int, np.ndarray]] = [(-1, np.empty(0, np.int64))] * len(self._parts)
        for part in self._parts:
            _check_weight(part)
        if not any(part.weight_at(end) for part in self._parts for end in (0.0, 1.0)):
            raise ConfigError("all weights of the mixture are 0; give at least one part a weight.")

    def take(self, progress: float = 0.0) -> tuple[int, int] | None:
        """The number of the part that is next and the entry that it gives; None once every part came to its end.

        Args:
          progress: share of the stage that is done, from 0 to 1.
        """
        weights = [
            part.weight_at(progress) if taken < part.most else 0.0
            for part, taken in zip(self._parts, self._taken, strict=True)
        ]
        total = sum(weights)
        if not total:
            return None
        shares = [weight / total for weight in weights]
        # What is owed before this draw decides, beside the share: at the beginning nothing is owed to anyone.
        due = [behind + share if share else -np.inf for behind, share in zip(self._behind, shares, strict=True)]
        number = max(range(len(due)), key=due.__getitem__)  # of equals the first
        entry = self._entry(number)
        amount = float(self._tokens[entry]) if self._weigh_by == "tokens" else 1.0
        self._behind = [behind + share * amount for behind, share in zip(self._behind, shares, strict=True)]
        self._behind[number] -= amount
        return number, entry

    @property
    def state(self) -> dict[str, Any]:
        """How far the stream is; plain values, for JSON."""
        return {"taken": list(self._taken), "behind": list(self._behind)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where a stream of the same arguments was."""
        self._taken, self._behind = list(state["taken"]), list(state["behind"])

    def _entry(self, number: int) -> int:
        """The next entry of a part."""
        count = len(self._parts[number].entries)
        epoch, place = divmod(self._taken[number], count)
        self._taken[number] += 1
        if self._epochs[number][0] != epoch:
            self._epochs[number] = epoch, self._epoch(self._parts[number], epoch)
        return int(self._epochs[number][1][place])

    def _epoch(self, part: Part, epoch: int) -> np.ndarray:
        """i64[n], the entries of an epoch of a part."""
        seed = _seed_of(self._seed, part.name)
        count, rates = part.entries.shape
        order = _random(seed, epoch).permutation(count) if self._shuffle else np.arange(count)
        if rates == 1:
            return part.entries[order, 0]
        drawn = _random(_seed_of(seed, "frame rates"), epoch).choice(rates, count, p=self._chances)
        return part.entries[order, drawn]


def _check_weight(part: Part) -> None:
    for name in ("weight", "final_weight"):
        value = getattr(part, name)
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"part {part.name!r} of the mixture: {name}={value} must be 0 or more, and finite.")
    if part.max_epochs is not None and not part.max_epochs > 0:
        raise ConfigError(f"part {part.name!r} of the mixture: max_epochs={part.max_epochs} must be more than 0.")


def _seed_of(seed: int, name: str) -> int:
    """A seed for a name; the seed itself for none."""
    if not name:
        return seed
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)[0])


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch]))
