"""`tailor job`: fine-tuning jobs, with a live loss curve in the terminal."""

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gateway.commands.common import Json, Key, Url, pages, segment, show, show_table, tenant_client, told

if TYPE_CHECKING:
    from gateway.api_client import ApiClient

app = typer.Typer(help="Fine-tuning jobs (with the tenant's key).", no_args_is_help=True)

JOBS: Final = "/v1/fine_tuning/jobs"
OVER: Final = ("succeeded", "failed", "cancelled")
LOOK_EVERY_S: Final = 1.0
JobId = Annotated[str, typer.Argument(metavar="ID", help="As `tailor job list` shows it: ftjob-…")]


@app.command("create")
def job_create(
    training_file: Annotated[str, typer.Argument(metavar="FILE", help="Id of the training file: file-…")],
    model: Annotated[
        str | None, typer.Option(help="The base model, or a fine-tuned one to go on from; default: the base.")
    ] = None,
    validation_file: Annotated[str | None, typer.Option("--validation", help="Id of the validation file.")] = None,
    suffix: Annotated[str | None, typer.Option(help="The adapter's name; default: the job's id.")] = None,
    method: Annotated[str, typer.Option(help="supervised or dpo.")] = "supervised",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: auto.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a step; default: auto.")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate-multiplier", help="Of the learning rate; default: auto.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="DPO's; default: auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides first weights and order; default: drawn.")] = None,
    rank: Annotated[int | None, typer.Option(help="Inner width of the adapter.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4: train on the base in four bits (QLoRA).")] = None,
    sft_weight: Annotated[
        float | None, typer.Option(help="DPO: what the better answers' loss counts beside the preference; default: 0.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="A version to go on from, as name@3.")] = None,
    alias: Annotated[str | None, typer.Option(help="What is to stand for the result.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until it is over.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Put a job into the queue."""
    numbers = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": rate, "beta": beta}
    own = {"rank": rank, "quantization": quantization, "sft_weight": sft_weight, "from": start, "alias": alias}
    asked = {
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "seed": seed,
        "method": {"type": method, method: {"hyperparameters": _given(numbers)}},
        "tailor": _given(own),
    }
    with told():
        client = tenant_client(url, key)
        asked["model"] = model or client.call("GET", "/v1/models")["data"][0]["id"]
        made = client.call("POST", JOBS, _given(asked))
        if watch:
            made = _watch(client, made["id"])
    show(made, as_json, _described(made))


@app.command("list")
def job_list(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List the jobs, the newest first."""
    with told():
        found = pages(tenant_client(url, key), JOBS, "id")
    rows = [{**job, "step": _steps(job)} for job in found]
    show_table(found if as_json else rows, as_json, ("id", "status", "step", "fine_tuned_model", "created_at"))


@app.command("show")
def job_show(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show a job."""
    with told():
        found = tenant_client(url, key).call("GET", _path(job))
    show(found, as_json, _described(found))


@app.command("watch")
def job_watch(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Follow a job until it is over, with the curve of its loss; ends with 1 where it did not succeed."""
    with told():
        found = _watch(tenant_client(url, key), job)
    show(found, as_json, _described(found))
    if found["status"] != "succeeded":
        raise typer.Exit(1)


@app.command("events")
def job_events(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show what a job has told, the oldest first."""
    with told():
        found = pages(tenant_client(url, key), _path(job, "events"), "id")[::-1]
    show_table(found, as_json, ("created_at", "level", "message"))


@app.command("checkpoints")
def job_checkpoints(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List a job's checkpoints, each with the name that it is served by."""
    with told():
        found = pages(tenant_client(url, key), _path(job, "checkpoints"), "id")
    show_table(found, as_json, ("step_number", "fine_tuned_model_checkpoint", "created_at"))


@app.command("cancel")
def job_cancel(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """End a job at once; its checkpoints stay."""
    _order(job, "cancel", url, key, as_json)


@app.command("pause")
def job_pause(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Pause a job: what it has reached is saved."""
    _order(job, "pause", url, key, as_json)


@app.command("resume")
def job_resume(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Let a paused job go on."""
    _order(job, "resume", url, key, as_json)


@app.command("delete")
def job_delete(
    job: JobId,
    force: Annotated[bool, typer.Option("--force", help="Though requests run on its checkpoints.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Erase a job that is over: its story, checkpoints and result files; its result stays."""
    with told():
        gone = tenant_client(url, key).call("DELETE", _path(job), params={"force": force})
    show(gone, as_json, f"{job} is erased; receipt: tailor erasure show {gone['tailor']['erasure']}")


def _order(job: str, order: str, url: str | None, key: str | None, as_json: bool) -> None:
    with told():
        found = tenant_client(url, key).call("POST", _path(job, order), {})
    show(found, as_json, _described(found))


def _watch(client: "ApiClient", job: str) -> dict[str, Any]:
    """The job as it is at its end."""
    from gateway.loss_curve import LossCurve

    seen = 0
    with LossCurve() as curve:
        while True:
            found: dict[str, Any] = client.call("GET", _path(job))
            events = _new_events(client, job, seen)
            seen += len(events)
            curve.show(found, events)
            if found["status"] in OVER and not events:
                return found
            time.sleep(LOOK_EVERY_S)


def _new_events(client: "ApiClient", job: str, seen: int) -> list[dict[str, Any]]:
    """Those after the first `seen`, the oldest first."""
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = client.call("GET", _path(job, "events"), params={"limit": 1_000, **after})
        for event in page["data"]:
            if int(event["id"][-8:], 16) <= seen:
                return found[::-1]
            found.append(event)
        if not page["has_more"]:
            return found[::-1]
        after = {"after": found[-1]["id"]}


def _path(job: str, *rest: str) -> str:
    return "/".join([JOBS, segment(job), *rest])


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _steps(job: dict[str, Any]) -> str:
    at = job["tailor"]
    return f"{at['step']}/{at['total_steps'] or '?'}"


def _described(job: dict[str, Any]) -> str:
    """A job in some lines."""
    lines = [f"{job['id']}: {job['status']}, step {_steps(job)}, {job['method']['type']} on {job['training_file']}"]
    if job["error"] is not None:
        lines.append(f"  {job['error']['code']}: {job['error']['message']}")
    if job["fine_tuned_model"] is not None:
        lines.append(f"  ask it as {job['fine_tuned_model']}, or {job['tailor']['adapter']}")
    return "\n".join(lines)
