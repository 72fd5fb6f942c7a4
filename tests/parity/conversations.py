"""Conversations of every kind of input, small enough for tiny models."""

import numpy as np

from qwenvl_jax.data.video import VideoFrames

_rng = np.random.default_rng(7)


def _image(height: int, width: int) -> dict:
    return {"type": "image", "image": _rng.integers(0, 256, (height, width, 3), dtype=np.uint8)}


def _video(times: list[float], height: int, width: int) -> dict:
    frames = _rng.integers(0, 256, (len(times), height, width, 3), dtype=np.uint8)
    return {"type": "video", "video": VideoFrames(frames, np.asarray(times), duration=times[-1] + 0.5)}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "when does the blue circle leave the picture, and what is left then?"}],
    "image": [_user(_image(96, 64), _text("describe the image"))],
    "images": [_user(_image(64, 64), _text("and"), _image(64, 160), _image(128, 96), _text("which is larger?"))],
    "video": [_user(_video([0.0, 0.4, 1.7, 1.9, 5.3, 11.25, 11.5], 64, 64), _text("what happens in the video?"))],
    "mixed": [
        {"role": "system", "content": "you see"},
        _user(_text("here is a disc"), _image(64, 96), _text("remember it")),
        {"role": "assistant", "content": "a yellow disc"},
        _user(_video([0.3, 0.9, 2.0], 96, 64), _image(96, 96), _text("when does it appear?")),
        {"role": "assistant", "content": "the red square appears at three seconds"},
        {"role": "user", "content": "and then?"},
    ],
}


def _even(part: dict) -> dict:
    """A video part with its frames spread evenly over the clip."""
    if part["type"] != "video":
        return part
    frames, duration = part["video"].frames, part["video"].duration
    return {"type": "video", "video": VideoFrames(frames, np.arange(len(frames)) * duration / len(frames), duration)}


# The same with evenly spaced frames: Qwen2.5-VL's reference knows no other.
EVEN_CONVERSATIONS = {
    name: [m if isinstance(m["content"], str) else {**m, "content": [_even(p) for p in m["content"]]} for m in messages]
    for name, messages in CONVERSATIONS.items()
}
