"""What `bench` refuses before it opens a model."""

import pytest

from specplug.bench.compare import check
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Profile, Runtime
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
        check(profiles, peers, concurrency, 0.0)


def test_peers_cannot_draw_coupled() -> None:
    coupled = Profile("a", runtime=Runtime(coupled=True))
    with pytest.raises(UsageError, match="profile a: no peer draws coupled; compare peers at temperature 0"):
        check([coupled, PLAIN], [PEER], 1, 0.8)
    check([coupled, PLAIN], [PEER], 1, 0.0)
    check([coupled, PLAIN], [], 1, 0.8)
    check([PLAIN, coupled], [PEER], 1, 0.8)  # all run with the first one's settings


def test_what_can_be_compared_is_not() -> None:
    check([PLAIN, Profile("a"), Profile("b")], [PEER], 1, 0.0)
    check([PLAIN, Profile("a")], [], 8, 0.8)
    check([Profile("a", engine="vllm"), Profile("b", engine="vllm")], [], 4, 0.0)
    check([Profile("a", exact=True), Profile("b", exact=True)], [], 1, 0.0)
