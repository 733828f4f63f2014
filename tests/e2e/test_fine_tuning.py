"""OpenAI's fine-tuning on a real vLLM and a real worker, with nothing but OpenAI's own client."""

import asyncio
import json
from dataclasses import dataclass, field

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from tests.e2e.conftest import RealStack
from training.tasks import Example, Task, jargon

TERMS = 6
STEPS = 120
LONG = 24
"""Terms whose job takes a good half minute: no pause comes too late for it."""


def jsonl(examples: list[Example]) -> bytes:
    lines = [
        json.dumps({"messages": [*example.messages, {"role": "assistant", "content": example.answer}]})
        for example in examples
    ]
    return "\n".join(lines).encode()


@dataclass
class Story:
    """A job's events as they come, over one stream."""

    client: openai.AsyncOpenAI
    job: str
    events: list[FineTuningJobEvent] = field(default_factory=list)
    _came: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def follow(self) -> None:
        """Until the job is over."""
        stream = await self.client.get(
            f"/fine_tuning/jobs/{self.job}/events",
            options={"params": {"stream": True}},
            cast_to=FineTuningJobEvent,
            stream=True,
            stream_cls=openai.AsyncStream[FineTuningJobEvent],
        )
        async for event in stream:
            async with self._came:
                self.events.append(event)
                self._came.notify_all()

    @property
    def steps(self) -> list[object]:
        return [dict(event.data)["step"] for event in self.events if event.type == "metrics"]  # type: ignore[call-overload]

    async def told(self, message: str) -> None:
        async with self._came:
            await self._came.wait_for(lambda: any(event.message == message for event in self.events))

    async def more(self) -> None:
        """A step that was not told yet."""
        async with self._came:
            before = len(self.steps)
            await self._came.wait_for(lambda: len(self.steps) > before)


async def begin(client: openai.AsyncOpenAI, base: str, task: Task, batch_size: int = 8) -> FineTuningJob:
    file = await client.files.create(file=("jargon.jsonl", jsonl(task.train)), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="jargon",
        seed=0,
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 40, "batch_size": batch_size, "learning_rate_multiplier": 1.0}
            },
        },
        extra_body={"tailor": {"rank": 8}},
    )
    assert job.status == "queued"
    return job


async def test_from_a_file_to_an_answer_with_openai_s_client_alone(stack: RealStack) -> None:
    """Upload, job, its story as it comes, its names in chats; another one that is paused, resumed and cancelled.

    No further call makes it served; what was trained on is known, and by its owner alone until it lends a checkpoint.
    """
    task = jargon(seed=0, terms=TERMS)
    async with (
        client_of(stack, stack.new_tenant("tuner")) as client,
        client_of(stack, stack.new_tenant("stranger")) as stranger,
    ):
        job = await begin(client, stack.base.name, task)
        story = Story(client, job.id)
        async with asyncio.timeout(240), asyncio.TaskGroup() as group:
            group.create_task(story.follow())
            await story.more()
            assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "running"
        job = await client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        assert story.steps == [*range(1, STEPS + 1)]
        assert [event.id async for event in client.fine_tuning.jobs.list_events(job.id, limit=100)] == [
            event.id for event in reversed(story.events)
        ]
        assert story.events[-1].message == "The job has successfully completed"
        model = job.fine_tuned_model
        assert model is not None
        assert model.startswith(f"ft:{stack.base.name}:")
        points = [point async for point in client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert len(points) == 10
        assert points[0].fine_tuned_model_checkpoint == f"{model}:ckpt-step-{STEPS}"
        assert await share(client, model, task) >= 0.9
        assert await share(client, points[1].fine_tuned_model_checkpoint, task) >= 0.9
        assert await share(client, stack.base.name, task) == 0
        result = (await client.files.content(job.result_files[0])).text.splitlines()
        assert len(result) == STEPS + 1
        await lend(stack, points[1].fine_tuned_model_checkpoint, stranger, task)
        with pytest.raises(openai.NotFoundError):
            await ask(stranger, model, task.heldout[0])
        await pause_resume_and_cancel(client, stack.base.name)
        assert await share(client, "jargon", task) >= 0.9


async def lend(stack: RealStack, checkpoint: str, other: openai.AsyncOpenAI, task: Task) -> None:
    """Another tenant may ask the checkpoint, with its own key, for as long as the owner's administrator lets it."""
    other_id = json.loads(stack.tailor("tenant", "show", "stranger", "--json"))["id"]
    key = json.loads(stack.tailor("key", "create", "tuner", "--scope", "admin", "--json"))["secret"]
    async with client_of(stack, key) as admin:
        permissions = admin.fine_tuning.checkpoints.permissions
        with pytest.raises(openai.NotFoundError):
            await ask(other, checkpoint, task.heldout[0])
        made = await permissions.create(checkpoint, project_ids=[other_id])
        assert await share(other, checkpoint, task) >= 0.9
        await permissions.delete(made.data[0].id, fine_tuned_model_checkpoint=checkpoint)
        with pytest.raises(openai.NotFoundError):
            await ask(other, checkpoint, task.heldout[0])


async def pause_resume_and_cancel(client: openai.AsyncOpenAI, base: str) -> None:
    """In the middle of it each time; every step is told once, and cancelled it is over at once."""
    jobs = client.fine_tuning.jobs
    job = await begin(client, base, jargon(seed=1, terms=LONG), batch_size=4)
    story = Story(client, job.id)
    async with asyncio.timeout(240), asyncio.TaskGroup() as group:
        group.create_task(story.follow())
        await story.more()
        await jobs.pause(job.id)
        await story.told("The job was paused")
        assert str((await jobs.retrieve(job.id)).status) == "paused"
        await jobs.resume(job.id)
        await story.more()
        assert (await jobs.cancel(job.id)).status == "cancelled"
    assert story.steps == [*range(1, len(story.steps) + 1)]
    assert any(event.message.startswith("Fine-tuning job goes on from step ") for event in story.events)
    with pytest.raises(openai.BadRequestError) as refused:
        await jobs.resume(job.id)
    assert refused.value.code == "invalid_job_state"


def client_of(stack: RealStack, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120)


async def share(client: openai.AsyncOpenAI, model: str, task: Task) -> float:
    """Of the held-out questions that are answered right."""
    right = [await ask(client, model, example) == example.answer for example in task.heldout]
    return sum(right) / len(right)


async def ask(client: openai.AsyncOpenAI, model: str, example: Example) -> str:
    said = await client.chat.completions.create(
        model=model,
        messages=example.messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
    )
    return said.choices[0].message.content or ""
