"""A proposer of one's own: it proposes that the current token is followed by what followed it last time.

    python examples/own_proposer.py       # replay it over a known text, without a model
    pytest examples/own_proposer.py       # run the contract tests that every proposer has to pass

To name it in a profile, register it in the pyproject.toml of your package:

    [project.entry-points."specplug.proposers"]
    bigram = "your_package.own_proposer:Bigram"
"""

from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step
from specplug.testing import ProposerContract, ToyTarget, replay


class Bigram:
    requires = Requires()
    buckets = (Bucket("bigram", 0.4),)  # a name for this kind of draft token, and how often it is accepted at first

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}  # by running sequence

    def begin(self, seq: int, prompt: IntArray) -> None:
        self.texts[seq] = prompt.tolist()

    def propose(self, seq: int, budget: int) -> Draft:
        text = self.texts[seq]
        follows = [text[i + 1] for i in range(len(text) - 1) if text[i] == text[-1]]
        return Draft.chain([follows[-1]], [0]) if follows and budget else EMPTY

    def observe(self, seq: int, step: Step) -> None:
        self.texts[seq] += step.emitted

    def end(self, seq: int) -> None:
        del self.texts[seq]


class TestBigram(ProposerContract):
    def make(self) -> Bigram:
        return Bigram()


if __name__ == "__main__":
    target = ToyTarget()
    prompt = target.prompt(32)
    result = replay(Bigram(), prompt, target.greedy(prompt.tolist(), 256), budget=8)
    print(f"{result.mean_acceptance_length:.2f} tokens per pass; plain decoding has 1.00")
