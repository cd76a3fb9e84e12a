"""A folder of images: what a model's folder says about them, what options say, and what is wrong with some."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emscan.errors import ProbeError, UsageError
from emscan.probe import Probe, open_probe

Image = pytest.importorskip("PIL.Image")


class Small(nn.Module):
    """A convolution, pooled: any size of image."""

    def __init__(self, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> object:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    pixels = np.kron(coarse, np.ones((4, 4, 1)))[:height, :width].astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, endings in (("cats", "png jpg bmp"), ("dogs", "webp gif tiff")):
        (root / name).mkdir(parents=True)
        for number, ending in enumerate(endings.split()):
            picture(30 + 7 * number, 50 - 5 * number, number).save(root / name / f"{number}.{ending}")
    return root


def model_folder(tmp_path: Path, name: str = "preprocessor_config.json", **fields: object) -> Path:
    place = tmp_path / "model"
    place.mkdir(exist_ok=True)
    (place / name).write_text(json.dumps(fields))
    return place


def values(probe: Probe) -> Tensor:
    return torch.cat([batch.args[0] for batch in probe])


VIT = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "do_resize": True,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3], "resample": 2,
}  # fmt: skip
CLIP = {
    **VIT, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "do_center_crop": True,
    "crop_size": {"height": 25, "width": 25}, "resample": 3,
}  # fmt: skip
CONVNEXT = {**VIT, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 24}, "crop_pct": 0.875}
LARGE_CROP = {**CLIP, "crop_size": {"height": 41, "width": 37}}  # larger than the resized image: a black border


@pytest.mark.parametrize("fields", [VIT, CLIP, CONVNEXT, LARGE_CROP], ids=["vit", "clip", "convnext", "border"])
def test_pixels_are_those_of_transformers(tmp_path, folder, fields):
    transformers = pytest.importorskip("transformers")
    place = model_folder(tmp_path, **fields)
    kind = getattr(transformers, f"{fields['image_processor_type']}Pil")
    images = []
    for file in sorted(folder.rglob("*.*")):
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    theirs = kind.from_pretrained(place)(images, return_tensors="pt")
    ours = values(open_probe(str(folder), Small(), folder=place))
    assert ours.shape == theirs["pixel_values"].shape
    assert (ours - theirs["pixel_values"]).abs().max() < 1e-5


def test_a_short_configuration_takes_what_its_class_takes(tmp_path, folder):
    pytest.importorskip("transformers")
    place = model_folder(tmp_path, image_processor_type="ViTImageProcessor", size={"height": 24, "width": 20})
    probe = open_probe(str(folder), Small(), folder=place)
    assert "RGB 24x20" in probe.info.source
    assert "mean 0.5,0.5,0.5 std 0.5,0.5,0.5" in probe.info.source


def test_processor_config_and_timm(tmp_path, folder):
    place = model_folder(tmp_path, "processor_config.json", image_processor=VIT, processor_class="AnyProcessor")
    assert values(open_probe(str(folder), Small(), folder=place)).shape == (6, 3, 24, 24)
    place = model_folder(tmp_path / "model", "config.json", pretrained_cfg={
        "input_size": [3, 28, 28], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "crop_pct": 0.875,
        "interpolation": "bicubic",
    })  # fmt: skip
    probe = open_probe(str(folder), Small(), folder=place)
    assert probe.info.source == (
        f"{folder}: 6 images, RGB 28x28, shorter edge resized to 32 (bicubic), center crop 28x28, values 0 to 1, "
        "mean 0.5,0.4,0.3 std 0.2,0.25,0.3 (from pretrained_cfg in config.json); targets: the folders cats, dogs in "
        "sorted order"
    )
    first = Image.open(folder / "cats/0.png").resize((53, 32), Image.Resampling.BICUBIC)  # from 50 x 30
    pixels = torch.from_numpy(np.array(first)).permute(2, 0, 1)[:, 2:30, 12:40] / 255
    expected = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    assert torch.allclose(values(probe)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"size": "16"},
            "RGB 16x16, shorter edge resized to 16 (bilinear), center crop 16x16, values 0 to 1, not normalized",
        ),
        ({"size": "16x20"}, "RGB 16x20, resized to 16x20 (bilinear), values 0 to 1, not normalized"),
        (
            {"size": "16", "resize": "20"},
            "RGB 16x16, shorter edge resized to 20 (bilinear), center crop 16x16, values 0 to 1",
        ),
        (
            {"size": "16", "interpolation": "bicubic", "rescale": "false"},
            "(bicubic), center crop 16x16, values 0 to 255",
        ),
        ({"size": "16", "mean": "0.5", "std": "0.25,0.5,1"}, "mean 0.5 std 0.25,0.5,1 (from --probe-arg)"),
    ],
)
def test_options(folder, arguments, said):
    probe = open_probe(str(folder), Small(), arguments=arguments)
    assert said in probe.info.source
    height, width = (16, 20) if arguments["size"] == "16x20" else (16, 16)
    pixels = values(probe)
    assert pixels.shape == (6, 3, height, width)
    assert float(pixels.max()) > (2 if "rescale" in arguments else 0)


def test_options_change_what_the_folder_says(tmp_path, folder):
    place = model_folder(tmp_path, **CLIP)
    probe = open_probe(str(folder), Small(), folder=place, arguments={"size": "50"})
    assert "RGB 50x50, shorter edge resized to 56 (bicubic), center crop 50x50" in probe.info.source
    assert "mean 0.5,0.4,0.3" in probe.info.source
    assert probe.info.source.partition("; ")[0].endswith("(from preprocessor_config.json and --probe-arg)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"siez": "16"},
            "--probe-arg siez: a folder of images takes size, resize, interpolation, channels, rescale, mean, std; "
            "did you mean size?",
        ),
        (
            {"size": "big"},
            "--probe-arg size=big: no such value; give pixels: 224, or 224x192 for height x width, at most 16,384",
        ),
        ({"size": "0"}, "--probe-arg size=0: no such value"),
        ({"size": "99999999"}, "--probe-arg size=99999999: no such value"),
        ({"mean": "a,b"}, "--probe-arg mean=a,b: no such value; give numbers, one per channel: 0.485,0.456,0.406"),
        ({"std": "0,1,1"}, "--probe-arg std=0,1,1: no such value; give positive numbers, one per channel"),
        ({"mean": "nan"}, "--probe-arg mean=nan: no such value"),
        ({"channels": "2"}, "--probe-arg channels=2: no such value; use one of 1, 3, 4"),
        ({"interpolation": "cubic"}, "use one of nearest, lanczos, bilinear, bicubic, box, hamming"),
        ({"rescale": "fast"}, "--probe-arg rescale=fast: no such value"),
        ({"mean": "0.5,0.5", "size": "16"}, "2 values of mean for images of 3 channels; give --probe-arg mean=..."),
    ],
)
def test_wrong_options(folder, arguments, message):
    with pytest.raises((UsageError, ProbeError)) as error:
        open_probe(str(folder), Small(), arguments=arguments)
    assert message in str(error.value)


def test_no_other_probe_takes_these_options(tmp_path):
    np.save(tmp_path / "p.npy", np.zeros((3, 6), np.float32))
    with pytest.raises(UsageError, match="takes no options; leave it out"):
        open_probe(str(tmp_path / "p.npy"), nn.Linear(6, 2), arguments={"size": "16"})
    with pytest.raises(UsageError, match="a synthetic probe takes no options"):
        open_probe(None, nn.Linear(6, 2), arguments={"size": "16"})


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("saved", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_channels_are_what_the_model_takes(tmp_path, channels, mode, saved):
    picture(12, 12).convert(saved).save(tmp_path / ("a.tif" if saved == "CMYK" else "a.png"))
    file = next(tmp_path.iterdir())
    found = values(open_probe(str(tmp_path), Small(channels)))
    with Image.open(file) as image:
        expected = np.asarray(image.convert(mode)).reshape(12, 12, channels)
    assert torch.allclose(found[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 144).astype(np.uint16).reshape(12, 12)
    Image.fromarray(levels).save(tmp_path / "a.png")
    found = values(open_probe(str(tmp_path), Small(1)))
    assert torch.allclose(found[0, 0], torch.from_numpy(levels / 65535).float(), atol=0.5 / 255 + 1e-6)


def test_orientation_and_animation(tmp_path):
    image = picture(12, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    frames = [picture(20, 12, seed, "P") for seed in (1, 2, 3)]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    found = values(open_probe(str(tmp_path), Small()))
    assert found.shape == (2, 3, 20, 12)
    turned = torch.from_numpy(np.array(image.transpose(Image.Transpose.ROTATE_270))).permute(2, 0, 1) / 255
    assert torch.allclose(found[0], turned)
    with Image.open(tmp_path / "b.gif") as animation:
        assert animation.n_frames == 3
        first = torch.from_numpy(np.array(animation.convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.allclose(found[1], first)


class Flat(nn.Module):
    """A linear layer on flattened images: one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 784))


def test_sizes_come_from_the_model_where_images_differ_and_from_them_where_they_are_alike(tmp_path, folder):
    assert "gray 28x28, shorter edge resized to 28" in open_probe(str(folder), Flat()).info.source
    assert "(from what the model accepts)" in open_probe(str(folder), Small()).info.source
    for number in range(3):
        picture(18, 22, number).save(tmp_path / f"{number}.png")
    probe = open_probe(str(tmp_path / "0.png"), Small())
    assert "1 image, RGB 18x22, values 0 to 1, not normalized" in probe.info.source
    assert values(probe).shape == (1, 3, 18, 22)


def test_images_of_several_sizes_that_nothing_resizes(tmp_path, folder):
    place = model_folder(tmp_path, do_resize=False, do_rescale=True, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ProbeError, match="nothing says which size the model takes; add --probe-arg size=224"):
        open_probe(str(folder), nn.Identity(), folder=place)
    place = model_folder(tmp_path, size={"shortest_edge": 20}, do_resize=True)
    with pytest.raises(ProbeError, match=r"holds images of different sizes .*--probe-arg size=224"):
        list(open_probe(str(folder), Small(), folder=place, batch_size=6))
    assert len(list(open_probe(str(folder), Small(), folder=place))) == 6  # one at a time


def test_images_of_several_sizes_are_padded_where_the_model_takes_a_mask(tmp_path, folder):
    class Masked(Small):
        def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
            return super().forward(pixel_values)

    place = model_folder(tmp_path, size={"shortest_edge": 20, "longest_edge": 30}, do_resize=True)
    (batch,) = open_probe(str(folder), Masked(), folder=place, batch_size=6)
    pixels, mask = batch.args
    assert pixels.shape[0] == mask.shape[0] == 6
    assert max(pixels.shape[2:]) <= 30
    assert bool((pixels.abs().sum(1)[mask == 0] == 0).all())
    assert int(mask[0].sum()) == 18 * 30  # 30 x 50, the longer edge at most 30


def test_folders_are_classes_where_the_model_has_as_many(folder):
    probe = open_probe(str(folder), Small(), batch_size=4)
    assert torch.cat([batch.targets for batch in probe]).tolist() == [0, 0, 0, 1, 1, 1]
    assert probe.info.source.endswith("; targets: the folders cats, dogs in sorted order")
    assert [batch.targets for batch in open_probe(str(folder), Small(classes=5))] == [None]
    picture(20, 20).save(folder / "stray.png")
    assert [batch.targets for batch in open_probe(str(folder), Small(), batch_size=9)] == [None]


def test_labels_of_the_configuration_come_before_the_order(folder):
    model = Small(classes=4)
    model.config = type("Config", (), {"label2id": {"dogs": 0, "birds": 1, "fish": 2, "cats": 3}})()
    probe = open_probe(str(folder), model)
    assert torch.cat([batch.targets for batch in probe]).tolist() == [3, 3, 3, 0, 0, 0]
    assert "by label2id of the configuration" in probe.info.source


def test_order_digest_and_passes(folder, tmp_path):
    (folder / "cats" / "10.png").write_bytes((folder / "cats" / "0.png").read_bytes())
    (folder / "cats" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(b"nothing")
    (folder / "again").symlink_to(folder)  # a ring
    one, other = (open_probe(str(folder), Small(), batch_size=size) for size in (2, 5))
    assert one.total_batches == 4
    assert one.info.sha256 is None
    first = values(one)
    assert torch.equal(first, values(one))
    assert torch.equal(first, values(other))
    assert (one.info.samples, one.info.batches) == (7, 4)
    assert one.info.sha256 == other.info.sha256 is not None
    (folder / "cats" / "10.png").rename(folder / "cats" / "11.png")
    again = open_probe(str(folder), Small())
    list(again)
    assert again.info.sha256 != one.info.sha256


def test_decoding_is_lazy(folder, monkeypatch):
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self), real(self, *a, **k))[1])
    batches = iter(open_probe(str(folder), Small(), batch_size=2))
    opened.clear()
    next(batches)
    assert len(opened) == 2


def bomb() -> bytes:
    """A PNG that says to have 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def encoded(image: object, ending: str) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, ending)
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "is no image that emscan reads (JPEG, PNG, BMP, WEBP, GIF, TIFF)"),
    "cut": (encoded(picture(40, 40), "PNG")[:-300], "is damaged ("),
    "cut jpeg": (encoded(picture(40, 40), "JPEG")[:-300], "is damaged (image file is truncated"),
    "bomb": (bomb(), "has more pixels than Pillow deems safe"),
    "large": (encoded(Image.new("1", (9500, 9500)), "PNG"), "has 9,500 x 9,500 pixels, more than Pillow deems safe"),
    "narrow": (
        encoded(Image.new("1", (1, 2_000_000)), "TIFF"),
        "is 1 x 2,000,000, too narrow to resize its shorter edge",
    ),
    "floats": (encoded(Image.new("F", (9, 9)), "TIFF"), "holds floating-point pixels, whose range is not known"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that emscan reads"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_named(tmp_path, case):
    data, message = BROKEN[case]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(data)
    with pytest.raises(ProbeError) as error:
        list(open_probe(str(tmp_path), Small(), arguments={"size": "224"}))
    assert f"cannot read the probe {tmp_path}: b/x.png {message}" in str(error.value)
    assert str(error.value).endswith("; remove it from the folder, or save it again")


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ProbeError) as error:
        open_probe(str(tmp_path), Small())
    assert str(error.value) == (
        f"the probe {tmp_path} is a folder without images (bmp, gif, jpeg, jpg, png, tif, tiff, webp); "
        "give a folder that holds some"
    )


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ProbeError, match=r"needs Pillow, which is not installed; install emscan\[images\]"):
        open_probe(str(folder), Small())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 10**9, "width": 4}}, "has size = 1000000000, which is no setting for images"),
        ({"size": {"longest_edge": 7}}, "has size = {'longest_edge': 7}"),
        ({"size": "large"}, "has size = large"),
        ({"image_mean": [0.5, "x", 1]}, "has image_mean = [0.5, 'x', 1]"),
        ({"image_std": [0, 0, 0]}, "has image_std = [0, 0, 0]"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "has image_std = "),
        ({"resample": 77}, "has resample = 77"),
        ({"rescale_factor": None}, "has rescale_factor = None"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path, folder, fields, message):
    place = model_folder(tmp_path, **{**VIT, **fields})
    with pytest.raises(ProbeError) as error:
        open_probe(str(folder), Small(), folder=place)
    assert f"{place / 'preprocessor_config.json'} {message}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_configurations_that_are_no_json(tmp_path, folder, text):
    place = model_folder(tmp_path)
    (place / "preprocessor_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ProbeError, match=r"cannot read .*preprocessor_config\.json"):
        open_probe(str(folder), Small(), folder=place)
