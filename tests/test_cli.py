"""The command line: what it offers, what it passes on, and how it ends."""

import errno
import subprocess
import sys

import pytest

import qwenvl_jax
from qwenvl_jax import cli
from qwenvl_jax.demo import run
from qwenvl_jax.errors import DataError, StoreError
from qwenvl_jax.train import loop

COMMANDS = ("demo", "assemble", "train", "plan", "info", "convert", "export", "chat", "data")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qwenvl-jax {qwenvl_jax.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"qwenvl-jax {command} " in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chta"], ["'chta'", "did you mean 'chat'"]),
        (["xyzzy"], ["'xyzzy'", "demo, assemble, train, plan, info, convert, export, chat, data"]),
        (["--versoin"], ["qwenvl-jax --help"]),
        (["chat", "model"], ["QUESTION", "qwenvl-jax chat --help"]),
        (["chat", "model", "question", "--vidoe", "a.mp4"], ["'--vidoe'", "did you mean '--video'"]),
        (["chat", "model", "question", "--seed", "many"], ["--seed", "'many'"]),
        (["chat", "model", "question", "--dtype", "float8"], ["--dtype", "'float8'", "bfloat16"]),
        (["chat", "model", "question", "--max", "8"], ["'--max'"]),
        (["train"], ["CONFIG", "qwenvl-jax train --help"]),
        (["train", "no/such.py"], ["no/such.py", "configs/"]),
    ],
)
def test_mistakes_take_one_line(arguments, words, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qwenvl-jax: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def _run_with(monkeypatch, error):
    """The exit status when a command ends with this exception."""

    def work(*_arguments, **_options):
        raise error

    monkeypatch.setattr(loop, "train_command", work)
    return cli.main(["train", "config.py"])


def test_an_error_of_several_lines_is_told_in_one(monkeypatch, capsys):
    assert _run_with(monkeypatch, DataError("a.jsonl:3\n  is no record;\n  mend it.")) == 2
    assert capsys.readouterr().err == "qwenvl-jax: error: a.jsonl:3 is no record; mend it.\n"


def test_interrupted(monkeypatch, capsys):
    assert _run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "qwenvl-jax: interrupted\n"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written(monkeypatch, capsys, code):
    assert _run_with(monkeypatch, OSError(code, "refused", "runs/here")) == 2
    err = capsys.readouterr().err
    assert err.startswith("qwenvl-jax: error: runs/here: refused;") and err.count("\n") == 1


def test_a_bucket_that_fails_is_no_mistake(monkeypatch, capsys):
    """Launchers start such a run again, and none that ended with status 2."""
    assert _run_with(monkeypatch, StoreError("the bucket is\nbusy")) == 1
    assert capsys.readouterr().err == "qwenvl-jax: error: the bucket is busy\n"


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(errno.EBADF, "a defect")])
def test_a_defect_shows_its_traceback(monkeypatch, error):
    with pytest.raises(type(error), match="a defect"):
        _run_with(monkeypatch, error)


def test_train_passes_on_what_it_is_given(monkeypatch, capsys):
    seen = {}

    def work(config, overrides, *, model, out, profile):
        seen.update(config=config, overrides=overrides, model=model, out=out, profile=profile)
        return loop.RunResult(out, 3, 3, "the/model")

    monkeypatch.setattr(loop, "train_command", work)
    arguments = [
        "train",
        "c.py",
        "--seed",
        "3",
        "--out",
        "runs/x",
        "--stages.s1.steps=20",
        "--model",
        "qwen3_vl_2b",
        "--b",
        "1",
        "-2",
        "--profile",
        "3-5",
    ]
    assert cli.main(arguments) == 0
    assert seen == {
        "config": "c.py",
        "overrides": ["--seed", "3", "--stages.s1.steps=20", "--b", "1", "-2"],
        "model": "qwen3_vl_2b",
        "out": "runs/x",
        "profile": "3-5",
    }
    assert "the/model" in capsys.readouterr().out


def test_a_training_run_that_was_stopped_says_so_in_its_status(monkeypatch):
    monkeypatch.setattr(loop, "train_command", lambda *_, **__: loop.RunResult("runs/x", 2, 3, None))
    assert cli.main(["train", "c.py"]) == 130


def test_demo_passes_on_what_it_is_given(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "demo", lambda *arguments, **options: seen.append((arguments, options)) or 1)
    assert cli.main(["demo"]) == 1
    assert cli.main(["demo", "--full", "--seed", "3", "--out", "runs/x"]) == 1
    assert seen == [(("runs/demo",), {"full": False, "seed": 0}), (("runs/x",), {"full": True, "seed": 3})]


def test_chat_answers_about_a_video_and_images(tiny_checkpoint, clip, tmp_path, capsys):
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("RGB", (70, 50), "red").save(image)
    arguments = ["chat", str(tiny_checkpoint), "--image", str(image), "--video", str(clip), "What is there?"]
    arguments += ["--max-new-tokens", "4", "--dtype", "float32"]
    assert cli.main(arguments) == 0
    greedy = capsys.readouterr().out
    assert greedy.endswith("\n")
    assert cli.main([*arguments, "--temperature", "5", "--seed", "1"]) == 0
    drawn = capsys.readouterr().out
    assert drawn != greedy
    assert cli.main([*arguments, "--temperature", "5", "--seed", "1", "--top-k", "1"]) == 0
    assert capsys.readouterr().out == greedy


@pytest.mark.parametrize("start", [[sys.executable, "-m", "qwenvl_jax"]])
def test_as_a_process(start, tmp_path):
    result = subprocess.run([*start, "chat", str(tmp_path / "none"), "Hello?"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("qwenvl-jax: error: ") and result.stderr.count("\n") == 1


def test_output_that_nobody_reads(tmp_path):
    """As in `qwenvl-jax --help | true`: no traceback."""
    code = "import sys, qwenvl_jax.cli as cli\n"
    code += "cli._dispatch = lambda _: [print('x' * 100_000) for _ in range(20)] and 0\nsys.exit(cli.main([]))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 1)
