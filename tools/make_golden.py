"""Freezes the reference's answers for tests/golden/.

    .venv/bin/python -m tools.make_golden                   # every generation; what `make test` installs is needed
    .venv/bin/python -m tools.make_golden qwen3_vl          # one

Writes tests/golden/<model_type>.npz: the answers of transformers to `tests.golden.checkpoints.conversations`, asked of
the checkpoints that `write_checkpoint` makes from nothing, and with them the versions that gave the answers. To be run
again when the reference's version changes, and the difference of the files to be explained in the commit. Nothing of
this library's model takes part; prompts, positions and patches come from the reference's own processor.
"""

import argparse
import datetime
import importlib.metadata
import tempfile
from pathlib import Path

import numpy as np

from tests.golden.answers import STEPS, Answers, differences, digest, freeze, frozen, kinds_of, picked
from tests.golden.checkpoints import CONFIGS, conversations, write_checkpoint

SMALLEST_MARGIN = 1e-3  # of the likeliest token's logit over the next: ten times what may differ
TICK = 1000  # the reference knows times as index / fps only: a fine grid lets it tell any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type", nargs="*", metavar="MODEL_TYPE", help="default: all of them")
    options = parser.parse_args()
    for model_type in options.model_type or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), model_type)
            answers, margins = reference_answers(Path(folder), model_type)
        for name, margin in margins.items():
            if margin < SMALLEST_MARGIN or len(answers[f"{name}/greedy"]) < STEPS:
                parser.error(
                    f"{model_type}, {name}: the answer has {len(answers[f'{name}/greedy'])} tokens and is decided by "
                    f"{margin:.1e}; change the seed in tests/golden/checkpoints.py."
                )
        metadata = {
            "reference": f"transformers {importlib.metadata.version('transformers')}",
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers")},
            "tool": "tools/make_golden.py",
            "date": datetime.date.today().isoformat(),
            "margins": {name: round(margin, 4) for name, margin in margins.items()},
        }
        try:
            changed = differences(answers, frozen(model_type)[0])
        except FileNotFoundError:
            changed = ["new"]
        path = freeze(model_type, answers, metadata)
        print(f"{path.name}: {path.stat().st_size:,} bytes; {'; '.join(changed) or 'as before'}; {metadata['margins']}")


def reference_answers(folder: Path, model_type: str) -> tuple[Answers, dict[str, float]]:
    """The reference's answers, each conversation alone.

    Args:
      folder: of `write_checkpoint`.
      model_type: its generation.

    Returns:
      See `tests.golden.answers`; and for each conversation, by how much the least sure greedy token was ahead.
    """
    import torch

    from tests.parity import reference

    model = reference.load_checkpoint(folder)
    processor = reference.transformers.AutoProcessor.from_pretrained(folder)
    answers, margins = {}, {}
    for name, conversation in conversations(model_type).items():
        inputs = reference_inputs(processor, conversation)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            positions, _ = model.model.get_rope_index(**_accepted(model.model.get_rope_index, inputs))
            logits = model(**inputs).logits[0]
            made = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            tower = _tower(model.model.visual, inputs) if len(kinds_of(conversation)) == 1 else None
        kinds = [kind for kind in ("image", "video") if f"{kind}_grid_thw" in inputs]
        grids = [inputs[f"{kind}_grid_thw"].numpy() for kind in kinds]
        patches = [inputs[_PIXELS[kind]].numpy() for kind in kinds]
        answers[f"{name}/tokens"] = inputs["input_ids"][0].numpy().astype(np.int32)
        answers[f"{name}/positions"] = positions[:, 0].T.numpy().astype(np.int32)
        answers[f"{name}/grids"] = np.concatenate([np.empty((0, 3)), *grids]).astype(np.int32)
        answers[f"{name}/patches"] = digest(np.concatenate(patches) if patches else np.empty(0))
        answers[f"{name}/logits"] = picked(logits.numpy(), "logits")
        answers[f"{name}/greedy"] = made.sequences[0, length:].numpy().astype(np.int32)
        if tower is not None:
            answers[f"{name}/tower"] = picked(tower, "tower")
        top = torch.topk(torch.stack(made.logits)[:, 0], 2, dim=-1).values
        margins[name] = float((top[:, 0] - top[:, 1]).min())
    return answers, margins


_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def reference_inputs(processor, conversation: list[dict]) -> dict:
    """What the reference's processor makes of a conversation, ready to be answered.

    Args:
      processor: the reference's.
      conversation: its images are arrays, its videos `VideoFrames`.
    """
    import transformers

    shown = [part for message in conversation if not isinstance(message["content"], str) for part in message["content"]]
    videos = [part["video"] for part in shown if part["type"] == "video"]
    metadata = [
        transformers.video_utils.VideoMetadata(
            total_num_frames=round(v.duration * TICK), fps=TICK, frames_indices=[round(t * TICK) for t in v.timestamps]
        )
        for v in videos
    ]
    inputs = processor(
        text=[processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)],
        images=[part["image"] for part in shown if part["type"] == "image"] or None,
        videos=[v.frames.transpose(0, 3, 1, 2) for v in videos] or None,
        video_metadata=metadata or None,
        do_sample_frames=False,
        return_tensors="pt",
    )
    return dict(inputs)


def _accepted(function, inputs: dict) -> dict:
    """The inputs that a function has parameters for."""
    import inspect

    return {key: value for key, value in inputs.items() if key in inspect.signature(function).parameters}


def _tower(visual, inputs: dict) -> np.ndarray:
    """[1 + taps, tokens, width]: merged tokens, then DeepStack features, of the one kind of vision there is."""
    kind = "image" if "image_grid_thw" in inputs else "video"
    out = visual(inputs[_PIXELS[kind]], grid_thw=inputs[f"{kind}_grid_thw"])
    return np.stack([out.pooler_output.numpy(), *(f.numpy() for f in getattr(out, "deepstack_features", None) or ())])


if __name__ == "__main__":
    main()
