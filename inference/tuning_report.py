"""What tuning leaves behind: a report, a plot of the Pareto front, and a copy of `config.json` with the profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .answering import AnsweringError, first_line
from .tuning_search import Trial


REPORT, PLOT, CONFIG, PROFILE = "report.json", "pareto.png", "config.json", "profile.json"


def write_report(folder: Path, values: dict[str, Any]) -> None:
    """`values` as JSON, in place of an earlier report."""
    (folder / REPORT).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_profile(folder: Path, source: str, best: Trial) -> None:
    """The profile by itself, and in a copy of the model's `config.json`, whose other values stay.

    Args:
        source (`str`): a model folder, or a Hub name whose file lies in the local cache.
    """
    profile = best.profile.to_dict()
    (folder / PROFILE).write_text(best.profile.to_json(), encoding="utf-8")
    config = json.loads(config_file(source).read_text(encoding="utf-8"))
    config["optim"] = profile
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def config_file(source: str) -> Path:
    """Where the `config.json` of a model lies."""
    if Path(source).is_dir():
        return Path(source) / CONFIG
    from transformers.utils.hub import cached_file

    return Path(cached_file(source, CONFIG, local_files_only=True))


def make_folder(output: Path, source: str) -> Path:
    """The folder for the results.

    Raises:
        AnsweringError: if it is the model's own, whose `config.json` is not to be changed, or cannot be made.
    """
    if Path(source).is_dir() and output.resolve() == Path(source).resolve():
        raise AnsweringError(f"--out {output} is the model's own folder; name another, its config.json is copied.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnsweringError(f"cannot write to {output}: {first_line(error)}") from None
    return output


def draw_front(
    path: Path, trials: list[Trial], front: list[Trial], best: Trial | None, target: float, exact_bytes: int
) -> None:
    """Time against memory: what was tried, what agrees well enough, the front of those, and the choice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    unit, divisor = ("GB", 1e9) if exact_bytes >= 1e9 else ("MB", 1e6)

    def place(trial: Trial) -> tuple[float, float]:
        return trial.measurement.held_bytes / divisor, trial.measurement.time_ratio

    ran = [trial for trial in trials if trial.measurement is not None]
    for fits, color, label in (
        (False, "#b0b0b0", f"agrees on less than {target:.1%}"),
        (True, "#1f77b4", f"agrees on {target:.1%} and more"),
    ):
        points = [place(trial) for trial in ran if trial.fits(target) is fits]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, label=label, zorder=2)
    if len(front) > 1:
        axes.plot(*zip(*(place(trial) for trial in front), strict=True), color="#1f77b4", lw=1, label="Pareto front")
    axes.scatter([exact_bytes / divisor], [1.0], marker="s", color="black", label="exact model", zorder=3)
    if best is not None:
        x, y = place(best)
        axes.scatter([x], [y], marker="*", s=220, color="#d62728", label="chosen", zorder=4)
        title = f"chosen: {best.title}; agrees on {best.measurement.top1_agreement:.1%}"
        axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(f"weights and cache held ({unit})")
    axes.set_ylabel("time of an answer (exact model = 1)")
    axes.set_xlim(0, axes.get_xlim()[1])
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=150)
