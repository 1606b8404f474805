"""The page of ``overlock demo``, in the distribution's Chromium and by its interface for programs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from pictures import make_image
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
httpx = pytest.importorskip("httpx")
pytest.importorskip("pytorch_grad_cam")

from helpers import randomise  # noqa: E402

from overlock.checkpoints import Record, save_model  # noqa: E402
from overlock.demo.network import Network  # noqa: E402
from overlock.demo.page import make_page, serve  # noqa: E402
from overlock.demo.stock import Stock  # noqa: E402
from overlock.demo.uploads import find_photos  # noqa: E402
from overlock.deploy import Detector, Segmenter  # noqa: E402
from overlock.deploy.classify import DEFAULT_FILE  # noqa: E402
from overlock.ops import backend  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")
SLOW = 60_000  # milliseconds that a busy machine may take


@pytest.fixture(scope="module")
def other_network(tmp_path_factory):
    """The file of a small model of timm's with weights drawn at random."""
    record = Record(
        model="test_resnet", model_args=dict(num_classes=3), classes=("blue", "green", "red"),
        preprocessing=dict(input_size=(3, 64, 64), crop_pct=1.0),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_model(file, randomise(record.make_network()).state_dict(), record)
    return file


@pytest.fixture(scope="module")
def dense_networks(tmp_path_factory):
    """Files of a small detector and a small segmenter with weights drawn at random."""
    few = dict(hidden_channels=16)
    detector = Record(
        model="overlock_atto", head="mask_rcnn", classes=("cell", "dust"),
        model_args=few | dict(min_size=64, max_size=64, proposals=20),
    )  # fmt: skip
    segmenter = Record(
        model="overlock_atto", head="upernet", classes=("road", "sky", "tree"), model_args=few,
        preprocessing=dict(scale=(64, 64)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    for name, record in (("detector", detector), ("segmenter", segmenter)):
        save_model(folder / f"{name}.safetensors", randomise(record.make_network()).state_dict(), record)
    return folder


@pytest.fixture(scope="module")
def stock(other_network, dense_networks):
    return Stock(
        network=Network(str(DEFAULT_FILE)), beside=Network(str(other_network)),
        detector=Detector.from_checkpoint(dense_networks / "detector.safetensors"),
        segmenter=Segmenter.from_checkpoint(dense_networks / "segmenter.safetensors"),
        photos=find_photos(None), max_pixels=50_000_000,
    )  # fmt: skip


@pytest.fixture(scope="module")
def address(stock):
    page = make_page(stock)
    yield serve(page, host="127.0.0.1", port=free_port(), max_megabytes=20).rstrip("/")
    page.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Tests run as root in containers, where Chromium's own sandbox cannot start.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page for a visitor of its own; nobody may have asked another server for anything."""
    contexts, asked = [], []

    def open_page(query: str = "", **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/{query}")
        page.wait_for_selector("#kernels img")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def first_class(page) -> str:
    return page.locator("#classes [data-testid=label-output-value]").inner_text()


def pictures(page, where: str) -> list[str]:
    return page.locator(f"{where} img").evaluate_all("all => all.map(one => one.src)")


def wait_for_change(page, where: str, before: list[str]) -> list[str]:
    page.wait_for_function(
        "([where, before]) => { const one = document.querySelector(where + ' img'); return one && one.src !== before }",
        arg=[where, before[0]],
    )
    return pictures(page, where)


@needs_chromium
def test_photo_point_and_prior(visit, tmp_path):
    page = visit()
    shutil.copy(find_photos(None)["dog.jpg"], tmp_path / "mine.jpg")
    before = pictures(page, "#kernels")
    page.set_input_files("#upload input[type=file]", tmp_path / "mine.jpg")
    before = wait_for_change(page, "#kernels", before)
    assert first_class(page) == "dog"
    for where in ("#overview", "#stage3", "#stage4", "#beside"):
        page.wait_for_selector(f"{where} img")

    page.locator("#photo img").click(position=dict(x=20, y=20))
    after = wait_for_change(page, "#kernels", before)
    assert len(after) == len(before) > 1
    page.locator("#block label").nth(3).click()
    wait_for_change(page, "#kernels", after)

    page.locator("#prior input").click()
    page.get_by_role("option", name="zeros: no prior at all").click()
    page.wait_for_selector("#changes table")
    page.wait_for_function("document.querySelectorAll('#kernels section').length === 2")
    moved = [float(cell) for cell in page.locator("#changes td.number").all_inner_texts()]
    assert len(moved) == 2 * page.locator("#block label").count()
    assert max(moved) > 0


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(color_scheme=scheme)
    for tab in ("Look inside", "Detection", "Segmentation", "Compare"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)  # the tab fades in, and half-way its colours are not its own
        # Gradio labels the box of a picture that is not there yet, which a plain box may not be.
        found = axe.run(page, context={"exclude": [["[aria-label='Empty value']"]]}).response["violations"]
        serious = {
            f"{rule['id']}: {node['html'][:200]}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        }
        assert not serious, f"{tab}: {sorted(serious)}"


@pytest.mark.slow
@needs_chromium
def test_link_restores_a_view(visit):
    page = visit("?photo=owl.jpg&x=25&y=75&block=2&prior=cat.jpg")
    page.wait_for_selector("#changes table")
    assert page.locator("#across input[type=number]").input_value() == "25"
    assert page.locator("#down input[type=number]").input_value() == "75"
    assert page.locator("#prior input").input_value() == "cat.jpg"
    assert "block 2" in page.locator("#kernels h3").first.inner_text()
    page.wait_for_function("location.search.includes('prior=cat.jpg')")
    strange = visit("?photo=none.jpg&x=nan&y=&block=999&prior=1")
    assert strange.locator("#block input").nth(-1).is_checked()


@pytest.mark.slow
@needs_chromium
def test_bad_files_get_sentences(visit, tmp_path):
    page = visit()
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    (tmp_path / "notes.jpg").write_text("no photo at all")
    make_image("red", 0, size=64).crop((0, 0, 64, 2)).save(tmp_path / "strip.png")
    for name, told in (
        ("large.png", "10000 x 10000 pixels, more than the 50 million"),
        ("notes.jpg", "notes.jpg is no image"),
        ("strip.png", "a strip of 64 x 2 pixels"),
    ):
        page.set_input_files("#upload input[type=file]", tmp_path / name)
        page.get_by_text(told).first.wait_for()
    frames = [make_image(colour, 0) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    page.set_input_files("#upload input[type=file]", tmp_path / "moving.gif")
    page.get_by_text("moving.gif is an animation; this is its first frame").wait_for()


@pytest.mark.slow
@needs_chromium
def test_visitors_see_their_own(visit):
    one, two = visit("?photo=cat.jpg"), visit("?photo=dog.jpg")
    assert (first_class(one), first_class(two)) == ("cat", "dog")
    before = pictures(one, "#affinities"), pictures(two, "#affinities")
    one.locator("#photo img").click(position=dict(x=20, y=20))
    wait_for_change(one, "#affinities", before[0])
    assert pictures(two, "#affinities") == before[1]
    assert "photo=cat.jpg" in one.url
    again = visit("?photo=dog.jpg")
    assert pictures(again, "#affinities") == before[1]


@pytest.mark.slow
@needs_chromium
def test_detection(visit, stock, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Detection").click()
    shutil.copy(stock.photos["dog.jpg"], tmp_path / "mine.jpg")
    page.set_input_files("#detect_upload input[type=file]", tmp_path / "mine.jpg")
    with backend("torch"):
        found = stock.detector(stock.read(tmp_path / "mine.jpg").image, threshold=0.05)
    scores = [score for score in found.scores if score >= 0.5]
    page.wait_for_selector("#detect_picture img")
    assert shown_scores(page) == pytest.approx(scores, abs=1e-3)
    assert page.locator("#detect_table tbody tr").first.inner_text().startswith(found.labels[0])
    (before,) = pictures(page, "#detect_picture")

    page.locator("#threshold input[type=range]").focus()
    page.keyboard.press("Home")  # the least score, by keyboard
    wait_for_change(page, "#detect_picture", [before])
    page.wait_for_function(
        "count => document.querySelectorAll('#detect_table tbody tr').length === count", arg=len(found.scores)
    )
    assert len(scores) < len(found.scores)
    page.keyboard.press("End")
    page.get_by_text("No object has a score of 0.95 or more").wait_for()

    (tmp_path / "notes.jpg").write_text("no photo at all")
    page.set_input_files("#detect_upload input[type=file]", tmp_path / "notes.jpg")
    page.get_by_text("notes.jpg is no image").first.wait_for()
    make_image("red", 0).save(tmp_path / "moving.gif", save_all=True, append_images=[make_image("blue", 0)])
    page.set_input_files("#detect_upload input[type=file]", tmp_path / "moving.gif")
    page.get_by_text("moving.gif is an animation; this is its first frame").wait_for()


def shown_scores(page) -> list[float]:
    page.wait_for_selector("#detect_table td.number")
    return [float(cell) for cell in page.locator("#detect_table td.number").all_inner_texts()]


@pytest.mark.slow
@needs_chromium
def test_segmentation(visit, stock):
    page = visit()
    page.get_by_role("tab", name="Segmentation").click()
    names = list(stock.photos)
    page.locator("#segment_photos button.thumbnail-item").nth(names.index("cat.jpg")).click()
    with backend("torch"):
        shares = stock.segmenter(stock.read_chosen("cat.jpg").image).shares()
    page.wait_for_selector("#segment_picture img")
    rows = page.locator("#segment_table tbody tr").all_inner_texts()
    assert {row.split()[0]: float(row.split()[1]) for row in rows} == pytest.approx(shares, abs=1e-3)
    before = pictures(page, "#segment_picture")
    page.locator("#segment_photos button.thumbnail-item").nth(names.index("owl.jpg")).click()
    wait_for_change(page, "#segment_picture", before)


def test_tabs_without_networks_say_how_to_get_some(stock):
    alone = dataclasses.replace(stock, beside=None, detector=None, segmenter=None)
    text = str(make_page(alone).get_config_file())
    for line in ("train small_detect", "overlock demo --detector", "overlock demo --segmenter", "demo --checkpoint"):
        assert line in text


@pytest.mark.slow
@needs_chromium
def test_comparison(visit, stock):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare").click()
    page.wait_for_selector("#comparison table")
    assert page.locator("#comparison tbody tr").count() == len(stock.photos)
    assert f"of {len(stock.photos)} photos" in page.locator("#comparison h3").inner_text()


def ask(address: str, file) -> dict[str, float]:
    """The classes of a photo, as a program asks for them."""
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=120) as client:
        (path,) = client.post("/upload", files={"files": (file.name, file.read_bytes())}).json()
        data = [dict(path=path, orig_name=file.name, meta=dict(_type="gradio.FileData")), "stage 3, block 1"]
        event = client.post("/call/look", json=dict(data=data)).json()["event_id"]
        answer = client.get(f"/call/look/{event}").text
    found = json.loads(re.search(r"event: complete\ndata: (.*)", answer)[1])
    label = next(one for one in found if isinstance(one, dict) and "confidences" in one)
    return {one["label"]: one["confidence"] for one in label["confidences"]}


@pytest.mark.slow
def test_twenty_at_once_get_their_own(address, stock, tmp_path):
    files = []
    for i in range(20):
        files.append(tmp_path / f"{i}.png")
        make_image(("red", "green", "blue")[i % 3], i).rotate(18 * i).save(files[-1])
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda file: ask(address, file), files))
    expected = [dict(stock.network.look(stock.read(file).image).classes) for file in files]
    assert [list(one) for one in answers] == [list(one) for one in expected]
    for answer, own in zip(answers, expected, strict=True):
        assert answer == pytest.approx(own, abs=1e-4)
    assert len({tuple(one.values()) for one in expected}) == 20


def test_nothing_from_elsewhere(address):
    answer = httpx.get(address, timeout=120)
    assert not re.findall(r"<(?:script|link|img|meta|iframe)[^>]*https?://(?!127\.0\.0\.1)", answer.text)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "google" not in answer.text
