"""A checkpoint, ours or any of open_clip, evaluated on datasets in CLIP_benchmark's layout.

Zero-shot retrieval and classification, and the linear probe, over all ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from dissect_clip.checkpoint import load_checkpoint, restore
from dissect_clip.cli.evaluate import Settings
from dissect_clip.cli.exit_status import EXIT_TRAINING
from dissect_clip.cli.results import (
    Result,
    fill_output,
    make_folder,
    read_result,
    summary,
    write_result,
    write_text,
)
from dissect_clip.config.settings import Config
from dissect_clip.data import ClassificationData, RetrievalData, count_skips, describe_skips
from dissect_clip.data.evaluation.benchmark import (
    BenchmarkFolder,
    BenchmarkSplit,
    DatasetKind,
    find_split,
    locate_dataset,
)
from dissect_clip.distributed.world import World, missing_device
from dissect_clip.errors import SetupError, TrainingError, printable
from dissect_clip.evaluation.common import Encoder, LabelledFeatures, eval_mode, gather_images
from dissect_clip.evaluation.metrics import RECALL_AT
from dissect_clip.evaluation.probe import linear_probe, split_off
from dissect_clip.evaluation.retrieval import evaluate_retrieval
from dissect_clip.evaluation.zeroshot import build_classifier, classify, mean_average_precision
from dissect_clip.models.build import Model, build_model
from dissect_clip.models.openclip_compat import has_own_weights
from dissect_clip.models.precision import autocast_for
from dissect_clip.models.weights import ModelWeights
from dissect_clip.run.console import setup_logging

log = logging.getLogger(__name__)


# ---- a data set


@dataclass(frozen=True, slots=True)
class Job:
    """A data set to be evaluated on."""

    name: str
    layout: BenchmarkFolder


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """How to evaluate on a data set. Picklable: made by one rank for all."""

    task: str
    output: Path
    finished: Result | None  # of an earlier run; then there is nothing to read
    test: BenchmarkSplit | None
    train: BenchmarkSplit | None = None  # linear probe only
    validation: BenchmarkSplit | None = None


def list_jobs(settings: Settings, timeout: float) -> list[Job]:
    """The data sets of the command line, each once. Not collective.

    Raises:
        SetupError: a list cannot be read, or two data sets have one name.
    """
    entries: list[str] = []
    for entry in settings.dataset or ():
        entries += _listed(Path(entry)) if os.path.isfile(entry) else [entry]
    jobs = [Job(*locate_dataset(entry, settings.dataset_root, timeout)) for entry in dict.fromkeys(entries)]
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SetupError(f"--dataset: several are called {', '.join(twice)}; evaluate on them one by one")
    return jobs


def _listed(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"--dataset: the list {path} cannot be read: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def make_plan(job: Job, settings: Settings, config: Config) -> EvaluationPlan:
    """Look at a data set, and at what has been done. Not collective.

    Raises:
        SetupError: the data set is missing or broken, or has no such task; its file of results is another's, or cannot
            be written.
    """
    job.layout.shards("test")
    task = _task(job, settings.task)
    output = fill_output(
        settings.output, dataset=job.name, model=config.model.model, pretrained=config.model.pretrained, task=task
    )
    make_folder(output)
    finished = None if settings.overwrite else _finished(output, job, task, config)
    if finished is not None:
        return EvaluationPlan(task, output, finished, None)
    test = find_split(job.name, job.layout, "test", templates=task == "zeroshot_classification")
    if task != "linear_probe":
        return EvaluationPlan(task, output, None, test)
    train = find_split(job.name, job.layout, "train", templates=False)
    if settings.val_split is None:
        return EvaluationPlan(task, output, None, test, train)
    return EvaluationPlan(
        task, output, None, test, train, find_split(job.name, job.layout, settings.val_split, templates=False)
    )


def _check_own_file(plan: EvaluationPlan, others: Mapping[str, EvaluationPlan]) -> None:
    """Raises:
    SetupError: another data set of this command has the same file of results.
    """
    for name, other in others.items():
        if other.output == plan.output:
            raise SetupError(
                f"its file of results would be {plan.output}, as that of {name}: put {{dataset}} into --output"
            )


_TASKS = {
    DatasetKind.RETRIEVAL: ("zeroshot_retrieval",),
    DatasetKind.CLASSIFICATION: ("zeroshot_classification", "linear_probe"),
    DatasetKind.MULTILABEL: ("zeroshot_classification",),
}
"""What is possible on a kind of data set; the first is its own task."""


def _task(job: Job, wanted: str) -> str:
    kind = job.layout.kind()
    possible = _TASKS[kind]
    if wanted not in ("auto", *possible):
        raise SetupError(f"--task {wanted} is not possible on a {kind.value} set, only {' or '.join(possible)}")
    return possible[0] if wanted == "auto" else wanted


def _finished(output: Path, job: Job, task: str, config: Config) -> Result | None:
    """The result of an earlier run; None where there is none, or one that is older than the weights.

    Raises:
        SetupError: the file holds the result of something else.
    """
    result = read_result(output)
    if result is None:
        return None
    wanted = {"dataset": job.name, "model": config.model.model, "pretrained": config.model.pretrained, "task": task}
    other = [f"{name} {getattr(result, name)}" for name, value in wanted.items() if getattr(result, name) != value]
    if other:
        raise SetupError(
            f"{output} has the result of {', '.join(other)}: give another --output, with {{pretrained_full_path}} for "
            "instance, or --overwrite"
        )
    if os.path.isfile(config.model.pretrained) and output.stat().st_mtime <= os.path.getmtime(config.model.pretrained):
        log.info("%s: the checkpoint is newer than %s, evaluating anew", job.name, output)
        return None
    return result


# ---- evaluating


_WAYS = (("image", "text_to_image"), ("text", "image_to_text"))
"""What is retrieved, as CLIP_benchmark says it, and the way from what to what, as OpenCLIP says it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model, and how it is evaluated. All methods are collective; their results are equal on all ranks."""

    model: Model
    encoder: Encoder
    settings: Settings
    config: Config
    world: World

    def evaluate(self, name: str, plan: EvaluationPlan) -> Result:
        """Evaluate on a data set, and write the result.

        Raises:
            SetupError: it cannot be written.
            TrainingError: as :meth:`metrics`.
        """
        log.info("%s: %s", name, plan.task)
        result = Result(
            dataset=name,
            model=self.config.model.model,
            pretrained=self.config.model.pretrained,
            task=plan.task,
            metrics=self.metrics(plan),
        )
        self.world.on_main(lambda: write_result(plan.output, result))
        log.info("%s: %s", name, "\t".join(f"{key}: {value:.4g}" for key, value in result.metrics.items()))
        return result

    def metrics(self, plan: EvaluationPlan) -> dict[str, float]:
        """The metrics of a data set, by CLIP_benchmark's names.

        Raises:
            TrainingError: too much of the set cannot be read, or features are not finite.
        """
        assert plan.test is not None
        if plan.task == "zeroshot_retrieval":
            return self._retrieval(plan.test)
        if plan.task == "linear_probe":
            assert plan.train is not None
            return self._probe(plan.test, plan.train, plan.validation)
        return self._classification(plan.test)

    def _retrieval(self, found: BenchmarkSplit) -> dict[str, float]:
        data = found.retrieval(self.config, self.world, self.model.preprocess_eval, self.model.tokenizer)
        metrics = evaluate_retrieval(self.encoder, data, world=self.world, batch_size=self.config.training.batch_size)
        self._check_skipped(data, int(metrics["num_samples"]))
        return {f"{name}_retrieval_recall@{k}": metrics[f"{way}_R@{k}"] for k in RECALL_AT for name, way in _WAYS}

    def _classification(self, found: BenchmarkSplit) -> dict[str, float]:
        data = self._labelled(found)
        classifier = build_classifier(self.encoder, data.classnames, data.templates, self.model.tokenizer, self.world)
        if found.kind is DatasetKind.MULTILABEL:
            precision, num_images = mean_average_precision(self.encoder, classifier, data, self.world)
            self._check_skipped(data, num_images)
            return {"mean_average_precision": precision}
        accuracy = classify(self.encoder, classifier, data, self.world)
        self._check_skipped(data, accuracy.num_images)
        return {
            "acc1": accuracy.top1,
            "acc5": accuracy.top5 if len(data.classnames) >= 5 else math.nan,
            "mean_per_class_recall": accuracy.mean_per_class_recall,
        }

    def _probe(
        self, test: BenchmarkSplit, train: BenchmarkSplit, validation: BenchmarkSplit | None
    ) -> dict[str, float]:
        train_features = self._features(train)
        if validation is None:
            train_features, chosen_on = split_off(
                train_features, self.settings.val_proportion, self.config.training.seed
            )
        else:
            chosen_on = self._features(validation)
        num_classes = len(test.classnames)
        probe = linear_probe(train_features, chosen_on, self._features(test), num_classes, self.world)
        return {
            "lp_acc1": probe.accuracy.top1,
            "lp_acc5": probe.accuracy.top5 if num_classes >= 5 else math.nan,
            "lp_mean_per_class_recall": probe.accuracy.mean_per_class_recall,
            "C": 1 / probe.weight,
            "seed": self.config.training.seed,
            "fewshot_k": -1,
            "normalized": True,
        }

    def _labelled(self, found: BenchmarkSplit) -> ClassificationData:
        return found.classification(self.config, self.world, self.model.preprocess_eval)

    def _features(self, found: BenchmarkSplit) -> LabelledFeatures:
        data = self._labelled(found)
        features = gather_images(self.encoder, data, self.world)
        self._check_skipped(data, len(features.label))
        return features

    def _check_skipped(self, data: RetrievalData | ClassificationData, used: int) -> None:
        """See that no more of a set was left out than is allowed.

        Raises:
            TrainingError: more was, and why.
        """
        counts = count_skips(data, self.world)
        skipped, allowed = sum(counts.values()), self.settings.max_skip_fraction
        if skipped > allowed * (skipped + used):
            raise TrainingError(
                f"{skipped} of {skipped + used} samples cannot be used ({describe_skips(counts)}), more than "
                f"--max-skip-fraction {allowed:g}"
            )


def load_model(config: Config, world: World) -> Model:
    """The model with the weights of --pretrained: a tag, a file, or an fsspec URL of a checkpoint.

    Raises:
        SetupError: there is no such model or there are no such weights, or they do not fit.
    """
    if not config.model.pretrained and not has_own_weights(config.model.model):
        log.warning("Evaluating random weights: give --pretrained or --checkpoint to load some")
    own = (
        has_own_weights(config.model.model) and Path(config.model.pretrained).is_file()
    )  # open_clip would keep the model's
    if "://" not in config.model.pretrained and not own:
        return build_model(config, world)
    model = build_model(config.replace(pretrained=""), world)
    with world.watchdog.suspend_timeout():
        checkpoint = load_checkpoint(config.model.pretrained)
    restore(checkpoint, {"state_dict": ModelWeights(model.module, config.model.model)}, evaluating=True)
    return model


@torch.no_grad()
def run(settings: Settings, config: Config, world: World) -> int:
    """Evaluate on one data set after the other, going on where one fails; the exit status. Collective.

    Raises:
        SetupError: the flags, or the model, are wrong.
    """
    setup_logging(None, logging.DEBUG if config.run.debug else logging.INFO, world)
    missing = missing_device(config.distributed.device, world)
    if missing is not None and world.is_main:
        log.warning("No %s device: running on the CPU", missing)
    jobs = world.on_main(lambda: list_jobs(settings, config.data.data_timeout))
    table = fill_output(
        settings.summary, dataset="", model=config.model.model, pretrained=config.model.pretrained, task=""
    )
    failed: dict[str, str] = {}
    plans: dict[str, EvaluationPlan] = {}
    with world.watchdog.suspend_timeout():
        for job in jobs:
            with _reporting(job.name, failed, world):
                plan = world.on_main(lambda job=job: make_plan(job, settings, config))  # type: ignore[misc]
                _check_own_file(plan, plans)
                plans[job.name] = plan
    results = {name: plan.finished for name, plan in plans.items() if plan.finished is not None}
    for name in results:
        log.info("%s: has a result in %s (--overwrite evaluates anew)", name, plans[name].output)
    left = {name: plan for name, plan in plans.items() if name not in results}
    if left:
        evaluation = prepare(settings, config, world)
        world.watchdog.begin_phase("evaluate", 0)
        with eval_mode(evaluation.model.module):
            for name, plan in left.items():
                with _reporting(name, failed, world):
                    results[name] = evaluation.evaluate(name, plan)
    ordered = [results[job.name] for job in jobs if job.name in results]
    text = summary(config.model.model, config.model.pretrained, ordered, failed)
    written = bool(ordered) or world.on_main(lambda: not Path(table).exists())  # it may be that of another checkpoint
    if written:
        world.on_main(lambda: write_text(table, text))
    if world.is_main:
        print(text)
    where = f"; the table is in {table}" if written else ""
    log.info("%d of %d data sets have results%s", len(results), len(jobs), where)
    return EXIT_TRAINING if failed else 0


def prepare(settings: Settings, config: Config, world: World) -> Evaluation:
    """The model, ready to be evaluated.

    Raises:
        SetupError: as :func:`load_model`.
    """
    model = load_model(config, world)
    encoder = Encoder(
        model.module,
        autocast_for(config.training.precision, world.device),
        open_clip.get_input_dtype(config.training.precision),
    )
    return Evaluation(model, encoder, settings, config, world)


@contextmanager
def _reporting(name: str, failed: dict[str, str], world: World) -> Iterator[None]:
    """Within the block, an error of a data set is reported and kept, so that the others can go on.

    Of several ranks, only an error that all of them have lets them go on together.
    """
    try:
        yield
    except (SetupError, TrainingError) as error:
        failed[name] = str(error)
        if world.is_main:
            log.error("%s failed: %s", name, error)
    except Exception as error:
        if world.size > 1:
            raise
        failed[name] = printable(f"{type(error).__name__}: {error}")
        log.exception("%s failed", name)
