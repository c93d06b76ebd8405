"""The llama.cpp engine as a server drives it: slots, samplers, tokens and text of one open model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from specplug.core import IntArray
from specplug.corpora.folder import NAME, Corpus, corpora_folder, open_corpus
from specplug.engines.llama_cpp.chat_template import NO_TEMPLATE, Message
from specplug.engines.llama_cpp.described_model import description_of, fill_in_tokens_of
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.engines.llama_cpp.step_loop import StepLoop
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.generation.fill_in import FillInTokens
from specplug.generation.model_description import ModelDescription
from specplug.models.corpus_fit import check_fits
from specplug.profile import CostPoints, Profile
from specplug.proposers.datastore import Datastore, datastore_of


def open_serving_engine(
    model: Model,
    profile: Profile,
    *,
    slots: int,
    kv_tokens: int | None,
    learned: Mapping[str, Sequence[float]] | None = None,
    notify: Callable[[str], None],
) -> ServingEngine:
    """A ServingEngine whose loop will run in another thread than this one.

    OpenMP keeps a team of threads for every thread that ever computed. With two teams there are more threads than
    cores, and all barriers sleep: passes take twice as long on 2 cores. So the engine is opened in a thread that ends
    then. Meanwhile the tokenizer for constraints is built.
    """
    model.guidance.begin()
    with ThreadPoolExecutor(1) as opening:
        return opening.submit(
            ServingEngine,
            model,
            profile,
            slots=slots,
            kv_tokens=kv_tokens,
            remember=True,
            learned=learned,
            follow_free_cores=True,
            notify=notify,
        ).result()


class ServingEngine:
    """One context for up to `slots` sequences. Use it in a `with` statement; whoever opened the model closes it.

    kv_tokens    tokens that may be cached at once, of all sequences together
    max_context  most tokens of one answer, its prompt included
    """

    def __init__(
        self,
        model: Model,
        profile: Profile,
        *,
        slots: int,
        kv_tokens: int | None = None,
        cost: CostPoints | None = None,
        remember: bool = False,
        learned: Mapping[str, Sequence[float]] | None = None,
        follow_free_cores: bool = False,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Raises UsageError for a profile that does not fit this engine or model.

        kv_tokens  a full context for every slot where None
        cost       T(rows, context) of this machine; taken from the profile, or learned, where None
        remember, learned, follow_free_cores
                   see `LlamaCpp`
        """
        self._engine = LlamaCpp(
            model,
            profile,
            slots=slots,
            kv_tokens=kv_tokens,
            cost=cost,
            remember=remember,
            learned=learned,
            follow_free_cores=follow_free_cores,
            notify=notify,
        )
        if not model.chat.is_own:
            notify(NO_TEMPLATE)
        self.model = model
        self._description = description_of(model)
        self._fill_in_tokens = fill_in_tokens_of(model)
        self.slots = slots
        self.profile = self._engine.profile
        self.kv_tokens = self._engine.kv_tokens
        self.max_context = self.profile.runtime.context

    def __enter__(self) -> ServingEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.close()

    @property
    def loop(self) -> StepLoop:
        return self._engine.loop

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self.model.num_tokens

    @property
    def end_tokens(self) -> frozenset[int]:
        return self.model.end_tokens

    @property
    def description(self) -> ModelDescription:
        """Facts of the model's file."""
        return self._description

    @property
    def fill_in_tokens(self) -> FillInTokens | None:
        """The tokens for fill-in-the-middle."""
        return self._fill_in_tokens

    @property
    def chat_template(self) -> str:
        """The chat template in Jinja."""
        return self.model.chat.text

    @property
    def free_control_tokens(self) -> frozenset[int]:
        """The control tokens that do not end an answer."""
        return self.model.free_control_tokens

    @property
    def source_names(self) -> list[str]:
        """The proposers, in the order in which the loop counts them."""
        return [spec.method for spec in self.profile.proposers]

    @property
    def knows_plain_ms(self) -> bool:
        """Whether there is a cost curve; plain decoding needs none."""
        return self.profile.speculates

    @property
    def datastore(self) -> Datastore | None:
        """The proposer that drafts from corpora."""
        return datastore_of(self.loop.speculator.fusion.sources)

    def learned(self) -> dict[str, tuple[float, float]]:
        return self._engine.learned()

    def open_corpus(self, name: str) -> Corpus:
        """Check all files of a corpus in the user's folder, and map it. It may run beside the loop.

        UsageError, without a path of this machine, where it is missing or damaged, or does not fit the model.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"corpus {name!r}: no name of a corpus")
        try:
            check_fits(name, self.model.path)
            return open_corpus(name, check=True)
        except UsageError as error:
            text = str(error).replace(f"{corpora_folder()}{os.sep}", "")
            raise UsageError(text.replace(str(self.model.path), "the model")) from error

    def sampler(self, sampling: Sampling) -> Sampler:
        """A sampler, which the sequence that begins with it will own. Raises UsageError for values out of range."""
        return self._engine.sampler(sampling)

    @property
    def chat_stops(self) -> tuple[str, ...]:
        """Strings that end every answer of a chat."""
        return self.model.chat.stops

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> IntArray:
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def raw_prompt(self, text: str, *, parse_special: bool = True) -> IntArray:
        return self.model.raw_prompt(text, parse_special=parse_special)

    def control_token(self, text: str) -> int | None:
        return self.model.control_token(text)

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Message] = (), variables: Message | None = None
    ) -> IntArray:
        return self.model.chat.prompt(messages, tools, variables)

    def piece(self, token: int) -> bytes:
        """The bytes that a token prints."""
        return self.model.piece(token)

    def text(self, tokens: Sequence[int]) -> str:
        return self.model.text(tokens)
