"""The scikit-learn transformer: against the backbone called by itself, in pipelines, copies and other processes."""

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, estimator_checks

import hilum
from hilum.core.errors import CheckpointError, ConfigError, ImageError, PreprocessingMismatchError, UnknownNameError
from hilum.data.store import Store, write_arrays
from hilum.deploy.feature_transformer import ChestXrayFeatures


def features(path: Path, what: str = "cls", **settings) -> ChestXrayFeatures:
    return ChestXrayFeatures(path, what, **({"device": "cpu", "batch_size": 5} | settings))


def alone(path: Path, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] and mean patch of one image, without this module."""
    network = hilum.load(path, "cpu").networks[0]
    square = torch.from_numpy(network.crop(pixels)[None, None]).float()
    with torch.no_grad():
        tokens = network.backbone((square / 255 - 0.5) / 0.25)
    return tokens.cls[0].numpy(), tokens.patches[0].mean(dim=0).numpy()


def test_rows_are_what_the_backbone_gives_of_each_image(fitted: Path, store: Store) -> None:
    images = [store.read(number) for number in range(7)]
    expected = [alone(fitted / "linear", image) for image in images]
    for column, what in enumerate(("cls", "patch-mean")):
        found = features(fitted / "linear", what).fit_transform(images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [one[column] for one in expected], rtol=0, atol=2e-6)
    run = features(fitted / "run", resolution=24).transform(images)  # the same weights, as a backbone
    np.testing.assert_allclose(run, [one[0] for one in expected], rtol=0, atol=2e-6)


def test_paths_bytes_arrays_and_stores_are_the_same_images(fitted: Path, store: Store, tmp_path: Path) -> None:
    images = [store.read(number) for number in store.indices("test").tolist()]
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        cv2.imwrite(str(path), image)
    transformer = features(fitted / "linear").fit()
    expected = transformer.transform(images)
    for given in (
        paths, [str(path) for path in paths], np.array([str(path) for path in paths]),
        [path.read_bytes() for path in paths], f"{store.path}:test",
    ):  # fmt: skip
        np.testing.assert_array_equal(transformer.transform(given), expected)
    np.testing.assert_allclose(transformer.transform(store)[store.indices("test")], expected, rtol=0, atol=2e-6)
    cube = np.stack([cv2.resize(image, (20, 20)) for image in images])
    np.testing.assert_array_equal(transformer.transform(cube), transformer.transform(list(cube)))


def test_a_study_is_the_mean_of_its_images_by_direction(fitted: Path, store: Store) -> None:
    studies = list(dict.fromkeys(store.studies.tolist()))
    members = [np.flatnonzero(store.studies == study).tolist() for study in studies]
    cls = features(fitted / "linear").transform(store).astype(np.float64)
    unit = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    means = np.stack([unit[rows].mean(axis=0) for rows in members])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    by_study = features(fitted / "linear", "study")
    np.testing.assert_allclose(by_study.transform(store), expected, rtol=0, atol=2e-6)
    nested = [[store.read(row) for row in rows] for rows in members]
    np.testing.assert_allclose(by_study.transform(nested), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(by_study.transform([nested[0][0]])[0], unit[members[0][0]], rtol=0, atol=2e-6)


def test_it_is_copied_and_pickled_by_its_path(fitted: Path, store: Store, tmp_path: Path) -> None:
    shutil.copytree(fitted / "linear", tmp_path / "model")
    images = [store.read(number) for number in range(4)]
    transformer = features(tmp_path / "model").fit()
    expected = transformer.transform(images)
    content = pickle.dumps(transformer)
    assert len(content) < 1000
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 4000
    np.testing.assert_array_equal(pickle.loads(content).transform(images), expected)
    copied = clone(transformer)
    assert copied.get_params() == transformer.get_params()
    assert not hasattr(copied, "digest_")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match="does not exist"):
        pickle.loads(content).transform(images)
    shutil.copytree(fitted / "decoder", tmp_path / "model")  # other weights under the same name: 16 pixels, not 24
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        pickle.loads(content).transform(images)


def test_a_pipeline_learns_from_images(fitted: Path, store: Store) -> None:
    chosen = np.concatenate([store.indices("train"), store.indices("val")])
    images, labels = [store.read(int(number)) for number in chosen], store.labels[chosen, 0]
    pipeline = make_pipeline(features(fitted / "linear", "patch-mean"), StandardScaler(), LogisticRegression())
    scores = cross_val_score(pipeline, images, labels, cv=3, scoring="roc_auc")
    assert scores.min() > 0.9  # bright images have it
    names = pipeline.fit(images, labels)[:-1].get_feature_names_out()
    assert names.tolist()[:2] == ["patch_mean_0000", "patch_mean_0001"]


def test_columns_have_names_and_go_into_tables(fitted: Path, store: Store) -> None:
    transformer = features(fitted / "linear")
    names = transformer.get_feature_names_out()
    assert len(names) == 12
    table = transformer.set_output(transform="polars").fit_transform([store.read(0), store.read(1)])
    assert table.columns == list(names)
    assert table.shape == (2, 12)


def test_what_is_no_image_is_said(fitted: Path, store: Store, tmp_path: Path) -> None:
    linear, image = features(fitted / "linear"), store.read(0)
    for given, said in (
        ([], "empty list"), (np.zeros((3, 4)), "found an array of float64"), (b"123", "found bytes"), (3, "found int"),
        ([image, 3], "Image 1"), ([[image]], "A study is a list"), (str(tmp_path), "holds no DICOM"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            linear.transform(given)
    with pytest.raises(ConfigError, match="Study 1 has no image"):
        features(fitted / "linear", "study").transform([[image], []])
    with pytest.raises(ImageError, match="View 1: expected a uint8 array"):
        linear.transform([image, np.zeros((4, 4))])
    with pytest.raises(UnknownNameError, match="patch-mean"):
        features(fitted / "linear", "patch_mean").fit()
    with pytest.raises(ConfigError, match="batch_size"):
        features(fitted / "linear", batch_size=0).fit()
    with pytest.raises(ConfigError, match="expected the path"):
        clone(linear).set_params(model=hilum.load(fitted / "linear", "cpu")).fit()
    with pytest.raises(ConfigError, match="own resolution"):
        features(fitted / "linear", resolution=32).fit()
    other = write_arrays(tmp_path / "s", [image], store.labels[:1], store.findings, preprocess_id="mimic-cxr-jpg-1")
    with pytest.raises(PreprocessingMismatchError, match="mimic-cxr-jpg-1"):
        linear.transform(other)


class OfRows(ChestXrayFeatures):
    """The same for tables of numbers, each row an image, so that scikit-learn's own checks have something to say."""

    def fit(self, X, y=None):  # noqa: N803
        self.n_features_in_ = check_array(X, dtype="numeric").shape[1]
        return super().fit(X, y)

    def transform(self, X):  # noqa: N803
        rows = check_array(X, dtype="numeric", ensure_min_samples=1)
        grey = np.clip(rows * 20 + 128, 0, 255).astype(np.uint8)
        return super().transform([np.ascontiguousarray(np.tile(row, (len(row), 1))) for row in grey])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        return tags


ON_IMAGES = (
    "check_estimator_cloneable", "check_valid_tag_types", "check_estimator_repr", "check_no_attributes_set_in_init",
    "check_mixin_order", "check_parameters_default_constructible", "check_get_params_invariance", "check_set_params",
)  # fmt: skip
ON_ROWS = (
    "check_estimators_overwrite_params", "check_dont_overwrite_parameters", "check_estimators_fit_returns_self",
    "check_fit_score_takes_y", "check_dict_unchanged", "check_fit_idempotent", "check_estimators_pickle",
    "check_methods_sample_order_invariance", "check_transformers_unfitted_stateless", "check_pipeline_consistency",
    "check_transformer_get_feature_names_out", "check_set_output_transform", "check_set_output_transform_polars",
    "check_transformer_general", "check_f_contiguous_array_estimator",
)  # fmt: skip


@pytest.mark.parametrize("check", ON_IMAGES)
def test_scikit_learns_checks_of_an_estimator(check: str, fitted: Path) -> None:
    getattr(estimator_checks, check)("ChestXrayFeatures", features(fitted / "linear"))


@pytest.mark.parametrize("check", ON_ROWS)
def test_scikit_learns_checks_of_a_transformer(check: str, fitted: Path) -> None:
    getattr(estimator_checks, check)("OfRows", OfRows(fitted / "linear", device="cpu"))
