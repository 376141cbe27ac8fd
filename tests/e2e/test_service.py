"""The search service as its users meet it: over HTTP, in a browser, in the terminal, and what may be sent to it."""

import contextlib
import http.client
import io
import json
import re
import select
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from nsl_dist.config import SearchConfig
from nsl_dist.data.layouts import read_catalogue
from nsl_dist.embedder import load_embedder
from nsl_dist.retrieval.image_search import Searcher, prepare_gallery
from nsl_dist.retrieval.vector_files import pack_codes
from tests.support.browser import prefer, resize
from tests.support.checkpoints import write_model
from tests.support.images import encode, write_image, write_inshop
from tests.support.processes import PATIENCE, ROOT, job, listening_addresses
from tests.support.search_service import DIM, LOOSE, SIZES, Service

pytestmark = pytest.mark.slow


def test_it_says_what_it_serves(service: Service) -> None:
    text = service.log.read_text()
    assert f"checkpoint  {service.checkpoint}: resnet18, {DIM} dimensions, 32 pixels" in text
    assert f"gallery  {len(service.files)} images of {len(SIZES) + LOOSE} classes" in text
    assert "index  float: Flat, 128 bytes a vector; binary: Flat, 4 bytes an image" in text
    assert f"serving  http://127.0.0.1:{service.port} (page)" in text
    status, content = service.ask("GET", "/health")
    assert (status, json.loads(content)) == (
        200,
        {"status": "ok", "images": 37, "classes": 13, "dimensions": DIM, "kinds": ["float", "binary"]},
    )


@pytest.mark.parametrize("kind", ["float", "binary"])
def test_neighbours_are_those_of_brute_force(service: Service, kind: str, tmp_path: Path) -> None:
    write_image(tmp_path / "new.png", 3, 99)
    encoded = (tmp_path / "new.png").read_bytes()
    embedder = load_embedder(str(service.checkpoint))
    gallery, query = embedder(service.files), embedder([encoded])
    if kind == "float":
        scores = (gallery @ query.T)[:, 0]
        nearest = np.sort(scores)[::-1][:7]
    else:
        scores = (np.unpackbits(pack_codes(gallery), axis=1) != np.unpackbits(pack_codes(query), axis=1)).sum(1)
        nearest = np.sort(scores)[:7]
    answer = service.search(f"/search?kind={kind}&k=7", encoded)
    found = answer["neighbours"]
    ids = [each["id"] for each in found]
    assert len(set(ids)) == 7
    np.testing.assert_allclose([each["score"] for each in found], nearest, atol=1e-5)
    np.testing.assert_allclose([each["score"] for each in found], scores[ids], atol=1e-5)
    for each in found:
        file = service.files[each["id"]]
        assert each["class"] == file.relative_to(service.files[0].parent).parts[0]
        assert service.ask("GET", each["image"]) == (200, file.read_bytes())
    assert answer["kind"] == kind
    assert list(answer["milliseconds"]) == ["decode", "embed", "search"]
    form = (
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="new.png"\r\nContent-Type: image/png\r\n\r\n'
        + encoded
        + b"\r\n--x--\r\n"
    )
    of_form = service.search(f"/search?kind={kind}&k=7", form, {"Content-Type": "multipart/form-data; boundary=x"})
    assert of_form["neighbours"] == found


def test_an_image_of_the_gallery_finds_itself_first(service: Service) -> None:
    for image_id in range(len(service.files)):
        by_id = service.search(f"/search/{image_id}?k=3")["neighbours"]
        assert by_id[0]["id"] == image_id
        assert by_id[0]["score"] == pytest.approx(1, abs=1e-5)
        assert service.search(f"/search/{image_id}?kind=binary&k=1")["neighbours"][0]["score"] == 0
    assert len(service.search("/search/0?k=1000")["neighbours"]) == len(service.files)


def test_queries_at_once_are_answered_as_alone(service: Service) -> None:
    paths = [
        f"/search/{image_id}?kind={kind}&k={k}"
        for image_id in range(10)
        for kind in ("float", "binary")
        for k in (2, 9)
    ]

    def scores(path: str) -> list[float]:
        return [each["score"] for each in service.search(path)["neighbours"]]

    alone = [scores(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for before, now in zip(alone, pool.map(scores, paths), strict=True):
            np.testing.assert_allclose(now, before, atol=1e-5)


def test_a_sample_is_of_the_gallery(service: Service) -> None:
    sample = json.loads(service.ask("GET", "/sample?n=12")[1])
    assert len({each["id"] for each in sample}) == 12
    assert len(json.loads(service.ask("GET", "/sample?n=100")[1])) == len(service.files)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that promises more pixels than it has bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def bad_requests() -> list[tuple[str, str, bytes | None, dict[str, str]]]:
    """Return 200 requests that must be refused."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
    good = encode(pixels)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    bodies = [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"]
    bodies += [
        b"%PDF-1.7",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"\0" * 1000,
        b"P6 9999999 9999999 255\n",
        b"II*\0\xff\xff\xff\xff",
    ]
    bodies += [bomb(50_000, 50_000), bomb(10_000, 5_001), bomb(2**31 - 1, 1), bomb(40, 40)]
    bodies += [rng.bytes(int(size)) for size in rng.integers(1, 5000, 20)]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"):
        whole = encode(pixels, kind)
        bodies += [whole[: int(len(whole) * share)] for share in np.linspace(0.01, 0.8, 18)]
    jpeg = bytearray(good)
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = b"\xff\xff\xff\xff"  # 65,535 x 65,535 pixels
    bodies.append(bytes(jpeg))
    requests: list[tuple[str, str, bytes | None, dict[str, str]]] = [("POST", "/search", body, {}) for body in bodies]
    requests += [
        ("POST", f"/search?{query}", good, {})
        for query in (
            "k=0",
            "k=-1",
            "k=1001",
            "k=x",
            "k=",
            "k=1e3",
            "k=99999999999999999999",
            "kind=x",
            "kind=",
            "kind=float32",
        )
    ]
    requests += [
        ("POST", "/search", body, form)
        for body in (
            b"",
            b"hello",
            good,
            b"--x\r\n",
            b"--x--\r\n",
            b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nhello\r\n--x--\r\n',
        )
    ]
    requests += [("POST", "/search", good, {"Content-Type": "multipart/form-data"})]
    requests += [
        ("GET", path, None, {})
        for path in (
            "/images/../../etc/passwd", "/images/%2e%2e/%2e%2e/etc/passwd", "/images/..%2f..%2fetc%2fpasswd",
            "//etc/passwd", "/images//etc/passwd", "/images/%2fetc%2fpasswd", "/images/0/../1", "/images/-1",
            "/images/37", "/images/1e1", "/images/%00", "/images/0x1", "/images/99999999999999999999999",
            "/images/..%5c..%5cwindows", "/images/", "/images", "/images/0;ls", "/images/0%20OR%201=1", "/etc/passwd",
            "/..", "/static/search.html", "/docs", "/openapi.json", "/sample?n=0", "/sample?n=101",
            "/sample?n=x", "/search", "/search/0",
        )
    ]  # fmt: skip
    requests += [
        ("POST", path, None, {}) for path in ("/search/-1", "/search/37", "/search/x", "/search/../0", "/", "/sample")
    ]
    requests += [(method, path, None, {}) for method in ("PUT", "DELETE", "PATCH") for path in ("/search", "/images/0")]
    too_large = b"\xff\xd8\xff" + b"\0" * (10 * 2**20)
    return [*requests, ("POST", "/search", too_large, {}), ("POST", "/search", too_large, form)]


def test_bad_requests_are_refused_and_do_no_harm(service: Service) -> None:
    requests = bad_requests()
    assert len(requests) >= 200
    for number, (method, path, body, headers) in enumerate(requests):
        status, content = service.ask(method, path, body, headers)
        shown = f"{number}: {method} {path} {(body or b'')[:40]!r}: {status} {content[:200]!r}"
        assert 400 <= status < 500, shown
        error = json.loads(content)
        assert list(error) == ["error"], shown
        assert 0 < len(error["error"]) < 300, shown
        assert "Traceback" not in error["error"], shown
        assert str(ROOT) not in error["error"], shown
    assert service.search("/search/0?k=1")["neighbours"][0]["id"] == 0


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"Content-Length: 104857600"])
def test_a_stream_of_100_mb_is_refused_on_the_way(service: Service, head: bytes) -> None:
    piece = b"\0" * 65536
    if b"chunked" in head:
        piece = b"10000\r\n" + piece + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it need not read on once it has refused
            while sent < 20 * 2**20 and not select.select([connection], [], [], 0)[0]:
                connection.sendall(piece)
                sent += len(piece)
        answer = connection.recv(65536)  # while the other 80 MB are still to come
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert service.search("/search/0?k=1")["neighbours"][0]["id"] == 0


def test_who_hangs_up_does_no_harm(service: Service) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
            connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n\xff\xd8\xff")
    assert service.search("/search/0?k=1")["neighbours"][0]["id"] == 0


def test_large_images_are_searched(service: Service) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (10_000, 5_000), (200, 30, 30)).save(stream, "JPEG")
    assert len(service.search("/search?k=3", stream.getvalue())["neighbours"]) == 3
    stream = io.BytesIO()
    Image.new("L", (1, 5_000_000)).save(stream, "PNG")
    assert len(service.search("/search?k=3", stream.getvalue())["neighbours"]) == 3


def test_pages_load_nothing_from_elsewhere(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
    for path in ("/", "/health", "/images/0", "/nothing"):
        connection.request("GET", path)
        response = connection.getresponse()
        content = response.read()
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        if path == "/":
            assert not re.search(rb"https?://|src=\"//|@import", content)


def test_nothing_listens_beyond_loopback(service: Service) -> None:
    addresses = listening_addresses(of_session_below=service.process.pid)
    assert any(address.endswith(f":{service.port:04X}") for address in addresses)
    loopback = re.compile(r"(0{16}FFFF0000)?[0-9A-F]{6}7F:|0{24}01000000:")
    assert not [address for address in addresses if not loopback.match(address)], addresses


def test_page(service: Service, browser: webdriver.Chrome, tmp_path: Path) -> None:
    def shows(check: Any) -> None:
        WebDriverWait(browser, PATIENCE).until(lambda _: check())

    def text(selector: str) -> str:
        return browser.find_element(By.CSS_SELECTOR, selector).text

    def scores() -> list[str]:
        # In one go, or the page may replace them meanwhile.
        script = "return [...document.querySelectorAll('#grid .score')].map(each => each.textContent)"
        return browser.execute_script(script)

    def focused() -> Any:
        return browser.switch_to.active_element

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    browser.get(f"http://127.0.0.1:{service.port}/")
    shows(lambda: scores() == ["search by it"] * 12)
    assert text("#gallery") == f"37 images of 13 classes, {DIM} dimensions"

    query = service.files[20]
    upload = browser.find_element(By.ID, "file")
    upload.send_keys(str(query))
    shows(lambda: text("#title") == "24 nearest")
    assert scores()[0] == "similarity 1.0000"
    assert len(scores()) == 24
    assert re.fullmatch(r"decode\s[\d.]+\sms, embed\s[\d.]+\sms, search\s[\d.]+\sms", text("#timing"))
    assert text("#asked") == query.name
    loaded = "return [...document.images].filter(each => !each.hidden).map(each => [each.naturalWidth > 0, each.alt])"
    shows(lambda: all(width and alt for width, alt in browser.execute_script(loaded)))

    # The keyboard alone: to the radio group, to the other kind, to a neighbour.
    for _ in range(3):  # as many as there are before the group, wherever the focus was
        if focused().get_attribute("name") != "kind":
            press(Keys.TAB)
    assert focused().get_attribute("name") == "kind"
    press(Keys.ARROW_DOWN)
    shows(lambda: all(re.fullmatch(rf"\d+ of {DIM} bits differ", each) for each in scores()))
    assert scores()[0].startswith("0 of")
    press(Keys.TAB, Keys.TAB)
    chosen = focused().get_attribute("data-id")
    assert chosen == browser.find_elements(By.CSS_SELECTOR, "#grid button")[1].get_attribute("data-id")
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    path = focused().find_element(By.CSS_SELECTOR, ".path").text
    assert path in {str(file.relative_to(service.files[0].parent)) for file in service.files}
    press(Keys.ENTER)
    shows(lambda: text("#asked") == path)
    assert scores()[0].startswith("0 of")
    assert focused().get_attribute("id") == "title"
    assert not browser.get_log("browser")

    (tmp_path / "notes.jpg").write_text("not an image")
    upload.send_keys(str(tmp_path / "notes.jpg"))
    shows(lambda: text("#message").startswith("This is no image that can be read"))
    (tmp_path / "huge.jpg").write_bytes(b"\0" * (11 * 2**20))
    upload.send_keys(str(tmp_path / "huge.jpg"))
    shows(lambda: text("#message") == "The file huge.jpg has 11.0 MiB; 10 MiB is the most.")
    assert len(scores()) == 24
    upload.send_keys(str(query))
    shows(lambda: text("#message") == "")
    (refused,) = browser.get_log("browser")  # Chromium notes the status; nothing else is wrong
    assert "400 (Bad Request)" in refused["message"]

    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        for width in (1280, 390):
            resize(browser, width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_data_set_is_searched_by_split(tmp_path: Path, cluster: None) -> None:
    checkpoint = write_model(tmp_path / "checkpoint", dim=DIM, image_size=32)
    raw = write_inshop(tmp_path / "raw", train=[2] * 3, query=[1, 1], gallery=[3, 2])
    for split, pattern, count in ((None, "gallery_*", 5), ("train", "train_*", 6)):
        config = SearchConfig(
            checkpoint=str(checkpoint), gallery=str(raw), split=split, storage=str(tmp_path / "storage")
        )
        searcher = Searcher(prepare_gallery(config), config)
        assert searcher.num_images == count
        images = {searcher.image(image_id) for image_id in range(count)}
        assert images == {(path.read_bytes(), "image/jpeg") for path in raw.rglob(pattern)}
        assert searcher.class_name(0) == f"id_{1 if split else 4:08d}"


def test_neighbours_in_the_terminal(
    service: Service,
    tmp_path: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    query, other = service.files[20:22]
    arguments = [f"--checkpoint={service.checkpoint}", f"--gallery={service.files[0].parent}"]
    arguments += [f"--storage={service.checkpoint.parent / 'storage'}", "--k=3"]
    index = ["--index=IVF4,Flat", "--index-parameters=nprobe=4"]
    job(monkeypatch, "search", *arguments, *index, "--query", str(query), str(other))
    shown = capsys.readouterr().out
    assert "embeddings: all there in" in shown
    tables = shown.split("\n\n")[1:]
    measures = ("cosine similarity, 1 is the same", f"Hamming distance in bits of {DIM}, 0 is the same")
    assert [table.splitlines()[0] for table in tables] == [
        f"{file} among 37 images of {service.files[0].parent}, {measure}"
        for file in (query, other)
        for measure in measures
    ]
    assert re.fullmatch(rf" +1 +1\.0000  (thing \d)  +\1/{query.name}", tables[0].splitlines()[2])
    assert len(tables[1].splitlines()) == 5
    bad = tmp_path / "notes.jpg"
    bad.write_text("not an image")
    with pytest.raises(SystemExit) as ended:
        job(monkeypatch, "search", *arguments, "--query", str(bad))
    assert ended.value.code == 2
    message = f"error: --query {bad}: this is no image that can be read: not an image in one of the formats JPEG"
    assert message in capsys.readouterr().err


def test_mistakes_are_told_in_a_line(
    service: Service,
    tmp_path: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(message: str, *arguments: str) -> None:
        given = {"--checkpoint": str(service.checkpoint), "--gallery": str(tmp_path), "--storage": str(tmp_path / "s")}
        given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
        with pytest.raises(SystemExit) as ended:
            job(monkeypatch, "search", *[f"{name}={value}" for name, value in given.items()])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    told(f"error: cannot listen on 127.0.0.1:{service.port}: Address already in use; give", "--port", str(service.port))
    query = ["--query", str(service.files[0])]
    told("error: no checkpoint in", "--checkpoint", str(tmp_path), *query)
    told("contains no images", *query)
    told("could not parse index string", "--index", "Nonsense", *query)


def test_classes_of_a_catalogue(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "b/deep/2.PNG", "c/1.jpg", "loose.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "notes.txt").write_text("not an image")
    records = read_catalogue(str(tmp_path)).to_pylist()
    assert [(row["path"], row["class_id"], row["split"]) for row in records] == [
        ("b/1.jpg", "b", "test"),
        ("b/deep/2.PNG", "b/deep", "test"),
        ("c/1.jpg", "c", "test"),
        ("loose.webp", "loose.webp", "test"),
    ]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_catalogue(str(tmp_path / "none"))
