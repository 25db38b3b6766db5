"""From a command line to settings: the parser that the settings are declared for, and what it refuses."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Union

from dissect_clip.config.fields import Range
from dissect_clip.config.flags import REMOVED, UNSUPPORTED
from dissect_clip.config.settings import FAST, GROUP_OF, GROUPS, Config, declared
from dissect_clip.config.strategies import Flag, StrategyRegistry
from dissect_clip.config.validation import contradictions, default_preset


def _strategy_of(strategies: StrategyRegistry) -> Callable[[str], str]:
    """A converter for argparse that takes one strategy or a combination and gives canonical names."""

    def convert(text: str) -> str:
        try:
            return strategies.canonical_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


class _KeyValues(argparse.Action):
    """``key=value ...`` into a dict, values as Python literals where they are some that JSON can hold."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        pairs = {}
        for item in values:
            key, equals, text = item.partition("=")
            if not equals or not key:
                parser.error(f"argument {option}: {item!r} is not of the form key=value")
            pairs[key] = text
            with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                literal = ast.literal_eval(text)
                json.dumps(literal, allow_nan=False)
                pairs[key] = literal
        setattr(namespace, self.dest, pairs)


class _Refuse(argparse.Action):
    """Ends the run with the reason why a flag is not supported, or was removed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        removed = REMOVED.get(str(option))
        entry = UNSUPPORTED[str(option)] if removed is None else removed
        what = "is not supported" if removed is None else "was removed"
        parser.error(f"{option} {what}: {entry.reason}. Instead: {entry.instead}.")


class _ShowHelp(argparse.Action):
    """Prints a help text and ends with status 0."""

    def __init__(self, option_strings: Sequence[str], dest: str, text: Callable[[], str], help: str) -> None:  # noqa: A002
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.text = text

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        sys.stdout.write(self.text())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Says what was probably meant when a flag is unknown."""

    def error(self, message: str) -> NoReturn:
        for word in message.partition("unrecognized arguments:")[2].split():
            known = difflib.get_close_matches(word.split("=")[0], list(self._option_string_actions), n=1)
            if known:
                message += f" (did you mean {known[0]}?)"
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        where = "--help-all" if "--help-all" in self._option_string_actions else "--help"
        self.exit(2, f"error: {line}\nSee {where} for all flags.\n")


def _strip_none(hint: Any) -> Any:
    """``int | None`` -> ``int``."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    return hint


def _ranged(kind: Callable[[str], Any], within: Range) -> Callable[[str], Any]:
    """A converter for argparse that also checks the range."""

    def convert(text: str) -> Any:
        value = kind(text)
        if value not in within:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {within}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def add_argument(
    group: Any,
    field: dataclasses.Field[Any],
    hint: Any,
    convert: Callable[[str], str] | None = None,
    default: str | None = None,
    owners: str = "",
) -> None:
    """A setting as a flag.

    Args:
        hint: the type of its field.
        convert: reads a value instead of the type.
        default: the default as text, of an option of strategies: without the flag the option is then missing.
        owners: the strategies that have the option, as text.
    """
    facts = field.metadata
    names = ["--" + field.name.replace("_", "-"), *facts["aliases"]]
    kind = _strip_none(hint)
    has_default = field.default is not dataclasses.MISSING
    options: dict[str, Any] = {"dest": field.name, "default": field.default if has_default else {}}
    text = f"{owners}: {facts['help']}" if owners else facts["help"]
    shown = "%(default)r" if default is None else default
    if default is not None:
        options["default"] = argparse.SUPPRESS
    if kind is bool:
        options["action"] = "store_true"
    elif typing.get_origin(kind) is dict:
        options |= {"nargs": "*", "action": _KeyValues}
    else:
        if typing.get_origin(kind) is tuple:
            options["nargs"] = "+"
            kind = typing.get_args(kind)[0]
        options["type"] = kind if facts["within"] is None else _ranged(kind, facts["within"])
        options["type"] = convert or options["type"]
        options["choices"] = facts["choices"]
        if facts["within"] is not None:
            text += f" [{facts['within']}]"
        if field.default not in (None, "") and shown:
            text += f" (default: {shown})"
    if kind is not bool and facts["metavar"] is not None:
        options["metavar"] = facts["metavar"]
    group.add_argument(*names, help=text, **options)


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<26}{line}" for name, line in lines.items())


def _add_option(group: Any, name: str, owners: Mapping[str, Flag]) -> None:
    """An option as one flag, whichever strategies have it."""
    first, hint = next(iter(owners.values()))
    text = repr(first.default)
    for owner, (field, _) in owners.items():
        if field.default != first.default:
            text += f", {field.default!r} with {owner}"
    add_argument(group, first, hint, default=text, owners=", ".join(owners))


EXAMPLES = """\
examples:
  dissect-clip --train-data 'data/cc3m/{00000..00331}.tar' --model RN50 --batch-size 1024 \\
      --select --select-rate 0.3
  torchrun --nproc_per_node=8 src/main.py --train-data 'data/cc3m/{00000..00331}.tar' --model ViT-B-32"""


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the help of training says besides its flags."""

    commands: Mapping[str, str]
    """The other commands: a line about each, by name."""
    statuses: Mapping[int, str]
    """What each exit status means."""

    def __str__(self) -> str:
        statuses = "\n".join(f"  {status:<4}{meaning}" for status, meaning in self.statuses.items())
        return f"commands, each with its own --help:\n{_listed(self.commands)}\n\nexit status:\n{statuses}"


def build_parser(
    strategies: StrategyRegistry, surroundings: Surroundings | None = None, selected: str = ""
) -> argparse.ArgumentParser:
    """The command line of training. ``--help`` shows the common flags, ``--help-all`` all of them.

    The options of installed strategies, and of those that ``selected`` names, are flags besides this project's.

    Raises:
        ValueError: if a strategy that someone else wrote cannot be imported or does not fit.
    """
    known = strategies.known(selected)
    aliases = {own: f" (also: {alias})" for alias, own in strategies.aliases.items()}
    summaries = {name: strategies[name].summary + aliases.get(name, "") for name in known}
    others = "" if surroundings is None else f"\n\n{surroundings}"
    refused = "\n".join(f"  {flag}: {entry.reason}. Instead: {entry.instead}." for flag, entry in UNSUPPORTED.items())
    removed = "\n".join(f"  {flag}: {entry.reason}. Instead: {entry.instead}." for flag, entry in REMOVED.items())
    names = textwrap.fill(", ".join(known), 100, initial_indent="  ", subsequent_indent="  ")
    short = _with_flags(
        strategies,
        known,
        f"{EXAMPLES}\n\nstrategies:\n{names}\n\n--help-all shows all flags, what each strategy does, and the flags of "
        f"OpenCLIP that are refused.{others}",
        common_only=True,
    )
    parser = _with_flags(
        strategies,
        known,
        f"{EXAMPLES}\n\nstrategies:\n{_listed(summaries)}{others}\n\n"
        f"flags of OpenCLIP that are not supported:\n{refused}\n\n"
        f"flags of earlier versions that were removed:\n{removed}",
    )
    for one in (short, parser):
        one.add_argument("-h", "--help", action=_ShowHelp, text=short.format_help, help="show the common flags")
        one.add_argument("--help-all", action=_ShowHelp, text=parser.format_help, help="show all flags and strategies")
    for flag, entry in {**UNSUPPORTED, **REMOVED}.items():
        values = "?" if flag in REMOVED else int(entry.takes_value)
        parser.add_argument(flag, action=_Refuse, nargs=values, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return parser


def _with_flags(strategies: StrategyRegistry, known: Sequence[str], epilog: str, common_only: bool = False) -> Parser:
    """A parser of the settings and of the options of the ``known`` strategies; of the common ones with that mark."""
    parser = Parser(
        prog="dissect-clip",
        usage="%(prog)s [train] --train-data SHARDS [FLAGS]",
        description="Train CLIP with OpenCLIP's flags and, with --select, on the best part of every batch.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    sections = {name: parser.add_argument_group(settings.title) for name, settings in GROUPS.items()}
    for name, (field, hint) in declared().items():
        if field.metadata["common"] or not common_only:
            convert = _strategy_of(strategies) if name == "select_strategy" else None
            add_argument(sections[GROUP_OF[name]], field, hint, convert)
    options = parser.add_argument_group("options of strategies")
    for name, owners in strategies.flags(known).items():
        if name in GROUP_OF:
            raise ValueError(f"the option {name} of {next(iter(owners))} has the name of a flag: rename it")
        if not common_only or any(field.metadata["common"] for field, _ in owners.values()):
            _add_option(options, name, owners)
    return parser


def _selected(argv: Sequence[str]) -> str:
    """The value of ``--select-strategy`` in a command line, as far as it names classes of others; else empty."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--select-strategy", default="")
    try:
        text: str = finder.parse_known_args(argv)[0].select_strategy
    except argparse.ArgumentError:
        return ""  # the flag lacks its value: the full parser refuses it
    return text if ":" in text else ""


def default_adam(model: str) -> dict[str, float]:
    """AdamW's defaults for a model name, as in the CLIP paper (Radford et al., 2021, tables 18 to 20)."""
    if "vit" in model.lower():
        return {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1.0e-6}
    return {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1.0e-8}


def _completed_options(config: Config, strategies: StrategyRegistry) -> dict[str, Any]:
    """A value for every option of every known strategy: the first selected strategy that has it decides."""
    given, text, run = config.selection.options, config.selection.select_strategy, config.plan()
    values: dict[str, Any] = {}
    for name in [*strategies.members(text), *strategies.known(text)]:
        options = dataclasses.asdict(strategies.options(name, given).completed(run))
        values |= {option: value for option, value in options.items() if option not in values}
    return values


def completed(config: Config, strategies: StrategyRegistry) -> Config:
    """Fill in the defaults that depend on other settings."""
    filled = _completed_options(config, strategies)
    if not config.training.opt.startswith("timm/"):
        filled |= {k: v for k, v in default_adam(config.model.model).items() if config.get(k) is None}
    selection = config.selection
    preset = selection.select_preset or default_preset(config, strategies)
    filled["select_preset"] = preset
    fast = selection.select and preset == "fast"
    if selection.score_refresh is None:
        filled["score_refresh"] = FAST["score_refresh"] if fast else 1.0
    # Unasked, a strategy chooses before loading only if that is possible and saves time.
    implied = selection.select_preset is None and (config.data.dataset_resampled or selection.score_refresh == 1)
    if fast and not implied:
        filled["select_before_load"] = FAST["select_before_load"]
    return config.replace(**filled)


def parse_values(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Settings by name from a command line; several numbers or words are a tuple. Ends as :func:`parse_args` does."""
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if value == []:  # what argparse makes of --name=-- before Python 3.13
            parser.error(f"argument --{name.replace('_', '-')}: it cannot be --")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def parse_args(argv: Sequence[str], strategies: StrategyRegistry, surroundings: Surroundings | None = None) -> Config:
    """Settings from a command line; ``--help`` also shows the ``surroundings``.

    Raises:
        SystemExit: with status 2 and a message on stderr, if a flag is unknown or a value not allowed.
    """
    try:
        parser = build_parser(strategies, surroundings, _selected(argv))
    except ValueError as error:
        Parser(prog="dissect-clip").error(f"argument --select-strategy: {error}")
    values = parse_values(parser, argv)
    config = Config.of(**values)
    for line in contradictions(config, strategies):
        parser.error(line)
    return completed(config, strategies)
