"""The floor that a model must beat: logistic regression on principal components of 32 x 32 thumbnails.

    python runs/thumbnail_floor.py STORE OUT.parquet

Fitted on the store's train and val splits, written for its test split, so that `hilum evaluate` judges it beside a
model. 48 components, C = 0.05, each thumbnail standardised by its own mean and deviation. It is a comparison: never a
feature, never a member of an ensemble.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from hilum.data.store import Store
from hilum.evaluation.predictions import Predictions, write_predictions

SIDE, COMPONENTS, REGULARISATION = 32, 48, 0.05


def thumbnails(store: Store, indices: np.ndarray) -> np.ndarray:
    """Standardised thumbnails, (N, 1024)."""
    small = [cv2.resize(store.read(index), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for index in indices]
    flat = np.stack(small).reshape(len(small), -1).astype(np.float64)
    return (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)


def main(store_path: Path, out: Path) -> None:
    """Fit on train and val, write the predictions for test."""
    store = Store.open(store_path)
    fitted = np.concatenate([store.indices("train"), store.indices("val")])
    judged = store.indices("test")
    components = PCA(COMPONENTS, random_state=0).fit(thumbnails(store, fitted))
    features = components.transform(thumbnails(store, fitted))
    judged_features = components.transform(thumbnails(store, judged))
    probabilities = np.full((len(judged), len(store.findings)), np.nan)
    for column in range(len(store.findings)):
        labels = store.labels[fitted, column]
        known = labels >= 0
        if len(np.unique(labels[known])) < 2:
            continue
        model = LogisticRegression(C=REGULARISATION, max_iter=2000).fit(features[known], labels[known])
        probabilities[:, column] = model.predict_proba(judged_features)[:, 1]
    write_predictions(
        Predictions(
            store.uids[judged], store.image_ids[judged], store.studies[judged], store.patients[judged],
            store.datasets[judged], store.views[judged], store.findings, probabilities,
            {"model": "logistic regression on thumbnails"},
        ),
        out,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
