"""Where media come from: bytes, addresses that are allowed or not, and a video given as images."""

import gc
import io
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax.data.files import is_remote, local_file
from qwenvl_jax.data.sources import JsonlSource, media_paths
from qwenvl_jax.errors import ConfigError, ConversationError, MediaError
from tests.media import numbered_frames, write_clip
from tests.tiny import tiny_processor_folder


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """36 frames at 12 per second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", numbered_frames(36, 64, 96), fps="12")


@pytest.fixture
def memory():
    """fsspec's store in memory, empty."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def ask(kind="video", **part):
    return [{"role": "user", "content": [{"type": kind, **part}, {"type": "text", "text": "when?"}]}]


def png(value=90, size=(96, 64)) -> bytes:
    data = io.BytesIO()
    PIL.Image.new("RGB", size, (value, value, value)).save(data, "PNG")
    return data.getvalue()


def same(one: qv.Batch, two: qv.Batch) -> None:
    np.testing.assert_array_equal(one.tokens, two.tokens)
    for a, b in zip(one.vision, two.vision, strict=True):
        np.testing.assert_array_equal(a.patches, b.patches)


@pytest.mark.parametrize(
    "options", [{}, {"num_frames": 4}, {"sampler": "timestamps", "timestamps": [0.5, 1.0]}, {"end": 2}]
)
def test_the_bytes_of_a_video_are_as_its_file(processor, mp4, options):
    same(processor([ask(video=mp4.read_bytes(), **options)]), processor([ask(video=mp4, **options)]))


def test_a_sampler_by_motion_reads_bytes_too(processor, mp4):
    same(
        processor([ask(video=mp4.read_bytes(), sampler="dynamic")]),
        processor([ask(video=str(mp4), sampler="dynamic")]),
    )


def test_the_bytes_of_an_image_are_as_its_file(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    same(processor([ask("image", image=png())]), processor([ask("image", image=tmp_path / "a.png")]))


def test_temporary_files_go_when_nothing_needs_them(mp4):
    file = local_file(mp4.read_bytes(), "video")
    path = file.path
    assert path.read_bytes() == mp4.read_bytes()
    del file
    gc.collect()
    assert not path.exists()


def test_nothing_is_left_behind(processor, mp4, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    processor([ask(video=mp4.read_bytes())])
    with pytest.raises(MediaError):
        processor([ask(video=mp4.read_bytes()[:3000])])
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("video", b"", "video of 0 bytes is empty"),
        ("video", b"hello\n" * 100, "video of 600 bytes is"),
        ("image", b"", "an image of 0 bytes cannot be read"),
        ("image", b"hello\n" * 100, "an image of 600 bytes cannot be read"),
    ],
)
def test_bytes_that_are_no_medium(processor, kind, data, said):
    with pytest.raises(MediaError) as caught:
        processor([ask(kind, **{kind: data})])
    assert f"message 0, part 0: {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_addresses_are_fetched_where_they_are_allowed(folder, processor, mp4, memory):
    memory.pipe("/clips/a.mp4", mp4.read_bytes())
    memory.pipe("/clips/a.png", png())
    allowed = qv.Processor.from_pretrained(folder, remote_media=["memory://clips/"])
    same(allowed([ask(video="memory://clips/a.mp4", fps=1.0)]), processor([ask(video=mp4, fps=1.0)]))
    same(allowed([ask("image", image="memory://clips/a.png")]), processor([ask("image", image=png())]))
    with pytest.raises(MediaError, match=r"video memory://clips/b.mp4 cannot be fetched .*check the address"):
        allowed([ask(video="memory://clips/b.mp4")])
    memory.pipe("/clips/empty.mp4", b"")
    with pytest.raises(MediaError, match=r"video memory://clips/empty.mp4 is empty"):
        allowed([ask(video="memory://clips/empty.mp4")])
    memory.pipe("/clips/bad.mp4", b"hello\n" * 100)
    with pytest.raises(MediaError, match=r"video memory://clips/bad.mp4 is"):
        allowed([ask(video="memory://clips/bad.mp4")])


@pytest.mark.parametrize(
    "address",
    ["memory://other/a.mp4", "memory://clips/../other/a.mp4", "file:///etc/hostname", "zip://a::memory://clips/a.zip"],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_addresses_that_are_not_allowed_are_refused(folder, mp4, memory, kind, address):
    memory.pipe("/other/a.mp4", mp4.read_bytes())
    for allowed in ([], ["memory://clips/"]):
        processor = qv.Processor.from_pretrained(folder, remote_media=allowed)
        with pytest.raises(MediaError, match=r"fetching it is not allowed; .*remote_media=\['\w+://...'\]"):
            processor([ask(kind, **{kind: address})])


def test_too_large_to_fetch(folder, memory, monkeypatch):
    memory.pipe("/clips/a.png", png())
    monkeypatch.setattr("qwenvl_jax.data.files.MAX_FETCHED_BYTES", {"image": 10, "video": 10})
    processor = qv.Processor.from_pretrained(folder, remote_media=["memory://"])
    with pytest.raises(MediaError, match="the most that is fetched"):
        processor([ask("image", image="memory://clips/a.png")])


@pytest.mark.parametrize("prefixes", ["gs://bucket/", ["bucket"], [3]])
def test_remote_media_are_beginnings_of_addresses(folder, prefixes):
    with pytest.raises(ConfigError, match="remote_media must be a list of the beginnings of addresses"):
        qv.Processor.from_pretrained(folder, remote_media=prefixes)


def test_what_is_an_address():
    assert all(map(is_remote, ("gs://a/b.mp4", "s3://a", "memory://a", "zip://a::gs://b", "simplecache::gs://b")))
    assert not any(
        map(is_remote, ("a.mp4", "/a/b.mp4", "concat:a.mp4", "a%03d.mp4", "./gs:/a", Path("gs://a"), b"gs://a"))
    )


def test_records_keep_addresses_and_place_each_image_of_a_video(tmp_path):
    line = (
        '{"messages": [{"role": "user", "content": [{"type": "video", "video": "gs://a/b.mp4"}, '
        '{"type": "video", "video": ["1.png", "/2.png"], "timestamps": [0, 1]}]}]}\n'
    )
    (tmp_path / "data.jsonl").write_text(line)
    record = JsonlSource(tmp_path / "data.jsonl")[0]
    assert media_paths(record.messages) == ["gs://a/b.mp4", str(tmp_path / "1.png"), "/2.png"]


def test_images_with_their_times_are_a_video(processor, tmp_path):
    frames, times = numbered_frames(5, 64, 96), [0.0, 0.4, 1.5, 1.6, 7.25]
    for i, frame in enumerate(frames):
        PIL.Image.fromarray(frame).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    same(processor([ask(video=paths, timestamps=times)]), processor([ask(video=qv.VideoFrames(frames, times))]))
    mixed = [paths[0], PIL.Image.open(paths[1]), frames[2], (tmp_path / "3.png").read_bytes(), tmp_path / "4.png"]
    same(processor([ask(video=mixed, timestamps=times)]), processor([ask(video=paths, timestamps=times)]))
    assert processor.sample(ask(video=paths, timestamps=times)).media[0].times == (0.2, 1.55, 7.25)


def test_images_need_a_duration_where_frames_do(tmp_path):
    tiny_processor_folder(tmp_path / "model", model_type="qwen2_5_vl")
    processor = qv.Processor.from_pretrained(tmp_path / "model")
    frames, times = list(numbered_frames(4, 56, 56)), [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(MediaError, match="give duration"):
        processor([ask(video=frames, timestamps=times)])
    given = processor([ask(video=frames, timestamps=times, duration=4.0)])
    whole = processor([ask(video=qv.VideoFrames(np.stack(frames), times, 4.0))])
    np.testing.assert_array_equal(given.positions, whole.positions)


@pytest.mark.parametrize(
    ("part", "error", "said"),
    [
        ({}, ConversationError, "images without timestamps"),
        ({"timestamps": [0, 1]}, MediaError, "each of the 3 frames"),
        ({"timestamps": [0, 2, 1]}, MediaError, "must not decrease"),
        ({"timestamps": [0, 1, 2], "duration": 1.5}, MediaError, "duration=1.5 must be at least"),
        ({"timestamps": [0, 1, 2], "fps": 2.0}, ConversationError, "images are used as they are; drop fps"),
        ({"timestamps": [0, 1, 2], "start": 1}, ConversationError, "drop start"),
    ],
)
def test_images_that_make_no_video(processor, part, error, said):
    with pytest.raises(error, match=said):
        processor([ask(video=list(numbered_frames(3, 64, 64)), **part)])


def test_images_of_other_sizes_and_missing_ones(processor, mp4, tmp_path):
    with pytest.raises(MediaError, match=r"image 0 has 64 x 96 pixels \(height x width\) and image 1 has 32 x 32"):
        processor([ask(video=[png(), png(size=(32, 32))], timestamps=[0, 1])])
    with pytest.raises(MediaError, match=r"missing.png does not exist"):
        processor([ask(video=[png(), tmp_path / "missing.png"], timestamps=[0, 1])])
    with pytest.raises(MediaError, match="at least one"):
        processor([ask(video=[], timestamps=[0])])
    with pytest.raises(ConversationError, match="only a video given as images"):
        processor([ask(video=mp4, duration=3.0)])
