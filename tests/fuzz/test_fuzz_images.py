"""Fuzzing of what holds images: files, NumPy stacks, published data sets, folders."""

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import (
    FILE_NAMES,
    INPUTS_OF_300,
    PICKLE,
    TOTAL,
    Case,
    ForbiddenAction,
    check_inputs,
    choose,
    corrupt,
    n_inputs,
    sandboxed,
)
from PIL import Image

from diffad_lite.data.datasets import AnomalyData, load_dataset
from diffad_lite.data.images import list_images, read_image
from diffad_lite.data.published_readers import VISA_SPLIT
from diffad_lite.experiments.unlabelled import survey

pytestmark = [pytest.mark.timeout(max(300, TOTAL)), pytest.mark.filterwarnings("ignore")]


# ------------------------------------------------------------------------- the fuzzer itself


def test_the_areas_have_all_inputs():
    assert sum(INPUTS_OF_300.values()) == 300
    assert sum(map(n_inputs, INPUTS_OF_300)) == TOTAL


def test_the_sandbox_forbids_writes_elsewhere(tmp_path):
    """Also those that name a folder by its descriptor."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").write_text("x")
    with sandboxed(inside):
        shutil.rmtree(inside / "sub")
        for write in (shutil.rmtree, lambda path: (path / "more").write_text("x")):
            with pytest.raises(ForbiddenAction):
                write(outside / "sub")
    assert (outside / "sub" / "file").exists()
    assert not (inside / "sub").exists()


# --------------------------------------------------------------------------- image files

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".PNG", ".JPG")


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw uint8 values, uniform from 0 to 255."""
    return rng.integers(0, 256, shape, dtype=np.uint8)


def encode_image(rng: np.random.Generator) -> tuple[str, bytes]:
    """Return the kind and the file content of a small image."""
    size = tuple(int(n) for n in rng.integers(1, 40, 2))
    grey, colour = Image.fromarray(noise(rng, *size)), Image.fromarray(noise(rng, *size, 3))
    deep = Image.fromarray(rng.integers(0, 2**16, size, dtype=np.uint16))
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "grey png": (grey, "PNG", {}),
        "colour png": (colour, "PNG", {}),
        "alpha png": (Image.fromarray(noise(rng, *size, 4)), "PNG", {}),
        "grey alpha png": (Image.fromarray(noise(rng, *size, 2), "LA"), "PNG", {}),
        "palette png": (colour.quantize(7), "PNG", {"transparency": bytes([0, 128, 255])}),
        "keyed png": (colour.quantize(5), "PNG", {"transparency": 1}),
        "deep png": (deep, "PNG", {}),
        "one bit png": (grey.convert("1"), "PNG", {}),
        "grey jpeg": (grey, "JPEG", {}),
        "colour jpeg": (colour, "JPEG", {"exif": random_orientation(rng)}),
        "cmyk jpeg": (colour.convert("CMYK"), "JPEG", {}),
        "progressive jpeg": (colour, "JPEG", {"progressive": True}),
        "bmp": (colour, "BMP", {}),
        "palette bmp": (colour.quantize(9), "BMP", {}),
        "tiff": (colour, "TIFF", {}),
        "deep tiff": (deep, "TIFF", {"compression": "tiff_lzw"}),
        "deflated tiff": (grey, "TIFF", {"compression": "tiff_deflate"}),
        "float tiff": (grey.convert("F"), "TIFF", {}),
        "lab tiff": (Image.merge("LAB", colour.split()), "TIFF", {}),
        "pages": (grey, "TIFF", {"save_all": True, "append_images": [grey, colour]}),
        "webp": (colour, "WEBP", {"measure_quality": 50}),
        "animation": (grey, "GIF", {"save_all": True, "append_images": [grey]}),
        "gif": (colour.quantize(6), "GIF", {}),
        "ppm": (colour, "PPM", {}),
        "ico": (colour, "ICO", {}),
        "eps": (colour, "EPS", {}),
    }
    name = choose(rng, kinds)
    image, form, options = kinds[name]
    file = io.BytesIO()
    image.save(file, form, **options)
    return name, file.getvalue()


def random_orientation(rng: np.random.Generator) -> Image.Exif:
    """Return EXIF data whose orientation may be out of range."""
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 12))
    return exif


def correct_checksums(data: bytes) -> bytes:
    """Correct the checksums of a corrupted PNG, so that readers get as far as its chunks."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@cache
def png_bomb(side: int, depth: int = 8, extra_chunk: bytes = b"") -> bytes:
    """Return a valid PNG of zeros: a small file, a large image."""
    header = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    compressor = zlib.compressobj(9)
    row = bytes(1 + side * depth // 8)
    rows = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + extra_chunk + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


@cache
def text_bomb() -> bytes:
    text = zlib.compress(bytes(2**27), 9)
    return png_bomb(8, extra_chunk=png_chunk(b"zTXt", b"Comment\0\0" + text))


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "bomb": lambda p: p.write_bytes(png_bomb(20_000, depth=1)),
    "text bomb": lambda p: p.write_bytes(text_bomb()),
    "large": lambda p: p.write_bytes(png_bomb(4000)),
    "nothing": lambda p: p.write_bytes(b""),
    "folder": lambda p: p.mkdir(),
    "pipe": lambda p: os.mkfifo(p),
    "itself": lambda p: p.symlink_to(p.name),
    "ring": lambda p: (p.symlink_to("ring"), (p.parent / "ring").symlink_to(p.name)),
    "gone": lambda p: p.symlink_to("gone"),
    "zeros": lambda p: p.symlink_to("/dev/zero"),
    "null": lambda p: p.symlink_to(os.devnull),
    "page": lambda p: p.write_text("<html><body>404</body></html>"),
    "drawing": lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "postscript": lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nloop\n"),
    "pickle": lambda p: p.write_bytes(PICKLE),
}


def check_pixels(path: Path) -> None:
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert len(pixels) in (1, 2, 3, 4)
    assert pixels.size > 0
    assert pixels.tobytes() == read_image(path).tobytes()


def image_case(rng: np.random.Generator, folder: Path) -> Case:
    path = folder / (choose(rng, FILE_NAMES) + choose(rng, SUFFIXES))
    if rng.random() < 0.15:
        kind = choose(rng, ODD_FILES)
        ODD_FILES[kind](path)
    else:
        kind, data = encode_image(rng)
        if rng.random() < 0.8:
            data = corrupt(rng, data)
            if data.startswith(b"\x89PNG") and rng.random() < 0.6:
                data = correct_checksums(data)
        path.write_bytes(data)
    return Case(f"{kind} as {path.name[-9:]}", lambda: check_pixels(path), (path,))


def npy_header(text: str) -> bytes:
    """Return the beginning of a ``.npy`` file with this text as its header."""
    data = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data


def uint8_header(shape: str) -> bytes:
    return npy_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}")


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def stack_case(rng: np.random.Generator, folder: Path) -> Case:
    path = folder / f"{choose(rng, FILE_NAMES)}.npy"
    shape = tuple(int(n) for n in rng.integers(0, 6, int(rng.integers(0, 5))))
    good = noise(rng, int(rng.integers(1, 5)), 7, 9)
    side = int(choose(rng, (-1, 0, 2**20, 2**31, 2**62, 10**30)))
    claim = uint8_header(f"(4, {side}, {side})")
    kinds: dict[str, Callable[[], bytes]] = {
        "good": lambda: npy_bytes(good),
        "damaged": lambda: corrupt(rng, npy_bytes(good)),
        "shape": lambda: npy_bytes(noise(rng, *shape)),
        "kind": lambda: npy_bytes(good.astype(choose(rng, DTYPES))),
        "objects": lambda: npy_bytes(np.array([{"a": 1}], dtype=object)),
        "record": lambda: npy_bytes(np.zeros((2, 3, 4), dtype=[("a", "u1"), ("b", "f4")])),
        "claim": lambda: claim + bytes(100),
        "header": lambda: npy_header(choose(rng, HEADERS)) + bytes(100),
        "zip": lambda: b"PK\x03\x04" + rng.bytes(60),
        "archive": lambda: npz_bytes({"a": good}),
        "pickle": lambda: PICKLE,
        "fortran": lambda: npy_bytes(np.asfortranarray(good)),
    }
    kind = choose(rng, kinds)
    path.write_bytes(kinds[kind]())
    return Case(kind, lambda: check_pixels(path), (path,))


DTYPES = ("f8", "i4", "c8", "?", "S3", "U2", "f2", "M8[s]")
HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': ('a',)}",
    "{'descr': [('a', '<f4', (99999999, 99999999))], 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<f4,' , 'fortran_order': 3, 'shape': ()}",
    "{'descr': None, 'fortran_order': False, 'shape': (1, 2, 3)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 3), 'x': 1}",
    "{" * 500,
    "(" * 9000,
    "-" * 9000 + "1",
    "[1]" * 2000,
    "__import__('os').system('false')",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 5, 20)}",
    "\0",
    "",
)


# --------------------------------------------------------------------- published data sets


def npz_bytes(members: dict[str, Any], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return what ``numpy.savez`` writes; members that are bytes are stored unchanged."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else npy_bytes(np.asarray(value))
            out.writestr(f"{name}.npy", data)
    return file.getvalue()


def medmnist_case(rng: np.random.Generator, folder: Path) -> Case:
    path, n = folder / "pneumoniamnist.npz", 12
    members: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        members[f"{part}_images"] = noise(rng, n, 8, 8)
        members[f"{part}_labels"] = rng.integers(0, 2, (n, 1))
    name = choose(rng, members)
    swaps: dict[str, Any] = {
        "good": members[name],
        "fewer": members[name][:5],
        "float": members[name].astype(np.float64) / 7,
        "nan": np.full((n, 1), np.nan),
        "text": np.full((n, 1), "one"),
        "complex": members[name].astype(complex),
        "objects": np.array([{"a": 1}] * n, dtype=object),
        "scalar": np.uint8(3),
        "flat": noise(rng, n),
        "five axes": noise(rng, n, 2, 2, 2, 2),
        "empty images": noise(rng, n, 0, 8),
        "two channels": noise(rng, n, 8, 8, 2),
        "none": noise(rng, 0, 8, 8),
        "large labels": np.full((n, 1), 2**62),
        "negative labels": np.full((n, 1), -1),
        "bytes": rng.bytes(50),
        "claim": npy_header(
            "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1048576, 1048576)}"
        ),
        "bomb": npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (12, 8, 8)}")
        + bytes(2**24),
    }
    kind = choose(rng, (*swaps, "missing", "array", "pickle", "corrupt", "corrupt", "member"))
    members[name] = swaps.get(kind, members[name])
    if kind == "missing":
        del members[name]
    data = npz_bytes(members, choose(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    if kind == "member":  # another compression, or a password, in both headers of a member
        field, value = choose(rng, ((8, 99), (8, 12), (6, 1), (8, 14)))
        data = bytearray(data)
        for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            at = data.find(signature) + field + shift
            data[at : at + 2] = struct.pack("<H", value)
    data = {"array": npy_bytes(noise(rng, 5)), "pickle": PICKLE}.get(kind, bytes(data))
    path.write_bytes(corrupt(rng, data) if kind == "corrupt" else data)

    def load() -> None:
        check_data(load_dataset("medmnist", "pneumoniamnist", root=folder, image_size=8))

    return Case(f"{kind} for {name}", load, (path,))


def check_data(data: AnomalyData) -> None:
    n = len(data.test_labels)
    assert len(data.test_images) == len(data.test_ids) == len(data.defect_types) == n
    assert len(data.train)
    assert all(part.abs().max() <= 1 for part in (data.train, data.test_images) if len(part))
    for mask, size in zip(data.test_masks or [], data.original_sizes, strict=False):
        assert mask is None or mask.shape == size
    json.dumps(data.summary())


def corrupt_table(rng: np.random.Generator, text: str) -> bytes:
    """Change one field of a CSV table, one of its rows, or its bytes."""
    odd = ("", '"', '""', "\r", "\0", "../../../../etc/passwd", "/etc/passwd", "a" * 140_000)
    odd += ('"\n' * 3, ",,,,", "é\u2028x", "\x85", "'", "=1+1", "\ufeff", "good", " ", "/dev/zero")
    lines = text.splitlines()
    row = int(rng.integers(len(lines)))
    fields = lines[row].split(",")
    ways = ("field", "field", "field", "row", "shorter", "longer", "bytes", "latin", "good")
    match choose(rng, ways):
        case "field":
            fields[int(rng.integers(len(fields)))] = choose(rng, odd)
            lines[row] = ",".join(fields)
        case "row":
            lines.pop(row)
        case "shorter":
            lines[row] = ",".join(fields[: int(rng.integers(len(fields)))])
        case "longer":
            lines[row] += ",more,and more"
        case "bytes":
            return corrupt(rng, text.encode())
        case "latin":
            return text.replace("0", "é").encode("latin1")
    return "\n".join([*lines, ""]).encode()


def write_grey(path: Path, rng: np.random.Generator) -> Path:
    """Write a grey image of 16 x 16 pixels; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(rng, 16, 16)).save(path)
    return path


def table_case(rng: np.random.Generator, folder: Path) -> Case:
    if rng.random() < 0.5:
        lines = ["object,split,label,image,mask"]
        for split, label, number in (("train", "normal", 12), ("test", "normal", 3)):
            for i in range(number):
                path = write_grey(folder / "nut" / f"{split}{i}.png", rng).relative_to(folder)
                lines.append(f"nut,{split},{label},{path},")
        anomalous = write_grey(folder / "nut" / "bad.png", rng).relative_to(folder)
        lines.append(f"nut,test,anomaly,{anomalous},{anomalous}")
        table = folder / VISA_SPLIT
        table.parent.mkdir()
        arguments: dict[str, Any] = {"name": "visa", "category": "nut"}
    else:
        table, arguments = folder / "subjects.csv", {"name": "folder"}
        files = [f"train/good/{i:02d}.png" for i in range(12)]
        lines = [f"{file},s{i}" for i, file in enumerate(files)]
        for file in files:
            write_grey(folder / file, rng)
    table.write_bytes(corrupt_table(rng, "\n".join(lines)))

    def load() -> None:
        check_data(load_dataset(**arguments, root=folder, image_size=8))

    return Case(table.name, load, (folder,))


# -------------------------------------------------------------------------------- folders


def rename(rng: np.random.Generator, path: Path) -> None:
    """Give a file an odd name."""
    path.rename(path.with_name(choose(rng, FILE_NAMES) + path.suffix))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_faults(rng: np.random.Generator, base: Path) -> dict[str, Callable[[], object]]:
    """Return name -> change of a folder in MVTec layout."""
    good, test, masks = base / "train" / "good", base / "test", base / "ground_truth" / "hole"
    bomb = png_bomb(20_000, depth=1)
    return {
        "loop of folders": lambda: (good / "loop").symlink_to(base),
        "loop as a defect": lambda: (test / "loop").symlink_to(test),
        "loop named png": lambda: (good / "l.png").symlink_to("l.png"),
        "folder in a ring": lambda: (test / "ring").symlink_to("ring"),
        "pipe": lambda: os.mkfifo(good / "pipe.png"),
        "pipe as a mask": lambda: replace_by_pipe(masks / "0_mask.png"),
        "bomb": lambda: (good / "b.png").write_bytes(bomb),
        "odd name": lambda: rename(rng, good / "03.png"),
        "odd test name": lambda: rename(rng, test / "hole" / "0.png"),
        "odd defect": lambda: (test / "hole").rename(test / choose(rng, FILE_NAMES)),
        "no letters": lambda: shutil.copy(good / "00.png", os.fsencode(good) + b"/\xff\xfe.png"),
        "no letters in a defect": lambda: os.rename(test / "hole", os.fsencode(test) + b"/\xe9"),
        "folder named png": lambda: (good / "f.png").mkdir(),
        "two suffixes": lambda: shutil.copy(good / "00.png", good / "00.png.bmp"),
        "stack": lambda: np.save(good / "s.npy", noise(rng, 4, 8, 8)),
        "mask of one channel more": lambda: np.save(base / "s.npy", noise(rng, 4, 8, 8)),
        "mask folder": lambda: (masks / "0").mkdir(),
        "mask turned": lambda: Image.new("L", (9, 8)).save(masks / "1_mask.png"),
        "mask all over": lambda: Image.new("L", (16, 16), 255).save(masks / "1_mask.png"),
        "no test": lambda: shutil.rmtree(test),
        "empty test": lambda: (shutil.rmtree(test), test.mkdir()),
        "few": lambda: [path.unlink() for path in list(good.iterdir())[:9]],
        "one pixel": lambda: Image.new("L", (1, 1)).save(test / "good" / "0.png"),
        "hidden": lambda: (good / ".x.png").write_bytes(b"\0"),
        "text": lambda: (good / "notes.txt").write_text("hello"),
        "nothing": lambda: None,
    }


def folder_case(rng: np.random.Generator, folder: Path) -> Case:
    base = folder / choose(rng, ("plate", *FILE_NAMES[:6]))
    for part, number in (("train/good", 14), ("test/good", 3), ("test/hole", 3)):
        for i in range(number):
            write_grey(base / part / (f"{i:02d}.png" if number > 3 else f"{i}.png"), rng)
    for i in range(3):
        write_grey(base / "ground_truth" / "hole" / f"{i}_mask.png", rng)
    changes = folder_faults(rng, base)
    faults = {choose(rng, changes) for _ in range(2)}
    for fault in sorted(faults):
        with contextlib.suppress(OSError):  # the other fault removed a file, or the system refuses
            changes[fault]()
    categories = ("..", "../..", "/etc", "", ".", "train", "gone", "\0", "a/b")
    options = {
        "category": choose(rng, (None,) * 6 + categories),
        "plant": choose(rng, (None, None, "cells", "lesions", "development")),
        "resize": choose(rng, ("squash", "pad")),
        "image_size": int(rng.integers(8, 20)),
    }

    def load() -> None:
        check_data(load_dataset("folder", root=base, **options))
        survey(list_images(base / "train" / "good")).warnings()

    words = (base, "the name ", "good/", "hole/", "normal images", "category", "calibration")
    return Case(f"{sorted(faults)}, {options}", load, words)


@pytest.mark.parametrize(
    ("area", "make_case"),
    [
        ("images", image_case),
        ("stacks", stack_case),
        ("archives", medmnist_case),
        ("tables", table_case),
        ("folders", folder_case),
    ],
)
def test_inputs(area, make_case, tmp_path):
    check_inputs(area, tmp_path, make_case)
