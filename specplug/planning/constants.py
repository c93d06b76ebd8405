"""Every number that steers planning: its value, its unit, its meaning, and its origin.

"Measured" is followed by the benchmark and the results of other values; "chosen" means that no other value was
measured. None of them is a setting: the settings for users are in `specplug.profile.PlannerSettings`. This module
imports nothing.

"Plain" is decoding without drafts. A plain pass evaluates one row per sequence.
"""

from __future__ import annotations

# -- Which drafts are verified: planner.py, batch_speculator.py ------------------------------------------------------

MIN_SPEEDUP = 1.02
"""Ratio. Drafts are verified only where they are expected to be this many times as fast as plain decoding: the best of
many estimates tends to be too high, and laying out a draft costs some Python.

Measured by replay: 1.02, 1.06 and 1.12 gave 1.26, 1.26 and 1.25 times plain decoding.
"""

# -- How likely a draft token is accepted: acceptance.py, fusion.py --------------------------------------------------

PRIOR_WEIGHT = 4.0
"""Observations. The prior of a bucket counts as this many. Chosen."""

ACCEPTANCE_DECAY = 0.99
"""Factor on the weight of earlier observations of a bucket when another one arrives: about the last 100 matter.

Measured by replay: 0.97 to 0.999 gave `suffix` 1.41 to 1.42 times plain decoding. DEL (arXiv 2504.05598) uses 0.95.
"""

MIN_KEPT_OBSERVATIONS = 0.5
"""Observations. A bucket with fewer is not written to a profile. Chosen."""

AGREED_ODDS = 2.0
"""Factor on the odds p / (1 - p) of a bucket's prior where a second proposer drafts the same token. Chosen; learned
acceptance replaces it."""

ALONE_ODDS = 0.6
"""Factor on the odds of a bucket's prior where no other of several proposers drafts the same token. Chosen; learned
acceptance replaces it."""

JUDGED_TOP = 8
"""Number of a model-based proposer's likeliest tokens at a place of its draft, by which tokens of others are judged.
Measured with benchmarks/rasd.py: of lookups' tokens outside of them, two in a thousand or fewer were right."""

JUDGED_EDGES = (0.2, 0.05)
"""The boundaries between the bands of judged tokens: the probability that the model assigns to the token. Below the
last one are two bands, of tokens that are among its likeliest ones and of others. Measured as JUDGED_TOP."""

JUDGED_ODDS = (1.0, 0.3, 0.05, 0.01)
"""Per band, the factor on the odds of the prior of a bucket; learned acceptance replaces it. Measured as JUDGED_TOP,
and rounded."""

LIKELY_PRIOR = 0.5
"""Prior. Judged tokens have two buckets per band, for less and for more likely buckets of the lookup. Chosen."""

# -- How often a proposer is asked: back_off.py ----------------------------------------------------------------------

MAX_COOLDOWN = 64
"""Steps. A proposer whose drafts never pay is still asked once after this many. Chosen."""

COST_SHARE = 0.004
"""Share of a plain step that asking a cheap proposer may take, on average, while its drafts do not pay. Chosen."""

EXPENSIVE_COST_SHARE = 0.01
"""The same for an expensive proposer; where asking takes more than 0.64 of a plain step, MAX_COOLDOWN is reached first.

Measured with benchmarks/back_off_settings.py on Gemma-3-270M bf16 with a trimmed drafter: 0.04 gave 1.27 times plain
decoding on 35 prompts and 1.19 on 15 others, 0.02 1.30 and 1.17, 0.01 1.32 and 1.20 (the latter two with
CONFIDENCE_MARGIN 1, the first with 0.5).
"""

RETRIES_PER_TEXT = 8
"""Number of times that an expensive proposer is asked at the beginning of a text before it may back off, where its
drafts paid in the text before.

Measured as EXPENSIVE_COST_SHARE, at 0.02 of a plain step: 8 gave 1.50 times plain decoding, 4 gave 1.46, which is
within the noise.
"""

MIN_RETRIES_PER_TEXT = 2
"""Smallest number to which RETRIES_PER_TEXT is halved from text to text while drafts do not pay. Chosen."""

CONFIDENCE_MARGIN = 1.0
"""Share of a plain step. The mean gain over n drafts of an expensive proposer is taken to be too low by this share over
sqrt(n), so that a few bad drafts do not make it back off.

Measured as EXPENSIVE_COST_SHARE, at 0.02 of a plain step: 0.5 gave 1.28 and 1.13 times plain decoding, 1 gave 1.30 and
1.17, 1.67 gave 1.30 and 1.19.
"""

MAX_DECLINED_COOLDOWN = 7
"""Steps. An expensive proposer that declines, since no draft would pay by the measured costs, is asked again after
this many at most: costs change slowly.

Measured on Gemma-3-270M q8_0, where nothing is drafted: asking in every step took 172 us more than plain decoding,
asking in every eighth 73 us, of 11 ms.
"""

ASKING_COST_WEIGHT = 0.2
"""Weight of a new timing in the running mean of the cost of asking a proposer; the first five have equal weights.
Chosen."""

GAIN_WEIGHT = 0.05
"""Least weight of a new gain in the running mean of the gains of an expensive proposer's drafts; the first 20 of a text
have equal weights. Chosen."""

GAIN_WEIGHT_AFTER_COOLDOWN = 0.5
"""The same after a cooldown, when older gains are less relevant. Chosen."""

# -- For which texts a drafter is asked: drafter_use.py, experience.py ----------------------------------------------

FIRST_RATE = 0.8
"""The share of draft tokens of a drafter expected to be accepted before any was verified. Chosen."""

BEST_RATE = 0.9
"""If even this share of accepted tokens would not pay, a drafter is not asked. Chosen."""

RATE_WEIGHT = 10.0
"""Verified draft tokens. The share that a text starts from counts as this many. Chosen."""

RATE_DECAY = 0.99
"""Factor on the counts per verified draft token, so that about the last hundred matter. Chosen."""

RATE_FADING = 0.98
"""Factor on these counts per step in which a drafter that has read the text is not asked: what is not tested becomes
uncertain, until the drafter is asked again. Chosen."""

RATE_TEXTS = 8.0
"""Texts. A new text starts from the mean share of about so many earlier ones, FIRST_RATE among them. Chosen."""

FEWEST_TESTED = 2.0
"""Verified draft tokens that remain of these counts at least. Chosen."""

READING_MARGIN = 1.25
"""Ratio. What a drafter has yet to read of a text is read only where it is expected to save this many times the time
that reading takes. Chosen."""

READING_STEPS_ALONE = 4.0
"""Plain steps. Longest time that a drafter reads between two target passes while one sequence runs. Chosen."""

READING_STEPS_BESIDE = 0.25
"""The same while several sequences run, which all wait meanwhile. Chosen."""

DRAFTER_SHARE = 0.005
"""Share of the time that a drafter may cost in all: what it saved, less what reading, drafting and trying it took, may
fall behind by this share and DRAFTER_RESERVE. Chosen."""

DRAFTER_RESERVE = 32.0
"""Plain steps. Most time that a drafter may lose, which its earlier savings allow it. Chosen."""

TRIAL_TOKENS = 40.0
"""Wrong draft tokens. A drafter may lose the time of so many at first: enough to find out in two texts. Chosen."""

READING_PIECE = 8
"""Tokens of the smallest piece in which a drafter reads a text. Chosen."""

RETRY_TOKENS = 32
"""Emitted tokens after which a drafter can be scored on a text. Chosen."""

EXIT_DECAY = 0.95
"""Factor on the counts of an exit per round: about the last twenty rounds matter. As in DEL (arXiv 2504.05598)."""

EXIT_PRIOR_WEIGHT = 2.0
"""Draft tokens. FIRST_RATE counts as this many in the expected rate of an exit. Chosen."""

EXIT_FADING = 0.998
"""Factor on the counts of an exit per round in which another one drafts: an exit that is not scored is tried again
after some hundred rounds. Chosen."""

EXIT_HORIZON = 32.0
"""Emitted tokens over which a change to another exit has to save what it costs. Chosen."""

EXIT_SCORING_SHARE = 0.005
"""Share of the time of target passes that scoring exits by the hidden states of the target may take, as long as one of
them may save time. Chosen."""

EXIT_SCORING_FADING = 0.7
"""Factor on this share each time that scoring leaves no exit that may save time. Chosen."""

EXIT_SCORING_LEAST = 0.0005
"""The share that remains at least, so that a change of the text is noticed. Chosen."""

EXIT_SCORING_RESERVE = 1.0
"""Target passes. Time that scoring exits may take at first, and save up for later. Chosen."""

KIND_TOKENS = 3
"""Tokens at which texts of one kind begin alike, after those with which all prompts begin. Chosen."""

MOST_HEAD_TOKENS = 512
"""Most tokens with which prompts are known to begin alike. Chosen."""

FEWEST_HEAD_TOKENS = 2
"""A prompt that shares fewer tokens with a beginning of several prompts does not shorten it: one token, which begins
every text, is what raw prompts and those of a chat template share. Chosen."""

MOST_HEADS = 8
"""Most chat templates, system prompts and other common beginnings of prompts that are remembered. Chosen."""

MOST_KINDS = 256
"""Most kinds of text that are remembered. Chosen."""

MOST_LENGTHS = 32
"""Answer lengths that are remembered per kind. Chosen."""

ANSWER_LENGTH = 32
"""Tokens. The length that is expected of answers before any was seen; counts as one answer. Chosen."""

PRIOR_KINDS = 2.0
"""Kinds of text. What the measured costs and the expected acceptance say counts as this many, beside those in which
something was measured, for what is expected of a further kind. Chosen."""

SAVING_PRIOR_TOKENS = 24.0
"""Emitted tokens. What is expected of a kind of text counts as this many. Chosen."""

MOST_SAVING_TOKENS = 512.0
"""Emitted tokens. What was measured in a kind of text counts as this many at most, so that it can change. Chosen."""

# -- How much time learning may take in a batch: speculator.py ------------------------------------------------------

LEARNING_SHARE = 0.02
"""Share of the time. In a batch, drafts are verified only while the time lost to earlier ones is below this. Chosen."""

LEARNING_RESERVE = 4.0
"""Plain steps. Time that earlier drafts have saved allows later ones to lose this much at most. Chosen."""

# -- The cost of reading the target's top ids: speculator.py, batch_speculator.py ------------------------------------

TOPK_COST_WEIGHT = 0.1
"""Weight of a new timing in the running mean of the cost of reading the target's top ids. Chosen."""

# -- How a cost curve that was not measured is learned: cost_learning.py, speculator.py ------------------------------

ESTIMATE_SPREAD = 0.35
"""Standard deviation of the logarithm of the factor between the times of distant row counts, over an estimate by weight
format and threads. Chosen: measured curves differ from the estimate by factors of 0.6 to 1.15.
"""

SIMILAR_SPREAD = 0.2
"""The same over the curve of another model in the same format on the same machine. Chosen."""

MEASURED_SPREAD = 0.1
"""The same over a curve that was measured in full, in another process. Chosen."""

REMEMBERED_WEIGHT = 4.0
"""Passes. What earlier processes have seen of a row count weighs as much as this many at most: the machine may be in
another state now. Chosen."""

COST_SCALE_SPREAD = 10.0
"""Standard deviation of the logarithm of the factor that all row counts share: it can be anything, since the speed of a
machine is unknown before its first pass. Chosen."""

COST_BLOCK_SHARE = 0.5
"""Share of the standard deviation of the shape that the factor has which row counts share that are divisible by the
same power of two. Chosen: on quantised weights T(8) is 0.8 to 1.0 of T(7), T(16) 0.7 to 1.0 of T(15)."""

LARGEST_BLOCK = 4
"""Power of two. Row counts divisible by more than 16 count as divisible by 16, the largest block of kernels. Chosen."""

COST_ROW_SPREAD = 0.07
"""Standard deviation of the logarithm of the factor that belongs to one row count alone. Chosen."""

COST_NOISE = 0.08
"""The same of the time of a single pass. Chosen; on an idle machine passes vary by 2 to 8%."""

COST_FIRST_NOISE = 0.2
"""The same of the mean of the first pass over a row count, as nothing shows whether it was disturbed; that of n passes
has this over n. Chosen."""

COST_DRIFT = 0.006
"""The same of what changes from one pass to the next: 0.2 after a thousand passes in which a row count did not run.
Chosen."""

COST_WEIGHT_LIMIT = 24.0
"""Passes. Earlier passes over a row count weigh as much as this many at most, so that its time can change. Chosen."""

COST_OUTLIER = 0.3
"""Logarithm of a ratio. A pass that differs by more from the mean of its row count counts as this far off: a pause of
the machine is no cost. Chosen."""

OPTIMISM = 1.0
"""Standard deviations. A row count is tried where it would pay if its passes were this much faster than learned.
Chosen."""

EXPLORING_SHARE = 0.01
"""Share of the time that passes may lose which are made to learn what they cost. Chosen."""

EXPLORING_RESERVE = 4.0
"""Plain steps. Time that was not used for learning allows this much later at most. Chosen."""

EXPLORING_GAIN = 1.1
"""Ratio. A plan is tried only where it may be this many times as fast as the one that learned costs give. Chosen."""

# -- How the cost curve follows real passes: cost.py -----------------------------------------------------------------

ONE_ROW_STEP = 0.004
"""Relative change of T(1) per observation, up or down. Steps of equal size track a median, so that a pause of the
entire machine moves the curve no further than a slow pass does. Chosen."""

EXTRA_ROWS_STEP = 0.01
"""The same for the additional time of rows beyond the first. It is corrected separately, as a pass over one row is
limited by memory and a pass over many rows by arithmetic. Chosen."""

EARLY_EXTRA_ROWS_STEP = 0.1
"""The n-th observation of several rows changes their additional time by this value over n, as long as that is more than
EXTRA_ROWS_STEP. So a curve that was measured earlier soon fits.

Chosen, after the curve was found 15% too low for several rows on a machine whose state had changed; with it the curve
was 1 to 7% too low for six rows and more over the first 200 passes of code edits.
"""

ROW_COUNT_STEP = 0.001
"""Relative change, per observation, of the correction that belongs to one row count alone. Chosen."""

EXTRA_ROWS_RETURN = 0.0005
"""Share of the correction of further rows that each pass of one row takes back, so that costs which once stopped all
drafts are tried again later. Chosen."""

COST_TOLERANCE = 1e-9
"""Relative. A smaller error of a pass's predicted time is floating-point rounding and counts as no error."""

CURVE_REFRESH = 16
"""Observations between two corrected curves: computing one costs more than an observation. Chosen."""

# -- When a plain pass is inserted, since only such a pass shows the cost of plain decoding: cost.py -----------------

PLAIN_INTERVAL = 64
"""Passes with drafts after which one plain pass is made. One in 64 costs below 1% of the time.

Measured with benchmarks/stale_costs.py on Gemma-3-270M bf16, with T(1) believed 1.2 times too high: 1.33 times plain
decoding with it and 1.30 without it, within the noise. It matters where drafting saves or loses little time: see
tests/test_speculator.py.
"""

MIN_PLAIN_INTERVAL = 4
"""Smallest value to which PLAIN_INTERVAL falls, each time to a quarter, while the times of plain passes are surprises.
Chosen."""

PLAIN_SURPRISE = 0.1
"""Relative. A plain pass whose predicted time is wrong by more is a surprise. Chosen."""

FEWEST_PLAIN = 4
"""Plain passes after which a comparison with plain decoding is shown to users. Chosen."""

MAX_RARE_PLAIN_STEP = 0.04
"""Relative. A plain pass represents all passes since the last plain one, so it moves T(1) by ONE_ROW_STEP for each of
them; but by no more than this, nor than half of the error of its time (or ONE_ROW_STEP, where that is more). Chosen."""

# -- How many rows of prompts share a pass with running sequences: engines/llama_cpp/prefill_budget.py ---------------

PREFILL_MAX_STEPS = 2.75
"""Plain steps. A step that also reads a prompt should take no longer. Then clients, for which other delays are added,
wait for three steps at most.

Measured with benchmarks/serve_load.py: with PREFILL_LATE_SHARE 0.03 the 95th percentile is 2.84 steps on q8_0 and 2.85
on bf16.
"""

PREFILL_LATE_SHARE = 0.03
"""Share of such steps that may take longer. Measured like PREFILL_MAX_STEPS: 0.05 gave 3.14 and 2.91 steps."""

PREFILL_FIRST_STEPS = 2.0
"""Plain steps. The intended time of a step before the variation between steps of one size is known. Chosen."""

PREFILL_FIRST_ROWS = 4
"""Rows per pass before anything was measured. Chosen."""

PREFILL_REDUCTION = 0.1
"""Share by which the intended time falls after a step that took too long; other steps raise it so that the two
balance at PREFILL_LATE_SHARE. Chosen."""

PREFILL_STEP_DRIFT = 0.02
"""Relative change, per observation, of the estimated time of a step without prompts. Changes of equal size track a
median, as the steps right before a prompt are disturbed by its arrival. Chosen."""

PREFILL_ROW_WEIGHT = 0.2
"""Weight of a new timing in the running mean of the cost of a row. Chosen."""
