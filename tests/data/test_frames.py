"""`qwenvl-jax data frames`: what it prints is what a processor gives, and what it draws shows it."""

import json

import fsspec
import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax import cli
from qwenvl_jax.data.frames import public_opener
from qwenvl_jax.data.settings import media_config
from tests.data.test_motion import shots
from tests.media import write_clip
from tests.tiny import tiny_processor_folder

KEYS = ["duration", "source_fps", "frames", "groups", "grid", "tokens"]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """Three shots, 90 frames at 15 per second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", shots([31, 40, 19]), fps="15")


def frames(capsys, *arguments):
    """The object that the command prints."""
    assert cli.main(["data", "frames", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--fps", "3"], {"fps": 3.0}),
        (["--sampler", "uniform", "--budget", "7"], {"max_frames": 7}),
        (["--sampler", "count", "--budget", "6"], {"sampler": "count", "num_frames": 6}),
        (["--sampler", "count", "--num-frames", "8"], {"sampler": "count", "num_frames": 8}),
        (["--sampler", "dynamic", "--budget", "12"], {"sampler": "dynamic", "max_frames": 12}),
        (
            ["--sampler", "dynamic", "--min-fps", "0.5", "--max-fps", "2", "--min-frames", "2"],
            {"sampler": "dynamic", "min_fps": 0.5, "max_fps": 2.0, "min_frames": 2},
        ),
        (["--sampler", "event", "--start", "1", "--end", "4.5"], {"sampler": "event", "start": 1.0, "end": 4.5}),
        (["--sampler", "keyframes"], {"sampler": "keyframes"}),
        (
            ["--sampler", "timestamps", "--timestamps", "0.5,2,2.5"],
            {"sampler": "timestamps", "timestamps": [0.5, 2.0, 2.5]},
        ),
        (
            ["--max-frame-tokens", "3", "--max-video-tokens", "16"],
            {"max_frame_tokens": 3, "max_video_tokens": 16},
        ),
    ],
)
def test_it_agrees_with_the_processor(mp4, tmp_path, capsys, model, arguments, options):
    tiny_processor_folder(tmp_path / "model", model_type=model)
    processor = qv.Processor.from_pretrained(tmp_path / "model")
    shown = frames(capsys, mp4, "--model", tmp_path / "model", *arguments)
    assert list(shown) == KEYS
    assert shown["duration"] == pytest.approx(6) and shown["source_fps"] == 15
    conversation = [{"role": "user", "content": [{"type": "video", "video": mp4, **options}]}]
    sample = processor.sample(conversation)
    (media,) = sample.media
    assert shown["grid"] == list(media.grid)
    assert shown["tokens"] == int((sample.tokens == processor.video_token_id).sum())
    assert [group["time"] for group in shown["groups"]] == list(media.times)
    text = processor.decode([t for t in sample.tokens if t != processor.video_token_id], skip_special_tokens=False)
    written = [group["text"] for group in shown["groups"]]
    if model == "qwen3_vl":
        assert "<|vision_start|><|vision_end|>".join([*written, ""]) in text
    else:
        assert not any(written) and "seconds>" not in text
    for frame in shown["frames"]:
        assert list(frame) == ["index", "time", "why"] and frame["time"] == pytest.approx(frame["index"] / 15)
    padded = [frame["time"] for frame in shown["frames"]]
    padded += padded[-1:] * (len(padded) % 2)
    np.testing.assert_allclose(np.reshape(padded, (-1, 2)).mean(axis=1), media.times)


def test_without_a_model_it_goes_by_the_public_settings_of_qwen3_vl(mp4, capsys):
    shown = frames(capsys, mp4, "--fps", "1", "--min-frames", "2")
    # int(90 / 15 * 1) frames from the first to the last: linspace(0, 89, 6).
    assert [frame["index"] for frame in shown["frames"]] == [0, 18, 36, 53, 71, 89]
    assert [group["text"] for group in shown["groups"]] == ["<0.6 seconds>", "<3.0 seconds>", "<5.3 seconds>"]
    assert shown["grid"] == [3, 4, 4] and shown["tokens"] == 12  # 48 x 64 pixels: 2 x 2 tokens of 32 x 32
    older = frames(capsys, mp4, "--fps", "1", "--model", "qwen2_5_vl_7b")
    assert [group["text"] for group in older["groups"]] == [""] * 3 and older["grid"] == [3, 4, 4]


def test_public_settings_are_those_of_folders_with_the_public_numbers():
    of_images = {"patch_size": 14, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    older = media_config({**of_images, "min_pixels": 3136, "max_pixels": 12845056}, "preprocessor_config.json")[0]
    newer = {**of_images, "patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    third = public_opener("qwen3_vl_30b_a3b")
    assert public_opener("qwen2_vl_2b").video == public_opener("qwen2_vl_2b").image == older
    assert third.video == media_config(newer, "video_preprocessor_config.json", video_of=third.generation)[0]
    assert public_opener("qwen2_5_vl_3b").tokens_per_second == 2


def test_a_line_a_frame(mp4, capsys):
    assert cli.main(["data", "frames", str(mp4), "--sampler", "keyframes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "6.000 s, 15.000 fps, 64 x 48 pixels" in lines[0] and "9 frames in 5 temporal patches" in lines[1]
    assert [line.split(maxsplit=1)[0] for line in lines[4:]] == ["0", "15", "30", "31", "50", "70", "71", "80", "89"]
    assert "last of a shot" in lines[6] and "first of a shot" in lines[7] and "<0.5 seconds>" in lines[4]


@pytest.mark.parametrize("name", ["sheet.png", "sheet.svg"])
def test_a_sheet_is_drawn(mp4, tmp_path, capsys, name):
    out = tmp_path / name
    assert frames(capsys, mp4, "--sampler", "keyframes", "--out", out)["tokens"] == 20
    if out.suffix == ".png":
        picture = np.asarray(PIL.Image.open(out).convert("RGB")).astype(int)
        assert picture.shape[0] > 400 and picture.shape[1] > 1000
        # Each shot has a tint of its own; the middle frame of each must be found on the sheet, as large as it is drawn.
        for index in (15, 50, 80):
            tint = shots([31, 40, 19])[index].reshape(-1, 3).mean(axis=0)
            near = (np.abs(picture - tint).max(axis=2) < 45).sum()
            assert near > 5000, index
    else:
        assert "<svg" in out.read_text() and out.read_text().count("<image") == 9


def test_of_many_frames_some_are_shown(mp4, tmp_path, capsys):
    out = tmp_path / "many.svg"
    assert len(frames(capsys, mp4, "--fps", "14", "--out", out)["frames"]) == 84
    assert out.read_text().count("<image") == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data"], ["COMMAND", "qwenvl-jax data --help"]),
        (["data", "frmes"], ["'frmes'", "frames"]),
        (["data", "frames"], ["VIDEO", "qwenvl-jax data frames --help"]),
        (["data", "frames", "MP4", "--sampler", "keyframe"], ["'keyframe'", "did you mean 'keyframes'"]),
        (["data", "frames", "MP4", "--smapler", "count"], ["'--smapler'", "did you mean '--sampler'", "data frames"]),
        (["data", "frames", "MP4", "--sampler", "count", "--budget", "4", "--num-frames", "4"], ["drop one"]),
        (["data", "frames", "MP4", "--timestamps", "1;2", "--sampler", "timestamps"], ["'1;2'", "as 1.5,3,8"]),
        (["data", "frames", "MP4", "--start", "7"], ["lasts 6.000 s", "start=7"]),
        (["data", "frames", "MP4", "--model", "no-such"], ["no-such"]),
        (["data", "frames", "MP4", "--out", "sheet.txt"], ["sheet.txt", ".png"]),
        (["data", "frames", "MP4", "--out", "nowhere/sheet.png"], ["nowhere", "make the folder"]),
        (["data", "frames", "none.mp4"], ["none.mp4", "does not exist"]),
        (["data", "frames", "MP4", "--budget", "0"], ["positive", "max_frames"]),
    ],
)
def test_mistakes_take_one_line(mp4, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(mp4) if word == "MP4" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qwenvl-jax: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_an_address_that_may_be_fetched(mp4, capsys):
    store = fsspec.filesystem("memory")
    store.pipe("/clips/clip.mp4", mp4.read_bytes())
    address, allowed = "memory://clips/clip.mp4", ["--remote-media", "memory://clips/"]
    assert frames(capsys, address, *allowed, "--fps", "1") == frames(capsys, mp4, "--fps", "1")
    assert cli.main(["data", "frames", address, "--remote-media", "memory://other/", *allowed]) == 0
    assert capsys.readouterr().out.startswith(f"{address}: 6.000 s")
    assert cli.main(["data", "frames", address, "--remote-media", "memory://other/"]) != 0
    assert "fetching it is not allowed" in capsys.readouterr().err
    store.store.clear()
