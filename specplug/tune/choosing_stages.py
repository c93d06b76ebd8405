"""The stages of a tune that choose: replays, finalists, live runs, and the winner.

Each one takes its result from the journal, or does its work and adds the result to it. This module reaches the engine
only through a tuning subject, and does not depend on a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from specplug.bench.arms import Arm
from specplug.errors import SpecplugError
from specplug.machine import fingerprint
from specplug.profile import Measured
from specplug.tune.candidates import BUILTIN_METHOD, PLAIN, Setting
from specplug.tune.confirm import confirm
from specplug.tune.device_settings import builtin_settings, by_batch_size, with_lengths
from specplug.tune.engine_choice import EngineChoice, with_setting
from specplug.tune.prediction import Costs, Prediction
from specplug.tune.replay import replay_all
from specplug.tune.selection import Pairs, select_finalists, select_winners
from specplug.tune.trace import Trace
from specplug.tune.tune_run import TuneRun

Learned = Mapping[str, tuple[float, float]]
"""Acceptance counts by bucket."""


class ChoosingStages:
    """The choice. Kinds and keys of journal entries must keep their names: `--resume` reads them."""

    def __init__(self, run: TuneRun) -> None:
        self.run = run

    def replay(self, path: Path, costs: Costs, most_nodes: int) -> dict[Setting, Prediction]:
        """Replay every setting over the trace, while time allows. Replays are quick, so the journal does not keep them:
        a continued tune repeats them."""
        most_nodes = min(most_nodes, costs.points.rows[-1] - costs.points.sequences)
        combined = self.run.journal.last("combined")
        if combined is not None:
            specs = {spec.method: spec for spec in self.run.methods()}
            settings = [
                with_lengths([specs[method] for method in one["methods"]], one["lengths"])
                for one in combined["settings"]
            ]
            return self._replayed([*settings, *builtin_settings(most_nodes)], path, costs, None)
        settings = self.run.subject.settings_to_try(most_nodes, (*self.run.drafters, *self.run.request.retrieval))
        known = self.run.journal.last("finalists")
        seconds = self.run.budget.of("replay")
        if known is not None:
            settings.sort(key=lambda setting: setting.name not in known["names"])
            seconds = self.run.budget.share("replay")
        predicted = self._replayed(settings, path, costs, seconds)
        if len(predicted) < len(settings):
            self.run.note(f"{len(predicted)} of {len(settings)} settings were replayed: the budget allows no more")
        if self.run.subject.engine_planning != "batch_size":
            return predicted
        settings = by_batch_size(predicted, costs.batch)
        as_plain = [
            {"methods": [spec.method for spec in one.proposers], "lengths": list(one.lengths)} for one in settings
        ]
        self.run.add("combined", settings=as_plain)
        own = self._replayed(settings, path, costs, None)
        return own | {setting: one for setting, one in predicted.items() if not setting.lengths}

    def _replayed(
        self, settings: Sequence[Setting], path: Path, costs: Costs, seconds: float | None
    ) -> dict[Setting, Prediction]:
        """The predictions in the order of the settings, without those for which no time was left."""
        predicted: dict[Setting, Prediction] = {}
        for setting, prediction in replay_all(settings, path, costs, seconds=seconds):
            predicted[setting] = prediction
            best = max(predicted, key=lambda one: predicted[one].total.speedup)
            self.run.best = f"{best.name} {predicted[best].total.speedup:.2f} predicted"
            self.run.report("replay", len(predicted) / len(settings))
        return {setting: predicted[setting] for setting in settings if setting in predicted}

    def select_finalists(self, predicted: Mapping[Setting, Prediction]) -> list[Setting]:
        """Select the settings to confirm; a continued tune keeps those that were selected before."""
        known = self.run.journal.last("finalists")
        if known is not None:
            return [setting for setting in predicted if setting.name in known["names"]]
        selected = select_finalists({setting: one.total.speedup for setting, one in predicted.items()})
        self.run.add("finalists", names=[setting.name for setting in selected])
        return selected

    def confirm(
        self,
        trace: Trace,
        learned: Mapping[Setting, Learned],
        costs: Costs,
        parts: int,
        choice: EngineChoice | None = None,
    ) -> dict[Setting, Pairs]:
        """Run these settings and plain decoding live, for one of `parts` equal parts of the time that is left.

        Plain decoding runs under the engine settings that are fastest for it.
        """
        level = costs.points.sequences
        until = self.run.budget.spent + self.run.budget.left / parts

        def progress(pairs: Mapping[Setting, Pairs]) -> None:
            found = {setting: line.speedup() for setting, line in pairs.items()}
            speeds = {setting: interval.median for setting, interval in found.items() if interval is not None}
            if speeds:
                best = max(speeds, key=speeds.__getitem__)
                self.run.best = f"{best.name} {speeds[best]:.2f}"
            self.run.report("confirm", min(1.0, self.run.budget.spent / self.run.budget.seconds))

        with ExitStack() as stack:
            arms: dict[Setting, Arm] = {}
            for setting in (PLAIN, *learned):
                profile = setting.profile(self.run.subject.profile, "none" if setting == PLAIN else "candidate")
                profile = replace(profile, measured=Measured(acceptance=learned.get(setting, {})))
                if setting == PLAIN and choice is not None:
                    profile = replace(profile, runtime=with_setting(profile.runtime, choice.plain))
                arms[setting] = self.run.subject.arm(profile, slots=level, costs=costs)
                stack.callback(arms[setting].close)
            drafts = any(setting.method != BUILTIN_METHOD for setting in learned)
            idle = self.run.subject.idle_arm(slots=level, costs=costs) if drafts else None
            if idle is not None:
                stack.callback(idle.close)
            return confirm(
                arms,
                trace,
                level,
                left=lambda: until - self.run.budget.spent,
                idle=idle,
                earlier=[entry["seen"] for entry in self.run.journal.of("pair") if entry["level"] == level],
                store=lambda measured: self.run.add("pair", level=level, seen=measured),
                progress=progress,
            )

    def select_winner(
        self,
        trace: Trace,
        learned: Mapping[Setting, Learned],
        costs: Mapping[int, Costs],
        confirmed: dict[int, dict[Setting, Pairs]],
        choice: EngineChoice | None = None,
    ) -> tuple[Setting | None, dict[str, str]]:
        """Select the fastest setting that is not slower at another concurrency; and why others are rejected.

        Measurements at the other concurrencies are added to `confirmed`.
        """
        pairs_of = confirmed[self.run.request.level]
        idle = next((interval for pairs in pairs_of.values() if (interval := pairs.idle_speedup()) is not None), None)
        if idle is not None:
            self.run.note(
                f"the drafting engine ran {idle.median:.2f} ({idle.low:.2f}-{idle.high:.2f}) times as fast as plain "
                "decoding with drafting disabled: a setting has to be faster than both"
            )
        rejected = {
            setting.name: why for setting, pairs in pairs_of.items() if (why := pairs.why_rejected()) is not None
        }
        if choice is not None:
            for setting, pairs in pairs_of.items():
                speedup = pairs.speedup()
                if speedup is not None and setting.name not in rejected and not choice.pays(speedup.median):
                    rejected[setting.name] = "slower in whole requests: prompts take longer under its engine settings"
        others = [level for level in self.run.request.concurrency if level != self.run.request.level]
        for setting in select_winners(pairs_of):
            if setting.name in rejected:
                continue
            for place, level in enumerate(others):
                only = {setting: learned[setting]}
                found = self.confirm(trace, only, costs[level], len(others) - place, choice)[setting]
                confirmed.setdefault(level, {})[setting] = found
                if found.speedup() is None:
                    self.run.note(f"{setting.name}: no time was left to measure it with {level} at once")
                elif found.is_slower():
                    rejected[setting.name] = f"slower with {level} at once"
                    break
            if setting.name not in rejected:
                return setting, rejected
        return None, rejected

    def check_model(self, begun: Mapping[str, Any]) -> None:
        """SpecplugError when the model file has changed, or is missing, since the tune began."""
        now = {"model": fingerprint.model_identity(self.run.request.model)}
        if fingerprint.changes({"model": begun["fingerprint"]["model"]}, now):
            raise SpecplugError(
                f"{self.run.request.model}: changed while it was tuned; nothing was written, tune again"
            )
