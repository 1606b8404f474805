"""The page of ``overlock demo --export``: its graphs, its runtime, and all of it in the distribution's Chromium."""

from __future__ import annotations

import shutil
import threading
import urllib.error
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO

import pytest
import torch
from helpers import randomise, tiny
from pictures import make_image
from PIL import Image
from rich.console import Console

from overlock.checkpoints import Record
from overlock.cli import main
from overlock.demo.static import web_runtime
from overlock.demo.static.folder import FILES, check_network
from overlock.demo.static.web_runtime import find_archive, kept_archive
from overlock.demo.uploads import find_photos

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")
SLOW = 60_000  # milliseconds that a busy machine may take
LIMITS = dict(megabytes=20, pixels=50_000_000, aspect=4)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing: the test's output is for the test."""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Tests run as root in containers, where Chromium's own sandbox cannot start.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def serve_files():
    """Starts a file server for a folder, and gives its address."""
    servers = []

    def serve(folder) -> str:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_photos(folder) -> None:
    """Files that a visitor may drop, most of them no good."""
    Image.new("L", (10_000, 10_000)).save(folder / "large.png")
    (folder / "notes.jpg").write_text("no photo at all")
    make_image("red", 0, size=64).crop((0, 0, 64, 2)).save(folder / "strip.png")
    make_image("red", 0, size=64).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:300])
    frames = [make_image(colour, 0) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.gif")
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])


TOLD = {
    "large.png": "large.png has 10000 x 10000 pixels, more than the 50 million of this page; make it smaller.",
    "notes.jpg": "notes.jpg is no image, or a damaged one; give a photo as JPEG, PNG, WebP or GIF.",
    "strip.png": "strip.png is a strip of 64 x 2 pixels; crop it so that the long side is at most 4 times "
    "the short one.",
    "cut.jpg": "cut.jpg is no image, or a damaged one; give a photo as JPEG, PNG, WebP or GIF.",
    "whole.jpg": "",
    "still.gif": "",
    "moving.gif": "moving.gif is an animation; this is its first frame.",
    "moving.webp": "moving.webp is an animation; this is its first frame.",
    "moving.png": "moving.png is an animation; this is its first frame.",
}


@needs_chromium
def test_photos_are_checked_before_they_are_decoded(browser, serve_files, tmp_path):
    """By the page's own script, without a network."""
    shutil.copy(FILES / "photo.js", tmp_path)
    make_photos(tmp_path)
    page = browser.new_page()
    page.goto(serve_files(tmp_path) + "/notes.jpg")
    script = """async ([name, limits]) => {
        const { readPhoto } = await import("/photo.js");
        const file = await (await fetch(name)).blob();
        return readPhoto(file, name, limits).then((photo) => photo.note, (error) => error.message);
    }"""
    assert {name: page.evaluate(script, [name, LIMITS]) for name in TOLD} == TOLD
    few = {**LIMITS, "megabytes": 0.0001}
    assert "more than the 0.0001 MB of this page" in page.evaluate(script, ["whole.jpg", few])
    page.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the page of the package's own network, written by the command."""
    try:
        find_archive(None, Console(file=StringIO()))
    except ValueError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("static") / "page"
    assert main(["demo", "--export", str(folder)]) == 0
    return folder


@pytest.fixture
def visit(browser, serve_files, folder):
    """Opens the page; nothing may fail in it, and nobody may have asked another server for anything."""
    from playwright.sync_api import expect

    address, asked, faults = serve_files(folder), [], []
    page = browser.new_page()
    page.set_default_timeout(SLOW)
    expect.set_options(timeout=SLOW)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda fault: faults.append(str(fault)))

    def open_page(query: str = ""):
        page.goto(f"{address}/{query}")
        return page, expect

    yield open_page
    page.close()
    assert not faults
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.mark.slow
@needs_chromium
def test_photo_point_and_prior(visit, tmp_path):
    page, expect = visit()
    expect(page.locator("#classes li").first).to_contain_text("cat")
    shutil.copy(find_photos(None)["dog.jpg"], tmp_path / "mine.jpg")
    page.set_input_files("#upload", tmp_path / "mine.jpg")
    expect(page.locator("#status")).to_contain_text("mine.jpg: dog")
    expect(page.locator("#classes li").first).to_contain_text("dog")
    assert "mine" not in page.url  # a visitor's own photo is in no link
    before, maps = drawn(page, "#kernels canvas"), drawn(page, "#overview, #focus")
    assert len(before) == 9  # affinity, and four groups' kernels of two sizes
    assert len(set(maps)) == 2
    page.locator("#photo").click(position=dict(x=20, y=20))
    after = drawn(page, "#kernels canvas")
    assert not set(before) & set(after)
    page.locator("#photo").press("ArrowRight")
    expect(page.locator("#place")).not_to_contain_text("0 % from the left")

    shares = page.locator("#classes li").all_inner_texts()
    page.select_option("#prior", "cat.jpg")
    expect(page.locator("#changes caption")).to_have_text("With the prior of cat.jpg")
    moved = [float(cell) for cell in page.locator("#changes td.number").all_inner_texts()]
    assert len(moved) == 2 * page.locator("#block option").count()
    assert min(moved) > 0
    assert page.locator("#new_classes li").all_inner_texts() != shares
    assert drawn(page, "#swapped_kernels canvas") != drawn(page, "#kernels canvas")


@pytest.mark.slow
@needs_chromium
def test_bad_files_get_sentences(visit, tmp_path):
    page, expect = visit("?photo=dog.jpg")
    expect(page.locator("#classes li").first).to_contain_text("dog")
    make_photos(tmp_path)
    for name in ("large.png", "notes.jpg"):
        page.set_input_files("#upload", tmp_path / name)
        expect(page.locator("#error")).to_have_text(TOLD[name])
        expect(page.locator("#classes li").first).to_contain_text("dog")
    page.set_input_files("#upload", tmp_path / "moving.gif")
    expect(page.locator("#note")).to_have_text(TOLD["moving.gif"])
    expect(page.locator("#error")).to_be_hidden()


@pytest.mark.slow
@needs_chromium
def test_link_restores_a_view(visit):
    page, expect = visit("?photo=owl.jpg&x=25&y=75&block=2&prior=cat.jpg")
    expect(page.locator("#changes caption")).to_have_text("With the prior of cat.jpg")
    expect(page.locator("#place")).to_have_text("25 % from the left, 75 % from the top")
    assert page.locator("#block").input_value() == "1"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, expect = visit("?photo=dog.jpg&prior=cat.jpg")
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("#changes caption")).to_be_visible()
    found = [rule for rule in axe.run(page).response["violations"] if rule["impact"] in ("serious", "critical")]
    assert not found, [(rule["id"], node["html"][:200]) for rule in found for node in rule["nodes"]]


@pytest.mark.slow
@needs_chromium
def test_disk_needs_a_file_server(browser, folder):
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    assert "needs a file server" in page.locator("#status").inner_text()
    page.close()


def drawn(page, where: str) -> list[str]:
    """What canvases show."""
    return page.locator(where).evaluate_all("all => all.map((one) => one.toDataURL())")


@pytest.mark.slow
def test_graphs_with_a_map_of_the_overview(tmp_path):
    """Those of a network with an auxiliary classifier; one that differs from PyTorch is refused."""
    for package in ("onnxscript", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    from overlock.demo.static.graphs import check_graphs, record_all, write_graphs

    network = randomise(tiny(aux_head=True))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    write_graphs(network, images, tmp_path)
    difference, mixings = check_graphs(network, [images], tmp_path)
    assert difference < 1e-4
    assert len(mixings) == 3
    assert record_all(network, images)[0]["overview"].shape[1] == 5
    with torch.no_grad():
        network.head.fc.bias += 1
    with pytest.raises(ValueError, match="the graph's logits differs from PyTorch"):
        check_graphs(network, [images], tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--runtime file.tgz", "--runtime and --overwrite go with --export DIR"),
        ("--export {} --beside resnet18", "--beside is for the page that is served"),
        ("--export {} --port 80", "--port is for the page that is served"),
        ("--export {} --runtime none.tgz", "none.tgz: cannot be read"),
        ("--export {} --checkpoint none.safetensors", "none.safetensors"),
    ],
)
def test_command(line, told, tmp_path, capsys):
    assert main(["demo", *line.format(tmp_path / "page").split()]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_networks_without_class_maps():
    record = Record(model="overlock_xt", model_args=dict(num_classes=5), classes=tuple("abcde"))
    assert check_network(tiny(), record, "a.pt") is not None
    with pytest.raises(ValueError, match=r"a.pt is a .*; --export takes an OverLoCK classifier"):
        check_network(torch.nn.Linear(1, 1), record, "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: --export takes a classifier with average pooling"):
        check_network(tiny(num_classes=0), record, "a.pt")


def test_archive_by_hand(tmp_path):
    with pytest.raises(ValueError, match=r"none.tgz: cannot be read \(No such file or directory\); download https"):
        find_archive(tmp_path / "none.tgz", Console())
    (tmp_path / "other.tgz").write_bytes(b"another release")
    with pytest.raises(ValueError, match=r"other.tgz: not the archive of onnxruntime-web 1\.\d+\.\d+; download https"):
        find_archive(tmp_path / "other.tgz", Console())


def test_archive_that_cannot_be_fetched(cache, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(web_runtime.urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"cannot be fetched \(no route to host\); .* --runtime"):
        find_archive(None, Console())
    assert not kept_archive().exists()


def test_archive_that_is_another(cache, monkeypatch):
    class Answer(BytesIO):
        headers = {"Content-Length": "5"}

    monkeypatch.setattr(web_runtime.urllib.request, "urlopen", lambda *_, **__: Answer(b"a web"))
    with pytest.raises(ValueError, match=r"gave is not onnxruntime-web .* --runtime"):
        find_archive(None, Console(file=StringIO()))
    assert not kept_archive().exists()
