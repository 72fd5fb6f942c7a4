"""`qwenvl-jax demo`: from video files to a trained model, an answer, an export and a report, on this machine.

    1 clips      real MP4 files: for training, for the held-out loss, and for questions
    2 training   a tiny model from nothing, through a text warm-up and S0 to S3
    3 questions  to the model that ships with the package (made by `demo --full`), to the fresh one, and to chance
    4 export     to the public format and back: the same answers
    5 report     report.html, and figures.json with the same figures

Run again in the same folder, it goes on where it was.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import rich.console
import rich.progress
from flax import nnx

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.demo import curriculum, evaluate, heldout, report, weights_card
from qwenvl_jax.demo.clips import Clip, describe_clip, make_clips
from qwenvl_jax.demo.records import answer, sight
from qwenvl_jax.demo.verdict import figures_table, figures_wanted
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics

SHIPPED = pathlib.Path(__file__).parent / "model"
# The questions are always about the same clips; training never uses this seed, nor the evaluation's pairs.
EVALUATION_SEED = 20_000_003
QUESTIONS, VALIDATION_CLIPS = 100, 40
# Without pixels an answer is right by chance, and five of a hundred mean little. More questions need no files.
BLANK_QUESTIONS = 500
DONE, MISSED, STOPPED = 0, 1, 130

ClipFiles = Sequence[tuple[pathlib.Path, Clip]]


def demo(out: str | os.PathLike = "runs/demo", *, full: bool = False, seed: int = 0) -> int:
    """Runs the demo.

    Args:
      out: its folder; made if missing, continued if the demo ran there before.
      full: train until the model answers as well as the one that ships (34 to 75 minutes on two cores), and judge
        that model.
      seed: of the training clips and of training, from 0 to 2**32 - 1.

    Returns:
      The exit status: 0 if every figure was reached, 1 if one was missed (and said which), 130 if stopped.

    Raises:
      QwenVLError: a seed that does not exist, a folder that cannot be used, or the shipped model is missing or damaged.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} must be from 0 to {2**32 - 1}.")
    if not full and not (SHIPPED / "config.json").is_file():
        raise CheckpointError(f"{SHIPPED} holds no model; make one with `qwenvl-jax demo --full`, or reinstall.")
    return _Demo(pathlib.Path(out), full, seed).go()


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What the questions showed.

    Attributes:
      answers: of the model that is judged.
      rows: the table.
      figures, blanked, chance: of that model, of the same with the pixels blanked, of whoever does not look.
    """

    answers: list[evaluate.Answered]
    rows: list[report.Row]
    figures: evaluate.Figures
    blanked: evaluate.Figures
    chance: evaluate.Figures


class _Demo:
    """One run; each method is a step of it."""

    def __init__(self, out: pathlib.Path, full: bool, seed: int):
        self.out, self.full, self.seed = out, full, seed
        # Lines are not broken where they go to a file.
        width = None if sys.stdout.isatty() else 200
        self.console = rich.console.Console(highlight=False, width=width)
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    def go(self) -> int:
        self.title(1, "clips: real MP4 files")
        clips = self.make_clips()
        self.title(2, "training from nothing: a text warm-up, then S0 to S3")
        trained, stages = self.train(clips)
        if trained is None:
            return STOPPED
        self.title(3, f"{QUESTIONS} questions about clips that no model has seen")
        judged = trained if self.full else SHIPPED
        outcome = self.ask(judged, trained, clips)
        self.title(4, "export to the public format, load it, ask again")
        same = self.export(judged, outcome.answers)
        self.title(5, "report")
        checks = figures_wanted(outcome.figures, outcome.blanked, outcome.chance, stages, same)
        page = self.write_page(judged, outcome, stages, checks)
        return self.close(checks, page)

    def make_clips(self) -> dict[str, ClipFiles]:
        """Step 1: the clips of each split."""
        sizes = {
            "train": (curriculum.train_clips(self.full), self.seed),
            "validation": (VALIDATION_CLIPS, self.seed),
            "evaluation": (QUESTIONS, EVALUATION_SEED),
        }
        with self.timed("clips"):
            return {
                split: make_clips(self.out / "clips", split, count, seed, progress=self.bar(f"{split} clips", count))
                for split, (count, seed) in sizes.items()
            }

    def train(self, clips: dict[str, ClipFiles]) -> tuple[pathlib.Path | None, list[report.StageCurve]]:
        """Step 2: trains; then the loss on held-out clips between the stages. (Folder of the model, curves.)"""
        config, run = curriculum.prepare(self.out, clips["train"], full=self.full, seed=self.seed), self.out / "train"
        with self.timed("training"):
            result = train(config, run)
        if result.model is None:
            return None, []
        if self.full:
            weights_card.write(result.model, seed=self.seed, full=True)
        with self.timed("held-out loss"):
            batch = heldout.held_out_batch(Processor.from_pretrained(result.model), clips["validation"])
            losses = [heldout.held_out_loss(model, batch) for model in heldout.models_between_stages(config, run)]
        lines, curves = read_metrics(run / "metrics.jsonl"), []
        for stage, around in zip(config.stages, itertools.pairwise(losses), strict=True):
            mine = [line for line in lines if line["stage"] == stage.name]
            steps, values = [line["step"] for line in mine], [line["loss"] for line in mine]
            curves.append(report.StageCurve(stage.name, curriculum.ABOUT[stage.name], steps, values, around))
            self.console.print(f"{stage.name}: loss on held-out clips {around[0]:.3f} -> {around[1]:.3f}")
        return result.model, curves

    def ask(self, judged: pathlib.Path, trained: pathlib.Path, clips: dict[str, ClipFiles]) -> _Outcome:
        """Step 3: asks the judged model, the fresh one, and, more questions, the first with the pixels blanked."""
        asked = evaluate.questions(clips["evaluation"])
        scenes = [describe_clip(EVALUATION_SEED, i, "evaluation") for i in range(BLANK_QUESTIONS)]
        unseen = evaluate.questions([(pathlib.Path(scene.file_name), scene) for scene in scenes])
        name = "model trained by this run" if self.full else "shipped model"
        with self.timed("questions"):
            answers = self.answers(judged, asked, name)
            figures = evaluate.judge(answers)
            blanked = evaluate.judge(self.answers(judged, unseen, "pixels blanked", blank=True))
            rows = [report.Row(name, figures)]
            if not self.full:
                fresh = evaluate.judge(self.answers(trained, asked, "fresh model"))
                rows.append(report.Row("fresh model, trained just now", fresh))
        chance = evaluate.fit_blind([clip for _, clip in clips["train"]]).figures(unseen)
        seen = [evaluate.Answered(q, answer(q.truth.name, *sight(q.clip).span(q.event))) for q in asked]
        rows.append(report.Row(f"{name}, pixels blanked, {len(unseen)} questions", blanked, "blank"))
        rows.append(report.Row("chance: best answer to these without looking", chance, "blind"))
        rows.append(report.Row("ceiling: all that the sampled frames show", evaluate.judge(seen), "blind"))
        self.console.print(figures_table(rows))
        return _Outcome(answers, rows, figures, blanked, chance)

    def answers(self, folder: pathlib.Path, asked, label: str, blank: bool = False) -> list[evaluate.Answered]:
        """Answers of the model in a folder."""
        model, processor = QwenVL.from_pretrained(folder, dtype="float32"), Processor.from_pretrained(folder)
        return evaluate.answer_all(model, processor, asked, blank=blank, progress=self.bar(label))

    def export(self, judged: pathlib.Path, answers: list[evaluate.Answered]) -> int:
        """Step 4: writes the judged model anew, loads that, and counts the questions that it answers the same."""
        target = self.out / "export"
        with self.timed("export"):
            QwenVL.from_pretrained(judged, dtype="float32").save_pretrained(target)
            Processor.from_pretrained(judged).save_pretrained(target)
            again = self.answers(target, [a.question for a in answers], "exported model")
        same = sum(a.text == b.text for a, b in zip(answers, again, strict=True))
        self.console.print(f"{target}: {same} of {len(answers)} answers are the same")
        return same

    def write_page(self, judged: pathlib.Path, outcome: _Outcome, stages, checks) -> pathlib.Path:
        """Step 5: writes report.html and figures.json."""
        processor = Processor.from_pretrained(judged)
        right = [a for a in outcome.answers if a.right]
        wrong = [a for a in outcome.answers if not a.right]
        cases = [
            (heading, [report.case_picture(processor, a) for a in some[:5]])
            for heading, some in ((f"Right ({len(right)})", right), (f"Wrong ({len(wrong)})", wrong))
        ]
        headline = (
            "A tiny Qwen3-VL says when an object appears in a video. It learnt that from nothing, on real MP4 files, "
            "and is asked about clips, and about pairs of colour and shape, that it never saw."
        )
        facts = self.facts(judged)
        values = {
            "figures": {row.name: dataclasses.asdict(row.figures) for row in outcome.rows},
            "held_out_loss": {stage.name: stage.held_out for stage in stages},
            "checks": [dataclasses.asdict(check) for check in checks],
            "made": dict(facts),
        }
        (self.out / "figures.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        page = report.Report(headline, checks, outcome.rows, stages, cases, facts)
        return report.write_report(page, self.out / "report.html")

    def facts(self, judged: pathlib.Path) -> list[tuple[str, str]]:
        """How it was made, name and value."""
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        model = QwenVL.from_pretrained(judged, dtype="float32")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        return [
            ("command", weights_card.command(self.full, self.seed)),
            ("model", f"{parameters / 1e6:.2f} million parameters"),
            *((f"weights: {name}", value) for name, value in weights_card.read(judged).items()),
            ("time", f"{(time.monotonic() - self.began) / 60:.1f} minutes ({spent})"),
            ("memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB at most"),
            ("machine", f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}"),
            ("versions", weights_card.versions()),
        ]

    def close(self, checks: Sequence[report.Check], page: pathlib.Path) -> int:
        """Says what was reached and what was missed."""
        missed = [check for check in checks if not check.met]
        for check in checks:
            mark = "[green]reached[/]" if check.met else "[red]missed[/] "
            self.console.print(f"{mark}  {check.what}: {check.came} (wanted: {check.wanted})")
        minutes = (time.monotonic() - self.began) / 60
        self.console.print(f"{page} written; {minutes:.1f} minutes in all")
        if missed:
            self.console.print(
                f"[red]{len(missed)} of {len(checks)} figures missed[/]: {', '.join(c.what for c in missed)}"
            )
        return MISSED if missed else DONE

    def title(self, number: int, text: str) -> None:
        self.console.print(f"\n[bold]{number}/5  {text}[/]")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def bar(self, label: str, total: int | None = None) -> Callable[[Iterable], Iterable]:
        """Wraps an iterable so that a bar shows how far it is; nothing is shown where nobody watches."""
        if not self.console.is_terminal:
            return iter
        return functools.partial(
            rich.progress.track, description=f"{label:<18}", total=total, console=self.console, transient=True
        )
