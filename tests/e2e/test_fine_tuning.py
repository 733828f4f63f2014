"""OpenAI's fine-tuning on a real vLLM and a real worker, with nothing but OpenAI's own client."""

import asyncio
import json

import openai

from tests.e2e.conftest import RealStack
from training.tasks import Example, jargon

TERMS = 6


def jsonl(examples: list[Example]) -> bytes:
    lines = [
        json.dumps({"messages": [*example.messages, {"role": "assistant", "content": example.answer}]})
        for example in examples
    ]
    return "\n".join(lines).encode()


async def test_from_a_file_to_an_answer_with_openai_s_client_alone(stack: RealStack) -> None:
    """Upload, job, events, the `ft:` name in a chat: no further call. What was trained on is known, and by its owner
    alone; what the job told is OpenAI's."""
    task = jargon(seed=0, terms=TERMS)
    key, stranger = stack.new_tenant("tuner"), stack.new_tenant("stranger")
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120) as client:
        file = await client.files.create(file=("jargon.jsonl", jsonl(task.train)), purpose="fine-tune")
        job = await client.fine_tuning.jobs.create(
            model=stack.base.name,
            training_file=file.id,
            suffix="jargon",
            seed=0,
            method={
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"n_epochs": 40, "batch_size": 8, "learning_rate_multiplier": 1.0},
                },
            },
            extra_body={"tailor": {"rank": 8}},
        )
        assert job.status == "queued"
        async with asyncio.timeout(240):
            while (job := await client.fine_tuning.jobs.retrieve(job.id)).status in ("queued", "running"):
                await asyncio.sleep(0.25)
        assert job.status == "succeeded", job.error
        model = job.fine_tuned_model
        assert model is not None
        assert model.startswith(f"ft:{stack.base.name}:")
        events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert events[0].message == "The job has successfully completed"
        assert len([event for event in events if event.type == "metrics"]) == 120
        points = [point async for point in client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert len(points) == 10
        assert points[0].fine_tuned_model_checkpoint == f"{model}:ckpt-step-120"
        right = [await ask(client, model, example) == example.answer for example in task.heldout]
        assert sum(right) >= 0.9 * TERMS
        assert await ask(client, points[-1].fine_tuned_model_checkpoint, task.heldout[0])
        before = [await ask(client, stack.base.name, example) == example.answer for example in task.heldout]
        assert sum(before) == 0
        result = (await client.files.content(job.result_files[0])).text.splitlines()
        assert len(result) == 121
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=stranger, max_retries=0, timeout=120) as other:
        try:
            await ask(other, model, task.heldout[0])
        except openai.NotFoundError:
            pass
        else:
            raise AssertionError("a stranger was answered")


async def ask(client: openai.AsyncOpenAI, model: str, example: Example) -> str:
    said = await client.chat.completions.create(
        model=model,
        messages=example.messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
    )
    return said.choices[0].message.content or ""
