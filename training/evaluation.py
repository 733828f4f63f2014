"""How well a model answers: exact match over any way of asking, with Hugging Face's greedy decoding as reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.progress import no_library_bars
from training.tasks import Example, Message

Answer = Callable[[list[Message]], str]


def exact_match(examples: Sequence[Example], answer: Answer) -> float:
    """Share of `examples` that `answer` gets right word for word; white space around the answer is forgiven."""
    if not examples:
        raise ValueError("no examples to score")
    return sum(answer(example.messages).strip() == example.answer for example in examples) / len(examples)


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy answer: its tokens, end-of-turn included, and the natural logarithm of each one's probability."""

    text: str
    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float]


class Answerer:
    """Greedy answers of a base, or of a base with one PEFT adapter, in float32 on the CPU, one chat at a time."""

    def __init__(self, base: Path, adapter: Path | None = None, *, max_new_tokens: int = 64) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        with no_library_bars():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        self._model.eval()
        self._max_new_tokens = max_new_tokens

    def __call__(self, messages: list[Message]) -> str:
        return self.generate(messages).text

    def generate(self, messages: list[Message]) -> Generation:
        """Continue the chat with the likeliest token each time, up to the end of turn or `max_new_tokens`."""
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = self._model.generate(
                **prompt,
                do_sample=False,
                max_new_tokens=self._max_new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        token_ids = output.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        logprobs = [
            torch.log_softmax(logits[0], dim=-1)[token].item()
            for logits, token in zip(output.logits, token_ids, strict=True)
        ]
        tokens = [self.tokenizer.decode([token]) for token in token_ids]
        return Generation(self.tokenizer.decode(token_ids, skip_special_tokens=True), token_ids, tokens, logprobs)
