"""The interface that an engine implements for the server.

The server depends on no engine. `specplug.engines.llama_cpp.serving_engine.ServingEngine` implements this interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.corpora.folder import Corpus
from specplug.generation.answers import Sampling
from specplug.generation.fill_in import FillInTokens
from specplug.generation.model_description import ModelDescription
from specplug.profile import Profile
from specplug.proposers.datastore import Datastore
from specplug.server.scheduler import Loop


class CountingLoop(Loop, Protocol):
    """A step loop that also keeps totals since it was opened.

    drafts    drafts that were verified, of one token or more
    verified  int64[proposers, positions]: verified draft tokens by proposer and by depth in the draft
    accepted  int64[proposers, positions]: those of them that were accepted
    """

    @property
    def drafts(self) -> int: ...

    @property
    def verified(self) -> npt.NDArray[np.int64]: ...

    @property
    def accepted(self) -> npt.NDArray[np.int64]: ...


class Engine(Protocol):
    """A loaded model with a profile, opened for up to `slots` answers at once.

    max_context  largest number of tokens of one answer, its prompt included
    kv_tokens    largest number of tokens that all running answers together may hold in the KV cache
    """

    profile: Profile
    slots: int
    max_context: int
    kv_tokens: int

    @property
    def loop(self) -> CountingLoop: ...

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids of the tokens that end an answer."""

    @property
    def description(self) -> ModelDescription:
        """Facts of the model's file."""

    @property
    def fill_in_tokens(self) -> FillInTokens | None:
        """The tokens for fill-in-the-middle; None where the model has none."""

    @property
    def chat_template(self) -> str:
        """The model's chat template in Jinja; empty where it has none."""

    @property
    def free_control_tokens(self) -> frozenset[int]:
        """Ids of the control tokens, which print nothing, without those that end an answer."""

    @property
    def source_names(self) -> list[str]:
        """Method names of the proposers, in the order in which the loop counts them."""

    @property
    def knows_plain_ms(self) -> bool:
        """True if there is a cost curve, so that `plain_ms` is meaningful."""

    @property
    def datastore(self) -> Datastore | None:
        """The proposer that drafts from corpora; None where the profile has none. The loop's thread may change it."""

    def learned(self) -> Mapping[str, Sequence[float]]:
        """(hits, misses) by bucket, as the planner has learned them so far. Call it in the loop's thread."""

    def open_corpus(self, name: str) -> Corpus:
        """Check and map the corpus of this name in the user's folder, in any thread.

        Raises UsageError, without a path of this machine, if it is damaged or does not fit the model.
        """

    def sampler(self, sampling: Sampling) -> Any:
        """A sampler for one answer; its `close` must be called. Raises UsageError for options that do not work."""

    @property
    def chat_stops(self) -> Sequence[str]:
        """Strings that end every answer of a chat."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> IntArray:
        """int32[n].

        add_special    add the tokens that the model expects around a text, such as BOS
        parse_special  turn the text of control tokens into those tokens
        """

    def raw_prompt(self, text: str, *, parse_special: bool = True) -> IntArray:
        """int32[n]: a text to continue, with the tokens that the model expects around one."""

    def control_token(self, text: str) -> int | None:
        """The control token whose text this is; None where there is none."""

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> IntArray:
        """int32[n]: a conversation rendered by the model's chat template. Raises UsageError if the template fails.

        variables  further variables of the template
        """

    def piece(self, token: int) -> bytes:
        """The bytes that a token prints."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD."""
