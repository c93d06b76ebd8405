"""The prompts of the demo: one of each kind of work, from much repetition to none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """A prompt, and what is said of it.

    kind    a word or two
    about   what the answer repeats, for the title of its replay
    length  of its answer, as a share of the longest: where little is drafted, short answers show it as well
    """

    kind: str
    about: str
    length: float
    text: str


PROMPTS = (
    DemoPrompt(
        "code edit",
        "a function is written again with one parameter renamed",
        1.0,
        """Here is a Python function:

```python
def monthly_report(readings, limit):
    '''Print one line for each month, and return the months above the limit.'''
    above = []
    for month, values in readings.items():
        total = sum(values)
        mean = total / len(values)
        print(month, "total:", total, "mean:", round(mean, 1))
        if mean > limit:
            print(month, "is above the limit of", limit)
            above.append(month)
    print(len(above), "months are above the limit")
    return above
```

Write the whole function again, and rename the parameter `limit` to `threshold`. Change nothing else, and answer \
with the code only.""",
    ),
    DemoPrompt(
        "summary",
        "sentences of a text are quoted",
        0.75,
        """Summarise the text below in three points. Under each point, quote the sentence that it rests on, in \
quotation marks.

The bakery in Mill Street has changed its hours. From the first of October it opens at five in the morning, two \
hours earlier than before. Nurses and bus drivers had asked for it, because their day begins before the shops do. \
"We were awake anyway, so we may as well sell what comes out of the oven," said the baker, Ida Holm. In return the \
bakery closes at two in the afternoon. Whatever is left over then goes to the school across the road, where it is \
eaten on the same day. The owner expects to sell more bread and fewer cakes, and has ordered a second oven that \
bakes eighty loaves at once. It will be paid with a loan from the town, which wants to keep small shops in its \
centre. If the trial fails, the old hours return in March.""",
    ),
    DemoPrompt(
        "free text",
        "nothing is repeated",
        0.5,
        "Why do leaves change their colour in autumn? Explain it to a child in one paragraph.",
    ),
)
"""Written for this demo. The answers to the first two repeat parts of their prompts."""
