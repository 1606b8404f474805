"""Search, near-duplicates and probes of given vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made import make_embeddings

from overlock.cli import main
from overlock.embeddings.duplicates import find_duplicates
from overlock.embeddings.index import Index, IndexOptions
from overlock.embeddings.probe import make_split, probe, score
from overlock.embeddings.shards import Embeddings, normalise

pytest.importorskip("pyarrow")
pytest.importorskip("faiss")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Random vectors."""
    return np.random.default_rng(seed).normal(size=shape)


def clusters(classes: int = 3, each: int = 20, dim: int = 8, spread: float = 0.3) -> tuple[np.ndarray, list[str]]:
    """Vectors about the axes, and the axes' names."""
    labels = np.repeat(np.arange(classes), each)
    return np.eye(dim)[labels] + spread * np.random.default_rng(1).normal(size=(len(labels), dim)), list(
        map(str, labels)
    )


def test_exact_search(tmp_path):
    embeddings = make_embeddings(tmp_path, draw(57, 16) * 5)
    queries = normalise(draw(4, 16, seed=1))
    hits = Index(embeddings).search(queries, 5)
    cosines = queries @ embeddings.vectors.T
    np.testing.assert_array_equal(hits.places, np.argsort(-cosines, axis=1)[:, :5])
    np.testing.assert_allclose(hits.similarities, -np.sort(-cosines, axis=1)[:, :5], atol=1e-6)


def test_inverted_lists(tmp_path):
    """All lists give what an exact search does, one of them less; they are kept, and belong to these vectors."""
    embeddings = make_embeddings(tmp_path, draw(400, 16))
    exact = Index(embeddings).search(embeddings.vectors[:9], 7).places
    index = Index(embeddings, IndexOptions(method="ivf", nlist=8, nprobe=8))
    np.testing.assert_array_equal(index.search(embeddings.vectors[:9], 7).places, exact)
    assert index.recall(7) == 1
    (kept,) = tmp_path.glob("_ivf-8-*.faiss")
    stamp = kept.stat().st_mtime_ns
    few = Index(embeddings, IndexOptions(method="ivf", nlist=8, nprobe=1))
    assert 0.1 < few.recall(7) < 1
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(method="hnsw"), "method must be exact or ivf"),
        (dict(nlist=4), "nlist is for the method ivf"),
        (dict(method="ivf", nlist=1000), "nlist must be 1 to 57"),
    ],
)
def test_bad_options(options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        Index(make_embeddings(tmp_path, draw(57, 16)), IndexOptions(**options))


def test_groups_of_duplicates(tmp_path):
    """Copies, slightly changed; also by IVF."""
    vectors = draw(40, 32)
    vectors[[7, 30]] = 3 * vectors[2] + 0.1 * draw(2, 32, seed=1)
    vectors[35] = vectors[11]
    embeddings = make_embeddings(tmp_path, vectors)
    for options in (None, IndexOptions(method="ivf", nlist=2, nprobe=2)):
        groups = find_duplicates(Index(embeddings, options), 0.99)
        assert [group.places for group in groups] == [(2, 7, 30), (11, 35)]
        assert 0.99 < groups[0].similarity < groups[1].similarity
    assert [group.places for group in find_duplicates(Index(embeddings), 0.9999)] == [(11, 35)]
    with pytest.raises(ValueError, match="threshold must be"):
        find_duplicates(Index(embeddings), 1.5)


def test_command_of_duplicates(tmp_path, capsys):
    vectors = draw(20, 8)
    vectors[9] = vectors[3]
    make_embeddings(tmp_path / "index", vectors, labels=["a"] * 20)
    assert main(["duplicates", str(tmp_path / "index"), "--json", "--save", str(tmp_path / "groups.csv")]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert group["ids"] == ["003.png", "009.png"]
    assert group["similarity"] == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "groups.csv").read_text().splitlines() == [
        "group,similarity,id,label",
        "1,1,003.png,a",
        "1,1,009.png,a",
    ]
    assert main(["duplicates", str(tmp_path / "index"), "--save", str(tmp_path / "groups.png")]) == 2
    assert "/nowhere: the images are no longer there" in capsys.readouterr().err


def test_probe_of_separate_classes(tmp_path):
    vectors, labels = clusters(spread=0.1)
    result = probe(make_embeddings(tmp_path, vectors, labels=labels), neighbours=5)
    assert (result.classes, result.train + result.test) == (3, 60)
    few = probe(Embeddings(tmp_path), neighbours=1000).accuracies[0]
    assert few.name == f"{result.train} nearest neighbours"
    for accuracy in result.accuracies:
        assert accuracy.accuracy == 1
        assert accuracy.low < accuracy.high == 1


def test_probe_of_noise(tmp_path):
    """Labels that have nothing to do with the vectors."""
    labels = [str(i % 4) for i in range(1000)]
    result = probe(make_embeddings(tmp_path, draw(1000, 8), labels=labels))
    for accuracy in result.accuracies:
        assert accuracy.images == 200
        assert abs(accuracy.accuracy - 0.25) < 0.1  # three deviations


def test_duplicates_stay_on_one_side(tmp_path):
    """Also where they alone would tell the classes apart: pairs of random vectors, each pair of one class."""
    vectors = np.repeat(draw(150, 32), 2, axis=0)
    labels = [str(i // 2 % 3) for i in range(300)]
    embeddings = make_embeddings(tmp_path, vectors, labels=labels)
    split = make_split(Index(embeddings), labels, test_size=0.2, threshold=0.99, seed=0)
    assert not {i // 2 for i in split.train} & {i // 2 for i in split.test}
    assert "150 images beside another" in split.told
    assert probe(embeddings, neighbours=1).accuracies[0].accuracy < 0.6


def test_parts_of_the_data(tmp_path):
    """They are taken, without what would leak from one into the other."""
    vectors, labels = clusters()
    ids = [f"{'val' if i % 4 == 0 else 'train'}/{i}.png" for i in range(60)]
    vectors[1] = vectors[4]
    embeddings = make_embeddings(tmp_path, vectors, ids=ids, labels=labels)
    split = make_split(Index(embeddings), labels, test_size=0.2, threshold=0.99, seed=0)
    assert split.test.tolist() == list(range(0, 60, 4))
    assert split.train.tolist() == [i for i in range(60) if i % 4 and i != 1]
    assert "1 near-duplicates" in split.told


def test_wilsons_interval():
    """The textbook's: 8 of 10."""
    found = score("x", 8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "told"),
    [([None] * 20, "20 images have no label"), (["a"] * 20, "all images have the label 'a'")],
)
def test_no_classes(labels, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        probe(make_embeddings(tmp_path, draw(20, 8), labels=labels))


def test_command_of_probes(tmp_path, capsys):
    vectors, labels = clusters()
    make_embeddings(tmp_path, vectors, labels=labels)
    assert main(["probe", str(tmp_path), "--json", "--neighbours", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in result["accuracies"]] == ["3 nearest neighbours", "linear probe"]
    assert main(["probe", str(tmp_path)]) == 0
    assert "95 % interval" in capsys.readouterr().out


def test_no_embeddings(tmp_path):
    with pytest.raises(ValueError, match="no embeddings here"):
        Embeddings(tmp_path)


def test_unfinished_and_mixed(tmp_path):
    make_embeddings(tmp_path / "a", draw(25, 4))
    make_embeddings(tmp_path / "b", draw(25, 5))
    middle = "embeddings-00001-of-00003.parquet"
    (tmp_path / "a" / middle).write_bytes((tmp_path / "b" / middle).read_bytes())
    with pytest.raises(ValueError, match=f"{middle}: this shard is of another length of vectors"):
        Embeddings(tmp_path / "a")
    (tmp_path / "a" / middle).unlink()
    with pytest.raises(ValueError, match="1 of 3 shards are not there yet"):
        Embeddings(tmp_path / "a")
    first = tmp_path / "a" / "embeddings-00000-of-00003.parquet"
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{first.name}: this shard is damaged"):
        Embeddings(tmp_path / "a")
