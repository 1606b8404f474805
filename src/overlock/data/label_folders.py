"""Where images and their label maps lie, and which map is whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overlock.data.files import images_in, tell_left_out, walk_files
from overlock.data.parts import TEST_PARTS, TRAIN_PARTS

LAYOUTS = (  # folders of the images and of the maps
    ("images/{part}", "annotations/{part}"),
    ("images/{part}", "labels/{part}"),
    ("images/{part}", "masks/{part}"),
    ("leftImg8bit/{part}", "gtFine/{part}"),
    ("leftImg8bit/{part}", "gtCoarse/{part}"),
    ("{part}", "{part}annot"),
    ("{part}", "{part}_labels"),
    ("{part}", "{part}_masks"),
    ("{part}/images", "{part}/annotations"),
    ("{part}/images", "{part}/labels"),
    ("{part}/images", "{part}/masks"),
    ("img_dir/{part}", "ann_dir/{part}"),
    ("{part}", "{part}"),
)
WHOLE = (
    ("images", "masks"), ("images", "labels"), ("images", "annotations"), ("JPEGImages", "SegmentationClass"),
    ("imgs", "masks"), ("img", "mask"), ("image", "mask"), ("image", "label"), (".", "."),
)  # fmt: skip
VOC = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
MAP_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")
# What names of maps have after the image's name, in the order of trust.
MAP_ENDINGS = (
    "", "_gtFine_labelTrainIds", "_gtFine_labelIds", "_gtCoarse_labelTrainIds", "_gtCoarse_labelIds", "_labelTrainIds",
    "_labelIds", "_mask", "-mask", "_masks", "_label", "_labels", "-label", "_L", "_seg", "_segmentation",
    "_annotation", "_gt", "_GT", "_lab",
)  # fmt: skip
IMAGE_ENDINGS = ("", "_leftImg8bit", "_image", "_img", "_sat", "-image")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Images and the label map of each."""

    images: tuple[Path, ...]
    """By name."""
    maps: tuple[Path, ...]
    """In the same order."""
    folder: Path
    """Of the images."""
    map_folder: Path
    """Of the maps."""
    ending: str = ""
    """What the maps' names have after the images'."""
    notes: tuple[str, ...] = ()
    """What was left out."""

    def chosen(self, places: Sequence[int]) -> Pairs:
        """Some of them."""
        images, maps = (tuple(files[place] for place in places) for files in (self.images, self.maps))
        return Pairs(
            images=images,
            maps=maps,
            folder=self.folder,
            map_folder=self.map_folder,
            ending=self.ending,
            notes=self.notes,
        )


def pair_folders(images: Path, maps: Path, names: Sequence[str] | None = None) -> Pairs:
    """The images of a folder, and of folders in it, with the maps of the same names in another.

    The maps' names may have an ending, such as _mask or _gtFine_labelIds, the same for all; the folders may be one.

    Args:
        images: the first folder.
        maps: the second.
        names: of the images to take; all unless given.

    Raises:
        ValueError: for a folder without images, images without a map, and maps in a format that changes values.
    """
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    left_out: Counter[str] = Counter()
    known: dict[str, list[Path]] = {}
    for path in walk_files(maps) if maps.is_dir() else ():
        known.setdefault(str(path.relative_to(maps).with_suffix("")), []).append(path)
    found = images_in(images, left_out)
    if names is not None:
        by_name = {str(path.relative_to(images).with_suffix("")): path for path in found}
        absent = [name for name in names if name not in by_name]
        if absent:
            raise ValueError(f"{images}: {len(absent)} of the {len(names)} images listed are not there: {absent[0]}")
        found = [by_name[name] for name in names]
    same = images.resolve() == maps.resolve()
    if same:
        found = _images_among(images, found, known)
    if not found:
        raise ValueError(f"{images}: no images in this folder")
    rule = next((rule for path in found for rule in _rules(images, path, known, same=same)), None)
    first, last = rule or ("", "")
    stems = [str(path.relative_to(images).with_suffix("")).removesuffix(first) + last for path in found]
    chosen = [_map_of(known.get(stem, []), path) for stem, path in zip(stems, found, strict=True)]
    lacking = [maps / f"{stem}.png" for stem, path in zip(stems, chosen, strict=True) if path is None]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of the {len(found)} images in {images} have no label map (first: {lacking[0]}); maps are "
            f"PNG files with the images' names, or with an ending such as _mask"
        )
    notes = tell_left_out(images, left_out) + _tell_shared(stems, known, found, chosen)
    if names is None and not same:
        notes += _tell_extra(maps, known, stems, last)
    return Pairs(
        images=tuple(found), maps=tuple(path for path in chosen if path is not None), folder=images, map_folder=maps,
        ending=last, notes=notes,
    )  # fmt: skip


def _tell_shared(
    stems: Sequence[str], known: dict[str, list[Path]], images: Sequence[Path], maps: Sequence[Path | None]
) -> tuple[str, ...]:
    """Notes of images with one map between them, and of maps of one name."""
    notes = []
    shared = [stem for stem, count in Counter(stems).items() if count > 1]
    if shared:
        first = [image.name for image, stem in zip(images, stems, strict=True) if stem == shared[0]]
        notes.append(f"{len(shared)} label maps are of several images, such as {' and '.join(first)}")
    several = [
        [map_.name, *(path.name for path in known[stem] if path not in (map_, image))]
        for image, stem, map_ in zip(images, stems, maps, strict=True)
        if map_ is not None
    ]
    several = [[taken, *(name for name in others if name.lower().endswith(MAP_SUFFIXES))] for taken, *others in several]
    several = [names for names in several if len(names) > 1]
    if several:
        notes.append(f"{len(several)} images have several label maps: of {' and '.join(several[0])} the first is taken")
    return tuple(notes)


def _tell_extra(folder: Path, known: dict[str, list[Path]], stems: Sequence[str], ending: str) -> tuple[str, ...]:
    """A note of maps that have no image."""
    others = sorted(stem for stem in known.keys() - set(stems) if stem.endswith(ending))
    extra = [path for stem in others for path in known[stem] if path.suffix.lower() in MAP_SUFFIXES]
    if not extra:
        return ()
    return (f"{folder}: {len(extra)} label maps have no image and are left out (first: {extra[0].name})",)


def _rules(root: Path, image: Path, known: dict[str, list[Path]], *, same: bool) -> list[tuple[str, str]]:
    """Endings of an image's name to take away, and of a map's to put there, by which the image has a map."""
    stem = str(image.relative_to(root).with_suffix(""))
    return [
        (first, last)
        for last in MAP_ENDINGS
        for first in sorted(IMAGE_ENDINGS, key=len, reverse=True)
        if stem.endswith(first)
        and any(path != image for path in known.get(stem.removesuffix(first) + last, []))
        and not (same and first + last == "" and image.suffix.lower() in MAP_SUFFIXES)
    ]


def _images_among(root: Path, found: list[Path], known: dict[str, list[Path]]) -> list[Path]:
    """The images of a folder with maps in it: each that has one beside it, and is none itself."""
    pairs = {path: _rules(root, path, known, same=True) for path in found}
    maps = {
        other
        for path, rules in pairs.items()
        for first, last in rules[:1]
        for other in known[str(path.relative_to(root).with_suffix("")).removesuffix(first) + last]
        if other != path
    }
    return [path for path in found if pairs[path] and path not in maps]


def _map_of(files: Sequence[Path], image: Path) -> Path | None:
    """The map among the files of a name. Raises ValueError where it is of a format that changes values."""
    others = [path for path in files if path != image]
    for suffix in MAP_SUFFIXES:
        for path in others:
            if path.suffix.lower() == suffix:
                return path
    for path in others:
        if path.suffix.lower() in LOSSY:
            raise ValueError(
                f"{path}: a label map must not be a {path.suffix.lower()} file, whose compression changes the values "
                "at the edges of objects; export the maps as PNG files from what they were drawn with"
            )
    return None


def find_part(root: Path, parts: Sequence[str]) -> Pairs | None:
    """The first part of these names that is there, with its images and maps.

    Raises:
        ValueError: for images without a map; and as :func:`pair_folders`.
    """
    bases = _voc_roots(root)
    for part in parts:
        for base in bases:
            listed = base / VOC[2] / f"{part}.txt"
            if listed.is_file():
                names = [
                    line.split()[0] for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.split()
                ]
                return pair_folders(base / VOC[0], base / VOC[1], names)
        for layout in LAYOUTS:
            images, maps = (root / folder.format(part=part) for folder in layout)
            if images.is_dir() and maps.is_dir() and (images != maps or _holds_pairs(images)):
                return pair_folders(images, maps)
    return None


def find_whole(root: Path) -> Pairs | None:
    """The images and maps of a folder without parts."""
    for base in (*_voc_roots(root), root):
        for layout in WHOLE:
            images, maps = (base / folder for folder in layout)
            if images.is_dir() and maps.is_dir() and (images != maps or _holds_pairs(images)):
                return pair_folders(images, maps)
    return None


def _voc_roots(root: Path) -> list[Path]:
    bases = (root, *sorted(root.glob("VOC[0-9]*")), *sorted(root.glob("VOCdevkit/VOC[0-9]*")))
    return [base for base in bases if all((base / name).is_dir() for name in VOC[:2])]


def _holds_pairs(folder: Path) -> bool:
    """Whether a folder has images with their maps beside them."""
    if not any(path.is_file() for path in folder.iterdir()):
        return False
    known: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        known.setdefault(path.stem, []).append(path)
    images = [path for files in known.values() for path in files if path.is_file()]
    return any(
        _rules(folder, path, known, same=True) for path in images if path.suffix.lower() in (*LOSSY, *MAP_SUFFIXES)
    )


def is_voc(pairs: Pairs) -> bool:
    """Whether they lie as Pascal VOC's."""
    return pairs.folder.name == VOC[0] and pairs.maps[0].parent.name == VOC[1]


def is_cityscapes(pairs: Pairs) -> bool:
    """Whether they lie as Cityscapes', or are called as its files are."""
    return pairs.ending.endswith(("_labelIds", "_labelTrainIds"))


def nothing_found(root: Path, parts: Sequence[str]) -> ValueError:
    """What to raise where there is no such part."""
    tried = "; ".join(f"{images} and {maps}" for images, maps in LAYOUTS[:-1]).replace("{part}", "PART")
    return ValueError(
        f"{root}: no part {' or '.join(parts)} found; looked for {tried}; PART and its maps in one folder; and "
        f"{' with '.join(VOC[:2])} and {VOC[2]}/PART.txt"
    )


__all__ = [
    "TEST_PARTS", "TRAIN_PARTS", "Pairs", "find_part", "find_whole", "is_cityscapes", "is_voc", "nothing_found",
    "pair_folders",
]  # fmt: skip
