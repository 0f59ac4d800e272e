import pytest
import torch

from momkit.errors import InputError
from momkit.models.lm import MoMLM
from momkit.models.spec import LMSpec
from momkit.training import generate as module
from momkit.training.generate import Codec, generate


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoMLM(LMSpec(vocab_size=20, hidden_size=16, block={"mechanism": "deltanet"}, attention_layers=(1,)))


def test_same_seed_same_tokens(model):
    first = list(generate(model, [1, 2, 3], 20, seed=4))
    torch.rand(5)
    assert list(generate(model, [1, 2, 3], 20, seed=4)) == first
    assert list(generate(model, [1, 2, 3], 20, seed=5)) != first
    assert len(first) == 20 and all(0 <= token < 20 for token in first)


def test_greedy_is_the_likeliest(model):
    prompt = [1, 2, 3]
    for token in generate(model, prompt, 5, temperature=0):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(prompt)).hidden_states[-1])
        assert token == int(logits.argmax())
        prompt = [*prompt, token]


def test_top_1_is_greedy(model):
    assert list(generate(model, [1], 9, top_k=1)) == list(generate(model, [1], 9, temperature=0))


def test_long_prompt_goes_in_pieces(model, monkeypatch):
    prompt = [i % 20 for i in range(50)]
    whole = list(generate(model, prompt, 5, temperature=0))
    monkeypatch.setattr(module, "PROMPT_CHUNK", 7)
    assert list(generate(model, prompt, 5, temperature=0)) == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 21}, "top_k"),
        ({"max_tokens": -1}, "max"),
    ],
)
def test_refuses(model, changes, named):
    with pytest.raises(InputError, match=named):
        list(generate(model, [1], **{"max_tokens": 3} | changes))
    with pytest.raises(InputError, match="prompt"):
        list(generate(model, [], 3))
    with pytest.raises(InputError, match="prompt holds 20 to 20; allowed: 0 to 19"):
        list(generate(model, [20], 3))


def test_codec():
    bytes_codec, numbers = Codec("bytes"), Codec("mqar")
    tokens = bytes_codec.encode("né")
    assert tokens == list("né".encode())
    assert [bytes_codec.decode(token) for token in tokens] == ["n", "", "é"]
    assert numbers.encode("3 17") == [3, 17] and numbers.decode(4) == " 4"
    with pytest.raises(InputError, match="prompt"):
        numbers.encode("three")
