"""The report of a run: one file, with what the run's files hold."""

import json
import re

import numpy as np
import pytest

from qwenvl_jax.train.report import write_report

STEPS, BEGIN = 2000, 801  # the second stage begins here


def write_run(out, *, bare: bool = False):
    """The files of a run of two stages; `bare` has what a run always has, in three steps."""
    rng = np.random.default_rng(0)
    steps = range(1, 4 if bare else STEPS + 1)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"seed": "0", "stages.0.name": "'<s0>'"}))
    with (out / "metrics.jsonl").open("w") as metrics, (out / "timings.jsonl").open("w") as timings:
        for step in steps:
            loss = 4 * np.exp(-step / 700) + 0.8 + 0.15 * rng.random()
            line = {"step": step, "loss": None if step == 1200 else loss, "tokens": 8000, "batch": "ab", "stage": "s1"}
            line |= {"learning_rate": 1e-3 * min(1, step / 100), "grad_norm": float(1 + rng.random())}
            timing = {"step": step, "seconds": 0.5, "wait": 0.02 * rng.random()}
            if not bare:
                line["stage"] = "s0" if step < BEGIN else "s1"
                line["loss_by_data"] = {"captions": loss - 0.2, "clips": loss + 0.3} if step % 3 else {"clips": loss}
                line["loss_by_modality"] = {"image": loss - 0.2, "video": loss + 0.3}
                line |= {"router_balance": 1.1, "router_z": 0.2, "experts": [0.5, 1.5, 1.0]}
                line |= {"skipped": 1} if step == 1200 else {}
                timing |= {"tokens_per_second": 16000 + 900 * rng.random(), "vision_tokens_per_second": 9000.0}
                timing |= {"mfu": 0.41, "memory_bytes": 60 << 30, "peak_memory_bytes": 72 << 30, "goodput": 0.92}
            metrics.write(json.dumps(line) + "\n")
            timings.write(json.dumps(timing) + "\n")
    if not bare:
        lines = [
            {
                "step": step,
                "stage": "s0" if step < BEGIN else "s1",
                "losses": {"held clips": 4 * np.exp(-step / 700) + 1, "held words": None},
                "answers": [
                    {"data": "held clips", "id": f"r{i}", "question": f"when does circle {i} <leave>?",
                     "answer": f"at {step / 1000 + i} s", "truth": f"at {i} s"}
                    for i in range(2)
                ],
            }
            for step in (*range(200, BEGIN, 200), *range(1000, STEPS + 1, 200))
        ]  # fmt: skip
        (out / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "my run")).read_text()


def test_everything_is_there(page):
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings == [
        "loss",
        "validation loss",
        "loss by data set",
        "loss by modality",
        "learning rate",
        "gradient norm",
        "router&#39;s losses",
        "load of the experts, 1 where balanced",
        "tokens a second",
        "MFU",
        "share of a step&#39;s time spent waiting for data",
        "memory of the fullest device, GiB",
        "goodput",
        "held clips, stage s0",
        "held clips, stage s1",
    ]
    assert page.count("<svg") == 13
    assert "2,000 steps: s0 from step 1, s1 from step 801. The guard left out 1 of them." in page
    for figure in ("16,000,000", "16,000", "41.0%", "92.0%"):
        assert f"<b>{figure}</b>" in page
    # Four of the seven times of the second stage, the first and the last among them; the truth below.
    rows = re.search(r"held clips, stage s1.*?</table>", page, re.S)[0]
    assert re.findall(r'class="step">([\d,]+|truth)<', rows)[:5] == ["1,000", "1,400", "1,600", "2,000", "truth"]
    assert re.findall(r"<td>(at .*?)</td>", rows)[:5] == ["at 1.0 s", "at 1.4 s", "at 1.6 s", "at 2.0 s", "at 0 s"]


def test_nothing_is_outside_and_nothing_breaks_out(page):
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:)", page)
    assert "<leave>" not in page and "&lt;leave&gt;" in page
    assert "'<s0>'" not in page
    # Long runs are drawn by their means: each curve has at most so many points.
    assert max(len(path.split()) for path in re.findall(r'd="(M [^"]*)"', page)) < 4000


def test_a_run_of_one_step_shows_it(tmp_path):
    """No line goes through one point: it has a mark."""
    out = write_run(tmp_path / "one", bare=True)
    for name in ("metrics.jsonl", "timings.jsonl"):
        (out / name).write_text((out / name).read_text().splitlines(keepends=True)[0])
    page = write_report(out).read_text()
    marks = re.findall(r'<use [^>]*style="fill: ', page)
    assert len(marks) == len(re.findall(r"<h3>", page)) == 4


def test_a_run_with_nothing_special(tmp_path):
    """Three steps, no validation, no mixture: no empty plots."""
    out = write_run(tmp_path / "runs" / "bare", bare=True)
    page = write_report(out).read_text()
    assert re.findall(r"<h3>(.*?)</h3>", page) == [
        "loss",
        "learning rate",
        "gradient norm",
        "share of a step&#39;s time spent waiting for data",
    ]
    assert "Answers" not in page and ">nan" not in page
    assert write_report(out).read_text() == page
    assert "<title>bare</title>" in page
    # A run in a bucket is written in a folder of another name.
    assert "<title>mine</title>" in write_report(out, "mine").read_text()
