"""Plans, key rotation, the usage ledger, replicas added at run time, an alias's fallback."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_plans()
    op.add_column("tenants", sa.Column("plan", sa.Text, nullable=False, server_default="default"))
    op.add_column("tenants", sa.Column("suspended_at", sa.BigInteger))
    op.add_column("api_keys", sa.Column("created_by", sa.Text))
    op.add_column("api_keys", sa.Column("replaces", sa.Text))
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    op.add_column("aliases", sa.Column("fallback", sa.Text, nullable=False, server_default="fail"))
    create_usage()
    op.create_table(
        "replicas",
        sa.Column("url", sa.Text, primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("drained_at", sa.BigInteger),
    )


def create_plans() -> None:
    plans = op.create_table(
        "plans",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("concurrent_requests", sa.BigInteger),
        sa.Column("max_output_tokens", sa.BigInteger),
        sa.Column("max_prompt_bytes", sa.BigInteger),
        sa.Column("tokens_per_month", sa.BigInteger),
        sa.Column("loads_per_minute", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(plans, [{"name": "default", "weight": 1.0, "created_at": 0}])


def create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant_id", sa.Text, primary_key=True),
        sa.Column("adapter", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_usage_tenant_id_hour", "usage", ["tenant_id", "hour"])
    op.create_table(
        "usage_batches",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    for table in ("replicas", "usage_batches", "usage", "plans"):
        op.drop_table(table)
    op.drop_column("aliases", "fallback")
    op.drop_index("ix_api_keys_tenant_id", "api_keys")
    for column in ("replaces", "created_by"):
        op.drop_column("api_keys", column)
    for column in ("suspended_at", "plan"):
        op.drop_column("tenants", column)
