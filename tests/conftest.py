import pytest
import tiny

from eigenzoo.zoo.checkpoint import load


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """A random Llama with biases and a chat template, saved as a Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny.save(folder, chat=True, head_dim=16, attention_bias=True)
    return folder


@pytest.fixture(scope="session")
def dense(dense_folder):
    """The same, loaded."""
    return load(str(dense_folder))
