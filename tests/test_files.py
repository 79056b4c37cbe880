"""Files that others made: what isn't a picture is refused before it costs anything, and what is one is taken."""

import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from images import make_folder
from PIL import Image, PngImagePlugin

from fastjem.data import files
from fastjem.data.files import ENDINGS, open_image, read_file, upright
from fastjem.data.levels import Levels, survey
from fastjem.data.loaders.memory import ImageArray
from fastjem.data.picture import to_image
from fastjem.data.source import open_source, read_or_next
from fastjem.data.sources import folder as folders
from fastjem.errors import UserError

pytest.importorskip("torchvision")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colours: int, rows: bytes, *before: bytes, behind: bytes = b"") -> bytes:
    """A PNG file of its header, `before`, its unfiltered rows, and `behind`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, pixels, behind, chunk(b"IEND", b"")])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_what_is_no_regular_file_is_skipped_at_once(tmp_path: Path) -> None:
    """A pipe would be waited for, and /dev/zero never ends."""
    make_folder(tmp_path, 4, classes=0)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "nothing.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        source = open_source(tmp_path)
    found = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except OSError as error:
            found[source.name(i)] = error.strerror
    regular = "not a regular file"
    assert found.pop("itself.jpg").startswith("Too many levels of symbolic links")
    assert found == {
        "nothing.jpg": "No such file or directory", "pipe.jpg": regular, "socket.jpg": regular, "zero.jpg": regular,
    }  # fmt: skip
    with pytest.raises(OSError, match=regular):
        read_file(tmp_path / "folder.jpg")
    assert survey(source).images == 4


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    """Between the first look at the name and the opening."""
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    stat = os.stat
    with monkeypatch.context() as patched, pytest.raises(OSError, match="not a regular file"):
        patched.setattr(os, "stat", lambda path, **options: stat(__file__ if path == pipe else path, **options))
        read_file(pipe)


def test_a_file_has_a_bound(tmp_path: Path, monkeypatch) -> None:
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(OSError, match="larger than 1 GiB"):
        read_file(tmp_path / "sparse.png")
    monkeypatch.setattr(files, "LARGEST_FILE", 2**10)
    for endless in (__file__, "/proc/self/maps"):  # which says that it has no bytes
        with pytest.raises(OSError, match="larger than"):
            read_file(endless)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_only_decoders_of_the_formats_that_are_taken(tmp_path: Path, ending: str, monkeypatch) -> None:
    """An EPS file would start Ghostscript, whatever it is called."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / f"a.{ending}").write_bytes(postscript)
    Image.new("RGB", (8, 8)).save(tmp_path / "icon.ico")
    (tmp_path / "icon.ico").rename(tmp_path / f"b.{ending}")
    source = open_source(tmp_path)
    for i in range(2):
        with pytest.raises(Image.UnidentifiedImageError):
            to_image(source.read(i))
    assert not started


def test_one_place_opens_images() -> None:
    """Whoever opened one elsewhere would forget the formats and the bounds."""
    package = Path(files.__file__).parents[1]
    opening = {path.name for path in package.rglob("*.py") if "Image.open(" in path.read_text()}
    opening.discard("card.py")  # whose code is for readers who haven't fastjem
    assert opening == {"files.py"} and files.__file__.endswith("data/files.py")


@pytest.mark.parametrize(
    "kind", ["gif", "avif", "jfif", "jpe", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "heic"]
)
def test_what_else_pillow_reads_is_taken(tmp_path: Path, kind: str) -> None:
    if f".{kind}" not in ENDINGS:
        pytest.skip(f"this Pillow has no {kind}")
    mode = {"pgm": "L", "pbm": "1"}.get(kind, "RGB")
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / f"a.{kind.upper()}")
    source = open_source(tmp_path)
    assert np.asarray(to_image(source.read(0))).min() >= 250


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("what", ["text", "profile"])
def test_a_png_file_with_megabytes_of_text_is_whole(where: str, what: str) -> None:
    """XMP of editors, and colour profiles: Pillow refuses more than a megabyte of each."""
    many = zlib.compress(b"x" * 3 * 2**20)
    text = chunk(b"zTXt", b"Comment\0\0" + many) + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + many)
    extra = text if what == "text" else chunk(b"iCCP", b"profile\0\0" + many)
    rows = b"".join(b"\0" + bytes([40 * y, 9, 200]) * 4 for y in range(3))
    plain = png(4, 3, 8, 2, rows)
    data = png(4, 3, 8, 2, rows, extra) if where == "before" else png(4, 3, 8, 2, rows, behind=extra)
    assert np.array_equal(np.asarray(to_image(data)), np.asarray(to_image(plain)))
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "short")
    whole = encoded(Image.new("RGB", (4, 4)), pnginfo=info)
    assert open_image(whole).info["Comment"] == "short"  # and nothing is dropped without need


def test_an_orientation_turns_values_as_pillow_turns_pictures() -> None:
    from PIL import ImageOps

    values = np.random.default_rng(0).integers(0, 256, (4, 7, 3), np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[files.ORIENTATION] = orientation
        image = Image.open(io.BytesIO(encoded(Image.fromarray(values), exif=exif)))
        assert np.array_equal(upright(values, orientation), np.asarray(ImageOps.exif_transpose(image)))


def test_pixels_have_a_bound_whoever_decodes_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    image = Image.new("RGB", (11, 10))
    deep = png(11, 10, 16, 2, (b"\0" + bytes(66)) * 10)
    for data in (encoded(image), encoded(image, "JPEG"), deep):
        with pytest.raises(Exception, match=r"110 pixels|11 x 10 pixels, more than the 100"):
            to_image(data)
    for values in (np.zeros((10, 11)), np.zeros((10, 11, 3), np.uint8)):
        with pytest.raises(ValueError, match="11 x 10 pixels, more than the 100 that are read"):
            to_image(values)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2, 10, 11, 3), np.uint8))
    with pytest.raises(UserError, match=r"a.npz: images of 11 x 10 pixels, more than the 100 that are read"):
        open_source(tmp_path / "a.npz")
    assert to_image(encoded(Image.new("RGB", (10, 10)))).size == (10, 10)


def test_arrays_that_no_memory_holds_are_refused_by_their_header(tmp_path: Path) -> None:
    for name in ("a.npy", "a.npz"):
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 32, 32, 3)}
        np.lib.format.write_array_header_2_0(header, shape)
        if name == "a.npz":
            import zipfile

            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.writestr("images.npy", header.getvalue() + bytes(99))
        else:
            (tmp_path / name).write_bytes(header.getvalue() + bytes(99))
        # numpy itself looks at the length of a .npy file
        with pytest.raises(UserError, match="its images take .* GiB" if name == "a.npz" else "can't be read"):
            open_source(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    """A class that vanishes silently would spoil a run."""
    make_folder(tmp_path, 6, classes=3)
    (tmp_path / "class3").symlink_to(tmp_path / "unmounted")
    listing = os.scandir

    def refusing(path):
        if os.path.basename(os.fspath(path)) == "class1":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listing(path)

    monkeypatch.setattr(folders.os, "scandir", refusing)
    source = open_source(tmp_path)
    assert len(source) == 4 and source.classes == ["class0", "class2"]
    assert capsys.readouterr().err.splitlines() == [
        f"fastjem: {tmp_path}/class3 can't be listed (a link to nothing): what is in it is left out",
        f"fastjem: {tmp_path}/class1 can't be listed (Permission denied): what is in it is left out",
    ]
    with pytest.raises(UserError, match="class1 can't be listed: Permission denied"):
        open_source(tmp_path / "class1")
    (tmp_path / "only" / "class1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"only has no images; .*only/class1 can't be listed \(Permission denied\)"):
        open_source(tmp_path / "only")


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    make_folder(tmp_path, 4, classes=2)
    (tmp_path / "class0" / "up").symlink_to(tmp_path)
    (tmp_path / "class2").symlink_to("class2")
    (tmp_path / "class3").symlink_to(tmp_path / "class1")  # its images are there already
    source = open_source(tmp_path)
    assert len(source) == 4 and source.classes == ["class0", "class1"]


PEAK = """
import resource, sys
import numpy as np
from fastjem.data.levels import Levels
from fastjem.data.picture import to_image
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_image(data, Levels(3, "integer", (0, 4095)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("mode", ["I;16", "F", "P", "CMYK"])
def test_a_decoded_image_costs_a_few_bytes_a_pixel(tmp_path: Path, mode: str) -> None:
    """3000 x 3000: Pillow's RGB has 34 MiB, 16 bits 17, floats and CMYK 34. Copies in float64 would be 69 each."""
    kind = {"F": "TIFF", "CMYK": "JPEG"}.get(mode, "PNG")
    (tmp_path / "a").write_bytes(encoded(Image.new(mode, (3000, 3000)), kind))
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 34 + 34 + 25


def test_one_unreadable_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    make_folder(tmp_path, 3, classes=0)
    os.mkfifo(tmp_path / "0000a.png")
    source = open_source(tmp_path)
    found = read_or_next(source, 1, lambda i: to_image(source.read(i), Levels()))
    assert found.sample == 2 and found.unreadable == [(str(tmp_path / "0000a.png"), "not a regular file")]


def test_a_npy_file_is_mapped_and_may_shrink(tmp_path: Path) -> None:
    """Its images aren't copied; one that shrinks raises and doesn't end the process."""
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    source = open_source(tmp_path / "a.npy")
    base = source.images
    while not isinstance(base, np.memmap):
        base = base.base
    assert np.array_equal(source.read(5), images[5].transpose(1, 2, 0)) and source.read(5).base is None
    os.truncate(tmp_path / "a.npy", 4096)
    with pytest.raises(OSError, match=r"a\.npy has changed since it was opened"):
        source.read(7)


def test_a_mapped_array_is_held_in_memory_that_may_be_written(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    array = ImageArray.from_npz(tmp_path / "a.npy")
    array.images[0] = 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), images)
