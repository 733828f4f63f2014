"""The agent: what runs inside a vLLM API server so that a gateway can load, probe and unload adapters there.

`serve` starts vLLM with it, `plugin` hooks it in, `routes` speaks the contract of `docs/agent-contract.md`,
`residency` decides what is loaded, `counts` keeps what requests used, `engine` is the only module that touches vLLM's
objects.
"""
