"""Fails when a package that Hilum needs at run time is under the GPL, AGPL or a non-commercial licence.

Walks the requirements of the installed `hilum` distribution, with the extras that people install to use a model,
through the installed tree.
"""

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

EXTRAS = ("", "export", "fast", "hub", "openvino", "pacs", "serve", "tensorboard")
"""Of hilum itself; "" is what everybody has. Those of other packages are not followed."""
FORBIDDEN = re.compile(r"(?<!L)(?<!Lesser )\b(A?GPL|GNU (Affero )?General Public)|non-?commercial", re.IGNORECASE)


def licence_of(package: Distribution) -> str:
    """Everything a package's metadata says of its licence, without the licence texts themselves."""
    metadata = package.metadata
    short = [metadata.get("License-Expression") or "", (metadata.get("License") or "").split("\n")[0][:200]]
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License")]
    return " | ".join(text for text in [*short, *classifiers] if text)


def runtime_tree(name: str) -> dict[str, Distribution]:
    """All distributions that `name` pulls in on this platform, by normalised name."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        current = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if current in found:
            continue
        try:
            package = distribution(current)
        except PackageNotFoundError:
            sys.exit(f"{current} is required and not installed: run make setup.")
        found[current] = package
        for text in package.requires or []:
            requirement = Requirement(text)
            extras = EXTRAS if current == name else ("",)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(requirement.name)
    return found


def violations(tree: dict[str, Distribution]) -> list[str]:
    """One line for each forbidden package."""
    texts = {name: licence_of(package) for name, package in tree.items()}
    return [f"{name}: {text}" for name, text in sorted(texts.items()) if FORBIDDEN.search(text)]


if __name__ == "__main__":
    tree = runtime_tree("hilum")
    bad = violations(tree)
    print(f"licences: {len(tree)} packages at run time, {len(bad)} forbidden")
    sys.exit("\n".join(bad) if bad else 0)
