"""How a model was made stands in its weights file, and the tensors stay what they were."""

import numpy as np
import safetensors.numpy

from qwenvl_jax.demo import weights_card


def test_a_card_is_added_and_read_back(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_card.read(tmp_path) == {}
    weights_card.write(tmp_path, seed=3, full=True)
    card = weights_card.read(tmp_path)
    assert (card["command"], card["seed"]) == ("qwenvl-jax demo --full --seed 3", "3")
    assert "jax 0." in card["versions"] and "Python 3." in card["versions"]
    for name, value in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, values[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
