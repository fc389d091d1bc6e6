"""hilum convert: a store to WebDataset tars, and WebDataset tars to a store. What INPUT is decides which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hilum.commands.build import BUDGET, check_budget, describe
from hilum.core.errors import ConfigError, ManifestError, UnknownNameError
from hilum.core.tracking import next_step, progress, say
from hilum.core.types import SPLITS
from hilum.data.build import build_store
from hilum.data.intensity import PREPROCESS_ID
from hilum.data.store import Store
from hilum.data.webdataset import ExportOptions, chosen, export
from hilum.data.webdataset_reading import Reading, read_tars, tars_of


@dataclass(frozen=True)
class ImportOptions:
    """How tars become a store."""

    size: int = 512
    """Pixels of the shorter side."""
    encoding: str = "jpeg95"
    dataset: str = "webdataset"
    """Dataset of samples that do not name theirs."""
    licence: str = ""
    """Licence tag of samples that do not name theirs."""
    split: str = ""
    """Split of samples that do not name theirs."""
    workers: int | None = None
    budget: float = BUDGET
    """Share of refused samples above which the command fails."""


def is_store(inputs: Sequence[Path]) -> bool:
    """Whether the input is one folder with the files of a store, finished or not."""
    if len(inputs) != 1:
        return False
    named = any((inputs[0] / name).exists() for name in ("store.json", "index.npz"))
    return named or any(path.suffix in (".bin", ".done") for path in (inputs[0] / "shards").glob("*"))


def refuse(given: Mapping[str, object], direction: str) -> None:
    """Raise ConfigError for options that are for the other direction.

    Args:
        given: option -> its value; None and False where it was not given.
        direction: what is being done, in words.
    """
    useless = [option for option, value in given.items() if value is not None and value is not False]
    if useless:
        raise ConfigError(f"{' and '.join(useless)}: not for {direction}. Leave it out.")


def to_tars(store: Path, out: Path, options: ExportOptions) -> None:
    """Write a store as WebDataset tars.

    Raises:
        ConfigError: a split that is not there, or a licence that does not let images be passed on.
        StoreError: not a finished store, damaged, or `out` holds other tars.
    """
    opened = Store.open(store)
    with progress("convert", len(chosen(opened, options.split)), "images") as bar:
        tars = export(opened, out, options, bar)
    say(f"{sum(tar.images for tar in tars)} images in {len(tars)} tars, {sum(tar.bytes for tar in tars) / 1e6:.1f} MB.")
    for dataset, licence in sorted({(tar.dataset, tar.licence) for tar in tars}):
        images = sum(tar.images for tar in tars if (tar.dataset, tar.licence) == (dataset, licence))
        say(f"  {dataset} ({licence or 'no licence named'}): {images}")
    say("With the ids of patients, studies and images." if options.with_ids else "Without ids of patients.")
    next_step(f"hilum verify {out}")


def to_store(inputs: Sequence[Path], out: Path, options: ImportOptions) -> None:
    """Read WebDataset tars, of ours or of other tools, into a store.

    Raises:
        StoreError: no tars there; a store of other data at `out`; or more than the budget was refused.
        ManifestError: what the samples say does not fit together, such as two intensity recipes.
    """
    if not 0 <= options.budget <= 1:
        raise ConfigError(f"--budget: expected a share between 0 and 1, found {options.budget}.")
    if options.split not in SPLITS:
        raise UnknownNameError("split", options.split, SPLITS)
    reading = read_tars(tars_of(inputs), options.dataset, options.split, options.licence)
    for line in _describe(reading):
        say(line)
    if len(reading.recipes) > 1:
        raise ManifestError(
            f"The tars come from stores of {' and '.join(reading.recipes)}, which are different intensity recipes. "
            "Read those of each recipe into a store of their own."
        )
    recipe = reading.recipes[0] if reading.recipes else PREPROCESS_ID
    summary = build_store(reading.manifest, out, options.size, options.encoding, options.workers, intensity=recipe)
    for line in describe(summary):
        say(line)
    check_budget(summary, out, options.budget)
    next_step(f"hilum pretrain RECIPE --data {out} --out RUN")


def _describe(reading: Reading) -> list[str]:
    lines = [
        f"{reading.samples} samples in {reading.tars} tars: {len(reading.manifest)} to read, "
        f"{reading.duplicates} copies of another left out."
    ]
    if reading.unlabelled:
        lines.append(f"  {reading.unlabelled} without labels (only `labels` of a sample's json is read)")
    if reading.others:
        lines.append(f"  {reading.others} other members left out")
    return lines
