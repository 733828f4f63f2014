"""Tenants' examples of good answers, and how likely each version finds them."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "examples",
        _of("adapters", "adapter_id", "fk_examples_adapter_id"),
        sa.Column("examples", sa.Text, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "scores",
        _of("versions", "version_id", "fk_scores_version_id"),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("score", sa.Double, nullable=False),
    )


def _of(table: str, column: str, name: str) -> sa.Column[str]:
    """A key that is another table's, and goes with its row there."""
    return sa.Column(column, sa.Text, sa.ForeignKey(f"{table}.id", name=name, ondelete="CASCADE"), primary_key=True)


def downgrade() -> None:
    for table in ("scores", "examples"):
        op.drop_table(table)
