"""From a command line to settings: the parser that the settings are declared for, and what it refuses."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Union

from dissect_clip.config.fields import Range
from dissect_clip.config.flags import UNSUPPORTED
from dissect_clip.config.settings import (
    CLEAN_POSTERIOR,
    FAST,
    GROUP_OF,
    GROUPS,
    Config,
    declared,
    default_adam,
    parse_strategy,
)
from dissect_clip.config.validation import contradictions


def _strategy_of(known: Sequence[str]) -> Callable[[str], str]:
    """A converter for argparse that takes strategies by these names."""

    def convert(text: str) -> str:
        try:
            members = parse_strategy(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        for name in members:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown: give one of {', '.join(known)}")
        return text

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
    """Ends the run with the reason why a flag of OpenCLIP is not supported."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        entry = UNSUPPORTED[str(option)]
        parser.error(f"{option} is not supported: {entry.reason}. Instead: {entry.instead}.")


class Parser(argparse.ArgumentParser):
    """Says what was probably meant when a flag is unknown."""

    def error(self, message: str) -> NoReturn:
        for word in message.partition("unrecognized arguments:")[2].split():
            known = difflib.get_close_matches(word.split("=")[0], list(self._option_string_actions), n=1)
            if known:
                message += f" (did you mean {known[0]}?)"
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        self.exit(2, f"error: {line}\nSee --help for all flags.\n")


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
    group: Any, field: dataclasses.Field[Any], hint: Any, convert: Callable[[str], str] | None = None
) -> None:
    """A setting as a flag; ``hint`` is the type of its field, ``convert`` reads it instead of the type."""
    facts = field.metadata
    names = ["--" + field.name.replace("_", "-"), *facts["aliases"]]
    kind = _strip_none(hint)
    has_default = field.default is not dataclasses.MISSING
    options: dict[str, Any] = {"dest": field.name, "default": field.default if has_default else {}}
    text = facts["help"]
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
        if field.default not in (None, ""):
            text += " (default: %(default)r)"
    if kind is not bool and facts["metavar"] is not None:
        options["metavar"] = facts["metavar"]
    group.add_argument(*names, help=text, **options)


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<26}{line}" for name, line in lines.items())


def build_parser(strategies: Mapping[str, str], commands: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """The command line. ``strategies`` and ``commands`` map names to one line about each."""
    others = f"other commands, each with its own --help:\n{_listed(commands)}\n\n" if commands else ""
    refused = "\n".join(f"  {flag}: {entry.reason}. Instead: {entry.instead}." for flag, entry in UNSUPPORTED.items())
    parser = Parser(
        prog="dissect-clip",
        description="Train CLIP with OpenCLIP's flags and, with --select, on the best part of every batch.",
        epilog=f"{others}strategies:\n{_listed(strategies)}\n\nflags of OpenCLIP that are not supported:\n{refused}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sections = {name: parser.add_argument_group(settings.title) for name, settings in GROUPS.items()}
    for name, (field, hint) in declared().items():
        convert = _strategy_of(tuple(strategies)) if name == "select_strategy" else None
        add_argument(sections[GROUP_OF[name]], field, hint, convert)
    for flag, entry in UNSUPPORTED.items():
        parser.add_argument(flag, action=_Refuse, nargs=1 if entry.takes_value else 0, help=argparse.SUPPRESS)
    return parser


def completed(config: Config) -> Config:
    """Fill in the defaults that depend on other settings."""
    filled: dict[str, Any] = {}
    if not config.training.opt.startswith("timm/"):
        filled = {k: v for k, v in default_adam(config.model.model).items() if config.get(k) is None}
    clean = config.selection.select_strategy == CLEAN_POSTERIOR
    if config.selection.warmup_select_rate is None:
        filled["warmup_select_rate"] = 1.0 if clean else config.selection.select_rate
    filled["warmup_point"] = config.selection.warmup_epochs
    filled["select_preset"] = config.selection.preset
    fast = config.selection.select and config.selection.preset == "fast"
    if config.selection.score_refresh is None:
        filled["score_refresh"] = FAST["score_refresh"] if fast else 1.0
    # By itself the strategy chooses before loading only where that can be done and saves anything.
    implied = config.selection.select_preset is None and (
        config.data.dataset_resampled or config.selection.score_refresh == 1
    )
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


def parse_args(argv: Sequence[str], strategies: Mapping[str, str], commands: Mapping[str, str] | None = None) -> Config:
    """Settings from a command line; ``--help`` mentions the ``commands``.

    Raises:
        SystemExit: with status 2 and a message on stderr, where a flag is unknown or a value not allowed.
    """
    parser = build_parser(strategies, commands)
    values = parse_values(parser, argv)
    config = Config.of(**{name: value for name, value in values.items() if name in GROUP_OF})
    for line in contradictions(config):
        parser.error(line)
    return completed(config)
