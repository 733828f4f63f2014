"""Erasures with their receipts, version numbers that are never given twice, signatures and the keys that made them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_erasures()
    create_signatures()


def create_erasures() -> None:
    op.add_column("adapters", sa.Column("last_number", sa.Integer, nullable=False, server_default="0"))
    op.execute(
        "UPDATE adapters SET last_number ="
        " COALESCE((SELECT MAX(number) FROM versions WHERE versions.adapter_id = adapters.id), 0)"
    )
    op.create_table(
        "erasures",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("adapter_id", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("number", sa.Integer),
        sa.Column("forced", sa.Integer, nullable=False),
        sa.Column("requested_by", sa.Text),
        sa.Column("requested_at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.Column("aliases", sa.Text, nullable=False),
        sa.Column("blobs", sa.Text, nullable=False),
        sa.Column("blobs_gone_at", sa.BigInteger),
        sa.Column("replicas_gone_at", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("signature", sa.Text),
    )
    op.create_index("ix_erasures_tenant_id_id", "erasures", ["tenant_id", "id"])
    op.create_index("ix_erasures_state", "erasures", ["state"])
    op.create_table(
        "erasure_replicas",
        sa.Column(
            "erasure_id",
            sa.Text,
            sa.ForeignKey("erasures.id", name="fk_erasure_replicas_erasure_id"),
            primary_key=True,
        ),
        sa.Column("replica", sa.Text, primary_key=True),
        sa.Column("outcome", sa.Text),
        sa.Column("engine_gone_at", sa.BigInteger),
        sa.Column("disk_gone_at", sa.BigInteger),
        sa.Column("confirmed_by", sa.Text),
    )


def create_signatures() -> None:
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.Text, primary_key=True),
        sa.Column("x", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "version_signatures",
        sa.Column(
            "version_id",
            sa.Text,
            sa.ForeignKey("versions.id", name="fk_version_signatures_version_id"),
            primary_key=True,
        ),
        sa.Column("signature", sa.Text, nullable=False),
    )


def downgrade() -> None:
    for table in ("version_signatures", "signing_keys", "erasure_replicas", "erasures"):
        op.drop_table(table)
    op.drop_column("adapters", "last_number")
