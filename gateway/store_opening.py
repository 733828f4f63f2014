"""The adapter store, opened as the settings say: the same for a gateway and for a training worker.

So what either of them publishes is inspected, signed, proved and served alike.
"""

from dataclasses import dataclass
from pathlib import Path

from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.engine import AsyncEngine
from adapter_store.faults import Bounds
from adapter_store.inspector import Inspector
from adapter_store.signing import Signer
from adapter_store.store import AdapterStore
from gateway.database import open_engine
from gateway.home import Home
from gateway.settings import Settings
from training import jobs


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """The store and what it stands on. `base_folder`: the base model's."""

    base: BaseModel
    base_folder: Path
    engine: AsyncEngine
    blobs: Blobs
    inspector: Inspector
    signer: Signer
    store: AdapterStore


def open_store(settings: Settings, home: Home) -> OpenedStore:
    """Connects to nothing yet.

    Raises:
        ConfigurationError, BaseModelInvalid: a setting is missing or names something unusable.
    """
    folder, name = home.base_model(settings.base_model, settings.base_model_name)
    base = BaseModel.read(folder, name=name, dtype=settings.dtype)
    engine = open_engine(settings.database)
    inspector = Inspector(base, Bounds(settings.max_lora_rank, settings.max_adapter_bytes))
    blobs = Blobs.open(settings.blobs)
    signer = Signer(engine, home.signing_key(settings.signing_key))
    store = AdapterStore(
        engine,
        blobs,
        inspector,
        signer=signer,
        moves_when_proved=settings.proof == "require",
        proof_delay_s=settings.proof_delay_s,
        is_checkpoint=jobs.is_checkpoint,
    )
    return OpenedStore(base, folder, engine, blobs, inspector, signer, store)
