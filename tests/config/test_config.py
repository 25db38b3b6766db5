"""The command line: the same as OpenCLIP's but for what is explained here, and clear about what it refuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import Any

import pytest
from open_clip_train.params import parse_args as open_clip_parse_args

from dissect_clip.config.fields import Range
from dissect_clip.config.flags import ADDED, REMOVED, UNSUPPORTED
from dissect_clip.config.parser import build_parser, parse_args
from dissect_clip.config.settings import Config, declared
from dissect_clip.config.strategies import StrategyEntry, StrategyRegistry, split_combination
from dissect_clip.selection.registry import STRATEGIES, describe

FIELDS = [field for field, _ in declared().values()]
OPTIONS = [field for owners in STRATEGIES.flags(STRATEGIES).values() for field, _ in owners.values()]
SYNTHETIC = ("--dataset-type", "synthetic", "--train-num-samples", "16")
SELECT = (*SYNTHETIC, "--select")

# What may differ from OpenCLIP, and why. An entry that is no longer needed fails a test.
STRICTER_CHOICES = {
    "--lr-scheduler": "OpenCLIP takes any word and stops on an unknown one once the model is built",
    "--loss-dist-impl": "OpenCLIP takes any word and asserts on an unknown one in the first step",
}
EXTRA_NAMES = {"--output-dir": "an alias of --logs, which torchrun takes for its own --logs-specs"}


def open_clip_parser() -> argparse.ArgumentParser:
    """OpenCLIP's parser, which it builds inside a function and never hands out."""
    caught: list[argparse.ArgumentParser] = []

    class CaughtError(Exception):
        pass

    def catch(parser: argparse.ArgumentParser, *_: Any) -> None:
        caught.append(parser)
        raise CaughtError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(CaughtError):
            open_clip_parse_args([])
    return caught[0]


def by_flag(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Each action under its first name, without those that show help."""
    shows_help = ("help", argparse.SUPPRESS)
    return {action.option_strings[0]: action for action in parser._actions if action.dest not in shows_help}


def default_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def type_name(action: argparse.Action) -> str:
    """Name of the type of the values; argparse leaves a string as it is where none is given."""
    return "str" if action.type is None else getattr(action.type, "__name__", repr(action.type))


THEIRS = by_flag(open_clip_parser())
OURS = by_flag(build_parser(STRATEGIES))
SHARED = sorted(set(THEIRS) - set(UNSUPPORTED))
ADDED_FLAGS = {"--" + name.replace("_", "-") for name in (*ADDED, *STRATEGIES.flags(STRATEGIES))}


def parse(*argv: str) -> Config:
    return parse_args(argv, STRATEGIES)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message that a command line is refused with."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


# ---- the same as OpenCLIP's


def test_every_flag_of_openclip_is_ours_or_refused() -> None:
    assert set(THEIRS) - set(OURS) == set()
    assert set(UNSUPPORTED) - set(THEIRS) == set(), "refused, though OpenCLIP has no such flag"


def test_every_flag_of_ours_is_openclips_or_listed_as_added() -> None:
    assert set(OURS) - set(THEIRS) - set(REMOVED) == ADDED_FLAGS


@pytest.mark.parametrize("flag", SHARED)
def test_a_shared_flag_has_openclips_names(flag: str) -> None:
    assert set(OURS[flag].option_strings) - set(EXTRA_NAMES) == set(THEIRS[flag].option_strings)
    assert OURS[flag].dest == THEIRS[flag].dest


@pytest.mark.parametrize("flag", SHARED)
def test_a_shared_flag_has_openclips_default(flag: str) -> None:
    ours, theirs = OURS[flag].default, THEIRS[flag].default
    assert (ours, type(ours)) == (theirs, type(theirs))


@pytest.mark.parametrize("flag", SHARED)
def test_a_shared_flag_takes_openclips_values(flag: str) -> None:
    ours, theirs = OURS[flag], THEIRS[flag]
    assert (ours.nargs, ours.const, ours.required) == (theirs.nargs, theirs.const, theirs.required)
    if ours.nargs != 0 and flag != "--aug-cfg":
        assert type_name(ours) == type_name(theirs)


@pytest.mark.parametrize("flag", SHARED)
def test_a_shared_flag_has_openclips_choices(flag: str) -> None:
    ours, theirs = OURS[flag].choices, THEIRS[flag].choices
    if flag in STRICTER_CHOICES:
        assert theirs is None
        assert ours is not None
    else:
        assert (ours and list(ours)) == (theirs and list(theirs))


def test_the_explained_differences_are_all_real() -> None:
    assert set(STRICTER_CHOICES) <= set(SHARED)
    assert set(EXTRA_NAMES) == {name for action in OURS.values() for name in action.option_strings[1:]}


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED))
def test_a_refused_flag_takes_as_many_values_as_openclips(flag: str) -> None:
    assert UNSUPPORTED[flag].takes_value == (THEIRS[flag].nargs is None)


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50", "vit_relpos_medium_patch16_cls_224", "coca_ViT-L-14"])
def test_the_optimizers_defaults_are_openclips(model: str) -> None:
    theirs = open_clip_parse_args(["--model", model])
    ours = parse(*SYNTHETIC, "--model", model).training
    assert (ours.lr, ours.beta1, ours.beta2, ours.eps) == (theirs.lr, theirs.beta1, theirs.beta2, theirs.eps)


def test_vit_and_resnet_differ_in_beta2_and_eps() -> None:
    vit, resnet = (parse(*SYNTHETIC, "--model", name).training for name in ("ViT-B-32", "RN50"))
    assert (vit.lr, vit.beta1, vit.beta2, vit.eps) == (5e-4, 0.9, 0.98, 1e-6)
    assert (resnet.lr, resnet.beta1, resnet.beta2, resnet.eps) == (5e-4, 0.9, 0.999, 1e-8)


def test_a_given_value_is_kept_beside_the_optimizers_defaults() -> None:
    config = parse(*SYNTHETIC, "--model", "ViT-B-32", "--lr", "0", "--eps", "1e-7")
    assert (config.training.lr, config.training.beta2, config.training.eps) == (0.0, 0.98, 1e-7)


def test_a_timm_optimizer_keeps_its_own_defaults() -> None:
    config = parse(*SYNTHETIC, "--opt", "timm/lamb", "--lr", "1e-3")
    assert (config.training.lr, config.training.beta1, config.training.beta2, config.training.eps) == (
        1e-3,
        None,
        None,
        None,
    )


SMOKE = (
    "--save-frequency 1 --zeroshot-frequency 1 --dataset-type synthetic --train-num-samples 16 --warmup 1 "
    "--batch-size 4 --lr 1e-3 --wd 0.1 --epochs 1 --workers 2"
)


@pytest.mark.parametrize(
    "model",
    [
        "--model RN50",
        "--model coca_ViT-B-32",
        "--model ViT-B-32 --lock-image --lock-image-unlocked-groups 5 --accum-freq 2",
    ],
)
def test_openclips_own_smoke_commands_parse_to_what_openclip_reads(model: str) -> None:
    argv = f"{SMOKE} {model}".split()
    ours, theirs = parse(*argv).flat(), vars(open_clip_parse_args(argv))
    differing = {name for name, value in theirs.items() if name in ours and ours[name] != value}
    assert differing == set()


@pytest.mark.parametrize(
    ("flag", "value", "setting", "expected"),
    [
        ("--batch", "8", "batch_size", 8),
        ("--train-n", "32", "train_num_samples", 32),
        ("--log-every", "3", "log_every_n_steps", 3),
        ("--output", "there", "logs", "there"),
        ("--select-m", "0.5", "select_momentum", 0.5),
    ],
)
def test_a_flag_may_be_abbreviated(flag: str, value: str, setting: str, expected: object) -> None:
    assert parse(*SELECT, "--epochs", "20", flag, value).get(setting) == expected


@pytest.mark.parametrize("flag", ["--warmup", "--model", "--logs", "--select", "--momentum", "--name"])
def test_a_flag_that_others_begin_with_means_itself(flag: str) -> None:
    assert build_parser(STRATEGIES)._option_string_actions[flag].dest == default_of(flag)
    value = () if OURS[flag].nargs == 0 else ("1",)
    parse(*SYNTHETIC, flag, *value)


def test_output_dir_is_logs() -> None:
    assert parse(*SYNTHETIC, "--output-dir", "runs").run.logs == "runs"


@pytest.mark.parametrize(("logs", "writes"), [("none", False), ("None", False), ("./logs/", True)])
def test_logs_none_writes_nothing(logs: str, writes: bool) -> None:
    assert parse(*SYNTHETIC, "--logs", logs).run.writes_logs is writes


# ---- help


def test_every_setting_has_a_help_line() -> None:
    assert [field.name for field in [*FIELDS, *OPTIONS] if not field.metadata["help"].strip()] == []


def test_help_shows_the_flags_that_matter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE)
    assert 15 <= len(flags) <= 25
    assert {"--train-data", "--model", "--batch-size", "--select", "--val-data", "--resume", "--help-all"} <= set(flags)
    assert "dissect-clip --train-data" in text
    assert [name for name in STRATEGIES if name not in text] == []


def test_help_all_shows_every_flag_strategy_and_refused_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help-all")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    shown = [*OURS, *STRATEGIES, *STRATEGIES.aliases, *(STRATEGIES[name].summary for name in STRATEGIES)]
    shown += [
        " ".join(f"{flag}: {entry.reason}. Instead: {entry.instead}.".split())
        for flag, entry in (UNSUPPORTED | REMOVED).items()
    ]
    assert [line for line in shown if line not in text] == []


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_help_names_the_default_and_the_range(field: dataclasses.Field[Any]) -> None:
    text = OURS["--" + field.name.replace("_", "-")].help or ""
    if field.metadata["within"] is not None:
        assert str(field.metadata["within"]) in text
    if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool) and field.default != "":
        assert "(default: %(default)r)" in text


def test_help_says_which_strategies_an_option_is_for_and_its_defaults() -> None:
    text = OURS["--warmup-point"].help or ""
    assert text.startswith("warmup_base_sampling, learnability, jest, clean_posterior: ")
    assert text.endswith("(default: 10, 5 with clean_posterior)")
    assert (OURS["--jest-chunks"].help or "").endswith("[at least 1] (default: 16)")


# ---- values


@pytest.mark.parametrize("flag", sorted(flag for flag, action in OURS.items() if type_name(action) in {"int", "float"}))
def test_a_word_is_no_number(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, flag, "many")
    assert flag in message
    assert "'many'" in message


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--select-rate", "0", "above 0 and at most 1"),
        ("--select-rate", "1.5", "above 0 and at most 1"),
        ("--select-rate", "nan", "above 0 and at most 1"),
        ("--warmup-select-rate", "-0.1", "above 0 and at most 1"),
        ("--select-momentum", "1.1", "at least 0 and at most 1"),
        ("--warmup-point", "-1", "at least 0"),
        ("--batch-size", "0", "at least 1"),
        ("--workers", "-1", "at least 0"),
        ("--accum-freq", "0", "at least 1"),
        ("--grad-clip-norm", "0", "above 0"),
        ("--force-image-size", "0", "at least 1"),
        ("--seed", "-1", "at least 0"),
        ("--seed", str(2**64), "at least 0 and below 1.84467e+19"),  # more than torch's generators take
        ("--beta1", "1", "at least 0 and below 1"),
        ("--beta2", "1.0", "at least 0 and below 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(
    flag: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *SELECT, flag, value)
    assert flag in message
    assert f"{value} is out of range: it must be {allowed}" in message


@pytest.mark.parametrize("field", [*FIELDS, *OPTIONS], ids=lambda field: field.name)
def test_every_default_is_allowed(field: dataclasses.Field[Any]) -> None:
    if field.default is not None and field.metadata["within"] is not None:
        assert field.default in field.metadata["within"]
    if field.default is not None and field.metadata["choices"] is not None:
        assert field.default in field.metadata["choices"]


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        (Range(above=0, at_most=1), (1e-9, 1.0), (0.0, 1.1, float("nan"))),
        (Range(at_least=0), (0.0, 5.0), (-0.1, float("nan"))),
        (Range(at_least=0, below=2**64), (0, 2**64 - 1), (-1, 2**64)),
        (Range(), (-1.0, 1.0), ()),
    ],
)
def test_range(within: Range, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert all(value in within for value in inside)
    assert not any(value in within for value in outside)


def test_an_unknown_strategy_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *SELECT, "--select-strategy", "smal_loss")
    assert "smal_loss" in message
    assert "did you mean small_loss?" in message
    assert all(name in message for name in STRATEGIES)
    assert "package.module:Class" in message
    assert "dissect_clip.strategies" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("small_loss+random", "'small_loss' is not of the form NAME:WEIGHT"),
        ("small_loss:1+random", "'random' is not of the form NAME:WEIGHT"),
        ("small_loss:1+", "'' is not of the form NAME:WEIGHT"),
        ("small_loss:1+:2", "':2' is not of the form NAME:WEIGHT"),
        ("small_loss:much+scan:1", "the weight of small_loss is 'much': it must be a number above 0"),
        ("small_loss:0+scan:1", "the weight of small_loss is '0': it must be a number above 0"),
        ("small_loss:nan+scan:1", "the weight of small_loss is 'nan'"),
        ("small_loss:inf+scan:1", "the weight of small_loss is 'inf'"),
        ("small_loss:1+small_loss:2", "small_loss is there twice"),
        ("small_loss:1+some.module:Class", "the weight of some.module is 'Class'"),
        ("dissect:1+warmup_base_sampling:1", "warmup_base_sampling is there twice"),
        ("small_loss:1", "a weight needs several strategies: give small_loss alone"),
        ("small_loss:1+smal:1", "'smal' is unknown: give one of small_loss, big_loss"),
    ],
)
def test_a_combination_that_cannot_be_read(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *SELECT, "--select-strategy", text)
    assert "--select-strategy" in message
    assert expected in message


def test_a_combination_is_read_in_order() -> None:
    assert split_combination("b:0.5+a:2") == {"b": 0.5, "a": 2.0}
    assert split_combination("a") == {"a": 1.0}
    assert list(split_combination("b:0.5+a:2")) == ["b", "a"]


def test_the_strategies_belong_to_the_parser_they_were_given_to(capsys: pytest.CaptureFixture[str]) -> None:
    entry = StrategyEntry("nowhere:Other", "another")
    build_parser(StrategyRegistry({"other": entry}, {}, describe))
    assert "'other'" not in refusal(capsys, *SELECT, "--select-strategy", "x")
    assert parse(*SELECT, "--select-strategy", "random").selection.select_strategy == "random"


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (("--slect-rate", "0.3"), "--select-rate"),
        (("--bach-size=3",), "--batch-size"),
        (("--train_data", "x"), "--train-data"),
    ],
)
def test_an_unknown_flag_suggests_a_known_one(
    words: tuple[str, ...], known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *SYNTHETIC, *words)
    assert "unrecognized arguments" in message
    assert f"did you mean {known}?" in message


def test_an_unknown_flag_that_resembles_nothing_suggests_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *SYNTHETIC, "--qqqq")
    assert "--qqqq" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED))
def test_a_refused_flag_says_why_and_what_instead(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry = UNSUPPORTED[flag]
    message = refusal(capsys, *SYNTHETIC, flag, *(("x",) if entry.takes_value else ()))
    assert message.startswith(f"error: {flag} is not supported: {entry.reason}. Instead: {entry.instead}.")


@pytest.mark.parametrize("words", [(flag,) for flag in REMOVED] + [(flag, "x") for flag in REMOVED], ids=" ".join)
def test_a_removed_flag_says_why_and_what_instead(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    entry = REMOVED[words[0]]
    message = refusal(capsys, *SYNTHETIC, *words)
    assert message.startswith(f"error: {words[0]} was removed: {entry.reason}. Instead: {entry.instead}.")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dissect", "warmup_base_sampling"),
        ("small_loss:0.30+dissect:0.7", "small_loss:0.30+warmup_base_sampling:0.7"),
        ("small_loss:0.30+random:0.7", "small_loss:0.30+random:0.7"),
    ],
)
def test_an_alias_is_the_published_name_everywhere(text: str, canonical: str) -> None:
    assert STRATEGIES.canonical_text(text) == canonical


def test_the_alias_is_written_to_the_config_under_the_published_name() -> None:
    assert parse(*SELECT, "--select-strategy", "dissect") == parse(*SELECT)


def test_config_json_holds_the_options_of_all_strategies_flat() -> None:
    written = json.loads(parse(*SELECT, "--select-strategy", "jest", "--jest-chunks", "4").to_json())
    assert written["jest_chunks"] == 4
    assert (written["warmup_point"], written["clean_decoys"], written["scan_period"]) == (10, 0.02, 3)
    assert "options" not in written


def test_an_abbreviated_refused_flag_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--torchscript is not supported" in refusal(capsys, *SYNTHETIC, "--torchs")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("scale=(0.5,1.0)",), {"scale": (0.5, 1.0)}),
        (("use_timm=True", "re_prob=0.2"), {"use_timm": True, "re_prob": 0.2}),
        (("auto_augment=rand-m9-n3-mstd0.5",), {"auto_augment": "rand-m9-n3-mstd0.5"}),
        (("text=a=b",), {"text": "a=b"}),
        (("empty=",), {"empty": ""}),
        ((), {}),
    ],
)
def test_aug_cfg(words: tuple[str, ...], expected: dict[str, object]) -> None:
    assert parse(*SYNTHETIC, "--aug-cfg", *words).model.aug_cfg == expected


@pytest.mark.parametrize("word", ["scale", "=1"])
def test_aug_cfg_refuses_what_is_no_pair(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *SYNTHETIC, "--aug-cfg", word)
    assert "--aug-cfg" in message
    assert "key=value" in message


@pytest.mark.parametrize(
    ("words", "size"), [((), None), (("64",), 64), (("64", "96"), (64, 96))], ids=["unset", "square", "two sides"]
)
def test_image_size_is_as_open_clip_takes_it(words: tuple[str, ...], size: object) -> None:
    assert parse(*SYNTHETIC, *(("--force-image-size", *words) if words else ())).model.image_size == size


def test_settings_survive_json() -> None:
    config = parse(*SELECT, "--epochs", "20", "--image-mean", "0.5", "0.5", "0.5", "--aug-cfg", "re_prob=0.2")
    read: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(config.to_json()).items()
    }
    assert Config.of(**read) == config


# ---- defaults that depend on other settings


def test_the_warm_up_trains_on_the_select_rate() -> None:
    assert parse(*SELECT, "--select-rate", "0.4").get("warmup_select_rate") == 0.4
    assert parse(*SELECT, "--select-rate", "0.4", "--warmup-select-rate", "1.0").get("warmup_select_rate") == 1.0


@pytest.mark.parametrize(
    ("argv", "trains"),
    [(("--train-data", "x.tar"), True), (SYNTHETIC, True), (("--val-data", "x.tar"), False)],
    ids=["shards", "synthetic", "evaluation"],
)
def test_a_run_without_training_data_only_evaluates(argv: tuple[str, ...], trains: bool) -> None:
    assert parse(*argv).data.trains is trains


def test_distillation_needs_both_of_its_flags() -> None:
    assert not parse(*SYNTHETIC).model.distill
    assert parse(*SYNTHETIC, "--distill-model", "RN50", "--distill-pretrained", "openai").model.distill


# ---- contradictions: a command line, and a part of the message it is refused with

TEACHER = "--distill-model RN50 --distill-pretrained openai"
CONTRADICTIONS = {
    "strategy without selection": ("--select-strategy random", "--select-strategy needs --select"),
    "rate without selection": ("--select-rate 0.5", "--select-rate needs --select"),
    "warm-up without selection": ("--warmup-point 2", "--warmup-point needs --select"),
    "warm-up rate without selection": ("--warmup-select-rate 0.5", "--warmup-select-rate needs --select"),
    "momentum without selection": ("--select-momentum 0.5", "--select-momentum needs --select"),
    "scoring in parts without selection": ("--score-batch-size 8", "--score-batch-size needs --select"),
    "patch dropout where nothing is scored": (
        "--select --select-strategy random --score-patch-dropout 0.5",
        "--score-patch-dropout has no meaning with --select-strategy random",
    ),
    "all negatives without selection": ("--select-negatives all", "--select-negatives needs --select"),
    "all negatives without a scoring pass": (
        "--select --select-strategy random --select-negatives all",
        "--select-negatives all needs a scoring pass: --select-strategy random has none",
    ),
    "all negatives and scores of earlier steps": (
        "--select --select-negatives all --select-preset fast",
        "--select-negatives all needs a scoring pass over the whole batch",
    ),
    "all negatives and accumulation": (
        "--select --select-negatives all --accum-freq 2",
        "--select-negatives all cannot be combined with --accum-freq above 1",
    ),
    "all negatives and another loss": (
        "--select --select-negatives all --siglip",
        "--select-negatives all works with the CLIP loss only",
    ),
    "score mode without selection": ("--select-score-mode train", "--select-score-mode needs --select"),
    "record without selection": ("--record", "--record needs --select"),
    "no epoch left after the warm-up": ("--select --epochs 10", "--warmup-point 10 leaves no epoch of --epochs 10"),
    "no warm-up": ("--select --warmup-point 0", "--warmup-point 0 leaves warmup_base_sampling without a reference"),
    "a warm-up rate that is never used": (
        "--select --select-strategy random --warmup-select-rate 1.0",
        "--warmup-select-rate has no meaning with --select-strategy random",
    ),
    "a warm-up rate that the first strategy has no use for": (
        "--select --select-strategy small_loss:1+warmup_base_sampling:1 --warmup-select-rate 1.0",
        "--warmup-select-rate has no meaning with --select-strategy small_loss:1+warmup_base_sampling:1",
    ),
    "no epoch left after the warm-up of the second": (
        "--select --select-strategy small_loss:1+warmup_base_sampling:1 --epochs 10",
        "--warmup-point 10 leaves no epoch of --epochs 10",
    ),
    "a shortcut where nothing is scored": (
        "--select --select-strategy infobatch --score-context-length 8",
        "--score-context-length has no meaning with --select-strategy infobatch, which scores nothing",
    ),
    "random in a combination": (
        "--select --select-strategy small_loss:1+random:1",
        "small_loss:1+random:1: random cannot be combined with others",
    ),
    "infobatch in a combination": (
        "--select --select-strategy infobatch:1+small_loss:1",
        "infobatch cannot be combined with others",
    ),
    "a prune ratio for another": (
        "--select --select-strategy random --infobatch-prune-ratio 0.5",
        "--infobatch-prune-ratio has no meaning with --select-strategy random: it is for infobatch",
    ),
    "rescaling for another": (
        "--select --select-strategy random --select-rescale off",
        "--select-rescale has no meaning with --select-strategy random",
    ),
    "a period for another": (
        "--select --select-strategy random --scan-period 2",
        "--scan-period has no meaning with --select-strategy random: it is for scan",
    ),
    "a rate and a prune ratio": (
        "--select --select-strategy infobatch --infobatch-prune-ratio 0.5 --select-rate 0.5",
        "--select-rate has no meaning with --infobatch-prune-ratio",
    ),
    "a schedule and a prune ratio": (
        "--select --select-strategy infobatch --infobatch-prune-ratio 0.5 --select-rate-schedule linear",
        "--select-rate-schedule has no meaning with --infobatch-prune-ratio",
    ),
    "a start without a schedule": (
        "--select --select-strategy random --select-rate-start 0.9",
        "--select-rate-start needs --select-rate-schedule linear or cosine",
    ),
    "a schedule without selection": ("--select-rate-schedule linear", "--select-rate-schedule needs --select"),
    "full epochs without selection": ("--select-full-last 0.5", "--select-full-last needs --select"),
    "less than a full epoch": (
        "--select --select-strategy random --select-full-last 0.1 --epochs 4",
        "--select-full-last 0.1 is less than half an epoch of --epochs 4",
    ),
    "full epochs alone": (
        "--select --select-strategy random --select-full-last 1 --epochs 4",
        "--select-full-last 1 leaves no epoch of --epochs 4",
    ),
    "full epochs after the warm-up": (
        "--select --warmup-point 6 --select-full-last 0.5 --epochs 12",
        "--select-full-last 0.5 leaves no epoch of --epochs 12",
    ),
    "no epoch left after preparation": (
        "--select --select-strategy scan --epochs 3",
        "--scan-warmup 2 and the epoch that finds candidates leave no epoch of --epochs 3",
    ),
    "factors without resampling": (
        "--train-data-upsampling-factors 1::2",
        "--train-data-upsampling-factors needs --dataset-resampled",
    ),
    "teacher without weights": ("--distill-model RN50", "--distill-model and --distill-pretrained go together"),
    "weights without teacher": ("--distill-pretrained openai", "--distill-model and --distill-pretrained go together"),
    "teacher and accumulation": (f"{TEACHER} --accum-freq 2", "--distill-model cannot be combined with --accum-freq"),
    "teacher and CoCa": (f"{TEACHER} --model coca_ViT-B-32", "--distill-model works with the CLIP loss only"),
    "teacher and SigLIP": (f"{TEACHER} --siglip", "--distill-model works with the CLIP loss only"),
    "SigLIP and CoCa": ("--siglip --model coca_ViT-B-32", "--siglip cannot be combined with a CoCa model"),
    "exchange without SigLIP": ("--loss-dist-impl shift", "--loss-dist-impl needs --siglip"),
    "cool-down of no length": ("--lr-scheduler const-cooldown", "const-cooldown needs --epochs-cooldown"),
    "unknown optimizer": ("--opt sgd", "--opt sgd is unknown: give adamw, or timm/NAME"),
    "one beta for timm": ("--opt timm/lamb --beta1 0.9", "give both --beta1 and --beta2, or none"),
    "two channels": ("--image-mean 0.5 0.5", "--image-mean takes 1 or 3 numbers: 2 given"),
    "four channels": ("--image-std 1 1 1 1", "--image-std takes 1 or 3 numbers: 4 given"),
    "three sides": ("--force-image-size 1 2 3", "--force-image-size takes 1 or 2 numbers: 3 given"),
    "unknown report": ("--report-to tensorbord", "--report-to tensorbord is unknown"),
    "newest checkpoint without a folder": ("--logs none --save-most-recent", "--save-most-recent needs a run folder"),
    "sync without a folder": ("--logs none --remote-sync s3://x", "--remote-sync needs a run folder"),
    "record without a folder": ("--logs none --select --record --epochs 20", "--record needs a run folder"),
    "code without a folder": ("--logs none --copy-codebase", "--copy-codebase needs a run folder"),
}


@pytest.mark.parametrize(("line", "expected"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_refused_with_its_flags(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *SYNTHETIC, *line.split())
    assert message.startswith("error: ")
    assert expected in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "nothing to do"),
        ("--select --val-data x.tar", "--select needs training data"),
        ("--dataset-type synthetic", "--dataset-type synthetic needs --train-num-samples"),
    ],
)
def test_a_run_without_its_data_is_refused(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refusal(capsys, *line.split())


@pytest.mark.parametrize(
    "line",
    [
        "--select --epochs 11",
        "--select --select-strategy random --epochs 1",
        "--select --select-strategy historical_base_sampling --epochs 1 --record",
        "--select --select-strategy warmup_base_sampling:0.7+small_loss:3e-1 --warmup-select-rate 1.0 --epochs 11",
        "--select --select-strategy small_loss:1+historical_base_sampling:2+warmup_base_sampling:1",
        "--select --select-strategy infobatch --infobatch-prune-ratio 0.5 --epochs 1",
        "--select --select-strategy scan --epochs 4 --select-rate 0.4",
        "--select --warmup-point 6 --select-full-last 0.4 --epochs 12 --select-rate-schedule cosine",
        "--siglip --loss-dist-impl gather",
        "--lr-scheduler const-cooldown --epochs-cooldown 2",
        "--opt timm/lamb --beta1 0.9 --beta2 0.99",
        "--report-to wandb,tensorboard",
        "--report-to all",
        "--logs none --select",
        "--dataset-resampled --train-data-upsampling-factors 1::2",
    ],
)
def test_what_makes_sense_is_accepted(line: str) -> None:
    assert parse(*SYNTHETIC, *line.split()).data.trains


def test_epochs_0_only_loads_and_evaluates_whatever_the_warm_up() -> None:
    assert parse(*SELECT, "--epochs", "0").training.epochs == 0
