import gzip
import runpy
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data import Batches, DataError, ImageDataset, datasets, load_dataset, normalize
from fastgan.data.idx import read_idx, write_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def no_data_from_outside(monkeypatch, tmp_path):
    """Only what a test puts into tmp_path is found: no system folders, cache, variable or network."""
    monkeypatch.delenv("FASTGAN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_SYSTEM_ROOTS", (tmp_path / "system",))
    absent = (tmp_path / "no-mirror").as_uri() + "/"
    monkeypatch.setattr(datasets, "_MIRRORS", {"mnist": (absent,), "fashion-mnist": (absent,)})


def write_pair(folder, count=12, size=28, gzipped=True, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count).remainder(10).byte()
    for name, array in ((IMAGES, images), (LABELS, labels)):
        path = folder / f"{name}.gz"
        write_idx(path, array)
        if not gzipped:
            (folder / name).write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    return images, labels


# --- embedded digits


def test_embedded_digits_are_stratified_and_complete():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert train.images.shape == (10_000, 1, 28, 28) and train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [1000] * 10
    assert test.images.shape == (2_000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [200] * 10
    # MNIST as a whole has mean 0.1307 and standard deviation 0.3081.
    pixels = train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=0.005)
    assert pixels.std().item() == pytest.approx(0.3081, abs=0.005)


def test_embedded_digits_name_their_source_and_licence():
    text = (datasets.DIGITS_FOLDER / "README.md").read_text()
    assert "Yann LeCun" in text and "Attribution-Share Alike 3.0" in text


# --- IDX files


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("where", ["root", "root/mnist", "root/MNIST/raw"])
def test_mnist_is_found_raw_or_gzipped_in_the_usual_layouts(tmp_path, where, gzipped):
    images, labels = write_pair(tmp_path / where, gzipped=gzipped)
    dataset = load_dataset("mnist", tmp_path / "root")
    assert torch.equal(dataset.images[:, 0], images)
    assert torch.equal(dataset.labels, labels.long())


def test_search_order_is_argument_then_variable_then_system(tmp_path, monkeypatch):
    by_argument, _ = write_pair(tmp_path / "argument", seed=1)
    by_variable, _ = write_pair(tmp_path / "variable", seed=2)
    of_system, _ = write_pair(tmp_path / "system" / "mnist", seed=3)
    assert torch.equal(load_dataset("mnist").images[:, 0], of_system)
    monkeypatch.setenv("FASTGAN_DATA", str(tmp_path / "variable"))
    assert torch.equal(load_dataset("mnist").images[:, 0], by_variable)
    assert torch.equal(load_dataset("mnist", tmp_path / "argument").images[:, 0], by_argument)


def test_folder_named_after_the_other_set_is_not_taken_for_this_one(tmp_path):
    mnist, _ = write_pair(tmp_path / "mnist")
    fashion, _ = write_pair(tmp_path / "system" / "fashion-mnist", seed=1)
    with pytest.warns(UserWarning, match=r"/mnist: no train-images\S+ of fashion-mnist there; those of \S+/system/fashion-mnist are"):
        assert torch.equal(load_dataset("fashion-mnist", tmp_path / "mnist").images[:, 0], fashion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_dataset("mnist", tmp_path / "mnist").images[:, 0], mnist)
        assert torch.equal(load_dataset("mnist", tmp_path).images[:, 0], mnist)


def test_label_file_in_the_place_of_images_is_named(tmp_path):
    write_pair(tmp_path)
    (tmp_path / f"{IMAGES}.gz").write_bytes((tmp_path / f"{LABELS}.gz").read_bytes())
    with pytest.raises(DataError, match=f"{IMAGES}.gz: expected IDX images, got labels"):
        load_dataset("mnist", tmp_path)


def test_truncated_gzip_is_named(tmp_path):
    write_pair(tmp_path)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=f"{IMAGES}.gz: damaged gzip file"):
        load_dataset("mnist", tmp_path)


def test_corrupted_gzip_is_named(tmp_path):
    write_pair(tmp_path)
    path = tmp_path / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged gzip file"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b[:-7], r"truncated: the header promises 9408 bytes of data, got 9401"),
        (lambda b: b + b"xx", r"too long: the header promises 9408 bytes of data, got 9410"),
        (lambda b: b[:10], r"truncated within the header \(10 of 16 bytes\)"),
        (lambda b: b"", r"not an IDX file \(first bytes missing\)"),
        (lambda b: b"\x89PNG" + b[4:], r"not an IDX file \(first bytes 89 50 4e 47\)"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], r"element type must be 0x08 \(unsigned byte\), got 0x0d"),
        (lambda b: b"\0\0\x08\x02" + b[4:], r"expected IDX images, got 2-dimensional data"),
        (lambda b: b[:4] + struct.pack(">3I", 0, 28, 28), r"holds no images"),
        # A header may promise more than any memory holds.
        (lambda b: b[:4] + struct.pack(">3I", 2**32 - 1, 2**31, 2**31) + b[16:], r"truncated"),
    ],
)
def test_damaged_raw_file_is_named_with_what_is_wrong(tmp_path, change, message):
    write_pair(tmp_path, gzipped=False)
    path = tmp_path / IMAGES
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        load_dataset("mnist", tmp_path)
    assert str(path) in str(error.value)


def test_labels_that_are_missing_or_of_another_number_are_named(tmp_path):
    write_pair(tmp_path)
    write_idx(tmp_path / f"{LABELS}.gz", torch.zeros(11, dtype=torch.uint8))
    with pytest.raises(DataError, match="11 labels for the 12 images"):
        load_dataset("mnist", tmp_path)
    (tmp_path / f"{LABELS}.gz").unlink()
    with pytest.raises(DataError, match=f"its labels, {LABELS}.* are missing"):
        load_dataset("mnist", tmp_path)


def test_idx_files_are_written_reproducibly(tmp_path):
    array = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a", array)
    write_idx(tmp_path / "b", array)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(read_idx(tmp_path / "a", "images"), array)


# --- download


def serve(tmp_path, monkeypatch, name="mnist"):
    """A mirror on the file system with the right checksums; returns the folder it serves."""
    mirror = tmp_path / "mirror"
    images, _ = write_pair(mirror)
    monkeypatch.setitem(datasets._MIRRORS, name, (mirror.as_uri() + "/",))
    for stem in (IMAGES, LABELS):
        digest = datasets.hashlib.sha256(gzip.decompress((mirror / f"{stem}.gz").read_bytes())).hexdigest()
        monkeypatch.setitem(datasets._SHA256[name], stem, digest)
    return mirror, images


def test_absent_set_is_downloaded_into_the_cache_once(tmp_path, monkeypatch):
    mirror, images = serve(tmp_path, monkeypatch)
    assert torch.equal(load_dataset("mnist").images[:, 0], images)
    for path in mirror.iterdir():
        path.unlink()
    assert torch.equal(load_dataset("mnist").images[:, 0], images)


def test_download_with_a_wrong_checksum_leaves_nothing_behind(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch)
    monkeypatch.setitem(datasets._SHA256["mnist"], IMAGES, "0" * 64)
    with pytest.raises(DataError, match="SHA-256 of the decompressed file must be 0000"):
        load_dataset("mnist")
    assert list((tmp_path / "cache" / "fastgan" / "mnist").iterdir()) == []


def test_failed_download_says_where_to_put_the_files(tmp_path):
    with pytest.raises(DataError) as error:
        load_dataset("mnist", tmp_path)
    message = str(error.value)
    for part in (f"no {IMAGES}[.gz] in", str(tmp_path / "system" / "mnist"), "download failed", "--data-root", LABELS):
        assert part in message


def test_checksums_are_those_of_the_real_files():
    folder = datasets.Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Fashion-MNIST (Debian's dataset-fashion-mnist) is not installed")
    for stem, expected in datasets._SHA256["fashion-mnist"].items():
        if stem.startswith("t10k"):
            content = gzip.decompress((folder / f"{stem}.gz").read_bytes())
            assert datasets.hashlib.sha256(content).hexdigest() == expected


# --- sizes and channels


def test_28_pixels_become_32_by_a_black_border(tmp_path):
    images, _ = write_pair(tmp_path)
    padded = load_dataset("mnist", tmp_path, image_size=32).images
    assert torch.equal(padded[:, 0, 2:-2, 2:-2], images)
    assert padded.sum() == images.sum()


def test_other_sizes_are_interpolated_without_aliasing():
    digits = load_dataset("digits").images[:50]
    small = load_dataset("digits", image_size=16).images[:50]
    assert small.shape == (50, 1, 16, 16)
    # Antialiasing keeps the mean brightness; picking every other pixel would not keep the checkerboard's.
    assert small.float().mean().item() == pytest.approx(digits.float().mean().item(), rel=0.02)
    board = (torch.arange(28)[:, None] + torch.arange(28)).remainder(2).mul(255).byte()
    assert (datasets._resize(board[None, None], 14).float() - 127.5).abs().max() < 40


def test_grey_images_can_be_had_as_rgb(tmp_path):
    write_pair(tmp_path)
    rgb = load_dataset("mnist", tmp_path, channels=3).images
    assert rgb.shape == (12, 3, 28, 28)
    assert torch.equal(rgb[:, 0], rgb[:, 2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "cifar"}, "name must be one of digits, mnist, fashion-mnist, folder, got 'cifar'"),
        ({"name": "digits", "split": "validation"}, "split must be one of train, test, got 'validation'"),
        ({"name": "digits", "channels": 4}, r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ({"name": "digits", "image_size": 0}, "image_size must be at least 1, got 0"),
        ({"name": "folder"}, "needs --data-root"),
        ({"name": "mnist", "data_root": "/no/such/place"}, "--data-root: no such folder: /no/such/place"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        load_dataset(**arguments)


# --- folder


def save(path, size=(40, 30), mode="RGB", colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_folder_is_searched_with_its_subfolders_in_sorted_order(tmp_path):
    save(tmp_path / "b.png", colour=(0, 255, 0))
    save(tmp_path / "a" / "x.bmp", colour=(255, 0, 0))
    save(tmp_path / "c" / "d" / "y.JPG", colour=(0, 0, 255))
    save(tmp_path / ".thumbnails" / "z.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_dataset("folder", tmp_path, image_size=16).images
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert images.float().mean((2, 3)).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("mode, colour", [("L", 128), ("P", 3), ("RGBA", (9, 9, 9, 128)), ("CMYK", (1, 2, 3, 4)), ("1", 1)])
def test_every_kind_of_image_becomes_rgb_or_grey(tmp_path, mode, colour):
    save(tmp_path / "image.tiff", mode=mode, colour=colour)
    assert load_dataset("folder", tmp_path, image_size=8).images.shape == (1, 3, 8, 8)
    assert load_dataset("folder", tmp_path, image_size=8, channels=1).images.shape == (1, 1, 8, 8)


def test_16_bit_grey_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = load_dataset("folder", tmp_path, image_size=64, channels=1).images.float()
    assert image.mean().item() == pytest.approx(127.5, abs=1)


def test_images_are_cropped_at_the_centre_and_not_squeezed(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load_dataset("folder", tmp_path, image_size=20).images.min() == 255


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path):
    save(tmp_path / "outside" / "deep" / "o.png", colour=(0, 0, 255))
    save(tmp_path / "set" / "real" / "r.png", colour=(255, 0, 0))
    for name, target in (("a", "real"), ("real/loop", ".."), ("x", "../outside"), ("y", "../outside/deep")):
        (tmp_path / "set" / name).symlink_to(tmp_path / "set" / target)
    images = load_dataset("folder", tmp_path / "set", image_size=8).images
    assert images.float().mean((2, 3)).argmax(1).tolist() == [0, 2]


def test_empty_folder_tells_what_it_found(tmp_path):
    with pytest.raises(DataError, match="no image in it or below it .found no file at all"):
        load_dataset("folder", tmp_path)
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match="found 2 x .txt"):
        load_dataset("folder", tmp_path)


def test_unreadable_images_are_counted_and_named(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", size=(64, 64))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "c.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"2 of the 3 images .* repair or remove \S+b\.png \(.*\), \S+c\.png \(.*\)$"):
        load_dataset("folder", tmp_path, image_size=8)
    for number in range(12):
        (tmp_path / f"d{number:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"14 of the 15 images .*, \S+d07\.png \(.*\), 4 more$"):
        load_dataset("folder", tmp_path, image_size=8)


def test_floating_point_pixels_are_refused_by_name(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "depth.tiff")
    with pytest.raises(DataError, match=r"depth\.tiff .floating-point pixels"):
        load_dataset("folder", tmp_path, image_size=8)


def test_formats_that_can_only_be_written_are_no_images(tmp_path):
    save(tmp_path / "one.png", size=(8, 8))
    save(tmp_path / "two.mpo", size=(8, 8))
    save(tmp_path / "catalogue.pdf", size=(8, 8))
    assert len(load_dataset("folder", tmp_path, image_size=8)) == 2


# --- batches


def numbered(count=10):
    images = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1).expand(count, 1, 4, 4)
    return ImageDataset("numbered", images, torch.arange(count))


def order(batches, epoch, start=0):
    return torch.cat([batch.labels for batch in batches.epoch(epoch, start)]).tolist()


def test_an_epoch_visits_every_image_at_most_once_in_full_batches():
    batches = Batches(numbered(10), 3, seed=0)
    seen = order(batches, 0)
    assert len(batches) == 3 and len(seen) == len(set(seen)) == 9


def test_order_depends_on_seed_and_epoch_alone_and_can_be_taken_up_anywhere():
    batches = Batches(numbered(20), 4, seed=5)
    first = order(batches, 0)
    assert order(batches, 1) != first
    assert order(Batches(numbered(20), 4, seed=6), 0) != first
    torch.manual_seed(123)
    again = Batches(numbered(20), 4, seed=5)
    assert order(again, 0) == first
    assert order(again, 0, start=2) == first[8:]


def test_labels_stay_with_their_images_and_pixels_are_in_minus_one_to_one():
    batch = next(Batches(numbered(10), 10, seed=0).epoch(0))
    assert torch.equal(batch.images[:, 0, 0, 0], batch.labels / 127.5 - 1)
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_batches_need_no_labels():
    dataset = ImageDataset("folder", numbered(4).images, None)
    assert next(Batches(dataset, 2, seed=0).epoch(0)).labels is None


@pytest.mark.parametrize("batch_size", [0, 11])
def test_fewer_images_than_a_batch_is_refused(batch_size):
    with pytest.raises(DataError, match=f"batch_size must be between 1 and the number of images, 10 .* got {batch_size}"):
        Batches(numbered(10), batch_size, seed=0)


def test_fingerprint_tells_other_pixels():
    changed = numbered(10).images.clone()
    changed[3, 0, 1, 1] += 1
    assert ImageDataset("numbered", changed, None).fingerprint() != numbered(10).fingerprint()


def test_photo_crops_are_turned_as_the_photograph_is_shown(tmp_path, monkeypatch):
    script = Path(__file__).parent.parent / "examples" / "photo_crops.py"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    photograph = Image.effect_noise((50, 40), 90)
    (tmp_path / "shown").mkdir()
    photograph.save(tmp_path / "a.png", exif=exif)
    photograph.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "shown" / "a.png")
    crops = []
    for folder in (tmp_path, tmp_path / "shown"):
        arguments = [str(script), str(folder / "a.png"), "--output", str(folder / "crops"), "--count", "3", "--size", "8"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(script, run_name="__main__")
        crops.append(load_dataset("folder", folder / "crops", image_size=8).images)
    assert torch.equal(*crops)


def test_photo_crops_makes_a_folder_that_trains(tmp_path):
    for name, size in (("a.png", (50, 40)), ("b.png", (30, 60))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / name)
    script = Path(__file__).parent.parent / "examples" / "photo_crops.py"
    command = [sys.executable, script, tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "crops",
               "--count", "6", "--size", "8"]
    assert "6 crops of 2 photographs" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    images = load_dataset("folder", tmp_path / "crops", image_size=8).images
    assert images.shape == (6, 3, 8, 8) and len(images.flatten(1).unique(dim=0)) == 6
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "crops: exists already" in again.stderr
