"""Aliases with weights, their history, rollouts."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("aliases", sa.Column("weight", sa.Integer, nullable=False, server_default="0"))
    op.add_column("aliases", sa.Column("rollout_id", sa.Text))
    op.create_table(
        "alias_shares",
        sa.Column("adapter_id", sa.Text, primary_key=True),
        sa.Column("alias", sa.Text, primary_key=True),
        sa.Column(
            "version_id", sa.Text, sa.ForeignKey("versions.id", name="fk_alias_shares_version_id"), primary_key=True
        ),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "alias"], ["aliases.adapter_id", "aliases.name"], name="fk_alias_shares_alias"
        ),
    )
    op.create_table(
        "alias_moves",
        sa.Column(
            "adapter_id", sa.Text, sa.ForeignKey("adapters.id", name="fk_alias_moves_adapter_id"), primary_key=True
        ),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("moved_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("before", sa.Text, nullable=False),
        sa.Column("after", sa.Text, nullable=False),
        sa.Column("undone", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    create_rollouts()


def create_rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("adapter_id", sa.Text, sa.ForeignKey("adapters.id", name="fk_rollouts_adapter_id"), nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("baseline_id", sa.Text, nullable=False),
        sa.Column("baseline", sa.Integer, nullable=False),
        sa.Column("candidate_id", sa.Text, nullable=False),
        sa.Column("candidate", sa.Integer, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("step_at", sa.BigInteger, nullable=False),
        sa.Column("step_requests", sa.BigInteger, nullable=False),
        sa.Column("started_by", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
    )
    op.create_index("ix_rollouts_adapter_id", "rollouts", ["adapter_id"])
    op.create_index("ix_rollouts_status", "rollouts", ["status"])
    op.create_table(
        "rollout_counts",
        sa.Column(
            "rollout_id", sa.Text, sa.ForeignKey("rollouts.id", name="fk_rollout_counts_rollout_id"), primary_key=True
        ),
        sa.Column("version_id", sa.Text, primary_key=True),
        sa.Column("gateway", sa.Text, primary_key=True),
        sa.Column("tally", sa.Text, nullable=False),
    )


def downgrade() -> None:
    """An alias that stood for several versions stands for its own one alone."""
    for table in ("rollout_counts", "rollouts", "alias_moves", "alias_shares"):
        op.drop_table(table)
    for column in ("rollout_id", "weight"):
        op.drop_column("aliases", column)
