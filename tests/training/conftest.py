import pytest

from momkit.training.config import TrainConfig

SMALL = {
    "model": {
        "hidden_size": 16,
        "block": {
            "num_memories": 3,
            "mechanism": {"kind": "deltanet", "num_heads": 1, "head_dim": 4},
            "router": "noisy_topk",
        },
        "dropout": 0.1,
    },
    "task": {
        "kind": "mqar",
        "vocab_size": 16,
        "train": [{"seq_len": 12, "num_pairs": 1}, {"seq_len": 16, "num_pairs": 3}],
        "eval": [{"seq_len": 12, "num_pairs": 1}, {"seq_len": 16, "num_pairs": 3}],
        "eval_examples": 8,
        "curriculum": 0.5,
    },
    "steps": 6,
    "batch_size": 4,
    "accumulation": 2,
    "warmup": 2,
    "eval_every": 2,
    "checkpoint_every": 2,
    "chunk_tokens": 8,
    "threads": 1,
}


@pytest.fixture
def small():
    def make(**changes):
        return TrainConfig.model_validate(SMALL | changes)

    return make
