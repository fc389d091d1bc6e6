"""What the outputs of an imported head are called: their order, their names in Hilum's words, and how rare they are."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from hilum.core.errors import ConfigError
from hilum.data.labels import CXRLT_2024_TASK1, SAME_FINDING, TASKS, canonical, frequency_groups
from hilum.deploy import model_files as files

POSITIVES = (
    3409, 65376, 199, 4239, 74738, 168, 15371, 37256, 3661, 29628, 1169, 2803, 11568, 2965, 3986, 646, 727, 10087, 778,
    129, 2338, 77482, 5288, 7531, 34292, 66401, 616, 3272, 704, 46660, 516, 13858, 1631, 903, 8919, 172, 2046, 86079,
    3336, 2078,
)  # fmt: skip
"""Of the 258,871 training images of CXR-LT 2024 Task 1, in its order: they say which finding is rare, no more."""
TRAIN_IMAGES = 258_871


def read_names(path: Path | None, outputs: int) -> tuple[str, ...]:
    """Names of the outputs of a head, in order, as Hilum's findings.

    A file has one line for each output: its name, or `name = FINDING` to keep a finding that Hilum does not know, or to
    map a name by hand; # starts a comment. A name alone must be one of Hilum's vocabulary, in any case.

    Raises:
        ConfigError: other than `outputs` names, a name twice, or one that Hilum does not know.
    """
    if path is None:
        if outputs != len(CXRLT_2024_TASK1):
            raise ConfigError(
                f"The head has {outputs} outputs; only the order of {len(CXRLT_2024_TASK1)} is known (CXR-LT 2024 Task "
                "1). Name them in their order, one a line: --findings FILE."
            )
        return CXRLT_2024_TASK1
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    names, unknown = [], []
    vocabulary = _vocabulary()
    for line in filter(None, lines):
        given, equals, wanted = (part.strip() for part in line.partition("="))
        name = wanted if equals else SAME_FINDING.get(given, canonical(given))
        if not name or (not equals and name not in vocabulary):
            near = difflib.get_close_matches(given, sorted(vocabulary), n=1)
            unknown.append(f"{given!r}" + (f" (nearest: {near[0]!r})" if near else ""))
        names.append(name)
    if unknown:
        raise ConfigError(
            f"{path}: Hilum has no finding {', '.join(unknown)}. Write `name = FINDING` to map a name, or "
            "`name = name` to keep it as it is."
        )
    if len(names) != outputs or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(
            f"{path}: expected {outputs} different findings, one a line, in the order of the head's outputs; found "
            f"{len(names)}{', twice ' + ', '.join(twice) if twice else ''}."
        )
    return tuple(names)


def _vocabulary() -> set[str]:
    return {SAME_FINDING.get(name, canonical(name)) for names in TASKS.values() for name in names}


def findings_of(names: Sequence[str]) -> tuple[files.Finding, ...]:
    """What `config.json` says of outputs of which no training image was counted; groups are those of CXR-LT 2024."""
    groups = frequency_groups(dict(zip(CXRLT_2024_TASK1, POSITIVES, strict=True)), TRAIN_IMAGES)
    return tuple(files.Finding(name, groups.get(name, ""), trained=True, positives=0, known=0) for name in names)
