"""Tenants, keys, adapters, versions, aliases and the change feed."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_tenants()
    create_adapters()
    create_change_feed()


def create_tenants() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, sa.ForeignKey("tenants.id", name="fk_api_keys_tenant_id")),
        sa.Column("sha256", sa.Text, nullable=False, unique=True),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("last_used_at", sa.BigInteger),
    )


def create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_id_name"),
    )
    create_versions()
    op.create_table(
        "aliases",
        sa.Column(
            "adapter_id",
            sa.Text,
            sa.ForeignKey("adapters.id", name="fk_aliases_adapter_id"),
            primary_key=True,
        ),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version_id", sa.Text, sa.ForeignKey("versions.id", name="fk_aliases_version_id"), nullable=False),
        sa.Column("moved_at", sa.BigInteger, nullable=False),
    )


def create_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("adapter_id", sa.Text, sa.ForeignKey("adapters.id", name="fk_versions_adapter_id"), nullable=False),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("config_sha256", sa.Text, nullable=False),
        sa.Column("config_bytes", sa.BigInteger, nullable=False),
        sa.Column("weights_sha256", sa.Text, nullable=False),
        sa.Column("weights_bytes", sa.BigInteger, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("modules", sa.Text, nullable=False),
        sa.Column("base_fingerprint", sa.Text, nullable=False),
        sa.Column("provenance", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
        sa.UniqueConstraint("adapter_id", "digest", name="uq_versions_adapter_id_digest"),
    )
    op.create_index("ix_versions_tenant_id_config_sha256", "versions", ["tenant_id", "config_sha256"])
    op.create_index("ix_versions_tenant_id_weights_sha256", "versions", ["tenant_id", "weights_sha256"])


def create_change_feed() -> None:
    counter = op.create_table(
        "change_counter",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
    op.create_table(
        "changes",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("noun", sa.Text, nullable=False),
        sa.Column("tenant_id", sa.Text),
        sa.Column("name", sa.Text),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    for table in ("changes", "change_counter", "aliases", "versions", "adapters", "api_keys", "tenants"):
        op.drop_table(table)
