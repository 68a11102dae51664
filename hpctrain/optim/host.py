"""A rank's share of an update, where the ranks of a host have the variables in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hpctrain import native


@dataclass(frozen=True)
class HostPart:
    """Which part of each update is this rank's, and memory that the ranks of its host share.

    With `summands` these are all ranks that there are, and each lays out its own gradients there instead of summing
    them over ranks: whoever needs a sum adds up what all ranks have of it. `positions` number the optimizer's
    variables. Everything here is a part of a step's graph, and is done in the order in which it is called.
    """

    memory: Any  # tf.Variable over all bytes with the variables, as `native.host_meeting` wants it
    variables: list[Any]  # tf.Variables that lie in it
    offsets: list[int]  # in bytes, of each
    part: int
    parts: int
    summands: Any = None  # tf.Variable over the bytes of all ranks, as `native.host_summands` wants it, or None
    summand_offsets: tuple[int, ...] = ()  # in bytes, of each of the optimizer's variables

    @property
    def adds_up(self) -> bool:
        """Whether gradients are laid out, so that what a rank has of them is not the sum."""
        return self.summands is not None

    def give(self, gradients: Sequence[Any]) -> Any:
        """Lay out this rank's gradients, each as soon as it is there; return bool[]: whether all are finite.

        The others may read them when they know that this is done.
        """
        operation = native.host_summands().hpctrain_give_summands
        # In the order in which the backward pass comes to them, as one is laid out after the other.
        pairs = [*zip(gradients, self.summand_offsets, strict=True)][::-1]
        return tf.reduce_all(
            [
                operation(self.summands.handle, gradient, offset=offset, part=self.part, parts=self.parts)
                for gradient, offset in pairs
            ]
        )

    def meet(self) -> None:
        """Wait for the other ranks of the host."""
        self._meet([], [], [], [])

    def meet_and_look(self, gradients: Sequence[Any], positions: Sequence[int]) -> None:
        """Wait for the other ranks, and look whether the variables are still in common; if not, none has them so.

        With summands, `gradients` are then laid out for a rank that needs their sums whole.
        """
        if self.summands is None:
            self._meet(self.variables, self.offsets, [], [])
        else:
            self._meet(self.variables, self.offsets, list(gradients), self._offsets_of(positions))

    def squares(self, gradients: Sequence[Any], weights: Sequence[Any], positions: Sequence[int]) -> Any:
        """Return float64[3, n]: |g|^2, |w|^2 and g.w, g the sums of gradients over ranks. Comes after `meet_and_look`.

        All ranks get the same bits. Each reads its part alone, where a rank on its own would read all.
        """
        return native.host_summands().hpctrain_host_squares(
            self.memory.handle,
            self.summands.handle,
            list(gradients),
            list(weights),
            offsets=self._offsets_of(positions),
            part=self.part,
            parts=self.parts,
        )

    def summands_of(self, position: int) -> dict[str, Any]:
        """Return the arguments that tell `native.momentum` where other ranks' summands are, if they are anywhere."""
        if self.summands is None:
            return {"summands": []}
        return {"summands": [self.summands.handle], "summands_offset": self.summand_offsets[position]}

    def _offsets_of(self, positions: Sequence[int]) -> list[int]:
        return [self.summand_offsets[position] for position in positions]

    def _meet(self, variables: list[Any], offsets: list[int], gradients: list[Any], summand_offsets: list[int]) -> None:
        native.host_meeting()(
            self.memory.handle,
            [variable.handle for variable in variables],
            [self.summands.handle] if gradients else [],
            gradients,
            rank=self.part,
            ranks=self.parts,
            offsets=offsets,
            summand_offsets=summand_offsets,
        )
