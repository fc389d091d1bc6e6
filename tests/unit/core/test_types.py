import hashlib

from hilum.core.types import SPLIT_NAMES, SPLITS, image_uid


def test_image_uid_is_the_documented_hash() -> None:
    assert image_uid("nih", "00000001_000.png") == hashlib.sha256(b"nih\x1f00000001_000.png").hexdigest()[:16]
    assert image_uid("a", "b\x1fc") != image_uid("a", "bc")


def test_split_names_lead_to_splits_and_each_split_is_its_own_name() -> None:
    assert set(SPLIT_NAMES.values()) == set(SPLITS) - {""}
    assert all(SPLIT_NAMES[split] == split for split in SPLIT_NAMES.values())
