"""`tailor up`, `gateway`, `replica`, `worker`: the processes that serve and train."""

import asyncio
import os
import sys
from typing import Annotated

import typer

from gateway.commands.common import settings_of, told
from gateway.home import ConfigurationError, Home

app = typer.Typer()


@app.command()
def up(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines to start; on GPUs each has its own.")] = None,
    workers: Annotated[int | None, typer.Option(help="Gateway processes; more than 1 need TAILOR_REDIS_URL.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Run the whole stack on this machine until Ctrl-C: engines and gateway, supervised."""
    from adapter_store.process import die_with_parent
    from gateway.stack import run_up

    if with_parent:
        die_with_parent()
    with told():
        settings = settings_of(base_model=base_model, port=port, local_replicas=replicas, workers=workers)
        asyncio.run(run_up(settings, lambda text: print(text, flush=True)))


@app.command()
def restart() -> None:
    """Restart the running stack of this home part by part: each engine in turn, then the gateway."""
    from gateway.stack import restart_running_stack

    with told():
        restart_running_stack(Home(settings_of().home))
    print("restarted")


@app.command()
def gateway(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; more than 1 need TAILOR_REDIS_URL.")] = None,
) -> None:
    """Become a gateway; TAILOR_REPLICAS says where its replicas are."""
    with told():
        settings = settings_of(base_model=base_model, port=port, workers=workers)
        given = {"TAILOR_PORT": str(settings.port), "TAILOR_WORKERS": str(settings.workers)}
        if settings.base_model is not None:
            given["TAILOR_BASE_MODEL"] = settings.base_model
        command = [sys.executable, "-m", "gateway.server"]
        os.execve(command[0], command, {**os.environ, **given})  # noqa: S606  a server without the command's weight


@app.command()
def replica(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    listen: Annotated[str | None, typer.Option(help="unix:/path or host:port.")] = None,
) -> None:
    """Become a replica: vLLM with the agent in it. Restarting it is its supervisor's work."""
    from gateway.replicas.launch import replica_command

    with told():
        settings = settings_of(base_model=base_model, listen=listen)
        if settings.listen is None or settings.replica_token is None:
            raise ConfigurationError("A replica alone needs TAILOR_LISTEN (or --listen) and TAILOR_REPLICA_TOKEN.")
        home = Home(settings.home)
        base_path, base_name = home.base_model(settings.base_model, settings.base_model_name)
        command, environment = replica_command(
            settings,
            home,
            base_model=base_path,
            base_name=base_name,
            listen=settings.listen,
            token=settings.replica_token.get_secret_value(),
        )
        os.execve(command[0], command, dict(environment))  # noqa: S606  becoming vLLM is the point


@app.command()
def worker(
    base_model: Annotated[str | None, typer.Option(help="Folder or cached Hugging Face id of the base model.")] = None,
) -> None:
    """Become a training worker: it takes jobs from the database, as many workers as there are machines."""
    with told():
        settings = settings_of(base_model=base_model)
        given = {} if settings.base_model is None else {"TAILOR_BASE_MODEL": settings.base_model}
        command = [sys.executable, "-m", "gateway.training_worker"]
        os.execve(command[0], command, {**os.environ, **given})  # noqa: S606  a worker without the command's weight
