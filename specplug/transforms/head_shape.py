"""How much a drafter reads per step, by the rows of its head.

Knows sizes. Knows no file format.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of a model that may be trimmed.

    num_tokens  rows of its whole head
    width       weights per row
    tied        whether the head is the embedding table
    row_bytes   of one row of the head
    body_bytes  all other weights that one step reads; of the embedding table that is one row, and not counted
    """

    num_tokens: int
    width: int
    tied: bool
    row_bytes: int
    body_bytes: int

    def step_bytes(self, rows: int) -> int:
        """Weights read per draft step with so many rows in the head."""
        return self.body_bytes + rows * self.row_bytes
