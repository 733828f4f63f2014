"""Uploads in parts, answers kept for repeated requests, quotas of plans, who published a version."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

QUOTAS = ("max_adapters", "max_versions", "max_stored_bytes", "max_rank")


def upgrade() -> None:
    op.add_column("versions", sa.Column("published_by", sa.Text))
    for quota in QUOTAS:
        op.add_column("plans", sa.Column(quota, sa.BigInteger))
    create_uploads()
    op.create_table(
        "kept_answers",
        sa.Column("tenant_id", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("request_sha256", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("location", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_kept_answers_expires_at", "kept_answers", ["expires_at"])


def create_uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("adapter_name", sa.Text, nullable=False),
        sa.Column("config_sha256", sa.Text, nullable=False),
        sa.Column("config_bytes", sa.BigInteger, nullable=False),
        sa.Column("weights_sha256", sa.Text, nullable=False),
        sa.Column("weights_bytes", sa.BigInteger, nullable=False),
        sa.Column("part_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("answer", sa.Text),
    )
    op.create_index("ix_uploads_tenant_id_adapter_name", "uploads", ["tenant_id", "adapter_name"])
    op.create_index("ix_uploads_expires_at", "uploads", ["expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column(
            "upload_id", sa.Text, sa.ForeignKey("uploads.id", name="fk_upload_parts_upload_id"), primary_key=True
        ),
        sa.Column("file", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    for table in ("kept_answers", "upload_parts", "uploads"):
        op.drop_table(table)
    for quota in QUOTAS:
        op.drop_column("plans", quota)
    op.drop_column("versions", "published_by")
