import pytest
import torch

from nni_plugins.training import recipe_from_dict


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe():
    """Digits on an MLP that trains in a second."""
    return recipe_from_dict(
        {
            "model": {"name": "mlp", "arguments": {"hidden": [32, 16], "batch_norm": True}},
            "train": {"epochs": 3, "learning_rate": 0.1, "warmup_epochs": 0.5},
            "finetune": {"epochs": 1},
        }
    )


@pytest.fixture
def small_cnn():
    """Digits on a convolutional net of two small stages."""
    return recipe_from_dict(
        {
            "model": {"name": "small_cnn", "arguments": {"widths": [8, 16], "depth": 1}},
            "data": {"batch_size": 128},
            "train": {"epochs": 2, "warmup_epochs": 0.5},
            "finetune": {"epochs": 1, "learning_rate": 0.02},
        }
    )
