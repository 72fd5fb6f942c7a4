"""`qwenvl-jax data inspect` and `data stats`: what they tell is what a processor gives."""

import json

import numpy as np
import PIL.Image
import pytest

import qwenvl_jax as qv
from qwenvl_jax import cli
from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.named import public_id
from qwenvl_jax.data.sources import open_source
from qwenvl_jax.data.stats import FIGURES, Stats, figure_of, kind_of, measure
from qwenvl_jax.presets import PRESETS
from tests.tiny import tiny_processor_folder
from tests.train.tiny_run import write_records


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def model(request, tmp_path):
    tiny_processor_folder(tmp_path / "model", model_type=request.param)
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path, clip):
    """A clip, a picture and a text, and three records that cannot be used, two of them for one reason."""
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "square.png")

    def record(name, *parts):
        user = {"role": "user", "content": [*parts, {"type": "text", "text": "when does it leave?"}]}
        return {"id": name, "messages": [user, {"role": "assistant", "content": "it leaves"}]}

    video, image = {"type": "video", "video": "clip.mp4", "fps": 3.0}, {"type": "image", "image": "square.png"}
    records = [
        record("text"),
        record("both", image, video),
        record("gone-1", {"type": "video", "video": "gone-1.mp4"}),
        record("gone-2", {"type": "video", "video": "gone-2.mp4"}),
        {"id": "nobody", "messages": []},
    ]
    return write_records(tmp_path / "data.jsonl", records)


def run(capsys, *arguments):
    assert cli.main(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_inspect_shows_the_sample(data, model, capsys):
    processor = qv.Processor.from_pretrained(model)
    seen = json.loads(run(capsys, "inspect", data, "--index", 1, "--model", model, "--json"))
    sample = processor.sample(seen["conversation"])
    assert (seen["where"], seen["id"], seen["options"]) == (f"{data}:2", "both", {})
    assert seen["ids"] == sample.tokens.tolist() and seen["tokens"] == len(sample.tokens)
    assert seen["learnt"] == sample.loss_weights.sum()
    # A token is taught where the one before it is to predict it.
    taught = [token for token, one in zip(seen["ids"], seen["taught"], strict=True) if one]
    assert taught == sample.targets[sample.loss_weights > 0].tolist()
    assert [(one["type"], tuple(one["grid"]), tuple(one["times"])) for one in seen["media"]] == [
        (media.kind, media.grid, media.times) for media in sample.media
    ]
    learnt = [piece["text"] for piece in seen["pieces"] if piece["kind"] == "learnt"]
    assert learnt == ["it leaves<|im_end|>\n"]
    counts = [piece["tokens"] for piece in seen["pieces"] if piece["kind"] == "vision"]
    assert sum(counts) == (sample.vision_index >= 0).sum()
    at = 0
    for piece in seen["pieces"]:
        assert piece["first"] == at
        at += piece["tokens"]
    assert at == seen["tokens"]


def test_inspect_for_reading(data, model, capsys):
    lines = run(capsys, "inspect", data, "--index", 1, "--model", model).splitlines()
    assert f"{data}:2 (both): " in lines[0] and "learnt" in lines[0]
    assert any(line.split() == ["user", "when", "does", "it", "leave?"] for line in lines)
    assert any(" learnt " in line and "it leaves" in line for line in lines)
    assert any(line.startswith("video 1: ") and " at " in line for line in lines)


def test_stats_count(data, model, capsys):
    processor = qv.Processor.from_pretrained(model)
    stats = json.loads(run(capsys, "stats", data, "--model", model, "--json"))
    assert (stats["records"], stats["usable"], stats["images"], stats["videos"]) == (5, 2, 1, 1)
    samples = [
        processor.sample(
            json.loads(run(capsys, "inspect", data, "--index", i, "--model", model, "--json"))["conversation"]
        )
        for i in (0, 1)
    ]
    figures = stats["figures"]
    lengths = [len(sample.tokens) for sample in samples]
    assert figures["tokens"]["sum"] == sum(lengths) and figures["tokens"]["max"] == max(lengths)
    assert figures["tokens"]["median"] == np.mean(lengths) and figures["tokens"]["count"] == 2
    assert figures["learnt"]["sum"] == sum(sample.loss_weights.sum() for sample in samples)
    assert figures["duration"]["mean"] == pytest.approx(2) and figures["source_fps"]["mean"] == pytest.approx(12)
    assert figures["frames"]["sum"] == 6
    patches = {media.kind: len(media.patches) for media in samples[1].media}
    assert figures["video_patches"]["sum"] == patches["video"]
    assert figures["image_patches"]["sum"] == patches["image"]
    assert sorted(stats["failures"].values()) == [1, 2]
    (twice,) = (reason for reason, count in stats["failures"].items() if count == 2)
    assert "FILE does not exist" in twice and "gone" not in twice


def test_stats_of_videos_given_as_frames(model, tmp_path, capsys):
    """Their frames are counted; their seconds only where a record gives them; rates there are none."""
    for name in "ab":
        PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")

    def record(**given):
        video = {"type": "video", "video": ["a.png", "b.png", "a.png"], "timestamps": [0.0, 0.5, 2.5], **given}
        return {"messages": [{"role": "user", "content": [video]}, {"role": "assistant", "content": "it leaves"}]}

    data = write_records(tmp_path / "data.jsonl", [record(), record(duration=4.0)])
    stats = json.loads(run(capsys, "stats", data, "--model", model, "--json"))
    assert (stats["usable"], stats["videos"], stats["failures"]) == (2, 2, {})
    assert (stats["figures"]["frames"]["count"], stats["figures"]["frames"]["sum"]) == (2, 6)
    assert (stats["figures"]["duration"]["count"], stats["figures"]["duration"]["sum"]) == (1, 4.0)
    assert "source_fps" not in stats["figures"]

    frames = qv.VideoFrames(np.zeros((3, 64, 64, 3), np.uint8), [0.0, 0.5, 2.5], duration=4.0)
    held = measure(open_source([record(video=frames, timestamps=None)]), qv.Processor.from_pretrained(model))
    assert [held.values[name].tolist() for name in ("frames", "duration", "source_fps")] == [[3], [4], []]


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_stats_are_drawn(data, model, tmp_path, capsys, name):
    text = run(capsys, "stats", data, "--model", model, "--out", tmp_path / name)
    assert "5 records, 2 of them usable, with 1 images and 1 videos" in text and "cannot be used, since" in text
    if name.endswith("png"):
        assert np.asarray(PIL.Image.open(tmp_path / name).convert("RGB")).std() > 0
    else:
        assert "<svg" in (tmp_path / name).read_text()


def test_plots_show_what_there_is(tmp_path):
    """Frame rates side by side, whole numbers without gaps, a wide range by powers, bars for reasons."""
    values = {name: np.zeros(0) for name in FIGURES}
    values["tokens"] = np.arange(100, 400, dtype=np.float64)
    values["source_fps"] = np.asarray([24, 30000 / 1001, 30, 30], np.float64)
    values["duration"] = np.geomspace(0.5, 7200, 200)
    failures = [Failure(f"r{i}", f"a.jsonl:{i}: kind {'abcdefghijk'[i % 11]} failed") for i in range(22)]
    drawn = figure_of(Stats(322, values, tuple(failures)), "clips.jsonl")
    panels = {panel.get_title(): panel for panel in drawn.axes}
    assert set(FIGURES.values()) < set(panels)
    rates = panels[FIGURES["source_fps"]]
    assert [label.get_text() for label in rates.get_xticklabels()] == ["24", "29.97", "30"]
    assert [bar.get_height() for bar in rates.patches] == [1, 1, 2]
    heights = [bar.get_height() for bar in panels[FIGURES["tokens"]].patches]
    assert sum(heights) == 300 and len(set(heights[:-1])) == 1
    assert panels[FIGURES["duration"]].get_xscale() == "log"
    assert [text.get_text() for text in panels[FIGURES["frames"]].texts] == ["none"]
    (reasons,) = (panel for title, panel in panels.items() if title.startswith("why records cannot be used"))
    assert "(the most frequent; 3 more)" in reasons.get_title() and len(reasons.patches) == 8
    assert reasons.texts[0].get_text().strip() == "2  kind a failed"
    assert "median 249.50" in [text.get_text() for text in panels[FIGURES["tokens"]].get_legend().get_texts()]


def test_like_reasons_count_together():
    def reason(text):
        return kind_of(Failure("x", text))

    one = reason("/data/a.jsonl:7: message 0, part 0: video /clips/one.mp4 is truncated: 100 bytes; copy it again.")
    two = reason("b.jsonl:19: message 2, part 1: video other.mp4 is truncated: 2048 bytes; copy it again.")
    three = reason("/data/clips/1.0.0[7]: message 1, part 0: video v.mp4 is truncated: 7 bytes; copy it again.")
    four = reason("built[3], /data/a.jsonl:7: message 1, part 0: video v.mp4 is truncated: 7 bytes; copy it again.")
    assert one == two == three == four == "message N, part N: video FILE is truncated: N bytes; copy it again."


def test_presets_name_public_checkpoints():
    assert public_id("qwen2_vl_2b") == "Qwen/Qwen2-VL-2B-Instruct"
    assert public_id("qwen2_5_vl_72b") == "Qwen/Qwen2.5-VL-72B-Instruct"
    assert public_id("qwen3_vl_4b") == "Qwen/Qwen3-VL-4B-Instruct"
    assert public_id("qwen3_vl_235b_a22b") == "Qwen/Qwen3-VL-235B-A22B-Instruct"
    assert all(public_id(name).startswith("Qwen/Qwen") for name in PRESETS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "build"], ["SRC", "qwenvl-jax data build --help"]),
        (["data", "build", "a.jsonl"], ["DST", "qwenvl-jax data build --help"]),
        (["data", "build", "a.jsonl", "b", "--embed-media", "--reference-media"], ["not allowed with"]),
        (["data", "inspect", "DATA"], ["--model is not given", "Qwen/Qwen3-VL-4B-Instruct", "local folder"]),
        (["data", "inspect", "DATA", "--model", "MODEL", "--index", "5"], ["--index 5", "from 0 to 4"]),
        (["data", "inspect", "DATA", "--model", "MODEL", "--index", "4"], ["data.jsonl:5: ", "at least one message"]),
        (["data", "inspect", "DATA", "--model", "MODEL", "--index", "2"], ["data.jsonl:3: ", "gone-1.mp4"]),
        (["data", "inspect", "MODEL", "--model", "MODEL"], ["model", "is not a data set of `qwenvl-jax data build`"]),
        (["data", "stats", "none.jsonl", "--model", "MODEL"], ["none.jsonl cannot be read"]),
        (["data", "stats", "DATA", "--model", "MODEL", "--out", "plot.txt"], ["plot.txt", ".png"]),
        (["data", "stats", "DATA", "--model", "no-such"], ["no-such"]),
    ],
)
def test_mistakes_take_one_line(data, model, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([{"DATA": str(data), "MODEL": str(model)}.get(word, word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qwenvl-jax: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(tmp_path.rglob("*")) == before
