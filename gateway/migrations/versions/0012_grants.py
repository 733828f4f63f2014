"""Permissions to ask another tenant's version; limits of tenants' jobs in plans."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

LIMITS = ("max_queued_jobs", "max_running_jobs")


def upgrade() -> None:
    for limit in LIMITS:
        op.add_column("plans", sa.Column(limit, sa.BigInteger))
    op.create_table(
        "grants",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("version_id", sa.Text, sa.ForeignKey("versions.id", name="fk_grants_version_id"), nullable=False),
        sa.Column("granted_to", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.UniqueConstraint("version_id", "granted_to", name="uq_grants_version_id_granted_to"),
    )
    op.create_index("ix_grants_granted_to", "grants", ["granted_to"])


def downgrade() -> None:
    op.drop_table("grants")
    for limit in LIMITS:
        op.drop_column("plans", limit)
