"""Adapters that are held back, and those that are kept loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quarantine",
        sa.Column("tenant_id", sa.Text, primary_key=True),
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("replica", sa.Text, nullable=False),
        sa.Column("generation", sa.Text, nullable=False),
        sa.Column("strikes", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger),
        sa.Column("lifted_at", sa.BigInteger),
    )
    op.create_table(
        "pins",
        sa.Column("tenant_id", sa.Text, primary_key=True),
        sa.Column("adapter", sa.Text, primary_key=True),
        sa.Column("pinned_by", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.add_column("plans", sa.Column("pinned_adapters", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("plans", "pinned_adapters")
    op.drop_table("pins")
    op.drop_table("quarantine")
