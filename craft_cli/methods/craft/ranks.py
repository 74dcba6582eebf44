"""Ranks in flag form: OUT,IN,LAYERS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from craft_cli.config import parse_ranks


class Ranks(NamedTuple):
    """Multilinear ranks in the order of the command line (the paper writes layer, out, in)."""

    out: int
    in_: int
    layers: int

    @classmethod
    def parse(cls, ranks: str | Sequence[int]) -> Ranks:
        """Parse `64,64,8` or (64, 64, 8).

        Raises:
            ConfigError: not three positive integers.
        """
        return cls(*parse_ranks(ranks))

    @classmethod
    def of_modes(cls, modes: tuple[int, int, int]) -> Ranks:
        """Convert from (r_layer, r_out, r_in)."""
        layers, out, in_ = modes
        return cls(out, in_, layers)

    @property
    def by_mode(self) -> tuple[int, int, int]:
        """(r_layer, r_out, r_in), the order of a stack's modes."""
        return self.layers, self.out, self.in_

    def lowered(self, shape: tuple[int, int, int]) -> Ranks:
        """The ranks, each reduced to its dimension of a stack (L, d_out, d_in)."""
        layer, out, in_ = shape
        return Ranks(min(self.out, out), min(self.in_, in_), min(self.layers, layer))

    def count_parameters(self) -> int:
        """The number of trained parameters per projection: r_layer^2 + r_out^2 + r_in^2."""
        return self.out**2 + self.in_**2 + self.layers**2

    def __str__(self) -> str:
        return f"{self.out},{self.in_},{self.layers}"
