"""The cost curves of one engine, one per number of threads: measured, remembered, or estimated and learned.

Reads and writes files in the user's cache folder. Runs no passes, and does not depend on drafts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from specplug.engines.llama_cpp.cost_estimate import estimated_points
from specplug.engines.llama_cpp.library_check import library_key
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.settings_table import comparable
from specplug.errors import SpecplugError
from specplug.machine.files import keep
from specplug.machine.remembered import machine_key, measurement_paths
from specplug.planning.constants import ESTIMATE_SPREAD, MEASURED_SPREAD, REMEMBERED_WEIGHT, SIMILAR_SPREAD
from specplug.planning.cost import CostCurve
from specplug.planning.cost_learning import CostLearning
from specplug.profile import CostPoints, Runtime

SCHEMA = 5
"""Version of the format of remembered curves."""

FOLDER = "cost"

FEWEST_SEEN = 3
"""Row counts above one that a curve of another model has to rest on before its shape is taken for this one."""

MOST_FILES = 64
"""Most remembered curves of other models that are looked at."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A curve, the weight of the passes that it rests on, by row count, and how far its shape may be off elsewhere."""

    points: CostPoints
    passes: Mapping[int, float]
    spread: float


class PassCosts:
    """The curves of one model under one runtime, for up to `limit` rows.

    measured  the curve for the runtime's own number of threads, if it was measured; it is not learned anew
    padded    a pass of one row takes as long as one of two rows, which it is padded to
    remember  start from what is in the cache folder; else from `measured` or an estimate
    """

    def __init__(
        self,
        model: Model,
        runtime: Runtime,
        limit: int,
        *,
        measured: CostPoints | None = None,
        padded: bool = False,
        remember: bool = True,
    ) -> None:
        self._runtime = runtime
        self._remember = remember
        self._measured = measured
        self._padded = padded
        self._estimate = partial(estimated_points, model, limit=limit)
        self._files = _Files(model, limit, padded)
        self._curves: dict[tuple[int, int], CostCurve] = {}
        self._spreads: dict[tuple[int, int], float] = {}
        self._kept: dict[tuple[int, int], int] = {}

    def curve(self, threads: int, threads_batch: int | None = None) -> CostCurve:
        """The curve of passes that so many threads compute; the same object for every call.

        threads_batch  threads of passes over several rows; as many as `threads` where None
        """
        key = threads, threads_batch or threads
        if key not in self._curves:
            self._curves[key] = self._open(key)
        return self._curves[key]

    def forget(self) -> None:
        """Discard what passes have shown since opening."""
        self._curves.clear()
        self._kept.clear()

    def keep(self) -> None:
        """Write what was learned since the last call to the cache folder, if that can be written."""
        for key, curve in self._curves.items():
            if curve.num_learned == self._kept.get(key, 0):
                continue
            self._kept[key] = curve.num_learned
            contexts, ms, passes = curve.learned()
            rows = tuple(range(1, len(ms[0]) + 1))
            lines = tuple(tuple(round(value, 4) for value in line) for line in ms)
            points = CostPoints(tuple(contexts), rows, lines, change_ms=curve.change_ms)
            self._files.write(self._of(key), _Remembered(points, passes, self._spreads[key]))

    def _of(self, key: tuple[int, int]) -> Runtime:
        return replace(self._runtime, threads=key[0], threads_batch=key[1])

    def _open(self, key: tuple[int, int]) -> CostCurve:
        runtime, passes = self._of(key), dict[int, float]()
        own = self._runtime.threads, self._runtime.threads_batch or self._runtime.threads
        if self._measured is not None and key == own:
            points, spread = self._measured, 0.0
        elif self._remember and (known := self._files.read(runtime)) is not None:
            points, passes, spread = known.points, dict(known.passes), known.spread
        elif self._measured is not None:
            points, spread = self._measured, ESTIMATE_SPREAD
        else:
            estimate = self._estimate(runtime)
            shape = self._files.similar(runtime, estimate) if self._remember else None
            points, spread = (estimate, ESTIMATE_SPREAD) if shape is None else (shape, SIMILAR_SPREAD)
        self._spreads[key] = spread
        ms = [list(line) for line in points.ms]
        if self._padded:
            for line in ms:
                line[0] = line[min(1, len(line) - 1)]
        learning = CostLearning(points.rows[-1], spread=spread, known=passes) if spread else None
        return CostCurve(points.contexts, points.rows, ms, points.change_ms, learning)


def remember(model: Model, runtime: Runtime, points: CostPoints) -> None:
    """Keep a measured curve, so that later engines start from it."""
    known = _Remembered(points, dict.fromkeys(points.rows, REMEMBERED_WEIGHT), MEASURED_SPREAD)
    _Files(model, points.rows[-1], padded=False).write(runtime, known)


class _Files:
    """The remembered curves of one model. What their names depend on is read when it is created."""

    def __init__(self, model: Model, limit: int, padded: bool) -> None:
        self._path = measurement_paths(FOLDER, model.path)
        self._library = library_key()
        self._likeness = [machine_key(), self._library, model.meta("general.file_type"), padded]
        self._conditions = limit, padded

    def read(self, runtime: Runtime) -> _Remembered | None:
        return _read(self._of(runtime))

    def write(self, runtime: Runtime, known: _Remembered) -> None:
        """Does nothing where the file cannot be written: then the curve is learned again."""
        points = known.points
        document = {
            "schema": SCHEMA,
            "like": self._like(runtime),
            "contexts": points.contexts,
            "rows": points.rows,
            "ms": points.ms,
            "change_ms": points.change_ms,
            "passes": {str(rows): weight for rows, weight in known.passes.items()},
            "spread": known.spread,
        }
        keep(self._of(runtime), json.dumps(document).encode())

    def similar(self, runtime: Runtime, estimate: CostPoints) -> CostPoints | None:
        """T(n) / T(1) by the latest curve of another model whose passes have a similar shape, with the estimate's rise
        with the context; None where there is none."""
        limit, like = estimate.rows[-1], self._like(runtime)
        for path in _latest(self._of(runtime).parent):
            known = _read(path, like)
            if known is None or known.points.rows[-1] < limit or sum(rows > 1 for rows in known.passes) < FEWEST_SEEN:
                continue
            curve = CostCurve(known.points.contexts, known.points.rows, known.points.ms).at(0)
            empty, *fuller = estimate.ms
            own = [curve[row] / curve[0] for row in range(limit)]
            lines = [own, *([a + b - c for a, b, c in zip(own, line, empty, strict=True)] for line in fuller)]
            return replace(estimate, ms=tuple(map(tuple, lines)))
        return None

    def _of(self, runtime: Runtime) -> Path:
        decisive = replace(comparable(runtime), threads_batch=runtime.threads_batch or runtime.threads)
        return self._path((SCHEMA, self._library, decisive, *self._conditions))

    def _like(self, runtime: Runtime) -> list[Any]:
        """What two models share whose passes have a similar shape: machine, library, format and threads."""
        threads = runtime.threads, runtime.threads_batch or runtime.threads
        return [*self._likeness, *threads, runtime.gpu_layers, runtime.repack]


def _read(path: Path, like: list[Any] | None = None) -> _Remembered | None:
    """A remembered curve; None where the file is missing or damaged, or holds no curve of a model `like` this one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA or (like is not None and data["like"] != like):
            return None
        points = CostPoints(
            tuple(map(int, data["contexts"])),
            tuple(map(int, data["rows"])),
            tuple(tuple(map(float, line)) for line in data["ms"]),
            change_ms=float(data["change_ms"]),
        )
        CostCurve(points.contexts, points.rows, points.ms)  # raises for what is no curve
        passes = {int(rows): float(weight) for rows, weight in data["passes"].items()}
        spread = float(data["spread"])
        return _Remembered(points, passes, spread) if 0.0 < spread < 10.0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SpecplugError):
        return None


def _latest(folder: Path) -> list[Path]:
    """The files of a folder, the latest first."""
    try:
        dated = [(path.stat().st_mtime, path) for path in folder.glob("*.json")]
    except OSError:
        return []
    return [path for _, path in sorted(dated, reverse=True)[:MOST_FILES]]
