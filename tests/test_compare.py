"""What `bench` refuses before it opens a model."""

import pytest

from specplug.bench.compare import check
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Profile
from specplug.registry import ProposerSpec

PLAIN = Profile("none", proposers=(ProposerSpec("none"),))
PEER = "llama-cpp-python:prompt-lookup"


@pytest.mark.parametrize(
    ("profiles", "peers", "concurrency", "error", "told"),
    [
        ([Profile("a", engine="vllm"), Profile("b")], [], 1, UsageError, "arms on llama-cpp and vllm: one engine"),
        ([Profile("a", engine="vllm")], [PEER], 1, UsageError, "is llama.cpp's; vLLM's own methods are profiles"),
        ([Profile("a"), Profile("a")], [], 1, UsageError, "arm a is named twice"),
        ([Profile("a")], [PEER, PEER], 1, UsageError, "is named twice"),
        ([Profile("none")], [], 1, UsageError, "give it another name"),
        ([Profile("a"), Profile("b", exact=True)], [], 1, UsageError, "profile b: exact changes plain decoding too"),
        ([Profile("a")], ["llama-server"], 1, UsageError, "no peer is named 'llama-server'; there are"),
        ([Profile("a")], [PEER], 4, UsageError, "use --concurrency 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    profiles: list[Profile], peers: list[str], concurrency: int, error: type[SpecplugError], told: str
) -> None:
    with pytest.raises(error, match=told):
        check(profiles, peers, concurrency)


def test_what_can_be_compared_is_not() -> None:
    check([PLAIN, Profile("a"), Profile("b")], [PEER], 1)
    check([PLAIN, Profile("a")], [], 8)
    check([Profile("a", engine="vllm"), Profile("b", engine="vllm")], [], 4)
    check([Profile("a", exact=True), Profile("b", exact=True)], [], 1)
