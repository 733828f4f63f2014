"""Proof of effect: a badge for each version, its fingerprints, and tenants' golden prompts."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "proofs",
        _of("versions", "version_id", "fk_proofs_version_id"),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
        sa.Column("claim", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("checked_at", sa.BigInteger),
        sa.Column("difference", sa.Double),
        sa.Column("prompts", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("reference", sa.Text),
        sa.Column("mismatches", sa.Integer, nullable=False),
        sa.Column("mismatched_on", sa.Text),
    )
    op.create_index("ix_proofs_status_tenant_id_due_at", "proofs", ["status", "tenant_id", "due_at"])
    op.create_table(
        "fingerprints",
        _of("versions", "version_id", "fk_fingerprints_version_id"),
        sa.Column("build", sa.Text, primary_key=True),
        sa.Column("token_hash", sa.Text, nullable=False),
        sa.Column("answers", sa.Text, nullable=False),
        sa.Column("made_at", sa.BigInteger, nullable=False),
    )
    op.create_table("proof_moves", _of("versions", "version_id", "fk_proof_moves_version_id"))
    op.create_table(
        "golden_prompts",
        _of("adapters", "adapter_id", "fk_golden_prompts_adapter_id"),
        sa.Column("prompts", sa.Text, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )


def _of(table: str, column: str, name: str) -> sa.Column[str]:
    """A key that is another table's, and goes with its row there."""
    return sa.Column(column, sa.Text, sa.ForeignKey(f"{table}.id", name=name, ondelete="CASCADE"), primary_key=True)


def downgrade() -> None:
    for table in ("golden_prompts", "proof_moves", "fingerprints", "proofs"):
        op.drop_table(table)
