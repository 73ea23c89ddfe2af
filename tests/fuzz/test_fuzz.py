"""Fuzzing: what all of it shares, and the first areas, pixels and folders.

The rule is the same everywhere. An input works, or it is refused by a ValueError or an OSError
whose message says what was wrong and where; it is never another error, never hangs, never
unpickles, starts no program, and writes nowhere but below its own folder.

300 inputs by default, ``DIFFAD_FUZZ=10000`` for more (``make fuzz``); each is drawn from its area
and number alone, so that those of a short run are the first ones of a long run.
"""

import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from diffad_lite.data import datasets, published_readers
from diffad_lite.data.datasets import load_dataset
from diffad_lite.data.images import list_images, read_image
from diffad_lite.experiments.unlabelled import survey

TOTAL = int(os.environ.get("DIFFAD_FUZZ", "300"))
SHARES = {  # of 300 inputs
    "images": 60,
    "stacks": 15,
    "archives": 15,
    "tables": 15,
    "folders": 15,
    "metrics": 50,
    "weights": 30,
    "configurations": 25,
    "states": 15,
    "records": 25,
    "grids": 20,
    "arguments": 15,
}
KILLS = min(100, TOTAL // 60)  # 5 of 300 inputs, 100 of 10,000
SECONDS = 60  # that one input may take, on a busy machine
MEMORY = 3 * 2**30  # bytes that one input may ask for beside what the process has
LONGEST = 1000  # characters of a message, without the path of its file

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="signals and links are those of POSIX"),
    pytest.mark.timeout(max(300, TOTAL)),
]


def count(area: str) -> int:
    """How many inputs an area gets; all areas together get ``TOTAL``."""
    ends = np.cumsum([0, *SHARES.values()]) * TOTAL // 300
    place = list(SHARES).index(area)
    return int(ends[place + 1] - ends[place])


def test_the_areas_share_all_inputs():
    assert sum(SHARES.values()) == 300
    assert sum(map(count, SHARES)) == TOTAL


# ------------------------------------------------------------------------------ one input


class Hang(BaseException):
    """An input took too long."""


class Trespass(BaseException):
    """An input made the package unpickle, start a program, or write elsewhere."""


WATCHED: list[Path] = []  # the folder of the input at hand, if there is one
WRITES = {  # event -> where its path stands among the details, and the descriptor it starts from
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.symlink": (1, 2),
    "os.link": (1, 3),
}
FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"}


def guard(event: str, details: tuple) -> None:
    """An audit hook, which cannot be taken away again; it sleeps while nothing is watched."""
    if not WATCHED:
        return
    if event in FORBIDDEN:
        raise Trespass(f"{event} {details[:2]}")
    if event in WRITES:
        if event == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        place, start = WRITES[event]
        target = details[place]
        if isinstance(target, int) or os.fspath(target) in (os.devnull, b"/dev/null"):
            return
        if start is not None and details[start] not in (-1, None):  # as shutil.rmtree does it
            if not os.path.exists("/proc/self/fd"):
                return
            target = os.path.join(
                os.readlink(f"/proc/self/fd/{details[start]}"), os.fsdecode(target)
            )
        where = Path(os.path.abspath(os.fsdecode(target)))
        if not where.is_relative_to(WATCHED[0]):
            raise Trespass(f"{event} {where}")


def test_the_guard_sees_writes_elsewhere(tmp_path):
    """Also those that name a folder by its descriptor."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").write_text("x")
    with watched(inside):
        shutil.rmtree(inside / "sub")
        for write in (shutil.rmtree, lambda path: (path / "more").write_text("x")):
            with pytest.raises(Trespass):
                write(outside / "sub")
    assert (outside / "sub" / "file").exists()
    assert not (inside / "sub").exists()


@pytest.fixture(scope="session", autouse=True)
def guarded() -> None:
    sys.addaudithook(guard)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it nothing may take too long, ask for too much memory, or trespass."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"not done after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    timer = threading.Timer(SECONDS, signal.pthread_kill, (main, signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    WATCHED.append(folder)
    try:
        yield
    finally:
        WATCHED.clear()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


class Case(NamedTuple):
    """One input: what is done with it, words of which a refusal says one, more errors allowed."""

    what: str
    action: Callable[[], object]
    named: tuple[object, ...]
    allowed: tuple[type[Exception], ...] = ()


def survive(area: str, tmp_path: Path, make: Callable[[np.random.Generator, Path], Case]) -> None:
    """Every input of an area, each in a folder of its own; some must work and some be refused."""
    faults, worked, refused, seed = [], 0, 0, list(SHARES).index(area)
    for number in range(count(area)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        what, action, named, allowed = make(np.random.default_rng([seed, number]), folder)
        try:
            with watched(folder):
                action()
            worked += 1
        except (ValueError, OSError, *allowed) as error:
            refused += 1
            said = f"{error} {getattr(error, 'filename', None) or ''}"
            if not any(str(name) in said for name in named):
                faults.append(f"{number} ({what}): {type(error).__name__} names nothing: {error}")
            if len(said.replace(str(folder), "")) > LONGEST:
                faults.append(f"{number} ({what}): {type(error).__name__} says {len(said)} letters")
        except (Exception, Hang, Trespass) as error:
            faults.append(f"{number} ({what}): {type(error).__name__}: {error}"[:600])
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{area}: {worked} worked, {refused} refused")
    if faults:
        told = "\n".join(faults[:20])
        pytest.fail(f"{len(faults)} of {count(area)} inputs of {area!r}:\n{told}", pytrace=False)
    assert count(area) < 15 or (worked and refused), f"{worked} worked, {refused} refused"


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of some values, as it is."""
    values = list(values)
    return values[int(rng.integers(len(values)))]


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes cut, flipped, overwritten, doubled or taken out, nearer to the beginning than not."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            break
        at = int(len(out) * rng.random() ** pick(rng, (1, 3)))
        length = int(rng.integers(1, 17))
        match pick(rng, ("cut", "flip", "flip", "flip", "noise", "edge", "take", "double", "none")):
            case "cut":
                del out[at:]
            case "flip":
                out[at] ^= 1 << int(rng.integers(8))
            case "noise":
                out[at : at + length] = rng.bytes(length)
            case "edge":
                out[at : at + length] = pick(rng, (b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case "take":
                del out[at : at + length]
            case "double":
                out[at:at] = out[at : at + 8 * length]
    return bytes(out)


# --------------------------------------------------------------------------------- pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".PNG", ".JPG")
NAMES = (
    "a b",
    "é ö ß",
    "画像",
    "Ω≈ç√∫",
    "🔥",
    "x$y_1$z",
    "$",
    "50%",
    "{0}",
    "%s%n",
    "'\"`",
    "-r",
    "--help",
    "tab\there",
    "line\nbreak",
    "a\\b",
    "e\u0301",
    "a\u202eb",
    "comma,semi;",
    "a" * 200,
    ".. ",
    "con",
    "[ab]*?",
)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def encoded(rng: np.random.Generator) -> tuple[str, bytes]:
    """A small image of one of many kinds, as a file has it."""
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
        "colour jpeg": (colour, "JPEG", {"exif": turned(rng)}),
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
        "webp": (colour, "WEBP", {"quality": 50}),
        "animation": (grey, "GIF", {"save_all": True, "append_images": [grey]}),
        "gif": (colour.quantize(6), "GIF", {}),
        "ppm": (colour, "PPM", {}),
        "ico": (colour, "ICO", {}),
        "eps": (colour, "EPS", {}),
    }
    name = pick(rng, kinds)
    image, form, options = kinds[name]
    file = io.BytesIO()
    image.save(file, form, **options)
    return name, file.getvalue()


def turned(rng: np.random.Generator) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 12))
    return exif


def sealed(data: bytes) -> bytes:
    """A PNG whose checksums are right again, so that a reader meets what is in its chunks."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@cache
def bomb(side: int, depth: int = 8, more: bytes = b"") -> bytes:
    """A whole and valid PNG of zeros, which is small as a file."""
    header = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + side * depth // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    start, end = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header), chunk(b"IEND", b"")
    return start + more + chunk(b"IDAT", rows) + end


@cache
def text_bomb() -> bytes:
    return bomb(8, more=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27), 9)))


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "bomb": lambda p: p.write_bytes(bomb(20_000, depth=1)),
    "text bomb": lambda p: p.write_bytes(text_bomb()),
    "large": lambda p: p.write_bytes(bomb(4000)),
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
# Calls os.system when it is unpickled.
PICKLE = b"cos\nsystem\n(S'false'\ntR."


def check_pixels(path: Path) -> None:
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert len(pixels) in (1, 2, 3, 4)
    assert pixels.size > 0
    assert pixels.tobytes() == read_image(path).tobytes()


def image_case(rng: np.random.Generator, folder: Path) -> Case:
    path = folder / (pick(rng, NAMES) + pick(rng, SUFFIXES))
    if rng.random() < 0.15:
        what = pick(rng, ODD_FILES)
        ODD_FILES[what](path)
    else:
        what, data = encoded(rng)
        if rng.random() < 0.8:
            data = damaged(rng, data)
            data = sealed(data) if data.startswith(b"\x89PNG") and rng.random() < 0.6 else data
        path.write_bytes(data)
    return Case(f"{what} as {path.name[-9:]}", lambda: check_pixels(path), (path,))


@pytest.mark.filterwarnings("ignore")
def test_images(tmp_path):
    survive("images", tmp_path, image_case)


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    """The beginning of a ``.npy`` file with this text as its header."""
    data = text.encode("latin1")
    return b"\x93NUMPY" + version + struct.pack("<H", len(data)) + data


def array_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def stack_case(rng: np.random.Generator, folder: Path) -> Case:
    path = folder / f"{pick(rng, NAMES)}.npy"
    shape = tuple(int(n) for n in rng.integers(0, 6, int(rng.integers(0, 5))))
    good = noise(rng, int(rng.integers(1, 5)), 7, 9)
    side = int(pick(rng, (-1, 0, 2**20, 2**31, 2**62, 10**30)))
    claim = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (4, {side}, {side})}}"
    kinds: dict[str, Callable[[], bytes]] = {
        "good": lambda: array_bytes(good),
        "damaged": lambda: damaged(rng, array_bytes(good)),
        "shape": lambda: array_bytes(noise(rng, *shape)),
        "kind": lambda: array_bytes(good.astype(pick(rng, KINDS))),
        "objects": lambda: array_bytes(np.array([{"a": 1}], dtype=object)),
        "record": lambda: array_bytes(np.zeros((2, 3, 4), dtype=[("a", "u1"), ("b", "f4")])),
        "claim": lambda: header(claim) + bytes(100),
        "header": lambda: header(pick(rng, HEADERS)) + bytes(100),
        "zip": lambda: b"PK\x03\x04" + rng.bytes(60),
        "archive": lambda: archive({"a": good}),
        "pickle": lambda: PICKLE,
        "fortran": lambda: array_bytes(np.asfortranarray(good)),
    }
    what = pick(rng, kinds)
    path.write_bytes(kinds[what]())
    return Case(what, lambda: check_pixels(path), (path,))


KINDS = ("f8", "i4", "c8", "?", "S3", "U2", "f2", "M8[s]")
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


@pytest.mark.filterwarnings("ignore")
def test_stacks(tmp_path):
    survive("stacks", tmp_path, stack_case)


# ------------------------------------------------------------------------- published sets


def archive(members: dict[str, Any], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """What ``numpy.savez`` writes; members that are bytes go in as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else array_bytes(np.asarray(value))
            out.writestr(f"{name}.npy", data)
    return file.getvalue()


def medmnist_case(rng: np.random.Generator, folder: Path) -> Case:
    path, n = folder / "pneumoniamnist.npz", 12
    members: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        members[f"{part}_images"] = noise(rng, n, 8, 8)
        members[f"{part}_labels"] = rng.integers(0, 2, (n, 1))
    name = pick(rng, members)
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
        "claim": header("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1048576, 1048576)}"),
        "bomb": header("{'descr': '|u1', 'fortran_order': False, 'shape': (12, 8, 8)}")
        + bytes(2**24),
    }
    what = pick(rng, (*swaps, "lacks", "array", "pickle", "damaged", "damaged", "member"))
    members[name] = swaps.get(what, members[name])
    if what == "lacks":
        del members[name]
    data = archive(members, pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    if what == "member":  # another way to compress, or a password, in both headers of a member
        field, value = pick(rng, ((8, 99), (8, 12), (6, 1), (8, 14)))
        data = bytearray(data)
        for mark, more in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            at = data.find(mark) + field + more
            data[at : at + 2] = struct.pack("<H", value)
    data = {"array": array_bytes(noise(rng, 5)), "pickle": PICKLE}.get(what, bytes(data))
    path.write_bytes(damaged(rng, data) if what == "damaged" else data)

    def load() -> None:
        check_data(load_dataset("medmnist", "pneumoniamnist", root=folder, image_size=8))

    return Case(f"{what} for {name}", load, (path,))


def test_archives(tmp_path):
    survive("archives", tmp_path, medmnist_case)


def check_data(data: datasets.AnomalyData) -> None:
    n = len(data.test_labels)
    assert len(data.test_images) == len(data.test_ids) == len(data.defect_types) == n
    assert len(data.train)
    assert all(part.abs().max() <= 1 for part in (data.train, data.test_images) if len(part))
    for mask, size in zip(data.test_masks or [], data.original_sizes, strict=False):
        assert mask is None or mask.shape == size
    json.dumps(data.summary())


def spoilt_table(rng: np.random.Generator, text: str) -> bytes:
    """A table with something odd in one of its cells, or in its bytes."""
    odd = ("", '"', '""', "\r", "\0", "../../../../etc/passwd", "/etc/passwd", "a" * 140_000)
    odd += ('"\n' * 3, ",,,,", "é\u2028x", "\x85", "'", "=1+1", "\ufeff", "good", " ", "/dev/zero")
    lines = text.splitlines()
    row = int(rng.integers(len(lines)))
    cells = lines[row].split(",")
    ways = ("cell", "cell", "cell", "row", "shorter", "longer", "damaged", "latin", "good")
    match pick(rng, ways):
        case "cell":
            cells[int(rng.integers(len(cells)))] = pick(rng, odd)
            lines[row] = ",".join(cells)
        case "row":
            lines.pop(row)
        case "shorter":
            lines[row] = ",".join(cells[: int(rng.integers(len(cells)))])
        case "longer":
            lines[row] += ",more,and more"
        case "damaged":
            return damaged(rng, text.encode())
        case "latin":
            return text.replace("0", "é").encode("latin1")
    return "\n".join([*lines, ""]).encode()


def grey(path: Path, rng: np.random.Generator) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(rng, 16, 16)).save(path)
    return path


def table_case(rng: np.random.Generator, folder: Path) -> Case:
    if rng.random() < 0.5:
        lines = ["object,split,label,image,mask"]
        for split, label, number in (("train", "normal", 12), ("test", "normal", 3)):
            for i in range(number):
                path = grey(folder / "nut" / f"{split}{i}.png", rng).relative_to(folder)
                lines.append(f"nut,{split},{label},{path},")
        bad = grey(folder / "nut" / "bad.png", rng).relative_to(folder)
        lines.append(f"nut,test,anomaly,{bad},{bad}")
        table = folder / published_readers.VISA_SPLIT
        table.parent.mkdir()
        arguments: dict[str, Any] = {"name": "visa", "category": "nut"}
    else:
        table, arguments = folder / "subjects.csv", {"name": "folder"}
        files = [f"train/good/{i:02d}.png" for i in range(12)]
        lines = [f"{file},s{i}" for i, file in enumerate(files)]
        for file in files:
            grey(folder / file, rng)
    table.write_bytes(spoilt_table(rng, "\n".join(lines)))

    def load() -> None:
        check_data(load_dataset(**arguments, root=folder, image_size=8))

    return Case(table.name, load, (folder,))


def test_tables(tmp_path):
    survive("tables", tmp_path, table_case)


# -------------------------------------------------------------------------------- folders


def renamed(rng: np.random.Generator, path: Path) -> None:
    path.rename(path.with_name(pick(rng, NAMES) + path.suffix))


FOLDER_FAULTS: dict[str, Callable[[np.random.Generator, Path], object]] = {
    "loop of folders": lambda rng, b: (b / "train" / "good" / "loop").symlink_to(b),
    "loop as a defect": lambda rng, b: (b / "test" / "loop").symlink_to(b / "test"),
    "loop named png": lambda rng, b: (b / "train" / "good" / "l.png").symlink_to("l.png"),
    "folder in a ring": lambda rng, b: (b / "test" / "ring").symlink_to("ring"),
    "pipe": lambda rng, b: os.mkfifo(b / "train" / "good" / "pipe.png"),
    "pipe as a mask": lambda rng, b: pipe_for_mask(b),
    "bomb": lambda rng, b: (b / "train" / "good" / "b.png").write_bytes(bomb(20_000, depth=1)),
    "odd name": lambda rng, b: renamed(rng, b / "train" / "good" / "03.png"),
    "odd test name": lambda rng, b: renamed(rng, b / "test" / "hole" / "0.png"),
    "odd defect": lambda rng, b: (b / "test" / "hole").rename(b / "test" / pick(rng, NAMES)),
    "no letters": lambda rng, b: shutil.copy(
        b / "train" / "good" / "00.png", os.fsencode(b / "train" / "good") + b"/\xff\xfe.png"
    ),
    "no letters in a defect": lambda rng, b: os.rename(
        b / "test" / "hole", os.fsencode(b / "test") + b"/\xe9"
    ),
    "folder named png": lambda rng, b: (b / "train" / "good" / "f.png").mkdir(),
    "two suffixes": lambda rng, b: shutil.copy(
        b / "train" / "good" / "00.png", b / "train" / "good" / "00.png.bmp"
    ),
    "stack": lambda rng, b: np.save(b / "train" / "good" / "s.npy", noise(rng, 4, 8, 8)),
    "mask of one channel more": lambda rng, b: np.save(b / "s.npy", noise(rng, 4, 8, 8)),
    "mask folder": lambda rng, b: (b / "ground_truth" / "hole" / "0").mkdir(),
    "mask turned": lambda rng, b: Image.new("L", (9, 8)).save(b / "ground_truth/hole/1_mask.png"),
    "mask all over": lambda rng, b: Image.new("L", (16, 16), 255).save(
        b / "ground_truth" / "hole" / "1_mask.png"
    ),
    "no test": lambda rng, b: shutil.rmtree(b / "test"),
    "empty test": lambda rng, b: (shutil.rmtree(b / "test"), (b / "test").mkdir()),
    "few": lambda rng, b: [p.unlink() for p in list((b / "train" / "good").iterdir())[:9]],
    "one pixel": lambda rng, b: Image.new("L", (1, 1)).save(b / "test" / "good" / "0.png"),
    "hidden": lambda rng, b: (b / "train" / "good" / ".x.png").write_bytes(b"\0"),
    "text": lambda rng, b: (b / "train" / "good" / "notes.txt").write_text("hello"),
    "nothing": lambda rng, b: None,
}


def pipe_for_mask(base: Path) -> None:
    path = base / "ground_truth" / "hole" / "0_mask.png"
    path.unlink()
    os.mkfifo(path)


def folder_case(rng: np.random.Generator, folder: Path) -> Case:
    base = folder / pick(rng, ("plate", *NAMES[:6]))
    for part, number in (("train/good", 14), ("test/good", 3), ("test/hole", 3)):
        for i in range(number):
            grey(base / part / (f"{i:02d}.png" if number > 3 else f"{i}.png"), rng)
    for i in range(3):
        grey(base / "ground_truth" / "hole" / f"{i}_mask.png", rng)
    faults = {pick(rng, FOLDER_FAULTS) for _ in range(2)}
    for fault in sorted(faults):
        try:
            FOLDER_FAULTS[fault](rng, base)
        except OSError:  # another fault has taken away what it needs, or the system refuses it
            continue
    categories = ("..", "../..", "/etc", "", ".", "train", "gone", "\0", "a/b")
    category = pick(rng, (None,) * 6 + categories)
    options = {
        "plant": pick(rng, (None, None, "cells", "lesions", "development")),
        "resize": pick(rng, ("squash", "pad")),
        "image_size": int(rng.integers(8, 20)),
        "category": category,
    }

    def load() -> None:
        check_data(load_dataset("folder", root=base, **options))
        survey(list_images(base / "train" / "good")).warnings()

    named = (base, "the name ", "good/", "hole/", "normal images", "category", "calibration")
    return Case(f"{sorted(faults)}, {options}", load, named)


@pytest.mark.filterwarnings("ignore")
def test_folders(tmp_path):
    survive("folders", tmp_path, folder_case)
