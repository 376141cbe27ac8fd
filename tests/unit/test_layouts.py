import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from nsl_dist.config import FolderSplit
from nsl_dist.data.layouts import Unused, read_catalogue, read_records, recognise, unused
from tests.support.images import write_cars196, write_cub200, write_folders, write_image, write_inshop, write_sop


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


def by_split(records: pa.Table) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in records.to_pylist():
        classes = counts.setdefault(row["split"], {})
        classes[row["class_id"]] = classes.get(row["class_id"], 0) + 1
    return counts


def test_inshop(tmp_path: Path) -> None:
    root = str(write_inshop(tmp_path, train=[3, 2], query=[2, 1, 1], gallery=[1, 3, 0]))
    assert recognise(root) == "inshop"
    records = read_records(root, layout="inshop")
    assert by_split(records) == {
        "train": {"id_00000001": 3, "id_00000002": 2},
        "query": {"id_00000003": 2, "id_00000004": 1, "id_00000005": 1},
        "gallery": {"id_00000003": 1, "id_00000004": 3},
    }
    assert all((tmp_path / row["path"]).stat().st_size == row["num_bytes"] for row in records.to_pylist())


def test_cub200_splits_by_class(tmp_path: Path) -> None:
    root = str(write_cub200(tmp_path, [3, 2, 2, 4]))
    (tmp_path / "train_test_split.txt").write_text("1 0\n")  # another protocol
    assert recognise(root) == "cub200"
    assert by_split(read_records(root, layout="cub200")) == {"train": {"1": 3, "2": 2}, "test": {"3": 2, "4": 4}}


def test_cars196_splits_by_class(tmp_path: Path) -> None:
    root = str(write_cars196(tmp_path, [2, 3, 4, 1]))
    assert recognise(root) == "cars196"
    records = read_records(root, layout="cars196")
    assert by_split(records) == {"train": {"1": 2, "2": 3}, "test": {"3": 4, "4": 1}}
    assert records["path"][-1].as_py() == "car_ims/000005.jpg"


def test_folders_are_split_by_class(tmp_path: Path) -> None:
    sizes = [2, 3, 1, 2, 3]
    root = str(write_folders(tmp_path, sizes))
    assert recognise(root) == "folders"
    splits = by_split(read_records(root, layout="folders"))
    assert splits["train"] | splits["test"] == {f"thing {number}": size for number, size in enumerate(sizes, start=1)}
    assert (len(splits["train"]), len(splits["test"])) == (3, 2)
    assert (
        by_split(read_records(root, layout="folders", split=FolderSplit(test_share=0.2)))["test"].keys()
        < splits["test"].keys()
    )


def test_test_classes_can_be_given(tmp_path: Path) -> None:
    root, listed = str(write_folders(tmp_path / "raw", [2, 3, 1])), tmp_path / "classes.txt"
    split = FolderSplit(test_classes=str(listed))
    with pytest.raises(FileNotFoundError, match=r"no file .*classes.txt; it lists the test classes"):
        read_records(root, layout="folders", split=split)
    listed.write_text("thing 2\n\nthing 1\n")
    assert by_split(read_records(root, layout="folders", split=split)) == {
        "test": {"thing 1": 2, "thing 2": 3}, "train": {"thing 3": 1},
    }  # fmt: skip
    listed.write_text("thing 2\nthing 4\n")
    with pytest.raises(
        ValueError, match=r"no class folder 'thing 4' \(1 of 2 do not exist\); its folders are thing 1, "
    ):
        read_records(root, layout="folders", split=split)
    listed.write_text("thing 1\nthing 2\nthing 3\n")
    with pytest.raises(ValueError, match=r"lists 3 of 3 classes; both splits need at least one"):
        read_records(root, layout="folders", split=split)


def test_folders_are_split_within_classes(tmp_path: Path) -> None:
    root = str(write_folders(tmp_path, [4, 5, 1]))
    splits = by_split(read_records(root, layout="folders", split=FolderSplit(by="images", test_share=0.25)))
    # Two at least, since one alone would have no match.
    assert splits == {"train": {"thing 1": 2, "thing 2": 3, "thing 3": 1}, "test": {"thing 1": 2, "thing 2": 2}}
    with pytest.raises(ValueError, match=r"--data.test-classes does not go with --data.split images"):
        FolderSplit(by="images", test_classes="classes.txt")


def test_nested_folders_are_classes_of_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(("Fruit/Kiwi", "Fruit/Banana", "Milk")):
        write_image(tmp_path / name / "1.png", number, 0)
    records = read_records(str(tmp_path), layout="folders")
    assert set(records["class_id"].to_pylist()) == {"Fruit/Kiwi", "Fruit/Banana", "Milk"}
    write_image(tmp_path / "Fruit" / "1.png", 4, 0)
    with pytest.raises(ValueError, match=r"both Fruit and Fruit/Banana hold images, .* move the images of Fruit into"):
        read_records(str(tmp_path), layout="folders")
    assert set(read_catalogue(str(tmp_path))["class_id"].to_pylist()) == {"Fruit/Kiwi", "Fruit/Banana", "Milk", "Fruit"}


def test_what_is_not_used_is_known(tmp_path: Path) -> None:
    write_folders(tmp_path, [2, 2])
    write_image(tmp_path / "loose.png", 1, 1)
    (tmp_path / "thing 2" / "COPYING").write_text("")
    for name in ("nothing", "below/nothing"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    used = set(read_records(str(tmp_path), layout="folders")["path"].to_pylist())
    assert unused(str(tmp_path), used) == Unused(
        files={
            ".png": ["loose.png"],
            ".txt": ["README.txt", "thing 1/notes.txt"],
            "broken links": ["gone.jpg"],
            "no ending": ["thing 2/COPYING"],
        },
        folders=["below", "below/nothing", "nothing"],
    )


def test_links(tmp_path: Path) -> None:
    """Linked images and folders are read like others; a link that leads back up is refused."""
    elsewhere = tmp_path / "elsewhere"
    write_image(elsewhere / "1.jpg", 1, 1)
    root = tmp_path / "photos"
    write_folders(root, [2, 2])
    (root / "linked").symlink_to(elsewhere)
    (root / "thing 1" / "linked.jpg").symlink_to(elsewhere / "1.jpg")
    paths = read_records(str(root), layout="folders")["path"].to_pylist()
    assert {"linked/1.jpg", "thing 1/linked.jpg"} < set(paths)
    (root / "thing 2" / "itself.jpg").symlink_to(root / "thing 2" / "itself.jpg")
    assert unused(str(root), set(paths)).files["broken links"] == ["thing 2/itself.jpg"]
    (root / "thing 2" / "up").symlink_to(root)
    with pytest.raises(ValueError, match="thing 2/up is a link to a folder that it lies in; remove it"):
        read_records(str(root), layout="folders")


def test_names_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, [2, 2])
    Path(os.fsdecode(os.fsencode(tmp_path / "thing 1") + b"/K\xe4se.jpg")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"thing 1 holds b'K\\xe4se.jpg', whose name is not in UTF-8; rename it"):
        read_records(str(tmp_path), layout="folders")


def test_a_published_split_is_kept(root: Path) -> None:
    with pytest.raises(ValueError, match=r"has the layout sop with a split of its own"):
        read_records(str(root), layout="sop", split=FolderSplit(test_share=0.2))


def test_ambiguous_and_unknown_folders(root: Path, tmp_path: Path) -> None:
    write_cub200(root, [1, 1])
    with pytest.raises(ValueError, match=r"more than one layout: sop, cub200; say which with --layout"):
        recognise(str(root))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither shards .* nor a known layout"):
        recognise(str(tmp_path / "empty"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_bad_inshop(tmp_path: Path) -> None:
    partition = write_inshop(tmp_path, train=[2], query=[1], gallery=[2]) / "list_eval_partition.txt"
    whole = partition.read_text()
    for old, new, message in (
        ("5\n", "6\n", r"list_eval_partition.txt:1: expected the number of listed images, 5, got '6'"),
        ("item_id", "item", r"list_eval_partition.txt:2: expected the header"),
        ("query\n", "querry\n", r"list_eval_partition.txt:5: expected .* status of train, query or gallery"),
        ("id_00000001     train", "id_00000002     train", r"class id_00000002 is in both splits"),
    ):
        replace(partition, old, new)
        with pytest.raises(ValueError, match=message):
            read_records(str(tmp_path), layout="inshop")
        partition.write_text(whole)


def test_bad_cub200(tmp_path: Path) -> None:
    write_cub200(tmp_path, [2, 2])
    replace(tmp_path / "image_class_labels.txt", "3 2", "3 9")
    with pytest.raises(ValueError, match=r"image_class_labels.txt:3: class 9 of image 3 is not in classes.txt"):
        read_records(str(tmp_path), layout="cub200")
    replace(tmp_path / "image_class_labels.txt", "3 9", "x 2")
    with pytest.raises(ValueError, match=r"image_class_labels.txt:3: expected a number and a value, got 'x 2'"):
        read_records(str(tmp_path), layout="cub200")
    replace(tmp_path / "image_class_labels.txt", "x 2", "3 2")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*classes.txt; a CUB-200-2011 folder holds"):
        read_records(str(tmp_path), layout="cub200")


def test_bad_cars196(tmp_path: Path) -> None:
    write_cars196(tmp_path, [2, 2])
    (tmp_path / "car_ims" / "000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation 2: image car_ims/000002.jpg does not exist"):
        read_records(str(tmp_path), layout="cars196")
    (tmp_path / "cars_annos.mat").write_bytes(b"not MATLAB")
    with pytest.raises(ValueError, match=r"cars_annos.mat is not the annotations of CARS196"):
        read_records(str(tmp_path), layout="cars196")


def test_one_class_folder_is_too_few(tmp_path: Path) -> None:
    write_folders(tmp_path, [3])
    with pytest.raises(ValueError, match=r"images of 1 class folders; training and testing need two"):
        read_records(str(tmp_path), layout="folders")
