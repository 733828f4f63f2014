"""The gateway on PostgreSQL and S3: an adapter's life through its door, and what is left of it."""

from pathlib import Path

from adapter_store.aliases import main_of
from adapter_store.blobs import Blobs
from adapter_store.cache import DiskCache
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import RunGateway
from tests.storage import Place, Shelf


async def test_an_adapter_lives_on_postgres_and_s3(
    remote: Place, run_gateway: RunGateway, replica: FakeReplica, good: Path, other_good: Path
) -> None:
    """Upload, answer, next version, the same bytes again, delete: rows and objects are those of the versions."""
    gateway = await run_gateway(replica, database_url=remote.database_url, blobs_url=remote.blobs_url)
    acme, globex = await gateway.tenant("acme"), await gateway.tenant("globex")
    shelf = Shelf(Blobs.open(remote.blobs_url), None)
    assert (await acme.publish(good)).status_code == 201
    assert (await acme.publish(other_good)).status_code == 201
    assert (await acme.publish(good)).status_code == 201
    assert (await globex.publish(good)).status_code == 201
    for model, number in (("bot", 1), ("bot@1", 1), ("bot@2", 2)):
        answer = await acme.ask(model)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tailor-version"].startswith(f"{number}; ")
    assert len(shelf.keys()) == 5  # one config for both versions of acme, two weights; globex has copies of its own
    assert (await acme.client.delete("/v1/adapters/bot")).status_code == 200
    assert (await acme.ask()).status_code == 404
    assert len(shelf.keys()) == 2
    assert (await globex.ask()).status_code == 200


async def test_a_replica_fetches_from_s3(
    remote: Place, run_gateway: RunGateway, replica: FakeReplica, good: Path, tmp_path: Path
) -> None:
    """The agent's cache opens the same URL with the credentials of its environment, and verifies what comes."""
    gateway = await run_gateway(replica, database_url=remote.database_url, blobs_url=remote.blobs_url)
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    tenant_id = (await gateway.parts.tenants.named("acme")).id
    version = main_of(await gateway.parts.store.resolve(tenant_id, "bot"))
    folder = await DiskCache(tmp_path / "cache", Blobs.open(remote.blobs_url), 1 << 20).fetch(
        version.digest, version.files
    )
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (good / weights).read_bytes()
