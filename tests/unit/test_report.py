import dataclasses
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nsl_dist.config import TrainConfig
from nsl_dist.data.images import thumbnail
from nsl_dist.data.shards import Manifest
from nsl_dist.retrieval import report
from nsl_dist.retrieval.figures import draw
from nsl_dist.retrieval.findings import (
    Findings,
    Neighbour,
    Picture,
    Row,
    choose,
    draw_pairs,
    project,
)
from nsl_dist.retrieval.report import render, table_of, write_report
from nsl_dist.retrieval.results import EvaluationResults, IndexResults
from tests.support.images import encode

RESULTS = EvaluationResults(
    recall={"float": {1: 0.5, 10: 0.75}, "binary": {1: 0.25, 10: 0.625}},
    r_precision={"float": 0.4, "binary": 0.3},
    map_at_r={"float": 0.2, "binary": 0.1},
    bytes_per_vector={"float": 2048, "binary": 64},
    num_queries=20,
    num_gallery=20,
    num_classes=4,
    num_queries_without_match=0,
    embeddings="/embeddings",
    seconds={"search_float": 1.0, "search_binary": 1.0},
)
HISTORY = {"loss": [(1, 4.0), (10, 2.0)], "recall_at_1_float": [(0, 0.1), (10, 0.5)]}


def findings(*, num_images: int = 300, num_classes: int = 30, edge: int = 24, class_id: str = "class {}") -> Findings:
    """Return made-up findings: noise, which JPEG compresses worst, in rows of which every third neighbour matches."""
    rng = np.random.default_rng(0)

    def picture(number: int) -> Picture:
        noise = rng.integers(0, 256, (edge, edge, 3)).astype(np.uint8)
        return Picture(thumbnail(encode(noise), 96, quality=80), class_id.format(number % num_classes), f"{number}.jpg")

    def row(number: int, first_match: int | None) -> Row:
        neighbours = [Neighbour(picture(number + place), place % 3 == 0, 0.9 - place / 10) for place in range(8)]
        return Row(picture(number), neighbours, first_match)

    vectors = rng.normal(size=(num_images, 64)).astype(np.float32)
    map_N2, explained = project(vectors)
    return Findings(
        name="a run",
        facts={"Data": "here"},
        results=RESULTS,
        untrained=None,
        history=HISTORY,
        num_sampled=1024,
        depth=1000,
        failures=[row(0, None)] + [row(number, 600 - number) for number in range(1, 12)],
        successes=[row(number, 0) for number in range(12, 18)],
        same_S=rng.normal(0.6, 0.1, 8192).astype(np.float32),
        other_S=rng.normal(0.1, 0.1, 8192).astype(np.float32),
        sizes={"train": rng.zipf(1.6, 900).clip(1, 3000), "test": rng.integers(1, 13, num_classes)},
        map_N2=map_N2,
        labels_N=rng.integers(0, num_classes, num_images),
        explained=explained,
        class_ids=[class_id.format(number) for number in range(num_classes)] if num_classes <= 20 else [],
    )


class Page(HTMLParser):
    """All elements of a page in order, each with its attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.elements if each == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(findings())["report.html"])


def test_the_hardest_failures_come_first() -> None:
    rng = np.random.default_rng(0)
    first_match_Q, num_relevant_Q = rng.integers(0, 40, 500), rng.integers(0, 4, 500)
    failures, successes = choose(first_match_Q, num_relevant_Q, rng)
    possible = [(-rank, place) for place, rank in enumerate(first_match_Q) if rank > 0 and num_relevant_Q[place] > 0]
    assert [(-first_match_Q[place], place) for place in failures] == sorted(possible)[:12]
    assert len(set(successes.tolist())) == 6
    assert (first_match_Q[successes] == 0).all()
    failures, successes = choose(np.array([0, 0, 7]), np.array([1, 1, 0]), rng)
    assert (failures.tolist(), successes.tolist()) == ([], [0, 1])  # the third has nothing to find


@pytest.mark.parametrize("own", [True, False])
def test_pairs_are_of_one_class_or_of_two_and_never_of_an_image_and_itself(own: bool) -> None:
    rng = np.random.default_rng(0)
    gallery_labels = np.repeat(np.arange(8), [3, 1, 2, 5, 1, 4, 2, 3])
    ids_Q = np.arange(len(gallery_labels)) if own else None
    labels_Q = gallery_labels if own else np.array([7, 3, 9, 1])  # class 9 is not in the gallery
    num_relevant_Q = np.bincount(gallery_labels, minlength=10)[labels_Q] - own
    seen = set()
    for _ in range(50):
        (places, ids), (other_places, other_ids) = draw_pairs(labels_Q, ids_Q, num_relevant_Q, gallery_labels, rng)
        assert (gallery_labels[ids] == labels_Q[places]).all()
        assert (gallery_labels[other_ids] != labels_Q[other_places]).all()
        seen |= set(zip(places.tolist(), ids.tolist(), strict=True))
    every = {(place, id_) for place, label in enumerate(labels_Q) for id_ in np.flatnonzero(gallery_labels == label)}
    assert seen == {(place, id_) for place, id_ in every if not own or place != id_}


def test_thumbnails_are_small_and_never_enlarged() -> None:
    wide = Image.open(io.BytesIO(thumbnail(encode(np.zeros((50, 200), np.uint8), "PNG"), 96, quality=80)))
    assert (wide.format, wide.size, wide.mode) == ("JPEG", (96, 24), "RGB")
    assert Image.open(io.BytesIO(thumbnail(encode(np.zeros((30, 20, 3), np.uint8)), 96, quality=80))).size == (20, 30)


def test_frames_marks_and_words_tell_matches_from_the_rest(page: Page) -> None:
    shown = findings().failures + findings().successes
    expected = [neighbour.matches for row in shown for neighbour in row.neighbours]
    frames = [figure["class"] for figure in page.all("figure") if figure["class"] in ("same", "other")]
    assert [frame == "same" for frame in frames] == expected
    assert [mark == "✓" for mark in re.findall(r"([✓✗])\s+\d\.\d\d", page.text)] == expected
    alternatives = [str(image["alt"]) for image in page.all("img")]
    assert [text.startswith("same") for text in alternatives if not text.startswith("query")] == expected
    queries = [text for text in alternatives if text.startswith("query")]
    assert queries == [f"query: {number}.jpg of class class {number}" for number in range(18)]
    assert "no match among the first 1,000" in page.text
    assert re.findall(r"first match in place (\d+)", page.text) == [str(601 - number) for number in range(1, 12)]


def test_everything_drawn_has_a_text_and_nothing_is_fetched(page: Page) -> None:
    assert len(page.all("img")) == 18 * 9
    assert all(image["alt"] and str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.all("img"))
    places = [place for place, (tag, _) in enumerate(page.elements) if tag == "svg"]
    assert len(places) == 6
    for place in places:
        assert page.elements[place][1]["role"] == "img"
        assert page.elements[place + 1][0] == "title"
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:", "failures.csv")), (tag, attributes)
    assert "http" not in render(findings())["report.html"]


def test_ids_are_unique_and_found(page: Page) -> None:
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    texts = " ".join(str(value) for _, attributes in page.elements for value in attributes.values())
    assert set(re.findall(r"url\(#([^)]*)\)", texts)) <= set(ids)
    assert {str(use["xlink:href"])[1:] for use in page.all("use")} <= set(ids)
    heads = {attributes.get("aria-labelledby") for _, attributes in page.elements}
    assert heads - {None} <= set(ids)


def test_a_report_of_many_images_is_small() -> None:
    content = render(findings(num_images=10_000, num_classes=800, edge=64))["report.html"]
    assert len(content.encode()) < 3 * 2**20


def test_names_of_classes_are_text() -> None:
    files = render(findings(num_classes=12, class_id="<script>alert({})</script>\"' $x_"))
    page = Page(files["report.html"])
    assert not page.all("script")
    assert page.all("img")[0]["alt"] == "query: 0.jpg of class <script>alert(0)</script>\"' $x_"
    legend = "".join(ET.fromstring(files["figures/map.svg"]).itertext())
    assert "<script>alert(11)</script>\"' $x_" in legend


def test_figures_are_documents_in_the_colours_of_their_page() -> None:
    for name, svg in draw(findings()).items():
        root = ET.fromstring(svg)
        assert root.find("{http://www.w3.org/2000/svg}title") is not None, name
        assert "currentColor" in svg
        assert not re.search(r"(fill|stroke): *(#0|black)", svg), name
        assert "$" not in "".join(root.itertext()), name  # formulas would stand there as they are


def test_what_there_is_nothing_of_is_left_out() -> None:
    none = np.empty(0, dtype=np.float32)
    bare = dataclasses.replace(
        findings(), history={"loss": [(1, 2.0)], "recall_at_1_float": [(10, 0.5)]}, failures=[], successes=[],
        same_S=none, map_N2=np.empty((0, 2), dtype=np.float32),
    )  # fmt: skip
    files = render(bare)
    assert list(files) == ["report.html", "figures/recall.svg", "figures/class_sizes.svg"]
    page = Page(files["report.html"])
    assert not page.all("img")
    assert "Training" not in page.text
    assert "Hardest" not in page.text


def test_the_table_has_what_the_results_have() -> None:
    heads, rows = table_of(RESULTS, None)
    assert heads == ["float", "binary"]
    assert rows == {
        "recall@1": ["50.00", "25.00"], "recall@10": ["75.00", "62.50"], "R-precision": ["40.00", "30.00"],
        "MAP@R": ["20.00", "10.00"], "bytes per vector": ["2,048", "64"],
    }  # fmt: skip
    more = dataclasses.replace(
        RESULTS,
        nmi={"float": 0.9, "binary": 0.8},
        intervals={"float": {"recall_at_1": (0.4, 0.6)}},
        index=IndexResults("HNSW8", None, 20, {1: 0.95}),
    )
    heads, rows = table_of(more, dataclasses.replace(RESULTS, nmi={"float": 0.1, "binary": 0.2}))
    assert heads == ["float", "binary", "untrained float", "untrained binary"]
    assert rows["recall@1"] == ["50.00 (40.00 to 60.00)", "25.00", "50.00", "25.00"]
    assert rows["NMI"] == ["90.00", "80.00", "10.00", "20.00"]
    assert rows["of the exact 1 nearest found"] == ["95.00", "-", "-", "-"]


def test_a_report_that_fails_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    manifest = Manifest("here", "sop", "there", "0", {}, [], [])
    arguments: dict[str, Any] = {"name": "a run", "config": TrainConfig(), "manifest": manifest, "history": {}}
    monkeypatch.setattr(report, "gather", lambda *_, **__: findings())
    files = write_report(str(tmp_path / "folder"), RESULTS, **arguments)
    assert {name: (tmp_path / "folder" / name).read_text() for name in files} == files
    capsys.readouterr()

    assert write_report(str(tmp_path / "file"), RESULTS, **arguments) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"no report: {tmp_path}/file/report.html was not written: ")

    monkeypatch.setattr(report, "draw", lambda _: 1 / 0)
    assert write_report(str(tmp_path / "folder"), RESULTS, **arguments) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"no report: {tmp_path}/folder/report.html was not written: ZeroDivisionError: division by zero; "
        "the results stand"
    )
