"""The numbers a customer may choose for a supervised LoRA run: name, default and bound of each. No torch here."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Hyperparameters(BaseModel):
    """One step trains `batch_size * gradient_accumulation_steps` rows; rates are per step."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1, le=512, description="Inner width of the adapter.")] = 16
    lora_alpha: Annotated[
        float, Field(gt=0, le=4096, description="Scale: the adapter counts lora_alpha / rank times.")
    ] = 32
    target_modules: Annotated[
        tuple[ModuleName, ...],
        Field(min_length=1, max_length=64, description="Names of the linear layers that are adapted."),
    ] = LLAMA_LINEARS
    epochs: Annotated[int, Field(ge=1, le=1000, description="Passes over the data.")] = 3
    max_steps: Annotated[int | None, Field(ge=1, le=1_000_000, description="Stop earlier, after so many steps.")] = None
    batch_size: Annotated[int, Field(ge=1, le=1024, description="Rows in one forward pass.")] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024, description="Forward passes in one step.")] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1, description="Highest learning rate, right after warmup.")] = 2e-4
    warmup_ratio: Annotated[
        float, Field(ge=0, le=1, description="Share of the steps in which the rate rises from 0.")
    ] = 0.03
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Field(description="How the rate goes on after warmup: stays, or falls to 0."),
    ] = "cosine"
    weight_decay: Annotated[
        float, Field(ge=0, le=1, description="AdamW's decoupled decay of the adapter's weights.")
    ] = 0.0
    max_grad_norm: Annotated[
        float, Field(gt=0, le=1000, description="Gradients longer than this are scaled down to it.")
    ] = 1.0
    max_length: Annotated[
        int, Field(ge=2, le=1 << 20, description="Longest row in tokens; a longer one is a fault.")
    ] = 2048
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Decides the first weights and the order of rows.")] = 0
