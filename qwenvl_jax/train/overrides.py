"""Settings from the command line: `--seed 3 --stages.s1.optimizer.learning_rate 0.01 --steps 20`.

A name is dotted; an entry of `stages` goes by its name or number; a stage's setting without that prefix is meant for
every stage. Values are read by tyro, by the type of the setting; paths make data sets where there are none yet:
`--validation.data held.jsonl`.
"""

import collections
import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Sequence
from pathlib import Path

from qwenvl_jax.data.mixture import MixturePart
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.config import TrainConfig


def apply_overrides(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """Returns `config` with `--name value ...` or `--name=value` arguments applied; the last of the same name counts.

    Names are those that the config has, and all values are in place before what goes together is checked: rows and
    groups of a batch may be given in either order.

    Raises:
      ConfigError: an unknown name (with the nearest known one), a missing value, one of the wrong type, or a setting of
        a validation that has no data.
    """
    given = {path: (values, name) for name, values in _pairs(arguments) for path in _targets(config, name)}
    changed = _replaced(config, given)
    _check_judged(changed, given)
    return changed


def _check_judged(config: TrainConfig, given: dict[tuple[str, ...], tuple[list[str], str]]) -> None:
    """Refuses a name that sets nothing but how stages are judged that are judged by nothing."""
    heard: dict[str, bool] = {}
    for path, (_, name) in given.items():
        silent = path[2:3] == ("validation",) and not config.stages[int(path[1])].validation.data
        heard[name] = heard.get(name, False) or not silent
    for name, is_heard in heard.items():
        if not is_heard:
            data = f"{name.rpartition('.')[0]}.data"
            raise ConfigError(f"--{name} does nothing without data to judge by; add --{data} held-out.jsonl.")


def _pairs(arguments: Sequence[str]):
    """(name, values) of each `--name`; a value may begin with one dash (a negative number) but not with two."""
    pairs: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            pairs.append((name, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(argument)
        else:
            raise ConfigError(f"unexpected argument {argument!r}; settings are given as --name value.")
    return pairs


def _targets(config: TrainConfig, name: str) -> list[tuple[str, ...]]:
    """The places that a name means: one, or one in each stage."""
    known = {path: steps for steps in _paths(config) for path in _spellings(config, steps)}
    short = {path.split(".", 2)[2] for path in known if path.startswith("stages.")}
    # Dashes may stand for underscores; in the names of stages and data sets both may be meant.
    name = name if name in {*known, *short} else _undashed({*known, *short}).get(name.replace("-", "_"), name)
    if name in known:
        return [known[name]]
    everywhere = [
        known[f"stages.{number}.{name}"] for number in range(len(config.stages)) if f"stages.{number}.{name}" in known
    ]
    if everywhere:
        return everywhere
    nearest = difflib.get_close_matches(name, [*known, *short], n=1, cutoff=0.0)
    raise ConfigError(f"unknown setting --{name}; did you mean --{nearest[0]}?")


def _undashed(names: set[str]) -> dict[str, str]:
    """Names by what they are with underscores for dashes, where that is one name's alone."""
    counts = collections.Counter(name.replace("-", "_") for name in names)
    return {one: name for name in names if counts[one := name.replace("-", "_")] == 1}


def _paths(node, prefix: tuple[str, ...] = ()):
    """The path of every single setting."""
    if dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _paths(getattr(node, field.name), (*prefix, field.name))
    elif isinstance(node, tuple) and node and all(dataclasses.is_dataclass(item) for item in node):
        for number, item in enumerate(node):
            yield from _paths(item, (*prefix, str(number)))
    else:
        yield prefix


def _spellings(config: TrainConfig, path: tuple[str, ...]) -> list[str]:
    named, node = [], config
    for step in path:
        if isinstance(node, tuple):
            node = node[int(step)]
            named.append(node.name)
        else:
            node = getattr(node, step)
            named.append(step)
    numbered = path[:2] + tuple(named[2:])
    return list(dict.fromkeys(".".join(spelling) for spelling in (path, tuple(named), numbered)))


def _replaced(node, given: dict[tuple[str, ...], tuple[list[str], str]]):
    """`node` with the setting at each path read from the values, given with the name that they came under."""
    inside: dict[str, dict] = {}
    for (head, *rest), value in given.items():
        inside.setdefault(head, {})[tuple(rest)] = value
    if isinstance(node, tuple):
        return tuple(_replaced(item, inside[str(i)]) if str(i) in inside else item for i, item in enumerate(node))
    changes = {}
    for head, below in inside.items():
        if () in below:
            changes[head] = _parsed(typing.get_type_hints(type(node))[head], *below[()])
        else:
            changes[head] = _replaced(getattr(node, head), below)
    return dataclasses.replace(node, **changes)


def _parsed(annotation, values: list[str], name: str):
    """The value of a setting of this type, read by tyro."""
    import tyro

    if not values:
        raise ConfigError(f"--{name} needs a value.")
    if MixturePart in typing.get_args(annotation):
        return _data_sets(values, name)
    if annotation is typing.Any:
        # A data source: a path, or several.
        annotation = str if len(values) == 1 else tuple[str, ...]
    elif dataclasses.is_dataclass(annotation) or dataclasses.is_dataclass(
        next(iter(typing.get_args(annotation)), None)
    ):
        # The model: a shape in a config file, a name or path on the command line.
        annotation = str
    shown = " ".join(values)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
            return tyro.cli(annotation, args=values, prog=name, console_outputs=False)
    except SystemExit as error:
        kind = getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
        kind = str(kind).replace("typing.", "")
        raise ConfigError(f"--{name} {shown}: expected a value of type {kind}; give one.") from error


def _data_sets(paths: list[str], name: str) -> tuple[MixturePart, ...]:
    """A data set for each path; of several, each is called as its file is."""
    names = [Path(path).stem for path in paths] if len(paths) > 1 else [""]
    if not all(paths) or len(set(names)) < len(names):
        raise ConfigError(
            f"--{name} {' '.join(paths)}: expected paths of data sets, no two of the same name; give those."
        )
    return tuple(map(MixturePart, names, paths))
