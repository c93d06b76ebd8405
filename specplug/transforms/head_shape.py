"""The bytes that a drafter reads per step, by the number of rows of its head. Does not depend on a file format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The sizes of a model whose head can be trimmed.

    num_tokens  rows of its full head
    width       weights per row
    tied        whether the head is the embedding table
    row_bytes   bytes of one row of the head
    body_bytes  bytes of all other weights that one step reads; of the embedding table a step reads one row, which is
                not counted
    """

    num_tokens: int
    width: int
    tied: bool
    row_bytes: int
    body_bytes: int

    def step_bytes(self, rows: int) -> int:
        """Bytes of weights that a draft step reads with `rows` rows in the head."""
        return self.body_bytes + rows * self.row_bytes
