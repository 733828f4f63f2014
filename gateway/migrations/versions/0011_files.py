"""Files for fine-tuning, their uploads in parts, what of them a plan allows; erasures of other things than adapters."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

QUOTAS = ("max_files", "max_stored_file_bytes")


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text, primary_key=True),
        *_described(),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("created_by", sa.Text),
        sa.Column("report", sa.Text),
    )
    op.create_index("ix_files_tenant_id_id", "files", ["tenant_id", "id"])
    op.create_index("ix_files_tenant_id_sha256", "files", ["tenant_id", "sha256"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_table(
        "file_uploads",
        sa.Column("id", sa.Text, primary_key=True),
        *_described(),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("expires_after_s", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("file_id", sa.Text),
    )
    op.create_index("ix_file_uploads_tenant_id", "file_uploads", ["tenant_id"])
    op.create_index("ix_file_uploads_expires_at", "file_uploads", ["expires_at"])
    op.create_index("ix_file_uploads_file_id", "file_uploads", ["file_id"])
    upload = sa.ForeignKey("file_uploads.id", name="fk_file_upload_parts_upload_id")
    op.create_table(
        "file_upload_parts",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("upload_id", sa.Text, upload, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("upload_id", "sha256", name="uq_file_upload_parts_upload_id_sha256"),
    )
    for quota in QUOTAS:
        op.add_column("plans", sa.Column(quota, sa.BigInteger))
    op.add_column("erasures", sa.Column("scope", sa.Text))
    op.add_column("erasures", sa.Column("files", sa.Text, nullable=False, server_default="[]"))


def _described() -> list[sa.Column[str]]:
    """Whose it is, what for, and what its sender calls it."""
    return [sa.Column(name, sa.Text, nullable=False) for name in ("tenant_id", "purpose", "filename")]


def downgrade() -> None:
    for column in ("files", "scope"):
        op.drop_column("erasures", column)
    for quota in QUOTAS:
        op.drop_column("plans", quota)
    for table in ("file_upload_parts", "file_uploads", "files"):
        op.drop_table(table)
