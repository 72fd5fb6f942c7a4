"""What the planned steps of a run hold, before one is taken: the work behind `qwenvl-jax data steps`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data.bar import Bar
from qwenvl_jax.data.packing import Plan
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sheet import check_picture
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.config import TrainConfig
from qwenvl_jax.train.config_file import prepared_config
from qwenvl_jax.train.curriculum import Stage, prepare_stages


@dataclasses.dataclass(frozen=True, eq=False)
class Outlook:
    """What the steps of a stage hold.

    Attributes:
      stage: with its plan.
      tokens: i64[n], tokens of each step.
      patches: i64[n, G], patches of each vision group.
      samples: i64[n, P], samples of each part of the mixture.
      part_tokens: i64[n, P], tokens of each part.
    """

    stage: Stage
    tokens: np.ndarray
    patches: np.ndarray
    samples: np.ndarray
    part_tokens: np.ndarray

    @property
    def token_fill(self) -> np.ndarray:
        """f64[n], share of the token slots of each step that hold a token."""
        shape = self.stage.loader.plan.shape
        return self.tokens / (shape.rows * shape.length)

    @property
    def patch_fill(self) -> np.ndarray:
        """f64[m], share of the patch slots that hold a patch, of each step that has any."""
        shape = self.stage.loader.plan.shape
        slots = shape.groups * sum(rows * length for rows, length in shape.buckets)
        of_steps = self.patches.sum(axis=1)
        return of_steps[of_steps > 0] / max(1, slots)

    def facts(self) -> dict[str, Any]:
        """The object that `--json` prints of a stage.

        Shares are means over the steps; balance is the mean over the steps with images or videos of what the groups
        have on average to what the fullest has.
        """
        plan = self.stage.loader.plan
        seen = self.patches[self.patches.any(axis=1)]
        counts, tokens = self.samples.sum(axis=0), self.part_tokens.sum(axis=0)
        return {
            "name": self.stage.config.name,
            "steps": len(self.tokens),
            "rows": plan.shape.rows,
            "length": plan.shape.length,
            "groups": plan.shape.groups,
            "vision": [list(bucket) for bucket in plan.shape.buckets],
            "tokens": float(self.token_fill.mean()),
            "patches": float(self.patch_fill.mean()) if len(seen) else None,
            "balance": float((seen.mean(axis=1) / seen.max(axis=1)).mean()) if len(seen) else None,
            "text_only_steps": len(self.patches) - len(seen),
            "samples": int(counts.sum()),
            "parts": [
                {
                    "name": part.name,
                    "samples": int(counts[n]),
                    "epochs": float(counts[n] / len(part.entries)),
                    "share_of_samples": float(counts[n] / counts.sum()),
                    "share_of_tokens": float(tokens[n] / tokens.sum()),
                }
                for n, part in enumerate(plan.parts)
            ],
        }


def look(stage: Stage, steps: int) -> Outlook:
    """Plans steps of a stage, its first ones.

    Args:
      steps: how many, at least 1.

    Raises:
      DataError: a mixture that comes to its end before.
    """
    plan = stage.loader.plan
    part_of = np.zeros(len(plan.facts), np.int64)
    for n, part in enumerate(plan.parts):
        part_of[part.entries] = n
    tokens_of = np.asarray([one.tokens for one in plan.facts], np.int64)
    patches_of = np.asarray([sum(one.frames) for one in plan.facts], np.int64)
    parts = len(plan.parts)
    tokens, patches, samples, part_tokens = [], [], [], []
    with Bar(f"planning {stage.config.name}", steps) as bar:
        for step in bar.over(range(steps)):
            rows = [np.asarray(row, np.int64) for row in plan[step]]
            entries = np.concatenate(rows)
            tokens.append(tokens_of[entries].sum())
            patches.append(_of_groups(plan, [patches_of[row].sum() for row in rows]))
            samples.append(np.bincount(part_of[entries], minlength=parts))
            part_tokens.append(np.bincount(part_of[entries], tokens_of[entries], parts).astype(np.int64))
    return Outlook(stage, np.asarray(tokens), np.asarray(patches), np.asarray(samples), np.asarray(part_tokens))


def _of_groups(plan: Plan, of_rows: Sequence[int]) -> np.ndarray:
    return np.asarray(of_rows).reshape(plan.shape.groups, -1).sum(axis=1)


def show(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    steps: int | None = None,
    as_json: bool = False,
    out: str | None = None,
) -> None:
    """Plans the steps of a config's stages and prints what they hold.

    Args:
      config_path, overrides, model: see `qwenvl_jax.train.config_file.prepared_config`.
      steps: of each stage; all without.
      out: file to draw the steps into.

    Raises:
      QwenVLError: what is wrong with the config, its data or a setting.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps} must be at least 1.")
    if out is not None:
        check_picture(out)
    config = prepared_config(config_path, overrides, model)
    seen = [look(stage, min(steps or stage.config.steps, stage.config.steps)) for stage in _stages(config)]
    if out is not None:
        draw(seen, out)
    if as_json:
        print(json.dumps({"stages": [one.facts() for one in seen]}, indent=2))
    else:
        print("\n\n".join(table(one) for one in seen))


def _stages(config: TrainConfig) -> tuple[Stage, ...]:
    origin = config.processor or config.init or config.model
    if not isinstance(origin, str | Path):
        raise ConfigError("processor is empty; give the folder of a tokenizer and preprocessor settings.")
    # What is said of the stages stands in the table too.
    return prepare_stages(config, Processor.from_pretrained(origin), lambda line: None)


def table(seen: Outlook) -> str:
    """What the steps of a stage hold, for reading."""
    facts = seen.facts()
    lines = [
        f"{facts['name']}: {facts['steps']:,} steps of {facts['rows']} rows of {facts['length']:,} tokens",
        f"  token slots that hold a token  {facts['tokens']:>6.1%}   at least {seen.token_fill.min():.1%} in one",
    ]
    if facts["vision"]:
        rows = ", ".join(f"{count} of {length:,} patches" for count, length in facts["vision"])
        lines.append(f"  vision rows in each of {facts['groups']} groups: {rows}")
    if facts["patches"] is not None:
        lines += [
            f"  patch slots that hold a patch  {facts['patches']:>6.1%}   at least {seen.patch_fill.min():.1%} in one",
            f"  mean group to fullest group    {facts['balance']:>6.1%}",
        ]
    if facts["vision"]:
        lines.append(f"  steps of text alone            {facts['text_only_steps']:>6,}   not counted among the patches")
    lines.append(f"  {'part':<24}{'samples':>10}{'epochs':>9}{'of samples':>12}{'of tokens':>11}")
    for part in facts["parts"]:
        lines.append(
            f"  {part['name'] or 'data':<24}{part['samples']:>10,}{part['epochs']:>9.2f}"
            f"{part['share_of_samples']:>12.1%}{part['share_of_tokens']:>11.1%}"
        )
    return "\n".join(lines)


def draw(seen: Sequence[Outlook], out: str) -> None:
    """Draws, for each stage, what its steps fill and which part their tokens are of.

    Args:
      out: the file; its ending says in which format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(seen)), layout="constrained")
    axes = figure.subplots(len(seen), 2, squeeze=False)
    for (left, right), one in zip(axes, seen, strict=True):
        name, steps = one.stage.config.name, np.arange(1, len(one.tokens) + 1)
        left.plot(steps, one.token_fill, lw=0.9, label="tokens / token slots")
        with_vision = one.patches.any(axis=1)
        if with_vision.any():
            left.plot(steps[with_vision], one.patch_fill, lw=0.9, label="patches / patch slots")
        left.axhline(0.9, color="0.6", lw=0.8, ls="--")
        left.set(title=f"{name}: what steps fill", xlabel="step", ylim=(0, 1.03))
        left.legend(loc="lower right", frameon=False)
        shares = one.part_tokens / one.part_tokens.sum(axis=1, keepdims=True)
        width = max(1, len(steps) // 50)  # so that single steps do not hide the course
        smooth = np.stack([np.convolve(share, np.ones(width) / width, "valid") for share in shares.T])
        names = [part.name or "data" for part in one.stage.loader.plan.parts]
        right.stackplot(steps[width - 1 :], smooth, labels=names)
        right.set(title=f"{name}: whose tokens", xlabel="step", ylim=(0, 1))
        right.legend(loc="lower right")
    figure.savefig(out, dpi=110)
