"""What the README shows works, and what it lists is what there is."""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from qwenvl_jax import cli

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/own-data.md")
PAGES = {Path(name).name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def _tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def test_python_example(tiny_checkpoint, clip, tmp_path, monkeypatch, capsys):
    """The example as it stands, in a folder where its names mean a tiny model and a short clip."""
    (example,) = _blocks(README, "python")
    name = re.search(r'from_pretrained\("([^"]+)"\)', example)[1]
    shutil.copytree(tiny_checkpoint, tmp_path / name)
    shutil.copy(clip, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    (answer,) = names["answers"]
    assert capsys.readouterr().out == answer.text + "\n"
    rows, tokens, vocabulary = names["logits"].shape
    assert (rows, tokens, vocabulary) == (1, names["batch"].tokens.shape[1], names["model"].config.text.vocab_size)
    assert {"config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "my-model").iterdir()}


def test_command_table():
    listed = re.findall(r"^\| `qwenvl-jax (\w+)", README, re.MULTILINE)
    assert list(dict.fromkeys(listed)) == list(cli._parsers()[1])


def test_file_tree():
    """Every file and folder of the tree exists, and none at its two levels is left out."""
    (tree,) = _blocks(README, "text")
    listed, parent = set(), ""
    for line in tree.splitlines():
        indent, name, told = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()
        assert told
        listed.add(parent + name if indent else name)
        parent = parent if indent else name
    files = {file for file in _tracked() if (ROOT / file).exists()}
    top = {file.partition("/")[0] + ("/" if "/" in file else "") for file in files}
    inside = {"/".join(file.split("/")[:2]) + ("/" if file.count("/") > 1 else "") for file in files}
    inside = {file for file in inside if file.startswith("qwenvl_jax/")}
    unlisted = {".gitignore", "LICENSE", "README.md", "qwenvl_jax/__init__.py", "qwenvl_jax/py.typed"}
    assert listed == (top | inside) - unlisted


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets(page):
    folder = ROOT / "docs" if page in ("guide.md", "own-data.md") else ROOT
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (folder / target).exists(), target
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in _blocks(PAGES[page], "bash") for line in block.splitlines()]
    named = re.findall(r"`make (\w+)`", PAGES[page]) + [m[1] for line in lines if (m := re.match(r"make (\w+)", line))]
    for target in named:
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch):
    """Every `qwenvl-jax` line in a shell block names a command and options that exist."""
    seen = []
    for command in cli._parsers()[1]:
        monkeypatch.setattr(cli, f"_{command}", lambda options: seen.append(options) or 0)
    lines = [line for block in _blocks(PAGES[page], "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qwenvl-jax ")]
    for command in commands:
        assert cli.main(command) == 0
    assert len(seen) == len(commands)


@pytest.fixture
def guide_commands(tiny_checkpoint, clip, tmp_path, monkeypatch):
    """The guide's training commands by their output, in a folder with its record and config, where its names exist."""
    guide = PAGES["guide.md"]
    (record,), (config,) = _blocks(guide, "json"), _blocks(guide, "python")
    shutil.copytree(tiny_checkpoint, tmp_path / re.search(r'model="([^"]+)"', config)[1])
    shutil.copy(clip, tmp_path / "clip.mp4")
    (tmp_path / "clips.jsonl").write_text(record)
    (tmp_path / "clips.py").write_text(config)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in _blocks(guide, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return {found[1]: shlex.split(line)[1:] for line in lines if (found := re.search(r"train .*--out (\S+)", line))}


@pytest.mark.slow
def test_guide_trains(guide_commands, tmp_path, run_ffmpeg, optax_promotes):
    """The guide's record, config and small command, as they stand, on a video as cameras make them."""
    source = "testsrc=size=1280x720:rate=10:duration=10"
    run_ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-preset", "ultrafast", tmp_path / "clip.mp4")
    assert cli.main(guide_commands["runs/try"]) == 0
    assert len((tmp_path / "runs/try/metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "runs/try/model/config.json").is_file()


@pytest.mark.slow
def test_guide_trains_adapters(guide_commands, tmp_path, optax_promotes):
    """Its commands for LoRA and QLoRA, at the size of the small one; and what they wrote is loaded as it says."""
    small = guide_commands["runs/try"][4:]
    for out, more in (("runs/lora", []), ("runs/qlora", ["--adapter.tile_size", "4"])):
        assert cli.main([*guide_commands[out], *small, *more]) == 0
        assert (tmp_path / out / "adapter/adapter_config.json").is_file()
        assert (tmp_path / out / "model/config.json").is_file()
    (example,) = (block for block in _blocks(PAGES["guide.md"], "text") if "adapter=" in block)
    names = {"qv": importlib.import_module("qwenvl_jax")}
    exec(compile(example, "guide.md", "exec"), names)
    assert names["model"].config.model_type == "qwen3_vl"
