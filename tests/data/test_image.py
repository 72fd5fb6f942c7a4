"""Images: sizes, bit-exact resampling, patch order, normalisation, and files that are none."""

import numpy as np
import PIL.Image
import pytest

from qwenvl_jax.data.image import image_size, patchify, pixel_table, read_image, resize, smart_resize
from qwenvl_jax.errors import MediaError


@pytest.mark.parametrize(
    ("size", "factor", "bounds", "expected"),
    [
        ((1080, 1920), 28, (3136, 12_845_056), (1092, 1932)),
        ((1080, 1920), 32, (65_536, 16_777_216), (1088, 1920)),
        ((10, 10), 32, (65_536, 16_777_216), (256, 256)),
        ((14, 42), 28, (3136, 12_845_056), (56, 112)),
        ((4000, 6000), 32, (65_536, 16_777_216), (3328, 4992)),
        ((48, 80), 32, (65_536, 16_777_216), (224, 352)),
        ((30, 3000), 28, (3136, 12_845_056), (28, 2996)),
    ],
)
def test_smart_resize_goldens(size, factor, bounds, expected):
    assert smart_resize(*size, factor=factor, min_pixels=bounds[0], max_pixels=bounds[1]) == expected


@pytest.mark.parametrize("size", [(8, 1700), (1700, 8), (0, 5)])
def test_smart_resize_refuses_strips_and_nothing(size):
    with pytest.raises(MediaError, match="pixels"):
        smart_resize(*size, factor=32, min_pixels=65_536, max_pixels=16_777_216)


@pytest.mark.reference
def test_resize_is_bit_equal_to_torchvision():
    from tests.parity import reference  # noqa: F401, makes torchvision importable  # isort: skip
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    rng = np.random.default_rng(7)
    sizes = rng.integers(1, 160, (60, 4)).tolist()
    sizes += [
        [640, 31, 32, 64],
        [33, 900, 64, 96],
        [1, 1, 32, 32],
        [50, 70, 50, 96],
        [50, 70, 96, 70],
        [48, 48, 48, 48],
        [1080, 1920, 320, 608],
        [16, 16, 33, 10],
    ]
    for k, (h, w, new_h, new_w) in enumerate(sizes):
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        if k % 2:  # hard edges, where a kernel overshoots
            pixels = (pixels // 128 * 255).astype(np.uint8)
        planes = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        expected = F.resize(planes, [new_h, new_w], interpolation=InterpolationMode.BICUBIC, antialias=True)
        np.testing.assert_array_equal(resize(pixels, new_h, new_w), expected.permute(1, 2, 0).numpy(), str(sizes[k]))


def test_patches_stand_in_merge_order_and_each_runs_over_channel_time_row_column():
    side, tau = 2, 2
    patch = np.arange(16).reshape(4, 4)  # 4 x 4 patches, numbered row by row
    frames = np.zeros((2 * tau, 8, 8, 3), np.uint8)
    for (r, c), number in np.ndenumerate(patch):
        frames[:, r * side : (r + 1) * side, c * side : (c + 1) * side] = number
    patches = patchify(frames, patch_size=side, temporal_patch_size=tau, merge_size=2)
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert patches.shape == (32, 3 * tau * side * side)
    np.testing.assert_array_equal(patches[:, 0], order + order)

    one = np.arange(tau * 2 * 2 * 3, dtype=np.uint8).reshape(tau, 2, 2, 3)
    flat = patchify(one, patch_size=2, temporal_patch_size=tau, merge_size=1)[0]
    np.testing.assert_array_equal(flat.reshape(3, tau, 2, 2), one.transpose(3, 0, 1, 2))


@pytest.mark.reference
@pytest.mark.parametrize(
    "stats", [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.48145466, 0.4578275, 0.4), (0.26, 0.27, 0.3))]
)
def test_pixel_table_is_bit_equal_to_the_fused_normalisation(stats):
    from tests.parity import reference  # noqa: F401, makes torchvision importable  # isort: skip
    import torch
    from torchvision.transforms.v2 import functional as F

    scale = 1.0 / (1 / 255)
    bytes_C = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1).to(torch.float32)
    expected = F.normalize(bytes_C, torch.tensor(stats[0]) * scale, torch.tensor(stats[1]) * scale)
    table = pixel_table(*stats)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, expected[:, 0].numpy())
    rescaled = torch.arange(256, dtype=torch.uint8) * (1 / 255)
    np.testing.assert_array_equal(pixel_table(*stats, normalize=False)[1], rescaled.numpy())


def test_transparency_is_laid_on_white_and_other_modes_become_rgb(tmp_path):
    clear = PIL.Image.new("RGBA", (3, 2), (200, 0, 0, 0))
    np.testing.assert_array_equal(read_image(clear), np.full((2, 3, 3), 255, np.uint8))
    grey = tmp_path / "grey.png"
    PIL.Image.new("L", (5, 4), 77).save(grey)
    assert image_size(grey) == (4, 5)
    np.testing.assert_array_equal(read_image(str(grey)), np.full((4, 5, 3), 77, np.uint8))
    pixels = np.full((2, 2, 3), 9, np.uint8)
    assert read_image(pixels) is pixels


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    PIL.Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for name, said in (
        ("missing.png", "does not exist"),
        ("empty.png", "is empty"),
        ("text.png", "cannot be read as an image"),
        ("cut.png", "is damaged"),
        (".", "is a folder"),
    ):
        with pytest.raises(MediaError, match=said) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(MediaError, match="uint8"):
        read_image(array)
    with pytest.raises(MediaError, match="got int"):
        read_image(3)
