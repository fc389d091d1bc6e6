"""Heads that other projects have released, by the names and shapes of their tensors: pure functions, no files.

One layout: RPIDIAL/CheXFound's linear_glori.py, which trains one head for every learning rate side by side and saves
them all under `classifiers_dict.<name>.` in one file. The tensors of each are those of `ml_decoder.MLDecoder`, name by
name. Anything that has no place is left for the caller to refuse.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hilum.core.errors import CheckpointError, UnknownNameError
from hilum.heads.registry import HeadConfig, on_meta

Shape = tuple[int, ...]

ATTENTION_HEADS = 8
"""Of the released decoder; shapes do not tell."""
BEST = "best"
_WRAPPERS = re.compile(r"^(?:state_dict\.|model\.|module\.)+")
_NAMED = re.compile(r"^classifiers_dict\.(?P<head>.+?)\.(?:module\.)?(?P<tensor>(?:decoder|linear)\..+)$")
_TRAINING_STATE = ("optimizer.", "scheduler.", "lr_scheduler.")
_SETTINGS = re.compile(r"blocks=(?P<blocks>\d+):avgpool=(?P<avgpool>True|False):lr=(?P<rate>[\d_e+-]+)$")
_SHOWN = 6


@dataclass(frozen=True)
class ReleasedHead:
    """One head of a file."""

    name: str
    """As the file has it, for example "linear:blocks=4:avgpool=False:lr=0_0001000000"; "" where it has no name."""
    sources: dict[str, str]
    """Hilum's name of a tensor -> the file's."""

    @property
    def learning_rate(self) -> float | None:
        """That its name tells."""
        found = _SETTINGS.search(self.name)
        try:
            return float(found["rate"].replace("_", ".")) if found else None
        except ValueError:
            return None


class HeadsOfFile(NamedTuple):
    """The heads of a file, in its order, and what else is in it."""

    heads: dict[str, ReleasedHead]
    left_out: dict[str, list[str]]
    """Reason -> the file's keys that are known not to be a head."""


def read_heads(shapes: Mapping[str, Shape], where: str) -> HeadsOfFile:
    """Find the heads among the tensors of a file.

    Args:
        shapes: of every tensor.
        where: names the file in errors.

    Raises:
        CheckpointError: no decoder among them, a tensor that belongs to none, or two keys that are one tensor.
    """
    heads: dict[str, dict[str, str]] = {}
    left_out: dict[str, list[str]] = {}
    strangers = []
    for key in shapes:
        if key.startswith(_TRAINING_STATE):
            left_out.setdefault("state of the optimiser and its schedule", []).append(key)
            continue
        bare = _WRAPPERS.sub("", key)
        named = _NAMED.match(bare)
        head, tensor = (named["head"], named["tensor"]) if named else ("", bare)
        if not tensor.startswith(("decoder.", "linear.")):
            strangers.append(key)
            continue
        if tensor in heads.setdefault(head, {}):
            raise CheckpointError(f"{where}: {heads[head][tensor]} and {key} are both {tensor}; expected one of them.")
        heads[head][tensor] = key
    if strangers:
        raise CheckpointError(
            f"{where}: {len(strangers)} tensors belong to no head: {_listed(strangers)}. Expected a file of "
            "CheXFound's heads, classifiers_dict.<name>.decoder.*"
        )
    decoders = {name: found for name, found in heads.items() if any(one.startswith("decoder.") for one in found)}
    if not decoders:
        found = "linear heads alone" if heads else "none"
        raise CheckpointError(f"{where}: expected a decoder (classifiers_dict.<name>.decoder.*), found {found}.")
    for name in heads.keys() - decoders.keys():
        left_out.setdefault("a linear head", []).extend(heads[name].values())
    return HeadsOfFile({name: ReleasedHead(name, found) for name, found in decoders.items()}, left_out)


def choose_head(heads: Mapping[str, ReleasedHead], name: str | None, where: str) -> ReleasedHead:
    """One of the heads.

    Args:
        heads: of a file.
        name: of the head; a part of a name that only one head has is enough. None: the only one.
        where: names the file in errors.

    Raises:
        UnknownNameError: no such head.
        CheckpointError: several, and none is named, or more than one fits.
    """
    if name is None and len(heads) == 1:
        return next(iter(heads.values()))
    fitting = [one for one in heads if name is not None and (name == one or name in one)]
    exact = [one for one in fitting if one == name]
    if len(exact or fitting) == 1:
        return heads[(exact or fitting)[0]]
    if name is not None and not fitting:
        raise UnknownNameError(f"head of {where}", name, heads)
    listed = "; ".join(fitting or heads)
    raise CheckpointError(
        f"{where} holds {len(fitting or heads)} heads{' of that name' if name else ''}: {listed}. Say which, by its "
        f"name or its rate (--head-name lr=0_0001), or --head-name {BEST} with the results file beside it."
    )


def head_config(head: ReleasedHead, shapes: Mapping[str, Shape], embed_dim: int, where: str) -> HeadConfig:
    """The decoder that these tensors are, checked tensor by tensor.

    Args:
        head: of the file.
        shapes: of every tensor of the file.
        embed_dim: D of the backbone.
        where: names the file in errors.

    Raises:
        CheckpointError: a tensor missing, unexpected or of another shape, or a width that does not fit the backbone.
    """
    found = {name: tuple(shapes[key]) for name, key in head.sources.items()}
    needed = ("decoder.embed_standart.weight", "decoder.layers.0.linear1.weight", "decoder.duplicate_pooling",
              "decoder.duplicate_pooling_bias", "decoder.query_embed.weight")  # fmt: skip
    axes = dict(zip(needed, (2, 2, 3, 1, 2), strict=True))
    if wrong := [name for name in needed if len(found.get(name, ())) != axes[name]]:
        listed = ", ".join(f"{name} {found.get(name, 'missing')}" for name in wrong)
        raise CheckpointError(f"{where}: the head {head.name!r} is not a decoder of this kind: {listed}.")
    dim, memory = found[needed[0]]
    findings, queries = found[needed[3]][0], found[needed[4]][0]
    width = found[needed[2]][1]
    if memory % embed_dim or width not in (dim, dim + memory) or dim % ATTENTION_HEADS:
        raise CheckpointError(
            f"{where}: the head {head.name!r} reads {memory} channels, has queries of {dim} and output rows of {width};"
            f" with a backbone of {embed_dim} channels expected a multiple of {embed_dim}, queries in "
            f"{ATTENTION_HEADS} attention heads, and rows of {dim} (or {dim + memory} with [CLS]). Is this the head of "
            "another backbone?"
        )
    blocks = memory // embed_dim
    told = _SETTINGS.search(head.name)
    if told and (int(told["blocks"]) != blocks or told["avgpool"] == "True"):
        raise CheckpointError(
            f"{where}: the head is called {head.name!r}, and its tensors read {blocks} blocks without pooling."
        )
    layers = {int(match[1]) for name in found if (match := re.match(r"^decoder\.layers\.(\d+)\.", name))}
    config = HeadConfig(
        "ml_decoder", embed_dim, findings, blocks=blocks, decoder_dim=dim,
        decoder_feed_forward=found[needed[1]][0], decoder_heads=ATTENTION_HEADS, cat_cls=width > dim,
        decoder_layers=len(layers), query_groups=None if queries == findings else queries,
    )  # fmt: skip
    expected = {name: tuple(value.shape) for name, value in on_meta(config).state_dict().items()}
    problems = [f"missing: {_listed(sorted(expected.keys() - found.keys()))}"] * bool(expected.keys() - found.keys())
    problems += [f"unexpected: {_listed(sorted(found.keys() - expected.keys()))}"] * bool(
        found.keys() - expected.keys()
    )
    shared = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    problems += [f"{name} is {found[name]}, expected {expected[name]}" for name in shared[:_SHOWN]]
    if problems:
        raise CheckpointError(f"{where}: the head {head.name!r} does not fit: {'; '.join(problems)}.")
    return config


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
