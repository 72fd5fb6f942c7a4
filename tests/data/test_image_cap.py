"""The cap on images: what it makes smaller, what it leaves, and that built data sets keep the facts of the others."""

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.data.build import build
from qwenvl_jax.data.facts import processor_key
from qwenvl_jax.data.mixture import MixturePart, MixtureReader
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import DataError
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import write_records

SIZES = {"large": (256, 192), "small": (64, 64)}  # 48 and 4 merged tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_processor_folder(folder)
    return folder


@pytest.fixture(scope="module")
def processor(model):
    return Processor.from_pretrained(model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """JSONL: a large and a small picture, and the large one with bounds of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in SIZES.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    shown = {"large": ("large", {}), "small": ("small", {}), "own": ("large", {"max_pixels": 27 * 1024})}
    return write_records(
        folder / "pictures.jsonl",
        [
            {
                "id": name,
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": f"{file}.png"} | bounds],
                    },
                    {"role": "assistant", "content": "red"},
                ],
            }
            for name, (file, bounds) in shown.items()
        ],
    )


def read(processor, source, cap, **options):
    reader = MixtureReader(processor, processor_key(processor), 0)
    return reader.read([MixturePart("", str(source))], misfit=lambda facts: None, max_image_tokens=cap, **options)


def tokens(mixture) -> list[int]:
    """Merged tokens of each picture."""
    return [sum(facts.frames) // 4 for facts in mixture.facts]


def test_images_take_no_more_than_the_cap_unless_their_record_has_bounds(processor, pictures):
    assert tokens(read(processor, pictures, None)) == [48, 4, 24]
    capped = read(processor, pictures, 12)
    assert tokens(capped) == [12, 4, 24]
    # What is planned is what is made.
    grids = [processor.sample(capped.source[i].messages).media[0].grid for i in range(3)]
    assert [t * h * w // 4 for t, h, w in grids] == [12, 4, 24]
    assert capped.digest != read(processor, pictures, None).digest


def test_a_built_data_set_is_measured_again_only_where_the_cap_bites(processor, pictures, model, tmp_path):
    build([pictures], tmp_path / "built", model=str(model))
    # Nothing may be measured: the facts that came with the records hold.
    assert tokens(read(processor, tmp_path / "built", 48, measure_at_most=0)) == [48, 4, 24]
    with pytest.raises(DataError, match=r"more than data\.measure_at_most=0"):
        read(processor, tmp_path / "built", 12, measure_at_most=0)
    assert tokens(read(processor, tmp_path / "built", 12, measure_at_most=1)) == [12, 4, 24]
