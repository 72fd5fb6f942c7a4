"""TensorBoard and Weights & Biases get what the run's files get, each step once, however often a run is stopped."""

import importlib.util
import json
import struct
from collections import Counter

import pytest
from tensorboardX.proto import event_pb2

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.tracking import Trackers, check_trackers, numbers_of


def metrics(step: int, loss: float | None = None) -> dict:
    return {
        "step": step,
        "loss": step / 4 if loss is None else loss,
        "batch": "ab12",
        "stage": "s0",
        "loss_by_data": {"captions": 1.5},
        "experts": [0.5, 1.5],
    }


def timing(step: int) -> dict:
    return {"step": step, "seconds": 0.5}


def validation(step: int) -> dict:
    answer = {"data": "clips", "id": "r1", "question": "when?", "answer": f"at {step}", "truth": "at 3 s"}
    return {"step": step, "stage": "s0", "losses": {"clips": step / 8}, "answers": [answer]}


def add(path, *lines: dict) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def events(folder) -> list:
    """All events of a folder, read by the format's description, in the order of the files."""
    found = []
    for path in sorted(folder.glob("*tfevents*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    return [
        (event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_names_of_figures():
    assert numbers_of(metrics(1) | timing(1)) == {
        "loss": 0.25,
        "loss_by_data/captions": 1.5,
        "experts/0": 0.5,
        "experts/1": 1.5,
        "seconds": 0.5,
    }
    assert numbers_of({"step": 3, "loss": None, "skipped": 2}) == {"skipped": 2.0}
    assert numbers_of(validation(8), "validation") == {"validation/losses/clips": 1.0}


def test_tensorboard_is_level_with_the_files(tmp_path):
    """Stopped after step 5 with a checkpoint of step 3: steps 4 and 5 come again; 1 was before it was asked for."""
    add(tmp_path / "metrics.jsonl", metrics(1))
    add(tmp_path / "timings.jsonl", timing(1))
    trackers = Trackers(["tensorboard"], tmp_path, 1, {})
    for step in range(2, 6):
        trackers.write("metrics", metrics(step) | timing(step))
        if step in (2, 4):
            trackers.write("validation", validation(step))
    trackers.close()
    folder = tmp_path / "tensorboard"
    # A crash left half a record.
    (first,) = folder.iterdir()
    with first.open("ab") as file:
        file.write(struct.pack("<QI", 100, 0) + b"half")

    # What a checkpoint holds and the tracker does not, as when it was not yet on disk.
    for step in (2, 3):
        add(tmp_path / "metrics.jsonl", metrics(step))
    add(tmp_path / "validation.jsonl", validation(2))
    trackers = Trackers(["tensorboard"], tmp_path, 3, {})
    for step in range(4, 7):
        trackers.write("metrics", metrics(step, loss=100.0 + step) | timing(step))
    trackers.write("validation", validation(6))
    trackers.close()
    assert scalars(folder, "loss") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 104.0), (5, 105.0), (6, 106.0)]
    assert [step for step, _ in scalars(folder, "seconds")] == [1, 2, 3, 4, 5, 6]
    assert scalars(folder, "loss_by_data/captions") == [(step, 1.5) for step in range(1, 7)]
    assert scalars(folder, "validation/losses/clips") == [(2, 0.25), (6, 0.75)]
    texts = [
        (event.step, value.tensor.string_val[0].decode())
        for event in events(folder)
        for value in event.summary.value
        if value.tag == "validation/clips/r1/text_summary"
    ]
    assert [step for step, _ in texts] == [2, 6]
    assert "at 6" in texts[1][1] and "when?" in texts[1][1] and "at 3 s" in texts[1][1]
    # An open TensorBoard is told from where it starts anew.
    assert [e.step for e in events(folder) if e.session_log.status == event_pb2.SessionLog.START] == [2, 4]


def test_tensorboard_catches_up_with_lines_that_it_lost(tmp_path):
    add(tmp_path / "metrics.jsonl", *(metrics(step) for step in range(1, 5)))
    add(tmp_path / "validation.jsonl", validation(2))
    Trackers(["tensorboard"], tmp_path, 4, {}).close()
    Trackers(["tensorboard"], tmp_path, 4, {}).close()
    folder = tmp_path / "tensorboard"
    assert Counter(step for step, _ in scalars(folder, "loss")) == Counter(range(1, 5))
    assert scalars(folder, "validation/losses/clips") == [(2, 0.25)]


@pytest.mark.slow
def test_weights_and_biases(tmp_path, monkeypatch):
    """Its own client, writing to disk: a second process goes on with the run's name and sends no step again."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    begun: list[dict] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(given) or init(**given))
    trackers = Trackers(["wandb"], tmp_path, 0, {"seed": "0"}, "of a bucket")
    for step in range(1, 4):
        trackers.write("metrics", metrics(step) | timing(step))
    judged = validation(3)
    judged["answers"][0]["answer"] = "<script>at 3 & more</script>"
    trackers.write("validation", judged)
    trackers.close()
    assert begun[0]["name"] == "of a bucket"
    # What a model says is shown, not run.
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/**/*.html")
    assert "&lt;script&gt;at 3 &amp; more&lt;/script&gt;" in page.read_text() and "<script>" not in page.read_text()
    add(tmp_path / "metrics.jsonl", metrics(1), metrics(2))
    trackers = Trackers(["wandb"], tmp_path, 2, {"seed": "0"})
    for step in range(3, 6):
        trackers.write("metrics", metrics(step) | timing(step))
    trackers.close()

    sent = [read_wandb(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert [[row["_step"] for row in rows if "loss" in row] for rows in sent] == [[1, 2, 3], [4, 5]]
    assert [row["loss"] for rows in sent for row in rows if "loss" in row] == [step / 4 for step in range(1, 6)]
    assert sent[0][-1]["validation/losses/clips"] == 3 / 8
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1


def read_wandb(path) -> list[dict]:
    """The rows of the history in a file of the client: a LevelDB log after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record, or the end of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_trackers_that_cannot_be(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="must name trackers out of tensorboard, wandb; got 'mlflow'"):
        check_trackers(("mlflow",))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    check_trackers(("tensorboard",))
    with pytest.raises(ConfigError, match=r"pip install 'qwenvl_jax\[wandb\]'"):
        Trackers(("wandb",), tmp_path, 0, {})
