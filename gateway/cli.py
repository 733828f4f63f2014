"""The `tailor` command: its verbs, put together from `gateway/commands/`.

Each verb imports its part only when it runs, so that `tailor --help` is quick anywhere.
"""

import sys

import typer

from gateway.commands import (
    adapters,
    aliases,
    erasures,
    evaluation,
    files,
    jobs,
    keys,
    openapi,
    pins,
    proofs,
    quarantine,
    replicas,
    servers,
    storage,
    tenants,
    training,
    usage,
)
from loadtests.plan_commands import app as loadtest_app

app = typer.Typer(help="One base model and a fitted adapter for every tenant.", no_args_is_help=True)
app.add_typer(servers.app)
app.add_typer(tenants.tenant_app, name="tenant")
app.add_typer(tenants.plan_app, name="plan")
app.add_typer(keys.app, name="key")
adapters.adapter_app.command("proof")(proofs.adapter_proof)
adapters.adapter_app.command("prompts")(proofs.adapter_prompts)
app.add_typer(jobs.app, name="job")
adapters.adapter_app.command("blend")(evaluation.blend)
app.add_typer(adapters.adapter_app, name="adapter")
app.add_typer(adapters.app)
app.add_typer(evaluation.app)
app.add_typer(aliases.alias_app, name="alias")
app.add_typer(aliases.rollout_app, name="rollout")
app.add_typer(erasures.app, name="erasure")
app.add_typer(files.app, name="file")
app.add_typer(training.base_app, name="base")
app.add_typer(training.app)
app.add_typer(replicas.app, name="replicas")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(pins.app, name="pins")
app.add_typer(usage.app)
app.add_typer(storage.app)
app.add_typer(storage.store_app, name="store")
app.add_typer(loadtest_app, name="loadtest")
app.add_typer(openapi.app)


def main() -> None:
    """The console script."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
