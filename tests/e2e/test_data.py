"""Shards, their stream and the built-in products on a real Ray."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from nsl_dist.config import DataConfig, Layout
from nsl_dist.data import synthetic
from nsl_dist.data.images import decode
from nsl_dist.data.layouts import read_records
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.shards import Manifest, find_data, load_manifest, open_data, prepare, records_digest
from nsl_dist.data.stream import fetch, planned_batches
from nsl_dist.data.transforms import augment
from tests.support.images import encode, write_sop

pytestmark = pytest.mark.usefixtures("cluster")
SIZES = {"train": [3, 9, 2, 5, 4, 6, 1, 7, 3, 5, 8, 2], "test": [2, 1, 4]}


def shard(root: Path, out: Path, max_undecodable: float = 0.0) -> Manifest:
    return prepare(find_data(str(root), layout="sop"), out=str(out), max_undecodable=max_undecodable)


def test_shards_hold_every_image_once(tmp_path: Path) -> None:
    root = write_sop(tmp_path / "raw", SIZES)
    manifest = shard(root, tmp_path / "shards")
    assert manifest.splits == {
        "train": {"num_images": 55, "num_classes": 12, "num_singletons": 1},
        "test": {"num_images": 7, "num_classes": 3, "num_singletons": 1},
    }
    records = read_records(str(root), layout="sop").to_pylist()
    for name in ("train", "test"):
        split = manifest.split(name)
        assert sorted(split.sizes) == sorted(SIZES[name])
        found: dict[int, bytes] = {}
        for label in range(split.num_classes):
            bag = split.read_bag(label, ["image_id", "class_id", "image"]).to_pylist()
            assert len(bag) == split.sizes[label]
            assert len({row["class_id"] for row in bag}) == 1
            found |= {row["image_id"]: row["image"] for row in bag}
        assert found == {r["image_id"]: (root / r["path"]).read_bytes() for r in records if r["split"] == name}


def test_first_use_is_cached_by_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_sop(tmp_path / "raw", SIZES)

    def opened(root: str, layout: Layout | None = None) -> Manifest:
        return open_data(find_data(root, layout=layout), storage_root=str(tmp_path), max_undecodable=0.0)

    first = opened(str(root))
    assert "Sharding" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds shards of layout sop, not cub200"):
        opened(first.root, "cub200")
    again = opened(str(root))
    assert capsys.readouterr().out == ""
    assert again == first == opened(first.root, "sop")
    assert first.digest == records_digest(read_records(str(root), layout="sop"), layout="sop")
    (root / "thing_final" / "1_1.JPG").write_bytes((root / "thing_final" / "2_4.JPG").read_bytes() + b"\0")
    assert opened(str(root)).digest != first.digest


def test_large_images_are_reencoded(tmp_path: Path) -> None:
    root = write_sop(tmp_path / "raw", {"train": [2, 2], "test": [2, 2]})
    photo = np.asarray(np.kron(np.arange(24).reshape(4, 6, 1) * 10, np.ones((50, 50, 3))), dtype=np.uint8)
    (root / "thing_final" / "1_1.JPG").write_bytes(encode(photo))
    as_it_is = find_data(str(root), layout="sop")
    data = dataclasses.replace(as_it_is, max_edge=120)
    manifest = prepare(data, out=str(tmp_path / "small"), max_undecodable=0)
    assert (manifest.max_edge, manifest.num_reencoded) == (120, 1)
    assert manifest.account()["re-encoded"] == "1 to 120 pixels, JPEG of quality 95"
    assert len({each.digest for each in (as_it_is, data, dataclasses.replace(as_it_is, max_edge=121))}) == 3
    assert find_data(manifest.root, layout=None).digest == data.digest
    split = manifest.split("train")
    bags = [split.read_bag(label, ["image_id", "image"]).to_pylist() for label in range(split.num_classes)]
    images = {row["image_id"]: row["image"] for bag in bags for row in bag}
    assert decode(images[1]).shape == (3, 80, 120)
    assert images[2] == (root / "thing_final" / "1_2.JPG").read_bytes()


def test_undecodable_images_are_listed_and_left_out_or_refused(tmp_path: Path) -> None:
    root = write_sop(tmp_path / "raw", SIZES)
    for name in ("1_2.JPG", "7_30.JPG"):  # class 7 has this image only
        (root / "thing_final" / name).write_bytes(b"\xff\xd8 broken")
    with pytest.raises(ValueError, match=r"of 62 images cannot be decoded, more than the allowed share 0.0; first: "):
        shard(root, tmp_path / "refused", max_undecodable=0.0)
    assert not (tmp_path / "refused" / "manifest.json").exists()
    manifest = shard(root, tmp_path / "shards", max_undecodable=0.01)  # of few images, a few may be
    assert sorted(image["path"] for image in manifest.undecodable) == ["thing_final/1_2.JPG", "thing_final/7_30.JPG"]
    assert manifest.splits["train"] == {"num_images": 53, "num_classes": 11, "num_singletons": 0}
    assert manifest.split("train").num_classes == 11


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    manifest = shard(write_sop(tmp_path / "raw", SIZES), tmp_path / "shards")
    with pytest.raises(ValueError, match=r"holds shards of another data set"):
        shard(write_sop(tmp_path / "other", SIZES, seed=1), tmp_path / "shards")
    path = tmp_path / "shards" / manifest.shards[0]["path"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"shard .*{path.name} has .* bytes, its manifest says"):
        load_manifest(manifest.root)
    path.unlink()
    with pytest.raises(ValueError, match=rf"shard .*{path.name} has no bytes"):
        load_manifest(manifest.root)
    content = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(ValueError, match=r"has format version 99"):
        load_manifest(manifest.root)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        find_data(str(tmp_path / "nowhere"), layout=None)
    with pytest.raises(ValueError, match=r"holds neither shards .* nor a known layout"):
        find_data(str(tmp_path), layout=None)


@pytest.mark.parametrize(("world_size", "spare_cpus"), [(1, True), (2, False), (4, True)])
def test_every_worker_streams_its_part_of_the_plan(tmp_path: Path, world_size: int, spare_cpus: bool) -> None:
    split = shard(write_sop(tmp_path / "raw", SIZES), tmp_path / "shards").split("train")
    config = DataConfig(batch_size=8, images_per_class=2, image_size=16, rotation=10)
    plan = ClassBalancedPlan(split.sizes, 8, 2, seed=5)
    num_held = ray.available_resources()["CPU"] - (1 if spare_cpus else 0)
    hold = ray.util.placement_group([{"CPU": num_held}])
    ray.get(hold.ready())
    iterators = planned_batches(
        plan, split, config, first_step=3, last_step=9, world_size=world_size, spare_cpus=spare_cpus
    )
    part_size = 8 // world_size

    from concurrent.futures import ThreadPoolExecutor

    def consume(rank: int) -> list[dict[str, np.ndarray]]:
        return list(iterators[rank].iter_batches(batch_size=part_size, batch_format="numpy"))

    try:
        with ThreadPoolExecutor(world_size) as pool:  # the split waits for all workers
            batches = list(pool.map(consume, range(world_size)))
    finally:
        ray.util.remove_placement_group(hold)
    assert {len(each) for each in batches} == {6}
    for turn, step in enumerate(range(3, 9)):
        whole = augment(fetch(plan.batch(step), split, config), range(8), config, seed=5, step=step)
        for rank in range(world_size):
            batch = batches[rank][turn]
            assert (batch["step"] == step).all()
            assert (batch["rank"] == rank).all()
            expected = whole[rank * part_size : (rank + 1) * part_size]
            assert torch.equal(torch.from_numpy(np.ascontiguousarray(batch["image"])), expected)


def test_synthetic_products_are_a_sop_folder(tmp_path: Path) -> None:
    spec = synthetic.Spec(train_classes=3, test_classes=2, fewest_images=2, most_images=4)
    root = synthetic.write_products(str(tmp_path), spec)
    records = read_records(root, layout="sop")
    assert len(set(records["class_id"].to_pylist())) == 5
    before = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*.JPG")}
    assert len(before) == len(records)
    assert synthetic.write_products(str(tmp_path), spec) == root
    assert before == {path: path.stat().st_mtime_ns for path in Path(root).rglob("*.JPG")}
    again = synthetic.write_products(str(tmp_path / "again"), spec)
    assert records_digest(read_records(again, layout="sop"), layout="sop") == records_digest(records, layout="sop")
