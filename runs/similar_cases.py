"""Similar cases: do the nearest studies have what the query has, by the whole image and by one finding's query?

    python runs/similar_cases.py MODEL STORE OUT

Fixed before it is run:

- Index: all studies of the store, and, apart from that, its test studies alone, whose labels no part of the model has
  met. Queries: every test study that has the finding, its own patient left out. Neighbours: 5.
- Findings: those that at least 10 test studies have, and that the model was trained on.
- Measure: share of the neighbours that have the finding, of those whose label is known; mean over the queries. Chance:
  what neighbours drawn at random would give, the share of the indexed studies of other patients that have it.
- Intervals: 95 %, 1,000 resamples of the query patients, seed 0; the index stays as it is. The mean over findings is
  resampled as one. "not shown" where a difference from chance, or between the two searches, includes 0.

Writes OUT/similar_cases.json, and the index beside it.
"""

import sys
from pathlib import Path

import numpy as np

from hilum.core.files import write_json
from hilum.core.tracking import progress, say
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.data.store import Store
from hilum.deploy.encoder import load_encoder
from hilum.deploy.index_building import build_index
from hilum.deploy.nearest import nearest
from hilum.deploy.similar import HEADER_NAME, Index

NEIGHBOURS, LEAST, RESAMPLES, SEED = 5, 10, 1000, 0


def main(model: str, data: str, out: Path) -> None:
    """Make both indexes, judge them, print and write the tables."""
    store, encoder = Store.open(Path(data)), load_encoder(model, "cpu")
    trained = [name for name, known in zip(encoder.findings, encoder.trained, strict=True) if known]
    wanted = [name for name in trained if name in store.findings and _studies(store, name) >= LEAST]
    table = {}
    for scope, indices in (("all", np.arange(len(store))), ("test", store.indices("test"))):
        path = out / f"index_{scope}"
        if not (path / HEADER_NAME).exists():
            with progress(f"index {scope}", len(indices), "images") as bar:
                build_index(encoder, store, indices, path, wanted, done=bar.advance, model_path=model)
        table[scope] = judge(Index.open(path), store, wanted)
        show(scope, table[scope])
    write_json(out / "similar_cases.json", {"model": encoder.model, "findings": wanted, **table})


def _studies(store: Store, finding: str) -> int:
    test = store.indices("test")
    has = test[store.labels[test, store.findings.index(finding)] == POSITIVE]
    return len(set(store.studies[has].tolist()))


def judge(index: Index, store: Store, findings: list[str]) -> dict[str, dict]:
    """Shares by finding and for their mean, with intervals."""
    rows = range(len(index))
    cases = [index.case(row) for row in rows]
    place = {uid: number for number, uid in enumerate(store.uids.tolist())}
    patients = np.array([store.patients[place[case.image_uid]] for case in cases])
    splits = np.array([store.splits[place[case.image_uid]] for case in cases])
    names, patient = np.unique(patients[splits == "test"], return_inverse=True)
    number = np.full(len(cases), -1)
    number[splits == "test"] = patient
    rng = np.random.default_rng(SEED)
    draws = np.stack([np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
                      for _ in range(RESAMPLES)])  # fmt: skip
    result, replicas = {}, []
    for finding in findings:
        label = np.array([case.findings.get(finding, -1) for case in cases])
        queries = np.flatnonzero((splits == "test") & (label == POSITIVE))
        values = np.array([
            [_share(index, row, label, patients), _share(index.finding(finding), row, label, patients),
             _chance(label, patients != patients[row])]
            for row in queries.tolist()
        ])  # fmt: skip
        weights = draws[:, number[queries]].astype(float)  # resample, query
        replica = weights @ values / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
        replica[weights.sum(axis=1) == 0] = np.nan
        replicas.append(replica)
        result[finding] = _row(values.mean(axis=0), replica) | {"queries": len(queries)}
    points = np.mean([[one["image"], one["finding"], one["chance"]] for one in result.values()], axis=0)
    result["mean"] = _row(points, np.nanmean(replicas, axis=0)) | {"queries": None}
    return result


def _share(index: Index, row: int, label: np.ndarray, patients: np.ndarray) -> float:
    """Of the nearest studies of other patients whose label is known, how many have the finding."""
    query = index.vectors[row].astype(np.float64)
    banned = (patients == patients[row]) | ~np.isin(label, (POSITIVE, NEGATIVE))
    found, _ = nearest(index.vectors, index.lengths, index.centre, query / np.linalg.norm(query), NEIGHBOURS, banned)
    return float((label[found] == POSITIVE).mean())


def _chance(label: np.ndarray, others: np.ndarray) -> float:
    return float((label[others] == POSITIVE).sum() / np.isin(label[others], (POSITIVE, NEGATIVE)).sum())


def _row(points: np.ndarray, replica: np.ndarray) -> dict:
    image, finding, chance = points.tolist()
    differences = {
        "image - chance": replica[:, 0] - replica[:, 2],
        "finding - chance": replica[:, 1] - replica[:, 2],
        "finding - image": replica[:, 1] - replica[:, 0],
    }
    low_high = {name: np.nanquantile(values, (0.025, 0.975)).tolist() for name, values in differences.items()}
    return {"image": image, "finding": finding, "chance": chance, "ci95": low_high}


def show(scope: str, table: dict[str, dict]) -> None:
    """One line a finding."""
    say(f"index: {scope}; share of the {NEIGHBOURS} nearest that have the finding")
    for name, one in table.items():
        texts = []
        for key in ("image - chance", "finding - chance", "finding - image"):
            low, high = one["ci95"][key]
            texts.append(f"{key} [{low:+.3f}, {high:+.3f}]{' not shown' if low <= 0 <= high else ''}")
        counted = "" if one["queries"] is None else f" ({one['queries']} queries)"
        say(
            f"{name}{counted}: chance {one['chance']:.3f}, by image {one['image']:.3f}, by finding "
            f"{one['finding']:.3f}; {'; '.join(texts)}"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
