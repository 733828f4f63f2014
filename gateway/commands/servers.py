"""`tailor up`, `gateway`, `replica`: the processes that serve."""

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
) -> None:
    """Run the whole stack on this machine until Ctrl-C: engine and gateway, supervised."""
    from gateway.stack import run_up

    with told():
        asyncio.run(run_up(settings_of(base_model=base_model, port=port), lambda text: print(text, flush=True)))


@app.command()
def gateway(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Become a gateway; TAILOR_REPLICAS says where its replicas are."""
    with told():
        settings = settings_of(base_model=base_model, port=port)
        given = {"TAILOR_PORT": str(settings.port)}
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
