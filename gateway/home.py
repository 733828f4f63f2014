"""The home folder: where one installation keeps its database, blobs, caches, logs and secrets."""

import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from adapter_store.disk import sync
from adapter_store.seeds import seed_of

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


class ConfigurationError(Exception):
    """A setting is missing or names something that cannot be used; the text says which and what to do."""


class Home:
    """Paths below the home folder, and the secrets that are made once and kept there, readable by the owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"TAILOR_HOME={path} cannot be made: {error.strerror}. Choose a folder that you may write."
            ) from error

    @property
    def operator_key_file(self) -> Path:
        return self.path / "operator-key"

    def keep_operator_key(self, secret: str) -> None:
        self._write_secret(self.operator_key_file, secret)

    def operator_key(self) -> str | None:
        """None where there is none, or nothing in its file: `tailor key operator` makes another."""
        return self._read_secret(self.operator_key_file) or None

    def secret_key(self, given: SecretStr | None) -> bytes:
        """The setting's value, or the one kept here, made on first use."""
        return self._kept("secret-key", given).encode()

    def signing_key(self, given: SecretStr | None) -> bytes:
        """The Ed25519 key that versions and erasures are signed with; another one begins when this one is moved away.

        Raises:
            ConfigurationError: what is kept here is no such key.
        """
        text = self._kept("signing-key", given)
        try:
            return seed_of(text)
        except ValueError as error:
            raise ConfigurationError(f"{self.path / 'signing-key'}: {error}.") from error

    def replica_token(self, given: SecretStr | None) -> str:
        """What gateway and replicas know each other by."""
        return self._kept("replica-token", given)

    def base_model(self, given: str | None, name: str | None = None) -> tuple[Path, str]:
        """The base model's folder, and what tenants call it.

        `given` is a folder, or a Hugging Face id whose files are fetched if need be. The name is `name`, else the id,
        else the folder's own name.

        Raises:
            ConfigurationError: nothing is given, or it is neither a folder nor a model that can be had.
        """
        if given is None:
            raise ConfigurationError("TAILOR_BASE_MODEL is not set: name the base model's folder or Hugging Face id.")
        path = Path(given).expanduser()
        if path.is_dir():
            path = path.resolve()
            name = name or path.name
        elif HUB_ID.fullmatch(given):
            path, name = _fetch(given), name or given
        else:
            raise ConfigurationError(f"The base model's folder {given} does not exist.")
        if not MODEL_NAME.fullmatch(name):
            raise ConfigurationError(f"'{name}' is no name for a model: set TAILOR_BASE_MODEL_NAME.")
        return path, name

    def _kept(self, name: str, given: SecretStr | None) -> str:
        if given is not None:
            return given.get_secret_value()
        file = self.path / name
        kept = self._read_secret(file)
        if kept is None:
            self._write_secret(file, secrets.token_urlsafe(32), replace=False)
            kept = self._read_secret(file)  # another process may have been faster
            assert kept is not None
        if not kept:
            raise ConfigurationError(
                f"{file} is empty, as a power cut may leave a file: restore it, or remove it, and the next start makes "
                "another."
            )
        return kept

    @staticmethod
    def _read_secret(file: Path) -> str | None:
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise ConfigurationError(f"{file} can be read by others: chmod 600 it, and change the secret.")
            return file.read_text().strip()
        except FileNotFoundError:
            return None

    @staticmethod
    def _write_secret(file: Path, value: str, *, replace: bool = True) -> None:
        """Whole and on the disk before it has its name, whoever else writes it, or not at all."""
        beside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")  # in containers every process is number 1
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writer:
                writer.write(value + "\n")
                writer.flush()
                os.fsync(writer.fileno())
            if replace:
                beside.replace(file)
            else:
                with suppress(FileExistsError):
                    file.hardlink_to(beside)
        finally:
            beside.unlink(missing_ok=True)
        sync(file.parent)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"The base model {hub_id} is no folder here and could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}."
        ) from error
