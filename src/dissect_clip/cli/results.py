"""Results of the evaluate command: JSON as CLIP_benchmark writes it, a file for each data set, and a table of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dissect_clip.errors import SetupError, printable
from dissect_clip.run.atomic import put_in_place

LANGUAGE = "en"

FIELDS = ("dataset", "model", "pretrained", "pretrained_full_path", "language", "task")
"""What the template of an output file may name, in braces."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "zeroshot_retrieval": tuple(f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in (1, 5, 10)),
    "zeroshot_classification": ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision"),
    "linear_probe": ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
}
"""The metrics in the table of a task, all of them shares in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What CLIP_benchmark writes of an evaluation, in the order of its fields."""

    dataset: str
    model: str
    pretrained: str
    task: str
    metrics: dict[str, float]
    language: str = LANGUAGE


def fill_output(template: str, *, dataset: str, model: str, pretrained: str, task: str) -> Path:
    """The path that a template means, by the rules of CLIP_benchmark: of weights in a file, only its name counts.

    Raises:
        SetupError: the template is no good.
    """
    file = os.path.basename(pretrained) if _is_file(pretrained) else pretrained
    values = (dataset, model, file, pretrained, LANGUAGE, task)
    fields = {name: value.replace("/", "_") for name, value in zip(FIELDS, values, strict=True)}
    try:
        return Path(template.format(**fields))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise SetupError(f"{template} is no template of a file ({error}); known are {known}") from error


def _is_file(pretrained: str) -> bool:
    return os.path.isfile(pretrained) or "://" in pretrained


def read_result(path: Path) -> Result | None:
    """A result that was written before, or None where there is none.

    Raises:
        SetupError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**content, "metrics": {str(name): float(x) for name, x in content["metrics"].items()}})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SetupError(f"{path} holds no result of an evaluation ({error}): move it, or give --overwrite") from error


def write_result(path: Path, result: Result) -> None:
    """Write a result, whole or not at all. What is not a number is NaN, as in CLIP_benchmark's files.

    Raises:
        SetupError: it cannot be written.
    """
    write_text(path, json.dumps(asdict(result)) + "\n")


def make_folder(path: Path) -> None:
    """Make the folder of a file, and see that it can be written in.

    Raises:
        SetupError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise SetupError(f"cannot write {path}: its folder is read-only")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, with its folder.

    Raises:
        SetupError: it cannot be written.
    """
    make_folder(path)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        put_in_place(partial, path)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error}") from error


# ---- the table


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(printable(text).replace("|", "\\|").split())


def _table(task: str, results: Sequence[Result]) -> list[str]:
    columns = [name for name in COLUMNS[task] if any(name in result.metrics for result in results)]
    rows = [(_cell(result.dataset), [result.metrics.get(name) for name in columns]) for result in results]
    if len(rows) > 1:
        rows.append(("mean", [_mean(column) for column in zip(*(values for _, values in rows), strict=True)]))
    return [
        f"## {task}",
        "",
        _row(["data set", *columns]),
        _row(["---", *("---:" for _ in columns)]),
        *(_row([name, *map(_percent, values)]) for name, values in rows),
        "",
    ]


def summary(model: str, pretrained: str, results: Sequence[Result], failed: Mapping[str, str]) -> str:
    """A Markdown table in percent for each task, and the data sets that failed, with the reason."""
    lines = [f"# {_cell(model)}, {_cell(pretrained) or 'random weights'}", "", "In percent.", ""]
    for task in COLUMNS:
        found = [result for result in results if result.task == task]
        lines += _table(task, found) if found else []
    if failed:
        lines += ["## Failed", "", *(f"- {_cell(name)}: {_cell(reason)}" for name, reason in failed.items()), ""]
    return "\n".join(lines)
