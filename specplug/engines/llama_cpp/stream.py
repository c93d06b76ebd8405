"""The data of the step loop: a sequence (`Stream`) and a target pass (`Pass`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specplug.core import NO_OPTIONS, IntArray, SequenceOptions
from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.engines.llama_cpp.tree_batch import Tree
from specplug.errors import SpecplugError
from specplug.generation.answers import TokenLogprobs
from specplug.generation.counters import Counters


@dataclass(slots=True, eq=False)
class Stream:
    """One sequence, from its prompt (int32[n]) to its last token.

    seq        its slot, which is its sequence id
    sampler    chooses its tokens; None where the caller walks its trees
    left       tokens that it may still emit
    max_draft  most draft tokens in a step
    cached     tokens of the prompt that were in the cache already
    places     where its prompt's reading pauses for a checkpoint, by the number of tokens
    options    what its request asks of the proposers
    root       the last emitted token: known, not yet in the KV cache
    position   tokens of the sequence in the KV cache
    reading    whether its prompt is still being read
    prompt_logprobs
               those of the prompt's tokens from the second one on, if its request asked for them
    fresh      the tokens emitted by the last step; all but the last were accepted draft tokens
    drafters   the proposer, by index, of each accepted draft token of the last step
    finish     None while running; then "stop" (end token) or "length"
    failure    why it ends without having finished
    decode_ms  time of its steps that can be compared with plain decoding
    plain_ms   time that plain decoding would have taken for the tokens of those steps, by the cost curve
    """

    seq: int
    prompt: IntArray
    sampler: Sampler | None
    left: int
    max_draft: int
    cached: int
    began_ns: int
    root: int = 0
    position: int = 0
    reading: bool = True
    places: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    drafters: list[int] = field(default_factory=list)
    finish: str | None = None
    failure: SpecplugError | None = None
    counters: Counters = field(default_factory=Counters)
    decode_ms: float = 0.0
    plain_ms: float = 0.0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    options: SequenceOptions = NO_OPTIONS

    @property
    def top_of_prompt(self) -> int | None:
        """How many alternatives to report per token of the prompt; None where no log probabilities are wanted."""
        return None if self.sampler is None else self.sampler.sampling.prompt_logprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a prompt in the batch of the pass under way; `last` where the prompt ends with them."""

    stream: Stream
    tokens: IntArray
    first: int
    last: bool

    @property
    def num_logits(self) -> int:
        """Its rows with logits: all where the prompt's log probabilities are wanted, else the prompt's last one."""
        return len(self.tokens) if self.stream.top_of_prompt is not None else int(self.last)


@dataclass(frozen=True, slots=True)
class Pass:
    """One target pass: the trees of `running`, pieces of prompts, the logits, and when its parts ended (nanoseconds).

    logits  float32[rows, V]  one row for the root and every node of every tree, then those of each piece
    others  sequences that run in other passes of the same step
    """

    running: Sequence[Stream]
    trees: list[Tree]
    pieces: list[Piece]
    tree_rows: int
    logits: Logits
    began_ns: int
    drafted_ns: int
    decoded_ns: int
    others: int = 0

    @property
    def target_ms(self) -> float:
        return (self.decoded_ns - self.drafted_ns) / 1e6
