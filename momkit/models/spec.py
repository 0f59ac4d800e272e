"""The typed description of a language model over MoM blocks."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from momkit.spec import MoMSpec, SpecFile


class BackboneSpec(SpecFile):
    """Everything that defines a language model but its vocabulary, which is the task's.

    block: a MoMSpec; its `hidden_size` may be left out, and is then the model's.
    mlp_ratio: width of the SwiGLU MLP over hidden_size; 0 leaves the MLP out.
    attention_layers: indices of the layers that are causal softmax attention instead of a MoM block.
    aux_loss_scale: weight of the load-balance loss, averaged over layers, in the training loss.
    """

    schema_version: Literal[1] = 1
    hidden_size: PositiveInt
    num_layers: PositiveInt = 2
    block: MoMSpec
    mlp_ratio: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.0
    attention_layers: tuple[int, ...] = ()
    attention_heads: PositiveInt = 4
    tie_embeddings: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    aux_loss_scale: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.01

    @model_validator(mode="before")
    @classmethod
    def _size_block(cls, data: Any) -> Any:
        if isinstance(data, dict) and "hidden_size" in data:
            block = data.get("block", {})
            if isinstance(block, dict):
                return data | {"block": {"hidden_size": data["hidden_size"]} | block}
        return data

    @model_validator(mode="after")
    def _check(self) -> "BackboneSpec":
        if self.block.hidden_size != self.hidden_size:
            raise ValueError(f"block.hidden_size = {self.block.hidden_size}; allowed: hidden_size = {self.hidden_size}")
        layers = self.attention_layers
        if sorted(set(layers)) != list(layers) or (layers and not 0 <= layers[0] <= layers[-1] < self.num_layers):
            raise ValueError(
                f"attention_layers = {list(layers)}; allowed: rising indices from 0 to {self.num_layers - 1}"
            )
        if layers and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"attention_heads = {self.attention_heads} does not divide hidden_size = {self.hidden_size}"
            )
        return self

    def with_vocabulary(self, vocab_size: int) -> "LMSpec":
        """This model for a vocabulary."""
        fields = {name: getattr(self, name) for name in BackboneSpec.model_fields}
        return LMSpec(vocab_size=vocab_size, **fields)


class LMSpec(BackboneSpec):
    """Everything that defines a language model."""

    vocab_size: PositiveInt
