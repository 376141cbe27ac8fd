import shutil
from pathlib import Path

import pytest

from nsl_dist.data.layouts import read_records
from tests.conftest import write_sop


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_sop(tmp_path, {"train": [3, 4, 2], "test": [2, 3]})


def edit(root: Path, line: int, text: str) -> None:
    lines = (root / "Ebay_train.txt").read_text().splitlines()
    lines[line - 1] = text
    (root / "Ebay_train.txt").write_text("\n".join(lines))


def test_reads_every_row(root: Path) -> None:
    records = read_records(str(root), layout="sop").to_pylist()
    assert [row["split"] for row in records] == ["test"] * 5 + ["train"] * 9
    assert [row["class_id"] for row in records] == list("44555" + "111222233")
    assert records[0]["num_bytes"] == (root / records[0]["path"]).stat().st_size


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        read_records(str(tmp_path / "nowhere"), layout="sop")


def test_missing_split_file(root: Path) -> None:
    (root / "Ebay_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*Ebay_test.txt; a Stanford Online"):
        read_records(str(root), layout="sop")


@pytest.mark.parametrize("row", ["4 x 1 thing_final/1_3.JPG", "4 1 thing_final/1_3.JPG", "4 1 1 thing final/1_3.JPG"])
def test_malformed_row_is_named_with_its_line(root: Path, row: str) -> None:
    edit(root, 4, row)
    with pytest.raises(ValueError, match=rf"Ebay_train.txt:4: .*got '{row}'"):
        read_records(str(root), layout="sop")


def test_wrong_header(root: Path) -> None:
    edit(root, 1, "id class path")
    with pytest.raises(ValueError, match=r"Ebay_train.txt:1: expected the header"):
        read_records(str(root), layout="sop")


def test_missing_image(root: Path) -> None:
    (root / "thing_final" / "1_2.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"Ebay_train.txt:3: image thing_final/1_2.JPG .*1 of 14 images"):
        read_records(str(root), layout="sop")


def test_path_outside_the_folder(root: Path) -> None:
    edit(root, 2, "1 1 1 ../secret.JPG")
    with pytest.raises(ValueError, match=r"Ebay_train.txt:2: image path '../secret.JPG' leaves the data folder"):
        read_records(str(root), layout="sop")


def test_class_in_both_splits(root: Path) -> None:
    edit(root, 2, "1 4 1 thing_final/1_1.JPG")
    with pytest.raises(ValueError, match=r"class 4 is in both splits"):
        read_records(str(root), layout="sop")


def test_image_listed_twice(root: Path) -> None:
    edit(root, 3, "2 1 1 thing_final/1_1.JPG")
    with pytest.raises(ValueError, match=r"Ebay_train.txt:3: image thing_final/1_1.JPG is listed twice, first at .*:2"):
        read_records(str(root), layout="sop")


def test_empty_split(root: Path) -> None:
    (root / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n")
    shutil.rmtree(root / "thing_final")
    with pytest.raises(ValueError, match=r"Ebay_test.txt: no images below the header"):
        read_records(str(root), layout="sop")
