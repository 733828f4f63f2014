"""The numbers a customer may choose for a LoRA run: name, default and bound of each. No torch here."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
ModulePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}$")]
Rank = Annotated[int, Field(ge=1, le=512)]
Alpha = Annotated[float, Field(gt=0, le=4096)]
Quantization = Literal["nf4"]
T = TypeVar("T")

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Hyperparameters(BaseModel):
    """One step trains `batch_size * gradient_accumulation_steps` rows; rates are per step."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1, le=512, description="Inner width of the adapter.")] = 16
    lora_alpha: Annotated[
        float, Field(gt=0, le=4096, description="Scale: the adapter counts lora_alpha / rank times.")
    ] = 32
    rslora: Annotated[bool, Field(description="The adapter counts lora_alpha / sqrt(rank) times instead.")] = False
    rank_pattern: Annotated[
        Mapping[ModulePath, Rank],
        Field(max_length=256, description="Other ranks: by a module's path, or its end from a dot on."),
    ] = {}
    alpha_pattern: Annotated[
        Mapping[ModulePath, Alpha], Field(max_length=256, description="Other values of lora_alpha, in the same way.")
    ] = {}
    target_modules: Annotated[
        tuple[ModuleName, ...],
        Field(min_length=1, max_length=64, description="Names of the linear layers that are adapted."),
    ] = LLAMA_LINEARS
    epochs: Annotated[int, Field(ge=1, le=1000, description="Passes over the data.")] = 3
    max_steps: Annotated[int | None, Field(ge=1, le=1_000_000, description="Stop earlier, after so many steps.")] = None
    batch_size: Annotated[int, Field(ge=1, le=1024, description="Rows, or packs of rows, in one forward pass.")] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024, description="Forward passes in one step.")] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1, description="Highest learning rate, right after warmup.")] = 2e-4
    warmup_ratio: Annotated[
        float, Field(ge=0, le=1, description="Share of the steps in which the rate rises from 0.")
    ] = 0.03
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Field(description="How the rate goes on after warmup: stays, or falls to 0."),
    ] = "cosine"
    loraplus_ratio: Annotated[
        float,
        Field(ge=1, le=1000, description="LoRA+: the rate of the outer halves (lora_B) is so many times the rate."),
    ] = 1.0
    weight_decay: Annotated[
        float, Field(ge=0, le=1, description="AdamW's decoupled decay of the adapter's weights.")
    ] = 0.0
    max_grad_norm: Annotated[
        float, Field(gt=0, le=1000, description="Gradients longer than this are scaled down to it.")
    ] = 1.0
    max_length: Annotated[
        int, Field(ge=2, le=1 << 20, description="Longest row in tokens; a longer one is a fault.")
    ] = 2048
    packing: Annotated[
        bool, Field(description="Rows share a line of max_length tokens, none seeing another: less padding.")
    ] = False
    gradient_checkpointing: Annotated[
        bool, Field(description="Compute each layer twice instead of keeping what is inside it: less memory.")
    ] = False
    quantization: Annotated[
        Quantization | None,
        Field(description="QLoRA: train on the base in four bits. The adapter is an ordinary one of the whole base."),
    ] = None
    beta: Annotated[float, Field(gt=0, le=2, description="DPO: how strongly a departure from the base counts.")] = 0.1
    sft_weight: Annotated[
        float,
        Field(ge=0, le=100, description="DPO: how much the better answers' mean loss per token counts beside."),
    ] = 0.0
    eval_steps: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Validate after each so many steps, not only after the last.")
    ] = None
    early_stopping_patience: Annotated[
        int | None, Field(ge=1, le=1000, description="End after so many validations in a row that are none better.")
    ] = None
    keep_best: Annotated[
        bool,
        Field(description="The result is what validated best, where there is validation data, not what came last."),
    ] = True
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Decides the first weights and the order of rows.")] = 0

    def rank_of(self, module: str) -> int:
        """The rank that the linear layer at this path gets."""
        return first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """How many times its adapter counts there."""
        rank = self.rank_of(module)
        return first_match(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.rslora else rank)


def first_match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """What PEFT takes from a pattern of literal keys: the first that is the module's path, or its end from a dot on."""
    for key, value in pattern.items():
        if module == key or module.endswith(f".{key}"):
            return value
    return default
