"""Weights by name: a path, or `owner/name` on the Hugging Face Hub through the optional package `huggingface_hub`.

The only place that may use the network, and only when asked for a name that is no path, or to send a model.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hilum.core.errors import CheckpointError

_HUB_NAME = re.compile(r"^(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w.-]+))?$")
_DESCRIPTIONS = ["config.json", "preprocessor_config.json", "seen.npz"]
"""Beside weights: what they are, how their images were normalised, and, of Hilum's own, which images they have met."""
_WEIGHTS = ["model.safetensors", "teacher.safetensors"]
_PICKLED = ["pytorch_model.bin"]
"""Taken only from a repository without safetensors."""


def resolve_weights(name: Path | str) -> Path:
    """Find weights: a path that exists, else `owner/name` or `owner/name@revision` on the Hugging Face Hub.

    Downloads go to the Hub's own cache and happen once; with `HF_HUB_OFFLINE=1` only that cache is read.

    Raises:
        CheckpointError: neither a path nor a name that can be had; the message says what is missing.
    """
    path = Path(name)
    if path.exists():
        return path
    match = _HUB_NAME.match(str(name))
    if match is None or path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".json", ".yaml"):
        raise CheckpointError(f"{path} does not exist; expected a run folder or a .safetensors file.")
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{path} does not exist; expected a run folder or a .safetensors file. To take it as a name on the "
            'Hugging Face Hub, install the extra: pip install "hilum[hub]".'
        )
    return _download(match["repository"], match["revision"])


@cache
def _download(repository: str, revision: str | None) -> Path:
    import huggingface_hub  # optional

    try:
        for weights in (_WEIGHTS, _PICKLED):
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[*_DESCRIPTIONS, *weights]
            )
            if any((Path(folder) / file).is_file() for file in weights):
                return Path(folder)
    except (OSError, ValueError) as error:
        raise _not_had(repository, revision, error) from error
    raise CheckpointError(
        f"{repository} on the Hugging Face Hub holds none of {', '.join(_WEIGHTS + _PICKLED)}. If its weights have "
        "another name, download that file and name its path."
    )


def parse_name(name: str) -> tuple[str, str | None]:
    """`owner/name` or `owner/name@revision` as a repository and a revision.

    Raises:
        CheckpointError: anything else.
    """
    match = _HUB_NAME.match(name)
    if match is None:
        raise CheckpointError(f"{name} does not exist; expected a folder, or owner/name on the Hugging Face Hub.")
    return match["repository"], match["revision"]


def _not_had(repository: str, revision: str | None, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{repository} does not exist here, and could not be had from the Hugging Face Hub"
        f"{f' at revision {revision}' if revision else ''}: {_first_line(error)} Behind a firewall, copy the "
        "folder and name its path."
    )


def fetch(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download the named files of a repository, and no others; returns the folder of the Hub's cache that holds them.

    With `HF_HUB_OFFLINE=1` only the cache is read.

    Raises:
        CheckpointError: the package is missing, or the repository cannot be had.
    """
    hub = _package()
    escaped = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]  # the library takes patterns
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=escaped))
    except (OSError, ValueError) as error:
        raise _not_had(repository, revision, error) from error


def publish(repository: str, content: Mapping[str, Path | bytes], private: bool, message: str) -> str:
    """Send files as one commit; returns its address.

    Args:
        repository: owner/name; made if it is not there.
        content: place in the repository -> file, or its bytes.
        private: whether a new repository is.
        message: of the commit.

    Raises:
        CheckpointError: not a name, the package is missing, or the Hub refuses.
    """
    parse_name(repository)
    hub = _package()
    operations = [
        hub.CommitOperationAdd(place, source if isinstance(source, bytes) else str(source))
        for place, source in content.items()
    ]
    try:
        interface = hub.HfApi()
        interface.create_repo(repository, private=private, exist_ok=True)
        return str(interface.create_commit(repository, operations, commit_message=message).commit_url)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{repository}: the Hugging Face Hub refuses: {_first_line(error)}") from error


def _package() -> Any:
    if find_spec("huggingface_hub") is None:
        raise CheckpointError('Names on the Hugging Face Hub need the extra: pip install "hilum[hub]".')
    import huggingface_hub  # optional

    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
