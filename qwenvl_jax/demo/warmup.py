"""Text that teaches the form of the task: it stands in for the language model that a real run would start from.

The same clips, questions and answers as in `records`, but each temporal patch is told in words where pixels would be:

    <0.1 seconds> nothing<0.6 seconds> red circle<1.1 seconds> blue ring red circle ...When does the red circle appear?
    {"event": "red circle", "start": 0.6, "end": 1.1}

Only pairs of colour and shape that training clips show are named, and no pixel is drawn.
"""

import numpy as np

from qwenvl_jax.demo.clips import outline_clip
from qwenvl_jax.demo.records import questions_and_answers, sight, told
from qwenvl_jax.demo.vocabulary import SAMPLED_FPS


def text_conversation(seed: int, index: int, fps: float = SAMPLED_FPS) -> list[dict]:
    """Warm-up conversation number `index`: a pure function of its arguments."""
    clip = outline_clip(seed, index, "train")
    rng = np.random.default_rng([seed, index])
    sighting = sight(clip, fps)
    messages = questions_and_answers(clip, sighting, [int(e) for e in rng.permutation(len(clip.events))])
    messages[0]["content"] = told(clip, sighting, rng) + messages[0]["content"]
    return messages
