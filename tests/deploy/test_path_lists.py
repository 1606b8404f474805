"""Lists of paths: in any encoding, and never whole in memory."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from overlock.deploy.inputs import Failure, Item
from overlock.deploy.path_lists import paths_in
from overlock.deploy.sources import expand
from overlock.files import Outputs


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings(tmp_path, encoding, end):
    names = ["größe.png", "空.png", "two words.png", " begins.png"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_bytes(end.join(["", *names, "nowhere.png "]).encode(encoding))
    assert list(paths_in(str(tmp_path / "list.txt"))) == [*(tmp_path / name for name in names), Path("nowhere.png")]


def test_names_that_are_not_utf_8(tmp_path):
    """Bytes as they stand on the disk; and Latin-1, of a name that is UTF-8 there."""
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(raw)).touch()
    (tmp_path / "gr\u00fcn.png").touch()
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\ngr\xfcn.png\n")
    first, second = paths_in(str(tmp_path / "list.txt"))
    assert os.fsencode(first) == raw
    assert second == tmp_path / "gr\u00fcn.png"
    sources = expand([str(tmp_path / "list.txt")], outputs=Outputs())
    assert [source.source.isprintable() for source in sources.images] == [True, True]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "there is no path in it"),
        (b" \n\n", "there is no path in it"),
        ("a.png\n".encode("utf-16-le"), "a zero byte in it"),
        ("a.png\n".encode("utf-16")[:-1], "cannot be read as a list of paths"),
    ],
)
def test_what_is_no_list(tmp_path, content, told):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list\.txt: .*{told}"):
        expand([str(tmp_path / "list.txt")], outputs=Outputs())


def test_a_line_that_names_nothing_costs_only_itself(tmp_path):
    (tmp_path / "list.txt").write_text("x" * 5000 + "\n")
    (source,) = expand([str(tmp_path / "list.txt")], outputs=Outputs()).images
    assert isinstance(source, Item)


def test_counts(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    sources = expand([str(tmp_path / "list.txt")] * 2, outputs=Outputs())
    assert (sources.count, sources.has_videos) == (4, False)
    (tmp_path / "list.txt").write_text("a.png\nb.mp4\n")
    sources = expand([str(tmp_path / "list.txt")], outputs=Outputs())
    assert (sources.count, sources.has_videos) == (None, True)
    sources = expand(["-"], outputs=Outputs())
    assert (sources.count, sources.has_videos) == (None, None)


def test_standard_input_without_end(monkeypatch):
    """More lines than memory: each is given before the next is read."""

    class Lines(io.RawIOBase):
        def __init__(self):
            self.numbers = itertools.count()

        def readable(self):
            return True

        def readinto(self, buffer):
            line = f"{next(self.numbers)}.png\n".encode()
            buffer[: len(line)] = line
            return len(line)

    lines = Lines()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(lines)))
    images = expand(["-"], outputs=Outputs()).images
    assert [source.source for source in itertools.islice(images, 3)] == ["0.png", "1.png", "2.png"]
    assert next(lines.numbers) < 2000


def test_memory_does_not_grow_with_the_list(tmp_path):
    def peak_of(count: int) -> int:
        (tmp_path / "list.txt").write_text("".join(f"no/{i:080d}.png\n" for i in range(count)))
        tracemalloc.start()
        sources = expand([str(tmp_path / "list.txt")], outputs=Outputs())
        assert sum(1 for _ in sources.images) == sources.count == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # The least of several: threads that other tests left allocate too.
    peaks = [min(peak_of(count) for _ in range(5)) for count in (200, 4000)]
    assert peaks[1] < peaks[0] + 50_000  # bytes; the list itself has 350 000


def test_a_path_is_taken_while_the_next_is_written():
    code = (
        "from overlock.deploy.sources import expand; from overlock.files import Outputs\n"
        "for source in expand(['-'], outputs=Outputs()).images: print(source.source, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for name in ("a.png", "b.png"):
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{name}\n"
        process.stdin.close()
    assert process.returncode == 0


def test_no_listed_file_is_written_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.png", "out/b.png"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a.png\nout/b.png\n")
    outputs = Outputs(overwrite=True, results=[out])
    images = expand([str(tmp_path / "list.txt")], outputs=outputs).images
    outputs.claim_folder(out)
    outputs.claim(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: this command writes it"):
        next(images)
    with pytest.raises(ValueError, match=r"a\.png: this command reads it"):
        outputs.replace(tmp_path / "a.png", b"results")
    assert (tmp_path / "a.png").read_bytes() == b""


def test_a_folder_of_results_spares_listed_files(tmp_path):
    (tmp_path / "b.png").touch()
    (tmp_path / "list.txt").write_text("b.png\nno/c.png\n")
    outputs = Outputs(overwrite=True)
    images = expand([str(tmp_path / "list.txt")], outputs=outputs).images
    outputs.claim_folder(tmp_path)
    assert [isinstance(source, Failure) for source in images] == [False, False]
    assert outputs.objection(tmp_path / "b.png")
