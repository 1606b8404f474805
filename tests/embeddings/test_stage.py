"""Embedding as a stage of Ray Data, called as Ray calls it, and by a Ray of this machine."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import make_classes, make_image

from overlock.deploy import Embedder, EmbedStage


@pytest.fixture(scope="module")
def stage() -> EmbedStage:
    return EmbedStage(device="cpu", workers=0)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    images = [make_image("red", 0), make_image("blue", 1)]
    return np.stack([one.vector for one in Embedder.default(device="cpu")(images)])


def test_arrays(stage, expected):
    images = np.stack([np.asarray(make_image("red", 0)), np.asarray(make_image("blue", 1))])
    found = stage({"image": images, "number": np.array([7, 8])})
    assert list(found) == ["number", "vector", "error"]
    assert found["number"].tolist() == [7, 8]
    assert found["error"].tolist() == ["", ""]
    assert found["vector"].dtype == np.float32
    np.testing.assert_allclose(found["vector"], expected, atol=1e-5)


@pytest.mark.parametrize("encoded", [True, False])
def test_files(encoded, stage, expected, tmp_path):
    """As bytes or paths, one of them damaged."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    make_image("red", 0).save(paths[0])
    paths[1].write_bytes(b"no image")
    make_image("blue", 1).save(paths[2])
    stage.column = "file"
    files = np.array([path.read_bytes() if encoded else str(path) for path in paths], dtype=object)
    found = stage({"file": files})
    stage.column = "image"
    assert [bool(error) for error in found["error"]] == [False, True, False]
    assert found["error"][1].startswith("not an image")
    assert np.isnan(found["vector"][1]).all()
    np.testing.assert_allclose(found["vector"][[0, 2]], expected, atol=1e-5)


def test_another_column(stage):
    with pytest.raises(ValueError, match="no column 'image' of images, but picture"):
        stage({"picture": np.zeros((1, 8, 8, 3), dtype=np.uint8)})


@pytest.mark.slow
def test_local_ray(tmp_path):
    """Two workers, images read by Ray, and files written by it."""
    ray = pytest.importorskip("ray")
    pq = pytest.importorskip("pyarrow.parquet")
    images = make_classes(tmp_path / "images", 8)
    files = sorted(map(str, images.rglob("*.png")))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        data = ray.data.read_images(str(images), include_paths=True).map_batches(
            EmbedStage, fn_constructor_kwargs=dict(device="cpu", workers=0), batch_size=6, concurrency=2
        )
        data.write_parquet(str(tmp_path / "out"))
    finally:
        ray.shutdown()
    rows = [row for path in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    rows.sort(key=lambda row: row["path"])
    assert [row["path"] for row in rows] == files
    vectors = [one.vector for one in Embedder.default(device="cpu")(files)]
    np.testing.assert_allclose([row["vector"] for row in rows], vectors, atol=1e-4)
